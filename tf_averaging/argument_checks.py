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
"""Checks of arguments: what they are to be, and what to do if they are not."""

from __future__ import annotations

import operator
from typing import Any, Dict, Optional, Union

import numpy as np
import tensorflow as tf

from tf_averaging import inner_optimizer as inner_optimizers


def checked_pairs(grads_and_vars) -> list:
    """Returns (gradient, variable) pairs as a list of tuples."""
    expected = "Expected (gradient, variable) pairs."
    try:
        pairs = [tuple(pair) for pair in grads_and_vars]
    except TypeError as error:
        raise TypeError(f"{expected} Received: {grads_and_vars!r}") from error
    for pair in pairs:
        if len(pair) != 2 or not isinstance(pair[1], tf.Variable):
            raise TypeError(f"{expected} Received: {pair!r}")
    return pairs


def check_not_keras_3(thing: object) -> None:
    """Refuses what comes from Keras 3."""
    if any(cls.__module__.split(".")[0] == "keras" for cls in type(thing).__mro__):
        raise TypeError(
            "Expected a model or variables of TensorFlow or tf_keras. What comes from Keras 3, which "
            "`tf.keras` is unless TF_USE_LEGACY_KERAS=1 is set before TensorFlow is imported, cannot be "
            f"averaged. Received: {thing!r}"
        )


def checked_variables(variables, expected: str = "Expected a list of variables.") -> list:
    """Returns an iterable of variables as a list."""
    try:
        variables = list(variables)
    except TypeError as error:
        raise TypeError(f"{expected} Received: {variables!r}") from error
    for variable in variables:
        check_not_keras_3(variable)
    return variables


def checked_settings(settings: Dict[str, Any]) -> Dict[str, Any]:
    """Returns settings for the inner optimizer, `lr` under its other name."""
    settings = dict(settings)
    unknown = set(settings) - set(inner_optimizers.SETTINGS) - {"lr"}
    if unknown:
        raise TypeError(
            f"Unknown keyword arguments: {sorted(unknown)}. Beside this class's own, expected one of "
            f"{inner_optimizers.SETTINGS + ('lr',)}, which configure the inner optimizer."
        )
    lr = settings.pop("lr", None)
    if lr is not None and settings.setdefault("learning_rate", lr) != lr:
        raise ValueError(
            "`lr` and `learning_rate` are two names of one argument. Received: "
            f"lr={lr!r}, learning_rate={settings['learning_rate']!r}"
        )
    return settings


def checked_count(name: str, value: int, minimum: int) -> int:
    """Returns `value` as an int, which must be at least `minimum`."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise TypeError(
            f"Expected `{name}` to be an int. Received: {name}={value!r} of type {type(value)}"
        ) from None
    if count < minimum:
        raise ValueError(f"Expected `{name}` >= {minimum}. Received: {name}={count}")
    return count


def checked_trainable_weights_only(value: bool) -> bool:
    """Returns `trainable_weights_only`, which stands where TensorFlow Addons had the decay."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(
            "Expected `trainable_weights_only` to be a bool. It comes before the decay here; TensorFlow "
            "Addons had `MovingAverage(optimizer, average_decay, ...)`, so write "
            "`ExponentialMovingAverage(optimizer, average_decay=0.999)`. Received: "
            f"trainable_weights_only={value!r}"
        )
    return bool(value)


def checked_average_dtype(value) -> Optional[tf.DType]:
    """Returns `average_dtype` as a dtype, or None."""
    if value is None:
        return None
    dtype = tf.as_dtype(value)
    if not dtype.is_floating:
        raise ValueError(f"Expected `average_dtype` to be a floating-point dtype. Received: {value!r}")
    return dtype


def checked_jit_compile(value: Union[bool, str]) -> Union[bool, str]:
    """Returns `jit_compile`, `"auto"` or a bool."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if value != "auto":
        raise ValueError(f'Expected `jit_compile` to be a bool or "auto". Received: {value!r}')
    return value


def checked_weight(name: str, weight: Any) -> tf.Tensor:
    """Returns the weight of the variables in an average as a scalar float64 tensor.

    Args:
      name: where it comes from.
      weight: a number from 0 to 1, or a scalar tensor.
    """
    if not tf.is_tensor(weight) and not isinstance(weight, tf.Variable):
        weight = tf.convert_to_tensor(weight, tf.float64)
        if weight.shape.rank == 0 and tf.executing_eagerly() and not 0 <= weight <= 1:
            raise ValueError(f"Expected `{name}` from 0 to 1. Received: {float(weight)}")
    weight = tf.cast(weight, tf.float64)
    if weight.shape.rank not in (0, None):
        raise ValueError(f"Expected `{name}` to be a scalar. Received one of shape {weight.shape}")
    return weight


def checked_average(value: Any, average: tf.Tensor) -> tf.Tensor:
    """Returns what an `average_op` returned, as a tensor of the average's shape and dtype."""
    value = tf.convert_to_tensor(value)
    if value.dtype != average.dtype or not value.shape.is_compatible_with(average.shape):
        raise ValueError(
            f"Expected `average_op` to return an average of shape {average.shape} and dtype "
            f"{average.dtype.name}. Received one of shape {value.shape} and dtype {value.dtype.name}"
        )
    return value
