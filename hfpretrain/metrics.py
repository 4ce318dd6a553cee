"""What a run writes about itself: `metrics.jsonl`, throughput and MFU, the loss plot."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

# Dense bf16 peaks in FLOP/s, from the vendors' data sheets (without sparsity).
_PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
}


class MetricsFile:
    """`metrics.jsonl`, one object a line. Resuming at a step forgets the lines after it."""

    def __init__(self, path: Path, resume_step: int | None):
        self._path = path
        kept = [row for row in read_metrics(path) if resume_step is not None and row["step"] <= resume_step]
        rows = [row for row in kept if "export/loss_export" not in row]  # the run ends, and exports, anew
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one object."""
        with self._path.open("a", encoding="utf-8") as file:
            # JSON has no NaN; the word stays to be seen.
            safe = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            file.write(json.dumps(safe) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a `metrics.jsonl`; a last line that a kill left half-written is passed over."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def flops_per_token(num_matmul_parameters: int, num_layers: int, hidden_size: int, block_size: int) -> float:
    """Training FLOPs per token, forward and backward: 6 N + 12 L H T (Chowdhery et al. 2022, PaLM, appendix B)."""
    return 6.0 * num_matmul_parameters + 12.0 * num_layers * hidden_size * block_size


def peak_flops(device_name: str) -> float | None:
    """The device's dense bf16 peak in FLOP/s; None if it is not in the table."""
    return next((flops for name, flops in _PEAK_FLOPS.items() if name in device_name), None)


class Throughput:
    """Tokens per second since the last reading, pauses (evaluation, saving) left out."""

    def __init__(self) -> None:
        self._start, self._paused = time.perf_counter(), 0.0

    def pause(self, seconds: float) -> None:
        """Take `seconds` out of the current reading."""
        self._paused += seconds

    def read(self, tokens: int) -> float:
        """Tokens per second for `tokens` since the last reading; starts the next one."""
        now = time.perf_counter()
        seconds = now - self._start - self._paused
        self._start, self._paused = now, 0.0
        return tokens / max(seconds, 1e-9)


def plot_loss(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Training and validation loss against tokens, the learning rate beneath, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, lr_axes = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    train = [row for row in rows if isinstance(row.get("loss"), float)]
    validation = [row for row in rows if isinstance(row.get("eval/loss"), float)]
    loss_axes.plot([r["tokens"] for r in train], [r["loss"] for r in train], lw=1.3, color="#4c78a8", label="training")
    if validation:
        last = validation[-1]
        label = f"validation, last {last['eval/loss']:.4f}"
        tokens, losses = [r["tokens"] for r in validation], [r["eval/loss"] for r in validation]
        loss_axes.plot(tokens, losses, lw=1.6, marker="o", ms=4, color="#e45756", label=label)
    lr_axes.plot([r["tokens"] for r in train], [r["lr"] for r in train], lw=1.3, color="#72b7b2")
    loss_axes.set(ylabel="loss (nats per token)", title=title)
    loss_axes.legend(frameon=False)
    lr_axes.set(xlabel="tokens", ylabel="learning rate", ylim=(0, None))
    for axes in (loss_axes, lr_axes):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
