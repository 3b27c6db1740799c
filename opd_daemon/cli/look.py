"""`opd score` and `opd generate`: quick looks at the teacher."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import typer

from opd_daemon.cli import exits, output
from opd_daemon.errors import OpdError, Reason

if TYPE_CHECKING:
    from opd_daemon.client import Client
    from opd_daemon.types import Scores


def score(
    text: str = typer.Argument(help="Text to score; no chat template is applied."),
    *,
    top_k: int = typer.Option(3, min=1, max=1024, help="Alternatives shown at each position."),
    as_json: bool = typer.Option(False, "--json", help="As JSON."),
) -> int:
    """Show how likely the teacher finds each token of a text, and what it expected instead."""
    import numpy as np

    from opd_daemon.client import Client
    from opd_daemon.types import ScoreRequest, ScoreWants

    with Client.find() as client:
        ids = client.tokenize(text)
        if len(ids) < 2:
            message = f"TEXT {text!r}: {len(ids)} token; two are needed, as the first one has nothing before it"
            raise OpdError(Reason.INVALID_REQUEST, message)
        wants = ScoreWants(token_stats=True, top_k=top_k)
        scores = client.score([ScoreRequest(np.asarray(ids, dtype=np.int32), 1, wants)])[0].scores
        positions = _positions(client, ids, scores)
    total = sum(entry["logprob"] for entry in positions)
    if as_json:
        output.show_json({"tokens": positions, "first_token_id": ids[0], "total_logprob": total})
        return exits.OK
    columns = ("TOKEN", "LOGPROB", "RANK", "ENTROPY", "EXPECTED")
    output.show_table(columns, map(_row, positions), numbers=("LOGPROB", "RANK", "ENTROPY"))
    mean = total / len(positions)
    output.say(f"{len(positions)} tokens, mean logprob {mean:.3f} nats, perplexity {np.exp(-mean):.2f}")
    return exits.OK


def _positions(client: Client, ids: list[int], scores: Scores) -> list[dict[str, Any]]:
    names: dict[int, str] = {}

    def name(token: int) -> str:
        if token not in names:
            names[token] = client.detokenize([token])
        return names[token]

    logprobs, ranks, entropies = scores.token_logprobs, scores.ranks, scores.entropies
    top_ids, top_logprobs = scores.top_ids, scores.top_logprobs
    if logprobs is None or ranks is None or entropies is None or top_ids is None or top_logprobs is None:
        raise OpdError(Reason.INTERNAL, "the daemon left out scores it was asked for")
    return [
        {
            "token_id": ids[row + 1],
            "text": name(ids[row + 1]),
            "logprob": float(logprobs[row]),
            "rank": int(ranks[row]),
            "entropy": float(entropies[row]),
            "top": [
                {"token_id": int(token), "text": name(int(token)), "logprob": float(logprob)}
                for token, logprob in zip(top_ids[row], top_logprobs[row], strict=True)
            ],
        }
        for row in range(len(logprobs))
    ]


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    expected = "  ".join(f"{choice['text']!r} {choice['logprob']:.2f}" for choice in entry["top"])
    return (repr(entry["text"]), f"{entry['logprob']:.3f}", str(entry["rank"]), f"{entry['entropy']:.3f}", expected)


def generate(
    prompt: str = typer.Argument(help="What to say to the teacher."),
    *,
    max_tokens: int = typer.Option(256, min=1, help="Longest answer, in tokens."),
    temperature: float = typer.Option(0.0, min=0.0, help="Sampling temperature; 0 is greedy."),
    seed: int | None = typer.Option(None, min=0, max=2**32 - 1, help="Makes sampling repeatable."),
    raw: bool = typer.Option(False, "--raw", help="Continue the text as it is, without the chat template."),
    as_json: bool = typer.Option(False, "--json", help="As JSON, with the tokens and their logprobs."),
) -> int:
    """Let the teacher answer a prompt."""
    from opd_daemon.client import Client
    from opd_daemon.types import GenerateRequest

    with Client.find() as client:
        ids = client.tokenize(prompt) if raw else client.tokenize_chat([{"role": "user", "content": prompt}])
        request = GenerateRequest(tuple(ids), max_tokens, temperature=temperature, seed=seed)
        pieces = []
        for piece in client.stream_generation([request]):
            pieces.append(piece)
            if not as_json:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
    tokens = [token for piece in pieces for token in piece.tokens]
    if as_json:
        shown = [{"token_id": token.token_id, "logprob": token.logprob} for token in tokens]
        reason = tokens[-1].finish_reason if tokens else ""
        output.show_json({"text": "".join(piece.text for piece in pieces), "finish_reason": reason, "tokens": shown})
    else:
        output.show()
    return exits.OK
