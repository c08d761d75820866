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
"""TensorFlow Models' Trainer: `run_experiment` evaluates, exports and resumes averages.

The code is the migration guide's own. It runs in float32 on one device, where statistics of
BatchNormalization are averaged too, and in float16 on two replicas, where the first steps are skipped.
"""

import json
import pathlib
import tempfile
from typing import NamedTuple

import numpy as np
import tensorflow as tf
import tf_keras
from official.core import base_task
from official.core import base_trainer
from official.core import config_definitions
from official.core import export_base
from official.core import train_lib
from official.core import train_utils
from official.modeling import optimization
from official.modeling import performance
from official.modeling.optimization import ema_optimizer

from tests import markdown_code
from tests import numpy_averages
from tests.clients import recording

GUIDE = markdown_code.ROOT / "docs" / "migration.md"
ADAPTER, TRAIN, GIN = (
    "\n".join(block.lines)
    for block in markdown_code.blocks_of(GUIDE)
    if block.heading == "TensorFlow Models' Trainer"
)
SCHEME = numpy_averages.ema(0.9, start=2)
STEPS, EVERY = 24, 4  # Steps in all, and from one evaluation to the next.

random = np.random.default_rng(0)
inputs = random.normal(size=(32, 3)).astype(np.float32)
targets = 10 * np.abs(inputs).sum(1, keepdims=True)
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
guide = {}
exec(ADAPTER, guide)


class Case(NamedTuple):
    strategy: tf.distribute.Strategy
    precision: str
    optimizer: str
    trainable_weights_only: bool
    tolerance: float


class Regression(base_task.Task):
    def build_model(self):
        layers = tf_keras.layers
        return tf_keras.Sequential(
            [
                layers.Dense(8, activation="relu", input_shape=(3,)),
                layers.BatchNormalization(momentum=0.5),
                layers.Dense(1, dtype="float32"),
            ]
        )

    def build_inputs(self, params, input_context=None):
        data = tf.data.Dataset.from_tensors((inputs, targets))  # Each replica gets all of it.
        return data.repeat() if params.is_training else data.repeat(2)

    def build_losses(self, labels, model_outputs, aux_losses=None):
        return tf.reduce_mean((labels - model_outputs) ** 2)


class RecordingTrainer(guide["AveragingTrainer"]):
    """Keeps the model's variables after each loop of training, and the losses of evaluations."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.record = recording.Record(self.model.variables)
        self.losses = {}

    def train_loop_end(self):
        self.record.add()
        return super().train_loop_end()

    def evaluate(self, num_steps):
        logs = super().evaluate(num_steps)
        self.losses[self.global_step.numpy()] = float(logs["validation_loss"])
        return logs


class Serving(export_base.ExportModule):
    @tf.function
    def serve(self, inputs):
        return {"predicted": self.inference_step(inputs)}

    def get_inference_signatures(self, function_keys):
        (key,) = function_keys.values()
        return {key: self.serve.get_concrete_function(tf.TensorSpec([None, 3], name="inputs"))}


def experiment(case, steps, steps_per_loop):
    """An experiment's config."""
    ema = {"average_decay": 0.9, "start_step": 2, "trainable_weights_only": case.trainable_weights_only}
    cosine = {"type": "cosine", "cosine": {"initial_learning_rate": 0.05, "decay_steps": 100}}
    return config_definitions.ExperimentConfig(
        task=config_definitions.TaskConfig(
            train_data=config_definitions.DataConfig(is_training=True),
            validation_data=config_definitions.DataConfig(is_training=False),
        ),
        trainer=config_definitions.TrainerConfig(
            optimizer_config=optimization.OptimizationConfig(
                {"optimizer": {"type": case.optimizer}, "learning_rate": cosine, "ema": ema}
            ),
            train_steps=steps,
            steps_per_loop=steps_per_loop,
            summary_interval=steps_per_loop,
            checkpoint_interval=EVERY,
            validation_interval=EVERY,
            best_checkpoint_export_subdir="best",
            best_checkpoint_eval_metric="validation_loss",
            best_checkpoint_metric_comp="lower",
        ),
        runtime=config_definitions.RuntimeConfig(mixed_precision_dtype=case.precision),
    )


