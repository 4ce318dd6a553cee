"""Saves and loads a training's state: tensors by name, of which each process holds some pieces.

torch distributed checkpoint writes each piece once, and gives every reader the pieces that it asks for. So a state that
one engine has saved loads under another, which cuts the tensors elsewhere.
"""

from __future__ import annotations

import io
import math
import pathlib
import pickle
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Piece = tuple[tuple[int, ...], torch.Tensor]


class Fragments(torch.Tensor):
    """The pieces of a tensor of `shape` that this process holds, each as (offsets, tensor). There may be none."""

    pieces: list[Piece]

    @staticmethod
    def __new__(cls, shape: Sequence[int], pieces: Sequence[Piece]) -> Fragments:
        """`pieces` must not overlap. They are not copied: `load` writes into their memory."""
        made: Fragments = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=torch.float32)
        made.pieces = list(pieces)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} of a tensor in pieces")

    # The methods that torch distributed checkpoint calls: `_Checkpointable` of torch.distributed._checkpointable.
    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(offsets), number),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(offsets), piece.size()),
                    properties=TensorProperties(dtype=piece.dtype),
                    size=self.size(),
                ),
            )
            for number, (offsets, piece) in enumerate(self.pieces)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), piece.size()) for offsets, piece in self.pieces]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return next(piece for offsets, piece in self.pieces if torch.Size(offsets) == index.offset)


def boxes(shape: Sequence[int], start: int, flat: torch.Tensor) -> Iterator[Piece]:
    """Cut `flat`, elements [start, start + n) of a flattened tensor of `shape`, into a few boxes of that tensor.

    Yields the offsets of each box, and a view of `flat`.
    """
    end = start + flat.numel()
    if len(shape) <= 1:
        if end > start or not shape:
            yield ((start,), flat) if shape else ((), flat.view(()))
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows
    if first >= last:  # none: what there is lies in one row, or in the end of one and the start of the next
        middle = min(end, first * row)
        cuts = [(start, middle), (middle, end)]
    else:
        cuts = [(start, first * row), (last * row, end)]
        whole = flat[first * row - start : last * row - start].view(last - first, *shape[1:])
        yield (first, *(0 for _ in shape[1:])), whole
    for low, high in cuts:
        if low < high:
            for offsets, piece in boxes(shape[1:], low % row, flat[low - start : high - start]):
                yield (low // row, *offsets), piece[None]


def in_pieces(value: Any) -> Any:
    """Convert a `DTensor` to `Fragments` that share its memory.

    Other tensors, which all processes hold whole, are returned as they are. A tensor of torchao becomes a dictionary of
    the tensors that it is made of.
    """
    if not isinstance(value, DTensor):
        if is_traceable_wrapper_subclass(value):  # torchao's of 8 bits: codes, and a scale for each block
            return {name: getattr(value, name) for name in value.__tensor_flatten__()[0]}
        return value
    (chunk,) = value.__create_chunk_list__()
    local = value.to_local()
    return Fragments(value.shape, [(tuple(chunk.offsets), local)] if local.numel() else [])


def share(state: dict[str, Any], index: int, number: int) -> dict[str, Any]:
    """The part of a state that process `index` saves, where `number` processes hold the same state.

    Each saves about as many bytes. Tensors that another process saves are in the result without a piece.
    """
    flat, loads = _flat(state), [0] * number
    for name, value in flat.items():
        if isinstance(value, torch.Tensor):
            pieces = [piece for _, piece in value.pieces] if isinstance(value, Fragments) else [value]
            owner = loads.index(min(loads))
            loads[owner] += sum(piece.nbytes for piece in pieces)
            flat[name] = value if owner == index else Fragments(value.shape, [])
    return _nested(flat)


def copy_to_host(value: Any) -> Any:
    """A copy of a state in the CPU's memory, for saving while training continues."""
    if isinstance(value, dict):
        return {key: copy_to_host(item) for key, item in value.items()}
    if isinstance(value, Fragments):
        return Fragments(value.shape, [(offsets, copy_to_host(piece)) for offsets, piece in value.pieces])
    if isinstance(value, torch.Tensor):
        pinned = value.device.type == "cuda"
        copy = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=pinned)
        return copy.copy_(value.detach(), non_blocking=pinned)
    return value


