"""The console command `hfpretrain`. Heavy imports are inside the subcommands that need them."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import logging
import math
import os
import re
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from hfpretrain import __version__
from hfpretrain.engines import launch
from hfpretrain.recipe import redaction
from hfpretrain.recipe.schema import LmEvalSection, Problem, Recipe, RecipeError, length_stages
from hfpretrain.recipe.yaml import dump_recipe, read_recipe
from hfpretrain.training import console
from hfpretrain.training.loading import load_recipe

_MODEL = "an exported folder, a run, a checkpoint, or ID[@REVISION] on the Hub"
_EPILOG = """RECIPE is a recipe file or the name of a shipped recipe. Any number of --section.key=value may follow it.
`hfpretrain train -h` lists all keys, and `hfpretrain train -h optimizer` the keys of one section."""
_WHEN = """While the learning rate is constant, an average over the last tenth to fifth of the steps gains about as much
as a decay of the rate, without training (benchmarks/README.md). After a decay, it gains nothing. A decay branch
(checkpoint.branch_from) costs its steps, and can train on other data."""
_ENGINE = "accelerate config file, or the name of a shipped one such as ddp or fsdp2"


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: done; 1: the disk is full or access is denied; 2: the input is wrong; 130: interrupted. `train` returns the exit
    code of the run.
    """
    parser = _parser()
    args, overrides = parser.parse_known_args(arguments)
    os.environ.update(launch.sleeping_threads())  # before torch is imported
    # These commands do more than print, so they continue when nobody reads their output. Other commands end then.
    console.keep_from_failing("stderr", *(["stdout"] if args.command in (_train, _prepare, _push, _ladder) else []))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for characters that the terminal's encoding lacks
    redaction.redact_logs()
    for override in overrides:  # such as `--num_processes`, which is how accelerate spells it
        name = override.partition("=")[0]
        if "_" in name and "." not in name and (flag := name.replace("_", "-")) in args.flags:
            parser.error(f"unknown argument {name}; did you mean {flag}?")
    finds_recipe = args.command is _compare and args.data is None  # that of one of the two runs
    if overrides and getattr(args, "recipe", None) is None and not finds_recipe:
        parser.error(f"unknown arguments: {' '.join(overrides)}")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hfpretrain").setLevel(logging.INFO)
    code: int | None = None
    try:
        code = args.command(args, overrides)
        print(end="", flush=True)
    except RecipeError as error:
        print("error:", *error.problems, sep="\n  ", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished work is kept, and the same command continues from there", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output, for example `head`, has exited
        console.flush_stdout()
    except OSError as error:
        from hfpretrain import files

        console.flush_stdout()
        if (text := files.disk_error(error)) is None:
            raise
        print(f"error: {text}; free disk space or allow access", file=sys.stderr)
        return 1
    return code or 0


class _RecipeHelp(argparse.Action):
    """`-h` of `train`: its usage, then every key of a recipe; with a section's name, the keys of that section."""

    def __call__(self, parser: argparse.ArgumentParser, _: Any, section: Any, __: Any = None) -> None:
        from hfpretrain.recipe.help import describe_keys

        try:
            text = describe_keys(section or "")
        except RecipeError as error:
            parser.error(str(error))
        try:
            print(text if section else f"{parser.format_help()}\n{text}", flush=True)
        except BrokenPipeError:  # the reader of the output, for example `head`, has exited
            console.flush_stdout()
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hfpretrain",
        description="Pretraining of causal language models with the Hugging Face stack.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any, text: str, **keywords: Any) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, help=text, description=text, allow_abbrev=False, **keywords)
        subparser.set_defaults(command=function)
        return subparser

    train = command("train", _train, "train a recipe; the same command again resumes the run", add_help=False)
    train.add_argument("recipe", metavar="RECIPE")
    train.add_argument("--engine", help=f"{_ENGINE}; default: single for one process, ddp for several")
    number = "number of processes; default: one per GPU, or the number in the engine's file"
    train.add_argument("--num-processes", type=int, help=number)
    keys = "show this help and all keys of a recipe, or the keys of one section such as optimizer, and exit"
    train.add_argument("-h", "--help", action=_RecipeHelp, nargs="?", metavar="SECTION", help=keys)
    check = command("check", _check, "validate a recipe; print it with all defaults, and its steps, tokens, parameters")
    check.add_argument("recipe", metavar="RECIPE")
    check.add_argument("--engine", help=f"also check that the batch fits this engine ({_ENGINE})")
    check.add_argument(
        "--num-processes", type=int, help="only with --engine: number of processes; default: as in its file"
    )
    plan = command("plan", _plan, "estimate what a run will cost: memory with each engine, FLOPs, time, disk")
    plan.add_argument("recipe", metavar="RECIPE")
    plan.add_argument("--engine", help="plan only for this engine; default: all engines side by side")
    plan.add_argument("--num-processes", type=int, help="number of processes, one per device; default: 1")
    plan.add_argument("--device", help="device such as H100-80GB, A100-40GB or cpu; default: that of this machine")
    mfu = "assumed fraction of the device's peak FLOP/s; default: 0.4, or measured for a small model on this CPU"
    plan.add_argument("--mfu", type=float, help=mfu)
    plan.add_argument("--json", action="store_true", help="print one JSON object, in bytes, seconds and FLOP/s")
    many = "simulate the communication between these numbers of devices instead; default: 8 64 512 4096"
    plan.add_argument("--scaling", type=int, nargs="*", metavar="DEVICES", help=many)
    plan.add_argument("--devices-per-node", type=int, help="only with --scaling: devices of a node; default: 8")
    plan.add_argument(
        "--nvlink", type=float, help="only with --scaling: GB/s that a device sends within its node; default: 450"
    )
    plan.add_argument(
        "--infiniband", type=float, help="only with --scaling: GB/s that a device sends to other nodes; default: 50"
    )
    shared = "only with --scaling: devices over which hsdp shards one copy of the model; default: as in its file"
    plan.add_argument("--shard-size", type=int, help=shared)
    prepare = command("prepare", _prepare, "train or load the tokenizer, then tokenize and pack the text")
    prepare.add_argument("recipe", metavar="RECIPE")
    shard = "prepare shard I of N on this machine; when all N are done, run the command once without --shard"
    prepare.add_argument("--shard", metavar="I/N", help=shard)
    prepare.add_argument("--num-workers", type=int, help="threads that tokenize; default: one per core")
    processes = "number of processes that divide the files; for a corpus of many GB on many cores; default: 1"
    prepare.add_argument("--num-processes", type=int, help=processes)
    tokenizer = command(
        "tokenizer", _tokenizer, "compare tokenizers on a recipe's text: bytes per token, vocabulary, speed"
    )
    several = "recipes, and tokenizers (a folder, a run or a Hub ID NAME/NAME); the text is that of the first recipe"
    tokenizer.add_argument("recipe", metavar="RECIPE|FOLDER", nargs="+", help=several)
    text = "measure on a .txt file (one document) or a .jsonl file (key `text`) instead; may be given several times"
    tokenizer.add_argument("--data", action="append", metavar="[NAME=]FILE", help=text)
    size = "maximum text of each source or file to measure on, in bytes; default: 4000000"
    tokenizer.add_argument("--max-bytes", type=int, default=4_000_000, help=size)
    tokenizer.add_argument("--plot", metavar="PNG", help="also draw the comparison")
    tokenizer.add_argument("--json", action="store_true", help="print one JSON array")
    saved = "save the recipe's tokenizer in this new folder, for `tokenizer.pretrained`; needs exactly one recipe"
    tokenizer.add_argument("--save", metavar="FOLDER", help=saved)
    data = command("data", _data, "print the documents that a step of a run was trained on")
    data.add_argument("recipe", metavar="RECIPE")
    data.add_argument("--step", type=int, required=True, help="optimizer step, as in metrics.jsonl; the first is 1")
    evaluate = command("evaluate", _evaluate, "compute loss, perplexity and bits per byte of a checkpoint")
    evaluate.add_argument("model", metavar="MODEL", help=_MODEL)
    tasks = "lm-eval tasks, separated by commas; can be combined with a recipe or --data"
    evaluate.add_argument("--tasks", help=tasks)
    evaluate.add_argument("--include-path", metavar="FOLDER", help="folder with your own task files; their code is run")
    evaluate.add_argument("--num-fewshot", type=int, help="examples in the prompt; default: as each task defines it")
    evaluate.add_argument("--limit", type=int, help="number of documents of each task; default: all")
    compare = command(
        "compare",
        _compare,
        "compare two checkpoints on the same documents: what MODEL_B gained and lost in bits per byte",
    )
    compare.add_argument("a", metavar="MODEL_A", help=_MODEL)
    compare.add_argument("b", metavar="MODEL_B", help="as MODEL_A; the tokenizers may differ")
    for scores in (evaluate, compare):
        text = "evaluate on this recipe's validation text"
        if scores is compare:
            text += "; default: that of the run MODEL_B, or of the run MODEL_A"
        scores.add_argument("recipe", metavar="RECIPE", nargs="?", help=text)
        files = "evaluate on a .txt file (one document) or a .jsonl file (key `text`); may be given several times"
        scores.add_argument("--data", action="append", metavar="[NAME=]FILE", help=files)
        scores.add_argument(
            "--block-size",
            type=int,
            help="window size in tokens; default: the recipe's block size, or the model's context up to 1,024",
        )
        stride = "tokens from the start of one window to the start of the next; default: the block size"
        scores.add_argument("--stride", type=int, help=stride)
        scores.add_argument("--batch-size", type=int, default=8, help="windows per forward pass; default: 8")
    verify = command("verify", _verify, "check that a run, checkpoint or prepared folder is complete and unchanged")
    verify.add_argument("path", metavar="PATH")
    verify.add_argument("--json", action="store_true", help="print one JSON object")
    verify.add_argument("--trust-remote-code", action="store_true", help="run the model code in the exported folder")
    downstream = "compare the loss of the first fine-tuning step (Trainer, TRL, PEFT) with the evaluated loss"
    verify.add_argument("--downstream", action="store_true", help=downstream)
    text = "text for --downstream; default: the validation text of the run's recipe"
    verify.add_argument("--data", metavar="FILE|RECIPE", help=text)
    proof = command(
        "verify-resume",
        _verify_resume,
        "kill and resume a short run of a recipe, and compare its losses with an uninterrupted run",
    )
    proof.add_argument("recipe", metavar="RECIPE")
    proof.add_argument("--engine", help=f"{_ENGINE}; default: one process without a launcher")
    proof.add_argument(
        "--num-processes", type=int, help="number of processes; default: the number in the engine's file"
    )
    proof.add_argument("--steps", type=int, default=20, help="optimizer steps of the short run; default: 20")
    proof.add_argument(
        "--kills", type=int, default=3, help="how often the run is killed (SIGKILL) at random moments; default: 3"
    )
    ladder = command(
        "ladder", _ladder, "train small models of a recipe's family, and predict the loss of the recipe's own model"
    )
    ladder.add_argument("recipe", metavar="RECIPE")
    sizes = "at least four numbers of parameters, such as 400k 2.5M 1B; the fit to the others is tested on the largest"
    ladder.add_argument("--sizes", nargs="+", required=True, metavar="SIZE", help=sizes)
    ratios = "tokens per parameter, as multiples of the recipe's; several are needed to find the best size; default: 1"
    ladder.add_argument("--ratios", nargs="+", type=float, default=[1.0], metavar="RATIO", help=ratios)
    ladder.add_argument("--engine", help=f"{_ENGINE}; default: one process without a launcher")
    ladder.add_argument(
        "--num-processes", type=int, help="number of processes; default: the number in the engine's file"
    )
    ladder.add_argument("--compute", type=float, help="FLOPs for which to find the best size; default: the recipe's")
    ladder.add_argument(
        "--output", help="folder for the small runs, the table and the plot; default: OUTPUT_DIR-ladder"
    )
    runs = command("runs", _runs, "list the runs in a folder: model, loss, throughput, state")
    runs.add_argument("folder", metavar="FOLDER", nargs="?", default="runs", help="folder of runs; default: runs")
    runs.add_argument("--plot", metavar="PNG", help="also plot the validation losses of all runs")
    controls = "On a terminal, control characters are shown as U+FFFD. A file or a pipe gets the text as it is."
    generate = command(
        "generate", _generate, "continue a prompt and print the text while it is generated", epilog=controls
    )
    generate.add_argument("model", metavar="MODEL", help=_MODEL)
    generate.add_argument(
        "prompt", metavar="PROMPT", nargs="?", default="", help="text to continue; default: start a new document"
    )
    generate.add_argument(
        "--max-new-tokens", type=int, default=200, help="largest number of tokens to generate; default: 200"
    )
    generate.add_argument(
        "--temperature", type=float, default=0.8, help="0: always take the most likely token; default: 0.8"
    )
    generate.add_argument("--top-k", type=int, default=50, help="sample from this many most likely tokens; default: 50")
    generate.add_argument("--seed", type=int, default=0, help="seed of the sampling; default: 0")
    export = command("export", _export, "write a checkpoint of a run as a plain Hugging Face folder")
    export.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="runs/NAME/checkpoints/step-..., or a run folder for its newest"
    )
    export.add_argument("out", metavar="OUT", help="folder to create")
    average = command(
        "average",
        _average,
        "average the weights of several checkpoints of a run, and evaluate the result",
        epilog=_WHEN,
    )
    average.add_argument("run", metavar="RUN", help="run folder")
    folder = "folder to create; default: a folder below RUN/averages, named after the steps"
    average.add_argument("out", metavar="OUT", nargs="?", help=folder)
    chosen = average.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--last", type=int, metavar="K", help="average the K newest checkpoints")
    chosen.add_argument("--steps", metavar="STEPS", help="average the checkpoints of these steps, such as 100,200,300")
    shares = "a weight for each checkpoint, the oldest first, such as 1,2,3; default: all the same"
    average.add_argument("--weights", metavar="WEIGHTS", help=shares)
    path = command("path", _path, "print the path of a shipped recipe or accelerate config file")
    path.add_argument("name", metavar="NAME", help="name of the recipe or config file, for example quickstart or ddp")
    push = command("push", _push, "upload a run's checkpoints and export to a Hub repo, except what it already has")
    push.add_argument("run", metavar="RUN", help="run folder, or exported model folder")
    push.add_argument("repo_id", metavar="USER/NAME")
    push.add_argument("--private", action="store_true", help="create the repo as private if it does not exist")
    push.add_argument(
        "--state",
        action="store_true",
        help="also upload the full training state, from which `checkpoint.resume_from` can resume",
    )
    card = command("card", _card, "write the model card of a run again; text that a person wrote into it is kept")
    card.add_argument("run", metavar="RUN")
    command("schema", _schema, "print the JSON schema of recipes, for editors")
    for subparser in commands.choices.values():
        subparser.set_defaults(flags=set(subparser._option_string_actions))
        if any(action.dest == "recipe" for action in subparser._actions):
            usage = subparser.format_usage().removeprefix("usage: ").rstrip()
            subparser.usage = f"{usage} [--section.key=value ...]".replace("%", "%%")
    return parser


