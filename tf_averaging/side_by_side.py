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
"""Several averages of one optimizer, side by side: one for each element of a list.

They are averaging optimizers inside one another, each of which keeps one average. The outermost one got
the list and stands for all of them. To training and to files it is a nesting like any other.
"""

from __future__ import annotations

import inspect
from typing import Any, Collection, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import tensorflow as tf

from tf_averaging.core.status import UPDATE_WHILE_SWAPPED_ERROR
from tf_averaging.core.variables import after
from tf_averaging.core.variables import averageable


class Others(NamedTuple):
    """What the outermost of several averaging optimizers knows of the others.

    Attributes:
      argument: the name of the constructor's argument that was a list.
      values: its elements, one for each average; the outermost one's first.
      optimizers: the other averaging optimizers, from the outside to the inside.
    """

    argument: str = ""
    values: Tuple[Any, ...] = ()
    optimizers: Tuple[Any, ...] = ()

    def __str__(self) -> str:
        return f"{self.argument}={list(self.values)}, " if self.optimizers else ""


def in_model(optimizer: Any) -> Optional[Any]:
    """The one whose averages are in the model (eager mode): the optimizer, another one, or None."""
    return next((one for one in optimizer._everyone() if one._averages.is_swapped()), None)


def check_not_swapped(optimizer: Any, message: str) -> list:
    """Fails if any averages of an optimizer are in the model; in graphs the operations that do so."""
    everyone = [one._averages.status for one in optimizer._everyone()]
    return [status.check_not_swapped(message) for status in everyone if status is not None]


def update_by_hand(optimizer: Any, weight: Any) -> None:
    """Folds the current weights into all averages, or into none if some are in the model."""
    if not (weight is None or isinstance(weight, (int, float, np.number)) or tf.is_tensor(weight)):
        raise TypeError(f"Expected `weight` to be a number. Received: weight={weight!r}")
    for one in optimizer._everyone():
        one._check_has_averages("update_average")
    step = tf.maximum(optimizer._steps_taken() - 1, 0)
    with after(*check_not_swapped(optimizer, UPDATE_WHILE_SWAPPED_ERROR)):
        for one in optimizer._everyone():
            one._updates.by_hand(weight, step)


def reset(optimizer: Any, variables: Any) -> None:
    """Resets all averages, or none if some are in the model."""
    if not tf.executing_eagerly():
        raise RuntimeError("Expected the call of `reset_averages` in eager mode, not in a `tf.function`.")
    chosen = None if variables is None else averageable(optimizer._checked_variables(variables))
    for one in (in_model(optimizer) or optimizer, *optimizer._everyone()):  # The first one may refuse.
        one._averages.reset(chosen)


# The class that a scheme becomes asks for these if an argument of its constructor is a list.


def construct(optimizer: Any, scheme: Any, arguments: Dict[str, Any], settings: Collection[str]) -> None:
    """Constructs an optimizer, and inside it one for each further element of the list.

    Args:
      optimizer: of the scheme, not constructed yet.
      scheme: a class; `one_average_for_each` names the argument that is a list.
      arguments: the constructor's.
      settings: the names of arguments that are for the inner optimizer.
    """
    argument = scheme.one_average_for_each
    values = tuple(arguments[argument])
    if not values:
        raise ValueError(f"Expected a value of `{argument}`, or a list of them. Received: {values}")
    inside: List[Any] = []
    for place in range(len(values) - 1, 0, -1):
        given = {**arguments, argument: values[place], **_name(scheme, arguments, place)}
        inside.insert(0, scheme(**given))
        # Settings are for the optimizer that takes the steps, which has them now.
        arguments = {key: value for key, value in arguments.items() if key not in settings}
        arguments["optimizer"] = inside[0]
    if inside:
        # Not an attribute that TensorFlow or Keras tracks: it would be saved under a second name.
        object.__setattr__(optimizer, "_others", Others(argument, values, tuple(inside)))
    scheme.__init__(optimizer, **{**arguments, argument: values[0]})


def merged(optimizer: Any, config: Dict[str, Any]) -> Dict[str, Any]:
    """The config of an optimizer with those of the others in it."""
    argument = optimizer._others.argument
    configs = [config, *(other.get_config() for other in optimizer._others.optimizers)]
    values = [one[argument] for one in configs]
    lists = [value if isinstance(value, (list, tuple)) else [value] for value in values]
    return {**config, argument: [value for one in lists for value in one]}


def _name(scheme: Any, arguments: Dict[str, Any], place: int) -> Dict[str, str]:
    """A name for another optimizer, if it takes one, so that the names of its variables differ."""
    parameters = inspect.signature(scheme.__init__).parameters.values()
    has_name = any(p.name == "name" or p.kind is p.VAR_KEYWORD for p in parameters)
    return {"name": f"{arguments.get('name', scheme.__name__)}_{place}"} if has_name else {}
