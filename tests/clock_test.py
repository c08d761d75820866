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
"""Each average has its own clock: a variable that joins later is averaged as if training began then."""

import warnings

import hypothesis
import keras as keras_3
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

import tf_averaging as tfav
from tests import numpy_averages
from tests import testing_utils
from tests.testing_utils import LEGACY
from tests.testing_utils import average_of
from tests.testing_utils import descend


def modes():
    """Decorator: the step is called eagerly, in a graph, and compiled."""
    options = {"eager": None, "graph": {}, "compiled": {"jit_compile": True}}
    return pytest.mark.parametrize("options", options.values(), ids=options)


# Variables join late with legacy optimizers; the others train only what they were built with.
each_keras = pytest.mark.parametrize("module", [LEGACY, keras_3.optimizers], ids=["legacy", "keras"])


def as_step(options, optimizer, variables, gradients):
    def step():
        optimizer.apply_gradients(list(zip(map(tf.constant, gradients), variables)))

    return step if options is None else tf.function(step, **options)


@modes()
def test_variable_that_joins_late(options):
    first, late = tf.Variable(0.0), tf.Variable(100.0)
    optimizer = tfav.SWA(LEGACY.SGD(1.0), 0, 1)
    step = as_step(options, optimizer, [first], [1.0])
    for _ in range(9):
        step()
    as_step(options, optimizer, [late], [99.0])()
    assert average_of(optimizer, late) == 1.0
    # Nine steps to -9; the tenth left it there.
    np.testing.assert_allclose(average_of(optimizer, first), -(sum(range(1, 10)) + 9) / 10, rtol=1e-6)
    assert optimizer.num_averaged == 10


@modes()
def test_late_variable_has_its_own_warm_up(options):
    first, late = tf.Variable(0.0), tf.Variable(100.0)
    optimizer = tfav.ExponentialMovingAverage(LEGACY.SGD(1.0), average_decay=0.9999)
    step = as_step(options, optimizer, [first], [1.0])
    for _ in range(50):
        step()
    as_step(options, optimizer, [late], [99.0])()
    # Its first decay is 1/10: 0.1 * 100 + 0.9 * 1.
    np.testing.assert_allclose(average_of(optimizer, late), 10.9, rtol=1e-6)


@modes()
def test_step_that_was_traced_before_counts_for_what_it_knows(options):
    """It does not fold the variable that joined after it was traced, and does not count for it."""
    first, late = tf.Variable(0.0), tf.Variable(0.0)
    optimizer = tfav.SWA(LEGACY.SGD(1.0), 0, 1)
    before = as_step(options, optimizer, [first], [1.0])
    for _ in range(3):
        before()
    both = as_step(options, optimizer, [late, first], [1.0, 1.0])
    folded = []
    for _ in range(4):
        both()
        folded.append(late.numpy())
        before()
        if options is None:  # Nothing was traced.
            folded.append(late.numpy())
    np.testing.assert_allclose(average_of(optimizer, late), np.mean(folded), rtol=1e-6)
    np.testing.assert_allclose(average_of(optimizer, first), np.mean(-np.arange(1.0, 12.0)), rtol=1e-6)


@each_keras
@modes()
def test_reset_of_one_variable(options, module):
    first, second = tf.Variable(0.0), tf.Variable(0.0)
    optimizer = tfav.SWA(module.SGD(1.0), 0, 1)
    step = as_step(options, optimizer, [first, second], [1.0, 2.0])
    for _ in range(3):
        step()
    optimizer.reset_averages([second])
    assert average_of(optimizer, second) == -6.0
    step()
    step()
    assert average_of(optimizer, first) == -3.0  # The mean of -1 to -5.
    assert average_of(optimizer, second) == -9.0  # The mean of -8 and -10.
    assert optimizer.num_averaged == 5
    optimizer.reset_averages()
    assert optimizer.num_averaged == 0
    assert average_of(optimizer, first) == -5.0


