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
"""Places in a `tf.train.Checkpoint` file, and what to do with one that has no counterpart here.

While it restores, TensorFlow matches the objects of the file to the objects of the program by name, and
hands what it cannot match to `_deferred_dependencies` of the object it was looking in, as a position: a
node of the file's object graph, with access to its values and to the rest of the restore. Files that
other optimizers wrote, and values that were stored in another form, are restored from there.

All that is private to TensorFlow in this is used in this module alone; `tests/private_names_test.py`
fails if it changes.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional, Set

import tensorflow as tf

# A `tensorflow.python.checkpoint.restore.CheckpointPosition`.
Position = Any

VALUE = "VARIABLE_VALUE"


class Unmatched(dict):
    """The `_deferred_dependencies` of an object that wants to be asked before anything waits there.

    Args:
      take: called with a name and the position that has it; returns whether that was dealt with.
        Otherwise the position waits for a child of that name, as usual.
    """

    def __init__(self, take: Callable[[str, Position], bool]):
        super().__init__()
        self._take = take

    def setdefault(self, name: str, default: list) -> _Waiting:  # type: ignore[override]
        return _Waiting(self, name, default)


class _Waiting:
    """Stands for the list of positions that wait for one name, as far as TensorFlow uses it."""

    def __init__(self, unmatched: Unmatched, name: str, default: list):
        self._unmatched, self._name, self._default = unmatched, name, default

    def append(self, position: Position) -> None:
        if not self._unmatched._take(self._name, position):
            dict.setdefault(self._unmatched, self._name, self._default).append(position)


class Owner:
    """The node of a file that an object is being restored from, seen from a child or a slot of it.

    Args:
      position: the child's or the slot's.
      is_owner: whether an object is the one whose node is wanted.

    Attributes:
      position: the node's own position; None if there is no such node.
      children: the file's children of that node, from name to position.
      slots: its slots, from the id of a variable's node to names and the ids of the slots' nodes.
      uid: the number of the restore; later ones have larger numbers.
    """

    def __init__(self, position: Position, is_owner: Callable[[object], bool]):
        self._restore = position.checkpoint
        self._nodes = self._restore.object_graph_proto.nodes
        self._ids = [
            node_id
            for node_id, item in list(self._restore.object_by_proto_id.items())
            if is_owner(item) and position.proto_id in _parts(self._nodes[node_id])
        ]
        self._position = position
        self.position = position.create_child_position(self._ids[0]) if self._ids else None
        self.children: Dict[str, Position] = {}
        self.slots: Dict[int, Dict[str, int]] = {}
        for node_id in self._ids:
            for child in self._nodes[node_id].children:
                self.children[child.local_name] = position.create_child_position(child.node_id)
            self.slots.update(_slots(self._nodes[node_id]))
        self._variables = {
            slot_id: variable_id
            for variable_id, slots in self.slots.items()
            for slot_id in slots.values()
        }
        self.uid: int = position.restore_uid

    def value(self, node_id: int) -> Optional[tf.Tensor]:
        """What the file has as the value of a node, None if that has none."""
        return self._position.create_child_position(node_id).value_tensors().get(VALUE)

    def child_value(self, name: str) -> Optional[tf.Tensor]:
        """What the file has as the value of a child, None if there is none."""
        return self.value(self.children[name].proto_id) if name in self.children else None

    def variable_of(self, slot: Position) -> int:
        """The id of the variable's node whose slot is at this position."""
        return self._variables[slot.proto_id]

    def full_names(self) -> Set[str]:
        """The names that the variables of the slots had in the program that wrote the file."""
        return {
            attribute.full_name
            for slot_id in self._variables
            for attribute in self._nodes[slot_id].attributes
        }

    def matched(self) -> Dict[int, object]:
        """The objects of the program that the restore has met, or will, by the ids of their nodes."""
        matched = dict(self._restore.object_by_proto_id)
        seen = {0}
        visits = {0: self._restore.graph_view.root}
        while visits:
            node_id, item = visits.popitem()
            matched[node_id] = item
            children = item._trackable_children()
            for child in self._nodes[node_id].children:
                found = item._lookup_dependency(child.local_name, children)
                if found is not None and child.node_id not in seen:
                    seen.add(child.node_id)
                    visits[child.node_id] = found
        return matched

    def give_slots_to(self, target: tf.__internal__.tracking.Trackable) -> None:
        """Has the slots of the node restored into those of `target`, which must outlive the restore."""
        for node_id in self._ids:
            self._restore.object_by_proto_id[node_id] = target
            target._update_uid = self.uid

    def give_all_to(self, target: tf.__internal__.tracking.Trackable) -> None:
        """Has the node restored into `target`, as if that had been at its place."""
        for node_id in self._ids:
            del self._restore.object_by_proto_id[node_id]
            self._position.create_child_position(node_id).restore(target)


