"""The scaling ladder: its runs, the laws fitted to them, and what they say of the recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hfpretrain import files
from hfpretrain.ladder import laws as scaling
from hfpretrain.ladder import subruns
from hfpretrain.ladder.rungs import Ladder, Rung
from hfpretrain.recipe.schema import Recipe, RecipeError


def ladder(
    recipe: Recipe,
    sizes: Sequence[int],
    ratios: Sequence[float],
    engine: str | None,
    num_processes: int | None,
    compute: float | None,
    folder: Path,
) -> Iterator[str]:
    """Train the rungs that are not finished, fit, check, predict: lines that tell of it.

    `engine`, `num_processes`: as of `subruns.command`; `compute`: FLOPs for which the best size is asked, by default
    the recipe's. Leaves `ladder.json`, `ladder.png` and the rungs' runs in `folder`; the same call goes on where the
    last one ended. Raises `RecipeError` for what is wrong with the input, and with a rung's message where one fails.
    """
    scaling.require_scipy()
    start = subruns.command(engine, num_processes)
    made = Ladder(recipe, sizes, ratios, subruns.process_count(engine, num_processes), folder)
    made.write()
    yield made.table()
    if made.epochs is not None and made.epochs > 1:
        yield (
            f"the recipe sees its training text {made.epochs:.2f} times; the law is one of text seen once, and up to "
            "about 4 times is nearly as good (Muennighoff et al. 2023, section 5)"
        )
    total, done = sum(rung.flops for rung in made.rungs), 0.0
    for number, rung in enumerate(made.rungs, 1):
        known = rung.read()
        if not known:
            subruns.finish(subruns.Process([*start, str(rung.path)]), rung.run)
            if not rung.read():
                raise RecipeError.at(str(rung.run), "the run ended without its last evaluation; start again to resume")
        done += rung.flops
        yield (
            f"rung {number}/{len(made.rungs)} {rung.name}: loss {rung.loss:.4f}, bits per byte "
            f"{rung.bits_per_byte:.4f}{' (was finished)' if known else ''}; {done / total:.0%} of the ladder's FLOPs"
        )
    findings = _Findings(made, compute)
    files.write_whole(folder / "ladder.json", json.dumps(findings.mapping(), indent=1))
    findings.plot(folder / "ladder.png")
    yield from findings.lines()
    yield f"{folder / 'ladder.json'}, {folder / 'ladder.png'}"


class _Findings:
    """The fits of a ladder whose runs are done, and what follows from them."""

    def __init__(self, made: Ladder, compute: float | None):
        self.made, self.rungs, self.recipe = made, made.rungs, made.recipe
        self.both = len(made.ratios) > 1
        """Whether size and tokens vary apart, so that each has an exponent of its own."""
        self.factor = made.flops / (made.parameters.total * made.tokens)
        self.compute = made.flops if compute is None else compute
        self.check = self._fit([rung for rung in self.rungs if not rung.held_out])
        self.fit = self._fit(self.rungs)

    def _fit(self, rungs: list[Rung]) -> scaling.Fit:
        variables = np.array([self.at(rung.parameters, rung.tokens, rung.flops) for rung in rungs])
        return scaling.fit(variables, np.array([rung.loss for rung in rungs], dtype=np.float64))

    def at(self, parameters: float, tokens: float, flops: float) -> tuple[float, ...]:
        """The variables of the law."""
        return (parameters, tokens) if self.both else (flops,)

    def _constants(self, law: scaling.Law) -> dict[str, float]:
        if self.both:
            (a, b), (alpha, beta) = law.coefficients, law.exponents
            return {"E": law.irreducible, "A": a, "alpha": alpha, "B": b, "beta": beta}
        return {"E": law.irreducible, "K": law.coefficients[0], "gamma": law.exponents[0]}

    def _described(self, fit: scaling.Fit, points: int) -> dict[str, Any]:
        samples = [self._constants(sample) for sample in fit.samples]
        constants = {
            key: {"value": value, "interval": fit.interval([sample[key] for sample in samples])}
            for key, value in self._constants(fit.law).items()
        }
        return {"points": points, "constants": constants}

    def held_out(self) -> list[dict[str, Any]]:
        """Measured and predicted losses of the rungs that the first fit has not seen."""
        found = []
        for rung in self.rungs:
            if rung.held_out and rung.loss is not None:
                at = self.at(rung.parameters, rung.tokens, rung.flops)
                predicted = self.check.law.loss(*at)
                interval = self.check.loss_interval(*at, of_a_run=True)
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

    def target(self) -> dict[str, Any]:
        """The recipe's predicted loss."""
        made = self.made
        at = self.at(made.parameters.total, made.tokens, made.flops)
        return {
            "parameters": made.parameters.total,
            "tokens": made.tokens,
            "flops": made.flops,
            "times_largest_rung": made.flops / max(rung.flops for rung in self.rungs),
            "predicted": self.fit.law.loss(*at),
            "interval": self.fit.loss_interval(*at, of_a_run=True),
        }

    def at_compute(self) -> dict[str, Any]:
        """The least loss for the compute asked; its size and tokens where the law tells them apart."""
        if not self.both:  # the loss with the recipe's tokens per parameter
            interval = self.fit.loss_interval(self.compute)
            return {"flops": self.compute, "predicted": self.fit.law.loss(self.compute), "interval": interval}
        laws = (self.fit.law, *self.fit.samples)
        best = [law.optimum(self.compute, self.factor) for law in laws]
        losses = [law.loss(*at) for law, at in zip(laws, best, strict=True)]
        (parameters, tokens), *others = best
        return {
            "flops": self.compute,
            "parameters": parameters,
            "parameters_interval": self.fit.interval([at[0] for at in others]),
            "tokens": tokens,
            "tokens_interval": self.fit.interval([at[1] for at in others]),
            "predicted": losses[0],
            "interval": self.fit.interval(losses[1:]),
        }

    def mapping(self) -> dict[str, Any]:
        """Everything, for `ladder.json`."""
        made = self.made
        seen = [rung for rung in self.rungs if not rung.held_out]
        keys = ("name", "asked", "parameters", "ratio", "tokens", "flops", "held_out", "loss", "bits_per_byte")
        return {
            "recipe": Path(made.recipe.output_dir).name,
            "law": "L = E + A / N^alpha + B / D^beta" if self.both else "L = E + K / C^gamma",
            "units": "nats per token; N total parameters, D tokens, C = 6 N D FLOPs with N those that a token meets",
            "tokens_per_parameter": made.tokens / made.parameters.total,
            "epochs": made.epochs,
            "rungs": [{key: getattr(rung, key) for key in keys} for rung in self.rungs],
            "fit_without_held_out": self._described(self.check, len(seen)),
            "held_out": self.held_out(),
            "fit": self._described(self.fit, len(self.rungs)),
            "target": self.target(),
            "at_compute": self.at_compute(),
        }

    def lines(self) -> Iterator[str]:
        """What was found, for people."""
        found = self.mapping()
        yield f"law {found['law']}; C = 6 N D; intervals are 95 %, by parametric bootstrap"
        first, then = found["fit_without_held_out"], found["fit"]
        yield f"fit to {first['points']} runs without the largest size: {_constants_text(first['constants'])}"
        if not self.check.samples:
            yield "  as many constants as runs: no interval; more sizes or --ratios give one"
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
        if self.both:
            yield (
                f"best for {best['flops']:.2e} FLOPs: {best['parameters']:.3g} parameters"
                f"{_interval_text(best['parameters_interval'], '.3g')}, {best['tokens']:.3g} tokens"
                f"{_interval_text(best['tokens_interval'], '.3g')}, loss {best['predicted']:.4f}"
                f"{_interval_text(best['interval'], '.4f')}"
            )
            trained = [rung.tokens / rung.parameters for rung in self.rungs]
            wanted = best["tokens"] / best["parameters"]
            if not min(trained) <= wanted <= max(trained):
                yield (
                    f"  those are {wanted:.3g} tokens per parameter, outside the {min(trained):.3g} to "
                    f"{max(trained):.3g} of the runs: other --ratios would tell it better"
                )
        else:
            yield (
                f"{best['flops']:.2e} FLOPs at the recipe's tokens per parameter: loss {best['predicted']:.4f}"
                f"{_interval_text(best['interval'], '.4f')}. With one ratio, size and tokens grow together: the best "
                "size is not known; give several --ratios"
            )
        constants = scaling.num_constants(1 + self.both)
        if self.fit.samples and len(self.rungs) < 2 * constants:
            yield f"{len(self.rungs)} runs are few for {constants} constants: the intervals are rough"

    def plot(self, path: Path) -> None:
        """Loss against compute as a PNG: runs and the law by ratio, the held-out size, the recipe with its interval."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5.4), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        made, target = self.made, self.target()
        flops = np.geomspace(min(r.flops for r in self.rungs) / 1.5, 1.5 * max(made.flops, self.rungs[-1].flops), 200)
        colours = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#9d755d")
        for number, ratio in enumerate(made.ratios):
            colour = colours[number % len(colours)]
            per_parameter = made.tokens / made.parameters.total * ratio
            sizes = np.sqrt(flops / (self.factor * per_parameter))
            line = [self.at(n, per_parameter * n, c) for n, c in zip(sizes, flops, strict=True)]
            axes.plot(flops, [self.check.law.loss(*at) for at in line], lw=1.4, color=colour)
            if ratio == min(made.ratios, key=lambda value: abs(math.log(value))):
                axes.plot(flops, [self.fit.law.loss(*at) for at in line], lw=1.2, ls="--", color=colour)
                if self.check.samples:
                    low, high = zip(*(self.check.loss_interval(*at) or () for at in line), strict=True)
                    axes.fill_between(flops, low, high, color=colour, alpha=0.15, lw=0)
            for rung in self.rungs:
                if rung.ratio == ratio:
                    style: dict[str, Any] = {"marker": "o", "ms": 6, "color": colour}
                    if rung.held_out:
                        style |= {"marker": "D", "ms": 8, "mfc": "white", "mew": 1.8}
                    axes.plot([rung.flops], [rung.loss or math.nan], ls="", **style)
            axes.plot([], [], lw=1.4, marker="o", color=colour, label=f"{per_parameter:.3g} tokens per parameter")
        grey: dict[str, Any] = {"color": "#555555"}
        axes.plot([], [], ls="", marker="D", ms=8, mfc="white", mew=1.8, label="the largest size, held out", **grey)
        axes.plot([], [], lw=1.4, label="law fitted without it", **grey)
        axes.plot([], [], lw=1.2, ls="--", label="law fitted to all runs", **grey)
        interval = target["interval"] or (target["predicted"],) * 2
        away = [[max(0.0, target["predicted"] - interval[0])], [max(0.0, interval[1] - target["predicted"])]]
        label = f"the recipe, predicted {target['predicted']:.3f}"
        bar: dict[str, Any] = {"marker": "*", "ms": 15, "color": "#e45756", "capsize": 4, "ls": "", "label": label}
        axes.errorbar([target["flops"]], [target["predicted"]], yerr=away, **bar)
        axes.set_xscale("log")
        name = Path(made.recipe.output_dir).name
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
