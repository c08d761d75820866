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
"""TensorFlow variables as the core sees them: their parts, where they live, which of them are averaged.

A variable of a model may be a whole family: one plain variable for each replica, perhaps wrapped for
mixed precision. `components` takes it apart. The core reads and writes the parts by resource handle. So
nothing communicates, everything is legal inside a `tf.cond`, and one piece of code serves all strategies.
"""

from __future__ import annotations

import collections.abc
import concurrent.futures
import contextlib
import dataclasses
import functools
from typing import (
    Any,
    Callable,
    Dict,
    Generic,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    TypeVar,
)

import numpy as np
import tensorflow as tf

Value = TypeVar("Value")
ShardedVariable = tf.__internal__.distribute.ShardedVariable

# Without AutoGraph, which would otherwise rewrite every function called in a `tf.function`: nothing here
# needs it, and tracing takes a multiple of the time.
as_written = tf.autograph.experimental.do_not_convert


class Component(NamedTuple):
    """One plain variable: what a replica or a device really holds.

    Attributes:
      handle: scalar `tf.resource` tensor; or the value, where that was fetched from another device.
      dtype, shape: as the value is stored (not as mixed precision casts it); the shape may be unknown.
      device: where the value lives, as a device string.
    """

    handle: tf.Tensor
    dtype: tf.DType
    shape: tf.TensorShape
    device: str


def is_distributed(variable: tf.Variable) -> bool:
    """Whether `variable` has one component for each replica."""
    return isinstance(variable, tf.distribute.DistributedValues)


def in_replica_context() -> bool:
    """Whether the code runs on one replica of a strategy.

    The default strategy does not count. Outside any scope it claims to be in a replica context, but there
    a distributed variable's `handle` is silently the first replica's.
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
    # Where Keras casts a variable its `dtype` depends on the place. What is stored is its `true_dtype`.
    dtype = getattr(variable, "true_dtype", variable.dtype)
    return Component(handle, dtype, variable.shape, handle.device or variable.device)


def read(component: Component) -> tf.Tensor:
    """The value. The tensor shares the variable's buffer until one of them is written to."""
    if component.handle.dtype != tf.resource:
        return component.handle
    with tf.device(component.device):
        value = tf.raw_ops.ReadVariableOp(resource=component.handle, dtype=component.dtype)
    if not tf.executing_eagerly():
        value.set_shape(component.shape)
    return value


def assign(component: Component, value: tf.Tensor) -> Optional[tf.Operation]:
    """Sets the value. The tensor's buffer changes hands where nobody else needs it."""
    with tf.device(component.device):
        return tf.raw_ops.AssignVariableOp(resource=component.handle, value=value)


def subtract(component: Component, delta: tf.Tensor) -> Optional[tf.Operation]:
    """Subtracts from the value, where it lives."""
    with tf.device(component.device):
        return tf.raw_ops.AssignSubVariableOp(resource=component.handle, value=delta)


def after(*results: object):
    """Orders what follows after those results that are tensors or operations of a graph."""
    return tf.control_dependencies(
        [r for r in results if isinstance(r, (tf.Tensor, tf.Operation)) and not tf.executing_eagerly()]
    )


def copy(pairs: Iterable[Tuple[Component, Component]]) -> None:
    """Sets each first component to the second one's value. Buffers are shared until one is written."""
    for target, source in pairs:
        assign(target, tf.cast(read(source), target.dtype))


def read_here(variable: tf.Variable) -> tf.Tensor:
    """The value in this context: a replica's own, or the first replica's."""
    return read(components(variable)[0])


def value(variable: tf.Variable) -> tf.Tensor:
    """The value as it is stored; across replicas what the variable makes of theirs."""
    is_of_all = is_distributed(variable) and not in_replica_context()
    return tf.convert_to_tensor(variable) if is_of_all else read_here(variable)


def assign_here(variable: tf.Variable, value: tf.Tensor) -> list:
    """Sets the components that this context may touch; returns the operations."""
    return [assign(component, value) for component in components(variable)]


def assign_everywhere(variable: tf.Variable, value: tf.Tensor) -> None:
    """Sets all components or shards, whatever the context."""
    if isinstance(variable, ShardedVariable):
        variable.assign(tf.cast(value, variable.dtype))
        return
    for component in all_components(variable):
        assign(component, tf.cast(value, component.dtype))


def stored_dtype(variable: tf.Variable) -> tf.DType:
    """The dtype in which the values are stored."""
    return all_components(variable)[0].dtype


def has_value(variable: tf.Variable) -> bool:
    """Whether it has one (eager mode). A variable that a function creates has none before it runs."""
    return all(tf.raw_ops.VarIsInitializedOp(resource=c.handle) for c in all_components(variable))


# Where a value lives.


def is_remote(component: Component) -> bool:
    """Whether the value lives in another process, such as a parameter server."""
    device = tf.DeviceSpec.from_string(component.device)
    if device.job in (None, "localhost"):
        return False
    known_devices = tuple(device.name for device in tf.config.list_logical_devices())
    here = tf.DeviceSpec.from_string(_local_device(known_devices))
    return (device.job, device.task) != (here.job, here.task)


