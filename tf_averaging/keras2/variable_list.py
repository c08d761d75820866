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
"""The list in which an averaging optimizer gives its variables to tf_keras."""

from __future__ import annotations

import warnings


class VariableList(list):
    """A list that can be called: `variables` is a property in one generation, a method in the other.

    The saver of `.h5` files is the only one that asks it whether it is empty, before it takes the
    variables, and cannot be told otherwise what such a file loses.

    Args:
      variables: the variables.
      lost_in_h5: what is lost in an `.h5` file, to follow these words; None for nothing.
    """

    def __init__(self, variables=(), lost_in_h5=None):
        super().__init__(variables)
        self._lost_in_h5 = lost_in_h5

    def __call__(self) -> list:
        return self

    def __bool__(self) -> bool:
        if self._lost_in_h5 is not None:
            warnings.warn(
                f"An `.h5` file {self._lost_in_h5}. Save to `.keras` or with "
                "`tf.train.Checkpoint`, which keep everything.",
                stacklevel=3,
            )
        return len(self) > 0
