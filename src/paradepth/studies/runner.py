"""Run a study: several cells side by side, each in its own process on one thread; finished cells are never lost.

out/cells/NAME.json       record of a finished cell; what is here is not run again
out/runs/NAME/            its run directory        out/runs/NAME.log         its output
out/runs/NAME.cell.json   hash of the options that run directory belongs to
out/results.json          all records, collected   out/report.html
out/.lock                 while a runner works
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from paradepth.atomic import write_json
from paradepth.studies.collect import collect
from paradepth.studies.forks import ForkServer
from paradepth.studies.lock import StudyLock
from paradepth.studies.record import MEASURED, measured, read_diverged, read_record, read_run
from paradepth.studies.spawn import Process, Spawn
from paradepth.studies.study import Cell, Study, resume_command, train_command
from paradepth.studies.tiny_data import write_tiny_data
from paradepth.train.checkpoint import CheckpointStore

__all__ = ["Cell", "Study", "collect", "run_study", "write_results"]

Command = Callable[[Cell, Path], list[str]]

_POLL_SECONDS = 0.1
_STOP_SECONDS = 60.0  # for a child to save its checkpoint after SIGTERM, before SIGKILL
_LOG_LINES = 15  # of a failed cell, shown in its message
_FAILED, _REFUSED = 1, 2  # exit status of a command that fails, and of one that refuses its input


@dataclass
class _Running:
    cell: Cell
    process: Process
    log: IO[bytes]
    resumed: bool


def run_study(
    study: Study,
    *,
    out: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    workers: int = 1,
    only: str | None = None,
    rerun: bool = False,
    say: Callable[[str], object] = print,
    command: Command | None = None,
    resume: Command | None = None,
    server: ForkServer | None = None,
) -> dict[str, Any]:
    """Train the cells of a study that are missing, then write `results.json` and `report.html`.

    A cell whose record was made with other options counts as missing. An interrupted cell goes on from its newest
    checkpoint. A cell that starts from another waits for it; where the run directory of that one is gone, it runs
    again. A failed cell stops only those that start from it; one that diverged is done where the study says that cells
    may. On SIGINT, SIGTERM or SIGHUP the training processes get
    SIGTERM, save and end, and so does the study; the same call goes on later. A second signal kills them at once.

    Args:
        study: the grid.
        out: the study's folder, created where needed.
        data_dir: passed on to every cell. At size "smoke" it is `out`/data by default, with generated data sets.
        workers: how many cells run at a time. `seconds` in the results are measured under that load.
        only: run only cells whose name matches this pattern, as in a shell (`*`, `?`, `[abc]`), and what they start
            from.
        rerun: train again what is finished; the old records stay until the new ones exist.
        say: told about progress, a line at a time.
        command: what trains a cell into a run directory; `paradepth train` by default.
        resume: what goes on with an interrupted run; `paradepth resume` by default.
        server: what forks the processes, where several studies share one; by default one of its own, where the system
            can fork.

    Returns:
        `done` and `skipped` (names of cells), `failed` (dicts with `name` and `reason`) and `out`.

    Raises:
        ValueError: fewer than one worker, a pattern that matches nothing, a missing data folder, another runner is at
            work in `out`, or a cell's test evaluation lacks the measure that its group is compared by.
        KeyboardInterrupt, SystemExit: the study was stopped, by SIGINT and by another signal.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}, but must be at least 1")
    if data_dir is not None and not Path(data_dir).is_dir():
        raise ValueError(f"data folder {data_dir} does not exist")
    cells = [cell for cell in study.cells if only is None or fnmatch.fnmatchcase(cell.name, only)]
    if not cells:
        names = ", ".join(cell.name for cell in study.cells)
        raise ValueError(f"no cell of study {study.name} matches {only!r}; there are {names}")
    out = Path(out)
    for folder in (out / "cells", out / "runs"):
        folder.mkdir(parents=True, exist_ok=True)
    lock = StudyLock(out / ".lock", say=say)
    try:
        if study.size == "smoke" and data_dir is None:
            data_dir = write_tiny_data(out / "data")
        train = command or partial(train_command, data_dir=None if data_dir is None else Path(data_dir))
        spawn = Spawn(lock.descriptor, server, say)
        try:
            runner = _Runner(study, out, lock, spawn, train, resume or resume_command, workers, rerun, say)
            runner.run(cells)
        finally:
            spawn.close()
        write_results(study, out)
    finally:
        lock.release()
    say(f"{study.name}: {len(runner.done)} done, {len(runner.skipped)} already there, {len(runner.failed)} failed")
    for failure in runner.failed:
        say(f"  failed: {failure['name']} (log: {out / 'runs' / failure['name']}.log)")
    return {"done": runner.done, "skipped": runner.skipped, "failed": runner.failed, "out": str(out)}


