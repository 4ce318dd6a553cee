"""The full state of a run: saving, verifying and resuming it, and exporting it as a plain Hugging Face folder."""
