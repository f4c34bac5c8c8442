"""Checks which files belong to a model: their real paths, types and sizes.

A link may lead anywhere inside the model directory and, from a snapshot in a Hub cache, to the
blobs of the snapshot's own repository, some of which are links to blobs that repositories share:

    <hub>/models--X/snapshots/<rev>/f -> <hub>/models--X/blobs/<etag> [-> <hub>/blobs/ab/<64 hex>]

Only real paths are compared, since the text of a link is untrusted: any directory can be named
`models--a/blobs`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import CheckpointError, MalformedFileError, MissingTokenizerError
from ..files.descriptor import file_status, open_regular, unreadable
from ..text import bytes_text

MAX_JSON = 64 << 20  # bytes; the largest known tokenizer.json, of Gemma 3n, has 33 MB
MAX_CONFIG = 16 << 20  # bytes; lower, as transformers takes long for many labels
MAX_TEXT = 256 << 20  # bytes; vocabularies and merges take a few MB, sentencepiece models ten
TEMPLATES = "additional_chat_templates"
"""The one subdirectory of a model directory from which transformers reads."""
_LIMITS = {".json": MAX_JSON, ".jinja": MAX_JSON} | dict.fromkeys(
    (".txt", ".model", ".tiktoken", ".spm", ".bpe", ".codes", ".vocab", ".yaml"), MAX_TEXT
)
"""Suffix -> the most bytes of a file that tokenizer or processor classes read whole."""
VOCABULARIES = (
    "tokenizer.json", "vocab.json", "tekken.json", "vocab.txt", "bpe.codes", "tokenizer.model",
    "tiktoken.model", "spiece.model", "spm.model", "sentencepiece.model",
    "sentencepiece.bpe.model", "tokenizer.tiktoken", "qwen.tiktoken", "hy.tiktoken",
)  # fmt: skip
"""Every tokenizer of transformers has one of these, but for those of `_OF_BYTES`."""
_OF_BYTES = {"ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer"}
_NEVER_READ = {"trainer_state.json"}  # a training log of any length
_SHARED = re.compile("[0-9a-f]{64}")


def _real_path(path: Path, directory: Path) -> Path:
    """Resolve the links of a path and check that the result belongs to the model."""
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    blobs = _blobs_of(root)
    if real.is_relative_to(root) or (blobs is not None and real.parent == blobs):
        return real
    if blobs is not None and hub_blob(path) is not None and _is_shared(real, blobs.parents[1]):
        return real
    raise CheckpointError(
        f"{path}: a link to {real}, outside of the model directory and of the blobs of its own "
        "repository in a Hub cache; copy the file there or link the whole directory"
    )


def open_inside(path: Path, directory: Path | None = None) -> int:
    """Open a file of a model for reading.

    A link that is changed between the check and the opening is noticed.

    Args:
        path: The file's path, perhaps a link.
        directory: The model directory, by default the one that holds `path`.

    Returns:
        A descriptor of a regular file that belongs to the model; the caller closes it.

    Raises:
        CheckpointError: The file is outside of the model, or was replaced meanwhile.
        MalformedFileError: It is not a regular file.
        OSError: It cannot be opened.
    """
    if directory is None and not os.path.islink(path):
        return open_regular(path, follow=False)
    real = _real_path(path, path.parent if directory is None else directory)
    expected = os.lstat(real)
    fd = open_regular(path)
    try:
        if not os.path.samestat(os.fstat(fd), expected):
            raise CheckpointError(f"{path}: was replaced while it was opened; run again")
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_inside(path: Path, limit: int) -> bytes:
    """Read a small file that belongs to the model.

    Args:
        path: The file's path in the model directory.
        limit: The most bytes that it may have; a larger file is not read.

    Returns:
        All of its bytes.

    Raises:
        FileNotFoundError: It does not exist.
        CheckpointError: It is outside of the model, cannot be opened or is too large.
        MalformedFileError: It is not a regular file.
        UnreadableFileError: The system cannot read it.
    """
    return _read(path, limit, open_inside)


def read_linked(path: Path, limit: int) -> bytes:
    """Read a small file that may be a link to anywhere.

    For files that are never copied to others: users share tokenizers between models by links.

    Args:
        path: The file's path.
        limit: The most bytes that it may have; a larger file is not read.

    Returns:
        All of its bytes.

    Raises:
        FileNotFoundError: It does not exist.
        CheckpointError: It cannot be opened or is too large.
        MalformedFileError: It is not a regular file.
        UnreadableFileError: The system cannot read it.
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
    """Check the size of a file.

    Args:
        path: The file's path, for the error.
        size: Its bytes.
        limit: The most bytes that it may have.

    Raises:
        CheckpointError: The file is larger.
    """
    if size > limit:
        raise CheckpointError(
            f"{path}: {bytes_text(size)}, over {bytes_text(limit)}, which no model needs; "
            "remove it or download it again"
        )


