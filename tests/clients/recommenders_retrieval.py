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
"""tensorflow-recommenders: a retrieval model of two towers, whose gradients are sparse, with SWA.

The averages are right, FactorizedTopK judges them, and a saved index of the candidates holds them.
"""

import tempfile

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs
import tf_keras

from tests import numpy_averages
from tests.clients import recording


class Retrieval(tfrs.Model):
    def __init__(self):
        super().__init__()
        self.users = tf_keras.layers.Embedding(20, 4)
        self.movies = tf_keras.layers.Embedding(30, 4)
        movies = tf.data.Dataset.range(30).batch(10).map(self.movies)
        self.task = tfrs.tasks.Retrieval(metrics=tfrs.metrics.FactorizedTopK(movies, ks=(5,)))

    def call(self, users):
        return self.users(users)

    def compute_loss(self, features, training=False):
        users, movies = self.users(features["user"]), self.movies(features["movie"])
        return self.task(users, movies, compute_metrics=not training)


SCHEME = numpy_averages.swa(start=2, period=3)
tf_keras.utils.set_random_seed(0)
random = np.random.default_rng(0)
ratings = {"user": random.integers(0, 20, 200), "movie": random.integers(0, 30, 200)}
data = tf.data.Dataset.from_tensor_slices(ratings).batch(20)

model = Retrieval()
model.compile(SCHEME.wrap(tf_keras.optimizers.Adagrad(0.5)))
model.users(tf.range(1)), model.movies(tf.range(1))
record = recording.Record(model.trainable_variables)
model.fit(data, epochs=2, verbose=0, callbacks=[record.callback(tf_keras)])
evaluated = record.check(model.optimizer, SCHEME, lambda: model.evaluate(data, verbose=0))

users, movies = record.averages(SCHEME)
scores = users @ movies.T
better = np.sum(scores[ratings["user"]] > scores[ratings["user"], ratings["movie"]][:, None], axis=1)
# The movie itself is among the candidates: it may come before itself, by rounding.
assert np.mean(better < 4) - 1e-6 <= evaluated[0] <= np.mean(better < 5) + 1e-6

with model.optimizer.swapped_weights(), tempfile.TemporaryDirectory() as folder:
    index = tfrs.layers.factorized_top_k.BruteForce(model.users, k=3)
    index.index(model.movies(tf.range(30)))
    index(tf.range(20))
    tf.saved_model.save(index, folder)
    loaded = tf.saved_model.load(folder)
best = np.sort(scores)[:, :-4:-1]
np.testing.assert_allclose(loaded(tf.range(20))[0], best, rtol=1e-4, atol=1e-6)

recording.report("tensorflow-recommenders", "tensorflow", "tf_keras")
