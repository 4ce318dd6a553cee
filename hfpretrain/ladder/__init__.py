"""The scaling ladder (small runs of one family and the law fitted to them), and the proof that a recipe resumes."""
