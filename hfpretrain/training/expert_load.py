"""How evenly the routers of a model use their experts: the figures of a log step, and a warning if few are used."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hfpretrain.engines.base import Engine
from hfpretrain.modeling.routers import RouterRecorder
from hfpretrain.training.records import Records

_DEAD = 0.1  # an expert with less than this fraction of the mean number of tokens counts as dead
_MIN_MEAN = 20  # with fewer tokens per expert, chance alone leaves some without any


def load_figures(counts: torch.Tensor, numbers: Sequence[int]) -> dict[str, list[float]]:
    """Figures of the load of experts, each a list with a value for each router.

    `counts`: tokens by router and expert, (routers, experts). `numbers`: how many experts each router has; its other
    columns are ignored. `max_over_mean`: tokens of the most used expert over the mean. `entropy`: of the distribution
    of tokens, over its maximum, so 1 is an even load. `dead`: share of experts with less than a tenth of the mean. A
    router without tokens has 0 everywhere.
    """
    found: dict[str, list[float]] = {"max_over_mean": [], "entropy": [], "dead": []}
    for row, number in zip(counts.cpu().double(), numbers, strict=True):
        load = row[:number]
        total = load.sum().clamp(min=1)
        share = load / total
        entropy = -(share * share.clamp(min=1e-30).log()).sum()
        found["max_over_mean"].append(float(share.max() * number))
        found["entropy"].append(float(entropy / torch.tensor(float(max(2, number))).log()))
        found["dead"].append(float((load < _DEAD * load.mean()).double().mean()))
    return found


class ExpertLoad:
    """Writes how evenly experts are used since the last log step, and warns once when a layer uses few of them."""

    def __init__(self, recorder: RouterRecorder, engine: Engine):
        self._recorder, self._engine = recorder, engine
        self._numbers = [router.num_experts for router in recorder.routers]
        self._collapsed: set[int] = set()

    def figures(self, step: int, records: Records) -> dict[str, list[float]]:
        """The entries of the row of a log step. All ranks must call it. Empty for a model without experts.

        `experts/router_z` is the mean over the tokens of this step of the square of log(sum(exp(logits))).
        """
        if not self._recorder.routers:
            return {}
        counts, z = self._recorder.take_window(self._engine.total_loss)
        found = load_figures(counts, self._numbers)
        self._warn(step, counts, found, records)
        if z is not None:
            found["router_z"] = z.tolist()
        return {f"experts/{key}": values for key, values in found.items()}

    def _warn(self, step: int, counts: torch.Tensor, found: dict[str, list[float]], records: Records) -> None:
        means = [float(row[:number].double().mean()) for row, number in zip(counts, self._numbers, strict=True)]
        collapsed = {i for i, dead in enumerate(found["dead"]) if dead >= 0.5 and means[i] >= _MIN_MEAN}
        if new := sorted(collapsed - self._collapsed):
            layers = ", ".join(
                f"{self._recorder.routers[i].name} ({found['dead'][i]:.0%} of {self._numbers[i]} experts)"
                for i in new[:3]
            )
            more = f" and {len(new) - 3} more layers" if len(new) > 3 else ""
            text = (
                f"few experts are used: those with less than a tenth of the mean number of tokens are half or more in "
                f"{layers}{more}. {self._advice()}"
            )
            records.write_event(step, text)
            records.print_line(f"step {step}: {text}")
        self._collapsed = collapsed

    def _advice(self) -> str:
        balance = self._recorder.balance
        if any(router.bias is not None for router in self._recorder.routers):
            return f"Raise training.router_bias_rate (now {balance.bias_rate:g})"
        return f"Raise training.router_aux_loss_coef (now {balance.coefficient:g})"
