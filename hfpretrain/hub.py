"""The model card and the upload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfpretrain.recipe import HubSection, RecipeError

_CARD = """
# {name}

A causal language model pretrained from {origin} with hfpretrain.

{results}

![Training and validation loss](loss.png)

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

The tokenizer adds no special tokens; begin a prompt with `{bos}` to start a document.

## Sample

Drawn with top-k 50 at temperature 0.8, seed 0, from an empty prompt:

```text
{sample}
```

## Data

{data}

## Training

{training}

<details><summary>Recipe</summary>

```yaml
{recipe}
```

</details>

## Limits

A base model: it continues text, it does not follow instructions, and it repeats what its training text holds,
errors and prejudices included. {verification}
"""


def model_card(
    *,
    name: str,
    section: HubSection,
    origin: str,
    base_model: str | None,
    datasets: list[str],
    results: dict[str, Any],
    data: str,
    training: dict[str, Any],
    recipe: str,
    report: dict[str, Any],
    bos: str,
) -> str:
    """The model card: Hub metadata and the text around measured figures.

    `results` holds `eval/...` figures of the first and last evaluation under "first" and "last".
    """
    from huggingface_hub import EvalResult, ModelCardData

    last = results.get("last") or {}
    evaluations = [
        EvalResult(
            task_type="text-generation",
            dataset_type=datasets[0] if datasets else "text",
            dataset_name="validation split of the training text",
            metric_type=key,
            metric_value=round(last[f"eval/{key}"], 4),
        )
        for key in ("perplexity", "bits_per_byte")
        if f"eval/{key}" in last
    ]
    metadata = ModelCardData(
        license=section.license,
        language=list(section.language) or None,
        datasets=datasets or None,
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hfpretrain", *section.tags],
        model_name=name,
        eval_results=evaluations or None,
    )
    verification = (
        f"The export was loaded in a fresh process and gave a loss of {report['loss_export']:.6f} on a stored batch; "
        f"the training process {report['loss_training']:.6f}."
    )
    text = _CARD.format(
        name=name,
        origin=origin,
        results=_results_table(results),
        sample=report["sample"].replace("```", "'''"),
        data=data,
        training="\n".join(f"- {key}: {value}" for key, value in training.items()),
        recipe=recipe.strip(),
        verification=verification,
        bos=bos,
    )
    return f"---\n{metadata.to_yaml()}\n---\n{text}"


def _results_table(results: dict[str, Any]) -> str:
    rows = [(label, results.get(key)) for label, key in (("before training", "first"), ("after training", "last"))]
    lines = [
        f"| {label} | {row['eval/loss']:.4f} | {row['eval/perplexity']:.2f} | {row['eval/bits_per_byte']:.4f} |"
        for label, row in rows
        if row
    ]
    if not lines:
        return "No validation split was held out."
    header = ["| validation | loss | perplexity | bits per byte |", "|---|---|---|---|"]
    return "\n".join([*header, *lines])


def push(model_path: Path, repo_id: str, private: bool) -> str:
    """Upload an exported folder; returns its address. The token is huggingface_hub's own business."""
    from huggingface_hub import HfApi

    if not (model_path / "config.json").is_file():
        raise RecipeError.at(str(model_path), "no exported model here; train first, then give the run folder")
    api = HfApi()
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(repo_id=repo_id, folder_path=model_path, commit_message="Upload from hfpretrain")
    except Exception as error:  # its HTTP library raises classes of its own
        message = " ".join(str(error).split())
        raise RecipeError.at(repo_id, f"the Hub did not take it: {message}; `hf auth login` sets a token") from error
    return str(commit.commit_url)
