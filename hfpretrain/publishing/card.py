"""The model card of a run: Hub metadata and text, to which a person may add.

Generated text stands in blocks between two markers. Text outside of the blocks was written by a person and is kept.

<!-- hfpretrain: generated results, edits in here are lost -->
...
<!-- hfpretrain: end -->
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hfpretrain import files
from hfpretrain.checkpoints import trunk
from hfpretrain.checkpoints.trunk import Trunk
from hfpretrain.evaluation.prompts import printable
from hfpretrain.evaluation.validation import BASE_TOKENIZER, domains
from hfpretrain.planning import table
from hfpretrain.recipe.addresses import parse_hub_address, repo_id_problem
from hfpretrain.recipe.redaction import redact, strip_folders
from hfpretrain.recipe.schema import DataSection, Recipe, RecipeError, TokenizerSection
from hfpretrain.recipe.yaml import dump_mapping, read_recipe
from hfpretrain.training import run_folder, segments
from hfpretrain.training.history import EXPERTS, History
from hfpretrain.training.metrics_file import iterate_metrics
from hfpretrain.training.plot import plot_expert_load, plot_loss

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, RepoCard

_JSON_FILES = (run_folder.ENVIRONMENT, run_folder.DATA)
_EMISSIONS = "emissions.csv"  # the file that codecarbon writes
_BEGIN, _END = "<!-- hfpretrain: generated {}, edits in here are lost -->", "<!-- hfpretrain: end -->"
_BLOCK = re.compile(r"<!-- hfpretrain: generated (\S+?),? [^>]*-->\n(.*?)<!-- hfpretrain: end -->\n?", re.DOTALL)
_NO_METADATA = "---\n\n---\n"
_LISTS = ("datasets", "language", "tags")
_FIGURES = {"loss": 4, "perplexity": 2, "bits_per_byte": 4}  # with the number of digits of each in the table
_USE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({arguments})
tokenizer = AutoTokenizer.from_pretrained({arguments})"""
# Names in llama.cpp of what splits text as `tokenizer.pattern` does. `llama-bpe` would also take words from the
# vocabulary without merges, and prepend BOS.
_LLAMA_CPP = {"gpt2": "gpt-2", "digits": "smollm", "llama3": "dbrx"}
_LIMITS = """This is a base model. It continues text and does not follow instructions. It repeats what its training text
contains, including errors and prejudices."""


