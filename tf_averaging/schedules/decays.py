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
"""Decays of an exponential moving average, by the number of steps since averaging began."""

from __future__ import annotations

from typing import Any, Dict

import tensorflow as tf

from tf_averaging import kerases
from tf_averaging.core.status import checked_count
from tf_averaging.schedules.base import Schedule
from tf_averaging.schedules.base import checked
from tf_averaging.schedules.base import exact


@kerases.register("tf_averaging")
class WarmUpDecay(Schedule):
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
        self.decay = checked("decay", decay, 0, 1)

    def __call__(self, step: Any) -> tf.Tensor:
        """The decay (float64) for an update `step` steps after averaging started."""
        step = exact(step)
        return tf.minimum(tf.constant(self.decay, tf.float64), (1 + step) / (10 + step))

    def get_config(self) -> Dict[str, Any]:
        """The constructor's arguments, ready for JSON."""
        return {"decay": self.decay}


@kerases.register("tf_averaging")
class MomentumAnnealingDecay(Schedule):
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
        self.momentum = checked("momentum", momentum, 0, 1)
        self.gamma = checked("gamma", gamma, above=0)

    def __call__(self, step: Any) -> tf.Tensor:
        """The decay (float64) for an update `step` steps after averaging started."""
        share = self.gamma / (self.gamma + exact(step))
        return 1 - tf.maximum(tf.constant(self.momentum, tf.float64), share)

    def get_config(self) -> Dict[str, Any]:
        """The constructor's arguments, ready for JSON."""
        return {"momentum": self.momentum, "gamma": self.gamma}


@kerases.register("tf_averaging")
class InversePowerDecay(Schedule):
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
        self.gamma = checked("gamma", gamma, above=0)
        self.power = checked("power", power, above=0)
        self.min_decay = checked("min_decay", min_decay, 0, 1)
        self.max_decay = checked("max_decay", max_decay, self.min_decay, 1)

    def __call__(self, step: Any) -> tf.Tensor:
        """The decay (float64) for an update `step` steps after averaging started."""
        step = exact(step)
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
class PowerFunctionDecay(Schedule):
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
        self.gamma = checked("gamma", gamma, 0)

    def __call__(self, step: Any) -> tf.Tensor:
        """The decay (float64) for an update `step` steps after averaging started."""
        return (1 - 1 / (exact(step) + 1)) ** (self.gamma + 1)

    def get_config(self) -> Dict[str, Any]:
        """The constructor's arguments, ready for JSON."""
        return {"gamma": self.gamma}


@kerases.register("tf_averaging")
class DebiasedDecay(Schedule):
    """`1 - (1 - decay) / (1 - decay ** (n + 1))`: the bias-corrected EMA, as Adam corrects its moments.

    After any number of updates the weights of the last one count the most, those of the one before it
    `decay` times as much, and so on, and nothing else counts: neither zeros nor the initial weights. The
    number of updates before this one is n, that of steps divided by `average_period`.

    >>> schedule = tfav.schedules.DebiasedDecay(0.99)
    >>> print(schedule(0).numpy(), schedule(1).numpy().round(4), schedule(10**4).numpy().round(4))
    0.0 0.4975 0.99

    Args:
      decay: float from 0 to 1, the decay in the long run; 1 is the plain mean.
      average_period: int >= 1, the optimizer's.

    Raises:
      TypeError: if `average_period` is not an int.
      ValueError: if an argument is out of range.
    """

    def __init__(self, decay: float = 0.99, average_period: int = 1):
        self.decay = checked("decay", decay, 0, 1)
        self.average_period = checked_count("average_period", average_period, 1)

    def __call__(self, step: Any) -> tf.Tensor:
        """The decay (float64) for an update `step` steps after averaging started."""
        step = exact(step) / self.average_period
        if self.decay == 1:
            return 1 - 1 / (step + 1)
        # `expm1` loses no digits where the power is close to 1.
        decay = 1 + (1 - self.decay) / tf.math.expm1(
            (step + 1) * tf.math.log(tf.constant(self.decay, tf.float64))
        )
        return tf.where(step > 0, decay, tf.zeros_like(decay))

    def get_config(self) -> Dict[str, Any]:
        """The constructor's arguments, ready for JSON."""
        return {"decay": self.decay, "average_period": self.average_period}


def half_life(steps: float, average_period: int = 1) -> float:
    """The decay with which weights count half as much after this many steps.

    >>> decay = tfav.schedules.half_life(1000)
    >>> print(round(decay, 6), round(decay**1000, 6))
    0.999307 0.5
    >>> optimizer = tfav.ExponentialMovingAverage("adam", average_decay=decay)

    Args:
      steps: float > 0, the number of training steps after which weights count half.
      average_period: int >= 1, the number of steps from one update to the next.

    Returns:
      `0.5 ** (average_period / steps)`, for `average_decay` or a schedule.

    Raises:
      TypeError: if `steps` is not a number, or `average_period` not an int.
      ValueError: if an argument is out of range.
    """
    return 0.5 ** (checked_count("average_period", average_period, 1) / checked("steps", steps, above=0))
