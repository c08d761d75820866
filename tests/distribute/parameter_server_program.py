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
"""Program: the coordinator of a ParameterServerStrategy; workers and servers run `server_program.py`."""

import os
import pathlib
import signal
import sys
import tempfile
import traceback

import checks
import keras as keras_3
import numpy as np
import processes
import pytest
import tensorflow as tf
import tf_keras

import tf_averaging as tfav
from tests import numpy_averages
from tf_averaging import kerases
from tf_averaging.core import variables as core_variables

STEPS = 5
EXACT_STEPS = 3
SECONDS = 300


def dataset(context=None):
    """Of each worker: the same batches over and over."""
    del context
    x, y = checks.X.reshape(-1, checks.INPUTS), checks.Y.reshape(-1, 1)
    return tf.data.Dataset.from_tensor_slices((x, y)).repeat().batch(checks.BATCH)


def fit(model, steps=STEPS):
    creator = tf_keras.utils.experimental.DatasetCreator(dataset)
    model.fit(creator, epochs=1, steps_per_epoch=steps, verbose=0)


def one_batch():
    """All data, always the same, whichever worker gets it."""

    def whole(context=None):
        return dataset(context).unbatch().batch(checks.STEPS * checks.BATCH)

    return tf_keras.utils.experimental.DatasetCreator(whole)


def evaluate(model):
    return model.evaluate(one_batch(), steps=1, verbose=0)


def schemes_of(keras):
    """Functions that make optimizers of this Keras, each with its scheme, as those of `checks` do."""
    if keras is tf_keras:
        return checks.ema, lambda: checks.swa("legacy")
    schemes = checks.EMA, checks.SWA
    return [lambda s=scheme: (s.wrap(keras.optimizers.SGD(0.02, 0.9)), s) for scheme in schemes]


def coordinator_of(strategy):
    return tf.distribute.coordinator.ClusterCoordinator(strategy)  # One for each strategy, kept by it.


def serial_training(strategy, model, count=EXACT_STEPS, variables=None):
    """A custom loop on the coordinator that waits after each step, which so sees all of the one before.

    Returns the values of the variables, all trained ones by default, before and after each step.
    """

    @tf.function
    def step(batch):
        def on_replica():
            with tf.GradientTape() as tape:
                x = tf.gather(checks.X, batch)
                loss = tf.reduce_mean((model(x, training=True) - tf.gather(checks.Y, batch)) ** 2)
            gradients = tape.gradient(loss, model.trainable_variables)
            model.optimizer.apply_gradients(zip(gradients, model.trainable_variables))

        strategy.run(on_replica)

    def now():
        return [variable.numpy() for variable in variables or model.trainable_variables]

    recorded, coordinator = [now()], coordinator_of(strategy)
    for batch in range(count):
        coordinator.schedule(step, args=(tf.constant(batch),))
        coordinator.join()
        recorded.append(now())
    return recorded


# The checks.


def fit_with_a_dataset_function(strategy):
    """Every asynchronous step is counted, and the averages lie with the variables, sharded as they."""
    for make in (ema_of_all, lambda: checks.swa("legacy")):
        model, optimizer, scheme = checks.compiled(strategy, make)
        optimizer.shadow_copy(model)
        fit(model)
        assert optimizer.iterations.numpy() == STEPS
        if scheme.period == 1:
            assert optimizer.num_averaged == STEPS
        for variable in model.trainable_variables:
            average = optimizer.get_slot(variable, "average")
            assert average.device == variable.device
            assert "/job:ps" in average.device
            assert average.shape == variable.shape
            # With a longer period two workers that begin the same step may both pass over the update.
            assert scheme.period > 1 or not np.array_equal(average.numpy(), variable.numpy())
        kernel = model.layers[0].kernel
        whole = optimizer.get_slot(kernel, "average")
        assert whole.shape == kernel.shape
        assert type(whole).__name__ == type(kernel).__name__ or not is_sharded(kernel)


def ema_of_all(keras=tf_keras):
    return checks.EMA.wrap(keras.optimizers.SGD(0.02, 0.9), trainable_weights_only=False), checks.EMA


