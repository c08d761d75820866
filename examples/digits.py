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
r"""Handwritten digits: an optimizer alone, under SWA, and under an exponential moving average.

Trains a small convolutional network with BatchNormalization on scikit-learn's digits (1,797 real images,
nothing is downloaded), data-parallel on two replicas. With `SwapAverageWeights`, validation in `fit` sees
the average; a small callback measures the raw weights beside it. At the end:

*   a table shows accuracy and loss on the test set, raw and averaged. The optimizer alone and under EMA
    have the same raw weights, since averaging never changes the training that it follows. Under SWA they
    are others: it comes with a learning rate of its own;
*   `validation_accuracy.png` shows the way there;
*   `averaged.keras` is the best average, and a new process has checked that it predicts the same.

The learning rate is high and stays so; under SWA it is raised once more when averaging starts. The
weights then keep jumping around a good solution, and their average is nearer to it than they are: this is
what averaging is for.

The statistics of BatchNormalization must fit the weights. SWA averages trainable weights only: until
`update_batch_norm` has recomputed the statistics for the average, it is used with those of the raw
weights, and may well be worse than these. The table shows it before and after. EMA averages the
statistics with the weights.

All settings were chosen on the validation set; the test set is used only at the end of each run.

    python examples/digits.py
    python examples/digits.py --optimizer=adam --learning_rate=0.01
    TF_USE_LEGACY_KERAS=1 python examples/digits.py

The last line runs it with tf_keras (Keras 2), the others with Keras 3.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow reads it when it is imported.

import pathlib
import subprocess
import sys
from typing import Dict, List, NamedTuple, Optional, Tuple

import matplotlib.figure
import numpy as np
import sklearn.datasets
import sklearn.model_selection
import tensorflow as tf
from absl import app
from absl import flags
from absl import logging

import tf_averaging as tfav

FLAGS = flags.FLAGS
flags.DEFINE_integer("epochs", 25, "Number of epochs of each run.", lower_bound=1)
flags.DEFINE_integer("seeds", 3, "Number of runs of each kind, with seeds 0, 1, 2, ...", lower_bound=1)
flags.DEFINE_string("optimizer", "sgd", "Name of the optimizer, alone and inside; any of tf.keras's.")
flags.DEFINE_float("learning_rate", 1.0, "Its learning rate, constant until SWA starts.", lower_bound=0.0)
flags.DEFINE_integer("batch_size", 32, "Images in a step, on both replicas together.", lower_bound=2)
flags.DEFINE_float(
    "swa_start",
    0.5,
    "Part of the training after which SWA starts, with a snapshot at the end of each epoch.",
    lower_bound=0.0,
    upper_bound=1.0,
)
flags.DEFINE_float(
    "swa_factor",
    1.5,
    "What the learning rate is multiplied by, within one epoch, when SWA starts.",
    lower_bound=0.0,
)
flags.DEFINE_float(
    "average_decay",
    0.99,
    "Decay of the exponential moving average: it looks back about 1 / (1 - decay) steps.",
    lower_bound=0.0,
    upper_bound=1.0,
)
flags.DEFINE_string("output_dir", "output", "Directory for the plot, the model and its predictions.")
flags.DEFINE_bool(
    "check_only",
    False,
    "Train nothing: load the model in --output_dir, and exit with 0 if it predicts what is recorded "
    "there, else with 1. The example runs itself like this at its end.",
)

AVERAGES = ("SWA", "EMA")
RECOMPUTED = "SWA, statistics recomputed"
EVALUATION_BATCH = 300  # Divides the evaluation sets, so that both replicas have work in every step.

# The new process computes the same in other portions (whole batches, not halves on two replicas), so the
# last bits of the probabilities may differ. Raw and averaged differ by far more.
TOLERANCE = 1e-5

Images = Tuple[np.ndarray, np.ndarray]  # float32 [n, 8, 8, 1] from 0 to 1, and labels, int [n].
Metrics = Dict[str, float]


class Data(NamedTuple):
    train: Images
    validation: Images
    test: Images


class Run(NamedTuple):
    """What is kept of a training run.

    `raw` and `averaged` are results on the test set, `averaged` None where nothing was averaged;
    `validation` is on the validation set, averaged if there is an average.
    """

    scheme: str
    model: tf.keras.Model
    history: Dict[str, List[float]]
    validation: Metrics
    raw: Metrics
    averaged: Optional[Metrics]


def load_data() -> Data:
    """897 images for training, 300 for validation and 600 for the test, with equal shares of digits."""
    digits = sklearn.datasets.load_digits()
    images = (digits.images[..., np.newaxis] / 16).astype(np.float32)
    rest, test = _split(images, digits.target, 600)
    train, validation = _split(*rest, 300)
    return Data(train, validation, test)


def _split(images: np.ndarray, labels: np.ndarray, size: int) -> Tuple[Images, Images]:
    """Splits `size` images off; returns the rest and them."""
    rest, off, rest_labels, off_labels = sklearn.model_selection.train_test_split(
        images, labels, test_size=size, stratify=labels, random_state=0
    )
    return (rest, rest_labels), (off, off_labels)


def two_replicas() -> tf.distribute.Strategy:
    """Data parallelism without a GPU: the CPU poses as two devices. One strategy serves all runs."""
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def make_model() -> tf.keras.Model:
    """Two convolutions, normalized by the statistics of the whole batch.

    Each replica's own (`synchronized=False`) would differ, and a saved model can hold only one set.
    """
    layers = tf.keras.layers
    return tf.keras.Sequential(
        [
            layers.Input([8, 8, 1]),
            layers.Conv2D(16, 3, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.9, synchronized=True),
            layers.ReLU(),
            layers.Conv2D(32, 3, strides=2, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.9, synchronized=True),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dropout(0.3),
            layers.Dense(10, activation="softmax"),
        ]
    )


def make_optimizer(scheme: str, steps_per_epoch: int) -> tf.keras.optimizers.Optimizer:
    """The optimizer, wrapped if `scheme` is one of `AVERAGES`."""
    if scheme == "SWA":
        start = int(FLAGS.swa_start * FLAGS.epochs) * steps_per_epoch
        schedule = tfav.schedules.ConstantLearningRate(
            FLAGS.learning_rate,
            swa_learning_rate=FLAGS.swa_factor * FLAGS.learning_rate,
            start_step=start,
            anneal_steps=steps_per_epoch,
        )
        return tfav.SWA(
            _inner_optimizer(schedule),
            start_averaging=start + steps_per_epoch - 1,
            average_period=steps_per_epoch,
        )
    optimizer = _inner_optimizer(FLAGS.learning_rate)
    if scheme == "EMA":
        # With `trainable_weights_only=False` the statistics of BatchNormalization are averaged too:
        # those of the raw weights would not fit the averaged ones.
        return tfav.ExponentialMovingAverage(
            optimizer, average_decay=FLAGS.average_decay, trainable_weights_only=False
        )
    return optimizer


def _inner_optimizer(learning_rate) -> tf.keras.optimizers.Optimizer:
    optimizer_class = type(tf.keras.optimizers.get(FLAGS.optimizer))
    return optimizer_class(learning_rate=learning_rate)


def evaluate(model: tf.keras.Model, data: Images) -> Metrics:
    """Loss and accuracy of what the model holds now."""
    return model.evaluate(*data, batch_size=EVALUATION_BATCH, verbose=0, return_dict=True)


def evaluate_average(model: tf.keras.Model, data: Images) -> Metrics:
    """Loss and accuracy of the averages, which are in the model for as long as this takes."""
    with model.optimizer.swapped_weights():
        return evaluate(model, data)


class EvaluateRaw(tf.keras.callbacks.Callback):
    """After every epoch, shows results of the raw weights beside `val_loss` and `val_accuracy`."""

    def __init__(self, data: Images):
        super().__init__()
        self._data = data

    def on_epoch_end(self, epoch, logs=None):
        metrics = evaluate(self.model, self._data)  # `SwapAverageWeights` has brought them back.
        logs.update({f"raw_val_{name}": value for name, value in metrics.items()})


def training_batches(images: Images) -> tf.data.Dataset:
    """Batches of one epoch; the few images that are left over wait for another one, newly shuffled.

    They may be too few to normalize by.
    """
    batches = tf.data.Dataset.from_tensor_slices(images).shuffle(len(images[0]))
    return batches.batch(FLAGS.batch_size, drop_remainder=True)


def train(scheme: str, seed: int, data: Data, strategy: tf.distribute.Strategy) -> Run:
    """Trains a new model, measuring the raw weights and, if `scheme` has one, their average."""
    tf.keras.utils.set_random_seed(seed)
    batches = training_batches(data.train)
    with strategy.scope():
        model = make_model()
        optimizer = make_optimizer(scheme, steps_per_epoch=len(batches))
        model.compile(optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    averages = scheme in AVERAGES
    history = model.fit(
        batches,
        epochs=FLAGS.epochs,
        validation_data=data.validation,
        validation_batch_size=EVALUATION_BATCH,
        callbacks=[tfav.callbacks.SwapAverageWeights(), EvaluateRaw(data.validation)] if averages else [],
    ).history
    return Run(
        scheme,
        model,
        history,
        validation={"loss": history["val_loss"][-1], "accuracy": history["val_accuracy"][-1]},
        raw=evaluate(model, data.test),
        averaged=evaluate_average(model, data.test) if averages else None,
    )


def recompute_statistics(run: Run, data: Data) -> Run:
    """The same run after the average got BatchNormalization statistics of its own, measured again."""
    with run.model.optimizer.swapped_weights():
        tfav.update_batch_norm(run.model, training_batches(data.train), verbose=0)
    return run._replace(
        scheme=RECOMPUTED,
        validation=evaluate_average(run.model, data.validation),
        raw=evaluate(run.model, data.test),
        averaged=evaluate_average(run.model, data.test),
    )


def mean_and_spread(values) -> Tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation over the seeds, the first axis; one seed has no spread."""
    values = np.asarray(values)
    return values.mean(axis=0), values.std(axis=0, ddof=1 if len(values) > 1 else 0)


