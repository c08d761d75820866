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
"""Around an optimizer of Keras 3 the same holds as around one of tf_keras."""

import itertools
import os
import subprocess
import sys

import keras as keras_3
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import tf_averaging as tfav
from tests import file_formats
from tests import numpy_averages
from tests import testing_utils
from tests.testing_utils import BATCH
from tests.testing_utils import X
from tests.testing_utils import Y
from tests.testing_utils import assert_same_bits
from tests.testing_utils import averaging
from tests.testing_utils import fit_steps
from tests.testing_utils import read
from tests.testing_utils import read_all
from tests.testing_utils import with_loss_scaling
from tf_averaging import faces

OPTIMIZERS = keras_3.optimizers
SGD = OPTIMIZERS.SGD
DEFAULT = tf.distribute.get_strategy()


def new_model(optimizer=None, **options):
    return testing_utils.new_model(optimizer, keras=keras_3, **options)


def fit(make_optimizer, strategy=DEFAULT, build_model=new_model, **compile_options):
    """Six steps; the weights after each."""
    return testing_utils.fit(strategy, make_optimizer, build_model, keras=keras_3, **compile_options)


def everything(model) -> list:
    """The bits of the weights and of all that the optimizer has."""
    return testing_utils.bits([*read_all(model.variables), *averaging(model.optimizer).get_weights()])


# Steps.


@pytest.mark.parametrize("as_function", [False, True], ids=["eager", "function"])
@pytest.mark.parametrize("keras_variables", [False, True], ids=["tf", "keras"])
@pytest.mark.parametrize("method", ["apply", "apply_gradients"])
def test_custom_loop(strategy, method, keras_variables, as_function):
    def run(wrap) -> list:
        with strategy.scope():
            variable = (keras_3.Variable if keras_variables else tf.Variable)([1.0, 2.0])
            optimizer = wrap(SGD(0.1, momentum=0.9))
            optimizer.build([variable])

        def replica_step(step):
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            gradient = tf.stack([step + tf.cast(replica, tf.float32), 1.0])
            if method == "apply":
                optimizer.apply([gradient])
            else:
                optimizer.apply_gradients([(gradient, variable)])

        def train_step(step):
            strategy.run(replica_step, args=(step,))

        train_step = tf.function(train_step) if as_function else train_step
        history = [read(variable)]
        for step in range(4):
            train_step(tf.constant(float(step)))
            history.append(read(variable))
        return testing_utils.Run(optimizer, [variable], [[values] for values in history])

    scheme = numpy_averages.ema(0.5, dynamic=False)
    wrapped = run(scheme.wrap)
    testing_utils.assert_same_training(run(lambda optimizer: optimizer), wrapped)
    testing_utils.assert_averages(wrapped, scheme)


def test_constraint_is_applied_once_and_before_the_update():
    variable = keras_3.Variable(1.0)
    calls = []
    variable.constraint = lambda value: calls.append(1) or keras_3.ops.maximum(value, 0.5)
    optimizer = tfav.SWA(SGD(1.0), 0, 1)
    optimizer.apply([tf.constant(3.0)], [variable])
    assert len(calls) == 1
    assert variable.numpy() == optimizer.get_average(variable) == 0.5


@pytest.mark.parametrize("as_function", [False, True], ids=["eager", "function"])
@pytest.mark.parametrize("several", [False, True], ids=["", "MultiOptimizer"])
def test_accumulating_gradients_counts_steps_that_move_weights(several, as_function):
    inner = SGD(1.0, gradient_accumulation_steps=2)
    if several:
        inner = OPTIMIZERS.MultiOptimizer(OPTIMIZERS.OptimizerMap(inner))
    optimizer, variable = tfav.SWA(inner, 1, 2), keras_3.Variable(0.0)
    optimizer.build([variable])

    def step():
        optimizer.apply([tf.constant(1.0)], [variable])

    step = tf.function(step) if as_function else step
    averages = []
    for _ in range(8):
        step()
        averages.append((float(optimizer.get_average(variable)), int(optimizer.num_averaged)))
    # The weights are 0, -1, -1, -2, ..., and -2 and -4 are averaged; until then the average is them.
    assert averages == [(0, 0)] + [(-1, 0)] * 2 + [(-2, 1)] * 4 + [(-3, 2)]


