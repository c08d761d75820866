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
"""What averages are, by their definition, in float64 NumPy.

`weights` are indexed by time: `weights[0]` are from before training, `weights[t + 1]` from after step t.
"""

from typing import Callable, NamedTuple, Sequence

import numpy as np

import tf_averaging as tfav


class Scheme(NamedTuple):
    """A way to average.

    Attributes:
      wrap: (inner optimizer, **options) -> wrapper.
      start: first step on which an update is due.
      period: steps from one update to the next.
      weight: (steps since the first update, updates so far) -> weight of the weights in the new average.
    """

    wrap: Callable
    start: int
    period: int
    weight: Callable[[int, int], float]


def swa(start: int = 0, period: int = 1) -> Scheme:
    def wrap(inner, **options):
        return tfav.SWA(inner, start, period, **options)

    return Scheme(wrap, start, period, lambda s, n: 1 / (n + 1))


def ema(decay: float = 0.99, start: int = 0, dynamic: bool = True, period: int = 1) -> Scheme:
    def wrap(inner, **options):
        return tfav.ExponentialMovingAverage(
            inner,
            average_decay=decay,
            start_step=start,
            dynamic_decay=dynamic,
            average_period=period,
            **options,
        )

    def weight(s, n):
        return 1 - (min(decay, (1 + s) / (10 + s)) if dynamic else decay)

    return Scheme(wrap, start, period, weight)


SWA, EMA = swa(2, 3), ema()
SCHEMES = {"SWA": SWA, "EMA": EMA}


def as_float64(value: np.ndarray) -> np.ndarray:
    return value.astype(np.complex128 if np.iscomplexobj(value) else np.float64)


def due_steps(scheme: Scheme, steps: int, skipped: Sequence[int] = ()) -> list:
    """The steps below `steps` on which there is an update, those that loss scaling skipped left out."""
    return [step for step in range(scheme.start, steps, scheme.period) if step not in skipped]


def expected_average(
    scheme: Scheme, weights: Sequence[np.ndarray], skipped: Sequence[int] = (), created: int = 0
) -> np.ndarray:
    """The average of one variable.

    Args:
      scheme: its `wrap` is not used.
      weights: the variable before the first step and after each step.
      skipped: steps that loss scaling skipped.
      created: the first step that knew the variable.
    """
    due = [step for step in due_steps(scheme, len(weights) - 1, skipped) if step >= created]
    if not due:
        return np.asarray(weights[-1])
    average = as_float64(np.asarray(weights[due[0]]))  # Before the first update.
    for count, step in enumerate(due):
        now = as_float64(np.asarray(weights[step + 1]))
        average = average + scheme.weight(step - due[0], count) * (now - average)
    return average
