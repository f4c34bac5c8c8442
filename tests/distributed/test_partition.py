"""A part of a model has the parameters of the whole model, and no other layer can be called."""

from __future__ import annotations

import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from paroquant_stream import convert_checkpoint, load
from paroquant_stream.api.export import export_model
from paroquant_stream.backends.mlx_lm import MlxLm
from paroquant_stream.checkpoint.config import ModelConfig
from paroquant_stream.distributed import partition as part
from paroquant_stream.distributed.partition import AbsentLayer, Partition
from paroquant_stream.distributed.split import WHOLE
from paroquant_stream.errors import (
    AssemblyError,
    MissingPartError,
)
from paroquant_stream.files.tensor_header import TensorSpec
from paroquant_stream.model import assemble as model
from paroquant_stream.model.experts import placeholders
from tests.helpers.builders import write_llama
from tests.helpers.layers import layer_number, of_layers
from tests.helpers.parameters import CATALOG, EXPECTED, VISION, assert_same, name_of, parameters
from tests.helpers.paths import FIXTURES
from tests.helpers.ranks import Rank
from tests.helpers.single_files import as_pull_request_50
from tests.helpers.single_files import export as write_single

pytestmark = pytest.mark.usefixtures("on_the_cpu")
TEXT = [row for row in CATALOG if row["expected_text"]]


def each(rows: list[dict]) -> list:
    """One fixture of each family, and slowly those that only have another layout."""
    return [
        row if "-awq-" in row["name"] else pytest.param(row, marks=pytest.mark.slow) for row in rows
    ]


MOE = "qwen3_moe-awq-adversarial"  # its experts are spread over the shards


def layers_of(names) -> int:
    return 1 + max(number for number in map(layer_number, names) if number is not None)


def assert_ranges(directory: Path, whole: dict, **options) -> None:
    """Load the first layer, and all others; compare them to the whole model bit for bit."""
    for layers in (range(1), range(1, layers_of(whole))):
        found = parameters(load(directory, layers=layers, **options)[0])
        assert_same(found, of_layers(whole, layers))
        assert len(found) < len(whole)


@pytest.mark.parametrize("row", each(TEXT), ids=name_of)
def test_a_range_of_a_text_model_has_its_parameters(row):
    whole = mx.load(str(EXPECTED / row["expected_text"]))
    assert_ranges(FIXTURES / row["name"], whole, force_text=True)


@pytest.mark.parametrize("row", each(VISION), ids=name_of)
def test_a_range_of_a_vision_model_has_its_tower(row):
    whole = parameters(load(FIXTURES / row["name"])[0])
    assert_ranges(FIXTURES / row["name"], whole)


def test_an_absent_layer_cannot_be_called(model_dir):
    whole, first = load(model_dir)[0], load(model_dir, layers=range(1))[0]
    x = mx.ones((1, 3, 64), mx.float16)
    assert mx.array_equal(first.model.layers[0](x), whole.model.layers[0](x))
    with pytest.raises(MissingPartError, match="layer 1 was not loaded, only 0 to 0"):
        first.model.layers[1](x)
    with pytest.raises(MissingPartError, match="layer 1 was not loaded"):
        first(mx.array([[1, 2]]))


@pytest.mark.parametrize("name", ["llama-awq-adversarial", "qwen3_5-awq-adversarial"])
def test_two_halves_compute_the_logits_of_the_whole(name):
    """The class's caches and masks fit, because absent layers have the attributes of theirs."""
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
    expected = load(FIXTURES / name, force_text=True)[0](tokens)
    assert mx.array_equal(found, expected)


def test_layers_beyond_the_model_are_named(model_dir):
    with pytest.raises(MissingPartError, match="layers 1 to 2 were requested, the model has 2"):
        load(model_dir, layers=range(1, 3))


@pytest.mark.parametrize(
    ("name", "text", "offers"),
    [
        ("llama-awq-adversarial", True, r"llama\.Model has no pipeline; .*layers=.*parallel="),
        ("gemma4-awq-size", True, r"gemma4\.Model has no pipeline; .*layers="),
        ("qwen3_5-awq-adversarial", False, "mlx_vlm.* has no pipeline; .*force_text=True"),
    ],
)
def test_a_class_without_a_pipeline_names_alternatives(name, text, offers):
    convert_checkpoint(FIXTURES / name)
    with pytest.raises(MissingPartError, match=offers):
        load(FIXTURES / name, force_text=text, group=Rank(0, 2))


