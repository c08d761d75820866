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

import copy
import inspect
from typing import Any, Dict, NamedTuple

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import tf_averaging as tfav
from tests import testing_utils

CURRENT, LEGACY = tf_keras.optimizers, tf_keras.optimizers.legacy
SWA, EMA = testing_utils.SWA, testing_utils.EMA

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
        return self.cls(learning_rate=0.1, **self.options)

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
both_generations = pytest.mark.parametrize("module", [CURRENT, LEGACY], ids=["current", "legacy"])
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
    testing_utils.assert_same_training(strategy, bare, wrapped)
    testing_utils.assert_averages(strategy, wrapped, scheme)
    return bare, wrapped


def differ(first, second):
    """Whether two runs left different weights: a setting under test had an effect."""
    return any(not np.array_equal(a, b) for a, b in zip(first.history[-1], second.history[-1]))


@pytest.mark.parametrize("module", VARIANTS, ids=["current", "legacy"])
def test_table_has_every_optimizer(module):
    shipped = {
        name
        for name, cls in vars(module).items()
        if inspect.isclass(cls) and issubclass(cls, module.Optimizer) and cls is not module.Optimizer
    }
    assert shipped == set(VARIANTS[module])


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
    ("inner", "scheme"),
    [(Inner(CURRENT.SGD, {"momentum": 0.9}), SWA), (Inner(LEGACY.Nadam, {}), EMA)],
    ids=["current-SGD-SWA", "legacy-Nadam-EMA"],
)
def test_fit(inner, scheme, strategy):
    check(strategy, inner, scheme, testing_utils.fit)


@each_once
def test_other_scheme_in_eager_mode_and_function(strategy, module, scheme):
    """The combinations of scheme and execution that the tests above leave out."""
    del scheme
    inner = Inner(module.SGD, {"momentum": 0.9})
    check(strategy, inner, SWA)
    check(strategy, inner, EMA, values=DENSE_AND_SPARSE, as_function=True, steps=3)


# What surrounds the inner optimizer's arithmetic.


@both_generations
def test_learning_rate_schedule(module, strategy):
    def make_inner():
        return module.SGD(tf_keras.optimizers.schedules.ExponentialDecay(0.2, 2, 0.5), momentum=0.5)

    scheduled, _ = check(strategy, make_inner, EMA)
    assert differ(scheduled, testing_utils.train(strategy, lambda: module.SGD(0.2, momentum=0.5)))


def test_legacy_decay(strategy):
    bare, _ = check(strategy, lambda: LEGACY.SGD(0.1, decay=0.3), EMA)
    assert differ(bare, testing_utils.train(strategy, lambda: LEGACY.SGD(0.1)))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_weight_decay(name, strategy):
    bare, _ = check(strategy, lambda: getattr(CURRENT, name)(0.1, weight_decay=0.1), SWA)
    assert differ(
        bare, testing_utils.train(strategy, lambda: getattr(CURRENT, name)(0.1, weight_decay=0))
    )


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


CLIPPING = [("clipnorm", 0.3), ("clipvalue", 0.1), ("global_clipnorm", 0.5)]
every_clipping = pytest.mark.parametrize(("option", "value"), CLIPPING)


@every_clipping
@both_generations
def test_clipping_by_the_inner_optimizer(module, option, value, strategy):
    bare, _ = check(
        strategy, lambda: module.Adagrad(0.1, **{option: value}), EMA, values=DENSE_AND_SPARSE, steps=3
    )
    assert differ(
        bare, testing_utils.train(strategy, lambda: module.Adagrad(0.1), values=DENSE_AND_SPARSE, steps=3)
    )


@every_clipping
@both_generations
def test_clipping_given_to_the_wrapper(module, option, value, strategy):
    check(
        strategy,
        lambda: module.Adagrad(0.1, **{option: value}),
        EMA,
        wrap=lambda: EMA.wrap(module.Adagrad(0.1), **{option: value}),
        values=DENSE_AND_SPARSE,
        steps=3,
    )