@each_keras
@modes()
def test_reset_forgets_what_is_no_number(options, module):
    variable = tf.Variable(1.0)
    optimizer = tfav.ExponentialMovingAverage(module.SGD(1.0), average_decay=0.5, dynamic_decay=False)
    step = as_step(options, optimizer, [variable], [0.0])
    step()
    variable.assign(np.nan)
    step()
    variable.assign(4.0)
    step()
    assert np.isnan(average_of(optimizer, variable))
    optimizer.reset_averages()
    step()
    assert average_of(optimizer, variable) == 4.0


def test_reset_of_a_variable_without_an_average():
    optimizer = tfav.SWA(LEGACY.SGD(1.0), 0, 1)
    descend(optimizer, [tf.Variable(1.0)])
    with pytest.raises(KeyError, match="no average"):
        optimizer.reset_averages([tf.Variable(1.0)])


def test_reset_in_a_graph():
    optimizer = tfav.SWA(LEGACY.SGD(1.0), 0, 1)
    descend(optimizer, [tf.Variable(1.0)])
    with pytest.raises(RuntimeError, match="reset_averages.*eager mode"):
        tf.function(optimizer.reset_averages)()


@each_keras
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("as_function", [False, True])
def test_weight_of_one_forgets_whatever_the_average_was(value, as_function, module):
    variable = tf.Variable(value)
    optimizer = tfav.SWA(module.SGD(1.0), 0, 1)
    descend(optimizer, [variable])
    variable.assign(3.0)
    update = (lambda: optimizer.update_average(weight=1.0)) if not as_function else None
    if as_function:
        update = tf.function(lambda: optimizer.update_average(weight=1.0))
    update()
    assert average_of(optimizer, variable) == 3.0


@each_keras
@modes()
@pytest.mark.parametrize("cls", [tfav.ExponentialMovingAverage, tfav.SWA])
def test_updates_by_hand_alone_warm_up_as_in_training(options, cls, module):
    decay = {"average_decay": 0.999} if cls is tfav.ExponentialMovingAverage else {}
    scheme = numpy_averages.ema(0.999) if decay else numpy_averages.swa()
    variable = tf.Variable(1.0)
    optimizer = cls(module.SGD(1.0), average_period=None, **decay)
    optimizer.shadow_copy([variable])
    step = as_step(options, optimizer, [variable], [-1.0])
    update = optimizer.update_average if options is None else tf.function(optimizer.update_average)
    for _ in range(100):
        update()
        step()
    assert optimizer.num_averaged == 100
    # The first update starts from the weights at the call.
    expected = numpy_averages.expected_average(scheme, [1.0, *np.arange(1.0, 101.0)])
    np.testing.assert_allclose(average_of(optimizer, variable), expected, rtol=1e-6)
    assert type(optimizer).from_config(optimizer.get_config()).average_period is None


def test_numbers_by_hand_are_those_of_training():
    """The decay that ends at 0.999 has warmed up to 0.991 after a thousand updates: 900.0, not 999.9."""
    variable = tf.Variable(0.0)
    optimizer = tfav.ExponentialMovingAverage(LEGACY.SGD(), average_decay=0.999, average_period=None)
    optimizer.shadow_copy([variable])
    for value in range(1, 1001):
        variable.assign(value)
        optimizer.update_average()
    np.testing.assert_allclose(average_of(optimizer, variable), 900.0, atol=0.05)


