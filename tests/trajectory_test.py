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
"""Averages against a float64 recomputation in NumPy from the recorded weights."""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import tf_averaging as tfav

STEPS = 200


def swa_oracle(weights, start, period):
    """The mean of snapshots; `weights[t + 1]` are the weights after step t, `weights[0]` before all."""
    snapshots = [weights[t + 1] for t in range(start, len(weights) - 1, period)]
    return np.mean(np.asarray(snapshots, np.float64), axis=0) if snapshots else weights[-1]


def ema_oracle(weights, start, period, decay, dynamic_decay):
    """The exponential moving average, written out from its definition."""
    average = np.asarray(weights[-1], np.float64)
    for t in range(start, len(weights) - 1, period):
        if t == start:
            average = np.asarray(weights[t], np.float64)
        s = t - start
        d = min(decay, (1 + s) / (10 + s)) if dynamic_decay else decay
        average = d * average + (1 - d) * np.asarray(weights[t + 1], np.float64)
    return average


def train(strategy, optimizer, variables, steps=STEPS):
    """Trains on noise that differs between the replicas; returns all values of each variable."""

    @tf.function
    def step(noise):
        def on_replica():
            context = tf.distribute.get_replica_context()
            own_noise = noise + tf.cast(context.replica_id_in_sync_group, tf.float32)
            with tf.GradientTape() as tape:
                loss = sum(tf.reduce_sum(tf.sin(3.0 * v + own_noise)) for v in variables)
            optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))

        strategy.run(on_replica)

    recorded = [[v.numpy()] for v in variables]
    for noise in np.random.default_rng(0).normal(size=steps).astype(np.float32):
        step(tf.constant(noise))
        for values, variable in zip(recorded, variables):
            values.append(variable.numpy())
    return recorded


def assert_averages(optimizer, variables, recorded, oracle):
    for variable, weights in zip(variables, recorded):
        average = optimizer.get_slot(variable, "average")
        replicas = [value.numpy() for value in getattr(average, "values", [average])]
        for replica in replicas:
            np.testing.assert_array_equal(replica, replicas[0])
        tolerance = 2e-6 * np.max(np.abs(weights))
        np.testing.assert_allclose(replicas[0], oracle(weights), rtol=0, atol=tolerance)


def new_variables(strategy):
    with strategy.scope():
        return [tf.Variable([[0.3, -1.2, 2.0], [0.1, 0.7, -0.5]]), tf.Variable(1.5)]


INNER = {
    "sgd": lambda: tf_keras.optimizers.SGD(0.05, momentum=0.9),
    "adam": lambda: tf_keras.optimizers.Adam(0.02),
    "legacy_sgd": lambda: tf_keras.optimizers.legacy.SGD(0.05, momentum=0.9),
    "legacy_adam": lambda: tf_keras.optimizers.legacy.Adam(0.02),
}


@pytest.mark.slow
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(("start", "period"), list(itertools.product([0, 13, 500], [1, 7])))
def test_swa_is_the_mean_of_snapshots(strategy, inner, start, period):
    variables = new_variables(strategy)
    with strategy.scope():
        optimizer = tfav.SWA(INNER[inner](), start, period)
    recorded = train(strategy, optimizer, variables)
    assert_averages(optimizer, variables, recorded, lambda w: swa_oracle(w, start, period))
    assert optimizer.num_averaged == len(range(start, STEPS, period))


