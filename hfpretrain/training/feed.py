"""The data of each step, read ahead by a thread."""

from __future__ import annotations

import base64
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hfpretrain.data.batches import Prefetcher, StagedData, StepData, T, TrainingData, run_in_thread, training_data
from hfpretrain.data.corpus import held_out_digests
from hfpretrain.data.encode import Encoder, token_dtype
from hfpretrain.data.identity import pin_to_commits
from hfpretrain.data.streaming import Lanes, StreamingData, assign_lanes, load_lane_states
from hfpretrain.data.token_documents import load_vocabulary
from hfpretrain.data.tokenizer import wait_for_interrupted_trainings
from hfpretrain.engines.distributed import RowExchange, new_control_group
from hfpretrain.recipe.machine import num_cores
from hfpretrain.recipe.schema import DataSection, Problem, RecipeError
from hfpretrain.training.setup import Setup
from hfpretrain.training.state import TrainState
from hfpretrain.training.stopping import StoppedEarlyError, Stopping, Stops
from hfpretrain.training.watchdog import Watch

# An exchange may take long, since it waits for a process that evaluates or saves. `Watch` finds processes that hang.
_EXCHANGE_SECONDS = 7 * 24 * 3600
logger = logging.getLogger(__name__)


class Feed:
    """Opens a run's data at a checkpoint, and gives the training loop this process's data, step by step.

    Reads happen in threads, so that signals stop the run even while a source does not answer. `checkpoint`: where a
    stream resumes; prepared data need none.
    """

    data: TrainingData | StagedData | StreamingData

    def __init__(self, setup: Setup, checkpoint: Path | None, watch: Watch, stops: Stops):
        self._setup, self._watch, self._stops = setup, watch, stops
        self._prefetcher: Prefetcher | None = None
        self._exchange: RowExchange | None = None
        self._num_openings = 0
        self._state: TrainState | None = None
        self.data = self._open(checkpoint)

    def _open(self, checkpoint: Path | None) -> TrainingData | StagedData | StreamingData:
        setup, recipe, manifest = self._setup, self._setup.recipe, self._setup.prepared.manifest
        keywords: dict[str, Any] = {
            "process_index": setup.engine.data_index,
            "num_processes": setup.engine.data_size,
            "document_masking": setup.document_masking,
            "first_sequence": setup.origin.sequence,
        }
        if not recipe.data.streaming:
            return training_data(recipe.data, recipe.training, recipe.seed, setup.prepared, **keywords)
        keywords |= {
            "micro_batch_size": recipe.training.micro_batch_size,
            "accumulation_steps": setup.stages.current.accumulation_steps,
            "eos_token_id": manifest["eos_token_id"],
        }
        sequences = recipe.training.tokens_per_step // recipe.data.block_size
        # Read the sources at the commits that the manifest of the prepared data records.
        identities = (manifest["source_identities"], manifest["validation_identities"])
        section = self._read(lambda: pin_to_commits(recipe.data, *identities))
        held_out = self._held_out(section)
        stream_lanes = self._watch.run_on_main(
            "list the files to stream",
            lambda: [
                [one.num_lanes, one.pieces] for one in self._read(lambda: assign_lanes(section, held_out, sequences))
            ],
        )
        keywords["stream_lanes"] = [
            Lanes(num_lanes, [(number, index) for number, index in pieces]) for num_lanes, pieces in stream_lanes
        ]
        encode = Encoder(setup.tokenizer, token_dtype(manifest["vocab_size"]))
        states, first_step = ({}, 0) if checkpoint is None else load_lane_states(checkpoint)
        keywords |= {"first_step": first_step, "states": states, "max_unknown": recipe.tokenizer.max_unknown}
        keywords |= {
            "seed": recipe.seed,
            "num_threads": max(1, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
        }
        # The threads of `StreamingData` tokenize in parallel. `tokenizers` would start as many threads of its own.
        wait_for_interrupted_trainings()
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        data = self._read(lambda: StreamingData(section, encode, held_out, **keywords))
        engine = setup.engine
        if engine.num_processes > 1:
            # A new group each time: after a rollback, a thread may still use the old one when its source answers.
            group = new_control_group(engine.num_processes, _EXCHANGE_SECONDS)
            self._exchange = RowExchange(group, engine.processes_per_sequence)
            self._num_openings += 1
            swaps = data.shares_lanes or engine.processes_per_sequence > 1
            data.join(self._exchange, swaps, reads=engine.is_main_data_process)
        if setup.is_main:
            logger.info(data.describe_reading())
        return data

    def _held_out(self, section: DataSection) -> frozenset[bytes]:
        """Digests of the validation documents, which the main process reads for all."""

        def work() -> list[Any]:
            vocabulary = load_vocabulary(section, self._setup.tokenizer)
            digests = sorted(self._read(lambda: held_out_digests(section, vocabulary)))
            return [len(digests[0]) if digests else 1, base64.b64encode(b"".join(digests)).decode()]

        size, text = self._watch.run_on_main("read the validation documents", work)
        joined = base64.b64decode(text)
        return frozenset(joined[start : start + size] for start in range(0, len(joined), size))

    def _read(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread and return its result.

        Raises `StoppedEarlyError` if this process must stop and a source does not answer.
        """
        result = run_in_thread(work, self._stops.due)
        if result is None:
            raise StoppedEarlyError(self._stops.reason)
        return result

    def example(self, step: int = 0) -> dict[str, torch.Tensor]:
        """A batch of one sequence with the block size of data step `step`, on the CPU."""
        data = self.data
        return self._read(data.example if isinstance(data, StreamingData) else data.part(step).example)

    def start(self, state: TrainState) -> None:
        """Start reading the data of the steps that follow `state`."""
        self._state = state
        steps = range(state.step, self._setup.last_step)
        data, pin_memory = self.data, self._setup.engine.device.type == "cuda"
        leave = data.leave if isinstance(data, StreamingData) else lambda: None
        self._prefetcher = Prefetcher(
            lambda step: data.step(state.data_step(step)), steps, pin_memory=pin_memory, leave=leave
        )

    def next(self) -> StepData:
        """The data of the next step.

        Raises `Stopping` if a source can't be read, or if this process must stop and a source does not answer. With
        several processes that stream, all get the data or all raise `Stopping`, whichever of them has the reason. With
        several processes and prepared data, this process alone raises the error, or `StoppedEarlyError`.
        """
        assert self._prefetcher is not None
        if self._exchange is not None:
            return self._next_of_all(self._prefetcher, self._exchange)
        is_alone = self._setup.engine.num_processes == 1
        try:
            data = self._prefetcher.next(self._stops.due)
        except Exception as error:
            if is_alone:
                raise Stopping(error) from error
            raise
        if data is not None:
            return data
        if not is_alone:
            # The other processes may be in the middle of a step, where they wait for this one. `Watch` ends them.
            raise StoppedEarlyError(f"{self._stops.reason} while the prepared data could not be read")
        raise Stopping

    def _next_of_all(self, prefetcher: Prefetcher, exchange: RowExchange) -> StepData:
        """As `next`, for several processes that stream.

        A process that must stop, or that can't read its data, asks rank 0. If the data do not come within 5 seconds,
        rank 0 lets no more steps begin, and tells all processes which step is the last. Until then no process has the
        data of a later step.
        """
        assert self._state is not None
        state, watch = self._state, self._watch
        data_step = state.data_step(state.step)
        asked, last, failed = (f"data/{self._num_openings}/{name}" for name in ("asked", "last", "failed"))
        failure: Exception | None = None
        is_main, has_read = self._setup.is_main, False

        def must_stop() -> bool:
            nonlocal has_read
            if not has_read and exchange.read >= data_step:
                # `Watch` sees that only those processes are behind whose own sources do not answer.
                has_read = True
                watch.beat("data of other ranks", state.step)
            if self._stops.due():
                watch.publish(asked, True)
            if is_main:
                return bool(watch.published(asked))
            found = watch.published(last)
            return found is not None and found < data_step

        while True:
            try:
                data = prefetcher.next(must_stop, at_once=not is_main)
            except Exception as error:
                if exchange.begun >= data_step:  # the others train on this step
                    raise
                failure = error
                watch.publish(failed, _describe_error(error))
                watch.publish(asked, True)
                continue
            if data is not None:
                break
            if is_main:
                last_step = exchange.end()
                watch.publish(last, last_step)
                if last_step >= data_step:
                    continue
            if failure is None and (found := watch.published(failed)) is not None:
                failure = _described_error(found)
            raise Stopping(failure) from failure
        if not has_read:
            watch.beat("data of other ranks", state.step)
        return data

    def close(self) -> None:
        """End the thread."""
        if self._prefetcher is not None:
            self._prefetcher.close()

    def rewind(self, checkpoint: Path) -> None:
        """End the thread, and take a stream back to a checkpoint; `start` continues from there."""
        self.close()
        if isinstance(self.data, StreamingData):
            self.data = self._open(checkpoint)


def _describe_error(error: Exception) -> dict[str, Any]:
    """An error as a JSON value, from which `_described_error` makes it on another rank."""
    if isinstance(error, RecipeError):
        return {"problems": [asdict(problem) for problem in error.problems]}
    return {"text": f"another rank can't read its data: {type(error).__name__}: {error}"}


def _described_error(described: dict[str, Any]) -> Exception:
    if "problems" in described:
        return RecipeError([Problem(**problem) for problem in described["problems"]])
    return RuntimeError(described["text"])
