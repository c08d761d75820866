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
"""An update of an embedding's average costs what the step touches, and the average is the same."""

import threading

import hypothesis
import keras as keras_3
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from hypothesis import strategies as st

import tf_averaging as tfav
from tests import numpy_averages
from tests.testing_utils import CURRENT
from tests.testing_utils import LEGACY
from tf_averaging import kerases
from tf_averaging.core import rows as core_rows

KERAS_3 = keras_3.optimizers
ROWS, WIDTH = 23, 3
TABLE = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)

# Of each optimizer that moves the rows alone that it has gradients for, and of each generation.
SPARSE = {
    "SGD": lambda: CURRENT.SGD(0.1),
    "Adagrad": lambda: CURRENT.Adagrad(0.1, clipnorm=1.0),
    "legacy SGD": lambda: LEGACY.SGD(0.1, clipvalue=0.5),
    "legacy Adagrad": lambda: LEGACY.Adagrad(0.1),
    "legacy Ftrl": lambda: LEGACY.Ftrl(0.1, global_clipnorm=1.0),
    "Keras 3 SGD": lambda: KERAS_3.SGD(0.1, clipnorm=1.0),
    "Keras 3 Adagrad": lambda: KERAS_3.Adagrad(0.1, clipvalue=0.5),
}
around_each = pytest.mark.parametrize("make", SPARSE.values(), ids=SPARSE.keys())
around_two = pytest.mark.parametrize("name", ["Adagrad", "Keras 3 Adagrad"])


@pytest.fixture(autouse=True, scope="module")
def tables_are_large():
    """Small tables are updated as a whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core_rows, "MIN_BYTES", 0)
        patch.setattr(core_rows, "_BLOCK", 5 * WIDTH)  # Several blocks, the last of which overlap.
        yield


@tf_keras.saving.register_keras_serializable("embedding_test")
@keras_3.saving.register_keras_serializable("embedding_test")
class Cycle(tfav.AveragedOptimizerWrapper):
    """A user's scheme whose weights are from 0 to 1, both included."""

    WEIGHTS = np.array([0.3, 0.0, 0.7, 0.01, 0.5, 1.0, 0.2])

    def averaging_weight(self, steps, updates):
        return tf.gather(tf.constant(self.WEIGHTS), (updates + 3 * steps) % len(self.WEIGHTS))


def cycle(start=0, period=1) -> numpy_averages.Scheme:
    def wrap(inner):
        return Cycle(inner, start_averaging=start, average_period=period)

    return numpy_averages.Scheme(
        wrap, start, period, lambda s, n: Cycle.WEIGHTS[(n + 3 * s) % len(Cycle.WEIGHTS)]
    )


class Training:
    """A table that is trained, and what its average must be, step by step.

    Args:
      scheme: how it is averaged.
      inner: the optimizer.
      as_function: whether the step is a `tf.function`.
    """

    def __init__(self, scheme, inner, as_function=True, **compile_options):
        self.scheme, self.optimizer = scheme, scheme.wrap(inner)
        is_keras_3 = isinstance(inner, KERAS_3.Optimizer)
        make = keras_3.Variable if is_keras_3 else tf.Variable
        self.table, self.bias = make(TABLE), make(np.ones(2, np.float32))
        self.variable = kerases.tf_variable(self.table) if is_keras_3 else self.table
        self.optimizer.build([self.table, self.bias])
        self.history = [self.variable.numpy()]
        spec = [tf.TensorSpec([None], tf.int32), tf.TensorSpec([None, WIDTH], tf.float32)]
        self._step = tf.function(self._apply, spec, **compile_options) if as_function else self._apply

    def _apply(self, indices, values):
        slices = tf.IndexedSlices(values, indices, tf.constant([ROWS, WIDTH]))
        self.optimizer.apply_gradients([(slices, self.table), (tf.ones([2]), self.bias)])

    def start_anew(self):
        self.variable.assign(TABLE)
        self.optimizer.reset_averages()
        kerases_steps = self.optimizer.iterations
        kerases_steps.assign(0)
        self.history = [self.variable.numpy()]

    def step(self, indices):
        random = np.random.default_rng(len(self.history))
        values = random.normal(size=(len(indices), WIDTH)).astype(np.float32)
        self._step(tf.constant(indices, tf.int32), tf.constant(values))
        self.note()

    def steps(self, number, width=3):
        for _ in range(number):
            random = np.random.default_rng(len(self.history))
            self.step(random.integers(0, ROWS, size=width).tolist())

    def note(self):
        """Notes that a step was taken."""
        self.history.append(self.variable.numpy())

    def expected(self):
        return numpy_averages.expected_average(self.scheme, self.history)

    def check(self, actual=None):
        actual = self.optimizer.get_average(self.table) if actual is None else actual
        np.testing.assert_allclose(actual, self.expected(), rtol=0, atol=1e-6 * np.abs(TABLE).max())

    def is_sparse(self) -> bool:
        return [v is self.variable for v in self.optimizer.sparse_variables] == [True]


# The average is what its definition says.

PLANS = st.lists(
    st.one_of(
        st.lists(st.integers(0, ROWS - 1), max_size=7),
        st.sampled_from(["read", "swap", "save", "many"]),
    ),
    min_size=5,
    max_size=40,
)
SCHEMES = {
    "EMA": numpy_averages.ema(0.99),
    "EMA from step 3, every second": numpy_averages.ema(0.9, 3, False, 2),
    "SWA": numpy_averages.swa(),
    "SWA from step 2, every third": numpy_averages.swa(2, 3),
    "user's": cycle(),
    "user's from step 1, every second": cycle(1, 2),
}


@pytest.mark.parametrize(
    ("optimizer", "scheme"),
    [*zip([*SPARSE, "SGD"], 2 * list(SCHEMES)), ("Keras 3 SGD", "user's"), ("Adagrad", "SWA")],
)
@pytest.mark.parametrize("as_function", [True, False], ids=["graph", "eager"])
def test_average_is_that_of_all_steps(optimizer, scheme, as_function):
    training = Training(SCHEMES[scheme], SPARSE[optimizer](), as_function)

    @hypothesis.settings(max_examples=6 if as_function else 2, deadline=None, derandomize=True)
    @hypothesis.given(PLANS)
    def follow(plan):
        training.start_anew()
        for action in plan:
            if isinstance(action, list):
                training.step(action)
            elif action == "many":
                training.steps(20 if as_function else 2)
            elif action == "read":
                training.check()
            elif action == "swap":
                with training.optimizer.swapped_weights():
                    training.check(training.variable.numpy())
                    training.check()
                np.testing.assert_array_equal(training.variable.numpy(), training.history[-1])
            else:
                training.check(training.optimizer.get_weights()[training_index(training.optimizer)])
        training.check()

    def training_index(optimizer):
        shapes = [weight.shape for weight in optimizer.get_weights()]
        return len(shapes) - 1 - shapes[::-1].index(TABLE.shape)

    follow()
    assert training.is_sparse()


@around_two
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_average_after_500_steps(name, scheme):
    training = Training(scheme, SPARSE[name]())
    training.steps(500)
    assert training.is_sparse()
    training.check()
