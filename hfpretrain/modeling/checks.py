"""Tests of a built model: whether it is causal, keeps documents apart, and which loss its class computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from hfpretrain.modeling.build import model_error
from hfpretrain.modeling.loss import StepLoss, install, installed, summed_loss
from hfpretrain.modeling.structure import causal_lm
from hfpretrain.recipe.labels import IGNORE_INDEX
from hfpretrain.recipe.schema import ModelSection, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # attributes of models that add their output `aux_loss`
_TOLERANCE = 2e-5  # nats; rounding of a loss of some 10 nats in float32 is a tenth of it


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
    input_ids = torch.arange(length)[None].to(next(model.parameters()).device) % model.config.vocab_size
    perturbed = input_ids.clone()
    perturbed[:, length // 2 :] = (perturbed[:, length // 2 :] + 1) % model.config.vocab_size
    with torch.no_grad(), _steady_experts(model):
        try:
            first, second = (
                model(input_ids=ids, use_cache=False).logits[:, : length // 2].float() for ids in (input_ids, perturbed)
            )
        except Exception as error:  # the code of any model
            raise model_error(error, section) from error
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


def routing_note(model: PreTrainedModel) -> str:
    """A note on a model with experts that is trained on the next token's loss alone."""
    text = f"{type(model).__name__} trains without a balancing loss, so its router may come to use few of its experts"
    if getattr(model.config, "output_router_logits", None) is False:
        text += ". Set model.config.output_router_logits: true to add one"
    elif getattr(model.config, "router_aux_loss_coef", None) == 0:
        text += ". model.config.router_aux_loss_coef is 0"
    return text


def use_chunked_loss(model: Any, wanted: Literal["auto"] | bool, z_loss: float = 0.0) -> bool:
    """Let a model that is called with labels compute its loss in chunks, if that is its loss; says whether.

    Decided on the very model, as the engine prepared it, by its own loss on a small batch; all ranks must call it.
    Afterwards `model(..., labels, num_items_in_batch)` gives the same `loss`, and `logits` only of a call without
    labels. Raises `RecipeError` where `wanted` is true and the model's loss is another. `z_loss`: as of `head_loss`.
    """
    reason = None if wanted is False else _difference(model)
    if reason and (wanted is True or z_loss):
        key, fix = "chunked_loss", "set it to false or auto"
        if z_loss:
            key, fix = "z_loss", f"set it from {z_loss} to 0, and chunked_loss to auto, or take an engine other than tp"
        raise RecipeError.at(f"training.{key}", f"{type(causal_lm(model)).__name__} {reason}; {fix}")
    if wanted is False or reason:
        return False
    install(causal_lm(model), z_loss)
    return True


def examine_loss(model: Any) -> StepLoss:
    """Compare the loss of a model's class with the next token's by its own logits, on the model as the engine prepared
    it. All ranks must call it, after `use_chunked_loss`.

    Two small batches, which differ only in labels and number of items, tell an added term from a different loss.
    """
    network = causal_lm(model)
    coefficient = next((getattr(network, name) for name in _COEFFICIENTS if hasattr(network, name)), 0.0)
    first, second = (_class_adds(model, coefficient, shift) for shift in (0, 7))
    # NaN is not within the tolerance either.
    if first is None or second is None or not abs(first.unnamed - second.unnamed) <= _TOLERANCE:
        return StepLoss(from_logits=True, coefficient=coefficient)
    if abs(first.unnamed) > _TOLERANCE:
        return StepLoss(adds_own=True)
    return StepLoss(coefficient=coefficient if first.has_auxiliary else 0.0)


@dataclass(frozen=True)
class _Added:
    unnamed: float
    """The class's loss, less the next token's and the weighted `aux_loss`."""
    has_auxiliary: bool


def _class_adds(model: Any, coefficient: float, shift: int) -> _Added | None:
    """What the class adds to the loss of a batch whose labels are the tokens `shift` places further on; None where it
    can't be called as training calls it."""
    network = causal_lm(model)
    device = next(model.parameters()).device
    draw = torch.Generator().manual_seed(0)
    input_ids = torch.randint(network.config.get_text_config().vocab_size, (2, 16), generator=draw).to(device)
    labels = input_ids.roll(shift, 1)
    labels[:, :: shift + 5] = IGNORE_INDEX
    batch, num_items = {"input_ids": input_ids, "labels": labels}, torch.tensor(10 + shift)
    training = model.training
    model.eval()  # without dropout; in training Ulysses takes sequences of the length of blocks alone
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            outputs = model(**batch, use_cache=False, num_items_in_batch=num_items)
            added = float(outputs.loss) - float(summed_loss(outputs.logits, batch) / num_items)
            auxiliary = getattr(outputs, "aux_loss", None)
            named = 0.0 if auxiliary is None else coefficient * float(auxiliary)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return None
    finally:
        model.train(training)
    return _Added(added - named, auxiliary is not None)


def _difference(model: Any) -> str | None:
    """Why the chunked loss is not that of the model; None where they are equal to rounding.

    What a model does with logits behind its head (scaling, soft-capping) shows only in large ones, so the head's input
    is magnified.
    """
    network = causal_lm(model)
    head = network.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        return f"has no linear output embedding ({type(head).__name__})"
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(head.out_features, (2, 16), generator=generator).to(next(model.parameters()).device)
    labels = input_ids.clone()
    labels[:, ::5] = IGNORE_INDEX

    def loss() -> float:
        return float(model(input_ids=input_ids, labels=labels, use_cache=False, num_items_in_batch=10).loss)

    magnify = head.register_forward_pre_hook(lambda _, args: (args[0] * 300, *args[1:]))
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            whole = loss()
            with installed(network):
                chunked = loss()
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        return f"computes its loss in its own way ({' '.join(str(error).split()):.100})"
    finally:
        magnify.remove()
        model.train(training)
    if not abs(whole - chunked) <= 1e-3 * abs(whole):
        return "changes the logits behind its head, or has another loss than the next token's"
    return None
