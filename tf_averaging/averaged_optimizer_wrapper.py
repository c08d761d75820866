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
"""The base class of all averaging optimizers: a tf_keras optimizer around another one."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Dict, Iterable, List, Optional, Sequence, Type, Union

import tensorflow as tf
import tf_keras

from tf_averaging import argument_checks as checks
from tf_averaging import average_ops
from tf_averaging import average_slots
from tf_averaging import control_flow
from tf_averaging import delegating_optimizer
from tf_averaging import inner_optimizer as inner_optimizers
from tf_averaging import saved_averages
from tf_averaging import saved_optimizer
from tf_averaging import slot_creation

# Without AutoGraph, which would otherwise rewrite every function called in a `tf.function`: nothing here
# needs it, and tracing takes a multiple of the time.
_as_written = tf.autograph.experimental.do_not_convert


class AveragedOptimizerWrapper(saved_optimizer.SavedOptimizer):
    """Base class for optimizers that keep an average of the weights which another optimizer trains.

    The inner optimizer takes its steps as it would alone, bit for bit; after a step on which an update
    is due, the weights are folded into their averages, which are slot variables beside the inner
    optimizer's own. With `t` the number of steps taken before (`iterations`), an update is due when
    `t >= start_averaging` and `t - start_averaging` is a multiple of `average_period`. Before the first
    one the averages are the current weights.

    A subclass says how much the weights count, by overriding `averaging_weight`. The mean of all
    weights so far, complete with checkpoints, swapping and every distribution strategy:

    >>> @tf_keras.saving.register_keras_serializable("my_package")
    ... class RunningMean(tfav.AveragedOptimizerWrapper):
    ...     def averaging_weight(self, step):
    ...         return 1.0 / (tf.cast(self.num_averaged, tf.float64) + 1.0)
    >>> weight = tf.Variable(4.0)
    >>> optimizer = RunningMean(tf_keras.optimizers.SGD(1.0))
    >>> for _ in range(3):
    ...     _ = optimizer.apply_gradients([(tf.constant(1.0), weight)])
    >>> with optimizer.swapped_weights():  # the weights were 3, 2 and 1
    ...     print(weight.numpy())
    2.0
    >>> print(weight.numpy())
    1.0

    A scheme that is no interpolation overrides `average_op` instead.

    Args:
      optimizer: the inner optimizer: a `tf_keras.optimizers.Optimizer`, a
        `tf_keras.optimizers.legacy.Optimizer`, the name of one, or its config dict.
      name: name of this optimizer, and the name scope of its operations.
      start_averaging: int >= 0, the first step (counted from 0) on which an update is due.
      average_period: int >= 1, the number of steps from one update to the next.
      trainable_weights_only: whether to average trainable weights only. If False, all floating-point
        and complex variables of the model are averaged, the moving statistics of BatchNormalization
        among them; `shadow_copy(model)` must then be called before training.
      average_dtype: dtype of the averages of real variables, where it is wider than the variable's own.
        None: float32 for float16 and bfloat16 variables, their own dtype for others.
      jit_compile: whether the update is compiled by XLA: `"auto"` for large variables where XLA is
        available, or a bool that forces it. The results agree up to rounding.
      **settings: `learning_rate` (or `lr`), `clipnorm`, `clipvalue`, `global_clipnorm`, and for a legacy
        inner optimizer `decay`, which configure the inner optimizer. They set what it leaves unset: an
        optimizer given by name takes all of them, an instance a clipping value that is None.

    Raises:
      TypeError: if an argument has the wrong type, is unknown, if `optimizer` cannot be wrapped (a Keras
        3 optimizer, a LossScaleOptimizer, which goes outside), or if the class overrides neither
        `averaging_weight` nor `average_op`.
      ValueError: if an argument is out of range, if a setting contradicts the inner optimizer's own, or
        if the inner optimizer has `use_ema=True`.
    """

    def __init__(
        self,
        optimizer: Union[str, Dict[str, Any], inner_optimizers.Optimizer],
        name: str = "AveragedOptimizerWrapper",
        *,
        start_averaging: int = 0,
        average_period: int = 1,
        trainable_weights_only: bool = True,
        average_dtype: Union[None, str, tf.DType] = None,
        jit_compile: Union[bool, str] = "auto",
        **settings,
    ):
        self._check_overrides()
        if not isinstance(name, str):
            raise TypeError(f"Expected `name` to be a string. Received: name={name!r}")
        self._start_averaging = checks.checked_count("start_averaging", start_averaging, minimum=0)
        self._average_period = checks.checked_count("average_period", average_period, minimum=1)
        trainable_weights_only = checks.checked_trainable_weights_only(trainable_weights_only)
        self._average_dtype = checks.checked_average_dtype(average_dtype)
        inner = inner_optimizers.get(optimizer, **checks.checked_settings(settings))
        averages = saved_averages.SavedAverages(self._average_dtype)
        super().__init__(inner, name, averages, trainable_weights_only)
        self.jit_compile = checks.checked_jit_compile(jit_compile)

    def _check_overrides(self) -> None:
        cls = type(self)
        has_own_weight = cls.averaging_weight is not AveragedOptimizerWrapper.averaging_weight
        if not has_own_weight and not self._has_own_average_op:
            raise TypeError(
                f"{cls.__name__} does not say how to average. Expected a class that overrides "
                "`averaging_weight` (or `average_op`), such as `tf_averaging.SWA` or "
                f"`tf_averaging.ExponentialMovingAverage`. Received: {cls}"
            )

    # What a subclass defines.

    def averaging_weight(self, step: tf.Tensor) -> tf.Tensor:
        """How much the weights count in the new average, on a step on which an update is due.

        The new average is `average + averaging_weight * (weights - average)`. `start_averaging` and
        `num_averaged` may be used; `step` is exact however many steps were taken.

        Args:
          step: scalar int64 tensor, the number of steps taken before this one.

        Returns:
          Scalar float64 tensor, 0 to 1. It is computed in float64 and cast once to each average's dtype.
        """
        raise NotImplementedError("The class overrides `average_op` instead.")

    def average_op(self, var: tf.Tensor, average_var: tf.Tensor) -> tf.Tensor:
        """The new value of one average; override it for schemes that are no interpolation.

        Args:
          var: the variable's value after the step, in the average's dtype.
          average_var: the average's value, same shape and dtype.

        Returns:
          The average's new value, same shape and dtype. This class returns the interpolation with
          `averaging_weight` for the step just taken.
        """
        weight = checks.checked_weight("averaging_weight", self.averaging_weight(self._last_step()))
        return average_var + tf.cast(weight, average_var.dtype) * (var - average_var)

    @property
    def _has_own_average_op(self) -> bool:
        return type(self).average_op is not AveragedOptimizerWrapper.average_op

    @property
    def _first_update_is_copy(self) -> bool:
        """Whether the first update sets the averages to the weights, as a plain mean does.

        The averages need not be brought up to date before that step then, and it costs something on
        every step to look whether they must be.
        """
        return False

    # Training.

    @_as_written
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
          What the inner optimizer returns; in graphs of TF 1 an operation that does all.

        Raises:
          TypeError: if `grads_and_vars` does not consist of pairs with variables.
          ValueError: if there is no gradient at all, or `trainable_weights_only` is False and
            `shadow_copy` was not called.
          RuntimeError: if called in a cross-replica context.
          tf.errors.InvalidArgumentError: when the step runs while the weights are swapped. Neither the
            weights nor anything of this optimizer has changed then (what ran before the step may have:
            a forward pass in training mode, the counter of a LossScaleOptimizer).
        """
        grads_and_vars = checks.checked_pairs(grads_and_vars)
        if tf.distribute.has_strategy() and tf.distribute.in_cross_replica_context():
            raise RuntimeError(
                "`apply_gradients` must be called on each replica, but this is a cross-replica context. "
                "Call it in a function that `tf.distribute.Strategy.run` runs."
            )
        aggregate = experimental_aggregate_gradients and not skip_gradients_aggregation

        def step_inside(pairs):
            return inner_optimizers.apply_gradients(self._inner_optimizer, pairs, name, aggregate)

        if all(gradient is None for gradient, _ in grads_and_vars):
            # No step: an error or nothing, as the inner optimizer has it.
            return step_inside(grads_and_vars)
        self._check_graph()
        with tf.name_scope(name or self.name), tf.init_scope():
            self._create_averages([variable for _, variable in grads_and_vars])
        if not self._averages:
            return step_inside(grads_and_vars)
        step = self._step()
        due = self._is_due(step)
        # The step is read before the inner optimizer counts it, in graphs of TF 1 too.
        with control_flow.after(step), control_flow.after(self._averages.check_training()):
            started = []
            if not self._first_update_is_copy:
                started = self._once(lambda: self._averages.start(due))
            with control_flow.after(*started):
                # Each gradient waits by itself. Keras's sum over replicas, an operation of all gradients,
                # would wait otherwise, and with it all updates for the last gradient.
                result = step_inside([(control_flow.waiting(g), v) for g, v in grads_and_vars])
        with tf.name_scope(name or self.name), control_flow.after(result):
            folded = self._once(lambda: self._fold(step, due))
        return result if delegating_optimizer.orders_itself() else tf.group(result, *folded)

    def _fold(self, step: tf.Tensor, due=True, weight: Optional[tf.Tensor] = None) -> list:
        """Folds the weights into the averages if `due`; `weight` replaces the scheme's own."""

        def own_weight():
            return checks.checked_weight("averaging_weight", self.averaging_weight(step))

        def own_average_op(var, average_var):
            return checks.checked_average(self.average_op(var, average_var), average_var)

        return self._averages.fold(
            due,
            own_weight if weight is None else lambda: weight,
            self.jit_compile,
            average_op=own_average_op if self._has_own_average_op and weight is None else None,
            first_is_copy=self._first_update_is_copy,
        )

    def _is_due(self, step: tf.Tensor) -> Union[bool, tf.Tensor]:
        start, period = self.start_averaging, self._average_period
        conditions = []
        if isinstance(start, tf.Tensor) or start > 0:
            conditions.append(step >= start)
        if period > 1:
            conditions.append(tf.equal((step - start) % period, 0))
        return functools.reduce(tf.logical_and, conditions) if conditions else True

    def _step(self) -> tf.Tensor:
        """The number of steps taken so far: scalar int64 tensor."""
        with tf.init_scope():
            iterations = self.iterations  # Legacy optimizers create it when it is first asked for.
        return average_ops.read(average_ops.components(iterations)[0])

    def _last_step(self) -> tf.Tensor:
        return self._step() - 1

    def _once(self, work):
        """Calls `work` here, or once for all replicas where they share the averages."""
        if self._averages.are_shared_by_replicas():
            once = _as_written(lambda _: work())
            return tf.distribute.get_replica_context().merge_call(once)
        return work()

    def _check_graph(self) -> None:
        if not delegating_optimizer.orders_itself() and not inner_optimizers.is_legacy(
            self._inner_optimizer
        ):
            raise RuntimeError(
                "In a TF 1 graph the updates of a current-generation optimizer never run. Expected a "
                "`tf_keras.optimizers.legacy.Optimizer` inside, or eager mode or a `tf.function`. "
                f"Received: {self._inner_optimizer}"
            )

    # The averages.

    def shadow_copy(self, model_or_variables) -> None:
        """Creates the averages now. For trainable weights this is optional: the first step does it.

        >>> model = tf_keras.Sequential([tf_keras.layers.Dense(1, input_shape=(2,))])
        >>> optimizer = tfav.SWA("sgd")
        >>> optimizer.shadow_copy(model)
        >>> optimizer.has_shadow_copy
        True

        Args:
          model_or_variables: a model (or layer, or `tf.Module`), which is followed: variables that it
            gains later are averaged too; or a list of variables, which is then all that is averaged,
            with those of further lists, whatever model is given later.
            Variables that are neither floating-point nor complex are passed over.

        Raises:
          TypeError: if it is neither.
          ValueError: if a list holds nothing that can be averaged, or comes after a model.
        """
        checks.check_not_keras_3(model_or_variables)
        if isinstance(model_or_variables, tf.Module):
            self._followed_model = self._no_dependency(model_or_variables)
            self._create_averages([])
            return
        variables = checks.checked_variables(
            model_or_variables, "Expected a model or a list of variables."
        )
        chosen = slot_creation.averageable(variables)
        if not chosen:
            raise ValueError(
                "Expected floating-point or complex variables to average. Received: "
                f"{model_or_variables!r}"
            )
        if self._followed_model is not None and not self._has_fixed_set:
            raise ValueError(
                "A list of variables says what is averaged, and a model is followed already. Expected"
                " one or the other."
            )
        self._has_fixed_set = True
        self._averages.add(chosen)

    def exchange_too(self, variables: Sequence[tf.Variable]) -> None:
        """Gives variables that are not averaged a value of their own for while the weights are swapped.

        `swap_weights` exchanges the two values, and nothing is folded into either: statistics that were
        recomputed for the averages stay with the averages. `update_batch_norm` calls it. Variables that
        have an average are left alone.

        Args:
          variables: floating-point variables of the model. What they hold now is kept as the value that
            goes with the weights if the weights are swapped now, else with the averages.

        Raises:
          TypeError: if `variables` is not a list of variables.
        """
        self._averages.add(slot_creation.averageable(checks.checked_variables(variables)), "exchanged")

    def _create_averages(self, trained: Sequence[tf.Variable]) -> None:
        """Creates the averages that are missing, of the variables trained and of the model followed."""
        self._note_trained(trained)
        if self._has_fixed_set:
            self._check_nothing_waits()
            return
        variables = list(trained)
        model = self._followed_model
        if model is not None and getattr(model, "built", True):
            variables += model.trainable_variables if self._trainable_weights_only else model.variables
        elif trained and not self._trainable_weights_only:
            raise ValueError(
                "With `trainable_weights_only=False` the averages of variables that no gradient reaches "
                "must be known. Call `shadow_copy(model)` before training."
            )
        self._averages.add(slot_creation.averageable(variables))

    def _check_nothing_waits(self) -> None:
        if self._averages.waiting:
            raise ValueError(
                "Averages were loaded whose variables are not known, since only those of trained ones "
                "are when a model is loaded. Call `shadow_copy` first, with the same model or list as "
                "before saving."
            )

    @property
    def has_shadow_copy(self) -> bool:
        """Whether the averages have been created."""
        return len(self._averages) > 0

    def begin_averaging(self, step: int) -> None:
        """Makes `step` the first one that is averaged, in place of a `start_averaging` of 0.

        For a start that is known only when training begins; `callbacks.SwapAverageWeights(begin_epoch=)`
        calls it. The step is part of the optimizer's state, saved and restored with the averages, and
        not of its config. The first call counts: a step that was set or restored before stays. It must
        be called before the training step is traced.

        >>> optimizer = tfav.SWA("sgd")
        >>> optimizer.begin_averaging(300)
        >>> optimizer.start_averaging
        300

        Args:
          step: int >= 0, counted as `iterations` counts.

        Raises:
          TypeError: if `step` is not an int.
          ValueError: if `step` is negative, if the constructor was given a start, or if averaging has
            begun without this having been called.
        """
        step = checks.checked_count("step", step, minimum=0)
        if self._start_averaging:
            raise ValueError(
                f"The optimizer was given a start in steps already, {self._start_averaging}. Expected "
                f"that or a start by epoch, not both. Received: step={step}"
            )
        if self.start_was_set:
            return
        if self.num_averaged > 0:
            raise ValueError(
                "Averaging has begun already, so its start cannot be moved. Expected an optimizer that "
                f"has averaged nothing yet. Received: one with num_averaged={int(self.num_averaged)}"
            )
        self._averages.begin(step)

    @property
    def start_was_set(self) -> bool:
        """Whether `begin_averaging` set the start, here or before the state was saved."""
        return self._averages.begins_at(average_slots.NOT_SET) != average_slots.NOT_SET

    @_as_written
    def update_average(self, weight: Optional[float] = None):
        """Folds the current weights into the averages by hand, due or not; counts as an update.

        Args:
          weight: how much the weights count, 0 to 1; None for what the step just taken would use.

        Returns:
          None; in graphs of TF 1 an operation that does it.

        Raises:
          ValueError: if there are no averages yet or `weight` is out of range.
          tf.errors.InvalidArgumentError: if the weights are swapped.
        """
        self._check_has_averages("update_average")
        if weight is not None:
            weight = checks.checked_weight("weight", weight)

        def update():
            with control_flow.after(self._averages.check_training()):
                started = self._averages.start(True)
            with control_flow.after(*started):
                return control_flow.done(lambda: self._fold(self._last_step(), weight=weight))

        return _as_operation(self._once(update))

    @_as_written
    def swap_weights(self):
        """Exchanges weights and averages in place; a second call brings them back, bit for bit.

        It works under every strategy, inside its scope or outside, eagerly, in a `tf.function` and in a
        replica context (where every replica must call it), but not in one that XLA compiles, which lets
        no variable change its shape as the flag does. Buffers change hands: it takes neither time nor
        memory, unless the averages have another dtype than the weights.

        Returns:
          None; in graphs of TF 1 an operation that does it.

        Raises:
          ValueError: if there are no averages yet.
        """
        self._check_has_averages("swap_weights")
        return _as_operation(self._once(self._averages.swap))

    @contextlib.contextmanager
    def swapped_weights(self):
        """A context in which the model holds the averages; they are always swapped back.

        Whatever ends the block, an exception or Ctrl-C included, leaves the weights as they were before
        it. A block inside another one changes nothing.

        >>> weight = tf.Variable(1.0)
        >>> optimizer = tfav.ExponentialMovingAverage("sgd")
        >>> optimizer.shadow_copy([weight])
        >>> with optimizer.swapped_weights():
        ...     print(optimizer.weights_swapped)
        True
        >>> print(optimizer.weights_swapped)
        False

        Yields:
          The optimizer.

        Raises:
          RuntimeError: in a graph, where no exception could be caught; call `swap_weights` twice.
          ValueError: if there are no averages yet.
        """
        if not tf.executing_eagerly():
            raise RuntimeError(
                "`swapped_weights` cannot guard what a graph does. Use it around the call of the "
                "`tf.function`, or call `swap_weights` twice in it."
            )
        self._check_has_averages("swapped_weights")
        before = self.weights_swapped
        try:
            if not before:
                self.swap_weights()
            yield self
        finally:
            if self.weights_swapped != before:
                self.swap_weights()

    @property
    def weights_swapped(self) -> Union[bool, tf.Tensor]:
        """Whether weights and averages are exchanged now: a bool, in graphs a scalar bool tensor."""
        swapped = self._averages.are_swapped()
        return bool(swapped) if tf.executing_eagerly() else swapped

    def get_average(self, var: tf.Variable) -> tf.Tensor:
        """The average of `var`, whether the weights are swapped or not.

        >>> weight = tf.Variable(2.0)
        >>> optimizer = tfav.SWA(tf_keras.optimizers.SGD(1.0), 0, 1)
        >>> for _ in range(2):
        ...     _ = optimizer.apply_gradients([(tf.constant(0.5), weight)])
        >>> with optimizer.swapped_weights():
        ...     print(optimizer.get_average(weight).numpy())
        1.25

        Args:
          var: a variable of the model.

        Returns:
          A tensor shaped like `var`, in the average's dtype.

        Raises:
          KeyError: if `var` has no average.
        """
        return self._averages.read(var)

    @property
    def num_averaged(self) -> tf.Tensor:
        """How many updates the averages hold: scalar int64 tensor."""
        return self._averages.count()

    @_as_written
    def assign_average_vars(self, var_list: Sequence[tf.Variable]):
        """Overwrites variables with their averages; those that have none are left alone.

        >>> weight = tf.Variable(2.0)
        >>> optimizer = tfav.SWA(tf_keras.optimizers.SGD(1.0), 0, 1)
        >>> for _ in range(2):
        ...     _ = optimizer.apply_gradients([(tf.constant(0.5), weight)])
        >>> optimizer.assign_average_vars([weight])
        >>> print(weight.numpy())  # it was 1.5, then 1.0
        1.25

        Args:
          var_list: variables of the model.

        Returns:
          None; in graphs of TF 1 an operation that does it.

        Raises:
          TypeError: if `var_list` is not a list of variables.
          ValueError: if no variable in `var_list` has an average.
          tf.errors.InvalidArgumentError: if the weights are swapped: the averages are in the model.
        """
        self._check_has_averages("assign_average_vars")
        variables = slot_creation.averageable(checks.checked_variables(var_list))
        if not any(variable in self._averages for variable in variables):
            raise ValueError(
                "Expected a list with variables that have averages, `model.variables` say. Received a "
                f"list in which none has one: {[getattr(v, 'name', v) for v in var_list]}"
            )
        return _as_operation(self._once(lambda: self._averages.assign(variables)))

    def _check_has_averages(self, method: str) -> None:
        self._check_nothing_waits()
        if not self._averages:
            raise ValueError(
                f"`{method}` needs averages, and none exist yet. Expected a training step or "
                "`shadow_copy(model)` before."
            )

    # Slots and state.

    def get_slot_names(self) -> List[str]:
        """The names of this optimizer's slots: `["average"]`."""
        return ["average"]

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
            # By type: to ask a distributed variable for its `handle` is an error across replicas.
            if not isinstance(var, (tf.Variable, tf.__internal__.distribute.ShardedVariable)):
                raise KeyError(f"Expected a variable. Received: {var!r}")
            self._refresh()
            average = self._averages.get_slot(var, "average")
            return self._averages.get_slot(var, "exchanged") if average is None else average
        if not inner_optimizers.is_legacy(self._inner_optimizer):
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
          initializer: for other slots, a Keras initializer, its name or a tensor; None for zeros.
            Averages start from the variable's own value.
          shape: for other slots, their shape; None for the variable's.

        Returns:
          The slot variable.

        Raises:
          ValueError: if an average is given an initializer or a shape, if `var` cannot be averaged, or
            the inner optimizer has no slots by name.
        """
        if slot_name == "average":
            if initializer is not None or shape is not None:
                raise ValueError(
                    "An average starts from the variable's own value and has its shape. Expected "
                    f"neither initializer nor shape. Received: {initializer!r}, {shape!r}"
                )
            if not slot_creation.averageable([var]):
                raise ValueError(f"Expected a floating-point or complex variable. Received: {var!r}")
            self._averages.add(slot_creation.averageable([var]))
            return self.get_slot(var, slot_name)
        self._check_inner_is_legacy("add_slot")
        return self._inner_optimizer.add_slot(
            var, slot_name, "zeros" if initializer is None else initializer, shape
        )

    def build(self, var_list: Sequence[tf.Variable]) -> None:
        """Creates the state of the inner optimizer and the averages for these variables.

        Args:
          var_list: the variables to train.
        """
        inner_optimizers.build(self._inner_optimizer, var_list)
        self._note_trained(var_list)
        if self._trainable_weights_only or self._followed_model is not None:
            self._create_averages(var_list)
        self._built = True

    # Configuration.

    def get_config(self) -> Dict[str, Any]:
        """The constructor's arguments, ready for JSON."""
        return {
            "optimizer": tf_keras.optimizers.serialize(self._inner_optimizer),
            "name": self.name,
            "start_averaging": self._start_averaging,
            "average_period": self._average_period,
            "trainable_weights_only": self._trainable_weights_only,
            "average_dtype": self.average_dtype,
            "jit_compile": self.jit_compile,
            # Keras takes an optimizer whose config does not say so for a legacy one.
            "is_legacy_optimizer": False,
        }

    @classmethod
    def from_config(cls, config: Dict[str, Any], custom_objects: Optional[Dict[str, Any]] = None):
        """Creates the optimizer that `get_config` described.

        Args:
          config: left as it is, deeply.
          custom_objects: names and classes that the inner optimizer's config may mention.

        Returns:
          The optimizer.
        """
        config = dict(config)
        config.pop("is_legacy_optimizer", None)
        if "optimizer" in config:
            config["optimizer"] = inner_optimizers.deserialize(config["optimizer"], custom_objects)
        return cls(**config)

    @property
    def start_averaging(self) -> Union[int, tf.Tensor]:
        """The first step, counted from 0, on which an update is due.

        An int; in graphs that are built after `begin_averaging`, a scalar int64 tensor.
        """
        return self._averages.begins_at(self._start_averaging)

    @property
    def average_period(self) -> int:
        """The number of steps from one update to the next."""
        return self._average_period

    @property
    def trainable_weights_only(self) -> bool:
        """Whether trainable weights alone are averaged."""
        return self._trainable_weights_only

    @property
    def average_dtype(self) -> Optional[str]:
        """The name of the dtype asked for the averages, None for the default."""
        return None if self._average_dtype is None else self._average_dtype.name

    def _updates_so_far(self) -> int:
        """How many updates were due in the steps taken."""
        since_start = int(self.iterations.numpy()) - 1 - self.start_averaging
        return max(since_start // self._average_period + 1, 0)


def register(cls: Type[AveragedOptimizerWrapper]) -> Type[AveragedOptimizerWrapper]:
    """Class decorator: registers a scheme of this package, so that Keras can load it.

    In an `.h5` file a LossScaleOptimizer names what is inside it by the bare name of the class.
    """
    tf_keras.saving.get_custom_objects().setdefault(cls.__name__, cls)
    return tf_keras.saving.register_keras_serializable(package="tf_averaging")(cls)


def _as_operation(result):
    """What to hand to a caller, who must run it only where operations do not run by themselves."""
    return None if delegating_optimizer.orders_itself() else tf.group(result)


def averaging_optimizer(optimizer: object) -> Optional[AveragedOptimizerWrapper]:
    """The outermost averaging optimizer in `optimizer`, which a LossScaleOptimizer say may be around.

    Args:
      optimizer: an optimizer, or None.

    Returns:
      The averaging optimizer, None if there is none.
    """
    while optimizer is not None and not isinstance(optimizer, AveragedOptimizerWrapper):
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return optimizer
