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
"""What must hold under every strategy that runs the same step on all replicas.

Each check takes a strategy, trains something small, and compares with arithmetic in NumPy, float64. In a
cluster all workers run the same checks in the same order; what `report` prints must then agree.
"""

import hashlib
import importlib
import os
import tempfile
import traceback
from typing import Callable, Iterable, List, Optional, Sequence

import numpy as np
import pytest
import tensorflow as tf

import tf_averaging as tfav
from tests import numpy_averages
from tf_averaging import kerases

STEPS = 5
BATCH = 8  # On all replicas together.
INPUTS, HIDDEN = 8, 20

_random = np.random.default_rng(0)
X = _random.normal(size=(STEPS, BATCH, INPUTS)).astype(np.float32)
Y = (X[:, :, :1] - 2.0 * X[:, :, 1:2]).astype(np.float32)

# The Keras that is checked. The other one is not imported, which takes a second.
KERAS = importlib.import_module(os.environ.get("CHECKED_KERAS", "tf_keras"))
IS_KERAS_3 = KERAS.__name__ == "keras"

SGD = {"current": KERAS.optimizers.SGD}
if not IS_KERAS_3:
    SGD["legacy"] = KERAS.optimizers.legacy.SGD
OLDEST = list(SGD)[-1]  # Of the generations.


tf.get_logger().setLevel("ERROR")  # Many small functions are traced here, which TensorFlow remarks upon.


def run(checks: Iterable[Callable], strategy: tf.distribute.Strategy, keep_going: bool) -> bool:
    """Runs checks and prints what became of each; whether all passed."""
    passed = True
    for check in checks:
        KERAS.utils.set_random_seed(0)
        print(f"[running] {check.__name__}")
        try:
            check(strategy)
        except (Exception, pytest.fail.Exception):
            traceback.print_exc()
            print(f"[failed] {check.__name__}")
            if not keep_going:
                raise
            passed = False
        else:
            print(f"[passed] {check.__name__}")
        KERAS.mixed_precision.set_global_policy("float32")
    return passed


def report(name: str, variables: Sequence[tf.Variable]) -> None:
    """Prints a digest of all that this process holds of the variables."""
    digest = hashlib.sha256()
    for variable in variables:
        for value in bits(variable):
            digest.update(value)
    print(f"[digest] {name} {digest.hexdigest()}")


# Reading what each replica holds.


def values(variable: tf.Variable) -> List[np.ndarray]:
    """The value on each replica of this process."""
    variable = kerases.tf_variable(variable)
    return [component.numpy() for component in getattr(variable, "values", [variable])]


def places(variable: tf.Variable) -> List[str]:
    """The device of each component in this process."""
    variable = kerases.tf_variable(variable)
    return [component.device for component in getattr(variable, "values", [variable])]


def bits(variable: tf.Variable) -> List[bytes]:
    return [value.tobytes() for value in values(variable)]


def all_bits(*groups: Sequence[tf.Variable]) -> list:
    return [bits(variable) for group in groups for variable in group]


def same_on_all_replicas(variable: tf.Variable) -> np.ndarray:
    """The value, which must be the same, bit for bit, on all replicas."""
    assert len(set(bits(variable))) == 1, f"{variable.name} differs between the replicas"
    return values(variable)[0]


def average_of(optimizer, variable: tf.Variable) -> np.ndarray:
    return same_on_all_replicas(optimizer.get_slot(variable, "average"))


def _scales_loss(optimizer) -> bool:
    return isinstance(optimizer, KERAS.mixed_precision.LossScaleOptimizer)


# What is expected.


SWA = numpy_averages.swa(1, 2)


def swa(generation="current", **options):
    return SWA.wrap(SGD[generation](0.02, momentum=0.9), **options), SWA


EMA = numpy_averages.ema(0.9)


def ema(generation="current", **options):
    return EMA.wrap(SGD[generation](0.02, momentum=0.9), **options), EMA


def assert_close(actual, expected, tolerance=2e-6) -> None:
    np.testing.assert_allclose(
        actual, expected, rtol=0, atol=tolerance * max(1.0, np.max(np.abs(expected)))
    )


def assert_averages(optimizer, variables, recorded, scheme) -> None:
    """The averages of all variables follow from the recorded weights, the same on all replicas."""
    for index, variable in enumerate(variables):
        weights = [values[index] for values in recorded]
        expected = numpy_averages.expected_average(scheme, weights)
        assert_close(average_of(optimizer, variable), expected)


# A model and its training.


def new_model(strategy, batch_norm: Optional[type] = None, keras=KERAS, **options):
    keras.utils.set_random_seed(1)
    with strategy.scope():
        layers = [keras.Input([INPUTS]), keras.layers.Dense(HIDDEN, activation="relu")]
        if batch_norm is not None:
            layers.append(batch_norm(momentum=0.5, **options))
        return keras.Sequential([*layers, keras.layers.Dense(1, dtype="float32")])


def compiled(strategy, make, batch_norm: Optional[type] = None, keras=KERAS, **options):
    """A model with an optimizer that `make` returns, and its scheme."""
    model = new_model(strategy, batch_norm, keras, **options)
    with strategy.scope():
        optimizer, scheme = make()
        model.compile(optimizer, "mse")
    return model, optimizer, scheme


def new_variable(value, **options):
    """A variable of the Keras that is checked; to be called in a scope."""
    return (KERAS.Variable if IS_KERAS_3 else tf.Variable)(value, **options)


