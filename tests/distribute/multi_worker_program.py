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
"""Program: one worker of a MultiWorkerMirroredStrategy; `TF_CONFIG` says which one of how many."""

import os
import signal
import sys
import traceback

import checks
import numpy as np
import processes
import tensorflow as tf

import tf_averaging as tfav
from tests import numpy_averages

COLLECTIVE_SECONDS = 30.0  # How long a worker waits for one that does not come, where that is tested.
UNEVEN = 37  # Examples: neither the batches nor the workers' shares of them are of one size.


def task_of(strategy):
    resolver = strategy.cluster_resolver
    return resolver.task_type or "worker", resolver.task_id or 0


def is_chief(strategy) -> bool:
    return task_of(strategy)[1] == 0


def new_training(strategy):
    """A model with averaged statistics, its optimizer and a checkpoint of both."""
    model, optimizer, _ = checks.compiled(
        strategy,
        lambda: checks.ema(trainable_weights_only=False),
        checks.KERAS.layers.BatchNormalization,
    )
    optimizer.shadow_copy(model)
    return model, optimizer, tf.train.Checkpoint(model=model, optimizer=optimizer)


def save(strategy, directory):
    """Trains and saves: the chief here, the others, who must take part, to a place of their own."""
    model, optimizer, checkpoint = new_training(strategy)
    checks.train(model, strategy)
    task = task_of(strategy)[1]
    place = directory if is_chief(strategy) else f"{directory}-temporary-{task}"
    path = checkpoint.write(os.path.join(place, "checkpoint"))
    averages = [optimizer.get_slot(variable, "average") for variable in model.trainable_variables]
    checks.report("saved", [*model.trainable_variables, *averages])
    np.savez(f"{directory}-values-{task}.npz", **values_by_name(strategy, model, optimizer))
    if not is_chief(strategy):
        tf.io.gfile.rmtree(os.path.dirname(path))


def values_by_name(strategy, model, optimizer):
    """What a reader sees, weights and averages; on-read variables aggregated."""
    values = {"num_averaged": optimizer.num_averaged, "iterations": optimizer.iterations.numpy()}
    for index, variable in enumerate(model.variables):
        values[f"weights{index}"] = checks.as_read(strategy, variable)
        values[f"average{index}"] = checks.as_read(strategy, optimizer.get_slot(variable, "average"))
    return {name: np.asarray(value) for name, value in values.items()}


def restore(strategy, directory):
    """Restores what a cluster of any size has saved, and trains on."""
    model, optimizer, checkpoint = new_training(strategy)
    checkpoint.read(os.path.join(directory, "checkpoint")).assert_existing_objects_matched()
    saved = np.load(f"{directory}-values-0.npz")
    for name, value in values_by_name(strategy, model, optimizer).items():
        np.testing.assert_allclose(value, saved[name], rtol=1e-6, err_msg=name)
        if name.startswith(("num", "iter")):
            assert value == saved[name]
    recorded = checks.train(model, strategy)
    for index, variable in enumerate(model.trainable_variables):
        position = [v is variable for v in model.variables].index(True)
        average = np.asarray(saved[f"average{position}"], np.float64)
        for step in range(checks.STEPS):
            weight = checks.EMA.weight(checks.STEPS + step, 0)
            average = average + weight * (recorded[step + 1][index] - average)
        checks.assert_close(checks.average_of(optimizer, variable), average)
    checks.report("restored", model.trainable_variables)
    with optimizer.swapped_weights():
        checks.evaluate(model, strategy)


