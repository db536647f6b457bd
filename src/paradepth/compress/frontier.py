"""The points of a run: what each plan makes of its model, computed once and kept on disk.

Plans that begin alike share their first steps; every model along the way is computed once:

    full ─┬─ prefix=2 ─── distil=300 ─┬─ int8                    RUN/compression/models/PLAN    a saved model
          │                           └─ magnitude=0.5 …         RUN/compression/points/PLAN.json
          └─ magnitude=0.7 ─── tune=300                          RUN/compression/frontier.json, the whole table
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paradepth.atomic import write_json
from paradepth.compress.measure import Weight, latencies, machine, weigh
from paradepth.compress.step import Plan, plan_text
from paradepth.compress.workbench import Workbench
from paradepth.export.latency import warning
from paradepth.models import TrunkModel, from_pretrained
from paradepth.train import NonFiniteLoss

FOLDER = "compression"  # inside a run
FULL = "full"  # what the plan without steps is called
_LONGEST_NAME = 120  # of a file; file systems take 255

Record = dict[str, Any]


class Frontier:
    """The models and figures of a run's plans. What is computed is on disk at once, and is not computed again.

    Everything is kept under the hash of the run's weights: when the run is trained anew, it counts as missing.

    Args:
        bench: the run's.
        run_dir: the run.
        say: told what is done, line by line.

    Attributes:
        failed: plans whose training broke down, with the reason. They have no point.
    """

    def __init__(self, bench: Workbench, run_dir: str | Path, *, say: Callable[[str], object] = print) -> None:
        self.bench, self.say = bench, say
        self.run = Path(run_dir)
        self.folder = self.run / FOLDER
        self.key = hashlib.sha256((self.run / "model.safetensors").read_bytes()).hexdigest()
        self.failed: dict[str, str] = {}
        self._held: dict[Plan, TrunkModel] = {}  # along the plan that is at work

    # ---- points --------------------------------------------------------------------------------------------

    def compute(self, plans: Sequence[Plan]) -> list[Record]:
        """The records of the full model and of plans that fit it; those that are missing are computed.

        Returns:
            One record a plan, except for those that failed: "plan", "model" (the hash), "parameters", "nonzero",
            "bytes" and "flops" as of `Weight`, "accuracy", "loss" and "scores" on the validation split, "notes" of
            what the steps found, and "seconds" that the last step took.
        """
        wanted = [(), *dict.fromkeys(plan for plan in plans if plan)]
        missing = [plan for plan in _depth_first(wanted) if self.record(plan) is None]
        if len(missing) < len(wanted):
            self.say(f"{len(wanted) - len(missing)} of {len(wanted)} points are there already")
        for number, plan in enumerate(missing, start=1):
            try:
                said = described(self._compute(plan))
            except NonFiniteLoss as error:
                self.failed[name_of(plan)] = str(error)
                said = f"{name_of(plan)} failed: {error}"
            self.say(f"[{number}/{len(missing)}] {said}")
        self._held.clear()
        return [record for plan in wanted if (record := self.record(plan)) is not None]

    def record(self, plan: Plan) -> Record | None:
        """What is known of a plan; None where that is nothing, or of other weights."""
        return self._read(self._point(plan))

    def known(self) -> list[Record]:
        """All records of the present weights, the full model first."""
        found = [record for path in sorted((self.folder / "points").glob("*.json")) if (record := self._read(path))]
        return sorted(found, key=lambda record: record["plan"] != FULL)

    def model(self, plan: Plan) -> TrunkModel:
        """The model that a plan makes of the full one, in evaluation mode, on the bench's device. It is computed if it
        is not there."""
        if not plan:
            return self.bench.teacher
        if plan in self._held:
            return self._held[plan]
        if name_of(plan) in self.failed:
            raise NonFiniteLoss(self.failed[name_of(plan)])
        stored = self._stored(plan)
        if stored is not None:
            found = stored
        else:
            parent = self.model(plan[:-1])
            told = len(self.bench.notes)
            found = plan[-1].apply(parent, self.bench)
            found.save_pretrained(self.place(plan), packed=True)
            origin = {"plan": plan_text(plan), "model": self.key, "notes": self.bench.notes[told:]}
            write_json(self.place(plan) / "origin.json", origin)
        self._held = {p: m for p, m in self._held.items() if p == plan[: len(p)]} | {plan: found}
        return found

    def place(self, plan: Plan) -> Path:
        """Where the model of a plan is saved: of the full model, the run itself."""
        return self.folder / "models" / _file_name(name_of(plan)) if plan else self.run

    # ---- latencies -----------------------------------------------------------------------------------------

    def time(self, plans: Sequence[Plan], *, threads: int | None) -> None:
        """Measures the latencies of the full model and of plans, all of them in one go, unless that was done. What was
        measured on a busy machine is measured again on a quiet one."""
        names = {name_of(plan): plan for plan in [(), *plans]}
        here = machine(self.bench.device, threads)
        found = self.timed()
        if set(names) <= set(found.get("points", {})) and _as_good(found["machine"], here):
            return
        self.say(f"measuring the latencies of {len(names)} models in turns, on {here['threads']} threads")
        models = {name: self.model(plan) for name, plan in names.items()}
        points = latencies(models, threads=threads)
        if note := warning(here):
            self.say(note)
        write_json(self.folder / "latency.json", {"model": self.key, "machine": here, "points": points})

    def timed(self) -> Mapping[str, Any]:
        """The latencies that were measured last: "machine" and "points"; empty where there are none."""
        return self._read(self.folder / "latency.json") or {}

    # ---- files ---------------------------------------------------------------------------------------------

    def _compute(self, plan: Plan) -> Record:
        before = time.perf_counter()
        model = self.model(plan)
        weight: Weight = weigh(model, saved=self.place(plan))
        found = self.bench.validate(model)
        record = {
            "plan": name_of(plan),
            "model": self.key,
            **asdict(weight),
            "accuracy": found.accuracy[-1],
            "loss": found.loss[-1],
            "scores": {name: values[-1] for name, values in found.scores.items()},
            "notes": [note for k in range(1, len(plan) + 1) for note in self._notes(plan[:k])],
            "seconds": round(time.perf_counter() - before, 3),
        }
        self._point(plan).parent.mkdir(parents=True, exist_ok=True)
        write_json(self._point(plan), record, allow_nan=True)
        return record

    def _notes(self, plan: Plan) -> list[dict[str, Any]]:
        return (self._read(self.place(plan) / "origin.json") or {}).get("notes", [])

    def _point(self, plan: Plan) -> Path:
        return self.folder / "points" / f"{_file_name(name_of(plan))}.json"

    def _read(self, path: Path) -> Record | None:
        """A file of the present weights."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and found.get("model") == self.key else None

    def _stored(self, plan: Plan) -> TrunkModel | None:
        if self._read(self.place(plan) / "origin.json") is None:  # it is written last
            return None
        try:
            return from_pretrained(self.place(plan)).to(self.bench.device)
        except ValueError as error:
            self.say(f"{plan_text(plan)} is computed again: {error}")
            return None


