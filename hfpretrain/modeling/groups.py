"""The parameter groups of a recipe (`optimizer.groups`): what is frozen, what has rates of its own, and until when."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hfpretrain.modeling.trainable import name_pattern
from hfpretrain.recipe.schema import OptimizerSection, ParameterGroupSection, Problem, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Phase:
    """How a parameter is trained in a range of steps."""

    until_step: int | None
    """The first step, counted from 0, to which this does not apply; None if it applies to the end."""
    lr: float
    """Factor on the recipe's learning rate. 0: frozen."""
    weight_decay: float
    first_row: int = 0
    """Rows of the parameter before this one are frozen."""


Phases = tuple[Phase, ...]
"""How a parameter is trained, from the first step to the end."""


def phase_at(phases: Phases, step: int) -> Phase:
    """The phase of a step, which is counted from 0."""
    return next(phase for phase in phases if phase.until_step is None or step < phase.until_step)


def first_trained_step(phases: Phases) -> int | None:
    """The first step, counted from 0, in which a parameter is trained; None if it never is."""
    first = 0
    for phase in phases:
        if phase.lr:
            return first
        first = phase.until_step or 0
    return None


class ParameterGroups:
    """The parameters of a model by the groups of a recipe. Make it before an engine shards the model.

    `decayed`: names of the parameters with weight decay. `first_new_row`: the row of the first token that was added to
    the vocabulary; None if it is not known, as before the tokenizer is made. `knows_vocabulary`: whether the embeddings
    of `model` have their final number of rows.

    Raises `RecipeError` with all problems of the groups: patterns that match nothing, groups that never apply, rows of
    what is no embedding, and steps in which nothing is trained.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        section: OptimizerSection,
        decayed: Collection[str],
        first_new_row: int | None = None,
        knows_vocabulary: bool = True,
    ):
        self._section = section
        self._first_new_row = first_new_row
        self._parameters = dict(model.named_parameters())
        self._aliases = _aliases(model, self._parameters)
        self._embeddings = _embedding_names(model, self._parameters)
        self._decayed = decayed
        problems: list[Problem] = []
        self._names = [list(self._match(number, problems)) for number in range(len(section.groups))]
        self._phases = {name: self._phases_of(name) for name in self._parameters}
        problems += self._rows_problems(knows_vocabulary)
        if not problems:
            problems += [*self._unused_problems(), *self._idle_problems()]
        if problems:
            raise RecipeError(problems)

    @property
    def phases(self) -> Mapping[str, Phases]:
        """How each parameter is trained, by its name."""
        return self._phases

    @property
    def frozen(self) -> list[str]:
        """Names of the parameters that the groups never train."""
        return sorted(name for name, phases in self._phases.items() if first_trained_step(phases) is None)

    def freeze(self) -> None:
        """Freeze the parameters that the groups never train."""
        for name in self.frozen:
            self._parameters[name].requires_grad_(False)

    def lines(self, num_steps: int) -> list[str]:
        """A sentence for each group on what it has and how that is trained in a run of `num_steps`.

        Without groups there are none.
        """
        if not self._section.groups:
            return []
        lines = []
        for number, group in enumerate(self._section.groups):
            names = [name for name in self._names[number] if self._applies(number, name)]
            patterns = ", ".join(group.patterns)
            late = f", which is the whole run of {num_steps:,}" if (group.until_step or 0) >= num_steps else ""
            text = f"{self._describe(names)} {self._effect(group)}{late}"
            lines.append(f"optimizer.groups.{number} ({patterns}): {text}")
        if others := [name for name in self._parameters if not any(name in names for names in self._names)]:
            lines.append(f"{self._describe(others)} are in none of optimizer.groups")
        return lines

    def _describe(self, names: Sequence[str]) -> str:
        """The numbers of parameters and tensors, which of them have two names, and which nothing trains."""
        total = sum(self._parameters[name].numel() for name in names)
        text = f"{total:,} parameters in {len(names)} tensor{'s' if len(names) > 1 else ''}"
        if tied := [f"{name} is also {alias}" for name in names for alias in self._aliases.get(name, ())]:
            text += f" ({', '.join(tied)})"
        frozen = set(self.frozen)
        if idle := [name for name in names if not self._parameters[name].requires_grad and name not in frozen]:
            text += f", without {len(idle)} that no run trains,"
        return text

    def _effect(self, group: ParameterGroupSection) -> str:
        until = "" if group.until_step is None else f" in the first {group.until_step:,} steps"
        if group.lr == 0:
            return f"are frozen{until}"
        factor = "" if group.lr == 1 else f"{group.lr:g} times "
        rate = f"at {factor}optimizer.lr, {group.lr * self._section.lr:.3g},"
        rows = ""
        if group.rows_from == "new" and self._first_new_row is None:
            rows = " in the rows of new tokens, without weight decay,"
        elif group.rows_from is not None:
            rows = f" in the rows from {self._first_row(group):,} on, without weight decay,"
        decay = "" if group.weight_decay is None else f" with weight decay {group.weight_decay:g}"
        return f"are trained {rate}{rows}{decay}{until}".rstrip(",")

    def _match(self, number: int, problems: list[Problem]) -> Iterator[str]:
        """Names of the parameters that a group's patterns match, in the model's order."""
        group = self._section.groups[number]
        found = set()
        for index, pattern in enumerate(group.patterns):
            own = fnmatch.filter(self._parameters, pattern)
            if not own:
                where = f"optimizer.groups.{number}.params"
                where += "" if isinstance(group.params, str) else f".{index}"
                problems.append(Problem(where, self._no_match_message(pattern)))
            found.update(own)
        return (name for name in self._parameters if name in found)

    def _no_match_message(self, pattern: str) -> str:
        tied = {alias: name for name, names in self._aliases.items() for alias in names}
        if hidden := fnmatch.filter(tied, pattern):
            return (
                f"{pattern!r} matches only {hidden[0]}, which is tied to {tied[hidden[0]]}: the two are one parameter, "
                f"and one can't be trained without the other; name {tied[hidden[0]]}, or untie them "
                "(model.config.tie_word_embeddings: false)"
            )
        patterns = list(dict.fromkeys(map(name_pattern, self._parameters)))
        near = difflib.get_close_matches(pattern, dict.fromkeys([*self._parameters, *patterns]), n=3, cutoff=0.5)
        near = near or [name for name in patterns if pattern.strip("*.").rpartition(".")[2] in name][:3]
        text = f"the nearest are {', '.join(near)}" if near else f"the model's names are {', '.join(patterns[:8])}, ..."
        return f"no parameter has a name that matches {pattern!r}; {text}"

    def _phases_of(self, name: str) -> Phases:
        """How a parameter is trained, by the groups that match it, in their order."""
        decay = self._section.weight_decay if name in self._decayed else 0.0
        phases: list[Phase] = []
        step = 0
        for group, names in zip(self._section.groups, self._names, strict=True):
            if name not in names or (group.until_step is not None and group.until_step <= step):
                continue
            own = decay if group.weight_decay is None or name not in self._decayed else group.weight_decay
            own = 0.0 if group.rows_from else own
            phases.append(Phase(group.until_step, group.lr, own, self._first_row(group)))
            if group.until_step is None:
                return tuple(phases)
            step = group.until_step
        return (*phases, Phase(None, 1.0, decay))

    def _first_row(self, group: ParameterGroupSection) -> int:
        """The first row that a group trains."""
        if group.rows_from == "new":
            return self._first_new_row or 1
        return group.rows_from or 0

    def _rows_problems(self, knows_vocabulary: bool) -> Iterator[Problem]:
        for number, (group, names) in enumerate(zip(self._section.groups, self._names, strict=True)):
            if group.rows_from is None:
                continue
            path = f"optimizer.groups.{number}.rows_from"
            if others := [name for name in names if name not in self._embeddings]:
                known = ", ".join(sorted(self._embeddings)) or "none"
                message = f"is for input and output embeddings only, and `params` matches {others[0]}"
                yield Problem(path, f"{message} too; give them a group of their own (embeddings: {known})")
                continue
            for name in names:
                rows = self._parameters[name].shape[0]
                if knows_vocabulary and (first := self._first_row(group)) >= rows:
                    yield Problem(path, f"{name} has {rows:,} rows, numbered from 0 (got {first:,})")

    def _unused_problems(self) -> Iterator[Problem]:
        """Groups that never apply, since earlier groups have all their parameters."""
        for number, (group, names) in enumerate(zip(self._section.groups, self._names, strict=True)):
            earlier = self._section.groups[:number]
            if not any(self._applies(number, name) for name in names):
                which = next(
                    index
                    for index, other in enumerate(earlier)
                    if names[0] in self._names[index]
                    and (other.until_step is None or (group.until_step or 0) <= other.until_step)
                )
                message = (
                    f"never applies: optimizer.groups.{which} comes first and has its parameters for as many steps; "
                    "put the narrower or shorter group first"
                )
                yield Problem(f"optimizer.groups.{number}", message)

    def _applies(self, number: int, name: str) -> bool:
        """Whether a group is in force for a parameter that it matches, in any step."""
        step = 0
        for group, names in zip(self._section.groups[:number], self._names, strict=False):
            if name in names:
                if group.until_step is None:
                    return False
                step = max(step, group.until_step)
        until = self._section.groups[number].until_step
        return until is None or until > step

    def _idle_problems(self) -> Iterator[Problem]:
        """Steps in which no parameter is trained."""
        trainable = [self._phases[name] for name, p in self._parameters.items() if p.requires_grad]
        starts = sorted({0, *(group.until_step for group in self._section.groups if group.until_step is not None)})
        for start in starts:
            if not any(phase_at(phases, start).lr for phases in trainable):
                message = f"every parameter is frozen in step {start + 1:,}; let at least one be trained"
                yield Problem("optimizer.groups", message)
                return


def _aliases(model: Any, parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, list[str]]:
    """The further names of each tied parameter."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if names[id(parameter)] != name:
            found.setdefault(names[id(parameter)], []).append(name)
    return found


def _embedding_names(model: Any, parameters: Mapping[str, torch.nn.Parameter]) -> set[str]:
    """Names of the parameters of the input and output embeddings, which have a row for each token."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    own = {id(parameter) for module in modules if module is not None for parameter in module.parameters()}
    return {name for name, parameter in parameters.items() if id(parameter) in own}
