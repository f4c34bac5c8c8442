"""Untrusted files: refused in one line, never executed, their sizes and hashes never trusted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as second_opinion

from paroquant_stream import convert_checkpoint, load
from paroquant_stream.api.export import export_model
from paroquant_stream.cli.convert import main
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import CheckpointError, EntryDamagedError, MalformedFileError
from paroquant_stream.exports.single_file_writer import export_single_file
from paroquant_stream.files.descriptor import open_regular
from paroquant_stream.files.tensor_header import TensorSpec, read_header
from paroquant_stream.model.entries import read_weights
from paroquant_stream.store.manifest import EntryRecord, Manifest
from paroquant_stream.store.store import Store
from tests.helpers.builders import cut_evenly, write_checkpoint
from tests.helpers.tensor_files import REFUSED, file_of, tensor

VALID = {
    "__metadata__": {"format": "pt"},
    "a.weight": tensor("F16", (2, 3), (0, 12)),
    "b.0.bias": tensor("U32", (2,), (12, 20)),
    "c": tensor("BF16", (), (20, 22)),
}
DATA = bytes(range(22))

odd = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=5),
    st.lists(st.integers(-3, 2**33), max_size=4),
    st.sampled_from(["F16", "U8", "F64", "F8_E4M3", "__metadata__", "a.weight", "a..b", "x" * 300]),
)


@st.composite
def mutated(draw) -> bytes:
    """The header's JSON with one to three values, keys or bytes of it replaced."""
    header = json.loads(json.dumps(VALID))
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(header)))
        match draw(st.sampled_from(["value", "field", "number", "rename", "drop", "add"])):
            case "value":
                header[name] = draw(odd)
            case "field" if isinstance(header[name], dict):
                header[name][draw(st.sampled_from(["dtype", "shape", "data_offsets", "x"]))] = draw(
                    odd
                )
            case "number" if isinstance(header[name], dict):
                field = header[name].get(draw(st.sampled_from(["shape", "data_offsets"])))
                if isinstance(field, list) and field:
                    field[draw(st.integers(0, len(field) - 1))] = draw(st.integers(-1, 40))
            case "rename":
                header[draw(st.text("ab.0_-é/ ", max_size=6))] = header.pop(name)
            case "drop":
                header.pop(name)
            case _:
                header[draw(st.text("xyz.", max_size=4))] = draw(odd)
        if not header:
            break
    text = bytearray(json.dumps(header).encode())
    for _ in range(draw(st.integers(0, 2))):
        text[draw(st.integers(0, len(text) - 1))] = draw(st.integers(0, 255))
    return bytes(text) + b" " * draw(st.integers(0, 8))


def compare(path: Path, text: bytes) -> bool:
    """Whether a header is accepted; if it is, safetensors must accept it and see the same."""
    file_of(path, text, DATA)
    fd = open_regular(path)
    try:
        header = read_header(fd, "x")
    except MalformedFileError:
        return False
    finally:
        os.close(fd)
    data = path.read_bytes()
    if any(found.dtype == "BF16" for found in header.tensors):  # numpy has none
        data = data.replace(b'"BF16"', b'"F16" ')
    arrays = second_opinion(data)
    assert arrays.keys() == {found.name for found in header.tensors}
    for found in header.tensors:
        assert arrays[found.name].shape == found.shape
        assert arrays[found.name].tobytes() == data[found.start : found.stop]
    return True


def differential(path: Path, examples: int) -> tuple[int, int]:
    """Headers made up, and how many of them were accepted."""
    counts = [0, 0]

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(mutated())
    def check(text: bytes) -> None:
        counts[0] += 1
        counts[1] += compare(path, text)

    check()
    return counts[0], counts[1]


@pytest.mark.parametrize(
    "examples",
    [300, pytest.param(200_000, marks=[pytest.mark.long, pytest.mark.timeout(3600)])],
)
def test_what_is_accepted_safetensors_accepts_too(tmp_path, examples):
    made, accepted = differential(tmp_path / "x", examples)
    assert made >= examples
    assert 5 < accepted < made / 2


