"""Make a plain Hugging Face folder of whatever holds a model: a checkpoint, a run, an export, or a repo of the Hub."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hfpretrain import files
from hfpretrain.checkpoints import export, saver
from hfpretrain.engines import pieces
from hfpretrain.modeling import optim
from hfpretrain.recipe.schema import RecipeError, load_recipe, missing_path, repo_id_problem


class Source(NamedTuple):
    """What `from_pretrained` takes: a folder or an id of the Hub, and the revision of the latter."""

    path: str
    revision: str | None = None


def write(run: Path, checkpoint: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Fill `folder`, which is there and empty, with the model of a run's checkpoint and its tokenizer.

    A checkpoint of any engine, since all are alike. Takes as much memory as the weights twice. Returns the weights by
    name, in float32. Raises `RecipeError` if the checkpoint's checksums do not hold or the run folder lacks its config.
    """
    import transformers
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    transformers.utils.logging.disable_progress_bar()
    if (reason := files.damage(checkpoint)) is not None:
        raise RecipeError.at(str(checkpoint), reason)
    if not (run / export.PLAIN).is_dir():
        raise RecipeError.at(str(run / export.PLAIN), "is missing: it holds the config and tokenizer of the checkpoint")
    recipe = load_recipe(run / "recipe.yaml")
    section = recipe.model
    config = AutoConfig.from_pretrained(run / export.PLAIN, trust_remote_code=section.trust_remote_code)
    trust_remote_code = recipe.tokenizer.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(run / export.PLAIN, trust_remote_code=trust_remote_code)
    tensors = pieces.load_whole(checkpoint, ("model", "buffers"))
    if optim.trains_others(recipe.optimizer):
        optim.average(tensors, pieces.load_whole(checkpoint, ("optimizer",)), recipe.optimizer)
    generation_config = None
    if (run / export.PLAIN / export.GENERATION_CONFIG).is_file():
        generation_config = GenerationConfig.from_pretrained(run / export.PLAIN)
    export.write(config, tensors, tokenizer, folder, section.dtype, generation_config)
    return tensors


def export_to(given: Path, folder: Path, describe: Callable[[Path, Path, int], None]) -> list[str]:
    """Export a checkpoint, or a run's newest that verifies, to the new `folder`; returns lines that say what it is.

    `describe` adds what is told of the run at that step, such as a card: it gets run, folder and step. The folder
    appears once plain transformers has loaded it with exactly the weights of the checkpoint. Raises
    `RecipeError` if `folder` is not empty, or `given` is neither a checkpoint nor a run.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError.at("OUT", f"{folder} already exists and is not overwritten; name a new folder")
    checkpoint = given if _is_checkpoint(given) else _newest(given) if (given / "checkpoints").is_dir() else None
    if checkpoint is None:
        neither = f"{given} is neither a checkpoint (runs/NAME/checkpoints/step-...) nor a run with an undamaged one"
        raise RecipeError.at("CHECKPOINT", missing_path(str(given)) or neither)
    run, step = _run_of(checkpoint), _step(checkpoint)
    work = files.work_folder(folder)
    try:
        tensors = write(run, checkpoint, work)
        describe(run, work, step)
        trust_remote_code = load_recipe(run / "recipe.yaml").model.trust_remote_code
        number = _verify(work, tensors, trust_remote_code)
        if folder.is_dir():
            folder.rmdir()
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return [
        f"{folder}: step {step:,} of {run}",
        f"  verified       loaded with plain transformers, its {number} tensors are those of {checkpoint}",
    ]


def _verify(folder: Path, tensors: dict[str, torch.Tensor], trust_remote_code: bool) -> int:
    """How many weights a plain folder has, all of them as in `tensors` but for rounding to its dtype.

    Raises `RecipeError` if one is not.
    """
    from transformers import AutoModelForCausalLM

    keywords: dict[str, Any] = {"dtype": "auto", "output_loading_info": True, "trust_remote_code": trust_remote_code}
    model, info = AutoModelForCausalLM.from_pretrained(folder, **keywords)
    found = model.state_dict()
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *(name for name, *_ in info["mismatched_keys"])]
    for name, tensor in tensors.items():
        ours = found.get(name)
        if ours is None or not torch.equal(ours, tensor.to(ours.dtype)):
            wrong.append(name)
    if wrong:
        names = ", ".join(sorted(wrong)[:3])
        raise RecipeError.at(str(folder), f"{len(wrong)} weights are not those of the checkpoint: {names}")
    return len(found)


def _is_checkpoint(path: Path) -> bool:
    return (path / "train_state.json").is_file() and not (path / saver.STATE).is_dir()


def _has_export(path: Path) -> bool:
    return (path / "model" / "config.json").is_file()


def _step(checkpoint: Path) -> int:
    try:
        return int(saver.train_state(checkpoint)["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError.at(str(checkpoint), f"its train_state.json can't be read: {error}") from error


def _run_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint belongs to."""
    run = checkpoint.absolute().parent.parent
    if not (run / "recipe.yaml").is_file():
        advice = "export it from there: the run folder has the config and the tokenizer"
        raise RecipeError.at(str(checkpoint), f"is not in the `checkpoints` folder of its run; {advice}")
    return run


def _newest(run: Path) -> Path | None:
    return next((path for path in files.steps(run / "checkpoints") if files.damage(path) is None), None)


@contextlib.contextmanager
def located(given: str, key: str = "model") -> Iterator[Source]:
    """What `from_pretrained` takes of a model that a user named: an exported folder, a run (its export, or else its
    newest checkpoint), a checkpoint (exported to a temporary folder), or `ID@REVISION` of the Hub.

    Raises `RecipeError` at `key` where it is none of these.
    """
    path = Path(given)
    if (path / "config.json").is_file():
        yield Source(given)
    elif _is_checkpoint(path):
        with _exported(path) as folder:
            yield Source(folder)
    elif _has_export(path):
        _say(f"{given}: its export, {path / 'model'}")
        yield Source(str(path / "model"))
    elif path.is_dir() and (newest := _newest(path)) is not None:
        _say(f"{given}: its newest checkpoint, {newest}")
        with _exported(newest) as folder:
            yield Source(folder)
    elif path.exists():
        runs = [
            entry for entry in sorted(path.glob("*")) if (entry / "model").is_dir() or (entry / "checkpoints").is_dir()
        ]
        parents = [parent for parent in path.absolute().parents if (parent / "model" / "config.json").is_file()]
        near = [*parents[:1], *runs[:1]]
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RecipeError.at(
            key, f"{given} holds no model: it is neither an exported folder, nor a checkpoint, nor a run{hint}"
        )
    else:
        yield _on_the_hub(given, key)


def _on_the_hub(given: str, key: str) -> Source:
    repo_id, _, revision = given.removeprefix("hub://").partition("@")
    problem = None if given.startswith("hub://") else missing_path(given)
    if revision and Path(repo_id).exists():
        problem = f"{repo_id} is a folder here, and folders have no revisions (got {given!r})"
    problem = problem or repo_id_problem(repo_id)
    if problem is not None:
        raise RecipeError.at(key, problem)
    return Source(repo_id, revision or None)


@contextlib.contextmanager
def _exported(checkpoint: Path) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        write(_run_of(checkpoint), checkpoint, folder)
        yield str(folder)


def _say(text: str) -> None:
    print(text, file=sys.stderr)
