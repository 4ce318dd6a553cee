"""Identify the content of sources and tokenizer, to notice a change and to name the prepared folder."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfpretrain import files
from hfpretrain.data import prepared, source_files, token_files
from hfpretrain.data.corpus import PYTHON_STDLIB, first_line, load_builder, require_openable
from hfpretrain.data.source_files import SourceFile, expand_pattern
from hfpretrain.recipe.redaction import redact
from hfpretrain.recipe.schema import (
    FILE_FORMATS,
    TOKEN_KEYS,
    DataSection,
    RecipeError,
    SourceSection,
    TokenizerSection,
)

# Entries of fsspec's file information that differ between two versions of a file.
_VERSION_KEYS = (
    *("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "generation", "blob_id", "sha", "CRC"),
    *("Last-Modified", "LastModified", "last_modified", "updated", "modificationTime", "modify", "mtime", "created"),
)
# Keys that older versions did not have. Their defaults mean what those versions did, so they change no fingerprint.
_LATER_SOURCE_KEYS = ("special_tokens", "text_template", "delimiter", "max_documents", "max_bytes", *TOKEN_KEYS)
_LATER_TOKENIZER_KEYS = {
    *("train_on", "pattern", "min_frequency", "special_tokens", "reserved_tokens", "byte_fallback", "limit_alphabet"),
    "extend",
}
_TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".bpe", ".vocab", ".py")


def source_identity(source: SourceSection, key: str = "data.sources") -> list[Any]:
    """A value that changes with the source's text, and stays the same when its files move to another folder.

    For a file: its name without folders, its size and its digest. For a URL: the version that its server reports. For a
    Hub dataset: the commit; in offline mode, the commit in the local cache. `key`: the source's path in the recipe.
    Raises `RecipeError` if there is none of these, because a change of the text would go unnoticed.
    """
    require_openable(source, key)
    if source.path == PYTHON_STDLIB:
        return [[PYTHON_STDLIB, sys.version]]
    kind = source.path if source.path in FILE_FORMATS or source_files.is_packaged(source.path) else "folder"
    splits = source_files.find_splits(source, key)
    saved = source_files.saved_splits(source, key)
    if saved is not None and source.split in saved:
        return [kind, *_saved_versions(saved, key)]
    if splits is not None:
        names = {split: [name for file in some for name in _with_index(file, source)] for split, some in splits.items()}
        found = {split: _file_versions(some, key) for split, some in names.items()}
        return [kind, *(found["train"] if list(found) == ["train"] else map(list, found.items()))]
    if source_files.is_folder(source) or source_files.is_packaged(source.path):
        return [kind, *_datasets_versions(source, key)]
    selection = {"data_files": [name for name in source.patterns if "://" not in name], "data_dir": source.data_dir}
    urls = [name for pattern in source.patterns if "://" in pattern for name, _ in expand_pattern(source, pattern, key)]
    return [{"dataset": source.path, "commit": _commit(source, key), **selection}, *_file_versions(urls, key)]


def _with_index(file: SourceFile, source: SourceSection) -> list[str]:
    """A file's name, and the name of its index if it has one, as Megatron's token files do."""
    index = token_files.index_of(file.origin) if source.holds_tokens else None
    return [file.origin, *([str(index)] if index is not None and index.is_file() else [])]


def _datasets_versions(source: SourceSection, key: str) -> list[Any]:
    """Versions of each split's files as `datasets` finds them, and of the files that configure the folder."""
    config = load_builder(source, key).config
    found = [[str(split), *_file_versions(list(names), key)] for split, names in (config.data_files or {}).items()]
    if not found:
        message = f"{source.path} has no list of data files, so a change would go unnoticed; set data_files"
        raise RecipeError.at(key, message)
    settings = [Path(source.path, name) for name in ("README.md", ".huggingface.yaml", "dataset_infos.json")]
    return [*found, *_file_versions([str(path) for path in settings if path.is_file()], key)]


