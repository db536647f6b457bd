"""One process of a row that shares branches; run by test_branch_ranks.py on 2 and 3 processes.

Arguments: a folder for the findings and a device. Compares values and gradients, in float64, with those of one process
that has all branches.
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
from torch.utils._pytree import tree_map

import paradepth
from paradepth.branches import BRANCH_EXECUTORS, Branches, branch_executor
from paradepth.depth import Stack
from paradepth.distributed import (
    Mesh,
    World,
    clip_gradients,
    gather_tensors,
    join_world,
    reduce_gradients,
    shard_branches,
)
from paradepth.nn import EncoderLayer, set_dropout_key
from paradepth.train.schedules import Annealing, Objective, Schedule, build_schedule
from paradepth.train.step import TrainStep

DEVICE = sys.argv[2] if len(sys.argv) > 2 else "cpu"
SHAPES = [(1, 1, 1), (2, 2, 2, 2, 2), (1, 3, 1, 2)]  # depths of the branches


class Remembering(nn.Module):
    """An encoder layer that also reads a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = EncoderLayer(8, heads=2, mlp=16, dropout=0.1)
        self.read = nn.Linear(8, 8)

    def residual(self, x: Any, mask: Tensor, more: dict[str, Tensor]) -> Any:
        if isinstance(x, tuple):  # the halves look at each other
            a, b = (self.layer.residual(part, mask) + torch.tanh(self.read(more["memory"])) for part in x)
            return a * x[1], b * x[0]
        return self.layer.residual(x, mask) + torch.tanh(self.read(more["memory"]))

    def forward(self, x: Tensor, mask: Tensor, more: dict[str, Tensor], *, step: float = 1.0) -> Tensor:
        return x + step * self.residual(x, mask, more)


def trunk_of(depths: tuple[int, ...], aggregate: Any) -> Branches:
    torch.manual_seed(0)
    trunk = Branches([Stack([Remembering() for _ in range(d)], step=0.5) for d in depths], aggregate=aggregate)
    set_dropout_key(trunk, seed=1, step=3)
    return trunk.to(DEVICE)


