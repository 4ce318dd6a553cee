"""The plan of a few layers of the 7B recipe, which several tests of planning use."""

import functools

from conftest import ROOT

from hfpretrain import load_recipe
from hfpretrain.planning.plan import make_plan

SEVEN_B = ROOT / "recipes" / "llama-7b-fineweb.yaml"


@functools.cache
def five_layers_on_eight_devices():
    """Five layers of the 7B model on 8 devices of 24 GiB."""
    changes = ["--model.config.num_hidden_layers=5", "--training.micro_batch_size=1"]
    return make_plan(load_recipe(SEVEN_B, changes), num_processes=8, device="L4")
