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
"""Models, training loops that record every step, and what is compared afterwards.

`KERAS` is the Keras that helpers use where none is given; nothing else here names one.
"""

import importlib
import inspect
from typing import Callable, Iterable, List, NamedTuple, Sequence, Union

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as KERAS

import tf_averaging as tfav
from tests import numpy_averages
from tf_averaging import kerases

CURRENT, LEGACY = KERAS.optimizers, KERAS.optimizers.legacy
GENERATIONS = {"current": CURRENT, "legacy": LEGACY}

both_generations = pytest.mark.parametrize("module", [CURRENT, LEGACY], ids=list(GENERATIONS))
early_or_late = pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
with_loss_scaling = pytest.mark.parametrize("loss_scaling", [False, True], ids=["", "loss_scaling"])
swapped_or_not = pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])


# Reading and comparing.


def read(variable) -> np.ndarray:
    """The values on all replicas of this process, stacked."""
    variable = kerases.tf_variable(variable)
    return np.stack([value.numpy() for value in getattr(variable, "values", [variable])])


def read_all(variables) -> List[np.ndarray]:
    return [read(variable) for variable in variables]


def values(variables) -> List[np.ndarray]:
    return [variable.numpy() for variable in variables]


def bits(things: Iterable) -> list:
    """Of variables (on all replicas) or arrays: NaN equals NaN here, and -0.0 differs from 0.0."""
    arrays = [np.asarray(x) if isinstance(x, (np.ndarray, np.generic)) else read(x) for x in things]
    return [(array.dtype, array.shape, array.tobytes()) for array in arrays]


def assert_same_bits(actual: Iterable, expected: Iterable, message: str = "") -> None:
    """Equal to the last bit, and so that a failure shows the values."""
    actual, expected = list(actual), list(expected)
    assert len(actual) == len(expected), message
    for index, (a, b) in enumerate(zip(actual, expected)):
        if bits([a]) != bits([b]):
            np.testing.assert_array_equal(a, b, err_msg=f"{message}, number {index}")
            pytest.fail(f"{message}, number {index}: the bits of {a} are not those of {b}")


def average_of(optimizer, variable) -> np.ndarray:
    """The average as the slot has it: while swapped it holds the weights."""
    return optimizer.get_slot(variable, "average").numpy()


def averages_of(optimizer, variables) -> List[np.ndarray]:
    return [average_of(optimizer, variable) for variable in variables]


def has_average(optimizer, variable) -> bool:
    try:
        return optimizer.get_slot(variable, "average") is not None
    except KeyError:
        return False


def shipped_optimizers(module) -> dict:
    """Every optimizer class that Keras has in this module, by name."""
    classes = {name: cls for name, cls in vars(module).items() if inspect.isclass(cls)}
    return {
        name: cls
        for name, cls in classes.items()
        if issubclass(cls, module.Optimizer) and cls is not module.Optimizer
    }


def keras_of(module):
    """The Keras that a module of optimizers is of."""
    return importlib.import_module(module.__name__.partition(".")[0])


def state_variables(optimizer) -> List[tf.Variable]:
    """All variables of an optimizer of either generation."""
    variables = optimizer.variables
    return list(variables() if callable(variables) else variables)


def averaging(optimizer) -> tfav.AveragedOptimizerWrapper:
    """The averaging optimizer, which may be inside a LossScaleOptimizer."""
    wraps = isinstance(optimizer, tfav.AveragedOptimizerWrapper)
    return optimizer if wraps else optimizer.inner_optimizer


def count_as(optimizer, updates: int) -> None:
    """Makes the averages, which hold at least one update, hold this many."""
    optimizer.update_average()
    weights = [variable.numpy() for variable in optimizer.variables]
    for value, variable in zip(weights, optimizer.variables):
        if "clocks" in variable.name:
            value[1] = updates
    optimizer.set_weights(weights)


class Run(NamedTuple):
    """What a training run leaves behind; `history` is indexed by step (0: before training), variable."""

    optimizer: KERAS.optimizers.Optimizer
    variables: List[tf.Variable]
    history: List[List[np.ndarray]]
    model: object = None


def assert_same_training(bare: Run, wrapped: Run) -> None:
    """Asserts that weights at every step and inner state at the end are equal, bit for bit."""
    assert len(bare.history) == len(wrapped.history)
    for step, (expected, actual) in enumerate(zip(bare.history, wrapped.history)):
        assert_same_bits(actual, expected, f"step {step}")
    inner = wrapped.optimizer.inner_optimizer
    state = [read_all(state_variables(optimizer)) for optimizer in (inner, bare.optimizer)]
    assert_same_bits(*state, "state of the optimizer")


def assert_averages(
    run: Run,
    scheme: numpy_averages.Scheme,
    skipped: Sequence[int] = (),
    created: Sequence[int] = (),
    tolerance: float = 2e-6,
) -> None:
    """Asserts that every variable's average is what the recorded weights say, on all replicas.

    Args:
      run: weights and averages.
      scheme: how they were averaged.
      skipped: steps that loss scaling skipped.
      created: for each variable the first step that knew it; empty for all zeros.
      tolerance: relative to the largest weight that the variable has had.
    """
    for index, variable in enumerate(run.variables):
        weights = [values[index] for values in run.history]
        expected = numpy_averages.expected_average(scheme, weights, skipped, *created[index : index + 1])
        actual = numpy_averages.as_float64(read(run.optimizer.get_slot(variable, "average")))
        finite = np.where(np.isfinite(weights), np.abs(weights), 0)
        atol = tolerance * np.max(finite, initial=0)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, err_msg=f"variable {index}")
        if all(len(set(bits(replicas))) == 1 for replicas in weights):
            assert len(set(bits(actual))) == 1, f"variable {index} differs between the replicas"
    due = numpy_averages.due_steps(scheme, len(run.history) - 1, skipped)
    assert run.optimizer.num_averaged.numpy() == len(due)


