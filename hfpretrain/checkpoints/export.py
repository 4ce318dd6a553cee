"""The export: a plain folder that knows nothing of us, and the proof that it is the trained model."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from hfpretrain import files
from hfpretrain.data.tokenizer import document_start
from hfpretrain.modeling.initialization import context_length
from hfpretrain.recipe.schema import RecipeError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast

REFERENCE = "reference.safetensors"
PLAIN = "config"
"""Folder of a run with its model's config and its tokenizer: what an export is made of beside weights."""
GENERATION_CONFIG = "generation_config.json"
_REFERENCE_TOKENS = 1024


def write(
    config: PretrainedConfig,
    state_dict: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerFast,
    path: Path,
    dtype: str = "float32",
    generation_config: GenerationConfig | None = None,
) -> None:
    """A plain folder that `from_pretrained` reads: safetensors in `dtype`, config, generation config, tokenizer.

    `generation_config`: that of the checkpoint that was trained further; None: one made from the config's special ids.

    Written through a fresh model of the config, so that nothing of the engine's wrapping reaches the files. A folder at
    `path` is replaced, but files in it that no export wrote are kept, and so is the card.
    """
    from transformers import AutoModelForCausalLM

    if not torch.accelerator.is_available():
        # `save_pretrained` loads DeepSpeed, which without a word looks for an accelerator and warns.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    state_dict = {k: v.to(getattr(torch, dtype)) if v.is_floating_point() else v for k, v in state_dict.items()}
    model.load_state_dict({**state_dict, **_tied(model, state_dict)}, assign=True)
    model.tie_weights()
    model.config.use_cache = True
    work = files.work_folder(path)
    model.save_pretrained(work)
    if generation_config is not None:
        # Written unchanged: `save_pretrained` refuses some that published checkpoints have.
        generation_config.to_json_file(work / GENERATION_CONFIG)
    tokenizer.save_pretrained(work)
    files.add_sums(work, (file for file in sorted(work.rglob("*")) if file.is_file()))
    files.put_in_place(work, path)


def _tied(model: Any, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of `state_dict`, in which a tied one comes once, by all names that the model has for them."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    known = {id(tensor): state_dict[name] for name, tensor in named if name in state_dict}
    return {name: known[id(tensor)] for name, tensor in named if id(tensor) in known}


@torch.no_grad()
def write_reference(model: Any, batch: dict[str, torch.Tensor], precision: str, path: Path | None) -> None:
    """Store a batch with the training process's logits for it, to which the export is compared.

    Of each sequence the first 1,024 tokens: the logits of more may need memory that no training step did.
    `precision` is that of `engine.forward_precision`. All ranks must call it (sharded engines need them); only the one
    that gives `path` writes.
    """
    from safetensors.torch import save_file

    training = model.training
    model.eval()
    inputs = {name: tensor[:, :_REFERENCE_TOKENS] for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits.cpu().float()
    model.train(training)
    if path is not None:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in inputs.items()}
        save_file({**tensors, "logits": logits.contiguous()}, path, metadata={"precision": precision})


def verify(model_path: Path, reference: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """Load an export with plain transformers and compare it with the stored batch.

    `trust_remote_code`: run model code that came with the model it was trained from.

    Raises `RecipeError` if the mean losses differ by more than 1e-3 (float32), 3e-2 (16 bits) or 0.1 (8 bits).
    Returns the loss on the batch in training and now, and the largest absolute differences of logits and loss by
    token. Also a sample, since the model is at hand: None, and `sample_error`, where the class can't make one.
    """
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with safe_open(reference, framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        precision = file.metadata()["precision"]
    sums = files.sums_of(model_path)
    if (model_path / "adapter_config.json").is_file() and "adapter_config.json" not in (sums or {}):
        message = "is not part of the export, and from_pretrained would load the adapter; move it to another folder"
        raise RecipeError.at(str(model_path / "adapter_config.json"), message)
    try:
        model = AutoModelForCausalLM.from_pretrained(model_path, trust_remote_code=trust_remote_code).eval()
    except Exception as error:  # a broken file may raise anything
        raise RecipeError.at(str(model_path), f"does not load: {' '.join(str(error).split()):.300}") from error
    dtype = str(model.dtype).removeprefix("torch.")
    inputs = {name: tensor for name, tensor in stored.items() if name != "logits"}
    # As in training, where matrix products or the whole model may be in 16 bits: equal means equal.
    kind, _, bits = precision.partition(" ")
    if kind == "cast":
        model.to(getattr(torch, bits))
    elif dtype != "float32":
        model.float()
    autocast = torch.autocast("cpu", getattr(torch, bits or "bfloat16"), enabled=kind in ("autocast", "fp8"))
    with torch.no_grad(), autocast:
        logits = model(**inputs, use_cache=False).logits.float()
    labels = stored["input_ids"][:, 1:].flatten()
    losses = [
        torch.nn.functional.cross_entropy(values[:, :-1].flatten(0, 1), labels, reduction="none")
        for values in (stored["logits"], logits)
    ]
    difference = (losses[0].mean() - losses[1].mean()).abs().item()
    tolerance = 0.1 if kind == "fp8" else 1e-3 if kind == dtype == "float32" else 3e-2
    if not difference <= tolerance:
        raise RecipeError.at(
            str(model_path),
            f"its loss on the stored batch is {losses[1].mean():.6f}, that of the training process was "
            f"{losses[0].mean():.6f}: these are not the trained weights",
        )
    return {
        "dtype": dtype,
        "precision": precision,
        "loss_training": losses[0].mean().item(),
        "loss_export": losses[1].mean().item(),
        "max_token_loss_difference": (losses[0] - losses[1]).abs().max().item(),
        "max_logit_difference": (stored["logits"] - logits).abs().max().item(),
        **_sample(model.float(), AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)),
    }


def _sample(model: Any, tokenizer: Any) -> dict[str, str | None]:
    """`sample`, a document that `model` writes. If its class's own `generate` fails, which says nothing about the
    weights, it is None, and `sample_error` says why."""
    torch.manual_seed(0)
    prompt = torch.tensor([document_start(tokenizer)])  # as a document begins in training
    try:
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=min(120, (context_length(model.config) or 128) - 1),
            do_sample=True,
            top_k=50,
            temperature=0.8,
            pad_token_id=tokenizer.eos_token_id,
        )
    except Exception as error:  # any code of any class runs here
        reason = f"{type(model).__name__}.generate fails: {type(error).__name__}: {' '.join(str(error).split()):.200}"
        return {"sample": None, "sample_error": reason}
    return {"sample": tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)}


