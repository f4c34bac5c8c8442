"""The cache command."""

from __future__ import annotations

import json

import pytest

from paroquant_stream import cache, convert


@pytest.fixture
def arguments(model_dir, tmp_path) -> list[str]:
    where = ["--cache-dir", str(tmp_path / "cache")]
    assert convert.main([str(model_dir), *where, "--quiet"]) == 0
    return where


def damaged(tmp_path):
    path = next((tmp_path / "cache").rglob("entries/*/*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return path


def test_verify_of_a_sound_cache_exits_with_0(arguments, model_dir, capsys):
    assert cache.main(["verify", *arguments]) == 0
    assert capsys.readouterr().out == "3 files read, 0 differ\n"
    assert cache.main(["verify", str(model_dir), "--sources", *arguments]) == 0
    assert capsys.readouterr().out == "6 files read, 0 differ\n"


def test_verify_names_what_differs_and_exits_with_1(arguments, tmp_path, capsys):
    path = damaged(tmp_path)
    assert cache.main(["verify", *arguments]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{path}: expected XXH3 ")
    assert ", got " in lines[0]
    assert lines[1] == "3 files read, 1 differ"


def test_verify_in_json(arguments, tmp_path, capsys):
    path = damaged(tmp_path)
    assert cache.main(["verify", "--json", *arguments]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["files"] == 3
    assert found["problems"][0].keys() == {"path", "expected", "found"}
    assert found["problems"][0]["path"] == str(path)


def test_verify_of_a_model_that_was_never_converted_is_one_message(tmp_path, model_dir, capsys):
    assert cache.main(["verify", str(model_dir), "--cache-dir", str(tmp_path / "empty")]) == 1
    assert "not converted" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [[], ["nonsense"], ["verify", "--sources"], ["verify", "--in-place"]]
)
def test_wrong_usage_exits_with_2(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        cache.main(wrong)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err
