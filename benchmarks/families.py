"""Every causal-LM family of transformers with tiny sizes: is a run equal to a bare loop of plain transformers?

    python benchmarks/families.py [--only llama gemma3 ...] [--engine ddp] [--results FILE] [--logs FOLDER]

Each family has its own config with small sizes (`SIZES`, `OVERRIDES`). A run of three steps, with two micro-batches
each, is compared with a bare loop over the same weights and batches. Both leave experts unbalanced. These are compared:

- loss and gradient norm, by the largest relative difference of the three steps; the loss of the bare loop is the
  next-token loss, computed from the logits
- the class's own loss and the next-token loss
- the logits of a packed document and those of the document alone
- the loss of the reloaded export and that of the bare loop's weights

If only later steps differ, the bare loop runs again with initial weights that differ by a relative 1e-7. A difference
within that of the two bare loops counts as rounding; the column `rounding` has it for the gradient norm.

Families that plain transformers can't train on token ids alone are listed with its reason. With `--engine` each run is
an `accelerate launch` of two processes, which takes a minute for four families; else all is in one process at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from small import ROOT, environment, rows, small_text, train, write_jsonl

BLOCK, SEQUENCES, STEPS = 32, 4, 3
SECONDS = 600
"""Time limit of a family, after which its worker is killed."""
TOLERANCE = {"loss": 1e-5, "grad_norm": 2e-4, "export": 2e-5}
"""Relative differences up to which a difference counts as rounding."""

_LAYERS, _HEADS, _EXPERTS = 4, 4, 4
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("embedding_size", "input_embedding_size", "output_embedding_size", "attention_hidden_size"), 32),
    **dict.fromkeys(("lru_width", "dim_model_base", "mamba_d_ssm", "backbone_hidden_size", "router_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "dff", "dim_ff", "d_inner", "feed_forward_size"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "intermediate_size_mlp"), 64),
    **dict.fromkeys(("dense_intermediate_size",), 64),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 16),
    **dict.fromkeys(("shared_intermediate_size",), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"), _LAYERS),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "num_layers_per_stack"), 2),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "depth"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), _HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads"), _HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "swa_num_attention_heads", "linear_num_heads"), _HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"), 2),
    **dict.fromkeys(("num_global_key_value_heads",), 2),
    **dict.fromkeys(("head_dim", "dim_head", "d_head", "kv_channels", "swa_head_dim", "attention_head_dim"), 8),
    **dict.fromkeys(("global_head_dim", "attention_head_size", "rotary_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "gated_norm_rank", "hc_lowrank", "laurel_rank"), 16),
    "qk_head_dim": 16,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), _EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("moe_num_shared_experts", "first_k_dense_replace", "num_dense_layers", "zero_expert_num"), 1),
    "moe_layer_end_index": _LAYERS - 1,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8, "index_topk_blocks": 2, "index_block_size": 8,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim", "mamba_d_state", "state_size"), 8),
    **dict.fromkeys(("ssm_state_size", "mamba_chunk_size", "chunk_size", "attention_chunk_size"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank", "n_mamba_heads"), 2),
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "sliding_window_size"), 16),
    **dict.fromkeys(("local_attention", "keep_window_size"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 64),
    **dict.fromkeys(("model_max_length", "max_target_positions", "max_source_positions"), 64),
    **dict.fromkeys(("original_max_position_embeddings",), 64),
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8,
}  # fmt: skip
# Keys of a family that are not sizes, or whose default is None.
_MOE = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
OVERRIDES: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_key_value_heads": 4, "head_dim": 8, **_MOE},
    "dots1": _MOE,
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16],
                 "local_attn_chunk_length": 16, "lsh_attn_chunk_length": 16, "num_buckets": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 64,
              "attention_head_dim": 16, "num_key_value_heads": 4},
    "zamba2": {"layer_types": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3], "attention_head_dim": 16,
               "attention_hidden_size": 64, "num_key_value_heads": 4, "mamba_headdim": 16, "n_mamba_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
_VOCABULARIES = ("vocab_size_per_layer_input", "decoder_vocab_size")
# Tried one after the other until plain transformers trains the model.
VARIATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": _HEADS},
    {"num_hidden_layers": 2},
    {"head_dim": 16},
    {"num_hidden_layers": 8},
)


@dataclass
class Family:
    """The results of a family. Differences are relative, or None if there was nothing to compare."""

    name: str
    result: str = "crashed"
    reason: str = ""
    seconds: float = 0.0
    own_loss: str = ""
    loss: float | None = None
    grad_norm: float | None = None
    export: float | None = None
    rounding: dict[str, float] = field(default_factory=dict)
    """Relative change of the bare loop's figures if its initial weights change by a relative 1e-7. Only measured if the
    first step is equal and a later step differs."""
    documents: str = ""
    chunked: bool | None = None
    problems: list[str] = field(default_factory=list)


def tiny(model_type: str, vocab_size: int, special: dict[str, int], changes: dict[str, Any]) -> dict[str, Any]:
    """Keywords of a small config of a family: its keys that `SIZES` has, and no dropout."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return {"model_type": model_type, **_tiny(CONFIG_MAPPING[model_type], vocab_size, special, changes)}


