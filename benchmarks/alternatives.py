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
"""Other ways to do the same, beside the one that was chosen: `python -m benchmarks.alternatives`.

The record of `docs/performance.md`. Ways to fold the variables into their averages, and ways to do
nothing on a step on which no update is due.
"""

import collections
import functools
import time
from typing import Callable, Dict, List

import tensorflow as tf
from absl import app
from absl import flags

from benchmarks import report
from benchmarks import timing
from benchmarks import workloads
from tf_averaging import average_ops
from tf_averaging import control_flow
from tf_averaging import device_functions

FLAGS = flags.FLAGS
flags.DEFINE_float("seconds", 20.0, "How long to time each group of alternatives.")
flags.DEFINE_list("workloads", "resnet50,matrices,small", "On which variables.")


def assign_new_value(pairs, weight):
    """Read, subtract, multiply, add, assign."""
    for average, variable in pairs:
        old = average_ops.read(average)
        new = old + tf.cast(weight, old.dtype) * (average_ops.read(variable) - old)
        average_ops.assign(average, new)


def add_difference(pairs, weight):
    """Read, subtract, multiply, add in place; all variables at once."""
    for average, variable in pairs:
        difference = average_ops.read(variable) - average_ops.read(average)
        average_ops.add(average, tf.cast(weight, tf.float32) * difference)


def one_by_one(pairs, weight):
    """The same, one variable after the other."""
    previous = None
    for pair in pairs:
        with control_flow.after(previous):
            (previous,) = average_ops.interpolate([pair], weight)


