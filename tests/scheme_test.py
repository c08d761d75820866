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
"""Schemes of one's own: what a subclass needs to define."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import tf_averaging as tfav


@tf_keras.saving.register_keras_serializable("scheme_test")
class RunningMean(tfav.AveragedOptimizerWrapper):
    """A whole scheme in ten lines: the mean of all weights so far."""

    def averaging_weight(self, step):
        return 1.0 / tf.cast(self.num_averaged + 1, tf.float64)


@tf_keras.saving.register_keras_serializable("scheme_test")
class RunningMaximum(tfav.AveragedOptimizerWrapper):
    """No interpolation: the largest value that each weight has had."""

    def average_op(self, var, average_var):
        return tf.maximum(var, average_var)


@tf_keras.saving.register_keras_serializable("scheme_test")
class ClippedMean(RunningMean):
    """Both: the mean, kept below a bound that is part of the config."""

    def __init__(self, optimizer, bound, name="ClippedMean", **options):
        super().__init__(optimizer, name, **options)
        self.bound = bound

    def average_op(self, var, average_var):
        return tf.minimum(super().average_op(var, average_var), self.bound)

    def get_config(self):
        return {**super().get_config(), "bound": self.bound}


def train(strategy, optimizer, gradients, use_function=True):
    """Trains one variable that starts at 4 with these gradients; returns it and all its values."""
    with strategy.scope():
        variable = tf.Variable(4.0)
        gradient = tf.Variable(0.0, trainable=False)

    def step():
        def on_replica():
            own = gradient / tf.cast(strategy.num_replicas_in_sync, tf.float32)
            optimizer.apply_gradients([(own, variable)])

        strategy.run(on_replica)

    if use_function:
        eager_step = step

        @tf.function
        def step():
            eager_step()

    values = [variable.numpy()]
    for value in gradients:
        gradient.assign(value)
        step()
        values.append(variable.numpy())
    return variable, values


@pytest.mark.parametrize("use_function", [False, True])
@pytest.mark.parametrize("generation", [tf_keras.optimizers, tf_keras.optimizers.legacy])
def test_averaging_weight_is_enough(strategy, generation, use_function):
    with strategy.scope():
        optimizer = RunningMean(generation.SGD(1.0), start_averaging=1, average_period=2)
    variable, values = train(strategy, optimizer, [1.0, 0.5, 0.25, 2.0, -1.0, 3.0], use_function)
    expected = np.mean([values[2], values[4], values[6]])
    np.testing.assert_allclose(optimizer.get_slot(variable, "average").numpy(), expected, rtol=1e-6)
    with optimizer.swapped_weights():
        np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-6)
    assert variable.numpy() == values[-1]


@pytest.mark.parametrize("use_function", [False, True])
def test_average_op_is_enough(strategy, use_function):
    with strategy.scope():
        optimizer = RunningMaximum(tf_keras.optimizers.SGD(1.0), start_averaging=2)
    variable, values = train(strategy, optimizer, [-9.0, 8.0, 1.0, -3.0, 2.0, 5.0], use_function)
    assert values == [4.0, 13.0, 5.0, 4.0, 7.0, 5.0, 0.0]
    assert optimizer.get_slot(variable, "average").numpy() == 7.0
    assert optimizer.num_averaged == 4


def test_average_op_may_build_on_the_interpolation(strategy):
    with strategy.scope():
        optimizer = ClippedMean(tf_keras.optimizers.SGD(1.0), bound=3.5)
    variable, values = train(strategy, optimizer, [-1.0, 4.0, 1.0])
    assert values == [4.0, 5.0, 1.0, 0.0]
    # min(5, 3.5) = 3.5, then (3.5 + 1) / 2 = 2.25, then 2.25 + (0 - 2.25) / 3 = 1.5
    np.testing.assert_allclose(optimizer.get_slot(variable, "average").numpy(), 1.5, rtol=1e-6)


def test_average_op_sees_the_dtype_of_the_average():
    seen = []

    class Recording(tfav.AveragedOptimizerWrapper):
        def average_op(self, var, average_var):
            seen.append((var.dtype, average_var.dtype, var.shape))
            return var

    variable = tf.Variable(tf.ones([2, 3], tf.bfloat16))
    Recording("sgd").apply_gradients([(tf.ones([2, 3], tf.bfloat16), variable)])
    assert seen == [(tf.float32, tf.float32, tf.TensorShape([2, 3]))]


@pytest.mark.parametrize("cls", [RunningMean, RunningMaximum])
def test_config_of_a_scheme_needs_nothing_more(cls):
    optimizer = cls("adam", start_averaging=7, average_period=3, clipnorm=0.5, jit_compile=False)
    copy = tf_keras.optimizers.deserialize(tf_keras.optimizers.serialize(optimizer))
    assert type(copy) is cls
    assert copy.get_config() == optimizer.get_config()


def test_config_of_a_scheme_with_an_argument():
    optimizer = ClippedMean("sgd", bound=2.0)
    copy = tf_keras.optimizers.deserialize(tf_keras.optimizers.serialize(optimizer))
    assert copy.bound == 2.0
    assert copy.get_config() == optimizer.get_config()


def test_state_added_by_a_scheme_is_part_of_the_state():
    class Counting(RunningMean):
        def __init__(self, optimizer):
            super().__init__(optimizer)
            self.calls = self.add_variable([], tf.int64, name="calls")

        def averaging_weight(self, step):
            self.calls.assign_add(2)
            return super().averaging_weight(step)

    optimizer = Counting("sgd")
    variable = tf.Variable(1.0)
    for _ in range(3):
        optimizer.apply_gradients([(tf.constant(1.0), variable)])
    assert optimizer.get_weights()[-1] == 6


def test_subclass_of_swa_with_a_weight_of_its_own_starts_from_the_weights_before():
    """The plain mean's short cut, a first update that copies, is not for it."""

    class HalfWay(tfav.SWA):
        def averaging_weight(self, step):
            return tf.constant(0.5, tf.float64)

    variable = tf.Variable(4.0)
    optimizer = HalfWay(tf_keras.optimizers.SGD(1.0), 0, 1)
    optimizer.apply_gradients([(tf.constant(2.0), variable)])
    assert optimizer.get_slot(variable, "average").numpy() == 3.0


def test_first_snapshot_is_the_weights_bit_for_bit():
    """Whatever was in the model before, infinity included."""
    variable = tf.Variable([np.inf, 1e30, 0.1])
    optimizer = tfav.SWA(tf_keras.optimizers.SGD(1.0), 0, 1)
    optimizer.shadow_copy([variable])
    optimizer.apply_gradients([(tf.constant([np.inf, 1e30, 0.3]), variable)])
    average = optimizer.get_slot(variable, "average").numpy()
    assert average.tobytes() == variable.numpy().tobytes()
    np.testing.assert_allclose(average, [np.nan, 0.0, -0.2], rtol=1e-6)
