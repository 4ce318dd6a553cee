"""Describe prepared data: counts of each split and source, and what the tokenizer did to the text."""

from __future__ import annotations

from typing import Any

from hfpretrain.data.prepared import VALIDATION, PreparedData
from hfpretrain.recipe.schema import RecipeError


def summary(prepared: PreparedData) -> str:
    """Lines about each split, the documents dropped from each source, the tokenizer, and duplicates."""
    manifest = prepared.manifest
    lines = [f"prepared data    {prepared.path}"]
    for name, entry in manifest["splits"].items():
        block_size = prepared.block_size(name)
        share = entry["padding"] / max(1, entry["rows"] * block_size)
        padding = f" - {entry['padding']:,} padding ({share:.2%})" if entry["padding"] else ""
        bos = f" + {entry['bos']:,} BOS" if entry.get("bos") else ""
        lines.append(
            f"  {name:<14} {entry['documents']:,} documents, {entry['bytes']:,} bytes -> {entry['tokens']:,} tokens + "
            f"{entry['separators']:,} separators{bos} = {entry['rows']:,} blocks x {block_size}{padding} + "
            f"{entry['remainder']} remainder"
        )
    for number, source in enumerate(manifest["sources"]):
        if source["dropped"]:
            dropped = ", ".join(f"{count:,} {reason}" for reason, count in source["dropped"].items())
            lines.append(f"  dropped        source {number}: {dropped}")
        if counts := source.get("from_tokens"):
            around = ", ".join(f"{count:,} {token}" for token, count in counts["framing"].items()) or "none"
            kept, dropped = counts["tokens_kept"], counts["tokens_dropped"]
            lines.append(
                f"  from tokens    source {number}: {counts['tokens_read']:,} ids read = {kept:,} kept + {dropped:,} "
                f"dropped + {around} around documents"
            )
        if special := source.get("special_tokens"):
            listed = ", ".join(f"{count:,} {token}" for token, count in special.items())
            lines.append(f"  special tokens source {number}: its text contains {listed}")
    lines += [f"  limit          {text}" for text in limit_notes(prepared)]
    lines += [f"  files          {text}" for text in reading_notes(prepared)]
    lines += [f"  tokenizer      {text}" for text in preparation_notes(prepared)]
    found = manifest["hygiene"]
    if found["train_duplicates"]:
        lines.append(f"  duplicates     {found['train_duplicates']:,} training documents repeat the text of another")
    ngrams = found.get("validation_ngrams")
    if ngrams and ngrams["looked_for"]:
        lines.append(
            f"  overlap        {ngrams['share_in_train']:.2%} of the validation's {ngrams['n']}-token sequences occur "
            "in train"
        )
    return "\n".join(lines)


def limit_notes(prepared: PreparedData) -> list[str]:
    """A sentence about each source of which `max_documents` or `max_bytes` left something out."""
    found = []
    for number, source in enumerate(prepared.manifest["sources"]):
        if source.get("stopped_at_limit"):
            is_training = number < len(prepared.manifest["source_identities"])
            name = f"source {number}" if is_training else "validation"
            counts = f"{source['documents_read']:,} documents ({source['bytes_read']:,} bytes)"
            found.append(f"{name}: only its first {counts} were read, up to max_documents or max_bytes")
    return found


def reading_notes(prepared: PreparedData) -> list[str]:
    """Sentences about files that were left out, and about documents that continue in the next file."""
    notes: list[str] = prepared.manifest.get("reading_notes", [])
    return notes


def preparation_notes(prepared: PreparedData) -> list[str]:
    """Sentences for the user: a small vocabulary, the tokenizer's sample, and text that the tokenizer changed."""
    found = []
    requested, size = prepared.manifest.get("vocab_size_asked"), prepared.manifest["tokenizer_size"]
    if requested is not None and size < requested:
        found.append(f"the trained tokenizer has {size:,} tokens, not the {requested:,} of tokenizer.vocab_size")
    if extension := prepared.manifest.get("tokenizer_extension"):
        found.append(extension)
    if sample := prepared.manifest.get("tokenizer_sample"):
        drawn, whole = (
            f"{sample[f'{of}documents']:,} documents ({sample[f'{of}bytes']:,} bytes)" for of in ("", "of_")
        )
        how = "trained" if extension is None else "the new tokens were learned"
        found.append(f"{how} on a sample of {drawn}, of {whole}, drawn by a hash of each document")
    data = prepared.manifest["recipe"]
    number_of_sources = len(prepared.manifest["source_identities"])
    for number, source in enumerate(prepared.manifest["sources"]):
        name = f"source {number}" if number < number_of_sources else "validation"
        chosen = data["sources"][number].get("special_tokens", "text") if number < number_of_sources else "text"
        special = source.get("special_tokens", {})
        as_text = {t: n for t, n in special.items() if chosen == "text" or (chosen != "tokens" and t not in chosen)}
        if as_text and name != "validation" and "from_tokens" not in source:
            listed = ", ".join(f"{token} ({count:,} times)" for token, count in list(as_text.items())[:8])
            found.append(f"{name}: special tokens in the text are read as ordinary text: {listed}")
        found += [f"{name}: {what}" for share, what in _lost_shares(source) if share]
        if replaced := source.get("replaced_share"):
            found.append(f"{name}: the tokenizer's normalizer replaces {replaced:.2%} of the characters")
    return found


def check_unknown_share(prepared: PreparedData, max_unknown: float) -> None:
    """Raises `RecipeError` if the tokenizer does not know, or leaves out, a share of a source above `max_unknown`."""
    for number, source in enumerate(prepared.manifest["sources"]):
        for share, what in _lost_shares(source):
            if share > max_unknown:
                key = "data.sources" if number < len(prepared.manifest["source_identities"]) else "data"
                where = f"{key}.{number}" if key == "data.sources" else "data.validation_sources"
                advice = f"use a tokenizer for this text, or raise tokenizer.max_unknown (now {max_unknown:g})"
                raise RecipeError.at(where, f"{what}; {advice}")


def _lost_shares(source: dict[str, Any]) -> list[tuple[float, str]]:
    """Pairs (share, sentence): how much of a source the tokenizer does not know, and how much it leaves out."""
    tokens = sum(source[kind]["tokens"] for kind in ("train", VALIDATION))
    unknown, lost = source.get("unknown", 0) / max(1, tokens), source.get("lost_share", 0.0)
    return [
        (unknown, f"{unknown:.2%} of its tokens are the unknown token"),
        (lost, f"the tokenizer leaves out {lost:.2%} of its characters"),
    ]
