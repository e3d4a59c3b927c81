"""Attention and linear sites of every architecture against what eager PyTorch is seen to run."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .models import ZOO, build
from .runs import BROKEN, ONE_GRAPH, resolutions, run

# (kind, form): number of sites. Two-stream blocks (SD3, FLUX, Qwen) are joint: image and text are
# projected apart and meet in one softmax. One-stream blocks concatenate first, so they are self.
EXPECTED = {
    "dit": {("self", "softmax"): 2},
    "pixart": {("self", "softmax"): 2, ("cross", "softmax"): 2},
    "sana": {("self", "linear"): 2, ("cross", "softmax"): 2},
    "sd3": {
        ("joint", "softmax"): 3,
        ("self", "softmax"): 1,
    },  # block 0: a second one
    "flux": {("joint", "softmax"): 2, ("self", "softmax"): 2},
    "flux2": {("joint", "softmax"): 2, ("self", "softmax"): 2},
    "chroma": {("joint", "softmax"): 2, ("self", "softmax"): 2},
    "qwen_image": {("joint", "softmax"): 2},
    "cogview4": {("self", "softmax"): 2},
    "z_image": {("self", "softmax"): 4},  # image refiner, text refiner, two layers
    "wan": {("self", "softmax"): 2, ("cross", "softmax"): 2},
    "wan_i2v": {("self", "softmax"): 2, ("cross", "softmax"): 4},  # text, image
    "hunyuan_video": {("joint", "softmax"): 2, ("self", "softmax"): 3},  # 1 text refiner, 2 single
    "cogvideox": {("self", "softmax"): 2},
    "ltx": {("self", "softmax"): 2, ("cross", "softmax"): 2},
    "latte": {("self", "softmax"): 4, ("cross", "softmax"): 2},  # space and time; text in space
    "sana_video": {("self", "linear"): 2, ("cross", "softmax"): 2},
}

# Masks of the softmax sites, where there are any.
MASKS = {
    "pixart": {"none": 2, "key_padding": 2},
    "chroma": {"bias": 4},
    "qwen_image": {"key_padding": 2},
    "hunyuan_video": {"bias": 1, "key_padding": 4},
    "ltx": {"none": 2, "key_padding": 2},
}


# The last block's text is computed by eager and read by nobody, so no graph holds it. CogView4 runs
# one feed-forward on image and text in turn.
UNREAD = {
    "qwen_image": [
        "transformer_blocks.1.attn.to_add_out",
        "transformer_blocks.1.txt_mlp.net.0.proj",
        "transformer_blocks.1.txt_mlp.net.2",
    ],
    "cogview4": ["transformer_blocks.1.ff.net.0.proj", "transformer_blocks.1.ff.net.2"],
}


class Seen(TorchFunctionMode):
    """Counts the attentions and linear layers of one eager call by the module that runs them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.attention: Counter[str] = Counter()
        self.linear: Counter[str] = Counter()
        self._path: list[str] = []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda m, a, name=name: self._path.append(name))
            module.register_forward_hook(lambda m, a, out: self._path.pop() and None)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.attention[self._path[-1]] += 1
        if func is torch.nn.functional.linear:
            self.linear[self._path[-1]] += 1
        return func(*args, **(kwargs or {}))


@cache
def eager(name: str) -> Seen:
    """What one eager call of a fresh copy of the model runs."""
    model, arguments = build(name, hw=resolutions(name)[0])
    seen = Seen(model)
    with torch.no_grad(), seen:
        model(**arguments)
    return seen


def sites(name: str, when: str = "static"):
    return [site for graph in getattr(run(name), when) for site in graph.compiled.attention]


def linears(name: str, when: str = "static"):
    return [site for graph in getattr(run(name), when) for site in graph.compiled.linear]


def test_the_table_has_every_model():
    assert set(EXPECTED) | set(BROKEN) == set(ZOO)


@pytest.mark.parametrize("name", EXPECTED)
def test_kinds_and_forms(name):
    assert Counter((site.kind, site.form) for site in sites(name)) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_masks(name):
    softmax = [site for site in sites(name) if site.form == "softmax"]
    assert Counter(site.mask for site in softmax) == MASKS.get(name, {"none": len(softmax)})


@pytest.mark.parametrize("name", ONE_GRAPH)
def test_softmax_sites_are_the_attentions_that_eager_runs(name):
    ids = [site.id for site in sites(name) if site.form == "softmax"]
    assert Counter(site_id.rpartition("#")[0] for site_id in ids) == eager(name).attention


@pytest.mark.parametrize("name", ONE_GRAPH)
def test_linear_sites_are_the_linear_layers_that_eager_runs(name):
    expected = eager(name).linear - Counter(UNREAD.get(name, ()))
    assert Counter(site.id for site in linears(name)) == expected


@pytest.mark.parametrize("name", ZOO)
def test_ids_are_module_paths_and_unique(name):
    model = run(name).model
    ids = [site.id for site in sites(name)]
    assert len(set(ids)) == len(ids)
    for site_id in ids:
        path, _, ordinal = site_id.rpartition("#")
        assert isinstance(model.get_submodule(path), nn.Module)
        assert ordinal.isdecimal()
    for site in linears(name):
        layer = model.get_submodule(site.id)
        assert tuple(layer.weight.shape) == (site.out_features, site.in_features)


@pytest.mark.parametrize("name", ONE_GRAPH)
def test_ids_do_not_depend_on_symbolic_sizes(name):
    def described(when):
        return [(s.id, s.kind, s.form, s.heads, s.head_dim, s.mask) for s in sites(name, when)]

    assert described("dynamic") == described("static")
    assert [s.id for s in linears(name, "dynamic")] == [s.id for s in linears(name, "static")]


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_sites_after_graph_breaks_are_attentions_of_the_model(name):
    # equal modules share one graph after a break, so some are named once for all of them
    found = {site.id.rpartition("#")[0] for site in sites(name) if site.form == "softmax"}
    assert found
    assert found <= set(eager(name).attention)
