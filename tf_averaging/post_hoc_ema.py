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
"""Power-function averages of the weights, from which those of other widths can be had afterwards."""

from __future__ import annotations

import math
import os
from typing import Any, Dict, List, Sequence, Union

import numpy as np
import tensorflow as tf

from tf_averaging import averaged_optimizer_wrapper
from tf_averaging import faces
from tf_averaging import snapshots

# Of the plain mean of all weights, which is the widest.
WIDEST = 1 / math.sqrt(12)


@faces.register
class PostHocEMA(averaged_optimizer_wrapper.AveragedOptimizerWrapper):
    """Averages whose length is a fixed share of the training so far, whatever its length.

    After update `t` (counted from 1)

        average = decay * average + (1 - decay) * weights,  decay = (1 - 1 / t) ** (gamma + 1)

    so the weights of update `k` count as `k ** gamma`, up to rounding (arXiv:2312.02696, section 3). The
    first update makes the average the weights. The exponent follows from the relative width, which is the
    standard deviation of the updates that count, as a share of all updates:

        width ** 2 = (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))

    A width of 0.05 gives an exponent of 16.97, and 0.10 one of 6.94.

    Two of these averages, saved now and then, are enough to have the average of any other width after the
    training: `save_snapshot` or `callbacks.SaveAverages`, then `post_hoc_average`.

    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> weight = tf.Variable(0.0)
    >>> optimizer = tfav.PostHocEMA(tf_keras.optimizers.SGD(1.0), relative_widths=(0.05, 0.10))
    >>> for step in range(100):
    ...     _ = optimizer.apply_gradients([(tf.constant(-1.0), weight)])
    ...     if step % 10 == 9:
    ...         _ = optimizer.save_snapshot(directory, [weight])
    >>> print([round(float(optimizer.get_average(weight, which)), 1) for which in (0, 1)])
    [95.2, 89.3]
    >>> average = tfav.post_hoc_average(directory, relative_width=0.15)
    >>> print(round(float(average[weight.name]), 1))
    82.5

    Args:
      optimizer: the inner optimizer; see `AveragedOptimizerWrapper`.
      relative_widths: floats above 0 and up to 0.2886, the width of the plain mean; one average is kept
        for each. The first is used where no other is asked for with `which`.
      name: name of the optimizer.
      **options: `average_period` (int >= 1, the number of steps from one update to the next; default 1),
        `start_averaging` and others; see `AveragedOptimizerWrapper`.

    Raises:
      TypeError: if a width is not a number; see `AveragedOptimizerWrapper`.
      ValueError: if a width is out of range; see `AveragedOptimizerWrapper`.
    """

    one_average_for_each = "relative_widths"

    def __init__(
        self,
        optimizer: Any,
        relative_widths: Union[float, Sequence[float]] = (0.05, 0.10),
        name: str = "PostHocEMA",
        **options: Any,
    ):
        gamma = gamma_of(relative_widths)  # One width: a list is divided among several objects.
        super().__init__(optimizer, name, **options)
        self._relative_width, self._gamma = float(relative_widths), gamma  # type: ignore[arg-type]

    def averaging_weight(self, steps: tf.Tensor, updates: tf.Tensor) -> tf.Tensor:
        """1 - (updates / (updates + 1)) ** (gamma + 1); see `AveragedOptimizerWrapper`."""
        del steps
        updates = tf.cast(updates, tf.float64)
        # Of a long training all but the last digits of the power would be those of 1.
        return -tf.math.expm1((self._gamma + 1.0) * tf.math.log1p(-1.0 / (updates + 1.0)))

    @property
    def relative_widths(self) -> List[float]:
        """The widths, one for each average."""
        return [one._relative_width for one in self._everyone()]

    @property
    def gammas(self) -> List[float]:
        """The exponents that belong to the widths."""
        return [one._gamma for one in self._everyone()]

    def save_snapshot(
        self, directory: Union[str, os.PathLike], model_or_variables: Any, overwrite: bool = False
    ) -> str:
        """Writes all averages into a new file, for `post_hoc_average`.

        The weights may be swapped. The file is complete, or it is not there. Under a strategy of several
        workers all of them call this, and one writes.

        Args:
          directory: where the snapshots of this training are; it is created if need be.
          model_or_variables: the model, or a list of variables that have averages; always the same.
          overwrite: whether to replace a snapshot of as many updates.

        Returns:
          The path of the file, which has the number of updates in its name.

        Raises:
          KeyError: if a variable of a list has no average.
          TypeError: if it is neither a model nor a list of variables.
          ValueError: if no variable of the model has an average, the averages hold no updates yet, or the
            file exists.
          RuntimeError: in a `tf.function`.
        """
        return snapshots.write(self, os.fspath(directory), model_or_variables, overwrite)

    def get_config(self) -> Dict[str, Any]:
        """The constructor's arguments, ready for JSON."""
        return {**super().get_config(), "relative_widths": [self._relative_width]}


def gamma_of(relative_width: Any) -> float:
    """The exponent of the power-function average of a relative width.

    Raises:
      TypeError: if the width is not a number.
      ValueError: if it is out of range.
    """
    expected = (
        f"Expected a relative width above 0 and up to {WIDEST:.4f}, which is that of the plain mean of "
        "all weights; it is a share of the training's length."
    )
    if isinstance(relative_width, (bool, np.bool_)) or not isinstance(
        relative_width, (int, float, np.number)
    ):
        raise TypeError(f"{expected} Received: {relative_width!r}")
    width = float(relative_width)
    if not 0 < width <= WIDEST:
        raise ValueError(f"{expected} Received: {relative_width!r}")
    # width ** 2 * (gamma + 2) ** 2 * (gamma + 3) = gamma + 1, in powers of gamma. The largest root is the
    # one that is not below that of the plain mean, 0.
    share = width**-2
    roots = np.roots([1.0, 7.0, 16.0 - share, 12.0 - share])
    return max(float(np.max(roots.real)), 0.0)
