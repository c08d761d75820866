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

import functools
from typing import Callable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import tensorflow as tf

from tf_averaging import control_flow

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
    """Adds to the value, where it lives."""
    with tf.device(component.device):
        return tf.raw_ops.AssignAddVariableOp(resource=component.handle, value=delta)


def is_shared_by_replicas(variable: tf.Variable) -> bool:
    """Whether this is one of several replicas in step that have this one variable between them."""
    return (
        in_replica_context()
        and tf.distribute.get_strategy().num_replicas_in_sync > 1
        and not is_distributed(variable)
    )


def copy(pairs: Sequence[Pair]) -> List[Optional[tf.Operation]]:
    """Sets each first component to the second one's value. Buffers are shared until one is written."""
    return [assign(target, tf.cast(read(source), target.dtype)) for target, source in pairs]


def exchange(pairs: Sequence[Pair]) -> List[Optional[tf.Operation]]:
    """Exchanges the two values of each pair, which have one dtype: buffers change hands, bit for bit."""
    operations = []
    for first, second in pairs:
        first_value, second_value = read(first), read(second)
        with control_flow.after(first_value, second_value):
            operations += [assign(first, second_value), assign(second, first_value)]
    return operations


def update(
    pairs: Sequence[Pair], new_value: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
) -> List[Optional[tf.Operation]]:
    """Sets each average to `new_value(variable, average)`.

    Args:
      pairs: averages and variables.
      new_value: gets the value of the variable, cast to the average's dtype, and the average's.

    Returns:
      The operations that must run.
    """
    return _in_turn(pairs, lambda average, value, old: assign(average, new_value(value, old)))


def interpolate(pairs: Sequence[Pair], weight: tf.Tensor) -> List[Optional[tf.Operation]]:
    """`average += weight * (variable - average)`."""
    cast = {dtype: tf.cast(weight, dtype) for dtype in {average.dtype for average, _ in pairs}}
    return _in_turn(pairs, lambda average, value, old: add(average, cast[average.dtype] * (value - old)))


def _in_turn(pairs: Sequence[Pair], write) -> List[Optional[tf.Operation]]:
    """Calls `write(average, variable's value, average's value)` where the averages live."""
    operations: List[Optional[tf.Operation]] = []
    for (average, variable), earlier in zip(pairs, _waits_for(pairs)):
        ready = [] if earlier is None else [operations[earlier]]
        with control_flow.after(*ready), tf.device(average.device):
            value = tf.cast(read(variable), average.dtype)
            operations.append(write(average, value, read(average)))
    return operations


def _waits_for(pairs: Sequence[Pair]) -> Iterator[Optional[int]]:
    """For each pair the index of the one that must be done before it, None for those that come first.

    What is under way needs memory for its arithmetic: this keeps it to 1/64 of the averages, or to one
    variable, where that is larger.
    """
    sizes = [(average.shape.num_elements() or 0) * average.dtype.size for average, _ in pairs]
    room = sum(sizes) / 64
    under_way, first = 0, 0
    for index, size in enumerate(sizes):
        under_way += size
        while first < index and under_way > room:
            under_way -= sizes[first]
            first += 1
        yield first - 1 if first else None


def fold(
    pairs: Sequence[Pair], weight: tf.Tensor, jit_compile: Union[bool, str]
) -> List[Union[None, tf.Operation, tf.Tensor]]:
    """`average += weight * (variable - average)` for all pairs of a device, in one pass.

    Large variables go through one XLA-compiled function, which reads and writes every value once and
    needs no memory beside the averages; small ones, remote ones and all where XLA is not available go
    through plain operations. Both give the same numbers up to rounding.

    Args:
      pairs: averages and variables, on one device.
      weight: scalar float64 tensor; it is cast once to each average's dtype.
      jit_compile: `"auto"`, or a bool that forces one way or the other. Remote variables are never
        compiled: their values would move to this machine.

    Returns:
      What must run before anything that follows: operations, and a tensor for the compiled call.
    """
    compiled: List[Pair] = []
    plain: List[Pair] = []
    for pair in pairs:
        (compiled if pays_to_compile(pair[0], jit_compile) else plain).append(pair)
    done = []
    if compiled:

        def fold_compiled(weight, *handles):
            _fold_at_once(with_handles(compiled, handles), weight)
            return tf.constant(True)

        function = tf.function(fold_compiled, jit_compile=True, autograph=False)
        with tf.device(compiled[0][0].device):
            done = [function(weight, *handles_of(compiled))]
    return done + interpolate(plain, weight)


def handles_of(pairs: Sequence[Pair]) -> List[tf.Tensor]:
    """All resource handles, pair by pair."""
    return [component.handle for pair in pairs for component in pair]


def with_handles(pairs: Sequence[Pair], handles: Sequence[tf.Tensor]) -> List[Pair]:
    """The same pairs with other handles, as a function sees them that gets the handles as arguments."""
    return [
        (average._replace(handle=first), variable._replace(handle=second))
        for (average, variable), first, second in zip(pairs, handles[::2], handles[1::2])
    ]


def pays_to_compile(average: Component, jit_compile: Union[bool, str]) -> bool:
    """Whether this average is folded by XLA-compiled code."""
    if not tf.test.is_built_with_xla() or is_remote(average) or _is_on_tpu(average):
        return False
    if jit_compile == "auto":
        elements = average.shape.num_elements()
        return elements is not None and elements * average.dtype.size >= MIN_BYTES_TO_COMPILE
    return bool(jit_compile)


def _fold_at_once(pairs: Sequence[Pair], weight: tf.Tensor) -> None:
    """What is compiled: XLA sees all of it and makes one pass of it."""
    for average, variable in pairs:
        value = tf.raw_ops.ReadVariableOp(resource=variable.handle, dtype=variable.dtype)
        old = tf.raw_ops.ReadVariableOp(resource=average.handle, dtype=average.dtype)
        new = old + tf.cast(weight, average.dtype) * (tf.cast(value, average.dtype) - old)
        tf.raw_ops.AssignVariableOp(resource=average.handle, value=new)


def is_remote(component: Component) -> bool:
    """Whether the value lives in another process, on a parameter server say."""
    device = tf.DeviceSpec.from_string(component.device)
    if device.job in (None, "localhost"):
        return False
    here = tf.DeviceSpec.from_string(_local_device(_known_devices()))
    return (device.job, device.task) != (here.job, here.task)


def is_on_parameter_server(component: Component) -> bool:
    """Whether workers share the value: it is remote, and not on a TPU, which may be remote too."""
    return is_remote(component) and not _is_on_tpu(component)


def _is_on_tpu(component: Component) -> bool:
    return tf.DeviceSpec.from_string(component.device).device_type == "TPU"


def _known_devices() -> Tuple[str, ...]:
    return tuple(device.name for device in tf.config.list_logical_devices())


@functools.lru_cache(maxsize=1)
def _local_device(known_devices: Tuple[str, ...]) -> str:
    """This process's own device. Its name changes when a cluster is joined; then all known ones do."""
    del known_devices
    with tf.init_scope(), tf.device(None), tf.device("/device:CPU:0"):
        return tf.constant(0).device
