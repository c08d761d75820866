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
"""The inner optimizer's state from a checkpoint that may have been written with another one inside."""

from __future__ import annotations

import functools
import warnings
from typing import Optional, Sequence, Set, Union

import tensorflow as tf
import tf_keras

from tf_averaging.core.rows import given_rows
from tf_averaging.saving import positions
from tf_averaging.saving.predecessors import without_state

Optimizer = Union[tf_keras.optimizers.Optimizer, tf_keras.optimizers.legacy.Optimizer]


def _slot_names(optimizer: tf_keras.optimizers.legacy.Optimizer) -> Optional[Set[str]]:
    """The names of all slots that a legacy optimizer will have; None if that cannot be found out.

    It knows them only once it has variables, so a copy of it is asked.
    """
    try:
        config = optimizer.get_config()
        if "learning_rate" in config:
            config["learning_rate"] = 0.0  # Not a schedule, whose class only its own module may know.
        copy = type(optimizer).from_config(config)
    except (KeyError, NotImplementedError, TypeError, ValueError):
        return None  # An optimizer of the user's whose config is not complete.
    with tf.init_scope():
        copy._create_all_weights([tf.Variable(0.0)])
    return set(copy.get_slot_names())


def restore_target(optimizer: Optimizer, position: positions.Position, is_of_predecessor: bool):
    """What the node of an inner optimizer is to be restored into; warns of what does not fit.

    Args:
      optimizer: the inner optimizer.
      position: the node.
      is_of_predecessor: whether a predecessor wrote it; their inner optimizers are legacy ones.

    Returns:
      The optimizer, or if its Keras or generation is another than the file's, an object in its place.
    """
    is_legacy = isinstance(optimizer, tf_keras.optimizers.legacy.Optimizer)
    children = positions.child_names(position)
    if positions.is_of_keras_3(position):
        remedy = "that optimizer, and a model of Keras 3, which has its variables at other places"
        return without_state("an optimizer of Keras 3", optimizer, optimizer.iterations, remedy)
    was_legacy = is_of_predecessor or "iter" in children
    if ("_iterations" in children) if is_legacy else was_legacy:
        generation, remedy = ("current", "'s successor") if is_legacy else ("legacy", "")
        writer = f"a {generation}-generation optimizer of tf_keras"
        remedy = f"the same optimizer of `tf_keras.optimizers.legacy`{remedy}"
        return without_state(writer, optimizer, optimizer.iterations, remedy)
    if is_legacy:
        expected, received = _slot_names(optimizer), positions.slot_names(position)
        # Its settings are variables too, which are created together with the slots.
        has_slots = bool(children - {"iter"})
        if expected is not None and has_slots and received != expected:
            warnings.warn(
                f"The checkpoint was written with another optimizer inside. Expected the slots "
                f"{sorted(expected)} of {optimizer}. Received: {sorted(received)}. Slots that go by the "
                "same name are restored; others start anew, or are of no use here.",
                stacklevel=3,
            )
    return optimizer


def _moves_given_rows_alone(optimizer: Optimizer) -> bool:
    """Whether a step leaves all rows as they are that a sparse gradient does not name.

    This is known of some optimizers. `Ftrl` of the current generation moves all rows.
    """
    current, legacy = tf_keras.optimizers, tf_keras.optimizers.legacy
    if type(optimizer) in (current.SGD, current.Adagrad):
        has_momentum = type(optimizer) is current.SGD and optimizer.momentum != 0
        return optimizer.weight_decay is None and not has_momentum
    if type(optimizer) not in (legacy.SGD, legacy.Adagrad, legacy.Ftrl):
        return False
    if optimizer.gradient_transformers or optimizer.gradient_aggregator is not _default_aggregator():
        return False
    # Private names: nothing public says it. `tests/private_names_test.py` fails if one of them goes away.
    if type(optimizer) is legacy.SGD:
        return not optimizer._momentum
    return type(optimizer) is legacy.Adagrad or optimizer._l2_shrinkage_regularization_strength == 0


@functools.cache
def _default_aggregator():
    return tf_keras.optimizers.legacy.SGD().gradient_aggregator


def moved_rows(optimizer: Optimizer, gradients: Sequence, variables: Sequence[tf.Variable]) -> list:
    """The rows that a step moves, for variables of which it moves no others: see `Updates.around`."""
    return given_rows(gradients, variables) if _moves_given_rows_alone(optimizer) else []


def warn_of_saved_model(swapped: bool) -> None:
    how = (
        "The model holds the averaged weights now, and so will the SavedModel."
        if swapped
        else "To export the averaged weights, save inside `with optimizer.swapped_weights():`."
    )
    warnings.warn(
        "A SavedModel keeps no state of the optimizer: averages, number of steps and the inner "
        "optimizer's variables are not in it. Save to `.keras` or with `tf.train.Checkpoint`, "
        f"which keep them. {how}",
        stacklevel=3,
    )
