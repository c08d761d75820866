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
"""Results of the raw weights, beside those of the averages."""

from __future__ import annotations

from typing import Any, Dict, Optional, Union

from tf_averaging.averaged_optimizer_wrapper import AveragedOptimizerWrapper
from tf_averaging.callbacks import averaging_callback


class EvaluateRawWeights(averaging_callback.AveragingCallback):
    """Evaluates the raw weights at the end of each epoch, and adds `raw_val_*` to the logs.

    `SwapAverageWeights` makes `val_*` the averages' results. With both numbers one sees what averaging
    gains. It may stand before `SwapAverageWeights`, after it or inside it. Callbacks that come later find
    the results in the logs, as does the history.

    >>> model = tf.keras.Sequential([tf.keras.Input([2]), tf.keras.layers.Dense(1)])
    >>> model.compile(tfav.ExponentialMovingAverage("sgd"), "mse")
    >>> x, y = tf.ones([8, 2]), tf.ones([8, 1])
    >>> callbacks = [
    ...     tfav.callbacks.SwapAverageWeights(),
    ...     tfav.callbacks.EvaluateRawWeights(x, y)]
    >>> history = model.fit(x, y, validation_data=(x, y), callbacks=callbacks, verbose=0).history
    >>> sorted(history)
    ['loss', 'raw_val_loss', 'val_loss']

    Args:
      x: data as for `Model.evaluate`, which can be read again in each epoch.
      y: targets, if `x` does not hold them.
      batch_size: number of samples in a batch; None for 32.
      verbose: `"auto"`, 0, 1 or 2; not shown by default, as `fit` has a progress bar.
      sample_weight: weights of the samples.
      steps: number of batches; None for all.
      callbacks: callbacks for the evaluation.
      optimizer: the averaging optimizer, for models that are compiled with another one; None for the one
        that the model is compiled with.
      **kwargs: what else `Model.evaluate` of tf_keras takes: `max_queue_size`, `workers`,
        `use_multiprocessing`.

    Raises:
      TypeError: if an argument is unknown.
      ValueError: if there is no `x`, it can be read only once, or `optimizer` does not average; when
        training begins, if the model's optimizer does not average.
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        batch_size: Optional[int] = None,
        verbose: Union[str, int] = 0,
        sample_weight: Any = None,
        steps: Optional[int] = None,
        callbacks: Any = None,
        *,
        optimizer: Optional[AveragedOptimizerWrapper] = None,
        **kwargs: Any,
    ):
        super().__init__(optimizer)
        unknown = sorted(kwargs.keys() - {"max_queue_size", "workers", "use_multiprocessing"})
        if unknown:
            raise TypeError(f"Expected arguments of `Model.evaluate`. Received: {', '.join(unknown)}")
        if x is None:
            raise ValueError("Expected data to evaluate the raw weights on. Received: x=None")
        averaging_callback.check_data("x", x, "steps", steps)
        self._arguments = {
            "x": x,
            "y": y,
            "batch_size": batch_size,
            "verbose": verbose,
            "sample_weight": sample_weight,
            "steps": steps,
            "callbacks": callbacks,
            **kwargs,
        }

    def __deepcopy__(self, memo: Dict[int, Any]) -> EvaluateRawWeights:
        # KerasTuner copies callbacks for each trial. A `tf.data.Dataset` cannot be copied.
        return EvaluateRawWeights(**self._arguments, optimizer=self._given_optimizer)

    def on_train_begin(self, logs: Optional[Dict[str, Any]] = None) -> None:
        """Looks for the averaging optimizer."""
        self.optimizer  # noqa: B018  A ValueError here rather than after an epoch.

    def on_epoch_end(self, epoch: int, logs: Optional[Dict[str, Any]] = None) -> None:
        """Adds the results to the logs."""
        with averaging_callback.holding(self.optimizer, averages=False):
            results = self.model.evaluate(**self._arguments, return_dict=True)
        if logs is not None:
            logs.update({f"raw_val_{name}": value for name, value in results.items()})