def build(optimizer, variables) -> None:
    """Keras 3 cannot do it in a function that runs on several replicas; tf_keras does it by itself."""
    if IS_KERAS_3:
        optimizer.build(variables)


def fit_works(strategy) -> bool:
    """With several workers Keras 3 fails on the first batch, before any step, with any optimizer."""
    return not (IS_KERAS_3 and isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy))


def batches(strategy, repeat: int = 1):
    """The same global batches whatever the number of replicas, each replica getting its rows."""
    if IS_KERAS_3 and fit_works(strategy):  # Its `fit` takes whole batches only.
        data = X.reshape(-1, INPUTS), Y.reshape(-1, 1)
        return tf.data.Dataset.from_tensor_slices(data).batch(BATCH).repeat(repeat)

    def input_pipeline(context=None):
        pipelines = context.num_input_pipelines if context else 1
        index = context.input_pipeline_id if context else 0
        rows = BATCH // pipelines
        x = X[:, index * rows : (index + 1) * rows].reshape(-1, INPUTS)
        y = Y[:, index * rows : (index + 1) * rows].reshape(-1, 1)
        replicas = context.num_replicas_in_sync if context else 1
        return tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH // replicas).repeat(repeat)

    return strategy.distribute_datasets_from_function(input_pipeline)


class Record(KERAS.callbacks.Callback):
    """Keeps the trained weights before and after each step."""

    def on_train_begin(self, logs=None):
        self.weights = [self._now()]

    def on_train_batch_end(self, batch, logs=None):
        self.weights.append(self._now())

    def _now(self):
        return [same_on_all_replicas(variable) for variable in self.model.trainable_variables]


def train(model, strategy, epochs: int = 1, callbacks=()) -> list:
    """Takes `STEPS` steps in each epoch; returns the weights before and after each of all steps."""
    record = Record()
    data, callbacks = batches(strategy, repeat=epochs), [record, *callbacks]
    if fit_works(strategy):
        model.fit(data, epochs=epochs, steps_per_epoch=STEPS, verbose=0, callbacks=callbacks)
        return record.weights
    hooks = KERAS.callbacks.CallbackList(callbacks, model=model)
    hooks.on_train_begin()
    step = _training_step(model, strategy)
    for batch, (x, y) in enumerate(data):
        step(x, y)
        hooks.on_train_batch_end(batch)
    return record.weights


def _training_step(model, strategy):
    """What a step of `fit` does."""

    def on_replica(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
            scaled = model.optimizer.scale_loss(loss / strategy.num_replicas_in_sync)
        variables = model.trainable_variables
        model.optimizer.apply_gradients(zip(tape.gradient(scaled, variables), variables))

    return tf.function(lambda *data: strategy.run(on_replica, data))


def evaluate(model, strategy) -> float:
    data = batches(strategy)
    if fit_works(strategy):
        return model.evaluate(data, steps=STEPS, verbose=0)

    def on_replica(x, y):
        return tf.reduce_mean((model(x) - y) ** 2)

    mean = tf.distribute.ReduceOp.MEAN
    loss = tf.function(lambda *batch: strategy.reduce(mean, strategy.run(on_replica, batch), axis=None))
    return np.mean([loss(*batch) for batch in data])


GUARD = "swap_weights"  # What both forms of the guard name.
MERGE_IN_CONDITIONAL = "`merge_call` called while defining a new graph"  # TensorFlow, to Keras 3.


# The checks: `fit`.


def fit_follows_one_device(strategy):
    """Weights as on one device with the same batches; averages as NumPy has them, on all replicas."""
    for make in (lambda: swa(OLDEST, jit_compile=True), ema):
        model, optimizer, scheme = compiled(strategy, make)
        recorded = train(model, strategy, epochs=2)
        for weights, expected in zip(recorded, weights_on_one_device(make, epochs=2)):
            for actual, value in zip(weights, expected):
                assert_close(actual, value, tolerance=1e-5)
        assert_averages(optimizer, model.trainable_variables, recorded, scheme)
        assert same_on_all_replicas(optimizer.iterations) == 2 * STEPS
        assert optimizer.num_averaged == len(numpy_averages.due_steps(scheme, 2 * STEPS))
        report("fit", [*model.variables, *optimizer.variables])
        for variable in model.trainable_variables:
            assert places(optimizer.get_slot(variable, "average")) == places(variable)


def weights_on_one_device(make, epochs: int) -> list:
    """The weights that the bare inner optimizer gives on the global batches."""
    model = new_model(tf.distribute.get_strategy())
    optimizer = make()[0].inner_optimizer
    recorded = [model.get_weights()]
    for _ in range(epochs):
        for x, y in zip(X, Y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(x) - y) ** 2)
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables))
            recorded.append(model.get_weights())
    return recorded


def loss_of(weights) -> float:
    """The loss of the model on all data, by NumPy."""
    first, bias, second, last = (np.asarray(value, np.float64) for value in weights)
    return np.mean((np.maximum(X @ first + bias, 0.0) @ second + last - Y) ** 2)


