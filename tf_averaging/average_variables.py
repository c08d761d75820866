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
"""The averages of a set of variables: what is computed with them, and the exchange with the weights."""

from __future__ import annotations

import functools
from typing import Callable, Iterable, List, Optional, Sequence, Union

import tensorflow as tf

from tf_averaging import average_ops
from tf_averaging import average_slots
from tf_averaging import control_flow
from tf_averaging import device_functions
from tf_averaging import stash as stash_ops
from tf_averaging import swapped_flag
from tf_averaging.average_slots import NOT_SET


class AverageVariables(average_slots.AverageSlots):
    """The averages of a set of variables.

    While nothing has been folded in (`num_averaged` is 0) the averages *are* the current weights; the
    slots are brought up to date before anybody looks (`refresh`).

    Args:
      average_dtype: what `average_dtype_of` gets as `requested`.
    """

    def __init__(self, average_dtype: Optional[tf.DType] = None):
        super().__init__(average_dtype)
        self._on_devices = device_functions.DeviceFunctions()
        self._swap_function: Optional[Callable[[], None]] = None

    def add(self, variables: Iterable[tf.Variable], kind: str = "average") -> List[tf.Variable]:
        new = super().add(variables, kind)
        if new:
            self._swap_function = None
        return new

    def keep_only(self, variables: Iterable[tf.Variable]) -> None:
        super().keep_only(variables)
        self._swap_function = None

    # Every method works on the components that the context may touch.

    def start(self, due: Union[bool, tf.Tensor]) -> List[tf.Tensor]:
        """Before a step: the first update that is due begins from the weights as they are now."""
        if self.section is None:
            return self._copy_weights_if(tf.logical_and(due, self._is_empty()))

        def copy_weights():
            # Looked at once more: another worker may have been faster.
            pairs = self._folded_pairs()
            return [control_flow.when(self._is_empty(), lambda: average_ops.copy(pairs))]

        return _alone(self.section, tf.logical_and(due, self._is_empty()), copy_weights)

    def fold(
        self,
        due: Union[bool, tf.Tensor],
        weight: Callable[[], tf.Tensor],
        jit_compile: Union[bool, str],
        average_op: Optional[Callable[[tf.Tensor, tf.Tensor], tf.Tensor]] = None,
        first_is_copy: bool = False,
    ) -> List[Optional[tf.Operation]]:
        """Folds the current weights into the averages, if an update is due, and counts it.

        Args:
          due: bool or scalar bool tensor.
          weight: returns the weight of the variables in the new averages, a scalar float64 tensor.
          jit_compile: as in `average_ops.fold`.
          average_op: if given, returns the average's new value from the variable's and the average's,
            and `weight` is not asked.
          first_is_copy: whether the first update sets the averages to the weights.

        Returns:
          The operations that must run.
        """
        pairs = self._folded_pairs()

        def fold_and_count(due):
            if average_op is not None:
                done = [control_flow.when(due, lambda: average_ops.update(pairs, average_op))]
            else:
                done = self._interpolate(due, pairs, weight, jit_compile, first_is_copy)
            with control_flow.after(*done):
                one = tf.cast(due, tf.int64)
                return done + [
                    average_ops.add(component, one)
                    for component in average_ops.components(self.num_averaged)
                ]

        if self.section is None:
            return fold_and_count(due)
        return _alone(self.section, due, lambda: fold_and_count(True))

    def _interpolate(self, due, pairs, weight, jit_compile, first_is_copy) -> List[tf.Tensor]:
        if self.section is not None:
            return self._interpolate_by_plain_operations(pairs, weight(), first_is_copy)
        fold = device_functions.fold(jit_compile)
        if due is True and not first_is_copy:
            return self._on_devices(pairs, [fold], weight=weight())

        def fold_or_copy():
            return (tf.where(self._is_empty(), 2, 1) if first_is_copy else tf.constant(1)), weight()

        def skip():
            return tf.constant(0), tf.zeros([], tf.float64)

        # What all devices need is computed here: the work on one device has no access to others.
        choice, alpha = fold_or_copy() if due is True else tf.cond(due, fold_or_copy, skip)
        works = [device_functions.nothing, fold, device_functions.copy]
        return self._on_devices(pairs, works, choice, alpha)

    def _interpolate_by_plain_operations(self, pairs, weight, first_is_copy) -> List[tf.Tensor]:
        # No function is called here: a critical section does not keep apart what runs inside of one.
        def fold():
            return average_ops.interpolate(pairs, weight)

        if not first_is_copy:
            return [control_flow.done(fold)]
        return [control_flow.either(self._is_empty(), lambda: average_ops.copy(pairs), fold)]

    def begin(self, step: int) -> None:
        """Makes `step` the first one that is averaged. This is state: it is saved with the averages."""
        self._first_step = step
        if self.first_step is not None:
            _set(self.first_step, tf.constant(step, tf.int64))

    def begins_at(self, default: int) -> Union[int, tf.Tensor]:
        """The step that `begin` got, here or before a checkpoint was written, else `default`.

        Returns:
          An int where it is known; in graphs that are built after `begin`, a scalar int64 tensor.
        """
        first_step = self._first_step
        with tf.init_scope():
            # In graphs of TF 1 nobody can look while they are built: what was said here counts.
            can_look = tf.executing_eagerly() and self.first_step is not None
            if can_look:
                first_step = int(average_ops.read(average_ops.all_components(self.first_step)[0]))
        if first_step == NOT_SET:
            return default
        if tf.executing_eagerly() or not can_look:
            return first_step
        return average_ops.read(average_ops.components(self.first_step)[0])

    def count(self) -> tf.Tensor:
        """How many updates the averages hold: scalar int64 tensor."""
        if self.num_averaged is None:
            return tf.zeros([], tf.int64)
        return average_ops.read(average_ops.components(self.num_averaged)[0])

    def _is_empty(self) -> tf.Tensor:
        return tf.equal(self.count(), 0)  # Not `==`: in graphs of TF 1 it compares objects.

    def are_swapped(self) -> tf.Tensor:
        """Whether averages and weights are exchanged now: scalar bool tensor."""
        if self.swapped is None:
            return tf.constant(False)
        return swapped_flag.read(self.swapped)

    def refresh(self) -> List[tf.Tensor]:
        """While nothing has been folded in, sets the averages to the current weights."""
        if not self:
            return []
        fresh = tf.logical_and(self._is_empty(), tf.logical_not(self.are_swapped()))
        return self._copy_weights_if(fresh)

    def read(self, variable: tf.Variable) -> tf.Tensor:
        """The average of `variable`, wherever it is now: in its slot, or while swapped in the model."""
        if isinstance(variable, tf.__internal__.distribute.ShardedVariable):
            return tf.concat([self.read(shard) for shard in variable.variables], axis=0)
        slots = self[variable]
        with control_flow.after(*self.refresh()):
            if slots.stash is not None:
                return tf.convert_to_tensor(slots.average)
            # Both are read: across replicas that may take all of them, which a conditional must not.
            in_model, in_slot = map(tf.convert_to_tensor, (slots.variable, slots.average))
            return tf.where(self.are_swapped(), in_model, in_slot)

    def _copy_weights_if(self, condition: tf.Tensor) -> List[tf.Tensor]:
        works = [device_functions.nothing, device_functions.copy]
        return self._on_devices(self._folded_pairs(), works, tf.cast(condition, tf.int32))

    def _folded_pairs(self) -> List[average_ops.Pair]:
        return [
            pair
            for slots in self
            if slots.kind == "average"
            for pair in _pairs(slots.average, slots.variable)
        ]

    def check_training(self) -> Optional[tf.Operation]:
        """Fails when it runs while swapped; a step must depend on the operation that it returns.

        Raises:
          tf.errors.InvalidArgumentError: in eager mode, at once.
        """
        return swapped_flag.check_not_set(self.swapped)

    def swap(self) -> Optional[tf.Operation]:
        """Exchanges weights and averages.

        Outside of functions this is one call into the runtime, so that an interrupt (Ctrl-C) finds
        either all variables exchanged or none.
        """
        if not tf.executing_eagerly() or average_ops.in_replica_context():
            return tf.group(*self._swap())
        if self._swap_function is None:
            # No lambda: TensorFlow would count the traces of all optimizers' as one function's, and warn.
            swap = functools.partial(control_flow.done, self._swap)
            self._swap_function = tf.function(swap, autograph=False)
        self._swap_function()
        return None

    def _swap(self) -> List[Optional[tf.Operation]]:
        # Compiled code would copy, and could not change the length of the flag.
        with control_flow.as_it_is():
            return self._swap_buffers()

    def _swap_buffers(self) -> List[Optional[tf.Operation]]:
        swapped = self.are_swapped()
        with control_flow.after(*self.refresh()):
            exchanged = average_ops.exchange(
                [
                    pair
                    for slots in self
                    if slots.stash is None
                    for pair in _pairs(slots.variable, slots.average)
                ]
            )
        stashed = [
            triple
            for slots in self
            if slots.stash is not None
            for triple in zip(*map(average_ops.components, (slots.variable, slots.average, slots.stash)))
        ]
        if stashed:
            exchanged.append(
                control_flow.either(
                    swapped, lambda: stash_ops.leave(stashed), lambda: stash_ops.enter(stashed)
                )
            )
        with tf.control_dependencies([op for op in exchanged if op is not None] + [swapped]):
            return exchanged + swapped_flag.assign(self.swapped, tf.logical_not(swapped))

    def assign(self, variables: Sequence[tf.Variable]) -> Optional[tf.Operation]:
        """Sets each variable that has an average to it; must not run while swapped."""
        chosen = [self[variable] for variable in variables if variable in self]
        pairs = [pair for slots in chosen for pair in _pairs(slots.variable, slots.average)]
        with control_flow.after(self.check_training()), control_flow.after(*self.refresh()):
            return tf.group(*self._on_devices(pairs, [device_functions.copy]))


def _alone(
    section: tf.CriticalSection, condition: Union[bool, tf.Tensor], work: control_flow.Work
) -> List[tf.Tensor]:
    """Does `work` if `condition` holds, while no other worker is in the section."""

    def one_at_a_time():
        return [section.execute(lambda: control_flow.done(work), exclusive_resource_access=False)]

    return [control_flow.when(condition, one_at_a_time)]


def _pairs(first: tf.Variable, second: tf.Variable) -> List[average_ops.Pair]:
    return list(zip(average_ops.components(first), average_ops.components(second)))


def _set(variable: tf.Variable, value: tf.Tensor) -> List[Optional[tf.Operation]]:
    """Sets the components that the context may touch."""
    return [average_ops.assign(component, value) for component in average_ops.components(variable)]