@dataclass(frozen=True)
class _Records:
    """The records in a run folder, up to a step."""

    run: Path
    recipe: Recipe
    environment: dict[str, Any]
    data: dict[str, Any]
    history: History
    trunks: list[Trunk]
    average: str | None = None
    """How the weights of the model were averaged; None if they are those of one step."""

    @classmethod
    def read(cls, run: Path, step: int | None) -> _Records:
        """Read a run folder. Raises `RecipeError` if it is not one."""
        try:
            recipe = read_recipe(run / "recipe.yaml")
            environment, data = (json.loads((run / name).read_text("utf-8")) for name in _JSON_FILES)
        except (OSError, ValueError) as error:
            raise RecipeError.at(str(run), f"is not a run folder of this version of hfpretrain: {error}") from error
        history = History.read(run / "metrics.jsonl", step)
        return cls(run, recipe, environment, data, history, trunk.read_trunks(run))

    def evaluations(self) -> list[tuple[int, dict[str, dict[str, Any]]]]:
        """The first and the last evaluation: the step, and the figures by validation set. The key "" means all text."""
        found = []
        for row in self.history.evaluations:
            by_domain: dict[str, dict[str, Any]] = {"": {}}
            for key, value in row.items():
                if key.startswith("eval/"):
                    domain, _, figure = key.removeprefix("eval/").rpartition("/")
                    by_domain.setdefault(domain, {})[figure] = value
            found.append((row["step"], {name: part for name, part in by_domain.items() if "loss" in part}))
        return found

    def base_tokenizer(self) -> list[tuple[str, dict[str, Any]]]:
        """Figures of the base model with its own tokenizer, by validation set. Empty if the run did not extend one."""
        row = self.history.evaluations[0] if self.history.evaluations else {}
        sets = ["", *domains(row)] if f"{BASE_TOKENIZER}/loss" in row else []
        prefixes = [(name, f"{BASE_TOKENIZER}/{name}/" if name else f"{BASE_TOKENIZER}/") for name in sets]
        keys = [f"{figure}{suffix}" for figure in _FIGURES for suffix in ("", "_interval")]
        return [(name, {key: row[prefix + key] for key in keys}) for name, prefix in prefixes]

    def tasks(self) -> list[tuple[str, str, float, float | None]]:
        """Task, metric, value and standard error of the last evaluation on downstream tasks."""
        values = {
            key.removeprefix("tasks/"): value
            for key, value in self.history.tasks.items()
            if key.startswith("tasks/") and isinstance(value, (int, float))
        }
        return [
            (*key.rpartition("/")[::2], value, values.get(f"{key}_stderr"))
            for key, value in values.items()
            if not key.endswith("_stderr")
        ]

    def emissions(self) -> dict[str, Any] | None:
        """Emissions that codecarbon measured, in grams of CO2, as the Hub reads them; None if nothing was measured."""
        try:
            with (self.run / _EMISSIONS).open(encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            grams = sum(1000 * float(row["emissions"]) for row in rows)
        except (OSError, KeyError, ValueError):
            return None
        region = ", ".join(dict.fromkeys(row["country_name"] for row in rows if row.get("country_name")))
        return {"emissions": round(grams, 3), "source": "codecarbon", "training_type": "pre-training"} | (
            {"geographical_location": region} if region else {}
        )


def write_card(run: Path, model: Path, step: int | None = None, repo_id: str | None = None) -> None:
    """Write the card and the loss plot of a run folder into `model`, an exported folder.

    `step`: the step of the checkpoint, None at the end of the run. Text that a person wrote into an existing card is
    kept. Raises `RecipeError` if `run` is not a run folder.
    """
    _write(_Records.read(run, step), model, step, repo_id)


def write_average_card(
    run: Path, model: Path, step: int, average: str, figures: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write the card, the loss plot and `metrics.json` of averaged weights into `model`, an exported folder.

    `step`: the last that was averaged. `average`: how, in a few words. `figures`: of the average, by validation set;
    the key "" means all text.
    """
    records = dataclasses.replace(_Records.read(run, step), average=average)
    found = {
        f"eval/{f'{domain}/' if domain else ''}{figure}": value
        for domain, part in figures.items()
        for figure, value in part.items()
    }
    history = records.history
    row = {"step": step, "tokens": history.tokens, **found}
    history.evaluations, history.tasks, history.exported = [row] if found else [], {}, {}
    _write(records, model, None, None)
    (model / "metrics.json").write_text(json.dumps({**row, "average": average}, indent=1), encoding="utf-8")
    files.add_sums(model, [model / "metrics.json"])


def _write(records: _Records, model: Path, step: int | None, repo_id: str | None) -> None:
    run = records.run
    name = repo_id or records.recipe.hub.repo_id
    title = (name or run.absolute().name) + ("" if step is None else f", step {step:,}")
    plots = [model / "loss.png"]
    plot_loss(records.history, plots[0], title)
    if records.history.expert_load.columns:
        plots.append(model / "experts.png")
        plot_expert_load(records.history, plots[1], title)
    if (model / files.SUMS).is_file():  # exports of older versions don't have the file
        try:
            files.add_sums(model, plots)
        except ValueError as error:
            raise RecipeError.at(str(model), str(error)) from error
    text = _card(_metadata(records, title), _blocks(records, name, title, step))
    path = model / "README.md"
    try:
        files.write_atomically(path, with_edits(path.read_text("utf-8"), text) if path.exists() else text)
    except UnicodeDecodeError as error:
        raise RecipeError.at(str(path), "is not UTF-8; move it away, and a new card will be written") from error


def copy_hub_edits(path: Path, remote: str | None) -> None:
    """Copy what a person wrote into the card on the Hub, `remote`, to the card at `path`.

    If both were edited, the card at `path` stays as it is, and the Hub's is written beside it as `README.hub.md`.
    """
    local = path.read_text(encoding="utf-8")
    if remote is None:
        return
    if not edits(local):
        files.write_atomically(path, with_edits(remote, local))
    elif edits(remote) not in edits(local):
        files.write_atomically(path.with_name("README.hub.md"), remote)


def write_card_and_metrics(run: Path, folder: Path, step: int, repo_id: str | None = None) -> None:
    """Write the card and `metrics.json`, the figures of a step, into `folder`, the exported model of that step."""
    write_card(run, folder, step, repo_id)
    (folder / "metrics.json").write_text(json.dumps(_figures_at(run, step), indent=1), encoding="utf-8")
    files.add_sums(folder, [folder / "metrics.json"])


def figures_text(run: Path, step: int) -> str:
    """The newest figures measured up to a step, one per line, for a commit message."""
    found = {key: value for key, value in _figures_at(run, step).items() if isinstance(value, (int, float))}
    return "\n".join(
        f"{key}: {value:.6g}" if isinstance(value, float) else f"{key}: {value}" for key, value in found.items()
    )


def _figures_at(run: Path, step: int) -> dict[str, Any]:
    return History.read(run / "metrics.jsonl", step).figures


def with_edits(old: str, new: str) -> str:
    """The card `new` with the edits that a person made to `old`.

    Text outside of the blocks is kept. Blocks stay in the order of `old`, and a block that a person deleted is not
    added again. If both cards have a metadata key, the value of `new` is used. But datasets, languages and tags are
    merged, and results of other models are kept.
    """
    card, generated = _parse(old), _parse(new)
    blocks: dict[str, str] = dict(_BLOCK.findall(generated.text))
    if _BLOCK.search(card.text):
        card.text = _BLOCK.sub(lambda block: _block(block[1], blocks.get(block[1]) or block[2]), card.text)
    elif card.text.strip():  # a person wrote all of it
        card.text = card.text.rstrip("\n") + "\n" + generated.text
    else:
        card.text = generated.text
    for key, value in _merged_metadata(card.data.to_dict(), generated.data.to_dict()).items():
        card.data[key] = value
    return str(card)


def edits(card: str) -> str:
    """The text of a card outside of the generated blocks, which a person wrote."""
    return _BLOCK.sub("", _parse(card).text).strip()


def _parse(text: str) -> RepoCard:
    """Parse a card into its metadata (`data`) and its `text`. Metadata that can't be parsed become part of the text.

    `RepoCard` is used because `ModelCard` merges the `model-index` entries of several models into one and raises for
    entries that lack a key (huggingface_hub 2.4).
    """
    from huggingface_hub import RepoCard

    try:
        return RepoCard(text if text.lstrip().startswith("---") else _NO_METADATA + text)
    except (yaml.YAMLError, ValueError, TypeError):
        return RepoCard(_NO_METADATA + text)


def _merged_metadata(edited: dict[str, Any], generated: dict[str, Any]) -> dict[str, Any]:
    """The metadata of a generated card with what a person added to an older card."""
    merged = {**edited, **generated}
    for key in _LISTS:
        both = [*_as_list(generated.get(key)), *_as_list(edited.get(key))]
        if both:
            merged[key] = list(dict.fromkeys(both))
    names = {entry.get("name") for entry in generated.get("model-index") or ()}
    others = [entry for entry in edited.get("model-index") or () if entry.get("name") not in names]
    if others:
        merged["model-index"] = [*(generated.get("model-index") or ()), *others]
    return merged


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _card(metadata: Mapping[str, Any], blocks: Mapping[str, str]) -> str:
    """A new card with each of `blocks` between its markers."""
    card = _parse("")
    for key, value in metadata.items():
        card.data[key] = value
    card.text = "".join(f"\n{_block(name, text)}" for name, text in blocks.items())
    return str(card)


def _block(name: str, text: str) -> str:
    return f"{_BEGIN.format(name)}\n{text.strip().replace('<!--', '<! --')}\n{_END}\n"


def _metadata(records: _Records, title: str) -> dict[str, Any]:
    """The metadata of a card, with the results as `model-index`."""
    from huggingface_hub import ModelCardData

    section, datasets = records.recipe.hub, _hub_datasets(records.recipe.data)
    data = ModelCardData(
        license=section.license,
        language=list(section.language) or None,
        datasets=datasets or None,
        base_model=_base_model(records),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hfpretrain", *section.tags],
        model_name=title,
        eval_results=[*_validation_results(records, datasets), *_task_results(records)] or None,
        co2_eq_emissions=records.emissions(),
    )
    return dict(data.to_dict())


# Results are `EvalResult`, not the newer `EvalResultEntry`: the Hub accepts the latter only for datasets registered as
# benchmarks, with a task of that dataset's eval.yaml (https://huggingface.co/docs/hub/eval-results). The held-out text
# of a run is not such a dataset, and lm-eval's tasks have other names.


def _validation_results(records: _Records, datasets: Sequence[str]) -> Iterable[EvalResult]:
    """Figures of the last evaluation on each validation set."""
    from huggingface_hub import EvalResult

    *_, (_, by_domain) = records.evaluations() or [(0, {})]
    for domain, figures in by_domain.items():
        for metric in (name for name in _FIGURES if name in figures):
            interval = figures.get(f"{metric}_interval")
            yield EvalResult(
                task_type="text-generation",
                dataset_type=datasets[0] if datasets else "text",
                dataset_name=f"held-out text{f' ({domain})' if domain else ''}",
                dataset_config=domain or None,  # distinguishes several sets of one dataset
                dataset_split="validation",
                metric_type=metric,
                metric_value=round(figures[metric], 4),
                metric_args={"interval_95": [round(end, 4) for end in interval]} if interval else None,
            )


def _task_results(records: _Records) -> Iterable[EvalResult]:
    from huggingface_hub import EvalResult

    for task, metric, value, error in records.tasks():
        yield EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=f"{task} (lm-evaluation-harness)",
            metric_type=metric,
            metric_value=round(value, 4),
            metric_args=None if error is None else {"stderr": round(error, 4)},
        )


def _hub_datasets(data: DataSection) -> list[str]:
    sources = (*data.sources, *data.validation_sources)
    found = [source.path for source in sources if "/" in source.path and repo_id_problem(source.path) is None]
    return list(dict.fromkeys(path for path in found if not Path(path).exists()))


def _base_model(records: _Records) -> str | None:
    """The trunk of a branch, or else the pretrained model, if it is on the Hub."""
    addresses = [parse_hub_address(parent.given) for parent in records.trunks[-1:]]
    if addresses and addresses[0] is not None:
        return addresses[0][0]
    pretrained = records.recipe.model.pretrained
    is_on_hub = pretrained is not None and repo_id_problem(pretrained) is None and not Path(pretrained).exists()
    return pretrained if is_on_hub else None


def _blocks(records: _Records, name: str | None, title: str, step: int | None) -> dict[str, str]:
    """The text of each generated block, by block name. `name`: the repo's name, None if there is no repo."""
    recipe = records.recipe
    blocks = {
        "summary": _summary(records, name, title, step),
        "results": "\n\n".join(
            filter(None, ["## Results", _validation_table(records), _gains(records), _tasks_table(records)])
        ),
        "loss": "![Training and validation loss](loss.png)",
        "experts": _experts(records.history),
        "use": f"{_use(records.data, name or title, step)}\n\n{_llama_cpp(recipe.tokenizer)}",
        "samples": "" if records.average else _samples(records, step),
        "data": f"## Data\n\n{_sources(records.data)}\n\n{_fenced(records.data['account'])}",
        "training": f"## Training\n\n{_training(records)}",
        "reproduce": _reproduce(records.recipe, records.environment),
        "limits": _limits(records),
    }
    return {key: redact(text) for key, text in blocks.items() if text}


def _experts(history: History) -> str:
    """The plot of the experts' load, and its last figures; empty for a model without experts."""
    if not history.expert_load.columns:
        return ""
    dead, entropy = (history.logged.get(f"{EXPERTS}{key}", [0.0]) for key in ("dead", "entropy"))
    most = max(history.expert_load.columns[-1])
    return (
        "![Load of the most used expert by layer](experts.png)\n\n"
        f"Since the log step before the last, the most used expert of a layer got up to {most:.2f} times the mean "
        f"number of tokens. In no layer did more than {max(dead):.0%} of the experts get less than a tenth of the "
        f"mean. The entropy of the load is at least {min(entropy):.3f} of its maximum."
    )


def _summary(records: _Records, name: str | None, title: str, step: int | None) -> str:
    recipe = records.recipe
    kind = strip_folders(recipe.model.pretrained) or (recipe.model.config or {})["model_type"]
    origin = f"{kind}, trained further" if recipe.model.pretrained else f"{kind}, trained from scratch"
    size = f"{records.environment['num_parameters']:,} parameters, {records.history.tokens:,} tokens"
    text = f"# {title}\n\nA causal language model ({origin}, {size}), pretrained with hfpretrain."
    if records.average is not None:
        text += f" Its weights are {records.average}."
    elif step is not None:
        last_step = trunk.origin_of(records.trunks).step + recipe.training.num_steps
        text += f" This is the checkpoint of step {step:,} of {last_step:,}."
    elif name is not None and recipe.hub.repo_id is not None and recipe.checkpoint.every_steps:
        text += " Each checkpoint of the training is a revision of this repo, named by its step."
    return text


def _validation_table(records: _Records) -> str:
    lines = ["| validation | loss | perplexity | bits per byte |", "|---|---|---|---|"]
    base = records.base_tokenizer()
    for domain, figures in base:
        cells = " | ".join(_figure(figures, metric, digits) for metric, digits in _FIGURES.items())
        lines.append(f"| base model, its own tokenizer{f', {domain}' if domain else ''} | {cells} |")
    for step, by_domain in records.evaluations():
        for domain, figures in by_domain.items():
            cells = " | ".join(_figure(figures, metric, digits) for metric, digits in _FIGURES.items())
            when = f"step {step:,}" if records.average is None else "average"
            lines.append(f"| {when}{f', {domain}' if domain else ''} | {cells} |")
    caption = "In brackets: 95% confidence intervals, by bootstrap over documents."
    if len(lines) == 2:
        return "No validation text was held out."
    if base:
        caption += " Loss and perplexity are per token, so two tokenizers can be compared only by bits per byte."
    return "\n".join([*lines, "", caption, *_context_table(records)])


def _context_table(records: _Records) -> list[str]:
    """A table of the loss by the number of tokens that a prediction sees; empty for a run with a single block size."""
    losses = records.history.loss_by_context()
    ranges = list(dict.fromkeys(name for found in losses.values() for name in found))
    if not ranges:
        return []
    lines = ["", "Loss by the number of tokens that a prediction sees:", "", f"| tokens | {' | '.join(ranges)} |"]
    lines.append("|---" * (len(ranges) + 1) + "|")
    for step, found in losses.items():
        cells = (f"{found[name]:.4f}" if name in found else "" for name in ranges)
        lines.append(f"| step {step:,} | {' | '.join(cells)} |")
    return lines


def _figure(figures: Mapping[str, Any], metric: str, digits: int) -> str:
    if not isinstance(value := figures.get(metric), (int, float)):
        return str(value or "")
    interval = figures.get(f"{metric}_interval")
    low_high = f" ({interval[0]:,.{digits}f} to {interval[1]:,.{digits}f})" if interval else ""
    return f"{value:,.{digits}f}{low_high}"


def _gains(records: _Records) -> str:
    """What the model gained and lost since the run began with an existing model; empty for a new model."""
    if not (gains := records.history.gains()):
        return ""
    base = f" `{strip_folders(records.history.base)}`" if records.history.base else ""
    intro = f"Compared with the base model{base}, in bits per byte, with 95% confidence intervals of the difference:"
    return "\n".join([intro, "", *(f"- {name or 'all validation text'}: {text}" for name, text in gains.items())])


def _tasks_table(records: _Records) -> str:
    lines = ["| task | metric | value | standard error |", "|---|---|---|---|"]
    for task, metric, value, error in records.tasks():
        lines.append(f"| {task} | {metric} | {value:.4f} | {'' if error is None else f'{error:.4f}'} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _use(data: dict[str, Any], name: str, step: int | None) -> str:
    arguments = json.dumps(name) + ("" if step is None else f', revision="step-{step:08d}"')
    return f"## Use\n\n{_fenced(_USE.format(arguments=arguments), 'python')}\n\n{_framing(data)}"


def _framing(data: dict[str, Any]) -> str:
    """How to start a prompt so that it looks like a document in training."""
    if data.get("tokenizer_begins_documents"):
        return (
            f"The tokenizer puts `{data['document_start']}` before a text. In training, it stood before every document."
        )
    return f"Begin a prompt with `{data['document_start']}` to start a document; the tokenizer does not add it."


def _llama_cpp(tokenizer: TokenizerSection) -> str:
    """What llama.cpp's converter needs for a trained or extended tokenizer; empty for that of another model."""
    if tokenizer.extend is not None:
        return (
            "`convert_hf_to_gguf.py` of llama.cpp recognizes a tokenizer by a hash of the ids of a text. If it does "
            "not know this one, which has more tokens than that of its base, it prints the hash and stops. Add the "
            "hash to its function `get_vocab_base_pre`, with the `res` that it has for the tokenizer of the base."
        )
    if tokenizer.algorithm is None:
        return ""
    kind = _LLAMA_CPP.get(tokenizer.pattern) if tokenizer.algorithm == "byte_level_bpe" else None
    if kind is None:
        return "llama.cpp can't split text as this tokenizer does, so a model in its format would get other tokens."
    return (
        "`convert_hf_to_gguf.py` of llama.cpp recognizes a tokenizer by a hash of the ids of a text. It does not know "
        "this one, which was trained with the model, so it prints the hash and stops. Add two lines to its function "
        f'`get_vocab_base_pre`: `if chkhsh == "HASH":` and `res = "{kind}"`.'
    )


def _samples(records: _Records, step: int | None) -> str:
    """The texts generated at the last evaluation and at the export."""
    newest: list[dict[str, Any]] = []
    for sample in iterate_metrics(records.run / "samples.jsonl"):
        if step is None or sample["step"] <= step:
            newest = [*(newest if newest and newest[0]["step"] == sample["step"] else []), sample]
    parts = [
        f"{how}, from {sample['prompt']!r}, at step {sample['step']:,}:\n\n{_fenced(sample[kind])}"
        for sample in newest
        for kind, how in (("greedy", "Greedy"), ("drawn", "Sampled"))
    ]
    exported = records.history.exported
    if exported and exported["export/sample"] is not None:
        how = "Sampled with top-k 50 at temperature 0.8, seed 0, from an empty prompt:"
        parts.append(f"{how}\n\n{_fenced(exported['export/sample'])}")
    return "\n\n".join(["## Samples", *parts]) if parts else ""


def _sources(data: dict[str, Any]) -> str:
    """A line for each source: its name, which part was read, and the revision of a Hub dataset."""
    lines = []
    sources = strip_folders(data["sources"])
    for number, (source, identity) in enumerate(zip(sources, data["identities"], strict=True)):
        details = ["held out"] if number >= data["num_training_sources"] else []
        details += [
            f"{key} `{source[key]}`" for key in ("domain", "name", "split", "data_files", "weight") if source.get(key)
        ]
        # The identity of a Hub dataset holds its commit: in a mapping, or alone in older versions. The identity
        # of files holds the name, size and checksum of each.
        if isinstance(identity[0], dict):
            details.append(f"revision `{identity[0]['commit']}`")
        elif len(identity) == 1 and isinstance(identity[0], str):
            details.append(f"revision `{identity[0]}`")
        lines.append(f"- `{source['path']}`" + (f": {', '.join(details)}" if details else ""))
    return "\n".join(lines)


def _training(records: _Records) -> str:
    """Facts about the training as a list. Facts that are not known are left out."""
    recipe, environment, history = records.recipe, records.environment, records.history
    last, tokens_per_step = history.logged, recipe.training.tokens_per_step
    parts = segments.segments_of(environment, last.get("step", 0))
    ranges, hardware, speeds, hours = segments.hardware_ranges(parts), [], [], 0.0
    for device, first, end in ranges:
        steps = f"steps {first:,} to {end:,}: " if len(ranges) > 1 else ""
        hardware.append(f"{steps}{device}")
        seconds = table.mean_seconds_per_step(history.speeds(), tokens_per_step, first - 1, end)
        if seconds is None:
            continue  # these steps were trained in another folder, whose metrics.jsonl has the figures
        speed = f"{steps}{tokens_per_step / seconds:,.0f} tokens/s"
        if last.get("mfu") and end == last["step"]:
            mfu = last["mfu"] / last["tokens_per_second"] * tokens_per_step / seconds
            speed = f"{speed}, MFU {mfu:.3f} ({environment['peak_flops_are']})"
        speeds.append(speed)
        hours += (end + 1 - first) * seconds / 3600
    precisions = dict.fromkeys("float32" if part["precision"] == "no" else part["precision"] for part in parts)
    dtype = history.exported.get("export/dtype", recipe.model.dtype)
    without_embeddings = f"{environment['num_non_embedding_parameters']:,} without embeddings"
    emissions = records.emissions()
    of_steps = f"steps of {tokens_per_step:,}"
    if trunks := records.trunks:
        own, of_steps = last.get("step", 0) - trunks[-1].step, "steps, the trunk's included"
        branch = f"{strip_folders(trunk.describe(trunks))}, then {own:,} steps of {tokens_per_step:,} tokens"
    facts = {
        "branch of": branch if trunks else None,
        "parameters": f"{environment['num_parameters']:,} ({without_embeddings})",
        "tokens": f"{last['tokens']:,} in {last['step']:,} {of_steps}" if last else None,
        "epochs, by source": ", ".join(f"{number:.2f}" for number in environment.get("epochs") or ()),
        "compute": f"{last['flops']:.3g} FLOP" if last else None,
        "hardware": "; ".join(hardware),
        "throughput": "; ".join(speeds),
        "time in training": f"{hours:,.2f} hours" if hours else None,
        "peak memory of a process": f"{last['peak_memory_bytes'] / 2**30:,.2f} GiB" if last else None,
        "emissions": f"{emissions['emissions']:,} g CO2 (codecarbon)" if emissions else None,
        "precision": ", then ".join(precisions),
        "weights": f"{dtype}, {'as in training' if dtype == 'float32' else 'rounded from float32'}",
        "attention across documents": "no" if environment["document_masking"] else "yes",
    }
    return "\n".join(f"- {name}: {fact}" for name, fact in facts.items() if fact)


def _reproduce(recipe: Recipe, environment: dict[str, Any]) -> str:
    engine, number, versions = environment["engine"], environment["num_processes"], environment["versions"]
    # Package registries don't have local versions such as torch's `+cpu`.
    pins = [f"{name}=={version.partition('+')[0]}" for name, version in versions.items() if name != "hfpretrain"]
    commit = f", commit {environment['commit']}" if environment["commit"] else ""
    commands = [
        f"# hfpretrain {versions['hfpretrain']}{commit}",
        f"pip install {' '.join(pins)}  # Python {environment['python']}",
        f"accelerate launch --config_file accelerate_configs/{engine}.yaml --num_processes {number} "
        "-m hfpretrain.train recipe.yaml",
    ]
    mapping = recipe.model_dump(mode="json")
    public = strip_folders(mapping, texts=("prompts",))
    note = "" if public == mapping else " (without the names of local folders)"
    start = f" and the checkpoint `{public['checkpoint']['branch_from']}`" if recipe.checkpoint.branch_from else ""
    intro = f"## Reproduce\n\nWith the recipe below as `recipe.yaml`{note}{start}:"
    details = f"<details><summary>recipe.yaml</summary>\n\n{_fenced(dump_mapping(public), 'yaml')}\n\n</details>"
    return "\n\n".join([intro, _fenced("\n".join(commands), "sh"), details])


def _limits(records: _Records) -> str:
    notes = "".join(f" {text[0].upper()}{text[1:]}." for text in records.environment.get("notes", ()))
    for parent in records.trunks:
        notes = notes.replace(parent.given, strip_folders(parent.given))
    text = "## Limits\n\n" + _LIMITS + notes
    if exported := records.history.exported:
        text += (
            " The export was loaded in a new process. Its loss on a stored batch was "
            f"{exported['export/loss_export']:.6f}, and {exported['export/loss_training']:.6f} in the training process."
        )
    return text


def _fenced(text: str, kind: str = "text") -> str:
    """A code block whose fence is longer than any in the text. Control characters are replaced."""
    text = printable(text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{kind}\n{text.rstrip()}\n{fence}"
