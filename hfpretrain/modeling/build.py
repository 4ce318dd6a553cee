"""Config to model: built from scratch or loaded, checked against its config class, tested for document isolation."""

from __future__ import annotations

import contextlib
import copy
import difflib
import fnmatch
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hfpretrain.modeling.initialization import CONTEXT_KEYS, decoder_layers
from hfpretrain.recipe.addresses import missing_path, not_loaded
from hfpretrain.recipe.keys import unknown_key
from hfpretrain.recipe.schema import ModelSection, Problem, RecipeError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

# Names that config classes give the number of experts and how many of them a token meets.
_NUM_EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN_KEYS = ("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")


def config_problems(mapping: dict[str, Any]) -> Iterator[Problem]:
    """Problems of `model.config` in a recipe's raw mapping: unknown keys, refused values, too short a context.

    Needs transformers, not torch.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    section = mapping.get("model")
    keywords = section.get("config") if isinstance(section, dict) else None
    if not isinstance(keywords, dict) or "model_type" not in keywords:
        return
    model_type = str(keywords["model_type"])
    if model_type not in CONFIG_MAPPING or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        message = unknown_key(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES).replace("unknown key", "no causal LM type")
        yield Problem("model.config.model_type", f"{message} (got {model_type!r})")
        return
    known = known_config_keys(model_type)
    unknown = [k for k in keywords if k != "model_type" and k not in known and not _is_read_by_model(model_type, k)]
    for key in unknown:
        yield Problem(f"model.config.{key}", _unknown_config_key(key, model_type, known))
    try:
        given = {key: value for key, value in keywords.items() if key not in unknown}
        config = AutoConfig.for_model(**{**_special_ids(model_type), **given})
    except Exception as error:  # a config class may raise anything; each says what it wants
        yield Problem("model.config", " ".join(str(error).split()) or type(error).__name__)
        return
    if (reason := _not_loadable(config)) is not None:
        yield Problem("model.config.model_type", f"{reason}; use another model (got {model_type!r})")
        return
    data = mapping.get("data")
    block_size = data.get("block_size") if isinstance(data, dict) else None
    yield from context_problems(config, block_size)
    tokenizer = mapping.get("tokenizer")
    wanted = tokenizer.get("vocab_size") if isinstance(tokenizer, dict) else None
    if isinstance(wanted, int) and isinstance(keywords.get("vocab_size"), int) and keywords["vocab_size"] < wanted:
        yield vocabulary_problem(keywords["vocab_size"], wanted)


def _not_loadable(config: PretrainedConfig) -> str | None:
    """Why plain `AutoModelForCausalLM` could not load what a run of this config exports; None if it can.

    Where a config has parts for images or sound, some classes build the text model alone. The export then has the
    config of that part, of which `AutoModelForCausalLM` may know no class.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return f"transformers has no causal class for {config.model_type}, so AutoModelForCausalLM can't load it"
    text_class: Any = config.sub_configs.get("text_config")
    if text_class is None or text_class in MODEL_FOR_CAUSAL_LM_MAPPING or find_spec("torch") is None:
        return None
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if getattr(model_class, "config_class", None) is not text_class:
        return None
    part = config.get_text_config().model_type
    message = f"{model_class.__name__} would be exported with the config of its text model, {part}"
    return f"{message}, which AutoModelForCausalLM can't load"


def context_problems(config: PretrainedConfig, block_size: Any) -> Iterator[Problem]:
    """A problem if blocks are longer than the positions a model has."""
    for key in CONTEXT_KEYS:
        positions = getattr(config, key, None)
        if isinstance(positions, int) and isinstance(block_size, int) and 0 < positions < block_size:
            yield Problem("data.block_size", f"{block_size} is more than the model's {key} {positions}")
            return


