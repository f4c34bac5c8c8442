"""Removal: whatever cuts it off, no manifest names what is gone, and the next one finishes."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from paroquant_stream.api.convert import convert_checkpoint
from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import StoreError
from paroquant_stream.maintenance import activity as running
from paroquant_stream.maintenance import removal
from paroquant_stream.maintenance.inventory import take_inventory
from paroquant_stream.maintenance.prune import PrunePlan, Rules, plan_prune, plan_removal
from paroquant_stream.maintenance.removal import execute
from paroquant_stream.store.store import Store
from tests.helpers.builders import temp_of

pytestmark = pytest.mark.usefixtures("settled")


@pytest.fixture
def store(three_models) -> Store:
    return three_models


def plan_of(store: Store, *names: str) -> PrunePlan:
    inventory = take_inventory(store)
    return plan_removal(inventory, [m for m in inventory.models if Path(m.name).name in names])


def left(store: Store) -> list[str]:
    return [Path(model.name).name for model in take_inventory(store).models]


def check(store: Store) -> None:
    """Every manifest names entries that are there, whole."""
    inventory = take_inventory(store)
    for model in inventory.models:
        for record in model.records:
            assert inventory.entries[record.key].size == record.size


def test_a_removed_model_is_gone_and_its_bytes_are_free(store):
    before, plan = take_inventory(store), plan_of(store, "c")
    assert execute(plan) == plan.freed
    after = take_inventory(store)
    forgotten = sum(memo.size for memo in after.memos)  # of c's shards, not counted before
    assert before.size - (after.size - forgotten) == plan.freed
    assert (left(store), after.removed, after.unclaimed) == (["a", "b"], (), {})
    assert len(list(store.folder("memo").iterdir())) == 15 - 3  # its entries' went
    check(store)


def test_shared_entries_survive_the_removal_of_one_model(store, tmp_path):
    execute(plan_of(store, "a"))
    assert left(store) == ["b", "c"]
    check(store)
    result = convert(make_request(tmp_path / "b", jobs=1))
    assert {report.why for report in result.shards} == {"unchanged"}
    execute(plan_of(store, "b"))
    assert len(take_inventory(store).entries) == 3


def test_nothing_outside_of_the_cache_changes(store, tmp_path):
    before = {p: p.stat() for p in (tmp_path / "c").iterdir()}
    execute(plan_of(store, "c"))
    assert {p: p.stat() for p in (tmp_path / "c").iterdir()} == before


class Killed(BaseException):
    """Nothing in the removal catches it, as nothing catches SIGKILL."""


@pytest.mark.parametrize(
    "step",
    [n if n in (0, 1, 4, 10, 11) else pytest.param(n, marks=pytest.mark.slow) for n in range(13)],
)
def test_a_removal_killed_at_any_step_is_finished_by_the_next(store, monkeypatch, step):
    plan, calls = plan_of(store, "c"), 0

    def dying(real):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == step + 1:
                raise Killed
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink"):
            patch.setattr(os, name, dying(getattr(os, name)))
        try:
            execute(plan)
        except Killed:
            assert calls == step + 1
        else:
            assert calls == 11  # 1 manifest, 3 entries, 3 memos, 3 digests of them, 1 manifest
            assert step >= calls
    check(store)
    execute(plan_prune(take_inventory(store), Rules()))
    assert left(store) == (["a", "b", "c"] if step == 0 else ["a", "b"])
    inventory = take_inventory(store)
    assert (inventory.removed, inventory.unclaimed) == ((), {})
    assert len(inventory.entries) == (6 if step == 0 else 3)


KILLED = """
import os, signal, sys
from paroquant_stream import cache
real, count = os.unlink, 0
def unlink(*arguments, **options):
    global count
    count += str(arguments[0]).endswith(".safetensors")  # some versions of filelock unlink too
    if count == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*arguments, **options)