def is_sharded(variable) -> bool:
    return isinstance(variable, tf.__internal__.distribute.ShardedVariable)


def coordinator_loop_follows_numpy(strategy, keras=tf_keras):
    for make in schemes_of(keras):
        model, optimizer, scheme = checks.compiled(strategy, make, keras=keras)
        recorded = serial_training(strategy, model)
        checks.assert_averages(optimizer, model.trainable_variables, recorded, scheme)
        assert optimizer.num_averaged == len(numpy_averages.due_steps(scheme, EXACT_STEPS))
        recorded = [whole_weights(model, weights) for weights in recorded]
        for weights, expected in zip(recorded, one_device_weights(keras, make, recorded[0])):
            for actual, value in zip(weights, expected):
                checks.assert_close(actual, value, tolerance=1e-5)


def whole_weights(model, shards):
    """The values of `model.trainable_variables`, shards put together."""
    shards, whole = list(shards), []
    for layer in model.layers:
        for variable in map(kerases.tf_variable, (layer.kernel, layer.bias)):
            count = len(variable.variables) if is_sharded(variable) else 1
            whole.append(np.concatenate([shards.pop(0) for _ in range(count)]))
    return whole


def one_device_weights(keras, make, initial):
    """The weights of the same training, from the same start, on this machine alone."""
    with tf.device("/job:chief/device:CPU:0"):
        model, optimizer, _ = checks.compiled(tf.distribute.get_strategy(), make, keras=keras)
        model.set_weights(initial)
        recorded = [model.get_weights()]
        for batch in range(EXACT_STEPS):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(checks.X[batch]) - checks.Y[batch]) ** 2)
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.inner_optimizer.apply_gradients(zip(gradients, model.trainable_variables))
            recorded.append(model.get_weights())
    return recorded


class Counting(tfav.AveragedOptimizerWrapper):
    """Starts from the weights before the first step; each update adds 1 to the average."""

    def average_op(self, var, average_var):
        return average_var + 1.0


class Half(tfav.AveragedOptimizerWrapper):
    """Each update takes the average half of the way to the weights."""

    def averaging_weight(self, steps, updates):
        return tf.constant(0.5, tf.float64)


def asynchronous(strategy, make, keras=tf_keras):
    """An optimizer, its variables, and a function that has two workers take so many steps at once.

    The variables stay as they are, zeros at first. The matrix is large, so that updates of one worker
    begin while those of the other run.
    """
    new_variable = tf.Variable if keras is tf_keras else keras.Variable
    with strategy.scope():
        whole = [new_variable(tf.zeros([2000, 1000]), name="matrix"), new_variable(0.0, name="scalar")]
        optimizer = make(keras.optimizers.SGD(1.0))
    variables = [shard for v in whole for shard in (v.variables if is_sharded(v) else [v])]
    optimizer.build(variables)
    coordinator = coordinator_of(strategy)

    @tf.function
    def step():
        strategy.run(lambda: optimizer.apply_gradients([(tf.zeros_like(v), v) for v in variables]))

    def run(steps, meanwhile=lambda: None):
        for _ in range(steps):
            coordinator.schedule(step)
        meanwhile()
        coordinator.join()

    return optimizer, variables, run


def asynchronous_steps_are_each_averaged_once(strategy, keras=tf_keras, times=10):
    """From the very first on; none is lost, none is overwritten by a start that comes late."""
    steps = 6
    optimizer, variables, run = asynchronous(strategy, Counting, keras)
    untrained = optimizer.get_weights()
    for _ in range(times):
        optimizer.set_weights(untrained)
        run(steps)
        assert optimizer.num_averaged == steps
        # Keras 3 reads the number of steps and writes it: two workers may count one step.
        assert keras is keras_3 or optimizer.iterations.numpy() == steps
        for variable in variables:
            average = optimizer.get_slot(variable, "average").numpy()
            np.testing.assert_array_equal(average, np.full(variable.shape, steps, np.float32))


