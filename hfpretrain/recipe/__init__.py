"""The recipe of a run: its sections and keys, YAML and overrides, and the recipes that come with the package."""
