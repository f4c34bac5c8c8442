"""Options of the public functions: a wrong value is an error before anything is read."""

from __future__ import annotations

import pytest

from paroquant_stream import (
    convert_checkpoint,
    convert_checkpoints,
    export_model,
    install,
    load,
    uninstall,
)
from paroquant_stream.api.load_options import LoadOptions
from paroquant_stream.conversion import request
from tests.helpers.ranks import Rank

CONVERSION = {"cache_dir": 5, "jobs": 1.5, "revision": 7, "io_bits": 5, "progress": 3}
LOAD = CONVERSION | {
    "lazy": "no", "force_text": 1, "dtype": "x", "verify": True, "trace": 4,
    "layers": 3, "group": 2, "parallel": "x", "model_config": 8, "tokenizer": "no",
}  # fmt: skip
OF_THE_PROGRAM = {"lazy", "force_text", "model_config", "tokenizer"}
CONVERT = CONVERSION | {
    "in_place": "no", "force": 1, "drop_source": "no", "dtype": [], "executor": 2, "trace": 4,
}  # fmt: skip
EXPORT = {name: value for name, value in CONVERSION.items() if name != "io_bits"}
EXPORT |= {"self_contained": "no", "vision": 1, "shard_size": "5GB"}


@pytest.fixture(autouse=True)
def _nothing_is_read(monkeypatch):
    monkeypatch.setattr(request, "locate", lambda *_: pytest.fail("a model was looked up"))


@pytest.mark.parametrize("name", LOAD)
def test_load_refuses(name):
    with pytest.raises(ValueError, match=f"^{name} is .*, not {LOAD[name]!r}$"):
        load("owner/name", **{name: LOAD[name]})


@pytest.mark.parametrize("name", CONVERT)
def test_a_conversion_refuses(name):
    for convert, models in ((convert_checkpoint, "owner/name"), (convert_checkpoints, [])):
        with pytest.raises(ValueError, match=f"^{name} is .*, not ") as error:
            convert(models, **{name: CONVERT[name]})
        assert str(error.value).endswith(repr(CONVERT[name]))


@pytest.mark.parametrize("name", EXPORT)
def test_an_export_refuses(name, tmp_path):
    with pytest.raises(ValueError, match=f"^{name} is .*, not {EXPORT[name]!r}$"):
        export_model("owner/name", tmp_path / "out", **{name: EXPORT[name]})


def test_the_models_and_the_target_are_paths():
    with pytest.raises(ValueError, match="model_path is a path, not 3"):
        load(3)
    with pytest.raises(ValueError, match="out is a path, not 3"):
        export_model("owner/name", 3)
    with pytest.raises(ValueError, match=r"model_paths is a list of paths .*, not 'owner/name'"):
        convert_checkpoints("owner/name")
    with pytest.raises(ValueError, match="model_paths is a path, not 3"):
        convert_checkpoints(["owner/name", 3])


@pytest.mark.parametrize("name", sorted(LOAD.keys() - OF_THE_PROGRAM))
def test_install_refuses_at_once(name):
    try:
        with pytest.raises(ValueError, match=f"^{name} is "):
            install(**{name: LOAD[name]})
    finally:
        uninstall()


def test_what_is_allowed_is_accepted():
    LoadOptions()
    options = LoadOptions(
        True, False, "cache", 2, "main", "float16", 8, print, "full", "t.json", None, Rank(0, 2)
    )
    assert options.conversion.jobs == 2
    assert options.split.group.size() == 2
