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
"""`average_checkpoints` writes the mean of the weights in files, and what else the last file holds."""

import functools
import os
import pathlib
import resource
import runpy
import shutil
import signal
import sys
import time
import warnings
import zipfile

import h5py
import keras as keras_3
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import tf_averaging as tfav
from tests import testing_utils
from tests.testdata.version_0_1 import cases
from tests.testing_utils import assert_same_bits
from tf_averaging.average_checkpoints import object_checkpoint

SUFFIXES = ["", ".keras", ".weights.h5", ".h5"]  # A checkpoint has none.
TIME_LIMIT = 120  # Seconds for anything that a process does.

each_format = pytest.mark.parametrize("suffix", SUFFIXES, ids=lambda suffix: suffix or "checkpoint")

# Only what the code under test warns of: the Kerases warn of the format `.h5`.
pytestmark = pytest.mark.filterwarnings("ignore:.*HDF5 file:UserWarning")


@functools.cache
def averaging_model(keras):
    """A model that has taken a step, to be changed and saved."""
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input([3]),
            layers.Dense(4, name="first"),
            layers.BatchNormalization(name="norm"),
            layers.Dropout(0.5, seed=1, name="dropout"),
            layers.Dense(1, name="last"),
        ]
    )
    optimizer = tfav.SWA(keras.optimizers.Adam(0.01), 0, 1)
    model.compile(optimizer, keras.losses.MeanSquaredError(), metrics=["mae"])
    model.fit(np.ones([8, 3]), np.ones([8, 1]), verbose=0)
    return model


def change_weights(model, rng):
    """Gives the model other weights, of many scales, and returns them."""
    weights = [
        np.asarray(10.0 ** rng.integers(-6, 6) * rng.normal(size=array.shape), array.dtype)
        if array.dtype.kind == "f"
        else array + 1
        for array in model.get_weights()
    ]
    model.set_weights(weights)
    return weights


def change_state(model):
    """Gives all variables of the optimizer other values, and returns them."""
    arrays = model.optimizer.get_weights()
    state = [array if array.dtype == bool else array + 1 for array in arrays]
    model.optimizer.set_weights(state)
    return state


def checkpoint_of(model):
    return tf.train.Checkpoint(model=model, optimizer=model.optimizer)


def save(model, path):
    path = str(path)
    if path.endswith(".weights.h5"):
        model.save_weights(path)
    elif path.endswith(("h5", "keras")):
        model.save(path)
    else:
        checkpoint_of(model).write(path)
    return path


def load(keras, path):
    """The model in a file, which replaces other values."""
    model = averaging_model(keras)
    if path.endswith((".keras", ".h5")) and not path.endswith(".weights.h5"):
        return keras.models.load_model(path)
    change_weights(model, np.random.default_rng(0))
    change_state(model)
    if path.endswith(".h5"):
        model.load_weights(path)
    else:
        checkpoint_of(model).read(path).assert_consumed()
    return model


@each_format
def test_output_is_the_last_file_with_the_means_of_all(keras, suffix, tmp_path):
    rng = np.random.default_rng(1)
    model = averaging_model(keras)
    saved, paths = [], []
    for number in range(20):
        saved.append(change_weights(model, rng))
        if number == 19:
            state = change_state(model)
        paths.append(save(model, tmp_path / f"{number}{suffix}"))
    for number, weights in [(2, None), (5, None), (20, None), (3, [2, 0, 0.5])]:
        output = str(tmp_path / "new" / f"mean{number}{suffix}")
        tfav.average_checkpoints(paths[-number:], output, weights, verbose=0)
        loaded = load(keras, output)
        for array, *values in zip(loaded.get_weights(), *saved[-number:]):
            if array.dtype.kind == "f":
                mean = np.average(np.array(values, np.float64), axis=0, weights=weights)
                np.testing.assert_allclose(array, mean, rtol=1e-7)
            else:
                np.testing.assert_array_equal(array, values[-1])
        if keras is tf_keras or suffix != ".h5":  # From which Keras 3 loads no optimizer.
            assert_same_bits(loaded.optimizer.get_weights(), state)


DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
LONG_NAME = "n" * 3000


def module_of_everything(number):
    """Variables of every kind, and other things that checkpoints hold, with values for this number."""
    module = tf.Module()
    for dtype in [*DTYPES, "int8", "int64", "bool"]:
        setattr(module, dtype, tf.Variable(tf.cast(np.array([number, 0.1 * number]), dtype)))
    module.complex64.assign([1j * number, 2.0])
    module.string = tf.Variable([str(number)])
    module.scalar = tf.Variable(float(number))
    module.empty = tf.Variable(tf.zeros([0, 3]))
    setattr(module, LONG_NAME, tf.Variable([1.0 * number]))
    module.sharded = tf.__internal__.distribute.ShardedVariable(
        [tf.Variable([[1.0 * number, 2.0]]), tf.Variable([[3.0, 4.0 * number]])]
    )
    module.table = tf.lookup.experimental.MutableHashTable(tf.string, tf.float32, 0.0)
    module.table.insert(["key"], [float(number)])
    module.generator = tf.random.Generator.from_seed(number)
    module.iterator = iter(tf.data.Dataset.range(10))
    for _ in range(number):
        next(module.iterator)
    return module


def test_checkpoint_of_everything(tmp_path, monkeypatch):
    numbers = [1, 3, 8]
    paths = [
        tf.train.Checkpoint(module=module_of_everything(number)).write(str(tmp_path / str(number)))
        for number in numbers
    ]
    output = str(tmp_path / "mean")
    monkeypatch.setattr(object_checkpoint, "SHARD_BYTES", 16)
    tfav.average_checkpoints(paths, output, verbose=0)
    in_shards = len(list(tmp_path.glob("mean.data-*")))
    assert in_shards > 5
    for _ in range(2):  # What is in shards is read, and replaced by what is not.
        module = module_of_everything(0)
        tf.train.Checkpoint(module=module).read(output).assert_consumed()
        for dtype in DTYPES:
            values = np.array([[n, 0.1 * n] for n in numbers]).astype(tf.as_dtype(dtype).as_numpy_dtype)
            if dtype == "complex64":
                values = np.array([[1j * n, 2.0] for n in numbers])
            mean = values.real.astype(np.float64).mean(0)
            if dtype.startswith("complex"):
                mean = mean + 1j * values.imag.astype(np.float64).mean(0)
            mean = mean.astype(values.dtype)
            np.testing.assert_array_equal(getattr(module, dtype).numpy(), mean)
        assert module.int8.numpy().tolist() == module.int64.numpy().tolist() == [8, 0]
        assert module.bool.numpy().tolist() == [True, True]
        assert module.string.numpy().tolist() == [b"8"]
        assert module.scalar == 4.0
        assert getattr(module, LONG_NAME) == [4.0]
        shards = [shard.numpy().tolist() for shard in module.sharded.variables]
        assert shards == [[[4.0, 2.0]], [[3.0, 16.0]]]
        assert module.table.lookup(tf.constant(["key"])) == [8.0]
        np.testing.assert_array_equal(module.generator.state, tf.random.Generator.from_seed(8).state)
        assert next(module.iterator) == 8
        monkeypatch.undo()
        tfav.average_checkpoints([output, f"{output}.index"], output, overwrite=True, verbose=0)
    assert len(list(tmp_path.glob("mean.data-*"))) == 1


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_keras_files_of_every_dtype(keras, suffix, tmp_path):
    dtypes = {"float16": 2**-11, "float32": 2**-24, "float64": 2**-53}
    if keras is keras_3:  # tf_keras cannot load it.
        dtypes["bfloat16"] = 2**-8

    class Layer(keras.layers.Layer):
        def __init__(self, **options):
            super().__init__(**options)
            for dtype in dtypes:
                self.add_weight(name=dtype, shape=[2], dtype=dtype)
            self.add_weight(name="scalar", shape=[])
            self.add_weight(name="empty", shape=[0, 2])
            self.add_weight(name="integer", shape=[1], dtype="int32", trainable=False)

        def call(self, inputs):
            return inputs

    model = keras.Sequential([keras.Input([1]), Layer(name="n" * 300)])
    paths = []
    for number in (1, 2, 6):
        for variable in model.variables:
            variable.assign(tf.cast(np.full(variable.shape, 1.1 * number), variable.dtype))
        paths.append(save(model, tmp_path / f"{number}{suffix}"))
    output = str(tmp_path / f"mean{suffix}")
    tfav.average_checkpoints(paths, output, verbose=0)
    if suffix == ".keras":
        model = keras.models.load_model(output, custom_objects={"Layer": Layer})
    else:
        model.load_weights(output)
    *arrays, scalar, empty, integer = model.get_weights()
    for array, (dtype, half_bit) in zip(arrays, dtypes.items()):
        rounded = np.array([1.1, 2.2, 6.6]).astype(tf.as_dtype(dtype).as_numpy_dtype).astype(np.float64)
        assert array.dtype == dtype
        np.testing.assert_allclose(array.astype(np.float64), rounded.mean(), rtol=half_bit)
    np.testing.assert_allclose(scalar, 3.3, rtol=1e-6)
    assert empty.shape == (0, 2)
    assert integer == [6]


