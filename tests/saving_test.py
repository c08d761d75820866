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

import contextlib
import itertools
import warnings

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import tf_averaging as tfav

STEPS_BEFORE, STEPS_AFTER = 7, 20
BATCH = 8
X = np.random.default_rng(0).normal(size=(STEPS_AFTER * BATCH, 4)).astype(np.float32)
Y = X[:, :1] - 2.0 * X[:, 1:2]

GENERATIONS = {"current": tf_keras.optimizers, "legacy": tf_keras.optimizers.legacy}
SCHEMES = {
    "swa": lambda inner, **options: tfav.SWA(inner, 2, 3, **options),
    "ema": lambda inner, **options: tfav.ExponentialMovingAverage(inner, start_step=1, **options),
}


def averaging(optimizer):
    """The averaging optimizer in `optimizer`, which may be a LossScaleOptimizer around it."""
    return (
        optimizer if isinstance(optimizer, tfav.AveragedOptimizerWrapper) else optimizer.inner_optimizer
    )


def new_model(strategy, generation, scheme, loss_scaling=False, seed=1, **options):
    tf_keras.utils.set_random_seed(seed)
    with strategy.scope():
        model = tf_keras.Sequential(
            [
                tf_keras.layers.Dense(3, activation="relu", input_shape=(4,), name="hidden"),
                tf_keras.layers.BatchNormalization(name="bn"),
                tf_keras.layers.Dense(1, name="out"),
            ]
        )
        optimizer = SCHEMES[scheme](GENERATIONS[generation].Adam(0.01), **options)
        if loss_scaling:
            optimizer = tf_keras.mixed_precision.LossScaleOptimizer(
                optimizer, initial_scale=2.0**10, dynamic_growth_steps=3
            )
        model.compile(optimizer, "mse")
    return model


def train(model, steps):
    rows = slice(0, steps * BATCH)
    model.fit(X[rows], Y[rows], batch_size=BATCH, shuffle=False, verbose=0)


def bits(value):
    value = np.asarray(value)
    return value.dtype, value.shape, value.tobytes()


def state_of(model, with_statistics=True):
    """Weights, everything the optimizer has, and the loss scale, as bytes."""
    variables = model.variables if with_statistics else model.trainable_variables
    optimizer = averaging(model.optimizer)
    state = {"weights": [v.numpy() for v in variables], "optimizer": optimizer.get_weights()}
    state["averages"] = [
        optimizer.get_slot(v, "average").numpy() for v in variables if has_average(optimizer, v)
    ]
    if optimizer is not model.optimizer:
        state["loss_scale"] = [model.optimizer.loss_scale, model.optimizer.dynamic_counter]
    return {name: [bits(value) for value in values] for name, values in state.items()}


def weights_of(model, with_statistics):
    variables = model.variables if with_statistics else model.trainable_variables
    return {"weights": [bits(v.numpy()) for v in variables]}


def has_average(optimizer, variable):
    try:
        return optimizer.get_slot(variable, "average") is not None
    except KeyError:
        return False


def checkpoint_of(model):
    return tf.train.Checkpoint(model=model, optimizer=model.optimizer)


class Checkpoint:
    """`tf.train.Checkpoint`, restored into an optimizer that has taken steps already."""

    early = False

    @staticmethod
    def prepare(model):
        train(model, 1)

    @classmethod
    def save(cls, model, path):
        checkpoint_of(model).save(path + "/ckpt")

    @classmethod
    def resume(cls, model, path):
        cls.prepare(model)
        status = checkpoint_of(model).restore(tf.train.latest_checkpoint(path))
        if not cls.early:
            status.assert_consumed()
        return model


class EarlyCheckpoint(Checkpoint):
    """The same, restored before the optimizer has any variables."""

    early = True

    @staticmethod
    def prepare(model):
        pass


