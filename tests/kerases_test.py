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
"""What user-facing code knows of the two Kerases."""

import os
import subprocess
import sys

import keras as keras_3
import pytest
import tensorflow as tf
import tf_keras

import tf_averaging as tfav
from tests import testing_utils
from tf_averaging import kerases


def test_what_tf_keras_is_comes_first():
    assert kerases.available() == (keras_3, tf_keras)
    assert kerases.available()[0].__version__ == tf.keras.__version__


@pytest.mark.parametrize(
    "create",
    [
        lambda keras: keras.Sequential([keras.layers.Dense(1)]),
        lambda keras: keras.layers.Dense(1),
        lambda keras: keras.layers.BatchNormalization(),
        lambda keras: keras.optimizers.SGD(),
        lambda keras: keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5),
        lambda keras: keras.callbacks.History(),
        lambda keras: type("Own", (keras.Model,), {})(),
    ],
)
def test_of(keras, create):
    assert kerases.of(create(keras)) is keras


def test_of_a_variable():
    assert kerases.of(keras_3.Variable(1.0)) is keras_3


def test_of_neither():
    for thing in (3, None, tf.Variable(1.0)):
        with pytest.raises(TypeError, match=r"object of Keras 3 or tf_keras. Received: .*type"):
            kerases.of(thing)


def test_of_model(keras):
    assert kerases.of_model(keras.Sequential()) is keras
    with pytest.raises(TypeError, match=r"Expected a `keras.Model` or `tf_keras.Model`. Received: <"):
        kerases.of_model(keras.layers.Dense(1))


def test_bases(keras):
    assert keras.callbacks.Callback in kerases.bases("callbacks.Callback")
    assert len(kerases.bases("optimizers.schedules.LearningRateSchedule")) == 2


def test_register(keras):
    @kerases.register("kerases_test")
    class Registered:
        def get_config(self):
            return {}

    assert keras.saving.get_registered_object("kerases_test>Registered") is Registered


def test_schedule_keeps_its_keras(keras):
    config = kerases.serialize_schedule(keras.optimizers.schedules.CosineDecay(0.1, 10))
    before = dict(config)
    assert kerases.of(kerases.deserialize_schedule(config)) is keras
    assert config == before


def test_schedule_of_version_0_1_is_of_tf_keras():
    decay = tf_keras.optimizers.schedules.CosineDecay(0.1, 10)
    config = tfav.schedules.ConstantLearningRate(decay, 0.05).get_config()
    del config["learning_rate"]["keras"]
    again = tfav.schedules.ConstantLearningRate.from_config(config)
    assert kerases.of(again.learning_rate) is tf_keras


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_tf_variable(keras, policy):
    keras.mixed_precision.set_global_policy(policy)
    layer = keras.layers.Dense(1)
    layer.build([None, 1])
    variable = kerases.tf_variable(layer.kernel)
    assert isinstance(variable, tf.Variable)
    variable.assign([[3.0]])
    assert layer.get_weights()[0] == 3.0
    assert kerases.tf_variable(variable) is variable


def test_legacy_process_imports_nothing_of_keras_3():
    program = "import sys, tf_averaging; sys.exit('keras' in sys.modules)"
    environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_without_tf_keras():
    program = """
import sys
sys.modules["tf_keras"] = None  # Importing it is an ImportError.
import importlib.util
spec = importlib.util.find_spec("tf_averaging")
path = spec.submodule_search_locations[0] + "/kerases.py"
spec = importlib.util.spec_from_file_location("kerases", path)
kerases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kerases)
assert [keras.__name__ for keras in kerases.available()] == ["keras"]
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("loss_scaling", [False, True])
def test_averaging_optimizer_is_found(keras, loss_scaling):
    optimizer = tfav.SWA(keras.optimizers.SGD())
    compiled = testing_utils.loss_scaled(optimizer, keras) if loss_scaling else optimizer
    model = testing_utils.new_model(compiled, keras=keras)
    for thing in (model, model.optimizer, compiled, optimizer):
        assert tfav.averaging_optimizer(thing) is optimizer
    for thing in (None, keras.optimizers.SGD(), testing_utils.new_model(keras=keras)):
        with pytest.raises(ValueError, match="keeps no averages"):
            tfav.averaging_optimizer(thing)


LAYER_OF_THE_SAME_NAME = """
import sys
import keras
import tf_averaging as tfav

class SWA(keras.layers.Layer):
    def call(self, inputs):
        return inputs

model = keras.Sequential([keras.Input([4]), SWA(), keras.layers.Dense(1)])
model.save(sys.argv[1])
loaded = keras.models.load_model(sys.argv[1], custom_objects={"SWA": SWA})
assert type(loaded.layers[0]) is SWA
"""


def test_classes_of_others_may_have_our_names(tmp_path):
    code = [sys.executable, "-c", LAYER_OF_THE_SAME_NAME, str(tmp_path / "model.keras")]
    subprocess.run(code, check=True, timeout=300)