@both_generations
def test_constraint(module, strategy):
    options = {"values": [testing_utils.KERNEL, testing_utils.BIAS]}
    constraint = tf_keras.constraints.MaxNorm(0.5, axis=None)
    bare, _ = check(strategy, lambda: module.SGD(0.4), EMA, constraint=constraint, **options)
    assert differ(bare, testing_utils.train(strategy, lambda: module.SGD(0.4), **options))


@both_generations
def test_kernel_constraint_in_fit(module):
    def build_model():
        return testing_utils.make_model(kernel_constraint="non_neg")

    _, wrapped = check(
        tf.distribute.get_strategy(),
        lambda: module.SGD(0.1),
        SWA,
        testing_utils.fit,
        build_model=build_model,
    )
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
        return tf_keras.Sequential(
            [
                tf_keras.layers.Embedding(7, 2, input_length=4),
                tf_keras.layers.Flatten(),
                tf_keras.layers.Dense(1),
            ]
        )

    tokens = np.random.RandomState(0).randint(0, 6, (16, 4))
    assert len(np.unique(tokens[:4])) < 16  # A batch has duplicates; token 6 never occurs.
    data = tokens, tokens.sum(axis=1, keepdims=True) * 0.1

    def seeded():
        tf_keras.utils.set_random_seed(0)
        return build_model()

    check(strategy, lambda: module.Adam(0.1), scheme, testing_utils.fit, build_model=seeded, data=data)


@both_generations
def test_none_gradients(module, strategy):
    def gradients(variables, step):
        kernel, table, _, scalar = testing_utils.gradients_of_loss(variables, step)
        return [kernel, table, None, scalar]

    check(strategy, lambda: module.SGD(0.1, momentum=0.9), EMA, gradients=gradients, untrained=[2])


@both_generations
def test_gradient_that_is_none_on_some_steps(module, strategy):
    """All variables fold on a due step, with or without a gradient in it."""

    def gradients(variables, step):
        first, second = testing_utils.gradients_of_loss(variables, step)
        return [first, second if step % 2 == 0 else None]

    values = [testing_utils.KERNEL, testing_utils.BIAS]
    check(strategy, lambda: module.SGD(0.1), EMA, gradients=gradients, values=values)


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
    for jit_compile in ("auto", False):
        check(
            strategy,
            lambda: module.SGD(0.1, momentum=0.9),
            EMA,
            wrap=lambda j=jit_compile: EMA.wrap(module.SGD(0.1, momentum=0.9), jit_compile=j),
            values=values,
            steps=3,
        )


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
    _, wrapped = check(
        tf.distribute.get_strategy(),
        Inner(module.SGD, {"momentum": 0.5}),
        EMA,
        gradients=pull,
        values=COMPLEX,
    )
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
    testing_utils.assert_same_training(strategy, bare, wrapped)
    testing_utils.assert_averages(strategy, wrapped, EMA)


@pytest.mark.parametrize(
    ("strategy", "scheme"),
    [("default", SWA), ("default", EMA), ("mirrored", SWA)],
    indirect=["strategy"],
    ids=["default-SWA", "default-EMA", "mirrored-SWA"],
)
def test_layers_unfrozen_and_frozen_between_fits(scheme, strategy):
    """With a legacy optimizer; a variable that appears later starts its average at its value then."""
    inputs, targets = testing_utils.make_data(batches=3)

    def train(optimizer):
        history = []
        with strategy.scope():
            model = testing_utils.make_model()
        read = lambda *_: history.append(testing_utils.read_all(strategy, model.variables))  # noqa: E731
        read()
        for trainable in [(False, True), (True, True), (True, False)]:
            for layer, flag in zip(model.layers, trainable):
                layer.trainable = flag
            with strategy.scope():
                model.compile(optimizer, "mse")
            record = tf_keras.callbacks.LambdaCallback(on_train_batch_end=read)
            model.fit(inputs, targets, batch_size=4, shuffle=False, verbose=0, callbacks=[record])
        return testing_utils.Run(optimizer, model.variables, history)

    def make_inner():
        with strategy.scope():
            return LEGACY.Adam(0.1)

    wrapped = train(scheme.wrap(make_inner()))
    testing_utils.assert_same_training(strategy, train(make_inner()), wrapped)
    testing_utils.assert_averages(strategy, wrapped, scheme, created=[3, 3, 0, 0])


