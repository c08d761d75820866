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
"""Averages equal their definition, recomputed in float64 NumPy from the recorded weights."""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf

import tf_averaging as tfav
from tests import numpy_averages
from tests import testing_utils
from tests.testing_utils import CURRENT
from tests.testing_utils import KERAS
from tests.testing_utils import LEGACY
from tests.testing_utils import average_of
from tests.testing_utils import descend
from tests.testing_utils import trained_variable

NOISES = np.random.default_rng(0).normal(size=200).astype(np.float32)
VALUES = [np.array([[0.3, -1.2, 2.0], [0.1, 0.7, -0.5]], np.float32), np.float32(1.5)]
INNER = {
    "sgd": lambda: CURRENT.SGD(0.05, momentum=0.9),
    "adam": lambda: CURRENT.Adam(0.02),
    "legacy_sgd": lambda: LEGACY.SGD(0.05, momentum=0.9),
    "legacy_adam": lambda: LEGACY.Adam(0.02),
}


def gradients_of_noise(variables, noise):
    """They differ between the replicas."""
    replica = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.float32)
    with tf.GradientTape() as tape:
        loss = sum(tf.reduce_sum(tf.sin(3.0 * v + noise + replica)) for v in variables)
    return tape.gradient(loss, variables)


def check(strategy, scheme, inner, values=VALUES, noises=NOISES):
    run = testing_utils.train(
        strategy,
        lambda: scheme.wrap(INNER[inner]()),
        gradients_of_noise,
        values,
        steps=noises,
        as_function=True,
    )
    testing_utils.assert_averages(run, scheme)
    return run


@pytest.mark.parametrize("period", [1, 3])
def test_many_variables_of_one_layout(strategy, period):
    """They are folded some at a time, with some left over; here in mixed order."""
    values = [value + np.float32(i / 64) for i in range(37) for value in VALUES]
    values += [np.float32([[i]]) for i in range(16)]
    check(strategy, numpy_averages.ema(0.9, 2, period=period), "sgd", values, NOISES[:20])


@pytest.mark.slow
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(("start", "period"), list(itertools.product([0, 13, 500], [1, 7])))
def test_swa_is_the_mean_of_snapshots(strategy, inner, start, period):
    run = check(strategy, numpy_averages.swa(start, period), inner)
    snapshots = run.history[start + 1 :: period]
    for index, variable in enumerate(run.variables):
        weights = [values[index] for values in snapshots] or [run.history[-1][index]]
        mean = np.mean(np.asarray(weights, np.float64), axis=0)
        tolerance = 2e-6 * np.max(np.abs(weights))
        np.testing.assert_allclose(average_of(run.optimizer, variable), mean[0], rtol=0, atol=tolerance)


WHEN = [(0, 1), (13, 1), (0, 7), (13, 7), (500, 1)]  # Start, period.
DECAYS = [(0.5, False), (0.5, True), (0.999, False), (0.999, True)]  # Decay, whether it is dynamic.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "period", "decay", "dynamic", "inner"),
    [
        # All meet all, but for the inner optimizers: each meets every pair above, once.
        (*WHEN[i], *DECAYS[j], list(INNER)[(i + j) % len(INNER)])
        for i, j in itertools.product(range(len(WHEN)), range(len(DECAYS)))
    ],
)
def test_ema_follows_its_definition(strategy, start, period, decay, dynamic, inner):
    check(strategy, numpy_averages.ema(decay, start, dynamic, period), inner)


