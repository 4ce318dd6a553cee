"""Floating point operations of training, from the sizes of a model."""

from __future__ import annotations

from transformers import PretrainedConfig

from hfpretrain.modeling.structure import FrozenPart, Parameters


def flops_per_token(num_matmul_parameters: int, num_layers: int, hidden_size: int, block_size: int) -> float:
    """Training FLOPs per token, forward and backward: 6 N + 12 L H T (Chowdhery et al. 2022, PaLM, appendix B)."""
    return 6.0 * num_matmul_parameters + 12.0 * num_layers * hidden_size * block_size


def model_flops_per_token(
    config: PretrainedConfig, counts: Parameters, block_size: int, frozen: FrozenPart | None = None
) -> float:
    """Training FLOPs per token of a model, from the parameters in its matrix products and its attention layers.

    A parameter takes 2 FLOPs in the forward pass, 2 for the gradient of its input and 2 for its own. `frozen`: the part
    of the model without the last, and without the second below every trained parameter.
    """
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["attention"] * (getattr(text, "num_hidden_layers", 0) or 0)
    attention = sum("attention" in kind and "linear" not in kind for kind in kinds)
    hidden = getattr(text, "hidden_size", 0) or 0
    whole = flops_per_token(counts.active_non_embedding + text.vocab_size * hidden, attention, hidden, block_size)
    if frozen is None:
        return whole
    attention_below = sum("attention" in kind and "linear" not in kind for kind in kinds[: frozen.layers_below])
    return whole - 2.0 * (frozen.parameters + frozen.below) - 8.0 * attention_below * hidden * block_size