WHEN = [(0, 1), (13, 1), (0, 7), (13, 7), (500, 1)]  # Start, period.
DECAYS = [(0.5, False), (0.5, True), (0.999, False), (0.999, True)]  # Decay, whether it is dynamic.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "period", "decay", "dynamic_decay", "inner"),
    [
        # All meet all, but for the inner optimizers: each meets every pair above, once.
        (*WHEN[i], *DECAYS[j], list(INNER)[(i + j) % len(INNER)])
        for i, j in itertools.product(range(len(WHEN)), range(len(DECAYS)))
    ],
)
def test_ema_follows_its_definition(strategy, start, period, decay, dynamic_decay, inner):
    variables = new_variables(strategy)
    with strategy.scope():
        optimizer = tfav.ExponentialMovingAverage(
            INNER[inner](),
            average_decay=decay,
            start_step=start,
            dynamic_decay=dynamic_decay,
            average_period=period,
        )
    recorded = train(strategy, optimizer, variables)
    assert_averages(
        optimizer, variables, recorded, lambda w: ema_oracle(w, start, period, decay, dynamic_decay)
    )
    assert optimizer.num_averaged == len(range(start, STEPS, period))


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    start=st.integers(0, 12),
    period=st.integers(1, 6),
    decay=st.floats(0, 1),
    dynamic_decay=st.booleans(),
    steps=st.integers(0, 15),
    shape=st.lists(st.integers(0, 4), max_size=3),
    seed=st.integers(0, 2**16),
    scheme=st.sampled_from(["swa", "ema"]),
)
def test_any_setting_in_eager_mode(start, period, decay, dynamic_decay, steps, shape, seed, scheme):
    inner = tf_keras.optimizers.SGD(1.0)
    if scheme == "swa":
        optimizer = tfav.SWA(inner, start, period)
    else:
        optimizer = tfav.ExponentialMovingAverage(
            inner, True, decay, start, dynamic_decay, average_period=period
        )
    random = np.random.default_rng(seed)
    variable = tf.Variable(random.normal(size=shape).astype(np.float32))
    optimizer.shadow_copy([variable])
    weights = [variable.numpy()]
    for _ in range(steps):
        gradient = tf.constant(random.normal(size=shape).astype(np.float32))
        optimizer.apply_gradients([(gradient, variable)])
        weights.append(variable.numpy())
    expected = (
        swa_oracle(weights, start, period)
        if scheme == "swa"
        else ema_oracle(weights, start, period, decay, dynamic_decay)
    )
    tolerance = 2e-6 * np.max(np.abs(weights), initial=0)
    average = optimizer.get_slot(variable, "average").numpy()
    np.testing.assert_allclose(average, expected, rtol=0, atol=tolerance)


class TestNumbersByHand:
    """SGD with gradients of 0.1: every number can be worked out on paper."""

    def test_swa(self):
        variables = [tf.Variable([1.0, 1.0]), tf.Variable([2.0, 2.0])]
        optimizer = tfav.SWA(tf_keras.optimizers.SGD(1.0), 0, 1)
        for _ in range(3):
            optimizer.apply_gradients([(tf.constant([0.1, 0.1]), v) for v in variables])
        optimizer.assign_average_vars(variables)
        np.testing.assert_allclose(variables[0].numpy(), [0.8, 0.8], rtol=1e-6)
        np.testing.assert_allclose(variables[1].numpy(), [1.8, 1.8], rtol=1e-6)

    @pytest.mark.parametrize("generation", [tf_keras.optimizers, tf_keras.optimizers.legacy])
    @pytest.mark.parametrize(
        ("learning_rate", "start_step", "dynamic_decay", "expected"),
        [
            (2.0, 0, False, [0.75, 1.75]),
            (2.0, 0, True, [0.64, 1.64]),
            (1.0, 1, False, [0.85, 1.85]),
        ],
    )
    def test_ema(self, generation, learning_rate, start_step, dynamic_decay, expected):
        variable = tf.Variable([1.0, 2.0])
        optimizer = tfav.ExponentialMovingAverage(
            generation.SGD(learning_rate),
            average_decay=0.5,
            start_step=start_step,
            dynamic_decay=dynamic_decay,
        )
        for _ in range(2):
            optimizer.apply_gradients([(tf.constant([0.1, 0.1]), variable)])
        average = optimizer.get_slot(variable, "average").numpy()
        np.testing.assert_allclose(average, expected, rtol=1e-6)

    def test_decay_of_one_never_moves_and_of_zero_follows(self):
        for decay, expected in [(1.0, 1.0), (0.0, 0.5)]:
            variable = tf.Variable(1.0)
            optimizer = tfav.ExponentialMovingAverage(
                tf_keras.optimizers.SGD(0.25), average_decay=decay, dynamic_decay=False
            )
            for _ in range(2):
                optimizer.apply_gradients([(tf.constant(1.0), variable)])
            assert optimizer.get_slot(variable, "average").numpy() == expected


class Recorder(tf_keras.optimizers.schedules.LearningRateSchedule):
    """A decay of 1/2 that keeps the steps it was asked for."""

    def __init__(self):
        self.steps = []

    def __call__(self, step):
        self.steps.append(int(step))
        return 0.5

    def get_config(self):
        return {}


