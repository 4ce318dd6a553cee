"""What a run says of itself: what it runs on, what it was made from, the summary."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hfpretrain import __version__, files
from hfpretrain.checkpoints import export
from hfpretrain.data.batches import epochs_text
from hfpretrain.data.summary import summary
from hfpretrain.data.tokenizer import describe_framing, document_prefix, document_start
from hfpretrain.evaluation.validation import domains
from hfpretrain.recipe.redaction import redacted, without_folders
from hfpretrain.recipe.yaml import dump_recipe

LIBRARIES = ("hfpretrain", "torch", "transformers", "accelerate", "datasets", "tokenizers")
_OTHERS = ("evaluate", "deepspeed", "torchao", "schedulefree")
DATA = "data.json"
ENVIRONMENT = "environment.json"


def environment(run: Any) -> dict[str, Any]:
    """What the run runs on; no environment variables, no secrets."""
    return {
        "engine": run.engine.name,
        "num_processes": run.engine.num_processes,
        "device": run.engine.device_name,
        "mixed_precision": run.engine.precision,
        "peak_flops": run.peak_flops,
        "peak_flops_are": "a matrix product on all cores, measured"
        if run.engine.device.type == "cpu"
        else "of data sheets",
        "attn_implementation": run.attn_implementation,
        "document_masking": run.document_masking,
        "chunked_loss": run.chunked_loss,
        "epochs": run.epochs,
        "notes": run.notes,
        "accumulation_steps": run.accumulation_steps,
        "num_parameters": run.parameters.total,
        "num_non_embedding_parameters": run.parameters.non_embedding,
        "initial_weights": run.initial_weights,
        "untrained_parameters": {
            "frozen_by_class": run.untrained.frozen_by_class,
            "outside_loss": run.untrained.outside_loss,
        },
        "hub_commits": run.hub_commits,
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: known for name in (*LIBRARIES, *_OTHERS) if (known := version_of(name))},
    }


def setting(run: Any) -> dict[str, Any]:
    """The settings of a step that may change when a run goes on elsewhere."""
    return {
        "engine": run.engine.name,
        "num_processes": run.engine.num_processes,
        "device": run.engine.device_name,
        "precision": run.engine.precision,
        "attn_implementation": run.attn_implementation,
        "document_masking": run.document_masking,
        "num_steps": run.recipe.training.num_steps,
    }


def extend(segments: list[dict[str, Any]], setting: dict[str, Any], step: int) -> None:
    """Record that `step` ran under `setting`: extend the last of `segments`, or begin another."""
    if not segments or any(segments[-1].get(key) != value for key, value in setting.items()):
        segments.append({**setting, "first_step": step})
    segments[-1]["last_step"] = step


def segments_of(environment: dict[str, Any], step: int) -> list[dict[str, Any]]:
    """The settings of all steps up to `step`. An `environment.json` has those of the process that wrote it, and before
    it in `segments`."""
    found = [dict(part, last_step=min(part["last_step"], step)) for part in environment.get("segments", ())]
    found = [part for part in found if part["first_step"] <= step]
    done = found[-1]["last_step"] if found else 0
    if step > done:
        now = {**environment, "precision": environment["mixed_precision"], "first_step": done + 1, "last_step": step}
        found.append(now)
    return found


def places(segments: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    """Where a run was trained: engine, processes and device as text, with the first and last step."""
    found: list[tuple[str, int, int]] = []
    for part in segments:
        text, first = _place(part), part["first_step"]
        if found and found[-1][0] == text:
            first = found.pop()[1]
        found.append((text, first, part["last_step"]))
    return found


def _place(part: dict[str, Any]) -> str:
    count = "" if part["num_processes"] == 1 else f" x{part['num_processes']}"
    return f"{part['engine']}{count}" + (f" on {part['device']}" if part.get("device") else "")


def moved(before: dict[str, Any], now: dict[str, Any], step: int) -> str | None:
    """What to say of a run that goes on after `step` under another setting than before; None if it is the same."""
    if before.get("document_masking", now["document_masking"]) != now["document_masking"]:
        was, becomes = ("not masked", "masked") if now["document_masking"] else ("masked", "not masked")
        return f"packed documents are {becomes} from each other from now on; up to step {step} they were {was}"
    if all(before.get(name, now[name]) == now[name] for name in ("engine", "num_processes", "device")):
        return None
    return f"training goes on under {_place(now)}; up to step {step} it was under {_place(before)}"


def version_of(name: str) -> str | None:
    """Of a package, this one also where it is not installed but on Python's path; None if there is no such package."""
    if name == "hfpretrain":
        return __version__
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this package where it runs from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe(run: Any) -> None:
    """Write into the run folder what tells of the run without what it was made from."""
    folder = run.output_dir
    run.config.save_pretrained(folder / export.CONFIG_FOLDER)
    run.tokenizer.save_pretrained(folder / export.CONFIG_FOLDER)
    if run.generation_config is not None:
        run.generation_config.to_json_file(folder / export.CONFIG_FOLDER / export.GENERATION_CONFIG)
    _, _, account = summary(run.prepared).partition("\n")
    if run.recipe.data.streaming:
        sources = ", ".join(without_folders(source.path) for source in run.recipe.data.sources)
        account = f"  streamed from   {sources}\n{account}".rstrip()
    manifest = run.prepared.manifest
    data = {
        "prepared": run.prepared.path.name,
        "checksum": run.prepared.checksum,
        "account": account,
        "sources": manifest["recipe"]["sources"] + manifest["recipe"]["validation_sources"],
        "identities": manifest["source_identities"] + manifest["validation_identities"],
        "num_training_sources": len(manifest["source_identities"]),
        "document_start": run.tokenizer.decode(document_start(run.tokenizer)),
        "tokenizer_begins_documents": bool(document_prefix(run.tokenizer)),
        "framing": describe_framing(run.tokenizer),
    }
    for name, content in ((DATA, json.dumps(redacted(data), indent=1)), ("recipe.yaml", dump_recipe(run.recipe))):
        files.write_whole(folder / name, content)
    files.write_whole(folder / "optimizer.json", json.dumps(run.optimizer_groups, indent=1))
    path = folder / ENVIRONMENT
    # A finished run that is started again trains nothing: what it was trained with stays.
    if run.state.step < run.recipe.training.num_steps or not path.exists():
        files.write_whole(path, json.dumps(environment(run) | {"segments": run.state.segments}, indent=1))