def save(state: dict[str, Any], path: Path, group: Any = None) -> None:
    """Write a state into the folder `path`. All processes of `group` must call it; None: only this process saves."""
    _expect_to_be_alone()
    dcp.save(_flat(state), checkpoint_id=str(path), process_group=group, no_dist=group is None)  # type: ignore[attr-defined]


def load(state: dict[str, Any], path: Path, group: Any = None) -> dict[str, Any]:
    """Load a saved state into the tensors of `state`. Returns the state, with other values than tensors replaced."""
    _expect_to_be_alone()
    flat = _flat(state)
    keywords: dict[str, Any] = {"process_group": group, "no_dist": group is None}
    dcp.load(flat, storage_reader=_Reader(path), planner=_Planner(), **keywords)  # type: ignore[attr-defined]
    return _nested(flat)


def names_in(path: Path, part: str) -> set[str]:
    """Names in `part` of a saved state."""
    names = _Reader(path).read_metadata().state_dict_metadata
    return {name.removeprefix(part + _SEPARATOR) for name in names if name.startswith(part + _SEPARATOR)}


def load_whole(path: Path, parts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Whole tensors of a saved state by name, those of all `parts` in one dictionary.

    Raises `RuntimeError` or `ValueError` if the state can't be read.
    """
    found: dict[str, Any] = {part: {} for part in parts}
    for name, entry in _Reader(path).read_metadata().state_dict_metadata.items():
        part, _, rest = name.partition(_SEPARATOR)
        if part in found and isinstance(entry, TensorStorageMetadata):
            found[part][rest] = torch.empty(entry.size, dtype=entry.properties.dtype)
    try:
        loaded = load(found, path)
    except dcp.CheckpointException as error:  # type: ignore[attr-defined] # no `Exception`
        raise RuntimeError(str(next(iter(error.failures.values()))[0])) from error
    return {name: tensor for part in parts for name, tensor in loaded.get(part, {}).items()}


def _member(kind: Any, name: str) -> Any:
    """A member of an enumeration, which Python before 3.11.4 (Debian 12 has 3.11.2) pickles as a call of `getattr`."""
    if kind is not metadata._MEM_FORMAT_ENCODING:
        raise ValueError(f"its index asks for an attribute of {kind!r}, which no state of ours has")
    return kind[name]


_RECORDS = {
    *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
}
_KNOWN = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("pathlib", "PosixPath"): pathlib.PurePath,
    ("pathlib", "WindowsPath"): pathlib.PurePath,
    ("collections", "OrderedDict"): dict,
    ("builtins", "getattr"): _member,
}


class _Index(pickle.Unpickler):
    """Unpickles only the classes that torch writes into its index: a checkpoint may come from somebody else, and a
    pickle can run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module == metadata.__name__ and name in _RECORDS:
            return getattr(metadata, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        raise ValueError(f"its index asks for {module}.{name}, which no state of ours has")


class _Reader(filesystem.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            found = _Index(file).load()
        for entry in found.storage_data.values():
            if Path(entry.relative_path).name != str(entry.relative_path):
                raise ValueError(f"its index names {entry.relative_path!r}, which is outside of the folder")
        found.storage_meta = found.storage_meta or metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Planner(dcp.DefaultLoadPlanner):  # type: ignore[name-defined]
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Load values that are no tensors. torch 2.13 would unpickle any object."""
        safe = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), safe)
        safe.seek(0)
        super().load_bytes(read_item, safe)


def _expect_to_be_alone() -> None:
    # torch warns if one process saves alone, but that is what `no_dist` asks for.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


_SEPARATOR = "//"


def _flat(state: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}{_SEPARATOR}")
        else:
            flat[prefix + key] = value
    return flat


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(_SEPARATOR)
        node = state
        for key in path:
            node = node.setdefault(key, {})
        node[last] = value
    return state
