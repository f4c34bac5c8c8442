"""Why a shard is converted, in the user's words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paroquant_stream.conversion.report import report_converted, report_reused, why_converted
from paroquant_stream.store.manifest import EntryRecord

OLD = EntryRecord("a", "1" * 64, 10, ("2" * 64,), "3" * 64, "4" * 64, "5" * 32, 20, ())


@pytest.mark.parametrize(
    ("before", "changes", "forced", "why"),
    [
        (OLD, {}, True, "forced"),
        (None, {}, False, "never converted"),
        (OLD, {"source_sha256": "9" * 64}, False, "content changed"),
        (OLD, {"borrowed_sha256": ("9" * 64,)}, False, "borrowed part changed"),
        (OLD, {"task_sha256": "9" * 64}, False, "transform version changed"),
        (OLD, {}, False, "absent or damaged"),
    ],
)
def test_the_reason_is_the_first_that_holds(before, changes, forced, why):
    new = replace(OLD, **changes)
    found = why_converted(before, new.source_sha256, new.borrowed_sha256, new.task_sha256, forced)
    assert why in found
    assert report_converted(new, before, forced, 1.0).why == found


def test_a_reused_shard_is_unchanged_or_was_known_already():
    assert report_reused(OLD, OLD).why == "unchanged"
    assert "in the cache already" in report_reused(OLD, None).why
    assert "in the cache already" in report_reused(OLD, replace(OLD, key="6" * 64)).why
    assert report_reused(OLD, OLD).action == "reused"