def save_snapshots(strategy, directory):
    """All workers call `save_snapshot`, and one writes; then each finds its averages in the files."""
    widths = {(2 / 36) ** 0.5: 2, 12**-0.5: 1}  # The second ones are the powers that belong to them.
    model, optimizer, _ = checks.compiled(
        strategy, lambda: (tfav.PostHocEMA(checks.KERAS.optimizers.SGD(0.02), list(widths)), None)
    )
    recorded = checks.train(model, strategy)
    paths = [optimizer.save_snapshot(directory, model)]
    recorded += checks.train(model, strategy)[1:]
    if not is_chief(strategy):  # It comes late, and finds the chief's file.
        processes.wait_until(lambda: len(os.listdir(directory)) == 2, COLLECTIVE_SECONDS, str)
    paths.append(optimizer.save_snapshot(directory, model))
    checks.train(model, strategy)  # No worker ends this before the chief has written.
    assert sorted(tf.io.gfile.glob(f"{directory}/*")) == paths
    for width, power in widths.items():
        scheme = numpy_averages.Scheme(
            None, 0, 1, lambda _, updates, p=power: 1 - (updates / (updates + 1)) ** p
        )
        found = tfav.post_hoc_average(directory, width).values()
        for average, weights in zip(found, zip(*recorded)):
            checks.assert_close(average, numpy_averages.expected_average(scheme, weights))
        checks.report("combined", [tf.Variable(average) for average in found])


def swap_alone(strategy, then="exit"):
    """The chief swaps; then both train. The chief's step fails, and it exits, or else lives on."""
    model, optimizer, _ = checks.compiled(strategy, checks.ema)
    checks.train(model, strategy)
    if is_chief(strategy):
        optimizer.swap_weights()
    print("[training]")
    try:
        checks.train(model, strategy)
    except tf.errors.InvalidArgumentError:
        if then == "exit":
            raise
        traceback.print_exc()
        print("[lives on]")
        signal.pause()


# The checks: what is called on every worker, and evaluates or aggregates over all of them.


def validation_in_fit_sees_the_averages(strategy):
    """After each epoch, as with a manual swap; training goes on as if nothing had been."""
    layers = (None, checks.KERAS.layers.BatchNormalization)  # Statistics differ between the workers.
    for layer, of_all in zip(layers, (False, True)):
        swap_on_epoch = of_all

        def make(of_all=of_all):
            return checks.ema(trainable_weights_only=not of_all)

        model, optimizer, scheme = checks.compiled(strategy, make, layer)
        record = checks.Record()
        history = model.fit(
            checks.batches(strategy, repeat=2),
            epochs=2,
            steps_per_epoch=checks.STEPS,
            validation_data=checks.batches(strategy, repeat=-1),
            validation_steps=checks.STEPS,
            callbacks=[tfav.callbacks.SwapAverageWeights(swap_on_epoch), record],
            verbose=0,
        ).history["val_loss"]
        assert optimizer.weights_swapped == swap_on_epoch
        if swap_on_epoch:
            optimizer.swap_weights()
        checks.assert_averages(optimizer, model.trainable_variables, record.weights, scheme)

        undisturbed, other, _ = checks.compiled(strategy, make, layer)
        other.shadow_copy(undisturbed)
        checks.train(undisturbed, strategy, epochs=2)
        state = checks.all_bits(model.variables, optimizer.variables)
        assert state == checks.all_bits(undisturbed.variables, other.variables)
        raw = checks.evaluate(undisturbed, strategy)
        with other.swapped_weights():
            averaged = checks.evaluate(undisturbed, strategy)
        assert abs(averaged - raw) > 1e-3 * raw
        np.testing.assert_allclose(history[-1], averaged, rtol=1e-6)
        if layer is None:
            for epoch, loss in enumerate(history):
                steps = (epoch + 1) * checks.STEPS
                averages = [
                    numpy_averages.expected_average(scheme, values[: steps + 1])
                    for values in zip(*record.weights)
                ]
                np.testing.assert_allclose(loss, checks.loss_of(averages), rtol=1e-4)
        averages = [optimizer.get_slot(variable, "average") for variable in model.trainable_variables]
        checks.report("validated", [*model.trainable_variables, *averages])
        checks.report("losses", [tf.Variable(history)])


