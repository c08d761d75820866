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
nothing is downloaded): SGD alone, under an exponential moving average, and under SWA, each with a
learning rate that stays constant and with one that decays to zero by a cosine. Every kind has the
learning rate that did best on the validation set (`RATES`; `--tune` shows the search). At the end:

*   a table shows accuracy and loss on the test set;
*   paired tests over the seeds tell which differences in loss are more than chance;
*   `validation_accuracy.png` shows the way there;
*   `averaged.keras` is the best average, and a new process has checked that it predicts the same.

Averaging never changes the training that it follows, so "SGD" is the raw weights of a training under EMA.
Under SWA the constant learning rate is raised when averaging starts, as its paper has it.

The statistics of BatchNormalization must fit the weights. `SwapAverageWeights(batch_norm_data=...)`
recomputes them for SWA's averages; EMA averages the statistics with the weights.

The test set is used only at the end of each run.

    python examples/digits.py
    python examples/digits.py --optimizer=adam --learning_rate=0.01
    python examples/digits.py --tune
    python examples/digits.py --replicas=2
    TF_USE_LEGACY_KERAS=1 python examples/digits.py

With `--replicas=2` training is data-parallel, on two devices that share the processor: the same results
but for rounding and dropout, in five times the time. The last line runs it with tf_keras (Keras 2), the
others with Keras 3.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow reads it when it is imported.

import itertools
import pathlib
import subprocess
import sys
from typing import Dict, List, NamedTuple, Tuple

import matplotlib.figure
import numpy as np
import scipy.stats
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
flags.DEFINE_float(
    "learning_rate", None, "Learning rate of all kinds; by default each has its own.", lower_bound=0.0
)
flags.DEFINE_bool("tune", False, "Only show what each learning rate comes to on the validation set.")
flags.DEFINE_integer("batch_size", 32, "Images in a step, on all replicas together.", lower_bound=2)
flags.DEFINE_integer("replicas", 1, "Devices that share each batch.", lower_bound=1)
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

AVERAGES = ("SGD", "EMA", "SWA")
DECAYS = {"constant": "constant rate", "cosine": "cosine decay"}

# For each kind the learning rate with the least validation loss, of those that `--tune --seeds=2` tries.
RATES = {
    ("SGD", "constant"): 2.0,
    ("EMA", "constant"): 1.0,
    ("SWA", "constant"): 2.0,
    ("SGD", "cosine"): 2.0,
    ("EMA", "cosine"): 2.0,
    ("SWA", "cosine"): 2.0,
}
TUNED_OVER = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
FIRST_TUNING_SEED = 100  # Other seeds than those of the results.

EVALUATION_BATCH = 300  # Divides the evaluation sets, so that all replicas have work in every step.

# With several replicas the new process computes the same in other portions, so the last bits of the
# probabilities may differ. Raw and averaged differ by far more.
TOLERANCE = 1e-5

METRICS = ("accuracy", "loss")

Images = Tuple[np.ndarray, np.ndarray]  # float32 [n, 8, 8, 1] from 0 to 1, and labels, int [n].
Metrics = Dict[str, float]


class Data(NamedTuple):
    train: Images
    validation: Images
    test: Images


class Training(NamedTuple):
    """What is trained: one training serves all kinds that differ in nothing else."""

    average: str  # "EMA" or "SWA".
    decay: str
    learning_rate: float


class Run(NamedTuple):
    """What is kept of a training: results of the raw weights and of their average."""

    model: tf.keras.Model
    history: Dict[str, List[float]]
    validation: Dict[str, Metrics]
    test: Dict[str, Metrics]


def training_of(average: str, decay: str) -> Training:
    """The training that has the results of this kind. Those of SGD are the raw weights under EMA."""
    rate = RATES[average, decay] if FLAGS.learning_rate is None else FLAGS.learning_rate
    return Training("SWA" if average == "SWA" else "EMA", decay, rate)


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


def make_strategy() -> tf.distribute.Strategy:
    """Data parallelism without a GPU: the CPU poses as several devices. One strategy serves all runs."""
    if FLAGS.replicas == 1:
        return tf.distribute.get_strategy()  # The one that does nothing.
    devices = [tf.config.LogicalDeviceConfiguration()] * FLAGS.replicas
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)
    return tf.distribute.MirroredStrategy([f"CPU:{index}" for index in range(FLAGS.replicas)])


