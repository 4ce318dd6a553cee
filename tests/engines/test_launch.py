import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, write_recipe
from small import train  # some settings are read from the command line of a real launcher
from transformers import AutoConfig

from hfpretrain.engines import choose, launch
from hfpretrain.recipe.schema import RecipeError

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}


def sizes(processes, **dimensions):
    """The environment variables that the launcher sets for a `parallelism_config` section."""
    names = {f"PARALLELISM_CONFIG_{name.upper()}_SIZE": str(size) for name, size in dimensions.items()}
    return {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "WORLD_SIZE": str(processes), **names}


@pytest.fixture
def ask(monkeypatch):
    """A function that returns the message for environment variables; empty if they are supported."""

    def message(environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        try:
            choose.require_supported()
        except RecipeError as error:
            return str(error)
        return ""

    return message


@pytest.mark.parametrize(
    ("environment", "key", "reason"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "distributed_type", "MEGATRON_LM"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_config.fsdp_version", "set it to 2"),
        ({**FSDP, "FSDP_IGNORED_MODULES": "lm_head"}, "fsdp_config.fsdp_ignored_modules", "remove it"),
        ({**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, "fsdp_config.fsdp_reshard_after_forward",
         "must be true or false (got FULL_SHARD)"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "deepspeed_config.zero_stage", "use ddp.yaml"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "deepspeed_config.offload_param_device",
         "must be cpu or none (got nvme)"),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "fsdp_config.fsdp_activation_checkpointing",
         "set model.gradient_checkpointing"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_config.dynamo_backend", "set training.compile"),
        ({"ACCELERATE_DOWNCAST_BF16": "true"}, "distributed_type", "XLA"),
        ({**DEEPSPEED, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "deepspeed_config.gradient_accumulation_steps",
         "set training.tokens_per_step"),
        ({**DEEPSPEED, "ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "deepspeed_config.gradient_clipping",
         "set training.max_grad_norm"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "/nowhere.json"}, "deepspeed_config.deepspeed_config_file",
         "/nowhere.json can't be read"),
        ({**DEEPSPEED, **sizes(2, tp=2)}, "parallelism_config", "ZeRO"),
        ({**DEEPSPEED, **sizes(2, cp=2)}, "parallelism_config.parallelism_config_cp_size", "accepts no mask"),
        ({**FSDP, **sizes(2, cp=2)}, "parallelism_config.parallelism_config_cp_size", "no CPU kernels"),
        ({**DEEPSPEED, **sizes(2, sp=2)}, "parallelism_config.parallelism_config_sp_size", "use zero3_ulysses.yaml"),
        ({**FSDP, **sizes(2, sp=2)}, "parallelism_config.parallelism_config_sp_size", "use zero3_ulysses.yaml"),
        ({**DEEPSPEED, **sizes(2, dp_shard=2)}, "parallelism_config", "ZeRO"),
        (sizes(3, tp=2), "parallelism_config", "tp 2 need 2 processes, but num_processes is 3"),
        ({**FSDP, **sizes(2)}, "parallelism_config", "all sizes 1 need 1 processes, but num_processes is 2"),
        ({**FSDP, **sizes(4, dp_shard=2, tp=2)}, "parallelism_config.parallelism_config_tp_size", "use tp.yaml"),
        (sizes(4, dp_replicate=2, tp=2), "parallelism_config.parallelism_config_tp_size", "use tp.yaml"),
        ({**FSDP, **sizes(2, dp_replicate=2)}, "parallelism_config.parallelism_config_dp_shard_size", "use ddp.yaml"),
        (sizes(2, dp_shard=2), "parallelism_config.parallelism_config_dp_shard_size", "set distributed_type to FSDP"),
    ],
)  # fmt: skip
def test_an_unsupported_setting_is_refused_with_its_key_and_a_fix(ask, environment, key, reason):
    message = ask(environment)
    assert message.startswith(f"{key}: ") and reason in message and "\n" not in message


def test_all_settings_that_are_refused_are_listed_at_once(ask):
    environment = {**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}
    lines = ask({**environment, "FSDP_IGNORED_MODULES": "lm_head", **sizes(2, sp=2)}).splitlines()
    keys = ["dynamo_config.dynamo_backend", "fsdp_config.fsdp_ignored_modules"]
    keys += ["fsdp_config.fsdp_activation_checkpointing", "parallelism_config.parallelism_config_sp_size"]
    assert sorted(line.partition(": ")[0] for line in lines) == sorted(keys)


def test_a_deepspeed_file_may_not_set_what_the_recipe_sets(ask, tmp_path):
    path = tmp_path / "deepspeed.json"
    where = {"zero_optimization": {"stage": 2}, "train_batch_size": "auto", "bf16": {"enabled": "auto"}}
    path.write_text(json.dumps(where))
    assert ask({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}) == ""
    path.write_text(json.dumps({}))
    assert "zero_optimization.stage: must be 1, 2 or 3 (got 0)" in ask({})
    path.write_text(json.dumps({**where, "train_batch_size": 8, "optimizer": {"type": "Adam"}, "curriculum": {"a": 1}}))
    first, second, third = ask({}).splitlines()
    assert "train_batch_size: is set by the recipe" in first and "training.tokens_per_step" in first
    assert "optimizer: is set by the recipe" in second
    assert "curriculum: " in third and "remove it" in third


@pytest.mark.parametrize(
    "environment",
    [
        {},
        FSDP,
        DEEPSPEED,
        sizes(2, tp=2),
        {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", **sizes(4, dp_shard=2, sp=2)},
        {**FSDP, **sizes(4, dp_replicate=2, dp_shard=2)},
    ],
)
def test_the_settings_of_the_shipped_files_are_accepted(ask, environment):
    assert ask(environment) == ""


def test_use_cpu_on_a_machine_with_an_accelerator_is_refused(ask, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert ask({"ACCELERATE_USE_CPU": "True"}) == ""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert ask({}).startswith("use_cpu: ")


@pytest.mark.parametrize(
    ("dimension", "model_type", "changes", "reason"),
    [
        ("tp", "gpt2", {}, "plan for gpt2"),
        ("tp", "qwen3_moe", {}, "fused matrices of qwen3_moe"),
        ("tp", "llama", {"hidden_size": 36, "num_attention_heads": 9}, "num_attention_heads, 9"),
        ("tp", "llama", {"num_key_value_heads": 1}, "num_key_value_heads, 1"),
        ("sp", "llama", {"num_key_value_heads": 1}, "num_key_value_heads, 1"),
        ("sp", "llama", {"attn": "eager"}, "set it to sdpa"),
        ("sp", "llama", {"block_size": 31}, "data.block_size, 31"),
        ("sp", "gpt2", {}, "has no num_key_value_heads"),
        ("sp", "gemma3_text", {}, "DeepSpeed drops the mask of sliding_attention layers"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_cut_is_refused(dimension, model_type, changes, reason):
    attention, block_size = changes.pop("attn", "sdpa"), changes.pop("block_size", 32)
    config = AutoConfig.for_model(model_type, **changes)
    choose.require_model("ddp", 1, config, attention, block_size)
    with pytest.raises(RecipeError) as error:
        choose.require_model({"tp": "tp", "sp": "zero3_ulysses"}[dimension], 2, config, attention, block_size)
    key = f"parallelism_config.parallelism_config_{dimension}_size: "
    assert reason in str(error.value) and all(line.startswith(key) for line in str(error.value).splitlines())


def test_accelerate_files_have_the_same_keys_in_the_same_order():
    import yaml

    order = ["compute_environment", "distributed_type", "num_machines", "num_processes"]
    sections = {"fsdp_config", "deepspeed_config", "parallelism_config"}
    found: dict = {}
    for path in sorted((ROOT / "accelerate_configs").glob("*.yaml")):
        settings = yaml.safe_load(path.read_text())
        keys = list(settings)
        assert keys[:4] == order and set(keys[4:]) <= sections, path.name
        lines = path.read_text().splitlines()
        assert lines[0].startswith("# ") and lines[1].startswith("# Memory") and len(lines[0]) <= 120, path.name
        for section in keys[4:]:
            reference = found.setdefault(section, list(settings[section]))
            shorter, longer = sorted((list(settings[section]), reference), key=len)
            assert [key for key in longer if key in shorter] == shorter, (path.name, section)


def test_the_requested_processes_are_read_like_the_launcher_reads_them():
    ddp = str(ROOT / "accelerate_configs" / "ddp.yaml")
    module = ["-m", "hfpretrain.train", "x.yaml", "--num_processes=7"]
    for start in (["accelerate", "launch"], ["python", "/bin/accelerate", "launch"], ["accelerate-launch"],
                  ["python", "-m", "accelerate.commands.launch"]):  # fmt: skip
        assert launch.requested_processes([*start, "--config_file", ddp, *module]) == 2
        assert launch.requested_processes([*start, "--config_file", ddp, "--num_processes", "4", *module]) == 4
        assert launch.requested_processes([*start, "--num-processes=3", *module]) == 3
    assert launch.requested_processes(["python", "-m", "hfpretrain.train", "x.yaml"]) is None
    assert launch.requested_processes(["bash", "-c", "accelerate launch"]) is None


def test_an_option_of_the_command_line_that_accelerate_would_ignore_is_refused(folder):
    """accelerate uses these options only with DeepSpeed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "accelerate_configs" / "single.yaml"), "--gradient_accumulation_steps", "4"]
    command += ["-m", "hfpretrain.train", str(write_recipe(folder))]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.returncode != 0
    assert "--gradient_accumulation_steps: is set by the recipe" in result.stderr


@pytest.mark.parametrize(
    ("engine", "line", "message"),
    [
        ("fsdp2", "  fsdp_offload_parms: true", "fsdp_config.fsdp_offload_parms: unknown key; did you mean"),
        ("single", "fsdp_config: {fsdp_version: 2}", "fsdp_config: is ignored"),
        pytest.param("fsdp2", "  fsdp_transformer_layer_cls_to_wrap: NoSuchLayer", "has no NoSuchLayer",
                     marks=pytest.mark.slow),
        pytest.param("fsdp2", "  fsdp_auto_wrap_policy: WRAP", "fsdp_config: ", marks=pytest.mark.slow),
        pytest.param("fsdp2", "  fsdp_offload_params: maybe", "fsdp_config: ", marks=pytest.mark.slow),
        pytest.param("zero2", "deepspeed_config: {zero_stge: 3}", "deepspeed_config.zero_stage: ",
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_line_of_the_file_that_accelerate_would_ignore_is_refused(folder, engine, line, message):
    path = folder / f"{engine}.yaml"
    text = (ROOT / "accelerate_configs" / path.name).read_text()
    path.write_text(f"{text.rstrip()}\n{line}\n")
    result = train(write_recipe(folder), engine=str(path.with_suffix("")))
    assert result.returncode != 0 and message in result.stderr, result.stderr


@pytest.mark.skipif(Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists(), reason="is for hosts without GPUs")
@pytest.mark.parametrize(
    ("chosen", "seen"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_the_variable_that_makes_threads_sleep_is_set_before_torch_is_imported(tmp_path, chosen, seen):
    (tmp_path / "torch.py").write_text("import os; print(os.environ.get('GOMP_SPINCOUNT'), flush=True); os._exit(0)")
    env = {key: value for key, value in environment(PYTHONPATH=str(tmp_path)).items() if key != "GOMP_SPINCOUNT"}
    for arguments in (["hfpretrain.train", "quickstart"], ["hfpretrain.cli", "generate", "model"]):
        command = [sys.executable, "-m", *arguments]
        result = subprocess.run(command, cwd=ROOT, env=env | chosen, capture_output=True, text=True, timeout=120)
        assert result.stdout == f"{seen}\n", result


def test_the_report_of_the_launcher_ends_with_the_error(folder):
    result = train(write_recipe(folder), "--learning_rate=1", engine="ddp")
    assert result.returncode == 1 and result.stderr.startswith("error in ")
    first, *_, message, _ = [line for line in result.stderr.splitlines() if line.strip()]
    assert first.startswith("error in ") and message.strip().startswith("learning_rate: unknown key; use ")