def is_on_tpu(component: Component) -> bool:
    return tf.DeviceSpec.from_string(component.device).device_type == "TPU"


def is_on_parameter_server(component: Component) -> bool:
    """Whether workers share the value. It is remote then, and not on a TPU, which may be remote too."""
    return is_remote(component) and not is_on_tpu(component)


def is_on_local_cpu(component: Component) -> bool:
    return tf.DeviceSpec.from_string(component.device).device_type == "CPU" and not is_remote(component)


@functools.lru_cache(maxsize=1)
def _local_device(known_devices: Tuple[str, ...]) -> str:
    """This process's own device. Its name changes when a cluster is joined, and so do all known ones."""
    with tf.init_scope(), tf.device(None), tf.device("/device:CPU:0"):
        return tf.constant(0).device


# Which variables are the same.


def averageable(variables: Iterable[object]) -> List[tf.Variable]:
    """The floating-point and complex variables among `variables`. A sharded one gives its shards."""
    chosen = []
    for variable in variables:
        if isinstance(variable, ShardedVariable):
            chosen += averageable(variable.variables)
        elif isinstance(variable, tf.Variable):
            dtype = getattr(variable, "true_dtype", variable.dtype)
            if dtype.is_floating or dtype.is_complex:
                chosen.append(variable)
    return chosen


# TensorFlow has no public name for what identifies a variable, which distributed variable a component
# belongs to, and under which strategy it was created. The private ones are used below and nowhere else in
# the core. `tests/private_names_test.py` fails if one of them goes away.


def _identity(variable: Any) -> str:
    """What identifies a variable, however wrapped, and whichever of its components is at hand."""
    if not is_distributed(variable):
        # A component knows its whole, on itself or (extension types) on its handle.
        for part in (variable, getattr(variable, "handle", None)):
            container = getattr(part, "_distributed_container", None)
            if container is not None and container() is not None:
                return container()._unique_id
    return variable._unique_id


def strategy_of(variable: tf.Variable) -> Optional[tf.distribute.Strategy]:
    """The strategy in whose scope the variable was created, None for none."""
    return getattr(variable, "_distribute_strategy", None)


class VariableMap(collections.abc.MutableMapping, Generic[Value]):
    """A dict whose keys are variables, compared by identity; in the order in which they came.

    A distributed variable and each of its components are the same key.
    """

    def __init__(self, items: Iterable[Tuple[tf.Variable, Value]] = ()):
        self._items: Dict[str, Tuple[tf.Variable, Value]] = {}
        for variable, value in items:
            self[variable] = value

    def __getitem__(self, variable: tf.Variable) -> Value:
        try:
            return self._items[_identity(variable)][1]
        except (AttributeError, KeyError):
            raise KeyError(f"Variable {getattr(variable, 'name', variable)!r} has no average.") from None

    def __setitem__(self, variable: tf.Variable, value: Value) -> None:
        key = _identity(variable)
        self._items[key] = (self._items.get(key, (variable,))[0], value)

    def __delitem__(self, variable: tf.Variable) -> None:
        del self._items[_identity(variable)]

    def __contains__(self, variable: object) -> bool:
        return hasattr(variable, "_unique_id") and _identity(variable) in self._items

    def __iter__(self) -> Iterator[tf.Variable]:
        return (variable for variable, _ in self._items.values())

    def __len__(self) -> int:
        return len(self._items)


# Which variables are averaged.