def _tiny(config_class: Any, vocab_size: int, special: dict[str, int], changes: dict[str, Any]) -> dict[str, Any]:
    with contextlib.suppress(Exception):
        default = config_class()
        known = default.to_dict()
        found: dict[str, Any] = {}
        for key, value in known.items():
            if key in config_class.sub_configs:
                part = config_class.sub_configs[key]
                part = part if hasattr(part, "to_dict") else type(getattr(default, key))
                found[key] = _tiny(part, vocab_size, special, changes)
            elif isinstance(value, float) and ("drop" in key or "jitter" in key):  # turn off randomness
                found[key] = 0.0
            elif key in SIZES and not isinstance(value, (list, dict)) and (value is not None or key in ("n_inner",)):
                found[key] = changes.get(key, SIZES[key])
            elif key == "is_decoder":
                found[key] = True  # for encoders that can be trained as causal models
            elif key in _VOCABULARIES:
                found[key] = vocab_size
        for alias, key in config_class.attribute_map.items():
            if alias in changes and key in found:
                found[key] = changes[alias]
        return {**found, **OVERRIDES.get(config_class.model_type, {})}
    return {}


def plain_config(keywords: dict[str, Any], vocab_size: int, special: dict[str, int]) -> Any:
    """The config, made with transformers alone."""
    from transformers import AutoConfig

    composite = [key for key in ("text_config", "decoder") if isinstance(keywords.get(key), dict)]
    changes: dict[str, Any] = {key: {**keywords[key], "vocab_size": vocab_size, **special} for key in composite}
    return AutoConfig.for_model(**{**keywords, **(changes or {"vocab_size": vocab_size, **special})})


def trainable(keywords: dict[str, Any], vocab_size: int, special: dict[str, int]) -> Any:
    """Return the config if plain transformers can compute gradients with it. Raises its error otherwise."""
    import torch
    from transformers import AutoModelForCausalLM

    config = plain_config(keywords, vocab_size, special)
    for implementation in ("sdpa", "eager"):
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=implementation)
            break
        except (ValueError, ImportError):
            if implementation == "eager":
                raise
    ids = torch.arange(2 * BLOCK).view(2, BLOCK) % vocab_size
    model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return config


def find_config(name: str, vocab_size: int, special: dict[str, int]) -> dict[str, Any]:
    """Keywords of a config that plain transformers trains. Raises its error of the first attempt."""
    first: Exception | None = None
    for changes in VARIATIONS:
        keywords = tiny(name, vocab_size, special, changes)
        try:
            trainable(keywords, vocab_size, special)
            return keywords
        except Exception as error:  # any code of any model runs here
            first = first or error
    assert first is not None
    raise first


