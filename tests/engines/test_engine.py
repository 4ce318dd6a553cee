import json
import math
import shutil
from importlib.util import find_spec

import pytest
import resume_anywhere
import torch
from conftest import ROOT, hfpretrain, rows, small_text, train, write_jsonl, write_recipe
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import MOE
from transformers import AutoConfig, AutoModelForCausalLM

from hfpretrain import load_recipe
from hfpretrain.engines import pieces
from hfpretrain.engines.local import Single
from hfpretrain.modeling import initialization
from hfpretrain.modeling.build import build_model
from hfpretrain.publishing import outbox, publisher

ENGINES = ["ddp", "fsdp2", "tp", "zero1", "zero2", "zero3", "zero3_ulysses"]
FOUR_PROCESSES = ["hsdp"]
OFFLOADED = ["fsdp2_offload", "zero3_offload"]
STEPS = 2
"""Steps under each engine in the run that moves through all of them."""


def run_all(folder, engines, **changes):
    write_jsonl(folder / "corpus.jsonl", small_text(200))
    recipe = write_recipe(folder, **changes)
    for name in engines:
        # The run that the others are compared with has all logits in memory and recomputes nothing.
        plain = ["--training.chunked_loss=false", "--model.gradient_checkpointing=false"] if name == "single" else []
        result = train(recipe, f"--output_dir={folder / name}", *plain, engine=name, launcher=True, timeout=400)
        assert result.returncode == 0, result.stdout + result.stderr
    return recipe


def compare(folder, name, steps, max_loss=1e-5, max_grad_norm=1e-4, max_perplexity=1e-6):
    """Check and return the largest relative differences between the run of an engine and that of one process."""

    def largest(key):
        single, other = rows(folder / "single", key), rows(folder / name, key)
        assert list(single) == list(other)
        return max(abs(other[s][key] - single[s][key]) / abs(single[s][key]) for s in single)

    assert list(rows(folder / name, "loss")) == list(range(1, steps + 1))
    ledgers = [{step: row["ledger"] for step, row in rows(folder / run, "ledger").items()} for run in (name, "single")]
    assert ledgers[0] == ledgers[1] and len(set(ledgers[0].values())) == steps
    found = {key: largest(key) for key in ("loss", "grad_norm", "eval/perplexity", "eval/bits_per_byte")}
    assert found["loss"] <= max_loss and found["grad_norm"] <= max_grad_norm, found
    assert found["eval/perplexity"] <= max_perplexity and found["eval/bits_per_byte"] <= max_perplexity, found
    return found


def initial_weights(run):
    """Checksum of all weights before the first step."""
    return json.loads((run / "environment.json").read_text())["initial_weights"]


