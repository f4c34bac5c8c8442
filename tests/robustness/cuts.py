"""Checkpoints cut into shards in every way that matters to what may be removed when.

The biases of a linear are made from its qzeros and borrow its scales: the shard of the qzeros needs
the shard of the scales. A cut decides which shards need which.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.helpers.builders import (
    CONFIG,
    Cut,
    cut_apart,
    cut_evenly,
    llama_tensors,
    write_checkpoint,
)
from tests.helpers.paths import FIXTURES

PUBLIC = [
    row["name"]
    for row in json.loads((FIXTURES / "catalog.json").read_text())
    if not row["expect_error"]
]
"""The committed checkpoints that load."""


def shard(number: int, of: int) -> str:
    """The name of a shard; `number` from 0 on."""
    return f"model-{number + 1:05}-of-{of:05}.safetensors"


def cut_by_type(*order: str) -> Cut:
    """All qzeros in one shard, all scales in another: one needs the other whole."""

    def cut(names: Sequence[str]) -> Mapping[str, str]:
        homes = {part: i for i, part in enumerate(order)}
        return {n: shard(homes.get(n.rpartition(".")[2], len(order)), len(order) + 1)
                for n in names}  # fmt: skip

    return cut


def cut_in_a_cycle(names: Sequence[str]) -> Mapping[str, str]:
    """Two shards that need each other, and a third that needs nothing."""
    homes = {("0", "qzeros"): 0, ("0", "scales"): 1, ("1", "qzeros"): 1, ("1", "scales"): 0}

    def home(name: str) -> int:
        layer = name.split(".")[2] if ".layers." in name else ""
        return homes.get((layer, name.rpartition(".")[2]), 2)

    return {n: shard(home(n), 3) for n in names}


def cut_in_a_ring(names: Sequence[str]) -> Mapping[str, str]:
    """Four shards, each of which needs the next."""
    count, linears = 4, sorted({n.rpartition(".")[0] for n in names if n.endswith(".qzeros")})

    def home(name: str) -> int:
        linear, _, part = name.rpartition(".")
        if linear not in linears:
            return 0
        return (linears.index(linear) + (part == "scales")) % count

    return {n: shard(home(n), count) for n in names}


def cut_in_a_chain(names: Sequence[str]) -> Mapping[str, str]:
    """Four shards, each of which needs the one before, and the first needs none."""
    linears = sorted({n.rpartition(".")[0] for n in names if n.endswith(".qzeros")})

    def home(name: str) -> int:
        linear, _, part = name.rpartition(".")
        if linear not in linears:
            return 0
        link = linears.index(linear) % 3
        return link if part == "scales" else link + 1

    return {n: shard(home(n), 4) for n in names}


def cut_between_linears(shards: int) -> Cut:
    """Runs of whole linears: no shard needs another."""

    def cut(names: Sequence[str]) -> Mapping[str, str]:
        modules = sorted({n.rpartition(".")[0] for n in names})
        size = -(-len(modules) // shards)
        return {n: shard(modules.index(n.rpartition(".")[0]) // size, shards) for n in names}

    return cut


def cut_at_random(homes: Sequence[int]) -> Cut:
    """Each tensor in the shard that `homes` gives for it, in turn; numbers of shards left out are
    closed up.
    """

    def cut(names: list[str]) -> dict[str, str]:
        found = [homes[i % len(homes)] for i in range(len(names))]
        numbers = {home: i for i, home in enumerate(sorted(set(found)))}
        return {n: shard(numbers[h], len(numbers)) for n, h in zip(names, found, strict=True)}

    return cut


def cut_by_seed(seed: int, shards: int) -> Cut:
    """A random home for each tensor."""
    source = random.Random(seed)
    return lambda names: cut_at_random([source.randrange(shards) for _ in names])(names)


CUTS: dict[str, Cut | None] = {
    "one file": None,
    "by size": cut_evenly(3),
    "by size into 7": cut_evenly(7),
    "between linears": cut_between_linears(3),
    "apart": cut_apart(3),
    "by type": cut_by_type("qzeros", "scales", "qweight"),
    "by type, scales first": cut_by_type("scales", "qzeros"),
    "a cycle": cut_in_a_cycle,
    "a ring": cut_in_a_ring,
    "a chain": cut_in_a_chain,
    "at random": cut_by_seed(1, 4),
    "at random into 8": cut_by_seed(2, 8),
}


def write(directory: Path, name: str, seed: int = 0) -> Path:
    """A checkpoint by the name of a cut, or a copy of a committed one."""
    if name in CUTS:
        return write_checkpoint(directory, llama_tensors(seed), CUTS[name])
    return Path(shutil.copytree(FIXTURES / name, directory))


def write_tiny(directory: Path, cut: Cut | None = CUTS["by size"], **config: object) -> Path:
    """A tiny llama; `config`: what its config says otherwise, and `seed` for other weights."""
    seed = config.pop("seed", 0)
    assert isinstance(seed, int)
    return write_checkpoint(directory, llama_tensors(seed), cut, {**CONFIG, **config})


def as_snapshot(place: Path, source: Path) -> Path:
    """A model as the Hub's client lays it out: a snapshot of links to blobs named by SHA-256."""
    repository = place / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / ("c" * 40), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in source.iterdir():
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot
