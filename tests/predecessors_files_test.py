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
"""Checkpoints of the predecessors of this package, and of optimizers without averages, restore."""

import pathlib
import warnings

import numpy as np
import pytest
import tensorflow as tf

import tf_averaging as tfav
from tests import testing_utils
from tests.file_formats import checkpoint_of
from tests.testing_utils import CURRENT
from tests.testing_utils import LEGACY
from tests.testing_utils import assert_same_bits
from tests.testing_utils import average_of
from tests.testing_utils import both_generations
from tests.testing_utils import early_or_late
from tests.testing_utils import values
from tests.testing_utils import with_loss_scaling

EMA, SWA = tfav.ExponentialMovingAverage, tfav.SWA
TESTDATA = pathlib.Path(__file__).parent / "testdata"
CHECKPOINTS = {
    "tfa_moving_average_adam": lambda module: EMA(module.Adam()),
    "tfa_swa_sgd_momentum": lambda module: SWA(module.SGD(momentum=0.9), 2, 3),
    "tfm_ema_adam": lambda module: EMA(module.Adam()),
}
LAYERS = {"hidden": "layer0", "bn": "bn", "out": "layer1"}  # Their names in the files, and here.


def new_model(optimizer, loss_scaling=False, strategy=None):
    options = {"units": (4, 1), "inputs": 3, "batch_norm": True}
    return testing_utils.new_model(optimizer, loss_scaling=loss_scaling, strategy=strategy, **options)


def fit_steps(model, steps):
    testing_utils.fit_steps(model, steps, inputs=3)


def restore(model, name):
    return checkpoint_of(model).restore(str(TESTDATA / name / "ckpt"))


def save(model, path):
    return checkpoint_of(model).save(str(path / "ckpt"))


def assert_holds(model, optimizer, name, but=()):
    """What `expected.npz` has, without the slots of some names."""
    with np.load(TESTDATA / name / "expected.npz") as file:
        expected = dict(file)
    assert optimizer.iterations == expected.pop("iterations")
    for key, value in expected.items():
        kind, layer, name = key.split(".")
        if kind not in but:
            variable = getattr(model.get_layer(LAYERS[layer]), name)
            variable = variable if kind == "weight" else optimizer.get_slot(variable, kind)
            np.testing.assert_array_equal(variable.numpy(), value, err_msg=key)


