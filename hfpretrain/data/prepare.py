"""Prepare the data of a recipe once: read the sources, train or load the tokenizer, pack, and assemble."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hfpretrain import __version__, files
from hfpretrain.data import assemble, corpus, duplicates, packing
from hfpretrain.data.corpus import Document, Reader, Splitter
from hfpretrain.data.encode import Encoder, require_special_tokens, token_bytes, token_dtype, unknown_id
from hfpretrain.data.extension import Extension, extend_tokenizer, load_extension
from hfpretrain.data.identity import fingerprint, source_identity, tokenizer_identity
from hfpretrain.data.packing import SplitText, TextBatch, UnprovenPartError
from hfpretrain.data.prepared import PreparedData, is_validation, part_account, part_key, part_source
from hfpretrain.data.processes import run_shards
from hfpretrain.data.remote_copy import RemoteCopy, remote_copy_of
from hfpretrain.data.shards import Shard, ShardRegistry
from hfpretrain.data.summary import check_unknown_share
from hfpretrain.data.token_documents import load_vocabulary
from hfpretrain.data.tokenizer import (
    document_prefix,
    load_tokenizer,
    padded_vocab_size,
    set_add_bos,
    tokenizer_size,
    train_tokenizer,
)
from hfpretrain.data.tokenizer_sample import training_sample
from hfpretrain.recipe.machine import num_cores
from hfpretrain.recipe.redaction import redact_all
from hfpretrain.recipe.schema import (
    DataSection,
    Problem,
    Recipe,
    RecipeError,
    SourceSection,
    TokenizerSection,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Every tokenizer has this file. It is uploaded last, so a tokenizer with this file is complete.
_LAST_TOKENIZER_FILE = "tokenizer/tokenizer_config.json"
# A folder with a file for each part in which `fastokens` gave other ids than `tokenizers`. The file has the reason.
_UNPROVEN_PARTS = "unproven"
# How much text the tokenizer was trained on, if it was not all.
_TOKENIZER_SAMPLE = "training_sample.json"
_MAX_GROUPS_PER_SOURCE = 10_000
logger = logging.getLogger(__name__)


def prepared_path(recipe: Recipe) -> Path:
    """The folder of this recipe's prepared data, whether it exists or not.

    Call it only on the main process of a run: it reads all local source files that changed since this machine last
    read them, and asks the Hub.
    """
    return _path(recipe.data, recipe.tokenizer, recipe.prepared_dir)[0]


def _path(
    data: DataSection, section: TokenizerSection, prepared_dir: Path, has_prefix: bool | None = None
) -> tuple[Path, PreTrainedTokenizerFast | None]:
    """As `prepared_path`, and the tokenizer if it was loaded for that.

    `has_prefix`: whether documents begin with tokens that calling the tokenizer adds, if that is known.
    """
    sources, validation, of_tokenizer = _identities(data, section)
    identities = [*sources, *validation, of_tokenizer]

    def path(has_prefix: bool) -> Path:
        return prepared_dir / fingerprint(data, section, identities, has_prefix)

    made = None
    if has_prefix is None and (has_prefix := _recorded_prefix(section, path)) is None:
        made = load_tokenizer(section)
        has_prefix = bool(document_prefix(made))
    return path(has_prefix), made


def _recorded_prefix(section: TokenizerSection, path: Callable[[bool], Path]) -> bool | None:
    """Whether documents begin with tokens that calling the tokenizer adds before a text (often BOS), if that is known.

    `path`: returns the prepared folder for either answer. If a folder was prepared with this tokenizer section, its
    manifest has the answer. Older versions added no tokens and recorded no answer. None: the tokenizer must be loaded.
    """
    if section.pretrained is None or section.add_bos is False:
        return False
    for has_prefix in (True, False):
        manifest = files.manifest_of(path(has_prefix)) or {}
        if "add_bos" in manifest and manifest["add_bos"] == section.add_bos:
            return has_prefix
    return None


def _identities(data: DataSection, section: TokenizerSection) -> tuple[list[Any], list[Any], list[Any]]:
    """Identities of the sources, of the validation sources, and of the tokenizer."""
    sources = [source_identity(source, f"data.sources.{n}") for n, source in enumerate(data.sources)]
    validation = [
        source_identity(source, f"data.validation_sources.{n}") for n, source in enumerate(data.validation_sources)
    ]
    return sources, validation, tokenizer_identity(section)


def prepare(recipe: Recipe, num_workers: int | None = None) -> PreparedData:
    """Open the prepared data of a recipe, or create or finish it first.

    `num_workers` threads tokenize, by default one for each core. Their number does not change the result. If a call is
    stopped at any time, the next one resumes after the last finished part. Raises `RecipeError` if a source is missing,
    has no text, or has a bad document.
    """
    data, section = recipe.data, recipe.tokenizer
    path, loaded = _path(data, section, recipe.prepared_dir)
    if PreparedData.open(path) is None:  # finished data needs no lock, and its folder may be read-only
        with _lock_folder(path, ".lock"):
            prepared = PreparedData.open(path) or _download(data.prepared_dir, path)
            if prepared is None:
                if (path / files.MANIFEST).exists():
                    return open_verified(path)
                registry = ShardRegistry(data, section, recipe.prepared_dir)
                _check_shards(registry, _shard_inputs(data, section), path)
                with _modules_not_collected():
                    prepared = _Preparation(data, section, path, num_workers or num_cores(), loaded).finish()
                registry.remove(path.name)
                check_unknown_share(prepared, section.max_unknown)
                return prepared
    prepared = open_verified(path)
    check_unknown_share(prepared, section.max_unknown)
    return prepared


def open_verified(path: Path, file_read: Callable[[], None] = lambda: None) -> PreparedData:
    """Open prepared data. If a file is missing or has another checksum, raises `RecipeError` with its name."""
    reason = files.damage_if_changed(path, file_read)
    prepared = PreparedData.open(path) if reason is None else None
    if prepared is None:
        raise RecipeError.at("data", f"the prepared data is damaged: {reason}; delete {path} to prepare it again")
    return prepared


def prepare_shard(recipe: Recipe, index: int, count: int, num_workers: int | None = None) -> Path:
    """Make shard `index`, counted from 0, of `count` shards of one preparation. `prepare` then joins all shards.

    Returns the prepared folder of the joined shards. Raises `RecipeError` if another shard is made from other sources,
    another tokenizer, or with other library versions.
    """
    path, data, section = prepared_path(recipe), recipe.data, recipe.tokenizer
    with _lock_folder(path, f".shard-{index + 1}-of-{count}.lock"):
        if (PreparedData.open(path) or _download(data.prepared_dir, path)) is None:
            registry = ShardRegistry(data, section, recipe.prepared_dir)
            registry.add(Shard(path.name, _shard_inputs(data, section), index, count))
            with _modules_not_collected():
                _Preparation(data, section, path, num_workers or num_cores()).make_parts(index, count)
    return path


def prepare_in_processes(recipe: Recipe, command: Sequence[str], num_processes: int) -> None:
    """Prepare `num_processes` shards on this machine at the same time, each in its own process. `prepare` joins them.

    `command`: the words of the command that starts `hfpretrain prepare` for this recipe; `--shard` is appended. Does
    nothing if the data are prepared. Raises `RecipeError` if a process fails.
    """
    path, data, section = prepared_path(recipe), recipe.data, recipe.tokenizer
    with _lock_folder(path, ".lock"):
        if PreparedData.open(path) is not None or _download(data.prepared_dir, path) is not None:
            return
        # An earlier command may have begun with another number of processes. Its finished parts are kept.
        ShardRegistry(data, section, recipe.prepared_dir).remove(path.name, platform.node())
        _Preparation(data, section, path, num_workers=1)  # loads or trains the tokenizer, once for all processes
    run_shards(command, num_processes)


def _shard_inputs(data: DataSection, section: TokenizerSection) -> dict[str, Any]:
    """Everything that decides a shard's content, by recipe key or library name."""
    sources, validation, of_tokenizer = _identities(data, section)
    libraries = ("datasets", "pyarrow", "tokenizers", "transformers")
    return {
        **{f"data.sources.{number}": identity for number, identity in enumerate(sources)},
        **{f"data.validation_sources.{number}": identity for number, identity in enumerate(validation)},
        "tokenizer": of_tokenizer,
        **{name: version(name) for name in libraries},
        "hfpretrain": __version__,
    }