def check_export(run):
    """Compare the export's logits under plain transformers with those that the training process stored."""
    with safe_open(run / "reference.safetensors", framework="pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    model = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    with torch.no_grad():
        logits = model(**{k: v for k, v in stored.items() if k != "logits"}, use_cache=False).logits
    difference = (logits - stored["logits"]).abs().max().item()
    assert difference <= 1e-5
    return difference


@pytest.fixture(scope="module")
def run_through_engines(tmp_path_factory):
    """A run of two steps under each engine in turn. Returns a folder with a copy of the run after each engine, and with
    `single`, a run of all the steps in one process."""
    folder = tmp_path_factory.mktemp("engines")
    write_jsonl(folder / "corpus.jsonl", small_text(200))
    changes = {
        "scheduler": {"name": "constant_with_warmup", "num_warmup_steps": 1},
        "model__gradient_checkpointing": True,
    }
    changes |= {"checkpoint__every_steps": STEPS, "evaluation__every_steps": STEPS}
    recipe = write_recipe(folder, **changes)
    # The run that the engines are compared with has all logits in memory and recomputes nothing.
    plain = ["--training.chunked_loss=false", "--model.gradient_checkpointing=false"]
    number_of_steps = f"--training.max_steps={STEPS * len(ENGINES)}"
    result = train(recipe, f"--output_dir={folder / 'single'}", number_of_steps, *plain)
    assert result.returncode == 0, result.stderr
    for number, name in enumerate(ENGINES, 1):
        changes = [f"--output_dir={folder / 'run'}", f"--training.max_steps={STEPS * number}"]
        result = train(recipe, *changes, engine=name)
        assert result.returncode == 0, result.stdout + result.stderr
        assert number == 1 or "resumed from" in result.stderr
        shutil.copytree(folder / "run", folder / name)
    return folder


@pytest.mark.parametrize("name", ENGINES)
def test_a_run_continues_the_same_under_every_engine(run_through_engines, name):
    last = STEPS * (ENGINES.index(name) + 1)
    single, run = run_through_engines / "single", run_through_engines / name
    for step in range(last - STEPS + 1, last + 1):
        expected, found = rows(single, "loss")[step], rows(run, "loss")[step]
        assert found["ledger"] == expected["ledger"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    expected, found = rows(single, "eval/perplexity")[last], rows(run, "eval/perplexity")[last]
    assert found["eval/perplexity"] == pytest.approx(expected["eval/perplexity"], rel=1e-6)
    environment = json.loads((run / "environment.json").read_text())
    assert (environment["engine"], environment["num_processes"]) == (name, 2)
    assert environment["initial_weights"] == initial_weights(single)
    (row,) = json.loads((run / "plan.json").read_text())["plan"]["engines"]
    assert (row["engine"], row["num_processes"], row["reason"]) == (name, 2, None)
    check_saved_once(run / "checkpoints" / f"step-{last:08d}", row["checkpoint_bytes"], 2)
    check_export(run)


def test_a_run_ends_with_the_same_weights_under_all_engines_and_under_one(run_through_engines):
    paths = [run_through_engines / name / "model" / "model.safetensors" for name in ("single", ENGINES[-1])]
    single, run = map(load_file, paths)
    assert run.keys() == single.keys()
    for key, tensor in run.items():
        torch.testing.assert_close(tensor, single[key], rtol=0, atol=2e-4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of the same short recipe under every engine: one CPU process for `single`, two for the others."""
    folder = tmp_path_factory.mktemp("engines")
    changes = {"training__max_steps": 10, "checkpoint__every_steps": 5, "evaluation__every_steps": 5}
    changes |= {"model__gradient_checkpointing": True}
    run_all(folder, ["single", *ENGINES], **changes)
    return folder


@pytest.fixture
def run_of(runs):
    """A function that adds the run of another engine to `runs` if it is not there yet. hsdp has four processes."""

    def start(name):
        if not (runs / name).exists():
            arguments = (runs / "recipe.yaml", f"--output_dir={runs / name}")
            result = train(*arguments, engine=name, launcher=True, timeout=400)
            assert result.returncode == 0, result.stdout + result.stderr

    return start


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ENGINES, *FOUR_PROCESSES, *OFFLOADED])
def test_a_recipe_means_the_same_under_every_engine(runs, run_of, name):
    run_of(name)
    compare(runs, name, steps=10)
    assert json.loads((runs / name / "environment.json").read_text())["engine"] == name
    number = 4 if name == "hsdp" else 2
    assert json.loads((runs / name / "environment.json").read_text())["num_processes"] == number
    assert initial_weights(runs / name) == initial_weights(runs / "single")
    (row,) = json.loads((runs / name / "plan.json").read_text())["plan"]["engines"]
    assert (row["engine"], row["num_processes"], row["reason"]) == (name, number, None)
    check_saved_once(runs / name / "checkpoints" / "step-00000010", row["checkpoint_bytes"], number)


def check_saved_once(path, expected, number):
    """Check that each byte of a checkpoint's state is on the disk once, and that all processes wrote about as much."""
    sizes = [sum(file.stat().st_size for file in path.glob(f"__{rank}_*.distcp")) for rank in range(number)]
    assert expected < sum(sizes) < 1.6 * expected, sizes  # torch writes more than the bytes of each tensor
    assert min(sizes) > 0.3 * sum(sizes) / number, sizes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["single", *ENGINES, *FOUR_PROCESSES, *OFFLOADED])
def test_the_export_of_every_engine_is_the_trained_model(runs, run_of, name):
    run_of(name)
    check_export(runs / name)
    state, single = (load_file(runs / run / "model" / "model.safetensors") for run in (name, "single"))
    assert state.keys() == single.keys()
    for key, tensor in state.items():
        torch.testing.assert_close(tensor, single[key], rtol=0, atol=2e-4)


# hsdp saves and loads like fsdp2, zero1 like zero2, Ulysses like zero3.
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ENGINES if name not in ("zero1", "zero3_ulysses")])
def test_the_same_command_resumes_under_every_engine(runs, name):
    run = runs / name
    before = rows(run, "loss")
    shutil.rmtree(run / "checkpoints" / "step-00000010")
    result = train(runs / "recipe.yaml", f"--output_dir={run}", engine=name, launcher=True, timeout=400)
    assert result.returncode == 0, result.stderr
    assert "step-00000005" in result.stderr and "step 4/10" not in result.stderr
    assert {s: r["loss"] for s, r in rows(run, "loss").items()} == {s: r["loss"] for s, r in before.items()}


