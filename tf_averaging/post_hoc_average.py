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
"""The average of any relative width, from snapshots of the averages of a few."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import tensorflow as tf

from tf_averaging import kerases
from tf_averaging import snapshots
from tf_averaging.averaged_model import variables_of
from tf_averaging.core import variables as core_variables
from tf_averaging.core.status import checked_count
from tf_averaging.post_hoc_ema import gamma_of

# The number of updates that an average holds, and its exponent.
Profile = Tuple[int, float]


def post_hoc_average(
    directory: Union[str, os.PathLike],
    relative_width: float,
    step: Optional[int] = None,
    target: Any = None,
) -> Optional[Dict[str, np.ndarray]]:
    """The average of the weights that `PostHocEMA` would have kept with another relative width.

    It is the combination of the snapshots that comes closest, by least squares, in how much it counts the
    weights of each update (arXiv:2312.02696, section 3), among those whose coefficients add up to 1. With
    the widths 0.05 and 0.10 and a few dozen snapshots it is all but exact from 0.03 to 0.20. A width that
    is narrower than the distance of two snapshots, or nearly that of the plain mean (0.2886), needs more
    snapshots.

    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> model = tf.keras.Sequential([tf.keras.Input([2]), tf.keras.layers.Dense(1)])
    >>> model.compile(tfav.PostHocEMA(tf.keras.optimizers.SGD(0.01)), "mse")
    >>> x, y = tf.ones([64, 2]), tf.ones([64, 1])
    >>> save = tfav.callbacks.SaveAverages(directory)
    >>> _ = model.fit(x, y, epochs=20, callbacks=[save], verbose=0)
    >>> averaged = tf.keras.models.clone_model(model)
    >>> tfav.post_hoc_average(directory, relative_width=0.15, target=averaged)
    >>> averages = tfav.post_hoc_average(directory, relative_width=0.15)
    >>> [average.shape for average in averages.values()]
    [(2, 1), (1,)]

    One variable is in memory at a time if there is a `target`, whatever the size and number of snapshots.

    Args:
      directory: where the snapshots of one training are.
      relative_width: of the average: float above 0 and up to 0.2886.
      step: int, a number of updates: the average is the one at the last snapshot that has no more, and
        later ones are not used. None for the last one of all.
      target: a model, or a list of variables, to set to the averages; best another one than is trained,
        whose weights would be overwritten. Variables that have no average are left alone. A list has a
        variable for each average, or for each variable that the snapshots were made of.

    Returns:
      With a `target` None. Otherwise a dict with an array for each average, in the order of the model's
      variables or the list that the snapshots were made of; the keys are their paths in Keras 3, or their
      names in tf_keras and TensorFlow.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if `relative_width` is out of range, there is no snapshot (up to `step`), one is broken
        or of another model, or `target` does not fit. Nothing is changed then.
      RuntimeError: in a `tf.function`.
    """
    if not tf.executing_eagerly():
        raise RuntimeError("`post_hoc_average` cannot be called in a `tf.function`.")
    gamma = gamma_of(relative_width)
    paths = _paths(os.fspath(directory), step)
    with contextlib.ExitStack() as opened:
        files = [opened.enter_context(contextlib.closing(snapshots.Snapshot(path))) for path in paths]
        for file in files:
            _check_like(file, files[-1])
        if target is None:
            return {saved.name: average for saved, average in _averages(files, gamma)}
        variables = _checked_target(target, files[-1])
        for file in files:
            file.check()
        for variable, (_, average) in zip(variables, _averages(files, gamma)):
            core_variables.assign_everywhere(variable, tf.constant(average))
    return None


def _averages(
    files: Sequence[snapshots.Snapshot], gamma: float
) -> Iterator[Tuple[snapshots.Saved, np.ndarray]]:
    """The average of each variable, one after the other."""
    for index, saved in enumerate(files[-1].saved):
        terms, profiles = [], []
        for file in files:
            for which, updates in enumerate(file.updates[index]):
                if updates:  # Before its first update an average says nothing of the past.
                    terms.append((file, which))
                    profiles.append((updates, file.gammas[which]))
        last = files[-1].updates[index][0]
        if not last:
            yield saved, files[-1].read(index, 0)
            continue
        total = np.zeros(saved.shape, np.complex128 if "complex" in saved.dtype else np.float64)
        for (file, which), coefficient in zip(terms, coefficients(tuple(profiles), (last, gamma))):
            total += coefficient * file.read(index, which)
        yield saved, total.astype(saved.dtype)


@functools.lru_cache(maxsize=8)
def coefficients(profiles: Tuple[Profile, ...], wanted: Profile) -> np.ndarray:
    """How much each average counts in the combination that is nearest to the wanted one.

    Args:
      profiles: of the averages.
      wanted: the profile of the combination.

    Returns:
      Float64 vector, one number for each of `profiles`, with sum 1.
    """
    updates, gammas = np.array(profiles, np.float64).T
    products = inner_products(updates[:, None], gammas[:, None], updates, gammas)
    with_wanted = inner_products(updates, gammas, *map(np.float64, wanted))
    # Of profiles scaled to length 1, with a Lagrange multiplier for the sum. Equal snapshots share.
    length = np.sqrt(np.diag(products))
    sums = length.min() / length
    system = np.block([[products / np.outer(length, length), sums[:, None]], [sums, np.zeros(1)]])
    solution = np.linalg.lstsq(system, np.append(with_wanted / length, length.min()), rcond=None)[0]
    return solution[:-1] / length


def inner_products(updates_a: Any, gamma_a: Any, updates_b: Any, gamma_b: Any) -> np.ndarray:
    """The inner products of profiles `(gamma + 1) / updates * (k / updates) ** gamma`, 0 < k < updates.

    Args:
      updates_a: how many updates the first one holds.
      gamma_a: its exponent.
      updates_b: the same of the second one.
      gamma_b: its exponent; all four are arrays that broadcast.

    Returns:
      The integral of the product from 0 to the smaller number of updates.
    """
    first_is_shorter = updates_a <= updates_b
    longer = np.where(first_is_shorter, updates_b, updates_a)
    ratio = np.where(first_is_shorter, updates_a, updates_b) / longer
    gamma_of_longer = np.where(first_is_shorter, gamma_b, gamma_a)
    factors = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return factors * ratio**gamma_of_longer / longer


# Checks.


def _paths(directory: str, step: Optional[int]) -> List[str]:
    found = snapshots.paths_in(directory)
    if not found:
        raise ValueError(
            "Expected a directory with snapshots, which `PostHocEMA.save_snapshot` or "
            f"`callbacks.SaveAverages` writes. There are none in {directory!r}."
        )
    if step is None:
        return [path for _, path in found]
    step = checked_count("step", step, minimum=0)
    if step < found[0][0]:
        raise ValueError(
            f"Expected `step` >= {found[0][0]}, the number of updates of the first snapshot. Received: "
            f"step={step}"
        )
    return [path for updates, path in found if updates <= step]


def _check_like(file: snapshots.Snapshot, last: snapshots.Snapshot) -> None:
    expected_all = "Expected snapshots of one model, with the same variables in the same order."
    for found, expected in itertools.zip_longest(file.saved, last.saved):
        if found is None or expected is None or _kind(found) != _kind(expected):
            raise ValueError(
                f"{expected_all} Received {found or 'fewer averages'} in {file.path!r} and "
                f"{expected or 'fewer averages'} in {last.path!r}. Once layers were added, frozen or "
                "unfrozen, use another directory. Layers without a name of their own are named anew when "
                "a model is built once more in a process: name them, or call "
                "`tf.keras.backend.clear_session()` before."
            )
    if file.number != last.number:
        raise ValueError(
            f"{expected_all} Received {file.number} variables in {file.path!r} and {last.number} in "
            f"{last.path!r}. Once layers were added, use another directory."
        )


def _kind(saved: snapshots.Saved) -> Tuple[Any, ...]:
    """What must agree: of the name the last two parts, as others may differ after `load_model`."""
    return saved._replace(name="/".join(saved.name.split("/")[-2:]))


def _checked_target(target: Any, last: snapshots.Snapshot) -> List[tf.Variable]:
    """The variables of `target` to set, in the order of the averages."""
    if hasattr(target, "_flatten_layers"):
        variables = variables_of(target)
    else:
        if isinstance(target, tf.Module):
            target = target.variables
        expected = "Expected a model or a list of variables as `target`."
        variables = kerases.as_list(target, expected)
        if not all(hasattr(variable, "assign") for variable in variables):
            raise TypeError(f"{expected} Received: {target!r}")
    if len(variables) == last.number:
        variables = [variables[saved.place] for saved in last.saved]
    if len(variables) != len(last.saved):
        raise ValueError(
            f"Expected a `target` of {last.number} variables, as the snapshots were made of, or of "
            f"{len(last.saved)}, one for each average. Received: {len(variables)}"
        )
    variables = list(map(kerases.tf_variable, variables))
    for variable, saved in zip(variables, last.saved):
        if not core_variables.averageable([variable]):
            raise TypeError(
                "Expected a `target` of floating-point or complex variables where there are averages. "
                f"Received: {variable!r} for {saved}"
            )
        if tuple(variable.shape) != saved.shape:
            raise ValueError(
                f"Expected a `target` with variables like those of the snapshots. Received "
                f"{variable.name!r} of shape {tuple(variable.shape)} for {saved}"
            )
    return variables
