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
import sys

import checks
import numpy as np
import tensorflow as tf
import tf_keras


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
        tf_keras.layers.BatchNormalization,
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
    with strategy.scope():
        values = {"num_averaged": optimizer.num_averaged, "iterations": optimizer.iterations.numpy()}
        for index, variable in enumerate(model.variables):
            values[f"weights{index}"] = variable.read_value().numpy()
            values[f"average{index}"] = optimizer.get_slot(variable, "average").read_value().numpy()
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
            weight = checks.ema_weight(checks.STEPS + step, 0)
            average = average + weight * (recorded[step + 1][index] - average)
        checks.assert_close(checks.average_of(optimizer, variable), average)
    checks.report("restored", model.trainable_variables)
    with optimizer.swapped_weights():
        checks.evaluate(model, strategy)


def swap_alone(strategy):
    """The chief swaps; then both train."""
    model, optimizer, _ = checks.compiled(strategy, checks.ema)
    checks.train(model, strategy)
    if is_chief(strategy):
        optimizer.swap_weights()
    print("[training]")
    checks.train(model, strategy)


def all_checks(strategy):
    checks.run(checks.SYNCHRONOUS + checks.REPLICATED, strategy, keep_going=False)


def main(*commands):
    strategy = tf.distribute.MultiWorkerMirroredStrategy()  # Before all else of TensorFlow.
    for command in commands:
        name, _, argument = command.partition("=")
        function = {f.__name__: f for f in (all_checks, save, restore, swap_alone)}[name]
        print(f"[running] {name}")
        function(strategy, *([argument] if argument else []))
        print(f"[passed] {name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
