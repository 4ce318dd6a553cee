"""All runs in a folder, a line each; and their losses in one picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hfpretrain import metrics, report, run_folder
from hfpretrain.recipe import RecipeError, load_recipe

_COLUMNS = ("run", "model", "engine", "parameters", "tokens", "loss", "perplexity", "bits/byte", "tokens/s", "state")


def find(folder: Path) -> list[Path]:
    """Run folders at or below `folder`, by name. Raises `RecipeError` where there is none."""
    found = sorted(path.parent for path in folder.glob("**/metrics.jsonl") if (path.parent / "recipe.yaml").exists())
    if not found:
        raise RecipeError.at(str(folder), "there is no run here: no folder with metrics.jsonl and recipe.yaml")
    return found


def describe(path: Path) -> dict[str, Any]:
    """What a run is and where it stands; None for what it does not know. `loss` and what follows from it are those of
    the last evaluation."""
    rows = metrics.read_metrics(path / "metrics.jsonl")
    trained = [row for row in rows if "tokens_per_second" in row]
    evaluated: dict[str, Any] = next((row for row in reversed(rows) if "eval/loss" in row), {})
    environment: dict[str, Any] = {}
    if (path / "environment.json").exists():
        environment = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    try:
        recipe = load_recipe(path / "recipe.yaml")
        steps = recipe.training.num_steps
        model = recipe.model.pretrained or (recipe.model.config or {}).get("model_type")
    except RecipeError:  # of another version
        steps, model = None, None
    step = max((row["step"] for row in rows), default=0)
    segments = report.segments_of(environment, max(step, 1)) if environment else []
    if run_folder.is_in_use(path):
        state = "running"
    elif any("export/loss_export" in row for row in rows):  # a run that goes on forgets it
        state = "finished"
    else:
        state = "stopped"
    return {
        "run": path,
        "model": model,
        "engine": ", ".join(dict.fromkeys(f"{part['engine']} x{part['num_processes']}" for part in segments)),
        "parameters": environment.get("num_parameters"),
        "tokens": max((row.get("tokens", 0) for row in rows), default=0),
        "loss": evaluated.get("eval/loss"),
        "perplexity": evaluated.get("eval/perplexity"),
        "bits/byte": evaluated.get("eval/bits_per_byte"),
        "tokens/s": trained[-1]["tokens_per_second"] if trained else None,
        "state": state if state == "finished" else f"{state} at {step}/{steps or '?'}",
    }


def table(folder: Path) -> str:
    """One line for each run, paths relative to `folder`."""
    lines: list[tuple[str, ...]] = [_COLUMNS]
    for path in find(folder):
        found = describe(path)
        found["run"] = path.relative_to(folder) if path != folder else path.name
        lines.append(tuple(_cell(name, found[name]) for name in _COLUMNS))
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    numbers = {"parameters", "tokens", "loss", "perplexity", "bits/byte", "tokens/s"}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if name in numbers else cell.ljust(width)
            for name, cell, width in zip(_COLUMNS, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def plot(folder: Path, path: Path) -> None:
    """Validation losses of all runs against tokens in one PNG; training losses of those without validation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if path.suffix != ".png" or path.is_dir() or not path.parent.is_dir():
        raise RecipeError.at("--plot", f"{path} is no name of a .png file in a folder that is there")
    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for run in find(folder):
        rows = metrics.read_metrics(run / "metrics.jsonl")
        key = "eval/loss" if any("eval/loss" in row for row in rows) else "loss"
        points = [(row["tokens"], row[key]) for row in rows if isinstance(row.get(key), float)]
        label = f"{run.relative_to(folder) if run != folder else run.name}{'' if key == 'eval/loss' else ' (training)'}"
        if points:
            axes.plot(*zip(*points, strict=True), lw=1.5, marker="o", ms=3, label=label)
    axes.set(xlabel="tokens", ylabel="validation loss (nats per token)")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _cell(name: str, value: Any) -> str:
    if value is None or (isinstance(value, str) and name != "run"):
        return value or "-"
    if name in ("loss", "bits/byte"):
        return f"{value:.4f}" if isinstance(value, float) else str(value)
    if name == "perplexity":
        return f"{value:,.2f}"
    return f"{value:,.0f}" if isinstance(value, (int, float)) else str(value)
