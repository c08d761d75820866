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
"""The wrapper is a Keras optimizer: every way to take a step, its settings, slots and state."""

import copy

import keras as keras_3
import numpy as np
import pytest
import tensorflow as tf

import tf_averaging as tfav
from tests import testing_utils
from tests.numpy_averages import EMA
from tests.numpy_averages import SWA
from tests.testing_utils import CURRENT
from tests.testing_utils import KERAS
from tests.testing_utils import LEGACY
from tests.testing_utils import average_of
from tests.testing_utils import both_generations
from tests.testing_utils import descend
from tests.testing_utils import trained_variable

# Other ways to take a step.


def values_after_minimize(optimizer, style, as_function, grad_loss=None):
    """The variable after two steps on sum(x**3 / 3), or on the vector x**3 / 3 with `grad_loss`."""
    x = tf.Variable(testing_utils.BIAS)
    weights = {} if grad_loss is None else {"grad_loss": tf.constant(grad_loss)}

    def loss():
        return x**3 / 3

    def step():
        if style == "callable":
            optimizer.minimize(loss, [x], **weights)
        elif style == "callable variables":
            optimizer.minimize(loss, lambda: [x], **weights)
        else:
            with tf.GradientTape() as tape:
                value = loss()
            optimizer.minimize(value, [x], tape=tape, **weights)

    step = tf.function(step) if as_function else step
    for _ in range(2):
        step()
    return x.numpy(), x


@pytest.mark.parametrize("grad_loss", [None, [1.0, 0.0, -2.0]], ids=["", "grad_loss"])
@pytest.mark.parametrize("style", ["callable", "callable variables", "tape"])
@pytest.mark.parametrize("as_function", [False, True], ids=["eager", "function"])
@both_generations
def test_minimize(module, as_function, style, grad_loss):
    # Of the optimizers without a wrapper, the legacy ones alone take `grad_loss`.
    bare = LEGACY.SGD(0.1) if grad_loss else module.SGD(0.1)
    expected, _ = values_after_minimize(bare, style, as_function, grad_loss)
    optimizer = EMA.wrap(module.SGD(0.1))
    actual, variable = values_after_minimize(optimizer, style, as_function, grad_loss)
    testing_utils.assert_same_bits([actual], [expected])
    x = [testing_utils.BIAS.astype(np.float64)]
    for _ in range(2):
        x.append(x[-1] - 0.1 * x[-1] ** 2 * (1.0 if grad_loss is None else np.array(grad_loss)))
    np.testing.assert_allclose(actual, x[2], rtol=1e-6)
    average = 0.1 * x[0] + 0.9 * x[1]  # Decays: 1/10, 2/11.
    average = 2 / 11 * average + 9 / 11 * x[2]
    np.testing.assert_allclose(average_of(optimizer, variable), average, rtol=1e-6)


def expected_of_get_updates():
    """Weights and their SWA (start 1, period 2) after 4 steps of SGD(0.1, momentum 0.5) on sum(x**2)."""
    x, velocity, snapshots = testing_utils.BIAS.astype(np.float64), 0.0, []
    for step in range(4):
        velocity = 0.5 * velocity - 0.1 * 2 * x
        x = x + velocity
        if step in (1, 3):
            snapshots.append(x)
    return x, np.mean(snapshots, axis=0)


@both_generations
def test_get_updates_in_function(module):
    weight = tf.Variable(testing_utils.BIAS)
    optimizer = tfav.SWA(module.SGD(0.1, momentum=0.5), 1, 2)

    @tf.function
    def step():
        optimizer.get_updates(tf.reduce_sum(weight**2), [weight])
        return optimizer.get_gradients(tf.reduce_sum(weight**2), [weight])

    for _ in range(4):
        (gradient,) = step()
    expected, average = expected_of_get_updates()
    np.testing.assert_allclose(weight, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, 2 * expected, rtol=1e-6)
    np.testing.assert_allclose(average_of(optimizer, weight), average, rtol=1e-6)


# How the inner optimizer is given, and its settings.


def check(make_inner, wrap):
    """Training is that of the bare inner optimizer, bit for bit, and the averages follow."""
    strategy = tf.distribute.get_strategy()
    bare, wrapped = (testing_utils.train(strategy, make) for make in (make_inner, wrap))
    testing_utils.assert_same_training(bare, wrapped)
    testing_utils.assert_averages(wrapped, SWA)


def test_instance_is_used_itself():
    inner = CURRENT.Adam()
    assert SWA.wrap(inner).inner_optimizer is inner


