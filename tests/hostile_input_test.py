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
"""Hostile and broken input: configs, arrays and files that are not what they should be."""

import copy
import io
import pathlib
import resource
import shutil
import traceback
import warnings
import zipfile

import h5py
import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

import tf_averaging as tfav
from tests import testing_utils
from tests.file_formats import checkpoint_of
from tests.testing_utils import CURRENT
from tests.testing_utils import KERAS
from tests.testing_utils import LEGACY
from tests.testing_utils import bits

SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": list(hypothesis.HealthCheck),
}

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["Adam", "SGD", "tf_averaging>SWA", "Dense", "function", "os", "builtins", "print"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda values: (
        st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=8), values, max_size=3)
    ),
    max_leaves=5,
)
OPTIMIZERS = {
    "swa": lambda: tfav.SWA(CURRENT.Adam(0.1)),
    "ema": lambda: tfav.ExponentialMovingAverage(
        LEGACY.SGD(0.1, momentum=0.9),
        average_decay=KERAS.optimizers.schedules.ExponentialDecay(0.9, 10, 0.9),
    ),
}


def paths_in(config, path=()):
    for key, value in config.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from paths_in(value, (*path, key))


@hypothesis.settings(max_examples=400, **SETTINGS)
@hypothesis.given(name=st.sampled_from(sorted(OPTIMIZERS)), data=st.data())
def test_changed_configs(name, data):
    config = OPTIMIZERS[name]().get_config()
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(list(paths_in(config))))
        part = config
        for key in path:
            part = part[key]
        if data.draw(st.booleans()):
            part[last] = data.draw(VALUES)
        else:
            del part[last]
    before = copy.deepcopy(config)
    cls = type(OPTIMIZERS[name]())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = cls.from_config(config)
    except (TypeError, ValueError):
        pass
    else:
        assert isinstance(optimizer, cls)
        assert isinstance(optimizer.inner_optimizer, (CURRENT.Optimizer, LEGACY.Optimizer))
    assert repr(config) == repr(before)


@pytest.mark.parametrize(
    "inner",
    [
        {"module": "no_such_module", "class_name": "X", "config": {}, "registered_name": None},
        {"module": "keras.optimizers", "class_name": "X", "config": {}, "registered_name": None},
        {
            "module": "keras.layers",
            "class_name": "Dense",
            "config": {"units": 1},
            "registered_name": None,
        },
        {"module": "collections", "class_name": "Counter", "config": {}, "registered_name": None},
        {"module": "os", "class_name": "function", "config": "getcwd", "registered_name": "getcwd"},
        {
            "module": "builtins",
            "class_name": "function",
            "config": "print",
            "registered_name": "function",
        },
        {"module": "builtins", "class_name": "__lambda__", "config": {"value": ["", None, None]}},
        {"class_name": "NoSuchOptimizer", "config": {}},
        {"class_name": "Adam"},
        {"config": {}},
        {},
        [],
        7,
        None,
        "no_such_optimizer",
    ],
)
def test_config_that_names_no_optimizer(inner):
    config = {**tfav.SWA("sgd").get_config(), "optimizer": inner}
    with pytest.raises((TypeError, ValueError)):
        tfav.SWA.from_config(config)


@pytest.mark.parametrize("where", ["optimizer", "learning_rate", "average_period", "average_decay"])
@pytest.mark.parametrize("nest", [lambda inside: [inside], lambda inside: {"config": inside}])
def test_config_that_is_nested_too_deeply(keras, nest, where):
    """Neither Keras, nor a message that shows it, can follow it."""
    config = tfav.ExponentialMovingAverage(keras.optimizers.SGD()).get_config()
    deep = 1
    for _ in range(5000):
        deep = nest(deep)
    (config["optimizer"]["config"] if where == "learning_rate" else config)[where] = deep
    with pytest.raises(ValueError, match="Expected|nested too deeply"):
        tfav.ExponentialMovingAverage.from_config(config)


