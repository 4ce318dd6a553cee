"""Private names of torch and transformers that hfpretrain/modeling uses. Each message advises what to use instead."""

import inspect

import torch
from tiny_models import LLAMA, build
from transformers import PreTrainedModel, core_model_loading, initialization


def test_transformers_initializes_a_module_at_a_time_and_skips_marked_tensors():
    fix = "InitialWeights in modeling/initialization.py draws weights with it; use transformers' new way"
    assert callable(getattr(PreTrainedModel, "_init_weights", None)), f"PreTrainedModel._init_weights is gone: {fix}"
    tensor = torch.zeros(4)
    tensor._is_hf_initialized = True
    initialization.ones_(tensor)
    assert not tensor.any(), f"transformers.initialization ignores _is_hf_initialized, so tied weights are lost: {fix}"
    assert hasattr(initialization, "guard_torch_init_functions"), f"guard_torch_init_functions is gone: {fix}"


def test_transformers_drops_listed_tensors_and_keeps_listed_ones_in_float32():
    fix = "modeling/build.py reports which tensors of a checkpoint it drops; find where transformers drops them"
    name = "_adjust_missing_and_unexpected_keys"
    assert list(inspect.signature(getattr(PreTrainedModel, name, print)).parameters) == ["self", "loading_info"], fix
    fix = "checkpoints/export.py finds with it which tensors stay in float32; use transformers' new way"
    assert build(LLAMA)._get_dtype_plan(torch.bfloat16) == {}, f"PreTrainedModel._get_dtype_plan has changed: {fix}"
    assert hasattr(core_model_loading, "build_glob_alternation"), f"build_glob_alternation is gone: {fix}"


def test_a_model_can_be_built_again_from_its_config():
    fix = "modeling/initialization.py and optim.py build a class again with it; call the class with the config"
    assert hasattr(PreTrainedModel, "_from_config"), f"PreTrainedModel._from_config is gone: {fix}"


def test_a_config_has_the_names_of_its_implementations():
    config = build(LLAMA).config
    fix = "modeling/checks.py reads it; find where transformers keeps the implementation"
    assert isinstance(config._attn_implementation, str), f"config._attn_implementation is gone: {fix}"
    assert hasattr(config, "_experts_implementation"), f"config._experts_implementation is gone: {fix}, to restore it"


def test_torch_reports_whether_triton_works():
    from torch.utils._triton import has_triton

    message = "has_triton has changed: build.should_compile and loss.py ask it whether torch.compile works on a GPU"
    assert isinstance(has_triton(), bool), message


def test_errors_of_compile_have_a_common_class():
    from torch._dynamo import exc

    message = "TorchDynamoException is gone: build.compile_error recognizes errors of compiling by it"
    assert inspect.isclass(getattr(exc, "TorchDynamoException", None)), message


def test_schedulers_keep_their_last_rates():
    scheduler = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), lambda step: 0.5)
    message = "LRScheduler._last_lr is gone: optim.set_step sets it, so that get_last_lr is right after a resume"
    assert scheduler._last_lr == scheduler.get_last_lr() == [0.5], message


def test_modules_keep_tensors_in_dictionaries_by_name():
    module = torch.nn.BatchNorm1d(2)
    message = "Module._parameters or ._buffers is gone: initialization.assign and build.py replace tensors there"
    assert "weight" in module._parameters and "running_mean" in module._buffers, message


def test_a_view_on_the_meta_device_has_the_storage_of_its_base():
    base = torch.zeros(4, device="meta")
    same = base.view(2, 2).untyped_storage()._cdata == base.untyped_storage()._cdata
    message = "_cdata no longer identifies a storage: initialization.residual_projections compares storages by it"
    assert same and torch.zeros(4, device="meta").untyped_storage()._cdata != base.untyped_storage()._cdata, message


def test_convolutions_have_a_common_class():
    message = "_ConvNd is gone: structure.has_experts uses it to distinguish convolutions from stacked experts"
    assert issubclass(torch.nn.Conv1d, torch.nn.modules.conv._ConvNd), message


def test_a_backward_pass_has_a_task_id_and_classes_say_where_their_router_logits_are():
    message = "torch._C._current_graph_task_id is gone: routers.py tells by it that a forward pass is repeated"
    ids = []
    value = torch.ones(1, requires_grad=True)
    value.register_hook(lambda _: ids.append(torch._C._current_graph_task_id()))
    value.sum().backward()
    assert torch._C._current_graph_task_id() == -1 and ids[0] >= 0, message
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoePreTrainedModel, Qwen3MoeTopKRouter

    recorder = getattr(Qwen3MoePreTrainedModel, "_can_record_outputs", {}).get("router_logits")
    message = "_can_record_outputs has changed: routers.find_routers reads which module returns the router's logits"
    assert recorder is not None and recorder.target_class is Qwen3MoeTopKRouter and recorder.index == 0, message
