"""Scaling laws: their fit to the losses of finished runs, its uncertainty, and the best size for a given compute."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from hfpretrain.recipe.schema import RecipeError

FLOPS_PER_PARAMETER_AND_TOKEN = 6.0
"""Training compute C = 6 N D for N parameters active per token and D tokens (Kaplan et al. 2020, section 2.1)."""
_DELTA, _MAX_EVALUATIONS = 1e-3, 1000
# The fit starts from each point of a grid: exponents, and the irreducible loss as a share of the smallest loss.
_EXPONENTS, _SHARES = (0.1, 0.4, 1.0), (0.2, 0.8)


@dataclass(frozen=True)
class Law:
    """Loss = `irreducible` + sum of `coefficients` / x ** `exponents`, in nats per token.

    With two variables, parameters N and tokens D, it is E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, "Training
    Compute-Optimal Large Language Models", section 3.3). With one, compute C, it is E + K / C^gamma, for runs that all
    have the same tokens per parameter.
    """

    irreducible: float
    coefficients: tuple[float, ...]
    exponents: tuple[float, ...]

    def loss(self, *variables: float) -> float:
        """The loss at N and D, or at C."""
        terms = zip(self.coefficients, variables, self.exponents, strict=True)
        return self.irreducible + sum(coefficient * x**-exponent for coefficient, x, exponent in terms)

    def optimum(self, compute: float, factor: float = FLOPS_PER_PARAMETER_AND_TOKEN) -> tuple[float, float]:
        """N and D with the lowest loss for which `factor` N D = `compute` FLOPs (Hoffmann et al. 2022, equation 4)."""
        (a, b), (alpha, beta) = self.coefficients, self.exponents
        # A constant that the runs hardly determine is near 0 in some samples. So the result is computed in logarithms,
        # and is at least one parameter and one token.
        log_product = math.log(compute / factor)
        log_g = (math.log(alpha) + math.log(a) - math.log(beta) - math.log(b)) / (alpha + beta)
        log_parameters = min(max(log_g + log_product * beta / (alpha + beta), 0.0), log_product)
        return math.exp(log_parameters), math.exp(log_product - log_parameters)


@dataclass(frozen=True)
class Fit:
    """A fitted law, and the laws of the bootstrap samples, which give its uncertainty.

    `samples`: empty if there are only as many points as the law has constants. `scatter`: float64 (samples,), for each
    sample, the standard deviation with which its ln losses were drawn about the law.
    """

    law: Law
    samples: tuple[Law, ...]
    scatter: np.ndarray

    def interval(self, values: Sequence[float]) -> tuple[float, float] | None:
        """The middle 95% of `values`, one for each sample; None without samples."""
        if not self.samples:
            return None
        low, high = np.quantile(np.asarray(values), [0.025, 0.975])
        return float(low), float(high)

    def loss_interval(self, *variables: float, of_a_run: bool = False) -> tuple[float, float] | None:
        """95% interval of the law's loss at a point; None without samples.

        With `of_a_run`, the interval of the loss that another run there would have, which includes the scatter of the
        runs about the law.
        """
        losses = np.array([sample.loss(*variables) for sample in self.samples])
        if of_a_run and len(losses):
            losses *= np.exp(np.random.default_rng(0).normal(0.0, self.scatter))
        return self.interval(losses.tolist())


def num_constants(num_variables: int) -> int:
    """Number of constants of a law: two for each variable, and the irreducible loss."""
    return 1 + 2 * num_variables


def require_scipy() -> None:
    """Raise `RecipeError` if scipy, which fits the laws, is not installed."""
    if find_spec("scipy") is None:
        raise RecipeError.at("ladder", "scipy is not installed: pip install hfpretrain[ladder]")


def fit(variables: np.ndarray, losses: np.ndarray, num_samples: int = 200, seed: int = 0) -> Fit:
    """Fit a `Law` to runs, and fit one more law to each of `num_samples` sets of losses drawn about the first.

    `variables`: float64 (points, 1 or 2), either C or N and D of each run; `losses`: float64 (points,), nats per token.

    The objective is that of Hoffmann et al. 2022, appendix D.2: the sum of the Huber losses (delta 1e-3) of
    ln predicted - ln measured, here with no constant below 0. It is minimized from each starting point of a grid, and
    the best result is kept.

    The uncertainty is a parametric bootstrap (Efron & Tibshirani 1993, section 6.5). Each sample's losses are drawn
    about the fitted law, and its fit starts from that law. Their variance is drawn as well: it is the residuals' sum of
    squares divided by a draw from a chi-squared distribution, whose degrees of freedom are the number of points minus
    the number of constants. For a linear law this gives Student's intervals. The runs themselves are not resampled,
    because their sizes are chosen and there are few of each.

    Raises `ValueError` for fewer points than constants, or for a loss that is not positive and finite.
    """
    points, num_variables = variables.shape
    constants = num_constants(num_variables)
    if points < constants:
        raise ValueError(f"{points} points are too few to fit the {constants} constants of the law")
    if not (np.isfinite(losses).all() and (losses > 0).all()):
        raise ValueError("every loss must be a positive number")
    logs = np.log(variables)
    center = logs.mean(axis=0)
    x, y = logs - center, np.log(losses)
    minima = [_minimize(start, x, y) for start in _starting_points(num_variables, float(losses.min()))]
    best, _ = min(minima, key=lambda minimum: minimum[1])
    fitted, _ = _log_losses(best, x)
    freedom = points - constants
    generator = np.random.default_rng(seed)
    squares = float(((y - fitted) ** 2).sum())
    scatter = np.sqrt(squares / generator.chisquare(freedom, num_samples)) if freedom else np.empty(0)
    drawn = fitted + generator.normal(size=(len(scatter), points)) * scatter[:, None]
    samples = tuple(_law(_minimize(best, x, sample)[0], center) for sample in drawn)
    return Fit(_law(best, center), samples, scatter)


def _starting_points(num_variables: int, smallest_loss: float) -> Iterator[np.ndarray]:
    """Constants from which fits start, each float64 (constants,): E, each term's value at `center`, the exponents."""
    for share in _SHARES:
        for exponents in itertools.product(_EXPONENTS, repeat=num_variables):
            terms = [(1 - share) * smallest_loss / num_variables] * num_variables
            yield np.array([share * smallest_loss, *terms, *exponents])


