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
"""Averages of large tables, such as embeddings, of which a step moves a few rows.

An update with the weight alpha moves the average a of a row w by alpha (w - a). The updates that came
while w stood still have moved it by 1 - P, where P is the product of their (1 - alpha). That can be done
later, all at once, as long as it is done before w moves. So a step updates the rows that it moves and
catches up what they have missed; all others wait until they move, or until somebody looks.
"""

from __future__ import annotations

from typing import Any, List, NamedTuple, Sequence, Tuple, Union

import numpy as np
import tensorflow as tf

from tf_averaging.core import fold
from tf_averaging.core import variables as core_variables
from tf_averaging.core.variables import Component
from tf_averaging.core.variables import after

# To fold a smaller table as a whole takes no longer than to look for its rows.
MIN_BYTES = 1 << 20

# So many values are caught up at once: what is under way needs memory for its arithmetic.
_BLOCK = 1 << 20


class Moving(NamedTuple):
    """Rows that a step moves.

    Attributes:
      indices: int vector without duplicates.
      before: their values before the step.
    """

    indices: tf.Tensor
    before: tf.Tensor


def given_rows(gradients: Sequence, variables: Sequence) -> List[Tuple[Any, Any]]:
    """The variables with sparse gradients, each with the indices of the rows that its gradient is of.

    Variables without a gradient are among them, with None; those with a constraint, which may change any
    row, are not.
    """
    return [
        (variable, getattr(gradient, "indices", None))
        for gradient, variable in zip(gradients, variables)
        if variable.constraint is None and (gradient is None or hasattr(gradient, "indices"))
    ]


def can_wait(variable: tf.Variable, average: tf.Variable) -> bool:
    """Whether the rows of an average may wait: it is large, in one place, and on this machine."""
    if core_variables.is_distributed(variable):
        return False
    first, second = (core_variables.components(v)[0] for v in (variable, average))
    elements = first.shape.num_elements()
    return (
        first.dtype == second.dtype
        and first.device == second.device
        and first.dtype in (tf.float32, tf.float64)
        and bool(first.shape.rank)
        and bool(elements)
        and elements * first.dtype.size >= MIN_BYTES
        and not core_variables.is_remote(first)
        and not core_variables.is_on_tpu(first)
    )