def _parts(node) -> Set[int]:
    """The ids of the children and slot variables of a node."""
    return {child.node_id for child in node.children} | {
        slot.slot_variable_node_id for slot in node.slot_variables
    }


def _slots(node) -> Dict[int, Dict[str, int]]:
    slots: Dict[int, Dict[str, int]] = {}
    for slot in node.slot_variables:
        of_variable = slots.setdefault(slot.original_variable_node_id, {})
        of_variable[slot.slot_name] = slot.slot_variable_node_id
    return slots


def child_names(position: Position) -> Set[str]:
    """The names of what the node at this position has for children."""
    return {child.local_name for child in position.object_proto.children}


def is_of_keras_3(position: Position) -> bool:
    """Whether an optimizer of Keras 3 wrote the node: those of tf_keras have no such list."""
    return "_trainable_variables" in child_names(position)


def is_of_current_generation(position: Position) -> bool:
    """Whether an optimizer of tf_keras's current generation wrote the node."""
    return "_iterations" in child_names(position) and not is_of_keras_3(position)


def slot_names(position: Position) -> Set[str]:
    """The names of the slots of the node at this position."""
    return {slot.slot_name for slot in position.object_proto.slot_variables}


def take_value(position: Position, variable: tf.Variable) -> tf.Tensor:
    """The value stored at `position`, which counts as restored into `variable`: the caller sets it."""
    position.bind_object(variable)
    mark_restored(position, variable)
    return position.value_tensors()[VALUE]


def pass_over(position: Position, instead: tf.Variable) -> None:
    """Has the restore count the value at `position` as used: `instead` has what is needed of it."""
    position.bind_object(instead)


def mark_restored(position: Position, variable: tf.Variable) -> None:
    """Has the restore count `variable` as one that it has set."""
    variable._maybe_initialize_trackable()
    variable._update_uid = position.restore_uid


def is_stale(position: Position, variable: tf.Variable) -> bool:
    """Whether a later restore has set the variable already."""
    variable._maybe_initialize_trackable()
    return position.restore_uid <= variable._update_uid


def dtypes_differ(position: Position, variable: tf.Variable) -> bool:
    """Whether the value was stored in another dtype, so that TensorFlow would refuse to restore it."""
    return any(
        attribute.name == VALUE
        and position.checkpoint.dtype_map[attribute.checkpoint_key] != variable.dtype
        for attribute in position.object_proto.attributes
    )


def restored_together_with(position: Position) -> List[Any]:
    """The objects of the program that the restore of `position` has met so far."""
    return list(position.checkpoint.all_python_objects)


class Value(tf.__internal__.tracking.Trackable):
    """What is no variable, but saved like one: the clock of one average, the name of the scheme.

    Args:
      value: returns it, a tensor.
    """

    def __init__(self, value: Callable[[], tf.Tensor]):
        self._value = value

    def _serialize_to_tensors(self):
        return {VALUE: self._value()}

    def _restore_from_tensors(self, restored_tensors):
        raise NotImplementedError("The node of the averages restores it.")

    def _copy_trackable_to_cpu(self, object_map):
        if self not in object_map:
            object_map[self] = tf.Variable(self._value(), trainable=False)
        object_map[self].assign(self._value())


def optimizer_inside(optimizer: object) -> Any:
    """The next optimizer inside an averaging optimizer or a LossScaleOptimizer; None for others."""
    return getattr(optimizer, "_inner_optimizer", None) or getattr(optimizer, "inner_optimizer", None)