def asynchronous_averages_do_not_overshoot(strategy):
    """Updates that overlapped would each close the same part of the gap, together more than one may."""
    steps = 10
    for make, expected in (
        (Half, 1.0 - 0.5**steps),
        (lambda inner: tfav.SWA(inner, 0, 1), steps / (steps + 1)),
    ):
        optimizer, variables, run = asynchronous(strategy, make)
        untrained = optimizer.get_weights()
        for _ in range(8):
            for variable in variables:
                variable.assign(tf.zeros_like(variable))
            optimizer.set_weights(untrained)
            optimizer.update_average()
            for variable in variables:
                variable.assign(tf.ones_like(variable))
            run(steps)
            assert optimizer.num_averaged == steps + 1
            for variable in variables:
                average = optimizer.get_slot(variable, "average").numpy()
                np.testing.assert_allclose(average, expected, rtol=1e-5)


def swap_and_assign_from_the_coordinator(strategy):
    model, optimizer, _ = checks.compiled(strategy, ema_of_all)
    optimizer.shadow_copy(model)
    fit(model)
    averages = [optimizer.get_slot(v, "average") for v in model.trainable_variables]
    before = checks.all_bits(model.trainable_variables), checks.all_bits(averages)

    def in_scope(function):
        with strategy.scope():
            function()

    contexts = {
        "outside": lambda function: function(),
        "in scope": in_scope,
        "in a function": lambda function: tf.function(lambda: function())(),
    }
    for name, call in contexts.items():
        call(optimizer.swap_weights)
        assert (checks.all_bits(averages), checks.all_bits(model.trainable_variables)) == before, name
        call(optimizer.swap_weights)
        assert (checks.all_bits(model.trainable_variables), checks.all_bits(averages)) == before, name
    raw = evaluate(model)
    with optimizer.swapped_weights():
        averaged = evaluate(model)
    assert abs(averaged - raw) > 1e-3 * raw
    reference = [optimizer.get_slot(layer.kernel, "average").numpy() for layer in model.layers]
    for layer, kernel in zip(model.layers, reference):
        assert_get_average_gives(optimizer, layer.kernel, kernel)
    for name, call in contexts.items():
        call(lambda: optimizer.assign_average_vars(model.variables))
        assert checks.all_bits(model.trainable_variables) == before[1], name
        assert checks.all_bits(averages) == before[1], name
    for layer, kernel in zip(model.layers, reference):
        np.testing.assert_array_equal(layer.kernel.numpy(), kernel)
    np.testing.assert_allclose(evaluate(model), averaged, rtol=1e-6)
    fit(model)
    assert optimizer.num_averaged == 2 * STEPS


def assert_get_average_gives(optimizer, variable, expected):
    """Swapped or not, eagerly and in a function."""

    def read():
        return optimizer.get_average(variable)

    for call in (read, tf.function(read)):
        np.testing.assert_array_equal(call().numpy(), expected)
        with optimizer.swapped_weights():
            np.testing.assert_array_equal(call().numpy(), expected)


class Record(tf_keras.callbacks.Callback):
    """Keeps the weights of the model before training and at the end of each epoch."""

    def on_train_begin(self, logs=None):
        self.weights = [self._now()]

    def on_epoch_end(self, epoch, logs=None):
        self.weights.append(self._now())

    def _now(self):
        return [v.numpy() for layer in self.model.layers for v in (layer.kernel, layer.bias)]


