"""What is run, what came out, and how sure we are."""
