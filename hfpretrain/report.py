"""What a run says of itself: what it runs on, the model card, the summary."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hfpretrain import engine, hub, metrics
from hfpretrain.prepare import summary
from hfpretrain.recipe import dump_recipe

LIBRARIES = ("hfpretrain", "torch", "transformers", "accelerate", "datasets", "tokenizers")


def environment(run: Any) -> dict[str, Any]:
    """What the run runs on; no environment variables, no secrets."""
    return {
        "engine": engine.engine_name(run.accelerator),
        "num_processes": run.accelerator.num_processes,
        "device": engine.device_name(run.accelerator),
        "mixed_precision": engine.precision(run.accelerator),
        "peak_flops": run.peak_flops,
        "peak_flops_are": "a matrix product on all cores, measured"
        if run.accelerator.device.type == "cpu"
        else "of data sheets",
        "document_masking": run.document_masking,
        "chunked_loss": run.chunked_loss,
        "accumulation_steps": run.accumulation_steps,
        "num_parameters": run.parameters.total,
        "num_non_embedding_parameters": run.parameters.non_embedding,
        "initial_weights": run.initial_weights,
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in (*LIBRARIES, "evaluate")},
    }


def _commit() -> str | None:
    """The commit of this package where it runs from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_card(run: Any, model_path: Path, report: dict[str, Any]) -> None:
    """The model card and the loss plot into an exported folder; `report` as of `export.verify`."""
    run.records.plot()
    (model_path / "loss.png").write_bytes((run.output_dir / "loss.png").read_bytes())
    recipe, where = run.recipe, environment(run)
    rows = metrics.read_metrics(run.output_dir / "metrics.jsonl")
    hub_datasets = [s.path for s in recipe.data.sources if "/" in s.path and not Path(s.path).exists()]
    training = {
        "parameters": f"{run.parameters.total:,} ({run.parameters.non_embedding:,} without embeddings)",
        "tokens": f"{run.state.tokens:,} in {run.state.step:,} steps of {recipe.training.tokens_per_step:,}",
        "engine": f"{where['engine']}, {where['num_processes']} process(es)",
        "device": where["device"],
        "precision": where["mixed_precision"],
        "weights": report["dtype"]
        + (
            ", as training kept them" if report["dtype"] == "float32" else ", rounded from the float32 ones of training"
        ),
        "attention across documents": "no" if run.document_masking else "yes",
        "versions": ", ".join(f"{name} {number}" for name, number in where["versions"].items()),
    }
    card = hub.model_card(
        name=run.output_dir.name,
        section=recipe.hub,
        origin=recipe.model.pretrained or "scratch",
        base_model=recipe.model.pretrained,
        datasets=hub_datasets,
        results=_first_and_last(rows),
        data=_data(run),
        training=training,
        recipe=dump_recipe(recipe),
        report=report,
        bos=run.tokenizer.bos_token or run.tokenizer.eos_token,
    )
    (model_path / "README.md").write_text(card, encoding="utf-8")


def _data(run: Any) -> str:
    _, _, lines = summary(run.prepared).partition("\n")
    if run.recipe.data.streaming:
        lines = f"  streamed from   {', '.join(source.path for source in run.recipe.data.sources)}\n{lines}".rstrip()
    return f"```text\n{lines}\n```"


def _first_and_last(rows: list[dict[str, Any]]) -> dict[str, Any]:
    evaluations = [row for row in rows if "eval/loss" in row]
    return {"first": evaluations[0], "last": evaluations[-1]} if evaluations else {}


def run_summary(run: Any, report: dict[str, Any]) -> str:
    """What a finished run prints."""
    results = _first_and_last(metrics.read_metrics(run.output_dir / "metrics.jsonl"))
    lines = [
        "",
        f"{run.output_dir.name}: {run.parameters.total:,} parameters, {run.state.tokens:,} tokens in "
        f"{run.state.step:,} steps, {engine.engine_name(run.accelerator)} on {engine.device_name(run.accelerator)}",
    ]
    for label, key in (("before training", "first"), ("after training", "last")):
        row = results.get(key)
        if row:
            lines.append(
                f"  {label:<16} loss {row['eval/loss']:.4f}   perplexity {row['eval/perplexity']:,.2f}   "
                f"bits per byte {row['eval/bits_per_byte']:.4f}"
            )
    lines += [
        f"  {'model':<16} {run.output_dir / 'model'}",
        f"  {'loss plot':<16} {run.output_dir / 'loss.png'}",
        f"  {'metrics':<16} {run.output_dir / 'metrics.jsonl'}",
        f"  {'export':<16} loaded in a fresh process; largest difference of a token's loss "
        f"{report['max_token_loss_difference']:.1e}",
        "  sample",
        *("    | " + line for line in report["sample"].splitlines()[:12]),
    ]
    return "\n".join(lines)
