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
"""The exponential moving average of the weights."""

from __future__ import annotations

import math
from typing import Any, Callable, Dict, Optional, Union

import numpy as np
import tensorflow as tf

from tf_averaging import averaged_optimizer_wrapper
from tf_averaging import faces
from tf_averaging import kerases
from tf_averaging.core.status import checked_count


@faces.register
class ExponentialMovingAverage(averaged_optimizer_wrapper.AveragedOptimizerWrapper):
    """The exponential moving average of the weights (Polyak averaging).

    After step `t` (counted from 0), with `s = t - start_step`:

        average = decay * average + (1 - decay) * weights

    where `decay` is `average_decay`, or with `dynamic_decay`, which lets early weights fade faster, the
    smaller of `average_decay` and `(1 + s) / (10 + s)`. The average starts from the weights before step
    `start_step`.

    >>> weight = tf.Variable([1.0, 2.0])
    >>> optimizer = tfav.ExponentialMovingAverage(
    ...     tf_keras.optimizers.SGD(2.0), average_decay=0.5, dynamic_decay=False)
    >>> for _ in range(2):
    ...     _ = optimizer.apply_gradients([(tf.constant([0.1, 0.1]), weight)])
    >>> print(weight.numpy().round(2), optimizer.get_slot(weight, "average").numpy().round(2))
    [0.6 1.6] [0.75 1.75]

    Several decays give several averages. The first is the one that everything uses where nothing else is
    said; `which` is the place of another one in the list:

    >>> optimizer = tfav.ExponentialMovingAverage(
    ...     tf_keras.optimizers.SGD(2.0), average_decay=[0.5, 0.75], dynamic_decay=False)
    >>> weight = tf.Variable(1.0)
    >>> _ = optimizer.apply_gradients([(tf.constant(2.0), weight)])
    >>> with optimizer.swapped_weights(which=1):
    ...     print(weight.numpy())
    0.0

    Args:
      optimizer: the inner optimizer; see `AveragedOptimizerWrapper`.
      trainable_weights_only: see `AveragedOptimizerWrapper`.
      average_decay: float from 0 to 1; or a `LearningRateSchedule` that gives the decay for `s`, which
        then replaces `dynamic_decay`. Its values must lie between 0 and 1. Or a list of these, for an
        average of each.
      start_step: int >= 0, the first step that is averaged.
      dynamic_decay: whether the decay warms up.
      name: name of the optimizer.
      **options: `average_period` (int >= 1, the number of steps from one update to the next; None for
        updates by hand alone; default 1) and others; see `AveragedOptimizerWrapper`.

    Raises:
      TypeError: if `average_decay` is neither a number nor a schedule nor a list of them; see
        `AveragedOptimizerWrapper`.
      ValueError: if `average_decay` is not from 0 to 1; see `AveragedOptimizerWrapper`.
    """

    one_average_for_each = "average_decay"
    _predecessors = ("MovingAverage", "ExponentialMovingAverage")

    def __init__(
        self,
        optimizer: Any,
        trainable_weights_only: bool = True,
        average_decay: Any = 0.99,
        start_step: int = 0,
        dynamic_decay: bool = True,
        name: str = "ExponentialMovingAverage",
        **options: Any,
    ):
        if "start_averaging" in options:
            raise TypeError(
                "`start_averaging` goes by the name of `start_step` here. Received: "
                f"start_averaging={options['start_averaging']!r}"
            )
        start_step = checked_count("start_step", start_step, minimum=0)
        super().__init__(
            optimizer,
            name,
            start_averaging=start_step,
            trainable_weights_only=trainable_weights_only,
            **options,
        )
        self._average_decay = _checked_decay(average_decay)
        self._is_schedule = not isinstance(self._average_decay, float)
        if not isinstance(dynamic_decay, (bool, np.bool_)):
            raise TypeError(f"Expected `dynamic_decay` to be a bool. Received: {dynamic_decay!r}")
        self._dynamic_decay = bool(dynamic_decay)

    def averaging_weight(self, steps: tf.Tensor, updates: tf.Tensor) -> tf.Tensor:
        """1 - decay; see `AveragedOptimizerWrapper`."""
        del updates
        if self._is_schedule:
            return 1.0 - _decays(self._average_decay, steps)
        decay = tf.constant(self._average_decay, tf.float64)
        if self._dynamic_decay:
            steps = tf.cast(steps, tf.float64)
            decay = tf.minimum(decay, (1.0 + steps) / (10.0 + steps))
        return 1.0 - decay

    @property
    def average_decay(self) -> Any:
        """The decay, or the schedule that gives it; of several averages the list."""
        return list(self._others.values) or self._average_decay

    @property
    def start_step(self) -> Union[int, tf.Tensor]:
        """The first step that is averaged; see `start_averaging`."""
        return self.start_averaging

    @property
    def dynamic_decay(self) -> bool:
        """Whether the decay warms up."""
        return self._dynamic_decay

    def get_config(self) -> Dict[str, Any]:
        """The constructor's arguments, ready for JSON."""
        config = super().get_config()
        start_step = config.pop("start_averaging")  # Goes by the name of `start_step` here.
        decay = self._average_decay
        if self._is_schedule:
            decay = kerases.serialize_schedule(decay)
        return {
            **config,
            "average_decay": decay,
            "start_step": start_step,
            "dynamic_decay": self._dynamic_decay,
        }

    @classmethod
    def from_config(cls, config: Dict[str, Any], custom_objects: Optional[Dict[str, Any]] = None) -> Any:
        """Creates the optimizer that `get_config` described; see `AveragedOptimizerWrapper`."""

        def read(decay: Any) -> Any:
            if not isinstance(decay, dict):
                return decay
            return faces.read_config(kerases.deserialize_schedule, decay, custom_objects)

        decay = config.get("average_decay")
        if isinstance(decay, (dict, list)):
            decays = [read(one) for one in decay] if isinstance(decay, list) else read(decay)
            config = {**config, "average_decay": decays}
        return super().from_config(config, custom_objects)


def _decays(schedule: Callable, steps: tf.Tensor) -> tf.Tensor:
    """The decay for each number of steps, float64. Keras's schedules take scalars only."""
    if steps.shape.rank == 0:
        return tf.cast(schedule(steps), tf.float64)
    # Clocks mostly agree: one call for all of them then.
    return tf.cond(
        tf.reduce_all(tf.equal(steps, steps[0])),
        lambda: tf.fill(tf.shape(steps), tf.cast(schedule(steps[0]), tf.float64)),
        lambda: tf.map_fn(lambda step: tf.cast(schedule(step), tf.float64), steps, tf.float64),
    )


def _checked_decay(decay: Any) -> Any:
    expected = "Expected `average_decay` to be a float from 0 to 1, or a `LearningRateSchedule`."
    received = f"Received: average_decay={decay!r}"
    if isinstance(decay, (bool, np.bool_)) or not isinstance(decay, (int, float, np.number)):
        if kerases.is_schedule(decay):
            return decay
        raise TypeError(f"{expected} {received}")
    if math.isnan(decay) or not 0 <= decay <= 1:
        raise ValueError(f"{expected} {received}")
    return float(decay)