def test_more_ranks_than_layers_are_an_error():
    with pytest.raises(MissingPartError, match="no pipeline over 3 ranks"):
        load(FIXTURES / "qwen2-awq-size", group=Rank(0, 3))


@pytest.mark.parametrize("name", ["qwen2-awq-size", MOE, "qwen3_5_moe-native-size"])
def test_each_rank_has_the_layers_of_its_class(name, monkeypatch):
    met = []
    monkeypatch.setattr(model, "barrier", met.append)  # these ranks are not processes
    whole = parameters(load(FIXTURES / name, force_text=True)[0])
    for rank, layers in ((0, range(1, 2)), (1, range(1))):
        found = load(FIXTURES / name, force_text=True, group=Rank(rank, 2))[0]
        assert_same(parameters(found), of_layers(whole, layers))
        assert len(found.layers) == 1
    assert [group.rank() for group in met] == [0, 1]


def test_the_whole_model_is_checked_for_any_part(tmp_path):
    directory = write_llama(
        tmp_path,
        drop=["model.layers.1.input_layernorm.weight"],
        **{"model.layers.1.extra.weight": np.zeros(4, np.float16)},
    )
    with pytest.raises(AssemblyError, match="2 differences") as caught:
        load(directory, layers=range(1))
    assert "model.layers.1.extra.weight: no such parameter" in str(caught.value)
    assert "model.layers.1.input_layernorm.weight: no stored tensor" in str(caught.value)


def test_a_class_that_exchanges_layers_is_refused(model_dir, monkeypatch):
    """A placeholder in a requested layer would be zeros."""
    other = {".0.": ".1.", ".1.": ".0."}

    def exchanged(_model, found, _backend):
        return {re.sub(r"\.[01]\.", lambda m: other[m[0]], n): a for n, a in found.items()}

    monkeypatch.setattr(model, "rename_weights", exchanged)
    load(model_dir)
    with pytest.raises(AssemblyError, match=r"layers\.0\..* another layer's tensor"):
        load(model_dir, layers=range(1))


def test_no_placeholder_may_be_part_of_the_partition():
    unread = placeholders([TensorSpec("model.layers.1.norm.weight", "BF16", (4,))])
    array = unread["model.layers.1.norm.weight"]
    first = Partition(MlxLm(), range(1))
    part.check_placed(first, {"model.layers.1.norm.weight": array}, unread)
    with pytest.raises(AssemblyError, match=r"layers\.0\.norm\.weight: .* another layer's"):
        part.check_placed(first, {"model.layers.0.norm.weight": array}, unread)


def test_an_impossible_config_is_refused_first(tmp_path, monkeypatch):
    directory = write_llama(tmp_path)
    monkeypatch.setattr(part, "select_backend", lambda *_: pytest.fail("chosen"))
    specs = [TensorSpec("model.layers.0.mlp.up_proj.weight", "F16", (4, 4))]
    with pytest.raises(AssemblyError, match="hidden_size is 64, more than the 4"):
        part.find_partition(WHOLE, ModelConfig.read(directory), specs, False, dict)


def test_a_barrier_waits_for_a_sum_over_all_ranks(monkeypatch):
    sums = []

    def all_sum(array, *, group, stream):
        assert stream == mx.cpu  # a GPU kernel would wait within the driver's time limit
        sums.append(array + 1)
        return sums[-1]

    evaluated, real = [], mx.eval
    monkeypatch.setattr(mx.distributed, "all_sum", all_sum)
    monkeypatch.setattr(mx, "eval", lambda *a: evaluated.extend(a) or real(*a))
    part.barrier(Rank(0, 2))
    assert len(evaluated) == 1
    assert evaluated[0] is sums[0]


@pytest.mark.parametrize(("layers", "fits"), [(range(2), True), (range(1, 3), False)])
def test_the_last_layer_is_the_last_that_can_be_loaded(model_dir, layers, fits):
    with nullcontext() if fits else pytest.raises(MissingPartError):
        load(model_dir, layers=layers)


def test_an_absent_layer_has_plain_attributes_only():
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