class CheckpointOfOtherValues(Checkpoint):
    """The same, restored when all variables exist and hold something else; quicker than to train."""

    @staticmethod
    def prepare(model):
        optimizer = averaging(model.optimizer)
        with model.distribute_strategy.scope():
            optimizer.build(model.trainable_variables)
        arrays = optimizer.get_weights()
        optimizer.set_weights([array if array.dtype == bool else array + 1 for array in arrays])


class AsyncCheckpoint:
    @staticmethod
    def save(model, path):
        checkpoint = checkpoint_of(model)
        options = tf.train.CheckpointOptions(enable_async=True)
        checkpoint.save(path + "/ckpt", options=options)
        checkpoint.sync()

    resume = EarlyCheckpoint.resume


class Manager:
    @staticmethod
    def save(model, path):
        tf.train.CheckpointManager(checkpoint_of(model), path, max_to_keep=1).save()

    @staticmethod
    def resume(model, path):
        with model.distribute_strategy.scope():
            manager = tf.train.CheckpointManager(checkpoint_of(model), path, max_to_keep=1)
            assert manager.restore_or_initialize()
        return model


class KerasFile:
    name = "/model.keras"

    @classmethod
    def save(cls, model, path):
        model.save(path + cls.name)

    @classmethod
    def resume(cls, model, path):
        with model.distribute_strategy.scope():
            return tf_keras.models.load_model(path + cls.name)


class H5File(KerasFile):
    name = "/model.h5"


class Weights:
    """`save_weights` in TensorFlow's format, which takes the optimizer along."""

    name = "/weights"

    @classmethod
    def save(cls, model, path):
        model.save_weights(path + cls.name)

    @classmethod
    def resume(cls, model, path):
        model.load_weights(path + cls.name)
        return model


class WeightsOfNewFormat(Weights):
    """`save_weights` in the format of `.keras`."""

    name = "/x.weights.h5"

    @classmethod
    def resume(cls, model, path):
        with model.distribute_strategy.scope():
            averaging(model.optimizer).build(model.trainable_variables)
        return super().resume(model, path)


class ModelCheckpoint(KerasFile):
    """The callback, which saves whole models."""

    @classmethod
    def save(cls, model, path):
        saver = tf_keras.callbacks.ModelCheckpoint(path + cls.name)
        saver.set_model(model)
        saver.on_epoch_end(0)


class ModelCheckpointOfWeights(Weights):
    """The callback, which saves weights in TensorFlow's format."""

    @classmethod
    def save(cls, model, path):
        saver = tf_keras.callbacks.ModelCheckpoint(path + cls.name, save_weights_only=True)
        saver.set_model(model)
        saver.on_epoch_end(0)


class Backup:
    """`BackupAndRestore`, called as `fit` does."""

    @staticmethod
    def save(model, path):
        with in_training(
            tf_keras.callbacks.BackupAndRestore(path, delete_checkpoint=False), model
        ) as saver:
            saver.on_epoch_begin(0)
            saver.on_epoch_end(0)

    @staticmethod
    def resume(model, path):
        with in_training(tf_keras.callbacks.BackupAndRestore(path, delete_checkpoint=False), model):
            return model


@contextlib.contextmanager
def in_training(backup, model):
    backup.set_model(model)
    with model.distribute_strategy.scope():
        backup.on_train_begin()
        yield backup
        backup.on_train_end()
    model._training_state = None  # The callback has deleted it, and the next `fit` asks for it.


class SavedModel(KerasFile):
    """A directory, in which tf_keras keeps nothing of the optimizer."""

    name = "/model"

    @classmethod
    def save(cls, model, path):
        with pytest.warns(UserWarning, match=r"SavedModel .*averages.*\.keras"):
            model.save(path + cls.name, save_format="tf")


class Arrays:
    @staticmethod
    def save(model, path):
        arrays = [*model.get_weights(), *averaging(model.optimizer).get_weights()]
        np.savez(path + "/arrays.npz", *arrays)

    @staticmethod
    def resume(model, path):
        with np.load(path + "/arrays.npz") as file:
            arrays = [file[name] for name in file.files]
        split = len(model.weights)
        model.set_weights(arrays[:split])
        with model.distribute_strategy.scope():
            averaging(model.optimizer).build(model.trainable_variables)
        averaging(model.optimizer).set_weights(arrays[split:])
        return model