SCHEDULE = KERAS.optimizers.schedules.ExponentialDecay(0.3, 2, 0.5)
KERAS_3 = keras_3.optimizers  # What a name means, as `tf.keras` is Keras 3.
SCHEDULE_3 = KERAS_3.schedules.ExponentialDecay(0.3, 2, 0.5)
LEGACY_SGD = {"class_name": "SGD", "config": {"momentum": 0.5}, "module": "keras.optimizers.legacy"}


@pytest.mark.parametrize(
    ("given", "options", "make_inner"),
    [
        *((name, {}, lambda name=name: KERAS_3.get(name)) for name in ("sgd", "Adam", "rmsprop")),
        *(
            ("adam", {rate: 0.05, "clipvalue": 0.2}, lambda: KERAS_3.Adam(0.05, clipvalue=0.2))
            for rate in ("lr", "learning_rate")
        ),
        ("sgd", {"learning_rate": SCHEDULE_3}, lambda: KERAS_3.SGD(SCHEDULE_3)),
        *(
            (
                CURRENT.serialize(module.SGD(SCHEDULE, momentum=0.5)),
                options,
                lambda module=module, options=options: module.SGD(SCHEDULE, momentum=0.5, **options),
            )
            for module in (CURRENT, LEGACY)
            for options in ({}, {"clipnorm": 0.3})
        ),
        (
            LEGACY_SGD,
            {"learning_rate": 0.2, "decay": 0.3, "clipvalue": 0.4},
            lambda: LEGACY.SGD(0.2, momentum=0.5, decay=0.3, clipvalue=0.4),
        ),
    ],
)
def test_by_name_and_by_config_with_settings(given, options, make_inner):
    """A config takes the settings that it does not mention, and is left as it is, deeply."""
    before = copy.deepcopy(given)
    check(make_inner, lambda: SWA.wrap(given, **options))
    assert given == before


@pytest.mark.parametrize("name", ["learning_rate", "lr"])
@both_generations
def test_setting_the_learning_rate(module, name):
    optimizer = SWA.wrap(module.SGD(0.5))
    weight = trained_variable(optimizer, 1.0, 1.0)
    setattr(optimizer, name, 0.125)
    descend(optimizer, [weight])
    assert weight.numpy() == 1 - 0.5 - 0.125
    for owner in (optimizer, optimizer.inner_optimizer):
        assert float(owner.learning_rate) == float(owner.lr) == 0.125


@pytest.mark.parametrize(
    ("strategy", "module", "scheme"),
    [("default", CURRENT, SWA), ("mirrored", LEGACY, EMA)],
    indirect=["strategy"],
    ids=["default-current-SWA", "mirrored-legacy-EMA"],
)
def test_learning_rate_scheduler_callback(strategy, module, scheme):
    def fit(make):
        halve = KERAS.callbacks.LearningRateScheduler(lambda epoch, lr: 0.5 * lr if epoch else 0.2)
        return testing_utils.fit(strategy, make, epochs=3, callbacks=[halve])

    wrapped = fit(lambda: scheme.wrap(module.SGD(0.1)))
    testing_utils.assert_same_training(fit(lambda: module.SGD(0.1)), wrapped)
    assert wrapped.optimizer.inner_optimizer.learning_rate.numpy() == np.float32(0.2) / 4


@both_generations
def test_reduce_lr_on_plateau_callback(module):
    """With a margin that no loss can beat, the rate halves after each epoch but the first."""
    halve = KERAS.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=1e9)
    wrapped = testing_utils.fit(
        tf.distribute.get_strategy(), lambda: EMA.wrap(module.SGD(0.1)), epochs=3, callbacks=[halve]
    )
    assert wrapped.optimizer.inner_optimizer.learning_rate.numpy() == np.float32(0.1) / 4


# Slots and state.


def test_slot_names():
    assert tfav.SWA(CURRENT.SGD()).get_slot_names() == ["average"]


def test_slots_are_there_in_the_scope_and_outside(strategy):
    with strategy.scope():
        variable = tf.Variable([1.0, 2.0])
        optimizer = tfav.SWA(CURRENT.SGD())
        optimizer.shadow_copy([variable])
        average = optimizer.get_slot(variable, "average")
    assert optimizer.get_slot(variable, "average") is average


