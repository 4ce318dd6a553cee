"""What a run trains: its data, model and optimizer, and the facts found while they are made."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hfpretrain.checkpoints import resume, trunk
from hfpretrain.checkpoints.trunk import Origin, Trunk
from hfpretrain.data.batches import epochs_by_source, format_epochs
from hfpretrain.data.encode import token_bytes
from hfpretrain.data.extension import Extension, Pieces, load_extension
from hfpretrain.data.prepare import load_prepared_tokenizer, prepare, wait_for_prepared
from hfpretrain.data.prepared import PreparedData
from hfpretrain.data.source_files import log_once
from hfpretrain.data.summary import limit_notes, preparation_notes, reading_notes
from hfpretrain.data.tokenizer import describe_framing, load_tokenizer, set_chat_template
from hfpretrain.engines import choose, launch
from hfpretrain.engines.base import Engine
from hfpretrain.evaluation.validation import BaseVocabulary
from hfpretrain.modeling import initialization, optim
from hfpretrain.modeling.build import apply_liger_kernel, build_model, compile_layers, import_model_code, should_compile
from hfpretrain.modeling.checks import (
    Isolation,
    examine_loss,
    find_isolation,
    leak_reason,
    require_causal,
    resolve_document_masking,
    use_chunked_loss,
)
from hfpretrain.modeling.config import (
    context_note,
    dtype_note,
    generation_config,
    load_config,
    override_notes,
    resolve_config,
)
from hfpretrain.modeling.documents import pass_boundaries
from hfpretrain.modeling.embeddings import add_token_embeddings
from hfpretrain.modeling.flops import model_flops_per_token
from hfpretrain.modeling.groups import ParameterGroups, first_trained_step
from hfpretrain.modeling.loss import StepLoss
from hfpretrain.modeling.rope import change_rope, rope_of_stages
from hfpretrain.modeling.routers import (
    Balance,
    RouterRecorder,
    find_routers,
    float32_biases,
    keep_biases_whole,
    resolve_balance,
    set_float32_biases,
)
from hfpretrain.modeling.structure import FrozenPart, Parameters, count_parameters, frozen_part
from hfpretrain.modeling.trainable import UntrainedParameters, freeze_outside_loss, train_padding_rows
from hfpretrain.planning import devices
from hfpretrain.recipe.redaction import redact_all
from hfpretrain.recipe.schema import LengthStage, Recipe, RecipeError, TokenizerSection, length_stages
from hfpretrain.recipe.yaml import flatten
from hfpretrain.training import commits, preflight, vocabulary
from hfpretrain.training.peak_memory import PeakMemory
from hfpretrain.training.stages import Stage, Stages
from hfpretrain.training.versions import LIBRARIES, version_of
from hfpretrain.training.watchdog import Watch

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


class Notes(list[str]):
    """Sentences about what changes training although the recipe does not ask for it. They go into the run's records."""

    def add(self, text: str | None) -> None:
        """Log a sentence and keep it, unless it is None or already there."""
        if text is not None and text not in self:
            self.append(text)
            logger.info(text)


