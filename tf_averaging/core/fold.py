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
"""The update: all variables of a device are folded into their averages by one call of one function.

The function is traced once. Each variable that it uses is an input, and each input costs about a
microsecond on every call, in a branch that is not taken too. A thousand variables are a millisecond: as
much as a third of what it takes to update their averages. So their handles are packed into one tensor.

Two things are lost with the single inputs. TensorFlow keeps what is done with a variable in program order
by looking at the inputs of operations: here it is told which variables a packed input stands for. And XLA
compiles no code that gets its variables in this way.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable, Dict, Hashable, List, Optional, Sequence, Tuple, Union

import tensorflow as tf

# Private names: nothing public tells TensorFlow what an operation touches, or says that a graph is going
# to be compiled. `tests/private_names_test.py` fails if one of them goes away.
from tensorflow.python.framework import auto_control_deps
from tensorflow.python.ops import control_flow_util

from tf_averaging.core.variables import Component
from tf_averaging.core.variables import after
from tf_averaging.core.variables import assign
from tf_averaging.core.variables import is_on_local_cpu
from tf_averaging.core.variables import is_on_tpu
from tf_averaging.core.variables import is_remote
from tf_averaging.core.variables import read
from tf_averaging.core.variables import subtract

# An average and the variable that it follows, on the same device.
Pair = Tuple[Component, Component]

# Works on pairs of averages and variables, with one element of a float64 vector for each.
Work = Callable[[Sequence[Pair], tf.Tensor], object]

_EagerTensor = tf.__internal__.EagerTensor

# The attribute of a packed tensor that keeps the handles in it, so that no others get their ids.
_HANDLES = "_tf_averaging_handles"

# The attribute of a graph that says what stands for the handles in each tensor that was packed there.
_STAND_INS = "_tf_averaging_stand_ins"

# XLA compiles averages of more bytes than the room for plain operations' arithmetic, this part of all of
# them; but none smaller and all larger than these. To compile one more costs about 10 ms once.
ROOM = 1 / 64
MIN_BYTES_TO_COMPILE, ENOUGH_BYTES_TO_COMPILE = 1 << 16, 1 << 20

# So many variables of the same dtypes are folded by one call of a function.
AT_A_TIME = 16


# What is done with the pairs of one device.


def nothing(pairs: Sequence[Pair], weights: tf.Tensor) -> None:
    """The work of a step on which no update is due."""
    del pairs, weights


def copy_chosen(pairs: Sequence[Pair], weights: tf.Tensor) -> list:
    """Sets the averages whose weight is 1 to their variables, whatever they were."""
    is_one = tf.equal(weights, 1.0)
    if is_compiled_whole() or not _are_here(pairs):
        return _for_each(
            pairs,
            list(zip([average for average, _ in pairs], tf.unstack(is_one, num=len(pairs)))),
            lambda pair, value, old: assign(pair[0], tf.where(pair[1], value, old)),
        )
    dtypes = sorted({(average.dtype, variable.dtype) for average, variable in pairs}, key=str)
    return [_copy_in_a_loop(pairs, is_one, average, variable) for average, variable in dtypes]


def _copy_in_a_loop(pairs: Sequence[Pair], chosen: tf.Tensor, average_dtype, dtype) -> tf.Tensor:
    """Copies the chosen pairs of these dtypes. It happens a few times only: few operations are best."""
    places = [i for i, (a, v) in enumerate(pairs) if (a.dtype, v.dtype) == (average_dtype, dtype)]
    averages, variables = (tf.stack([pairs[place][i].handle for place in places]) for i in (0, 1))
    places = tf.reshape(tf.where(tf.gather(chosen, places)), [-1])

    def copy_one(index):
        place = places[index]
        value = tf.raw_ops.ReadVariableOp(resource=variables[place], dtype=dtype)
        tf.raw_ops.AssignVariableOp(resource=averages[place], value=tf.cast(value, average_dtype))
        return index + 1

    return tf.while_loop(lambda index: index < tf.size(places), copy_one, [tf.constant(0)])


def done(operations: list) -> tf.Tensor:
    """True, when the operations have run."""
    with after(*operations):
        return tf.constant(True)


def for_each_pair(vector: tf.Tensor, places: List[int]) -> tf.Tensor:
    """The elements at these places; a variable may have several components, or be left out."""
    if places == list(range(vector.shape[0] or 0)):
        return vector
    return tf.gather(vector, tf.constant(places, tf.int32))


@functools.cache
def fold_work(jit_compile: Union[bool, str]) -> Work:
    """The work of folding: see `fold`."""
    return functools.partial(fold, jit_compile=jit_compile)


def fold(
    pairs: Sequence[Pair], weights: tf.Tensor, jit_compile: Union[bool, str]
) -> List[Union[None, tf.Operation, tf.Tensor]]:
    """Folds the variables into the averages, in one pass over the memory.

    Large variables go through one function that XLA compiles. It reads and writes every value once and
    needs no memory beside the averages. Small variables, remote ones (whose values would move to this
    machine), and all of them where there is no XLA go through plain operations. Both give the same
    numbers up to rounding.

    Args:
      pairs: averages and variables, on one device.
      weights: float64 vector, one element for each pair; see `interpolate`.
      jit_compile: `"auto"`, or a bool that forces one way or the other.
    """
    room = ROOM * sum(_bytes(average) for average, _ in pairs)
    at_least = min(max(MIN_BYTES_TO_COMPILE, room), ENOUGH_BYTES_TO_COMPILE)
    compiled = [place for place, (a, _) in enumerate(pairs) if _is_compiled(a, jit_compile, at_least)]
    plain, results = sorted(set(range(len(pairs))) - set(compiled)), []
    if compiled:
        chosen = [_fetched(pairs[place]) for place in compiled]

        def fold_compiled(weights, *handles):
            return done(interpolate(with_handles(chosen, handles), weights))

        function = tf.function(fold_compiled, jit_compile=True, autograph=False)
        with tf.device(chosen[0][0].device):
            results.append(function(for_each_pair(weights, compiled), *handles_of(chosen)))
    if plain:
        interpolate_them = _interpolate_some_at_a_time if _are_here(pairs) else interpolate
        results += interpolate_them([pairs[place] for place in plain], for_each_pair(weights, plain))
    return results


def _interpolate_some_at_a_time(pairs: Sequence[Pair], weights: tf.Tensor) -> list:
    """`interpolate` by one function for some pairs at a time, of any shape: tracing takes a while."""
    if len(pairs) < 2 * AT_A_TIME:
        return interpolate(pairs, weights)
    sizes = [_bytes(average) for average, _ in pairs]
    any_shape = tf.TensorShape(None)
    of_any_shape = [(a._replace(shape=any_shape), v._replace(shape=any_shape)) for a, v in pairs]
    groups = [
        sorted(alike, key=sizes.__getitem__)[begin : begin + AT_A_TIME]
        for alike in _grouped(of_any_shape, lambda pair: _layout([pair])).values()
        for begin in range(0, len(alike), AT_A_TIME)
    ]
    functions = DeviceFunctions()

    def begin(group: int) -> tf.Tensor:
        chosen = [of_any_shape[place] for place in groups[group]]
        return done(functions(chosen, [interpolate], None, for_each_pair(weights, groups[group])))

    # In a group each variable waits for the one before it, and the last one is the largest.
    return _in_turn([sizes[group[-1]] for group in groups], ROOM * sum(sizes), begin)


def interpolate(pairs: Sequence[Pair], weights: tf.Tensor) -> list:
    """Moves each average towards its variable by a part of the distance, which is its weight.

    A weight of 0 leaves the average as it is, also where the variable holds NaN or an infinity; and so
    does a weight of 1, which `copy_chosen` has dealt with.
    """
    weights = tf.where(tf.equal(weights, 1.0), tf.zeros([], tf.float64), weights)
    dtypes = {average.dtype for average, _ in pairs}
    cast = {dtype: tf.unstack(tf.cast(weights, dtype), num=len(pairs)) for dtype in dtypes}

    def write(pair_and_weight, value, old):
        average, weight = pair_and_weight
        return subtract(average, tf.math.multiply_no_nan(old - value, weight))

    arguments = [(average, cast[average.dtype][place]) for place, (average, _) in enumerate(pairs)]
    return _for_each(pairs, arguments, write)


def update(pairs: Sequence[Pair], new_value: Callable[[int, tf.Tensor, tf.Tensor], tf.Tensor]) -> list:
    """Sets each average to `new_value(its place, variable, average)`, values in the average's dtype."""

    def write(place, value, old):
        new = tf.convert_to_tensor(new_value(place, value, old))
        if new.dtype != old.dtype or not new.shape.is_compatible_with(old.shape):
            raise ValueError(
                f"Expected `average_op` to return an average of shape {old.shape} and dtype "
                f"{old.dtype.name}. Received one of shape {new.shape} and dtype {new.dtype.name}"
            )
        return assign(pairs[place][0], new)

    return _for_each(pairs, range(len(pairs)), write)


