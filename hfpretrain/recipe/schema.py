"""The sections and keys of a recipe, and the checks of their values.

Neither torch nor a Hugging Face library is imported here, so that `hfpretrain check` works without them.
"""

from __future__ import annotations

import itertools
import math
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    field_validator,
    model_serializer,
    model_validator,
)

from hfpretrain.recipe.addresses import parse_hub_address, repo_id_problem
from hfpretrain.recipe.redaction import redact
from hfpretrain.recipe.template import parse_template

MixedPrecision = Literal["auto", "no", "tf32", "bf16", "fp16", "fp8"]


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: the dotted `path` of the key, what is wrong, and the fix."""

    path: str
    message: str

    def __post_init__(self) -> None:
        for name in ("path", "message"):
            object.__setattr__(self, name, redact(getattr(self, name)))

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


class RecipeError(ValueError):
    """The user's input is wrong; `problems` lists everything. Commands print it and exit with code 2."""

    def __init__(self, problems: Problem | Sequence[Problem]):
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    @classmethod
    def at(cls, path: str, message: str) -> RecipeError:
        """The error of a single key."""
        return cls(Problem(path, message))


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, a docstring under every field."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )


def _with_revision(given: Any) -> Any:
    """Split `pretrained: ID@REVISION` of a section into `pretrained` and `revision`."""
    pretrained = given.get("pretrained") if isinstance(given, dict) else None
    if not isinstance(pretrained, str) or "@" not in pretrained or Path(pretrained).exists():
        return given
    repo_id, _, revision = pretrained.partition("@")
    if given.get("revision") not in (None, revision):
        raise ValueError(f"`pretrained` names revision {revision!r} and `revision` {given['revision']!r}; give one")
    return {**given, "pretrained": repo_id, "revision": revision}


AttentionImplementation = Annotated[
    str, Field(pattern=r"^(auto|sdpa|eager|flash_attention_[234]|flex_attention|kernels-community/[\w.-]+)$")
]


class ModelSection(Section):
    """The model: a new one from `config`, or an existing one from `pretrained`; exactly one of the two."""

    config: dict[str, Any] | None = None
    """Keywords of `AutoConfig.for_model`: `model_type` and any key of that config class, for example `{model_type:
    llama, hidden_size: 512}`. `vocab_size`, `bos_token_id`, `eos_token_id` and `pad_token_id` default to the
    tokenizer's."""
    pretrained: str | None = None
    """Folder or Hub id of the checkpoint to train further (`AutoModelForCausalLM.from_pretrained`). `ID@REVISION` sets
    `revision` as well."""
    revision: str | None = None
    """Revision of `pretrained` on the Hub."""
    config_overrides: dict[str, Any] = {}
    """Changes of the config of `pretrained`: any key of its class that changes no tensor, for example
    `{attention_dropout: 0.1}` or `{rope_parameters: {rope_theta: 500000}, max_position_embeddings: 32768}`. The keys of
    `rope_parameters` that are not given keep their values. If `rope_type` changes, only `rope_theta`,
    `partial_rotary_factor` and the original context length are kept. Any other value replaces that of the checkpoint.
    If the checkpoint has parts for images or sound, the keys are those of its text model. The run's first lines show
    what changes, and the export has the changed config. Default: none."""
    allow_missing: tuple[str, ...] = ()
    """Names of tensors that only the checkpoint `pretrained` or only the model may have, for example
    `[lm_head.weight]`. `*` matches any characters. A tensor that the checkpoint lacks is drawn from the seed. A tensor
    that the model lacks is left out. Default: none, so that any missing or unexpected tensor is an error."""
    attn_implementation: AttentionImplementation = "auto"
    """Attention implementation, passed to transformers: `sdpa`, `eager`, `flash_attention_2`, `flash_attention_3`,
    `flash_attention_4` or `flex_attention`. `auto`: PyTorch's scaled dot product attention (`sdpa`) where the model's
    class supports it, otherwise `eager`. A name such as `kernels-community/flash-attn3` is a kernel of the
    Hub (package `kernels`)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    use_liger_kernel: bool = False
    """Use Liger's Triton kernels for norms, activations and rotary positions (package `liger-kernel`, GPUs only), as in
    `TrainingArguments`. The loss is still computed as `training.chunked_loss` says."""
    depth_scaled_init: bool = False
    """Draw the projections that write into the residual stream with standard deviation `initializer_range` /
    sqrt(2 * layers), as GPT-2 does (Radford et al. 2019, section 2.3)."""
    trust_remote_code: bool = False
    """Run model code that comes with `pretrained`. false, the default: only classes of transformers itself are used."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the exported weights. Training keeps float32 weights under every engine and precision. A 16-bit dtype
    halves the exported folder; the weights are rounded once, at the export."""

    _revision = model_validator(mode="before")(_with_revision)

    @property
    def config_key(self) -> str:
        """Path of the mapping that sets keys of the model's config."""
        return "model.config" if self.pretrained is None else "model.config_overrides"

    @model_validator(mode="after")
    def _check_one_origin(self) -> ModelSection:
        if (self.config is None) == (self.pretrained is None):
            both = "; `config_overrides` changes the config of a checkpoint" if self.config is not None else ""
            message = "give exactly one of `config` (a new model) and `pretrained` (train a checkpoint further)"
            raise ValueError(message + both)
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("`config` needs `model_type`, for example llama, qwen3, gpt2")
        if self.pretrained is not None and self.depth_scaled_init:
            raise ValueError("`depth_scaled_init` draws new weights and would overwrite those of `pretrained`")
        if self.config_overrides and self.pretrained is None:
            raise ValueError("`config_overrides` belongs to `pretrained`; a new model has these keys in `config`")
        for key in ("revision", "allow_missing"):
            if getattr(self, key) and self.pretrained is None:
                raise ValueError(f"`{key}` belongs to `pretrained`, which is not given")
        return self

    @property
    def attention_has_kernels(self) -> bool:
        """Whether the attention implementation has kernels of its own, which may not run on every machine."""
        return self.attn_implementation not in ("auto", "sdpa", "eager")


TOKENIZER_SAMPLE_BYTES = 2_000_000_000
SPLIT_PATTERNS = ("gpt2", "llama3", "digits", "unspaced")
END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
UNKNOWN = "<|unknown|>"
_KEYS_OF_ALL = {"train_on", "special_tokens", "reserved_tokens"}
_KEYS_OF_ALGORITHM: dict[str, set[str]] = {
    "byte_level_bpe": {*_KEYS_OF_ALL, "pattern", "min_frequency"},
    "bpe": {*_KEYS_OF_ALL, "pattern", "min_frequency", "byte_fallback", "limit_alphabet"},
    "character": {*_KEYS_OF_ALL, "byte_fallback"},
}


class TrainOnSection(Section):
    """The text on which a tokenizer is trained: a sample of documents, taken in the order of a hash of their text until
    one of the limits is reached. The last document is cut at `bytes`. The same documents in other files or in another
    order give the same sample."""

    bytes: PositiveInt = TOKENIZER_SAMPLE_BYTES
    """Maximum size in bytes of UTF-8, for example 1_000_000_000. The default is 2 GB, because the trainer's memory
    grows with the number of different words."""
    documents: PositiveInt | None = None
    """Maximum number of documents. null: no maximum."""


class ExtendSection(Section):
    """More tokens for the BPE tokenizer `tokenizer.pretrained`, for example for another language. They get ids after
    all others. Each one is made by merges that come after those of the tokenizer, so it joins neighboring tokens of the
    tokenizer, and all other text keeps its tokens and ids. With `model.pretrained`, the embedding of a new token begins
    as the mean of those of the tokens that it joins, in the input and in the output (Hewitt 2021, "Initializing New
    Word Embeddings for Pretrained Language Models"). `optimizer.groups` can train the new embeddings alone at first
    (`rows_from: new`). At step 0, the evaluation also has the figures of the base model with its own tokenizer."""

    tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Words that become one token each, for example `[photosynthesis, " mitochondria"]`. A word becomes a token both
    after a space and without one, or only after a space if it is written with a space before it. A merge joins two
    tokens, so a word that had n tokens needs n - 1 new ids. Words that are one token already are left out."""
    learn: int = Field(default=0, ge=0, le=2**22)
    """Number of tokens that are learned on the training text, in addition to `tokens`: BPE training that continues from
    the tokenizer's own tokens. A pair of tokens that occurs only once is not joined, so there may be fewer."""
    train_on: TrainOnSection | None = None
    """The part of the training text on which `learn` learns, as in `tokenizer.train_on`. null, the default: up to
    2 GB."""

    @model_validator(mode="after")
    def _check_extend(self) -> ExtendSection:
        if not self.tokens and not self.learn:
            raise ValueError("give `tokens` (a list of words), `learn` (a number of tokens), or both")
        if self.train_on is not None and not self.learn:
            raise ValueError("`train_on` is only for `learn`; leave it out")
        return self


