"""The evaluations of a run while it trains: validation sets, metrics, continued prompts, downstream tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from accelerate.utils import broadcast, broadcast_object_list, gather_object

from hfpretrain.data.prepared import PreparedData
from hfpretrain.data.tokenizer import document_start
from hfpretrain.engines.base import Engine
from hfpretrain.evaluation import lm_eval_tasks, prompts, sums
from hfpretrain.evaluation.base import BaseEvaluation, row_gain_text
from hfpretrain.evaluation.recipe_metrics import RecipeMetrics, trust_problems
from hfpretrain.evaluation.validation import (
    BASE_TOKENIZER,
    BaseVocabulary,
    ValidationSets,
    base_tokenizer_lines,
    domains,
)
from hfpretrain.modeling.loss import ids_left_out
from hfpretrain.recipe.redaction import redact
from hfpretrain.recipe.schema import EvaluationSection, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def is_due(step: int, every_steps: int | None, last_step: int) -> bool:
    """Whether `step` is the last step or a multiple of `every_steps`."""
    return step == last_step or (every_steps is not None and step % every_steps == 0)


class Recorder(Protocol):
    """Writes the results of an evaluator; `training.records.Records` implements it."""

    def write_row(self, row: dict[str, Any]) -> None:
        """Write a row into `metrics.jsonl` and the trackers."""

    def write_samples(self, step: int, samples: list[dict[str, str]]) -> None:
        """Write the continuations of prompts."""

    def print_line(self, text: str) -> None:
        """Print a line."""

    def draw_plot(self) -> None:
        """Draw the loss plot again."""


@dataclass(frozen=True)
class Evaluation:
    """The part of an evaluation's result that training uses."""

    loss: float | None
    """Mean loss over all validation tokens; None if only prompts or tasks were due."""