def _for_each(pairs: Sequence[Pair], arguments: Sequence, write: Callable) -> list:
    """Calls `write(argument, variable's value, average's value)` for each pair, on its device."""

    def begin(place: int):
        average, variable = pairs[place]
        with tf.device(average.device):
            return write(arguments[place], tf.cast(read(variable), average.dtype), read(average))

    sizes = [_bytes(average) for average, _ in pairs]
    return _in_turn(sizes, ROOM * sum(sizes), begin)


def _in_turn(sizes: Sequence[int], room: float, begin: Callable[[int], Any]) -> list:
    """Calls `begin(place)` for works that need so much memory, each when there is room for it.

    One that needs more than all the room is begun when no other is under way.
    """
    begun: List[Any] = []
    under_way, first = 0, 0
    for place, size in enumerate(sizes):
        under_way += size
        while first < place and under_way > room:
            under_way -= sizes[first]
            first += 1
        with after(*begun[:first][-1:]):
            begun.append(begin(place))
    return begun


def _bytes(average: Component) -> int:
    """Its size. Where shapes are not known, all are taken to be alike."""
    return (average.shape.num_elements() or 1) * average.dtype.size


def _is_compiled(average: Component, jit_compile: Union[bool, str], at_least: float) -> bool:
    """Whether this average is folded by code that XLA compiles."""
    if not tf.test.is_built_with_xla() or is_remote(average) or is_on_tpu(average):
        return False
    return _bytes(average) >= at_least if jit_compile == "auto" else bool(jit_compile)


