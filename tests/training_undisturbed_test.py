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
"""Averaging never perturbs training: weights are bit-identical to the inner optimizer's alone."""

import functools
import threading
from typing import Any, Dict, NamedTuple

import keras as keras_3
import numpy as np
import pytest
import tensorflow as tf

import tf_averaging as tfav
from tests import numpy_averages
from tests import testing_utils
from tests.numpy_averages import EMA
from tests.numpy_averages import SWA
from tests.testing_utils import CURRENT
from tests.testing_utils import KERAS
from tests.testing_utils import LEGACY
from tests.testing_utils import both_generations

# Every optimizer that tf_keras ships, in the variants that keep state of different kinds.
VARIANTS = {
    CURRENT: {
        "SGD": [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}],
        "Adam": [{}, {"amsgrad": True}],
        "AdamW": [{}],
        "Nadam": [{}],
        "RMSprop": [{}, {"centered": True, "momentum": 0.9}],
        "Adagrad": [{}],
        "Adadelta": [{}],
        "Adamax": [{}],
        "Adafactor": [{}],
        "Lion": [{}],
        "Ftrl": [{}],
    },
    LEGACY: {
        "SGD": [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}],
        "Adam": [{}, {"amsgrad": True}],
        "Nadam": [{}],
        "RMSprop": [{}, {"centered": True, "momentum": 0.9}],
        "Adagrad": [{}],
        "Adadelta": [{}],
        "Adamax": [{}],
        "Ftrl": [{}],
    },
}


class Inner(NamedTuple):
    """An inner optimizer, to be made as often as needed."""

    cls: type
    options: Dict[str, Any]

    def __call__(self):
        return self.cls(**{"learning_rate": 0.1, **self.options})

    def __str__(self):
        generation = "legacy" if issubclass(self.cls, LEGACY.Optimizer) else "current"
        return "-".join([generation, self.cls.__name__] + [f"{k}={v}" for k, v in self.options.items()])


def variants():
    return [
        Inner(getattr(module, name), options)
        for module, classes in VARIANTS.items()
        for name, choices in classes.items()
        for options in choices
    ]


every_optimizer = pytest.mark.parametrize("inner", variants(), ids=str)
# For what is slow and hardly depends on the combination: each value is met, not each pair of values.
each_once = pytest.mark.parametrize(
    ("strategy", "module", "scheme"),
    [("default", CURRENT, SWA), ("mirrored", LEGACY, EMA)],
    indirect=["strategy"],
    ids=["default-current-SWA", "mirrored-legacy-EMA"],
)


def check(strategy, make_inner, scheme, train=testing_utils.train, wrap=None, untrained=(), **options):
    """Trains without and with averaging, asserts what must hold, and returns both runs.

    Args:
      strategy: to train under.
      make_inner: makes the inner optimizer.
      scheme: how to average.
      train: `testing_utils.train` or `testing_utils.fit`.
      wrap: makes the wrapper, if not `scheme` around `make_inner()`.
      untrained: positions of variables that training does not change.
      **options: for `train`.
    """
    bare = train(strategy, make_inner, **options)
    for index, (first, last) in enumerate(zip(bare.history[0], bare.history[-1])):
        assert np.array_equal(first, last) == (index in untrained), index
    wrapped = train(strategy, wrap or (lambda: scheme.wrap(make_inner())), **options)
    testing_utils.assert_same_training(bare, wrapped)
    testing_utils.assert_averages(wrapped, scheme)
    return bare, wrapped


def differ(first, second):
    """Whether two runs left different weights: a setting under test had an effect."""
    return any(not np.array_equal(a, b) for a, b in zip(first.history[-1], second.history[-1]))


@both_generations
def test_table_has_every_optimizer(module):
    assert testing_utils.shipped_optimizers(module).keys() == VARIANTS[module].keys()


DENSE_AND_SPARSE = [testing_utils.KERNEL, testing_utils.TABLE]


@every_optimizer
def test_every_optimizer_in_eager_mode(inner, strategy):
    check(strategy, inner, EMA, values=DENSE_AND_SPARSE, steps=3)


