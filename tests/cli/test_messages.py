"""What the commands say when something is wrong: one line that names it and what to do."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest

from paroquant_stream.cli.main import main
from paroquant_stream.store.store import Store
from tests.helpers.builders import cut_evenly, llama_tensors, write_checkpoint

SEE = "; see `paroquant-stream {} --help`"
TABLE = [
    # the command line
    ("nonsense", 2, "no command 'nonsense'; see `paroquant-stream --help`"),
    ("conver m", 2, "no command 'conver'; did you mean convert? See `paroquant-stream --help`"),
    ("convert", 2, "the following arguments are required: MODEL" + SEE.format("convert")),
    ("convert m --jobs 0", 2, "argument --jobs: must be a whole number from 1 to 9999"
     + SEE.format("convert")),
    ("convert m --dryrun", 2,
     "no option '--dryrun'; did you mean --dry-run? See `paroquant-stream convert --help`"),
    ("convert m --zzz=1", 2, "no option '--zzz'" + SEE.format("convert")),
    ("convert m --force m2", 2, "unexpected word 'm2'; options stand before or after the names"
     + SEE.format("convert")),
    ("convert m --dtype float17", 2,
     "argument --dtype: 'float17' is none of source, float16, bfloat16; did you mean float16? "
     "See `paroquant-stream convert --help`"),
    ("convert m -y", 2, "-y answers the question of --drop-source, which is not given"
     + SEE.format("convert")),
    ("convert m --dry-run --trace t", 2, "--dry-run converts nothing that --trace could show"
     + SEE.format("convert")),
    ("cache", 2, "the following arguments are required: COMMAND" + SEE.format("cache")),
    ("cache lst", 2,
     "argument COMMAND: 'lst' is none of ls, size, path, rm, prune, verify; did you mean ls? "
     "See `paroquant-stream cache --help`"),
    ("cache ls --jsn", 2,
     "no option '--jsn'; did you mean --json? See `paroquant-stream cache ls --help`"),
    ("export m", 2, "OUT is needed, unless --single-file writes into the model directory"
     + SEE.format("export")),
    ("export m out --shard-size 0B", 2, "argument --shard-size: a file holds at least one byte"
     + SEE.format("export")),
    ("export m --single-file --shard-size 1GB", 2,
     "--single-file writes one file, whatever --shard-size says" + SEE.format("export")),
    ("run", 2, "which program? -m MODULE or SCRIPT" + SEE.format("run")),
    # the model
    ("convert bad", 1, "bad/config.json: not valid JSON: Expecting property name enclosed in "
     "double quotes: line 1 column 2 (char 1)"),
    ("convert plain", 1, "plain/config.json: neither quantization_config nor paroquant_config; "
     "not a ParoQuant model"),
    ("convert torn", 1, "torn: 1 defect, nothing was converted:\n"
     "  model.layers.0.mlp.up_proj.pairs: missing; the other parts lie in model.safetensors"),
    ("convert bad plain", 1, "2 of 2 models were not converted:\n"
     "  bad/config.json: not valid JSON: Expecting property name enclosed in double quotes: "
     "line 1 column 2 (char 1)\n"
     "  plain/config.json: neither quantization_config nor paroquant_config; not a ParoQuant "
     "model"),
    ("convert nope", 1, "nope: neither a model directory nor a repository id like owner/name"),
    ("convert owner/name", 1, "owner/name: no such directory; as a Hub id it is not in the Hub's "
     "cache, and HF_HUB_OFFLINE is set, so that nothing is downloaded"),
    ("export hf.co/owner/name out", 1, "hf.co/owner/name: no such directory; as a Hub id it is "
     "not in the Hub's cache, and HF_HUB_OFFLINE is set, so that nothing is downloaded"),
    ("cache verify owner/name", 1, "owner/name: not converted in CACHE; `cache ls` lists what is"),
    ("convert ''", 1, "the name of the model is empty; give a directory or a repository id"),
    ("cache rm '' -y", 1, "the name of the model is empty; `cache ls` lists the names"),
    ("cache verify ''", 1, "the name of the model is empty; `cache ls` lists the names"),
    # places
    ("convert m --cache-dir ''", 2, "argument --cache-dir: the name of a directory is empty"
     + SEE.format("convert")),
    ("cache verify --cache-dir m", 1, "m: there is no cache here; see --cache-dir"),
    ("cache ls --cache-dir no", 1, "no: there is no cache here; see --cache-dir"),
    ("cache ls m", 1, "m: not converted in CACHE; `cache ls` lists what is"),
    ("export m no/out", 1, "HERE/no/out: there is no directory HERE/no; make it first"),
    ("run no.py", 1, "no.py: No such file or directory"),
    ("convert m --trace no/t.json", 1, "no/t.json: the trace cannot be written: No such file or "
     "directory; name another file"),
    ("cache rm m", 1, "m: not converted in CACHE; `cache ls` lists what is"),
]  # fmt: skip
"""Command, exit code and stderr without its `error: `."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A directory with a good model and three that cannot be converted."""
    folder = tmp_path_factory.mktemp("models")
    write_checkpoint(folder / "m", cut=cut_evenly(3))
    for name, text in (("bad", "{"), ("plain", '{"model_type": "llama"}')):
        shutil.copytree(folder / "m", folder / name)
        (folder / name / "config.json").write_text(text)
    tensors = llama_tensors()
    del tensors["model.layers.0.mlp.up_proj.pairs"]
    write_checkpoint(folder / "torn", tensors)
    return folder


