"""Faults from the outside: calls that fail, processes that are killed, full disks, other runs.

Whatever happens, an entry has the right bytes or is not there, and the next run goes on. Every
fault proves that it fired: a sweep that injects nothing is a failure.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from paroquant_stream.api.load import load
from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import ParoquantStreamError, StoreError
from paroquant_stream.files import atomic_file
from paroquant_stream.maintenance.verify import verify_store
from paroquant_stream.store.store import Store
from tests.helpers.builders import SETTLED, cut_evenly, write_checkpoint
from tests.helpers.parameters import assert_same, parameters
from tests.helpers.paths import ROOT

ERRNOS = ("EIO", "ENOSPC", "EDQUOT", "EACCES", "EROFS", "EMFILE", "EINTR", "ESTALE")
SEAM = ("open", "posix_fallocate", "pwrite", "fsync", "fstat", "stat", "mkdir", "replace", "utime")
SEAM += ("close", "preadv", "pread", "statvfs", "listdir")
CALLS = ("pwrite", "fsync", "rename", "openat", "fallocate", "close", "mkdir")
START = (
    SETTLED
    + """
import fcntl, os, resource, sys
import concurrent.futures.thread, filelock  # what a run imports when it finds work
from paroquant_stream.cli import convert
from paroquant_stream.conversion import pipeline as shards
from paroquant_stream.transform import source, task_runner as transform
from paroquant_stream.execution import threads
"""
)
IN_PROCESSES = """
from paroquant_stream.execution import automatic, eager_processes, processes
from paroquant_stream.store.store import Store
automatic.MIN_BYTES = 1
processes.difference = lambda *_: None  # START changed constants of the run alone
Pool = eager_processes.EagerProcesses
start = Pool._start
Pool._start = lambda self, count: (start(self, count), self._greeter.shutdown())
"""
"""Work begins once the processes have answered."""
END = "\nsys.exit(convert.main(sys.argv[1:]))"
LINUX_ROOT = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="only root of Linux can mount"
)
pytestmark = pytest.mark.usefixtures("settled", "small_blocks")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("faults") / "model", cut=cut_evenly(3))


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def golden(model, tmp_path) -> dict[str, str]:
    run(model, tmp_path / "golden")
    return published(tmp_path / "golden")


def run(model, cache, **options):
    return convert(make_request(model, cache_dir=cache, jobs=1, **options))


def published(cache) -> dict[str, str]:
    """Key -> SHA-256 of the bytes of every entry that is there, by no code of the package."""
    paths = cache.rglob("entries/*/*.safetensors")
    return {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def temps(cache) -> list[str]:
    return os.listdir(cache / "v1" / "tmp")


def resumes(model, cache, golden) -> None:
    """What is published is golden, and the next run makes the rest of it and no more."""
    kept = published(cache)
    assert kept.items() <= golden.items()
    redone = {r.key for r in run(model, cache).shards if r.action == "converted"}
    assert redone == golden.keys() - kept.keys()
    assert published(cache) == golden
    assert not temps(cache)


def process(script: str, *arguments: object, under=()) -> subprocess.Popen:
    """A Python that runs the script, with what it needs of the package imported."""
    return subprocess.Popen(
        [*under, sys.executable, "-B", "-c", START + script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process, seconds: float = 60) -> tuple[int, str]:
    stderr = process.communicate(timeout=seconds)[1]
    return process.returncode, stderr


def clean(code: int, stderr: str) -> bool:
    """Exit code 0, or 1 and one line that names a path, below those of the finished shards."""
    lines = r"(going on .*\n|\S+ done: .*\n)*error: /.*\n"
    return code == 0 or (code == 1 and re.fullmatch(lines, stderr))


class Fault:
    """os.<name> fails in its `at`-th call, or from it on."""

    def __init__(self, patch, name: str, at: int, number: int, persistent: bool) -> None:
        self.fired, self.again = 0, False
        calls, broken = 0, set()
        real, close = getattr(os, name), os.close

        def failing(*arguments, **options):
            nonlocal calls
            calls += 1
            self.again |= name == "fsync" and arguments[0] in broken
            if calls != at and not (persistent and calls > at):
                return real(*arguments, **options)
            self.fired += 1
            if name == "close":  # Linux closes whatever it answers
                real(*arguments)
            elif name == "fsync":
                broken.add(arguments[0])
            raise OSError(number, os.strerror(number))

        if name == "fsync":
            patch.setattr(os, "close", lambda fd: (broken.discard(fd), close(fd))[1])
        patch.setattr(os, name, failing)


def failed_call(model, cache, golden, fault) -> tuple[bool, list[str]]:
    """Whether the fault fired, and what went wrong then or in the run after it."""
    wrong, descriptors = [], os.listdir("/dev/fd")
    with pytest.MonkeyPatch.context() as patch:
        seam = Fault(patch, *fault)
        try:
            keys = {record.key for record in run(model, cache).manifest.entries}
            wrong += [] if keys == set(golden) else ["WRONG MANIFEST"]
        except ParoquantStreamError as error:
            wrong += [] if "/" in str(error) else [f"no path in {error}"]
        except OSError as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in frames if "/paroquant_stream/" in frame.filename][-1]
            wrong.append(f"raw OSError in {Path(ours.filename).stem}.{ours.name}")
    wrong += ["fsync tried again"] if seam.again else []
    wrong += ["descriptors left open"] if os.listdir("/dev/fd") != descriptors else []
    wrong += [] if published(cache).items() <= golden.items() else ["WRONG BYTES"]
    run(model, cache)  # the same process, the fault gone
    wrong += [] if published(cache) == golden else ["WRONG BYTES after the fault"]
    wrong += ["temps left"] if temps(cache) else []
    shutil.rmtree(cache)
    return bool(seam.fired), [f"{problem}: {fault}" for problem in wrong]


@pytest.mark.parametrize("codes", [1, pytest.param(8, marks=pytest.mark.long)])
@pytest.mark.parametrize("persistent", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("name", SEAM)
def test_any_failing_call_is_a_typed_error_and_a_rerun_resumes(
    model, cache, golden, record_property, name, persistent, codes
):
    stride = 29 if codes == 1 else 1
    at, tried, fired, wrong = 1 - stride, 0, 0, []
    while fired == tried:
        at, tried = at + stride, tried + codes
        for code in (ERRNOS * 2)[at % 8 :][:codes]:
            fault = (name, at, getattr(errno, code), persistent)
            hit, problems = failed_call(model, cache, golden, fault)
            fired += hit
            wrong += problems
    assert fired
    record_property("fired", fired)
    assert not wrong, f"{len(wrong)} of {fired}:\n" + "\n".join(wrong)


def test_short_writes_and_reads_of_a_byte_change_nothing(
    model, cache, golden, monkeypatch, record_property
):
    short, pwrite, preadv, pread = [], os.pwrite, os.preadv, os.pread

    def half(fd, data, at):
        short.append("pwrite")
        return pwrite(fd, data[: max(1, len(data) // 2)], at)

    def first(fd, views, at):
        short.append("preadv")
        return preadv(fd, [views[0][:1]], at)

    monkeypatch.setattr(os, "pwrite", half)
    monkeypatch.setattr(os, "preadv", first)
    monkeypatch.setattr(os, "pread", lambda fd, size, at: pread(fd, min(size, 1), at))
    run(model, cache)
    assert published(cache) == golden
    assert short.count("pwrite") > 100
    assert short.count("preadv") > 50_000
    record_property("fired", len(short))


def strace(model, cache, calls: str, rule: str = "") -> tuple[int, str, str]:
    """Exit code, stderr and the main thread's log of a conversion under strace."""
    inject = ["-e", f"inject={calls}:{rule}"] if rule else []
    under = ["strace", "-ff", "-y", "-qq", "-o", f"{cache}.log", "-e", f"trace={calls}", *inject]
    arguments = (model, "--cache-dir", cache, "--jobs", 1, "--quiet")
    code, stderr = ended(process(END, *arguments, under=under))
    logs = [log.read_text(errors="replace") for log in cache.parent.glob(f"{cache.name}.log.*")]
    return code, stderr, max(logs, key=lambda log: log.count(str(cache)), default="")


