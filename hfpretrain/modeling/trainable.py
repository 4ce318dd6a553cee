"""Which parameters of a model are trained."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hfpretrain.modeling.structure import run_on_meta

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def train_padding_rows(model: PreTrainedModel) -> list[int]:
    """Train the embedding of the padding token if it is also BOS or EOS; returns the ids of such tokens.

    torch gives no gradient to the row `padding_idx` of an embedding. Many tokenizers pad with EOS, which ends every
    document, and the model would never learn its embedding. Packed blocks contain no padding.
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


def freeze_outside_loss(model: PreTrainedModel, length: int) -> Untrained:
    """Freeze the parameters that the next-token loss does not depend on, and return which they are.

    Examples are DeepSeek's indexer, which only selects tokens, a vision tower, and cross-attention without an encoder.
    All engines must leave them unchanged: ZeRO would decay them, and DDP would wait for their gradients.

    They are found by a backward pass on the meta device over one sequence of `length` tokens. A parameter without a
    gradient is still trained if the same parameter of another layer has one: another batch may reach it.
    """
    own = sorted(name for name, parameter in model.named_parameters() if not parameter.requires_grad)
    with_gradient = _names_with_gradient(model, length)
    if with_gradient is None:
        return Untrained(own, [], is_known=False)
    trained_kinds = {kind_of(name) for name in with_gradient}
    outside, varies = [], False
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in with_gradient:
            varies = varies or kind_of(name) in trained_kinds
            if kind_of(name) not in trained_kinds:
                parameter.requires_grad_(False)
                outside.append(name)
    return Untrained(own, sorted(outside), is_known=not varies)


@dataclass(frozen=True)
class Untrained:
    """Names of the parameters that a run does not train."""

    frozen_by_class: list[str]
    outside_loss: list[str]
    is_known: bool
    """Whether all other parameters get a gradient from every batch."""

    def __str__(self) -> str:
        """One line for each reason; empty if all parameters are trained."""
        reasons = (("frozen by the model's class", self.frozen_by_class), ("outside of the loss", self.outside_loss))
        lines = []
        for reason, names in reasons:
            if names:
                kinds = list(dict.fromkeys(map(kind_of, names)))
                more = f" and {len(kinds) - 3} other kinds" if len(kinds) > 3 else ""
                lines.append(f"not trained, {reason}: {len(names)} parameters ({', '.join(kinds[:3])}{more})")
        return "\n".join(lines)


def kind_of(name: str) -> str:
    """A parameter's name with `*` for its numbers, which is the same in all layers."""
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
    except Exception:  # a model's code may raise anything; the caller says that nothing is known
        return None
    return {name for name, parameter in twin.named_parameters() if parameter.grad is not None}