@dataclass(frozen=True)
class Setup:
    """What a run trains, and the facts found while it was made. It stays the same during the whole run."""

    recipe: Recipe
    pinned: Recipe
    """The recipe with Hub commits as the revisions of its model and its tokenizer."""
    hub_commits: dict[str, str | None]
    """These commits by key; see `commits.find`."""
    trunks: list[Trunk]
    """Where the run branched off other runs, the oldest first; empty if it is no branch."""
    output_dir: Path
    engine: Engine
    """Holds the model and the optimizer."""
    scheduler: Any
    """The learning rate scheduler, one of torch's."""
    tokenizer: PreTrainedTokenizerFast
    prepared: PreparedData
    base_vocabulary: BaseVocabulary | None
    """What the model's base lacked, if `tokenizer.extend` added tokens to a pretrained model."""
    config: PretrainedConfig
    """The config of the model that was built."""
    generation_config: GenerationConfig | None
    step_loss: StepLoss
    router_recorder: RouterRecorder
    """Counts the tokens of each expert, and balances them. It has no routers if the model has no experts."""
    stages: Stages
    """The stages with their block size and batch; a single one for most runs."""
    document_masking: bool
    """Whether the documents in a block are masked from each other."""
    chunked_loss: bool
    """Whether the loss is computed without all logits at once."""
    parameters: Parameters
    untrained: UntrainedParameters
    undecayed: list[str]
    """Names of the matrices without weight decay."""
    optimizer_groups: list[dict[str, Any]]
    """The optimizer's groups, with the names of their parameters."""
    initial_weights: Any
    """What `initialization.check_weights` returned."""
    token_bytes: torch.Tensor
    """Bytes of text that each token stands for, on the device: int64 (vocab_size,)."""
    epochs: list[float] | None
    """How often the run goes through each source, None for a stream."""
    peak_flops: float | None
    """FLOP/s of all devices together. None if unknown. In a CPU run, only rank 0 has it."""
    peak_memory: PeakMemory
    notes: Notes

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the process that writes the records."""
        return self.engine.process_index == 0

    @property
    def origin(self) -> Origin:
        """What the run had behind it when it began."""
        return trunk.origin_of(self.trunks)

    @property
    def last_step(self) -> int:
        """The number of the run's last step. The steps of a branch follow those of its trunk."""
        return self.origin.step + self.recipe.training.num_steps

    @property
    def settings(self) -> dict[str, Any]:
        """The settings under which this process trains now. They may differ after a resume, and in another stage."""
        stage = {"block_size": self.stages.current.block_size} if len(self.stages.all) > 1 else {}
        return stage | {
            "engine": self.engine.name,
            "num_processes": self.engine.num_processes,
            "device": self.engine.device_name,
            "precision": self.engine.precision,
            "attn_implementation": self.config._attn_implementation,
            "document_masking": self.document_masking,
            "num_steps": self.last_step,
        }

    @property
    def data_identity(self) -> str:
        """Checksum of the prepared data. For a stream, it also covers the sources as they were when the run began."""
        if not self.recipe.data.streaming:
            return self.prepared.checksum
        sources = json.dumps([self.prepared.checksum, self.prepared.manifest["source_identities"]])
        return hashlib.sha256(sources.encode()).hexdigest()


def check_launch(recipe: Recipe) -> None:
    """Raise `RecipeError` if the accelerate config file has an unsupported setting, if the number of started processes
    is not the one asked for, or if the optimizer's library is missing."""
    choose.require_supported()
    launch.require_requested_processes()
    optim.require_library(recipe.optimizer)


def start_engine(recipe: Recipe, watch: Watch) -> Engine:
    """Build the engine that the accelerate config file asks for, and check that all ranks run the same.

    From then on `watch` ends the run if a rank fails or hangs. Raises `RecipeError` if the engine can't train the
    recipe, or if the ranks differ in recipe, engine or versions.
    """
    training = recipe.training
    engine = choose.build_engine(
        training.mixed_precision, list(recipe.logging.trackers), recipe.output_dir, training.timeout_seconds
    )
    choose.require_optimizer(recipe.optimizer.name, engine.name)
    check_ranks_agree(recipe, engine, watch)
    return engine


def check_ranks_agree(recipe: Recipe, engine: Engine, watch: Watch) -> None:
    """Raise `RecipeError` on all ranks if they differ in recipe, engine or versions; otherwise start to watch them."""
    facts = {
        "python": platform.python_version(),
        **{name: version_of(name) for name in (*LIBRARIES, "deepspeed")},
        "engine": engine.name,
        "precision": engine.precision,
        **dict(flatten(redact_all(recipe.model_dump(mode="json")))),
    }
    watch.start(engine.process_index, engine.num_processes, recipe.training.timeout_seconds, facts)