def _saved_versions(saved: dict[str, list[source_files.SourceFile]], key: str) -> list[Any]:
    """Versions of each split's files. The standard splits come first, as `datasets` gave them to older versions."""
    first = [name for name in ("train", "validation", "test") if name in saved]
    return [
        [name, *_file_versions([file.origin for file in saved[name]], key)] for name in dict.fromkeys([*first, *saved])
    ]


def _commit(source: SourceSection, key: str) -> str:
    """The commit of a Hub dataset's revision; in offline mode the one in the cache of `datasets`."""
    import datasets
    from huggingface_hub import HfApi

    if not datasets.config.HF_HUB_OFFLINE:
        try:
            return str(HfApi().dataset_info(source.path, revision=source.revision).sha)
        except Exception as error:  # from the Hub or the network
            advice = "set HF_HUB_OFFLINE=1 to use the local cache"
            message = f"cannot ask the Hub for {source.path}: {type(error).__name__}: {first_line(error)}; {advice}"
            raise RecipeError.at(key, message) from error
    commit = str(load_builder(source, key).hash)
    if source.revision is not None and re.fullmatch("[0-9a-f]{40}", source.revision) and source.revision != commit:
        message = f"the local cache has {source.path} at {commit}; unset HF_HUB_OFFLINE to read {source.revision}"
        raise RecipeError.at(f"{key}.revision", message)
    return commit


def pin_to_commits(data: DataSection, identities: Sequence[Any], validation: Sequence[Any]) -> DataSection:
    """Set the revision of each Hub dataset in `data` to its commit, so that a later push to it changes nothing.

    `identities`, `validation`: the `source_identity` of each source and of each validation source. Raises
    `RecipeError` if this machine is offline and its cache has another commit.
    """
    import datasets

    def pin_source(source: SourceSection, identity: Any, key: str) -> SourceSection:
        if not identity or not isinstance(identity[0], dict) or "commit" not in identity[0]:
            return source
        commit = identity[0]["commit"]
        if not datasets.config.HF_HUB_OFFLINE:
            return source.model_copy(update={"revision": commit})
        if (cached := _commit(source, key)) != commit:
            message = f"the local cache has {source.path} at {cached}, but the data was prepared from {commit}"
            raise RecipeError.at(key, f"{message}; use the same cache on all machines, or unset HF_HUB_OFFLINE")
        return source

    def pin_sources(key: str, sources: Sequence[SourceSection], known: Sequence[Any]) -> tuple[SourceSection, ...]:
        numbered = enumerate(zip(sources, known, strict=True))
        return tuple(pin_source(*pair, f"data.{key}.{number}") for number, pair in numbered)

    sources = pin_sources("sources", data.sources, identities)
    held_out = pin_sources("validation_sources", data.validation_sources, validation)
    return data.model_copy(update={"sources": sources, "validation_sources": held_out})


def _file_versions(names: Sequence[str], key: str) -> list[list[Any]]:
    """Name, size and version of each file. The version is the digest of a local file, or what the server reports."""
    local = {name: Path(_strip_file_scheme(name)) for name in names if "://" not in _strip_file_scheme(name)}
    try:
        known = dict(zip(local, files.digests(list(local.values())), strict=True))
    except OSError as error:
        message = f"cannot read {error.filename}: {error.strerror or error}"
        raise RecipeError.at(f"{key}.data_files", message) from error
    return [
        [local[name].name, *known[name]] if name in local else [redact(name), *_remote_version(name, key)]
        for name in names
    ]


def _strip_file_scheme(name: str) -> str:
    return name.removeprefix("file://")


