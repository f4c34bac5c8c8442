"""Stored tensors under the model's names: what may be dropped, where stacked experts go."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from paroquant_stream.errors import AssemblyError
from paroquant_stream.model import names as naming


def test_what_sanitize_drops_without_a_known_reason_is_an_error():
    before = {"model.layers.0.mlp.gate.weight": mx.zeros(1), "mtp.x": mx.zeros(1)}
    with pytest.raises(AssemblyError, match=r"layers\.0\.mlp\.gate\.weight"):
        naming._check_dropped(before, {})


def test_what_sanitize_changes_or_renames_counts_as_kept():
    array = mx.zeros(1)
    before = {"model.layers.0.norm.weight": array, "model.layers.1.norm.weight": mx.zeros(1)}
    after = {"x.layers.0.norm.weight": array, "x.layers.1.norm.weight": mx.zeros(1)}
    naming._check_dropped(before, after)


def test_stacked_experts_go_where_the_model_has_its_own():
    class SwitchGLU(nn.Module):
        pass

    model = nn.Module()
    model.layers = [nn.Module(), nn.Module()]
    model.layers[0].experts, model.layers[1].mlp = nn.Module(), nn.Module()
    model.layers[0].experts.switch_glu = SwitchGLU()
    model.layers[1].mlp.switch_mlp = SwitchGLU()
    array = mx.zeros(1)
    names = ["layers.0.switch_mlp.up_proj.weight", "layers.1.mlp.switch_mlp.up_proj.weight"]
    assert list(naming._align_experts(model, dict.fromkeys(names, array))) == [
        "layers.0.experts.switch_glu.up_proj.weight",
        "layers.1.mlp.switch_mlp.up_proj.weight",
    ]


def test_fifty_differences_are_listed_and_the_others_counted():
    assert naming.listed([f"{line:02}" for line in range(52)]).splitlines()[-2:] == [
        "  49",
        "  ... and 2 more",
    ]
