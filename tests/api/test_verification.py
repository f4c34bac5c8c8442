"""`verify_cache`: every byte is read, and damage is repaired if asked to."""

from __future__ import annotations

import shutil

import pytest

from paroquant_stream import (
    SomeModelsFailedError,
    convert_checkpoint,
    verify_cache,
)
from tests.helpers.builders import flip
from tests.helpers.cache_files import damage_entry


def test_what_verify_finds_repair_converts_again(three):
    assert verify_cache().models == ()
    path = damage_entry(three[0])
    found, done = verify_cache(), []
    assert (found.files, [problem.path for problem in found.problems]) == (4, [path])
    assert found.damaged == found.problems
    assert set(found.models) == {str(path) for path in three[:2]}  # they share the entry
    assert not path.exists()
    found.repair(done.append)
    assert set(done) == set(found.models)
    assert verify_cache().problems == ()


def test_verify_of_a_model_reads_every_dtype_and_sources(model_dir):
    convert_checkpoint(model_dir, dtype="float16")
    path = damage_entry(model_dir)
    shard = model_dir / "model-00002-of-00003.safetensors"
    flip(shard, shard.stat().st_size - 1)
    found = verify_cache(model_dir, sources=True)
    assert found.files == 12
    assert [problem.path for problem in found.problems if not problem.key] == [shard, shard]
    assert {problem.path for problem in found.damaged} == {path}
    assert found.models == (str(model_dir),)


def test_verify_of_all_models_takes_no_option_of_one():
    for option in ("in_place", "sources"):
        with pytest.raises(ValueError, match="need a model"):
            verify_cache(**{option: True})


def test_a_repair_that_fails_carries_the_error_of_its_model(three):
    damage_entry(three[0])
    found, done = verify_cache(), []
    shutil.rmtree(three[0])
    with pytest.raises(SomeModelsFailedError, match=f"1 of 2 models .*\n  {three[0]}: ") as caught:
        found.repair(done.append)
    assert list(caught.value.failures) == [str(three[0])]
    assert done == [str(three[1])]