def context_note(section: ModelSection, config: PretrainedConfig, block_size: int) -> str | None:
    """A note on a new model that has its class's default context length, if blocks are shorter; else None."""
    key = next((key for key in CONTEXT_KEYS if isinstance(getattr(config, key, None), int)), None)
    if section.config is None or key is None or set(CONTEXT_KEYS) & set(section.config):
        return None
    positions = getattr(config, key)
    if positions <= block_size:
        return None
    return (
        f"the model has {key} {positions:,}, the default of {config.model_type}, but blocks have "
        f"{block_size:,} tokens, so later positions are not trained. Set model.config.{key} to change it"
    )


def vocabulary_problem(vocab_size: int, tokenizer_size: int, section: ModelSection | None = None) -> Problem:
    """The problem of a tokenizer with ids that the model has no embedding for; `section` of the model, if known."""
    if section is not None and section.pretrained is not None:
        message = (
            f"has {tokenizer_size} tokens, but {section.pretrained} has embeddings for {vocab_size}; use the model's "
            f"own tokenizer, or add the rows first: `model.resize_token_embeddings({tokenizer_size})`, then "
            "`model.save_pretrained(...)`"
        )
        return Problem("tokenizer.pretrained", message)
    return Problem(
        "model.config.vocab_size",
        f"{vocab_size} is less than the tokenizer's {tokenizer_size} tokens; leave the key out and it follows the "
        "tokenizer",
    )


def known_config_keys(model_type: str) -> set[str]:
    """Keys that a config class reads: its fields, those of `PretrainedConfig`, and its attribute map's aliases."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    keys: set[str] = set()
    with contextlib.suppress(StrictDataclassError):  # some classes refuse their own defaults
        keys = {key for key in config_class().to_dict() if not key.startswith("_")}
    for base in config_class.__mro__:
        keys.update(key for key in getattr(base, "__annotations__", {}) if not key.startswith("_"))
    keys |= set(config_class.attribute_map)
    if "rope_parameters" in keys:
        keys.add("rope_theta")  # transformers moves it there
    return keys


# Names of one thing that no config declares as aliases: those of GPT-2, OPT, T5, MPT and of Meta's own Llama.
_SAME = (
    ("hidden_size", "dim"),
    ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim"),
    ("num_key_value_heads", "n_kv_heads"),
    ("max_position_embeddings", "n_ctx"),
    ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps"),
    ("hidden_act", "activation_function", "hidden_activation"),
    ("attention_dropout", "attn_pdrop"),
)


def _unknown_config_key(key: str, model_type: str, known: set[str]) -> str:
    """The message for a key that the config class lacks. If other classes have the key, it says this class's name."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    meant = Counter(name for names in _SAME if key in names for name in names)
    for other in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        meant.update(name for name, alias in CONFIG_MAPPING[other].attribute_map.items() if alias == key)
    own = getattr(CONFIG_MAPPING[model_type], "attribute_map", {})
    found = next((own.get(name, name) for name, _ in meant.most_common() if name in known), None)
    if found is not None:
        return f"unknown key; {model_type} calls it `{found}`"
    # Not those of every config, which say nothing of the model.
    sizes = [name for name in getattr(CONFIG_MAPPING[model_type], "__annotations__", {}) if not name.startswith("_")]
    return unknown_key(key, known) if difflib.get_close_matches(key, known, 1, 0.5) else unknown_key(key, sizes)


