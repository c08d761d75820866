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
"""keras-tuner, with Keras 3: trials are judged, saved and restored with the averages of their models.

`SwapAverageWeights(swap_on_epoch=True)` goes into `search`, which copies it for each trial.
"""

import tempfile

import keras
import keras_tuner
import numpy as np

import tf_averaging as tfav
from tests import numpy_averages
from tests.clients import recording

SCHEME = numpy_averages.ema(0.9)
RECORDS = {}
keras.utils.set_random_seed(0)
inputs = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
targets = inputs.sum(1, keepdims=True)


class Regression(keras_tuner.HyperModel):
    def build(self, hp):
        model = keras.Sequential([keras.layers.Dense(1, input_shape=(3,))])
        optimizer = SCHEME.wrap(keras.optimizers.SGD(hp.Choice("learning_rate", [0.05, 0.01])))
        model.compile(optimizer, loss="mse")
        return model

    def fit(self, hp, model, *args, callbacks, **kwargs):
        record = RECORDS[hp["learning_rate"]] = recording.Record(model.trainable_variables)
        return model.fit(*args, callbacks=[record.callback(keras), *callbacks], **kwargs)


def loss(kernel, bias):
    return np.mean((inputs @ kernel + bias - targets) ** 2)


with tempfile.TemporaryDirectory() as folder:
    tuner = keras_tuner.RandomSearch(Regression(), "val_loss", max_trials=2, directory=folder)
    swap = tfav.callbacks.SwapAverageWeights(swap_on_epoch=True)
    tuner.search(
        inputs,
        targets,
        validation_data=(inputs, targets),
        batch_size=16,
        epochs=3,
        callbacks=[swap],
        verbose=0,
    )
    trials = tuner.oracle.get_best_trials(2)
    models = tuner.get_best_models(2)
assert len(RECORDS) == 2
for trial, model in zip(trials, models):
    expected = RECORDS[trial.hyperparameters["learning_rate"]].averages(SCHEME)
    np.testing.assert_allclose(trial.score, loss(*expected), rtol=1e-5)
    recording.assert_close(model.get_weights(), expected)

recording.report("keras-tuner", "tensorflow", "keras")
