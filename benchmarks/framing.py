"""Show that text begins for a base model in hfpretrain as it does in plain transformers, lm-eval and TRL.

    python benchmarks/framing.py [--bases llama gemma2 ...] [--documents 64] [--base-steps 60] [--steps 30] [--json]

The bases are made and trained here by transformers alone: a tokenizer, and a tiny model that learned `tokenizer(text)`
followed by EOS. Then hfpretrain trains each base further. The first table compares, before that training, the loss of
every token in hfpretrain (prepared data, packed with neighbors, documents masked, the engine's forward pass) with that
of plain transformers on the document alone. It also has the mean loss of the first eight tokens of held-out documents
in plain transformers, before and after the training. The second table says who begins a text with which tokens.
"""

import argparse
import contextlib
import io
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import yaml
from small import small_text, write_jsonl

TOLERANCE = 1e-5
FIRST = 8
"""Number of tokens after a document's start whose mean loss is compared."""
_SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
_LAYERS = {"num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1, **_SIZE}


@dataclass(frozen=True)
class Base:
    """How to make a base: the class of its tokenizer, the config of its model, and how its folder is saved."""

    tokenizer: str
    config: dict[str, Any]
    begins_with: str
    """The token that training has before the text of a document."""
    add_bos: bool = False
    """Whether calling the tokenizer adds BOS."""
    saved: dict[str, Any] = field(default_factory=dict)
    """Keywords of `save_pretrained`."""
    dtype: str = "float32"
    """Of the saved weights."""


BASES = {
    "llama": Base(
        "LlamaTokenizer",
        {"model_type": "llama", "tie_word_embeddings": False, **_LAYERS},
        "<s>",
        add_bos=True,
        saved={"max_shard_size": "40KB"},
    ),
    "gemma2": Base(
        "GemmaTokenizer",
        {"model_type": "gemma2", "final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0, "sliding_window": 16,
         "query_pre_attn_scalar": 8, **_LAYERS},
        "<bos>",
        add_bos=True,
    ),
    "gemma3": Base(
        "GemmaTokenizer",
        {"model_type": "gemma3_text", "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"],
         "query_pre_attn_scalar": 8, **_LAYERS},
        "<bos>",
        add_bos=True,
        dtype="bfloat16",
    ),
    "qwen3": Base(
        "Qwen2Tokenizer", {"model_type": "qwen3", "tie_word_embeddings": True, **_LAYERS}, "<|endoftext|>",
        dtype="bfloat16",
    ),
    "gpt2": Base(
        "GPT2Tokenizer",
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.1},
        "<|endoftext|>",
    ),
}  # fmt: skip


def make_tokenizer(base: Base, texts: list[str], vocab_size: int = 400) -> Any:
    """A tokenizer of the base's class, trained on `texts`."""
    import transformers

    made = getattr(transformers, base.tokenizer)
    trained = made().train_new_from_iterator(texts, vocab_size, show_progress=False)
    if not base.add_bos:
        return trained
    # A character without a token becomes its bytes, as in the tokenizers of Llama 2 and Gemma.
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    own = list(trained.get_added_vocab())
    names = dict.fromkeys([*own, *(f"<0x{value:02X}>" for value in range(256)), *model["vocab"]])
    vocabulary = {name: number for number, name in enumerate(names)}
    return made(vocab=vocabulary, merges=[tuple(pair) for pair in model["merges"]], add_bos_token=True)