def evaluated(trunk: Branches, what: str, k: int, *, joined: bool) -> dict[str, Tensor]:
    """The result and every gradient."""
    draw = torch.Generator().manual_seed(1)
    x, y, memory = (torch.randn(2, 4, 8, generator=draw).to(DEVICE).requires_grad_() for _ in range(3))
    mask = (torch.rand(2, 1, 4, 4, generator=draw) > 0.3) | torch.eye(4, dtype=torch.bool)
    state, sides = ((x, y) if joined else x), (mask.to(DEVICE), {"memory": memory})
    trunk.zero_grad()
    if what == "sum":
        found = trunk(state, *sides, branches=k)
    elif what == "contributions":
        found = trunk.contributions(state, *sides, branches=k)
    else:
        found = trunk.prefix_states(state, *sides, branches=k, detach=what == "detached")
    parts = found if joined else (found,)
    torch.stack([part.square().sum() + (0.1 * part).sin().sum() for part in parts]).sum().backward()
    result = {f"result{i}": part.detach() for i, part in enumerate(parts)}
    result |= {name: t.grad for name, t in (("x", x), ("y", y), ("memory", memory)) if t.grad is not None}
    return result | {name: p.grad for name, p in trunk.named_parameters() if p.grad is not None}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest relative difference, over the tensors of `a`."""
    return max(float((a[name] - b[name]).abs().max() / (b[name].abs().max() + 1e-30)) for name in a)


def trunks(world: World) -> list[dict[str, Any]]:
    found = []
    kinds = (("residual", False), ("residual", True), ("sum", True))
    for depths, (aggregate, joined) in itertools.product(SHAPES, kinds):
        whole = trunk_of(depths, aggregate)
        shared = copy.deepcopy(whole)
        shard_branches(shared, world.row)
        mesh = shared.executor
        for what, k in itertools.product(("sum", "states", "detached", "contributions"), range(1, len(depths) + 1)):
            expected = evaluated(whole, what, k, joined=joined)
            if isinstance(mesh, Mesh):
                mesh.traffic.reset()
            mine = evaluated(shared, what, k, joined=joined)
            case: dict[str, Any] = {"depths": depths, "aggregate": aggregate, "joined": joined, "what": what, "k": k}
            case["distance"] = distance(mine, expected)
            case["names"] = sorted(mine)
            case["expected"] = sorted(expected)
            if isinstance(mesh, Mesh):
                t = mesh.traffic
                case["traffic"] = [t.forward_bytes, t.forward_calls, t.backward_bytes, t.backward_calls]
            found.append(case)
    return found


SCHEDULES: list[tuple[str, dict[str, Any]]] = [
    ("joint", {}),
    ("cycle", {}),
    ("one_pass", {}),
    ("one_pass", {"detach": True, "prefix_weights": (1.0, 0.0, 2.0, 1.0)}),
    ("stagewise", {"new_branch": "random"}),
    ("stagewise", {"new_branch": "random", "predecessors": "frozen"}),
    ("stagewise", {"predecessors": "frozen", "prefix_losses": True, "new_branch": "random"}),
    ("stagewise", {"predecessors": "slow", "prefix_losses": True, "detach": True, "new_branch": "random"}),
]


def model_and_batch(kind: str) -> tuple[Any, Any, Tensor]:
    draw = torch.Generator().manual_seed(2)
    small: dict[str, Any] = {"width": 8, "heads": 2, "mlp": 16, "branches": 4, "depth": 1, "dropout": 0.1}
    if kind == "images":
        model = paradepth.create_model(
            "paraformer_nano", image_size=8, patch_size=4, channels=1, num_classes=3, **small
        )
        return model, torch.rand(4, 1, 8, 8, generator=draw), torch.randint(3, (4,), generator=draw)
    if kind == "padded":
        model = paradepth.create_model("text_classifier_nano", context=8, num_classes=3, **small)
        tokens = torch.randint(4, 20, (4, 8), generator=draw)
        tokens[1, 5:] = model.config.pad
        return model, tokens, torch.randint(3, (4,), generator=draw)
    model = paradepth.create_model("translator_nano", context=8, vocab_size=20, pad=0, **small)
    source, target = (torch.randint(4, 20, (4, 6), generator=draw) for _ in range(2))
    return model, (source, target), torch.randint(4, 20, (4, 6), generator=draw)


def learn(model: Any, schedule: Schedule, objective: Objective, batch: Any, frozen: tuple[str, ...]) -> dict[str, Any]:
    inputs, targets = batch
    for name, part in model.parts().items():
        part.requires_grad_(name in schedule.trainable() and name not in frozen)
    model.train().zero_grad()
    set_dropout_key(model, seed=1, step=3)
    loss, hits = TrainStep(model)(inputs, targets, objective)
    loss.backward()
    with torch.no_grad():
        model.eval()
        logits, short = model.prefix_logits(inputs), model(inputs, branches=objective.prefix)
    result = {"loss": loss.detach(), "hits": hits.double(), "logits": logits, "short": short}
    return result | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def schedules(world: World) -> list[dict[str, Any]]:
    found = []
    for kind in ("images", "padded", "translation"):
        torch.manual_seed(0)
        whole, *batch = model_and_batch(kind)
        whole, batch = whole.to(DEVICE), tree_map(lambda t: t.to(DEVICE), batch)
        shared = copy.deepcopy(whole)
        shard_branches(shared.trunk, world.row)
        chosen = SCHEDULES if kind == "images" else SCHEDULES[::3]
        for (name, options), frozen in [*((s, ()) for s in chosen), (SCHEDULES[5], ("stem", "head"))]:
            schedule = build_schedule(name, list(whole.parts()), Annealing(), options)
            while True:
                for objective in {o.prefix: o for p in (0, 1) for o in schedule.objectives(p)}.values():
                    expected = learn(whole, schedule, objective, batch, frozen)
                    mine = learn(shared, schedule, objective, batch, frozen)
                    case = {"kind": kind, "schedule": name, **options, "k": objective.prefix, "frozen": frozen}
                    found.append({**case, "distance": distance(mine, expected), "names": sorted(mine)})
                    found[-1]["expected"] = sorted(expected)
                if schedule.advance(1.0) is None:
                    break
    return found


def local_executors(world: World) -> dict[str, float]:
    """Largest differences where the branches of a process are evaluated by something else than a loop."""
    torch.manual_seed(0)
    whole, *batch = model_and_batch("padded")
    whole, batch = whole.to(DEVICE), tree_map(lambda t: t.to(DEVICE), batch)
    found = {}
    for name in BRANCH_EXECUTORS:
        shared = copy.deepcopy(whole)
        shard_branches(shared.trunk, world.row, local=branch_executor(name))
        for schedule in ("joint", "one_pass"):
            chosen = build_schedule(schedule, list(whole.parts()), Annealing(), {})
            (objective,) = chosen.objectives(0)
            expected, mine = (learn(model, chosen, objective, batch, ()) for model in (whole, shared))
            found[f"{name} {schedule}"] = distance(mine, expected)
    return found


def precisions(world: World) -> dict[str, float]:
    """The same in float32, with and without autocast: states stay float32, so only the order of the sum differs."""
    torch.manual_seed(0)
    whole, inputs, targets = model_and_batch("images")
    whole, inputs, targets = whole.to(DEVICE, torch.float32), inputs.to(DEVICE, torch.float32), targets.to(DEVICE)
    shared = copy.deepcopy(whole)
    shard_branches(shared.trunk, world.row)
    found = {}
    for autocast in (None, torch.bfloat16):
        gradients = []
        for model in (shared, whole):
            model.eval().zero_grad()
            TrainStep(model, autocast=autocast)(inputs, targets, Objective(4, weights=(1, 1, 1, 1)))[0].backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        found[str(autocast)] = distance(*gradients)
    half = copy.deepcopy(whole).to(torch.bfloat16)
    expected = half(inputs.bfloat16()).detach()
    shard_branches(half.trunk, world.row)
    found["half"] = distance({"": half(inputs.bfloat16()).detach()}, {"": expected})
    return found


def together(world: World) -> dict[str, Any]:
    """Two evaluations in one backward pass, reduced and clipped gradients, weights put together, growth from zero."""
    torch.manual_seed(0)
    whole, inputs, _ = model_and_batch("images")
    whole, inputs = whole.to(DEVICE), inputs.to(DEVICE)
    shared = copy.deepcopy(whole)
    before = sum(p.numel() for p in shared.parameters())
    shard_branches(shared.trunk, world.row)
    owned = list(shared.trunk.parameters()) if world.row.size > 1 else []
    for model in (whole, shared):
        model.eval()
        (model(inputs, branches=2).square().sum() + model.prefix_logits(inputs.flip(0)).sin().sum()).backward()
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (shared, whole)]
    result: dict[str, Any] = {"twice": distance(*gradients), "local": local_executors(world)}
    result["precisions"] = precisions(world)
    reduce_gradients(shared, world, owned=owned)
    result["norm"] = float(clip_gradients(shared, 0.1, world, owned=owned)) - float(
        nn.utils.clip_grad_norm_(whole.parameters(), 0.1)
    )
    result["clipped"] = distance(*gradients)
    state = gather_tensors(shared.state_dict(), world.row, device=world.device)
    weights = whole.cpu().state_dict()
    result["same_weights"] = all(torch.equal(state[n], v) for n, v in weights.items()) if state else None
    whole.to(DEVICE)
    result["parameters"] = [sum(p.numel() for p in shared.parameters()), before]
    grown = whole.grow(2)
    shard_branches(grown.trunk, world.row)
    with torch.no_grad():
        result["grown"] = bool(torch.equal(grown(inputs), grown(inputs, branches=4)))
        one, first = shared(inputs, branches=1), whole(inputs, branches=1)
        result["one_branch"] = bool(torch.equal(one, first))
        prefixes = shared.prefix_logits(inputs)
        result["prefixes_bitwise"] = bool(torch.equal(prefixes, whole.prefix_logits(inputs)))
    for change in (lambda: shared.truncate(2), lambda: shared.grow(1), lambda: shared.save_pretrained("nowhere")):
        try:
            change()
        except ValueError as error:
            result["refused"] = result.get("refused", 0) + ("only a part of the model" in str(error))
    result["flops"] = [shared.forward_flops(branches=3), whole.forward_flops(branches=3)]
    return result


def main() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    size = int(os.environ["WORLD_SIZE"])
    with join_world(DEVICE, branch=size, timeout=60, options={"test": 1}) as world:
        content = {"trunks": trunks(world), "schedules": schedules(world), "together": together(world)}
        Path(sys.argv[1]).mkdir(exist_ok=True)
        (Path(sys.argv[1]) / f"rank{world.row.rank}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main()
