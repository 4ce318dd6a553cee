"""A folder on any fsspec file system as the common copy of a local one: for machines that share no disk."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from hfpretrain import files
from hfpretrain.recipe.schema import RecipeError


class RemoteCopy:
    """`url` holds what several machines have each made of one folder; what is there is never changed.

    A folder is complete with its manifest, which is written last. Raises `RecipeError` where the file system's package
    is missing.
    """

    def __init__(self, url: str):
        import fsspec

        self.url = url
        try:
            self._filesystem, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise RecipeError.at("data.prepared_dir", f"cannot open {url}: {error}") from error

    def names(self) -> set[str]:
        """All files there, relative to the folder."""
        self._filesystem.invalidate_cache()
        root = self._root.rstrip("/") + "/"
        try:
            return {name.removeprefix(root) for name in self._filesystem.find(self._root)}
        except FileNotFoundError:
            return set()

    def pull(
        self,
        folder: Path,
        names: Collection[str] | Mapping[str, dict[str, Any]],
        file_read: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy those files into a local folder that are not there yet, each whole or not at all.

        With entries of a manifest as `names`, a file of another size is copied anew. `file_read` is called after each.
        """
        for name in names:
            if files.is_outside(name):
                message = f"{self.url} names a file {name!r}, which is outside of the folder"
                raise RecipeError.at("data.prepared_dir", message)
            path = folder / name
            size = names[name]["size"] if isinstance(names, Mapping) else None
            if not path.exists() or (size is not None and path.stat().st_size != size):
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(path.name + files.INCOMPLETE)
                self._filesystem.get_file(f"{self._root}/{name}", str(temporary))
                temporary.replace(path)
            file_read()

    def push(self, folder: Path, names: Iterable[str]) -> None:
        """Copy local files there, in the order given."""
        for name in names:
            target = f"{self._root}/{name}"
            self._filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._filesystem.put_file(str(folder / name), target)
