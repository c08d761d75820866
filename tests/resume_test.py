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
"""Whatever can be saved carries the whole state, and whatever was saved resumes exactly."""

import copy
import itertools
import pickle
import warnings

import keras as keras_3
import pytest
import tensorflow as tf

import tf_averaging as tfav
from tests import file_formats
from tests import testing_utils
from tests.file_formats import Arrays
from tests.file_formats import Checkpoint
from tests.file_formats import EarlyCheckpoint
from tests.file_formats import H5File
from tests.file_formats import KerasFile
from tests.file_formats import Weights
from tests.file_formats import WeightsOfNewFormat
from tests.file_formats import checkpoint_of
from tests.file_formats import state_of
from tests.testing_utils import CURRENT
from tests.testing_utils import GENERATIONS
from tests.testing_utils import KERAS
from tests.testing_utils import LEGACY
from tests.testing_utils import averaging
from tests.testing_utils import bits
from tests.testing_utils import fit_steps

STEPS_BEFORE, STEPS_AFTER = 7, 20
# The optimizers of both generations of tf_keras, and of Keras 3.
MODULES = {**GENERATIONS, "keras3": keras_3.optimizers}
SCHEMES = {
    "swa": lambda inner, **options: tfav.SWA(inner, 2, 3, **options),
    "ema": lambda inner, **options: tfav.ExponentialMovingAverage(inner, start_step=1, **options),
}


def new_model(strategy=None, generation="current", scheme="swa", loss_scaling=False, seed=1, **options):
    return testing_utils.new_model(
        lambda: SCHEMES[scheme](MODULES[generation].Adam(0.01), **options),
        batch_norm=True,
        loss_scaling=loss_scaling,
        strategy=strategy,
        seed=seed,
        keras=testing_utils.keras_of(MODULES[generation]),
    )


class Pickled:
    """A copy of a model of Keras 3, which makes it by way of a `.keras` file."""

    @staticmethod
    def save(model, path):
        with open(path + "/model.pickle", "wb") as file:
            pickle.dump(model, file)

    @staticmethod
    def resume(model, path):
        with open(path + "/model.pickle", "rb") as file:
            return copy.deepcopy(pickle.load(file))


def formats_of(strategy_name, generation):
    if generation != "keras3":
        return file_formats.FORMATS
    # What replicas hold is read and written in the same way, whatever the file is called.
    on_replicas = [file_formats.CheckpointOfOtherValues, KerasFile]
    return on_replicas if strategy_name == "mirrored" else [*file_formats.KERAS_3_FORMATS, Pickled]


# (strategy, generation, scheme, loss scaling): half of all, in which any three of them meet in every way.
# No code asks for all four: what is saved does not depend on the scheme.
COMBINATIONS = [
    (strategy, generation, scheme, loss_scaling)
    for strategy, generation, scheme, loss_scaling in itertools.product(
        ["default", "mirrored"], MODULES, SCHEMES, [False, True]
    )
    if ((strategy == "mirrored") + (generation == "legacy") + (scheme == "ema") + loss_scaling) % 2
]


def each_combination(**fixed):
    """Runs a test with all combinations, or those with these values."""
    names = ("strategy_name", "generation", "scheme", "loss_scaling")
    return pytest.mark.parametrize(
        names, [values for values in COMBINATIONS if fixed.items() <= dict(zip(names, values)).items()]
    )


@pytest.fixture(scope="session")
def references(tmp_path_factory, mirrored_strategy):
    """For each combination: a directory with a run saved in all formats, and the states of the run.

    Trained once for all formats; the first state is that of the saved files, the second that after the
    further steps, which the run took without stopping.
    """
    made = {}

    def get(strategy_name, generation, scheme, loss_scaling):
        key = (strategy_name, generation, scheme, loss_scaling)
        if key not in made:
            strategies = {"default": tf.distribute.get_strategy(), "mirrored": mirrored_strategy}
            path = tmp_path_factory.mktemp("-".join(map(str, key)))
            model = new_model(strategies[strategy_name], generation, scheme, loss_scaling)
            fit_steps(model, STEPS_BEFORE - 3)
            # So that not all clocks are the same.
            averaging(model.optimizer).reset_averages([model.get_layer("layer1").kernel])
            fit_steps(model, 3)
            with_statistics = strategy_name == "default"
            saved = state_of(model, with_statistics)
            for name in ("not swapped", "swapped"):
                for form in formats_of(strategy_name, generation):
                    directory = path / name / form.__name__
                    directory.mkdir(parents=True)
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        form.save(model, str(directory))
                averaging(model.optimizer).swap_weights()
            fit_steps(model, STEPS_AFTER)
            made[key] = strategies[strategy_name], path, saved, state_of(model, with_statistics)
        return made[key]

    return get