class _Runner:
    """The scheduling loop and what it has achieved so far."""

    def __init__(
        self,
        study: Study,
        out: Path,
        lock: StudyLock,
        spawn: Spawn,
        train: Command,
        resume: Command,
        workers: int,
        rerun: bool,
        say: Callable[[str], object],
    ) -> None:
        self.study, self.out, self.lock, self.spawn = study, out, lock, spawn
        self.train, self.resume = train, resume
        self.workers, self.rerun, self.say = workers, rerun, say
        self.running: list[_Running] = []
        self.done: list[str] = []
        self.skipped: list[str] = []
        self.failed: list[dict[str, str]] = []
        self.total = 0

    def run(self, cells: list[Cell]) -> None:
        waiting = self._with_sources([cell for cell in cells if self._is_missing(cell)])
        self.total = len({cell.name for cell in (*cells, *waiting)})
        with _stop_signals() as stops:
            try:
                while (waiting or self.running) and not stops:
                    while len(self.running) < self.workers and (cell := self._next(waiting)) is not None:
                        self._begin(cell)
                    time.sleep(_POLL_SECONDS)
                    self._reap(stops)
            finally:
                # Also where `say` or the disk fails: nothing is left running.
                self._stop(stops)
        if stops:
            self.say(
                f"stopped with {len(self.done) + len(self.skipped)} of {self.total} cells there; run it again to go on"
            )
            if stops[0] == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + stops[0])

    def _is_missing(self, cell: Cell) -> bool:
        record, reason = read_record(cell, self.out, may_diverge=self.study.may_diverge)
        if record is not None and not self.rerun:
            self.skipped.append(cell.name)
            return False
        if reason:
            self.say(f"{cell.name} counts as missing: {reason}")
        return True

    def _with_sources(self, missing: list[Cell]) -> list[Cell]:
        """The cells to run, each behind the one that it starts from, which runs again if its run directory is gone."""
        queue: dict[str, Cell] = {}
        names = {cell.name for cell in missing}

        def add(cell: Cell) -> None:
            source = cell.after
            if source is not None and source.name not in queue:
                if source.name in names:
                    add(source)
                elif not self._has_run(source):
                    self.say(f"{source.name} runs, too: {cell.name} starts from it and its run directory is not there")
                    if source.name in self.skipped:
                        self.skipped.remove(source.name)
                    if read_record(source, self.out)[0] is not None:
                        self._sidecar(source).unlink(missing_ok=True)  # what is left of it is not to be taken for it
                    add(source)
            queue[cell.name] = cell

        for cell in missing:
            if cell.name not in queue:
                add(cell)
        return list(queue.values())

    def _has_run(self, cell: Cell) -> bool:
        made = MEASURED if cell.command == "measure" else "model.safetensors"
        return self._belongs(cell) and (self.out / "runs" / cell.name / made).is_file()

    def _next(self, waiting: list[Cell]) -> Cell | None:
        """Takes the first cell that need not wait for another; one whose source failed fails with it."""
        busy = {cell.name for cell in waiting} | {entry.cell.name for entry in self.running}
        failed = {failure["name"] for failure in self.failed}
        for place, cell in enumerate(waiting):
            if cell.after is None or cell.after.name not in busy:
                del waiting[place]
                if cell.after is None or cell.after.name not in failed:
                    return cell
                self._fail(cell, f"{cell.after.name}, which it starts from, failed")
                return self._next(waiting)
        return None

    def _begin(self, cell: Cell, *, afresh: bool = False) -> None:
        """Start a cell's process, or take the result of a run that ended after its runner was killed."""
        run = self.out / "runs" / cell.name
        try:
            ours = not afresh and not self.rerun and self._belongs(cell)
            if ours and self._store(cell, run):
                return
            resumed = ours and cell.command != "measure" and bool(CheckpointStore(run / "checkpoints").steps())
            if not resumed:
                # The hash goes first and comes last: it must never vouch for another cell's run directory.
                self._sidecar(cell).unlink(missing_ok=True)
                shutil.rmtree(run, ignore_errors=True)
                write_json(self._sidecar(cell), {"options_hash": cell.options_hash})
            words = (self.resume if resumed else self.train)(cell, run)
            log = open(self.out / "runs" / f"{cell.name}.log", "ab" if resumed else "wb")  # noqa: SIM115
            try:
                process = self.spawn(words, log)
            except BaseException:
                log.close()
                raise
        except OSError as error:
            self._fail(cell, f"could not be started: {error}")
            return
        self.running.append(_Running(cell, process, log, resumed))
        self._note_processes()
        self.say(f"{cell.name}: {'resumed' if resumed else 'started'}")

    def _reap(self, stops: list[int]) -> None:
        """Deal with the processes that have ended."""
        for entry in [entry for entry in self.running if entry.process.poll() is not None]:
            self.running.remove(entry)
            entry.log.close()
            self._note_processes()
            cell, status = entry.cell, entry.process.poll() or 0  # None is not: it has ended
            run = self.out / "runs" / cell.name
            if status == 0:
                try:
                    self._save(cell, run)
                except (OSError, ValueError) as error:
                    if stops:  # a command that was stopped in order may well end with 0
                        self.say(f"{cell.name}: stopped")
                    else:
                        self._fail(cell, f"ended well, but its result cannot be used: {error}")
            elif stops:
                self.say(f"{cell.name}: stopped")
            elif entry.resumed and status == _REFUSED:
                self.say(f"{cell.name}: cannot be resumed ({self._log_end(cell, 1)}); starts again")
                self._begin(cell, afresh=True)
            elif not (status == _FAILED and self._save_diverged(cell, run)):
                how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                self._fail(cell, f"{how}; the last lines of its log:\n{self._log_end(cell, _LOG_LINES)}")

    def _stop(self, stops: list[int]) -> None:
        """SIGTERM to what still runs, SIGKILL to what does not heed it or after a second signal, and wait."""
        for entry in self.running:
            entry.process.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        while self.running:
            if time.monotonic() > deadline or len(stops) > 1:
                for entry in self.running:
                    entry.process.kill()
            time.sleep(_POLL_SECONDS)
            self._reap(stops or [signal.SIGTERM])

    def _store(self, cell: Cell, run: Path) -> bool:
        try:
            self._save(cell, run)
        except ValueError:  # not finished
            return self._save_diverged(cell, run)
        return True

    def _save(self, cell: Cell, run: Path) -> None:
        record, key = read_run(cell, run), self.study.headline.get(cell.group, "accuracy")
        if cell.command == "measure":
            self._keep(cell, record, _shown(record["measures"]))
            return
        value = measured(record, key)[-1]
        shown = f"{100 * value:.2f} %" if key == "accuracy" else f"{value:.4g}"
        self._keep(cell, record, f"test {key.replace('_', ' ')} {shown}")

    def _save_diverged(self, cell: Cell, run: Path) -> bool:
        record = read_diverged(cell, run) if self.study.may_diverge else None
        if record is not None:
            lost = record["diverged"]
            self._keep(cell, record, f"diverged: {lost}" if isinstance(lost, str) else f"diverged at step {lost}")
        return record is not None

    def _keep(self, cell: Cell, record: dict[str, Any], result: str) -> None:
        write_json(self.out / "cells" / f"{cell.name}.json", record)
        self.done.append(cell.name)
        number = len(self.done) + len(self.skipped) + len(self.failed)
        self.say(f"[{number}/{self.total}] {cell.name}: {result} in {record['seconds']:.0f} s")

    def _fail(self, cell: Cell, reason: str) -> None:
        self.failed.append({"name": cell.name, "reason": reason})
        self.say(f"{cell.name} failed: {reason}")

    def _sidecar(self, cell: Cell) -> Path:
        return self.out / "runs" / f"{cell.name}.cell.json"

    def _belongs(self, cell: Cell) -> bool:
        """Whether the run directory was begun with the cell's present options."""
        try:
            return json.loads(self._sidecar(cell).read_bytes()) == {"options_hash": cell.options_hash}
        except (FileNotFoundError, ValueError):
            return False

    def _log_end(self, cell: Cell, lines: int) -> str:
        text = (self.out / "runs" / f"{cell.name}.log").read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.rstrip().splitlines()[-lines:]) or "(the log is empty)"

    def _note_processes(self) -> None:
        self.lock.write({entry.cell.name: entry.process.pid for entry in self.running})


