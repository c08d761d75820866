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
"""Files that do not fit the model or the optimizer in every way: nothing is lost without a word."""

import warnings

import keras as keras_3
import numpy as np
import pytest
import tensorflow as tf

import tf_averaging as tfav
from tests import testing_utils
from tests.file_formats import Arrays
from tests.file_formats import KerasFile
from tests.file_formats import WeightsOfNewFormat
from tests.file_formats import checkpoint_of
from tests.file_formats import state_of
from tests.testing_utils import CURRENT
from tests.testing_utils import GENERATIONS
from tests.testing_utils import KERAS
from tests.testing_utils import LEGACY
from tests.testing_utils import assert_same_bits
from tests.testing_utils import both_generations
from tests.testing_utils import descend
from tests.testing_utils import early_or_late
from tests.testing_utils import fit_steps
from tests.testing_utils import new_model
from tests.testing_utils import state_variables
from tests.testing_utils import swapped_or_not
from tests.testing_utils import values
from tests.testing_utils import with_loss_scaling


def save(model, path):
    return checkpoint_of(model).save(str(path / "ckpt"))


def averages_of(model):
    return testing_utils.averages_of(model.optimizer, model.trainable_variables)


def new_swa(**options):
    return tfav.SWA(CURRENT.SGD(0.1), 0, 1, **options)


class TestOtherAverageDtype:
    """While swapped, weights are kept in another place if averages have a dtype of their own."""

    @early_or_late
    @swapped_or_not
    @pytest.mark.parametrize(
        ("saved", "restored"), [(None, "float64"), ("float64", None), ("float64", "float64")]
    )
    def test_restores_weights_and_averages(self, tmp_path, strategy, saved, restored, swapped, late):
        def new(average_dtype):
            ema, sgd = tfav.ExponentialMovingAverage, CURRENT.SGD
            return new_model(lambda: ema(sgd(0.1), average_dtype=average_dtype), strategy=strategy)

        model = new(saved)
        fit_steps(model, 3)
        weights, averages = values(model.trainable_variables), averages_of(model)
        if swapped:
            model.optimizer.swap_weights()
        path = save(model, tmp_path)
        other = new(restored)
        if late:
            fit_steps(other, 2)
            other.optimizer.swap_weights()
        status = checkpoint_of(other).restore(path)
        if late and not (saved is None and restored is not None):  # Which has variables of its own.
            status.assert_consumed()
        assert other.optimizer.weights_swapped == swapped
        if swapped:
            other.optimizer.swap_weights()
        assert_same_bits(values(other.trainable_variables), weights)
        # In the model, averages have the model's dtype: no more can be restored from there.
        narrow = swapped and restored is None or saved is None
        expected = [average.astype(np.float32) for average in averages] if narrow else averages
        assert_same_bits(averages_of(other), [e.astype(restored or np.float32) for e in expected])
        fit_steps(other, 1)

    def test_that_was_restored_twice_before_the_variables_exist(self, tmp_path):
        """The newer checkpoint counts, whichever comes to the variables first."""
        paths = []
        for value in (1.0, 2.0):
            variable = tf.Variable([value], dtype=tf.float16)
            optimizer = tfav.SWA(CURRENT.SGD(1.0), 0, 1)
            optimizer.shadow_copy([variable])
            optimizer.update_average(1.0)
            checkpoint = tf.train.Checkpoint(optimizer=optimizer, variable=variable)
            paths.append(checkpoint.save(str(tmp_path / f"ckpt{value}")))
        optimizer = tfav.SWA(CURRENT.SGD(1.0), average_dtype="float64")
        checkpoint = tf.train.Checkpoint(optimizer=optimizer)
        for path in paths:
            checkpoint.restore(path)
        checkpoint.variable = tf.Variable([0.0], dtype=tf.float16)
        assert optimizer.get_slot(checkpoint.variable, "average").numpy() == [2.0]
        assert optimizer.num_averaged == 1


