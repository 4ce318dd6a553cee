"""Decompress files, and give all that comes before a damaged place."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import zstandard
from isal import igzip, isal_zlib

from hfpretrain.data.source_files import CODECS

_MAKE: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".xz": lzma.LZMADecompressor,
    ".bz2": bz2.BZ2Decompressor,
    ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
}
# Zeros may follow a member in these formats: tapes and disks fill their last block with them. gzip and xz ignore them.
_MAY_BE_PADDED = {".gz", ".xz"}
# Few enough for the text that they become to fit into memory, whatever they contain.
_STEP_BYTES = 2**12
# Arrow and isal read less of a compressed file at a time. So the damage is among the last so many bytes that were read.
_EXACT_BYTES = 2**20


def is_damage(error: BaseException) -> bool:
    """Whether a file's content is truncated or broken. An error of a disk or a network is none."""
    # Decompressors raise a plain OSError without errno; disks and networks set errno, or raise a subclass.
    if type(error) is OSError:
        return error.errno is None
    of_isal: Any = isal_zlib.error  # declared as an instance, not as a class
    damages = (EOFError, lzma.LZMAError, zlib.error, of_isal, gzip.BadGzipFile, zstandard.ZstdError)
    return isinstance(error, damages) or type(error).__name__ in {"ArrowInvalid", "JSONDecodeError"}


def decompressed(file: Any, suffix: str, reopen: Callable[[], Any]) -> io.BufferedReader:
    """The decompressed bytes of a file, which may have several members one after another.

    `suffix`: one of `CODECS`. `reopen`: opens the file once more. If the file is damaged, all bytes before the damage
    are read, and then the error is raised.
    """
    return io.BufferedReader(_Decompressed(file, suffix, reopen), 2**16)


class _Decompressed(io.RawIOBase):
    """`decompressed` without a buffer.

    A decompressor that finds an error loses what it has made of the same piece of the file, up to a megabyte. Then the
    file is read once more, and the last part byte by byte.
    """

    def __init__(self, file: Any, suffix: str, reopen: Callable[[], Any]):
        self._file, self._suffix, self._reopen = file, suffix, reopen
        self._stream: Any = None
        if suffix == ".gz":  # isal takes a third of zlib's time
            self._stream = igzip.IGzipFile(fileobj=file)
        elif suffix == ".zst":  # not by zstandard's own reader, which does not report a truncated file
            import pyarrow as pa

            self._stream = pa.CompressedInputStream(pa.PythonFile(file, "r"), CODECS[suffix])
        else:  # Arrow can't read a bz2 file with an empty member
            self._pieces = _pieces(file, suffix)
        self._rest = b""
        self._count = 0
        self._damage: Exception | None = None
        self._is_at_damage = False
        self._opened_again: Any = None

    def readable(self) -> bool:
        """True."""
        return True

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            for file in (self._stream, self._file, self._opened_again):
                if file is not None:
                    file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        """Read up to `len(buffer)` bytes into `buffer`. Returns their number, 0 at the end."""
        if self._stream is not None:
            try:
                count: int = self._stream.readinto(buffer)
                self._count += count
                return count
            except Exception as error:
                self._read_again(error)
        view, filled = memoryview(buffer).cast("B"), 0
        while filled < len(view) and self._has_rest():
            piece, self._rest = self._rest[: len(view) - filled], self._rest[len(view) - filled :]
            view[filled : filled + len(piece)] = piece
            filled += len(piece)
            self._count += len(piece)
        if not filled and self._is_at_damage:
            assert self._damage is not None
            raise self._damage
        return filled

    def _has_rest(self) -> bool:
        """Whether there are more bytes, which are then in `_rest`."""
        while not self._rest and not self._is_at_damage:
            try:
                self._rest = next(self._pieces)
            except StopIteration:
                return False
            except Exception as error:
                if self._damage is None:
                    self._read_again(error)
                else:
                    self._is_at_damage = True
        return bool(self._rest)

    def _read_again(self, error: Exception) -> None:
        """Read the file once more, from the first byte that was not returned up to the damage."""
        if not is_damage(error):
            raise error
        try:
            exact_from = self._file.tell() - _EXACT_BYTES
        except (OSError, ValueError):  # a server without range requests
            exact_from = 0
        self._stream, self._damage = None, error
        self._opened_again = self._reopen()
        self._pieces = _after(_pieces(self._opened_again, self._suffix, exact_from), self._count)


def _pieces(file: Any, suffix: str, exact_from: float = float("inf")) -> Iterator[bytes]:
    """The decompressed bytes of all members. From byte `exact_from` of the file on, it is decompressed byte by byte."""
    decompressor, position, is_between = _MAKE[suffix](), 0, False
    while data := file.read(_STEP_BYTES if position < exact_from else 1):
        position += len(data)
        while data:
            if is_between:
                data = data.lstrip(b"\0") if suffix in _MAY_BE_PADDED else data
                if not data:
                    break
                decompressor, is_between = _MAKE[suffix](), False
            yield decompressor.decompress(data)
            is_between = decompressor.eof
            data = decompressor.unused_data if is_between else b""
    if not is_between:
        raise EOFError("the file ends within the compressed data")


def _after(pieces: Iterator[bytes], count: int) -> Iterator[bytes]:
    """The bytes after the first `count`."""
    for piece in pieces:
        yield piece[count:]
        count = max(0, count - len(piece))
