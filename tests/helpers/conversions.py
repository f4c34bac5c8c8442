"""Conversions of small checkpoints, and what became of their shards."""

from __future__ import annotations

import shutil
from pathlib import Path

from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request
from paroquant_stream.store.store import Store, cache_store
from tests.helpers.builders import cut_evenly, llama_tensors, write_checkpoint


def convert_three_models(directory: Path) -> Store:
    """Models a, b and c of three shards each in the user's cache; b shares every entry with a."""
    write_checkpoint(directory / "a", cut=cut_evenly(3))
    shutil.copytree(directory / "a", directory / "b")
    write_checkpoint(directory / "c", llama_tensors(1), cut_evenly(3))
    for name in ("a", "b", "c"):
        run(directory / name)
    return cache_store()


def actions(result) -> dict[str, str]:
    return {report.shard[6:11].lstrip("0"): report.action for report in result.shards}


def reasons(result) -> dict[str, str]:
    return {report.shard[6:11].lstrip("0"): report.why for report in result.shards}


def run(directory, **options):
    return convert(make_request(directory, jobs=1, **options))


def flip_byte(directory, shard: int, tensor: str) -> None:
    """Changes one byte of one tensor."""
    from paroquant_stream.checkpoint.shard import Shard

    name = sorted(p.name for p in directory.glob("model-*.safetensors"))[shard - 1]
    found = {t.name: t for t in Shard(name, directory / name).header().tensors}[tensor]
    with (directory / name).open("r+b") as file:
        file.seek(found.start)
        byte = file.read(1)[0]
        file.seek(found.start)
        file.write(bytes([byte ^ 1]))


def entries(cache) -> set[str]:
    return {path.name for path in cache.rglob("*.safetensors")}