class TestWhatTheFileLacks:
    @swapped_or_not
    @pytest.mark.parametrize("average_dtype", [None, "float64"])
    def test_average_starts_from_the_restored_weights(self, tmp_path, average_dtype, swapped):
        """Not from those that the model had before, which nobody can see any more."""
        model = new_model(new_swa(average_dtype=average_dtype))
        model.optimizer.shadow_copy([model.layers[1].kernel])
        fit_steps(model, 3)
        weights = values(model.trainable_variables)
        if swapped:
            model.optimizer.swap_weights()
        path = save(model, tmp_path)
        average = model.optimizer.get_average(model.layers[1].kernel).numpy()
        other = new_model(new_swa(average_dtype=average_dtype))
        fit_steps(other, 5)
        checkpoint_of(other).restore(path)
        assert other.optimizer.num_averaged == 3
        if swapped:
            other.optimizer.swap_weights()
        assert_same_bits(values(other.trainable_variables), weights)
        expected = [w.astype(average_dtype or np.float32) for w in weights]
        expected[2] = average
        assert_same_bits(averages_of(other), expected)

    def test_variable_that_is_not_in_it_at_all(self, tmp_path):
        """A stash must follow the weights too: it is what swapping back brings."""
        model = new_model(new_swa(average_dtype="float64"))
        fit_steps(model, 3)
        model.optimizer.swap_weights()
        path = save(model, tmp_path)
        other = new_model(new_swa(average_dtype="float64"), units=(3, 1, 1))
        fit_steps(other, 5)
        new_layer = values(other.layers[2].variables)
        checkpoint_of(other).restore(path).expect_partial()
        other.optimizer.swap_weights()
        assert_same_bits(values(other.layers[2].variables), new_layer)

    def test_statistics_start_from_the_restored_ones(self, tmp_path):
        def new():
            model = new_model(new_swa())
            bn = KERAS.layers.BatchNormalization()
            bn.build([None, 1])
            return model, bn, tf.train.Checkpoint(model=model, bn=bn, optimizer=model.optimizer)

        model, bn, checkpoint = new()
        fit_steps(model, 3)
        bn.moving_mean.assign([7.0])
        path = checkpoint.save(str(tmp_path / "ckpt"))
        other, other_bn, other_checkpoint = new()
        fit_steps(other, 3)
        other.optimizer._averages.add([other_bn.moving_mean], "exchanged")  # As `update_batch_norm` does.
        other_checkpoint.restore(path)
        other.optimizer.swap_weights()
        assert other_bn.moving_mean.numpy() == [7.0]

    def test_first_step_that_was_set_stays(self, tmp_path):
        """A file without averages says nothing of it; to forget it would start averaging at once."""
        model = new_model(CURRENT.SGD(0.1))
        fit_steps(model, 3)
        path = save(model, tmp_path)
        other = new_model(new_swa())
        other.optimizer.begin_averaging(5)
        with pytest.warns(UserWarning, match="without averages"):
            checkpoint_of(other).restore(path)
        fit_steps(other, 2)
        assert (other.optimizer.start_averaging, other.optimizer.num_averaged) == (5, 0)
        fit_steps(other, 1)
        assert other.optimizer.num_averaged == 1


OTHER = {"current": "legacy", "legacy": "current", "Adam": "SGD", "SGD": "Adam"}


@early_or_late
@pytest.mark.parametrize("averages_in_file", [True, False], ids=["ours", "plain"])
@pytest.mark.parametrize("file", GENERATIONS)
def test_other_generation_inside_takes_averages_and_steps_and_warns(
    tmp_path, file, averages_in_file, late
):
    inner = GENERATIONS[file].Adam(0.1)
    model = new_model(tfav.SWA(inner, 0, 1) if averages_in_file else inner)
    fit_steps(model, 3)
    other = new_model(tfav.SWA(GENERATIONS[OTHER[file]].Adam(0.1), 0, 1))
    if late:
        fit_steps(other, 2)
    message = f"{file}-generation optimizer.*starts anew" if averages_in_file else "starts anew"
    with pytest.warns(UserWarning, match=message):
        checkpoint_of(other).restore(save(model, tmp_path)).expect_partial()
    assert other.optimizer.iterations == 3
    assert_same_bits(values(other.variables), values(model.variables))
    if averages_in_file:
        assert other.optimizer.num_averaged == 3
        assert_same_bits(averages_of(other), averages_of(model))
    fit_steps(other, 1)


