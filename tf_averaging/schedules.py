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
"""Decays for `ExponentialMovingAverage`, and learning rates for `SWA`, as schedules of both Kerases.

A decay is called with the number of steps since averaging started, a learning rate with the number of
steps since training started. Both take one number or a vector of them, and answer in its shape. All count
in float64, which is exact to 2^53 steps; float32, in which Keras's own schedules compute, stops telling
steps apart at 2^24. (Legacy optimizers hand learning-rate schedules the step in the dtype of the weights;
decays always get it exactly.)
"""

from __future__ import annotations

import math
from typing import Any, Callable, Dict, Optional, Union

import tensorflow as tf

from tf_averaging import kerases
from tf_averaging.core.status import checked_count

__all__ = [
    "ConstantLearningRate",
    "CyclicalLearningRate",
    "InversePowerDecay",
    "MomentumAnnealingDecay",
    "PowerFunctionDecay",
    "WarmUpDecay",
]


SCHEDULES = kerases.bases("optimizers.schedules.LearningRateSchedule")


class _Schedule(*SCHEDULES):  # type: ignore[misc]
    """A schedule of every Keras at once."""


@kerases.register("tf_averaging")
class WarmUpDecay(_Schedule):
    """`min(decay, (1 + s) / (10 + s))`: the warm-up of TF 1, what `dynamic_decay=True` stands for.

    >>> schedule = tfav.schedules.WarmUpDecay(0.99)
    >>> print(schedule(0).numpy(), schedule(8).numpy(), schedule(10**6).numpy())
    0.1 0.5 0.99

    Args:
      decay: float from 0 to 1, the decay in the long run.

    Raises:
      ValueError: if `decay` is not from 0 to 1.
    """

    def __init__(self, decay: float = 0.99):
        self.decay = _checked("decay", decay, 0, 1)

    def __call__(self, step) -> tf.Tensor:
        """The decay (float64) for an update `step` steps after averaging started."""
        step = _exact(step)
        return tf.minimum(tf.constant(self.decay, tf.float64), (1 + step) / (10 + step))

    def get_config(self) -> Dict[str, Any]:
        """The constructor's arguments, ready for JSON."""
        return {"decay": self.decay}


@kerases.register("tf_averaging")
class MomentumAnnealingDecay(_Schedule):
    """`1 - max(momentum, gamma / (gamma + s))`: MMEngine's annealing of the weight of new values.

    The first weights count in full; the longer training goes on, the closer their share comes to
    `momentum`, as fast as in a plain mean of the weights if `gamma` is 1.

    >>> schedule = tfav.schedules.MomentumAnnealingDecay(momentum=0.01, gamma=100)
    >>> print(schedule(0).numpy(), schedule(100).numpy(), schedule(10**6).numpy())
    0.0 0.5 0.99

    Args:
      momentum: float from 0 to 1, the share of the new weights in the long run: 1 - decay.
      gamma: float > 0, the number of steps after which that share is a half.

    Raises:
      ValueError: if an argument is out of range.
    """

    def __init__(self, momentum: float = 0.0002, gamma: float = 2000):
        self.momentum = _checked("momentum", momentum, 0, 1)
        self.gamma = _checked("gamma", gamma, above=0)

    def __call__(self, step) -> tf.Tensor:
        """The decay (float64) for an update `step` steps after averaging started."""
        share = self.gamma / (self.gamma + _exact(step))
        return 1 - tf.maximum(tf.constant(self.momentum, tf.float64), share)

    def get_config(self) -> Dict[str, Any]:
        """The constructor's arguments, ready for JSON."""
        return {"momentum": self.momentum, "gamma": self.gamma}


@kerases.register("tf_averaging")
class InversePowerDecay(_Schedule):
    """`1 - (1 + s / gamma) ** -power`, kept from `min_decay` to `max_decay`, and 0 at `s = 0`.

    The warm-up of timm, ema-pytorch and diffusers. With `gamma=1` and `power=2/3` it suits trainings of a
    million steps and more (the decay is 0.999 after 31,600 steps), with `power=3/4` shorter ones (0.999
    after 10,000).

    >>> schedule = tfav.schedules.InversePowerDecay(gamma=1, power=1, max_decay=0.99)
    >>> print(schedule(0).numpy(), schedule(1).numpy(), schedule(10**6).numpy())
    0.0 0.5 0.99

    Args:
      gamma: float > 0, the number of steps in which the decay begins to rise.
      power: float > 0, how fast it rises.
      min_decay: float from 0 to 1; the decay is no smaller, except at `s = 0`.
      max_decay: float from `min_decay` to 1; the decay is no larger.

    Raises:
      ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        gamma: float = 1.0,
        power: float = 2 / 3,
        min_decay: float = 0.0,
        max_decay: float = 0.9999,
    ):
        self.gamma = _checked("gamma", gamma, above=0)
        self.power = _checked("power", power, above=0)
        self.min_decay = _checked("min_decay", min_decay, 0, 1)
        self.max_decay = _checked("max_decay", max_decay, self.min_decay, 1)

    def __call__(self, step) -> tf.Tensor:
        """The decay (float64) for an update `step` steps after averaging started."""
        step = _exact(step)
        decay = 1 - (1 + step / self.gamma) ** -self.power
        decay = tf.clip_by_value(
            decay, tf.constant(self.min_decay, tf.float64), tf.constant(self.max_decay, tf.float64)
        )
        return tf.where(step > 0, decay, tf.zeros_like(decay))

    def get_config(self) -> Dict[str, Any]:
        """The constructor's arguments, ready for JSON."""
        return {
            "gamma": self.gamma,
            "power": self.power,
            "min_decay": self.min_decay,
            "max_decay": self.max_decay,
        }