def recipe_of(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "run"),
        "model": {"config": config},
        "tokenizer": {"algorithm": "byte_level_bpe", "vocab_size": 320},
        "data": {
            "sources": [{"path": "json", "data_files": str(folder.parent / "corpus.jsonl")}],
            "validation_fraction": 0.03,
            "block_size": BLOCK,
            "prepared_dir": str(folder.parent / "prepared"),
        },
        "optimizer": {"lr": 1e-3, "weight_decay": 0.0},
        "scheduler": {"name": "constant", "num_warmup_steps": 0},
        "training": {"tokens_per_step": SEQUENCES * BLOCK, "micro_batch_size": SEQUENCES // 2, "max_steps": STEPS,
                     "mixed_precision": "no"},
        "logging": {"every_steps": 1, "trackers": []},
    }  # fmt: skip


def run_family(family: Family, folder: Path, engine: str | None) -> None:
    """Train a family and fill in its results."""
    from hfpretrain import load_recipe, prepare
    from hfpretrain.recipe.schema import RecipeError

    base = folder / "recipe.yaml"
    base.write_text(yaml.safe_dump(recipe_of(folder, {"model_type": "llama"})))
    prepared = prepare(load_recipe(base))
    tokenizer = json.loads((prepared.path / "tokenizer" / "tokenizer_config.json").read_text())
    eos = prepared.manifest["eos_token_id"]
    special = {f"{name}_token_id": eos for name in ("bos", "eos", "pad")}
    assert tokenizer["eos_token"]
    vocab_size = prepared.manifest["vocab_size"]
    try:
        keywords = find_config(family.name, vocab_size, special)
    except Exception as error:  # any code of any model runs here
        family.result, family.reason = "not trained by transformers", _one_line(error)
        return
    written = recipe_of(folder, keywords)
    written["training"] |= _no_balancing(keywords, vocab_size, special)
    base.write_text(yaml.safe_dump(written))
    try:
        recipe = load_recipe(base)
        try:
            problem = _run(base, recipe, folder, engine)
        except RecipeError as error:
            if not str(error).startswith("training.document_masking"):
                raise
            # Its blocks mix documents, which a recipe has to allow. The folder belongs to the run that was refused.
            written["training"]["document_masking"] = False
            written["output_dir"] = str(folder / "again")
            base.write_text(yaml.safe_dump(written))
            recipe = load_recipe(base)
            problem = _run(base, recipe, folder, engine)
    except RecipeError as error:
        family.result, family.reason = "refused", " ".join(str(problem) for problem in error.problems)
        return
    except Exception as error:  # this benchmark looks for such errors
        traceback.print_exc()
        problem = _one_line(error)
    if problem:
        family.result, family.reason = "fails", problem
    run = Path(written["output_dir"])
    if (run / "metrics.jsonl").is_file() and rows(run, "loss"):
        compare(family, recipe, prepared, run)
    if family.result != "fails":
        family.result = "differs" if family.problems else "equal"
        family.reason = "; ".join(family.problems)


def _no_balancing(keywords: dict[str, Any], vocab_size: int, special: dict[str, int]) -> dict[str, float]:
    """The keys of a recipe that leave the experts unbalanced, as in the bare loop. The tests compare the balancing."""
    import torch
    from transformers import AutoModelForCausalLM

    from hfpretrain.modeling.routers import find_routers

    with torch.device("meta"):
        routers = find_routers(AutoModelForCausalLM.from_config(plain_config(keywords, vocab_size, special)))
    keys = {}
    if any(router.bias for router in routers):
        keys["router_bias_rate"] = 0.0
    if any(router.logits for router in routers):
        keys["router_aux_loss_coef"] = 0.0
    return keys


def _run(path: Path, recipe: Any, folder: Path, engine: str | None) -> str:
    """Train; returns the error, or an empty string."""
    if engine is not None:
        overrides = ["--training.micro_batch_size=1"]
        done = train(path, *overrides, engine=engine, processes=2, timeout=SECONDS, DS_ACCELERATOR="cpu")
        if not done.returncode:
            return ""
        lines = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines()[-1:]
        return lines[0][:300]
    from hfpretrain import train as train_in_this_process
    from hfpretrain.checkpoints import verify
    from hfpretrain.training import records

    records.plot_loss = lambda rows, path, title: path.write_bytes(b"")  # plotting takes a fifth of the time
    # Starting an interpreter for each family would take most of the time.
    verify.verify_in_fresh_process = lambda run, *_, **__: verify.verify_export(run / "model", run / verify.REFERENCE)
    train_in_this_process(recipe)
    return ""