@every_optimizer
def test_every_optimizer_in_function(inner):
    check(tf.distribute.get_strategy(), inner, SWA, values=DENSE_AND_SPARSE, as_function=True)


@pytest.mark.parametrize(
    "inner", [Inner(CURRENT.Adam, {}), Inner(LEGACY.RMSprop, {"momentum": 0.9})], ids=str
)
def test_function_on_replicas(inner, mirrored_strategy):
    check(mirrored_strategy, inner, SWA, values=DENSE_AND_SPARSE, as_function=True)


@pytest.mark.parametrize(
    "options",
    [{}, {"run_eagerly": True}, {"steps_per_execution": 2}, {"jit_compile": True}],
    ids=lambda options: next(iter(options), "plain"),
)
@pytest.mark.parametrize(
    ("inner", "scheme"),
    [(Inner(CURRENT.SGD, {"momentum": 0.9}), numpy_averages.swa(1, 2)), (Inner(LEGACY.Nadam, {}), EMA)],
    ids=["current-SGD-SWA", "legacy-Nadam-EMA"],
)
def test_fit_in_every_mode(strategy, inner, scheme, options):
    """And evaluation in the same mode sees the averages while they are swapped in."""
    if "jit_compile" in options and strategy.num_replicas_in_sync > 1:
        pytest.skip("tf_keras itself fails there on CPUs")
    recorded = scheme
    if (
        "steps_per_execution" in options
    ):  # Weights are seen after steps 1, 3 and 5: those that SWA averages.
        scheme, recorded = numpy_averages.swa(1, 2), numpy_averages.swa()
    bare = testing_utils.fit(strategy, inner, **options)
    wrapped = testing_utils.fit(strategy, lambda: scheme.wrap(inner()), **options)
    if "jit_compile" in options:
        # XLA fuses a larger step otherwise than a smaller one, so the last bit may differ.
        for expected, actual in zip(bare.history, wrapped.history):
            for a, b in zip(expected, actual):
                np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
        assert differ(wrapped, wrapped._replace(history=wrapped.history[:1]))
    else:
        testing_utils.assert_same_training(bare, wrapped)
    testing_utils.assert_averages(wrapped, recorded)

    reference = testing_utils.new_model("sgd")
    reference.set_weights(testing_utils.averages_of(wrapped.optimizer, wrapped.variables))
    data = testing_utils.X, testing_utils.Y
    raw = wrapped.model.evaluate(*data, verbose=0)
    with wrapped.optimizer.swapped_weights():
        averaged = wrapped.model.evaluate(*data, verbose=0)
    np.testing.assert_allclose(averaged, reference.evaluate(*data, verbose=0), rtol=1e-4)
    np.testing.assert_allclose(wrapped.model.evaluate(*data, verbose=0), raw, rtol=1e-6)
    assert abs(averaged - raw) > 1e-4


@each_once
def test_other_scheme_in_eager_mode_and_function(strategy, module, scheme):
    """The combinations of scheme and execution that the tests above leave out."""
    del scheme
    inner = Inner(module.SGD, {"momentum": 0.9})
    check(strategy, inner, SWA)
    check(strategy, inner, EMA, values=DENSE_AND_SPARSE, as_function=True, steps=3)


# Every optimizer of Keras 3, with every kind of scheme, in every mode of `fit`.