@early_or_late
@pytest.mark.parametrize("averages_in_file", [True, False], ids=["ours", "plain"])
@pytest.mark.parametrize(
    ("file", "here"),
    [
        (keras_3.optimizers, CURRENT),
        (keras_3.optimizers, LEGACY),
        (CURRENT, keras_3.optimizers),
        (LEGACY, keras_3.optimizers),
    ],
    ids=["keras-current", "keras-legacy", "current-keras", "legacy-keras"],
)
def test_checkpoint_of_the_other_keras(tmp_path, file, here, averages_in_file, late):
    """Averages are slots of variables that both have. The inner state, by position, would be mixed up."""

    def new(optimizer):
        root = tf.Module()
        root.optimizer, root.variables_ = optimizer, [tf.Variable([1.0, 2.0]), tf.Variable([3.0, 4.0])]
        return root, tf.train.Checkpoint(optimizer=optimizer, variables=root.variables_)

    def inner_state(optimizer):
        return [v.numpy() for v in state_variables(optimizer.inner_optimizer)[1:]]  # But for the steps.

    root, checkpoint = new(tfav.SWA(file.Adam(0.1), 0, 1) if averages_in_file else file.Adam(0.1))
    checkpoint.save(str(tmp_path / "ckpt"))  # TensorFlow may remember what there was when it saved first.
    history = []
    for _ in range(3):
        descend(root.optimizer, root.variables_)
        history.append(values(root.variables_))
    path = checkpoint.save(str(tmp_path / "ckpt"))

    restored, checkpoint = new(tfav.SWA(here.Adam(0.5), 0, 1))
    optimizer = restored.optimizer
    if late:
        descend(optimizer, restored.variables_, steps=2)
    else:
        untouched = tfav.SWA(here.Adam(0.5))
        untouched.build(restored.variables_)
    before = inner_state(optimizer if late else untouched)
    name = "Keras 3" if file is keras_3.optimizers else "tf_keras"
    with pytest.warns(UserWarning, match=f"written with an optimizer of {name}.*starts anew") as caught:
        checkpoint.restore(path).expect_partial()
    optimizer.build(restored.variables_)
    assert any("without averages" in str(w.message) for w in caught) != averages_in_file
    assert_same_bits(inner_state(optimizer), before)
    assert_same_bits(values(restored.variables_), history[-1])
    assert optimizer.iterations.numpy() == 3
    assert optimizer.num_averaged == (3 if averages_in_file else 0)
    optimizer.shadow_copy(restored.variables_)
    expected = np.mean(history, 0, np.float64) if averages_in_file else history[-1]
    for variable, average in zip(restored.variables_, expected):
        np.testing.assert_allclose(optimizer.get_average(variable), average, rtol=1e-6)
    descend(optimizer, restored.variables_)
    assert optimizer.iterations.numpy() == 4


class Halving(KERAS.optimizers.schedules.LearningRateSchedule):
    """Known to this module only: tf_keras cannot make one from its config by name."""

    def __call__(self, step):
        return 0.1 * 0.5 ** tf.cast(step, tf.float32)

    def get_config(self):
        return {}


