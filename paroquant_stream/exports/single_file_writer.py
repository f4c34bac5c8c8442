"""write_single_file(): a converted model as one `converted_mlx.safetensors`, in a stream.

    entry --4 MB--> its XXH3, and the place of those bytes in the new file --> read back --> rename

Every entry is read once, front to back. A piece of a stack is a range of the whole stack, since
pieces are cut along the first axis. The file's name appears only when every entry was the one that
its record describes and the file, read back, is hashed.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from ..conversion.in_place import converted
from ..conversion.progress import FileProgress, Progress
from ..conversion.request import Request
from ..errors import EntryDamagedError, UnwritableFileError
from ..files import temp_files
from ..files.atomic_file import AtomicFile, write_problem
from ..files.descriptor import closing
from ..files.folder import Folder
from ..files.hashing import CHUNK, read_chunks
from ..files.tensor_header import TensorInfo, TensorSpec
from ..files.tensor_writer import end_of, lay_out, layout_defect
from ..progress_bar import FILES, SHARDS
from ..store.damage import forget_pages, take_out
from ..store.format import stacks_in_pieces
from ..store.lock import locks_exclude
from ..store.manifest import EntryRecord, Manifest
from ..store.store import Store
from ..text import bytes_text
from .single_file import NAME, hash_single, metadata_of, with_digest

logger = logging.getLogger(__name__)


def export_single_file(
    request: Request,
    out: Path | None = None,
    phase: Callable[[str], Progress | None] = lambda _: None,
    *,
    beside_shards: bool = False,
) -> tuple[Path, int]:
    """Write a model's single file, after converting what is missing.

    Args:
        request: The model.
        out: A file or a directory; None for the model's own directory.
        phase: Gives the callbacks of the conversion and of the file that is written.
        beside_shards: Write it also where other `.safetensors` files lie.

    Returns:
        The path of the file and its bytes.

    Raises:
        UnwritableFileError: The file exists, lies beside shards or cannot be written.
        EntryDamagedError: An entry was damaged, converted again, and damaged again.
    """
    if request.source.remote and out is None:
        raise UnwritableFileError(
            f"{request.source.name}: say where {NAME} shall be; a Hub cache is not ours"
        )
    out = out or request.source.directory
    path = out / NAME if os.path.isdir(out) else out
    _check_free(path)  # before hours of conversion
    if not beside_shards:
        _check_alone(path)

    def attempt() -> int:
        manifest, store = converted(request, phase(SHARDS))
        return write_single_file(manifest, store, path, phase(FILES))

    try:
        return path, attempt()
    except EntryDamagedError as error:
        logger.warning("%s", error)
    return path, attempt()


def _check_free(path: Path) -> None:
    if os.path.lexists(path):
        raise UnwritableFileError(f"{path}: is there already; remove it to have it written anew")


def _check_alone(path: Path) -> None:
    """Raise UnwritableFileError if a program could take `path` for one more shard of the model."""
    others = sorted(p.name for p in path.parent.glob("*.safetensors") if p.name != NAME)
    if others:
        count = f" and {len(others) - 1} more" if others[1:] else ""
        raise UnwritableFileError(
            f"{path.parent}: holds {others[0]}{count}, and programs that read every .safetensors "
            "file there would read the model twice; write into another directory, or add "
            "--beside-shards"
        )


def write_single_file(
    manifest: Manifest, store: Store, path: Path, progress: Progress | None = None
) -> int:
    """Write the converted model as one file; memory stays at a few MB.

    Tensors keep the checkpoint's names and their bits; stacks of experts are whole. An error leaves
    no file behind.

    Returns:
        The file's bytes.

    Raises:
        UnwritableFileError: `path` exists or cannot be written.
        EntryDamagedError: An entry is not what was written; it was taken out of use.
        StoreError: An entry is absent.
    """
    _check_free(path)
    specs = {tensor.name: tensor for record in manifest.entries for tensor in record.tensors}
    stacks = stacks_in_pieces(specs)
    sources = {record.shard: record.source_sha256 for record in manifest.entries}
    header, tensors = lay_out(_joined(specs, stacks), metadata_of(sources))
    places = _places(tensors, specs, stacks)
    size = end_of(header, tensors)
    count = FileProgress(path.name, sum(spec.nbytes for spec in specs.values()), progress)
    logger.info("%s: writing %s", path, bytes_text(size))
    with _new_file(path, size) as fd:
        _write_at(fd, memoryview(header), 0)
        for record in manifest.entries:
            _copy_entry(record, store, fd, places, count)
        digest = hash_single(fd, len(header), str(path))
        _write_at(fd, memoryview(with_digest(header, digest)), 0)
    return size


def _joined(specs: dict[str, TensorSpec], stacks: dict[str, list[str]]) -> list[TensorSpec]:
    """Return the tensors of the file: stacks in place of their pieces."""
    pieces = {name for names in stacks.values() for name in names}
    found = [spec for name, spec in specs.items() if name not in pieces]
    for stack, names in stacks.items():
        first = specs[names[0]]
        experts = sum(specs[name].shape[0] for name in names)
        found.append(TensorSpec(stack, first.dtype, (experts, *first.shape[1:])))
    return found


def _places(
    tensors: tuple[TensorInfo, ...], specs: dict[str, TensorSpec], stacks: dict[str, list[str]]
) -> dict[str, int]:
    """Return where each tensor of an entry begins in the file."""
    places = {tensor.name: tensor.start for tensor in tensors}
    for stack, names in stacks.items():
        start = places.pop(stack)
        for name in names:
            places[name] = start
            start += specs[name].nbytes
    return places


def _copy_entry(
    record: EntryRecord, store: Store, target: int, places: dict[str, int], count: FileProgress
) -> None:
    """Copy an entry's tensors to their places. Raises EntryDamagedError for other bytes."""
    label = str(store.entry_path(record.key))
    problem: str | None = None
    for _ in range(2):  # one bad read is no damage
        with closing(store.open_entry(record.key)) as fd:
            problem = layout_defect(fd, record.tensors, label)
            if not problem:
                digest = _copy_tensors(record, fd, label, target, places, count)
                if digest == record.digest:
                    return
                problem = f"expected XXH3 {record.digest}, found {digest}"
            forget_pages(fd)
    raise take_out(store, record, problem or "")