def _are_here(pairs: Sequence[Pair]) -> bool:
    """Whether one operation on a CPU of this process may use all of these variables."""
    return all(is_on_local_cpu(a) and a.device == v.device for a, v in pairs)


def _fetched(pair: Pair) -> Pair:
    """The pair with the variable's value in place of its handle, where that is on another device."""
    average, variable = pair
    if variable.device == average.device:
        return pair
    return average, variable._replace(handle=read(variable))


def handles_of(pairs: Sequence[Pair]) -> List[tf.Tensor]:
    """All resource handles, pair by pair."""
    return [component.handle for pair in pairs for component in pair]


def with_handles(pairs: Sequence[Pair], handles: Sequence[tf.Tensor]) -> List[Pair]:
    """The same pairs with other handles, as a function sees them that gets the handles as arguments."""
    return [
        (average._replace(handle=first), variable._replace(handle=second))
        for (average, variable), first, second in zip(pairs, handles[::2], handles[1::2])
    ]


# One call for each device.


@dataclasses.dataclass(eq=False)
class DeviceFunctions:
    """Does work with pairs of averages and variables, on the device of each.

    What is done on a condition is one operation. The usual conditional is dissolved into the graph around
    it and costs a switch for each variable on every step, taken or not: the larger part of what averaging
    would cost on a step that averages nothing.
    """

    _functions: Dict[Hashable, Callable] = dataclasses.field(default_factory=dict)

    def __call__(
        self,
        pairs: Sequence[Pair],
        works: Sequence[Work],
        choice: Optional[tf.Tensor] = None,
        weights: Optional[tf.Tensor] = None,
    ) -> List[tf.Tensor]:
        """Does one of `works` with the pairs of each device.

        Args:
          pairs: averages and variables.
          works: what may be done, the same objects on every call: they are compared by identity.
          choice: scalar int32 tensor, which of them; None for the first.
          weights: float64 vector, one element for each pair; None for zeros.

        Returns:
          What must run before anything that follows.
        """
        done = []
        weights = tf.zeros([len(pairs)], tf.float64) if weights is None else weights
        for device, places in _grouped(pairs, lambda pair: pair[0].device).items():
            group = [pairs[place] for place in places]
            is_here = _are_here(group)
            with tf.device(device):
                inputs = [for_each_pair(weights, places), *_inputs(group, is_here)]
                functions = [self._function(work, group, inputs) for work in works]
                done.append(_call_one(functions, choice, inputs, is_here))
        return done

    def _function(self, work: Work, pairs: Sequence[Pair], inputs: Sequence[tf.Tensor]) -> Callable:
        """The work as a function of such inputs, for all pairs of these dtypes, shapes and device."""
        key = (work, _layout(pairs), len(inputs))
        if key not in self._functions:

            def on_handles(weights, *packed):
                work(with_handles(pairs, _unpack(packed)), weights)
                return tf.constant(True)

            signature = [tf.TensorSpec(value.shape, value.dtype) for value in inputs]
            attributes = {"_noinline": True}  # What is inlined is optimized once more for each call.
            with tf.init_scope():
                function = tf.function(on_handles, autograph=False, experimental_attributes=attributes)
                self._functions[key] = function.get_concrete_function(*signature)
        return self._functions[key]


