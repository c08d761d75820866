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
"""Work on all averages of a device as one function, which is traced once and called as one operation."""

from __future__ import annotations

import collections
import functools
from typing import Callable, Dict, Hashable, List, Optional, Sequence, Union

import tensorflow as tf

from tf_averaging import average_ops
from tf_averaging import control_flow
from tf_averaging import packed_handles
from tf_averaging.average_ops import Pair

# Work on pairs of averages and variables, with a weight (scalar float64 tensor) for those that use one.
# It returns the operations that must run.
Work = Callable[[Sequence[Pair], tf.Tensor], Sequence[Union[None, tf.Operation, tf.Tensor]]]


def nothing(pairs: Sequence[Pair], weight: tf.Tensor) -> list:
    """What is done on a step on which no update is due."""
    del pairs, weight
    return []


def copy(pairs: Sequence[Pair], weight: tf.Tensor) -> list:
    """Sets the first of each pair to the second one's value."""
    del weight
    return average_ops.copy(pairs)


@functools.cache
def fold(jit_compile: Union[bool, str]) -> Work:
    """The work of folding the variables into the averages."""
    return functools.partial(average_ops.fold, jit_compile=jit_compile)


class DeviceFunctions:
    """Does work with pairs of averages and variables, on the device of each.

    A function gets the handles of its variables as arguments, packed into one where that can be done.
    So one trace serves all calls, and what is done on a condition is one operation of TensorFlow's. The
    usual conditional, which is dissolved into the graph around it, costs a switch for each variable on
    every step, taken or not: the larger part of what averaging costs on a step that averages nothing.
    """

    def __init__(self):
        self._functions: Dict[Hashable, Callable] = {}

    def __call__(
        self,
        pairs: Sequence[Pair],
        works: Sequence[Work],
        choice: Optional[tf.Tensor] = None,
        weight: Optional[tf.Tensor] = None,
    ) -> List[tf.Tensor]:
        """Does one of `works` with the pairs of each device.

        Args:
          pairs: averages and variables.
          works: what may be done.
          choice: scalar int32 tensor, which of them; None for the first.
          weight: what the work gets as weight, scalar float64 tensor.

        Returns:
          Scalar bool tensors to wait for, one for each device.
        """
        groups: Dict[str, List[Pair]] = collections.OrderedDict()
        for pair in pairs:
            groups.setdefault(pair[0].device, []).append(pair)
        done = []
        for device, group in groups.items():
            is_here = is_one_process_cpu(group[0][0])
            with tf.device(device):
                handles = average_ops.handles_of(group)
                inputs = [tf.zeros([], tf.float64) if weight is None else weight]
                inputs += packed_handles.pack(handles) if is_here else handles
                functions = [self._function(work, group, inputs) for work in works]
                done.append(_call_one(functions, choice, inputs, is_here))
        return done

    def _function(self, work: Work, pairs: Sequence[Pair], inputs: Sequence[tf.Tensor]) -> Callable:
        """The work as a function of such inputs, for all pairs of these dtypes, shapes and device."""
        layout = tuple(component[1:] for pair in pairs for component in pair)
        key = (work, layout, len(inputs))
        if key not in self._functions:

            def on_handles(weight, *packed):
                handles = packed_handles.unpack(packed)
                return control_flow.done(lambda: work(average_ops.with_handles(pairs, handles), weight))

            signature = [tf.TensorSpec(value.shape, value.dtype) for value in inputs]
            with tf.init_scope():
                function = tf.function(on_handles, autograph=False)
                self._functions[key] = function.get_concrete_function(*signature)
        return self._functions[key]


def is_one_process_cpu(component: average_ops.Component) -> bool:
    """Whether the value lives on a CPU of this process."""
    device_type = tf.DeviceSpec.from_string(component.device).device_type
    return device_type == "CPU" and not average_ops.is_remote(component)


def _call_one(functions, choice, inputs, is_here: bool) -> tf.Tensor:
    if choice is None:
        return functions[0](*inputs)
    if tf.executing_eagerly():
        return functions[int(choice)](*inputs)
    if not is_here:
        # The operation below runs all of its work on the device it is on, and not every operation has a
        # kernel for every kind of device.
        return tf.switch_case(choice, [functools.partial(function, *inputs) for function in functions])
    (done,) = tf.raw_ops.Case(
        branch_index=choice, input=inputs, Tout=[tf.bool], branches=functions, output_shapes=[[]]
    )
    return done
