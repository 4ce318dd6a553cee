import gzip

import pytest
import torch
from conftest import hfpretrain, recipe_mapping, small_text, train, write_jsonl, write_recipe
from hub_server import HubServer
from transformers import AutoConfig, AutoModelForCausalLM
from warm import WarmProcess

from hfpretrain import load_recipe
from hfpretrain.data.tokenizer import train_tokenizer
from hfpretrain.recipe.schema import Recipe, RecipeError
from hfpretrain.recipe.shipped import find_file
from hfpretrain.training.preflight import (
    check_small_model,
    disk_problems,
    engine_problems,
    require_buildable_model,
    resource_problems,
)


def problems(folder, *overrides, **changes):
    return {
        problem.path: problem.message
        for problem in resource_problems(load_recipe(write_recipe(folder, **changes), overrides))
    }


@pytest.fixture
def model(folder):
    """A folder with a small model in several files, and its tokenizer."""
    recipe = load_recipe(write_recipe(folder))
    config = AutoConfig.for_model(**recipe.model.config, vocab_size=320)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base", max_shard_size="50KB")
    train_tokenizer(recipe.tokenizer, small_text(50)).save_pretrained(folder / "base")
    return folder / "base"


def continued(base):
    return {"model": {"pretrained": str(base)}, "tokenizer": {"pretrained": str(base)}}


def test_a_recipe_whose_files_all_exist_has_no_problem(folder, model):
    assert problems(folder) == {} and problems(folder, **continued(model)) == {}


def test_missing_and_damaged_data_are_reported_with_their_key(folder):
    key = "data.sources.0.data_files"
    assert "no file matches" in problems(folder, f"--{key}={folder / 'none.jsonl'}")[key]
    assert "there is no file or folder" in problems(folder, "--data.sources.0.path=./none")["data.sources.0.path"]
    assert "no column 'body'" in " ".join(problems(folder, "--data.sources.0.text_column=body").values())
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 3)[:15])
    found = problems(folder, f"--data.sources.0.data_files={folder / 'cut.jsonl.gz'}")
    assert "cannot be read further" in found["data.sources.0"]
    write_jsonl(folder / "held.jsonl", small_text(3))
    sources = [{"path": "json", "data_files": str(folder / name)} for name in ("held.jsonl", "none.jsonl")]
    found = problems(folder, data__validation_sources=sources, data__validation_fraction=0.0)
    assert list(found) == ["data.validation_sources.1.data_files"]


def test_an_incomplete_model_folder_is_reported(folder, model):
    assert "config.json" in problems(folder, **continued(folder))["model.pretrained"]
    shards = sorted(model.glob("*.safetensors"))
    assert len(shards) > 1
    content = shards[0].read_bytes()
    shards[0].write_bytes(content[:-10])
    assert f"{shards[0]} is damaged" in problems(folder, **continued(model))["model.pretrained"]
    shards[0].unlink()
    assert f"{shards[0]} is missing" in problems(folder, **continued(model))["model.pretrained"]
    (model / "model.safetensors.index.json").write_text("[]")
    assert "can't be read" in problems(folder, **continued(model))["model.pretrained"]
    (model / "model.safetensors.index.json").unlink()
    assert "has no weights" in problems(folder, **continued(model))["model.pretrained"]
    (model / "tokenizer.json").unlink()
    assert "no tokenizer" in problems(folder, **continued(model))["tokenizer.pretrained"]


def test_unusable_folders_and_checkpoints_are_reported(folder):
    (folder / "file").write_text("")
    assert "is a file" in problems(folder, f"--output_dir={folder / 'file' / 'run'}")["output_dir"]
    assert "not a checkpoint" in problems(folder, f"--checkpoint.resume_from={folder}")["checkpoint.resume_from"]
    lm_eval = {"tasks": ["x"], "include_path": str(folder / "none")}
    found = problems(folder, evaluation={"lm_eval": lm_eval, "trust_remote_code": True})
    assert "there is no folder" in found["evaluation.lm_eval.include_path"]
    write_recipe(folder, output_dir=str(folder / "other")).rename(folder / "other.yaml")
    (folder / "other").mkdir()
    (folder / "other.yaml").rename(folder / "other" / "recipe.yaml")
    found = problems(folder, f"--output_dir={folder / 'other'}", "--optimizer.lr=1e-4")
    assert "another recipe" in found["output_dir"] and "optimizer.lr" in found
    assert disk_problems(folder / "run", 2**60)[0].path == "output_dir"
    assert not disk_problems(folder / "run", 2**20)


def test_a_wrong_engine_file_or_number_of_processes_is_reported(folder):
    recipe = load_recipe(write_recipe(folder))
    training, data = recipe.training, recipe.data
    assert engine_problems(training, data, find_file("ddp", "engine"), 2) == []
    (found,) = engine_problems(training, data, find_file("ddp", "engine"), 3)
    assert found.path == "training.micro_batch_size" and "3 process(es)" in found.message
    (folder / "wrong.yaml").write_text("distributed_type: MULTI_GPU\nnum_procs: 3\n")
    (found,) = engine_problems(training, data, folder / "wrong.yaml", None)
    assert "is not an accelerate config file" in found.message