# Mixed precision and the options of `compile`.


@pytest.mark.parametrize(("module", "scheme"), [(CURRENT, EMA), (LEGACY, SWA)], ids=["current", "legacy"])
def test_mixed_precision(module, scheme, strategy):
    """Loss scaling goes outside; a step that it skips is counted, and averages nothing."""
    tf_keras.mixed_precision.set_global_policy("mixed_float16")
    inputs, targets = testing_utils.make_data(batches=8)
    skipped = [1, 5]
    for step in skipped:
        inputs[4 * step] = np.inf
    bare = testing_utils.fit(strategy, lambda: module.Adam(0.1), data=(inputs, targets))
    seen = []
    count = tf_keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(wrapped_optimizer[0].num_averaged.numpy())
    )
    wrapped_optimizer = []

    def make_wrapper():
        wrapped_optimizer.append(scheme.wrap(module.Adam(0.1)))
        return wrapped_optimizer[0]

    wrapped = testing_utils.fit(strategy, make_wrapper, data=(inputs, targets), callbacks=[count])
    testing_utils.assert_same_training(strategy, bare, wrapped)
    testing_utils.assert_averages(strategy, wrapped, scheme, skipped)
    assert wrapped.optimizer.iterations.numpy() == 8
    due = [
        t >= scheme.start and (t - scheme.start) % scheme.period == 0 and t not in skipped
        for t in range(8)
    ]
    assert seen == np.cumsum(due).tolist()
    for step in range(8):
        assert np.array_equal(wrapped.history[step][0], wrapped.history[step + 1][0]) == (step in skipped)


@both_generations
def test_mixed_precision_puts_loss_scaling_outside(module):
    tf_keras.mixed_precision.set_global_policy("mixed_float16")
    model = testing_utils.make_model()
    optimizer = SWA.wrap(module.SGD(0.1))
    model.compile(optimizer, "mse")
    assert isinstance(model.optimizer, tf_keras.mixed_precision.LossScaleOptimizer)
    assert model.optimizer.inner_optimizer is optimizer


@each_once
def test_steps_per_execution(strategy, module, scheme):
    del scheme
    _, wrapped = check(
        strategy,
        Inner(module.SGD, {"momentum": 0.9}),
        testing_utils.Scheme(SWA.wrap, start=0, period=1, weight=SWA.weight),
        testing_utils.fit,
        steps_per_execution=3,
    )
    # SWA takes its snapshots after steps 2 and 5: the last of each execution, the only ones recorded.
    assert len(wrapped.history) == 3


@each_once
def test_run_eagerly(strategy, module, scheme):
    check(strategy, Inner(module.Adam, {}), scheme, testing_utils.fit, run_eagerly=True)


@pytest.mark.parametrize(("module", "scheme"), [(CURRENT, SWA), (LEGACY, EMA)], ids=["current", "legacy"])
def test_jit_compile(module, scheme):
    """XLA fuses a larger step otherwise than a smaller one, so the last bit may differ here."""
    strategy = tf.distribute.get_strategy()
    inner = Inner(module.Adam, {})
    bare = testing_utils.fit(strategy, inner, jit_compile=True)
    wrapped = testing_utils.fit(strategy, lambda: scheme.wrap(inner()), jit_compile=True)
    for expected, actual in zip(bare.history, wrapped.history):
        for a, b in zip(expected, actual):
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
    assert differ(wrapped, wrapped._replace(history=wrapped.history[:1]))
    testing_utils.assert_averages(strategy, wrapped, scheme)


