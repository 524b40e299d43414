"""What each part of the book asks, a file for a chapter or two."""
