"""Saves and loads the state of a training: tensors by name, of which each process holds some pieces.

torch distributed checkpoint writes each piece once, and gives every reader the pieces that it asks for. So a state
saved by one engine can be loaded by another that cuts tensors into other pieces.
"""

from __future__ import annotations

import io
import math
import pathlib
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
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
    """The pieces that this process holds of a tensor of `shape`, each as (offsets, tensor). There may be none."""

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
        raise NotImplementedError(f"{func} can't be computed for a tensor of which only pieces are here")

    # torch distributed checkpoint calls these methods: `_Checkpointable` of torch.distributed._checkpointable.
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


def cut_into_boxes(shape: Sequence[int], start: int, flat: torch.Tensor) -> Iterator[Piece]:
    """Cut a part of a flattened tensor of `shape` into a few boxes of that tensor.

    `flat`: the part, elements [start, start + n) of the flattened tensor. Yields the offsets of each box, and a view of
    `flat`.
    """
    end = start + flat.numel()
    if len(shape) <= 1:
        if end > start or not shape:
            yield ((start,), flat) if shape else ((), flat.view(()))
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows
    if first >= last:  # no whole row: `flat` is in one row, or in the end of one and the start of the next
        middle = min(end, first * row)
        cuts = [(start, middle), (middle, end)]
    else:
        cuts = [(start, first * row), (last * row, end)]
        whole = flat[first * row - start : last * row - start].view(last - first, *shape[1:])
        yield (first, *(0 for _ in shape[1:])), whole
    for low, high in cuts:
        if low < high:
            for offsets, piece in cut_into_boxes(shape[1:], low % row, flat[low - start : high - start]):
                yield (low // row, *offsets), piece[None]


def to_fragments(value: Any) -> Any:
    """Convert a `DTensor` to `Fragments` that share its memory.

    Other tensors, which all processes hold whole, are returned as they are. A tensor of torchao becomes a dictionary of
    the tensors that it is made of.
    """
    if not isinstance(value, DTensor):
        if is_traceable_wrapper_subclass(value):  # a tensor of torchao in 8 bits: codes, and a scale for each block
            return {name: getattr(value, name) for name in value.__tensor_flatten__()[0]}
        return value
    (chunk,) = value.__create_chunk_list__()
    local = value.to_local()
    return Fragments(value.shape, [(tuple(chunk.offsets), local)] if local.numel() else [])


def divide_saving(state: dict[str, Any], index: int, number: int) -> dict[str, Any]:
    """The part of a state that process `index` saves, if `number` processes hold the same state.

    All of them save about as many bytes. Tensors that another process saves are in the result without a piece.
    """
    flat, loads = _flatten(state), [0] * number
    for name, value in flat.items():
        if isinstance(value, torch.Tensor):
            pieces = [piece for _, piece in value.pieces] if isinstance(value, Fragments) else [value]
            owner = loads.index(min(loads))
            loads[owner] += sum(piece.nbytes for piece in pieces)
            flat[name] = value if owner == index else Fragments(value.shape, [])
    return _unflatten(flat)


def copy_to_host(value: Any) -> Any:
    """A copy of a state in the host's memory, so that training can continue while it is saved."""
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
    """Write a state into the folder `path`. All processes of `group` must call it; with None, this process saves
    alone."""
    _ignore_warning_about_one_process()
    dcp.save(_flatten(state), checkpoint_id=str(path), process_group=group, no_dist=group is None)  # type: ignore[attr-defined]


def load(state: dict[str, Any], path: Path, group: Any = None) -> dict[str, Any]:
    """Load a saved state into the tensors of `state`. Its other entries get the saved values in the dictionary that is
    returned."""
    _ignore_warning_about_one_process()
    flat = _flatten(state)
    keywords: dict[str, Any] = {"process_group": group, "no_dist": group is None}
    dcp.load(flat, storage_reader=_Reader(path), planner=_Planner(), **keywords)  # type: ignore[attr-defined]
    return _unflatten(flat)


def names_in(path: Path, part: str) -> set[str]:
    """Names of the entries in `part` of a saved state."""
    names = _Reader(path).read_metadata().state_dict_metadata
    return {name.removeprefix(part + SEPARATOR) for name in names if name.startswith(part + SEPARATOR)}


def first_level_names(path: Path, part: str) -> set[str]:
    """Names of the parameters that have entries in `part` of a saved state."""
    return {name.partition(SEPARATOR)[0] for name in names_in(path, part)}


def zero_rows(tensor: torch.Tensor, number: int) -> None:
    """Set the first `number` rows of a tensor, or of a `DTensor`, to zero in place."""
    value = to_fragments(tensor)
    parts = value.pieces if isinstance(value, Fragments) else [((0,), value)]
    for offsets, part in parts:
        part[: max(0, number - offsets[0])].zero_()


class StoredTensors(Mapping[str, torch.Tensor]):
    """The tensors in `part` of a saved state by name, each read whole from the disk when it is asked for."""

    def __init__(self, path: Path, part: str):
        _ignore_warning_about_one_process()
        self._reader, self._prefix = _Reader(path), part + SEPARATOR
        entries = self._reader.read_metadata().state_dict_metadata
        self._entries = {
            name.removeprefix(self._prefix): entry
            for name, entry in entries.items()
            if name.startswith(self._prefix) and isinstance(entry, TensorStorageMetadata)
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        try:
            dcp.load({self._prefix + name: tensor}, storage_reader=self._reader, planner=_Planner(), no_dist=True)  # type: ignore[attr-defined]
        except dcp.CheckpointException as error:  # type: ignore[attr-defined] # no `Exception`
            raise RuntimeError(str(next(iter(error.failures.values()))[0])) from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, by name."""
        return {name: tuple(entry.size) for name, entry in self._entries.items()}


def load_whole_tensors(path: Path, parts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Load the whole tensors of all `parts` of a saved state into one dictionary, by name.

    Raises `RuntimeError` or `ValueError` if the state can't be read.
    """
    found: dict[str, Any] = {part: {} for part in parts}
    for name, entry in _Reader(path).read_metadata().state_dict_metadata.items():
        part, _, rest = name.partition(SEPARATOR)
        if part in found and isinstance(entry, TensorStorageMetadata):
            found[part][rest] = torch.empty(entry.size, dtype=entry.properties.dtype)
    try:
        loaded = load(found, path)
    except dcp.CheckpointException as error:  # type: ignore[attr-defined] # no `Exception`
        raise RuntimeError(str(next(iter(error.failures.values()))[0])) from error
    return {name: tensor for part in parts for name, tensor in loaded.get(part, {}).items()}


def _enum_member(kind: Any, name: str) -> Any:
    """A member of an enumeration. Python before 3.11.4 (Debian 12 has 3.11.2) pickles it as a call of `getattr`."""
    if kind is not metadata._MEM_FORMAT_ENCODING:
        raise ValueError(f"its index refers to an attribute of {kind!r}, which no checkpoint of hfpretrain contains")
    return kind[name]


_METADATA_CLASSES = {
    *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
}
_OTHER_NAMES = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("pathlib", "PosixPath"): pathlib.PurePath,
    ("pathlib", "WindowsPath"): pathlib.PurePath,
    ("collections", "OrderedDict"): dict,
    ("builtins", "getattr"): _enum_member,
}


class _Index(pickle.Unpickler):
    """Unpickles only the classes that torch writes into its index. A checkpoint may come from a stranger, and a pickle
    can run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module == metadata.__name__ and name in _METADATA_CLASSES:
            return getattr(metadata, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) in _OTHER_NAMES:
            return _OTHER_NAMES[module, name]
        raise ValueError(f"its index refers to {module}.{name}, which no checkpoint of hfpretrain contains")


class _Reader(filesystem.FileSystemReader):
    _index: Any = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        if self._index is None:
            self._index = self._read_index(*args, **kwargs)
        self._index.storage_meta.load_id = self.load_id
        return self._index

    def _read_index(self, *args: Any, **kwargs: Any) -> Any:
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            found = _Index(file).load()
        for entry in found.storage_data.values():
            if Path(entry.relative_path).name != str(entry.relative_path):
                raise ValueError(f"its index refers to the file {entry.relative_path!r} outside of the checkpoint")
        found.storage_meta = found.storage_meta or metadata.StorageMeta()
        return found


class _Planner(dcp.DefaultLoadPlanner):  # type: ignore[name-defined]
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Load values other than tensors. torch 2.13 would unpickle any object."""
        safe = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), safe)
        safe.seek(0)
        super().load_bytes(read_item, safe)


def _ignore_warning_about_one_process() -> None:
    # torch warns if one process saves alone. Here that is intended: `no_dist` asks for it.

    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


SEPARATOR = "//"


def _flatten(state: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}{SEPARATOR}")
        else:
            flat[prefix + key] = value
    return flat


def _unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(SEPARATOR)
        node = state
        for key in path:
            node = node.setdefault(key, {})
        node[last] = value
    return state
