"""Names that enter file paths: one rule, checked at every border; and names that several rooms share."""

from __future__ import annotations

import re
from datetime import datetime

IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
RULE = "1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit"

# Of a comparison, in the order in which they are shown.
COMPARED_MODELS = ("base", "sft", "distilled", "teacher")


def is_identifier(name: str) -> bool:
    """Whether `name` may name a run or session: safe in any path, no `..`, no separator."""
    return IDENTIFIER.fullmatch(name) is not None and ".." not in name


def new_run_id(now: datetime, taken: set[str]) -> str:
    """`distill_YYYYMMDD_HHMMSS`, with `_2`, `_3` … appended when that second has a run already."""
    stem = now.strftime("distill_%Y%m%d_%H%M%S")
    candidate, number = stem, 1
    while candidate in taken:
        number += 1
        candidate = f"{stem}_{number}"
    return candidate
