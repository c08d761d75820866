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
"""transformers: a tiny BERT, its own AdamWeightDecay with warm-up inside an EMA.

The averages are right, `save_pretrained` writes them, and a checkpoint restores them.
"""

import tempfile

import numpy as np
import tensorflow as tf
import tf_keras
import transformers

from tests import numpy_averages
from tests.clients import recording


def new_model():
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
    )
    model = transformers.TFBertForSequenceClassification(config)
    inner, _ = transformers.create_optimizer(
        init_lr=1e-2, num_train_steps=20, num_warmup_steps=2, weight_decay_rate=0.01
    )
    model.compile(SCHEME.wrap(inner))  # The loss is the model's own.
    model(model.dummy_inputs)
    return model


SCHEME = numpy_averages.ema(0.9)
tf_keras.utils.set_random_seed(0)
random = np.random.default_rng(0)
inputs = {"input_ids": random.integers(1, 50, (32, 8)), "attention_mask": np.ones((32, 8), np.int32)}
labels = random.integers(0, 2, 32)

model = new_model()
record = recording.Record(model.trainable_variables)
model.fit(inputs, labels, batch_size=4, epochs=2, verbose=0, callbacks=[record.callback(tf_keras)])


def logits(model):
    return model.predict(inputs, verbose=0)["logits"]


averaged = record.check(model.optimizer, SCHEME, lambda: logits(model))

with tempfile.TemporaryDirectory() as folder:
    with model.optimizer.swapped_weights():
        model.save_pretrained(folder)
    loaded = transformers.TFBertForSequenceClassification.from_pretrained(folder)
    np.testing.assert_allclose(logits(loaded), averaged, rtol=1e-5, atol=1e-6)

    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(folder + "/checkpoint")
    other = new_model()
    tf.train.Checkpoint(model=other, optimizer=other.optimizer).restore(path)
    with other.optimizer.swapped_weights():
        np.testing.assert_allclose(logits(other), averaged, rtol=1e-5, atol=1e-6)

recording.report("transformers", "tensorflow", "tf_keras")