def _train(args: argparse.Namespace, overrides: list[str]) -> int:
    import shlex

    from hfpretrain.engines import start
    from hfpretrain.recipe import shipped

    engine, num_processes = start.choose_engine(args.engine, args.num_processes)
    read_recipe(shipped.find_file(args.recipe, "recipe"), overrides)  # report a wrong key before any process starts
    arguments = ["-m", "hfpretrain.train", args.recipe, *overrides]
    file = shipped.find_file(engine, "engine", path="--engine")
    shown = ["accelerate", "launch", "--config_file", str(file), "--num_processes", str(num_processes), *arguments]
    print(f"starting {redaction.redact(shlex.join(shown))}", file=sys.stderr, flush=True)
    return start.run_to_end([*start.launch_command(engine, num_processes), args.recipe, *overrides])


def _load(args: argparse.Namespace, overrides: list[str]) -> Recipe:
    if find_spec("transformers") is None:
        print("warning: model.config is not checked, because transformers is not installed", file=sys.stderr)
    return load_recipe(args.recipe, overrides)


def _load_with_trunk(args: argparse.Namespace, overrides: list[str]) -> Recipe:
    """The recipe as a run of it prepares its data: a branch with the tokenizer of its trunk."""
    from hfpretrain.checkpoints import trunk

    recipe = _load(args, overrides)
    return trunk.with_trunk_tokenizer(recipe, trunk.read_trunks(Path(recipe.output_dir)))


