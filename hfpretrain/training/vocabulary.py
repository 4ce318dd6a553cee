"""Checks that a recipe's tokenizer fits its model, before any text is tokenized."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hfpretrain.data.encode import Encoder, all_sources, require_special_tokens
from hfpretrain.data.extension import listed_size
from hfpretrain.data.tokenizer import load_tokenizer, padded_vocab_size, tokenizer_size, train_tokenizer
from hfpretrain.modeling.config import load_config, resolve_config, vocabulary_problem
from hfpretrain.recipe.schema import DataSection, ModelSection, Problem, RecipeError, TokenizerSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MIN_MATCHING_SHARE = 0.9


def check_tokenizer(
    model: ModelSection, section: TokenizerSection, data: DataSection, local_only: bool = False
) -> list[str]:
    """Check a pretrained tokenizer against the model and the data. Returns a sentence for each smaller difference.

    `local_only`: read only local folders, not the Hub. Raises `RecipeError` if ids have no embedding, if special ids
    differ, if most ids stand for other tokens than in the checkpoint that the run continues from, or if a source's
    `special_tokens` names tokens that the tokenizer does not have.
    """
    if any(not isinstance(source.special_tokens, str) for _, source in all_sources(data)):
        if section.pretrained is None:
            # A tokenizer that is trained on no text already has all special tokens.
            require_special_tokens(data, Encoder(train_tokenizer(section, []), np.dtype(np.int64)))
        elif not local_only or Path(section.pretrained).is_dir():
            require_special_tokens(data, Encoder(load_tokenizer(section), np.dtype(np.int64)))
    named = [name for name in (model.pretrained, section.pretrained) if name is not None]
    if local_only and not all(Path(name).is_dir() for name in named):
        return []
    if section.pretrained is None:
        if model.pretrained is not None:
            rows = load_config(model).vocab_size
            if section.vocab_size is not None and section.vocab_size > rows:
                message = vocabulary_problem(rows, section.vocab_size, model).message
                raise RecipeError.at("tokenizer.vocab_size", message)
        return []
    tokenizer = load_tokenizer(section)
    size, longest = tokenizer_size(tokenizer), (data.longest_block_size, data.longest_block_key)
    if section.extend is not None:
        extended_size = listed_size(section.extend, tokenizer)
        # The embeddings of a pretrained model grow, those of a new model have the size that the recipe sets.
        size = size if model.pretrained is not None else extended_size
    resolve_config(model, padded_vocab_size(section, size), tokenizer, size, *longest)
    return require_matching_ids(model, section, tokenizer)


def require_matching_ids(
    model: ModelSection, section: TokenizerSection, tokenizer: PreTrainedTokenizerFast
) -> list[str]:
    """Compare the run's tokenizer with that of the model's checkpoint, whose ids should stand for the same tokens.

    Returns a sentence if some don't. Raises `RecipeError` if most don't.
    """
    if model.pretrained is None or model.pretrained == section.pretrained:
        return []
    # `tokenizer.trust_remote_code` does not apply to the code of the model's repo.
    base = TokenizerSection(pretrained=model.pretrained, revision=model.revision)
    try:
        own = load_tokenizer(base).get_vocab()
    except RecipeError:
        return [f"the tokenizer of {model.pretrained} can't be loaded, so the recipe's was not compared with it"]
    known = set(own.values())
    both = [(token, number) for token, number in tokenizer.get_vocab().items() if number in known]
    same = sum(own.get(token) == number for token, number in both)
    if same < _MIN_MATCHING_SHARE * len(both):
        key = "tokenizer.pretrained" if section.pretrained else "tokenizer.algorithm"
        message = (
            f"of the {len(both):,} token ids that this tokenizer shares with that of {model.pretrained}, only {same:,} "
            "stand for the same token, so the model would misread the text. Use the model's own tokenizer. If the "
            "model was trained with this one, save it in the model's folder"
        )
        raise RecipeError(Problem(key, message))
    if same == len(both):
        return []
    return [f"{len(both) - same:,} token ids stand for other tokens in the tokenizer of {model.pretrained}"]
