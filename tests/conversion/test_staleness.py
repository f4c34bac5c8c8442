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
    request = make_request(model_dir, jobs=1)
    result = convert(request)
    assert "never hashed" in staleness(request, result.manifest)
    assert set(actions(run(model_dir)).values()) == {"reused"}  # hashed again, not converted
