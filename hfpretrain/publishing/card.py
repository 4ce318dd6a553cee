"""The model card of a run folder, by what stands in it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from hfpretrain import files
from hfpretrain.planning import table
from hfpretrain.publishing import card_text
from hfpretrain.recipe.addresses import repo_id_problem
from hfpretrain.recipe.redaction import redact, without_folders
from hfpretrain.recipe.schema import Recipe, RecipeError
from hfpretrain.recipe.yaml import dump_mapping, read_recipe
from hfpretrain.training import report
from hfpretrain.training.history import History
from hfpretrain.training.metrics_file import iterate_metrics
from hfpretrain.training.plot import plot_loss

_EMISSIONS = "emissions.csv"  # as codecarbon names it
_USE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({arguments})
tokenizer = AutoTokenizer.from_pretrained({arguments})"""
_LIMITS = """A base model: it continues text, it does not follow instructions, and it repeats what its training text
holds, errors and prejudices included."""


def write_card(run: Path, model: Path, step: int | None = None, repo_id: str | None = None) -> None:
    """The card and the loss plot of a run folder into `model`, an exported folder, by what stands in the run folder.

    `step`: of a checkpoint, if it is not the end of the run. What a person has written into a card that is there stays.
    Raises `RecipeError` where `run` is no run.
    """
    try:
        recipe = read_recipe(run / "recipe.yaml")
        where, data = (json.loads((run / name).read_text("utf-8")) for name in ("environment.json", report.DATA))
    except (OSError, ValueError) as error:
        raise RecipeError.at(str(run), f"is no run folder of this version of hfpretrain: {error}") from error
    history = History.read(run / "metrics.jsonl", step)
    name = repo_id or recipe.hub.repo_id
    title = (name or run.absolute().name) + ("" if step is None else f", step {step:,}")
    plot_loss(history, model / "loss.png", title)
    if (model / files.SUMS).is_file():  # which exports of older versions do not have
        try:
            files.add_sums(model, [model / "loss.png"])
        except ValueError as error:
            raise RecipeError.at(str(model), str(error)) from error
    blocks = _blocks(run, recipe, where, data, history, name, title, step)
    text = card_text.write(_metadata(run, recipe, history, title), blocks)
    path = model / "README.md"
    try:
        files.write_whole(path, card_text.update(path.read_text("utf-8"), text) if path.exists() else text)
    except UnicodeDecodeError as error:
        raise RecipeError.at(str(path), "is not UTF-8; move it away, and a new card is written") from error


def keep_edits(path: Path, remote: str | None) -> None:
    """Copy what a person has written into the card on the Hub to the card at `path`.

    If both were edited, the one here is used, and the Hub's is kept beside it as `README.hub.md`.
    """
    ours = path.read_text(encoding="utf-8")
    if remote is None:
        return
    if not card_text.edits(ours):
        files.write_whole(path, card_text.update(remote, ours))
    elif card_text.edits(remote) not in card_text.edits(ours):
        files.write_whole(path.with_name("README.hub.md"), remote)


def describe_export(run: Path, folder: Path, step: int, repo_id: str | None = None) -> None:
    """Put the card and the figures of a step into `folder`, the exported model of that step."""
    write_card(run, folder, step, repo_id)
    (folder / "metrics.json").write_text(json.dumps(figures(run, step), indent=1), encoding="utf-8")
    files.add_sums(folder, [folder / "metrics.json"])


def figures(run: Path, step: int | None = None) -> dict[str, Any]:
    """The newest figures of each kind that were measured up to a step."""
    return History.read(run / "metrics.jsonl", step).figures


def figures_text(run: Path, step: int) -> str:
    """The same as lines, for a commit's message."""
    found = {key: value for key, value in figures(run, step).items() if isinstance(value, (int, float))}
    return "\n".join(
        f"{key}: {value:.6g}" if isinstance(value, float) else f"{key}: {value}" for key, value in found.items()
    )


def _evaluations(history: History) -> list[tuple[int, dict[str, dict[str, Any]]]]:
    """Step and figures by domain of the first and the last evaluation, those of all text under the empty name."""
    found = []
    for row in history.evaluations:
        by_domain: dict[str, dict[str, Any]] = {"": {}}
        for key, value in row.items():
            if key.startswith("eval/"):
                domain, _, figure = key.removeprefix("eval/").rpartition("/")
                by_domain.setdefault(domain, {})[figure] = value
        found.append((row["step"], {name: part for name, part in by_domain.items() if "loss" in part}))
    return found


def _tasks(history: History) -> dict[str, float]:
    found = {k.removeprefix("tasks/"): value for k, value in history.tasks.items() if k.startswith("tasks/")}
    return {key: value for key, value in found.items() if isinstance(value, (int, float))}


