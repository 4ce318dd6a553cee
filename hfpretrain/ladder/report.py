"""The results of a ladder: laws fitted to its finished rungs, predictions, `ladder.json` and `ladder.png`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hfpretrain import files
from hfpretrain.ladder import laws
from hfpretrain.ladder.rungs import Ladder, Rung


class Report:
    """The laws fitted to a ladder whose rungs are all finished, and the predictions from them.

    `compute`: FLOPs for which to find the best size; None stands for those of the recipe.
    """

    def __init__(self, ladder: Ladder, compute: float | None):
        self._ladder, self._rungs = ladder, ladder.rungs
        # With several ratios, size and tokens vary independently, so the law has an exponent for each.
        self._has_both_exponents = len(ladder.ratios) > 1
        self._factor = ladder.flops / (ladder.parameters.total * ladder.tokens)
        self._compute = ladder.flops if compute is None else compute
        self._fit_without_held_out = self._fit_law([rung for rung in self._rungs if not rung.held_out])
        self._fit = self._fit_law(self._rungs)

    def _fit_law(self, rungs: list[Rung]) -> laws.Fit:
        variables = np.array([self._variables(rung.parameters, rung.tokens, rung.flops) for rung in rungs])
        return laws.fit(variables, np.array([rung.loss for rung in rungs], dtype=np.float64))

    def _variables(self, parameters: float, tokens: float, flops: float) -> tuple[float, ...]:
        return (parameters, tokens) if self._has_both_exponents else (flops,)

    def write(self, folder: Path) -> Iterator[str]:
        """Write `ladder.json` and `ladder.png` into `folder`, and yield the results as readable lines."""
        found = self._mapping()
        files.write_atomically(folder / "ladder.json", json.dumps(found, indent=1))
        self._plot(folder / "ladder.png")
        yield from self._lines(found)
        yield f"{folder / 'ladder.json'}, {folder / 'ladder.png'}"

    def _constants(self, law: laws.Law) -> dict[str, float]:
        if self._has_both_exponents:
            (a, b), (alpha, beta) = law.coefficients, law.exponents
            return {"E": law.irreducible, "A": a, "alpha": alpha, "B": b, "beta": beta}
        return {"E": law.irreducible, "K": law.coefficients[0], "gamma": law.exponents[0]}

    def _fit_mapping(self, fit: laws.Fit, points: int) -> dict[str, Any]:
        samples = [self._constants(sample) for sample in fit.samples]
        constants = {
            key: {"value": value, "interval": fit.interval([sample[key] for sample in samples])}
            for key, value in self._constants(fit.law).items()
        }
        return {"points": points, "constants": constants}

    def _held_out(self) -> list[dict[str, Any]]:
        """Measured and predicted losses of the held-out rungs."""
        found = []
        for rung in self._rungs:
            if rung.held_out and rung.loss is not None:
                at = self._variables(rung.parameters, rung.tokens, rung.flops)
                predicted = self._fit_without_held_out.law.loss(*at)
                interval = self._fit_without_held_out.loss_interval(*at, of_a_run=True)
                error = predicted / rung.loss - 1
                found.append(
                    {
                        "name": rung.name,
                        "measured": rung.loss,
                        "predicted": predicted,
                        "interval": interval,
                        "relative_error": error,
                    }
                )
        return found

    def _target(self) -> dict[str, Any]:
        """The recipe's predicted loss."""
        ladder = self._ladder
        at = self._variables(ladder.parameters.total, ladder.tokens, ladder.flops)
        return {
            "parameters": ladder.parameters.total,
            "tokens": ladder.tokens,
            "flops": ladder.flops,
            "times_largest_rung": ladder.flops / max(rung.flops for rung in self._rungs),
            "predicted": self._fit.law.loss(*at),
            "interval": self._fit.loss_interval(*at, of_a_run=True),
        }

    def _at_compute(self) -> dict[str, Any]:
        """The lowest predicted loss for the given compute; with several ratios, also its size and tokens."""
        if not self._has_both_exponents:  # the law holds only for the recipe's tokens per parameter
            interval = self._fit.loss_interval(self._compute)
            return {"flops": self._compute, "predicted": self._fit.law.loss(self._compute), "interval": interval}
        fitted = (self._fit.law, *self._fit.samples)
        best = [law.optimum(self._compute, self._factor) for law in fitted]
        losses = [law.loss(*at) for law, at in zip(fitted, best, strict=True)]
        (parameters, tokens), *others = best
        return {
            "flops": self._compute,
            "parameters": parameters,
            "parameters_interval": self._fit.interval([at[0] for at in others]),
            "tokens": tokens,
            "tokens_interval": self._fit.interval([at[1] for at in others]),
            "predicted": losses[0],
            "interval": self._fit.interval(losses[1:]),
        }

    def _mapping(self) -> dict[str, Any]:
        """The content of `ladder.json`."""
        ladder = self._ladder
        fitted = [rung for rung in self._rungs if not rung.held_out]
        keys = ("name", "asked", "parameters", "ratio", "tokens", "flops", "held_out", "loss", "bits_per_byte")
        return {
            "recipe": Path(ladder.recipe.output_dir).name,
            "law": "L = E + A / N^alpha + B / D^beta" if self._has_both_exponents else "L = E + K / C^gamma",
            "units": "nats per token; N total parameters, D tokens, C = 6 N D FLOPs with N active per token",
            "tokens_per_parameter": ladder.tokens / ladder.parameters.total,
            "epochs": ladder.epochs,
            "rungs": [{key: getattr(rung, key) for key in keys} for rung in self._rungs],
            "fit_without_held_out": self._fit_mapping(self._fit_without_held_out, len(fitted)),
            "held_out": self._held_out(),
            "fit": self._fit_mapping(self._fit, len(self._rungs)),
            "target": self._target(),
            "at_compute": self._at_compute(),
        }

    def _lines(self, found: dict[str, Any]) -> Iterator[str]:
        """The results as readable lines."""
        yield f"law: {found['law']}, with C = 6 N D; intervals are 95%, by parametric bootstrap"
        first, then = found["fit_without_held_out"], found["fit"]
        yield f"fit to {first['points']} runs without the largest size: {_constants_text(first['constants'])}"
        if not self._fit_without_held_out.samples:
            yield "  no interval, since the law has as many constants as there are runs; give more --sizes or --ratios"
        for row in found["held_out"]:
            yield (
                f"held out {row['name']}: measured {row['measured']:.4f}, predicted {row['predicted']:.4f}"
                f"{_interval_text(row['interval'], '.4f')}, error {row['relative_error']:+.2%}"
            )
        yield f"fit to all {then['points']} runs: {_constants_text(then['constants'])}"
        target, best = found["target"], found["at_compute"]
        yield (
            f"the recipe: {target['parameters']:,} parameters, {target['tokens']:,} tokens, {target['flops']:.2e} "
            f"FLOPs ({target['times_largest_rung']:,.1f} times the largest rung): loss {target['predicted']:.4f}"
            f"{_interval_text(target['interval'], '.4f')}"
        )
        if self._has_both_exponents:
            yield (
                f"best for {best['flops']:.2e} FLOPs: {best['parameters']:.3g} parameters"
                f"{_interval_text(best['parameters_interval'], '.3g')}, {best['tokens']:.3g} tokens"
                f"{_interval_text(best['tokens_interval'], '.3g')}, loss {best['predicted']:.4f}"
                f"{_interval_text(best['interval'], '.4f')}"
            )
            trained = [rung.tokens / rung.parameters for rung in self._rungs]
            wanted = best["tokens"] / best["parameters"]
            if not min(trained) <= wanted <= max(trained):
                yield (
                    f"  this is {wanted:.3g} tokens per parameter, outside of the runs' {min(trained):.3g} to "
                    f"{max(trained):.3g}; --ratios that include it give a better estimate"
                )
        else:
            yield (
                f"{best['flops']:.2e} FLOPs at the recipe's tokens per parameter: loss {best['predicted']:.4f}"
                f"{_interval_text(best['interval'], '.4f')}. With one ratio, size and tokens grow together, so the "
                "best size can't be found; give several --ratios"
            )
        constants = laws.num_constants(1 + self._has_both_exponents)
        if self._fit.samples and len(self._rungs) < 2 * constants:
            yield f"the intervals are rough: {len(self._rungs)} runs are few for {constants} constants"

    def _plot(self, path: Path) -> None:
        """Plot loss against compute: runs and the law by ratio, the held-out size, the recipe with its interval."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5.4), dpi=110, layout="constrained")
        axes = figure.subplots()
        ladder, target = self._ladder, self._target()
        flops = np.geomspace(
            min(r.flops for r in self._rungs) / 1.5, 1.5 * max(ladder.flops, self._rungs[-1].flops), 200
        )
        colors = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#9d755d")
        for number, ratio in enumerate(ladder.ratios):
            color = colors[number % len(colors)]
            per_parameter = ladder.tokens / ladder.parameters.total * ratio
            sizes = np.sqrt(flops / (self._factor * per_parameter))
            line = [self._variables(n, per_parameter * n, c) for n, c in zip(sizes, flops, strict=True)]
            axes.plot(flops, [self._fit_without_held_out.law.loss(*at) for at in line], lw=1.4, color=color)
            if ratio == min(ladder.ratios, key=lambda value: abs(math.log(value))):
                axes.plot(flops, [self._fit.law.loss(*at) for at in line], lw=1.2, ls="--", color=color)
                if self._fit_without_held_out.samples:
                    low, high = zip(*(self._fit_without_held_out.loss_interval(*at) or () for at in line), strict=True)
                    axes.fill_between(flops, low, high, color=color, alpha=0.15, lw=0)
            for rung in self._rungs:
                if rung.ratio == ratio:
                    style: dict[str, Any] = {"marker": "o", "ms": 6, "color": color}
                    if rung.held_out:
                        style |= {"marker": "D", "ms": 8, "mfc": "white", "mew": 1.8}
                    axes.plot([rung.flops], [rung.loss or math.nan], ls="", **style)
            axes.plot([], [], lw=1.4, marker="o", color=color, label=f"{per_parameter:.3g} tokens per parameter")
        gray: dict[str, Any] = {"color": "#555555"}
        axes.plot([], [], ls="", marker="D", ms=8, mfc="white", mew=1.8, label="the largest size, held out", **gray)
        axes.plot([], [], lw=1.4, label="law fitted without it", **gray)
        axes.plot([], [], lw=1.2, ls="--", label="law fitted to all runs", **gray)
        interval = target["interval"] or (target["predicted"],) * 2
        away = [[max(0.0, target["predicted"] - interval[0])], [max(0.0, interval[1] - target["predicted"])]]
        label = f"the recipe, predicted {target['predicted']:.3f}"
        bar: dict[str, Any] = {"marker": "*", "ms": 15, "color": "#e45756", "capsize": 4, "ls": "", "label": label}
        axes.errorbar([target["flops"]], [target["predicted"]], yerr=away, **bar)
        axes.set_xscale("log")
        name = Path(ladder.recipe.output_dir).name
        axes.set(xlabel="training compute 6 N D (FLOPs)", ylabel="validation loss (nats per token)", title=name)
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path)


def _constants_text(constants: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {entry['value']:.3g}{_interval_text(entry['interval'], '.3g')}" for key, entry in constants.items()
    )


def _interval_text(interval: tuple[float, float] | None, form: str) -> str:
    return "" if interval is None else f" ({interval[0]:{form}} to {interval[1]:{form}})"
