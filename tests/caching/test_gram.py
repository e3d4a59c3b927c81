from __future__ import annotations

import pytest
import torch

from ditopt.caching import ResidualGram
from ditopt.errors import ProfileError


def run(calls: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    start = torch.randn(2, 70, 32), torch.randn(2, 9, 32)
    drift = torch.randn(2, 70, 32), torch.randn(2, 9, 32)
    return [tuple(a + 0.1 * t * b for a, b in zip(start, drift, strict=True)) for t in range(calls)]


def test_exact_products_of_all_streams_in_any_order() -> None:
    gram, residuals = ResidualGram(6), run()
    for call in (3, 0, 5, 1, 4, 2):
        gram.add(call, *residuals[call])
    flat = torch.stack([torch.cat([r.flatten() for r in rs]) for rs in residuals]).double()
    torch.testing.assert_close(gram.matrix(), flat @ flat.T)


def test_recorded_tensors_may_be_overwritten() -> None:
    gram, residual = ResidualGram(2), torch.ones(4)
    gram.add(0, residual)
    residual.zero_()
    gram.add(1, torch.ones(4))
    assert gram.matrix().tolist() == [[4.0, 4.0], [4.0, 4.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sketch_keeps_the_error_of_forecasts(dtype: torch.dtype) -> None:
    """Differences are far smaller than the residuals: their *relative* error must be small."""
    size, exact, sketch = 4096, ResidualGram(6), ResidualGram(6, sketch=4096)
    for call, streams in enumerate(run()):
        for gram in (exact, sketch):
            gram.add(call, *(stream.to(dtype) for stream in streams))
    rows = torch.tensor([[0, 0, 1, -1, 0, 0], [0, 1, -2, 0, 1.3, -0.3], [1, 0, 0, 0, 0, 0]])
    for row in rows.double():
        true, estimate = (float(row @ gram.matrix() @ row) for gram in (exact, sketch))
        assert estimate == pytest.approx(true, rel=4 * (2 / size) ** 0.5)


def test_sketch_depends_on_the_seed_only() -> None:
    def sketched(seed: int) -> torch.Tensor:
        gram = ResidualGram(6, sketch=64, seed=seed)
        for call, streams in enumerate(run()):
            gram.add(call, *streams)
        return gram.matrix()

    assert torch.equal(sketched(1), sketched(1))
    assert not torch.equal(sketched(1), sketched(2))


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([(0, torch.ones(3)), (0, torch.ones(3))], "call 0 is repeated"),
        ([(2, torch.ones(3))], "outside 0 to 1"),
        ([(0, torch.tensor([1.0, float("nan")]))], "call 0 is not finite"),
        ([(0, torch.ones(3)), (1, torch.ones(4))], "calls 0 and 1 differ in shape"),
        ([(0, torch.ones(3))], r"no residual was recorded for calls \[1\]"),
    ],
)
def test_bad_recordings_are_named(calls: list[tuple[int, torch.Tensor]], message: str) -> None:
    gram = ResidualGram(2)

    def record() -> None:
        for call, residual in calls:
            gram.add(call, residual)
        gram.matrix()

    with pytest.raises(ProfileError, match=message):
        record()
