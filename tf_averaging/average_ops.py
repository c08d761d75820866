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
"""The arithmetic of averaging, on the plain variables of one replica.

A variable of a model may be a whole family of variables: one for each replica, wrapped for mixed
precision or for aggregation. `components` takes it apart; everything else here works on the parts, by
resource handle, so that nothing communicates, everything is legal inside a `tf.cond`, and the same code
serves all strategies, eagerly and in graphs.
"""

from __future__ import annotations

import collections
from typing import Callable, ContextManager, List, NamedTuple, Optional, Sequence, Tuple, Union

import tensorflow as tf

# Variables of fewer bytes are folded by plain ops even where XLA is available: compiling each further
# variable costs about 10 ms once, and a small fold is over before the difference shows.
MIN_BYTES_TO_COMPILE = 1 << 16


class Component(NamedTuple):
    """One plain variable: what a replica or a device really holds.

    Attributes:
      handle: scalar `tf.resource` tensor.
      dtype: the dtype in which the value is stored (not the one mixed precision casts it to).
      shape: static shape, possibly unknown.
      device: where the value lives, as a device string.
    """

    handle: tf.Tensor
    dtype: tf.DType
    shape: tf.TensorShape
    device: str


# An average and the variable that it follows, on the same device.
Pair = Tuple[Component, Component]


def is_distributed(variable: tf.Variable) -> bool:
    """Whether `variable` has one component for each replica."""
    return isinstance(variable, tf.distribute.DistributedValues)


def in_replica_context() -> bool:
    """Whether the code runs on one replica of a strategy.

    The default strategy does not count: outside any scope it claims to be in a replica context, yet a
    distributed variable's `handle` is then silently the first replica's.
    """
    return tf.distribute.has_strategy() and not tf.distribute.in_cross_replica_context()


def components(variable: tf.Variable) -> List[Component]:
    """What this context may touch: its own part in a replica context, all parts otherwise."""
    if is_distributed(variable) and not in_replica_context():
        return all_components(variable)
    return [_component(variable)]


def all_components(variable: tf.Variable) -> List[Component]:
    """All parts of `variable`, whatever the context."""
    if is_distributed(variable):
        return [_component(value) for value in variable.values]
    return [_component(variable)]


def _component(variable: tf.Variable) -> Component:
    handle = variable.handle
    # An autocast variable's `dtype` depends on where it is asked; what it stores is its `true_dtype`.
    dtype = getattr(variable, "true_dtype", variable.dtype)
    return Component(handle, dtype, variable.shape, handle.device or variable.device)


def read(component: Component) -> tf.Tensor:
    """The value, sharing the variable's buffer."""
    with tf.device(component.device):
        value = tf.raw_ops.ReadVariableOp(resource=component.handle, dtype=component.dtype)
    if not tf.executing_eagerly():
        value.set_shape(component.shape)
    return value


def assign(component: Component, value: tf.Tensor) -> Optional[tf.Operation]:
    """Sets the value; the tensor's buffer changes hands where nobody else needs it."""
    with tf.device(component.device):
        return tf.raw_ops.AssignVariableOp(resource=component.handle, value=value)


def add(component: Component, delta: tf.Tensor) -> Optional[tf.Operation]:
    """Adds to the value, in one step where it lives: of several that add at once none is lost."""
    with tf.device(component.device):
        return tf.raw_ops.AssignAddVariableOp(resource=component.handle, value=delta)


# Work is a function without arguments that returns the operations that must run.
Work = Callable[[], Sequence[Union[None, tf.Operation, tf.Tensor]]]


def _done(work: Work) -> tf.Tensor:
    with tf.control_dependencies([op for op in work() if op is not None]):
        return tf.constant(True)


def after(result: object) -> ContextManager:
    """Orders what follows after `result`, where that is a tensor or an operation of a graph."""
    waits = isinstance(result, (tf.Tensor, tf.Operation)) and not tf.executing_eagerly()
    return tf.control_dependencies([result] if waits else [])


def when(condition: Union[bool, tf.Tensor], work: Work) -> Optional[tf.Tensor]:
    """Does `work` if `condition` holds.

    Args:
      condition: a bool known while the graph is built (then nothing is added for the other case), or a
        scalar bool tensor.
      work: what to do.

    Returns:
      A scalar bool tensor that is ready once the work is done; in graphs without automatic control
      dependencies, what follows must depend on it. None if there is nothing to wait for.
    """
    if isinstance(condition, bool):
        return _done(work) if condition else None
    return either(condition, work, list)


def either(condition: tf.Tensor, work: Work, otherwise: Work) -> tf.Tensor:
    """Does `work` if the scalar bool tensor holds, `otherwise` if not; returns as `when` does."""
    return tf.cond(condition, lambda: _done(work), lambda: _done(otherwise))


def is_shared_by_replicas(variable: tf.Variable) -> bool:
    """Whether this is one of several replicas in step that have this one variable between them."""
    return (
        in_replica_context()
        and tf.distribute.get_strategy().num_replicas_in_sync > 1
        and not is_distributed(variable)
    )


def by_device(pairs: Sequence[Pair]) -> List[Tuple[str, List[Pair]]]:
    """Groups pairs by the device of the average."""
    groups = collections.OrderedDict()
    for pair in pairs:
        groups.setdefault(pair[0].device, []).append(pair)
    return list(groups.items())


