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
"""A run that is killed at any moment resumes to the same end, bit for bit."""

import itertools
import os
import signal
import time

import numpy as np
import pytest

from tests import kill_loops

SEED = int(os.environ.get("KILL_TEST_SEED", "20261120"))
KILLS = 4  # For each loop and scheme.
TIME_LIMIT = 120  # Seconds for anything that a process does.
LONGEST_DELAY = 0.2  # Seconds; a step takes a few milliseconds, a save some tens, tracing half a second.


def run(forkserver, loop, scheme, directory, result, kill_at=None, delay=0.0):
    """Runs a loop in a new process, until its end, or `delay` seconds after its event number `kill_at`.

    Returns:
      The events, and whether the process was killed.
    """
    receiver, sender = forkserver.Pipe(duplex=False)
    process = forkserver.Process(target=loop, args=(scheme, str(directory), str(result), sender))
    process.start()
    sender.close()
    events = []
    try:
        while kill_at is None or len(events) <= kill_at:
            assert receiver.poll(TIME_LIMIT), f"Nothing for {TIME_LIMIT} s after {events}"
            events.append(receiver.recv())
        time.sleep(delay)
        process.kill()  # Which does nothing if the run has come to its end meanwhile.
        while True:
            events.append(receiver.recv())
    except EOFError:  # It has come to its end.
        pass
    finally:
        process.join(TIME_LIMIT)
        process.kill()
        process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return events, process.exitcode != 0


def arrays(path):
    with np.load(path) as file:
        return [file[name].tobytes() for name in file.files]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["swa", "ema"])
@pytest.mark.parametrize("loop", kill_loops.LOOPS, ids=lambda loop: loop.__name__)
def test_killed_run_resumes_to_the_same_end(forkserver, tmp_path, loop, scheme):
    (tmp_path / "undisturbed").mkdir()
    events, _ = run(forkserver, loop, scheme, tmp_path / "undisturbed", tmp_path / "expected.npz")
    expected = arrays(tmp_path / "expected.npz")
    rng = np.random.default_rng([SEED, kill_loops.LOOPS.index(loop), scheme == "swa"])
    killed = []
    for number in itertools.count():
        if len(killed) >= KILLS:
            break
        directory, result = tmp_path / f"run{number}", tmp_path / f"result{number}.npz"
        directory.mkdir()
        while not result.exists():
            kill = {}
            if len(killed) < KILLS:  # Most at once or soon, some much later, in the midst of something.
                delay = LONGEST_DELAY * rng.random() ** 3
                kill = {"kill_at": int(rng.integers(len(events))), "delay": delay}
            at, was_killed = run(forkserver, loop, scheme, directory, result, **kill)
            if was_killed:
                killed.append(f"{at[-1]} + {1000 * kill['delay']:.0f} ms")
        assert arrays(result) == expected
    print(f"\n{loop.__name__}, {scheme}: seed {SEED}, {len(killed)} kills, each at: {killed}")
