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
"""Weights and averages change places, bit for bit."""

from __future__ import annotations

import contextlib
import threading
import warnings
import zlib
from typing import TYPE_CHECKING, Callable, Iterable, List, Tuple

import tensorflow as tf

from tf_averaging.core import fold
from tf_averaging.core.status import NOT_SET
from tf_averaging.core.variables import Component
from tf_averaging.core.variables import after
from tf_averaging.core.variables import all_components
from tf_averaging.core.variables import assign
from tf_averaging.core.variables import components
from tf_averaging.core.variables import copy
from tf_averaging.core.variables import is_distributed
from tf_averaging.core.variables import read

if TYPE_CHECKING:
    from tf_averaging.core.averages import Averages


def exchange(pairs: Iterable[Tuple[Component, Component]]) -> None:
    """Exchanges the two values of each pair, which have one dtype. Buffers change hands, bit for bit."""
    for first, second in pairs:
        first_value, second_value = read(first), read(second)
        with after(first_value, second_value):
            assign(first, second_value)
            assign(second, first_value)


def exchange_all(averages: Averages) -> None:
    """Exchanges all weights and averages, and says so in the flag."""
    # Compiled code would copy, and could not change the length of the flag.
    with uncompiled():
        swapped = averages.is_swapped()
        exchange(
            pair
            for slots in averages.slots.values()
            if slots.stash is None
            for pair in zip(components(slots.variable), components(slots.average))
        )
        stashed = [
            triple
            for slots in averages.slots.values()
            if slots.stash is not None
            for triple in zip(*map(components, (slots.variable, slots.average, slots.stash)))
        ]
        if stashed:
            tf.cond(
                swapped,
                lambda: _done(lambda: leave_stash(stashed)),
                lambda: _done(lambda: enter_stash(stashed)),
            )
        for slots in averages.slots.values():
            share(slots.variable, slots.average)
        averages.status.set_swapped(tf.logical_not(swapped))


def share(variable: tf.Variable, average: tf.Variable) -> None:
    """Gives all replicas the first one's value, where they have one average between them."""
    if is_distributed(variable) and not is_distributed(average):
        first, *others = components(variable)
        copy((other, first) for other in others)


# Where the average's dtype is not the variable's, neither can pass through the other without losing bits:
# the weights go to a stash while the model holds the averages.


def enter_stash(triples: Iterable[Tuple[Component, Component, Component]]) -> None:
    """Puts the averages, cast, into the variables, and the weights into the stash."""
    for variable, average, stash in triples:
        weights = read(variable)
        shown = tf.cast(read(average), variable.dtype)
        with after(weights, shown):
            assign(variable, shown)
            assign(stash, weights)


def leave_stash(triples: Iterable[Tuple[Component, Component, Component]]) -> None:
    """Brings the weights back, and into the averages whatever was changed in the variables meanwhile.

    A value that was not touched keeps its average at the average's own precision.
    """
    for variable, average, stash in triples:
        shown, weights, exact = map(read, (variable, stash, average))
        untouched = tf.equal(_bits(shown), _bits(tf.cast(exact, shown.dtype)))
        kept = tf.where(untouched, exact, tf.cast(shown, exact.dtype))
        with after(kept, weights, shown):
            assign(average, kept)
            assign(variable, weights)
            assign(stash, shown)


def _done(work: Callable[[], object]) -> tf.Tensor:
    work()
    return tf.constant(True)


def _bits(value: tf.Tensor) -> tf.Tensor:
    return tf.bitcast(value, {1: tf.uint8, 2: tf.uint16, 4: tf.uint32, 8: tf.uint64}[value.dtype.size])


def checksum(variables: Iterable[tf.Variable]) -> int:
    """A checksum of the values of these variables (eager mode)."""
    result = 0
    for variable in variables:
        value = read(all_components(variable)[0])
        result = zlib.crc32(value.numpy().tobytes(), result)
    return result


def uncompiled():
    """Keeps TensorFlow, where it compiles parts of graphs by itself, from compiling this one.

    Raises:
      RuntimeError: where XLA compiles the whole graph.
    """
    if tf.executing_eagerly():
        return contextlib.nullcontext()
    if fold.is_compiled_whole():
        raise RuntimeError("XLA cannot compile `swap_weights`. Call it outside of compiled functions.")
    return tf.xla.experimental.jit_scope(compile_ops=False)


def warn_of_strangers(averages: Averages) -> None:
    """Warns if values are going to be exchanged that do not belong to the averages (eager mode)."""
    if not tf.executing_eagerly():
        return
    if averages.is_swapped() and averages.were_loaded():
        warnings.warn(
            "Weights were loaded into the model while it held the averages. They take the place of the "
            "averages now, and the raw weights from before come back. To train from what was loaded, "
            "load it after the swap.",
            stacklevel=6,
        )
    _warn_if_stale(averages)


def _warn_if_stale(averages: Averages) -> None:
    if len(averages.slots) == len(averages.averaged()):
        return
    updates = int(averages.num_averaged())
    if averages.exchanged_at == NOT_SET:  # They come from a file, which does not say.
        averages.exchanged_at = updates
    if updates > averages.exchanged_at and not averages.is_swapped():
        warnings.warn(
            f"The statistics that `update_batch_norm` recomputed are those of averages with "
            f"{averages.exchanged_at} updates, and the averages hold {updates} by now. Call "
            "`update_batch_norm` again while they are in the model.",
            stacklevel=7,
        )


def finish(work: Callable[[], None]) -> None:
    """Does work on variables (eager mode) to its end, also if Ctrl-C is pressed meanwhile.

    Python hands Ctrl-C to the main thread alone, so that one waits for another. It is raised afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        work()
        return
    begun, done = threading.Lock(), threading.Event()
    failed: List[BaseException] = []

    def do() -> None:
        if not begun.acquire(blocking=False):
            return
        try:
            work()
        except BaseException as error:  # Raised below, in the thread of the caller.
            failed.append(error)
        finally:
            done.set()

    interrupts: List[BaseException] = []
    try:
        threading.Thread(target=do).start()
    except BaseException as interrupt:
        if begun.acquire(blocking=False):
            raise  # It has not begun, and will not.
        interrupts.append(interrupt)
    while True:
        try:
            done.wait()  # An interrupted `join` takes a running thread for a stopped one.
            break
        except BaseException as interrupt:  # Whatever a handler of signals raises.
            interrupts.append(interrupt)
    for error in failed + interrupts:
        raise error
