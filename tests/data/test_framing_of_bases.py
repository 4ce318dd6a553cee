"""Text begins for a base model in hfpretrain as in plain transformers, lm-eval and TRL.

A short version of `benchmarks/framing.py`.
"""

import json

import numpy as np
import pytest
from conftest import ROOT, script, small_text
from framing import BASES, TOLERANCE, Packed, begins_as_trained, compare, make_base, plain_losses, start
from transformers import AutoModelForCausalLM, AutoTokenizer

OTHERWISE = {
    "lm-eval, add_bos_token=None, loglikelihood_rolling",  # lm-eval adds BOS twice
    "lm-eval, add_bos_token=True, loglikelihood_rolling",
    "lm-eval, add_bos_token=False, loglikelihood",  # asked for no BOS
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "llama" else pytest.mark.slow) for name in BASES]
)
def test_losses_and_beginnings_are_those_of_plain_libraries(name):
    sizes = ["--documents", 32, "--base-steps", 20, "--steps", 8]
    result = script(ROOT / "benchmarks" / "framing.py", "--bases", name, "--json", *sizes)
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(result.stdout.splitlines()[-1])
    for key in ("difference", "difference_after", "step_loss_difference", "evaluate_difference"):
        assert found[key] <= TOLERANCE, key
    assert found["tokens"] > 1000 and found["pieces"] > 2 * found["others"]
    # No position of a framed document has a loss out of line after training.
    assert found["largest_rise"] < 0.1 and found["first"][1] < found["later"][1] + 0.6
    by_program = {who: as_trained for who, _, as_trained in found["beginnings"]}
    differs = {who for who, as_trained in by_program.items() if not as_trained}
    if BASES[name].add_bos:
        assert found["plain_first"] < found["plain_first_after_eos"] - 0.3  # it matters how a text begins
        assert differs == OTHERWISE
    else:
        # `add_bos_token=True` asks lm-eval for a BOS that training did not have, or had once.
        assert differs <= {"lm-eval, add_bos_token=True, loglikelihood_rolling"}


def test_a_wrong_beginning_and_a_wrong_loss_are_noticed(tmp_path):
    base, texts = BASES["llama"], small_text(32)
    make_base(base, tmp_path, texts, steps=1)
    tokenizer, model = (kind.from_pretrained(tmp_path) for kind in (AutoTokenizer, AutoModelForCausalLM))
    ids = tokenizer(texts[0])["input_ids"]
    assert start(base, tokenizer) == [] and begins_as_trained(base, tokenizer, texts[0], ids)
    for wrong in (ids[1:], ids[:1] + ids, [tokenizer.eos_token_id, *ids[1:]]):
        assert not begins_as_trained(base, tokenizer, texts[0], wrong)
    losses = plain_losses(model, ids)
    assert compare(base, tmp_path, Packed([(ids, losses)], 0, 0), texts).largest == 0
    spoiled = losses + np.eye(len(losses))[3] * 1e-3
    assert compare(base, tmp_path, Packed([(ids, spoiled)], 0, 0), texts).largest == pytest.approx(1e-3, rel=0.01)
