"""New tokens get the mean of the embeddings of the tokens that they join."""

import pytest
import torch
from base_models import BASES, llama
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, Gemma3nForCausalLM, Gemma3nTextConfig, PhiConfig, PhiForCausalLM

from hfpretrain.modeling.embeddings import add_token_embeddings
from hfpretrain.modeling.loss import ids_left_out, install_chunked_loss, token_losses
from hfpretrain.recipe.schema import RecipeError

PIECES = [[5, 6], [5, 6, 7], [20, 9]]


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("kind", BASES)
def test_new_rows_are_means_and_old_rows_stay(tmp_path, kind):
    folder = BASES[kind](tmp_path)
    before, model = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    size = model.config.vocab_size
    new_ids = add_token_embeddings(model, size, PIECES, padded_size=size + 8)
    assert new_ids == slice(size, size + 8) and model.config.vocab_size == size + 8
    embeddings = [(each.get_input_embeddings(), each.get_output_embeddings()) for each in (before, model)]
    is_tied = kind != "llama"
    for module, grown in zip(*embeddings, strict=True):
        old, new = module.weight, grown.weight
        assert torch.equal(new[:size], old) and new.dtype == old.dtype and new.requires_grad
        for row, pieces in enumerate(PIECES):
            torch.testing.assert_close(new[size + row], old[pieces].mean(0))
        torch.testing.assert_close(new[size + 3 :], old.mean(0).expand(5, -1), atol=1e-6, rtol=1e-5)
    (own, head) = embeddings[1]
    assert (own.weight is head.weight) == is_tied
    assert own.num_embeddings == head.out_features == size + 8
    # Text of old tokens has the logits that it had, and a new token has the mean of those of its pieces.
    ids = list(range(3, 20))
    found, expected = logits(model, ids), logits(before, ids)
    torch.testing.assert_close(found[:, :size], expected, atol=1e-5, rtol=1e-5)
    if kind != "gemma":  # whose logits are soft-capped
        means = torch.stack([expected[:, pieces].mean(1) for pieces in PIECES], dim=1)
        torch.testing.assert_close(found[:, size : size + 3], means, atol=1e-5, rtol=1e-5)
    # It saves and loads as any model.
    model.save_pretrained(tmp_path / "grown")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    torch.testing.assert_close(logits(loaded, [*ids, size + 1]), logits(model, [*ids, size + 1]), atol=0, rtol=0)


def test_rows_without_a_token_are_used_first(tmp_path):
    folder = llama(tmp_path, vocab_size=400)
    before, model = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    assert add_token_embeddings(model, 350, PIECES, padded_size=448) == slice(350, 353)
    assert model.config.vocab_size == 400
    old, new = (each.get_input_embeddings().weight for each in (before, model))
    kept = torch.ones(400, dtype=bool)
    kept[350:353] = False
    assert torch.equal(new[kept], old[kept])
    torch.testing.assert_close(new[352], old[PIECES[2]].mean(0))


def test_a_bias_of_the_output_embedding_grows_too():
    config = PhiConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, bos_token_id=0
    )
    model = PhiForCausalLM(config)
    head = model.get_output_embeddings()
    head.bias.data = torch.arange(64.0)
    add_token_embeddings(model, 64, PIECES, padded_size=72)
    assert head.bias.shape == (72,) and head.bias[64:67].tolist() == [5.5, 6.0, 14.5] and head.bias[70] == 31.5


def test_the_values_do_not_depend_on_the_number_of_threads(tmp_path):
    folder, threads, found = llama(tmp_path), torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            model = AutoModelForCausalLM.from_pretrained(folder)
            add_token_embeddings(model, model.config.vocab_size, PIECES * 100, padded_size=1024)
            found.append(model.get_output_embeddings().weight)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_class_with_further_tensors_for_each_token_is_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    small = {
        "hidden_size_per_layer_input": 4,
        "num_kv_shared_layers": 0,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 64,
    }
    config = Gemma3nTextConfig(**sizes, **small, vocab_size_per_layer_input=64, pad_token_id=0)
    with torch.device("meta"):
        model = Gemma3nForCausalLM(config)
    with pytest.raises(RecipeError, match=r"tokenizer\.extend: Gemma3nForCausalLM has more than an input"):
        add_token_embeddings(model, 64, PIECES, padded_size=72)


@pytest.mark.parametrize(
    ("kind", "chunked"), [*((kind, False) for kind in BASES), *((kind, True) for kind in BASES if kind != "gemma")]
)
def test_losses_without_the_new_ids_are_those_of_the_base_model(tmp_path, kind, chunked):
    folder = BASES[kind](tmp_path)
    before, model = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    size = model.config.vocab_size
    new_ids = add_token_embeddings(model, size, PIECES, padded_size=size + 8)
    if chunked:
        install_chunked_loss(model)
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        expected = -log_softmax(before(ids).logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    with ids_left_out(model, new_ids):
        torch.testing.assert_close(token_losses(model, {"input_ids": ids}, ids), expected, atol=1e-5, rtol=1e-5)
    assert (token_losses(model, {"input_ids": ids}, ids) > expected).all()
