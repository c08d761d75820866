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
"""tensorflow-model-optimization: pruning with SWA, training aware of quantization with an EMA.

The averages are right in both. They go into the model before it is stripped or converted.
"""

import numpy as np
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras

from tests import numpy_averages
from tests.clients import recording

tf_keras.utils.set_random_seed(0)
inputs = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
targets = inputs.sum(1, keepdims=True)


def train(model, scheme, *callbacks):
    """A trained model, its record, and what it predicts with the averages."""
    model.compile(scheme.wrap(tf_keras.optimizers.Adam(0.05)), loss="mse")
    record = recording.Record(model.trainable_variables)
    callbacks = [record.callback(tf_keras), *callbacks]
    model.fit(inputs, targets, batch_size=8, epochs=2, verbose=0, callbacks=callbacks)
    return record.check(model.optimizer, scheme, lambda: model.predict(inputs, verbose=0))


def new_model():
    dense = tf_keras.layers.Dense
    return tf_keras.Sequential([dense(8, activation="relu", input_shape=(4,)), dense(1)])


# Pruning.
sparsity = tfmot.sparsity.keras
schedule = sparsity.ConstantSparsity(0.5, begin_step=0, end_step=4, frequency=2)
model = sparsity.prune_low_magnitude(new_model(), schedule)
averaged = train(model, numpy_averages.swa(start=6, period=2), sparsity.UpdatePruningStep())
with model.optimizer.swapped_weights():
    stripped = sparsity.strip_pruning(model)
    np.testing.assert_array_equal(stripped.predict(inputs, verbose=0), averaged)
    # The masks were final before the first snapshot, so that the averages are as sparse as the weights.
    assert [np.mean(stripped.layers[index].kernel == 0) for index in (0, 1)] == [0.5, 0.5]

# Quantization.
model = tfmot.quantization.keras.quantize_model(new_model())
averaged = train(model, numpy_averages.ema(0.9))
with model.optimizer.swapped_weights():
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    interpreter = tf.lite.Interpreter(model_content=converter.convert())
interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], inputs.shape)
interpreter.allocate_tensors()
interpreter.set_tensor(interpreter.get_input_details()[0]["index"], inputs)
interpreter.invoke()
quantized = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
np.testing.assert_allclose(quantized, averaged, atol=0.02 * np.ptp(averaged))

recording.report("tensorflow-model-optimization", "tensorflow", "tf_keras")
