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
"""Every error comes at the call that caused it, says what to do, and changes nothing."""

import keras as keras_3
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import tf_averaging as tfav
from tests import testing_utils

CURRENT, LEGACY = tf_keras.optimizers, tf_keras.optimizers.legacy
EMA, SWA = tfav.ExponentialMovingAverage, tfav.SWA

both_generations = pytest.mark.parametrize("module", [CURRENT, LEGACY], ids=["current", "legacy"])
both_wrappers = pytest.mark.parametrize("wrap", [SWA, EMA])


def state_of(strategy, optimizer, variables=()):
    """Everything that a failed call must leave alone, on all replicas."""
    return testing_utils.read_all(strategy, [*variables, *optimizer.variables])


def assert_unchanged(strategy, before, optimizer, variables=()):
    after = state_of(strategy, optimizer, variables)
    assert len(after) == len(before)
    for actual, expected in zip(after, before):
        testing_utils.assert_same_bits(actual, expected)


def trained(inner=None, steps=2, wrap=SWA, **options):
    """A wrapper that has averaged, and its variable."""
    optimizer = wrap(inner or CURRENT.SGD(0.1, momentum=0.9), **{"average_period": 1, **options})
    variable = tf.Variable([1.0, 2.0])
    for _ in range(steps):
        optimizer.apply_gradients([(tf.constant([0.5, 1.0]), variable)])
    return optimizer, variable


# The constructor.


@both_wrappers
@pytest.mark.parametrize(
    "rubbish",
    [None, 3, object(), [CURRENT.SGD()], tf.Variable(1.0)],
    ids=["None", "int", "object", "list", "variable"],
)
def test_not_an_optimizer(wrap, rubbish):
    with pytest.raises(TypeError, match=r"Expected a `tf_keras.optimizers.Optimizer`.*Received: "):
        wrap(rubbish)


@both_wrappers
@both_generations
def test_class_instead_of_instance(wrap, module):
    with pytest.raises(TypeError, match="Received a class, not an optimizer: call it first"):
        wrap(module.SGD)


@both_wrappers
@pytest.mark.parametrize(
    "optimizer", [keras_3.optimizers.SGD(), keras_3.optimizers.Adam], ids=["instance", "class"]
)
def test_keras_3_optimizer(wrap, optimizer):
    """The message names both ways out."""
    with pytest.raises(TypeError, match=r"(?s)Keras 3.*tf_keras\.optimizers\.SGD.*TF_USE_LEGACY_KERAS=1"):
        wrap(optimizer)


@both_wrappers
@both_generations
def test_loss_scaling_inside(wrap, module):
    with pytest.raises(TypeError, match="goes around the averaging optimizer, not inside"):
        wrap(tf_keras.mixed_precision.LossScaleOptimizer(module.SGD()))


def test_name_that_nobody_knows():
    with pytest.raises(ValueError, match="(?i)unknown optimizer.*no_such_optimizer"):
        SWA("no_such_optimizer")


@pytest.mark.parametrize("decay", [-0.01, 1.01, 99, float("nan"), float("inf"), np.float64(2)])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match="Expected `average_decay` to be a float from 0 to 1"):
        EMA("sgd", average_decay=decay)


@pytest.mark.parametrize("decay", ["0.9", True, None, [0.9], len, {"decay": 0.9}], ids=repr)
def test_decay_of_wrong_type(decay):
    with pytest.raises(TypeError, match="Expected `average_decay` to be a float from 0 to 1"):
        EMA("sgd", average_decay=decay)


@pytest.mark.parametrize("decay", [0, 1, 0.0, 1.0, np.float32(0.5)], ids=repr)
def test_decay_at_the_limits_is_accepted(decay):
    assert EMA("sgd", average_decay=decay).average_decay == decay


COUNTS = [
    (EMA, "start_step", 0),
    (SWA, "start_averaging", 0),
    (EMA, "average_period", 1),
    (SWA, "average_period", 1),
]
every_count = pytest.mark.parametrize(("wrap", "name", "minimum"), COUNTS)


@every_count
def test_count_too_small(wrap, name, minimum):
    for value in (minimum - 1, -7, np.int64(minimum - 1)):
        with pytest.raises(ValueError, match=f"Expected `{name}` >= {minimum}. Received: {name}={value}"):
            wrap("sgd", **{name: value})


