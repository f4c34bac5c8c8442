"""The command env."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest

from paroquant_stream import __version__
from paroquant_stream.api.convert import convert_checkpoint
from paroquant_stream.cli import env
from paroquant_stream.cli.env import collect, main
from paroquant_stream.text import bytes_text


def test_json_has_versions_system_device_cache_and_variables(capsys):
    assert main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["versions", "system", "mlx", "cache", "variables"]
    versions = found["versions"]
    assert versions["paroquant_stream"] == __version__
    for package in ("mlx", "mlx-lm", "mlx-vlm", "numpy", "safetensors", "huggingface_hub"):
        assert versions[package] == version(package)
    assert "paroquant" in versions
    assert found["system"].keys() == {"platform", "machine", "cores", "memory"}
    assert found["mlx"]["backend"] in ("cpu", "cuda", "metal")


def test_the_text_shows_the_same_in_sections(model_dir, capsys):
    manifest = convert_checkpoint(model_dir, jobs=1)
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if not line.startswith(" ")]
    assert heads == ["versions:", "system:", "mlx:", "cache:", "variables:"]
    words = {tuple(line.split(maxsplit=1)) for line in lines if line.startswith(" ")}
    cache = collect(None)["cache"]
    assert cache["entries"] == len(manifest.entries)
    assert ("size", bytes_text(cache["size"])) in words
    assert {("models", "1"), ("entries", "3"), ("exists", "yes")} <= words


def test_a_cache_that_is_absent_or_unusable_is_told(tmp_path, capsys):
    absent = collect(str(tmp_path / "absent"))["cache"]
    assert (absent["exists"], absent["size"], absent["models"]) == (False, 0, 0)
    assert absent["free"] > 0
    (tmp_path / "cache" / "v1" / "manifests").mkdir(parents=True)
    (tmp_path / "cache").chmod(0o777)
    assert main(["--cache-dir", str(tmp_path / "cache")]) == 0
    assert not (tmp_path / "absent").exists()
    assert "  error   " in capsys.readouterr().out
    assert "others can write into it" in collect(str(tmp_path / "cache"))["cache"]["error"]


def test_it_works_without_mlx_and_says_so():
    code = (
        "import sys; sys.modules |= {'mlx': None, 'mlx.core': None}\n"
        "from paroquant_stream.cli.main import main; sys.exit(main(['env']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    mlx = done.stdout.partition("\nmlx:\n")[2].splitlines()
    assert mlx[0].split() == ["backend", "-"]
    assert mlx[1].split()[0] == "error"


def test_a_package_that_is_not_installed_has_no_version(monkeypatch, capsys):
    def none(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(env, "version", none)
    found = collect(None)["versions"]
    assert (found["mlx"], found["paroquant"]) == (None, None)
    assert "mlx-cuda-12" not in found  # one backend is enough
    assert main([]) == 0
    assert "  numpy             -\n" in capsys.readouterr().out


SECRET = "hf_abcdefgh12345678"


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_tokens_and_passwords_are_hidden(form, monkeypatch, capsys):
    for name, value in {
        "HF_TOKEN": SECRET,
        "HUGGING_FACE_HUB_TOKEN": SECRET,
        "HF_ENDPOINT": f"https://me:{SECRET}@hub.example/x",
        "HF_HUB_USER_AGENT_ORIGIN": f"a {SECRET}",
        "https_proxy": "http://user:p4ssw0rd@proxy.example:3128",
        "AWS_SECRET_ACCESS_KEY": "p4ssw0rd",
        "HF_HOME": "/data/hf",
    }.items():
        monkeypatch.setenv(name, value)
    assert main(form) == 0
    out = capsys.readouterr().out
    assert SECRET not in out
    assert SECRET[4:] not in out
    assert "p4ssw0rd" not in out
    assert "AWS_" not in out
    for told in ("HF_TOKEN", "proxy.example:3128", "hub.example/x", "/data/hf"):
        assert told in out


def test_the_home_directory_is_not_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", f"{tmp_path}/hf")
    monkeypatch.setenv("HF_HUB_CACHE", f"{tmp_path}-other")
    monkeypatch.setenv("PAROQUANT_STREAM_CACHE", str(tmp_path))
    found = collect(None)
    assert found["variables"]["HF_HOME"] == "~/hf"
    assert found["variables"]["HF_HUB_CACHE"] == f"{tmp_path}-other"
    assert found["cache"]["path"] == "~"


def test_control_characters_of_a_variable_are_escaped(monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", "a\x1b[31m")
    assert main([]) == 0
    assert "\x1b" not in capsys.readouterr().out
