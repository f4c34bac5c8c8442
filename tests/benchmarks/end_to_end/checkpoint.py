"""Writes a llama checkpoint with the shapes of a 70B, a chosen number of layers, in a stream.

    python -m tests.benchmarks.end_to_end.checkpoint OUT [--layers 8] [--shards 6]
        [--layout AUTOAWQ] [--vocab 12800] [--processes 1]

8 layers are 4.0 GB; `--layers 80 --vocab 128256` is a whole 70B of 39.9 GB. Packed words are random
bytes (one 8 MB tile of them, written again and again, each time from another offset), so nothing
compresses and making it is quick; scales and rotations are plausible.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from paroquant_stream.execution.processes import processes as worker_processes

GROUP, KROT = 128, 8
TOY = {"layers": 1, "vocab": 256, "hidden": 512, "intermediate": 1024, "heads": 4, "kv_heads": 2}
"""Sizes of a few megabytes."""
ITEM = {"F16": 2, "I16": 2, "I32": 4}
Spec = tuple[str, str, tuple[int, ...]]


def tensors(
    layers: int,
    layout: str,
    vocab: int,
    hidden: int,
    intermediate: int,
    kv: int,
    biases: bool = False,
) -> Iterator[Spec]:
    """Name, dtype and shape of every tensor, in the order of the model."""
    yield "model.embed_tokens.weight", "F16", (vocab, hidden)
    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    for layer in range(layers):
        base = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{base}.{norm}.weight", "F16", (hidden,)
        for name, (outputs, inputs) in linears.items():
            yield from linear(f"{base}.{name}", layout, outputs, inputs)
            if biases and name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                yield f"{base}.{name}.bias", "F16", (outputs,)
    yield "model.norm.weight", "F16", (hidden,)
    yield "lm_head.weight", "F16", (vocab, hidden)


def linear(module: str, layout: str, outputs: int, inputs: int) -> Iterator[Spec]:
    """The parts of one linear."""
    grid = (inputs // GROUP, outputs)
    rotation = module
    if layout == "AUTOAWQ":
        yield f"{module}.qweight", "I32", (inputs, outputs // 8)
        yield f"{module}.qzeros", "I32", (inputs // GROUP, outputs // 8)
        yield f"{module}.scales", "F16", grid
    else:
        yield f"{module}.qlinear.qweight", "I16", (outputs // 4, inputs)
        yield f"{module}.qlinear.scaled_zeros", "F16", grid
        yield f"{module}.qlinear.scales", "F16", grid
        rotation = f"{module}.rotation"
    yield f"{rotation}.theta", "F16", (KROT, inputs // 2)
    yield f"{rotation}.pairs", "I16", (KROT, inputs)
    yield f"{rotation}.channel_scales", "F16", (1, inputs)


class Values:
    """Bytes for tensors: random words, or numbers that a real checkpoint might hold."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._tile = self._rng.bytes(8 << 20)

    def chunks(self, spec: Spec) -> Iterator[bytes]:
        """The bytes of one tensor."""
        name, _, shape = spec
        count = int(np.prod(shape))
        if name.endswith(("qweight", "qzeros")):
            left = count * ITEM[spec[1]]
            while left:
                start = int(self._rng.integers(0, len(self._tile) // 2)) & ~7
                chunk = self._tile[start : start + left]
                yield chunk
                left -= len(chunk)
            return
        if name.endswith("pairs"):
            groups = [self._rng.permutation(GROUP) for _ in range(count // GROUP)]
            yield np.concatenate(groups).astype(np.int16).tobytes()
            return
        low, high = (0.001, 0.02) if "scale" in name else (-0.05, 0.05)
        if name.endswith(("norm.weight", "channel_scales")):
            low, high = 0.9, 1.1
        tile = self._rng.uniform(low, high, min(count, 1 << 20)).astype(np.float16).tobytes()
        for start in range(0, count * 2, len(tile)):
            yield tile[: count * 2 - start]


def nbytes(spec: Spec) -> int:
    """Bytes of a tensor."""
    return int(np.prod(spec[2])) * ITEM[spec[1]]


def cut_by_size(specs: list[Spec], shards: int) -> list[list[Spec]]:
    """The usual greedy cut: a shard is closed when the next tensor would overfill it."""
    limit = sum(map(nbytes, specs)) / shards
    groups: list[list[Spec]] = [[]]
    filled = 0
    for spec in specs:
        if filled + nbytes(spec) / 2 > limit * len(groups) and len(groups) < shards:
            groups.append([])
        groups[-1].append(spec)
        filled += nbytes(spec)
    return groups


def make_checkpoint(
    out: Path,
    *,
    layers: int = 8,
    shards: int = 6,
    layout: str = "AUTOAWQ",
    vocab: int = 12_800,
    hidden: int = 8192,
    intermediate: int = 28_672,
    heads: int = 64,
    kv_heads: int = 8,
    seed: int = 0,
    model_type: str = "llama",
    order: Callable[[Spec], object] | None = None,
    processes: int = 1,
) -> None:
    """Writes the checkpoint into `out`; the same arguments give the same bytes in any number of
    shards, unless several processes write them. `model_type`: "llama", or "qwen2", which has
    biases. `order`: of the tensors in a shard, by default that of the model.
    """
    shapes = (vocab, hidden, intermediate, kv_heads * hidden // heads)
    specs = list(tensors(layers, layout, *shapes, biases=model_type == "qwen2"))
    config = {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    how = {"shards": shards, "seed": seed, "order": order, "processes": processes}
    write_checkpoint(out, specs, config, **how)


def write_checkpoint(
    out: Path,
    specs: list[Spec],
    config: dict[str, object],
    *,
    shards: int,
    seed: int = 0,
    order: Callable[[Spec], object] | None = None,
    processes: int = 1,
) -> None:
    """Writes these tensors and a config that says how they are quantized. With several processes
    each shard has random numbers of its own.
    """
    out.mkdir(parents=True, exist_ok=True)
    groups = cut_by_size(specs, shards)
    if order:
        groups = [sorted(group, key=order) for group in groups]
    names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    if len(groups) == 1:
        names = ["model.safetensors"]
    if processes > 1:
        with worker_processes(min(processes, len(groups))) as executor:
            paths, seeds = [out / name for name in names], range(seed, seed + len(groups))
            list(executor.map(write_alone, paths, groups, seeds))
    else:
        values = Values(seed)
        for name, group in zip(names, groups, strict=True):
            write_shard(out / name, group, values)
    weight_map = {spec[0]: n for n, group in zip(names, groups, strict=True) for spec in group}
    if len(groups) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
    how = {"quant_method": "paroquant", "bits": 4, "group_size": GROUP, "krot": KROT}
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": how}, indent=2))
    write_tokenizer(out)


def as_saved(spec: Spec) -> tuple[int, str, str]:
    """The order in which the safetensors library writes: wide dtypes first, then by name."""
    return -ITEM[spec[1]], spec[1], spec[0]


def write_shard(path: Path, specs: list[Spec], values: Values) -> None:
    """Writes one safetensors file, tensor by tensor."""
    header, offset = {}, 0
    for spec in specs:
        size = nbytes(spec)
        header[spec[0]] = {
            "dtype": spec[1],
            "shape": spec[2],
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            for chunk in values.chunks(spec):
                file.write(chunk)


def write_alone(path: Path, specs: list[Spec], seed: int) -> None:
    """Writes one safetensors file with random numbers of its own."""
    write_shard(path, specs, Values(seed))


def write_tokenizer(out: Path) -> None:
    """A tokenizer of a few words."""
    vocab = {"<unk>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, 100)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": model,
    }
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (out / "tokenizer_config.json").write_text(json.dumps(settings))


def main() -> int:
    """Reads the command line and writes the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--layout", choices=["AUTOAWQ", "PARO_NATIVE"], default="AUTOAWQ")
    parser.add_argument("--vocab", type=int, default=12_800)
    parser.add_argument("--processes", type=int, default=1)
    make_checkpoint(**vars(parser.parse_args()))
    return 0


if __name__ == "__main__":
    from tests.benchmarks.end_to_end.checkpoint import main as importable  # by worker processes

    sys.exit(importable())
