"""Register the shards of one preparation (`hfpretrain prepare --shard I/N`) and compare their inputs."""

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
from hfpretrain.data.remote_copy import remote_copy_of
from hfpretrain.recipe.schema import DataSection, Problem, RecipeError, TokenizerSection


@dataclass(frozen=True)
class Shard:
    """The work of one machine in a preparation."""

    folder: str
    """Name of the prepared folder of the joined shards."""
    made_from: dict[str, Any]
    """Identities of sources and tokenizer by the recipe's key, versions of libraries by their name."""
    index: int = 0
    """Counted from 0."""
    count: int = 1
    host: str = ""

    def __str__(self) -> str:
        return f"shard {self.index + 1} of {self.count} (made on {self.host})"

    def differences(self, other: Shard) -> Iterator[Problem]:
        """The inputs in which the two shards differ."""
        if self.count != other.count:
            yield Problem(
                "--shard",
                f"this machine makes {self.count} shards, the other one {other.count}; use the same number on all",
            )
        for key in sorted(self.made_from.keys() | other.made_from.keys()):
            ours, theirs = self.made_from.get(key), other.made_from.get(key)
            if ours != theirs:
                mine, other_one = _first_difference(ours, theirs), _first_difference(theirs, ours)
                yield Problem(key, f"is {mine} on this machine and {other_one} on the other one")


def _first_difference(one: Any, other: Any) -> str:
    """`one` as text; if both are lists, the first item that only `one` has."""
    if isinstance(one, list) and isinstance(other, list):
        one = next((item for item in one if item not in other), f"{len(one)} files")
    return f"{one}"


class ShardRegistry:
    """Records what each shard of a recipe's preparation is made from, in a folder beside the prepared folders.

    The name of that folder depends only on the recipe. So machines with the same recipe find each other's records even
    if their copies of the text differ, and with them the names of their prepared folders.
    """

    def __init__(self, data: DataSection, tokenizer: TokenizerSection, prepared_dir: Path):
        settings = [
            data.model_dump(mode="json", exclude={"prepared_dir", "stages", "shift_blocks", "shuffle_buffer"}),
            tokenizer.model_dump(mode="json", exclude={"chat_template"}),
        ]
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        self._folder = prepared_dir / f"shares-{key}"
        self._remote = remote_copy_of(self._folder, data.prepared_dir)

    def other_shards(self, ours: Shard) -> list[Shard]:
        """All other shards whose preparation is not finished."""
        if self._remote is not None:
            self._remote.download(self._folder, self._remote.list_files())
        found = []
        for path in sorted(self._folder.glob("*-of-*.json")):
            try:
                shard = Shard(**json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):  # written by another version, or removed meanwhile
                continue
            is_other = (shard.index, shard.count) != (ours.index, ours.count)
            if is_other and files.manifest_of(self._folder.parent / shard.folder) is None:
                found.append(shard)
        return found

    def add(self, shard: Shard) -> None:
        """Record that this machine makes `shard`. Raises `RecipeError` if another shard is made from other inputs."""
        name = f"{shard.index + 1}-of-{shard.count}.json"
        shard = Shard(shard.folder, json.loads(json.dumps(shard.made_from)), shard.index, shard.count, platform.node())
        self._folder.mkdir(parents=True, exist_ok=True)
        files.write_atomically(self._folder / name, json.dumps(asdict(shard), indent=1))
        # Write before comparing, so that of two machines that begin at the same time, at least one sees the other.
        for other in self.other_shards(shard):
            if problems := list(shard.differences(other)):
                (self._folder / name).unlink()
                advice = f"make the following inputs equal on both machines, or delete {self._folder} to start over"
                raise RecipeError(
                    [Problem("--shard", f"{shard} and {other} are made from different inputs; {advice}"), *problems]
                )
        if self._remote is not None:
            self._remote.upload(self._folder, [name])

    def remove(self, folder: str, host: str | None = None) -> None:
        """Delete the records of the shards of a prepared folder.

        `folder`: its name. `host`: only shards that were made on this machine.
        """
        for path in self._folder.glob("*-of-*.json"):
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.get("folder") == folder and host in (None, found.get("host")):
                path.unlink()
        with contextlib.suppress(OSError):  # not empty, or not there
            self._folder.rmdir()