class TokenizerSection(Section):
    """The tokenizer: an existing one (`pretrained`), or one trained on the recipe's training text (`algorithm`)."""

    pretrained: str | None = None
    """Folder or Hub id of a fast tokenizer."""
    revision: str | None = None
    """Revision of `pretrained` on the Hub."""
    extend: ExtendSection | None = None
    """Add tokens to `pretrained`, for example `{learn: 2000}`. null, the default: none."""
    algorithm: Literal["byte_level_bpe", "bpe", "character"] | None = None
    """Train a tokenizer of this kind. `byte_level_bpe`: BPE over bytes as in GPT-2, which can encode any Unicode text.
    `bpe`: BPE over characters as in Llama 2, except that spaces stay as they are. `character`: one token for each
    character of the training text."""
    vocab_size: int | None = Field(default=None, ge=258, le=2**24)
    """Vocabulary size of a trained BPE tokenizer, special tokens included. At least 258: 256 bytes and 2 special
    tokens."""
    train_on: TrainOnSection | None = None
    """The part of the training text on which the tokenizer is trained, for example `{bytes: 1_000_000_000}` or
    `{documents: 100_000}`. The manifest of the prepared data records the size of the sample. null, the default: 2 GB
    for BPE, and all text for `character`, so that no character is unknown."""
    pattern: str = "gpt2"
    """How text is split into pieces before BPE. No token crosses the border between two pieces. Either one of the
    names below, or a regular expression: each match, and the text between two matches, is a piece
    (`tokenizers.pre_tokenizers.Split`). `gpt2`, the default: words with the space before them, numbers, punctuation.
    `llama3`: as in Llama 3, with numbers in groups of up to 3 digits, and line breaks together with the punctuation
    before them. `digits`: like `gpt2`, but every digit is a piece. `unspaced`: for languages without spaces between
    words, such as Chinese, Japanese and Thai. It is like `llama3`, but vowel signs and accents stay in their word, and
    a run of such a script is a piece of its own, so that no token mixes it with other letters."""
    min_frequency: int = Field(default=0, ge=0)
    """How often a pair of tokens must occur to be merged into one, as in `tokenizers.trainers.BpeTrainer`. The default
    is 0, as there. With a larger number, the vocabulary may be smaller than `vocab_size`."""
    special_tokens: tuple[str, ...] = ()
    """Further special tokens of a trained tokenizer, beside those for the end of a document and for padding, for
    example `["<|im_start|>", "<|im_end|>"]`. Whether such a name in the text becomes the token or stays text is set by
    `data.sources.N.special_tokens`."""
    reserved_tokens: int = Field(default=0, ge=0, le=2**16)
    """Number of unused special tokens `<|reserved_0|>`, `<|reserved_1|>`, ... of a trained tokenizer. Fine-tuning can
    use them later, and the vocabulary keeps its size. Default: 0."""
    byte_fallback: bool = False
    """For `bpe` and `character`: encode a character without a token of its own as its UTF-8 bytes, with 256 tokens
    `<0x00>` to `<0xFF>`, as in `tokenizers.models.BPE`. false, the default: it becomes the unknown token."""
    limit_alphabet: PositiveInt | None = None
    """For `bpe`: the maximum number of different characters that get a token, the most frequent first, as in
    `tokenizers.trainers.BpeTrainer`. null, the default: no maximum."""
    pad_to_multiple_of: int = Field(default=64, ge=1, le=2**16)
    """The model's vocabulary size is the tokenizer's, rounded up to a multiple of this, because matrix kernels are
    faster then. The default is 64."""
    trust_remote_code: bool = False
    """Run tokenizer code that comes with `pretrained`."""
    add_bos: bool | None = None
    """Whether every document begins with the BOS token of `pretrained`. null, the default: as when the tokenizer is
    called on a text. Llama's and Gemma's tokenizers then add BOS, Qwen's and GPT-2's do not. The exported tokenizer
    does what training did. Has no effect where BOS and EOS are the same token, which separates documents in any
    case."""
    max_unknown: float = Field(default=0.01, ge=0, le=1)
    """Maximum share of a source, from 0 to 1, that the tokenizer may lose. It limits two shares: that of the unknown
    token among all tokens, and that of characters for which there is no token. If a source exceeds it in either, the
    run stops. The default, 0.01, is a rule of thumb."""
    chat_template: str | None = None
    """Template that turns messages into text (`tokenizer.apply_chat_template`, which TRL calls): Jinja, or a file that
    holds it. It is exported with the tokenizer. Pretraining does not use it, so it may change when a run is resumed.
    null: the template of `pretrained`, if it has one."""

    _revision = model_validator(mode="before")(_with_revision)

    @model_validator(mode="after")
    def _check_one_origin(self) -> TokenizerSection:
        if (self.pretrained is None) == (self.algorithm is None):
            raise ValueError("give exactly one of `pretrained` (load) and `algorithm` (train)")
        is_bpe = self.algorithm in ("byte_level_bpe", "bpe")
        if is_bpe != (self.vocab_size is not None):
            raise ValueError("`algorithm: byte_level_bpe` and `bpe` need `vocab_size`; other tokenizers do not take it")
        if self.add_bos is not None and self.pretrained is None:
            raise ValueError(
                "`add_bos` is only for `pretrained`: a tokenizer trained here has the same token for BOS and EOS"
            )
        if self.revision is not None and self.pretrained is None:
            raise ValueError("`revision` belongs to `pretrained`, which is not given")
        if self.extend is not None and self.pretrained is None:
            raise ValueError("`extend` is only for `pretrained`; raise `vocab_size` instead")
        for key in self._unused_keys():
            if getattr(self, key) != type(self).model_fields[key].default:
                users = [f"`{name}`" for name, keys in _KEYS_OF_ALGORITHM.items() if key in keys]
                raise ValueError(f"`{key}` is only for `algorithm` {' and '.join(users)}; leave it out")
        special, has_bytes = len(self.trained_special_tokens), self.algorithm == "byte_level_bpe" or self.byte_fallback
        least = special + (256 if has_bytes else 0)
        if self.vocab_size is not None and self.vocab_size < least:
            raise ValueError(
                f"`vocab_size` must be at least {least}: {special} special tokens and {least - special} bytes"
            )
        return self

    def _unused_keys(self) -> set[str]:
        """Keys for the training of a tokenizer that this `algorithm` does not use."""
        return set().union(*_KEYS_OF_ALGORITHM.values()) - _KEYS_OF_ALGORITHM.get(self.algorithm or "", set())

    @model_serializer(mode="wrap")
    def _drop_unused_keys(self, dump: Any) -> dict[str, Any]:
        unused = self._unused_keys()
        return {key: value for key, value in dump(self).items() if key not in unused}

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, pattern: str) -> str:
        # A plain word is more likely a misspelled name than a regular expression that matches only this word.
        if pattern not in SPLIT_PATTERNS and re.fullmatch(r"[\w-]*", pattern):
            names = ", ".join(SPLIT_PATTERNS)
            raise ValueError(f"there is no pattern {pattern!r}; give a regular expression or one of {names}")
        return pattern

    @field_validator("special_tokens")
    @classmethod
    def _check_special_tokens(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for number, name in enumerate(names):
            if name in (END_OF_TEXT, PADDING, UNKNOWN) or name in names[:number]:
                raise ValueError(f"the tokenizer has {name!r} already; leave it out")
            if re.fullmatch(r"<\|reserved_\d+\|>", name):
                raise ValueError(f"{name!r} is the name of a reserved token; set `reserved_tokens` to their number")
            if len(name) < 2 or name != name.strip() or re.fullmatch("<0x[0-9A-F]{2}>", name):
                raise ValueError(f"{name!r} can't be a special token; give a name such as '<|im_start|>'")
        return names

    @property
    def trained_special_tokens(self) -> list[str]:
        """The special tokens of a trained tokenizer, in the order of their ids, which begin with 0."""
        unknown = [] if self.algorithm == "byte_level_bpe" or self.byte_fallback else [UNKNOWN]
        reserved = [f"<|reserved_{number}|>" for number in range(self.reserved_tokens)]
        return [END_OF_TEXT, PADDING, *unknown, *self.special_tokens, *reserved]


FILE_FORMATS = ("text", "json", "parquet", "csv", "tokens")
TOKEN_KEYS = ("ids_column", "documents_by", "dtype", "min_agreement")
"""Keys of a source that are only for `path: tokens`."""
TEXT_KEYS = ("special_tokens", "text_column", "text_template", "delimiter")
"""Keys of a source that `path: tokens` does not take."""


class SourceSection(Section):
    """One source of documents. The names are those of `datasets.load_dataset`."""

    path: str
    """`text`, `json`, `parquet`, `csv`, `tokens` (with `data_files` or `data_dir`), a local folder, a Hub dataset id,
    or `builtin:python-stdlib` (the modules of this machine's Python, one document each). A name is looked up in this
    order: write a folder that is called `text` as `./text`; a folder that exists comes before a Hub dataset of the same
    name. The files of a folder are read by their suffix (.txt, .json, .jsonl, .ndjson, .parquet, .csv, .tsv, each also
    compressed except for .parquet). A folder that `save_to_disk` of a `Dataset` or a `DatasetDict` wrote is read as it
    is. `tokens`: files of token ids that the tokenizer in `tokenizer.pretrained` made. They are `.bin` files of
    nanoGPT, llm.c, modded-nanogpt or Megatron-LM (with `.idx` beside it), or `.npy`, `.parquet` or `.arrow` files. A
    folder of `save_to_disk` is given as `data_dir`."""
    name: str | None = None
    """Configuration name of a Hub dataset, for example `sample-10BT`."""
    data_files: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Files or globs, for example `data/*.jsonl.gz`. Compressed files (gz, zst, xz, bz2) need not be unpacked. A name
    that exists is taken literally, even if it contains `*` or `[`. A pattern whose last part is just `*` skips files
    that accompany data, such as `LICENSE`, and those whose names begin with `_`, as Spark and Hive do. Folders such as
    `_temporary` are skipped in any case, unless the pattern names them. A file that is listed twice is read once. The
    log and the manifest list what was left out."""
    data_dir: str | None = None
    """Folder with the data files."""
    split: str = "train"
    """Split to read. Slices such as `train[:90%]` work."""
    revision: str | None = None
    """Revision of a Hub dataset: a branch, a tag or a commit hash."""
    sample_by: Literal["line", "paragraph", "document"] | None = None
    """What one document of a text file is: a line, a paragraph (separated by blank lines), or the whole file. Required
    for `path: text` and for a folder with text files. Line endings of any kind are read as a newline."""
    special_tokens: Literal["text", "tokens"] | Annotated[tuple[str, ...], Field(min_length=1)] = "text"
    """How the name of a special token, such as `<fim_prefix>` or `<|im_start|>`, is read where the text contains it.
    `text`, the default: as ordinary text. `tokens`: as the special token. A list: these names as special tokens, all
    others as ordinary text. EOS, BOS and padding are always read as ordinary text, so that no text can end its
    document. The manifest counts every occurrence."""
    text_column: str = "text"
    """Name of the column that holds the text. A dot leads into a nested column: `meta.text` is `text` within `meta`,
    unless a column is itself called `meta.text`."""
    text_template: str | None = None
    """Instead of `text_column`: how several columns make one text, for example `"{title}\\n\\n{body}"` (with the
    quotes). Names in braces are columns, written as in `text_column`; `{{` and `}}` are braces. Every column must exist
    and hold text. An empty text is allowed, but a null makes the row a bad document (`data.on_bad_document`). If all
    columns are empty, so is the document."""
    delimiter: str | None = None
    """Character between the fields of CSV files, for example `";"`. null: a tab in files that end in .tsv, and a comma
    in all others."""
    ids_column: str | None = None
    """For `path: tokens`: name of the column that holds the token ids in parquet and Arrow files. null: `input_ids`, as
    in transformers."""
    documents_by: Literal["eos", "bos", "row", "file"] | None = None
    """For `path: tokens`: what one document is. `eos`: it ends with EOS. `bos`: it begins with BOS. `row`: a row of a
    table, or a document of Megatron's index. `file`: the whole file. EOS, BOS and padding around a document are removed
    and counted. Then the document gets the same EOS and BOS as a document of text. null: `row` where rows differ in
    length; the key is required for files without rows (`.bin` without an index, `.npy` with one dimension) and for rows
    of one length, which may be blocks. A document never continues in the next file; if it seems to, a note says how
    often."""
    dtype: Literal["uint16", "uint32", "int32", "int64"] | None = None
    """For `path: tokens`: type of the ids in a `.bin` file without header and index, little-endian. null: uint16, as
    nanoGPT writes them; required if the tokenizer has more than 65,536 ids."""
    min_agreement: float | None = Field(default=None, ge=0, le=1)
    """For `path: tokens`: minimum share, from 0 to 1, of tokens that stay the same when they are decoded and encoded
    again. The tokens are a sample of each file, taken from its beginning to its end. If fewer stay the same, another
    tokenizer made them, and the run stops. A file whose sample has fewer than 200 tokens is not checked. 0: check
    nothing. null: 0.98. In measurements, tokens of the same tokenizer reached 0.999, and English text of other
    tokenizers 0.67 to 0.94."""
    max_documents: PositiveInt | None = None
    """Read only the first documents of the source, at most this many, in the order of its files. Empty and bad
    documents count too, as in `split: train[:1000]`. Such a slice reads all files to count their documents; with this
    limit, reading stops. null: no limit. The manifest records whether a limit ended the source. There is no limit in
    tokens, because the number of tokens depends on the tokenizer, which may be trained on this text."""
    max_bytes: PositiveInt | None = None
    """Read only the first documents of the source that together have at most this many bytes of text in UTF-8, for
    example 4_000_000_000. With `path: tokens`, the bytes are those of the text that the tokens stand for. A token of
    English text has about 4 bytes; the manifest has the figure of each source, `bytes_per_token`. null: no limit. If
    `max_documents` is given too, reading ends at the limit that comes first."""
    weight: float | None = Field(default=None, ge=0)
    """Share of the training tokens, relative to the weights of the other sources. Either all sources have a weight or
    none has. Without weights every block of every source is seen once per epoch. A source with weight 0 is used only
    in `data.stages` that give it a weight."""
    domain: str | None = Field(default=None, pattern="^[A-Za-z0-9_.-]+$")
    """For a validation source: the name under which evaluation reports it separately, for example `code`, or `old` and
    `new` when a pretrained model is trained further. Sources with the same name are evaluated as one set. Either all
    validation sources have a name or none has."""
    max_epochs: PositiveInt | None = None
    """How many times the source's tokens may be seen. A run that needs more is refused at its start; a stream stops
    when they are used up. null: no limit."""

    @model_validator(mode="after")
    def _check_files(self) -> SourceSection:
        if self.path in FILE_FORMATS and self.data_files is None and self.data_dir is None:
            raise ValueError(f"`path: {self.path}` needs `data_files` or `data_dir`")
        if self.path == "text" and self.sample_by is None:
            raise ValueError("`path: text` needs `sample_by`: line, paragraph or document")
        if self.sample_by is not None and (self.path in FILE_FORMATS[1:] or self.path.startswith("builtin:")):
            raise ValueError(f"`sample_by` is only for text files, and `path: {self.path}` reads none")
        for key in TEXT_KEYS if self.holds_tokens else TOKEN_KEYS:
            if getattr(self, key) != type(self).model_fields[key].default:
                which = "only for text" if self.holds_tokens else "only for `path: tokens`"
                raise ValueError(f"`{key}` is {which}; leave it out")
        return self

    @field_validator("text_template", mode="before")
    @classmethod
    def _is_text(cls, template: Any) -> Any:
        if isinstance(template, dict):
            raise ValueError('put the template in quotes, for example "{title}": without them, YAML reads a mapping')
        return template

    @field_validator("delimiter")
    @classmethod
    def _one_character(cls, delimiter: str | None) -> str | None:
        delimiter = "\t" if delimiter == r"\t" else delimiter  # how YAML reads a tab without double quotes
        if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
            raise ValueError('a `delimiter` is one character, for example ";" or "\\t", but not a quotation mark')
        return delimiter

    @model_validator(mode="after")
    def _columns(self) -> SourceSection:
        has_columns = self.path != "text" and not self.path.startswith("builtin:")
        if self.text_template is not None:
            if self.text_column != "text":
                raise ValueError("give `text_column` or `text_template`, not both")
            if not has_columns:
                raise ValueError(f"`text_template` joins columns, and `path: {self.path}` has none")
            parse_template(self.text_template)
        if self.delimiter is not None and (self.path in ("text", "json", "parquet") or not has_columns):
            raise ValueError(f"`delimiter` is only for CSV files, and `path: {self.path}` reads none")
        return self

    @property
    def is_limited(self) -> bool:
        """Whether only the first part of the source is read."""
        return self.max_documents is not None or self.max_bytes is not None

    @property
    def holds_tokens(self) -> bool:
        """Whether the source has token ids instead of text."""
        return self.path == "tokens"

    @property
    def patterns(self) -> tuple[str, ...]:
        """`data_files` as a tuple, empty where there are none."""
        return (self.data_files,) if isinstance(self.data_files, str) else self.data_files or ()


class StageSection(Section):
    """A later part of the run with other weights of the sources, for example only the best ones at the end, or with
    longer blocks."""

    from_tokens: PositiveInt
    """The stage begins with the first sequence after this number of training tokens. A stage that sets `block_size`
    begins with the first step after it."""
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """Weights of `data.sources` in this stage, in their order. 0 leaves a source out. null: as before the stage."""
    block_size: int | None = Field(default=None, ge=2)
    """Tokens in one training sequence from this stage on, for example 32768. A step keeps its `tokens_per_step`, so it
    has fewer sequences if they are longer. The text is prepared once for each block size, and a stage with another
    block size reads it in a new order from the beginning of an epoch. Validation always uses blocks of the largest
    size. Needs prepared data, without `streaming`. null: as before the stage."""
    micro_batch_size: PositiveInt | None = None
    """With `block_size`: sequences per device in one forward pass in this stage. null: as many as have the tokens of a
    micro-batch of the run's beginning, `training.micro_batch_size * data.block_size`."""
    rope_parameters: dict[str, Any] | None = None
    """With `block_size`: keys of the model's `rope_parameters` that change where this stage begins, with the names of
    transformers, for example `{rope_theta: 1_000_000}` or `{rope_type: yarn, factor: 8.0,
    original_max_position_embeddings: 4096}`. Other keys keep their values. With another `rope_type`, only `rope_theta`
    and `partial_rotary_factor` do. The export has the values of the last stage. Later stages keep them. null: no
    change."""

    @model_validator(mode="after")
    def _check_change(self) -> StageSection:
        if self.weights is None and self.block_size is None:
            raise ValueError("a stage changes `weights`, `block_size` or both; give at least one of them")
        for key in ("micro_batch_size", "rope_parameters"):
            if getattr(self, key) is not None and self.block_size is None:
                raise ValueError(f"`{key}` is only for a stage that sets `block_size`, which may stay as it was")
        return self


class DataSection(Section):
    """The text, and how it becomes blocks of tokens."""

    sources: tuple[SourceSection, ...] = Field(min_length=1)
    """Sources of the training text."""
    validation_sources: tuple[SourceSection, ...] = ()
    """Sources of the validation text. A training document that is equal to a validation document is dropped and
    counted."""
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training text, from 0 to 1, that is held out for validation. Use it where there are no
    `validation_sources`."""
    validation_by: Literal["document", "tail"] = "document"
    """How the validation text is chosen. `document`: by a hash of each document, so that a document stays on its side
    when others are added. `tail`: the last part of each document's characters, for a corpus that is one long text."""
    block_size: PositiveInt
    """Tokens in one training sequence, for example 2048. `stages` can change it during the run."""
    stages: tuple[StageSection, ...] = ()
    """Other weights of the sources, or another block size, from a number of tokens on. If a stage has `weights`, every
    source needs a `weight`, which holds until the first stage. For example `[{from_tokens: 1_000_000_000, block_size:
    32768, rope_parameters: {rope_theta: 1_000_000}}]`."""
    packing: Literal["concat", "best_fit"] = "concat"
    """How documents fill blocks. `concat`: one document after another, cut where a block ends, without padding.
    `best_fit`: only a document that is longer than a block is cut, and blocks are padded (Ding et al. 2024, "Fewer
    Truncations Improve Language Modeling"). With `best_fit`, a document that fills one or more blocks exactly has no
    EOS after it."""
    shift_blocks: bool = False
    """Start the blocks at another position of the text in each epoch after the first, so that a corpus that is read
    many times is not always cut at the same positions. Every token is still seen once per epoch."""
    deduplicate: bool = False
    """Keep only the first of several training documents with the same text. Duplicates are counted in any case."""
    on_bad_document: Literal["error", "skip"] = "error"
    """What happens at a broken line, a missing text or invalid UTF-8. `error`: the run stops and names file and line.
    `skip`: the document is left out and counted in the manifest by reason. Of a damaged file, all documents before the
    damage are read. Of a CSV row with an open quotation mark, each line counts."""
    streaming: bool = False
    """Tokenize during training, directly from the sources, without preparing the training text first. Files are read
    in order, and files of similar size side by side. Nothing is shuffled without `shuffle_buffer`. Needs
    `tokenizer.pretrained`, and `validation_sources` for an evaluation."""
    shuffle_buffer: int = Field(default=0, ge=0)
    """With `streaming`: the number of documents that are shuffled at a time, for example 10000. 0, the default: nothing
    is shuffled. The buffer is filled with the next documents of the files, and these are trained on in an order that
    depends only on `seed`, the files and the epoch. Files that are read side by side have a buffer each. The text of a
    buffer is in memory, and so is the text of the next one, which is read at the same time. A resumed run reads the
    documents of the unfinished buffer again, and continues exactly. Prepared data are always shuffled as a whole and
    don't take this key."""
    prepared_dir: str | None = None
    """Folder of the prepared data, which runs share: it has a subfolder for each fingerprint. Default: `prepared`
    beside `output_dir`. If your machines share no disk, set a URL that fsspec supports, for example
    `s3://bucket/prepared`. The URL holds the shared copy. Each machine also keeps a local copy in the default
    folder."""

    @model_validator(mode="after")
    def _check_consistency(self) -> DataSection:
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError("give every source a `weight` or none")
        if any(source.weight is not None or source.max_epochs is not None for source in self.validation_sources):
            raise ValueError("`weight` and `max_epochs` are only for `sources`, not for `validation_sources`")
        if any(source.domain is not None for source in self.sources):
            raise ValueError("`domain` is only for `validation_sources`")
        if len({source.domain is None for source in self.validation_sources}) > 1:
            raise ValueError("give every validation source a `domain` or none")
        if any(stage.weights for stage in self.stages) and not any(weighted):
            raise ValueError("`weights` of `stages` change the sources' `weight`: give every source one")
        if any(weighted) and not any(source.weight for source in self.sources):
            raise ValueError("all sources have weight 0")
        for stage in self.stages:
            if stage.weights is not None and (len(stage.weights) != len(self.sources) or not any(stage.weights)):
                raise ValueError(f"a stage needs {len(self.sources)} weights, one for each source, not all 0")
        starts = [stage.from_tokens for stage in self.stages]
        if starts != sorted(set(starts)):
            raise ValueError("`stages` must be in the order of their `from_tokens`")
        if self.streaming and any(source.holds_tokens for source in self.sources):
            raise ValueError("`streaming` reads text; leave it out for `path: tokens`, which need not be tokenized")
        if self.streaming and self.validation_fraction:
            raise ValueError("`validation_fraction` needs prepared data; with `streaming`, give `validation_sources`")
        if self.streaming and (self.deduplicate or self.packing != "concat"):
            raise ValueError(
                "`deduplicate` and `packing: best_fit` need prepared data; `streaming` does not support them"
            )
        if self.streaming and any(stage.block_size is not None for stage in self.stages):
            raise ValueError("`block_size` of `stages` needs prepared data; leave out `streaming`, or the block size")
        if self.streaming and any(source.is_limited for source in self.sources):
            raise ValueError("`max_documents` and `max_bytes` of `sources` need prepared data, without `streaming`")
        if self.shuffle_buffer and not self.streaming:
            raise ValueError("`shuffle_buffer` is only for `streaming`; prepared data are always shuffled as a whole")
        if self.shift_blocks and (self.streaming or self.packing != "concat"):
            raise ValueError(
                "`shift_blocks` needs prepared data with `packing: concat`; leave it out with `streaming` or `best_fit`"
            )
        if self.validation_sources and self.validation_fraction:
            raise ValueError("give `validation_sources` or `validation_fraction`, not both")
        if self.block_size < 2:
            raise ValueError("`block_size` must be at least 2: a token is predicted from the one before")
        return self

    @property
    def has_validation(self) -> bool:
        """Whether anything is held out."""
        return bool(self.validation_sources) or self.validation_fraction > 0

    def validation_split(self, number: int) -> str:
        """Name of the prepared split of validation source `number`."""
        domain = self.validation_sources[number].domain
        return "validation" if domain is None else f"validation-{domain}"

    @property
    def validation_splits(self) -> list[str]:
        """Names of all validation splits, each once."""
        if self.validation_fraction > 0:
            return ["validation"]
        return list(dict.fromkeys(map(self.validation_split, range(len(self.validation_sources)))))

    @property
    def weights(self) -> list[tuple[int, list[float]]]:
        """(first token, weights of the sources) of every stage of a mixture; empty without weights."""
        if self.sources[0].weight is None:
            return []
        found = [(0, [source.weight or 0.0 for source in self.sources])]
        for stage in self.stages:
            found.append((stage.from_tokens, found[-1][1] if stage.weights is None else list(stage.weights)))
        return found

    @property
    def block_sizes(self) -> list[int]:
        """Every block size of the run once, in the order of their first use."""
        return list(dict.fromkeys([self.block_size, *(stage.block_size for stage in self.stages if stage.block_size)]))

    @property
    def changes_length(self) -> bool:
        """Whether a stage sets a block size."""
        return any(stage.block_size is not None for stage in self.stages)

    @property
    def longest_block_key(self) -> str:
        """Path of the key that sets the largest block size of the run."""
        stages = [stage.block_size for stage in self.stages]
        longest = self.longest_block_size
        return "data.block_size" if longest == self.block_size else f"data.stages.{stages.index(longest)}.block_size"

    @property
    def longest_block_size(self) -> int:
        """The largest block size of the run. The validation text is cut into blocks of this size."""
        return max(self.block_sizes)


_Average = Annotated[float, Field(ge=0, lt=1)]


class ParameterGroupSection(Section):
    """Parameters that are frozen, or that are trained with another learning rate or weight decay."""

    params: str | Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of parameters, for example `model.embed_tokens.*` or `["model.embed_tokens.*", "lm_head.*"]`. `*` matches
    any characters. A run's `optimizer.json` lists the names of all parameters. A pattern that matches none is an
    error."""
    lr: float = Field(default=1.0, ge=0)
    """Factor by which the learning rate of `optimizer.lr` and `scheduler` is multiplied, for example 10 or 0.1. 0: the
    parameters are frozen. They keep their values, and without `until_step` they take no memory for gradients and
    optimizer. Default: 1."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay of the matrices and embeddings of the group. null: `optimizer.weight_decay`."""
    until_step: PositiveInt | None = None
    """The group is in force in this many first optimizer steps of the run; a branch counts those of its trunk, too.
    After them, the next group that matches a parameter is in force, or none. The optimizer's state of a parameter
    begins with the first step in which it is trained. Until then, gradients of frozen parameters are computed and
    dropped, so a step takes as much memory and time as a later one. null: the group is in force during the whole
    run."""
    rows_from: Literal["new"] | PositiveInt | None = None
    """For input and output embeddings: only the rows from this token id on are trained, for example 32000. `new`: only
    those of the tokens that `tokenizer.extend` adds to a pretrained model. The rows before keep their values. While
    only some rows are trained, the embedding gets no weight decay. null: all rows."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of `params`."""
        return (self.params,) if isinstance(self.params, str) else self.params

    @model_validator(mode="after")
    def _check_values(self) -> ParameterGroupSection:
        if 0 < self.lr < 1e-3:
            raise ValueError(
                f"`lr` of a group is a factor on `optimizer.lr`, and {self.lr:g} would all but freeze it; give 1 for "
                "the rate of the recipe, 0.1 for a tenth of it, or 0 to freeze"
            )
        if self.lr == 0:
            for key in ("weight_decay", "rows_from"):
                if getattr(self, key) is not None:
                    raise ValueError(f"`{key}` has no effect on frozen parameters (`lr: 0`); leave it out")
        if self.rows_from is not None and self.weight_decay:
            raise ValueError("an embedding of which `rows_from` trains a part gets no `weight_decay`; leave it out")
        return self


class OptimizerSection(Section):
    """An optimizer and the keywords of its class. Matrices and embeddings get weight decay; norms, biases, other
    vectors and the decay rates of state-space layers do not. A run's `optimizer.json` lists the parameters of each
    group."""

    name: Literal["adamw", "muon", "adafactor", "adamw_8bit", "adamw_schedule_free"] = "adamw"
    """`adamw`: `torch.optim.AdamW`. `muon`: Muon trains the matrices between the embedding and the head, and each
    matrix of a stack of experts, as `torch.optim.Muon` does. AdamW trains the rest, and the routers of experts. Muon's
    update is scaled, so `lr` and `weight_decay` mean the same as for AdamW (Liu et al. 2025, "Muon is Scalable for LLM
    Training").
    `adafactor`: `torch.optim.Adafactor`, only on `single` and `ddp`, because it does not work on sharded matrices.
    `adamw_8bit`: `torchao.optim.AdamW8bit`, with moments in 8 bits, only on `single` and `ddp`, because a shard would
    be quantized in other blocks than the whole matrix. `adamw_schedule_free`: `schedulefree.AdamWScheduleFree`, for
    `constant` schedules. The weights that are evaluated and exported are averages of those that are trained. ZeRO is
    not supported. `adamw_8bit` and `adamw_schedule_free` need packages of their own:
    `pip install hfpretrain[optimizers]`."""
    lr: float = Field(gt=0)
    """Peak learning rate, for example 3e-4."""
    betas: tuple[_Average, _Average] = (0.9, 0.95)
    """Decay rates of the running averages of the gradient and of its square. The default of the second, 0.95, is that
    of GPT-3 (Brown et al. 2020, appendix B)."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator of the update. The default, 1e-8, is torch's."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of matrices and embeddings. The default, 0.1, is that of GPT-3."""
    no_decay: tuple[str, ...] = ()
    """Names of further parameters that get no weight decay, for example `["*embed_tokens*"]`. `*` matches any
    characters. Default: none. A pattern that matches no parameter is an error."""
    groups: tuple[ParameterGroupSection, ...] = ()
    """Parameters that are frozen or have rates of their own. If several groups match a parameter, the first one that is
    in force applies. Parameters that no group matches are trained with the values of this section. For example, to
    train the embeddings of new tokens alone in the first 500 steps, and everything after them:
    `[{params: ["*embed_tokens*", "lm_head*"], rows_from: new, until_step: 500}, {params: "*", lr: 0, until_step: 500}]`
    (without `lm_head*` if the embeddings are tied). The start of a run lists what each group has. Default: none."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Momentum of `muon`. The default, 0.95, is torch's."""
    beta2_decay: float = Field(default=-0.8, le=0)
    """For `adafactor`: at each step, the running average of the squared gradient has the decay rate
    `1 - step ** beta2_decay`. The default, -0.8, is torch's."""
    d: float = Field(default=1.0, ge=1)
    """For `adafactor`: an update with a larger root mean square than this is scaled down to it. The default, 1.0, is
    torch's."""

    _KEYS: typing.ClassVar[dict[str, set[str]]] = {
        "adamw": {"betas", "eps"},
        "muon": {"betas", "eps", "momentum"},
        "adafactor": {"beta2_decay", "d"},
        "adamw_8bit": {"betas", "eps"},
        "adamw_schedule_free": {"betas", "eps"},
    }

    @model_validator(mode="before")
    @classmethod
    def _check_keys_of_optimizer(cls, given: Any) -> Any:
        name = given.get("name", "adamw") if isinstance(given, dict) else None
        if isinstance(name, str) and name in cls._KEYS:
            for key in sorted(set().union(*cls._KEYS.values()) & set(given) - cls._KEYS[name]):
                raise ValueError(f"`{key}` is not a keyword of {name}")
        return given

    @model_validator(mode="after")
    def _check_first_beta(self) -> OptimizerSection:
        if self.name == "adamw_schedule_free" and self.betas[0] == 0:
            raise ValueError("`adamw_schedule_free` needs a first value of `betas` above 0, for example 0.9")
        return self

    @model_serializer(mode="wrap")
    def _drop_keys_of_other_optimizers(self, dump: Any) -> dict[str, Any]:
        others = set().union(*self._KEYS.values()) - self._KEYS[self.name]
        return {key: value for key, value in dump(self).items() if key not in others}


class SchedulerSection(Section):
    """The learning rate schedule: keywords of `transformers.get_scheduler`. Its `num_training_steps` is the number of
    steps of the run."""

    name: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "warmup_stable_decay",
    ] = "cosine"
    """Name of the schedule. Each is a function of the step alone, so that a resumed run continues it exactly."""
    num_warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps in which the learning rate rises linearly from 0 to `optimizer.lr`."""
    scheduler_specific_kwargs: dict[str, Any] = {}
    """Further keywords of this schedule, for example `{min_lr_rate: 0.1}` or `{num_decay_steps: 1000}`."""
    on_branch: Literal["continue", "restart"] = "continue"
    """With `checkpoint.branch_from`, which steps the schedule counts. `continue`, the default: the trunk's steps and
    then those of the branch, so there is no second warm-up, and `warmup_stable_decay` decays in the last
    `num_decay_steps` of the branch. `restart`: only the steps of the branch, so `linear` without warm-up falls from
    `optimizer.lr` to 0 over the branch. The learning rate of the first step is written at the start."""

    @model_validator(mode="after")
    def _check_arguments(self) -> SchedulerSection:
        if self.name == "warmup_stable_decay" and "num_decay_steps" not in self.scheduler_specific_kwargs:
            raise ValueError("`warmup_stable_decay` needs `scheduler_specific_kwargs: {num_decay_steps: ...}`")
        if self.name in ("constant", "constant_with_warmup") and self.scheduler_specific_kwargs:
            raise ValueError(f"`{self.name}` takes no `scheduler_specific_kwargs`")
        if self.name == "constant" and self.num_warmup_steps:
            raise ValueError("`constant` has no warm-up; use `constant_with_warmup`")
        return self


class TrainingSection(Section):
    """Batch size, length, precision and time limits of the run."""

    tokens_per_step: PositiveInt
    """Tokens of one optimizer step over all processes, a multiple of `data.block_size`. For example 524288."""
    micro_batch_size: PositiveInt
    """Sequences per device in one forward pass. The number of gradient accumulation steps follows from this,
    `tokens_per_step` and the number of processes."""
    max_steps: PositiveInt | None = None
    """Optimizer steps of the run. Give either this or `max_tokens`."""
    max_tokens: PositiveInt | None = None
    """Training tokens of the run, which ends with the last whole step within them. Give either this or `max_steps`."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Gradients with a larger norm are scaled down to this norm. null: they are never scaled. The default, 1.0, is that
    of GPT-3."""
    mixed_precision: MixedPrecision = "auto"
    """Precision of the computation. `no`: float32. `tf32`: float32 with matrix products in TensorFloat-32. `bf16`,
    `fp16`: 16 bits; `fp16` also scales the loss. `fp8`: linear layers in 8 bits by torchao or TransformerEngine, the
    rest in bf16. `auto`: what the accelerate config file says. If it says nothing: bf16 where the hardware supports it
    (GPUs from Ampere on, CPUs with AMX or AVX512-BF16), otherwise float32."""
    document_masking: Literal["auto"] | bool = "auto"
    """Whether attention stops at the boundaries of documents within a block. A test at the start finds out whether the
    model supports this. Most models only need the positions of the tokens. Flash attention, and the kernels of gated
    delta rules, Mamba-2 and causal convolutions, are told where documents begin; without these kernels, such layers mix
    documents. `auto`, the default: mask if the model supports it. If it doesn't, and every block holds one document,
    train without masking. If it doesn't, and a block holds several documents or `data.streaming` is set, stop the run.
    `true`: stop the run if the model doesn't support it. `false`: never mask."""
    chunked_loss: Literal["auto"] | bool = "auto"
    """Compute the loss for one chunk of tokens after another, so that the logits of a whole batch are never in memory.
    `auto`: if a test at the start finds the same loss as the model's own. `true`: stop the run if it is not the same.
    `false`: never."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of a term that is added to the trained loss to keep logits from drifting: the squared logarithm of each
    softmax's denominator. 1e-4 in PaLM (Chowdhery et al. 2022, section 5). The reported loss does not include it. Needs
    the chunked loss, which tensor parallelism does not support."""
    router_bias_rate: float | None = Field(default=None, ge=0)
    """How much a step changes the bias of a router, for models whose routers have one that only the choice of experts
    depends on (DeepSeek-V3, GLM-4.5, ERNIE 4.5, ...). The bias goes up for experts that got fewer tokens than the mean
    of the step, over all processes, and down for the others (Wang et al. 2024, arXiv 2408.15664). null: 1e-3, as in
    DeepSeek-V3. 0: the bias stays as it is."""
    router_aux_loss_coef: float | None = Field(default=None, ge=0)
    """Weight of the loss that balances the experts of a model. null: that of the model's config
    (`router_aux_loss_coef`), unless its routers have a bias for this; a model whose config has none needs a value here.
    0: no such loss. The loss takes the counts of a whole step over all processes, as global-batch balancing does (Qiu
    et al. 2025, arXiv 2501.11873), from the step before, so it does not depend on the size of a micro-batch or the
    number of processes. The reported loss does not include it."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the decoder layers with `torch.compile`. All layers share one graph. `auto`: on GPUs with Triton under
    single, ddp and fsdp2, in a run of at least 2,000 micro-steps. On an H100, compiling GPT-2 124M took 2.4 s and made
    each micro-step 90 ms faster."""
    stop_after: str | None = Field(default=None, min_length=2, pattern=r"^(\d+h)?(\d+m)?(\d+s)?$")
    """Wall-clock time since the start of the process, for example `3h50m`, within which the run saves its state and
    ends with exit code 75. The same command then continues it. The run stops when the time that is left is twice that
    of its longest save. If it has not saved yet, it stops at 95% of the limit."""
    timeout_seconds: int = Field(default=1800, ge=4)
    """Timeout in seconds. If no process makes progress for this long, the run ends with an error that names the process
    the others wait for. The run also ends if a process shows no sign of life for 30 seconds, or for the timeout if that
    is shorter. The default, 1800, is torch's for gloo."""

    @model_validator(mode="after")
    def _check_one_length(self) -> TrainingSection:
        if (self.max_steps is None) == (self.max_tokens is None):
            raise ValueError("give exactly one of `max_steps` and `max_tokens`")
        if self.max_tokens is not None and self.max_tokens < self.tokens_per_step:
            raise ValueError(f"`max_tokens` ({self.max_tokens}) is less than one step of {self.tokens_per_step} tokens")
        if self.z_loss and self.chunked_loss is False:
            raise ValueError("`z_loss` is part of the chunked loss: set `chunked_loss` to auto or true")
        return self

    @property
    def stop_after_seconds(self) -> int | None:
        """`stop_after` in seconds."""
        if self.stop_after is None:
            return None
        units = {"h": 3600, "m": 60, "s": 1}
        return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([hms])", self.stop_after))

    @property
    def num_steps(self) -> int:
        """Optimizer updates of the whole run."""
        return self.max_steps or typing.cast(int, self.max_tokens) // self.tokens_per_step