def assert_same_state(model, expected, loses, with_statistics):
    state = state_of(model, with_statistics)
    for name in expected.keys() - loses:
        assert state[name] == expected[name], name


@pytest.mark.parametrize(
    ("strategy_name", "generation", "scheme", "loss_scaling", "form"),
    [(*values, form) for values in COMBINATIONS for form in formats_of(*values[:2])],
    ids=lambda value: getattr(value, "__name__", None),
)
class TestMatrix:
    def test_resumes_exactly(self, references, strategy_name, generation, scheme, loss_scaling, form):
        strategy, path, saved, ended = references(strategy_name, generation, scheme, loss_scaling)
        model = new_model(strategy, generation, scheme, loss_scaling, seed=2)
        with_statistics = strategy_name == "default"
        loses = file_formats.lost(form, loss_scaling)
        model = form.resume(model, str(path / "not swapped" / form.__name__))

        if "optimizer" in loses:
            weights = model.variables if with_statistics else model.trainable_variables
            assert testing_utils.bits(testing_utils.values(weights)) == saved["weights"]
            return
        assert_same_state(model, saved, loses, with_statistics)
        fit_steps(model, STEPS_AFTER)
        assert_same_state(model, ended, loses, with_statistics)

    def test_saved_while_swapped_is_resumed_swapped(
        self, references, strategy_name, generation, scheme, loss_scaling, form
    ):
        loses = file_formats.lost(form, loss_scaling)
        if "optimizer" in loses:
            pytest.skip("tf_keras keeps nothing of the optimizer")
        strategy, path, saved, _ = references(strategy_name, generation, scheme, loss_scaling)
        model = new_model(strategy, generation, scheme, loss_scaling, seed=2)
        resume = file_formats.CheckpointOfOtherValues.resume if form is Checkpoint else form.resume
        model = resume(model, str(path / "swapped" / form.__name__))
        optimizer = averaging(model.optimizer)
        assert optimizer.weights_swapped
        optimizer.swap_weights()
        assert_same_state(model, saved, loses, strategy_name == "default")


@pytest.mark.parametrize("form", [EarlyCheckpoint, KerasFile], ids=lambda form: form.__name__)
@each_combination(generation="current")
def test_step_on_what_was_saved_while_swapped_is_an_error(
    references, strategy_name, generation, scheme, loss_scaling, form
):
    strategy, path, saved, _ = references(strategy_name, generation, scheme, loss_scaling)
    model = new_model(strategy, generation, scheme, loss_scaling, seed=2)
    model = form.resume(model, str(path / "swapped" / form.__name__))
    with pytest.raises(tf.errors.InvalidArgumentError, match="call_swap_weights|swap_weights"):
        fit_steps(model, 1)
    averaging(model.optimizer).swap_weights()
    assert state_of(model, with_statistics=False)["averages"] == saved["averages"]
    fit_steps(model, 1)


@each_combination(strategy_name="default")
def test_all_of_an_early_restored_checkpoint_is_consumed(
    references, strategy_name, generation, scheme, loss_scaling
):
    strategy, path, _, _ = references(strategy_name, generation, scheme, loss_scaling)
    model = new_model(strategy, generation, scheme, loss_scaling, seed=2)
    file = tf.train.latest_checkpoint(str(path / "not swapped" / "Checkpoint"))
    status = checkpoint_of(model).restore(file)
    fit_steps(model, 1)
    status.assert_consumed()


@testing_utils.with_loss_scaling
@pytest.mark.parametrize("generation", MODULES)
def test_model_that_is_built_by_its_first_batch(tmp_path, generation, loss_scaling):
    """Neither weights nor anything of the optimizer exists when the checkpoint is restored."""

    def new(seed):
        keras = testing_utils.keras_of(MODULES[generation])
        keras.utils.set_random_seed(seed)
        dense, norm = keras.layers.Dense, keras.layers.BatchNormalization
        model = keras.Sequential([dense(3), norm(), dense(1)])
        optimizer = SCHEMES["swa"](MODULES[generation].Adam(0.01))
        model.compile(testing_utils.loss_scaled(optimizer, keras) if loss_scaling else optimizer, "mse")
        return model

    model = new(1)
    fit_steps(model, STEPS_BEFORE)
    path = checkpoint_of(model).save(str(tmp_path / "ckpt"))
    resumed = new(2)
    status = checkpoint_of(resumed).restore(path)
    fit_steps(model, STEPS_AFTER)
    fit_steps(resumed, STEPS_AFTER)
    status.assert_consumed()
    assert state_of(resumed) == state_of(model)