def _copy_tensors(
    record: EntryRecord,
    fd: int,
    label: str,
    target: int,
    places: dict[str, int],
    count: FileProgress,
) -> str:
    header, tensors = lay_out(record.tensors)
    digest = xxhash.xxh3_128(header)
    buffer = memoryview(bytearray(CHUNK))
    for tensor in tensors:  # in file order and without holes, so every byte is hashed
        place = places[tensor.name]
        for chunk in read_chunks(fd, tensor.start, tensor.stop, label, buffer):
            digest.update(chunk)
            _write_at(target, chunk, place)
            place += len(chunk)
            count.add(len(chunk))
    return digest.hexdigest()


def _write_at(fd: int, view: memoryview, place: int) -> None:
    while view:
        count = os.pwrite(fd, view, place)
        view, place = view[count:], place + count


@contextlib.contextmanager
def _new_file(path: Path, size: int) -> Iterator[int]:
    """Yield a descriptor of a temp beside `path`, published under that name after the body.

    Removed when the body raises. Raises UnwritableFileError.
    """
    try:
        with Folder.open(path.parent) as folder:
            with contextlib.suppress(OSError):
                temp_files.sweep_beside(folder, path.name, locks_exclude(folder))
            temp = temp_files.name_beside(path.name)
            file = AtomicFile(folder, temp, size, 0o666, direct=False)
            try:
                yield file.fd
                file.publish(folder, path.name, size)
            finally:
                file.discard()
    except OSError as error:  # reads of entries raise errors of their own kinds
        raise UnwritableFileError(write_problem(path, size, error)) from error
