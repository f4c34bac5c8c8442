"""The models of the scale table: tensors in published order, as headers without data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from paroquant_stream.checkpoint.layout import Layout
from paroquant_stream.checkpoint.quantization import Quantization
from paroquant_stream.files.tensor_header import Header, TensorInfo
from paroquant_stream.files.tensor_writer import file_size
from paroquant_stream.plan.planner import Plan, make_plan
from paroquant_stream.plan.task import Task
from tests.benchmarks.end_to_end.checkpoint import (
    GROUP,
    KROT,
    Spec,
    as_saved,
    cut_by_size,
    linear,
    nbytes,
    tensors,
)


@dataclass(frozen=True)
class Model:
    """A checkpoint on paper."""

    name: str
    plan: Plan
    tensors: int
    plan_seconds: float
    """What planning took here."""

    @property
    def tasks(self) -> tuple[Task, ...]:
        """One for each shard."""
        return self.plan.tasks

    @property
    def size(self) -> int:
        """Bytes of the checkpoint."""
        return sum(task.size for task in self.tasks)

    @property
    def entries(self) -> int:
        """Bytes of its entries."""
        return sum(file_size(task.outputs) for task in self.tasks)

    @property
    def largest(self) -> int:
        """Bytes of the largest packed linear."""
        operations = [op for task in self.tasks for op in task.operations]
        return max(
            p.stop - p.start for op in operations if op.kind == "awq_weight" for p in op.slices[0]
        )


def dense(layers: int = 80, vocab: int = 128_256) -> list[Spec]:
    """A 70B: hidden 8192, intermediate 28,672, 64 heads and 8 kv heads of 128."""
    return list(tensors(layers, "AUTOAWQ", vocab, 8192, 28_672, 1024))


def moe(layers: int = 60, experts: int = 512, vocab: int = 248_320) -> list[Spec]:
    """The text part of a Qwen3.5-397B-A17B: hidden 4096, 512 experts and a shared one of 1024,
    every fourth layer attention (32 heads, 2 kv heads of 256, gated), the others gated delta nets
    (16 key heads and 64 value heads of 128). Embeddings, router and small projections are 16 bit.
    """
    hidden, inner = 4096, 1024
    specs: list[Spec] = [("model.embed_tokens.weight", "F16", (vocab, hidden))]
    for layer in range(layers):
        base = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            specs.append((f"{base}.{norm}.weight", "F16", (hidden,)))
        specs += attention(base, hidden) if layer % 4 == 3 else delta_net(base, hidden)
        for name, outputs, inputs in projections(hidden, inner):
            specs += linear(f"{base}.mlp.shared_expert.{name}", "AUTOAWQ", outputs, inputs)
            for expert in range(experts):
                module = f"{base}.mlp.experts.{expert}.{name}"
                specs += list(linear(module, "AUTOAWQ", outputs, inputs))[:3]
        for which, width in (("gate_up", hidden), ("down", inner)):
            shared = f"{base}.mlp.experts.{which}_weight"
            specs.append((f"{shared}_theta", "F16", (KROT, width // 2)))
            specs.append((f"{shared}_pairs", "I16", (KROT, width)))
            specs.append((f"{shared}_channel_scales", "F16", (1, width)))
        specs.append((f"{base}.mlp.gate.weight", "F16", (experts, hidden)))
        specs.append((f"{base}.mlp.shared_expert_gate.weight", "F16", (1, hidden)))
    specs.append(("model.norm.weight", "F16", (hidden,)))
    specs.append(("lm_head.weight", "F16", (vocab, hidden)))
    return specs


def projections(hidden: int, inner: int) -> Iterator[tuple[str, int, int]]:
    """An expert's linears: name, outputs, inputs."""
    yield "gate_proj", inner, hidden
    yield "up_proj", inner, hidden
    yield "down_proj", hidden, inner


def attention(base: str, hidden: int, heads: int = 32, kv: int = 2, dim: int = 256) -> list[Spec]:
    """A layer's attention; its gate doubles the queries."""
    specs: list[Spec] = []
    shapes = {"q": (2 * heads * dim, hidden), "k": (kv * dim, hidden), "v": (kv * dim, hidden),
              "o": (hidden, heads * dim)}  # fmt: skip
    for name, (outputs, inputs) in shapes.items():
        specs += linear(f"{base}.self_attn.{name}_proj", "AUTOAWQ", outputs, inputs)
    specs += [(f"{base}.self_attn.{name}_norm.weight", "F16", (dim,)) for name in "qk"]
    return specs


def delta_net(
    base: str, hidden: int, keys: int = 16, values: int = 64, dim: int = 128
) -> list[Spec]:
    """A layer's gated delta net."""
    specs: list[Spec] = []
    width = (2 * keys + values) * dim
    shapes = {"in_proj_qkv": (width, hidden), "in_proj_z": (values * dim, hidden),
              "out_proj": (hidden, values * dim)}  # fmt: skip
    for name, (outputs, inputs) in shapes.items():
        specs += linear(f"{base}.linear_attn.{name}", "AUTOAWQ", outputs, inputs)
    small = {"in_proj_a.weight": (values, hidden), "in_proj_b.weight": (values, hidden),
             "conv1d.weight": (width, 1, 4), "A_log": (values,), "dt_bias": (values,),
             "norm.weight": (dim,)}  # fmt: skip
    return specs + [(f"{base}.linear_attn.{name}", "F16", shape) for name, shape in small.items()]


def on_paper(name: str, specs: list[Spec], shards: int) -> Model:
    """The plan of these tensors, cut by size and saved in the usual order."""
    headers = {}
    for index, group in enumerate(cut_by_size(specs, shards)):
        start, placed = 0, []
        for spec in sorted(group, key=as_saved):
            placed.append(TensorInfo(*spec, start, start + nbytes(spec)))
            start += nbytes(spec)
        headers[f"model-{index + 1:05}.safetensors"] = Header(tuple(placed), start, {})
    return planned(name, headers)


def planned(name: str, headers: dict[str, Header]) -> Model:
    """The model with these headers."""
    started = time.perf_counter()
    plan = make_plan(headers, Layout.AUTOAWQ, Quantization(4, GROUP))
    seconds = time.perf_counter() - started
    return Model(name, plan, sum(len(header.tensors) for header in headers.values()), seconds)