def name_of(plan: Plan) -> str:
    """The plan as it is written; `FULL` for the one without steps."""
    return plan_text(plan) if plan else FULL


def described(record: Record) -> str:
    """A point in a line.

    >>> described({"plan": "int8", "accuracy": 0.5, "bytes": 1234, "seconds": 2.0})
    'int8: validation accuracy 50.00 %, 1,234 bytes, in 2.0 s'
    """
    return (
        f"{record['plan']}: validation accuracy {100 * record['accuracy']:.2f} %, {record['bytes']:,} bytes, "
        f"in {record['seconds']:.1f} s"
    )


def leading(points: Sequence[Record], *, cost: Callable[[Record], float]) -> set[str]:
    """The plans of the points that no other one beats: none is as accurate at a lower cost, or more accurate at the
    same cost. Of equal ones the first.

    >>> points = [{"plan": p, "accuracy": a, "bytes": b} for p, a, b in (("a", 0.9, 9), ("b", 0.8, 3), ("c", 0.7, 4))]
    >>> sorted(leading(points, cost=lambda point: point["bytes"]))
    ['a', 'b']
    """
    found, best = set(), float("-inf")
    for point in sorted(points, key=lambda point: (cost(point), -point["accuracy"])):
        if point["accuracy"] > best:
            found.add(point["plan"])
            best = point["accuracy"]
    return found


def _depth_first(plans: Iterable[Plan]) -> Iterator[Plan]:
    """Plans in an order in which those that begin alike follow each other."""
    children: dict[Plan, list[Plan]] = {}
    wanted = set()
    for plan in plans:
        wanted.add(plan)
        for length in range(len(plan)):
            behind = children.setdefault(plan[:length], [])
            if plan[: length + 1] not in behind:
                behind.append(plan[: length + 1])

    def walk(plan: Plan) -> Iterator[Plan]:
        if plan in wanted:
            yield plan
        for child in children.get(plan, []):
            yield from walk(child)

    return walk(())


def _file_name(name: str) -> str:
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _as_good(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a measurement was made on such a machine, one that was not busier than now."""
    alike = all(before.get(key) == now.get(key) for key in ("device", "cpus", "threads", "torch"))
    return alike and (warning(dict(before)) is None or warning(dict(now)) is not None)
