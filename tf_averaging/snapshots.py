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
"""Files that hold the averages of one moment of a training: `.npz` archives, read one array at a time."""

from __future__ import annotations

import json
import os
import re
import zipfile
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import tensorflow as tf

from tf_averaging.average_checkpoints import whole_files
from tf_averaging.average_checkpoints.variables import with_bfloat16
from tf_averaging.averaged_model import variables_of
from tf_averaging.core import variables as core_variables

_NAME = re.compile(r"snapshot_(\d+)\.npz")


class Saved(NamedTuple):
    """What a snapshot says of one variable.

    Attributes:
      name: its path in Keras 3, otherwise its name; no two are the same.
      place: its place among all variables of the model, or in the list.
      dtype: of its averages.
      shape: its shape.
    """

    name: str
    place: int
    dtype: str
    shape: Tuple[int, ...]


class Snapshot:
    """A snapshot to read.

    Args:
      path: the file.

    Attributes:
      step: how many updates the averages held.
      gammas: the exponents of the averages.
      number: how many variables the model, or the list, had.
      saved: the variables that have averages.
      updates: how many updates each average of each of these held.
    """

    def __init__(self, path: str):
        self.path = path
        with whole_files.reading(path):
            self._arrays = np.load(path, allow_pickle=False)
            about = json.loads(self._arrays["about"].tobytes())
            self.step: int = about["step"]
            self.gammas: List[float] = about["gammas"]
            self.number: int = about["number"]
            self.saved = [
                Saved(name, place, dtype, tuple(shape)) for name, place, dtype, shape in about["saved"]
            ]
            self.updates: List[List[int]] = about["updates"]

    def read(self, index: int, which: int) -> np.ndarray:
        """One of the averages of one variable, by its place in `saved`."""
        with whole_files.reading(self.path):
            array = with_bfloat16(self._arrays[f"{index}_{which}"])
            if array.shape != self.saved[index].shape:
                raise ValueError(f"{self.saved[index]} has the shape {array.shape}.")
            return array

    def check(self) -> None:
        """Reads all of it once; a ValueError if anything is broken."""
        with whole_files.reading(self.path):
            for index in range(len(self.saved)):
                for which in range(len(self.gammas)):
                    self.read(index, which)

    def close(self) -> None:
        self._arrays.close()


def paths_in(directory: str) -> List[Tuple[int, str]]:
    """The snapshots of a directory with their steps, in order."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    found = filter(None, map(_NAME.fullmatch, names))
    return sorted((int(match[1]), os.path.join(directory, match[0])) for match in found)


def write(optimizer: Any, directory: str, model_or_variables: Any, overwrite: bool) -> str:
    """Writes the averages of an optimizer; see `PostHocEMA.save_snapshot`."""
    if not tf.executing_eagerly():
        raise RuntimeError("`save_snapshot` cannot be called in a graph. Call it between the steps.")
    variables = _variables_of(optimizer, model_or_variables)
    has_average = [_has_average(optimizer, variable) for variable in variables]
    chosen = [(place, v) for place, v in enumerate(variables) if has_average[place]]
    if not chosen:
        raise ValueError(
            "Expected a model or a list of variables that the optimizer averages. Received one in which "
            f"none has an average: {model_or_variables!r}"
        )
    step = int(optimizer.num_averaged)
    if not step:
        raise ValueError("The averages hold no updates yet. Expected a snapshot after the first update.")
    path = os.path.join(directory, f"snapshot_{step:012}.npz")
    writes = _is_chief(optimizer, chosen[0][1])
    if writes and not overwrite and os.path.exists(path):
        raise ValueError(
            f"There is a snapshot of {step} updates already: {path!r}. Expected another directory for "
            "another training, or `overwrite=True`."
        )
    everyone, slots = optimizer._everyone(), optimizer._averages.slots
    arrays = (
        (f"{index}_{which}", optimizer.get_average(variable, which).numpy())
        for index, (_, variable) in enumerate(chosen)
        for which in range(len(everyone))
    )
    dtypes = [slots[_parts(optimizer, variable)[0]].average.dtype.name for _, variable in chosen]
    names = _distinct([getattr(variable, "path", variable.name) for _, variable in chosen])
    about = {
        "step": step,
        "gammas": [one._gamma for one in everyone],
        "number": len(variables),
        "saved": [
            Saved(name, place, dtype, tuple(variable.shape))
            for name, (place, variable), dtype in zip(names, chosen, dtypes)
        ],
        "updates": [[_updates(one, variable) for one in everyone] for _, variable in chosen],
    }
    if not writes:
        for _ in arrays:  # Reading may take all workers.
            pass
        return path
    os.makedirs(directory, exist_ok=True)
    with whole_files.directory_beside(path) as beside:
        complete = os.path.join(beside, "complete.npz")
        with zipfile.ZipFile(complete, "w") as archive:
            _write_array(archive, "about", np.frombuffer(json.dumps(about).encode(), np.uint8))
            for name, array in arrays:
                _write_array(archive, name, array)
        os.replace(complete, path)
    return path


def _write_array(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)


def _variables_of(optimizer: Any, model_or_variables: Any) -> List[Any]:
    """All variables of a model, each of which may lack an average; or those of a list, which may not."""
    if optimizer._is_model(model_or_variables):
        is_flat = hasattr(model_or_variables, "_flatten_layers")
        return variables_of(model_or_variables) if is_flat else list(model_or_variables.variables)
    optimizer._checked_variables(model_or_variables, "Expected a model or a list of variables.")
    variables = list(model_or_variables)
    for variable in variables:
        if not _has_average(optimizer, variable):
            raise KeyError(f"Variable {variable.name!r} has no average.")
    return variables


def _parts(optimizer: Any, variable: Any) -> List[tf.Variable]:
    return core_variables.averageable(optimizer._tf_variables([variable]))


def _has_average(optimizer: Any, variable: Any) -> bool:
    parts = _parts(optimizer, variable)
    slots = optimizer._averages.slots
    return bool(parts) and all(part in slots and slots[part].kind == "average" for part in parts)


def _updates(optimizer: Any, variable: Any) -> int:
    return optimizer._averages.status.clock(_parts(optimizer, variable)[0]).updates


def _is_chief(optimizer: Any, variable: Any) -> bool:
    strategy: Optional[tf.distribute.Strategy] = core_variables.strategy_of(
        optimizer._tf_variables([variable])[0]
    )
    return strategy is None or strategy.extended.should_checkpoint


def _distinct(names: Sequence[str]) -> List[str]:
    """The names, with a number behind those that came before."""
    distinct: List[str] = []
    for name in names:
        number, new = 0, name
        while new in distinct:
            number += 1
            new = f"{name}_{number}"
        distinct.append(new)
    return distinct
