"""The entry point of a training run: `python -m hfpretrain.train RECIPE`."""

from __future__ import annotations

from hfpretrain.engines import launcher

if __name__ == "__main__":
    launcher.end_with_launcher()  # before the other imports, which take seconds

import gc
import json
import logging
import os
import sys
import time
from pathlib import Path

from hfpretrain.engines import launch

os.environ.update(launch.sleeping_threads())  # torch's OpenMP reads these variables when torch is imported
# The collector looks at all objects again and again while the modules make them. That takes a quarter of the imports'
# time (3.3 s, 2.4 s without), and modules leave no garbage.
_collects_garbage = gc.isenabled()
gc.disable()

import transformers

from hfpretrain import files
from hfpretrain.data import threads
from hfpretrain.publishing import card
from hfpretrain.publishing.publisher import BackgroundPublisher
from hfpretrain.recipe import redaction
from hfpretrain.recipe.help import describe_keys
from hfpretrain.recipe.schema import Recipe, RecipeError
from hfpretrain.training import console
from hfpretrain.training.loading import load_recipe
from hfpretrain.training.run import run
from hfpretrain.training.saving import RESUME_ADVICE, NotSavedError
from hfpretrain.training.stability import TrainingDivergedError
from hfpretrain.training.stopping import StoppedEarlyError

if _collects_garbage:
    gc.enable()

STOPPED = 75
"""Exit code of a run that stopped early with everything saved: EX_TEMPFAIL of sysexits.h."""


def train(recipe: Recipe) -> Path | None:
    """Run a recipe to its end, from the newest checkpoint in its output folder if there is one.

    In a process started by plain Python, it may be called again. Under `accelerate launch` every process must call it,
    once. Returns the folder of the exported model, or None if the run was stopped before its end, with everything
    saved. Raises `RecipeError` for what is wrong with the recipe, the launcher or the machine, `TrainingDivergedError`
    if an unstable step must stop the run, `NotSavedError` if the last checkpoint could not be written.

    From this call on, writing to `sys.stdout` and `sys.stderr` never raises in this process, even if nobody reads them.
    """
    console.keep_from_failing("stdout", "stderr")
    return run(recipe, BackgroundPublisher, card.write_card)


def main(arguments: list[str] | None = None) -> int:
    """`python -m hfpretrain.train RECIPE [--section.key=value ...]`; returns the exit code.

    Launchers turn all codes but 0 into 1, so the main process also writes its own into the file that
    `HFPRETRAIN_EXIT_CODE_FILE` names, where a batch script such as `recipes/launch.slurm` finds it.
    """
    gc.freeze()  # a collection during training need not look at the objects of all modules
    console.keep_from_failing("stdout", "stderr")
    rank = int(os.environ.get("RANK", "0"))
    code = _main(sys.argv[1:] if arguments is None else arguments, rank)
    if rank == 0:
        launch.record_exit_code(code)
    return code


def _main(arguments: list[str], rank: int) -> int:
    transformers.utils.logging.disable_progress_bar()
    redaction.redact_logs()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hfpretrain").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    if not arguments or arguments[0].startswith("-"):
        return _help(arguments)
    try:
        path = train(_with_secrets(load_recipe(arguments[0], arguments[1:])))
    except RecipeError as error:
        if rank:
            # Rank 0 has the same error and prints it. The launcher kills it as soon as another rank ends.
            time.sleep(5)
        _report("\n  ".join([f"error in {arguments[0]}:", *map(str, error.problems)]))
        return 2
    except KeyboardInterrupt:
        if rank == 0:
            print(f"interrupted; {RESUME_ADVICE}", file=sys.stderr)
        return 130
    except StoppedEarlyError as error:
        _report(f"stopped by {error}; finished work is kept, and the same command continues from there")
        return STOPPED
    except (TrainingDivergedError, NotSavedError) as error:
        if rank == 0:
            _report(f"stopped: {error}")
        return 1
    except Exception as error:
        if (text := files.disk_error(error)) is None:
            raise
        advice = "free disk space or allow access there, then run the same command again: it keeps finished work"
        _report(f"stopped: {text}; {advice}")
        return 1
    return STOPPED if path is None else 0


def _help(arguments: list[str]) -> int:
    """With `-h`, print the keys of a recipe, or those of the section named after it. Otherwise print only the usage."""
    usage = "usage: accelerate launch -m hfpretrain.train [-h [SECTION]] RECIPE [--section.key=value ...]"
    if arguments[:1] not in (["-h"], ["--help"]):
        print(usage, file=sys.stderr)
        return 2
    try:
        print(usage, "", describe_keys(*arguments[1:2]), sep="\n")
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _with_secrets(recipe: Recipe) -> Recipe:
    """The recipe with the secrets filled into its addresses.

    The command that started this process passes them in an environment variable.
    """
    secrets = json.loads(os.environ.pop(redaction.SECRETS, "[]"))
    return (
        Recipe.model_validate(redaction.restore_secrets(recipe.model_dump(mode="json"), secrets)) if secrets else recipe
    )


def _report(text: str) -> None:
    """Print why the run ends, and have torch's launcher repeat it at the end of its report of the failure."""
    launch.leave_message(text)
    print(text, file=sys.stderr)


if __name__ == "__main__":
    threads.exit_process(main())
