"""Progress: bars on a terminal, lines in a log, nothing when it should be quiet."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from paroquant_stream import progress_bar
from paroquant_stream.api.convert import convert_checkpoint
from paroquant_stream.progress_bar import FILES, SHARDS, Progress, reported


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch) -> Terminal:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


def show(quiet: bool = False) -> Progress:
    with Progress(quiet) as progress:
        for shard in ("a", "b"):
            progress(shard, 0, 1000)
        for done in (500, 1000):
            for shard in ("a", "b"):
                progress(shard, done, 1000)
    return progress


def test_a_terminal_shows_a_bar_for_each_running_shard(monkeypatch):
    screen = terminal(monkeypatch)
    show()
    for name in ("all shards", "a", "b"):
        assert f"{name}:" in screen.getvalue()
    assert "B/s" in screen.getvalue()


def test_a_log_has_a_line_for_each_shard(capsys):
    show()
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("a done: 1 of 2 shards, 75 %, ")
    assert lines[1].startswith("b done: 2 of 2 shards, 100 %, ")


def test_quiet_is_quiet(monkeypatch):
    screen = terminal(monkeypatch)
    show(quiet=True)
    assert screen.getvalue() == ""


def test_nothing_is_shown_after_the_end(capsys):
    progress = show()
    capsys.readouterr()
    progress("c", 10, 10)
    assert capsys.readouterr() == ("", "")


def test_a_count_that_falls_is_no_second_end(capsys):
    """Threads tell of their counts in any order."""
    with Progress(quiet=False) as progress:
        for done in (0, 1000, 500, 1000):
            progress("a", done, 1000)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_count_that_falls_moves_no_bar_back(monkeypatch):
    moves, made = [], []

    class Bar:
        pos, n, total = -1, 0, 0

        def update(self, count: int) -> None:
            moves.append(count)
            self.n += count

        def close(self) -> None:
            pass

    terminal(monkeypatch)
    # private: what a bar shows can only be read from its moves
    monkeypatch.setattr(progress_bar, "_bar", lambda name, *_: made.append(name) or Bar())
    with Progress(quiet=False) as progress:
        for done in (0, 600, 400, 1000, 500):
            progress("a", done, 1000)
    assert made == ["all shards", "a"]
    assert min(moves) >= 0


def test_names_with_control_characters_do_not_reach_the_terminal(monkeypatch):
    screen = terminal(monkeypatch)
    with Progress(quiet=False) as progress:
        progress("a\x1b[2J", 1, 10)
    assert "\x1b[2J" not in screen.getvalue()


def test_every_shard_is_announced_before_the_first_is_begun(model_dir):
    calls = []
    convert_checkpoint(model_dir, jobs=1, progress=lambda *call: calls.append(call))
    assert [done for _, done, _ in calls[:3]] == [0, 0, 0]
    assert len({shard for shard, _, _ in calls[:3]}) == 3
    sizes = {shard: size for shard, _, size in calls}
    assert {shard: done for shard, done, _ in calls} == sizes


def test_loading_prints_nothing_by_itself(model_dir, capfd):
    from paroquant_stream.api.load import load

    load(model_dir)
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def notebook(monkeypatch):
    """A kernel: IPython is imported, and its shell has one."""
    shell = SimpleNamespace(kernel=True)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))


def show_phases(progress) -> None:
    with reported(progress) as phase:
        for title in (SHARDS, FILES):
            if report := phase(title):
                for done in (0, 500, 1000):
                    report("a", done, 1000)


def test_without_a_wish_only_a_terminal_shows_bars(monkeypatch, capsys):
    show_phases(None)
    assert capsys.readouterr() == ("", "")
    screen = terminal(monkeypatch)
    show_phases(None)
    for name in ("all shards", "all files", "a"):
        assert f"{name}:" in screen.getvalue()


def test_a_notebook_shows_one_bar(notebook, capsys):
    show_phases(None)
    err = capsys.readouterr().err
    assert "all shards:" in err
    assert "all files:" in err
    assert "a:" not in err.replace("all", "")


def test_ipython_in_a_terminal_is_no_notebook(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    show_phases(None)
    assert capsys.readouterr() == ("", "")


def test_true_in_a_log_gives_lines_of_each_phase(capsys):
    show_phases(True)
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(", 100 %")[0] for line in lines] == [
        "a done: 1 of 1 shards", "a done: 1 of 1 files",
    ]  # fmt: skip


def test_false_is_quiet_on_a_terminal(monkeypatch):
    screen = terminal(monkeypatch)
    show_phases(False)
    assert screen.getvalue() == ""


def test_a_function_gets_every_call(monkeypatch):
    screen, calls = terminal(monkeypatch), []
    show_phases(lambda *call: calls.append(call))
    assert calls == [("a", done, 1000) for done in (0, 500, 1000)] * 2
    assert screen.getvalue() == ""


@pytest.mark.parametrize("progress", [None, True])
def test_without_stderr_nothing_is_shown(monkeypatch, progress):
    monkeypatch.setattr(sys, "stderr", None)
    show_phases(progress)


def test_load_and_export_show_bars_on_a_terminal(model_dir, tmp_path, monkeypatch):
    from paroquant_stream import export_model, load

    screen = terminal(monkeypatch)
    load(model_dir, progress=False)
    assert screen.getvalue() == ""
    load(model_dir, cache_dir=tmp_path / "cache")
    assert "all shards:" in screen.getvalue()
    export_model(model_dir, tmp_path / "out")
    assert "all files:" in screen.getvalue()
    assert "out/model.safetensors:" in screen.getvalue()
