"""Tiny checkpoints of random bytes in the right shapes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from paroquant_stream.files import descriptor, digest_cache
from paroquant_stream.files.descriptor import FileStamp
from paroquant_stream.files.digest_cache import SAMPLE_SIZE, SAMPLES, DigestCache
from paroquant_stream.files.filesystems import Ctime

SETTLED = """
from paroquant_stream.files import descriptor, digest_cache, filesystems
descriptor.RACY_SECONDS = descriptor.TICK_SECONDS = -1
digest_cache.ctime_kind = lambda *_: filesystems.Ctime.LOCAL
"""
"""The fixture `settled`, for a process of its own."""


def settle(patch: pytest.MonkeyPatch) -> None:
    """Every file counts as settled and its times as reliable, so that its digest is stored."""
    patch.setattr(descriptor, "RACY_SECONDS", -1)
    patch.setattr(descriptor, "TICK_SECONDS", -1)
    patch.setattr(digest_cache, "ctime_kind", lambda *_: Ctime.LOCAL)


Tensors = dict[str, np.ndarray]
Cut = Callable[[list[str]], Mapping[str, str]]

HIDDEN, INTERMEDIATE, VOCAB, GROUP, KROT, HEAD = 64, 128, 64, 32, 3, 32
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": HEAD,
    "num_hidden_layers": 2,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "quantization_config": {
        "quant_method": "paroquant",
        "bits": 4,
        "group_size": GROUP,
        "krot": KROT,
    },
}
LINEARS = {
    "self_attn.q_proj": (64, HIDDEN),
    "self_attn.k_proj": (32, HIDDEN),
    "self_attn.v_proj": (32, HIDDEN),
    "self_attn.o_proj": (HIDDEN, 64),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
"""Outputs and inputs of each quantized linear of a layer."""


def awq_linear(
    rng: np.random.Generator, module: str, outputs: int, inputs: int, group: int = GROUP
) -> Tensors:
    """The AutoAWQ parts of one linear, with some zero points of 0."""
    words = {"dtype": np.int32, "low": -(2**31), "high": 2**31}
    qzeros = rng.integers(size=(inputs // group, outputs // 8), **words)
    qzeros[:, 0] = 0
    return {
        f"{module}.qweight": rng.integers(size=(inputs, outputs // 8), **words),
        f"{module}.qzeros": qzeros,
        f"{module}.scales": rng.uniform(0.001, 0.02, (inputs // group, outputs)).astype(np.float16),
        **rotation(rng, module, inputs, group),
    }


def rotation(rng: np.random.Generator, module: str, inputs: int, group: int = GROUP) -> Tensors:
    """A rotation's theta, pairs (a permutation of each group) and channel scales."""
    groups = [
        np.concatenate([rng.permutation(group) for _ in range(inputs // group)])
        for _ in range(KROT)
    ]
    return {
        f"{module}.theta": rng.normal(0, 0.2, (KROT, inputs // 2)).astype(np.float16),
        f"{module}.pairs": np.stack(groups).astype(np.int16),
        f"{module}.channel_scales": rng.uniform(0.8, 1.2, (1, inputs)).astype(np.float16),
    }


def llama_tensors(seed: int = 0, layers: int = CONFIG["num_hidden_layers"]) -> Tensors:
    """Every tensor of an AutoAWQ llama."""
    rng = np.random.default_rng(seed)

    def noise(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.05, shape).astype(np.float16)

    tensors = {"model.embed_tokens.weight": noise(VOCAB, HIDDEN)}
    for layer in range(layers):
        base = f"model.layers.{layer}"
        tensors[f"{base}.input_layernorm.weight"] = 1 + noise(HIDDEN)
        tensors[f"{base}.post_attention_layernorm.weight"] = 1 + noise(HIDDEN)
        for name, (outputs, inputs) in LINEARS.items():
            tensors |= awq_linear(rng, f"{base}.{name}", outputs, inputs)
    tensors["model.norm.weight"] = 1 + noise(HIDDEN)
    tensors["lm_head.weight"] = noise(VOCAB, HIDDEN)
    return tensors


def cut_evenly(shards: int) -> Cut:
    """Consecutive runs of names, as the usual cut by size gives; triples may be split."""

    def cut(names: list[str]) -> dict[str, str]:
        size = -(-len(names) // shards)
        return {
            n: f"model-{i // size + 1:05}-of-{shards:05}.safetensors" for i, n in enumerate(names)
        }

    return cut


def cut_apart(shards: int) -> Cut:
    """Adjacent names in different shards, so that no linear has two tensors in one shard."""

    def cut(names: list[str]) -> dict[str, str]:
        return {
            n: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, n in enumerate(names)
        }

    return cut


def write_checkpoint(
    directory: Path,
    tensors: Tensors | None = None,
    cut: Cut | None = None,
    config: Mapping[str, object] = CONFIG,
) -> Path:
    """Write a model directory; without `cut`, one `model.safetensors` and no index."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = llama_tensors() if tensors is None else tensors
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory)
    if cut is None:
        save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map = cut(sorted(tensors))
    for shard in sorted(set(weight_map.values())):
        held = {name: tensors[name] for name, home in weight_map.items() if home == shard}
        save_file(held, directory / shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_tokenizer(directory: Path) -> None:
    """A word-level tokenizer of VOCAB words."""
    vocab = {"<unk>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def as_hub_snapshot(directory: Path, repository: Path) -> Path:
    """The model in the form of the Hub's cache: shards are links to blobs, named by SHA-256."""
    snapshot = repository / "snapshots" / "0123456789abcdef"
    (repository / "blobs").mkdir(parents=True)
    snapshot.parent.mkdir()
    directory.rename(snapshot)
    for shard in snapshot.glob("*.safetensors"):
        name = hashlib.sha256(shard.read_bytes()).hexdigest()
        shard.rename(repository / "blobs" / name)
        shard.symlink_to(f"../../blobs/{name}")
    return snapshot


def remember(digest_cache: DigestCache, path: Path, digest: str) -> None:
    """Store a digest for a file as it is now; needs the fixture `settled`."""
    fd = os.open(path, os.O_RDONLY)
    digest_cache.remember_written(fd, FileStamp.of(os.fstat(fd)), digest)
    assert digest_cache.lookup(fd) == digest
    os.close(fd)


def flip(path: Path, at: int) -> None:
    """Flip one bit of a file, in place."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def uncovered(path: Path) -> int:
    """Return the position of a byte that no sample covers, in the middle of the widest gap."""
    size = path.stat().st_size
    starts = [(size - SAMPLE_SIZE) * i // (SAMPLES - 1) for i in range(SAMPLES)]
    gap, first = max((after - before, before) for before, after in pairwise(starts))
    assert gap > 2 * SAMPLE_SIZE, "the sample covers all of the file"
    return first + (gap + SAMPLE_SIZE) // 2


def temp_of(pid: int, **others: str | int) -> str:
    """Return the temp file name of a process of this system, with some fields replaced."""
    from paroquant_stream.files import temp_files

    fields = {**temp_files._this_system()._asdict(), "pid": pid, **others}
    return "{machine}-{boot}-{space}-{pid}-{random}".format(random="0" * 32, **fields)


def write_llama(tmp_path, config=None, drop=(), **more) -> Path:
    """A llama of two shards without some tensors, with more of them, or with another config."""
    tensors = {n: a for n, a in llama_tensors().items() if n not in drop} | more
    return write_checkpoint(tmp_path / "m", tensors, cut_apart(2), CONFIG | (config or {}))