@early_or_late
@pytest.mark.parametrize("averages_in_file", [True, False], ids=["ours", "plain"])
@both_generations
def test_schedule_that_is_not_registered(tmp_path, module, averages_in_file, late):
    """Restoring asks the inner optimizer for its slots, and the schedule has none."""
    inner = module.Adam(Halving())
    model = new_model(tfav.SWA(inner, 0, 1) if averages_in_file else inner)
    fit_steps(model, 3)
    path = save(model, tmp_path)
    other = new_model(tfav.SWA(module.Adam(Halving()), 0, 1))
    if late:
        fit_steps(other, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*without averages")
        checkpoint_of(other).restore(path)
    assert other.optimizer.iterations == 3
    fit_steps(model, 2)
    fit_steps(other, 2)
    assert_same_bits(values(other.variables), values(model.variables))
    if averages_in_file:
        assert_same_bits(averages_of(other), averages_of(model))


@pytest.mark.parametrize("averages_in_file", [True, False], ids=["ours", "plain"])
@pytest.mark.parametrize(
    ("file", "message"),
    [("Adam", r"\['momentum'\].*SGD.*Received: \['m', 'v'\]"), ("SGD", "another optimizer inside.*Adam")],
)
def test_other_legacy_optimizer_inside_is_named(tmp_path, file, message, averages_in_file):
    makers = {"Adam": LEGACY.Adam, "SGD": lambda rate: LEGACY.SGD(rate, momentum=0.9)}
    inner = makers[file](0.1)
    model = new_model(tfav.SWA(inner, 0, 1) if averages_in_file else inner)
    fit_steps(model, 3)
    other = new_model(tfav.SWA(makers[OTHER[file]](0.1), 0, 1))
    with pytest.warns(UserWarning, match=message):
        checkpoint_of(other).restore(save(model, tmp_path)).expect_partial()
    if averages_in_file:
        assert_same_bits(averages_of(other), averages_of(model))


class TestSavedAgainBeforeAStep:
    """What waits in a restored optimizer for variables that the first step creates is saved too.

    Where the model is not known, and a current-generation optimizer creates its variables later, that
    optimizer's state is missing, with a warning.
    """

    @pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "custom loop"])
    @with_loss_scaling
    @pytest.mark.parametrize("file", ["ours", "plain"])
    @both_generations
    def test_checkpoint(self, tmp_path, module, file, loss_scaling, compiled):
        def new(wrap=True):
            optimizer = module.Adam(0.1)
            if wrap:
                optimizer = tfav.SWA(optimizer, 0, 1)
            return testing_utils.loss_scaled(optimizer) if loss_scaling else optimizer

        model = new_model(new(wrap=file == "ours"))
        fit_steps(model, 3)
        path = save(model, tmp_path)
        optimizer = new()
        again = new_model(optimizer if compiled else None)
        checkpoint = tf.train.Checkpoint(model=again, optimizer=optimizer)
        is_lost = not compiled and module is CURRENT
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            checkpoint.restore(path)
            path = checkpoint.save(str(tmp_path / "again"))
        messages = [str(warning.message) for warning in caught]
        others = [message for message in messages if "wait until those are created" not in message]
        assert (len(messages) > len(others)) == is_lost
        assert len(others) == (file == "plain")
        if is_lost:
            return
        for part in tmp_path.glob("ckpt-1.*"):
            part.unlink()  # As a CheckpointManager does: what waits was read before.
        path = checkpoint.save(str(tmp_path / "again"))
        resumed = new_model(new())
        checkpoint_of(resumed).restore(path)
        fit_steps(model, 2)
        fit_steps(resumed, 2)
        assert_same_bits(values(resumed.variables), values(model.variables))

    def test_arrays_of_an_unknown_model_are_not_complete_and_that_is_said(self, tmp_path):
        model = new_model(tfav.SWA(CURRENT.Adam(0.1), 0, 1))
        fit_steps(model, 3)
        path = save(model, tmp_path)
        optimizer = tfav.SWA(CURRENT.Adam(0.1), 0, 1)
        again = new_model(None)
        tf.train.Checkpoint(model=again, optimizer=optimizer).restore(path)
        with pytest.warns(UserWarning, match="build"):
            optimizer.get_weights()
        optimizer.build(again.trainable_variables)
        assert_same_bits(optimizer.get_weights(), model.optimizer.get_weights())


