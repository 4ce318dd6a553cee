"""Builds a model from its config, or loads a pretrained one; compiles it, applies Liger's kernels."""

from __future__ import annotations

import contextlib
import fnmatch
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from hfpretrain.modeling.config import load_config, whole_config
from hfpretrain.modeling.overrides import KEY
from hfpretrain.modeling.structure import decoder_layers
from hfpretrain.modeling.trainable import join_patterns
from hfpretrain.recipe.schema import ModelSection, Problem, RecipeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Number of layers that predict further tokens. llama.cpp's converter looks for their tensors.
_NUM_MTP_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")


def build_model(
    section: ModelSection,
    config: PretrainedConfig,
    device: str = "meta",
    seed: int = 0,
    note: Callable[[str], None] = lambda text: None,
) -> PreTrainedModel:
    """Build a new model in float32 on `device`, or load `section.pretrained` on the CPU.

    By default a new model is on the meta device, and `initialization.InitialWeights` draws its values. `seed`: seed for
    the tensors that the checkpoint lacks and that `section.allow_missing` matches. `note` is called with a sentence on
    the checkpoint's tensors that the model does not have, and on each change of the config that follows from them.

    Raises `RecipeError` if no model can be built from the config, if the checkpoint can't be loaded, or if it has other
    tensors than the model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    # For None, transformers uses sdpa if the class has it, else eager.
    attention = None if section.attn_implementation == "auto" else section.attn_implementation
    try:
        if section.pretrained is None:
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = _load_pretrained(section, config, attention, note)
    except RecipeError:
        raise
    except Exception as error:  # wrong values in a config may raise anything
        raise model_error(error, section) from error
    model.train()  # `from_pretrained` returns a model in eval mode
    if section.gradient_checkpointing:
        # With reentrant checkpointing DDP and ZeRO don't notice when gradients are ready.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def require_same_tensors(section: ModelSection) -> None:
    """Raise `RecipeError` if `section.config_overrides` adds or drops a tensor of the checkpoint, or changes its shape.

    Models are built on the meta device only, so no weights are read. Tensors that `section.allow_missing` matches may
    be added or dropped.
    """
    overrides = section.config_overrides
    if not overrides:
        return
    before = _tensor_shapes(section, {})
    changed = _changed_tensors(section, before, _tensor_shapes(section, overrides))
    if not changed:
        return
    problems = []
    for key, value in overrides.items():
        try:
            texts = _changed_tensors(section, before, _tensor_shapes(section, {key: value}))
        except RecipeError:  # the key is only valid together with another one
            continue
        if texts:
            problems.append(_changed_tensors_problem(f"{KEY}.{key}", texts))
    raise RecipeError(problems or _changed_tensors_problem(KEY, changed))


def _tensor_shapes(section: ModelSection, overrides: dict[str, Any]) -> dict[str, list[int]]:
    """Shapes of the parameters of the checkpoint's model, and of the buffers that a checkpoint has, by name."""
    config = load_config(section.model_copy(update={"config_overrides": overrides}))
    model = build_model(section.model_copy(update={"pretrained": None, "attn_implementation": "auto"}), config)
    parameters = dict(model.named_parameters())  # a tied one has one name
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return {name: list(tensor.shape) for name, tensor in {**parameters, **buffers}.items()}


def _changed_tensors(section: ModelSection, before: dict[str, list[int]], after: dict[str, list[int]]) -> list[str]:
    """A text for each tensor that differs between two models in its shape, or that only one of them has."""
    texts = []
    for name in {**before, **after}:
        old, new = before.get(name), after.get(name)
        if old is not None and new is not None and old != new:
            texts.append(f"{name} has shape {old} in the checkpoint, but {new} with this value")
        elif old != new and not _is_allowed(section, name):
            texts.append(f"{name} {new} is not in the checkpoint" if old is None else f"{name} {old} is dropped")
    return texts


def _changed_tensors_problem(path: str, texts: list[str]) -> Problem:
    more = f", and so on for {len(texts) - 1} more tensors" if len(texts) > 1 else ""
    fix = "leave the key out, or train a new model with model.config"
    return Problem(path, f"does not fit the checkpoint's tensors: {texts[0]}{more}; {fix}")