FORMATS = [
    Checkpoint,
    EarlyCheckpoint,
    AsyncCheckpoint,
    Manager,
    KerasFile,
    H5File,
    Weights,
    WeightsOfNewFormat,
    ModelCheckpoint,
    ModelCheckpointOfWeights,
    Backup,
    SavedModel,
    Arrays,
]


# (strategy, generation, scheme, loss scaling): half of all, in which any three of them meet in every way.
# No code asks for all four: what is saved does not depend on the scheme.
COMBINATIONS = [
    (strategy, generation, scheme, loss_scaling)
    for strategy, generation, scheme, loss_scaling in itertools.product(
        ["default", "mirrored"], GENERATIONS, SCHEMES, [False, True]
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
            train(model, STEPS_BEFORE)
            with_statistics = strategy_name == "default"
            saved = state_of(model, with_statistics)
            for name in ("not swapped", "swapped"):
                for form in FORMATS:
                    directory = path / name / form.__name__
                    directory.mkdir(parents=True)
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        form.save(model, str(directory))
                averaging(model.optimizer).swap_weights()
            train(model, STEPS_AFTER)
            made[key] = strategies[strategy_name], path, saved, state_of(model, with_statistics)
        return made[key]

    return get


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.__name__)
@each_combination()
class TestMatrix:
    def test_resumes_exactly(self, references, strategy_name, generation, scheme, loss_scaling, form):
        strategy, path, saved, ended = references(strategy_name, generation, scheme, loss_scaling)
        model = new_model(strategy, generation, scheme, loss_scaling, seed=2)
        with_statistics = strategy_name == "default"
        loses = lost(form, loss_scaling)
        model = form.resume(model, str(path / "not swapped" / form.__name__))

        get_state = weights_of if "optimizer" in loses else state_of
        resumed = get_state(model, with_statistics)
        for name in saved.keys() - loses:
            assert resumed[name] == saved[name], name
        if "optimizer" in loses:
            return
        train(model, STEPS_AFTER)
        resumed = state_of(model, with_statistics)
        for name in ended.keys() - loses:
            assert resumed[name] == ended[name], name

    def test_saved_while_swapped_is_resumed_swapped(
        self, references, strategy_name, generation, scheme, loss_scaling, form
    ):
        loses = lost(form, loss_scaling)
        if "optimizer" in loses:
            pytest.skip("tf_keras keeps nothing of the optimizer")
        strategy, path, saved, _ = references(strategy_name, generation, scheme, loss_scaling)
        model = new_model(strategy, generation, scheme, loss_scaling, seed=2)
        resume = CheckpointOfOtherValues.resume if form is Checkpoint else form.resume
        model = resume(model, str(path / "swapped" / form.__name__))
        optimizer = averaging(model.optimizer)
        assert optimizer.weights_swapped
        optimizer.swap_weights()
        resumed = state_of(model, with_statistics=strategy_name == "default")
        for name in saved.keys() - loses:
            assert resumed[name] == saved[name], name


def lost(form, loss_scaling):
    """What a format does not keep; saving warns."""
    if form is SavedModel or (form is H5File and loss_scaling):
        return {"optimizer", "averages", "loss_scale"}
    return {"loss_scale"} if form is Arrays else set()


@pytest.mark.parametrize("form", [EarlyCheckpoint, KerasFile], ids=lambda form: form.__name__)
@each_combination(generation="current")
def test_step_on_what_was_saved_while_swapped_is_an_error(
    references, strategy_name, generation, scheme, loss_scaling, form
):
    strategy, path, saved, _ = references(strategy_name, generation, scheme, loss_scaling)
    model = new_model(strategy, generation, scheme, loss_scaling, seed=2)
    model = form.resume(model, str(path / "swapped" / form.__name__))
    with pytest.raises(tf.errors.InvalidArgumentError, match="call_swap_weights|swap_weights"):
        train(model, 1)
    averaging(model.optimizer).swap_weights()
    assert state_of(model, with_statistics=False)["averages"] == saved["averages"]
    train(model, 1)


@each_combination(strategy_name="default")
def test_all_of_an_early_restored_checkpoint_is_consumed(
    references, strategy_name, generation, scheme, loss_scaling
):
    strategy, path, _, _ = references(strategy_name, generation, scheme, loss_scaling)
    model = new_model(strategy, generation, scheme, loss_scaling, seed=2)
    file = tf.train.latest_checkpoint(str(path / "not swapped" / "Checkpoint"))
    status = checkpoint_of(model).restore(file)
    train(model, 1)
    status.assert_consumed()


@pytest.mark.parametrize("loss_scaling", [False, True], ids=["", "loss_scaling"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_model_that_is_built_by_its_first_batch(tmp_path, generation, loss_scaling):
    """Neither weights nor anything of the optimizer exists when the checkpoint is restored."""

    def new(seed):
        tf_keras.utils.set_random_seed(seed)
        layers = [
            tf_keras.layers.Dense(3),
            tf_keras.layers.BatchNormalization(),
            tf_keras.layers.Dense(1),
        ]
        model = tf_keras.Sequential(layers)
        optimizer = SCHEMES["swa"](GENERATIONS[generation].Adam(0.01))
        model.compile(
            tf_keras.mixed_precision.LossScaleOptimizer(optimizer) if loss_scaling else optimizer, "mse"
        )
        return model

    model = new(1)
    train(model, STEPS_BEFORE)
    path = checkpoint_of(model).save(str(tmp_path / "ckpt"))
    resumed = new(2)
    status = checkpoint_of(resumed).restore(path)
    train(model, STEPS_AFTER)
    train(resumed, STEPS_AFTER)
    status.assert_consumed()
    assert state_of(resumed) == state_of(model)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_training_goes_on_during_an_asynchronous_save(tmp_path, generation):
    model = new_model(tf.distribute.get_strategy(), generation, "ema")
    train(model, STEPS_BEFORE)
    checkpoint = checkpoint_of(model)
    options = tf.train.CheckpointOptions(enable_async=True)
    saved = []
    for _ in range(3):
        saved.append(state_of(model))
        checkpoint.save(str(tmp_path / "ckpt"), options=options)
        train(model, 2)
    checkpoint.sync()
    for number, state in enumerate(saved, start=1):
        resumed = new_model(tf.distribute.get_strategy(), generation, "ema", seed=2)
        checkpoint_of(resumed).restore(str(tmp_path / f"ckpt-{number}"))
        assert state_of(resumed) == state


@pytest.mark.parametrize("swap_first", [True, False], ids=["swap first", "backup first"])
def test_callbacks_resume_what_was_saved_while_swapped(tmp_path, swap_first):
    """`BackupAndRestore` restores when the other callbacks' `on_train_begin` may be over."""

    def fit(model, epochs):
        swap = tfav.callbacks.SwapAverageWeights(swap_on_epoch=True)
        backup = tf_keras.callbacks.BackupAndRestore(str(tmp_path), delete_checkpoint=False)
        saved = tf_keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: swapped.append(model.optimizer.weights_swapped)
        )
        model.fit(
            X,
            Y,
            batch_size=40,
            epochs=epochs,
            shuffle=False,
            verbose=0,
            callbacks=[swap, backup, saved] if swap_first else [backup, saved, swap],
        )
        if model.optimizer.weights_swapped:
            model.optimizer.swap_weights()

    swapped = []
    first = new_model(tf.distribute.get_strategy(), "current", "swa")
    fit(first, 2)
    assert swapped == [swap_first] * 2
    resumed = new_model(tf.distribute.get_strategy(), "current", "swa", seed=2)
    fit(resumed, 4)
    reference = new_model(tf.distribute.get_strategy(), "current", "swa")
    reference.fit(X, Y, batch_size=40, epochs=4, shuffle=False, verbose=0)
    assert state_of(resumed) == state_of(reference)


class TestAveragesOfOtherVariables:
    """Statistics of BatchNormalization, say, which `load_model` does not know when it loads."""

    @pytest.mark.parametrize("form", [EarlyCheckpoint, Checkpoint, KerasFile, H5File])
    @pytest.mark.parametrize("loss_scaling", [False, True], ids=["", "loss_scaling"])
    @pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
    def test_of_all_variables(self, tmp_path, form, loss_scaling, swapped):
        if form is H5File and loss_scaling:
            pytest.skip("tf_keras cannot load the optimizer's state")

        def new(seed):
            strategy = tf.distribute.get_strategy()
            options = {"trainable_weights_only": False}
            return new_model(strategy, "current", "swa", loss_scaling, seed, **options)

        model = new(1)
        averaging(model.optimizer).shadow_copy(model)
        train(model, STEPS_BEFORE)
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
                    train(resumed, 1)
        optimizer.shadow_copy(resumed)
        assert state_of(resumed) == state_of(model)
        assert optimizer.weights_swapped == swapped
        if swapped:
            averaging(model.optimizer).swap_weights()
            optimizer.swap_weights()
        train(model, 5)
        train(resumed, 5)
        assert state_of(resumed) == state_of(model)

    @pytest.mark.parametrize("form", [EarlyCheckpoint, KerasFile])
    @pytest.mark.parametrize("others", [False, True], ids=["trained", "others too"])
    def test_of_a_list(self, tmp_path, form, others):
        def chosen(model):
            other = [model.get_layer("bn").moving_mean] if others else []
            return [model.get_layer("out").kernel, *other]

        model = new_model(tf.distribute.get_strategy(), "legacy", "swa")
        model.optimizer.shadow_copy(chosen(model))
        train(model, STEPS_BEFORE)
        form.save(model, str(tmp_path))
        fresh = new_model(tf.distribute.get_strategy(), "legacy", "swa", seed=2)
        if form is EarlyCheckpoint:
            fresh.optimizer.shadow_copy(chosen(fresh))
        resumed = form.resume(fresh, str(tmp_path))
        if others and form is KerasFile:
            with pytest.raises(ValueError, match="shadow_copy"):
                train(resumed, 1)
            resumed.optimizer.shadow_copy(chosen(resumed))
        train(model, 5)
        train(resumed, 5)
        assert len(state_of(resumed)["averages"]) == 1 + others
        assert state_of(resumed) == state_of(model)

    def test_that_do_not_fit_are_dropped_with_a_warning(self, tmp_path):
        model = new_model(tf.distribute.get_strategy(), "current", "swa", trainable_weights_only=False)
        model.optimizer.shadow_copy(model)
        train(model, STEPS_BEFORE)
        KerasFile.save(model, str(tmp_path))
        loaded = KerasFile.resume(model, str(tmp_path))
        another = tf_keras.layers.BatchNormalization()
        another.build([None, 7])
        with pytest.warns(UserWarning, match="do not fit"):
            loaded.optimizer.shadow_copy(another)


@pytest.mark.parametrize("form", [KerasFile, H5File, Arrays, WeightsOfNewFormat])
@each_combination(loss_scaling=False)
def test_restored_early_then_saved_in_another_format(
    references, tmp_path, strategy_name, generation, scheme, loss_scaling, form
):
    strategy, path, saved, _ = references(strategy_name, generation, scheme, loss_scaling)
    model = EarlyCheckpoint.resume(
        new_model(strategy, generation, scheme, seed=2), str(path / "not swapped" / "EarlyCheckpoint")
    )
    form.save(model, str(tmp_path))
    model = form.resume(new_model(strategy, generation, scheme, seed=3), str(tmp_path))
    assert state_of(model, strategy_name == "default") == saved


@pytest.mark.parametrize("form", [KerasFile, H5File, Checkpoint])
def test_variables_of_a_subclass_are_saved(tmp_path, form):
    model = new_model(tf.distribute.get_strategy(), "current", "swa")
    with tf_keras.saving.custom_object_scope({"Counting": Counting}):
        model.compile(Counting("sgd"), "mse")
        train(model, 3)
        model.optimizer.seen.assign(7)
        form.save(model, str(tmp_path))
        fresh = new_model(tf.distribute.get_strategy(), "current", "swa")
        fresh.compile(Counting("sgd"), "mse")
        resumed = form.resume(fresh, str(tmp_path))
    assert resumed.optimizer.seen.numpy() == 7
    assert state_of(resumed) == state_of(model)


class Counting(tfav.AveragedOptimizerWrapper):
    """A scheme with a variable of its own."""

    def __init__(self, optimizer, **options):
        super().__init__(optimizer, **options)
        self.seen = self.add_variable([], tf.int64, name="seen")

    def averaging_weight(self, step):
        return tf.constant(0.5, tf.float64)


@pytest.mark.parametrize("form", [EarlyCheckpoint, Checkpoint, KerasFile, H5File, Arrays])
@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_averages_wider_than_their_variables_keep_every_bit(tmp_path, dtype, swapped, form):
    if dtype == "bfloat16" and form in (KerasFile, H5File, Arrays):
        pytest.skip("neither tf_keras nor NumPy can load bfloat16 weights from files of these formats")

    def new(seed):
        tf_keras.utils.set_random_seed(seed)
        model = tf_keras.Sequential([tf_keras.layers.Dense(3, input_shape=(4,), dtype=dtype)])
        model.compile(tfav.ExponentialMovingAverage(tf_keras.optimizers.SGD(0.1)), "mse")
        return model

    model = new(1)
    train(model, STEPS_BEFORE)
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
        model = new_model(tf.distribute.get_strategy(), "current", "swa", loss_scaling=True)
        train(model, 3)
        with pytest.warns(UserWarning, match=r"\.h5.*LossScaleOptimizer.*averages.*\.keras"):
            H5File.save(model, str(tmp_path))
        resumed = H5File.resume(model, str(tmp_path))
        for a, b in zip(resumed.get_weights(), model.get_weights()):
            np.testing.assert_array_equal(a, b)

    def test_h5_does_not_keep_a_list(self, tmp_path):
        model = new_model(tf.distribute.get_strategy(), "current", "swa")
        model.optimizer.shadow_copy([model.get_layer("out").kernel])
        train(model, 3)
        with pytest.warns(UserWarning, match=r"\.h5.*shadow_copy.*\.keras"):
            H5File.save(model, str(tmp_path))

    @pytest.mark.parametrize("form", [Checkpoint, KerasFile, H5File, Weights, Arrays])
    def test_there_is_none_where_nothing_is_lost(self, tmp_path, form):
        model = new_model(tf.distribute.get_strategy(), "current", "swa")
        train(model, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "You are saving your model as an HDF5 file")
            form.save(model, str(tmp_path))
            form.resume(new_model(tf.distribute.get_strategy(), "current", "swa"), str(tmp_path))


class TestChangedModels:
    @staticmethod
    def model_of(units, generation):
        """Dense layers of these widths, which are their names' numbers."""
        layers = [tf_keras.layers.Dense(u, name=f"dense{u}") for u in units]
        model = tf_keras.Sequential([tf_keras.layers.InputLayer((4,)), *layers])
        model.compile(tfav.SWA(GENERATIONS[generation].SGD(0.01, momentum=0.9), 0, 1), "mse")
        return model

    @pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
    def test_checkpoint_restores_what_matches(self, tmp_path, late):
        model = self.model_of([3, 1], "legacy")
        train(model, 4)
        path = checkpoint_of(model).save(str(tmp_path / "ckpt"))
        grown = self.model_of([3, 2], "legacy")
        grown.layers[0]._name = "dense3"
        if late:
            train(grown, 3)
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
        train(grown, 2)

    @pytest.mark.parametrize("generation", GENERATIONS)
    @pytest.mark.parametrize("form", [KerasFile, WeightsOfNewFormat, Arrays])
    def test_arrays_that_do_not_fit_change_nothing(self, tmp_path, generation, form):
        model = self.model_of([3, 2], generation)
        train(model, 4)
        state = model.optimizer.get_weights()
        grown = self.model_of([3, 2, 1], generation)
        train(grown, 3)
        before = state_of(grown)
        if form is Arrays:
            with pytest.raises(ValueError, match="Expected"):
                grown.optimizer.set_weights(state)
        else:
            form.save(grown, str(tmp_path))
            path = str(tmp_path) + form.name
            with pytest.warns(UserWarning, match="not loaded"):
                model.load_weights(path, skip_mismatch=True)
            for a, b in zip(model.optimizer.get_weights(), state):
                np.testing.assert_array_equal(a, b)
        assert state_of(grown) == before

    @pytest.mark.parametrize("loss_scaling", [False, True], ids=["", "loss_scaling"])
    def test_file_of_a_plain_optimizer(self, tmp_path, loss_scaling):
        scaled = tf_keras.mixed_precision.LossScaleOptimizer if loss_scaling else lambda inner: inner
        plain = self.model_of([3, 1], "current")
        plain.compile(scaled(tf_keras.optimizers.SGD(0.01, momentum=0.9)), "mse")
        train(plain, 3)
        plain.save(str(tmp_path / "model.keras"))
        model = self.model_of([3, 1], "current")
        optimizer = model.optimizer
        model.compile(scaled(optimizer), "mse")
        train(model, 5)
        with pytest.warns(UserWarning, match="without averages"):
            model.load_weights(str(tmp_path / "model.keras"))
        assert (optimizer.iterations, optimizer.num_averaged) == (3, 0)
        train(plain, 2)
        train(model, 2)
        for a, b in zip(model.get_weights(), plain.get_weights()):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.parametrize("generation", GENERATIONS)
    def test_h5_gives_another_model_no_state(self, tmp_path, generation):
        """tf_keras refuses its weights, or loads by name those that fit, and never asks the optimizer."""
        model = self.model_of([3, 2], generation)
        train(model, 4)
        path = str(tmp_path / "model.h5")
        model.save(path)
        other = self.model_of([3, 2, 1], generation)
        train(other, 3)
        before = state_of(other)
        with pytest.raises(ValueError, match="layer"):
            other.load_weights(path)
        assert state_of(other) == before
        other.load_weights(path, by_name=True)
        np.testing.assert_array_equal(other.layers[0].kernel, model.layers[0].kernel)
        assert state_of(other)["optimizer"] == before["optimizer"]
        train(other, 1)

    def test_file_without_an_optimizer(self):
        model = self.model_of([1], "current")
        train(model, 5)
        before = state_of(model)
        with pytest.warns(UserWarning, match="no state"):
            model.optimizer.load_own_variables({})
        assert state_of(model) == before

    def test_restore_of_a_checkpoint_from_before_the_first_step(self, tmp_path):
        """It has no averages yet, and those of steps taken since must not stay."""
        model = self.model_of([3, 1], "current")
        path = checkpoint_of(model).save(str(tmp_path / "ckpt"))
        train(model, 4)
        checkpoint_of(model).restore(path)
        assert model.optimizer.num_averaged == 0
        with model.optimizer.swapped_weights():
            averages = model.get_weights()
        for a, b in zip(averages, model.get_weights()):
            np.testing.assert_array_equal(a, b)

    def test_early_save_does_not_fix_what_is_saved_later(self, tmp_path):
        model = self.model_of([3, 1], "current")
        checkpoint = checkpoint_of(model)
        checkpoint.save(str(tmp_path / "ckpt"))
        train(model, 4)
        path = checkpoint.save(str(tmp_path / "ckpt"))
        resumed = self.model_of([3, 1], "current")
        checkpoint_of(resumed).restore(path)
        train(model, 4)
        train(resumed, 4)
        assert state_of(resumed) == state_of(model)