class LmEvalSection(Section):
    """Downstream tasks of lm-eval (extra `lm-eval`) on the model in memory. The keywords are those of lm-eval."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of tasks, groups or tags, for example `[hellaswag, arc_easy]`."""
    every_steps: PositiveInt | None = None
    """Optimizer steps between runs of the tasks. null: only at the end."""
    include_path: str | None = None
    """Folder with your own task files. If it has all of `tasks`, no other task files are read. Task files can run code,
    so this needs `evaluation.trust_remote_code: true`."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples in the prompt. null: the number that each task sets, otherwise 0."""
    limit: PositiveInt | None = None
    """Number of documents of each task. null: all."""


class EvaluationSection(Section):
    """Loss, perplexity and bits per byte of the whole validation text at step 0, every `every_steps` and at the end.

    A run that begins with `model.pretrained` or `checkpoint.branch_from` also compares each evaluation with its first:
    the bits per byte that it gained or lost, with a 95% interval, for each `domain` of `data.validation_sources`. With
    old and new text as two domains, it measures what the model forgets."""

    every_steps: PositiveInt | None = None
    """Optimizer steps between evaluations. null: only at step 0 and at the end."""
    metrics: tuple[str, ...] = ()
    """Metrics of the `evaluate` library that take `predictions` and `references`: the most likely token at every
    position, and the token that the text has there. They need the logits, which takes a second forward pass, one row at
    a time. Give a name that `evaluate` hosts (`accuracy`, `f1`, ...) or, with `trust_remote_code`, a script, its folder
    or a Hub Space."""
    metric_revisions: dict[str, str] = Field(default_factory=dict)
    """Commit hash of each Hub Space in `metrics`. The keys are names from `metrics`. Required for every
    Space that `evaluate` does not host, so that the code you trust can't change. Default: none."""
    trust_remote_code: bool = False
    """Run the code of scripts and Hub Spaces in `metrics`, and of the task files in `lm_eval.include_path`. Default:
    false, which allows hfpretrain's own metrics, those that `evaluate` hosts, and lm-eval's own tasks."""
    prompts: tuple[str, ...] = ()
    """Texts that are continued at every evaluation, greedily and by sampling with a fixed seed, for example `["The
    river", ""]`. The continuations go to the log, the trackers and `samples.jsonl`. An empty text begins a document."""
    sample_tokens: PositiveInt = 64
    """Number of tokens in each continuation. Every token takes a forward pass over the whole text before it."""
    temperature: float = Field(default=0.8, gt=0)
    """Temperature of the sampled continuation."""
    top_k: PositiveInt = 50
    """The sampled continuation draws each token from this number of the most likely ones."""
    lm_eval: LmEvalSection | None = None
    """Downstream tasks of lm-eval. null: none."""


