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
"""Averages on a device of their own are those beside the weights, bit for bit, wherever they go."""

import keras as keras_3
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import tf_averaging as tfav
from tests import numpy_averages
from tests import testing_utils

DEVICE = "CPU:0"  # The weights of a single replica are on CPU:1.
ELSEWHERE = tf.distribute.OneDeviceStrategy("CPU:1")

both_kerases = pytest.mark.parametrize("keras", [keras_3, tf_keras], ids=lambda keras: keras.__name__)
each_strategy = pytest.mark.parametrize("mirrored", [False, True], ids=["one", "mirrored"])

# Each with the constructor's further options.
KINDS = {
    "EMA": (numpy_averages.ema(0.9), {}),
    "late and seldom": (numpy_averages.ema(0.9, start=3, period=2), {}),
    "SWA": (numpy_averages.swa(2, 3), {}),
    "float64": (numpy_averages.ema(0.9), {"average_dtype": "float64"}),
    "statistics": (numpy_averages.ema(0.9), {"trainable_weights_only": False}),
}


def fit(keras, strategy, kind="EMA", device=DEVICE, jit_compile=False):
    """Two epochs of a model with one layer whose average XLA folds, and one whose average it does not."""
    scheme, options = KINDS[kind]
    optimizers = []

    def build_model():
        return testing_utils.new_model(units=(5000, 1), batch_norm=True, keras=keras)

    def make_optimizer():
        inner = keras.optimizers.SGD(1e-4, momentum=0.9)
        optimizers.append(scheme.wrap(inner, average_device=device, **options))
        return optimizers[0]

    class ShadowCopy(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            optimizers[0].shadow_copy(self.model)

    callbacks = [ShadowCopy()] if kind == "statistics" else []
    return testing_utils.fit(
        strategy,
        make_optimizer,
        build_model,
        epochs=2,
        callbacks=callbacks,
        keras=keras,
        jit_compile=jit_compile,
    )


def averaged(run):
    return [slots.variable for slots in run.optimizer._averages.averaged()]


@both_kerases
@each_strategy
@pytest.mark.parametrize("kind", KINDS)
def test_bit_for_bit(keras, mirrored, kind, mirrored_strategy):
    strategy = mirrored_strategy if mirrored else ELSEWHERE
    here, there = (fit(keras, strategy, kind, device) for device in (None, DEVICE))
    averages = [testing_utils.averages_of(run.optimizer, averaged(run)) for run in (here, there)]
    testing_utils.assert_same_bits(*averages)
    for here_weights, there_weights in zip(here.history, there.history):
        testing_utils.assert_same_bits(here_weights, there_weights)
    testing_utils.assert_averages(here, KINDS[kind][0])
    for variable in there.variables:
        slot = there.optimizer.get_slot(variable, "average")
        assert slot.device.endswith("/device:CPU:0")
        assert not isinstance(slot, tf.distribute.DistributedValues)


@both_kerases
@each_strategy
@pytest.mark.parametrize("kind", ["EMA", "float64"])
def test_swap_and_assignment_reach_all_replicas(keras, mirrored, kind, mirrored_strategy):
    run = fit(keras, mirrored_strategy if mirrored else ELSEWHERE, kind)
    optimizer = run.optimizer
    averages = testing_utils.averages_of(optimizer, run.variables)
    before = testing_utils.read_all(run.variables)

    def assert_averages_are_in_the_model():
        for replicas, average in zip(testing_utils.read_all(run.variables), averages):
            for value in replicas:
                np.testing.assert_array_equal(value, average.astype(value.dtype))

    optimizer.swap_weights()
    assert_averages_are_in_the_model()
    with pytest.raises(tf.errors.InvalidArgumentError, match="swap_weights"):
        testing_utils.fit_steps(run.model, 1)
    assert_averages_are_in_the_model()
    optimizer.swap_weights()
    testing_utils.assert_same_bits(testing_utils.read_all(run.variables), before)
    testing_utils.assert_same_bits(testing_utils.averages_of(optimizer, run.variables), averages)
    optimizer.assign_average_vars(run.variables)
    assert_averages_are_in_the_model()


@both_kerases
@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
@pytest.mark.parametrize("to", [None, DEVICE], ids=["beside", "device"])
def test_checkpoint_moves_between_placements(keras, to, swapped, tmp_path):
    first, second = (
        fit(keras, ELSEWHERE, device=d) for d in ((DEVICE, None) if to is None else (None, DEVICE))
    )
    if swapped:
        first.optimizer.swap_weights()
    path = tf.train.Checkpoint(model=first.model, optimizer=first.optimizer).write(str(tmp_path / "ckpt"))
    checkpoint = tf.train.Checkpoint(model=second.model, optimizer=second.optimizer)
    checkpoint.read(path).assert_existing_objects_matched()
    for run in (first, second):
        if swapped:
            run.optimizer.swap_weights()
        testing_utils.fit_steps(run.model, 5)
    everything = [
        [
            *testing_utils.values(run.model.variables),
            *testing_utils.averages_of(run.optimizer, run.variables),
        ]
        for run in (first, second)
    ]
    testing_utils.assert_same_bits(*everything)


@both_kerases
def test_keras_file_says_the_device(keras, tmp_path):
    run = fit(keras, ELSEWHERE)
    run.model.save(tmp_path / "model.keras")
    optimizer = keras.models.load_model(tmp_path / "model.keras").optimizer
    assert optimizer.get_config()["average_device"] == DEVICE
    loaded = [optimizer.get_average(variable).numpy() for variable in optimizer._averages.slots]
    testing_utils.assert_same_bits(loaded, testing_utils.averages_of(run.optimizer, run.variables))


@both_kerases
def test_device_that_is_not_there(keras):
    """A file may come from a machine that has it."""
    optimizer = tfav.SWA(keras.optimizers.SGD(1.0), 0, 1, average_device="GPU:7")
    variable = tf.Variable(0.0)
    with pytest.warns(UserWarning, match="No 'GPU:7': the averages are on .*CPU:0"):
        optimizer.shadow_copy([variable])
    assert optimizer.get_average(variable) == 0.0


@both_kerases
def test_step_that_xla_compiles_is_refused(keras):
    with pytest.raises(RuntimeError, match="jit_compile=False"):
        fit(keras, tf.distribute.get_strategy(), jit_compile=True)


@pytest.mark.parametrize(
    ("device", "error"), [(0, TypeError), ("the other one", ValueError), ("/job:worker", ValueError)]
)
def test_what_is_no_device(device, error):
    with pytest.raises(error, match="Expected `average_device`"):
        tfav.SWA(keras_3.optimizers.SGD(), average_device=device)
