"""Initial weights: drawn layer by layer from the seed, so that every engine starts from the same ones, and checked."""

from __future__ import annotations

import copy
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from hfpretrain.modeling.structure import decoder_layers, run_on_meta
from hfpretrain.recipe.schema import Problem, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Moments:
    """Mean, standard deviation and checksum of a parameter's values."""

    mean: float
    std: float
    checksum: str

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Moments:
        """Compute them in float32, of a tensor of any shape and dtype."""
        values = tensor.detach().float()
        std, mean = torch.std_mean(values, correction=0)
        return cls(mean.item(), std.item(), xxhash.xxh3_128_hexdigest(values.contiguous().cpu().numpy().data))


Rule = dict[str, Moments]
Weights = Iterable[tuple[str, torch.Tensor]]


class InitialWeights:
    """Values for the parameters and buffers of a model on the meta device, drawn on the CPU by the model's class.

    Iterating yields (name, float32 tensor), the same values each time. One decoder layer, or one module outside of the
    layers, is in memory at a time. It is drawn from the seed and its name alone, so the engine and the number of
    processes change no weight. Tied tensors are yielded once, by their first name. `depth_scaled_init`: the recipe's
    field; raises `RecipeError` if the model can't do it. `drawn` is called after each layer or module.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        seed: int,
        depth_scaled_init: bool = False,
        drawn: Callable[[], None] = lambda: None,
    ):
        self._unit_drawn = drawn
        self._blueprint = copy.deepcopy(model)  # the model itself is sharded later
        self._seed = seed
        self._scaled, self._scaled_std = _depth_scaled(model) if depth_scaled_init else (set(), 0.0)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        names = {id(tensor): name for name, tensor in reversed(list(_tensors(self._blueprint)))}
        drawn: set[int] = set()
        constructed: dict[str, torch.Tensor] = {}
        for name, unit, submodules, owners in _units(self._blueprint):
            pieces = _draw(name, unit, submodules, owners, self._seed, drawn)
            for inner, tensor in pieces.items():
                if inner in self._scaled:
                    generator = torch.Generator().manual_seed(_number(self._seed, f"{inner} scaled"))
                    tensor.normal_(0.0, self._scaled_std, generator=generator)
                elif _is_undrawn(tensor):
                    constructed = constructed or _constructed(self._blueprint, self._seed)
                    pieces[inner] = constructed[inner].detach()
            drawn |= {key for key, known in names.items() if known in pieces}
            self._unit_drawn()
            yield from pieces.items()

    def rule(self) -> Rule:
        """The moments that each parameter should have, measured on a draw with another seed.

        If several layers have the same class and shapes, only one of them is drawn.
        """
        parameters = dict(self._blueprint.named_parameters())
        found: Rule = {}
        kinds: dict[Any, Rule] = {}
        for name, unit, submodules, owners in _units(self._blueprint):
            kind = (type(unit), tuple((inner, tensor.shape) for inner, tensor in _tensors(unit)))
            if kind not in kinds:
                pieces = _draw(name, unit, submodules, owners, seed=-1, drawn=set())
                self._unit_drawn()
                kinds[kind] = {
                    inner.removeprefix(f"{name}."): Moments.of(tensor)
                    for inner, tensor in pieces.items()
                    if not _is_undrawn(tensor)
                }
            for inner, moments in kinds[kind].items():
                full = f"{name}.{inner}"
                if full in parameters:
                    found[full] = Moments(0.0, self._scaled_std, "") if full in self._scaled else moments
        return found


def _tensors(module: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(prefix, remove_duplicate=False)
    yield from module.named_buffers(prefix, remove_duplicate=False)


def _units(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module, list[torch.nn.Module], dict[Any, Any]]]:
    """Decoder layers, and the modules outside of them, one at a time.

    Yields name, module, its submodules to initialize, and the `PreTrainedModel` whose `_init_weights` does it for each.
    Layers are taken whole, since some classes initialize the weights of a module's children with it.
    """
    from transformers import PreTrainedModel

    owners: dict[torch.nn.Module, Any] = {}

    def own(module: torch.nn.Module, owner: Any) -> None:
        owners[module] = owner = module if isinstance(module, PreTrainedModel) else owner
        for child in module.children():
            own(child, owner)

    own(model, model)
    layers = set(decoder_layers(model))
    inside = {module for layer in layers for module in layer.modules()}
    for name, module in model.named_modules():
        if module in layers:
            yield name, module, list(module.modules())[::-1], owners
        elif module not in inside and any(True for _ in _own_tensors(module)):
            yield name, module, [module], owners


def _own_tensors(module: torch.nn.Module) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    for holder in (module._parameters, module._buffers):
        yield from ((holder, name, tensor) for name, tensor in holder.items() if tensor is not None)


def _draw(
    name: str,
    unit: torch.nn.Module,
    submodules: list[torch.nn.Module],
    owners: dict[Any, Any],
    seed: int,
    drawn: set[int],
) -> dict[str, torch.Tensor]:
    """Values of the unit's tensors by their full names, except those in `drawn`."""
    from transformers import initialization

    memo: dict[int, Any] = {}
    twin = copy.deepcopy(unit, memo)
    twins = {id(module): memo[id(module)] for module in submodules}
    known = {id(memo[key]) for key in drawn if key in memo}
    new: dict[int, torch.Tensor] = {}
    for module in submodules:
        for holder, leaf, tensor in _own_tensors(twins[id(module)]):
            if id(tensor) not in new:
                # Values that are still NaN at the end were not initialized.
                fill = math.nan if tensor.is_floating_point() else 0
                value = torch.full_like(tensor, fill, device="cpu")
                new[id(tensor)] = torch.nn.Parameter(value) if isinstance(tensor, torch.nn.Parameter) else value
                new[id(tensor)]._is_hf_initialized = id(tensor) in known  # type: ignore[attr-defined]
            holder[leaf] = new[id(tensor)]
    skipped = {id(new[key]) for key in known if key in new}
    with torch.random.fork_rng(devices=[]), torch.no_grad(), initialization.guard_torch_init_functions():
        torch.manual_seed(_number(seed, name))
        for module in submodules:
            owners[module]._init_weights(twins[id(module)])
    pieces = {}
    for inner, tensor in _tensors(twin, name):
        if tensor.device.type == "cpu" and id(tensor) not in skipped:
            skipped.add(id(tensor))
            pieces[inner] = tensor.detach()
    return pieces


