"""One process of a row that shares a stack; run by test_depth_ranks.py on 2 and 3 processes.

Compares, in float64: MGRIT and Picard after enough iterations, and serial execution across processes, with the serial
executor on one process; and MGRIT after one or two iterations with the same on one process.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paradepth.depth import MGRIT, DepthExecutor, Picard, Serial, Stack, lipschitz
from paradepth.distributed import clip_gradients, gather_tensors, join_world, reduce_gradients, shard_depth
from paradepth.nn import EncoderLayer, set_dropout_key


class Remembering(nn.Module):
    """An encoder layer that also reads a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = EncoderLayer(8, heads=2, mlp=16, dropout=0.1)
        self.read = nn.Linear(8, 8)

    def residual(self, x: Tensor, mask: Tensor, memory: Tensor) -> Tensor:
        return self.layer.residual(x, mask) + torch.tanh(self.read(memory))

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor, *, step: float = 1.0) -> Tensor:
        return x + step * self.residual(x, mask, memory)


def gradients(stack: Stack, executor: DepthExecutor) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x, memory, w = (torch.randn(2, 4, 8, generator=draw, requires_grad=True) for _ in range(3))
    mask = (torch.rand(2, 1, 4, 4, generator=draw) > 0.3) | torch.eye(4, dtype=torch.bool)
    stack.zero_grad()
    reads = any(isinstance(layer, Remembering) for layer in stack.layers)
    y = stack(x, mask, *([memory] if reads else []), executor=executor)
    (y * w.detach()).sum().backward()
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad}
    if reads:
        assert memory.grad is not None
        found["memory"] = memory.grad
    return found | {name: p.grad for name, p in stack.named_parameters() if p.grad is not None}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max() / (b[name].abs().max() + 1e-30)) for name in a)


def cases() -> list[dict[str, Any]]:
    grid = itertools.product((10, 13), (2, 3), (2, 3), ("F", "FCF"), ("sample", "branch", "half"))
    chosen = []
    for index, (depth, c, levels, relaxation, coarse) in enumerate(grid):
        chosen.append(
            {
                "depth": depth,
                "coarsening": c,
                "levels": levels,
                "relaxation": relaxation,
                "coarse": coarse,
                "cycle": "F" if levels == 3 and index % 2 else "V",
                "buffers": [(0, 0), (2, 1), (0, 1)][index % 3],
                "recompute": index % 5 < 3,
                "initial": ["coarse", "constant"][index % 4 == 3],
                "batched": index % 3 == 1,
            }
        )
    return chosen


def check(case: dict[str, Any], world: Any) -> dict[str, Any]:
    depth, buffers = case["depth"], case["buffers"]
    options = {name: value for name, value in case.items() if name not in ("depth", "buffers")}
    torch.manual_seed(0)
    layers = [EncoderLayer(8, heads=2, mlp=16, dropout=0.1) if case["batched"] else Remembering() for _ in range(depth)]
    stack = Stack(layers, step=1 / 4, buffers=buffers)
    set_dropout_key(stack, seed=1, step=3)
    few = MGRIT(**options, forward_iterations=2, backward_iterations=1)
    alone = MGRIT(**options, forward_iterations=2, backward_iterations=1)
    alone.batched = False
    enough = MGRIT(**options, forward_iterations=3 * depth, backward_iterations=3 * depth)
    try:
        few.check(stack)
        serial, once = gradients(stack, Serial()), gradients(stack, alone)
        report = copy.deepcopy(alone.report)
        whole_norm = float(torch.cat([p.grad.flatten() for p in stack.parameters() if p.grad is not None]).norm())
        shard_depth(stack, world.row, executor=few)
    except ValueError as error:
        return {"refused": str(error)}
    found = {
        "few": distance(gradients(stack, few), once),
        "residuals": [a - b for a, b in zip(few.report.forward.residuals, report.forward.residuals, strict=True)],
        "moved": distance(once, serial),
        "converged": distance(gradients(stack, enough), serial),
        "serial": distance(gradients(stack, Serial(checkpoint=case["recompute"])), serial),
        "picard": distance(
            gradients(
                stack,
                Picard(
                    forward_iterations=depth,
                    backward_iterations=depth,
                    recompute=case["recompute"],
                    batched=case["batched"],
                ),
            ),
            serial,
        ),
        "counts": [few.report.forward.sequential, few.report.forward.evaluations],
        "own": sum(p.numel() for p in stack.parameters()),
    }
    gradients(stack, few)
    reduce_gradients(stack, world, owned=list(stack.parameters()))
    found["norm"] = float(clip_gradients(stack, 0.1, world, owned=list(stack.parameters()))) - whole_norm
    gathered = gather_tensors(stack.state_dict(), world.row, mine=lambda name: True, device=torch.device("cpu"))
    found["gathered"] = len(gathered)
    return found


def main() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    size = int(os.environ["WORLD_SIZE"])
    with join_world("cpu", depth=size, timeout=60, options={"test": 1}) as world:
        results = [check(case, world) for case in cases()]
        torch.manual_seed(0)
        stack = Stack([EncoderLayer(8, heads=2, mlp=16) for _ in range(6)], step=0.5)
        x = torch.randn(2, 4, 8)
        alone = lipschitz(stack, x)
        shard_depth(stack, world.row, executor=MGRIT(coarsening=2))
        together = lipschitz(stack, x)
        worst = max(abs(a - b) for a, b in zip(alone, together, strict=True))
        Path(sys.argv[1]).mkdir(exist_ok=True)
        content = {"cases": cases(), "results": results, "lipschitz": worst}
        (Path(sys.argv[1]) / f"rank{world.row.rank}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main()
