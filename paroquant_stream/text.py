"""Sizes and ages as people write them: `100GB`, `30d`, and back `3 days ago`."""

from __future__ import annotations

import re

SIZES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
AGES = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_NAMES = ((604_800, "week"), (86_400, "day"), (3600, "hour"), (60, "minute"))
_NUMBER = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([A-Za-z]+)")


def parse_size(text: str) -> int:
    """Bytes in a size like `100GB` or `1.5 TB`, in powers of 1000 as sizes are printed.

    Raises ValueError for anything else, a number without a unit too: 100 of what?
    """
    units = {unit.lower(): factor for unit, factor in SIZES.items()}
    return int(_parse(text, units, "a size", "a number and B, kB, MB, GB or TB, like 100GB"))


def parse_age(text: str) -> float:
    """Seconds in an age like `30d`: s, m (minutes), h, d or w. Raises ValueError."""
    return _parse(text, AGES, "an age", "a number and s, m, h, d or w, like 30d")


def _parse(text: str, units: dict[str, int], what: str, expected: str) -> float:
    match = _NUMBER.fullmatch(text.strip())
    factor = units.get(match[2].lower()) if match else None
    if not match or factor is None:
        raise ValueError(f"{text!r} is not {what}: expected {expected}")
    return float(match[1]) * factor


def age_text(seconds: float) -> str:
    """How long ago, to the unit: `3 days ago`; `just now` below a minute and for the future."""
    for factor, name in _NAMES:
        if seconds >= factor:
            count = int(seconds // factor)
            return f"{count} {name}{'s' * (count > 1)} ago"
    return "just now"