class TestChangedModels:
    @staticmethod
    def model_of(units, module=CURRENT):
        return new_model(tfav.SWA(module.SGD(0.01, momentum=0.9), 0, 1), units)

    @early_or_late
    def test_checkpoint_restores_what_matches(self, tmp_path, late):
        model = self.model_of([3, 1], LEGACY)
        fit_steps(model, 4)
        path = checkpoint_of(model).save(str(tmp_path / "ckpt"))
        grown = self.model_of([3, 2], LEGACY)
        if late:
            fit_steps(grown, 3)
        # Another head: by attribute, so that the first layer is found and the second not.
        tf.train.Checkpoint(
            model=tf.train.Checkpoint(**{"layer_with_weights-0": grown.layers[0]}),
            optimizer=grown.optimizer,
        ).restore(path).expect_partial()
        new_head = grown.layers[1].kernel
        if not late:
            grown.optimizer.build(grown.trainable_variables)
        old, new = model.layers[0].kernel, grown.layers[0].kernel
        for slot in ("average", "momentum"):
            np.testing.assert_array_equal(
                grown.optimizer.get_slot(new, slot).numpy(), model.optimizer.get_slot(old, slot).numpy()
            )
        assert grown.optimizer.num_averaged == model.optimizer.num_averaged
        np.testing.assert_array_equal(
            grown.optimizer.get_slot(new_head, "average").numpy(), new_head.numpy()
        )
        fit_steps(grown, 2)

    @both_generations
    @pytest.mark.parametrize("form", [KerasFile, WeightsOfNewFormat, Arrays])
    def test_arrays_that_do_not_fit_change_nothing(self, tmp_path, module, form):
        model = self.model_of([3, 2], module)
        fit_steps(model, 4)
        state = model.optimizer.get_weights()
        grown = self.model_of([3, 2, 1], module)
        fit_steps(grown, 3)
        before = state_of(grown)
        if form is Arrays:
            with pytest.raises(ValueError, match="Expected"):
                grown.optimizer.set_weights(state)
        else:
            form.save(grown, str(tmp_path))
            path = str(tmp_path) + form.name
            with pytest.warns(UserWarning, match="not loaded"):
                model.load_weights(path, skip_mismatch=True)
            assert_same_bits(model.optimizer.get_weights(), state)
        assert state_of(grown) == before

    @with_loss_scaling
    def test_file_of_a_plain_optimizer(self, tmp_path, loss_scaling):
        plain = new_model(CURRENT.SGD(0.01, momentum=0.9), loss_scaling=loss_scaling)
        fit_steps(plain, 3)
        plain.save(str(tmp_path / "model.keras"))
        optimizer = tfav.SWA(CURRENT.SGD(0.01, momentum=0.9), 0, 1)
        model = new_model(optimizer, loss_scaling=loss_scaling)
        fit_steps(model, 5)
        if loss_scaling:  # As in tf_keras alone, wherever the number of variables differs.
            with pytest.raises(AttributeError, match="no attribute 'name'"):
                model.load_weights(str(tmp_path / "model.keras"))
            return
        with pytest.warns(UserWarning, match="without averages"):
            model.load_weights(str(tmp_path / "model.keras"))
        assert (optimizer.iterations, optimizer.num_averaged) == (3, 0)
        fit_steps(plain, 2)
        fit_steps(model, 2)
        assert_same_bits(model.get_weights(), plain.get_weights())

    @both_generations
    def test_h5_gives_another_model_no_state(self, tmp_path, module):
        """tf_keras refuses its weights, or loads by name those that fit, and never asks the optimizer."""
        model = self.model_of([3, 2], module)
        fit_steps(model, 4)
        path = str(tmp_path / "model.h5")
        model.save(path)
        other = self.model_of([3, 2, 1], module)
        fit_steps(other, 3)
        before = state_of(other)
        with pytest.raises(ValueError, match="layer"):
            other.load_weights(path)
        assert state_of(other) == before
        other.load_weights(path, by_name=True)
        np.testing.assert_array_equal(other.layers[0].kernel, model.layers[0].kernel)
        assert state_of(other)["optimizer"] == before["optimizer"]
        fit_steps(other, 1)

    def test_file_without_an_optimizer(self):
        model = self.model_of([1])
        fit_steps(model, 5)
        before = state_of(model)
        with pytest.warns(UserWarning, match="no state"):
            model.optimizer.load_own_variables({})
        assert state_of(model) == before

    def test_restore_of_a_checkpoint_from_before_the_first_step(self, tmp_path):
        """It has no averages yet, and those of steps taken since must not stay."""
        model = self.model_of([3, 1])
        path = checkpoint_of(model).save(str(tmp_path / "ckpt"))
        fit_steps(model, 4)
        checkpoint_of(model).restore(path)
        assert model.optimizer.num_averaged == 0
        with model.optimizer.swapped_weights():
            averages = model.get_weights()
        assert_same_bits(averages, model.get_weights())

    def test_early_save_does_not_fix_what_is_saved_later(self, tmp_path):
        model = self.model_of([3, 1])
        checkpoint = checkpoint_of(model)
        checkpoint.save(str(tmp_path / "ckpt"))
        fit_steps(model, 4)
        path = checkpoint.save(str(tmp_path / "ckpt"))
        resumed = self.model_of([3, 1])
        checkpoint_of(resumed).restore(path)
        fit_steps(model, 4)
        fit_steps(resumed, 4)
        assert state_of(resumed) == state_of(model)
