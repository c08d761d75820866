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
import sys

import checks
import numpy as np
import processes
import pytest
import tensorflow as tf
import tf_keras

import tf_averaging as tfav

STEPS = 5
EXACT_STEPS = 3
SECONDS = 200


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
        model, optimizer, (start, period, _) = checks.compiled(strategy, make)
        optimizer.shadow_copy(model)
        fit(model)
        assert optimizer.iterations.numpy() == STEPS
        if (start, period) == (0, 1):
            assert optimizer.num_averaged == STEPS
        for variable in model.trainable_variables:
            average = optimizer.get_slot(variable, "average")
            assert average.device == variable.device
            assert "/job:ps" in average.device
            assert average.shape == variable.shape
            assert not np.array_equal(average.numpy(), variable.numpy())
        kernel = model.layers[0].kernel
        whole = optimizer.get_slot(kernel, "average")
        assert whole.shape == kernel.shape
        assert type(whole).__name__ == type(kernel).__name__ or not is_sharded(kernel)


def ema_of_all():
    return checks.ema(trainable_weights_only=False)


def is_sharded(variable) -> bool:
    return isinstance(variable, tf.__internal__.distribute.ShardedVariable)


def coordinator_loop_follows_numpy(strategy):
    for make in (checks.ema, lambda: checks.swa("legacy")):
        model, optimizer, scheme = checks.compiled(strategy, make)
        recorded = serial_training(strategy, model)
        checks.assert_averages(optimizer, model.trainable_variables, recorded, scheme)
        start, period, _ = scheme
        assert optimizer.num_averaged == len(range(start, EXACT_STEPS, period))
        recorded = [whole_weights(model, weights) for weights in recorded]
        for weights, expected in zip(recorded, one_device_weights(make, recorded[0])):
            for actual, value in zip(weights, expected):
                checks.assert_close(actual, value, tolerance=1e-5)


def whole_weights(model, shards):
    """The values of `model.trainable_variables`, shards put together."""
    shards, whole = list(shards), []
    for layer in model.layers:
        for variable in (layer.kernel, layer.bias):
            count = len(variable.variables) if is_sharded(variable) else 1
            whole.append(np.concatenate([shards.pop(0) for _ in range(count)]))
    return whole


def one_device_weights(make, initial):
    """The weights of the same training, from the same start, on this machine alone."""
    with tf.device("/job:chief/device:CPU:0"):
        model, optimizer, _ = checks.compiled(tf.distribute.get_strategy(), make)
        model.set_weights(initial)
        recorded = [model.get_weights()]
        for batch in range(EXACT_STEPS):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(checks.X[batch]) - checks.Y[batch]) ** 2)
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.inner_optimizer.apply_gradients(zip(gradients, model.trainable_variables))
            recorded.append(model.get_weights())
    return recorded


def asynchronous_steps_are_each_averaged_once(strategy):
    """Each fold closes 1/2^20 of the gap; two workers do 60, and none may be lost.

    The matrix is large, so that folds of one worker begin while those of the other run.
    """
    folds, weight = 60, 2.0**-20

    class Slow(tfav.AveragedOptimizerWrapper):
        def averaging_weight(self, step):
            return tf.constant(weight, tf.float64)

    with strategy.scope():
        whole = [tf.Variable(tf.zeros([2000, 1000]), name="matrix"), tf.Variable(0.0, name="scalar")]
        optimizer = Slow(tf_keras.optimizers.SGD(1.0))
    variables = [shard for v in whole for shard in (v.variables if is_sharded(v) else [v])]
    optimizer.shadow_copy(variables)
    optimizer.update_average()
    for variable in variables:
        variable.assign(tf.ones_like(variable))

    @tf.function
    def step():
        strategy.run(lambda: optimizer.apply_gradients([(tf.zeros_like(v), v) for v in variables]))

    coordinator = coordinator_of(strategy)
    for _ in range(folds):
        coordinator.schedule(step)
    coordinator.join()
    assert optimizer.iterations.numpy() == folds
    assert optimizer.num_averaged == folds + 1
    for variable in variables:
        average = optimizer.get_slot(variable, "average").numpy()
        np.testing.assert_allclose(average, folds * weight, rtol=1e-3)


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
    for name, call in contexts.items():
        call(lambda: optimizer.assign_average_vars(model.variables))
        assert checks.all_bits(model.trainable_variables) == before[1], name
        assert checks.all_bits(averages) == before[1], name
    for layer, kernel in zip(model.layers, reference):
        np.testing.assert_array_equal(layer.kernel.numpy(), kernel)
    np.testing.assert_allclose(evaluate(model), averaged, rtol=1e-6)
    fit(model)
    assert optimizer.num_averaged == 2 * STEPS


