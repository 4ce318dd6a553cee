"""Makes a transformers config from the recipe's `model` section, and checks it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hfpretrain.modeling.config_keys import is_read_by_model, known_config_keys, unknown_config_key_message
from hfpretrain.modeling.overrides import config_changes, override_config, reserved_problems
from hfpretrain.recipe.addresses import load_error_message, missing_path_problem
from hfpretrain.recipe.keys import unknown_key_message
from hfpretrain.recipe.schema import ModelSection, Problem, RecipeError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""Names that config classes have for the longest context, as a field or through `attribute_map`."""


def config_problems(mapping: dict[str, Any]) -> Iterator[Problem]:
    """Problems of `model.config` in a recipe's raw mapping: unknown keys, wrong values, a context that is too short.

    Of `model.config_overrides`, only the keys that another key of the recipe sets: the others depend on the checkpoint.

    Imports transformers but not torch.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    section = mapping.get("model")
    overrides = section.get("config_overrides") if isinstance(section, dict) else None
    if isinstance(overrides, dict):
        yield from reserved_problems(overrides)
    keywords = section.get("config") if isinstance(section, dict) else None
    if not isinstance(keywords, dict) or "model_type" not in keywords:
        return
    model_type = str(keywords["model_type"])
    if model_type not in CONFIG_MAPPING or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        message = unknown_key_message(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES).replace(
            "unknown key", "not the type of a causal language model"
        )
        yield Problem("model.config.model_type", f"{message} (got {model_type!r})")
        return
    config_class = CONFIG_MAPPING[model_type]
    known = known_config_keys(config_class)
    unknown = [k for k in keywords if k != "model_type" and k not in known and not is_read_by_model(config_class, k)]
    for key in unknown:
        yield Problem(f"model.config.{key}", unknown_config_key_message(key, config_class, known))
    try:
        given = {key: value for key, value in keywords.items() if key not in unknown}
        config = AutoConfig.for_model(**{**_special_ids(model_type), **given})
    except Exception as error:  # a config class may raise anything
        yield Problem("model.config", " ".join(str(error).split()) or type(error).__name__)
        return
    if (reason := _export_problem(config)) is not None:
        yield Problem("model.config.model_type", f"{reason}; use another model (got {model_type!r})")
        return
    data = mapping.get("data")
    if isinstance(data, dict):
        stages: Any = data.get("stages")
        numbered = enumerate(stages if isinstance(stages, list) else [])
        sections = {"data": data, **{f"data.stages.{number}": stage for number, stage in numbered}}
        for key, block_size in ((key, one.get("block_size")) for key, one in sections.items() if isinstance(one, dict)):
            yield from context_problems(config, block_size, key=f"{key}.block_size")
    tokenizer = mapping.get("tokenizer")
    wanted = tokenizer.get("vocab_size") if isinstance(tokenizer, dict) else None
    if isinstance(wanted, int) and isinstance(keywords.get("vocab_size"), int) and keywords["vocab_size"] < wanted:
        yield vocabulary_problem(keywords["vocab_size"], wanted)


def _export_problem(config: PretrainedConfig) -> str | None:
    """Why `AutoModelForCausalLM` could not load the export of a run with this config; None if it can.

    If a config has parts for images or sound, some classes build only the text model. The export then has the config of
    the text model, and `AutoModelForCausalLM` may have no class for it.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return f"transformers has no causal language model of type {config.model_type}"
    text_class: Any = config.sub_configs.get("text_config")
    if text_class is None or text_class in MODEL_FOR_CAUSAL_LM_MAPPING or find_spec("torch") is None:
        return None
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if getattr(model_class, "config_class", None) is not text_class:
        return None
    part = config.get_text_config().model_type
    message = f"{model_class.__name__} would be exported with the config of its text model"
    return f"{message}, and AutoModelForCausalLM can't load a model of type {part}"


def context_problems(
    config: PretrainedConfig, block_size: Any, config_key: str = "model.config", key: str = "data.block_size"
) -> Iterator[Problem]:
    """A problem if blocks are longer than the model's longest context.

    `config_key`: `ModelSection.config_key`. `key`: the recipe's path of `block_size`.
    """
    for name in CONTEXT_KEYS:
        positions = getattr(config, name, None)
        if isinstance(positions, int) and isinstance(block_size, int) and 0 < positions < block_size:
            message = f"must be at most the model's {name}, {positions} (got {block_size})"
            yield Problem(key, f"{message}; lower it, or raise {config_key}.{name}")
            return


