"""What an export takes along: known names, files of the model, no code, a few MB in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from paroquant_stream.errors import CheckpointError, MalformedFileError
from paroquant_stream.exports import copied_files as module
from paroquant_stream.exports.copied_files import (
    JSON,
    OTHER,
    PROCESSORS,
    export_files,
    files_to_export,
    without_code,
)
from paroquant_stream.text import bytes_text


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def export(directory, out) -> list[str]:
    names = files_to_export(directory)
    export_files(directory, names, out)
    return names


def test_every_known_name_is_taken_along_byte_for_byte(tmp_path, out):
    model = tmp_path / "model"
    model.mkdir()
    for name in (*JSON, *OTHER):
        (model / name).write_text('{"a": [1,2]}' if name in JSON else f"{name}\n" * 1000)
    assert export(model, out) == sorted((*JSON, *OTHER))
    for name in (*JSON, *OTHER):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert len(list(out.iterdir())) == len(JSON) + len(OTHER)


def test_settings_of_a_processor_go_with_a_tower_alone(model_dir, out):
    for name in PROCESSORS:
        (model_dir / name).write_text('{"auto_map": {}, "a": [1,2]}')
    assert not set(PROCESSORS) & set(files_to_export(model_dir))
    names = files_to_export(model_dir, vision=True)
    assert set(PROCESSORS) <= set(names)
    export_files(model_dir, names, out)
    for name in PROCESSORS:
        assert json.loads((out / name).read_text()) == {"a": [1, 2]}


def test_templates_in_their_directory_are_taken_along(model_dir, out):
    templates = model_dir / "additional_chat_templates"
    templates.mkdir()
    for name in ("tool_use.jinja", "rag.jinja", "evil.py", "x.jinja.py", ".x.jinja", "a b.jinja"):
        (templates / name).write_text(name)
    assert export(model_dir, out)[-2:] == [
        "additional_chat_templates/rag.jinja", "additional_chat_templates/tool_use.jinja"
    ]  # fmt: skip
    written = {path.name: path.read_text() for path in (out / templates.name).iterdir()}
    assert written == {"rag.jinja": "rag.jinja", "tool_use.jinja": "tool_use.jinja"}


@pytest.mark.parametrize("link", ["directory", "file"])
def test_templates_that_truly_lie_elsewhere_are_an_error(model_dir, tmp_path, link):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jinja").write_text("of another user")
    templates = model_dir / "additional_chat_templates"
    if link == "directory":
        templates.symlink_to("../elsewhere")
    else:
        templates.mkdir()
        (templates / "x.jinja").symlink_to(tmp_path / "elsewhere" / "x.jinja")
    with pytest.raises(CheckpointError, match=r"x\.jinja: a link to .*, outside of the model"):
        files_to_export(model_dir)


def test_more_templates_than_any_model_has_are_refused(model_dir):
    (model_dir / "additional_chat_templates").mkdir()
    for number in range(101):
        (model_dir / "additional_chat_templates" / f"t{number}.jinja").write_text("x")
    with pytest.raises(CheckpointError, match="101 templates, over the 100 that any model has"):
        files_to_export(model_dir)


def test_no_known_name_is_one_of_code():
    plain = {".json", ".jinja", ".txt", ".md", ".model", ".tiktoken", ".codes", ""}
    assert {Path(name).suffix for name in (*JSON, *OTHER)} == plain


@pytest.mark.parametrize("name", ["LICENSE.py", "LICENSE.txt.sh", "license.pth", "tokenizer.py",
                                  "modeling.json", "x.txt", "x.jinja", "x.model"])  # fmt: skip
def test_another_name_is_left_behind(model_dir, out, name):
    (model_dir / name).write_text("x")
    assert export(model_dir, out) == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "merges.txt"])
@pytest.mark.parametrize("link", ["../secret", "models--a/blobs/x", "inner"])
def test_a_file_outside_is_an_error_however_it_is_spelled(model_dir, tmp_path, name, link):
    (tmp_path / "secret").write_text("of another user")
    (model_dir / "models--a" / "blobs").mkdir(parents=True)
    (model_dir / "models--a" / "blobs" / "x").symlink_to(tmp_path / "secret")
    (model_dir / "inner").symlink_to("../secret")
    (model_dir / name).unlink(missing_ok=True)
    (model_dir / name).symlink_to(link)
    with pytest.raises(CheckpointError, match=f"{name}: a link to .*secret, outside of the model"):
        files_to_export(model_dir)


def test_a_file_that_becomes_a_link_later_is_not_followed(model_dir, tmp_path, out):
    (tmp_path / "secret").write_text("of another user")
    names = files_to_export(model_dir)
    (model_dir / "tokenizer.json").unlink()
    (model_dir / "tokenizer.json").symlink_to("../secret")
    with pytest.raises(CheckpointError, match="outside of the model"):
        export_files(model_dir, names, out)
    assert list(out.iterdir()) == []


def test_the_files_of_a_hub_snapshot_are_copied(tmp_path, out):
    repo = tmp_path / "models--owner--name"
    snapshot = repo / "snapshots" / "rev"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "blobs" / "e1").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/e1")
    assert export(snapshot, out) == ["tokenizer.json"]
    assert not (out / "tokenizer.json").is_symlink()


def test_a_directory_or_dangling_link_counts_as_absent(model_dir, out):
    (model_dir / "LICENSE").mkdir()
    (model_dir / "merges.txt").symlink_to("absent")
    assert export(model_dir, out) == ["tokenizer.json", "tokenizer_config.json"]


def test_a_pipe_is_refused_and_not_opened(model_dir):
    os.mkfifo(model_dir / "merges.txt")
    with pytest.raises(MalformedFileError, match=r"merges\.txt: expected a regular file"):
        files_to_export(model_dir)


@pytest.mark.parametrize(("name", "limit"), [("vocab.json", 64 << 20), ("merges.txt", 256 << 20)])
def test_a_sparse_giant_is_refused_before_it_is_read(model_dir, name, limit):
    with (model_dir / name).open("wb") as file:
        file.truncate(limit)
    assert name in files_to_export(model_dir)
    os.truncate(model_dir / name, 1 << 40)
    with pytest.raises(CheckpointError, match=f"over {bytes_text(limit)}, which no model needs"):
        files_to_export(model_dir)


def test_a_giant_that_grew_later_is_refused_before_it_is_read(model_dir, out):
    names = files_to_export(model_dir)
    os.truncate(model_dir / "tokenizer.json", 1 << 40)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: .* over 67\.1 MB"):
        export_files(model_dir, names, out)


STREAMED = """
import sys
from pathlib import Path
from paroquant_stream.cli.convert import peak_rss_bytes
from paroquant_stream.exports.copied_files import export_files
before = peak_rss_bytes()
export_files(Path(sys.argv[1]), ["merges.txt"], Path(sys.argv[2]))
print(peak_rss_bytes() - before < 60_000_000)
"""


def test_a_large_vocabulary_is_copied_in_chunks(model_dir, out):
    with (model_dir / "merges.txt").open("wb") as file:
        file.truncate(200 << 20)
    command = [sys.executable, "-c", STREAMED, str(model_dir), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
    assert (out / "merges.txt").stat().st_size == 200 << 20


def test_json_of_several_chunks_arrives_whole(model_dir, out, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 7)
    export(model_dir, out)
    assert (out / "tokenizer.json").read_bytes() == (model_dir / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"a": NaN}', "{", '{"a": 1e999}'])
def test_settings_that_parsers_read_differently_are_refused(model_dir, out, text):
    (model_dir / "generation_config.json").write_text(text)
    with pytest.raises(MalformedFileError, match=r"generation_config\.json: not valid JSON"):
        export(model_dir, out)


def test_the_length_written_for_no_limit_is_accepted(model_dir, out):
    for settings in ({}, {"auto_map": {}}):
        text = json.dumps({"model_max_length": int(1e30), **settings})
        (model_dir / "tokenizer_config.json").write_text(text)
        export(model_dir, out)
        assert json.loads((out / "tokenizer_config.json").read_text()) == {
            "model_max_length": 1000000000000000019884624838656
        }


@pytest.mark.parametrize("key", ["auto_map", "custom_pipelines", "model_file"])
def test_a_key_by_which_code_is_found_goes_wherever_it_stands(model_dir, out, key):
    for name in JSON:
        (model_dir / name).write_text(json.dumps({key: "x.py", "a": [{key: {"b": ["x.T"]}}]}))
    export(model_dir, out)
    assert {json.dumps(json.loads((out / name).read_text())) for name in JSON} == {'{"a": [{}]}'}


def test_a_key_that_is_written_with_escapes_goes_too(model_dir, out):
    (model_dir / "tokenizer_config.json").write_text('{"\\u0061uto_map": {"AutoTokenizer": "x.T"}}')
    export(model_dir, out)
    assert json.loads((out / "tokenizer_config.json").read_text()) == {}


def test_a_vocabulary_word_named_like_a_key_stays():
    assert without_code({"vocab": {"auto_map": 7, "model_file": 8}}, "x") == {
        "vocab": {"auto_map": 7, "model_file": 8}
    }
    assert without_code({"auto_map": True}, "x") == {}


def test_settings_that_are_nested_without_end_are_refused(model_dir, out):
    for depth, refused in ((90, False), (110, True), (900, True)):
        (model_dir / "generation_config.json").write_text("[" * depth + "]" * depth)
        if refused:
            with pytest.raises(
                MalformedFileError, match=r"generation_config\.json: nested deeper than"
            ):
                export(model_dir, out)
        else:
            export(model_dir, out)
