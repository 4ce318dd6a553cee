"""Load a fast tokenizer or train one, and find what it adds before and after a text."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpretrain.data import threads
from hfpretrain.recipe.addresses import load_error_message, missing_path_problem
from hfpretrain.recipe.schema import END_OF_TEXT, PADDING, UNKNOWN, Problem, RecipeError, TokenizerSection

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# Characters of scripts that put no space between words. `ー`, which lengthens a vowel in Japanese, is in no script.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_EXPRESSIONS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "unspaced": rf"[{_UNSPACED}]+|{_ENDINGS}|[^\r\n\p{{L}}\p{{M}}\p{{N}}]?[\p{{L}}\p{{M}}&&[^{_UNSPACED}]]+"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# More letters, digits or other characters in a row than any word has.
_LONG_WORD = re.compile(r"[^\W\d_]{256}|\d{256}|[^\s\w]{256}")
SENTENCEPIECE = "tokenizer.model"
logger = logging.getLogger(__name__)

_trainings: set[threading.Thread] = set()
"""The threads in which `tokenizers` trains now. They go on if the training is interrupted."""


def load_tokenizer(section: TokenizerSection) -> PreTrainedTokenizerFast:
    """Load the tokenizer `section.pretrained`. Raises `RecipeError` if it is not a fast one or has no EOS token."""
    from transformers import AutoTokenizer

    if problem := missing_path_problem(section.pretrained or ""):
        raise RecipeError.at("tokenizer.pretrained", problem)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            section.pretrained, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    except Exception as error:  # a broken file may raise anything
        raise RecipeError.at("tokenizer.pretrained", load_error_message(section.pretrained or "", error)) from error
    if not tokenizer.is_fast:
        raise RecipeError.at("tokenizer.pretrained", f"{section.pretrained!r} has no fast version; convert it first")
    if tokenizer.eos_token_id is None:
        raise RecipeError.at("tokenizer.pretrained", f"{section.pretrained!r} has no EOS token to separate documents")
    if section.add_bos is not None:
        set_add_bos(tokenizer, section.add_bos)
    return tokenizer


def find_sentencepiece(section: TokenizerSection, tokenizer: PreTrainedTokenizerFast) -> Path | None:
    """The SentencePiece file of `section.pretrained`, which transformers 5 does not save with a tokenizer.

    llama.cpp's converter needs it for Gemma and others. `tokenizer`: that of the run. None if there is no such file, or
    if `tokenizer` has other tokens than the file.
    """
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoTokenizer

    if section.pretrained is None:
        return None
    path: Any = Path(section.pretrained) / SENTENCEPIECE
    if not Path(section.pretrained).is_dir():  # loading the tokenizer has downloaded the file
        path = try_to_load_from_cache(section.pretrained, SENTENCEPIECE, revision=section.revision)
    if not isinstance(path, (str, Path)) or not Path(path).is_file():
        return None
    own = AutoTokenizer.from_pretrained(
        section.pretrained, revision=section.revision, trust_remote_code=section.trust_remote_code
    )
    is_same = len(own) == own.vocab_size and own.get_vocab() == tokenizer.get_vocab()
    return Path(path) if is_same else None


def document_prefix(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """The ids with which every document begins: what calling the tokenizer adds before a text, such as Llama's BOS.

    Empty if it adds nothing, or EOS, which is between documents in any case.
    """
    prefix, _ = _added_ids(tokenizer)
    return () if tokenizer.eos_token_id in prefix else prefix


def document_start(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids before a document's text in training: `document_prefix`, or the EOS of the previous document."""
    return list(document_prefix(tokenizer)) or [tokenizer.eos_token_id]


def set_add_bos(tokenizer: PreTrainedTokenizerFast, add_bos: bool, add_eos: bool | None = None) -> None:
    """Set whether calling the tokenizer adds BOS before a text, and EOS after it (None: as now).

    Raises `RecipeError` if the tokenizer has no BOS to add.
    """
    prefix, suffix = _added_ids(tokenizer)
    has_eos = tokenizer.eos_token_id in suffix
    wanted = has_eos if add_eos is None else add_eos
    is_eos = tokenizer.bos_token_id == tokenizer.eos_token_id  # then it is before every document in any case
    if (add_bos == bool(prefix) or is_eos) and wanted == has_eos:
        return
    if add_bos and tokenizer.bos_token_id is None:
        message = f"{tokenizer.name_or_path!r} has no BOS token; leave the key out"
        raise RecipeError.at("tokenizer.add_bos", message)
    # Also set them in `init_kwargs`, which is saved and read when the tokenizer is loaded.
    for name, value in (("add_eos_token", wanted), ("add_bos_token", bool(prefix) if is_eos else add_bos)):
        tokenizer.init_kwargs[name] = value
        setattr(tokenizer, name, value)


