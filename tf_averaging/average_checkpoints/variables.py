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
"""What a file says of a variable."""

from __future__ import annotations

from typing import NamedTuple, Tuple

import numpy as np
import tensorflow as tf

BFLOAT16 = np.dtype(tf.bfloat16.as_numpy_dtype)
OPAQUE = np.dtype("V2")  # What bfloat16 is in a file: neither HDF5 nor NumPy's format has a name for it.


def with_bfloat16(value: np.ndarray) -> np.ndarray:
    """The array as it was before it was written."""
    return value.view(BFLOAT16) if value.dtype == OPAQUE else value


class Variable(NamedTuple):
    """The type of a variable in a file.

    Attributes:
      dtype: of its elements.
      shape: of the whole variable, also where it is stored in slices.
    """

    dtype: np.dtype
    shape: Tuple[int, ...]

    @property
    def is_averaged(self) -> bool:
        """Whether it is of floating-point or complex numbers. What else there is has no mean."""
        try:
            dtype = tf.as_dtype(self.dtype)
        except TypeError:
            return False
        return dtype.is_floating or dtype.is_complex

    def __str__(self) -> str:
        return f"{self.dtype.name}{list(self.shape)}"
