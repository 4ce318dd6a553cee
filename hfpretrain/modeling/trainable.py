"""Which parameters of a model are trained."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def train_padding_rows(model: PreTrainedModel) -> list[int]:
    """Let the embeddings of padding tokens that occur in the text be trained; returns the ids of these tokens.

    torch makes no gradient for the row of `padding_idx`. Where a tokenizer's padding is its EOS, which ends every
    document, the model would never learn that embedding. Nothing is padded here.
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
    """Freeze the parameters that no gradient of the next token's loss reaches, and tell which they are.

    In some classes the loss of text does not depend on all parameters: examples are an indexer that only chooses, the
    tower of another modality, and attention to an encoder that is not there. Every engine must leave these parameters
    unchanged: ZeRO would decay them, and DDP would wait for their gradients.

    Found on the meta device by a backward pass of one sequence of `length` tokens. A parameter that gets no gradient
    while another of its kind does (the same name with other numbers) may get one from another batch and is trained.
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
    """Names of the parameters that a run does not train: those that the class itself freezes, and those outside of the
    loss; `is_known`: whether all others get a gradient from every batch."""

    frozen_by_class: list[str]
    outside_loss: list[str]
    is_known: bool

    def __str__(self) -> str:
        """A line for each reason, none where everything is trained."""
        reasons = (("frozen by the model's class", self.frozen_by_class), ("outside of the loss", self.outside_loss))
        lines = []
        for reason, names in reasons:
            if names:
                kinds = list(dict.fromkeys(map(kind_of, names)))
                more = f" and {len(kinds) - 3} other kinds" if len(kinds) > 3 else ""
                lines.append(f"not trained, {reason}: {len(names)} parameters ({', '.join(kinds[:3])}{more})")
        return "\n".join(lines)


def kind_of(name: str) -> str:
    """A parameter's name with `*` for its numbers, so that those of all layers are one kind."""
    return re.sub(r"\b\d+\b", "*", name)


def _names_with_gradient(model: PreTrainedModel, length: int) -> set[str] | None:
    """Names of the parameters that the loss has a gradient for; None where the class has no pass on the meta device."""
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config))
    twin.train()
    input_ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
    # Where masks are made in common, one of four dimensions is taken as it is, and no value is looked at; older
    # models know no such mask.
    for mask in (torch.zeros(1, 1, length, length, device="meta"), None):
        try:
            twin.set_attn_implementation("eager")  # the only one that runs on every device
            twin.set_experts_implementation("batched_mm")  # the only one that asks no tensor for its values
            outputs = twin(input_ids=input_ids, attention_mask=mask, use_cache=False)
            objective = outputs.logits.float().sum()
            if getattr(outputs, "aux_loss", None) is not None:
                objective = objective + outputs.aux_loss
            objective.backward()
        except Exception:  # each class fails in its own way; the caller is told that nothing is known
            continue
        return {name for name, parameter in twin.named_parameters() if parameter.grad is not None}
    return None
