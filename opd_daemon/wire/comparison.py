"""Comparisons of models on the wire."""

from __future__ import annotations

from opd_daemon.errors import OpdError, Reason
from opd_daemon.types import ComparisonRequest, ModelAnswer, ModelSummary
from opd_daemon.v1 import run_pb2 as pb
from opd_daemon.wire.runs import seconds_from_proto, seconds_to_proto

OPTIONAL = ("speedup", "forward_kl", "reverse_kl", "agreement", "acceptance", "accepted_fraction")


def request_to_proto(request: ComparisonRequest) -> pb.CompareModelsRequest:
    """A request as a message."""
    return pb.CompareModelsRequest(
        run_id=request.run_id,
        prompts=request.prompts,
        max_tokens=request.max_tokens,
        models=request.models,
        temperature=request.temperature,
        speculative=request.speculative,
    )


def request_from_proto(message: pb.CompareModelsRequest) -> ComparisonRequest:
    """A message as a request."""
    return ComparisonRequest(
        run_id=message.run_id,
        prompts=tuple(message.prompts),
        max_tokens=message.max_tokens,
        models=tuple(message.models),
        temperature=message.temperature,
        speculative=message.speculative,
    )


def answer_to_proto(answer: ModelAnswer) -> pb.CompareModelsResponse:
    """A piece of an answer as a message."""
    return pb.CompareModelsResponse(
        model=answer.model,
        prompt_index=answer.prompt_index,
        text=answer.text,
        tokens=answer.tokens,
        finish_reason=answer.finish_reason,
        summary=_summary_to_proto(answer.summary) if answer.summary else None,
    )


def answer_from_proto(message: pb.CompareModelsResponse) -> ModelAnswer:
    """A message as a piece of an answer."""
    return ModelAnswer(
        model=message.model,
        prompt_index=message.prompt_index,
        text=message.text,
        tokens=message.tokens,
        finish_reason=message.finish_reason,
        summary=_summary_from_proto(message.summary) if message.HasField("summary") else None,
    )


def error_from_proto(message: pb.RunError) -> OpdError:
    """What a worker says went wrong; a reason of a newer version becomes INTERNAL."""
    reason = Reason(message.reason) if message.reason in Reason.__members__ else Reason.INTERNAL
    return OpdError(reason, message.message)


def _summary_to_proto(summary: ModelSummary) -> pb.ModelSummary:
    return pb.ModelSummary(
        tokens=summary.tokens,
        duration=seconds_to_proto(summary.seconds),
        tokens_per_second=summary.tokens_per_second,
        weight_bytes=summary.weight_bytes,
        adapter_bytes=summary.adapter_bytes,
        peak_bytes=summary.peak_bytes,
        **{name: getattr(summary, name) for name in OPTIONAL},
    )


def _summary_from_proto(message: pb.ModelSummary) -> ModelSummary:
    present = {field.name: value for field, value in message.ListFields()}
    return ModelSummary(
        tokens=message.tokens,
        seconds=seconds_from_proto(message.duration),
        weight_bytes=message.weight_bytes,
        adapter_bytes=message.adapter_bytes,
        peak_bytes=message.peak_bytes,
        **{name: present.get(name) for name in OPTIONAL},
    )