FAR = [2**24, 10**9, 2**31, 2**53 - 100]


@pytest.mark.parametrize("far", FAR)
def test_swa_still_counts_after_many_steps(far):
    variable = tf.Variable(0.0)
    optimizer = tfav.SWA(tf_keras.optimizers.SGD(1.0), start_averaging=far + 2, average_period=3)
    optimizer.iterations.assign(far)
    for _ in range(9):  # Steps far to far + 8; snapshots after far + 2, far + 5 and far + 8.
        optimizer.apply_gradients([(tf.constant(-1.0), variable)])
    assert optimizer.num_averaged == 3
    assert optimizer.get_slot(variable, "average").numpy() == (3 + 6 + 9) / 3


@pytest.mark.parametrize("far", FAR)
def test_ema_still_counts_after_many_steps(far):
    """The warm-up counts from `start_step`, which may be far from 0."""
    variable = tf.Variable(0.0)
    optimizer = tfav.ExponentialMovingAverage(
        tf_keras.optimizers.SGD(1.0), start_step=far + 1, average_decay=0.5
    )
    optimizer.iterations.assign(far)
    weights = [0.0]
    for _ in range(4):
        optimizer.apply_gradients([(tf.constant(-1.0), variable)])
        weights.append(variable.numpy())
    expected = ema_oracle(weights, 1, 1, 0.5, True)
    np.testing.assert_allclose(optimizer.get_slot(variable, "average").numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("far", FAR)
def test_a_schedule_is_asked_for_exact_steps(far):
    schedule = Recorder()
    optimizer = tfav.ExponentialMovingAverage(
        tf_keras.optimizers.SGD(1.0), average_decay=schedule, start_step=3, average_period=2
    )
    optimizer.iterations.assign(far + 3)
    variable = tf.Variable(0.0)
    for _ in range(4):
        optimizer.apply_gradients([(tf.constant(1.0), variable)])
    assert schedule.steps == [s for s in range(far, far + 4) if s % 2 == 0]


def test_weight_is_exact_where_float32_would_not_do():
    """The 10^8-th snapshot counts 1/10^8: 1/n in float32 would be off, n + 1 in float32 would be n."""
    variable = tf.Variable(np.zeros((), np.float64))
    optimizer = tfav.SWA(tf_keras.optimizers.SGD(1.0), 0, 1)
    optimizer.shadow_copy([variable])
    optimizer.set_weights([10**8 if "num_averaged" in v.name else v.numpy() for v in optimizer.variables])
    optimizer.apply_gradients([(tf.constant(-1.0, tf.float64), variable)])
    average = optimizer.get_slot(variable, "average").numpy()
    assert optimizer.num_averaged == 10**8 + 1
    np.testing.assert_allclose(average, 1 / (10**8 + 1), rtol=1e-15)


@pytest.mark.parametrize("scheme", ["swa", "ema"])
def test_averages_start_from_weights_loaded_after_shadow_copy(strategy, scheme):
    with strategy.scope():
        model = tf_keras.Sequential([tf_keras.layers.Dense(2, input_shape=(3,))])
        inner = tf_keras.optimizers.SGD(0.1)
        optimizer = (
            tfav.SWA(inner, 2, 2)
            if scheme == "swa"
            else tfav.ExponentialMovingAverage(inner, average_decay=0.75, start_step=2)
        )
        model.compile(optimizer, "mse")
    optimizer.shadow_copy(model)
    loaded = [100.0 + np.arange(6.0).reshape(3, 2), np.array([50.0, 60.0])]
    model.set_weights(loaded)
    for average, weights in zip(map(lambda v: optimizer.get_slot(v, "average"), model.weights), loaded):
        np.testing.assert_array_equal(average.numpy(), weights.astype(np.float32))
    x, y = np.ones((4, 3), np.float32), np.zeros((4, 2), np.float32)
    recorded = [model.get_weights()]
    for _ in range(5):
        model.train_on_batch(x, y)
        recorded.append(model.get_weights())
    for index, variable in enumerate(model.weights):
        weights = [values[index] for values in recorded]
        expected = swa_oracle(weights, 2, 2) if scheme == "swa" else ema_oracle(weights, 2, 1, 0.75, True)
        np.testing.assert_allclose(optimizer.get_slot(variable, "average").numpy(), expected, rtol=2e-6)