@pytest.mark.parametrize("generation", MODULES)
def test_training_goes_on_during_an_asynchronous_save(tmp_path, generation):
    model = new_model(None, generation, "ema")
    fit_steps(model, STEPS_BEFORE)
    options = tf.train.CheckpointOptions(enable_async=True)
    saved, checkpoints = [], [checkpoint_of(model)]
    for number in range(3):
        saved.append(state_of(model))
        if generation == "keras3" and number:  # Plain Keras 3 cannot save twice with one of them.
            checkpoints.append(checkpoint_of(model))
        checkpoints[-1].write(str(tmp_path / str(number)), options=options)
        fit_steps(model, 2)
    for checkpoint in checkpoints:
        checkpoint.sync()
    for number, state in enumerate(saved):
        resumed = new_model(None, generation, "ema", seed=2)
        if generation == "keras3":
            resumed.optimizer.build(resumed.trainable_variables)
        checkpoint_of(resumed).read(str(tmp_path / str(number)))
        assert state_of(resumed) == state


@pytest.mark.parametrize("swap_first", [True, False], ids=["swap first", "backup first"])
def test_callbacks_resume_what_was_saved_while_swapped(tmp_path, swap_first):
    """`BackupAndRestore` restores when the other callbacks' `on_train_begin` may be over."""

    def fit(model, epochs, with_callbacks=True):
        swap = tfav.callbacks.SwapAverageWeights(swap_on_epoch=True)
        backup = KERAS.callbacks.BackupAndRestore(str(tmp_path), delete_checkpoint=False)
        saved = KERAS.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: swapped.append(model.optimizer.weights_swapped)
        )
        callbacks = [swap, backup, saved] if swap_first else [backup, saved, swap]
        model.fit(
            testing_utils.X,
            testing_utils.Y,
            batch_size=40,
            epochs=epochs,
            shuffle=False,
            verbose=0,
            callbacks=callbacks if with_callbacks else [],
        )
        if model.optimizer.weights_swapped:
            model.optimizer.swap_weights()

    swapped = []
    first = new_model()
    fit(first, 2)
    assert swapped == [swap_first] * 2
    resumed = new_model(seed=2)
    fit(resumed, 4)
    reference = new_model()
    fit(reference, 4, with_callbacks=False)
    assert state_of(resumed) == state_of(reference)


def in_any_order(model):
    """The state; that of the averages depends in Keras 3 on the format, where others are averaged too."""
    return {name: sorted(arrays, key=str) for name, arrays in state_of(model).items()}


