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
"""Packed handles: what they stand for stays in program order with everything else."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import tf_averaging as tfav
from tf_averaging.core import fold

VARIABLES = 40  # Enough for the operations to run in another order where nothing keeps them in this one.
STEPS = 3


def variables_and_optimizer(cls=tfav.ExponentialMovingAverage, **options):
    variables = [tf.Variable(tf.fill([8], float(i))) for i in range(VARIABLES)]
    if cls is tfav.ExponentialMovingAverage:
        options = {"average_decay": 0.5, "dynamic_decay": False, **options}
    optimizer = cls(tf_keras.optimizers.SGD(1.0), **options)
    optimizer.shadow_copy(variables)
    return variables, optimizer


def in_branch(step):
    tf.cond(tf.constant(True), lambda: [step(), True][1:], lambda: [False])


def in_loop(step):
    for _ in tf.range(1):
        step()


WAYS = {
    "directly": lambda step: step(),
    "in a function": lambda step: tf.function(step)(),
    "in a function in a function": lambda step: tf.function(lambda: tf.function(step)())(),
    "in a branch": in_branch,
    "in a loop": tf.autograph.experimental.do_not_convert(
        lambda step: tf.while_loop(lambda i: i < 1, lambda i: [step(), i + 1][1:], [tf.constant(0)])
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_reads_and_writes_of_averages_stay_between_the_steps(way):
    variables, optimizer = variables_and_optimizer()
    averages = [optimizer.get_slot(v, "average") for v in variables]

    def step():
        optimizer.apply_gradients([(tf.ones([8]), v) for v in variables])

    @tf.function(autograph=False)
    def train():
        seen = []
        for _ in range(STEPS):
            WAYS[way](step)
            seen.append([average.read_value() for average in averages])
            for average in averages:
                average.assign_add(tf.fill([8], 16.0))
        return seen

    seen = np.array(train())
    expected = np.arange(VARIABLES, dtype=np.float64)
    weights = expected.copy()
    for k in range(STEPS):
        weights = weights - 1.0
        expected = expected + 0.5 * (weights - expected)
        np.testing.assert_array_equal(seen[k], np.repeat(expected[:, None], 8, axis=1))
        expected = expected + 16.0
    np.testing.assert_array_equal([a.numpy()[0] for a in averages], expected)


@pytest.mark.parametrize("way", WAYS)
def test_reads_and_writes_of_weights_stay_between_the_steps(way):
    """Of variables that the step does not train, so that averaging alone uses them."""
    variables, optimizer = variables_and_optimizer(tfav.SWA, average_period=1)
    trained, others = variables[:1], variables[1:]

    def step():
        optimizer.apply_gradients([(tf.ones([8]), v) for v in trained])

    @tf.function(autograph=False)
    def train():
        for k in range(STEPS):
            for variable in others:
                variable.assign(tf.fill([8], float(k)))
            WAYS[way](step)
        for variable in others:
            variable.assign(tf.fill([8], 100.0))

    train()
    for variable in others:  # The mean of 0, 1 and 2.
        np.testing.assert_allclose(optimizer.get_slot(variable, "average"), np.ones([8]), rtol=1e-6)


def test_variables_that_are_arguments_of_the_function():
    """TensorFlow forgets what an argument was before it orders the operations."""
    size = 200_000  # An update takes its time, and what does not wait for it comes too early.
    weight = tf.Variable(tf.zeros([size]))
    optimizer = tfav.ExponentialMovingAverage(
        tf_keras.optimizers.SGD(1.0),
        average_decay=0.5,
        dynamic_decay=False,
        start_step=1,
        jit_compile=False,
    )

    @tf.function(autograph=False)
    def train(variable):
        for _ in range(20):
            optimizer.apply_gradients([(tf.fill([size], -1.0), variable)])

    train(weight)
    expected = 1.0
    for step in range(1, 20):
        expected += 0.5 * (step + 1 - expected)
    np.testing.assert_array_equal(weight, np.full([size], 20.0))
    np.testing.assert_allclose(
        optimizer.get_slot(weight, "average"), np.full([size], expected), rtol=1e-6
    )


@pytest.mark.parametrize("way", ["directly", "in a branch", "in a function"])
@pytest.mark.parametrize("kind", ["averages", "weights"])
def test_a_step_traced_before_in_functions_with_arguments(kind, way):
    """The handles were packed in another function, which knew nothing of these arguments."""
    size = 200_000
    trained, other = tf.Variable(tf.zeros([size])), tf.Variable(tf.zeros([size]))
    optimizer = tfav.ExponentialMovingAverage(
        tf_keras.optimizers.SGD(1.0), average_decay=0.5, dynamic_decay=False
    )
    optimizer.shadow_copy([trained, other])
    average = optimizer.get_slot(other, "average")

    @tf.function(autograph=False)
    def step():
        optimizer.apply_gradients([(tf.ones([size]), trained)])

    @tf.function(autograph=False)
    def add_to(variable):
        variable.assign_add(tf.fill([size], 16.0))

    @tf.function(autograph=False)
    def train(variable):
        for _ in range(8):
            WAYS[way](step)
            add_to(variable)
        return variable.read_value()

    step()
    added = train({"averages": average, "weights": other}[kind])
    weight, expected = 0.0, 0.0
    for _ in range(8):
        expected += 0.5 * (weight - expected)
        if kind == "averages":
            expected += 16.0
        else:
            weight += 16.0
    np.testing.assert_array_equal(other, np.full([size], weight))
    np.testing.assert_array_equal(average, np.full([size], expected))
    np.testing.assert_array_equal(added, expected if kind == "averages" else weight)


def test_other_arguments_of_the_function_do_not_wait():
    """Replicas that read from one iterator would wait for the steps of each other, and without end."""
    variables, optimizer = variables_and_optimizer()

    @tf.function
    def train(iterator):
        optimizer.apply_gradients([(next(iterator) * tf.ones([8]), v) for v in variables])
        return next(iterator)

    iterator = iter(tf.data.Dataset.from_tensors(1.0).repeat())
    operations = train.get_concrete_function(iterator).graph.get_operations()
    reads = [operation for operation in operations if operation.type == "IteratorGetNext"]
    assert len(reads) == VARIABLES + 1
    assert [operation.name for operation in reads[-1].control_inputs] == [reads[-2].name]


def test_assigning_averages_comes_before_the_step_after_it():
    """Where nothing but averaging uses the variables: packed handles alone say which these are."""
    variables, optimizer = variables_and_optimizer()
    optimizer.update_average()
    trained, others = variables[:1], variables[1:]

    @tf.function(autograph=False)
    def assign_and_step():
        optimizer.assign_average_vars(others)
        optimizer.apply_gradients([(tf.ones([8]), v) for v in trained])

    for _ in range(10):
        for variable in others:
            variable.assign(tf.fill([8], -100.0))
        assign_and_step()
    for i, variable in enumerate(variables[1:], start=1):
        np.testing.assert_array_equal(variable, np.full([8], float(i)))
        np.testing.assert_array_equal(optimizer.get_slot(variable, "average"), np.full([8], float(i)))


def inputs_of_step(optimizer, count, **options):
    """How many variables the function of a step gets as inputs."""
    variables = [tf.Variable([1.0]) for _ in range(count)]

    @tf.function(**options)
    def step():
        optimizer.apply_gradients([(tf.ones([1]), v) for v in variables])

    graph = step.get_concrete_function().graph
    return sum(value.dtype == tf.resource for value in graph.inputs)


@pytest.mark.parametrize("cls", [tfav.SWA, tfav.ExponentialMovingAverage])
def test_averages_are_one_input_of_a_step(cls):
    """Or two: one before the step and one after it. The status has a few more, whatever the averages."""
    added = {
        inputs_of_step(cls(tf_keras.optimizers.SGD()), count)
        - inputs_of_step(tf_keras.optimizers.SGD(), count)
        for count in (3, 30)
    }
    assert len(added) == 1
    assert added.pop() <= 2 + len({"first_step", "clocks", "guard"})


def test_compiled_steps_get_all_variables():
    optimizer = tfav.SWA(tf_keras.optimizers.SGD())
    assert inputs_of_step(optimizer, VARIABLES, jit_compile=True) >= 2 * VARIABLES


def test_compiled_code_refuses_what_was_traced_outside_of_it():
    """As docs/performance.md says. Nothing has changed then; another function of the step compiles."""
    variables, optimizer = variables_and_optimizer()

    def step():
        optimizer.apply_gradients([(tf.ones([8]), v) for v in variables])

    traced = tf.function(step)
    traced()
    state = [v.numpy() for v in [*variables, *optimizer.variables]]
    with pytest.raises((tf.errors.UnimplementedError, tf.errors.InvalidArgumentError)):
        tf.function(lambda: traced(), jit_compile=True)()
    for before, after in zip(state, [*variables, *optimizer.variables]):
        np.testing.assert_array_equal(before, after)
    tf.function(lambda: tf.function(step)(), jit_compile=True)()
    np.testing.assert_array_equal(optimizer.num_averaged, 2)


def test_other_stacks_of_handles_in_graphs_that_are_no_functions():
    """TensorFlow may order these too, and asks about each operation that it does not know."""

    @tf.function(input_signature=[tf.TensorSpec([2], tf.resource)])
    def add_one(stacked):
        for handle in tf.unstack(stacked):
            tf.raw_ops.AssignAddVariableOp(resource=handle, value=1.0)

    add = add_one.get_concrete_function()
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        variables = [tf.Variable(0.0), tf.Variable(1.0)]
        session.run(tf.compat.v1.global_variables_initializer())
        with fold.auto_control_deps.AutomaticControlDependencies() as dependencies:
            add(tf.stack([v.handle for v in variables]))
            done = dependencies.mark_as_return(tf.constant(0))
        session.run(done)
        assert session.run(variables) == [1.0, 2.0]