def swap_around_evaluate(strategy):
    """The averages are what is evaluated, before `fit` too; training goes on as if nothing had been."""
    model, optimizer, _ = compiled(strategy, ema)
    optimizer.shadow_copy(model)
    before = evaluate(model, strategy)
    with optimizer.swapped_weights():
        assert evaluate(model, strategy) == before
    train(model, strategy)
    state = all_bits(model.variables, optimizer.variables)
    raw = evaluate(model, strategy)
    with optimizer.swapped_weights():
        assert optimizer.weights_swapped
        averaged = evaluate(model, strategy)
        report("evaluated", model.variables)
    assert all_bits(model.variables, optimizer.variables) == state
    assert evaluate(model, strategy) == raw

    expected = loss_of([average_of(optimizer, variable) for variable in model.trainable_variables])
    np.testing.assert_allclose(averaged, expected, rtol=1e-4)
    assert abs(averaged - raw) > 1e-3 * raw

    undisturbed, other, _ = compiled(strategy, ema)
    train(undisturbed, strategy)
    train(model, strategy)
    train(undisturbed, strategy)
    expected = all_bits(undisturbed.trainable_variables, other.variables)
    assert all_bits(model.trainable_variables, optimizer.variables) == expected


def training_while_swapped_fails_and_moves_nothing(strategy):
    model, optimizer, _ = compiled(strategy, lambda: ema(OLDEST))
    train(model, strategy)
    optimizer.swap_weights()
    state = all_bits(model.variables, optimizer.variables)
    with pytest.raises(tf.errors.InvalidArgumentError, match=GUARD):
        train(model, strategy)
    assert all_bits(model.variables, optimizer.variables) == state
    optimizer.swap_weights()
    train(model, strategy)
    assert same_on_all_replicas(optimizer.iterations) == 2 * STEPS


# The checks: batch normalization, and other variables that differ between the replicas.


def _batch_norm_is_averaged(strategy, layer, **options):
    model, optimizer, scheme = compiled(
        strategy, lambda: ema(trainable_weights_only=False), layer, **options
    )
    optimizer.shadow_copy(model)
    statistics = [v for v in model.non_trainable_variables if "moving" in v.name]
    assert len(statistics) == 2
    own = []

    class RecordOwn(KERAS.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            own.append([values(v) for v in statistics])

    recorded = train(model, strategy, callbacks=[RecordOwn()])
    assert_averages(optimizer, model.trainable_variables, recorded, scheme)
    own.insert(0, own[0])  # The optimizer's first step begins after the forward pass has updated them.
    expected = []
    for index, variable in enumerate(statistics):
        average = values(optimizer.get_slot(variable, "average"))
        expected.append(
            [
                numpy_averages.expected_average(scheme, [step[index][replica] for step in own])
                for replica in range(len(average))
            ]
        )
        for actual, value in zip(average, expected[-1]):
            assert_close(actual, value)
    return model, optimizer, statistics, expected


def batch_norm_statistics_are_averaged(strategy):
    """Each replica's own, where it has its own; a reader sees what the variable's aggregation says."""
    layer = KERAS.layers.BatchNormalization
    model, optimizer, statistics, expected = _batch_norm_is_averaged(strategy, layer)
    state = all_bits(model.variables, optimizer.variables)
    with optimizer.swapped_weights():
        for variable, averages in zip(statistics, expected):
            for value, average in zip(values(variable), averages):
                assert_close(value, average)
            # Keras 3 tells TensorFlow that they are the same, and so the first replica's are read.
            of_all = values(variable)[0] if IS_KERAS_3 else _mean_of_all(strategy, variable)
            assert_close(as_read(strategy, variable), of_all)
        report("swapped batch norm", model.trainable_variables)
    assert all_bits(model.variables, optimizer.variables) == state  # Each replica's own, bit for bit.

    optimizer.assign_average_vars(model.variables)
    for variable, averages in zip(statistics, expected):
        for value, average in zip(values(variable), averages):
            assert_close(value, average)


def synchronized_batch_norm_is_averaged(strategy):
    """And swapped, saved and assigned, the same on all replicas."""
    layer = KERAS.layers.BatchNormalization
    model, optimizer, statistics, _ = _batch_norm_is_averaged(strategy, layer, synchronized=True)
    for variable in statistics:
        for value in values(variable):
            assert_close(value, values(variable)[0])
    report("synchronized batch norm", model.trainable_variables)
    averages = [values(optimizer.get_slot(variable, "average")) for variable in statistics]
    state = all_bits(model.variables, optimizer.variables)
    with optimizer.swapped_weights():
        for variable, average in zip(statistics, averages):
            np.testing.assert_array_equal(values(variable), average)
    assert all_bits(model.variables, optimizer.variables) == state
    restored_model, restored = _restored(
        strategy, model, optimizer, lambda: ema(trainable_weights_only=False), layer, synchronized=True
    )
    restored_statistics = [v for v in restored_model.non_trainable_variables if "moving" in v.name]
    for variable, expected in zip(restored_statistics, statistics):
        np.testing.assert_allclose(values(variable), values(expected), rtol=1e-6)
        average = values(restored.get_slot(variable, "average"))
        np.testing.assert_allclose(
            average, values(optimizer.get_slot(expected, "average")), rtol=1e-6, atol=1e-12
        )
    optimizer.assign_average_vars(model.variables)
    for variable, average in zip(statistics, averages):
        np.testing.assert_array_equal(values(variable), average)


def _restored(strategy, model, optimizer, make, *layers, **options):
    """Another model and optimizer, restored from a checkpoint that is written now."""
    other_model, other, _ = compiled(strategy, make, *layers, **options)
    with strategy.scope():
        other.build(other_model.trainable_variables)
    other.shadow_copy(other_model)
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "checkpoint")
        path = tf.train.Checkpoint(model=model, optimizer=optimizer).write(path)
        checkpoint = tf.train.Checkpoint(model=other_model, optimizer=other)
        checkpoint.read(path).assert_existing_objects_matched()
    return other_model, other


def as_read(strategy, variable) -> np.ndarray:
    with strategy.scope():
        return kerases.tf_variable(variable).read_value().numpy()


