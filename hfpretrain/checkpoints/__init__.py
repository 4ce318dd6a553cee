"""The full state of a run in pieces: saving, verifying, resuming, and the export as a plain Hugging Face folder."""
