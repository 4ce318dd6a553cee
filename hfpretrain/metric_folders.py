"""`evaluate` metrics that a recipe names: fed on the main process alone, which is what of the library is safe."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from hfpretrain.loss import IGNORE_INDEX
from hfpretrain.recipe import RecipeError


class MetricFolders:
    """The metrics of `evaluation.metrics`. All ranks have them; only the main one loads and feeds them.

    Raises `RecipeError` for one that does not load, or takes anything but predictions and references.
    """

    def __init__(self, paths: tuple[str, ...], is_main: bool):
        self._metrics: dict[str, Any] = {}
        self.wanted = bool(paths)
        for number, path in enumerate(paths if is_main else ()):
            import evaluate

            key = f"evaluation.metrics.{number}"
            try:
                metric = evaluate.load(path)
            except Exception as error:  # a metric is a script
                message = " ".join(str(error).split())
                raise RecipeError.at(key, f"{path} does not load: {message:.200}") from error
            features = metric.features[0] if isinstance(metric.features, list) else metric.features
            if set(features) != {"predictions", "references"}:
                raise RecipeError.at(key, f"{path} takes {', '.join(features)}; predictions and references are given")
            self._metrics[metric.name] = metric

    def add(self, predictions: torch.Tensor, references: torch.Tensor) -> None:
        """Tokens of all processes, int64 (n, length); places whose reference is -100 are left out."""
        valid = references != IGNORE_INDEX
        for metric in self._metrics.values():
            predicted, wanted = predictions[valid].cpu().numpy(), references[valid].cpu().numpy()
            self._called(metric, functools.partial(metric.add_batch, predictions=predicted, references=wanted))

    def _called(self, metric: Any, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # a metric is a script
            message = f"{metric.name} fails: {type(error).__name__}: {' '.join(str(error).split()):.200}"
            raise RecipeError.at("evaluation.metrics", message) from error

    def compute(self) -> dict[str, float]:
        """`METRIC/key` of every number they give."""
        found = {}
        for name, metric in self._metrics.items():
            for key, value in (self._called(metric, metric.compute) or {}).items():
                if isinstance(value, (int, float)) or getattr(value, "ndim", None) == 0:
                    found[f"{name}/{key}"] = float(value)
        return found