def train(case, directory, steps, steps_per_loop):
    """Runs the guide's code. Returns its trainer."""
    params = experiment(case, steps, steps_per_loop)
    names = {**guide, "AveragingTrainer": RecordingTrainer, "strategy": case.strategy, "params": params}
    names.update(task=Regression(params.task), model_dir=str(directory))
    tf_keras.utils.set_random_seed(0)
    exec(TRAIN, names)
    return names["trainer"]


def variables_with_averages(case, trainer, step):
    """The model's variables after some steps: in float64, averages in place of what is averaged."""
    history = trainer.record.steps[: step + 1]
    trainable = [index for index, v in enumerate(trainer.record.variables) if v.trainable]
    skipped = [
        step
        for step, (before, after) in enumerate(zip(history, history[1:]))
        if all(np.array_equal(before[index], after[index]) for index in trainable)
    ]
    assert len(skipped) in (range(1, 10) if case.precision == "float16" else [0])
    return [
        numpy_averages.expected_average(SCHEME, values, skipped)
        if index in trainable or not case.trainable_weights_only
        else values[-1]
        for index, values in enumerate(zip(*history))
    ]


def predictions(variables):
    kernel, bias, gamma, beta, mean, variance, out, out_bias = variables
    hidden = np.maximum(inputs @ kernel + bias, 0)
    return (gamma * (hidden - mean) / np.sqrt(variance + 1e-3) + beta) @ out + out_bias


def loss(variables):
    return np.mean((predictions(variables) - targets) ** 2)


def validation_loss(trainer_class, trainer):
    with trainer.strategy.scope():
        return float(trainer_class.evaluate(trainer, tf.constant(-1))["validation_loss"])


def model_of(directory):
    """The variables that `tf.train.Checkpoint(model=...)` reads from the last checkpoint in a folder."""
    model = Regression(None).build_model()
    path = tf.train.latest_checkpoint(str(directory))
    tf.train.Checkpoint(model=model).read(path).assert_existing_objects_matched().expect_partial()
    return [variable.numpy() for variable in model.variables]


def assert_equal(actual, expected):
    """Two lists of arrays agree to the last bit."""
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        np.testing.assert_array_equal(a, b)


def state(directory):
    """All that the last checkpoint in a folder holds, but for the number of checkpoints."""
    reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(directory)))
    names = [name for name in reader.get_variable_to_shape_map() if "save_counter" not in name]
    names.remove("_CHECKPOINTABLE_OBJECT_GRAPH")
    return {name: reader.get_tensor(name) for name in names}


