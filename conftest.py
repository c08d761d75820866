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
"""What all tests share: two logical CPU devices, one MirroredStrategy, names for the doctests."""

import multiprocessing.forkserver
import os
import pathlib
import signal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import keras as keras_3
import pytest
import tensorflow as tf
import tf_keras

import tf_averaging as tfav

# Ctrl-C is ignored by what a shell starts in the background; some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Run by nox, where the libraries are that they try.
collect_ignore_glob = ["tests/clients/*"]

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)


@pytest.fixture(scope="session")
def mirrored_strategy():
    """Two replicas on two logical CPUs.

    One for the whole process: several MirroredStrategy objects would share collective keys.
    """
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.fixture(scope="session")
def forkserver():
    """Starts processes by forking one that has imported TensorFlow, which takes longer than they do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent), prepend=os.pathsep)
        multiprocessing.forkserver.set_forkserver_preload(["tf_averaging"])
        multiprocessing.forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


@pytest.fixture(params=["default", "mirrored"])
def strategy(request):
    """The default strategy, then two replicas."""
    if request.param == "default":
        return tf.distribute.get_strategy()
    return request.getfixturevalue("mirrored_strategy")


@pytest.fixture(params=[keras_3, tf_keras], ids=lambda keras: keras.__name__)
def keras(request):
    """Keras 3, then tf_keras."""
    return request.param


@pytest.fixture(autouse=True)
def _float32_policy_and_seed():
    """Each test starts from the same seed and leaves no dtype policy behind."""
    for keras in (keras_3, tf_keras):
        keras.utils.set_random_seed(0)
    yield
    for keras in (keras_3, tf_keras):
        keras.mixed_precision.set_global_policy("float32")


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    doctest_namespace.update(tf=tf, tf_keras=tf_keras, tfav=tfav)