def _check_shards(registry: ShardRegistry, made_from: dict[str, Any], path: Path) -> None:
    """Log which shards of other machines are not used, and why.

    Raises `RecipeError` if a shard of this folder was made with other library versions.
    """
    ours = Shard(path.name, json.loads(json.dumps(made_from)))
    others = registry.other_shards(ours)
    for other in others:
        differing = [problem for problem in ours.differences(other) if problem.path != "--shard"]
        if differing and other.folder == path.name:
            message = f"{other} was made with other library versions; delete {path}*"
            raise RecipeError([Problem("prepare", message), *differing])
        if differing:
            logger.warning("%s is not used, because it was made from other data: %s", other, differing[0])
    joined = [other for other in others if other.folder == path.name]
    missing = {n + 1 for n in range(max((other.count for other in joined), default=0))} - {s.index + 1 for s in joined}
    if missing:
        names = ", ".join(map(str, sorted(missing)))
        logger.warning("no machine has started shard(s) %s; this machine prepares their parts", names)


def _download(
    prepared_dir: str | None, path: Path, file_read: Callable[[], None] = lambda: None
) -> PreparedData | None:
    """Copy the finished folder from the URL `prepared_dir` and verify it. None if it is not finished, or no URL."""
    remote = remote_copy_of(path, prepared_dir)
    names = remote.list_files() if remote is not None else set()
    if remote is None or files.MANIFEST not in names:
        return None
    work = path.with_name(path.name + files.INCOMPLETE)
    logger.info("copying prepared data from %s", remote.url)
    remote.download(work, [files.MANIFEST])
    remote.download(work, (files.manifest_of(work) or {}).get("files", {}), file_read)
    reason = files.damage(work, file_read=file_read)
    if reason is not None:
        shutil.rmtree(work)
        raise RecipeError.at(
            "data.prepared_dir", f"the copy from {remote.url} is damaged: {reason}; run the command again"
        )
    files.replace_folder(work, path)
    files.record_as_verified(path)
    return PreparedData.open(path)


