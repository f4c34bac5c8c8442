"""Tests of models from a Hub on loopback: names, headers, revisions, downloads and errors."""

from __future__ import annotations

import socket

import numpy as np
import pytest
from safetensors.numpy import save_file

from paroquant_stream import convert_checkpoint
from paroquant_stream.checkpoint.hub import PATTERNS, HubModel, _why_offline
from paroquant_stream.checkpoint.locate import locate
from paroquant_stream.checkpoint.shard import Shard
from paroquant_stream.conversion.planning import survey
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import (
    CheckpointError,
    MalformedFileError,
    PlanError,
)
from tests.helpers.builders import cut_evenly, llama_tensors, write_checkpoint
from tests.helpers.hub_models import COUNT, REPO, digests, names


@pytest.fixture
def unreachable(monkeypatch):
    """No host answers at the address of the Hub, and its client must not be asked."""
    with socket.socket() as taken:  # bound and not listening: refused
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", pytest.fail)
        yield


@pytest.mark.usefixtures("hub", "unreachable")
def test_a_mistyped_path_is_reported_without_a_retry():
    words = "models/x: no such directory; as a Hub id it cannot be reached: 127.0.0.1: Connection"
    with pytest.raises(CheckpointError, match=words):
        locate("models/x")


@pytest.mark.usefixtures("commit")
def test_without_a_network_the_hubs_cache_is_used_at_once(request):
    before = locate(REPO)
    request.getfixturevalue("unreachable")
    assert locate(REPO) == before


@pytest.mark.usefixtures("hub", "unreachable")
def test_behind_a_proxy_its_client_looks_for_the_host(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert _why_offline(None) is None


def test_offline_mode_is_named_as_the_cause(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set, so that nothing is"):
        locate("owner/absent")
    assert hub.log == []


def test_only_small_files_are_fetched_at_once(hub, source):
    for name in ("modeling.py", "pytorch_model.bin", "weights.pt", "stray.safetensors"):
        (source / name).write_bytes(b"x")
    commit = hub.push(REPO, source)
    directory, remote = locate(REPO)
    assert remote == HubModel(REPO, commit)
    assert not any(pattern.endswith((".py", ".bin", ".pt")) for pattern in PATTERNS)
    assert sorted(path.name for path in directory.iterdir()) == sorted(
        ["config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]
    )


@pytest.mark.usefixtures("commit")
def test_a_dry_run_reads_only_headers(hub, monkeypatch):
    monkeypatch.setattr(
        "paroquant_stream.checkpoint.hub._FIRST_BYTES", 64
    )  # so that a second request is needed
    reports = survey(make_request(REPO))
    assert {report.why for report in reports} == {"not downloaded yet"}
    assert hub.downloads() == []
    assert hub.sent < sum(report.bytes_in for report in reports) / 2


def test_a_defect_of_the_plan_precedes_all_downloads(hub, tmp_path):
    tensors = llama_tensors()
    del tensors["model.layers.1.mlp.up_proj.scales"]
    hub.push(REPO, write_checkpoint(tmp_path / "bad", tensors, cut_evenly(COUNT)))
    with pytest.raises(PlanError, match="up_proj"):
        convert_checkpoint(REPO)
    assert hub.downloads() == []


def test_a_malformed_header_precedes_all_downloads(hub, source):
    path = source / names()[2]
    path.write_bytes(path.read_bytes()[:-4])
    hub.push(REPO, source)
    with pytest.raises(MalformedFileError, match=r"name/model-00003.*download it again"):
        convert_checkpoint(REPO)
    assert hub.downloads() == []


@pytest.mark.usefixtures("commit")
def test_a_moving_branch_does_not_mix_two_revisions(hub, right, tmp_path):
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


@pytest.mark.parametrize(
    ("repo", "fault", "words"),
    [
        ("owner/absent", None, "Repository Not Found"),
        (REPO, "401", "401"),
        (REPO, "refuse", "cannot be downloaded from the Hub"),
    ],
)
@pytest.mark.usefixtures("commit", "impatient")
def test_an_unavailable_repository_is_a_one_line_error(hub, repo, fault, words):
    hub.fault = lambda *_: fault
    with pytest.raises(CheckpointError, match=words) as error:
        convert_checkpoint(repo)
    assert "\n" not in str(error.value)
    assert repo in str(error.value)


@pytest.mark.usefixtures("commit")
def test_offline_the_cache_is_used_and_absent_shards_named(hub, right, tmp_path, monkeypatch):
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


def header_requests(hub) -> list[str]:
    return [range_ for method, what, range_ in hub.log
            if method == "GET" and what.endswith(".safetensors") and range_]  # fmt: skip


def test_a_header_of_exactly_the_first_bytes_is_one_request(hub, source, commit, monkeypatch):
    name = names()[0]
    header = 8 + int.from_bytes((source / name).read_bytes()[:8], "little")
    # private: the size of the first request is not an option
    monkeypatch.setattr("paroquant_stream.checkpoint.hub._FIRST_BYTES", header)
    found = HubModel(REPO, commit).headers([name])
    assert found == {name: Shard(name, source / name).header()}
    assert header_requests(hub) == [f"bytes=0-{header - 1}"] * 2  # the redirect and the bytes


def test_a_server_without_ranges_does_not_send_a_whole_shard(hub, tmp_path):
    directory = write_checkpoint(tmp_path / "large")
    path = directory / "model.safetensors"
    save_file({"x": np.zeros(24 << 20, np.uint8)}, path)
    commit = hub.push("owner/large", directory)
    hub.fault = lambda *_: "no ranges"
    headers = HubModel("owner/large", commit).headers([path.name])
    assert headers == {path.name: Shard(path.name, path).header()}
    assert hub.sent < path.stat().st_size


def test_an_unavailable_header_names_the_first_shards(hub, commit):
    hub.fault = lambda _, what: "401" if what.startswith("header of") else None
    with pytest.raises(CheckpointError) as error:
        HubModel(REPO, commit).headers(names())
    assert f"not in the Hub's cache: {', '.join(names()[:3])} and 3 more; " in str(error.value)
    assert commit[:12] in str(error.value)
