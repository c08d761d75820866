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

import tf_averaging as tfav
from tests import testing_utils
from tests.testing_utils import CURRENT
from tests.testing_utils import KERAS
from tests.testing_utils import LEGACY
from tests.testing_utils import average_of
from tests.testing_utils import bits
from tests.testing_utils import both_generations
from tests.testing_utils import descend
from tests.testing_utils import trained_variable

EMA, SWA = tfav.ExponentialMovingAverage, tfav.SWA
both_wrappers = pytest.mark.parametrize("wrap", [SWA, EMA])
both_modes = pytest.mark.parametrize("as_function", [False, True], ids=["eager", "function"])


def trained(inner=None):
    """A wrapper that has averaged, and its variable."""
    optimizer = SWA(inner or CURRENT.SGD(0.1, momentum=0.9), average_period=1)
    return optimizer, trained_variable(optimizer, [1.0, 2.0], steps=2)


def user_scheme(averaging_weight=None, average_op=None):
    """A subclass with these methods, called without `self`."""
    methods = {"averaging_weight": averaging_weight, "average_op": average_op}
    methods = {
        name: lambda self, *arguments, method=method: method(*arguments)
        for name, method in methods.items()
        if method
    }
    return type("Scheme", (tfav.AveragedOptimizerWrapper,), methods)


# The constructor.


def each(wrap, keyword, error, message, values):
    """A row of the table below for each value, which is in the message where that has braces.

    The call is `wrap(CURRENT.SGD(), keyword=value)`, or `wrap(value)` where there is no keyword.
    """

    def call(value):
        return wrap(value) if keyword is None else wrap("sgd", **{keyword: value})

    return [pytest.param(call, value, error, message.format(value)) for value in values]


SCHEDULES = [KERAS.optimizers.schedules.ExponentialDecay(0.1, steps, 0.5) for steps in (2, 3)]
RUBBISH = [None, 3, object(), [CURRENT.SGD()], tf.Variable(1.0)]
LOSS_SCALING = "goes around the averaging optimizer, not inside"
DECAY = "Expected `average_decay` to be a float from 0 to 1"
RATE = "`learning_rate` contradicts the inner optimizer's own"
BOTH_RATES = "`lr` and `learning_rate` are two names of one argument"
NO_DECAY = "`decay` exists in legacy optimizers only"
AVERAGES = "`use_ema=True`.*Expected an optimizer with `use_ema=False`"
CLASS = "Received a class, not an optimizer: call it first"
BOTH_NORMS = "(?i)(at most one of|cannot).*clipnorm.*global_clipnorm"
# `MovingAverage("sgd", 0.999)` was right in TensorFlow Addons, so the message shows its order.
ORDER = r"MovingAverage\(optimizer, average_decay.*ExponentialMovingAverage\(optimizer, average_decay="
ONLY = "Expected `trainable_weights_only` to be a bool"
DYNAMIC = "Expected `dynamic_decay` to be a bool"
DTYPE = "Expected `average_dtype` to be a floating-point dtype"
JIT = 'Expected `jit_compile` to be a bool or "auto"'
SEQUENTIAL = "Expected `sequential_update` to be a bool"
SAYS_NOTHING = "Scheme does not say how to average.*`averaging_weight`"
COUNTS = [
    (EMA, "start_step", 0),
    (SWA, "start_averaging", 0),
    (EMA, "average_period", 1),
    (SWA, "average_period", 1),
]


def every_count():
    for wrap, name, minimum in COUNTS:
        small = f"Expected `{name}` >= {minimum}. Received: {name}={{}}"
        yield from each(wrap, name, ValueError, small, [minimum - 1, -7, np.int64(minimum - 1)])
        large = f"Expected `{name}` <= 9223372036854775807, an int64. Received: {name}={{}}"
        yield from each(wrap, name, ValueError, large, [2**63, 10**30])
        other = f"Expected `{name}` to be an int. Received: {name}="
        # A period may be None: for updates by hand alone.
        none = [] if name == "average_period" else [None]
        yield from each(wrap, name, TypeError, other, [1.5, 2.0, True, np.True_, "3", [1], *none])


