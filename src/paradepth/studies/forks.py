"""Processes that need not import: each is forked from a server that has imported torch and this package already.

    runner ──words, log, lock──► server ──fork──► cell (own session; its output goes to the log)
           ◄─────pid, status────        ◄─wait──

The server computes nothing and has one thread, so that what is forked from it is as good as a fresh process. This
file runs as the server, too: it needs nothing but the standard library.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

PRELOADED = (
    "paradepth.cli.train",
    "paradepth.continual.run",
    "paradepth.data.sources",
    "paradepth.studies.measurements",
    "paradepth.studies.record",
    "paradepth.train.finetune",
    "paradepth.train.use",
    "pyarrow.parquet",
    "sklearn.datasets",
    "torch._dynamo",
    "torchmetrics",
)
_THREADLESS = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}  # pyarrow's allocator, which sklearn loads
_MESSAGE = 1 << 20  # bytes; a request is a command line and an environment


class ForkedProcess:
    """A process of a `ForkServer`, with what the runner uses of `subprocess.Popen`.

    Attributes:
        pid: its process id.
        returncode: its exit status, minus the signal that ended it, or None as far as `poll` has heard.
    """

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        if self.returncode is None:
            self.returncode = self.server.status(self.pid)
        return self.returncode

    def terminate(self) -> None:
        """SIGTERM."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


class ForkServer:
    """A process that forks others; it ends with the one that made it.

    Args:
        environment: of the server; what libraries read when they are imported has to be in it.
        preloaded: modules that it imports; by default what training and measuring need.

    Raises:
        OSError: the system cannot fork, or the server did not start.
    """

    def __init__(self, *, environment: Mapping[str, str], preloaded: Sequence[str] = PRELOADED) -> None:
        if not sys.platform.startswith("linux"):  # elsewhere system libraries do not survive a fork
            raise OSError(f"processes are not forked on {sys.platform}")
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno()), *preloaded],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**environment, **_THREADLESS},
                start_new_session=True,
                pass_fds=(theirs.fileno(),),
            )
        except BaseException:
            self._channel.close()
            raise
        finally:
            theirs.close()
        self._statuses: dict[int, int] = {}
        self._running: set[int] = set()
        self.alive = True

    def start(
        self, words: Sequence[str], *, log: int, environment: Mapping[str, str], keep: Sequence[int] = ()
    ) -> ForkedProcess:
        """Start a Python module as a program, in a session of its own.

        Args:
            words: `[python, "-m", MODULE, …]`.
            log: descriptor that standard output and standard error go to.
            environment: all its environment variables.
            keep: further descriptors that it has open, under whatever number.

        Raises:
            ValueError: `words` are something else.
            OSError: the server is gone, or could not fork.
        """
        if not is_module_command(words):
            raise ValueError(f"only `python -m MODULE …` can be forked, not {' '.join(words)}")
        request = {
            "module": words[2],
            "arguments": list(words[3:]),
            "environment": dict(environment),
            "directory": os.getcwd(),
        }
        try:
            socket.send_fds(self._channel, [json.dumps(request).encode()], [log, *keep])
            while (answer := self._receive()) is not None and "started" not in answer:
                self._note(answer)
        except OSError:
            self._lost()
            raise
        if answer is None:
            raise OSError("the server of forked processes is gone")
        if not answer["started"]:
            raise OSError(f"could not fork: {answer['error']}")
        self._running.add(answer["started"])
        return ForkedProcess(self, answer["started"])

    def status(self, pid: int) -> int | None:
        """Exit status of a process that it started, or None while that runs."""
        while self.alive and pid not in self._statuses and select.select([self._channel], [], [], 0)[0]:
            if (answer := self._receive()) is not None:
                self._note(answer)
        return self._statuses.get(pid)

    def close(self) -> None:
        """End the server. What it started goes on."""
        self._channel.close()
        self.alive = False
        self._process.kill()
        self._process.wait()

    def _note(self, answer: Mapping[str, int]) -> None:
        self._statuses[answer["ended"]] = answer["status"]
        self._running.discard(answer["ended"])

    def _receive(self) -> dict[str, Any] | None:
        try:
            message = self._channel.recv(_MESSAGE)
        except ConnectionError:
            message = b""
        if not message:
            self._lost()
            return None
        return json.loads(message)

    def _lost(self) -> None:
        """Nobody can tell any more how its processes end: none of them is left running."""
        self.alive = False
        for pid in self._running:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self._statuses[pid] = -signal.SIGKILL
        self._running.clear()


def is_module_command(words: Sequence[str]) -> bool:
    """Whether a command line runs a Python module with this interpreter.

    >>> is_module_command([sys.executable, "-m", "paradepth", "train"]), is_module_command(["ls", "-m", "x"])
    (True, False)
    """
    return len(words) > 2 and list(words[:2]) == [sys.executable, "-m"]


def _serve(channel: socket.socket) -> dict[str, Any] | None:
    """Fork what is asked for. Returns the request in the process that is to do it, None once nobody asks any more."""
    heard, woken = os.pipe()
    for end in (heard, woken):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    signal.set_wakeup_fd(woken)
    while True:
        ready, _, _ = select.select([channel, heard], [], [])
        if heard in ready:
            os.read(heard, 1 << 16)
            _reap(channel)
        if channel in ready:
            message, descriptors, _, _ = socket.recv_fds(channel, _MESSAGE, 16)
            if not message:
                return None
            try:
                if len(os.listdir("/proc/self/task")) > 1:
                    raise OSError("the server has threads, which do not survive a fork")
                pid = os.fork()
            except OSError as error:
                channel.send(json.dumps({"started": 0, "error": str(error)}).encode())
                pid = -1
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for descriptor in (heard, woken):
                    os.close(descriptor)
                channel.close()
                os.setsid()
                for stream in (1, 2):
                    os.dup2(descriptors[0], stream)
                os.close(descriptors[0])
                return json.loads(message)
            for descriptor in descriptors:
                os.close(descriptor)
            if pid > 0:
                channel.send(json.dumps({"started": pid}).encode())


def _reap(channel: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        channel.send(json.dumps({"ended": pid, "status": os.waitstatus_to_exitcode(status)}).encode())


def _main(descriptor: int, modules: Sequence[str]) -> None:
    sys.path.insert(0, os.getcwd())  # as `python -m` has it
    for module in modules:
        import_module(module)
    gc.collect()
    gc.freeze()  # what is not looked at stays shared between the processes
    try:
        request = _serve(socket.socket(fileno=descriptor))
    except ConnectionError:  # nobody is left to be told how a process ended
        return
    if request is None:
        return
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[0] = request["directory"]
    sys.argv = [request["module"], *request["arguments"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
