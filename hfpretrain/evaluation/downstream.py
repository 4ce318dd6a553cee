"""Compare the first fine-tuning loss that other libraries compute with hfpretrain's evaluation of the same text."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from typing import Any

import numpy as np
import torch

from hfpretrain.data.encode import Encoder
from hfpretrain.data.tokenizer import load_tokenizer
from hfpretrain.evaluation.score import Windows, evaluate_checkpoint
from hfpretrain.evaluation.texts import Texts
from hfpretrain.recipe.labels import IGNORE_INDEX
from hfpretrain.recipe.schema import RecipeError, TokenizerSection

TOLERANCE = 1e-5
_MAX_CONTEXT, _MAX_DOCUMENTS, _MAX_TOKENS = 1024, 64, 2**14
_BATCH_SIZE = 8


@dataclass(frozen=True)
class Row:
    """One way to fine-tune: its first loss and the evaluated loss, in nats per token, and the tokens of each."""

    way: str
    tokens: int
    loss: float
    evaluated: float
    evaluated_tokens: int

    @property
    def is_equal(self) -> bool:
        """Whether both losses are equal up to 1e-5, over the same number of tokens."""
        return self.tokens == self.evaluated_tokens and abs(self.loss - self.evaluated) <= TOLERANCE


def compare(model: str, texts: Texts) -> tuple[list[Row], list[str]]:
    """Return a row for every way to fine-tune whose package is installed, and notes on what was left out.

    The folder or Hub id `model` is loaded with transformers only, in float32 and without dropout, as in evaluation. The
    text is the first documents of `texts`, up to 64 documents or 16,384 tokens. As a trainer would do, each is cut to
    the model's context (at most 1,024 tokens). A document begins with the tokens that calling the tokenizer adds, such
    as BOS, and ends with EOS. The first token of a document or block is not predicted and does not count. In the blocks
    of run_clm, attention crosses document boundaries, so these blocks are evaluated without document masking. Raises
    `RecipeError` if no document is left or the model can't be loaded.
    """
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    tokenizer = load_tokenizer(TokenizerSection(pretrained=model))
    config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
    context = min(getattr(config, "max_position_embeddings", None) or _MAX_CONTEXT, _MAX_CONTEXT)
    text = _Text(tokenizer, context)
    documents, notes = text.documents(texts)
    blocks = text.whole_blocks(documents)
    ids = [text.ids(document) for document in documents]
    joined = list(chain.from_iterable(map(text.ids, blocks)))
    cut = [joined[start : start + context] for start in range(0, len(joined), context)]
    network = _Network(model, config, tokenizer)
    alone = evaluate_checkpoint(model, {str(n): [d] for n, d in enumerate(documents)}, Windows(context))
    rows = [("AutoModelForCausalLM, one document at a time", ids, network.forward_loss(ids), alone)]
    rows.append(("Trainer, documents padded", ids, network.trainer_loss(ids), alone))
    if blocks:
        packed = evaluate_checkpoint(model, {"": blocks}, Windows(context, document_masking=False))
        labels = [text.labels(block) for block in cut]
        rows.append((f"Trainer, run_clm's blocks of {context}", labels, network.trainer_loss(cut, labels), packed))
        if text.prefix:
            notes.append(
                f"in run_clm's blocks, the label of {tokenizer.decode(text.prefix[:1])} is ignored, as in pretraining"
            )
    else:
        notes.append(f"no row for run_clm, because the text does not fill one block of {context} tokens")
    if find_spec("trl") is None:
        notes.append("no rows for TRL, because trl is not installed (pip install hfpretrain[examples])")
    else:
        # TRL calls the tokenizer, which may add an EOS that pretraining does not.
        given = {"text": documents} if tokenizer("")["input_ids"] == text.prefix else {"input_ids": ids}
        rows.append(("TRL SFTTrainer", ids, network.sft_loss(given, lora=False), alone))
        if find_spec("peft") is None:
            notes.append("no row for LoRA, because peft is not installed (pip install hfpretrain[examples])")
        else:
            rows.append(("TRL SFTTrainer with LoRA", ids, network.sft_loss(given, lora=True), alone))
    return [
        Row(
            way,
            sum(label != IGNORE_INDEX for some in examples for label in some[1:]),
            loss,
            report["loss"],
            report["tokens"],
        )
        for way, examples, loss, report in rows
    ], [*notes, *network.notes]


def table(model: str, rows: list[Row], notes: list[str]) -> str:
    """A table with a line for each way to fine-tune."""
    lines = [f"{model}: first fine-tuning loss and evaluated loss, which may differ by at most {TOLERANCE:.0e}"]
    lines.append(f"{'':<44}{'tokens':>8}{'first step':>12}{'evaluated':>12}{'difference':>12}")
    for row in rows:
        end = f"{row.loss - row.evaluated:>12.1e}{'' if row.is_equal else '  differs'}"
        lines.append(f"  {row.way:<42}{row.tokens:>8,}{row.loss:>12.7f}{row.evaluated:>12.7f}{end}")
    return "\n".join([*lines, *(f"  {note}" for note in notes)])


class _Text:
    """Turns documents into token ids and labels, which fine-tuning and evaluation share."""

    def __init__(self, tokenizer: Any, context: int):
        self._tokenizer, self._context = tokenizer, context
        self._encode = Encoder(tokenizer, np.dtype(np.int64))
        self.prefix = list(self._encode.prefix)
        self._frame_size = len(self.prefix) + 1

    def ids(self, text: str) -> list[int]:
        """Token ids: the prefix that the tokenizer adds, the ids of the text, and EOS."""
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*self.prefix, *ids, self._tokenizer.eos_token_id]

    def labels(self, block: list[int]) -> list[int]:
        """The labels of a block. BOS is ignored, as in pretraining."""
        return [IGNORE_INDEX if token in self.prefix[:1] else token for token in block]

    def documents(self, texts: Texts) -> tuple[list[str], list[str]]:
        """The first documents, each cut to the model's context, and notes on documents that were cut or left out."""
        documents: list[str] = []
        tokens = shortened = differing = 0
        for whole in chain.from_iterable(texts.values()):
            if len(documents) == _MAX_DOCUMENTS or tokens >= _MAX_TOKENS:
                break
            text = self._shortened(whole, self._context - self._frame_size)
            ids = self.ids(text)
            if ids != self._encode([text])[0].tolist():
                differing += 1  # it contains the text of a special token, which other scripts encode as that token
            elif len(ids) > self._frame_size:
                documents.append(text)
                tokens, shortened = tokens + len(ids), shortened + (text != whole)
        if not documents:
            raise RecipeError.at("data", "contains no document that other scripts tokenize as hfpretrain does")
        notes = [f"{len(documents)} document(s), {shortened} of them cut to the context of {self._context} tokens"]
        if differing:
            notes.append(f"{differing} document(s) left out: other scripts would read special tokens in their text")
        return documents, notes

    def whole_blocks(self, documents: list[str]) -> list[str]:
        """The documents, shortened at the end to fill whole blocks, since run_clm drops an incomplete last block."""
        documents = list(documents)
        while documents and (rest := sum(len(self.ids(text)) for text in documents) % self._context):
            last = documents.pop()
            wanted = len(self.ids(last)) - self._frame_size - rest
            if wanted > 0:
                documents.append(self._shortened(last, wanted))
        return documents

    def _shortened(self, text: str, num_tokens: int) -> str:
        """The first `num_tokens` tokens of `text`, or fewer. Cutting can change the last tokens, so it is repeated."""
        while True:
            encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            if len(encoded["input_ids"]) <= num_tokens:
                return text
            text = text[: min(encoded["offset_mapping"][num_tokens - 1][1], len(text) - 1)]


