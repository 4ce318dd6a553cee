"""Writes the file that describes an unstable step, which must not update the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from hfpretrain import files
from hfpretrain.data.batches import StagedData, StepData, TrainingData
from hfpretrain.data.inspection import sequences_of_step
from hfpretrain.data.prepared import PreparedData
from hfpretrain.data.streaming import StreamingData
from hfpretrain.engines.base import Engine
from hfpretrain.training.records import Records


def sequences_of(
    engine: Engine,
    prepared: PreparedData,
    tokenizer: Any,
    data: TrainingData | StagedData | StreamingData,
    data_step: int,
    step_data: StepData,
) -> list[dict[str, Any]]:
    """The text of every sequence of a step; for prepared data also where each document comes from.

    `step_data`: this process's part of data step `data_step`, see `TrainState.data_step`. All ranks must call it; the
    main process gets the texts.
    """
    is_main = engine.process_index == 0
    if not isinstance(data, StreamingData):
        return list(sequences_of_step(prepared, data, tokenizer, data_step)) if is_main else []
    ids = [row for batch in step_data.batches for row in batch["input_ids"].tolist()]
    gathered = gather_object(ids if engine.is_main_data_process else [])
    return [{"text": tokenizer.decode(row)} for row in gathered] if is_main else []


def write(output_dir: Path, content: dict[str, Any], number: int, records: Records) -> Path:
    """Write `incidents/step-XXXXXXXX.json` into the run folder on the main process, named after `content["step"]`.

    `number`: how many incidents the run has had. It is added to the file name if an incident at the same step, before a
    rollback, has already written a file.

    Returns the path. If the disk can't be written to, only a message is printed.
    """
    path = output_dir / "incidents" / f"step-{content['step']:08d}.json"
    if path.exists():
        path = path.with_stem(f"{path.stem}-event-{number}")
    if records.is_main:
        try:
            path.parent.mkdir(exist_ok=True)
            files.write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False))
        except OSError as error:
            records.print_line(f"{path} can't be written: {error.strerror}")
    return path
