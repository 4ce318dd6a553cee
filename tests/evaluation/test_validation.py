import math
import re

import numpy as np
import pytest
import torch
from conftest import hfpretrain, rows, small_text, train, write_jsonl, write_recipe
from tiny_models import LLAMA, build

from hfpretrain import load_recipe
from hfpretrain.data.encode import token_bytes
from hfpretrain.data.prepare import load_prepared_tokenizer, prepare
from hfpretrain.evaluation.sums import DOCUMENTS, loss_sums
from hfpretrain.evaluation.validation import ValidationSets
from hfpretrain.recipe.labels import IGNORE_INDEX
from hfpretrain.recipe.schema import RecipeError


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A recipe with the domains `river` (two files) and `sea`."""
    folder = tmp_path_factory.mktemp("domains")
    write_jsonl(folder / "corpus.jsonl", small_text(200))
    texts = {"a": small_text(9, seed=1), "b": small_text(5, seed=2), "c": [*small_text(6, seed=3), "Sea. " * 300]}
    for name, documents in texts.items():
        write_jsonl(folder / f"{name}.jsonl", documents)
    domains = {"a": "river", "b": "river", "c": "sea"}
    sources = [
        {"path": "json", "data_files": str(folder / f"{name}.jsonl"), "domain": domain}
        for name, domain in domains.items()
    ]
    path = write_recipe(folder, data__validation_sources=sources, data__validation_fraction=0.0)
    return folder, path, {"river": [*texts["a"], *texts["b"]], "sea": texts["c"]}


@pytest.fixture(scope="module")
def prepared(two):
    return prepare(load_recipe(two[1]))


def test_validation_documents_equal_those_of_the_files(two, prepared):
    _, _, texts = two
    assert prepared.validation_splits == ["validation-river", "validation-sea"]
    assert prepared.train_splits == ["train-0"]
    tokenizer, sets = load_prepared_tokenizer(prepared), ValidationSets(prepared)
    assert sets.num_documents == 21
    found: dict[int, list[int]] = {}
    settings = {"batch_size": 4, "process_index": 0, "num_processes": 1, "document_masking": True}
    for batch in sets.batches(**settings):
        for row in range(4):
            for token, label, document in zip(
                *(batch[k][row].tolist() for k in ("input_ids", "labels", DOCUMENTS)), strict=True
            ):
                if label != IGNORE_INDEX:
                    found.setdefault(document, []).append(token)
    documents = [*texts["river"], *texts["sea"]]
    assert {n: tokenizer.decode(ids[:-1]) for n, ids in found.items()} == dict(enumerate(documents))
    assert all(ids[-1] == tokenizer.eos_token_id for ids in found.values())


def sums(prepared, num_processes, batch_size=4, masking=True):
    sets, model = ValidationSets(prepared), build({**LLAMA, "vocab_size": 320})
    table = torch.from_numpy(token_bytes(load_prepared_tokenizer(prepared), 320))
    settings = {"batch_size": batch_size, "num_processes": num_processes, "document_masking": masking}
    parts = [list(sets.batches(process_index=index, **settings)) for index in range(num_processes)]
    assert len({len(part) for part in parts}) == 1
    return sum(loss_sums(model, part, table, sets.num_documents).documents for part in parts).numpy()


@pytest.mark.parametrize(("num_processes", "batch_size"), [(2, 4), (3, 4), (3, 7), (1, 63)])
def test_the_figures_do_not_depend_on_processes_or_batches(prepared, num_processes, batch_size):
    sets = ValidationSets(prepared)
    one, several = sets.figures(sums(prepared, 1)), sets.figures(sums(prepared, num_processes, batch_size))
    for key in ("loss", "perplexity", "bits_per_byte", "river/loss", "sea/bits_per_byte"):
        assert several[key] == pytest.approx(one[key], rel=1e-9 if batch_size == 4 else 1e-6), key
    assert several["tokens"] == one["tokens"] == one["river/tokens"] + one["sea/tokens"]


def test_figures_of_a_domain_equal_a_plain_pytorch_computation(two, prepared):
    _, _, texts = two
    tokenizer, model = load_prepared_tokenizer(prepared), build({**LLAMA, "vocab_size": 320})
    stream = [i for text in texts["sea"] for i in [*tokenizer.encode(text), tokenizer.eos_token_id]]
    nll = content = count = 0.0
    for start in range(0, len(stream), 32):
        block = torch.tensor(stream[start : start + 32])[None]
        begins = torch.tensor([i if block[0, i] == tokenizer.eos_token_id else 0 for i in range(block.shape[1])])
        positions = torch.arange(block.shape[1]) - begins.cummax(0).values
        with torch.no_grad():
            logits = model(input_ids=block, position_ids=positions[None], use_cache=False).logits[0, :-1]
        losses = -torch.log_softmax(logits.double(), -1).gather(1, block[0, 1:, None])[:, 0]
        is_text = block[0, 1:] != tokenizer.eos_token_id
        nll, count, content = nll + float(losses.sum()), count + len(losses), content + float(losses[is_text].sum())
    result = ValidationSets(prepared).figures(sums(prepared, 1))
    assert result["sea/tokens"] == count and result["sea/documents"] == 7
    assert result["sea/loss"] == pytest.approx(nll / count, rel=1e-6)
    assert result["sea/perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-5)
    # All bytes except those of each block's first token, which is not predicted.
    firsts = stream[::32]
    table = token_bytes(tokenizer, 320)
    num_bytes = len("".join(texts["sea"]).encode()) - int(table[firsts].sum())
    assert result["sea/bits_per_byte"] == pytest.approx(content / num_bytes / math.log(2), rel=1e-6)


def test_document_masking_changes_the_figures(prepared):
    assert not np.allclose(sums(prepared, 1, masking=True), sums(prepared, 1, masking=False))


def test_a_run_reports_each_domain(two):
    folder, path, _ = two
    result = train(path, "--training.max_steps=4")
    assert result.returncode == 0, result.stderr
    last = rows(folder / "run", "eval/loss")[4]
    for name in ("river", "sea"):
        assert last[f"eval/{name}/perplexity"] == pytest.approx(math.exp(last[f"eval/{name}/loss"]))
        low, high = last[f"eval/{name}/bits_per_byte_interval"]
        assert low < last[f"eval/{name}/bits_per_byte"] < high
    assert last["eval/tokens"] == last["eval/river/tokens"] + last["eval/sea/tokens"]
    assert list(last["eval/loss_by_context"])[:3] == ["1", "2-3", "4-7"]
    # Also for each domain, since one may get worse while all together get better.
    values = {name: f"{last[f'eval/{name}loss']:.4f}" for name in ("", "river/", "sea/")}
    for name in ("river", "sea"):
        assert f"  {name}: loss {values[f'{name}/']}, perplexity " in result.stderr
        assert re.search(f"after training .*\n(.*\n)?    {name} +loss {values[f'{name}/']} ", result.stdout)
    header, line = hfpretrain("runs", str(folder / "run")).stdout.splitlines()
    assert re.search("loss +loss river +loss sea +perplexity", header) and " ".join(values.values()) in " ".join(
        line.split()
    )
    card = (folder / "run" / "model" / "README.md").read_text()
    assert "| step 4, river | " in card and "| step 4, sea | " in card


def test_a_domain_on_training_or_only_some_sources_is_refused(tmp_path):
    source = {"path": "json", "data_files": "x.jsonl"}
    for changes, message in (
        ({"data__sources": [{**source, "domain": "x"}]}, "only for `validation_sources`"),
        (
            {"data__validation_sources": [source, {**source, "domain": "x"}], "data__validation_fraction": 0.0},
            "domain",
        ),
        ({"data__validation_sources": [{**source, "domain": "a/b"}], "data__validation_fraction": 0.0}, "domain"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(write_recipe(tmp_path, **changes))


ACCURACY = """
import datasets
import evaluate

