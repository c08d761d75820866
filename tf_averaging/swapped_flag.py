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
"""The flag that says whether averages and weights are exchanged now: one variable, in one of two forms.

In training it has length 0, while swapped length 1: a length is checked in XLA-compiled steps too, where
assertions are dropped. Parameter servers cannot store a value of varying length; XLA does not run there,
and a plain bool will do.
"""

from __future__ import annotations

from typing import List, Optional

import tensorflow as tf

from tf_averaging import average_ops
from tf_averaging import slot_creation

SWAPPED_ERROR = (
    "The averages are in the model and the weights in the slots (`weights_swapped` is True), so a step "
    "now would train the averages. Call `swap_weights()` first, or evaluate inside "
    "`with optimizer.swapped_weights():`."
)


def create(like: tf.Variable) -> tf.Variable:
    """Creates a flag, not set, that lives where `like` does."""
    if average_ops.is_on_parameter_server(average_ops.components(like)[0]):
        return slot_creation.create_like(like, lambda: tf.zeros([], tf.bool), "swapped")
    return slot_creation.create_like(
        like, lambda: tf.zeros([0], tf.bool), "swapped", shape=tf.TensorShape([None])
    )


def read(flag: tf.Variable) -> tf.Tensor:
    """Scalar bool tensor."""
    value = average_ops.read(average_ops.components(flag)[0])
    return value if flag.shape.rank == 0 else tf.size(value) > 0


def assign(flag: tf.Variable, value: tf.Tensor) -> List[Optional[tf.Operation]]:
    """Sets the components that the context may touch to a scalar bool tensor."""
    value = _in_form_of(flag, value)
    return [average_ops.assign(component, value) for component in average_ops.components(flag)]


def assign_everywhere(flag: tf.Variable, value: bool) -> None:
    """Sets all components, whatever the context."""
    value = _in_form_of(flag, tf.constant(value))
    for component in average_ops.all_components(flag):
        average_ops.assign(component, value)


def _in_form_of(flag: tf.Variable, value: tf.Tensor) -> tf.Tensor:
    return value if flag.shape.rank == 0 else tf.fill([tf.cast(value, tf.int32)], True)


def check_not_set(flag: tf.Variable) -> Optional[tf.Operation]:
    """Fails when it runs while the flag is set; a step must depend on the operation that it returns.

    Raises:
      tf.errors.InvalidArgumentError: in eager mode, at once.
    """
    if tf.executing_eagerly():
        if read(flag):
            raise tf.errors.InvalidArgumentError(None, None, SWAPPED_ERROR)
        return None
    if flag.shape.rank == 0:
        return tf.debugging.Assert(tf.logical_not(read(flag)), [SWAPPED_ERROR])
    component = average_ops.components(flag)[0]
    # There is no vector of length -1. The name is what a user gets to read: the error message shows it.
    # Assigning the value back keeps the check from being pruned. What states the length outright, as
    # `tf.ensure_shape` and an assignment of a constant do, would tell TensorFlow that the flag is not set
    # anywhere in this graph: it would know the outcome of later checks and swaps, and leave them out.
    with tf.device(component.device):
        negative = -tf.raw_ops.VariableShape(input=component.handle)
        empty = tf.fill(negative, True, name="training_step_while_swapped__call_swap_weights_first")
    return average_ops.assign(component, empty)
