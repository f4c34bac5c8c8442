"""Models from the Hub: converted as they arrive, pinned to one commit, whatever the network does.

Everything runs against a Hub on loopback (tests/helpers/loopback_hub.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from paroquant_stream import convert_checkpoint, load
from paroquant_stream.checkpoint.hub import PATTERNS, HubModel, locate
from paroquant_stream.checkpoint.model_files import hub_blob
from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.planning import survey
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import (
    CheckpointError,
    MalformedFileError,
    PlanError,
    SourceDamagedError,
)
from tests.helpers.builders import cut_apart, cut_evenly, llama_tensors, write_checkpoint

REPO = "owner/name"
COUNT = 6


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(tmp_path / "source", cut=cut_evenly(COUNT))


@pytest.fixture
def right(source, tmp_path) -> list[str]:
    """The digests of the entries when the same files are converted from a directory."""
    return digests(convert_checkpoint(source, cache_dir=tmp_path / "right"))


@pytest.fixture
def commit(hub, source) -> str:
    return hub.push(REPO, source)


@pytest.fixture
def impatient(monkeypatch):
    """The Hub's client waits a second before each of its retries; here it does not."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)


def digests(manifest) -> list[str]:
    return [record.digest for record in manifest.entries]


def names(count: int = COUNT) -> list[str]:
    return [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def command(*arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "paroquant_stream.convert", REPO, *arguments],
        env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def size_of(*roots: Path) -> int:
    files = [p for root in roots for p in root.rglob("*") if p.is_file() and not p.is_symlink()]
    return sum(path.stat().st_size for path in files if "safetensors" in path.name
               or path.parent.name == "blobs")  # fmt: skip


def test_a_directory_is_itself(tmp_path):
    assert locate(tmp_path) == (tmp_path, None)


@pytest.mark.parametrize("name", ["absent", "/absent/model", "./a/b", "a/b/c", "~/absent"])
def test_what_is_no_directory_and_no_repository_id_is_refused_without_asking_the_hub(name, hub):
    with pytest.raises(CheckpointError, match="neither a model directory nor a repository id"):
        locate(name)
    assert hub.log == []


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="neither"):
        locate(tmp_path / "file")


def test_a_directory_has_no_revision(tmp_path):
    with pytest.raises(CheckpointError, match="--revision is for the Hub"):
        locate(tmp_path, "main")


def test_neither_code_nor_pickles_nor_shards_are_fetched_with_the_small_files(hub, source):
    for name in ("modeling.py", "pytorch_model.bin", "weights.pt", "stray.safetensors"):
        (source / name).write_bytes(b"x")
    commit = hub.push(REPO, source)
    directory, remote = locate(REPO)
    assert remote == HubModel(REPO, commit)
    assert not any(pattern.endswith((".py", ".bin", ".pt")) for pattern in PATTERNS)
    assert sorted(path.name for path in directory.iterdir()) == sorted(
        ["config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]
    )


@pytest.mark.parametrize("jobs", [1, 2, 4])
@pytest.mark.usefixtures("commit")
def test_it_gives_the_entries_of_the_same_files_in_a_directory(hub, right, jobs):
    told = {}
    manifest = convert_checkpoint(
        REPO, jobs=jobs, progress=lambda shard, done, size: told.update({shard: (done, size)})
    )
    assert digests(manifest) == right
    assert sorted(hub.downloads()) == names()
    assert sorted(told) == names()
    assert all(done == size for done, size in told.values())
    before = len(hub.log)
    convert_checkpoint(REPO)
    assert not [what for _, what, _ in hub.log[before:] if what.endswith(".safetensors")]


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.usefixtures("commit")
def test_the_first_entry_is_published_before_the_last_shard_is_sent(hub, right, tmp_path, jobs):
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
def test_parts_in_other_shards_are_waited_for(hub, tmp_path):
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


@pytest.mark.usefixtures("commit")
def test_a_dry_run_reads_headers_alone(hub, monkeypatch):
    monkeypatch.setattr(
        "paroquant_stream.checkpoint.hub._FIRST_BYTES", 64
    )  # so that a second request is needed
    reports = survey(make_request(REPO))
    assert {report.why for report in reports} == {"not downloaded yet"}
    assert hub.downloads() == []
    assert hub.sent < sum(report.bytes_in for report in reports) / 2


def test_a_defect_of_the_plan_is_told_before_a_shard_is_downloaded(hub, tmp_path):
    tensors = llama_tensors()
    del tensors["model.layers.1.mlp.up_proj.scales"]
    hub.push(REPO, write_checkpoint(tmp_path / "bad", tensors, cut_evenly(COUNT)))
    with pytest.raises(PlanError, match="up_proj"):
        convert_checkpoint(REPO)
    assert hub.downloads() == []


def test_a_malformed_header_is_told_before_a_shard_is_downloaded(hub, source):
    path = source / names()[2]
    path.write_bytes(path.read_bytes()[:-4])
    hub.push(REPO, source)
    with pytest.raises(MalformedFileError, match=r"name/model-00003.*download it again"):
        convert_checkpoint(REPO)
    assert hub.downloads() == []


@pytest.mark.usefixtures("commit")
def test_a_branch_that_moves_meanwhile_never_mixes_two_revisions(hub, right, tmp_path):
    other = write_checkpoint(tmp_path / "other", llama_tensors(1), cut_evenly(COUNT))
    pushed = []

    def push_meanwhile(method, what):
        if what == names()[1] and not pushed:
            pushed.append(hub.push(REPO, other))

    hub.fault = push_meanwhile
    assert digests(convert_checkpoint(REPO)) == right
    assert pushed
    assert digests(convert_checkpoint(REPO)) == digests(
        convert_checkpoint(other, cache_dir=tmp_path / "cache-of-other")
    )


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, source, right, commit, tmp_path):
    other = write_checkpoint(tmp_path / "other", llama_tensors(1), cut_evenly(COUNT))
    hub.push(REPO, other)
    hub.repos[REPO]["v1"] = commit
    for revision in ("v1", commit):
        assert digests(convert_checkpoint(REPO, revision=revision)) == right
    assert digests(convert_checkpoint(REPO)) != right
    with pytest.raises(CheckpointError, match="Revision Not Found"):
        convert_checkpoint(REPO, revision="absent")


