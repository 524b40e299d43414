"""Records, verdicts, pages and pictures: nothing of the science."""
