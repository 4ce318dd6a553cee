import itertools

import pytest
import torch
from tiny_models import MOE, SMALL, SPECIAL
from transformers import AutoConfig, AutoModelForCausalLM

from hfpretrain.modeling import muon
from hfpretrain.modeling.muon import GateAndUp, Muon, flat_matrices, gate_and_up, orthogonalize
from hfpretrain.modeling.optim import build_optimizer, decayed_names, hidden_names
from hfpretrain.recipe.schema import OptimizerSection

GPT_OSS = {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
           "intermediate_size": 48, "num_key_value_heads": 2, **SMALL}  # fmt: skip
LLAMA4 = {**GPT_OSS, "model_type": "llama4_text", "num_experts_per_tok": 1}
QWEN_NEXT = {**MOE, "model_type": "qwen3_next", "shared_expert_intermediate_size": 16, "head_dim": 8,
             "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
             "linear_value_head_dim": 8}  # fmt: skip


def meta_model(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SPECIAL, **config}))


@pytest.mark.parametrize(
    ("config", "layout"),
    [(MOE, GateAndUp(1, False)), (GPT_OSS, GateAndUp(2, True)), (LLAMA4, GateAndUp(2, False))],
)
def test_muon_trains_stacks_of_experts_and_adamw_their_router(config, layout):
    model = meta_model(config)
    layer = {name: p for name, p in model.named_parameters() if ".layers.1." in name and p.ndim > 1}
    trained = hidden_names(model)
    left = {name.partition(".1.")[2].partition(".")[2] for name in layer if name not in trained}
    router = "router" if config is not MOE else "gate"
    assert left == {f"{router}.weight"} | ({"experts.down_proj_bias", "experts.gate_up_proj_bias"} & left)
    (fused,) = (name for name in layer if name.endswith("gate_up_proj"))
    assert gate_and_up(model, fused) == layout
    assert not any(gate_and_up(model, name) for name in layer if name != fused)


def test_muon_trains_no_convolution_and_no_gate_with_one_row():
    model = meta_model(QWEN_NEXT)
    left = {name for name, p in model.named_parameters() if p.ndim > 1} - hidden_names(model)
    assert {name.rpartition("layers.0.")[2] for name in left if "layers.0." in name} == {
        "linear_attn.conv1d.weight", "mlp.gate.weight", "mlp.shared_expert_gate.weight"
    }  # fmt: skip


