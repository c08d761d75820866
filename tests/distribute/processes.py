# Copyright 2026 The tf_averaging Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Real processes for tests: started here, limited in time, gone when the block ends.

Run as a program, this file is how a child starts: it runs the program named on the command line, and
ends it when the parent goes away, however the parent ends.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from typing import Callable, Dict, List, Mapping, Optional, Sequence

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
SHOWN_BYTES = 6000


class Child:
    """A process with a name, whose output goes to a file."""

    def __init__(self, name: str, program: str, arguments: Sequence[str], log: pathlib.Path, variables):
        self.name = name
        self._log = log
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        environment.update(TF_CPP_MIN_LOG_LEVEL="2", CUDA_VISIBLE_DEVICES="-1", GRPC_VERBOSITY="NONE")
        environment.update(TF_GRPC_REUSE_PORT="1")  # Its port is held for it, see `cluster_variables`.
        environment.update(keras_variables("tf_keras"))
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "processes.py"), str(HERE / program), *map(str, arguments)],
                stdin=subprocess.PIPE,  # Held open: its end tells the child that this process is gone.
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**environment, **variables},
                start_new_session=True,
            )
        self.pid = self._process.pid
        self.start_time = time.monotonic()

    @property
    def exit_code(self) -> Optional[int]:
        """None while it runs; negative if a signal ended it."""
        if self._process.returncode is not None:
            return self._process.returncode
        # Until `kill` it stays known to the system, so that the number of its group is no one else's.
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def part(self, begin: str, end: str) -> str:
        """The output from one line to another, or all that is known where the first is missing."""
        _, found, rest = self.output.partition(begin)
        return found + rest.split(end)[0] if found else self.story()

    def kill(self) -> None:
        """Ends it and all that it started, at once."""
        if self._process.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()

    def story(self) -> str:
        """What a reader of a failed test wants to know."""
        state = "still running" if self.exit_code is None else f"exit code {self.exit_code}"
        return f"----- {self.name} (process {self.pid}): {state}\n{self.output[-SHOWN_BYTES:]}"


class Children(contextlib.AbstractContextManager):
    """The processes of one test. None is left when the block ends, whatever ends it.

    Time limits count from the start of what is waited for: tests that share a process which hangs do not
    wait for it again and again.

    Args:
      directory: where their output goes.
    """

    def __init__(self, directory: pathlib.Path):
        self._directory = directory
        self._children: List[Child] = []
        self._ports = contextlib.ExitStack()

    def cluster_variables(self, **sizes: int) -> Dict[str, Dict[str, str]]:
        """`TF_CONFIG` for each task of a new cluster on localhost.

        The ports are held until the block ends, so that nobody else gets them before the tasks listen.

        Args:
          **sizes: number of tasks of each job, for example `worker=2`.

        Returns:
          For each name such as `"worker0"`, environment variables.
        """
        cluster = {
            job: [f"localhost:{held_port(self._ports)}" for _ in range(size)]
            for job, size in sizes.items()
        }
        return {
            f"{job}{index}": {
                "TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": job, "index": index}})
            }
            for job, addresses in cluster.items()
            for index in range(len(addresses))
        }

    def start(self, name: str, program: str, *arguments, variables: Optional[Mapping[str, str]] = None):
        """Starts a program of this directory; `variables` are added to its environment."""
        log = self._directory / f"{name}.log"
        child = Child(name, program, arguments, log, dict(variables or {}))
        self._children.append(child)
        return child

    def wait_for(self, children: Sequence[Child], seconds: float) -> None:
        """Waits until all of these have ended well.

        Raises:
          AssertionError: as soon as one ends otherwise, or when the time is over; with all output.
        """
        self._wait_until(
            lambda: all(child.exit_code == 0 for child in children), children, seconds, may_fail=False
        )

    def wait_for_line(self, child: Child, line: str, seconds: float) -> None:
        """Waits until the child has printed something; raises as `wait_for` does."""
        self._wait_until(lambda: line in child.output, [child], seconds, may_fail=False)

    def wait_for_end(self, children: Sequence[Child], seconds: float) -> None:
        """Waits until all of these have ended, well or not; raises when the time is over."""
        self._wait_until(
            lambda: all(child.exit_code is not None for child in children), children, seconds
        )

    def _wait_until(self, done, children: Sequence[Child], seconds: float, may_fail=True) -> None:
        def done_and_nothing_failed():
            failed = [child.name for child in children if child.exit_code not in (None, 0)]
            if failed and not may_fail:
                raise AssertionError(f"{', '.join(failed)} failed.\n{self.story()}")
            return done()

        start_time = max(child.start_time for child in children)
        wait_until(done_and_nothing_failed, seconds, self.story, start_time)

    def story(self) -> str:
        return "\n".join(child.story() for child in self._children)

    def __exit__(self, *unused):
        for child in self._children:
            child.kill()
        self._ports.close()


def keras_variables(keras: str) -> Dict[str, str]:
    """Environment variables for a program that checks this Keras, and what `tf.keras` is in it.

    tf_keras is so for a program that is not told. Keras 3 is not imported then, which takes a second.
    """
    return {"CHECKED_KERAS": keras, "TF_USE_LEGACY_KERAS": str(int(keras == "tf_keras"))}


def wait_until(
    done: Callable[[], bool],
    seconds: float,
    story: Callable[[], str],
    start_time: Optional[float] = None,
) -> None:
    """Waits until `done()`; raises an AssertionError with the story when the time is over.

    The time is that since `start_time`, of `time.monotonic()`; since now if it is None.
    """
    deadline = (time.monotonic() if start_time is None else start_time) + seconds
    while not done():
        if time.monotonic() > deadline:
            raise AssertionError(f"Not done within {seconds} seconds.\n{story()}")
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    state = read_or_nothing(pathlib.Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return bool(state) and state[0] not in "ZX"


def read_or_nothing(path: pathlib.Path) -> str:
    """What a file of a process says; nothing if the process has ended meanwhile."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def wait_until_gone(pids: Sequence[int], seconds: float) -> None:
    """Waits until none of these processes runs."""
    wait_until(lambda: not any(map(is_alive, pids)), seconds, lambda: f"Still there: {pids}")


def held_port(holder: contextlib.ExitStack) -> int:
    """A port of localhost that only who asks to share it can listen on, until `holder` is closed."""
    held = holder.enter_context(socket.socket())
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(("localhost", 0))
    return held.getsockname()[1]


def _end_with_parent() -> None:
    """Has this process and all that it starts ended when the parent's end of the pipe is closed.

    The kernel does it, by a signal. A thread could not: TensorFlow lets none run while it waits for the
    other tasks of a cluster.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(sys.stdin, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(sys.stdin, fcntl.F_SETFL, os.O_ASYNC)
    if select.select([sys.stdin], [], [], 0)[0]:
        sys.exit("The parent is gone already.")


if __name__ == "__main__":
    _end_with_parent()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
