"""Rungs of a ladder that look finished although they were not trained. Their losses follow a known law."""

import json

from hfpretrain.ladder.laws import Law
from hfpretrain.recipe.yaml import dump_recipe

LAW = Law(1.7, (20.0, 30.0), (0.35, 0.3))


def finish(rung):
    """Write the files of a finished run of `rung` that a ladder reads."""
    loss = LAW.loss(rung.parameters, rung.tokens)
    rung.run.mkdir(parents=True)
    (rung.run / "recipe.yaml").write_text(dump_recipe(rung.recipe))
    step = rung.recipe.training.num_steps
    lines = [{"step": step, "eval/loss": loss, "eval/bits_per_byte": loss / 2}, {"step": step, "export/loss_export": 1}]
    (rung.run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