KERAS_3 = keras_3.optimizers
OF_KERAS_3 = {
    "SGD": lambda: KERAS_3.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.01, clipnorm=0.5),
    "Adam": lambda: KERAS_3.Adam(0.02, amsgrad=True, global_clipnorm=1.0),
    "AdamW": lambda: KERAS_3.AdamW(KERAS_3.schedules.ExponentialDecay(0.02, 2, 0.5)),
    "Nadam": lambda: KERAS_3.Nadam(0.02),
    "RMSprop": lambda: KERAS_3.RMSprop(0.02, centered=True, momentum=0.5),
    "Adagrad": lambda: KERAS_3.Adagrad(0.1),
    "Adadelta": lambda: KERAS_3.Adadelta(1.0),
    "Adamax": lambda: KERAS_3.Adamax(0.02),
    "Adafactor": lambda: KERAS_3.Adafactor(0.02),
    "Lion": lambda: KERAS_3.Lion(0.02),
    "Lamb": lambda: KERAS_3.Lamb(0.02),
    "Ftrl": lambda: KERAS_3.Ftrl(0.1, loss_scale_factor=8.0),
    "Muon": lambda: KERAS_3.Muon(0.02),
    "MultiOptimizer": lambda: KERAS_3.MultiOptimizer(
        KERAS_3.OptimizerMap(KERAS_3.Adam(0.02), {".*bias": KERAS_3.SGD(0.1)})
    ),
}
MODES = {
    "graph": {},
    "eager": {"run_eagerly": True},
    "XLA": {"jit_compile": True},
    "steps_per_execution": {"steps_per_execution": 3},
}
SCHEMES = {
    "EMA": numpy_averages.ema(0.9, dynamic=False),
    "dynamic EMA": numpy_averages.ema(0.9),
    "late EMA": numpy_averages.ema(0.8, start=2, dynamic=False, period=2),
    "SWA": numpy_averages.swa(1, 2),
}


@functools.cache
def side_by_side(mode) -> dict:
    """Runs of six steps, all in one `fit`, by optimizer and scheme; None for no averaging."""
    runs = {}
    for name, make in OF_KERAS_3.items():
        if hasattr(KERAS_3, name):
            for scheme in (None, *SCHEMES):
                optimizer = SCHEMES[scheme].wrap(make()) if scheme else make()
                values = {"kernel": testing_utils.KERNEL, "bias": testing_utils.BIAS}
                variables = [keras_3.Variable(value, name=kind) for kind, value in values.items()]
                optimizer.build(variables)
                runs[name, scheme] = testing_utils.Run(optimizer, variables, [])

    class SideBySide(keras_3.Model):
        def call(self, inputs):
            return inputs

        def train_step(self, data):
            noise = tf.reduce_mean(data[0])
            for run in runs.values():
                run.optimizer.apply([tf.sin(3.0 * v + noise) for v in run.variables], run.variables)
            return {"loss": noise}

    def look(batch=None, logs=None):
        for run in runs.values():
            run.history.append(testing_utils.read_all(run.variables))

    look()
    model = SideBySide()
    model.compile(**MODES[mode])
    testing_utils.fit_steps(model, 6, [keras_3.callbacks.LambdaCallback(on_train_batch_end=look)])
    return runs


@pytest.mark.parametrize("mode", MODES)
def test_every_optimizer_of_keras_3(mode):
    runs = side_by_side(mode)
    for (name, scheme), run in runs.items():
        bare = runs[name, None]
        if scheme is None:
            assert len(run.history) == (3 if mode == "steps_per_execution" else 7)
            assert not np.array_equal(run.history[0][0], run.history[-1][0])
            continue
        if mode == "XLA":
            for expected, actual in zip(bare.history, run.history):
                for one, other in zip(expected, actual):
                    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
        else:
            testing_utils.assert_same_training(bare, run)
        if mode == "steps_per_execution":  # Whose callbacks do not see each step.
            run = run._replace(history=side_by_side("graph")[name, None].history)
            testing_utils.assert_same_bits(run.history[-1], bare.history[-1])
        assert isinstance(run.optimizer, KERAS_3.Optimizer)
        testing_utils.assert_averages(run, SCHEMES[scheme], tolerance=3e-6)


# What surrounds the inner optimizer's arithmetic.


