"""Tests of calls to a Hub that responds too slowly: one error, and no leftover threads or files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from filelock import FileLock

from paroquant_stream import convert_checkpoint
from paroquant_stream.checkpoint import hub as hub_module
from paroquant_stream.checkpoint import hub_watch
from paroquant_stream.checkpoint.hub_watch import Watch, run_calls
from paroquant_stream.checkpoint.locate import locate
from paroquant_stream.errors import CheckpointError
from tests.helpers.builders import cut_evenly, write_checkpoint

pytestmark = pytest.mark.slow  # each waits for a server that is too slow
REPO = "owner/name"
SHARD = "model-00002-of-00003.safetensors"
SLOW = r"received [\d.]+ k?B from the Hub in \d+ s, less than 1\.0 kB/s"


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    """Measure rates over a third of a second instead of half a minute."""
    monkeypatch.setattr(hub_watch, "WINDOW", 0.3)
    monkeypatch.setattr(hub_watch, "RETRY_WINDOW", 0.5)
    # private: calls that an earlier test left hanging would be waited for
    monkeypatch.setattr(hub_watch, "_stopped_calls", {})


@pytest.fixture
def patient(monkeypatch):
    """Measure over a second: a request that should succeed may wait on a busy machine."""
    monkeypatch.setattr(hub_watch, "WINDOW", 1.0)


@pytest.fixture
def source(tmp_path, hub):
    directory = write_checkpoint(tmp_path / "source", cut=cut_evenly(3))
    hub.push(REPO, directory)
    return directory


def trickles(where: str, method: str = "GET", fault: str = "trickle"):
    return lambda asked, what: fault if (asked, what) == (method, where) else None


def refusal(words: str, action=lambda: convert_checkpoint(REPO)) -> str:
    with pytest.raises(CheckpointError, match=words) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def calls() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "hub-call"}


@pytest.fixture
def ends_soon():
    """Wait for the threads of this test to end; those of others may still wait for headers."""
    others = calls()

    def wait() -> bool:
        until = time.monotonic() + 60
        while calls() - others and time.monotonic() < until:
            time.sleep(0.05)
        return not calls() - others

    return wait


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("config.json", "owner/name: config.json cannot be downloaded from the Hub: "),
        ("tokenizer.json", "owner/name: tokenizer.json cannot be downloaded from the Hub: "),
        ("api", "owner/name: list of files: "),
        (f"header of {SHARD}", f"owner/name: header of {SHARD}: "),
        (SHARD, f"owner/name: {SHARD} cannot be downloaded from the Hub: "),
    ],
)
@pytest.mark.usefixtures("source")
def test_a_trickling_body_is_an_error_and_shuts_down(hub, where, named, ends_soon):
    hub.fault = trickles(where)
    assert refusal(SLOW).startswith(named)
    assert ends_soon()


@pytest.mark.parametrize(
    ("where", "method"),
    [
        ("config.json", "HEAD"),
        (SHARD, "HEAD"),
        ("config.json", "GET"),
        (f"header of {SHARD}", "GET"),
    ],
)
@pytest.mark.usefixtures("source")
def test_trickling_headers_are_an_error(hub, where, method):
    hub.fault = trickles(where, method, "trickle head")
    refusal(SLOW)


@pytest.mark.usefixtures("source")
def test_a_retry_after_an_hour_is_an_error(hub):
    hub.fault = trickles("config.json", fault="wait")
    refusal(SLOW)


@pytest.mark.usefixtures("source", "patient")
def test_after_a_slow_shard_the_next_run_resumes(hub, tmp_path, ends_soon):
    hub.fault = trickles("model-00003-of-00003.safetensors")
    refusal(SLOW, lambda: convert_checkpoint(REPO, jobs=1))
    assert ends_soon()
    assert not list((tmp_path / "hf").rglob("*.incomplete"))
    kept = list((tmp_path / "user-cache").rglob("entries/*/*"))
    assert kept
    hub.fault = lambda *_: None
    before = len(hub.downloads())
    convert_checkpoint(REPO)
    assert hub.downloads()[before:] == ["model-00003-of-00003.safetensors"]
    assert {path.stat().st_ino for path in kept} <= {
        path.stat().st_ino for path in (tmp_path / "user-cache").rglob("entries/*/*")
    }


COMMAND = """
import sys
from paroquant_stream.checkpoint import hub_watch
hub_watch.WINDOW = 1.0
from paroquant_stream.cli.convert import main
sys.exit(main(["owner/name"]))
"""


@pytest.mark.parametrize(
    ("where", "fault"),
    [(SHARD, "trickle"), (f"header of {SHARD}", "trickle head")],
)
@pytest.mark.usefixtures("source")
def test_the_command_prints_one_line_and_exits(hub, where, fault):
    hub.fault = trickles(where, fault=fault)
    command = [sys.executable, "-c", COMMAND]
    done = subprocess.run(command, capture_output=True, text=True, timeout=40, env=os.environ)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if " done: " not in line]
    assert len(errors) == 1, done.stderr
    assert re.match(f"error: owner/name: .*{SLOW}", errors[0])


@pytest.mark.usefixtures("source", "patient")
def test_a_slow_but_sufficient_rate_is_no_error(hub, monkeypatch):
    monkeypatch.setattr(hub_watch, "MIN_RATE", 50)
    hub.pause = 0.005  # at most 200 bytes a second
    hub.fault = trickles("config.json")
    directory, _ = locate(REPO)
    assert (directory / "config.json").stat().st_size > 300  # so it took more than a window


@pytest.mark.usefixtures("source", "patient")
def test_the_lock_of_another_download_is_waited_for(hub, tmp_path):
    """Nothing is received while another process downloads the same file."""
    directory, remote = locate(REPO)
    locks = tmp_path / "hf" / "hub" / ".locks" / "models--owner--name"
    held = []

    def hold(method, what):
        if (method, what) == ("HEAD", SHARD) and not held:
            sha256 = next(sha for sha, name in hub.names.items() if name == SHARD)
            locks.mkdir(parents=True, exist_ok=True)
            held.append(FileLock(locks / f"{sha256}.lock", thread_local=False))
            held[0].acquire()
            threading.Timer(2.5, held[0].release, [True]).start()

    hub.fault = hold
    started = time.monotonic()
    remote.fetch(SHARD, lambda _: None)
    assert time.monotonic() - started > 2
    assert (directory / SHARD).exists()


@pytest.mark.usefixtures("source")
def test_an_oversized_settings_file_is_not_downloaded(hub, monkeypatch):
    monkeypatch.setattr(
        hub_module, "size_limit", lambda name: 600 if name == "tokenizer.json" else None
    )
    error = refusal("which no model needs; not downloaded")
    assert error.startswith("owner/name: tokenizer.json cannot be downloaded from the Hub: over")


@pytest.mark.usefixtures("source")
def test_a_second_call_does_not_wait_forever_for_the_first(hub):
    hub.fault = trickles("config.json", fault="trickle head")
    refusal(SLOW)
    refusal("a stopped request to the Hub still hangs in this process; restart it")


@pytest.mark.usefixtures("hub")
def test_a_stopped_call_sends_no_further_request(ends_soon):
    """The Hub's client tries again after a connection that broke."""
    from huggingface_hub import get_session

    seen, resume = [], threading.Event()

    def call(watch):
        resume.wait(60)
        try:
            get_session().get("http://127.0.0.1:9/")
        except Exception as error:
            seen.append(str(error))

    def fails(watch):
        raise CheckpointError("no")

    with pytest.raises(CheckpointError, match="no"):
        run_calls([("a", call), ("b", fails)])
    resume.set()
    assert ends_soon()
    assert seen == ["a: stopped"]


