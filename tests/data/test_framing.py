"""Documents begin and end as the tokenizer's call does it: in blocks, loss, evaluation, tasks and export."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import hfpretrain, recipe_mapping, rows, small_text, train, write_jsonl, write_recipe
from preparation import token_stream
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfpretrain import evaluate_perplexity, files, load_recipe, training_batches
from hfpretrain.checkpoints import resume as resume_from
from hfpretrain.data import prepared
from hfpretrain.data.batches import collate, document_positions
from hfpretrain.data.encode import Encoder
from hfpretrain.data.prepare import load_prepared_tokenizer, prepare, prepared_path
from hfpretrain.data.streaming import StreamingData
from hfpretrain.data.summary import summary
from hfpretrain.data.tokenizer import document_prefix, document_start, load_tokenizer, set_add_bos, train_tokenizer
from hfpretrain.evaluation.lm_eval_tasks import Processes, shared_language_model
from hfpretrain.evaluation.score import Windows, evaluate_checkpoint
from hfpretrain.recipe.labels import IGNORE_INDEX
from hfpretrain.recipe.schema import DataSection, Recipe, RecipeError, TokenizerSection
from hfpretrain.training.preflight import resource_problems
from hfpretrain.training.run_folder import refuse_other_run

BOS, EOS = 320, 0


def with_bos(folder, prepends=True, appends=False):
    """A tokenizer with a BOS token. Its call adds BOS before a text like Llama's, and EOS after it if `appends`."""
    from tokenizers.processors import TemplateProcessing

    made = train_tokenizer(TokenizerSection(algorithm="byte_level_bpe", vocab_size=320), small_text(200))
    made.add_special_tokens({"bos_token": "<s>"})
    eos = made.eos_token
    template = f"{'<s> ' * prepends}$A{f' {eos}' * appends}"
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<s>", BOS), (eos, EOS)]
    )
    made.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def recipe(folder, **changes):
    changes = {"tokenizer": {"pretrained": str(folder / "tokenizer")}, **changes}
    return Recipe.model_validate(recipe_mapping(folder, **changes))


@pytest.fixture
def framed(folder):
    with_bos(folder / "tokenizer")
    return folder


@pytest.mark.parametrize("appends", [False, True])
def test_a_document_in_blocks_begins_like_the_tokenizer_call_and_ends_with_one_eos(folder, appends):
    own = with_bos(folder / "tokenizer", appends=appends)
    made = prepare(recipe(folder))
    ids = token_stream(made, "train-0") + token_stream(made, "validation")
    documents = [document.tolist() for document in np.split(ids, np.flatnonzero(np.array(ids) == EOS) + 1)[:-1]]
    expected = [own(text)["input_ids"] + [EOS] * (not appends) for text in small_text(200)]
    assert sorted(documents) == sorted(expected) and expected[0][0] == BOS and expected[0].count(EOS) == 1
    splits = made.manifest["splits"].values()
    assert made.manifest["document_prefix"] == [BOS] and all(entry["bos"] == entry["documents"] for entry in splits)
    assert sum(source["train"]["bos"] + source["validation"]["bos"] for source in made.manifest["sources"]) == 200
    assert f"{made.manifest['splits']['train-0']['bos']} BOS" in summary(made)
    prepared.verify(made.path)
    manifest = files.manifest_of(made.path)
    del manifest["manifest_sha256"]  # as in older versions
    manifest["splits"]["train-0"]["bos"] -= 1
    manifest["splits"]["train-0"]["tokens"] += 1
    (made.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RecipeError, match="tokens that begin documents on disk"):
        prepared.verify(made.path)


def test_best_fit_has_one_bos_for_each_document(framed):
    write_jsonl(framed / "corpus.jsonl", [*small_text(150), " ".join(small_text(40, seed=3))])
    made = prepare(recipe(framed, data__packing="best_fit", data__block_size=256, data__validation_fraction=0.0))
    prepared.verify(made.path)
    entry = made.manifest["splits"]["train-0"]
    assert entry["bos"] == 151 and entry["padding"] > 0
    total = sum(entry[name] for name in ("tokens", "separators", "bos", "padding"))
    assert total == entry["rows"] * 256