CLIPPING = [{"clipnorm": 0.3}, {"clipvalue": 0.1}, {"global_clipnorm": 0.5}]
SETTINGS = [
    *(
        Inner(module.SGD, {"learning_rate": KERAS.optimizers.schedules.ExponentialDecay(0.2, 2, 0.5)})
        for module in (CURRENT, LEGACY)
    ),
    Inner(LEGACY.SGD, {"decay": 0.3}),
    *(Inner(cls, {"weight_decay": 0.1}) for cls in (CURRENT.SGD, CURRENT.Adam, CURRENT.AdamW)),
    *(Inner(module.Adagrad, option) for module in (CURRENT, LEGACY) for option in CLIPPING),
]
DENSE_AND_SPARSE_RUN = {"values": DENSE_AND_SPARSE, "steps": 3}


@pytest.mark.parametrize("inner", SETTINGS, ids=lambda inner: f"{inner}"[:40])
def test_settings_of_the_inner_optimizer(inner, strategy):
    """Each has an effect, and the same one with averaging."""
    bare, _ = check(strategy, inner, EMA, **DENSE_AND_SPARSE_RUN)
    without = testing_utils.train(strategy, Inner(inner.cls, {}), **DENSE_AND_SPARSE_RUN)
    assert differ(bare, without)


@pytest.mark.parametrize("option", CLIPPING, ids=str)
@both_generations
def test_clipping_given_to_the_wrapper(module, option, strategy):
    def wrap():
        return EMA.wrap(module.Adagrad(0.1), **option)

    check(strategy, Inner(module.Adagrad, option), EMA, wrap=wrap, **DENSE_AND_SPARSE_RUN)


@pytest.mark.parametrize("by", ["var_names", "var_list"])
def test_exclude_from_weight_decay(by, strategy):
    """Called on the wrapper it has the effect that it has on the inner optimizer."""

    def train(optimizer, exclude):
        with strategy.scope():
            excluded, decayed = tf.Variable(1.0, name="bias"), tf.Variable(1.0, name="kernel")
        if exclude:
            optimizer.exclude_from_weight_decay(**{by: ["bias"] if by == "var_names" else [excluded]})

        def step():
            optimizer.apply_gradients([(tf.constant(0.1), excluded), (tf.constant(0.1), decayed)])

        for _ in range(3):
            strategy.run(step)
        return excluded.numpy(), decayed.numpy()

    def make_inner():
        with strategy.scope():
            return CURRENT.Adam(0.1, weight_decay=0.1)

    excluded, decayed = train(make_inner(), exclude=True)
    assert train(SWA.wrap(make_inner()), exclude=True) == (excluded, decayed)
    assert train(SWA.wrap(make_inner()), exclude=False) == (decayed, decayed)
    assert excluded != decayed


@both_generations
def test_constraint(module, strategy):
    options = {"values": [testing_utils.KERNEL, testing_utils.BIAS]}
    constraint = KERAS.constraints.MaxNorm(0.5, axis=None)
    bare, _ = check(strategy, lambda: module.SGD(0.4), EMA, constraint=constraint, **options)
    assert differ(bare, testing_utils.train(strategy, lambda: module.SGD(0.4), **options))


@both_generations
def test_kernel_constraint_in_fit(module):
    def build_model():
        return testing_utils.new_model(kernel_constraint="non_neg")

    default, inner = tf.distribute.get_strategy(), Inner(module.SGD, {})
    _, wrapped = check(default, inner, SWA, testing_utils.fit, build_model=build_model)
    assert wrapped.history[-1][0].min() == 0


# Gradients and variables of every kind.


