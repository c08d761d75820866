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
"""Program: a worker that backs its training up after each epoch, and can kill itself in a step."""

import os
import signal
import sys

import checks
import numpy as np
import tensorflow as tf
import tf_keras

EPOCHS = 3


class KillAt(tf_keras.callbacks.Callback):
    """Ends this process without a chance to clean up, at the beginning of one step of all."""

    def __init__(self, step):
        super().__init__()
        self._step = step

    def on_train_begin(self, logs=None):
        print(f"[begins] with step {self.model.optimizer.iterations.numpy()}")

    def on_train_batch_begin(self, batch, logs=None):
        if self.model.optimizer.iterations.numpy() == self._step:
            print(f"[killed] in step {self._step}")
            os.kill(os.getpid(), signal.SIGKILL)


def main(backup, result, kill_at):
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    model, optimizer, _ = checks.compiled(
        strategy,
        lambda: checks.ema(trainable_weights_only=False),
        tf_keras.layers.BatchNormalization,
    )
    optimizer.shadow_copy(model)
    model.fit(
        checks.batches(strategy, repeat=EPOCHS),
        epochs=EPOCHS,
        steps_per_epoch=checks.STEPS,
        verbose=0,
        callbacks=[tf_keras.callbacks.BackupAndRestore(backup), KillAt(int(kill_at))],
    )
    exact = [*model.trainable_variables, optimizer.iterations, *optimizer.inner_optimizer.variables]
    exact += [optimizer.get_slot(variable, "average") for variable in model.trainable_variables]
    statistics = [v for v in model.non_trainable_variables if "moving" in v.name]
    statistics += [optimizer.get_slot(variable, "average") for variable in statistics]
    values = {f"exact{i}": checks.same_on_all_replicas(v) for i, v in enumerate(exact)}
    with strategy.scope():
        values.update({f"merged{i}": v.read_value().numpy() for i, v in enumerate(statistics)})
    np.savez(result, num_averaged=optimizer.num_averaged.numpy(), **values)


if __name__ == "__main__":
    main(*sys.argv[1:])