class TestAveragesOfOtherVariables:
    """Statistics of BatchNormalization, say, which `load_model` does not know when it loads."""

    @pytest.mark.parametrize(
        ("generation", "form", "loss_scaling"),
        [
            *itertools.product(["current"], [EarlyCheckpoint, Checkpoint, KerasFile], [False, True]),
            ("current", H5File, False),  # Under loss scaling tf_keras cannot load the optimizer's state.
            *itertools.product(["keras3"], [EarlyCheckpoint, KerasFile], [True]),
        ],
    )
    @testing_utils.swapped_or_not
    def test_of_all_variables(self, tmp_path, generation, form, loss_scaling, swapped):
        def new(seed):
            options = {"loss_scaling": loss_scaling, "trainable_weights_only": False}
            return new_model(None, generation, seed=seed, **options)

        model = new(1)
        averaging(model.optimizer).shadow_copy(model)
        fit_steps(model, STEPS_BEFORE)
        if swapped:
            averaging(model.optimizer).swap_weights()
        form.save(model, str(tmp_path))
        fresh = new(2)
        if form is Checkpoint:
            averaging(fresh.optimizer).shadow_copy(fresh)
        resumed = form.resume(fresh, str(tmp_path))
        optimizer = averaging(resumed.optimizer)
        if form in (KerasFile, H5File):
            # Saved again before the variables are known, nothing is lost either.
            with pytest.raises(ValueError, match="shadow_copy"):
                optimizer.swap_weights()
            form.save(resumed, str(tmp_path))
            resumed = form.resume(fresh, str(tmp_path))
            optimizer = averaging(resumed.optimizer)
            if not swapped:
                with pytest.raises(ValueError, match="shadow_copy"):
                    fit_steps(resumed, 1)
        optimizer.shadow_copy(resumed)
        assert in_any_order(resumed) == in_any_order(model)
        assert optimizer.weights_swapped == swapped
        if swapped:
            averaging(model.optimizer).swap_weights()
            optimizer.swap_weights()
        fit_steps(model, 5)
        fit_steps(resumed, 5)
        assert in_any_order(resumed) == in_any_order(model)

    @pytest.mark.parametrize("form", [EarlyCheckpoint, KerasFile])
    @pytest.mark.parametrize("others", [False, True], ids=["trained", "others too"])
    def test_of_a_list(self, tmp_path, form, others):
        def chosen(model):
            other = [model.get_layer("bn").moving_mean] if others else []
            return [model.get_layer("layer1").kernel, *other]

        model = new_model(None, "legacy")
        model.optimizer.shadow_copy(chosen(model))
        fit_steps(model, STEPS_BEFORE)
        form.save(model, str(tmp_path))
        fresh = new_model(None, "legacy", seed=2)
        if form is EarlyCheckpoint:
            fresh.optimizer.shadow_copy(chosen(fresh))
        resumed = form.resume(fresh, str(tmp_path))
        if others and form is KerasFile:
            with pytest.raises(ValueError, match="shadow_copy"):
                fit_steps(resumed, 1)
            resumed.optimizer.shadow_copy(chosen(resumed))
        fit_steps(model, 5)
        fit_steps(resumed, 5)
        assert len(state_of(resumed)["averages"]) == 1 + others
        assert state_of(resumed) == state_of(model)

    def test_that_do_not_fit_are_dropped_with_a_warning(self, tmp_path):
        model = new_model(trainable_weights_only=False)
        model.optimizer.shadow_copy(model)
        fit_steps(model, STEPS_BEFORE)
        KerasFile.save(model, str(tmp_path))
        loaded = KerasFile.resume(model, str(tmp_path))
        another = KERAS.layers.BatchNormalization()
        another.build([None, 7])
        with pytest.warns(UserWarning, match="do not fit"):
            loaded.optimizer.shadow_copy(another)


@pytest.mark.parametrize("form", [KerasFile, H5File, Arrays, WeightsOfNewFormat])
@each_combination(loss_scaling=False)
def test_restored_early_then_saved_in_another_format(
    references, tmp_path, strategy_name, generation, scheme, loss_scaling, form
):
    if generation == "keras3" and (form is H5File or strategy_name == "mirrored"):
        pytest.skip(
            "Keras 3 keeps nothing of the optimizer in `.h5`; the file of replicas is another one"
        )
    strategy, path, saved, _ = references(strategy_name, generation, scheme, loss_scaling)
    model = EarlyCheckpoint.resume(
        new_model(strategy, generation, scheme, seed=2), str(path / "not swapped" / "EarlyCheckpoint")
    )
    form.save(model, str(tmp_path))
    model = form.resume(new_model(strategy, generation, scheme, seed=3), str(tmp_path))
    assert state_of(model, strategy_name == "default") == saved


@pytest.mark.parametrize("form", [KerasFile, H5File, Checkpoint])
def test_variables_of_a_subclass_are_saved(tmp_path, form):
    with KERAS.saving.custom_object_scope({"Counting": Counting}):
        model, fresh = (
            testing_utils.new_model(Counting(CURRENT.SGD()), batch_norm=True) for _ in range(2)
        )
        fit_steps(model, 3)
        model.optimizer.seen.assign(7)
        form.save(model, str(tmp_path))
        resumed = form.resume(fresh, str(tmp_path))
    assert resumed.optimizer.seen.numpy() == 7
    assert state_of(resumed) == state_of(model)


class Counting(tfav.AveragedOptimizerWrapper):
    """A scheme with a variable of its own."""

    def __init__(self, optimizer, **options):
        super().__init__(optimizer, **options)
        self.seen = self.add_variable([], tf.int64, name="seen")

    def averaging_weight(self, steps, updates):
        return tf.constant(0.5, tf.float64)


