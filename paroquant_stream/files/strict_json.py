"""JSON as one parser only can read it: what parsers disagree on is refused."""

from __future__ import annotations

import json
import math
from functools import partial
from typing import Any

from ..errors import MalformedFileError


def strict_json(text: bytes, label: str, digits: int = 20) -> Any:
    """The value of a JSON text, refusing what parsers disagree on.

    Duplicate keys, floats that are not numbers or that a double cannot hold, a byte order mark,
    bytes after the value and integers over so many digits (2**64 has 20) are MalformedFileError. Takes
    time in proportion to the text.
    """
    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique_pairs,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=partial(_bounded_int, digits),
        )
    except (
        ValueError,
        RecursionError,
    ) as error:  # UnicodeDecodeError and JSONDecodeError among them
        raise MalformedFileError(f"{label}: not valid JSON: {error}") from None


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:80]!r} stands twice")
            seen.add(key)
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):  # others round 1e999 to the largest double, or refuse it
        raise ValueError(f"{text[:30]} is no finite number")
    return value


def _bounded_int(digits: int, text: str) -> int:
    if len(text) > digits:
        raise ValueError(f"an integer has more than {digits} digits")
    return int(text)