class Rows:
    """The rows of one average, each of which may be behind.

    The clock is the logarithm of P, the product of (1 - alpha) over all updates since everything was
    caught up. Where it is 0 nothing is behind. None of this is ever saved.
    """

    def __init__(self, variable: tf.Variable, average: tf.Variable, jit_compile: Union[bool, str]):
        """Creates the clocks where the variable lives. Nothing is behind."""
        self._variable, self._average, self._jit_compile = variable, average, jit_compile
        self._number = int(variable.shape[0])

        def create(value: np.ndarray, kind: str) -> tf.Variable:
            name = f"{average.name.split(':')[0]}/{kind}"
            return core_variables.create_like(variable, lambda: tf.constant(value), name)

        self._now = create(np.zeros([], np.float64), "now")
        # What the clock showed when a row was caught up last.
        self._caught_up = create(np.zeros([self._number], np.float64), "caught_up")
        # Whether somebody has the average's variable, and may look at any time; once more for graphs.
        self.is_held = False
        self._is_held = create(np.zeros([], np.bool_), "is_held")
        # In functions, so that Ctrl-C cannot come between the average and the clocks.
        dtype = _part(average).dtype
        signature = [
            tf.TensorSpec([None], tf.int64),
            tf.TensorSpec([None, *variable.shape[1:]], dtype),
            tf.TensorSpec([], tf.float64),
        ]
        self._fold = tf.function(self._fold_moved, signature, autograph=False)
        self._catch_up = tf.function(self._catch_up_in_blocks, [], autograph=False)

    # A step.

    def about_to_move(self, indices: tf.Tensor) -> Moving:
        """Notes, before the step, which rows it moves: int vector, duplicates are allowed."""
        with tf.device(self._device()):
            indices = tf.cast(tf.unique(indices).y, tf.int64)
        return Moving(indices, _gather(_part(self._variable), indices))

    def fold(self, moved: Moving, weight: tf.Tensor) -> List[tf.Tensor]:
        """Folds the variable into the average after a step.

        Args:
          moved: the rows that the step has moved.
          weight: scalar float64 tensor; 0 where no update is due.

        Returns:
          What must run before anything that follows.
        """
        return [self._fold(*moved, weight)]

    def _fold_moved(self, indices: tf.Tensor, before: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
        moved = Moving(indices, before)

        def fold_whole() -> tf.Tensor:
            pair, weights = (_part(self._average), _part(self._variable)), tf.reshape(weight, [1])
            with after(*self._fold_rows(moved, tf.zeros([], tf.float64))):
                caught_up = self._catch_up_in_blocks()
            with after(caught_up):
                copied = fold.copy_chosen([pair], weights)
            with after(*copied):
                return fold.done(fold.fold([pair], weights, self._jit_compile))

        with tf.device(self._device()):
            is_held = core_variables.read_here(self._is_held)
            # A weight of 1 sets all rows, and has no logarithm of what is left.
            whole = tf.logical_or(is_held, tf.logical_not(weight < 1))
            return tf.cond(whole, fold_whole, lambda: fold.done(self._fold_rows(moved, weight)))

    def _fold_rows(self, moved: Moving, weight: tf.Tensor) -> list:
        """Catches rows up to the step, then folds the step in; all others wait."""
        average = _part(self._average)
        with tf.device(average.device):
            now = core_variables.read_here(self._now)
            caught_up = _towards(
                _gather(average, moved.indices), moved.before, self._missed(now, moved.indices)
            )
            value = _gather(_part(self._variable), moved.indices)
            new = _towards(caught_up, value, tf.fill(tf.shape(moved.indices), weight))
            then = now + tf.math.log1p(-weight)
            clocks = tf.fill(tf.shape(moved.indices), then)
            return [
                _scatter(average, moved.indices, new),
                _scatter(_part(self._caught_up), moved.indices, clocks),
                *core_variables.assign_here(self._now, then),
            ]

    def _missed(self, now: tf.Tensor, indices: tf.Tensor) -> tf.Tensor:
        """How far rows must move towards the variable's to be caught up, from 0 to 1: float64 vector."""
        return -tf.math.expm1(now - _gather(_part(self._caught_up), indices))

    # All rows.

    def catch_up(self) -> List[tf.Tensor]:
        """Catches all rows up. It takes a pass over the table if anything is behind, else nothing.

        Returns:
          What must run before the average is used.
        """
        return [self._catch_up()]

    def _catch_up_in_blocks(self) -> tf.Tensor:
        average, variable = _part(self._average), _part(self._variable)
        elements = average.shape.num_elements()
        block = max(1, min(self._number, _BLOCK * self._number // elements))

        def catch_up_block(start: tf.Tensor) -> tf.Tensor:
            # The last blocks may overlap: rows that are caught up stay as they are.
            indices = tf.minimum(start, self._number - block) + tf.range(block, dtype=tf.int64)
            missed = self._missed(now, indices)
            new = _towards(_gather(average, indices), _gather(variable, indices), missed)
            caught_up = _scatter(_part(self._caught_up), indices, tf.fill([block], now))
            with after(_scatter(average, indices, new), caught_up):
                return start + block

        with tf.device(average.device):
            now = core_variables.read_here(self._now)
            end = tf.where(tf.equal(now, 0.0), tf.zeros([], tf.int64), self._number)
            done = tf.while_loop(
                lambda start: start < end,
                catch_up_block,
                [tf.zeros([], tf.int64)],
                parallel_iterations=1,
            )
            with after(*done):
                reset = tf.cond(end > 0, lambda: fold.done(self._reset()), lambda: tf.constant(True))
            with after(reset):
                return tf.constant(True)

    def value(self) -> tf.Tensor:
        """The average with all rows caught up; nothing is written."""
        average, variable = map(core_variables.read, (_part(self._average), _part(self._variable)))
        with tf.device(self._device()):
            now, caught_up = map(core_variables.read_here, (self._now, self._caught_up))
            return _towards(average, variable, -tf.math.expm1(now - caught_up))

    def forget(self) -> None:
        """Takes the average as it is for caught up (eager mode): it was set to another value."""
        self._reset()

    def _reset(self) -> list:
        zeros = tf.zeros([self._number], tf.float64)
        return [
            *core_variables.assign_here(self._caught_up, zeros),
            *core_variables.assign_here(self._now, tf.zeros([], tf.float64)),
        ]

    def hold(self) -> None:
        """Lets nothing be behind from now on: somebody has the average's variable."""
        if not self.is_held:
            with tf.init_scope():
                self._is_held.assign(True)
                self.catch_up()
            self.is_held = True  # Last: Ctrl-C may come between.

    def _device(self) -> str:
        return _part(self._average).device


def _part(variable: tf.Variable) -> Component:
    """The one component of a variable that is not distributed."""
    return core_variables.components(variable)[0]


def _gather(component: Component, indices: tf.Tensor) -> tf.Tensor:
    with tf.device(component.device):
        return tf.raw_ops.ResourceGather(
            resource=component.handle, indices=indices, dtype=component.dtype
        )


def _scatter(component: Component, indices: tf.Tensor, values: tf.Tensor):
    with tf.device(component.device):
        return tf.raw_ops.ResourceScatterUpdate(
            resource=component.handle, indices=indices, updates=values
        )


def _towards(rows: tf.Tensor, values: tf.Tensor, parts: tf.Tensor) -> tf.Tensor:
    """Moves each row by a part of its distance to the values: float64 vector, cast once.

    A part of 0 leaves the row as it is, also where the values are NaN or infinite.
    """
    parts = tf.reshape(tf.cast(parts, rows.dtype), [-1] + [1] * (rows.shape.rank - 1))
    return rows - tf.math.multiply_no_nan(rows - values, parts)
