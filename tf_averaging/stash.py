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
"""Swapping where the average's dtype is not the variable's: the weights go to a stash meanwhile.

They cannot pass through the average, nor it through the variable, without losing bits.
"""

from __future__ import annotations

from typing import Iterable, List, Optional, Tuple

import tensorflow as tf

from tf_averaging import average_ops

# A variable, its average, and a stash of the variable's dtype.
Triple = Tuple[average_ops.Component, average_ops.Component, average_ops.Component]


def enter(triples: Iterable[Triple]) -> List[Optional[tf.Operation]]:
    """Puts the averages, cast, into the variables, and the weights into the stash."""
    operations = []
    for variable, average, stash in triples:
        weights = average_ops.read(variable)
        shown = tf.cast(average_ops.read(average), variable.dtype)
        with tf.control_dependencies([weights]):
            operations += [
                average_ops.assign(variable, shown),
                average_ops.assign(stash, weights),
            ]
    return operations


def leave(triples: Iterable[Triple]) -> List[Optional[tf.Operation]]:
    """Brings the weights back, and into the averages whatever was changed in the variables meanwhile.

    A value that was not touched keeps its average at the average's own precision.
    """
    operations = []
    for variable, average, stash in triples:
        shown, weights, exact = map(average_ops.read, (variable, stash, average))
        untouched = tf.equal(_bits(shown), _bits(tf.cast(exact, shown.dtype)))
        kept = tf.where(untouched, exact, tf.cast(shown, exact.dtype))
        with tf.control_dependencies([kept, weights, shown]):
            operations += [
                average_ops.assign(average, kept),
                average_ops.assign(variable, weights),
                average_ops.assign(stash, shown),
            ]
    return operations


def _bits(value: tf.Tensor) -> tf.Tensor:
    return tf.bitcast(value, {1: tf.uint8, 2: tf.uint16, 4: tf.uint32, 8: tf.uint64}[value.dtype.size])