@every_count
@pytest.mark.parametrize("value", [1.5, 2.0, True, np.True_, "3", None, [1]], ids=repr)
def test_count_of_wrong_type(wrap, name, minimum, value):
    with pytest.raises(TypeError, match=f"Expected `{name}` to be an int. Received: {name}="):
        wrap("sgd", **{name: value})


@both_wrappers
def test_unknown_keyword(wrap):
    with pytest.raises(TypeError, match="Unknown keyword arguments: .*momentun"):
        wrap("sgd", momentun=0.9)


CONTRADICTIONS = ["learning_rate", "lr", "clipnorm", "clipvalue", "global_clipnorm"]


@pytest.mark.parametrize("name", CONTRADICTIONS)
@pytest.mark.parametrize("given", ["instance", "dict"])
@both_generations
def test_contradicting_the_inner_optimizer(module, given, name):
    """Saying the same as the inner optimizer is no contradiction."""
    own = "learning_rate" if name == "lr" else name
    inner = module.SGD(**{own: 0.125})
    inner = CURRENT.serialize(inner) if given == "dict" else inner
    with pytest.raises(ValueError, match=f"`{own}` contradicts the inner optimizer's own.*{own}=0.25"):
        SWA(inner, **{name: 0.25})
    assert SWA(inner, **{name: 0.125}).get_config()["optimizer"]["config"][own] == 0.125


@pytest.mark.parametrize(
    "module",
    [CURRENT, LEGACY],
    ids=["current", "legacy"],
)
def test_agreeing_with_learning_rate_that_float32_rounds(module):
    config = CURRENT.serialize(module.SGD(0.1))
    assert SWA(module.SGD(0.1), learning_rate=0.1).learning_rate.numpy() == np.float32(0.1)
    assert SWA(config, learning_rate=0.1).learning_rate.numpy() == np.float32(0.1)


def test_contradicting_a_schedule():
    schedules = [tf_keras.optimizers.schedules.ExponentialDecay(0.1, steps, 0.5) for steps in (2, 3)]
    for value in (0.1, schedules[1]):
        with pytest.raises(ValueError, match="`learning_rate` contradicts the inner optimizer's own"):
            SWA(CURRENT.SGD(schedules[0]), learning_rate=value)
    assert SWA(CURRENT.SGD(schedules[0]), learning_rate=schedules[0]).inner_optimizer is not None


@pytest.mark.parametrize("inner", ["sgd", CURRENT.SGD()], ids=["name", "instance"])
def test_decay_with_current_generation_inside(inner):
    with pytest.raises(ValueError, match="`decay` exists in legacy optimizers only"):
        SWA(inner, decay=0.1)


def test_contradicting_legacy_decay():
    with pytest.raises(ValueError, match="`decay` contradicts the inner optimizer's own"):
        SWA(LEGACY.SGD(decay=0.1), decay=0.2)
    assert SWA(LEGACY.SGD(decay=0.1), decay=0.1).inner_optimizer.get_config()["decay"] == 0.1


def test_lr_and_learning_rate_that_differ():
    with pytest.raises(ValueError, match="`lr` and `learning_rate` are two names of one argument"):
        SWA("sgd", lr=0.1, learning_rate=0.2)
    assert float(SWA("sgd", lr=0.25, learning_rate=0.25).learning_rate) == 0.25


@pytest.mark.parametrize(
    ("inner", "settings"),
    [
        ("sgd", {"clipnorm": 1.0, "global_clipnorm": 1.0}),
        (CURRENT.SGD(clipnorm=1.0), {"global_clipnorm": 1.0}),
        (LEGACY.SGD(global_clipnorm=1.0), {"clipnorm": 1.0}),
    ],
    ids=["name", "current", "legacy"],
)
def test_clipnorm_together_with_global_clipnorm(inner, settings):
    with pytest.raises(ValueError, match="(?i)(at most one of|cannot).*clipnorm.*global_clipnorm"):
        SWA(inner, **settings)


@pytest.mark.parametrize("given", ["instance", "dict"])
def test_inner_optimizer_that_averages_by_itself(given):
    inner = CURRENT.SGD(use_ema=True)
    inner = CURRENT.serialize(inner) if given == "dict" else inner
    with pytest.raises(ValueError, match="`use_ema=True`.*Expected an optimizer with `use_ema=False`"):
        SWA(inner)