class CheckpointSection(Section):
    """Checkpoints: the full state of the run, from which the same command resumes."""

    every_steps: PositiveInt | None = None
    """Optimizer steps between checkpoints. null: only after the last step."""
    keep_last: PositiveInt = 2
    """Number of newest complete checkpoints that are kept."""
    keep_every: PositiveInt | None = None
    """Checkpoints at multiples of this step number are never deleted, for example every 10000. null: none."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest validation loss, among the steps that were evaluated."""
    async_save: bool = True
    """Write checkpoints in the background while training continues. Takes host memory for a copy of the state. A save
    that is due before the previous one is written waits for it. The last save of a run is not in the background."""
    resume_from: str | None = Field(default=None, min_length=1)
    """Checkpoint from which the same run continues in this `output_dir`, if that has no checkpoint yet:
    `runs/NAME@1000`, its folder `runs/NAME/checkpoints/step-00001000`, or `hub://USER/NAME@step-00001000`, which
    `hub.push_state` uploaded. Use the same recipe as the run that wrote the checkpoint. To change data, schedule or
    batch size, use `branch_from`."""
    branch_from: str | None = Field(default=None, min_length=1)
    """Checkpoint of another run, the trunk, from which this run branches off. It is written as in `resume_from`, for
    example `runs/trunk@1000`. Weights, optimizer state and the numbers of steps and tokens are the trunk's. Data,
    schedule, `optimizer.lr`, batch size, length, seed and evaluation may differ. `model`, `tokenizer` and
    `optimizer.name` must be those of the trunk; of `model`, only dropout, rotary positions, the context length and what
    may change on resume can differ. `training.max_steps` and `training.max_tokens` are the length of the branch alone.
    If the section `data` and `seed` are those of the trunk, the branch continues the trunk's order of the data.
    Otherwise it begins with the first sequence of its own order. A tokenizer that the trunk trained on its text is used
    as it is. `branch.json` in the run folder records where the branch began. See also `scheduler.on_branch`."""

    @field_validator("resume_from", "branch_from")
    @classmethod
    def _check_address(cls, given: str | None) -> str | None:
        parse_hub_address(given or "")
        return given

    @model_validator(mode="after")
    def _check_one_start(self) -> CheckpointSection:
        if self.resume_from is not None and self.branch_from is not None:
            raise ValueError(
                "give `resume_from` (continue the same run) or `branch_from` (begin another run), not both"
            )
        return self


