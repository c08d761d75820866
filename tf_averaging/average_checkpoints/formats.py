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
"""The format of a file, by its name, as both Kerases choose it."""

from __future__ import annotations

import os
from typing import Sequence, Tuple, Type, Union

from tf_averaging.average_checkpoints.hdf5_file import Hdf5File
from tf_averaging.average_checkpoints.keras_archive import KerasArchive
from tf_averaging.average_checkpoints.object_checkpoint import ObjectCheckpoint

Format = Union[Hdf5File, KerasArchive, ObjectCheckpoint]

# The first that fits counts. A checkpoint has no suffix: its name is a prefix.
_BY_SUFFIX: Sequence[Tuple[str, Type[Format]]] = (
    (".keras", KerasArchive),
    (".weights.h5", Hdf5File),
    (".h5", Hdf5File),
    (".hdf5", Hdf5File),
    ("", ObjectCheckpoint),
)


def format_of(paths: Sequence[str], output: str) -> Type[Format]:
    """The common format of the files to read and the file to write.

    Raises:
      ValueError: if they differ in it.
    """
    for path in paths:
        if os.path.isdir(path) and not ObjectCheckpoint.exists(path):
            raise ValueError(
                f"Expected files. Received a directory: {path!r}. Pass the files in it. Those of a "
                "`CheckpointManager` are `tf.train.get_checkpoint_state(directory)"
                ".all_model_checkpoint_paths`."
            )
    suffix, form = _format(paths[-1])
    for path in [*paths, output]:
        if _format(path)[0] != suffix:
            raise ValueError(
                "Expected files of one format, and an output of the same one. Received "
                f"{_described(suffix)}, {paths[-1]!r}, and {_described(_format(path)[0])}, {path!r}."
            )
    for path in paths:
        if not form.exists(path):
            raise ValueError(
                f"Expected the path of a file, or the prefix of a checkpoint. There is none at {path!r}."
            )
    return form


def _format(path: str) -> Tuple[str, Type[Format]]:
    return next((suffix, form) for suffix, form in _BY_SUFFIX if path.endswith(suffix))


def _described(suffix: str) -> str:
    return f"a {suffix!r} file" if suffix else "a `tf.train.Checkpoint`"
