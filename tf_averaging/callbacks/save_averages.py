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
"""Snapshots of the averages during the training."""

from __future__ import annotations

import os
import warnings
from typing import Any, Dict, Optional, Union

from tf_averaging import snapshots
from tf_averaging.averaged_optimizer_wrapper import AveragedOptimizerWrapper
from tf_averaging.callbacks import averaging_callback
from tf_averaging.core.status import checked_count
from tf_averaging.post_hoc_ema import PostHocEMA


class SaveAverages(averaging_callback.AveragingCallback):
    """Writes a snapshot of the averages of `PostHocEMA` now and then, and at the end of the training.

    `post_hoc_average` has the average of any width from them. A few dozen are enough. A training that is
    resumed goes on in the same directory, and replaces the snapshots that it comes to again.

    >>> import os, tempfile
    >>> directory = tempfile.mkdtemp()
    >>> model = tf.keras.Sequential([tf.keras.Input([2]), tf.keras.layers.Dense(1)])
    >>> model.compile(tfav.PostHocEMA(tf.keras.optimizers.SGD(0.01)), "mse")
    >>> x, y = tf.ones([64, 2]), tf.ones([64, 1])
    >>> save = tfav.callbacks.SaveAverages(directory)
    >>> _ = model.fit(x, y, epochs=3, callbacks=[save], verbose=0)
    >>> sorted(os.listdir(directory))
    ['snapshot_000000000002.npz', 'snapshot_000000000004.npz', 'snapshot_000000000006.npz']

    Args:
      directory: where to write them; one for each training.
      every: `"epoch"`, or a number of batches, as the `save_freq` of `ModelCheckpoint`.
      optimizer: the averaging optimizer, for models that are compiled with another one; None for the one
        that the model is compiled with.

    Raises:
      TypeError: if `directory` is not a path, or `every` is neither `"epoch"` nor an int; when training
        begins, if the averaging optimizer is no `PostHocEMA`.
      ValueError: if `every` is less than 1, or `optimizer` does not average; when training begins, if the
        model's optimizer does not average.
    """

    def __init__(
        self,
        directory: Union[str, os.PathLike],
        every: Union[str, int] = "epoch",
        *,
        optimizer: Optional[AveragedOptimizerWrapper] = None,
    ):
        super().__init__(optimizer)
        self.directory = os.fspath(directory)
        # None for each epoch.
        self.every = None if every == "epoch" else checked_count("every", every, minimum=1)  # type: ignore[arg-type]
        self._unsaved_batches = 0
        self._next_batch = 0
        self._saved_updates = 0

    def on_train_begin(self, logs: Optional[Dict[str, Any]] = None) -> None:
        """Creates the averages."""
        if not isinstance(self.optimizer, PostHocEMA):
            raise TypeError(
                "Expected a `PostHocEMA`, whose averages can be combined afterwards, as `optimizer`, or "
                f"as what the model is compiled with. Received: {self.optimizer!r}"
            )
        averaging_callback.follow(self.optimizer, self.model)
        self._saved_updates = 0
        # A training that goes on from a checkpoint keeps to the moments of the one before.
        steps = int(self.optimizer.iterations.numpy())
        self._unsaved_batches = 0 if self.every is None else steps % self.every
        updates = int(self.optimizer.num_averaged)
        later = [path for step, path in snapshots.paths_in(self.directory) if step > updates]
        if later:
            warnings.warn(
                f"The averages hold {updates} updates, and there are snapshots of more, from another "
                "training or from before it went back. `post_hoc_average` would combine them with the "
                "new ones. Remove those that this training does not replace, or use another directory: "
                f"{later}",
                stacklevel=2,
            )

    def on_epoch_begin(self, epoch: int, logs: Optional[Dict[str, Any]] = None) -> None:
        """Batches are counted anew."""
        self._next_batch = 0

    def on_train_batch_end(self, batch: int, logs: Optional[Dict[str, Any]] = None) -> None:
        """Writes a snapshot every so many batches."""
        if self.every is None:
            return
        # With `steps_per_execution` this is called once for several batches.
        self._unsaved_batches += batch + 1 - self._next_batch
        self._next_batch = batch + 1
        if self._unsaved_batches >= self.every:
            self._unsaved_batches = 0
            self._save()

    def on_epoch_end(self, epoch: int, logs: Optional[Dict[str, Any]] = None) -> None:
        """Writes a snapshot if there is one for each epoch."""
        if self.every is None:
            self._save()

    def on_train_end(self, logs: Optional[Dict[str, Any]] = None) -> None:
        """Writes the last snapshot."""
        self._save()

    def _save(self) -> None:
        updates = int(self.optimizer.num_averaged)
        if updates != self._saved_updates:
            self.optimizer.save_snapshot(self.directory, self.model, overwrite=True)
            self._saved_updates = updates

    def _implements_train_batch_hooks(self) -> bool:
        # What tf_keras asks, to spare itself the call after each batch.
        return self.every is not None
