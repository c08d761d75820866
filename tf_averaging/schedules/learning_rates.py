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
"""Learning rates that go with the snapshots of SWA, by the number of steps since training began."""

from __future__ import annotations

import math
from typing import Any, Callable, Dict, Union

import tensorflow as tf

from tf_averaging import kerases
from tf_averaging.core.status import checked_count
from tf_averaging.schedules.base import SCHEDULES
from tf_averaging.schedules.base import Schedule
from tf_averaging.schedules.base import checked
from tf_averaging.schedules.base import exact


class _After(Schedule):
    """Any learning rate up to a step, another one from there; a base of those below."""

    def __init__(self, learning_rate: Union[float, Callable], start_step: int):
        if not isinstance(learning_rate, SCHEDULES):
            learning_rate = checked("learning_rate", learning_rate, 0)
        self.learning_rate: Any = learning_rate
        self.start_step = checked_count("start_step", start_step, minimum=0)

    def _before(self, step) -> tf.Tensor:
        rate = self.learning_rate
        if not isinstance(rate, SCHEDULES):
            return exact(rate)
        step = tf.cast(step, tf.int64)
        if step.shape.rank == 0:
            return exact(rate(step))
        # Keras's own schedules take one step at a time.
        return tf.map_fn(lambda one: exact(rate(one)), step, fn_output_signature=tf.float64)

    def get_config(self) -> Dict[str, Any]:
        """The constructor's arguments, ready for JSON."""
        rate = self.learning_rate
        if isinstance(rate, SCHEDULES):
            rate = kerases.serialize_schedule(rate)
        return {"learning_rate": rate, "start_step": self.start_step}

    @classmethod
    def from_config(cls, config: Dict[str, Any]) -> _After:
        """Creates the schedule that `get_config` described.

        Args:
          config: left as it is.

        Returns:
          The schedule.
        """
        config = dict(config)
        if isinstance(config["learning_rate"], dict):
            config["learning_rate"] = kerases.deserialize_schedule(config["learning_rate"])
        return cls(**config)


@kerases.register("tf_averaging")
class ConstantLearningRate(_After):
    """A learning rate that is brought to a constant when SWA starts, by a cosine or linearly.

    With `a` going from 0 to 1 in the `anneal_steps` steps from `start_step` on, the learning rate is
    `(1 - a) * learning_rate(start_step) + a * swa_learning_rate`; before that, `learning_rate`. This is
    PyTorch's `SWALR`, counted in steps.

    >>> decaying = tf_keras.optimizers.schedules.CosineDecay(0.1, decay_steps=1000)
    >>> schedule = tfav.schedules.ConstantLearningRate(
    ...     decaying, swa_learning_rate=0.05, start_step=750, anneal_steps=50)
    >>> optimizer = tfav.SWA(tf_keras.optimizers.SGD(schedule), start_averaging=750)
    >>> print(schedule(0).numpy(), schedule(800).numpy())
    0.1 0.05

    Args:
      learning_rate: float >= 0 or a schedule, what holds before `start_step`.
      swa_learning_rate: float >= 0, what holds in the end.
      start_step: int >= 0, the step with which annealing begins.
      anneal_steps: int >= 0, how many steps it takes; 0 jumps.
      anneal_strategy: `"cos"` or `"linear"`.

    Raises:
      TypeError: if a number of steps is not an int.
      ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        learning_rate: Union[float, Callable],
        swa_learning_rate: float,
        start_step: int = 0,
        anneal_steps: int = 0,
        anneal_strategy: str = "cos",
    ):
        super().__init__(learning_rate, start_step)
        self.swa_learning_rate = checked("swa_learning_rate", swa_learning_rate, 0)
        self.anneal_steps = checked_count("anneal_steps", anneal_steps, minimum=0)
        if anneal_strategy not in ("cos", "linear"):
            raise ValueError(
                f'Expected `anneal_strategy` to be "cos" or "linear". Received: {anneal_strategy!r}'
            )
        self.anneal_strategy = anneal_strategy

    def __call__(self, step: Any) -> tf.Tensor:
        """The learning rate (float32) for the step after `step` steps."""
        since_start = exact(step) - self.start_step
        # At least 1, so that 0 steps jump: the first step has gone all the way then.
        gone = (since_start + (self.anneal_steps == 0)) / max(self.anneal_steps, 1)
        share = tf.clip_by_value(gone, tf.zeros_like(gone), tf.ones_like(gone))
        if self.anneal_strategy == "cos":
            share = (1 - tf.cos(math.pi * share)) / 2
        start = tf.minimum(exact(step), tf.constant(self.start_step, tf.float64))
        before = self._before(start)
        return tf.cast((1 - share) * before + share * self.swa_learning_rate, tf.float32)

    def get_config(self) -> Dict[str, Any]:
        """The constructor's arguments, ready for JSON."""
        return {
            **super().get_config(),
            "swa_learning_rate": self.swa_learning_rate,
            "anneal_steps": self.anneal_steps,
            "anneal_strategy": self.anneal_strategy,
        }