def test_parts_that_accumulate_different_numbers_of_gradients():
    parts = [SGD(1.0, gradient_accumulation_steps=steps) for steps in (2, 3)]
    one, other = keras_3.Variable(0.0, name="one"), keras_3.Variable(0.0, name="other")
    optimizer = tfav.SWA(
        OPTIMIZERS.MultiOptimizer(OPTIMIZERS.OptimizerMap(parts[0], {other.path: parts[1]})), 0, 1
    )
    optimizer.build([one, other])
    step = tf.function(lambda: optimizer.apply([tf.constant(1.0)] * 2, [one, other]))
    averages = []
    for _ in range(12):
        step()
        averages.append(
            (*(float(optimizer.get_average(v)) for v in (one, other)), int(optimizer.num_averaged))
        )
    # Steps 2, 3, 4, 6, 8, 9, 10 and 12 move weights: one to -1, -1, -2, -3, -4, -4, -5, -6.
    assert averages[1] == (-1, 0, 1)
    assert averages[5] == (-7 / 4, -4 / 4, 4)
    assert averages[11] == (-26 / 8, -(0 + 1 + 1 + 2 + 2 + 3 + 3 + 4) / 8, 8)


@pytest.mark.parametrize("steps_of_unused", [None, 2])
def test_part_that_trains_nothing_counts_no_moves(steps_of_unused):
    unused = SGD(1.0, gradient_accumulation_steps=steps_of_unused)
    inner = OPTIMIZERS.OptimizerMap(SGD(1.0, gradient_accumulation_steps=3), {"nothing/.*": unused})
    optimizer, variable = tfav.SWA(OPTIMIZERS.MultiOptimizer(inner), 0, 1), keras_3.Variable(0.0)
    for _ in range(6):
        optimizer.apply([tf.constant(1.0)], [variable])
    assert optimizer.num_averaged == 2
    assert optimizer.get_average(variable) == -1.5


@pytest.mark.parametrize("follow", [False, True])
def test_variables_that_gradients_overwrite_are_passed_over(follow):
    class Layer(keras_3.layers.Layer):
        def build(self, input_shape):
            self.kernel = self.add_weight(shape=[], initializer="ones")
            self.scale = self.add_weight(shape=[], initializer="ones")
            self.scale.overwrite_with_gradient = True

    layer = Layer()
    layer.build([1])
    optimizer = tfav.SWA(SGD(1.0), 0, 1, trainable_weights_only=not follow)
    if follow:
        optimizer.shadow_copy(layer)
    for _ in range(2):
        optimizer.apply([tf.constant(1.0), tf.constant(7.0)], [layer.kernel, layer.scale])
    assert layer.scale.numpy() == 7.0
    assert optimizer.get_average(layer.kernel) == -0.5
    with pytest.raises(KeyError):
        optimizer.get_average(layer.scale)


@pytest.mark.parametrize(
    ("policy", "skips", "dtype"),
    [
        ("mixed_float16", True, "float32"),
        ("mixed_bfloat16", False, "float32"),
        ("float16", False, "float16"),
    ],
)
def test_mixed_precision(policy, skips, dtype):
    keras_3.mixed_precision.set_global_policy(policy)
    model = new_model(tfav.ExponentialMovingAverage(SGD(0.01), average_decay=0.5, dynamic_decay=False))
    optimizer, weights = averaging(model.optimizer), model.trainable_variables
    history = [read_all(weights)]
    for step in range(5):
        inputs = X[:BATCH].copy()
        inputs[0, 0] = np.inf if skips and step == 2 else 1.0
        model.train_on_batch(inputs, Y[:BATCH])
        history.append(read_all(weights))
    assert weights[0].dtype == dtype
    run = testing_utils.Run(optimizer, weights, history)
    scheme = numpy_averages.ema(0.5, dynamic=False)
    testing_utils.assert_averages(run, scheme, skipped=[2] if skips else [])
    assert optimizer.get_slot(weights[0], "average").dtype == tf.float32