@dataclasses.dataclass
class VariableSelection:
    """The variables that are averaged.

    Attributes:
      trainable_only: whether only trainable ones are averaged where a model is followed.
      tf_variables: makes TensorFlow's variables of the model's.
      trained: the variables that steps have trained so far, in their order.
      model: the model that is followed, None for none.
      is_fixed: whether lists of variables were given, or were when a file was written. Nothing else is
        averaged then.
      given: the variables of these lists.
    """

    trainable_only: bool
    tf_variables: Callable[[Iterable], List[tf.Variable]]
    trained: VariableMap[None] = dataclasses.field(default_factory=VariableMap)
    model: Any = None
    is_fixed: bool = False
    given: VariableMap[None] = dataclasses.field(default_factory=VariableMap)

    def __post_init__(self):
        if not isinstance(self.trainable_only, (bool, np.bool_)):
            raise TypeError(
                "Expected `trainable_weights_only` to be a bool. It comes before the decay here. "
                "TensorFlow Addons had `MovingAverage(optimizer, average_decay, ...)`, so write "
                "`ExponentialMovingAverage(optimizer, average_decay=0.999)`. Received: "
                f"trainable_weights_only={self.trainable_only!r}"
            )
        self.trainable_only = bool(self.trainable_only)

    def train(self, variables: Iterable[tf.Variable]) -> None:
        """Notes that these variables are trained."""
        for variable in variables:
            self.trained[variable] = None

    def fix(self, variables: Sequence[tf.Variable]) -> None:
        """Makes a list of variables the set, together with earlier lists.

        Raises:
          ValueError: if none of them can be averaged, or a model is followed already.
        """
        chosen = averageable(variables)
        if not chosen:
            raise ValueError(
                f"Expected floating-point or complex variables to average. Received: {variables!r}"
            )
        if self.model is not None and not self.is_fixed:
            raise ValueError(
                "A list of variables says what is averaged, and a model is followed already. Expected"
                " one or the other."
            )
        self.is_fixed = True
        for variable in chosen:
            self.given[variable] = None

    def wanted(self) -> List[tf.Variable]:
        """The variables that should have averages now.

        Raises:
          ValueError: if variables beside the trained ones are wanted, and no model is followed.
        """
        if self.is_fixed:
            return list(self.given)
        if self.model is None:
            if self.trained and not self.trainable_only:
                raise ValueError(
                    "With `trainable_weights_only=False` the averages of variables that no gradient "
                    "reaches must be known. Call `shadow_copy(model)` before training."
                )
            return averageable(self.trained)
        chosen = averageable([*self._model_variables(), *self.trained])
        return list(VariableMap((variable, None) for variable in chosen))

    def in_order(self) -> List[tf.Variable]:
        """The trained variables, or all of the model's where all are averaged, in a model's order."""
        others = [] if self.trainable_only or self.model is None else self._model_variables()
        return averageable(others or self.trained)

    def _model_variables(self) -> List[tf.Variable]:
        name = "trainable_variables" if self.trainable_only else "variables"
        try:
            found = getattr(self.model, name)
        except ValueError:  # A model of tf_keras that is not built. Some variables may exist, though.
            found = getattr(tf.Module, name).fget(self.model)
        return self.tf_variables(found)


# New variables beside others.


@contextlib.contextmanager
def _creation_scope(like: tf.Variable):
    """Where variables must be created to be distributed and placed like `like`."""
    with contextlib.ExitStack() as scopes:
        scopes.enter_context(tf.init_scope())
        strategy = strategy_of(like)
        if strategy is not None and not tf.distribute.has_strategy():
            scopes.enter_context(strategy.scope())
        current = tf.distribute.get_strategy()
        if not current.extended.variable_created_in_scope(like):
            raise ValueError(
                f"The average of variable {like.name!r} must be created under the strategy that the "
                f"variable was created under, {strategy}. The current one is {current}. Create the "
                "model and use its optimizer in the scope of one strategy."
            )
        scopes.enter_context(current.extended.colocate_vars_with(like))
        if not is_distributed(like):
            scopes.enter_context(tf.device(components(like)[0].device))
        yield


def _create(
    like: tf.Variable, device: Optional[str], value: Callable[[], tf.Tensor], **options
) -> tf.Variable:
    """Creates a variable distributed and placed like another, or a plain one on a device.

    A strategy's scope is that of a thread, and nothing public leaves one: plain ones need another thread.
    """
    create = functools.partial(tf.Variable, value, trainable=False, **options)

    def create_on_device() -> tf.Variable:
        with tf.device(device):
            return create()

    if device is not None:
        if is_remote(all_components(like)[0]):
            raise ValueError(
                f"Expected variables of this process, since `average_device` is {device!r}. Received: "
                f"{like.name!r} on {like.device!r}. Leave `average_device` out."
            )
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            return thread.submit(create_on_device).result()
    with _creation_scope(like):
        return create()


def create_like(
    like: tf.Variable, value: Callable[[], tf.Tensor], name: str, shape=None, device: Optional[str] = None
) -> tf.Variable:
    """Creates a variable that is the same on all replicas, and lives where `like` does or on a device."""
    first = tf.VariableAggregation.ONLY_FIRST_REPLICA
    return _create(like, device, value, name=name, shape=shape, aggregation=first)


def create_slot(
    variable: tf.Variable, dtype: tf.DType, owner: str, kind: str, device: Optional[str] = None
) -> tf.Variable:
    """Creates a variable shaped, placed, distributed and set like `variable`, on each replica.

    If a device is given it is a plain one there, unless each replica has a value of its own.
    """
    sources, is_set = all_components(variable), has_value(variable)
    on_read = tf.VariableSynchronization.ON_READ
    differs = is_distributed(variable) and variable.synchronization == on_read
    slot = _create(
        variable,
        None if differs else device,
        lambda: tf.cast(read(sources[0]), dtype) if is_set else tf.zeros(variable.shape, dtype),
        name=f"{owner}/{variable.name.split(':')[0]}/{kind}",
        shape=variable.shape,
        dtype=dtype,
        synchronization=variable.synchronization,
        aggregation=variable.aggregation,
    )
    # A replica's own value, which the others need not share. Buffers are shared until one is written to.
    for target, source in zip(all_components(slot), sources if is_set else []):
        assign(target, tf.cast(read(source), dtype))
    return slot