@pytest.mark.usefixtures("source")
def test_a_new_session_is_watched_too(hub):
    """The client makes a new one after a connection error, in the middle of a call."""
    from huggingface_hub import close_session, get_session

    def call(watch):
        close_session()
        get_session()
        time.sleep(0.5)
        get_session().get(f"{hub.endpoint}/{REPO}/resolve/main/config.json", timeout=10)

    hub.fault = trickles("config.json")
    refusal(SLOW, lambda: run_calls([("x", call)]))


@pytest.mark.usefixtures("source", "patient")
def test_other_requests_of_the_process_are_not_watched(hub):
    from huggingface_hub import get_session

    locate(REPO)
    hub.pause = 0.005
    hub.fault = trickles("config.json")
    answer = get_session().get(f"{hub.endpoint}/{REPO}/resolve/main/config.json", timeout=10)
    assert len(answer.content) > 300  # 1.5 s, more than a window


def test_an_error_of_a_bar_ends_the_call():
    def call(watch):
        bar = watch.bar(tick, None)(total=10)
        threading.Thread(target=swallow, args=(bar,)).start()
        stopped.wait(10)

    def swallow(bar):
        try:
            bar.update(3)
        except CheckpointError:
            swallowed.append(True)

    def tick(count):
        raise CheckpointError(f"stopped at {count}")

    swallowed, stopped = [], threading.Event()
    with pytest.raises(CheckpointError, match="stopped at 3"):
        run_calls([("x", call)])
    stopped.set()
    assert swallowed