@early_or_late
@with_loss_scaling
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_restores_and_training_goes_on(strategy, name, loss_scaling, late):
    with strategy.scope():
        optimizer = CHECKPOINTS[name](LEGACY)
    model = new_model(optimizer, loss_scaling, strategy)
    if late:
        fit_steps(model, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        status = restore(model, name)
    if not late:
        with strategy.scope():
            optimizer.build(model.trainable_variables)
    assert_holds(model, optimizer, name)
    # The SWA has taken snapshots after steps 2, 5, 8, 11 and 14.
    assert optimizer.num_averaged == (5 if "swa" in name else 16)
    assert not optimizer.weights_swapped

    variable = model.get_layer("layer1").kernel
    average = average_of(optimizer, variable)
    fit_steps(model, 2)
    status.assert_nontrivial_match()
    if "swa" not in name:
        return
    # The sixth snapshot follows after step 17, the second one here.
    expected = average + (variable.numpy().astype(np.float64) - average) / 6
    np.testing.assert_allclose(average_of(optimizer, variable), expected, rtol=1e-5)


@with_loss_scaling
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_current_generation_inside_takes_averages_and_steps_and_warns(name, loss_scaling):
    optimizer = CHECKPOINTS[name](CURRENT)
    model = new_model(optimizer, loss_scaling)
    with pytest.warns(UserWarning, match="legacy"):
        restore(model, name).expect_partial()
    assert_holds(model, optimizer, name, but=("m", "v", "momentum"))
    fit_steps(model, 1)
    assert optimizer.iterations == 17


class OfAddons(LEGACY.Optimizer):
    """Writes checkpoints as `tfa.optimizers.AveragedOptimizerWrapper` does."""

    def __init__(self, inner):
        super().__init__("SWA")
        self._track_trackable(inner, "awg_optimizer")

    def get_config(self):
        return {}


@with_loss_scaling
@early_or_late
def test_swa_without_a_snapshot_yet_starts_from_the_weights_not_from_zeros(tmp_path, late, loss_scaling):
    inner = LEGACY.SGD()
    model = new_model(inner)
    theirs = OfAddons(inner)
    theirs.iterations.assign(2)
    for variable in model.trainable_variables:
        theirs.add_slot(variable, "average")
    path = tf.train.Checkpoint(model=model, optimizer=theirs).save(str(tmp_path / "ckpt"))

    optimizer = SWA(LEGACY.SGD(), 2, 3)
    ours = new_model(optimizer, loss_scaling)
    if late:
        fit_steps(ours, 4)
    checkpoint_of(ours).restore(path)
    assert optimizer.iterations == 2
    assert optimizer.num_averaged == 0
    with optimizer.swapped_weights():
        assert_same_bits(values(ours.trainable_variables), values(model.trainable_variables))


@early_or_late
@pytest.mark.parametrize("average_dtype", [None, "float64"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_slots_load_into_averages_of_another_dtype(tmp_path, dtype, average_dtype, late):
    variable = tf.Variable(tf.constant([1.0, 2.0], dtype))
    theirs = OfAddons(LEGACY.SGD())
    theirs.iterations.assign(5)
    theirs.add_slot(variable, "average", "ones")
    path = tf.train.Checkpoint(optimizer=theirs, variable=variable).save(str(tmp_path / "ckpt"))

    optimizer = SWA(LEGACY.SGD(), average_dtype=average_dtype)
    variable = tf.Variable(tf.zeros([2], dtype))
    if late:
        optimizer.shadow_copy([variable])
    tf.train.Checkpoint(optimizer=optimizer, variable=variable).restore(path)
    average = optimizer.get_slot(variable, "average")
    assert average.dtype == (average_dtype or tf.float32)
    np.testing.assert_array_equal(average.numpy(), [1.0, 1.0])
    assert optimizer.num_averaged == 1
    np.testing.assert_array_equal(variable.numpy(), [1.0, 2.0])


@early_or_late
@with_loss_scaling
@both_generations
def test_plain_optimizer_restores_and_averages_start_from_its_weights(
    tmp_path, module, loss_scaling, late
):
    plain = new_model(module.Adam(0.1))
    fit_steps(plain, 3)
    path = save(plain, tmp_path)

    optimizer = EMA(module.Adam(0.5))
    model = new_model(optimizer, loss_scaling)
    if late:
        fit_steps(model, 5)
        optimizer.swap_weights()
    with pytest.warns(UserWarning, match="without averages"):
        status = checkpoint_of(model).restore(path)
    assert not optimizer.weights_swapped
    assert optimizer.num_averaged == 0
    optimizer.shadow_copy(model)
    assert_same_bits(values(model.trainable_variables), values(plain.trainable_variables))
    with optimizer.swapped_weights():
        assert_same_bits(values(model.trainable_variables), values(plain.trainable_variables))
    fit_steps(plain, 2)
    fit_steps(model, 2)
    status.assert_nontrivial_match()
    assert optimizer.iterations == 5
    assert_same_bits(values(model.variables), values(plain.variables))


@both_generations
def test_checkpoint_with_averages_gives_a_plain_optimizer_its_weights(tmp_path, module):
    model = new_model(SWA(module.Adam(0.1)))
    fit_steps(model, 3)
    path = save(model, tmp_path)
    plain = new_model(module.Adam(0.1))
    checkpoint_of(plain).restore(path).expect_partial()
    assert_same_bits(values(model.variables), values(plain.variables))
    fit_steps(plain, 1)


@early_or_late
@with_loss_scaling
@pytest.mark.parametrize(
    ("name", "optimizer", "message"),
    [
        (
            "tfa_moving_average_adam",
            lambda: EMA(LEGACY.SGD(momentum=0.9)),
            r"the slots \['momentum'\].*Received: \['m', 'v'\]",
        ),
        (
            "tfm_ema_adam",
            lambda: EMA(LEGACY.SGD()),
            r"the slots \[\].*Received: \['m', 'v'\]",
        ),
        (
            "tfa_swa_sgd_momentum",
            lambda: SWA(LEGACY.Adam(), 2, 3),
            r"the slots \['m', 'v'\].*Received: \['momentum'\]",
        ),
        (
            "tfa_swa_sgd_momentum",
            lambda: EMA(LEGACY.SGD(momentum=0.9)),
            "kept by SWA.*Expected those of MovingAverage or ExponentialMovingAverage",
        ),
        (
            "tfa_moving_average_adam",
            lambda: SWA(LEGACY.Adam()),
            "kept by MovingAverage.*Expected those of SWA",
        ),
        (
            "tfm_ema_adam",
            lambda: SWA(LEGACY.Adam()),
            "kept by ExponentialMovingAverage.*Expected those of SWA",
        ),
    ],
)
def test_what_does_not_fit_is_named(name, optimizer, message, loss_scaling, late):
    optimizer = optimizer()
    model = new_model(optimizer, loss_scaling)
    if late:
        fit_steps(model, 1)
    with pytest.warns(UserWarning, match=message) as caught:
        restore(model, name).expect_partial()
    assert len(caught) == 1
    assert_holds(model, optimizer, name, but=("m", "v", "momentum"))
    fit_steps(model, 1)


def test_optimizer_that_cannot_be_made_again_restores(tmp_path):
    """A user's own, without a config: what slots it will have is not known then."""

    class Own(LEGACY.SGD):
        def __init__(self, factor):
            super().__init__(0.1, momentum=0.9)

    plain = new_model(Own(1))
    fit_steps(plain, 1)
    path = save(plain, tmp_path)
    model = new_model(SWA(Own(1)))
    with pytest.warns(UserWarning, match="without averages") as caught:
        checkpoint_of(model).restore(path)
    assert len(caught) == 1
    kernel, expected = (m.get_layer("layer1").kernel for m in (model, plain))
    np.testing.assert_array_equal(
        model.optimizer.get_slot(kernel, "momentum"), plain.optimizer.get_slot(expected, "momentum")
    )