@pytest.fixture
def log(model, golden, cache) -> list[str]:
    """The calls of one undisturbed conversion into `cache`."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    calls = "/^(pwrite64|fsync|fallocate|openat|close|(rename|unlink|mkdir)(at|at2)?)$"
    code, stderr, text = strace(model, cache, calls)
    if "PTRACE" in stderr:
        pytest.skip(f"no ptrace here: {stderr}")
    assert code == 0, stderr
    return text.splitlines()


def points(log, place, call: str, most: int | None) -> list[tuple[str, int, str]]:
    """Name, number and answer of each `call` on the cache: all, or `most` of them, spread."""
    counts: dict[str, int] = {}
    numbered = []
    for line in log:
        name = line.partition("(")[0]
        if name.startswith(call):  # rename and renameat are counted apart
            counts[name] = counts.get(name, 0) + 1
            answer = line.rsplit(" = ", 1)[1].split("<")[0]
            numbered += [(name, counts[name], answer)] if f"{place}" in line else []
    return numbered[:: len(numbered) // most + 1] if most else numbered


def inject(model, tmp_path, rules):
    """Cache, exit code, stderr and log of one run for each call and rule, two at a time."""

    def one(item):
        name = tmp_path / f"injected{item[0]}"
        return name, *strace(model, name, *item[1])

    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(one, enumerate(rules))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("most", [1, pytest.param(None, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "call",
    [c if c in ("pwrite", "fsync") else pytest.param(c, marks=pytest.mark.long) for c in CALLS],
)
def test_killed_inside_a_system_call_the_next_run_goes_on(
    model, cache, golden, log, tmp_path, record_property, call, most
):
    rules = [(name, f"signal=KILL:when={at}") for name, at, _ in points(log, cache, call, most)]
    for place, code, stderr, trace in inject(model, tmp_path, rules):
        assert code == -9, stderr
        assert re.search(rf"{re.escape(str(place))}.*= \?$", trace, re.M), trace[-500:]
        resumes(model, place, golden)
    assert rules
    record_property("fired", len(rules))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("most", [3, pytest.param(None, marks=pytest.mark.long)])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename"])
def test_a_failing_disk_is_one_line_and_exit_code_1(
    model, cache, golden, log, tmp_path, record_property, call, most
):
    where = [(name, at) for name, at, _ in points(log, cache, call, most)]
    several = where if most else [point for point in where for _ in range(2)]
    errors = itertools.cycle(("EIO", "ENOSPC"))
    rules = [(name, f"error={next(errors)}:when={at}") for name, at in several]
    codes = []
    for place, code, stderr, trace in inject(model, tmp_path, rules):
        assert "(INJECTED)" in trace
        assert clean(code, stderr), stderr
        codes.append(code)
        assert not (place / "v1" / "tmp").exists() or not temps(place)
        resumes(model, place, golden)
    assert 1 in codes
    record_property("fired", len(rules))


def test_a_write_that_only_says_it_was_done_is_found_by_verify(model, cache, golden, log, tmp_path):
    store = cache / "v1" / "tmp"
    rules = [(n, f"retval={size}:when={at}") for n, at, size in points(log, store, "pwrite", 6)]
    results = list(inject(model, tmp_path, rules))
    assert all("(INJECTED)" in trace for _, _, _, trace in results)
    assert len(results) > 3
    for place, *_ in results:
        verify_store(Store(place))  # takes what is damaged out of use
        assert published(place).items() <= golden.items()
        resumes(model, place, golden)


def test_bytes_are_durable_before_names_and_the_manifest_last(log, cache):
    events = []
    for line in log:
        call = line.partition("(")[0]
        joined = re.sub(r'<([^>"]*)>, "([^/"]+)"', r"<\1/\2>", line)  # a name in a directory
        paths = re.findall(r'[<"](/[^>"]*)[>"]', joined if "at" in call else line)
        if paths and " = -1 " not in line:
            events.append((call.rstrip("2").removesuffix("at"), *paths[-2:]))
    named, durable = [], []
    for index, event in enumerate(events):
        if event[0] == "rename" and "/memo/" not in event[2] and ".digest" not in event[2]:
            temp, target = event[1:]
            assert Path(temp).parent == cache / "v1" / "tmp"  # one mount
            last = max(i for i, other in enumerate(events) if other == ("pwrite64", temp))
            assert events.index(("open", temp, temp)) < last < events.index(("fsync", temp)) < index
            assert events.count(("fsync", temp)) == 1
            named.append(index)
            durable.append(events.index(("fsync", str(Path(target).parent)), index))
    assert len(named) == 4
    assert events[named[-1]][2].endswith(".msgpack")
    assert max(durable[:-1]) < named[-1]


@contextlib.contextmanager
def mounted(path, *options: str):
    """A mount for the body; the test is skipped where that is not allowed."""
    path.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield lambda changes: subprocess.run(
            ["mount", "-o", f"remount,{changes}", path], check=True
        )
    finally:
        subprocess.run(["umount", path], check=True)


@LINUX_ROOT
@pytest.mark.parametrize("checks", [True, False], ids=["checked before", "full meanwhile"])
@pytest.mark.parametrize("large", [1 << 30, 1], ids=["reserved", "not reserved"])
@pytest.mark.parametrize("size", [4, 20, 44, 60, 88, 112])
def test_a_full_disk_names_the_space_and_resumes_with_more(
    model, cache, golden, monkeypatch, size, checks, large
):
    monkeypatch.setattr(atomic_file, "_LARGE", large)  # from where on a tmpfs fills as it goes
    if not checks:
        monkeypatch.setattr(Store, "free_bytes", lambda _: 1 << 40)
    with mounted(cache, "-t", "tmpfs", "-o", f"size={size}k,mode=700", "none") as remount:
        with pytest.raises(StoreError, match=r"B needed.* free"):
            run(model, cache)
        assert not temps(cache)
        remount("size=1m")
        resumes(model, cache, golden)


@LINUX_ROOT
@pytest.mark.slow
@pytest.mark.parametrize("size", [40, 88])
def test_units_that_fill_memory_are_one_line_and_leave_no_temp(model, cache, golden, size):
    """Some of them in other processes, whose files lie in the same tmpfs."""
    large = "\nfrom paroquant_stream.files import atomic_file\natomic_file._LARGE = 1"
    script = IN_PROCESSES + large + "\nStore.free_bytes = lambda _: 1 << 40" + END
    arguments = (model, "--cache-dir", cache, "--jobs", 3, "--quiet")
    with mounted(cache, "-t", "tmpfs", "-o", f"size={size}k,mode=700", "none") as remount:
        code, stderr = ended(process(script, *arguments))
        assert (code, stderr.count("\n")) == (1, 1), stderr
        assert re.match(r"error: /.*B needed.* free", stderr)
        assert not temps(cache)
        remount("size=1m")
        resumes(model, cache, golden)


@LINUX_ROOT
def test_a_disk_without_inodes_is_a_store_error(model, cache, golden):
    failed = 0
    for inodes in range(2, 24):
        options = f"size=1m,nr_inodes={inodes},mode=700"
        with mounted(cache, "-t", "tmpfs", "-o", options, "none") as remount:
            try:
                run(model, cache)
            except StoreError:
                failed += 1
            remount("nr_inodes=99")
            resumes(model, cache, golden)
    assert failed > 5


def test_a_failure_while_shards_are_queued_ends_the_run():
    script = "\nimport time\ndef job(item, _):\n    time.sleep(item + 0.1)\n    raise OSError"
    script += "\nfor _ in threads.run_all(job, range(4), 2):\n    pass"
    with process(script) as waiting:
        try:
            assert "OSError" in ended(waiting, 60)[1]
        finally:
            waiting.kill()


@pytest.mark.parametrize("limit", [0, 9000, 40000])
def test_a_limit_of_file_size_is_one_line_and_exit_code_1(model, cache, golden, limit):
    script = f"\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))" + END
    limited = process(script, model, "--cache-dir", cache, "--jobs", 1, "--quiet")
    code, stderr = ended(limited)
    assert code == 1
    assert clean(code, stderr), stderr
    resumes(model, cache, golden)


def test_too_few_descriptors_are_one_line_and_exit_code_1(model, tmp_path, golden):
    codes = []
    for limit in range(4, 20, 5):
        cache, script = tmp_path / f"cache{limit}", "\nimport mlx.core"
        script += f"\nresource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))" + END
        arguments = (model, "--cache-dir", cache, "--jobs", 1, "--quiet")
        code, stderr = ended(process(script, *arguments))
        assert clean(code, stderr), stderr
        codes.append(code)
        # Without a descriptor for the memo a published shard is hashed and converted in one pass.
        assert published(cache).items() <= golden.items()
        run(model, cache)
        assert published(cache) == golden
    assert codes[0] == 1
    assert codes[-1] == 0


@pytest.fixture
def right(model, tmp_path, on_the_cpu):
    """Whether a model loaded from a cache is the one that nothing disturbed."""
    from mlx.utils import tree_flatten

    def parameters(cache) -> dict[str, np.ndarray]:
        flat = tree_flatten(load(model, cache_dir=cache)[0].parameters())
        return {name: np.array(value) for name, value in flat}

    expected = parameters(tmp_path / "undisturbed")

    def check(cache) -> bool:
        got = parameters(cache)
        return expected.keys() == got.keys() and all(
            np.array_equal(got[n], expected[n]) for n in expected
        )

    return check


@LINUX_ROOT
def test_a_read_only_cache_serves_what_it_has(model, cache, right, tmp_path):
    run(model, cache)
    other = write_checkpoint(tmp_path / "other")
    with mounted(cache, "--bind", cache) as remount:
        remount("bind,ro")
        with pytest.raises(OSError, match="Read-only"):
            (cache / "x").touch()
        assert {report.action for report in run(model, cache).shards} == {"reused"}
        assert right(cache)
        with pytest.raises(StoreError, match="Read-only file system"):
            run(other, cache)


@LINUX_ROOT
def test_a_read_only_cache_serves_a_moved_dropped_model(model, cache, tmp_path):
    directory = Path(shutil.copytree(model, tmp_path / "model"))
    expected = parameters(load(directory, cache_dir=cache)[0])
    run(directory, cache, drop_source=True)
    moved = directory.rename(tmp_path / "moved")
    assert not list(moved.glob("*.safetensors"))
    with mounted(cache, "--bind", cache) as remount:
        remount("bind,ro")
        assert_same(parameters(load(moved, cache_dir=cache)[0]), expected)


@contextlib.contextmanager
def removing(root, pattern: str):
    """Removes what matches again and again beside the body; gives what was removed."""
    stop, gone = threading.Event(), []

    def remove():
        while not stop.wait(0.003):
            for path in root.glob(pattern):
                with contextlib.suppress(OSError):
                    path.unlink()
                    gone.append(path)

    thread = threading.Thread(target=remove)
    thread.start()
    try:
        yield gone
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize(("real", "pattern"), [("0", "nothing"), ("real(*a)", "v1/locks/*")])
def test_without_locks_four_processes_are_still_right(model, cache, golden, real, pattern):
    """With a flock that does nothing, or lock files that vanish under their holders."""
    script = "\ncalls, real = [], fcntl.flock"
    script += f"\nfcntl.flock = lambda *a: calls.append(a) or {real}"
    script += "\ncode = convert.main(sys.argv[1:])\nassert calls\nsys.exit(code)"
    with removing(cache, pattern) as gone:
        arguments = (model, "--cache-dir", cache, "--jobs", 1, "--force", "--quiet")
        running = [process(script, *arguments) for _ in range(4)]
        assert [ended(one) for one in running] == [(0, "")] * 4
    assert bool(gone) == (pattern != "nothing")
    resumes(model, cache, golden)


def test_without_locks_two_runs_with_processes_are_right(model, cache, golden):
    """Four processes convert the same shards at once; only the runs themselves take a lock."""
    script = "\ncalls = []\nfcntl.flock = lambda *a: calls.append(a)"
    script += "\nfrom paroquant_stream.execution import processes"
    script += "\nprocesses.difference = lambda *_: None"  # START changed constants of the run alone
    script += "\ncode = convert.main(sys.argv[1:])\nassert calls\nsys.exit(code)"
    arguments = (model, "--cache-dir", cache, "--executor", "process", "--jobs", 2, "--force")
    running = [process(script, *arguments, "--quiet") for _ in range(2)]
    assert [ended(one) for one in running] == [(0, "")] * 2
    resumes(model, cache, golden)


def test_two_threads_load_one_cold_model(cache, right):
    barrier = threading.Barrier(2)

    def cold(_):
        barrier.wait()
        return right(cache)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(cold, range(2), timeout=60)) == [True, True]


def test_a_reader_beside_a_repeated_writer_is_right(model, cache, right):
    script = "\nfor _ in range(20):\n    assert convert.main(sys.argv[1:]) == 0"
    run(model, cache)
    writer, loads = process(script, model, "--cache-dir", cache, "--force", "--quiet"), 0
    while writer.poll() is None:
        assert right(cache)
        loads += 1
    assert ended(writer) == (0, "")
    assert loads > 3


def test_entries_that_vanish_under_a_reader_are_converted_again(cache, right):
    outcomes = []
    with removing(cache, "v1/entries/*/*") as gone:
        for _ in range(40):
            try:
                outcomes.append(right(cache))
            except ParoquantStreamError as error:
                outcomes.append(str(cache) in str(error))
    assert all(outcomes)
    assert len(gone) > 3
    assert right(cache)
