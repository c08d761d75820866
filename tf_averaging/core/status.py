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
"""What is known of the averages: since when each runs, how many updates it holds, and where it is now.

All of it is kept in small variables that live where the averages do, one component for each replica, so
that every replica counts for itself and nothing is communicated.
"""

from __future__ import annotations

import functools
import gc
import operator
import uuid
import warnings
import weakref
from typing import TYPE_CHECKING, Iterable, Iterator, List, NamedTuple, Optional, Tuple, Union

import numpy as np
import tensorflow as tf

from tf_averaging.core import variables as core_variables
from tf_averaging.core.variables import VariableMap

if TYPE_CHECKING:
    from tf_averaging.core.averages import Averages

# A step or a count that is not known yet.
NOT_SET = -1
# A start that will be set later: no step comes that far.
NEVER = tf.int64.max

SWAPPED_ERROR = (
    "The averages are in the model and the weights in the slots (`weights_swapped` is True), so a step "
    "now would train the averages. Call `swap_weights()` first, or evaluate inside "
    "`with optimizer.swapped_weights():`."
)

ASSIGN_WHILE_SWAPPED_ERROR = (
    "The averages are in the model already (`weights_swapped` is True), and the weights are in the "
    "slots: they would be lost. Call `swap_weights()` first."
)

UPDATE_WHILE_SWAPPED_ERROR = (
    "The averages are in the model (`weights_swapped` is True), so an update by hand now would fold them "
    "into the weights. Call `swap_weights()` first, or `update_average` outside of `swapped_weights()`; "
    "in a callback, outside of `SwapAverageWeights(callbacks=...)` and before it."
)

SWAPPED_BY_ANOTHER_ERROR = (
    "The averages of another averaging optimizer are in variables that this one averages too: it would "
    "take them for weights, and swaps that interleave bring back the wrong ones. Call `swap_weights()` "
    "of that one first. To go on from its averages, call its `assign_average_vars(model.variables)` then."
)


def checked_count(name: str, value: int, minimum: int) -> int:
    """Returns `value` as an int, which must be at least `minimum` and fit into 64 bits."""
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
    if count > tf.int64.max:
        raise ValueError(f"Expected `{name}` <= {tf.int64.max}, an int64. Received: {name}={count}")
    return count


def chosen(choices: tuple, which: int):
    """One of the averaging optimizers that are side by side, the outermost first, by its place."""
    place = checked_count("which", which, minimum=0)
    if place >= len(choices):
        raise ValueError(
            f"Expected `which` from 0 to {len(choices) - 1}. Received: {place}, {choices[0]}"
        )
    return choices[place]


def checked_jit_compile(value: Union[bool, str]) -> Union[bool, str]:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if value != "auto":
        raise ValueError(f'Expected `jit_compile` to be a bool or "auto". Received: {value!r}')
    return value


def checked_average_dtype(value) -> Optional[tf.DType]:
    if value is None:
        return None
    dtype = tf.as_dtype(value)
    if not dtype.is_floating:
        raise ValueError(f"Expected `average_dtype` to be a floating-point dtype. Received: {value!r}")
    return dtype


def dtype_of_average(dtype: tf.DType, requested: Optional[tf.DType]) -> tf.DType:
    """The dtype for the average of a variable of `dtype`: never narrower."""
    if dtype.is_complex:
        return dtype
    if requested is None:
        # 8 or 11 significant bits lose most updates.
        return tf.float32 if dtype.size < tf.float32.size else dtype
    if requested.size == dtype.size and requested != dtype:
        return tf.float32  # float16 and bfloat16: neither holds the other.
    return requested if requested.size > dtype.size else dtype


def checked_device(value) -> Optional[str]:
    if value is not None and not isinstance(value, str):
        raise TypeError(f'Expected `average_device` to be a string such as "CPU:0". Received: {value!r}')
    try:
        known = value is None or tf.DeviceSpec.from_string(value).device_type is not None
    except ValueError:
        known = False
    if not known:
        raise ValueError(f'Expected `average_device` to name a device, as "CPU:0". Received: {value!r}')
    return value


