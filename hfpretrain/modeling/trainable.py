"""Which parameters of a model are trained."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hfpretrain.modeling.structure import run_on_meta

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def train_padding_rows(model: PreTrainedModel) -> list[int]:
    """Train the embedding of the padding token if it is also BOS or EOS; returns the ids of the tokens changed.

    torch computes no gradient for the row `padding_idx` of an embedding. Many tokenizers pad with EOS, which ends every
    document, so the model would never learn its embedding. The loss does not depend on padding, which is only at the
    end of a block and has ignored labels.
    """
    config = model.config.get_text_config()
    found = set()
    for ids in (config.bos_token_id, config.eos_token_id):
        found.update(ids if isinstance(ids, list) else [ids])
    rows = []
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and (row := module.padding_idx) is not None and row in found:
            rows.append(row)
            module.padding_idx = None
    return rows


def freeze_outside_loss(model: PreTrainedModel, length: int) -> UntrainedParameters:
    """Freeze the parameters that the next-token loss does not depend on, and return which they are.

    Examples are DeepSeek's indexer, which only selects tokens, a vision tower, and cross-attention without an encoder.
    All engines must leave them unchanged: ZeRO would decay them, and DDP would wait for their gradients.

    They are found by a backward pass on the meta device over one sequence of `length` tokens. A parameter without a
    gradient is not frozen if the same parameter of another layer has one: it may get one from another batch.
    """
    frozen_by_class = sorted(name for name, parameter in model.named_parameters() if not parameter.requires_grad)
    with_gradient = _names_with_gradient(model, length)
    if with_gradient is None:
        return UntrainedParameters(frozen_by_class, [], is_known=False)
    trained_patterns = {name_pattern(name) for name in with_gradient}
    outside_loss, varies = [], False
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in with_gradient:
            varies = varies or name_pattern(name) in trained_patterns
            if name_pattern(name) not in trained_patterns:
                parameter.requires_grad_(False)
                outside_loss.append(name)
    return UntrainedParameters(frozen_by_class, sorted(outside_loss), is_known=not varies)


@dataclass(frozen=True)
class UntrainedParameters:
    """Names of the parameters that a run does not train."""

    frozen_by_class: list[str]
    outside_loss: list[str]
    is_known: bool
    """Whether all other parameters get a gradient from every batch."""

    def __str__(self) -> str:
        """One line for each reason; empty if all parameters are trained."""
        reasons = (
            ("because the model's class freezes them", self.frozen_by_class),
            ("because the loss does not depend on them", self.outside_loss),
        )
        lines = []
        for reason, names in reasons:
            if names:
                lines.append(f"{len(names)} parameters are not trained, {reason}: {join_patterns(names)}")
        return "\n".join(lines)


def join_patterns(names: Iterable[str]) -> str:
    """The first three patterns of many names, as text."""
    patterns = list(dict.fromkeys(map(name_pattern, names)))
    more = f", and {len(patterns) - 3} other patterns" if len(patterns) > 3 else ""
    return ", ".join(patterns[:3]) + more


def name_pattern(name: str) -> str:
    """A parameter's name with `*` in place of its numbers. It is the same in all layers."""
    return re.sub(r"\b\d+\b", "*", name)


def _names_with_gradient(model: PreTrainedModel, length: int) -> set[str] | None:
    """Names of the parameters that get a gradient of the loss; None if the model can't run on the meta device."""
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config))
    twin.train()

    def backward(outputs: Any) -> None:
        total = outputs.logits.float().sum()
        if getattr(outputs, "aux_loss", None) is not None:
            total = total + outputs.aux_loss
        total.backward()

    try:
        run_on_meta(twin, length, backward)
    except Exception:  # a model's code may raise anything; the caller then sets `is_known` to False
        return None
    return {name for name, parameter in twin.named_parameters() if parameter.grad is not None}
