"""Packed documents don't affect each other, with each kind of layer that can keep them apart."""

import pytest
import torch
from reference_kernels import install_flash_attention, kernels_installed
from tiny_models import LLAMA, MOE, SMALL, build
from transformers import DataCollatorWithFlattening
from transformers.integrations import hub_kernels

from hfpretrain.modeling.checks import find_isolation, keep_documents_apart, resolve_document_masking, use_chunked_loss
from hfpretrain.modeling.documents import Boundaries, boundary_keywords
from hfpretrain.recipe.schema import RecipeError

TWO = {**SMALL, "num_hidden_layers": 2, "num_key_value_heads": 2, "intermediate_size": 48,
       "max_position_embeddings": 64}  # fmt: skip
DELTA = {**TWO, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
         "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "head_dim": 8}  # fmt: skip
MAMBA2 = {**TWO, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
          "mamba_chunk_size": 8, "mamba_expand": 2}  # fmt: skip
PURE = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS = {
    "qwen3_5_text": DELTA,
    "qwen3_next": {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 16},
    "olmo_hybrid": DELTA,
    "kimi_linear": {**TWO, **EXPERTS, "num_key_value_heads": 4, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
                    "qk_rope_head_dim": 8, "v_head_dim": 8, "linear_head_dim": 8, "linear_num_heads": 4,
                    "layer_types": ["linear_attention", "full_attention"],
                    "mlp_layer_types": ["dense", "sparse"]},
    "bamba": {**MAMBA2, "attn_layer_indices": [1]},
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 64, "head_dim": 8},
    "granitemoehybrid": {**MAMBA2, "layer_types": ["mamba", "attention"], "num_local_experts": 0,
                         "shared_intermediate_size": 48},
    "nemotron_h": {**TWO, "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8,
                   "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8, "head_dim": 8},
    "zamba2": {**TWO, "layer_types": ["linear_attention", "hybrid"], "hybrid_layer_ids": [1], "mamba_d_state": 8,
               "mamba_ngroups": 1, "mamba_headdim": 16, "n_mamba_heads": 4, "chunk_size": 8,
               "attention_head_dim": 16, "attention_hidden_size": 64, "num_key_value_heads": 4},
    "lfm2": {**TWO, "layer_types": ["conv", "full_attention"]},
    "jamba": {**TWO, "mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
              "num_experts": 2, "num_experts_per_tok": 1},
    "mamba": PURE,
    "mamba2": {**PURE, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "falcon_mamba": PURE,
    "recurrent_gemma": {**TWO, "head_dim": 8, "lru_width": 32, "block_types": ["recurrent", "attention"]},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "context_length": 64,
             "attention_hidden_size": 32},
    "gpt_oss": {**TWO, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48, "max_position_embeddings": 64, "dropout": 0.0, **SMALL},
}  # fmt: skip
LENGTHS = [[5, 11], [9, 7], [16]]  # of the documents in three rows


@pytest.fixture
def use_flash_attention(monkeypatch):
    install_flash_attention(monkeypatch.setattr)
    return lambda model: model.set_attn_implementation("flash_attention_2")


def tiny(model_type):
    return build({"model_type": model_type, **CONFIGS[model_type]})


def packed_rows(vocab_size=64):
    ids = torch.randint(vocab_size, (3, 16), generator=torch.Generator().manual_seed(1))
    return ids, torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in LENGTHS])


def documents(rows):
    """The parts of three rows that are documents, each as a row of its own."""
    return [part[None] for row, lengths in zip(rows, LENGTHS, strict=True) for part in row.split(lengths)]


def assert_packed_equals_separate(model, tolerance=1e-5):
    """Loss, logits and gradients of packed documents are those of each document alone."""
    ids, positions = packed_rows()
    labels = ids.masked_fill(positions == 0, -100)  # nothing predicts the first token of a document
    num_items = (labels != -100).sum()
    keywords = {"use_cache": False, "num_items_in_batch": num_items}
    loss = model(input_ids=ids, labels=labels, position_ids=positions, **keywords).loss
    loss.backward()
    packed = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    alone = [model(input_ids=one, labels=one, **keywords).loss for one in documents(ids)]
    sum(alone).backward()
    torch.testing.assert_close(loss, sum(alone), rtol=tolerance, atol=tolerance)
    for name, gradient in packed.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-3, atol=tolerance)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, position_ids=positions, use_cache=False).logits
        assert logits.shape == (3, 16, 64)
        for one, expected in zip(documents(ids), documents(logits), strict=True):
            found = model(input_ids=one, use_cache=False).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=10 * tolerance)


def test_boundaries_are_those_of_transformers():
    ids, positions = packed_rows()
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    theirs = collate([{"input_ids": part[0].tolist()} for part in documents(ids)])
    ours = boundary_keywords(positions)
    for key in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype
    assert ours["max_length_q"] == ours["max_length_k"] == theirs["max_length_q"] == 16
    assert ours["seq_idx"].dtype == theirs["seq_idx"].dtype == torch.int32
    assert ours["seq_idx"][:2].unique(return_counts=True)[1].tolist() == [14, 18] and not ours["seq_idx"][2].any()


@pytest.mark.parametrize("config", [LLAMA, {**LLAMA, "model_type": "mistral", "sliding_window": 4}, MOE])
def test_flash_attention_keeps_documents_apart_in_several_rows(config, use_flash_attention):
    model = build(config)
    ids, positions = packed_rows()
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, position_ids=positions, use_cache=False).logits
        use_flash_attention(model)
        leaking = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        assert not torch.allclose(leaking, expected, atol=1e-3)
        assert keep_documents_apart(model, 64) is None
        found = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert_packed_equals_separate(model.train())


