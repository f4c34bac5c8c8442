"""load() from one file in the model directory: ours, and that of pull request 50."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from paroquant_stream import load
from paroquant_stream.api import load as api
from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import AssemblyError, CheckpointError, ParoquantStreamError
from paroquant_stream.exports import single_file
from paroquant_stream.exports.single_file import NAME, NO_DIGEST, hash_single, with_digest
from paroquant_stream.exports.single_file_writer import export_single_file
from tests.helpers.builders import (
    cut_evenly,
    llama_tensors,
    write_checkpoint,
)
from tests.helpers.parameters import assert_same, parameters
from tests.helpers.paths import FIXTURES
from tests.helpers.single_files import as_pull_request_50, export, remove_sources

pytestmark = pytest.mark.usefixtures("on_the_cpu", "settled")
LLAMA, MOE, VISION = "llama-awq-adversarial", "qwen3_moe-awq-adversarial", "qwen3_5-awq-adversarial"


def edit(path: Path, change) -> None:
    """Rewrites the header as `change(table)` left it, with a digest that fits, as an enemy would;
    one that `change` made up stays.
    """
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    before = table["__metadata__"]["xxh3"]
    change(table)
    text = json.dumps(table, separators=(",", ":")).encode()
    header = len(text).to_bytes(8, "little") + text
    path.write_bytes(with_digest(header, NO_DIGEST, before) + data[8 + length :])
    if isinstance(table["__metadata__"], dict) and table["__metadata__"].get("xxh3") == before:
        with path.open("r+b") as file:
            digest = hash_single(file.fileno(), len(header), "x")
            file.write(with_digest(header, digest, before))


@pytest.mark.parametrize("name", [LLAMA, MOE, VISION, "gemma4_moe-awq-adversarial"])
@pytest.mark.parametrize("force_text", [False, True])
def test_gives_the_model_that_the_entries_give_bit_for_bit(name, force_text, tmp_path):
    directory = shutil.copytree(FIXTURES / name, tmp_path / "model")
    correct, _, was_vlm = load(directory, force_text=force_text, cache_dir=tmp_path / "cache")
    export(directory, tmp_path / "cache")
    remove_sources(directory)
    found, tokenizer, is_vlm = load(directory, force_text=force_text)
    assert is_vlm == was_vlm
    assert_same(parameters(found), parameters(correct))
    assert tokenizer is not None


def test_is_used_before_the_cache_and_nothing_is_converted(exported, no_conversion):
    load(exported)
    load(exported, verify="full")


def test_config_tokenizer_and_this_file_are_a_model(alone, no_conversion):
    load(alone)
    load(alone, lazy=True)


def test_the_conversion_in_mlx_comes_first(exported, monkeypatch):
    convert(make_request(exported, in_place=True, jobs=1))
    monkeypatch.setattr(single_file, "opened", lambda _: pytest.fail("looked at"))
    load(exported)


@pytest.mark.parametrize("position", [2, 9, 60, 200, 400, 900, 1500, 17_000, -1])
def test_a_flipped_bit_is_never_served(alone, position):
    path = alone / NAME
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(ParoquantStreamError, match=NAME):
        load(alone)


@pytest.mark.parametrize("size", [0, 7, 5000, 17_000, -1])
def test_a_file_cut_short_is_never_served(exported, size, caplog):
    path = exported / NAME
    path.write_bytes(path.read_bytes()[:size])
    load(exported)
    assert f"not used: {path}" in caplog.text
    remove_sources(exported)
    with pytest.raises(CheckpointError, match=rf"(?s)model\.safetensors exists.*{NAME}"):
        load(exported, cache_dir=exported / "empty")


def sources(text: str):
    return lambda metadata: metadata.update(sources=text)


SHA = "0" * 64
HOSTILE = {
    "no sources": (lambda m: m.pop("sources"), "not valid JSON"),
    "no json": (sources("{"), "not valid JSON"),
    "nested deeply": (sources("[" * 1_000_000), "not valid JSON"),
    "a lone surrogate": (sources('{"\ud800":"x"}'), "not valid JSON"),
    "a number": (sources("9" * 5000), "not valid JSON"),
    "a shard twice": (sources('{"a.safetensors":"0","a.safetensors":"1"}'), "duplicate key"),
    "a list": (sources("[]"), "no map of 1 to 10,000 shards"),
    "an empty map": (sources("{}"), "no map of 1 to 10,000 shards"),
    "20,000 shards": (
        sources(json.dumps({f"m{i}.safetensors": SHA for i in range(20_000)})),
        "no map of 1 to 10,000 shards",
    ),
    "a path": (sources(f'{{"../m.safetensors":"{SHA}"}}'), "no shard and SHA-256"),
    "an absolute path": (sources(f'{{"/m.safetensors":"{SHA}"}}'), "no shard and SHA-256"),
    "no sha": (sources('{"m.safetensors":7}'), "no shard and SHA-256"),
    "a short sha": (sources(f'{{"m.safetensors":"{SHA[1:]}"}}'), "no shard and SHA-256"),
    "other names": (lambda m: m.update(names="model"), "by a newer version"),
    "no names": (lambda m: m.pop("names"), "by a newer version"),
    "no digest": (lambda m: m.pop("xxh3"), "xxh3 is no digest"),
    "a digest too long": (lambda m: m.update(xxh3="0" * 33), "xxh3 is no digest"),
    "a made-up digest": (lambda m: m.update(xxh3="1" * 32), "damaged: expected XXH3 1111"),
    "other transform": (lambda m: m.update(transform="x"), "made by another version"),
    "a list for a string": (lambda m: m.update(names=["checkpoint"]), "is not a map of strings"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_untrusted_metadata_warns_with_sources_and_fails_without(case, exported, caplog):
    change, reason = HOSTILE[case]
    edit(exported / NAME, lambda table: change(table["__metadata__"]))
    load(exported)
    assert "not used: " in caplog.text
    assert reason in caplog.text
    remove_sources(exported)
    with pytest.raises(CheckpointError, match=reason):
        load(exported, cache_dir=exported / "empty")


def test_metadata_that_is_no_map_is_refused(exported, caplog):
    edit(exported / NAME, lambda table: table.update(__metadata__="x" * 1_000_000))
    load(exported)
    assert "__metadata__ is not a map of strings" in caplog.text


def test_sources_that_are_not_these_are_stale(exported, caplog):
    edit(exported / NAME, lambda t: sources(f'{{"m.safetensors":"{SHA}"}}')(t["__metadata__"]))
    load(exported)
    assert "model-00001-of-00003.safetensors was not there when it was made" in caplog.text


def rename(table: dict) -> None:
    table["model.norm.weighs"] = table.pop("model.norm.weight")


def test_a_header_that_was_changed_without_its_digest_is_damaged(alone):
    path = alone / NAME
    path.write_bytes(path.read_bytes().replace(b"model.norm.weight", b"model.norm.weighs"))
    with pytest.raises(CheckpointError, match="damaged: expected XXH3"):
        load(alone)


def test_a_renamed_tensor_is_never_loaded_though_the_digest_fits(alone):
    edit(alone / NAME, rename)
    with pytest.raises(
        AssemblyError, match=r"no use for these tensors:\n  model.norm.weighs|differences"
    ):
        load(alone)


def test_unknown_metadata_is_read_as_pull_request_50(exported, caplog):
    edit(exported / NAME, lambda table: table["__metadata__"].pop("writer"))
    load(exported)
    assert "nothing in it tells whether it was made from model-00001" in caplog.text


def test_tensors_that_do_not_fit_the_config_are_an_error(alone):
    config = json.loads((alone / "config.json").read_text())
    config["quantization_config"]["group_size"] = 64
    (alone / "config.json").write_text(json.dumps(config))
    with pytest.raises(AssemblyError, match="differences between the model class"):
        load(alone)


def test_a_link_that_leads_out_of_the_directory_is_not_followed(alone, tmp_path):
    (alone / NAME).rename(tmp_path / "elsewhere.safetensors")
    (alone / NAME).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)a link to .*, outside of the model directory"):
        load(alone)


def test_a_link_inside_of_the_directory_is_followed(alone, no_conversion):
    (alone / NAME).rename(alone / "real.safetensors")
    (alone / NAME).symlink_to("real.safetensors")
    load(alone)


def test_a_pipe_of_this_name_is_not_waited_for(exported, caplog):
    (exported / NAME).unlink()
    os.mkfifo(exported / NAME)
    load(exported)
    assert "expected a regular file" in caplog.text


def test_a_model_without_single_file_keeps_its_own_error(alone):
    (alone / NAME).unlink()
    with pytest.raises(CheckpointError) as caught:
        load(alone)
    assert "not used" not in str(caught.value)


# The form of pull request 50


FOREIGN = [
    (LLAMA, True),
    (MOE, True),
    (VISION, True),
    (VISION, False),
    ("gemma4_e2b-awq-adversarial", True),
    ("gemma4_moe-awq-adversarial", True),
    ("gemma3_text-awq-adversarial", True),
]


@pytest.mark.parametrize(("name", "text"), FOREIGN)
def test_the_file_of_pull_request_50_gives_our_model_bit_for_bit(name, text, tmp_path, caplog):
    directory = shutil.copytree(FIXTURES / name, tmp_path / "model")
    correct, _, was_vlm = load(directory, force_text=text)
    as_pull_request_50(directory, text)
    found, _, is_vlm = load(directory)
    assert is_vlm == was_vlm
    assert ("saved without its vision tower" in caplog.text) == (
        text and "vision_config" in (directory / "config.json").read_text()
    )
    assert_same(parameters(found), parameters(correct))
    lazy, _, _ = load(directory, lazy=True)
    assert_same(parameters(lazy), parameters(correct))


def test_the_text_part_of_a_pull_request_50_vision_file_loads(tmp_path):
    directory = shutil.copytree(FIXTURES / VISION, tmp_path / "model")
    correct, _, _ = load(directory, force_text=True)
    as_pull_request_50(directory, force_text=False)
    assert_same(parameters(load(directory, force_text=True)[0]), parameters(correct))


@pytest.mark.parametrize("name", [VISION, "gemma4_e2b-awq-adversarial"])
@pytest.mark.parametrize("force_text", [False, True])
def test_a_tower_under_model_names_is_loaded_or_left(name, force_text, tmp_path):
    """What the public loader would save if it kept every tower, embeddings quantized already."""
    directory = shutil.copytree(FIXTURES / name, tmp_path / "model")
    correct, _, was_vlm = load(directory, force_text=force_text)
    whole = parameters(load(directory)[0])
    remove_sources(directory)
    mx.save_safetensors(str(directory / NAME), whole)
    found, _, is_vlm = load(directory, force_text=force_text)
    assert is_vlm == was_vlm == (not force_text)
    assert_same(parameters(found), parameters(correct))


def test_the_file_of_pull_request_50_is_not_used_beside_a_source(tmp_path, caplog):
    directory = shutil.copytree(FIXTURES / LLAMA, tmp_path / "model")
    as_pull_request_50(directory, force_text=True)
    shutil.copytree(FIXTURES / LLAMA, directory, dirs_exist_ok=True)
    load(directory)
    assert f"{NAME}: nothing in it tells whether it was made from model-00001" in caplog.text


@pytest.mark.parametrize("change", ["dropped", "added", "reshaped", "float with scales"])
def test_a_pull_request_50_file_that_does_not_fit_is_an_error(tmp_path, change):
    directory = shutil.copytree(FIXTURES / LLAMA, tmp_path / "model")
    as_pull_request_50(directory, force_text=True)
    weights = mx.load(str(directory / NAME))
    norm = weights.pop("model.norm.weight")
    if change == "added":
        weights |= {"model.norm.weight": norm, "model.other.weight": norm}
    elif change == "reshaped":
        weights["model.norm.weight"] = norm[1:]
    elif change == "float with scales":
        weights |= {"model.norm.weight": norm, "model.embed_tokens.scales": norm}
    mx.save_safetensors(str(directory / NAME), weights)
    with pytest.raises(CheckpointError, match=rf"(?s)not used: .*{NAME}.*\d differences.*model\."):
        load(directory)


def test_an_ignored_file_is_not_used_after_a_drop(model_dir, tmp_path):
    """Ours, made from older shards, and one that says nothing of what it was made from."""
    old = write_checkpoint(tmp_path / "old", llama_tensors(7), cut_evenly(3))
    export_single_file(make_request(old, cache_dir=tmp_path / "old-cache"), tmp_path / NAME)
    right = parameters(api.load(model_dir, cache_dir=tmp_path / "right")[0])
    stale = parameters(api.load(old, cache_dir=tmp_path / "old-cache")[0])
    for form in ("ours", "pull request 50"):
        directory = shutil.copytree(model_dir, tmp_path / f"model {form}")
        if form == "ours":
            shutil.copy(tmp_path / NAME, directory / NAME)
        else:
            mx.save_safetensors(str(directory / NAME), stale)
        convert(make_request(directory, drop_source=True, jobs=1))
        for moved in (directory, directory.rename(tmp_path / f"moved {form}")):
            if moved.exists():
                found = parameters(api.load(moved)[0])
                assert all(mx.array_equal(found[name], right[name]).item() for name in right)
