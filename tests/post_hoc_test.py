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
"""The average of any width, from snapshots, is the one that would have been kept."""

import os
import shutil

import keras as keras_3
import numpy as np
import pytest
import tensorflow as tf

import tf_averaging as tfav
from tests import testing_utils
from tests.file_formats import Checkpoint
from tests.file_formats import KerasFile
from tests.file_formats import WeightsOfNewFormat
from tests.testing_utils import KERAS
from tests.testing_utils import assert_same_bits
from tests.testing_utils import bits
from tests.testing_utils import fit_steps
from tests.testing_utils import values
from tf_averaging import snapshots
from tf_averaging.post_hoc_average import coefficients
from tf_averaging.post_hoc_ema import gamma_of

both_kerases = pytest.mark.parametrize("keras", [keras_3, KERAS], ids=["keras", "tf_keras"])

# Widths and exponents: the paper's two, and three worked out by hand the other way round.
WIDTHS = {0.05: 16.97, 0.10: 6.94}
EXACT = [(0.0, 12**-0.5), (1.0, (2 / 36) ** 0.5), (2.0, (3 / 80) ** 0.5), (10.0, (11 / 1872) ** 0.5)]


def power_average(history: np.ndarray, gamma: float) -> np.ndarray:
    """The average of weights (one row for each update), by its recursion in float64."""
    average = np.zeros_like(history[0], dtype=np.float64)
    for t, weights in enumerate(history, 1):
        decay = (1 - 1 / t) ** (gamma + 1)
        average = decay * average + (1 - decay) * weights
    return average


def gamma_by_bisection(width: float) -> float:
    low, high = 0.0, 1e8
    for _ in range(200):
        middle = (low + high) / 2
        wide = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > width**2
        low, high = (middle, high) if wide else (low, middle)
    return low


def test_exponent_of_a_width():
    for width, gamma in WIDTHS.items():
        assert abs(gamma_of(width) - gamma) < 0.005
    for gamma, width in EXACT:
        assert abs(gamma_of(width) - gamma) < 1e-12 * (1 + gamma)
    for width in [1e-5, 0.01, 0.07, 0.12, 0.2]:
        assert gamma_of(width) == pytest.approx(gamma_by_bisection(width), rel=1e-9)


@pytest.mark.parametrize(
    ("width", "error"),
    [(0, ValueError), (-0.1, ValueError), (0.29, ValueError), (float("nan"), ValueError)]
    + [("0.1", TypeError), (None, TypeError), (True, TypeError)],
)
def test_width_that_is_none(tmp_path, width, error):
    for call in [
        lambda: tfav.PostHocEMA("sgd", relative_widths=(0.1, width)),
        lambda: tfav.PostHocEMA("sgd", relative_widths=width),
        lambda: tfav.post_hoc_average(tmp_path, relative_width=width),
    ]:
        with pytest.raises(error, match=r"Expected a relative width above 0 and up to 0.2887"):
            call()


def walk(steps: int, size: int) -> np.ndarray:
    """A random walk of weights, far from zero."""
    rng = np.random.default_rng(7)
    return 50.0 * rng.normal(size=size) + np.cumsum(rng.normal(size=(steps, size)), axis=0)


@both_kerases
def test_averages_equal_their_definition(keras):
    history = walk(300, 20)
    variable = tf.Variable(history[0], dtype=tf.float64)
    optimizer = tfav.PostHocEMA(keras.optimizers.SGD(1.0), (0.05, 0.10, 0.25), average_period=None)
    optimizer.shadow_copy([variable])
    update = tf.function(optimizer.update_average)
    for weights in history:
        variable.assign(weights)
        update()
    for which, width in enumerate([0.05, 0.10, 0.25]):
        expected = power_average(history, gamma_by_bisection(width))
        np.testing.assert_allclose(optimizer.get_average(variable, which), expected, rtol=1e-9)


