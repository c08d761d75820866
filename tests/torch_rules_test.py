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
"""PyTorch's update rules (`torch.optim.swa_utils`), written down in NumPy, beside ours.

The formulas are those its documentation publishes: `get_ema_multi_avg_fn`, the equal average of
`AveragedModel`, `SWALR`, and `update_bn`. Everything runs on one trajectory of SGD, in float64.
"""

import math

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import tf_averaging as tfav

TARGET = np.array([3.0, -2.0, 0.5])


def gradient(weights, step):
    """Of a quadratic, with noise that is the same for all who ask."""
    return (weights - TARGET) + np.random.default_rng(step).normal(size=3)


class AveragedModel:
    """`avg_fn(averaged, current, num_averaged)`; the first update copies the weights."""

    def __init__(self, avg_fn):
        self.avg_fn = avg_fn
        self.average, self.n_averaged = None, 0

    def update_parameters(self, weights):
        if self.n_averaged == 0:
            self.average = weights.copy()
        else:
            self.average = self.avg_fn(self.average, weights, self.n_averaged)
        self.n_averaged += 1


def equal_average(averaged, current, num_averaged):
    return averaged + (current - averaged) / (num_averaged + 1)


def ema(decay):
    return lambda averaged, current, num_averaged: decay * averaged + (1 - decay) * current


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


def train(optimizer, steps):
    """Ours: the variable, and what it was after every step."""
    variable, trajectory = tf.Variable(np.zeros(3)), []

    @tf.function
    def apply(grad):
        optimizer.apply_gradients([(grad, variable)])

    for step in range(steps):
        apply(tf.constant(gradient(variable.numpy(), step)))
        trajectory.append(variable.numpy())
    return variable, trajectory


@pytest.mark.parametrize("generation", [tf_keras.optimizers, tf_keras.optimizers.legacy])
class TestAverages:
    @pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
    @pytest.mark.parametrize(("start", "period"), [(0, 1), (5, 1), (3, 4)])
    def test_ema(self, generation, decay, start, period):
        """Ours starts from the weights before step `start`: PyTorch's first update, which copies."""
        optimizer = tfav.ExponentialMovingAverage(
            generation.SGD(0.1),
            average_decay=decay,
            dynamic_decay=False,
            start_step=start,
            average_period=period,
        )
        variable, trajectory = train(optimizer, 50)
        torch = AveragedModel(ema(decay))
        torch.update_parameters(trajectory[start - 1] if start else np.zeros(3))
        for step in range(start, 50, period):
            torch.update_parameters(trajectory[step])
        np.testing.assert_allclose(
            optimizer.get_slot(variable, "average").numpy(), torch.average, rtol=1e-12
        )

    @pytest.mark.parametrize(("start", "period"), [(0, 1), (10, 1), (7, 5), (0, 10)])
    def test_swa(self, generation, start, period):
        optimizer = tfav.SWA(generation.SGD(0.1), start, period)
        variable, trajectory = train(optimizer, 50)
        torch = AveragedModel(equal_average)
        for step in range(start, 50, period):
            torch.update_parameters(trajectory[step])
        assert optimizer.num_averaged == torch.n_averaged
        np.testing.assert_allclose(
            optimizer.get_slot(variable, "average").numpy(), torch.average, rtol=1e-12
        )

    @pytest.mark.parametrize("anneal_strategy", ["cos", "linear"])
    @pytest.mark.parametrize("anneal_steps", [0, 1, 10])
    def test_swalr_with_swa(self, generation, anneal_strategy, anneal_steps):
        """The learning rate, the weights that it leads to, and their average."""
        decay = tf_keras.optimizers.schedules.ExponentialDecay(0.3, 10, 0.5)
        schedule = tfav.schedules.ConstantLearningRate(decay, 0.05, 20, anneal_steps, anneal_strategy)
        optimizer = tfav.SWA(generation.SGD(schedule), start_averaging=20, average_period=3)
        variable, _ = train(optimizer, 50)
        rates = swa_learning_rates(
            lambda step: 0.3 * 0.5 ** (step / 10), 0.05, 20, anneal_steps, anneal_strategy, 50
        )
        weights, torch = np.zeros(3), AveragedModel(equal_average)
        for step, rate in enumerate(rates):
            weights = weights - rate * gradient(weights, step)
            if step >= 20 and (step - 20) % 3 == 0:
                torch.update_parameters(weights)
        # Keras keeps learning rates in float32.
        np.testing.assert_allclose(variable.numpy(), weights, rtol=1e-5)
        np.testing.assert_allclose(
            optimizer.get_slot(variable, "average").numpy(), torch.average, rtol=1e-5
        )


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
    model = tf_keras.Sequential([tf_keras.layers.BatchNormalization(input_shape=(2,))])
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
