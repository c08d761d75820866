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
"""The state of an optimizer as arrays: `.keras` and `.h5` files, `get_weights` and `set_weights`.

By position: the inner optimizer's variables, the steps taken first; the status of the averages; the
averages; a subclass's own variables. A `.keras` file also says which variable each average belongs to.
What does not fit is refused before anything is changed.
"""

from __future__ import annotations

import collections
import json
import warnings
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import tensorflow as tf

from tf_averaging.core import variables as core_variables
from tf_averaging.core.averages import Averages
from tf_averaging.core.status import NOT_SET
from tf_averaging.core.status import Clock
from tf_averaging.core.status import checked_count
from tf_averaging.core.variables import VariableMap
from tf_averaging.saving import predecessors
from tf_averaging.saving.unclaimed import SavedAverage

if TYPE_CHECKING:
    from tf_averaging.averaged_optimizer_wrapper import AveragedOptimizerWrapper


class Head(NamedTuple):
    """What is saved of the averages as a whole."""

    swapped: bool
    first_step: int
    updates: Optional[int] = None  # Version 0.1 had one count for all averages.


class OptimizerState:
    """All state of an averaging optimizer, to save it and to load it.

    What belongs to the trained variables is in `trained`'s order. Averages of others, whose variables are
    not known when a file is loaded, are `unclaimed` until they are. In `.keras` files tf_keras itself
    loses scale and counter of a LossScaleOptimizer around the optimizer, so these are here too.
    """

    def __init__(self, optimizer: AveragedOptimizerWrapper):
        self.selection = optimizer._updates.selection
        self.averages: Averages = optimizer._averages
        self.averages.order(self.selection.in_order())
        # The last `inner_slots` of them are one for each trained variable, once or several times.
        self.inner, self.inner_slots = optimizer._inner_state()
        self.nested = list(_nested(optimizer))
        self.unclaimed = optimizer._unclaimed
        self.own: List[tf.Variable] = optimizer._own_variables()
        self.trained: List[tf.Variable] = list(self.selection.trained)
        self.start = optimizer._updates.start
        self.loss_scale: List[tf.Variable] = optimizer._loss_scale()
        self.name_of = optimizer._variable_name
        self.schemes = [cls.__name__ for cls in type(optimizer).__mro__]

    # As a list.

    def variables(self) -> List[tf.Variable]:
        """All variables, but not statistics that were recomputed: positions must not depend on them."""
        averages = self.averages
        if averages.status is None:
            return self.inner + self.own
        clocks = averages.status.clock_variables() + self.unclaimed.clocks
        values = _values(averages.averaged()) + self.unclaimed.variables
        return self.inner + self._head() + clocks + values + self.own

    def _head(self) -> List[tf.Variable]:
        status = self.averages.status
        return [] if status is None else [status.swapped, status.first_step]

    def set(self, arrays: Sequence[Any]) -> None:
        """Sets all variables.

        The arrays are as many and shaped as `variables`. They may have averages of variables that are not
        known yet, if variables beside the trained ones are averaged, and lack the clocks, as files of
        version 0.1 do. What does not fit is a ValueError, and nothing is changed then.
        """
        first, last = len(self.inner), len(arrays) - len(self.own)
        rest = list(arrays[first:last])
        averaged = self.averages.averaged()
        if not averaged and (self.selection.trainable_only or not (self.trained and rest)):
            variables = self.variables()
            self._assign(variables, all_checked(arrays, variables))
            return
        head_length = _head_length(rest)
        clocks = [as_number(a) for a in rest[head_length:] if np.asarray(a).dtype.kind in "iu"]
        values = rest[head_length + len(clocks) :]
        if averaged and (len(rest) < head_length or len(values) != len(_values(averaged))):
            raise ValueError(f"Expected {len(self.variables())} arrays. Received: {len(arrays)}")
        head = checked_head(rest[:head_length])
        checked = all_checked([*arrays[:first], *arrays[last:]], self.inner + self.own)
        columns, stashes = _columns(clocks, len(averaged) or None), iter(values[len(averaged) :])
        clock_of = [self._clock(columns, place, head) for place in range(len(values))]
        if averaged:
            saved = [
                checked_average(
                    slots.variable, average, None if slots.stash is None else next(stashes), clock
                )
                for slots, average, clock in zip(averaged, values, clock_of)
            ]
        else:  # The last ones may be stashes.
            saved = [SavedAverage(as_number(v), None, clock) for v, clock in zip(values, clock_of)]
        self._assign(self.inner + self.own, checked)
        self.averages.set_status(*head[:2], like=self.trained[0] if self.trained else None)
        if averaged:
            for slots, one in zip(averaged, saved):
                self.averages.load(slots, one.average, one.stash, one.clock)
        else:
            self.unclaimed.keep(saved)

    def _clock(self, clocks: Optional[np.ndarray], place: int, head: Head) -> Clock:
        """A clock of a file: the default is that of version 0.1, which had one for all variables."""
        if clocks is not None:
            return Clock(*map(int, clocks[:, place])) if place < clocks.shape[1] else Clock()
        start = self.start if head.first_step == NOT_SET else head.first_step
        return Clock(start, head.updates) if head.updates else Clock()

    # As a `.keras` file.

    def save(self, store) -> None:
        """Writes everything to a `.keras` file's store (a mapping from names to arrays)."""
        averaged, unclaimed = self.averages.averaged(), self.unclaimed.saved
        kept: List[Any] = [*averaged, *unclaimed]
        for index, value in enumerate([*self.inner, *self._head(), *_values(kept), *self.own]):
            store[str(index)] = value.numpy() if hasattr(value, "numpy") else value
        places = VariableMap((variable, place) for place, variable in enumerate(self.trained))
        of_known = [places.get(slots.variable, -1) for slots in averaged]
        store["averages_of"] = np.array(of_known + [-1] * len(unclaimed), np.int64)
        store["has_stash"] = np.array([slots.stash is not None for slots in kept])
        store["is_fixed_set"] = np.array(self.selection.is_fixed)
        clocks = [self.averages.status.clock(slots.variable) for slots in averaged]
        clocks += [saved.clock for saved in unclaimed]
        store["clocks"] = np.array(clocks, np.int64).reshape(len(clocks), 2).T
        about = {"scheme": self.schemes[0], "names": list(map(self.name_of, self.trained))}
        store["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        for index, variable in enumerate(self.loss_scale):
            store[f"loss_scale_{index}"] = variable.numpy()

    def load(self, store) -> None:
        """Reads what `save` wrote, or version 0.1, or an optimizer without averages.

        What does not fit is a ValueError, and nothing is changed then.
        """
        arrays = [store[str(index)] for index in range(sum(key.isdigit() for key in _keys(store)))]
        if "averages_of" not in _keys(store):
            self._assign(self.inner, all_checked(arrays, self.inner))
            self.averages.start_over()
            predecessors.warn_of_no_averages("file")
            return
        about = json.loads(np.asarray(store["about"]).tobytes()) if "about" in _keys(store) else {}
        moved = self._moved(list(map(str, about.get("names", []))))
        first, last = len(self.inner), len(arrays) - len(self.own)
        inner = self._with_slots_moved(arrays[:first], moved)
        checked = all_checked([*inner, *arrays[last:]], self.inner + self.own)
        scale = self.loss_scale if "loss_scale_0" in _keys(store) else []
        checked_scale = all_checked([store[f"loss_scale_{i}"] for i in range(len(scale))], scale)
        saved = self._saved_averages(store, arrays[first:last], moved)
        if saved is None:
            self.averages.start_over()
        else:
            self._load_averages(*saved, bool(np.asarray(store["is_fixed_set"])))
        self._assign(self.inner + self.own + scale, checked + checked_scale)
        if about.get("scheme", self.schemes[0]) not in self.schemes:
            predecessors.warn_of_other_scheme(about["scheme"], self.schemes[0])

    def _saved_averages(
        self, store, arrays: Sequence[Any], moved: Sequence[int]
    ) -> Optional[Tuple[Head, List[Tuple[tf.Variable, SavedAverage]], List[SavedAverage]]]:
        """What a file has of the averages: those of trained variables, and others; None for nothing.

        `arrays` are head, averages, stashes, and what was unclaimed when version 0.1 wrote the file.
        """
        indices = as_number(store["averages_of"])
        if indices.dtype.kind != "i" or indices.ndim != 1:
            raise ValueError(f"Expected a vector of indices. Received: {indices!r}")
        places = [moved[place] if 0 <= place < len(moved) else place for place in indices.tolist()]
        has_stash, head_length = np.asarray(store["has_stash"]), _head_length(arrays)
        known = [place for place in places if place >= 0]
        if (
            has_stash.shape != (len(places),)
            or has_stash.dtype != bool
            or len(set(known)) != len(known)
            or any(place >= len(self.trained) for place in known)
            or (len(arrays) < head_length + len(places) + has_stash.sum() if arrays else places)
        ):
            raise ValueError(
                f"Expected averages of {len(self.trained)} trained variables. Received averages of those "
                f"with the indices {places} in {len(arrays)} arrays"
            )
        if not arrays:
            return None
        head, arrays = checked_head(arrays[:head_length]), arrays[head_length:]
        if head.swapped and any(
            self.averages.needs_stash(self.trained[place]) != stashed
            for place, stashed in zip(places, has_stash)
            if place >= 0
        ):
            raise ValueError(
                "The file was saved while averages and weights were exchanged, and with another "
                "`average_dtype`. Expected the same one, or a file saved while they were not."
            )
        clocks = _columns([as_number(store["clocks"])] if "clocks" in _keys(store) else [], len(places))
        averages, rest = arrays[: len(places)], iter(arrays[len(places) :])
        stashes = [next(rest) if stashed else None for stashed in has_stash]
        of_trained, others = [], []
        for index, (place, average, stash) in enumerate(zip(places, averages, stashes)):
            clock = self._clock(clocks, index, head)
            if place >= 0:
                variable = self.trained[place]
                of_trained.append((variable, checked_average(variable, average, stash, clock)))
            else:
                stash = None if stash is None else as_number(stash)
                others.append(SavedAverage(as_number(average), stash, clock))
        # Version 0.1 listed what was unclaimed without its stashes.
        others += [SavedAverage(as_number(array), None, self._clock(None, 0, head)) for array in rest]
        return head, of_trained, others

    def _moved(self, names: List[str]) -> List[int]:
        """For each trained variable of the file its place now: steps may have met them in another order.

        Version 0.1 and a model built anew have other names. The order is what they have in common then.
        """
        now = list(map(self.name_of, self.trained))
        if sorted(names) != sorted(now):
            return list(range(len(now)))
        place_now = {name: place for place, name in enumerate(_numbered(now))}
        return [place_now[name] for name in _numbered(names)]

    def _with_slots_moved(self, arrays: List[Any], moved: Sequence[int]) -> List[Any]:
        """The inner optimizer's arrays, its slots in the order that the trained variables have now."""
        first, number = len(self.inner) - self.inner_slots, len(moved)
        if not self.inner_slots or self.inner_slots % number:
            return arrays
        in_order = list(arrays)
        for place in range(first, len(self.inner)):
            group, index = divmod(place - first, number)
            in_order[first + group * number + moved[index]] = arrays[place]
        return in_order

    def _load_averages(self, head: Head, of_trained, others, is_fixed_set: bool) -> None:
        averages, trained = self.averages, VariableMap((variable, None) for variable in self.trained)
        untrained = [v for v in averages.slots if v not in trained]
        if is_fixed_set:
            averages.keep_only([variable for variable, _ in of_trained] + untrained)
        self.selection.is_fixed = is_fixed_set
        averages.add([variable for variable, _ in of_trained])
        averages.order(self.trained)
        averages.start_over()
        averages.set_status(*head[:2], like=self.trained[0] if self.trained else None)
        for variable, saved in of_trained:
            averages.load(averages.slots[variable], saved.average, saved.stash, saved.clock)
        if others:
            self.unclaimed.keep(others)
            self.unclaimed.give_to([v for v in untrained if averages.slots[v].kind == "average"])

    def _assign(self, variables: Sequence[tf.Variable], arrays: Sequence[np.ndarray]) -> None:
        for variable, array in zip(variables, arrays):
            variable.assign(tf.cast(array, variable.dtype))
        for nested in self.nested:
            nested.set_swapped(bool(nested.is_swapped()))  # The guard is not among them.


def _nested(optimizer: Any) -> Iterator[Averages]:
    """The averages of the averaging optimizers inside this one."""
    while hasattr(optimizer := optimizer._inner_optimizer, "_averages"):
        if optimizer._averages.status is not None:
            yield optimizer._averages


def _values(kept: Sequence[Any]) -> List[Any]:
    """All averages, then all stashes."""
    return [one.average for one in kept] + [one.stash for one in kept if one.stash is not None]


def _keys(store) -> List[str]:
    return list(store.keys())  # Keras 3's stores cannot be iterated over.


def _numbered(names: Sequence[str]):
    """Yields each name with the number of times that it came before."""
    seen: Dict[str, int] = collections.Counter()
    for name in names:
        yield name, seen[name]
        seen[name] += 1


# What an averaging optimizer asks for.


def state_of(optimizer: AveragedOptimizerWrapper) -> OptimizerState:
    """All state of an optimizer as it is now, the averages brought up to date."""
    if optimizer._checkpoint_form is not None:
        optimizer._checkpoint_form.create_as_restored()
    state = OptimizerState(optimizer)
    if tf.executing_eagerly() and not core_variables.in_replica_context():
        state.averages.refresh()
    return state


def save(optimizer: AveragedOptimizerWrapper, store) -> None:
    """Writes the state to a `.keras` file's store (a mapping from names to arrays)."""
    state, averages = state_of(optimizer), optimizer._averages
    if len(averages) > len(averages.averaged()) and not averages.is_swapped():  # Else the file has them.
        warnings.warn(
            "Statistics that were recomputed for the averages (`update_batch_norm`) are kept by "
            "`tf.train.Checkpoint` only. From this file the model gets the raw weights' own; save inside "
            "`with optimizer.swapped_weights():`, or recompute them after loading.",
            stacklevel=3,
        )
    state.save(store)


def load(optimizer: AveragedOptimizerWrapper, store) -> None:
    """Reads the state from a `.keras` file's store; warns of one that does not fit."""
    if not store.keys():
        warnings.warn(f"The file has no state for {optimizer.name!r}. It stays as it is.", stacklevel=3)
        return
    try:
        _check_claims(store)
        OptimizerState(optimizer).load(store)
    except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        warnings.warn(
            f"The state of optimizer {optimizer.name!r} was not loaded, and is left as it is, since the "
            f"one in the file does not fit it: {error}",
            stacklevel=3,
        )


# Checks. All of them raise a ValueError that says what was expected and received.


def _check_claims(store) -> None:
    """Looks at the sizes in the file before anything is read: one of a few KB may claim gigabytes."""

    def check(name: str, item: Any) -> None:
        claimed = getattr(item, "nbytes", 0)  # A group has none.
        if claimed > 2**26 and claimed > 100 * item.id.get_storage_size():
            raise ValueError(f"Expected stored arrays. Received {claimed} bytes that are none: {name!r}")

    file = getattr(store, "h5_file", getattr(store, "file", None))  # Of Keras 3, of tf_keras.
    if file is not None:
        file.visititems(check)


def all_checked(arrays: Sequence[Any], variables: Sequence[tf.Variable]) -> List[np.ndarray]:
    if len(arrays) != len(variables):
        hint = "`build` or a training step creates the variables"
        raise ValueError(f"Expected {len(variables)} arrays ({hint}). Received: {len(arrays)}")
    return [_checked(array, variable) for array, variable in zip(arrays, variables)]


def _checked(array: Any, variable: tf.Variable, role: str = "") -> np.ndarray:
    if variable.dtype == tf.bool:
        return np.array(_checked_flag(array))
    array = array if hasattr(array, "shape") else as_number(array)
    of = f"for {role}{variable.name!r}. Received:"
    if not variable.shape.is_compatible_with(array.shape):  # Not read yet: files may claim anything.
        raise ValueError(f"Expected shape {variable.shape} {of} {array.shape}")
    array = as_number(array)
    kinds = "iu" if variable.dtype.is_integer else "fciu" if variable.dtype.is_complex else "fiu"
    if array.dtype.kind not in kinds and array.dtype != tf.bfloat16.as_numpy_dtype:
        raise ValueError(f"Expected {variable.dtype.name} {of} {array.dtype}")
    if variable.dtype.is_integer and np.any(array > variable.dtype.max):
        raise ValueError(f"Expected numbers up to {variable.dtype.max} {of} {array!r}")
    return array


def checked_average(
    variable: tf.Variable, average: Any, stash: Optional[Any], clock: Clock
) -> SavedAverage:
    """What a file has for one variable."""
    checked = _checked(average, variable, "the average of ")
    return SavedAverage(checked, None if stash is None else _checked(stash, variable), clock)


def _as_array(array: Any, expected: str) -> np.ndarray:
    try:
        return np.asarray(array)
    except (TypeError, OSError, RuntimeError) as error:
        raise ValueError(f"Expected {expected}. Received: {array!r}") from error


def as_number(array: Any) -> np.ndarray:
    """A NumPy array of numbers."""
    array = _as_array(array, "an array of numbers")
    bfloat16 = tf.bfloat16.as_numpy_dtype
    if array.dtype == np.dtype("V2"):
        array = array.view(bfloat16)  # HDF5 has no name for it.
    is_number = array.dtype.kind in "iufc" and array.dtype.itemsize <= np.dtype(np.complex128).itemsize
    if array.dtype == np.longdouble or not (is_number or array.dtype == bfloat16):
        raise ValueError(f"Expected an array of numbers. Received one of dtype {array.dtype}")
    return array


def _columns(arrays: Sequence[np.ndarray], number: Optional[int]) -> Optional[np.ndarray]:
    """The clocks of this many averages, int64 of shape [2, number]; None where there are none."""
    if not arrays:
        return None
    if any(array.dtype.kind not in "iu" or array.ndim != 2 or len(array) != 2 for array in arrays):
        raise ValueError(f"Expected integers of shape [2, {number}] for the clocks. Received: {arrays!r}")
    clocks = np.concatenate(arrays, axis=1)
    fits = number in (None, clocks.shape[1])
    if not fits or np.any(clocks < NOT_SET) or np.any(clocks > np.iinfo(np.int64).max):
        raise ValueError(f"Expected the clocks of {number} averages. Received: {clocks!r}")
    return clocks


def _head_length(arrays: Sequence[Any]) -> int:
    """How many of these arrays are of the averages as a whole: version 0.1 had its count before them."""
    return 2 if len(arrays) and np.asarray(arrays[0]).dtype == bool else 3


def checked_head(arrays: Sequence[Any]) -> Head:
    """Flag and first step; in files of version 0.1 the count before them."""
    if len(arrays) < 2:
        raise ValueError(f"Expected the averages' flag and first step. Received: {arrays!r}")
    *count, flag, first_step = arrays
    try:
        updates = checked_count("count", as_number(count[0]).item(), minimum=0) if count else None
        first = checked_count("first step", as_number(first_step).item(), minimum=NOT_SET)
    except TypeError as error:
        raise ValueError(f"Expected integers of 64 bits. Received: {arrays!r}") from error
    return Head(_checked_flag(flag), first, updates)


def _checked_flag(array: Any) -> bool:
    """Version 0.1 wrote a vector, of length 1 while swapped and 0 otherwise."""
    flag = _as_array(array, "a bool")
    if flag.dtype != bool or flag.size > 1 or flag.ndim > 1:
        raise ValueError(f"Expected a bool array of no more than one element. Received: {flag!r}")
    return bool(np.any(flag))