def _check(args: argparse.Namespace, overrides: list[str]) -> None:
    from hfpretrain.checkpoints import trunk
    from hfpretrain.recipe import shipped
    from hfpretrain.training import preflight

    recipe = _load(args, overrides)
    problems = preflight.resource_problems(recipe)
    if args.engine is not None:
        problems += preflight.engine_problems(
            recipe.training,
            recipe.data,
            shipped.find_file(args.engine, "engine", path="--engine"),
            args.num_processes,
        )
    elif args.num_processes is not None:
        raise RecipeError.at("--num-processes", "is used only with --engine; add that, or leave it out")
    if problems:
        raise RecipeError(problems)
    trunks = trunk.read_trunks(Path(recipe.output_dir))
    is_fetched = trunks or not (recipe.checkpoint.branch_from or "").startswith("hub://")
    prepares = trunk.with_trunk_tokenizer(recipe, trunks) if is_fetched else recipe
    vocabulary_notes = _vocabulary_notes(prepares)
    counts, lines = _parameters_and_notes(prepares, trunk.origin_of(trunks).sequence)
    lines += [f"note             {text}" for text in vocabulary_notes]
    print(dump_recipe(recipe), end="")
    training, steps = recipe.training, recipe.training.num_steps
    tokens = steps * training.tokens_per_step
    if recipe.checkpoint.branch_from is not None:
        print(f"# branch           of {recipe.checkpoint.branch_from}; steps and tokens below are those of the branch")
    print(f"# steps            {steps:,} of {training.tokens_per_step:,} tokens = {tokens:,} tokens")
    for stage in length_stages(recipe.data, training):
        sequences = training.tokens_per_step // stage.block_size
        per_device = sequences // stage.micro_batch_size
        begins = f"; from step {stage.first_step + 1:,}" if stage.key else ""
        print(
            f"# one step         {sequences:,} sequences of {stage.block_size}; accumulation x processes {per_device}"
            f"{begins}"
        )
    if counts is not None:
        from hfpretrain.planning.plan import vocabulary_may_shrink

        bound = "at most " if vocabulary_may_shrink(recipe) else ""
        print(f"# parameters       {bound}{counts.total:,} ({counts.non_embedding:,} without embeddings)")
        print(f"# tokens/parameter {tokens / counts.total:.1f}")
    print(*(f"# {line}" for line in lines), sep="\n")


