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
"""Work on all averages of a device: traced once, chosen by one operation, the same everywhere."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import tf_averaging as tfav
from tf_averaging import average_ops
from tf_averaging import device_functions

NOTHING = device_functions.nothing


def pairs_of(count, device="CPU:0"):
    with tf.device(device):
        averages = [tf.Variable([1.0 + i]) for i in range(count)]
        variables = [tf.Variable([10.0 * i]) for i in range(count)]
    pairs = [tuple(average_ops.components(v)[0] for v in pair) for pair in zip(averages, variables)]
    return averages, variables, pairs


def test_work_is_traced_once_eagerly_and_in_functions():
    _, _, pairs = pairs_of(3)
    traced = []

    def work(pairs, weight):
        traced.append(weight)
        return average_ops.copy(pairs)

    on_devices = device_functions.DeviceFunctions()
    for choice in (0, 1):
        on_devices(pairs, [NOTHING, work], tf.constant(choice))
        tf.function(lambda c: on_devices(pairs, [NOTHING, work], c))(tf.constant(choice))
    assert len(traced) == 1


@pytest.mark.parametrize("is_here", [True, False])
@pytest.mark.parametrize("how", ["eager", "function", "XLA"])
@pytest.mark.parametrize(
    ("choice", "expected"), [(0, [1.0, 2.0, 3.0]), (1, [0.75, 4.0, 7.25]), (2, [0.0, 10.0, 20.0])]
)
def test_choice(monkeypatch, choice, expected, how, is_here):
    """Elsewhere than on a CPU of this process it is TensorFlow's own conditional, with equal results."""
    if not is_here:
        monkeypatch.setattr(device_functions, "is_one_process_cpu", lambda component: False)
    averages, variables, pairs = pairs_of(3)
    works = [NOTHING, device_functions.fold(False), device_functions.copy]
    on_devices = device_functions.DeviceFunctions()

    def run(choice):
        on_devices(pairs, works, choice, tf.constant(0.25, tf.float64))

    if how != "eager":
        run = tf.function(run, jit_compile=how == "XLA", autograph=False)
    run(tf.constant(choice))
    np.testing.assert_array_equal([a.numpy()[0] for a in averages], expected)
    np.testing.assert_array_equal([v.numpy()[0] for v in variables], [0.0, 10.0, 20.0])


def test_each_device_has_its_own_choice_and_its_own_variables():
    first_averages, _, first = pairs_of(2, "CPU:0")
    second_averages, _, second = pairs_of(2, "CPU:1")
    on_devices = device_functions.DeviceFunctions()

    @tf.function
    def run():
        on_devices(first + second, [NOTHING, device_functions.copy], tf.constant(1))

    run()
    for averages in (first_averages, second_averages):
        np.testing.assert_array_equal([a.numpy()[0] for a in averages], [0.0, 10.0])
    choices = [op for op in run.get_concrete_function().graph.get_operations() if op.type == "Case"]
    devices = [tf.DeviceSpec.from_string(op.device).device_index for op in choices]
    assert sorted(devices) == [0, 1]


def added_operations(count):
    """How many operations SWA adds to the step of SGD alone on `count` variables."""
    variables = [tf.Variable([1.0]) for _ in range(count)]

    def operations(optimizer):
        def step():
            optimizer.apply_gradients([(tf.constant([1.0]), v) for v in variables])

        graph = tf.function(step).get_concrete_function().graph
        # Inputs do not run, and identities are dissolved before anything does.
        return [op for op in graph.get_operations() if op.type not in ("Placeholder", "Identity")]

    return len(operations(tfav.SWA("sgd"))) - len(operations(tf_keras.optimizers.SGD()))


def test_a_step_without_update_does_not_pay_for_each_variable():
    assert 0 < added_operations(3) == added_operations(30)


def test_updates_do_not_wait_for_all_gradients():
    """Keras's sum over replicas takes all gradients. If it waited itself, it would not be dissolved."""
    variables = [tf.Variable([1.0]) for _ in range(3)]
    optimizer = tfav.SWA(tf_keras.optimizers.SGD())

    @tf.function
    def step(gradients):
        optimizer.apply_gradients(zip(gradients, variables))

    graph = step.get_concrete_function([tf.ones([1])] * 3).graph
    sums = [op for op in graph.get_operations() if op.type == "IdentityN"]
    assert sums
    assert not any(op.control_inputs for op in sums)


@pytest.mark.parametrize("persistent", [True, False])
def test_steps_inside_the_context_of_a_tape(persistent):
    weight = tf.Variable(tf.fill([200, 200], 4.0))  # Large enough to be compiled.
    small = tf.Variable([4.0])
    optimizer = tfav.ExponentialMovingAverage(
        tf_keras.optimizers.SGD(1.0), average_decay=0.75, dynamic_decay=False
    )

    @tf.function
    def step():
        with tf.GradientTape(persistent=persistent) as tape:
            loss = tf.reduce_sum(weight) + tf.reduce_sum(small)
            gradients = tape.gradient(loss, [weight, small]) if persistent else None
            ones = gradients or [tf.ones_like(weight), tf.ones_like(small)]
            optimizer.apply_gradients(zip(ones, [weight, small]))

    step()
    step()
    # The weights were 4, 3, 2; the averages 4, 3.75, 3.3125.
    np.testing.assert_array_equal(optimizer.get_average(weight).numpy(), np.full([200, 200], 3.3125))
    np.testing.assert_array_equal(optimizer.get_average(small).numpy(), [3.3125])
