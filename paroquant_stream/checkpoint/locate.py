"""Where the model lies that a user named: in a directory, or in a repository of the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError

if TYPE_CHECKING:
    from .hub import HubModel

# patterns as text: compiling them takes 3 ms, and a model in a directory needs none
_ID = r"(?a:[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)"
_PAGE = (
    r"(?:https?://)?(?:huggingface\.co|hf\.co)/(?P<id>[^/?#]+/[^/?#]+)"
    r"(?:/tree/(?P<revision>[^/?#]+))?/?"
)


def locate(model: str | Path, revision: str | None = None) -> tuple[Path, HubModel | None]:
    """Find the directory of a model, downloading the small files of a Hub repository.

    The config, index and tokenizer are fetched but no shard. Without a network the Hub's cache is
    used as it is.

    Args:
        model: A directory, a repository id, `owner/name`, or the address of its page on the Hub.
        revision: A branch, tag or commit of the repository, `main` by default.

    Returns:
        The directory, and for a repository id the remote that its absent shards come from.

    Raises:
        CheckpointError: `model` is neither a directory nor a repository that can be downloaded.
    """
    if not str(model).strip():
        raise CheckpointError("the name of the model is empty; give a directory or a repository id")
    path = Path(model).expanduser()
    if os.path.isdir(path):  # pathlib raises on a disk error
        if revision:
            raise CheckpointError(f"{path}: a directory has no revision; --revision is for the Hub")
        return path, None
    name, named_revision = _repository(str(model))
    revision = revision or named_revision
    if os.path.exists(path) or not re.fullmatch(_ID, name):
        raise CheckpointError(
            f"{model}: neither a model directory nor a repository id like owner/name"
        )
    from .hub import fetch_model  # a model in a directory needs nothing of the Hub

    return fetch_model(name, revision, str(model))


def _repository(model: str) -> tuple[str, str | None]:
    """Return the repository id and the revision in the address of a model's page on the Hub."""
    match = re.fullmatch(_PAGE, model)
    return (match["id"], match["revision"]) if match else (model, None)
