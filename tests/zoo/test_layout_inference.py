"""The token grid that is inferred for every architecture, at an oblong resolution too."""

from __future__ import annotations

import pytest

from ditopt.infer_layout import SiteGeometry, infer_grid, site_geometry
from ditopt.symbols import hint

from .runs import ONE_GRAPH, resolutions, run

PATCHES, IDS, LATENT = "the patch embedding", "the position ids", "the latent's shape"

# name: (frames, latent pixels per token and axis, where the grid was read)
GRIDS = {
    "dit": (1, 2, PATCHES),
    "pixart": (1, 2, PATCHES),
    "sd3": (1, 2, PATCHES),
    "wan": (2, 2, PATCHES),
    "wan_i2v": (2, 2, PATCHES),
    "cogvideox": (2, 2, PATCHES),
    "latte": (2, 2, PATCHES),
    "sana_video": (2, 2, PATCHES),
}
# Known to static captures only: with symbolic sizes many grids fit the shape of Sana's latent, and
# the values of position ids hold for one resolution, while the graph serves several.
STATIC_GRIDS = {
    "sana": (1, 1, LATENT),
    "flux": (1, 1, IDS),
    "flux2": (1, 1, IDS),
    "chroma": (1, 1, IDS),
}
# No evidence in the graph: the grid is a Python argument (Qwen-Image, LTX), or latents are cut into
# patches by reshaping (CogView4), or the patch is one pixel and text is in every sequence
# (HunyuanVideo as configured here).
UNKNOWN = {"qwen_image", "cogview4", "ltx", "hunyuan_video", "z_image"}

# (part of the grid, text before, text after) of each self or joint attention, in order.
GRID, FRAME, TIME = "grid", "frame", "time"
SPANS = {
    "dit": [(GRID, 0, 0)] * 2,
    "pixart": [(GRID, 0, 0)] * 2,
    "sd3": [(GRID, 0, 12), (GRID, 0, 0), (GRID, 0, 12), (GRID, 0, 12)],
    "flux": [(GRID, 12, 0)] * 4,
    "flux2": [(GRID, 12, 0)] * 4,
    "chroma": [(GRID, 12, 0)] * 4,
    "wan": [(GRID, 0, 0)] * 2,
    "wan_i2v": [(GRID, 0, 0)] * 2,
    "cogvideox": [(GRID, 8, 0)] * 2,
    "latte": [(FRAME, 0, 0), (TIME, 0, 0)] * 2,
    "sana_video": [(GRID, 0, 0)] * 2,
}

WHEN = ("static", "dynamic")


def graph_of(name, when):
    (graph,) = getattr(run(name), when)
    return graph


def grid_at(name, when, frames, patch):
    height, width = resolutions(name)[0 if when == "static" else 1]
    return frames, height // patch, width // patch


def test_the_table_has_every_model():
    assert set(GRIDS) | set(STATIC_GRIDS) | UNKNOWN == set(ONE_GRAPH)


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("name", GRIDS)
def test_grid(name, when):
    frames, patch, source = GRIDS[name]
    graph = graph_of(name, when)
    inferred = infer_grid(graph.captured, graph.examples)
    assert inferred is not None
    grid, read = inferred
    assert read == source
    assert tuple(hint(size) for size in grid) == grid_at(name, when, frames, patch)


@pytest.mark.parametrize("name", STATIC_GRIDS)
def test_grid_of_static_shapes(name):
    frames, patch, source = STATIC_GRIDS[name]
    static, dynamic = graph_of(name, "static"), graph_of(name, "dynamic")
    expected = (grid_at(name, "static", frames, patch), source)
    assert infer_grid(static.captured, static.examples) == expected
    assert infer_grid(dynamic.captured, dynamic.examples) is None


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("name", sorted(UNKNOWN))
def test_unknown_is_said(name, when):
    graph = graph_of(name, when)
    assert infer_grid(graph.captured, graph.examples) is None


@pytest.mark.parametrize(
    ("name", "when"),
    [(name, when) for name in SPANS for when in WHEN if when == "static" or name in GRIDS],
)
def test_text_spans(name, when):
    graph = graph_of(name, when)
    inferred = infer_grid(graph.captured, graph.examples)
    assert inferred is not None
    grid = tuple(hint(size) for size in inferred[0])
    found = []
    for site in graph.compiled.attention:
        geometry = site_geometry(graph.captured, site, inferred[0])
        if site.kind == "cross":
            assert geometry == "cross-attention has no token grid on the key side"
            continue
        assert isinstance(geometry, SiteGeometry), geometry
        layout = geometry.layout(grid, hint(site.tokens_q))
        assert layout.total == hint(site.tokens_q)
        found.append((geometry.part, layout.text_before, layout.text_after))
    assert found == SPANS[name]
