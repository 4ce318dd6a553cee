"""Continuing prompts: during training with any engine, and from a checkpoint."""

from __future__ import annotations

import inspect
import sys
import unicodedata
from collections.abc import Callable
from typing import Any

import torch

from hfpretrain.data.tokenizer import document_start
from hfpretrain.evaluation.checkpoint import load_checkpoint, require_embedded
from hfpretrain.modeling.structure import eval_mode
from hfpretrain.recipe.schema import RecipeError

_LENGTH_MULTIPLE = 32
_BIDIRECTIONAL = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # embeddings, overrides and isolates


@torch.no_grad()
def continue_text(
    model: Any,
    input_ids: list[int],
    num_tokens: int,
    *,
    context: int,
    eos_token_id: int,
    device: torch.device,
    broadcast: Callable[[torch.Tensor], torch.Tensor],
    temperature: float = 0.0,
    top_k: int = 50,
    seed: int = 0,
) -> list[int]:
    """Continue `input_ids` by up to `num_tokens` ids, until EOS: greedily at temperature 0, else sampled with `seed`.

    Each token needs a forward pass over the last `context` tokens, without a cache, which works with every engine. The
    input is padded at its end to a multiple of 32, which does not change a causal model's earlier logits. Without
    padding, kernels keep memory for each new length (64 lengths took 140 MiB on a CPU, for a model of 5 million
    parameters in bf16) and take twice the time. All ranks must call it. `broadcast` returns the main process's choice,
    int64 (1,), on every rank.
    """
    generator = torch.Generator().manual_seed(seed)
    keywords = inspect.signature(getattr(model, "module", model).forward).parameters
    last = {"logits_to_keep": _LENGTH_MULTIPLE} if "logits_to_keep" in keywords else {}
    new_ids: list[int] = []
    with eval_mode(model):
        while len(new_ids) < num_tokens:
            visible = [*input_ids, *new_ids][-context:]
            padding = min(-len(visible) % _LENGTH_MULTIPLE, context - len(visible))
            ids = torch.tensor([[*visible, *visible[-1:] * padding]], device=device)
            logits = model(input_ids=ids, use_cache=False, **last).logits[0, -1 - padding].float().cpu()
            if temperature:
                kept, token_ids = (logits / temperature).topk(min(top_k, len(logits)))
                choice = token_ids[torch.multinomial(kept.softmax(-1), 1, generator=generator)]
            else:
                choice = logits.argmax()[None]
            token = int(broadcast(choice.to(device)))
            if token == eos_token_id:
                break
            new_ids.append(token)
    return new_ids


def printable(text: str) -> str:
    """The text with U+FFFD in place of control characters, except line breaks and tabs, and of bidirectional controls.

    A model that is hardly trained writes them, and so do documents of the web. In a terminal they move the cursor,
    change colors, or show text in another order than it has.
    """
    return "".join("\ufffd" if _is_control(character) else character for character in text)


def _is_control(character: str) -> bool:
    return (unicodedata.category(character) == "Cc" and character not in "\n\t") or character in _BIDIRECTIONAL


def shown(text: str) -> str:
    """`printable(text)` if standard output is a terminal, else the text itself."""
    return printable(text) if sys.stdout.isatty() else text


def stream_text(model: str, prompt: str, max_new_tokens: int, temperature: float, top_k: int, seed: int) -> None:
    """Print `prompt` and its continuation by `model`, token by token, on a terminal as `printable`."""
    from transformers import TextStreamer, set_seed

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(shown(text), stream_end)

    tokenizer, network = load_checkpoint(model)
    set_seed(seed)
    # A prompt starts like a document in training.
    ids = [*document_start(tokenizer), *tokenizer.encode(prompt, add_special_tokens=False)]
    require_embedded(network, max(ids))
    context = getattr(network.config, "max_position_embeddings", None) or len(ids) + max_new_tokens
    if len(ids) >= context:
        raise RecipeError.at(
            "prompt", f"has {len(ids)} tokens, but must have fewer than the model's context of {context}"
        )
    input_ids = torch.tensor([ids], device=network.device)
    sampled = {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature else {"do_sample": False}
    network.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=min(max_new_tokens, context - len(ids)),
        pad_token_id=tokenizer.eos_token_id,
        streamer=Streamer(tokenizer, skip_special_tokens=True),
        **sampled,
    )
