"""A Python process that a program under `run` starts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from paroquant_stream.integrations.switch import CHILDREN
from tests.helpers.paths import ROOT

SHOW = "import sys; print('paroquant_stream.startup' in sys.modules, *sys.path)"


def start(*directories, value="1") -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(map(str, [CHILDREN, *directories]))
    environment = os.environ | {"PYTHONPATH": paths, "PAROQUANT_STREAM_INSTALL": value}
    command = [sys.executable, "-W", "error", "-c", SHOW]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(("value", "started"), [("1", "True"), ("", "False")])
def test_it_starts_the_watch_if_the_variable_says_so(value, started):
    found, *path = start(ROOT, value=value).stdout.split()
    assert found == started
    assert str(CHILDREN) not in path


def test_the_environments_own_sitecustomize_runs_too(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('theirs')")
    done = start(tmp_path, ROOT)
    assert done.stdout.startswith("theirs\nTrue ")
    assert done.stderr == ""


def test_what_their_sitecustomize_lacks_is_said_by_python(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import nowhere_to_be_found")
    assert "No module named 'nowhere_to_be_found'" in start(tmp_path, ROOT).stderr


def test_an_interpreter_that_cannot_use_the_package_goes_on(tmp_path):
    (tmp_path / "paroquant_stream").mkdir()
    (tmp_path / "paroquant_stream" / "__init__.py").write_text("match = from = 1")  # for an old one
    done = start(tmp_path)
    assert done.stdout.startswith("False ")
    assert done.stderr == ""