@pytest.mark.parametrize("form", [EarlyCheckpoint, Checkpoint, KerasFile, H5File, Arrays])
@testing_utils.swapped_or_not
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_averages_wider_than_their_variables_keep_every_bit(tmp_path, dtype, swapped, form):
    if dtype == "bfloat16" and form in (KerasFile, H5File, Arrays):
        pytest.skip("neither tf_keras nor NumPy can load bfloat16 weights from files of these formats")

    def new(seed):
        KERAS.utils.set_random_seed(seed)
        model = KERAS.Sequential([KERAS.Input([4]), KERAS.layers.Dense(3, dtype=dtype)])
        model.compile(tfav.ExponentialMovingAverage(KERAS.optimizers.SGD(0.1)), "mse")
        return model

    model = new(1)
    fit_steps(model, STEPS_BEFORE)
    if swapped:
        model.optimizer.swap_weights()
    form.save(model, str(tmp_path))
    resumed = form.resume(new(2), str(tmp_path))
    assert state_of(resumed) == state_of(model)
    if swapped:
        model.optimizer.swap_weights()
        resumed.optimizer.swap_weights()
        assert state_of(resumed) == state_of(model)
    assert resumed.optimizer.get_slot(resumed.layers[0].kernel, "average").dtype == tf.float32