@pytest.mark.parametrize("value", [0.999, 1, None, "yes"], ids=repr)
def test_trainable_weights_only_that_is_no_bool(value):
    """`MovingAverage("sgd", 0.999)` was right in TensorFlow Addons, so the message shows its order."""
    expected = (
        r"MovingAverage\(optimizer, average_decay.*ExponentialMovingAverage\(optimizer, average_decay="
    )
    with pytest.raises(TypeError, match=expected):
        EMA("sgd", value)
    with pytest.raises(TypeError, match="Expected `trainable_weights_only` to be a bool"):
        SWA("sgd", trainable_weights_only=value)


@pytest.mark.parametrize("value", ["yes", 1, None], ids=repr)
def test_dynamic_decay_that_is_no_bool(value):
    with pytest.raises(TypeError, match="Expected `dynamic_decay` to be a bool"):
        EMA("sgd", dynamic_decay=value)


@pytest.mark.parametrize("dtype", ["int32", tf.bool, "complex64", tf.string], ids=repr)
def test_average_dtype_that_is_not_floating(dtype):
    with pytest.raises(ValueError, match="Expected `average_dtype` to be a floating-point dtype"):
        EMA("sgd", average_dtype=dtype)


@pytest.mark.parametrize("dtype", ["no_such_dtype", object()], ids=["name", "object"])
def test_average_dtype_that_is_none(dtype):
    with pytest.raises(TypeError, match="(?i)cannot convert"):
        EMA("sgd", average_dtype=dtype)


@pytest.mark.parametrize("value", ["always", 1, None, []], ids=repr)
def test_jit_compile_of_wrong_value(value):
    with pytest.raises(ValueError, match='Expected `jit_compile` to be a bool or "auto"'):
        SWA("sgd", jit_compile=value)


def test_subclass_that_does_not_say_how_to_average():
    class Nothing(tfav.AveragedOptimizerWrapper):
        pass

    with pytest.raises(TypeError, match="Nothing does not say how to average.*`averaging_weight`"):
        Nothing("sgd")
    with pytest.raises(TypeError, match="does not say how to average"):
        tfav.AveragedOptimizerWrapper("sgd")


# The averages.


@pytest.mark.parametrize(
    ("method", "arguments"),
    [("swap_weights", []), ("update_average", []), ("assign_average_vars", [[tf.Variable(1.0)]])],
    ids=["swap_weights", "update_average", "assign_average_vars"],
)
@both_wrappers
def test_before_any_average_exists(wrap, method, arguments):
    with pytest.raises(ValueError, match=f"`{method}` needs averages, and none exist yet"):
        getattr(wrap("sgd"), method)(*arguments)


def test_swapped_weights_before_any_average_exists():
    with (
        pytest.raises(ValueError, match="needs averages, and none exist yet"),
        SWA("sgd").swapped_weights(),
    ):
        pytest.fail("The block must not run.")


def test_assigning_where_nothing_has_an_average():
    optimizer, _ = trained()
    foreign = tf.Variable(5.0, name="stranger")
    with pytest.raises(ValueError, match="none has one: .*stranger"):
        optimizer.assign_average_vars([foreign])
    with pytest.raises(ValueError, match="none has one"):
        optimizer.assign_average_vars([])
    assert foreign.numpy() == 5


@pytest.mark.parametrize("rubbish", [3, None], ids=repr)
def test_assigning_to_rubbish(rubbish):
    optimizer, _ = trained()
    with pytest.raises(TypeError, match="Expected a list of variables"):
        optimizer.assign_average_vars(rubbish)


@pytest.mark.parametrize(
    "weight",
    [
        -0.1,
        1.1,
        2,
        float("nan"),
        np.float64(2),
        np.float32(2),
    ],
    ids=repr,
)
def test_update_average_with_weight_out_of_range(weight):
    optimizer, variable = trained()
    before = state_of(tf.distribute.get_strategy(), optimizer, [variable])
    with pytest.raises(ValueError, match="Expected `weight` from 0 to 1"):
        optimizer.update_average(weight)
    assert_unchanged(tf.distribute.get_strategy(), before, optimizer, [variable])


@pytest.mark.parametrize("as_function", [False, True], ids=["eager", "function"])
@pytest.mark.parametrize("method", ["assign_average_vars", "update_average"])
def test_while_swapped(method, as_function):
    optimizer, variable = trained()
    optimizer.swap_weights()
    strategy = tf.distribute.get_strategy()
    before = state_of(strategy, optimizer, [variable])
    call = getattr(optimizer, method)
    arguments = [[variable]] if method == "assign_average_vars" else []
    call = tf.function(call) if as_function else call
    with pytest.raises(tf.errors.InvalidArgumentError, match="swap_weights"):
        call(*arguments)
    assert_unchanged(strategy, before, optimizer, [variable])


