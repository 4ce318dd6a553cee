"""Find, by their names, the recipes and accelerate config files that come with the package."""

from __future__ import annotations

import difflib
from pathlib import Path

from hfpretrain.recipe.schema import RecipeError

# In a wheel the files are inside the package, in a checkout beside it.
_PACKAGE = Path(__file__).parent.parent
_HOME = _PACKAGE if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent
_FOLDERS = {"recipe": _HOME / "recipes", "engine": _HOME / "accelerate_configs"}


def file_names(kind: str) -> list[str]:
    """Names of all shipped files of a `kind`, which is "recipe" or "engine"."""
    return sorted(path.stem for path in _FOLDERS[kind].glob("*.yaml"))


def find_file(given: str | Path, *kinds: str, path: str = "recipe") -> Path:
    """The path `given` if it is a file, otherwise the shipped file of that name among `kinds`.

    Raises `RecipeError` with the nearest names if there is neither. `path`: the key that the error names.
    """
    if Path(given).is_file():
        return Path(given)
    for kind in kinds:
        if given in file_names(kind):
            return _FOLDERS[kind] / f"{given}.yaml"
    if Path(given).is_dir():
        inside = [file.name for file in sorted(Path(given).glob("*.yaml"))]
        advice = f"give one of its files: {', '.join(inside[:5])}" if inside else "give a file"
        raise RecipeError.at(path, f"{str(given)!r} is a folder; {advice}")
    known = [name for kind in kinds for name in file_names(kind)]
    nearest = difflib.get_close_matches(Path(given).stem, known, n=3, cutoff=0.5) or known
    message = f"there is no such {' or '.join(kinds)} file, and none of that name is shipped (got {str(given)!r})"
    raise RecipeError.at(path, f"{message}; shipped: {', '.join(nearest)}")