def _added_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that calling the tokenizer adds before a text, and after it."""
    backend = tokenizer.backend_tokenizer
    special = set(tokenizer.all_special_tokens)

    def texts() -> Iterator[str]:
        yield "a"  # which a vocabulary of fixed words may not have
        yield from (token for token in tokenizer.get_vocab() if token not in special)

    for text in texts():
        try:
            ids, whole = (backend.encode(text, add_special_tokens=wanted).ids for wanted in (False, True))
        except Exception:  # `tokenizers` raises nothing narrower for a word that is not in the vocabulary
            continue
        starts = [n for n in range(len(whole) - len(ids) + 1) if ids and whole[n : n + len(ids)] == ids]
        if starts:
            return tuple(whole[: starts[0]]), tuple(whole[starts[0] + len(ids) :])
    return (), ()


def describe_framing(tokenizer: PreTrainedTokenizerFast) -> str:
    """One line about the tokens with which a document begins and ends."""
    prefix = document_prefix(tokenizer)
    begin = f"begin with {tokenizer.decode(list(prefix))}, which calling the tokenizer adds to a text, and "
    return f"documents {begin if prefix else ''}end with {tokenizer.eos_token}"


def train_tokenizer(section: TokenizerSection, documents: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a tokenizer with one special token for both BOS and EOS, one for padding, and those of the section.

    The same documents give the same vocabulary, in any order.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = section.trained_special_tokens
    unknown = UNKNOWN if UNKNOWN in special else None
    if section.algorithm == "character":
        backend = _character_tokenizer(documents, special, section.byte_fallback)
    else:
        is_byte_level = section.algorithm == "byte_level_bpe"
        bytes_apart = 256 if section.byte_fallback else 0  # tokens that are added after the training
        vocab_size = (section.vocab_size or 0) - bytes_apart  # never 0: the section requires it
        backend = Tokenizer(models.BPE(unk_token=unknown, byte_fallback=section.byte_fallback))
        backend.pre_tokenizer = _pre_tokenizer(section.pattern, is_byte_level)
        keywords: dict[str, Any] = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
        if is_byte_level:
            backend.decoder = decoders.ByteLevel()
            backend.post_processor = processors.ByteLevel(trim_offsets=False)
        else:
            room = vocab_size - len(special)
            keywords = {"limit_alphabet": room if section.limit_alphabet is None else min(section.limit_alphabet, room)}
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=section.min_frequency,
            special_tokens=special,
            show_progress=False,
            **keywords,
        )
        train_in_thread(backend, (part for text in documents for part in split_long_words(text)), trainer)
        if not is_byte_level:
            backend = _finish_character_bpe(backend, len(special), section.byte_fallback)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        unk_token=unknown,
        clean_up_tokenization_spaces=False,
    )


def _pre_tokenizer(pattern: str, is_byte_level: bool) -> Any:
    """The pre-tokenizer that splits text into pieces, as `TokenizerSection.pattern` says."""
    from tokenizers import Regex, pre_tokenizers

    name = "gpt2" if pattern == "digits" else pattern
    if is_byte_level and name == "gpt2":  # the library's own, so that the tokenizer's file is as short as GPT-2's
        steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        steps = [pre_tokenizers.Split(Regex(_EXPRESSIONS.get(name, name)), behavior="isolated")]
        if is_byte_level:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    if pattern == "digits":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


def _character_tokenizer(documents: Iterable[str], special: list[str], byte_fallback: bool) -> Tokenizer:
    """A tokenizer with a token for each character of the documents, and with `byte_fallback` one for each byte."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = sorted({character for text in documents for character in set(text)})
    tokens = [*special, *(_byte_tokens() if byte_fallback else ()), *characters]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if byte_fallback:
        backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    else:
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
        backend.decoder = decoders.Fuse()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    return backend


def _finish_character_bpe(trained: Tokenizer, num_special: int, byte_fallback: bool) -> Tokenizer:
    """Give a BPE tokenizer over characters its decoder, and with `byte_fallback` 256 tokens for bytes.

    The tokens for bytes get the ids after the special tokens. They are added after the training, because `tokenizers`
    can't train with tokens that are neither special nor found in the text. Raises `RecipeError` if the training itself
    made a token with such a name.
    """
    from tokenizers import Tokenizer, decoders

    if not byte_fallback:
        trained.decoder = decoders.Fuse()
        return trained
    content = json.loads(trained.to_str())
    vocabulary = content["model"]["vocab"]
    if found := sorted(vocabulary.keys() & set(_byte_tokens())):
        message = f"{found[0]!r} became a token, because the text often has it; such a token would be read as a byte"
        raise RecipeError.at(
            "tokenizer.byte_fallback", f"{message}; choose a pattern that separates letters and digits"
        )
    moved = {token: number if number < num_special else number + 256 for token, number in vocabulary.items()}
    content["model"]["vocab"] = moved | {token: num_special + n for n, token in enumerate(_byte_tokens())}
    backend = Tokenizer.from_str(json.dumps(content))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _byte_tokens() -> list[str]:
    return [f"<0x{value:02X}>" for value in range(256)]