def run_summary(run: Any, report: dict[str, Any]) -> str:
    """What a finished run prints."""
    where = ", ".join(
        text if (first, last) == (1, run.state.step) else f"{text} (steps {first:,} to {last:,})"
        for text, first, last in places(run.state.segments)
    )
    lines = [
        "",
        f"{run.output_dir.name}: {run.parameters.total:,} parameters, {run.state.tokens:,} tokens in "
        f"{run.state.step:,} steps, {where}",
    ]
    for row in run.records.history().evaluations:
        lines.append(f"  {_moment(row['step'], run.state.step):<16} {evaluation_text(row)}")
        lines += [f"    {name:<14} {evaluation_text(row, name)}" for name in domains(row)]
    if run.epochs is not None:
        lines.append(f"  {'epochs':<16} {epochs_text(run.recipe.data.sources, run.epochs)}")
    text = f"none: {report['sample_error']}" if report["sample"] is None else report["sample"]
    lines += [
        f"  {'model':<16} {run.output_dir / 'model'}",
        f"  {'loss plot':<16} {run.output_dir / 'loss.png'}",
        f"  {'metrics':<16} {run.output_dir / 'metrics.jsonl'}",
        f"  {'export':<16} loaded in a fresh process; largest difference of a token's loss "
        f"{report['max_token_loss_difference']:.1e}",
        *(f"  {'note':<16} {text}" for text in run.notes),
        "  sample",
        *("    | " + line for line in text.splitlines()[:12]),
    ]
    return "\n".join(lines)


def evaluation_text(row: dict[str, Any], domain: str = "") -> str:
    """The figures of an evaluation's row, of all text or of one domain."""
    prefix = f"eval/{domain}/" if domain else "eval/"  # metrics.jsonl has words for what is no number
    loss, perplexity, bits = (float(row[prefix + key]) for key in ("loss", "perplexity", "bits_per_byte"))
    return f"loss {loss:.4f}   perplexity {perplexity:,.2f}   bits per byte {bits:.4f}"


def _moment(step: int, last_step: int) -> str:
    """Of an evaluation; that of a run that went on from elsewhere may have no beginning."""
    return {0: "before training", last_step: "after training"}.get(step, f"at step {step:,}")
