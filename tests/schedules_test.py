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
"""Decays and learning rates equal their formulas, in NumPy, however many steps were taken."""

import json
import math

import keras as keras_3
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import tf_averaging as tfav

STEPS = [0, 1, 10, 10**3, 10**6, 10**9]

DECAYS = {
    "warm-up": (
        tfav.schedules.WarmUpDecay(0.9999),
        lambda s: min(0.9999, (1 + s) / (10 + s)),
    ),
    "debiased": (
        tfav.schedules.DebiasedDecay(0.999),
        lambda s: 1 - 1 / math.fsum(0.999**i for i in range(min(s, 10**5) + 1)),
    ),
    "debiased, with a period": (
        tfav.schedules.DebiasedDecay(0.9, average_period=5),
        lambda s: 1 - (1 - 0.9) / (1 - 0.9 ** (s / 5 + 1)),
    ),
    "debiased plain mean": (tfav.schedules.DebiasedDecay(1.0), lambda s: 1 - 1 / (s + 1)),
    "momentum annealing": (
        tfav.schedules.MomentumAnnealingDecay(momentum=2e-4, gamma=100),
        lambda s: 1 - max(2e-4, 100 / (100 + s)),
    ),
    "inverse power": (
        tfav.schedules.InversePowerDecay(gamma=2, power=0.75),
        lambda s: min(1 - (1 + s / 2) ** -0.75, 0.9999),
    ),
    "inverse power with a minimum": (
        tfav.schedules.InversePowerDecay(min_decay=0.5, max_decay=1.0),
        lambda s: max(1 - (1 + s) ** (-2 / 3), 0.5) if s else 0.0,
    ),
    "power function": (
        tfav.schedules.PowerFunctionDecay(gamma=6.94),
        lambda s: (1 - 1 / (s + 1)) ** 7.94,
    ),
}


def annealed(step, start, anneal_steps, before, after, strategy):
    if step < start:
        return before(step)
    gone = min((step - start) / anneal_steps, 1.0) if anneal_steps else 1.0
    share = gone if strategy == "linear" else (1 - math.cos(math.pi * gone)) / 2
    return (1 - share) * before(start) + share * after


def cyclical(step, start, cycle, high, low, before):
    if step < start:
        return before(step)
    i = step - start + 1  # The paper counts iterations from 1.
    t = ((i - 1) % cycle + 1) / cycle
    return (1 - t) * high + t * low


def inverse_time(step):
    return 0.5 / (1 + step / 10)


LEARNING_RATES = {
    "constant": (
        tfav.schedules.ConstantLearningRate(0.1, 0.05),
        lambda t: annealed(t, 0, 0, lambda _: 0.1, 0.05, "cos"),
    ),
    "linear": (
        tfav.schedules.ConstantLearningRate(0.2, 0.05, 8, 10**9, "linear"),
        lambda t: annealed(t, 8, 10**9, lambda _: 0.2, 0.05, "linear"),
    ),
}
for _keras in (keras_3, tf_keras):
    _before = _keras.optimizers.schedules.InverseTimeDecay(0.5, 10, 1.0)
    _name = _keras.__name__
    LEARNING_RATES |= {
        f"jump from {_name}": (
            tfav.schedules.ConstantLearningRate(_before, 0.05, start_step=10),
            lambda t: annealed(t, 10, 0, inverse_time, 0.05, "cos"),
        ),
        f"cosine from {_name}": (
            tfav.schedules.ConstantLearningRate(_before, 0.05, 7, 2000, "cos"),
            lambda t: annealed(t, 7, 2000, inverse_time, 0.05, "cos"),
        ),
        f"cyclical from {_name}": (
            tfav.schedules.CyclicalLearningRate(_before, 0.05, 0.01, 7, 5),
            lambda t: cyclical(t, 5, 7, 0.05, 0.01, inverse_time),
        ),
    }
SCHEDULES = {name: schedule for name, (schedule, _) in {**DECAYS, **LEARNING_RATES}.items()}


