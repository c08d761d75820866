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
"""The layout that CONTRIBUTING describes: who imports whom, and how many files one has to open."""

import ast
import pathlib
import subprocess
import sys
import threading

import keras as keras_3
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import tf_averaging as tfav

PACKAGE = pathlib.Path(tfav.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

AROUND = {"averaged_optimizer_wrapper", "averaging_optimizer", "core", "kerases"}
# What each part of the package may import of it, beside itself. `faces` imports a face when it is needed.
MAY_IMPORT = {
    "core": set(),
    "saving": {"core"},
    "keras2": {"core", "saving", "faces", "kerases"},
    "keras3": {"core", "saving", "faces", "kerases"},
    "kerases": set(),
    "average_checkpoints": {"kerases"},
    "side_by_side": {"core"},
    "faces": {"kerases", "keras2", "keras3", "side_by_side"},
    "averaged_optimizer_wrapper": {"core", "saving", "faces", "side_by_side"},
    "stochastic_weight_averaging": {"averaged_optimizer_wrapper", "faces"},
    "exponential_moving_average": {"averaged_optimizer_wrapper", "faces", "core", "kerases"},
    "schedules": {"core", "kerases"},
    "averaging_optimizer": {"kerases"},
    "averaged_model": AROUND,
    "batch_norm": {*AROUND, "side_by_side"},
    "snapshots": {"average_checkpoints", "averaged_model", "core"},
    "post_hoc_ema": {"averaged_optimizer_wrapper", "faces", "snapshots"},
    "post_hoc_average": {"post_hoc_ema", "snapshots", "averaged_model", "core", "kerases"},
    "callbacks": {*AROUND, "batch_norm", "post_hoc_ema", "side_by_side", "snapshots"},
    "version": set(),
}
MAY_IMPORT["__init__"] = set(MAY_IMPORT)


def part_of(path: pathlib.Path) -> str:
    """The folder of a file of the package, or the file's own name where it is in none."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: pathlib.Path, at_import_only: bool = False) -> set:
    """The modules that a file imports; those for type checkers alone are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if at_import_only else ast.walk(tree)
    for_types = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    found = set()
    for node in nodes:
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_each_part_imports_only_what_is_below_it(path):
    part = part_of(path)
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("tf_averaging.")}
    assert ours - {part} <= MAY_IMPORT[part]
    assert ours & {"keras2", "keras3"} <= {part} or part == "faces"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_a_face_imports_its_keras(path):
    kerases = {name.split(".")[0] for name in imports(path)} & {"keras", "tf_keras"}
    its_own = {"keras2": "tf_keras", "keras3": "keras"}.get(part_of(path))
    assert kerases <= {its_own}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_too_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450


def run_python(code: str, **environment: str) -> str:
    """What a new Python process prints."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "", "PYTHONPATH": str(PACKAGE.parent), "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    ).stdout


WITHOUT_TF_KERAS = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tf_keras":
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import tf_averaging
print("tf_keras" in sys.modules, sorted(tf_averaging.__all__)[0])
"""


def test_package_is_imported_where_there_is_no_tf_keras():
    assert run_python(WITHOUT_TF_KERAS) == "False AveragedOptimizerWrapper\n"


def test_nothing_of_keras_3_is_imported_where_tf_keras_takes_its_place():
    code = "import sys, tf_averaging; print(any(name.split('.')[0] == 'keras' for name in sys.modules))"
    assert run_python(code, TF_USE_LEGACY_KERAS="1") == "False\n"


def test_two_classes_of_ours_between_keras_and_the_scheme():
    mro = type(tfav.SWA(tf_keras.optimizers.SGD())).__mro__
    between = mro[mro.index(tfav.SWA) + 1 : mro.index(tf_keras.optimizers.Optimizer)]
    assert [cls.__name__ for cls in between] == ["AveragedOptimizerWrapper", "Keras2Face"]


@pytest.mark.parametrize("module", [tfav, tfav.callbacks, tfav.schedules], ids=lambda m: m.__name__)
def test_internal_modules_are_not_offered(module):
    offered = {name for name in dir(module) if not name.startswith("_")}
    assert offered == {*module.__all__} | ({"VERSION"} if module is tfav else set())


# Files to open. CONTRIBUTING has these numbers, beside those of version 0.1.


def files_opened(action) -> set:
    """The files of the package in which a function is called, on any thread."""
    opened = set()

    def note(frame, event, argument):
        path = pathlib.Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in path.parents:
            opened.add(str(path.relative_to(PACKAGE)))

    sys.setprofile(note)
    threading.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return opened


INPUTS = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)


# The most files, with each Keras.
MOST_FILES = {
    "a training step": {tf_keras: 8, keras_3: 10},
    "a swap": {tf_keras: 5, keras_3: 5},
    "`.keras` save and load": {tf_keras: 8, keras_3: 9},
    "a checkpoint restore": {tf_keras: 7, keras_3: 9},
}


@pytest.mark.parametrize("keras", [tf_keras, keras_3], ids=["tf_keras", "keras"])
def test_files_to_open(tmp_path, keras):
    def new_model():
        model = keras.Sequential([keras.layers.Input([4]), keras.layers.Dense(1)])
        model.compile(tfav.ExponentialMovingAverage(keras.optimizers.SGD(0.1)), "mse")
        return model

    def fit(model):
        model.fit(INPUTS, INPUTS[:, :1], verbose=0)

    def save_and_load():
        model.save(tmp_path / "model.keras")
        keras.models.load_model(tmp_path / "model.keras")

    model, other = new_model(), new_model()
    opened = {"a training step": files_opened(lambda: fit(model))}
    opened["a swap"] = files_opened(model.optimizer.swap_weights)
    model.optimizer.swap_weights()
    opened["`.keras` save and load"] = files_opened(save_and_load)
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "ckpt")
    fit(other)
    checkpoint = tf.train.Checkpoint(model=other, optimizer=other.optimizer)
    opened["a checkpoint restore"] = files_opened(lambda: checkpoint.restore(path))
    assert opened.keys() == MOST_FILES.keys()
    for what, files in opened.items():
        assert 0 < len(files) <= MOST_FILES[what][keras], (what, files)
