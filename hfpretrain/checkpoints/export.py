"""Exporting weights, or a checkpoint, as a plain Hugging Face folder that `from_pretrained` reads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hfpretrain import files
from hfpretrain.checkpoints import resume, saver, verify
from hfpretrain.data import order
from hfpretrain.data.tokenizer import SENTENCEPIECE
from hfpretrain.engines import pieces
from hfpretrain.modeling import optim
from hfpretrain.modeling.rope import rope_of_stages
from hfpretrain.recipe.addresses import missing_path_problem
from hfpretrain.recipe.schema import Recipe, RecipeError, length_stages
from hfpretrain.recipe.yaml import read_recipe

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast

CONFIG_FOLDER = "config"
"""Folder of a run with the model's config and the tokenizer: what an export needs beside the weights."""
GENERATION_CONFIG = "generation_config.json"
MAX_SHARD_SIZE = "5GB"
"""Largest size of a file of weights, as in `huggingface_hub.save_torch_model`. transformers 5 has 50 GB. Loaders read
several files at a time, and a failed upload repeats only one file."""


def write_model(
    config: PretrainedConfig,
    state_dict: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerFast,
    path: Path,
    dtype: str = "float32",
    generation_config: GenerationConfig | None = None,
    sentencepiece: Path | None = None,
) -> None:
    """Write safetensors in `dtype`, config, generation config and tokenizer to the folder `path`.

    `generation_config`: that of the pretrained model; None makes one from the special tokens of `config`.
    `sentencepiece`: the SentencePiece file of the tokenizer, which is copied if it exists.

    The weights are loaded into a new model of `config`, so that the files contain no wrappers of the engine. A folder
    at `path` is replaced; its card and the files that no export wrote are kept.
    """
    from transformers import AutoModelForCausalLM

    if not torch.accelerator.is_available():
        # `save_pretrained` imports DeepSpeed, which otherwise looks for an accelerator and logs a warning.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    dtype_of = _dtypes_by_name(model, getattr(torch, dtype))
    state_dict = {k: v.to(dtype_of(k)) if v.is_floating_point() else v for k, v in state_dict.items()}
    model.load_state_dict({**state_dict, **_tied_weights(model, state_dict)}, assign=True)
    model.tie_weights()
    model.config.use_cache = True
    work = files.create_work_folder(path)
    model.save_pretrained(work, max_shard_size=MAX_SHARD_SIZE)
    if generation_config is not None:
        # Written unchanged: `save_pretrained` refuses some generation configs of published models.
        generation_config.to_json_file(work / GENERATION_CONFIG)
    tokenizer.save_pretrained(work)
    if sentencepiece is not None and sentencepiece.is_file():
        shutil.copyfile(sentencepiece, work / sentencepiece.name)
    files.add_sums(work, (file for file in sorted(work.rglob("*")) if file.is_file()))
    files.replace_folder(work, path)


