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

import tf_averaging as tfav
from tests import testing_utils
from tests.testing_utils import BATCH
from tests.testing_utils import KERAS

STEPS = 12
X, Y = (data[: STEPS * BATCH].reshape(STEPS, BATCH, -1) for data in (testing_utils.X, testing_utils.Y))


def new_model(scheme, loss_scaling=False):
    if scheme == "swa":
        averaging = tfav.SWA(testing_utils.CURRENT.Adam(0.01), 1, 2, average_dtype="float64")
    else:
        averaging = tfav.ExponentialMovingAverage(testing_utils.LEGACY.Adam(0.01))
    options = {"units": (5, 1), "batch_norm": True, "loss_scaling": loss_scaling}
    return testing_utils.new_model(averaging, **options), averaging


def write_result(model, optimizer, path):
    """All at once, so that a file that exists is complete."""
    partial = pathlib.Path(path).with_suffix(".partial")
    with partial.open("wb") as file:
        scale = getattr(model.optimizer, "loss_scale", tf.constant(0.0)).numpy()
        np.savez(file, scale, *model.get_weights(), *optimizer.get_weights())
    partial.rename(path)


def checkpoint_manager(scheme, directory, result, about_to, loss_scaling=False):
    """A custom loop with a `CheckpointManager`; every other save happens while swapped."""
    model, optimizer = new_model(scheme, loss_scaling)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    manager = tf.train.CheckpointManager(checkpoint, directory, max_to_keep=2)
    about_to.send("restore")
    manager.restore_or_initialize()
    if optimizer.weights_swapped:
        optimizer.swap_weights()

    @tf.function
    def step(x, y):
        variables = model.trainable_variables
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
            if loss_scaling:
                loss = model.optimizer.get_scaled_loss(loss)
        gradients = tape.gradient(loss, variables)
        if loss_scaling:
            gradients = model.optimizer.get_unscaled_gradients(gradients)
        model.optimizer.apply_gradients(zip(gradients, variables))

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


def loss_scaling(scheme, directory, result, about_to):
    """The same under a `LossScaleOptimizer`, whose scale grows every third step."""
    checkpoint_manager(scheme, directory, result, about_to, loss_scaling=True)


def backup_after_steps(scheme, directory, result, about_to):
    """`fit` with a `BackupAndRestore` that saves every other step; averages are evaluated.

    All batches are the same: within an epoch it goes on with the first one again.
    """
    model, optimizer = new_model(scheme)
    x, y = np.tile(X[0], [4, 1]), np.tile(Y[0], [4, 1])

    class Evaluate(Report):
        def on_epoch_end(self, epoch, logs=None):
            about_to.send("swap")
            with optimizer.swapped_weights():
                about_to.send("evaluate")
                model.evaluate(x, y, batch_size=32, verbose=0)

    backup = KERAS.callbacks.BackupAndRestore(directory, save_freq=2, delete_checkpoint=False)
    fit(model, x, y, [Evaluate(about_to), backup], about_to)
    write_result(model, optimizer, result)


def backup_while_swapped(scheme, directory, result, about_to):
    """`fit` with `SwapAverageWeights`, which leaves the averages in the model for the backup to save."""
    model, optimizer = new_model(scheme)
    swap = tfav.callbacks.SwapAverageWeights(swap_on_epoch=True)
    backup = KERAS.callbacks.BackupAndRestore(directory, delete_checkpoint=False)
    x, y = X[:4].reshape(-1, 4), Y[:4].reshape(-1, 1)
    fit(model, x, y, [Report(about_to), swap, backup], about_to)
    if optimizer.weights_swapped:
        optimizer.swap_weights()
    write_result(model, optimizer, result)


class Report(KERAS.callbacks.Callback):
    def __init__(self, about_to):
        super().__init__()
        self._about_to = about_to

    def on_train_batch_begin(self, batch, logs=None):
        self._about_to.send("step")

    def on_train_batch_end(self, batch, logs=None):
        self._about_to.send("save, perhaps")

    def on_epoch_end(self, epoch, logs=None):
        self._about_to.send("swap and save")


def fit(model, x, y, callbacks, about_to):
    about_to.send("restore")
    model.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0, callbacks=callbacks)


LOOPS = [checkpoint_manager, loss_scaling, backup_after_steps, backup_while_swapped]
