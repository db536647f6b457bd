"""How long a forward pass takes: the exported file beside PyTorch, in turns, so that whatever else the machine does
hits all of them alike."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from paradepth.export.graph import Graph
from paradepth.export.session import open_session

BATCHES = (1, 8)


def measure(
    candidates: Mapping[str, Callable[[], object]], *, seconds: float, least: int = 3, most: int = 200
) -> dict[str, list[float]]:
    """Times functions in turns.

    In each round every candidate has a turn of one call that is not timed and up to three that are; the one that begins
    changes from round to round.

    Args:
        candidates: functions by name.
        seconds: about how long all of it takes, once each candidate has had its first call.
        least, most: rounds, whatever `seconds` says.

    Returns:
        Milliseconds of every timed call, by candidate.

    >>> found = measure({"a": lambda: None, "b": lambda: None}, seconds=0.01)
    >>> list(found), len(found["a"]) >= 3
    (['a', 'b'], True)
    """
    names = list(candidates)
    for run in candidates.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for turn in range(most):
        if turn >= least and time.perf_counter() - started > seconds:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            run = candidates[name]
            time.sleep(0.002)  # threads of the one before it come to rest
            run()
            for _ in range(3):
                before = time.perf_counter()
                run()
                found[name].append(1000 * (time.perf_counter() - before))
                if found[name][-1] > 300:  # slow ones need no more
                    break
    return found


def summary(milliseconds: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of times.

    >>> summary([1.0, 2.0, 3.0, 10.0])["median_ms"]
    2.5
    """
    low, _, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return {"median_ms": statistics.median(milliseconds), "low_ms": low, "high_ms": high, "runs": len(milliseconds)}


def latency_table(
    graph: Graph,
    *,
    run: Callable[..., object] | None = None,
    onnx: bytes | None = None,
    threads: int | None = None,
    batches: Sequence[int] = BATCHES,
    seconds: float = 4.0,
) -> list[dict[str, Any]]:
    """Latencies of an exported graph and of PyTorch: one row for each batch size and each way to run it.

    Args:
        graph: what was exported.
        run: evaluates the exported program.
        onnx: content of the exported ONNX file, which is run one operation after another ("sequential") and branches
            side by side ("parallel", where there is more than one thread).
        threads: threads in all, of each of them; None is PyTorch's present number.
        batches: batch sizes, of samples of full length.
        seconds: about how long the measurement takes.

    Returns:
        Rows with "what", "batch", "median_ms", "low_ms" and "high_ms" (quartiles), and "runs".

    Raises:
        ValueError: threads below 1.
    """
    before = torch.get_num_threads()
    threads = before if threads is None else threads
    if threads < 1:
        raise ValueError(f"threads is {threads}; it must be at least 1")
    sessions = {}
    if onnx is not None:
        sessions["onnxruntime sequential"] = open_session(onnx, threads=threads, quiet=True)
        if threads > 1:
            branches = graph.model.config.branches
            sessions["onnxruntime parallel"] = open_session(
                onnx, threads=threads, execution="parallel", branches=branches, quiet=True
            )
    rows = []
    torch.set_num_threads(threads)
    try:
        for batch in batches:
            inputs = graph.sample(batch)
            feed = {spec.name: tensor.numpy() for spec, tensor in zip(graph.inputs, inputs, strict=True)}
            candidates: dict[str, Callable[[], object]] = {"PyTorch eager": lambda x=inputs: graph.module(*x)}
            if run is not None:
                candidates["exported program"] = lambda x=inputs: run(*x)
            for name, session in sessions.items():
                candidates[name] = lambda s=session, x=feed: s.run(None, x)
            with torch.inference_mode():
                found = measure(candidates, seconds=seconds / len(batches))
            rows += [{"what": name, "batch": batch, **summary(times)} for name, times in found.items()]
    finally:
        torch.set_num_threads(before)
    return rows


def surroundings(threads: int | None) -> dict[str, Any]:
    """What a reader of latencies has to know of the machine: processors, threads, and how busy it was."""
    return {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads() if threads is None else threads,
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
    }


def warning(machine: dict[str, Any]) -> str | None:
    """What to say of latencies that were measured on a busy machine.

    >>> warning({"cpus": 2, "threads": 2, "load_average": 4.0})
    'the machine was busy (load 4.0, 2 processors), so these latencies are too long, the more so with several threads'
    >>> warning({"cpus": 16, "threads": 2, "load_average": 4.0}) is None
    True
    """
    load, cpus = machine["load_average"], machine["cpus"] or 1
    if load <= cpus + 0.5:  # its own threads count as well
        return None
    return (
        f"the machine was busy (load {load:.1f}, {cpus} processors), so these latencies are too long, the more so with "
        "several threads"
    )
