"""Loading a part of a model reads and needs only the entries of that part."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from paroquant_stream import convert_checkpoint, load
from paroquant_stream.backends.mlx_lm import MlxLm
from paroquant_stream.checkpoint.config import ModelConfig
from paroquant_stream.conversion.request import make_request
from paroquant_stream.conversion.staleness import staleness
from paroquant_stream.distributed.partition import Partition
from paroquant_stream.distributed.split import Split
from paroquant_stream.errors import (
    CheckpointError,
    EntryDamagedError,
)
from paroquant_stream.files.digest_cache import SAMPLE_SIZE, SAMPLES
from paroquant_stream.model import assemble as model
from paroquant_stream.model import entries as weights
from paroquant_stream.model.assemble import needed_entries
from paroquant_stream.store import damage
from tests.benchmarks.end_to_end.checkpoint import make_checkpoint
from tests.helpers.layers import of_layers
from tests.helpers.parameters import assert_same, parameters
from tests.helpers.paths import FIXTURES
from tests.helpers.pipeline_rank import read_bytes

pytestmark = pytest.mark.usefixtures("on_the_cpu")
MOE = "qwen3_moe-awq-adversarial"  # its experts are spread over the shards


@pytest.fixture
def deep(tmp_path, settled) -> Path:
    """Convert a llama of eight layers in eight shards, 16 MB."""
    shapes = {"vocab": 256, "hidden": 512, "intermediate": 1536, "heads": 8, "kv_heads": 2}
    make_checkpoint(tmp_path / "deep", layers=8, shards=8, **shapes)
    convert_checkpoint(tmp_path / "deep")
    return tmp_path / "deep"


def entries(directory: Path, layers: range):
    """Return the store, the entries of these layers, and the others."""
    manifest, store = convert_checkpoint(directory), make_request(directory).store
    needed = needed_entries(Split(layers), ModelConfig.read(directory), manifest, False)
    assert needed
    return store, needed, [record for record in manifest.entries if record not in needed]


def flip_last_bit(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="no count of bytes read")
def test_only_bytes_of_its_own_layers_are_read(deep):
    """Besides the tensors: config, tokenizer, each entry's header twice (also by MLX), and of
    each entry and shard a sample.
    """
    load(deep)  # imports, and fills the digest cache
    manifest, before, read = convert_checkpoint(deep), read_bytes(), {}
    for layers in (range(8), range(4), range(4, 8), range(2, 3)):
        load(deep, layers=layers)
        read[layers], before = read_bytes() - before, read_bytes()
    for layers, count in read.items():
        own = Partition(MlxLm(), layers).reads
        opened = manifest.entries_with(own)
        size = sum(t.nbytes for record in opened for t in record.tensors if own(t.name))
        sampled = SAMPLES * SAMPLE_SIZE * (len(opened) + len(manifest.entries))
        assert size <= count <= size + sampled + 65_536 * len(opened) + 100_000, layers
    assert max(read[range(4)], read[range(4, 8)]) < 0.55 * read[range(8)]


def test_memory_holds_only_its_own_layers(deep, monkeypatch):
    checked = []
    monkeypatch.setattr(model, "_check_memory", checked.append)  # private: gets the byte count
    load(deep, layers=range(2, 4))
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.clear_cache()  # else a larger buffer of another test is reused
    mx.reset_peak_memory()
    found = load(deep, layers=range(2, 4))[0]
    own = sum(array.nbytes for array in parameters(found).values())
    assert checked == [own, own]
    assert own <= mx.get_peak_memory() - before < 1.1 * own


def test_pieces_of_other_layers_are_not_joined(monkeypatch):
    real, joined = mx.eval, []
    monkeypatch.setattr(mx, "eval", lambda *arrays: joined.append(arrays) or real(*arrays))
    load(FIXTURES / MOE)
    whole = len(joined)
    joined.clear()
    load(FIXTURES / MOE, layers=range(1))
    assert 1 < len(joined) < whole


def test_lazy_leaves_a_part_unread(monkeypatch):
    convert_checkpoint(FIXTURES / MOE)
    monkeypatch.setattr(mx, "eval", lambda *_: pytest.fail("something was evaluated"))
    monkeypatch.setattr(mx, "async_eval", lambda *_: pytest.fail("something was evaluated"))
    load(FIXTURES / MOE, lazy=True, layers=range(1))


def test_entries_of_other_layers_may_be_missing(deep):
    layers = range(2, 4)
    store, needed, others = entries(deep, layers)
    assert len(needed) in range(3, 6)  # those of the layers, of the embedding and of the head
    expected = of_layers(parameters(load(deep)[0]), layers)
    for record in others:
        store.entry_path(record.key).unlink()
        (deep / record.shard).unlink()
    assert_same(parameters(load(deep, layers=layers)[0]), expected)
    with pytest.raises(CheckpointError, match=others[0].shard):
        load(deep)


def test_part_of_an_in_place_conversion_is_enough(deep):
    layers = range(6, 8)
    manifest = convert_checkpoint(deep, in_place=True)
    store = make_request(deep, in_place=True).store
    needed = needed_entries(Split(layers), ModelConfig.read(deep), manifest, False)
    shutil.rmtree(make_request(deep).store.root)
    for record in manifest.entries:
        if record not in needed:
            store.entry_path(record.key).unlink()
            (deep / record.shard).unlink()
    load(deep, layers=layers)
    assert not make_request(deep).store.root.exists()


def test_a_missing_entry_of_its_own_is_converted_again(deep):
    layers = range(2, 4)
    store, needed, others = entries(deep, layers)
    expected = of_layers(parameters(load(deep)[0]), layers)
    for record in (needed[1], others[0]):
        store.entry_path(record.key).unlink()
    assert_same(parameters(load(deep, layers=layers)[0]), expected)
    assert store.entry_size(needed[1].key) == needed[1].size
    store.entry_path(needed[1].key).unlink()
    (deep / needed[1].shard).unlink()
    with pytest.raises(CheckpointError, match=needed[1].shard):
        load(deep, layers=layers)


def test_a_changed_shard_of_other_layers_is_stale(deep):
    request, layers = make_request(deep), range(2, 4)
    _, _, others = entries(deep, layers)
    manifest = convert_checkpoint(deep)

    def needed(found):
        return needed_entries(Split(layers), ModelConfig.read(deep), found, False)

    assert staleness(request, manifest, True, needed) is None
    path = deep / others[0].shard
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert others[0].shard in staleness(request, manifest, True, needed)


def test_full_hashes_only_the_entries_of_the_part(deep, monkeypatch):
    layers = range(2, 4)
    store, needed, others = entries(deep, layers)
    flip_last_bit(store.entry_path(others[0].key))
    real, hashed = damage.hash_entry, []

    def recorded(fd, tensors, label, *rest):
        hashed.append(label)
        return real(fd, tensors, label, *rest)

    monkeypatch.setattr(damage, "hash_entry", recorded)
    load(deep, layers=layers, verify="full")
    assert sorted(hashed) == sorted(str(store.entry_path(record.key)) for record in needed)
    flip_last_bit(store.entry_path(needed[1].key))
    request = make_request(deep)
    with pytest.raises(EntryDamagedError, match=needed[1].key):
        weights.read_weights(
            convert_checkpoint(deep), request.store, Partition(MlxLm(), layers).reads, full=True
        )


def test_a_truncated_entry_of_a_part_is_converted_again(deep, monkeypatch):
    """The missing entries of other layers do not disturb the search for the damaged one."""
    layers, real, cut = range(2, 4), model.read_weights, []
    store, needed, others = entries(deep, layers)
    expected = of_layers(parameters(load(deep)[0]), layers)
    for record in others:
        store.entry_path(record.key).unlink()

    def read_then_cut(*arguments, **options):
        found = real(*arguments, **options)
        if not cut:
            cut.append(store.entry_path(needed[1].key))
            os.truncate(cut[0], needed[1].size // 2)
        return found

    monkeypatch.setattr(model, "read_weights", read_then_cut)
    assert_same(parameters(load(deep, layers=layers)[0]), expected)
    assert cut


def test_a_read_that_fails_at_once_is_examined_too(model_dir, monkeypatch):
    """A read may fail before `async_eval` returns, which then raises."""
    expected = parameters(load(model_dir)[0])
    store, needed, _ = entries(model_dir, range(1))
    fired = []

    def begin(arrays):
        if not fired:
            fired.append(store.entry_path(needed[0].key))
            os.truncate(fired[0], needed[0].size // 2)
            raise RuntimeError("[read] Unable to read from file.")

    monkeypatch.setattr(mx, "async_eval", begin)
    assert_same(parameters(load(model_dir)[0]), expected)
    assert fired