def _mean_of_all(strategy, variable) -> np.ndarray:
    """The mean over all replicas of all processes, without the variable's own aggregation."""

    @tf.function
    def gathered():
        def on_replica():
            context = tf.distribute.get_replica_context()
            return context.all_gather(tf.identity(variable)[tf.newaxis], axis=0)

        return strategy.experimental_local_results(strategy.run(on_replica))[0]

    return np.mean(gathered().numpy().astype(np.float64), axis=0)


def on_read_variables_keep_their_own_values(strategy):
    """A sum, as of a metric: each replica's part is averaged, and comes back bit for bit."""
    with strategy.scope():
        weight = new_variable(1.0)
        total = tf.Variable(
            0.0,
            trainable=False,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.SUM,
        )
        optimizer = tfav.SWA(KERAS.optimizers.SGD(0.0), 0, 1)
    optimizer.shadow_copy([weight, total])

    @tf.function
    def step(amount):
        def on_replica():
            context = tf.distribute.get_replica_context()
            total.assign_add(amount * (1.1 + tf.cast(context.replica_id_in_sync_group, tf.float32)))
            optimizer.apply_gradients([(tf.constant(1.0), weight)])

        strategy.run(on_replica)

    own = []
    for amount in (1.0, 5.0):
        step(tf.constant(amount))
        own.append(np.array(values(total), np.float64))
    average = optimizer.get_slot(total, "average")
    expected = np.mean(own, axis=0)
    np.testing.assert_allclose(values(average), expected, rtol=1e-6)
    before = bits(total), bits(average)
    for swap in (optimizer.swap_weights, tf.function(lambda: strategy.run(optimizer.swap_weights))):
        swap()
        assert (bits(average), bits(total)) == before
        if not _shares_variables(strategy):
            replicas = strategy.num_replicas_in_sync
            np.testing.assert_allclose(
                as_read(strategy, total), _mean_of_all(strategy, total) * replicas, rtol=1e-6
            )
        swap()
        assert (bits(total), bits(average)) == before
    _on_read_sums_are_saved(strategy, weight, total, optimizer)
    optimizer.assign_average_vars([total])
    assert bits(total) == before[1]


def _on_read_sums_are_saved(strategy, weight, total, optimizer):
    """TensorFlow saves the sum of all replicas, and gives each an equal share of it when it restores."""
    replicas = 1 if _shares_variables(strategy) else strategy.num_replicas_in_sync
    average = optimizer.get_slot(total, "average")
    before = bits(weight), bits(total), bits(average)
    sums = [_mean_of_all(strategy, variable) * replicas for variable in (total, average)]
    checkpoint = tf.train.Checkpoint(weight=weight, total=total, optimizer=optimizer)
    with tempfile.TemporaryDirectory() as directory:
        path = checkpoint.write(os.path.join(directory, "checkpoint"))
        assert (bits(weight), bits(total), bits(average)) == before
        own = [values(variable) for variable in (total, average)]
        checkpoint.read(path).assert_existing_objects_matched()
    for variable, expected in zip((total, average), sums):
        np.testing.assert_allclose(values(variable), expected / replicas, rtol=1e-6)
    for variable, parts in zip((total, average), own):
        for component, value in zip(getattr(variable, "values", [variable]), parts):
            component.assign(value)
    assert (bits(weight), bits(total), bits(average)) == before


def checkpoint_continues_exactly(strategy):
    """Weights and averages bit for bit; of variables that differ between replicas what a reader sees."""

    def new():
        model, optimizer, _ = compiled(
            strategy,
            lambda: ema(trainable_weights_only=False),
            KERAS.layers.BatchNormalization,
        )
        optimizer.shadow_copy(model)
        return model, optimizer, tf.train.Checkpoint(model=model, optimizer=optimizer)

    def exact(model, optimizer):
        averages = [optimizer.get_slot(variable, "average") for variable in model.trainable_variables]
        return all_bits(model.trainable_variables, averages, [optimizer.iterations])

    def statistics_as_read(model, optimizer):
        statistics = [v for v in model.non_trainable_variables if "moving" in v.name]
        averages = [optimizer.get_slot(variable, "average") for variable in statistics]
        return [as_read(strategy, variable) for variable in statistics + averages]

    model, optimizer, checkpoint = new()
    train(model, strategy)
    with tempfile.TemporaryDirectory() as directory:
        path = checkpoint.write(os.path.join(directory, "checkpoint"))
        resumed_model, resumed, other_checkpoint = new()
        other_checkpoint.read(path).assert_existing_objects_matched()
        assert exact(resumed_model, resumed) == exact(model, optimizer)
        assert resumed.num_averaged == optimizer.num_averaged == STEPS
        restored = statistics_as_read(resumed_model, resumed)
        for actual, expected in zip(restored, statistics_as_read(model, optimizer)):
            assert_close(actual, expected)
        train(model, strategy)
        train(resumed_model, strategy)
    assert exact(resumed_model, resumed) == exact(model, optimizer)
    for actual, before in zip(statistics_as_read(resumed_model, resumed), restored):
        assert not np.array_equal(actual, before)
    report("resumed", resumed_model.trainable_variables)