@pytest.mark.slow
def test_a_run_moves_from_engine_to_engine_under_the_launcher(tmp_path):
    """A part of `benchmarks/resume_anywhere.py`."""
    legs = (("zero3", 2), ("fsdp2", 2), ("zero2", 2), ("single", 1))
    table, weights = resume_anywhere.chain(tmp_path, legs)
    assert [row["engine"] for row in table] == [engine for engine, _ in legs]
    for row in table:
        assert row["loss"] <= resume_anywhere.TOLERANCE and row["grad_norm"] <= 1e-4 and row["ledger"], row
    assert weights <= 1e-5


def resume_elsewhere(folder, name, max_loss, **changes):
    """Run in one process, resume a copy of the run from its middle under `name`, and check that the losses agree."""
    changes["checkpoint__every_steps"] = 4
    run_all(folder, ["single"], **changes)
    shutil.copytree(folder / "single" / "checkpoints" / "step-00000004", folder / name / "checkpoints/step-00000004")
    shutil.copy(folder / "single" / "recipe.yaml", folder / name)
    run_all(folder, [name], **changes)
    for key in ("loss", "eval/loss"):
        single, found = rows(folder / "single", key), rows(folder / name, key)
        assert list(found) == ([5, 6, 7, 8] if key == "loss" else [step for step in single if step > 4])
        for step, row in found.items():
            assert row[key] == pytest.approx(single[step][key], rel=max_loss), (key, step)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload", "zero3_ulysses"])
def test_muon_trains_a_mixture_of_experts_the_same_under_every_engine(tmp_path, name):
    config = {**MOE, "num_experts": 5, "head_dim": 8}
    del config["vocab_size"]
    resume_elsewhere(tmp_path, name, 1e-5, optimizer__name="muon", model__config=config)


@pytest.mark.slow
def test_schedule_free_is_the_same_under_an_engine_that_shards_and_exports_what_it_evaluates(tmp_path):
    if find_spec("schedulefree") is None:
        pytest.skip("schedulefree is not installed")
    changes = {"optimizer__name": "adamw_schedule_free", "scheduler__name": "constant_with_warmup"}
    resume_elsewhere(tmp_path, "fsdp2", 1e-6, **changes, evaluation__every_steps=3)
    evaluated = rows(tmp_path / "single", "eval/loss")[8]["eval/loss"]
    for run in (tmp_path / "single", tmp_path / "fsdp2"):
        check_export(run)
        result = hfpretrain("evaluate", str(run / "model"), str(tmp_path / "recipe.yaml"))
        assert json.loads(result.stdout)["loss"] == pytest.approx(evaluated, rel=1e-6), result.stderr
        checkpoint, exported = run / "checkpoints" / "step-00000008", load_file(run / "model" / "model.safetensors")
        trained = pieces.load_whole_tensors(checkpoint, ["model"])
        assert not any(torch.equal(exported[key], trained[key]) for key in exported)
        outbox.add_checkpoint(checkpoint, run / "outbox")
        publisher.export_checkpoint(run, run / "outbox" / checkpoint.name, None)
        revision = load_file(run / "outbox" / checkpoint.name / "model" / "model.safetensors")
        for key, tensor in exported.items():
            torch.testing.assert_close(revision[key], tensor, rtol=0, atol=0 if run.name == "single" else 1e-6)


