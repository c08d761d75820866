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
"""Training loops that record every step, and the averages' definition in float64 NumPy."""

from typing import Callable, List, NamedTuple, Sequence

import numpy as np
import tensorflow as tf
import tf_keras

import tf_averaging as tfav


def read(strategy, variable) -> np.ndarray:
    """The values on all replicas, stacked."""
    return np.stack([value.numpy() for value in strategy.experimental_local_results(variable)])


def read_all(strategy, variables) -> List[np.ndarray]:
    return [read(strategy, variable) for variable in variables]


def as_float64(value: np.ndarray) -> np.ndarray:
    return value.astype(np.complex128 if np.iscomplexobj(value) else np.float64)


class Scheme(NamedTuple):
    """A way to average.

    Attributes:
      wrap: (inner optimizer, **options) -> wrapper.
      start: first step on which an update is due.
      period: steps from one update to the next.
      weight: (steps since start, updates so far) -> weight of the weights in the new average.
    """

    wrap: Callable
    start: int
    period: int
    weight: Callable[[int, int], float]


def ema_weight(average_decay: float = 0.99, dynamic: bool = True) -> Callable[[int, int], float]:
    return lambda s, n: 1 - (min(average_decay, (1 + s) / (10 + s)) if dynamic else average_decay)


SWA = Scheme(lambda inner, **options: tfav.SWA(inner, 2, 3, **options), 2, 3, lambda s, n: 1 / (n + 1))
EMA = Scheme(lambda inner, **options: tfav.ExponentialMovingAverage(inner, **options), 0, 1, ema_weight())
SCHEMES = {"SWA": SWA, "EMA": EMA}


def expected_average(
    scheme: Scheme, weights: Sequence[np.ndarray], skipped: Sequence[int] = (), created: int = 0
):
    """The average of one variable, by definition.

    Args:
      scheme: its `wrap` is not used.
      weights: the variable before the first step and after each step.
      skipped: steps that loss scaling skipped.
      created: the first step that knew the variable.

    Returns:
      (the average, the number of updates in it).
    """
    average, count = None, 0
    for step in range(len(weights) - 1):
        since = step - scheme.start
        if since < 0 or since % scheme.period != 0 or step in skipped:
            continue
        if step >= created:
            if average is None:
                # The average begins with the first update, or with the variable where that comes later.
                average = as_float64(weights[created if count else step])
            average += scheme.weight(since, count) * (as_float64(weights[step + 1]) - average)
        count += 1
    return (weights[-1] if average is None else average), count


class Run(NamedTuple):
    """What a training run leaves behind; `history` is indexed by step (0: before training), variable."""

    optimizer: tf_keras.optimizers.Optimizer
    variables: List[tf.Variable]
    history: List[List[np.ndarray]]


def assert_same_training(strategy, bare: Run, wrapped: Run):
    """Asserts that weights at every step and inner state at the end are equal, bit for bit."""
    assert len(bare.history) == len(wrapped.history)
    for step, (expected, actual) in enumerate(zip(bare.history, wrapped.history)):
        for index, (a, b) in enumerate(zip(expected, actual)):
            assert_same_bits(b, a, f"variable {index}, step {step}")
    assert_same_state(strategy, bare.optimizer, wrapped.optimizer.inner_optimizer)


def assert_same_state(strategy, bare, inner):
    """Asserts that two optimizers hold the same values in their variables."""
    expected, actual = (read_all(strategy, inner_state(optimizer)) for optimizer in (bare, inner))
    assert len(expected) == len(actual)
    for index, (a, b) in enumerate(zip(expected, actual)):
        assert_same_bits(b, a, f"optimizer variable {index}")


def assert_same_bits(actual: np.ndarray, expected: np.ndarray, message: str = ""):
    """Equal to the last bit: unlike `assert_array_equal`, this tells -0.0 from 0.0."""
    np.testing.assert_array_equal(actual, expected, err_msg=message)
    assert actual.tobytes() == expected.tobytes(), message


def inner_state(optimizer) -> List[tf.Variable]:
    """All variables of an optimizer of either generation."""
    variables = optimizer.variables
    return list(variables() if callable(variables) else variables)


def assert_averages(
    strategy, run: Run, scheme: Scheme, skipped: Sequence[int] = (), created: Sequence[int] = ()
):
    """Asserts that every variable's average is what the recorded weights say.

    Args:
      strategy: the one that `run` used.
      run: weights and averages.
      scheme: how they were averaged.
      skipped: steps that loss scaling skipped.
      created: for each variable the first step that knew it; empty for all zeros.
    """
    for index, variable in enumerate(run.variables):
        history = [weights[index] for weights in run.history]
        expected, count = expected_average(scheme, history, skipped, *created[index : index + 1])
        actual = as_float64(read(strategy, run.optimizer.get_slot(variable, "average")))
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6, err_msg=f"variable {index}")
        assert run.optimizer.num_averaged.numpy() == count


