"""Entries as arrays: only what was written, pieces of stacks joined in the order of the experts."""

from __future__ import annotations

import os
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from paroquant_stream.api.convert import convert_checkpoint
from paroquant_stream.api.load import load
from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import AssemblyError, EntryDamagedError, StoreError
from paroquant_stream.exports.mlx_directory_writer import export_model
from paroquant_stream.exports.single_file_writer import export_single_file
from paroquant_stream.model import assemble as model
from paroquant_stream.model.entries import read_weights
from paroquant_stream.model.experts import join_pieces, stack_experts
from paroquant_stream.store import damage
from tests.helpers.builders import flip, remember


@pytest.fixture
def converted(model_dir):
    request = make_request(model_dir, jobs=1)
    return convert(request).manifest, request.store


def everything(_name: str) -> bool:
    return True


def test_every_tensor_of_the_manifest_is_read(converted):
    manifest, store = converted
    weights = read_weights(manifest, store, everything)
    assert {name: array.shape for name, array in weights.items()} == {
        tensor.name: tensor.shape for record in manifest.entries for tensor in record.tensors
    }


def test_an_entry_without_a_wanted_tensor_is_not_opened(converted):
    manifest, store = converted
    only = next(t.name for t in manifest.entries[0].tensors)
    for record in manifest.entries[1:]:
        store.entry_path(record.key).unlink()
    assert set(read_weights(manifest, store, only.__eq__)) == {only}


@pytest.mark.parametrize("position", [9, 20_000, -1])
def test_a_flipped_bit_is_noticed_and_the_entry_taken_out_of_use(converted, position):
    manifest, store = converted
    path = store.entry_path(manifest.entries[0].key)
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(EntryDamagedError, match=manifest.entries[0].key):
        read_weights(manifest, store, everything)
    assert not path.exists()


def test_a_truncated_or_absent_entry_is_noticed(converted):
    manifest, store = converted
    path = store.entry_path(manifest.entries[0].key)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EntryDamagedError, match="bytes, found"):
        read_weights(manifest, store, everything)
    with pytest.raises(StoreError, match="cannot be opened"):
        read_weights(manifest, store, everything)


def test_an_entry_as_its_writer_left_it_is_not_hashed_again(converted, monkeypatch):
    manifest, store = converted
    monkeypatch.setattr(
        "paroquant_stream.store.damage.hash_entry", lambda *_: pytest.fail("hashed")
    )
    assert read_weights(manifest, store, everything)


def test_pieces_are_joined_in_the_order_of_the_experts():
    def piece(*experts: int) -> mx.array:
        return mx.array(np.array([[e] for e in experts], np.uint32))

    joined = join_pieces(
        {
            "x.experts_10_10": piece(10),
            "x.experts_0_1": piece(0, 1),
            "x.experts_2_9": piece(*range(2, 10)),
        },
        lazy=False,
    )
    assert list(joined) == ["x"]
    assert joined["x"].flatten().tolist() == list(range(11))


def test_a_missing_run_of_experts_is_named():
    with pytest.raises(AssemblyError, match="x: experts 0 to 1 are in no entry"):
        join_pieces({"x.experts_2_3": mx.zeros((2, 1))}, lazy=False)


def test_unquantized_experts_are_stacked():
    weights = {f"l.experts.{e}.up_proj.weight": mx.full((2, 2), e) for e in range(12)}
    stacked = stack_experts(weights)
    assert stacked["l.switch_mlp.up_proj.weight"].shape == (12, 2, 2)
    assert stacked["l.switch_mlp.up_proj.weight"][10, 0, 0].item() == 10
    with pytest.raises(AssemblyError, match="experts are missing between 0 and 2"):
        stack_experts({f"l.experts.{e}.up_proj.weight": mx.zeros(1) for e in (0, 2)})


@pytest.mark.usefixtures("settled")
def test_a_changed_header_is_noticed_although_its_stat_is_remembered(converted):

    manifest, store = converted
    record = manifest.entries[0]
    path = store.entry_path(record.key)
    path.write_bytes(path.read_bytes().replace(b'"F16"', b'"U16"', 1))
    remember(store.digest_cache, path, record.digest)
    with pytest.raises(EntryDamagedError, match="the header is not the one that was written"):
        read_weights(manifest, store, everything)


@pytest.mark.usefixtures("settled")
def test_an_entry_that_nothing_is_known_of_is_hashed_once(converted, monkeypatch):
    manifest, store = converted
    for memo in store.folder("memo").iterdir():
        memo.unlink()
    real, hashed = damage.hash_entry, []
    monkeypatch.setattr(damage, "hash_entry", lambda *a: hashed.append(1) or real(*a))
    for _ in range(3):
        assert defect(manifest.entries[0], store, full=False) is None
    assert len(hashed) == 1