def validation_in_fit_sees_the_averages(strategy):
    """After each epoch. One step in each is all that runs at a time, so training can be compared too."""

    def train(*callbacks, **validation):
        model, optimizer, scheme = checks.compiled(strategy, checks.ema)
        history = model.fit(
            one_batch(),
            epochs=EXACT_STEPS,
            steps_per_epoch=1,
            callbacks=list(callbacks),
            verbose=0,
            **validation,
        ).history
        assert optimizer.num_averaged == optimizer.iterations.numpy() == EXACT_STEPS
        return model, optimizer, scheme, history

    undisturbed = Record()
    train(undisturbed)
    for swap_on_epoch in (False, True):
        trained, seen_by_others = Record(), Record()
        swap = tfav.callbacks.SwapAverageWeights(swap_on_epoch=swap_on_epoch)
        model, optimizer, scheme, history = train(
            trained, swap, seen_by_others, validation_data=one_batch(), validation_steps=1
        )
        for weights, expected in zip(trained.weights, undisturbed.weights):
            for value, same in zip(weights, expected):
                np.testing.assert_array_equal(value, same)
        for epoch, loss in enumerate(history["val_loss"], start=1):
            averages = [
                numpy_averages.expected_average(scheme, values[: epoch + 1])
                for values in zip(*trained.weights)
            ]
            np.testing.assert_allclose(loss, checks.loss_of(averages), rtol=1e-4)
            expected = averages if swap_on_epoch else trained.weights[epoch]
            for value, same in zip(seen_by_others.weights[epoch], expected):
                checks.assert_close(value, same)
        assert optimizer.weights_swapped == swap_on_epoch
        if swap_on_epoch:
            optimizer.swap_weights()
        raw = evaluate(model)
        with optimizer.swapped_weights():
            averaged = evaluate(model)
        np.testing.assert_allclose(history["val_loss"][-1], averaged, rtol=1e-6)
        assert abs(averaged - raw) > 1e-3 * raw


def training_while_swapped_fails_and_moves_nothing(strategy):
    for train in (fit, lambda model: serial_training(strategy, model, 1)):
        model, optimizer, _ = checks.compiled(strategy, checks.ema)
        train(model)
        with optimizer.swapped_weights():
            state = checks.all_bits(model.variables, optimizer.variables)
            with pytest.raises(tf.errors.InvalidArgumentError, match=checks.GUARD):
                train(model)
            assert checks.all_bits(model.variables, optimizer.variables) == state
        steps = int(optimizer.num_averaged)
        train(model)
        assert optimizer.num_averaged == 2 * steps


def batch_norm_statistics_are_averaged(strategy, keras=tf_keras):
    layer = keras.layers.BatchNormalization
    model, optimizer, scheme = checks.compiled(strategy, lambda: ema_of_all(keras), layer, keras)
    optimizer.shadow_copy(model)
    statistics = [v for v in model.non_trainable_variables if "moving" in v.name]
    assert statistics
    recorded = serial_training(strategy, model, variables=statistics)
    recorded[0] = recorded[1]  # The optimizer's first step begins after the forward pass updated them.
    assert np.ptp([values[0] for values in recorded], axis=0).max() > 0
    checks.assert_averages(optimizer, statistics, recorded, scheme)
    averages = checks.all_bits([optimizer.get_slot(v, "average") for v in statistics])
    state = checks.all_bits(model.variables)
    with optimizer.swapped_weights():
        assert checks.all_bits(statistics) == averages
    assert checks.all_bits(model.variables) == state


def optimizer_created_outside_the_scope(strategy):
    model = checks.new_model(strategy)
    optimizer, scheme = checks.ema()
    with strategy.scope():
        model.compile(optimizer, "mse")
    recorded = serial_training(strategy, model)
    checks.assert_averages(optimizer, model.trainable_variables, recorded, scheme)
    fit(model)
    assert optimizer.num_averaged == EXACT_STEPS + STEPS
    for variable in model.trainable_variables:
        assert optimizer.get_slot(variable, "average").device == variable.device


def update_batch_norm_is_of_all_data(strategy):
    """The mean and the variance of what the workers get, for the weights and for the averages."""
    model, optimizer, _ = checks.compiled(strategy, checks.ema, tf_keras.layers.BatchNormalization)
    fit(model)
    dense, layer, _ = model.layers
    inputs = checks.X.reshape(-1, checks.INPUTS)

    def update_and_compare():
        tfav.update_batch_norm(model, one_batch(), steps=3, verbose=0)
        kernel, bias = (np.asarray(v.numpy(), np.float64) for v in (dense.kernel, dense.bias))
        hidden = np.maximum(inputs @ kernel + bias, 0.0)
        expected = np.mean(hidden, axis=0), np.var(hidden, axis=0)
        for variable, value in zip((layer.moving_mean, layer.moving_variance), expected):
            np.testing.assert_allclose(variable.numpy(), value, rtol=0, atol=1e-5)
        return [value.numpy() for value in (layer.moving_mean, layer.moving_variance)]

    of_weights = update_and_compare()
    with optimizer.swapped_weights():
        of_averages = update_and_compare()
    for variable, value, other in zip(
        (layer.moving_mean, layer.moving_variance), of_weights, of_averages
    ):
        np.testing.assert_array_equal(variable.numpy(), value)
        assert not np.array_equal(value, other)


