"""One thin module per host."""
