"""The commits at which a run loads model and tokenizer from the Hub. One process finds them, and all use them."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

from hfpretrain.recipe.addresses import checkpoint_folder, missing_path_problem, parse_hub_address
from hfpretrain.recipe.hub import explain_failure
from hfpretrain.recipe.schema import ModelSection, Recipe, RecipeError, TokenizerSection
from hfpretrain.training.run_folder import ENVIRONMENT

ENVIRONMENT_KEY = "hub_commits"
"""Key of `environment.json` under which a run stores the result of `find`."""


def find(
    model: ModelSection, tokenizer: TokenizerSection, output_dir: Path, start_from: str | None
) -> dict[str, str | None]:
    """Map each `pretrained` key of a recipe to its commit hash.

    A local folder maps to None. In offline mode, a repository that is not cached maps to an empty string. A run that
    resumes uses the commits in its own records. A run that starts from another run's checkpoint, `start_from`, uses the
    commits of that run. In all other cases the Hub is asked.

    Only the main process calls this: if every rank asked, a push between two requests could give them different
    commits. Raises `RecipeError` if the Hub does not answer, or has no such repo or revision.
    """
    known, found = _recorded_commits(output_dir, start_from), dict[str, str | None]()
    asked: dict[tuple[str, str | None], str | None] = {}
    for key, section in _sections(model, tokenizer):
        name, revision = section.pretrained or "", section.revision
        if Path(name).exists() or missing_path_problem(name):
            found[key] = None
        elif known.get(key):
            found[key] = known[key]
        else:
            if (name, revision) not in asked:
                asked[name, revision] = _find_commit(key, name, revision)
            found[key] = asked[name, revision]
    return found


def pin_revisions(recipe: Recipe, found: dict[str, str | None]) -> Recipe:
    """The recipe with the commits of `find` as revisions.

    Raises `RecipeError` if a name is a folder on this machine but not on the one where the commits were found, or vice
    versa.
    """
    updates = {}
    for key, section in _sections(recipe.model, recipe.tokenizer):
        is_folder = Path(section.pretrained or "").exists()
        if is_folder != (found[key] is None) and not missing_path_problem(section.pretrained or ""):
            ranks = [f"rank {os.environ.get('RANK', '0')} on {platform.node()}", "rank 0"]
            has_it, lacks_it = ranks if is_folder else reversed(ranks)
            message = f"{section.pretrained} is a local folder for {has_it}, but not for {lacks_it}"
            raise RecipeError.at(key, f"{message}; all ranks must load the same folder or the same repo")
        if found[key]:
            updates[key.partition(".")[0]] = section.model_copy(update={"revision": found[key]})
    return recipe.model_copy(update=updates)


def notes(model: ModelSection, tokenizer: TokenizerSection, found: dict[str, str | None]) -> Iterator[str]:
    """A sentence for each commit that the recipe does not name itself."""
    for key, section in _sections(model, tokenizer):
        if found[key] and found[key] != section.revision:
            yield f"{key}: {section.pretrained} is loaded at commit {found[key]}"


def _sections(
    model: ModelSection, tokenizer: TokenizerSection
) -> Iterator[tuple[str, ModelSection | TokenizerSection]]:
    sections = (("model.pretrained", model), ("tokenizer.pretrained", tokenizer))
    return ((key, section) for key, section in sections if section.pretrained is not None)


def _recorded_commits(output_dir: Path, start_from: str | None) -> dict[str, str | None]:
    """The recorded commits of the run in the output folder, or else of the run of the checkpoint `start_from`."""
    folders = [output_dir]
    if start_from is not None and parse_hub_address(start_from) is None:
        folders.append(checkpoint_folder(start_from).absolute().parent.parent)
    for folder in folders:
        path = folder / ENVIRONMENT
        if path.is_file():
            try:
                return dict(json.loads(path.read_text(encoding="utf-8")).get(ENVIRONMENT_KEY, {}))
            except (ValueError, TypeError, AttributeError) as error:
                raise RecipeError.at(str(path), f"is damaged, so the commits of the run are unknown: {error}") from None
    return {}


def _find_commit(key: str, repo_id: str, revision: str | None) -> str | None:
    """The commit hash of a revision.

    In offline mode, this is the commit of the cached files. If no files are cached, it is an empty string, and loading
    them later raises an error with the reason.
    """
    from huggingface_hub import HfApi, is_offline_mode, try_to_load_from_cache

    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    if is_offline_mode():
        for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
            if isinstance(path := try_to_load_from_cache(repo_id, name, revision=revision), str):
                return Path(path).parent.name
        return ""
    try:
        return HfApi().model_info(repo_id, revision=revision, timeout=60).sha
    except Exception as error:  # the Hub's HTTP library has exceptions of its own
        at = f"@{revision}" if revision else ""
        message = f"{repo_id}{at} is not a local folder, and the Hub request failed: {explain_failure(error).text}"
        raise RecipeError.at(key, f"{message}; set HF_HUB_OFFLINE=1 to use the local cache") from error