class TokenAccuracy(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        same = sum(p == r for p, r in zip(predictions, references))
        return {"accuracy": same / len(references), "count": len(references)}
"""


@pytest.mark.parametrize("engine", [None, pytest.param("zero2", marks=pytest.mark.slow)])
def test_a_metric_folder_of_the_recipe_is_computed(two, engine, tmp_path):
    folder, path, _ = two
    metric = tmp_path / "token_accuracy"
    metric.mkdir()
    (metric / "token_accuracy.py").write_text(ACCURACY)
    run = tmp_path / "run"
    trusted = [f"--evaluation.metrics=[{metric}]", "--evaluation.trust_remote_code=true"]
    arguments = [*trusted, f"--output_dir={run}", "--training.max_steps=4"]
    result = train(path, *arguments, f"--data.prepared_dir={folder / 'prepared'}", engine=engine)
    assert result.returncode == 0, result.stderr
    last = rows(run, "eval/loss")[4]
    assert last["eval/token_accuracy/count"] == last["eval/tokens"]
    if engine is None:
        from transformers import AutoModelForCausalLM

        model, prepared = AutoModelForCausalLM.from_pretrained(run / "model"), prepare(load_recipe(path))
        settings = {"batch_size": 4, "process_index": 0, "num_processes": 1, "document_masking": True}
        right = count = 0
        for batch in ValidationSets(prepared).batches(**settings):
            with torch.no_grad():
                inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
                guesses = model(**inputs, use_cache=False).logits.argmax(-1)
            valid = batch["labels"][:, 1:] != IGNORE_INDEX
            right += int((guesses[:, :-1] == batch["labels"][:, 1:])[valid].sum())
            count += int(valid.sum())
        assert last["eval/token_accuracy/accuracy"] == pytest.approx(right / count)


def test_a_metric_that_does_not_load_or_fit_is_reported(two, tmp_path):
    _, path, _ = two
    result = train(path, "--evaluation.metrics=[nowhere]", f"--output_dir={tmp_path}")
    assert result.returncode == 2 and "evaluation.metrics.0: nowhere is a script on the Hub" in result.stderr
    trusted = ["--evaluation.metrics=[nowhere]", "--evaluation.trust_remote_code=true"]
    trusted.append("--evaluation.metric_revisions={nowhere: abc}")
    result = train(path, *trusted, f"--output_dir={tmp_path}")
    assert result.returncode == 2 and "evaluation.metrics.0: nowhere can't be loaded" in result.stderr
    import hfpretrain.evaluation.token_perplexity

    ours = hfpretrain.evaluation.token_perplexity.__file__
    result = train(path, f"--evaluation.metrics=[{ours}]", f"--output_dir={tmp_path}")
    assert result.returncode == 2 and "needs nll, tokens, content_nll, bytes" in result.stderr
