import numpy as np
import pytest

from hfpretrain.ladder import laws
from hfpretrain.ladder.laws import Law

CHINCHILLA = Law(1.69, (406.4, 410.7), (0.34, 0.28))
SIZES = (0.3e6, 0.6e6, 1.2e6)
POINTS = np.array([(n, 20 * ratio * n) for n in SIZES for ratio in (0.5, 1, 2)])


def losses(law, points):
    return np.array([law.loss(*point) for point in points])


@pytest.mark.parametrize(
    ("law", "points"),
    [(CHINCHILLA, POINTS), (Law(1.5, (60.0,), (0.12,)), np.geomspace(1e13, 1e15, 4)[:, None])],
    ids=["size and tokens", "compute"],
)
def test_a_known_law_is_found_again(law, points):
    found = laws.fit(points, losses(law, points)).law
    assert found.irreducible == pytest.approx(law.irreducible, rel=1e-4)
    assert found.coefficients == pytest.approx(law.coefficients, rel=1e-3)
    assert found.exponents == pytest.approx(law.exponents, rel=1e-4)


@pytest.mark.parametrize("noise", [3e-3, 0.1])
def test_no_other_constants_fit_better(noise):
    """Compares with 90,000 laws around the fitted law, on losses that no law fits exactly."""
    measured = losses(CHINCHILLA, POINTS) * np.exp(np.random.default_rng(1).normal(0, noise, len(POINTS)))

    def objective(logs):  # of many laws at once: ln of E, A, B, alpha, beta in the last dimension
        e, a, b, alpha, beta = np.exp(logs)[..., None].swapaxes(0, -2)
        n, d = np.log(POINTS).T
        size = np.abs(np.log(e + a * np.exp(-alpha * n) + b * np.exp(-beta * d)) - np.log(measured)) / 1e-3
        return np.where(size < 1, size**2 / 2, size - 0.5).sum(axis=-1)

    law = laws.fit(POINTS, measured, num_samples=0).law
    best = np.log([law.irreducible, *law.coefficients, *law.exponents])
    generator = np.random.default_rng(0)
    for spread in (1e-3, 1e-2, 1e-1):
        others = objective(best + generator.normal(0, spread, (30_000, 5)))
        assert others.min() >= objective(best[None]) * (1 - 1e-6)


def test_intervals_contain_the_truth_as_often_as_stated():
    at = (2.4e6, 4.8e7)
    num_contained = {"law": 0, "run": 0}
    rounds = 12
    for number in range(rounds):
        generator = np.random.default_rng(number)
        noisy = losses(CHINCHILLA, POINTS) * np.exp(generator.normal(0, 3e-3, len(POINTS)))
        fit = laws.fit(POINTS, noisy, num_samples=40)
        measured = CHINCHILLA.loss(*at) * np.exp(generator.normal(0, 3e-3))
        for kind, value in (("law", CHINCHILLA.loss(*at)), ("run", measured)):
            low, high = fit.loss_interval(*at, of_a_run=kind == "run")
            num_contained[kind] += low <= value <= high
    assert all(count >= 9 for count in num_contained.values()), num_contained  # 11.4 expected


def test_the_optimum_has_the_lowest_loss_for_the_compute():
    compute, factor = 1e20, 4.0
    parameters, tokens = CHINCHILLA.optimum(compute, factor)
    assert factor * parameters * tokens == pytest.approx(compute)
    sizes = np.geomspace(parameters / 10, parameters * 10, 20001)
    best = sizes[np.argmin([CHINCHILLA.loss(size, compute / factor / size) for size in sizes])]
    assert parameters == pytest.approx(best, rel=1e-3)


def test_too_few_points_are_refused_and_an_exact_fit_has_no_interval():
    with pytest.raises(ValueError, match="4 points are too few"):
        laws.fit(POINTS[:4], losses(CHINCHILLA, POINTS[:4]))
    with pytest.raises(ValueError, match="positive"):
        laws.fit(POINTS, np.full(len(POINTS), np.nan))
    exact = laws.fit(POINTS[:5], losses(CHINCHILLA, POINTS[:5]))
    assert exact.samples == () and exact.loss_interval(1e6, 1e7, of_a_run=True) is None