def wait_for_prepared(
    path: Path,
    prepared_dir: str | None = None,
    checksum: str | None = None,
    file_read: Callable[[], None] = lambda: None,
    wait_seconds: float = 120.0,
    poll_seconds: float = 0.2,
) -> PreparedData:
    """Open the folder `path` that the main process of this run has prepared, in another process.

    Another machine may have its own disk. If the recipe's `data.prepared_dir`, given as `prepared_dir`, is a URL, the
    first process of each machine copies the folder from there. `checksum`: of the main process's folder. `file_read`
    is called after each file that is read. Raises `RecipeError` if the folder does not appear within
    `wait_seconds`, or has another checksum.
    """
    is_url, is_first_of_machine = "://" in (prepared_dir or ""), os.environ.get("LOCAL_RANK") == "0"
    start = time.monotonic()
    while PreparedData.open(path) is None:
        time.sleep(poll_seconds)
        if is_url and is_first_of_machine:
            with _lock_folder(path, ".lock"):
                _ = PreparedData.open(path) or _download(prepared_dir, path, file_read)
        elif not is_url and time.monotonic() - start > wait_seconds:
            rank = f"rank {os.environ.get('RANK', '0')} on {platform.node()}"
            advice = "set it to a folder on a disk that all machines share, or to a URL that all can reach"
            message = f"{rank} does not see {path}, which rank 0 prepared; {advice}"
            raise RecipeError.at("data.prepared_dir", message)
    prepared = open_verified(path, file_read)
    if checksum not in (None, prepared.checksum):
        message = f"{path} on {platform.node()} differs from the same folder of rank 0; delete the outdated one"
        raise RecipeError.at("data.prepared_dir", message)
    return prepared


