"""Forward and backward of a deep stack on P processes by MGRIT, against the plain serial loop on one.

    python benchmarks/layer_parallel/run.py --text FILE --train-steps 200 --out benchmarks/layer_parallel/result.json

32 pre-LN layers of width 128, 4 heads, length 64, batch 16, one thread a process. For h = 1 and h = 1/32, untrained and
(with --text) trained: the gradient's cosine to the exact one for a list of settings, the cheapest setting that reaches
0.99, and times. Variants take turns in rounds; a time is divided by that of the serial loop in the same round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from network import BATCH, ByteModel, cosine, gradient, make, windows
from torch import multiprocessing

from paradepth.atomic import write_json
from paradepth.depth import MGRIT, DepthExecutor, Serial
from paradepth.distributed import World, join_world, shard_depth
from paradepth.timing import quartiles
from paradepth.train.environment import command_line, environment


@dataclass(frozen=True)
class Setting:
    """Options of MGRIT that are compared."""

    coarse: str
    relaxation: str
    forward: int
    backward: int
    recompute: bool = False
    coarsening: int = 4

    @property
    def name(self) -> str:
        tail = ", recompute" if self.recompute else ""
        return f"{self.coarse}/{self.relaxation} {self.forward}/{self.backward}{tail}"

    def executor(self) -> MGRIT:
        return MGRIT(
            coarsening=self.coarsening,
            forward_iterations=self.forward,
            backward_iterations=self.backward,
            relaxation=self.relaxation,  # pyright: ignore[reportArgumentType]
            coarse=self.coarse,
            recompute=self.recompute,
        )

    def predicted(self, unit: dict[str, float], *, depth: int, ranks: int) -> float:
        """Seconds by the cost model: relaxation is shared between the ranks, coarse solves are not.

        guess + k · (relaxation + coarse solve) + last relaxation, in each direction; the coarse solves overlap with
        nothing and nothing is remembered, so this is an upper estimate.
        """
        c = self.coarsening
        coarse = depth // c if self.coarse == "sample" else depth
        own_again = 0 if self.relaxation == "F" else coarse / ranks  # FCF moves the C-points, so Ψ is taken anew
        relax = depth / ranks * (1 if self.relaxation == "F" else 2)
        x = unit["graph"] + unit["pull"] if self.recompute else unit["pull"]
        last = unit["graph"] + unit["pull_all"] if self.recompute else unit["pull_all"]
        once = unit["forward"] if self.recompute else unit["graph"]
        forward = coarse + self.forward * (relax + own_again + coarse)
        backward = coarse + self.backward * (relax + own_again + coarse)
        return forward * unit["forward"] + backward * x + depth / ranks * (once + last)


PAPER = [Setting("sample", "F", *k) for k in ((0, 0), (1, 0), (1, 1), (2, 1), (7, 7))]
PAPER += [Setting("sample", "F", *k, recompute=True) for k in ((0, 0), (1, 1), (2, 1))]
CANDIDATES = [
    Setting(coarse, relaxation, *k)
    for coarse, relaxation in itertools.product(("sample", "branch", "half"), ("F", "FCF"))
    for k in ((0, 0), (1, 0), (1, 1), (2, 1), (2, 2))
]
TIMED = 3  # settings a network that reach the cosine and are timed: those with the fewest layer evaluations


def units(model: ByteModel, x: torch.Tensor, rounds: int) -> dict[str, float]:
    """Seconds of one layer: forward without and with its graph, and pulling a gradient back without and with that of
    its parameters. Medians over rounds and layers."""
    times: dict[str, list[float]] = {"forward": [], "graph": [], "pull": [], "pull_all": []}
    ones = torch.ones_like(x)
    for _, layer in itertools.product(range(rounds), list(model.stack.layers)[:8]):
        leaf = x.detach().requires_grad_()
        start = time.perf_counter()
        with torch.no_grad():
            layer.residual(leaf)  # pyright: ignore[reportCallIssue]
        times["forward"].append(time.perf_counter() - start)
        start = time.perf_counter()
        y = layer.residual(leaf)  # pyright: ignore[reportCallIssue]
        times["graph"].append(time.perf_counter() - start)
        for name, inputs in (("pull", [leaf]), ("pull_all", [leaf, *layer.parameters()])):
            start = time.perf_counter()
            torch.autograd.grad(y, inputs, ones, retain_graph=True)
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in times.items()}


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def one_pass(model: ByteModel, x: torch.Tensor, w: torch.Tensor, executor: DepthExecutor | None) -> None:
    """Forward and backward of the stack; None is the plain loop."""
    model.zero_grad()
    y = x
    if executor is None:
        for layer in model.stack.layers:
            y = layer(y, step=model.stack.step)
    else:
        y = model.stack(x, executor=executor)
    y.backward(w)


def measure_rank(rank: int, ranks: int, port: int, work: dict[str, Any], out: Path) -> None:
    """One process: its share of the stack, and on the first one the whole stack for the serial loop."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    settings = [Setting(**setting) for setting in work["settings"]]
    whole = make(work["depth"], work["step"], text=None, train_steps=0)
    shared = make(work["depth"], work["step"], text=None, train_steps=0)
    x = whole.states(windows(None, BATCH, seed=5)[:, :-1]).detach().requires_grad_()
    w = torch.randn(x.shape, generator=torch.Generator().manual_seed(6))
    with join_world("cpu", depth=ranks) as world:
        shard_depth(shared.stack, world.row, executor=settings[0].executor())
        rows = []
        evaluations: dict[str, list[int]] = {}
        for number in range(work["rounds"] + 1):
            row: dict[str, float] = {}
            if world.is_main:
                row["serial"] = timed(lambda: one_pass(whole, x, w, None))
            for setting in settings[number % len(settings) :] + settings[: number % len(settings)]:
                executor = setting.executor()
                world.barrier()
                row[setting.name] = timed(lambda e=executor: one_pass(shared, x, w, e))
                evaluations[setting.name] = [executor.report.forward.evaluations, executor.report.backward.evaluations]
            world.barrier()
            rows.append(row)
        if world.is_main:
            result = {"rows": rows[1:], "evaluations": evaluations, "unit": units(whole, x, 5)}
            out.write_text(json.dumps(result))