@both_wrappers
@pytest.mark.parametrize(
    ("rubbish", "message"),
    [
        *(
            (rubbish, r"Expected a `keras.optimizers.Optimizer`.*`tf_keras.*Received: ")
            for rubbish in RUBBISH
        ),
        *((module.SGD, CLASS) for module in (CURRENT, LEGACY, keras_3.optimizers)),
        *((testing_utils.loss_scaled(module.SGD()), LOSS_SCALING) for module in (CURRENT, LEGACY)),
    ],
)
def test_what_is_no_optimizer_to_wrap(wrap, rubbish, message):
    with pytest.raises(TypeError, match=message):
        wrap(rubbish)


@pytest.mark.parametrize(
    ("call", "value", "error", "message"),
    [
        *each(
            SWA, None, ValueError, "Could not interpret optimizer identifier: {}", ["no_such_optimizer"]
        ),
        *each(EMA, "average_decay", ValueError, DECAY, [-0.01, 1.01, 99, np.nan, np.inf, np.float64(2)]),
        *each(
            EMA,
            "average_decay",
            TypeError,
            DECAY,
            ["0.9", True, None, ["0.9"], [[0.9]], [0.9, None], len, {"decay": 0.9}],
        ),
        *every_count(),
        *each(SWA, "momentun", TypeError, "Unknown keyword arguments: .*momentun", [0.9]),
        *each(EMA, "momentun", TypeError, "Unknown keyword arguments: .*momentun", [0.9]),
        *each(lambda value: EMA(CURRENT.SGD(), value), None, TypeError, ORDER, [0.999, 1, None, "yes"]),
        *each(SWA, "trainable_weights_only", TypeError, ONLY, [0.999, 1, None, "yes"]),
        *each(EMA, "dynamic_decay", TypeError, DYNAMIC, ["yes", 1, None]),
        *each(EMA, "average_dtype", ValueError, DTYPE, ["int32", tf.bool, "complex64", tf.string]),
        *each(EMA, "average_dtype", TypeError, "(?i)cannot convert", ["no_such_dtype", object()]),
        *each(SWA, "jit_compile", ValueError, JIT, ["always", 1, None, []]),
        *each(user_scheme(), None, TypeError, SAYS_NOTHING, ["sgd"]),
        *each(tfav.AveragedOptimizerWrapper, None, TypeError, "does not say how to average", ["sgd"]),
        *each(EMA, "start_averaging", TypeError, "goes by the name of `start_step`", [3]),
        *each(SWA, "sequential_update", TypeError, SEQUENTIAL, ["yes"]),
    ],
)
def test_wrong_argument(call, value, error, message):
    with pytest.raises(error, match=message):
        call(value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SWA(CURRENT.SGD(SCHEDULES[0]), learning_rate=0.1), RATE),
        (lambda: SWA(CURRENT.SGD(SCHEDULES[0]), learning_rate=SCHEDULES[1]), RATE),
        (lambda: SWA("sgd", lr=0.1, learning_rate=0.2), BOTH_RATES),
        (lambda: SWA(LEGACY.SGD(decay=0.1), decay=0.2), "`decay` contradicts the inner optimizer's own"),
        (lambda: SWA("sgd", decay=0.1), NO_DECAY),
        (lambda: SWA(CURRENT.SGD(), decay=0.1), NO_DECAY),
        (lambda: SWA("sgd", clipnorm=1.0, global_clipnorm=1.0), BOTH_NORMS),
        (lambda: SWA(CURRENT.SGD(clipnorm=1.0), global_clipnorm=1.0), BOTH_NORMS),
        (lambda: SWA(LEGACY.SGD(global_clipnorm=1.0), clipnorm=1.0), BOTH_NORMS),
        (lambda: SWA(CURRENT.SGD(use_ema=True)), AVERAGES),
        (lambda: SWA(CURRENT.serialize(CURRENT.SGD(use_ema=True))), AVERAGES),
    ],
)
def test_settings_that_do_not_go_together(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["average_decay", "average_period", "num_averaged"])
@pytest.mark.parametrize("module", [keras_3.optimizers, CURRENT, LEGACY])
def test_what_cannot_be_set(module, name):
    optimizer = tfav.ExponentialMovingAverage(module.SGD())
    before = getattr(optimizer, name)
    with pytest.raises(AttributeError, match=f"`{name}` cannot be set.*create another"):
        setattr(optimizer, name, 1)
    assert getattr(optimizer, name) == before


