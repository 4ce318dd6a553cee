"""The loop: `python -m hfpretrain.train RECIPE`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfpretrain.engines import launch

os.environ.update(launch.sleeping_threads())  # which torch's OpenMP reads when it is loaded

import torch
import transformers

from hfpretrain import files
from hfpretrain.checkpoints import export, verify
from hfpretrain.engines.base import is_out_of_memory
from hfpretrain.evaluation.evaluator import is_due
from hfpretrain.modeling.build import compile_error
from hfpretrain.planning import table
from hfpretrain.planning.plan import Settled
from hfpretrain.publishing import card
from hfpretrain.publishing.publisher import Publisher
from hfpretrain.recipe import redaction
from hfpretrain.recipe.labels import IGNORE_INDEX
from hfpretrain.recipe.schema import Recipe, RecipeError
from hfpretrain.training import console, watchdog
from hfpretrain.training.loading import load_recipe
from hfpretrain.training.report import run_summary
from hfpretrain.training.setup import NotSavedError, Run, Stopping, TrainingDivergedError
from hfpretrain.training.stopping import StoppedEarlyError, Stops

STOPPED = 75
"""Exit code of a run that stopped early with everything saved: EX_TEMPFAIL of sysexits.h."""


def train(recipe: Recipe) -> Path | None:
    """Run a recipe to its end, from wherever its output folder stands.

    Started by plain Python this is one process, which may call it again; under `accelerate launch` every process must
    call it, once. Returns the folder of the exported model, or None if the run was stopped before its end, with
    everything saved. Raises `RecipeError` for what is wrong with the recipe, the launcher or the machine,
    `TrainingDivergedError` where `stability.policy` says to stop, `NotSavedError` if the last checkpoint could not be
    written.

    From then on, writing to `sys.stdout` and `sys.stderr` never raises in this process, even if nobody reads them.
    """
    console.keep_from_failing("stdout", "stderr")
    with watchdog.Watch() as watch, Stops(recipe.training.stop_after_seconds) as stops:
        launch.require_first_run()
        launch.end_with_launcher()
        run = Run(recipe, watch, stops, Publisher)
        with _explained(run):
            run.build()
            _rehearse(run)
            run.resume()
            try:
                _fit(run)
            except Stopping:
                run.stop()
                return None
            path = _finish(run)
            watch.leave()
            run.publish()
            return path


@contextlib.contextmanager
def _explained(run: Run) -> Iterator[None]:
    """Turns running out of memory into a `RecipeError` with the plan of the run and what would help, and layers that
    don't compile into another."""
    try:
        yield
    except RuntimeError as error:
        if (found := compile_error(error)) is not None:
            raise found from None
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold what filled the memory
        engine = run.engine
        with engine.plain_initialization():
            message = table.out_of_memory(
                run.pinned,
                engine.name,
                engine.num_processes,
                Settled(getattr(run, "config", None), engine.precision),
                engine.device_name,
                str(error).partition("\n")[0],
            )
        raise RecipeError.at("training.micro_batch_size", message) from None


def _rehearse(run: Run) -> None:
    """A step on one sequence repeated, which changes nothing: what does not compile or fit shows at the start."""
    run.watch.beat("rehearse", 0)
    size = run.recipe.training.micro_batch_size
    batch = run.engine.to_device({k: v.repeat(size, 1) for k, v in run.read(run.data.example).items()})
    batch = run.engine.split_sequences(batch)
    with run.engine.rehearsal():
        num_items = torch.tensor(batch["labels"].numel())
        _, objective = run.step_loss(run.model, batch, num_items, 1)
        run.engine.backward(objective * 0.0)
        run.engine.clip_gradients()
        run.engine.update()


def _fit(run: Run) -> None:
    recipe, engine, model = run.recipe, run.engine, run.model
    num_steps = recipe.training.num_steps
    while True:
        state = run.state
        if not state.evaluated:
            run.evaluator.evaluate()
        if state.step not in (0, run.saved_step) and is_due(state.step, recipe.checkpoint.every_steps, num_steps):
            run.save(in_background=recipe.checkpoint.async_save and state.step < num_steps)
        run.note_saves(last=state.step >= num_steps)
        run.clock.mark("save")
        if state.step >= num_steps:
            break
        run.profiler.at(state.step)
        run.watch.beat("data", state.step)
        step_data = run.next_step_data()
        run.clock.mark("data")
        run.watch.beat("train", state.step)  # whoever still is at its data is whom the others wait for
        batches = [engine.to_device(batch) for batch in step_data.batches]
        num_items = engine.total(sum((b["labels"][:, 1:] != IGNORE_INDEX).sum() for b in batches))
        loss = torch.zeros((), dtype=torch.float64, device=engine.device)
        for number, batch in enumerate(engine.split_sequences(batch) for batch in batches):
            run.watch.beat("train", state.step)
            run.stop_if_asked()
            run.seed(number)
            with engine.accumulate():
                share, objective = run.step_loss(model, batch, num_items, len(batches) * run.data_size)
                engine.backward(objective)
                loss += share.detach()
        grad_norm = engine.clip_gradients()
        loss = engine.total_loss(loss)
        # The one time in a step that the host waits for the device, before the weights are touched.
        numbers = (loss.item(), grad_norm.item())
        run.clock.mark("forward_backward")
        # Where gradients are scaled, some overflow: those steps are left out and their norm says nothing.
        is_scaled = engine.precision == "fp16"
        problem = run.stability.problem(numbers[0], 0.0 if is_scaled else numbers[1])
        lr = run.scheduler.get_last_lr()
        if problem is None:
            engine.update()
        elif run.unstable(problem, step_data, *numbers):
            continue
        run.scheduler.step()
        run.clock.mark("optimizer")
        run.consume(step_data, numbers[0])
        if state.step % recipe.logging.every_steps == 0 or state.step == num_steps:
            run.log(state.window_loss / state.window_steps, numbers[1], lr)