def test_add_bos_changes_the_blocks_and_the_saved_tokenizer(framed, tmp_path):
    with_bos(framed / "without", prepends=False)
    for folder, add_bos, expected in (
        ("tokenizer", None, (BOS,)),
        ("tokenizer", False, ()),
        ("without", None, ()),
        ("without", True, (BOS,)),
    ):
        section = {"pretrained": str(framed / folder), "add_bos": add_bos}
        made = prepare(recipe(framed, tokenizer=section))
        ids = token_stream(made, "train-0")
        assert ids.count(BOS) == len(expected) * made.manifest["splits"]["train-0"]["documents"]
        loaded = load_prepared_tokenizer(made)
        loaded.save_pretrained(tmp_path / "saved")
        for tokenizer in (loaded, AutoTokenizer.from_pretrained(tmp_path / "saved")):
            assert document_prefix(tokenizer) == expected
            assert tokenizer("the river")["input_ids"][: len(expected)] == list(expected)
            assert tokenizer.decode(tokenizer("the  river")["input_ids"], skip_special_tokens=True) == "the  river"
    with pytest.raises(RecipeError, match=r"add_bos.*has no BOS token"):
        none = with_bos(framed / "none", prepends=False)
        none.bos_token = None
        none.save_pretrained(framed / "none")
        load_tokenizer(TokenizerSection(pretrained=str(framed / "none"), add_bos=True))


def test_a_token_that_is_both_bos_and_eos_separates_documents_once(folder):
    made = train_tokenizer(TokenizerSection(algorithm="byte_level_bpe", vocab_size=320), small_text(200))
    made.save_pretrained(folder / "tokenizer")
    plain = prepare(recipe(folder))
    set_add_bos(made, True)
    assert document_prefix(made) == () and document_start(made) == [EOS]
    forced = prepare(recipe(folder, tokenizer={"pretrained": str(folder / "tokenizer"), "add_bos": True}))
    assert forced.path == plain.path and "bos" not in plain.manifest["splits"]["train-0"]


def test_data_prepared_without_bos_by_an_older_version_is_not_used_for_documents_with_bos(framed):
    without = recipe(framed, tokenizer={"pretrained": str(framed / "tokenizer"), "add_bos": False})
    old = prepare(without).path
    assert prepared_path(recipe(framed)) != old
    manifest = files.manifest_of(old)
    del (
        manifest["manifest_sha256"],
        manifest["document_prefix"],
    )  # as older versions wrote it, with the unchanged tokenizer
    (old / "manifest.json").write_text(json.dumps(manifest))
    shutil.copytree(framed / "tokenizer", old / "tokenizer", dirs_exist_ok=True)
    assert prepared_path(without) == old and prepared_path(recipe(framed)) != old
    read = prepared.PreparedData.open(old)
    assert read.document_prefix == [] and document_prefix(load_prepared_tokenizer(read)) == ()


def test_bos_in_a_text_begins_no_document(framed):
    write_jsonl(framed / "corpus.jsonl", [*small_text(100), "before <s> after" * 3])
    made = prepare(recipe(framed))
    ids = token_stream(made, "train-0") + token_stream(made, "validation")
    assert ids.count(BOS) == 101
    assert "before <s> after" in load_prepared_tokenizer(made).decode(ids)


def test_positions_restart_at_bos_whose_label_is_ignored():
    bos, eos = 1, 0
    ids = np.array([[5, eos, bos, 7, eos, bos, 8, 9]])
    assert document_positions(ids, eos, after_eos=True).tolist() == [[0, 1, 0, 1, 2, 0, 1, 2]]
    batch = collate(ids, eos, eos_before_bos=eos)
    assert batch["labels"].tolist() == [[5, eos, IGNORE_INDEX, 7, eos, IGNORE_INDEX, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1, 2]]
    unmasked = collate(ids, None, eos_before_bos=eos)
    assert torch.equal(unmasked["labels"], batch["labels"]) and "position_ids" not in unmasked


