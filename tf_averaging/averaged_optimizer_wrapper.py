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
"""The base class of all averaging optimizers: an optimizer around another one. It knows no Keras."""

from __future__ import annotations

from typing import Any, ContextManager, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import tensorflow as tf

from tf_averaging import faces
from tf_averaging import side_by_side
from tf_averaging.core import status
from tf_averaging.core import variables as core_variables
from tf_averaging.core.averages import Averages
from tf_averaging.core.updates import Updates
from tf_averaging.saving import arrays
from tf_averaging.saving import checkpoints
from tf_averaging.saving.unclaimed import Unclaimed


class AveragedOptimizerWrapper:
    """Base class for optimizers that keep an average of the weights which another optimizer trains.

    The inner optimizer takes its steps as it would alone, bit for bit. After each step that is due (every
    `average_period`-th from `start_averaging` on), the weights are folded into their averages, which are
    slot variables. Before the first update the averages are the current weights.

    The result is an optimizer of the same Keras as the inner one, whose settings (`momentum`, ...) are
    read and set through it. A subclass says how much the weights count. The plain mean of all:

    >>> @tf_keras.saving.register_keras_serializable("my_package")
    ... class RunningMean(tfav.AveragedOptimizerWrapper):
    ...     def averaging_weight(self, steps, updates):
    ...         return 1 / (updates + 1)
    >>> weight = tf.Variable(4.0)
    >>> optimizer = RunningMean(tf_keras.optimizers.SGD(1.0))
    >>> for _ in range(3):
    ...     _ = optimizer.apply_gradients([(tf.constant(1.0), weight)])
    >>> print(optimizer.get_average(weight).numpy())  # The weights were 3, 2 and 1.
    2.0

    Args:
      optimizer: the inner optimizer: of Keras 3 (`keras.optimizers.Optimizer`) or of tf_keras, where both
        generations will do; the name of one, or its config dict. A name, and a config that does not tell,
        means an optimizer of what `tf.keras` is.
      name: name of this optimizer.
      start_averaging: int >= 0, the first step (counted from 0) on which an update is due.
      average_period: int >= 1, the number of steps from one update to the next. None: no updates but
        those by hand (`update_average`), each of which counts as a step.
      trainable_weights_only: if False, all floating-point and complex variables of the model are averaged
        (statistics of BatchNormalization too), and `shadow_copy(model)` must be called before training.
      average_dtype: dtype of the averages of real variables, where it is wider than the variable's own.
        None: float32 for float16 and bfloat16 variables, their own dtype for others.
      jit_compile: whether XLA compiles the update: `"auto"` for large variables, or a bool. The results
        agree up to rounding.
      average_device: the device that holds the averages, as `"CPU:0"`. None: each is beside its variable.
      **settings: `learning_rate` (or `lr`), `clipnorm`, `clipvalue`, `global_clipnorm`, and for a legacy
        inner optimizer `decay`, where the inner optimizer leaves them unset.

    Raises:
      TypeError: if an argument has the wrong type or is unknown, `optimizer` cannot be wrapped (as a
        LossScaleOptimizer, which goes outside), or the class defines no scheme.
      ValueError: if an argument is out of range, a setting contradicts the inner optimizer's own, or the
        inner optimizer has `use_ema=True`.
    """

    # The argument of the constructor that may be a list: one average is kept for each element then.
    one_average_for_each: Optional[str] = None
    # The predecessors of the class, whose checkpoints hold averages of the same kind.
    _predecessors: Tuple[str, ...] = ()
    _others = side_by_side.Others()
    _is_ready = False
    _checkpoint_form: Optional[checkpoints.CheckpointForm] = None

    def __new__(cls, optimizer=None, *_args, **_kwargs):
        return super().__new__(faces.class_around(cls, optimizer))

    def __init__(
        self,
        optimizer: Any,
        name: str = "AveragedOptimizerWrapper",
        *,
        start_averaging: int = 0,
        average_period: Optional[int] = 1,
        trainable_weights_only: bool = True,
        average_dtype: Union[None, str, tf.DType] = None,
        jit_compile: Union[bool, str] = "auto",
        average_device: Optional[str] = None,
        **settings: Any,
    ):
        if not isinstance(name, str):
            raise TypeError(f"Expected `name` to be a string. Received: name={name!r}")
        averages = Averages(average_dtype, jit_compile, name, average_device)
        if average_period is not None:
            average_period = status.checked_count("average_period", average_period, minimum=1)
        updates = Updates(
            averages,
            Unclaimed(averages),
            core_variables.VariableSelection(trainable_weights_only, self._may_be_averaged),
            status.checked_count("start_averaging", start_averaging, minimum=0),
            average_period,
            self.averaging_weight,
            self.average_op if faces.overrides(type(self), "average_op") else None,
        )
        inner = faces.inner_optimizer(type(self), optimizer, settings)
        super().__init__(inner, name)  # type: ignore[call-arg]
        self._averages, self._updates, self._unclaimed = averages, updates, updates.unclaimed
        self._is_ready = True

    # What a subclass defines.

    def averaging_weight(self, steps: tf.Tensor, updates: tf.Tensor) -> tf.Tensor:
        """How much the weights count in `average + averaging_weight * (weights - average)`.

        Args:
          steps: int64 tensor, scalar or one element for each variable: how many steps ago the variable's
            averaging began, 0 at its first update.
          updates: int64 tensor of the same shape: how many updates its average holds.

        Returns:
          Float tensor, from 0 to 1, of the same shape or scalar. 1 makes the average the weights exactly.
        """
        raise NotImplementedError("The class overrides `average_op` instead.")

    def average_op(self, var: tf.Tensor, average_var: tf.Tensor) -> tf.Tensor:
        """The new value of one average. Override it for schemes that are no interpolation.

        Args:
          var: the variable's value after the step, in the average's dtype.
          average_var: the average's value, same shape and dtype.

        Returns:
          Like `average_var`. This class returns the interpolation with `averaging_weight`.
        """
        return self._updates.interpolate(var, average_var)

    @core_variables.as_written
    def shadow_copy(self, model_or_variables: Any) -> None:
        """Creates the averages now. For trainable weights this is optional: the first step does it.

        Args:
          model_or_variables: a model (or layer, or `tf.Module`), which is followed: variables that it
            gains later are averaged too. Or a list of variables: only those of lists are averaged then.

        Raises:
          TypeError: if it is neither, or of another Keras than the optimizer.
          ValueError: if a list holds nothing that can be averaged, or comes after a model.
        """
        selection = self._updates.selection
        if self._is_model(model_or_variables):
            selection.model = model_or_variables
        else:
            expected = "Expected a model or a list of variables."
            model_or_variables = self._checked_variables(model_or_variables, expected)
            selection.fix(model_or_variables)
        self._averages.create(selection)
        for other in self._others.optimizers:
            other.shadow_copy(model_or_variables)

    @property
    def has_shadow_copy(self) -> bool:
        """Whether the averages have been created."""
        return len(self._averages) > 0

    @core_variables.as_written
    def update_average(self, weight: Optional[float] = None) -> None:
        """Folds the current weights into the averages by hand, due or not; counts as an update.

        Args:
          weight: how much the weights count, 0 to 1; None for what the step just taken would use.

        Raises:
          ValueError: if there are no averages yet or `weight` is out of range.
        """
        side_by_side.update_by_hand(self, weight)

    def reset_averages(self, var_list: Optional[Sequence[tf.Variable]] = None) -> None:
        """Forgets: the averages are the current weights again, and their clocks start anew.

        Args:
          var_list: variables of the model; None for all.

        Raises:
          KeyError: if a variable in `var_list` has no average.
          RuntimeError: if the weights are swapped, or in a graph.
        """
        side_by_side.reset(self, var_list)

    @core_variables.as_written
    def swap_weights(self, which: int = 0) -> None:
        """Exchanges weights and averages in place; a second call brings them back, bit for bit.

        It works under every strategy, in its scope or outside, eagerly, in a `tf.function` and in a
        replica context (on all replicas), but not where XLA compiles. It takes neither time nor memory,
        unless the averages have another dtype than the weights.

        Args:
          which: of several averages, the place in the list of the one to exchange.

        Raises:
          ValueError: if there are no averages yet, or `which` is out of range.
        """
        one = status.chosen(self._everyone(), which)
        one._check_has_averages("swap_weights")
        one._averages.once(one._averages.swap)

    def swapped_weights(self, which: int = 0) -> ContextManager[AveragedOptimizerWrapper]:
        """A context in which the model holds the averages; in a graph a RuntimeError.

        Whatever ends the block, an exception or Ctrl-C included, leaves the weights as they were before
        it. Contexts may overlap: the weights return when the last one ends.

        Args:
          which: see `swap_weights`.

        Returns:
          The context, whose `as` gives the optimizer.
        """
        one = status.chosen(self._everyone(), which)
        one._check_has_averages("swapped_weights")
        one._updates.warn_if_empty(self._steps_taken())
        return one._averages.swapped(self)

    @property
    def weights_swapped(self) -> Union[bool, tf.Tensor]:
        """Whether weights and averages are exchanged now: a bool, in graphs a scalar bool tensor."""
        swapped = tf.reduce_any([one._averages.is_swapped() for one in self._everyone()])
        return bool(swapped) if tf.executing_eagerly() else swapped

    @core_variables.as_written
    def get_average(self, var: tf.Variable, which: int = 0) -> tf.Tensor:
        """The average of `var`, whether the weights are swapped or not.

        Args:
          var: a variable of the model.
          which: of several averages, the place in the list of the one to read.

        Returns:
          A tensor shaped like `var`, in the average's dtype.

        Raises:
          KeyError: if `var` has no average.
          ValueError: if `which` is out of range.
        """
        return status.chosen(self._everyone(), which)._averages.read(*self._tf_variables([var]))

    @property
    def num_averaged(self) -> tf.Tensor:
        """How many updates the averages hold, at most: scalar int64 tensor."""
        return self._averages.num_averaged()

    @property
    def sparse_variables(self) -> List[tf.Variable]:
        """Large variables whose averages are updated only in the rows that a step moves."""
        return [variable for variable, rows in self._averages.waiting() if not rows.is_held]

    @core_variables.as_written
    def assign_average_vars(self, var_list: Sequence[tf.Variable], which: int = 0) -> None:
        """Overwrites variables with their averages; those that have none are left alone.

        Args:
          var_list: variables of the model.
          which: of several averages, the place in the list of the one to use.

        Raises:
          ValueError: if no variable in `var_list` has an average, or `which` is out of range.
          tf.errors.InvalidArgumentError: if the weights are swapped: the averages are in the model.
        """
        one = status.chosen(self._everyone(), which)
        one._check_has_averages("assign_average_vars")
        one._updates.warn_if_empty(self._steps_taken())
        variables = core_variables.averageable(self._checked_variables(var_list))
        checks = side_by_side.check_not_swapped(self, status.ASSIGN_WHILE_SWAPPED_ERROR)
        with core_variables.after(*checks):
            one._averages.once(lambda: one._averages.assign(variables))

    def _everyone(self) -> Tuple[AveragedOptimizerWrapper, ...]:
        return (self, *self._others.optimizers)  # Those that keep averages side by side.

    def _check_has_averages(self, method: str) -> None:
        status.check_program_order()
        if self._unclaimed.saved:
            self._unclaimed.check()
        if not self._averages:
            expected = "Expected a training step or `shadow_copy(model)` before."
            raise ValueError(f"`{method}` needs averages, and none exist yet. {expected}")

    def begin_averaging(self, step: int) -> None:
        """Makes `step` the first one that is averaged, in place of a `start_averaging` of 0.

        The step is state. The first call counts, and must come before the training step is traced, or
        averaging has begun, which is a ValueError.

        Args:
          step: int >= 0.
        """
        for one in self._everyone():
            one._updates.begin(status.checked_count("step", step, minimum=0))

    @property
    def start_was_set(self) -> bool:
        """Whether `begin_averaging` set the start, here or before the state was saved."""
        return self._averages.begins_at(status.NOT_SET) != status.NOT_SET

    def get_slot_names(self) -> List[str]:
        """The names of this optimizer's slots: `["average"]`."""
        return ["average"]

    def get_weights(self) -> List[np.ndarray]:
        """The values of `variables` as NumPy arrays; the first is the number of iterations."""
        return [variable.numpy() for variable in arrays.state_of(self).variables()]

    def set_weights(self, weights: Sequence[np.ndarray]) -> None:
        """Sets `variables` to values from `get_weights`.

        Args:
          weights: arrays, as many and shaped as `variables`.

        Raises:
          ValueError: if their number or a shape does not fit; nothing is changed then.
        """
        arrays.state_of(self).set(weights)

    def save_own_variables(self, store: Any) -> None:
        """Writes the state to a `.keras` file.

        Args:
          store: the file's, a mapping from names to arrays.
        """
        arrays.save(self, store)

    def load_own_variables(self, store: Any) -> None:
        """Reads the state from a `.keras` file; warns of one that does not fit.

        Args:
          store: the file's, a mapping from names to arrays.
        """
        arrays.load(self, store)

    def __getattr__(self, name: str):
        return faces.get_of_inner(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(found := getattr(type(self), name, None), property):
            if found.fset is None:
                faces.refuse_to_set(self, name)
            object.__setattr__(self, name, value)  # Keras would look at the old value first.
        elif name.startswith("_") or name in ("name", "built") or not faces.is_setting(self, name):
            super().__setattr__(name, value)
        elif self._is_ready:  # Before that it is Keras's constructor, which sets defaults.
            faces.set_on_inner(self, name, value)

    # The form in a checkpoint. TensorFlow asks for it by these names.

    _trackable_children = checkpoints.trackable_children
    _create_or_restore_slot_variable = checkpoints.create_or_restore_slot_variable

    def _lookup_dependency(self, name, cached_dependencies=None):
        if self._checkpoint_form is None:
            return super()._lookup_dependency(name, cached_dependencies)  # type: ignore[misc]
        return self._checkpoint_form.look_up(name)

    @property
    def _deferred_dependencies(self):
        if self._checkpoint_form is None:
            return super()._deferred_dependencies  # type: ignore[misc]
        return self._checkpoint_form.unmatched

    def __dir__(self):
        # What savers look through. The inner optimizer and the averages are saved with this one, once.
        return set(super().__dir__()) - {"get_slot_names", "inner_optimizer", "_inner_optimizer"}

    def get_config(self) -> Dict[str, Any]:
        """The constructor's arguments, ready for JSON."""
        settings = ("average_period", "trainable_weights_only", "average_dtype", "average_device")
        return {
            **super().get_config(),  # type: ignore[misc]
            "optimizer": self._serialize_inner(),
            "start_averaging": self._updates.start,
            **{name: getattr(self, name) for name in ("name", "jit_compile", *settings)},
        }

    @classmethod
    def from_config(cls, config: Dict[str, Any], custom_objects: Optional[Dict[str, Any]] = None) -> Any:
        """Creates the optimizer that `get_config` described.

        Args:
          config: left as it is, deeply.
          custom_objects: names and classes that the inner optimizer's config may mention.

        Returns:
          The optimizer.
        """
        return faces.from_config(cls, config, custom_objects)

    @property
    def start_averaging(self) -> Union[int, tf.Tensor]:
        """The first step on which an update is due: an int, or in graphs a scalar int64 tensor."""
        return self._averages.begins_at(self._updates.start)

    @property
    def average_period(self) -> Optional[int]:
        """The number of steps from one update to the next; None for updates by hand alone."""
        return self._updates.period

    @property
    def trainable_weights_only(self) -> bool:
        """Whether trainable weights alone are averaged."""
        return self._updates.selection.trainable_only

    @property
    def average_dtype(self) -> Optional[str]:
        """The name of the dtype asked for the averages, None for the default."""
        return getattr(self._averages.average_dtype, "name", None)

    @property
    def average_device(self) -> Optional[str]:
        """The device asked for the averages, None for that of the weights."""
        return self._averages.device

    @property
    def jit_compile(self) -> Union[bool, str]:
        """Whether XLA compiles the update."""
        return self._averages.jit_compile

    @jit_compile.setter
    def jit_compile(self, value: Union[bool, str]) -> None:
        if self._is_ready:  # Keras's constructor sets one of its own.
            self._averages.jit_compile = status.checked_jit_compile(value)

    def __repr__(self) -> str:
        names = f"{type(self).__name__} around {type(self.inner_optimizer).__name__}"
        state = f"num_averaged={self.num_averaged}, swapped={self.weights_swapped}"
        return f"<{names}: {self._others}{state}>"

    def __reduce__(self):
        return faces.rebuild, (type(self).__mro__[1], self.get_config())
