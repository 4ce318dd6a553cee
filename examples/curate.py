"""Curate a corpus with datatrove. A recipe reads the output with `path: json`, `data_files: OUT/*.jsonl.gz`.

    pip install "datatrove[io,processing]"
    python examples/curate.py IN_FOLDER OUT_FOLDER [TASKS]

IN_FOLDER has JSON lines files with the key `text`. Each stage is an entry of the pipeline. datatrove also has readers
of Common Crawl and Parquet, language identification (`LanguageFilter`), the quality rules of Gopher, C4 and FineWeb,
and MinHash deduplication (`datatrove.pipeline.dedup`). `SlurmPipelineExecutor` runs the same pipeline on a Slurm
cluster.
"""

import sys

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter


def is_prose(document) -> bool:
    """Whether a document is long enough and consists mostly of letters."""
    text = document.text
    return len(text) >= 200 and sum(character.isalpha() for character in text) > 0.6 * len(text)


if __name__ == "__main__":
    source, target = sys.argv[1:3]
    tasks = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    pipeline = [JsonlReader(source), LambdaFilter(is_prose), JsonlWriter(target)]
    LocalPipelineExecutor(pipeline, tasks=tasks, logging_dir=f"{target}-logs").run()
