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
"""Averaging with two workers on this machine, started by one command:

    python examples/multi_worker.py

Started without `TF_CONFIG`, this program starts itself once for each worker, as a cluster manager would,
and gives each the addresses of all. The workers train one model together; then each evaluates it with the
last weights, and with the averages swapped in.

It uses tf_keras (Keras 2): `fit` of Keras 3 does not work under MultiWorkerMirroredStrategy.
"""

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
import tf_keras
from absl import app
from absl import flags
from absl import logging
from sklearn import datasets

import tf_averaging as tfav

FLAGS = flags.FLAGS
flags.DEFINE_integer("workers", 2, "Number of workers, all on this machine.", lower_bound=1)
flags.DEFINE_integer("epochs", 6, "Number of passes over the training data.", lower_bound=1)
flags.DEFINE_integer("batch_size", 16, "Examples in a step, of all workers together.", lower_bound=1)
flags.DEFINE_float("learning_rate", 0.5, "Learning rate of SGD; high, so that averaging shows.")
flags.DEFINE_float("average_decay", 0.98, "Decay of the averages.", lower_bound=0.0, upper_bound=1.0)
flags.DEFINE_bool("end_with_stdin", False, "End when the standard input ends; for workers.")
flags.DEFINE_integer("seed", 0, "Seed of the initial weights.")

TEST_EXAMPLES = 360


def load_digits():
    """Images of handwritten digits, 64 pixels each, and their labels: training, then test."""
    digits = datasets.load_digits()
    x, y = digits.data.astype(np.float32) / 16.0, digits.target
    return (x[:-TEST_EXAMPLES], y[:-TEST_EXAMPLES]), (x[-TEST_EXAMPLES:], y[-TEST_EXAMPLES:])


def batches(data):
    """Global batches; `fit` and `evaluate` give each worker its share of each."""
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return tf.data.Dataset.from_tensor_slices(data).batch(FLAGS.batch_size).with_options(options)


def work() -> None:
    """What each worker does."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    tf_keras.utils.set_random_seed(FLAGS.seed)
    training, test = load_digits()
    with strategy.scope():
        model = tf_keras.Sequential(
            [
                tf_keras.layers.Dense(64, activation="relu", input_shape=(64,)),
                tf_keras.layers.Dense(10),
            ]
        )
        optimizer = tfav.ExponentialMovingAverage(
            tf_keras.optimizers.SGD(FLAGS.learning_rate), average_decay=FLAGS.average_decay
        )
        loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss, metrics=["accuracy"])
    model.fit(batches(training), epochs=FLAGS.epochs, verbose=0)

    results = {"last weights": model.evaluate(batches(test), verbose=0)}
    with optimizer.swapped_weights():  # On all workers: each swaps its own copy.
        results["averages"] = model.evaluate(batches(test), verbose=0)
    worker = strategy.cluster_resolver.task_id
    for name, (loss, accuracy) in results.items():
        print(f"worker {worker}, {name}: test loss {loss:.4f}, accuracy {accuracy:.4f}", flush=True)


@contextlib.contextmanager
def held_addresses(count):
    """Addresses on this machine that nobody but the workers, who share them, can listen on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            each.bind(("localhost", 0))
        yield [f"localhost:{each.getsockname()[1]}" for each in sockets]


def start_workers() -> int:
    """Starts the workers and waits for them; if one fails, the others are ended. Returns 0 or 1."""
    workers = []
    with held_addresses(FLAGS.workers) as addresses:
        try:
            for index in range(FLAGS.workers):
                task = {"type": "worker", "index": index}
                config = json.dumps({"cluster": {"worker": addresses}, "task": task})
                environment = {**os.environ, "TF_CONFIG": config, "TF_GRPC_REUSE_PORT": "1"}
                command = [sys.executable, *sys.argv, "--end_with_stdin"]
                workers.append(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE))
            codes = [None]  # None of one that runs, 0 of one that ended well.
            while None in codes and not any(codes):
                time.sleep(0.1)
                codes = [worker.poll() for worker in workers]
            return int(any(codes))
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()


def end_with_stdin() -> None:
    """Has this worker ended when the program that started it is gone, however that ended.

    The kernel does it, by a signal. A thread could not: TensorFlow lets none run while it waits for the
    other workers.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(sys.stdin, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(sys.stdin, fcntl.F_SETFL, os.O_ASYNC)
    if select.select([sys.stdin], [], [], 0)[0]:
        sys.exit("The program that started this worker is gone.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only. Received: {argv[1:]}")
    logging.set_verbosity(logging.ERROR)
    if "TF_CONFIG" not in os.environ:
        return start_workers()
    if FLAGS.end_with_stdin:
        end_with_stdin()
    work()
    return 0


if __name__ == "__main__":
    app.run(main)