@pytest.mark.parametrize("name", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_negative_clipping(name):
    with pytest.raises(ValueError, match=f"Expected `{name}` to be a number >= 0"):
        SWA("sgd", **{name: -1.0})


@pytest.mark.parametrize("value", ["x", [1.0], -1.0, float("nan")], ids=repr)
def test_clipping_that_is_no_number_does_not_reach_the_inner_optimizer(value):
    inner = CURRENT.SGD()
    with pytest.raises(ValueError, match="Expected `clipnorm` to be a number >= 0"):
        SWA(inner, clipnorm=value)
    assert inner.clipnorm is None


@pytest.mark.parametrize("decay", [0, 1, 0.0, 1.0, np.float32(0.5)], ids=repr)
def test_decay_at_the_limits_is_accepted(decay):
    assert EMA(CURRENT.SGD(), average_decay=decay).average_decay == decay


@pytest.mark.parametrize("name", ["learning_rate", "lr", "clipnorm", "clipvalue", "global_clipnorm"])
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


@both_generations
def test_agreeing_with_the_inner_optimizer(module):
    """With a learning rate that float32 rounds too, with a schedule, a decay, and with itself."""
    for inner in (module.SGD(0.1), CURRENT.serialize(module.SGD(0.1))):
        assert SWA(inner, learning_rate=0.1).learning_rate.numpy() == np.float32(0.1)
    assert SWA(module.SGD(SCHEDULES[0]), learning_rate=SCHEDULES[0]).inner_optimizer is not None
    assert SWA(LEGACY.SGD(decay=0.1), decay=0.1).inner_optimizer.get_config()["decay"] == 0.1
    assert float(SWA("sgd", lr=0.25, learning_rate=0.25).learning_rate) == 0.25


# The averages.


@pytest.mark.parametrize(
    ("method", "arguments"),
    [("swap_weights", []), ("update_average", []), ("assign_average_vars", [[tf.Variable(1.0)]])],
    ids=["swap_weights", "update_average", "assign_average_vars"],
)
@both_wrappers
def test_before_any_average_exists(wrap, method, arguments):
    with pytest.raises(ValueError, match=f"`{method}` needs averages, and none exist yet"):
        getattr(wrap(CURRENT.SGD()), method)(*arguments)


def test_swapped_weights_before_any_average_exists():
    with (
        pytest.raises(ValueError, match="needs averages, and none exist yet"),
        SWA(CURRENT.SGD()).swapped_weights(),
    ):
        pytest.fail("The block must not run.")


STRANGER = tf.Variable(5.0, name="stranger")
OWN = object()  # The variable that the optimizer averages.
WEIGHTS = [-0.1, 1.1, 2, float("nan"), np.float64(2), np.float32(2)]


@pytest.mark.parametrize(
    ("method", "arguments", "error", "message"),
    [
        ("assign_average_vars", [[STRANGER]], ValueError, "none has one: .*stranger"),
        ("assign_average_vars", [[]], ValueError, "none has one"),
        *(("assign_average_vars", [x], TypeError, "Expected a list of variables") for x in (3, None)),
        *(("update_average", [x], ValueError, "Expected `weight` from 0 to 1") for x in WEIGHTS),
        ("update_average", ["1"], TypeError, "Expected `weight` to be a number"),
        # A KeyError: `tf.train.Checkpoint` relies on the type.
        ("get_slot", [STRANGER, "average"], KeyError, "'stranger:0' has no average"),
        *(("get_slot", [x, "average"], KeyError, None) for x in (None, "x", 3)),
        ("get_slot", [OWN, "momentum"], KeyError, "Expected 'average'.*slot_name='momentum'"),
        ("add_slot", [OWN, "momentum"], ValueError, "`add_slot` is for legacy inner optimizers"),
        ("add_slot", [OWN, "average", "ones"], ValueError, "starts from the variable's own value"),
        ("add_weight", ["counter", []], ValueError, "`add_weight` is for legacy inner optimizers"),
    ],
)
def test_call_that_makes_no_sense(method, arguments, error, message):
    optimizer, variable = trained()

    arguments = [variable if argument is OWN else argument for argument in arguments]
    before = bits([variable, STRANGER, *optimizer.variables])
    averages = optimizer.get_average(variable).numpy()
    with pytest.raises(error, match=message):
        getattr(optimizer, method)(*arguments)
    assert bits([variable, STRANGER, *optimizer.variables]) == before
    np.testing.assert_array_equal(optimizer.get_average(variable), averages)


@both_modes
@pytest.mark.parametrize("method", ["assign_average_vars", "update_average"])
def test_while_swapped(method, as_function):
    optimizer, variable = trained()
    optimizer.swap_weights()
    before = bits([variable, *optimizer.variables])
    call = getattr(optimizer, method)
    arguments = [[variable]] if method == "assign_average_vars" else []
    with pytest.raises(tf.errors.InvalidArgumentError, match="swap_weights"):
        (tf.function(call) if as_function else call)(*arguments)
    assert bits([variable, *optimizer.variables]) == before


def test_trainable_weights_only_false_without_model(strategy):
    with strategy.scope():
        variable = tf.Variable(1.0)
        optimizer = EMA(CURRENT.SGD(0.1), trainable_weights_only=False)
    with pytest.raises(ValueError, match=r"Call `shadow_copy\(model\)` before training"):
        strategy.run(lambda: optimizer.apply_gradients([(tf.constant(1.0), variable)]) and None)
    assert variable.numpy() == 1
    assert optimizer.iterations.numpy() == 0
    model = testing_utils.new_model(EMA(CURRENT.SGD(), trainable_weights_only=False))
    with pytest.raises(ValueError, match=r"Call `shadow_copy\(model\)` before training"):
        testing_utils.fit_steps(model, 1)


def keras_3_model():
    return keras_3.Sequential([keras_3.layers.Input((2,)), keras_3.layers.Dense(1)])


NO_WEIGHTS = ["model", [], [tf.constant(1.0)], [tf.Variable(1)], [tf.Variable("a"), tf.Variable(True)]]


@pytest.mark.parametrize(
    ("rubbish", "error", "message"),
    [
        *((rubbish, TypeError, "Expected a model or a list of variables") for rubbish in (42, None)),
        *(
            (rubbish, ValueError, "Expected floating-point or complex variables")
            for rubbish in NO_WEIGHTS
        ),
    ],
)
def test_shadow_copy_of_rubbish(rubbish, error, message):
    optimizer = SWA(CURRENT.SGD())
    with pytest.raises(error, match=message):
        optimizer.shadow_copy(rubbish)
    assert not optimizer.has_shadow_copy


@pytest.mark.parametrize("part", ["model", "layer", "variables"])
def test_shadow_copy_of_keras_3(part):
    model = keras_3_model()
    rubbish = {"model": model, "layer": model.layers[0], "variables": model.trainable_variables}[part]
    with pytest.raises(TypeError, match="optimizer is of tf_keras. Received what comes from Keras 3"):
        SWA(CURRENT.SGD()).shadow_copy(rubbish)


# Training while swapped.


def train_eagerly(strategy, optimizer, model):
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(testing_utils.X) - testing_utils.Y))
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))

    strategy.run(step)


