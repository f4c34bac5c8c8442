"""A Dask cluster on loopback converts shards, even if processes die or lack the package."""

from __future__ import annotations

import logging
import re
import shutil
import signal
import subprocess
import sys

import pytest

from paroquant_stream import convert_checkpoint
from paroquant_stream.cli.convert import main
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import WorkersLostError
from paroquant_stream.execution import dask, executors
from tests.helpers.builders import cut_apart, write_checkpoint
from tests.helpers.cache_files import entries, temps
from tests.helpers.loopback_cluster import LoopbackCluster

pytestmark = pytest.mark.slow  # each starts or kills processes of a cluster
ABSENT = "import sys; sys.modules['paroquant_stream'] = None"
OLDER = "import paroquant_stream; paroquant_stream.__version__ = '0.0.9'"
BLIND = """
import genericpath
real = genericpath.getsize
def getsize(path):
    if {unseen!r} in path:
        raise FileNotFoundError(2, "No such file or directory", path)
    return real(path)
genericpath.getsize = getsize
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with LoopbackCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def model(tmp_path):
    """Write six shards with parts of the same linears."""
    return write_checkpoint(tmp_path / "model", cut=cut_apart(6))


@pytest.fixture
def right(model, tmp_path) -> dict[str, bytes]:
    convert_checkpoint(model, cache_dir=tmp_path / "right", jobs=1)
    return entries(tmp_path / "right")


def arguments(cluster, model, cache, *more: str) -> list[str]:
    where = ["--cache-dir", str(cache), "--executor", "dask", "--scheduler", cluster.address]
    return [str(model), *where, "--quiet", *more]


def run(*given: str) -> tuple[int, str]:
    """Run the command in a new process; return its exit code and stderr."""
    command = [sys.executable, "-m", "paroquant_stream.convert", *given]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_a_cluster_writes_the_entries_that_threads_write(cluster, model, right, tmp_path):
    assert main(arguments(cluster, model, tmp_path / "cache")) == 0
    assert entries(tmp_path / "cache") == right
    assert len(right) == 6
    assert not temps(tmp_path / "cache")


def test_relative_paths_are_those_of_the_caller(cluster, model, right, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments(cluster, "model", "cache")) == 0
    assert entries(tmp_path / "cache") == right


def test_a_clients_executor_uses_every_worker(cluster, model, right, tmp_path):
    from distributed import Client

    with Client(cluster.address, set_as_default=False) as client:
        workers = client.get_executor(pure=False, retries=2)
        assert make_request(model, executor=workers).jobs == 2
        convert_checkpoint(model, cache_dir=tmp_path / "cache", executor=workers)
        ran = client.run(lambda dask_worker: dask_worker.state.executed_count)
    assert entries(tmp_path / "cache") == right
    assert len(ran) == 2
    assert all(ran.values())


def test_several_models_share_the_cluster(cluster, model, right, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    (other / "config.json").write_text((model / "config.json").read_text() + " ")
    assert main([str(other), *arguments(cluster, model, tmp_path / "cache")]) == 0
    assert entries(tmp_path / "cache") == right
    assert len(list((tmp_path / "cache").rglob("*.msgpack"))) == 2


def test_sources_are_dropped_by_the_caller(cluster, model, right, tmp_path):
    assert main(arguments(cluster, model, tmp_path / "cache", "--drop-source", "-y")) == 0
    assert entries(tmp_path / "cache") == right
    assert not list(model.glob("*.safetensors"))


def test_downloaded_shards_are_converted_on_the_cluster(cluster, model, right, tmp_path, hub):
    hub.push("owner/model", model)
    assert main(arguments(cluster, "owner/model", tmp_path / "cache", "--drop-source")) == 0
    assert entries(tmp_path / "cache") == right
    assert len(hub.downloads()) == 6
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


def test_the_unit_of_a_killed_worker_is_converted_by_another(cluster, model, right, tmp_path):
    cluster.arm()
    assert run(*arguments(cluster, model, tmp_path / "cache")) == (0, "")
    (pid,) = re.fullmatch(r"(\d+) \['.+'\]", cluster.fired()).groups()  # while it wrote
    dead = [process for process in cluster.processes if process.pid == int(pid)]
    assert dead[0].wait(60) == -9
    assert entries(tmp_path / "cache") == right
    assert not temps(tmp_path / "cache")
    cluster.add_worker()
    cluster.wait(2)


ARMED = """
import os, sys
from pathlib import Path
from paroquant_stream.cli import convert, common
Path(sys.argv.pop(1)).write_text(f"{os.getpid()} {sys.argv.pop(1)}")
common.end_with(convert.main)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_the_run_and_its_jobs_on_the_cluster(
    cluster, model, right, tmp_path, number, code
):
    armed, cache = str(cluster.directory / "armed"), tmp_path / "cache"
    (cluster.directory / "fired").unlink(missing_ok=True)
    command = [sys.executable, "-c", ARMED, armed, str(int(number))]
    done = subprocess.run(
        [*command, *arguments(cluster, model, cache)], capture_output=True, text=True
    )
    assert re.fullmatch(r"\d+ \['.+'\]", cluster.fired())
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert done.stderr.startswith("interrupted; finished shards are kept")
    assert main(arguments(cluster, model, cache)) == 0  # the workers are free again
    assert entries(cache) == right
    assert not temps(cache)


