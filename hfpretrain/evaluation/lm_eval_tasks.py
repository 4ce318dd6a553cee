"""lm-eval's tasks, run on a model in memory by all processes of any engine."""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hfpretrain.data.tokenizer import document_prefix, document_start, set_add_bos
from hfpretrain.modeling.structure import eval_mode
from hfpretrain.recipe.schema import LmEvalSection, RecipeError

_NUM_RESAMPLES = 1000


def _unchanged(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Processes:
    """How several processes divide lm-eval's requests. The default is one process.

    All processes must make the same calls.
    """

    index: int = 0
    size: int = 1
    """Index of this process, and the number of processes. Process i answers requests i, i + size, and so on."""
    broadcast: Callable[[Any], Any] = _unchanged
    """Returns the main process's object on all processes."""
    gather: Callable[[list[Any]], list[Any]] = _unchanged
    """Returns the concatenated lists of all processes."""
    any_computes: Callable[[bool], bool] = _unchanged
    """Returns whether any process passed True."""


class Tasks:
    """The tasks of `evaluation.lm_eval` with their data, loaded at the start so that a run needs no network later.

    Only the main process loads them. `key`: the recipe key or flag that names the tasks, for messages. Raises
    `RecipeError` for a name that lm-eval does not know, and for data that can't be loaded.
    """

    def __init__(self, section: LmEvalSection, key: str, is_main: bool = True):
        if find_spec("lm_eval") is None:
            raise RecipeError.at(key, "lm-eval is not installed: pip install -c constraints.txt -e .[lm-eval]")
        if not is_main:
            return
        import lm_eval.api.task
        from lm_eval.tasks import TaskManager

        lm_eval.api.task.tqdm = functools.partial(tqdm, disable=True)  # its progress bar would mix with the run's
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if section.include_path is not None and not Path(section.include_path).is_dir():
            raise RecipeError.at(key, f"the folder of tasks {section.include_path} does not exist")
        self._limit = section.limit
        names = list(section.tasks)
        manager = TaskManager(include_path=section.include_path, include_defaults=section.include_path is None)
        if not set(names) <= set(manager.all_tasks):
            manager = TaskManager(include_path=section.include_path)
        for name in names:
            if name not in manager.all_tasks:
                near = difflib.get_close_matches(name, manager.all_tasks, n=3)
                where = f" nor in {section.include_path}" if section.include_path else ""
                hint = f"; did you mean {', '.join(near)}?" if near else ", see `lm_eval ls tasks`"
                raise RecipeError.at(key, f"{name!r} is not a task of lm-eval{where}{hint}")
        try:
            self._loaded = manager.load(names)
        except Exception as error:  # a task may run any code
            message = f"loading {', '.join(names)} failed: {' '.join(str(error).split()):.300}"
            raise RecipeError.at(key, message) from error
        for task in self._loaded["tasks"].values():
            shots = section.num_fewshot
            # As in lm_eval.simple_evaluate: a task with `num_fewshot: 0` keeps it.
            if shots is not None and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=shots)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=1234)

    def run(self, language_model: Any) -> dict[str, Any]:
        """Run the tasks and return lm-eval's own results: `results`, `n-samples`, `n-shot`, `versions`.

        Only the main process calls it, while the others call `answer_requests` of the language model.
        """
        from lm_eval.evaluator import evaluate

        # lm-eval would fork one process per core. This process has accelerators and threads, so it must not be forked.
        os.environ["DISABLE_MULTIPROC"] = "1"
        try:
            with language_model.answering_together():
                found = evaluate(
                    language_model,
                    self._loaded,
                    limit=self._limit,
                    bootstrap_iters=_NUM_RESAMPLES,
                    log_samples=False,
                )
        finally:
            del os.environ["DISABLE_MULTIPROC"]
        return {key: found[key] for key in ("results", "n-samples", "n-shot", "versions") if key in found}


def figures(results: dict[str, Any]) -> dict[str, float]:
    """Every number in lm-eval's `results`, as `TASK/METRIC` and `TASK/METRIC_stderr`.

    A filter other than `none` is part of the name: `TASK/METRIC/FILTER`.
    """
    found = {}
    for task, values in results.items():
        for name, value in values.items():
            metric, comma, kind = name.partition(",")
            if comma and isinstance(value, (int, float)) and not isinstance(value, bool):
                found[f"{task}/{metric}" + ("" if kind == "none" else f"/{kind}")] = float(value)
    return found