def validation_in_fit_sees_the_averages(strategy):
    """After each epoch. One step in each is all that runs at a time, so training can be compared too."""

    class Record(tf_keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.weights = [self._now()]

        def on_epoch_end(self, epoch, logs=None):
            self.weights.append(self._now())

        def _now(self):
            return [v.numpy() for layer in self.model.layers for v in (layer.kernel, layer.bias)]

    def train(*callbacks, **validation):
        model, optimizer, scheme = checks.compiled(strategy, checks.ema)
        record, epochs = Record(), EXACT_STEPS
        history = model.fit(
            one_batch(),
            epochs=epochs,
            steps_per_epoch=1,
            callbacks=[*callbacks, record],
            verbose=0,
            **validation,
        ).history
        assert not optimizer.weights_swapped
        assert optimizer.num_averaged == optimizer.iterations.numpy() == epochs
        return model, optimizer, scheme, record.weights, history

    swap = tfav.callbacks.SwapAverageWeights(swap_on_epoch=False)
    model, optimizer, scheme, recorded, history = train(
        swap, validation_data=one_batch(), validation_steps=1
    )
    for epoch, loss in enumerate(history["val_loss"]):
        averages = [checks.expected_average(values[: epoch + 2], *scheme) for values in zip(*recorded)]
        np.testing.assert_allclose(loss, checks.loss_of(averages), rtol=1e-4)
    raw = evaluate(model)
    with optimizer.swapped_weights():
        averaged = evaluate(model)
    np.testing.assert_allclose(history["val_loss"][-1], averaged, rtol=1e-6)
    assert abs(averaged - raw) > 1e-3 * raw

    _, _, _, undisturbed, _ = train()
    for weights, expected in zip(recorded, undisturbed):
        for value, same in zip(weights, expected):
            np.testing.assert_array_equal(value, same)


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


def batch_norm_statistics_are_averaged(strategy):
    model, optimizer, scheme = checks.compiled(strategy, ema_of_all, tf_keras.layers.BatchNormalization)
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


def nothing_is_compiled_and_nothing_moves(strategy):
    """The averages are updated on the parameter servers; no value larger than a scalar leaves them."""
    with strategy.scope():
        kernel = tf.Variable(tf.ones([checks.INPUTS, checks.HIDDEN]))
        optimizer = tfav.ExponentialMovingAverage("sgd", jit_compile=True)
    optimizer.shadow_copy([kernel] if not is_sharded(kernel) else kernel.variables)
    graph = tf.function(optimizer.update_average, autograph=False).get_concrete_function().graph
    graphs = [graph, *_inner_graphs(graph)]
    operations = [operation for each in graphs for operation in each.get_operations()]
    assert any(operation.type == "AssignAddVariableOp" for operation in operations)
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


CHECKS = [
    fit_with_a_dataset_function,
    coordinator_loop_follows_numpy,
    asynchronous_steps_are_each_averaged_once,
    swap_and_assign_from_the_coordinator,
    validation_in_fit_sees_the_averages,
    training_while_swapped_fails_and_moves_nothing,
    batch_norm_statistics_are_averaged,
    nothing_is_compiled_and_nothing_moves,
    mixed_precision,
]


# Saving, and restoring under another sharding.


def new_training(strategy):
    model, optimizer, _ = checks.compiled(strategy, checks.ema)
    optimizer.build(model.trainable_variables)  # tf_keras restores shards of what exists only.
    return model, optimizer, tf.train.Checkpoint(model=model, optimizer=optimizer)


def save(strategy, directory):
    model, optimizer, checkpoint = new_training(strategy)
    fit(model)
    checkpoint.write(os.path.join(directory, "checkpoint"))
    values = [variable.numpy() for variable in variables_and_averages(model, optimizer)]
    temporary = f"{directory}-unfinished.npz"
    np.savez(temporary, *values)
    os.rename(temporary, f"{directory}.npz")  # From now on it may be restored.


def variables_and_averages(model, optimizer):
    variables = [v for layer in model.layers for v in (layer.kernel, layer.bias)]
    return variables + [optimizer.get_slot(variable, "average") for variable in variables]


def restore(strategy, directory):
    """Restores what another cluster saves, once it is there."""
    processes.wait_until(lambda: os.path.exists(f"{directory}.npz"), SECONDS, lambda: directory)
    model, optimizer, checkpoint = new_training(strategy)
    status = checkpoint.read(os.path.join(directory, "checkpoint"))
    status.assert_consumed()
    saved = np.load(f"{directory}.npz")
    for name, variable in zip(saved.files, variables_and_averages(model, optimizer)):
        np.testing.assert_array_equal(variable.numpy(), saved[name])
    assert optimizer.num_averaged == optimizer.iterations.numpy() == STEPS
    fit(model)
    assert optimizer.num_averaged == 2 * STEPS


def main(shards, *commands):
    cluster = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    partitioner = None
    if shards != "1":
        partitioner = tf.distribute.experimental.partitioners.FixedShardsPartitioner(int(shards))
    strategy = tf.distribute.ParameterServerStrategy(cluster, variable_partitioner=partitioner)
    passed = True
    for command in commands:
        name, _, argument = command.partition("=")
        if name == "all_checks":
            passed &= checks.run(CHECKS, strategy, keep_going=True)
            continue
        print(f"[running] {name}")
        {"save": save, "restore": restore}[name](strategy, argument)
        print(f"[passed] {name}")
    sys.stdout.flush()
    # Without it, threads of the coordinator keep the process waiting for servers that do not end.
    os._exit(0 if passed else 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
