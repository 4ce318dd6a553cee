"""What the labels of a batch mean, which data, loss, engines and evaluation agree on."""

IGNORE_INDEX = -100
"""A label of this value is no target: it adds nothing to a loss and is not counted. Transformers and torch use it."""
