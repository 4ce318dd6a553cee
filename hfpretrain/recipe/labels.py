"""The label that marks a token without a loss, for data, loss, engines and evaluation."""

IGNORE_INDEX = -100
"""A token with this label adds nothing to the loss and is not counted. Transformers and torch use the same value."""
