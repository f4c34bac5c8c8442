"""Strict JSON: whatever parsers read differently is refused."""

from __future__ import annotations

import json
import math
from functools import partial
from typing import Any

from ..errors import MalformedFileError


def strict_json(text: bytes, label: str, digits: int = 20) -> Any:
    """Parse a JSON text in time proportional to its length.

    Args:
        text: The text in UTF-8.
        label: The name of the file in errors.
        digits: Characters that an integer may have; 2**64 has 20.

    Raises:
        MalformedFileError: It is not JSON, or it holds something that parsers read differently: a
            duplicate key, NaN or infinity, a float that a double cannot hold, an integer with more
            digits, a byte order mark, bytes after the value.
    """
    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique_pairs,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=partial(_bounded_int, digits),
        )
    # ValueError includes UnicodeDecodeError and JSONDecodeError
    except (ValueError, RecursionError) as error:
        raise MalformedFileError(f"{label}: not valid JSON: {error}") from None


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dict; raise ValueError for a duplicate key."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {key[:80]!r}")
            seen.add(key)
    return found


def _refuse_constant(text: str) -> None:
    """Raise ValueError for NaN and infinities, which are not JSON."""
    raise ValueError(f"{text} is not a JSON number")


def _finite_float(text: str) -> float:
    """Return a float; raise ValueError when a double cannot hold it."""
    value = float(text)
    if math.isinf(value):  # other parsers return the largest double for 1e999
        raise ValueError(f"{text[:30]} is not a finite number")
    return value


def _bounded_int(digits: int, text: str) -> int:
    """Return an integer; raise ValueError when it has too many digits."""
    if len(text) > digits:
        raise ValueError(f"an integer has more than {digits} digits")
    return int(text)
