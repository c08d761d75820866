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
"""tensorflow-probability: variational layers in `fit`, and a surrogate posterior, each with an EMA.

The averages are right in both, where `fit_surrogate_posterior` steps inside a while loop of a graph.
"""

import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp
import tf_keras

from tests import numpy_averages
from tests.clients import recording

SCHEME = numpy_averages.ema(0.9)
tf_keras.utils.set_random_seed(0)
inputs = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
targets = inputs.sum(1, keepdims=True)

# A Bayesian network.
model = tf_keras.Sequential(
    [
        tfp.layers.DenseFlipout(8, activation="relu", input_shape=(3,)),
        tfp.layers.DenseFlipout(2),
        tfp.layers.DistributionLambda(lambda t: tfp.distributions.Normal(t[:, :1], 1.0)),
    ]
)
model.compile(SCHEME.wrap(tf_keras.optimizers.Adam(0.1)), lambda y, predicted: -predicted.log_prob(y))
record = recording.Record(model.trainable_variables)
model.fit(inputs, targets, batch_size=16, epochs=3, verbose=0, callbacks=[record.callback(tf_keras)])


def evaluate():
    tf_keras.utils.set_random_seed(1)  # The layers sample their weights.
    return model.evaluate(inputs, targets, verbose=0)


record.check(model.optimizer, SCHEME, evaluate)

# Variational inference in a graph: `trace_fn` is called after each step.
target = tfp.distributions.MultivariateNormalDiag([1.0, -2.0], [0.5, 2.0])
posterior = tfp.experimental.util.make_trainable(
    tfp.distributions.MultivariateNormalDiag, batch_and_event_shape=[2]
)
variables = posterior.trainable_variables
record = recording.Record(variables)
optimizer = SCHEME.wrap(tf_keras.optimizers.Adam(0.1))


@tf.function
def fit():
    return tfp.vi.fit_surrogate_posterior(
        target.log_prob,
        posterior,
        optimizer=optimizer,
        num_steps=20,
        sample_size=10,
        trace_fn=lambda _: [tf.identity(variable) for variable in variables],
    )


record.steps += zip(*(values.numpy() for values in fit()))
record.check(optimizer, SCHEME, lambda: posterior.mean().numpy())

recording.report("tensorflow-probability", "tensorflow", "tf_keras")