def test_trainable_weights_only_false_without_model(strategy):
    with strategy.scope():
        variable = tf.Variable(1.0)
        optimizer = EMA(CURRENT.SGD(0.1), trainable_weights_only=False)
    with pytest.raises(ValueError, match=r"Call `shadow_copy\(model\)` before training"):
        strategy.run(lambda: optimizer.apply_gradients([(tf.constant(1.0), variable)]) and None)
    assert variable.numpy() == 1
    assert optimizer.iterations.numpy() == 0
    model = testing_utils.make_model()
    model.compile(EMA("sgd", trainable_weights_only=False), "mse")
    with pytest.raises(ValueError, match=r"Call `shadow_copy\(model\)` before training"):
        model.fit(*testing_utils.make_data(1), verbose=0)


def keras_3_model():
    return keras_3.Sequential([keras_3.layers.Input((2,)), keras_3.layers.Dense(1)])


@pytest.mark.parametrize(
    ("rubbish", "error", "message"),
    [
        (42, TypeError, "Expected a model or a list of variables"),
        (None, TypeError, "Expected a model or a list of variables"),
        ([], ValueError, "Expected floating-point or complex variables"),
        ("model", ValueError, "Expected floating-point or complex variables"),
        ([tf.constant(1.0)], ValueError, "Expected floating-point or complex variables"),
        ([tf.Variable(1)], ValueError, "Expected floating-point or complex variables"),
        (
            [tf.Variable("a"), tf.Variable(True)],
            ValueError,
            "Expected floating-point or complex variables",
        ),
    ],
    ids=["int", "None", "empty", "str", "tensor", "int variable", "string and bool variables"],
)
def test_shadow_copy_of_rubbish(rubbish, error, message):
    optimizer = SWA("sgd")
    with pytest.raises(error, match=message):
        optimizer.shadow_copy(rubbish)
    assert not optimizer.has_shadow_copy


@pytest.mark.parametrize("part", ["model", "layer", "variables"])
def test_shadow_copy_of_keras_3(part):
    model = keras_3_model()
    rubbish = {"model": model, "layer": model.layers[0], "variables": model.trainable_variables}[part]
    with pytest.raises(TypeError, match="comes from Keras 3.*TF_USE_LEGACY_KERAS"):
        SWA("sgd").shadow_copy(rubbish)


# Training while swapped.


def train_eagerly(strategy, optimizer, model, data):
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(data[0]) - data[1]))
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))

    strategy.run(step)


def train_in_function(*arguments):
    tf.function(lambda: train_eagerly(*arguments))()


def train_with_fit(strategy, optimizer, model, data, **options):
    with strategy.scope():
        model.compile(optimizer, "mse", **options)
    model.fit(*data, verbose=0)


def train_eagerly_with_fit(*arguments):
    train_with_fit(*arguments, run_eagerly=True)


def train_with_steps_per_execution(*arguments):
    train_with_fit(*arguments, steps_per_execution=2)


def train_compiled(*arguments):
    train_with_fit(*arguments, jit_compile=True)


def train_with_loss_scaling(strategy, optimizer, model, data):
    with strategy.scope():
        model.compile(tf_keras.mixed_precision.LossScaleOptimizer(optimizer, initial_scale=2.0), "mse")
    model.fit(*data, verbose=0)


def assert_training_fails_while_swapped(strategy, inner, train):
    data = testing_utils.make_data(2)
    with strategy.scope():
        model = testing_utils.make_model()
        optimizer = EMA(inner(0.1))
    train_eagerly(strategy, optimizer, model, data)
    optimizer.swap_weights()
    before = state_of(strategy, optimizer, model.variables)
    assert optimizer.iterations.numpy() == optimizer.num_averaged.numpy() == 1
    with pytest.raises(tf.errors.InvalidArgumentError, match="swap_weights"):
        train(strategy, optimizer, model, data)
    assert_unchanged(strategy, before, optimizer, model.variables)
    optimizer.swap_weights()
    train_eagerly(strategy, optimizer, model, data)  # It may go on now.
    assert optimizer.iterations.numpy() == optimizer.num_averaged.numpy() == 2


