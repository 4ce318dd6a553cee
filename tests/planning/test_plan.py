import json
import subprocess
import sys

import growth
import pytest
import torch
from conftest import ROOT, environment, hfpretrain, train, write_recipe
from PIL import Image
from transformers import AutoConfig

from hfpretrain import load_recipe
from hfpretrain.modeling.build import build_model
from hfpretrain.modeling.structure import decoder_layers, parameters_of_config
from hfpretrain.planning import memory, network
from hfpretrain.planning.plan import make_plan
from hfpretrain.planning.table import seconds_per_step, table
from hfpretrain.recipe.schema import ModelSection, RecipeError

SEVEN_B = ROOT / "recipes" / "llama-7b-fineweb.yaml"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 500,
}
LLAMA = {"model_type": "llama", "num_key_value_heads": 2, **SIZES}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 500}
MIXTRAL = {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2, **SIZES}
LFM2 = {"model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv"], "num_key_value_heads": 2, **SIZES}
BATCH, BLOCK = 4, 128


def config_of(keywords):
    return AutoConfig.for_model(**{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **keywords})


def build(keywords, **section):
    section = ModelSection(config=keywords, **section)
    return lambda: build_model(section, config_of(keywords), "cpu")


def simulate(keywords, precision="float32", accumulates=True, chunked_loss=False, **section):
    return memory.simulate(
        build(keywords, **section),
        precision=precision,
        batch_size=BATCH,
        block_size=BLOCK,
        document_masking=True,
        chunked_loss=chunked_loss,
        accumulates=accumulates,
        float32_outputs=precision.startswith("autocast"),
    )


