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
"""Training loops that save checkpoints and resume from them, to be killed at any moment.

They run in processes of their own (`kill_test.py`), say on a connection what they are about to do, and
leave the final state in a file.
"""

import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import numpy as np
import tensorflow as tf
import tf_keras

import tf_averaging as tfav

STEPS = 12
X = np.random.default_rng(0).normal(size=(STEPS, 8, 4)).astype(np.float32)
Y = X[:, :, :1] - 2.0 * X[:, :, 1:2]


def new_model(scheme):
    tf_keras.utils.set_random_seed(1)
    model = tf_keras.Sequential([tf_keras.layers.Dense(5, input_shape=(4,)), tf_keras.layers.Dense(1)])
    if scheme == "swa":
        optimizer = tfav.SWA(tf_keras.optimizers.Adam(0.01), 1, 2)
    else:
        optimizer = tfav.ExponentialMovingAverage(tf_keras.optimizers.legacy.Adam(0.01))
    model.compile(optimizer, "mse")
    return model, optimizer


def write_result(model, optimizer, path):
    """All at once, so that a file that exists is complete."""
    partial = pathlib.Path(path).with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, *model.get_weights(), *optimizer.get_weights())
    partial.rename(path)


def checkpoint_manager(scheme, directory, result, about_to):
    """A custom loop with a `CheckpointManager`; every other save happens while swapped."""
    model, optimizer = new_model(scheme)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
    manager = tf.train.CheckpointManager(checkpoint, directory, max_to_keep=2)
    about_to.send("restore")
    manager.restore_or_initialize()
    if optimizer.weights_swapped:
        optimizer.swap_weights()

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))

    while optimizer.iterations < STEPS:
        index = int(optimizer.iterations)
        about_to.send("step")
        step(X[index], Y[index])
        if index % 2:
            about_to.send("swap")
            optimizer.swap_weights()
            if index % 4 == 3:
                about_to.send("save while swapped")
                manager.save()
            about_to.send("swap")
            optimizer.swap_weights()
            if index % 4 == 1:
                about_to.send("save")
                manager.save()
    write_result(model, optimizer, result)


def backup_and_restore(scheme, directory, result, about_to):
    """`fit` with `BackupAndRestore`, and the averages evaluated after each epoch."""
    model, optimizer = new_model(scheme)
    x, y = X.reshape(-1, 4), Y.reshape(-1, 1)

    class Report(tf_keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            about_to.send("step")

        def on_epoch_end(self, epoch, logs=None):
            about_to.send("swap")
            with optimizer.swapped_weights():
                about_to.send("evaluate")
                model.evaluate(x, y, batch_size=96, verbose=0)
            about_to.send("save")

    backup = tf_keras.callbacks.BackupAndRestore(directory, delete_checkpoint=False)
    about_to.send("restore")
    model.fit(x, y, batch_size=32, epochs=4, shuffle=False, verbose=0, callbacks=[Report(), backup])
    write_result(model, optimizer, result)