def tiny_model(folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=384, max_position_embeddings=256, initializer_range=0.3, **sizes)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def plain_nll(model, tokenizer, texts):
    """Sum of the losses of plain transformers on `tokenizer(text)` and EOS, and the number of predicted tokens."""
    nll = tokens = 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            nll += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    return nll, tokens


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_the_loss_of_a_document_in_training_equals_that_of_plain_transformers(framed, packing):
    texts = [text[:100] for text in small_text(64)]
    write_jsonl(framed / "corpus.jsonl", texts)
    own, model = AutoTokenizer.from_pretrained(framed / "tokenizer"), tiny_model(framed / "model")
    # No document is cut in a row of this length.
    size = sum(len(own(text)["input_ids"]) + 1 for text in texts)
    length = size if packing == "concat" else 256
    changes = {"data__packing": packing, "data__block_size": length, "data__validation_fraction": 0.0}
    data = prepare(recipe(framed, **changes, training__tokens_per_step=length, training__micro_batch_size=1))
    num_rows = data.manifest["splits"]["train-0"]["rows"]
    changes |= {"training__tokens_per_step": length * num_rows, "training__micro_batch_size": 1}
    model.config.max_position_embeddings = length
    (batches,) = list(training_batches(recipe(framed, **changes, training__max_steps=1), data))
    count = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches)
    with torch.no_grad():
        nll = sum(model(**batch, use_cache=False, num_items_in_batch=torch.tensor(1)).loss.item() for batch in batches)
    expected, tokens = plain_nll(model, own, texts)
    assert count == tokens and nll == pytest.approx(expected, rel=1e-5)


def requests(kind, arguments):
    """Requests of lm-eval with these arguments."""
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=given, idx=0) for given in arguments]


def test_evaluation_and_tasks_begin_a_text_as_training_did(framed):
    own, model = AutoTokenizer.from_pretrained(framed / "tokenizer"), tiny_model(framed / "tokenizer")
    texts = [text[:80] for text in small_text(5, seed=7)]
    expected, tokens = plain_nll(model, own, texts)
    held_out = {str(number): [text] for number, text in enumerate(texts)}
    for found in (
        evaluate_checkpoint(str(framed / "tokenizer"), held_out, Windows(block_size=128)),
        evaluate_perplexity(model, texts, tokenizer=own, block_size=256),
    ):
        assert found["tokens"] == tokens and found["loss"] == pytest.approx(expected / tokens, rel=1e-5)
    adapter = shared_language_model(model, own, torch.device("cpu"), 4, Processes())
    assert adapter.tok_encode("the river") == own("the river")["input_ids"]
    with adapter.answering_together():
        rolling = adapter.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in texts]))
        pairs = adapter.loglikelihood(requests("loglikelihood", [("the river", " runs"), ("", "the river")]))
    ends = sum(_logprob(model, [*own(text)["input_ids"]], EOS) for text in texts)
    assert sum(rolling) == pytest.approx(-expected - ends, rel=1e-5)
    given = own("the river")["input_ids"]
    runs = own(" runs", add_special_tokens=False)["input_ids"]
    assert pairs[0][0] == pytest.approx(
        sum(_logprob(model, given + runs[:n], token) for n, token in enumerate(runs)), rel=1e-4
    )
    assert pairs[1][0] == pytest.approx(
        sum(_logprob(model, given[:n], given[n]) for n in range(1, len(given))), rel=1e-4
    )


def _logprob(model, ids, token):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token].item()


def test_a_stream_has_the_same_bos_and_eos(framed):
    own = AutoTokenizer.from_pretrained(framed / "tokenizer")
    source = {"path": "json", "data_files": str(framed / "corpus.jsonl")}
    data = DataSection(sources=[source], block_size=32, streaming=True)
    sizes = {"first_step": 0, "states": {}, "micro_batch_size": 2, "accumulation_steps": 2}
    process = {"process_index": 0, "num_processes": 1, "eos_token_id": EOS, "document_masking": True}
    streamed = StreamingData(data, Encoder(own, np.dtype(np.uint16)), frozenset(), **sizes, **process)
    batches = [batch for step in range(8) for batch in streamed.step(step).batches]
    ids, labels, positions = (
        torch.cat([batch[name] for batch in batches]) for name in ("input_ids", "labels", "position_ids")
    )
    expected = [token for text in small_text(200) for token in [*own(text)["input_ids"], EOS]]
    assert ids.flatten().tolist() == expected[: ids.numel()]
    is_bos = ids[:, 1:] == BOS
    assert is_bos.any() and torch.equal(labels[:, 1:] == IGNORE_INDEX, is_bos)
    assert (positions[:, 1:] == 0).equal(is_bos)