def test_statistics_on_replicas_under_loss_scaling(mirrored_strategy):
    """Statistics of BatchNormalization differ between the replicas, and so do their averages."""

    def train(wrap):
        model = new_model(
            lambda: wrap(SGD(0.1, momentum=0.9)),
            batch_norm=True,
            loss_scaling=True,
            strategy=mirrored_strategy,
        )
        if wrap is swa:
            averaging(model.optimizer).shadow_copy(model)
        history = []
        look = keras_3.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: history.append(read_all(model.variables))
        )
        fit_steps(model, 6, [look])
        return model, history

    def swa(inner):
        return tfav.SWA(inner, 0, 1, trainable_weights_only=False)

    _, expected = train(lambda inner: inner)
    model, history = train(swa)
    for bare, wrapped in zip(expected, history):
        assert_same_bits(wrapped, bare)
    optimizer, averaged = averaging(model.optimizer), 0
    for index, variable in enumerate(model.variables):
        if testing_utils.has_average(optimizer, variable):
            averaged += 1
            mean = np.mean([values[index].astype(np.float64) for values in history], axis=0)
            average = read(optimizer.get_slot(variable, "average"))
            np.testing.assert_allclose(average, mean, rtol=3e-6, atol=3e-6)
    assert averaged == 8
    first, second = read(optimizer.get_slot(model.get_layer("bn").moving_mean, "average"))
    assert not np.array_equal(first, second)


# Files.


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("form", ["ckpt", "x.keras", "x.weights.h5"])
@with_loss_scaling
def test_files_of_a_bare_optimizer(form, late, loss_scaling, tmp_path):
    bare = new_model(OPTIMIZERS.Adam(0.02), loss_scaling=loss_scaling)
    fit_steps(bare, 5)
    make = lambda: tfav.SWA(OPTIMIZERS.Adam(0.02), 0, 1)  # noqa: E731
    model = new_model(make, loss_scaling=loss_scaling, seed=2)
    if late:
        fit_steps(model, 2)
    elif form != "ckpt":
        model.optimizer.build(model.trainable_variables)
    if form == "ckpt":
        path = file_formats.checkpoint_of(bare).save(tmp_path / form)
        load = file_formats.checkpoint_of(model).restore
    else:
        path, load = tmp_path / form, model.load_weights
        (bare.save if form == "x.keras" else bare.save_weights)(path)
    with pytest.warns(UserWarning, match="without averages. They start from the weights"):
        load(path)
    for each in (bare, model):
        fit_steps(each, 3)
    assert_same_bits(read_all(model.variables), read_all(bare.variables))
    inner = getattr(bare.optimizer, "inner_optimizer", bare.optimizer)
    optimizer = averaging(model.optimizer)
    assert_same_bits(read_all(optimizer.inner_optimizer.variables), read_all(inner.variables))
    assert (int(optimizer.iterations), int(optimizer.num_averaged)) == (8, 3)


SCHEME = """
import sys
import keras, tf_keras
import numpy as np
import tf_averaging as tfav

@keras.saving.register_keras_serializable("mine")
@tf_keras.saving.register_keras_serializable("mine")
class RunningMean(tfav.AveragedOptimizerWrapper):
    def averaging_weight(self, steps, updates):
        return 1 / (updates + 1)
"""
SAVE = """
for library in (keras, tf_keras):
    for scheme in (tfav.SWA, tfav.ExponentialMovingAverage, RunningMean):
        model = library.Sequential([library.Input([2]), library.layers.Dense(1)])
        model.compile(scheme(library.optimizers.SGD(0.1)), "mse")
        model.fit(np.ones([4, 2]), np.ones([4, 1]), verbose=0)
        model.save(f"{sys.argv[1]}/{library.__name__}-{scheme.__name__}.keras")
"""
LOAD = """
for library in (keras, tf_keras):
    for scheme in (tfav.SWA, tfav.ExponentialMovingAverage, RunningMean):
        model = library.models.load_model(f"{sys.argv[1]}/{library.__name__}-{scheme.__name__}.keras")
        assert isinstance(model.optimizer, scheme), model.optimizer
        assert isinstance(model.optimizer, library.optimizers.Optimizer), model.optimizer
        assert model.optimizer.num_averaged == 1
"""


def test_model_is_loaded_in_a_new_process(tmp_path):
    for program in (SAVE, LOAD):
        subprocess.run([sys.executable, "-c", SCHEME + program, str(tmp_path)], check=True, timeout=300)


def test_clone_of_a_model_has_its_own_averages():
    model = new_model(tfav.SWA(SGD(0.1), 0, 1))
    fit_steps(model, 2)
    clone = keras_3.models.clone_model(model)
    assert isinstance(clone.optimizer, tfav.SWA)
    assert clone.optimizer is not model.optimizer
    assert clone.optimizer.num_averaged == 0


def test_export(tmp_path):
    model = new_model(tfav.SWA(SGD(0.1), 0, 1))
    fit_steps(model, 2)
    with model.optimizer.swapped_weights():
        model.export(tmp_path, verbose=False)
        expected = model.predict(X, verbose=0)
    exported = tf.saved_model.load(tmp_path)
    np.testing.assert_allclose(exported.serve(X), expected, rtol=1e-6)


