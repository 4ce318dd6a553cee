import json
import shutil
import subprocess
import sys
import time

import pytest
import torch
import yaml
from conftest import ROOT, environment, hfpretrain, rows, small_text, started_module, train, write_jsonl, write_recipe
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from hfpretrain import files, load_recipe, prepare
from hfpretrain.cli import main as main_of_cli
from hfpretrain.engines import pieces
from hfpretrain.recipe.schema import RecipeError
from hfpretrain.recipe.yaml import dump_recipe
from hfpretrain.train import main
from hfpretrain.training import run_folder
from hfpretrain.training.metrics_file import read_metrics
from hfpretrain.training.restore import decay_note, require_same_muon

# Dropout makes the result depend on the random state, the short schedule on the step.
DROPOUT_GPT2 = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run of 40 steps: its folder, and the result of the command."""
    folder = tmp_path_factory.mktemp("finished")
    write_jsonl(folder / "corpus.jsonl", small_text(200))
    recipe = write_recipe(
        folder,
        model__config=DROPOUT_GPT2,
        training__max_steps=40,
        checkpoint__every_steps=10,
        evaluation__every_steps=20,
        logging__every_steps=4,
        logging__trackers=["tensorboard"],
    )
    result = train(recipe)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_a_run_writes_its_records_evaluations_checkpoints_and_summary(finished):
    folder, result = finished
    run = folder / "run"
    assert load_recipe(run / "recipe.yaml") == load_recipe(folder / "recipe.yaml")
    recorded = json.loads((run / "environment.json").read_text())
    assert recorded["engine"] == "single" and recorded["num_processes"] == 1 and recorded["document_masking"] is True
    decays, others = json.loads((run / "optimizer.json").read_text())
    assert decays["weight_decay"] == 0.1 and "transformer.wte.weight" in decays["parameters"]
    assert others["weight_decay"] == 0.0 and "transformer.ln_f.weight" in others["parameters"]
    assert recorded["notes"] == [] and recorded["attn_implementation"] == "sdpa"
    steps = rows(run, "loss")
    assert list(steps) == list(range(4, 41, 4))
    assert {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu"} <= set(steps[40])
    assert steps[40]["tokens"] == 40 * 256 and steps[40]["loss"] < steps[4]["loss"]
    evaluations = rows(run, "eval/loss")
    assert list(evaluations) == [0, 20, 40]
    assert evaluations[40]["eval/perplexity"] < evaluations[0]["eval/perplexity"]
    assert 0 < evaluations[40]["eval/bits_per_byte"] < evaluations[0]["eval/bits_per_byte"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000030", "step-00000040"]
    assert list(run.glob("hfpretrain/**/events.out.tfevents*"))
    assert (run / "loss.png").stat().st_size > 5000
    for word in ("before training", "after training", "bits per byte", str(run / "model"), "sample"):
        assert word in result.stdout
    # The results stand after the costs.
    assert result.stdout.index("predicted") < result.stdout.index("after training")


def test_epochs_are_reported_and_recorded(finished):
    folder, result = finished
    rows_of_train = prepare(load_recipe(folder / "recipe.yaml")).manifest["splits"]["train-0"]["rows"]
    epochs = 40 * 256 / 32 / rows_of_train
    recorded = json.loads((folder / "run" / "environment.json").read_text())
    assert recorded["epochs"] == pytest.approx([epochs])
    assert f"epochs of the training text: {epochs:.2f}" in result.stderr
    assert f"epochs           {epochs:.2f}" in result.stdout
    assert f"epochs, by source: {epochs:.2f}" in (folder / "run" / "model" / "README.md").read_text()


def test_plain_transformers_loads_the_export(finished):
    folder, _ = finished
    model = folder / "run" / "model"
    code = (
        "import sys, json\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "print(json.dumps([m.num_parameters(), t.decode(m.generate(**t('the river', return_tensors='pt'), "
        "max_new_tokens=5)[0]), [x for x in sys.modules if x.startswith('hfpretrain')]]))"
    )
    command = [sys.executable, "-c", code, str(model)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=folder)
    parameters, text, ours = json.loads(result.stdout)
    assert text.startswith("the river") and ours == []
    recorded = json.loads((folder / "run" / "environment.json").read_text())
    assert parameters == recorded["num_parameters"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "loss.png"} <= {
        p.name for p in model.iterdir()
    }


def test_the_export_is_compared_with_the_training_process_and_verify_finds_damage(finished):
    folder, _ = finished
    (report,) = rows(folder / "run", "export/loss_export").values()
    assert report["export/max_token_loss_difference"] == 0.0 and report["export/precision"] == "float32"
    verified = hfpretrain("verify", str(folder / "run"))
    assert verified.returncode == 0 and "prepared_train-0_tokens" in verified.stdout
    (blocks,) = (folder / "prepared").glob("*/train-0/*.arrow")
    content = blocks.read_bytes()
    blocks.write_bytes(content[:-40] + bytes([content[-40] ^ 1]) + content[-39:])
    refused = hfpretrain("verify", str(folder / "run"))
    assert refused.returncode == 2 and f"{blocks} has another checksum" in refused.stderr
    blocks.write_bytes(content)
    broken = folder / "broken"
    shutil.copytree(folder / "run" / "model", broken / "model")
    shutil.copy(folder / "run" / "reference.safetensors", broken)
    state = load_file(broken / "model" / "model.safetensors")
    from safetensors.torch import save_file

    state["transformer.wte.weight"] = state["transformer.wte.weight"].roll(1, 0)
    save_file(state, broken / "model" / "model.safetensors", metadata={"format": "pt"})
    files.add_sums(broken / "model", [broken / "model" / "model.safetensors"])
    refused = hfpretrain("verify", str(broken))
    assert refused.returncode == 2 and "these are not the trained weights" in refused.stderr
    (broken / "model" / "model.safetensors").write_bytes(b"cut")
    (broken / "model" / files.SUMS).unlink()
    refused = hfpretrain("verify", str(broken))
    assert refused.returncode == 2 and "does not load" in refused.stderr and "Traceback" not in refused.stderr


def test_verify_finds_a_flipped_bit_in_any_file_of_the_export(finished, tmp_path):
    folder, _ = finished
    model = tmp_path / "model"
    shutil.copytree(folder / "run" / "model", model)
    with (model / "README.md").open("a") as card:
        card.write("words of a user")
    (model / "mine.gguf").write_text("mine")
    assert main_of_cli(["verify", str(model)]) == 0
    for path in sorted(model.iterdir()):
        whole = path.read_bytes()
        for position in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
            reason = files.sums_damage(model)
            assert path.name in (reason or "") if path.name not in ("README.md", "mine.gguf") else reason is None
        path.write_bytes(whole)
    (model / "config.json").rename(model / "config.json.mine")
    assert "config.json is missing" in files.sums_damage(model)
    checked = subprocess.run(["sha256sum", "--check", files.SUMS], cwd=folder / "run" / "model", capture_output=True)
    assert checked.returncode == 0, checked.stderr


def test_verify_names_a_damaged_file_and_accepts_exports_without_checksums(finished, tmp_path, capsys):
    folder, _ = finished
    shutil.copytree(folder / "run" / "model", tmp_path / "model")
    shutil.copy(folder / "run" / "reference.safetensors", tmp_path)
    weights = tmp_path / "model" / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[-1] ^= 1
    weights.write_bytes(whole)
    for given in (tmp_path, tmp_path / "model"):
        assert main_of_cli(["verify", str(given)]) == 2
        assert f"{weights} has another checksum" in capsys.readouterr().err
    whole[-1] ^= 1
    weights.write_bytes(whole)
    (tmp_path / "model" / files.SUMS).unlink()
    assert main_of_cli(["verify", str(tmp_path)]) == 0
    assert "older version" in capsys.readouterr().out
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    assert main_of_cli(["verify", str(tmp_path)]) == 2
    assert "adapter_config.json: is not part of the export" in capsys.readouterr().err


def test_the_card_contains_the_measured_results(finished):
    folder, _ = finished
    card = ModelCard.load(folder / "run" / "model" / "README.md")
    evaluation = rows(folder / "run", "eval/loss")[40]
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values["perplexity"] == pytest.approx(evaluation["eval/perplexity"], abs=1e-4)
    for text in ("max_steps: 40", "loss.png", "10,240 in 40 steps"):
        assert text in card.text


def test_evaluate_reproduces_the_results_of_training(finished):
    folder, _ = finished
    result = hfpretrain("evaluate", str(folder / "run" / "model"), str(folder / "recipe.yaml"))
    report, trained = json.loads(result.stdout), rows(folder / "run", "eval/loss")[40]
    assert report["loss"] == pytest.approx(trained["eval/loss"], rel=1e-6)
    assert report["bits_per_byte"] == pytest.approx(trained["eval/bits_per_byte"], rel=1e-6)
    assert report["tokens"] == trained["eval/tokens"] and report["document_masking"] is True
    command = ["evaluate", str(folder / "run" / "model"), "--data", str(folder / "corpus.jsonl"), "--block-size", "32"]
    slid = json.loads(hfpretrain(*command, "--stride", "8").stdout)
    assert slid["documents"] == 200 and slid["tokens"] > 200


def test_a_killed_run_with_a_damaged_checkpoint_ends_with_the_same_bytes(finished):
    folder, _ = finished
    run = folder / "killed"
    with started_module("hfpretrain.train", folder / "recipe.yaml", f"--output_dir={run}") as (process, _):
        while not (run / "checkpoints" / "step-00000020").exists() and process.is_alive():
            time.sleep(0.005)
    checkpoints = sorted((run / "checkpoints").glob("step-????????"))
    assert len(checkpoints) == 2
    # The newest checkpoint is damaged, and others are incomplete: none of them is used.
    victim = next(path for path in sorted(checkpoints[-1].rglob("*.distcp")))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    shutil.copytree(checkpoints[0], run / "checkpoints" / "step-00000039.incomplete")
    shutil.copytree(checkpoints[0], run / "checkpoints" / "step-00000038")
    (run / "checkpoints" / "step-00000038" / "manifest.json").unlink()
    result = train(folder / "recipe.yaml", f"--output_dir={run}")
    assert result.returncode == 0, result.stderr
    assert f"{victim} has another checksum" in result.stderr and f"resumed from {checkpoints[0]}" in result.stderr
    straight = folder / "run"
    assert (run / "model" / "model.safetensors").read_bytes() == (straight / "model" / "model.safetensors").read_bytes()
    for key in ("loss", "grad_norm", "lr"):
        assert {s: r[key] for s, r in rows(run, "loss").items()} == {
            s: r[key] for s, r in rows(straight, "loss").items()
        }
    assert list(rows(run, "eval/loss")) == [0, 20, 40]


def hardware(run):
    """The lines of a run's card about the hardware that it was trained on."""
    card = (run / "model" / "README.md").read_text().splitlines()
    return [line for line in card if line.startswith(("- hardware", "- throughput", "- time in training"))]


