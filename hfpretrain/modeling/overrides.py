"""Changes the config of a checkpoint as `model.config_overrides` asks, and says what changed."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hfpretrain.modeling.config_keys import is_read_by_model, known_config_keys, unknown_config_key_message
from hfpretrain.recipe.keys import unknown_key_message
from hfpretrain.recipe.schema import Problem, RecipeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

KEY = "model.config_overrides"
_ROPE = "rope_parameters"
_NO_EFFECT = "has no effect on the training of a causal language model; leave it out"
_OF_TOKENIZER = "is that of the tokenizer; set tokenizer.pretrained"
_OF_CHECKPOINT = "is that of the checkpoint, so it can't change; use another model.pretrained"
_OF_ATTENTION = "is set by model.attn_implementation"
_OF_DTYPE = "is set by model.dtype for the export, and by training.mixed_precision for training"
_RESERVED = {
    "vocab_size": "follows from the checkpoint and the tokenizer; to add tokens, use tokenizer.extend",
    "bos_token_id": _OF_TOKENIZER,
    "eos_token_id": _OF_TOKENIZER,
    "pad_token_id": _OF_TOKENIZER,
    "dtype": _OF_DTYPE,
    "torch_dtype": _OF_DTYPE,
    "attn_implementation": _OF_ATTENTION,
    "_attn_implementation": _OF_ATTENTION,
    "model_type": _OF_CHECKPOINT,
    "architectures": _OF_CHECKPOINT,
    "auto_map": _OF_CHECKPOINT,
    "is_encoder_decoder": _OF_CHECKPOINT,
    "tie_word_embeddings": "says whether the checkpoint has a tensor for the output layer, so it can't change",
    "text_config": "is not a key here: the overrides change the config of the text model, so give its keys directly",
    "rope_scaling": "has another name in transformers 5: use rope_parameters",
    "use_cache": "is always true in the export, and training uses no cache; leave it out",
    **dict.fromkeys(
        ("output_hidden_states", "output_attentions", "return_dict", "chunk_size_feed_forward", "id2label", "label2id",
         "num_labels", "problem_type", "transformers_version"),
        _NO_EFFECT,
    ),
}  # fmt: skip
# What the weights were trained with. It does not depend on the kind of RoPE.
_KEPT_ROPE = ("rope_theta", "partial_rotary_factor")
_ORIGINAL = "original_max_position_embeddings"
_WITH_ORIGINAL_CONTEXT = ("llama3", "yarn", "longrope")


def reserved_problems(overrides: Mapping[str, Any], path: str = KEY) -> Iterator[Problem]:
    """A problem for each key that something else in the recipe sets, with the key to use."""
    for key in overrides:
        if key in _RESERVED:
            yield Problem(f"{path}.{key}", _RESERVED[key])


def override_config(config: PretrainedConfig, overrides: Mapping[str, Any], path: str = KEY) -> PretrainedConfig:
    """A copy of a model's config with `overrides`.

    `rope_parameters` are merged into those of `config`, because a change of one of them should keep the others. If
    `rope_type` changes, only `rope_theta`, `partial_rotary_factor` and the context before the change are kept. Other
    values are replaced. What the class derives from a key, such as `layer_types`, is derived again if `config` has the
    derived value.

    Raises `RecipeError` at `path` for a key that the class does not know or that another key of the recipe sets, for a
    value that the class refuses, and for one that it changes or ignores.
    """
    if not overrides:
        return config
    problems = list(reserved_problems(overrides, path))
    own, config_class, before = dict[str, Any](), type(config), config.to_dict()
    # Also the keys that the class does not declare and this checkpoint has, if the model's code reads them.
    known = known_config_keys(config_class)
    known |= {key for key in before.keys() - known if is_read_by_model(config_class, key)}
    known -= _RESERVED.keys()
    for key, value in overrides.items():
        name = config_class.attribute_map.get(key, key)
        if key in _RESERVED:
            continue
        if key not in known:
            problems.append(Problem(f"{path}.{key}", unknown_config_key_message(key, config_class, known)))
        elif name in own:
            problems.append(Problem(f"{path}.{key}", f"is given twice: {config_class.model_type} calls it `{name}`"))
        else:
            own[name] = copy.deepcopy(value)  # the class may change it
    if getattr(config, _ROPE, None) is not None:
        own, rope_problems = _with_merged_rope(config, own, path)
        problems += rope_problems
    problems += _range_problems(own, path)
    if problems:
        raise RecipeError(problems)
    keywords = {**before, **own}
    if before.get("layer_types") and "layer_types" not in own and _derived_layer_types(config) == before["layer_types"]:
        del keywords["layer_types"]
    _, warnings_before = _build(config_class, before)
    where = f"{path}.{next(iter(overrides))}" if len(overrides) == 1 else path
    try:
        changed, warnings = _build(config_class, keywords)
    except Exception as error:  # a config class may raise anything
        message = " ".join(str(error.args[0] if error.args else error).split()).partition(" Errors:")[0]
        raise RecipeError.at(where, f"{config_class.__name__} refuses it: {message or type(error).__name__}") from error
    problems = [Problem(where, f"transformers warns: {text}") for text in warnings if text not in warnings_before]
    problems += _ignored_overrides(changed, own, path)
    if _ROPE in own:
        problems += _factor_problems(changed, f"{path}.{_ROPE}")
    if problems:
        raise RecipeError(problems)
    return changed


def _range_problems(overrides: dict[str, Any], path: str) -> Iterator[Problem]:
    """A problem for each number that config classes accept, but no model can compute with."""
    for key, value in overrides.items():
        if not isinstance(value, (int, float)):
            continue
        if ("dropout" in key or "pdrop" in key) and not 0 <= value < 1:
            yield Problem(f"{path}.{key}", f"must be at least 0 and less than 1 (got {value})")
        if key in ("max_position_embeddings", "n_positions", "max_seq_len", "sliding_window") and value < 1:
            yield Problem(f"{path}.{key}", f"must be at least 1 (got {value})")


def config_changes(before: PretrainedConfig, after: PretrainedConfig) -> list[str]:
    """What differs between two configs: a string such as `rope_parameters.rope_theta 10000 -> 500000` for each key."""
    old, new = (dict(_flatten(config.to_dict())) for config in (before, after))
    return [
        f"{key} {_short(old.get(key))} -> {_short(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _with_merged_rope(
    config: PretrainedConfig, overrides: dict[str, Any], path: str
) -> tuple[dict[str, Any], list[Problem]]:
    """The overrides with whole `rope_parameters`, those of `config` included, and the problems found."""
    given, theta = overrides.get(_ROPE), overrides.get("rope_theta")
    if given is None and theta is None:
        return overrides, []
    rest = {key: value for key, value in overrides.items() if key not in (_ROPE, "rope_theta")}
    at, old = f"{path}.{_ROPE}", copy.deepcopy(dict[str, Any](config.rope_parameters))
    if not isinstance(given, dict | None):
        return overrides, [Problem(at, f"must be a mapping, for example {{rope_theta: 500000}} (got {given!r:.100})")]
    nested = [key for key in old if isinstance(old[key], dict) or key in config.nested_rope_parameter_keys(old)]
    if theta is not None:
        if nested:
            keys = " or ".join(f"{at}.{layer_type}.rope_theta" for layer_type in nested)
            message = f"{config.model_type} has one for each kind of layer; set {keys}"
            return overrides, [Problem(f"{path}.rope_theta", message)]
        if "rope_theta" in (given or {}):
            return overrides, [Problem(f"{path}.rope_theta", f"is also in {at}; give one of the two")]
        given = {**(given or {}), "rope_theta": theta}
    assert given is not None
    if not nested:
        merged, problems = _merge_rope(config, old, given, at)
        return {**rest, _ROPE: merged}, problems
    merged, problems = dict(old), []
    for layer_type, parameters in given.items():
        if layer_type not in nested:
            message = f"{config.model_type} has these parameters for each kind of layer: give {' or '.join(nested)}"
            problems.append(Problem(f"{at}.{layer_type}", message))
        elif not isinstance(parameters, dict):
            problems.append(Problem(f"{at}.{layer_type}", f"must be a mapping (got {parameters!r:.100})"))
        else:
            merged[layer_type], found = _merge_rope(config, old[layer_type] or {}, parameters, f"{at}.{layer_type}")
            problems += found
    return {**rest, _ROPE: merged}, problems


def _merge_rope(
    config: PretrainedConfig, old: dict[str, Any], given: dict[str, Any], path: str
) -> tuple[dict[str, Any], list[Problem]]:
    """The RoPE parameters `old` of some layers with the values `given`, and the problems of their keys."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

    special = set(config.ignore_keys_at_rope_validation or ())
    known = {*RopeParameters.__annotations__, *old, *special}
    kinds = {"default", config.default_rope_type, *ROPE_INIT_FUNCTIONS}
    problems = [Problem(f"{path}.{key}", unknown_key_message(key, known)) for key in given if key not in known]
    old_kind = old.get("rope_type", "default")
    kind = given.get("rope_type", old_kind)
    if kind not in kinds:
        problems.append(Problem(f"{path}.rope_type", f"must be one of {', '.join(sorted(kinds))} (got {kind!r})"))
    theta = given.get("rope_theta", 1.0)
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or theta <= 0:
        problems.append(Problem(f"{path}.rope_theta", f"must be a number above 0 (got {theta!r})"))
    kept = old if kind == old_kind else {key: old[key] for key in old if key in _KEPT_ROPE or key in special}
    merged = {**kept, **given}
    if kind in _WITH_ORIGINAL_CONTEXT:
        # Without it, transformers takes `max_position_embeddings`, which may be the length after the change.
        merged.setdefault(_ORIGINAL, old.get(_ORIGINAL) or getattr(config, "max_position_embeddings", None))
    return merged, problems


