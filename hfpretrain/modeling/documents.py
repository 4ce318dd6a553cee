"""Tells a model where packed documents begin, if the positions of their tokens are not enough."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hfpretrain.modeling.structure import decoder_layers
from hfpretrain.recipe.labels import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Boundaries:
    """How a model is told where documents begin, beside the positions of their tokens."""

    masks: bool = False
    """By attention masks. Some classes don't pass the positions to transformers' functions that make masks."""
    keywords: bool = False
    """By `boundary_keywords`."""
    one_row: bool = False
    """With all rows of a batch joined into one, which the kernels of gated delta rules require."""

    def __str__(self) -> str:
        parts = {
            "masks": self.masks,
            "the keyword arguments of flash attention": self.keywords,
            "all sequences of a micro-batch as one row": self.one_row,
        }
        return " and ".join(name for name, is_used in parts.items() if is_used)


WAYS = (
    Boundaries(masks=True),
    Boundaries(keywords=True),
    Boundaries(keywords=True, masks=True),
    Boundaries(keywords=True, one_row=True),
    Boundaries(keywords=True, masks=True, one_row=True),
)
"""In the order in which they are tried."""


def boundary_keywords(position_ids: torch.Tensor) -> dict[str, Any]:
    """The keyword arguments by which transformers tells its layers where documents begin.

    `position_ids`: int64 (batch, length), 0 at the first token of each document. `cu_seq_lens_q` and `cu_seq_lens_k`,
    int32 (documents + 1,), and `max_length_q` and `max_length_k`, in tokens, are `FlashAttentionKwargs`, which flash
    attention and gated delta rules read. They count over all rows. `seq_idx`, int32 (batch, length), is the number of
    each token's document in its row, which causal convolutions and Mamba-2 read. `DataCollatorWithFlattening` makes the
    same arguments. On a GPU this waits for the device once.
    """
    begins = position_ids == 0
    begins[:, 0] = True  # a document never continues in the next row
    starts = begins.flatten().nonzero().flatten()
    ends = torch.nn.functional.pad(starts, (0, 1), value=begins.numel()).int()
    longest = int(ends.diff().max())
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": begins.cumsum(1, dtype=torch.int32) - 1,
    }


def boundary_masks(network: PreTrainedModel, position_ids: torch.Tensor) -> Any:
    """The attention masks of a model in which tokens see only their own document, as transformers makes them.

    One mask, or a dictionary of masks by the kind of layer; None if the attention needs none. `position_ids`: as in
    `boundary_keywords`. Raises `ValueError` if transformers makes no masks for the layers of this model.
    """
    from transformers.masking_utils import create_masks_for_generate

    embedded = torch.empty((*position_ids.shape, 0), device=position_ids.device)  # only shape, device and dtype count
    masks: Any = create_masks_for_generate(network.config, embedded, None, None, position_ids=position_ids)
    if masks is None:
        raise ValueError(f"transformers makes no masks for {type(network).__name__}")
    return masks


def pass_boundaries(network: PreTrainedModel, how: Boundaries) -> Callable[[], None]:
    """Make a model tell its layers where documents begin, whenever it is called with positions and without a cache.

    Inputs and outputs of the model keep their shapes. Returns a function that undoes this.
    """
    shapes: list[torch.Size] = []  # that of the call in progress, if its rows are joined

    def before(_: Any, args: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        shapes.clear()
        positions = keywords.get("position_ids")
        if positions is None or keywords.get("use_cache") is not False:
            return None
        if how.one_row and len(positions) > 1:
            shapes.append(positions.shape)
            keywords = {name: _join_rows(name, value, positions.shape) for name, value in keywords.items()}
            positions = keywords["position_ids"]
        added = boundary_keywords(positions) if how.keywords else {}
        if how.masks:
            added["attention_mask"] = boundary_masks(network, positions)
        return args, keywords | added

    def after(_: Any, args: Any, outputs: Any) -> None:
        logits = getattr(outputs, "logits", None)
        if shapes and logits is not None and logits.shape[:2] == (1, shapes[0].numel()):
            outputs.logits = logits.view(*shapes[0], -1)

    # First, since the hook of the chunked loss reads the labels.
    hooks = [
        network.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        network.register_forward_hook(after),
    ]

    def undo() -> None:
        for hook in hooks:
            hook.remove()

    return undo


def _join_rows(name: str, value: Any, shape: torch.Size) -> Any:
    """An argument of a model with its rows joined into one: (batch, length) to (1, batch * length)."""
    if not isinstance(value, torch.Tensor) or value.shape != shape:
        return value
    if name in ("labels", "position_ids"):
        value = value.clone()
        # A row begins a document, and the last token of a row does not predict the first one of the next row.
        value[:, 0] = IGNORE_INDEX if name == "labels" else 0
    return value.reshape(1, -1)


def layers_that_mix(model: PreTrainedModel, call: Callable[[], Any], half: int) -> list[str]:
    """Names of the decoder layers in which tokens from position `half` on depend on earlier ones.

    `call`: calls the model with rows in which a document begins at position `half`. A layer is called a second time
    with other values before that position. Empty if a layer can't be called like this.
    """
    found: list[str] = []
    layers = list(decoder_layers(model))
    kinds = list(getattr(model.config.get_text_config(), "layer_types", None) or ())
    is_second = False

    def compare(layer: Any, args: Any, keywords: dict[str, Any], outputs: Any) -> None:
        nonlocal is_second
        if is_second:
            return
        hidden = args[0] if args else keywords["hidden_states"]
        changed = hidden.clone()
        changed[:, :half] = changed[:, :half].flip(-1) + 1
        is_second = True
        again = layer(changed, *args[1:], **keywords) if args else layer(**{**keywords, "hidden_states": changed})
        is_second = False
        first, second = (one[0] if isinstance(one, tuple) else one for one in (outputs, again))
        if not torch.equal(first[:, half:], second[:, half:]):
            number = layers.index(layer)
            found.append(kinds[number] if len(kinds) == len(layers) else type(layer).__name__)

    hooks = [layer.register_forward_hook(compare, with_kwargs=True) for layer in layers]
    try:
        call()
    except (TypeError, RuntimeError, ValueError, IndexError, KeyError, AttributeError):
        return []
    finally:
        for hook in hooks:
            hook.remove()
    return found


def packages_to_keep_apart(model: PreTrainedModel, call: Callable[[], Any]) -> tuple[list[str], list[str]]:
    """Which packages the layers of a model need to keep documents apart, and which functions are not told of them.

    `call`: calls the model with `boundary_keywords`. transformers has functions that use the kernels of a package if it
    is installed. Only these kernels keep documents apart. Returns the distributions of the packages that are missing,
    and the names of the functions that mix tokens and that the model does not tell where documents begin.
    """
    missing: dict[str, None] = {}
    untold: dict[str, None] = {}

    def spy(name: str, function: Any, package: str, is_installed: bool) -> Callable[..., Any]:
        def called(*args: Any, **keywords: Any) -> Any:
            if keywords.get("cu_seqlens" if package == "fla" else "seq_idx") is None:
                untold[name] = None
            elif not is_installed:
                missing[_distribution(package)] = None
            if not is_installed:  # it raises an error for these
                keywords = {key: one for key, one in keywords.items() if key not in ("cu_seqlens", "seq_idx")}
            return function(*args, **keywords)

        return called

    with _replaced_kernel_functions(model, spy):
        try:
            call()
        except (TypeError, RuntimeError, ValueError, IndexError, KeyError, AttributeError):
            return [], []
    return list(missing), list(untold)


def _distribution(package: str) -> str:
    from transformers.integrations import hub_kernels

    return str(hub_kernels._PACKAGE_TO_DISTRIBUTION.get(package, package))


@contextmanager
def _replaced_kernel_functions(
    model: PreTrainedModel, replace: Callable[[str, Any, str, bool], Callable[..., Any]]
) -> Iterator[None]:
    """Replace the functions of a model's code for which transformers looks for a package with kernels.

    `replace` gets a function's name, the function, its package, and whether the package is installed. transformers
    keeps the last two as variables of the function (`use_kernel_func_from_hub_with_fallback`).
    """
    sources = {sys.modules[type(module).__module__] for module in model.modules()}
    found = []
    for source in sources:
        for name, function in list(vars(source).items()):
            if inspect.isfunction(function) and hasattr(function, "__wrapped__"):
                variables = inspect.getclosurevars(function).nonlocals
                if {"package", "is_new_implementation"} <= variables.keys():
                    found.append((source, name, function, variables["package"], variables["is_new_implementation"]))
    for source, name, function, package, is_installed in found:
        setattr(source, name, replace(name, function, package, is_installed))
    try:
        yield
    finally:
        for source, name, function, *_ in found:
            setattr(source, name, function)
