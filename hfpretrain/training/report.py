"""Files that describe a run, and the summary that it prints at its end."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfpretrain import files
from hfpretrain.checkpoints import export, trunk
from hfpretrain.checkpoints.trunk import Trunk
from hfpretrain.data.summary import summary
from hfpretrain.data.tokenizer import (
    SENTENCEPIECE,
    describe_framing,
    document_prefix,
    document_start,
    find_sentencepiece,
)
from hfpretrain.evaluation.prompts import printable
from hfpretrain.evaluation.validation import base_tokenizer_lines, domains
from hfpretrain.recipe.redaction import redact_all, strip_folders
from hfpretrain.recipe.yaml import dump_recipe
from hfpretrain.training import segments
from hfpretrain.training.history import History
from hfpretrain.training.run_folder import DATA, ENVIRONMENT
from hfpretrain.training.setup import Setup
from hfpretrain.training.state import TrainState
from hfpretrain.training.versions import commit, versions


def environment(setup: Setup) -> dict[str, Any]:
    """The content of `environment.json`: what a run trains on, and what was found when it began.

    It has no environment variables and no secrets.
    """
    engine = setup.engine
    is_measured = engine.device.type == "cpu"
    return {
        "engine": engine.name,
        "num_processes": engine.num_processes,
        "device": engine.device_name,
        "mixed_precision": engine.precision,
        "peak_flops": setup.peak_flops,
        "peak_flops_are": "a matrix product on all cores, measured" if is_measured else "of data sheets",
        "attn_implementation": setup.config._attn_implementation,
        "document_masking": setup.document_masking,
        "chunked_loss": setup.chunked_loss,
        "epochs": setup.epochs,
        "notes": setup.notes,
        "accumulation_steps": setup.stages.all[0].accumulation_steps,
        "num_parameters": setup.parameters.total,
        "num_non_embedding_parameters": setup.parameters.non_embedding,
        "initial_weights": setup.initial_weights,
        "hub_commits": setup.hub_commits,
        "untrained_parameters": {
            "frozen_by_class": setup.untrained.frozen_by_class,
            "outside_loss": setup.untrained.outside_loss,
        },
        "routers": [router.name for router in setup.router_recorder.routers],
        "commit": commit(),
        "python": platform.python_version(),
        "versions": versions(),
    }


def write_run_files(setup: Setup, state: TrainState) -> None:
    """Write the files that describe the run into its folder: config, tokenizer, recipe, a description of the data,
    optimizer groups and environment."""
    folder = setup.output_dir
    setup.config.save_pretrained(folder / export.CONFIG_FOLDER)
    setup.tokenizer.save_pretrained(folder / export.CONFIG_FOLDER)
    sentencepiece = find_sentencepiece(setup.pinned.tokenizer, setup.tokenizer)
    if sentencepiece is not None:
        shutil.copyfile(sentencepiece, folder / export.CONFIG_FOLDER / SENTENCEPIECE)
    if setup.generation_config is not None:
        setup.generation_config.to_json_file(folder / export.CONFIG_FOLDER / export.GENERATION_CONFIG)
    _, _, account = summary(setup.prepared).partition("\n")
    if setup.recipe.data.streaming:
        sources = ", ".join(strip_folders(source.path) for source in setup.recipe.data.sources)
        account = f"  streamed from   {sources}\n{account}".rstrip()
    manifest = setup.prepared.manifest
    data = {
        "prepared": setup.prepared.path.name,
        "checksum": setup.prepared.checksum,
        "account": account,
        "sources": manifest["recipe"]["sources"] + manifest["recipe"]["validation_sources"],
        "identities": manifest["source_identities"] + manifest["validation_identities"],
        "num_training_sources": len(manifest["source_identities"]),
        "document_start": setup.tokenizer.decode(document_start(setup.tokenizer)),
        "tokenizer_begins_documents": bool(document_prefix(setup.tokenizer)),
        "framing": describe_framing(setup.tokenizer),
    }
    for name, content in ((DATA, json.dumps(redact_all(data), indent=1)), ("recipe.yaml", dump_recipe(setup.recipe))):
        files.write_atomically(folder / name, content)
    files.write_atomically(folder / "optimizer.json", json.dumps(setup.optimizer_groups, indent=1))
    path = folder / ENVIRONMENT
    # A finished run that is started again trains nothing, so the file keeps what it was trained with.
    if state.step < setup.last_step or not path.exists():
        files.write_atomically(path, json.dumps(environment(setup) | {"segments": state.segments}, indent=1))


def run_summary(
    state: TrainState,
    history: History,
    report: dict[str, Any],
    *,
    output_dir: Path,
    num_parameters: int,
    epochs: str | None,
    notes: Sequence[str],
    trunks: Sequence[Trunk],
) -> str:
    """What a finished run prints. `report`: see `verify.verify_export`. `epochs`: text of `format_epochs`, None for a
    stream. `trunks`: where the run branched off other runs."""
    first_step = trunk.origin_of(trunks).step
    where = ", ".join(
        text if (first, last) == (1, state.step) else f"{text} (steps {first:,} to {last:,})"
        for text, first, last in segments.hardware_ranges(state.segments)
    )
    lines = [
        "",
        f"{output_dir.name}: {num_parameters:,} parameters, {state.tokens:,} tokens in {state.step:,} steps, {where}",
    ]
    if trunks:
        own = f"{state.tokens - trunks[-1].tokens:,} tokens in {state.step - first_step:,} steps of its own"
        lines.append(f"  {'branch':<16} of {trunk.describe(trunks)}; {own}")
    for row in history.evaluations:
        lines.append(f"  {_evaluation_time(row['step'], first_step, state.step):<16} {evaluation_text(row)}")
        lines += [f"    {name:<14} {evaluation_text(row, name)}" for name in domains(row)]
        lines += [f"  {line}" for line in base_tokenizer_lines(row)]
    lines += _gain_lines(history)
    lines += context_lines(history.loss_by_context(), first_step, state.step)
    if epochs is not None:
        lines.append(f"  {'epochs':<16} {epochs}")
    text = f"none: {report['sample_error']}" if report["sample"] is None else report["sample"]
    lines += [
        f"  {'model':<16} {output_dir / 'model'}",
        f"  {'loss plot':<16} {output_dir / 'loss.png'}",
        f"  {'metrics':<16} {output_dir / 'metrics.jsonl'}",
        f"  {'export':<16} loaded in a fresh process; largest difference in a token's loss "
        f"{report['max_token_loss_difference']:.1e}",
        *(f"  {'note':<16} {text}" for text in notes),
        "  sample",
        *("    | " + line for line in printable(text).splitlines()[:12]),
    ]
    return "\n".join(lines)


def evaluation_text(row: dict[str, Any], domain: str = "") -> str:
    """The figures in the row of an evaluation: those of all text, or of the validation set `domain`."""
    prefix = f"eval/{domain}/" if domain else "eval/"  # `float`: metrics.jsonl has strings for NaN
    loss, perplexity, bits = (float(row[prefix + key]) for key in ("loss", "perplexity", "bits_per_byte"))
    return f"loss {loss:.4f}   perplexity {perplexity:,.2f}   bits per byte {bits:.4f}"


def _gain_lines(history: History) -> list[str]:
    """Lines about what the run gained and lost since it began with an existing model; none for a new model."""
    if not (gains := history.gains()):
        return []
    base = f"compared with {history.base}" if history.base else "compared with the model before training"
    lines = [f"  {'gained or lost':<16} bits per byte {base}; 95% intervals, paired by document"]
    return [*lines, *(f"    {name or 'all text':<14} {text}" for name, text in gains.items())]


def context_lines(losses: dict[int, dict[str, float]], first_step: int, last_step: int) -> list[str]:
    """A table of `History.loss_by_context`."""
    if not losses:
        return []
    ranges = list(dict.fromkeys(name for found in losses.values() for name in found))
    width = max(8, *map(len, ranges))
    lines = ["  loss by the number of tokens that a prediction sees"]
    lines.append(f"  {'':<16} {'  '.join(name.rjust(width) for name in ranges)}")
    for step, found in losses.items():
        cells = (f"{found[name]:.4f}" if name in found else "" for name in ranges)
        when = _evaluation_time(step, first_step, last_step)
        lines.append(f"  {when:<16} {'  '.join(cell.rjust(width) for cell in cells)}")
    return lines


def _evaluation_time(step: int, first_step: int, last_step: int) -> str:
    """When an evaluation was made. A run that resumes from another run's checkpoint has none before training."""
    return {first_step: "before training", last_step: "after training"}.get(step, f"at step {step:,}")