def checkpoint_saved_while_swapped(strategy):
    """What is restored knows that it is swapped: it does not train, and swaps back to the weights."""
    model, optimizer, _ = compiled(strategy, ema)
    train(model, strategy)
    averages = [optimizer.get_slot(variable, "average") for variable in model.trainable_variables]
    raw = all_bits(model.trainable_variables), all_bits(averages)
    with optimizer.swapped_weights():
        other_model, other = _restored(strategy, model, optimizer, ema)
    assert not optimizer.weights_swapped
    assert other.weights_swapped
    averages = [other.get_slot(variable, "average") for variable in other_model.trainable_variables]
    assert (all_bits(averages), all_bits(other_model.trainable_variables)) == raw
    with pytest.raises(tf.errors.InvalidArgumentError, match=GUARD):
        train(other_model, strategy)
    other.swap_weights()
    assert (all_bits(other_model.trainable_variables), all_bits(averages)) == raw
    train(model, strategy)
    train(other_model, strategy)
    assert all_bits(other_model.trainable_variables) == all_bits(model.trainable_variables)
    report("restored swapped", other_model.trainable_variables)


def get_average_is_the_average(strategy):
    """Swapped or not, in every context; of variables that differ between replicas what a reader sees."""
    options = {
        "trainable": False,
        "synchronization": tf.VariableSynchronization.ON_READ,
        "aggregation": tf.VariableAggregation.MEAN,
    }
    with strategy.scope():
        weight, half = new_variable([1.0, 2.0]), new_variable(np.ones([3], np.float16), dtype="float16")
        own = tf.Variable([0.0, 0.0], **options)
        optimizer = tfav.SWA(KERAS.optimizers.SGD(1.0), 0, 1)
    optimizer.shadow_copy([weight, half, own])

    @tf.function
    def step(amount):
        def on_replica():
            context = tf.distribute.get_replica_context()
            own.assign_add([1.0, amount * tf.cast(context.replica_id_in_sync_group, tf.float32)])
            gradient = tf.fill([2], 1.0 / context.num_replicas_in_sync)  # They are summed.
            optimizer.apply_gradients([(gradient, weight)])

        strategy.run(on_replica)

    recorded = []
    for amount in (1.0, 3.0):
        half.assign_sub(tf.ones([3], tf.float16))  # Keras 3 cannot sum gradients of two dtypes.
        step(tf.constant(amount))
        recorded.append(values(own))
    of_own = np.mean(recorded, axis=0)  # On each replica of this process.
    of_all = _mean_of_all(strategy, optimizer.get_slot(own, "average"))
    # The weights were 1 and 2 below their first values.
    expected = [[-0.5, 0.5], [-0.5] * 3, of_all]

    def read():
        return [optimizer.get_average(variable) for variable in (weight, half, own)]

    def read_in_scope():
        with strategy.scope():
            return read()

    def read_on_replicas():
        results = strategy.run(read)
        return [strategy.experimental_local_results(result) for result in results]

    for _ in range(2):
        for call in (read, read_in_scope, tf.function(read), tf.function(read_in_scope)):
            for value, average in zip(call(), expected):
                np.testing.assert_allclose(value.numpy(), average, rtol=1e-6)
        for call in (read_on_replicas, tf.function(read_on_replicas)):
            *of_weights, of_state = call()
            for replicas, average in zip(of_weights, expected):
                for value in replicas:
                    np.testing.assert_allclose(value.numpy(), average, rtol=1e-6)
            for index, value in enumerate(of_state):
                expected_value = of_own[0 if _shares_variables(strategy) else index]
                np.testing.assert_allclose(value.numpy(), expected_value, rtol=1e-6)
        optimizer.swap_weights()
    graph = tf.function(read).get_concrete_function().graph
    for definition in graph.as_graph_def().library.function:  # The bodies of conditionals.
        sums = [node for node in definition.node_def if node.op.startswith("Add")]
        assert all(tf.as_dtype(node.attr["T"].type).is_integer for node in sums), sums  # An index.
        assert not [n.name for n in definition.node_def if n.op.startswith(("Collective", "Nccl"))]


# The checks: custom loops. The gradient on replica r is known, and so are the weights after it.


class Problem:
    """Variables whose gradients NumPy knows: of sum(sin(3 v + noise + r)) on replica r."""

    def __init__(self, strategy, make=ema, generation="current", count=2):
        self.strategy = strategy
        with strategy.scope():
            self.variables = [new_variable([0.3, -1.2, 2.0]), new_variable(1.5)][:count]
            self.optimizer, self.scheme = make(generation)
            build(self.optimizer, self.variables)
        self._expected = [np.array(v.numpy(), np.float64) for v in self.variables]
        self._momentum = [np.zeros_like(value) for value in self._expected]
        self.recorded = [self.now()]

    def now(self):
        return [same_on_all_replicas(v) for v in self.variables]

    def gradients(self, noise):
        """Of this replica."""
        replica = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.float32)
        with tf.GradientTape() as tape:
            loss = sum(tf.reduce_sum(tf.sin(3.0 * v + noise + replica)) for v in self.variables)
        return tape.gradient(loss, self.variables)

    def step(self, noise):
        self.optimizer.apply_gradients(zip(self.gradients(noise), self.variables))

    def in_function(self, on_replica):
        return tf.function(lambda *args: self.strategy.run(on_replica, args))

    def after_step(self, *noises, scale=1.0):
        """To be called after a step whose gradients were summed over these noises, and scaled."""
        gradients = [
            scale
            * sum(
                3.0 * np.cos(3.0 * value + noise + replica)
                for replica in range(self.strategy.num_replicas_in_sync)
                for noise in noises
            )
            for value in self._expected
        ]
        for value, momentum, gradient in zip(self._expected, self._momentum, gradients):
            momentum[...] = 0.9 * momentum - 0.02 * gradient
            value[...] = value + momentum
        for actual, expected in zip(self.now(), self._expected):
            assert_close(actual, expected, tolerance=1e-5)
        self.recorded.append(self.now())

    def check_averages(self):
        assert_averages(self.optimizer, self.variables, self.recorded, self.scheme)
        report("custom loop", [*self.variables, *self.optimizer.variables])