def train_in_function(*arguments):
    tf.function(lambda: train_eagerly(*arguments))()


def fitting(wrap=lambda optimizer, keras: optimizer, **options):
    """A function like `train_eagerly` that calls `fit` of a model compiled with these options."""

    def train(strategy, optimizer, model):
        with strategy.scope():
            model.compile(wrap(optimizer, optimizer.keras), "mse", **options)
        testing_utils.fit_steps(model, 2)

    return train


ON_ALL = {"eagerly": train_eagerly, "in function": train_in_function, "fit": fitting()}
ON_SOME = {
    "fit, eagerly": fitting(run_eagerly=True),
    "steps_per_execution": fitting(steps_per_execution=2),
    "loss scaling": fitting(testing_utils.loss_scaled),
}
# XLA drops assertions; the check survives it. On CPUs it compiles for one replica only.
COMPILED = {
    "XLA": fitting(jit_compile=True),
    "XLA, loss scaling": fitting(testing_utils.loss_scaled, jit_compile=True),
}
KERAS_3 = keras_3.optimizers


@pytest.mark.parametrize(
    ("strategy", "module", "train"),
    [
        *((s, m, t) for s in ("default", "mirrored") for m in (CURRENT, LEGACY) for t in ON_ALL),
        *((s, m, t) for s, m in [("default", CURRENT), ("mirrored", LEGACY)] for t in ON_SOME),
        *(("default", module, "XLA") for module in (CURRENT, LEGACY)),
        *(("default", KERAS_3, train) for train in {**ON_ALL, **ON_SOME, **COMPILED}),
        ("mirrored", KERAS_3, "fit"),
    ],
    indirect=["strategy"],
)
def test_training_while_swapped(strategy, module, train):
    train = {**ON_ALL, **ON_SOME, **COMPILED}[train]
    model = testing_utils.new_model(strategy=strategy, keras=testing_utils.keras_of(module))
    with strategy.scope():
        optimizer = EMA(module.Adam(0.1))
        optimizer.build(model.trainable_variables)
    train_eagerly(strategy, optimizer, model)
    optimizer.swap_weights()
    before = bits([*model.variables, *optimizer.get_weights()])
    assert optimizer.iterations.numpy() == optimizer.num_averaged.numpy() == 1
    with pytest.raises(tf.errors.InvalidArgumentError, match="swap_weights"):
        train(strategy, optimizer, model)
    assert bits([*model.variables, *optimizer.get_weights()]) == before
    optimizer.swap_weights()
    train_eagerly(strategy, optimizer, model)  # It may go on now.
    assert optimizer.iterations.numpy() == optimizer.num_averaged.numpy() == 2