def _load_pretrained(
    section: ModelSection, config: PretrainedConfig, attention: str | None, note: Callable[[str], None]
) -> PreTrainedModel:
    """Load `section.pretrained`. Raises `RecipeError` with the names of missing and unexpected tensors."""
    import torch
    from transformers import AutoModelForCausalLM

    whole = whole_config(section)
    is_part = type(whole) is not type(config) and _causal_lm_class(whole) is not _causal_lm_class(config)
    if is_part:
        text = whole.get_text_config()
        setattr(whole, next(name for name, part in vars(whole).items() if part is text), config)
    with _ignored_tensors() as ignored:
        # `ignore_mismatched_sizes`, since `_loading_problems` reports tensors of another shape by name.
        model, info = AutoModelForCausalLM.from_pretrained(
            section.pretrained,
            config=whole if is_part else config,
            revision=section.revision,
            attn_implementation=attention,
            dtype=torch.float32,
            trust_remote_code=section.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    name = type(model).__name__
    if problems := list(_loading_problems(section, name, info)):
        raise RecipeError(problems)
    _note_left_out(note, ignored, f"{name} ignores them when it is loaded")
    _note_left_out(note, info["unexpected_keys"], "model.allow_missing matches them")
    if missing := sorted(info["missing_keys"]):
        text = f"{len(missing)} tensors are not in the checkpoint and are drawn from the seed (model.allow_missing)"
        note(f"{text}: {join_patterns(missing)}")
    if is_part:
        loaded, model = model, _text_model(model, config, attention)
        kept = {tensor.data_ptr() for tensor in model.state_dict().values()}
        parts = [name for name, tensor in loaded.state_dict().items() if tensor.data_ptr() not in kept]
        _note_left_out(note, parts, "only the text model is trained")
    _correct_config(model, bool(ignored), note)
    return model


def _correct_config(model: PreTrainedModel, has_ignored_tensors: bool, note: Callable[[str], None]) -> None:
    """Correct the config of a loaded model where it promises tensors that the export will not have."""
    config: Any = model.config
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = head is None or head.weight is embeddings.weight
    if getattr(config, "tie_word_embeddings", False) and not is_tied:  # transformers does not tie tensors that differ
        config.tie_word_embeddings = False
        note(
            "the checkpoint's config has tie_word_embeddings: true, but its output layer differs from its embeddings. "
            "Both are trained, and the config of the export has false"
        )
    for key in _NUM_MTP_LAYERS if has_ignored_tensors else ():
        if number := getattr(config, key, None):
            setattr(config, key, 0)
            note(f"the config of the export has {key}: 0 instead of {number}, since it has no such layers")


@contextlib.contextmanager
def _ignored_tensors() -> Iterator[list[str]]:
    """Collects the tensors of a checkpoint that transformers drops without reporting them, because the class of the
    model lists them, such as the layers for predicting several tokens (`mtp.*`)."""
    from transformers import PreTrainedModel

    found: list[str] = []
    adjust = PreTrainedModel._adjust_missing_and_unexpected_keys

    def adjust_and_collect(model: PreTrainedModel, info: Any) -> None:
        unexpected = set(info.unexpected_keys)
        adjust(model, info)
        found.extend(sorted(unexpected - set(info.unexpected_keys)))

    PreTrainedModel._adjust_missing_and_unexpected_keys = adjust_and_collect
    try:
        yield found
    finally:
        PreTrainedModel._adjust_missing_and_unexpected_keys = adjust


def _note_left_out(note: Callable[[str], None], names: Iterable[str], reason: str) -> None:
    if names := sorted(names):
        text = f"{len(names)} tensors of the checkpoint are neither trained nor exported, because {reason}"
        note(f"{text}: {join_patterns(names)}")


def _causal_lm_class(config: PretrainedConfig) -> Any:
    """The causal LM class of transformers for a config; None if the checkpoint has code of its own."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def _text_model(whole: Any, config: PretrainedConfig, attention: str | None) -> PreTrainedModel:
    """The text model, with its weights, of a loaded model that also has parts for images or sound."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    decoder = whole.get_decoder()
    if type(decoder) is not type(model.base_model):
        message = (
            f"the text model of {type(whole).__name__} is not a {type(model.base_model).__name__}; save the text model "
            "as a checkpoint of its own and use that"
        )
        raise RecipeError.at("model.pretrained", message)
    for ours, theirs in ((model.base_model, decoder), (model.get_output_embeddings(), whole.get_output_embeddings())):
        ours.load_state_dict(theirs.state_dict(), assign=True)
        buffers = dict(theirs.named_buffers())
        for name, _ in list(ours.named_buffers()):  # also those that are not in a state dict
            owner, _, leaf = name.rpartition(".")
            ours.get_submodule(owner)._buffers[leaf] = buffers[name]
    model.tie_weights()
    return model


def _loading_problems(section: ModelSection, name: str, info: dict[str, Any]) -> Iterator[Problem]:
    """The problems with the tensors of a checkpoint: missing ones, unexpected ones, and ones of another shape.

    `name`: name of the model's class. Tensors that `section.allow_missing` matches are left out.
    """

    def join_names(names: Any) -> str:
        names = sorted(names)
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    def not_allowed(names: Any) -> list[str]:
        return [name for name in names if not _is_allowed(section, name)]

    path, fix = "model.pretrained", "correct config.json or the weights, or list the tensors in model.allow_missing"
    if missing := not_allowed(info["missing_keys"]):
        text = f"{section.pretrained} lacks {len(missing)} tensors of {name}: {join_names(missing)}"
        yield Problem(path, f"{text}; {fix}")
    if unexpected := not_allowed(info["unexpected_keys"]):
        text = f"{section.pretrained} has {len(unexpected)} tensors that {name} lacks: {join_names(unexpected)}"
        yield Problem(path, f"{text}; {fix}")
    if mismatched := info["mismatched_keys"]:
        texts = [f"{key} has shape {list(theirs)}, in the model {list(ours)}" for key, theirs, ours in mismatched]
        where = "config.json" if not section.config_overrides else f"config.json with {KEY}"
        yield Problem(path, f"the weights of {section.pretrained} don't fit its {where}: {join_names(texts)}")
    if info["error_msgs"]:
        yield Problem(path, f"{section.pretrained} can't be loaded: {join_names(info['error_msgs'])}")


def _is_allowed(section: ModelSection, name: str) -> bool:
    """Whether only the checkpoint or only the model may have a tensor of this name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in section.allow_missing)


def import_model_code(config: PretrainedConfig) -> None:
    """Import the code of a config's model now, so that its tens of megabytes don't count as memory of training."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def apply_liger_kernel(model: PreTrainedModel) -> None:
    """Apply Liger's kernels to everything but the loss.

    Raises `RecipeError` if they can't run here, or if Liger has none for this model.
    """
    import torch
    from transformers.integrations import liger
    from transformers.utils import is_liger_kernel_available

    path, model_type = "model.use_liger_kernel", model.config.model_type
    if not torch.cuda.is_available():
        raise RecipeError.at(path, "Liger's kernels are written in Triton and need a GPU; set it to false")
    if not is_liger_kernel_available():
        raise RecipeError.at(path, "the package liger-kernel is not installed: `pip install liger-kernel`")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:  # Liger itself gives no error
        raise RecipeError.at(path, f"Liger has no kernels for {model_type}; set it to false")
    liger.apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def should_compile(wanted: Literal["auto"] | bool, num_micro_steps: int, engine_can: bool) -> bool:
    """Whether a run compiles its model.

    `auto` compiles on a GPU with Triton, if the run is long enough to make up for the time that compiling takes.
    """
    from torch.utils._triton import has_triton

    return engine_can and num_micro_steps >= 2000 and has_triton() if wanted == "auto" else wanted


def compile_layers(model: PreTrainedModel) -> None:
    """`torch.compile` each decoder layer in place. Layers share their code, so they are compiled once.

    On an H100 this runs a tenth faster than the whole model as one graph, and takes a tenth of the time to compile
    (benchmarks/README.md). Between layers, engines can gather weights.
    """
    for layer in decoder_layers(model):
        layer.compile()


def compile_error(error: Exception) -> RecipeError | None:
    """The `RecipeError` for an error of torch.compile, often a missing C++ compiler; None for any other error."""
    exceptions = sys.modules.get("torch._dynamo.exc")  # imported as soon as anything is compiled
    if exceptions is None or not isinstance(error, exceptions.TorchDynamoException):
        return None
    reason = next((line for line in str(error).splitlines() if ": " in line), type(error).__name__)
    fix = "install what the message names, such as a C++ compiler, or set it to false"
    return RecipeError.at("training.compile", f"the model's layers can't be compiled: {reason:.500}; {fix}")


def model_error(error: Exception, section: ModelSection) -> RecipeError:
    """The `RecipeError` for an exception that building or calling the model raised."""
    message = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
    if "attention" in message.lower() and ("support" in message or "install" in message):
        wanted = section.attn_implementation
        fix = "set it to auto" if wanted != "auto" else "use another model"
        return RecipeError.at("model.attn_implementation", f"the model does not support {wanted} ({message}); {fix}")
    path = "model.pretrained" if section.pretrained else "model.config"
    return RecipeError.at(path, f"no model can be built: {message}")
