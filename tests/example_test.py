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
"""The example, run as a user runs it: in its own process, with as little training as it takes."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import keras as keras_3
import numpy as np
import pytest
import tf_keras

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.slow

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "digits.py"
RESULT = r"\d\.\d{4} ± \d\.\d{4}"


def run(*flags, keras=keras_3):
    """Runs it with `tf.keras` being `keras`."""
    command = [sys.executable, str(SCRIPT), *flags]
    environment = {**os.environ, "TF_USE_LEGACY_KERAS": str(int(keras is tf_keras))}
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300, env=environment)


@pytest.fixture(scope="module", params=[keras_3, tf_keras], ids=lambda keras: keras.__name__)
def library(request):
    """What `tf.keras` is in the example."""
    return request.param


@pytest.fixture(scope="module")
def example(library, tmp_path_factory):
    """The finished process and the directory of what it wrote."""
    output_dir = tmp_path_factory.mktemp("output")
    flags = (
        "--epochs=2",
        "--seeds=1",
        "--batch_size=64",
        "--learning_rate=1",
        f"--replicas={2 if library is tf_keras else 1}",
        f"--output_dir={output_dir}",
    )
    process = run(*flags, keras=library)
    assert process.returncode == 0, process.stderr
    return process, output_dir


KINDS = [
    f"{kind}, {decay}" for decay in ("constant rate", "cosine decay") for kind in ("sgd", "EMA", "SWA")
]


def test_prints_a_row_for_each_kind(example):
    process, _ = example
    rows = re.findall(rf"^(\S+, \w+ \w+) +({RESULT}) +({RESULT})$", process.stdout, re.M)
    assert [name for name, _, _ in rows] == KINDS
    assert len({loss for _, _, loss in rows}) == len(KINDS)
    assert "Paired" not in process.stdout  # One seed has no spread.


def test_pairs_are_compared_over_the_seeds():
    sys.path.insert(0, str(SCRIPT.parent))
    import digits

    kinds = {"a": [1.0, 2.0, 4.0], "b": [0.5, 2.0, 3.0]}
    text = digits.paired_tests({k: [{"loss": loss} for loss in v] for k, v in kinds.items()})
    difference, p = re.search(r"^a +b +(\S+) +(\S+)$", text, re.M).groups()
    # Differences 0.5, 0 and 1: t = 0.5 / (0.5 / sqrt(3)) = sqrt(3), and with two degrees of freedom
    # p = 1 - t / sqrt(2 + t ** 2).
    assert (difference, p) == ("+0.5000", "0.23")


def test_shows_the_progress_bar_with_both_accuracies(example):
    process, _ = example
    assert re.search(r"[=━].* val_accuracy: .* raw_val_accuracy: ", process.stdout)


def test_draws_the_curves(example):
    _, output_dir = example
    assert (output_dir / "validation_accuracy.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_saves_a_model_that_loads(library, example):
    _, output_dir = example
    model = library.models.load_model(output_dir / "averaged.keras")
    assert model.predict(np.zeros([1, 8, 8, 1]), verbose=0).shape == (1, 10)


def test_checks_the_saved_model_in_a_new_process(example):
    process, output_dir = example
    assert f"{output_dir / 'averaged.keras'}, loaded in a new process, predicts" in process.stderr


def test_a_model_that_predicts_something_else_fails_the_check(library, example, tmp_path):
    _, output_dir = example
    shutil.copytree(output_dir, tmp_path, dirs_exist_ok=True)
    predictions = np.load(tmp_path / "averaged_predictions.npy")
    np.save(tmp_path / "averaged_predictions.npy", predictions + 1e-3)
    process = run("--check_only", f"--output_dir={tmp_path}", keras=library)
    assert process.returncode == 1
    assert "predicts something else" in process.stderr


def test_help_shows_every_flag():
    process = run("--help")
    assert process.returncode in (0, 1)  # absl exits with 1 after help in some of its versions.
    flags = (
        "epochs",
        "seeds",
        "output_dir",
        "optimizer",
        "learning_rate",
        "swa_factor",
        "batch_size",
        "replicas",
    )
    for flag in flags:
        assert f"--{flag}:" in process.stdout
