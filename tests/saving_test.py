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

    @classmethod
    def save(cls, model, path):
        checkpoint_of(model).save(path + "/ckpt")

    @classmethod
    def resume(cls, model, path):
        if not cls.early:
            train(model, 1)
        status = checkpoint_of(model).restore(tf.train.latest_checkpoint(path))
        if not cls.early:
            status.assert_consumed()
        return model


class EarlyCheckpoint(Checkpoint):
    """The same, restored before the optimizer has any variables."""

    early = True


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
    Arrays,
]


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
            for form in FORMATS:
                (path / form.__name__).mkdir()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    form.save(model, str(path / form.__name__))
            train(model, STEPS_AFTER)
            made[key] = strategies[strategy_name], path, saved, state_of(model, with_statistics)
        return made[key]

    return get


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("loss_scaling", [False, True], ids=["", "loss_scaling"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("strategy_name", ["default", "mirrored"])
def test_resumes_exactly(references, strategy_name, generation, scheme, loss_scaling, form):
    strategy, path, saved, ended = references(strategy_name, generation, scheme, loss_scaling)
    model = new_model(strategy, generation, scheme, loss_scaling, seed=2)
    with_statistics = strategy_name == "default"
    loses = {"loss_scale"} if form is Arrays else set()
    if form is H5File and loss_scaling:
        loses = {"optimizer", "averages", "loss_scale"}  # tf_keras cannot load them; saving warns.
    model = form.resume(model, str(path / form.__name__))

    resumed = state_of(model, with_statistics)
    for name in saved.keys() - loses:
        assert resumed[name] == saved[name], name
    if "optimizer" in loses:
        return
    train(model, STEPS_AFTER)
    resumed = state_of(model, with_statistics)
    for name in ended.keys() - loses:
        assert resumed[name] == ended[name], name