def test_flash_attention_keeps_documents_apart_with_the_chunked_loss(use_flash_attention):
    model = build(LLAMA)
    use_flash_attention(model)
    assert keep_documents_apart(model, 64) is None and use_chunked_loss(model, True)
    ids, positions = packed_rows()
    labels = ids.masked_fill(positions == 0, -100)
    found = model(input_ids=ids, labels=labels, position_ids=positions, use_cache=False).loss
    plain = build(LLAMA)(input_ids=ids, labels=labels, position_ids=positions, use_cache=False).loss
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("model_type", ["gpt_oss", "opt"])
def test_masks_keep_documents_apart_in_classes_that_make_them_without_positions(model_type):
    model = tiny(model_type)
    assert find_isolation(model, 64).boundaries == Boundaries(masks=True)
    assert keep_documents_apart(model, 64) is None
    assert_packed_equals_separate(model)


SLOW = pytest.mark.slow
BY_KERNELS = {
    "bamba": Boundaries(keywords=True),
    "qwen3_5_text": Boundaries(keywords=True, one_row=True),
    "granitemoehybrid": Boundaries(masks=True, keywords=True),
    **dict.fromkeys(("qwen3_next", "olmo_hybrid"), Boundaries(keywords=True, one_row=True)),
    **dict.fromkeys(("falcon_h1", "nemotron_h", "zamba2", "lfm2"), Boundaries(keywords=True)),
}
FAST = ("bamba", "qwen3_5_text", "granitemoehybrid")


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=SLOW) for name in BY_KERNELS])
def test_hybrids_keep_documents_apart_with_the_kernels_of_their_packages(name):
    model = tiny(name)
    with kernels_installed(model):
        isolation = find_isolation(model, 64)
        assert isolation.leak is None and isolation.boundaries == BY_KERNELS[name]
        assert keep_documents_apart(model, 64) is None
        assert_packed_equals_separate(model)


NEEDS = {
    "qwen3_5_text": ["the linear_attention layers of Qwen3_5ForCausalLM (1 of 2)", "causal_conv1d",
                     "flash-linear-attention", "only on GPUs"],
    "jamba": ["JambaForCausalLM (1 of 2) let packed documents see each other",
              "does not tell `causal_conv1d_fn` and `mamba_selective_scan`"],
    "qwen3_next": ["(1 of 2)", "causal_conv1d and flash-linear-attention installed"],
    "olmo_hybrid": ["(1 of 2)", "causal_conv1d and flash-linear-attention installed"],
    "kimi_linear": ["(1 of 2)", "does not tell `chunk_kimi_delta_attention` where"],
    "bamba": ["(1 of 2)", "causal_conv1d and mamba_ssm installed"],
    "granitemoehybrid": ["(1 of 2)", "causal_conv1d and mamba_ssm installed"],
    "nemotron_h": ["(1 of 2)", "causal_conv1d and mamba_ssm installed"],
    "falcon_h1": ["(2 of 2)", "causal_conv1d and mamba_ssm installed"],
    "zamba2": ["(2 of 2)", "causal_conv1d and mamba_ssm installed"],
    "lfm2": ["the conv layers of Lfm2ForCausalLM (1 of 2)", "only on GPUs with causal_conv1d installed"],
    "mamba": ["(2 of 2)", "does not tell `causal_conv1d_fn`"],
    "mamba2": ["(2 of 2)", "does not tell `causal_conv1d_fn`"],
    "falcon_mamba": ["(2 of 2)", "does not tell `causal_conv1d_fn`"],
    "recurrent_gemma": ["linear_attention layers of RecurrentGemmaForCausalLM (1 of 2) let packed documents"],
    "rwkv": ["lets packed documents see each other"],
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [name if name in ("qwen3_5_text", "jamba") else pytest.param(name, marks=SLOW) for name in NEEDS]
)
def test_a_refusal_says_which_layers_mix_documents_and_what_would_keep_them_apart(name):
    model = tiny(name)
    leak = find_isolation(model, 64).leak
    with pytest.raises(RecipeError) as caught:
        resolve_document_masking("auto", leak, True, model, 64)
    message = str(caught.value)
    assert message.startswith("training.document_masking: packed documents can't be kept apart: ")
    assert "set it to false to let documents see each other" in message
    for part in NEEDS[name]:
        assert part in message, message
    assert resolve_document_masking(False, None, True, model, 64) is False


def test_a_refusal_names_the_attention_that_keeps_documents_apart(monkeypatch, use_flash_attention):
    model = build(LLAMA)
    monkeypatch.setattr("hfpretrain.modeling.checks.WAYS", ())
    use_flash_attention(model)
    leak = find_isolation(model, 64).leak
    assert "flash_attention_2 attention lets" in leak
    with pytest.raises(RecipeError, match=r"set model\.attn_implementation: sdpa, which keeps them apart"):
        resolve_document_masking(True, leak, True, model, 64)
    assert model.config._attn_implementation == "flash_attention_2"


def test_transformers_says_which_package_has_a_kernel():
    fix = "modeling/documents.py names the packages that keep documents apart; find where transformers keeps them"
    assert isinstance(hub_kernels._PACKAGE_TO_DISTRIBUTION, dict), f"_PACKAGE_TO_DISTRIBUTION is gone: {fix}"
    model = tiny("bamba")
    found = []
    with kernels_installed(model):
        pass
    from hfpretrain.modeling.documents import _replaced_kernel_functions

    with _replaced_kernel_functions(model, lambda name, function, package, installed: found.append((name, package))):
        pass
    assert ("causal_conv1d_fn", "causal_conv1d") in found and ("mamba2_chunk_scan", "mamba_ssm") in found, fix
