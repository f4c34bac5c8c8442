"""mlx-lm's and mlx-vlm's loaders give what `load` gives, for ParoQuant models alone."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm
import mlx_vlm.utils
import pytest
from mlx.utils import tree_flatten

from paroquant_stream import install, load, uninstall
from paroquant_stream.errors import AssemblyError, MissingPartError
from paroquant_stream.integrations import mlx_loaders
from paroquant_stream.rotation.layers import RotateQuantizedLinear
from tests.helpers.builders import write_llama
from tests.helpers.paths import FIXTURES

MODEL = FIXTURES / "llama-awq-single"
VISION = FIXTURES / "gemma4_unified-awq-adversarial"
pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Install once, with one cache for all tests."""
    where = tmp_path_factory.mktemp("cache") / "c"
    install(cache_dir=where, jobs=1)
    yield where
    uninstall()


def weights(model) -> dict[str, bytes]:
    return {name: bytes(memoryview(a)) for name, a in flat(model).items()}


def flat(model) -> dict[str, mx.array]:
    """The parameters; bfloat16, which has no buffer, as integers."""
    found = dict(tree_flatten(model.parameters()))
    return {n: a.view(mx.uint16) if a.dtype == mx.bfloat16 else a for n, a in found.items()}


def test_mlx_lm_load_gives_the_same_model_and_tokenizer(cache):
    ours, _, _ = load(MODEL, cache_dir=cache)
    model, tokenizer = mlx_lm.load(str(MODEL))
    assert weights(model) == weights(ours)
    assert not model.training
    assert mlx_lm.generate(model, tokenizer, "w5 w9 w17", max_tokens=4)


def test_the_config_comes_with_what_the_caller_replaced():
    *_, config = mlx_lm.load(str(MODEL), model_config={"rms_norm_eps": 0.5}, return_config=True)
    assert config["rms_norm_eps"] == 0.5
    assert config["quantization_config"]["quant_method"] == "paroquant"
    model, config = mlx_lm.utils.load_model(MODEL, model_config={"rms_norm_eps": 0.25})
    assert model.args.rms_norm_eps == config["rms_norm_eps"] == 0.25


def test_lazy_strict_and_tokenizer_config_are_followed(monkeypatch):
    seen = []
    monkeypatch.setattr(mx, "eval", lambda *arrays: seen.append(arrays))
    model, _ = mlx_lm.utils.load_model(MODEL, lazy=True, strict=False)
    assert seen == []
    assert isinstance(model.model.layers[0].self_attn.q_proj, RotateQuantizedLinear)
    monkeypatch.undo()
    _, tokenizer = mlx_lm.load(str(MODEL), lazy=True, tokenizer_config={"eos_token": "w7"})
    assert tokenizer.eos_token == "w7"


def test_an_adapter_is_applied_to_rotated_layers(tmp_path):
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    config = {"num_layers": 1, "lora_parameters": parameters}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    plain, _ = mlx_lm.load(str(MODEL))
    layer = plain.model.layers[-1].self_attn.q_proj
    inputs, outputs = layer.theta.shape[1] * 2, layer.weight.shape[0]
    name = f"model.layers.{len(plain.layers) - 1}.self_attn.q_proj"
    a, b = mx.random.normal((inputs, 4)), mx.random.normal((4, outputs))
    mx.save_safetensors(
        str(tmp_path / "adapters.safetensors"), {f"{name}.lora_a": a, f"{name}.lora_b": b}
    )
    model, _ = mlx_lm.load(str(MODEL), adapter_path=str(tmp_path))
    x = mx.random.normal((3, inputs))
    found = model.model.layers[-1].self_attn.q_proj(x)
    assert mx.allclose(found, layer(x) + 2.0 * (x @ a) @ b, atol=1e-3)
    assert not model.training


def test_quantized_activations_are_refused():
    with pytest.raises(ValueError, match="quantize_activations"):
        mlx_lm.load(str(MODEL), model_config={"quantize_activations": True})
    with pytest.raises(ValueError, match="quantize_activations"):
        mlx_vlm.utils.load(str(VISION), quantize_activations=True)


def test_an_unknown_option_is_a_warning(caplog):
    mlx_vlm.utils.load_model(VISION, lazy=True, strict=False, color="red")
    assert [r.message for r in caplog.records] == ["color: no effect on a ParoQuant model"]


def test_a_class_of_the_program_goes_to_the_original():
    class ChosenError(Exception):
        pass

    def choose(config):
        raise ChosenError

    with pytest.raises(ChosenError):
        mlx_lm.utils.load_model(MODEL, get_model_classes=choose)