def _is_read_by_model(model_type: str, key: str) -> bool:
    """Whether the model's code reads a key that its config class does not declare, as some do with `head_dim`."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = Path(sys.modules[CONFIG_MAPPING[model_type].__module__].__file__ or "")
    code = path.with_name(path.name.replace("configuration_", "modeling_"))
    return code.is_file() and re.search(rf'config(\.|, "){re.escape(key)}\b', code.read_text("utf-8")) is not None


def load_config(section: ModelSection, **defaults: Any) -> PretrainedConfig:
    """The config of a model; of a new one `defaults` stand where the section says nothing.

    Raises `RecipeError` if `section.pretrained` has none, or if `AutoModelForCausalLM` could not load the export.
    """
    from transformers import AutoConfig

    if section.config is not None:
        special = _special_ids(str(section.config.get("model_type")), **defaults)
        config = AutoConfig.for_model(**{**defaults, **special, **section.config})
        if (reason := _not_loadable(config)) is not None:
            raise RecipeError.at("model.config.model_type", f"{reason}; use another model")
        return config
    if problem := missing_path(section.pretrained or ""):
        raise RecipeError.at("model.pretrained", problem)
    try:
        config = _whole_config(section)
    except Exception as error:  # a broken file may raise anything
        raise RecipeError.at("model.pretrained", not_loaded(section.pretrained or "", error)) from error
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return config
    # Of a checkpoint with parts for images or sound the text model alone is trained.
    try:
        text = config.get_text_config()
    except ValueError as error:
        message = f"{section.pretrained} is a {config.model_type}, which has several text models"
        raise RecipeError.at("model.pretrained", f"{message}; use a text-only checkpoint") from error
    if (reason := _not_loadable(text)) is not None:
        advice = "use a text-only checkpoint" if text is not config else "use another model"
        message = f"{section.pretrained} is a {config.model_type}: {reason}; {advice}"
        raise RecipeError.at("model.pretrained", message)
    return text


def _special_ids(model_type: str, **known: Any) -> dict[str, Any]:
    """The special ids of a new model's config: those `known` of the tokenizer, else None.

    A class's defaults may lie outside a small vocabulary, or be other tokens of the tokenizer. Where the class does not
    accept None, EOS is used, which every tokenizer has; 0 as long as there is no tokenizer.
    """
    ids = {key: known.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    substitute = ids["eos_token_id"] if ids["eos_token_id"] is not None else 0
    return {k: substitute if v is None and not _takes_none(model_type, k) else v for k, v in ids.items()}


def _takes_none(model_type: str, key: str) -> bool:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        AutoConfig.for_model(model_type, **{key: None})
    except (StrictDataclassError, TypeError, ValueError):
        return False
    return True


def resolve_config(
    section: ModelSection, vocab_size: int, tokenizer: Any, tokenizer_size: int, block_size: int
) -> PretrainedConfig:
    """The model's config. For a new model `vocab_size` and the special ids default to the tokenizer's.

    Raises `RecipeError` for a tokenizer larger than the vocabulary and for blocks longer than the context.
    """
    config = load_config(
        section,
        vocab_size=vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    problems = [*context_problems(config, block_size), *_special_id_problems(section, tokenizer)]
    if config.vocab_size < tokenizer_size:
        problems.append(vocabulary_problem(config.vocab_size, tokenizer_size, section))
    if problems:
        raise RecipeError(problems)
    if section.pretrained is not None:
        agree_on_special_ids(config, tokenizer)
    return config


def _special_id_problems(section: ModelSection, tokenizer: Any) -> Iterator[Problem]:
    """An EOS that `model.config` gives and the tokenizer does not put behind documents."""
    given, own = (section.config or {}).get("eos_token_id"), tokenizer.eos_token_id
    if given is not None and own not in (given if isinstance(given, list) else [given]):
        message = f"{given} is not the tokenizer's EOS, {own}, with which documents end; leave the key out to use that"
        yield Problem("model.config.eos_token_id", message)


def agree_on_special_ids(config: Any, tokenizer: Any) -> None:
    """Set the special ids of a checkpoint's config or generation config to those of the tokenizer it is trained with.

    Of several EOS ids, as many generation configs have, those that are special tokens of the tokenizer are kept after
    its own. BOS and padding ids are kept if the tokenizer has none.
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
    """The generation config of `section.pretrained`, with the tokenizer's special ids; None where there is none."""
    from transformers import GenerationConfig

    if section.pretrained is None:
        return None
    try:
        found = GenerationConfig.from_pretrained(section.pretrained, revision=section.revision)
    except OSError:  # a checkpoint need not have one; the config's ids stand in
        return None
    agree_on_special_ids(found, tokenizer)
    return found


