"""Text that contains names of special tokens, and text that a tokenizer does not know or leaves out."""

import numpy as np
import pytest
from conftest import recipe_mapping, small_text, train, write_jsonl, write_recipe
from preparation import token_stream
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hfpretrain.cli import _parameters_and_notes
from hfpretrain.data import prepared
from hfpretrain.data.encode import Encoder, token_bytes
from hfpretrain.data.prepare import load_prepared_tokenizer, prepare, prepared_path
from hfpretrain.data.streaming import StreamingData
from hfpretrain.data.summary import preparation_notes, summary
from hfpretrain.data.tokenizer import train_tokenizer
from hfpretrain.evaluation.texts import recipe_texts
from hfpretrain.recipe.schema import DataSection, Recipe, RecipeError, TokenizerSection
from hfpretrain.training import vocabulary

MARKS = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]
CODE = "<fim_prefix>def f():<fim_suffix>return x<fim_middle>x = 1 <|endoftext|> more"


def marked(folder):
    made = train_tokenizer(TokenizerSection(algorithm="byte_level_bpe", vocab_size=320), small_text(100))
    made.add_special_tokens({"additional_special_tokens": MARKS})
    made.save_pretrained(folder)
    return made


def recipe(folder, **changes):
    changes = {"tokenizer": {"pretrained": str(folder / "tokenizer")}, **changes}
    return Recipe.model_validate(recipe_mapping(folder, **changes))


def source(folder, name="corpus.jsonl", **keywords):
    return {"path": "json", "data_files": str(folder / name), **keywords}


@pytest.mark.parametrize(
    ("chosen", "as_tokens"), [("text", []), ("tokens", MARKS), (["<fim_suffix>"], ["<fim_suffix>"])]
)
def test_a_source_decides_whether_special_tokens_in_its_text_are_tokens(folder, chosen, as_tokens):
    own = marked(folder / "tokenizer")
    write_jsonl(folder / "corpus.jsonl", [CODE] * 60)
    made = prepare(recipe(folder, data__sources=[source(folder, special_tokens=chosen)], data__validation_fraction=0.0))
    ids = token_stream(made, "train-0")
    for token in MARKS:
        assert ids.count(own.convert_tokens_to_ids(token)) == (60 if token in as_tokens else 0)
    assert ids.count(own.eos_token_id) == 60, "a text ended its document"
    assert load_prepared_tokenizer(made).decode(ids[: ids.index(own.eos_token_id)]) == CODE
    counted = dict.fromkeys(sorted([*MARKS, "<|endoftext|>"]), 60)
    assert made.manifest["sources"][0]["special_tokens"] == counted and "60 <fim_middle>" in summary(made)
    notes = " ".join(preparation_notes(made))
    assert [token in notes for token in MARKS] == [chosen != "tokens" and token not in as_tokens for token in MARKS]
    prepared.verify(made.path)
    entry = made.manifest["splits"]["train-0"]
    assert entry["bytes"] == entry["token_bytes"] == 60 * len(CODE)


def test_special_tokens_must_exist_and_not_begin_or_end_documents(folder):
    marked(folder / "tokenizer")
    plain = prepared_path(recipe(folder))
    assert plain == prepared_path(recipe(folder, data__sources=[source(folder, special_tokens="text")]))
    assert plain != prepared_path(recipe(folder, data__sources=[source(folder, special_tokens="tokens")]))
    for chosen, message in (
        (["<fim>"], "is not a special token of the tokenizer; .*<fim_prefix>"),
        (["<|endoftext|>"], "separates documents"),
    ):
        with pytest.raises(RecipeError, match=rf"data.sources.0.special_tokens: .*{message}"):
            prepare(recipe(folder, data__sources=[source(folder, special_tokens=chosen)]))
    with pytest.raises(ValueError, match="special_tokens"):
        recipe(folder, data__sources=[source(folder, special_tokens="letters")])


