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
"""Evaluation of the averages, training of the weights."""

from __future__ import annotations

from typing import Any, Dict, Optional

from absl import logging

from tf_averaging.averaged_optimizer_wrapper import AveragedOptimizerWrapper
from tf_averaging.callbacks import averaging_callback
from tf_averaging.core.status import NEVER
from tf_averaging.core.status import checked_count


class SwapAverageWeights(averaging_callback.AveragingCallback):
    """Puts the averages into the model for `evaluate` and `predict`, and the weights back for training.

    Validation in `fit` then measures the averaged model, which is what will be used, while training goes
    on from the raw weights. Put it before the callbacks that are to see what it does.

    >>> model = tf.keras.Sequential([tf.keras.Input([2]), tf.keras.layers.Dense(1)])
    >>> model.compile(tfav.ExponentialMovingAverage("sgd"), "mse")
    >>> x, y = tf.ones([8, 2]), tf.ones([8, 1])
    >>> swap = tfav.callbacks.SwapAverageWeights(swap_on_epoch=True)
    >>> stop = tf.keras.callbacks.EarlyStopping("val_loss", restore_best_weights=True)
    >>> _ = model.fit(x, y, validation_data=(x, y), callbacks=[swap, stop], verbose=0)
    >>> model.optimizer.weights_swapped  # The model holds the best averages.
    True
    >>> _ = model.fit(x, y, callbacks=[swap], verbose=0)  # Goes on from the raw weights.

    What is loaded into the model between the two, by you or by EarlyStopping, is not trained over: the
    second `fit` then goes on from that, the averages start anew from it, and a warning says so.

    It looks at what the model holds and never toggles blindly. If an evaluation is left by an exception
    or Ctrl-C, of which Keras tells no callback, the averages stay in the model and the weights in the
    slots; the next hook, of `fit` for example, returns to where training was. `with
    optimizer.swapped_weights():` around a call of `evaluate` returns at once.

    A model that is resumed from a checkpoint which was written while swapped trains from the raw weights.

    To log the decay, and how far the weights are from their averages, add them to the logs of an epoch;
    TensorBoard, CSVLogger and the history take them from there if they come later in the list:

    >>> def add_to_logs(epoch, logs):
    ...     optimizer, weights = model.optimizer, model.trainable_variables
    ...     logs["decay"] = 1.0 - float(optimizer.averaging_weight(optimizer.iterations - 1, None))
    ...     logs["distance"] = float(tf.linalg.global_norm(
    ...         [weight - optimizer.get_slot(weight, "average") for weight in weights]))
    >>> add = tf.keras.callbacks.LambdaCallback(on_epoch_end=add_to_logs)
    >>> history = model.fit(x, y, callbacks=[swap, add], epochs=2, verbose=0).history
    >>> print(*(round(decay, 4) for decay in history["decay"]))
    0.25 0.3077

    Args:
      swap_on_epoch: whether the averages are in the model also from the end of an epoch to the start of
        the next one, so that callbacks placed after this one (ModelCheckpoint, EarlyStopping with
        `restore_best_weights`, TensorBoard) save and judge the averages. They are then in the model when
        `fit` returns; the raw weights are in the slots, and the next `fit` begins from them.
      begin_epoch: int >= 0, the epoch (counted from 0) with which averaging starts; an alternative to a
        start in steps. The step at which that is becomes part of the optimizer's state, so a training
        that is resumed, or goes on one epoch at a time with `initial_epoch`, begins once.
      optimizer: the averaging optimizer, for models that are compiled with another one; None for the one
        that the model is compiled with.

    Raises:
      TypeError: if `swap_on_epoch` is not a bool or `begin_epoch` not an int.
      ValueError: if `begin_epoch` is negative or `optimizer` does not average; when training begins, if
        the model's optimizer does not average, or has a start in steps beside `begin_epoch`, or has begun
        to average before without it.
    """

    def __init__(
        self,
        swap_on_epoch: bool = False,
        begin_epoch: int = 0,
        *,
        optimizer: Optional[AveragedOptimizerWrapper] = None,
    ):
        super().__init__(optimizer)
        self.swap_on_epoch = averaging_callback.checked_bool("swap_on_epoch", swap_on_epoch)
        self.begin_epoch = checked_count("begin_epoch", begin_epoch, minimum=0)
        # What the model held before the evaluation that runs now; None if none runs, as far as is known.
        self._before_evaluation: Optional[bool] = None
        self._first_epoch = False
        self._starts_anew = False

    def set_params(self, params: Dict[str, Any]) -> None:
        """Keeps the parameters of `fit`, and leaves a note in them for `AverageModelCheckpoint`.

        Args:
          params: dict, from Keras.
        """
        super().set_params(params)
        params["swap_on_epoch"] = self.swap_on_epoch  # One dict for all callbacks of a training.

    def _hold(self, averages: bool) -> None:
        """Makes the model hold the averages, or the raw weights."""
        optimizer = self.optimizer
        # Before there are averages they are the weights.
        if optimizer.has_shadow_copy and optimizer.weights_swapped != averages:
            optimizer.swap_weights()

    def _rest(self, averages: bool) -> None:
        """The same outside evaluations: none runs any more."""
        self._before_evaluation = None
        self._hold(averages)

    # Training.

    def on_train_begin(self, logs=None):
        """Creates the averages, returns to the raw weights, checks `begin_epoch`."""
        self.optimizer.shadow_copy(self.model)
        self._starts_anew = self.optimizer._averages.take_up()
        if self._starts_anew:
            logging.warning(
                "Weights were loaded into the model after a `fit` that had left the averages in it. "
                "Training goes on from them, and the averages start anew from them."
            )
        self._rest(averages=False)
        self._first_epoch = True
        if self.begin_epoch and self.optimizer.start_averaging and not self.optimizer.start_was_set:
            raise ValueError(
                "Expected a start in steps or `begin_epoch`, not both. Received: "
                f"begin_epoch={self.begin_epoch}, and an optimizer that starts at step "
                f"{self.optimizer.start_averaging}"
            )

    def on_epoch_begin(self, epoch, logs=None):
        """Returns to the raw weights."""
        self._rest(averages=False)
        if self._first_epoch:
            self._first_epoch = False
            self._begin(epoch)
        if epoch >= self.begin_epoch and self.optimizer.start_averaging == NEVER:
            self.optimizer.begin_averaging(int(self.optimizer.iterations.numpy()))

    def on_train_batch_begin(self, batch, logs=None):
        """Returns to the raw weights if an evaluation in the middle of the epoch was left."""
        if self._before_evaluation is not None:
            self._rest(averages=False)

    def on_epoch_end(self, epoch, logs=None):
        """With `swap_on_epoch`, puts the averages into the model."""
        self._rest(averages=self.swap_on_epoch)

    def on_train_end(self, logs=None):
        """Leaves the averages in the model with `swap_on_epoch`; warns if there are none."""
        self._warn_of_nothing()
        self._rest(averages=self.swap_on_epoch)
        if self.swap_on_epoch:
            self.optimizer._averages.leave()

    # Evaluation. One may run inside another one's callbacks. An inner one cannot be told from the first
    # one after another was left, so its end returns to what the model held before, and the next batch of
    # the outer one brings the averages back.

    def on_test_begin(self, logs=None):
        """Puts the averages into the model."""
        if self._before_evaluation is None:
            self._before_evaluation = self.optimizer.weights_swapped
        if self.optimizer.has_shadow_copy:  # Some that were loaded may wait to be told of the model.
            self.optimizer.shadow_copy(self.model)
        self._hold(averages=True)

    def on_test_batch_begin(self, batch, logs=None):
        """Puts the averages into the model if another evaluation has ended meanwhile."""
        if self._before_evaluation is None:
            self.on_test_begin()

    def on_test_end(self, logs=None):
        """Returns to what the model held before."""
        if self._before_evaluation is not None:
            self._rest(averages=self._before_evaluation)

    def on_predict_begin(self, logs=None):
        """As `on_test_begin`."""
        self.on_test_begin()

    def on_predict_batch_begin(self, batch, logs=None):
        """As `on_test_batch_begin`."""
        self.on_test_batch_begin(batch)

    def on_predict_end(self, logs=None):
        """As `on_test_end`."""
        self.on_test_end()

    # The start of averaging.

    def _begin(self, epoch: int) -> None:
        """Has averaging begin with `begin_epoch`, and not before."""
        optimizer = self.optimizer
        step = int(optimizer.iterations.numpy())
        if self.begin_epoch:
            if optimizer.start_averaging == 0:
                optimizer.begin_averaging(NEVER)
            # A step that was traced before may know another start. From here on it looks it up.
            self.model.make_train_function(force=True)
        start = optimizer.start_averaging
        if optimizer.average_period is None or self._starts_anew:
            return
        if optimizer.num_averaged == 0 and step > start:
            logging.warning(
                "After %d steps, averaging having started at step %d, the optimizer holds no averages, "
                "as after loading a model without them. They start from the weights as they are now.",
                step,
                start,
            )

    def _warn_of_nothing(self) -> None:
        optimizer = self.optimizer
        start, step = optimizer.start_averaging, int(optimizer.iterations.numpy())
        if optimizer.average_period is not None and optimizer.num_averaged == 0 and start >= step:
            when = f"with epoch {self.begin_epoch}" if start == NEVER else f"at step {start}"
            logging.warning(
                "Nothing was averaged: averaging starts %s, and training has ended after %d steps.",
                when,
                step,
            )
