"""The shares of one preparation on several machines (`hfpretrain prepare --shard I/N`), and what each is made from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hfpretrain import files
from hfpretrain.data.remote_copy import RemoteCopy
from hfpretrain.recipe.schema import DataSection, Problem, RecipeError, TokenizerSection


@dataclass(frozen=True)
class Shard:
    """One machine's part of a preparation."""

    folder: str
    """Name of the prepared folder that it is a part of."""
    made_from: dict[str, Any]
    """Identities of sources and tokenizer, versions of libraries, by the recipe's key or the library's name."""
    index: int = 0
    """From 0."""
    count: int = 1
    host: str = ""

    def __str__(self) -> str:
        return f"share {self.index + 1}/{self.count} of {self.host}"

    def differences(self, other: Shard) -> Iterator[Problem]:
        """In what the two differ of what they are made from."""
        if self.count != other.count:
            yield Problem("--shard", f"{self.count} shares here, {other.count} there; use the same number for all")
        for key in sorted(self.made_from.keys() | other.made_from.keys()):
            here, there = self.made_from.get(key), other.made_from.get(key)
            if here != there:
                yield Problem(key, f"{_first_difference(here, there)} here, {_first_difference(there, here)} there")


def _first_difference(one: Any, other: Any) -> str:
    """What `one` has and `other` has not, of lists only that item."""
    if isinstance(one, list) and isinstance(other, list):
        one = next((item for item in one if item not in other), f"{len(one)} files")
    return f"{one}"


class ShardRegistry:
    """What the shares of a recipe's preparation were made from, in a folder beside the prepared ones.

    It is named after what the recipe says, so that machines which have the same recipe find each other also where
    their copies of the text differ.
    """

    def __init__(self, data: DataSection, tokenizer: TokenizerSection, prepared_dir: Path):
        said = [
            data.model_dump(mode="json", exclude={"prepared_dir", "stages", "shift_blocks"}),
            tokenizer.model_dump(mode="json", exclude={"chat_template"}),
        ]
        key = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]
        self._folder = prepared_dir / f"shares-{key}"
        url = data.prepared_dir or ""
        self._mirror = RemoteCopy(f"{url.rstrip('/')}/{self._folder.name}") if "://" in url else None

    def others(self, ours: Shard) -> list[Shard]:
        """The shares of unfinished preparations but this one."""
        if self._mirror is not None:
            self._mirror.pull(self._folder, self._mirror.names())
        found = []
        for path in sorted(self._folder.glob("*-of-*.json")):
            try:
                share = Shard(**json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):  # of another version, or being removed
                continue
            is_other = (share.index, share.count) != (ours.index, ours.count)
            if is_other and files.manifest_of(self._folder.parent / share.folder) is None:
                found.append(share)
        return found

    def add(self, share: Shard) -> None:
        """Note that this machine does a share. Raises `RecipeError` if others were made from something else."""
        name = f"{share.index + 1}-of-{share.count}.json"
        share = Shard(share.folder, json.loads(json.dumps(share.made_from)), share.index, share.count, platform.node())
        self._folder.mkdir(parents=True, exist_ok=True)
        files.write_whole(self._folder / name, json.dumps(asdict(share), indent=1))
        # First written and then compared: of two that begin at once, one at least sees the other.
        for other in self.others(share):
            if problems := list(share.differences(other)):
                (self._folder / name).unlink()
                advice = f"make the following the same on both, or delete {self._folder} to start over"
                raise RecipeError([Problem("--shard", f"{share} does not fit {other}; {advice}"), *problems])
        if self._mirror is not None:
            self._mirror.push(self._folder, [name])

    def remove(self, folder: str) -> None:
        """Forget those of a preparation that is finished."""
        for path in self._folder.glob("*-of-*.json"):
            if json.loads(path.read_text(encoding="utf-8")).get("folder") == folder:
                path.unlink()
        with contextlib.suppress(OSError):  # there are others, or none
            self._folder.rmdir()