def _factor_problems(config: PretrainedConfig, path: str) -> Iterator[Problem]:
    """A problem if YaRN's factor is not that between the original and the new context length."""
    parameters: dict[str, Any] = dict(config.rope_parameters)
    positions: int = config.max_position_embeddings
    for one in [value for value in parameters.values() if isinstance(value, dict)] or [parameters]:
        if one.get("rope_type") != "yarn":
            continue
        original, factor = one[_ORIGINAL], one["factor"]
        if positions not in (original, original * factor):
            message = f"{factor} times {_ORIGINAL} {original} is not max_position_embeddings {positions}"
            yield Problem(f"{path}.factor", f"{message}; correct one of the three")


def _derived_layer_types(config: PretrainedConfig) -> list[str] | None:
    """The `layer_types` that the class derives from the other keys of a config; None if they are required."""
    keywords = config.to_dict()
    del keywords["layer_types"]
    try:
        return list(type(config)(**keywords).layer_types)
    except Exception:  # a config class may raise anything
        return None


class _Messages(logging.Handler):
    """Collects the messages of a logger."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.funcName != "warning_once":  # advice, which is repeated neither here nor by transformers
            self.texts.append(record.getMessage())


def _build(config_class: type[PretrainedConfig], keywords: dict[str, Any]) -> tuple[PretrainedConfig, list[str]]:
    """A config of `keywords`, and what transformers warns of in its RoPE parameters."""
    handler, logger = _Messages(), logging.getLogger("transformers.modeling_rope_utils")
    before = logger.propagate, logger.level
    logger.propagate, logger.level = False, logging.WARNING  # the warnings become an error
    logger.addHandler(handler)
    try:
        return config_class(**keywords), handler.texts
    finally:
        logger.removeHandler(handler)
        logger.propagate, logger.level = before


def _ignored_overrides(config: PretrainedConfig, overrides: dict[str, Any], path: str) -> Iterator[Problem]:
    """A problem for each value that the class changes, and for a window that no layer uses."""
    changed = [key for key, value in overrides.items() if not isinstance(value, dict) and getattr(config, key) != value]
    for key in changed:
        message = f"{type(config).__name__} changes it to {getattr(config, key)!r} (got {overrides[key]!r})"
        if key == "sliding_window" and getattr(config, "use_sliding_window", None) is False:
            message += "; also set use_sliding_window: true"
        yield Problem(f"{path}.{key}", message)
    if changed:
        return
    layer_types = getattr(config, "layer_types", None)
    windows = [key for key in ("sliding_window", "use_sliding_window") if overrides.get(key)]
    if windows and layer_types and not any("sliding" in one or "chunked" in one for one in layer_types):
        names = " or ".join(key for key in ("layer_types", "max_window_layers") if hasattr(config, key))
        yield Problem(f"{path}.{windows[0]}", f"has no effect: no layer has sliding attention; also set {names}")


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs (dotted path, value) of nested mappings. Lists are values."""
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 4 and all(isinstance(one, str) for one in value):
        return " + ".join(f"{number} {name}" for name, number in Counter(value).items())
    return "not set" if value is None else f"{value}" if not isinstance(value, list) else f"{value!r:.80}"
