"""Tell paths from Hub ids in a recipe's values, and explain why one of them can't be loaded."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LFS_POINTER_PROBLEM = "is a Git LFS pointer, not the file: get it with `git lfs pull`"


# The pattern of `huggingface_hub.utils.validate_repo_id`; importing that would make `hfpretrain check` slower.
_REPO_ID = re.compile(r"(\b[\w\-.]{1,96}\b/)?\b[\w\-.]{1,96}\b", re.ASCII)


def repo_id_problem(repo_id: str) -> str | None:
    """Why `repo_id` can't be the id of a Hub repo; None if it can."""
    if not _REPO_ID.fullmatch(repo_id) or "--" in repo_id or ".." in repo_id or repo_id.endswith(".git"):
        return f"{repo_id!r} is not a valid repo id; write USER/NAME with letters, digits, `-`, `_` and `.`"
    return None


_SUFFIXES = (".json", ".jsonl", ".safetensors", ".bin", ".pt", ".gguf", ".txt", ".yaml", ".yml")


def missing_path_problem(given: str) -> str | None:
    """The problem if `given` looks like a path and nothing is there; None if the path exists or it may be a Hub id."""
    path = Path(given)
    if path.exists():
        return None
    is_below_folder = path.parent != Path(".") and path.parent.is_dir()
    if not (given.startswith((".", "/", "~")) or given.count("/") > 1 or path.suffix in _SUFFIXES or is_below_folder):
        return None
    if given.startswith("~"):
        return f"there is no {given!r}: only the shell expands `~`; write the whole path"
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    nearest = difflib.get_close_matches(path.name, names, n=1)
    hint = f"; did you mean {path.parent / nearest[0]}?" if nearest else ""
    return f"there is no file or folder {given!r}{hint}"


def load_error_message(given: str, error: Exception) -> str:
    """The message for a folder or a Hub id that could not be loaded; `error` is what the library raised."""
    line = (str(error).splitlines() or [""])[0]
    line = line if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {line}"
    path = Path(given)
    if (path / "train_state.json").is_file():
        return f"{given!r} is a checkpoint of a run; export it with `hfpretrain export {given} OUT` and give OUT"
    if (path / "model" / "config.json").is_file() and not (path / "config.json").is_file():
        return f"{given!r} is a run; did you mean {path / 'model'}?"
    if path.exists():
        return f"cannot load {given!r}: {_missing_file_problem(path) or line}"
    return f"there is no folder {given!r}, and it does not load from the Hub either: {line}"


def _missing_file_problem(folder: Path) -> str | None:
    """The problem with the first broken link or Git LFS pointer in a folder; None if there is neither."""
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.is_symlink() and not file.exists():
            return f"{file} is a link to {file.readlink()}, which is missing"
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(LFS_POINTER):
            return f"{file} {LFS_POINTER_PROBLEM}"
    return None


_STEP = re.compile(r"(.+)@(?:step-)?(\d{1,8})")


def checkpoint_folder(address: str) -> Path:
    """The folder of a checkpoint that is given as `RUN@STEP`, for example `runs/base@1000`, or as the folder itself."""
    match = _STEP.fullmatch(address)
    if match is None or Path(address).exists():
        return Path(address)
    return Path(match[1]) / "checkpoints" / f"step-{int(match[2]):08d}"


def parse_hub_address(address: str) -> tuple[str, str] | None:
    """Repo id and revision of `hub://USER/NAME@REVISION`; None if `address` does not begin with `hub://`."""
    if not address.startswith("hub://"):
        return None
    repo_id, _, revision = address.removeprefix("hub://").partition("@")
    if repo_id_problem(repo_id) is not None or not revision:
        raise ValueError(f"{address!r} is not of the form hub://USER/NAME@step-00001000")
    return repo_id, revision