NOISES = [0.1, -0.7, 1.3]


def custom_loop(strategy):
    for generation in SGD:
        problem = Problem(strategy, generation=generation)
        step = problem.in_function(problem.step)
        for noise in NOISES:
            step(tf.constant(noise))
            problem.after_step(noise)
        problem.check_averages()
        assert problem.optimizer.num_averaged == len(NOISES)


def custom_loop_guard(strategy):
    for in_replica in (False, True):
        problem = Problem(strategy)
        step = problem.in_function(problem.step)
        step(tf.constant(0.1))
        swap = problem.in_function(problem.optimizer.swap_weights)
        if not in_replica:
            swap = problem.optimizer.swap_weights
        swap()
        state = all_bits(problem.variables, problem.optimizer.variables)
        with pytest.raises(tf.errors.InvalidArgumentError, match=GUARD):
            step(tf.constant(0.1))
        assert all_bits(problem.variables, problem.optimizer.variables) == state
        swap()
        step(tf.constant(0.1))


def gradients_aggregated_by_the_user(strategy):
    for options in ({"skip_gradients_aggregation": True}, {"experimental_aggregate_gradients": False}):
        for generation in SGD:
            problem = Problem(strategy, make=swa, generation=generation)

            def on_replica(noise, problem=problem, options=options):
                context = tf.distribute.get_replica_context()
                gradients = context.all_reduce("sum", problem.gradients(noise))
                problem.optimizer.apply_gradients(zip(gradients, problem.variables), **options)

            step = problem.in_function(on_replica)
            if generation == "legacy" and _shares_variables(strategy):
                with pytest.raises(NotImplementedError, match="CentralStorageStrategy"):
                    step(tf.constant(0.1))
                continue  # It is tf_keras that refuses.
            for noise in NOISES:
                step(tf.constant(noise))
                problem.after_step(noise)
            problem.check_averages()


def _shares_variables(strategy) -> bool:
    return isinstance(strategy, tf.distribute.experimental.CentralStorageStrategy)


def gradient_accumulation(strategy):
    """Two batches for each step: one update for each step, none between."""
    problem = Problem(strategy)
    with strategy.scope():
        sums = [
            tf.Variable(
                tf.zeros_like(v),
                trainable=False,
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.SUM,
            )
            for v in problem.variables
        ]

    def accumulate(noise):
        for total, gradient in zip(sums, problem.gradients(noise)):
            total.assign_add(gradient)

    def apply():
        # Where the replicas share the sum, each of them hands in its part.
        replicas = strategy.num_replicas_in_sync if _shares_variables(strategy) else 1
        gradients = [tf.identity(total) / replicas for total in sums]
        problem.optimizer.apply_gradients(zip(gradients, problem.variables))

    def clear():
        for total in sums:
            total.assign(tf.zeros_like(total))

    run_accumulate, run_apply, run_clear = map(problem.in_function, (accumulate, apply, clear))
    for number in range(3):
        for noise in NOISES[:2]:
            state = all_bits(problem.optimizer.variables) if number else None
            run_accumulate(tf.constant(noise))
            assert not number or all_bits(problem.optimizer.variables) == state
        run_apply()
        run_clear()
        problem.after_step(*NOISES[:2])
    problem.check_averages()
    assert problem.optimizer.num_averaged == 3


def keras_accumulates_gradients(strategy):
    """Two batches for each step; between, no weight moves, and nothing is averaged or counted."""

    def make(generation):
        inner = SGD[generation](0.02, momentum=0.9, gradient_accumulation_steps=2)
        return EMA.wrap(inner), EMA

    problem = Problem(strategy, make)
    step = problem.in_function(problem.step)
    if strategy.num_replicas_in_sync > 1 and _merges_calls(strategy):
        with pytest.raises(RuntimeError, match=MERGE_IN_CONDITIONAL):
            step(tf.constant(NOISES[0]))  # As with a bare optimizer.
        step = lambda noise: strategy.run(problem.step, (noise,))  # noqa: E731
    for _ in range(3):
        step(tf.constant(NOISES[0]))
        averages = [problem.optimizer.get_slot(v, "average") for v in problem.variables]
        before = all_bits(averages)
        assert_close(problem.now()[0], problem.recorded[-1][0], tolerance=0)
        step(tf.constant(NOISES[1]))
        problem.after_step(*NOISES[:2], scale=0.5)  # Keras takes the mean.
        assert all_bits(averages) != before
    problem.check_averages()
    assert problem.optimizer.num_averaged == 3


def two_optimizers_in_one_step(strategy):
    """As for a GAN; each is swapped and guarded alone."""
    problems = [Problem(strategy, make=make) for make in (swa, ema)]

    def on_replica(noise):
        for problem in problems:
            problem.step(noise)

    step = problems[0].in_function(on_replica)
    for noise in NOISES:
        step(tf.constant(noise))
        for problem in problems:
            problem.after_step(noise)
    for problem in problems:
        problem.check_averages()
    first, second = problems
    with first.optimizer.swapped_weights():
        assert not second.optimizer.weights_swapped
        assert all_bits(second.variables) == [
            [value.tobytes()] * len(values(v)) for v, value in zip(second.variables, second.recorded[-1])
        ]
        for index, variable in enumerate(first.variables):
            weights = [values[index] for values in first.recorded]
            expected = numpy_averages.expected_average(first.scheme, weights)
            assert_close(same_on_all_replicas(variable), expected)


