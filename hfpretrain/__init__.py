"""Pretraining of causal language models with the Hugging Face stack.

As a library: `load_recipe`, `prepare`, `training_batches`, `train` and `evaluate_perplexity`, and the classes `Recipe`
and `RecipeError`, imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfpretrain.data.batches import training_batches
    from hfpretrain.data.prepare import prepare
    from hfpretrain.evaluation.score import evaluate_perplexity
    from hfpretrain.recipe.schema import Recipe, RecipeError
    from hfpretrain.train import train
    from hfpretrain.training.loading import load_recipe

__all__ = ["Recipe", "RecipeError", "evaluate_perplexity", "load_recipe", "prepare", "train", "training_batches"]
__version__ = "0.1.0"
_HOMES = {
    "Recipe": "recipe.schema",
    "RecipeError": "recipe.schema",
    "load_recipe": "training.loading",
    "prepare": "data.prepare",
    "train": "train",
    "training_batches": "data.batches",
    "evaluate_perplexity": "evaluation.score",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    # Importing the module `train` has set the attribute of this name to the module: set it to the function.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
