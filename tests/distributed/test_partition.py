"""Parts of a model: a range of layers has the whole model's own parameters and reads no others."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from paroquant_stream import convert_checkpoint, load
from paroquant_stream.backends.mlx_lm import MlxLm
from paroquant_stream.checkpoint.config import ModelConfig
from paroquant_stream.conversion.request import make_request
from paroquant_stream.conversion.staleness import staleness
from paroquant_stream.distributed import partition as part
from paroquant_stream.distributed.partition import AbsentLayer, Partition, _layer_of
from paroquant_stream.distributed.split import WHOLE, Split
from paroquant_stream.errors import (
    AssemblyError,
    CheckpointError,
    EntryDamagedError,
    MissingPartError,
)
from paroquant_stream.exports.mlx_directory_writer import export_model
from paroquant_stream.files.digest_cache import SAMPLE_SIZE, SAMPLES
from paroquant_stream.files.tensor_header import TensorSpec
from paroquant_stream.model import assemble as model
from paroquant_stream.model import entries as weights
from paroquant_stream.model.assemble import needed_entries
from paroquant_stream.model.experts import placeholders
from paroquant_stream.store import damage
from tests.benchmarks.end_to_end.checkpoint import make_checkpoint
from tests.helpers.builders import write_llama
from tests.helpers.parameters import CATALOG, EXPECTED, VISION, assert_same, name_of, parameters
from tests.helpers.paths import FIXTURES
from tests.helpers.pipeline_rank import read_bytes
from tests.helpers.ranks import Rank
from tests.helpers.single_files import as_pull_request_50
from tests.helpers.single_files import export as write_single

pytestmark = pytest.mark.usefixtures("on_the_cpu")
TEXT = [row for row in CATALOG if row["expected_text"]]
MOE = "qwen3_moe-awq-adversarial"  # its experts are spread over the shards


@pytest.fixture
def deep(tmp_path, settled) -> Path:
    """A llama of eight layers in eight shards, 16 MB, converted."""
    shapes = {"vocab": 256, "hidden": 512, "intermediate": 1536, "heads": 8, "kv_heads": 2}
    make_checkpoint(tmp_path / "deep", layers=8, shards=8, **shapes)
    convert_checkpoint(tmp_path / "deep")
    return tmp_path / "deep"


def layers_of(names) -> int:
    return 1 + max(number for number in map(_layer_of, names) if number is not None)


def of_layers(found: dict, layers: range) -> dict:
    """What a model of these layers has of a whole model's parameters."""
    return {n: a for n, a in found.items() if _layer_of(n) is None or _layer_of(n) in layers}


def assert_ranges(directory: Path, whole: dict, **options) -> None:
    """The first layer, and all others, have the whole model's parameters bit for bit."""
    for layers in (range(1), range(1, layers_of(whole))):
        found = parameters(load(directory, layers=layers, **options)[0])
        assert_same(found, of_layers(whole, layers))
        assert len(found) < len(whole)


def entries(directory: Path, layers: range):
    """The store, the entries of these layers, and the others."""
    manifest, store = convert_checkpoint(directory), make_request(directory).store
    needed = needed_entries(Split(layers), ModelConfig.read(directory), manifest, False)
    assert needed
    return store, needed, [record for record in manifest.entries if record not in needed]