def check_directory(directory: Path) -> None:
    """Check the types and sizes of the files that other libraries will open.

    They open a file by its name and read it whole: a pipe would block them forever and a huge file
    fill the memory. Links are followed and dangling links ignored. Shards are left out, as only
    this package opens them and checks them then.

    Args:
        directory: The model directory.

    Raises:
        MalformedFileError: It contains a pipe, socket or device.
        CheckpointError: A settings file, template or vocabulary is too large, or the directory
            cannot be listed.
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


def why_no_tokenizer(directory: Path) -> str | None:
    """Tell that a model directory has no tokenizer, and what to do; None if it has one."""
    if any(os.path.exists(directory / name) for name in VOCABULARIES):
        return None
    with contextlib.suppress(FileNotFoundError, CheckpointError, ValueError, RecursionError):
        settings = json.loads(read_linked(directory / "tokenizer_config.json", MAX_JSON))
        if isinstance(settings, dict) and settings.get("tokenizer_class") in _OF_BYTES:
            return None
    return (
        f"{directory}: no tokenizer, so the model cannot be loaded: expected tokenizer.json, "
        "tokenizer.model, vocab.json or another vocabulary, and tokenizer_config.json; copy them "
        "from where the model came from"
    )


def check_has_tokenizer(directory: Path) -> None:
    """Check that a model directory has a tokenizer.

    Args:
        directory: A model directory that `check_directory` accepted.

    Raises:
        MissingTokenizerError: It has none.
    """
    if reason := why_no_tokenizer(directory):
        raise MissingTokenizerError(reason)


def size_limit(name: str) -> int | None:
    """Return the most bytes of a file that is read whole.

    Args:
        name: The file's name, without a directory.

    Returns:
        The limit in bytes; None for files that are not read whole.
    """
    if name == "config.json":
        return MAX_CONFIG
    return None if name in _NEVER_READ else _LIMITS.get(os.path.splitext(name)[1].lower())


def hub_blob(path: Path) -> Path | None:
    """Find the blob that a file in a snapshot of a Hub cache links to.

    Only one link is followed, so that the name is the blob's own.

    Args:
        path: The file in the snapshot.

    Returns:
        The blob in the snapshot's own repository; None if the file is not a link to one.
    """
    try:
        link = os.readlink(path)
    except OSError:  # not a link, or absent
        return None
    directory = os.path.realpath(path.parent)
    parent, name = os.path.split(os.path.join(directory, link))
    blobs = _blobs_of(Path(directory))
    if blobs is None or name in ("", ".", "..") or Path(os.path.realpath(parent)) != blobs:
        return None
    return blobs / name


def _blobs_of(directory: Path) -> Path | None:
    """Return the `blobs` of the repository whose snapshot contains a directory without links."""
    for parent in (directory, *directory.parents):
        repository = parent.parent.parent
        if parent.parent.name == "snapshots" and repository.name.startswith("models--"):
            return repository / "blobs"
    return None


def _is_shared(real: Path, hub: Path) -> bool:
    """Return whether a path is that of a blob which repositories of a Hub cache share."""
    return bool(_SHARED.fullmatch(real.name)) and (
        real == hub / "blobs" / real.name[:2] / real.name
    )


def _entries(directory: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            yield from entries
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be listed: {error.strerror}") from error
    with contextlib.suppress(OSError), os.scandir(directory / TEMPLATES) as entries:
        yield from entries