def _vocabulary_notes(recipe: Recipe) -> list[str]:
    """Notes on whether the tokenizer and the model fit together.

    There are none if transformers is not installed, or if the tokenizer or the model is on the Hub.
    """
    if find_spec("transformers") is None:
        return []
    from hfpretrain.training.vocabulary import check_tokenizer

    return check_tokenizer(recipe.model, recipe.tokenizer, recipe.data, local_only=True)


def _parameters_and_notes(recipe: Recipe, first_sequence: int) -> tuple[Any, list[str]]:
    """Parameter counts, None where they are not known yet, and lines on epochs, disk space and context.

    Without torch or transformers there are neither counts nor lines. `first_sequence`: as in `TrainingData`.
    """
    if find_spec("torch") is None or find_spec("transformers") is None:
        return None, []
    from hfpretrain.data.batches import epochs_by_source, format_epochs
    from hfpretrain.data.summary import check_unknown_share
    from hfpretrain.modeling import optim
    from hfpretrain.modeling.config import context_note
    from hfpretrain.planning import plan
    from hfpretrain.training import preflight

    optim.require_library(recipe.optimizer)
    # Raises if transformers does not accept the keywords of the schedule.
    optim.learning_rate(recipe.scheduler, recipe.optimizer.lr, recipe.training.num_steps, step=0)
    preflight.require_buildable_model(
        recipe.model, recipe.optimizer, recipe.training, recipe.tokenizer.extend is not None
    )
    prepared = None if recipe.data.streaming else plan.prepared_data(recipe)
    if prepared is not None:
        check_unknown_share(prepared, recipe.tokenizer.max_unknown)
    packs_documents = None if prepared is None else prepared.packs_documents()
    tried = preflight.check_small_model(recipe.model, recipe.training, recipe.data, packs_documents)
    notes = [f"note             {text}" for text in tried]
    num_epochs = "known once the text is prepared"
    if prepared is not None:
        num_epochs = format_epochs(
            recipe.data.sources,
            epochs_by_source(recipe.data, recipe.training, recipe.seed, prepared, first_sequence),
        )
    lines = [] if recipe.data.streaming else [f"epochs           {num_epochs}"]
    known = recipe.model.config is None or "vocab_size" in recipe.model.config or recipe.tokenizer.vocab_size
    if not known and prepared is None:
        lines.append("parameters       known once the text is prepared: model.config has no vocab_size")
        return None, lines + notes
    counts, size = plan.count_recipe_parameters(recipe), plan.disk_bytes(recipe)
    if problems := preflight.disk_problems(Path(recipe.output_dir), size):
        raise RecipeError(problems)
    lines.append(f"disk             {size / 2**20:,.1f} MiB for checkpoints and the export, without the prepared text")
    lines += plan.parameter_group_lines(recipe)
    note = context_note(recipe.model, plan.model_config(recipe), recipe.data.longest_block_size)
    return counts, [*lines, *([f"note             {note}"] if note else []), *notes]