def test_the_exported_tokenizer_adds_bos_as_in_training(framed):
    path = write_recipe(framed, tokenizer={"pretrained": str(framed / "tokenizer")}, training__max_steps=3)
    result = train(path)
    assert result.returncode == 0 and "documents begin with <s>" in result.stderr, result.stderr
    export = framed / "run" / "model"
    assert "`<s>`" in (export / "README.md").read_text()
    own, model = (kind.from_pretrained(export) for kind in (AutoTokenizer, AutoModelForCausalLM))
    assert own("the")["input_ids"][0] == BOS == model.config.bos_token_id


@pytest.mark.slow
def test_a_run_reports_its_bos_and_refuses_a_change_of_it(framed):
    path = write_recipe(
        framed,
        tokenizer={"pretrained": str(framed / "tokenizer")},
        evaluation__prompts=["the"],
        evaluation__sample_tokens=2,
    )
    result = train(path)
    assert result.returncode == 0, result.stderr
    assert "documents begin with <s>" in result.stderr
    run = framed / "run"
    card = (run / "model" / "README.md").read_text()
    assert "`<s>`" in card and "BOS" in card and "adds no special tokens" not in card
    assert json.loads((run / "data.json").read_text())["document_start"] == "<s>"
    own, model = (kind.from_pretrained(run / "model") for kind in (AutoTokenizer, AutoModelForCausalLM))
    assert own("the")["input_ids"][0] == BOS
    # The run and `evaluate` measure the same loss, because no block cuts a document of the validation text.
    report = json.loads(hfpretrain("evaluate", str(run / "model"), str(path)).stdout)
    measured = rows(run, "eval/loss")[8]
    assert report["loss"] == pytest.approx(measured["eval/loss"], rel=1e-4)
    assert report["tokens"] == measured["eval/tokens"]
    assert model.config.bos_token_id == BOS and model.generation_config.bos_token_id == BOS
    # Without BOS the text would be that of another run. It is refused before tokenizing, by `check` as well.
    overrides = "--tokenizer.add_bos=false", "--training.max_steps=9"
    for result in (train(path, *overrides), hfpretrain("check", str(path), *overrides)):
        assert result.returncode == 2 and "tokenizer.add_bos" in result.stderr and "BOS" in result.stderr
    assert sum(one.is_dir() for one in (framed / "prepared").iterdir()) == 1
    refuse_other_run(load_recipe(path, ["--tokenizer.add_bos=true"]))  # null means the same with this tokenizer
    (state,) = (run / "checkpoints").glob("step-*")
    other = load_recipe(path, [overrides[0], f"--output_dir={framed / 'other'}", f"--checkpoint.resume_from={state}"])
    with pytest.raises(RecipeError, match=r"tokenizer\.add_bos"):
        resume_from.fetch_initial_checkpoint(other)
    assert [problem.path for problem in resource_problems(other)] == ["checkpoint.resume_from", "tokenizer.add_bos"]


def test_a_run_of_the_version_that_added_no_bos_is_refused_with_that_version(framed):
    section = {"pretrained": str(framed / "tokenizer")}
    recipe = write_recipe(
        framed, tokenizer=section, training__max_steps=2, checkpoint__every_steps=2, scheduler__num_warmup_steps=1
    )
    assert train(recipe, "--tokenizer.add_bos=false").returncode == 0
    # Change the files to those of version 0.1.0: the recipe has no such key, and the state has fewer entries.
    run, checkpoint = framed / "run", framed / "run" / "checkpoints" / "step-00000002"
    for folder in (run, checkpoint):
        old = yaml.safe_load((folder / "recipe.yaml").read_text())
        del old["tokenizer"]["add_bos"]
        (folder / "recipe.yaml").write_text(yaml.safe_dump(old))
    state = json.loads((checkpoint / "train_state.json").read_text())
    for key in ("segments", "precision", "undecayed"):
        del state[key]
    (checkpoint / "train_state.json").write_text(json.dumps(state))
    content = {
        key: value for key, value in files.manifest_of(checkpoint).items() if key not in ("files", "manifest_sha256")
    }
    (checkpoint / "manifest.json").unlink()
    files.seal(checkpoint.rename(f"{checkpoint}.incomplete"), checkpoint, content)
    result = train(recipe, "--training.max_steps=4")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "hfpretrain 0.1.0" in result.stderr and "BOS" in result.stderr, result.stderr
    assert json.loads((checkpoint / "train_state.json").read_text()) == state, "the checkpoint is unchanged"
