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
"""Checkpoints of other optimizers: of the predecessors, with another one inside, of the inner one alone.

`tfa.optimizers.SWA` and `tfa.optimizers.MovingAverage` (TensorFlow Addons), as well as
`tfm.optimization.ExponentialMovingAverage` (TensorFlow Models) keep the averages as slots of their own,
the optimizer inside under a name of their own, and no count of updates. The file of a plain optimizer
holds at our place what belongs to our inner optimizer, and no averages.

What cannot be restored is said in a warning.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple, Sequence

import tensorflow as tf

from tf_averaging.saving import positions

if TYPE_CHECKING:
    from tf_averaging.averaged_optimizer_wrapper import AveragedOptimizerWrapper
    from tf_averaging.saving.checkpoints import AveragesNode

# The names under which the predecessors keep the inner optimizer: TensorFlow Addons, TensorFlow Models.
INNER_NAMES = ("awg_optimizer", "ema_base_optimizer")
# What else the file of another optimizer has at our place, and one of ours never.
NAMES = INNER_NAMES + ("iter", "_iterations", "_variables")


class Restored(NamedTuple):
    """What the state of an inner optimizer was restored from, and into.

    It must be kept as long as variables may be created whose values are restored then.
    """

    position: positions.Position
    inner: Any


def restore(
    owner: positions.Owner,
    optimizer: AveragedOptimizerWrapper,
    node: AveragesNode,
) -> Restored:
    """Restores the node of another optimizer.

    Args:
      owner: the node.
      optimizer: the averaging optimizer.
      node: its averages.

    Returns:
      What the inner optimizer's node was restored into.
    """
    inner_name = next((name for name in INNER_NAMES if name in owner.children), None)
    position = owner.position if inner_name is None else owner.children[inner_name]
    inner = optimizer._restore_target(position, is_of_predecessor=inner_name is not None)
    node.start_restore(owner.uid)
    if inner_name is None:
        owner.give_all_to(inner)
        node.start_over()
        warn_of_no_averages("checkpoint")
        return Restored(position, inner)
    _check_scheme(owner, optimizer._predecessors)
    owner.children[inner_name].restore(inner)
    if "iter" in owner.children:
        owner.children["iter"].restore(optimizer._steps_variable())
    node.set_updates(optimizer._updates.due_in(int(optimizer._steps_taken())))
    owner.give_slots_to(node)
    node.start_missing(owner)
    return Restored(position, inner)


def _check_scheme(owner: positions.Owner, predecessor_names: Sequence[str]) -> None:
    # TensorFlow Addons writes the optimizer's name before its variables', by default the class's.
    names = {full_name.split("/")[0] for full_name in owner.full_names()}
    if "ema_base_optimizer" in owner.children:
        names = {"ExponentialMovingAverage"}
    others = names & {"SWA", "MovingAverage", "ExponentialMovingAverage"} - set(predecessor_names)
    if predecessor_names and others:
        warn_of_other_scheme(others.pop(), " or ".join(predecessor_names))


def warn_of_no_averages(file: str) -> None:
    """Warns that the file of an optimizer without averages was restored."""
    warnings.warn(
        f"The {file} was written by an optimizer without averages. They start from the weights in it.",
        stacklevel=5,
    )


def warn_of_other_scheme(found: str, expected: str) -> None:
    """Warns that averages which were kept in one way were restored, and will be kept in another."""
    warnings.warn(
        f"The averages in the file were kept by {found}. Expected those of {expected}: they are restored "
        "as they are, with the number of updates in them, and from now on averaged in another way. "
        "`reset_averages()` starts anew from the weights.",
        stacklevel=5,
    )


def without_state(writer: str, optimizer: Any, steps: tf.Variable, remedy: str) -> WithoutState:
    """What is restored in place of an optimizer that cannot take the state in a file; warns of it.

    Args:
      writer: what wrote the file.
      optimizer: the optimizer here.
      steps: the variable that counts its steps.
      remedy: what restores everything.
    """
    warnings.warn(
        f"The checkpoint was written with {writer}, whose state {optimizer} cannot take: that starts "
        "anew. The number of steps is restored, and so are weights and averages of variables that are at "
        f"the same place. To restore everything, use {remedy}.",
        stacklevel=4,
    )
    return WithoutState(steps)


class WithoutState(tf.__internal__.tracking.Trackable):
    """Stands for an optimizer that cannot take the state of a file's. It takes the steps only.

    Args:
      steps: the variable that counts the optimizer's steps.
    """

    def __init__(self, steps: tf.Variable):
        self._steps = steps

    def _lookup_dependency(self, name, cached_dependencies=None):
        return self._steps if name in ("iter", "_iterations") else None

    def _create_or_restore_slot_variable(
        self, slot_variable_position, slot_name, variable, slot_variable_shape=None
    ):
        del slot_variable_position, slot_name, variable, slot_variable_shape
