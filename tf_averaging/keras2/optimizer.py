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
"""The face of an averaging optimizer for tf_keras, around an optimizer of either generation."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import tensorflow as tf
import tf_keras

from tf_averaging import faces
from tf_averaging import kerases
from tf_averaging.core import variables as core_variables
from tf_averaging.core.variables import as_written
from tf_averaging.keras2 import inner_optimizer as inner_optimizers
from tf_averaging.keras2.variable_list import VariableList
from tf_averaging.saving import arrays
from tf_averaging.saving import positions


class Keras2Face(tf_keras.optimizers.Optimizer):
    """What makes an averaging optimizer an optimizer of tf_keras, around one of its optimizers.

    Steps, gradients and settings are left to the inner optimizer, of either generation.

    Args:
      inner_optimizer: the optimizer that takes the steps.
      name: name of this one.
    """

    keras = tf_keras
    keras_name = "tf_keras"
    inner_types = (tf_keras.optimizers.Optimizer, tf_keras.optimizers.legacy.Optimizer)
    clipping_to_choose_from = ("clipnorm", "global_clipnorm")
    # Where a config says that an optimizer is, and where it is.
    modules = {
        "keras.optimizers": tf_keras.optimizers,
        "keras.optimizers.legacy": tf_keras.optimizers.legacy,
    }

    # How a config without a module is read. It edits its argument, and does not know all optimizers, but
    # it alone reads what older versions of Keras wrote.
    deserialize_without_module = functools.partial(
        tf_keras.optimizers.deserialize, use_legacy_format=True
    )

    iterations = faces.of_inner(
        "iterations", "The number of steps taken, the inner optimizer's own: scalar int64 variable."
    )
    _iterations = iterations
    update_step = faces.update_step
    learning_rate = lr = faces.of_inner(
        "learning_rate", "The inner optimizer's learning rate; setting it sets that."
    )

    def __init__(self, inner_optimizer: Any, name: str):
        # Not an attribute that TensorFlow tracks: it would be saved under a second name.
        object.__setattr__(self, "_inner_optimizer", inner_optimizer)
        self._is_legacy = isinstance(inner_optimizer, tf_keras.optimizers.legacy.Optimizer)
        super().__init__(name=name)

    @property
    def inner_optimizer(self) -> Any:
        """The optimizer that takes the steps."""
        return (self, *self._others.optimizers)[-1]._inner_optimizer

    # Training.

    @as_written
    def apply_gradients(
        self,
        grads_and_vars: Iterable,
        name: Optional[str] = None,
        skip_gradients_aggregation: bool = False,
        experimental_aggregate_gradients: bool = True,
    ):
        """Takes the inner optimizer's step, then updates the averages if that is due.

        Args:
          grads_and_vars: (gradient, variable) pairs; a gradient is a tensor, `tf.IndexedSlices` or None.
          name: name scope of the operations; the optimizer's name if None.
          skip_gradients_aggregation: True if the gradients are summed over the replicas already.
          experimental_aggregate_gradients: the same the other way round, as legacy optimizers spell it.

        Returns:
          What the inner optimizer returns.

        Raises:
          TypeError: if `grads_and_vars` does not consist of pairs with variables.
          ValueError: if there is no gradient at all, or `trainable_weights_only` is False and
            `shadow_copy` was not called.
          RuntimeError: if called in a cross-replica context.
          tf.errors.InvalidArgumentError: when the step runs while the weights are swapped. Neither the
            weights nor anything of this optimizer has changed then (what ran before the step may have:
            a forward pass in training mode, the counter of a LossScaleOptimizer).
        """
        gradients, variables = kerases.checked_pairs(tf_keras, grads_and_vars)
        kerases.check_replica_context("apply_gradients")
        options: Dict[str, Any] = {"name": name}
        # By default the gradients are summed. Some optimizers take no argument that says so.
        if skip_gradients_aggregation or not experimental_aggregate_gradients:
            if self._is_legacy:
                options["experimental_aggregate_gradients"] = False
            else:
                options["skip_gradients_aggregation"] = True

        def take_step(gradients):
            return self._inner_optimizer.apply_gradients(list(zip(gradients, variables)), **options)

        if all(gradient is None for gradient in gradients):
            # No step: an error or nothing, as the inner optimizer has it.
            return take_step(gradients)
        moved: Sequence = ()
        if any(isinstance(gradient, tf.IndexedSlices) for gradient in gradients):
            moved = inner_optimizers.moved_rows(self._inner_optimizer, gradients, variables)
        return self._updates.around(variables, gradients, self._steps_taken, take_step, moved_rows=moved)

    def minimize(self, loss, var_list, grad_loss=None, name=None, tape=None):
        """Computes gradients of `loss` and applies them.

        Args:
          loss: a callable without arguments that returns the loss, or a tensor (then `tape` is needed).
          var_list: variables to train, or a callable that returns them.
          grad_loss: gradient of what is minimized by `loss`, same shape as it; None for ones.
          name: see `apply_gradients`.
          tape: the `tf.GradientTape` that recorded a `loss` tensor; without it that is a ValueError.

        Returns:
          What `apply_gradients` returns.
        """
        pairs = self.compute_gradients(loss, var_list, tape=tape, grad_loss=grad_loss)
        return self.apply_gradients(pairs, name=name)

    def compute_gradients(self, loss, var_list, tape=None, grad_loss=None) -> list:
        """(gradient or None, variable) pairs as the inner optimizer computes them; see `minimize`."""
        if grad_loss is not None:
            loss, tape = _weighted_loss(loss, tape, grad_loss)
        inner = self._inner_optimizer
        compute = inner._compute_gradients if self._is_legacy else inner.compute_gradients
        return compute(loss, var_list, tape=tape)

    def aggregate_gradients(self, grads_and_vars) -> list:
        """The (gradient, variable) pairs summed over the replicas, as the inner optimizer does it."""
        inner = self._inner_optimizer
        aggregate = inner._aggregate_gradients if self._is_legacy else inner.aggregate_gradients
        return aggregate(grads_and_vars)

    def get_gradients(self, loss: tf.Tensor, params) -> List[tf.Tensor]:
        """Gradients of a loss in the graph being built.

        Args:
          loss: tensor.
          params: variables, in any nesting.

        Returns:
          One gradient for each variable.

        Raises:
          RuntimeError: in eager mode.
          ValueError: if a variable has no gradient.
        """
        if tf.executing_eagerly():
            raise RuntimeError(
                "`get_gradients` and `get_updates` work in graphs only, and this is eager mode. Use "
                "`tf.GradientTape` and `apply_gradients`, or `minimize`."
            )
        params = tf.nest.flatten(params)
        gradients = tf.gradients(loss, params)
        missing = [param.name for param, grad in zip(params, gradients) if grad is None]
        if missing:
            raise ValueError(f"Expected a loss that depends on all variables. No gradient: {missing}")
        return gradients

    def get_updates(self, loss: tf.Tensor, params) -> list:
        """A list of operations, in the `tf.function` being traced, that minimize `loss`."""
        params = tf.nest.flatten(params)
        return [self.apply_gradients(zip(self.get_gradients(loss, params), params))]

    # Settings that tf_keras looks for in this class.

    @property
    def _learning_rate(self):
        return faces.learning_rate_or_schedule(self._inner_optimizer)

    def _create_iteration_variable(self) -> None:
        pass  # The inner optimizer's is the one.

    def exclude_from_weight_decay(self, var_list=None, var_names=None) -> None:
        """Excludes variables from the inner optimizer's weight decay.

        Args:
          var_list: variables.
          var_names: strings; a variable whose name contains one of them is excluded.

        Raises:
          ValueError: if the inner optimizer is a legacy one, which has no weight decay.
        """
        if self._is_legacy:
            raise ValueError(
                "Legacy optimizers have no weight decay. Expected a `tf_keras.optimizers.Optimizer` "
                f"inside. Received: {self._inner_optimizer}"
            )
        self._inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def finalize_variable_values(self, var_list) -> None:
        """What `fit` calls at its end: the inner optimizer's; the averages stay where they are."""
        if not self._is_legacy:
            self._inner_optimizer.finalize_variable_values(var_list)

    # Variables.

    @property
    def variables(self) -> List[tf.Variable]:
        """All state, as a list that can also be called: iterations, inner optimizer, averages.

        Under a LossScaleOptimizer it is empty, and so is that one's: it would save these variables a
        second time, and cannot load a file that has more or fewer of them. `get_weights` has all state.
        """
        # A private name: nothing public says it. `tests/private_names_test.py` fails if it goes away.
        if getattr(self, "_is_wrapped_by_loss_scale_optimizer", False):
            return VariableList((), "under a LossScaleOptimizer lacks averages and inner state")
        self._averages.hold(self._averages.slots)
        lost = "lacks the list given to `shadow_copy`" if self._updates.selection.is_fixed else None
        return VariableList(arrays.state_of(self).variables(), lost)

    @property
    def weights(self) -> List[tf.Variable]:
        """Same as `variables`."""
        return self.variables

    def build(self, var_list: Sequence[tf.Variable]) -> None:
        """Creates the state of the inner optimizer and the averages for the variables to train."""
        if self._is_legacy:
            # The name that tf_keras's own loaders use.
            self._inner_optimizer._create_all_weights(list(var_list))
        else:
            self._inner_optimizer.build(var_list)
        selection = self._updates.selection
        selection.train(var_list)
        if selection.trainable_only or selection.model is not None:
            self._averages.create(selection)
        self._built = True

    def get_slot(self, var: tf.Variable, slot_name: str) -> tf.Variable:
        """The slot variable of `var`: its average, or a slot of a legacy inner optimizer.

        While the weights are swapped, the variable returned for `"average"` holds the weights;
        `get_average` reads the average in either case.

        Args:
          var: a variable of the model.
          slot_name: `"average"`, or a name that the inner optimizer knows.

        Returns:
          A variable shaped like `var`.

        Raises:
          KeyError: if there is no such slot.
        """
        if slot_name == "average":
            return self._averages.slot(var)
        if not self._is_legacy:
            raise KeyError(
                f"Expected 'average': a current-generation inner optimizer has no slots by name. "
                f"Received: slot_name={slot_name!r}"
            )
        return self._inner_optimizer.get_slot(var, slot_name)

    def add_slot(self, var: tf.Variable, slot_name: str, initializer=None, shape=None) -> tf.Variable:
        """Creates a slot for `var` and returns it.

        Args:
          var: a variable of the model.
          slot_name: `"average"`, or any other name for a slot of a legacy inner optimizer.
          initializer: a Keras initializer, its name or a tensor; None for zeros. Not for averages.
          shape: None for the variable's. Not for averages.

        Returns:
          The slot variable.

        Raises:
          ValueError: if an argument does not fit the slot, or the inner optimizer has no slots by name.
        """
        if slot_name == "average":
            if initializer is not None or shape is not None:
                raise ValueError(
                    "An average starts from the variable's own value and has its shape. Expected "
                    f"neither initializer nor shape. Received: {initializer!r}, {shape!r}"
                )
            if not core_variables.averageable([var]):
                raise ValueError(f"Expected a floating-point or complex variable. Received: {var!r}")
            self._averages.add(core_variables.averageable([var]))
            return self.get_slot(var, slot_name)
        self._check_inner_is_legacy("add_slot")
        return self._inner_optimizer.add_slot(
            var, slot_name, "zeros" if initializer is None else initializer, shape
        )

    def add_weight(self, name: str, shape, **options) -> tf.Variable:
        """Creates a variable of a legacy inner optimizer.

        Args:
          name: its name.
          shape: its shape.
          **options: see `tf_keras.optimizers.legacy.Optimizer.add_weight`.

        Returns:
          The variable.

        Raises:
          ValueError: if the inner optimizer is not a legacy one.
        """
        self._check_inner_is_legacy("add_weight")
        return self._inner_optimizer.add_weight(name, shape, **options)

    def _check_inner_is_legacy(self, method: str) -> None:
        if not self._is_legacy:
            raise ValueError(
                f"`{method}` is for legacy inner optimizers. Expected a "
                f"`tf_keras.optimizers.legacy.Optimizer` inside. Received: {self._inner_optimizer}"
            )

    # What the wrapper and its files ask for.

    @staticmethod
    def _tf_variables(variables: Iterable) -> list:
        """TensorFlow's variables in the model's: the same here."""
        return list(variables)

    _may_be_averaged = _tf_variables

    @staticmethod
    def _is_model(thing: object) -> bool:
        kerases.check_same_keras(tf_keras, thing)
        return isinstance(thing, tf.Module)

    @staticmethod
    def _checked_variables(variables: Any, expected: str = "Expected a list of variables.") -> list:
        """An iterable of variables as a list of TensorFlow's."""
        return kerases.checked_list(tf_keras, variables, expected)

    @staticmethod
    def _variable_name(variable: tf.Variable) -> str:
        return variable.name

    def _steps_variable(self) -> tf.Variable:
        return self._inner_optimizer.iterations

    def _steps_taken(self) -> tf.Tensor:
        """The number of steps taken so far: scalar int64 tensor."""
        with tf.init_scope():
            iterations = self._steps_variable()  # Legacy optimizers create it when it is first asked for.
        return core_variables.read_here(iterations)

    def _inner_state(self) -> Tuple[List[tf.Variable], int]:
        """All variables of the inner optimizer, iterations first; how many of them are slots, at the end.

        A restored checkpoint has legacy optimizers create their slots in the order of the file. Here they
        come in the order of the trained variables.
        """
        inner = self._inner_optimizer
        variables = list(inner.weights if self._is_legacy else inner.variables)
        if not self._is_legacy:
            del variables[0]  # The counter it was created with, which another one may have replaced.
        slots = []
        for name in sorted(inner.get_slot_names()) if self._is_legacy else ():
            for variable in self._updates.selection.trained:
                with contextlib.suppress(KeyError):  # Created when a gradient first reaches the variable.
                    slots.append(inner.get_slot(variable, name))
        in_order = set(map(id, [inner.iterations, *slots]))
        others = [v for v in variables if id(v) not in in_order]
        return [inner.iterations, *others, *slots], len(slots)

    def _own_variables(self) -> List[tf.Variable]:
        """Variables that a subclass added."""
        return list(self._variables)

    def _loss_scale(self) -> List[tf.Variable]:
        """Scale and counter of a LossScaleOptimizer around this one, or nothing."""
        loss_scale = tf_keras.optimizers.Optimizer._lookup_dependency(self, "loss_scale")
        return [loss_scale.current_loss_scale, loss_scale.counter] if loss_scale else []

    def _serialize_inner(self) -> Dict[str, Any]:
        return tf_keras.optimizers.serialize(self.inner_optimizer)

    def _restore_target(self, position: Any, is_of_predecessor: bool):
        """What the node of an inner optimizer in a checkpoint is to be restored into."""
        if not (self._is_legacy or is_of_predecessor) and positions.is_of_current_generation(position):
            return self._inner_optimizer
        return inner_optimizers.restore_target(self._inner_optimizer, position, is_of_predecessor)

    def _inner_waits(self) -> bool:
        """Whether restored values wait for the inner optimizer's variables."""
        has_steps = bool(self.iterations > 0)  # Legacy optimizers restore them when they are asked for.
        # They create their slots when those are restored; averaging optimizers see to their state.
        return has_steps and not self._is_legacy and not isinstance(self._inner_optimizer, Keras2Face)

    def _saved_model_children(self) -> Dict[str, Any]:
        inner_optimizers.warn_of_saved_model(bool(self.weights_swapped))
        # tf_keras looks for these two when it loads.
        return {"_iterations": self.iterations, "_variables": self._variables}

    def get_config(self) -> Dict[str, Any]:
        # tf_keras takes an optimizer whose config does not say so for a legacy one.
        return {"is_legacy_optimizer": False}


def _weighted_loss(loss, tape, grad_loss):
    """A loss whose gradients are those of `loss` times `grad_loss`."""
    if callable(loss):
        return lambda: tf.reduce_sum(loss() * tf.stop_gradient(grad_loss)), tape
    if tape is None:
        raise ValueError("Expected the `tape` that recorded the loss, since `loss` is a tensor.")
    with tape:
        return tf.reduce_sum(loss * tf.stop_gradient(grad_loss)), tape