class MadeTokenizer(NamedTuple):
    """The tokenizer of a recipe."""

    tokenizer: PreTrainedTokenizerFast
    drawn: dict[str, int] | None = None
    """`TokenizerSample.counts`; None if the tokenizer was not trained, or was trained on all text."""
    extension: Extension | None = None
    """What was added to a pretrained tokenizer."""

    def save(self, folder: Path) -> None:
        """Write it and how it was made into a folder."""
        self.tokenizer.save_pretrained(folder)
        if self.drawn is not None:
            (folder / _TOKENIZER_SAMPLE).write_text(json.dumps(self.drawn), encoding="utf-8")
        if self.extension is not None:
            self.extension.save(folder)


def make_tokenizer(
    section: TokenizerSection, data: DataSection, loaded: PreTrainedTokenizerFast | None = None
) -> MadeTokenizer:
    """Load the recipe's tokenizer and extend it, or train it on the recipe's training text.

    `loaded`: the tokenizer `section.pretrained`, if it was loaded before.
    """
    read = functools.partial(corpus.training_documents, data)
    extend = section.extend
    if section.pretrained is not None:
        made = load_tokenizer(section) if loaded is None else loaded
        if extend is None:
            return MadeTokenizer(made)
        sample = training_sample(section, read) if extend.learn else None
        documents = () if sample is None else sample
        extended = extend_tokenizer(extend, made, documents, section.trust_remote_code)
        return MadeTokenizer(
            extended[0], sample.counts() if sample is not None and sample.is_cut else None, extended[1]
        )
    sample = training_sample(section, read)
    if sample is None or not sample.is_cut:
        logger.info("training the tokenizer on the training text")
        return MadeTokenizer(train_tokenizer(section, read() if sample is None else sample))
    logger.info("training the tokenizer on a sample of the training text")
    return MadeTokenizer(train_tokenizer(section, sample), sample.counts())


