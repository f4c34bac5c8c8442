"""Models named by a Hub repository id: the local directory with their files."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import CheckpointError

PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "*.tiktoken"]
"""What a model needs: no code (`*.py`) and no pickles (`*.bin`) are ever fetched."""


def resolve(model: str | Path) -> Path:
    """The directory of a model: `model` itself if it is one, else its snapshot in the Hub's cache.

    Raises CheckpointError when `model` is neither a directory nor a repository that can be had.
    """
    path = Path(model).expanduser()
    if os.path.isdir(path):  # pathlib raises on a disk error
        return path
    name = str(model)
    if os.path.exists(path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{model}: neither a model directory nor a repository id like owner/name"
        )
    from huggingface_hub import snapshot_download  # 0.3 s, for this case alone

    try:
        return Path(snapshot_download(name, allow_patterns=PATTERNS))
    except Exception as error:  # the Hub's client raises a dozen unrelated kinds
        raise CheckpointError(f"{name}: no such directory, and the Hub says: {error}") from error