@pytest.fixture
def run(models, monkeypatch, capsys):
    """Run a command in the directory of the models; returns exit code, stdout and stderr."""
    monkeypatch.chdir(models)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(command: str) -> tuple[int, str, str]:
        try:
            code = main(shlex.split(command))
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        err = err.replace(os.environ["PAROQUANT_STREAM_CACHE"], "CACHE")
        return code, out, err.replace(str(models), "HERE")

    return run


@pytest.mark.parametrize(("command", "code", "message"), TABLE, ids=[row[0] for row in TABLE])
def test_a_command_says_what_is_wrong(run, command, code, message):
    assert run(command) == (code, "", f"error: {message}\n")


def test_a_failure_in_json_is_an_object_too(run):
    code, out, err = run("convert bad --json")
    found = json.loads(out)
    assert code == 1
    assert (found["model"], found["error"]) == ("bad", "MalformedFileError")
    assert err == f"error: {found['message']}\n"


def test_a_dry_run_of_a_bad_model_is_an_object_too(run):
    code, out, _ = run("convert plain --dry-run --json")
    assert (code, json.loads(out)["error"]) == (1, "LayoutError")


@pytest.mark.parametrize("form", ["", " --json"])
def test_a_dry_run_without_space_fails(run, monkeypatch, form):
    monkeypatch.setattr(Store, "free_bytes", lambda _: 1000)
    code, out, err = run(f"convert m --dry-run{form}")
    assert code == 1
    assert "never converted" in out
    assert err.startswith("error: CACHE: ")
    assert err.endswith("kB needed for 3 shards, 1.0 kB free; free some space or choose another "
                        "--cache-dir\n")  # fmt: skip


def test_a_dry_run_shows_which_shards_would_be_removed(run, models):
    sizes = {path.name: path.stat().st_size for path in (models / "m").glob("*.safetensors")}
    code, out, _ = run("convert m --drop-source --dry-run")
    assert code == 0
    removed = [line.split()[1] for line in out.splitlines() if line.startswith("remove ")]
    assert removed == sorted(sizes)
    assert out.splitlines()[-1].startswith("3 shards to remove once converted: ")
    found = json.loads(run("convert m --drop-source --dry-run --json")[1])
    assert found["shards_to_remove"] == sorted(sizes)
    assert found["bytes_to_remove"] == sum(sizes.values())
    assert json.loads(run("convert m --dry-run --json")[1])["bytes_to_remove"] == 0


def test_a_trace_that_cannot_be_written_is_reported_before_work(run, tmp_path):
    assert run("convert m --trace no/t.json")[0] == 1
    assert not (tmp_path / "user-cache").exists()


def test_the_summary_ends_with_what_to_do_next(run, tmp_path):
    code, out, _ = run("convert m --cache-dir user-cache --dtype float16")
    assert code == 0
    assert "load it with paroquant_stream.load('m', cache_dir='user-cache', dtype='float16')" in out
    assert "; --drop-source would free " in out
    assert ".msgpack" not in out


def test_the_summary_offers_no_removal_of_what_is_gone(run, models, tmp_path):
    shutil.copytree(models / "m", tmp_path / "own")
    code, out, _ = run(f"convert {tmp_path}/own --drop-source -y")
    assert (code, "--drop-source" in out) == (0, False)


@pytest.fixture
def hollow(models, tmp_path, run) -> Path:
    """A model whose shards were removed in favour of the conversion in its directory."""
    shutil.copytree(models / "m", tmp_path / "hollow")
    assert run(f"convert {tmp_path}/hollow --in-place --drop-source -y")[0] == 0
    return tmp_path / "hollow"


def test_what_lies_inside_the_model_is_used(run, hollow, tmp_path):
    code, out, err = run(f"convert {hollow}")
    assert (code, err) == (0, "")
    assert out.startswith(f"{hollow}: its shards are gone, {hollow}/mlx holds its conversion; load")
    code, out, _ = run(f"convert {hollow} --dry-run")
    assert (code, out.count("  converted inside the model directory\n")) == (0, 3)
    assert not (tmp_path / "user-cache").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--force", "; load uses that, nothing else can be made of it"),
        ("--drop-source -y", "; load uses that, nothing else can be made of it"),
        ("--dtype float16", " with --dtype source (in Python dtype='source') alone; pass that"),
        (
            "--dry-run --dtype float16",
            " with --dtype source (in Python dtype='source') alone; pass that",
        ),
    ],
)
def test_what_cannot_be_made_of_it_says_what_there_is(run, hollow, option, message):
    held = f"{hollow}: its shards are gone, and {hollow}/mlx holds what they were converted to"
    assert run(f"convert {hollow} {option}") == (1, "", f"error: {held}{message}\n")


def test_a_conversion_that_does_not_fit_explains_nothing(run, hollow):
    (hollow / "config.json").write_text((hollow / "config.json").read_text() + "\n")
    code, _, err = run(f"convert {hollow}")
    assert code == 1
    assert "the index names absent shards" in err
