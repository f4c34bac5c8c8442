"""Whether a conversion is running."""

from __future__ import annotations

import fcntl
import os

import pytest

from paroquant_stream.errors import StoreError
from paroquant_stream.maintenance import activity as module
from paroquant_stream.maintenance.activity import demand_quiet, running
from paroquant_stream.store.store import Store
from tests.helpers.builders import temp_of


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(tmp_path / "cache")
    store.create()
    return store


def write_temp(store: Store, pid: int) -> None:
    store.folder("tmp").joinpath(temp_of(pid)).write_bytes(b"x")


def test_a_lock_that_is_held_shows_it(store):
    assert running(store) is None
    with store.lock("m"):
        assert "m.lock is held" in (running(store) or "")
        with pytest.raises(StoreError, match=r"a conversion is running .*wait for it"):
            demand_quiet(store)
    assert running(store) is None
    demand_quiet(store)


def test_a_temp_that_a_live_process_writes_shows_it(store):
    write_temp(store, os.getppid())
    assert "is being written" in (running(store) or "")


def test_a_temp_of_a_dead_process_shows_nothing(store):
    write_temp(store, 4194305)  # over Linux's largest process number
    assert running(store) is None


def test_a_temp_that_has_not_grown_for_an_hour_shows_nothing(store, monkeypatch):
    write_temp(store, os.getppid())
    monkeypatch.setattr(module, "QUIET", -1)
    assert running(store) is None


def test_asking_does_not_take_a_lock_away_nor_keep_it(store):
    with store.lock("m"):
        running(store)
        assert running(store)  # still held
    with store.lock("m"):
        pass


def test_a_link_planted_as_a_lock_is_not_followed(store, tmp_path):
    target = tmp_path / "target"
    target.write_bytes(b"")
    store.folder("locks").joinpath("m.lock").symlink_to(target)
    with target.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert running(store) is None


def test_nothing_runs_in_an_absent_store(tmp_path):
    assert running(Store(tmp_path / "absent")) is None
    assert not (tmp_path / "absent").exists()


def test_locks_that_hold_nothing_are_noticed(store, monkeypatch):
    assert store.locks_work()
    assert running(store) is None  # asking left none held
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    assert not store.locks_work()


def test_a_file_system_without_locks_is_noticed(store, monkeypatch, tmp_path):
    def unsupported(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert not store.locks_work()


def test_one_who_asks_is_not_taken_for_a_conversion_by_another(store):
    with store.lock("m"):
        pass
    with (store.folder("locks") / "m.lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as the other one holds it while it asks
        assert running(store) is None