def shared_language_model(
    model: Any, tokenizer: Any, device: torch.device, batch_size: int, processes: Processes
) -> Any:
    """lm-eval's `HFLM` around `model`, a causal LM of transformers, which divides its requests among all processes.

    The main process passes it to `Tasks.run`. Meanwhile the others call its `answer_requests`. With engines that shard,
    every process must take part in each forward pass. So the processes make their passes in rounds, and a process
    without requests left makes passes over a single token until all are done.
    """
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    add_bos_token = bool(document_prefix(tokenizer)) or None

    class Network:
        """Replaces the model, with only the attributes that HFLM reads.

        HFLM would tie the weights of the model itself again, but an engine may have sharded them.
        """

        def __init__(self) -> None:
            self.device, self.config = device, model.config

        def __call__(self, input_ids: torch.Tensor) -> Any:
            return model(input_ids=input_ids, use_cache=False)

        def generate(self, **keywords: Any) -> torch.Tensor:
            # synced_gpus needs all processes to generate at once. It is not needed, since passes are made in rounds.
            return model.generate(**keywords, synced_gpus=False)

    class SharedLanguageModel(HFLM):
        def __init__(self) -> None:
            # A copy, since HFLM gives the tokenizer a padding token.
            own_tokenizer = copy.deepcopy(tokenizer)
            start = document_start(own_tokenizer)
            # Some tokenizers append EOS, which would end the document that a request starts.
            set_add_bos(own_tokenizer, bool(add_bos_token), add_eos=False)
            keywords: dict[str, Any] = {"prefix_token_id": start[-1], "add_bos_token": add_bos_token}
            keywords |= {"tokenizer": own_tokenizer, "batch_size": batch_size}
            super().__init__(pretrained=Network(), backend="causal", **keywords)
            self._has_no_requests = False

        @contextlib.contextmanager
        def answering_together(self) -> Iterator[None]:
            with self._evaluating():
                yield
                processes.broadcast(None)

        def answer_requests(self) -> None:
            """Answer requests of the main process until it has all results."""
            with self._evaluating():
                while (job := processes.broadcast(None)) is not None:
                    self._answer(*job)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return self._answer_together("loglikelihood", requests)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return self._answer_together("loglikelihood_rolling", requests)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return self._answer_together("generate_until", requests)

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> Any:
            # `loglikelihood_rolling` doesn't pass `disable_tqdm` on.
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

        def _answer_together(self, kind: str, requests: list[Any]) -> list[Any]:
            return self._answer(*processes.broadcast((kind, [request.args for request in requests])))

        def _answer(self, kind: str, arguments: list[Any]) -> list[Any]:
            ours = range(processes.index, len(arguments), processes.size)
            # For a rolling likelihood lm-eval adds the prefix itself. If HFLM added a second one, the first would be
            # scored as text.
            self.add_bos_token = False if kind == "loglikelihood_rolling" else add_bos_token
            requests = [Instance(request_type=kind, doc={}, arguments=arguments[at], idx=0) for at in ours]
            answers = getattr(super(), kind)(requests, disable_tqdm=True) if requests else []
            one_token = torch.zeros(1, 1, dtype=torch.int64, device=device)
            self._has_no_requests = True
            while processes.any_computes(False):
                model(input_ids=one_token, use_cache=False)
            self._has_no_requests = False
            found = dict(processes.gather(list(zip(ours, answers, strict=True))))
            return [found[at] for at in range(len(arguments))]

        @contextlib.contextmanager
        def _evaluating(self) -> Iterator[None]:
            """Make every forward pass a round of all processes. Compile nothing, since most lengths occur only once."""
            # First in the order of hooks: the processes agree on a pass before an engine's hooks gather weights.
            hook = model.register_forward_pre_hook(self._start_round, prepend=True)
            try:
                with eval_mode(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
                    yield
            finally:
                hook.remove()

        def _start_round(self, *_: Any) -> None:
            if not self._has_no_requests:
                processes.any_computes(True)

    return SharedLanguageModel()