@pytest.mark.parametrize("name", DECAYS)
class TestDecays:
    @pytest.mark.parametrize("step", STEPS)
    def test_equals_formula(self, name, step):
        schedule, formula = DECAYS[name]
        compiled = tf.function(schedule)
        for value in (schedule(step), schedule(tf.constant(step, tf.int64))):
            assert value.dtype == tf.float64
            np.testing.assert_allclose(value.numpy(), formula(step), rtol=1e-14, atol=1e-15)
        np.testing.assert_allclose(
            compiled(tf.constant(step, tf.int64)).numpy(), formula(step), rtol=1e-14
        )

    def test_counts_beyond_2_to_24(self, name):
        """Neighbouring steps give different weights of the new values, where the formula does."""
        schedule, formula = DECAYS[name]
        step = 2**24
        assert np.float32(step) == np.float32(step + 1)
        expected = formula(step + 1) - formula(step)
        difference = (schedule(step + 1) - schedule(step)).numpy()
        np.testing.assert_allclose(difference, expected, rtol=1e-6, atol=1e-16)

    def test_is_from_0_to_1_and_never_falls(self, name):
        schedule, _ = DECAYS[name]
        values = np.array([schedule(step).numpy() for step in range(100)])
        assert values.min() >= 0
        assert values.max() <= 1
        assert np.all(np.diff(values) >= 0)

    def test_trains_with_steps_counted_from_the_start(self, name):
        schedule, formula = DECAYS[name]
        variable = tf.Variable(0.0, dtype=tf.float64)
        optimizer = tfav.ExponentialMovingAverage(
            tf_keras.optimizers.SGD(1.0), average_decay=schedule, start_step=2
        )
        expected = 0.0
        for step in range(6):
            if step == 2:
                expected = variable.numpy()
            gradient = tf.constant(-1.0 - step, tf.float64)
            optimizer.apply_gradients([(gradient, variable)])
            if step >= 2:
                expected += (1 - formula(step - 2)) * (variable.numpy() - expected)
        np.testing.assert_allclose(optimizer.get_slot(variable, "average").numpy(), expected, rtol=1e-13)


def test_warm_up_is_dynamic_decay():
    results = []
    for options in ({"average_decay": 0.5}, {"average_decay": tfav.schedules.WarmUpDecay(0.5)}):
        variable = tf.Variable(0.0)
        optimizer = tfav.ExponentialMovingAverage(tf_keras.optimizers.SGD(1.0), **options)
        for step in range(20):
            optimizer.apply_gradients([(tf.constant(-float(step)), variable)])
        results.append(optimizer.get_slot(variable, "average").numpy())
    assert results[0] == results[1]


@pytest.mark.parametrize(("steps", "period"), [(1, 1), (1000, 1), (2.5, 1), (100, 7)])
def test_half_life(steps, period):
    np.testing.assert_allclose(
        tfav.schedules.half_life(steps, period) ** (steps / period), 0.5, rtol=1e-12
    )


def test_half_life_of_nothing():
    with pytest.raises(ValueError, match="Expected `steps` > 0"):
        tfav.schedules.half_life(0)
    with pytest.raises(TypeError, match="`average_period` to be an int"):
        tfav.schedules.half_life(10, 2.0)


def test_power_function_decay_averages_with_a_power_of_the_step():
    """What arXiv:2312.02696 wants: after many steps, step i counts in proportion to i ** gamma."""
    gamma, steps = 2, 2000
    schedule = tfav.schedules.PowerFunctionDecay(gamma)
    share = np.ones(steps)
    for step in range(steps):
        decay = schedule(step).numpy()
        share[:step] *= decay
        share[step] = 1 - decay
    expected = np.arange(1, steps + 1) ** float(gamma)
    np.testing.assert_allclose(share[100:], (expected / expected.sum())[100:], rtol=0.05)
    np.testing.assert_allclose(share.sum(), 1.0, rtol=1e-12)


@pytest.mark.parametrize("name", LEARNING_RATES)
class TestLearningRates:
    @pytest.mark.parametrize("step", STEPS + [4, 5, 6, 9, 11, 12, 2**24 + 1, 2**24 + 2])
    def test_equals_formula(self, name, step):
        schedule, formula = LEARNING_RATES[name]
        compiled = tf.function(schedule)
        tensor = tf.constant(step, tf.int64)
        for value in (schedule(step), schedule(tensor), compiled(tensor)):
            assert value.dtype == tf.float32
            np.testing.assert_allclose(value.numpy(), formula(step), rtol=1e-6)

    @pytest.mark.parametrize("generation", [tf_keras.optimizers, tf_keras.optimizers.legacy])
    def test_trains(self, strategy, name, generation):
        schedule, formula = LEARNING_RATES[name]
        with strategy.scope():
            variable = tf.Variable(0.0)
            optimizer = tfav.SWA(generation.SGD(schedule))

        def on_replica():
            gradient = tf.constant(-1.0 / strategy.num_replicas_in_sync)
            optimizer.apply_gradients([(gradient, variable)])

        @tf.function
        def step():
            strategy.run(on_replica)

        for _ in range(15):
            step()
        np.testing.assert_allclose(variable.numpy(), sum(map(formula, range(15))), rtol=1e-5)


