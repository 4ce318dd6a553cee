"""The plots of a run: the loss, and the load of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfpretrain.training.history import History


def plot_loss(history: History, path: Path, title: str) -> None:
    """Draw training and validation losses against tokens, and the learning rate below them, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, lr_axes = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    loss_axes.plot(*history.loss.points(), lw=1.3, color="#4c78a8", label="training")
    for name, curve in history.validation.items():
        tokens, losses = curve.points()
        label = f"validation{f' {name}' if name else ''}, last {curve.last:.4f}" if losses else None
        style: dict[str, Any] = {"lw": 1.1, "ls": "--", "ms": 3} if name else {"lw": 1.6, "color": "#e45756", "ms": 4}
        loss_axes.plot(tokens, losses, marker="o" if len(tokens) < 200 else None, label=label, **style)
    lr_axes.plot(*history.lr.points(), lw=1.3, color="#72b7b2")
    loss_axes.set(ylabel="loss (nats per token)", title=title)
    loss_axes.legend(frameon=False)
    lr_axes.set(xlabel="tokens", ylabel="learning rate", ylim=(0, None))
    for axes in (loss_axes, lr_axes):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def plot_expert_load(history: History, path: Path, title: str) -> None:
    """Draw how many tokens the most used expert of each router has, over the mean, against tokens, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    load = history.expert_load
    rows = list(zip(*load.columns, strict=True))
    figure = Figure(figsize=(8, min(8, 3 + 0.12 * len(rows))), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    edges = [0.0, *load.x]
    mesh = axes.pcolormesh(edges, range(len(rows) + 1), rows, cmap="viridis", vmin=1, rasterized=True)
    axes.set(xlabel="tokens", ylabel="router", title=f"{title}: load of the most used expert")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(mesh, label="tokens over the mean")
    figure.savefig(path)