def test_missing_hub_repos_are_reported_online_and_offline(folder, model):
    missing = continued("user/none")
    assert "cache has no such model" in problems(folder, **missing)["model.pretrained"]
    for name in ("user/none", "none"):  # old datasets of the Hub have no user in their names
        absent = problems(folder, data__sources=[{"path": name}])
        assert "cache has no such dataset" in absent["data.sources.0.path"]
    with HubServer() as hub, WarmProcess(hub.environment(folder / "home")) as warm:
        assert warm.run("hfpretrain.cli", "push", model, "user/base").returncode == 0
        good = warm.run("hfpretrain.cli", "check", write_recipe(folder, **continued("user/base")))
        assert good.returncode == 0, good.stderr
        data = {"data__sources": [{"path": "user/texts"}]}
        wrong = warm.run("hfpretrain.cli", "check", write_recipe(folder, **missing, **data))
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
    for key in ("model.pretrained", "tokenizer.pretrained", "data.sources.0.path"):
        assert key in wrong.stderr
    assert wrong.stderr.count("404") == 3


def test_check_exits_with_2_and_reports_all_problems(folder):
    (folder / "readable").mkdir()
    keys = ["--data.sources.0.data_files=none.jsonl", "--tokenizer={pretrained: ./none}"]
    result = hfpretrain("check", str(write_recipe(folder)), *keys)
    assert result.returncode == 2 and "Traceback" not in result.stderr and result.stdout == ""
    assert "no file matches none.jsonl" in result.stderr and "tokenizer.pretrained: there is no" in result.stderr
    wrong = hfpretrain("check", str(write_recipe(folder)), "--scheduler.scheduler_specific_kwargs={min_lr: 1}")
    assert wrong.returncode == 2 and "scheduler.scheduler_specific_kwargs: " in wrong.stderr
    assert "--engine" in hfpretrain("check", str(write_recipe(folder)), "--engine", "ddpp").stderr


BLOOM = {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4}


def test_a_no_decay_pattern_without_a_match_fails_before_text_is_read(folder):
    path = write_recipe(folder, optimizer__no_decay=["*embed_tokens*", "*.wte.*"])
    for command in (train, lambda path: hfpretrain("check", str(path))):
        result = command(path)
        assert result.returncode == 2 and "optimizer.no_decay.1: " in result.stderr and "'*.wte.*'" in result.stderr
    assert not load_recipe(path).prepared_dir.exists()


def test_a_model_that_cannot_be_built_is_refused(folder):
    musicgen = recipe_mapping(folder, model__config={"model_type": "musicgen"})
    with pytest.raises(RecipeError, match=r"model\.config: no model can be built: "):
        recipe = Recipe.model_validate(musicgen)
        require_buildable_model(recipe.model, recipe.optimizer, recipe.training)


def test_check_runs_the_tests_of_training_on_a_small_model(folder):
    def check(config, packs_documents=True, **changes):
        recipe = Recipe.model_validate(recipe_mapping(folder, model__config=config, **changes))
        return check_small_model(recipe.model, recipe.training, recipe.data, packs_documents)

    llama = recipe_mapping(folder)["model"]["config"]
    match = r"training\.document_masking: "
    assert check(llama) == check(BLOOM, training__document_masking=False) == check(BLOOM, packs_documents=False) == []
    with pytest.raises(RecipeError, match=match):
        check(BLOOM)
    with pytest.raises(RecipeError, match=match):
        check(BLOOM, packs_documents=False, training__document_masking=True)
    (note,) = check({**llama, "vocab_size": 2**22})  # too large to build here
    assert "is tested when training starts" in note
    mixtral = {**llama, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    (note,) = check(mixtral)
    assert "a balancing loss is added, with weight 0.001, over the tokens of a whole step" in note
    bert = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    with pytest.raises(RecipeError, match="is not causal"):
        check({**bert, "intermediate_size": 48})
    with pytest.raises(RecipeError, match=r"training\.chunked_loss: "):
        bart = {"model_type": "bart", "d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4}
        changes = {"training__chunked_loss": True, "training__document_masking": False}
        check({**bart, "decoder_ffn_dim": 48, "max_position_embeddings": 64}, **changes)


def test_check_reads_unprepared_text_to_find_blocks_of_several_documents(folder):
    def check(texts, packing="concat"):
        write_jsonl(folder / "corpus.jsonl", texts)
        changes = {"model__config": BLOOM, "data__packing": packing}
        recipe = Recipe.model_validate(recipe_mapping(folder, **changes))
        return check_small_model(recipe.model, recipe.training, recipe.data, None)

    for texts, packing in ((["a" * 1000], "concat"), (["a" * 1000] * 9, "best_fit")):
        (note,) = check(texts, packing)
        assert "several documents" in note and "training.document_masking: false" in note
    for texts, packing in ((["a" * 1000] * 9, "concat"), (["short"] * 9, "best_fit")):
        with pytest.raises(RecipeError, match=r"training\.document_masking"):
            check(texts, packing)
