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


def one_line(error: BaseException) -> str:
    """Give an error's type and what it says in one line of at most 500 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return text if len(text) <= 500 else f"{text[:497]}..."


def listed(lines: list[str]) -> str:
    """The lines in order, each on its own, at most 50."""
    lines = sorted(lines)
    more = [f"... and {len(lines) - 50} more"] if len(lines) > 50 else []
    return "".join(f"\n  {line}" for line in lines[:50] + more)


def bytes_text(count: int) -> str:
    """A size for people, in powers of 1000: `950 B`, `1.5 kB`, `37.6 GB`."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def shown(text: object, keep: str = "") -> str:
    """The text for a terminal: control characters and broken UTF-8, which a path may hold, escaped.

    `keep`: characters that stay as they are, like the newlines of a list of defects.
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode()
        for c in str(text)
    )