def make_model() -> tf.keras.Model:
    """Two convolutions, normalized by the statistics of the whole batch, on however many replicas.

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


def make_optimizer(training: Training, steps_per_epoch: int) -> tf.keras.optimizers.Optimizer:
    """The optimizer under its average."""
    rate = training.learning_rate
    if training.decay == "cosine":
        rate = tf.keras.optimizers.schedules.CosineDecay(rate, FLAGS.epochs * steps_per_epoch)
    if training.average == "EMA":
        # With `trainable_weights_only=False` the statistics of BatchNormalization are averaged too:
        # those of the raw weights would not fit the averaged ones.
        return tfav.ExponentialMovingAverage(
            _inner_optimizer(rate), average_decay=FLAGS.average_decay, trainable_weights_only=False
        )
    start = int(FLAGS.swa_start * FLAGS.epochs) * steps_per_epoch
    if training.decay == "constant":
        rate = tfav.schedules.ConstantLearningRate(
            rate,
            swa_learning_rate=FLAGS.swa_factor * rate,
            start_step=start,
            anneal_steps=steps_per_epoch,
        )
    return tfav.SWA(
        _inner_optimizer(rate),
        start_averaging=start + steps_per_epoch - 1,
        average_period=steps_per_epoch,
    )


def _inner_optimizer(learning_rate) -> tf.keras.optimizers.Optimizer:
    optimizer_class = type(tf.keras.optimizers.get(FLAGS.optimizer))
    return optimizer_class(learning_rate=learning_rate)


def evaluate(model: tf.keras.Model, data: Images) -> Metrics:
    """Loss and accuracy of what the model holds now."""
    return model.evaluate(*data, batch_size=EVALUATION_BATCH, verbose=0, return_dict=True)


def evaluate_both(model: tf.keras.Model, data: Images) -> Dict[str, Metrics]:
    """The same for the raw weights and for the averages."""
    results = {}
    with model.optimizer.swapped_weights():
        results["averaged"] = evaluate(model, data)
    results["raw"] = evaluate(model, data)
    return results


def training_batches(images: Images) -> tf.data.Dataset:
    """Batches of one epoch; the few images that are left over wait for another one, newly shuffled.

    They may be too few to normalize by.
    """
    batches = tf.data.Dataset.from_tensor_slices(images).shuffle(len(images[0]))
    return batches.batch(FLAGS.batch_size, drop_remainder=True)


def train(training: Training, seed: int, data: Data, strategy: tf.distribute.Strategy) -> Run:
    """Trains a new model, measuring the raw weights and their average."""
    logging.info("%s, seed %d", training, seed)
    tf.keras.utils.set_random_seed(seed)
    batches = training_batches(data.train)
    with strategy.scope():
        model = make_model()
        optimizer = make_optimizer(training, steps_per_epoch=len(batches))
        model.compile(optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    # Statistics for SWA's averages, of batches that training does not share.
    statistics = training_batches(data.train) if training.average == "SWA" else None
    callbacks = [
        tfav.callbacks.SwapAverageWeights(batch_norm_data=statistics),
        tfav.callbacks.EvaluateRawWeights(*data.validation, batch_size=EVALUATION_BATCH),
    ]
    history = model.fit(
        batches,
        epochs=FLAGS.epochs,
        validation_data=data.validation,
        validation_batch_size=EVALUATION_BATCH,
        callbacks=callbacks,
    ).history
    return Run(
        model,
        history,
        validation=evaluate_both(model, data.validation),
        test=evaluate_both(model, data.test),
    )


def results(runs: Dict[Tuple[Training, int], Run], average: str, decay: str) -> List[Metrics]:
    """The results of one kind on the test set, for each seed."""
    which = "raw" if average == "SGD" else "averaged"
    return [runs[training_of(average, decay), seed].test[which] for seed in range(FLAGS.seeds)]


def tune(data: Data, strategy: tf.distribute.Strategy) -> None:
    """Prints for each kind and learning rate the loss on the validation set, mean over the seeds."""
    row = "{:<10}{:<12}{:<16}{}".format
    lines = [row("decay", "rate", "kind", "validation loss")]
    for decay, rate, average in itertools.product(DECAYS, TUNED_OVER, ("EMA", "SWA")):
        seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + FLAGS.seeds)
        found = [train(Training(average, decay, rate), s, data, strategy).validation for s in seeds]
        kinds = {average: "averaged"} if average == "SWA" else {"SGD": "raw", "EMA": "averaged"}
        for kind, which in kinds.items():
            loss = np.mean([one[which]["loss"] for one in found])
            lines.append(row(decay, rate, kind, f"{loss:.4f}"))
    print("\n".join(lines))


def mean_and_spread(values) -> Tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation over the seeds, the first axis; one seed has no spread."""
    values = np.asarray(values)
    return values.mean(axis=0), values.std(axis=0, ddof=1 if len(values) > 1 else 0)


