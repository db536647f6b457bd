"""Trunks that remember keys and values: reading in parts equals reading at once, for every kind of trunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from paradepth.branches import Branches, TrunkCache
from paradepth.depth import MGRIT, Stack
from paradepth.nn import EncoderLayer, KeyValueCache, SourceLayer, TargetLayer

SHAPE: dict[str, Any] = {"heads": 2, "mlp": 16}
kinds = st.sampled_from(["stack", "residual", "sum"])
cuts = st.lists(st.integers(1, 3), min_size=1, max_size=4)  # tokens of each part


def stack(joined: bool, *, dtype: torch.dtype = torch.float64) -> Stack:
    if joined:
        layers: list[nn.Module] = [SourceLayer(8, **SHAPE) for _ in range(2)]
        layers += [TargetLayer(8, **SHAPE) for _ in range(2)]
        return Stack(layers, step=0.5).to(dtype)
    return Stack([EncoderLayer(8, causal=True, **SHAPE) for _ in range(3)], step=0.25, buffers=(1, 1)).to(dtype)


def trunk(kind: str, *, joined: bool = False, dtype: torch.dtype = torch.float64) -> Stack | Branches:
    if kind == "stack":
        return stack(joined, dtype=dtype)
    return Branches([stack(joined, dtype=dtype) for _ in range(3)], aggregate=kind)  # pyright: ignore


def prefixes(used: Stack | Branches) -> list[int | None]:
    return [None, 1, 2, 3] if isinstance(used, Branches) else [None]


def at_once(used: Stack | Branches, x: Any, branches: int | None, *inputs: Any) -> Any:
    return used(x, *inputs, branches=branches) if isinstance(used, Branches) else used(x, *inputs)


def states(batch: int, tokens: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, tokens, 8, dtype=dtype)


@settings(max_examples=12)
@given(kind=kinds, parts=cuts)
def test_reading_in_parts_equals_reading_at_once(kind: str, parts: list[int]) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        used, x = trunk(kind, dtype=dtype), states(2, sum(parts), dtype)
        for k in prefixes(used):
            cache = TrunkCache(used, branches=k)
            got = torch.cat([cache.advance(part) for part in x.split(parts, dim=1)], dim=1)
            torch.testing.assert_close(got, at_once(used, x, k), rtol=0, atol=tolerance)
            assert cache.length == sum(parts)


@settings(max_examples=12)
@given(kind=kinds, parts=cuts, source=st.integers(1, 5))
def test_a_decoder_in_parts_equals_the_joined_chain(kind: str, parts: list[int], source: int) -> None:
    x, y = states(2, source), states(2, sum(parts))
    mask = torch.rand(2, 1, 1, source) > 0.4
    mask[..., 0] = True
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        used = trunk(kind, joined=True, dtype=dtype)
        for k in prefixes(used):
            expected = at_once(used, (x.to(dtype), y.to(dtype)), k, mask)[1]
            cache = TrunkCache(used, branches=k)
            got = torch.cat([cache.advance((x.to(dtype), part), mask) for part in y.to(dtype).split(parts, 1)], dim=1)
            torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("kind", ["stack", "residual", "sum"])
def test_reordered_rows_go_on_as_if_they_had_always_stood_there(kind: str, joined: bool) -> None:
    used, rows = trunk(kind, joined=joined), torch.tensor([2, 0, 0, 1])
    x, y, more = states(3, 4), states(3, 3), states(4, 2)
    cache = TrunkCache(used)
    cache.advance((x, y) if joined else y)
    cache.reorder(rows)
    got = cache.advance((x[rows], more) if joined else more)
    whole = torch.cat([y[rows], more], dim=1)
    expected = at_once(used, (x[rows], whole), None)[1] if joined else at_once(used, whole, None)
    torch.testing.assert_close(got, expected[:, 3:], rtol=0, atol=1e-10)


def test_the_encoder_is_read_once_and_its_later_versions_do_not_count() -> None:
    used, x, y = trunk("residual", joined=True), states(1, 4), states(1, 4)
    cache = TrunkCache(used)
    first = cache.advance((x, y[:, :2]))
    later = cache.advance((torch.full_like(x, torch.nan), y[:, 2:]))
    torch.testing.assert_close(torch.cat([first, later], dim=1), used((x, y))[1], rtol=0, atol=1e-10)


def test_a_stack_with_another_executor_is_read_layer_by_layer() -> None:
    used, x = stack(False), states(1, 4)
    expected = used(x)
    used.executor = MGRIT(forward_iterations=1, coarsening=2)
    cache = TrunkCache(used)
    got = torch.cat([cache.advance(part) for part in x.split(2, dim=1)], dim=1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_what_cannot_remember_is_refused() -> None:
    for layer in (EncoderLayer(8, **SHAPE), nn.Linear(8, 8)):
        with pytest.raises(ValueError, match="cannot remember keys and values"):
            TrunkCache(Stack([layer]))
    for branches in (0, 4):
        with pytest.raises(ValueError, match=f"branches is {branches}; this trunk has 3"):
            TrunkCache(trunk("sum"), branches=branches)


def test_keys_and_values_grow_along_the_tokens() -> None:
    cache, k, v = KeyValueCache(), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    cache.reorder(torch.tensor([1]))  # nothing to reorder
    assert cache.length == 0
    for start, stop in ((0, 2), (2, 3), (3, 5)):
        got = cache.extend(k[:, :, start:stop], v[:, :, start:stop])
        assert cache.length == stop
        assert torch.equal(got[0], k[:, :, :stop])
        assert torch.equal(got[1], v[:, :, :stop])
    cache.reorder(torch.tensor([1, 1, 0]))
    assert cache.k_BHSK is not None
    assert torch.equal(cache.k_BHSK, k[[1, 1, 0]])
