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
"""The face of an averaging optimizer for Keras 3, on its TensorFlow backend."""

from __future__ import annotations

import functools
import math
from typing import Any, Dict, FrozenSet, Iterable, List, Optional, Sequence, Tuple, Union

import keras
import numpy as np
import tensorflow as tf

from tf_averaging import faces
from tf_averaging import kerases
from tf_averaging.core import variables as core_variables
from tf_averaging.core.rows import given_rows
from tf_averaging.core.status import check_others
from tf_averaging.core.variables import VariableMap
from tf_averaging.core.variables import as_written
from tf_averaging.saving import arrays
from tf_averaging.saving import positions
from tf_averaging.saving.predecessors import without_state


class Keras3Face(keras.optimizers.Optimizer):
    """What makes an averaging optimizer an optimizer of Keras 3, around another one.

    A step is left to the inner optimizer as a whole: clipping, weight decay, gradient accumulation and
    constraints are its own, and are applied once.

    Args:
      inner_optimizer: the optimizer that takes the steps.
      name: name of this one.
    """

    keras = keras
    keras_name = "keras"
    inner_types = (keras.optimizers.Optimizer,)
    # Where a config says that an optimizer is, and where it is.
    modules = {"keras.optimizers": keras.optimizers}
    clipping_to_choose_from = faces.CLIPPING
    # How a config without a module is read.
    deserialize_without_module = staticmethod(keras.optimizers.deserialize)

    iterations = faces.of_inner(
        "iterations", "The number of steps taken, as the inner optimizer has it: scalar int64."
    )
    learning_rate = lr = faces.of_inner(
        "learning_rate", "The inner optimizer's learning rate; setting it sets that."
    )

    update_step = faces.update_step

    # Whether another optimizer, such as a LossScaleOptimizer, is around this one.
    _is_inside_another = False

    def __init__(self, inner_optimizer: Any, name: str):
        # Keras refuses attributes before its constructor has run, and looks for variables in those that
        # come later. The inner optimizer's are saved with it.
        object.__setattr__(self, "_inner_optimizer", inner_optimizer)
        super().__init__(learning_rate=0.0, name=name)
        # Never used, but checkpoints would have them, under names that a plain optimizer's state has too.
        del self._trainable_variables, self._trainable_variables_indices
        # Plain attributes too: Keras would collect the variables.
        object.__setattr__(self, "_paths", VariableMap())
        object.__setattr__(self, "_in_keras", VariableMap())

    @property
    def inner_optimizer(self) -> Any:
        """The optimizer that takes the steps."""
        return (self, *self._others.optimizers)[-1]._inner_optimizer

    # Steps.

    @as_written
    def apply_gradients(self, grads_and_vars: Iterable):
        """Takes the inner optimizer's step, then updates the averages if that is due.

        Args:
          grads_and_vars: (gradient, variable) pairs; a gradient is a tensor, `tf.IndexedSlices` or None.

        Returns:
          The number of steps that the inner optimizer counts.

        Raises:
          TypeError: if `grads_and_vars` does not consist of pairs with variables; see `apply`.
        """
        self.apply(*kerases.checked_pairs(keras, grads_and_vars))
        return self._iterations

    @as_written
    def apply(self, grads: Sequence, trainable_variables: Optional[Sequence] = None) -> None:
        """Takes the inner optimizer's step, then updates the averages if that is due.

        Args:
          grads: gradients, as for `apply_gradients`.
          trainable_variables: their variables; None for those that the optimizer was built with.

        Raises:
          TypeError: if a variable is of tf_keras.
          ValueError: if there is no gradient at all, the optimizer was built with other variables, or
            `trainable_weights_only` is False and `shadow_copy` was not called.
          RuntimeError: if called in a cross-replica context.
          tf.errors.InvalidArgumentError: when the step runs while the weights are swapped. Neither the
            weights nor anything of this optimizer has changed then.
        """
        gradients = list(grads)
        kerases.check_replica_context("apply")
        if all(gradient is None for gradient in gradients):
            # No step: an error or nothing, as the inner optimizer has it.
            self._inner_optimizer.apply(gradients, trainable_variables)
            return
        variables = self._variables_of_step(trainable_variables)

        def take_step(gradients) -> None:
            self._inner_optimizer.apply(gradients, variables)

        trained = self._may_be_averaged(variables or self._updates.selection.trained)
        self._updates.around(
            trained,
            gradients,
            self._steps_taken,
            take_step,
            self._moves_weights(),
            self._moved_rows(gradients, variables or ()),
        )

    def _moved_rows(self, gradients: Sequence, variables: Sequence) -> List[Tuple[tf.Variable, Any]]:
        """The rows that a step moves, for variables of which it moves no others."""
        if not any(isinstance(gradient, tf.IndexedSlices) for gradient in gradients):
            return []
        inner, known = self._inner_optimizer, (keras.optimizers.SGD, keras.optimizers.Adagrad)
        # What scales gradients makes sparse ones dense. `Ftrl` moves all rows.
        moves_others = (
            type(inner) not in known
            or inner.weight_decay is not None
            or inner.global_clipnorm is not None
            or inner.loss_scale_factor is not None
            or bool(inner.gradient_accumulation_steps)
            or getattr(inner, "momentum", 0) != 0
        )
        given = [] if moves_others else given_rows(gradients, variables)
        return [(kerases.tf_variable(variable), indices) for variable, indices in given]

    def _variables_of_step(self, variables: Optional[Sequence]) -> Optional[list]:
        """The variables that `apply` got; None for those that the optimizer was built with."""
        if variables is None and not self.built:
            raise ValueError(
                "The variables are not known yet. Expected `trainable_variables`, or a call of "
                "`build(trainable_variables)` before."
            )
        if variables is None:
            return None
        variables = kerases.checked_list(keras, variables, "Expected a list of variables.")
        if not self.built:
            # Here, where nothing must wait for anything else: XLA creates no variables that do.
            self.build(variables)
        # Before anything is done, so that an unknown variable changes nothing.
        self._check_variables_are_known(variables)
        return variables

    def _check_variables_are_known(self, variables: list) -> None:
        self._inner_optimizer._check_variables_are_known(variables)

    def _moves(self) -> Optional[np.ndarray]:
        """See `_moves_in_a_cycle`."""
        inner = self._inner_optimizer
        parts = getattr(inner, "optimizers", None) or [inner]  # Those of a MultiOptimizer.
        if inner.built:
            parts = [part for part in parts if part.built]  # The others have no variables.
        return _moves_in_a_cycle(frozenset(part.gradient_accumulation_steps or 1 for part in parts))

    def _moves_weights(self) -> Union[bool, tf.Tensor]:
        moves = self._moves()
        if moves is None:
            return True
        place = core_variables.read_here(self._steps_variable()) % (len(moves) - 1)
        return tf.gather(np.diff(moves) > 0, place)

    # Settings that Keras looks for in this class.

    @property
    def _iterations(self):
        return self._inner_optimizer._iterations

    @_iterations.setter
    def _iterations(self, variable) -> None:
        pass  # Keras's constructor creates one.

    @property
    def _learning_rate(self):
        return faces.learning_rate_or_schedule(self._inner_optimizer)

    @_learning_rate.setter
    def _learning_rate(self, learning_rate) -> None:
        pass  # The same.

    def _track_variable(self, variable) -> None:
        if self._is_ready:
            super()._track_variable(variable)

    @property
    def loss_scale_factor(self) -> Optional[float]:
        """The inner optimizer's factor of the loss; setting it sets that."""
        return self._inner_optimizer.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, factor: Optional[float]) -> None:
        if self._is_ready:
            self._inner_optimizer.loss_scale_factor = factor
            # A LossScaleOptimizer or MultiOptimizer does this to what is put inside it.
            self._is_inside_another = factor is None

    def scale_loss(self, loss):
        """The loss times the inner optimizer's `loss_scale_factor`."""
        return self._inner_optimizer.scale_loss(loss)

    def exclude_from_weight_decay(self, var_list=None, var_names=None) -> None:
        """Excludes variables from the inner optimizer's weight decay, as Keras does."""
        self._inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def finalize_variable_values(self, var_list) -> None:
        """What `fit` calls at its end: the inner optimizer's; the averages stay where they are."""
        self._inner_optimizer.finalize_variable_values(var_list)

    # Variables.

    @property
    def variables(self) -> List[Any]:
        """All state: the inner optimizer's, the averages', a subclass's own.

        Inside another optimizer (LossScaleOptimizer, MultiOptimizer) it is the inner optimizer's alone:
        that one would save these variables a second time, and cannot load a file that has more or fewer
        of them. `get_weights` has all state.
        """
        inner = list(self._inner_optimizer.variables)
        if self._is_inside_another:
            return inner
        self._averages.hold(self._averages.slots)
        state = arrays.state_of(self)
        of_averages = state.variables()[len(state.inner) :]
        of_averages = of_averages[: len(of_averages) - len(state.own)]
        return inner + [self._as_keras(variable) for variable in of_averages] + list(self._variables)

    @property
    def weights(self) -> List[Any]:
        """Same as `variables`."""
        return self.variables

    def __dir__(self):
        # Keras looks through these where it saves and loads `.keras`. The state is in that file already,
        # and whoever is given the averages' variables keeps their rows from waiting.
        return set(super().__dir__()) - {"variables", "weights"}

    def _as_keras(self, variable: tf.Variable) -> Any:
        """The Keras variable that has this one inside, always the same."""
        if variable not in self._in_keras:
            name = variable.name.split(":")[0].replace("/", "_")
            self._in_keras[variable] = keras.Variable(variable, trainable=False, name=name)
        return self._in_keras[variable]

    def build(self, variables: Sequence) -> None:
        """Creates the state of the inner optimizer and the averages for the variables to train."""
        if not self._inner_optimizer.built:
            self._inner_optimizer.build(variables)
        selection = self._updates.selection
        selection.train(self._may_be_averaged(variables))
        if selection.trainable_only or selection.model is not None:
            self._averages.create(selection)
            with tf.init_scope():  # Eager steps look only where they create averages.
                check_others(self._averages)
        self.built = True

    def get_slot(self, var: Any, slot_name: str) -> tf.Variable:
        """The slot variable of `var`: its average.

        While the weights are swapped it holds the weights; `get_average` reads the average in either
        case.

        Args:
          var: a variable of the model.
          slot_name: `"average"`.

        Returns:
          A variable of TensorFlow shaped like `var`.

        Raises:
          KeyError: if there is no such slot.
        """
        if slot_name != "average":
            raise KeyError(f"Expected 'average'. Received: slot_name={slot_name!r}")
        return self._averages.slot(*self._tf_variables([var]))

    # What the wrapper and its files ask for.

    @staticmethod
    def _tf_variables(variables: Iterable) -> list:
        """TensorFlow's variables in the model's."""
        return [kerases.tf_variable(variable) for variable in variables]

    def _may_be_averaged(self, variables: Iterable) -> list:
        """TensorFlow's variables in the model's, but for those that gradients overwrite (float8)."""
        chosen = []
        for variable in variables:
            if not getattr(variable, "overwrite_with_gradient", False):
                chosen += self._tf_variables([variable])
                if hasattr(variable, "path"):
                    self._paths[chosen[-1]] = variable.path
        return chosen

    @staticmethod
    def _is_model(thing: object) -> bool:
        kerases.check_same_keras(keras, thing)
        return isinstance(thing, (keras.layers.Layer, tf.Module))

    def _checked_variables(self, variables: Any, expected: str = "Expected a list of variables.") -> list:
        """An iterable of variables as a list of TensorFlow's."""
        return self._may_be_averaged(kerases.checked_list(keras, variables, expected))

    def _variable_name(self, variable: tf.Variable) -> str:
        return self._paths.get(variable, variable.name)

    def _steps_variable(self) -> tf.Variable:
        return kerases.tf_variable(self._iterations)

    def _steps_taken(self) -> tf.Tensor:
        """The number of steps so far that moved weights: scalar int64 tensor."""
        steps, moves = core_variables.read_here(self._steps_variable()), self._moves()
        if moves is None:
            return steps
        cycle = len(moves) - 1
        return steps // cycle * moves[-1] + tf.gather(moves, steps % cycle)

    def _inner_state(self) -> Tuple[List[tf.Variable], int]:
        """All variables of the inner optimizer, iterations first; none of them counts as a slot."""
        inner = self._inner_optimizer
        if isinstance(inner, Keras3Face):
            return arrays.state_of(inner).variables(), 0
        return self._tf_variables(inner.variables), 0

    def _own_variables(self) -> List[tf.Variable]:
        """Variables that a subclass added."""
        return self._tf_variables(self._variables)

    def _loss_scale(self) -> List[tf.Variable]:
        """Nothing: Keras 3 saves it with the LossScaleOptimizer."""
        return []

    def _serialize_inner(self) -> Dict[str, Any]:
        return keras.optimizers.serialize(self.inner_optimizer)

    def _restore_target(self, position: Any, is_of_predecessor: bool):
        """What the node of an inner optimizer in a checkpoint is to be restored into."""
        inner = self._inner_optimizer
        # A nested averaging optimizer asks this of its own inner one.
        if positions.is_of_keras_3(position) or "inner_optimizer" in positions.child_names(position):
            return inner
        remedy = "that optimizer, and a model of tf_keras, which has its variables at other places"
        return without_state("an optimizer of tf_keras", inner, self._steps_variable(), remedy)

    def _inner_waits(self) -> bool:
        """Whether restored values wait for the inner optimizer's variables."""
        inner = self._inner_optimizer
        return not inner.built and bool(self._steps_variable() > 0)

    def _saved_model_children(self) -> Dict[str, Any]:
        return {}  # `export` is for inference, and Keras 3 loads no optimizer from a SavedModel.

    def get_config(self) -> Dict[str, Any]:
        # Both Kerases write the same module for their optimizers.
        return {"keras": self.keras_name}


@functools.cache
def _moves_in_a_cycle(accumulated: FrozenSet[int]) -> Optional[np.ndarray]:
    """How often weights have moved after 0, 1, ... steps of one cycle; None if each step moves some.

    Args:
      accumulated: the numbers of gradients that are accumulated for a move.
    """
    if 1 in accumulated:
        return None
    steps = np.arange(math.lcm(*accumulated) + 1)
    moved = np.any([steps % each == 0 for each in accumulated], axis=0)
    return np.cumsum(moved) - 1  # At 0 nothing has moved.