# Settings, and what belongs together.


def test_settings_reach_the_inner_optimizer():
    inner = OPTIMIZERS.AdamW(0.1, loss_scale_factor=8.0, gradient_accumulation_steps=2)
    optimizer = tfav.SWA(inner)
    optimizer.learning_rate, optimizer.weight_decay, optimizer.beta_1 = 0.25, 0.5, 0.75
    assert (float(inner.learning_rate), inner.weight_decay, inner.beta_1) == (0.25, 0.5, 0.75)
    assert optimizer.scale_loss(tf.constant(2.0)) == 16.0
    optimizer.loss_scale_factor = 4.0
    assert inner.loss_scale_factor == optimizer.loss_scale_factor == 4.0
    assert optimizer.gradient_accumulation_steps == 2
    weight = keras_3.Variable(1.0, name="kernel")
    optimizer.exclude_from_weight_decay(var_names=["kernel"])
    optimizer.build([weight])
    assert not inner._use_weight_decay(weight)


def test_variables_are_all_state_as_keras_variables():
    optimizer = tfav.SWA(OPTIMIZERS.Adam(), 0, 1)
    weight = keras_3.Variable([1.0, 2.0])
    optimizer.build([weight])
    assert all(isinstance(variable, type(weight)) for variable in optimizer.variables)
    assert [id(v) for v in optimizer.variables] == [id(v) for v in optimizer.variables]
    assert_same_bits(testing_utils.values(optimizer.variables), optimizer.get_weights())
    assert any(v._value is optimizer.get_slot(weight, "average") for v in optimizer.variables)


@pytest.mark.parametrize(
    ("config", "library"),
    [
        ("adam", keras_3),
        ({"class_name": "Adam", "config": {}}, keras_3),
        (OPTIMIZERS.serialize(OPTIMIZERS.Adam()), keras_3),
        (tf_keras.optimizers.serialize(tf_keras.optimizers.Adam()), tf_keras),
        (tf_keras.optimizers.serialize(tf_keras.optimizers.legacy.Adam()), tf_keras),
    ],
)
def test_names_and_configs_mean_what_tf_keras_is(config, library):
    optimizer = tfav.SWA(config)
    assert isinstance(optimizer, library.optimizers.Optimizer)
    again = tfav.SWA.from_config(optimizer.get_config())
    assert isinstance(again, library.optimizers.Optimizer)
    assert again.get_config() == optimizer.get_config()


def test_config_says_of_which_keras_an_optimizer_is():
    """Even where that of the inner one does not."""

    @tf_keras.saving.register_keras_serializable("keras3_test")
    class Silent(tf_keras.optimizers.legacy.SGD):
        def get_config(self):
            return {"name": "silent"}

    config = tfav.SWA(Silent()).get_config()
    assert tfav.SWA.from_config(config).keras_name == "tf_keras"


def test_where_tf_keras_takes_its_place():
    """Names mean tf_keras then. Nothing of Keras 3 is imported before an optimizer of it is wrapped.

    And what is said of another backend, before that.
    """
    program = """
import sys
import tf_averaging as tfav
assert tfav.SWA("sgd").keras_name == "tf_keras"
assert "keras" not in sys.modules
import keras
backend, keras.backend.backend = keras.backend.backend, lambda: "jax"
try:
    tfav.SWA(keras.optimizers.SGD())
except RuntimeError as error:
    assert "KERAS_BACKEND=tensorflow" in str(error) and "'jax'" in str(error), error
else:
    raise AssertionError
keras.backend.backend = backend
optimizer = tfav.SWA(keras.optimizers.SGD())
assert tfav.SWA.from_config(optimizer.get_config()).keras_name == "keras"
again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
assert isinstance(again, tfav.SWA) and isinstance(again, keras.optimizers.Optimizer)
other = keras.saving.get_registered_object("tf_averaging>ExponentialMovingAverage")
assert other is tfav.ExponentialMovingAverage
"""
    environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=300)


def test_checkpoint_has_the_inner_optimizer_and_the_averages(tmp_path):
    model = new_model(tfav.SWA(SGD(0.1), 0, 1))
    fit_steps(model, 1)
    path = tf.train.Checkpoint(optimizer=model.optimizer).save(tmp_path / "ckpt")
    children = model.optimizer._trackable_children().keys()
    assert children == {"inner_optimizer", "averages", "own_variables"}
    keys = [key for key, _ in tf.train.list_variables(path)]
    assert "optimizer/averages/swapped/.ATTRIBUTES/VARIABLE_VALUE" in keys