def test_a_finished_run_that_is_started_on_another_engine_keeps_its_weights_and_records(finished):
    folder, _ = finished
    run = folder / "run"
    before = load_file(run / "model" / "model.safetensors"), (run / "environment.json").read_text(), hardware(run)
    plan = (run / "plan.json").read_text()
    added = {"mine.gguf": "mine", "lora/adapter_model.safetensors": "lora"}
    for name, text in added.items():
        (run / "model" / name).parent.mkdir(exist_ok=True)
        (run / "model" / name).write_text(text)
    with (run / "model" / "README.md").open("a") as card:
        card.write("words of a user")
    result = train(folder / "recipe.yaml", engine="ddp")
    assert result.returncode == 0 and "resumed from" in result.stderr and "step 4/40" not in result.stderr
    after = load_file(run / "model" / "model.safetensors"), (run / "environment.json").read_text(), hardware(run)
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    for name, text in added.items():
        assert (run / "model" / name).read_text() == text
    assert "words of a user" in (run / "model" / "README.md").read_text()
    assert files.sums_damage(run / "model") is None
    assert before[1:] == after[1:] and (run / "plan.json").read_text() == plan
    assert "40 steps, single on" in result.stdout and "predicted" not in result.stdout, result.stdout


def test_a_resume_with_other_settings_reports_what_changes(finished):
    folder, _ = finished
    run = folder / "longer"
    shutil.copytree(folder / "run", run)
    arguments = [f"--output_dir={run}", "--training.max_steps=44", "--training.micro_batch_size=4"]
    arguments.append("--model.attn_implementation=eager")
    result = train(folder / "recipe.yaml", *arguments, engine="ddp")
    assert result.returncode == 0, result.stderr
    events = [row["event"] for row in read_metrics(run / "metrics.jsonl") if "event" in row]
    for text in (
        "training continues with ddp x2 on",
        "5.12e-06 in step 40 and 6.66e-05 in the next",
        "since step 40: training.micro_batch_size: is 4 now, was 2",
        "attention is eager; up to step 40 it was sdpa",
    ):
        assert text in result.stderr and any(text in event for event in events), (text, result.stderr)
    assert rows(run, "lr")[44]["lr"] < rows(run, "lr")[40]["lr"] * 1e3
    assert "single on" in result.stdout and "(steps 1 to 40), ddp x2 on" in result.stdout, result.stdout
    first, second, _ = hardware(run)
    assert "steps 1 to 40: single on" in first and "; steps 41 to 44: ddp x2 on" in first
    assert second.count("tokens/s") == 2 and hardware(folder / "run")[1].partition(" tokens/s")[0][-5:] in second
    assert "single x1, ddp x2" in hfpretrain("runs", str(run)).stdout