@both_generations
def test_compiled_function_while_swapped(module):
    """The function was traced and compiled before the swap."""
    optimizer, variable = SWA(module.Adam(0.1), 0, 2), tf.Variable([1.0, 2.0])
    optimizer.shadow_copy([variable])
    step = tf.function(lambda: descend(optimizer, [variable]), jit_compile=True)
    step()
    optimizer.swap_weights()
    before = bits([variable, *optimizer.variables])
    with pytest.raises(tf.errors.InvalidArgumentError, match="swap_weights"):
        step()
    assert bits([variable, *optimizer.variables]) == before
    optimizer.swap_weights()
    step()
    assert optimizer.iterations.numpy() == 2


def test_training_while_swapped_where_no_update_is_due():
    """The check is made on every step, before averaging starts too."""
    optimizer, variable = SWA(CURRENT.SGD(0.1), start_averaging=100), tf.Variable(1.0)
    optimizer.shadow_copy([variable])
    optimizer.swap_weights()
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"Call `swap_weights\(\)` first"):
        descend(optimizer, [variable])
    assert variable.numpy() == 1
    assert optimizer.iterations.numpy() == 0


@pytest.mark.parametrize("train", [train_eagerly, train_in_function])
def test_nested_wrapper_while_the_inner_one_is_swapped(train):
    """The inner wrapper refuses, so the outer one must not have moved either."""
    model, optimizer = testing_utils.new_model(), EMA(SWA(CURRENT.Adam(0.1), 0, 1))
    arguments = tf.distribute.get_strategy(), optimizer, model
    train(*arguments)
    optimizer.inner_optimizer.swap_weights()
    before = bits([*model.variables, *optimizer.get_weights()])
    with pytest.raises(tf.errors.InvalidArgumentError, match="(?i)swap_weights"):
        train(*arguments)
    assert bits([*model.variables, *optimizer.get_weights()]) == before


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


GRADIENT, WEIGHT = tf.constant(1.0), tf.Variable(1.0)
SINGLE, TRIPLE, REVERSED = (GRADIENT,), (GRADIENT, WEIGHT, 1), (WEIGHT, GRADIENT)
OTHERS = [3, None, [1.0, 2.0], [tf.constant([1.0, 2.0])], [(GRADIENT, "weight")]]


@pytest.mark.parametrize("pairs", [*OTHERS, [SINGLE], [TRIPLE], [REVERSED]])
@both_generations
def test_malformed_pairs(module, pairs):
    optimizer = SWA(module.SGD(0.1))
    with pytest.raises(TypeError, match=r"Expected \(gradient, variable\) pairs"):
        optimizer.apply_gradients(pairs)
    assert optimizer.iterations.numpy() == 0
    assert not optimizer.has_shadow_copy


def test_keras_3_variable():
    weight = keras_3_model().trainable_variables[0]
    with pytest.raises(TypeError, match="optimizer is of tf_keras. Received what comes from Keras 3"):
        SWA(CURRENT.SGD()).apply_gradients([(tf.ones((2, 1)), weight)])


@both_modes
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
        SWA(CURRENT.SGD()).apply_gradients([(None, tf.Variable(1.0))])


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


