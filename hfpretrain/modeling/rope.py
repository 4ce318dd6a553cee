"""Changes the rotary position embedding of a model that is already built, where a stage with longer blocks begins."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hfpretrain.recipe.schema import LengthStage, RecipeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_KEPT_WITH_ANOTHER_TYPE = ("rope_theta", "partial_rotary_factor")
_NEED_ORIGINAL = ("yarn", "llama3", "longrope")
_LOGGER = "transformers.modeling_rope_utils"


def changed_rope(config: PretrainedConfig, change: dict[str, Any], key: str) -> dict[str, Any]:
    """The `rope_parameters` of a text model's config after a change of some of its keys.

    A key that `change` does not have keeps its value. With another `rope_type`, only `rope_theta` and
    `partial_rotary_factor` do. If the config has parameters for each type of layer, `change` has the types as keys.
    `key`: path of `change` in the recipe. Raises `RecipeError` for a model without rotary position embeddings, and for
    what transformers does not accept.
    """
    before = getattr(config, "rope_parameters", None)
    if not before:
        message = f"{config.model_type} has no rotary position embedding that its config describes; leave the key out"
        raise RecipeError.at(key, message)
    nested = config.nested_rope_parameter_keys(before)
    if not nested:
        after = _merge(before, change, key)
    else:
        if unknown := sorted(set(change) - set(nested)):
            message = f"{config.model_type} has parameters for each type of layer: {', '.join(nested)}"
            raise RecipeError.at(f"{key}.{unknown[0]}", f"{message}; write the change under one of these names")
        merged = {name: _merge(before[name], part, f"{key}.{name}") for name, part in change.items()}
        after = {**copy.deepcopy(before), **merged}
    twin = copy.deepcopy(config)
    twin.rope_parameters = after
    problems: list[str] = []
    try:
        with _warnings(problems):
            twin.validate_rope()
    except Exception as error:  # transformers raises KeyError or TypeError for some wrong values
        problems.append(" ".join(str(error).split()).strip("\"'"))
    # The factor of a stage may be smaller than the one that the longest context needs.
    problems = [text for text in problems if "implicit" not in text]
    if problems:
        raise RecipeError.at(key, f"{problems[0]} (got {change!r})")
    return dict(twin.rope_parameters)


def _merge(before: dict[str, Any], change: dict[str, Any], key: str) -> dict[str, Any]:
    kind, old_kind = change.get("rope_type", before.get("rope_type")), before.get("rope_type")
    kept = {name: value for name, value in before.items() if kind == old_kind or name in _KEPT_WITH_ANOTHER_TYPE}
    after = {**copy.deepcopy(kept), **copy.deepcopy(change)}
    if kind not in _known_types():
        raise RecipeError.at(f"{key}.rope_type", f"is not one of {', '.join(_known_types())} (got {kind!r})")
    if kind in _NEED_ORIGINAL and not isinstance(after.get("original_max_position_embeddings"), int):
        message = f"is missing: {kind} needs the number of tokens up to which the model was trained, for example 4096"
        raise RecipeError.at(f"{key}.original_max_position_embeddings", message)
    for name in ("rope_theta", "factor"):
        value = after.get(name, 1.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise RecipeError.at(f"{key}.{name}", f"must be a number above 0 (got {value!r})")
    return after


def _known_types() -> list[str]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return sorted({"default", *ROPE_INIT_FUNCTIONS})


@contextlib.contextmanager
def _warnings(found: list[str]) -> Iterator[None]:
    """Inside this context, add transformers' warnings about `rope_parameters` to `found` instead of logging them."""
    logger = logging.getLogger(_LOGGER)

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(" ".join(record.getMessage().split()))

    collector, level, propagate = Collector(), logger.level, logger.propagate
    logger.addHandler(collector)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(collector)
        logger.setLevel(level)
        logger.propagate = propagate


