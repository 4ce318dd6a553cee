"""Sequence parallelism: DeepSpeed's Ulysses attention with ZeRO-3, and a mask for packed documents."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from hfpretrain.engines import launch
from hfpretrain.engines.base import uneven_heads_problems
from hfpretrain.engines.deepspeed import ZeRO3
from hfpretrain.modeling.initialization import Weights
from hfpretrain.recipe.labels import IGNORE_INDEX
from hfpretrain.recipe.schema import Problem, RecipeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class Ulysses(ZeRO3):
    """ZeRO-3 in which each sequence is cut across processes."""

    names = ("zero3_ulysses",)

    @classmethod
    def launch_problems(cls) -> Iterator[Problem]:
        """See `Engine`."""
        yield from super().launch_problems()
        is_stage_3 = launch.uses_deepspeed() and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
        if launch.parallelism()["sp"] > 1 and not is_stage_3:
            message = "needs distributed_type DEEPSPEED with zero_stage 3; use zero3_ulysses.yaml"
            yield Problem(launch.size_key("sp"), message)

    @classmethod
    def model_problems(
        cls, config: PretrainedConfig, processes_per_sequence: int, attn_implementation: str, block_size: int
    ) -> Iterator[Problem]:
        """See `Engine`. Models whose attention DeepSpeed can't cut; heads or blocks that can't be divided evenly."""
        text_config: Any = config.get_text_config()
        key = launch.size_key("sp")
        if attn_implementation not in ("auto", "sdpa"):
            message = "sequence parallelism keeps packed documents apart only with model.attn_implementation sdpa"
            yield Problem(key, f"{message} (got {attn_implementation}); set it to sdpa")
        kinds = set(getattr(text_config, "layer_types", None) or ()) - {"full_attention"}
        if kinds or getattr(text_config, "sliding_window", None):
            dropped = ", ".join(sorted(kinds)) or "sliding_attention"
            yield Problem(key, f"DeepSpeed drops the mask of {dropped} layers; use zero3.yaml")
        if getattr(text_config, "num_key_value_heads", None) is None:
            message = f"the config of {text_config.model_type} has no num_key_value_heads, which DeepSpeed reads"
            yield Problem(key, f"{message}; use zero3.yaml")
        yield from uneven_heads_problems(key, text_config, processes_per_sequence)
        if block_size % processes_per_sequence:
            message = f"{processes_per_sequence} processes can't divide data.block_size, {block_size}, evenly"
            yield Problem(key, message)

    @property
    def processes_per_sequence(self) -> int:
        """Number of parts of a sequence."""
        return int(self.accelerator.parallelism_config.sp_size)

    @property
    def dropout_index(self) -> int:
        """Different on each process, since each has different tokens."""
        return self.process_index

    @property
    def _averaged_over(self) -> int:
        return self.num_processes

    def _place(self, model: Any, weights: Weights | None) -> None:
        super()._place(model, weights)
        self.accelerator.parallelism_config.sp_handler.sp_attn_implementation = "sdpa"
        mask_documents(model)

    def set_batch(self, micro_batch_size: int, accumulation_steps: int) -> None:
        """See `Engine`."""
        super().set_batch(micro_batch_size, accumulation_steps)
        set_attention_batch(micro_batch_size)

    def split_sequences(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `split`."""
        return split(batch, self.process_index % self.processes_per_sequence, self.processes_per_sequence)

    def total_loss(self, value: torch.Tensor) -> torch.Tensor:
        """A loss or a count summed over all processes."""
        return self.accelerator.reduce(value, "sum")

    @property
    def loss_parts(self) -> int:
        """Every process: each has tokens of its own."""
        return self.num_processes


def mask_documents(model: PreTrainedModel) -> None:
    """Make transformers' sdpa attention compute its mask from the positions of the tokens.

    DeepSpeed 0.19 wraps the attention: it gathers the positions of a sequence but drops the mask, so packed documents
    would see each other. Raises `RecipeError` if the model does not use sdpa. A forward pass raises `RecipeError` if
    the model does not pass positions to its attention.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if model.config._attn_implementation != "sdpa":
        message = f"packed documents are kept apart by sdpa attention, which {type(model).__name__} does not use"
        message = f"{message}; use zero3.yaml"
        raise RecipeError.at("parallelism_config.parallelism_config_sp_size", message)
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def masked(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *, position_ids: Any = None, **kwargs: Any
    ) -> Any:
        if position_ids is None:
            raise RecipeError.at(
                "parallelism_config.parallelism_config_sp_size",
                f"{type(model).__name__} does not pass positions to its attention; use another accelerate file, such "
                "as zero3.yaml",
            )
        return sdpa(module, query, key, value, document_mask(position_ids), **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = masked


def set_attention_batch(micro_batch_size: int) -> None:
    """Make DeepSpeed's attention accept another number of sequences in a micro-batch.

    DeepSpeed 0.19 compares each batch with the size that it was registered with. Its attention is a variable of the
    function that it registers with transformers.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attention = inspect.getclosurevars(ALL_ATTENTION_FUNCTIONS["sdpa"]).nonlocals["uattn"]
    attention.batch_size = micro_batch_size
    for name in ("required_query_shape", "required_key_value_shape", "required_context_shape"):
        length, _, *rest = getattr(attention, name)
        setattr(attention, name, torch.Size([length, micro_batch_size, *rest]))


def document_mask(position_ids: torch.Tensor) -> torch.Tensor:
    """The mask in which a token sees the tokens of its document up to itself: bool (batch, 1, length, length).

    `position_ids`: int64 (batch, length), 0 at the first token of each document.
    """
    document = (position_ids == 0).cumsum(1)
    same = document[:, None, :, None] == document[:, None, None, :]
    return same & torch.ones_like(same[0, 0]).tril()


def split(batch: dict[str, torch.Tensor], index: int, size: int) -> dict[str, torch.Tensor]:
    """Part `index` of the `size` parts of a batch that `data.batches.collate` returned.

    Adds `shift_labels`, since the label of a part's last token is the first token of the next part.
    """
    labels, length = batch["labels"], batch["labels"].shape[1]
    positions = torch.arange(length, device=labels.device).expand_as(labels)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    whole = {"position_ids": positions, **batch, "shift_labels": shifted}
    part = length // size
    return {name: tensor[:, index * part : (index + 1) * part].contiguous() for name, tensor in whole.items()}