def table(runs: List[Run]) -> str:
    """Test results, a row for each scheme: raw against averaged."""
    row = "{:<28}{:<18}{:<20}{:<18}{}".format
    lines = [row("optimizer", "accuracy, raw", "accuracy, averaged", "loss, raw", "loss, averaged")]
    for scheme in dict.fromkeys(run.scheme for run in runs):
        cells = [
            _cell([getattr(run, kind) for run in runs if run.scheme == scheme], metric)
            for metric in ("accuracy", "loss")
            for kind in ("raw", "averaged")
        ]
        lines.append(row(scheme, *cells))
    return "\n".join(lines)


def _cell(results: List[Optional[Metrics]], metric: str) -> str:
    if None in results:
        return "-"
    return "{:.4f} ± {:.4f}".format(*mean_and_spread([result[metric] for result in results]))


def draw(runs: List[Run], path: pathlib.Path) -> None:
    """Draws validation accuracy over epochs, raw and averaged: mean and spread over the seeds."""
    figure = matplotlib.figure.Figure(figsize=(10, 4.5), layout="constrained")
    for axes, scheme in zip(figure.subplots(1, len(AVERAGES), sharey=True), AVERAGES):
        histories = [run.history for run in runs if run.scheme == scheme]
        label = "averaged, raw statistics" if scheme == "SWA" else "averaged"
        _draw_band(axes, [h["val_accuracy"] for h in histories], label, "tab:blue")
        _draw_band(axes, [h["raw_val_accuracy"] for h in histories], "raw", "tab:gray")
        if scheme == "SWA":
            _draw_recomputed(
                axes, [run.validation["accuracy"] for run in runs if run.scheme == RECOMPUTED]
            )
        axes.set(title=f"{FLAGS.optimizer} under {scheme}", xlabel="epoch", ylabel="validation accuracy")
        axes.label_outer()
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    # The steep first quarter, or an epoch that went wrong, would leave no room for the differences.
    settled = [
        curve[FLAGS.epochs // 4 :]
        for run in runs
        for name, curve in run.history.items()
        if name.endswith("val_accuracy")
    ]
    axes.set_ylim(np.percentile(settled, 5) - 0.01, 1.0)
    figure.savefig(path, dpi=150)


def _draw_band(axes, curves: List[List[float]], label: str, color: str) -> None:
    mean, spread = mean_and_spread(curves)
    epochs = np.arange(1, len(mean) + 1)
    axes.plot(epochs, mean, color=color, label=label)
    axes.fill_between(epochs, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)


def _draw_recomputed(axes, results: List[float]) -> None:
    """Marks the averages' last results once more, with statistics of their own."""
    mean, spread = mean_and_spread(results)
    axes.errorbar(
        FLAGS.epochs, mean, spread, fmt="o", color="tab:orange", label="averaged, statistics recomputed"
    )


def model_path() -> pathlib.Path:
    return pathlib.Path(FLAGS.output_dir, "averaged.keras")


def predictions_path() -> pathlib.Path:
    return pathlib.Path(FLAGS.output_dir, "averaged_predictions.npy")


def predict(model: tf.keras.Model, images: np.ndarray) -> np.ndarray:
    """Probabilities of the digits, float32 [n, 10]."""
    return model.predict(images, batch_size=EVALUATION_BATCH, verbose=0)


def save_average(model: tf.keras.Model, images: np.ndarray) -> None:
    """Saves the model with the averages in it, ready to be used, and what it predicts."""
    with model.optimizer.swapped_weights():
        model.save(model_path())
        np.save(predictions_path(), predict(model, images))


def check_saved(images: np.ndarray) -> int:
    """Loads the saved model and compares its predictions with those recorded.

    Returns:
      0 if they agree within `TOLERANCE`, otherwise 1: the exit status.
    """
    model = tf.keras.models.load_model(model_path())  # Importing tf_averaging has made it known to Keras.
    difference = np.abs(predict(model, images) - np.load(predictions_path())).max()
    if not difference <= TOLERANCE:  # A NaN is no agreement either.
        logging.error("%s predicts something else: it differs by %g.", model_path(), difference)
        return 1
    logging.info("%s, loaded in a new process, predicts the same within %g.", model_path(), TOLERANCE)
    return 0


def check_saved_in_new_process() -> int:
    """Runs this script again, only to check what it has saved; returns the exit status."""
    command = [sys.executable, __file__, "--check_only", f"--output_dir={FLAGS.output_dir}"]
    return subprocess.run(command, check=False).returncode


def main(_) -> int:
    logging.set_verbosity(logging.INFO)
    tf.get_logger().setLevel("ERROR")
    tf.config.set_visible_devices([], "GPU")
    data = load_data()
    if FLAGS.check_only:
        return check_saved(data.test[0])
    pathlib.Path(FLAGS.output_dir).mkdir(parents=True, exist_ok=True)
    strategy = two_replicas()
    runs = []
    for scheme in (f"{FLAGS.optimizer} alone", *AVERAGES):
        for seed in range(FLAGS.seeds):
            logging.info("%s, seed %d", scheme, seed)
            runs.append(train(scheme, seed, data, strategy))
            if scheme == "SWA":
                runs.append(recompute_statistics(runs[-1], data))
    print(f"\nTest set, mean ± standard deviation (seeds: {FLAGS.seeds}):\n\n{table(runs)}\n")
    draw(runs, pathlib.Path(FLAGS.output_dir, "validation_accuracy.png"))
    # The models of SWA hold the recomputed statistics by now.
    ready = [run for run in runs if run.scheme in (RECOMPUTED, "EMA")]
    best = min(ready, key=lambda run: run.validation["loss"])
    save_average(best.model, data.test[0])
    return check_saved_in_new_process()


if __name__ == "__main__":
    app.run(main)
