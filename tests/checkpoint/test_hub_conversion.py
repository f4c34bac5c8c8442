"""Tests of conversions from a Hub on loopback: prefetching, network faults, signals."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from paroquant_stream import convert_checkpoint, load
from paroquant_stream.checkpoint.model_files import hub_blob
from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import (
    CheckpointError,
    SourceDamagedError,
)
from tests.helpers.builders import cut_apart, cut_evenly, llama_tensors, write_checkpoint
from tests.helpers.hub_models import COUNT, REPO, digests, digests_in, names, size_of

pytestmark = pytest.mark.slow  # each downloads in processes that are cut or killed


def command(*arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "paroquant_stream.convert", REPO, *arguments],
        env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("jobs", [1, 2, 4])
@pytest.mark.usefixtures("commit")
def test_entries_equal_those_of_a_local_directory(hub, right, jobs):
    seen = {}
    manifest = convert_checkpoint(
        REPO, jobs=jobs, progress=lambda shard, done, size: seen.update({shard: (done, size)})
    )
    assert digests(manifest) == right
    assert sorted(hub.downloads()) == names()
    assert sorted(seen) == names()
    assert all(done == size for done, size in seen.values())
    before = len(hub.log)
    convert_checkpoint(REPO)
    assert not [what for _, what, _ in hub.log[before:] if what.endswith(".safetensors")]


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.usefixtures("commit")
def test_entries_are_published_while_shards_download(hub, right, tmp_path, jobs):
    waited = []

    def hold_the_last(method, what):
        if (method, what) == ("GET", names()[-1]):
            until = time.monotonic() + 20
            while not (found := list((tmp_path / "user-cache").rglob("entries/*/*.safetensors"))):
                assert time.monotonic() < until, "no entry before the last shard"
                time.sleep(0.01)
            waited.append(len(found))

    hub.fault = hold_the_last
    assert digests(convert_checkpoint(REPO, jobs=jobs)) == right
    assert waited


@pytest.mark.usefixtures("commit")
def test_borrowed_shards_are_waited_for(hub, tmp_path):
    directory = write_checkpoint(tmp_path / "apart", cut=cut_apart(4))
    hub.push("owner/apart", directory)
    right = digests(convert_checkpoint(directory, cache_dir=tmp_path / "right"))
    for jobs in (1, 3):
        manifest = convert_checkpoint("owner/apart", cache_dir=tmp_path / str(jobs), jobs=jobs)
        assert digests(manifest) == right


@pytest.mark.usefixtures("commit")
def test_a_single_file_without_an_index_works(hub, tmp_path):
    directory = write_checkpoint(tmp_path / "single")
    hub.push("owner/single", directory)
    right = digests(convert_checkpoint(directory, cache_dir=tmp_path / "right"))
    assert digests(convert_checkpoint("owner/single", drop_source=True)) == right
    assert digests(convert_checkpoint("owner/single")) == right


@pytest.mark.usefixtures("commit", "impatient")
def test_an_interrupted_download_resumes(hub, right, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)  # else 10 MB
    cuts = []

    def cut_once(method, what):
        if (method, what) != ("GET", names()[3]) or cuts:
            return None
        cuts.append(what)
        return "cut"

    hub.fault = cut_once
    assert digests(convert_checkpoint(REPO)) == right
    assert cuts
    assert any(range_ and not range_.startswith("bytes=0-") for _, _, range_ in hub.log)


@pytest.mark.usefixtures("commit", "impatient")
def test_after_a_network_error_the_next_run_resumes(hub, right, tmp_path):
    gone = []

    def go_away(method, what):
        if what != names()[3]:
            return None
        gone.append(what)
        return "refuse"

    hub.fault = go_away
    with pytest.raises(CheckpointError, match=f"{names()[3]} cannot be downloaded from the Hub"):
        convert_checkpoint(REPO, jobs=1)
    assert gone
    kept = len(list((tmp_path / "user-cache").rglob("entries/*/*.safetensors")))
    assert kept >= 1
    assert not list((tmp_path / "hf").rglob("*.incomplete"))
    hub.fault = lambda *_: None
    result = convert(make_request(REPO, jobs=1))
    assert digests(result.manifest) == right
    assert [report.action for report in result.shards].count("reused") == kept


@pytest.mark.usefixtures("commit")
def test_damaged_downloads_are_reported_and_not_stored(hub, right, tmp_path):
    hub.fault = lambda method, what: "corrupt" if what == names()[2] else None
    with pytest.raises(SourceDamagedError, match="as the Hub names it, found") as error:
        convert_checkpoint(REPO)
    request = make_request(REPO)
    blob = hub_blob(request.source.directory / names()[2])
    found = hashlib.sha256(blob.read_bytes()).hexdigest()
    for part in (names()[2], blob.name, found, f"remove {blob} and run again"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert digests_in(tmp_path / "user-cache") <= set(right)
    hub.fault = lambda *_: None
    with pytest.raises(SourceDamagedError):  # it is not trusted the second time either
        convert_checkpoint(REPO)
    blob.unlink()
    assert digests(convert_checkpoint(REPO)) == right


@pytest.mark.usefixtures("commit")
def test_a_dropped_model_loads_without_a_network(hub, monkeypatch):
    load(REPO)
    assert hub.downloads()
    convert_checkpoint(REPO, drop_source=True)
    before = len(hub.downloads())
    model, _, _ = load(REPO)
    assert len(hub.downloads()) == before
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    load(REPO)
    assert model.model.layers


@pytest.mark.parametrize("jobs", [1, 2])
def test_dropping_bounds_the_disk_space(hub, tmp_path, jobs):
    """At any request at most a few of the 24 shards exist."""
    source = write_checkpoint(tmp_path / "source", cut=cut_evenly(24))
    hub.push(REPO, source)
    roots, most = (tmp_path / "hf", tmp_path / "user-cache"), []

    def measure(method, what):
        blobs = list((tmp_path / "hf").rglob("blobs/*"))
        most.append(sum(len(blob.name.partition(".")[0]) == 64 for blob in blobs))

    hub.fault = measure
    manifest = convert_checkpoint(REPO, jobs=jobs, drop_source=True)
    assert max(most) <= 6
    assert len(most) > 24
    entries = sum(record.size for record in manifest.entries)
    small = 5 * max(record.source_size for record in manifest.entries)
    assert size_of(*roots) <= entries + small
    assert not any(len(blob.name) == 64 for blob in (tmp_path / "hf").rglob("blobs/*"))


def test_a_blob_of_another_revision_is_kept(hub, source, commit, tmp_path):
    convert_checkpoint(REPO)
    tensors = llama_tensors()
    tensors["lm_head.weight"] += 1
    newer = write_checkpoint(tmp_path / "newer", tensors, cut_evenly(COUNT))
    hub.push(REPO, newer)
    convert_checkpoint(REPO, drop_source=True)
    (tmp_path / "check").mkdir()
    directory = make_request(REPO, revision=commit).source.directory
    for name in names():
        assert (directory / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.usefixtures("commit")
def test_a_lost_entry_is_downloaded_again(hub, right):
    manifest = convert_checkpoint(REPO, drop_source=True)
    request = make_request(REPO)
    request.store.entry_path(manifest.entries[2].key).unlink()
    before = len(hub.downloads())
    assert digests(convert_checkpoint(REPO)) == right
    assert set(hub.downloads()[before:]) >= {names()[2]}
    assert names()[5] not in hub.downloads()[before:]


@pytest.mark.usefixtures("commit")
def test_two_processes_convert_each_shard_once(right, tmp_path):
    running = [command("--json", "--jobs", "2", "--drop-source") for _ in range(2)]
    done = [finish(process) for process in running]
    assert [code for code, _, _ in done] == [0, 0], done
    shards = [shard for _, out, _ in done for shard in json.loads(out)["shards"]]
    assert [shard["action"] for shard in shards].count("converted") == COUNT
    assert digests_in(tmp_path / "user-cache") == set(right)


@pytest.mark.usefixtures("commit")
def test_the_hub_clients_progress_bar_is_hidden():
    for arguments in (["--quiet"], []):
        code, out, err = finish(command(*arguments, "--force"))
        assert code == 0
        assert err.count("\n") == err.count(" done: ") == (0 if arguments else COUNT)
        assert out.count("\n") == (0 if arguments else 1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.usefixtures("commit")
def test_a_signal_during_a_download_ends_the_run(hub, right, tmp_path, number, code):
    held, release = [], threading.Event()

    def hold(method, what):
        if (method, what) == ("GET", names()[2]):
            held.append(what)
            release.wait(60)

    hub.fault = hold
    process = command("--jobs", "1")
    while not held or not list((tmp_path / "user-cache").rglob("entries/*/*.safetensors")):
        time.sleep(0.01)  # until it only waits: a signal during `import mlx` is lost
        assert process.poll() is None
    process.send_signal(number)
    found, _, err = finish(process)  # the server still delays the shard
    release.set()
    assert found == code, err
    assert "interrupted" in err
    assert "Traceback" not in err
    hub.fault = lambda *_: None
    assert digests(convert_checkpoint(REPO)) == right


@pytest.mark.parametrize("moment", [0, 5])
@pytest.mark.usefixtures("commit")
def test_after_a_kill_the_next_run_resumes(hub, right, moment):
    killed = []

    def kill(method, what):
        if (method, what) == ("GET", names()[moment]) and not killed:
            killed.append(what)
            process.send_signal(signal.SIGKILL)

    hub.fault = kill
    process = command("--drop-source", "--jobs", "1")
    assert finish(process)[0] == -signal.SIGKILL
    assert killed
    assert digests(convert_checkpoint(REPO, drop_source=True)) == right