def gan_of_two_models(strategy):
    """Two Keras models with an averaging optimizer each, both trained in one step."""
    KERAS.utils.set_random_seed(1)
    with strategy.scope():
        generator = KERAS.Sequential([KERAS.Input([1]), KERAS.layers.Dense(INPUTS)])
        critic = KERAS.Sequential([KERAS.Input([INPUTS]), KERAS.layers.Dense(1)])
        made = [ema(), swa(OLDEST)]
        for model, (optimizer, _) in zip((generator, critic), made):
            build(optimizer, model.trainable_variables)

    @tf.function
    def step(x, noise):
        def on_replica():
            with tf.GradientTape(persistent=True) as tape:
                real, fake = critic(x, training=True), critic(generator(noise, training=True))
                losses = [
                    -tf.reduce_mean(tf.math.log_sigmoid(fake)),
                    tf.reduce_mean(fake) - tf.reduce_mean(tf.math.log_sigmoid(real)),
                ]
            for model, loss, (optimizer, _) in zip((generator, critic), losses, made):
                gradients = tape.gradient(loss, model.trainable_variables)
                optimizer.apply_gradients(zip(gradients, model.trainable_variables))

        strategy.run(on_replica)

    def now():
        return [
            [same_on_all_replicas(v) for v in model.trainable_variables] for model in (generator, critic)
        ]

    recorded = [now()]
    for x, y in zip(X, Y):
        step(tf.constant(x), tf.constant(y))
        recorded.append(now())
    for index, (model, (optimizer, scheme)) in enumerate(zip((generator, critic), made)):
        weights = [both[index] for both in recorded]
        assert np.ptp([step[0] for step in weights], axis=0).min() > 0
        assert_averages(optimizer, model.trainable_variables, weights, scheme)
    with made[0][0].swapped_weights():
        state = all_bits(generator.variables, made[0][0].variables)
        with pytest.raises(tf.errors.InvalidArgumentError, match=GUARD):
            step(tf.constant(X[0]), tf.constant(Y[0]))
        assert all_bits(generator.variables, made[0][0].variables) == state
        assert not made[1][0].weights_swapped
    report("gan", [*generator.variables, *critic.variables])


def swap_and_assign_in_every_context(strategy):
    """Across replicas, on them, in `scope()` and outside, before training and after."""

    def in_scope(function):
        with strategy.scope():
            function()

    problem = Problem(strategy)
    problem.optimizer.shadow_copy(problem.variables)
    step = problem.in_function(problem.step)
    contexts = {
        "outside": lambda function: function(),
        "in scope": in_scope,
        "in a function": lambda function: tf.function(lambda: function())(),
        "in a function, in scope": lambda function: in_scope(tf.function(lambda: function())),
        "on replicas": lambda function: problem.in_function(function)(),
    }
    for noise in (None, NOISES[0]):
        if noise is not None:
            step(tf.constant(noise))
        averages = [problem.optimizer.get_slot(v, "average") for v in problem.variables]
        before = all_bits(problem.variables), all_bits(averages)
        for name, call in contexts.items():
            call(problem.optimizer.swap_weights)
            assert (all_bits(averages), all_bits(problem.variables)) == before, name
            call(problem.optimizer.swap_weights)
            assert (all_bits(problem.variables), all_bits(averages)) == before, name
        for name, call in contexts.items():
            call(lambda: problem.optimizer.assign_average_vars(problem.variables))  # noqa: B023
            assert all_bits(problem.variables) == before[1], name
            assert all_bits(averages) == before[1], name
    report("contexts", [*problem.variables, *problem.optimizer.variables])


def _merges_calls(strategy) -> bool:
    return strategy.extended._use_merge_call() or strategy.num_replicas_in_sync == 1


def _refusal(generation, strategy) -> Optional[str]:
    """What Keras says to any optimizer that was created outside the scope; None for nothing."""
    if IS_KERAS_3:
        return "Mixing different tf.distribute.Strategy objects"
    if generation == "current" and not _merges_calls(strategy):
        return "Must not nest tf.distribute.Strategy scopes"
    return None


def optimizer_created_outside_the_scope(strategy):
    """It works, or says what is wrong; it never averages something else."""
    for generation in SGD:
        refusal = _refusal(generation, strategy)
        model = new_model(strategy)
        optimizer, scheme = swa(generation)
        with strategy.scope():
            model.compile(optimizer, "mse")
        if refusal:
            with pytest.raises(RuntimeError, match=refusal):
                train(model, strategy)
            continue
        recorded = train(model, strategy)
        assert_averages(optimizer, model.trainable_variables, recorded, scheme)
    for generation in SGD:
        refusal = _refusal(generation, strategy)
        problem = Problem(strategy)
        problem.optimizer, problem.scheme = swa(generation)
        step = problem.in_function(problem.step)
        if refusal:
            with pytest.raises(RuntimeError, match=refusal):
                step(tf.constant(0.1))
            continue
        for noise in NOISES:
            step(tf.constant(noise))
            problem.after_step(noise)
        problem.check_averages()


# The checks: mixed precision.