@pytest.mark.usefixtures("settled")
def test_a_digest_that_is_known_must_be_that_of_the_record(converted):
    manifest, store = converted
    other = replace(manifest.entries[0], digest="0" * 32)
    assert f"expected XXH3 {other.digest}" in defect(other, store, full=False)


@pytest.mark.usefixtures("settled")
def test_an_entry_that_changed_meanwhile_is_hashed_again(converted, monkeypatch):
    manifest, store = converted
    path = store.entry_path(manifest.entries[0].key)
    real, hashed = damage.hash_entry, []

    def hash_then_change(fd, label):
        digest = real(fd, label)
        if not hashed:
            flip(path, path.stat().st_size - 1)
        hashed.append(digest)
        return digest

    monkeypatch.setattr(damage, "hash_entry", hash_then_change)
    assert defect(manifest.entries[0], store, full=True) is None
    assert "expected XXH3" in defect(manifest.entries[0], store, full=False)


def defect(record, store, full: bool) -> str | None:
    """What is found wrong with the entry as it lies there now."""
    from paroquant_stream.model.entries import _defect

    fd = os.open(store.entry_path(record.key), os.O_RDONLY)
    try:
        return _defect(record, store, fd, full)
    finally:
        os.close(fd)


@pytest.mark.parametrize("stride", [15, pytest.param(1, marks=pytest.mark.long)])
def test_every_flipped_bit_of_an_entry_is_found(converted, stride):
    """Each bit, or each fifth, of the length, the header's text and the data; of the padding each
    77th. Without a remembered stat the default check finds them too.
    """
    manifest, store = converted
    record = min(manifest.entries, key=lambda record: record.size)
    path = store.entry_path(record.key)
    good = path.read_bytes()
    text = 8 + good[8:].index(b"}}") + 2
    bits = [*range(text * 8), *range(text * 8, 16_384 * 8, 77), *range(16_384 * 8, len(good) * 8)]
    assert defect(record, store, full=True) is None
    fd = os.open(path, os.O_WRONLY)
    missed = []
    for bit in bits[::stride]:
        os.pwrite(fd, bytes([good[bit // 8] ^ 1 << bit % 8]), bit // 8)
        if defect(record, store, full=True) is None or defect(record, store, full=False) is None:
            missed.append(bit)
        os.pwrite(fd, good[bit // 8 : bit // 8 + 1], bit // 8)
    os.close(fd)
    assert missed == []
    assert defect(record, store, full=True) is None


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.long)])
def test_every_truncation_and_an_appended_byte_are_found(converted, stride):
    manifest, store = converted
    record = manifest.entries[0]
    path = store.entry_path(record.key)
    with path.open("ab") as file:
        file.write(b"\0")
    assert "bytes, found" in defect(record, store, full=False)
    for size in range(record.size - 1, -1, -stride):
        os.truncate(path, size)
        assert "bytes, found" in defect(record, store, full=False)


@pytest.mark.parametrize("size", [0, -1])
def test_an_entry_that_was_cut_after_it_was_opened_is_no_weights(
    model_dir, monkeypatch, size, caplog
):
    """As MLX before 0.32.4, which gives zeros for what it cannot read any more."""
    manifest = convert_checkpoint(model_dir, jobs=1)
    store, record = make_request(model_dir).store, manifest.entries[1]
    real, cut = model.mx.eval, []

    def cut_then_give_zeros(arrays):
        if not cut:
            cut.append(record.key)
            os.truncate(store.entry_path(record.key), record.size + size if size else 0)
            return
        real(arrays)

    monkeypatch.setattr(model.mx, "async_eval", lambda _: None)
    monkeypatch.setattr(model.mx, "eval", cut_then_give_zeros)
    load(model_dir, jobs=1)
    assert cut
    assert "became shorter while it was read" in caplog.text
    assert store.entry_size(record.key) == record.size  # made again


@pytest.mark.parametrize("form", ["export", "single file"])
def test_a_file_that_was_cut_after_it_was_opened_is_an_error(
    model_dir, tmp_path, monkeypatch, form
):
    if form == "export":
        export_model(model_dir, tmp_path / "out")
        place, path = tmp_path / "out", tmp_path / "out" / "model.safetensors"
    else:
        place, (path, _) = model_dir, export_single_file(make_request(model_dir))
    monkeypatch.setattr(model.mx, "async_eval", lambda _: None)
    monkeypatch.setattr(model.mx, "eval", lambda _: os.truncate(path, path.stat().st_size - 1))
    with pytest.raises(AssemblyError, match=f"{path}: its size changed while it was read"):
        load(place)
