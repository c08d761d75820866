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
"""The migration guide: each line that it gives does what the formula says that the predecessor documents.

The code is the guide's own, taken from its file. The formulas are written down here, in float64 NumPy.
`weights[0]` are the initial weights, `weights[t + 1]` those after step `t`.
"""

import math

import numpy as np
import pytest
import tensorflow as tf

import tf_averaging as tfav
from tests import markdown_code
from tests import numpy_averages
from tests import testing_utils
from tests.testing_utils import CURRENT
from tests.testing_utils import KERAS

GUIDE = markdown_code.ROOT / "docs" / "migration.md"
STEPS = 60
TARGET = np.array([3.0, -2.0, 0.5])
START = np.array([0.0, 1.0, -1.0])


def tfa_swa(weights):
    """A snapshot after step 20 and after every fifth from there on."""
    return np.mean(weights[1:][20::5], axis=0)


def tfa_moving_average(weights, decay=0.9, start_step=4, dynamic_decay=True):
    """`assign_moving_average`, with a decay of 0 before `start_step`."""
    average = weights[0]
    for step, now in enumerate(weights[1:]):
        since_start = step - start_step
        if since_start < 0:
            used = 0.0
        elif dynamic_decay:
            used = min(decay, (1 + since_start) / (10 + since_start))
        else:
            used = decay
        average = average - (1 - used) * (average - now)
    return average


def tfa_moving_average_static(weights):
    return tfa_moving_average(weights, start_step=0, dynamic_decay=False)


def tfm_ema(weights):
    """As documented: the decay starts at 0.1, with the first step that is averaged."""
    return tfa_moving_average(weights)


def ema(weights, decay=0.9):
    """From the first weights on."""
    average = weights[0]
    for now in weights[1:]:
        average = decay * average + (1 - decay) * now
    return average


def torch_swa(weights):
    """The mean of the weights at the end of epochs 3, 4 and 5, of ten steps each."""
    return np.mean([weights[40], weights[50], weights[60]], axis=0)


def torch_ema(weights):
    """The first update, after step 0, copies."""
    return ema(weights[1:], 0.999)


def mmengine_updates(weights, begin_iter=0, interval=1):
    """(number of calls before, weights) for each update of `EMAHook`, whose first call copies."""
    first = max(begin_iter - 1, 0)
    calls = enumerate(weights[1:][first:])
    return [(steps, now) for steps, now in calls if steps % interval == 0]


def mmengine_ema(updates, momentum):
    (_, average), *others = updates
    for steps, now in others:
        average = (1 - momentum(steps)) * average + momentum(steps) * now
    return average


def mmengine(weights):
    return mmengine_ema(mmengine_updates(weights, begin_iter=7), lambda steps: 0.01)


def mmengine_annealing(weights):
    updates = mmengine_updates(weights, interval=3)
    return mmengine_ema(updates, lambda steps: max(0.05, 9 / (9 + steps)))


def mmengine_interval(weights):
    return mmengine_ema(mmengine_updates(weights, interval=3), lambda steps: 0.05)


def mmengine_mean(weights):
    return np.mean([now for _, now in mmengine_updates(weights, begin_iter=7, interval=3)], axis=0)


def timm_ema(weights, after=4):
    """Its counter is 1 after the first step; it copies while the counter is at most one above `after`."""
    average = weights[0]
    for counter, now in enumerate(weights[1:], 1):
        since = counter - after - 1
        decay = min(1 - (1 + since) ** (-2 / 3), 0.99) if since > 0 else 0.0
        average = decay * average + (1 - decay) * now
    return average