class StabilitySection(Section):
    """What happens at a step whose loss or gradient is not finite, or whose loss jumps up. The step's update is never
    made."""

    policy: Literal["stop", "skip", "rollback"] = "stop"
    """`stop`: the run ends. `skip`: the step's blocks are left out. `rollback`: the run returns to the newest
    checkpoint and leaves out all blocks from there to the step, as for PaLM (Chowdhery et al. 2022, section 5.1)."""
    max_events: PositiveInt = 10
    """Number of skips or rollbacks after which the run stops."""
    spike_std: float | None = Field(default=None, gt=0)
    """A loss counts as a jump if it is more than this many standard deviations above the mean of the last
    `spike_window` steps, for example 6. null: don't look for jumps."""
    spike_window: int = Field(default=100, ge=2)
    """Number of previous optimizer steps that a loss is compared with. Until the run has that many, no loss counts as a
    jump."""


class LoggingSection(Section):
    """What is written during training, beside `metrics.jsonl`, which every run writes."""

    every_steps: PositiveInt = 10
    """Optimizer steps between log lines. The logged loss is the mean over all tokens since the previous line."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Names of accelerate's trackers: tensorboard, wandb, trackio, mlflow, ... Each needs its package."""
    project_name: str = "hfpretrain"
    """Name of the project in the trackers."""
    profile_steps: tuple[PositiveInt, PositiveInt] | None = None
    """First and last optimizer step of a profile, for example `[10, 12]`. It writes `profile/rank-N.json.gz` in
    Chrome's trace format, for Perfetto, and `profile/operators.txt`, the ten operators that took most time."""

    @model_validator(mode="after")
    def _check_order(self) -> LoggingSection:
        if self.profile_steps is not None and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError("`profile_steps` must be the first and the last step, in this order")
        return self


