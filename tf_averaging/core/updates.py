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
"""Updates of averages around the steps of another optimizer: which are due, and what is done then."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any, Callable, List, Optional, Sequence, Tuple, Union

import tensorflow as tf

from tf_averaging.core import fold
from tf_averaging.core import variables as core_variables
from tf_averaging.core.averages import Averages
from tf_averaging.core.fold import for_each_pair
from tf_averaging.core.rows import Moving
from tf_averaging.core.rows import Rows
from tf_averaging.core.status import NEVER
from tf_averaging.core.status import NOT_SET
from tf_averaging.core.status import check_others
from tf_averaging.core.status import check_program_order
from tf_averaging.core.variables import VariableMap
from tf_averaging.core.variables import VariableSelection
from tf_averaging.core.variables import after

# The rows that a step moves, by variable.
_Moving = VariableMap[Tuple[Rows, Moving]]


@dataclasses.dataclass(eq=False)
class Updates:
    """The updates of an optimizer's averages.

    Attributes:
      averages: what is updated.
      unclaimed: what was loaded for variables that are not known yet. No step is taken before they are.
      selection: which variables have averages.
      start: the first step on which an update is due, unless the averages know another one.
      period: the number of steps from one update to the next; None for no updates but those by hand.
      averaging_weight: gets for each average how many steps ago it began and how many updates it holds
        (int64 vectors), and returns how much the weights count, in any shape and float dtype that
        broadcasts to that.
      average_op: if given, returns an average's new value from the variable's and the average's.
      weight: while `average_op` is called, returns the weight of the variables in this average: float64.
    """

    averages: Averages
    unclaimed: Any
    selection: VariableSelection
    start: int
    period: Optional[int]
    averaging_weight: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
    average_op: Optional[Callable[[tf.Tensor, tf.Tensor], tf.Tensor]] = None
    weight: Optional[Callable[[], tf.Tensor]] = None

    def around(
        self,
        variables: Sequence[tf.Variable],
        gradients: List[Optional[tf.Tensor]],
        steps_taken: Callable[[], tf.Tensor],
        take_step: Callable[[list], object],
        moves_weights: Union[bool, tf.Tensor] = True,
        moved_rows: Sequence[Tuple[tf.Variable, Optional[tf.Tensor]]] = (),
    ):
        """Takes the inner optimizer's step, then updates the averages if that is due.

        Args:
          variables: TensorFlow's, which the step trains.
          gradients: of these variables; None where there is none.
          steps_taken: returns the number of steps taken, scalar int64 tensor.
          take_step: takes the step, given the gradients that wait for what must come before.
          moves_weights: whether the step moves weights. One that accumulates gradients does not.
          moved_rows: for variables of which the step moves some rows alone, the indices of these (int
            vector, with or without duplicates); None for no row.

        Returns:
          What `take_step` returns.
        """
        check_program_order()
        if self.unclaimed.saved:
            self.unclaimed.check()
        is_traced = not tf.executing_eagerly()
        with tf.init_scope():
            self.selection.train(variables)
            if self.averages.create(self.selection) or is_traced:
                check_others(self.averages)
        if not self.averages:
            return take_step(gradients)
        fold.check_compiles(self.averages.device)
        step = steps_taken()
        due = self.is_due(step, moves_weights)
        assert self.averages.status is not None
        trained = VariableMap((v, None) for v in core_variables.averageable(variables))
        with after(self.averages.status.check_not_swapped(), *self.averages.catch_up_others()):
            moving, ready = self._about_to_move(variables, moved_rows)
            begun = [] if due is False else self.averages.once(lambda: self._begin(due, trained))
            with after(*begun, *ready):
                result = take_step(_waiting(gradients))
        with after(result):
            if due is not False:
                weight, average_op = self.averaging_weight, self.average_op
                self.averages.once(lambda: self._fold(due, step, weight, average_op, moving, trained))
            else:
                for rows, moved in moving.values():
                    rows.fold(moved, tf.zeros([], tf.float64))
        return result

    def by_hand(self, weight: Any, step: tf.Tensor) -> None:
        """Updates the averages, which must not be in the model, as for the step after `step` others.

        `weight` (number) may replace the scheme's. If all updates are by hand, each counts as a step.
        """
        checked = None if weight is None else _check_in_range(weight)
        averaging_weight = (
            self.averaging_weight
            if weight is None
            else lambda steps, updates: tf.cast(weight, tf.float64)
        )
        average_op = self.average_op if weight is None else None

        def update() -> None:
            if weight is None:
                self._first_update_forgets()
            # All rows: weights that are loaded before each update count as a whole.
            with after(checked), after(*self._begin_now(True), *self.averages.catch_up()):
                self._fold(True, step, averaging_weight, average_op, _Moving())

        self.averages.once(update)

    def interpolate(self, variable: tf.Tensor, average: tf.Tensor) -> tf.Tensor:
        """What an `average_op` may use: the interpolation with `averaging_weight`."""
        assert self.weight is not None
        weight = self.weight()
        new = average + tf.cast(weight, average.dtype) * (variable - average)
        return tf.where(tf.equal(weight, 1.0), variable, new)

    def begin(self, step: int) -> None:
        """Makes `step` the first one that is averaged, unless one was set before that is not `NEVER`.

        Raises:
          ValueError: if there is a start already, or averaging has begun.
        """
        if self.start:
            raise ValueError(
                f"The optimizer was given a start in steps already, {self.start}. Expected that or a "
                f"start by epoch, not both. Received: step={step}"
            )
        if self.averages.begins_at(NOT_SET) not in (NOT_SET, NEVER):
            return
        updates = int(self.averages.num_averaged())
        if updates > 0:
            raise ValueError(
                "Averaging has begun already, so its start cannot be moved. Expected an optimizer that "
                f"has averaged nothing yet. Received: one with num_averaged={updates}"
            )
        self.averages.refresh()
        self.averages.begin(step)

    def warn_if_empty(self, step: tf.Tensor) -> None:
        """Warns if `step` steps were taken, and the averages are the weights all the same."""
        if not tf.executing_eagerly() or core_variables.in_replica_context():
            return
        if int(step) and not int(self.averages.num_averaged()):
            start = self.averages.begins_at(self.start)
            when = "by hand alone" if self.period is None else f"from step {start} on"
            warnings.warn(
                f"The averages hold no updates after {int(step)} steps: they are the weights themselves. "
                f"Updates are made {when}.",
                stacklevel=4,
            )

    def due_in(self, steps: int) -> int:
        """How many updates are due in the first `steps` steps."""
        if self.period is None:
            return 0
        return max((steps - 1 - int(self.averages.begins_at(self.start))) // self.period + 1, 0)

    def is_due(self, step: tf.Tensor, moves_weights: Union[bool, tf.Tensor]) -> Union[bool, tf.Tensor]:
        """Whether an update is due after `step` others: a bool where that is known while tracing."""
        if self.period is None:
            return False
        start = self.averages.begins_at(self.start)
        conditions = [] if moves_weights is True else [moves_weights]
        if isinstance(start, tf.Tensor) or start > 0:
            conditions.append(step >= start)
        if self.period > 1:
            conditions.append(tf.equal((step - start) % self.period, 0))
        due = functools.reduce(tf.logical_and, conditions) if conditions else True
        return bool(due) if tf.executing_eagerly() else due

    # Before a step.

    def _begin(self, due: Union[bool, tf.Tensor], trained: VariableMap) -> List[tf.Tensor]:
        """An average whose first update is due begins from the weights before the step.

        This happens once, so a step does not look for it where that can be helped: while a step is traced
        the averages are brought up to date, and from the first step on they are updated.

        Returns:
          What the step must wait for.
        """
        averages = self.averages
        if tf.executing_eagerly():
            if not averages.are_begun():
                self._first_update_forgets()
                averages.refresh()
            return []
        if self._first_update_forgets():
            return []
        with tf.init_scope():
            averages.refresh()
            is_done = all(map(core_variables.has_value, averages.slots))
        # The others' first weight is 1, which `average_op` knows nothing of.
        is_done = is_done and (self.average_op is None or not any(self._not_among(trained)))
        if is_done and (due is True or self._follows_weights()):
            return []
        return self._begin_now(due)

    def _not_among(self, trained: VariableMap) -> List[bool]:
        """For each average whether the step does not train its variable, but something else before it.

        Statistics of BatchNormalization, for example, change in the forward pass.
        """
        return [slots.variable not in trained for slots in self.averages.averaged()]

    def _follows_weights(self) -> bool:
        """Whether averages that hold no updates are set to the weights by every step.

        XLA compiles a conditional to a pass over all averages, and a step must fold in one pass anyway.
        """
        return fold.is_compiled_whole() and self.average_op is None

    def _begin_now(self, due: Union[bool, tf.Tensor]) -> List[tf.Tensor]:
        """An average whose first update is due begins from the weights at this moment."""
        status = self.averages.status

        def begins() -> tf.Tensor:
            return tf.logical_and(due, tf.equal(status.updates(), 0))

        def begin() -> list:
            # Looked at once more: another worker may have been faster.
            pairs, places = self.averages.pairs()
            return fold.copy_chosen(pairs, tf.cast(for_each_pair(begins(), places), tf.float64))

        if tf.executing_eagerly():
            return self.averages.refresh()
        if status.section is not None:
            return [self._alone(tf.reduce_any(begins()), begin)]
        return self.averages.copy_weights(begins())

    def _first_update_forgets(self) -> bool:
        """Whether the first update surely sets an average to the weights, as a plain mean does."""
        if self.average_op is not None:
            return False
        is_traced = not tf.executing_eagerly()
        with tf.init_scope():

            def weigh() -> tf.Tensor:
                first = tf.zeros([1], tf.int64)  # Made here: what a function captures counts below.
                return _checked_weight(self.averaging_weight(first, first), first.shape)

            if is_traced:
                traced = tf.function(weigh, autograph=False).get_concrete_function()
                if traced.captured_inputs:
                    return False  # What depends on a variable may have changed before the update.
            weight = weigh()
            if not tf.reduce_all(tf.logical_and(weight >= 0, weight <= 1)):
                raise ValueError(
                    f"Expected `averaging_weight` to return weights from 0 to 1. Received: {weight}"
                )
            return is_traced and bool(tf.reduce_all(tf.equal(weight, 1.0)))

    def _about_to_move(self, variables: Sequence[tf.Variable], moved_rows) -> Tuple[_Moving, list]:
        """Notes which rows the step moves of averages whose rows wait; catches the others up.

        Returns:
          These rows, and what the step must wait for.
        """
        averages, moving, ready = self.averages, _Moving(), []
        trained = VariableMap((variable, None) for variable in variables)
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        comes_twice = len(trained) < len(variables)
        may_wait = not (self.average_op or comes_twice or replicas > 1 or fold.is_compiled_whole())
        indices_of = VariableMap(moved_rows if may_wait else ())
        with tf.init_scope():
            averages.let_rows_wait(v for v, indices in indices_of.items() if indices is not None)
        for variable, rows in averages.waiting():
            if may_wait and (variable in indices_of or variable not in trained):
                indices = indices_of.get(variable)
                no_row = tf.zeros([0], tf.int64)
                moving[variable] = rows, rows.about_to_move(no_row if indices is None else indices)
            else:
                ready += rows.catch_up()
        return moving, ready

    # After a step.

    def _fold(
        self, due, step: tf.Tensor, averaging_weight, average_op, moving: _Moving, trained=None
    ) -> None:
        """Folds the current weights into the averages, if an update is due, and counts it."""
        averages, status = self.averages, self.averages.status
        pairs, places = averages.pairs(without=moving)
        begins_here = [] if trained is None or tf.executing_eagerly() else self._not_among(trained)

        def weights() -> tf.Tensor:
            """For each average how much the weights count: float64 vector."""
            with status.device():
                updates = status.updates()
                steps = updates if self.period is None else status.steps(step)
                weight = _checked_weight(averaging_weight(steps, updates), updates.shape)
                empty = tf.equal(updates, 0)
                if any(begins_here):
                    weight = tf.where(tf.logical_and(empty, begins_here), tf.ones([], tf.float64), weight)
                if due is not True and self._follows_weights():
                    weight = tf.where(due, weight, tf.cast(empty, tf.float64))
                return tf.broadcast_to(weight, tf.shape(updates))

        def new_value(place, value, average) -> tf.Tensor:
            self.weight = lambda: weights()[places[place]]
            return average_op(value, average)

        def fold_and_count(due) -> list:
            if average_op is not None:
                done = [_when(due, lambda: fold.update(pairs, new_value))]
            elif status.section is not None:
                # No function is called here: a critical section does not keep apart what runs inside one.
                chosen = for_each_pair(weights(), places)
                with after(*fold.copy_chosen(pairs, chosen)):
                    done = fold.interpolate(pairs, chosen)
            else:
                done = self._interpolate(due, pairs, places, weights, moving)
            with after(*done):
                return status.count(step, due)

        if status.section is None:
            fold_and_count(due)
        else:
            self._alone(due, lambda: fold_and_count(True))

    def _interpolate(
        self, due, pairs: Sequence[fold.Pair], places: List[int], weights: Callable[[], tf.Tensor], moving
    ) -> List[tf.Tensor]:
        on_devices, fold_all = self.averages.on_devices, fold.fold_work(self.averages.jit_compile)
        # What all devices need is computed here: the work on one device has no access to others.
        if fold.is_compiled_whole():
            chosen = for_each_pair(weights(), places)
            with after(*on_devices(pairs, [fold.copy_chosen], None, chosen)):
                return on_devices(pairs, [fold_all], None, chosen)

        def choose():
            chosen = weights()
            any_is_one = tf.reduce_any(tf.equal(chosen, 1.0))
            # Always valid, which TensorFlow cannot know. Where it can tell the choice while it optimizes
            # a graph, it makes a call without side effects of it, and leaves that out.
            return tf.cast(tf.logical_and(any_is_one, self.averages.status.is_valid()), tf.int32), chosen

        def skip():
            return tf.constant(0), tf.zeros([len(self.averages.averaged())], tf.float64)

        copies, by_clock = choose() if due is True else tf.cond(due, choose, skip)
        rows_done = self._fold_rows(moving, by_clock)
        chosen = for_each_pair(by_clock, places)
        with after(*on_devices(pairs, [fold.nothing, fold.copy_chosen], copies, chosen)):
            if due is True:
                return rows_done + on_devices(pairs, [fold_all], None, chosen)
            choice = tf.cast(due, tf.int32)
            return rows_done + on_devices(pairs, [fold.nothing, fold_all], choice, chosen)

    def _fold_rows(self, moving: _Moving, weights: tf.Tensor) -> list:
        """Folds in the rows that the step has moved, of averages whose other rows wait."""
        done = []
        for place, slots in enumerate(self.averages.averaged() if moving else ()):
            if slots.variable in moving:
                rows, moved = moving[slots.variable]
                done += rows.fold(moved, weights[place])
        return done

    def _alone(self, condition: Union[bool, tf.Tensor], work: Callable[[], list]) -> tf.Tensor:
        """Does `work` if `condition` holds, while no other worker is in the section."""
        section = self.averages.status.section

        def one_at_a_time() -> list:
            return [section.execute(lambda: fold.done(work()), exclusive_resource_access=False)]

        return _when(condition, one_at_a_time)


def _when(condition: Union[bool, tf.Tensor], work: Callable[[], list]) -> tf.Tensor:
    """Does `work` if `condition` holds: a scalar bool tensor, or True.

    Returns:
      What must run before anything that follows.
    """
    if condition is True:
        return fold.done(work())
    return tf.cond(condition, lambda: fold.done(work()), lambda: tf.constant(True))


def _check_in_range(weight) -> Optional[tf.Operation]:
    """Checks that a weight is from 0 to 1; in graphs the operation that must run before it is used."""
    error = "Expected `weight` from 0 to 1."
    if tf.is_tensor(weight) and not tf.executing_eagerly():
        in_range = tf.logical_and(weight >= 0, weight <= 1)
        return tf.raw_ops.Assert(condition=tf.reduce_all(in_range), data=[f"{error} Received:", weight])
    if not 0 <= float(weight) <= 1:
        raise ValueError(f"{error} Received: {weight}")
    return None


def _checked_weight(weight, shape: tf.TensorShape) -> tf.Tensor:
    """What a scheme returned as float64, which must be a scalar or of this shape."""
    try:
        weight = tf.cast(weight, tf.float64)
    except (TypeError, ValueError, tf.errors.UnimplementedError):
        expected = "Expected `averaging_weight` to return a number or a float tensor."
        raise TypeError(f"{expected} Received: {weight!r}") from None
    if weight.shape.rank != 0 and not weight.shape.is_compatible_with(shape):
        raise ValueError(
            f"Expected `averaging_weight` to return a scalar, or a vector of shape {shape}, one element "
            f"for each average. Received: {weight}"
        )
    return weight


def _waiting(gradients: List[Optional[tf.Tensor]]) -> List[Optional[tf.Tensor]]:
    """Gradients that are ready after what the context orders them after.

    The step of a single replica waits by itself. Keras's sum over replicas is an operation of all
    gradients: if that waited, so would all updates, for the last gradient. There each gradient waits.
    """
    if tf.executing_eagerly() or tf.distribute.get_strategy().num_replicas_in_sync == 1:
        return gradients
    return [None if gradient is None else tf.identity(gradient) for gradient in gradients]
