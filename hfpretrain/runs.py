"""All runs in a folder: a table with a line for each, and a plot of their losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hfpretrain.checkpoints import trunk
from hfpretrain.evaluation.validation import domains
from hfpretrain.recipe.schema import RecipeError
from hfpretrain.recipe.yaml import read_recipe
from hfpretrain.training import run_folder, segments
from hfpretrain.training.history import History

_COLUMNS = ("run", "model", "engine", "parameters", "tokens", "loss", "perplexity", "bits/byte", "tokens/s", "state")


def find_runs(folder: Path) -> list[Path]:
    """Run folders at or below `folder`, by name. Raises `RecipeError` if there is none."""
    found = sorted(path.parent for path in folder.glob("**/metrics.jsonl") if (path.parent / "recipe.yaml").exists())
    if not found:
        raise RecipeError.at(str(folder), "contains no run, which is a folder with metrics.jsonl and recipe.yaml")
    return found


def describe_run(path: Path) -> dict[str, Any]:
    """Model, engine, figures and state of a run; None where a value is not known.

    `branch of` is the checkpoint at which a branch began; other runs have no such key. `loss`, `perplexity`,
    `bits/byte`, and `loss DOMAIN` for each named validation set are from the last evaluation.
    """
    history = History.read(path / "metrics.jsonl")
    evaluated: dict[str, Any] = history.evaluations[-1] if history.evaluations else {}
    environment: dict[str, Any] = {}
    if (path / "environment.json").exists():
        environment = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    trunks = trunk.read_trunks(path)
    try:
        recipe = read_recipe(path / "recipe.yaml")
        steps = trunk.origin_of(trunks).step + recipe.training.num_steps
        model = recipe.model.pretrained or (recipe.model.config or {}).get("model_type")
    except RecipeError:  # written by another version
        steps, model = None, None
    step = history.step
    parts = segments.segments_of(environment, max(step, 1)) if environment else []
    if run_folder.is_in_use(path):
        state = "running"
    elif history.exported:  # when a run is resumed, it deletes the row of its export
        state = "finished"
    else:
        state = "stopped"
    return {
        "run": path,
        "model": model,
        "engine": ", ".join(dict.fromkeys(f"{part['engine']} x{part['num_processes']}" for part in parts)),
        "parameters": environment.get("num_parameters"),
        "tokens": history.tokens,
        "loss": evaluated.get("eval/loss"),
        "perplexity": evaluated.get("eval/perplexity"),
        "bits/byte": evaluated.get("eval/bits_per_byte"),
        "tokens/s": history.logged.get("tokens_per_second"),
        "state": state if state == "finished" else f"{state} at {step}/{steps or '?'}",
        **({"branch of": trunks[-1].given} if trunks else {}),
        **{f"loss {name}": evaluated[f"eval/{name}/loss"] for name in domains(evaluated)},
    }


def runs_table(folder: Path) -> str:
    """A line for each run, with its path relative to `folder`, and a column for each domain that any run evaluates."""
    described = [
        describe_run(path) | {"run": path.relative_to(folder) if path != folder else path.name}
        for path in find_runs(folder)
    ]
    named = dict.fromkeys(name for found in described for name in found if name.startswith("loss "))
    at = _COLUMNS.index("loss") + 1
    branch = ("branch of",) if any("branch of" in found for found in described) else ()
    columns = (*_COLUMNS[:at], *named, *_COLUMNS[at:], *branch)
    lines = [columns, *(tuple(_cell(name, found.get(name)) for name in columns) for found in described)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    numbers = {"parameters", "tokens", "loss", "perplexity", "bits/byte", "tokens/s", *named}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if name in numbers else cell.ljust(width)
            for name, cell, width in zip(columns, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def plot_losses(folder: Path, path: Path) -> None:
    """Plot the validation losses of all runs over their tokens into a PNG. The losses of domains are dashed.

    Runs without validation show their training loss.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if path.suffix != ".png" or path.is_dir() or not path.parent.is_dir():
        raise RecipeError.at("--plot", f"{path} must be a .png file in an existing folder")
    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for run in find_runs(folder):
        history = History.read(run / "metrics.jsonl")
        label = str(run.relative_to(folder)) if run != folder else run.name
        color = None
        for name, curve in (history.validation or {"(training)": history.loss}).items():
            points = curve.points()
            if not points[0]:
                continue
            style: dict[str, Any] = {"lw": 1, "ls": "--", "color": color} if name and color else {"lw": 1.5}
            marker = "o" if len(points[0]) < 200 else None
            (line,) = axes.plot(*points, marker=marker, ms=3, label=f"{label} {name}".rstrip(), **style)
            color = line.get_color()
    axes.set(xlabel="tokens", ylabel="validation loss (nats per token)")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _cell(name: str, value: Any) -> str:
    if value is None or (isinstance(value, str) and name != "run"):
        return value or "-"
    if name in ("loss", "bits/byte") or name.startswith("loss "):
        return f"{value:.4f}" if isinstance(value, float) else str(value)
    if name == "perplexity":
        return f"{value:,.2f}"
    return f"{value:,.0f}" if isinstance(value, (int, float)) else str(value)