class HubSection(Section):
    """The Hub repo that a run is uploaded to while it trains, and metadata of its model card."""

    repo_id: str | None = None
    """USER/NAME of a model repo. Every checkpoint becomes the revision `step-00001000`, a branch and a tag, and the
    export becomes `main`. null: nothing is uploaded. A separate process uploads, so that training never waits for the
    network."""
    private: bool = False
    """Create the repo as a private one, if it does not exist yet."""
    push_state: bool = False
    """With each checkpoint, also upload the state that `checkpoint.resume_from` needs. An upload then has three times
    as many bytes or more."""
    max_wait_seconds: int = Field(default=60, ge=0)
    """How long a finished run waits, in seconds, while the Hub accepts no upload. Files that are not uploaded by then
    stay in `outbox`. Upload them with `hfpretrain push`. The run waits longer for uploads that proceed at 1 MiB a
    second or faster."""

    license: str | None = None
    """License of the weights as the Hub spells it, for example `apache-2.0`."""
    language: tuple[str, ...] = ()
    """Languages of the text as ISO 639-1 codes, for example `[en, de]`."""
    tags: tuple[str, ...] = ()
    """Further tags of the model card."""

    @model_validator(mode="after")
    def _check_repo_id(self) -> HubSection:
        if self.repo_id is not None and (problem := repo_id_problem(self.repo_id)) is not None:
            raise ValueError(f"`repo_id`: {problem}")
        return self