# For each pair of blocks in the guide, in its order, what computes the average; None where the block is
# no optimizer, and has a test of its own below.
FORMULAS = [
    ("tfa.optimizers.SWA", tfa_swa),
    ("tfa.optimizers.MovingAverage", tfa_moving_average),
    ("tfa.optimizers.MovingAverage", tfa_moving_average_static),
    ("tfa.callbacks.AverageModelCheckpoint", None),
    ("tfm.optimization.ExponentialMovingAverage", tfm_ema),
    ("Keras use_ema", ema),
    ("Keras use_ema", None),
    ("Keras SwapEMAWeights", None),
    ("PyTorch swa_utils, SWA", torch_swa),
    ("PyTorch swa_utils, EMA", torch_ema),
    ("MMEngine EMAHook", mmengine),
    ("MMEngine EMAHook", mmengine_annealing),
    ("MMEngine EMAHook", mmengine_interval),
    ("MMEngine EMAHook", mmengine_mean),
    ("timm ModelEmaV3", timm_ema),
    ("OpenNMT-tf average_checkpoints", None),
]


def after_blocks():
    """The blocks that replace a block of another library, in the guide's order."""
    blocks = markdown_code.blocks_of(GUIDE)
    pairs = zip(blocks, blocks[1:])
    return [after for before, after in pairs if before.language == "python before"]


def names_of(block):
    """What the guide's first block, which all share, and then this one define."""
    names = {}
    for one in (markdown_code.blocks_of(GUIDE)[0], block):
        exec("\n".join(one.lines), names)
    return names


def after_block(heading, number=0):
    return [block for block in after_blocks() if block.heading == heading][number]


def gradient(weights, step):
    """Of a quadratic, with noise."""
    return (weights - TARGET) + np.random.default_rng(step).normal(size=3)


def train(optimizer):
    """A variable, and all the weights it had."""
    run = testing_utils.train(
        tf.distribute.get_strategy(),
        lambda: optimizer,
        lambda variables, noise: [variables[0] - TARGET + noise],
        [START],
        steps=[np.random.default_rng(step).normal(size=3) for step in range(STEPS)],
        as_function=True,
    )
    return run.variables[0], [weights[0][0] for weights in run.history]


def sgd(learning_rate):
    """Stochastic gradient descent in NumPy: all the weights."""
    weights = [START]
    for step in range(STEPS):
        weights.append(weights[-1] - learning_rate(step) * gradient(weights[-1], step))
    return weights


def test_every_before_has_an_after_that_is_tested():
    blocks = markdown_code.blocks_of(GUIDE)
    befores = [block.heading for block in blocks if block.language == "python before"]
    afters = after_blocks()
    assert [block.language for block in afters] == ["python"] * len(befores)
    assert [block.heading for block in afters] == [heading for heading, _ in FORMULAS] == befores


