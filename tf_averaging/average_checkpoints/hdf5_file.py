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
"""Files of HDF5: `.weights.h5`, and whole models as `.h5`."""

from __future__ import annotations

import os
import shutil
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple

import h5py
import numpy as np

from tf_averaging.average_checkpoints.variables import BFLOAT16
from tf_averaging.average_checkpoints.variables import OPAQUE
from tf_averaging.average_checkpoints.variables import Variable
from tf_averaging.average_checkpoints.variables import with_bfloat16


class Hdf5File:
    """The weights in a file of HDF5.

    Args:
      path: of the file.
      content: what to read instead, as a binary file: the weights in a `.keras` archive.

    Attributes:
      path: of the file.
      variables: what the file says of each variable of the model.
      holds_averages: whether an averaging optimizer had swapped the averages into the model.
    """

    def __init__(self, path: str, content: Optional[Any] = None):
        self.path = path
        self._file = h5py.File(content or path, "r")
        datasets, optimizers, state = _content(self._file)
        self.variables: Dict[str, Variable] = {
            name: Variable(BFLOAT16 if dataset.dtype == OPAQUE else dataset.dtype, dataset.shape)
            for name, dataset in datasets.items()
            if dataset.shape is not None and not name.startswith((*optimizers, *state))
        }
        self.holds_averages = any(
            bool(np.any(dataset[()]))
            for name, dataset in datasets.items()
            if name.startswith(optimizers) and _is_swapped_flag(name, dataset)
        )

    @staticmethod
    def exists(path: str) -> bool:
        """Whether there is such a file."""
        return os.path.exists(path)

    def check(self) -> None:
        """Nothing: HDF5 has looked at the length of the file, and has no checksums."""

    def read(self, name: str) -> np.ndarray:
        """The value of a variable."""
        return with_bfloat16(np.asarray(self._file[name][()]))

    def write(self, path: str, values: Iterable[Tuple[str, np.ndarray]]) -> None:
        """Writes a copy of the file, with other values for some variables."""
        shutil.copyfile(self.path, path)
        assign(path, values)

    @staticmethod
    def move(source: str, target: str) -> None:
        """Moves a complete file to where it belongs, at once."""
        os.replace(source, target)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def assign(path: str, values: Iterable[Tuple[str, np.ndarray]]) -> None:
    """Sets variables in a file, which keeps everything else as it is."""
    with h5py.File(path, "r+") as file:
        for name, value in values:
            try:
                dataset = file[name]
            except KeyError as error:
                raise ValueError(f"Cannot find {name!r} again in a copy of the last file.") from error
            dataset[...] = value.view(OPAQUE) if value.dtype == BFLOAT16 else value
            del value  # The next one is computed before this name is free.


def _content(file: h5py.File) -> Tuple[Dict[str, h5py.Dataset], Tuple[str, ...], Tuple[str, ...]]:
    """All datasets by name; what the names of optimizers' begin with, and those of other state."""
    datasets: Dict[str, h5py.Dataset] = {}
    groups: Dict[str, h5py.Group] = {}

    def visit(name: str, item: Any) -> None:
        (datasets if isinstance(item, h5py.Dataset) else groups)[name] = item

    file.visititems(visit)
    if _lists_layers(file):  # The weights of a model, and nothing else.
        return datasets, (), ()
    if "model_weights" in groups and _lists_layers(groups["model_weights"]):
        return datasets, ("optimizer_weights/",), ()
    others = [f"{name}/" for name in groups if _is_optimizer(name, groups)]
    return datasets, ("optimizer/", *others), ("metrics/",)


def _lists_layers(group: h5py.Group) -> bool:
    """Whether it has the weights of the layers that it lists, under names that a user may choose."""
    return any(attribute.startswith("layer_names") for attribute in group.attrs)


def _is_optimizer(name: str, groups: Dict[str, h5py.Group]) -> bool:
    """Whether a group is an optimizer other than the model's own, of a GAN for example.

    Its first variable counts steps, and so does that of each of its parts: other optimizers. The second
    one, in Keras 3, is the learning rate, unless that follows a schedule.
    """
    kinds = _kinds_of_first_two(groups.get(f"{name}/vars", {}))
    if kinds != ["i", "f"] and "optimizer" not in name.rpartition("/")[2].lower():
        return False
    # Whoever has no variables does not count.
    parts = [part for part in groups if part.startswith(f"{name}/") and part.endswith("/vars")]
    return kinds[:1] == ["i"] and all(
        _kinds_of_first_two(groups[part])[:1] == ["i"] for part in parts if len(groups[part])
    )


def _kinds_of_first_two(variables: Mapping[str, Any]) -> List[str]:
    """The kinds of the first two variables of an object, as far as they are scalars."""
    return [
        variables[key].dtype.kind
        for key in ("0", "1")
        if isinstance(variables.get(key), h5py.Dataset) and variables[key].shape == ()
    ]


def _is_swapped_flag(name: str, dataset: h5py.Dataset) -> bool:
    """Whether this is the flag of an averaging optimizer: by its name, or its place among numbers."""
    if dataset.dtype != bool:
        return False
    name = name.rpartition("/")[2]
    return name.partition(":")[0].endswith("swapped") or (
        name.isdigit() and "averages_of" in dataset.parent
    )