# Training variables, in a custom loop.


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
    make_optimizer: Callable,
    gradients: Callable[[Sequence[tf.Variable], tf.Tensor], list] = gradients_of_loss,
    values: Sequence[np.ndarray] = VALUES,
    steps: Union[int, Sequence] = 6,
    as_function: bool = False,
    apply_options=(),
    **variable_options,
) -> Run:
    """Trains with a custom loop, eager or as a `tf.function`.

    Args:
      strategy: to train under.
      make_optimizer: called in its scope.
      gradients: (variables, element of `steps`) -> their gradients, on one replica.
      values: what the variables start from.
      steps: how many, or a number or array for each.
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
    history = [read_all(variables)]
    for step in range(steps) if isinstance(steps, int) else steps:
        train_step(tf.constant(step))
        history.append(read_all(variables))
    return Run(optimizer, variables, history)


def descend(optimizer, variables, gradient: float = 1.0, steps: int = 1) -> None:
    """Takes steps with this gradient for every element of the variables."""
    for _ in range(steps):
        optimizer.apply_gradients([(tf.fill(v.shape, tf.cast(gradient, v.dtype)), v) for v in variables])


def trained_variable(optimizer, value=0.0, gradient: float = -1.0, steps: int = 1) -> tf.Variable:
    """A variable that starts at `value` and has taken these steps."""
    variable = tf.Variable(value)
    descend(optimizer, [variable], gradient, steps)
    return variable


# Training models.


BATCH = 8
X = np.random.default_rng(0).normal(size=(20 * BATCH, 4)).astype(np.float32)
Y = X[:, :1] - 2.0 * X[:, 1:2]


def new_model(
    optimizer=None,
    units: Sequence[int] = (3, 1),
    inputs: int = 4,
    batch_norm: bool = False,
    loss_scaling: bool = False,
    strategy=None,
    seed: int = 1,
    keras=KERAS,
    **layer_options,
):
    """Dense layers `layer0`, `layer1`, ..., with batch normalization (`bn`) after the first if asked for.

    Args:
      optimizer: the model is compiled with it, or with what it returns if it is a function; None for not.
      units: the width of each layer.
      inputs: the width of the inputs.
      batch_norm: whether there is batch normalization.
      loss_scaling: whether to put a LossScaleOptimizer around the optimizer.
      strategy: everything is created in its scope.
      seed: models of one seed and shape have the same weights.
      keras: the Keras that the model is of.
      **layer_options: for all layers but the last, which computes in float32.
    """
    keras.utils.set_random_seed(seed)
    with (strategy or tf.distribute.get_strategy()).scope():
        layers = [
            keras.layers.Dense(u, name=f"layer{i}", activation="tanh", **layer_options)
            for i, u in enumerate(units[:-1])
        ]
        if batch_norm:
            layers.insert(1, keras.layers.BatchNormalization(momentum=0.5, name="bn"))
        layers.append(keras.layers.Dense(units[-1], name=f"layer{len(units) - 1}", dtype="float32"))
        model = keras.Sequential([keras.Input([inputs]), *layers])
        if optimizer is not None:
            optimizer = optimizer() if callable(optimizer) else optimizer
            model.compile(loss_scaled(optimizer, keras) if loss_scaling else optimizer, "mse")
    return model


def average_without_training(model, optimizer, updates: int = 3) -> None:
    """Gives the model other weights a few times, and statistics to each replica, and averages them."""
    rng = np.random.default_rng(1)
    optimizer.shadow_copy(model)
    for _ in range(updates):
        for variable in model.variables:
            if "float" in str(variable.dtype):
                value = rng.uniform(0.1, 1.0, variable.shape)
                variable = kerases.tf_variable(variable)
                for replica, component in enumerate(getattr(variable, "values", [variable])):
                    component.assign(value + (not variable.trainable) * replica)
        optimizer.update_average()


def loss_scaled(optimizer, keras=KERAS):
    """With a scale that skips no step of a sane model, and that grows soon."""
    options = {"initial_scale": 2.0**10, "dynamic_growth_steps": 3}
    return keras.mixed_precision.LossScaleOptimizer(optimizer, **options)


def fit_steps(model, steps: int, callbacks=(), inputs: int = 4) -> None:
    """Takes steps on the first batches of the data, always the same."""
    rows = slice(0, steps * BATCH)
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
    model.fit(X[rows, :inputs], Y[rows], callbacks=list(callbacks), **options)


def recorder(keras=KERAS):
    """A callback that keeps the weights, `history`, from before training and after each batch."""

    class RecordWeights(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.history = [read_all(self.model.trainable_variables)]

        def on_train_batch_end(self, batch, logs=None):
            self.history.append(read_all(self.model.trainable_variables))

    return RecordWeights()


def fit(
    strategy,
    make_optimizer: Callable,
    build_model: Callable = new_model,
    data=None,
    epochs: int = 1,
    callbacks=(),
    keras=KERAS,
    **compile_options,
) -> Run:
    """Trains with `Model.fit`, in order, six batches in each epoch if no data are given."""
    with strategy.scope():
        model = build_model()
        optimizer = make_optimizer()
        model.compile(optimizer, "mse", **compile_options)
    record = recorder(keras)
    inputs, targets = data or (X[: 6 * BATCH], Y[: 6 * BATCH])
    model.fit(
        inputs,
        targets,
        batch_size=BATCH,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[record, *callbacks],
    )
    return Run(optimizer, model.trainable_variables, record.history, model)
