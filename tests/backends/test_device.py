"""MLX's backend and device."""

from __future__ import annotations

import sys

import mlx.core as mx
import pytest

from paroquant_stream.backends.device import describe_device


@pytest.mark.usefixtures("on_the_cpu")
def test_says_on_what_mlx_runs():
    found = describe_device()
    assert found["device"] == str(mx.default_device())
    assert found["backend"] in ("cpu", "cuda", "metal")
    assert "error" not in found


@pytest.mark.parametrize("name", ["metal", "cuda"])
def test_names_the_backend_that_is_there(name, monkeypatch):
    for other in ("metal", "cuda"):
        monkeypatch.setattr(getattr(mx, other), "is_available", lambda other=other: other == name)
    assert describe_device()["backend"] == name


def test_without_mlx_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    found = describe_device()
    assert found["backend"] is None
    assert "mlx.core" in found["error"]