@kerases.register("tf_averaging")
class CyclicalLearningRate(_After):
    """A learning rate that falls linearly, again and again, for a snapshot at the end of each cycle.

    The schedule of SWA (arXiv:1803.05407). In step `k` of a cycle (0 to `cycle_steps - 1`), with
    `a = (k + 1) / cycle_steps`, it is `(1 - a) * high + a * low`: `low` in a cycle's last step, after
    which the weights are worth averaging. `snapshots` tells the optimizer where that is; a
    `start_averaging` of 0 would average the peaks.

    >>> schedule = tfav.schedules.CyclicalLearningRate(
    ...     0.1, high=0.05, low=0.01, cycle_steps=4, start_step=20)
    >>> print(*(schedule(step).numpy().round(2) for step in range(19, 25)))
    0.1 0.04 0.03 0.02 0.01 0.04
    >>> schedule.snapshots()
    {'start_averaging': 23, 'average_period': 4}
    >>> optimizer = tfav.SWA(tf_keras.optimizers.SGD(schedule), **schedule.snapshots())

    Args:
      learning_rate: float >= 0 or a schedule, what holds before `start_step`.
      high: float >= 0, where each cycle comes from.
      low: float from 0 to `high`, where it ends.
      cycle_steps: int >= 1, the number of steps in a cycle.
      start_step: int >= 0, the step with which the first cycle begins.

    Raises:
      TypeError: if a number of steps is not an int.
      ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        learning_rate: Union[float, Callable],
        high: float,
        low: float,
        cycle_steps: int,
        start_step: int = 0,
    ):
        super().__init__(learning_rate, start_step)
        self.high = checked("high", high, 0)
        self.low = checked("low", low, 0, self.high)
        self.cycle_steps = checked_count("cycle_steps", cycle_steps, minimum=1)

    def __call__(self, step: Any) -> tf.Tensor:
        """The learning rate (float32) for the step after `step` steps."""
        since_start = exact(step) - self.start_step
        share = (since_start % self.cycle_steps + 1) / self.cycle_steps
        rate = (1 - share) * self.high + share * self.low
        return tf.cast(tf.where(since_start < 0, self._before(step), rate), tf.float32)

    def snapshots(self, not_before: int = 0) -> Dict[str, int]:
        """Arguments of `SWA` that put the snapshots on the last steps of the cycles.

        Args:
          not_before: int >= 0, a step that the first snapshot must not precede.

        Returns:
          `start_averaging` and `average_period`.
        """
        first = self.start_step + self.cycle_steps - 1
        missing = max(checked_count("not_before", not_before, minimum=0) - first, 0)
        cycles = -(-missing // self.cycle_steps)
        return {
            "start_averaging": first + cycles * self.cycle_steps,
            "average_period": self.cycle_steps,
        }

    def get_config(self) -> Dict[str, Any]:
        """The constructor's arguments, ready for JSON."""
        return {
            **super().get_config(),
            "high": self.high,
            "low": self.low,
            "cycle_steps": self.cycle_steps,
        }