def test_after_many_updates_the_weight_is_exact():
    optimizer = tfav.PostHocEMA("sgd", 0.05)
    for updates in [0, 1, 1000, 10**9]:
        weight = optimizer.averaging_weight(None, tf.constant(updates, tf.int64)).numpy()
        # (1 - x) ** p = 1 - p x + p (p - 1) / 2 x ** 2 - ...
        p, x = gamma_by_bisection(0.05) + 1, 1 / (updates + 1)
        expected = p * x - p * (p - 1) / 2 * x**2 if updates > 10**6 else 1 - (1 - x) ** p
        assert weight == pytest.approx(expected, rel=1e-9)
    assert optimizer.averaging_weight(None, tf.constant(0, tf.int64)).numpy() == 1.0


class TestOtherWidths:
    """Sixteen snapshots of 4,000 updates."""

    STEPS, SIZE = 4000, 40

    @pytest.fixture(scope="class")
    def directory(self, tmp_path_factory):
        history, directory = walk(self.STEPS, self.SIZE), tmp_path_factory.mktemp("snapshots")
        variable = tf.Variable(history[0], dtype=tf.float32, name="walk")
        optimizer = tfav.PostHocEMA(keras_3.optimizers.SGD(1.0), average_period=None)
        optimizer.shadow_copy([variable])

        @tf.function
        def updates(all_weights):
            for weights in all_weights:
                variable.assign(weights)
                optimizer.update_average()

        for part in np.split(history, 16):
            updates(tf.constant(part, tf.float32))
            optimizer.save_snapshot(directory, [variable])
        return directory

    @pytest.mark.parametrize("width", [0.07, 0.12])
    @pytest.mark.parametrize("step", [None, 2000, 2249])
    def test_average(self, directory, width, step):
        last = self.STEPS if step is None else 2000
        history = walk(self.STEPS, self.SIZE)[:last]
        expected = power_average(history, gamma_by_bisection(width))
        (average,) = tfav.post_hoc_average(directory, width, step=step).values()
        assert average.dtype == np.float32
        bound = 0.005 if step is None else 0.02  # There are eight snapshots until then.
        assert np.max(np.abs(average - expected) / history.std(axis=0)) < bound

    def test_constant_weights_stay_constant(self):
        """Whatever the width: a bias would show at weights that are large beside their changes."""
        for width in [0.01, 0.07, 0.25]:
            profiles = tuple((t, gamma) for t in range(250, 4001, 250) for gamma in (16.97, 6.94))
            assert coefficients(profiles, (4000, gamma_of(width))).sum() == pytest.approx(1, abs=1e-12)

    def test_width_of_a_snapshot(self, directory):
        with np.load(directory / "snapshot_000000004000.npz") as file:
            expected = [file["0_0"], file["0_1"]]
        for width, one in zip((0.05, 0.10), expected):
            (average,) = tfav.post_hoc_average(directory, width).values()
            np.testing.assert_allclose(average, one, rtol=1e-6)


def train_with_snapshots(keras, directory, swapped: bool = False, every=2):
    model = testing_utils.new_model(
        tfav.PostHocEMA(keras.optimizers.SGD(0.1)), batch_norm=True, keras=keras
    )
    callbacks = [tfav.callbacks.SaveAverages(directory, every)]
    if swapped:
        callbacks.insert(0, tfav.callbacks.SwapAverageWeights(swap_on_epoch=True))
    fit_steps(model, 7, callbacks)
    return model


