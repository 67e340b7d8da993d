"""Scores → weights, and what goes with them: demonstrations, neighbours, draws."""
