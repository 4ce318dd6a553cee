"""Tests of a built model: whether it is causal, whether packed documents affect each other, which loss it computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from hfpretrain.modeling.build import model_error
from hfpretrain.modeling.documents import (
    WAYS,
    Boundaries,
    boundary_keywords,
    boundary_masks,
    layers_that_mix,
    packages_to_keep_apart,
    pass_boundaries,
)
from hfpretrain.modeling.loss import StepLoss, chunked_loss_installed, install_chunked_loss, summed_loss
from hfpretrain.modeling.routers import COEFFICIENTS
from hfpretrain.modeling.structure import causal_lm, decoder_layers, eval_mode
from hfpretrain.recipe.labels import IGNORE_INDEX
from hfpretrain.recipe.schema import ModelSection, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What the code of a class raises for arguments that it does not expect.
_CALL_ERRORS = (TypeError, RuntimeError, ValueError, IndexError, KeyError, AttributeError)
_TOLERANCE = 2e-5  # nats; rounding a loss of about 10 nats to float32 changes it by a tenth of this


@contextlib.contextmanager
def _comparable_experts(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode in which a token's output does not depend on the experts of other tokens.

    The implementation `batched_mm` is used. The others sum in an order that depends on the experts of other tokens. In
    16 bits, the difference in the last digit can change which expert is chosen.
    """
    implementation = model.config._experts_implementation
    model.set_experts_implementation("batched_mm")
    try:
        with eval_mode(model):
            yield
    finally:
        model.set_experts_implementation(implementation)


