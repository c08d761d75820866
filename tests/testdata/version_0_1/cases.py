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
"""What the files of version 0.1 hold, and how a run is built, trained and read.

`write.py` and `tests/version_0_1_test.py` share it. Only the public API is used, so that it outlives what
is behind that.
"""

import pathlib
import re
from typing import Dict, List, NamedTuple, Tuple

import numpy as np
import tensorflow as tf
import tf_keras

import tf_averaging as tfav

DIRECTORY = pathlib.Path(__file__).parent
STEPS_BEFORE, STEPS_AFTER = 7, 20
BATCH = 8
START = 2  # The first averaged step.

GENERATIONS = {"current": tf_keras.optimizers, "legacy": tf_keras.optimizers.legacy}
INNER = {
    "adam": lambda generation: generation.Adam(0.05),
    "sgd": lambda generation: generation.SGD(0.05, momentum=0.9),
}


class Case(NamedTuple):
    """A run, and the file that it was saved to.

    Attributes:
      form: "checkpoint", a `tf.train.Checkpoint` of model and optimizer; "variables", one of a list of
        variables, trained in a loop of its own, and the optimizer; else the end of the name of a file
        that Keras writes.
      scheme: "swa" or "ema".
      generation: of the inner optimizer, a key of `GENERATIONS`.
      inner: a key of `INNER`.
      options: any of
        "loss_scaling": a LossScaleOptimizer is around the optimizer.
        "all": all variables are averaged, the statistics of BatchNormalization among them.
        "list": those of a list are averaged.
        "float16": Dense layers have float16 variables, whose averages are float32, with a stash.
        "begun": the first averaged step was set by `begin_averaging`.
        "statistics": those of the averages were computed by `update_batch_norm`.
        "swapped": saved while weights and averages were exchanged.
    """

    form: str
    scheme: str
    generation: str
    inner: str
    options: Tuple[str, ...] = ()

    @property
    def name(self) -> str:
        words = (self.form, self.scheme, self.generation, self.inner, *self.options)
        return "_".join(words).strip(".").replace(".", "_")

    @property
    def path(self) -> str:
        """What to restore or load."""
        is_checkpoint = self.form in ("checkpoint", "variables")
        return str(DIRECTORY / self.name / ("ckpt-1" if is_checkpoint else f"model{self.form}"))

    @property
    def keeps_weights_only(self) -> bool:
        """Whether version 0.1 lost the optimizer's state, as docs/saving.md says, with a warning.

        An `.h5` file keeps none under a LossScaleOptimizer, nor if a list of variables is averaged. The
        weights are those that the model held: the averages, if it was saved while swapped.
        """
        return self.form == ".h5" and not {"loss_scaling", "list"}.isdisjoint(self.options)


