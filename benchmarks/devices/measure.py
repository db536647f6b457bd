"""Taking turns: each way is checked against one process, its messages are counted, then it is timed."""

from __future__ import annotations

import gc
import os
import socket
import statistics
import struct
import sys
import time
from typing import Any

import older_pipelines
import ours
import pipelines
import tensor_parallel
import torch
from networks import Case, Size
from share import Setting, Share, Way
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from paradepth.timing import quartiles

TOLERANCE = 1e-4
_CHECK_RATE = 0.1  # of the plain gradient step between the two passes that are compared
_BYTES_SENT = 200  # where Linux has the number in its tcp_info


def ways(size: Size, case: Case, *, processes: int) -> tuple[list[Way], dict[str, str]]:
    """All ways to run a case, and the families that it leaves out, with the reason."""
    found = ours.ways(case, size.shapes, size.serial)
    found += pipelines.ways(case, size.serial, processes)
    found += older_pipelines.ways(case, size.serial)
    refused = tensor_parallel.why_not(size.heads, processes)
    parallel = tensor_parallel.ways(size.serial)
    if refused:
        return found, {way.family: refused for way in parallel}
    return found + parallel, {}


def gathered(value: Any) -> list[Any]:
    """What every process has, by rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def call(share: Share, case: Case, images_BCHW: Tensor, labels_B: Tensor) -> None:
    """What is timed, to the end of it."""
    if case.training:
        share.step(images_BCHW, labels_B)
    else:
        share.forward(images_BCHW)
    if images_BCHW.is_cuda:
        torch.cuda.synchronize()


def expected_logits(network: Any, case: Case, images_BCHW: Tensor, labels_B: Tensor) -> list[Tensor]:
    """One process's logits; in training those before and those after a step along the gradient."""
    if not case.training:
        with torch.no_grad():
            return [network.eval()(images_BCHW)]
    found = []
    for _ in range(2):
        network.zero_grad()
        logits_BN = network.train()(images_BCHW)
        F.cross_entropy(logits_BN, labels_B).backward()
        _descend(list(network.parameters()))
        found.append(logits_BN.detach())
    moved = float((found[1] - found[0]).abs().max())
    if moved < 100 * TOLERANCE:
        raise RuntimeError(f"the step moved the logits by {moved:.1g} only, so wrong gradients could pass")
    return found


def _descend(parameters: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=-_CHECK_RATE)


def distance(
    share: Share, setting: Setting, images_BCHW: Tensor, labels_B: Tensor, expected: list[Tensor]
) -> float | None:
    """Largest difference of this process's logits to the expected ones; None where it has none. In training a second
    pass follows a step along the gradient, so wrong gradients show. Leaves everything warmed up."""
    logits: list[Tensor | None] = []
    if setting.case.training:
        for number in range(2):
            share.clear()
            logits.append(share.backward(images_BCHW, labels_B))
            if number == 0:
                _descend(share.parameters())
        share.update()
    else:
        logits.append(share.forward(images_BCHW))
    differences = []
    for whole_BN, own in zip(expected, logits, strict=True):
        if own is not None:
            right = whole_BN.chunk(setting.processes)[setting.rank] if share.splits_batch else whole_BN
            differences.append(float((own - right).abs().max()))
    return max(differences, default=None)


def sent_bytes() -> int | None:
    """Bytes that this process has sent over TCP on the connections that are open, as the kernel counts them; None where
    it does not tell."""
    total = 0
    try:
        descriptors = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        return None
    for descriptor in descriptors:
        try:
            if not os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as connection:
                if connection.type != socket.SOCK_STREAM or connection.family == socket.AF_UNIX:
                    continue
                about = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # closed meanwhile
            continue
        if len(about) < _BYTES_SENT + 8:
            return None
        total += struct.unpack_from("<Q", about, _BYTES_SENT)[0]
    return total


def _messages(share: Share, setting: Setting, images_BCHW: Tensor, labels_B: Tensor) -> dict[str, list[int] | None]:
    """Bytes of one call, by rank: counted by the kernel, by arithmetic, and by the library where it counts."""
    if share.traffic is not None:
        share.traffic.reset()
    dist.barrier()
    before = sent_bytes()
    call(share, setting.case, images_BCHW, labels_B)
    after = sent_bytes()
    counted = None if before is None or after is None or setting.device.type != "cpu" else after - before
    own = None if share.traffic is None else share.traffic.forward_bytes + share.traffic.backward_bytes
    by_rank = gathered((counted, share.payload(setting.case), own))
    sent, payload, library = (list(column) for column in zip(*by_rank, strict=True))
    return {
        "sent_bytes": None if None in sent else sent,
        "payload_bytes": payload,
        "library_bytes": None if None in library else library,
    }


