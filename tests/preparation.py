"""Helpers for tests of prepared data."""

from pathlib import Path

import numpy as np
import torch
from small import recipe_mapping

from hfpretrain import files
from hfpretrain.data.prepared import PreparedData
from hfpretrain.data.streaming import StreamingData
from hfpretrain.recipe.schema import Recipe


def recipe(folder: Path, **changes: object) -> Recipe:
    """The recipe of `recipe_mapping`, validated."""
    return Recipe.model_validate(recipe_mapping(folder, **changes))


def token_stream(prepared: PreparedData, split: str) -> list[int]:
    """All tokens of a split in their order, including the remainder that fills no block."""
    rows = [block.reshape(-1) for block in prepared.blocks(split)]
    remainder = prepared.manifest["splits"][split]["remainder_ids"]
    return np.concatenate([*rows, np.array(remainder)]).astype(int).tolist()


def checksums(path: Path) -> dict[str, str]:
    """The checksum of each file in the manifest of a prepared folder."""
    return {name: entry["sha256"] for name, entry in files.manifest_of(path)["files"].items()}


def stream(data, encode, num_processes=1, process_index=0, first_step=0, states=None, **keywords):
    """`StreamingData` with eight sequences a step. `keywords`: its other arguments."""
    return StreamingData(
        data,
        encode,
        keywords.pop("held_out", frozenset()),
        first_step=first_step,
        states=states or {},
        micro_batch_size=2,
        accumulation_steps=8 // num_processes,
        process_index=process_index,
        num_processes=num_processes,
        eos_token_id=encode.eos_token_id,
        document_masking=False,
        **keywords,
    )


def tokens(step_data):
    """A step's ids on this process: int64 (sequences, block_size)."""
    return torch.cat([batch["input_ids"] for batch in step_data.batches])