@pytest.mark.parametrize("name", ["distributed.client", "tornado.application"])
def test_what_dask_logs_of_cancelled_units_is_not_shown(cluster, caplog, name):
    """Now and then it waits for a unit just as that is cancelled."""
    with dask.cluster(cluster.address):
        logging.getLogger(name).error("Exception in callback")
    assert not caplog.records


def test_every_unfit_worker_is_named_before_any_work(cluster, model, tmp_path, capsys):
    cache = tmp_path / "cache"
    model_unseen = BLIND.format(unseen=str(model))
    store_unseen = BLIND.format(unseen=str(cache))
    unfit = [cluster.add_worker(p) for p in (ABSENT, OLDER, model_unseen, store_unseen)]
    cluster.wait(6)
    assert main(arguments(cluster, model, cache)) == 1
    for process in unfit:
        process.kill()
        process.wait()
    found = capsys.readouterr().err
    for reason in (
        "ModuleNotFoundError",
        r"__version__: expected 0\.1\.0, found 0\.0\.9",
        rf"{model}/config\.json: expected \d+ bytes, found FileNotFoundError",
        rf"{cache}/v1/tmp/\S+: expected 0 bytes, found FileNotFoundError",
    ):
        assert len(re.findall(rf"\n  tcp://127\.0\.0\.1:\d+: .*{reason}", found)) == 1, found
    assert found.count("tcp://") == 4
    assert not entries(cache)
    assert not temps(cache)


def test_a_scheduler_without_the_package_is_named(model, tmp_path_factory, tmp_path, capsys):
    with LoopbackCluster(tmp_path_factory.mktemp("foreign"), 1, ABSENT) as cluster:
        assert main(arguments(cluster, model, tmp_path / "cache")) == 1
    found = capsys.readouterr().err
    assert f"\n  the Dask scheduler ({cluster.address}): " in found
    assert found.count("ModuleNotFoundError") == 1


def test_a_closed_client_is_workers_lost(cluster, model, tmp_path):
    from distributed import Client

    with Client(cluster.address, set_as_default=False) as client:
        workers = client.get_executor(pure=False)
    for jobs in (None, 2):
        with pytest.raises(WorkersLostError, match="do not answer"):
            convert_checkpoint(model, cache_dir=tmp_path / "c", executor=workers, jobs=jobs)


HURRY = """
import sys
from paroquant_stream.cli import convert, common
from paroquant_stream.execution import dask
dask.CONNECT_TIMEOUT = 0.2
common.end_with(convert.main)
"""


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense://x"])
def test_an_absent_scheduler_is_one_message(model, address):
    command = [sys.executable, "-c", HURRY, str(model), "--executor", "dask", "--scheduler"]
    done = subprocess.run([*command, address], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {address}: no Dask scheduler answers")
    assert done.stderr.count("\n") == 1


def test_a_dead_scheduler_is_one_message_and_a_run_resumes(
    model, right, tmp_path_factory, tmp_path
):
    cache = tmp_path / "cache"
    with LoopbackCluster(tmp_path_factory.mktemp("dying"), workers=1) as cluster:
        cluster.arm(cluster.scheduler.pid)
        code, found = run(*arguments(cluster, model, cache))
        assert cluster.fired().startswith(f"{cluster.scheduler.pid} ['")  # while it wrote an entry
        assert cluster.scheduler.wait(60) == -9
    assert code == 1
    assert found.startswith(f"error: the Dask scheduler ({cluster.address}) or its workers failed")
    assert found.endswith("run again to resume\n")
    assert found.count("\n") == 1
    convert_checkpoint(model, cache_dir=cache)
    assert entries(cache) == right


def test_the_death_of_the_last_worker_is_one_message(
    model, tmp_path_factory, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(executors, "CONNECT_TIMEOUT", 0.5)
    with LoopbackCluster(tmp_path_factory.mktemp("lonely"), workers=1) as cluster:
        cluster.arm()
        assert main(arguments(cluster, model, tmp_path / "cache")) == 1
        assert cluster.fired()
    assert "its workers do not answer (" in capsys.readouterr().err


def test_a_cluster_without_workers_is_one_message(
    model, tmp_path_factory, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(executors, "CONNECT_TIMEOUT", 0.5)
    with LoopbackCluster(tmp_path_factory.mktemp("empty"), workers=0) as cluster:
        for more in ([], ["--jobs", "2"]):
            assert main(arguments(cluster, model, tmp_path / "cache", *more)) == 1
            assert "its workers do not answer (" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        ["--executor", "dask"],
        ["--scheduler", "tcp://x:1"],
        ["--executor", "process", "--scheduler", "tcp://x:1"],
    ],
)
def test_a_scheduler_goes_with_dask_and_dask_with_a_scheduler(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["model", *wrong])
    assert stop.value.code == 2
    assert "--executor dask and --scheduler ADDRESS go together" in capsys.readouterr().err


def test_without_distributed_the_extra_is_named(model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert main([str(model), "--executor", "dask", "--scheduler", "tcp://x:1"]) == 1
    assert "pip install distributed (the extra `dask`" in capsys.readouterr().err
