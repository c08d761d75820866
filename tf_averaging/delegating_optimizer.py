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
"""An optimizer around another one, which keeps all settings and computes all gradients."""

from __future__ import annotations

from typing import List

import tensorflow as tf
import tf_keras

from tf_averaging import inner_optimizer as inner_optimizers


class DelegatingOptimizer(tf_keras.optimizers.Optimizer):
    """What a wrapper leaves to the optimizer inside: everything but `apply_gradients` and state.

    Steps, learning rate, clipping and weight decay have one home, the inner optimizer, of either
    generation; reading and setting them here reads and sets them there, as callbacks do.

    Args:
      optimizer: the inner optimizer.
      name: name of this one.
    """

    def __init__(self, optimizer: inner_optimizers.Optimizer, name: str):
        self._inner_optimizer = self._no_dependency(optimizer)
        super().__init__(
            name=name,
            weight_decay=self.weight_decay,
            clipnorm=self.clipnorm,
            clipvalue=self.clipvalue,
            global_clipnorm=self.global_clipnorm,
        )
        self._track_trackable(optimizer, "inner_optimizer")

    # Training.

    def minimize(self, loss, var_list, grad_loss=None, name=None, tape=None):
        """Computes gradients of `loss` and applies them.

        Args:
          loss: a callable without arguments that returns the loss, or a tensor (then `tape` is needed).
          var_list: variables to train, or a callable that returns them.
          grad_loss: gradient of what is minimized by `loss`, same shape as it; None for ones.
          name: see `apply_gradients`.
          tape: the `tf.GradientTape` that recorded a `loss` tensor.

        Returns:
          What `apply_gradients` returns.

        Raises:
          ValueError: if `loss` is a tensor and there is no `tape`.
        """
        pairs = self.compute_gradients(loss, var_list, tape=tape, grad_loss=grad_loss)
        return self.apply_gradients(pairs, name=name)

    def compute_gradients(self, loss, var_list, tape=None, grad_loss=None) -> list:
        """Computes the gradients as the inner optimizer does; see `minimize` for the arguments.

        Returns:
          (gradient, variable) pairs; a gradient may be None.
        """
        if grad_loss is not None:
            loss, tape = _weighted_loss(loss, tape, grad_loss)
        return inner_optimizers.compute_gradients(self._inner_optimizer, loss, var_list, tape)

    def aggregate_gradients(self, grads_and_vars) -> list:
        """Sums the gradients over the replicas, as the inner optimizer does.

        Args:
          grads_and_vars: (gradient, variable) pairs.

        Returns:
          The pairs with the sums, each shaped like its variable.
        """
        return inner_optimizers.aggregate_gradients(self._inner_optimizer, grads_and_vars)

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
        """Operations, in the graph being built, that minimize `loss`; see `get_gradients`.

        Returns:
          A list of operations.
        """
        params = tf.nest.flatten(params)
        return [self.apply_gradients(zip(self.get_gradients(loss, params), params))]

    # The inner optimizer and its settings.

    @property
    def inner_optimizer(self) -> inner_optimizers.Optimizer:
        """The optimizer that takes the steps."""
        return self._inner_optimizer

    @property
    def iterations(self) -> tf.Variable:
        """The number of steps taken, the inner optimizer's own: scalar int64 variable."""
        return self._inner_optimizer.iterations

    @iterations.setter
    def iterations(self, variable: tf.Variable) -> None:
        self._inner_optimizer.iterations = variable

    # Where the base class keeps these, and callbacks look for them.

    @property
    def _iterations(self) -> tf.Variable:
        return self.iterations

    @property
    def _learning_rate(self):
        return inner_optimizers.learning_rate_or_schedule(self._inner_optimizer)

    def _create_iteration_variable(self) -> None:
        pass  # The inner optimizer's is the one.

    @property
    def learning_rate(self):
        """The inner optimizer's learning rate; setting it sets that."""
        return self._inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate) -> None:
        self._inner_optimizer.learning_rate = learning_rate

    @property
    def lr(self):
        """Same as `learning_rate`."""
        return self.learning_rate

    @lr.setter
    def lr(self, learning_rate) -> None:
        self.learning_rate = learning_rate

    def exclude_from_weight_decay(self, var_list=None, var_names=None) -> None:
        """Excludes variables from the inner optimizer's weight decay.

        Args:
          var_list: variables.
          var_names: strings; a variable whose name contains one of them is excluded.

        Raises:
          ValueError: if the inner optimizer is a legacy one, which has no weight decay.
        """
        if inner_optimizers.is_legacy(self._inner_optimizer):
            raise ValueError(
                "Legacy optimizers have no weight decay. Expected a `tf_keras.optimizers.Optimizer` "
                f"inside. Received: {self._inner_optimizer}"
            )
        self._inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def finalize_variable_values(self, var_list) -> None:
        """What `fit` calls at its end: the inner optimizer's; the averages stay where they are.

        Args:
          var_list: the trained variables.
        """
        if not inner_optimizers.is_legacy(self._inner_optimizer):
            self._inner_optimizer.finalize_variable_values(var_list)

    def __setattr__(self, name, value):
        # The base class would first look at the old value, and legacy optimizers create it when asked.
        if name == "iterations":
            type(self).iterations.fset(self, value)  # type: ignore[attr-defined]
        else:
            super().__setattr__(name, value)

    def add_weight(self, name: str, shape, **options) -> tf.Variable:
        """Creates a variable of a legacy inner optimizer.

        Args:
          name: its name.
          shape: its shape.
          **options: see `tf_keras.optimizers.legacy.Optimizer.add_weight`.

        Returns:
          The variable.

        Raises:
          ValueError: if the inner optimizer is not a legacy one; `add_variable` creates a variable of
            this optimizer.
        """
        self._check_inner_is_legacy("add_weight")
        return self._inner_optimizer.add_weight(name, shape, **options)

    def _check_inner_is_legacy(self, method: str) -> None:
        if not inner_optimizers.is_legacy(self._inner_optimizer):
            raise ValueError(
                f"`{method}` is for legacy inner optimizers. Expected a "
                f"`tf_keras.optimizers.legacy.Optimizer` inside. Received: {self._inner_optimizer}"
            )