def _remote_version(url: str, key: str) -> list[Any]:
    if re.match(r"hf://[^:]*@[0-9a-f]{40}/", url):
        return []  # the URL itself has the commit
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        info = filesystem.info(path)
    except Exception as error:  # what a remote file system raises may be anything
        message = f"cannot read {url}: {type(error).__name__}: {first_line(error)}"
        raise RecipeError.at(f"{key}.data_files", message) from error
    found = [str(info[name]) for name in _VERSION_KEYS if info.get(name) is not None]
    if not found:
        message = (
            f"the server of {url} sends neither ETag nor Last-Modified, so a change of the file would go unnoticed"
        )
        raise RecipeError.at(f"{key}.data_files", f"{message}; download the file to this machine")
    return [str(info.get("size")), *found]


def tokenizer_identity(section: TokenizerSection) -> list[Any]:
    """Names and digests of a pretrained tokenizer's files; empty for a tokenizer that is trained on the text.

    For a Hub tokenizer, the files of its revision; in offline mode, those in the local cache.
    """
    if section.pretrained is None:
        return []
    folder = Path(section.pretrained)
    if not folder.is_dir():
        import huggingface_hub

        patterns = [f"*{suffix}" for suffix in _TOKENIZER_SUFFIXES]
        try:
            folder = Path(
                huggingface_hub.snapshot_download(
                    section.pretrained, revision=section.revision, allow_patterns=patterns, ignore_patterns=["*/*"]
                )
            )
        except Exception as error:  # from the Hub or the network, or since it is neither a folder nor an id
            message = f"{type(error).__name__}: {first_line(error)}"
            advice = "" if huggingface_hub.is_offline_mode() else "; set HF_HUB_OFFLINE=1 to use the local cache"
            what = f"there is no folder {section.pretrained!r}, and it can't be read from the Hub"
            raise RecipeError.at("tokenizer.pretrained", f"{what}: {message}{advice}") from error
    found = [file for file in sorted(folder.iterdir()) if file.name.endswith(_TOKENIZER_SUFFIXES) and file.is_file()]
    return [[file.name, files.sha256(file)] for file in found]


def fingerprint(data: DataSection, tokenizer: TokenizerSection, identities: list[Any], has_prefix: bool = False) -> str:
    """Name of the prepared folder: a hash of everything that decides its content.

    A changed source, tokenizer or block size gives another name, so outdated data is never used.

    `identities`: of the sources and the tokenizer; they stand for the names in the recipe. `has_prefix`: whether
    documents begin with what calling the tokenizer adds before a text. Older versions did not add it.
    """
    content = data.model_dump(mode="json", exclude={"prepared_dir", "stages", "shift_blocks", "shuffle_buffer"})
    sections = (*data.sources, *data.validation_sources)
    for section, source in zip(sections, (*content["sources"], *content["validation_sources"]), strict=True):
        for name in ("path", "data_files", "data_dir", "revision"):
            del source[name]
        for name in _LATER_SOURCE_KEYS:
            # `min_agreement` only decides whether the tokens are accepted, and does not change them.
            if name == "min_agreement" or getattr(section, name) == SourceSection.model_fields[name].default:
                del source[name]
    if len(data.block_sizes) > 1:
        content["block_sizes"] = data.block_sizes
    for source in content["sources"]:
        # Weights decide the order of training. On disk it only matters whether there are any: each source then has its
        # own blocks.
        source["weight"] = source["weight"] is not None
        del source["max_epochs"]
    # A chat template changes no document. `identities` has a pretrained tokenizer, and `has_prefix` covers `add_bos`.
    tokenizer_content = tokenizer.model_dump(
        mode="json", exclude={"chat_template", "pretrained", "revision", "add_bos", "max_unknown"}
    )
    for name in _LATER_TOKENIZER_KEYS & tokenizer_content.keys():
        if getattr(tokenizer, name) == TokenizerSection.model_fields[name].default:
            del tokenizer_content[name]
    framed = ["document prefix"] if has_prefix else []
    text = json.dumps([prepared.FORMAT, content, tokenizer_content, identities, *framed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
