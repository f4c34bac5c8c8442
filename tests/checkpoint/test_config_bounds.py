"""Tests of the bounds for numbers in configs and tokenizer settings."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest

from paroquant_stream import load
from paroquant_stream.api.export import export_model
from paroquant_stream.backends.backend import Backend
from paroquant_stream.checkpoint.checkpoint import open_checkpoint
from paroquant_stream.checkpoint.config import ModelConfig
from paroquant_stream.checkpoint.config_bounds import (
    MAX_LAYERS,
    MAX_TOKENS,
    check_config,
    check_tokenizer,
)
from paroquant_stream.conversion.converter import convert
from paroquant_stream.distributed.split import Split
from paroquant_stream.errors import AssemblyError
from paroquant_stream.files.tensor_header import TensorSpec
from paroquant_stream.model import assemble
from paroquant_stream.model.assemble import needed_entries
from paroquant_stream.store.store import cache_store
from tests.helpers.builders import CONFIG, write_checkpoint
from tests.helpers.paths import FIXTURES
from tests.helpers.ranks import Rank

MANY = [TensorSpec(f"t{i}", "F16", (4, 100)) for i in range(3000)]
FEW = MANY[:30]
HUGE = 10**7


def refuses(config, words: str, tensors=FEW) -> None:
    with pytest.raises(AssemblyError, match=words) as error:
        check_config(config, tensors, "config.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(p.parent.name for p in FIXTURES.glob("*/config.json")))
def test_the_config_of_every_fixture_is_accepted(name):
    checkpoint = open_checkpoint(ModelConfig.read(FIXTURES / name))
    tensors = [t for header in checkpoint.headers().values() for t in header.tensors]
    check_config(checkpoint.config.values, tensors, "x")
    check_tokenizer(FIXTURES / name)


@pytest.mark.parametrize(
    "key",
    ["num_hidden_layers", "n_layers", "num_layers", "n_layer", "depth", "encoder_layers",
     "decoder_layers", "num_nextn_predict_layers", "mtp_num_hidden_layers", "num_blocks",
     "num_kv_shared_layers", "layers", "vision_layers"],
)  # fmt: skip
@pytest.mark.parametrize("section", ["", "text_config.", "vision_config.", "audio_config."])
def test_layers_are_at_most_the_number_of_tensors(key, section):
    def config(count):
        return {section[:-1]: {key: count}} if section else {key: count}

    check_config(config(30), FEW, "config.json")
    refuses(
        config(31),
        rf"config\.json: {section}{key} is 31, more than the 30 that the 30 stored tensors",
    )
    refuses(config(float(HUGE)), "10,000,000")


def test_layers_are_at_most_those_of_known_models():
    check_config({"num_hidden_layers": MAX_LAYERS}, MANY, "x")
    refuses(
        {"num_hidden_layers": MAX_LAYERS + 1}, "more than the 2,000 layers of any known model", MANY
    )


def test_only_the_layers_of_stages_are_added_up():
    check_config({"depths": [10, 10], "mlp_only_layers": [27, 28, 29]}, FEW, "x")
    refuses({"depths": [10, 10, 11]}, "depths is 31")
    refuses({"mlp_only_layers": [1, HUGE]}, "mlp_only_layers is 10,000,000")


@pytest.mark.parametrize("key", ["layer_types", "layers_block_type", "hybrid_override_pattern"])
def test_a_list_with_an_item_per_layer_is_bounded(key):
    check_config({key: "M" * 64}, FEW, "x")
    refuses({key: ["M"] * 65}, f"the length of {key} is 65, more than the 64")
    refuses({key: "M" * HUGE}, f"the length of {key} is 10,000,000")


@pytest.mark.parametrize(
    "key",
    ["head_dim", "global_head_dim", "qk_rope_head_dim", "linear_key_head_dim", "rotary_dim",
     "hidden_size", "num_experts", "n_routed_experts", "num_local_experts", "num_labels", "n_embd"],
)  # fmt: skip
def test_a_width_is_at_most_that_of_the_widest_tensor(key):
    check_config({key: 100}, FEW, "x")
    refuses(
        {"text_config": {key: 101}}, f"text_config.{key} is 101, more than the 100 of the widest"
    )
    refuses({key: [1, 101]}, f"{key} is 101, more than the 100 of the widest")


def test_an_empty_tensor_has_no_width():
    refuses({"head_dim": 101}, "head_dim is 101", [*FEW, TensorSpec("x", "F16", (2**31 - 1, 0))])


def test_a_rotary_fraction_is_at_most_one():
    check_config({"rope_parameters": {"partial_rotary_factor": 1.0}}, FEW, "x")
    refuses(
        {"a": [{"partial_rotary_factor": 1.5}]}, "partial_rotary_factor is 1.5, more than the 1"
    )


@pytest.mark.parametrize(
    "config",
    [{"max_position_embeddings": 10**9}, {"max_window_layers": 70}, {"num_experts_per_tok": 200},
     {"index_topk_blocks": 2048},
     {"image_token_id": 10**6}, {"num_hidden_layers": None}, {"vision_feature_layer": -2},
     {"num_experts": True}, {"rope_theta": 1e9}, {"layer_types": None}, {"id2label": {}},
     {"no_split_modules": "x" * 1000}, {"sliding_window": 10**6}],
)  # fmt: skip
def test_other_numbers_are_not_bounded(config):
    check_config(config, FEW, "x")


@pytest.mark.parametrize("section", ["", "text_config", "vision_config"])
def test_too_many_settings_are_refused(section):
    """They take transformers quadratic time."""

    def config(count):
        settings = {f"k{i}": i for i in range(count)}
        return {section: settings} if section else settings

    check_config(config(2000), FEW, "x")
    refuses(
        config(2001), "the number of settings.* is 2,001, more than the 2,000 of any known model"
    )


def test_a_quantization_may_name_every_linear():
    check_config({"quantization_config": {f"layers.{i}.x": {} for i in range(50_000)}}, FEW, "x")


def test_deeply_nested_sections_are_checked():
    config: dict = {"num_hidden_layers": HUGE}
    for _ in range(5000):
        config = {"x": [config]}
    refuses(config, "num_hidden_layers is 10,000,000")


def changed(tmp_path, source, change):
    """A copy of a model with another config."""
    directory = tmp_path / "changed"
    directory.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (directory / path.name).write_bytes(path.read_bytes())
    config = copy.deepcopy(json.loads((source / "config.json").read_text()))
    change(config)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def never(*_, **__):
    pytest.fail("a class was built or a tokenizer loaded before the config was checked")


@pytest.mark.parametrize(
    ("name", "change", "key"),
    [
        ("llama-awq-single", lambda c: c.update(num_hidden_layers=HUGE), "num_hidden_layers"),
        ("qwen3_5-awq-adversarial", lambda c: c["vision_config"].update(depth=HUGE), "depth"),
        ("qwen3_5-awq-adversarial",
         lambda c: c["text_config"]["rope_parameters"].update(partial_rotary_factor=HUGE),
         "partial_rotary_factor"),
        ("gemma4_e2b-awq-adversarial",
         lambda c: c["audio_config"].update(num_hidden_layers=HUGE), "audio_config.num_hidden"),
        ("gemma4_e2b-awq-adversarial",
         lambda c: c["text_config"].update(global_head_dim=10**9), "global_head_dim"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("force_text", [False, True])
def test_load_checks_the_config_before_building_a_class(
    tmp_path, monkeypatch, name, change, key, force_text
):
    directory = changed(tmp_path, FIXTURES / name, change)
    monkeypatch.setattr(assemble, "load_config", never)
    monkeypatch.setattr(Backend, "check_installed", lambda _: None)  # mlx-vlm may be absent
    for building in ("build", "load_tokenizer"):
        monkeypatch.setattr(Backend, building, never)
    with pytest.raises(AssemblyError, match=rf"changed/config\.json: .*{key}"):
        load(directory, force_text=force_text)


def test_export_checks_the_config_before_building_a_class(tmp_path, monkeypatch):
    directory = write_checkpoint(tmp_path / "m", config={**CONFIG, "num_hidden_layers": HUGE})
    monkeypatch.setattr(Backend, "build", never)
    with pytest.raises(AssemblyError, match="num_hidden_layers is 10,000,000"):
        export_model(directory, tmp_path / "out")


def test_a_changed_export_is_checked_before_building(model_dir, tmp_path, monkeypatch):
    export_model(model_dir, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["num_hidden_layers"] = HUGE
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(Backend, "build", never)
    with pytest.raises(AssemblyError, match="num_hidden_layers is 10,000,000"):
        load(tmp_path / "out")


def test_a_pipeline_split_is_checked_before_building(model_dir, monkeypatch):
    from paroquant_stream.conversion.request import make_request

    manifest = convert(make_request(model_dir)).manifest
    config = {**CONFIG, "num_hidden_layers": HUGE}
    (model_dir / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(Backend, "build", never)
    with pytest.raises(AssemblyError, match="num_hidden_layers is 10,000,000"):
        needed_entries(
            Split(None, Rank(0, 2), "pipeline"), ModelConfig.read(model_dir), manifest, True
        )
    assert cache_store().root.exists()


LIMITED = """
import resource, sys
from paroquant_stream import load
from paroquant_stream.backends.backend import Backend
from paroquant_stream.errors import AssemblyError
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (6 << 30),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
try:
    load(sys.argv[1])