def mixed_bfloat16(strategy):
    KERAS.mixed_precision.set_global_policy("mixed_bfloat16")
    model, optimizer, scheme = compiled(strategy, ema)
    assert model.optimizer is optimizer
    recorded = train(model, strategy)
    assert model.layers[0].compute_dtype == "bfloat16"
    assert recorded[0][0].dtype == np.float32
    assert_averages(optimizer, model.trainable_variables, recorded, scheme)
    with optimizer.swapped_weights():
        evaluate(model, strategy)
        with pytest.raises(tf.errors.InvalidArgumentError, match=GUARD):
            train(model, strategy)
    report("mixed_bfloat16", [*model.variables, *optimizer.variables])


def mixed_float16(strategy):
    """`compile` puts loss scaling outside, and the steps that it skips are not averaged."""
    KERAS.mixed_precision.set_global_policy("mixed_float16")
    model, optimizer, scheme = compiled(strategy, ema)
    assert _scales_loss(model.optimizer)
    assert model.optimizer.inner_optimizer is optimizer
    if IS_KERAS_3 and not _merges_calls(strategy):
        with pytest.raises(RuntimeError, match=MERGE_IN_CONDITIONAL):
            train(model, strategy)  # As with a bare optimizer.
        return
    recorded = train(model, strategy)
    assert_averages(optimizer, model.trainable_variables, recorded, scheme)
    with optimizer.swapped_weights():
        evaluate(model, strategy)
        averages = [optimizer.get_slot(variable, "average") for variable in model.trainable_variables]
        state = all_bits(model.variables, optimizer.variables, averages)
        with pytest.raises(tf.errors.InvalidArgumentError, match=GUARD):
            train(model, strategy)
        assert all_bits(model.variables, optimizer.variables, averages) == state
    report("mixed_float16", [*model.variables, *optimizer.variables])

    with strategy.scope():
        variable = new_variable(1.0)
        inner = tfav.SWA(KERAS.optimizers.SGD(1.0), start_averaging=0, average_period=2)
        scaling = KERAS.mixed_precision.LossScaleOptimizer(inner, dynamic_growth_steps=1000)
        build(scaling, [variable])
        gradient = tf.Variable(0.0, trainable=False)

    @tf.function
    def step():
        def on_replica():
            if IS_KERAS_3:
                gradients = [scaling.scale_loss(tf.constant(1.0)) * gradient]
            else:
                scaled = scaling.get_scaled_loss(tf.constant(1.0)) * gradient
                gradients = scaling.get_unscaled_gradients([scaled])
            scaling.apply_gradients(zip(gradients, [variable]))

        strategy.run(on_replica)

    seen = []
    for value in [1.0, np.inf, np.nan, 1.0, 1.0]:  # Due are the first one and the last.
        gradient.assign(value / strategy.num_replicas_in_sync)
        step()
        seen.append((same_on_all_replicas(variable), average_of(inner, variable)))
        seen[-1] += (int(inner.num_averaged), int(same_on_all_replicas(inner.iterations)))
    # Only tf_keras counts what it skips.
    iterations = [1, 1, 1, 2, 3] if IS_KERAS_3 else [1, 2, 3, 4, 5]
    weights, averages, updates = [0.0, 0.0, 0.0, -1.0, -2.0], [0.0, 0.0, 0.0, 0.0, -1.0], [1, 1, 1, 1, 2]
    assert seen == list(zip(weights, averages, updates, iterations))


def loss_scaling_is_refused_as_by_tf_keras(strategy):
    """With the error that a bare optimizer gets."""
    messages = []
    for make in (lambda: KERAS.optimizers.SGD(0.1), lambda: ema()[0]):
        with strategy.scope():
            optimizer = make()
            with pytest.raises(ValueError, match="Loss scaling is not supported") as error:
                KERAS.mixed_precision.LossScaleOptimizer(optimizer)
            messages.append(str(error.value))
    assert messages[0] == messages[1]


SYNCHRONOUS = [
    fit_follows_one_device,
    swap_around_evaluate,
    training_while_swapped_fails_and_moves_nothing,
    batch_norm_statistics_are_averaged,
    on_read_variables_keep_their_own_values,
    checkpoint_continues_exactly,
    checkpoint_saved_while_swapped,
    get_average_is_the_average,
    custom_loop,
    custom_loop_guard,
    gradients_aggregated_by_the_user,
    gradient_accumulation,
    keras_accumulates_gradients,
    two_optimizers_in_one_step,
    gan_of_two_models,
    swap_and_assign_in_every_context,
    optimizer_created_outside_the_scope,
    mixed_bfloat16,
]
REPLICATED = [synchronized_batch_norm_is_averaged, mixed_float16]
ONE_OF_EACH_KIND = [
    fit_follows_one_device,
    batch_norm_statistics_are_averaged,
    checkpoint_continues_exactly,
    custom_loop,
    swap_and_assign_in_every_context,
    mixed_float16,
    mixed_bfloat16,
]
FEW = [
    *ONE_OF_EACH_KIND,
    training_while_swapped_fails_and_moves_nothing,
    checkpoint_saved_while_swapped,
    get_average_is_the_average,
    custom_loop_guard,
    gan_of_two_models,
    optimizer_created_outside_the_scope,
]

# What a Keras does in its own way only: optimizers of Keras 3 always sum the gradients.
OF_ONE_KERAS = {"tf_keras": [gradients_aggregated_by_the_user], "keras": [keras_accumulates_gradients]}


def known_to(keras: str, checks: Sequence[Callable]) -> List[Callable]:
    """The checks among these that this Keras can be put to."""
    return [
        check for check in checks if all(check not in OF_ONE_KERAS[k] for k in {*OF_ONE_KERAS} - {keras})
    ]
