"""The keys that a model's config class knows, and the message for one that it does not know."""

from __future__ import annotations

import contextlib
import difflib
import re
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from hfpretrain.recipe.keys import unknown_key_message

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def known_config_keys(config_class: type[PretrainedConfig]) -> set[str]:
    """Keys that a config class accepts: its fields, those of `PretrainedConfig`, and the aliases in `attribute_map`."""
    from huggingface_hub.errors import StrictDataclassError

    keys: set[str] = set()
    with contextlib.suppress(StrictDataclassError):  # some classes raise it for their own defaults
        keys = {key for key in config_class().to_dict() if not key.startswith("_")}
    for base in config_class.__mro__:
        keys.update(key for key in getattr(base, "__annotations__", {}) if not key.startswith("_"))
    keys |= set(config_class.attribute_map)
    if "rope_parameters" in keys:
        keys.add("rope_theta")  # transformers moves it into `rope_parameters`
    return keys


# Each row has the names of one setting in different models: GPT-2, OPT, T5, MPT and Meta's own Llama. No
# `attribute_map` has them.
_SYNONYMS = (
    ("hidden_size", "dim"),
    ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim"),
    ("num_key_value_heads", "n_kv_heads"),
    ("max_position_embeddings", "n_ctx"),
    ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps"),
    ("hidden_act", "activation_function", "hidden_activation"),
    ("attention_dropout", "attn_pdrop"),
)


def unknown_config_key_message(key: str, config_class: type[PretrainedConfig], known: set[str]) -> str:
    """The message for an unknown key. If other classes have it, the message gives the name in this class."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    meant = Counter(name for names in _SYNONYMS if key in names for name in names)
    for other in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        meant.update(name for name, alias in CONFIG_MAPPING[other].attribute_map.items() if alias == key)
    own = config_class.attribute_map
    found = next((own.get(name, name) for name, _ in meant.most_common() if name in known), None)
    if found is not None:
        return f"unknown key; in {config_class.model_type} it is `{found}`"
    # Suggest keys of this class only, not those that every config has.
    sizes = [name for name in getattr(config_class, "__annotations__", {}) if name in known]
    return (
        unknown_key_message(key, known)
        if difflib.get_close_matches(key, known, 1, 0.5)
        else unknown_key_message(key, sizes)
    )


def is_read_by_model(config_class: type[PretrainedConfig], key: str) -> bool:
    """Whether the model's code reads a key that its config class does not declare, as some read `head_dim`."""
    path = Path(sys.modules[config_class.__module__].__file__ or "")
    code = path.with_name(path.name.replace("configuration_", "modeling_"))
    return code.is_file() and re.search(rf'config(\.|, "){re.escape(key)}\b', code.read_text("utf-8")) is not None
