"""Downstream tasks of lm-eval: the figures are the same with every engine, on the export, and in lm-eval itself."""

import functools
import json
import math

import pytest
import torch
import yaml
from conftest import hfpretrain, rows, small_text, train, write_jsonl, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfpretrain.evaluation.lm_eval_tasks import Tasks, figures
from hfpretrain.evaluation.token_perplexity import TokenPerplexity
from hfpretrain.recipe.schema import LmEvalSection, RecipeError

DOCUMENTS = [text[:60] for text in small_text(7, seed=1)]


@pytest.fixture(scope="module")
def tasks_folder(tmp_path_factory):
    """A folder with three tasks: multiple choice, a text to score and a text to continue."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = [
        {"question": f"the river {word} under", "choices": ["stone", "light", "quiet water"], "answer": at % 3}
        for at, word in enumerate(("runs", "falls", "over", "green", "quiet"))
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    write_jsonl(folder / "documents.jsonl", DOCUMENTS)
    choice = {
        "task": "river_choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    scored = {
        "task": "river_text",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }
    continued = {
        "task": "river_continued",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task, data in ((choice, "questions"), (scored, "documents"), (continued, "questions")):
        files = {"data_files": {"test": str(folder / f"{data}.jsonl")}}
        task |= {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tasks_folder):
    """A function that trains a recipe with an engine and returns the run folder. Each engine is trained once."""
    folder = tmp_path_factory.mktemp("runs")
    write_jsonl(folder / "corpus.jsonl", small_text(200))
    wanted = {
        "tasks": ["river_choice", "river_text", "river_continued"],
        "include_path": str(tasks_folder),
        "every_steps": 2,
    }
    recipe = write_recipe(
        folder,
        training__max_steps=3,
        evaluation__lm_eval=wanted,
        evaluation__trust_remote_code=True,
        evaluation__prompts=["the"],
        evaluation__sample_tokens=2,
    )

    @functools.cache
    def run(engine=None):
        path = folder / (engine or "single")
        result = train(recipe, f"--output_dir={path}", engine=engine, processes=engine and 2)
        assert result.returncode == 0, result.stderr
        assert "river_text/bits_per_byte" in result.stderr
        return path

    return run


@pytest.mark.slow
def test_two_processes_with_half_a_model_each_give_the_same_figures(runs):
    alone, sharded = (rows(runs(engine), "tasks/river_text/bits_per_byte") for engine in (None, "fsdp2"))
    assert list(alone) == list(sharded) == [2, 3]
    for step in alone:
        assert alone[step].keys() == sharded[step].keys() >= {"tasks/river_choice/acc", "tasks/river_choice/acc_stderr"}
        assert alone[step] == pytest.approx(sharded[step], rel=1e-5)


def test_the_export_gives_the_figures_of_the_run(runs, tasks_folder):
    alone = rows(runs(), "tasks/river_text/bits_per_byte")
    names = "river_choice,river_text,river_continued"
    model = str(runs() / "model")
    result = hfpretrain("evaluate", model, "--tasks", names, "--include-path", str(tasks_folder), "--batch-size", "3")
    assert result.returncode == 0, result.stderr
    exported = figures(json.loads(result.stdout)["tasks"]["results"])
    assert {f"tasks/{name}": value for name, value in exported.items()} == pytest.approx(
        {name: value for name, value in alone[3].items() if name.startswith("tasks/")}, rel=1e-5
    )


def test_figures_equal_those_of_lm_eval_itself_and_of_token_perplexity(runs, tasks_folder):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    path = str(runs() / "model")
    row = rows(runs(), "tasks/river_text/bits_per_byte")[3]
    found = simple_evaluate(
        HFLM(pretrained=path, device="cpu", batch_size=1),
        tasks=["river_choice", "river_text"],
        task_manager=TaskManager(include_path=str(tasks_folder), include_defaults=False),
        bootstrap_iters=1000,
    )
    for name, value in figures(found["results"]).items():
        assert row[f"tasks/{name}"] == pytest.approx(value, rel=1e-5), name

    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    nll, tokens, num_bytes = 0.0, 0, 0
    for text in DOCUMENTS:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(text)]])
        assert ids.shape[1] <= model.config.max_position_embeddings + 1
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits.double()
        nll += torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
        tokens, num_bytes = tokens + ids.shape[1] - 1, num_bytes + len(text.encode())
    ours = TokenPerplexity().compute(nll=[nll], tokens=[tokens], content_nll=[nll], bytes=[num_bytes])
    assert row["tasks/river_text/bits_per_byte"] == pytest.approx(ours["bits_per_byte"], rel=1e-5)
    words = sum(len(text.split()) for text in DOCUMENTS)
    assert row["tasks/river_text/word_perplexity"] == pytest.approx(math.exp(nll / words), rel=1e-4)


def test_tasks_that_do_not_load_are_refused_at_the_start(folder, tasks_folder):
    def refused(**changes):
        section = {"tasks": ("river_text",), "include_path": str(tasks_folder), **changes}
        with pytest.raises(RecipeError) as caught:
            Tasks(LmEvalSection(**section), "evaluation.lm_eval.tasks")
        return str(caught.value)

    assert "did you mean river_text" in refused(tasks=("river_txt",))
    assert "does not exist" in refused(include_path=str(folder / "none"))
    (folder / "broken.yaml").write_text((tasks_folder / "river_text.yaml").read_text().replace("documents", "gone"))
    assert "loading river_text failed" in refused(include_path=str(folder))
    wanted = {"tasks": ["river_txt"], "include_path": str(tasks_folder)}
    result = train(write_recipe(folder, evaluation__lm_eval=wanted))
    assert result.returncode == 2 and "evaluation.lm_eval.include_path: task files in" in result.stderr
    recipe = write_recipe(folder, evaluation__lm_eval=wanted, evaluation__trust_remote_code=True)
    result = train(recipe)
    assert result.returncode == 2 and "evaluation.lm_eval.tasks: 'river_txt'" in result.stderr
    assert "Traceback" not in result.stderr
    result = hfpretrain("evaluate", "nowhere", "--tasks", "river_text", "--limit", "0")
    assert result.returncode == 2 and "--limit" in result.stderr