def flip_last_bit(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("row", TEXT, ids=name_of)
def test_a_range_of_a_text_model_has_the_expected_parameters(row):
    whole = mx.load(str(EXPECTED / row["expected_text"]))
    assert_ranges(FIXTURES / row["name"], whole, force_text=True)


@pytest.mark.parametrize("row", VISION, ids=name_of)
def test_a_range_of_a_vision_model_has_the_whole_ones_parameters_and_its_tower(row):
    whole = parameters(load(FIXTURES / row["name"])[0])
    assert_ranges(FIXTURES / row["name"], whole)


def test_a_layer_outside_of_the_range_and_the_whole_model_cannot_be_called(model_dir):
    whole, first = load(model_dir)[0], load(model_dir, layers=range(1))[0]
    x = mx.ones((1, 3, 64), mx.float16)
    assert mx.array_equal(first.model.layers[0](x), whole.model.layers[0](x))
    with pytest.raises(MissingPartError, match="layer 1 was not loaded, only 0 to 0"):
        first.model.layers[1](x)
    with pytest.raises(MissingPartError, match="layer 1 was not loaded"):
        first(mx.array([[1, 2]]))


@pytest.mark.parametrize("name", ["llama-awq-adversarial", "qwen3_5-awq-adversarial"])
def test_a_loop_over_two_halves_gives_the_whole_models_logits(name):
    """The caches that the class makes and its masks fit, for absent layers tell what they are."""
    from mlx_lm.models.base import create_attention_mask, create_ssm_mask
    from mlx_lm.models.cache import make_prompt_cache

    tokens = mx.array([[3, 5, 7]])
    x = None
    for layers in (range(1), range(1, 2)):
        half = load(FIXTURES / name, force_text=True, layers=layers)[0]
        x = half.model.embed_tokens(tokens) if x is None else x
        cache = make_prompt_cache(half)
        for number in layers:
            layer = half.model.layers[number]
            linear = getattr(layer, "is_linear", False)
            make_mask = create_ssm_mask if linear else create_attention_mask
            x = layer(x, mask=make_mask(x, cache[number]), cache=cache[number])
        assert len(cache) == 2
    head = half.language_model if hasattr(half, "language_model") else half
    x = half.model.norm(x)
    tied = "lm_head" not in head
    found = half.model.embed_tokens.as_linear(x) if tied else head.lm_head(x)
    wanted = load(FIXTURES / name, force_text=True)[0](tokens)
    assert mx.array_equal(found, wanted)


@pytest.mark.parametrize("wrong", [range(0), range(0, 2, 2), range(-1, 1), [0, 1], 3])
def test_what_is_no_range_of_layers_is_refused_before_any_work(wrong, tmp_path):
    with pytest.raises(ValueError, match="layers"):
        load(tmp_path / "absent", layers=wrong)


def test_layers_and_a_group_are_not_both_taken():
    with pytest.raises(ValueError, match="only one of the two"):
        Split(range(1), Rank(0, 1))
    assert not WHOLE.by_layers
    assert not WHOLE.by_tensors


def test_layers_that_the_model_has_not_are_named(model_dir):
    with pytest.raises(MissingPartError, match="layers 1 to 2 were requested, the model has 2"):
        load(model_dir, layers=range(1, 3))


@pytest.mark.parametrize(
    ("name", "text", "offers"),
    [
        ("llama-awq-adversarial", True, r"llama\.Model offers no pipeline; .*layers=.*parallel="),
        ("gemma4-awq-size", True, r"gemma4\.Model offers no pipeline; .*layers="),
        ("qwen3_5-awq-adversarial", False, "mlx_vlm.* offers no pipeline; .*force_text=True"),
    ],
)
def test_a_class_without_a_pipeline_is_an_error_that_names_what_it_offers(name, text, offers):
    convert_checkpoint(FIXTURES / name)
    with pytest.raises(MissingPartError, match=offers):
        load(FIXTURES / name, force_text=text, group=Rank(0, 2))


def test_more_ranks_than_layers_are_an_error():
    with pytest.raises(MissingPartError, match="no pipeline over 3 ranks"):
        load(FIXTURES / "qwen2-awq-size", group=Rank(0, 3))


@pytest.mark.parametrize("name", ["qwen2-awq-size", MOE, "qwen3_5_moe-native-size"])
def test_each_rank_has_the_layers_that_its_class_gives_it(name, monkeypatch):
    met = []
    monkeypatch.setattr(model, "barrier", met.append)  # only a group of real processes can meet
    whole = parameters(load(FIXTURES / name, force_text=True)[0])
    for rank, layers in ((0, range(1, 2)), (1, range(1))):
        found = load(FIXTURES / name, force_text=True, group=Rank(rank, 2))[0]
        assert_same(parameters(found), of_layers(whole, layers))
        assert len(found.layers) == 1
    assert [group.rank() for group in met] == [0, 1]


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="no count of bytes read")
def test_only_bytes_of_its_own_layers_are_read(deep):
    """Beside the tensors: config, tokenizer, of each entry the header, by us and by MLX, and of
    each entry and shard a sample.
    """
    load(deep)  # whatever is imported or remembered at the first load
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
    monkeypatch.setattr(model, "_check_memory", checked.append)
    load(deep, layers=range(2, 4))
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.clear_cache()  # a buffer that another test left may be larger than what is put into it
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


