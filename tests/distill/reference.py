"""The divergences in float64, from their definitions, with derivatives by central differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any


def log_softmax(logits: Any, temperature: float = 1.0) -> Array:
    """Log-probabilities; −1e30 and −inf both mean impossible."""
    scaled = np.where(np.asarray(logits, np.float64) < -1e29, -np.inf, np.asarray(logits, np.float64)) / temperature
    scaled = scaled - scaled.max(-1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))


def reduced(logprobs: Array, ids: Array) -> Array:
    """Log-probabilities of the ids (−1: unused, impossible) and of everything else."""
    used = ids >= 0
    places = np.where(used, ids, ids[:, :1])
    rest = np.exp(logprobs)
    np.put_along_axis(rest, places, 0.0, -1)
    named = np.where(used, np.take_along_axis(logprobs, places, -1), -np.inf)
    with np.errstate(divide="ignore"):
        return np.concatenate([named, np.log(rest.sum(-1, keepdims=True))], -1)


def kl(first: Array, second: Array) -> Array:
    """Σ p log p/q over the outcomes p can have."""
    possible = first > -np.inf
    gap = np.where(possible, first, 0.0) - np.where(possible, second, 0.0)
    return (np.exp(first) * gap).sum(-1)


def mixed(first: Array, second: Array, share: float) -> Array:
    """log of share·p + (1−share)·q."""
    with np.errstate(divide="ignore"):
        return np.log(share * np.exp(first) + (1 - share) * np.exp(second))


def jsd(beta: float) -> Callable[[Array, Array], Array]:
    def divergence(teacher: Array, student: Array) -> Array:
        if beta == 0:
            return kl(teacher, student)
        if beta == 1:
            return kl(student, teacher)
        middle = mixed(teacher, student, beta)
        return beta * kl(teacher, middle) + (1 - beta) * kl(student, middle)

    return divergence


# Name, options, and the divergence of log-probabilities (teacher, student).
CASES: list[tuple[str, dict[str, float], Callable[[Array, Array], Array]]] = [
    ("forward_kl", {}, kl),
    ("reverse_kl", {}, lambda t, s: kl(s, t)),
    ("jsd", {}, jsd(0.5)),
    ("jsd", {"beta": 0.1}, jsd(0.1)),
    ("jsd", {"beta": 0.9}, jsd(0.9)),
    ("jsd", {"beta": 0.0}, jsd(0.0)),
    ("jsd", {"beta": 1.0}, jsd(1.0)),
    ("skew_forward_kl", {}, lambda t, s: kl(t, mixed(t, s, 0.1))),
    ("skew_forward_kl", {"alpha": 0.0}, kl),
    ("skew_reverse_kl", {"alpha": 0.3}, lambda t, s: kl(s, mixed(s, t, 0.3))),
    ("total_variation", {}, lambda t, s: 0.5 * np.abs(np.exp(t) - np.exp(s)).sum(-1)),
]
NAMES = [f"{name}{''.join(f'-{value}' for value in options.values())}" for name, options, _ in CASES]


def derivatives(values: Callable[[Array], Array], logits: Any, directions: Array, size: float = 1e-5) -> Array:
    """How fast every row's value changes along each of the directions (D, N, V): `(D, N)`."""
    start = np.asarray(logits, np.float64)
    ends = [[values(start + sign * size * direction) for sign in (1, -1)] for direction in directions]
    return np.array([(up - down) / (2 * size) for up, down in ends])


def directions(shape: tuple[int, int], count: int = 4) -> Array:
    """Random directions, of which the last moves single logits."""
    generator = np.random.default_rng(99)
    found = generator.normal(size=(count, *shape))
    found[-1] = 0.0
    found[-1][np.arange(shape[0]), generator.integers(0, shape[1], shape[0])] = 1.0
    return found
