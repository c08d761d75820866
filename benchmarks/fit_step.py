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
"""A whole training step of a small real model, as `fit` runs it."""

from typing import Dict

import keras
import numpy as np
import tensorflow as tf
import tf_keras

import tf_averaging as tfav
from benchmarks import contenders
from benchmarks import names
from benchmarks import timing

BATCH = 64


def model_of(library):
    """The same small convolutional network in tf_keras or Keras 3."""
    layers = library.layers
    return library.Sequential(
        [
            layers.Input((28, 28, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.Conv2D(64, 3, strides=2, activation="relu"),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(10),
        ]
    )


def train_step_of(library, optimizer):
    """A function that takes one step, as `fit` does for each batch."""
    model = model_of(library)
    loss = library.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, **({} if library is tf_keras else {"jit_compile": False}))
    random = np.random.default_rng(0)
    images = tf.constant(random.standard_normal((BATCH, 28, 28, 1), np.float32))
    labels = tf.constant(random.integers(0, 10, BATCH))
    batches = iter(tf.data.Dataset.from_tensors((images, labels)).repeat())
    train = model.make_train_function() or model.train_function
    return lambda: train(batches)


def measure(seconds: float, quick: bool) -> Dict[str, object]:
    """Times the steps of all contenders, taking turns."""
    momentum = {"learning_rate": contenders.LEARNING_RATE, "momentum": 0.9}

    def ours(cls, **options):
        inner = tf_keras.optimizers.SGD(**momentum, jit_compile=False)
        return train_step_of(tf_keras, cls(inner, **options))

    def theirs(library, **options):
        if library is tf_keras:
            options["jit_compile"] = False
        return train_step_of(library, library.optimizers.SGD(**momentum, **options))

    steps = {
        names.BARE: theirs(tf_keras),
        names.EMA: ours(tfav.ExponentialMovingAverage),
        names.SWA: ours(tfav.SWA, average_period=contenders.PERIOD),
        names.USE_EMA: theirs(tf_keras, use_ema=True),
        names.BARE_KERAS_3: theirs(keras),
        names.KERAS_3: theirs(keras, use_ema=True),
    }
    return timing.in_turns(steps, seconds, least=12 if quick else 60, most=1000)
