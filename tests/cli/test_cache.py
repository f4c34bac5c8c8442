"""The cache command."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from paroquant_stream import cache
from paroquant_stream.cli import cache as cli_cache
from paroquant_stream.cli import convert
from paroquant_stream.conversion.request import make_request, read_manifest
from paroquant_stream.text import bytes_text
from tests.helpers.builders import llama_tensors, write_checkpoint
from tests.helpers.conversions import flip_byte
from tests.helpers.records import flip_last_byte


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


def test_the_repair_that_verify_prints_repairs(arguments, tmp_path, model_dir, capsys):
    damaged(tmp_path)
    assert cache.main(["verify", *arguments]) == 1
    advice = capsys.readouterr().out.splitlines()[-1]
    command, _, rest = advice.removeprefix("to repair: ").partition(", or ")
    program, name, *words = shlex.split(command)
    assert (program, name, rest) == ("paroquant-stream", "convert", "--repair")
    assert convert.main(words) == 0
    assert cache.main(["verify", *arguments]) == 0
    assert str(model_dir) in words


def test_verify_repairs_what_it_found_if_asked(arguments, tmp_path, capsys):
    path = damaged(tmp_path)
    assert cache.main(["verify", "--repair", *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(": converted again")
    assert path.exists()
    assert cache.main(["verify", *arguments]) == 0


def test_damage_without_a_model_to_convert_stays_a_failure(arguments, tmp_path):
    damaged(tmp_path)
    manifest = next((tmp_path / "cache").rglob("*.msgpack"))
    manifest.rename(manifest.with_stem("0" * 64))  # the name is the hash of the model's directory
    assert cache.main(["verify", "--repair", *arguments]) == 1


@pytest.mark.parametrize("source_differs", [False, True])
def test_a_repair_ends_with_1_while_a_source_differs(
    arguments, model_dir, tmp_path, capsys, source_differs
):
    request = make_request(model_dir, cache_dir=tmp_path / "cache")
    first, *_ = read_manifest(request).entries
    path = request.store.entry_path(first.key)
    flip_last_byte(path)
    if source_differs:
        flip_byte(model_dir, 2, "model.layers.1.input_layernorm.weight")
    command = ["verify", str(model_dir), "--sources", "--repair", *arguments]
    assert cache.main(command) == int(source_differs)
    assert f"6 files read, {1 + source_differs} differ" in capsys.readouterr().out
    assert path.exists()  # converted again, whatever the code


def test_verify_in_json(arguments, tmp_path, capsys):
    path = damaged(tmp_path)
    assert cache.main(["verify", "--json", *arguments]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["files"] == 3
    assert found["problems"][0].keys() == {"path", "expected", "found"}
    assert found["problems"][0]["path"] == str(path)


def test_verify_of_an_unconverted_model_is_one_message(tmp_path, model_dir, capsys):
    assert cache.main(["verify", str(model_dir)]) == 1
    assert f"{model_dir}: not converted in {tmp_path}" in capsys.readouterr().err


def run(*words: str) -> int:
    return cache.main([*words])


@pytest.fixture
def root(arguments) -> Path:
    return Path(arguments[1])


@pytest.fixture
def home(root, monkeypatch) -> Path:
    """The converted cache as the user's, so that no command needs --cache-dir."""
    monkeypatch.setenv("PAROQUANT_STREAM_CACHE", str(root))
    return root


def tree(path: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.lstat().st_mtime_ns, p.lstat().st_size) for p in sorted(path.rglob("*"))}


@pytest.mark.usefixtures("home")
def test_ls_shows_the_model_and_a_footer(model_dir, capsys):
    assert run("ls") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1].startswith(str(model_dir))
    assert "1 model, 3 entries, " in out
    assert err == ""


@pytest.mark.usefixtures("home")
def test_ls_quiet_gives_names_that_rm_takes(model_dir, capsys):
    assert run("ls", "-q") == 0
    name = capsys.readouterr().out
    assert name == f"{model_dir}\n"
    assert run("rm", name.strip(), "-y") == 0
    capsys.readouterr()
    run("ls", "-q")
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("home")
def test_ls_json_is_one_list(model_dir, capsys):
    assert run("ls", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["name"], len(found["shards"])) == (str(model_dir), 3)