def require_causal(
    model: PreTrainedModel, section: ModelSection, half_precision: bool = False, length: int = 8
) -> None:
    """Raise `RecipeError` if a later token changes an earlier prediction. All ranks must call it.

    transformers builds some encoders as causal LMs, and they would learn to copy their input. `half_precision`: whether
    the model computes in 16 bits. The comparison has a tolerance, because models with their own code for experts may
    sum in an order that depends on the other tokens.
    """
    input_ids = torch.arange(length)[None].to(next(model.parameters()).device) % model.config.vocab_size
    perturbed = input_ids.clone()
    perturbed[:, length // 2 :] = (perturbed[:, length // 2 :] + 1) % model.config.vocab_size
    with torch.no_grad(), _comparable_experts(model):
        try:
            first, second = (
                model(input_ids=ids, use_cache=False).logits[:, : length // 2].float() for ids in (input_ids, perturbed)
            )
        except Exception as error:  # a model's code may raise anything
            raise model_error(error, section) from error
    rtol, atol = (2e-2, 1e-2 * first.std().item()) if half_precision else (1e-3, 1e-4)
    if not torch.allclose(first, second, rtol, atol):
        fix = "; use another model"
        if getattr(model.config, "is_decoder", None) is False:
            fix = f"; set {section.config_key}.is_decoder: true, which some classes support, or use another model"
        message = f"{type(model).__name__} is not causal: its predictions depend on later tokens{fix}"
        raise RecipeError.at("model.config" if section.pretrained is None else "model.pretrained", message)


def keep_documents_apart(model: PreTrainedModel, block_size: int) -> str | None:
    """Make packed documents not affect each other. Returns why that can't be done; None if it is done.

    The positions of the tokens are enough for most models. Flash attention, gated delta rules and Mamba layers are told
    where documents begin, see `documents.pass_boundaries`. All ranks must call it.
    """
    isolation = find_isolation(model, block_size)
    if isolation.boundaries is not None:
        pass_boundaries(model, isolation.boundaries)
    return isolation.leak


@dataclass(frozen=True)
class Isolation:
    """Whether a model keeps packed documents apart, and what it needs for that."""

    leak: str | None
    """Why it can't; None if it can."""
    boundaries: Boundaries | None = None
    """How it must be told where documents begin, see `documents.pass_boundaries`; None if positions are enough."""


def find_isolation(model: PreTrainedModel, block_size: int) -> Isolation:
    """Find out how a model keeps packed documents apart. All ranks must call it."""
    leak = leak_reason(model, block_size)
    if leak is None:
        return Isolation(None)
    for boundaries in WAYS:
        undo = pass_boundaries(model, boundaries)
        try:
            if leak_reason(model, block_size) is None:
                return Isolation(None, boundaries)
        finally:
            undo()
    return Isolation(leak)


def leak_reason(model: PreTrainedModel, block_size: int) -> str | None:
    """Why packed documents affect each other although their positions restart; None if they are isolated.

    The model is called with rows of two documents each. The logits of the second document must stay exactly the same if
    the tokens of the first change. They must also stay the same if one position, in the first document or in another
    row, is set to the last position of a block. All ranks must call it.
    """
    # Two rows, since some attention implementations isolate documents only in a batch of one.
    input_ids, positions = _two_documents(model, block_size)
    length = positions.shape[1]
    half = length // 2
    perturbed = input_ids.clone()
    perturbed[:, :half] = (perturbed[:, :half] + 1) % model.config.vocab_size
    # Rotary frequencies may depend on the largest position (rope_type dynamic and longrope).
    long_row, long_document = positions.clone(), positions.clone()
    long_row[1] = torch.arange(length)
    long_row[1, -1] = long_document[0, half - 1] = max(length, block_size) - 1

    def logits(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, half:]

    with torch.no_grad(), _comparable_experts(model):
        try:
            first, second = logits(input_ids, positions), logits(perturbed, positions)
            third, fourth = (logits(input_ids, changed)[0] for changed in (long_row, long_document))
        except _CALL_ERRORS as error:
            text = " ".join(str(error).split())
            return f"{type(model).__name__} does not accept positions that restart at each document ({text:.100})"
    if not torch.equal(first, second):
        attention = model.config._attn_implementation
        return f"{type(model).__name__} with {attention} attention lets packed documents see each other"
    if not (torch.equal(first[0], third) and torch.equal(first[0], fourth)):
        return f"in {type(model).__name__} the longest document of a micro-batch changes the rotary positions of others"
    return None


def _two_documents(model: PreTrainedModel, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and positions of two rows of two documents each, which have half a row: two int64 (2, length)."""
    length = max(4, min(16, block_size, getattr(model.config, "max_position_embeddings", 16) or 16))
    half = length // 2
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(model.config.vocab_size, (2, length), generator=generator).to(device)
    return input_ids, torch.cat([torch.arange(half), torch.arange(length - half)]).repeat(2, 1).to(device)


def explain_leak(model: PreTrainedModel, block_size: int, leak: str) -> str:
    """`leak`, the `Isolation.leak` of a model, with the layers that mix documents and what would keep them apart.

    All ranks must call it.
    """
    input_ids, positions = _two_documents(model, block_size)
    keywords: dict[str, Any] = {"input_ids": input_ids, "position_ids": positions, "use_cache": False}
    keywords |= _accepted_masks(model, positions)
    with torch.no_grad(), _comparable_experts(model):
        mixing = layers_that_mix(model, lambda: model(**keywords), positions.shape[1] // 2)
        missing, untold = packages_to_keep_apart(model, lambda: model(**keywords, **boundary_keywords(positions)))
    name, number = type(model).__name__, len(decoder_layers(model))
    which = f"the {' and '.join(sorted(set(mixing)))} layers of {name} ({len(mixing)} of {number})" if mixing else name
    if untold:
        names = " and ".join(f"`{function}`" for function in untold)
        return f"{which} let packed documents see each other: transformers does not tell {names} where documents begin"
    if missing:
        return f"{which} can keep packed documents apart only on GPUs with {' and '.join(missing)} installed"
    if 0 < len(mixing) < number:
        return f"{which} let packed documents see each other, with {model.config._attn_implementation} attention"
    return leak


def _accepted_masks(model: PreTrainedModel, positions: torch.Tensor) -> dict[str, Any]:
    """The argument `attention_mask` that keeps documents apart, if the model accepts it."""
    try:
        masks = boundary_masks(model, positions)
        with torch.no_grad(), _comparable_experts(model):
            model(input_ids=positions, position_ids=positions, attention_mask=masks, use_cache=False)
    except _CALL_ERRORS:
        return {}
    return {"attention_mask": masks}


def isolating_attention(model: PreTrainedModel, block_size: int) -> str | None:
    """The attention implementation, other than a model's own, with which it keeps packed documents apart, if any.

    All ranks must call it.
    """
    own = model.config._attn_implementation
    for name in ("sdpa", "eager"):
        try:
            model.set_attn_implementation(name)
            if name != own and leak_reason(model, block_size) is None:
                return name
        except ValueError:  # the class does not support it
            continue
        finally:
            model.set_attn_implementation(own)
    return None


def resolve_document_masking(
    wanted: Literal["auto"] | bool, leak: str | None, packs_documents: bool, model: PreTrainedModel, block_size: int
) -> bool:
    """Whether attention ends at document boundaries.

    `wanted`: the recipe's `training.document_masking`. `leak`: the `Isolation.leak` of `model`. `packs_documents`:
    whether a block may have several documents. Raises `RecipeError` if documents leak and `wanted` is true, or `wanted`
    is `auto` and a block may have several documents. All ranks must call it.
    """
    if wanted is False or leak is None:
        return wanted is not False
    if wanted == "auto" and not packs_documents:
        return False
    other = isolating_attention(model, block_size)
    fix = "use another model" if other is None else f"set model.attn_implementation: {other}, which keeps them apart"
    fix = f"set it to false to let documents see each other, or {fix} (got {wanted!r})"
    message = f"packed documents can't be kept apart: {explain_leak(model, block_size, leak)}; {fix}"
    raise RecipeError.at("training.document_masking", message)


def use_chunked_loss(model: Any, wanted: Literal["auto"] | bool, z_loss: float = 0.0) -> bool:
    """Make a model compute its loss in chunks when it is called with labels, if that gives the same loss.

    Returns whether the loss is computed in chunks. `model`: as the engine prepared it. To compare the losses, it is
    called with a small batch, once with chunks and once without. With chunks, a call with labels returns the same
    `loss`, and losses in place of `logits`. `z_loss`: see `loss.head_loss`. All ranks must call it. Raises
    `RecipeError` if the losses differ, and `wanted` is true or `z_loss` is not 0.
    """
    reason = None if wanted is False else _chunking_problem(model)
    if reason and (wanted is True or z_loss):
        key, fix = "chunked_loss", "set it to auto or false"
        if z_loss:
            key, fix = "z_loss", f"set it to 0 (got {z_loss}) and chunked_loss to auto, or use an engine other than tp"
        raise RecipeError.at(f"training.{key}", f"{type(causal_lm(model)).__name__} {reason}; {fix}")
    if wanted is False or reason:
        return False
    install_chunked_loss(causal_lm(model), z_loss)
    return True


def examine_loss(model: Any) -> StepLoss:
    """Find out how to compute the next-token loss with a model, as the engine prepared it.

    The loss that the class returns is compared with the one computed from its logits, for two small batches that differ
    in labels and number of items. If the difference is the same for both, the class adds a term that does not depend on
    the labels; if not, it computes another loss. All ranks must call it, after `use_chunked_loss`.
    """
    network = causal_lm(model)
    coefficient = next((getattr(network, name) for name in COEFFICIENTS if hasattr(network, name)), 0.0)
    first, second = (_find_added_loss(model, coefficient, shift) for shift in (0, 7))
    # `not <=` and not `>`, so that NaN counts as a difference.
    if first is None or second is None or not abs(first.not_in_outputs - second.not_in_outputs) <= _TOLERANCE:
        return StepLoss(from_logits=True, coefficient=coefficient)
    if abs(first.not_in_outputs) > _TOLERANCE:
        return StepLoss(adds_own=True)
    return StepLoss(coefficient=coefficient if first.has_auxiliary else 0.0)


@dataclass(frozen=True)
class _AddedLoss:
    """What a class adds to the next-token loss."""

    not_in_outputs: float
    """The difference between the class's loss and the next-token loss, less the weighted output `aux_loss`."""
    has_auxiliary: bool


def _find_added_loss(model: Any, coefficient: float, shift: int) -> _AddedLoss | None:
    """What the class adds for a batch with labels shifted by `shift`; None if the model can't be called like this."""
    batch = _sample_batch(model, shift=shift, ignore_every=shift + 5)
    num_items = torch.tensor(10 + shift)
    try:
        with _quiet_eval(model):
            outputs = model(**batch, use_cache=False, num_items_in_batch=num_items)
            added = float(outputs.loss) - float(summed_loss(outputs.logits, batch) / num_items)
            auxiliary = getattr(outputs, "aux_loss", None)
            in_outputs = 0.0 if auxiliary is None else coefficient * float(auxiliary)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return None
    return _AddedLoss(added - in_outputs, auxiliary is not None)


def _chunking_problem(model: Any) -> str | None:
    """Why the chunked loss differs from the model's own; None if they are equal up to rounding.

    The input of the output embedding is multiplied by 300, because scaling and soft-capping show only in large logits.
    """
    network = causal_lm(model)
    head = network.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        return f"has no linear output embedding ({type(head).__name__})"
    batch = _sample_batch(model)

    def loss() -> float:
        return float(model(**batch, use_cache=False, num_items_in_batch=10).loss)

    magnify = head.register_forward_pre_hook(lambda _, args: (args[0] * 300, *args[1:]))
    try:
        with _quiet_eval(model):
            whole = loss()
            with chunked_loss_installed(network):
                chunked = loss()
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        return f"computes its loss in its own way ({' '.join(str(error).split()):.100})"
    finally:
        magnify.remove()
    if not abs(whole - chunked) <= 1e-3 * abs(whole):
        return "changes the logits after its output embedding, or computes another loss than that of the next token"
    return None


@contextlib.contextmanager
def _quiet_eval(model: Any) -> Iterator[None]:
    """Eval mode without gradients and without compiling.

    Eval mode turns off dropout. It also lets Ulysses take short sequences; in training mode it takes only sequences of
    the block size.
    """
    with eval_mode(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


def _sample_batch(model: Any, shift: int = 0, ignore_every: int = 5) -> dict[str, torch.Tensor]:
    """Two rows of 16 random tokens. The label of a token is the one `shift` positions before it.

    One label in `ignore_every` is ignored.
    """
    vocab_size = causal_lm(model).config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(0)
    input_ids = torch.randint(vocab_size, (2, 16), generator=draw).to(next(model.parameters()).device)
    labels = input_ids.roll(shift, 1)
    labels[:, ::ignore_every] = IGNORE_INDEX
    return {"input_ids": input_ids, "labels": labels}
