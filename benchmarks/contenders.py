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
"""What is measured: a bare optimizer, the optimizers of this package, and the alternatives.

Each contender takes steps on given variables with given gradients. All of them take the step of plain
SGD, so what they add to it is the averaging. TensorFlow Addons and TensorFlow Models do not run with this
TensorFlow. Their formulas are written out here as they compute them: one variable after the other, in
plain operations.
"""

import functools
import os
from typing import Callable, Dict, List, Optional, Sequence

import tensorflow as tf
import tf_keras

import tf_averaging as tfav
from benchmarks import names

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
import keras  # noqa: E402

LEARNING_RATE = 1e-3
DECAY = 0.99
PERIOD = 10


def sgd(**options) -> tf_keras.optimizers.Optimizer:
    return tf_keras.optimizers.SGD(LEARNING_RATE, jit_compile=False, **options)


def sgd_keras_3(**options) -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(LEARNING_RATE, **options)


class Contender:
    """An optimizer with the variables that it trains.

    Args:
      optimizer: anything with `apply_gradients`.
      variables: the variables to train.
      gradients: one for each variable.
      strategy: the strategy whose replicas run the step; None for none.
      jit_compile: whether XLA compiles the step.

    Attributes:
      step: takes one training step.
      swap: exchanges weights and averages; None if it cannot.
      assign: sets the weights to the averages; None if it cannot.
    """

    swap: Optional[Callable] = None
    assign: Optional[Callable] = None

    def __init__(
        self, optimizer, variables: list, gradients: list, strategy=None, jit_compile: bool = False
    ):
        self.optimizer = optimizer
        self.variables = variables

        def step():
            optimizer.apply_gradients(list(zip(gradients, variables)))

        def step_on_replica():
            own = [tf.identity(gradient) for gradient in gradients]  # To be summed over the replicas.
            optimizer.apply_gradients(list(zip(own, variables)))

        def step_on_all():
            strategy.run(step_on_replica)

        self.step = tf.function(
            step if strategy is None else step_on_all, jit_compile=jit_compile or None
        )


class Ours(Contender):
    """A `tf_averaging` optimizer."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.swap = self.optimizer.swap_weights
        self.assign = lambda: self.optimizer.assign_average_vars(self.variables)


class PlainOperations(Contender):
    """Averages in plain operations after each step, by a formula of (average, variable)."""

    def __init__(self, formula, variables, gradients):
        averages = [tf.Variable(tf.cast(v, tf.float32), trainable=False) for v in variables]

        class Averaging:
            def __init__(self):
                self.inner = sgd()

            def apply_gradients(self, pairs):
                self.inner.apply_gradients(pairs)
                for average, variable in zip(averages, variables):
                    formula(average, tf.cast(variable, tf.float32))

        super().__init__(Averaging(), variables, gradients)


def like_addons(average: tf.Variable, variable: tf.Tensor) -> None:
    """TensorFlow Addons: `average -= (average - variable) * (1 - decay)`."""
    average.assign_sub((average - variable) * (1.0 - DECAY))


def like_models(average: tf.Variable, variable: tf.Tensor) -> None:
    """TensorFlow Models: `average = average * decay + variable * (1 - decay)`."""
    average.assign(average * DECAY + variable * (1.0 - DECAY))


class Keras3(Contender):
    """An optimizer of Keras 3, with variables of its own."""

    def __init__(self, optimizer, variables: List[tf.Variable], gradients: list, **options):
        class Model(keras.Model):
            def __init__(self):
                super().__init__()
                for variable in variables:
                    weight = self.add_weight(
                        shape=variable.shape, dtype=variable.dtype.name, initializer="zeros"
                    )
                    weight.assign(variable)

        self.model = Model()
        self.model.compile(optimizer)
        optimizer.build(self.model.trainable_variables)
        super().__init__(optimizer, self.model.trainable_variables, gradients, **options)


class OursKeras3(Ours, Keras3):
    """A `tf_averaging` optimizer around one of Keras 3."""


class UseEmaKeras3(Keras3):
    """The average of Keras 3, and the swap of its callback."""

    def __init__(self, *args, **options):
        super().__init__(sgd_keras_3(use_ema=True), *args, **options)
        callback = keras.callbacks.SwapEMAWeights()
        callback.set_model(self.model)
        swapped = []

        def swap():  # The callback's two public hooks exchange, and exchange back.
            if swapped:
                swapped.clear()
                callback.on_test_end()
            else:
                swapped.append(True)
                callback.on_test_begin()

        self.swap = swap


def bare_of(name: str) -> str:
    """The name of the bare optimizer to compare with."""
    return names.BARE_KERAS_3 if name.endswith("(Keras 3)") or name == names.KERAS_3 else names.BARE


def _in_scope(strategy, make):
    with strategy.scope():
        return make()


def makers(
    variables: List[tf.Variable],
    gradients: list,
    peers: Sequence[str],
    strategy=None,
    jit_compile: bool = False,
) -> Dict[str, Callable]:
    """Functions that make our contenders, these peers, and the bare optimizers to compare them with.

    Under a strategy, only those that run there.
    """
    here, compiled = (variables, gradients, strategy), {"jit_compile": jit_compile}
    makers = {
        names.BARE: lambda: Contender(sgd(), *here, **compiled),
        names.EMA: lambda: Ours(
            tfav.ExponentialMovingAverage(sgd(), average_decay=DECAY), *here, **compiled
        ),
        names.SWA: lambda: Ours(tfav.SWA(sgd(), average_period=PERIOD), *here, **compiled),
        names.USE_EMA: lambda: Contender(sgd(use_ema=True, ema_momentum=DECAY), *here, **compiled),
    }
    if strategy is not None:
        return {name: functools.partial(_in_scope, strategy, make) for name, make in makers.items()}
    makers[names.ADDONS] = lambda: PlainOperations(like_addons, variables, gradients)
    makers[names.MODELS] = lambda: PlainOperations(like_models, variables, gradients)
    makers[names.BARE_KERAS_3] = lambda: Keras3(sgd_keras_3(), variables, gradients, **compiled)
    makers[names.KERAS_3] = lambda: UseEmaKeras3(variables, gradients, **compiled)
    makers[names.EMA_KERAS_3] = lambda: OursKeras3(
        tfav.ExponentialMovingAverage(sgd_keras_3(), average_decay=DECAY),
        variables,
        gradients,
        **compiled,
    )
    chosen = {*names.OURS, *peers}
    chosen |= {bare_of(name) for name in chosen}
    return {name: make for name, make in makers.items() if name in chosen}
