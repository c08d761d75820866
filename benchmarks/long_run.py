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
"""Many steps: whether time and memory stay what they were at the beginning."""

import time
from typing import Dict

import numpy as np
import tensorflow as tf

import tf_averaging as tfav
from benchmarks import contenders
from benchmarks import workloads


def measure(steps: int) -> Dict[str, float]:
    """Times `steps` steps, the last tenth with `iterations` beyond 10^9."""
    workload = workloads.Workload(50 * [(64, 64), (64,)])
    optimizer = tfav.ExponentialMovingAverage(contenders.sgd())
    step = contenders.Ours(optimizer, workload.variables(), workload.gradients()).step
    for _ in range(20):
        step()

    def memory() -> int:
        return tf.config.experimental.get_memory_info("CPU:0")["current"]

    before = memory()
    seconds = []
    tenth = steps // 10
    for number in range(steps):
        if number == steps - tenth:
            optimizer.iterations.assign(10**9)
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {
        "steps": steps,
        "first_tenth_ms": 1e3 * float(np.median(seconds[:tenth])),
        "last_tenth_ms": 1e3 * float(np.median(seconds[-tenth:])),
        "memory_growth_bytes": memory() - before,
    }
