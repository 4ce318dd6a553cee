"""Private names of libraries that the engines use. For each that an upgrade removes, one test fails."""

import importlib
import inspect
from importlib.metadata import version

import pytest

ZERO = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
ZERO3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
# File of hfpretrain/engines; class or module; its private names; what they are used for.
USES = [
    ("choose", "accelerate.state.AcceleratorState", ["_reset_state"], "forget the precision of an earlier run"),
    ("base", "torch.nn.parallel.DistributedDataParallel", ["reducer", "logger"], "free the process group at the end"),
    ("fsdp", "accelerate.state.PartialState", ["_shared_state"], "have FSDP2 on CPU processes"),
    ("fsdp", "torch._C._distributed_c10d", ["HashStore"], "have FSDP2 in one process"),
    ("fsdp", "accelerate.utils.fsdp_utils", ["fsdp2_prepare_model"], "shard a model that has no values yet"),
    ("fsdp", "transformers.PreTrainedModel", ["_no_split_modules"], "know which layers to shard"),
    ("tensor_parallel", "transformers.PreTrainedModel", ["_resolve_parallel_plans"], "find the plan of a model"),
    ("tensor_parallel", "transformers.distributed.tensor_parallel", ["apply_tensor_parallelism"], "cut a model"),
    ("tensor_parallel", "transformers.PreTrainedModel", ["_tp_size"], "mark a model as cut for accelerate"),
    ("ulysses", "transformers.modeling_utils", ["ALL_ATTENTION_FUNCTIONS"], "keep packed documents apart"),
    ("ulysses", "accelerate.utils.DeepSpeedSequenceParallelConfig", ["sp_attn_implementation"],
     "choose the attention that DeepSpeed wraps"),
    ("deepspeed", "transformers.integrations.deepspeed", ["_hf_deepspeed_config_weak_ref"],
     "build a model as without DeepSpeed"),
    ("deepspeed", "torch.utils.cpp_extension", ["_get_build_directory"], "find a compiled operator"),
    ("deepspeed", "deepspeed.runtime.engine.DeepSpeedEngine",
     ["set_gradient_accumulation_boundary", "micro_steps", "global_steps", "global_samples"],
     "run a backward pass without an update, and count no rehearsed step"),
    ("deepspeed", "deepspeed.runtime.utils", ["combine_grad_norm_groups", "is_invalid_grad_norm"],
     "know the norm of all gradients before the update"),
    ("deepspeed", ZERO, ["scaled_global_norm", "_wait_for_offload_copies", "loss_scale"],
     "know the norm of all gradients before the update"),
    ("deepspeed", ZERO, ["check_grad_overflow", "overflow"], "drop gradients"),
    ("deepspeed", ZERO, ["bit16_groups", "single_partition_of_fp32_groups", "update_lp_params"],
     "save and load the state in stages 1 and 2"),
    ("deepspeed", "deepspeed.utils.mixed_precision_linkage", ["_hp_mapping"], "save the state in stages 1 and 2"),
    ("deepspeed", "deepspeed.utils.tensor_fragment.tensor_fragment", ["lp_fragment_address", "hp_fragment_address"],
     "save the state in stages 1 and 2"),
    ("deepspeed", ZERO3, ["_get_norm_groups", "overflow"], "know the norm of all gradients, and drop them, in stage 3"),
    ("deepspeed", ZERO3, ["grad_position", "get_param_id", "fp32_partitioned_groups_flat"],
     "save the state in stage 3"),
    ("deepspeed", ZERO3, ["fp16_groups", "_reassign_or_swap_out_partitioned_parameters", "checkpoint_event_prologue",
                          "checkpoint_event_epilogue"], "load the state in stage 3"),
    ("deepspeed", "deepspeed.runtime.zero.partition_parameters",
     ["convert_to_zero_parameters", "ds_process_group", "ds_numel", "ds_shape", "ds_tensor"],
     "partition one parameter at a time, and know a process's part of each"),
    ("deepspeed", "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
     ["cur_scale", "cur_iter", "last_overflow_iter", "scale_window", "cur_hysteresis"],
     "save and load the loss scale of fp16"),
    ("pieces", "torch.distributed.checkpoint.metadata", ["_MEM_FORMAT_ENCODING"], "read a checkpoint's index safely"),
    ("pieces", "torch.serialization", ["_get_layout"], "read a checkpoint's index safely"),
    ("pieces", "torch.distributed.checkpoint.filesystem", ["_StorageInfo"], "read a checkpoint's index safely"),
    ("pieces", "torch.distributed.checkpoint.FileSystemReader", ["_get_metadata_path"], "find a checkpoint's index"),
    ("pieces", "torch.Tensor", ["_make_wrapper_subclass"], "save tensors of which a process has pieces"),
    ("pieces", "torch.utils._python_dispatch", ["is_traceable_wrapper_subclass"], "save moments in 8 bits"),
]  # fmt: skip
CASES = [(file, owner, name, purpose) for file, owner, names, purpose in USES for name in names]


def find(owner):
    """A module, or a class in one."""
    try:
        return importlib.import_module(owner)
    except ModuleNotFoundError:
        module, _, name = owner.rpartition(".")
        return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("file", "owner", "name", "purpose"), CASES, ids=[f"{c[0]}-{c[2]}" for c in CASES])
def test_the_library_still_has_the_name(file, owner, name, purpose):
    library = owner.partition(".")[0]
    advice = (
        f"{library} {version(library)} has no {name} in {owner}. hfpretrain/engines/{file}.py uses it to {purpose}: "
        f"find what replaces it in {library}, change that file, run `pytest tests/engines`, and only then raise the "
        "version that pyproject.toml allows."
    )
    try:
        found = find(owner)
    except (ImportError, AttributeError):
        pytest.fail(advice)
    # Attributes that an instance gets, or that are set on another object, stand in the source.
    assert hasattr(found, name) or name in inspect.getsource(found), advice


def test_fragments_have_the_methods_that_torch_calls_to_save_checkpoints():
    from torch.distributed._checkpointable import _Checkpointable

    from hfpretrain.engines.pieces import Fragments

    called = {name for name in vars(_Checkpointable) if name.startswith(("__create", "__get_tensor"))}
    assert called and called <= set(vars(Fragments)), (
        "torch.distributed.checkpoint calls other methods of a tensor (`_Checkpointable`): add them to `Fragments` in "
        "hfpretrain/engines/pieces.py, and run `pytest tests/engines`"
    )
