"""JSON as one parser only can read it: what parsers disagree on is refused."""

from __future__ import annotations

import json
from typing import Any

from .errors import MalformedFile


def strict_json(text: bytes, label: str) -> Any:
    """The value of a JSON text, refusing what parsers disagree on.

    Duplicate keys, floats that are not numbers, a byte order mark, bytes after the value and
    integers over 20 digits are MalformedFile.
    """
    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique_pairs,
            parse_constant=_refuse_constant,
            parse_int=_bounded_int,
        )
    except (
        ValueError,
        RecursionError,
    ) as error:  # UnicodeDecodeError and JSONDecodeError among them
        raise MalformedFile(f"{label}: not valid JSON: {error}") from None


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _bounded_int(text: str) -> int:
    if len(text) > 20:  # 2**64 has 20 digits
        raise ValueError("an integer has more than 20 digits")
    return int(text)
