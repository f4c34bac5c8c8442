"""Which files are a model's: where they truly lie, what they are and how large they may be.

A link may lead anywhere inside the model directory and, from a snapshot of a Hub cache, to the
blobs of the snapshot's own repository, some of which are links to a file that repositories share:

    <hub>/models--X/snapshots/<rev>/f -> <hub>/models--X/blobs/<etag> [-> <hub>/blobs/ab/<64 hex>]

Real paths decide, never how a link is spelled: `models--a/blobs/x` can be written anywhere.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import CheckpointError, MalformedFileError
from ..files.descriptor import file_status, open_regular, unreadable

MAX_JSON = 64 << 20  # bytes; the largest tokenizer.json that we know, of Gemma 3n, has 33 MB
MAX_CONFIG = 16 << 20  # bytes; transformers takes 20 s and 0.7 GB for that much of its labels
MAX_TEXT = 256 << 20  # bytes; vocabularies and merges take a few MB, models of sentencepiece ten
TEMPLATES = "additional_chat_templates"
"""The one directory inside a model's from which transformers reads."""
_LIMITS = {".json": MAX_JSON, ".jinja": MAX_JSON} | dict.fromkeys(
    (".txt", ".model", ".tiktoken", ".spm", ".bpe", ".codes", ".vocab", ".yaml"), MAX_TEXT
)
"""Suffix -> bytes of what a tokenizer's or processor's class reads whole."""
_NEVER_READ = {"trainer_state.json"}  # the log of a training, of any length
_SHARED = re.compile("[0-9a-f]{64}")


def true_place(path: Path, directory: Path) -> Path:
    """Find where a file of a model truly lies, which is the one rule of what belongs to it.

    Args:
        path: The file's name, perhaps a link; what it leads to need not exist.
        directory: The model directory.

    Returns:
        The path without any link.

    Raises:
        CheckpointError: It is outside of the model.
    """
    place, home = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    blobs = _blobs_beside(home)
    if place.is_relative_to(home) or (blobs is not None and place.parent == blobs):
        return place
    if blobs is not None and hub_blob(path) is not None and _is_shared(place, blobs.parents[1]):
        return place
    raise CheckpointError(
        f"{path}: a link to {place}, outside of the model directory and of the blobs of its own "
        "repository in a Hub cache; copy the file there or link the whole directory"
    )


def open_inside(path: Path, directory: Path | None = None) -> int:
    """Open a file of a model for reading.

    Args:
        path: The file's name in the model directory, perhaps a link.
        directory: The model directory, by default the one that holds `path`.

    Returns:
        A descriptor of the regular file, which truly lies in the model: what was opened is what
        was looked at before, though a link may be changed meanwhile.

    Raises:
        CheckpointError: It lies elsewhere, or became another file meanwhile.
        MalformedFileError: It is no regular file.
        OSError: As `os.open` raises.
    """
    if directory is None and not os.path.islink(path):
        return open_regular(path, follow=False)
    place = true_place(path, path.parent if directory is None else directory)
    looked_at = os.lstat(place)
    fd = open_regular(path)
    try:
        if not os.path.samestat(os.fstat(fd), looked_at):
            raise CheckpointError(f"{path}: became another file while it was opened; run again")
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_inside(path: Path, limit: int) -> bytes:
    """Read a small file of a model whole.

    Args:
        path: The file's name in the model directory.
        limit: The most bytes that it may have; of a larger one nothing is read.

    Returns:
        Its bytes.

    Raises:
        FileNotFoundError: It is not there.
        CheckpointError: It lies elsewhere, cannot be opened or is too large.
        MalformedFileError: It is no regular file.
        UnreadableFileError: The system cannot read it.
    """
    return _read(path, limit, open_inside)


def read_linked(path: Path, limit: int) -> bytes:
    """Read a small file whole, wherever it lies, as `read_inside` does with one of the model.

    What is not given on may be a link to anywhere: people share tokenizers so.
    """
    return _read(path, limit, open_regular)


def _read(path: Path, limit: int, opener: Callable[[Path], int]) -> bytes:
    try:
        fd = opener(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
    with os.fdopen(fd, "rb") as file:
        check_size(path, file_status(fd, str(path)).st_size, limit)
        try:
            return file.read(limit)
        except OSError as error:
            raise unreadable(str(path), error) from error


def check_size(path: Path, size: int, limit: int) -> None:
    """Raise CheckpointError when a file of `size` bytes has more than `limit`."""
    if size > limit:
        raise CheckpointError(
            f"{path}: {size:,} bytes, over {limit >> 20} MiB, which no model needs; "
            "remove it or download it again"
        )


def check_directory(directory: Path) -> None:
    """Look over a model directory before others open files in it: one stat for each name.

    They open what has the right name and read it whole: a pipe would hold them for ever, a file
    of a terabyte take all memory. A link counts as what it leads to, or as absent. Shards are for
    this package alone to open, which says what is wrong with one.

    Args:
        directory: The model directory.

    Raises:
        MalformedFileError: Something in it is neither a file nor a directory.
        CheckpointError: Settings, a template or a vocabulary are larger than any model's, or the
            directory cannot be listed.
    """
    for entry in _entries(directory):
        try:
            status = entry.stat()
        except OSError:
            continue
        if stat.S_ISDIR(status.st_mode) or entry.name.endswith(".safetensors"):
            continue
        if not stat.S_ISREG(status.st_mode):
            raise MalformedFileError(
                f"{entry.path}: expected a regular file, found a pipe, socket or device; remove it"
            )
        limit = size_limit(entry.name)
        if limit is not None:
            check_size(Path(entry.path), status.st_size, limit)


def size_limit(name: str) -> int | None:
    """The most bytes of a file of this name, which somebody reads whole; None for any other."""
    if name == "config.json":
        return MAX_CONFIG
    return None if name in _NEVER_READ else _LIMITS.get(os.path.splitext(name)[1].lower())


def hub_blob(path: Path) -> Path | None:
    """The blob that `path` links to in its own repository of a Hub cache, else None.

    Exactly one hop, so that the name is the blob's own.
    """
    try:
        link = os.readlink(path)
    except OSError:  # no link, or no such file
        return None
    directory = os.path.realpath(path.parent)
    parent, name = os.path.split(os.path.join(directory, link))
    blobs = _blobs_beside(Path(directory))
    if blobs is None or name in ("", ".", "..") or Path(os.path.realpath(parent)) != blobs:
        return None
    return blobs / name


def _blobs_beside(directory: Path) -> Path | None:
    """The blobs of the repository whose snapshot a real directory is or lies in.

    It is compared with real paths only, so blobs that are a link themselves are equal to none.
    """
    for place in (directory, *directory.parents):
        repository = place.parent.parent
        if place.parent.name == "snapshots" and repository.name.startswith("models--"):
            return repository / "blobs"
    return None


def _is_shared(place: Path, hub: Path) -> bool:
    """Whether a file lies where the Hub's client keeps what repositories share."""
    return bool(_SHARED.fullmatch(place.name)) and (
        place == hub / "blobs" / place.name[:2] / place.name
    )


def _entries(directory: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            yield from entries
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be listed: {error.strerror}") from error
    with contextlib.suppress(OSError), os.scandir(directory / TEMPLATES) as entries:
        yield from entries