@pytest.mark.parametrize("train", [train_eagerly, train_in_function, train_with_fit])
@both_generations
def test_training_while_swapped(module, train, strategy):
    assert_training_fails_while_swapped(strategy, module.Adam, train)


@pytest.mark.parametrize(
    "train", [train_eagerly_with_fit, train_with_steps_per_execution, train_with_loss_scaling]
)
@pytest.mark.parametrize(
    ("strategy", "module"),
    [("default", CURRENT), ("mirrored", LEGACY)],
    indirect=["strategy"],
    ids=["default-current", "mirrored-legacy"],
)
def test_other_training_while_swapped(strategy, module, train):
    assert_training_fails_while_swapped(strategy, module.Adam, train)


@both_generations
def test_compiled_training_while_swapped(module):
    """XLA drops assertions; the check survives it. (On CPUs tf_keras compiles for one replica only.)"""
    assert_training_fails_while_swapped(tf.distribute.get_strategy(), module.Adam, train_compiled)


@both_generations
def test_compiled_function_while_swapped(module):
    """The function was traced and compiled before the swap."""
    strategy = tf.distribute.get_strategy()
    optimizer, variable = SWA(module.Adam(0.1), 0, 2), tf.Variable([1.0, 2.0])
    optimizer.shadow_copy([variable])

    @tf.function(jit_compile=True)
    def step():
        optimizer.apply_gradients([(2 * variable, variable)])

    step()
    optimizer.swap_weights()
    before = state_of(strategy, optimizer, [variable])
    with pytest.raises(tf.errors.InvalidArgumentError, match="swap_weights"):
        step()
    assert_unchanged(strategy, before, optimizer, [variable])
    optimizer.swap_weights()
    step()
    assert optimizer.iterations.numpy() == 2


def test_training_while_swapped_where_no_update_is_due():
    """The check is made on every step, before averaging starts too."""
    optimizer = SWA(CURRENT.SGD(0.1), start_averaging=100)
    variable = tf.Variable(1.0)
    optimizer.shadow_copy([variable])
    optimizer.swap_weights()
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"Call `swap_weights\(\)` first"):
        optimizer.apply_gradients([(tf.constant(1.0), variable)])
    assert variable.numpy() == 1
    assert optimizer.iterations.numpy() == 0


@pytest.mark.parametrize("train", [train_eagerly, train_in_function])
def test_nested_wrapper_while_the_inner_one_is_swapped(train):
    """The inner wrapper refuses, so the outer one must not have moved either."""
    strategy = tf.distribute.get_strategy()
    model, data = testing_utils.make_model(), testing_utils.make_data(2)
    optimizer = EMA(SWA(CURRENT.Adam(0.1), 0, 1))
    train(strategy, optimizer, model, data)
    optimizer.inner_optimizer.swap_weights()
    before = state_of(strategy, optimizer, model.variables)
    with pytest.raises(tf.errors.InvalidArgumentError, match="(?i)swap_weights"):
        train(strategy, optimizer, model, data)
    assert_unchanged(strategy, before, optimizer, model.variables)


def test_swapped_weights_in_function():
    optimizer, variable = trained()
    before = variable.numpy()

    @tf.function
    def evaluate():
        with optimizer.swapped_weights():
            return variable.read_value()

    with pytest.raises(RuntimeError, match="`swapped_weights` cannot guard what a graph does"):
        evaluate()
    assert not optimizer.weights_swapped
    np.testing.assert_array_equal(variable, before)


# Steps.


@both_wrappers
def test_apply_gradients_in_cross_replica_context(wrap, mirrored_strategy):
    with mirrored_strategy.scope():
        variable = tf.Variable(1.0)
        optimizer = wrap(CURRENT.SGD(0.1))
        with pytest.raises(RuntimeError, match="cross-replica context.*`tf.distribute.Strategy.run`"):
            optimizer.apply_gradients([(tf.constant(1.0), variable)])
    assert variable.numpy() == 1
    assert not optimizer.has_shadow_copy


