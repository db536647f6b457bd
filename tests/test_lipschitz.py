"""`lipschitz` against the singular values of explicit Jacobians."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paradepth.depth import ParallelLayers, Stack, lipschitz, parallelize
from paradepth.nn import EncoderLayer


def stack_of(layers: int = 3, **options: Any) -> Stack:
    return Stack([EncoderLayer(8, heads=2, mlp=16) for _ in range(layers)], **options).double().eval()


def largest_singular_values(stack: Stack, x: Tensor, *inputs: Any) -> list[float]:
    values = []
    for n, layer in enumerate(stack.layers):

        def increment(u: Tensor, layer: Any = layer, h: float = stack.step_of(n)) -> Tensor:
            return h * layer.residual(u, *inputs)

        jacobian = torch.autograd.functional.jacobian(increment, x).reshape(x.numel(), x.numel())
        values.append(float(torch.linalg.matrix_norm(jacobian, 2)))
        x = x + increment(x).detach()
    return values


@pytest.mark.parametrize("options", [{}, {"step": 0.25}, {"step": 0.1, "buffers": (1, 1)}])
def test_largest_singular_value_of_each_jacobian(options: dict[str, Any]) -> None:
    stack, x = stack_of(**options), torch.randn(2, 3, 8, dtype=torch.float64)
    wanted = largest_singular_values(stack, x)
    assert lipschitz(stack, x, iterations=150) == pytest.approx(wanted, rel=1e-4)
    rough = lipschitz(stack, x)
    assert all(0.8 * b < a <= b * (1 + 1e-12) for a, b in zip(rough, wanted, strict=True)), "an estimate from below"


def test_side_inputs_and_gradient_modes() -> None:
    stack, x = stack_of(), torch.randn(2, 3, 8, dtype=torch.float64)
    mask = torch.tensor([True, True, False]).expand(2, 1, 1, 3)
    wanted = largest_singular_values(stack, x, mask)
    with torch.no_grad():
        assert lipschitz(stack, x, mask, iterations=150) == pytest.approx(wanted, rel=1e-4)
    assert lipschitz(stack, x, iterations=150) != pytest.approx(wanted, rel=1e-3)
    assert all(parameter.grad is None for parameter in stack.parameters())


def test_it_is_reproducible_and_leaves_the_global_random_stream_alone() -> None:
    stack, x = stack_of(), torch.randn(2, 3, 8, dtype=torch.float64)
    state = torch.get_rng_state()
    assert lipschitz(stack, x, seed=1) == lipschitz(stack, x, seed=1) != lipschitz(stack, x, seed=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_batch_counts_as_the_sample_with_the_largest_norm() -> None:
    stack, x = stack_of(2), torch.randn(3, 3, 8, dtype=torch.float64)
    each = [lipschitz(stack, sample[None], iterations=150) for sample in x]
    assert lipschitz(stack, x, iterations=150) == pytest.approx([max(n) for n in zip(*each, strict=True)], rel=1e-4)


def test_known_linear_constant_and_tuple_layers() -> None:
    class Linear(nn.Module):
        def residual(self, x: Tensor) -> Tensor:
            return x * torch.tensor([3.0, -5.0, 1.0])

    class Constant(nn.Module):
        def residual(self, x: Tensor) -> Tensor:
            return torch.ones(3)

    class Pair(nn.Module):
        def residual(self, x: tuple[Tensor, Tensor]) -> tuple[None, Tensor]:
            return None, 3 * x[0] + 4 * x[1]

    assert lipschitz(Stack([Linear(), Constant(), Linear()], step=0.5), torch.ones(3)) == pytest.approx([2.5, 0, 2.5])
    assert lipschitz(Stack([Pair()]), (torch.ones(3), torch.ones(3))) == pytest.approx([5.0])


def test_layers_of_other_libraries() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).double().eval()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    layers = parallelize(model, "layers").layers
    assert isinstance(layers, ParallelLayers)
    stack = layers.stack
    assert lipschitz(stack, x, iterations=150) == pytest.approx(largest_singular_values(stack, x), rel=1e-4)


def test_refusals() -> None:
    stack, x = stack_of(), torch.randn(2, 3, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="iterations is 0; it must be at least 1"):
        lipschitz(stack, x, iterations=0)