def _plan(args: argparse.Namespace, overrides: list[str]) -> None:
    from dataclasses import asdict

    from hfpretrain.planning.plan import DEFAULT_MFU, as_json, make_plan, require_divisible_batch
    from hfpretrain.planning.table import format_plan

    keywords: dict[str, Any] = {"engine": args.engine, "device": args.device, "mfu": args.mfu}
    if args.scaling is not None:
        from hfpretrain.planning import network

        if args.num_processes is not None:
            raise RecipeError.at(
                "--num-processes", "can't be used with --scaling; give the numbers of devices to --scaling"
            )
        per_node = 8 if args.devices_per_node is None else args.devices_per_node
        nvlink, infiniband = (
            default if given is None else given for given, default in ((args.nvlink, 450), (args.infiniband, 50))
        )
        cluster = network.Cluster(per_node, nvlink * 1e9, infiniband * 1e9)
        keywords |= {"cluster": cluster, "shard_size": args.shard_size}
        numbers = args.scaling or list(network.DEVICES)
        keywords["mfu"] = DEFAULT_MFU if args.mfu is None else args.mfu
        plan, rows = network.simulate_scaling(_load_with_trunk(args, overrides), numbers, **keywords)
        simulated = json.dumps({"simulated": [asdict(row) for row in rows], "cluster": asdict(cluster)})
        print(simulated if args.json else network.format_scaling(plan, rows, cluster))
        return
    for flag in ("devices_per_node", "nvlink", "infiniband", "shard_size"):
        if getattr(args, flag) is not None:
            name = f"--{flag.replace('_', '-')}"
            raise RecipeError.at(name, "is used only with --scaling; add that, or leave it out")
    processes = 1 if args.num_processes is None else args.num_processes
    recipe = _load_with_trunk(args, overrides)
    require_divisible_batch(recipe, processes, args.engine)
    plan = make_plan(recipe, num_processes=processes, **keywords)
    print(json.dumps(as_json(plan)) if args.json else format_plan(plan))


