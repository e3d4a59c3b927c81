from __future__ import annotations

import torch
from torch import nn

from ditopt import fingerprint


def model(width: int = 4, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width))


def test_architecture_ignores_values() -> None:
    assert fingerprint.architecture(model(seed=0)) == fingerprint.architecture(model(seed=1))


def test_architecture_sees_shapes_dtypes_and_names() -> None:
    renamed = nn.Sequential()
    renamed.add_module("a", model()[0])
    renamed.add_module("b", model()[1])
    prints = {fingerprint.architecture(m) for m in (model(), model(8), model().half(), renamed)}
    assert len(prints) == 4


def test_weights_see_other_values_and_not_other_objects() -> None:
    assert fingerprint.weights(model()) == fingerprint.weights(model())
    assert fingerprint.weights(model()) != fingerprint.weights(model(seed=1))


def test_weights_see_a_scaled_parameter() -> None:
    scaled = model()
    with torch.no_grad():
        scaled[0].weight.mul_(1.5)
    assert fingerprint.weights(scaled) != fingerprint.weights(model())


def test_bfloat16_weights_have_a_fingerprint() -> None:
    assert fingerprint.weights(model().bfloat16()) == fingerprint.weights(model().bfloat16())
