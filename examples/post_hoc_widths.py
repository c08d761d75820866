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
r"""Handwritten digits: the width of an average is chosen after the training.

Trains a small network once on scikit-learn's digits (1,797 real images, nothing is downloaded) under
`PostHocEMA`, with snapshots of its averages, and then measures averages of a range of widths on the
validation set. At the end:

*   a table shows the validation loss of each width, mean and spread over the seeds;
*   `post_hoc_widths.png` shows it as a plot.

    python examples/post_hoc_widths.py
    TF_USE_LEGACY_KERAS=1 python examples/post_hoc_widths.py

The last line runs it with tf_keras (Keras 2), the first one with Keras 3.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow reads it when it is imported.

import pathlib
import tempfile
from typing import Tuple

import matplotlib.figure
import numpy as np
import sklearn.datasets
import sklearn.model_selection
import tensorflow as tf
from absl import app
from absl import flags

import tf_averaging as tfav

FLAGS = flags.FLAGS
flags.DEFINE_integer("epochs", 20, "Number of epochs of each training.", lower_bound=1)
flags.DEFINE_integer("seeds", 3, "Number of trainings, with seeds 0, 1, 2, ...", lower_bound=1)
flags.DEFINE_float("learning_rate", 0.5, "Learning rate of SGD, which stays constant.", lower_bound=0.0)
flags.DEFINE_integer("every", 14, "Number of steps from one snapshot to the next.", lower_bound=1)
flags.DEFINE_string("output_dir", "output", "Directory for the plot.")

WIDTHS = (0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.10, 0.12, 0.15, 0.20, 0.25)

Images = Tuple[np.ndarray, np.ndarray]  # float32 [n, 64] from 0 to 1, and labels, int [n].


def load_data() -> Tuple[Images, Images]:
    """Images for training and 450 for validation, with equal shares of digits."""
    digits = sklearn.datasets.load_digits()
    images = (digits.data / 16).astype(np.float32)
    train, validation, labels, validation_labels = sklearn.model_selection.train_test_split(
        images, digits.target, test_size=450, stratify=digits.target, random_state=0
    )
    return (train, labels), (validation, validation_labels)


def make_model() -> tf.keras.Model:
    layers = tf.keras.layers
    return tf.keras.Sequential(
        [
            layers.Input([64]),
            layers.Dense(128, "relu"),
            layers.Dropout(0.5),
            layers.Dense(10, "softmax"),
        ]
    )


def losses(seed: int, train: Images, validation: Images) -> np.ndarray:
    """The validation loss of the last weights, and that of the average of each width, of one training."""
    tf.keras.utils.set_random_seed(seed)
    model = make_model()
    sgd = tf.keras.optimizers.SGD(FLAGS.learning_rate)
    model.compile(tfav.PostHocEMA(sgd), "sparse_categorical_crossentropy")
    averaged = tf.keras.models.clone_model(model)
    averaged.compile(loss="sparse_categorical_crossentropy")
    with tempfile.TemporaryDirectory() as directory:
        save = tfav.callbacks.SaveAverages(directory, FLAGS.every)
        model.fit(*train, epochs=FLAGS.epochs, batch_size=32, callbacks=[save], verbose=0)
        found = [model.evaluate(*validation, verbose=0)]
        for width in WIDTHS:
            tfav.post_hoc_average(directory, relative_width=width, target=averaged)
            found.append(averaged.evaluate(*validation, verbose=0))
    return np.array(found)


def draw(found: np.ndarray, path: pathlib.Path) -> None:
    """Draws the loss over the widths, for each seed (the rows of `found`) and the mean over them."""
    mean = found.mean(axis=0)
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(mean[0], color="tab:gray", linestyle="--", label="last weights")
    axes.plot(WIDTHS, mean[1:], "o-", color="tab:blue", label="average, after the training")
    axes.plot(WIDTHS, found[:, 1:].T, color="tab:blue", alpha=0.3)
    axes.set(xlabel="relative width", ylabel="validation loss", xscale="log")
    axes.set_xticks(WIDTHS, map(str, WIDTHS))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def main(_) -> None:
    tf.get_logger().setLevel("ERROR")
    data = load_data()
    found = np.array([losses(seed, *data) for seed in range(FLAGS.seeds)])
    print("relative width  validation loss")
    for width, column in zip(("last weights", *WIDTHS), found.T):
        print(f"{width!s:<14}  {column.mean():.4f} ± {column.std(ddof=1 if len(column) > 1 else 0):.4f}")
    pathlib.Path(FLAGS.output_dir).mkdir(parents=True, exist_ok=True)
    draw(found, pathlib.Path(FLAGS.output_dir, "post_hoc_widths.png"))


if __name__ == "__main__":
    app.run(main)