def repair(run: Path) -> None:
    """Finish an export of a run folder during which the process was killed. No other process may use the folder."""
    files.restore(run / "model")
    shutil.rmtree(run / f"model{files.INCOMPLETE}", ignore_errors=True)
    for folder in (run, run / "model"):
        files.sweep(folder)


def check_files(model_path: Path) -> dict[str, Any]:
    """Compare every file of an export with its `SHA256SUMS`. Raises `RecipeError` naming the one that differs.

    Returns how many were compared, which files are not ours, and a note where an older version wrote no checksums.
    """
    if (reason := files.sums_damage(model_path)) is not None:
        raise RecipeError.at(str(model_path), reason)
    sums = files.sums_of(model_path)
    if sums is None:
        return {"files": f"not compared: an older version of hfpretrain wrote this export without {files.SUMS}"}
    own = {*sums, files.SUMS, "README.md"}
    names = (path.relative_to(model_path).as_posix() for path in sorted(model_path.rglob("*")) if path.is_file())
    others = [name for name in names if name not in own]
    return {"files": len(sums)} | ({"not_ours": others} if others else {})


def plain_environment() -> dict[str, str]:
    """This process's environment without what a launcher has put into it."""
    launcher = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "DEEPSPEED_")
    distributed = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
    return {
        name: value for name, value in os.environ.items() if not name.startswith(launcher) and name not in distributed
    }


def verify_in_fresh_process(
    run: Path, trust_remote_code: bool = False, works: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """`verify` in a new interpreter that knows nothing of the launcher or the engine.

    `works` is called once a second as long as that process computes or reads.
    """
    command = [sys.executable, "-m", "hfpretrain.cli", "verify", str(run), "--json"]
    if trust_remote_code:
        command.append("--trust-remote-code")
    # A session of its own: a signal to all processes of the run must not make a good export look like a bad one.
    pipe, used = subprocess.PIPE, 0.0
    process = subprocess.Popen(
        command, env=plain_environment(), stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    while True:
        try:
            stdout, stderr = process.communicate(timeout=1)
            break
        except subprocess.TimeoutExpired:
            now = _used_seconds(process.pid)
            if now > used:
                works()
            used = now
    if process.returncode:
        raise RuntimeError(f"the export in {run} does not verify:\n{stderr}")
    report: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    return report


def _used_seconds(pid: int) -> float:
    """Seconds that a process and its children have computed, or waited for a disk."""
    with contextlib.suppress(psutil.Error):
        times = psutil.Process(pid).cpu_times()
        return float(sum(times[:4])) + float(getattr(times, "iowait", 0.0))
    return 0.0
