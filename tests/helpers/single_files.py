"""A model's single file, as this package and as pull request 50 write it."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from paroquant.inference.backends.mlx.load import load as public_load

from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request
from paroquant_stream.exports.single_file import NAME
from paroquant_stream.exports.single_file_writer import write_single_file


def shards(directory: Path) -> list[Path]:
    return [path for path in directory.glob("*.safetensors") if path.name != NAME]


def remove_sources(directory: Path) -> None:
    for path in [*shards(directory), directory / "model.safetensors.index.json"]:
        path.unlink(missing_ok=True)


def export(directory: Path, cache: Path) -> Path:
    """The model's single file beside it, made from entries in another cache than the user's."""
    request = make_request(directory, cache_dir=cache, jobs=1)
    write_single_file(convert(request).manifest, request.store, directory / NAME)
    return directory / NAME


def as_pull_request_50(directory: Path, force_text: bool) -> None:
    """Leaves in the directory only what its documentation says to keep: the public loader's model,
    saved under the model's names before embeddings and head were quantized.
    """
    stored = {k: a for path in shards(directory) for k, a in mx.load(str(path)).items()}
    model, _, _ = public_load(str(directory), force_text=force_text)
    weights = dict(tree_flatten(model.parameters()))
    for name in [
        name for name in weights if name.endswith(("embed_tokens.weight", "lm_head.weight"))
    ]:
        module = name.removesuffix(".weight")
        leaf = module.rpartition(".")[2]
        weights[name] = next(a for k, a in stored.items() if k.endswith(f"{leaf}.weight"))
        del weights[f"{module}.scales"], weights[f"{module}.biases"]
    remove_sources(directory)
    mx.save_safetensors(str(directory / NAME), weights)
