"""What a step that must not update the weights leaves behind: its numbers, its text, its gradients by parameter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from hfpretrain import files
from hfpretrain.data.batches import StepData, TrainingData
from hfpretrain.data.inspection import sequences


def write(run: Any, problem: str, policy: str, step_data: StepData, loss: float, grad_norm: float) -> Path:
    """Write `incidents/step-XXXXXXXX.json` into the run folder. All ranks must call it, before the gradients go."""
    norms = run.engine.gradient_norms()
    data_step = run.state.data_step(run.state.step)
    if isinstance(run.data, TrainingData):
        texts: list[Any] = list(sequences(run.prepared, run.data, run.tokenizer, data_step)) if run.is_main else []
    else:
        ids = [row for batch in step_data.batches for row in batch["input_ids"].tolist()]
        ours = ids if run.engine.counts_its_data else []
        gathered = gather_object(ours)
        texts = [{"text": run.tokenizer.decode(row)} for row in gathered] if run.is_main else []
    path = run.output_dir / "incidents" / f"step-{run.state.step + 1:08d}.json"
    if path.exists():  # the same step once more, after a rollback
        path = path.with_stem(f"{path.stem}-event-{run.state.num_events}")
    content = {
        "step": run.state.step + 1,
        "problem": problem,
        "policy": policy,
        "loss": str(loss),
        "grad_norm": str(grad_norm),
        "data_step": data_step,
        "sequences": texts,
        "gradient_norms": {name: str(norm) for name, norm in norms.items()},
    }
    if run.is_main:
        try:
            path.parent.mkdir(exist_ok=True)
            files.write_whole(path, json.dumps(content, indent=1, ensure_ascii=False))
        except OSError as error:
            run.records.say(f"{path} can't be written: {error.strerror}")
    return path
