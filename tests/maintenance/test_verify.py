"""Verification reads every byte, and says which file is not what it should be."""

from __future__ import annotations

import threading

import pytest

from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import StoreError, UnreadableFileError
from paroquant_stream.maintenance import verify as module
from paroquant_stream.maintenance.verify import manifests_of, verify_model, verify_store


@pytest.fixture
def request_(model_dir):
    request = make_request(model_dir, jobs=1)
    convert(request)
    return request


def entry_paths(request_):
    (manifest,) = manifests_of(request_.store)
    return [request_.store.entry_path(record.key) for record in manifest.entries]


def flip(path, position=-1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_sound_model_has_no_problem(request_):
    assert verify_model(request_, sources=True) == (6, [])
    assert verify_model(request_, sources=False) == (3, [])
    assert verify_store(request_.store) == (3, [])


@pytest.mark.parametrize("position", [0, 9, 17_000, -1])
def test_any_flipped_bit_of_an_entry_is_found_by_verify(request_, position):
    path = entry_paths(request_)[1]
    flip(path, position)
    data = path.read_bytes()
    for verify in (lambda: verify_model(request_, False), lambda: verify_store(request_.store)):
        path.write_bytes(data)
        count, (problem,) = verify()
        assert count == 3
        assert problem.path == path
        assert str(problem).startswith(f"{path}: expected XXH3 ")
        assert not path.exists()  # taken out of use


def test_safetensors_maps_no_entry_that_was_not_read_whole(request_, monkeypatch):
    """A page that cannot be read ends a process that has it mapped."""
    opened, real = [], module.safetensors.safe_open
    monkeypatch.setattr(
        module.safetensors, "safe_open", lambda *a, **k: opened.append(a) or real(*a, **k)
    )
    flip(entry_paths(request_)[1])
    _, problems = verify_store(request_.store)
    assert len(problems) == 1
    assert len(opened) == 2

    def unreadable(*_):
        raise UnreadableFileError("x: cannot be read: Input/output error")

    monkeypatch.setattr(module, "hash_entry", unreadable)
    with pytest.raises(UnreadableFileError):
        verify_store(request_.store)
    assert len(opened) == 2


def test_an_entry_that_safetensors_sees_otherwise_is_a_problem(request_, monkeypatch):
    def refuse(*_, **__):
        raise module.safetensors.SafetensorError("header too small")

    monkeypatch.setattr(module.safetensors, "safe_open", refuse)
    _, problems = verify_store(request_.store)
    assert {str(p).partition(": ")[2] for p in problems} == {
        "expected a file that safetensors opens, got header too small"
    }
    assert [p.path.exists() for p in problems] == [True] * 3


def test_without_more_threads_entries_are_verified(request_, monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert verify_store(request_.store) == (3, [])


def test_one_bad_read_is_no_damage(request_, monkeypatch):
    real, reads = module.hash_entry, []

    def wrong_once(fd, tensors, label, *rest):
        reads.append(label)
        return "0" * 32 if len(reads) == 1 else real(fd, tensors, label, *rest)

    monkeypatch.setattr(module, "hash_entry", wrong_once)
    assert verify_store(request_.store) == (3, [])
    assert len(reads) == 3


def test_after_damage_was_found_the_model_is_converted_again(request_):
    flip(entry_paths(request_)[1])
    verify_store(request_.store)
    assert [r.action for r in convert(request_).shards].count("converted") == 1
    assert verify_store(request_.store) == (3, [])


def test_an_absent_entry_is_found(request_):
    path = entry_paths(request_)[0]
    path.unlink()
    _, (problem,) = verify_model(request_, False)
    assert problem.path == path
    assert problem.found == "no readable file"


def test_a_changed_or_absent_source_is_found_when_asked_for(request_):
    shards = sorted(request_.source.directory.glob("model-*"))
    flip(shards[0])
    shards[1].unlink()
    assert verify_model(request_, sources=False) == (3, [])
    _, problems = verify_model(request_, sources=True)
    assert [problem.path for problem in problems] == shards[:2]


def test_a_model_that_was_never_converted_is_an_error(request_, tmp_path):
    with pytest.raises(StoreError, match="not converted"):
        verify_model(make_request(request_.source.directory, cache_dir=tmp_path / "other"), False)


def test_a_damaged_manifest_is_no_manifest(request_):
    path = request_.store.manifest_path(request_.store.manifest_names()[0])
    flip(path)
    assert list(manifests_of(request_.store)) == []
    assert verify_store(request_.store) == (0, [])
