"""One process of a mesh whose branches are shared and whose other parameters FSDP2 shards; run by test_branch_fsdp.py.

Every branch is sharded over the data dimension, stem and head over all processes. Compares a few steps of SGD, in
float64, with those of one process.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import paradepth
from paradepth.distributed import World, join_world, shard_branches


def shard(model: Any, world: World) -> None:
    """The recipe of the documentation."""
    assert world.mesh is not None
    shard_branches(model.trunk, world.row)
    everyone = init_device_mesh(world.device.type, (world.processes,))
    fully_shard(model.stem, mesh=everyone)
    fully_shard(model.head, mesh=everyone)
    for branch in model.trunk.branches:
        if list(branch.parameters()):  # it is one of this process's
            fully_shard(branch, mesh=world.mesh["data"])


def loss_of(model: Any, what: str, images: Tensor, labels: Tensor) -> Tensor:
    if what == "joint":
        return F.cross_entropy(model(images), labels)
    logits_nBN = model.prefix_logits(images, detach=what == "detach")
    return torch.stack([F.cross_entropy(logits_BN, labels) for logits_BN in logits_nBN]).mean()


def main() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    with join_world("cpu", branch=2, timeout=60) as world:
        draw = torch.Generator().manual_seed(0)
        images, labels = torch.rand(4, 1, 8, 8, generator=draw), torch.randint(3, (4,), generator=draw)
        mine = slice(4 // world.size * world.rank, 4 // world.size * (world.rank + 1))
        found: dict[str, Any] = {}
        for what in ("joint", "prefixes", "detach"):
            torch.manual_seed(0)
            small = {"image_size": 8, "patch_size": 4, "channels": 1, "width": 8, "heads": 2, "mlp": 16}
            whole = paradepth.create_model("paraformer_nano", branches=3, depth=2, num_classes=3, **small)
            model = copy.deepcopy(whole)
            shard(model, world)
            ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, whole))
            worst = difference = 0.0
            for _ in range(3):
                loss, expected = loss_of(model, what, images[mine], labels[mine]), loss_of(whole, what, images, labels)
                loss.backward()
                expected.backward()
                mean = world.sum(loss.detach()) / world.size
                difference = max(difference, abs(float(mean - expected)))
                gradients = dict(whole.named_parameters())
                for name, parameter in model.named_parameters():
                    assert isinstance(parameter.grad, DTensor), name
                    other = gradients[name].grad
                    assert other is not None
                    distance = (parameter.grad.full_tensor() - other).abs().max() / (other.abs().max() + 1e-30)
                    worst = max(worst, float(distance))
                for optimiser in (ours, theirs):
                    optimiser.step()
                    optimiser.zero_grad()
            found[what] = [difference, worst]
        local = sum(p.to_local().numel() for p in model.parameters())  # pyright: ignore[reportPossiblyUnbound]
        found["share"] = local / sum(p.numel() for p in whole.parameters())  # pyright: ignore[reportPossiblyUnbound]
        Path(sys.argv[1], f"rank{world.rank}-{world.row.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