@pytest.mark.usefixtures("home")
def test_ls_of_a_model_shows_its_shards_and_no_footer(model_dir, capsys, monkeypatch):
    monkeypatch.chdir(model_dir.parent)
    assert run("ls", "model") == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert run("ls", "-v") == 0
    assert "model-00001-of-00003.safetensors" in capsys.readouterr().out
    assert run("ls", "absent") == 1
    assert "absent: not converted in " in capsys.readouterr().err


@pytest.fixture
def two_models(home, model_dir, tmp_path, capsys) -> list[str]:
    """The names of a smaller model and of `model_dir`, both converted."""
    small = write_checkpoint(tmp_path / "another", llama_tensors(1, layers=1))
    assert convert.main([str(small), "--quiet"]) == 0
    return [str(small), str(model_dir)]


def test_ls_filters_and_sorts(two_models, capsys):
    small, large = two_models
    for words, names in {
        ("--sort", "name:desc"): [large, small],
        ("--sort", "size"): [large, small],
        ("--sort", "size:asc"): [small, large],
        ("--filter", "model=ANOTHER"): [small],
        ("--filter", "model!=another", "--filter", "size>1kB"): [large],
        ("--filter", "state=orphan"): [],
    }.items():
        assert run("ls", "-q", *words) == 0
        assert capsys.readouterr().out.split() == names
        assert run("ls", "--json", *words) == 0
        assert [m["name"] for m in json.loads(capsys.readouterr().out)] == names


def test_ls_with_a_filter_says_how_many_it_shows(two_models, capsys):
    assert run("ls", "--filter", "model=another") == 0
    out = capsys.readouterr().out
    assert out.endswith("\n\n1 of 2 models shown\n")
    assert two_models[1] not in out
    assert run("ls", "--filter", "size>1TB") == 0
    assert capsys.readouterr().out == "0 of 2 models shown\n"


def test_ls_cuts_lines_on_a_terminal_only(two_models, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    run("ls")
    assert two_models[0] in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    run("ls", "-v")
    head = capsys.readouterr().out.partition("\n\n")[0]
    assert max(map(len, head.splitlines())) <= 60
    run("ls", "--json")
    assert two_models[0] in capsys.readouterr().out


@pytest.mark.usefixtures("home")
def test_size_in_json_and_for_people(capsys):
    assert run("size", "--json") == 0
    sizes = json.loads(capsys.readouterr().out)
    assert sizes.keys() == {
        "path", "size", "removable", "useless", "orphans", "foreign", "free", "stays",
    }  # fmt: skip
    assert run("size") == 0
    assert capsys.readouterr().out.startswith(f"{bytes_text(sizes['size'])}  total in ")


def test_looking_changes_nothing(home, model_dir, capsys):
    before = tree(home), tree(model_dir)
    for words in (["ls"], ["ls", "-v"], ["ls", "--json"], ["ls", "-q"], ["size"], ["path"]):
        assert run(*words) == 0
    assert run("path", str(model_dir)) == 0
    assert run("rm", str(model_dir), "--dry-run") == 0
    assert run("prune", "--max-size", "0B", "--orphans", "--foreign", "--dry-run") == 0
    assert (tree(home), tree(model_dir)) == before


def test_an_absent_cache_is_empty_and_is_not_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PAROQUANT_STREAM_CACHE", str(tmp_path / "absent"))
    assert run("ls") == 0
    assert capsys.readouterr().out.startswith("0 models, 0 entries, 0 B in ")
    assert run("ls", "--json") == 0
    assert capsys.readouterr().out == "[]\n"
    assert run("path") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'absent'}\n"
    assert run("prune") == 0
    assert capsys.readouterr().out == "nothing to remove\n"
    assert run("rm", "x") == 1
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("words", [["ls"], ["prune"], ["verify"], ["verify", "x"], ["rm", "x"]])
def test_a_directory_that_is_no_cache_is_not_an_empty_one(words, tmp_path, capsys):
    assert run(*words, "--cache-dir", str(tmp_path)) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {tmp_path}: there is no cache here; see --cache-dir\n")


