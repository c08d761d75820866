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
"""KerasHub, with Keras 3: a tiny BERT classifier with random weights, AdamW inside an EMA.

The averages are right, a preset holds them, and a `.weights.h5` file restores them.
"""

import tempfile

import keras
import keras_hub
import numpy as np

from tests import numpy_averages
from tests.clients import recording

SCHEME = numpy_averages.ema(0.9)
keras.utils.set_random_seed(0)
random = np.random.default_rng(0)
inputs = {
    "token_ids": random.integers(1, 50, (32, 8)),
    "segment_ids": np.zeros((32, 8), np.int32),
    "padding_mask": np.ones((32, 8), np.int32),
}
labels = random.integers(0, 2, 32)


def new_model():
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=50,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=8,
    )
    model = keras_hub.models.BertTextClassifier(backbone, num_classes=2)
    optimizer = SCHEME.wrap(keras.optimizers.AdamW(1e-2, weight_decay=0.01, clipnorm=1.0))
    model.compile(optimizer, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    optimizer.build(model.trainable_variables)
    return model


model = new_model()
record = recording.Record(model.trainable_variables)
model.fit(inputs, labels, batch_size=4, epochs=2, verbose=0, callbacks=[record.callback(keras)])


def logits(model):
    return model.predict(inputs, verbose=0)


averaged = record.check(model.optimizer, SCHEME, lambda: logits(model))

with tempfile.TemporaryDirectory() as folder:
    with model.optimizer.swapped_weights():
        model.save_to_preset(folder + "/preset")
    loaded = keras_hub.models.BertTextClassifier.from_preset(folder + "/preset")
    np.testing.assert_allclose(logits(loaded), averaged, rtol=1e-5, atol=1e-6)

    model.save_weights(folder + "/model.weights.h5")
    other = new_model()
    other.load_weights(folder + "/model.weights.h5")
    with other.optimizer.swapped_weights():
        np.testing.assert_array_equal(logits(other), averaged)

recording.report("keras-hub", "tensorflow", "keras")