# Other ways to take a step.


def values_after_minimize(optimizer, style, as_function, grad_loss=None):
    """The variable after two steps on sum(x**3 / 3), or on the vector x**3 / 3 with `grad_loss`."""
    x = tf.Variable(testing_utils.BIAS)
    weights = {} if grad_loss is None else {"grad_loss": tf.constant(grad_loss)}

    def loss():
        return x**3 / 3

    def step():
        if style == "callable":
            optimizer.minimize(loss, [x], **weights)
        elif style == "callable variables":
            optimizer.minimize(loss, lambda: [x], **weights)
        else:
            with tf.GradientTape() as tape:
                value = loss()
            optimizer.minimize(value, [x], tape=tape, **weights)

    step = tf.function(step) if as_function else step
    for _ in range(2):
        step()
    return x.numpy(), x


@pytest.mark.parametrize("style", ["callable", "callable variables", "tape"])
@pytest.mark.parametrize("as_function", [False, True], ids=["eager", "function"])
@both_generations
def test_minimize(module, as_function, style):
    expected, _ = values_after_minimize(module.SGD(0.1), style, as_function)
    optimizer = EMA.wrap(module.SGD(0.1))
    actual, variable = values_after_minimize(optimizer, style, as_function)
    testing_utils.assert_same_bits(actual, expected)
    x0 = testing_utils.BIAS.astype(np.float64)
    x1 = x0 - 0.1 * x0**2
    x2 = x1 - 0.1 * x1**2
    np.testing.assert_allclose(actual, x2, rtol=1e-6)
    average = 0.1 * x0 + 0.9 * x1  # Decays: 1/10, 2/11.
    average = 2 / 11 * average + 9 / 11 * x2
    np.testing.assert_allclose(optimizer.get_slot(variable, "average"), average, rtol=1e-6)


@pytest.mark.parametrize("style", ["callable", "callable variables", "tape"])
@pytest.mark.parametrize("as_function", [False, True], ids=["eager", "function"])
@both_generations
def test_minimize_with_grad_loss(module, as_function, style):
    grad_loss = [1.0, 0.0, -2.0]
    actual, _ = values_after_minimize(EMA.wrap(module.SGD(0.1)), style, as_function, grad_loss)
    expected, _ = values_after_minimize(LEGACY.SGD(0.1), style, as_function, grad_loss)
    testing_utils.assert_same_bits(actual, expected)
    x = testing_utils.BIAS.astype(np.float64)
    for _ in range(2):
        x = x - 0.1 * x**2 * grad_loss
    np.testing.assert_allclose(actual, x, rtol=1e-6)


def expected_of_get_updates():
    """Weights and their SWA (start 1, period 2) after 4 steps of SGD(0.1, momentum 0.5) on sum(x**2)."""
    x, velocity, snapshots = testing_utils.BIAS.astype(np.float64), 0.0, []
    for step in range(4):
        velocity = 0.5 * velocity - 0.1 * 2 * x
        x = x + velocity
        if step in (1, 3):
            snapshots.append(x)
    return x, np.mean(snapshots, axis=0)


@both_generations
def test_get_updates_in_function(module):
    weight = tf.Variable(testing_utils.BIAS)
    optimizer = tfav.SWA(module.SGD(0.1, momentum=0.5), 1, 2)

    @tf.function
    def step():
        optimizer.get_updates(tf.reduce_sum(weight**2), [weight])
        return optimizer.get_gradients(tf.reduce_sum(weight**2), [weight])

    for _ in range(4):
        (gradient,) = step()
    expected, average = expected_of_get_updates()
    np.testing.assert_allclose(weight, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, 2 * expected, rtol=1e-6)
    np.testing.assert_allclose(optimizer.get_slot(weight, "average"), average, rtol=1e-6)