def nothing_is_compiled_and_nothing_moves(strategy):
    """The averages are updated on the parameter servers; no value larger than a scalar leaves them."""
    with strategy.scope():
        kernel = tf.Variable(tf.ones([checks.INPUTS, checks.HIDDEN]))
        optimizer = tfav.ExponentialMovingAverage(tf_keras.optimizers.SGD(), jit_compile=True)
    optimizer.shadow_copy([kernel] if not is_sharded(kernel) else kernel.variables)
    graph = tf.function(optimizer.update_average, autograph=False).get_concrete_function().graph
    graphs = [graph, *_inner_graphs(graph)]
    operations = [operation for each in graphs for operation in each.get_operations()]
    assert any(operation.type == "AssignSubVariableOp" for operation in operations)
    for operation in operations:
        assert "_XlaMustCompile" not in operation.node_def.attr, operation
        if operation.type in (
            "ReadVariableOp",
            "AssignVariableOp",
            "AssignAddVariableOp",
            "Sub",
            "AddV2",
        ):
            assert "/job:ps" in operation.device or operation.outputs[0].shape.rank == 0, operation


def this_process_knows_its_own_device(strategy):
    """Also if it was asked for it before it joined the cluster (`main` asks)."""
    with tf.device("/job:chief/device:CPU:0"):
        here = tf.Variable(0.0)
    assert not is_remote(here.device)
    with strategy.scope():
        assert is_remote(tf.Variable(0.0).device)


def is_remote(device) -> bool:
    return core_variables.is_remote(
        core_variables.Component(None, tf.float32, tf.TensorShape([]), device)
    )


def _inner_graphs(graph):
    """The bodies of the conditionals in a graph."""
    for name in graph.as_graph_def().library.function:
        function = graph._get_function(name.signature.name)
        if function is not None and getattr(function, "graph", None) is not None:
            yield function.graph


def mixed_precision(strategy):
    """bfloat16 works; loss scaling is refused, with the error that a bare optimizer gets.

    Layers of tf_keras cannot have sharded variables under a mixed policy, whatever the optimizer.
    """
    checks.loss_scaling_is_refused_as_by_tf_keras(strategy)
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    if strategy._extended._variable_partitioner is not None:
        with pytest.raises(ValueError, match="ShardedVariable"):
            checks.new_model(strategy)
        return
    model, optimizer, scheme = checks.compiled(strategy, checks.ema)
    recorded = serial_training(strategy, model)
    checks.assert_averages(optimizer, model.trainable_variables, recorded, scheme)
    with optimizer.swapped_weights():
        evaluate(model)


def keras_3_in_a_custom_loop(strategy):
    """Its own `fit` is broken there. It cannot train variables in shards, whatever the optimizer."""
    if strategy._extended._variable_partitioner is not None:
        bare = checks.compiled(strategy, lambda: (keras_3.optimizers.SGD(), None), keras=keras_3)[0]
        with pytest.raises(AttributeError, match="'ShardedVariable' object has no attribute 'handle'"):
            serial_training(strategy, bare)
        return
    coordinator_loop_follows_numpy(strategy, keras_3)
    asynchronous_steps_are_each_averaged_once(strategy, keras_3, times=2)
    batch_norm_statistics_are_averaged(strategy, keras_3)
    model, optimizer, _ = checks.compiled(strategy, schemes_of(keras_3)[0], keras=keras_3)
    serial_training(strategy, model)
    variables = model.trainable_variables
    averages = [optimizer.get_slot(variable, "average") for variable in variables]
    before = checks.all_bits(variables), checks.all_bits(averages)
    for variable, average in zip(variables, averages):
        assert kerases.tf_variable(variable).device == average.device
        assert "/job:ps" in average.device
    with tempfile.TemporaryDirectory() as directory, optimizer.swapped_weights():
        assert (checks.all_bits(averages), checks.all_bits(variables)) == before
        with pytest.raises(tf.errors.InvalidArgumentError, match=checks.GUARD):
            serial_training(strategy, model, 1)
        assert (checks.all_bits(averages), checks.all_bits(variables)) == before
        path = tf.train.Checkpoint(model=model, optimizer=optimizer).save(f"{directory}/ckpt")
        resumed, other, _ = checks.compiled(strategy, schemes_of(keras_3)[0], keras=keras_3)
        with strategy.scope():
            other.build(resumed.trainable_variables)
        status = tf.train.Checkpoint(model=resumed, optimizer=other).restore(path)
        status.assert_consumed()
    other.swap_weights()
    for each in (model, resumed):
        serial_training(strategy, each)
    assert checks.all_bits(resumed.trainable_variables) == checks.all_bits(variables)
    assert [w.tolist() for w in other.get_weights()] == [w.tolist() for w in optimizer.get_weights()]


