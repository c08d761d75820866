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
"""A model that `tf.device` spreads over devices, without a strategy."""

import checks
import numpy as np
import tensorflow as tf
import tf_keras

import tf_averaging as tfav


class Halves(tf_keras.Model):
    """The first half of the weights on one device, the second on another."""

    def __init__(self):
        super().__init__()
        self.layers_of_device = [tf_keras.layers.Dense(200, activation="relu"), tf_keras.layers.Dense(1)]

    def call(self, inputs):
        for index, layer in enumerate(self.layers_of_device):
            with tf.device(f"CPU:{index}"):
                inputs = layer(inputs)
        return inputs


def compiled_calls(graph):
    """The calls of functions that XLA compiles."""
    functions = {f.signature.name: f for f in graph.as_graph_def().library.function}
    calls = [
        operation for operation in graph.get_operations() if operation.type.endswith("PartitionedCall")
    ]
    return [call for call in calls if "_XlaMustCompile" in functions[call.get_attr("f").name].attr]


def test_each_device_folds_its_own_variables():
    model = Halves()
    model(checks.X[0])
    optimizer = tfav.ExponentialMovingAverage(
        tf_keras.optimizers.SGD(0.02), average_decay=0.9, jit_compile=True
    )
    model.compile(optimizer, "mse")
    recorded = [model.get_weights()]
    for x, y in zip(checks.X, checks.Y):
        model.train_on_batch(x, y)
        recorded.append(model.get_weights())
    devices = []
    for index, variable in enumerate(model.trainable_variables):
        average = optimizer.get_slot(variable, "average")
        assert average.device == variable.device
        devices.append(tf.DeviceSpec.from_string(variable.device).device_index)
        expected = checks.expected_average(
            [weights[index] for weights in recorded], 0, 1, checks.ema_weight
        )
        checks.assert_close(average.numpy(), expected)
    assert devices == [0, 0, 1, 1]

    graph = tf.function(optimizer.update_average, autograph=False).get_concrete_function().graph
    places = [tf.DeviceSpec.from_string(call.device).device_index for call in compiled_calls(graph)]
    assert sorted(places) == [0, 1]  # One fused update each.

    weights = model.get_weights()
    with optimizer.swapped_weights():
        for variable, value in zip(model.trainable_variables, weights):
            assert not np.array_equal(variable.numpy(), value)
    for variable, value in zip(model.trainable_variables, weights):
        np.testing.assert_array_equal(variable.numpy(), value)
