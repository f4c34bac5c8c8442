"""The version is written once."""

from __future__ import annotations

import re

import paroquant_stream
from paroquant_stream import version


def test_the_public_version_has_three_numbers():
    assert paroquant_stream.__version__ is version.__version__
    assert re.fullmatch(r"[0-9]+[.][0-9]+[.][0-9]+", version.__version__)