def check_program_order() -> None:
    """Refuses graphs in which operations on variables do not run in the order of the program.

    Raises:
      RuntimeError: in a graph of TF 1 and in `tf.compat.v1.wrap_function`.
    """
    graph = around = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    while around is not None:  # AutoGraph tries loops out in a graph of its own, which never runs.
        # A private name: nothing public says it. `tests/private_names_test.py` fails if it goes away.
        if around._add_control_dependencies:
            return
        around = getattr(around, "outer_graph", None)
    if graph is not None:
        raise RuntimeError(
            "In graphs of TF 1 (`tf.compat.v1.Session`, `tf.compat.v1.wrap_function`) the order of "
            "weights and averages cannot be kept. Expected eager mode, or the call in a `tf.function`. "
            f"Received: {graph}"
        )


class Clock(NamedTuple):
    """The clock of one average.

    Attributes:
      began: the step of its first update, counted from 0; `NOT_SET` if it holds none.
      updates: how many updates it holds.
    """

    began: int = NOT_SET
    updates: int = 0


class _Batch(NamedTuple):
    """Variables that came together. `clocks` has shape [2, variables]: `began` above `updates`."""

    places: VariableMap[int]
    clocks: tf.Variable


class Status:
    """The clocks of the averages, and the flag that says whether they are swapped.

    A step knows which variables it averages when it is traced, but not their clocks, which a restore may
    change. Therefore clocks are values of variables: one vector for all variables that came before a step
    needed them, another for those that came later, which that step does not know.

    Attributes:
      first_step: a start that was set by `begin`, or `NOT_SET`: int64 scalar.
      swapped: whether averages and weights are exchanged: bool scalar.
      guard: bool vector, of length 1 while they are and 0 otherwise. XLA drops assertions, but checks
        lengths. None on parameter servers, which cannot store a value of varying length, and where XLA
        does not run.
    """

    def __init__(self, like: tf.Variable, first_step: int, name: str, device: Optional[str] = None):
        """Creates the variables where `like` lives, or on a device; their names begin with `name`."""
        self._name, self._create_like = name, functools.partial(core_variables.create_like, device=device)
        self.first_step = self._create_like(like, lambda: np.int64(first_step), f"{name}/first_step")
        if device:  # TensorFlow takes another one without a word.
            placed = tf.DeviceSpec.from_string(self.first_step.handle.device)
            if placed.make_merged_spec(tf.DeviceSpec.from_string(device)) != placed:
                warnings.warn(f"No {device!r}: the averages are on {placed.to_string()}.", stacklevel=2)
        self.swapped = self._create_like(like, lambda: tf.zeros([], tf.bool), f"{name}/swapped")
        self.guard: Optional[tf.Variable] = None
        self.section: Optional[tf.CriticalSection] = None
        if core_variables.is_on_parameter_server(core_variables.components(like)[0]):
            self.section = _create_section(self.first_step)
        else:
            self.guard = self._create_like(
                like, lambda: tf.zeros([0], tf.bool), f"{name}/guard", shape=tf.TensorShape([None])
            )
        self._batches: List[_Batch] = []
        self._unplaced: VariableMap[Clock] = VariableMap()
        self._is_traced = False

    # Clocks.

    def add(self, variable: tf.Variable) -> None:
        """Adds a variable whose average holds no updates."""
        self._unplaced[variable] = Clock()

    def order(self, variables: Iterable[tf.Variable]) -> None:
        """Gives all variables a place, these first, unless a traced step knows another order."""
        placed = [] if self._is_traced else self._placed()
        known = VariableMap((variable, None) for variable in [*placed, *self._unplaced])
        wanted = VariableMap((v, None) for v in [*(v for v in variables if v in known), *known])
        in_one_batch = not placed or (len(self._batches) == 1 and not self._unplaced)
        if not in_one_batch or list(map(id, wanted)) != list(map(id, known)):
            clocks = [(variable, self.clock(variable)) for variable in wanted]
            self._batches = self._batches if self._is_traced else []
            self._unplaced = VariableMap(clocks)
        self._place()

    def has_unplaced(self) -> bool:
        """Whether there are variables that `order` has not seen."""
        return len(self._unplaced) > 0

    def keep_only(self, variables: VariableMap) -> None:
        """Forgets the clocks of all others."""
        known = [*self._placed(), *self._unplaced]
        kept = [(variable, self.clock(variable)) for variable in known if variable in variables]
        if len(kept) == len(known):
            return
        if self._is_traced:
            raise ValueError(
                "A step that was traced before averages more variables than the file has averages for. "
                "Load the file into a new optimizer, before it is trained."
            )
        self._batches, self._unplaced = [], VariableMap(kept)

    def variables(self) -> List[tf.Variable]:
        """The variables that have clocks, in the order of the vectors below."""
        self._place()
        return self._placed()

    def clock_variables(self) -> List[tf.Variable]:
        """The variables in which the clocks are kept, int64, of shape [2, variables]."""
        self._place()
        return [batch.clocks for batch in self._batches]

    def _placed(self) -> List[tf.Variable]:
        return [variable for batch in self._batches for variable in batch.places]

    def _place(self) -> None:
        """Gives the variables that are new since the last call a place in a vector."""
        self._is_traced = self._is_traced or not tf.executing_eagerly()
        if not self._unplaced:
            return
        values = np.array(list(self._unplaced.values()), np.int64).T
        name = f"{self._name}/clocks_{len(self._batches)}"  # `.h5` files need names that differ.
        clocks = self._create_like(self.first_step, lambda: tf.constant(values), name)
        places = VariableMap((variable, place) for place, variable in enumerate(self._unplaced))
        self._batches.append(_Batch(places, clocks))
        self._unplaced = VariableMap()

    def clock(self, variable: tf.Variable) -> Clock:
        """The clock of one variable (eager mode)."""
        if variable in self._unplaced:
            return self._unplaced[variable]
        return Clock(*map(int, self.clock_value(variable).numpy()))

    def clock_value(self, variable: tf.Variable) -> tf.Tensor:
        """The same as an int64 tensor of shape [2]."""
        self._place()
        clocks, place = self._place_of(variable)
        return core_variables.read_here(clocks)[:, place]

    def set_clock(self, variable: tf.Variable, clock: Clock) -> None:
        """Sets the clock of one variable, on all replicas (eager mode)."""
        if variable in self._unplaced:
            self._unplaced[variable] = clock
            return
        clocks, place = self._place_of(variable)
        value = core_variables.read(core_variables.all_components(clocks)[0]).numpy().copy()
        value[:, place] = clock
        core_variables.assign_everywhere(clocks, value)

    def _place_of(self, variable: tf.Variable) -> Tuple[tf.Variable, int]:
        for batch in self._batches:
            if variable in batch.places:
                return batch.clocks, batch.places[variable]
        raise KeyError(f"Variable {variable.name!r} has no average.")

    def updates(self) -> tf.Tensor:
        """How many updates each average holds: int64 vector."""
        return self._clocks()[1]

    def steps(self, step: tf.Tensor) -> tf.Tensor:
        """For each average how many steps before `step` (scalar int64 tensor) it began: int64 vector."""
        began = self._clocks()[0]
        with self.device():
            return tf.where(began < 0, tf.zeros([], tf.int64), tf.maximum(step - began, 0))

    def _clocks(self) -> List[tf.Tensor]:
        with self.device():
            vectors = [core_variables.read_here(clocks) for clocks in self.clock_variables()]
            return tf.unstack(vectors[0] if len(vectors) == 1 else tf.concat(vectors, axis=1))

    def device(self):
        """Where the clocks are: on a parameter server nothing is sent to the worker."""
        return tf.device(core_variables.components(self.first_step)[0].device)

    def is_valid(self) -> tf.Tensor:
        """True, which TensorFlow cannot know before it runs: scalar bool tensor."""
        return core_variables.read_here(self.first_step) >= NOT_SET

    def count(self, step: tf.Tensor, due: Union[bool, tf.Tensor]) -> list:
        """Counts an update of all averages at `step` (scalar int64 tensor), if one is due.

        Returns:
          The operations.
        """
        operations = []
        with self.device():
            for clocks in self.clock_variables():
                before = core_variables.read_here(clocks)
                began, updates = tf.unstack(before)
                after = tf.stack([tf.where(tf.equal(updates, 0), step, began), updates + 1])
                counted = after if due is True else tf.where(due, after, before)
                operations += core_variables.assign_here(clocks, counted)
        return operations

    def forget_all(self) -> None:
        """Sets everything to what it is before the first update (eager mode)."""
        self.set_swapped_everywhere(False)
        for variable in self._unplaced:
            self._unplaced[variable] = Clock()
        for batch in self._batches:
            core_variables.assign_everywhere(batch.clocks, np.array([Clock()] * len(batch.places)).T)

    # The start.

    def begin(self, step: int) -> None:
        """Makes `step` the first one that is averaged. This is state, saved with the averages."""
        core_variables.assign_everywhere(self.first_step, tf.constant(step, tf.int64))

    def begins_at(self) -> Union[int, tf.Tensor]:
        """The step that `begin` got, here or before a checkpoint was written.

        Returns:
          `NOT_SET`, or an int; in graphs a scalar int64 tensor.
        """
        with tf.init_scope():
            step = int(core_variables.read(core_variables.all_components(self.first_step)[0]))
        if step == NOT_SET or tf.executing_eagerly():
            return step
        return core_variables.read_here(self.first_step)

    # The swapped flag.

    def is_swapped(self) -> tf.Tensor:
        """Whether averages and weights are exchanged now: scalar bool tensor."""
        return core_variables.read_here(self.swapped)

    def set_swapped(self, value: tf.Tensor) -> None:
        """Sets the flag to a scalar bool tensor, on the components that this context may touch."""
        core_variables.assign_here(self.swapped, value)
        if self.guard is not None:
            core_variables.assign_here(self.guard, _guard_value(value))

    def set_swapped_everywhere(self, value: bool) -> None:
        """Sets the flag on all replicas (eager mode)."""
        core_variables.assign_everywhere(self.swapped, tf.constant(value))
        if self.guard is not None:
            core_variables.assign_everywhere(self.guard, _guard_value(tf.constant(value)))

    def check_not_swapped(self, message: str = SWAPPED_ERROR) -> Optional[tf.Operation]:
        """Fails when it runs while averages and weights are exchanged.

        Args:
          message: what the error says.

        Returns:
          None, or in graphs the operation that a step must depend on.

        Raises:
          tf.errors.InvalidArgumentError: in eager mode, at once.
        """
        if tf.executing_eagerly():
            if self.is_swapped():
                raise tf.errors.InvalidArgumentError(None, None, message)
            return None
        if self.guard is None:
            return tf.debugging.Assert(tf.logical_not(self.is_swapped()), [message])
        component = core_variables.components(self.guard)[0]
        with tf.device(component.device):
            length = tf.raw_ops.VariableShape(input=component.handle)
        asserted = tf.raw_ops.Assert(condition=tf.reduce_all(tf.equal(length, 0)), data=[message])
        # XLA drops the assertion. There is no vector of length -1, though, and the name of the operation
        # is in XLA's message. The value is assigned back so that the check is not pruned. What states the
        # length outright (`tf.ensure_shape`, the assignment of a constant) would tell TensorFlow that the
        # flag is never set in this graph: it would leave out later checks and swaps.
        with tf.control_dependencies([asserted]), tf.device(component.device):
            empty = tf.fill(-length, True, name="training_step_while_swapped__call_swap_weights_first")
        return core_variables.assign(component, empty)