@pytest.mark.parametrize("library", [mlx_lm, mlx_vlm.utils])
def test_other_directories_are_an_error_of_the_original(library, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FileNotFoundError, match="No safetensors found"):
        library.load(str(tmp_path))


def test_another_model_is_loaded_by_the_original(tmp_path, monkeypatch):
    path = write_plain(tmp_path / "plain")
    monkeypatch.setattr(mlx_loaders, "_check", lambda *_: pytest.fail("taken for ours"))
    original = inspect.unwrap(mlx_lm.utils.load_model)
    model, config = mlx_lm.utils.load_model(path)
    same, same_config = original(path)
    assert weights(model) == weights(same)
    assert config == same_config


def write_plain(directory: Path) -> Path:
    """Write a llama that nothing quantized."""
    from mlx_lm.models import llama

    values = json.loads((MODEL / "config.json").read_text())
    del values["quantization_config"]
    model = llama.Model(llama.ModelArgs.from_dict(values))
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(values))
    mx.save_safetensors(
        str(directory / "model.safetensors"), dict(tree_flatten(model.parameters()))
    )
    return directory


def test_mlx_vlm_load_gives_the_same_model(cache):
    ours, _, is_vlm = load(VISION, cache_dir=cache)
    model, processor = mlx_vlm.utils.load(str(VISION), strict=False, max_kv_size=None)
    assert is_vlm
    assert weights(model) == weights(ours)
    assert model.model_path == VISION
    assert model.config.eos_token_id == json.loads((VISION / "config.json").read_text()).get(
        "eos_token_id", model.config.eos_token_id
    )
    assert processor.tokenizer is not None


def test_defaults_of_the_generation_config_reach_the_model(tmp_path):
    shutil.copytree(VISION, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text('{"temperature": 0.25}')
    model = mlx_vlm.utils.load_model(tmp_path / "m", lazy=True)
    assert model.config.temperature == 0.25


def test_a_text_model_in_mlx_vlm_says_what_to_use():
    with pytest.raises(AssemblyError, match="a text model, which mlx-vlm cannot load: use mlx_lm"):
        mlx_vlm.utils.load(str(MODEL))


def test_a_repository_is_converted_while_it_downloads(hub, tmp_path, monkeypatch):
    path = write_llama(tmp_path)
    hub.push("owner/paro", path, branch="v1")
    monkeypatch.setattr(mlx_lm.utils, "snapshot_download", lambda *_, **__: pytest.fail("all"))
    model, tokenizer = mlx_lm.load("owner/paro", revision="v1", lazy=True)
    assert isinstance(model.model.layers[0].self_attn.q_proj, RotateQuantizedLinear)
    assert tokenizer.encode("w5") == [5]
    assert mlx_loaders._from_hub.get() is None
    assert hub.downloads()


@pytest.mark.parametrize(
    ("option", "variable"), [({"trust_remote_code": True}, ""), ({}, "true"), ({"name": "x/y"}, "")]
)
def test_other_downloads_are_those_of_the_original(hub, tmp_path, monkeypatch, option, variable):
    hub.push("owner/paro", write_llama(tmp_path))
    monkeypatch.setenv("MLXLM_USE_MODELSCOPE", variable)
    asked = []

    def download(name, revision=None, allow_patterns=None):
        asked.append(name)
        return str(tmp_path / "m")

    monkeypatch.setattr(mlx_lm.utils, "snapshot_download", download)
    name = option.pop("name", "owner/paro")
    model, _ = mlx_lm.load(name, lazy=True, **option)
    assert asked == [name]
    assert isinstance(model.model.layers[0].self_attn.q_proj, RotateQuantizedLinear)


@pytest.mark.parametrize("given", [{}, {"tensor_group": mx.distributed.init()}])
def test_a_rank_loads_its_part(given):
    model, tokenizer, config = mlx_lm.utils.sharded_load(str(MODEL), return_config=True, **given)
    assert isinstance(model.model.layers[0].self_attn.q_proj, RotateQuantizedLinear)
    assert tokenizer.encode("w5") == [5]
    assert config["model_type"] == "llama"


def test_a_pipeline_is_asked_for_as_such():
    with pytest.raises(MissingPartError, match="has no pipeline"):
        mlx_lm.utils.sharded_load(str(MODEL), mx.distributed.init())


def test_a_rank_of_another_model_is_loaded_by_the_original(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(ValueError, match="nothing not supported"):
        mlx_lm.utils.sharded_load(str(tmp_path))