def build_model(
    section: ModelSection, config: PretrainedConfig, device: str = "meta", seed: int = 0
) -> PreTrainedModel:
    """The model in float32: a new one on `device`, by default without values (`initialisation.InitialWeights` draws
    them), or with those of `section.pretrained` on the CPU. `seed` draws the tensors that
    may be missing by `section.allow_missing`.

    Raises `RecipeError` where the config builds no model, or the checkpoint does not load or is not that of the model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    # For None, transformers takes sdpa where the class has it, else eager.
    attention = None if section.attn_implementation == "auto" else section.attn_implementation
    try:
        if section.pretrained is None:
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = _load_pretrained(section, config, attention)
    except RecipeError:
        raise
    except Exception as error:  # what a config's values lead to may be any exception
        raise _model_error(error, section) from error
    model.train()  # `from_pretrained` gives a model without dropout and gradient checkpointing
    if section.gradient_checkpointing:
        # Reentrant checkpointing hides the gradient's arrival from DDP and ZeRO.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def _load_pretrained(section: ModelSection, config: PretrainedConfig, attention: str | None) -> PreTrainedModel:
    """The model with the weights of `section.pretrained`. Raises `RecipeError` with the names of tensors that are not
    those of the model."""
    import torch
    from transformers import AutoModelForCausalLM

    whole_config = _whole_config(section)
    is_part = type(whole_config) is not type(config) and _class_of(whole_config) is not _class_of(config)
    # Shapes that differ are reported below, with their names.
    model, info = AutoModelForCausalLM.from_pretrained(
        section.pretrained,
        config=whole_config if is_part else config,
        revision=section.revision,
        attn_implementation=attention,
        dtype=torch.float32,
        trust_remote_code=section.trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    problems = list(_loading_problems(section, type(model).__name__, info))
    if problems:
        raise RecipeError(problems)
    return _text_model(model, config, attention) if is_part else model


def _whole_config(section: ModelSection) -> PretrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(
        section.pretrained, revision=section.revision, trust_remote_code=section.trust_remote_code
    )


def _class_of(config: PretrainedConfig) -> Any:
    """Transformers' causal model class of a config; None of one with code of its own."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def _text_model(whole: Any, config: PretrainedConfig, attention: str | None) -> PreTrainedModel:
    """The text model of a loaded one that has parts for images or sound, too, with its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    decoder = whole.get_decoder()
    if type(decoder) is not type(model.base_model):
        message = f"{type(whole).__name__} contains no {type(model.base_model).__name__}; save its text model first"
        raise RecipeError.at("model.pretrained", message)
    for ours, theirs in ((model.base_model, decoder), (model.get_output_embeddings(), whole.get_output_embeddings())):
        ours.load_state_dict(theirs.state_dict(), assign=True)
        buffers = dict(theirs.named_buffers())
        for name, _ in list(ours.named_buffers()):  # those that no checkpoint holds as well
            owner, _, leaf = name.rpartition(".")
            ours.get_submodule(owner)._buffers[leaf] = buffers[name]
    model.tie_weights()
    return model


def _loading_problems(section: ModelSection, name: str, info: dict[str, Any]) -> Iterator[Problem]:
    """What `from_pretrained` found of tensors that are not those of a class called `name`, but for what is allowed."""

    def listed(names: Any) -> str:
        names = sorted(names)
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    def refused(names: Any) -> list[str]:
        return [one for one in names if not any(fnmatch.fnmatchcase(one, allowed) for allowed in section.allow_missing)]

    path, fix = "model.pretrained", "correct config.json or the weights, or list them in model.allow_missing"
    if missing := refused(info["missing_keys"]):
        yield Problem(path, f"{section.pretrained} lacks {len(missing)} tensors of {name}: {listed(missing)}; {fix}")
    if unexpected := refused(info["unexpected_keys"]):
        text = f"{section.pretrained} has {len(unexpected)} tensors that {name} has no place for: {listed(unexpected)}"
        yield Problem(path, f"{text}; {fix}")
    if mismatched := info["mismatched_keys"]:
        texts = [f"{key} has shape {list(theirs)}, in the model {list(ours)}" for key, theirs, ours in mismatched]
        yield Problem(path, f"{section.pretrained} does not fit its config.json: {listed(texts)}")
    if info["error_msgs"]:
        yield Problem(path, f"{section.pretrained} does not load: {listed(info['error_msgs'])}")


def import_code(config: PretrainedConfig) -> None:
    """Load the code of a config's model, tens of megabytes that are no part of the model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def apply_liger_kernel(model: PreTrainedModel) -> None:
    """Liger's kernels for everything but the loss. Raises `RecipeError` where they would not run or change nothing."""
    import torch
    from transformers.integrations import liger
    from transformers.utils import is_liger_kernel_available

    path, model_type = "model.use_liger_kernel", model.config.model_type
    if not torch.cuda.is_available():
        raise RecipeError.at(path, "Liger's kernels are Triton's and need a GPU; set it to false")
    if not is_liger_kernel_available():
        raise RecipeError.at(path, "the package is not installed: pip install liger-kernel")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:  # Liger itself would say nothing
        raise RecipeError.at(path, f"Liger has no kernels for {model_type}; set it to false")
    liger.apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def compiles(wanted: Literal["auto"] | bool, num_micro_steps: int, engine_can: bool) -> bool:
    """Whether a run compiles its model: `auto` where that is sure to save more time than it takes."""
    from torch.utils._triton import has_triton

    return engine_can and num_micro_steps >= 2000 and has_triton() if wanted == "auto" else wanted


