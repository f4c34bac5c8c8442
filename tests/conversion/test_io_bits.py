"""`--io-bits 8`: embedding and head in 8 bits, the rest of the model as it is in 4."""

from __future__ import annotations

import json
import os

import mlx.core as mx
import pytest

from paroquant_stream import load
from paroquant_stream.cli import cache, convert
from paroquant_stream.conversion.converter import convert as convert_request
from paroquant_stream.conversion.planning import plan_model
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import CheckpointError
from tests.helpers.parameters import bits, parameters
from tests.helpers.paths import FIXTURES

pytestmark = pytest.mark.usefixtures("on_the_cpu")
IO = ("embed_tokens", "lm_head")


def is_io(name: str) -> bool:
    return name.rpartition(".")[0].endswith(IO)


def stored(directory) -> dict[str, mx.array]:
    files = directory.glob("*.safetensors")
    return {name: array for file in files for name, array in mx.load(str(file)).items()}


@pytest.mark.parametrize("name", ["qwen3-awq-size", "qwen3_5-awq-adversarial"])
def test_both_are_what_mx_quantize_gives_at_8_bits(name):
    group_size = json.loads((FIXTURES / name / "config.json").read_text())
    group_size = group_size["quantization_config"]["group_size"]
    wide, _, _ = load(FIXTURES / name, io_bits=8, force_text=True)
    narrow, _, _ = load(FIXTURES / name, force_text=True)
    found, expected = parameters(wide), parameters(narrow)
    floats = {
        source.rpartition(".")[0].rpartition(".")[2]: array
        for source, array in stored(FIXTURES / name).items()
        if is_io(source)
    }
    modules = {parameter.rpartition(".")[0] for parameter in found if is_io(parameter)}
    assert modules
    for module in modules:
        values = floats[module.rpartition(".")[2]]
        parts = mx.quantize(values, group_size, 8, stream=mx.cpu)
        for leaf, part in zip(("weight", "scales", "biases"), parts, strict=True):
            assert bits(found[f"{module}.{leaf}"]) == bits(part)
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(a, expected[n]) for n, a in found.items() if not is_io(n))
    tokens = mx.array([[5, 9, 17]])
    logits, rounded = wide(tokens), narrow(tokens)
    assert mx.isfinite(logits).all()
    assert not mx.array_equal(logits, rounded)


def keys(directory, **options) -> dict[str, str]:
    plan = plan_model(make_request(directory, **options)).plan
    return {task.shard: task.sha256 for task in plan.tasks}


def test_only_the_keys_of_shards_with_either_change(model_dir):
    default = keys(model_dir)
    assert keys(model_dir, io_bits=4) == default
    wide = keys(model_dir, io_bits=8)
    tasks = plan_model(make_request(model_dir)).plan.tasks
    changed = {t.shard for t in tasks if any(op.kind == "quantize" for op in t.operations)}
    assert changed
    assert {shard for shard in default if wide[shard] != default[shard]} == changed


def test_both_conversions_are_kept_and_found_by_their_bits(model_dir, capsys):
    assert convert.main([str(model_dir), "--quiet"]) == 0
    assert convert.main([str(model_dir), "--quiet", "--io-bits", "8"]) == 0
    assert cache.main(["ls"]) == 0
    assert f"{model_dir} (source, io-bits 8)" in capsys.readouterr().out
    assert cache.main(["rm", "-y", str(model_dir)]) == 0
    assert cache.main(["ls", "-q"]) == 0
    assert str(model_dir) not in capsys.readouterr().out.splitlines()


def test_damage_names_the_command_that_repairs_it(model_dir, capsys):
    request = make_request(model_dir, io_bits=8, jobs=1)
    entry = request.store.entry_path(convert_request(request).manifest.entries[0].key)
    data = bytearray(entry.read_bytes())
    data[-1] ^= 1
    entry.write_bytes(data)
    assert cache.main(["verify", str(model_dir)]) == 1
    assert f"convert {model_dir} --io-bits 8" in capsys.readouterr().out


@pytest.mark.parametrize("in_place", [False, True])
def test_a_dropped_model_loads_with_the_bits_it_has(model_dir, in_place):
    before = parameters(load(model_dir, io_bits=8)[0])
    convert_request(make_request(model_dir, io_bits=8, drop_source=True, in_place=in_place, jobs=1))
    assert not [name for name in os.listdir(model_dir) if name.endswith(".safetensors")]
    after = parameters(load(model_dir, io_bits=8)[0])
    assert all(mx.array_equal(array, before[name]) for name, array in after.items())
    with pytest.raises(CheckpointError, match=r"--io-bits 8 \(in Python io_bits=8\)"):
        load(model_dir)