def _prepare(args: argparse.Namespace, overrides: list[str]) -> None:
    from hfpretrain.data.prepare import prepare, prepare_in_processes, prepare_shard
    from hfpretrain.data.summary import summary
    from hfpretrain.recipe.machine import num_cores

    for flag, number in (("--num-workers", args.num_workers), ("--num-processes", args.num_processes)):
        if number is not None and number < 1:
            raise RecipeError.at(flag, f"{number} must be at least 1")
    if args.num_processes is not None and args.shard is not None:
        raise RecipeError.at("--num-processes", "makes all shards; leave out --shard")
    recipe = _load_with_trunk(args, overrides)
    if (args.num_processes or 1) > 1:
        threads = args.num_workers or max(1, num_cores() // args.num_processes)
        command = [sys.executable, "-m", "hfpretrain.cli", "prepare", args.recipe, *overrides]
        prepare_in_processes(recipe, [*command, "--num-workers", str(threads)], args.num_processes)
    if args.shard is None:
        print(summary(prepare(recipe, args.num_workers)))
        return
    match = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise RecipeError.at("--shard", f"{args.shard!r} must be I/N with I from 1 to N, for example 1/4")
    path = prepare_shard(recipe, int(match[1]) - 1, int(match[2]), args.num_workers)
    print(
        f"shard {match[1]} of {match[2]} of {path} is done; when all are, run the same command without --shard to join"
        " them"
    )


def _tokenizer(args: argparse.Namespace, overrides: list[str]) -> None:
    from hfpretrain.data import tokenizer_report
    from hfpretrain.evaluation.texts import file_texts

    # A recipe is a file, or the name of a shipped recipe. A name that is neither a file nor a folder, and has no slash,
    # is taken for the latter; a Hub ID has a slash.
    is_recipe = [Path(name).is_file() or ("/" not in name and not Path(name).is_dir()) for name in args.recipe]
    recipes = {
        name: _load(argparse.Namespace(recipe=name), overrides) for name in itertools.compress(args.recipe, is_recipe)
    }
    plot, save = (None if name is None else Path(name) for name in (args.plot, args.save))
    if overrides and not recipes:
        raise RecipeError.at(overrides[0], "changes a key of a recipe, but no recipe is given")
    if args.max_bytes < 1:
        raise RecipeError.at("--max-bytes", f"{args.max_bytes} must be at least 1")
    if args.data is None and not recipes:
        raise RecipeError.at("--data", "give the text to measure on: a recipe, or --data FILE")
    if plot is not None and (plot.suffix != ".png" or not plot.parent.is_dir()):
        raise RecipeError.at("--plot", f"{plot} must be a .png file in an existing folder")
    if save is not None and (len(recipes) != 1 or save.exists()):
        message = f"{save} exists already" if save.exists() else f"needs one recipe, and {len(recipes)} are given"
        raise RecipeError.at("--save", message)
    if args.data is not None:
        texts = tokenizer_report.limit_texts(file_texts(args.data), args.max_bytes)
        if not texts:
            raise RecipeError.at("--data", "the files have no text")
    else:
        texts = tokenizer_report.domain_texts(next(iter(recipes.values())).data, args.max_bytes)
    measured = []
    short = {name: Path(name).stem if name in recipes else Path(name).name for name in args.recipe}
    for name in dict.fromkeys(args.recipe):
        made = (
            tokenizer_report.recipe_tokenizer(recipes[name])
            if name in recipes
            else tokenizer_report.stored_tokenizer(name)
        )
        if save is not None and name in recipes:
            made.save_pretrained(save)
        label = short[name] if list(short.values()).count(short[name]) == 1 else name
        measured.append(tokenizer_report.measure(label, made, texts))
    if plot is not None:
        tokenizer_report.plot_report(measured, plot)
    print(json.dumps(tokenizer_report.as_json(measured)) if args.json else tokenizer_report.format_report(measured))


def _data(args: argparse.Namespace, overrides: list[str]) -> None:
    from hfpretrain import files
    from hfpretrain.checkpoints import saver, trunk
    from hfpretrain.data.inspection import describe_step
    from hfpretrain.evaluation.prompts import shown

    recipe = _load(args, overrides)
    trunks = trunk.read_trunks(Path(recipe.output_dir))
    recipe, origin = trunk.with_trunk_tokenizer(recipe, trunks), trunk.origin_of(trunks)
    saved = files.step_folders(Path(recipe.output_dir) / "checkpoints")
    skipped = saver.read_train_state(saved[0]).get("skipped", []) if saved else []
    for line in describe_step(recipe, args.step, skipped, origin.step, origin.sequence):
        print(shown(line))


def _evaluate(args: argparse.Namespace, overrides: list[str]) -> None:
    from hfpretrain.evaluation.score import evaluate_checkpoint, evaluate_tasks

    report: dict[str, Any] = {}
    task_flags = {"--include-path": args.include_path, "--num-fewshot": args.num_fewshot, "--limit": args.limit}
    text_flags = {"--block-size": args.block_size, "--stride": args.stride}
    unused = task_flags if args.tasks is None else {} if args.recipe or args.data else text_flags
    if wrong := next((flag for flag, value in unused.items() if value is not None), None):
        raise RecipeError.at(wrong, f"is used only with {'--tasks' if unused is task_flags else 'a recipe or --data'}")
    if args.tasks is None or args.recipe or args.data:
        report = evaluate_checkpoint(args.model, *_scoring_inputs(args, overrides))
    if args.tasks is not None:
        if (args.num_fewshot or 0) < 0 or (args.limit is not None and args.limit < 1) or args.batch_size < 1:
            raise RecipeError.at("--num-fewshot, --limit, --batch-size", "must be at least 0, 1 and 1")
        names = tuple(name.strip() for name in args.tasks.split(",") if name.strip())
        if not names:
            raise RecipeError.at("--tasks", f"{args.tasks!r} contains no task name")
        section = LmEvalSection(
            tasks=names, include_path=args.include_path, num_fewshot=args.num_fewshot, limit=args.limit
        )
        report["tasks"] = evaluate_tasks(args.model, section, args.batch_size)
    print(json.dumps(_with_nulls(report), indent=1))


def _with_nulls(report: Any) -> Any:
    """The report with None for NaN and infinity, which JSON does not have."""
    if isinstance(report, dict):
        return {key: _with_nulls(value) for key, value in report.items()}
    return None if isinstance(report, float) and not math.isfinite(report) else report


def _compare(args: argparse.Namespace, overrides: list[str]) -> None:
    from hfpretrain.evaluation.base import gain_text
    from hfpretrain.evaluation.score import compare_checkpoints

    if args.recipe is None and args.data is None:
        args.recipe = _recipe_of_run(args.b) or _recipe_of_run(args.a)
        if args.recipe is None:
            message = f"give a recipe or --data FILE, since neither {args.a} nor {args.b} is a run with a recipe"
            raise RecipeError.at("recipe", message)
        print(f"evaluating on the validation text of {args.recipe}", file=sys.stderr)
    inputs = _scoring_inputs(args, overrides)
    found = compare_checkpoints(args.a, args.b, *inputs)
    print(f"{args.b} compared with {args.a}, in bits per byte (95% intervals over documents):", file=sys.stderr)
    key = "bits_per_byte_difference"
    for name in ("", *(inputs[0] if len(inputs[0]) > 1 else ())):
        prefix = f"{name}/" if name else ""
        text = gain_text(found[f"{prefix}{key}"], found[f"{prefix}{key}_interval"])
        print(f"  {name or 'all text':<14} {text}", file=sys.stderr)
    print(json.dumps(_with_nulls(found), indent=1))


def _recipe_of_run(model: str) -> str | None:
    """The recipe of the run that `model` is, or whose checkpoint or export it is; None if there is none."""
    path = Path(model)
    near = (path / "recipe.yaml", path.parent / "recipe.yaml")  # an export is the folder `model` of its run
    return next((str(file) for file in near if path.is_dir() and file.is_file()), None)


def _scoring_inputs(args: argparse.Namespace, overrides: list[str]) -> tuple[Any, ...]:
    """Texts and windows, as `evaluate_checkpoint` takes them."""
    if (args.recipe is None) == (args.data is None):
        raise RecipeError.at("recipe", "give either a recipe or --data FILE")
    from hfpretrain.evaluation.score import Windows
    from hfpretrain.evaluation.texts import file_texts, recipe_texts

    windows = Windows(args.block_size, args.stride, args.batch_size)
    if args.recipe is None:
        return file_texts(args.data), windows
    recipe = _load(args, overrides)
    return recipe_texts(recipe.data), windows.as_trained(recipe.data, recipe.training)


def _verify(args: argparse.Namespace, _: list[str]) -> None:
    from hfpretrain import files

    if args.downstream:
        _verify_downstream(args)
        return
    if args.data is not None:
        raise RecipeError.at("--data", "is used only with --downstream")
    path = Path(args.path)
    report: dict[str, Any] = {}
    if files.manifest_of(path) is not None or path.name.startswith("step-"):
        if "block_size" in (files.manifest_of(path) or {}):
            from hfpretrain.data.prepared import verify

            report = dict(verify(path))
        else:
            reason = files.damage(path)
            if reason is not None:
                raise RecipeError(Problem(str(path), reason))
            report["files"] = len((files.manifest_of(path) or {"files": ()})["files"])
    else:
        import transformers

        from hfpretrain.checkpoints.verify import REFERENCE, check_files, verify_export

        transformers.utils.logging.disable_progress_bar()

        model = path if (path / "config.json").is_file() else path / "model"
        reference = model.parent / REFERENCE
        has_only_checksums = not reference.is_file() and (model / files.SUMS).is_file()  # an export outside of its run
        if not (model / "config.json").is_file() or not (reference.is_file() or has_only_checksums):
            message = "is not a finished run, an exported model, a checkpoint or prepared data"
            raise RecipeError(Problem(str(path), message))
        report = check_files(model)
        if reference.is_file():
            report |= verify_export(model, reference, args.trust_remote_code)
        report |= _verify_prepared(model.parent)
    if args.json:
        print(json.dumps(report))
    else:
        print(f"{path}: verified", *(f"  {key}: {value}" for key, value in report.items() if key != "sample"), sep="\n")


def _verify_prepared(run: Path) -> dict[str, Any]:
    """Verify every file of the prepared data that a run was trained on, or report that this machine lacks them."""
    from hfpretrain.data.prepared import verify
    from hfpretrain.training.run_folder import DATA

    if not (run / DATA).exists():
        return {}
    path = _prepared_folder(run)
    if path is None:
        return {"prepared_data": f"not verified, because it is not in {load_recipe(run / 'recipe.yaml').prepared_dir}"}
    return {"prepared_data": str(path)} | {f"prepared_{key}": value for key, value in verify(path).items()}


def _prepared_folder(run: Path) -> Path | None:
    """The prepared data that a run was trained on; None if this machine lacks them."""
    from hfpretrain.data.prepared import find_prepared
    from hfpretrain.training.run_folder import DATA

    try:
        data = json.loads((run / DATA).read_text(encoding="utf-8"))
        name, checksum = data.get("prepared"), data["checksum"]
    except (OSError, ValueError, KeyError) as error:
        message = f"does not say which data the run was trained on: {error}"
        raise RecipeError(Problem(str(run / DATA), message)) from error
    roots = [load_recipe(run / "recipe.yaml").prepared_dir, run.parent / "prepared"]
    return find_prepared(roots, name, checksum)


def _verify_downstream(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from hfpretrain.evaluation import downstream
    from hfpretrain.evaluation.texts import file_texts, recipe_texts

    path = Path(args.path)
    model = path / "model" if (path / "model" / "config.json").is_file() else path
    recipe = args.data or model.parent / "recipe.yaml"
    if args.data is None and not recipe.is_file():
        raise RecipeError.at(
            "--data", f"{path} is not in a run folder, whose recipe would name the text; give a text file or a recipe"
        )
    is_text = args.data is not None and Path(args.data).is_file() and Path(args.data).suffix not in (".yaml", ".yml")
    texts = file_texts([args.data]) if is_text else recipe_texts(load_recipe(recipe).data)
    with contextlib.redirect_stdout(sys.stderr):  # libraries print to stdout, too
        rows, notes = downstream.compare(str(model), texts)
    if args.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "notes": notes}))
    else:
        print(downstream.table(str(model), rows, notes))
    wrong = [row for row in rows if not row.is_equal]
    if wrong:
        raise RecipeError(
            [Problem(row.way, f"first loss {row.loss:.7f}, but evaluated {row.evaluated:.7f}") for row in wrong]
        )