# Each format meets each scheme, generation, inner optimizer and option that there is for it.
CASES = [
    Case("checkpoint", "swa", "current", "adam"),
    Case("checkpoint", "ema", "legacy", "adam", ("loss_scaling",)),
    Case("checkpoint", "ema", "current", "sgd", ("all", "swapped")),
    Case("checkpoint", "swa", "legacy", "sgd", ("all", "loss_scaling")),
    Case("checkpoint", "ema", "legacy", "sgd", ("float16",)),
    Case("checkpoint", "swa", "current", "sgd", ("float16", "loss_scaling", "swapped")),
    Case("checkpoint", "swa", "legacy", "adam", ("list", "begun", "swapped")),
    Case("checkpoint", "swa", "current", "sgd", ("statistics",)),
    Case("variables", "swa", "current", "adam"),
    Case("variables", "ema", "legacy", "adam", ("loss_scaling", "swapped")),
    Case("variables", "ema", "current", "sgd", ("loss_scaling", "begun")),
    Case("variables", "swa", "legacy", "sgd", ("list", "swapped")),
    Case(".keras", "swa", "legacy", "adam"),
    Case(".keras", "ema", "current", "adam", ("loss_scaling", "swapped")),
    Case(".keras", "swa", "current", "sgd", ("all", "float16", "loss_scaling")),
    Case(".keras", "ema", "legacy", "adam", ("all", "begun", "swapped")),
    Case(".keras", "ema", "current", "sgd", ("float16", "loss_scaling")),
    Case(".keras", "swa", "legacy", "sgd", ("float16", "begun", "swapped")),
    Case(".keras", "swa", "current", "adam", ("list", "loss_scaling")),
    Case(".h5", "swa", "current", "adam"),
    Case(".h5", "ema", "legacy", "adam", ("swapped",)),
    Case(".h5", "swa", "legacy", "sgd", ("all", "float16")),
    Case(".h5", "ema", "current", "sgd", ("all", "swapped")),
    Case(".h5", "ema", "legacy", "sgd", ("float16",)),
    Case(".h5", "ema", "current", "sgd", ("float16", "begun", "swapped")),
    # These two keep the weights only.
    Case(".h5", "ema", "current", "adam", ("loss_scaling", "swapped")),
    Case(".h5", "swa", "legacy", "sgd", ("list",)),
    Case(".weights.h5", "ema", "legacy", "adam"),
    Case(".weights.h5", "swa", "current", "adam", ("loss_scaling", "swapped")),
    Case(".weights.h5", "ema", "current", "adam", ("all", "loss_scaling")),
    Case(".weights.h5", "swa", "legacy", "sgd", ("all", "float16", "swapped")),
    Case(".weights.h5", "swa", "current", "sgd", ("float16", "begun", "loss_scaling")),
    Case(".weights.h5", "ema", "legacy", "sgd", ("float16", "loss_scaling", "swapped")),
    Case(".weights.h5", "ema", "current", "adam", ("list",)),
]


class BareVariables:
    """Variables without a model, trained in a loop of its own; to be used like a model."""

    def __init__(self):
        shapes = {"first/kernel": [4, 3], "first/bias": [3], "second/kernel": [3, 1]}
        self.variables = [tf.Variable(tf.random.normal(shapes[name]), name=name) for name in shapes]
        self.trainable_variables = self.variables

    def compile(self, optimizer, loss: str) -> None:
        assert loss == "mse"
        self.optimizer = optimizer
        self._step = tf.function(self._take_step)

    def fit(self, x, y, batch_size: int, shuffle: bool, verbose: int) -> None:
        assert not shuffle
        for start in range(0, len(x), batch_size):
            self._step(*(tf.constant(array[start : start + batch_size]) for array in (x, y)))

    def _take_step(self, x, y) -> None:
        kernel, bias, last = self.variables
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((tf.tanh(x @ kernel + bias) @ last - y) ** 2)
        self.optimizer.minimize(loss, self.variables, tape=tape)


def new_model(case: Case, seed: int, built: bool = True, bare: bool = False):
    """A model as the case has it, compiled.

    Args:
      case: what kind of model, and which optimizer.
      seed: of the initial weights.
      built: whether the model has variables before it gets its first batch.
      bare: whether it is trained by the inner optimizer alone.
    """
    tf_keras.utils.set_random_seed(seed)
    if case.form == "variables":
        model = BareVariables()
    else:
        dtype = "float16" if "float16" in case.options else "float32"
        inputs = [tf_keras.layers.InputLayer((4,), dtype=dtype)] if built else []
        layers = [
            tf_keras.layers.Dense(3, activation="relu", dtype=dtype, name="hidden"),
            tf_keras.layers.BatchNormalization(dtype=dtype, name="bn"),
            tf_keras.layers.Dense(1, dtype=dtype, name="out"),
        ]
        model = tf_keras.Sequential(inputs + layers)
    optimizer = INNER[case.inner](GENERATIONS[case.generation])
    if not bare:
        optimizer = _around(optimizer, case)
    if "loss_scaling" in case.options:
        optimizer = tf_keras.mixed_precision.LossScaleOptimizer(
            optimizer, initial_scale=2.0**10, dynamic_growth_steps=3
        )
    model.compile(optimizer, "mse")
    return model


