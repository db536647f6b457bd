"""The processes of a study's cells: forked where that is possible, which saves each its imports, or new ones."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from typing import IO

from paradepth.studies.forks import ForkedProcess, ForkServer, is_module_command

Process = subprocess.Popen[bytes] | ForkedProcess


class Spawn:
    """Starts processes on one thread, each in a session of its own.

    Args:
        keep: a descriptor that each of them holds open: the study's lock.
        server: what forks them; None: one of its own, made for the first process that can be forked.
        say: told when processes cannot be forked.
    """

    def __init__(self, keep: int, server: ForkServer | None, say: Callable[[str], object]) -> None:
        self.keep, self.server, self.say = keep, server, say
        self.owned, self.forks = server is None, True

    def __call__(self, words: list[str], log: IO[bytes]) -> Process:
        """Start a command, whose standard output and standard error go to `log`.

        Raises:
            OSError: it could not be started.
        """
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        if self.forks and is_module_command(words):
            try:
                self.server = self.server or ForkServer(environment=environment)
                return self.server.start(words, log=log.fileno(), environment=environment, keep=(self.keep,))
            except OSError as error:
                self.say(f"every cell imports for itself: {error}")
                self.forks = False
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            # Its own session: Ctrl-C in a terminal reaches the runner alone, which then stops it in order.
            start_new_session=True,
            pass_fds=(self.keep,),
        )

    def close(self) -> None:
        """End the server, if it is one of its own."""
        if self.owned and self.server is not None:
            self.server.close()
