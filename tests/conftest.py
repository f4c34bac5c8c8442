"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import signal
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest

from paroquant_stream.files import block_writer
from tests.helpers.builders import cut_apart, cut_evenly, settle, write_checkpoint
from tests.helpers.units import make_small

OLD_CLIENT = tuple(map(int, version("huggingface_hub").split(".")[:2])) < (1, 31)
"""Whether the Hub's client leaves open sockets to the garbage collector."""


def pytest_collection_modifyitems(items):
    for item in items:
        if OLD_CLIENT and "hub" in item.fixturenames:
            item.add_marker(pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"))
            unraisable = "Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"
            item.add_marker(pytest.mark.filterwarnings(f"ignore:{unraisable}"))


@pytest.fixture(autouse=True, scope="session")
def _default_sigint():
    """Processes that tests start can be interrupted: they inherit an ignored SIGINT, which is how a
    shell starts jobs in the background.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Give each test an empty cache of its own in place of the user's."""
    monkeypatch.setenv("PAROQUANT_STREAM_CACHE", str(tmp_path / "user-cache"))


@pytest.fixture
def settled(monkeypatch):
    """Every file counts as settled and its times as reliable, so that its digest is stored."""
    settle(monkeypatch)


@pytest.fixture
def small_blocks(monkeypatch):
    """Even a tiny entry is written in full blocks, with O_DIRECT and in a thread."""
    monkeypatch.setattr(block_writer, "BLOCK", 4096)


@pytest.fixture
def small_units(monkeypatch):
    """Even a tiny shard is cut into units, and its entry into blocks."""
    make_small(monkeypatch)


@pytest.fixture
def on_the_cpu():
    """Run on the CPU, where parity is guaranteed, whatever device the machine has."""
    import mlx.core as mx

    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Start a Hub on loopback, with an empty Hub cache; no other Hub can be reached."""
    from huggingface_hub import constants

    from tests.helpers.loopback_hub import LoopbackHub

    with LoopbackHub() as hub:
        for name, value in hub.environment(tmp_path / "hf").items():
            monkeypatch.setenv(name, value)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)  # read when it was imported
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        yield hub
        if OLD_CLIENT:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                gc.collect()


@pytest.fixture
def model_dir(tmp_path) -> Path:
    """Make a tiny llama in three shards."""
    return write_checkpoint(tmp_path / "model", cut=cut_evenly(3))


@pytest.fixture
def scattered_dir(tmp_path) -> Path:
    """Make the same model with the tensors of each linear layer in three different shards."""
    return write_checkpoint(tmp_path / "scattered", cut=cut_apart(3))
