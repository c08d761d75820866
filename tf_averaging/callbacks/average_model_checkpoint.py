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
"""Files that hold the averaged model."""

from __future__ import annotations

import contextlib
import os
from typing import Any, Dict, List, Optional, Union

import tensorflow as tf

from tf_averaging import kerases
from tf_averaging.averaged_optimizer_wrapper import AveragedOptimizerWrapper
from tf_averaging.callbacks import averaging_callback


class AverageModelCheckpoint(averaging_callback.AveragingCallback):
    """A `ModelCheckpoint` whose files hold the averaged model.

    Weights and averages are exchanged while a file is written, so nothing is copied. The optimizer in the
    file remembers it: a training resumed from it goes on from the raw weights, with `SwapAverageWeights`
    or after `optimizer.swap_weights()`, while the model in it is ready for use. Where the averages are in
    the model anyway, it is saved as it is.

    >>> import os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "model.keras")
    >>> model = tf.keras.Sequential([tf.keras.Input([2]), tf.keras.layers.Dense(1)])
    >>> model.compile(tfav.SWA("sgd", 0, 1), "mse")
    >>> x, y = tf.ones([8, 2]), tf.ones([8, 1])
    >>> callbacks = [
    ...     tfav.callbacks.SwapAverageWeights(),  # The monitored loss is the averaged model's.
    ...     tfav.callbacks.AverageModelCheckpoint(False, path, "val_loss", save_best_only=True)]
    >>> _ = model.fit(x, y, validation_data=(x, y), callbacks=callbacks, verbose=0)
    >>> averaged = tf.keras.models.load_model(path)

    Args:
      update_weights: whether the model itself is set to the averages when they are saved, so that
        training goes on from them.
      filepath: see `callbacks.ModelCheckpoint` of the model's Keras, as for all that follow. For Keras 3
        it ends in `.keras` or `.h5`, with `save_weights_only` in `.weights.h5`.
      monitor: name of the metric to judge by.
      verbose: 0 or 1.
      save_best_only: whether to save only where `monitor` improved. `SwapAverageWeights` makes it the
        averaged model's.
      save_weights_only: whether to save weights only.
      mode: `"auto"`, `"min"` or `"max"`.
      save_freq: `"epoch"`, or a number of batches.
      options: `tf.train.CheckpointOptions` with `save_weights_only`, else `tf.saved_model.SaveOptions`;
        for models of tf_keras.
      initial_value_threshold: what `monitor` must improve on at first, with `save_best_only`.
      optimizer: the averaging optimizer, for models that are compiled with another one; None for the one
        that the model is compiled with.
      **kwargs: `period` and `load_weights_on_restart`, which tf_keras's `ModelCheckpoint` has deprecated.

    Raises:
      TypeError: if `update_weights` is not a bool, or an argument is unknown.
      ValueError: if `optimizer` does not average; when training begins, if the model's optimizer does not
        average, or if `update_weights` meets `SwapAverageWeights(swap_on_epoch=True)`, with which there
        are no weights to update. What `ModelCheckpoint` finds wrong it says then, too.
    """

    def __init__(
        self,
        update_weights: bool,
        filepath: Union[None, str, os.PathLike] = None,
        monitor: str = "val_loss",
        verbose: int = 0,
        save_best_only: bool = False,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: Union[str, int] = "epoch",
        options: Union[None, tf.train.CheckpointOptions, tf.saved_model.SaveOptions] = None,
        initial_value_threshold: Optional[float] = None,
        *,
        optimizer: Optional[AveragedOptimizerWrapper] = None,
        **kwargs: Any,
    ):
        super().__init__(optimizer)
        if not isinstance(update_weights, bool) or filepath is None:
            raise TypeError(
                "Expected `update_weights`, a bool, and then the file: "
                "`AverageModelCheckpoint(False, 'model.keras')`. "
                f"Received: update_weights={update_weights!r}, filepath={filepath!r}"
            )
        self.update_weights = update_weights
        unknown = sorted(kwargs.keys() - {"period", "load_weights_on_restart"})
        if unknown:  # tf_keras would ignore them.
            raise TypeError(f"Expected arguments of `ModelCheckpoint`. Received: {', '.join(unknown)}")
        self._arguments = {
            "filepath": os.fspath(filepath),
            "monitor": monitor,
            "verbose": verbose,
            "save_best_only": save_best_only,
            "save_weights_only": save_weights_only,
            "mode": mode,
            "save_freq": save_freq,
            "initial_value_threshold": initial_value_threshold,
            **kwargs,
        }
        if options is not None:  # Keras 3 has no such argument.
            self._arguments["options"] = options
        # Decides when to write. It stays the same for all trainings, as it remembers the best value.
        self._checkpoint: Any = None

    def set_model(self, model: Any) -> None:
        """Makes the `ModelCheckpoint` of the model's Keras, if that has not been done.

        Args:
          model: from Keras.
        """
        super().set_model(model)
        checkpoint_class = kerases.of_model(model).callbacks.ModelCheckpoint
        if not isinstance(self._checkpoint, checkpoint_class):
            self._checkpoint = checkpoint_class(**self._arguments)
        self._checkpoint.set_model(averaging_callback.SavesAverages(model, self._averages_in_model))

    @property
    def best(self) -> Optional[float]:
        """The best value of `monitor` so far, with `save_best_only`."""
        if self._checkpoint is None:
            return self._arguments["initial_value_threshold"]
        return self._checkpoint.best

    def on_train_begin(self, logs: Optional[Dict[str, Any]] = None) -> None:
        """Creates the averages."""
        averaging_callback.follow(self.optimizer, self.model)
        if self.update_weights and any(swap.swap_on_epoch for swap in self._own_swaps()):
            raise ValueError(
                "With `SwapAverageWeights(swap_on_epoch=True)` the averages are in the model when it is "
                "saved, and the raw weights come back for the next epoch. Expected either that or "
                "`update_weights=True`, not both."
            )
        self._checkpoint.on_train_begin(logs)

    def on_epoch_begin(self, epoch: int, logs: Optional[Dict[str, Any]] = None) -> None:
        """As `ModelCheckpoint`."""
        self._checkpoint.on_epoch_begin(epoch, logs)

    def on_train_batch_end(self, batch: int, logs: Optional[Dict[str, Any]] = None) -> None:
        """As `ModelCheckpoint`: writes a file every `save_freq` batches."""
        self._checkpoint.on_train_batch_end(batch, logs or {})

    def on_epoch_end(self, epoch: int, logs: Optional[Dict[str, Any]] = None) -> None:
        """As `ModelCheckpoint`: writes a file if it is time and the model is good enough."""
        self._checkpoint.on_epoch_end(epoch, logs or {})

    def _implements_train_batch_hooks(self) -> bool:
        # What tf_keras asks, to spare itself the call after each batch.
        return self._arguments["save_freq"] != "epoch"

    def _own_swaps(self) -> List[Any]:
        """What swaps the same averages in this training: none or one `SwapAverageWeights`."""
        return [swap for swap in self._swaps if swap.optimizer is self.optimizer]

    def _averages_in_model(self) -> contextlib.AbstractContextManager:
        """A context in which the model holds the averages; with `update_weights` it keeps them."""
        optimizer = self.optimizer
        if not optimizer.has_shadow_copy:  # The averages are the weights still.
            return contextlib.nullcontext()
        for swap in self._own_swaps():
            swap.recompute()
        if self.update_weights and not optimizer.weights_swapped:
            optimizer.assign_average_vars(self.model.variables)
            return contextlib.nullcontext()
        return optimizer.swapped_weights()