@pytest.mark.parametrize(
    "scheme",
    [
        *(numpy_averages.swa(*when) for when in [(0, 1), (10, 1), (7, 5), (0, 10)]),
        *(
            numpy_averages.ema(decay, start, False, period)
            for decay in (0.0, 0.9, 0.999)
            for start, period in [(0, 1), (5, 1), (3, 4)]
        ),
    ],
    ids=lambda scheme: f"{scheme.start}-{scheme.period}-{scheme.weight(1, 1):.3g}",
)
@testing_utils.both_generations
def test_float64_averages_are_exact_to_float64(module, scheme):
    noises = np.random.default_rng(0).normal(size=(50, 3)) - [3.0, -2.0, 0.5]
    run = testing_utils.train(
        tf.distribute.get_strategy(),
        lambda: scheme.wrap(module.SGD(0.1)),
        lambda variables, noise: [variables[0] + noise],
        [np.zeros(3)],
        steps=noises,
        as_function=True,
    )
    testing_utils.assert_averages(run, scheme, tolerance=1e-13)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    start=st.integers(0, 12),
    period=st.integers(1, 6),
    decay=st.none() | st.floats(0, 1),  # None: SWA.
    dynamic=st.booleans(),
    steps=st.integers(0, 15),
    shape=st.lists(st.integers(0, 4), max_size=3),
    seed=st.integers(0, 2**16),
)
def test_any_setting_in_eager_mode(start, period, decay, dynamic, steps, shape, seed):
    scheme = (
        numpy_averages.swa(start, period)
        if decay is None
        else numpy_averages.ema(decay, start, dynamic, period)
    )
    value, *gradients = np.random.default_rng(seed).normal(size=(steps + 1, *shape)).astype(np.float32)
    optimizer, variable = scheme.wrap(CURRENT.SGD(1.0)), tf.Variable(value)
    optimizer.shadow_copy([variable])
    history = [testing_utils.read_all([variable])]
    for gradient in gradients:
        optimizer.apply_gradients([(tf.constant(gradient), variable)])
        history.append(testing_utils.read_all([variable]))
    testing_utils.assert_averages(testing_utils.Run(optimizer, [variable], history), scheme)


class TestNumbersByHand:
    """SGD with gradients of 0.1: every number can be worked out on paper."""

    def test_swa(self):
        variables = [tf.Variable([1.0, 1.0]), tf.Variable([2.0, 2.0])]
        optimizer = tfav.SWA(CURRENT.SGD(1.0), 0, 1)
        descend(optimizer, variables, 0.1, steps=3)
        optimizer.assign_average_vars(variables)
        np.testing.assert_allclose(testing_utils.values(variables), [[0.8] * 2, [1.8] * 2], rtol=1e-6)

    @pytest.mark.parametrize(
        ("learning_rate", "start_step", "dynamic_decay", "expected"),
        [
            (2.0, 0, False, [0.75, 1.75]),
            (2.0, 0, True, [0.64, 1.64]),
            (1.0, 1, False, [0.85, 1.85]),
        ],
    )
    @testing_utils.both_generations
    def test_ema(self, module, learning_rate, start_step, dynamic_decay, expected):
        optimizer = tfav.ExponentialMovingAverage(
            module.SGD(learning_rate),
            average_decay=0.5,
            start_step=start_step,
            dynamic_decay=dynamic_decay,
        )
        variable = trained_variable(optimizer, [1.0, 2.0], 0.1, steps=2)
        np.testing.assert_allclose(average_of(optimizer, variable), expected, rtol=1e-6)

    @pytest.mark.parametrize(("decay", "expected"), [(1.0, 1.0), (0.0, 0.5)])
    def test_decay_of_one_never_moves_and_of_zero_follows(self, decay, expected):
        optimizer = numpy_averages.ema(decay, dynamic=False).wrap(CURRENT.SGD(0.25))
        assert average_of(optimizer, trained_variable(optimizer, 1.0, 1.0, steps=2)) == expected

    def test_steps_that_loss_scaling_skips(self, strategy):
        """Averages and count stay; `iterations`, and with it the period, moves on."""
        optimizers = []

        def make():
            optimizers.append(tfav.SWA(CURRENT.SGD(1.0), start_averaging=0, average_period=2))
            return testing_utils.loss_scaled(optimizers[0])

        def gradients(variables, gradient):
            return [gradient / strategy.num_replicas_in_sync]

        values = [1.0, np.inf, np.nan, 1.0, 1.0]  # Steps 0 to 4; due are 0, 2 and 4.
        run = testing_utils.train(strategy, make, gradients, [1.0], values, as_function=True)
        assert [weights[0][0] for weights in run.history] == [1.0, 0.0, 0.0, 0.0, -1.0, -2.0]
        optimizer = optimizers[0]
        assert (optimizer.iterations.numpy(), optimizer.num_averaged.numpy()) == (5, 2)
        assert average_of(optimizer, run.variables[0]) == -1.0


