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
"""Every way to save a model with its optimizer, and what must come back."""

import contextlib

import numpy as np
import pytest
import tensorflow as tf

from tests.testing_utils import averages_of
from tests.testing_utils import averaging
from tests.testing_utils import bits
from tests.testing_utils import fit_steps
from tests.testing_utils import has_average
from tests.testing_utils import values
from tf_averaging import kerases


def state_of(model, with_statistics: bool = True) -> dict:
    """Weights, everything the optimizer has, and the loss scale, as bytes."""
    variables = model.variables if with_statistics else model.trainable_variables
    optimizer = averaging(model.optimizer)
    averaged = [variable for variable in variables if has_average(optimizer, variable)]
    state = {"weights": values(variables), "optimizer": optimizer.get_weights()}
    state["averages"] = averages_of(optimizer, averaged)
    if optimizer is not model.optimizer:
        names = ("loss_scale", "dynamic_counter")
        if keras_of(model).__name__ == "keras":
            build(model)  # Before that Keras 3 has neither.
            names = ("dynamic_scale", "step_counter")
        state["loss_scale"] = [np.asarray(getattr(model.optimizer, name).numpy()) for name in names]
    return {name: bits(arrays) for name, arrays in state.items()}


def keras_of(model):
    return kerases.of_model(model)


def checkpoint_of(model) -> tf.train.Checkpoint:
    return tf.train.Checkpoint(model=model, optimizer=model.optimizer)


def build(model) -> None:
    """Creates all variables of the optimizer."""
    with model.distribute_strategy.scope():
        if keras_of(model).__name__ == "keras":
            if not model.optimizer.built:
                model.optimizer.build(model.trainable_variables)
        else:
            averaging(model.optimizer).build(model.trainable_variables)


class Checkpoint:
    """`tf.train.Checkpoint`, restored into an optimizer that has taken steps already."""

    early = False

    @staticmethod
    def prepare(model):
        fit_steps(model, 1)

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
        build(model)
        optimizer = averaging(model.optimizer)
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
            return keras_of(model).models.load_model(path + cls.name)


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
        build(model)
        return super().resume(model, path)


class ModelCheckpoint(KerasFile):
    """The callback, which saves whole models."""

    options = {}

    @classmethod
    def save(cls, model, path):
        saver = keras_of(model).callbacks.ModelCheckpoint(path + cls.name, **cls.options)
        saver.set_model(model)
        saver.on_epoch_end(0, {})


class ModelCheckpointOfWeights(ModelCheckpoint):
    """The callback, which saves weights in TensorFlow's format."""

    name = Weights.name
    options = {"save_weights_only": True}
    resume = Weights.resume


class Backup:
    """`BackupAndRestore`, called as `fit` does."""

    @staticmethod
    def save(model, path):
        with in_training(model, path) as saver:
            saver.on_epoch_begin(0)
            saver.on_epoch_end(0)

    @staticmethod
    def resume(model, path):
        with in_training(model, path):
            return model


class BackupOfBuilt(Backup):
    """The same with Keras 3, which keeps the optimizer in a `.weights.h5` file."""

    @classmethod
    def resume(cls, model, path):
        build(model)
        return super().resume(model, path)


@contextlib.contextmanager
def in_training(model, path):
    backup = keras_of(model).callbacks.BackupAndRestore(path, delete_checkpoint=False)
    backup.set_model(model)
    with model.distribute_strategy.scope():
        backup.on_train_begin()
        yield backup
        backup.on_train_end()
    model._training_state = None  # The callback has deleted it, and the next `fit` asks for it.
    model._initial_epoch = None  # Keras 3 would begin with the next epoch.


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
        build(model)
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
# In Keras 3. It loads `.weights.h5` files into optimizers that have been built only.
KERAS_3_FORMATS = [
    Checkpoint,
    EarlyCheckpoint,
    CheckpointOfOtherValues,
    AsyncCheckpoint,
    Manager,
    KerasFile,
    WeightsOfNewFormat,
    ModelCheckpoint,
    BackupOfBuilt,
    Arrays,
]


def lost(form, loss_scaling: bool) -> set:
    """What a format does not keep; saving warns."""
    if form is SavedModel or (form is H5File and loss_scaling):
        return {"optimizer", "averages", "loss_scale"}
    return {"loss_scale"} if form is Arrays else set()
