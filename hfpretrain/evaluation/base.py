"""What a run that trains an existing model further has gained and lost since its start, by validation set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hfpretrain.evaluation import sums

BASE_EVALUATION = "base_evaluation.npz"
"""File of a checkpoint that holds a `BaseEvaluation`."""
GAINED = "bits_per_byte_gained"
"""Figure of an evaluation: bits per byte of the model before training minus those of now. Negative: lost."""


class BaseEvaluation:
    """The evaluation of the model that a run begins with, the base. Later evaluations are compared with it.

    The difference is paired by document, so its interval is much narrower than those of the two figures. `name`: the
    base, as the recipe names it. Only the main process keeps an evaluation.
    """

    def __init__(self, name: str):
        self.name = name
        self._bits: dict[str, np.ndarray] = {}

    @property
    def is_known(self) -> bool:
        """Whether an evaluation was kept."""
        return bool(self._bits)

    def keep(self, sets: Mapping[str, np.ndarray]) -> None:
        """Keep an evaluation: for each validation set the sums of its documents, as in `sums.Sums`."""
        self._bits = {name: _bits(documents) for name, documents in sets.items()}

    def save(self, path: Path) -> None:
        """Write the kept evaluation, at most 320 kB for each validation set."""
        arrays: dict[str, Any] = {f"set-{name}": bits for name, bits in self._bits.items()}
        np.savez(path, **arrays)

    def load(self, path: Path) -> bool:
        """Read what `save` has written; False if there is no such file."""
        if path.is_file():
            with np.load(path) as stored:
                self._bits = {name.removeprefix("set-"): stored[name] for name in stored.files}
        return self.is_known

    def figures(self, sets: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """`bits_per_byte_gained` and its 95% interval, over all `sets` and for each: `NAME/bits_per_byte_gained`.

        `sets`: as in `keep`, the same sets. An interval is None if a set has only one document.
        """
        now = {name: _bits(documents) for name, documents in sets.items()}
        pairs = {"": tuple(np.concatenate([part[name] for name in now]) for part in (self._bits, now))}
        pairs |= {f"{name}/": (self._bits[name], bits) for name, bits in now.items() if name}
        found: dict[str, Any] = {}
        for prefix, (before, after) in pairs.items():
            difference = sums.bits_per_byte_difference(before, after)
            if difference is not None:
                found[f"{prefix}{GAINED}"], found[f"{prefix}{GAINED}_interval"] = difference
        return found


def gain_text(gained: float, interval: list[float] | None) -> str:
    """A difference in bits per byte in words: `gained 0.1234 (0.1200 to 0.1268)` or `lost ...`."""
    word, low_high = "gained", interval
    if gained < 0:
        word, gained, low_high = "lost", -gained, interval and [-end for end in reversed(interval)]
    if low_high is None:
        return f"{word} {gained:.4f} (one document, so no interval)"
    chance = ", which may be chance" if low_high[0] <= 0 <= low_high[1] else ""
    return f"{word} {gained:.4f} ({low_high[0]:.4f} to {low_high[1]:.4f}){chance}"


def row_gain_text(row: Mapping[str, Any], domain: str = "") -> str | None:
    """`gain_text` for a row of `metrics.jsonl`, over all text or the set `domain`. None if the row has no gain."""
    key = f"eval/{domain}/{GAINED}" if domain else f"eval/{GAINED}"
    return gain_text(float(row[key]), row[f"{key}_interval"]) if key in row else None


def _bits(documents: np.ndarray) -> np.ndarray:
    """The nll and the bytes of text, float64 (n, 2), of documents, float64 (documents, 4).

    More than 20,000 documents are summed in 20,000 groups, always the same ones.
    """
    bits = documents[:, 2:4]
    if len(bits) <= sums.MAX_GROUPS:
        return bits.copy()
    grouped = np.zeros((sums.MAX_GROUPS, 2))
    np.add.at(grouped, np.arange(len(bits)) % sums.MAX_GROUPS, bits)
    return grouped
