"""Finding the model that a user named: an exported folder, a run, a checkpoint, or a repo of the Hub."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hfpretrain.checkpoints import export, resume, saver
from hfpretrain.recipe.addresses import missing_path_problem, repo_id_problem
from hfpretrain.recipe.schema import RecipeError


class Source(NamedTuple):
    """What to give to `from_pretrained`: a folder, or a repo id of the Hub and its revision."""

    path: str
    revision: str | None = None


@contextlib.contextmanager
def locate_model(given: str, key: str = "model") -> Iterator[Source]:
    """Find what to give to `from_pretrained` for the model `given`.

    `given`: an exported folder, a run (its export, or else its newest checkpoint), a checkpoint (exported to a folder
    that exists while the context is open), or `ID@REVISION` of the Hub. Raises `RecipeError` at `key` where it is none
    of these.
    """
    path = Path(given)
    if (path / "config.json").is_file():
        yield Source(given)
    elif saver.is_checkpoint(path):
        with _temporary_export(path) as folder:
            yield Source(folder)
    elif (path / "model" / "config.json").is_file():
        print(f"{given}: using its export, {path / 'model'}", file=sys.stderr)
        yield Source(str(path / "model"))
    elif (newest := resume.newest_undamaged(path)) is not None:
        print(f"{given}: using its newest checkpoint, {newest}", file=sys.stderr)
        with _temporary_export(newest) as folder:
            yield Source(folder)
    elif path.exists():
        runs = [
            entry for entry in sorted(path.glob("*")) if (entry / "model").is_dir() or (entry / "checkpoints").is_dir()
        ]
        parents = [parent for parent in path.absolute().parents if (parent / "model" / "config.json").is_file()]
        near = [*parents[:1], *runs[:1]]
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RecipeError.at(
            key, f"{given} contains no model: it is neither an exported folder, nor a checkpoint, nor a run{hint}"
        )
    else:
        yield _hub_source(given, key)


def _hub_source(given: str, key: str) -> Source:
    repo_id, _, revision = given.removeprefix("hub://").partition("@")
    problem = None if given.startswith("hub://") else missing_path_problem(given)
    if revision and Path(repo_id).exists():
        problem = f"{repo_id} is a local folder, which has no revisions (got {given!r})"
    problem = problem or repo_id_problem(repo_id)
    if problem is not None:
        raise RecipeError.at(key, problem)
    return Source(repo_id, revision or None)


@contextlib.contextmanager
def _temporary_export(checkpoint: Path) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        export.write_checkpoint_model(export.run_of(checkpoint), checkpoint, folder)
        yield str(folder)