@pytest.fixture
def in_place(model_dir, capsys) -> Path:
    """A model with a conversion inside its directory, and none in the cache."""
    assert convert.main([str(model_dir), "--in-place", "--quiet"]) == 0
    return model_dir


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("name", ["{}", "{}/mlx"])
def test_a_conversion_inside_the_model_is_listed(in_place, name, capsys):
    name = name.format(in_place)
    assert run("ls", name) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [f"{in_place}/mlx", "AUTOAWQ", "3/3", *lines[1].split()[3:]]
    assert lines[1].endswith("fresh")
    assert run("path", name) == 0
    assert all(f"{in_place}/mlx/v1/" in line for line in capsys.readouterr().out.splitlines())
    assert run("verify", name, "--sources") == 0
    assert capsys.readouterr().out == "6 files read, 0 differ\n"


def test_a_conversion_inside_the_model_is_removed(in_place, capsys):
    before = tree(in_place / "mlx")
    assert run("rm", str(in_place), "--dry-run") == 0
    assert f"  {in_place}/mlx  " in capsys.readouterr().out
    assert tree(in_place / "mlx") == before
    assert run("rm", str(in_place), "-y") == 0
    assert not list(in_place.glob("mlx/**/*.safetensors"))
    assert len(list(in_place.glob("*.safetensors"))) == 3
    assert run("ls", str(in_place)) == 1


def test_a_published_conversion_is_removed_by_its_own_path_alone(in_place, capsys):
    assert convert.main([str(in_place), "--quiet"]) == 0
    assert run("ls", str(in_place), "-q") == 0
    assert capsys.readouterr().out.splitlines() == [str(in_place), f"{in_place}/mlx"]
    assert run("rm", str(in_place), "-y") == 0
    assert run("ls", str(in_place), "-q") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{in_place}/mlx"
    assert run("rm", f"{in_place}/mlx", "-y") == 0
    assert run("ls", str(in_place), "-q") == 1


def test_verify_takes_the_names_that_ls_shows(model_dir, tmp_path, capsys):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("a" * 40)
    shutil.copytree(model_dir, snapshot)
    assert convert.main([str(model_dir), "--dtype", "float16", "--in-place", "--quiet"]) == 0
    assert convert.main([str(model_dir), "--dtype", "float16", "--quiet"]) == 0
    assert convert.main([str(snapshot), "--quiet"]) == 0
    assert run("ls", "-q") == 0
    names = capsys.readouterr().out.splitlines()
    assert names == [f"{model_dir} (float16)", "owner/name@aaaaaaaa"]
    for name in (*names, "owner/name", f"{model_dir}/mlx (float16)"):
        assert run("verify", name) == 0
        assert capsys.readouterr().out == "3 files read, 0 differ\n"
    assert run("verify", f"{model_dir}/mlx (bfloat16)") == 1