def compare(family: Family, recipe: Any, prepared: Any, run: Path) -> None:
    """Compare a run with a bare loop over the same weights and batches."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from hfpretrain import training_batches
    from hfpretrain.modeling.checks import find_isolation
    from hfpretrain.modeling.documents import pass_boundaries
    from hfpretrain.modeling.initialization import InitialWeights

    recorded = json.loads((run / "environment.json").read_text())
    family.chunked = recorded["chunked_loss"]
    config = AutoConfig.from_pretrained(run / "config")
    keywords: dict[str, Any] = {"dtype": torch.float32}
    # Not by the config alone: that of the text part of a composite is in no mapping.
    made = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.name])._from_config
    try:
        model = made(config, attn_implementation="sdpa", **keywords)
    except (ValueError, ImportError):
        model = made(config, attn_implementation="eager", **keywords)
    with torch.device("meta"):
        blueprint = made(config, **keywords)
    weights = dict(InitialWeights(blueprint, recipe.seed))
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, value in weights.items():
            named[name].copy_(value)
    masking = recorded["document_masking"]
    boundaries = find_isolation(model, BLOCK).boundaries if masking else None
    if boundaries is not None:  # transformers' own masks or keywords, where positions are not enough
        pass_boundaries(model, boundaries)
    batches = [
        {name: torch.cat([micro[name] for micro in step]) for name in step[0]}
        for step in training_batches(recipe, prepared, document_masking=bool(masking))
    ]
    _own_loss(family, model, batches[0])
    if boundaries is not None and boundaries.masks:
        family.documents = "apart by masks"  # positions may count on, so the logits of a document alone can differ
    else:
        _documents(family, model, masking, next(iter(training_batches(recipe, prepared)))[0])
    logged = rows(run, "loss")
    twin = copy.deepcopy(model)
    bare = dict(zip(("loss", "grad_norm"), _bare_loop(model, batches, recipe), strict=True))
    steps = range(min(len(bare["loss"]), len(logged)))
    mine = {name: [logged[i + 1][name] for i in steps] for name in bare}
    differences = {name: [_relative(a, b) for a, b in zip(mine[name], bare[name], strict=False)] for name in bare}
    family.loss, family.grad_norm = (max(differences[name]) for name in ("loss", "grad_norm"))
    allowed = dict(TOLERANCE)
    if any(max(differences[name]) > TOLERANCE[name] for name in bare) and all(
        differences[name][0] <= TOLERANCE[name] for name in bare
    ):
        family.rounding = _rounding(twin, batches, recipe, bare)
        allowed = {name: max(number, family.rounding.get(name, 0.0)) for name, number in TOLERANCE.items()}
    for name in bare:
        if not max(differences[name]) <= allowed[name]:
            text = ", ".join(f"{a:.6g}/{b:.6g}" for a, b in zip(mine[name], bare[name], strict=False))
            family.problems.append(f"{name} (run/bare) {text}")
    if (run / "model" / "config.json").is_file() and len(logged) == STEPS:
        try:
            reloaded, info = AutoModelForCausalLM.from_pretrained(run / "model", output_loading_info=True)
        except Exception as error:  # any code of any model runs here
            family.problems.append(f"export can't be loaded: {_one_line(error)}")
            return
        if boundaries is not None:
            pass_boundaries(reloaded, boundaries)
        if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
            family.problems.append(f"export loads with {dict(info)}"[:200])
        family.export = _relative(_token_loss(reloaded.eval(), batches[0]), _token_loss(model.eval(), batches[0]))
        if not family.export <= TOLERANCE["export"]:
            family.problems.append(f"export differs by {family.export:.1e}")


def _next_token(logits: Any, labels: Any) -> Any:
    import torch

    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum"
    )


def _split(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    size = SEQUENCES // 2
    for start in range(0, SEQUENCES, size):
        yield {name: tensor[start : start + size] for name, tensor in batch.items()}


def _bare_loop(model: Any, batches: list[dict[str, Any]], recipe: Any) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the next-token loss."""
    import torch

    section = recipe.optimizer
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=section.lr, betas=section.betas, eps=section.eps, weight_decay=0.0)
    losses, norms = [], []
    model.train()
    for batch in batches:
        number = int((batch["labels"][:, 1:] != -100).sum())
        total = 0.0
        for micro in _split(batch):
            inputs = {name: tensor for name, tensor in micro.items() if name != "labels"}
            outputs = model(**inputs, use_cache=False)
            loss = _next_token(outputs.logits, micro["labels"]) / number
            total += loss.item()
            loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, recipe.training.max_grad_norm or math.inf)))
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def _rounding(model: Any, batches: list[dict[str, Any]], recipe: Any, bare: dict[str, list[float]]) -> dict[str, float]:
    """Relative change of the bare loop's figures if a relative 1e-7 is added to its initial weights."""
    import torch

    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-7 * torch.randn(parameter.shape, generator=draw))
    changed = dict(zip(bare, _bare_loop(model, batches, recipe), strict=True))
    return {name: max(_relative(a, b) for a, b in zip(changed[name], bare[name], strict=True)) for name in bare}


