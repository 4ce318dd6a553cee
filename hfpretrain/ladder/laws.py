"""Scaling laws: their fit to the losses of finished runs, its uncertainty, and the best size for given compute."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FLOPS_PER_PARAMETER_AND_TOKEN = 6.0
"""Training compute C = 6 N D for N parameters that each token meets and D tokens (Kaplan et al. 2020, section 2.1)."""
_DELTA = 1e-3
_MAX_STEPS = 300
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

    The objective is that of Hoffmann et al. 2022, appendix D.2: the Huber loss (delta 1e-3) of ln predicted - ln
    measured, the prediction as a log-sum-exp, from a grid of starts of which the best end is kept. The logarithms of
    the variables are centred and the exponents kept positive by their own logarithms, which moves no minimum and lets a
    coarse grid reach it. It is summed, not averaged, and followed to convergence, without which the published fit
    stopped early (Besiroglu et al. 2024, "Chinchilla Scaling: A replication attempt").

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
    x, y = logs - centre, np.log(losses)
    ends, objectives = _minimise(_starts(num_variables, float(losses.min())), x, y[None])
    best = ends[objectives.argmin()]
    fitted = _log_losses(best[None], x)[0][0]
    freedom = points - constants
    generator = np.random.default_rng(seed)
    squares = float(((y - fitted) ** 2).sum())
    scatter = np.sqrt(squares / generator.chisquare(freedom, num_samples)) if freedom else np.empty(0)
    drawn = fitted + generator.normal(size=(len(scatter), points)) * scatter[:, None]
    samples, _ = _minimise(np.tile(best, (len(scatter), 1)), x, drawn)
    return Fit(_law(best, centre), tuple(_law(sample, centre) for sample in samples), scatter)


def _starts(num_variables: int, smallest_loss: float) -> np.ndarray:
    """Constants to start from, float64 (starts, constants): ln E, ln of each term at the centre, ln exponents."""
    return np.array(
        [
            [
                math.log(share * smallest_loss),
                *[math.log((1 - share) * smallest_loss / num_variables)] * num_variables,
                *map(math.log, exponents),
            ]
            for share in _SHARES
            for exponents in itertools.product(_EXPONENTS, repeat=num_variables)
        ]
    )


def _log_losses(constants: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of the loss, float64 (fits, points), at centred logarithms `x` (points, variables), and their
    derivatives by the constants (fits, points, constants)."""
    number = x.shape[1]
    slopes = -np.exp(constants[:, None, 1 + number :]) * x
    terms = np.concatenate([np.broadcast_to(constants[:, None, :1], (*slopes.shape[:2], 1)), slopes], axis=2)
    terms[:, :, 1:] += constants[:, None, 1 : 1 + number]
    largest = terms.max(axis=2, keepdims=True)
    shares = np.exp(terms - largest)
    total = shares.sum(axis=2, keepdims=True)
    shares /= total
    return (largest + np.log(total))[:, :, 0], np.concatenate([shares, shares[:, :, 1:] * slopes], axis=2)


def _minimise(starts: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Constants at the ends of as many fits as there are `starts`, and their objectives.

    Levenberg's and Marquardt's damped least squares, points beyond delta weighted by delta / residual (Huber 1981,
    section 7.8), instead of L-BFGS: it makes a few products of all fits at once, where L-BFGS runs one after another
    and hundreds of times as long. `tests/ladder/test_laws.py` holds that L-BFGS goes no lower.
    """

    def objective(constants: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        values, slopes = _log_losses(constants, x)
        residuals = values - y
        size = np.abs(residuals)
        return np.where(size < _DELTA, size**2 / 2, _DELTA * (size - _DELTA / 2)).sum(axis=1), residuals, slopes

    constants, damping = starts.copy(), np.full(len(starts), 1e-2)
    value, residuals, slopes = objective(constants)
    diagonal = np.eye(constants.shape[1])
    for _ in range(_MAX_STEPS):
        weights = np.minimum(1.0, _DELTA / np.maximum(np.abs(residuals), 1e-300))[:, :, None]
        gradient = (slopes * weights * residuals[:, :, None]).sum(axis=1)
        curvature = np.einsum("fpi,fpj->fij", slopes * weights, slopes)
        scale = np.einsum("fii->fi", curvature) + 1e-12
        step = np.linalg.solve(curvature + damping[:, None, None] * diagonal * scale[:, None], gradient[:, :, None])
        tried = constants - np.clip(step[:, :, 0], -1.0, 1.0)
        new_value, new_residuals, new_slopes = objective(tried)
        better = new_value < value
        constants, value = np.where(better[:, None], tried, constants), np.where(better, new_value, value)
        residuals = np.where(better[:, None], new_residuals, residuals)
        slopes = np.where(better[:, None, None], new_slopes, slopes)
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-12, 1e8)
        if (damping == 1e8).all():  # no step helps any more
            break
    return constants, value


def _law(constants: np.ndarray, centre: np.ndarray) -> Law:
    number = len(centre)
    exponents = np.exp(constants[1 + number :])
    coefficients = np.exp(constants[1 : 1 + number] + exponents * centre)
    return Law(math.exp(constants[0]), tuple(map(float, coefficients)), tuple(map(float, exponents)))