except AssemblyError as error:
    print(str(error).partition(": ")[2])
peak = int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
print(peak < 1_500_000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_million_layers_take_neither_memory_nor_time(tmp_path):
    directory = write_checkpoint(tmp_path / "m", config={**CONFIG, "num_hidden_layers": HUGE})
    command = [sys.executable, "-c", LIMITED, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("num_hidden_layers is 10,000,000, more than the ")
    assert done.stdout.endswith("\nTrue\n")


def tokenizer_with(directory, **settings):
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"extra_ids": MAX_TOKENS + 1}, r"tokenizer_config\.json: extra_ids is 1,048,577"),
        ({"offset": HUGE}, "offset is 10,000,000"),
        ({"x": {"num_madeup_words": HUGE}}, r"x\.num_madeup_words is 10,000,000"),
        ({"added_tokens_decoder": {"5": {}, str(HUGE): {}}}, "tokens_decoder is 10,000,000"),
        ({"added_tokens_decoder": {"9" * 5000: {}}}, "in added_tokens_decoder is 99,"),
    ],
)  # fmt: skip
def test_too_many_generated_tokens_are_refused(model_dir, settings, words):
    tokenizer_with(model_dir, **settings)
    with pytest.raises(AssemblyError, match=words) as error:
        load(model_dir)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("key", ["extra_special_tokens", "additional_special_tokens"])
