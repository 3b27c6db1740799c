"""What teacher and student differ by on a set of completions, with the uncertainty of it.

Every mean is per token: a ratio of two sums over completions, Σ y_i / Σ m_i, where completion i has m_i tokens whose
values add up to y_i. Tokens of one completion are not independent, completions are; so its variance is that of a ratio
estimator with completions as the draws, linearised: n/(n−1) · Σ (y_i − R·m_i)² / (Σ m_i)² (Cochran, Sampling
Techniques, 6.4). The 95 % interval takes Student's t with n−1 degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from opd_daemon.arrays import Float32
from opd_daemon.distill.exact import NAMES
from opd_daemon.types import Comparison

CONFIDENCE = 0.95
QUARTERS = 4

Values = dict[str, Float32]
"""Values by name of one completion's R tokens, each `(R,)`."""


def summarise(completions: Sequence[Values]) -> Comparison:
    """The comparison of all tokens, and of each quarter of the completions' own lengths."""
    quartiles = []
    for quarter in range(QUARTERS):
        inside = [quarters(len(next(iter(values.values())))) == quarter for values in completions]
        cut = [
            {name: value[mask] for name, value in values.items()}
            for values, mask in zip(completions, inside, strict=True)
        ]
        quartiles.append(_comparison(cut))
    return _comparison(completions, tuple(quartiles))


def quarters(length: int) -> npt.NDArray[np.int64]:
    """The quarter, 0 … 3, in which each token of a completion lies; a completion of one token has the first alone."""
    return QUARTERS * np.arange(length) // max(length, 1)


def ratio(sums: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64]) -> tuple[float, float | None]:
    """Σ sums / Σ sizes, and half its 95 % confidence interval: `(n,)`, `(n,)`. None with fewer than two draws."""
    total = float(sizes.sum())
    mean = float(sums.sum()) / total
    draws = len(sizes)
    if draws < 2:
        return mean, None
    squares = float(((sums - mean * sizes) ** 2).sum())
    return mean, t_quantile(draws - 1) * math.sqrt(draws / (draws - 1) * squares) / total


@lru_cache(maxsize=64)
def t_quantile(degrees: int) -> float:
    """Student's t that |t| exceeds with probability 5 %, by bisection."""
    low, high = 1.9, 13.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if _t_inside(middle, degrees) > CONFIDENCE else (middle, high)
    return 0.5 * (low + high)


def _t_inside(t: float, degrees: int) -> float:
    """P(|T| < t) (Abramowitz & Stegun 26.7.3 and 26.7.4: finite series for whole degrees of freedom)."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    powers = np.arange(2 + odd, degrees, 2)  # 1 · 1/2 · 3/4 · … or 1 · 2/3 · 4/5 · …, times cos² each
    terms = np.cumprod(np.concatenate([[1.0], (powers - 1) / powers * math.cos(angle) ** 2]))
    if odd:
        series = math.cos(angle) * math.sin(angle) * float(terms.sum()) if degrees > 1 else 0.0
        return 2 / math.pi * (angle + series)
    return math.sin(angle) * float(terms.sum())


def _comparison(completions: Sequence[Values], quartiles: tuple[Comparison, ...] = ()) -> Comparison:
    # A completion too short to reach this quarter says nothing about it.
    present = [values for values in completions if len(values[NAMES[0]])]
    sizes = np.array([len(values[NAMES[0]]) for values in present], dtype=np.float64)
    means, half_widths = dict.fromkeys(NAMES, 0.0), {}
    for name in NAMES if present else ():
        sums = np.array([values[name].sum(dtype=np.float64) for values in present])
        means[name], half_width = ratio(sums, sizes)
        if half_width is not None:
            half_widths[name] = half_width
    return Comparison(
        **means, tokens=int(sizes.sum()), samples=len(present), half_widths=half_widths, quartiles=quartiles
    )