@pytest.mark.slow
def test_8_bit_moments_are_the_same_under_ddp(tmp_path):
    if find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    resume_elsewhere(tmp_path, "ddp", 1e-6, optimizer__name="adamw_8bit")


def test_flex_attention_on_a_cpu_is_refused(folder):
    result = train(write_recipe(folder, model__attn_implementation="flex_attention"))
    assert result.returncode == 2
    assert "model.attn_implementation: flex_attention" in result.stderr and "CPU" in result.stderr


@pytest.mark.slow
def test_fsdp2_trains_the_same_in_one_process(runs):
    """Offloading on one GPU is like this; the launcher starts a single process in another way than several."""
    arguments = (runs / "recipe.yaml", f"--output_dir={runs / 'alone'}")
    result = train(*arguments, engine="fsdp2", processes=1, launcher=True)
    assert result.returncode == 0, result.stderr
    compare(runs, "alone", steps=10)
    assert json.loads((runs / "alone" / "environment.json").read_text())["engine"] == "fsdp2"


@pytest.mark.slow
def test_bfloat16_under_a_sharded_engine_reports_float32_losses(tmp_path):
    run_all(tmp_path, ["single", "fsdp2"], training__mixed_precision="bf16", training__max_steps=4)
    for key in ("loss", "eval/loss"):
        single, sharded = rows(tmp_path / "single", key), rows(tmp_path / "fsdp2", key)
        for step, row in sharded.items():
            assert row[key] == pytest.approx(single[step][key], rel=3e-3)
            # A bf16 number has 8 significant bits: a loss that was rounded to bf16 would be a multiple of 2^-5 here.
            assert not math.isclose(row[key] * 2**5 % 1, 0, abs_tol=1e-9)


