"""Scaling laws: their fit to the losses of finished runs, its uncertainty, and the best size for given compute."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

FLOPS_PER_PARAMETER_AND_TOKEN = 6.0
"""Training compute C = 6 N D for N parameters that each token meets and D tokens (Kaplan et al. 2020, section 2.1)."""
_DELTA = 1e-3
# Of the reducible loss' exponents and the share of the loss that is irreducible, where an optimization starts.
_EXPONENTS, _SHARES = (0.1, 0.4, 1.0), (0.2, 0.8)


@dataclass(frozen=True)
class Law:
    """Loss = `irreducible` + sum of `coefficients` / x ** `exponents`, in nats per token.

    Of two variables, parameters N and tokens D, it is E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, "Training
    Compute-Optimal Large Language Models", section 3.3); of one, compute C, it is E + K / C^gamma, for runs that all
    have the same tokens per parameter.
    """

    irreducible: float
    coefficients: tuple[float, ...]
    exponents: tuple[float, ...]

    def loss(self, *variables: float) -> float:
        """At N and D, or at C."""
        terms = zip(self.coefficients, variables, self.exponents, strict=True)
        return self.irreducible + sum(coefficient * x**-exponent for coefficient, x, exponent in terms)

    def optimum(self, compute: float, factor: float = FLOPS_PER_PARAMETER_AND_TOKEN) -> tuple[float, float]:
        """N and D of the least loss under `factor` N D = `compute` FLOPs (Hoffmann et al. 2022, equation 4)."""
        (a, b), (alpha, beta) = self.coefficients, self.exponents
        product = compute / factor
        g = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
        num_parameters = g * product ** (beta / (alpha + beta))
        return num_parameters, product / num_parameters


@dataclass(frozen=True)
class Fit:
    """A law and what others the same runs might have given.

    `samples`: laws fitted to losses drawn anew, empty where there are no more points than the law has constants.
    `scatter`: float64 (samples,), the standard deviation of ln loss about the law that each was drawn with.
    """

    law: Law
    samples: tuple[Law, ...]
    scatter: np.ndarray

    def interval(self, values: Sequence[float]) -> tuple[float, float] | None:
        """The middle 95 % of `values`, one of each sample; None without samples."""
        if not self.samples:
            return None
        low, high = np.quantile(np.asarray(values), [0.025, 0.975])
        return float(low), float(high)

    def loss_interval(self, *variables: float, of_a_run: bool = False) -> tuple[float, float] | None:
        """95 % interval of the law at a point; `of_a_run`: of what one more run there would measure, which adds the
        scatter of the runs about the law."""
        losses = np.array([sample.loss(*variables) for sample in self.samples])
        if of_a_run and len(losses):
            losses *= np.exp(np.random.default_rng(0).normal(0.0, self.scatter))
        return self.interval(losses.tolist())


def num_constants(num_variables: int) -> int:
    """Of a law: two for each variable, and the irreducible loss."""
    return 1 + 2 * num_variables


def fit(variables: np.ndarray, losses: np.ndarray, num_samples: int = 200, seed: int = 0) -> Fit:
    """Fit a `Law` to runs: `variables` float64 (points, 1 or 2), `losses` float64 (points,) in nats per token.

    As Hoffmann et al. 2022, appendix D.2: the Huber loss (delta 1e-3) of ln predicted - ln measured, the prediction as
    a log-sum-exp, minimised by L-BFGS from a grid of starts, the best kept. The logarithms of the variables are
    centred and the exponents positive through their own logarithms, which moves no minimum and lets a coarser grid
    reach it; the objective is summed, not averaged, and followed to convergence, without which Hoffmann et al.'s own
    fit stopped early (Besiroglu et al. 2024, "Chinchilla Scaling: A replication attempt").

    Uncertainty by parametric bootstrap (Efron & Tibshirani 1993, section 6.5), each fit started from the best: losses
    are drawn about the law with a standard deviation that is itself drawn, the residuals' squares over a chi-squared
    number of as many degrees of freedom as there are points beyond the constants, which in a linear fit gives
    Student's intervals. Runs themselves are not resampled: sizes are chosen, and there are few of each.

    Raises `ValueError` for fewer points than constants or a loss that is not positive and finite.
    """
    points, num_variables = variables.shape
    constants = num_constants(num_variables)
    if points < constants:
        raise ValueError(f"{points} points do not determine the {constants} constants of the law")
    if not (np.isfinite(losses).all() and (losses > 0).all()):
        raise ValueError("every loss must be a positive number")
    logs = np.log(variables)
    centre = logs.mean(axis=0)
    x, y = torch.from_numpy(logs - centre), torch.from_numpy(np.log(losses))
    best = min((_minimise(start, x, y) for start in _starts(num_variables, float(losses.min()))), key=lambda m: m[1])[0]
    fitted = _log_loss(best, x)
    freedom = points - constants
    generator = np.random.default_rng(seed)
    squares = float(((y - fitted) ** 2).sum())
    scatter = np.sqrt(squares / generator.chisquare(freedom, num_samples)) if freedom else np.empty(0)
    noise = torch.from_numpy(generator.normal(size=(len(scatter), points)) * scatter[:, None])
    samples = tuple(_law(_minimise(best, x, fitted + drawn)[0], centre) for drawn in noise)
    return Fit(_law(best, centre), samples, scatter)


def _starts(num_variables: int, smallest_loss: float) -> list[torch.Tensor]:
    """Constants to start from, in the form that is optimized: ln E, ln of each term at the centre, ln exponents."""
    return [
        torch.tensor(
            [
                math.log(share * smallest_loss),
                *[math.log((1 - share) * smallest_loss / num_variables)] * num_variables,
                *map(math.log, exponents),
            ],
            dtype=torch.float64,
        )
        for share in _SHARES
        for exponents in itertools.product(_EXPONENTS, repeat=num_variables)
    ]


def _log_loss(constants: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Logarithm of the loss of every point, float64 (points,), of centred logarithms `x` (points, variables)."""
    number = x.shape[1]
    terms = constants[1 : 1 + number] - constants[1 + number :].exp() * x
    return torch.logsumexp(torch.cat([constants[:1].expand(len(x), 1), terms], dim=1), dim=1)


def _minimise(start: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The constants that L-BFGS finds, and their objective."""
    constants = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [constants], max_iter=500, history_size=20, tolerance_grad=1e-7, tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective() -> torch.Tensor:
        # In units of delta squared: of order one, as the tolerances expect.
        scaled = (_log_loss(constants, x) - y) / _DELTA
        return torch.nn.functional.huber_loss(scaled, torch.zeros_like(scaled), reduction="sum")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = objective()
        value.backward()
        return value

    optimizer.step(closure)
    with torch.no_grad():
        value = objective().item()
    return constants.detach(), value if math.isfinite(value) else math.inf


def _law(constants: torch.Tensor, centre: np.ndarray) -> Law:
    number = len(centre)
    exponents = constants[1 + number :].exp().numpy()
    coefficients = np.exp(constants[1 : 1 + number].numpy() + exponents * centre)
    return Law(math.exp(constants[0].item()), tuple(map(float, coefficients)), tuple(map(float, exponents)))