@pytest.mark.parametrize("how", ["directly", "in a branch", "in a loop"])
@both_generations
def test_graph_of_tf1_is_refused(module, how):
    with tf.Graph().as_default():
        weight = tf.Variable([1.0])
        optimizer = SWA(module.SGD(), 0, 1)

        def call(count):
            for method, argument in [
                (optimizer.apply_gradients, [(tf.ones([1]), weight)]),
                (optimizer.shadow_copy, [weight]),
            ]:
                with pytest.raises(RuntimeError, match="In graphs of TF 1.*in a `tf.function`"):
                    method(argument)
            return tf.add(count, 1)

        if how == "directly":
            call(0)
        elif how == "in a loop":
            tf.while_loop(lambda count: count < 3, call, [tf.constant(0)])
        else:
            condition = tf.compat.v1.placeholder(tf.bool, [])
            tf.cond(condition, lambda: call(0), lambda: tf.constant(0))


@both_generations
def test_wrap_function_is_refused(module):
    """It orders nothing: the weights were trained and the averages were not, and nobody was told."""
    variable = tf.Variable([1.0])
    optimizer = SWA(module.SGD(1.0), 0, 1)
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


# Slots and state.


@both_generations
def test_slot_before_any_average_exists(module):
    with pytest.raises(KeyError, match="has no average"):
        SWA(module.SGD()).get_slot(tf.Variable(1.0), "average")


def test_unknown_slot_with_legacy_inside():
    optimizer, variable = trained(LEGACY.SGD(0.1, momentum=0.9))
    assert optimizer.get_slot(variable, "momentum").shape == variable.shape
    with pytest.raises(KeyError, match="no_such_slot"):
        optimizer.get_slot(variable, "no_such_slot")
    with pytest.raises(KeyError, match="'stranger:0' has no average"):
        optimizer.get_slot(STRANGER, "average")


def test_exclude_from_weight_decay_with_legacy_inside():
    with pytest.raises(ValueError, match="Legacy optimizers have no weight decay"):
        SWA(LEGACY.SGD()).exclude_from_weight_decay(var_names=["bias"])


@pytest.mark.parametrize("spoil", ["short", "long", "empty", "shape", "scalar"])
@both_generations
def test_set_weights_that_do_not_fit(module, spoil):
    optimizer, variable = trained(module.Adam(0.1))
    before = bits([variable, *optimizer.variables])
    weights = [weight + 1 if weight.dtype != bool else weight for weight in optimizer.get_weights()]
    position = max(index for index, weight in enumerate(weights) if weight.shape == (2,))
    message = f"Expected {len(weights)} arrays"
    if spoil in ("shape", "scalar"):
        weights[position] = np.zeros((3,) if spoil == "shape" else (), np.float32)
        message = r"Expected shape \(2,\)"
    else:
        weights = {"short": weights[:-1], "long": weights + [np.zeros(())], "empty": []}[spoil]
    with pytest.raises(ValueError, match=message):
        optimizer.set_weights(weights)
    assert bits([variable, *optimizer.variables]) == before


# What the inner optimizer refuses, the wrapper refuses in the same way.


def test_setting_the_learning_rate_of_a_schedule():
    messages = []
    for optimizer in (CURRENT.SGD(SCHEDULES[0]), SWA(CURRENT.SGD(SCHEDULES[0]))):
        with pytest.raises(TypeError, match="LearningRateSchedule") as error:
            optimizer.learning_rate = 0.1
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_variable_that_appears_after_build_with_current_generation_inside():
    """Bare, a current-generation optimizer refuses it; and then no average may have moved."""
    optimizer, variable = trained()
    new = tf.Variable(1.0)
    unmoved = [optimizer.get_slot(variable, "average"), new, optimizer.iterations, optimizer.num_averaged]
    before = bits(unmoved)
    with pytest.raises(KeyError, match="optimizer cannot recognize variable"):
        optimizer.apply_gradients([(tf.ones([2]), variable), (tf.constant(1.0), new)])
    assert bits(unmoved) == before