def test_first_snapshot_is_the_weights_bit_for_bit():
    """Whatever was in the model before, infinity included."""
    variable = tf.Variable([np.inf, 1e30, 0.1])
    optimizer = tfav.SWA(CURRENT.SGD(1.0), 0, 1)
    optimizer.shadow_copy([variable])
    optimizer.apply_gradients([(tf.constant([np.inf, 1e30, 0.3]), variable)])
    testing_utils.assert_same_bits([average_of(optimizer, variable)], [variable.numpy()])
    np.testing.assert_allclose(average_of(optimizer, variable), [np.nan, 0.0, -0.2], rtol=1e-6)


@pytest.mark.parametrize("scheme", [numpy_averages.swa(2, 2), numpy_averages.ema(0.75, 2)])
def test_averages_start_from_weights_loaded_after_shadow_copy(strategy, scheme):
    def build_model():
        return testing_utils.new_model(units=[2], inputs=3)

    loaded = [100.0 + np.arange(6.0, dtype=np.float32).reshape(3, 2), np.float32([50.0, 60.0])]

    class Load(KERAS.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.model.optimizer.shadow_copy(self.model)
            self.model.set_weights(loaded)
            averages = testing_utils.averages_of(self.model.optimizer, self.model.weights)
            testing_utils.assert_same_bits(averages, loaded)

    data = np.ones((5 * testing_utils.BATCH, 3), np.float32), np.zeros((5 * testing_utils.BATCH, 2))
    run = testing_utils.fit(
        strategy, lambda: scheme.wrap(CURRENT.SGD(0.1)), build_model, data, callbacks=[Load()]
    )
    run.history[0] = [np.stack([value] * len(before)) for value, before in zip(loaded, run.history[0])]
    testing_utils.assert_averages(run, scheme)


@pytest.mark.parametrize("when", [{}, {"jit_compile": True}, None], ids=["graph", "xla", "eager"])
@pytest.mark.parametrize(("start", "period"), [(0, 1), (3, 1), (0, 3), (2, 3)])
def test_averages_begin_from_the_weights_before_the_first_update(keras, when, start, period):
    """Those too that were loaded before the step was traced, or between steps before the start."""
    weights = tf.Variable([1.0, 2.0])
    variable = keras.Variable(weights) if hasattr(keras, "Variable") else weights
    optimizer = tfav.ExponentialMovingAverage(
        keras.optimizers.SGD(1.0), True, 0.75, start, False, average_period=period
    )
    optimizer.build([variable])

    def step():
        optimizer.apply_gradients([(tf.constant([1.0, -1.0]), variable)])

    step = step if when is None else tf.function(step, **when)
    weights.assign([8.0, 9.0])
    average = weights.numpy().astype(np.float64)
    for index in range(8):
        if index == start - 1:
            weights.assign([5.0, 7.0])
        before = weights.numpy()
        step()
        if index >= start and (index - start) % period == 0:
            average = before if index == start else average
            average = average + 0.25 * (weights.numpy() - average)
        if index >= start:
            np.testing.assert_allclose(optimizer.get_average(variable), average, rtol=1e-6)


def test_step_that_creates_the_model_it_trains(keras):
    """Averages made while the step is traced begin from weights that have no values yet."""
    schemes = {
        "bare": None,
        "SWA": numpy_averages.swa(1, 2),
        "SWA from the first": numpy_averages.swa(),
        "EMA": numpy_averages.ema(0.9, dynamic=False),
        "late EMA": numpy_averages.ema(0.8, start=2, dynamic=False, period=2),
    }
    models, optimizers, history = {}, {}, {name: [] for name in schemes}
    for name, scheme in schemes.items():
        layers = [
            keras.layers.Dense(n, kernel_initializer=keras.initializers.HeNormal(n)) for n in (3, 1)
        ]
        inner = keras.optimizers.SGD(0.1, momentum=0.9)
        models[name] = keras.Sequential(layers)
        optimizers[name] = inner if scheme is None else scheme.wrap(inner)

    @tf.function
    def step(x, y):
        for name, model in models.items():
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(x) - y) ** 2)
            variables = model.trainable_variables
            optimizers[name].apply_gradients(zip(tape.gradient(loss, variables), variables))

    for start in range(0, 6 * testing_utils.BATCH, testing_utils.BATCH):
        rows = slice(start, start + testing_utils.BATCH)
        step(testing_utils.X[rows], testing_utils.Y[rows])
        for name, model in models.items():
            history[name].append(testing_utils.values(model.trainable_variables))
    for name, scheme in schemes.items():
        for weights, bare in zip(history[name], history["bare"]):
            testing_utils.assert_same_bits(weights, bare, name)
        for index, variable in enumerate(models[name].trainable_variables) if scheme else ():
            average = average_of(optimizers[name], variable)
            assert np.isfinite(average).all()
            # The weights before the first step are known to nobody; an update with weight 1 forgets them.
            if scheme.start or scheme.weight(0, 0) == 1:
                weights = [values[index] for values in (history[name][0], *history[name])]
                expected = numpy_averages.expected_average(scheme, weights)
                np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-7)


