"""The vocabulary of a run: the sections and keys of a recipe, YAML and overrides, recipes by name."""
