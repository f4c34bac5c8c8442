"""Finds out whether what a program asks for is a ParoQuant model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.config import CONFIG_NAME, EXPORTED
from ..checkpoint.hub import fetch_config
from ..checkpoint.model_files import MAX_CONFIG, read_inside
from ..checkpoint.quantization import is_paroquant
from ..errors import ParoquantStreamError
from ..files.strict_json import strict_json


@dataclass(frozen=True)
class Found:
    """A ParoQuant model."""

    directory: Path
    """The model directory, or the snapshot in the Hub's cache."""
    name: str | Path
    """What `load` takes: the directory or the repository id."""
    revision: str | None
    """The commit of a repository."""

    @property
    def options(self) -> dict[str, Any]:
        """The keyword options of `load` that name the commit."""
        return {"revision": self.revision} if self.revision else {}


def find_local(path: str | Path) -> Found | None:
    """Find a ParoQuant model, or an export of one, in a directory.

    Args:
        path: Any path.

    Returns:
        The model; None where there is none, or where its config cannot be read.
    """
    directory = Path(path)
    try:
        text = read_inside(directory / CONFIG_NAME, MAX_CONFIG)
        config = strict_json(text, CONFIG_NAME)
    except (OSError, ValueError, ParoquantStreamError):
        return None
    if type(config) is not dict or not (is_paroquant(config) or EXPORTED in config):
        return None
    return Found(directory, directory, None)


def find_on_hub(name: str, revision: str | None) -> Found | None:
    """Find a ParoQuant model in a repository, of which only config.json is downloaded.

    Args:
        name: What may be a repository id.
        revision: A branch, tag or commit, `main` by default.

    Returns:
        The model; None where it is no ParoQuant model, or its config cannot be downloaded.
    """
    if os.path.exists(name) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None
    try:
        found = find_local(fetch_config(name, revision)[0])
    except ParoquantStreamError:
        return None
    return found and Found(found.directory, name, found.directory.name)