# Steps are counted exactly, however many there are.


class Recorder(KERAS.optimizers.schedules.LearningRateSchedule):
    """A decay of 1/2 that keeps the steps it was asked for."""

    def __init__(self):
        self.steps = []

    def __call__(self, step):
        self.steps.append(int(step))
        return 0.5

    def get_config(self):
        return {}


after_many_steps = pytest.mark.parametrize("far", [2**24, 10**9, 2**31, 2**53 - 100])


@after_many_steps
def test_swa_still_counts(far):
    optimizer = tfav.SWA(CURRENT.SGD(1.0), start_averaging=far + 2, average_period=3)
    optimizer.iterations.assign(far)
    # Steps far to far + 8; snapshots after far + 2, far + 5 and far + 8.
    variable = trained_variable(optimizer, steps=9)
    assert optimizer.num_averaged == 3
    assert average_of(optimizer, variable) == (3 + 6 + 9) / 3


@after_many_steps
def test_ema_still_counts(far):
    """The warm-up counts from `start_step`, which may be far from 0."""
    optimizer = numpy_averages.ema(0.5, start=far + 1).wrap(CURRENT.SGD(1.0))
    optimizer.iterations.assign(far)
    variable = trained_variable(optimizer, steps=4)
    expected = numpy_averages.expected_average(numpy_averages.ema(0.5, start=1), np.arange(5.0))
    np.testing.assert_allclose(average_of(optimizer, variable), expected, rtol=1e-6)


@after_many_steps
def test_a_schedule_is_asked_for_exact_steps(far):
    schedule = Recorder()
    optimizer = tfav.ExponentialMovingAverage(
        CURRENT.SGD(1.0), average_decay=schedule, start_step=3, average_period=2
    )
    variable = trained_variable(optimizer, steps=4)  # The first update is that of step 3.
    optimizer.iterations.assign(far + 3)
    schedule.steps.clear()
    testing_utils.descend(optimizer, [variable], steps=4)
    assert schedule.steps == [s for s in range(far, far + 4) if s % 2 == 0]


@testing_utils.both_generations
def test_iterations_may_be_a_variable_of_the_users(module):
    steps = tf.Variable(2**31, dtype=tf.int64)
    optimizer = tfav.SWA(module.SGD(1.0), 2**31 + 1, 1)
    optimizer.iterations = steps
    assert optimizer.iterations is steps
    variable = trained_variable(optimizer, steps=3)
    assert steps.numpy() == 2**31 + 3
    assert average_of(optimizer, variable) == 2.5
    assert optimizer.get_weights()[0] == 2**31 + 3
    # The steps and the start of averaging.
    assert sum(v.dtype == tf.int64 and v.shape == [] for v in optimizer.variables) == 2


def test_weight_is_exact_where_float32_would_not_do():
    """The 10^8-th snapshot counts 1/10^8: 1/n in float32 would be off, n + 1 in float32 would be n."""
    variable = tf.Variable(np.zeros((), np.float64))
    optimizer = tfav.SWA(CURRENT.SGD(1.0), 0, 1)
    optimizer.shadow_copy([variable])
    testing_utils.count_as(optimizer, 10**8)
    descend(optimizer, [variable], -1.0)
    assert optimizer.num_averaged == 10**8 + 1
    np.testing.assert_allclose(average_of(optimizer, variable), 1 / (10**8 + 1), rtol=1e-15)