def allocated(model, precision):
    """Bytes that torch allocates at most in a second micro-step, by its profiler, gradients of the first included."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(500, (BATCH, BLOCK), generator=generator)
    batch = {"input_ids": ids, "labels": ids, "position_ids": (torch.arange(BLOCK) % 50).repeat(BATCH, 1)}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32"):
                outputs = model(**batch, use_cache=False, num_items_in_batch=torch.tensor(500))
            outputs.logits = outputs.logits.float()
            loss = outputs.loss
            del outputs
            loss.backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    ("keywords", "precision"),
    [
        (LLAMA, "float32"),
        (LLAMA, "autocast bfloat16"),
        (GPT2, "float32"),
        (MIXTRAL, "autocast bfloat16"),
        (LFM2, "float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["model_type"],
)
def test_a_simulated_pass_holds_what_torch_allocates(keywords, precision):
    assert simulate(keywords, precision).peak == pytest.approx(allocated(build(keywords)().train(), precision), rel=0.1)


def test_a_simulated_pass_sees_checkpointing_and_it_agrees_with_torch():
    plain, less = simulate(LLAMA), simulate(LLAMA, gradient_checkpointing=True)
    assert less.activations < 0.7 * plain.activations
    real = build(LLAMA, gradient_checkpointing=True)().train()
    assert less.peak == pytest.approx(allocated(real, "float32"), rel=0.1)


def test_parts_of_a_pass():
    plain = simulate(LLAMA)
    total = sum(parameter.numel() for parameter in build(LLAMA)().parameters())
    # Of the naive loss at its largest: logits, log-probabilities, gradients.
    assert plain.logits % (BATCH * BLOCK * 500 * 4) == 0
    assert plain.casts == 0 and 0 < simulate(LLAMA, "autocast bfloat16").casts <= 2 * total
    # Eager attention holds a probability for each head, layer and pair of positions, sdpa a mask for each layer.
    eager, pairs = simulate(LLAMA, attn_implementation="eager"), 4 * BATCH * BLOCK * BLOCK
    assert eager.activations - plain.activations > 3 * (4 - 1) * pairs * 0.9
    assert plain.peak - plain.peak_without == pytest.approx(4 * total, rel=0.01)
    chunked = simulate(LLAMA, chunked_loss=True)
    assert chunked.logits <= plain.logits / 3 and chunked.peak < plain.peak
    first = simulate(LLAMA, accumulates=False)
    assert first.peak_without <= first.peak < plain.peak
    state = torch.get_rng_state()
    simulate(LLAMA)
    assert torch.equal(state, torch.get_rng_state())


def test_parameters_active_for_a_token():
    counts = parameters_of_config(config_of(MIXTRAL))
    experts = 3 * 8 * 3 * 64 * 128  # layers, experts, matrices
    assert counts.total - counts.active == experts * 6 // 8
    dense = parameters_of_config(config_of(LLAMA))
    assert dense.active == dense.total and dense.active_non_embedding == dense.non_embedding
    deepseek = {"model_type": "deepseek_v3", "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1,
                "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "kv_lora_rank": 16,
                "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, **SIZES}  # fmt: skip
    counts = parameters_of_config(config_of(deepseek))
    assert counts.total - counts.active == 2 * 3 * 64 * 32 * 6  # layers with experts, matrices, experts that rest
    qwen = make_plan(
        load_recipe(ROOT / "recipes" / "qwen3-moe.yaml"), engine="zero1", num_processes=4, device="A100-40GB"
    )
    assert qwen.parameters.active == 99_406_080  # as its header says


@pytest.fixture(scope="module")
def wide():
    """Five layers of the 7B model on 8 devices of 24 GiB."""
    changes = ["--model.config.num_hidden_layers=5", "--training.micro_batch_size=1"]
    return make_plan(load_recipe(SEVEN_B, changes), num_processes=8, device="L4")


def state_of(plan):
    """Bytes of weights, gradients and optimizer by engine; without the copies in 16 bits that autocast adds."""
    return {row.engine: row.memory.weights + row.memory.gradients + row.memory.optimizer for row in plan.engines}


def test_the_state_agrees_with_the_estimator_of_accelerate():
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    changes = ["--training.mixed_precision=no", "--training.micro_batch_size=1", "--model.config.num_hidden_layers=2"]
    recipe = load_recipe(SEVEN_B, changes)
    row = make_plan(recipe, engine="single", device="H100-80GB").engines[0]
    with torch.device("meta"):
        model = build_model(recipe.model, config_of(recipe.model.config))
    size, (largest_layer, _) = calculate_maximum_sizes(model)
    size -= sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    theirs = estimate_training_usage(size, "float32")
    assert row.memory.weights == theirs["model"] and row.memory.gradients == theirs["gradients"]
    assert row.memory.optimizer == theirs["optimizer"]
    shape = memory.model_shape(model, decoder_layers(model), moments=0)
    assert shape.largest_layer * 4 == largest_layer
    # In 16 bits accelerate counts gradients in float32 and in 16 bits. Autocast turns each 16-bit gradient into float32
    # as soon as it is there, so ours has them once; torch's profiler agrees above.
    assert estimate_training_usage(size, "bfloat16")["gradients"] == 1.5 * row.memory.gradients


def test_the_state_agrees_with_the_estimators_of_deepspeed(wide):
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    ours, total = state_of(wide), wide.parameters.total
    _, zero2 = estimate_zero2_model_states_mem_needs(total, 8, cpu_offload=False)
    assert ours["zero2"] == pytest.approx(zero2, rel=1e-6)
    layer = 202_383_360
    _, zero3, gathered = estimate_zero3_model_states_mem_needs(
        total, layer, 8, cpu_offload=False, cpu_offload_params=False
    )
    # 2 + 2 + 4 + 8 bytes a parameter are 16, and its own comment for stage 2 adds the step's 4 of float32 gradients:
    # stage 3 makes them too (`_prepare_fp32_grad_for_sub_group`), but its 18 has room for 2 of the 4.
    assert ours["zero3"] - (zero3 - gathered) == pytest.approx(2 * total / 8, rel=1e-6)


def test_engines_side_by_side(wide):
    rows, total = {row.engine: row for row in wide.engines}, wide.parameters.total
    assert list(rows) == [engine.name for engine in memory.ENGINES]
    assert {name for name, row in rows.items() if not row.fits} == {"single", "ddp"}
    assert rows["fsdp2"].memory.optimizer == 8 * total // 8
    # Here micro-steps accumulate: DDP's buckets stand beside the gradients, FSDP2 divides them in each.
    assert rows["ddp"].memory.peak == rows["single"].memory.peak + 4 * total and rows["ddp"].memory.buffers >= 4 * total
    assert rows["fsdp2"].memory.gradients == 4 * total // 8 and rows["fsdp2_offload"].memory.gradients == 0
    assert rows["hsdp"].memory.weights == 4 * total // 4
    assert rows["zero3_offload"].memory.weights == 0 and rows["zero3_offload"].memory.host > 16 * total / 8
    assert rows["zero1"].memory.peak > rows["zero2"].memory.peak > rows["zero3"].memory.weights
    assert wide.seconds_per_step == pytest.approx(wide.flops_per_token * 4_194_304 / (8 * 121e12 * 0.4))
    assert wide.device_hours == pytest.approx(8 * 33_000 * wide.seconds_per_step / 3600)
    assert wide.prepared_bytes == 2 * wide.tokens and rows["fsdp2"].checkpoint_bytes == 12 * total


def test_flops_of_the_formula(wide):
    # 6 for each parameter in a matrix product, embeddings in once, and attention.
    assert wide.flops_per_token == 6 * (wide.parameters.non_embedding + 32000 * 4096) + 12 * 5 * 4096 * 4096


def test_what_cannot_be_is_named(folder):
    recipe = load_recipe(write_recipe(folder))
    rows = {row.engine: row for row in make_plan(recipe, num_processes=3, device="A100-80GB").engines}
    assert "nobody to share tensors" in make_plan(recipe, engine="tp", device="A100-80GB").engines[0].reason
    assert (
        rows["single"].fits
        and "8 sequences" in rows["ddp"].reason
        and "two equal groups of several" in rows["hsdp"].reason
    )
    muon = load_recipe(write_recipe(folder, optimizer__name="muon"))
    refused = [row.engine for row in make_plan(muon, num_processes=2, device="A100-80GB").engines if row.reason]
    assert set(refused) == {"zero1", "zero2", "zero3", "zero3_offload", "zero3_ulysses", "hsdp"}
    with_z = load_recipe(write_recipe(folder, training__z_loss=1e-4))
    reason = make_plan(with_z, engine="tp", num_processes=2, device="A100-80GB").engines[0].reason
    assert "for which no process has a whole head" in reason
    for keywords, message in (
        ({"engine": "fsdp"}, "unknown engine; did you mean `fsdp2`?"),
        ({"device": "H100-80G"}, "unknown device; did you mean `H100-80GB`?"),
        ({"mfu": 40.0}, "not a share of the peak"),
        ({"num_processes": 0}, "at least 1"),
    ):
        with pytest.raises(RecipeError) as error:
            make_plan(recipe, **keywords)
        assert message in str(error.value)
    text = load_recipe(write_recipe(folder, tokenizer={"algorithm": "character"}))
    with pytest.raises(RecipeError, match=r"model\.config\.vocab_size"):
        make_plan(text)


def test_the_command_prints_a_table_or_json(folder):
    recipe = str(write_recipe(folder))
    result = hfpretrain("plan", recipe, "--num-processes", "2", "--device", "cpu", "--mfu", "0.2")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 120 and "measured, a matrix product" in result.stdout
    names = [engine.name for engine in memory.ENGINES]
    assert [line.split()[0] for line in lines if line.split()[:1] and line.split()[0] in names] == names
    found = json.loads(hfpretrain("plan", recipe, "--engine", "zero2", "--device", "h200-141gb", "--json").stdout)
    assert found["parameters"]["total"] == 39_072 and found["mfu"] == 0.4 and found["peak_flops"] == 67e12
    (row,) = found["engines"]
    assert row["engine"] == "zero2" and row["memory"]["peak"] > row["memory"]["optimizer"] == 12 * 39_072


def test_on_this_cpu_a_small_model_s_step_is_timed_and_nothing_drawn_changes(folder):
    recipe = load_recipe(write_recipe(folder))
    state = torch.get_rng_state()
    timed = make_plan(recipe, engine="single", device="cpu")
    assert torch.get_rng_state().equal(state)
    assert "measured" in timed.mfu_is and timed.flops_per_token * 256 == pytest.approx(
        timed.mfu * timed.peak_flops * timed.seconds_per_step
    )
    assumed = make_plan(recipe, engine="single", device="cpu", mfu=0.4)
    # A model of 40,000 parameters is far from what a matrix product reaches.
    assert assumed.mfu_is == "assumed" and timed.seconds_per_step > 3 * assumed.seconds_per_step
    assert make_plan(recipe, engine="single", device="A100-80GB").mfu_is == "assumed"
    assert "a micro-step and an update of this model" in table(timed)


def test_a_batch_that_does_not_divide_is_one_error_and_no_time_is_claimed(folder):
    path = write_recipe(folder)
    result = hfpretrain("plan", str(path), "--num-processes", "48")
    assert (
        result.returncode == 2 and result.stdout == "" and "possible numbers of processes: 1, 2, 4, 8" in result.stderr
    )
    plan = make_plan(load_recipe(path), num_processes=6, device="A100-80GB")  # tp shares sequences, heads it can't
    assert plan.seconds_per_step is None and plan.hours is None
    text = table(plan)
    assert "no engine can run this" in text and "not possible (1)" in text and max(map(len, text.splitlines())) <= 120
    words = " ".join(text.split())
    assert all(row.reason in words for row in plan.engines if row.reason)
    # One that is possible is planned beside those that are not.
    plan = make_plan(load_recipe(path), num_processes=2, device="A100-80GB")
    assert plan.seconds_per_step > 0 and "two equal groups of several" in table(plan)


@pytest.mark.parametrize("flag", ["--shard-size", "--nvlink", "--infiniband", "--devices-per-node"])
def test_a_flag_of_the_simulation_is_refused_without_it(folder, flag):
    result = hfpretrain("plan", str(write_recipe(folder)), flag, "4")
    assert result.returncode == 2 and f"{flag}: is used only with --scaling" in result.stderr


def test_a_run_says_what_it_came_to(folder):
    result = train(write_recipe(folder), "--training.max_steps=4")
    assert result.returncode == 0, result.stderr
    assert "predicted      measured    error" in result.stdout and "seconds a step" in result.stdout
    kept = json.loads((folder / "run" / "plan.json").read_text())
    assert kept["plan"]["engines"][0]["engine"] == "single" and kept["plan"]["parameters"]["total"] == 39_072
    for key in ("peak_memory", "seconds_per_step"):
        assert kept["measured"][key] > 0
        assert kept["error"][key] == pytest.approx(kept["prediction"][key] / kept["measured"][key] - 1)
    assert kept["measured"]["mfu"] == pytest.approx(
        kept["prediction"]["mfu"] * kept["prediction"]["seconds_per_step"] / kept["measured"]["seconds_per_step"]
    )


def test_seconds_of_a_step_leave_the_first_line_out():
    speeds = [(2, 10.0)]
    assert seconds_per_step(speeds, 100) == 10 and seconds_per_step([], 100) is None
    speeds += [(4, 100.0), (5, 25.0)]
    assert seconds_per_step(speeds, 100) == pytest.approx((2 * 1 + 1 * 4) / 3)
    assert seconds_per_step(speeds, 100, after=2) == 4 and seconds_per_step(speeds, 100, after=2, last=4) == 1


def test_a_table_without_a_known_peak(folder):
    plan = make_plan(load_recipe(write_recipe(folder)), engine="single", device="L4")
    unknown = {**plan.__dict__, "seconds_per_step": None, "hours": None, "device_hours": None, "peak_flops": None}
    assert "time         not known" in table(type(plan)(**unknown))


def test_running_out_of_memory_says_what_would_help(folder):
    """A limit on the address space makes torch's allocator fail as on a full machine."""
    code = (
        "import resource, sys\nresource.setrlimit(resource.RLIMIT_AS, (8 * 2**30,) * 2)\n"
        "from hfpretrain.train import main\nsys.exit(main(sys.argv[1:]))"
    )
    recipe = write_recipe(
        folder, training__tokens_per_step=2**18, training__micro_batch_size=2**13, model__config__hidden_size=512
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(recipe)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "training.micro_batch_size: 8192 sequences of 32 tokens do not fit on" in result.stderr
    assert "zero3_offload" in result.stderr
    helpful = result.stderr.partition("what helps most")[2].splitlines()[1:]
    assert len(helpful) == 3 and any("--training.micro_batch_size=4096" in line for line in helpful)
    assert not (folder / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("engine", "sent"),
    [
        ("ddp", 2 * 3 / 4 * 4000),
        ("fsdp2", 3 * 3 / 4 * (2 * 1000 + 2 * 800 + 4 * 1000)),  # the tail of 200 is gathered once
        ("hsdp", 3 * (1 / 2 * (2 * 1000 + 2 * 800 + 4 * 1000) + 2 * 1 / 2 * 4000 / 2)),
        ("zero1", 2 * 3 / 4 * 2000 + 3 / 4 * 2000),
        ("zero2", 3 * 2 * 3 / 4 * 2000 + 3 / 4 * 2000),
        ("zero3", 3 * 3 / 4 * (2000 + 2000 + 2000)),
    ],
)
def test_bytes_sent_by_an_engine(engine, sent):
    """1,000 parameters, 4 devices, 3 micro-steps in bf16; under hsdp two groups of 2."""
    shape = memory.Shape(total=1000, num_layers=2, largest_layer=300, tail=200, buffers=0, moments=8000)
    found = network.exchanges(engine, shape, 4, 3, "bf16", shard_size=2)
    assert sum(exchange.sent for exchange in found) == pytest.approx(sent)
    alone = network.exchanges(engine, shape, 1, 1, "bf16", shard_size=1)
    assert sum(exchange.sent for exchange in alone) == 0


def test_seconds_of_an_exchange():
    cluster = network.Cluster(devices_per_node=2, nvlink=100.0, infiniband=10.0)

    def seconds(*arguments, **keywords):
        return network.Exchange(*arguments, **keywords).seconds(cluster)

    # In one node by NVLink, a hop of 3.4 us; beyond, both adapters of a node carry half, and one of 3 hops is 14.
    assert seconds(1, 200.0, 2) == pytest.approx(1 / 2 * 200 / 100 + 3.4e-6, rel=1e-12)
    assert seconds(1, 200.0, 4, calls=3, times=5) == pytest.approx(5 * (3 / 4 * 200 / 20 + 3 * (2 * 3.4e-6 + 14e-6)))
    # Of the groups across nodes each device is alone in its node. With two nodes ring and tree are as fast.
    assert seconds(2, 200.0, 2, stride=2) == pytest.approx(2 / 2 * 200 / 10 + 28e-6, rel=1e-12)
    tree = seconds(2, 0.0, 1024)
    assert tree == pytest.approx(2 * (4e-6 + 9 * 14e-6))


def test_scaling_is_called_simulated_and_scales_nothing_silently(folder):
    recipe = str(write_recipe(folder, training__mixed_precision="bf16"))  # 8 sequences a step, 2 a micro-batch
    result = hfpretrain("plan", recipe, "--scaling", "2", "4", "8", "--device", "H100-80GB", "--shard-size", "2")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 120 and lines[0].startswith("simulated scaling") and "not measured" in lines[0]
    assert "hsdp   no two or more equal groups of --shard-size 2" in result.stdout
    assert any(line.split()[:6] == ["8", "all", "a", "step", "has", "8"] for line in lines)
    arguments = ("--scaling", "4", "--device", "H100-80GB", "--engine", "zero1", "--json")
    (row,) = json.loads(hfpretrain("plan", recipe, *arguments).stdout)["simulated"]
    assert row["sent_bytes"] == pytest.approx(3 * 3 / 4 * 2 * 39_072) and row["micro_steps"] == 1
    for wrong in (["--scaling", "1", "--device", "L4"], ["--scaling", "8", "--device", "cpu"]):
        assert hfpretrain("plan", recipe, *wrong).returncode == 2


@pytest.mark.slow
def test_growth_measures_and_draws(tmp_path):
    """What it measures by the clock is not looked at."""
    command = [sys.executable, str(ROOT / "benchmarks" / "growth.py"), "--quick", "--output", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    width, height = Image.open(tmp_path / "growth.png").size
    assert width > 1000 and height > 600
    rows = [line.split(" | ") for line in (tmp_path / "growth.md").read_text().splitlines()[2:]]
    assert len(rows) == 10 and {len(row) for row in rows} == {6} and result.stdout.strip().count("\n") == 11
    titles = {panel.title for name, panel in growth.PANELS.items() if name != "many"}
    assert {row[0].strip("| ").partition(":")[0] for row in rows} == titles
    exponents = {row[0].strip("| "): float(row[4]) for row in rows}
    (whole,) = (value for name, value in exponents.items() if name.startswith("Loss") and name.endswith("whole"))
    assert whole == pytest.approx(1, abs=0.3)  # memory, not time