def _balancing(model: Any, batch: dict[str, Any], outputs: Any) -> Any:
    if getattr(outputs, "aux_loss", None) is None:
        return None
    return model.config.get_text_config().router_aux_loss_coef * outputs.aux_loss


def _token_loss(model: Any, batch: dict[str, Any]) -> float:
    import torch

    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    return float(_next_token(logits, batch["labels"]) / (batch["labels"][:, 1:] != -100).sum())


def _own_loss(family: Family, model: Any, batch: dict[str, Any]) -> None:
    """Check whether the class's loss is the next-token loss, apart from its balancing loss."""
    import torch

    model.eval()
    number = (batch["labels"][:, 1:] != -100).sum()
    with torch.no_grad():
        try:
            outputs = model(**batch, use_cache=False, num_items_in_batch=number)
        except TypeError:
            outputs = model(**batch, use_cache=False)
    wanted, own = _token_loss(model, batch), float(outputs.loss)
    auxiliary = _balancing(model, batch, outputs)
    own -= 0.0 if auxiliary is None else float(auxiliary)
    family.own_loss = "next token" if _relative(own, wanted) < 1e-4 else f"another ({own:.4f}, next token {wanted:.4f})"


def _documents(family: Family, model: Any, masking: Any, batch: dict[str, Any]) -> None:
    """Compare the run's report on packed documents with the logits of a row's last document, packed and alone."""
    import torch

    if not masking:
        family.documents = "mixed"
        return
    ids, positions = batch["input_ids"], batch["position_ids"]
    starts = [[i for i in range(1, BLOCK) if row[i] == 0] for row in positions.tolist()]
    row = max(range(len(starts)), key=lambda i: len(starts[i]))
    if not starts[row]:
        family.documents = "apart, not seen"
        return
    start = starts[row][-1]
    with torch.no_grad():
        model.eval()
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[row, start:]
        alone = model(input_ids=ids[row : row + 1, start:], use_cache=False).logits[0]
    difference = float((packed - alone).abs().max() / alone.abs().max())
    family.documents = "apart" if difference < 1e-4 else f"apart by the run, {difference:.1e} in truth"
    if difference >= 1e-4:
        family.problems.append(f"a packed document's logits differ by {difference:.1e} from those of it alone")


