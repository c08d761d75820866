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
"""The mean of the weights in saved files."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from typing import Any, Iterable, Iterator, List, Optional, Sequence, Tuple, Type, Union

import numpy as np
import tensorflow as tf

from tf_averaging import kerases
from tf_averaging.average_checkpoints import whole_files
from tf_averaging.average_checkpoints.formats import Format
from tf_averaging.average_checkpoints.formats import format_of


def average_checkpoints(
    paths: Iterable[Union[str, os.PathLike]],
    output: Union[str, os.PathLike],
    weights: Optional[Sequence[float]] = None,
    overwrite: bool = False,
    verbose: Union[str, int] = "auto",
) -> None:
    """Writes a file that holds the mean of the weights in other files.

    The files are of one training run, or of several that started from the same weights: `.keras`,
    `.weights.h5` or `.h5` files of Keras 3 or tf_keras, or checkpoints of `tf.train.Checkpoint`. The
    output is of the same format, and loads as they do.

    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> model = tf.keras.Sequential([tf.keras.Input([1]), tf.keras.layers.Dense(1, use_bias=False)])
    >>> paths = [f"{directory}/{epoch}.weights.h5" for epoch in range(3)]
    >>> for path, value in zip(paths, [1.0, 2.0, 6.0]):
    ...     model.set_weights([tf.fill([1, 1], value)])
    ...     model.save_weights(path)
    >>> tfav.average_checkpoints(paths, f"{directory}/mean.weights.h5", verbose=0)
    >>> model.load_weights(f"{directory}/mean.weights.h5")
    >>> print(model.get_weights()[0])
    [[3.]]

    Floating-point and complex variables of the model are averaged, statistics of BatchNormalization
    included. The mean is computed in float64. Everything else comes from the last file: integers,
    strings, the state of optimizers and metrics, the config.

    One variable is in memory at a time, so a few times the size of the largest one is enough, whatever
    the size and number of the files. The output is written beside its place and moved there once it is
    complete. Whatever interrupts this leaves no part of an output.

    Args:
      paths: the files, oldest first. For a checkpoint its prefix, as `save` returns it; or its `.index`
        file.
      output: the file to write, with the suffix of the others; or a prefix, for a checkpoint. Missing
        directories are created.
      weights: how much each file counts: numbers that are not negative, relative to their sum. None for
        the plain mean.
      overwrite: whether to replace an output that exists.
      verbose: `"auto"`, 0, 1 or 2, for the Keras progress bar.

    Raises:
      TypeError: if `paths` is not a list of paths, or `weights` not a list of numbers.
      ValueError: if there are no files, they are of different formats, have different variables, or one
        of them is broken; if `weights` do not fit; or if the output exists, or its directory can neither
        be found nor created. Nothing is written then.
      RuntimeError: in a `tf.function`.
    """
    if not tf.executing_eagerly():
        raise RuntimeError("`average_checkpoints` cannot be called in a `tf.function`.")
    paths, output = _checked_paths(paths), _without_index(os.fsdecode(output))
    weights = _checked_weights(weights, len(paths))
    form = format_of(paths, output)
    _check_free(form, output, overwrite)
    with contextlib.ExitStack() as opened:
        files = [opened.enter_context(_opened(form, path)) for path in paths]
        last = files[-1]
        for file in files:
            _check_like(file, last)
        for file in files:
            with whole_files.reading(file.path):
                file.check()
        _warn_of_averages(files)
        with whole_files.directory_beside(output) as directory:
            complete = os.path.join(directory, os.path.basename(output))
            last.write(complete, _means(files, weights, verbose))
            form.move(complete, output)


def _means(
    files: Sequence[Format], weights: Sequence[float], verbose: Union[str, int]
) -> Iterator[Tuple[str, np.ndarray]]:
    """The names of variables with their means, one after the other, while a progress bar fills."""
    names = [name for name, variable in files[-1].variables.items() if variable.is_averaged]
    verbose = 1 if verbose == "auto" else verbose
    progress = kerases.available()[0].utils.Progbar(len(names), verbose=verbose, unit_name="variable")
    for name in names:
        yield name, _mean(files, weights, name)
        progress.add(1)


def _mean(files: Sequence[Format], weights: Sequence[float], name: str) -> np.ndarray:
    dtype, shape = files[-1].variables[name]
    wide = np.dtype(np.complex128 if dtype.kind == "c" else np.float64)
    total: Any = 0.0
    with np.errstate(over="ignore", invalid="ignore"):  # Infinities have a mean too.
        for file, weight in zip(files, weights):
            if not weight:
                continue
            with whole_files.reading(file.path):
                # Real and imaginary parts: a number times a complex infinity would be NaN.
                value = file.read(name).astype(wide).reshape([-1]).view(np.float64)
            value *= weight
            total = np.add(total, value, out=value)
        # Divided in the end: the plain mean of equal values is then exactly this value.
        total /= sum(weights)
        return total.view(wide).reshape(shape).astype(dtype)


# Checks.


def _checked_paths(paths: Iterable[Union[str, os.PathLike]]) -> List[str]:
    expected = "Expected a list of paths."
    if isinstance(paths, (str, bytes, os.PathLike)):
        raise TypeError(f"{expected} Received: {paths!r}")
    try:
        checked = [os.fsdecode(path) for path in paths]
    except TypeError as error:
        raise TypeError(f"{expected} Received: {paths!r}") from error
    if not checked:
        raise ValueError(f"{expected} Received none.")
    return list(map(_without_index, checked))


def _without_index(path: str) -> str:
    return path[: -len(".index")] if path.endswith(".index") else path


def _checked_weights(weights: Optional[Sequence[float]], number: int) -> List[float]:
    if weights is None:
        return [1.0] * number
    try:
        checked = [float(weight) for weight in weights]
    except (TypeError, ValueError) as error:
        raise TypeError(f"Expected numbers as `weights`. Received: {weights!r}") from error
    if len(checked) != number:
        raise ValueError(f"Expected {number} `weights`, one for each file. Received: {weights!r}")
    if not (all(0 <= weight < np.inf for weight in checked) and any(checked)):
        raise ValueError(
            f"Expected finite `weights` that are not negative, and not all zero. Received: {weights!r}"
        )
    # The largest is made 1 or a little more. By a power of two, which rounds nothing: products with very
    # small numbers would lose digits.
    _, exponent = math.frexp(max(checked))
    return [math.ldexp(weight, 1 - exponent) for weight in checked]


def _check_free(form: Type[Format], output: str, overwrite: bool) -> None:
    if not os.path.basename(output):
        raise ValueError(f"Expected the path of a file as `output`. Received: {output!r}")
    if not overwrite and form.exists(output):
        raise ValueError(f"The output exists: {output!r}. Pass `overwrite=True` to replace it.")


def _check_like(file: Format, last: Format) -> None:
    """Refuses a file whose variables are not those of the last one."""
    for name in {**last.variables, **file.variables}:
        found, expected = file.variables.get(name), last.variables.get(name)
        if found != expected:
            raise ValueError(
                f"Expected files with the same variables. {name!r} is {found or 'missing'} in "
                f"{file.path!r} and {expected or 'missing'} in {last.path!r}."
            )
    if not any(variable.is_averaged for variable in last.variables.values()):
        raise ValueError(f"Expected files with weights. There are none in {last.path!r}.")


def _warn_of_averages(files: Sequence[Format]) -> None:
    swapped = [file.path for file in files if file.holds_averages]
    if not swapped:
        return
    message = (
        "These files were written while the averages were in the model, so the mean is taken of "
        f"averages, not of weights: {swapped}."
    )
    if files[-1].holds_averages:
        message += (
            " The last file is one of them, so a model that loads the output has `weights_swapped`, and "
            "swapping gives it the raw weights of that file."
        )
    warnings.warn(message, stacklevel=3)


@contextlib.contextmanager
def _opened(form: Type[Format], path: str) -> Iterator[Format]:
    with whole_files.reading(path):
        file = form(path)
    with contextlib.closing(file):
        yield file