def set_up(recipe: Recipe, engine: Engine, watch: Watch, before_building: Callable[[], None]) -> Setup:
    """Prepare the data, build model and optimizer, and test the model. All ranks must call it.

    `before_building` is called after the data are prepared. Raises `RecipeError` if the recipe, data, model and engine
    are incompatible.
    """
    given, training, notes = recipe, recipe.training, Notes()
    lengths = length_stages(recipe.data, training)
    micro_steps = [stage.accumulation_steps(training.tokens_per_step, engine.data_size) for stage in lengths]
    longest = recipe.data.longest_block_size
    trunks = _fetch_checkpoint(given, watch, notes)
    origin = trunk.origin_of(trunks)
    recipe = trunk.with_trunk_tokenizer(recipe, trunks)
    hub_commits: dict[str, str | None] = watch.run_on_main(
        "ask the Hub for commits",
        lambda: commits.find(
            recipe.model,
            recipe.tokenizer,
            Path(given.output_dir),
            given.checkpoint.branch_from or given.checkpoint.resume_from,
        ),
    )
    for text in commits.notes(recipe.model, recipe.tokenizer, hub_commits):
        notes.add(text)
    recipe = commits.pin_revisions(recipe, hub_commits)
    model_facts = (load_config(recipe.model), recipe.model.attn_implementation)
    for block_size in recipe.data.block_sizes:
        choose.require_model(engine.name, engine.processes_per_sequence, *model_facts, block_size)
    watch.run_on_main("check the model", lambda: _check_model(recipe, engine))
    prepared, tokenizer = _load_data(recipe, engine.process_index == 0, watch, notes)
    if trunks:
        watch.run_on_main("compare the tokenizer", lambda: _require_trunk_tokenizer(given, trunks, tokenizer))
    before_building()
    watch.beat("build", 0)

    vocab_size, tokenizer_size = prepared.manifest["vocab_size"], prepared.manifest["tokenizer_size"]
    extension = None if recipe.model.pretrained is None else load_extension(prepared.path)
    if extension is not None:
        tokenizer_size = extension.first_id  # the checkpoint has embeddings for the base tokenizer
    config = resolve_config(recipe.model, vocab_size, tokenizer, tokenizer_size, longest, recipe.data.longest_block_key)
    ropes = rope_of_stages(config, lengths)
    notes.add(trunk.rope_note(trunks, getattr(config.get_text_config(), "rope_parameters", None) or {}))
    notes.add(context_note(recipe.model, config, longest))
    notes.add(dtype_note(recipe.model, config))
    for text in override_notes(recipe.model):
        notes.add(text)
    generation = generation_config(recipe.model, tokenizer)
    import_model_code(config)
    if recipe.model.attn_implementation.startswith("flex") and engine.device.type == "cpu":
        raise RecipeError.at("model.attn_implementation", "flex_attention has no backward pass on CPUs; use sdpa")
    peak_memory = PeakMemory()
    with engine.plain_initialization():
        model = build_model(recipe.model, config, seed=recipe.seed, note=notes.add)
        base_vocabulary, old_size = None, model.config.vocab_size
        if extension is not None:
            new_ids = add_token_embeddings(model, extension.first_id, extension.pieces, vocab_size)
            base_vocabulary = BaseVocabulary(Pieces(extension), new_ids)
            notes.add(_growth_note(extension, old_size, model.config.vocab_size))
        untrained = freeze_outside_loss(model, longest)
    attention = model.config._attn_implementation
    if recipe.model.attn_implementation == "auto" and attention != "sdpa":
        logger.info("attention is %s, since %s does not support sdpa", attention, type(model).__name__)
    for line in str(untrained).splitlines():
        notes.add(line)
    for row in train_padding_rows(model):
        notes.add(f"token {row} is padding in {config.model_type} and occurs in text, so its embedding is trained")
    parameters, routers = count_parameters(model), find_routers(model)
    keep_biases_whole(routers)
    router_biases = float32_biases(routers)

    decayed, hidden = optim.decayed_names(model, recipe.optimizer.no_decay), optim.hidden_names(model)
    undecayed = optim.undecayed_matrices(model, decayed)
    if extension is not None and extension.pieces:
        first_new_row = extension.first_id
    else:
        first_new_row = None
        _refuse_groups_of_new_rows(recipe)
    groups = ParameterGroups(model, recipe.optimizer, decayed, first_new_row)
    groups.freeze()
    frozen = frozen_part(model, groups.frozen)
    for line in groups.lines(training.num_steps):
        notes.add(line)
    phases = groups.phases if recipe.optimizer.groups else None
    if trunks:
        watch.run_on_main(
            "compare the model with the trunk's", lambda: _require_trunk_state(given, origin, model, groups)
        )
    optimizer_groups = optim.named_groups(model, recipe.optimizer, decayed, hidden, phases)
    weights = None
    if recipe.model.pretrained is None:
        weights = initialization.InitialWeights(model, recipe.seed, recipe.model.depth_scaled_init, watch.unit_done)
    if recipe.model.use_liger_kernel:
        apply_liger_kernel(model)
    schedulers: list[Any] = []

    def build_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
        optimizer = optim.build_optimizer(model, recipe.optimizer, decayed, hidden, phases)
        num_steps = origin.step - origin.schedule_step + training.num_steps
        schedulers.append(optim.build_scheduler(optimizer, recipe.scheduler, num_steps, origin.schedule_step))
        return optimizer

    engine.prepare(
        model,
        weights,
        build_optimizer,
        micro_batch_size=training.micro_batch_size,
        accumulation_steps=micro_steps[0],
        max_grad_norm=training.max_grad_norm,
        all_get_gradients=untrained.is_known,
    )
    set_float32_biases(routers, router_biases)
    network = probe = engine.unwrapped_model
    initial_weights = initialization.check_weights(
        engine.full_parameters(), weights.expected_moments() if weights else None, watch.unit_done
    )
    if engine.precision == "fp8":
        # Layers in fp8 scale by the largest value in a batch, so every token changes every other token a little. The
        # tests of what a token sees therefore need a copy of the model without fp8.
        probe = build_model(recipe.model, config, seed=recipe.seed)
        if extension is not None:
            add_token_embeddings(probe, extension.first_id, extension.pieces, vocab_size)
        probe = initialization.fill(probe, weights).to(engine.device)
    require_causal(probe, recipe.model, half_precision=engine.accelerator.mixed_precision != "no")
    packs = watch.run_on_main(
        "look for blocks of several documents", lambda: recipe.data.streaming or prepared.packs_documents()
    )
    wanted = training.document_masking
    isolation = Isolation(None) if wanted is False else find_isolation(probe, longest)
    leak = isolation.leak
    if isolation.boundaries is not None:
        for one in {network, probe}:
            pass_boundaries(one, isolation.boundaries)
        logger.info("%s keeps packed documents apart by %s", type(network).__name__, isolation.boundaries)
    is_compiled = should_compile(training.compile, training.num_steps * max(micro_steps), engine.can_compile)
    stages = Stages(_stages(recipe, lengths, micro_steps, ropes, model.config, parameters, frozen), engine, is_compiled)
    if wanted is not False and leak is None:
        leak = _leak_of_later_stages(stages, probe, longest)
    document_masking = resolve_document_masking(wanted, leak, packs, probe, longest)
    if packs and not document_masking:
        notes.add("documents in a block are not masked from each other (training.document_masking)")
    chunked_loss = use_chunked_loss(engine.model, training.chunked_loss, training.z_loss)
    step_loss = examine_loss(engine.model)
    notes.add(step_loss.note(type(network).__name__))
    balance = resolve_balance(
        network, routers, step_loss.adds_term, training.router_bias_rate, training.router_aux_loss_coef
    )
    notes.add(None if balance is None else str(balance))
    recorder = RouterRecorder(routers, engine.device, balance or Balance())
    step_loss = replace(step_loss, recorder=recorder)
    if is_compiled:
        compile_layers(network)
    for text in _stage_notes(stages, origin.step):
        notes.add(text)
    return Setup(
        recipe=given,
        pinned=recipe,
        hub_commits=hub_commits,
        trunks=trunks,
        output_dir=Path(recipe.output_dir),
        engine=engine,
        scheduler=schedulers[0],
        tokenizer=tokenizer,
        prepared=prepared,
        base_vocabulary=base_vocabulary,
        config=model.config,
        generation_config=generation,
        step_loss=step_loss,
        router_recorder=recorder,
        stages=stages,
        document_masking=document_masking,
        chunked_loss=chunked_loss,
        parameters=parameters,
        untrained=untrained,
        undecayed=undecayed,
        optimizer_groups=optim.groups_record(optimizer_groups, groups.frozen),
        initial_weights=initial_weights,
        token_bytes=torch.from_numpy(token_bytes(tokenizer, model.config.vocab_size)).to(engine.device),
        epochs=_epochs(recipe, prepared, origin.sequence),
        peak_flops=_peak_flops(engine),
        peak_memory=peak_memory,
        notes=notes,
    )