def contents(path):
    """Everything in a file or a checkpoint, by name."""
    if path.endswith("h5"):
        with open(path, "rb") as file:
            return {path[-3:]: file.read()}
    if path.endswith(".keras"):
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    reader = tf.train.load_checkpoint(path)
    tensors = {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}
    return {key: value if isinstance(value, bytes) else value.tobytes() for key, value in tensors.items()}


def caught(paths, output, **options):
    """What `average_checkpoints` warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tfav.average_checkpoints(paths, output, verbose=0, **options)
    return [str(warning.message) for warning in caught if "averages were in the model" in str(warning)]


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_mean_of_a_file_of_version_0_1_with_itself_is_this_file(case, tmp_path):
    path = str(case.path)
    suffix = "" if case.form in ("checkpoint", "variables") else case.form
    warned = caught([path, path, path], str(tmp_path / f"mean{suffix}"))
    assert len(warned) == ("swapped" in case.options)
    assert contents(str(tmp_path / f"mean{suffix}")) == contents(path)


def test_keras_file_may_have_been_compressed_but_not_emptied(tmp_path):
    path, output = save(averaging_model(keras_3), tmp_path / "stored.keras"), str(tmp_path / "mean.keras")
    for name, left_out in [("deflated.keras", None), ("emptied.keras", "config.json")]:
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, content in contents(path).items():
                if member != left_out:
                    archive.writestr(member, content)
    deflated, emptied = (str(tmp_path / name) for name in ("deflated.keras", "emptied.keras"))
    tfav.average_checkpoints([path, deflated], output, verbose=0)
    assert contents(output) == contents(path)
    assert_refused(tmp_path, [emptied, "config.json"], [path, emptied], output, overwrite=True)


@each_format
def test_files_that_hold_averages_are_named(keras, suffix, tmp_path):
    model = averaging_model(keras)
    paths = [save(model, tmp_path / f"raw{suffix}")]
    with model.optimizer.swapped_weights():
        paths.append(save(model, tmp_path / f"swapped{suffix}"))
    output = str(tmp_path / f"mean{suffix}")
    assert not caught(paths[:1], output)
    (warned,) = caught(paths[::-1], output, overwrite=True)
    assert paths[1] in warned
    assert paths[0] not in warned
    assert "weights_swapped" not in warned
    (warned,) = caught(paths, output, overwrite=True)
    assert "weights_swapped" in warned


@pytest.mark.parametrize("generation", testing_utils.GENERATIONS.values(), ids=testing_utils.GENERATIONS)
def test_other_optimizers_and_metrics_are_those_of_the_last_checkpoint(generation, tmp_path):
    """Of either generation, in a LossScaleOptimizer too; beside what only looks like one."""
    paths = []
    for number in (1, 3):
        model = tf.Module()
        model.variable = tf.Variable(1.0 * number)
        model.total = tf.Variable(10.0 * number)  # Not of a metric, as it is not alone.
        model.part = tf.Module()  # Nor is this one, with a part of its own.
        model.part.count, model.part.table = tf.Variable(1.0 * number), tf.Module()
        model.part.table.weight = tf.Variable(1.0 * number)
        model.learner = tf.Module()  # With some of what optimizers have.
        model.learner.inner_optimizer = generation.SGD(0.1 * number)
        model.learner._iterations, model.learner.weight = tf.Variable(number), tf.Variable(1.0 * number)
        model.learner.inner_optimizer.apply_gradients([(tf.constant(0.0), model.variable)])
        optimizers = [generation.Adam(0.1 * number), tf.compat.v1.train.AdamOptimizer(0.1)]
        optimizers.append(tf_keras.mixed_precision.LossScaleOptimizer(generation.SGD(0.1, momentum=0.9)))
        for optimizer in optimizers * number:
            optimizer.apply_gradients([(tf.constant(1.0), model.variable)])
        model.variable.assign(number)
        metric, auc = tf_keras.metrics.Mean(), tf_keras.metrics.AUC(num_thresholds=3)
        metric.update_state(1.0 * number)
        auc.update_state([1.0] * number, [1.0] * number)
        iou = tf_keras.metrics.MeanIoU(2)
        iou.update_state([1.0] * number, [1.0] * number)
        everything = {
            "model": model,
            "metric": metric,
            "auc": auc,
            "iou": iou,
            "iter": tf.Variable(number),
        }
        everything.update({f"optimizer{i}": optimizer for i, optimizer in enumerate(optimizers)})
        paths.append(tf.train.Checkpoint(**everything).write(str(tmp_path / str(number))))
    output = str(tmp_path / "mean")
    tfav.average_checkpoints(paths, output, verbose=0)
    expected, actual = contents(paths[-1]), contents(output)
    different = {key for key in expected if actual[key] != expected[key]}
    averaged = {"model/variable", "model/total", "model/part/count", "model/part/table/weight"}
    averaged |= {"model/learner/weight"}
    assert {key.partition("/.A")[0] for key in different} == averaged
    assert np.frombuffer(actual["model/variable/.ATTRIBUTES/VARIABLE_VALUE"], np.float32) == [2.0]


def test_checkpoints_from_before_and_after_the_optimizer_had_state(keras, tmp_path):
    """Where Keras 3 saves weights under other keys."""
    model = testing_utils.new_model(lambda: keras.optimizers.Adam(), keras=keras)
    saved, paths = [], []
    for number in range(2):
        saved.append(change_weights(model, np.random.default_rng(number)))
        paths.append(save(model, tmp_path / str(number)))
        testing_utils.fit_steps(model, 1)
    output = str(tmp_path / "mean")
    tfav.average_checkpoints(paths, output, verbose=0)
    checkpoint_of(model).read(output)
    for array, *values in zip(model.get_weights(), *saved):
        np.testing.assert_allclose(array, np.mean(np.array(values, np.float64), axis=0), rtol=1e-7)


@pytest.mark.parametrize("wrapper", [None, tfav.SWA, tfav.PostHocEMA])
@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_other_optimizers_and_metrics_are_those_of_the_last_keras_file(keras, suffix, wrapper, tmp_path):
    class Gan(keras.Sequential):
        pass

    def state(path):
        """What is beside the layers, by name."""
        if suffix == ".keras":
            with zipfile.ZipFile(path) as archive:
                path = archive.extract("model.weights.h5", tmp_path)
        names, found = [], {}
        with h5py.File(path) as file:
            file.visit(names.append)
            for name in names:
                if isinstance(file[name], h5py.Dataset) and not name.startswith("layers/"):
                    found[name] = file[name][()].tolist()
        return found

    # Files of Keras 3 have the learning rate, by which an optimizer of any name is recognized.
    name = "critic" if keras is keras_3 else "critic_optimizer"
    paths = []
    for number in (1.0, 2.0):
        model = Gan([keras.Input([1]), keras.layers.Dense(1, name="dense")])
        model.compile("sgd", keras.losses.MeanSquaredError())
        model.evaluate(np.ones([1, 1]), np.full([1, 1], 10.0 * number), verbose=0)
        optimizer = keras.optimizers.Adam(number)
        if wrapper is not None:
            optimizer = wrapper(optimizer)
        optimizer.build(model.trainable_variables)
        setattr(model, name, optimizer)
        for variable in [*optimizer.variables, *model.variables]:
            if tf.as_dtype(variable.dtype).is_floating:
                variable.assign(tf.fill(variable.shape, number))
        paths.append(save(model, tmp_path / f"{number}{suffix}"))
    output = str(tmp_path / f"mean{suffix}")
    tfav.average_checkpoints(paths, output, verbose=0)
    first, last, mean = map(state, [*paths, output])
    assert mean == last
    different = {key.partition("/")[0] for key in last if first[key] != last[key]}
    assert different == ({name} if keras is keras_3 else {name, "metrics"})


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5", ".h5", "_weights.h5"])
def test_layers_that_look_like_optimizers_are_averaged(keras, suffix, tmp_path):
    """By their names, or by what they hold: a counter and a number."""

    class Layer(keras.layers.Layer):
        def __init__(self, **options):
            super().__init__(**options)
            self.inside = keras.layers.Dense(1)

        def build(self, shape):
            self.add_weight(name="counter", shape=[], dtype="int64", trainable=False)
            self.add_weight(name="scale", shape=[], trainable=False)
            self.inside.build(shape)
            self.built = True

        def call(self, inputs):
            return self.inside(inputs)

    layers = [Layer(name="optimizer"), keras.layers.Dense(1, name="metrics")]
    model = keras.Sequential([keras.Input([1]), *layers, Layer(name="optimizer_weights")])
    saving = model.save_weights if "weights" in suffix else model.save
    if suffix == "_weights.h5" and keras is keras_3:
        pytest.skip("Keras 3 writes no such files.")
    paths = [str(tmp_path / f"{number}{suffix}") for number in (1, 3)]
    for number, path in zip((1, 3), paths):
        for variable in model.variables:
            variable.assign(tf.cast(tf.fill(variable.shape, number), variable.dtype))
        saving(path)
    output = str(tmp_path / f"mean{suffix}")
    tfav.average_checkpoints(paths, output, verbose=0)
    if "weights" in suffix:
        model.load_weights(output)
    else:
        model = keras.models.load_model(output, custom_objects={"Layer": Layer}, compile=False)
    counters = 2
    assert len(model.variables) == 10
    for variable in model.variables:
        is_counter = tf.as_dtype(variable.dtype).is_integer
        counters -= is_counter
        assert np.all(variable.numpy() == (3 if is_counter else 2)), variable
    assert not counters


def test_infinite_numbers_and_the_smallest_weights(tmp_path):
    module, paths = tf.Module(), []
    module.complex, module.float = tf.Variable([0j, 0j]), tf.Variable([0.0, 0.0], dtype="float64")
    module.smallest = tf.Variable(5e-324, dtype="float64")
    for number in (1.0, 4.0):
        module.complex.assign([complex(np.inf, number), complex(number, -np.inf)])
        module.float.assign([number, -np.inf])
        paths.append(tf.train.Checkpoint(module=module).write(str(tmp_path / str(number))))
    for weights in ([2e-323, 1e-323], [1.6e308, 0.8e308]):
        output = str(tmp_path / "mean")
        tfav.average_checkpoints(paths, output, weights, overwrite=True, verbose=0)
        tf.train.Checkpoint(module=module).read(output).assert_consumed()
        np.testing.assert_array_equal(module.complex, [complex(np.inf, 2.0), complex(2.0, -np.inf)])
        np.testing.assert_array_equal(module.float, [2.0, -np.inf])
    for weights in (None, [1, 1], [2, 2], [1e-323, 1e-323]):
        tfav.average_checkpoints(paths, output, weights, overwrite=True, verbose=0)
        tf.train.Checkpoint(module=module).read(output).assert_consumed()
        assert module.smallest == 5e-324


# Errors.


def listing(directory):
    return {str(path): path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


def assert_refused(directory, message, *arguments, error=ValueError, **options):
    """With all parts of the message, and nothing is written."""
    before = listing(directory)
    with pytest.raises(error) as raised:
        tfav.average_checkpoints(*arguments, **options, verbose=0)
    assert all(part in str(raised.value) for part in message), raised.value
    assert listing(directory) == before


@each_format
def test_different_variables_are_refused(keras, suffix, tmp_path):
    def saved(name, **options):
        layers = [keras.layers.Dense(u, name=f"d{i}", **options) for i, u in enumerate(units)]
        model = keras.Sequential([keras.Input([2]), *layers], name="model")
        if suffix:
            return save(model, tmp_path / f"{name}{suffix}")
        return tf.train.Checkpoint(model=model).write(str(tmp_path / name))

    units = [2, 1]
    path = saved("path")
    units = [2, 3]
    other_shape = saved("other_shape")
    units = [2]
    fewer = saved("fewer")
    units = [2, 1]
    other_dtype = saved("other_dtype", dtype="float64")
    output = str(tmp_path / f"mean{suffix}")
    for other, words in [(other_shape, ["3]"]), (fewer, ["missing"]), (other_dtype, ["float64["])]:
        for paths in ([other, path], [path, other], [path, other, path]):
            assert_refused(tmp_path, [repr(path), repr(other), *words, "float32["], paths, output)


@each_format
def test_broken_file_is_named_whatever_is_broken(suffix, tmp_path):
    model = averaging_model(tf_keras)
    paths = [save(model, tmp_path / f"{number}{suffix}") for number in range(3)]
    state = testing_utils.values(model.optimizer.inner_optimizer.variables)
    momentum = max(state, key=np.size).tobytes()
    for path in paths:
        file = pathlib.Path(path if suffix else f"{path}.data-00000-of-00001")
        content = file.read_bytes()
        broken = [content[:-1], content.replace(momentum, bytes(len(momentum)))]
        for changed in (
            broken if suffix in ("", ".keras") else broken[:1]
        ):  # The others have no checksums.
            file.write_bytes(changed)
            assert_refused(tmp_path, [repr(path)], paths, str(tmp_path / f"mean{suffix}"))
        file.write_bytes(content)


def test_wrong_arguments_are_refused(tmp_path):
    model = averaging_model(keras_3)
    path, other = save(model, tmp_path / "a.keras"), save(model, tmp_path / "a.weights.h5")
    checkpoint, output = save(model, tmp_path / "ckpt"), str(tmp_path / "mean.keras")
    for paths in (path, b"a", None, 1, [1], [None]):
        assert_refused(tmp_path, ["list of paths"], paths, output, error=TypeError)
    assert_refused(tmp_path, ["none"], [], output)
    assert_refused(tmp_path, ["'.keras'", "'.weights.h5'", path, other], [other, path], output)
    assert_refused(tmp_path, ["'.keras'", "Checkpoint", "'out'"], [path], "out")
    assert_refused(tmp_path, ["missing.keras"], [path, str(tmp_path / "missing.keras")], output)
    for new in (str(tmp_path / "mean"), output):
        assert_refused(tmp_path, ["get_checkpoint_state", "in it"], [str(tmp_path)], new)
    assert_refused(tmp_path, ["exists", "overwrite"], [path], path)
    assert_refused(tmp_path, ["exists", "overwrite"], [checkpoint], checkpoint)
    assert_refused(tmp_path, ["Expected the path"], [checkpoint], f"{tmp_path}/")
    assert_refused(tmp_path, ["Cannot write", "a.keras/new"], [checkpoint], f"{path}/new")
    for weights in ([1], [1, 2, 3], [1, -1], [0, 0], [1, np.inf], [1, np.nan]):
        assert_refused(tmp_path, ["weights", repr(weights)], [path, path], output, weights)
    for weights in (["a", 1], 1, [None, 1]):
        assert_refused(tmp_path, ["weights"], [path, path], output, weights, error=TypeError)
    stateful = tf.train.Checkpoint(optimizer=model.optimizer).write(str(tmp_path / "optimizer"))
    assert_refused(tmp_path, ["files with weights"], [stateful], str(tmp_path / "mean"))
    in_graph = tf.function(lambda: tfav.average_checkpoints([path], output))
    with pytest.raises(RuntimeError, match="tf.function"):
        in_graph()


def damaged(content, rng):
    """The content of a file, cut off, with other bytes, or in part shifted."""
    content, place = bytearray(content), int(rng.integers(len(content)))
    kind = rng.integers(3)
    if kind == 0:
        return content[:place]
    if kind == 1:
        for place in rng.integers(len(content), size=10):
            content[place] ^= int(rng.integers(1, 256))
        return content
    return content[:place] + rng.bytes(int(rng.integers(1, 40))) + content[place:]


def average_damaged(directory, suffix, outcomes):
    """Averages files of which one is broken, 25 times; to be run in a process of its own."""
    for seed in range(25):
        rng = np.random.default_rng(seed)
        work = directory / str(seed)
        shutil.copytree(directory / "good", work)
        files = sorted(
            path
            for path in work.iterdir()
            if path.suffix in (".h5", ".keras", ".index") or ".data" in path.name
        )
        broken = files[rng.integers(len(files))]
        broken.write_bytes(damaged(broken.read_bytes(), rng))
        before, output = listing(work), str(work / f"mean{suffix}")
        try:
            tfav.average_checkpoints(
                [f"{work}/{number}{suffix}" for number in range(3)], output, verbose=0
            )
            outcomes.send(("whole", len(contents(output))))
        except ValueError as error:
            is_named = f"{work}/{broken.name.partition('.')[0]}" in str(error)
            outcomes.send(("refused", is_named and listing(work) == before))


@each_format
def test_broken_files_give_no_partial_output(suffix, tmp_path, forkserver):
    model = averaging_model(tf_keras)
    (tmp_path / "good").mkdir()
    for number in range(3):
        save(model, tmp_path / "good" / f"{number}{suffix}")
    whole = len(contents(str(tmp_path / "good" / f"0{suffix}")))
    events, exit_code = run(forkserver, average_damaged, tmp_path, suffix)
    assert exit_code == 0
    assert len(events) == 25
    assert set(events) <= {("refused", True), ("whole", whole)}
    assert ("refused", True) in events
    if suffix in ("", ".keras"):  # Which have checksums.
        assert ("whole", whole) not in events


# In processes of their own.


def run(forkserver, function, *arguments, kill_after=None):
    """Runs a function in a new process, which gets a connection as its last argument.

    Args:
      forkserver: starts it.
      function: of a module that can be imported.
      *arguments: for it.
      kill_after: seconds from the first event on.

    Returns:
      What it has sent, and its exit code.
    """
    receiver, sender = forkserver.Pipe(duplex=False)
    process = forkserver.Process(target=function, args=(*arguments, sender))
    process.start()
    sender.close()
    events = []
    try:
        while True:
            assert receiver.poll(TIME_LIMIT), f"Nothing for {TIME_LIMIT} s after {events}"
            events.append(receiver.recv())
            if kill_after is not None:
                time.sleep(kill_after)
                process.kill()  # Which does nothing if it has come to its end meanwhile.
    except EOFError:
        pass
    finally:
        process.join(TIME_LIMIT)
        process.kill()
        process.join()
    return events, process.exitcode


def average(paths, output, events):
    events.send(None)
    began = time.monotonic()
    tfav.average_checkpoints(paths, output, verbose=0)
    events.send(time.monotonic() - began)


@pytest.mark.parametrize("suffix", ["", ".keras"], ids=["checkpoint", ".keras"])
def test_killed_process_leaves_the_whole_output_or_none(suffix, tmp_path, forkserver):
    rng = np.random.default_rng(int(os.environ.get("KILL_TEST_SEED", "20261120")))
    model = testing_utils.new_model(units=[64] * 20, inputs=64)
    paths = []
    for number in range(3):
        change_weights(model, rng)
        path = str(tmp_path / f"{number}{suffix}")
        paths.append(save(model, path) if suffix else tf.train.Checkpoint(model=model).write(path))
    undisturbed = str(tmp_path / f"undisturbed{suffix}")
    (_, duration), _ = run(forkserver, average, paths, undisturbed)
    has_output = []
    for number in range(6):
        output = str(tmp_path / f"{number}" / f"mean{suffix}")
        _, exit_code = run(forkserver, average, paths, output, kill_after=duration * rng.random())
        assert exit_code in (0, -signal.SIGKILL)
        has_output.append(os.path.exists(output if suffix else f"{output}.index"))
        if has_output[-1]:
            assert contents(output) == contents(undisturbed)
    assert not all(has_output)


def measured(paths, output, weights, sizes):
    """Sends how much more memory the process takes in the end than in the beginning, at most, in MB."""
    tf.constant(0.0)  # Starts TensorFlow.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tfav.average_checkpoints(paths, output, weights, verbose=0)
    sizes.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["", ".keras"], ids=["checkpoint", ".keras"])
def test_memory_depends_on_the_largest_variable(suffix, tmp_path, forkserver):
    """Five files of 128 MB, in variables of 4 MB; checkpoints are written in shards of 32 MB."""
    layers = [keras_3.layers.Dense(1024, use_bias=False) for _ in range(32)]
    model = keras_3.Sequential([keras_3.Input([1024]), *layers])
    path = str(tmp_path / f"0{suffix}")
    paths = [save(model, path) if suffix else tf.train.Checkpoint(model=model).write(path)]
    for number in range(1, 5):
        paths.append(str(tmp_path / f"{number}{suffix}"))
        for file in tmp_path.glob("0.*"):
            shutil.copyfile(file, tmp_path / file.name.replace("0", str(number), 1))
    output = str(tmp_path / f"mean{suffix}")
    (size,), _ = run(forkserver, measured, paths, output, [1, 2, 3, 4, 5])
    print(f"{size} MB")
    assert size < 120


# The command.


def command(directory, arguments, printed):
    """What `python -m tf_averaging.average_checkpoints` does, and the status that it ends with."""
    os.chdir(directory)
    sys.argv = ["average_checkpoints", *arguments]
    with open("printed", "w") as sys.stdout:
        sys.stderr = sys.stdout
        try:
            runpy.run_module("tf_averaging.average_checkpoints", run_name="__main__", alter_sys=True)
        except SystemExit as error:
            printed.send(error.code)


def test_command(tmp_path, forkserver):
    variable = tf.Variable(0.0)
    checkpoint = tf.train.Checkpoint(variable=variable)
    manager = tf.train.CheckpointManager(checkpoint, str(tmp_path / "run"), max_to_keep=10)
    for number in range(7):
        variable.assign(2.0**number)
        manager.save()

    def outcome(*arguments):
        (status,), _ = run(forkserver, command, tmp_path, arguments)
        return status, (tmp_path / "printed").read_text()

    status, printed = outcome("--output=mean", "--last=5", "run")
    assert status in (None, 0)
    assert "1/1" in printed  # The progress bar.
    checkpoint.read(str(tmp_path / "mean"))
    assert variable == (4 + 8 + 16 + 32 + 64) / 5
    (tmp_path / "file").touch()  # No directory can be made there.
    status, _ = outcome("--output=mean", "run/ckpt-1.index", "run")
    assert "exists" in status
    arguments = ["--output=mean", "--overwrite", "--weights=3,1", "run/ckpt-1.index", "run/ckpt-3"]
    assert outcome(*arguments)[0] in (None, 0)
    checkpoint.read(str(tmp_path / "mean"))
    assert variable == (3 * 1 + 4) / 4
    assert "at least 8" in outcome("--output=new", "--last=8", "run")[0]
    status, _ = outcome("--output=new", "--weights=a", "run/ckpt-1")
    assert "numbers as `weights`" in status
    assert "'a'" in status
    assert "file/new" in outcome("--output=file/new", "run/ckpt-1")[0]
    assert "Pass the files in it" in outcome("--output=new.keras", str(tmp_path))[0]
    assert outcome("run")[0] == 1  # No output.
    assert not (tmp_path / "new.index").exists()
