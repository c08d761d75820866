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
import pytest
import tensorflow as tf
import tf_keras

from tests import numpy_averages


class Halves(tf_keras.Model):
    """The first half of the weights on one device, the second on another."""

    def __init__(self, batch_norm=False):
        super().__init__()
        norms = [
            [tf_keras.layers.BatchNormalization(momentum=0.5)] if batch_norm else [] for _ in range(2)
        ]
        self.halves = [
            [tf_keras.layers.Dense(200, activation="relu"), *norms[0]],
            [*norms[1], tf_keras.layers.Dense(1, dtype="float32")],
        ]

    def call(self, inputs, training=False):
        for index, half in enumerate(self.halves):
            with tf.device(f"CPU:{index}"):
                for layer in half:
                    batch_norm = isinstance(layer, tf_keras.layers.BatchNormalization)
                    inputs = layer(inputs, training=training) if batch_norm else layer(inputs)
        return inputs


def compiled(make, batch_norm=False):
    """A model on two devices, with an optimizer that `make` returns, and its scheme."""
    tf_keras.utils.set_random_seed(1)
    model = Halves(batch_norm)
    model(checks.X[0])
    optimizer, scheme = make()
    model.compile(optimizer, "mse")
    return model, optimizer, scheme


def ema_of_all():
    return checks.ema(trainable_weights_only=False)


def custom_loop(model, variables=None):
    """Takes all steps in one traced function; the values of the variables before and after each step."""
    variables = variables or model.trainable_variables
    optimizer = model.optimizer
    scales_loss = isinstance(optimizer, tf_keras.mixed_precision.LossScaleOptimizer)

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
            scaled = optimizer.get_scaled_loss(loss) if scales_loss else loss
        gradients = tape.gradient(scaled, model.trainable_variables)
        if scales_loss:
            gradients = optimizer.get_unscaled_gradients(gradients)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))

    recorded = [[variable.numpy() for variable in variables]]
    for x, y in zip(checks.X, checks.Y):
        step(x, y)
        recorded.append([variable.numpy() for variable in variables])
    return recorded


def assert_averages_beside(optimizer, variables, recorded, scheme):
    """They follow from the recorded values, and lie with their variables, some on each device."""
    checks.assert_averages(optimizer, variables, recorded, scheme)
    for variable in variables:
        assert optimizer.get_slot(variable, "average").device == variable.device
    assert {tf.DeviceSpec.from_string(variable.device).device_index for variable in variables} == {0, 1}
    assert all(np.ptp([values[index] for values in recorded]) > 0 for index in range(len(variables)))


def compiled_calls(graph):
    """The calls of functions that XLA compiles, wherever they stand."""
    definition = graph.as_graph_def()
    functions = {function.signature.name: function for function in definition.library.function}
    nodes = [*definition.node, *(node for f in functions.values() for node in f.node_def)]
    calls = [node for node in nodes if node.op.endswith("PartitionedCall")]
    return [call for call in calls if "_XlaMustCompile" in functions[call.attr["f"].func.name].attr]


def test_each_device_folds_its_own_variables():
    model = Halves()
    model(checks.X[0])
    optimizer = checks.EMA.wrap(tf_keras.optimizers.SGD(0.02), jit_compile=True)
    model.compile(optimizer, "mse")
    recorded = [model.get_weights()]
    for x, y in zip(checks.X, checks.Y):
        model.fit(x, y, batch_size=checks.BATCH, verbose=0)
        recorded.append(model.get_weights())
    devices = []
    for index, variable in enumerate(model.trainable_variables):
        average = optimizer.get_slot(variable, "average")
        assert average.device == variable.device
        devices.append(tf.DeviceSpec.from_string(variable.device).device_index)
        expected = numpy_averages.expected_average(checks.EMA, [weights[index] for weights in recorded])
        checks.assert_close(average.numpy(), expected)
    assert devices == [0, 0, 1, 1]

    graph = tf.function(optimizer.update_average, autograph=False).get_concrete_function().graph
    places = [tf.DeviceSpec.from_string(call.device).device_index for call in compiled_calls(graph)]
    assert sorted(places) == [0, 1]  # One fused update each.

    weights = model.get_weights()
    with optimizer.swapped_weights():
        for variable, value in zip(model.trainable_variables, weights):
            assert not np.array_equal(variable.numpy(), value)
        state = checks.all_bits(model.variables, optimizer.variables)
        with pytest.raises(tf.errors.InvalidArgumentError, match=checks.GUARD):
            model.fit(checks.X[0], checks.Y[0], verbose=0)
        assert checks.all_bits(model.variables, optimizer.variables) == state
    for variable, value in zip(model.trainable_variables, weights):
        np.testing.assert_array_equal(variable.numpy(), value)