@pytest.mark.parametrize("name", ["iteration", "clocks", "first_step"])
def test_number_that_fits_no_variable_changes_nothing(name):
    optimizer = tfav.SWA(CURRENT.SGD(1.0), 0, 1)
    testing_utils.trained_variable(optimizer)
    before = state_of(optimizer)
    weights = [
        np.full(v.shape, 2**63 + 5, np.uint64)
        if name in v.name
        else v.numpy() + (v.dtype == tf.int64)
        if v.dtype != tf.bool
        else v.numpy()
        for v in optimizer.variables
    ]
    with pytest.raises(ValueError, match="Expected"):
        optimizer.set_weights(weights)
    assert state_of(optimizer) == before


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(a trained model, the directory with its files)"""
    directory = tmp_path_factory.mktemp("saved")
    model = testing_utils.new_model(tfav.SWA(CURRENT.Adam(0.1), 0, 1), units=(2, 1), inputs=3)
    testing_utils.fit_steps(model, 3, inputs=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(directory / "model.keras")
        model.save_weights(directory / "x.weights.h5")
        model.save(directory / "model.h5")
        model.save(directory / "model", save_format="tf")
    checkpoint_of(model).write(str(directory / "ckpt"))
    return model, directory


def state_of(optimizer):
    return bits(optimizer.get_weights())


def test_small_file_that_claims_gigabytes(keras, tmp_path):
    """Whatever array of the optimizer does: 700 million elements in some 20 KB."""
    model = testing_utils.new_model(tfav.SWA(keras.optimizers.Adam(0.1), 0, 1), keras=keras)
    testing_utils.fit_steps(model, 3)
    path, weights = tmp_path / "model.keras", "model.weights.h5"
    model.save(path)
    before = state_of(model.optimizer)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for key in ["0", "5", "12", "about", "averages_of", "clocks", "has_stash"]:
        content = io.BytesIO(members[weights])
        with h5py.File(content, "r+") as file:
            group = file["optimizer/vars"]
            dtype = group.pop(key).dtype
            group.create_dataset(key, [700_000_000], dtype, chunks=(2**20,))
        with zipfile.ZipFile(path, "w") as archive:
            for name, member in members.items():
                archive.writestr(name, content.getvalue() if name == weights else member)
        assert path.stat().st_size < 50_000
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.warns(UserWarning, match=f"not loaded.*Expected stored arrays.*/{key}'"):
            model.load_weights(path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # KB.
        assert state_of(model.optimizer) == before


ARRAYS = st.one_of(
    st.builds(np.zeros, st.sampled_from([(), (0,), (1,), (2,), (3, 2), (2, 1), (1, 1)])),
    st.builds(
        lambda shape, dtype: np.ones(shape, dtype),
        st.sampled_from([(), (0,), (1,), (2,), (3, 2), (2, 1)]),
        st.sampled_from(
            ["int64", "float16", "float32", "bool", "complex64", "U3", "O", "V2", "longdouble"]
        ),
    ),
    st.integers(-5, 5).map(np.int64),
    VALUES,
)


@hypothesis.settings(max_examples=150, **SETTINGS)
@hypothesis.given(data=st.data())
def test_changed_arrays_change_everything_or_nothing(saved, data):
    optimizer = saved[0].optimizer
    store = {}
    optimizer.save_own_variables(store)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(store)) | st.text(max_size=3)) if store else "0"
        if data.draw(st.booleans()):
            store[key] = data.draw(ARRAYS)
        else:
            store.pop(key, None)
    before, weights = state_of(optimizer), optimizer.get_weights()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.load_own_variables(store)
    if any("not loaded" in str(warning.message) for warning in caught):
        assert state_of(optimizer) == before
    optimizer.set_weights(weights)
    assert state_of(optimizer) == before


@hypothesis.settings(max_examples=150, **SETTINGS)
@hypothesis.given(data=st.data())
def test_changed_weights_change_everything_or_nothing(saved, data):
    optimizer = saved[0].optimizer
    weights = optimizer.get_weights()
    before = state_of(optimizer)
    changed = list(weights)
    for _ in range(data.draw(st.integers(1, 2))):
        index = data.draw(st.integers(0, len(changed)))
        changed[index : index + data.draw(st.integers(0, 1))] = [data.draw(ARRAYS)]
    try:
        optimizer.set_weights(changed)
    except (TypeError, ValueError):
        assert state_of(optimizer) == before
    optimizer.set_weights(weights)
    assert state_of(optimizer) == before


def broken(data, content: bytes, flips: bool = True) -> bytes:
    """The content cut off somewhere, or with a few of its bytes changed."""
    content = bytearray(content)
    if not flips or data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        start = data.draw(st.integers(0, len(content) - 1))
        length = min(8, len(content) - start)
        content[start : start + length] = data.draw(st.binary(min_size=length, max_size=length))
    return bytes(content)


def try_to(read):
    """`read()`, or None if it fails as it may: what is neither TypeError nor ValueError is not ours."""
    try:
        return read()
    except (TypeError, ValueError, tf.errors.OpError):
        return None
    except Exception as error:
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        if any(file.startswith(str(pathlib.Path(tfav.__file__).parent)) for file in files):
            raise
        return None


def assert_all_or_nothing(optimizer, before):
    """Of the state, which was `before`, everything has been replaced or nothing.

    Args:
      optimizer: the optimizer.
      before: arrays, each unlike that in the file; None for one that says nothing.
    """
    kept = [
        np.array_equal(array, old)
        for array, old in zip(optimizer.get_weights(), before)
        if old is not None
    ]
    assert all(kept) or not any(kept), kept


@hypothesis.settings(max_examples=100, **SETTINGS)
@hypothesis.given(data=st.data(), name=st.sampled_from(["model.keras", "x.weights.h5"]))
def test_loading_weights_of_a_broken_file(saved, tmp_path_factory, name, data):
    model, directory = saved
    # The HDF5 library itself may crash on other bytes than it wrote.
    content = broken(data, (directory / name).read_bytes(), flips=name.endswith(".keras"))
    path = tmp_path_factory.getbasetemp() / ("broken." + name)
    path.write_bytes(content)
    weights = model.get_weights(), model.optimizer.get_weights()
    others = [array if array.dtype == bool else array + 1 for array in weights[1]]
    model.optimizer.set_weights(others)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try_to(lambda: model.load_weights(str(path)))
    before = [None if array.dtype == bool else array for array in others]
    assert_all_or_nothing(model.optimizer, before)
    model.set_weights(weights[0])
    model.optimizer.set_weights(weights[1])


@hypothesis.settings(max_examples=60, **SETTINGS)
@hypothesis.given(data=st.data(), name=st.sampled_from(["model.keras", "model.h5"]))
def test_loading_a_broken_model(saved, tmp_path_factory, name, data):
    content = broken(data, (saved[1] / name).read_bytes(), flips=name.endswith(".keras"))
    path = tmp_path_factory.getbasetemp() / ("broken." + name)
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = try_to(lambda: KERAS.models.load_model(str(path)))
    if model is not None and isinstance(model.optimizer, tfav.SWA):
        model.optimizer.build(model.trainable_variables)
        # Steps, Adam's moments and the clocks are others in the file; the rest may look the same.
        before = [
            np.broadcast_to([[-1], [0]], variable.shape)
            if "clocks" in variable.name
            else np.zeros(variable.shape)
            if index < 9
            else None
            for index, variable in enumerate(model.optimizer.variables)
        ]
        assert_all_or_nothing(model.optimizer, before)


@hypothesis.settings(max_examples=20, **SETTINGS)
@hypothesis.given(data=st.data())
def test_loading_a_broken_saved_model(saved, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "broken_saved_model"
    shutil.copytree(saved[1] / "model", path)
    file = data.draw(st.sampled_from(sorted(file for file in path.rglob("*") if file.is_file())))
    file.write_bytes(broken(data, file.read_bytes() or b"0"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try_to(lambda: KERAS.models.load_model(str(path)))
    shutil.rmtree(path)


@hypothesis.settings(max_examples=60, **SETTINGS)
@hypothesis.given(data=st.data(), suffix=st.sampled_from([".index", ".data-00000-of-00001"]))
def test_restoring_a_broken_checkpoint(saved, tmp_path_factory, suffix, data):
    model, directory = saved
    path = tmp_path_factory.getbasetemp() / "broken_ckpt"
    for part in (".index", ".data-00000-of-00001"):
        content = (directory / ("ckpt" + part)).read_bytes()
        path.with_name(path.name + part).write_bytes(broken(data, content) if part == suffix else content)
    checkpoint = checkpoint_of(model)
    before = state_of(model.optimizer)
    try_to(lambda: checkpoint.read(str(path)).expect_partial())
    # TensorFlow may have restored a part of it. A good one restores all.
    checkpoint.read(str(directory / "ckpt")).assert_consumed()
    assert state_of(model.optimizer) == before