def test_the_summary_of_a_run_from_another_checkpoint_has_no_evaluation_before_training(finished):
    folder, _ = finished
    run, given = folder / "elsewhere", folder / "run" / "checkpoints" / "step-00000040"
    result = train(folder / "recipe.yaml", f"--output_dir={run}", f"--checkpoint.resume_from={given}")
    assert result.returncode == 0, result.stderr
    assert "before training" not in result.stdout and result.stdout.count("after training") == 1, result.stdout


def test_a_run_that_has_more_steps_than_its_recipe_is_refused(finished):
    folder, _ = finished
    result = train(folder / "recipe.yaml", "--training.max_steps=30")
    assert result.returncode == 2 and "is at step 40" in result.stderr and "training.max_steps" in result.stderr


def test_a_resume_reports_a_weight_decay_that_differs_from_an_earlier_version(tmp_path):
    now = ["h.0.q_norm.weight"]
    assert decay_note("adamw", tmp_path, now, now) is None
    assert "h.0.q_norm.weight" in decay_note("adamw", tmp_path, [], now)
    with pytest.raises(RecipeError, match=r"optimizer\.name: .* earlier version"):
        decay_note("muon", tmp_path, [], now)


def test_a_resume_is_refused_if_an_earlier_version_used_muon_for_other_parameters(tmp_path):
    one = torch.ones(2, 2)
    state = {"router": {"momentum_buffer": one}, "experts": {"exp_avg": one}, "q_proj": {"momentum_buffer": one}}
    pieces.save({"optimizer": state}, tmp_path / "saved")
    require_same_muon(tmp_path / "saved", [{"optimizer": "muon", "parameters": ["router", "q_proj", "later"]}])
    require_same_muon(tmp_path / "saved", [{"optimizer": "adamw", "parameters": ["q_proj"]}])
    with pytest.raises(RecipeError, match=r"optimizer\.name: .* differently for experts, router; "):
        require_same_muon(tmp_path / "saved", [{"optimizer": "muon", "parameters": ["experts", "q_proj"]}])


