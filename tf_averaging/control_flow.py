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
"""What runs on a condition, what runs after what, and what is not compiled."""

from __future__ import annotations

import contextlib
from typing import Callable, ContextManager, Optional, Sequence, Union

import tensorflow as tf

# Work is a function without arguments that returns the operations that must run.
Work = Callable[[], Sequence[Union[None, tf.Operation, tf.Tensor]]]


def done(work: Work) -> tf.Tensor:
    """Does the work; returns a scalar bool tensor that is ready after it."""
    with after(*work()):
        return tf.constant(True)


def after(*results: object) -> ContextManager:
    """Orders what follows after those results that are tensors or operations of a graph."""
    if tf.executing_eagerly():
        return contextlib.nullcontext()
    return tf.control_dependencies(
        [result for result in results if isinstance(result, (tf.Tensor, tf.Operation))]
    )


def waiting(value: Optional[tf.Tensor]) -> Optional[tf.Tensor]:
    """The value; in graphs it is ready after what the context orders it after. None stays None."""
    return value if value is None or tf.executing_eagerly() else tf.identity(value)


def as_it_is() -> ContextManager:
    """Keeps TensorFlow, where it compiles parts of graphs by itself, from compiling this one."""
    if tf.executing_eagerly():
        return contextlib.nullcontext()
    return tf.xla.experimental.jit_scope(compile_ops=False)


def when(condition: Union[bool, tf.Tensor], work: Work) -> Optional[tf.Tensor]:
    """Does `work` if `condition` holds.

    Args:
      condition: a bool known while the graph is built (then nothing is added for the other case), or a
        scalar bool tensor.
      work: what to do.

    Returns:
      As `either` does; None if there is nothing to wait for.
    """
    if isinstance(condition, bool):
        return done(work) if condition else None
    return either(condition, work, list)


def either(condition: tf.Tensor, work: Work, otherwise: Work) -> tf.Tensor:
    """Does `work` if the scalar bool tensor holds, `otherwise` if not.

    Returns:
      A scalar bool tensor that is ready once the work is done; in graphs without automatic control
      dependencies, what follows must depend on it.
    """
    return tf.cond(condition, lambda: done(work), lambda: done(otherwise))
