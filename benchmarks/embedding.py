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
"""How the time of a step grows with an embedding, and with the rows of it that a step moves."""

from typing import Dict, Tuple

import numpy as np
import tensorflow as tf
import tf_keras

import tf_averaging as tfav
from benchmarks import names
from benchmarks import timing

WHOLE = "ExponentialMovingAverage, whole table"
# Tables of more values than this are trained without the contenders that touch all of them.
MOST_FOR_WHOLE_TABLES = 70_000_000


def steps(rows: int, width: int, moved: int) -> Dict[str, object]:
    """Functions that take a step on a table of their own, in which they move `moved` random rows."""

    def adagrad(**options) -> tf_keras.optimizers.Optimizer:
        return tf_keras.optimizers.Adagrad(0.01, jit_compile=False, **options)

    def step(optimizer):
        table = tf.Variable(tf.ones([rows, width]))
        optimizer.build([table])
        if optimizer.name == WHOLE:
            optimizer.get_slot(table, "average")  # Whoever has it must see all rows, always.
        values = tf.fill([moved, width], 1e-3)

        def take() -> None:
            indices = tf.random.uniform([moved], 0, rows, tf.int64)
            slices = tf.IndexedSlices(values, indices, tf.constant([rows, width], tf.int64))
            optimizer.apply_gradients([(slices, table)])

        return tf.function(take)

    makers = {
        names.BARE: adagrad,
        names.EMA: lambda: tfav.ExponentialMovingAverage(adagrad(), average_decay=0.99),
    }
    if rows * width <= MOST_FOR_WHOLE_TABLES:
        makers[WHOLE] = lambda: tfav.ExponentialMovingAverage(adagrad(), average_decay=0.99, name=WHOLE)
        makers[names.USE_EMA] = lambda: adagrad(use_ema=True)
    return {name: step(make()) for name, make in makers.items()}


def measure(seconds: float, quick: bool) -> Dict[str, Dict[str, float]]:
    """Median milliseconds of a bare step, and of what each contender adds, at each size."""
    sizes: Dict[str, Tuple[int, int, int]] = {
        f"{rows:,} x 64, {moved:,} rows": (rows, 64, moved)
        for rows, moved in ([(1000, 64)] if quick else [(10**4, 512), (400_000, 512), (10**6, 512)])
    }
    if not quick:
        sizes["400,000 x 64, 8,192 rows"] = (400_000, 64, 8192)
        sizes["10,000,000 x 16, 512 rows"] = (10**7, 16, 512)
    result = {}
    for size, numbers in sizes.items():
        times = timing.in_turns(steps(*numbers), seconds / len(sizes), least=12, most=400)
        bare = times.pop(names.BARE)
        result[size] = {name: 1e3 * float(np.median(values - bare)) for name, values in times.items()}
        result[size]["bare step"] = 1e3 * float(np.median(bare))
    return result