def _finish(run: Run) -> Path:
    """Export, compare the export with the training process, write the card and the summary."""
    engine, model_path, main = run.engine, run.output_dir / "model", run.is_main
    reference = run.output_dir / verify.REFERENCE
    run.watch.beat("export", run.state.step)
    run.close()
    peak_memory = engine.largest(run.peak_memory.peak())
    batch = engine.to_device(run.read(run.data.example))
    with engine.evaluated_weights():
        verify.write_reference(run.model, batch, engine.forward_precision, reference if main else None)
        state_dict = engine.full_state_dict()
        if main:
            with engine.plain_initialization():
                export.write(
                    run.config, state_dict, run.tokenizer, model_path, run.recipe.model.dtype, run.generation_config
                )

    def verify_export() -> dict[str, Any]:
        return verify.verify_in_fresh_process(run.output_dir, _trusts_code(run.recipe), run.watch.unit_done)

    report = run.watch.from_main("verify the export", verify_export)
    if main:
        exported = {f"export/{key}": value for key, value in report.items()}
        run.records.row({"step": run.state.step, "tokens": run.state.tokens, **exported})
        run.records.plot()
        card.write_card(run.output_dir, model_path)
        if run.state.step > run.first_step:  # else what is measured is no training
            print("", _cost_report(run, peak_memory), sep="\n", flush=True)
        print(run_summary(run, report), flush=True)
        run.records.note_console(run.state.step)
    run.records.finish()
    engine.finish()
    return model_path


def _cost_report(run: Run, peak_memory: int) -> str:
    """What the run took beside what its plan says; `peak_memory`: bytes, the largest of all processes."""
    engine = run.engine
    # Only the steps of this process: earlier ones may have run under another engine.
    tokens_per_step = run.recipe.training.tokens_per_step
    seconds = table.seconds_per_step(run.records.history().speeds(), tokens_per_step, run.first_step)
    memory_is = f"{run.peak_memory.meaning}; the largest of all processes"
    settled = Settled(
        run.config,
        engine.precision,
        run.document_masking,
        run.chunked_loss,
        run.peak_flops if engine.device.type == "cpu" else None,
    )
    measured = table.Measured(peak_memory, memory_is, seconds)
    with engine.plain_initialization():  # the main process alone can't build under ZeRO-3, where all must take part
        return table.report(run.pinned, engine.name, engine.num_processes, settled, measured, run.output_dir)


def _trusts_code(recipe: Recipe) -> bool:
    return recipe.model.trust_remote_code or recipe.tokenizer.trust_remote_code


def main(arguments: list[str] | None = None) -> int:
    """`python -m hfpretrain.train RECIPE [--section.key=value ...]`; returns the exit code.

    Launchers turn all codes but 0 into 1, so the main process also writes its own into the file that
    `HFPRETRAIN_EXIT_CODE_FILE` names, where a batch script such as `recipes/launch.slurm` finds it.
    """
    console.keep_from_failing("stdout", "stderr")
    rank = int(os.environ.get("RANK", "0"))
    code = _main(sys.argv[1:] if arguments is None else arguments, rank)
    path = os.environ.get("HFPRETRAIN_EXIT_CODE_FILE")
    if path and rank == 0:
        try:
            Path(path).write_text(f"{code}\n", encoding="utf-8")
        except OSError as error:
            print(f"the exit code {code} can't be written to {path}: {error.strerror}", file=sys.stderr)
    return code


def _main(arguments: list[str], rank: int) -> int:
    transformers.utils.logging.disable_progress_bar()
    redaction.install()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hfpretrain").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    if not arguments or arguments[0].startswith("-"):
        print("usage: accelerate launch -m hfpretrain.train RECIPE [--section.key=value ...]", file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    try:
        path = train(_with_secrets(load_recipe(arguments[0], arguments[1:])))
    except RecipeError as error:
        if rank:
            time.sleep(5)  # the launcher ends all ranks with the first: where all have the error, the main one speaks
        _tell("\n  ".join([f"error in {arguments[0]}:", *map(str, error.problems)]))
        return 2
    except KeyboardInterrupt:
        if rank == 0:
            print("interrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130
    except StoppedEarlyError as error:
        _tell(f"stopped by {error}; what is finished stays, and the same command goes on from there")
        return STOPPED
    except (TrainingDivergedError, NotSavedError) as error:
        if rank == 0:
            _tell(f"stopped: {error}")
        return 1
    except Exception as error:
        if (text := files.refusal(error)) is None:
            raise
        advice = "make room or allow access there: what is finished stays, and the same command goes on from there"
        _tell(f"stopped: {text}; {advice}")
        return 1
    return STOPPED if path is None else 0


def _with_secrets(recipe: Recipe) -> Recipe:
    """The recipe with the secrets of addresses that the command which started this process knows."""
    secrets = json.loads(os.environ.pop(redaction.SECRETS, "[]"))
    return Recipe.model_validate(redaction.restored(recipe.model_dump(mode="json"), secrets)) if secrets else recipe


def _tell(text: str) -> None:
    """Print why a run ends; under torch's launcher its own report ends with it, too."""
    launch.leave_message(text)
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