def _relative(found: float, wanted: float) -> float:
    return abs(found - wanted) / max(abs(wanted), 1e-12)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def worker(names: list[str], folder: Path, engine: str | None) -> None:
    """Examine families one after the other in this process, and write each result to `NAME.json` in `folder`."""
    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    # Short documents, so that several start in most blocks.
    write_jsonl(
        folder / "corpus.jsonl", [" ".join(text.split()[: 2 + n % 7]) for n, text in enumerate(small_text(200))]
    )
    for name in names:
        family, start = Family(name), time.perf_counter()
        work = folder / name
        work.mkdir()
        with (folder / f"{name}.log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        timer = threading.Timer(SECONDS, os._exit, [3])
        timer.daemon = True
        timer.start()
        try:
            run_family(family, work, engine)
        except Exception as error:
            traceback.print_exc()
            family.result, family.reason = "benchmark failed", _one_line(error)
        timer.cancel()
        family.seconds = time.perf_counter() - start
        (folder / f"{name}.json").write_text(json.dumps(asdict(family)))
        shutil.rmtree(work)


def examine(names: list[str], engine: str | None, logs: Path | None = None) -> list[Family]:
    """Examine all families in worker processes. If a family ends its worker, report it and continue with a new one."""
    found: list[Family] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(logs or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "prepared", ignore_errors=True)
        for name in names:
            (folder / f"{name}.json").unlink(missing_ok=True)
            shutil.rmtree(folder / name, ignore_errors=True)
        left = list(names)
        while left:
            # A new worker after some tens of families, since their code and threads stay in the process.
            some = left[:40]
            command = [sys.executable, __file__, "--worker", str(folder), "--only", *some]
            command += ["--engine", engine] if engine else []
            subprocess.run(command, cwd=ROOT, env=environment(DS_ACCELERATOR="cpu"), capture_output=True)
            done = [name for name in some if (folder / f"{name}.json").is_file()]
            found += [Family(**json.loads((folder / f"{name}.json").read_text())) for name in done]
            if len(done) < len(some):
                lost = some[len(done)]
                log = folder / f"{lost}.log"
                tail = " ".join(log.read_text(errors="replace").split())[-200:] if log.is_file() else ""
                found.append(Family(lost, "crashed", f"took longer than {SECONDS} s, or ended the process: {tail}"))
                done.append(lost)
            left = left[len(done) :]
            print(f"{len(found)} of {len(names)}", file=sys.stderr, flush=True)
    return found


def table(found: list[Family]) -> str:
    """Markdown tables: the number of families with each result, and a row for each family."""
    counts = Counter(family.result for family in found)
    lines = ["| result | families |", "|---|---|", *(f"| {name} | {number} |" for name, number in counts.most_common())]
    mixed = sum(family.documents == "mixed" for family in found)
    lines += ["", f"Documents are not kept apart in {mixed} families.", ""]
    columns = "family", "result", "loss", "gradient norm", "rounding", "export", "documents", "own loss", "chunked", "s"
    lines += [f"| {' | '.join(columns)} | reason |", "|---" * (len(columns) + 1) + "|"]
    for family in sorted(found, key=lambda family: family.name):
        numbers = (family.loss, family.grad_norm, family.rounding.get("grad_norm"), family.export)
        figures = ("" if n is None else f"{n:.0e}" for n in numbers)
        chunked = "" if family.chunked is None else "yes" if family.chunked else "no"
        cells = [family.name, family.result, *figures, family.documents, family.own_loss, chunked]
        reason = family.reason.replace("|", "/").replace("\n", " ")
        lines.append(f"| {' | '.join(cells)} | {family.seconds:.0f} | {reason} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="families by their model_type; default: all")
    parser.add_argument("--engine", help="an engine of accelerate_configs, with two processes; default: one process")
    parser.add_argument("--results", type=Path, help="file for the table; default: benchmarks/results/families.md")
    parser.add_argument("--logs", type=Path, help="folder for the output of each run")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.only, args.worker, args.engine)
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = args.only or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    start = time.perf_counter()
    text = table(examine(names, args.engine, args.logs))
    print(text)
    results = args.results or (None if args.only or args.engine else ROOT / "benchmarks" / "results" / "families.md")
    if results is not None:
        results.write_text(f"# Families\n\n{(time.perf_counter() - start) / 60:.0f} minutes on one core.\n\n{text}\n")


if __name__ == "__main__":
    main()