class Evaluator:
    """Runs the evaluations of a recipe with the current weights. Every rank must have one and make the same calls.

    `has_validation`: whether the recipe has validation data. `block_sizes`: all block sizes of the run.
    `micro_batch_size`: sequences of the largest block size in a forward pass. `first_step`: number of steps before the
    run, which are those of its trunk if it is a branch. `base`: keeps the evaluation of the model that the run began
    with, to compare the others with it; None for a new model. `base_vocabulary`: of that model, if tokens were added to
    it; at step 0, the validation text is then also scored with its own tokenizer. `beat` is called to show progress.
    `stop_if_asked` is called where all ranks have made the same number of forward passes, and may raise.
    """

    def __init__(
        self,
        section: EvaluationSection,
        *,
        engine: Engine,
        prepared: PreparedData,
        tokenizer: PreTrainedTokenizerFast,
        token_bytes: torch.Tensor,
        base_vocabulary: BaseVocabulary | None,
        has_validation: bool,
        document_masking: bool,
        micro_batch_size: int,
        block_sizes: Sequence[int],
        first_step: int,
        last_step: int,
        base: BaseEvaluation | None,
        records: Recorder,
        beat: Callable[[], None],
        stop_if_asked: Callable[[], None],
    ):
        self._section, self._engine, self._records = section, engine, records
        self._tokenizer, self._token_bytes, self._base_vocabulary = tokenizer, token_bytes, base_vocabulary
        self._eos_token_id = prepared.manifest["eos_token_id"]
        self._has_validation, self._document_masking = has_validation, document_masking
        self._micro_batch_size, self._block_size = micro_batch_size, max(block_sizes)
        self._first_step, self._last_step = first_step, last_step
        self._edges = sums.context_edges(block_sizes)
        self._base, self._beat, self._stop_if_asked = base, beat, stop_if_asked
        self._is_main = engine.process_index == 0
        self._sets = ValidationSets(prepared)
        if problems := list(trust_problems({"evaluation": section.model_dump()})):
            raise RecipeError(problems)  # for a recipe that was not read from a file
        self._metrics = RecipeMetrics(section, self._is_main)
        self._tasks: lm_eval_tasks.Tasks | None = None
        self._language_model: Any = None
        if section.lm_eval is not None:
            self._tasks = lm_eval_tasks.Tasks(section.lm_eval, "evaluation.lm_eval.tasks", self._is_main)

    def evaluate(self, step: int, tokens: int, ends_stage: bool = False) -> Evaluation | None:
        """Run and record all evaluations that are due after `step` steps and `tokens` tokens; None if none are.

        `ends_stage`: whether a stage with another block size, or another rotary position embedding, follows.
        """
        section = self._section
        is_due_here = step == self._first_step or is_due(step, section.every_steps, self._last_step)
        is_evaluation = is_due_here or ends_stage
        samples_due = is_evaluation and bool(section.prompts)
        validation_due = is_evaluation and self._has_validation
        tasks_due = (
            section.lm_eval is not None
            and step > self._first_step
            and is_due(step, section.lm_eval.every_steps, self._last_step)
        )
        if not (validation_due or samples_due or tasks_due):
            return None
        loss = None
        with self._engine.evaluated_weights():
            if validation_due:
                loss = self._validate(step, tokens, ends_stage)
            if samples_due:
                self._sample(step)
            if tasks_due and self._tasks is not None:
                self._run_tasks(self._tasks, step, tokens)
        return Evaluation(loss)

    def _validate(self, step: int, tokens: int, ends_stage: bool) -> float:
        """Loss, perplexity and bits per byte over all validation sets, equal on any number of processes."""
        engine, records = self._engine, self._records
        keywords: dict[str, Any] = {
            "batch_size": self._micro_batch_size,
            "process_index": engine.data_index,
            "num_processes": engine.data_size,
            "document_masking": self._document_masking,
        }
        documents, contexts, ranges = self._sum_losses(self._with_metrics(self._sets.batches(**keywords)))
        nll, count, *_ = documents.sum(axis=0)
        loss = float(nll / count)
        base_documents, vocabulary = None, self._base_vocabulary if step == 0 else None
        if vocabulary is not None:
            batches = self._with_beats(self._sets.base_batches(vocabulary.pieces, **keywords))
            with ids_left_out(engine.model, vocabulary.new_ids):
                base_documents, *_ = self._sum_losses(batches)
        if not self._is_main:  # only the main process computes the confidence intervals
            return loss
        figures = self._sets.figures(documents) | self._metrics.compute()
        figures["loss_by_context"] = sums.loss_by_context(contexts)
        by_range = sums.loss_in_ranges(ranges, self._edges)
        figures |= {f"loss_with_context/{name}": loss for name, loss in by_range.items()}
        base = self._compare_with_base(step, documents if base_documents is None else base_documents, figures)
        row = {f"eval/{name}": value for name, value in figures.items()} | ({"ends_stage": True} if ends_stage else {})
        if base_documents is not None:
            of_base = self._sets.figures(base_documents)
            row |= {f"{BASE_TOKENIZER}/{name}": value for name, value in of_base.items()}
        records.write_row({"step": step, "tokens": tokens, **base, **row})
        for name in ("", *domains(row)):  # one set may get worse while the total improves
            prefix, start = (f"{name}/", f"  {name}: ") if name else ("", f"step {step}: validation ")
            gain = row_gain_text(row, name)
            records.print_line(
                f"{start}loss {figures[f'{prefix}loss']:.4f}, perplexity {figures[f'{prefix}perplexity']:.2f}, "
                f"bits per byte {figures[f'{prefix}bits_per_byte']:.4f}{f': {gain}' if gain else ''}"
            )
        for line in base_tokenizer_lines(row):
            records.print_line(line)
        if by_range:
            text = ", ".join(f"{name}: {loss:.4f}" for name, loss in by_range.items())
            records.print_line(f"  loss by the number of tokens that a prediction sees: {text}")
        records.draw_plot()
        return loss

    def _compare_with_base(self, step: int, documents: np.ndarray, figures: dict[str, Any]) -> dict[str, str]:
        """Add what was gained since the run began to `figures`, or keep this evaluation as the base if it is the first.

        Returns what the row of the base says.
        """
        if self._base is None:
            return {}
        sets = self._sets.by_set(documents)
        if step == self._first_step:
            self._base.keep(sets)
            return {"base": redact(self._base.name)}
        if self._base.is_known:
            figures |= self._base.figures(sets)
        return {}

    def _sum_losses(self, batches: Iterable[dict[str, torch.Tensor]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`documents`, `contexts` and `ranges` of `sums.Sums` over all processes."""
        engine, edges = self._engine, self._edges
        found = sums.loss_sums(engine.model, batches, self._token_bytes, self._sets.num_documents, edges)
        documents, contexts = (engine.total(part).cpu().numpy() for part in (found.documents, found.contexts))
        return documents, contexts, (engine.total(found.ranges) if edges else found.ranges).cpu().numpy()

    def _with_beats(self, batches: Iterable[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
        for batch in batches:
            self._beat_and_check_stop()
            yield batch

    def _with_metrics(self, batches: Iterable[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the batches, after adding each to the recipe's metrics."""
        for batch in batches:
            self._beat_and_check_stop()
            if self._metrics.any_requested:
                predicted = sums.predictions(self._engine.model, batch, self._engine.device)
                self._metrics.add(*(self._engine.gather(part) for part in predicted))
            yield batch

    def _beat_and_check_stop(self) -> None:
        self._beat()
        self._stop_if_asked()

    def _sample(self, step: int) -> None:
        engine, section, tokenizer = self._engine, self._section, self._tokenizer
        keywords: dict[str, Any] = {
            "context": self._block_size,
            "eos_token_id": self._eos_token_id,
            "device": engine.device,
            "broadcast": broadcast,
        }
        samples = []
        for prompt in section.prompts:
            # A prompt starts like a document in training.
            ids = [*document_start(tokenizer), *tokenizer.encode(prompt, add_special_tokens=False)]
            sample = {"prompt": prompt}
            for kind, temperature in (("greedy", 0.0), ("drawn", section.temperature)):
                self._beat()
                sampling: dict[str, Any] = {"temperature": temperature, "top_k": section.top_k}
                with torch.compiler.set_stance("force_eager"):  # otherwise each length is compiled
                    new_ids = prompts.continue_text(engine.model, ids, section.sample_tokens, **keywords, **sampling)
                sample[kind] = str(tokenizer.decode(new_ids))
            samples.append(sample)
        self._records.write_samples(step, samples)

    def _run_tasks(self, tasks: lm_eval_tasks.Tasks, step: int, tokens: int) -> None:
        engine = self._engine
        if self._language_model is None:
            processes = lm_eval_tasks.Processes(
                engine.data_index,
                engine.data_size,
                broadcast=lambda job: broadcast_object_list([job])[0],
                gather=gather_object,
                any_computes=self._any_computes,
            )
            self._language_model = lm_eval_tasks.shared_language_model(
                engine.unwrapped_model, self._tokenizer, engine.device, self._micro_batch_size, processes
            )
        if not self._is_main:
            self._language_model.answer_requests()
            return
        figures = lm_eval_tasks.figures(tasks.run(self._language_model)["results"])
        row = {f"tasks/{name}": value for name, value in figures.items()}
        self._records.write_row({"step": step, "tokens": tokens, **row})
        for name, value in figures.items():
            if not name.endswith("_stderr"):
                error = figures.get(f"{name}_stderr")
                self._records.print_line(f"  {name} {value:.4f}" + ("" if error is None else f" +- {error:.4f}"))

    def _any_computes(self, computes: bool) -> bool:
        self._beat_and_check_stop()
        return bool(self._engine.largest(int(computes)))
