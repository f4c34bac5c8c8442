"""Stored tensors under the model's names: what may be dropped, where stacked experts go."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from paroquant_stream.errors import AssemblyError
from paroquant_stream.model.names import rename_weights


class Renaming:
    """A backend whose `sanitize` is a function of names; None drops a tensor."""

    def __init__(self, rename, change=lambda array: array):
        self._rename, self._change = rename, change

    def sanitize(self, _model, weights):
        renamed = {self._rename(name): self._change(array) for name, array in weights.items()}
        return {name: array for name, array in renamed.items() if name}


def keep(name: str) -> str:
    return name


def model_with(**modules) -> nn.Module:
    model = nn.Module()
    for name, module in modules.items():
        model[name] = module
    return model


@pytest.mark.parametrize(
    "name",
    [
        *("model.layers.0.mlp.gate.weight", "model.norm.weight", "layers.0.self_attn.q_proj.theta"),
        *("layers.0.mlp.k_proj.weight", "lm_head.bias", "prefix_mtp.weight", "input_max.weight"),
    ],
)
def test_a_dropped_tensor_that_no_class_drops_is_an_error(name):
    weights = {name: mx.zeros(1), "mtp.x": mx.zeros(1)}
    with pytest.raises(AssemblyError, match=f"drops these tensors:\n  {name}$"):
        rename_weights(nn.Module(), weights, Renaming(lambda _: None))


def test_tensors_that_classes_drop_are_logged(caplog):
    caplog.set_level("INFO")
    names = ["mtp.norm.weight", "model.mtp.x", "a.rotary_emb.inv_freq", "tower.x.input_min",
             "lm_head.weight", "model.layers.3.self_attn.v_norm.weight"]  # fmt: skip
    weights = {name: mx.zeros(1) for name in names}
    assert rename_weights(nn.Module(), weights, Renaming(lambda _: None)) == {}
    assert caplog.messages == [f"dropped by the model class: {', '.join(names)}"]


def test_a_changed_and_renamed_tensor_counts_as_kept():
    weights = {"model.layers.0.norm.weight": mx.zeros(1), "model.tower.patch.weight": mx.zeros(1)}
    renaming = Renaming(lambda name: name.replace("model.", "x."), lambda array: array + 1)
    assert set(rename_weights(nn.Module(), weights, renaming)) == {
        *("x.layers.0.norm.weight", "x.tower.patch.weight")
    }


def test_an_old_tensor_with_the_same_tail_does_not_hide_a_drop():
    """Only a new array can be the changed form of a dropped tensor."""
    weights = {"a.layers.0.norm.weight": mx.zeros(1), "b.layers.0.norm.weight": mx.zeros(1)}
    dropping = Renaming(lambda name: None if name.startswith("b") else name)
    with pytest.raises(AssemblyError, match=r"\n  b\.layers\.0\.norm\.weight$"):
        rename_weights(nn.Module(), weights, dropping)


def test_scales_and_biases_follow_a_quantized_embedding():
    leaves = ("weight", "scales", "biases")
    weights = {
        f"model.embed_tokens.{leaf}": mx.array([number]) for number, leaf in enumerate(leaves)
    }
    model = model_with(embed_tokens=nn.Embedding(2, 2))
    renamed = rename_weights(model, weights, Renaming(lambda name: name.removeprefix("model.")))
    assert {name: array.item() for name, array in renamed.items()} == {
        f"embed_tokens.{leaf}": number for number, leaf in enumerate(leaves)
    }


@pytest.mark.parametrize("rename", [keep, lambda _: None], ids=["kept", "dropped"])
def test_a_quantized_head_of_a_model_without_one_is_dropped(rename):
    weights = {f"lm_head.{leaf}": mx.zeros(1) for leaf in ("weight", "scales", "biases")}
    assert rename_weights(nn.Module(), weights, Renaming(rename)) == {}


def test_stacked_experts_move_to_the_models_own_module():
    class SwitchGLU(nn.Module):
        pass

    layers = [nn.Module() for _ in range(3)]
    layers[0].experts, layers[1].mlp = nn.Module(), nn.Module()
    layers[0].experts.switch_glu = SwitchGLU()
    layers[1].mlp.switch_mlp = SwitchGLU()
    names = [f"layers.{place}.switch_mlp.up_proj.weight" for place in ("0", "1.mlp", "2")]
    weights = {name: mx.zeros(1) for name in names}
    assert list(rename_weights(model_with(layers=layers), weights, Renaming(keep))) == [
        "layers.0.experts.switch_glu.up_proj.weight",
        "layers.1.mlp.switch_mlp.up_proj.weight",
        "layers.2.switch_mlp.up_proj.weight",
    ]


@pytest.mark.parametrize("order", [("switch_mlp", "other"), ("other", "switch_mlp")])
def test_stacked_experts_stay_where_the_model_has_them(order):
    class SwitchGLU(nn.Module):
        pass

    layer = nn.Module()
    for name in order:
        layer[name] = SwitchGLU()
    weights = {"layer.switch_mlp.up_proj.weight": mx.zeros(1)}
    assert rename_weights(model_with(layer=layer), weights, Renaming(keep)).keys() == weights.keys()