def in_batches(pairs, weight):
    """The same, a batch of 1/32 of the variables after the other."""
    size = max(len(pairs) // 32, 1)
    previous = []
    for start in range(0, len(pairs), size):
        with control_flow.after(tf.group(*previous)):
            previous = []
            for pair in pairs[start : start + size]:
                previous += average_ops.interpolate([pair], weight)


def as_gradient_descent(pairs, weight):
    """The kernel of gradient descent, whose gradient is the difference: one operation less."""
    for average, variable in pairs:
        tf.raw_ops.ResourceApplyGradientDescent(
            var=average.handle,
            alpha=tf.cast(weight, tf.float32),
            delta=average_ops.read(average) - average_ops.read(variable),
        )


def stacked_by_shape(pairs, weight):
    """Up to 16 variables of one shape stacked, folded as one, and taken apart."""
    shapes = collections.defaultdict(list)
    for pair in pairs:
        shapes[tuple(pair[0].shape)].append(pair)
    for same in shapes.values():
        for start in range(0, len(same), 16):
            averages, variables = zip(*same[start : start + 16])
            old = tf.stack([average_ops.read(average) for average in averages])
            new = tf.stack([average_ops.read(variable) for variable in variables])
            for average, delta in zip(averages, tf.unstack(tf.cast(weight, tf.float32) * (new - old))):
                average_ops.add(average, delta)


def compiled_by_shape(pairs, weight):
    """One compiled function for each shape, called for every variable of it."""
    functions: Dict[object, Callable] = collections.defaultdict(
        lambda: tf.function(lambda w, *h: fold_one(w, *h), jit_compile=True, autograph=False)
    )

    def fold_one(weight, average, variable):
        old = tf.raw_ops.ReadVariableOp(resource=average, dtype=tf.float32)
        value = tf.raw_ops.ReadVariableOp(resource=variable, dtype=tf.float32)
        tf.raw_ops.AssignVariableOp(
            resource=average, value=old + tf.cast(weight, tf.float32) * (value - old)
        )

    for average, variable in pairs:
        functions[tuple(average.shape)](weight, average.handle, variable.handle)


WAYS_TO_FOLD = {
    "plain operations, new value assigned": assign_new_value,
    "plain operations, added in place": add_difference,
    "the same, one variable after the other": one_by_one,
    "the same, in batches": in_batches,
    "the same, each after one before it": average_ops.interpolate,
    "the kernel of gradient descent": as_gradient_descent,
    "plain operations on stacks of one shape": stacked_by_shape,
    "compiled, a function for each shape": compiled_by_shape,
    "compiled, one function": functools.partial(average_ops.fold, jit_compile=True),
    "chosen: compiled if large, plain and each after one before it if small": functools.partial(
        average_ops.fold, jit_compile="auto"
    ),
}


def skip_by_cond(pairs, never):
    """TensorFlow's own conditional, which is dissolved into the graph around it."""
    tf.cond(
        never,
        lambda: control_flow.done(lambda: average_ops.copy(pairs)),
        lambda: tf.constant(False),
    )


def skip_by_packed_handles(pairs, never):
    """The same with all handles in one tensor."""
    with tf.init_scope():
        packed = tf.stack(average_ops.handles_of(pairs))

    def copy():
        handles = tf.unstack(packed, 2 * len(pairs))
        return control_flow.done(lambda: average_ops.copy(average_ops.with_handles(pairs, handles)))

    tf.cond(never, copy, lambda: tf.constant(False))


def skip_by_one_operation(pairs, never):
    """One operation, which gets all handles."""
    handles = average_ops.handles_of(pairs)

    def branch(work):
        def on_handles(*handles):
            return control_flow.done(lambda: work(average_ops.with_handles(pairs, handles), None))

        with tf.init_scope():
            signature = [tf.TensorSpec([], tf.resource)] * len(handles)
            return tf.function(on_handles, autograph=False).get_concrete_function(*signature)

    tf.raw_ops.Case(
        branch_index=tf.cast(never, tf.int32),
        input=handles,
        Tout=[tf.bool],
        branches=[branch(device_functions.nothing), branch(device_functions.copy)],
        output_shapes=[[]],
    )


def skip_by_packed_operation(pairs, never):
    """One operation, which gets one tensor of all handles."""
    works = [device_functions.nothing, device_functions.copy]
    device_functions.DeviceFunctions()(pairs, works, tf.cast(never, tf.int32))


WAYS_TO_SKIP = {
    "a conditional": skip_by_cond,
    "a conditional, handles packed into one": skip_by_packed_handles,
    "one operation": skip_by_one_operation,
    "chosen: one operation, handles packed into one": skip_by_packed_operation,
}


def measure(ways: Dict[str, Callable], pairs: List[average_ops.Pair], argument: tf.Tensor) -> str:
    """A table: time to the first result, and time of a call."""
    calls, first = {}, {}
    for name, way in ways.items():
        calls[name] = tf.function(
            functools.partial(lambda way, argument: way(pairs, argument) and None, way), autograph=False
        )
        calls[name] = functools.partial(calls[name], argument)
        start = time.perf_counter()
        calls[name]()
        first[name] = time.perf_counter() - start
    times = timing.in_turns(calls, FLAGS.seconds, least=10, most=300)
    rows = []
    for name, seconds in times.items():
        figures = timing.spread(seconds)
        quartiles = f"{figures['low_ms']:.2f}–{figures['high_ms']:.2f}"
        rows.append([name, f"{figures['median_ms']:.2f} ({quartiles})", f"{first[name]:.2f}"])
    return report.table(["", "ms (quartiles)", "first call, s"], rows)


def main(_) -> None:
    tf.get_logger().setLevel("ERROR")
    for name in FLAGS.workloads:
        variables = workloads.WORKLOADS[name].variables()
        averages = [tf.Variable(tf.zeros_like(variable)) for variable in variables]
        pairs = [
            (average_ops.components(average)[0], average_ops.components(variable)[0])
            for average, variable in zip(averages, variables)
        ]
        print(f"### {name}: an update\n")
        print(measure(WAYS_TO_FOLD, pairs, tf.constant(0.01, tf.float64)))
        print(f"### {name}: no update\n")
        print(measure(WAYS_TO_SKIP, pairs, tf.constant(False)))


if __name__ == "__main__":
    app.run(main)
