"""The note in a model directory that names its drop record, by a random id.

By the note a model is found after its directory was moved, and distinguished from one of equal
config and index.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from pathlib import Path

from ..errors import ParoquantStreamError, StoreError
from ..files import temp_files
from ..files.folder import Folder
from ..files.new_file import new_file_in
from ..files.strict_json import strict_json

logger = logging.getLogger(__name__)

NOTE = "paroquant_stream.dropped.json"
_MAX_NOTE = 64 << 10  # bytes; a note has 500
_NOTE_TEXT = (
    "The .safetensors shards of this model were removed by `paroquant-stream convert "
    "--drop-source`. Its weights are in the paroquant_stream cache of the user who did it "
    "(`paroquant-stream cache path`), which finds them by this id: keep this file with the model."
)


def read_note(directory: Path) -> str | None:
    """Read the id of the drop record that a model directory needs.

    Args:
        directory: The model directory.

    Returns:
        The id; None if the note is absent, a link or damaged.
    """
    with contextlib.suppress(OSError, ParoquantStreamError), Folder.open(directory) as folder:
        with os.fdopen(folder.open_file(NOTE), "rb") as file:
            found = strict_json(file.read(_MAX_NOTE), NOTE)
        drop_id = found.get("id") if type(found) is dict else None
        if type(drop_id) is str and re.fullmatch("[0-9a-f]{64}", drop_id):
            return drop_id if found.get("check", _check_of(drop_id)) == _check_of(drop_id) else None
    return None


def _check_of(drop_id: str) -> str:
    return hashlib.sha256(drop_id.encode()).hexdigest()[:16]


def write_note(folder: Folder, drop_id: str, required: bool = False) -> None:
    """Write the durable note that names the drop record of a model directory.

    An error is only logged, since the record is found by the directory's path too; but then the
    directory must have no note, because a note counts more than a path.

    Args:
        folder: The model directory.
        drop_id: The id of the record.
        required: Raise an error instead of logging it.

    Raises:
        StoreError: A required note cannot be written, or a note of another drop can be neither
            replaced nor removed.
    """
    fields = {"id": drop_id, "check": _check_of(drop_id), "text": _NOTE_TEXT}
    text = json.dumps(fields, indent=2) + "\n"
    try:
        temp_files.sweep_beside(folder, NOTE, locks=True)  # without locks a drop is refused
        with new_file_in(folder, NOTE, len(text)) as file:
            file.write(memoryview(text.encode()))
    except (OSError, StoreError) as error:
        if required:
            raise StoreError(f"{folder.path / NOTE}: cannot be written: {error}") from error
        _remove_note(folder, error)
        logger.warning("%s: not written: %s", folder.path / NOTE, error)


def _remove_note(folder: Folder, reason: Exception) -> None:
    try:
        with contextlib.suppress(FileNotFoundError):
            folder.unlink(NOTE)
            folder.sync()
    except OSError as error:
        raise StoreError(
            f"{folder.path / NOTE}: names another drop and can be neither replaced ({reason}) nor "
            f"removed ({error.strerror}); remove it and run again"
        ) from error
