from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ditopt
from ditopt.torch_backend import compiled_graphs
from ditopt.weights import FusedTensor


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.full((2, 3), float(k)), requires_grad=False) for k in range(3)]


def test_the_originals_one_below_the_other() -> None:
    env = parameters()
    fused = FusedTensor((2, 0), release=False)
    assert torch.equal(fused.get(env), torch.cat([env[2], env[0]]))


def test_made_once_while_nothing_changes() -> None:
    env = parameters()
    fused = FusedTensor((0, 1), release=False)
    first = fused.get(env)
    version = first._version
    assert fused.get(env) is first
    assert first._version == version


def in_place(env: list[nn.Parameter]) -> None:
    env[0].add_(5)


def data_swap(env: list[nn.Parameter]) -> None:
    env[0].data = torch.full((2, 3), 7.0)


def other_parameter(env: list[nn.Parameter]) -> None:
    env[0] = nn.Parameter(torch.full((2, 3), 9.0), requires_grad=False)


def load(env: list[nn.Parameter]) -> None:
    holder = nn.ParameterList(env[:1])
    holder.load_state_dict({"0": torch.full((2, 3), 11.0)})


@pytest.mark.parametrize("change", [in_place, data_swap, other_parameter, load])
def test_made_again_in_place_when_an_original_changes(change: object) -> None:
    env = parameters()
    fused = FusedTensor((0, 1), release=False)
    first = fused.get(env)
    address = first.data_ptr()
    change(env)  # type: ignore[operator]
    again = fused.get(env)
    assert torch.equal(again, torch.cat([env[0], env[1]]))
    assert again.data_ptr() == address


def test_another_dtype_gets_new_memory() -> None:
    env = parameters()
    fused = FusedTensor((0, 1), release=False)
    fused.get(env)
    for parameter in env:
        parameter.data = parameter.data.double()
    assert fused.get(env).dtype == torch.float64


def test_changes_without_a_trace_need_invalidate() -> None:
    env = parameters()
    fused = FusedTensor((0, 1), release=False)
    fused.get(env)
    env[0].data.add_(5)
    assert fused.get(env)[0, 0] == 0  # not seen: what `ditopt.invalidate` is for
    fused.invalidate()
    assert fused.get(env)[0, 0] == 5


def test_inference_tensors_have_no_version() -> None:
    with torch.inference_mode():
        env = [torch.ones(2, 2), torch.zeros(2, 2)]
    assert torch.equal(FusedTensor((0, 1), release=False).get(env), torch.cat(env))


def test_release_frees_the_originals_and_keeps_the_copy() -> None:
    env = parameters()
    wanted = torch.cat([env[0], env[1]])
    fused = FusedTensor((0, 1), release=True)
    assert torch.equal(fused.get(env), wanted)
    assert [p.untyped_storage().size() for p in env[:2]] == [0, 0]
    assert torch.equal(fused.get(env), wanted)


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) * self.k(x)


def test_a_compiled_model_follows_its_weights() -> None:
    torch._dynamo.reset()
    model, x = Projections().eval(), torch.randn(2, 4)
    compiled = torch.compile(model, backend="ditopt_eager")
    with torch.no_grad():
        compiled(x)
        model.load_state_dict(Projections().state_dict())
        torch.testing.assert_close(compiled(x), model(x))
        model.q.weight.data.mul_(2)
        ditopt.invalidate(model)
        torch.testing.assert_close(compiled(x), model(x))


def test_weights_computed_outside_a_block_are_never_kept() -> None:
    """They are new in each call, but memory and version counter may be those of the last call."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Linear(4, 4)

        def forward(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            mixed = nn.functional.linear(x, a) * nn.functional.linear(x, b)
            return x + nn.functional.scaled_dot_product_attention(mixed, mixed, self.own(mixed))

    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x, self.w * t, self.w + t)
            return x

    torch._dynamo.reset()
    model, x = Hyper().eval(), torch.randn(1, 1, 3, 4)
    compiled = torch.compile(model, backend="ditopt_eager")
    with torch.no_grad():
        for t in torch.linspace(0.1, 1, 10):
            torch.testing.assert_close(compiled(x, t), model(x, t))
    (record,) = compiled_graphs(model)
    fused = [d for d in record.decisions if d.rule == "fuse_projections"]
    assert {(d.applied, d.reason) for d in fused} == {
        (False, "a weight is computed, not a parameter")
    }
