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
"""The Kerases of this process: Keras 3 (`keras`, what `tf.keras` is) and Keras 2 (`tf_keras`).

What users call around the optimizers works with both: one implementation, which imports neither and asks
here. Each function stands for one difference between the two that such code must bridge.
"""

from __future__ import annotations

import functools
import importlib
import operator
import os
import sys
from types import ModuleType
from typing import Any, Callable, Dict, Iterable, Optional, Tuple

import tensorflow as tf

NAMES = ("keras", "tf_keras")


@functools.cache
def available() -> Tuple[ModuleType, ...]:
    """The Keras modules that this process can import, what `tf.keras` is first.

    Under `TF_USE_LEGACY_KERAS=1` that is `tf_keras` alone: nothing of Keras 3 is imported then.
    """
    # The spellings that TensorFlow itself accepts.
    is_legacy = os.environ.get("TF_USE_LEGACY_KERAS") in ("1", "true", "True")
    found = []
    for name in NAMES[1:] if is_legacy else NAMES:
        try:
            found.append(importlib.import_module(name))
        except ImportError:
            continue
    return tuple(found)


def of(thing: object) -> ModuleType:
    """The Keras that a model, layer, optimizer, schedule, callback or variable is of.

    What is of both, as the schedules and callbacks of this package are, is taken for Keras 3's.

    Raises:
      TypeError: if it is of neither.
    """
    keras = _find(thing)
    if keras is None:
        raise TypeError(f"Expected an object of Keras 3 or tf_keras. {_received(thing)}")
    return keras


def of_model(model: object) -> ModuleType:
    """The Keras that a model is of.

    Raises:
      TypeError: if it is not a model.
    """
    keras = _find(model)
    if keras is None or not isinstance(model, keras.Model):
        raise TypeError(f"Expected a `keras.Model` or `tf_keras.Model`. {_received(model)}")
    return keras


def bases(path: str) -> Tuple[Any, ...]:
    """The class at `path` of every available Keras: to inherit from all of them, or for `isinstance`.

    Args:
      path: dotted, `"callbacks.Callback"` for example.
    """
    return tuple(operator.attrgetter(path)(keras) for keras in available())


def register(package: str) -> Callable[[type], type]:
    """Class decorator: every available Keras can then load objects of the class without being told."""

    def decorate(cls: type) -> type:
        for keras in available():
            keras.saving.register_keras_serializable(package)(cls)
        return cls

    return decorate


def is_schedule(thing: object) -> bool:
    """Whether it is a `LearningRateSchedule` of either Keras."""
    return isinstance(thing, bases("optimizers.schedules.LearningRateSchedule"))


def serialize_schedule(schedule: object) -> Dict[str, Any]:
    """The config of a schedule of either Keras, ready for JSON. It records which Keras that is."""
    keras = of(schedule)
    return {**keras.optimizers.schedules.serialize(schedule), "keras": keras.__name__}


def deserialize_schedule(config: Dict[str, Any], custom_objects: Optional[Dict[str, Any]] = None):
    """Creates the schedule that `serialize_schedule` described, in the other Keras if its own is missing.

    Version 0.1 recorded no Keras, as it knew tf_keras only.
    """
    config = dict(config)
    known = {keras.__name__: keras for keras in available()}
    keras = known.get(config.pop("keras", None), available()[-1])
    cls = keras.saving.get_registered_object(config.get("registered_name"))
    by_name = {} if cls is None else {config["class_name"]: cls}  # As tf_keras reads `.h5` files.
    custom_objects = {**by_name, **(custom_objects or {})}
    return keras.optimizers.schedules.deserialize(config, custom_objects=custom_objects)


def tf_variable(variable):
    """The `tf.Variable` in a Keras 3 variable; any other variable is returned as it is."""
    # The public `value` may be a tensor, cast for mixed precision.
    return getattr(variable, "_value", variable) if _is_of(variable, "keras") else variable


def check_schedule(keras: ModuleType, name: str, value: object) -> None:
    """Refuses a schedule of the other Keras as a setting of an optimizer of this one."""
    if is_schedule(value) and not isinstance(value, keras.optimizers.schedules.LearningRateSchedule):
        raise TypeError(
            f"Expected a number or a schedule of {_full_name(keras)} for `{name}`, as the inner "
            f"optimizer is of {_full_name(keras)}. Received one of {_full_name(of(value))}: {value!r}"
        )


def check_same_keras(keras: ModuleType, thing: object) -> None:
    """Refuses a model or variable that comes from another Keras than the optimizer."""
    its_keras = _find(thing)
    if its_keras is not None and not _is_of(thing, keras.__name__):
        raise TypeError(
            f"Expected a model or variables of TensorFlow or {_full_name(keras)}, as the optimizer is of "
            f"{_full_name(keras)}. Received what comes from {_full_name(its_keras)}. (`tf.keras` is "
            "Keras 3, or tf_keras if TF_USE_LEGACY_KERAS=1 is set before TensorFlow is imported.) "
            f"{_received(thing)}"
        )


def as_list(variables: Any, expected: str) -> list:
    """An iterable of variables as a list."""
    try:
        if hasattr(variables, "assign"):  # One variable: its elements are none.
            raise TypeError
        return list(variables)
    except TypeError as error:
        raise TypeError(f"{expected} Received: {variables!r}") from error


def checked_list(keras: ModuleType, variables: Any, expected: str) -> list:
    """An iterable of variables, none of another Keras, as a list."""
    variables = as_list(variables, expected)
    for variable in variables:
        check_same_keras(keras, variable)
    return variables


def checked_pairs(keras: ModuleType, grads_and_vars: Iterable) -> Tuple[list, list]:
    """The gradients and the variables of (gradient, variable) pairs."""
    expected = "Expected (gradient, variable) pairs."
    try:
        pairs = [tuple(pair) for pair in grads_and_vars]
    except TypeError as error:
        raise TypeError(f"{expected} Received: {grads_and_vars!r}") from error
    for pair in pairs:
        check_same_keras(keras, pair[-1] if pair else None)
        if len(pair) != 2 or not isinstance(tf_variable(pair[1]), tf.Variable):
            raise TypeError(f"{expected} Received: {pair!r}")
    return [gradient for gradient, _ in pairs], [variable for _, variable in pairs]


def check_replica_context(method: str) -> None:
    """Refuses a step in a cross-replica context."""
    if tf.distribute.has_strategy() and tf.distribute.in_cross_replica_context():
        raise RuntimeError(
            f"`{method}` must be called on each replica, but this is a cross-replica context. "
            "Call it in a function that `tf.distribute.Strategy.run` runs."
        )


def _find(thing: object) -> Optional[ModuleType]:
    # A Keras of which there is an object has been imported, by someone.
    return next((sys.modules[name] for name in NAMES if _is_of(thing, name)), None)


def _is_of(thing: object, package: str) -> bool:
    return any(cls.__module__.partition(".")[0] == package for cls in type(thing).__mro__)


def _full_name(keras: ModuleType) -> str:
    return "Keras 3" if keras.__name__ == "keras" else keras.__name__


def _received(thing: object) -> str:
    return f"Received: {thing!r} of type {type(thing)}"
