"""The choice of the library that runs a model."""

from __future__ import annotations

import pytest

from paroquant_stream.backends.selection import select_backend


@pytest.mark.parametrize(
    ("config", "names", "force_text", "expected"),
    [
        ({"vision_config": {"depth": 1}}, ["model.visual.x"], False, True),
        ({"vision_config": {"depth": 1}}, ["model.visual.x"], True, False),
        ({"vision_config": {"depth": 1}}, ["model.layers.0.x"], False, False),
        ({}, ["model.visual.x"], False, False),
        ({"vision_config": {"depth": 1}}, ["model.embed_audio.x"], False, True),
        ({"vision_config": None}, ["model.visual.x"], False, False),
    ],
)
def test_a_vision_model_has_a_vision_config_and_a_tower(config, names, force_text, expected):
    assert select_backend(config, names, force_text).is_vlm is expected
