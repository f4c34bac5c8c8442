"""What the switch imports at the start of an interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

from paroquant_stream.integrations import switch
from paroquant_stream.integrations.switch import LINE
from tests.helpers.paths import ROOT
from tests.helpers.stand_in import stand_in

OURS = "paroquant_stream.integrations"
START = f"import sys; exec({LINE!r}); before = set(sys.modules)\n"


def python(directory, code, **variables) -> subprocess.CompletedProcess[str]:
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("PAROQUANT_STREAM")},
        "PYTHONPATH": f"{directory}{os.pathsep}{ROOT}",
        **variables,
    }
    command = [sys.executable, "-W", "error", "-c", START + code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


LOADS = """
import paroquant.inference.backends.mlx.load as home
print(getattr(home.load, "replaced_by", "theirs"))
"""


def test_nothing_but_the_watch_is_imported_at_the_start(tmp_path):
    code = """
print(*sorted(name for name in before if name.startswith("paroquant_stream")))
print(*{"logging", "inspect", "importlib.metadata", "json", "numpy"} & before)
"""
    ours, heavy = python(tmp_path, code, PAROQUANT_STREAM_INSTALL="1").stdout.splitlines()
    names = ["integrations", "integrations.import_hook", "startup", "version"]
    assert ours.split() == ["paroquant_stream", *(f"paroquant_stream.{name}" for name in names)]
    assert heavy == ""


def test_a_loader_is_replaced_when_it_is_imported(tmp_path):
    code = LOADS + "from paroquant_stream.integrations.loader_patch import _installed\n"
    code += "print([[loader.keywords[k] for k in ('jobs', 'dtype')] for loader in _installed])"
    variables = {"PAROQUANT_STREAM_JOBS": "3", "PAROQUANT_STREAM_DTYPE": "bfloat16"}
    done = python(stand_in(tmp_path), code, PAROQUANT_STREAM_INSTALL="1", **variables)
    assert done.stdout == f"{OURS}\n[[3, 'bfloat16']]\n"


def test_a_file_that_outlives_the_package_does_nothing(tmp_path):
    (tmp_path / switch.NAME).write_text(LINE)
    code = "import site, sys; site.addsitedir(sys.argv[1]); print('goes on')"
    command = [sys.executable, "-I", "-W", "error", "-c", code, str(tmp_path)]
    hide = "import sys; sys.modules['paroquant_stream'] = None\n"  # installed or not
    (tmp_path / "aa_first.pth").write_text(hide)
    environment = {**os.environ, "PAROQUANT_STREAM_INSTALL": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "goes on\n", "")


def test_without_the_variable_nothing_happens(tmp_path):
    code = LOADS + "print([name for name in sys.modules if name.startswith('paroquant_stream')])"
    stand_in(tmp_path)
    for variables in ({}, {"PAROQUANT_STREAM_INSTALL": "0"}):
        assert python(tmp_path, code, **variables).stdout == "theirs\n[]\n"


def test_a_failure_is_a_warning_and_the_program_goes_on(tmp_path):
    code = "sys.modules['paroquant_stream.api.install'] = None\n" + LOADS
    done = python(stand_in(tmp_path), code, PAROQUANT_STREAM_INSTALL="1")
    assert done.stdout == "theirs\n"
    assert done.stderr.startswith("ParoQuant models are not loaded by paroquant_stream: ")
    assert done.stderr.count("\n") == 1
