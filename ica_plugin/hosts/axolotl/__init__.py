"""Axolotl: the plugin class, the `ica:` block in its schema, and the holdout through its own loaders."""
