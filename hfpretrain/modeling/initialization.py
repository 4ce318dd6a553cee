"""Draws initial weights layer by layer, so that every engine starts from the same ones, and checks them."""

from __future__ import annotations

import copy
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from hfpretrain.modeling.structure import decoder_layers, run_on_meta
from hfpretrain.recipe.schema import Problem, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAX_SAMPLE = 4096
_CHANCE = 1e-9  # of refusing a small parameter although its distribution is right


@dataclass(frozen=True)
class Moments:
    """Mean, standard deviation and checksum of a parameter's values."""

    mean: float
    std: float
    checksum: str
    sample: torch.Tensor | None = field(default=None, compare=False)
    """The values in ascending order, float32 (n,), of a random parameter of at most 4,096 elements; else None."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Moments:
        """Compute them in float32, of a tensor of any shape and dtype."""
        values = tensor.detach().float()
        found_std, found_mean = torch.std_mean(values, correction=0)
        std, mean = found_std.item(), found_mean.item()
        is_random = std > 1e-6 * abs(mean)  # rounding may give equal values a small standard deviation
        sample = values.flatten().sort().values.cpu() if is_random and values.numel() <= _MAX_SAMPLE else None
        return cls(mean, std, xxhash.xxh3_128_hexdigest(values.contiguous().cpu().numpy().data), sample)


ExpectedMoments = dict[str, Moments]
Weights = Iterable[tuple[str, torch.Tensor]]


class InitialWeights:
    """Values for the parameters and buffers of a model on the meta device, drawn on the CPU by the model's class.

    Iterating yields (name, float32 tensor), the same values each time. One decoder layer, or one module outside of the
    layers, is in memory at a time. Its values depend only on the seed and its name, so the engine and the number of
    processes change no weight. Tied tensors are yielded once, by their first name. `depth_scaled_init`: the recipe's
    field; raises `RecipeError` if the model can't do it. `unit_drawn` is called after each layer or module.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        seed: int,
        depth_scaled_init: bool = False,
        unit_drawn: Callable[[], None] = lambda: None,
    ):
        self._unit_drawn = unit_drawn
        self._blueprint = copy.deepcopy(model)  # the model itself is sharded later
        self._seed = seed
        self._scaled, self._scaled_std = _depth_scaled_weights(model) if depth_scaled_init else (set(), 0.0)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        names = {id(tensor): name for name, tensor in reversed(list(_named_tensors(self._blueprint)))}
        drawn: set[int] = set()
        constructed: dict[str, torch.Tensor] = {}
        for name, unit, submodules, owners in _iterate_units(self._blueprint):
            tensors = _draw_unit(name, unit, submodules, owners, self._seed, drawn)
            for inner, tensor in tensors.items():
                if inner in self._scaled:
                    generator = torch.Generator().manual_seed(_derive_seed(self._seed, f"{inner} scaled"))
                    tensor.normal_(0.0, self._scaled_std, generator=generator)
                elif _is_unset(tensor):
                    constructed = constructed or _tensors_from_constructors(self._blueprint, self._seed)
                    tensors[inner] = constructed[inner].detach()
            drawn |= {key for key, known in names.items() if known in tensors}
            self._unit_drawn()
            yield from tensors.items()

    def expected_moments(self) -> ExpectedMoments:
        """The moments that each parameter should have, measured on weights drawn from another seed.

        Of layers with the same class and shapes, only one is drawn.
        """
        parameters = dict(self._blueprint.named_parameters())
        found: ExpectedMoments = {}
        kinds: dict[Any, ExpectedMoments] = {}
        for name, unit, submodules, owners in _iterate_units(self._blueprint):
            kind = (type(unit), tuple((inner, tensor.shape) for inner, tensor in _named_tensors(unit)))
            if kind not in kinds:
                tensors = _draw_unit(name, unit, submodules, owners, seed=-1, drawn=set())
                self._unit_drawn()
                kinds[kind] = {
                    inner.removeprefix(f"{name}."): Moments.of(tensor)
                    for inner, tensor in tensors.items()
                    if not _is_unset(tensor)
                }
            for inner, moments in kinds[kind].items():
                full = f"{name}.{inner}"
                if full in parameters:
                    found[full] = Moments(0.0, self._scaled_std, "") if full in self._scaled else moments
        return found


