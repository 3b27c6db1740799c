"""What a trainer minimises: a divergence mixed with cross-entropy, and the numbers watched beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from opd_daemon.distill import exact, formulas, registry
from opd_daemon.distill.divergences import Divergence, ExactSignal, FormulaDivergence, ReverseKl, SampledSignal
from opd_daemon.distill.formulas import paired, paired_outcomes, softmax
from opd_daemon.distill.logits import DEVICE, HOST, Arrays, entropy, host_view, on_host, over_tiles, top_ids
from opd_daemon.distill.outcomes import student_outcomes
from opd_daemon.trainer import DivergenceInfo

if TYPE_CHECKING:
    from opd_daemon.config import RunConfig
    from opd_daemon.distill.batches import Rows
    from opd_daemon.distill.teacher_head import HeadMatrix

TokenValues = dict[str, mx.array]


@dataclass(frozen=True, slots=True)
class Objective:
    """kl_weight · T² · divergence + ce_weight · cross-entropy, summed over rows with what each of them weighs.

    head: gives the teacher's head, which turns its hidden states into logits; not called before there are some.
    measures_bias: whether the divergence can be had from whole distributions, where those are known beside the signal.
    """

    divergence: Divergence
    kl_weight: float
    ce_weight: float
    head: Callable[[], HeadMatrix] | None = None
    measures_bias: bool = True

    @classmethod
    def from_config(
        cls,
        config: RunConfig,
        *,
        head: Callable[[], HeadMatrix] | None = None,
        offered: Mapping[str, DivergenceInfo] | None = None,
    ) -> Objective:
        """The objective a run's configuration asks for. offered: the divergences of plugins, by name.

        Raises:
            OpdError: INVALID_RUN_CONFIG, with the reason, for a divergence, options or a signal that don't go.
        """
        info = registry.find(config.divergence, offered)
        divergence = registry.create(
            info,
            config.divergence_options,
            temperature=config.temperature,
            signal=config.signal,
        )
        exact = "exact" in info.signals
        return cls(divergence, config.kl_weight, config.ce_weight, cache(head) if head else None, measures_bias=exact)

    def gradient(self, logits: mx.array, rows: Rows, *, reuse: bool = False) -> tuple[mx.array, TokenValues, mx.array]:
        """Loss summed over the rows, what is known of every token, and the loss's gradient at the logits `(N, V)`.

        Values are the trained divergence `kl` and the cross-entropy `ce`, as far as they have weight, `clipped`, and
        the watched numbers: `exact.NAMES` where the signal is exact, else those of `watch`; `bias_gap` holds the exact
        minus the approximate divergence of the positions whose teacher state is known. reuse: on a CPU the gradient
        may take the memory of the logits, which are masked, float32 and no longer needed.
        """
        values, slopes = (self._of_exact if rows.exact else self._of_signal)(logits, rows, reuse=reuse)
        loss = mx.zeros(())
        if "kl" in values:
            loss = loss + self.kl_weight * self.divergence.temperature**2 * (values["kl"] * rows.mask).sum()
        if "ce" in values:
            loss = loss + self.ce_weight * (values["ce"] * rows.mask).sum()
        return loss, values, slopes

    def _of_exact(self, logits: mx.array, rows: Rows, *, reuse: bool) -> tuple[TokenValues, mx.array]:
        teacher = self._teacher(rows)
        foreign = None
        if self.kl_weight and not isinstance(self.divergence, FormulaDivergence):
            foreign = self.divergence.slopes(logits, ExactSignal(teacher))
            if reuse:
                mx.eval(foreign)  # while the logits are there
        labels, weights = rows.labels[:, None], rows.mask[:, None]
        if on_host():
            slopes = logits if reuse else mx.zeros(logits.shape)
            table = mx.zeros((len(rows), len(COLUMNS)))
            views = [host_view(array) for array in (table, slopes, teacher, logits, labels, weights)]

            def tile(cut: slice) -> None:
                into_table, into_slopes, *given = (view[cut] for view in views)
                found, into_slopes[:] = self._exact_rows(HOST, *given)
                into_table[:] = np.concatenate(found, axis=-1)

            over_tiles(tile, *logits.shape)
        else:
            found, slopes = self._exact_rows(DEVICE, teacher, logits, labels, weights)
            table = mx.concatenate(found, axis=-1)
        values = {name: table[:, place] for place, name in enumerate(COLUMNS)}
        if foreign is not None:
            values["kl"], clipped = self.divergence.clipped(foreign[0])
            values["clipped"] = clipped.astype(mx.float32)
            slopes = slopes + foreign[1] * self._factors(rows, clipped)
        return values, slopes

    def _exact_rows(
        self, arrays: Arrays, teacher: Any, student: Any, labels: Any, weights: Any
    ) -> tuple[list[Any], Any]:
        """The `COLUMNS` (N, 1), and the slopes (N, V), of logits (N, V): everything in one pass over the rows."""
        lib, divergence = arrays.lib, self.divergence
        plain = paired(arrays, teacher, student, 1.0)
        watched = exact.columns(arrays, plain)
        nothing = lib.zeros_like(watched[0])
        kl, ce, clipped, slopes = nothing, nothing, nothing, None
        if self.kl_weight and isinstance(divergence, FormulaDivergence):
            one = divergence.temperature == 1
            pair = plain if one else paired(arrays, teacher, student, divergence.temperature)
            kl, slopes = divergence.rows(arrays, pair)
            if divergence.token_clip is not None:
                clipped = (lib.abs(kl) > divergence.token_clip).astype(lib.float32)
                kl = lib.clip(kl, -divergence.token_clip, divergence.token_clip)
            slopes = slopes * ((1.0 - clipped) * weights * (self.kl_weight * divergence.temperature**2))
        if self.ce_weight:
            aims = lib.where(labels < 0, plain.log_t.argmax(axis=-1, keepdims=True), labels)
            ce = -lib.take_along_axis(plain.log_s, aims, axis=-1)
            toward = arrays.add_at(plain.s * (self.ce_weight * weights), aims, -self.ce_weight * weights)
            slopes = toward if slopes is None else slopes + toward
        return [kl, ce, clipped, *watched], lib.zeros_like(student) if slopes is None else slopes

    def _of_signal(self, logits: mx.array, rows: Rows, *, reuse: bool) -> tuple[TokenValues, mx.array]:
        values = watch(logits, rows)
        slopes = None
        if self.kl_weight and rows.signal is not None:
            found, slopes = self.divergence.slopes(logits, rows.signal)
            values["kl"], clipped = self.divergence.clipped(found)
            values["clipped"] = (clipped | self._weights_clipped(logits, rows)).astype(mx.float32)
            slopes = slopes * self._factors(rows, clipped)
            values |= self._bias(logits, rows, values["kl"])
        if self.ce_weight:
            if reuse:
                mx.eval(values, [] if slopes is None else slopes)  # while the logits are there
            values["ce"], toward = _ce_slopes(logits, rows.labels, rows.mask * self.ce_weight, reuse=reuse)
            slopes = toward if slopes is None else slopes + toward
        return values, mx.zeros(logits.shape) if slopes is None else slopes

    def _factors(self, rows: Rows, clipped: mx.array) -> mx.array:
        scale = self.kl_weight * self.divergence.temperature**2
        return mx.where(clipped, 0.0, rows.mask * scale)[:, None]

    def _weights_clipped(self, logits: mx.array, rows: Rows) -> mx.array:
        if isinstance(self.divergence, ReverseKl) and isinstance(rows.signal, SampledSignal):
            return self.divergence.clipped_weights(logits, rows.signal)
        return mx.zeros((len(rows),), dtype=mx.bool_)

    def _bias(self, logits: mx.array, rows: Rows, approximate: mx.array) -> TokenValues:
        if not self.measures_bias or rows.hidden is None or self.head is None or not len(known := rows.hidden.known):
            return {}
        places = mx.array(known)
        found = self.divergence.values(logits[places], ExactSignal(self._teacher(rows)))
        return {"bias_gap": self.divergence.clipped(found)[0] - approximate[places]}

    def _teacher(self, rows: Rows) -> mx.array:
        if rows.hidden is None or self.head is None:
            raise ValueError("an objective on hidden states needs the teacher's head")
        return self.head()(rows.hidden.array())


COLUMNS = ("kl", "ce", "clipped", *exact.NAMES)


def watch(logits: mx.array, rows: Rows) -> TokenValues:
    """Per-token numbers at temperature 1 that nothing is trained on: logits `(N, V)` → `{name: (N,)}`.

    forward_kl, reverse_kl, js_divergence over the sparse support with its tail; teacher_support_mass and
    student_support_mass: what each has on the ids; student_entropy over the whole vocabulary; agreement and
    top5_agreement as 0 or 1. Without a teacher, student_entropy alone.
    """
    values = {"student_entropy": entropy(logits)}
    if rows.plain is None or rows.teacher_top is None:
        return values
    student = student_outcomes(logits, rows.plain.ids)
    pair = paired_outcomes(mx, rows.plain.outcomes(), student)
    best = top_ids(logits, 5) == rows.teacher_top[:, None]
    values |= {
        "forward_kl": formulas.forward_kl(mx, pair)[0].sum(axis=-1),
        "reverse_kl": formulas.reverse_kl(mx, pair)[0].sum(axis=-1),
        "js_divergence": formulas.jsd(0.5)(mx, pair)[0].sum(axis=-1),
        "teacher_support_mass": pair.t[:, :-1].sum(axis=-1),
        "student_support_mass": pair.s[:, :-1].sum(axis=-1),
        "agreement": best[:, 0].astype(mx.float32),
        "top5_agreement": best.any(axis=-1).astype(mx.float32),
    }
    if rows.teacher_entropy is not None:
        values["teacher_entropy"] = rows.teacher_entropy
    return values


def _ce_slopes(logits: mx.array, labels: mx.array, weights: mx.array, *, reuse: bool) -> tuple[mx.array, mx.array]:
    """Cross-entropy `(N,)` of the labels, and its gradient `(N, V)` times the weights."""
    columns = labels[:, None], weights[:, None]
    if not on_host():
        values, slopes = _ce_rows(DEVICE, logits, *columns)
        return values[:, 0], slopes
    values, slopes = mx.zeros((len(labels), 1)), logits if reuse else mx.zeros(logits.shape)
    views = [host_view(array) for array in (values, slopes, logits, *columns)]

    def tile(cut: slice) -> None:
        into_values, into_slopes, *given = (view[cut] for view in views)
        into_values[:], into_slopes[:] = _ce_rows(HOST, *given)

    over_tiles(tile, *logits.shape)
    return values[:, 0], slopes


def _ce_rows(arrays: Arrays, logits: Any, labels: Any, weights: Any) -> tuple[Any, Any]:
    log_s, s = softmax(arrays, logits, 1.0)
    return -arrays.lib.take_along_axis(log_s, labels, axis=-1), arrays.add_at(s * weights, labels, -weights)
