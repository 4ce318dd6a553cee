"""One run from its recipe to its end: set up, resume, train, export."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from hfpretrain import files
from hfpretrain.checkpoints import export, verify
from hfpretrain.data.batches import format_epochs
from hfpretrain.data.ledger import Consumption
from hfpretrain.data.tokenizer import SENTENCEPIECE
from hfpretrain.engines import distributed, launch, launcher
from hfpretrain.engines.base import Engine, is_out_of_memory
from hfpretrain.evaluation.base import BASE_EVALUATION, BaseEvaluation
from hfpretrain.evaluation.evaluator import Evaluator
from hfpretrain.modeling.build import compile_error
from hfpretrain.planning import table
from hfpretrain.planning.plan import ResolvedSettings
from hfpretrain.recipe.redaction import redact_all
from hfpretrain.recipe.schema import HubSection, Recipe, RecipeError, TrainingSection, longest_stage
from hfpretrain.recipe.yaml import flatten
from hfpretrain.training import report, run_folder
from hfpretrain.training.expert_load import ExpertLoad
from hfpretrain.training.feed import Feed
from hfpretrain.training.loop import fit, rehearse
from hfpretrain.training.profiler import Profiler
from hfpretrain.training.publisher import Publisher, record_publishing
from hfpretrain.training.records import Records, start_tracker
from hfpretrain.training.restore import find_newest_checkpoint, restore
from hfpretrain.training.saving import RESUME_ADVICE, RunSaver
from hfpretrain.training.setup import Setup, check_launch, set_up, start_engine
from hfpretrain.training.stability import Stability
from hfpretrain.training.state import TrainState
from hfpretrain.training.step_log import StepLog
from hfpretrain.training.stopping import Stopping, Stops, StopVote
from hfpretrain.training.watchdog import Watch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)


def run(
    recipe: Recipe,
    make_publisher: Callable[[Path, HubSection], Publisher],
    write_card: Callable[[Path, Path], None],
) -> Path | None:
    """Run a recipe; see `hfpretrain.train.train`.

    `make_publisher` is called with the run folder and the recipe's `hub` section; on ranks other than 0 the section is
    empty. `write_card` is called with the run folder and the folder of the export.
    """
    is_main = int(os.environ.get("RANK", "0")) == 0
    with Watch() as watch, Stops(recipe.training.stop_after_seconds) as stops:
        launch.require_first_run()
        launcher.end_with_launcher()
        check_launch(recipe)
        with run_folder.claim(recipe, is_main):
            engine = start_engine(recipe, watch)
            timeout_seconds = recipe.training.timeout_seconds
            vote = StopVote(stops, distributed.new_control_group(engine.num_processes, timeout_seconds))
            saving_group = distributed.new_control_group(engine.num_processes, timeout_seconds)
            with _explain_errors(recipe, engine):
                setup = set_up(recipe, engine, watch, stops.defer)
            with _explain_errors(setup.pinned, engine, setup.config):
                return _train(setup, saving_group, watch, stops, vote, make_publisher, write_card)


def _train(
    setup: Setup,
    saving_group: Any,
    watch: Watch,
    stops: Stops,
    vote: StopVote,
    make_publisher: Callable[[Path, HubSection], Publisher],
    write_card: Callable[[Path, Path], None],
) -> Path | None:
    """Resume, train, and end the run."""
    recipe, output_dir, is_main = setup.recipe, setup.output_dir, setup.is_main
    newest = find_newest_checkpoint(output_dir, setup.engine.process_index, watch)
    feed = Feed(setup, newest.path, watch, stops)
    watch.beat("rehearse", 0)
    # Each stage is rehearsed, the first one last, so that one that does not fit into memory fails now.
    for number in reversed(range(len(setup.stages.all))):
        setup.stages.enter_number(number)
        stage = setup.stages.current
        rehearse(setup.engine, setup.step_loss, feed.example(stage.first_step), stage.micro_batch_size)

    state, changes = TrainState(Consumption(len(feed.data.order.sizes), len(setup.stages.all))), []
    if newest.path is not None:
        changes = restore(setup, state, newest.path, feed.data, saving_group, watch)
        # Without a `metrics.jsonl` here, the evaluation is in the records of another run, so it is repeated.
        state.evaluated = state.evaluated and newest.has_records
    first_step = state.step
    base, unknown_base = _base_evaluation(setup, newest.path)
    feed.start(state)
    publisher = make_publisher(output_dir, recipe.hub if is_main else HubSection())
    if is_main:
        report.write_run_files(setup, state)
        publisher.start()
    saved_step = None if newest.path is None else first_step
    trackers = _tracker_starters(recipe, setup.engine.accelerator, state.run_id)
    records = Records(output_dir, trackers, is_main, setup.last_step, saved_step)
    for text in (*setup.notes, *newest.passed_over, *changes, *unknown_base):
        records.write_event(first_step, text)
    saver = RunSaver(
        setup,
        state,
        saving_group,
        publisher=publisher,
        records=records,
        stops=stops,
        watch=watch,
        base=base,
        saved_step=saved_step,
    )
    evaluator = Evaluator(
        recipe.evaluation,
        engine=setup.engine,
        prepared=setup.prepared,
        tokenizer=setup.tokenizer,
        token_bytes=setup.token_bytes,
        base_vocabulary=setup.base_vocabulary,
        has_validation=recipe.data.has_validation,
        document_masking=setup.document_masking,
        micro_batch_size=longest_stage(recipe.data, recipe.training).micro_batch_size,
        block_sizes=recipe.data.block_sizes,
        first_step=setup.origin.step,
        last_step=setup.last_step,
        base=base,
        records=records,
        beat=lambda: watch.beat("evaluate", state.step),
        stop_if_asked=vote.stop_if_asked,
    )
    stability = Stability(setup, state, saving_group, feed=feed, saver=saver, records=records, watch=watch)
    profiler = Profiler(setup.engine.accelerator, recipe.logging.profile_steps, output_dir / "profile")

    def close() -> None:
        """Close the profiler, the records, the data feed and the vote."""
        profiler.close()
        records.close()
        feed.close()
        vote.close()

    try:
        fit(
            setup,
            state,
            records,
            feed=feed,
            evaluator=evaluator,
            saver=saver,
            stability=stability,
            log=StepLog(
                state,
                setup.engine,
                recipe.training,
                streaming=recipe.data.streaming,
                stages=setup.stages,
                peak_flops=setup.peak_flops,
                peak_memory=setup.peak_memory,
                last_step=setup.last_step,
                expert_load=ExpertLoad(setup.router_recorder, setup.engine),
            ),
            profiler=profiler,
            watch=watch,
            stop_if_asked=vote.stop_if_asked,
        )
    except Stopping as stop:
        if stop.error is not None and state.step == first_step:
            raise stop.error from None
        if stops.reason == "training.stop_after" and state.step == first_step:
            raise _stopped_before_first_step(recipe.training, stops) from None
        reason = "an error in the data" if stop.error is not None else stops.reason or "another rank"
        _save_and_stop(state, saver, publisher, records, stops, close, reason)
        setup.engine.finish()
        if stop.error is not None:
            raise stop.error from None
        return None
    watch.beat("export", state.step)
    close()
    model_path = _finish(
        setup, state, first_step, feed.example(setup.stages.current.first_step), records, watch, write_card
    )
    watch.stop_watching()
    publisher.finish(stops.due)
    record_publishing(publisher, records, state.step)
    if (text := publisher.table()) != "":
        print("", text, sep="\n", flush=True)
    return model_path


def _base_evaluation(setup: Setup, checkpoint: Path | None) -> tuple[BaseEvaluation | None, list[str]]:
    """The evaluation of the model that the run trains further, which the newest checkpoint holds, if there is one.

    That is the trunk, if the run is a branch. It is None for a new model. Also returns a sentence if it should be in
    the checkpoint and is not.
    """
    name = setup.trunks[-1].given if setup.trunks else setup.recipe.model.pretrained
    if name is None or not setup.recipe.data.has_validation:
        return None, []
    base = BaseEvaluation(name)
    has_begun = checkpoint is not None and files.step_of(checkpoint) > setup.origin.step
    if not setup.is_main or checkpoint is None or not has_begun or base.load(checkpoint / BASE_EVALUATION):
        return base, []
    text = f"{checkpoint} has no evaluation of {name}, so what the run gains and loses is not measured"
    logger.warning(text)
    return base, [text]


def _stopped_before_first_step(training: TrainingSection, stops: Stops) -> RecipeError:
    used = (training.stop_after_seconds or 0) - (stops.seconds_left() or 0)
    message = f"{training.stop_after} ended before the first step, {used:.0f} s after the start"
    return RecipeError.at("training.stop_after", f"{message}; set a longer time")


def _save_and_stop(
    state: TrainState,
    saver: RunSaver,
    publisher: Publisher,
    records: Records,
    stops: Stops,
    close: Callable[[], None],
    reason: str,
) -> None:
    """Save the state, so that the same command resumes from it, and end the records. All ranks must call it.

    `reason`: why the run stops. Raises `NotSavedError` if the checkpoint could not be written.
    """
    start = time.perf_counter()
    saver.wait()
    if state.step not in (0, saver.saved_step):
        saver.save(in_background=False)
    saver.record(is_last=True)
    publisher.close()
    record_publishing(publisher, records, state.step)
    left = stops.seconds_left()
    text = f"stopped by {reason} at step {state.step}"
    text += f"; saving took {time.perf_counter() - start:.1f} s"
    text += "" if left is None else f", and {left:.0f} s of training.stop_after are left"
    records.write_event(state.step, text)
    close()
    records.print_line(f"{text}; {RESUME_ADVICE}")
    records.record_output_errors(state.step)
    records.finish()


def _finish(
    setup: Setup,
    state: TrainState,
    first_step: int,
    example: dict[str, torch.Tensor],
    records: Records,
    watch: Watch,
    write_card: Callable[[Path, Path], None],
) -> Path:
    """Export the model, compare the export with the training process, write the card and print the summary.

    `example`: the batch to compare on. All ranks must call it. Returns the folder of the export.
    """
    engine, recipe, output_dir = setup.engine, setup.recipe, setup.output_dir
    model_path, reference = output_dir / "model", output_dir / verify.REFERENCE
    peak_memory = engine.largest(setup.peak_memory.peak())
    with engine.evaluated_weights():
        batch = engine.to_device(example)
        verify.write_reference(engine.model, batch, engine.forward_precision, reference if setup.is_main else None)
        state_dict = engine.full_state_dict()
        if setup.is_main:
            with engine.plain_initialization():
                export.write_model(
                    setup.config,
                    state_dict,
                    setup.tokenizer,
                    model_path,
                    recipe.model.dtype,
                    setup.generation_config,
                    output_dir / export.CONFIG_FOLDER / SENTENCEPIECE,
                )

    def verify_export() -> dict[str, Any]:
        trusts_code = recipe.model.trust_remote_code or recipe.tokenizer.trust_remote_code
        return verify.verify_in_fresh_process(output_dir, trusts_code, watch.unit_done)

    verified = watch.run_on_main("verify the export", verify_export)
    if setup.is_main:
        exported = {f"export/{key}": value for key, value in verified.items()}
        records.write_row({"step": state.step, "tokens": state.tokens, **exported})
        records.draw_plot()
        write_card(output_dir, model_path)
        if state.step > first_step:  # else nothing was trained or measured
            print("", _plan_report(setup, first_step, peak_memory, records), sep="\n", flush=True)
        summary = report.run_summary(
            state,
            records.history(),
            verified,
            output_dir=output_dir,
            num_parameters=setup.parameters.total,
            epochs=None if setup.epochs is None else format_epochs(recipe.data.sources, setup.epochs),
            notes=setup.notes,
            trunks=setup.trunks,
        )
        print(summary, flush=True)
        records.record_output_errors(state.step)
    records.finish()
    engine.finish()
    return model_path


def _plan_report(setup: Setup, first_step: int, peak_memory: int, records: Records) -> str:
    """The plan of the run beside what it measured, as text. `peak_memory`: bytes, the largest of all processes."""
    # Only the steps of this process: earlier ones may have run under another engine.
    tokens_per_step = setup.recipe.training.tokens_per_step
    seconds = table.mean_seconds_per_step(records.history().speeds(), tokens_per_step, first_step)
    measured = table.Measured(peak_memory, f"{setup.peak_memory.meaning}; the largest of all processes", seconds)
    engine = setup.engine
    resolved = ResolvedSettings(
        setup.config,
        engine.precision,
        setup.document_masking,
        setup.chunked_loss,
        setup.peak_flops if engine.device.type == "cpu" else None,
    )
    with engine.plain_initialization():  # under ZeRO-3 all processes must build a model together
        return table.write_report(setup.pinned, engine.name, engine.num_processes, resolved, measured, setup.output_dir)


@contextlib.contextmanager
def _explain_errors(recipe: Recipe, engine: Engine, config: PretrainedConfig | None = None) -> Iterator[None]:
    """Turn two kinds of errors into a `RecipeError`: layers that don't compile, and running out of memory.

    The message of the second contains the plan of the run and what would help most. `config`: the model's, if it is
    known already.
    """
    try:
        yield
    except RuntimeError as error:
        if (found := compile_error(error)) is not None:
            raise found from None
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # the frames hold the tensors that filled the memory
        resolved = ResolvedSettings(config, engine.precision)
        text = str(error).partition("\n")[0]
        with engine.plain_initialization():
            message = table.out_of_memory_message(
                recipe, engine.name, engine.num_processes, resolved, engine.device_name, text
            )
        raise RecipeError.at("training.micro_batch_size", message) from None


def _tracker_starters(recipe: Recipe, accelerator: Accelerator, run_id: str) -> dict[str, Any]:
    """Functions that start the trackers of the recipe, by tracker name."""
    config = {key: str(value) for key, value in flatten(redact_all(recipe.model_dump(mode="json")))}
    return {
        name: functools.partial(start_tracker, accelerator, name, recipe.logging.project_name, config, run_id)
        for name in recipe.logging.trackers
    }
