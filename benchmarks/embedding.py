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

import gc
from typing import Dict, Tuple

import numpy as np
import tensorflow as tf
import tf_keras

import tf_averaging as tfav
from benchmarks import names
from benchmarks import timing


def steps(rows: int, columns: int, moved: int) -> Dict[str, object]:
    """Functions that take a step on a table of their own, in which they move `moved` random rows."""

    def adagrad(**options) -> tf_keras.optimizers.Optimizer:
        return tf_keras.optimizers.Adagrad(0.01, jit_compile=False, **options)

    def ema() -> tf_keras.optimizers.Optimizer:
        return tfav.ExponentialMovingAverage(adagrad(), average_decay=0.99)

    def step(optimizer, whole: bool = False):
        table = tf.Variable(tf.ones([rows, columns]))
        optimizer.build([table])
        if whole:
            optimizer.get_slot(table, "average")  # Whoever has it must see all rows, always.
        values = tf.fill([moved, columns], 1e-3)

        def take() -> None:
            indices = tf.random.uniform([moved], 0, rows, tf.int64)
            slices = tf.IndexedSlices(values, indices, tf.constant([rows, columns], tf.int64))
            optimizer.apply_gradients([(slices, table)])

        return tf.function(take)

    return {
        names.BARE_ADAGRAD: step(adagrad()),
        names.EMA: step(ema()),
        names.WHOLE_TABLE: step(ema(), whole=True),
        names.USE_EMA: step(adagrad(use_ema=True)),
    }


def measure(seconds: float, quick: bool) -> Dict[str, Dict[str, Dict[str, float]]]:
    """Median milliseconds of a bare step, and of what each contender adds, along two curves."""
    curves: Dict[str, Dict[int, Tuple[int, int, int]]] = {
        "rows of a table of 8 columns, 512 of which move": {
            rows: (rows, 8, 512) for rows in ([10**4] if quick else [10**4, 10**5, 10**6, 10**7])
        },
        "rows that move, of 400,000 with 64 columns": {
            moved: (4_000 if quick else 400_000, 64, moved)
            for moved in ([64] if quick else [64, 512, 4096, 32768])
        },
    }
    number = sum(map(len, curves.values()))

    def point(sizes: Tuple[int, int, int]) -> Dict[str, float]:
        times = timing.in_turns(steps(*sizes), seconds / number, least=12, most=400)
        gc.collect()  # The largest tables take gigabytes.
        bare = times.pop(names.BARE_ADAGRAD)
        added = {name: 1e3 * float(np.median(values - bare)) for name, values in times.items()}
        return {names.BARE_ADAGRAD: 1e3 * float(np.median(bare)), **added}

    return {
        what: {size: point(sizes) for size, sizes in points.items()} for what, points in curves.items()
    }