class TestWarnings:
    def test_h5_under_loss_scaling_loses_the_state(self, tmp_path):
        model = new_model(loss_scaling=True)
        fit_steps(model, 3)
        with pytest.warns(UserWarning, match=r"\.h5.*LossScaleOptimizer.*averages.*\.keras"):
            H5File.save(model, str(tmp_path))
        resumed = H5File.resume(model, str(tmp_path))
        testing_utils.assert_same_bits(resumed.get_weights(), model.get_weights())

    def test_h5_does_not_keep_a_list(self, tmp_path):
        model = new_model()
        model.optimizer.shadow_copy([model.get_layer("layer1").kernel])
        fit_steps(model, 3)
        with pytest.warns(UserWarning, match=r"\.h5.*shadow_copy.*\.keras"):
            H5File.save(model, str(tmp_path))

    @pytest.mark.parametrize("swapped", [False, True])
    def test_saved_model_loses_the_state(self, tmp_path, swapped):
        model = new_model()
        fit_steps(model, 3)
        if swapped:
            model.optimizer.swap_weights()
        advice = "holds the averaged weights" if swapped else "inside `with optimizer.swapped_weights"
        with pytest.warns(UserWarning, match=f"no state of the optimizer.*{advice}"):
            model.save(str(tmp_path / "model"), save_format="tf")

    def trained_with_batch_norm(self):
        model = testing_utils.new_model(tfav.SWA(CURRENT.SGD(0.1), 0, 1), batch_norm=True)
        fit_steps(model, 3)
        return model

    def test_statistics_are_lost_unless_the_averages_are_in_the_file(self, tmp_path):
        model = self.trained_with_batch_norm()
        with model.optimizer.swapped_weights():
            tfav.update_batch_norm(model, testing_utils.X, verbose=0)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                KerasFile.save(model, str(tmp_path))
        with pytest.warns(UserWarning, match="Statistics that were recomputed.*save inside"):
            KerasFile.save(model, str(tmp_path))

    def test_statistics_go_stale_with_the_next_update(self):
        model = self.trained_with_batch_norm()
        with model.optimizer.swapped_weights():
            tfav.update_batch_norm(model, testing_utils.X, verbose=0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with model.optimizer.swapped_weights():
                pass
        fit_steps(model, 1)
        with pytest.warns(UserWarning, match="averages with 3 updates, and the averages hold 4"):
            model.optimizer.swap_weights()
        tfav.update_batch_norm(model, testing_utils.X, verbose=0)
        model.optimizer.swap_weights()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.optimizer.swap_weights()

    @pytest.mark.parametrize("form", [Checkpoint, KerasFile, H5File, Weights, Arrays])
    def test_there_is_none_where_nothing_is_lost(self, tmp_path, form):
        model = new_model()
        fit_steps(model, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "You are saving your model as an HDF5 file")
            form.save(model, str(tmp_path))
            form.resume(new_model(), str(tmp_path))


class NotRegistered:
    def __call__(self, step):
        return 0.1 / (1.0 + tf.cast(step, tf.float32))

    def get_config(self):
        return {}


@pytest.mark.parametrize("generation", MODULES)
def test_schedule_that_is_not_registered(tmp_path, generation):
    """Only a config names it, and a checkpoint restores into an optimizer that is there."""
    base = {"keras3": keras_3}.get(generation, KERAS).optimizers.schedules.LearningRateSchedule
    schedule = type("NotRegistered", (NotRegistered, base), {})

    def trained(steps):
        variable = tf.Variable([1.0, 2.0])
        optimizer = tfav.SWA(MODULES[generation].SGD(schedule(), momentum=0.9), 1, 2)
        testing_utils.descend(optimizer, [variable], steps=steps)
        return variable, optimizer

    variable, optimizer = trained(STEPS_BEFORE)
    path = tf.train.Checkpoint(variable=variable, optimizer=optimizer).save(tmp_path / "checkpoint")
    restored, other = trained(1)
    tf.train.Checkpoint(variable=restored, optimizer=other).restore(path).assert_consumed()
    for one, its in ((optimizer, variable), (other, restored)):
        testing_utils.descend(one, [its], steps=STEPS_AFTER)
    assert other.num_averaged == optimizer.num_averaged > 0
    assert bits(restored) == bits(variable)
    assert bits(other.get_average(restored)) == bits(optimizer.get_average(variable))


class TestNested:
    """An averaging optimizer around another one: both keep their counts, averages and flags."""

    ORDERS = {
        "SWA of EMA": lambda inner: tfav.SWA(tfav.ExponentialMovingAverage(inner), 1, 2),
        "EMA of SWA": lambda inner: tfav.ExponentialMovingAverage(
            tfav.SWA(inner, 0, 1), start_step=1, average_period=2
        ),
    }

    def both(self, model):
        outer = averaging(model.optimizer)
        return outer, outer.inner_optimizer

    def state_of(self, model):
        return [
            [
                int(optimizer.num_averaged),
                optimizer.weights_swapped,
                *bits(optimizer.get_average(variable) for variable in model.trainable_variables),
            ]
            for optimizer in self.both(model)
        ]

    FORMS = [EarlyCheckpoint, Checkpoint, KerasFile, Arrays]

    @pytest.mark.parametrize(
        ("order", "module", "swapped", "loss_scaling", "form"),
        [
            *(("SWA of EMA", CURRENT, None, False, form) for form in [*FORMS, H5File, Weights]),
            *(("SWA of EMA", LEGACY, 0, True, form) for form in [*FORMS, Weights]),
            *(("SWA of EMA", keras_3.optimizers, 0, True, form) for form in FORMS),
            *(("EMA of SWA", CURRENT, 1, True, form) for form in [*FORMS, Weights]),
            *(("EMA of SWA", LEGACY, None, False, form) for form in [*FORMS, H5File, Weights]),
            *(("EMA of SWA", keras_3.optimizers, 1, False, form) for form in FORMS),
        ],
    )
    def test_all_state_is_kept(self, tmp_path, form, order, module, swapped, loss_scaling):
        def new(seed):
            optimizer = self.ORDERS[order](module.Adam(0.1))
            keras = testing_utils.keras_of(module)
            return testing_utils.new_model(optimizer, loss_scaling=loss_scaling, seed=seed, keras=keras)

        model = new(1)
        fit_steps(model, 6)
        if swapped is not None:
            self.both(model)[swapped].swap_weights()
        form.save(model, str(tmp_path))
        resumed = form.resume(new(2), str(tmp_path))
        for _ in range(2):
            assert self.state_of(resumed) == self.state_of(model)
            testing_utils.assert_same_bits(resumed.get_weights(), model.get_weights())
            if swapped is not None and self.both(model)[swapped].weights_swapped:
                self.both(model)[swapped].swap_weights()
                self.both(resumed)[swapped].swap_weights()
            fit_steps(model, 5)
            fit_steps(resumed, 5)


@pytest.mark.parametrize(
    ("keras", "form"),
    [
        *((KERAS, form) for form in [EarlyCheckpoint, Checkpoint, WeightsOfNewFormat, Weights]),
        *((keras_3, form) for form in [EarlyCheckpoint, WeightsOfNewFormat]),
    ],
)
def test_file_of_another_scheme_is_restored_with_a_warning(tmp_path, keras, form):
    def new(scheme, seed):
        return testing_utils.new_model(scheme(keras.optimizers.SGD(0.1)), seed=seed, keras=keras)

    model = new(tfav.ExponentialMovingAverage, 1)
    fit_steps(model, 4)
    form.save(model, str(tmp_path))
    with pytest.warns(
        UserWarning, match="kept by ExponentialMovingAverage.*those of SWA.*reset_averages"
    ):
        other = form.resume(new(tfav.SWA, 2), str(tmp_path))
    assert other.optimizer.num_averaged == 4
    testing_utils.assert_same_bits(
        testing_utils.averages_of(other.optimizer, other.trainable_variables),
        testing_utils.averages_of(model.optimizer, model.trainable_variables),
    )
