"""Loggers that import `logging` late."""

from __future__ import annotations

import subprocess
import sys

import pytest

from paroquant_stream.log import Logger


@pytest.mark.parametrize("level", ["info", "warning"])
def test_a_record_is_that_of_the_module_that_logs(caplog, level):
    caplog.set_level("INFO")
    getattr(Logger("paroquant_stream.here"), level)("%s of %d", "one", 2)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("paroquant_stream.here", level.upper())
    assert (record.getMessage(), record.pathname) == ("one of 2", __file__)


def test_a_warning_is_shown_where_logging_was_not_set_up():
    code = (
        "import sys; from paroquant_stream.log import Logger; log = Logger('x');"
        "print('logging' in sys.modules); log.info('not this'); log.warning('this')"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.stdout, found.stderr) == ("False\n", "this\n")