def context_note(section: ModelSection, config: PretrainedConfig, block_size: int) -> str | None:
    """A note if a new model has the default context length of its class, and blocks are shorter; else None."""
    key = next((key for key in CONTEXT_KEYS if isinstance(getattr(config, key, None), int)), None)
    if section.config is None or key is None or set(CONTEXT_KEYS) & set(section.config):
        return None
    positions = getattr(config, key)
    if positions <= block_size:
        return None
    return (
        f"the model's {key} is {positions:,}, the default of {config.model_type}, but blocks have "
        f"{block_size:,} tokens, so later positions are not trained. Set model.config.{key} to change it"
    )


def dtype_note(section: ModelSection, config: PretrainedConfig) -> str | None:
    """A note if the export of a pretrained model has another dtype than the checkpoint; else None."""
    given = str(getattr(config, "dtype", None)).removeprefix("torch.")
    if section.pretrained is None or given in ("None", section.dtype):
        return None
    return f"the checkpoint's weights are in {given}, and those of the export in {section.dtype} (model.dtype)"


def vocabulary_problem(vocab_size: int, tokenizer_size: int, section: ModelSection | None = None) -> Problem:
    """The problem of a tokenizer with more ids than the model has embeddings. `section`: the model's, if known."""
    if section is not None and section.pretrained is not None:
        message = (
            f"the tokenizer has {tokenizer_size} tokens, but {section.pretrained} has embeddings for {vocab_size}; use "
            f"the model's own tokenizer, or add embeddings first with `model.resize_token_embeddings({tokenizer_size})`"
            " and `model.save_pretrained(...)`"
        )
        return Problem("tokenizer.pretrained", message)
    return Problem(
        "model.config.vocab_size",
        f"must be at least the tokenizer's {tokenizer_size} tokens (got {vocab_size}); leave the key out to use the "
        "tokenizer's size",
    )


def load_config(section: ModelSection, **defaults: Any) -> PretrainedConfig:
    """The config of a model, with `section.config_overrides`.

    `defaults`: values for keys of a new model's config that the section does not set. Raises `RecipeError` if
    `section.pretrained` has no config, if the overrides don't suit it, or if `AutoModelForCausalLM` could not load the
    export.
    """
    from transformers import AutoConfig

    if section.config is not None:
        special = _special_ids(str(section.config.get("model_type")), **defaults)
        config = AutoConfig.for_model(**{**defaults, **special, **section.config})
        if (reason := _export_problem(config)) is not None:
            raise RecipeError.at("model.config.model_type", f"{reason}; use another model")
        return config
    return override_config(_text_config(section), section.config_overrides)


def _text_config(section: ModelSection) -> PretrainedConfig:
    """The config of the text model of `section.pretrained`, as it is in the checkpoint."""
    if problem := missing_path_problem(section.pretrained or ""):
        raise RecipeError.at("model.pretrained", problem)
    try:
        config = whole_config(section)
    except Exception as error:  # a broken file may raise anything
        raise RecipeError.at("model.pretrained", load_error_message(section.pretrained or "", error)) from error
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return config
    # If a checkpoint has parts for images or sound, only its text model is trained.
    try:
        text = config.get_text_config()
    except ValueError as error:
        message = f"{section.pretrained} is of type {config.model_type}, which has several text models"
        raise RecipeError.at("model.pretrained", f"{message}; use a text-only checkpoint") from error
    if (reason := _export_problem(text)) is not None:
        advice = "use a text-only checkpoint" if text is not config else "use another model"
        message = f"{section.pretrained} is of type {config.model_type}: {reason}; {advice}"
        raise RecipeError.at("model.pretrained", message)
    return text


def override_notes(section: ModelSection) -> Iterator[str]:
    """What `section.config_overrides` changes, for the records of a run."""
    if not section.config_overrides:
        return
    changes = config_changes(_text_config(section), load_config(section))
    yield f"model.config_overrides changes the checkpoint's config: {'; '.join(changes) or 'nothing'}"


