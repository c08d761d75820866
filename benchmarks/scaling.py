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
"""How the time of an update grows with the number of parameters and of variables."""

from typing import Dict, List

import numpy as np
import tensorflow as tf
import tf_keras

import tf_averaging as tfav
from benchmarks import contenders
from benchmarks import names
from benchmarks import timing

# In plain operations, an update of more parameters than this needs more memory than many machines have.
MOST_FOR_PLAIN_OPERATIONS = 300_000_000


def updates(shapes: List[tuple]) -> Dict[str, object]:
    """Functions that update averages of the same variables, without a training step."""
    variables = [tf.Variable(tf.ones(shape)) for shape in shapes]
    optimizer = tfav.ExponentialMovingAverage(tf_keras.optimizers.SGD())
    optimizer.shadow_copy(variables)
    for variable in variables:  # Until then a variable and its average share one buffer.
        variable.assign_add(tf.ones_like(variable))
    calls = {names.EMA: tf.function(optimizer.update_average)}
    if sum(np.prod(shape) for shape in shapes) <= MOST_FOR_PLAIN_OPERATIONS:
        averages = [tf.Variable(variable) for variable in variables]

        def plain():
            for average, variable in zip(averages, variables):
                contenders.like_addons(average, variable)

        calls[names.ADDONS] = tf.function(plain)
    return calls


def curve(points: Dict[int, List[tuple]], seconds: float, quick: bool) -> Dict[int, Dict[str, float]]:
    """Median milliseconds of each contender, and of the memory limit, at each point."""
    limit = timing.MemoryLimit(8 if quick else 256)
    result = {}
    for point, shapes in points.items():
        calls = {**updates(shapes), "memory limit": limit}
        times = timing.in_turns(calls, seconds / len(points), least=5, most=200)
        moved = 3 * 4 * sum(int(np.prod(shape)) for shape in shapes)
        times["memory limit"] *= moved / limit.bytes_moved
        result[point] = {name: 1e3 * float(np.median(values)) for name, values in times.items()}
    return result


def measure(seconds: float, quick: bool) -> Dict[str, Dict]:
    """Parameters in square matrices of up to 10^7, and 3 million parameters in many variables."""

    def matrices(parameters: int) -> List[tuple]:
        count = max(1, parameters // 10**7)
        side = int(np.sqrt(parameters / count))
        return count * [(side, side)]

    parameters = [10**4, 10**5] if quick else [10**5, 10**6, 10**7, 10**8, 3 * 10**8, 10**9]
    counts = [1, 10] if quick else [1, 10, 100, 300, 1000, 3000]
    total = 3 * (10**4 if quick else 10**6)
    return {
        "parameters": curve({n: matrices(n) for n in parameters}, seconds, quick),
        "variables": curve({n: n * [(total // n,)] for n in counts}, seconds, quick),
    }
