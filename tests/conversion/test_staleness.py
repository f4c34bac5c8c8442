"""Whether a manifest still holds."""

from __future__ import annotations

import pytest

from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request
from paroquant_stream.conversion.staleness import staleness
from paroquant_stream.files import descriptor
from tests.helpers.conversions import actions, run

pytestmark = pytest.mark.usefixtures("settled")


def test_a_shard_that_just_changed_is_not_trusted_by_its_stat(model_dir, monkeypatch):
    monkeypatch.setattr(descriptor, "RACY_SECONDS", 2.0)
    monkeypatch.setattr(descriptor, "TICK_SECONDS", 2.0)
    request = make_request(model_dir, jobs=1)
    result = convert(request)
    assert "never hashed" in staleness(request, result.manifest)
    assert set(actions(run(model_dir)).values()) == {"reused"}  # hashed again, not converted


def test_a_shard_that_cannot_be_read_is_a_reason_and_no_error(model_dir):
    result = run(model_dir)
    shard = model_dir / result.manifest.entries[1].shard
    shard.unlink()
    assert staleness(make_request(model_dir), result.manifest) == f"{shard.name} is absent"
    shard.mkdir()
    reason = staleness(make_request(model_dir), result.manifest)
    assert reason.startswith(f"{shard}: expected a regular file, found a directory")


def test_an_entry_that_is_longer_or_shorter_is_a_reason(model_dir):
    result = run(model_dir)
    request, record = make_request(model_dir), result.manifest.entries[1]
    path = request.store.entry_path(record.key)
    whole = path.read_bytes()
    for data in (whole[:-1], whole + b"x"):
        path.write_bytes(data)
        assert staleness(request, result.manifest) == (
            f"the entry of {record.shard} is absent or cut short"
        )
    path.write_bytes(whole)
    assert staleness(request, result.manifest) is None


def test_another_config_is_a_reason(model_dir):
    result = run(model_dir)
    config = model_dir / "config.json"
    config.write_text(config.read_text().replace("1e-05", "1e-06"))
    reason = staleness(make_request(model_dir), result.manifest)
    assert reason == "config.json or the index changed"