def name_of(average: str, decay: str) -> str:
    return f"{FLAGS.optimizer if average == 'SGD' else average}, {DECAYS[decay]}"


def table(kinds: Dict[str, List[Metrics]]) -> str:
    """Test results, a row for each kind."""
    row = "{:<22}{:<20}{}".format
    lines = [row("", "accuracy", "loss")]
    for name, found in kinds.items():
        cells = ["{:.4f} ± {:.4f}".format(*mean_and_spread([one[m] for one in found])) for m in METRICS]
        lines.append(row(name, *cells))
    return "\n".join(lines)


def paired_tests(kinds: Dict[str, List[Metrics]]) -> str:
    """For each two kinds the difference in test loss, and the p-value of a paired t-test over seeds."""
    row = "{:<22}{:<22}{:<18}{}".format
    lines = [row("", "", "loss difference", "p")]
    for (first, losses), (second, others) in itertools.combinations(kinds.items(), 2):
        pairs = [[one["loss"] for one in found] for found in (losses, others)]
        p = scipy.stats.ttest_rel(*pairs).pvalue
        lines.append(row(first, second, f"{np.mean(np.subtract(*pairs)):+.4f}", f"{p:.2g}"))
    return "\n".join(lines)


def draw(runs: Dict[Tuple[Training, int], Run], path: pathlib.Path) -> None:
    """Draws validation accuracy over epochs: mean and spread over the seeds."""
    figure = matplotlib.figure.Figure(figsize=(10, 4.5), layout="constrained")
    for axes, average in zip(figure.subplots(1, 2, sharey=True), ("EMA", "SWA")):
        training = training_of(average, "constant")
        histories = [runs[training, seed].history for seed in range(FLAGS.seeds)]
        _draw_band(axes, [h["val_accuracy"] for h in histories], "averaged", "tab:blue")
        _draw_band(axes, [h["raw_val_accuracy"] for h in histories], "raw", "tab:gray")
        axes.set(title=name_of(average, "constant"), xlabel="epoch", ylabel="validation accuracy")
        axes.label_outer()
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    # The steep first quarter, or an epoch that went wrong, would leave no room for the differences.
    settled = [
        curve[FLAGS.epochs // 4 :]
        for run in runs.values()
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
    strategy = make_strategy()
    if FLAGS.tune:
        tune(data, strategy)
        return 0
    kinds = [(average, decay) for decay in DECAYS for average in AVERAGES]
    trainings = dict.fromkeys(training_of(*kind) for kind in kinds)
    seeds = range(FLAGS.seeds)
    runs = {(t, seed): train(t, seed, data, strategy) for t in trainings for seed in seeds}
    found = {name_of(*kind): results(runs, *kind) for kind in kinds}
    print(f"\nTest set, mean ± standard deviation (seeds: {FLAGS.seeds}):\n\n{table(found)}\n")
    if FLAGS.seeds > 1:
        print(f"Paired t-tests over the seeds:\n\n{paired_tests(found)}\n")
    draw(runs, pathlib.Path(FLAGS.output_dir, "validation_accuracy.png"))
    best = min(runs.values(), key=lambda run: run.validation["averaged"]["loss"])
    save_average(best.model, data.test[0])
    return check_saved_in_new_process()


if __name__ == "__main__":
    app.run(main)
