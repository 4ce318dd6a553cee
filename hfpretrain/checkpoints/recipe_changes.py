"""Whether a recipe may resume the run of another recipe. Does not import torch, since `hfpretrain check` uses it."""

from __future__ import annotations

from collections.abc import Iterator

from hfpretrain.data.tokenizer import document_prefix, load_tokenizer
from hfpretrain.recipe.schema import Problem, Recipe, TokenizerSection
from hfpretrain.recipe.yaml import CHANGEABLE_ON_RESUME, differences


def forbidden_changes(recipe: Recipe, begun: Recipe) -> list[Problem]:
    """Keys in which `recipe` differs from the recipe `begun` of the run that it resumes.

    The keys in `CHANGEABLE_ON_RESUME` are left out.
    """
    changed = differences(recipe, begun, ignore=CHANGEABLE_ON_RESUME)
    same_tokenizer = not any(problem.path.startswith("tokenizer.") for problem in changed)
    if same_tokenizer and recipe.tokenizer.add_bos != begun.tokenizer.add_bos:
        changed += _framing_changes(recipe.tokenizer, begun.tokenizer)
    return changed


def _framing_changes(now: TokenizerSection, then: TokenizerSection) -> Iterator[Problem]:
    """A problem if documents begin differently under `now` and `then`. So null in one and the value that it stands for
    in the other are no problem."""
    first, second = (document_prefix(load_tokenizer(section)) for section in (now, then))
    if first != second:
        names = ["BOS" if prefix else "no BOS" for prefix in (first, second)]
        message = f"documents begin with {names[0]} in this recipe, but with {names[1]} in the run's recipe"
        yield Problem("tokenizer.add_bos", f"{message} (got {now.add_bos!r}, the run's recipe has {then.add_bos!r})")