@pytest.mark.parametrize(
    ("number", "formula"),
    [(number, formula) for number, (_, formula) in enumerate(FORMULAS) if formula],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_averages_are_the_documented_ones(number, formula, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    used = names_of(after_blocks()[number])["optimizer"]
    optimizer = type(used).from_config(used.get_config())  # As new.
    variable, weights = train(optimizer)

    def learning_rate(step):
        return 0.05 + 0.05 * (1 + np.cos(np.pi * np.clip((step - 40) / 20, 0, 1))) / 2

    rates = learning_rate if formula is torch_swa else lambda step: 0.1
    # Keras keeps learning rates in float32.
    np.testing.assert_allclose(weights, sgd(rates), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(optimizer.get_average(variable), formula(weights), rtol=1e-12)


@pytest.mark.parametrize("start_step", [1, 4])
def test_tfm_as_its_code_counts(start_step):
    """It looks at the number of steps after counting the step; before `start_step` it copies."""
    optimizer = tfav.ExponentialMovingAverage(CURRENT.SGD(), average_decay=0.9, start_step=start_step - 1)
    variable, weights = train(optimizer)
    average = np.zeros(3)
    for iterations, now in enumerate(weights[1:], 1):
        since_start = iterations - start_step
        decay = min(0.9, (1 + since_start) / (10 + since_start)) if since_start >= 0 else 0.0
        if iterations == 1 and since_start == 0:
            average = weights[0]  # In place of its zeros.
        average = decay * average + (1 - decay) * now
    np.testing.assert_allclose(optimizer.get_average(variable), average, rtol=1e-12)


def test_keras_3_starts_from_the_first_weights():
    """`momentum = 0` in the first step."""
    optimizer = numpy_averages.ema(0.9, start=1, dynamic=False).wrap(CURRENT.SGD())
    variable, weights = train(optimizer)
    np.testing.assert_allclose(optimizer.get_average(variable), ema(weights[1:]), rtol=1e-12)


def test_num_updates_of_moving_average():
    """A constant decay, `min(decay, (1 + n) / (10 + n))`."""
    decay = min(0.99, (1 + 5) / (10 + 5))
    optimizer = numpy_averages.ema(decay, dynamic=False).wrap(CURRENT.SGD())
    variable, weights = train(optimizer)
    np.testing.assert_allclose(optimizer.get_average(variable), ema(weights, 0.4), rtol=1e-12)


X = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
Y = X @ TARGET.astype(np.float32)[:, np.newaxis]


def linear_model(optimizer):
    model = KERAS.Sequential([KERAS.layers.Dense(1, use_bias=False, input_shape=(3,))])
    model.compile(optimizer, "mse")
    return model


def fit(model, callbacks):
    """Three epochs of two steps. Returns the losses of validation, and all the kernels in float64."""
    record = testing_utils.recorder()
    options = {"batch_size": 6, "epochs": 3, "validation_data": (X, Y), "verbose": 0}
    history = model.fit(X, Y, callbacks=[record, *callbacks], **options).history
    return history["val_loss"], [weights[0][0].astype(np.float64) for weights in record.history]


def test_average_model_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = linear_model(numpy_averages.ema(0.9, dynamic=False).wrap(CURRENT.SGD()))
    checkpoint = names_of(after_block("tfa.callbacks.AverageModelCheckpoint"))["checkpoint"]
    _, weights = fit(model, [checkpoint])  # The loss falls, so each epoch is the best.
    saved = KERAS.models.load_model("model.keras").get_weights()[0]
    np.testing.assert_allclose(saved, ema(weights), rtol=1e-5)
    np.testing.assert_array_equal(model.get_weights()[0], weights[-1].astype(np.float32))


def test_ema_overwrite_frequency():
    """After every fifth step the weights become the averages, and training goes on from them."""
    names = names_of(after_block("Keras use_ema", 1))
    model = linear_model(names["optimizer"])
    weights = average = model.get_weights()[0].astype(np.float64)
    model.fit(X, Y, batch_size=12, epochs=13, callbacks=names["callbacks"], verbose=0)
    for step in range(13):
        weights = weights - 0.1 * 2 / 12 * X.T @ (X @ weights - Y)
        average = 0.9 * average + (1 - 0.9) * weights
        if (step + 1) % 5 == 0:
            weights = average
    np.testing.assert_allclose(model.get_weights()[0], weights, rtol=1e-4)
    np.testing.assert_allclose(
        model.optimizer.get_average(model.trainable_variables[0]), average, rtol=1e-4
    )


def test_swap_ema_weights():
    model = linear_model(numpy_averages.ema(0.9, dynamic=False).wrap(CURRENT.SGD()))
    callbacks = names_of(after_block("Keras SwapEMAWeights"))["callbacks"]
    val_loss, weights = fit(model, callbacks)
    losses = [np.mean((X @ ema(weights[: 2 * epoch + 3]) - Y) ** 2) for epoch in range(3)]
    np.testing.assert_allclose(val_loss, losses, rtol=1e-5)
    np.testing.assert_allclose(model.get_weights()[0], ema(weights), rtol=1e-5)


def test_average_checkpoints(tmp_path, monkeypatch):
    """The mean of the model's weights in the last five of six checkpoints."""
    monkeypatch.chdir(tmp_path)
    names_of(after_block("OpenNMT-tf average_checkpoints"))
    readers = [tf.train.load_checkpoint(f"run/ckpt-{number}") for number in range(2, 7)]
    output = tf.train.load_checkpoint("run/averaged/ckpt")
    keys = [key for key in output.get_variable_to_shape_map() if key.startswith("model/")]
    assert len(keys) == 2
    for key in keys:
        expected = np.mean([reader.get_tensor(key).astype(np.float64) for reader in readers], axis=0)
        np.testing.assert_allclose(output.get_tensor(key), expected, rtol=1e-7)


# PyTorch's `SWALR` and `update_bn`.


def swa_learning_rates(before, swa_lr, swa_start, anneal_steps, strategy, steps):
    """What a loop gets that steps its own scheduler until `swa_start`, and `SWALR` from there on."""
    rates = []
    for step in range(steps):
        if step < swa_start:
            rates.append(before(step))
            continue
        t = min(1.0, (step - swa_start) / anneal_steps) if anneal_steps else 1.0
        alpha = (1 - math.cos(math.pi * t)) / 2 if strategy == "cos" else t
        rates.append(swa_lr * alpha + before(swa_start) * (1 - alpha))
    return rates


@pytest.mark.parametrize("anneal_strategy", ["cos", "linear"])
@pytest.mark.parametrize("anneal_steps", [0, 1, 10])
@testing_utils.both_generations
def test_swalr_with_swa(module, anneal_strategy, anneal_steps):
    """The learning rate, the weights that it leads to, and their average."""
    decay = KERAS.optimizers.schedules.ExponentialDecay(0.3, 10, 0.5)
    schedule = tfav.schedules.ConstantLearningRate(decay, 0.05, 20, anneal_steps, anneal_strategy)
    optimizer = tfav.SWA(module.SGD(schedule), start_averaging=20, average_period=3)
    variable, _ = train(optimizer)
    rates = swa_learning_rates(
        lambda step: 0.3 * 0.5 ** (step / 10), 0.05, 20, anneal_steps, anneal_strategy, STEPS
    )
    weights = sgd(rates.__getitem__)
    # Keras keeps learning rates in float32.
    np.testing.assert_allclose(variable.numpy(), weights[-1], rtol=1e-5)
    expected = np.mean(weights[21::3], axis=0)
    np.testing.assert_allclose(optimizer.get_average(variable), expected, rtol=1e-5)


@pytest.mark.parametrize("anneal_strategy", ["cos", "linear"])
def test_swalr_recursion_is_the_closed_form(anneal_strategy):
    """`SWALR` undoes the last step's annealing to find the first learning rate, then anneals that."""

    def anneal(t):
        t = max(0.0, min(1.0, t))
        return (1 - math.cos(math.pi * t)) / 2 if anneal_strategy == "cos" else t

    swa_lr, steps, rate = 0.05, 7, 0.4
    schedule = tfav.schedules.ConstantLearningRate(rate, swa_lr, 0, steps, anneal_strategy)
    for step in range(1, 20):
        before, now = anneal((step - 1) / steps), anneal(step / steps)
        first = swa_lr if before == 1 else (rate - before * swa_lr) / (1 - before)
        rate = swa_lr * now + first * (1 - now)
        np.testing.assert_allclose(schedule(step).numpy(), rate, rtol=1e-6)


def test_update_bn():
    """PyTorch takes the means of the batches' statistics: of equal batches that gives the exact mean.

    Its variance lacks what the means of the batches vary by, which ours has.
    """
    x = np.random.default_rng(0).normal(size=(60, 2)) + [[1.0, -4.0]]
    model = KERAS.Sequential([KERAS.layers.BatchNormalization(input_shape=(2,))])
    batches = x.reshape(6, 10, 2)
    tfav.update_batch_norm(model, tf.data.Dataset.from_tensor_slices(batches), verbose=0)
    layer = model.layers[0]
    mean, variance = np.zeros(2), np.zeros(2)
    for count, batch in enumerate(batches, 1):  # A cumulative moving average: momentum=None.
        mean += (batch.mean(axis=0) - mean) / count
        variance += (batch.var(axis=0) - variance) / count
    np.testing.assert_allclose(layer.moving_mean.numpy(), mean, rtol=1e-6)
    between = batches.mean(axis=1).var(axis=0)
    np.testing.assert_allclose(layer.moving_variance.numpy(), variance + between, rtol=1e-5)
