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
"""An averaging optimizer in a `tf.train.Checkpoint`: what it is made of there, and how it is restored.

The averages are slots of the model's variables, saved by variable, not by index. So a model that gained a
layer still finds its own averages.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, List, Optional, Sequence

import numpy as np
import tensorflow as tf

from tf_averaging.core import variables as core_variables
from tf_averaging.core.averages import Averages
from tf_averaging.core.status import NOT_SET
from tf_averaging.core.status import Clock
from tf_averaging.core.variables import ShardedVariable
from tf_averaging.core.variables import VariableMap
from tf_averaging.core.variables import averageable
from tf_averaging.saving import positions
from tf_averaging.saving import predecessors

if TYPE_CHECKING:
    from tf_averaging.averaged_optimizer_wrapper import AveragedOptimizerWrapper


class CheckpointForm:
    """The object that TensorFlow's checkpoints see in place of an averaging optimizer.

    Its children are the inner optimizer, the averages and a subclass's own variables. What may come from
    another optimizer's file is not looked up by name, but taken as unmatched.

    Args:
      optimizer: the averaging optimizer.
    """

    def __init__(self, optimizer: AveragedOptimizerWrapper):
        self.node = AveragesNode(
            optimizer._averages,
            lambda: int(optimizer.start_averaging),
            optimizer._tf_variables,
            [cls.__name__ for cls in type(optimizer).__mro__],
        )
        self._optimizer = optimizer
        # What the inner optimizer was restored from, and into; None before that.
        self._restored: predecessors.Restored = predecessors.Restored(None, None)
        self.unmatched = positions.Unmatched(self._take_unmatched)
        self._warned_of: Optional[positions.Position] = None

    def children(self, attributes: Dict[str, Any]) -> Dict[str, Any]:
        """The children by name.

        Args:
          attributes: what TensorFlow tracks of the optimizer's attributes.
        """
        self.create_as_restored()
        children = {name: child for name, child in attributes.items() if name != "_variables"}
        children["own_variables"] = attributes.get("_variables")
        children["inner_optimizer"] = self._optimizer._inner_optimizer
        children["averages"] = self.node
        return {name: child for name, child in children.items() if child is not None}

    def look_up(self, name: str):
        """The child to restore into, None for what `_take_unmatched` restores."""
        if name in predecessors.NAMES or name == "inner_optimizer":
            return None
        if name == "averages":
            return self.node
        attributes = _tracked_attributes(self._optimizer)
        return attributes.get("_variables" if name == "own_variables" else name)

    def _take_unmatched(self, name: str, position: positions.Position) -> bool:
        if name in predecessors.NAMES:
            self._restore_foreign(position)
        elif name == "inner_optimizer":
            inner = self._optimizer._restore_target(position, is_of_predecessor=False)
            self._restored = predecessors.Restored(position, inner)
            position.restore(inner)
        else:
            return False
        return True

    def _restore_foreign(self, position: positions.Position) -> None:
        optimizer = self._optimizer
        owner = positions.Owner(
            position,
            lambda item: item is optimizer or positions.optimizer_inside(item) is optimizer,
        )
        if owner.children:  # Otherwise this is done.
            self._restored = predecessors.restore(owner, optimizer, self.node)

    def create_or_restore_slot(self, slot_variable_position, slot_name, variable, **kwargs):
        """Passes on a slot of another optimizer's file."""
        self._restore_foreign(slot_variable_position)
        target = self.node if slot_name == "average" else self._restored.inner
        return target._create_or_restore_slot_variable(
            slot_variable_position=slot_variable_position,
            slot_name=slot_name,
            variable=variable,
            **kwargs,
        )

    def create_as_restored(self) -> None:
        """Creates all state, if a checkpoint brought some before the first step.

        The rest then waits for the inner optimizer to create its variables, and would be missing from
        what is saved now. It is, with a warning, if the variables that are trained are not known.
        """
        optimizer = self._optimizer
        position, inner = self._restored
        if optimizer._updates.selection.trained or position is None:
            return
        met = positions.restored_together_with(position)
        models = [item for item in met if self._is_compiled_with_this(item)]
        variables = [variable for model in models for variable in model.trainable_variables]
        if variables:
            strategy = core_variables.strategy_of(optimizer._tf_variables(variables)[0])
            with contextlib.nullcontext() if strategy is None else strategy.scope():
                optimizer.build(variables)
        elif (
            inner is optimizer._inner_optimizer
            and self._warned_of is not position
            and optimizer._inner_waits()
        ):
            self._warned_of = position
            warnings.warn(
                "A checkpoint was restored, and its values for variables of the inner optimizer wait "
                "until those are created: they are missing here. Call `optimizer.build(variables)` "
                "before, with the variables that it trains, in order.",
                stacklevel=4,
            )

    def _is_compiled_with_this(self, item: object) -> bool:
        # Not looked at further: any object may have been restored, and asking for attributes may cost.
        if not hasattr(type(item), "trainable_variables") or isinstance(item, type(self._optimizer)):
            return False
        compiled = getattr(item, "optimizer", None)
        return self._optimizer in (compiled, positions.optimizer_inside(compiled))