CHECKS = [
    keras_3_in_a_custom_loop,
    fit_with_a_dataset_function,
    coordinator_loop_follows_numpy,
    asynchronous_steps_are_each_averaged_once,
    asynchronous_averages_do_not_overshoot,
    swap_and_assign_from_the_coordinator,
    validation_in_fit_sees_the_averages,
    training_while_swapped_fails_and_moves_nothing,
    batch_norm_statistics_are_averaged,
    optimizer_created_outside_the_scope,
    update_batch_norm_is_of_all_data,
    nothing_is_compiled_and_nothing_moves,
    this_process_knows_its_own_device,
    mixed_precision,
]


def otherwise_sharded(strategy):
    """Two servers with whole variables, one server with shards."""
    one_shard = strategy._extended._variable_partitioner is None
    shards = tf.distribute.experimental.partitioners.FixedShardsPartitioner(2)
    strategy._extended._variable_partitioner = shards if one_shard else None
    try:
        for check in (
            fit_with_a_dataset_function,
            coordinator_loop_follows_numpy,
            asynchronous_steps_are_each_averaged_once,
            swap_and_assign_from_the_coordinator,
            training_while_swapped_fails_and_moves_nothing,
            batch_norm_statistics_are_averaged,
            mixed_precision,
        ):
            check(strategy)
            tf_keras.mixed_precision.set_global_policy("float32")
        with tempfile.TemporaryDirectory() as directory:
            save(strategy, os.path.join(directory, "swapped"))
            restore(strategy, os.path.join(directory, "swapped"))
    finally:
        strategy._extended._variable_partitioner = None if one_shard else shards


CHECKS.append(otherwise_sharded)


# Saving, and restoring under another sharding.


def new_training(strategy):
    model, optimizer, _ = checks.compiled(strategy, ema_of_all, tf_keras.layers.BatchNormalization)
    optimizer.shadow_copy(model)
    optimizer.build(model.trainable_variables)  # tf_keras restores shards of what exists only.
    return model, optimizer, tf.train.Checkpoint(model=model, optimizer=optimizer)


def save(strategy, directory):
    """Trains and saves; the weights are swapped where the name says so."""
    model, optimizer, checkpoint = new_training(strategy)
    fit(model)
    if directory.endswith("swapped"):
        optimizer.swap_weights()
    checkpoint.write(os.path.join(directory, "checkpoint"))
    values = [variable.numpy() for variable in variables_and_slots(model, optimizer)]
    temporary = f"{directory}-unfinished.npz"
    np.savez(temporary, *values)
    os.rename(temporary, f"{directory}.npz")  # From now on it may be restored.


def variables_and_slots(model, optimizer):
    variables = [
        getattr(layer, name)
        for layer in model.layers
        for name in ("kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance")
        if hasattr(layer, name)
    ]
    return variables + [optimizer.get_slot(variable, "average") for variable in variables]