def _dtypes_by_name(model: Any, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """The dtype of each tensor in a model of `dtype`, by name: some stay float32, such as DeepSeek's router biases."""
    from transformers.core_model_loading import build_glob_alternation

    names = list(model._get_dtype_plan(dtype))
    if not names:
        return lambda name: dtype
    in_float32, *_ = build_glob_alternation(names)
    return lambda name: torch.float32 if in_float32.search(name) else dtype


def _tied_weights(model: Any, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of `state_dict` under all their names in the model; `state_dict` contains each tied tensor once."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    known = {id(tensor): state_dict[name] for name, tensor in named if name in state_dict}
    return {name: known[id(tensor)] for name, tensor in named if id(tensor) in known}


def write_checkpoint_model(run: Path, checkpoint: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Write the model of a run's checkpoint, saved under any engine, and the tokenizer to `folder`.

    Takes twice the memory of the weights. Returns the float32 weights by name. Raises `RecipeError` if the checksums of
    the checkpoint don't match or the run folder has no `config` folder.
    """
    if (reason := files.damage(checkpoint)) is not None:
        raise RecipeError.at(str(checkpoint), reason)
    recipe = read_recipe(run / "recipe.yaml")
    weights = pieces.load_whole_tensors(checkpoint, ("model", "buffers"))
    if optim.evaluates_average(recipe.optimizer):
        optim.average_weights(weights, pieces.load_whole_tensors(checkpoint, ("optimizer",)), recipe.optimizer)
    write_run_model(run, recipe, weights, folder, checkpoint)
    return weights


def write_run_model(
    run: Path, recipe: Recipe, weights: dict[str, torch.Tensor], folder: Path, checkpoint: Path
) -> None:
    """Write float32 `weights` as the model of a run to `folder`, with its config and tokenizer.

    `recipe`: the run's. `checkpoint`: the newest one that the weights are from.

    Raises `RecipeError` if the run folder has no `config` folder.
    """
    import transformers
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    transformers.utils.logging.disable_progress_bar()
    configs = run / CONFIG_FOLDER
    if not configs.is_dir():
        raise RecipeError.at(
            str(configs), "is missing; it should contain the config and the tokenizer of the checkpoint"
        )
    config = AutoConfig.from_pretrained(configs, trust_remote_code=recipe.model.trust_remote_code)
    # The config in the folder is that of the first stage.
    ropes = rope_of_stages(config, length_stages(recipe.data, recipe.training))
    if (rope_parameters := ropes[stage_of_checkpoint(recipe, checkpoint)]) is not None:
        config.get_text_config().rope_parameters = rope_parameters
    tokenizer = AutoTokenizer.from_pretrained(configs, trust_remote_code=recipe.tokenizer.trust_remote_code)
    generation_config = None
    if (configs / GENERATION_CONFIG).is_file():
        generation_config = GenerationConfig.from_pretrained(configs)
    write_model(config, weights, tokenizer, folder, recipe.model.dtype, generation_config, configs / SENTENCEPIECE)


def stage_of_checkpoint(recipe: Recipe, checkpoint: Path) -> int:
    """Number of the last stage that a checkpoint was trained in, counted from 0; see `schema.length_stages`."""
    state = saver.read_train_state(checkpoint)
    trunks = state.get("trunks")
    steps_of_trunk = trunks[-1]["step"] if trunks else 0
    last_step = order.data_step(state["step"] - 1, state.get("skipped", ())) - steps_of_trunk
    first_steps = [stage.first_step for stage in length_stages(recipe.data, recipe.training)]
    return order.stage_of(first_steps, max(0, last_step))


def export_checkpoint(given: Path, folder: Path, describe: Callable[[Path, Path, int], None]) -> list[str]:
    """Export a checkpoint to a new `folder`. If `given` is a run, export its newest undamaged checkpoint.

    `describe(run, folder, step)` adds files about the run at that step, such as the card. The export is verified before
    `folder` appears: `from_pretrained` must load exactly the weights of the checkpoint. Returns lines to print. Raises
    `RecipeError` if `folder` is not empty, or `given` is neither a checkpoint nor a run with one.
    """
    require_new_folder(folder)
    checkpoint = given if saver.is_checkpoint(given) else resume.newest_undamaged(given)
    if checkpoint is None:
        neither = f"{given} is neither a checkpoint (runs/NAME/checkpoints/step-...) nor a run with an undamaged one"
        raise RecipeError.at("CHECKPOINT", missing_path_problem(str(given)) or neither)
    run, step = run_of(checkpoint), _read_step(checkpoint)
    work = files.create_work_folder(folder)
    try:
        weights = write_checkpoint_model(run, checkpoint, work)
        describe(run, work, step)
        trust_remote_code = read_recipe(run / "recipe.yaml").model.trust_remote_code
        number = verify.compare_weights(work, weights, trust_remote_code)
        if folder.is_dir():
            folder.rmdir()
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return [
        f"{folder}: step {step:,} of {run}",
        f"  verified       loaded with plain transformers, its {number} tensors equal those of {checkpoint}",
    ]


def require_new_folder(folder: Path) -> None:
    """Raise `RecipeError` if an export to `folder` would overwrite something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError.at("OUT", f"{folder} already exists and is not overwritten; choose a new folder")


def run_of(checkpoint: Path) -> Path:
    """The run folder of a checkpoint. Raises `RecipeError` if the checkpoint is not in a run folder."""
    run = checkpoint.absolute().parent.parent
    if not (run / "recipe.yaml").is_file():
        advice = "export it from there: the run folder has the config and the tokenizer"
        raise RecipeError.at(str(checkpoint), f"is not in the `checkpoints` folder of its run; {advice}")
    return run


def _read_step(checkpoint: Path) -> int:
    try:
        return int(saver.read_train_state(checkpoint)["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError.at(str(checkpoint), f"its {saver.TRAIN_STATE} can't be read: {error}") from error


def finish_interrupted_export(run: Path) -> None:
    """Finish or undo an export to a run folder whose process was killed. No other process may use the folder."""
    files.finish_replacement(run / "model")
    shutil.rmtree(run / f"model{files.INCOMPLETE}", ignore_errors=True)
    for folder in (run, run / "model"):
        files.delete_temporary_files(folder)