def _is_undrawn(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isnan().any())


def _constructed(model: PreTrainedModel, seed: int) -> dict[str, torch.Tensor]:
    """All tensors as the constructors leave them, for classes that initialize some only there (apertus, falcon_h1)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_number(seed, "constructed"))
        return dict(_tensors(type(model)._from_config(model.config, dtype=torch.float32)))


def _number(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest(), "little")


def residual_projections(model: PreTrainedModel) -> list[str]:
    """Names of the weights whose output is added to the residual stream: in most models two in each layer.

    They are found by a forward pass on the meta device. Among the modules of a sub-layer that have matrices, the last
    one whose output shares its storage with the sub-layer's output is taken. If it has several matrices, as fused
    experts do, its last matrix is taken.
    """
    outputs: dict[torch.nn.Module, torch.Tensor] = {}

    def remember(module: torch.nn.Module, _: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) and output else output
        if isinstance(output, torch.Tensor):
            outputs[module] = output

    model = copy.deepcopy(model).eval()
    sublayers = [child for layer in decoder_layers(model) for child in layer.children() if _matrices(child)]
    for module in (module for sublayer in sublayers for module in sublayer.modules()):
        module.register_forward_hook(remember)
    try:
        with torch.no_grad():
            run_on_meta(model, length=2)
    except Exception as error:  # a model's code may raise anything
        reason = " ".join(str(error).split())
        message = f"{type(model).__name__} does not run on the meta device, so set it to false: {reason:.300}"
        raise RecipeError.at("model.depth_scaled_init", message) from error
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = []
    for sublayer in sublayers:
        written = outputs.get(sublayer)
        if written is None or written.numel() != 2 * model.config.get_text_config().hidden_size:
            continue  # its output has another width than the residual stream
        leaves = [module for module in sublayer.modules() if _own_matrices(module) and module in outputs]
        writers = [leaf for leaf in leaves if _storage(outputs[leaf]) == _storage(written)]
        if writers:
            found.append(names[id(_own_matrices(writers[-1])[-1])])
    return found


def _storage(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.untyped_storage()._cdata, tensor.numel()


def _own_matrices(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    own = module.named_parameters(recurse=False)
    return [parameter for name, parameter in own if parameter.ndim >= 2 and not name.endswith("bias")]


def _matrices(module: torch.nn.Module) -> bool:
    return any(parameter.ndim >= 2 for parameter in module.parameters())


def _depth_scaled(model: PreTrainedModel) -> tuple[set[str], float]:
    """Names of the residual projections, and the standard deviation to draw them with (GPT-2: 1 / sqrt(2 layers))."""
    projections, num_layers = residual_projections(model), len(decoder_layers(model))
    std = getattr(model.config, "initializer_range", None)
    name = type(model).__name__
    if std is None:
        raise RecipeError.at("model.depth_scaled_init", f"{name}'s config has no initializer_range; turn it off")
    if len(projections) != 2 * num_layers:
        raise RecipeError.at(
            "model.depth_scaled_init",
            f"found {len(projections)} residual projections in {num_layers} layers of {name}, not two each; turn it "
            "off for this model",
        )
    return set(projections), std / math.sqrt(2 * num_layers)


def check_weights(
    weights: Iterable[tuple[str, torch.Tensor]], expected: Rule | None, looked: Callable[[], None] = lambda: None
) -> str:
    """Check all parameters of a model before its first step; returns a checksum over their names and values.

    `weights`: names and whole tensors. `expected`: see `InitialWeights.rule`; None for a pretrained model, whose values
    need only be finite. Raises `RecipeError` for NaN or infinity, for a mean or standard deviation other than
    expected, and for two parameters of more than 16 elements with the same random values. `looked` is called after
    each parameter.
    """
    problems: list[Problem] = []
    checksums: dict[str, str] = {}
    first: dict[str, str] = {}
    for name, tensor in weights:
        found = Moments.of(tensor)
        looked()
        checksums[name] = found.checksum
        if not (math.isfinite(found.mean) and math.isfinite(found.std)):
            problems.append(Problem(name, "holds NaN or infinity"))
        elif expected is not None and name in expected:
            ruled = expected[name]
            # Values that don't depend on the seed, such as ones, are the same in every layer.
            random = found.std > 0 and tensor.numel() > 16 and found.checksum != ruled.checksum
            twin = first.setdefault(found.checksum, name) if random else name
            if twin != name:
                problems.append(Problem(name, f"has the same values as {twin}"))
            if _differs(found, ruled, tensor.numel()):
                problems.append(Problem(name, f"{_words(found)}; the model's class gives {_words(ruled)}"))
    if problems:
        raise RecipeError([Problem("model", "the initial weights are not those of the model's class"), *problems])
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(checksums):
        digest.update(f"{name} {checksums[name]}\n".encode())
    return digest.hexdigest()


def _differs(found: Moments, ruled: Moments, numel: int) -> bool:
    """Whether the moments differ by more than chance.

    Both are measured on `numel` elements, so six standard errors are allowed; and 1%, for weights in 16 bits and
    embeddings with a row of zeros.
    """
    error = 6 * math.sqrt(2 / numel)
    mean, std = abs(found.mean - ruled.mean), abs(found.std - ruled.std)
    return mean > error * ruled.std + 1e-6 * (1 + abs(ruled.mean)) or std > max(0.01, error) * ruled.std


def _words(moments: Moments) -> str:
    if moments.mean == moments.std == 0:
        return "all zeros"
    return f"mean {moments.mean:.3g}, standard deviation {moments.std:.3g}"


def assign(model: torch.nn.Module, weights: Weights) -> Iterator[torch.Tensor]:
    """Replace a model's tensors on the meta device by values on the CPU, tied ones in all places; yields each."""
    homes: dict[int, list[tuple[Any, str]]] = defaultdict(list)
    for module in model.modules():
        for holder in (module._parameters, module._buffers):
            for leaf, tensor in holder.items():
                homes[id(tensor)].append((holder, leaf))
    named = named_tensors(model)
    for name, value in weights:
        is_parameter = isinstance(named[name], torch.nn.Parameter)
        new = torch.nn.Parameter(value, requires_grad=named[name].requires_grad) if is_parameter else value
        for holder, leaf in homes[id(named[name])]:
            holder[leaf] = new
        yield new


def fill(model: torch.nn.Module, weights: Weights | None) -> torch.nn.Module:
    """Put `weights` into a model on the meta device, and return it. None: the model has its values already."""
    for _ in assign(model, weights or ()):
        pass
    return model


def named_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
