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
"""Files are read as a whole, and written as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from typing import Iterator

import tensorflow as tf


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """A context in which errors say which file is broken. Each library has its own for that."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"Cannot read {path!r}. Expected a complete file as its suffix says. {error}"
        ) from error


@contextlib.contextmanager
def directory_beside(output: str) -> Iterator[str]:
    """A new directory where files can be moved to the output from at once."""
    parent, name = os.path.split(output)
    directory = os.path.join(parent, f".{name}.{uuid.uuid4().hex}")
    try:
        tf.io.gfile.makedirs(directory)
    except tf.errors.OpError as error:
        raise ValueError(f"Cannot write {output!r}. {error.message}.") from error
    try:
        yield directory
    finally:
        tf.io.gfile.rmtree(directory)
