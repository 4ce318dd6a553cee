"""Copy a local folder to a URL and back, for machines that share no disk."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from hfpretrain import files
from hfpretrain.recipe.schema import RecipeError


class RemoteCopy:
    """A folder at `url`, on any file system of fsspec. Several machines add files to it, and no file is ever changed.

    The manifest is uploaded last, so a folder with a manifest is complete. Raises `RecipeError` if the Python package
    for the file system is missing.
    """

    def __init__(self, url: str):
        import fsspec

        self.url = url
        try:
            self._filesystem, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise RecipeError.at("data.prepared_dir", f"cannot open {url}: {error}") from error

    def list_files(self) -> set[str]:
        """Names of all files at the URL, relative to the folder."""
        self._filesystem.invalidate_cache()
        root = self._root.rstrip("/") + "/"
        try:
            return {name.removeprefix(root) for name in self._filesystem.find(self._root)}
        except FileNotFoundError:
            return set()

    def download(
        self,
        folder: Path,
        names: Collection[str] | Mapping[str, dict[str, Any]],
        file_read: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy files that a local folder does not have yet into it. A file appears only when it is complete.

        `names`: names, or a manifest's entries by name; with entries, a local file of another size is copied again.
        `file_read`: called after each file.
        """
        for name in names:
            if files.is_outside(name):
                message = f"{self.url} has a file {name!r}, which is outside of the folder"
                raise RecipeError.at("data.prepared_dir", message)
            path = folder / name
            size = names[name]["size"] if isinstance(names, Mapping) else None
            if not path.exists() or (size is not None and path.stat().st_size != size):
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(path.name + files.INCOMPLETE)
                self._filesystem.get_file(f"{self._root}/{name}", str(temporary))
                temporary.replace(path)
            file_read()

    def upload(self, folder: Path, names: Iterable[str]) -> None:
        """Copy files of a local folder to the URL, in the order given."""
        for name in names:
            target = f"{self._root}/{name}"
            self._filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._filesystem.put_file(str(folder / name), target)


def remote_copy_of(folder: Path, prepared_dir: str | None) -> RemoteCopy | None:
    """The copy of `folder` at `data.prepared_dir`; None if that is not a URL."""
    if prepared_dir is None or "://" not in prepared_dir:
        return None
    return RemoteCopy(f"{prepared_dir.rstrip('/')}/{folder.name}")