class _Network:
    """Computes the loss of a checkpoint with transformers and TRL. The checkpoint is loaded again for each loss."""

    def __init__(self, model: str, config: Any, tokenizer: Any):
        self._model, self._config, self._tokenizer = model, config, tokenizer
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self.notes: list[str] = []
        for name, value in config.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False  # otherwise the loss includes the router's

    def _load(self) -> Any:
        from transformers import AutoModelForCausalLM

        network = AutoModelForCausalLM.from_pretrained(
            self._model, config=self._config, dtype=torch.float32, trust_remote_code=False
        )
        if network.loss_type is None:
            # Trainer (transformers 5.23) goes by the class's name. For GPT2LMHeadModel it also counts first tokens.
            network.loss_type = "ForCausalLM"
            self.notes = [
                f'set `model.loss_type = "ForCausalLM"` on a {type(network).__name__} before you pass it to Trainer: '
                "by the name of its class it has no loss type, and Trainer would count one token too many per sequence"
            ]
        return network

    @torch.no_grad()
    def forward_loss(self, ids: list[list[int]]) -> float:
        network = self._load().eval()
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        network.to(device)
        total = 0.0
        for some in ids:
            input_ids = torch.tensor([some], device=device)
            total += network(input_ids=input_ids, labels=input_ids).loss.item() * (len(some) - 1)
        return total / sum(len(some) - 1 for some in ids)

    def trainer_loss(self, ids: list[list[int]], labels: list[list[int]] | None = None) -> float:
        from datasets import Dataset
        from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

        # DataCollatorForLanguageModeling ignores every padding token, and with it every EOS if EOS is the padding.
        collator = DataCollatorForSeq2Seq(self._tokenizer)
        data = Dataset.from_dict({"input_ids": ids, "labels": labels or ids})
        return self._first_loss(
            TrainingArguments, len(ids), lambda args: Trainer(self._load(), args, collator, train_dataset=data)
        )

    def sft_loss(self, rows: dict[str, Any], lora: bool) -> float:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        peft_config = None
        if lora:
            from peft import LoraConfig

            peft_config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0)
        data, keywords = Dataset.from_dict(rows), {"processing_class": self._tokenizer, "peft_config": peft_config}
        return self._first_loss(
            # The defaults of SFTConfig are bf16, a cut at 1,024 tokens, and a loss that includes the router's.
            lambda **arguments: SFTConfig(
                **arguments, max_length=None, gradient_checkpointing=False, router_aux_loss_coef=0.0
            ),
            len(data),
            lambda args: SFTTrainer(self._load(), args, train_dataset=data, **keywords),
        )

    def _first_loss(
        self, make_arguments: Callable[..., Any], num_examples: int, make_trainer: Callable[[Any], Any]
    ) -> float:
        """The loss that a trainer logs for its first step, whose batch has all examples."""
        from transformers import PrinterCallback

        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pinned memory on CPUs, and about keywords that TRL sets itself
            arguments = make_arguments(
                output_dir=folder,
                per_device_train_batch_size=_BATCH_SIZE,
                gradient_accumulation_steps=-(-num_examples // _BATCH_SIZE),
                max_steps=1,
                learning_rate=0.0,
                optim="sgd",
                bf16=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            trainer = make_trainer(arguments)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            return next(float(row["loss"]) for row in trainer.state.log_history if "loss" in row)