@pytest.mark.parametrize("layout", [None, *(GateAndUp(dim, taken) for dim in (1, 2) for taken in (False, True))])
@pytest.mark.parametrize("shape", [(3, 32, 16), (2, 8, 24)])
def test_each_matrix_of_a_stack_is_trained_as_by_torch(layout, shape, monkeypatch):
    """In bfloat16, as in torch."""
    monkeypatch.setattr(muon, "compute_dtype", lambda device: torch.bfloat16)
    torch.manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(shape))
    split = layout.split if layout else (lambda tensor: tensor[:, None])
    single = [torch.nn.Parameter(m.clone()) for m in split(stack.detach()).flatten(0, 1)]
    keywords = {"lr": 0.1, "momentum": 0.9}
    ours = Muon([{"params": [stack], "weight_decay": 0.1}], layouts=[[layout]], **keywords)
    theirs = torch.optim.Muon(single, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", **keywords)
    for _ in range(3):
        stack.grad = torch.randn(shape)
        for parameter, gradient in zip(single, split(stack.grad).flatten(0, 1), strict=True):
            parameter.grad = gradient.clone()
        ours.step()
        theirs.step()
    expected = torch.stack([parameter.detach() for parameter in single])
    torch.testing.assert_close(split(stack.detach()).flatten(0, 1), expected, rtol=0, atol=5e-3)
    assert (expected - split(stack.detach()).flatten(0, 1)).norm() < 1e-3 * expected.norm()


def test_a_matrix_and_its_transpose_have_the_same_update():
    matrices = torch.randn(3, 8, 20)
    update = orthogonalize(matrices, torch.float32)
    torch.testing.assert_close(orthogonalize(matrices.mT, torch.float32).mT, update)
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.6 and values.max() < 1.3
    assert torch.equal(orthogonalize(matrices[0], torch.float32), orthogonalize(matrices[:1], torch.float32)[0])


def compare_placements(rank, number, folder):
    """Tensors that are cut in several ways have the update that they have as a whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=number)
    line = init_device_mesh("cpu", (number,))
    cuts = [(line, [Shard(0)]), (line, [Shard(1)]), (line, [Replicate()])]
    if number == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        cuts += [
            (square, [Replicate(), Shard(0)]),
            (square, [Shard(0), Shard(1)]),
            (square, [_StridedShard(0, split_factor=2), Shard(0)]),
        ]
    shapes = [(7, 12), (7, 12), (7, 12), (12, 7), (5, 12, 6), (1, 6, 12)]
    layouts = [[None, None, None, None, GateAndUp(1, False), GateAndUp(2, True)]]
    for mesh, placements in cuts:
        torch.manual_seed(0)
        even = [(8, shape[1], *shape[2:]) for shape in shapes]  # torch 2.13 can't make uneven strided shards
        strided = isinstance(placements[0], _StridedShard)
        whole = [torch.nn.Parameter(torch.randn(shape)) for shape in (even if strided else shapes)]
        parts = [torch.nn.Parameter(distribute_tensor(p.detach().clone(), mesh, placements)) for p in whole]
        first, second = (Muon([{"params": p, "weight_decay": 0.1}], 0.1, 0.9, layouts) for p in (whole, parts))
        for _ in range(2):
            for parameter, part in zip(whole, parts, strict=True):
                parameter.grad = torch.randn(parameter.shape)
                part.grad = distribute_tensor(parameter.grad.clone(), mesh, placements)
            first.step()
            second.step()
        for parameter, part in zip(whole, parts, strict=True):
            torch.testing.assert_close(part.detach().full_tensor(), parameter.detach(), rtol=0, atol=1e-5)
    compare_flat(rank, number)
    torch.distributed.destroy_process_group()


def compare_flat(rank, number):
    """Pieces of matrices in flat tensors have the update of whole matrices, cut as in ZeRO-2 and as in ZeRO-3."""
    layouts = [None, GateAndUp(1, False), GateAndUp(2, True), None]
    torch.manual_seed(0)
    whole = [torch.nn.Parameter(torch.randn(shape)) for shape in ((7, 12), (5, 12, 6), (3, 6, 12), (9, 4))]
    sizes = [-(-p.numel() // number) for p in whole]
    size = -(-sum(p.numel() for p in whole) // number)
    one_after_another, each, first = [], [], 0
    for parameter, layout, part, start in zip(whole, layouts, sizes, (0, *itertools.accumulate(sizes)), strict=False):
        end, pieces = first + parameter.numel(), []
        for other in range(first // size, -(-end // size)):
            low, high = max(first, other * size), min(end, (other + 1) * size)
            pieces.append((other, low - other * size, low - first, high - low))
        one_after_another += flat_matrices(parameter.shape, layout, pieces)
        pieces = [(r, start, r * part, min(part, parameter.numel() - r * part)) for r in range(number)]
        each += flat_matrices(parameter.shape, layout, pieces)
        first = end

    def cut(tensors, by_parameter):
        if not by_parameter:
            together = torch.cat([tensor.flatten() for tensor in tensors])
            return torch.nn.functional.pad(together, (0, size * number - len(together)))[size * rank :][:size].clone()
        padded = (torch.nn.functional.pad(t.flatten(), (0, s * number)) for t, s in zip(tensors, sizes, strict=True))
        return torch.cat([p[s * rank : s * (rank + 1)] for p, s in zip(padded, sizes, strict=True)])

    flats = [torch.nn.Parameter(cut([p.detach() for p in whole], by_parameter)) for by_parameter in (False, True)]
    first, second = (Muon([{"params": p, "weight_decay": 0.1}], 0.1, 0.9, [layouts]) for p in (whole, flats))
    second.use_flat_tensors(
        dict(zip(flats, (one_after_another, each), strict=True)), torch.device("cpu"), torch.distributed.group.WORLD
    )
    for _ in range(2):
        for parameter in whole:
            parameter.grad = torch.randn(parameter.shape)
        for by_parameter, flat in enumerate(flats):
            flat.grad = cut([p.grad for p in whole], by_parameter)
        first.step()
        second.step()
    for by_parameter, flat in enumerate(flats):
        expected = cut([p.detach() for p in whole], by_parameter)
        torch.testing.assert_close(flat.detach(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("number", [2, 4])
def test_sharded_tensors_are_trained_like_whole_ones(tmp_path, number):
    torch.multiprocessing.start_processes(compare_placements, (number, tmp_path), number, start_method="forkserver")


def test_muon_with_adamw_trains_every_parameter_of_a_mixture_of_experts():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SPECIAL, **MOE}), dtype=torch.float32)
    section = OptimizerSection(name="muon", lr=1e-2)
    optimizer = build_optimizer(model, section, decayed_names(model), hidden_names(model))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = torch.randint(64, (4, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert not any(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert {len(state) for state in optimizer.state.values()} == {1, 3}