def make_base(base: Base, folder: Path, texts: list[str], steps: int) -> None:
    """Write a base's folder. Its model is trained on one document a row, as `tokenizer(text)` followed by EOS."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer(base, texts)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(**base.config, vocab_size=len(tokenizer), **special)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    rows = [torch.tensor(start(base, tokenizer) + ids) for ids in documents(tokenizer, texts)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        chosen = [rows[number % len(rows)] for number in range(8 * step, 8 * step + 8)]
        padded = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=-100)
        # Padding comes after the text, so a causal model needs no mask.
        model(input_ids=padded.clamp(min=0), labels=padded, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(getattr(torch, base.dtype)).save_pretrained(folder, **base.saved)
    tokenizer.save_pretrained(folder)


def documents(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """`tokenizer(text)` and EOS, for each text."""
    return [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]


def start(base: Base, tokenizer: Any) -> list[int]:
    """What is before `tokenizer(text)` in the middle of a block: nothing if it begins with BOS, else EOS."""
    return [] if base.add_bos else [tokenizer.eos_token_id]


def plain_losses(model: Any, ids: list[int]) -> np.ndarray:
    """The loss of every token but the first, by plain transformers on this document alone: (length - 1,)."""
    import torch

    row = torch.tensor([ids])
    with torch.no_grad():
        logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none").numpy()


def write_recipe(folder: Path, name: str, base: Path, block_size: int, steps: int) -> Path:
    """A recipe `name` that trains the base in the folder `base` further on `folder/corpus.jsonl`."""
    recipe = {
        "output_dir": str(folder / name),
        "model": {"pretrained": str(base)},
        "tokenizer": {"pretrained": str(base)},
        "data": {
            "sources": [{"path": "json", "data_files": str(folder / "corpus.jsonl")}],
            "validation_sources": [{"path": "json", "data_files": str(folder / "held_out.jsonl")}],
            "block_size": block_size,
        },
        "optimizer": {"lr": 1e-3},
        "scheduler": {"name": "constant"},
        "training": {
            "tokens_per_step": 8 * block_size,
            "micro_batch_size": 2,
            "max_steps": steps,
            "mixed_precision": "no",
            "document_masking": True,
        },
        "evaluation": {"prompts": [""], "sample_tokens": 1},
        "logging": {"trackers": []},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Packed:
    """What hfpretrain computes for its first steps before any update."""

    pieces: list[tuple[list[int], np.ndarray]]
    """Each stretch of a row that attention can't leave: its ids (n,), and the loss of every id but the first."""
    loss: float
    """The loss of the first step, as it is logged."""
    mean: float
    """The mean of the losses of all tokens of the first step."""


def packed_losses(recipe: Path, num_steps: int) -> Packed:
    """The losses of the training data in the first steps, by the engine's model before any update."""
    import torch

    from hfpretrain import load_recipe
    from hfpretrain.data.batches import training_data
    from hfpretrain.modeling.loss import token_losses
    from hfpretrain.modeling.structure import eval_mode
    from hfpretrain.recipe.labels import IGNORE_INDEX
    from hfpretrain.training.loop import compute_gradients
    from hfpretrain.training.setup import set_up, start_engine
    from hfpretrain.training.watchdog import Watch

    loaded = load_recipe(recipe)
    with Watch() as watch:
        engine = start_engine(loaded, watch)
        setup = set_up(loaded, engine, watch, lambda: None)
    data = training_data(
        loaded.data,
        loaded.training,
        loaded.seed,
        setup.prepared,
        num_processes=1,
        process_index=0,
        document_masking=setup.document_masking,
    )
    assert setup.document_masking
    pieces: list[tuple[list[int], np.ndarray]] = []
    means = []
    for step in range(num_steps):
        counted: list[np.ndarray] = []
        for batch in data.step(step).batches:
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            with eval_mode(engine.model):
                losses = token_losses(engine.model, inputs, batch["labels"]).numpy()
            is_counted = (batch["labels"] != IGNORE_INDEX).numpy()
            counted.append(losses[is_counted[:, 1:]])
            for row, positions, some, wanted in zip(
                batch["input_ids"].numpy(), batch["position_ids"].numpy(), losses, is_counted, strict=True
            ):
                begins = [*np.flatnonzero(positions == 0).tolist(), len(row)]
                for first, end in itertools.pairwise(begins):
                    # EOS belongs to the document before it, and also begins the next one where there is no BOS.
                    last = end + 1 if end < len(row) and wanted[end] else end
                    pieces.append((row[first:last].tolist(), some[first : last - 1]))
        means.append(float(np.concatenate(counted).astype(np.float64).mean()))
    with eval_mode(engine.model), torch.enable_grad():
        loss, _ = compute_gradients(engine, setup.step_loss, data.step(0), lambda _: None)
    return Packed(pieces, loss, means[0])


@dataclass(frozen=True)
class Equality:
    """Losses in hfpretrain beside those of plain transformers, for the pieces that begin with a document."""

    tokens: int
    pieces: int
    """Pieces that are compared."""
    others: int
    """Pieces that are not: they continue a document that the row before has cut, or have few tokens."""
    largest: float
    """Largest absolute difference of a token's loss."""
    first: np.ndarray
    """Mean loss in hfpretrain of each of the first tokens of a document: (FIRST,)."""
    later: float
    """Mean loss of the tokens after them."""