def test_entries_and_sources_of_other_layers_need_not_be_there(deep):
    layers = range(2, 4)
    store, needed, others = entries(deep, layers)
    assert len(needed) in range(3, 6)  # those of the layers, of the embedding and of the head
    wanted = of_layers(parameters(load(deep)[0]), layers)
    for record in others:
        store.entry_path(record.key).unlink()
        (deep / record.shard).unlink()
    assert_same(parameters(load(deep, layers=layers)[0]), wanted)
    with pytest.raises(CheckpointError, match=others[0].shard):
        load(deep)


def test_a_part_of_a_conversion_beside_the_model_is_enough(deep):
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


def test_an_entry_of_its_own_that_is_missing_is_converted_again(deep):
    layers = range(2, 4)
    store, needed, others = entries(deep, layers)
    wanted = of_layers(parameters(load(deep)[0]), layers)
    for record in (needed[1], others[0]):
        store.entry_path(record.key).unlink()
    assert_same(parameters(load(deep, layers=layers)[0]), wanted)
    assert store.entry_size(needed[1].key) == needed[1].size
    store.entry_path(needed[1].key).unlink()
    (deep / needed[1].shard).unlink()
    with pytest.raises(CheckpointError, match=needed[1].shard):
        load(deep, layers=layers)


def test_a_changed_shard_of_other_layers_counts_for_it_may_have_lent_parts(deep):
    request, layers = make_request(deep), range(2, 4)
    _, _, others = entries(deep, layers)
    manifest = convert_checkpoint(deep)

    def needed(found):
        return needed_entries(Split(layers), ModelConfig.read(deep), found, False)

    assert staleness(request, manifest, True, needed) is None
    path = deep / others[0].shard
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert others[0].shard in staleness(request, manifest, True, needed)


def test_full_hashes_the_entries_of_the_part_and_damage_elsewhere_is_not_seen(deep, monkeypatch):
    layers = range(2, 4)
    store, needed, others = entries(deep, layers)
    flip_last_bit(store.entry_path(others[0].key))
    real, hashed = damage.hash_entry, []

    def recorded(fd, label):
        hashed.append(label)
        return real(fd, label)

    monkeypatch.setattr(damage, "hash_entry", recorded)
    load(deep, layers=layers, verify="full")
    assert sorted(hashed) == sorted(str(store.entry_path(record.key)) for record in needed)
    flip_last_bit(store.entry_path(needed[1].key))
    request = make_request(deep)
    with pytest.raises(EntryDamagedError, match=needed[1].key):
        weights.read_weights(
            convert_checkpoint(deep), request.store, Partition(MlxLm(), layers).reads, full=True
        )


def test_a_tensor_without_a_place_in_another_layer_is_an_error_still(tmp_path):
    """The whole model is checked, whatever is loaded of it."""
    directory = write_llama(
        tmp_path,
        drop=["model.layers.1.input_layernorm.weight"],
        **{"model.layers.1.extra.weight": np.zeros(4, np.float16)},
    )
    with pytest.raises(AssemblyError, match="2 differences") as caught:
        load(directory, layers=range(1))
    assert "model.layers.1.extra.weight: no such parameter" in str(caught.value)
    assert "model.layers.1.input_layernorm.weight: no stored tensor" in str(caught.value)