SCHEDULES = {keras: keras.optimizers.schedules.CosineDecay(0.1, 9) for keras in (keras_3, tf_keras)}


@pytest.mark.parametrize(("one", "other"), [(keras_3, tf_keras), (tf_keras, keras_3)])
def test_what_is_of_two_kerases(one, other):
    names = {keras_3: "Keras 3", tf_keras: "tf_keras"}
    message = f"optimizer is of {names[one]}. Received what comes from {names[other]}"
    optimizer = tfav.SWA(one.optimizers.SGD(0.1))
    model = other.Sequential([other.Input([2]), other.layers.Dense(1)])
    with pytest.raises(TypeError, match=message):
        optimizer.shadow_copy(model)
    message = f"optimizer is of {names[one]}. Received one of {names[other]}"
    with pytest.raises(TypeError, match=message):
        tfav.SWA(one.optimizers.SGD(), learning_rate=SCHEDULES[other])
    with pytest.raises(TypeError, match=message):
        optimizer.learning_rate = SCHEDULES[other]
    assert float(optimizer.learning_rate) == np.float32(0.1)


@pytest.mark.parametrize(
    ("inner", "error", "message"),
    [
        (lambda: OPTIMIZERS.LossScaleOptimizer(SGD()), TypeError, "goes around the averaging optimizer"),
        (lambda: SGD(use_ema=True), ValueError, "use_ema=True"),
        (
            lambda: OPTIMIZERS.MultiOptimizer(OPTIMIZERS.OptimizerMap(SGD(use_ema=True))),
            ValueError,
            "use_ema=True",
        ),
        (lambda: SGD, TypeError, "a class, not an optimizer"),
    ],
)
def test_what_cannot_be_wrapped(inner, error, message):
    with pytest.raises(error, match=message):
        tfav.SWA(inner())


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(faces.CLIPPING, 2)))
def test_second_kind_of_clipping(one, other):
    with pytest.raises(ValueError, match=f"Expected at most one of .*{other}"):
        tfav.SWA(SGD(**{one: 1.0}), **{other: 0.1})


@pytest.mark.parametrize("settings", [{"clipnorm": 1.0}, {"learning_rate": 0.5}])
def test_settings_of_a_multi_optimizer(settings):
    inner = OPTIMIZERS.MultiOptimizer(OPTIMIZERS.OptimizerMap(SGD()))
    with pytest.raises(ValueError, match="Expected them where its parts are created"):
        tfav.SWA(inner, **settings)
    optimizer = tfav.SWA(inner)
    for name, value in settings.items():
        with pytest.raises((AttributeError, ValueError), match="MultiOptimizer"):
            setattr(optimizer, name, value)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda o, v: o.apply([None], [v]), ValueError, "No gradients provided"),
        (lambda o, v: o.apply([tf.constant(1.0)]), ValueError, r"build\(trainable_variables\)"),
        (lambda o, v: o.apply_gradients([(tf.constant(1.0), 3)]), TypeError, "Expected .*pairs"),
        (lambda o, v: o.apply([tf.constant(1.0)], 3), TypeError, "Expected a list of variables"),
    ],
)
def test_step_that_cannot_be_taken(call, error, message):
    optimizer, variable = tfav.SWA(SGD(1.0), 0, 1), keras_3.Variable(1.0)
    with pytest.raises(error, match=message):
        call(optimizer, variable)
    assert variable.numpy() == 1.0
    assert not optimizer.has_shadow_copy
    assert optimizer.iterations.numpy() == 0


def test_variable_that_the_optimizer_was_not_built_with():
    model = new_model(tfav.SWA(SGD(0.1), 0, 1))
    fit_steps(model, 2)
    before = everything(model)
    with pytest.raises(ValueError, match="Unknown variable"):
        model.optimizer.apply([tf.constant(1.0)], [keras_3.Variable(1.0)])
    assert everything(model) == before


def test_cross_replica_context(mirrored_strategy):
    with mirrored_strategy.scope():
        variable, optimizer = keras_3.Variable(1.0), tfav.SWA(SGD())
        with pytest.raises(RuntimeError, match="cross-replica context.*`tf.distribute.Strategy.run`"):
            optimizer.apply([tf.constant(1.0)], [variable])