def _log_losses(constants: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logarithm of the loss, float64 (points,), at centered logarithms `x` (points, variables), and its derivative by
    each constant, float64 (points, constants)."""
    number = x.shape[1]
    powers = np.exp(-constants[1 + number :] * x)
    terms = constants[1 : 1 + number] * powers
    values = constants[0] + terms.sum(axis=1)
    slopes = np.concatenate([np.ones((len(x), 1)), powers, -terms * x], axis=1)
    return np.log(values), slopes / values[:, None]


def _minimize(start: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """The constants at the minimum that is reached from `start`, and the objective there.

    The objective is the loss "huber" of `least_squares`. L-BFGS, the optimizer of the paper, finds the same minima but
    needs 5 times the evaluations (8,808 against 1,691 for the grid of a law of two variables), or 14 times if the runs
    hardly determine the constants.
    """
    from scipy.optimize import least_squares

    with np.errstate(all="ignore"):  # where a step overflows, a shorter one is tried
        result = least_squares(
            lambda constants: _log_losses(constants, x)[0] - y,
            start,
            jac=lambda constants: _log_losses(constants, x)[1],
            bounds=(0, np.inf),
            loss="huber",
            f_scale=_DELTA,
            ftol=1e-10,
            xtol=1e-10,
            gtol=None,
            max_nfev=_MAX_EVALUATIONS,
        )
    return result.x, float(result.cost)


def _law(constants: np.ndarray, center: np.ndarray) -> Law:
    number = len(center)
    exponents = constants[1 + number :]
    coefficients = constants[1 : 1 + number] * np.exp(exponents * center)
    return Law(float(constants[0]), tuple(map(float, coefficients)), tuple(map(float, exponents)))