def test_slots_of_a_legacy_inner_optimizer():
    optimizer = tfav.SWA(LEGACY.SGD(0.1, momentum=0.9))
    variable = trained_variable(optimizer, [1.0, 2.0])
    momentum = optimizer.get_slot(variable, "momentum")
    assert momentum is optimizer.inner_optimizer.get_slot(variable, "momentum")
    extra = optimizer.add_slot(variable, "extra", "ones", shape=[3])
    np.testing.assert_array_equal(extra.numpy(), [1.0, 1.0, 1.0])
    assert optimizer.get_slot(variable, "extra") is extra
    counter = optimizer.add_weight("counter", [], dtype=tf.int64, trainable=False)
    assert counter.dtype == tf.int64


def test_add_slot_creates_the_average():
    variable = tf.Variable([1.0, 2.0])
    optimizer = tfav.SWA(CURRENT.SGD())
    np.testing.assert_array_equal(optimizer.add_slot(variable, "average").numpy(), [1.0, 2.0])
    assert optimizer.has_shadow_copy


@both_generations
def test_weights_are_all_state(strategy, module):
    """That they resume exactly is shown in `resume_test.py`."""
    model = testing_utils.new_model(lambda: EMA.wrap(module.Adam(0.01)), strategy=strategy)
    testing_utils.fit_steps(model, 5)
    optimizer = model.optimizer
    state = optimizer.get_weights()
    assert state[0] == 5
    assert len(state) == len(optimizer.variables) == len(optimizer.variables()) == len(optimizer.weights)


# Beside other code.


def test_two_optimizers_in_one_step(strategy):
    """As for a GAN: each averages its own variables, and is swapped alone."""
    with strategy.scope():
        first, second = tf.Variable(0.0), tf.Variable(0.0)
        optimizers = [tfav.SWA(CURRENT.SGD(1.0), 0, 1) for _ in range(2)]

    def on_replica():
        share = -1.0 / strategy.num_replicas_in_sync
        descend(optimizers[0], [first], 2 * share)
        descend(optimizers[1], [second], 4 * share)

    step = tf.function(lambda: strategy.run(on_replica))
    step()
    step()
    with optimizers[0].swapped_weights():
        assert (first.numpy(), second.numpy()) == (3.0, 8.0)
    with optimizers[1].swapped_weights():
        assert (first.numpy(), second.numpy()) == (4.0, 6.0)


def test_many_steps_leave_one_graph():
    """Nothing is traced again, however many steps are taken."""
    variable, optimizer = tf.Variable(0.0), tfav.SWA(CURRENT.SGD(1.0), 5, 3)
    step = tf.function(lambda: descend(optimizer, [variable]))
    step()
    traced = step.experimental_get_tracing_count()
    for _ in range(20):
        step()
    assert step.experimental_get_tracing_count() == traced


@pytest.mark.parametrize("rate", [0.1, KERAS.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5)])
def test_libraries_that_ask_for_a_legacy_optimizer_get_one_that_averages(rate):
    optimizer = tfav.SWA(CURRENT.SGD(rate), 0, 1)
    converted = KERAS.__internal__.optimizers.convert_to_legacy_optimizer(optimizer)
    assert isinstance(converted, tfav.SWA)
    variable = tf.Variable(1.0)
    converted.apply_gradients([(tf.constant(1.0), variable)])
    np.testing.assert_allclose(converted.get_average(variable), 0.9, rtol=1e-6)


class Lookahead(CURRENT.Optimizer):
    """A wrapper that uses the optimizer inside for the arithmetic of one variable."""

    def __init__(self, optimizer, name="Lookahead"):
        super().__init__(name)
        self._optimizer = optimizer
        self._learning_rate = optimizer._learning_rate

    def build(self, var_list):
        super().build(var_list)
        self._optimizer.build(var_list)

    def apply_gradients(self, grads_and_vars, **options):
        self._optimizer._iterations = self._iterations
        return super().apply_gradients(grads_and_vars, **options)

    def update_step(self, gradient, variable):
        self._optimizer.update_step(gradient, variable)

    def get_config(self):
        return {}


def test_wrapper_that_passes_over_the_averages_belongs_inside():
    variable = tf.Variable(1.0)
    outside = Lookahead(tfav.SWA(CURRENT.SGD(0.5)))
    with pytest.raises(NotImplementedError, match=r"outside: `SWA\(YourWrapper"):
        outside.apply_gradients([(tf.constant(1.0), variable)])
    inside = tfav.SWA(Lookahead(CURRENT.SGD(0.5)), 0, 1)
    inside.apply_gradients([(tf.constant(1.0), variable)])
    assert inside.get_average(variable) == 0.5
