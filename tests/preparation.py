"""Helpers for tests of prepared data."""

from pathlib import Path

import numpy as np
from small import recipe_mapping

from hfpretrain import files
from hfpretrain.data.prepared import PreparedData
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
