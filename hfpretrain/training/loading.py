"""Reads a recipe, with every check that can be made before a run."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from hfpretrain.evaluation.recipe_metrics import trust_problems
from hfpretrain.recipe import shipped
from hfpretrain.recipe.schema import Recipe
from hfpretrain.recipe.yaml import read_recipe


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read and validate a recipe: the path of a file, or the name of a recipe shipped with the package (`quickstart`).

    `overrides` are the `--section.key=value` of the command line. The model's config, the chat template and the
    tokenizer's pattern are checked if transformers is installed. Raises `RecipeError` with all problems at once. Remote
    code that the recipe names but does not trust is one of them.
    """
    checks = [trust_problems]
    if find_spec("transformers") is not None:
        from hfpretrain.data.tokenizer import chat_template_problems, pattern_problems
        from hfpretrain.modeling.config import config_problems

        checks += [config_problems, chat_template_problems, pattern_problems]
    return read_recipe(shipped.find_file(path, "recipe"), overrides, checks)