@kerases.register("tf_averaging")
class PowerFunctionDecay(_Schedule):
    """`(1 - 1 / (s + 1)) ** (gamma + 1)`: an average whose width grows with training (arXiv:2312.02696).

    After any number of steps the weights of step `i` count in proportion to about `i ** gamma`, so the
    profile keeps its shape relative to the length of training, and the beginning is always forgotten.

    >>> schedule = tfav.schedules.PowerFunctionDecay(gamma=1)
    >>> print(schedule(0).numpy(), schedule(1).numpy(), schedule(9).numpy().round(4))
    0.0 0.25 0.81

    Args:
      gamma: float >= 0; 0 is the plain mean. The standard deviation of the profile, relative to the
        length of training, is `sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))`: 10 % for 6.94, 5 %
        for 16.97.

    Raises:
      ValueError: if `gamma` is negative.
    """

    def __init__(self, gamma: float = 6.94):
        self.gamma = _checked("gamma", gamma, 0)

    def __call__(self, step) -> tf.Tensor:
        """The decay (float64) for an update `step` steps after averaging started."""
        return (1 - 1 / (_exact(step) + 1)) ** (self.gamma + 1)

    def get_config(self) -> Dict[str, Any]:
        """The constructor's arguments, ready for JSON."""
        return {"gamma": self.gamma}


class _After(_Schedule):
    """Any learning rate up to a step, another one from there; a base of those below."""

    def __init__(self, learning_rate: Union[float, Callable], start_step: int):
        if not isinstance(learning_rate, SCHEDULES):
            learning_rate = _checked("learning_rate", learning_rate, 0)
        self.learning_rate: Any = learning_rate
        self.start_step = checked_count("start_step", start_step, minimum=0)

    def _before(self, step) -> tf.Tensor:
        rate = self.learning_rate
        if not isinstance(rate, SCHEDULES):
            return _exact(rate)
        step = tf.cast(step, tf.int64)
        if step.shape.rank == 0:
            return _exact(rate(step))
        # Keras's own schedules take one step at a time.
        return tf.map_fn(lambda one: _exact(rate(one)), step, fn_output_signature=tf.float64)

    def get_config(self) -> Dict[str, Any]:
        """The constructor's arguments, ready for JSON."""
        rate = self.learning_rate
        if isinstance(rate, SCHEDULES):
            rate = kerases.serialize_schedule(rate)
        return {"learning_rate": rate, "start_step": self.start_step}

    @classmethod
    def from_config(cls, config: Dict[str, Any]):
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
        self.swa_learning_rate = _checked("swa_learning_rate", swa_learning_rate, 0)
        self.anneal_steps = checked_count("anneal_steps", anneal_steps, minimum=0)
        if anneal_strategy not in ("cos", "linear"):
            raise ValueError(
                f'Expected `anneal_strategy` to be "cos" or "linear". Received: {anneal_strategy!r}'
            )
        self.anneal_strategy = anneal_strategy

    def __call__(self, step) -> tf.Tensor:
        """The learning rate (float32) for the step after `step` steps."""
        since_start = _exact(step) - self.start_step
        # At least 1, so that 0 steps jump: the first step has gone all the way then.
        gone = (since_start + (self.anneal_steps == 0)) / max(self.anneal_steps, 1)
        share = tf.clip_by_value(gone, tf.zeros_like(gone), tf.ones_like(gone))
        if self.anneal_strategy == "cos":
            share = (1 - tf.cos(math.pi * share)) / 2
        start = tf.minimum(_exact(step), tf.constant(self.start_step, tf.float64))
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
        self.high = _checked("high", high, 0)
        self.low = _checked("low", low, 0, self.high)
        self.cycle_steps = checked_count("cycle_steps", cycle_steps, minimum=1)

    def __call__(self, step) -> tf.Tensor:
        """The learning rate (float32) for the step after `step` steps."""
        since_start = _exact(step) - self.start_step
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


def _exact(number) -> tf.Tensor:
    return tf.cast(number, tf.float64)


def _checked(
    name: str,
    value: Any,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    above: Optional[float] = None,
) -> float:
    """Returns `value` as a float, which must be finite and in range."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"Expected `{name}` to be a number. Received: {name}={value!r} of type {type(value)}"
        ) from None
    if above is not None and not (above < number < math.inf):
        raise ValueError(f"Expected `{name}` > {above}. Received: {name}={value!r}")
    if not (minimum <= number <= maximum and math.isfinite(number)):
        raise ValueError(f"Expected `{name}` from {minimum} to {maximum}. Received: {name}={value!r}")
    return number