class TestCycles:
    def test_snapshots_are_at_the_low_learning_rate(self):
        for start in (0, 3):
            schedule = tfav.schedules.CyclicalLearningRate(0.5, 0.1, 0.01, 4, start_step=start)
            snapshots = schedule.snapshots()
            assert snapshots == {"start_averaging": start + 3, "average_period": 4}
            for step in range(start, 40):
                since = step - snapshots["start_averaging"]
                is_due = since >= 0 and since % snapshots["average_period"] == 0
                assert (abs(schedule(step).numpy() - 0.01) < 1e-8) == is_due

    def test_not_before(self):
        schedule = tfav.schedules.CyclicalLearningRate(0.5, 0.1, 0.01, 5, start_step=10)
        starts = [schedule.snapshots(not_before)["start_averaging"] for not_before in range(26)]
        assert starts == [14] * 15 + [19] * 5 + [24] * 5 + [29]

    def test_swa_averages_the_ends_of_cycles(self):
        schedule = tfav.schedules.CyclicalLearningRate(0.5, 0.2, 0.05, 3, start_step=2)
        variable = tf.Variable(0.0)
        optimizer = tfav.SWA(tf_keras.optimizers.SGD(schedule), **schedule.snapshots())
        ends = []
        for step in range(11):
            optimizer.apply_gradients([(tf.constant(-1.0), variable)])
            if step in (4, 7, 10):
                ends.append(variable.numpy().astype(np.float64))
        assert optimizer.num_averaged == 3
        np.testing.assert_allclose(
            optimizer.get_slot(variable, "average").numpy(), np.mean(ends), rtol=1e-6
        )


@pytest.mark.parametrize("name", SCHEDULES)
class TestEverySchedule:
    def test_is_a_schedule_of_the_keras(self, keras, name):
        assert isinstance(SCHEDULES[name], keras.optimizers.schedules.LearningRateSchedule)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_takes_a_vector_of_steps(self, name, compiled):
        schedule = SCHEDULES[name]
        called = tf.function(schedule) if compiled else schedule
        steps = tf.constant([*STEPS, 5, 6, 7], tf.int64)
        values = called(steps).numpy()
        expected = [schedule(step).numpy() for step in steps]
        np.testing.assert_allclose(values, expected, rtol=4 * np.finfo(values.dtype).eps)

    def test_is_a_learning_rate(self, keras, name):
        schedule = SCHEDULES[name]
        optimizer = keras.optimizers.SGD(schedule)
        variable = (keras if keras is keras_3 else tf).Variable(0.0)
        for _ in range(7):
            optimizer.apply_gradients([(tf.constant(-1.0), variable)])
        expected = sum(float(schedule(step)) for step in range(7))
        np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-5)

    def test_config_round_trip(self, keras, name):
        schedule, schedules = SCHEDULES[name], keras.optimizers.schedules
        text = json.dumps(schedules.serialize(schedule))
        again = schedules.deserialize(json.loads(text))
        assert type(again) is type(schedule)
        assert json.dumps(schedules.serialize(again)) == text
        for step in STEPS:
            assert again(step).numpy() == schedule(step).numpy()
        copy = type(schedule).from_config(schedule.get_config())
        assert copy.get_config() == schedule.get_config()
        assert type(getattr(copy, "learning_rate", None)) is type(
            getattr(schedule, "learning_rate", None)
        )


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
def test_optimizer_with_schedules_is_saved_and_loaded(tmp_path, name):
    rate = tfav.schedules.CyclicalLearningRate(
        tf_keras.optimizers.schedules.CosineDecay(0.1, 10), 0.05, 0.01, 3
    )
    decay = tfav.schedules.PowerFunctionDecay(2)
    optimizer = tfav.ExponentialMovingAverage(tf_keras.optimizers.SGD(rate), average_decay=decay)
    model = tf_keras.Sequential([tf_keras.layers.Dense(1, input_shape=(2,))])
    model.compile(optimizer, "mse")
    model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)
    model.save(tmp_path / name)
    loaded = tf_keras.models.load_model(tmp_path / name).optimizer
    assert loaded.average_decay.get_config() == decay.get_config()
    assert loaded.inner_optimizer.get_config() == optimizer.inner_optimizer.get_config()


