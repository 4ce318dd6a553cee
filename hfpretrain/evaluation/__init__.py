"""Loss, perplexity, bits per byte, prompts, downstream tasks and metrics; scoring and comparing checkpoints."""