def compile_layers(model: PreTrainedModel) -> None:
    """`torch.compile` each decoder layer in place: they share their code and so their graph.

    On an H100 faster than the whole model in one graph, by a tenth (benchmarks/README.md), and compiled in a tenth of
    the time; engines gather weights between layers.
    """
    for layer in decoder_layers(model):
        layer.compile()


def compile_error(error: Exception) -> RecipeError | None:
    """What to tell where layers don't compile, on most machines for want of a compiler; None of any other error."""
    exceptions = sys.modules.get("torch._dynamo.exc")  # loaded by whatever compiles
    if exceptions is None or not isinstance(error, exceptions.TorchDynamoException):
        return None
    reason = next((line for line in str(error).splitlines() if ": " in line), type(error).__name__)
    advice = "install the C++ compiler or what else it names, or set it to false"
    return RecipeError.at("training.compile", f"the layers don't compile: {reason:.500}; {advice}")


def train_padding_rows(model: PreTrainedModel) -> list[int]:
    """Let the embeddings of padding tokens that occur in the text be trained; returns the ids of these tokens.

    torch makes no gradient for the row of `padding_idx`. Where a tokenizer's padding is its EOS, which ends every
    document, the model would never learn that embedding. Nothing is padded here.
    """
    import torch

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
    import torch

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


def _model_error(error: Exception, section: ModelSection) -> RecipeError:
    message = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
    if "attention" in message.lower() and ("support" in message or "install" in message):
        wanted = section.attn_implementation
        fix = "use auto, which is eager where a class has no sdpa" if wanted != "auto" else "use another model"
        return RecipeError.at("model.attn_implementation", f"the model does not support {wanted} ({message}); {fix}")
    return RecipeError.at("model.pretrained" if section.pretrained else "model.config", f"builds no model: {message}")


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model, tied ones once; `active` are those that one token meets, which differs with experts."""

    total: int
    non_embedding: int
    active: int
    active_non_embedding: int


def count_parameters(model: PreTrainedModel) -> Parameters:
    """Parameters of a model, in total, without the input and output embeddings, and active for one token.

    Experts are found by structure: modules that hold one matrix for each expert stacked along the first dimension, or
    lists with one module for each.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(p): p.numel() for module in embeddings if module is not None for p in module.parameters()}
    non_embedding = total - sum(weights.values())
    idle = _idle_parameters(model)
    return Parameters(total, non_embedding, total - idle, non_embedding - idle)


