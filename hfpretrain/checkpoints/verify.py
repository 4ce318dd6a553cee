"""Verifying an export: its checksums, its weights, and its loss on a batch from the training process.

Checkpoints are not verified here: `files.damage` checks them.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from hfpretrain import files
from hfpretrain.data.tokenizer import document_start
from hfpretrain.engines import launch
from hfpretrain.modeling.config import context_length
from hfpretrain.recipe.schema import RecipeError

REFERENCE = "reference.safetensors"
"""File of a run with a batch and the logits that the training process computed for it."""
_REFERENCE_TOKENS = 1024


@torch.no_grad()
def write_reference(model: Any, batch: dict[str, torch.Tensor], precision: str, path: Path | None) -> None:
    """Store a batch with the logits of the training process, to compare the export with.

    Only the first 1,024 tokens of each sequence are stored: the logits of longer sequences may need more memory than a
    training step. `precision` is that of `engine.forward_precision`. All ranks must call this, since sharded engines
    need them for the forward pass; only the rank that gives a `path` writes.
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


def verify_export(model_path: Path, reference: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """Load an export with plain transformers and compare its loss with that of the training process.

    `reference`: the file of `write_reference`. `trust_remote_code`: run model code that the pretrained model came with.

    Raises `RecipeError` if the mean losses differ by more than 1e-3 (float32), 3e-2 (16 bits) or 0.1 (8 bits).
    Returns both losses, the largest absolute difference of a logit and of a token's loss, and `sample`, a generated
    text; where the model's class can't generate, `sample` is None and `sample_error` says why.
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
    # Compute in the precision of training, so that equal weights give equal logits.
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
    if not difference <= tolerance:  # NaN counts as different
        raise RecipeError.at(
            str(model_path),
            f"its loss on the stored batch is {losses[1].mean():.6f}, but that of the training process was "
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
    """A `sample` that the model generates. If its class can't generate, which says nothing about the weights, `sample`
    is None and `sample_error` says why."""
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
    except Exception as error:  # `generate` of a custom class may raise anything
        reason = f"{type(model).__name__}.generate fails: {type(error).__name__}: {' '.join(str(error).split()):.200}"
        return {"sample": None, "sample_error": reason}
    return {"sample": tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)}


def compare_weights(folder: Path, weights: Mapping[str, torch.Tensor], trust_remote_code: bool) -> int:
    """Load a plain folder and compare all its weights with `weights`, rounded to its dtype.

    Returns the number of its tensors. Raises `RecipeError` if one is missing, unexpected or different.
    """
    from transformers import AutoModelForCausalLM

    keywords: dict[str, Any] = {"dtype": "auto", "output_loading_info": True, "trust_remote_code": trust_remote_code}
    model, info = AutoModelForCausalLM.from_pretrained(folder, **keywords)
    found = model.state_dict()
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *(name for name, *_ in info["mismatched_keys"])]
    for name, tensor in weights.items():
        exported = found.get(name)
        if exported is None or not torch.equal(exported, tensor.to(exported.dtype)):
            wrong.append(name)
    if wrong:
        names = ", ".join(sorted(wrong)[:3])
        raise RecipeError.at(str(folder), f"{len(wrong)} weights are not those that were exported: {names}")
    return len(found)


def check_files(model_path: Path) -> dict[str, Any]:
    """Compare every file of an export with its `SHA256SUMS`. Raises `RecipeError` naming the one that differs.

    Returns `files`, the number of files compared, and `not_ours`, the names of files that hfpretrain did not write. If
    an older version wrote the export without checksums, `files` is a note that says so.
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


def verify_in_fresh_process(
    run: Path, trust_remote_code: bool = False, made_progress: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """`verify_export` on a run's export in a new interpreter without the launcher and the engine.

    `made_progress` is called once a second while that process computes or reads. Raises `RuntimeError` with its output
    if the export does not verify.
    """
    command = [sys.executable, "-m", "hfpretrain.cli", "verify", str(run), "--json"]
    if trust_remote_code:
        command.append("--trust-remote-code")
    # It runs in a session of its own: a signal to all processes of the run must not make a good export look bad.
    pipe, used = subprocess.PIPE, 0.0
    environment = launch.environment_without_launcher()
    process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    while True:
        try:
            stdout, stderr = process.communicate(timeout=1)
            break
        except subprocess.TimeoutExpired:
            now = _used_seconds(process.pid)
            if now > used:
                made_progress()
            used = now
    if process.returncode:
        raise RuntimeError(f"the export in {run} does not verify:\n{stderr}")
    report: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    return report


def _used_seconds(pid: int) -> float:
    """Seconds that a process and its children have computed or waited for a disk."""
    with contextlib.suppress(psutil.Error):
        times = psutil.Process(pid).cpu_times()
        return float(sum(times[:4])) + float(getattr(times, "iowait", 0.0))
    return 0.0