def copy(pairs: Sequence[Pair]) -> List[Optional[tf.Operation]]:
    """Sets each first component to the second one's value. Buffers are shared until one is written."""
    return [assign(target, tf.cast(read(source), target.dtype)) for target, source in pairs]


def exchange(pairs: Sequence[Pair]) -> List[Optional[tf.Operation]]:
    """Exchanges the two values of each pair, which have one dtype: buffers change hands, bit for bit."""
    operations = []
    for first, second in pairs:
        first_value, second_value = read(first), read(second)
        with tf.control_dependencies([first_value, second_value]):
            operations += [assign(first, second_value), assign(second, first_value)]
    return operations


def update(
    pairs: Sequence[Pair], new_value: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
) -> List[Optional[tf.Operation]]:
    """Sets each average to `new_value(variable, average)`, one after the other.

    One after the other, so that no more than one variable's worth of memory is needed beside the
    averages, however many there are.

    Args:
      pairs: averages and variables.
      new_value: gets the value of the variable, cast to the average's dtype, and the average's.

    Returns:
      The operations that must run; empty in eager mode.
    """
    return _one_by_one(pairs, lambda average, value, old: assign(average, new_value(value, old)))


def update_shared(pairs: Sequence[Pair], weight: tf.Tensor) -> List[Optional[tf.Operation]]:
    """Interpolates as `Fold` does where others do so at once, on parameter servers: none is lost."""
    return _one_by_one(
        pairs,
        lambda average, value, old: add(average, tf.cast(weight, average.dtype) * (value - old)),
    )


def _one_by_one(pairs: Sequence[Pair], write) -> List[Optional[tf.Operation]]:
    """Calls `write(average, variable's value, average's value)` where the averages live."""
    previous = []
    for average, variable in pairs:
        with tf.control_dependencies(previous), tf.device(average.device):
            operation = write(average, tf.cast(read(variable), average.dtype), read(average))
        previous = [] if operation is None else [operation]
    return previous


class Fold:
    """`average += weight * (variable - average)` for all pairs of a device, in one fused pass.

    Large variables go through one XLA-compiled function for each device, which reads and writes every
    value once and needs no memory beside the averages; small ones, remote ones and all where XLA is not
    available go through plain ops. Both give the same numbers up to rounding.

    """

    def __init__(self):
        self._compiled = tf.function(_fold_handles, jit_compile=True, autograph=False)

    def __call__(
        self, pairs: Sequence[Pair], weight: tf.Tensor, jit_compile: Union[bool, str]
    ) -> List[Optional[tf.Operation]]:
        """Folds the variables into the averages.

        Args:
          pairs: averages and variables.
          weight: scalar float64 tensor; it is cast once to each average's dtype.
          jit_compile: `"auto"`, or a bool that forces one way or the other. Remote variables are never
            compiled: their values would move to this machine.

        Returns:
          What must run before anything that follows: operations, and a tensor for each compiled call.
        """
        compiled, remote, plain = [], [], []
        for pair in pairs:
            if pays_to_compile(pair[0], jit_compile):
                compiled.append(pair)
            elif is_remote(pair[0]):
                remote.append(pair)
            else:
                plain.append(pair)
        operations = []
        for device, group in by_device(compiled):
            averages, variables = zip(*group)
            with tf.device(device):
                operations.append(
                    self._compiled(
                        [average.handle for average in averages],
                        [variable.handle for variable in variables],
                        weight,
                        tuple((average.dtype.name, variable.dtype.name) for average, variable in group),
                    )
                )
        operations += update(plain, interpolation(weight)) + update_shared(remote, weight)
        return [op for op in operations if op is not None]


def pays_to_compile(average: Component, jit_compile: Union[bool, str]) -> bool:
    """Whether this average is folded by XLA-compiled code."""
    if not tf.test.is_built_with_xla() or is_remote(average) or "TPU" in average.device:
        return False
    if jit_compile == "auto":
        elements = average.shape.num_elements()
        return elements is not None and elements * average.dtype.size >= MIN_BYTES_TO_COMPILE
    return jit_compile


def interpolation(weight: tf.Tensor) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """`(variable, average) -> average + weight * (variable - average)`, at the average's dtype."""
    cast = {}

    def new_value(variable: tf.Tensor, average: tf.Tensor) -> tf.Tensor:
        if average.dtype not in cast:
            cast[average.dtype] = tf.cast(weight, average.dtype)
        return average + cast[average.dtype] * (variable - average)

    return new_value


def _fold_handles(averages, variables, weight, dtypes):
    """What is compiled: the fold on bare handles, traced for each combination of `dtypes` (names).

    Returns a tensor to wait for.
    """
    lerp = interpolation(weight)
    for average, variable, (average_dtype, dtype) in zip(averages, variables, dtypes):
        value = tf.raw_ops.ReadVariableOp(resource=variable, dtype=dtype)
        old = tf.raw_ops.ReadVariableOp(resource=average, dtype=average_dtype)
        new = lerp(tf.cast(value, average_dtype), old)
        tf.raw_ops.AssignVariableOp(resource=average, value=new)
    return tf.constant(True)


def is_remote(component: Component) -> bool:
    """Whether the value lives in another process, on a parameter server say."""
    device = tf.DeviceSpec.from_string(component.device)
    if device.job in (None, "localhost"):
        return False
    here = tf.DeviceSpec.from_string(_local_device())
    return (device.job, device.task) != (here.job, here.task)


def _local_device() -> str:
    with tf.init_scope(), tf.device(None), tf.device("/device:CPU:0"):
        return tf.constant(0).device
