"""What a run evaluates while it trains: validation sets, metrics, continued prompts, downstream tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import broadcast, broadcast_object_list, gather_object

from hfpretrain.data.tokenizer import document_start
from hfpretrain.evaluation import lm_eval_tasks, prompts
from hfpretrain.evaluation import sums as evaluation
from hfpretrain.evaluation.recipe_metrics import MetricFolders, trust_problems
from hfpretrain.evaluation.validation import ValidationSets, domains
from hfpretrain.recipe.schema import RecipeError


def is_due(step: int, every_steps: int | None, num_steps: int) -> bool:
    """Whether what is done every so many steps, and at the end, is to be done after `step`."""
    return step == num_steps or (every_steps is not None and step % every_steps == 0)


class Evaluator:
    """The evaluations of `run`. All ranks must have one and call it alike."""

    def __init__(self, run: Any):
        self._run, self._section = run, run.recipe.evaluation
        self._sets = ValidationSets(run.prepared)
        if problems := list(trust_problems({"evaluation": self._section.model_dump()})):
            raise RecipeError(problems)  # a recipe that was not read from a file
        self._metrics = MetricFolders(self._section, run.is_main)
        self._tasks: lm_eval_tasks.Tasks | None = None
        self._language_model: Any = None
        if self._section.lm_eval is not None:
            self._tasks = lm_eval_tasks.Tasks(self._section.lm_eval, "evaluation.lm_eval.tasks", run.is_main)

    def evaluate(self) -> None:
        """All that is due of the weights as they are, by the recipe and the step."""
        run, state, section = self._run, self._run.state, self._section
        num_steps = run.recipe.training.num_steps
        validates = state.step == 0 or is_due(state.step, section.every_steps, num_steps)
        runs_tasks = (
            section.lm_eval is not None and state.step and is_due(state.step, section.lm_eval.every_steps, num_steps)
        )
        if not (validates or runs_tasks):
            return
        with run.engine.evaluated_weights():
            if validates and run.recipe.data.has_validation:
                self._validate()
                state.evaluated = True
            if validates and section.prompts:
                self._sample()
                state.evaluated = True
            if runs_tasks and self._tasks is not None:
                self._run_tasks(self._tasks)
                state.evaluated = True
        if state.evaluated:
            run.clock.mark("evaluate")

    def _validate(self) -> None:
        """Loss, perplexity and bits per byte over all validation sets, equal on any number of processes."""
        run = self._run
        batches = self._sets.batches(
            batch_size=run.recipe.training.micro_batch_size,
            process_index=run.data_index,
            num_processes=run.data_size,
            document_masking=run.document_masking,
        )
        sums = evaluation.loss_sums(run.model, self._watched(batches), run.token_bytes, self._sets.num_documents)
        documents, contexts = (run.engine.total(part).cpu().numpy() for part in (sums.documents, sums.contexts))
        nll, tokens, *_ = documents.sum(axis=0)
        run.state.evaluation_loss = float(nll / tokens)
        if not run.is_main:  # intervals are drawn once
            return
        figures = self._sets.figures(documents) | self._metrics.compute()
        figures["loss_by_context"] = evaluation.loss_by_context(contexts)
        row = {f"eval/{name}": value for name, value in figures.items()}
        self._record(row)
        run.records.say(
            f"step {run.state.step}: validation loss {figures['loss']:.4f}, perplexity "
            f"{figures['perplexity']:.2f}, bits per byte {figures['bits_per_byte']:.4f}"
        )
        for name in domains(row):  # one set may get worse while the total improves
            run.records.say(
                f"  {name}: loss {figures[f'{name}/loss']:.4f}, perplexity {figures[f'{name}/perplexity']:.2f}, "
                f"bits per byte {figures[f'{name}/bits_per_byte']:.4f}"
            )
        run.records.plot()

    def _watched(self, batches: Iterable[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
        run = self._run
        for batch in batches:
            self._pause()
            if self._metrics.wanted:
                ours = evaluation.predictions(run.model, batch, run.engine.device)
                self._metrics.add(*(run.engine.gather(part) for part in ours))
            yield batch

    def _pause(self) -> None:
        """A moment at which all ranks are at the same place."""
        self._run.watch.beat("evaluate", self._run.state.step)
        self._run.stop_if_asked()

    def _sample(self) -> None:
        run, section, eos = self._run, self._section, self._run.prepared.manifest["eos_token_id"]
        keywords: dict[str, Any] = {
            "context": run.recipe.data.block_size,
            "eos_token_id": eos,
            "device": run.engine.device,
            "agree": broadcast,
        }
        samples = []
        for prompt in section.prompts:
            # As a document begins in training.
            ids = [*document_start(run.tokenizer), *run.tokenizer.encode(prompt, add_special_tokens=False)]
            sample = {"prompt": prompt}
            for kind, temperature in (("greedy", 0.0), ("drawn", section.temperature)):
                run.watch.beat("evaluate", run.state.step)
                drawing: dict[str, Any] = {"temperature": temperature, "top_k": section.top_k}
                with torch.compiler.set_stance("force_eager"):  # every length comes once
                    made = prompts.continue_text(run.model, ids, section.sample_tokens, **keywords, **drawing)
                sample[kind] = str(run.tokenizer.decode(made))
            samples.append(sample)
        run.records.samples(run.state.step, samples)

    def _run_tasks(self, wanted: lm_eval_tasks.Tasks) -> None:
        run = self._run
        if self._language_model is None:
            processes = lm_eval_tasks.Processes(
                run.data_index,
                run.data_size,
                broadcast=lambda job: broadcast_object_list([job])[0],
                gather=gather_object,
                any_computes=self._any_computes,
            )
            self._language_model = lm_eval_tasks.shared_language_model(
                run.engine.unwrapped_model,
                run.tokenizer,
                run.engine.device,
                run.recipe.training.micro_batch_size,
                processes,
            )
        if not run.is_main:
            self._language_model.serve()
            return
        figures = lm_eval_tasks.figures(wanted.run(self._language_model)["results"])
        self._record({f"tasks/{name}": value for name, value in figures.items()})
        for name, value in figures.items():
            if not name.endswith("_stderr"):
                error = figures.get(f"{name}_stderr")
                run.records.say(f"  {name} {value:.4f}" + ("" if error is None else f" +- {error:.4f}"))

    def _any_computes(self, computes: bool) -> bool:
        self._pause()
        return bool(self._run.engine.largest(int(computes)))

    def _record(self, row: dict[str, Any]) -> None:
        self._run.records.row({"step": self._run.state.step, "tokens": self._run.state.tokens, **row})