def test_too_many_special_tokens_are_refused(model_dir, name, key):
    """They take transformers quadratic time."""
    tokens = [f"<{i}>" for i in range(10_001)]
    (model_dir / name).write_text(json.dumps({key: tokens[1:]}))
    check_tokenizer(model_dir)
    (model_dir / name).write_text(json.dumps({key: tokens}))
    with pytest.raises(AssemblyError, match=rf"{name}: the length of {key} is 10,001, more than"):
        check_tokenizer(model_dir)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_too_many_tokenizer_settings_are_refused(model_dir, name):
    (model_dir / name).write_text(json.dumps({f"k{i}_token": "x" for i in range(2001)}))
    with pytest.raises(AssemblyError, match=rf"{name}: the number of settings is 2,001, more than"):
        check_tokenizer(model_dir)


def test_usual_and_malformed_tokenizers_are_accepted(model_dir):
    tokenizer_with(model_dir, model_max_length=int(1e30), extra_ids=100,
                   added_tokens_decoder={"262143": {"content": "x"}, "x": {}})  # fmt: skip
    check_tokenizer(model_dir)
    for text in ("[", "[]", "{}", '{"added_tokens_decoder": [1]}', "[" * 10_000, "\ufeff{}"):
        (model_dir / "tokenizer_config.json").write_text(text)
        check_tokenizer(model_dir)
    (model_dir / "tokenizer_config.json").unlink()
    check_tokenizer(model_dir)
