"""The model family of a recipe: the same architecture and proportions at other sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hfpretrain.modeling.config import load_config
from hfpretrain.modeling.structure import Parameters
from hfpretrain.planning.plan import count_parameters_of, model_config
from hfpretrain.recipe.schema import Recipe, RecipeError

# What config classes call the number of key and value heads, and the sizes that are proportional to the width.
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_WIDTHS = re.compile(r"(intermediate_size|ffn_hidden_size|ffn_dim|n_inner|word_embed_proj_dim|[qk]v?_lora_rank)$")
# The nearest member may differ from the size asked for by at most this factor.
_FARTHEST = 1.5


@dataclass(frozen=True)
class Member:
    """A model of the family: keywords of `model.config`, and its parameters."""

    config: dict[str, Any]
    parameters: Parameters


class Family:
    """The models that result from a recipe's `model.config` with other numbers of attention heads.

    Width and layers grow in proportion to the heads, so width / layers and the size of a head stay the same. The ratios
    of key and value heads to heads, and of the feed-forward and low-rank widths to the width, stay as close as whole
    numbers allow. `initializer_range` scales with 1 / sqrt(width), so the variance scales with 1 / fan-in (Yang et al.
    2022, "Tensor Programs V", table 3). With the value of a wide model, the loss of a narrow one would stay on a
    plateau for most of a short run. Everything else stays as in the recipe: vocabulary, context, number of experts and
    how many are active per token. Keys are found through the config class's `attribute_map`, so any model type with
    heads, layers and a width works.

    Raises `RecipeError` for a model type without heads, layers and a width, for keys that hold a value for each layer,
    and where the vocabulary is not known because the data are not prepared.
    """

    def __init__(self, recipe: Recipe):
        assert recipe.model.config is not None
        self._section, self._given = recipe.model, recipe.model.config
        self._target_config = model_config(recipe)
        self._names = getattr(type(self._target_config), "attribute_map", {})
        shape = [self._value(key) for key in ("num_attention_heads", "num_hidden_layers", "hidden_size")]
        if None in shape:
            raise RecipeError.at(
                "model.config.model_type",
                f"{self._given['model_type']} lacks heads, layers or a width, which a ladder scales; choose another "
                "model type",
            )
        self._heads, self._layers, self._width = (int(value or 0) for value in shape)
        by_layer = [key for key, value in self._given.items() if isinstance(value, list) and len(value) == self._layers]
        if by_layer:
            raise RecipeError.at(
                f"model.config.{by_layer[0]}",
                "has a value for each layer, but the ladder's models have other numbers of layers; remove the key",
            )
        self._members: list[Member] = []
        self._more_members = self._generate()
        self.target = Member(self._given, count_parameters_of(self._target_config))
        """The recipe's own model."""

    def _value(self, key: str) -> int | None:
        value = getattr(self._target_config, self._names.get(key, key), None)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

    def shape(self, config: dict[str, Any]) -> tuple[int, int]:
        """Layers and width of a member."""
        layers, width = (config[self._names.get(key, key)] for key in ("num_hidden_layers", "hidden_size"))
        return layers, width

    def nearest(self, size: int) -> Member:
        """The member whose total parameters are nearest to `size`, by their ratio.

        Raises `RecipeError` if that ratio is over 1.5.
        """
        # Members are generated in order of size, so after one of twice the size asked for, none is nearer.
        while not self._members or self._members[-1].parameters.total < 2 * size:
            self._members.append(next(self._more_members))
        near = sorted(self._members, key=lambda member: abs(math.log(member.parameters.total / size)))
        if abs(math.log(near[0].parameters.total / size)) > math.log(_FARTHEST):
            possible = ", ".join(f"{count:,}" for count in sorted({m.parameters.total for m in near[:4]}))
            raise RecipeError.at(
                "--sizes",
                f"{size:,} parameters: the nearest models of this family have {possible}; choose one of those, or "
                "give the recipe smaller heads or a smaller vocabulary",
            )
        return near[0]

    def _generate(self) -> Iterator[Member]:
        """All members, sorted by number of heads and then of layers."""
        heads = 0
        while True:
            heads += 1
            if self._width * heads % self._heads:
                continue
            layers = self._layers * heads / self._heads
            for number in sorted({max(1, math.floor(layers)), math.ceil(layers)}):
                keywords = self._config(heads, number)
                section = self._section.model_copy(update={"config": keywords})
                yield Member(
                    keywords, count_parameters_of(load_config(section, vocab_size=self._target_config.vocab_size))
                )

    def _config(self, heads: int, layers: int) -> dict[str, Any]:
        scaled: dict[str, Any] = {
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "hidden_size": self._width * heads // self._heads,
        }
        for key in self._target_config.to_dict():
            value = self._value(key)
            if value is None:
                continue
            if key in _KV_HEADS:
                wanted = value * heads / self._heads
                divisors = (number for number in range(heads, 0, -1) if heads % number == 0)
                scaled[key] = min(divisors, key=lambda number: abs(math.log(number / wanted)))
            elif _WIDTHS.search(key):
                # If the result is not a whole number, take a multiple of 8, with which matrix kernels are fast.
                quotient, rest = divmod(value * heads, self._heads)
                scaled[key] = max(1, round((quotient + rest / self._heads) / 8)) * 8 if rest else quotient
        deviation = getattr(self._target_config, self._names.get("initializer_range", "initializer_range"), None)
        if isinstance(deviation, float):
            scaled["initializer_range"] = float(f"{deviation * math.sqrt(self._heads / heads):.4g}")
        scaled = {self._names.get(key, key): value for key, value in scaled.items()}
        aliases = {alias for alias, key in self._names.items() if key in scaled}
        return {key: value for key, value in self._given.items() if key not in aliases} | scaled