def _prepared(
    way: Way, setting: Setting, images_BCHW: Tensor, labels_B: Tensor, expected: list[Tensor]
) -> tuple[Share | None, float, str | None]:
    """This process's share, how far the logits are from one process's, and why the way is left out, if it is."""
    share, difference, reason = None, None, None
    try:
        share = way.build(setting)
        difference = distance(share, setting, images_BCHW, labels_B, expected)
    except Exception as error:
        if not way.optional:
            raise
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    reasons = [found for found in gathered(reason) if found]
    if reasons:
        return None, 0.0, reasons[0]
    differences = [found for found in gathered(difference) if found is not None]
    if not differences or not max(differences) <= TOLERANCE:
        raise RuntimeError(
            f"{way.network} by {way.name}, {setting.case.name}: logits differ from one process's by {differences}, "
            f"more than {TOLERANCE}"
        )
    return share, max(differences), None


def measure(setting: Setting, *, rounds: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """All ways to run a case, in turns: rows, and the families that were left out with the reason. Every process has
    the same."""
    size, case = setting.size, setting.case
    images_BCHW, labels_B = size.batch_of(case, setting.device)
    expected: dict[str, list[Tensor]] = {}
    for branches, depth in ((0, size.layers), *size.shapes):
        network = size.network(branches, depth).to(setting.device)
        name = f"{branches}×{depth}" if branches else size.serial
        expected[name] = expected_logits(network, case, images_BCHW, labels_B)
    candidates, left_out = ways(size, case, processes=setting.processes)
    shares: list[Share] = []
    rows: list[dict[str, Any]] = []
    for way in candidates:
        share, difference, reason = _prepared(way, setting, images_BCHW, labels_B, expected[way.network])
        if share is None:
            left_out[way.family] = reason or ""
            continue
        shares.append(share)
        rows.append(
            {
                "case": case.name,
                "batch": case.batch,
                "training": case.training,
                "network": way.network,
                "branches": way.branches,
                "family": way.family,
                "detail": way.detail,
                "difference": float(f"{difference:.2g}"),
                **_messages(share, setting, images_BCHW, labels_B),
            }
        )
    seconds = _in_turns(shares, case, images_BCHW, labels_B, rounds=rounds)
    del shares
    gc.collect()
    return _summed_up(rows, seconds, case), left_out


def _in_turns(
    shares: list[Share], case: Case, images_BCHW: Tensor, labels_B: Tensor, *, rounds: int
) -> list[list[float]]:
    """Seconds of a call by share and round, those of the process that took longest; rounds start one share further on
    each time, in the same order on every process."""
    mine: list[list[list[float]]] = [[] for _ in shares]
    for number in range(rounds):
        for at in range(len(shares)):
            index = (at + number) % len(shares)
            taken = []
            for first in range(case.calls):
                if first == 0 or not case.in_a_row:
                    dist.barrier()
                before = time.perf_counter()
                call(shares[index], case, images_BCHW, labels_B)
                taken.append(time.perf_counter() - before)
            mine[index].append([sum(taken) / case.calls] if case.in_a_row else taken)
        if dist.get_rank() == 0:
            print(f"{case.name}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    by_rank = gathered(mine)
    return [
        [
            statistics.median(max(calls) for calls in zip(*(rank[index][number] for rank in by_rank), strict=True))
            for number in range(rounds)
        ]
        for index in range(len(shares))
    ]


def _summed_up(rows: list[dict[str, Any]], seconds: list[list[float]], case: Case) -> list[dict[str, Any]]:
    """The rows with their times, and those relative to the best peer's of the same round."""
    peers = [index for index, row in enumerate(rows) if not row["branches"]]
    best = min(peers, key=lambda index: statistics.median(seconds[index]))
    for row, taken in zip(rows, seconds, strict=True):
        row["milliseconds"] = quartiles([1000 * s for s in taken])
        row["images_per_second"] = quartiles([case.batch / s for s in taken])
        row["over_best_peer"] = quartiles([b / s for b, s in zip(seconds[best], taken, strict=True)])
        row["is_best_peer"] = row is rows[best]
    return rows
