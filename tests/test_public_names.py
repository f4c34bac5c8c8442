"""The public names of the package: listed, imported on first use, and nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest

import paroquant_stream
from tests.helpers.paths import ROOT


def test_every_public_name_can_be_imported():
    for name in paroquant_stream.__all__:
        assert getattr(paroquant_stream, name) is not None
        assert name in dir(paroquant_stream)
    assert dir(paroquant_stream) == sorted(dir(paroquant_stream))


def test_the_docstring_names_every_public_name():
    for name in set(paroquant_stream.__all__) - {"__version__"}:
        assert name in paroquant_stream.__doc__


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"'paroquant_stream' has no attribute 'absent'"):
        _ = paroquant_stream.absent


def test_importing_the_package_imports_nothing_of_it():
    script = "import sys, paroquant_stream; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    ours = [name for name in done.stdout.split() if name.split(".")[0] == "paroquant_stream"]
    assert ours == ["paroquant_stream", "paroquant_stream.version"]
