"""The scaling ladder (small runs of one model family and the law fitted to them), and the proof of resuming."""
