"""Load a checkpoint and its tokenizer for evaluation, from a folder or from the Hub."""

from __future__ import annotations

from typing import Any

import torch

from hfpretrain.checkpoints import locate
from hfpretrain.data.tokenizer import load_tokenizer
from hfpretrain.recipe.addresses import load_error_message
from hfpretrain.recipe.schema import Problem, RecipeError, TokenizerSection


def load_checkpoint(model: str) -> tuple[Any, Any]:
    """The tokenizer and the model of a folder or Hub id; the model in float32, on an accelerator if there is one.

    Raises `RecipeError` if it can't be loaded or lacks weights.
    """
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.utils.logging.disable_progress_bar()
    with locate.locate_model(model) as source:
        try:
            tokenizer = load_tokenizer(TokenizerSection(pretrained=source.path, revision=source.revision))
        except RecipeError as error:
            raise RecipeError([Problem("model", problem.message) for problem in error.problems]) from error
        try:
            network, info = AutoModelForCausalLM.from_pretrained(
                source.path,
                revision=source.revision,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
            )
        except Exception as error:  # a broken file may raise anything
            raise RecipeError.at("model", load_error_message(source.path, error)) from error
    if missing := sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}):
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise RecipeError.at("model", f"{model} lacks {len(missing)} weights of {type(network).__name__}: {names}")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return tokenizer, network.eval().to(device)


def require_embedded(network: Any, largest_id: int) -> None:
    """Raise `RecipeError` if the model has no embedding for `largest_id`, a token id from the tokenizer."""
    rows = network.get_input_embeddings().num_embeddings
    if largest_id >= rows:
        message = (
            f"gives token id {largest_id}, but the model has only {rows} embeddings; use the model's own tokenizer"
        )
        raise RecipeError.at("tokenizer", message)
