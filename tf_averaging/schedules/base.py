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
"""What all schedules have in common: they are of both Kerases, count exactly, and check their numbers."""

from __future__ import annotations

import math
from typing import Any, Optional

import tensorflow as tf

from tf_averaging import kerases

SCHEDULES = kerases.bases("optimizers.schedules.LearningRateSchedule")


class Schedule(*SCHEDULES):  # type: ignore[misc]
    """A schedule of every Keras at once."""


def exact(number) -> tf.Tensor:
    """The number, or a tensor of numbers, as float64."""
    return tf.cast(number, tf.float64)


def checked(
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