def check_run(case, directory):
    """What validation measures, what the files hold, and whether a resumed run is the same.

    Returns:
      The trainer of a run from start to end, and the variables of the best averages.
    """
    trainer = train(case, directory / "straight", STEPS, steps_per_loop=1)
    averaged = {step: variables_with_averages(case, trainer, step) for step in trainer.losses}
    assert list(trainer.losses) == list(range(EVERY, STEPS + 1, EVERY))
    for step, measured in trainer.losses.items():
        np.testing.assert_allclose(measured, loss(averaged[step]), rtol=case.tolerance)
    raw = trainer.record.steps[STEPS]
    assert abs(loss(raw) / trainer.losses[STEPS] - 1) > 5 * case.tolerance, "This shows nothing."

    best = json.loads((directory / "straight/best/info.json").read_text())
    best_step = int(best["best_ckpt_global_step"])
    assert best["validation_loss"] == min(trainer.losses.values()) == trainer.losses[best_step]
    recording.assert_close(model_of(directory / "straight/best"), averaged[best_step])
    recording.assert_close(model_of(directory / "straight/ema_checkpoints"), averaged[STEPS])
    assert_equal(model_of(directory / "straight"), raw)

    for steps in (STEPS // 2, STEPS):
        train(case, directory / "resumed", steps, steps_per_loop=EVERY)
    straight, resumed = state(directory / "straight"), state(directory / "resumed")
    assert straight.keys() == resumed.keys()
    assert_equal(straight.values(), [resumed[name] for name in straight])
    return trainer, averaged[best_step]


def new_trainer(case, trainer_class):
    """One that exports no best checkpoint."""
    params = experiment(case, STEPS, steps_per_loop=1)
    with case.strategy.scope():
        return train_utils.create_trainer(
            params, Regression(params.task), train=True, evaluate=True, trainer_cls=trainer_class
        )


def check_best_checkpoint(case, directory, straight, averaged):
    """What is measured, trained and exported from a file that was saved with the averages in."""
    best = tf.train.latest_checkpoint(str(directory / "straight/best"))
    trainer = new_trainer(case, guide["AveragingTrainer"])
    trainer.checkpoint.restore(best).assert_existing_objects_matched()
    for trainer_class in (guide["AveragingTrainer"], base_trainer.Trainer):
        assert trainer.averaging.weights_swapped
        measured = validation_loss(trainer_class, trainer)
        np.testing.assert_allclose(measured, loss(averaged), rtol=case.tolerance)

    with case.strategy.scope():
        straight.train(tf.constant(1))
        trainer.train(tf.constant(STEPS + 1) - trainer.global_step.numpy())
    assert_equal(trainer.model.variables, straight.record.steps[STEPS + 1])
    # Without the guide's trainer it would be the weights that are measured.
    measured = validation_loss(base_trainer.Trainer, trainer)
    np.testing.assert_allclose(measured, loss(straight.record.steps[STEPS + 1]), rtol=case.tolerance)

    export_base.export(
        Serving(None, Regression(None).build_model()),
        ["serving_default"],
        str(directory / "exported"),
        checkpoint_path=best,
        timestamped=False,
    )
    served = tf.saved_model.load(str(directory / "exported")).signatures["serving_default"]
    predicted = served(inputs=tf.constant(inputs))["predicted"]
    np.testing.assert_allclose(predicted, predictions(averaged), rtol=case.tolerance, atol=1e-3)


def check_evaluation_alone(case, directory, expected):
    """A process that evaluates the last checkpoint, and gets its trainer from gin."""
    exec(GIN, dict(guide))
    params = experiment(case, STEPS, steps_per_loop=1)
    _, logs = train_lib.run_experiment(
        case.strategy, Regression(params.task), "eval", params, str(directory / "straight"), True
    )
    np.testing.assert_allclose(float(logs["validation_loss"]), expected, rtol=1e-6)


def check_migration(case, directory, straight):
    """A run that TensorFlow Models' own optimizer began goes on from its weights and averages."""
    half = STEPS // 2
    ema_optimizer.ExponentialMovingAverage = optimization.ExponentialMovingAverage
    params = experiment(case, half, steps_per_loop=1)
    tf_keras.utils.set_random_seed(0)
    theirs = new_trainer(case, base_trainer.Trainer)
    exec(ADAPTER, {})
    train_lib.run_experiment(case.strategy, theirs.task, "train", params, str(directory), trainer=theirs)
    assert isinstance(theirs.optimizer, optimization.ExponentialMovingAverage)
    averages = [
        theirs.optimizer.get_slot(variable, "average").numpy().astype(np.float64)
        for variable in theirs.model.variables
    ]
    ours = train(case, directory, STEPS, steps_per_loop=1)
    history = ours.record.steps[1:]  # Those before training are not yet restored.
    assert len(history) == STEPS - half
    for step, values in enumerate(history, half):
        averages = [
            average + SCHEME.weight(step - SCHEME.start, None) * (value - average)
            for average, value in zip(averages, values)
        ]
    recording.assert_close(list(map(ours.averaging.get_average, ours.model.variables)), averages)
    assert_equal(ours.model.variables, straight.record.steps[STEPS])


float32 = Case(tf.distribute.OneDeviceStrategy("CPU:0"), "float32", "adamw", False, 1e-4)
float16 = Case(
    tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), "float16", "adam_experimental", True, 1e-2
)
for case in (float32, float16):
    performance.set_mixed_precision_policy(getattr(tf, case.precision))
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder)
        trainer, averaged = check_run(case, directory)
        check_best_checkpoint(case, directory, trainer, averaged)
        check_evaluation_alone(case, directory, trainer.losses[STEPS])
        if case is float32:  # Theirs cannot train in float16.
            check_migration(case, directory / "theirs", trainer)

recording.report("tf-models-official", "tensorflow", "tf_keras")