def train_in_thread(backend: Tokenizer, texts: Iterable[str], trainer: Any) -> None:
    """Train in a thread, because `tokenizers` blocks signals. The main thread can be interrupted, and logs progress."""
    num_chars = 0
    stopped = threading.Event()

    def counted() -> Iterator[str]:
        nonlocal num_chars
        for text in texts:
            if stopped.is_set():
                return
            num_chars += len(text)
            yield text

    failed: list[BaseException] = []

    def work() -> None:
        _trainings.add(threading.current_thread())
        try:
            with panics_as_errors():
                backend.train_from_iterator(_in_batches(counted()), trainer)
        except BaseException as error:  # raised again in the main thread
            failed.append(error)
        finally:
            _trainings.discard(threading.current_thread())

    start = logged = time.monotonic()
    try:
        # A daemon thread, so that an interrupted training does not keep the process alive.
        worker = threads.start_daemon(work, "tokenizer")
        while worker.is_alive():
            worker.join(0.2)
            if time.monotonic() - logged > 30:
                logged = time.monotonic()
                logger.info("training the tokenizer: %s characters read, %.0f s", f"{num_chars:,}", logged - start)
    except BaseException:
        stopped.set()  # the thread ends at the next text; it can't be stopped while it merges
        raise
    if failed and isinstance(failed[0], TokenizerPanicError):
        raise RecipeError.at("tokenizer", f"can't be trained on this text: {failed[0]}") from failed[0]
    if failed:
        raise failed[0]


@contextlib.contextmanager
def no_threads_in_tokenizers() -> Iterator[None]:
    """Let `tokenizers` start no threads of its own in each call.

    Use it around threads that call `tokenizers`: it releases the GIL, so they run in parallel. With its own threads,
    each call would wait for the longest document of its batch.

    The only switch is an environment variable.
    """
    wait_for_interrupted_trainings()
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def wait_for_interrupted_trainings() -> None:
    """Wait until the threads of interrupted trainings have ended, which may take minutes if they merge.

    Call it before the environment changes. While `tokenizers` trains, it reads a variable at every merge, and the
    process crashes if the environment changes at that moment.
    """
    for thread in list(_trainings):
        logger.info("waiting for the end of an interrupted training of a tokenizer")
        thread.join()


def split_long_words(text: str) -> Iterator[str]:
    """Cut a text so that no run of letters, digits or other characters is longer than 256 characters.

    The trainer reads text without spaces as one word. The time of a merge grows with the length of the words that
    contain it, and is hours for megabytes. Only the trainer's input is cut; encoding has no such limit.
    """
    start = 0
    for match in _LONG_WORD.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def set_chat_template(tokenizer: PreTrainedTokenizerFast, section: TokenizerSection) -> None:
    """Give a tokenizer the section's chat template, if it has one."""
    if section.chat_template is not None:
        tokenizer.chat_template = _template_text(section.chat_template)


def chat_template_problems(mapping: dict[str, Any]) -> Iterator[Problem]:
    """Problems of `tokenizer.chat_template` in a recipe's mapping.

    Its file can't be read, or it does not render a question and an answer as text that contains both.
    """
    section = mapping.get("tokenizer")
    given = section.get("chat_template") if isinstance(section, dict) else None
    if not isinstance(given, str):
        return
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "")
    try:
        (text,), _ = render_jinja_template([messages], chat_template=_template_text(given), **special)
    except OSError as error:
        yield Problem(
            "tokenizer.chat_template",
            f"{given!r} contains no {{, so it must be a file, which can't be read: {error.strerror}",
        )
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        line = f" in line {error.lineno}" if hasattr(error, "lineno") else ""
        yield Problem("tokenizer.chat_template", f"can't render a question and its answer: {error}{line}")
    else:
        if not all(message["content"] in text for message in messages):
            yield Problem(
                "tokenizer.chat_template", f"leaves out a message: a question and its answer are rendered as {text!r}"
            )


def _template_text(given: str) -> str:
    return given if "{" in given else Path(given).read_text(encoding="utf-8")


def pattern_problems(mapping: dict[str, Any]) -> Iterator[Problem]:
    """The problem of `tokenizer.pattern` in a recipe's mapping, if it is not a valid regular expression."""
    from tokenizers import Regex

    section = mapping.get("tokenizer")
    given = section.get("pattern") if isinstance(section, dict) else None
    if isinstance(given, str):
        try:
            Regex(given)
        except Exception as error:  # `tokenizers` raises nothing narrower
            yield Problem("tokenizer.pattern", f"{given!r} is not a regular expression: {error}")


class TokenizerPanicError(Exception):
    """The library `tokenizers` panicked."""


@contextlib.contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise a panic of the library `tokenizers`, which is no `Exception`, as `TokenizerPanicError`.

    A regular expression that takes too many steps on a text causes one.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        hint = "; a simpler tokenizer.pattern takes fewer steps" if "retry-limit" in str(error) else ""
        raise TokenizerPanicError(f"{error}{hint}") from error


def _in_batches(documents: Iterable[str], size: int = 1000) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in documents:
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def tokenizer_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """The largest token id + 1; more than `len(tokenizer)` where ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def padded_vocab_size(section: TokenizerSection, size: int) -> int:
    """The model's vocabulary for a tokenizer of `size` ids: rounded up to `pad_to_multiple_of`."""
    return -(-size // section.pad_to_multiple_of) * section.pad_to_multiple_of