def _inner_setting(name: str, doc: str) -> property:
    def get(self):
        return getattr(self._inner_optimizer, name, None)

    def set_(self, value):
        if value != get(self):
            setattr(self._inner_optimizer, name, value)

    return property(get, set_, doc=doc)


for _name in inner_optimizers.CLIPPING + ("weight_decay",):
    setattr(
        DelegatingOptimizer,
        _name,
        _inner_setting(_name, f"The inner optimizer's `{_name}`; setting it sets that."),
    )


def orders_itself() -> bool:
    """Whether stateful operations run in program order: not so in graphs of TF 1.

    Raises:
      RuntimeError: in a branch or loop body in such a graph, and in `tf.compat.v1.wrap_function`. These
        are functions, but the order does not hold in them either, and TensorFlow does not keep the one
        asked for where they call functions.
    """
    if tf.executing_eagerly():
        return True
    graph = around = tf.compat.v1.get_default_graph()
    while around is not None:  # AutoGraph tries loops out in a graph of its own, which never runs.
        # A private name: nothing public says it. `tests/private_names_test.py` fails if it goes away.
        if around._add_control_dependencies:
            return True
        around = getattr(around, "outer_graph", None)
    if tf.inside_function():
        raise RuntimeError(
            "In a conditional or loop of a TF 1 graph, and in `tf.compat.v1.wrap_function`, the order of "
            "weights and averages cannot be kept. Expected this call outside of it, in a `tf.function`, "
            f"or in eager mode. Received: {graph}"
        )
    return False


def _weighted_loss(loss, tape, grad_loss):
    """A loss whose gradients are those of `loss` times `grad_loss`."""
    if callable(loss):
        return lambda: tf.reduce_sum(loss() * tf.stop_gradient(grad_loss)), tape
    if tape is None:
        raise ValueError("Expected the `tape` that recorded the loss, since `loss` is a tensor.")
    with tape:
        return tf.reduce_sum(loss * tf.stop_gradient(grad_loss)), tape
