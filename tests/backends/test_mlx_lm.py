"""The backend for text models."""

from __future__ import annotations

import json
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import pytest

from paroquant_stream.backends.mlx_lm import MlxLm, import_utils, load_config
from paroquant_stream.errors import CheckpointError, ExecutionError, MissingExtraError
from tests.helpers.builders import CONFIG


def test_without_mlx_lm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_lm.utils", None)
    with pytest.raises(MissingExtraError, match=r"pip install mlx-lm \(the extra `lm`"):
        MlxLm().build({"model_type": "llama"})


def test_the_generation_configs_end_tokens_reach_the_tokenizer(model_dir):
    (model_dir / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    config = load_config(model_dir)
    tokenizer = MlxLm().load_tokenizer(model_dir, config)
    assert {1, 7} <= set(tokenizer.eos_token_ids)


@pytest.mark.parametrize("text", ["[" * 100_000, '"text"', "[1]", "\udcff"])
def test_a_generation_config_that_mlx_lm_cannot_use_is_one_error(model_dir, text):
    data = text.encode("utf-8", "surrogateescape")
    (model_dir / "generation_config.json").write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"mlx-lm cannot read config\.json or generation_config"
    ):
        load_config(model_dir)


@pytest.mark.parametrize("kind", ["llama", "qwen3_5_text", "qwen3_5_moe_text", "gemma4"])
def test_a_type_with_a_file_is_known_without_an_import(kind):
    script = (
        f"import sys\nfrom paroquant_stream.backends.mlx_lm import MlxLm\n"
        f"assert MlxLm().why_unknown({{'model_type': {kind!r}}}) is None\n"
        "assert not {'mlx_lm', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_class_without_sanitize_keeps_the_names():
    weights = {"x": mx.zeros(1)}
    assert MlxLm().sanitize(nn.Module(), weights) is weights


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [("qwen3_5_text", "qwen3_5"), ("qwen3_5_moe_text", "qwen3_5_moe"), ("llama", "llama")],
)
def test_a_text_only_type_has_the_librarys_name(model_dir, model_type, expected):
    (model_dir / "config.json").write_text(json.dumps(CONFIG | {"model_type": model_type}))
    assert load_config(model_dir)["model_type"] == expected


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({"rope_theta": 5e5, "rope_type": "default"}, 5e5, None),
        ({"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}, 5e5, "linear"),
        ({"full_attention": {"rope_theta": 5e5}}, None, None),  # one for each type of layer
        (None, None, None),
    ],
)
def test_rope_parameters_of_transformers_5_reach_all_classes(model_dir, rope, theta, scaling):
    config = {key: value for key, value in CONFIG.items() if not key.startswith("rope")}
    (model_dir / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    found = load_config(model_dir)
    assert found.get("rope_theta") == theta
    assert (found.get("rope_scaling") or {}).get("rope_type") == scaling
    assert MlxLm().build(found) is not None


def test_a_rope_theta_of_its_own_stays(model_dir):
    both = {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}
    (model_dir / "config.json").write_text(json.dumps(CONFIG | both))
    assert load_config(model_dir)["rope_theta"] == 1e4


def test_a_config_without_a_type_is_read(model_dir):
    without = {key: value for key, value in CONFIG.items() if key != "model_type"}
    (model_dir / "config.json").write_text(json.dumps(without))
    assert load_config(model_dir)["model_type"] is None


def test_code_of_a_tokenizer_is_refused_without_a_question(model_dir, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers prompted the user"))
    (model_dir / "mine.py").write_text("raise SystemExit('the code was run')")
    settings = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (model_dir / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="trust_remote_code"):
        MlxLm().load_tokenizer(model_dir, CONFIG)


def test_a_low_limit_of_open_files_is_one_message(monkeypatch):
    def refuse(*_):
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.delitem(sys.modules, "mlx_lm.utils", raising=False)
    monkeypatch.setattr("resource.setrlimit", refuse)
    with pytest.raises(ExecutionError, match="it needs 4096 open files, see `ulimit -Hn`"):
        import_utils()


def test_an_import_that_fails_in_another_thread_meanwhile_is_the_same_error(tmp_path):
    """A first load imports the library in a thread while worker processes convert."""
    (tmp_path / "mlx_lm").mkdir()
    (tmp_path / "mlx_lm" / "__init__.py").touch()
    broken = "import time; time.sleep(0.4); raise ImportError('libfoo is absent')"
    (tmp_path / "mlx_lm" / "utils.py").write_text(broken)
    script = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from paroquant_stream.backends.mlx_lm import import_utils
from paroquant_stream.errors import MissingExtraError
from paroquant_stream.execution.threads import in_background
in_background(import_utils, "import")
while "mlx_lm.utils" not in sys.modules:
    pass
try:
    import_utils()
except MissingExtraError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "libfoo is absent" in done.stdout
