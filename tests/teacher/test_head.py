"""The head as it is served: hidden states and exported tensors give the model's own logits on the other side."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from opd_daemon.distill.logits import VocabularyMask
from opd_daemon.distill.teacher_head import HeadMatrix
from opd_daemon.errors import OpdError, Reason
from opd_daemon.models.split import split
from opd_daemon.teacher.export import export_head
from opd_daemon.types import TeacherInfo
from opd_daemon.wire.arrays import head_facts, head_from_pieces, head_pieces
from tests.families import FAMILIES, FAMILIES_RUN_WHOLE, VOCAB, tiny_family

TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]])
INFO = TeacherInfo("m", "", "", "", "", VOCAB, VOCAB, 32, 128, 0, "float32", 0, True, "", ())


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_the_served_head_give_the_models_logits(family: str, quantised: bool) -> None:
    model = tiny_family(family, quantised=quantised)
    parts = split(model, VOCAB)
    exported = export_head(parts)
    received = head_from_pieces(head_facts(exported, INFO), head_pieces(exported))
    assert (received.logit_scale, received.soft_cap) == (exported.logit_scale, exported.soft_cap)
    logits = HeadMatrix(received, VocabularyMask(VOCAB))(parts.body(TOKENS)[0])
    whole = np.array(model(TOKENS)[0])
    np.testing.assert_allclose(np.array(logits), whole, rtol=0, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize("family", FAMILIES_RUN_WHOLE)
def test_a_head_that_cannot_be_split_off_is_not_served(family: str) -> None:
    parts = split(tiny_family(family), VOCAB)
    with pytest.raises(OpdError) as caught:
        export_head(parts)
    assert caught.value.reason is Reason.HIDDEN_NOT_SUPPORTED
