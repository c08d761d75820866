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
"""The example with several workers: one command, and each worker tells what its averages are worth."""

import re

import processes
import pytest

SECONDS = 200


@pytest.mark.slow
def test_each_worker_prints_the_evaluation_of_its_averages(tmp_path):
    with processes.Children(tmp_path) as children:
        example = children.start("example", processes.ROOT / "examples" / "multi_worker.py", "--epochs=2")
        children.wait_for([example], SECONDS)
        pattern = r"worker (\d), (.*): test loss (\S+), accuracy (\S+)"
        results = {(worker, kind): rest for worker, kind, *rest in re.findall(pattern, example.output)}
    assert sorted(results) == [(w, kind) for w in "01" for kind in ("averages", "last weights")]
    for kind in ("averages", "last weights"):
        assert results["0", kind] == results["1", kind]
    assert results["0", "averages"] != results["0", "last weights"]
    assert float(results["0", "averages"][1]) > 0.5
