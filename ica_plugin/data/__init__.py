"""Rows as the host trains them: read, numbered, and the holdout beside them."""