class UsersSchedule(tf_keras.optimizers.schedules.LearningRateSchedule):
    def __init__(self, value):
        self.value = value

    def __call__(self, step):
        return self.value

    def get_config(self):
        return {"value": self.value}


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
@pytest.mark.parametrize("wrap", [tfav.SWA, lambda inner: inner], ids=["wrapped", "bare"])
def test_class_of_a_user_with_the_same_name(tmp_path, name, wrap):
    schedule = type("ConstantLearningRate", (UsersSchedule,), {})
    model = tf_keras.Sequential([tf_keras.layers.Dense(1, input_shape=(2,))])
    model.compile(wrap(tf_keras.optimizers.SGD(schedule(0.5))), "mse")
    model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)
    model.save(tmp_path / name)
    custom = {"ConstantLearningRate": schedule}
    loaded = tf_keras.models.load_model(tmp_path / name, custom_objects=custom).optimizer
    loaded = getattr(loaded, "inner_optimizer", loaded)
    assert loaded.get_config()["learning_rate"]["config"] == {"value": 0.5}


@pytest.mark.parametrize(
    ("create", "error", "message"),
    [
        (lambda: tfav.schedules.WarmUpDecay(1.5), ValueError, "decay=1.5"),
        (lambda: tfav.schedules.WarmUpDecay("high"), TypeError, "decay='high'"),
        (lambda: tfav.schedules.WarmUpDecay(float("nan")), ValueError, "decay=nan"),
        (lambda: tfav.schedules.WarmUpDecay(True), TypeError, "decay=True"),
        (lambda: tfav.schedules.MomentumAnnealingDecay(gamma=0), ValueError, "gamma=0"),
        (lambda: tfav.schedules.MomentumAnnealingDecay(momentum=-0.1), ValueError, "momentum=-0.1"),
        (lambda: tfav.schedules.InversePowerDecay(power=0), ValueError, "power=0"),
        (lambda: tfav.schedules.InversePowerDecay(gamma=math.inf), ValueError, "gamma=inf"),
        (
            lambda: tfav.schedules.InversePowerDecay(min_decay=0.9, max_decay=0.5),
            ValueError,
            "from 0.9 to 1. Received: max_decay=0.5",
        ),
        (lambda: tfav.schedules.PowerFunctionDecay(-1), ValueError, "gamma=-1"),
        (lambda: tfav.schedules.ConstantLearningRate(-1, 0.1), ValueError, "learning_rate=-1"),
        (lambda: tfav.schedules.ConstantLearningRate(0.1, -1), ValueError, "swa_learning_rate=-1"),
        (lambda: tfav.schedules.ConstantLearningRate(0.1, 0.1, 1.5), TypeError, "start_step=1.5"),
        (lambda: tfav.schedules.ConstantLearningRate(0.1, 0.1, 0, -1), ValueError, "anneal_steps=-1"),
        (lambda: tfav.schedules.ConstantLearningRate(0.1, 0.1, 0, 1, "exp"), ValueError, "'exp'"),
        (lambda: tfav.schedules.CyclicalLearningRate(0.1, 0.1, 0.2, 3), ValueError, "low=0.2"),
        (lambda: tfav.schedules.CyclicalLearningRate(0.1, 0.1, 0.2, 0), ValueError, "low=0.2"),
        (lambda: tfav.schedules.CyclicalLearningRate(0.1, 0.1, 0.1, 0), ValueError, "cycle_steps=0"),
        (lambda: tfav.schedules.CyclicalLearningRate(None, 0.1, 0.1, 1), TypeError, "learning_rate=None"),
    ],
)
def test_wrong_arguments(create, error, message):
    with pytest.raises(error, match=message):
        create()
