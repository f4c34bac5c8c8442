"""The config of an export: no library loads it without the rotations, each finds the tokenizer."""

from __future__ import annotations

import json
import shutil

import pytest
from mlx_lm.utils import load_model, load_tokenizer
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoTokenizer
from transformers.quantizers.auto import AutoHfQuantizer

from paroquant_stream import export_model, load
from paroquant_stream.backends.mlx_lm import EXPORT_MARK
from paroquant_stream.checkpoint.config import EXPORTED
from paroquant_stream.errors import AssemblyError
from paroquant_stream.exports.exported_config import MODEL_FILE, TRANSFORMERS_CONFIG
from tests.helpers.builders import CONFIG, write_checkpoint
from tests.helpers.paths import FIXTURES

HIDDEN = "paroquant_stream_required__llama"


def config_of(directory, name="config.json") -> dict:
    found: dict = json.loads((directory / name).read_text())
    return found


def test_the_config_is_the_models_with_mlx_quantization(tmp_path):
    code = {"auto_map": {"AutoModel": "x.py"}, "model_file": "x.py"}
    versions = {"configuration_files": ["config.9.json"]}  # of files that are not copied
    model = write_checkpoint(tmp_path / "model", config={**CONFIG, **code, **versions})
    export_model(model, tmp_path / "out")
    sizes = {"group_size": CONFIG["quantization_config"]["group_size"], "bits": 4}
    readable = {**CONFIG, "quantization": sizes, "quantization_config": sizes}
    assert config_of(tmp_path / "out", TRANSFORMERS_CONFIG) == readable
    assert config_of(tmp_path / "out") == {
        **readable,
        "model_type": HIDDEN,
        "configuration_files": [TRANSFORMERS_CONFIG],
        "paroquant_stream": {"format": 1, "model_type": "llama"},
    }


def test_a_self_contained_one_names_its_code_and_what_it_needs(model_dir, tmp_path):
    export_model(model_dir, tmp_path / "out", self_contained=True)
    config = config_of(tmp_path / "out")
    assert config["model_type"] == "trust_remote_code_required__llama"
    assert config["model_file"] == MODEL_FILE
    assert "model_file" not in config_of(tmp_path / "out", TRANSFORMERS_CONFIG)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("trusted", [True, False])
def test_mlx_lm_refuses_a_plain_export_and_says_why(model_dir, tmp_path, strict, trusted):
    export_model(model_dir, tmp_path / "out")
    with pytest.raises(ValueError, match=f"Model type {HIDDEN} not supported"):
        load_model(tmp_path / "out", strict=strict, trust_remote_code=trusted)


def test_mlx_vlm_refuses_a_plain_export_and_says_why(tmp_path):
    vlm = pytest.importorskip("mlx_vlm.utils")
    export_model(FIXTURES / "qwen3_5-awq-adversarial", tmp_path / "out")
    with pytest.raises(ValueError, match="paroquant_stream_required__qwen3_5 not supported"):
        vlm.load_model(tmp_path / "out", strict=False)


@pytest.mark.parametrize("self_contained", [True, False])
def test_transformers_gets_the_type_but_refuses_the_weights(model_dir, tmp_path, self_contained):
    export_model(model_dir, tmp_path / "out", self_contained=self_contained)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.model_type == "llama"
    with pytest.raises(ValueError, match="no `quant_method`"):  # asked before any model is built
        AutoHfQuantizer.supports_quant_method(config.quantization_config)


def byte_pairs() -> Tokenizer:
    """A tokenizer of the kind whose splits depend on the class that transformers chooses."""
    words = ["<unk>", "<eos>", "a", "b", "ab", "\u0120a", "\u0120"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")], unk_token="<unk>"))


@pytest.mark.parametrize("self_contained", [True, False])
@pytest.mark.parametrize("named", ["Qwen2TokenizerFast", None])
def test_the_tokenizer_is_that_of_the_models_type(tmp_path, named, self_contained):
    """Its class is chosen by the model type too, and splits text in its own way."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(FIXTURES / "qwen3_5-awq-adversarial", model)
    byte_pairs().save(str(model / "tokenizer.json"))
    settings = {"eos_token": "<eos>"} | ({"tokenizer_class": named} if named else {})
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    export_model(model, out, self_contained=self_contained)
    expected = AutoTokenizer.from_pretrained(model)
    if named is None:  # else it depends on the version of transformers
        assert type(expected).__name__ == "Qwen3_5Tokenizer"
    for found in (AutoTokenizer.from_pretrained(out), load_tokenizer(out)._tokenizer):
        assert type(found) is type(expected)
        assert found.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()


def test_the_theta_reaches_the_class_of_stock_mlx_lm(tmp_path):
    """qwen2's class has a default of a million, and knows no rope_parameters."""
    export_model(FIXTURES / "qwen2-awq-size", tmp_path / "out", self_contained=True)
    assert config_of(tmp_path / "out")["rope_theta"] == 10_000
    plain = json.loads((tmp_path / "out" / TRANSFORMERS_CONFIG).read_text())
    assert "rope_theta" not in plain
    assert plain["rope_parameters"]["rope_theta"] == 10_000


def test_load_says_which_type_it_does_not_know(model_dir, tmp_path):
    export_model(model_dir, tmp_path / "out")
    config = config_of(tmp_path / "out")
    for model_type in ("unheard_of", ["llama"], None):
        config["paroquant_stream"]["model_type"] = model_type
        (tmp_path / "out" / "config.json").write_text(json.dumps(config))
        with pytest.raises(AssemblyError, match="model_type"):
            load(tmp_path / "out")


def test_the_mark_has_one_name():
    assert EXPORT_MARK == EXPORTED