@pytest.mark.parametrize("trained", [False, True])
def test_check_refuses_special_tokens_that_the_tokenizer_lacks(folder, trained):
    marked(folder / "tokenizer")
    changes = {"tokenizer": {"algorithm": "byte_level_bpe", "vocab_size": 320}} if trained else {}
    right = recipe(folder, data__sources=[source(folder, special_tokens=["<fim_prefix>"])], **changes)
    wrong = [source(folder), source(folder, special_tokens=["<fim>"])]
    if not trained:
        assert vocabulary.check_tokenizer(right.model, right.tokenizer, right.data, local_only=True) == []
    with pytest.raises(RecipeError, match=r"data\.sources\.1\.special_tokens: '<fim>' is not a special token"):
        made = recipe(folder, data__sources=wrong, **changes)
        vocabulary.check_tokenizer(made.model, made.tokenizer, made.data, local_only=True)


def test_streams_and_evaluation_read_special_tokens_as_preparation_does(folder):
    own = marked(folder / "tokenizer")
    write_jsonl(folder / "corpus.jsonl", [CODE] * 40)
    write_jsonl(folder / "other.jsonl", [CODE] * 40)
    sources = [source(folder, special_tokens="tokens"), source(folder, "other.jsonl")]
    changes = {"data__validation_sources": sources, "data__validation_fraction": 0.0}
    changes["data__sources"] = [source(folder, "train.jsonl")]
    write_jsonl(folder / "train.jsonl", small_text(20))
    texts = recipe_texts(recipe(folder, **changes).data)["validation"]
    made = prepare(recipe(folder, **changes))
    encode = Encoder(own, np.dtype(np.int64))
    ids = [encode.for_source(text.special_tokens)([text])[0] for text in texts]
    assert sorted(np.concatenate(ids).tolist()) == sorted(token_stream(made, "validation"))  # the blocks differ
    data = DataSection(sources=sources, block_size=32, streaming=True)
    sizes = {"first_step": 0, "states": {}, "micro_batch_size": 2, "accumulation_steps": 2}
    process = {"process_index": 0, "num_processes": 1, "eos_token_id": own.eos_token_id, "document_masking": False}
    streamed = StreamingData(data, encode, frozenset(), **sizes, **process)
    found = np.concatenate([batch["input_ids"].numpy() for batch in streamed.step(0).batches])
    assert (found == own.convert_tokens_to_ids("<fim_prefix>")).any()


MOVES = ["e4", "e5", "Nf3", "Nc6", "Bb5", "a6", "Ba4", "Nf6", "O-O", "Be7"]


def closed(folder, words, unknown=None, **names):
    backend = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(words)}, **({"unk_token": unknown} if unknown else {}))
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>", **names)
    made.save_pretrained(folder)
    return made


@pytest.mark.parametrize("names", [{}, {"unk_token": "<e>"}])
def test_a_vocabulary_of_fixed_words_encodes_its_words_and_refuses_others(folder, names):
    own = closed(folder / "tokenizer", ["<e>", *MOVES], names.get("unk_token"), **names)
    write_jsonl(folder / "corpus.jsonl", [" ".join(MOVES)] * 50)
    made = prepare(recipe(folder, data__validation_fraction=0.0))
    assert token_stream(made, "train-0") == [*range(1, 11), own.eos_token_id] * 50
    assert not preparation_notes(made)
    write_jsonl(folder / "corpus.jsonl", [*[" ".join(MOVES)] * 50, "e4 Qh5"])
    with pytest.raises(RecipeError, match=r"tokenizer: .*e4 Qh5"):
        prepare(recipe(folder, data__validation_fraction=0.0))