def whole_config(section: ModelSection) -> PretrainedConfig:
    """The config of `section.pretrained` with all its parts, such as those for images."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(
        section.pretrained, revision=section.revision, trust_remote_code=section.trust_remote_code
    )


def _special_ids(model_type: str, **known: Any) -> dict[str, Any]:
    """The special token ids of a new model's config: those of the tokenizer in `known`, else None.

    The default ids of a class may lie outside of a small vocabulary, or be other tokens of this tokenizer. If the class
    does not accept None, the id is that of EOS, which every tokenizer has, or 0 if there is no tokenizer yet.
    """
    ids = {key: known.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    substitute = ids["eos_token_id"] if ids["eos_token_id"] is not None else 0
    return {k: substitute if v is None and not _accepts_none(model_type, k) else v for k, v in ids.items()}


def _accepts_none(model_type: str, key: str) -> bool:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        AutoConfig.for_model(model_type, **{key: None})
    except (StrictDataclassError, TypeError, ValueError):
        return False
    return True


def resolve_config(
    section: ModelSection,
    vocab_size: int,
    tokenizer: Any,
    tokenizer_size: int,
    block_size: int,
    block_key: str = "data.block_size",
) -> PretrainedConfig:
    """The model's config. For a new model, `vocab_size` and the special token ids default to those of the tokenizer.

    `block_size`: the largest of the run. `block_key`: its path in the recipe.

    Raises `RecipeError` for a tokenizer larger than the vocabulary and for blocks longer than the context.
    """
    config = load_config(
        section,
        vocab_size=vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    context = context_problems(config, block_size, section.config_key, block_key)
    problems = [*context, *_special_id_problems(section, tokenizer)]
    if config.vocab_size < tokenizer_size:
        problems.append(vocabulary_problem(config.vocab_size, tokenizer_size, section))
    if problems:
        raise RecipeError(problems)
    if section.pretrained is not None:
        set_special_ids(config, tokenizer)
    return config


def _special_id_problems(section: ModelSection, tokenizer: Any) -> Iterator[Problem]:
    """A problem if `model.config` sets another EOS than that of the tokenizer, with which documents end."""
    given, own = (section.config or {}).get("eos_token_id"), tokenizer.eos_token_id
    if given is not None and own not in (given if isinstance(given, list) else [given]):
        message = f"must be the tokenizer's EOS, {own}, with which documents end (got {given}); leave the key out"
        yield Problem("model.config.eos_token_id", message)


def set_special_ids(config: Any, tokenizer: Any) -> None:
    """Set the special token ids of a checkpoint's config or generation config to those of the tokenizer.

    Generation configs often have several EOS ids. Those that are special tokens of the tokenizer are kept, after the
    tokenizer's own EOS. BOS and padding ids are kept if the tokenizer has none.
    """
    own, given = tokenizer.eos_token_id, config.eos_token_id
    ends = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    if own not in ends:
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {number for number, token in added.items() if token.special}
        several = isinstance(given, (list, tuple)) or type(config).__name__ == "GenerationConfig"
        kept = [number for number in ends if number in special] if several else []
        config.eos_token_id = [own, *kept] if kept else own
    for key in ("bos_token_id", "pad_token_id"):
        if (number := getattr(tokenizer, key)) is not None:
            setattr(config, key, number)


def generation_config(section: ModelSection, tokenizer: Any) -> GenerationConfig | None:
    """The generation config of `section.pretrained`, with the tokenizer's special token ids; None if there is none."""
    from transformers import GenerationConfig

    if section.pretrained is None:
        return None
    try:
        found = GenerationConfig.from_pretrained(section.pretrained, revision=section.revision)
    except OSError:  # not every checkpoint has one; then the config's ids are used
        return None
    set_special_ids(found, tokenizer)
    return found


def context_length(config: PretrainedConfig) -> int | None:
    """The longest context of a config in tokens; None if it has no limit."""
    found = (getattr(config.get_text_config(), key, None) for key in CONTEXT_KEYS)
    return next((number for number in found if isinstance(number, int) and number > 0), None)