def _layout(pairs: Sequence[Pair]) -> Hashable:
    """What a function that does work with pairs depends on: all but the handles."""
    return tuple(component[1:] for pair in pairs for component in pair)


def _grouped(pairs: Sequence[Pair], key: Callable[[Pair], Hashable]) -> Dict[Any, List[int]]:
    """The places of the pairs, by a key of each."""
    places: Dict[Any, List[int]] = {}
    for place, pair in enumerate(pairs):
        places.setdefault(key(pair), []).append(place)
    return places


def _call_one(functions, choice, inputs, is_here: bool) -> tf.Tensor:
    if choice is None:
        return functions[0](*inputs)
    if tf.executing_eagerly():
        return functions[int(choice)](*inputs)
    if not is_here:
        # The operation below runs all of its work on the device it is on, and not every operation has a
        # kernel for every kind of device.
        return tf.switch_case(choice, [functools.partial(function, *inputs) for function in functions])
    (done,) = tf.raw_ops.Case(
        branch_index=choice, input=inputs, Tout=[tf.bool], branches=functions, output_shapes=[[]]
    )
    return done


def is_compiled_whole() -> bool:
    """Whether XLA compiles the graph that is being built."""
    graph = tf.compat.v1.get_default_graph()
    return not tf.executing_eagerly() and control_flow_util.GraphOrParentsInXlaContext(graph)


def check_compiles(device: Optional[str]) -> None:
    """Refuses to build code for XLA, which runs on one device, if the averages have one of their own."""
    if device is not None and is_compiled_whole():
        raise RuntimeError(
            f"XLA compiles the whole step, for one device, and `average_device` is {device!r}. Compile "
            "the model with `jit_compile=False`, or leave `average_device` out."
        )


# Packed handles.


def _inputs(pairs: Sequence[Pair], is_here: bool) -> List[tf.Tensor]:
    """The handles of the pairs: one `tf.resource` vector where they can be packed, else all of them."""
    handles = handles_of(pairs)
    eager = all(isinstance(handle, _EagerTensor) for handle in handles)
    if not is_here or not eager or is_compiled_whole():
        return handles
    with tf.init_scope():
        packed = tf.stack(handles)
    setattr(packed, _HANDLES, tuple(handles))
    _note_stand_ins(packed, tf.compat.v1.get_default_graph())
    return [packed]


def _unpack(inputs: Sequence[tf.Tensor]) -> List[tf.Tensor]:
    """The handles, in the function that gets what `_inputs` returned."""
    return [handle for value in inputs for handle in (tf.unstack(value) if value.shape.rank else [value])]


@auto_control_deps.register_acd_resource_resolver
def _add_packed_variables(op: tf.Operation, reads: set, writes: set) -> bool:
    """Adds what stands for the variables that an operation gets packed to `writes`; whether any was."""
    del reads
    if not any(tensor.shape.rank == 1 for tensor in writes):
        return False
    # Also asked about graphs that are no functions, where somebody else orders operations in this way.
    captures = getattr(op.graph, "captures", ())
    captured = {id(internal): external for external, internal in captures}
    origins = [captured.get(id(tensor)) for tensor in writes]
    before = len(writes)
    for packed in origins:
        if hasattr(packed, _HANDLES):
            writes.update(_stand_ins(packed, op.graph))
    return len(writes) > before


def _note_stand_ins(packed: tf.Tensor, graph: tf.Graph) -> None:
    """Notes what stands for the handles in a graph and those around it.

    TensorFlow forgets which variable an argument of a function was before it asks what operations touch.
    """
    ids = set(map(id, getattr(packed, _HANDLES)))
    while hasattr(graph, "captures"):
        noted = [internal for external, internal in graph.captures if id(external) in ids]
        setattr(graph, _STAND_INS, {**getattr(graph, _STAND_INS, {}), id(packed): noted})
        graph = graph.outer_graph


def _stand_ins(packed: tf.Tensor, graph: tf.Graph) -> List[tf.Tensor]:
    """What stands, or may stand, for the handles in a packed tensor that a graph has captured."""
    ids = set(map(id, getattr(packed, _HANDLES)))
    captured = [(origin, tensor) for origin, tensor in graph.captures if isinstance(origin, _EagerTensor)]
    same = [
        tensor
        for origin, tensor in captured
        if not ids.isdisjoint(map(id, getattr(origin, _HANDLES, (origin,))))
    ]
    noted = getattr(graph, _STAND_INS, {}).get(id(packed))
    if noted is not None:
        return same + noted
    # It was packed in a function that this one calls: each argument may be one of its variables.
    known = {id(tensor) for _, tensor in captured}
    return same + [t for t in graph.inputs if t.dtype == tf.resource and id(t) not in known]