def _named_tensors(module: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(prefix, remove_duplicate=False)
    yield from module.named_buffers(prefix, remove_duplicate=False)


def _iterate_units(
    model: PreTrainedModel,
) -> Iterator[tuple[str, torch.nn.Module, list[torch.nn.Module], dict[Any, Any]]]:
    """Yield the decoder layers, and the modules outside of them, one at a time.

    Yields name, module, its submodules to initialize, and for each submodule the `PreTrainedModel` whose
    `_init_weights` initializes it. Layers are yielded whole, since some classes initialize the weights of a module's
    children together with the module.
    """
    from transformers import PreTrainedModel

    owners: dict[torch.nn.Module, Any] = {}

    def find_owners(module: torch.nn.Module, owner: Any) -> None:
        owners[module] = owner = module if isinstance(module, PreTrainedModel) else owner
        for child in module.children():
            find_owners(child, owner)

    find_owners(model, model)
    layers = set(decoder_layers(model))
    inside = {module for layer in layers for module in layer.modules()}
    for name, module in model.named_modules():
        if module in layers:
            yield name, module, list(module.modules())[::-1], owners
        elif module not in inside and any(True for _ in _tensors_of(module)):
            yield name, module, [module], owners


def _tensors_of(module: torch.nn.Module) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    for holder in (module._parameters, module._buffers):
        yield from ((holder, name, tensor) for name, tensor in holder.items() if tensor is not None)


def _draw_unit(
    name: str,
    unit: torch.nn.Module,
    submodules: list[torch.nn.Module],
    owners: dict[Any, Any],
    seed: int,
    drawn: set[int],
) -> dict[str, torch.Tensor]:
    """Draw the unit's tensors, except those in `drawn`; returns them by full name."""
    from transformers import initialization

    memo: dict[int, Any] = {}
    twin = copy.deepcopy(unit, memo)
    twins = {id(module): memo[id(module)] for module in submodules}
    known = {id(memo[key]) for key in drawn if key in memo}
    new: dict[int, torch.Tensor] = {}
    for module in submodules:
        for holder, leaf, tensor in _tensors_of(twins[id(module)]):
            if id(tensor) not in new:
                # Values that are still NaN afterward were not initialized.
                fill = math.nan if tensor.is_floating_point() else 0
                value = torch.full_like(tensor, fill, device="cpu")
                new[id(tensor)] = torch.nn.Parameter(value) if isinstance(tensor, torch.nn.Parameter) else value
                new[id(tensor)]._is_hf_initialized = id(tensor) in known  # type: ignore[attr-defined]
            holder[leaf] = new[id(tensor)]
    skipped = {id(new[key]) for key in known if key in new}
    with torch.random.fork_rng(devices=[]), torch.no_grad(), initialization.guard_torch_init_functions():
        torch.manual_seed(_derive_seed(seed, name))
        for module in submodules:
            owners[module]._init_weights(twins[id(module)])
    tensors = {}
    for inner, tensor in _named_tensors(twin, name):
        if tensor.device.type == "cpu" and id(tensor) not in skipped:
            skipped.add(id(tensor))
            tensors[inner] = tensor.detach()
    return tensors


def _is_unset(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isnan().any())


def _tensors_from_constructors(model: PreTrainedModel, seed: int) -> dict[str, torch.Tensor]:
    """All tensors as constructors initialize them. Apertus and Falcon-H1 initialize some of them only there."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_derive_seed(seed, "constructed"))
        return dict(_named_tensors(type(model)._from_config(model.config, dtype=torch.float32)))


def _derive_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest(), "little")


def residual_projections(model: PreTrainedModel) -> list[str]:
    """Names of the weights whose output is added to the residual stream: in most models two in each layer.

    They are found by a forward pass on the meta device. In each sub-layer, the module is the last one that has matrices
    and whose output shares its storage with the sub-layer's output. The weight is the last matrix of this module; fused
    experts have several.
    """
    outputs: dict[torch.nn.Module, torch.Tensor] = {}

    def keep_output(module: torch.nn.Module, _: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) and output else output
        if isinstance(output, torch.Tensor):
            outputs[module] = output

    model = copy.deepcopy(model).eval()
    sublayers = [child for layer in decoder_layers(model) for child in layer.children() if _has_matrices(child)]
    for module in (module for sublayer in sublayers for module in sublayer.modules()):
        module.register_forward_hook(keep_output)
    try:
        with torch.no_grad():
            run_on_meta(model, length=2)
    except Exception as error:  # a model's code may raise anything
        reason = " ".join(str(error).split())
        message = f"needs a model that runs on the meta device, and {type(model).__name__} does not: {reason:.300}"
        raise RecipeError.at("model.depth_scaled_init", f"{message}; set it to false") from error
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = []
    for sublayer in sublayers:
        sublayer_output = outputs.get(sublayer)
        if sublayer_output is None or sublayer_output.numel() != 2 * model.config.get_text_config().hidden_size:
            continue  # its output has another width than the residual stream
        leaves = [module for module in sublayer.modules() if _matrices_of(module) and module in outputs]
        projections = [leaf for leaf in leaves if _storage(outputs[leaf]) == _storage(sublayer_output)]
        if projections:
            found.append(names[id(_matrices_of(projections[-1])[-1])])
    return found


def _storage(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.untyped_storage()._cdata, tensor.numel()


def _matrices_of(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    own = module.named_parameters(recurse=False)
    return [parameter for name, parameter in own if parameter.ndim >= 2 and not name.endswith("bias")]


def _has_matrices(module: torch.nn.Module) -> bool:
    return any(parameter.ndim >= 2 for parameter in module.parameters())


def _depth_scaled_weights(model: PreTrainedModel) -> tuple[set[str], float]:
    """Names of the residual projections, and the standard deviation to draw them with (GPT-2: 1 / sqrt(2 layers))."""
    projections, num_layers = residual_projections(model), len(decoder_layers(model))
    std = getattr(model.config, "initializer_range", None)
    name = type(model).__name__
    if std is None:
        message = f"needs initializer_range, which the config of {name} does not have; set it to false"
        raise RecipeError.at("model.depth_scaled_init", message)
    if len(projections) != 2 * num_layers:
        raise RecipeError.at(
            "model.depth_scaled_init",
            f"needs two residual projections in each layer, and {name} has {len(projections)} in {num_layers} layers; "
            "set it to false",
        )
    return set(projections), std / math.sqrt(2 * num_layers)


def check_weights(
    weights: Iterable[tuple[str, torch.Tensor]],
    expected: ExpectedMoments | None,
    parameter_checked: Callable[[], None] = lambda: None,
) -> str:
    """Check all parameters of a model before its first step; returns a checksum over their names and values.

    `weights`: names and whole tensors. `expected`: see `InitialWeights.expected_moments`; None for a pretrained model,
    whose values need only be finite. Raises `RecipeError` for NaN or infinity, for a mean or standard deviation other
    than expected, and for two parameters of more than 16 elements with the same random values. `parameter_checked` is
    called after each parameter.
    """
    problems: list[Problem] = []
    checksums: dict[str, str] = {}
    first: dict[str, str] = {}
    for name, tensor in weights:
        found = Moments.of(tensor)
        parameter_checked()
        checksums[name] = found.checksum
        if not (math.isfinite(found.mean) and math.isfinite(found.std)):
            problems.append(Problem(name, "contains NaN or infinity"))
        elif expected is not None and name in expected:
            wanted = expected[name]
            # Values that don't depend on the seed, such as ones, are the same in every layer.
            random = found.std > 0 and tensor.numel() > 16 and found.checksum != wanted.checksum
            twin = first.setdefault(found.checksum, name) if random else name
            if twin != name:
                problems.append(Problem(name, f"has the same random values as {twin}"))
            if _differs(found, wanted, tensor.numel()):
                message = f"has {_describe(found)}; the model's class initializes it with {_describe(wanted)}"
                problems.append(Problem(name, message))
    if problems:
        raise RecipeError([Problem("model", "the initial weights differ from those of the model's class"), *problems])
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(checksums):
        digest.update(f"{name} {checksums[name]}\n".encode())
    return digest.hexdigest()


def _differs(found: Moments, wanted: Moments, numel: int) -> bool:
    """Whether two parameters of `numel` elements differ by more than chance.

    Moments of a few elements say little if the distribution has a long tail, such as the logarithm of a uniform one.
    Random parameters with few elements are therefore compared by the two-sample Kolmogorov-Smirnov test, which holds
    for any distribution. Of others, the means and standard deviations may differ by six standard errors. A difference
    of 1% is always allowed, for weights in 16 bits and embeddings with a row of zeros.
    """
    if found.sample is not None and wanted.sample is not None:
        values = torch.cat([found.sample, wanted.sample])
        first, second = (torch.searchsorted(one, values, right=True) / numel for one in (found.sample, wanted.sample))
        return (first - second).abs().max().item() > math.sqrt(-math.log(_CHANCE / 2) / numel)
    if numel > 1 and (found.std == 0) != (wanted.std == 0):
        return True
    error = 6 * math.sqrt(2 / numel)
    mean, std = abs(found.mean - wanted.mean), abs(found.std - wanted.std)
    return mean > error * wanted.std + 1e-6 * (1 + abs(wanted.mean)) or std > max(0.01, error) * wanted.std


def _describe(moments: Moments) -> str:
    if moments.mean == moments.std == 0:
        return "only zeros"
    return f"mean {moments.mean:.3g}, standard deviation {moments.std:.3g}"


def assign(model: torch.nn.Module, weights: Weights) -> Iterator[torch.Tensor]:
    """Replace a model's tensors on the meta device by values on the CPU, and yield each.

    A tied tensor is replaced in every module that has it.
    """
    holders: dict[int, list[tuple[Any, str]]] = defaultdict(list)
    for module in model.modules():
        for holder in (module._parameters, module._buffers):
            for leaf, tensor in holder.items():
                holders[id(tensor)].append((holder, leaf))
    named = named_tensors(model)
    for name, value in weights:
        is_parameter = isinstance(named[name], torch.nn.Parameter)
        new = torch.nn.Parameter(value, requires_grad=named[name].requires_grad) if is_parameter else value
        for holder, leaf in holders[id(named[name])]:
            holder[leaf] = new
        yield new


def fill(model: torch.nn.Module, weights: Weights | None) -> torch.nn.Module:
    """Put `weights` into a model on the meta device, and return the model. None changes nothing."""
    for _ in assign(model, weights or ()):
        pass
    return model


def named_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