def load_prepared_tokenizer(prepared: PreparedData, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of the prepared data. Calling it adds the tokens that every document begins with."""
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(prepared.path / "tokenizer", trust_remote_code=trust_remote_code)
    set_add_bos(made, bool(prepared.document_prefix))
    return made


@contextlib.contextmanager
def _lock_folder(path: Path, suffix: str) -> Iterator[None]:
    """Hold the lock of `path`. Raises errors of the disk as `RecipeError`."""
    from filelock import FileLock, Timeout

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(path) + suffix)
        try:
            lock.acquire(timeout=1)
        except Timeout:
            logger.info("waiting for another process that is preparing %s", path)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
    except OSError as error:
        if error.errno is None:  # not an error of the disk
            raise
        raise RecipeError.at(
            "data.prepared_dir",
            f"cannot write {error.filename or path}: {error.strerror or error}; finished parts are kept; run the "
            "same command again to continue",
        ) from error


@contextlib.contextmanager
def _modules_not_collected() -> Iterator[None]:
    """Within it, the garbage collector does not look at what was imported before.

    Preparing makes so many objects that the collector often looks at all of them. The modules have some 300,000, and
    no garbage. With them, preparation takes a tenth longer.
    """
    import datasets  # noqa: F401
    import transformers  # noqa: F401

    if gc.get_freeze_count():  # the caller has done it, for longer
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _Preparation:
    """One preparation: makes the tokenizer and the unfinished parts, and assembles the folder.

    `loaded`: the tokenizer `section.pretrained`, if it was loaded before.
    """

    def __init__(
        self,
        data: DataSection,
        section: TokenizerSection,
        path: Path,
        num_workers: int,
        loaded: PreTrainedTokenizerFast | None = None,
    ):
        import datasets

        datasets.disable_progress_bars()
        self.data, self.section, self.path, self.num_workers = data, section, path, num_workers
        self.work = path.with_name(path.name + files.INCOMPLETE)
        self.work.mkdir(exist_ok=True)
        self.remote = remote_copy_of(path, data.prepared_dir)
        if self.remote is not None:  # use what other machines have finished
            there = self.remote.list_files()
            folders = ("parts/", f"{_UNPROVEN_PARTS}/", *(("tokenizer/",) if _LAST_TOKENIZER_FILE in there else ()))
            self.remote.download(self.work, [name for name in there if name.startswith(folders)])
        self.start_seconds = time.perf_counter()
        self._unproven = self._read_unproven_parts()
        self.tokenizer = self._load_or_make_tokenizer(loaded)
        self.vocabulary = load_vocabulary(self.data, self.tokenizer)
        self.readers = corpus.training_readers(self.data, self.vocabulary)
        self.validation_readers = corpus.validation_readers(self.data, self.vocabulary)
        if self.remote is not None:
            self._upload_missing(self.remote, there)
        self.vocab_size = padded_vocab_size(section, tokenizer_size(self.tokenizer))

    def _upload_missing(self, remote: RemoteCopy, there: set[str]) -> None:
        """Upload what an earlier call on this machine finished but did not upload."""
        if _LAST_TOKENIZER_FILE not in there:
            names = {f"tokenizer/{file.name}" for file in (self.work / "tokenizer").iterdir()}
            remote.upload(self.work, [*sorted(names - {_LAST_TOKENIZER_FILE}), _LAST_TOKENIZER_FILE])
        for file in sorted((self.work / "parts").glob("*-*.json")):
            account = part_account(self.work, file.stem)
            if account is not None and "files" in account and f"parts/{file.name}" not in there:
                remote.upload(self.work, [*account["files"], f"parts/{file.name}"])

    def finish(self) -> PreparedData:
        """Make all unfinished parts and assemble the prepared folder."""
        sources, validation, of_tokenizer = _identities(self.data, self.section)
        parts = self.make_parts(0, 1)
        has_prefix = bool(document_prefix(self.tokenizer))
        if _path(self.data, self.section, self.path.parent, has_prefix)[0] != self.path:
            raise RecipeError.at("data.sources", "a source changed while it was prepared; run the command again")
        extra = {
            "vocab_size": self.vocab_size,
            "tokenizer_size": tokenizer_size(self.tokenizer),
            "add_bos": self.section.add_bos,
            "vocab_size_asked": self.section.vocab_size,
            "recipe": redact_all(self.data.model_dump(mode="json", exclude_none=True)),
            "source_identities": sources,
            "validation_identities": validation,
            "tokenizer_identity": of_tokenizer,
            "encoder": self._encoder_used(),
            "versions": {name: version(name) for name in ("datasets", "tokenizers", "transformers", "pyarrow")}
            | {"python": platform.python_version()},
        }
        if (sample := self.work / "tokenizer" / _TOKENIZER_SAMPLE).is_file():
            extra["tokenizer_sample"] = json.loads(sample.read_text(encoding="utf-8"))
        if notes := [note for reader in (*self.readers, *self.validation_readers) for note in reader.notes]:
            extra["reading_notes"] = notes
        if (extension := load_extension(self.work)) is not None:
            extra["tokenizer_extension"] = extension.describe()
        shutil.rmtree(self.work / "scan", ignore_errors=True)
        shutil.rmtree(self.work / _UNPROVEN_PARTS, ignore_errors=True)
        for left in list(self.work.rglob("*" + files.INCOMPLETE)):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        if self.remote is not None:
            for part in parts:
                self.remote.download(self.work, (part_account(self.work, part) or {})["files"])
        prepared = assemble.assemble(
            self.work,
            self.path,
            parts,
            self.data,
            self.tokenizer.eos_token_id,
            document_prefix(self.tokenizer),
            token_dtype(self.vocab_size),
            extra,
            self.num_workers,
        )
        files.record_as_verified(self.path)
        if self.remote is not None:
            there = self.remote.list_files()
            self.remote.upload(self.path, (name for name in prepared.manifest["files"] if name not in there))
            self.remote.upload(self.path, [files.MANIFEST])
        seconds = time.perf_counter() - self.start_seconds
        logger.info("prepared %s in %.1f s on %d thread(s)", self.path, seconds, self.num_workers)
        return prepared

    def _load_or_make_tokenizer(self, loaded: PreTrainedTokenizerFast | None) -> PreTrainedTokenizerFast:
        """The tokenizer in the work folder, made if there is none. A preparation never changes its tokenizer."""
        from transformers import AutoTokenizer

        folder = self.work / "tokenizer"
        if not folder.is_dir():
            made = make_tokenizer(self.section, self.data, loaded)
            own = self.work / f"tokenizer-{os.getpid()}{files.INCOMPLETE}"
            made.save(own)
            try:
                own.rename(folder)
                return made.tokenizer
            except OSError:  # another shard on this disk has made it meanwhile
                shutil.rmtree(own)
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=self.section.trust_remote_code)
        except Exception as error:  # a broken file may raise anything
            what = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
            message = f"the tokenizer in {folder} can't be loaded: {what}; delete {self.work} to start over"
            raise RecipeError.at("data", message) from error

    def make_parts(self, index: int, count: int) -> list[str]:
        """Make the unfinished parts of shard `index` of `count`. Returns the keys of all its parts in order."""
        readers = [*self.validation_readers, *(() if self.data.streaming else self.readers)]
        groups = _validation_groups(self.validation_readers)
        groups += [] if self.data.streaming else _training_groups(self.readers)
        self.splitter = Splitter(self.data, corpus.held_out_digests(self.data, self.vocabulary))
        self.is_first = self._find_first_occurrences() if self.data.deduplicate else None
        bytes_of_token = token_bytes(self.tokenizer, self.vocab_size)
        logger.info("tokenizing and packing into blocks of %d tokens", self.data.block_size)
        done: list[str] = []
        self.encoders, unknown = self._encoders(), unknown_id(self.tokenizer)
        with _Progress(readers) as progress:

            def encoder(part: str) -> Encoder:
                found = self.encoders[_source_section(self.data, part).special_tokens]
                return found.without_fast if part in self._unproven else found

            def on_written(batch: TextBatch, tokens: int) -> None:
                progress.update(batch, tokens)
                if self.remote is not None and batch.ends_part:
                    account = part_account(self.work, batch.part) or {}
                    self.remote.upload(self.work, [*account["files"], f"parts/{batch.part}.json"])

            while True:
                batches = self._batches(groups, index, count, done)
                try:
                    packing.pack(
                        self.work, batches, encoder, bytes_of_token, unknown, self.data, self.num_workers, on_written
                    )
                    return done
                except UnprovenPartError as error:
                    self._add_unproven_part(error)
                    done.clear()
                    for reader in readers:
                        reader.start_over()

    def _read_unproven_parts(self) -> dict[str, str]:
        """Why `tokenizers` alone encodes some parts, by the name of the part. Other processes may have found them."""
        return {path.stem: path.read_text("utf-8") for path in sorted((self.work / _UNPROVEN_PARTS).glob("*.txt"))}

    def _add_unproven_part(self, error: UnprovenPartError) -> None:
        if not self._unproven:
            logger.warning("%s; such parts of the text are encoded by tokenizers instead", error)
        self._unproven[error.part] = str(error)
        name = f"{_UNPROVEN_PARTS}/{error.part}.txt"
        (self.work / _UNPROVEN_PARTS).mkdir(exist_ok=True)
        files.write_atomically(self.work / name, str(error))
        if self.remote is not None:
            self.remote.upload(self.work, [name])

    def _encoder_used(self) -> dict[str, Any]:
        """The library that encoded the text, with its version, for the manifest. Either one gives the same ids."""
        if all(source.holds_tokens for source in (*self.data.sources, *self.data.validation_sources)):
            return {}  # nothing was encoded
        is_fast = any(encoder.fast is not None for encoder in self.encoders.values())
        unproven = self._read_unproven_parts()
        used = {"fastokens": version("fastokens")} if is_fast else {"tokenizers": version("tokenizers")}
        return {**used, "parts_by_tokenizers": unproven} if unproven else used

    def _encoders(self) -> dict[Any, Encoder]:
        """An encoder for each value of `special_tokens` among the sources."""
        first = Encoder(self.tokenizer, token_dtype(self.vocab_size))
        require_special_tokens(self.data, first)
        chosen = {source.special_tokens for source in (*self.data.sources, *self.data.validation_sources)}
        return {special_tokens: first.for_source(special_tokens) for special_tokens in chosen}

    def _batches(self, groups: list[_FileGroup], index: int, count: int, done: list[str]) -> Iterator[TextBatch]:
        """Batches of one shard's unfinished parts. Appends the key of every part, finished before or now, to `done`."""
        # Shards get whole groups of files if there are enough of them, otherwise parts of each group.
        by_group = len(groups) >= count
        for group_index, group in enumerate(groups):
            if by_group and group_index % count != index:
                continue
            finished = self._finished_group(group)
            if finished:
                done += finished
                group.reader.count_as_read(group.pieces)
                continue
            documents = enumerate(group.reader.read(group.pieces))
            ordinal, ends_group = 0, False
            while not ends_group:
                key = part_key(group.source, group.number, ordinal)
                is_ours = by_group or (group_index + ordinal) % count == index
                is_wanted = is_ours and part_account(self.work, key) is None
                for batch in self._part_batches(key, group, documents):
                    ends_group = batch.ends_group
                    if is_wanted:
                        yield batch
                done.append(key)
                ordinal += 1

    def _finished_group(self, group: _FileGroup) -> list[str]:
        """The keys of a group's parts if all are done, so that the group need not be read; otherwise empty."""
        keys: list[str] = []
        while True:
            keys.append(part_key(group.source, group.number, len(keys)))
            account = part_account(self.work, keys[-1])
            if account is None:
                return []
            if account["ends_group"]:
                return keys

    def _part_batches(
        self, key: str, group: _FileGroup, documents: Iterator[tuple[int, Document]]
    ) -> Iterator[TextBatch]:
        """The batches of one part. Its end depends on the characters and documents read, not on how many are kept."""
        chars = count = 0
        batch, source = TextBatch(key), group.source
        is_first = None if self.is_first is None or source is None else self.is_first[source, group.number]
        held_out = self.data.validation_split(group.number // _MAX_GROUPS_PER_SOURCE) if source is None else ""
        for number, document in documents:
            is_usable = document.problem is None and len(document.content) > 0
            if is_first is not None and is_usable and not is_first[number]:
                splits: list[tuple[str, Any]] = [("duplicate", "")]
            else:
                splits = [(held_out, document.content)] if source is None else self.splitter(document)
                if source is None and not is_usable:
                    splits = [(document.problem[0] if document.problem else "empty", "")]
            self._add_document(batch, document, splits, source)
            chars, count = chars + document.num_chars, count + 1
            if chars >= packing.PART_CHARS or count >= packing.PART_DOCUMENTS:
                batch.ends_part = True
                yield batch
                return
            if batch.is_full:
                yield batch
                batch = TextBatch(key)
        batch.ends_part = batch.ends_group = True
        batch.stopped_at_limit = group.reader.stopped_at_limit
        yield batch

    def _add_document(
        self, batch: TextBatch, document: Document, splits: list[tuple[str, Any]], source: int | None
    ) -> None:
        batch.documents_read += 1
        batch.bytes_read += document.num_bytes
        batch.chars += document.num_chars
        if document.framing is not None:
            batch.framing.append(document.framing)
        if splits[0][0] != "train" and not is_validation(splits[0][0]):
            batch.dropped[splits[0][0]] += 1
            batch.bytes_dropped += document.num_bytes
            batch.tokens_dropped += 0 if document.ids is None else len(document.ids)
            return
        batch.documents_kept += 1
        digest = int.from_bytes(document.digest[:8], "big")
        for split, text, num_bytes in self._with_bytes(document, splits):
            name = f"train-{source if self.data.weights else 0}" if split == "train" else split
            whole = len(text) == len(document.content)
            batch.items.append(SplitText(name, text, num_bytes, digest, document.origin, document.row, whole))

    def _with_bytes(self, document: Document, splits: list[tuple[str, Any]]) -> list[tuple[str, str | np.ndarray, int]]:
        """Each part of a document, with its bytes. The parts' bytes add up to those of the document."""
        later = []
        for split, content in splits[1:]:
            if isinstance(content, str):
                num_bytes = len(content.encode())
            else:
                assert self.vocabulary is not None
                num_bytes = self.vocabulary.num_bytes(content)
            later.append((split, content, num_bytes))
        first = document.num_bytes - sum(num_bytes for *_, num_bytes in later)
        return [(*splits[0], first), *later]

    def _find_first_occurrences(self) -> dict[tuple[int, int], np.ndarray]:
        """For every group of the training sources, which of its documents are the first with their text: bool (n,).

        Reads all text once before it is tokenized. The hashes of each group are kept on disk, for a call that resumes.
        """
        (self.work / "scan").mkdir(exist_ok=True)
        found = {}
        logger.info("looking for duplicates")
        for source, number, reader, pieces in _training_groups(self.readers):
            path = self.work / "scan" / f"{source}-{number:05d}.npy"
            if not path.exists():
                digests = (int.from_bytes(document.digest[:8], "big") for document in reader.read(pieces))
                own = path.with_name(f"{path.stem}-{os.getpid()}.npy{files.INCOMPLETE}")
                with own.open("wb") as file:
                    np.save(file, np.fromiter(digests, dtype=np.uint64))
                own.rename(path)
            assert source is not None
            found[source, number] = np.load(path)
        first = duplicates.first_occurrences(np.concatenate(list(found.values())))
        bounds = np.cumsum([len(values) for values in found.values()])[:-1]
        return dict(zip(found, np.split(first, bounds), strict=True))


def _source_section(data: DataSection, part: str) -> SourceSection:
    """The recipe's section of a part's source."""
    number = part_source(part)
    if number is not None:
        return data.sources[number]
    return data.validation_sources[int(part.split("-")[1]) // _MAX_GROUPS_PER_SOURCE]


class _FileGroup(NamedTuple):
    """Files of one source that are read one after another: one of `Reader.groups`."""

    source: int | None
    """Number of the source, None for validation."""
    number: int
    """The group's number in part keys. Validation source n begins at n * `_MAX_GROUPS_PER_SOURCE`."""
    reader: Reader
    pieces: range


def _training_groups(readers: list[Reader]) -> list[_FileGroup]:
    return [
        _FileGroup(source, number, reader, pieces)
        for source, reader in enumerate(readers)
        for number, pieces in enumerate(reader.groups())
    ]


def _validation_groups(readers: list[Reader]) -> list[_FileGroup]:
    return [
        _FileGroup(None, nth * _MAX_GROUPS_PER_SOURCE + number, reader, pieces)
        for nth, reader in enumerate(readers)
        for number, pieces in enumerate(reader.groups())
    ]


class _Progress:
    """A progress bar over the bytes of the files. Where stderr is no terminal, it prints a line a minute."""

    def __init__(self, readers: list[Reader]):
        from tqdm import tqdm

        sizes = [reader.num_bytes for reader in readers]
        self._readers = readers
        self._start = time.perf_counter()
        self._documents = self._tokens = 0
        is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            desc="packing",
            total=None if None in sizes else sum(size or 0 for size in sizes),
            unit="B",
            unit_scale=True,
            mininterval=0.2 if is_terminal else 60,
            delay=0 if is_terminal else 60,
            leave=False,
            dynamic_ncols=is_terminal,
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, batch: TextBatch, tokens: int) -> None:
        """Count a batch that was written."""
        self._documents += batch.documents_read
        self._tokens += tokens
        rate = self._tokens / (time.perf_counter() - self._start)
        self._bar.set_postfix_str(f"{self._documents:,} documents, {rate:,.0f} tokens/s", refresh=False)
        self._bar.update(sum(reader.bytes_read for reader in self._readers) - self._bar.n)