@pytest.mark.parametrize(
    "pairs",
    [
        3,
        None,
        [1.0, 2.0],
        [tf.constant([1.0, 2.0])],
        [(tf.constant(1.0),)],
        [(tf.constant(1.0), tf.Variable(1.0), 1)],
        [(tf.Variable(1.0), tf.constant(1.0))],
        [(tf.constant(1.0), "weight")],
    ],
    ids=["int", "None", "numbers", "tensor", "single", "triple", "reversed", "string"],
)
@both_generations
def test_malformed_pairs(module, pairs):
    optimizer = SWA(module.SGD(0.1))
    with pytest.raises(TypeError, match=r"Expected \(gradient, variable\) pairs"):
        optimizer.apply_gradients(pairs)
    assert optimizer.iterations.numpy() == 0
    assert not optimizer.has_shadow_copy


def test_keras_3_variable():
    weight = keras_3_model().trainable_variables[0]
    with pytest.raises(TypeError, match=r"Expected \(gradient, variable\) pairs"):
        SWA("sgd").apply_gradients([(tf.ones((2, 1)), weight)])


@pytest.mark.parametrize("as_function", [False, True], ids=["eager", "function"])
@pytest.mark.parametrize("gradients", [[], [None], [None, None]], ids=repr)
@both_generations
def test_no_gradient_at_all(module, gradients, as_function, strategy):
    """The same error as from the bare inner optimizer, or none where it raises none; no step is taken."""

    def outcome(optimizer, variables):
        def step():
            optimizer.apply_gradients(zip(gradients, variables))

        run = lambda: strategy.run(step)  # noqa: E731
        try:
            (tf.function(run) if as_function else run)()
        except Exception as error:
            return type(error)
        return None

    with strategy.scope():
        variables = [tf.Variable(1.0), tf.Variable(2.0)]
        bare, wrapped = module.SGD(0.1), SWA(module.SGD(0.1), 0, 1)
    expected = outcome(bare, variables)
    assert expected == (ValueError if gradients else None)
    assert outcome(wrapped, variables) == expected
    assert wrapped.iterations.numpy() == bare.iterations.numpy() == 0
    assert wrapped.num_averaged.numpy() == 0
    assert not wrapped.has_shadow_copy


def test_message_without_any_gradient():
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        SWA("sgd").apply_gradients([(None, tf.Variable(1.0))])


@both_generations
def test_minimize_of_tensor_without_tape(module):
    with tf.GradientTape():
        loss = tf.Variable(1.0) * 2
    with pytest.raises(ValueError, match="`tape`"):
        SWA(module.SGD(0.1)).minimize(loss, [tf.Variable(1.0)])
    with pytest.raises(ValueError, match="`tape`"):
        SWA(module.SGD(0.1)).minimize(loss, [tf.Variable(1.0)], grad_loss=tf.constant(1.0))


@pytest.mark.parametrize("method", ["get_gradients", "get_updates"])
@both_generations
def test_graph_method_in_eager_mode(module, method):
    variable = tf.Variable(1.0)
    with pytest.raises(RuntimeError, match="work in graphs only, and this is eager mode"):
        getattr(SWA(module.SGD(0.1)), method)(variable * 2, [variable])


@pytest.mark.parametrize("method", ["get_gradients", "get_updates"])
def test_graph_method_for_variable_without_gradient(method):
    used, unused = tf.Variable(1.0), tf.Variable(1.0, name="unused")
    optimizer = SWA(CURRENT.SGD(0.1))

    @tf.function
    def step():
        getattr(optimizer, method)(used * 2, [used, unused])

    with pytest.raises(ValueError, match="No gradient: .*unused"):
        step()
    assert used.numpy() == 1


@pytest.mark.parametrize("method", ["apply_gradients", "swap_weights", "update_average"])
@pytest.mark.parametrize("how", ["conditional", "loop"])
def test_conditional_or_loop_of_a_tf1_graph(how, method):
    with tf.Graph().as_default():
        weight = tf.Variable([1.0])
        optimizer = tfav.SWA(tf_keras.optimizers.legacy.SGD(), 0, 1)
        optimizer.shadow_copy([weight])
        arguments = [[(tf.ones([1]), weight)]] if method == "apply_gradients" else []

        def call(count):
            getattr(optimizer, method)(*arguments)
            return tf.add(count, 1)

        def build():
            if how == "loop":
                return tf.while_loop(lambda count: count < 3, call, [tf.constant(0)])
            condition = tf.compat.v1.placeholder(tf.bool, [])
            return tf.cond(condition, lambda: call(0), lambda: tf.constant(0))

        with pytest.raises(RuntimeError, match="In a conditional or loop of a TF 1 graph.*outside of it"):
            build()


