"""Checks before a run what its recipe names: files, folders, Hub repos, disks, and the model without its weights.

Nothing is tokenized, downloaded or written here. Only the checks of the model import torch.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpretrain.checkpoints import start
from hfpretrain.data import corpus, source_files
from hfpretrain.data.token_documents import Vocabulary
from hfpretrain.data.token_files import open_token_file
from hfpretrain.recipe.addresses import checkpoint_folder, load_error_message, missing_path_problem, parse_hub_address
from hfpretrain.recipe.hub import explain_failure
from hfpretrain.recipe.schema import (
    FILE_FORMATS,
    DataSection,
    EvaluationSection,
    ModelSection,
    OptimizerSection,
    Problem,
    Recipe,
    RecipeError,
    SourceSection,
    TokenizerSection,
    TrainingSection,
    length_stages,
)
from hfpretrain.recipe.yaml import read_recipe
from hfpretrain.training.run_folder import refuse_other_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# To get the first document of a text file or of a JSON array, the whole file is read. So larger files are not read.
_SMALL_BYTES = 2**24
# A model with this many parameters is built with random weights in about a second.
_MAX_CHECKED_PARAMETERS = 2**27
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")


def resource_problems(recipe: Recipe) -> list[Problem]:
    """A problem, with its key, for each file, folder or Hub repo of the recipe that a run could not use."""
    data = recipe.data
    sections = (("data.sources", data.sources), ("data.validation_sources", data.validation_sources))
    named = [(f"{key}.{number}", source) for key, some in sections for number, source in enumerate(some)]
    tokenizer, model = recipe.tokenizer, recipe.model
    checks: list[Callable[[], Iterable[Problem]]] = [
        functools.partial(_source_problems, *each, data.on_bad_document, recipe.tokenizer) for each in named
    ]
    checks += [
        lambda: _pretrained_problems(
            "tokenizer.pretrained", tokenizer.pretrained, tokenizer.revision, _tokenizer_problems
        ),
        lambda: _pretrained_problems("model.pretrained", model.pretrained, model.revision, _model_problems),
        lambda: _evaluation_problems(recipe.evaluation),
        lambda: _start_problems(recipe),
        lambda: _folder_problems(recipe),
    ]
    found: list[Problem] = []
    for check in checks:
        try:
            found += check()
        except RecipeError as error:
            found += error.problems
    return list(dict.fromkeys(found))


def engine_problems(
    training: TrainingSection, data: DataSection, path: Path, num_processes: int | None
) -> list[Problem]:
    """Problems of an accelerate config file, and of the recipe's batch size for its number of processes."""
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        config: Any = load_config_from_file(str(path))
        sizes = {key.rpartition("config_")[2]: int(size) for key, size in (config.parallelism_config or {}).items()}
    except Exception as error:  # the file may contain anything
        return [Problem("--engine", f"{path} is not an accelerate config file: {' '.join(str(error).split()):.300}")]
    number = config.num_processes if num_processes is None else num_processes
    num_data_ranks = max(1, number // (sizes.get("tp_size", 1) * sizes.get("sp_size", 1)))
    found: list[Problem] = []
    for stage in length_stages(data, training):
        try:
            stage.accumulation_steps(training.tokens_per_step, num_data_ranks)
        except RecipeError as error:
            found += error.problems
        if stage.block_size % sizes.get("sp_size", 1):
            message = f"{sizes['sp_size']} processes can't divide a sequence of {stage.block_size} tokens evenly"
            found.append(Problem(f"{stage.key or 'data'}.block_size", message))
    return found


def disk_problems(output_dir: Path, num_bytes: int) -> list[Problem]:
    """A problem if a run that has not begun needs more disk space than is free in its output folder."""
    folder = _nearest_existing(output_dir)
    free = shutil.disk_usage(folder).free
    if (output_dir / "checkpoints").exists() or num_bytes <= free:
        return []
    message = f"the run will write {num_bytes / 2**30:,.1f} GiB, but only {free / 2**30:,.1f} GiB are free in {folder}"
    return [Problem("output_dir", f"{message}; make room, lower checkpoint.keep_last or choose another disk")]


def require_buildable_model(
    section: ModelSection, optimizer: OptimizerSection, training: TrainingSection, gets_new_tokens: bool = False
) -> None:
    """Build the recipe's model on the meta device, which takes a fraction of a second at any size.

    Raises `RecipeError` if it can't be built or exported, if it does not fit the checkpoint's tensors, if
    `optimizer.no_decay` or `optimizer.groups` don't fit its parameters, or if nothing balances its experts. A model
    with remote code is not built. `gets_new_tokens`: also raise it if no tokens can be added to the pretrained model.
    """
    from hfpretrain.modeling import optim
    from hfpretrain.modeling.build import require_same_tensors
    from hfpretrain.modeling.embeddings import require_two_embeddings
    from hfpretrain.modeling.groups import ParameterGroups
    from hfpretrain.modeling.routers import find_routers, resolve_balance

    model = _build_model(section, "meta")
    if model is not None:
        require_same_tensors(section)
        # Whether a class without known routers balances its experts in its own way is tested later.
        resolve_balance(model, find_routers(model), True, training.router_bias_rate, training.router_aux_loss_coef)
        decayed = optim.decayed_names(model, optimizer.no_decay)
        ParameterGroups(model, optimizer, decayed, knows_vocabulary=False)
        if gets_new_tokens and section.pretrained is not None:
            require_two_embeddings(model)


def check_small_model(
    section: ModelSection, training: TrainingSection, data: DataSection, packs_documents: bool | None
) -> list[str]:
    """Run the tests of training on a small model with random weights.

    Returns the notes on the model that training would write at its start, and a sentence for what was not tested.

    `packs_documents`: whether a block holds several documents, None if the text is not prepared. Raises `RecipeError`
    where training would: predictions see later tokens, documents of a block see each other, or the loss can't be
    computed in chunks.
    """
    from hfpretrain.modeling import checks
    from hfpretrain.modeling.config import override_notes
    from hfpretrain.modeling.rope import change_rope, rope_of_stages
    from hfpretrain.modeling.routers import find_routers, resolve_balance
    from hfpretrain.modeling.structure import count_parameters

    blueprint, notes = _build_model(section, "meta"), list(override_notes(section))
    stages = length_stages(data, training)
    ropes = [None] * len(stages) if blueprint is None else rope_of_stages(blueprint.config, stages)
    if blueprint is None or count_parameters(blueprint).total > _MAX_CHECKED_PARAMETERS:
        if training.document_masking is not False:
            what = "whether the model can mask the documents of a block from each other"
            notes.append(f"{what} is tested when training starts")
        return notes
    model = _build_model(section, "cpu")
    assert model is not None
    checks.require_causal(model, section)
    leak = None
    for rope_parameters in ropes:
        if rope_parameters is not None:
            change_rope(model, rope_parameters)
        if training.document_masking is not False:
            leak = leak or checks.keep_documents_apart(model, data.longest_block_size)
    packs = leak is not None and _packs_documents(data) if packs_documents is None else packs_documents
    checks.resolve_document_masking(training.document_masking, leak, packs, model, data.longest_block_size)
    checks.use_chunked_loss(model, training.chunked_loss, training.z_loss)
    step_loss = checks.examine_loss(model)
    if note := step_loss.note(type(model).__name__):
        notes.append(note)
    balance = resolve_balance(
        model, find_routers(model), step_loss.adds_term, training.router_bias_rate, training.router_aux_loss_coef
    )
    if balance is not None:
        notes.append(str(balance))
    if leak is not None and packs_documents is None:
        leak, fix = checks.explain_leak(model, data.longest_block_size, leak), "training.document_masking: false"
        notes.append(f"if a block contains several documents, training requires {fix}, since {leak}")
    return notes


def _build_model(section: ModelSection, device: str) -> PreTrainedModel | None:
    """The recipe's model with random weights, or on the meta device; None if it has remote code."""
    from hfpretrain.modeling.build import build_model
    from hfpretrain.modeling.config import load_config

    # The tokenizer may not exist yet. The size of the vocabulary changes nothing that is tested here.
    ids = [n for key, n in (section.config or {}).items() if key.endswith("token_id") and isinstance(n, int)]
    config = load_config(section, vocab_size=max(511, *ids, 0) + 1)
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return None
    section = section.model_copy(update={"pretrained": None, "depth_scaled_init": False})
    if section.attention_has_kernels:  # which may not run on this machine
        section = section.model_copy(update={"attn_implementation": "auto"})
    return build_model(section, config, device=device)


def _packs_documents(data: DataSection) -> bool:
    """Whether some block surely contains several documents, judged by the first eight documents of each source.

    Concatenated documents rarely fill blocks exactly, and with best-fit packing, short documents share a block.
    """
    if data.streaming:
        return True
    for number, source in enumerate(data.sources):
        if source.holds_tokens:  # reading them takes a tokenizer
            continue
        reader = corpus.Reader(source, f"data.sources.{number}", data.on_bad_document)
        first = reader.pieces[0] if reader.pieces else None
        if first is None or not Path(first.origin).is_file() or (first.size or 0) > _SMALL_BYTES:
            continue
        sizes = [len(one.text.encode()) for one in itertools.islice(filter(lambda one: one.text, reader.read([0])), 8)]
        num_short = sum(size < data.block_size // 2 for size in sizes)  # no token is shorter than a byte
        if len(sizes) == 8 and (data.packing == "concat" or num_short >= 2):
            return True
    return False


def _source_problems(
    key: str, source: SourceSection, on_bad_document: str, tokenizer: TokenizerSection
) -> Iterator[Problem]:
    """Problems of a source: it does not exist, can't be read, or its first document is bad."""
    if source.path == corpus.PYTHON_STDLIB:
        return
    if source.path not in FILE_FORMATS and not Path(source.path).exists():
        if problem := missing_path_problem(source.path) if "://" not in source.path else None:
            yield Problem(f"{key}.path", problem)
        elif "://" not in source.path:
            yield from _repo_problems(f"{key}.path", source.path, source.revision, "dataset", ())
        return
    vocabulary = _local_vocabulary(tokenizer) if source.holds_tokens else None
    if source.holds_tokens and vocabulary is None:  # then only the files themselves are checked
        for split in (source_files.find_splits(source, key) or {}).values():
            for file in split:
                open_token_file(file.origin, source, key)
        return
    reader = corpus.Reader(source, key, on_bad_document, vocabulary)
    local = [piece for piece in reader.pieces if "://" not in piece.origin and Path(piece.origin).is_file()]
    for piece in local:
        if not os.access(piece.origin, os.R_OK):
            yield Problem(key, f"{piece.origin} can't be read: permission denied")
            return
    first = reader.pieces[0] if reader.pieces else None
    if first is not None and first in local and (first.size or 0) <= _SMALL_BYTES:
        for _ in itertools.islice(reader.read([0]), 1):
            pass


def _local_vocabulary(section: TokenizerSection) -> Vocabulary | None:
    """The vocabulary of a tokenizer in a local folder; None if the tokenizer is not there."""
    if find_spec("transformers") is None or section.pretrained is None or not Path(section.pretrained).is_dir():
        return None
    from hfpretrain.data.tokenizer import load_tokenizer

    return Vocabulary(load_tokenizer(section))


def _pretrained_problems(
    key: str, given: str | None, revision: str | None, folder_problems: Callable[[str, Path], Iterable[Problem]]
) -> Iterator[Problem]:
    if given is None:
        return
    if problem := missing_path_problem(given):
        yield Problem(key, problem)
    elif Path(given).exists():
        yield from folder_problems(key, Path(given))
    else:
        needed = ("config.json",) if folder_problems is _model_problems else _TOKENIZER_FILES
        yield from _repo_problems(key, given, revision, "model", needed)


def _tokenizer_problems(key: str, folder: Path) -> Iterator[Problem]:
    if not folder.is_dir() or not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        yield Problem(key, f"{folder} contains no tokenizer: it has none of {', '.join(_TOKENIZER_FILES)}")
    elif find_spec("transformers") is not None:
        from hfpretrain.data.tokenizer import load_tokenizer

        load_tokenizer(TokenizerSection(pretrained=str(folder)))


def _model_problems(key: str, folder: Path) -> Iterator[Problem]:
    """Problems of a model's folder: no config, no weights, or a missing or damaged file of weights."""
    if not (folder / "config.json").is_file():
        yield Problem(key, load_error_message(str(folder), OSError(f"{folder} has no config.json")))
        return
    names = [name for name in _WEIGHTS if (folder / name).is_file()]
    for index in (folder / f"{name}.index.json" for name in _WEIGHTS):
        if index.is_file() and not names:
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                yield Problem(key, f"{index} can't be read: {error}")
                return
    if not names:
        yield Problem(
            key, f"{folder} has no weights: it contains neither {' nor '.join(_WEIGHTS)}, nor an index file of them"
        )
    for name in names:
        if not (folder / name).is_file():
            yield Problem(key, f"{folder / name} is missing, although the index lists it")
        elif name.endswith(".safetensors"):
            yield from _safetensors_problems(key, folder / name)


def _safetensors_problems(key: str, path: Path) -> Iterator[Problem]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        yield Problem(key, f"{path} is damaged: {error}")


def _repo_problems(
    key: str, repo_id: str, revision: str | None, kind: str, needed: tuple[str, ...]
) -> Iterator[Problem]:
    """Problems of a repo on the Hub: it does not exist, this user may not read it, or it has none of the files
    `needed`. In offline mode, the only problem is a repo that is not in the cache."""
    from huggingface_hub import HfApi, constants

    cached = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repo_id.replace('/', '--')}" / "snapshots"
    if constants.HF_HUB_OFFLINE:
        if not cached.is_dir() and not _prepared_by_datasets(repo_id):
            message = f"there is no folder {repo_id!r}, and the local Hub cache has no such {kind}"
            yield Problem(key, f"{message}; download it first, or unset HF_HUB_OFFLINE")
        return
    try:
        info: Any = HfApi().repo_info(repo_id, revision=revision, repo_type=kind, timeout=20)
    except Exception as error:  # the Hub's HTTP library has exceptions of its own
        at = f"@{revision}" if revision else ""
        yield Problem(
            key,
            f"there is no folder {repo_id!r}, and the Hub has no {kind} {repo_id}{at}: {explain_failure(error).text}",
        )
        return
    names = {sibling.rfilename for sibling in info.siblings or ()}
    if needed and not names & set(needed):
        yield Problem(key, f"{repo_id} on the Hub has none of the files {', '.join(needed)}")


def _prepared_by_datasets(repo_id: str) -> bool:
    """Whether `datasets` has the repo in its own cache."""
    home = (
        os.environ.get("HF_DATASETS_CACHE")
        or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "datasets"
    )
    return (Path(home) / repo_id.replace("/", "___")).is_dir()


def _evaluation_problems(section: EvaluationSection) -> Iterator[Problem]:
    for number, metric in enumerate(section.metrics):
        if problem := missing_path_problem(metric):
            yield Problem(f"evaluation.metrics.{number}", problem)
    if section.metrics and find_spec("evaluate") is None:
        yield Problem("evaluation.metrics", "needs the evaluate package: pip install evaluate")
    if section.lm_eval is None:
        return
    path = section.lm_eval.include_path
    if path is not None and not Path(path).is_dir():
        yield Problem("evaluation.lm_eval.include_path", f"there is no folder {path!r}")
    if find_spec("lm_eval") is None:
        yield Problem("evaluation.lm_eval", "needs the lm-eval package: pip install hfpretrain[lm-eval]")


def _start_problems(recipe: Recipe) -> Iterator[Problem]:
    """Problems of the checkpoint that a new run starts from: it is missing, or it does not fit the recipe."""
    named = start.named_checkpoint(recipe.checkpoint)
    if named is None or any((Path(recipe.output_dir) / "checkpoints").glob("step-*")):
        return
    key, given = named
    if (address := parse_hub_address(given)) is not None:
        yield from _repo_problems(key, *address, "model", ())
    elif problem := start.missing_checkpoint_problem(given):
        yield Problem(key, problem)
    else:
        folder = checkpoint_folder(given)
        files = (folder / "recipe.yaml", folder.absolute().parent.parent / "recipe.yaml")
        of_run = next((file for file in files if file.is_file()), None)
        if of_run is not None and (changed := start.changed_keys(recipe, read_recipe(of_run))):
            yield Problem(key, start.changes_message(recipe.checkpoint))
            yield from changed


def _folder_problems(recipe: Recipe) -> Iterator[Problem]:
    """Problems of the output and prepared folders: they can't be written to, or contain a run of another recipe."""
    if Path(recipe.output_dir).is_dir():
        refuse_other_run(recipe)
    prepared = "data.prepared_dir" if recipe.data.prepared_dir else "output_dir"
    for key, folder in (("output_dir", Path(recipe.output_dir)), (prepared, recipe.prepared_dir)):
        existing = _nearest_existing(folder)
        if not existing.is_dir():
            yield Problem(key, f"{folder} can't be created: {existing} is a file")
        elif not os.access(existing, os.W_OK | os.X_OK):
            yield Problem(key, f"{folder} can't be written to: permission denied in {existing}")


def _nearest_existing(folder: Path) -> Path:
    """The folder itself if it exists, else the nearest folder above it that does."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