def measure(settings: list[Setting], *, ranks: int, depth: int, step: float, rounds: int) -> dict[str, Any]:
    """Times of all settings on `ranks` processes, relative to the serial loop of the same round."""
    work = {"settings": [asdict(s) for s in settings], "depth": depth, "step": step, "rounds": rounds}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        multiprocessing.spawn(measure_rank, args=(ranks, port, work, out), nprocs=ranks)  # pyright: ignore
        return json.loads(out.read_text())


def overhead(depth: int, step: float, rounds: int) -> list[dict[str, Any]]:
    """Time of solves on one process over the time of their layer evaluations alone."""
    model = make(depth, step, text=None, train_steps=0)
    x = model.states(windows(None, BATCH, seed=5)[:, :-1]).detach().requires_grad_()
    w = torch.randn_like(x)
    rows = []
    for setting in (
        Setting("sample", "F", 1, 1, recompute=True),
        Setting("branch", "FCF", 1, 1, recompute=True),
        Setting("half", "F", 2, 2),
    ):
        ratios = []
        for number in range(rounds + 1):
            unit = units(model, x.detach(), 1)
            executor = setting.executor()
            seconds = timed(lambda e=executor: one_pass(model, x, w, e))
            forward, backward = executor.report.forward.evaluations, executor.report.backward.evaluations
            again = unit["graph"] if setting.recompute else 0.0
            graphs = 0 if setting.recompute else depth
            alone = (forward - graphs) * unit["forward"] + graphs * unit["graph"]
            alone += (backward - depth) * (again + unit["pull"]) + depth * (again + unit["pull_all"])
            if number:
                ratios.append(seconds / alone)
        rows.append({"setting": setting.name, "ratio": quartiles(ratios)})
    return rows


def cosines(depth: int, step: float, *, text: Path | None, train_steps: int) -> dict[str, Any]:
    """Cosine of each setting's gradient to the serial one, on a batch that was not trained on, and the layer
    evaluations of both passes."""
    model = make(depth, step, text=text, train_steps=train_steps)
    batch = windows(text, BATCH, seed=7)
    exact = gradient(model, batch, executor=Serial())
    every = dict.fromkeys([*CANDIDATES, *(s for s in PAPER if not s.recompute)])
    found = {}
    for setting in every:
        executor = setting.executor()
        value = cosine(gradient(model, batch, executor=executor), exact)
        found[setting.name] = value, executor.report.forward.evaluations + executor.report.backward.evaluations
    return found


