"""Curate a corpus with datatrove: by language, quality, benchmark text, near duplicates and personal data.

    pip install datatrove orjson regex spacy tokenizers    # or: pip install "hfpretrain[curate]"
    python examples/curate.py RAW OUT [--benchmarks FOLDER] [--keep-language en] [--workers 8]

RAW and FOLDER hold JSON lines (`*.jsonl`, `*.jsonl.gz`, ...) with the key `text`; RAW may be a URL such as
s3://bucket/raw. A recipe reads the result with `path: json`, `data_files: OUT/*.jsonl.gz`. OUT/removed has each removed
document with the reason, and OUT/logs has a log of each step. If the command is stopped, run it again: it continues.

The rules of --quality are those of FineWeb. They were made for English web pages, so look at OUT/removed before you use
them for other text. The rule c4 also removes single lines, and the indentation of the lines it keeps. --keep-language
needs `pip install aiohttp fasteners fasttext-numpy2-wheel`, and downloads fastText's lid.176 (130 MB) the first time.
E-mail addresses and public IP addresses are replaced; other personal data, such as names and telephone numbers, stay.
datatrove skips lines that are not JSON, with a warning in OUT/logs. On a Slurm cluster, give the same pipelines to
datatrove's `SlurmPipelineExecutor`.
"""

import argparse
import json
import sys
from pathlib import Path

try:
    import numpy as np
    import spacy  # noqa: F401  datatrove splits text into words with it
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.io import get_datafolder
    from datatrove.pipeline import dedup
    from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
        LanguageFilter,
    )
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig, create_hash_func
    from datatrove.utils.text import ngrams, simplify_text
    from datatrove.utils.word_tokenizers import load_word_tokenizer
except ImportError as error:
    sys.exit(f"{error}. This example needs: pip install datatrove orjson regex spacy tokenizers")

PATTERN = "**/*.jsonl*"
QUALITY = {
    "gopher-repetition": GopherRepetitionFilter,
    "gopher": GopherQualityFilter,
    "c4": lambda exclusion_writer: C4QualityFilter(exclusion_writer, filter_no_terminal_punct=False),
    "fineweb": FineWebQualityFilter,
}
HASH = HashConfig(hash_fc="sha1")  # the default, xxhash, fails with xxhash 4 in datatrove 0.10
CONTAMINATION = NGramsDecontConfig(n_grams=12, hash_config=HASH)
# Finds 92 of 100 pairs that share 80 % of their 5-word sequences, and 56 of those that share 70 %.
MINHASH = dedup.MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8, hash_config=HASH)


def index_benchmarks(benchmarks: str, index: Path) -> None:
    """Write the hashes of the 12-word sequences in each benchmark file, which `NGramsDecontFilter` reads.

    datatrove's own `NGramsDecontIndexer` takes names of lighteval tasks, not files, and needs `datatrove[decont]`.
    """
    split, hashed = load_word_tokenizer("eng").word_tokenize, create_hash_func(HASH)
    index.mkdir(parents=True, exist_ok=True)
    for name in get_datafolder(benchmarks).list_files(glob_pattern=PATTERN):
        texts = [document.text for document in JsonlReader(benchmarks, glob_pattern=name).run()]
        sequences = [list(ngrams(split(simplify_text(text)), CONTAMINATION.n_grams)) for text in texts]
        hashes = {hashed(" ".join(words)) for found in sequences for words in found}
        task = name.split(".jsonl")[0].replace("/", "-")
        np.array(sorted(hashes), HASH.np_descr).tofile(index / f"{task}.index.hashes")
        print(f"benchmark {task}: {len(texts)} texts, {sequences.count([])} of them too short to be looked for")


def print_counts(logs: Path) -> None:
    """Print how many documents each step kept, and why it removed the others."""
    for step in json.loads((logs / "stats.json").read_text()):
        counts, name = step["stats"], step["name"].split(": ")[-1].split(" ", 1)[-1]
        if "FILTER" in step["name"] or "DECONT" in step["name"] or "DEDUP" in step["name"]:
            reasons = [f"{key.removeprefix('dropped_')} {n}" for key, n in counts.items() if key.startswith("dropped_")]
            print(
                f"{name}: kept {counts.get('forwarded', 0):,} of {counts.get('total', 0):,} documents",
                *reasons,
                sep=", ",
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw")
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--benchmarks", metavar="FOLDER", help="remove documents that have 12 words in a row in common with these texts"
    )
    parser.add_argument("--keep-language", metavar="CODE", help="of two letters, such as en")
    parser.add_argument("--quality", nargs="*", choices=QUALITY, default=list(QUALITY))
    parser.add_argument("--workers", type=int, default=1, help="processes; the result is the same with any number")
    arguments = parser.parse_args()
    out = arguments.out

    # Each task reads one file. A finished task is only valid for the same file and the same rules.
    files = get_datafolder(arguments.raw).list_files(glob_pattern=PATTERN)
    if not files:
        parser.error(f"{arguments.raw} has no {PATTERN}")
    settings = {**vars(arguments), "out": str(out), "workers": None, "files": files}
    made_with = out / "settings.json"
    if made_with.exists() and json.loads(made_with.read_text()) != settings:
        parser.error(f"{out} was made with other arguments or files (see {made_with}): name another folder")
    out.mkdir(parents=True, exist_ok=True)
    made_with.write_text(json.dumps(settings, indent=1))

    def removed(rule: str) -> JsonlWriter:
        return JsonlWriter(str(out / "removed" / rule))

    def run(name: str, pipeline: list, tasks: int = len(files)) -> None:
        LocalPipelineExecutor(pipeline, tasks, min(tasks, arguments.workers), str(out / "logs" / name)).run()

    filters = [QUALITY[rule](exclusion_writer=removed(rule)) for rule in arguments.quality]
    if arguments.keep_language:
        try:
            filters.insert(0, LanguageFilter(arguments.keep_language, exclusion_writer=removed("language")))
        except ImportError as error:
            parser.error(f"--keep-language: {error}")
    if arguments.benchmarks:
        # Before deduplication, which could keep the contaminated document of two near duplicates.
        index_benchmarks(arguments.benchmarks, out / "benchmarks")
        filters.append(NGramsDecontFilter(str(out / "benchmarks"), CONTAMINATION, removed("benchmarks")))
    filtered = str(out / "filtered")
    run("filter", [JsonlReader(arguments.raw, glob_pattern=PATTERN), *filters, JsonlWriter(filtered)])
    print_counts(out / "logs" / "filter")
    if not list(Path(filtered).rglob("*")):
        sys.exit(f"No document is left. See {out / 'removed'}")

    signatures, pairs, clusters = (str(out / "minhash" / name) for name in ("signatures", "pairs", "clusters"))
    run("minhash-signatures", [JsonlReader(filtered), dedup.MinhashDedupSignature(signatures, MINHASH)])
    run("minhash-pairs", [dedup.MinhashDedupBuckets(signatures, pairs, config=MINHASH)], MINHASH.num_buckets)
    run("minhash-clusters", [dedup.MinhashDedupCluster(pairs, clusters, MINHASH)], 1)
    unique = [JsonlReader(filtered), dedup.MinhashDedupFilter(clusters, removed("minhash")), PIIFormatter()]
    run("unique", [*unique, JsonlWriter(str(out))])
    print_counts(out / "logs" / "unique")


if __name__ == "__main__":
    main()
