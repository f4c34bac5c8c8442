"""Exports with a tower: stock mlx-vlm runs them and gives our bits, `load` reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.utils import load_model

from paroquant_stream import export_model, load
from paroquant_stream.checkpoint.config import EXPORTED
from paroquant_stream.errors import CheckpointError
from paroquant_stream.exports import standalone_vision
from paroquant_stream.exports.exported_config import MODEL_FILE, NEEDS_MLX_VLM, VISION_FILE
from paroquant_stream.exports.standalone_code import model_code
from tests.helpers.paths import FIXTURES
from tests.helpers.stock import ASKS, stock
from tests.helpers.vision_models import with_processor, write_image

vlm = pytest.importorskip("mlx_vlm")
utils = pytest.importorskip("mlx_vlm.utils")
pytestmark = pytest.mark.usefixtures("on_the_cpu")
PICTURE = "qwen3_5"
FAMILIES = [
    "qwen3_5_moe-awq-adversarial",
    "gemma4_moe-awq-adversarial",
    "gemma4_e2b-awq-adversarial",  # an audio tower
    "gemma4_unified-awq-adversarial",  # no towers but embedders
]
STOCK = """
class NoMlxLm:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mlx_lm":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, NoMlxLm())
import hashlib
from pathlib import Path
from mlx.utils import tree_flatten
from mlx_vlm import generate, load
from mlx_vlm.prompt_utils import apply_chat_template
from mlx_vlm.utils import load_model

def described(model):
    digest = hashlib.sha256()
    for name, array in sorted(tree_flatten(model.parameters())):
        view = memoryview(mx.contiguous(array.reshape(-1)).view(mx.uint8))
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + bytes(view))
    logits = model(mx.array([[5, 9, 17, 42, 3]])).logits
    bits = np.array(logits.astype(mx.float32)).tobytes()
    return [type(model).__module__, digest.hexdigest(), hashlib.sha256(bits).hexdigest()]

def answer(model, processor, image):
    prompt = apply_chat_template(processor, model.config, "w5 w9", num_images=1)
    return generate(model, processor, prompt, [image], max_tokens=8, verbose=False).text
"""
RUN = """
found = {"blocked": blocked}
for directory in sys.argv[2:]:
    found[directory] = described(load_model(Path(directory)))
