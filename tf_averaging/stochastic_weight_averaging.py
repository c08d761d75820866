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
"""Stochastic weight averaging."""

from __future__ import annotations

from typing import Any, Dict, Optional

import numpy as np
import tensorflow as tf

from tf_averaging import averaged_optimizer_wrapper
from tf_averaging import faces


@faces.register
class SWA(averaged_optimizer_wrapper.AveragedOptimizerWrapper):
    """Stochastic weight averaging (arXiv:1803.05407): the mean of snapshots of the weights.

    A snapshot is taken after step `start_averaging` (steps are counted from 0) and after every
    `average_period`-th step from there on; the average is the plain mean of all snapshots. It is meant
    for the last part of training, with a learning rate that stays high or returns in cycles.

    >>> weights = [tf.Variable([1.0, 1.0]), tf.Variable([2.0, 2.0])]
    >>> gradients = [tf.constant([0.1, 0.1]), tf.constant([0.1, 0.1])]
    >>> optimizer = tfav.SWA(tf_keras.optimizers.SGD(1.0), start_averaging=0, average_period=1)
    >>> for _ in range(3):
    ...     _ = optimizer.apply_gradients(zip(gradients, weights))
    >>> optimizer.assign_average_vars(weights)
    >>> print(weights[0].numpy().round(2), weights[1].numpy().round(2))
    [0.8 0.8] [1.8 1.8]

    Models with BatchNormalization need its statistics recomputed for the averaged weights, or averaged
    too (`trainable_weights_only=False`).

    Args:
      optimizer: the inner optimizer; see `AveragedOptimizerWrapper`.
      start_averaging: int >= 0, the step of the first snapshot.
      average_period: int >= 1, the number of steps from one snapshot to the next; None for snapshots by
        hand alone (`update_average`).
      name: name of the optimizer.
      sequential_update: accepted and kept in the config, without effect: TensorFlow 2 orders the update
        after the step by itself.
      **options: see `AveragedOptimizerWrapper`.

    Raises:
      TypeError: see `AveragedOptimizerWrapper`.
      ValueError: see `AveragedOptimizerWrapper`.
    """

    _predecessors = ("SWA",)

    def __init__(
        self,
        optimizer: Any,
        start_averaging: int = 0,
        average_period: Optional[int] = 10,
        name: str = "SWA",
        sequential_update: bool = True,
        **options: Any,
    ):
        super().__init__(
            optimizer,
            name,
            start_averaging=start_averaging,
            average_period=average_period,
            **options,
        )
        if not isinstance(sequential_update, (bool, np.bool_)):
            raise TypeError(f"Expected `sequential_update` to be a bool. Received: {sequential_update!r}")
        self._sequential_update = bool(sequential_update)

    def averaging_weight(self, steps: tf.Tensor, updates: tf.Tensor) -> tf.Tensor:
        """1 / (number of snapshots, this one included); see `AveragedOptimizerWrapper`."""
        del steps
        return 1 / (updates + 1)

    @property
    def sequential_update(self) -> bool:
        """As given to the constructor; without effect."""
        return self._sequential_update

    def get_config(self) -> Dict[str, Any]:
        """The constructor's arguments, ready for JSON."""
        return {**super().get_config(), "sequential_update": self._sequential_update}
