"""Plans of checkpoints that exist only as headers."""

from __future__ import annotations

import numpy as np

from paroquant_stream.checkpoint.layout import Layout
from paroquant_stream.checkpoint.quantization import Quantization
from paroquant_stream.files.tensor_header import Header, TensorInfo
from paroquant_stream.plan.planner import make_plan
from tests.helpers.builders import awq_linear, rotation

QUANTIZATION = Quantization(4, 32)


DTYPES = {"float16": "F16", "int32": "I32", "int16": "I16", "float32": "F32"}


def headers_of(tensors, cut=None) -> dict[str, Header]:
    """The headers that a checkpoint of these tensors would have."""
    homes = cut(sorted(tensors)) if cut else dict.fromkeys(sorted(tensors), "model.safetensors")
    headers = {}
    for shard in sorted(set(homes.values())):
        position, infos = 1000, []
        for name in (name for name, home in homes.items() if home == shard):
            array = tensors[name]
            dtype = DTYPES[str(array.dtype)]
            infos.append(TensorInfo(name, dtype, array.shape, position, position + array.nbytes))
            position += array.nbytes
        headers[shard] = Header(tuple(infos), position, {})
    return headers


def plan_of(tensors, cut=None, experts=None):
    return make_plan(headers_of(tensors, cut), Layout.AUTOAWQ, QUANTIZATION, experts)


def moe_tensors(layers=1, experts=4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in range(layers):
        base = f"model.layers.{layer}.mlp.experts"
        for projection in ("gate_proj", "up_proj", "down_proj"):
            for expert in range(experts):
                linear = awq_linear(rng, f"{base}.{expert}.{projection}", 32, 32)
                tensors |= {
                    n: a for n, a in linear.items() if n.endswith(("qweight", "qzeros", ".scales"))
                }
        for which in ("gate_up_weight", "down_weight"):
            shared = rotation(rng, "x", 32)
            tensors |= {f"{base}.{which}_{name[2:]}": array for name, array in shared.items()}
    return tensors