@pytest.mark.usefixtures("commit", "impatient")
def test_a_connection_that_is_cut_in_the_middle_of_a_shard_goes_on_where_it_was(
    hub, right, monkeypatch
):
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
def test_a_hub_that_goes_away_is_one_error_and_the_next_run_goes_on(hub, right, tmp_path):
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
def test_damaged_bytes_under_the_right_etag_are_told_and_not_stored(hub, right, tmp_path):
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
    with pytest.raises(SourceDamagedError):  # it is not believed the second time either
        convert_checkpoint(REPO)
    blob.unlink()
    assert digests(convert_checkpoint(REPO)) == right


def digests_in(cache: Path) -> set[str]:
    from paroquant_stream.files.hashing import hash_entry

    found = set()
    for path in cache.rglob("entries/*/*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        found.add(hash_entry(fd, path.name))
        os.close(fd)
    return found


@pytest.mark.parametrize(
    ("repo", "fault", "words"),
    [
        ("owner/absent", None, "Repository Not Found"),
        (REPO, "401", "401"),
        (REPO, "refuse", "cannot be downloaded from the Hub"),
    ],
)
@pytest.mark.usefixtures("commit", "impatient")
def test_a_repository_that_cannot_be_had_is_one_line(hub, repo, fault, words):
    hub.fault = lambda *_: fault
    with pytest.raises(CheckpointError, match=words) as error:
        convert_checkpoint(repo)
    assert "\n" not in str(error.value)
    assert repo in str(error.value)


@pytest.mark.usefixtures("commit")
def test_offline_what_is_there_is_enough_and_what_is_missing_is_named(
    hub, right, tmp_path, monkeypatch
):
    convert_checkpoint(REPO, cache_dir=tmp_path / "first")
    (make_request(REPO).source.directory / names()[4]).unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = len(hub.log)
    with pytest.raises(CheckpointError, match=f"not in the Hub's cache: {names()[4]}; ") as error:
        convert_checkpoint(REPO)
    assert "\n" not in str(error.value)
    assert len(hub.log) == before
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    convert_checkpoint(REPO, cache_dir=tmp_path / "second")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert digests(convert_checkpoint(REPO)) == right


@pytest.mark.usefixtures("commit")
def test_load_after_dropping_downloads_nothing_and_needs_no_network(hub, monkeypatch):
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
def test_with_drop_source_the_disk_never_holds_the_checkpoint_twice(hub, tmp_path, jobs):
    """At most the entries and a few sources at any request: with the sources it would be 24."""
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


def test_a_blob_of_another_revision_stays(hub, source, commit, tmp_path):
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
def test_a_dropped_shard_whose_entry_is_lost_is_downloaded_again(hub, right):
    manifest = convert_checkpoint(REPO, drop_source=True)
    request = make_request(REPO)
    request.store.entry_path(manifest.entries[2].key).unlink()
    before = len(hub.downloads())
    assert digests(convert_checkpoint(REPO)) == right
    assert set(hub.downloads()[before:]) >= {names()[2]}
    assert names()[5] not in hub.downloads()[before:]


@pytest.mark.usefixtures("commit")
def test_two_processes_at_once_convert_each_shard_once(right, tmp_path):
    running = [command("--json", "--jobs", "2", "--drop-source") for _ in range(2)]
    done = [finish(process) for process in running]
    assert [code for code, _, _ in done] == [0, 0], done
    shards = [shard for _, out, _ in done for shard in json.loads(out)["shards"]]
    assert [shard["action"] for shard in shards].count("converted") == COUNT
    assert digests_in(tmp_path / "user-cache") == set(right)


@pytest.mark.usefixtures("commit")
def test_the_command_shows_no_bar_of_the_hubs_client():
    for arguments in (["--quiet"], []):
        code, out, err = finish(command(*arguments, "--force"))
        assert code == 0
        assert err.count("\n") == err.count(" done: ") == (0 if arguments else COUNT)
        assert out.count("\n") == (0 if arguments else 1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.usefixtures("commit")
def test_a_signal_in_a_download_ends_the_run_soon_and_the_next_goes_on(
    hub, right, tmp_path, number, code
):
    held, release = [], threading.Event()

    def hold(method, what):
        if (method, what) == ("GET", names()[2]):
            held.append(what)
            release.wait(5)

    hub.fault = hold
    process = command("--jobs", "1")
    while not held or not list((tmp_path / "user-cache").rglob("entries/*/*.safetensors")):
        time.sleep(0.01)  # until it does nothing but wait; a signal inside `import mlx` is lost
        assert process.poll() is None
    process.send_signal(number)
    sent = time.monotonic()
    found, _, err = finish(process)
    release.set()
    assert (found, time.monotonic() - sent < 2.5) == (code, True), err
    assert "interrupted" in err
    assert "Traceback" not in err
    hub.fault = lambda *_: None
    assert digests(convert_checkpoint(REPO)) == right


@pytest.mark.parametrize("moment", [0, 2, 5])
@pytest.mark.usefixtures("commit")
def test_killed_in_a_download_the_next_run_goes_on(hub, right, moment):
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