def xet_reporter(bar):
    from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

    return XetDownloadProgressReporter(
        reconstruction_desc="a", transfer_desc="b", total=100, log_level=0, tqdm_class=bar
    )


def report(done: int, sent: int) -> SimpleNamespace:
    return SimpleNamespace(
        total_bytes_completed=done, total_transfer_bytes_completed=sent, total_bytes=100,
        total_bytes_completion_rate=1.0, total_transfer_bytes_completion_rate=1.0,
    )  # fmt: skip


def test_progress_of_the_rust_client_is_counted_once():
    """Xet has two bars: bytes received from the network and bytes of the file."""
    ticks: list[int] = []
    watch = Watch("x")
    with xet_reporter(watch.bar(ticks.append, None)) as reporter:
        reporter.update_progress(report(0, 2000), {})
        watch.check(0.1)
        reporter.update_progress(report(60, 3000), {})
        reporter.update_progress(report(100, 3000), {})
        assert ticks == [60, 40]
        with pytest.raises(CheckpointError, match="x: received 0 B from the Hub in 120 s"):
            for _ in range(300):
                watch.check(1)
    watch.check(1)
    for _ in range(300):
        watch.check(1)  # closed: it waits for no response now


def test_suspended_time_does_not_count(monkeypatch):
    monkeypatch.setattr(hub_watch, "WINDOW", 3.0)
    watch = Watch("x")
    watch.request()
    for _ in range(3):
        watch.check(3600)
    with pytest.raises(CheckpointError, match="received 0 B from the Hub in 3 s"):
        watch.check(3600)


def test_results_are_in_order_and_few_calls_run_at_once():
    running, most, lock = [], [], threading.Lock()

    def call(number):
        def run(watch):
            with lock:
                running.append(number)
                most.append(len(running))
            time.sleep(0.02)
            with lock:
                running.remove(number)
            return number

        return run

    assert run_calls([(str(n), call(n)) for n in range(30)]) == list(range(30))
    assert 1 < max(most) <= hub_watch.MAX_CALLS
    assert run_calls([]) == []


def test_after_an_error_no_further_call_starts():
    begun = []

    def call(watch):
        begun.append(watch.label)
        time.sleep(0.05)
        raise CheckpointError("no")

    with pytest.raises(CheckpointError, match="no"):
        run_calls([(str(n), call) for n in range(50)])
    time.sleep(0.3)
    assert len(begun) < 30


def test_a_shorter_response_starts_a_new_window():
    def closed(size: int) -> SimpleNamespace:
        return SimpleNamespace(is_closed=True, status_code=200, num_bytes_downloaded=size)

    watch = Watch("x")
    watch.bar(lambda _: None, None)()
    for size in (500_000, 100):
        watch.request()
        watch.response(closed(size))
        for _ in range(int(hub_watch.XET_WINDOW)):
            watch.check(1)
    with pytest.raises(CheckpointError, match="received 0 B from the Hub in 120 s"):
        watch.check(1)
