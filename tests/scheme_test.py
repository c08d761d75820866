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

import tf_averaging as tfav
from tests import testing_utils
from tests.testing_utils import CURRENT
from tests.testing_utils import KERAS
from tests.testing_utils import average_of
from tests.testing_utils import trained_variable


@KERAS.saving.register_keras_serializable("scheme_test")
class RunningMean(tfav.AveragedOptimizerWrapper):
    """A whole scheme in ten lines: the mean of all weights so far."""

    def averaging_weight(self, steps, updates):
        return 1 / (updates + 1)


@KERAS.saving.register_keras_serializable("scheme_test")
class RunningMaximum(tfav.AveragedOptimizerWrapper):
    """No interpolation: the largest value that each weight has had."""

    def average_op(self, var, average_var):
        return tf.maximum(var, average_var)


@KERAS.saving.register_keras_serializable("scheme_test")
class ClippedMean(RunningMean):
    """Both: the mean, kept below a bound that is part of the config."""

    def __init__(self, optimizer, bound, name="ClippedMean", **options):
        super().__init__(optimizer, name, **options)
        self.bound = bound

    def average_op(self, var, average_var):
        return tf.minimum(super().average_op(var, average_var), self.bound)

    def get_config(self):
        return {**super().get_config(), "bound": self.bound}


def train(strategy, make_optimizer, gradients, as_function=True):
    """Trains a variable that starts at 4; returns it, all its values and the optimizer."""
    run = testing_utils.train(
        strategy,
        make_optimizer,
        lambda variables, gradient: [gradient / strategy.num_replicas_in_sync],
        [np.float32(4.0)],
        gradients,
        as_function,
    )
    return run.variables[0], [values[0][0] for values in run.history], run.optimizer


@pytest.mark.parametrize("as_function", [False, True])
@testing_utils.both_generations
def test_averaging_weight_is_enough(strategy, module, as_function):
    def make():
        return RunningMean(module.SGD(1.0), start_averaging=1, average_period=2)

    gradients = [1.0, 0.5, 0.25, 2.0, -1.0, 3.0]
    variable, values, optimizer = train(strategy, make, gradients, as_function)
    expected = np.mean([values[2], values[4], values[6]])
    np.testing.assert_allclose(average_of(optimizer, variable), expected, rtol=1e-6)
    with optimizer.swapped_weights():
        np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-6)
    assert variable.numpy() == values[-1]


def test_weight_in_a_variable_is_read_when_the_update_is_made():
    class Adjustable(tfav.AveragedOptimizerWrapper):
        weight = tf.Variable(1.0)

        def averaging_weight(self, steps, updates):
            return self.weight

    variable = tf.Variable(4.0)
    optimizer = Adjustable(CURRENT.SGD(1.0), start_averaging=1)
    step = tf.function(lambda: optimizer.apply_gradients([(tf.constant(1.0), variable)]))
    step()
    Adjustable.weight.assign(0.25)
    step()
    # The average starts from 3, then 3 + 0.25 * (2 - 3).
    assert average_of(optimizer, variable) == 2.75


@pytest.mark.parametrize("as_function", [False, True])
@pytest.mark.parametrize("weight", [1.5, -0.5, np.nan])
@pytest.mark.parametrize("form", [float, tf.constant])
def test_weight_by_hand_out_of_range(weight, form, as_function):
    variable = tf.Variable(4.0)
    optimizer = RunningMean(CURRENT.SGD(1.0))
    optimizer.shadow_copy([variable])
    given = form(weight)

    def update(given):
        optimizer.update_average(given)

    if as_function:
        update = tf.function(update)
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match="from 0 to 1"):
        update(given)
    assert optimizer.num_averaged == 0


@pytest.mark.parametrize("as_function", [False, True])
def test_average_op_is_enough(strategy, as_function):
    def make():
        return RunningMaximum(CURRENT.SGD(1.0), start_averaging=2)

    gradients = [-9.0, 8.0, 1.0, -3.0, 2.0, 5.0]
    variable, values, optimizer = train(strategy, make, gradients, as_function)
    assert values == [4.0, 13.0, 5.0, 4.0, 7.0, 5.0, 0.0]
    assert average_of(optimizer, variable) == 7.0
    assert optimizer.num_averaged == 4


def test_average_op_may_build_on_the_interpolation(strategy):
    def make():
        return ClippedMean(CURRENT.SGD(1.0), bound=3.5)

    variable, values, optimizer = train(strategy, make, [-1.0, 4.0, 1.0])
    assert values == [4.0, 5.0, 1.0, 0.0]
    # min(5, 3.5) = 3.5, then (3.5 + 1) / 2 = 2.25, then 2.25 + (0 - 2.25) / 3 = 1.5
    np.testing.assert_allclose(average_of(optimizer, variable), 1.5, rtol=1e-6)


def test_average_op_sees_the_dtype_of_the_average():
    seen = []

    class Recording(tfav.AveragedOptimizerWrapper):
        def average_op(self, var, average_var):
            seen.append((var.dtype, average_var.dtype, var.shape))
            return var

    trained_variable(Recording(CURRENT.SGD()), tf.ones([2, 3], tf.bfloat16))
    assert seen == [(tf.float32, tf.float32, tf.TensorShape([2, 3]))]


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        *((cls, {"start_averaging": 7, "average_period": 3}) for cls in (RunningMean, RunningMaximum)),
        (ClippedMean, {"bound": 2.0}),
    ],
)
def test_config_of_a_scheme_has_its_arguments(cls, options):
    optimizer = cls(CURRENT.Adam(clipnorm=0.5), jit_compile=False, **options)
    copy = CURRENT.deserialize(CURRENT.serialize(optimizer))
    assert isinstance(copy, cls)
    assert copy.get_config() == optimizer.get_config()
    assert {name: getattr(copy, name) for name in options} == options


def test_state_added_by_a_scheme_is_part_of_the_state():
    class Counting(RunningMean):
        def __init__(self, optimizer):
            super().__init__(optimizer)
            self.calls = self.add_variable([], tf.int64, name="calls")

        def average_op(self, var, average_var):
            self.calls.assign_add(2)
            return super().average_op(var, average_var)

    optimizer = Counting(CURRENT.SGD())
    trained_variable(optimizer, steps=3)
    assert optimizer.get_weights()[-1] == 6


def test_subclass_of_swa_with_a_weight_of_its_own_starts_from_the_weights_before():
    """The plain mean's short cut, a first update that copies, is not for it."""

    class HalfWay(tfav.SWA):
        def averaging_weight(self, steps, updates):
            return tf.constant(0.5, tf.float64)

    optimizer = HalfWay(CURRENT.SGD(1.0), 0, 1)
    assert average_of(optimizer, trained_variable(optimizer, 4.0, 2.0)) == 3.0
