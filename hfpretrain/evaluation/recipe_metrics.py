"""Metrics of `evaluate` that a recipe names. Only the main process computes them, since `evaluate` may hang with
several processes.

A metric is a Python script. Without `evaluation.trust_remote_code`, only hfpretrain's own metrics and those that
`evaluate` hosts are run, since reading a recipe must not run code of its author.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpretrain.recipe.addresses import repo_id_problem
from hfpretrain.recipe.labels import IGNORE_INDEX
from hfpretrain.recipe.schema import EvaluationSection, Problem, RecipeError

if TYPE_CHECKING:
    import torch

_NAMES = (
    "accuracy bertscore bleu bleurt brier_score cer character charcut_mt chrf code_eval comet competition_math "
    "confusion_matrix coval cuad exact_match f1 frugalscore glue google_bleu indic_glue mae mahalanobis mape mase "
    "matthews_correlation mauve mean_iou meteor mse nist_mt pearsonr perplexity poseval precision r_squared recall "
    "rl_reliability roc_auc rouge sacrebleu sari seqeval smape spearmanr squad squad_v2 super_glue ter trec_eval wer "
    "wiki_split xnli xtreme_s"
)
_SPACES = "evaluate-metric/"
HOSTED = frozenset(_NAMES.split())
"""Names in https://github.com/huggingface/evaluate/tree/main/metrics. `evaluate` loads them from
`evaluate-metric/NAME`, at the revision of its own version."""


def trust_problems(mapping: dict[str, Any]) -> Iterator[Problem]:
    """A problem for each script that a recipe's raw mapping names under `evaluation` but does not trust.

    No script is opened.
    """
    try:
        section = EvaluationSection.model_validate(mapping.get("evaluation") or {})
    except ValueError:  # the schema reports it
        return
    for number, path in enumerate(section.metrics):
        if (message := _refusal(path, section)) is not None:
            yield Problem(f"evaluation.metrics.{number}", message)
    if section.lm_eval is not None and section.lm_eval.include_path is not None and not section.trust_remote_code:
        yield Problem(
            "evaluation.lm_eval.include_path",
            f"task files in {section.lm_eval.include_path} can run any code; read them, then set "
            "evaluation.trust_remote_code to true",
        )


def _script(path: str) -> Path | None:
    """The local script that `evaluate` would run for a metric's path; None if it would load one from the Hub."""
    script = Path(path) if path.endswith(".py") else Path(path) / f"{Path(path).name}.py"
    return script if script.is_file() else None


def _refusal(path: str, section: EvaluationSection) -> str | None:
    """The reason why a metric's script must not be run; None if it may be run."""
    script = _script(path)
    if script is not None and script.resolve().parent == Path(__file__).resolve().parent:
        return None
    if script is None and path.removeprefix(_SPACES) in HOSTED:
        return None
    if script is None and repo_id_problem(path) is not None:
        return f"{path} can't be loaded: there is no such script, and evaluate hosts no metric with this name"
    where = "a script on this machine" if script is not None else "a script on the Hub"
    if not section.trust_remote_code:
        return (
            f"{path} is {where} that neither hfpretrain nor evaluate provides; read its code, then set "
            "evaluation.trust_remote_code to true"
        )
    if script is None and path not in section.metric_revisions:
        return f"{path} may change on the Hub; pin its commit with evaluation.metric_revisions: {{{path}: COMMIT}}"
    return None


def _load(path: str, section: EvaluationSection) -> Any:
    import evaluate

    if (script := _script(path)) is not None:
        return evaluate.load(str(script))
    if (name := path.removeprefix(_SPACES)) in HOSTED:
        return evaluate.load(f"{_SPACES}{name}")
    from huggingface_hub import snapshot_download

    # `evaluate` itself would use any revision that it has loaded before, if the Hub can't be reached.
    repo_id = path if "/" in path else f"{_SPACES}{path}"
    keywords: dict[str, Any] = {"repo_type": "space", "allow_patterns": ["*.py"]}
    folder = snapshot_download(repo_id, revision=section.metric_revisions[path], **keywords)
    return evaluate.load(str(Path(folder) / f"{repo_id.partition('/')[2]}.py"))


class RecipeMetrics:
    """The metrics of `evaluation.metrics`. Every rank has this object; only the main rank loads and computes metrics.

    Raises `RecipeError` for a metric whose script the section does not trust, that can't be loaded, or that needs
    anything but predictions and references.
    """

    def __init__(self, section: EvaluationSection, is_main: bool):
        self._metrics: dict[str, Any] = {}
        self.any_requested = bool(section.metrics)
        for number, path in enumerate(section.metrics if is_main else ()):
            key = f"evaluation.metrics.{number}"
            if (message := _refusal(path, section)) is not None:
                raise RecipeError.at(key, message)
            try:
                metric = _load(path, section)
            except Exception as error:  # a metric's script may raise anything
                message = " ".join(str(error).split())
                raise RecipeError.at(key, f"{path} can't be loaded: {message:.200}") from error
            features = metric.features[0] if isinstance(metric.features, list) else metric.features
            if set(features) != {"predictions", "references"}:
                raise RecipeError.at(
                    key, f"{path} needs {', '.join(features)}, but only predictions and references are available"
                )
            self._metrics[metric.name] = metric

    def add(self, predictions: torch.Tensor, references: torch.Tensor) -> None:
        """Add tokens of all processes, int64 (n, length). Positions whose reference is -100 are ignored."""
        valid = references != IGNORE_INDEX
        for metric in self._metrics.values():
            predicted, expected = predictions[valid].cpu().numpy(), references[valid].cpu().numpy()
            self._call(metric, functools.partial(metric.add_batch, predictions=predicted, references=expected))

    def _call(self, metric: Any, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # a metric's script may raise anything
            message = f"{metric.name} failed: {type(error).__name__}: {' '.join(str(error).split()):.200}"
            raise RecipeError.at("evaluation.metrics", message) from error

    def compute(self) -> dict[str, float]:
        """Every number that the metrics compute, as `METRIC/key`."""
        found = {}
        for name, metric in self._metrics.items():
            for key, value in (self._call(metric, metric.compute) or {}).items():
                if isinstance(value, (int, float)) or getattr(value, "ndim", None) == 0:
                    found[f"{name}/{key}"] = float(value)
        return found