class TestWhatHooksReturn:
    """A wrong shape would silently change the shape of the average, and by a swap the variable's."""

    @both_modes
    @pytest.mark.parametrize(
        ("returned", "message"),
        [
            (tf.reduce_max, r"shape \(2,\) and dtype float32. Received one of shape \(\)"),
            (lambda average: tf.cast(average, tf.float64), "dtype float64"),
        ],
        ids=["shape", "dtype"],
    )
    def test_average_op(self, returned, message, as_function):
        optimizer = user_scheme(average_op=lambda var, average_var: returned(average_var))(CURRENT.SGD())
        variable = tf.Variable([1.0, 2.0])
        step = lambda: descend(optimizer, [variable])  # noqa: E731
        with pytest.raises(ValueError, match=message):
            (tf.function(step) if as_function else step)()
        np.testing.assert_array_equal(average_of(optimizer, variable).shape, [2])

    @pytest.mark.parametrize("weight", [None, "0.5"])
    def test_averaging_weight_that_is_no_number(self, weight):
        with pytest.raises(TypeError, match=f"`averaging_weight` to return a number.*{weight}"):
            trained_variable(user_scheme(lambda *clock: weight)(CURRENT.SGD()), 1.0)

    def test_averaging_weight_of_wrong_shape(self):
        with pytest.raises(ValueError, match="`averaging_weight` to return a scalar"):
            trained_variable(user_scheme(lambda *clock: [0.5, 0.25])(CURRENT.SGD()), [1.0, 2.0])

    @pytest.mark.parametrize(
        "weight", [0.5, np.float32(0.5), tf.constant(0.5), tf.constant(0.5, tf.float64)]
    )
    def test_averaging_weight_may_be_any_number(self, weight):
        optimizer = user_scheme(lambda *clock: weight)(CURRENT.SGD(1.0))
        variable = trained_variable(optimizer, 3.0, 2.0)
        assert average_of(optimizer, variable) == 2.0
        optimizer.update_average(tf.constant(1.0))
        assert average_of(optimizer, variable) == 1.0


@pytest.mark.parametrize("value", [3, "words", True], ids=repr)
def test_average_of_no_number(value):
    with pytest.raises(ValueError, match="Expected a floating-point or complex variable"):
        SWA(CURRENT.SGD()).add_slot(tf.Variable(value, trainable=False), "average")


def test_list_after_a_model():
    model = tf.Module()
    model.weight = tf.Variable(1.0)
    optimizer = SWA(CURRENT.SGD())
    optimizer.shadow_copy(model)
    with pytest.raises(ValueError, match="a model is followed already"):
        optimizer.shadow_copy([model.weight])


# By either Keras.


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda o: o.shadow_copy([1]), ValueError, "floating-point or complex variables"),
        (lambda o: o.shadow_copy("x"), (TypeError, ValueError), "Expected"),
        (lambda o: o.shadow_copy(tf.Variable([1.0])), TypeError, "a model or a list of variables"),
        (lambda o: o.reset_averages(tf.Variable([1.0])), TypeError, "a list of variables"),
        (lambda o: setattr(o, "jit_compile", "banana"), ValueError, "banana"),
        (lambda o: setattr(o, "use_ema", True), ValueError, "use_ema=False"),
        (lambda o: o.no_such_setting, AttributeError, "no_such_setting"),
    ],
)
def test_wrong_call_says_what_is_right(keras, call, error, match):
    optimizer = SWA(keras.optimizers.SGD(1.0), 0, 1)
    with pytest.raises(error, match=match):
        call(optimizer)
    assert not optimizer.has_shadow_copy
    assert optimizer.jit_compile == "auto"


def test_attribute_set_too_early(keras):
    class Early(tfav.AveragedOptimizerWrapper):
        def __init__(self, optimizer):
            self.eta = 1.0
            super().__init__(optimizer)

        def averaging_weight(self, steps, updates):
            return self.eta

    with pytest.raises((AttributeError, RuntimeError), match=r"super\(\).__init__"):
        Early(keras.optimizers.SGD(1.0))


@pytest.mark.parametrize("weight", [3, -0.5, np.nan])
@pytest.mark.parametrize("as_function", [False, True])
def test_scheme_whose_first_weight_is_none(weight, as_function):
    optimizer = user_scheme(lambda *clock: weight)(CURRENT.SGD(1.0))
    variable = tf.Variable(1.0)

    def step():
        optimizer.apply_gradients([(tf.constant(1.0), variable)])

    with pytest.raises(ValueError, match="weights from 0 to 1"):
        (tf.function(step) if as_function else step)()
    assert variable.numpy() == 1.0


@pytest.mark.parametrize("as_function", [False, True])
def test_scheme_may_return_an_integer(as_function):
    optimizer = user_scheme(lambda steps, updates: tf.where(updates < 1, 1, 0))(CURRENT.SGD(1.0))
    variable = tf.Variable(1.0)

    def step():
        optimizer.apply_gradients([(tf.constant(1.0), variable)])

    step = tf.function(step) if as_function else step
    step()
    step()
    assert optimizer.get_average(variable) == 0.0
    assert variable.numpy() == -1.0