def _hub_datasets(recipe: Recipe) -> list[str]:
    sources = (*recipe.data.sources, *recipe.data.validation_sources)
    found = [source.path for source in sources if "/" in source.path and repo_id_problem(source.path) is None]
    return list(dict.fromkeys(path for path in found if not Path(path).exists()))


def _base_model(recipe: Recipe) -> str | None:
    """Of the Hub, which a folder is not."""
    pretrained = recipe.model.pretrained
    is_of_hub = pretrained is not None and repo_id_problem(pretrained) is None and not Path(pretrained).exists()
    return pretrained if is_of_hub else None


def _emissions(run: Path) -> dict[str, Any] | None:
    """What codecarbon has left in the run folder, in grams of CO2; None where nothing was measured."""
    try:
        with (run / _EMISSIONS).open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        grams = sum(1000 * float(row["emissions"]) for row in rows)
    except (OSError, KeyError, ValueError):
        return None
    region = ", ".join(dict.fromkeys(row["country_name"] for row in rows if row.get("country_name")))
    return {"emissions": round(grams, 3), "source": "codecarbon", "training_type": "pre-training"} | (
        {"geographical_location": region} if region else {}
    )


def _metadata(run: Path, recipe: Recipe, history: History, title: str) -> dict[str, Any]:
    evaluations, section = _evaluations(history), recipe.hub
    return card_text.metadata(
        name=title,
        license=section.license,
        language=section.language,
        datasets=_hub_datasets(recipe),
        base_model=_base_model(recipe),
        tags=section.tags,
        validation=evaluations[-1][1] if evaluations else {},
        tasks=_tasks(history),
        emissions=_emissions(run),
    )


def _blocks(
    run: Path,
    recipe: Recipe,
    where: dict[str, Any],
    data: dict[str, Any],
    history: History,
    name: str | None,
    title: str,
    step: int | None,
) -> dict[str, str]:
    exported = history.exported
    labels = [(f"step {at:,}", by_domain) for at, by_domain in _evaluations(history)]
    kind = without_folders(recipe.model.pretrained) or (recipe.model.config or {})["model_type"]
    origin = f"{kind}, trained further" if recipe.model.pretrained else f"{kind}, trained from scratch"
    tokens = history.tokens
    steps = recipe.training.num_steps
    summary = (
        f"# {title}\n\nA causal language model ({origin}, {where['num_parameters']:,} parameters, {tokens:,} tokens), "
        "pretrained with hfpretrain."
    )
    if step is not None:
        summary += f" This is the checkpoint of step {step:,} of {steps:,}."
    elif name is not None and recipe.hub.repo_id is not None and recipe.checkpoint.every_steps:
        summary += " Each checkpoint of the training is a revision of this repo, named by its step."
    arguments = json.dumps(name or title) + ("" if step is None else f', revision="step-{step:08d}"')
    use = card_text.fenced(_USE.format(arguments=arguments), "python")
    use += f"\n\n{_framing(data)}"
    limits = "".join([_LIMITS, *(f" {text[0].upper()}{text[1:]}." for text in where.get("notes", ()))])
    if exported:
        limits += (
            f" The export was loaded in a fresh process and gave a loss of {exported['export/loss_export']:.6f} on a "
            f"stored batch; the training process {exported['export/loss_training']:.6f}."
        )
    blocks = {
        "summary": summary,
        "results": f"## Results\n\n{card_text.validation_table(labels)}\n\n{card_text.tasks_table(_tasks(history))}",
        "loss": "![Training and validation loss](loss.png)",
        "use": f"## Use\n\n{use}",
        "samples": _samples(run, exported, step),
        "data": f"## Data\n\n{_sources(data)}\n\n{card_text.fenced(data['account'])}",
        "training": f"## Training\n\n{card_text.listed(_training(run, recipe, where, history))}",
        "reproduce": _reproduce(recipe, where),
        "limits": f"## Limits\n\n{limits}",
    }
    return {key: redact(text) for key, text in blocks.items() if text}


def _framing(data: dict[str, Any]) -> str:
    """How a prompt begins as a document did in training."""
    if data.get("tokenizer_begins_documents"):
        return (
            f"The tokenizer puts `{data['document_start']}` before a text, as it stood before every document in "
            "training."
        )
    return f"Begin a prompt with `{data['document_start']}` to start a document; the tokenizer does not add it."


def _samples(run: Path, exported: dict[str, Any], step: int | None) -> str:
    newest: list[dict[str, Any]] = []
    for sample in iterate_metrics(run / "samples.jsonl"):
        if step is None or sample["step"] <= step:
            newest = [*(newest if newest and newest[0]["step"] == sample["step"] else []), sample]
    parts = [
        f"{how} from {sample['prompt']!r}, at step {sample['step']:,}:\n\n{card_text.fenced(sample[kind])}"
        for sample in newest
        for kind, how in (("greedy", "Greedily"), ("drawn", "Drawn"))
    ]
    if exported and exported["export/sample"] is not None:
        how = "Drawn with top-k 50 at temperature 0.8, seed 0, from an empty prompt:"
        parts.append(f"{how}\n\n{card_text.fenced(exported['export/sample'])}")
    return "\n\n".join(["## Samples", *parts]) if parts else ""