def _fetch_checkpoint(recipe: Recipe, watch: Watch, notes: Notes) -> list[Trunk]:
    """Fetch the checkpoint that the recipe names. Returns the trunks of the run, which the main process reads."""
    run = Path(recipe.output_dir)

    def work() -> list[Any]:
        texts = resume.fetch_initial_checkpoint(recipe, watch.unit_done)
        return [texts, trunk.to_json(trunk.read_trunks(run))]

    texts, found = watch.run_on_main("fetch the checkpoint that the recipe names", work)
    trunks = trunk.from_json(found)
    for text in (*texts, *trunk.notes(trunks, trunk.origin_of(trunks).step + recipe.training.num_steps)):
        notes.add(text)
    return trunks


def _require_trunk_tokenizer(recipe: Recipe, trunks: Sequence[Trunk], tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise `RecipeError` if a branch would read its text with another vocabulary than its trunk."""
    folder = Path(recipe.output_dir) / trunk.TOKENIZER
    if not folder.is_dir():
        return
    section = TokenizerSection(pretrained=str(folder), trust_remote_code=recipe.tokenizer.trust_remote_code)
    theirs, ours = load_tokenizer(section).get_vocab(), tokenizer.get_vocab()
    if changed := sorted(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token)):
        examples = "; ".join(
            f"{one!r} is {ours.get(one, 'missing')} now, was {theirs.get(one, 'missing')}" for one in changed[:3]
        )
        message = f"the ids of {len(changed):,} tokens are not those of {trunks[-1].given}: {examples}"
        message += ". A branch needs the tokenizer of its trunk"
        if recipe.tokenizer.extend is not None:
            message += (
                ", and tokenizer.extend learns other tokens on other text. Keep the trunk's data.sources, or start a "
                "new run from its weights alone, with its export as model.pretrained and tokenizer.pretrained, and "
                "without tokenizer.extend"
            )
        raise RecipeError.at("tokenizer", message)


def _refuse_groups_of_new_rows(recipe: Recipe) -> None:
    """Raise `RecipeError` if a group of the optimizer is for the rows of new tokens."""
    for number, group in enumerate(recipe.optimizer.groups):
        if group.rows_from == "new":
            message = "`tokenizer.extend` has added no token, so there are no new rows; leave it out"
            raise RecipeError.at(f"optimizer.groups.{number}.rows_from", message)


def _require_trunk_state(recipe: Recipe, origin: Origin, model: torch.nn.Module, groups: ParameterGroups) -> None:
    """Raise `RecipeError` if the checkpoint at which a branch begins does not have the state of `model`: tensors of the
    same shapes, and optimizer state of all parameters that are trained from the first step on."""
    path = Path(recipe.output_dir) / "checkpoints" / f"step-{origin.step:08d}"
    if not path.is_dir():  # later it is deleted, as older checkpoints are
        return
    parameters = dict(model.named_parameters())
    resume.require_same_shapes(path, {name: tuple(value.shape) for name, value in parameters.items()})
    resume.require_optimizer_state(
        path,
        [
            name
            for name, parameter in parameters.items()
            if parameter.requires_grad and first_trained_step(groups.phases[name]) == 0
        ],
    )


def _growth_note(extension: Extension, old_size: int, new_size: int) -> str:
    """How the embeddings of new tokens begin."""
    grown = "" if new_size == old_size else f"; the vocabulary of the model grows from {old_size:,} to {new_size:,}"
    return (
        f"the tokens {extension.first_id:,} to {extension.size - 1:,} are new: each embedding begins as the mean of "
        f"those of the tokens that it joins{grown}"
    )


def _stages(
    recipe: Recipe,
    lengths: list[LengthStage],
    micro_steps: list[int],
    ropes: list[dict[str, Any] | None],
    config: PretrainedConfig,
    parameters: Parameters,
    frozen: FrozenPart,
) -> list[Stage]:
    """The stages of a run. The lists have an entry for each. `frozen`: see `model_flops_per_token`."""
    found: list[Stage] = []
    for length, steps, rope in zip(lengths, micro_steps, ropes, strict=True):
        first_sequence = 0
        if found:
            before = found[-1]
            first_sequence = before.first_sequence + (length.first_step - before.first_step) * before.sequences
        stage = Stage(
            length.first_step,
            first_sequence,
            length.block_size,
            length.micro_batch_size,
            steps,
            recipe.training.tokens_per_step // length.block_size,
            model_flops_per_token(config, parameters, length.block_size, frozen),
            rope,
        )
        found.append(stage)
    return found


def _leak_of_later_stages(stages: Stages, model: PreTrainedModel, block_size: int) -> str | None:
    """The `leak_reason` of a model with the rotary position embedding of a later stage; None if there is none."""
    network, reasons = stages.engine.unwrapped_model, []
    for number in range(1, len(stages.all)):
        stages.enter_number(number)
        if model is not network and (rope_parameters := stages.current.rope_parameters) is not None:
            change_rope(model, rope_parameters)
        reasons.append(leak_reason(model, block_size))
    stages.enter_number(0)
    return next((reason for reason in reasons if reason is not None), None)


def _stage_notes(stages: Stages, first_step: int) -> Iterator[str]:
    """A sentence about each stage, if there are several. `first_step`: number of steps before the run."""
    if len(stages.all) > 1:
        yield f"stage 1 begins with step {first_step + 1}: {stages.all[0]}"
    for number, (before, stage) in enumerate(itertools.pairwise(stages.all), 2):
        order = ""
        if before.block_size != stage.block_size:
            order = ". It reads the text in a new order, so text of an earlier stage may come again"
        yield f"stage {number} begins with step {first_step + stage.first_step + 1}: {stage}{order}"


def _load_data(
    recipe: Recipe, is_main: bool, watch: Watch, notes: Notes
) -> tuple[PreparedData, PreTrainedTokenizerFast]:
    """The prepared data and their tokenizer, with notes about both."""
    texts = watch.run_on_main(
        "check the vocabulary", lambda: vocabulary.check_tokenizer(recipe.model, recipe.tokenizer, recipe.data)
    )
    prepared = _prepare(recipe, watch)
    tokenizer = load_prepared_tokenizer(prepared, recipe.tokenizer.trust_remote_code)
    set_chat_template(tokenizer, recipe.tokenizer)
    logger.info(describe_framing(tokenizer))
    if is_main and recipe.tokenizer.pretrained is None:
        texts = vocabulary.require_matching_ids(recipe.model, recipe.tokenizer, tokenizer)
    for text in (*limit_notes(prepared), *preparation_notes(prepared), *texts):
        notes.add(text)
    for text in reading_notes(prepared):
        log_once(text)  # if the data was prepared now, it is logged already
        notes.append(text)
    return prepared, tokenizer


def _prepare(recipe: Recipe, watch: Watch) -> PreparedData:
    """Prepare the data on the main process; the other ranks open the folder that it has prepared."""
    prepared: list[PreparedData] = []

    def work() -> list[str]:
        prepared.append(prepare(recipe))
        return [prepared[0].path.name, prepared[0].checksum]

    name, checksum = watch.run_on_main(f"prepare the data in {recipe.prepared_dir}", work)
    if prepared:
        return prepared[0]
    return wait_for_prepared(recipe.prepared_dir / name, recipe.data.prepared_dir, checksum, watch.unit_done)


def _check_model(recipe: Recipe, engine: Engine) -> None:
    """Raise `RecipeError` if the model of a new run can't be built, before hours are spent on preparing text."""
    if not any((Path(recipe.output_dir) / "checkpoints").glob("step-*")):
        with engine.plain_initialization():
            extends = recipe.tokenizer.extend is not None
            preflight.require_buildable_model(recipe.model, recipe.optimizer, recipe.training, extends)


def _epochs(recipe: Recipe, prepared: PreparedData, first_sequence: int) -> list[float] | None:
    if recipe.data.streaming:
        return None
    found = epochs_by_source(recipe.data, recipe.training, recipe.seed, prepared, first_sequence)
    logger.info("epochs of the training text: %s", format_epochs(recipe.data.sources, found))
    return found


def _peak_flops(engine: Engine) -> float | None:
    """FLOP/s of all devices together: data sheet values for accelerators, a measured matrix product for a CPU."""
    if engine.device.type != "cpu":
        peak = devices.peak_flops(engine.device_name, engine.precision)
        return peak and peak * engine.num_processes
    hosts = max(1, engine.num_processes // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return devices.measure_cpu_flops(engine.precision) * hosts if engine.process_index == 0 else None