def load(folder: Path) -> tuple[Any, Any]:
    """The tokenizer and the model of a folder, by transformers alone, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(folder), model.eval()


def compare(base: Base, folder: Path, packed: Packed, texts: list[str]) -> Equality:
    """Compare the losses in `packed` with plain transformers on each document of `texts` alone."""
    tokenizer, model = load(folder)
    # Without BOS, nothing stands before the first document of a block.
    framed = [[*begin, *ids] for ids in documents(tokenizer, texts) for begin in ([], start(base, tokenizer))]
    differences: list[np.ndarray] = []
    first, later = [], []
    for ids, losses in packed.pieces:
        if len(ids) <= FIRST or not any(whole[: len(ids)] == ids for whole in framed):
            continue
        differences.append(np.abs(losses - plain_losses(model, ids)))
        first.append(losses[:FIRST])
        later.append(losses[FIRST:])
    compared, others = np.concatenate(differences), len(packed.pieces) - len(differences)
    later_mean = float(np.concatenate(later).mean())
    return Equality(len(compared), len(differences), others, float(compared.max()), np.mean(first, axis=0), later_mean)


def plain_first_loss(base: Base, folder: Path, texts: list[str], with_bos: bool = True) -> float:
    """Mean loss of the first tokens of each text in plain transformers, which begins it as training did.

    Without `with_bos`, a text begins after EOS instead.
    """
    tokenizer, model = load(folder)
    tables = []
    for text in texts:
        whole, ids = tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
        before = whole[: len(whole) - len(ids)] if with_bos and base.add_bos else [tokenizer.eos_token_id]
        tables.append(plain_losses(model, before + ids[:FIRST]))
    return float(np.mean(tables))


def evaluate_difference(base: Base, folder: Path, texts: list[str]) -> float:
    """Absolute difference of the loss of `hfpretrain evaluate` from that of plain transformers."""
    from hfpretrain.evaluation.score import Windows, evaluate_checkpoint

    tokenizer, model = load(folder)
    sets = {str(number): [text] for number, text in enumerate(texts)}  # so that each text begins a block
    report = evaluate_checkpoint(str(folder), sets, Windows(block_size=256))
    expected = np.concatenate([plain_losses(model, ids) for ids in documents(tokenizer, texts)])
    assert report["tokens"] == len(expected)
    return abs(report["loss"] - float(expected.mean(dtype=np.float64)))


def beginnings(base: Base, folder: Path, text: str) -> Iterator[tuple[str, list[int]]]:
    """How each program begins a text with the model in `folder`: its name, and the ids that the model gets."""
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import GenerationMixin

    from hfpretrain.evaluation import lm_eval_tasks, prompts, score, sums

    tokenizer, model = load(folder)
    with mock.patch.object(GenerationMixin, "generate") as generate:
        prompts.stream_text(str(folder), text, max_new_tokens=1, temperature=0, top_k=1, seed=0)
    yield "hfpretrain generate", generate.call_args.args[0][0].tolist()

    with mock.patch.object(sums, "collate", wraps=sums.collate) as collate:
        score.evaluate_checkpoint(str(folder), {"": ["before", text]}, score.Windows(block_size=256))
    row = collate.call_args.args[0][0].tolist()
    end = row.index(tokenizer.eos_token_id)  # of the document before
    yield "hfpretrain evaluate", row[end + 1 if base.add_bos else end :]

    def requested(language_model: Any, kind: str) -> list[int]:
        """The ids of a request of lm-eval, as the model would get them."""
        given = (text, " more") if kind == "loglikelihood" else (text,)
        request = Instance(request_type=kind, doc={}, arguments=given, idx=0)
        seen: list[int] = []

        def answer(_: Any, requests: Any, **__: Any) -> list[Any]:
            seen.extend([*requests[0][1], *requests[0][2]])
            return [(0.0, False)]

        with mock.patch.object(HFLM, "_loglikelihood_tokens", answer):
            getattr(language_model, kind)([request], disable_tqdm=True)
        return seen

    processes = lm_eval_tasks.Processes()
    shared = lm_eval_tasks.shared_language_model(model, tokenizer, torch.device("cpu"), 1, processes)
    for kind in ("loglikelihood", "loglikelihood_rolling"):
        yield f"hfpretrain evaluate --tasks, {kind}", requested(shared, kind)
    for add_bos in (None, True, False):
        plain = HFLM(pretrained=str(folder), add_bos_token=add_bos, dtype="float32", device="cpu", batch_size=1)
        for kind in ("loglikelihood", "loglikelihood_rolling"):
            yield f"lm-eval, add_bos_token={add_bos}, {kind}", requested(plain, kind)

    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory() as scratch:
        config = SFTConfig(output_dir=scratch, report_to="none", bf16=False, use_cpu=True)
        given = Dataset.from_dict({"text": [text]})
        trainer = SFTTrainer(model, args=config, train_dataset=given, processing_class=tokenizer)
    yield "TRL SFTTrainer", trainer.train_dataset["input_ids"][0]


def begins_as_trained(base: Base, tokenizer: Any, text: str, ids: list[int]) -> bool:
    """Whether `ids` begin with what a document begins with in training, then the first tokens of `text`.

    That is BOS, or, without BOS, the EOS of the document before, or nothing at the start of a block.
    """
    text_ids = tokenizer(text, add_special_tokens=False)["input_ids"][:3]
    before = [[tokenizer.bos_token_id]] if base.add_bos else [[tokenizer.eos_token_id], []]
    return any(ids[: len(begin) + 3] == begin + text_ids for begin in before)


def prove(name: str, num_documents: int, base_steps: int, steps: int) -> dict[str, Any]:
    """Make a base, train it further, and return the figures of both tables."""
    from hfpretrain import load_recipe
    from hfpretrain import train as train_recipe

    base = BASES[name]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        texts, held_out = small_text(num_documents), small_text(8, seed=1)
        write_jsonl(folder / "corpus.jsonl", texts)
        write_jsonl(folder / "held_out.jsonl", held_out)
        make_base(base, folder / "base", texts, base_steps)
        recipe = write_recipe(folder, "run", folder / "base", 256, steps)
        before = packed_losses(recipe, 1)
        at_base = compare(base, folder / "base", before, texts)
        with contextlib.redirect_stdout(io.StringIO()):
            export = train_recipe(load_recipe(recipe))
        after = compare(base, export, packed_losses(write_recipe(folder, "again", export, 256, steps), 1), texts)
        tokenizer, _ = load(export)
        text = held_out[0]
        return {
            "base": name,
            "begins": tokenizer.decode([(start(base, tokenizer) + tokenizer(text)["input_ids"])[0]]),
            "tokens": at_base.tokens,
            "pieces": at_base.pieces,
            "others": at_base.others,
            "difference": at_base.largest,
            "step_loss_difference": abs(before.loss - before.mean),
            "difference_after": after.largest,
            "evaluate_difference": evaluate_difference(base, export, held_out),
            "first": [float(at_base.first.mean()), float(after.first.mean())],
            "largest_rise": float((after.first - at_base.first).max()),
            "later": [at_base.later, after.later],
            "plain_first": plain_first_loss(base, export, texts),
            "plain_first_after_eos": plain_first_loss(base, export, texts, with_bos=False),
            "beginnings": [
                [who, ids[:4], begins_as_trained(base, tokenizer, text, ids)]
                for who, ids in beginnings(base, export, text)
            ],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=list(BASES))
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--base-steps", type=int, default=60)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    args = parser.parse_args()
    found = [prove(name, args.documents, args.base_steps, args.steps) for name in args.bases]
    if args.json:
        print(json.dumps(found))
    else:
        print(_tables(found))
    equal = ("difference", "difference_after", "step_loss_difference", "evaluate_difference")
    sys.exit(any(row[key] > TOLERANCE for row in found for key in equal))


def _tables(found: list[dict[str, Any]]) -> str:
    lines = [
        "| base | documents begin with | tokens compared | largest difference, base | largest difference, trained | "
        f"`evaluate` | first {FIRST}: base, trained | later: base, trained | largest rise of the first {FIRST} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        first, later = (", ".join(f"{loss:.2f}" for loss in row[key]) for key in ("first", "later"))
        lines.append(
            f"| {row['base']} | `{row['begins']}` | {row['tokens']:,} | {row['difference']:.1e} | "
            f"{row['difference_after']:.1e} | {row['evaluate_difference']:.1e} | {first} | {later} | "
            f"{row['largest_rise']:+.2f} |"
        )
    lines += ["", f"| begins a text as training did | {' | '.join(row['base'] for row in found)} |"]
    lines.append("|---" * (len(found) + 1) + "|")
    for number, (who, *_) in enumerate(found[0]["beginnings"]):
        cells = (f"{'yes' if row['beginnings'][number][2] else 'NO'}: {row['beginnings'][number][1]}" for row in found)
        lines.append(f"| {who} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