KERNEL, TABLE, BIAS, SCALAR = VALUES = [
    np.linspace(-1.2, 1.3, 12, dtype=np.float32).reshape(4, 3),
    np.linspace(0.9, -0.8, 10, dtype=np.float32).reshape(5, 2),
    np.array([0.3, -0.7, 1.1], np.float32),
    np.float32(0.6),
]


def loss_of(variables: Sequence[tf.Variable], step: tf.Tensor) -> tf.Tensor:
    """A loss that differs from step to step and replica to replica.

    A variable shaped like `TABLE` gets `tf.IndexedSlices` with duplicate indices for its gradient.
    """
    replica = tf.distribute.get_replica_context().replica_id_in_sync_group
    loss = 0.0
    for position, variable in enumerate(variables, start=1):
        used = tf.gather(variable, [3, 1, 3, 4]) if variable.shape == TABLE.shape else variable
        target = tf.cast(tf.cast(step + replica, tf.float32) / position, used.dtype)
        loss += tf.cast(tf.reduce_sum(tf.square(used - target) / 2), tf.float32)
    return loss


def gradients_of_loss(variables: Sequence[tf.Variable], step: tf.Tensor) -> list:
    with tf.GradientTape() as tape:
        loss = loss_of(variables, step)
    return tape.gradient(loss, variables)


def train(
    strategy,
    make_optimizer: Callable[[], tf_keras.optimizers.Optimizer],
    gradients: Callable[[Sequence[tf.Variable], tf.Tensor], list] = gradients_of_loss,
    values: Sequence[np.ndarray] = VALUES,
    steps: int = 6,
    as_function: bool = False,
    apply_options=(),
    **variable_options,
) -> Run:
    """Trains with a custom loop, eager or as a `tf.function`.

    Args:
      strategy: to train under.
      make_optimizer: called in its scope.
      gradients: (variables, step) -> their gradients, on one replica.
      values: what the variables start from.
      steps: how many.
      as_function: whether the step is a `tf.function`.
      apply_options: keyword arguments for `apply_gradients`, as a dict.
      **variable_options: for `tf.Variable`.
    """
    with strategy.scope():
        variables = [tf.Variable(value, **variable_options) for value in values]
        optimizer = make_optimizer()

    def replica_step(step):
        optimizer.apply_gradients(zip(gradients(variables, step), variables), **dict(apply_options))

    def train_step(step):
        strategy.run(replica_step, args=(step,))

    if as_function:
        train_step = tf.function(train_step)
    history = [read_all(strategy, variables)]
    for step in range(steps):
        train_step(tf.constant(step))
        history.append(read_all(strategy, variables))
    return Run(optimizer, variables, history)


def make_model(**dense_options) -> tf_keras.Model:
    """Two dense layers; the same weights each time."""
    tf_keras.utils.set_random_seed(1)
    return tf_keras.Sequential(
        [
            tf_keras.layers.Dense(3, activation="tanh", input_shape=(4,), **dense_options),
            tf_keras.layers.Dense(1, dtype="float32"),
        ]
    )


def make_data(batches: int = 6):
    """Inputs and targets, for batches of 4."""
    inputs = np.random.RandomState(2).normal(size=(4 * batches, 4)).astype(np.float32)
    return inputs, inputs.sum(axis=1, keepdims=True) * 0.3


class RecordWeights(tf_keras.callbacks.Callback):
    """Records the trainable weights before training and after each batch (or execution)."""

    def __init__(self, strategy):
        super().__init__()
        self.history = []
        self._strategy = strategy

    def on_train_begin(self, logs=None):
        self.on_train_batch_end(-1)

    def on_train_batch_end(self, batch, logs=None):
        self.history.append(read_all(self._strategy, self.model.trainable_variables))


def fit(
    strategy,
    make_optimizer: Callable[[], tf_keras.optimizers.Optimizer],
    build_model: Callable[[], tf_keras.Model] = make_model,
    data=None,
    epochs: int = 1,
    callbacks=(),
    **compile_options,
) -> Run:
    """Trains with `Model.fit`, in batches of 4 and in order."""
    with strategy.scope():
        model = build_model()
        optimizer = make_optimizer()
        model.compile(optimizer, "mse", **compile_options)
    record = RecordWeights(strategy)
    inputs, targets = make_data() if data is None else data
    model.fit(
        inputs,
        targets,
        batch_size=4,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[record, *callbacks],
    )
    return Run(optimizer, model.trainable_variables, record.history)