def rope_of_stages(config: PretrainedConfig, stages: Sequence[LengthStage]) -> list[dict[str, Any] | None]:
    """The `rope_parameters` of a model in each stage; None for all if no stage changes them.

    `config`: the model's config as the run begins. Raises `RecipeError` as `changed_rope` does.
    """
    if not any(stage.rope_parameters for stage in stages):
        return [None] * len(stages)
    text = copy.deepcopy(config.get_text_config())
    found = []
    for stage in stages:
        if stage.rope_parameters:
            text.rope_parameters = changed_rope(text, stage.rope_parameters, f"{stage.key}.rope_parameters")
        found.append(copy.deepcopy(getattr(text, "rope_parameters", None)))
    return found


def change_rope(model: PreTrainedModel, rope_parameters: dict[str, Any]) -> None:
    """Give a built model other `rope_parameters`, in its config and in its modules.

    The values of the frequencies are copied into the buffers that the model has, so the model stays as an engine has
    prepared it. Other modules that read these parameters when they are built, as DeepSeek's attention does, get the
    attributes of a new module. Raises `RecipeError` if the model can't be changed like this.
    """
    text = model.config.get_text_config()
    before = copy.deepcopy(model.config)
    text.rope_parameters = copy.deepcopy(rope_parameters)
    rotary = {name: module for name, module in model.named_modules() if _is_rotary(module)}
    if not rotary:
        raise _unsupported(model, "has no module of its own for them")
    for name, module in rotary.items():
        try:
            fresh = type(module)(config=text)
        except Exception as error:  # a custom class may have another constructor
            raise _unsupported(model, f"can't make {name} again ({type(error).__name__}: {error})") from error
        _copy_rotary(model, name, module, fresh)
    for name, attributes in _differing_attributes(type(model), before, model.config).items():
        if name not in rotary:
            vars(model.get_submodule(name)).update(attributes)


def _is_rotary(module: torch.nn.Module) -> bool:
    return any(name.endswith("original_inv_freq") for name, _ in module.named_buffers(recurse=False))


def _copy_rotary(model: PreTrainedModel, name: str, module: torch.nn.Module, fresh: torch.nn.Module) -> None:
    buffers = dict(module.named_buffers(recurse=False))
    for leaf, value in fresh.named_buffers(recurse=False):
        if leaf not in buffers or buffers[leaf].shape != value.shape:
            raise _unsupported(model, f"would rotate another number of dimensions in {name}")
        buffers[leaf].copy_(value)
    for leaf, value in _own_attributes(fresh).items():
        setattr(module, leaf, value)
    for leaf in vars(module):
        if leaf.endswith("long_inv_freq"):  # what the forward pass of rope_type longrope has kept
            vars(module)[leaf] = None


def _own_attributes(module: torch.nn.Module) -> dict[str, Any]:
    """The attributes of a module that its constructor sets, without tensors and submodules."""
    inherited = vars(torch.nn.Module()).keys()
    return {name: value for name, value in vars(module).items() if name not in inherited}


def _differing_attributes(
    model_class: Any, before: PretrainedConfig, after: PretrainedConfig
) -> dict[str, dict[str, Any]]:
    """The plain attributes that differ between the modules of two models on the meta device, by the module's name."""
    with torch.device("meta"):
        old, new = (dict(model_class(copy.deepcopy(config)).named_modules()) for config in (before, after))
    found = {}
    for name, module in new.items():
        was = _own_attributes(old[name])
        differing = {
            key: value
            for key, value in _own_attributes(module).items()
            if isinstance(value, (bool, int, float, str, tuple)) and was.get(key) != value
        }
        if differing:
            found[name] = differing
    return found


def _unsupported(model: PreTrainedModel, reason: str) -> RecipeError:
    message = f"{type(model).__name__} {reason}, so its rope_parameters can't change during a run"
    return RecipeError.at("data.stages", f"{message}; set them in `model`, and use one stage")