os.unlink = unlink
cache.main(["rm", sys.argv[1], "-y"])
"""


def test_a_killed_rm_is_finished_by_the_next_rm_of_any_model(store, tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "c")], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    inventory = take_inventory(store)
    assert len(inventory.removed) == 1
    assert len(inventory.entries) < 6
    execute(plan_of(store, "a"))
    inventory = take_inventory(store)
    assert (inventory.removed, inventory.unclaimed, len(inventory.entries)) == ((), {}, 3)


def test_a_model_converted_after_a_killed_removal_keeps_entries(store, tmp_path):
    path = next(m for m in take_inventory(store).models if m.name.endswith("c")).files[0].path
    path.rename(f"{path}.removed")
    convert_checkpoint(tmp_path / "c")
    execute(plan_prune(take_inventory(store), Rules()))
    assert left(store) == ["a", "b", "c"]
    assert take_inventory(store).removed == ()
    check(store)


def test_two_removals_at_once_are_one(store):
    plans = [plan_of(store, "a", "b", "c") for _ in range(4)]
    errors: list[BaseException] = []

    def work(plan):
        try:
            execute(plan)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(plan,)) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    inventory = take_inventory(store)
    assert (inventory.models, inventory.entries, inventory.removed) == ((), {}, ())


def test_a_reader_of_a_removed_entry_keeps_its_bytes(store, tmp_path):
    plan = plan_of(store, "c")
    key = next(iter(plan.entries))
    before = store.entry_path(key).read_bytes()
    fd = store.open_entry(key)
    execute(plan)
    assert os.pread(fd, len(before) + 1, 0) == before
    os.close(fd)
    result = convert(make_request(tmp_path / "c", jobs=1))
    assert {report.action for report in result.shards} == {"converted"}
    assert store.entry_path(key).read_bytes() == before


def test_nothing_goes_while_a_conversion_is_running(store):
    plan = plan_of(store, "c")
    with store.lock("another"), pytest.raises(StoreError, match="a conversion is running"):
        execute(plan)
    assert left(store) == ["a", "b", "c"]
    check(store)


def test_a_conversion_that_begins_stops_the_removal(store, monkeypatch):
    plan, asked = plan_of(store, "c"), []

    def from_the_third_on(_store):
        asked.append(1)
        return "x.lock is held" if len(asked) >= 3 else None

    with monkeypatch.context() as patch:
        patch.setattr(running, "running", from_the_third_on)
        with pytest.raises(StoreError, match="a conversion is running"):
            execute(plan)
    assert len(take_inventory(store).entries) == 5
    check(store)
    execute(plan_prune(take_inventory(store), Rules()))
    assert len(take_inventory(store).entries) == 3


def test_an_entry_that_a_manifest_names_since_the_plan_stays(store, tmp_path):
    plan = plan_of(store, "c")
    shutil.copytree(tmp_path / "c", tmp_path / "d")
    convert_checkpoint(tmp_path / "d")
    assert len(plan.entries) == 3
    execute(plan)
    assert left(store) == ["a", "b", "d"]
    check(store)


def test_a_model_used_since_the_plan_stays(store, tmp_path):
    plan = plan_of(store, "c")
    time.sleep(0.01)
    convert_checkpoint(tmp_path / "c")
    assert execute(plan) == 0
    assert left(store) == ["a", "b", "c"]
    check(store)


def test_a_newer_version_that_came_since_the_plan_stops_it(store, tmp_path):
    plan = plan_of(store, "c")
    path = next(m for m in take_inventory(store).models if m.name.endswith("b")).files[0].path
    data = bytearray(path.read_bytes())
    data[10:12] = (3).to_bytes(2, "little")
    path.write_bytes(data)
    with pytest.raises(StoreError, match="newer version"):
        execute(plan)
    assert len(take_inventory(store).entries) == 6


def test_links_put_in_the_place_of_what_goes_lose_nothing(store, tmp_path):
    plan = plan_of(store, "c")
    victims = []
    for number, file in enumerate([*plan.entries.values(), plan.models[0].files[0]]):
        victim = tmp_path / f"victim{number}"
        file.path.rename(victim)
        file.path.symlink_to(victim)
        victims.append(victim)
    execute(plan)
    assert all(victim.is_file() for victim in victims)
    assert len(take_inventory(store).entries) == 3


def test_an_entry_written_anew_since_the_plan_stays(store, tmp_path):
    plan = plan_of(store, "c")
    (path,) = [file.path for file in plan.entries.values()][:1]
    shutil.copy(path, tmp_path / "new")
    os.replace(tmp_path / "new", path)
    execute(plan)
    assert path.exists()
    assert len(take_inventory(store).entries) == 4


@pytest.mark.parametrize("call", ["replace", "unlink"])
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
def test_what_cannot_be_removed_is_a_store_error_that_names_it(store, monkeypatch, call, number):
    plan, fired = plan_of(store, "c"), []

    def fail(*_arguments, **_options):
        fired.append(call)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StoreError, match=f"cannot be removed: {os.strerror(number)}"):
            execute(plan)
    assert fired == [call]
    check(store)
    execute(plan_prune(take_inventory(store), Rules()))
    check(store)


def test_prune_removes_temps_of_dead_runs(store):
    temp = store.folder("tmp") / temp_of(4194305)
    temp.write_bytes(b"1234")
    live = store.folder("tmp") / temp_of(os.getppid())
    live.write_bytes(b"1234")
    assert execute(plan_prune(take_inventory(store), Rules())) == 4
    assert list(store.folder("tmp").iterdir()) == [live]


def test_prune_removes_unclaimed_entries(store, tmp_path):
    path = next(m for m in take_inventory(store).models if m.name.endswith("c")).files[0].path
    path.unlink()
    plan = plan_prune(take_inventory(store, time.time() + 7200), Rules(orphans=True))
    assert execute(plan) == plan.freed
    assert len(take_inventory(store).entries) == 3
    check(store)
    result = convert(make_request(tmp_path / "c", jobs=1))
    assert {report.action for report in result.shards} == {"converted"}


def test_only_foreign_directories_are_removed(store):
    directory = store.root / "0123456789abcdef"
    directory.mkdir()
    (directory / "converted_mlx.safetensors").write_bytes(b"123")
    (store.root / "mine").mkdir()
    plan = plan_prune(take_inventory(store), Rules(foreign=True))
    assert execute(plan) == 3
    assert not directory.exists()
    assert (store.root / "mine").exists()


def test_an_unremovable_foreign_directory_is_a_store_error(store, monkeypatch):
    directory = store.root / "0123456789abcdef"
    directory.mkdir()
    (directory / "converted_mlx.safetensors").write_bytes(b"123")
    plan = plan_prune(take_inventory(store), Rules(foreign=True))

    def fail(_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(removal, "remove_foreign", fail)
    with pytest.raises(StoreError, match="0123456789abcdef: cannot be removed: Read-only"):
        execute(plan)


def test_a_cache_that_others_can_write_into_is_left_alone(store):
    plan = plan_of(store, "c")
    store.root.chmod(0o777)
    with pytest.raises(StoreError, match="others can write"):
        execute(plan)
    store.root.chmod(0o700)
    assert left(store) == ["a", "b", "c"]
