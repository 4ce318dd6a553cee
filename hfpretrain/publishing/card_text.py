"""The model card: Hub metadata and generated blocks, between markers, around which a person may write.

<!-- hfpretrain: generated results, edits in here are lost -->
...
<!-- hfpretrain: end -->
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

_BEGIN, _END = "<!-- hfpretrain: generated {}, edits in here are lost -->", "<!-- hfpretrain: end -->"
_BLOCK = re.compile(r"<!-- hfpretrain: generated (\S+?),? [^>]*-->\n(.*?)<!-- hfpretrain: end -->\n?", re.DOTALL)
_FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n?", re.DOTALL)
_LISTS = ("datasets", "language", "tags")
FIGURES = ("loss", "perplexity", "bits_per_byte")


def write(metadata: Mapping[str, Any], blocks: Mapping[str, str]) -> str:
    """A card: `metadata` as YAML, then each of `blocks` between its markers."""
    return _front(metadata) + "".join(f"\n{_block(name, text)}" for name, text in blocks.items())


def update(old: str, new: str) -> str:
    """`new` with a person's edits of `old`: text outside of the blocks, their order, blocks taken out, keys added.

    Where both have a key it is the new one's, but lists are joined, and results of other models stay.
    """
    (ours, _), (theirs, body), blocks = _split(new), _split(old), dict(_BLOCK.findall(new))
    front = _front(_merge(ours, theirs))
    if not _BLOCK.search(body):  # all of it is a person's
        return front + body.rstrip("\n") + "\n" + new[_FRONT.match(new).end() :] if body.strip() else new  # type: ignore[union-attr]
    return front + _BLOCK.sub(lambda match: _block(match[1], str(blocks.get(match[1], match[2]))), body)


def edits(text: str) -> str:
    """What a person has written: all that stands outside of the blocks."""
    return _BLOCK.sub("", _split(text)[1]).strip()


def _block(name: str, text: str) -> str:
    return f"{_BEGIN.format(name)}\n{text.strip().replace('<!--', '<! --')}\n{_END}\n"


def _front(metadata: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in metadata.items() if value not in (None, [], ())}
    return f"---\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True).strip()}\n---\n"


def _split(text: str) -> tuple[dict[str, Any], str]:
    match = _FRONT.match(text)
    if match is None:
        return {}, text
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError:
        metadata = None
    # What a person has made unreadable is the person's text.
    return (metadata, text[match.end() :]) if isinstance(metadata, dict) else ({}, text)


def _merge(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    merged = {**theirs, **ours}
    for key in _LISTS:
        both = [*_listed(ours.get(key)), *_listed(theirs.get(key))]
        if both:
            merged[key] = list(dict.fromkeys(both))
    names = {entry.get("name") for entry in ours.get("model-index") or ()}
    others = [entry for entry in theirs.get("model-index") or () if entry.get("name") not in names]
    if others:
        merged["model-index"] = [*(ours.get("model-index") or ()), *others]
    return merged


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def metadata(
    *,
    name: str,
    license: str | None,
    language: Sequence[str],
    datasets: Sequence[str],
    base_model: str | None,
    tags: Sequence[str],
    validation: Mapping[str, Mapping[str, Any]],
    tasks: Mapping[str, float],
    emissions: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What the Hub reads of a card, results in its own format (`model-index`).

    `validation`: figures by domain, "" for all text; `tasks`: `TASK/METRIC` and `TASK/METRIC_stderr` to number.
    """
    from huggingface_hub import EvalResult, ModelCardData

    results = [*_validation_results(validation, datasets), *_task_results(tasks)]
    data = ModelCardData(
        license=license,
        language=list(language) or None,
        datasets=list(datasets) or None,
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hfpretrain", *tags],
        model_name=name,
        eval_results=[EvalResult(task_type="text-generation", **result) for result in results] or None,
        co2_eq_emissions=dict(emissions) if emissions else None,
    ).to_dict()
    return dict(data)


def _validation_results(validation: Mapping[str, Mapping[str, Any]], datasets: Sequence[str]) -> Iterable[Any]:
    for domain, figures in validation.items():
        for metric in FIGURES:
            if metric in figures:
                interval = figures.get(f"{metric}_interval")
                yield {
                    "dataset_type": datasets[0] if datasets else "text",
                    "dataset_name": f"held-out text{f' ({domain})' if domain else ''}",
                    "dataset_config": domain or None,  # what tells sets of one dataset apart
                    "dataset_split": "validation",
                    "metric_type": metric,
                    "metric_value": round(figures[metric], 4),
                    "metric_args": {"interval_95": [round(end, 4) for end in interval]} if interval else None,
                }


def _task_results(tasks: Mapping[str, float]) -> Iterable[Any]:
    for key, value in tasks.items():
        task, _, metric = key.rpartition("/")
        if not key.endswith("_stderr"):
            error = tasks.get(f"{key}_stderr")
            yield {
                "dataset_type": task,
                "dataset_name": f"{task} (lm-evaluation-harness)",
                "metric_type": metric,
                "metric_value": round(value, 4),
                "metric_args": None if error is None else {"stderr": round(error, 4)},
            }


def validation_table(evaluations: Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]]) -> str:
    """`evaluations`: what to call each, and its figures by domain, "" for all text."""
    lines = ["| validation | loss | perplexity | bits per byte |", "|---|---|---|---|"]
    for label, by_domain in evaluations:
        for domain, figures in by_domain.items():
            cells = [_figure(figures, metric, digits) for metric, digits in zip(FIGURES, (4, 2, 4), strict=True)]
            lines.append(f"| {label}{f', {domain}' if domain else ''} | {' | '.join(cells)} |")
    caption = "In brackets 95 % intervals, drawn over documents."
    return "\n".join([*lines, "", caption]) if evaluations else "No validation text was held out."


def _figure(figures: Mapping[str, Any], metric: str, digits: int) -> str:
    if not isinstance(value := figures.get(metric), (int, float)):
        return str(value or "")
    interval = figures.get(f"{metric}_interval")
    low_high = f" ({interval[0]:,.{digits}f} to {interval[1]:,.{digits}f})" if interval else ""
    return f"{value:,.{digits}f}{low_high}"


def tasks_table(tasks: Mapping[str, float]) -> str:
    """Downstream results; empty where there are none."""
    lines = ["| task | metric | value | standard error |", "|---|---|---|---|"]
    for key, value in tasks.items():
        task, _, metric = key.rpartition("/")
        if not key.endswith("_stderr"):
            error = tasks.get(f"{key}_stderr")
            lines.append(f"| {task} | {metric} | {value:.4f} | {'' if error is None else f'{error:.4f}'} |")
    return "\n".join(lines) if tasks else ""


def fenced(text: str, kind: str = "text") -> str:
    """A code block that the text itself does not end."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{kind}\n{text.rstrip()}\n{fence}"


def listed(facts: Mapping[str, Any]) -> str:
    """Facts as a list, those that are not known left out."""
    return "\n".join(f"- {key}: {value}" for key, value in facts.items() if value not in (None, ""))