def restore(strategy, directory):
    """Restores what another cluster saves, once it is there."""
    processes.wait_until(lambda: os.path.exists(f"{directory}.npz"), SECONDS, lambda: directory)
    model, optimizer, checkpoint = new_training(strategy)
    status = checkpoint.read(os.path.join(directory, "checkpoint"))
    status.assert_consumed()
    saved = np.load(f"{directory}.npz")
    assert len(saved.files) == 2 * 8
    for name, variable in zip(saved.files, variables_and_slots(model, optimizer)):
        np.testing.assert_array_equal(variable.numpy(), saved[name])
    assert optimizer.num_averaged == optimizer.iterations.numpy() == STEPS
    assert optimizer.weights_swapped == directory.endswith("swapped")
    if optimizer.weights_swapped:
        with pytest.raises(tf.errors.InvalidArgumentError, match=checks.GUARD):
            fit(model)
        optimizer.swap_weights()
    fit(model)
    assert optimizer.num_averaged == 2 * STEPS


def worker_dies(strategy, arguments):
    """In the midst of an update, while no other worker may begin one: the others go on nevertheless.

    Args:
      arguments: the process of the worker that goes on, that of the one that dies, and how the names of
        the files begin that get what the parameter servers print.
    """
    survivor, victim, logs = arguments.split(",")
    logs = pathlib.Path(logs)
    gate = logs.with_name(f"{logs.name}-open")  # Updates that have begun end only while this file exists.

    class Gated(Counting):
        def average_op(self, var, average_var):
            if not var.shape.rank:
                return average_var + 1.0  # One is enough: each that waits takes a thread of the server.
            # The step is counted before this is said, since the count is read for it.
            with tf.control_dependencies([tf.print("[updating] after", self.iterations, "steps")]):
                # What was found is part of the question, so that TensorFlow does not ask only once.
                found = tf.while_loop(
                    lambda found: tf.equal(tf.size(found), 0),
                    lambda found: [tf.io.matching_files(tf.concat([[str(gate)], found], 0))],
                    [tf.constant([], tf.string)],
                    shape_invariants=[tf.TensorShape([None])],
                )[0]
            return average_var + tf.cast(tf.size(found), average_var.dtype)

    def begun():
        """On the server of the first shard, which may be any; the others' shards wait for it."""
        texts = [log.read_text(errors="replace") for log in logs.parent.glob(f"{logs.name}*.log")]
        return max(text.count("[updating]") for text in texts)

    def dies():
        processes.wait_until(lambda: begun() == 3, SECONDS, lambda: "No update begins.")
        os.kill(int(victim), signal.SIGKILL)
        processes.wait_until_gone([int(victim)], SECONDS)
        gate.touch()
        os.kill(int(survivor), signal.SIGCONT)

    gate.touch()
    optimizer, variables, run = asynchronous(strategy, Gated)
    run(2)
    gate.unlink()
    os.kill(int(survivor), signal.SIGSTOP)  # So it is the other that begins an update.
    run(6, meanwhile=dies)
    assert optimizer.num_averaged == 8
    # The step in which the worker died was taken twice, and so may be a part of its update.
    assert begun() == 9
    assert optimizer.iterations.numpy() == 9
    for variable in variables:
        average = optimizer.get_slot(variable, "average").numpy()
        assert np.ptp(average) == 0
        assert average.flat[0] in (8.0, 9.0)


def main(shards, *commands):
    cluster = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    partitioner = None
    if shards != "1":
        partitioner = tf.distribute.experimental.partitioners.FixedShardsPartitioner(int(shards))
    assert is_remote("/job:chief/replica:0/task:0/device:CPU:0")  # No such job is known yet.
    strategy = tf.distribute.ParameterServerStrategy(cluster, variable_partitioner=partitioner)
    passed = True
    for command in commands:
        name, _, argument = command.partition("=")
        if name == "all_checks":
            passed &= checks.run(CHECKS, strategy, keep_going=True)
            continue
        print(f"[running] {name}")
        {"save": save, "restore": restore, "worker_dies": worker_dies}[name](strategy, argument)
        print(f"[passed] {name}")
    return passed


if __name__ == "__main__":
    passed = False
    try:
        passed = main(*sys.argv[1:])
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    # Without it, threads of the coordinator keep the process waiting for servers that do not end.
    os._exit(0 if passed else 1)
