"""The scripts of examples/ that take a checkpoint, with a checkpoint of hfpretrain; they don't import hfpretrain."""

import ast
import gzip
import json
import random
import re
import subprocess
import sys

import pytest
from conftest import ROOT, environment, hfpretrain, script, small_text, train, write_jsonl, write_recipe
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hfpretrain import evaluate_perplexity

EXAMPLES = ROOT / "examples"
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}{% endfor %}"
TEXTS = [text[:60] for text in small_text(8, seed=5)]
MESSAGES = [[{"role": "user", "content": t[:20]}, {"role": "assistant", "content": t[20:40]}] for t in TEXTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a chat template, and files of documents, chats and labels."""
    folder = tmp_path_factory.mktemp("examples")
    write_jsonl(folder / "corpus.jsonl", small_text(200))
    (folder / "chat.jinja").write_text(TEMPLATE)
    write_jsonl(folder / "text.jsonl", TEXTS)
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in MESSAGES))
    labels = [{"text": t[:60], "label": int("river" in t[:60])} for t in small_text(64, seed=6)]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    recipe = write_recipe(folder, training__max_steps=30, tokenizer__chat_template=str(folder / "chat.jinja"))
    result = train(recipe)
    assert result.returncode == 0, result.stderr
    return folder


def run(name, *arguments):
    result = script(EXAMPLES / f"{name}.py", *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def step_0_loss(output):
    return float(re.search(r"step 0: loss ([\d.]+)", output)[1])


def evaluated_loss(folder, texts):
    """The loss of documents, each evaluated alone."""
    report = evaluate_perplexity(folder / "run" / "model", {str(n): [text] for n, text in enumerate(texts)})
    return report["loss"]


def test_examples_do_not_import_hfpretrain():
    for path in EXAMPLES.glob("*.py"):
        if path.stem != "own_loop":
            modules = {
                getattr(node, "module", None) or alias.name
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, (ast.Import, ast.ImportFrom))
                for alias in node.names
            }
            assert not any(module.startswith("hfpretrain") for module in modules), path


@pytest.mark.parametrize("lora", [[], ["--lora"]], ids=["full", "lora"])
def test_sft_begins_at_the_evaluated_loss(folder, lora):
    model, output = folder / "run" / "model", folder / f"sft{len(lora)}"
    printed = run("sft", model, folder / "text.jsonl", output, "--steps", 2, *lora)
    assert step_0_loss(printed) == pytest.approx(evaluated_loss(folder, TEXTS), abs=1e-5)
    tuned, before = (dict(AutoModelForCausalLM.from_pretrained(m).named_parameters()) for m in (output, model))
    assert tuned.keys() == before.keys() and any(not tuned[name].equal(before[name]) for name in tuned)


def test_sft_formats_messages_with_the_recipes_chat_template(folder):
    model = folder / "run" / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.chat_template == TEMPLATE and (model / "chat_template.jinja").read_text() == TEMPLATE
    assert "<|endoftext|>assistant: " in tokenizer.apply_chat_template(MESSAGES[0], tokenize=False)
    printed = run("sft", model, folder / "chat.jsonl", folder / "chat", "--steps", 2)
    assert 3 < step_0_loss(printed) < 7
    assert AutoTokenizer.from_pretrained(folder / "chat").chat_template == TEMPLATE


def test_run_clm_begins_at_the_evaluated_loss(folder):
    # A text that with its EOS fills whole blocks, since run_clm drops an incomplete one.
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "model")
    ids = tokenizer(" ".join(TEXTS))["input_ids"]
    text = next(
        text
        for text in (tokenizer.decode(ids[:end]) for end in range(len(ids), 0, -1))
        if (len(tokenizer(text)["input_ids"]) + 1) % 32 == 0
    )
    write_jsonl(folder / "long.jsonl", [text])
    model = folder / "run" / "model"
    printed = run("run_clm", model, folder / "long.jsonl", folder / "clm", "--block-size", 32, "--steps", 2)
    report = evaluate_perplexity(model, [text], block_size=32)
    assert report["tokens"] == 31 * int(re.search(r"(\d+) blocks of 32", printed)[1])
    assert step_0_loss(printed) == pytest.approx(report["loss"], abs=1e-5)
    assert AutoModelForCausalLM.from_pretrained(folder / "clm")


def test_verify_compares_every_way_on_the_runs_validation_text(folder):
    result = hfpretrain("verify", str(folder / "run"), "--downstream", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert [row["way"] for row in report["rows"]] == [
        "AutoModelForCausalLM, one document at a time",
        "Trainer, documents padded",
        "Trainer, run_clm's blocks of 64",
        "TRL SFTTrainer",
        "TRL SFTTrainer with LoRA",
    ]
    assert all(row["loss"] == pytest.approx(row["evaluated"], abs=1e-5) for row in report["rows"])
    assert all(row["tokens"] == row["evaluated_tokens"] > 500 for row in report["rows"])


def test_classification_trains_a_classifier(folder):
    printed = run("classify", folder / "run" / "model", folder / "labels.jsonl", folder / "classes", "--steps", 20)
    assert re.search(r"accuracy on 13 held-out texts: 0\.\d+ before, [01]\.\d+", printed)
    assert AutoModelForSequenceClassification.from_pretrained(folder / "classes").num_labels == 2


def test_the_pipeline_continues_a_prompt(folder):
    assert run("generate", folder / "run" / "model", "the river").startswith("the river")
    assert run("generate", folder / "run" / "model", "the river", "--chat").strip()


def test_lm_eval_finds_the_evaluated_bits_per_byte(folder):
    printed = run("lm_eval_task", folder / "run" / "model", folder / "text.jsonl")
    # lm-eval starts every document with EOS, so the empty document puts one before the first text.
    report = evaluate_perplexity(folder / "run" / "model", ["", *TEXTS], stride=32)
    assert float(re.search(r"bits_per_byte ([\d.]+)", printed)[1]) == pytest.approx(report["bits_per_byte"], abs=2e-6)


def prose(seed):
    """A document of ten sentences, as the rules for web pages want it."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("aeioulnrst", k=draw.randint(3, 8))) for _ in range(120)]
    return " ".join(f"The {' '.join(words[n : n + 9])} of it and {words[n + 10]} too." for n in range(0, 120, 12))


def test_a_recipe_reads_the_corpus_that_datatrove_curates(tmp_path):
    pytest.importorskip("datatrove")
    pytest.importorskip("spacy")
    question = "A farmer keeps seventeen brown hens and nine white ducks behind the old barn near the river."
    documents = {f"{n}": prose(n) for n in range(20)} | {
        "same": prose(0),
        "near": f"{prose(1)} It rained.",
        "mail": f"{prose(20)} Write to jane.roe@somewhere.net.",
        "contaminated": f"{prose(21)} {question}",
        "short": "Hello there.",
    }
    lines = [json.dumps({"id": name, "text": text}) + "\n" for name, text in documents.items()]
    (tmp_path / "raw" / "more").mkdir(parents=True)
    (tmp_path / "raw" / "a.jsonl").write_text("".join(lines[:18]))
    (tmp_path / "raw" / "more" / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[18:]).encode()))
    (tmp_path / "benchmarks").mkdir()
    write_jsonl(tmp_path / "benchmarks" / "farm.jsonl", [question, "What is two plus two?"])
    out = tmp_path / "out"
    printed = run("curate", tmp_path / "raw", out, "--benchmarks", tmp_path / "benchmarks")
    assert "benchmark farm: 2 texts, 1 of them too short" in printed
    assert "MinHash stage 4: kept 21 of 23 documents" in printed

    def read(folder):
        lines = b"".join(gzip.decompress(path.read_bytes()) for path in folder.glob("*.jsonl.gz")).splitlines()
        return {row["id"]: row["text"] for row in map(json.loads, lines)}

    kept, removed = read(out), {folder.name: set(read(folder)) for folder in (out / "removed").iterdir()}
    duplicates = removed.pop("minhash")
    assert removed == {"gopher-repetition": {"short"}, "benchmarks": {"contaminated"}}
    assert len(duplicates & {"0", "same"}) == len(duplicates & {"1", "near"}) == 1 and len(duplicates) == 2
    assert kept.keys() == documents.keys() - duplicates - {"short", "contaminated"}
    assert re.search(r"Write to \S+@example\.(com|org)\.$", kept.pop("mail"))
    assert all(text == documents[name] for name, text in kept.items())

    sources = [{"path": "json", "data_files": str(out / "*.jsonl.gz")}]
    prepared = hfpretrain("prepare", str(write_recipe(tmp_path, data__sources=sources)))
    assert prepared.returncode == 0, prepared.stderr
    assert sum(int(n) for n in re.findall(r"(\d+) documents,", prepared.stdout)) == 21

    other = script(EXAMPLES / "curate.py", tmp_path / "raw", out)
    assert other.returncode == 2 and "was made with other arguments or files" in other.stderr


def test_curate_without_datatrove_says_how_to_install_it(tmp_path):
    (tmp_path / "datatrove.py").write_text("raise ModuleNotFoundError(\"No module named 'datatrove'\")")
    command = [sys.executable, EXAMPLES / "curate.py", "--help"]
    result = subprocess.run(command, env=environment(PYTHONPATH=str(tmp_path)), capture_output=True, text=True)
    assert result.returncode == 1 and "pip install datatrove" in result.stderr and "Traceback" not in result.stderr