class TestSnapshots:
    @both_kerases
    @pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
    def test_target(self, tmp_path, keras, swapped):
        """The width of a kept average gives this one, in a model, a list or a dict."""
        model = train_with_snapshots(keras, tmp_path, swapped)
        names = [f"snapshot_{step:012}.npz" for step in (2, 4, 6, 7)]
        assert sorted(os.listdir(tmp_path)) == names
        target = testing_utils.new_model(batch_norm=True, seed=5, keras=keras)
        statistics = values(target.non_trainable_variables)
        trained = model.trainable_variables
        expected = [model.optimizer.get_average(v, 1).numpy() for v in trained]
        assert tfav.post_hoc_average(tmp_path, 0.10, target=target) is None
        got = [values(target.trainable_variables)]
        assert_same_bits(values(target.non_trainable_variables), statistics)
        in_list = [tf.Variable(tf.zeros_like(value)) for value in expected]
        tfav.post_hoc_average(tmp_path, 0.10, target=in_list)
        got.append(values(in_list))
        found = tfav.post_hoc_average(tmp_path, 0.10)
        assert list(found) == [getattr(v, "path", v.name) for v in trained]
        for arrays in [*got, found.values()]:
            for array, average in zip(arrays, expected):
                np.testing.assert_allclose(array, average, rtol=1e-5, atol=1e-6)

    @both_kerases
    def test_every_epoch_and_again_after_a_resume(self, tmp_path, keras):
        model = train_with_snapshots(keras, tmp_path, every="epoch")
        (path,) = tmp_path.iterdir()
        with np.load(path) as file:
            before = [file[name] for name in file.files]
        with pytest.raises(ValueError, match=r"There is a snapshot of 7 updates already.*overwrite"):
            model.optimizer.save_snapshot(tmp_path, model)
        model.optimizer.swap_weights(1)
        assert model.optimizer.save_snapshot(tmp_path, model, overwrite=True) == str(path)
        with np.load(path) as file:
            assert_same_bits([file[name] for name in file.files], before)
        assert list(tmp_path.iterdir()) == [path]

    @both_kerases
    def test_after_a_model_was_loaded(self, tmp_path, keras, recwarn):
        """Keras 3 gives its variables other paths then. The moments of the snapshots stay."""
        parts, path = str(tmp_path / "parts"), str(tmp_path / "model.keras")
        model = testing_utils.new_model(tfav.PostHocEMA(keras.optimizers.SGD(0.1)), keras=keras)
        fit_steps(model, 3, [tfav.callbacks.SaveAverages(parts, 2)])
        model.save(path)
        fit_steps(model, 4, [tfav.callbacks.SaveAverages(parts, 2)])
        ended = tfav.post_hoc_average(parts, 0.07)
        recwarn.clear()
        loaded = keras.models.load_model(path)
        fit_steps(loaded, 4, [tfav.callbacks.SaveAverages(parts, 2)])
        (warning,) = [w for w in recwarn if "there are snapshots of more" in str(w.message)]
        assert "000000000006.npz" in str(warning.message)
        names = [f"snapshot_{step:012}.npz" for step in (2, 3, 4, 6, 7)]
        assert sorted(os.listdir(parts)) == names
        for one, other in zip(ended.values(), tfav.post_hoc_average(parts, 0.07).values()):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)

    def test_bfloat16(self, tmp_path):
        optimizer = tfav.PostHocEMA(keras_3.optimizers.SGD(1.0), average_dtype="bfloat16")
        variable = tf.Variable([1.0, 2.0], dtype=tf.bfloat16)
        testing_utils.descend(optimizer, [variable])
        optimizer.save_snapshot(tmp_path, [variable])
        target = tf.Variable([0.0, 0.0])
        tfav.post_hoc_average(tmp_path, 0.05, target=[target])
        np.testing.assert_array_equal(target, [0.0, 1.0])

    def test_names_that_are_the_same(self, tmp_path):
        variables = [tf.Variable(float(i), name="w") for i in range(3)]
        optimizer = tfav.PostHocEMA(KERAS.optimizers.SGD(1.0))
        testing_utils.descend(optimizer, variables)
        optimizer.save_snapshot(tmp_path, variables)
        found = tfav.post_hoc_average(tmp_path, 0.1)
        assert {name: float(value) for name, value in found.items()} == {
            "w:0": -1.0,
            "w:0_1": 0.0,
            "w:0_2": 1.0,
        }

    @both_kerases
    def test_a_variable_that_joins_later(self, tmp_path, keras):
        """It counts from its own first update."""
        optimizer = tfav.PostHocEMA(keras.optimizers.SGD(1.0), average_period=None)
        variables = [tf.Variable(np.float64(0), name=name) for name in "ab"]
        history = walk(160, 2)
        for step, weights in enumerate(history):
            if step in (0, 80):
                optimizer.shadow_copy(variables[: 1 + step // 80])
            for variable, value in zip(variables, weights):
                variable.assign(value)
            optimizer.update_average()
            if step >= 80 and step % 10 == 9:
                optimizer.save_snapshot(tmp_path, variables)
        found = list(tfav.post_hoc_average(tmp_path, 0.07).values())
        gamma = gamma_by_bisection(0.07)
        late = power_average(history[80:, 1:], gamma)[0]
        early = power_average(history[:, :1], gamma)[0]
        assert abs(found[1] - late) < 0.03 * history[80:, 1].std()
        assert abs(found[0] - early) < 0.05 * history[:, 0].std()

    @both_kerases
    def test_wrong_use(self, tmp_path, keras):
        model = train_with_snapshots(keras, tmp_path / "a")
        optimizer = model.optimizer
        other = testing_utils.new_model(units=(2, 1), keras=keras)
        before = bits(values(other.variables))
        integers = [tf.zeros(v.shape, tf.int32) for v in model.trainable_variables]
        integers = list(map(tf.Variable, integers))
        new = testing_utils.new_model(tfav.PostHocEMA(keras.optimizers.SGD(0.1)), keras=keras)
        new.optimizer.shadow_copy(new)
        for error, message, call in [
            (ValueError, "hold no updates yet", lambda: new.optimizer.save_snapshot(tmp_path, new)),
            (ValueError, "none has an average", lambda: optimizer.save_snapshot(tmp_path, other)),
            (KeyError, "no average", lambda: optimizer.save_snapshot(tmp_path, other.variables)),
            (TypeError, "a list of variables", lambda: optimizer.save_snapshot(tmp_path, 3)),
            (ValueError, "There are none in", lambda: tfav.post_hoc_average(tmp_path / "no", 0.1)),
            (ValueError, "There are none in", lambda: tfav.post_hoc_average(tmp_path, 0.1)),
            (ValueError, "`step` >= 2", lambda: tfav.post_hoc_average(tmp_path / "a", 0.1, step=1)),
            (TypeError, "`step`", lambda: tfav.post_hoc_average(tmp_path / "a", 0.1, step=2.5)),
            (
                ValueError,
                "`target` of 8",
                lambda: tfav.post_hoc_average(tmp_path / "a", 0.1, None, other),
            ),
            (TypeError, "`target`", lambda: tfav.post_hoc_average(tmp_path / "a", 0.1, None, 3)),
            (
                TypeError,
                "`target` of floating-point",
                lambda: tfav.post_hoc_average(tmp_path / "a", 0.1, None, integers),
            ),
            (
                ValueError,
                "variables like",
                lambda: tfav.post_hoc_average(
                    tmp_path / "a", 0.1, None, [*other.variables, *other.variables[:2]]
                ),
            ),
            (TypeError, "`every`", lambda: tfav.callbacks.SaveAverages(tmp_path, 1.5)),
            (ValueError, "`every`", lambda: tfav.callbacks.SaveAverages(tmp_path, 0)),
            (
                TypeError,
                "Expected a `PostHocEMA`",
                lambda: fit_steps(
                    testing_utils.new_model(tfav.SWA(keras.optimizers.SGD()), keras=keras),
                    1,
                    [tfav.callbacks.SaveAverages(tmp_path)],
                ),
            ),
        ]:
            with pytest.raises(error, match=message):
                call()
        first = other.variables[0]
        for target in (other.get_weights(), {"a": first}, "model.keras", first, tf.constant(1.0)):
            with pytest.raises(TypeError, match="a list of variables as `target`"):
                tfav.post_hoc_average(tmp_path / "a", 0.1, None, target)
        assert bits(values(other.variables)) == before
        assert [path.name for path in tmp_path.iterdir()] == ["a"]

    def test_broken_and_foreign_files(self, tmp_path):
        train_with_snapshots(keras_3, tmp_path / "good")
        last = tmp_path / "good" / "snapshot_000000000007.npz"
        content = last.read_bytes()
        target = testing_utils.new_model(batch_norm=True, seed=5, keras=keras_3)
        before = bits(values(target.variables))
        data = content.index(b"2_0.npy") + 200  # In the numbers of an array.
        damaged = content[:data] + bytes([content[data] ^ 1]) + content[data + 1 :]
        for broken in [b"", content[:100], content[:-1], content[: len(content) // 2], damaged]:
            last.write_bytes(broken)
            with pytest.raises(ValueError, match=r"Cannot read .*000007.npz"):
                tfav.post_hoc_average(tmp_path / "good", 0.1, target=target)
            assert bits(values(target.variables)) == before
        tfav.post_hoc_average(tmp_path / "good", 0.1, step=6, target=target)
        optimizer = tfav.PostHocEMA(keras_3.optimizers.SGD(0.1))
        variable = testing_utils.trained_variable(optimizer, steps=7)
        last.unlink()
        optimizer.save_snapshot(tmp_path / "good", [variable])
        with pytest.raises(ValueError, match=r"snapshots of one model.*0002.npz.*0007.npz"):
            tfav.post_hoc_average(tmp_path / "good", 0.1)

    def test_nothing_is_left_of_a_file_that_cannot_be_written(self, tmp_path, monkeypatch):
        optimizer = tfav.PostHocEMA(keras_3.optimizers.SGD(0.1))
        variable = testing_utils.trained_variable(optimizer)

        def fail(*args, **kwargs):
            raise OSError("No space left on device")

        monkeypatch.setattr(snapshots.os, "replace", fail)
        with pytest.raises(OSError, match="No space"):
            optimizer.save_snapshot(tmp_path, [variable])
        assert not list(tmp_path.iterdir())


@both_kerases
@pytest.mark.parametrize("form", [Checkpoint, KerasFile, WeightsOfNewFormat])
def test_resumed_training_goes_on_to_the_same_bits(tmp_path, keras, form):
    def new(seed):
        optimizer = tfav.PostHocEMA(keras.optimizers.Adam(0.1), average_period=2)
        return testing_utils.new_model(optimizer, seed=seed, keras=keras)

    model = new(1)
    fit_steps(model, 3)
    model.optimizer.swap_weights(1)
    form.save(model, str(tmp_path))
    resumed = form.resume(new(2), str(tmp_path))
    for one in (model, resumed):
        one.optimizer.swap_weights(1)
        fit_steps(one, 4)
    assert resumed.optimizer.relative_widths == [0.05, 0.10]
    directories = [tmp_path / "model", tmp_path / "resumed"]
    for one, directory in zip((model, resumed), directories):
        one.optimizer.save_snapshot(directory, one.trainable_variables)
    shutil.copy(next(directories[1].iterdir()), tmp_path / "copy.npz")
    found = [list(tfav.post_hoc_average(directory, 0.05).values()) for directory in directories]
    assert_same_bits(found[0], found[1])
    assert_same_bits(values(resumed.variables), values(model.variables))


@pytest.mark.parametrize("keras", [keras_3, KERAS], ids=["keras", "tf_keras"])
def test_on_replicas(tmp_path, keras, mirrored_strategy):
    model = testing_utils.new_model(
        lambda: tfav.PostHocEMA(keras.optimizers.SGD(0.1)), keras=keras, strategy=mirrored_strategy
    )
    fit_steps(model, 4, [tfav.callbacks.SaveAverages(tmp_path, 1)])
    found = tfav.post_hoc_average(tmp_path, 0.05)
    for array, variable in zip(found.values(), model.trainable_variables):
        average = model.optimizer.get_average(variable).numpy()
        np.testing.assert_allclose(array, average, rtol=1e-5, atol=1e-6)
    tfav.post_hoc_average(tmp_path, 0.10, target=model)
    with model.optimizer.swapped_weights(1):
        averages = [testing_utils.read(v) for v in model.trainable_variables]
    for variable, average in zip(model.trainable_variables, averages):
        np.testing.assert_allclose(testing_utils.read(variable), average, rtol=1e-5, atol=1e-6)
