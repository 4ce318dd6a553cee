"""Pretraining of causal language models with the Hugging Face stack.

As a library: `load_recipe`, `prepare`, `training_batches`, `train` and `evaluate_perplexity`, and the classes `Recipe`
and `RecipeError`, imported when first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfpretrain.loading import load_recipe
    from hfpretrain.prepare import prepare, training_batches
    from hfpretrain.recipe import Recipe, RecipeError
    from hfpretrain.score import evaluate_perplexity
    from hfpretrain.train import train

__all__ = ["Recipe", "RecipeError", "evaluate_perplexity", "load_recipe", "prepare", "train", "training_batches"]
__version__ = "0.1.0"
_HOMES = {
    "Recipe": "recipe",
    "RecipeError": "recipe",
    "load_recipe": "loading",
    "training_batches": "prepare",
    "evaluate_perplexity": "score",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, name)}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """`hfpretrain.train` and `hfpretrain.prepare` are the functions, whether or not the modules that hold them, which
    Python sets as attributes of the package when it imports them, are there already."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