def test_updates_by_hand_at_the_end_of_each_epoch(keras):
    """The recipe: with the callback, and nobody is told that nothing is averaged."""
    optimizer = tfav.SWA(keras.optimizers.SGD(0.1), average_period=None)
    model = testing_utils.new_model(optimizer, keras=keras)
    ends = []

    def update(epoch, logs):
        optimizer.update_average()
        ends.append(testing_utils.values(model.trainable_variables))

    callbacks = [keras.callbacks.LambdaCallback(on_epoch_end=update), tfav.callbacks.SwapAverageWeights()]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.fit(testing_utils.X, testing_utils.Y, epochs=3, verbose=0, callbacks=callbacks)
        with optimizer.swapped_weights():
            averages = testing_utils.values(model.trainable_variables)
    assert optimizer.num_averaged == 3
    for actual, weights in zip(averages, zip(*ends)):
        np.testing.assert_allclose(actual, np.mean(weights, 0, np.float64), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "when"),
    [({"start_averaging": 10**6}, "from step 1000000 on"), ({"average_period": None}, "by hand alone")],
)
def test_averages_that_hold_nothing_are_used_with_a_warning(options, when):
    variable = tf.Variable(1.0)
    optimizer = tfav.SWA(LEGACY.SGD(1.0), **options)
    optimizer.shadow_copy([variable])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with optimizer.swapped_weights():  # Nothing was trained either.
            pass
    descend(optimizer, [variable], steps=3)
    with (
        pytest.warns(UserWarning, match=f"no updates after 3 steps.*{when}"),
        optimizer.swapped_weights(),
    ):
        pass
    with pytest.warns(UserWarning, match=f"no updates after 3 steps.*{when}"):
        optimizer.assign_average_vars([variable])
    assert variable.numpy() == -2.0
    optimizer.update_average()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.assign_average_vars([variable])


SCHEMES = st.one_of(
    st.builds(numpy_averages.swa, st.integers(0, 6), st.integers(1, 3)),
    st.builds(
        numpy_averages.ema,
        st.sampled_from([0.0, 0.5, 0.99]),
        st.integers(0, 6),
        st.booleans(),
        st.integers(1, 3),
    ),
)
# What happens at a step: which variables are trained, and which averages are reset before.
EVENTS = st.lists(
    st.tuples(st.sets(st.integers(0, 3), min_size=1), st.sets(st.integers(0, 3), max_size=1)),
    min_size=1,
    max_size=12,
)


class Oracle:
    """The average of one variable in float64, from when it joined or was reset."""

    def __init__(self, scheme):
        self.scheme = scheme
        self.average, self.began, self.updates = None, None, 0

    def step(self, step, before, after):
        if step < self.scheme.start or (step - self.scheme.start) % self.scheme.period:
            return
        if not self.updates:
            self.average, self.began = before, step
        weight = self.scheme.weight(step - self.began, self.updates)
        self.average += weight * (after - self.average)
        self.updates += 1

    def reset(self):
        self.updates = 0


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(scheme=SCHEMES, events=EVENTS, traced=st.booleans())
def test_variables_that_join_leave_and_are_reset(scheme, events, traced):
    """A new function for each step, so that each knows the variables that have joined by then."""
    optimizer = scheme.wrap(LEGACY.SGD(1.0))
    variables = [tf.Variable(float(10 * index)) for index in range(4)]
    values = [float(10 * index) for index in range(4)]
    oracles = {}
    for step, (trained, reset) in enumerate(events):
        for index in reset & oracles.keys():
            optimizer.reset_averages([variables[index]])
            oracles[index].reset()
        chosen = sorted(trained)
        gradients = [0.5 * index + step for index in chosen]
        as_step({} if traced else None, optimizer, [variables[i] for i in chosen], gradients)()
        before = list(values)
        for index, gradient in zip(chosen, gradients):
            oracles.setdefault(index, Oracle(scheme))
            values[index] -= gradient
        for index, oracle in oracles.items():
            oracle.step(step, before[index], values[index])
    assert optimizer.num_averaged == max(oracle.updates for oracle in oracles.values())
    for index, oracle in oracles.items():
        expected = oracle.average if oracle.updates else values[index]
        np.testing.assert_allclose(
            average_of(optimizer, variables[index]), expected, rtol=1e-5, atol=1e-5
        )