def _shown(measures: dict[str, Any]) -> str:
    """The first few numbers of a measurement.

    >>> _shown({"error": 1.25e-11, "ranks": [1.0, 2.0]})
    'error 1.25e-11, ranks of 2 values'
    """
    words = [f"{key} of {len(v)} values" if isinstance(v, list) else f"{key} {v:.4g}" for key, v in measures.items()]
    return ", ".join(words[:4]) + (" …" if len(words) > 4 else "")


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP in a list instead of dying of them; in the main thread only."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # Python delivers signals to the main thread, which has its own handlers
        return
    # What is ignored stays ignored: a study under nohup outlives its terminal.
    wanted = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda received, _frame: caught.append(received)) for number in wanted}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_results(study: Study, out: str | os.PathLike[str]) -> None:
    """Write `results.json` and `report.html` from the records that are in a study's folder, and run nothing.

    Raises:
        ValueError: there is no such folder, or what `collect` refuses.
    """
    out = Path(out)
    if not (out / "cells").is_dir():
        raise ValueError(f"{out} has no cells: no study was run there")
    results = collect(study, out)
    write_json(out / "results.json", results)
    filled = [group for group in results["groups"] if group["rows"]]
    if filled:
        from paradepth.report import write_study_report  # matplotlib: not needed to run cells

        write_study_report({**results, "groups": filled}, out / "report.html")