# Methods of an averaging optimizer, which TensorFlow asks for by these names.


def _form(optimizer: AveragedOptimizerWrapper) -> CheckpointForm:
    """The form in checkpoints, made when one first asks."""
    form = optimizer._checkpoint_form or CheckpointForm(optimizer)
    object.__setattr__(optimizer, "_checkpoint_form", form)
    return form


def trackable_children(optimizer, save_type="checkpoint", **kwargs):
    if save_type == "savedmodel":
        return optimizer._saved_model_children()
    return _form(optimizer).children(_tracked_attributes(optimizer, save_type, **kwargs))


def create_or_restore_slot_variable(optimizer, slot_variable_position, slot_name, variable, **kwargs):
    return _form(optimizer).create_or_restore_slot(slot_variable_position, slot_name, variable, **kwargs)


def _tracked_attributes(optimizer, save_type="checkpoint", **kwargs) -> Dict[str, Any]:
    # Not the Keras base class's: it would answer from a copy made when it was first asked.
    return tf.__internal__.tracking.AutoTrackable._trackable_children(optimizer, save_type, **kwargs)


class AveragesNode(tf.__internal__.tracking.Trackable):
    """The averages as TensorFlow's checkpoints see them.

    `tf.train.Checkpoint` takes an object with the methods `get_slot_names`, `get_slot` and
    `_create_or_restore_slot_variable` for an optimizer with slots. This object has them, not the wrapper,
    because a LossScaleOptimizer around the wrapper passes its children on, but not its slots.

    Args:
      averages: the averages.
      start: returns the first step that is averaged. Averages count from it if the file has no clocks.
      tf_variables: makes TensorFlow's variables of a model's.
      schemes: the name of the scheme, and those of its base classes.
    """

    SLOT_NAMES = ("average", "stash", "exchanged", "clock")

    def __init__(
        self,
        averages: Averages,
        start: Callable[[], int],
        tf_variables: Callable[[Iterable], List[tf.Variable]],
        schemes: Sequence[str],
    ):
        self._averages = averages
        self._start = start
        self._tf_variables = tf_variables
        self._schemes = schemes
        self._scheme = positions.Value(lambda: tf.constant(schemes[0]))
        self._sharded_slots: Dict[str, VariableMap[ShardedVariable]] = {
            name: VariableMap() for name in self.SLOT_NAMES
        }
        self._clock_slots: VariableMap[positions.Value] = VariableMap()
        self._unmatched = positions.Unmatched(self._take_unmatched)
        # Values of the status that came before there was one, by name.
        self._pending: Dict[str, positions.Position] = {}
        # How many updates the averages hold in a file of a predecessor, which does not say it.
        self._updates_in_file = 0
        # Takes the place of the one count that version 0.1 had for all averages.
        self._common_count = tf.__internal__.tracking.Trackable()
        self._owner: Optional[positions.Owner] = None
        self._restore_uid = self._visited_by = NOT_SET
        self._thread, self._is_copied = threading.get_ident(), False
        averages.when_added.append(self.restore_pending)

    # What is saved.

    def _trackable_children(self, save_type="checkpoint", **_kwargs):
        # Asynchronous checkpoints come here on a thread of their own, to save copies, while training
        # goes on: the averages must be left alone then.
        is_here = threading.get_ident() == self._thread or not self._is_copied
        if save_type == "checkpoint" and tf.executing_eagerly() and is_here:
            self._averages.refresh()
        return {**self._status_variables(), "scheme": self._scheme}

    def _status_variables(self) -> Dict[str, tf.Variable]:
        status = self._averages.status
        return {} if status is None else {"swapped": status.swapped, "first_step": status.first_step}

    def _copy_trackable_to_cpu(self, object_map):
        """Called when an asynchronous checkpoint makes copies, before those of slots that it finds."""
        self._is_copied = True
        self._averages.catch_up()
        # It looks for slots of TensorFlow's variables alone, not of Keras 3's.
        for variable in self._averages.slots:
            for slot in (self.get_slot(variable, name) for name in self.SLOT_NAMES):
                if slot is not None:
                    slot._copy_trackable_to_cpu(object_map)

    def get_slot_names(self) -> List[str]:
        return list(self.SLOT_NAMES)

    def get_slot(self, variable, name: str):
        (variable,) = self._tf_variables([variable])
        if isinstance(variable, ShardedVariable):
            return self._sharded_slot(variable, name)
        slots = self._averages.slots[variable]
        if name == "clock":
            return self._clock_slot(variable) if slots.kind == "average" else None
        if name == "stash":
            return slots.stash
        return slots.average if name == slots.kind else None

    def _sharded_slot(self, variable: ShardedVariable, name: str):
        """The slots of all shards as one, so that a checkpoint does not depend on the sharding."""
        shards = [self.get_slot(shard, name) for shard in variable.variables]
        if name == "clock" or any(shard is None for shard in shards):
            return shards[0]
        # Kept: a checkpoint asks later whether what it restored is still there.
        kept = self._sharded_slots[name]
        if variable.variables[0] not in kept:
            kept[variable.variables[0]] = ShardedVariable(shards)
        return kept[variable.variables[0]]

    def _clock_slot(self, variable: tf.Variable) -> positions.Value:
        if variable not in self._clock_slots:
            status = self._averages.status
            self._clock_slots[variable] = positions.Value(lambda: status.clock_value(variable))
        return self._clock_slots[variable]

    # What is restored.

    @property
    def _update_uid(self):
        return self._visited_by

    @_update_uid.setter
    def _update_uid(self, uid):
        self._visited_by = uid  # The number of the restore that has reached this object.
        self.start_restore(uid)

    def start_restore(self, uid: int) -> None:
        """Called when a restore arrives, before its values, however often.

        What it does not bring, because the file was written before there were averages or before the
        model had a variable, starts anew.
        """
        if uid > self._restore_uid:
            self._restore_uid = uid
            self.start_over()

    def start_over(self) -> None:
        """Sets the averages to the current weights, and forgets what was restored."""
        self._pending, self._updates_in_file = {}, 0
        self._averages.start_over()

    def _lookup_dependency(self, name, cached_dependencies=None):
        del name, cached_dependencies  # The status comes to `_take_unmatched`.

    @property
    def _deferred_dependencies(self):
        return self._unmatched

    def _take_unmatched(self, name: str, position: positions.Position) -> bool:
        if name not in ("num_averaged", "swapped", "first_step", "scheme"):
            return False
        self.start_restore(position.restore_uid)
        if name == "scheme":
            scheme = positions.take_value(position, self._scheme).numpy().decode()
            if scheme not in self._schemes:
                predecessors.warn_of_other_scheme(scheme, self._schemes[0])
            return True
        if name == "num_averaged":  # `_clock_in` reads it.
            positions.pass_over(position, self._common_count)
            return True
        self._pending[name] = position
        self.restore_pending()
        if name == "swapped" and self._averages.status is not None:
            self.start_missing(self._owner_of(position))
        return True

    def restore_pending(self, added: Iterable[tf.Variable] = ()) -> None:
        """Restores the status, if there is one by now. Called when averages were added."""
        del added
        status = self._averages.status
        if status is None:
            return
        variables = self._status_variables()
        for name, position in self._pending.items():
            value = positions.take_value(position, variables[name])
            if name == "swapped":  # Version 0.1 stored a vector of length 0 or 1.
                self._averages.set_swapped(bool(np.any(value)))
            else:
                self._averages.begin(int(value))
        self._pending = {}

    def set_updates(self, updates: int) -> None:
        """Says how many updates the averages hold that a file without clocks will bring."""
        self._updates_in_file = updates

    def _create_or_restore_slot_variable(
        self, slot_variable_position, slot_name, variable, slot_variable_shape=None
    ):
        """Returns the slot to restore into, created if need be; None if nothing is left to restore."""
        if slot_name not in self.SLOT_NAMES:
            return None
        (variable,) = self._tf_variables([variable])
        self.start_restore(slot_variable_position.restore_uid)
        if slot_name == "exchanged":
            self._averages.exchanged_at = NOT_SET
        parts = averageable([variable])
        missing = [part for part in parts if part not in self._averages.slots]
        if missing:
            self._averages.add(missing, "exchanged" if slot_name == "exchanged" else "average")
        if slot_name == "clock":
            slot = self.get_slot(variable, "clock")
            if slot is not None:
                value = positions.take_value(slot_variable_position, slot)
                self._set_clocks(parts, Clock(*map(int, value)))
            return None
        return self._slot_to_restore(slot_variable_position, slot_name, variable)

    def _set_clocks(self, parts: Iterable[tf.Variable], clock: Clock) -> None:
        for part in parts:
            if self._averages.slots[part].kind == "average":
                self._averages.status.set_clock(part, clock)

    def _slot_to_restore(self, position, name: str, variable: tf.Variable) -> Optional[tf.Variable]:
        """The slot that goes by this name in the file, set to the file's value if TensorFlow cannot.

        Where `average_dtype` was another one, either only the file or only this object may have a stash.
        While swapped, the weights are in the stash if there is one, else in the average.
        """
        owner = self._owner_of(position)
        variable_id = owner.variable_of(position)
        in_file = owner.slots[variable_id]
        kind = self._kind_of(variable)
        if name == "average" and "clock" not in in_file:
            self._set_clocks(averageable([variable]), self._clock_in(owner))
        average, stash, slot = (self.get_slot(variable, n) for n in (kind, "stash", name))
        if name != "stash" and slot is None:  # An average in one place, an exchanged value in the other.
            return None
        target = average if slot is None else slot
        if positions.is_stale(position, target):
            return target
        has_stash = "stash" in in_file
        if has_stash == (stash is not None):
            if isinstance(slot, tf.Variable) and positions.dtypes_differ(position, slot):
                _assign(slot, positions.take_value(position, slot))
            return slot
        swapped = bool(np.any(owner.child_value("swapped")))
        if stash is None and swapped == (name != "stash"):
            positions.pass_over(position, average)
            return None
        value = positions.take_value(position, average)
        if stash is not None and swapped:
            _assign(stash, value)
            value = owner.value(variable_id)
        _assign(average, value)
        return average

    def _kind_of(self, variable: tf.Variable) -> str:  # All shards have the same.
        return self._averages.slots[averageable([variable])[0]].kind

    def _clock_in(self, owner: positions.Owner) -> Clock:
        """The clock of all averages of a file without clocks: of version 0.1, or of a predecessor."""
        count, first_step = map(owner.child_value, ("num_averaged", "first_step"))
        updates = self._updates_in_file if count is None else int(count)
        start = self._start() if first_step is None or first_step == NOT_SET else int(first_step)
        return Clock(start, updates) if updates else Clock()

    def _owner_of(self, position: positions.Position) -> positions.Owner:
        """The node of the file that is restored into this object."""
        if self._owner is None or self._owner.uid != position.restore_uid:
            self._owner = positions.Owner(position, lambda item: item is self)
        return self._owner

    def start_missing(self, owner: positions.Owner) -> None:
        """Sets the averages that a file lacks to the weights in it, which are restored only later.

        Args:
          owner: the node that holds the averages.
        """
        for node_id, item in owner.matched().items() if len(self._averages) else ():
            (variable,) = self._tf_variables([item])
            parts = averageable([variable])
            if not parts or any(part not in self._averages.slots for part in parts):
                continue
            kind = self._kind_of(variable)
            value = owner.value(node_id)
            if value is None or kind in owner.slots.get(node_id, {}):
                continue
            for slot in (self.get_slot(variable, kind), self.get_slot(variable, "stash")):
                if slot is not None:
                    _assign(slot, value)


def _assign(slot: tf.Variable, value: tf.Tensor) -> None:
    slot.assign(tf.cast(value, slot.dtype))
