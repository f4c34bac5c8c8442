"""The numbers of the layers that parameters belong to."""

from __future__ import annotations

import re

LAYER = re.compile(r"(?:(?:model|language_model)\.)*layers\.(\d+)\.")


def layer_number(name: str) -> int | None:
    """Return the number of the layer that a parameter belongs to, or None."""
    match = LAYER.match(name)
    return int(match[1]) if match else None


def of_layers(parameters: dict, layers: range) -> dict:
    """Select the parameters that a model of these layers has."""
    return {n: a for n, a in parameters.items() if layer_number(n) in {None, *layers}}