def _around(inner, case: Case) -> tfav.AveragedOptimizerWrapper:
    # Where `begin_averaging` sets the start, a restored run has it from the file.
    start = 0 if "begun" in case.options else START
    trainable_weights_only = "all" not in case.options
    if case.scheme == "swa":
        return tfav.SWA(inner, start, 3, trainable_weights_only=trainable_weights_only)
    return tfav.ExponentialMovingAverage(inner, trainable_weights_only, start_step=start)


def averaging(model) -> tfav.AveragedOptimizerWrapper:
    """The averaging optimizer of a model, which a LossScaleOptimizer may be around."""
    optimizer = model.optimizer
    is_outside = isinstance(optimizer, tfav.AveragedOptimizerWrapper)
    return optimizer if is_outside else optimizer.inner_optimizer


def checkpoint_of(case: Case, model) -> tf.train.Checkpoint:
    if case.form == "variables":
        return tf.train.Checkpoint(variables=model.variables, optimizer=model.optimizer)
    return tf.train.Checkpoint(model=model, optimizer=model.optimizer)


def say_what_is_averaged(case: Case, model) -> None:
    """Calls `shadow_copy` where a user must."""
    if "all" in case.options:
        averaging(model).shadow_copy(model)
    elif "list" in case.options:
        averaging(model).shadow_copy(averaged(case, model))


def build(case: Case, model) -> None:
    """Creates all variables, of the model and of the optimizer."""
    if case.form != "variables":
        model.build((None, 4))
    say_what_is_averaged(case, model)
    averaging(model).build(model.trainable_variables)


def averaged(case: Case, model) -> List[tf.Variable]:
    """The variables that have an average."""
    if "all" in case.options:
        return list(model.variables)
    if "list" in case.options:
        return [v for v in model.variables if "kernel" in v.name or "moving_mean" in v.name]
    return list(model.trainable_variables)


def train(model, first_step: int, steps: int) -> None:
    """Takes steps, each on a batch of its own; the numbers are those of the batches."""
    random = np.random.RandomState(0)
    x = random.normal(size=((STEPS_BEFORE + STEPS_AFTER) * BATCH, 4)).astype(np.float32)
    y = x[:, :1] - 2.0 * x[:, 1:2] * x[:, 2:3]
    rows = slice(first_step * BATCH, (first_step + steps) * BATCH)
    model.fit(x[rows], y[rows], batch_size=BATCH, shuffle=False, verbose=0)


def state_of(case: Case, model) -> Dict[str, np.ndarray]:
    """All that the file should hold, by name."""
    state = {f"weight/{v.name}": v.numpy() for v in model.variables}
    if case.keeps_weights_only:
        return state
    optimizer = averaging(model)
    state.update({f"average/{v.name}": optimizer.get_average(v).numpy() for v in averaged(case, model)})
    state.update(_inner_state_of(case, model))
    state["iterations"] = optimizer.iterations.numpy()
    state["num_averaged"] = optimizer.num_averaged.numpy()
    state["weights_swapped"] = np.array(optimizer.weights_swapped)
    state["start_averaging"] = np.array(optimizer.start_averaging)
    if "loss_scaling" in case.options:
        state["loss_scale"] = model.optimizer.loss_scale.numpy()
        state["dynamic_counter"] = model.optimizer.dynamic_counter.numpy()
    if "statistics" in case.options:
        with optimizer.swapped_weights():
            state.update({f"swapped/{v.name}": v.numpy() for v in model.non_trainable_variables})
    return state


def _inner_state_of(case: Case, model) -> Dict[str, np.ndarray]:
    """The inner optimizer's variables, by names that do not depend on how Keras came to create them."""
    inner = averaging(model).inner_optimizer
    if case.generation == "current":
        return {"inner/" + re.sub("^(Adam|SGD)/", "", v.name): v.numpy() for v in inner.variables}
    slots = {
        f"inner/{name}/{v.name}": inner.get_slot(v, name).numpy()
        for name in inner.get_slot_names()
        for v in model.trainable_variables
    }
    assert len(inner.weights) == 1 + len(slots)  # The other one is the number of steps.
    return slots