def _idle_parameters(model: PreTrainedModel) -> int:
    """Parameters of the experts that the router does not choose for a token."""
    import torch

    config = model.config.get_text_config()
    num_experts, chosen = (
        next((n for n in (getattr(config, key, None) for key in keys) if isinstance(n, int) and n > 0), None)
        for keys in (_NUM_EXPERTS_KEYS, _EXPERTS_PER_TOKEN_KEYS)
    )
    if num_experts is None or chosen is None:
        return 0
    experts: dict[int, int] = {}
    layers = decoder_layers(model)
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_experts and module is not layers:
            experts.update({id(parameter): parameter.numel() for parameter in module.parameters()})
        own = [parameter for parameter in module.parameters(recurse=False) if parameter.shape[:1] == (num_experts,)]
        if any(parameter.ndim == 3 for parameter in own):
            experts.update({id(parameter): parameter.numel() for parameter in own})
    return sum(experts.values()) * (num_experts - chosen) // num_experts


def parameters_of_config(config: PretrainedConfig) -> Parameters:
    """`count_parameters` of the model a config describes, built on the meta device: no memory, seconds at any size."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return count_parameters(AutoModelForCausalLM.from_config(config))


@contextlib.contextmanager
def _steady_experts(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation in which a token's result does not depend on which experts the others get: elsewhere that decides the
    order of sums, and in 16 bits a last digit then decides another expert."""
    training, implementation = model.training, model.config._experts_implementation
    model.eval()
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(implementation)
        model.train(training)


