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
"""Finds the averaging optimizer of a model."""

from __future__ import annotations

from typing import Any, Optional

from tf_averaging import kerases


def find_averaging_optimizer(model_or_optimizer: Any) -> Optional[Any]:
    """The outermost averaging optimizer in a compiled model or an optimizer; None if there is none."""
    found = model_or_optimizer
    while found is not None and not hasattr(type(found), "keras_name"):
        found = getattr(found, "inner_optimizer", None) or getattr(found, "optimizer", None)
    return found


def averaging_optimizer(model_or_optimizer: Any) -> Any:
    """Finds the averaging optimizer, which may be inside a LossScaleOptimizer.

    >>> model = tf.keras.Sequential([tf.keras.Input([2]), tf.keras.layers.Dense(1)])
    >>> inner = tfav.SWA(tf.keras.optimizers.SGD())
    >>> model.compile(tf.keras.mixed_precision.LossScaleOptimizer(inner), "mse")
    >>> tfav.averaging_optimizer(model) is inner
    True

    Args:
      model_or_optimizer: a compiled model, or an optimizer.

    Returns:
      The outermost averaging optimizer.

    Raises:
      ValueError: if there is none.
    """
    found = find_averaging_optimizer(model_or_optimizer)
    if found is None:
        is_model = isinstance(model_or_optimizer, kerases.bases("Model"))
        optimizer = getattr(model_or_optimizer, "optimizer", None if is_model else model_or_optimizer)
        raise ValueError(
            "The model's optimizer keeps no averages. Expected one that does around the optimizer that "
            "trains: `model.compile(tf_averaging.ExponentialMovingAverage(optimizer), ...)` or "
            "`tf_averaging.SWA(optimizer)`. Those inside a `MultiOptimizer` are not looked for: put one "
            f"around it. Received a model compiled with: {optimizer!r}"
        )
    return found


def check_averages(optimizer: Any, model: Any) -> None:
    """Refuses an averaging optimizer that averages none of the model's variables."""
    slots = optimizer._averages.slots
    if not any(kerases.tf_variable(variable) in slots for variable in model.variables):
        raise ValueError(
            "Expected the optimizer that averages the model's weights. Received one that has averages of "
            f"other variables only: {optimizer!r}"
        )