def _create_section(like: tf.Variable) -> tf.CriticalSection:
    """Creates what lets one worker at a time do its work, where `like` lives."""
    with tf.init_scope(), tf.device(like.device):
        # Unless told otherwise, all critical sections of a server are one.
        return tf.CriticalSection(shared_name=uuid.uuid4().hex)


def _guard_value(swapped: tf.Tensor) -> tf.Tensor:
    return tf.fill([tf.cast(swapped, tf.int32)], True)


# Two sets of averages of one variable. All of them, as long as they exist:

ALL: weakref.WeakSet[Averages] = weakref.WeakSet()


def check_others(averages: Averages) -> list:
    """Fails if other averages are in the variables of these; in graphs the operations that do so."""
    if not tf.executing_eagerly():
        return [o.status.check_not_swapped(SWAPPED_BY_ANOTHER_ERROR) for o in others(averages)]
    if any(other.is_swapped() for other in others(averages)):
        gc.collect()  # One that nobody can reach will not swap back. This takes time, but then only.
        for other in others(averages):
            other.status.check_not_swapped(SWAPPED_BY_ANOTHER_ERROR)
    return []


def averages_of(variables: Iterable[tf.Variable]) -> Iterator[Averages]:
    """All averages of some of these variables, whosever they are."""
    variables = list(variables)
    for averages in list(ALL):
        if any(variable in averages.slots for variable in variables):
            yield averages


def others(averages: Averages) -> Iterator[Averages]:
    """Those that average some of the same variables."""
    return (other for other in averages_of(averages.slots) if other is not averages)