def require_causal(
    model: PreTrainedModel, section: ModelSection, half_precision: bool = False, length: int = 8
) -> None:
    """Raises `RecipeError` if a later token changes an earlier prediction: encoders are built as causal LMs, too, and
    would learn to copy. All ranks must call it.

    The tolerance is for experts outside of transformers' own, whose sums change order with the tokens they get;
    `half_precision`: in 16 bits.
    """
    import torch

    input_ids = torch.arange(length)[None].to(next(model.parameters()).device) % model.config.vocab_size
    perturbed = input_ids.clone()
    perturbed[:, length // 2 :] = (perturbed[:, length // 2 :] + 1) % model.config.vocab_size
    with torch.no_grad(), _steady_experts(model):
        try:
            first, second = (
                model(input_ids=ids, use_cache=False).logits[:, : length // 2].float() for ids in (input_ids, perturbed)
            )
        except Exception as error:  # the code of any model
            raise _model_error(error, section) from error
    rtol, atol = (2e-2, 1e-2 * first.std().item()) if half_precision else (1e-3, 1e-4)
    if not torch.allclose(first, second, rtol, atol):
        fix = "; use another model"
        if getattr(model.config, "is_decoder", None) is False:
            fix = "; set model.config.is_decoder: true, which some classes support, or use another model"
        raise RecipeError.at("model.config", f"{type(model).__name__} is not causal: predictions see later tokens{fix}")


def isolates_documents(model: PreTrainedModel, block_size: int) -> bool:
    """Whether nothing `documents_leak` looks for is found. All ranks must call it."""
    return documents_leak(model, block_size) is None


def documents_leak(model: PreTrainedModel, block_size: int) -> str | None:
    """How packed documents affect each other in this very model although positions restart; None if they don't.

    Perturbs every token of the first of two documents in a row, then the positions of the first document and of the
    other row up to the last one in a block, and requires exactly no change in the logits of the second. All ranks must
    call it.
    """
    import torch

    length = max(4, min(16, block_size, getattr(model.config, "max_position_embeddings", 16) or 16))
    half = length // 2
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    # Two rows, since some implementations hold for a batch of one only.
    input_ids = torch.randint(vocabulary, (2, length), generator=generator).to(device)
    perturbed = input_ids.clone()
    perturbed[:, :half] = (perturbed[:, :half] + 1) % vocabulary
    positions = torch.cat([torch.arange(half), torch.arange(length - half)]).repeat(2, 1).to(device)
    # Frequencies may depend on the largest position there is (rope_type dynamic and longrope): few tokens show it.
    long_row, long_document = positions.clone(), positions.clone()
    long_row[1] = torch.arange(length)
    long_row[1, -1] = long_document[0, half - 1] = max(length, block_size) - 1

    def logits(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, half:]

    with torch.no_grad(), _steady_experts(model):
        try:
            first, second = logits(input_ids, positions), logits(perturbed, positions)
            third, fourth = (logits(input_ids, changed)[0] for changed in (long_row, long_document))
        except (TypeError, RuntimeError, ValueError, IndexError) as error:
            text = " ".join(str(error).split())
            return f"{type(model).__name__} does not accept positions that restart at each document ({text:.100})"
    if not torch.equal(first, second):
        return f"{type(model).__name__} with {model.config._attn_implementation} attention lets them see each other"
    if not (torch.equal(first[0], third) and torch.equal(first[0], fourth)):
        return f"in {type(model).__name__} the longest sequence of a micro-batch changes the rotary positions of all"
    return None


def settle_masking(wanted: Literal["auto"] | bool, leak: str | None, packs_documents: bool) -> bool:
    """Whether documents are masked from each other. `leak` is what `documents_leak` found. Raises `RecipeError`
    if the model can't do what the recipe says, or if `auto` would have to train without a mask."""
    if wanted is False or leak is None:
        return wanted is not False
    if wanted == "auto" and not packs_documents:
        return False
    advice = "set it to false to train with documents that see each other, or change the model or"
    raise RecipeError.at(
        "training.document_masking",
        f"packed documents can't be kept apart: {leak}; {advice} model.attn_implementation (got {wanted!r})",
    )


def has_experts(model: PreTrainedModel) -> bool:
    """Whether a router chooses among experts; to be asked before an engine shards the model.

    Found by structure: in a layer, one matrix for each expert stacked in a tensor, or a list with one module for each,
    beside a matrix that gives each expert a number.
    """
    import torch

    hidden_size = getattr(model.config.get_text_config(), "hidden_size", None)
    for layer in decoder_layers(model):
        numbers = {
            parameter.shape[0]
            for module in layer.modules()
            for parameter in module.parameters(recurse=False)
            if parameter.ndim == 3 and not isinstance(module, torch.nn.modules.conv._ConvNd)
        }
        lists = (module for module in layer.modules() if isinstance(module, torch.nn.ModuleList))
        numbers |= {len(experts) for experts in lists if len({type(expert) for expert in experts}) == 1}
        routers = {frozenset(parameter.shape) for parameter in layer.parameters() if parameter.ndim == 2}
        if any(frozenset((number, hidden_size)) in routers for number in numbers if number > 1):
            return True
    return _idle_parameters(model) > 0


def routing_note(model: PreTrainedModel) -> str:
    """A note on a model with experts that is trained on the next token's loss alone."""
    text = f"{type(model).__name__} trains without a balancing loss, so its router may come to use few of its experts"
    if getattr(model.config, "output_router_logits", None) is False:
        text += ". Set model.config.output_router_logits: true to add one"
    elif getattr(model.config, "router_aux_loss_coef", None) == 0:
        text += ". model.config.router_aux_loss_coef is 0"
    return text