def test_an_entry_cut_short_while_a_part_is_loaded_is_converted_again(deep, monkeypatch):
    """The search for the damaged entry does not stumble over those of other layers."""
    layers, real, cut = range(2, 4), model.read_weights, []
    store, needed, others = entries(deep, layers)
    wanted = of_layers(parameters(load(deep)[0]), layers)
    for record in others:
        store.entry_path(record.key).unlink()

    def read_then_cut(*arguments, **options):
        found = real(*arguments, **options)
        if not cut:
            cut.append(store.entry_path(needed[1].key))
            os.truncate(cut[0], needed[1].size // 2)
        return found

    monkeypatch.setattr(model, "read_weights", read_then_cut)
    assert_same(parameters(load(deep, layers=layers)[0]), wanted)
    assert cut


def test_a_read_that_fails_while_it_is_begun_is_looked_into_too(model_dir, monkeypatch):
    """The file's system may answer before `async_eval` returns, which then raises."""
    wanted = parameters(load(model_dir)[0])
    store, needed, _ = entries(model_dir, range(1))
    fired = []

    def begin(arrays):
        if not fired:
            fired.append(store.entry_path(needed[0].key))
            os.truncate(fired[0], needed[0].size // 2)
            raise RuntimeError("[read] Unable to read from file.")

    monkeypatch.setattr(mx, "async_eval", begin)
    assert_same(parameters(load(model_dir)[0]), wanted)
    assert fired


def test_a_class_that_exchanges_layers_cannot_be_loaded_in_parts(model_dir, monkeypatch):
    """A placeholder in a layer that was asked for would be zeros."""
    other = {".0.": ".1.", ".1.": ".0."}

    def exchanged(_model, found, _backend):
        return {re.sub(r"\.[01]\.", lambda m: other[m[0]], n): a for n, a in found.items()}

    monkeypatch.setattr(model, "named_for", exchanged)
    load(model_dir)
    with pytest.raises(AssemblyError, match=r"layers\.0\..* another layer's tensor"):
        load(model_dir, layers=range(1))


def test_only_the_part_must_not_be_made_of_placeholders():
    unread = placeholders([TensorSpec("model.layers.1.norm.weight", "BF16", (4,))])
    array = unread["model.layers.1.norm.weight"]
    first = Partition(MlxLm(), range(1))
    part.check_placed(first, {"model.layers.1.norm.weight": array}, unread)
    with pytest.raises(AssemblyError, match=r"layers\.0\.norm\.weight: .* another layer's"):
        part.check_placed(first, {"model.layers.0.norm.weight": array}, unread)


def test_placeholders_have_the_recorded_shape_and_dtype_with_stacks_whole():
    specs = [
        TensorSpec("l.switch_mlp.up_proj.scales.experts_0_1", "F16", (2, 3)),
        TensorSpec("l.switch_mlp.up_proj.scales.experts_2_6", "F16", (5, 3)),
        TensorSpec("l.conv1d.weight", "BF16", (4, 1, 2)),
    ]
    found = placeholders(specs)
    assert {name: (array.shape, array.dtype) for name, array in found.items()} == {
        "l.switch_mlp.up_proj.scales": ((7, 3), mx.float16),
        "l.conv1d.weight": ((4, 1, 2), mx.bfloat16),
    }


def test_an_absent_layer_keeps_what_tells_its_kind_and_no_parameter():
    layer = nn.Linear(2, 2)
    layer.is_linear, layer.layer_type, layer.helper = True, "full_attention", object()
    absent = AbsentLayer(layer, 3, range(2))
    assert absent.is_linear is True
    assert absent.layer_type == "full_attention"
    assert not hasattr(absent, "helper")
    assert absent.parameters() == {}


@pytest.mark.parametrize("name", ["llama-awq-adversarial", MOE])
def test_a_part_of_an_export(name, tmp_path):
    export_model(FIXTURES / name, tmp_path / "out", shard_size=50_000)
    assert_ranges(tmp_path / "out", parameters(load(FIXTURES / name)[0]))


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("name", ["llama-awq-adversarial", MOE])
def test_a_part_of_a_single_file(name, foreign, tmp_path, settled):
    directory = shutil.copytree(FIXTURES / name, tmp_path / "m")
    whole = parameters(load(directory)[0])
    if foreign:
        as_pull_request_50(directory, True)
    else:
        write_single(directory, tmp_path / "cache")
    assert_ranges(directory, whole)