def test_a_resume_with_changed_text_is_refused(folder):
    recipe = write_recipe(folder, training__max_steps=4)
    assert train(recipe).returncode == 0
    write_jsonl(folder / "corpus.jsonl", small_text(210))
    result = train(recipe, "--training.max_steps=8")
    assert result.returncode == 2 and "sources or tokenizer have changed" in result.stderr


def test_a_resume_is_refused_if_the_consumed_tokens_changed_on_disk(folder):
    recipe = write_recipe(folder, training__max_steps=6, checkpoint__every_steps=3)
    assert train(recipe).returncode == 0
    (shard,) = (folder / "prepared").glob("*/train-0/*.arrow")
    content = bytearray(shard.read_bytes())
    # So many tokens are changed that some of them were consumed, whatever the order of the data.
    for index in range(len(content) // 2, len(content) // 2 + 8000, 64):
        content[index] ^= 1
    shard.write_bytes(content)
    result = train(recipe, "--training.max_steps=9")
    assert result.returncode == 2 and f"{shard} has another checksum" in result.stderr, result.stderr
    files.record_as_verified(shard.parent.parent)  # as if the bits had changed without a trace in the file's status
    result = train(recipe, "--training.max_steps=9")
    assert result.returncode == 2 and "are not those that" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


def test_metrics_count_the_tokens_of_each_source_across_stages_and_padding(folder):
    write_jsonl(folder / "second.jsonl", small_text(200, seed=1))
    sources = [
        {"path": "json", "data_files": str(folder / "corpus.jsonl"), "weight": 0.75, "max_epochs": 3},
        {"path": "json", "data_files": str(folder / "second.jsonl"), "weight": 0.25},
    ]
    stages = [{"from_tokens": 10 * 256, "weights": [0.5, 0.5]}]
    recipe = write_recipe(
        folder, data__sources=sources, data__stages=stages, data__packing="best_fit", training__max_steps=20
    )
    result = train(recipe)
    assert result.returncode == 0, result.stderr
    tokens = {step: row["source_tokens"] for step, row in rows(folder / "run", "source_tokens").items()}
    # 80 sequences at 3 to 1, then 80 at 1 to 1, less the padding.
    for step, expected in ((10, [60, 20]), (20, [100, 60])):
        assert all(0.8 * count * 32 < found <= count * 32 for found, count in zip(tokens[step], expected, strict=True))
    result = train(recipe, "--output_dir=" + str(folder / "long"), "--training.max_steps=2000")
    assert result.returncode == 2 and "data.sources.0.max_epochs: " in result.stderr
    assert not (folder / "long" / "metrics.jsonl").exists()


def test_the_ledger_is_independent_of_the_number_of_processes_and_of_resumes(folder):
    recipe = write_recipe(folder, training__max_steps=6, training__micro_batch_size=1, checkpoint__every_steps=3)
    ledgers = {}
    for engine, processes in ((None, 1), ("ddp", 4)):
        run = folder / f"run-{processes}"
        result = train(recipe, f"--output_dir={run}", engine=engine, processes=processes)
        assert result.returncode == 0, result.stderr
        ledgers[processes] = {step: row["ledger"] for step, row in rows(run, "ledger").items()}
    assert ledgers[1] == ledgers[4] and len(set(ledgers[1].values())) == 6
    shutil.rmtree(folder / "run-4" / "checkpoints" / "step-00000006")
    result = train(recipe, f"--output_dir={folder / 'run-4'}", engine="ddp", processes=2)
    assert result.returncode == 0 and "resumed from" in result.stderr, result.stderr
    assert {step: row["ledger"] for step, row in rows(folder / "run-4", "ledger").items()} == ledgers[1]


def test_a_run_without_an_intact_checkpoint_does_not_start_from_scratch(folder):
    recipe = write_recipe(folder, training__max_steps=4)
    assert train(recipe).returncode == 0
    next((folder / "run" / "checkpoints").glob("*/train_state.json")).unlink()
    before = (folder / "run" / "metrics.jsonl").read_text()
    for _ in range(2):
        result = train(recipe)
        assert result.returncode == 2 and "no checkpoint verifies" in result.stderr
    assert (folder / "run" / "metrics.jsonl").read_text() == before


def test_a_nan_stops_the_run_before_it_reaches_a_checkpoint(folder):
    recipe = write_recipe(folder, training__max_steps=40, checkpoint__every_steps=1, optimizer__lr=1e30)
    result = train(recipe, "--logging.every_steps=7")
    assert result.returncode == 1 and "stopped: the " in result.stderr and "Traceback" not in result.stderr
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert all(files.damage(path) is None for path in (folder / "run" / "checkpoints").iterdir())
    for path in (folder / "run" / "checkpoints").iterdir():
        dcp_to_torch_save(path, folder / "state.pt")
        state = torch.load(folder / "state.pt", weights_only=True)
        weights = [tensor for name, tensor in state.items() if name.startswith("model//")]
        assert len(weights) == 21 and all(tensor.isfinite().all() for tensor in weights), path


def test_a_folder_in_use_by_another_run_is_refused(folder):
    from filelock import FileLock

    (folder / "run").mkdir()
    with FileLock(folder / "run" / ".lock"):
        result = train(write_recipe(folder))
    assert result.returncode == 2 and "output_dir: " in result.stderr and "in use by another run" in result.stderr


def test_a_model_that_is_not_causal_is_refused(folder):
    bert = {"model_type": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    bert |= {"num_attention_heads": 4, "max_position_embeddings": 64}
    result = train(write_recipe(folder, model__config=bert))
    assert result.returncode == 2 and "not causal" in result.stderr


def test_verify_accepts_a_checkpoint(finished):
    folder, _ = finished
    path = folder / "run" / "checkpoints" / "step-00000040"
    assert files.damage(path) is None
    assert hfpretrain("verify", str(path)).returncode == 0


@pytest.fixture
def refused(folder, capsys):
    def run(*overrides, **changes):
        code = main([str(write_recipe(folder, **changes)), *overrides])
        captured = capsys.readouterr()
        assert code == 2 and "Traceback" not in captured.err
        return captured.err

    return run


def test_wrong_input_is_refused_with_its_key_and_value(folder, refused):
    assert "training.max_stepss: unknown key; did you mean `max_steps`?" in refused("--training.max_stepss=3")
    assert "model.config.hiden_size: unknown key; did you mean `hidden_size`?" in refused("--model.config.hiden_size=3")
    assert "missing.jsonl" in refused("--data.sources.0.data_files=missing.jsonl")
    assert "the tokenizer's 320" in refused("--model.config.vocab_size=300")
    assert "no file matches *.nowhere" in refused("--data.sources.0.data_files=*.nowhere")
    assert "no model can be built" in refused("--model.config.hidden_act=foo")
    assert "logging.trackers: " in refused("--logging.trackers=[foo]")
    assert "fp16 needs a GPU" in refused("--training.mixed_precision=fp16")
    assert "shell" in refused("--output_dir=~/x")
    assert "output_dir: /etc/passwd can't be used" in refused("--output_dir=/etc/passwd")
    assert "there is no folder 'nowhere'" in refused(tokenizer={"pretrained": "nowhere"})
    (folder / "empty.txt").write_text("")
    source = {"path": "text", "data_files": str(folder / "empty.txt"), "sample_by": "line"}
    assert "the corpus is empty" in refused(data__sources=[source], data__validation_fraction=0.0)
    (folder / "empty.jsonl").write_text("")
    assert "the corpus is empty" in refused(f"--data.sources.0.data_files={folder / 'empty.jsonl'}")
    (folder / "short.txt").write_text("a few words")
    source = {"path": "text", "data_files": str(folder / "short.txt"), "sample_by": "document"}
    assert "less than one block of 32" in refused(data__sources=[source], data__validation_fraction=0.0)
    (folder / "latin.txt").write_bytes(b"sch\xf6n")
    source = {"path": "text", "data_files": str(folder / "latin.txt"), "sample_by": "document"}
    assert "latin.txt:1: not valid UTF-8" in refused(data__sources=[source])
    assert main([str(folder / "no.yaml")]) == 2 and main([]) == 2


def test_a_model_class_with_another_loss_is_trained_on_the_next_token_loss(folder):
    bart = {
        "model_type": "bart",
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_ffn_dim": 64,
        "decoder_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    recipe = write_recipe(
        folder, model__config=bart, training__document_masking=False, training__max_steps=40, evaluation__every_steps=40
    )
    result = train(recipe)
    assert result.returncode == 0 and "BartForCausalLM does not compute the next-token loss" in result.stderr
    trained, evaluated = rows(folder / "run", "loss")[40]["loss"], rows(folder / "run", "eval/loss")[40]["eval/loss"]
    assert evaluated == pytest.approx(trained, rel=0.1)
    notes = json.loads((folder / "run" / "environment.json").read_text())["notes"]
    for text in (
        "not masked from each other",
        "computed from the logits",
        "the loss does not depend on them",
    ):
        assert sum(text in note for note in notes) == 1, notes
    for note in notes:
        assert note in result.stderr and note in result.stdout and note in (folder / "run/metrics.jsonl").read_text()
        assert note[1:] in (folder / "run" / "model" / "README.md").read_text()


def test_a_model_that_cannot_mask_documents_is_refused_if_masking_is_required(folder):
    bloom = {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4}
    result = train(write_recipe(folder, model__config=bloom, training__document_masking=True))
    assert result.returncode == 2 and "training.document_masking: packed documents can't be kept" in result.stderr
    assert "Traceback" not in result.stderr and "(got True)" in result.stderr
    result = train(folder / "recipe.yaml", "--training.document_masking=auto")
    assert result.returncode == 2 and "set it to false" in result.stderr and "(got 'auto')" in result.stderr
    # A run of an earlier version that left documents unmasked resumes with a recipe that states it.
    run = folder / "old"
    run.mkdir()
    (run / "environment.json").write_text('{"document_masking": false}')
    overrides = [f"--output_dir={run}", "--training.document_masking"]
    (run / "recipe.yaml").write_text(
        dump_recipe(load_recipe(folder / "recipe.yaml", [overrides[0], f"{overrides[1]}=auto"]))
    )
    run_folder.refuse_other_run(load_recipe(folder / "recipe.yaml", [overrides[0], f"{overrides[1]}=false"]))
    with pytest.raises(RecipeError, match=r"document_masking: is True now, was 'auto'"):
        run_folder.refuse_other_run(load_recipe(folder / "recipe.yaml", [overrides[0], f"{overrides[1]}=true"]))


def test_blocks_of_one_document_get_no_note_about_masking(folder):
    text = {"path": "text", "data_files": str(folder / "one.txt"), "sample_by": "document"}
    (folder / "one.txt").write_text(" ".join(small_text(60)))
    lfm2 = {
        "model_type": "lfm2",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "layer_types": ["conv", "full_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    one = {"data__sources": [text], "data__validation_by": "tail", "model__config": lfm2}
    assert train(write_recipe(folder, **one, training__max_steps=3)).returncode == 0
    recorded = json.loads((folder / "run" / "environment.json").read_text())
    assert recorded["document_masking"] is False and recorded["notes"] == []


def test_an_output_folder_with_a_run_of_another_recipe_is_left_unchanged(finished):
    folder, _ = finished
    before = (folder / "run" / "recipe.yaml").read_text()
    result = train(folder / "recipe.yaml", "--optimizer.lr=1e-5", "--seed=3", "--logging.every_steps=2")
    assert result.returncode == 2
    assert "contains a run of another recipe" in result.stderr
    assert "optimizer.lr: is 1e-05 now" in result.stderr and "seed: is 3 now" in result.stderr
    assert "logging" not in result.stderr
    other = folder / "without-recipe"
    shutil.copytree(folder / "run" / "checkpoints", other / "checkpoints")
    result = train(folder / "recipe.yaml", f"--output_dir={other}")
    assert result.returncode == 2 and "has checkpoints but no recipe.yaml" in result.stderr
    assert (folder / "run" / "recipe.yaml").read_text() == before


def test_a_launcher_that_starts_too_few_processes_is_refused(folder):
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_CPU",
        "num_processes": 2,
        "num_machines": 1,
    }
    (folder / "cpu.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "accelerate.commands.launch", "-q", "--config_file", str(folder / "cpu.yaml")]
    command += ["-m", "hfpretrain.train", str(write_recipe(folder))]
    result = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0 and "2 processes were requested, but 1 started" in result.stderr
    assert not (folder / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_layers_that_cannot_be_compiled_are_refused_before_the_first_step(folder):
    missing = {"CXX": "/nonexistent/c++", "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    result = train(write_recipe(folder), "--training.compile=true", **missing)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "training.compile: " in result.stderr and "InvalidCxxCompiler" in result.stderr
    assert "/nonexistent/c++" in result.stderr and "set it to false" in result.stderr
    assert not (folder / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("engine", [None, "ddp", "fsdp2", "zero3"])
def test_compiled_training_gives_the_same_losses(finished, engine):
    folder, _ = finished
    run = folder / f"compiled-{engine}"
    arguments = [f"--output_dir={run}", "--training.compile=true", "--training.max_steps=40"]
    result = train(folder / "recipe.yaml", *arguments, engine=engine)
    assert result.returncode == 0, result.stderr
    for step, row in rows(run, "loss").items():
        assert row["loss"] == pytest.approx(rows(folder / "run", "loss")[step]["loss"], rel=0.02)


@pytest.mark.slow
def test_compiled_layers_under_tensor_parallelism_give_the_same_losses(folder):
    recipe, compiled = write_recipe(folder), folder / "compiled"
    for arguments, engine in (([], None), ([f"--output_dir={compiled}", "--training.compile=true"], "tp")):
        result = train(recipe, *arguments, engine=engine)
        assert result.returncode == 0, result.stderr
    for step, row in rows(compiled, "loss").items():
        assert row["loss"] == pytest.approx(rows(folder / "run", "loss")[step]["loss"], rel=1e-4)
