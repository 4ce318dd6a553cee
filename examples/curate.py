"""Curate a corpus with datatrove; a recipe reads what comes out as it is (`path: json`, `data_files: OUT/*.jsonl.gz`).

    pip install "datatrove[io,processing]"
    python examples/curate.py IN_FOLDER OUT_FOLDER [TASKS]

IN_FOLDER holds JSON lines with a key `text`. Every stage is a line of the pipeline: datatrove has readers of Common
Crawl and Parquet, language identification (`LanguageFilter`), the quality rules of Gopher, C4 and FineWeb, and MinHash
deduplication (`datatrove.pipeline.dedup`), and runs the same pipeline on a Slurm cluster with `SlurmPipelineExecutor`.
"""

import sys

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter


def is_prose(document) -> bool:
    """Long enough, and mostly letters."""
    text = document.text
    return len(text) >= 200 and sum(character.isalpha() for character in text) > 0.6 * len(text)


if __name__ == "__main__":
    source, target = sys.argv[1:3]
    tasks = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    pipeline = [JsonlReader(source), LambdaFilter(is_prose), JsonlWriter(target)]
    LocalPipelineExecutor(pipeline, tasks=tasks, logging_dir=f"{target}-logs").run()