@both_generations
def test_wrap_function_is_refused(module):
    """It orders nothing: the weights were trained and the averages were not, and nobody was told."""
    variable = tf.Variable([1.0])
    optimizer = tfav.SWA(module.SGD(1.0), 0, 1)
    optimizer.shadow_copy([variable])

    def step():
        optimizer.apply_gradients([(tf.ones([1]), variable)])
        return tf.constant(0)

    def swap():
        optimizer.swap_weights()
        return tf.constant(0)

    for call in (step, swap):
        with pytest.raises(RuntimeError, match="wrap_function.*in a `tf.function`"):
            tf.compat.v1.wrap_function(call, [])


def test_current_generation_in_tf1_graph():
    with tf.Graph().as_default():
        variable = tf.Variable(1.0)
        with pytest.raises(RuntimeError, match="In a TF 1 graph.*`tf_keras.optimizers.legacy.Optimizer`"):
            SWA(CURRENT.SGD(0.1)).get_updates(variable * 2, [variable])


# Slots and state.


@both_generations
def test_slot_of_foreign_variable(module):
    """A KeyError: `tf.train.Checkpoint` relies on the type."""
    optimizer, _ = trained(module.SGD(0.1))
    with pytest.raises(KeyError, match="'stranger:0' has no average"):
        optimizer.get_slot(tf.Variable(1.0, name="stranger"), "average")
    with pytest.raises(KeyError, match="has no average"):
        SWA("sgd").get_slot(tf.Variable(1.0), "average")


def test_unknown_slot():
    optimizer, variable = trained(CURRENT.SGD(0.1, momentum=0.9))
    with pytest.raises(KeyError, match="Expected 'average'.*slot_name='momentum'"):
        optimizer.get_slot(variable, "momentum")
    legacy, variable = trained(LEGACY.SGD(0.1, momentum=0.9))
    assert legacy.get_slot(variable, "momentum").shape == variable.shape
    with pytest.raises(KeyError, match="no_such_slot"):
        legacy.get_slot(variable, "no_such_slot")


def test_adding_slots_and_weights_that_nobody_can_hold():
    optimizer, variable = trained()
    with pytest.raises(ValueError, match="`add_slot` is for legacy inner optimizers"):
        optimizer.add_slot(variable, "momentum")
    with pytest.raises(ValueError, match="`add_weight` is for legacy inner optimizers"):
        optimizer.add_weight("counter", [])
    with pytest.raises(ValueError, match="An average starts from the variable's own value"):
        optimizer.add_slot(variable, "average", initializer="ones")


def test_exclude_from_weight_decay_with_legacy_inside():
    with pytest.raises(ValueError, match="Legacy optimizers have no weight decay"):
        SWA(LEGACY.SGD()).exclude_from_weight_decay(var_names=["bias"])


@pytest.mark.parametrize("spoil", ["short", "long", "empty", "shape", "scalar"])
@both_generations
def test_set_weights_that_do_not_fit(module, spoil):
    strategy = tf.distribute.get_strategy()
    optimizer, variable = trained(module.Adam(0.1))
    before = state_of(strategy, optimizer, [variable])
    weights = [weight + 1 if weight.dtype != bool else weight for weight in optimizer.get_weights()]
    position = max(index for index, weight in enumerate(weights) if weight.shape == (2,))
    if spoil == "shape":
        weights[position] = np.zeros((3,), np.float32)
    elif spoil == "scalar":
        weights[position] = np.float32(0)
    else:
        weights = {"short": weights[:-1], "long": weights + [np.zeros(())], "empty": []}[spoil]
    expected = (
        r"Expected shape \(2,\)" if spoil in ("shape", "scalar") else f"Expected {len(before) - 1} arrays"
    )
    with pytest.raises(ValueError, match=expected):
        optimizer.set_weights(weights)
    assert_unchanged(strategy, before, optimizer, [variable])


# What the inner optimizer refuses, the wrapper refuses in the same way.


