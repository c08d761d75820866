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
"""Every strategy that needs one process, each in a process of its own.

Strategies of one kind would share collective keys in one process, and each wants its own set of logical
devices.
"""

import processes
import pytest
import single_process_program as program

SECONDS = 400

pytestmark = pytest.mark.slow


CASES = [(keras, kind) for keras, kinds in program.KINDS_OF.items() for kind in kinds]


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """All at once: starting TensorFlow is most of the time."""
    with processes.Children(tmp_path_factory.mktemp("strategies")) as children:
        by_case = {
            (keras, kind): children.start(
                f"{keras}-{kind}",
                "single_process_program.py",
                kind,
                variables=processes.keras_variables(keras),
            )
            for keras, kind in CASES
        }
        yield by_case, children


@pytest.mark.parametrize(
    ("keras", "kind", "check"),
    [(*case, check.__name__) for case in CASES for check in program.checks_of(*case[::-1])],
)
def test_strategy(children, keras, kind, check):
    by_case, group = children
    child = by_case[keras, kind]
    group.wait_for_end([child], SECONDS)
    passed = f"[passed] {check}\n" in child.output
    assert passed, child.part(f"[running] {check}\n", "[running]")