def _verify_resume(args: argparse.Namespace, overrides: list[str]) -> None:
    from hfpretrain.ladder.proof import verify_resume

    if args.steps < 4 or args.kills < 0:
        raise RecipeError.at("--steps, --kills", "must be at least 4 steps and at least 0 kills")
    recipe, arguments = _load(args, overrides), [args.recipe, *overrides]
    for line in verify_resume(recipe, arguments, args.engine, args.num_processes, args.steps, args.kills):
        print(line, flush=True)


def _ladder(args: argparse.Namespace, overrides: list[str]) -> None:
    from hfpretrain.ladder.run import run_ladder
    from hfpretrain.ladder.rungs import parse_size

    for name, value in (("--compute", args.compute), ("--num-processes", args.num_processes)):
        if value is not None and not 0 < value < float("inf"):
            raise RecipeError.at(name, f"{value} must be a positive number")
    sizes = [parse_size(text) for text in args.sizes]
    recipe = _load(args, overrides)
    folder = Path(args.output or f"{recipe.output_dir.rstrip('/')}-ladder")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # which `nohup` sets
            signal.signal(number, signal.default_int_handler)  # so that the running rung ends with the ladder
    for line in run_ladder(recipe, sizes, args.ratios, args.engine, args.num_processes, args.compute, folder):
        print(line, flush=True)


def _runs(args: argparse.Namespace, _: list[str]) -> None:
    from hfpretrain import runs

    print(runs.runs_table(Path(args.folder)))
    if args.plot:
        runs.plot_losses(Path(args.folder), Path(args.plot))


def _generate(args: argparse.Namespace, _: list[str]) -> None:
    if args.max_new_tokens < 1 or args.top_k < 1 or not 0 <= args.seed < 2**32:
        message = "must be at least 1, at least 1, and from 0 to 2**32 - 1"
        raise RecipeError.at("--max-new-tokens, --top-k, --seed", message)
    if args.temperature != 0 and not 0.01 <= args.temperature <= 100:
        raise RecipeError.at("--temperature", f"{args.temperature} must be 0, or between 0.01 and 100")
    from hfpretrain.evaluation.prompts import stream_text

    stream_text(args.model, args.prompt, args.max_new_tokens, args.temperature, args.top_k, args.seed)


