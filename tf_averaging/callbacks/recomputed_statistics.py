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
"""Statistics of BatchNormalization that are the averages' own, recomputed when they are needed."""

from __future__ import annotations

import contextlib
from typing import Any, Dict, Iterator, Optional

from tf_averaging import batch_norm
from tf_averaging.averaged_optimizer_wrapper import AveragedOptimizerWrapper
from tf_averaging.averaging_optimizer import find_averaging_optimizer
from tf_averaging.callbacks import averaging_callback
from tf_averaging.core.status import checked_count


class RecomputedStatistics:
    """Calls `update_batch_norm` for the averages, once for each state of them.

    Args:
      data: see `update_batch_norm`. It is read again and again.
      steps: number of batches to take each time; None for all.
    """

    def __init__(self, data: Any, steps: Optional[int]):
        averaging_callback.check_data("batch_norm_data", data, "batch_norm_steps", steps)
        self._data = data
        self._steps = None if steps is None else checked_count("batch_norm_steps", steps, minimum=1)
        # A checksum of the averages, statistics included. Their count would not do: after a reset, or
        # when other averages are loaded, it comes to the same numbers again.
        self._known: Optional[int] = None
        self._has_warned = False

    def __deepcopy__(self, memo: Dict[int, Any]) -> RecomputedStatistics:
        # KerasTuner copies callbacks for each trial. A `tf.data.Dataset` cannot be copied.
        return RecomputedStatistics(self._data, self._steps)

    def recompute(self, model, optimizer: AveragedOptimizerWrapper) -> None:
        """Brings the statistics up to date; afterwards the model holds what it did before.

        Args:
          model: the model that is trained or evaluated.
          optimizer: what keeps the averages of its weights.
        """
        averages, updates = optimizer._averages, int(optimizer.num_averaged)
        have_statistics = len(averages.slots) > len(averages.averaged())
        if not updates and not have_statistics:
            return  # The averages are the weights, whose statistics training has tracked.
        left = averages.left
        if not optimizer.weights_swapped:
            averages.exchanged_at = updates  # It would warn of statistics that are replaced at once.
        with averaging_callback.holding(optimizer, averages=True):
            now = self._checksum(averages)
            if now != self._known:
                # Another optimizer than the one that the model is compiled with must be named.
                is_compiled = find_averaging_optimizer(model) is optimizer
                options: Any = {} if is_compiled else {"optimizer": optimizer}
                batch_norm.update_batch_norm(model, self._data, self._steps, verbose=0, **options)
                self._known = self._checksum(averages)
            # Statistics of its own are nothing that somebody loaded into the model.
            averages.left = self._known if left == now else left

    @contextlib.contextmanager
    def outdated(self, optimizer: AveragedOptimizerWrapper) -> Iterator[None]:
        """A context in which statistics of older averages may be used, with one warning for all times.

        Args:
          optimizer: what keeps the averages.
        """
        averages, updates = optimizer._averages, int(optimizer.num_averaged)
        before = averages.exchanged_at
        during = averages.exchanged_at = updates if self._has_warned else before
        have_statistics = len(averages.slots) > len(averages.averaged())
        self._has_warned = self._has_warned or (have_statistics and updates > before >= 0)
        try:
            yield
        finally:
            if averages.exchanged_at == during:  # Otherwise they were recomputed meanwhile.
                averages.exchanged_at = before

    @staticmethod
    def _checksum(averages) -> int:
        averages.leave()
        return averages.left
