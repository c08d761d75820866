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

import contextlib
import functools
from typing import Any, Dict, Iterator, Optional, Sequence

from absl import logging

from tf_averaging.averaged_optimizer_wrapper import AveragedOptimizerWrapper
from tf_averaging.callbacks import averaging_callback
from tf_averaging.callbacks.inner_callbacks import InnerCallbacks
from tf_averaging.callbacks.recomputed_statistics import RecomputedStatistics
from tf_averaging.core.status import NEVER
from tf_averaging.core.status import NOT_SET
from tf_averaging.core.status import checked_count


class SwapAverageWeights(averaging_callback.AveragingCallback):
    """Puts the averages into the model for `evaluate` and `predict`, and the weights back for training.

    Validation in `fit` then measures the averaged model, which is what will be used, while training goes
    on from the raw weights. Callbacks that judge, save or restore the model go inside. Whatever their
    order, they find the averages in the model, which has them also when `fit` ends:

    >>> model = tf.keras.Sequential([tf.keras.Input([2]), tf.keras.layers.Dense(1)])
    >>> model.compile(tfav.ExponentialMovingAverage("sgd"), "mse")
    >>> x, y = tf.ones([8, 2]), tf.ones([8, 1])
    >>> stop = tf.keras.callbacks.EarlyStopping("val_loss", patience=3, restore_best_weights=True)
    >>> swap = tfav.callbacks.SwapAverageWeights(callbacks=[stop])
    >>> history = model.fit(x, y, validation_data=(x, y), callbacks=[swap], verbose=0).history
    >>> model.optimizer.weights_swapped  # The model holds the best averages.
    True
    >>> abs(model.evaluate(x, y, verbose=0) - min(history["val_loss"])) < 1e-6
    True

    Callbacks that steer or resume training (learning-rate schedules, BackupAndRestore) go outside, before
    this one. The guide "Callbacks" has the whole list.

    The next `fit`, or the next epoch, goes on from the raw weights. What is loaded into the model before
    it, by you or by a callback such as EarlyStopping, is not trained over: training then goes on from
    that, the averages start anew from it, and a warning says so.

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
    >>> model.compile(tfav.ExponentialMovingAverage("sgd"), "mse")
    >>> swap = tfav.callbacks.SwapAverageWeights()
    >>> history = model.fit(x, y, callbacks=[swap, add], epochs=2, verbose=0).history
    >>> print(*(round(decay, 4) for decay in history["decay"]))
    0.1 0.1818

    Args:
      swap_on_epoch: whether the averages are in the model also from the end of an epoch to the start of
        the next one, so that callbacks placed after this one, as those that a tuner adds, save and judge
        the averages. They are then in the model when `fit` returns; the raw weights are in the slots, and
        the next `fit` begins from them. With `callbacks` it is always True.
      begin_epoch: int >= 0, the epoch (counted from 0) with which averaging starts; an alternative to a
        start in steps. The step at which that is becomes part of the optimizer's state, so a training
        that is resumed, or goes on one epoch at a time with `initial_epoch`, begins once.
      callbacks: list of callbacks of the model's Keras, whose hooks all find the averages in the model.
        They are called in order, on the thread of `fit`. Where one of them may look at the model in
        batches, weights and averages are exchanged around each of its hooks.
      batch_norm_data: training data as for `update_batch_norm`, which can be read again. The statistics
        of BatchNormalization are recomputed for the averages, once for each state of these: before a
        validation, a file of `AverageModelCheckpoint`, the hooks of `callbacks` at the end of an epoch,
        and the end of `fit`. The raw weights keep theirs. In the middle of an epoch only files of
        `ModelCheckpoint` and `AverageModelCheckpoint` make it happen; other callbacks find the statistics
        of the last time.
      batch_norm_steps: number of batches to take from `batch_norm_data` each time; None for all.
      optimizer: the averaging optimizer, for models that are compiled with another one; None for the one
        that the model is compiled with. It averages what it trains, or what `shadow_copy` was given.

    Raises:
      TypeError: if `swap_on_epoch` is not a bool, `begin_epoch` or `batch_norm_steps` not an int, or
        `callbacks` holds something else; in `fit`, if a callback is not of the model's Keras.
      ValueError: if `begin_epoch` is negative, `batch_norm_steps` is not positive or comes without data,
        `batch_norm_data` can be read only once or never ends, `callbacks` holds a `SwapAverageWeights` of
        the same optimizer, or `optimizer` does not average; when training begins, if the model's
        optimizer does not average, or has a start in steps beside `begin_epoch`, or has begun to average
        before without it, if there are two callbacks of one optimizer, or `batch_norm_data` in another
        one than the last.
    """

    def __init__(
        self,
        swap_on_epoch: bool = False,
        begin_epoch: int = 0,
        callbacks: Optional[Sequence[Any]] = None,
        batch_norm_data: Any = None,
        batch_norm_steps: Optional[int] = None,
        optimizer: Optional[AveragedOptimizerWrapper] = None,
    ):
        super().__init__(optimizer)
        averaging_callback.checked_bool("swap_on_epoch", swap_on_epoch)
        self.swap_on_epoch = swap_on_epoch or callbacks is not None
        self.begin_epoch = checked_count("begin_epoch", begin_epoch, minimum=0)
        self._inner = InnerCallbacks([] if callbacks is None else callbacks)
        for callback in self._inner:
            is_swap = isinstance(callback, SwapAverageWeights)
            if is_swap and callback._given_optimizer is self._given_optimizer:
                raise ValueError(
                    "Expected no `SwapAverageWeights` of the same optimizer in `callbacks`, which find "
                    f"the averages in the model anyway. Received: callbacks={callbacks!r}"
                )
        # Hooks that are there only if they must be: Keras 3 waits for the logs of each batch then.
        for hook in ("on_train_batch_end", "on_test_batch_end", "on_predict_batch_end"):
            if self._inner.have(hook):
                setattr(self, hook, functools.partial(self._tell_of_batch, hook))
        self._supports_tf_logs = not self._inner.want_numbers()
        if batch_norm_data is None and batch_norm_steps is not None:
            raise ValueError(
                f"Expected `batch_norm_data` too. Received: batch_norm_steps={batch_norm_steps!r}"
            )
        self._statistics: Optional[RecomputedStatistics] = None
        if batch_norm_data is not None:
            self._statistics = RecomputedStatistics(batch_norm_data, batch_norm_steps)
        # What the model held before the evaluation that runs now; None if none runs, as far as is known.
        self._before_evaluation: Optional[bool] = None
        self._first_epoch = False
        self._starts_anew = False

    def set_params(self, params: Dict[str, Any]) -> None:
        """Keeps the parameters of `fit`, and leaves notes in them for `AverageModelCheckpoint`.

        Args:
          params: dict, from Keras.
        """
        super().set_params(params)
        self._swaps.append(self)
        self._inner.set_params(params)

    def set_model(self, model: Any) -> None:
        """Tells the callbacks inside of the model too.

        Args:
          model: from Keras.
        """
        super().set_model(model)
        self._inner.set_model(model, self._averages_for_file)

    # What the model holds.

    def _rest(self, averages: bool) -> None:
        """Makes the model hold the averages or the raw weights, outside evaluations."""
        self._before_evaluation = None  # None runs any more.
        averaging_callback.hold(self.optimizer, averages)

    def recompute(self) -> None:
        """Brings the averages' statistics up to date, if there are data for it."""
        if self._statistics is not None:
            self._statistics.recompute(self.model, self.optimizer)

    @contextlib.contextmanager
    def _averages_for_file(self) -> Iterator[None]:
        self.recompute()
        with averaging_callback.holding(self.optimizer, averages=True):
            yield

    def _tell(self, hook: str, *args: Any) -> None:
        """Calls a hook of the callbacks inside, which find the averages in the model."""
        if not self._inner:
            return
        with averaging_callback.holding(self.optimizer, averages=True):
            self._inner.call(hook, *args)

    def _tell_of_batch(self, hook: str, batch, logs=None) -> None:
        """The same for a hook of batches, and without a swap where none looks at the model."""
        if self._inner.look_at_weights(hook):
            statistics = self._statistics
            with statistics.outdated(self.optimizer) if statistics else contextlib.nullcontext():
                self._tell(hook, batch, logs)
        elif self._inner.have(hook):
            self._inner.call(hook, batch, logs)

    # Training.

    def on_train_begin(self, logs: Optional[Dict[str, Any]] = None) -> None:
        """Creates the averages, returns to the raw weights, checks `begin_epoch`."""
        self._check_others()
        averaging_callback.follow(self.optimizer, self.model)
        is_known = self.optimizer._averages.left is not None
        self._starts_anew = self._take_up("after a `fit` that had left the averages in it")
        if self.optimizer.weights_swapped and not is_known:
            logging.warning(
                "The model held the averages when training began, by `swap_weights()` or from a file. "
                "Training goes on from the raw weights. Weights that were loaded since then count as the "
                "averages: to train from them, load them after `swap_weights()`."
            )
        self._rest(averages=False)
        self._first_epoch = True
        if self.begin_epoch and self.optimizer.average_period is None:
            raise ValueError(
                "Expected updates by hand alone (`average_period=None`) or `begin_epoch`, not both. "
                f"Received: begin_epoch={self.begin_epoch}"
            )
        if self.begin_epoch and self.optimizer.start_averaging and not self.optimizer.start_was_set:
            raise ValueError(
                "Expected a start in steps or `begin_epoch`, not both. Received: "
                f"begin_epoch={self.begin_epoch}, and an optimizer that starts at step "
                f"{self.optimizer.start_averaging}"
            )
        if self._inner:
            # A callback may load weights, as `ModelCheckpoint` of tf_keras does.
            averaging_callback.hold(self.optimizer, averages=True)
            self.optimizer._averages.leave()
            self._inner.call("on_train_begin", logs)
            self._starts_anew |= self._take_up("by one of the `callbacks` of `SwapAverageWeights`")
            self._rest(averages=False)

    def _check_others(self) -> None:
        if any(swap.optimizer is self.optimizer for swap in self._swaps if swap is not self):
            raise ValueError(
                "Expected one `SwapAverageWeights` for each averaging optimizer. Two of them would swap "
                f"against each other. Received more than one for {self.optimizer!r}"
            )
        if self._statistics is not None and self._swaps[-1:] not in ([], [self]):
            raise ValueError(
                "Expected `batch_norm_data` in the last (or innermost) of several `SwapAverageWeights` "
                "alone. When it computes the statistics, the averages of all are in the model."
            )

    def _take_up(self, loaded: str) -> bool:
        starts_anew = self.optimizer._averages.take_up()
        if starts_anew:
            for other in self.optimizer._others.optimizers:
                other._averages.start_over()
            logging.warning(
                "Weights were loaded into the model %s. "
                "Training goes on from them, and the averages start anew from them.",
                loaded,
            )
        return starts_anew

    def on_epoch_begin(self, epoch: int, logs: Optional[Dict[str, Any]] = None) -> None:
        """Returns to the raw weights, or goes on from what was loaded since the end of the last epoch."""
        self._take_up("between two epochs, while it held the averages")
        self._rest(averages=False)
        if self._first_epoch:
            self._first_epoch = False
            self._begin(epoch)
        if epoch >= self.begin_epoch and self.optimizer.start_averaging == NEVER:
            self.optimizer.begin_averaging(int(self.optimizer.iterations.numpy()))
        self._tell("on_epoch_begin", epoch, logs)

    def on_train_batch_begin(self, batch: int, logs: Optional[Dict[str, Any]] = None) -> None:
        """Returns to the raw weights if an evaluation in the middle of the epoch was left."""
        if self._before_evaluation is not None:
            self._rest(averages=False)
        self._tell_of_batch("on_train_batch_begin", batch, logs)

    def on_epoch_end(self, epoch: int, logs: Optional[Dict[str, Any]] = None) -> None:
        """With `swap_on_epoch`, puts the averages into the model."""
        if self.swap_on_epoch:
            self.recompute()
        self._rest(averages=self.swap_on_epoch)
        if self.swap_on_epoch:
            self.optimizer._averages.leave()  # Training may be broken off here.
        self._tell("on_epoch_end", epoch, logs)

    def on_train_end(self, logs: Optional[Dict[str, Any]] = None) -> None:
        """Leaves the averages in the model with `swap_on_epoch`; warns if there are none."""
        self._warn_of_nothing()
        # What a callback has restored, or restores now, counts as loaded: the next `fit` goes on from it.
        if not self.optimizer._averages.were_loaded():
            self.recompute()
            self._rest(averages=self.swap_on_epoch)
            if self.swap_on_epoch:
                self.optimizer._averages.leave()
        self._tell("on_train_end", logs)

    # Evaluation. One may run inside another one's callbacks. An inner one cannot be told from the first
    # one after another was left, so its end returns to what the model held before, and the next batch of
    # the outer one brings the averages back.

    def on_test_begin(self, logs: Optional[Dict[str, Any]] = None) -> None:
        """Puts the averages into the model."""
        self._begin_evaluation()
        self._tell("on_test_begin", logs)

    def on_test_batch_begin(self, batch: int, logs: Optional[Dict[str, Any]] = None) -> None:
        """Puts the averages into the model if another evaluation has ended meanwhile."""
        self._begin_batch("on_test_batch_begin", batch, logs)

    def on_test_end(self, logs: Optional[Dict[str, Any]] = None) -> None:
        """Returns to what the model held before."""
        self._end_evaluation("on_test_end", logs)

    def on_predict_begin(self, logs: Optional[Dict[str, Any]] = None) -> None:
        """As `on_test_begin`."""
        self._begin_evaluation()
        self._tell("on_predict_begin", logs)

    def on_predict_batch_begin(self, batch: int, logs: Optional[Dict[str, Any]] = None) -> None:
        """As `on_test_batch_begin`."""
        self._begin_batch("on_predict_batch_begin", batch, logs)

    def on_predict_end(self, logs: Optional[Dict[str, Any]] = None) -> None:
        """As `on_test_end`."""
        self._end_evaluation("on_predict_end", logs)

    def _begin_evaluation(self) -> None:
        if self._before_evaluation is None:
            self._before_evaluation = self.optimizer.weights_swapped
        if self.optimizer.has_shadow_copy:  # Some that were loaded may wait to be told of the model.
            averaging_callback.follow(self.optimizer, self.model)
        self.recompute()
        averaging_callback.hold(self.optimizer, averages=True)

    def _begin_batch(self, hook: str, batch, logs) -> None:
        if self._before_evaluation is None:
            self._begin_evaluation()
        self._tell_of_batch(hook, batch, logs)

    def _end_evaluation(self, hook: str, logs) -> None:
        self._tell(hook, logs)
        if self._before_evaluation is not None:
            self._rest(averages=self._before_evaluation)

    # The start of averaging.

    def _begin(self, epoch: int) -> None:
        """Has averaging begin with `begin_epoch`, and not before."""
        optimizer = self.optimizer
        step = int(optimizer.iterations.numpy())
        if self.begin_epoch:
            is_empty = optimizer.num_averaged == 0 and optimizer.start_averaging <= step
            if is_empty and epoch < self.begin_epoch:
                # Reset, or begun anew from weights that were loaded.
                for one in optimizer._everyone():
                    one._averages.begin(NOT_SET)
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
                "as after a reset, or loading a model without them. They start from the weights as they "
                "are now.",
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