def test_damage_inside_the_model_is_found_and_repaired(in_place, capsys):
    path = next(in_place.glob("mlx/v1/entries/*/*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    assert run("verify", str(in_place)) == 1
    assert f"{path}: expected XXH3 " in capsys.readouterr().out
    assert run("verify", str(in_place), "--repair") == 0
    assert "converted again" in capsys.readouterr().out


def test_a_moved_model_without_shards_is_verified_where_it_is(model_dir, tmp_path, capsys):
    assert convert.main([str(model_dir), "--drop-source", "-y", "--quiet"]) == 0
    model_dir.rename(tmp_path / "moved")
    assert run("verify", str(tmp_path / "moved")) == 0
    assert capsys.readouterr().out == "3 files read, 0 differ\n"


def test_path_gives_the_manifest_and_the_entries(home, model_dir, capsys):
    assert run("path", str(model_dir)) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert set(paths) == {p for p in home.rglob("*") if p.suffix in (".msgpack", ".safetensors")}


def test_rm_without_a_terminal_asks_for_y_and_removes_nothing(home, model_dir, capsys):
    before = tree(home)
    assert run("rm", str(model_dir)) == 1
    out, err = capsys.readouterr()
    assert out.startswith("to remove, ")
    assert err == "error: nothing removed: remove? There is no terminal to ask on; add -y\n"
    assert tree(home) == before


class Terminal(io.StringIO):
    """A terminal on which a person has typed."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("answer", "code"), [("y\n", 0), ("YES\n", 0), ("n\n", 1), ("\n", 1), ("", 1)]
)
def test_rm_on_a_terminal_asks(home, model_dir, capsys, monkeypatch, answer, code):
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert run("rm", str(model_dir)) == code
    out, err = capsys.readouterr()
    assert err.startswith("remove? [y/N] ")
    assert ("removed, " in out) == (code == 0)
    assert bool(list(home.rglob("*.msgpack"))) == (code == 1)


def test_rm_says_what_it_frees_and_frees_it(home, model_dir, capsys):
    assert run("rm", str(model_dir), "-y") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("to remove, ")
    assert lines[1].startswith(f"  {model_dir}  ")
    assert lines[2].startswith("removed, ")
    assert lines[0].split(", ")[1].rstrip(":") == lines[2].split(", ")[1].split(" freed")[0]
    assert not list(home.rglob("*.safetensors"))


@pytest.mark.usefixtures("home")
def test_rm_of_one_model_that_is_not_there_removes_none(model_dir, capsys):
    assert run("rm", str(model_dir), "absent", "-y") == 1
    run("ls", "-q")
    assert capsys.readouterr().out == f"{model_dir}\n"


@pytest.mark.usefixtures("home")
def test_a_model_without_its_directory_is_removed_by_its_path(model_dir, capsys):
    shutil.rmtree(model_dir)
    assert run("rm", str(model_dir), "-y") == 0


@pytest.mark.usefixtures("home")
def test_a_hub_model_is_removed_by_id_or_revision(tmp_path, capsys):
    for revision in ("a" * 40, "b" * 40):
        directory = tmp_path / "models--owner--name" / "snapshots" / revision
        assert convert.main([str(write_checkpoint(directory)), "--quiet"]) == 0
    assert run("rm", "owner/name@aaaaaaaa", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["models"] == ["owner/name@aaaaaaaa"]
    assert run("rm", "owner/name", "--dry-run", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["models"]) == 2


def test_removals_in_json_are_one_object_of_the_documented_form(home, model_dir, capsys):
    assert run("rm", str(model_dir), "-y", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"dry_run", "models", "files", "foreign", "stays", "size"}
    assert (found["dry_run"], len(found["files"])) == (False, 3)
    assert not list(home.rglob("*.safetensors"))


@pytest.mark.usefixtures("home")
def test_prune_takes_its_rules_from_the_command_line(model_dir, capsys):
    assert run("prune", "--older-than", "30d", "-y") == 0
    assert capsys.readouterr().out == "nothing to remove\n"
    assert run("prune", "--max-size", "1kB", "--keep", str(model_dir), "-y") == 0
    out = capsys.readouterr().out
    assert out.startswith("nothing to remove\n")
    assert f"stays: {model_dir}: --keep" in out
    assert run("prune", "--max-size", "1kB", "-y") == 0
    assert "removed, " in capsys.readouterr().out


def test_a_failure_is_one_line_and_exit_code_1(home, model_dir, capsys):
    home.chmod(0o777)
    assert run("rm", str(model_dir), "-y") == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {home}: others can write into it")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("home")
def test_an_interrupt_is_one_line_and_exit_code_130(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_cache, "take_inventory", interrupted)
    assert run("ls") == 130
    assert capsys.readouterr().err == "interrupted; run again to resume\n"


def test_looking_imports_nothing_heavy(home):
    code = (
        "import sys; from paroquant_stream import cache; cache.main(['ls', '-v']); "
        "heavy = {'numpy', 'mlx', 'huggingface_hub', 'tqdm', 'mlx_lm'}; "
        "heavy |= {'concurrent', 'safetensors'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_backup_programs_skip_the_cache(root):
    archive = subprocess.run(
        ["tar", "--exclude-caches", "-cf", "-", root.name], cwd=root.parent, capture_output=True
    )
    names = subprocess.run(["tar", "-tf", "-"], input=archive.stdout, capture_output=True).stdout
    assert names.split() == [b"cache/", b"cache/CACHEDIR.TAG"]
