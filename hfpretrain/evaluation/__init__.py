"""Loss, perplexity and bits per byte, prompts, downstream tasks, metrics; scoring and comparing checkpoints."""