def test_get_updates_in_tf1_graph():
    """In a graph of TF 1, where nothing runs that is not asked for, the returned operations do all."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        weight = tf.Variable(testing_utils.BIAS)
        optimizer = tfav.SWA(LEGACY.SGD(0.1, momentum=0.5), 1, 2)
        loss = tf.reduce_sum(weight**2)
        (gradient,) = optimizer.get_gradients(loss, [weight])
        updates = optimizer.get_updates(loss, [weight])
        average = optimizer.get_slot(weight, "average")
        session.run(tf.compat.v1.global_variables_initializer())
        np.testing.assert_allclose(session.run(gradient), 2 * testing_utils.BIAS, rtol=1e-6)
        for _ in range(4):
            session.run(updates)
        expected, mean = expected_of_get_updates()
        np.testing.assert_allclose(session.run(weight), expected, rtol=1e-6)
        np.testing.assert_allclose(session.run(average), mean, rtol=1e-6)
        assert session.run([optimizer.iterations, optimizer.num_averaged]) == [4, 2]


def test_ema_swap_and_assign_in_tf1_graph():
    """The average starts from the weights before the first update, also where no tensor is `== 0`."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        weight = tf.Variable(testing_utils.BIAS)
        optimizer = tfav.ExponentialMovingAverage(
            LEGACY.SGD(0.25), average_decay=0.75, start_step=1, dynamic_decay=False
        )
        updates = optimizer.get_updates(tf.reduce_sum(weight**2), [weight])
        swap, assign = optimizer.swap_weights(), optimizer.assign_average_vars([weight])
        average = optimizer.get_slot(weight, "average")
        session.run(tf.compat.v1.global_variables_initializer())
        value = testing_utils.BIAS
        session.run(swap)  # Nothing was averaged yet, so the average is the weights.
        np.testing.assert_array_equal(session.run(weight), value)
        session.run(swap)
        for _ in range(3):
            session.run(updates)  # Each step halves the weights; the last two are averaged.
        mean = (0.5 * 0.75 + 0.25 * 0.25) * 0.75 + 0.125 * 0.25
        np.testing.assert_allclose(session.run(weight), value * 0.125, rtol=1e-6)
        np.testing.assert_allclose(session.run(average), value * mean, rtol=1e-6)
        session.run(swap)
        np.testing.assert_allclose(session.run(weight), value * mean, rtol=1e-6)
        with pytest.raises(tf.errors.InvalidArgumentError, match="swap_weights"):
            session.run(updates)
        session.run(swap)
        np.testing.assert_allclose(session.run(weight), value * 0.125, rtol=1e-6)
        session.run(assign)
        np.testing.assert_allclose(session.run([weight, average]), [value * mean] * 2, rtol=1e-6)
        assert session.run([optimizer.iterations, optimizer.num_averaged]) == [3, 2]


# How the inner optimizer is given, and its learning rate.


def test_instance_is_used_itself():
    inner = CURRENT.Adam()
    assert SWA.wrap(inner).inner_optimizer is inner


@pytest.mark.parametrize("name", ["sgd", "Adam", "rmsprop"])
def test_by_name(name):
    strategy = tf.distribute.get_strategy()
    check(strategy, lambda: CURRENT.get(name), SWA, wrap=lambda: SWA.wrap(name))


@pytest.mark.parametrize("spelling", ["lr", "learning_rate"])
def test_by_name_with_settings(spelling):
    options = {spelling: 0.05, "clipvalue": 0.2}
    check(
        tf.distribute.get_strategy(),
        lambda: CURRENT.Adam(learning_rate=0.05, clipvalue=0.2),
        SWA,
        wrap=lambda: SWA.wrap("adam", **options),
    )


def test_by_name_with_schedule():
    schedule = tf_keras.optimizers.schedules.ExponentialDecay(0.3, 2, 0.5)
    check(
        tf.distribute.get_strategy(),
        lambda: CURRENT.SGD(schedule),
        SWA,
        wrap=lambda: SWA.wrap("sgd", learning_rate=schedule),
    )


