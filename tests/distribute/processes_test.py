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
"""Nothing outlives a test: not its children, not theirs, however the test ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap

import processes
import pytest


def started(children, name="endless"):
    """A child that never ends, and the id of its own child."""
    child = children.start(name, "endless_program.py")
    children.wait_for_line(child, "[child]", 60)
    return child, int(re.search(r"\[child\] (\d+)", child.output).group(1))


def is_alive(pid):
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("error", [AssertionError, KeyboardInterrupt])
def test_none_is_left_after_a_failure(tmp_path, error):
    pids = []

    def fail():
        with processes.Children(tmp_path) as children:
            child, grandchild = started(children)
            pids.extend([child.pid, grandchild])
            assert all(map(is_alive, pids))
            raise error("in the test")

    with pytest.raises(error, match="in the test"):
        fail()
    wait_until_gone(pids)


def test_none_is_left_when_the_test_itself_is_killed(tmp_path):
    code = f"""
        import pathlib, sys
        sys.path.insert(0, {str(processes.HERE)!r})
        import processes
        with processes.Children(pathlib.Path({str(tmp_path)!r})) as children:
            child = children.start("endless", "endless_program.py")
            children.wait_for_line(child, "[child]", 60)
            print(child.pid, flush=True)
            sys.stdin.read()
    """
    test = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with test:
        pids = [int(test.stdout.readline())]
        pids.append(int(re.search(r"\[child\] (\d+)", (tmp_path / "endless.log").read_text()).group(1)))
        assert all(map(is_alive, pids))
        os.kill(test.pid, signal.SIGKILL)
    wait_until_gone(pids)


def wait_until_gone(pids):
    processes.wait_until(lambda: not any(map(is_alive, pids)), 30, lambda: f"Still there: {pids}")


def test_time_limit_tells_what_was_printed(tmp_path):
    with processes.Children(tmp_path) as children:
        child, grandchild = started(children)
        with pytest.raises(AssertionError, match=f"Not done within 0.1 seconds(.|\n)*{grandchild}"):
            children.wait_for([child], 0.1)


def test_failing_child_ends_the_wait(tmp_path):
    with processes.Children(tmp_path) as children:
        endless, _ = started(children)
        missing = children.start("missing", "no_such_program.py")
        with pytest.raises(AssertionError, match="missing failed(.|\n)*No such file"):
            children.wait_for([endless, missing], 60)


def test_free_ports_are_free_and_different():
    ports = processes.free_ports(5)
    assert len(set(ports)) == 5
    for port in ports:
        with socket.socket() as each:
            each.bind(("localhost", port))
