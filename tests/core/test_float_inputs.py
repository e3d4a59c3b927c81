"""Python floats that change from call to call, as inputs and as attributes of modules."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ditopt.errors import DitoptWarning

SCALES = (1.0, 0.5, 0.7, -0.25)


class Block(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x, scale):
        return x + self.down(F.gelu(self.up(x))) * scale


class Model(nn.Module):
    """Blocks that read the number, and a number computed from it."""

    def __init__(self, blocks=3, dim=16):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim) for _ in range(blocks))

    def forward(self, x, scale: float = 1.0):
        damped = scale * 0.5 + 1
        for block in self.blocks:
            x = block(x, scale) / damped
        return x - scale


@pytest.fixture
def x():
    return torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))


def make(model, backend="ditopt_eager", seed=0, **options):
    torch._dynamo.reset()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.eval().requires_grad_(False)
    return torch.compile(model, backend=backend, options=options or None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_value_gives_the_result_of_eager(x, dtype):
    model = Model().to(dtype)
    compiled = make(model, strict=True)
    for scale in SCALES:
        assert torch.equal(compiled(x.to(dtype), scale), model(x.to(dtype), scale))


def test_one_graph_serves_all_further_values(x):
    compiled = make(Model())
    counter = torch._dynamo.utils.counters["stats"]
    for scale in SCALES:
        compiled(x, scale)
        if scale == SCALES[1]:
            graphs = counter["unique_graphs"]
    assert counter["unique_graphs"] == graphs


def test_inductor_compiles_it(x):
    model = Model(blocks=1)
    compiled = make(model, backend="ditopt", strict=True)
    for scale in SCALES[:3]:
        torch.testing.assert_close(compiled(x, scale), model(x, scale))


def test_a_number_where_no_tensor_can_stand_is_fixed_and_not_lost(x):
    class Attention(nn.Module):
        def forward(self, x, scale: float):
            q = x[:, None]
            return F.scaled_dot_product_attention(q, q, q, scale=scale)[:, 0]

    model = Attention()
    compiled = make(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DitoptWarning)
        for scale in (0.25, 0.5, 0.75):
            torch.testing.assert_close(compiled(x, scale), model(x, scale))


def test_a_number_that_is_returned_comes_back(x):
    class Returns(nn.Module):
        def forward(self, x, scale: float):
            return x * scale, scale * 2

    compiled = make(Returns(), strict=True)
    for scale in SCALES:
        scaled, doubled = compiled(x, scale)
        assert torch.equal(scaled, x * scale)
        assert doubled == scale * 2


def test_a_module_attribute_is_such_a_number_too(x):
    class Adapter(nn.Module):
        scaling = 1.0

        def __init__(self):
            super().__init__()
            self.base, self.low = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.base(x) + self.low(x) * self.scaling

    model = Adapter()
    compiled = make(model, strict=True)
    for scale in SCALES:
        model.scaling = scale
        assert torch.equal(compiled(x), model(x))


def test_a_run_is_recognised_by_the_numbers_value():
    from ditopt.runtime.inputs import InputRoles, identify, lease

    roles = InputRoles(invariant=(0,))
    first, again, other = (identify([torch.tensor(v).double()], roles) for v in (0.5, 0.5, 0.7))
    assert first == again
    assert first != other
    assert lease([torch.tensor(0.5)], roles) == ()
