"""One run: when to score, what, on which rank, and what is kept and written."""