def update_batch_norm_is_of_all_data(strategy):
    """The mean and the variance of what all workers get, for the weights and for the averages."""
    model, optimizer, _ = checks.compiled(strategy, checks.ema, checks.KERAS.layers.BatchNormalization)
    checks.train(model, strategy)
    dense, layer, _ = model.layers
    statistics = [layer.moving_mean, layer.moving_variance]
    x = checks.X.reshape(-1, checks.INPUTS)[:UNEVEN]

    def expected():
        kernel, bias = (np.asarray(variable.numpy(), np.float64) for variable in dense.weights)
        inputs = np.maximum(x @ kernel + bias, 0.0)
        return [np.mean(inputs, axis=0), np.var(inputs, axis=0)]

    def update_and_compare(data):
        before = checks.all_bits(model.trainable_variables)
        tfav.update_batch_norm(model, data, verbose=0)
        assert checks.all_bits(model.trainable_variables) == before
        for variable, value in zip(statistics, expected()):
            np.testing.assert_allclose(checks.same_on_all_replicas(variable), value, rtol=0, atol=1e-5)
        checks.report("recomputed", statistics)

    update_and_compare(tf.data.Dataset.from_tensor_slices(x).batch(checks.BATCH))
    raw = checks.all_bits(statistics)
    with optimizer.swapped_weights():
        update_and_compare(x)
        assert checks.all_bits(statistics) != raw
    assert checks.all_bits(statistics) == raw


def averaging_does_not_communicate(strategy):
    """No collective operation in a step whose gradients are summed already, nor in a swap."""
    with strategy.scope():
        variables = [tf.Variable(tf.ones([40, 1000])), tf.Variable(tf.ones([5], tf.float16))]
        optimizers = [
            tfav.SWA(checks.KERAS.optimizers.SGD(), 1, 2),
            tfav.ExponentialMovingAverage(checks.KERAS.optimizers.SGD(), average_period=2),
        ]

    def step(optimizer, skip):
        pairs = [(tf.ones_like(variable), variable) for variable in variables[:1]]
        optimizer.apply_gradients(pairs, skip_gradients_aggregation=skip)

    def collectives(function):
        graph = tf.function(lambda: strategy.run(function)).get_concrete_function().graph.as_graph_def()
        nodes = [*graph.node, *(node for each in graph.library.function for node in each.node_def)]
        return [node.op for node in nodes if node.op.startswith("Collective")]

    for optimizer in optimizers:
        optimizer.shadow_copy(variables)
        assert collectives(lambda: step(optimizer, skip=False))  # noqa: B023
        assert not collectives(lambda: step(optimizer, skip=True))  # noqa: B023
        assert not collectives(optimizer.update_average)
        assert not collectives(optimizer.swap_weights)
        assert not collectives(lambda: optimizer.assign_average_vars(variables))  # noqa: B023


CHECKS = {
    "tf_keras": [
        *checks.known_to("tf_keras", checks.SYNCHRONOUS),
        *checks.REPLICATED,
        validation_in_fit_sees_the_averages,
        update_batch_norm_is_of_all_data,
        averaging_does_not_communicate,
    ],
    "keras": [
        *checks.ONE_OF_EACH_KIND,
        checks.training_while_swapped_fails_and_moves_nothing,
        checks.get_average_is_the_average,
        checks.synchronized_batch_norm_is_averaged,
        checks.keras_accumulates_gradients,
        update_batch_norm_is_of_all_data,
    ],
}


def all_checks(strategy):
    checks.run(CHECKS[checks.KERAS.__name__], strategy, keep_going=False)


COMMANDS = (all_checks, save, restore, save_snapshots, swap_alone)


def main(*commands):
    options = tf.distribute.experimental.CommunicationOptions(
        timeout_seconds=COLLECTIVE_SECONDS if "swap_alone=live_on" in commands else None
    )
    # Before all else of TensorFlow.
    strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    for command in commands:
        name, _, argument = command.partition("=")
        function = {f.__name__: f for f in COMMANDS}[name]
        print(f"[running] {name}")
        function(strategy, *([argument] if argument else []))
        print(f"[passed] {name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
