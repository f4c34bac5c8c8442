"""The request of a conversion: options that are checked, and the names of manifests."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import pytest

from paroquant_stream import ConvertOptions
from paroquant_stream.checkpoint.model_source import ModelSource
from paroquant_stream.conversion.request import Target, default_jobs, make_request, model_id
from paroquant_stream.store.format import DEFAULT_VARIANT, DTYPES, VARIANTS, Variant
from paroquant_stream.store.store import Store


@pytest.mark.parametrize("jobs", [0, -1, 1.0, True, "2"])
def test_jobs_are_a_whole_number_from_1(jobs):
    with pytest.raises(ValueError, match="jobs is a whole number, 1 or more, or None"):
        ConvertOptions(jobs=jobs)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match=r"dtype is one of source, .*, not 'int8'"):
        ConvertOptions(dtype="int8")


def test_other_bits_of_embedding_and_head_are_refused():
    with pytest.raises(ValueError, match="io_bits is 4 or 8, not 5"):
        ConvertOptions(io_bits=5)


def test_an_unknown_option_is_refused(model_dir):
    with pytest.raises(TypeError, match="nope"):
        make_request(model_dir, nope=1)


def test_by_default_there_is_a_job_per_core_and_at_most_8(monkeypatch, model_dir):
    for cores, jobs in ((64, 8), (8, 8), (3, 3), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert default_jobs() == make_request(model_dir).jobs == jobs
    assert make_request(model_dir, jobs=3).jobs == 3


def test_an_executor_gives_the_number_of_jobs(model_dir):
    with ThreadPoolExecutor(5) as pool:
        assert make_request(model_dir, executor=pool).jobs == 5
        assert make_request(model_dir, executor=pool, jobs=2).jobs == 2


def test_an_executor_that_does_not_tell_has_the_default(model_dir, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert make_request(model_dir, executor=Executor()).jobs == 3


def test_the_model_id_is_of_path_and_variant():
    one, other = Path("/m"), Path("/n")
    assert len({model_id(p, v) for p in (one, other) for v in VARIANTS.values()}) == 12
    default = hashlib.sha256(b'/m\0{"dtype": "source"}').hexdigest()  # never changes
    assert model_id(one) == model_id(one, DEFAULT_VARIANT) == default


def test_a_new_cast_version_renames_only_manifests_of_casts(monkeypatch):
    before = [model_id(Path("/m"), Variant(dtype)) for dtype in DTYPES]
    monkeypatch.setattr("paroquant_stream.conversion.request.CAST_VERSION", 99)
    after = [model_id(Path("/m"), Variant(dtype)) for dtype in DTYPES]
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, False]


def test_an_in_place_manifest_is_named_without_a_path():
    store = Store(Path("/c"))
    names = {
        Target(store, in_place=True).manifest_name(ModelSource("m", Path(path)))
        for path in ("/m", "/n")
    }
    assert len(names) == 1
    assert names.pop().startswith("model-")