@pytest.mark.parametrize("case", REFUSED)
def test_a_malformed_shard_is_one_message_and_nothing_is_written(case, tmp_path, capsys):
    directory = write_checkpoint(tmp_path / "m", cut=cut_evenly(3))
    shard = directory / "model-00002-of-00003.safetensors"
    header, data = REFUSED[case]
    shard.write_bytes(b"") if case == "empty file" else file_of(shard, header, data)
    assert main([str(directory), "--cache-dir", str(tmp_path / "cache")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert shard.name in err
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("case", sorted(REFUSED.keys() - {"empty file"}))
def test_a_malformed_entry_is_never_loaded(case, tmp_path):
    """Whoever writes both still cannot hand MLX a header that is not canonical."""
    store = Store(tmp_path / "cache")
    store.create()
    path = store.entry_path("d" * 64)
    path.parent.mkdir()
    file_of(path, *REFUSED[case])
    digest = xxhash.xxh3_128_hexdigest(path.read_bytes())
    specs = (TensorSpec("a", "F32", (2,)),)
    record = EntryRecord(
        "s", "a" * 64, 1, (), "c" * 64, "d" * 64, digest, path.stat().st_size, specs
    )
    manifest = Manifest("m", "f" * 64, "t", "AUTOAWQ", 4, 32, (record,))
    with pytest.raises(EntryDamagedError):
        read_weights(manifest, store, lambda _: True)
    assert not path.exists()


def test_entries_under_each_others_names_are_made_again(tmp_path):
    directory = write_checkpoint(tmp_path / "m", cut=cut_evenly(3))
    manifest = convert_checkpoint(directory, cache_dir=tmp_path / "cache")
    store = Store(tmp_path / "cache")
    one, two = (store.entry_path(record.key) for record in manifest.entries[:2])
    right = one.read_bytes(), two.read_bytes()
    one.rename(tmp_path / "x")
    two.rename(one)
    (tmp_path / "x").rename(two)
    load(directory, cache_dir=tmp_path / "cache")
    assert (one.read_bytes(), two.read_bytes()) == right


BOMBS = """
import os, resource, sys, time
from paroquant_stream.errors import MalformedFileError
from paroquant_stream.files.descriptor import open_regular
from paroquant_stream.files.tensor_header import read_header
from paroquant_stream.cli.convert import peak_rss_bytes
before, started = peak_rss_bytes(), time.monotonic()
try:
    read_header(open_regular(sys.argv[1]), "bomb")
    print("accepted")
except MalformedFileError:
    print(peak_rss_bytes() - before < 200_000_000, time.monotonic() - started < 5)
"""


def many_tensors(path: Path, count: int) -> None:
    entries = (f'"t{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(count))
    file_of(path, b"{" + ",".join(entries).encode() + b"}", b"")


def sparse(path: Path, header_length: int, size: int) -> None:
    with path.open("wb") as file:
        file.write(header_length.to_bytes(8, "little") + b'{"a":')
        file.truncate(size)


def aliases(path: Path) -> None:
    file_of(
        path, {f"t{i}": tensor("U8", (1 << 20,), (0, 1 << 20)) for i in range(1000)}, bytes(1 << 20)
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda path: sparse(path, 99_000_000, 200_000_000),
        lambda path: sparse(path, 1000, 1 << 40),
        lambda path: many_tensors(path, 400_000),
        aliases,
    ],
    ids=["header of 99 MB", "sparse terabyte", "400,000 tensors", "1,000 names on one range"],
)
def test_a_bomb_is_refused_before_it_takes_memory_or_time(make, tmp_path):
    make(tmp_path / "bomb")
    command = [sys.executable, "-c", BOMBS, str(tmp_path / "bomb")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n"


AUDIT = """
import os, sys
model, cache, allowed = sys.argv[1:4]
from paroquant_stream import load
import mlx_lm, transformers, mlx_lm.models.llama
opened = []
def watch(event, arguments):
    if event in ("pickle.find_class", "os.system", "subprocess.Popen", "socket.connect", "os.exec"):
        raise RuntimeError(f"{event} {arguments}")
    if event == "import" and str(arguments[1]).startswith(model):
        raise RuntimeError(f"{event} {arguments}")
    if event == "compile" and str(arguments[1]).startswith(model):
        raise RuntimeError(f"{event} {arguments}")
    if event == "open" and isinstance(arguments[0], str):
        opened.append(arguments[0])
sys.addaudithook(watch)
model_, tokenizer, _ = load(model, cache_dir=cache)
touched = [n for n in opened if n.startswith(model) and n.endswith((".bin", ".py"))]
print(type(model_).__module__, bool(touched))
"""


def test_nothing_of_a_hostile_directory_is_executed_or_unpickled(tmp_path):
    directory = write_checkpoint(tmp_path / "m")
    marker = tmp_path / "ran"
    evil = f"open({str(marker)!r}, 'w').close()\n"
    for name in ("evil.py", "modeling_evil.py", "tokenization_evil.py", "__init__.py"):
        (directory / name).write_text(evil)
    (directory / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    classes = {
        "AutoConfig": "evil.Config",
        "AutoTokenizer": ["tokenization_evil.T", None],
        "AutoModel": "modeling_evil.M",
    }
    for name in ("config.json", "tokenizer_config.json"):
        settings_ = json.loads((directory / name).read_text())
        settings_ |= {"auto_map": classes, "model_file": "evil.py"}
        (directory / name).write_text(json.dumps(settings_))
    command = [sys.executable, "-c", AUDIT, str(directory), str(tmp_path / "cache"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert not marker.exists()
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "mlx_lm.models.llama False\n"


OPENED = """
import sys
from paroquant_stream.cli import convert
opened = []
sys.addaudithook(lambda event, a: opened.append(str(a[0])) if event == "open" else None)
code = convert.main(sys.argv[2:])
print(code, [name for name in opened if name.endswith("outside.safetensors")])
"""


@pytest.mark.parametrize("name", ["../outside.safetensors", "{tmp}/outside.safetensors"])
def test_a_shard_outside_of_the_directory_is_never_opened(name, tmp_path):
    directory = write_checkpoint(tmp_path / "m", cut=cut_evenly(3))
    (tmp_path / "outside.safetensors").write_bytes(b"secret")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = name.format(tmp=tmp_path)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    command = [
        sys.executable,
        "-c",
        OPENED,
        "x",
        str(directory),
        "--cache-dir",
        str(tmp_path / "c"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "1 []\n"


@pytest.mark.parametrize(
    "name",
    [
        "with space",
        "new\nline",
        "[a]*?",
        "\x1b[31mred",
        "ü" * 60,
        b"bad\xff".decode("utf-8", "surrogateescape"),
    ],
)
def test_a_directory_of_any_name_works_and_is_escaped(name, tmp_path, capsysbinary):
    directory = write_checkpoint(tmp_path / name)
    assert main([str(directory), "--cache-dir", str(tmp_path / "cache")]) == 0
    out = capsysbinary.readouterr().out
    assert b"\x1b" not in out
    assert out.count(b"\n") == 1
    started = time.monotonic()
    assert main([str(directory / "absent"), "--cache-dir", str(tmp_path / "cache")]) == 1
    err = capsysbinary.readouterr().err
    assert b"\x1b" not in err
    assert time.monotonic() - started < 1


OPENED_BY_NAME = [
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "additional_chat_templates/x.jinja", "notes",
]  # fmt: skip
"""What mlx-lm, mlx-vlm and transformers open in a model, and a name that none opens."""


def loadable(form: str, directory: Path, tmp_path: Path):
    """A model directory in one of its forms, as `load` takes it, and where its files lie."""
    if form == "export":
        export_model(directory, tmp_path / "out")
        return tmp_path / "out"
    if form == "single file":
        export_single_file(make_request(directory), beside_shards=True)
        for shard in directory.glob("model-*.safetensors"):
            shard.unlink()
    return directory


@pytest.mark.parametrize("form", ["directory", "export", "single file"])
@pytest.mark.parametrize("force_text", [False, True])
def test_a_pipe_in_place_of_any_file_does_not_hold_a_load(tmp_path, form, force_text):
    directory = loadable(form, write_checkpoint(tmp_path / "m", cut=cut_evenly(2)), tmp_path)
    (directory / "additional_chat_templates").mkdir(exist_ok=True)
    for name in OPENED_BY_NAME:
        path = directory / name
        before = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        with pytest.raises(MalformedFileError, match=f"{name}: expected a regular file, found a "):
            load(directory, force_text=force_text, cache_dir=tmp_path / "cache")
        path.unlink()
        if before is not None:
            path.write_bytes(before)
    assert not (tmp_path / "cache").exists()  # refused before any work


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.timeout(20)
def test_a_pipe_as_config_or_index_does_not_block_a_conversion(tmp_path, name):
    directory = write_checkpoint(tmp_path / "m", cut=cut_evenly(2))
    (directory / name).unlink()
    os.mkfifo(directory / name)
    with pytest.raises(MalformedFileError, match=f"{name}: expected a regular file"):
        convert_checkpoint(directory)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
@pytest.mark.timeout(20)
def test_a_pipe_in_a_hub_snapshot_does_not_block_a_load(hub, tmp_path, name):
    hub.push("owner/name", write_checkpoint(tmp_path / "m", cut=cut_evenly(2)))
    directory = make_request("owner/name").source.directory
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    with pytest.raises(MalformedFileError, match=f"{name}: expected a regular file, found a pipe"):
        load("owner/name")


@pytest.mark.parametrize("name", ["tokenizer.json", "merges.txt", "generation_config.json"])
@pytest.mark.parametrize("form", ["directory", "export", "single file"])
def test_a_sparse_giant_is_refused_before_anybody_reads_it(tmp_path, form, name):
    directory = loadable(form, write_checkpoint(tmp_path / "m", cut=cut_evenly(2)), tmp_path)
    with (directory / name).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=f"{name}: 1.1 TB, over "):
        load(directory)