def test_setting_the_learning_rate_of_a_schedule():
    schedule = tf_keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
    messages = []
    for optimizer in (CURRENT.SGD(schedule), SWA(CURRENT.SGD(schedule))):
        with pytest.raises(TypeError, match="LearningRateSchedule") as error:
            optimizer.learning_rate = 0.1
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_variable_that_appears_after_build_with_current_generation_inside():
    """Bare, a current-generation optimizer refuses it; and then no average may have moved."""
    optimizer, variable = trained()
    new = tf.Variable(1.0)
    before = [optimizer.get_slot(variable, "average").numpy(), new.numpy(), 2, 2]
    with pytest.raises(KeyError, match="optimizer cannot recognize variable"):
        optimizer.apply_gradients([(tf.constant(1.0), variable), (tf.constant(1.0), new)])
    average = optimizer.get_slot(variable, "average")
    for actual, expected in zip([average, new, optimizer.iterations, optimizer.num_averaged], before):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("name", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_negative_clipping(name):
    with pytest.raises(ValueError, match=f"Expected `{name}` to be a number >= 0"):
        SWA("sgd", **{name: -1.0})


def test_start_averaging_of_ema():
    with pytest.raises(TypeError, match="goes by the name of `start_step`"):
        EMA("sgd", start_averaging=3)


def test_sequential_update_of_wrong_type():
    with pytest.raises(TypeError, match="Expected `sequential_update` to be a bool"):
        SWA("sgd", sequential_update="yes")


class TestWhatHooksReturn:
    """A wrong shape would silently change the shape of the average, and by a swap the variable's."""

    @pytest.mark.parametrize("in_function", [False, True])
    @pytest.mark.parametrize(
        ("returned", "message"),
        [
            (
                lambda average: tf.reduce_max(average),
                r"shape \(2,\) and dtype float32. Received one of shape \(\)",
            ),
            (lambda average: tf.cast(average, tf.float64), "dtype float64"),
        ],
        ids=["shape", "dtype"],
    )
    def test_average_op(self, returned, message, in_function):
        class Wrong(tfav.AveragedOptimizerWrapper):
            def average_op(self, var, average_var):
                return returned(average_var)

        optimizer, variable = Wrong("sgd"), tf.Variable([1.0, 2.0])

        def step():
            optimizer.apply_gradients([(tf.ones([2]), variable)])

        with pytest.raises(ValueError, match=message):
            (tf.function(step) if in_function else step)()
        np.testing.assert_array_equal(optimizer.get_slot(variable, "average").shape, [2])

    def test_averaging_weight_of_wrong_shape(self):
        class Wrong(tfav.AveragedOptimizerWrapper):
            def averaging_weight(self, step):
                return [0.5, 0.25]

        with pytest.raises(ValueError, match="`averaging_weight` to be a scalar"):
            Wrong("sgd").apply_gradients([(tf.ones([2]), tf.Variable([1.0, 2.0]))])

    @pytest.mark.parametrize(
        "weight", [0.5, np.float32(0.5), tf.constant(0.5), tf.constant(0.5, tf.float64)]
    )
    def test_averaging_weight_may_be_any_number(self, weight):
        class Half(tfav.AveragedOptimizerWrapper):
            def averaging_weight(self, step):
                return weight

        optimizer, variable = Half(tf_keras.optimizers.SGD(1.0)), tf.Variable(3.0)
        optimizer.apply_gradients([(tf.constant(2.0), variable)])
        assert optimizer.get_slot(variable, "average").numpy() == 2.0
        optimizer.update_average(tf.constant(1.0))
        assert optimizer.get_slot(variable, "average").numpy() == 1.0


@pytest.mark.parametrize("thing", [None, "x", 3], ids=repr)
def test_slot_of_no_variable(thing):
    with pytest.raises(KeyError):
        trained()[0].get_slot(thing, "average")


@pytest.mark.parametrize("value", [3, "words", True], ids=repr)
def test_average_of_no_number(value):
    with pytest.raises(ValueError, match="Expected a floating-point or complex variable"):
        SWA("sgd").add_slot(tf.Variable(value, trainable=False), "average")


def test_list_after_a_model():
    model = tf.Module()
    model.weight = tf.Variable(1.0)
    optimizer = SWA("sgd")
    optimizer.shadow_copy(model)
    with pytest.raises(ValueError, match="a model is followed already"):
        optimizer.shadow_copy([model.weight])


@pytest.mark.parametrize("value", ["x", [1.0], -1.0, float("nan")], ids=repr)
def test_clipping_that_is_no_number(value):
    inner = tf_keras.optimizers.SGD()
    with pytest.raises(ValueError, match="Expected `clipnorm` to be a number >= 0"):
        SWA(inner, clipnorm=value)
    assert inner.clipnorm is None