def _export(args: argparse.Namespace, _: list[str]) -> None:
    from hfpretrain.checkpoints.export import export_checkpoint
    from hfpretrain.publishing.card import write_card_and_metrics

    print(*export_checkpoint(Path(args.checkpoint), Path(args.out), write_card_and_metrics), sep="\n")


def _average(args: argparse.Namespace, _: list[str]) -> None:
    from hfpretrain import files
    from hfpretrain.checkpoints import average, resume
    from hfpretrain.publishing.card import write_average_card

    run = Path(args.run)
    steps = None if args.steps is None else [int(number) for number in _numbers("--steps", args.steps, r"\d+")]
    weights = None if args.weights is None else list(map(float, _numbers("--weights", args.weights, r"[\d.eE+-]+")))
    chosen = average.choose_checkpoints(run, args.last, steps)
    shares = average.shares_of(weights, len(chosen))
    folder = Path(args.out) if args.out else average.default_folder(run, chosen, weights is not None)
    numbers = [files.step_of(path) for path in chosen]
    how = f"the mean of the weights of the steps {', '.join(f'{number:,}' for number in numbers)}"
    if weights is not None:
        how += f", in the proportions {', '.join(f'{share:.3g}' for share in shares)}"
    rows: dict[str, dict[str, dict[str, Any]]] = {}

    def describe(work: Path) -> None:
        with contextlib.redirect_stdout(sys.stderr):  # libraries print to stdout, too
            rows["average"] = _evaluate_on_prepared(run, str(work))
        write_average_card(run, work, numbers[-1], how, rows["average"])

    number = average.write_average(run, chosen, shares, folder, describe)
    print(
        f"{folder}: {how}",
        f"  verified       loaded with plain transformers, its {number} tensors are the means",
        sep="\n",
    )
    if not rows["average"]:
        print(
            f"  not evaluated  there is no prepared validation text; `hfpretrain evaluate {folder} RECIPE` reads others"
        )
        return
    newest = resume.newest_undamaged(run)
    if newest is not None:
        rows[f"step {files.step_of(newest):,}, the newest"] = _evaluate_on_prepared(run, str(newest))
    width = max(len(f"{name}, {domain}") for name, row in rows.items() for domain in row)
    print(f"  {'':<{width}} {'loss':>10} {'perplexity':>12} {'bits per byte':>14}")
    for domain in rows["average"]:
        for name, row in rows.items():
            figures, label = row[domain], f"{name}, {domain}" if domain else name
            print(
                f"  {label:<{width}} {figures['loss']:>10.4f} {figures['perplexity']:>12,.2f} "
                f"{figures['bits_per_byte']:>14.4f}"
            )


def _numbers(flag: str, given: str, pattern: str) -> list[str]:
    """The parts of a list of numbers with commas between them."""
    parts = [part.strip() for part in given.split(",")]
    for part in parts:
        if re.fullmatch(pattern, part) is None or not _is_number(part):
            raise RecipeError.at(flag, f"{part!r} is not a number; write numbers with commas, for example 1,2,3")
    return parts


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _evaluate_on_prepared(run: Path, model: str) -> dict[str, dict[str, Any]]:
    """Figures of a model on the validation sets that the run was evaluated on; empty if there are none here."""
    from hfpretrain.data.prepared import PreparedData
    from hfpretrain.evaluation.score import evaluate_prepared
    from hfpretrain.training.run_folder import ENVIRONMENT

    recipe, path = read_recipe(run / "recipe.yaml"), _prepared_folder(run)
    prepared = None if path is None else PreparedData.open(path)
    if prepared is None or not recipe.data.has_validation:
        return {}
    masking = json.loads((run / ENVIRONMENT).read_text(encoding="utf-8"))["document_masking"]
    return evaluate_prepared(
        model, prepared, batch_size=recipe.training.micro_batch_size, document_masking=bool(masking)
    )


def _path(args: argparse.Namespace, _: list[str]) -> None:
    from hfpretrain.recipe import shipped

    print(shipped.find_file(args.name, "recipe", "engine", path="name"))


def _finish_killed_export(run: Path) -> None:
    """Finish an export during which a run was killed, unless a running process uses the folder."""
    from hfpretrain.checkpoints import export
    from hfpretrain.training import run_folder

    if (run / "recipe.yaml").is_file() and not run_folder.is_in_use(run):
        export.finish_interrupted_export(run)


def _push(args: argparse.Namespace, _: list[str]) -> None:
    from hfpretrain.publishing.publisher import push

    _finish_killed_export(Path(args.run))
    if not push(Path(args.run), args.repo_id, args.private, args.state):
        raise SystemExit(1)


def _card(args: argparse.Namespace, _: list[str]) -> None:
    from hfpretrain.publishing.card import write_card

    run = Path(args.run)
    _finish_killed_export(run)
    if not (run / "model" / "config.json").is_file():
        raise RecipeError.at(
            args.run, "has no exported model, which a run writes at its end; run the training to its end first"
        )
    write_card(run, run / "model")
    print(run / "model" / "README.md")


def _schema(_: argparse.Namespace, __: list[str]) -> None:
    print(json.dumps(Recipe.model_json_schema(), indent=1))


def run() -> NoReturn:
    """The console command `hfpretrain`."""
    code = main()
    from hfpretrain.data import threads

    threads.exit_process(code)


if __name__ == "__main__":
    run()