@pytest.mark.parametrize("given", [{}, {"clipnorm": 0.3}], ids=["as is", "with clipnorm"])
@both_generations
def test_by_config_dict(module, given):
    """The dict is left as it is, nested dicts included."""
    schedule = tf_keras.optimizers.schedules.ExponentialDecay(0.3, 2, 0.5)
    config = CURRENT.serialize(module.SGD(schedule, momentum=0.5))
    before = copy.deepcopy(config)
    check(
        tf.distribute.get_strategy(),
        lambda: module.SGD(schedule, momentum=0.5, **given),
        SWA,
        wrap=lambda: SWA.wrap(config, **given),
    )
    assert config == before


def test_by_config_dict_takes_what_it_does_not_mention():
    config = {"class_name": "SGD", "config": {"momentum": 0.5}, "module": "keras.optimizers.legacy"}
    before = copy.deepcopy(config)
    check(
        tf.distribute.get_strategy(),
        lambda: LEGACY.SGD(0.2, momentum=0.5, decay=0.3, clipvalue=0.4),
        SWA,
        wrap=lambda: SWA.wrap(config, learning_rate=0.2, decay=0.3, clipvalue=0.4),
    )
    assert config == before


@pytest.mark.parametrize("name", ["learning_rate", "lr"])
@both_generations
def test_setting_the_learning_rate(module, name):
    optimizer = SWA.wrap(module.SGD(0.5))
    weight = tf.Variable(1.0)
    optimizer.apply_gradients([(tf.constant(1.0), weight)])
    setattr(optimizer, name, 0.125)
    optimizer.apply_gradients([(tf.constant(1.0), weight)])
    assert weight.numpy() == 1 - 0.5 - 0.125
    for owner in (optimizer, optimizer.inner_optimizer):
        assert float(owner.learning_rate) == float(owner.lr) == 0.125


@each_once
def test_learning_rate_scheduler_callback(strategy, module, scheme):
    def callbacks():
        return [tf_keras.callbacks.LearningRateScheduler(lambda epoch, lr: 0.5 * lr if epoch else 0.2)]

    options = {"epochs": 3, "data": testing_utils.make_data(batches=2)}
    inner = Inner(module.SGD, {})
    bare = testing_utils.fit(strategy, inner, callbacks=callbacks(), **options)
    wrapped = testing_utils.fit(strategy, lambda: scheme.wrap(inner()), callbacks=callbacks(), **options)
    testing_utils.assert_same_training(strategy, bare, wrapped)
    assert wrapped.optimizer.inner_optimizer.learning_rate.numpy() == np.float32(0.2) / 4


@both_generations
def test_reduce_lr_on_plateau_callback(module):
    """With a margin that no loss can beat, the rate halves after each epoch but the first."""
    callback = tf_keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=1e9)
    wrapped = testing_utils.fit(
        tf.distribute.get_strategy(),
        lambda: EMA.wrap(module.SGD(0.1)),
        epochs=3,
        data=testing_utils.make_data(batches=1),
        callbacks=[callback],
    )
    assert wrapped.optimizer.inner_optimizer.learning_rate.numpy() == np.float32(0.1) / 4


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
    testing_utils.assert_same_training(strategy, bare, nested)
    testing_utils.assert_averages(strategy, run, outer)
    testing_utils.assert_averages(strategy, nested, inner)


def test_nested_wrappers_in_fit():
    strategy = tf.distribute.get_strategy()
    bare = testing_utils.fit(strategy, lambda: CURRENT.SGD(0.1))
    run = testing_utils.fit(strategy, lambda: EMA.wrap(SWA.wrap(CURRENT.SGD(0.1))))
    nested = run._replace(optimizer=run.optimizer.inner_optimizer)
    testing_utils.assert_same_training(strategy, bare, nested)
    testing_utils.assert_averages(strategy, run, EMA)
    testing_utils.assert_averages(strategy, nested, SWA)
