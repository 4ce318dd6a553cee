"""The training loop."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

from hfpretrain.data.batches import StepData
from hfpretrain.engines.base import Engine
from hfpretrain.evaluation.evaluator import Evaluator, is_due
from hfpretrain.modeling import optim
from hfpretrain.modeling.loss import StepLoss
from hfpretrain.recipe.labels import IGNORE_INDEX
from hfpretrain.training.feed import Feed
from hfpretrain.training.profiler import Profiler
from hfpretrain.training.records import Records
from hfpretrain.training.saving import RunSaver
from hfpretrain.training.setup import Setup
from hfpretrain.training.stability import Stability
from hfpretrain.training.state import TrainState
from hfpretrain.training.step_log import StepLog
from hfpretrain.training.watchdog import Watch


def fit(
    setup: Setup,
    state: TrainState,
    records: Records,
    *,
    feed: Feed,
    evaluator: Evaluator,
    saver: RunSaver,
    stability: Stability,
    log: StepLog,
    profiler: Profiler,
    watch: Watch,
    stop_if_asked: Callable[[], None],
) -> None:
    """Train from `state` to the last step. All ranks must call it.

    `stop_if_asked` is called before each micro-step and may raise `Stopping`. Raises `TrainingDivergedError` if
    `Stability.handle` does, and `NotSavedError` if the last checkpoint could not be written.
    """
    recipe, engine, clock = setup.recipe, setup.engine, log.clock
    last_step, tokens_per_step, stages = setup.last_step, recipe.training.tokens_per_step, setup.stages

    def before_micro_step(micro_step: int) -> None:
        watch.beat("train", state.step)
        stop_if_asked()
        stage = stages.current
        first = (state.step - stage.first_step) * engine.data_size + engine.data_index
        first = (first * stage.accumulation_steps + micro_step) * stage.micro_batch_size
        seed_dropout(engine, recipe.seed, stage.first_sequence + first)

    while True:
        # What is evaluated is the model of the step that is done.
        before, following = max(0, state.data_step(state.step - 1)), state.data_step(state.step)
        stages.enter(before)
        ends_stage = stages.end_between(before, following) and state.step < last_step
        if not state.evaluated and (evaluation := evaluator.evaluate(state.step, state.tokens, ends_stage)) is not None:
            state.evaluated, state.evaluation_loss = True, evaluation.loss
            clock.mark("evaluate")
        is_last = state.step >= last_step
        if state.step not in (0, saver.saved_step) and is_due(state.step, recipe.checkpoint.every_steps, last_step):
            saver.save(in_background=recipe.checkpoint.async_save and not is_last)
        saver.record(is_last)
        clock.mark("save")
        if is_last:
            return
        profiler.update(state.step)
        if stages.enter(state.data_step(state.step)):
            state.losses.clear()  # the first losses of a stage are not compared with those of another
            records.write_event(state.step, text := f"stage {stages.number + 1} begins: {stages.current}")
            records.print_line(f"step {state.step + 1}: {text}")
        watch.beat("data", state.step)
        step_data = feed.next()
        clock.mark("data")
        # A rank that still waits for its data does not get here, so `Watch` sees that it is behind the others.
        watch.beat("train", state.step)
        engine.begin_step(state.step)
        logs_next = is_due(state.step + 1, recipe.logging.every_steps, last_step)
        setup.router_recorder.begin_step(measures_z=logs_next)
        loss, grad_norm = compute_gradients(engine, setup.step_loss, step_data, before_micro_step)
        clock.mark("forward_backward")
        lr, lr_by_group = optim.scheduled_rate(setup.scheduler), setup.scheduler.get_last_lr()
        problem = stability.find_problem(loss, grad_norm)
        if problem is None:
            engine.update()
            setup.router_recorder.finish_step(engine.total_loss)
        elif stability.handle(problem, step_data, loss, grad_norm):
            continue
        setup.scheduler.step()
        clock.mark("optimizer")
        state.advance(step_data, loss, tokens_per_step, setup.settings, stages.number)
        records.advance_progress()
        if logs_next:
            log.write(records, grad_norm, lr, lr_by_group)


def compute_gradients(
    engine: Engine, step_loss: StepLoss, step_data: StepData, before_micro_step: Callable[[int], None]
) -> tuple[float, float]:
    """Compute the gradients of an optimizer step, and clip them.

    `before_micro_step` is called with the number of each micro-step, from 0.

    Returns the loss and the norm of the gradients before clipping. The loss is the mean over all label tokens of the
    step, on all processes. The norm is not finite if any gradient is not.
    """
    batches = [engine.to_device(batch) for batch in step_data.batches]
    num_items = engine.total(sum((batch["labels"][:, 1:] != IGNORE_INDEX).sum() for batch in batches))
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    for micro_step, batch in enumerate(map(engine.split_sequences, batches)):
        before_micro_step(micro_step)
        with engine.accumulate():
            loss, objective = step_loss(engine.model, batch, num_items, len(batches) * engine.loss_parts)
            engine.backward(objective)
            total += loss.detach()
    grad_norm = engine.clip_gradients()
    total = engine.total_loss(total)
    # Here the host waits for the device, for the only time in a step. The weights have not changed yet.
    return total.item(), grad_norm.item()


def seed_dropout(engine: Engine, seed: int, sequence: int) -> None:
    """Seed dropout for a micro-batch, from the recipe's seed and from `sequence`.

    `sequence`: the number of sequences before the micro-batch, counted from the start of the run over all processes. So
    a resume has no random state to restore, and the number of processes does not change what is dropped.
    """
    parts = [seed, sequence, engine.dropout_index]
    engine.seed(int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()))


def rehearse(engine: Engine, step_loss: StepLoss, example: dict[str, torch.Tensor], micro_batch_size: int) -> None:
    """Run one step on copies of `example` without changing the weights.

    So a model that does not compile, or does not fit into memory, fails before training begins.
    """
    batch = engine.to_device({name: tensor.repeat(micro_batch_size, 1) for name, tensor in example.items()})
    batch = engine.split_sequences(batch)
    with engine.rehearsal():
        num_items = torch.tensor(batch["labels"].numel())
        _, objective = step_loss(engine.model, batch, num_items, 1)
        engine.backward(objective * 0.0)
        engine.clip_gradients()
        engine.update()
