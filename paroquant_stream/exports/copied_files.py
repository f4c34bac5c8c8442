"""The files that an export copies beside tensors and config: tokenizer, templates, settings.

Only files of known names, none of them code, since an export is given to others. Each must be a
regular file of the model, and settings lose the keys by which transformers and mlx-lm find code.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..checkpoint.model_files import (
    MAX_JSON,
    MAX_TEXT,
    TEMPLATES,
    VOCABULARIES,
    check_size,
    open_inside,
)
from ..errors import CheckpointError, MalformedFileError
from ..files.descriptor import closing, file_status
from ..files.hashing import CHUNK, read_chunks
from ..files.new_file import new_file_at
from ..files.strict_json import strict_json

JSON = (
    *(name for name in VOCABULARIES if name.endswith(".json")),
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.json", "generation_config.json",
)  # fmt: skip
PROCESSORS = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
"""Settings of images, sounds and videos, for models with a tower."""
OTHER = (
    *(name for name in VOCABULARIES if not name.endswith(".json")),
    "chat_template.jinja", "merges.txt",
    "LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING", "NOTICE", "NOTICE.txt",
    "NOTICE.md", "USE_POLICY.md",
)  # fmt: skip
"""Copied as they are: the vocabularies of transformers' tokenizers, and under which terms."""
CODE_KEYS = ("auto_map", "custom_pipelines", "model_file")
"""Settings that name Python files: of transformers' classes and pipelines, and mlx-lm's model."""
_TEMPLATE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}\.jinja")
_MOST_TEMPLATES = 100
_DIGITS = 40  # of an integer: transformers writes 10**30 as the length of a model without a limit
_DEEPEST = 100  # levels of JSON, of which a tokenizer has ten; Python's own limit is near 1,000


def files_to_export(directory: Path, *, vision: bool = False) -> list[str]:
    """List what an export copies.

    Args:
        directory: The model directory.
        vision: Whether it is exported with its tower.

    Returns:
        The names of the known files that exist, and of templates in their directory.

    Raises:
        CheckpointError: One of them lies outside of the model, or is larger than any model's, or
            there are more templates than any model has.
        MalformedFileError: One of them is a pipe, socket or device.
    """
    known = sorted((*JSON, *OTHER, *(PROCESSORS if vision else ())))
    names = [
        name
        for name in (*known, *_templates(directory))
        if os.path.exists(directory / name) and not os.path.isdir(directory / name)
    ]
    for name in names:
        with closing(_open(directory, name)):
            pass
    return names


def export_files(directory: Path, names: Iterable[str], target: Path) -> None:
    """Write those files of a model into an export, a few MB at a time.

    Args:
        directory: The model directory.
        names: As `files_to_export` returned them.
        target: The directory of the export.

    Raises:
        CheckpointError: A file was changed meanwhile and may not be copied now.
        MalformedFileError: Settings are not valid JSON.
        SourceChangedError: A file became shorter while it was read.
        UnreadableFileError: The system cannot read it.
        StoreError: It cannot be written.
    """
    for name in names:
        path = directory / name
        with closing(_open(directory, name)) as fd:
            (target / name).parent.mkdir(exist_ok=True)
            size = file_status(fd, str(path)).st_size
            chunks = read_chunks(fd, 0, size, str(path), memoryview(bytearray(CHUNK)))
            if name in (*JSON, *PROCESSORS):
                text = _clean(b"".join(map(bytes, chunks)), str(path))  # views of one buffer
                write_file(target / name, len(text), [memoryview(text)])
            else:
                write_file(target / name, size, chunks)


def without_code(value: Any, label: str) -> Any:
    """Remove the keys by which programs find code in a model directory, at any depth.

    Args:
        value: What was read from JSON.
        label: Its file, for the error.

    Returns:
        An equal value without those keys.

    Raises:
        MalformedFileError: It is nested too deep.
    """
    return _without_code(value, label, 0)


def as_json(value: object) -> bytes:
    """Return the bytes of an indented JSON file."""
    return (json.dumps(value, indent=2) + "\n").encode()


def write_file(path: Path, size: int, chunks: Iterable[memoryview]) -> None:
    """Make a file of `size` bytes durable under its name; chunks may share their memory."""
    with new_file_at(path, size) as file:
        for chunk in chunks:
            file.write(chunk)


def _templates(directory: Path) -> list[str]:
    """List the chat templates beside the default one, each by its path in the model."""
    try:
        found = sorted(filter(_TEMPLATE.fullmatch, os.listdir(directory / TEMPLATES)))
    except OSError:  # no such directory
        return []
    if len(found) > _MOST_TEMPLATES:
        raise CheckpointError(
            f"{directory / TEMPLATES}: {len(found):,} templates, over the {_MOST_TEMPLATES} that "
            "any model has; remove some"
        )
    return [f"{TEMPLATES}/{name}" for name in found]


def _open(directory: Path, name: str) -> int:
    path = directory / name
    try:
        fd = open_inside(path, None if path.parent == directory else directory)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
    try:
        limit = MAX_JSON if name in (*JSON, *PROCESSORS) else MAX_TEXT
        check_size(path, file_status(fd, str(path)).st_size, limit)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _clean(text: bytes, label: str) -> bytes:
    """Return the same bytes, or the JSON written again without the keys that name code."""
    value = strict_json(text, label, _DIGITS)
    clean = without_code(value, label)
    return text if clean == value else as_json(clean)


def _without_code(value: Any, label: str, depth: int) -> Any:
    if depth > _DEEPEST:
        raise MalformedFileError(
            f"{label}: nested deeper than {_DEEPEST} levels, as no settings are"
        )
    if type(value) is list:
        return [_without_code(item, label, depth + 1) for item in value]
    if type(value) is not dict:
        return value
    return {
        key: _without_code(item, label, depth + 1)
        for key, item in value.items()
        if key not in CODE_KEYS or type(item) is int  # a word of a vocabulary may be one of them
    }