def _sources(data: dict[str, Any]) -> str:
    """A line for each source: its name, what was read of it, the revision of a Hub dataset."""
    lines = []
    sources = without_folders(data["sources"])
    for number, (source, identity) in enumerate(zip(sources, data["identities"], strict=True)):
        details = ["held out"] if number >= data["num_training_sources"] else []
        details += [
            f"{key} `{source[key]}`" for key in ("domain", "name", "split", "data_files", "weight") if source.get(key)
        ]
        # Else name, size and content of each file. Older versions have the revision alone.
        if isinstance(identity[0], dict):
            details.append(f"revision `{identity[0]['commit']}`")
        elif len(identity) == 1 and isinstance(identity[0], str):
            details.append(f"revision `{identity[0]}`")
        lines.append(f"- `{source['path']}`" + (f": {', '.join(details)}" if details else ""))
    return "\n".join(lines)


def _training(run: Path, recipe: Recipe, where: dict[str, Any], history: History) -> dict[str, Any]:
    last = history.logged
    tokens_per_step, segments = recipe.training.tokens_per_step, report.segments_of(where, last.get("step", 0))
    places, hardware, speeds, hours = report.places(segments), [], [], 0.0
    for place, first, end in places:
        steps = f"steps {first:,} to {end:,}: " if len(places) > 1 else ""
        hardware.append(f"{steps}{place}")
        seconds = table.seconds_per_step(history.speeds(), tokens_per_step, first - 1, end)
        if seconds is None:
            continue  # trained in another folder, whose figures are there
        speed = f"{steps}{tokens_per_step / seconds:,.0f} tokens/s"
        if last.get("mfu") and end == last["step"]:
            mfu = last["mfu"] / last["tokens_per_second"] * tokens_per_step / seconds
            speed = f"{speed}, MFU {mfu:.3f} ({where['peak_flops_are']})"
        speeds.append(speed)
        hours += (end + 1 - first) * seconds / 3600
    precisions = dict.fromkeys("float32" if part["precision"] == "no" else part["precision"] for part in segments)
    dtype = history.exported.get("export/dtype", recipe.model.dtype)
    emissions = _emissions(run)
    return {
        "parameters": f"{where['num_parameters']:,} ({where['num_non_embedding_parameters']:,} without embeddings)",
        "tokens": f"{last['tokens']:,} in {last['step']:,} steps of {recipe.training.tokens_per_step:,}"
        if last
        else None,
        "epochs, by source": ", ".join(f"{number:.2f}" for number in where.get("epochs") or ()) or None,
        "compute": f"{last['flops']:.3g} FLOP" if last else None,
        "hardware": "; ".join(hardware),
        "throughput": "; ".join(speeds),
        "time in training": f"{hours:,.2f} hours" if hours else None,
        "peak memory of a process": f"{last['peak_memory_bytes'] / 2**30:,.2f} GiB" if last else None,
        "emissions": f"{emissions['emissions']:,} g CO2 (codecarbon)" if emissions else None,
        "precision": ", then ".join(precisions),
        "weights": f"{dtype}, {'as training kept them' if dtype == 'float32' else 'rounded from float32'}",
        "attention across documents": "no" if where["document_masking"] else "yes",
    }


def _reproduce(recipe: Recipe, where: dict[str, Any]) -> str:
    engine, number, versions = where["engine"], where["num_processes"], where["versions"]
    # A local version as torch's `+cpu` is of no package registry.
    pins = [f"{name}=={version.partition('+')[0]}" for name, version in versions.items() if name != "hfpretrain"]
    commands = [
        f"# hfpretrain {versions['hfpretrain']}" + (f", commit {where['commit']}" if where["commit"] else ""),
        f"pip install {' '.join(pins)}  # Python {where['python']}",
        f"accelerate launch --config_file accelerate_configs/{engine}.yaml --num_processes {number} "
        "-m hfpretrain.train recipe.yaml",
    ]
    mapping = recipe.model_dump(mode="json")
    public = without_folders(mapping, texts=("prompts",))
    cut = "" if public == mapping else ", in which folders of the machine are left out"
    text = "\n".join(
        [
            "## Reproduce",
            "",
            f"With the recipe below as `recipe.yaml`{cut}:",
            "",
            card_text.fenced("\n".join(commands), "sh"),
        ]
    )
    details = (
        f"<details><summary>recipe.yaml</summary>\n\n{card_text.fenced(dump_mapping(public), 'yaml')}\n\n</details>"
    )
    return f"{text}\n\n{details}"
