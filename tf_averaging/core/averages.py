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
"""The averages of a set of variables: slots beside them, read, exchanged and assigned."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable, Container, Iterable, List, Optional, Sequence, Tuple, TypeVar, Union

import tensorflow as tf

from tf_averaging.core import exchange
from tf_averaging.core import fold
from tf_averaging.core import variables as core_variables
from tf_averaging.core.fold import Pair
from tf_averaging.core.fold import for_each_pair
from tf_averaging.core.rows import Rows
from tf_averaging.core.rows import can_wait
from tf_averaging.core.status import ALL
from tf_averaging.core.status import ASSIGN_WHILE_SWAPPED_ERROR
from tf_averaging.core.status import NOT_SET
from tf_averaging.core.status import Clock
from tf_averaging.core.status import Status
from tf_averaging.core.status import check_others
from tf_averaging.core.status import check_program_order
from tf_averaging.core.status import checked_average_dtype
from tf_averaging.core.status import checked_device
from tf_averaging.core.status import checked_jit_compile
from tf_averaging.core.status import dtype_of_average
from tf_averaging.core.status import others
from tf_averaging.core.swapped_contexts import SwappedContext
from tf_averaging.core.swapped_contexts import SwappedContexts
from tf_averaging.core.variables import VariableMap
from tf_averaging.core.variables import components

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Slots:
    """What is kept for one variable of the model.

    Attributes:
      variable: the model's.
      kind: the slot's name in a checkpoint: `"average"`, or `"exchanged"` for a value that is exchanged
        with the variable's, but that nothing is folded into.
      average: its average; while swapped, the weights.
      stash: the place for the weights while swapped, where the average has another dtype than the
        variable; otherwise None.
    """

    variable: tf.Variable
    kind: str
    average: tf.Variable
    stash: Optional[tf.Variable]


@dataclasses.dataclass(eq=False)
class Averages:
    """The averages of a set of variables.

    While an average holds no updates it *is* the current weights: its slot is brought up to date before
    anybody looks (`refresh`). So are the rows of large tables, which wait until they move.

    All variables here live where the model's do: in the same strategy, with one component for each
    replica, on the same devices. Methods work on the components that their context may touch.

    Attributes:
      average_dtype: a floating-point dtype for averages of variables that are narrower; None for float32
        averages of float16 and bfloat16 variables.
      jit_compile: whether XLA compiles the update: `"auto"` for large variables, or a bool.
      name: the names of all variables here begin with it.
      device: where all variables here live; None for each beside its variable of the model.
      slots: what is kept for each variable.
      status: clocks, count and flag; None until there are slots.
      when_added: called with the variables that got averages, whoever asked for them.
      on_devices: does work on all averages of a device.
      rows: for each average its rows, which wait; None for one that is always updated as a whole.
      contexts: the open contexts in which the model holds the averages.
      exchanged_at: how many updates there were when values to exchange were last added.
      left: a checksum of the averages that `leave` left in the model; None if nothing is known of them.
    """

    average_dtype: Optional[tf.DType] = None
    jit_compile: Union[bool, str] = "auto"
    name: str = "averages"
    device: Optional[str] = None
    slots: VariableMap[Slots] = dataclasses.field(default_factory=VariableMap)
    status: Any = None  # A `Status`.
    when_added: List[Callable[[List[tf.Variable]], None]] = dataclasses.field(default_factory=list)
    on_devices: fold.DeviceFunctions = dataclasses.field(default_factory=fold.DeviceFunctions)
    rows: VariableMap[Optional[Rows]] = dataclasses.field(default_factory=VariableMap)
    exchanged_at: int = 0
    left: Optional[int] = None
    _first_step: int = NOT_SET

    def __post_init__(self):
        self.average_dtype = checked_average_dtype(self.average_dtype)
        self.jit_compile = checked_jit_compile(self.jit_compile)
        self.device = checked_device(self.device)
        ALL.add(self)
        self.contexts = SwappedContexts(lambda: bool(self.is_swapped()), lambda: self.once(self.swap))

    def __len__(self) -> int:
        return len(self.slots)

    # Which variables have averages.

    def add(self, variables: Iterable[tf.Variable], kind: str = "average") -> List[tf.Variable]:
        """Gives a slot of this kind, equal to its value now, to each variable that has none yet.

        Returns:
          The variables that had none.
        """
        new = [variable for variable in variables if variable not in self.slots]
        if not new:
            return new
        check_program_order()
        with tf.init_scope():
            self.create_status(new[0])
            for variable in new:
                self.slots[variable] = self._create_slots(variable, kind)
                if kind == "average":
                    self.status.add(variable)
            for callback in self.when_added:
                callback(new)
        return new

    def create(self, selection: core_variables.VariableSelection) -> bool:
        """Creates the averages that are wanted and missing; whether there were any."""
        check_program_order()
        added = bool(self.add(selection.wanted()))
        if added or (self.status is not None and self.status.has_unplaced()):
            self.order(selection.in_order())
        return added

    def create_status(self, like: Optional[tf.Variable]) -> Status:
        """Returns the status, created where `like` lives if there is none yet."""
        if self.status is None:
            self.status = Status(like, self._first_step, self.name, self.device)
        return self.status

    def _create_slots(self, variable: tf.Variable, kind: str) -> Slots:
        dtype = core_variables.stored_dtype(variable)
        average_dtype = dtype_of_average(dtype, self.average_dtype) if kind == "average" else dtype
        create = functools.partial(
            core_variables.create_slot, variable, owner=self.name, device=self.device
        )
        stash = create(dtype, kind="stash") if average_dtype != dtype else None
        return Slots(variable, kind, create(average_dtype, kind="average"), stash)

    def needs_stash(self, variable: tf.Variable) -> bool:
        """Whether the variable's average has, or would have, another dtype."""
        dtype = core_variables.stored_dtype(variable)
        return dtype_of_average(dtype, self.average_dtype) != dtype

    def keep_only(self, variables: Iterable[tf.Variable]) -> None:
        """Forgets the averages of all other variables; a ValueError if a traced step needs them."""
        kept = VariableMap((v, self.slots[v]) for v in variables if v in self.slots)
        if self.status is not None:
            self.status.keep_only(kept)
        self.slots = VariableMap((v, s) for v, s in self.slots.items() if v in kept)
        self.rows = VariableMap((v, r) for v, r in self.rows.items() if v in kept)

    def order(self, variables: Iterable[tf.Variable]) -> None:
        """Gives clocks that have no place yet one, in the order of these variables, which come first.

        What is saved by position must depend on the model alone, and not on the order in which a restore
        happened to create the averages.
        """
        if self.status is not None:
            self.status.order(variables)

    def averaged(self) -> List[Slots]:
        """The slots that are folded into, in the order of the clocks."""
        return [] if self.status is None else [self.slots[v] for v in self.status.variables()]

    def are_shared_by_replicas(self) -> bool:
        """Whether the replicas of the context have one set of averages between them."""
        return (
            core_variables.in_replica_context()
            and tf.distribute.get_strategy().num_replicas_in_sync > 1
            and self.status is not None
            and not core_variables.is_distributed(self.status.first_step)
        )

    def once(self, work: Callable[[], Value]) -> Value:
        """Calls `work` here, or once for all replicas where they share the averages."""
        if self.are_shared_by_replicas():
            shared = core_variables.as_written(lambda _: work())
            return tf.distribute.get_replica_context().merge_call(shared)
        return work()

    # Looking.

    def slot(self, variable: Any) -> Any:
        """The slot of a variable, brought up to date. It holds the weights while swapped."""
        if isinstance(variable, core_variables.ShardedVariable):
            return core_variables.ShardedVariable([self.slot(shard) for shard in variable.variables])
        if tf.executing_eagerly() and not core_variables.in_replica_context():
            self.refresh()
        average = self.slots[variable].average
        self.hold([variable])
        return average

    def num_averaged(self) -> tf.Tensor:
        """How many updates the average holds that has most: scalar int64 tensor."""
        if self.status is None or not self.averaged():
            return tf.zeros([], tf.int64)
        return tf.reduce_max(self.status.updates())

    def is_swapped(self) -> tf.Tensor:
        """Whether averages and weights are exchanged now: scalar bool tensor."""
        return tf.constant(False) if self.status is None else self.status.is_swapped()

    def are_begun(self) -> bool:
        """Whether each average holds an update (eager mode)."""
        return not self.averaged() or bool(tf.reduce_all(self.status.updates() > 0))

    def refresh(self) -> List[tf.Tensor]:
        """Brings the averages up to date; returns what must run before they are used."""
        return [*self.follow_weights(), *self.catch_up()]

    def follow_weights(self) -> List[tf.Tensor]:
        """The same for averages that hold no updates: they are the current weights, unless swapped."""
        if not self.averaged():
            return []
        empty = tf.logical_and(tf.equal(self.status.updates(), 0), tf.logical_not(self.is_swapped()))
        if not tf.executing_eagerly():
            return self.copy_weights(empty)
        if tf.reduce_any(empty):
            pairs, places = self.pairs()
            core_variables.copy(pair for pair, place in zip(pairs, places) if empty[place])
        return []

    def copy_weights(self, chosen: tf.Tensor) -> List[tf.Tensor]:
        """In a graph, sets the averages that `chosen` (bool vector) selects to the weights."""
        pairs, places = self.pairs()
        weights = tf.cast(for_each_pair(chosen, places), tf.float64)
        if fold.is_compiled_whole():  # A conditional would cost XLA as much.
            return self.on_devices(pairs, [fold.copy_chosen], None, weights)
        works = [fold.nothing, fold.copy_chosen]
        return self.on_devices(pairs, works, tf.cast(tf.reduce_any(chosen), tf.int32), weights)

    def pairs(self, without: Container = ()) -> Tuple[List[Pair], List[int]]:
        """Averages and variables as components, and for each pair the place of its clock."""
        self._settle()
        found = [
            (pair, place)
            for place, slots in enumerate(self.averaged())
            if slots.variable not in without
            for pair in zip(components(slots.average), components(slots.variable))
        ]
        return [pair for pair, _ in found], [place for _, place in found]

    def read(self, variable: tf.Variable) -> tf.Tensor:
        """The average of `variable`, wherever it is: in its slot or the model. It changes nothing."""
        if isinstance(variable, core_variables.ShardedVariable):
            return tf.concat([self.read(shard) for shard in variable.variables], axis=0)
        self._settle()
        slots, rows = self.slots[variable], self.rows.get(variable)
        # In this order: a step on another thread may come between. And both are read in any case: across
        # replicas that may take all of them, which a conditional must not.
        in_model, swapped = core_variables.value(slots.variable), self.is_swapped()
        # An average of another dtype stays in its slot while it is shown.
        is_in_model = swapped if slots.stash is None else tf.constant(False)
        if slots.kind == "average":
            is_empty = tf.equal(self.status.clock_value(variable)[1], 0)
            is_in_model |= tf.logical_and(is_empty, tf.logical_not(swapped))
        in_slot = tf.convert_to_tensor(slots.average) if rows is None else rows.value()
        return tf.where(is_in_model, tf.cast(in_model, in_slot.dtype), in_slot)

    def load(self, slots: Slots, average: Any, stash: Optional[Any], clock: Clock) -> None:
        """Sets the slots of one variable to arrays, and its clock (eager mode)."""
        slots.average.assign(tf.cast(average, slots.average.dtype))
        if slots.stash is not None and stash is not None:
            slots.stash.assign(tf.cast(stash, slots.stash.dtype))
        if rows := self.rows.get(slots.variable):
            rows.forget()
        self.status.set_clock(slots.variable, clock)

    def set_status(self, swapped: bool, first_step: int, like: Optional[tf.Variable] = None) -> None:
        """Sets the flag and the first step (eager mode), on all replicas.

        Args:
          swapped: see `Status`.
          first_step: int.
          like: where the status lives if there is none yet; None leaves it so.
        """
        self.begin(first_step)
        if self.status is not None or like is not None:
            self.create_status(like)
            self.set_swapped(swapped)

    def set_swapped(self, swapped: bool) -> None:
        """Sets the flag as a file has it (eager mode), on all replicas."""
        self.status.set_swapped_everywhere(swapped)
        self.contexts.before = swapped
        self.left = None

    # Rows that wait.

    def let_rows_wait(self, variables: Iterable[tf.Variable]) -> None:
        """Lets the rows of these averages wait, where nothing was traced or given away before."""
        for variable in variables:
            slots = self.slots.get(variable)
            if slots is not None and variable not in self.rows:
                waits = slots.kind == "average" and can_wait(variable, slots.average)
                self.rows[variable] = Rows(variable, slots.average, self.jit_compile) if waits else None

    def waiting(self) -> List[Tuple[tf.Variable, Rows]]:
        """The variables with averages whose rows may be behind."""
        return [(variable, rows) for variable, rows in self.rows.items() if rows is not None]

    def catch_up(self) -> List[tf.Tensor]:
        """Catches up all rows; returns what must run before the averages are used."""
        self._settle()
        return [done for _, rows in self.waiting() for done in rows.catch_up()]

    def catch_up_others(self) -> List[tf.Tensor]:
        """The same for other averages of these variables, which are going to change."""
        if tf.executing_eagerly() and not any(averages.waiting() for averages in list(ALL)):
            return []  # It takes time to look for those of the same variables.
        return [done for other in others(self) for done in other.catch_up()]

    def hold(self, variables: Iterable[tf.Variable]) -> None:
        """Lets nothing wait in these averages: their slots are given away."""
        for rows in [self.rows.setdefault(variable, None) for variable in variables]:
            if rows is not None:
                rows.hold()

    def _settle(self) -> None:
        """While a graph is built, lets the averages that it may use be as it finds them."""
        for slots in [] if tf.executing_eagerly() else self.averaged():
            self.rows.setdefault(slots.variable, None)

    # Exchanging.

    def swap(self) -> None:
        """Exchanges weights and averages. Ctrl-C finds either all variables exchanged or none."""
        refreshed = [*check_others(self), *self.refresh(), *self.catch_up_others()]
        exchange.warn_of_strangers(self)
        self.left = None
        if tf.executing_eagerly() and not core_variables.in_replica_context():
            exchange.finish(lambda: exchange.exchange_all(self))
            return
        with core_variables.after(*refreshed):
            exchange.exchange_all(self)

    def swapped(self, value: Value) -> SwappedContext[Value]:
        """A context in which the model holds the averages, and whose `as` gives `value`."""
        if not tf.executing_eagerly():
            error = "`swapped_weights` cannot guard what a graph does: call the `tf.function` in it."
            raise RuntimeError(error)
        return SwappedContext(self.contexts, value)

    def assign(self, variables: Sequence[tf.Variable]) -> None:
        """Sets each variable that has an average to it; must not run while swapped."""
        chosen = [self.slots[variable] for variable in variables if variable in self.slots]
        if not chosen:
            raise ValueError(
                "Expected a list with variables that have averages, such as `model.variables`. Received "
                f"a list in which none has one: {[variable.name for variable in variables]}"
            )
        checked = self.status.check_not_swapped(ASSIGN_WHILE_SWAPPED_ERROR)
        with (
            core_variables.after(checked),
            core_variables.after(*self.refresh(), *self.catch_up_others()),
        ):
            for slots in chosen:
                core_variables.copy(zip(components(slots.variable), components(slots.average)))
                exchange.share(slots.variable, slots.average)

    # Left in the model (eager mode).

    def leave(self) -> None:
        """Notes what the model holds, which are the averages."""
        self.left = exchange.checksum(self.slots)

    def were_loaded(self) -> bool:
        """Whether the model holds something else than `leave` noted."""
        return self.left is not None and self.left != exchange.checksum(self.slots)

    def take_up(self) -> bool:
        """Starts anew from what was loaded into the model since `leave`; whether there was anything."""
        loaded = self.were_loaded()
        if loaded:
            self.start_over()
        self.left = None
        return loaded

    # The start, and starting anew (eager mode).

    def begin(self, step: int) -> None:
        """Makes `step` the first one that is averaged. This is state: it is saved with the averages."""
        self._first_step = step
        if self.status is not None:
            self.status.begin(step)

    def begins_at(self, default: int) -> Union[int, tf.Tensor]:
        """The step that `begin` got, here or before a checkpoint was written, else `default`.

        Returns:
          An int; in graphs that are built after `begin`, a scalar int64 tensor.
        """
        step = self._first_step if self.status is None else self.status.begins_at()
        return default if isinstance(step, int) and step == NOT_SET else step

    def reset(self, variables: Optional[Iterable[tf.Variable]]) -> None:
        """`start_over`, which must not run while swapped."""
        if self.contexts.number or bool(self.is_swapped()):
            raise RuntimeError(
                "The averages are in the model (`weights_swapped` is True), or a `swapped_weights()` "
                "context is open. Call `swap_weights()` first, or leave the context."
            )
        self.start_over(variables)

    def start_over(self, variables: Optional[Iterable[tf.Variable]] = None) -> None:
        """Sets averages to the current weights, as if nothing had been folded in.

        Args:
          variables: whose averages; None for all, and everything else with them.
        """
        if self.status is None:
            return
        self.exchanged_at = 0
        chosen = list(self.slots.values()) if variables is None else [self.slots[v] for v in variables]
        for slots in chosen:
            for slot in (slots.average, slots.stash):
                if slot is not None:
                    parts = map(core_variables.all_components, (slot, slots.variable))
                    core_variables.copy(zip(*parts))
            if rows := self.rows.get(slots.variable):
                rows.forget()
            if variables is not None and slots.kind == "average":
                self.status.set_clock(slots.variable, Clock())
        if variables is None:
            self.status.forget_all()