@both_generations
def test_duplicate_indices_in_indexed_slices(module, strategy):
    """Rows that occur twice get both gradients, from each replica."""

    def gradients(variables, step):
        values = tf.constant([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
        return [tf.IndexedSlices(values, tf.constant([3, 1, 3]), tf.constant([5, 2]))]

    _, wrapped = check(
        strategy, lambda: module.SGD(0.5), EMA, gradients=gradients, values=[testing_utils.TABLE], steps=2
    )
    moved = wrapped.history[0][0][0] - wrapped.history[2][0][0]
    expected = np.zeros((5, 2))
    expected[1], expected[3] = [10, 20], [101, 202]
    np.testing.assert_allclose(moved, expected * 2 * 0.5 * strategy.num_replicas_in_sync, rtol=1e-5)


@each_once
def test_embedding(strategy, module, scheme):
    def build_model():
        KERAS.utils.set_random_seed(0)
        layers = [
            KERAS.layers.Embedding(7, 2, input_length=4),
            KERAS.layers.Flatten(),
            KERAS.layers.Dense(1),
        ]
        return KERAS.Sequential(layers)

    tokens = np.random.RandomState(0).randint(0, 6, (32, 4))
    assert len(np.unique(tokens[: testing_utils.BATCH])) < 32  # Duplicates; token 6 never occurs.
    data = tokens, tokens.sum(axis=1, keepdims=True) * 0.1
    check(
        strategy, lambda: module.Adam(0.1), scheme, testing_utils.fit, build_model=build_model, data=data
    )


@pytest.mark.parametrize("every", [1, 2])
@both_generations
def test_gradients_that_are_none(module, every, strategy):
    """On all steps or on some. All variables fold on a due step, with or without a gradient in it."""

    def gradients(variables, step):
        kernel, table, bias, scalar = testing_utils.gradients_of_loss(variables, step)
        return [kernel, table, None if step % every == 0 else bias, scalar]

    inner = Inner(module.SGD, {"momentum": 0.9})
    check(strategy, inner, EMA, gradients=gradients, untrained=[2] if every == 1 else [])


@both_generations
def test_scalar_and_empty_variables(module, strategy):
    values = [np.float32(1.5), np.zeros(0, np.float32), np.zeros((0, 3), np.float32)]
    for as_function in (False, True):
        options = {"values": values, "untrained": [1, 2], "steps": 3, "as_function": as_function}
        check(strategy, lambda: module.Adam(0.1), SWA, **options)


@both_generations
def test_variable_large_enough_for_the_compiled_fold(module, strategy):
    """The XLA-compiled fold reads the weights and writes none."""
    values = [np.linspace(-1, 1, 1 << 15, dtype=np.float32).reshape(128, 256), testing_utils.BIAS]
    inner = Inner(module.SGD, {"momentum": 0.9})
    for jit_compile in ("auto", False):
        wrap = lambda jit=jit_compile: EMA.wrap(inner(), jit_compile=jit)  # noqa: E731
        check(strategy, inner, EMA, wrap=wrap, values=values, steps=3)


def pull(variables, step):
    """Gradients of the variables' own dtypes."""
    return [
        variable * tf.cast(0.3, variable.dtype) + tf.cast(step, variable.dtype) for variable in variables
    ]


@pytest.mark.parametrize(
    ("dtype", "average_dtype"),
    [("float16", "float32"), ("bfloat16", "float32"), ("float64", "float64")],
)
@both_generations
def test_dtypes(module, dtype, average_dtype, strategy):
    values = [testing_utils.KERNEL.astype(tf.as_dtype(dtype).as_numpy_dtype)]
    inner = Inner(module.SGD, {"momentum": 0.5})
    _, wrapped = check(strategy, inner, EMA, gradients=pull, values=values)
    assert wrapped.optimizer.get_slot(wrapped.variables[0], "average").dtype == average_dtype


COMPLEX = [testing_utils.KERNEL.astype(dtype) * dtype(1 - 2j) for dtype in (np.complex64, np.complex128)]


@both_generations
def test_complex_variables(module):
    default, inner = tf.distribute.get_strategy(), Inner(module.SGD, {"momentum": 0.5})
    _, wrapped = check(default, inner, EMA, gradients=pull, values=COMPLEX)
    for variable in wrapped.variables:
        assert wrapped.optimizer.get_slot(variable, "average").dtype == variable.dtype


@pytest.mark.parametrize(
    "option", [{"skip_gradients_aggregation": True}, {"experimental_aggregate_gradients": False}], ids=str
)
@both_generations
def test_gradients_aggregated_before(module, option, strategy):
    """Both generations take both spellings. Complex variables: TensorFlow cannot sum those itself."""
    own = {"experimental_aggregate_gradients": False}  # The one that both take without the wrapper.
    inner = Inner(module.SGD, {"momentum": 0.5})
    options = {"gradients": pull, "values": COMPLEX}
    bare = testing_utils.train(strategy, inner, apply_options=own, **options)
    wrapped = testing_utils.train(strategy, lambda: EMA.wrap(inner()), apply_options=option, **options)
    testing_utils.assert_same_training(bare, wrapped)
    testing_utils.assert_averages(wrapped, EMA)


@pytest.mark.parametrize(
    ("strategy", "scheme"),
    [("default", SWA), ("default", EMA), ("mirrored", SWA)],
    indirect=["strategy"],
    ids=["default-SWA", "default-EMA", "mirrored-SWA"],
)
def test_layers_unfrozen_and_frozen_between_fits(scheme, strategy):
    """With a legacy optimizer; a variable that appears later starts its average at its value then."""

    def train(wrap):
        history = []
        model = testing_utils.new_model(strategy=strategy)
        with strategy.scope():
            optimizer = wrap(LEGACY.Adam(0.1))
        read = lambda *_: history.append(testing_utils.read_all(model.variables))  # noqa: E731
        read()
        for trainable in [(False, True), (True, True), (True, False)]:
            for layer, flag in zip(model.layers, trainable):
                layer.trainable = flag
            with strategy.scope():
                model.compile(optimizer, "mse")
            testing_utils.fit_steps(model, 3, [KERAS.callbacks.LambdaCallback(on_train_batch_end=read)])
        return testing_utils.Run(optimizer, model.variables, history)

    wrapped = train(scheme.wrap)
    testing_utils.assert_same_training(train(lambda inner: inner), wrapped)
    testing_utils.assert_averages(wrapped, scheme, created=[3, 3, 0, 0])


# Mixed precision.


@pytest.mark.parametrize(("module", "scheme"), [(CURRENT, EMA), (LEGACY, SWA)], ids=["current", "legacy"])
def test_mixed_precision(module, scheme, strategy):
    """Loss scaling goes outside; a step that it skips is counted, and averages nothing."""
    KERAS.mixed_precision.set_global_policy("mixed_float16")
    skipped, seen = [1, 5], []
    inputs, targets = testing_utils.X[: 8 * testing_utils.BATCH].copy(), testing_utils.Y
    for step in skipped:
        inputs[testing_utils.BATCH * step] = np.inf
    data = inputs, targets[: len(inputs)]

    class Count(KERAS.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(int(self.model.optimizer.inner_optimizer.num_averaged))

    bare = testing_utils.fit(strategy, lambda: module.Adam(0.1), data=data)
    wrapped = testing_utils.fit(
        strategy, lambda: scheme.wrap(module.Adam(0.1)), data=data, callbacks=[Count()]
    )
    assert isinstance(wrapped.model.optimizer, KERAS.mixed_precision.LossScaleOptimizer)
    assert wrapped.model.optimizer.inner_optimizer is wrapped.optimizer
    testing_utils.assert_same_training(bare, wrapped)
    testing_utils.assert_averages(wrapped, scheme, skipped)
    assert wrapped.optimizer.iterations.numpy() == 8
    due = numpy_averages.due_steps(scheme, 8, skipped)
    assert seen == np.cumsum([step in due for step in range(8)]).tolist()
    for step in range(8):
        assert np.array_equal(wrapped.history[step][0], wrapped.history[step + 1][0]) == (step in skipped)


# Wrappers in wrappers.


@both_generations
@pytest.mark.parametrize(("outer", "inner"), [(EMA, SWA), (SWA, EMA)], ids=["EMA of SWA", "SWA of EMA"])
@pytest.mark.parametrize(
    ("strategy", "as_function"),
    [("default", True), ("mirrored", False)],
    indirect=["strategy"],
    ids=["default-function", "mirrored-eager"],
)
def test_nested_wrappers(module, outer, inner, as_function, strategy):
    """Both average the weights, each in its own way."""
    make_sgd = Inner(module.SGD, {"momentum": 0.5})
    options = {"as_function": as_function, "values": DENSE_AND_SPARSE}
    bare = testing_utils.train(strategy, make_sgd, **options)
    run = testing_utils.train(strategy, lambda: outer.wrap(inner.wrap(make_sgd())), **options)
    nested = run._replace(optimizer=run.optimizer.inner_optimizer)
    testing_utils.assert_same_training(bare, nested)
    testing_utils.assert_averages(run, outer)
    testing_utils.assert_averages(nested, inner)


def test_nested_wrappers_in_fit():
    strategy = tf.distribute.get_strategy()
    bare = testing_utils.fit(strategy, lambda: CURRENT.SGD(0.1))
    run = testing_utils.fit(strategy, lambda: EMA.wrap(SWA.wrap(CURRENT.SGD(0.1))))
    nested = run._replace(optimizer=run.optimizer.inner_optimizer)
    testing_utils.assert_same_training(bare, nested)
    testing_utils.assert_averages(run, EMA)
    testing_utils.assert_averages(nested, SWA)


# Reading.


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("steps", [0, 3])
def test_reading_where_keras_casts_variables(keras, steps, swapped):
    class Reads(keras.layers.Dense):
        def call(self, inputs):
            return tf.cast(optimizer.get_average(self.kernel), tf.float32)

    layer = Reads(2, dtype="mixed_float16")
    layer.build([None, 3])
    optimizer = tfav.SWA(keras.optimizers.SGD(0.1))
    optimizer.shadow_copy([layer.kernel])
    for _ in range(steps):
        optimizer.apply_gradients([(tf.fill([3, 2], 1.0), layer.kernel)])
    if swapped:
        optimizer.swap_weights()
    expected = optimizer.get_average(layer.kernel).numpy()
    assert (expected != expected.astype(np.float16)).any()
    np.testing.assert_array_equal(layer(tf.ones([1, 3], tf.float16)), expected)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("as_function", [False, True], ids=["eager", "function"])
def test_reading_writes_nothing(keras, dtype, as_function):
    """Otherwise a step on another thread could fold into what is overwritten then."""
    variable = tf.Variable([1.0], dtype=dtype)
    optimizer = tfav.SWA(keras.optimizers.SGD(), 100)
    optimizer.shadow_copy([variable])
    slot = optimizer.get_slot(variable, "average")
    variable.assign([2.0])
    read = lambda: optimizer.get_average(variable)  # noqa: E731
    assert (tf.function(read) if as_function else read)().numpy() == 2.0
    assert slot.numpy() == 1.0


def test_reading_on_another_thread(keras):
    """Averages are read while a step runs, one by one and as a model; nothing is swapped for it."""
    steps, read, stopped, errors = 20, threading.Semaphore(0), threading.Event(), []
    make = lambda: keras.optimizers.SGD(0.1, momentum=0.9)  # noqa: E731
    build = functools.partial(testing_utils.new_model, keras=keras)
    data = testing_utils.X[: steps * testing_utils.BATCH], testing_utils.Y[: steps * testing_utils.BATCH]

    def read_on(model):
        try:
            while not stopped.is_set():
                averages = [model.optimizer.get_average(v).numpy() for v in model.trainable_variables]
                assert all(np.isfinite(average).all() for average in averages)
                assert len(tfav.averaged_model(model).get_weights()) == len(averages)
                read.release()
        except BaseException as error:
            errors.append(error)
            read.release(steps)

    class Read(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 0:  # From now on there are averages.
                self.thread = threading.Thread(target=read_on, args=[self.model])
                self.thread.start()
            read.acquire()

        def on_train_end(self, logs=None):
            stopped.set()
            self.thread.join()

    strategy = tf.distribute.get_strategy()
    bare = testing_utils.fit(strategy, make, build, data, keras=keras)
    run = testing_utils.fit(
        strategy, lambda: SWA.wrap(make()), build, data, callbacks=[Read()], keras=keras
    )
    assert errors == []
    testing_utils.assert_same_training(bare, run)
    testing_utils.assert_averages(run, SWA)