def test_unknown_text_is_counted_and_too_much_is_an_error_unless_allowed(folder):
    closed(folder / "tokenizer", ["<e>", "<unk>", *MOVES], "<unk>", unk_token="<unk>")
    write_jsonl(folder / "corpus.jsonl", [*[" ".join(MOVES)] * 50, "e4 Qh5 Qh6"])
    made = prepare(recipe(folder, data__validation_fraction=0.0))
    assert made.manifest["sources"][0]["unknown"] == 2 and "0.40% of its tokens" in summary(made)
    prepared.verify(made.path)
    write_jsonl(folder / "corpus.jsonl", [*[" ".join(MOVES)] * 50, "Qh5 " * 50])
    for _ in range(2):  # while the data is prepared, and when it is opened
        with pytest.raises(RecipeError, match=r"data.sources.0: 9.09% of its tokens .*tokenizer.max_unknown"):
            prepare(recipe(folder, data__validation_fraction=0.0))
    with pytest.raises(RecipeError, match=r"tokenizer.max_unknown"):  # what `check` prints below the recipe
        _parameters_and_notes(recipe(folder, data__validation_fraction=0.0), 0)
    allowed = {"pretrained": str(folder / "tokenizer"), "max_unknown": 0.1}
    prepare(recipe(folder, data__validation_fraction=0.0, tokenizer=allowed))
    data = DataSection(sources=[source(folder)], block_size=32, streaming=True)
    own = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    sizes = {"first_step": 0, "states": {}, "micro_batch_size": 1, "accumulation_steps": 1, "max_unknown": 0.01}
    process = {"process_index": 0, "num_processes": 1, "eos_token_id": 0, "document_masking": False}
    with pytest.raises(RecipeError, match="of its first tokens are the unknown token"):
        StreamingData(data, Encoder(own, np.dtype(np.int64)), frozenset(), **sizes, **process).example()


def test_text_that_a_tokenizer_leaves_out_or_replaces_is_reported(folder):
    # A BPE without an unknown token drops what it doesn't know.
    backend = Tokenizer(models.BPE({"<e>": 0, **{c: n for n, c in enumerate("abcdefghij ", 1)}}, []))
    backend.normalizer = normalizers.Lowercase()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>").save_pretrained(folder / "tokenizer")
    write_jsonl(folder / "corpus.jsonl", ["Abc def ghi"] * 50 + ["xyz"])
    made = prepare(
        recipe(
            folder,
            data__validation_fraction=0.0,
            tokenizer={"pretrained": str(folder / "tokenizer"), "max_unknown": 0.02},
        )
    )
    notes = " ".join(preparation_notes(made))
    assert "leaves out 0.66%" in notes and "normalizer replaces" in notes
    write_jsonl(folder / "corpus.jsonl", ["Abc xyz"] * 50)
    with pytest.raises(RecipeError, match=r"the tokenizer leaves out 50.00% of its characters"):
        prepare(recipe(folder, data__validation_fraction=0.0))


def test_text_is_not_cut_beside_a_token_that_strips_spaces():
    made = train_tokenizer(TokenizerSection(algorithm="byte_level_bpe", vocab_size=400), small_text(300))
    made.add_tokens([AddedToken("mark", lstrip=True)])
    text = "the river runs\nmark over the stone\n" * 400
    (ids,) = Encoder(made, np.dtype(np.int64))([text])
    assert ids[:-1].tolist() == made(text, add_special_tokens=False)["input_ids"]


def test_text_that_contains_the_name_of_eos_gets_no_extra_space_under_metaspace():
    characters = [(character, -3.0) for character in "abcdefgh</s>▁ x"]
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", -1.0), *characters], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    (ids,) = Encoder(made, np.dtype(np.int64))(["ab</s>cd</s> e"])
    assert made.convert_ids_to_tokens(ids[:-1]) == list("▁ab</s>cd</s>▁e")


def test_a_run_reports_special_tokens_read_as_text_once_and_records_them(folder):
    marked(folder / "tokenizer")
    write_jsonl(folder / "corpus.jsonl", [*small_text(150), *[CODE] * 20])
    result = train(write_recipe(folder, tokenizer={"pretrained": str(folder / "tokenizer")}))
    assert result.returncode == 0, result.stderr
    line = "special tokens in the text are read as ordinary text: <fim_middle> (20 times)"
    assert result.stderr.count(line) == 1
    assert line in (folder / "run" / "environment.json").read_text()
    assert token_bytes(marked(folder / "tokenizer"), 384)[0] == 0
