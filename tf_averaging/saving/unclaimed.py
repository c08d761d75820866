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
"""One average as arrays, and those that were loaded for variables which are not known yet."""

from __future__ import annotations

import dataclasses
import warnings
from typing import List, NamedTuple, Optional, Sequence

import numpy as np
import tensorflow as tf

from tf_averaging.core.averages import Averages
from tf_averaging.core.status import Clock


class SavedAverage(NamedTuple):
    """What is saved of one average; `stash` only where its dtype is not the variable's."""

    average: np.ndarray
    stash: Optional[np.ndarray]
    clock: Clock


@dataclasses.dataclass(eq=False)
class Unclaimed:
    """Averages that were loaded for variables which are not known yet.

    A model is loaded before anybody says which of its variables are averaged beside the trained ones.
    Their averages are kept here, and are saved again with the others, until `shadow_copy` names them.

    Attributes:
      averages: what they are loaded into.
      saved: what is kept.
      variables: the same as variables, averages before stashes, for saving.
      clocks: their clocks as a variable of shape [2, averages], or nothing.
    """

    averages: Averages
    saved: List[SavedAverage] = dataclasses.field(default_factory=list)
    variables: List[tf.Variable] = dataclasses.field(default_factory=list)
    clocks: List[tf.Variable] = dataclasses.field(default_factory=list)

    def keep(self, saved: Sequence[SavedAverage]) -> None:
        """Keeps these averages, in the order in which their variables will come.

        A list of arrays does not say which of them are stashes. They come last, and may be kept as
        averages of their own.
        """
        self.saved = list(saved)
        if self.give_to not in self.averages.when_added:
            self.averages.when_added.append(self.give_to)
        arrays = [s.average for s in saved] + [s.stash for s in saved if s.stash is not None]
        self.variables = [
            tf.Variable(array, trainable=False, name=f"unclaimed_average_{index}")
            for index, array in enumerate(arrays)
        ]
        clocks = np.array([s.clock for s in saved], np.int64).T
        self.clocks = [tf.Variable(clocks, trainable=False, name="unclaimed_clocks")] if saved else []

    def give_to(self, variables: Sequence[tf.Variable]) -> None:
        """Loads what is kept into the averages of these variables, or warns that it does not fit them."""
        if not self.saved or not variables:
            return
        saved, averages = self.saved, self.averages
        self.keep([])
        slots = [averages.slots[variable] for variable in variables]
        stashed = [place for place, its_slots in enumerate(slots) if its_slots.stash is not None]
        if len(saved) == len(slots) + len(stashed):
            for place, loose in zip(stashed, saved[len(slots) :]):
                saved[place] = saved[place]._replace(stash=loose.average)
            saved = saved[: len(slots)]
        expected, received = [s.average.shape for s in saved], [tuple(s.average.shape) for s in slots]
        if expected != received:
            warnings.warn(
                "The averages that were loaded for variables yet unknown do not fit those that came now, "
                "and are dropped; the averages start from the current weights. Expected variables of the "
                f"shapes {expected}. Received: {received}",
                stacklevel=4,
            )
            return
        for one, its_slots in zip(saved, slots):
            averages.load(its_slots, one.average, one.stash, one.clock)

    def check(self) -> None:
        """Raises a ValueError if anything is kept, which says what to do before averages can be used."""
        if not self.saved:
            return
        raise ValueError(
            "Averages were loaded whose variables are not known, since only those of trained ones are "
            "when a model is loaded. Call `shadow_copy` first, with the same model or list as before "
            "saving."
        )