model, processor = load(sys.argv[2])
found["answer"] = answer(model, processor, sys.argv[1])
print(json.dumps(found))
"""


def functions() -> dict:
    """`described` and `answer`, as the other process runs them."""
    names: dict = {"sys": __import__("sys"), "mx": mx, "np": np}
    start = STOCK.index("import hashlib")
    exec(STOCK[start:], names)
    return names


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    picture = with_processor(root / PICTURE)
    return {PICTURE: picture} | {name: FIXTURES / name for name in FAMILIES}


@pytest.fixture(scope="module")
def exports(tmp_path_factory, models) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    for name, model in models.items():
        export_model(model, root / name, vision=True, cache_dir=root / "cache")
    return {name: root / name for name in models}


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    return write_image(tmp_path_factory.mktemp("images") / "x.png")


@pytest.fixture(scope="module")
def stock_answers(exports, image) -> dict:
    done = stock(STOCK + RUN, str(image), *map(str, exports.values()))
    assert done.returncode == 0, done.stderr
    found: dict = json.loads(done.stdout.splitlines()[-1])
    assert found["blocked"] == ["paroquant_stream is blocked", "paroquant is blocked"]
    return found


@pytest.mark.slow  # stock mlx-vlm runs in a process of its own
@pytest.mark.parametrize("name", [PICTURE, *FAMILIES])
def test_stock_mlx_vlm_has_our_class_parameters_and_logits(name, models, exports, stock_answers):
    ours, _, is_vlm = load(models[name])
    assert is_vlm
    assert stock_answers[str(exports[name])] == functions()["described"](ours)


@pytest.mark.slow
def test_stock_mlx_vlm_answers_about_an_image_as_through_load(models, image, stock_answers):
    model, processor, _ = load(models[PICTURE])
    answer = functions()["answer"]
    assert stock_answers["answer"] == answer(model, processor, str(image)) != ""
    other = write_image(image.with_name("y.png"), seed=1)
    assert stock_answers["answer"] != answer(model, processor, str(other))  # it saw the image


def test_load_reads_it_without_running_its_code(models, exports, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(exports[PICTURE], out)
    for name in (VISION_FILE, MODEL_FILE):
        (out / name).write_text("raise SystemExit('it ran')")
    model, processor, is_vlm = load(out)
    assert is_vlm
    original, _, _ = load(models[PICTURE])
    described = functions()["described"]
    assert described(model) == described(original)
    assert hasattr(processor, "image_processor")


def test_its_text_part_is_refused_with_what_to_do(exports):
    with pytest.raises(CheckpointError, match="without --vision"):
        load(exports[PICTURE], force_text=True)


def test_it_holds_the_settings_of_the_processor_and_two_files_of_code(models, exports):
    out = exports[PICTURE]
    name = "preprocessor_config.json"
    assert (out / name).read_bytes() == (models[PICTURE] / name).read_bytes()
    assert (out / VISION_FILE).read_bytes() == Path(standalone_vision.__file__).read_bytes()
    assert (out / MODEL_FILE).read_text() == model_code()
    assert {path.name for path in out.glob("*.py")} == {VISION_FILE, MODEL_FILE}


def test_its_names_are_those_of_the_package():
    assert standalone_vision.MARK == EXPORTED
    assert standalone_vision.LAYERS == MODEL_FILE


def test_a_part_that_the_class_removes_itself_is_not_missed():
    """As MiniCPM-o's its voice; the weights stay as they are."""
    model, weights = nn.Module(), {"norm.weight": mx.ones(2)}
    model.norm, model.voice = nn.RMSNorm(2), nn.Linear(2, 2)

    def sanitize(given: dict) -> dict:
        assert given.keys() == weights.keys()
        model.pop("voice")
        return {}

    for _ in range(2):  # a second call finds nothing missing, or `pop` would fail
        assert standalone_vision._sanitize(model, sanitize, weights) is weights
    assert "voice" not in model


@pytest.mark.parametrize(("trusted", "why"), [(False, "trust_remote_code"), (True, "mlx_vlm")])
def test_mlx_lm_does_not_load_it_and_says_why(exports, trusted, why):
    trust = {"trust_remote_code": trusted} if ASKS else {}
    with pytest.raises(ValueError, match=why if ASKS else "mlx_vlm"):
        load_model(exports[PICTURE], strict=False, **trust)


def test_a_library_that_does_not_look_for_its_code_refuses_it(exports, tmp_path):
    """As mlx-vlm before 0.6.16, which takes the mode of the quantization as it is."""
    out = tmp_path / "out"
    shutil.copytree(exports[PICTURE], out)
    config = json.loads((out / "config.json").read_text())
    del config["model_file"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, KeyError), match=NEEDS_MLX_VLM):  # by the version of MLX
        utils.load_model(out, strict=False)


def test_the_export_of_a_text_model_is_refused_by_a_sentence(tmp_path):
    export_model(FIXTURES / "llama-awq-adversarial", tmp_path / "out", self_contained=True)
    # mlx-vlm before 0.6.16 runs no `model_file`, and says the model type
    why = "a text model, which mlx-vlm cannot load: use mlx-lm|trust_remote_code_required__llama"
    with pytest.raises(ValueError, match=why):
        utils.load_model(tmp_path / "out")


def test_a_model_without_a_tower_is_refused_before_any_work(model_dir, tmp_path):
    with pytest.raises(CheckpointError, match="no vision tower"):
        export_model(model_dir, tmp_path / "out", vision=True, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_tower_without_tensors_is_no_tower(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(FIXTURES / "qwen3_5_text-awq-size", model)
    vision = json.loads((FIXTURES / "qwen3_5-awq-adversarial" / "config.json").read_text())
    config = json.loads((model / "config.json").read_text())
    config["vision_config"] = vision["vision_config"]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no vision tower"):
        export_model(model, tmp_path / "out", vision=True)
    assert not (tmp_path / "out").exists()