def test_a_rehearsed_step_changes_no_state():
    """Other tests compare the losses of each engine with those of one process. This one compares the state."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(layers.parameters(), lr=0.1, weight_decay=0.1)
    accelerator = Accelerator(cpu=True)
    try:
        engine = Single(accelerator)
        engine.model, engine.optimizer = layers, prepared = accelerator.prepare(layers, optimizer)
        for trained in (False, True):
            before = [p.detach().clone() for p in layers.parameters()]
            steps = {id(p): state["step"].item() for p, state in optimizer.state.items()}
            random = torch.get_rng_state()
            with engine.rehearsal():
                accelerator.backward(layers(torch.ones(2, 8)).sum() * 0.0)
                prepared.step()
                prepared.zero_grad()
            assert all(torch.equal(a, b) for a, b in zip(before, layers.parameters(), strict=True))
            assert steps == {id(p): state["step"].item() for p, state in optimizer.state.items()}
            assert torch.equal(random, torch.get_rng_state()) and optimizer.param_groups[0]["lr"] == 0.1
            if not trained:
                layers(torch.ones(2, 8)).sum().backward()
                prepared.step()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_files_set_nothing_that_the_recipe_sets():
    import yaml

    for path in sorted((ROOT / "accelerate_configs").glob("*.yaml")):
        text = path.read_text()
        assert text.splitlines()[1].startswith("# Memory"), path.name
        flat = json.dumps(yaml.safe_load(text))
        for word in ("batch_size", "accumulation", "clipping", "mixed_precision"):
            assert word not in flat, (path.name, word)


# The loss does not depend on an indexer that only selects tokens, and a class may freeze parameters drawn at random.
_TOY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64}  # fmt: skip
UNTRAINED = {
    "deepseek_v32": {"num_key_value_heads": 4, "v_head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 4,
                     "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
                     "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "first_k_dense_replace": 1, "index_n_heads": 2,
                     "index_head_dim": 16, "index_topk": 8},
    "hrm_text": {"num_layers_per_stack": 1, "head_dim": 8},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "model_type", "precision"),
    [
        ("ddp", "deepseek_v32", "no"),
        ("zero3", "hrm_text", "bf16"),
        pytest.param("zero3", "deepseek_v32", "no", marks=pytest.mark.slow),
        pytest.param("zero2", "deepseek_v32", "no", marks=pytest.mark.slow),
        pytest.param("zero1", "hrm_text", "bf16", marks=pytest.mark.slow),
        pytest.param("fsdp2", "deepseek_v32", "no", marks=pytest.mark.slow),
        pytest.param("fsdp2", "hrm_text", "bf16", marks=pytest.mark.slow),
        pytest.param("ddp", "hrm_text", "bf16", marks=pytest.mark.slow),
    ],
)
def test_parameters_that_are_not_trained_keep_their_values(tmp_path, name, model_type, precision):
    changes = {"model__config": {"model_type": model_type, **_TOY, **UNTRAINED[model_type]}}
    changes |= {"training__mixed_precision": precision}
    changes |= {"training__max_steps": 3, "checkpoint__every_steps": 2, "optimizer__weight_decay": 0.5}
    write_jsonl(tmp_path / "corpus.jsonl", small_text(200))
    recipe, run = write_recipe(tmp_path, **changes), tmp_path / "run"
    result = train(recipe, engine=name, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "not trained" in result.stderr
    untrained = json.loads((run / "environment.json").read_text())["untrained_parameters"]
    names = {*untrained["frozen_by_class"], *untrained["outside_loss"]}
    first = load_recipe(recipe)
    config = AutoConfig.from_pretrained(run / "config")
    drawn = dict(initialization.InitialWeights(build_model(first.model, config), first.seed))
    exported = dict(AutoModelForCausalLM.from_pretrained(run / "model").named_parameters())
    assert names and all(torch.equal(exported[key], drawn[key]) for key in names)
    before = rows(run, "loss")
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    result = train(recipe, engine=name, timeout=400)
    assert result.returncode == 0, result.stderr
    assert "step-00000002" in result.stderr
    assert {s: r["loss"] for s, r in rows(run, "loss").items()} == {s: r["loss"] for s, r in before.items()}
    resumed = dict(AutoModelForCausalLM.from_pretrained(run / "model").named_parameters())
    assert all(torch.equal(resumed[key], tensor) for key, tensor in exported.items())


@pytest.mark.parametrize("engine", ["single", pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_flash_attention_keeps_documents_apart_to_the_end_of_a_run(folder, engine):
    recipe = write_recipe(folder, training__micro_batch_size=4, training__max_steps=4, evaluation__every_steps=2)
    overrides = ["--training.document_masking=true", "--logging.every_steps=1"]
    runs = {"sdpa": folder / "sdpa", "flash_attention_2": folder / "flash"}
    for attention, run in runs.items():
        changes = [f"--model.attn_implementation={attention}", f"--output_dir={run}"]
        result = train(recipe, *overrides, *changes, engine=engine, processes=2, fault="flash_attention")
        assert result.returncode == 0, result.stderr
    assert json.loads((runs["flash_attention_2"] / "environment.json").read_text())["document_masking"] is True
    for key in ("loss", "eval/loss"):
        sdpa, flash = (rows(run, key) for run in runs.values())
        assert list(sdpa) == list(flash)
        for step, row in sdpa.items():
            assert flash[step][key] == pytest.approx(row[key], rel=1e-5)
