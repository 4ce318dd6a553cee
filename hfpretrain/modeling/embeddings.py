"""Give a pretrained model embeddings for tokens that were added to its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import embedding_bag

from hfpretrain.recipe.schema import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def grown_vocab_size(vocab_size: int, tokenizer_size: int, padded_size: int) -> int:
    """Rows of the embeddings of a model with `vocab_size` rows, for a tokenizer of `tokenizer_size` ids.

    A model that has rows for all ids keeps its size, since many have more rows than tokens. Otherwise the size is
    `padded_size`, which is `tokenizer_size` rounded up.
    """
    return vocab_size if tokenizer_size <= vocab_size else padded_size


def add_token_embeddings(
    model: PreTrainedModel, first_id: int, pieces: Sequence[Sequence[int]], padded_size: int
) -> slice:
    """Set the embeddings of new tokens to the mean of those of other tokens. Changes the model and its config.

    This is done for the input embedding, and for the output embedding with its bias. Tied ones stay tied (Hewitt 2021,
    "Initializing New Word Embeddings for Pretrained Language Models"; Sachidananda et al. 2021, "Efficient Domain
    Adaptation of Language Models via Adaptive Tokenization"). `first_id`: the id of the first new token. `pieces`: for
    each new token, the ids whose mean it gets. `padded_size`: see `grown_vocab_size`; added rows that are no token get
    the mean of all old tokens. The result does not depend on the number of threads.

    Returns the rows that the base model did not have, or that had no token. Raises `RecipeError` if the model's class
    has other tensors with a row for each token.
    """
    text_config = model.config.get_text_config()
    size, old_size = first_id + len(pieces), text_config.vocab_size
    new_size = grown_vocab_size(old_size, size, padded_size)
    require_two_embeddings(model)
    modules = dict.fromkeys([model.get_input_embeddings(), model.get_output_embeddings()])
    parameters = {
        id(parameter): parameter
        for module in modules
        if module is not None
        for parameter in module.parameters()
        if parameter.shape[0] == old_size
    }
    for parameter in parameters.values():  # a tied one once
        parameter.data = _grow(parameter.data, first_id, pieces, new_size)
    for module in modules:
        for name in ("num_embeddings", "out_features"):
            if hasattr(module, name):
                setattr(module, name, new_size)
    text_config.vocab_size = new_size
    if hasattr(model, "vocab_size"):
        model.vocab_size = new_size
    return slice(first_id, new_size if new_size > old_size else size)


def _grow(old: torch.Tensor, first_id: int, pieces: Sequence[Sequence[int]], num_rows: int) -> torch.Tensor:
    """A tensor with `num_rows` rows: those of `old`, and the means of new tokens. Both have the shape (rows, ...)."""
    new = torch.empty(num_rows, *old.shape[1:], dtype=old.dtype)
    new[: len(old)] = old
    rows = new.view(num_rows, -1)
    size = first_id + len(pieces)
    # `embedding_bag` sums the rows of a bag in one thread, in their order.
    if num_rows > len(old):
        all_tokens = torch.arange(first_id)
        mean = embedding_bag(all_tokens, rows[:first_id], torch.tensor([0]), mode="mean")
        rows[max(size, len(old)) :] = mean
    ids = torch.tensor([number for some in pieces for number in some])
    starts = torch.tensor([0, *map(len, pieces)]).cumsum(0)[:-1]
    rows[first_id:size] = embedding_bag(ids, rows[:first_id], starts, mode="mean")
    return new


def require_two_embeddings(model: PreTrainedModel) -> None:
    """Raise `RecipeError` if a model's class has other tensors with a row for each token than its two embeddings."""
    from transformers import PreTrainedModel

    name = type(model).__name__
    head: Any = model.get_output_embeddings()
    # Such a class also has a tensor for each layer (Gemma 3n), or a bias outside of the output embedding (BART).
    resizes = any(
        getattr(type(model), method) is not getattr(PreTrainedModel, method)
        for method in ("resize_token_embeddings", "_resize_token_embeddings")
    )
    is_plain = isinstance(model.get_input_embeddings(), torch.nn.Embedding) and isinstance(head, torch.nn.Linear)
    if resizes or not is_plain:
        message = (
            f"{name} has more than an input and an output embedding for each token, which is not supported; leave "
        )
        raise RecipeError.at("tokenizer.extend", f"{message}it out, or use another model")