class Recipe(Section):
    """One whole run: what is trained, on which text, and how. The accelerate config file says on which processes."""

    output_dir: str
    """Folder of the run, for example `runs/quickstart`. The same command run again resumes from it."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the initial weights, the data order and dropout."""
    model: ModelSection
    tokenizer: TokenizerSection
    data: DataSection
    optimizer: OptimizerSection
    scheduler: SchedulerSection = SchedulerSection()
    training: TrainingSection
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    stability: StabilitySection = StabilitySection()
    logging: LoggingSection = LoggingSection()
    hub: HubSection = HubSection()

    @model_validator(mode="after")
    def _check_paths(self) -> Recipe:
        for path in (self.output_dir, self.data.prepared_dir or ""):
            if path.startswith("~"):
                raise ValueError(f"only the shell expands `~` (got {path!r}); write the whole path")
        return self

    @property
    def prepared_dir(self) -> Path:
        """Local folder of all prepared data: `data.prepared_dir`, or `prepared` beside `output_dir`."""
        given = self.data.prepared_dir
        return Path(given) if given and "://" not in given else Path(self.output_dir).parent / "prepared"


def cross_section_problems(recipe: Recipe) -> Iterator[Problem]:
    """Problems between sections, for one process. A run checks its number of processes when it starts."""
    training, scheduler, block_size = recipe.training, recipe.scheduler, recipe.data.block_size
    try:
        accumulation_steps(training.tokens_per_step, block_size, training.micro_batch_size, num_processes=1)
    except RecipeError as error:
        yield from error.problems
    decay_steps = scheduler.scheduler_specific_kwargs.get("num_decay_steps", 0)
    is_branch = recipe.checkpoint.branch_from is not None
    if is_branch and scheduler.on_branch == "continue":
        if isinstance(decay_steps, int) and decay_steps > training.num_steps:
            yield Problem(
                "scheduler.scheduler_specific_kwargs.num_decay_steps",
                f"{decay_steps} decay steps do not fit into a branch of {training.num_steps} steps; use fewer, or "
                "lengthen the branch",
            )
    elif scheduler.num_warmup_steps >= training.num_steps:
        yield Problem(
            "scheduler.num_warmup_steps",
            f"{scheduler.num_warmup_steps} warm-up steps do not fit into a run of {training.num_steps} steps; use "
            "fewer warm-up steps, or lengthen the run",
        )
    elif isinstance(decay_steps, int) and scheduler.num_warmup_steps + decay_steps > training.num_steps:
        yield Problem(
            "scheduler.scheduler_specific_kwargs.num_decay_steps",
            f"{scheduler.num_warmup_steps} warm-up and {decay_steps} decay steps do not fit into "
            f"{training.num_steps} steps; use fewer, or lengthen the run",
        )
    if recipe.optimizer.name == "adamw_schedule_free" and not scheduler.name.startswith("constant"):
        yield Problem(
            "scheduler.name",
            f"{scheduler.name} lowers the learning rate, but adamw_schedule_free averages the weights instead; "
            "use `constant` or `constant_with_warmup`",
        )
    if recipe.model.pretrained is not None and recipe.tokenizer.pretrained is None:
        yield Problem("tokenizer.pretrained", "is missing; a pretrained model needs the tokenizer it was trained with")
    for _, weights in recipe.data.weights:
        for number, weight in enumerate(weights):
            if 0 < weight < 1e-4 * sum(weights):
                message = f"{weight} is less than 1/10,000 of all weights, too little to be drawn; raise it, or use 0"
                yield Problem(f"data.sources.{number}.weight", message)
    for number, stage in enumerate(recipe.data.stages):
        # A stage that sets a block size begins with a whole step. A branch that continues the trunk's order of the data
        # counts the trunk's tokens, too.
        unit = 1 if stage.block_size is None else training.tokens_per_step
        is_late = -(-stage.from_tokens // unit) * unit >= training.num_steps * training.tokens_per_step
        if is_late and (recipe.data.changes_length or not is_branch):
            yield Problem(
                f"data.stages.{number}.from_tokens",
                f"{stage.from_tokens} tokens are only reached after the end of the run; lower it",
            )
    if recipe.data.streaming and recipe.tokenizer.pretrained is None:
        yield Problem(
            "tokenizer.pretrained",
            "is missing; `data.streaming` needs an existing tokenizer, since training one reads all text",
        )
    extend = recipe.tokenizer.extend
    for number, group in enumerate(recipe.optimizer.groups):
        if group.rows_from == "new" and (extend is None or recipe.model.pretrained is None):
            message = "needs `tokenizer.extend` and `model.pretrained`; set them, or give the first token id"
            yield Problem(f"optimizer.groups.{number}.rows_from", f"`new` {message}")
    if recipe.data.streaming and extend is not None and extend.learn:
        message = "reads all text first, which `data.streaming` does not; prepare the data, or give `extend.tokens`"
        yield Problem("tokenizer.extend.learn", message)
    for name in ("sources", "validation_sources"):
        for number, source in enumerate(getattr(recipe.data, name)):
            if source.holds_tokens and recipe.tokenizer.pretrained is None:
                what = f"is missing; data.{name}.{number} has tokens: name the tokenizer that made them"
                yield Problem("tokenizer.pretrained", what)
            elif source.holds_tokens and extend is not None:
                message = f"data.{name}.{number} has tokens that were made without the new ones; use its text instead"
                yield Problem("tokenizer.extend", message)
    yield from _length_problems(recipe)
    evaluation = recipe.evaluation
    for key in ("every_steps", "metrics"):
        # Prompts need no validation text.
        if getattr(evaluation, key) and not recipe.data.has_validation and (key == "metrics" or not evaluation.prompts):
            yield Problem(
                f"evaluation.{key}",
                "there is nothing to evaluate on; set `data.validation_fraction` or `data.validation_sources`",
            )


@dataclass(frozen=True)
class LengthStage:
    """Steps of a run with one block size and one rotary position embedding: its beginning, or an entry of
    `data.stages` that sets `block_size`."""

    key: str
    """Path of the entry in the recipe; empty for the beginning of the run."""
    first_step: int
    """Number of the first data step, counted from 0; see `data.order.data_step`."""
    block_size: int
    micro_batch_size: int
    """Sequences per device. 0 if a micro-batch has fewer tokens than a sequence, or not a whole number of them."""
    rope_parameters: dict[str, Any] | None = None
    """Keys of the model's `rope_parameters` that change where the stage begins."""

    def accumulation_steps(self, tokens_per_step: int, num_processes: int) -> int:
        """See the function of this name."""
        if not self.micro_batch_size:
            message = (
                "is missing: training.micro_batch_size x data.block_size tokens are not a whole number of sequences"
            )
            raise RecipeError.at(
                f"{self.key}.micro_batch_size", f"{message} of {self.block_size} tokens; set it, for example to 1"
            )
        return accumulation_steps(tokens_per_step, self.block_size, self.micro_batch_size, num_processes, self.key)


def length_stages(data: DataSection, training: TrainingSection) -> list[LengthStage]:
    """The beginning of the run, and its stages that set a block size, in their order."""
    found = [LengthStage("", 0, data.block_size, training.micro_batch_size)]
    for number, stage in enumerate(data.stages):
        if stage.block_size is not None:
            size, uneven = divmod(training.micro_batch_size * data.block_size, stage.block_size)
            first_step = -(-stage.from_tokens // training.tokens_per_step)
            micro_batch_size = stage.micro_batch_size or (0 if uneven else size)
            key = f"data.stages.{number}"
            found.append(LengthStage(key, first_step, stage.block_size, micro_batch_size, stage.rope_parameters))
    return found


def longest_stage(data: DataSection, training: TrainingSection) -> LengthStage:
    """The first of the stages with the largest block size."""
    return max(length_stages(data, training), key=lambda stage: stage.block_size)


def _length_problems(recipe: Recipe) -> Iterator[Problem]:
    """Problems of the stages that set a block size."""
    training = recipe.training
    stages = length_stages(recipe.data, training)
    for before, stage in itertools.pairwise(stages):
        if training.tokens_per_step % stage.block_size:
            possible = _divisors(training.tokens_per_step)
            shorter, longer = ([n for n in possible if (n > stage.block_size) == is_longer] for is_longer in (0, 1))
            nearest = _join_numbers([*shorter[-2:], *longer[:2]])
            yield Problem(
                f"{stage.key}.block_size",
                f"training.tokens_per_step {training.tokens_per_step} is not a multiple of it (got "
                f"{stage.block_size}); nearest possible: {nearest}; or change tokens_per_step",
            )
        else:
            try:
                stage.accumulation_steps(training.tokens_per_step, num_processes=1)
            except RecipeError as error:
                yield from error.problems
        if stage.first_step == before.first_step:
            yield Problem(
                f"{stage.key}.from_tokens",
                f"the stage begins in the same step, {stage.first_step + 1}, as the one before it; raise it by "
                f"training.tokens_per_step, {training.tokens_per_step}, or more",
            )


def accumulation_steps(
    tokens_per_step: int, block_size: int, micro_batch_size: int, num_processes: int, stage: str = ""
) -> int:
    """Micro-steps per optimizer step on each process.

    `stage`: path of the entry of `data.stages` that sets `block_size`, if one does. Raises `RecipeError` with possible
    values if a step's tokens can't be divided evenly.
    """
    sequences, remainder = divmod(tokens_per_step, block_size)
    if remainder:
        near = sorted({max(1, sequences) * block_size, (sequences + 1) * block_size})
        raise RecipeError.at(
            "training.tokens_per_step",
            f"{tokens_per_step} is not a multiple of {stage or 'data'}.block_size {block_size}; nearest: "
            + ", ".join(map(str, near)),
        )
    steps, remainder = divmod(sequences, micro_batch_size * num_processes)
    if remainder or not steps:
        per_process, uneven = divmod(sequences, num_processes)
        if uneven or not per_process:
            fix = "possible numbers of processes: " + _join_numbers(_divisors(sequences))
        else:
            fix = "possible micro_batch_size: " + _join_numbers(_divisors(per_process))
        raise RecipeError.at(
            f"{stage or 'training'}.micro_batch_size",
            f"a step has {sequences} sequences (tokens_per_step {tokens_per_step} / block_size {block_size}), not a "
            f"multiple of micro_batch_size {micro_batch_size} x {num_processes} process(es); {fix}",
        )
    return steps


def _divisors(number: int) -> list[int]:
    small = [candidate for candidate in range(1, math.isqrt(number) + 1) if number % candidate == 0]
    return sorted({*small, *(number // candidate for candidate in small)})


def _join_numbers(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers if len(numbers) <= 16 else [*numbers[:15], "...", numbers[-1]]))