@pytest.mark.parametrize("generation", list(checks.SGD))
@pytest.mark.parametrize("make", [checks.swa, checks.ema])
def test_custom_loop(make, generation):
    model, optimizer, scheme = compiled(lambda: make(generation))
    recorded = custom_loop(model)
    assert_averages_beside(optimizer, model.trainable_variables, recorded, scheme)
    assert optimizer.num_averaged == len(numpy_averages.due_steps(scheme, checks.STEPS))
    with optimizer.swapped_weights():
        state = checks.all_bits(model.variables, optimizer.variables)
        with pytest.raises(tf.errors.InvalidArgumentError, match=checks.GUARD):
            custom_loop(model)
        assert checks.all_bits(model.variables, optimizer.variables) == state


@pytest.mark.parametrize("averages_exist", [True, False])
def test_checkpoint_continues_exactly(tmp_path, averages_exist):
    def state(model, optimizer):
        optimizer.shadow_copy(model)
        averages = [optimizer.get_slot(variable, "average") for variable in model.variables]
        assert [v.device for v in averages] == [v.device for v in model.variables]
        return checks.all_bits(model.variables, averages, optimizer.variables)

    model, optimizer, _ = compiled(ema_of_all, batch_norm=True)
    optimizer.shadow_copy(model)
    custom_loop(model)
    path = tf.train.Checkpoint(model=model, optimizer=optimizer).write(str(tmp_path / "checkpoint"))
    saved = state(model, optimizer)

    resumed, other, _ = compiled(ema_of_all, batch_norm=True)
    if averages_exist:
        other.build(resumed.trainable_variables)
        assert state(resumed, other) != saved
    tf.train.Checkpoint(model=resumed, optimizer=other).read(path).assert_existing_objects_matched()
    other.build(resumed.trainable_variables)
    assert state(resumed, other) == saved
    assert other.num_averaged == checks.STEPS
    custom_loop(model)
    custom_loop(resumed)
    assert state(resumed, other) == state(model, optimizer) != saved


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    tf_keras.mixed_precision.set_global_policy(policy)
    model, optimizer, scheme = compiled(checks.ema)
    assert [half[0].compute_dtype for half in model.halves] == [policy[len("mixed_") :], "float32"]
    assert (model.optimizer is optimizer) == (policy == "mixed_bfloat16")  # Else under loss scaling.
    recorded = custom_loop(model)
    assert recorded[0][0].dtype == np.float32
    assert_averages_beside(optimizer, model.trainable_variables, recorded, scheme)
    for x, y in zip(checks.X, checks.Y):
        model.train_on_batch(x, y)
        recorded.append(model.get_weights())
    assert_averages_beside(optimizer, model.trainable_variables, recorded, scheme)
    assert optimizer.num_averaged == 2 * checks.STEPS
    if policy == "mixed_float16":  # A step that loss scaling skips is not averaged.
        averages = [optimizer.get_slot(variable, "average") for variable in model.trainable_variables]
        state, scale = checks.all_bits(model.variables, averages), model.optimizer.loss_scale
        model.train_on_batch(np.full_like(checks.X[0], np.inf), checks.Y[0])
        assert model.optimizer.loss_scale < scale
        assert checks.all_bits(model.variables, averages) == state
        assert optimizer.num_averaged == 2 * checks.STEPS


def test_batch_norm_statistics_are_averaged():
    model, optimizer, scheme = compiled(ema_of_all, batch_norm=True)
    optimizer.shadow_copy(model)
    statistics = model.non_trainable_variables
    assert len(statistics) == 4
    recorded = custom_loop(model, statistics)
    recorded[0] = recorded[1]  # The optimizer's first step begins after the forward pass updated them.
    assert_averages_beside(optimizer, statistics, recorded, scheme)
    averages = checks.all_bits([optimizer.get_slot(variable, "average") for variable in statistics])
    state = checks.all_bits(model.variables, optimizer.variables)
    with optimizer.swapped_weights():
        assert checks.all_bits(statistics) == averages
    assert checks.all_bits(model.variables, optimizer.variables) == state