def cheapest(times: dict[str, float], networks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """For each network the setting with the least time among those timed whose cosine is at least 0.99."""
    best = {}
    for network, found in networks.items():
        right = [name for name in times if name in found and found[name][0] >= 0.99]
        if right:
            name = min(right, key=times.__getitem__)
            best[network] = {"setting": name, "cosine": found[name][0], "time": times[name]}
    return best


def report(result: dict[str, Any]) -> str:
    """The results as Markdown tables."""
    networks = list(result["gradients"])
    lines = [
        "| setting | time / serial loop, median (quartiles) | predicted | layer evaluations, forward + backward | "
        + " | ".join(f"cosine, {name}" for name in networks)
        + " |",
        "|---" * (4 + len(networks)) + "|",
    ]
    for row in result["settings"]:
        time_, name = row["time"], row["setting"]
        plain = name.removesuffix(", recompute")
        values = " | ".join(f"{result['gradients'][n][plain][0]:.3f}" for n in networks)
        lines.append(
            f"| {name} | {time_['median']:.2f} ({time_['lower_quartile']:.2f} to {time_['upper_quartile']:.2f}) | "
            f"{row['predicted']:.2f} | {row['evaluations'][0]} + {row['evaluations'][1]} | {values} |"
        )
    lines += [
        "",
        "| network | cheapest setting with cosine ≥ 0.99 | cosine | time / serial loop |",
        "|---|---|---|---|",
    ]
    for network, best in result["cheapest"].items():
        lines.append(f"| {network} | {best['setting']} | {best['cosine']:.4f} | {best['time']:.2f} |")
    lines += ["", "| one process, setting | time / time of its layer evaluations |", "|---|---|"]
    for row in result["overhead"]:
        r = row["ratio"]
        lines.append(
            f"| {row['setting']} | {r['median']:.2f} ({r['lower_quartile']:.2f} to {r['upper_quartile']:.2f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="MGRIT on several processes against the serial loop on one.")
    parser.add_argument("--ranks", type=int, default=2, help="processes")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds")
    parser.add_argument("--depth", type=int, default=32, help="layers, a multiple of 4")
    parser.add_argument("--text", type=Path, help="text to train on and to take batches from; random bytes without it")
    parser.add_argument("--train-steps", type=int, default=0, help="also look at networks trained for so many steps")
    parser.add_argument("--only-gradients", action="store_true", help="stop before times are measured")
    parser.add_argument(
        "--gradients",
        type=Path,
        default=Path(tempfile.gettempdir()) / "layer_parallel_gradients.json",
        help="cosines of an earlier call with the same options, made if missing",
    )
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    o = parser.parse_args()
    if o.ranks < 2 or o.rounds < 1 or o.depth < 4 * o.ranks or o.depth % 4:
        parser.error("--ranks must be at least 2, --rounds at least 1, --depth a multiple of 4 with 4 layers a rank")
    if o.train_steps and o.text is None:
        parser.error("--train-steps needs --text")
    torch.set_num_threads(1)
    networks: dict[str, dict[str, Any]] = json.loads(o.gradients.read_text()) if o.gradients.exists() else {}
    for step, name in ((1.0, "h = 1"), (1 / o.depth, f"h = 1/{o.depth}")):
        for steps in sorted({0, o.train_steps}):
            label = f"{name}, {f'{steps} steps' if steps else 'untrained'}"
            if label in networks:
                continue
            print(f"gradients of {label}", file=sys.stderr, flush=True)
            networks[label] = cosines(o.depth, step, text=o.text, train_steps=steps)
            write_json(o.gradients, networks)
    if o.only_gradients:
        return
    reaching = {
        n: sorted((s for s in CANDIDATES if c[s.name][0] >= 0.99), key=lambda s, c=c: c[s.name][1])[:TIMED]
        for n, c in networks.items()
    }
    timed_settings = list(dict.fromkeys([*PAPER, *(s for found in reaching.values() for s in found)]))
    print(f"times of {len(timed_settings)} settings on {o.ranks} processes", file=sys.stderr, flush=True)
    measured = measure(timed_settings, ranks=o.ranks, depth=o.depth, step=1.0, rounds=o.rounds)
    times = {s.name: quartiles([r[s.name] / r["serial"] for r in measured["rows"]]) for s in timed_settings}
    serial = o.depth * (measured["unit"]["graph"] + measured["unit"]["pull_all"])
    result = {
        "environment": environment(
            World(0, 1, torch.device("cpu")),
            autocast=None,
            command=f"python benchmarks/layer_parallel/{command_line()}",
        ),
        "ranks": o.ranks,
        "rounds": o.rounds,
        "unit_seconds": measured["unit"],
        "settings": [
            {
                "setting": s.name,
                "time": times[s.name],
                "predicted": s.predicted(measured["unit"], depth=o.depth, ranks=o.ranks) / serial,
                "evaluations": measured["evaluations"][s.name],
            }
            for s in timed_settings
        ],
        "gradients": networks,
        "cheapest": cheapest({name: t["median"] for name, t in times.items()}, networks),
        "overhead": overhead(o.depth, 1.0, o.rounds),
    }
    if o.out:
        write_json(o.out, result)
    print(report(result))


if __name__ == "__main__":
    main()
