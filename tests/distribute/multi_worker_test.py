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
"""MultiWorkerMirroredStrategy: two workers, and checkpoints that move between clusters of one and two."""

import functools
import re
import signal

import checks
import multi_worker_program as program
import processes
import pytest

SECONDS = 400

pytestmark = pytest.mark.slow


def start(children, workers, name, *commands, keras="tf_keras"):
    of_keras = processes.keras_variables(keras)
    return [
        children.start(
            f"{name}-{task}", "multi_worker_program.py", *commands, variables={**variables, **of_keras}
        )
        for task, variables in children.cluster_variables(worker=workers).items()
    ]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("multi_worker")


@pytest.fixture(scope="module")
def two_workers(directory):
    """Of a Keras: they run all checks, restore what one worker saved, save; then one swaps alone."""

    @functools.cache
    def run(keras):
        path = f"{directory}/{keras}"
        with processes.Children(directory) as children:
            children.wait_for(
                start(children, 1, f"{keras}-before", f"save={path}-1", keras=keras), SECONDS
            )
            commands = ["all_checks", f"restore={path}-1", f"save={path}-2"]
            commands += [f"save_snapshots={path}-snapshots", "swap_alone"]
            workers = start(children, 2, keras, *commands, keras=keras)
            children.wait_for_end(workers, SECONDS)
            return workers

    return run


each_keras = pytest.mark.parametrize("keras", program.CHECKS)


@pytest.mark.parametrize(
    ("keras", "check"),
    [(keras, check.__name__) for keras, chosen in program.CHECKS.items() for check in chosen],
)
def test_on_two_workers(two_workers, keras, check):
    for worker in two_workers(keras):
        part = worker.part(f"[running] {check}\n", "[running]")
        assert f"[passed] {check}\n" in part, part


@each_keras
def test_workers_agree_bit_for_bit(two_workers, keras):
    digests = [re.findall(r"\[digest\] .*", worker.output) for worker in two_workers(keras)]
    assert digests[0] == digests[1]
    assert len(digests[0]) > len(program.CHECKS[keras]) / 2


@each_keras
def test_restored_by_two_after_one(two_workers, keras):
    for worker in two_workers(keras):
        assert "[passed] restore\n" in worker.output, worker.story()


@each_keras
def test_restored_by_one_after_two(two_workers, directory, keras):
    chief = two_workers(keras)[0]
    assert "[passed] save\n" in chief.output, chief.story()
    assert not list(directory.glob("*-temporary*"))
    with processes.Children(directory) as children:
        path = f"{directory}/{keras}-2"
        children.wait_for(start(children, 1, f"{keras}-after", f"restore={path}", keras=keras), SECONDS)


@each_keras
def test_one_of_two_workers_writes_snapshots(two_workers, keras):
    for worker in two_workers(keras):
        assert "[passed] save_snapshots\n" in worker.output, worker.story()


@each_keras
def test_worker_that_swaps_alone_fails_on_both(two_workers, keras):
    """The chief at once, the other as soon as the chief's process is gone."""
    for worker, error in zip(two_workers(keras), (checks.GUARD, "UnavailableError")):
        assert worker.exit_code == 1, worker.story()
        _, training, failure = worker.output.partition("[training]")
        assert training, worker.story()
        assert error in failure, worker.story()


def test_worker_that_swaps_alone_and_lives_on_fails_on_both(tmp_path):
    """The other when the time limit of the strategy's communication is over."""
    # TensorFlow ends a collective operation at its time limit while the work on it goes on, and what that
    # work needs is freed. Now and then (1 in some 15 runs were seen) the process crashes over it.
    for attempt in range(3):
        with processes.Children(tmp_path) as children:
            chief, other = start(children, 2, f"alone{attempt}", "swap_alone=live_on")
            children.wait_for_end([other], SECONDS)
            assert chief.exit_code is None, chief.story()
            assert checks.GUARD in chief.part("[training]", "[lives on]"), chief.story()
        if other.exit_code != -signal.SIGSEGV:
            break
    assert other.exit_code == 1, other.story()
    assert "DeadlineExceededError" in other.output, other.story()
