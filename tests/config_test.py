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
"""Configurations: JSON, round trips through Keras, and the constructors' signatures."""

import copy
import inspect
import json

import pytest
import tensorflow as tf

import tf_averaging as tfav
from tests import testing_utils
from tests.testing_utils import CURRENT
from tests.testing_utils import GENERATIONS
from tests.testing_utils import KERAS
from tests.testing_utils import LEGACY
from tests.testing_utils import both_generations
from tests.testing_utils import trained_variable

EMA, SWA = tfav.ExponentialMovingAverage, tfav.SWA
schedules = KERAS.optimizers.schedules

EVERY_INNER = {
    f"{generation}-{name}": cls
    for generation, module in GENERATIONS.items()
    for name, cls in testing_utils.shipped_optimizers(module).items()
}


def make_schedule():
    return schedules.PolynomialDecay(0.5, 100, 0.999)


# What `get_config` must hold beside the inner optimizer: the arguments given or their defaults.
COMMON = {
    "trainable_weights_only": True,
    "average_dtype": None,
    "jit_compile": "auto",
    "average_device": None,
}
OTHERS = {
    "trainable_weights_only": False,
    "average_dtype": "float64",
    "jit_compile": False,
    "average_device": "CPU:1",
}
WRAPPERS = {
    "SWA": (
        lambda: SWA(CURRENT.SGD()),
        dict(COMMON, name="SWA", start_averaging=0, average_period=10, sequential_update=True),
    ),
    "SWA, nothing by default": (
        lambda: SWA(CURRENT.AdamW(0.25, clipnorm=1.0), 3, 5, "mine", False, **OTHERS),
        dict(OTHERS, name="mine", start_averaging=3, average_period=5, sequential_update=False),
    ),
    "EMA": (
        lambda: EMA(CURRENT.SGD()),
        dict(
            COMMON,
            name="ExponentialMovingAverage",
            start_step=0,
            average_period=1,
            average_decay=0.99,
            dynamic_decay=True,
        ),
    ),
    "EMA, nothing by default": (
        lambda: EMA(
            LEGACY.Adam(0.25, clipvalue=0.5, decay=0.125),
            average_decay=0.5,
            start_step=7,
            dynamic_decay=False,
            name="mine",
            average_period=2,
            **dict(OTHERS, average_dtype=tf.float64, jit_compile=True),
        ),
        dict(
            OTHERS,
            name="mine",
            start_step=7,
            average_period=2,
            average_decay=0.5,
            dynamic_decay=False,
            jit_compile=True,
        ),
    ),
    "EMA with a schedule": (
        lambda: EMA(CURRENT.SGD(schedules.ExponentialDecay(0.1, 5, 0.5)), average_decay=make_schedule()),
        {"average_decay": {**schedules.serialize(make_schedule()), "keras": "tf_keras"}, "start_step": 0},
    ),
    "nested, current": (lambda: EMA(SWA(CURRENT.SGD(0.5, momentum=0.25), 2, 3)), {"start_step": 0}),
    "nested, legacy": (
        lambda: SWA(EMA(SWA(LEGACY.Ftrl(0.5), 2, 3), average_decay=make_schedule()), 4, 1),
        {"start_averaging": 4, "average_period": 1},
    ),
}
every_wrapper = pytest.mark.parametrize(("make", "expected"), list(WRAPPERS.values()), ids=list(WRAPPERS))


def round_trip(optimizer, custom_objects=None):
    """Through JSON, as a file keeps it."""
    text = json.dumps(CURRENT.serialize(optimizer))
    return CURRENT.deserialize(json.loads(text), custom_objects=custom_objects)


def layers_of(optimizer):
    """The optimizer, what it wraps, what that wraps, and so on."""
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "inner_optimizer", None)


# Round trips.


@every_wrapper
def test_config_says_all_arguments(make, expected):
    optimizer = make()
    config = optimizer.get_config()
    actual = {key: value for key, value in config.items() if key in expected}
    assert actual == expected
    if "jit_compile" in expected:
        # An `optimizer` beside it, a mark that Keras asks for, and nothing else.
        assert set(config) == {*expected, "optimizer", "is_legacy_optimizer"}
    assert config["optimizer"] == CURRENT.serialize(optimizer.inner_optimizer)
    assert config["is_legacy_optimizer"] is False


@every_wrapper
def test_config_is_json(make, expected):
    config = make().get_config()
    assert json.loads(json.dumps(config)) == config


@both_generations
def test_config_is_json_after_training(module):
    """Once it trains, an optimizer's settings are variables."""
    optimizer = SWA(module.SGD(0.25, momentum=0.5), 0, 1, clipvalue=2.0)
    before = json.dumps(optimizer.get_config())
    trained_variable(optimizer)
    assert json.dumps(optimizer.get_config()) == before


@every_wrapper
def test_round_trip(make, expected):
    optimizer = make()
    restored = round_trip(optimizer)
    assert restored is not optimizer
    assert restored.get_config() == optimizer.get_config()
    assert [type(layer) for layer in layers_of(restored)] == [
        type(layer) for layer in layers_of(optimizer)
    ]


@every_wrapper
def test_from_config(make, expected):
    """Gives an equal optimizer, shares nothing with the first, and leaves its argument alone, deeply."""
    optimizer = make()
    config = optimizer.get_config()
    before = copy.deepcopy(config)
    restored = type(optimizer).from_config(config)
    assert config == before
    assert restored.get_config() == config
    assert restored.inner_optimizer is not optimizer.inner_optimizer
    again = type(optimizer).from_config(config)
    assert again.get_config() == config


@every_wrapper
def test_deserialize_leaves_our_config_alone(make, expected):
    """`deserialize` edits the dict that it is given; what it hands to `from_config` stays."""
    serialized = CURRENT.serialize(make())
    config = serialized["config"]
    before = copy.deepcopy(config)
    CURRENT.deserialize(serialized)
    assert config == before


@pytest.mark.parametrize("name", EVERY_INNER)
def test_every_inner_optimizer(name):
    """In the way in which `load_model` creates optimizers: without a wrapper it works for all of them."""
    inner = EVERY_INNER[name](learning_rate=0.25, name="inner")

    def load(optimizer):
        text = json.dumps(KERAS.saving.serialize_keras_object(optimizer))
        return KERAS.saving.deserialize_keras_object(json.loads(text))

    assert type(load(inner)) is type(inner)
    optimizer = SWA(inner, 1, 2)
    restored = load(optimizer)
    assert type(restored.inner_optimizer) is type(inner)
    assert restored.inner_optimizer.get_config() == inner.get_config()
    assert restored.get_config() == optimizer.get_config()


@both_generations
def test_settings_of_the_inner_optimizer_survive(module):
    """Whether given to it or to the wrapper."""
    schedule = schedules.CosineDecay(0.5, 10)
    optimizer = EMA(module.SGD(schedule, momentum=0.25), clipvalue=0.125)
    restored = round_trip(optimizer)
    inner = restored.inner_optimizer
    assert isinstance(inner, module.SGD)
    assert inner.get_config()["momentum"] == 0.25
    assert inner.get_config()["learning_rate"] == schedules.serialize(schedule)
    assert restored.clipvalue == inner.clipvalue == 0.125


def test_learning_rate_that_was_changed():
    optimizer = SWA("sgd", learning_rate=0.5)
    optimizer.learning_rate = 0.25
    assert float(round_trip(optimizer).learning_rate) == 0.25


def test_restored_schedule_gives_the_decay():
    restored = round_trip(EMA(CURRENT.SGD(), average_decay=make_schedule()))
    assert isinstance(restored.average_decay, schedules.PolynomialDecay)
    assert float(restored.average_decay(50)) == pytest.approx((0.5 + 0.999) / 2)
    weight = restored.averaging_weight(tf.constant(50, tf.int64), updates=None)
    assert float(weight) == pytest.approx(1 - (0.5 + 0.999) / 2)


def test_restored_optimizer_trains_alike():
    results = []
    for optimizer in (first := EMA(LEGACY.Adam(0.5), average_decay=0.5), round_trip(first)):
        variable = trained_variable(optimizer, [1.0, 2.0], steps=3)
        results.append([variable.numpy(), testing_utils.average_of(optimizer, variable)])
    testing_utils.assert_same_bits(*results)
    assert results[0][0].tolist() != [1.0, 2.0]


# Registration.


@pytest.mark.parametrize("cls", [SWA, EMA])
def test_registered_with_keras(cls):
    """So nothing that loads needs `custom_objects`."""
    name = f"tf_averaging>{cls.__name__}"
    assert KERAS.saving.get_registered_name(cls) == name
    assert KERAS.saving.get_registered_object(name) is cls
    assert CURRENT.serialize(cls(CURRENT.SGD()))["registered_name"] == name


@KERAS.saving.register_keras_serializable("tests_of_config")
class Halfway(tfav.AveragedOptimizerWrapper):
    """A user's scheme with an argument of its own."""

    def __init__(self, optimizer, share=0.5, name="Halfway", **options):
        super().__init__(optimizer, name, **options)
        self.share = share

    def averaging_weight(self, steps, updates):
        return self.share

    def get_config(self):
        return {**super().get_config(), "share": self.share}


@KERAS.saving.register_keras_serializable("tests_of_config")
class MySGD(CURRENT.SGD):
    """A user's inner optimizer."""


class Unregistered(CURRENT.SGD):
    """A user's inner optimizer that Keras must be told of."""


def test_registered_subclass():
    optimizer = Halfway(
        CURRENT.SGD(), share=0.25, start_averaging=3, average_period=2, average_dtype="float64"
    )
    restored = round_trip(optimizer)
    assert isinstance(restored, Halfway)
    assert restored.share == 0.25
    assert restored.get_config() == optimizer.get_config()
    assert json.loads(json.dumps(optimizer.get_config())) == optimizer.get_config()


def test_registered_inner_optimizer():
    assert isinstance(round_trip(SWA(MySGD(0.25))).inner_optimizer, MySGD)


@pytest.mark.parametrize("how", ["deserialize", "scope", "from_config"])
def test_custom_objects_reach_the_inner_optimizer(how):
    optimizer, custom = EMA(SWA(Unregistered(0.25))), {"Unregistered": Unregistered}
    if how == "deserialize":
        restored = round_trip(optimizer, custom)
    elif how == "scope":
        with KERAS.saving.custom_object_scope(custom):
            restored = round_trip(optimizer)
    else:
        restored = EMA.from_config(optimizer.get_config(), custom)
    assert isinstance(restored.inner_optimizer.inner_optimizer, Unregistered)


# In models.


@every_wrapper
def test_compile_config(make, expected):
    """A model's clone, compiled as the model was, has an equal optimizer of its own."""
    optimizer = make()
    model = testing_utils.new_model(optimizer)
    config = json.loads(json.dumps(model.get_compile_config()))
    clone = KERAS.models.clone_model(model)
    clone.compile_from_config(config)
    assert type(clone.optimizer) is type(optimizer)
    assert clone.optimizer is not optimizer
    assert clone.optimizer.get_config() == optimizer.get_config()


def test_inside_loss_scaling():
    inside = SWA(CURRENT.Adam(0.25), 2, 3)
    optimizer = testing_utils.loss_scaled(inside)
    restored = round_trip(optimizer)
    assert restored.get_config() == optimizer.get_config()
    assert restored.inner_optimizer.get_config() == inside.get_config()


# Constructors.


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (SWA, dict(start_averaging=0, average_period=10, name="SWA", sequential_update=True)),
        (
            EMA,
            dict(
                trainable_weights_only=True,
                average_decay=0.99,
                start_step=0,
                dynamic_decay=True,
                name="ExponentialMovingAverage",
            ),
        ),
    ],
)
def test_positional_arguments(cls, expected):
    """In this order, with these defaults: code that was written for the predecessors counts on it."""
    _, first, *others, options = inspect.signature(cls.__init__).parameters.values()
    assert (first.name, first.default) == ("optimizer", inspect.Parameter.empty)
    assert [(parameter.name, parameter.default) for parameter in others] == list(expected.items())
    assert {parameter.kind for parameter in others} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert (options.name, options.kind) == ("options", inspect.Parameter.VAR_KEYWORD)


@every_wrapper
def test_arguments_are_properties(make, expected):
    optimizer = make()
    for name, value in expected.items():
        actual = getattr(optimizer, name)
        if isinstance(actual, schedules.LearningRateSchedule):
            actual = {**schedules.serialize(actual), "keras": "tf_keras"}
        assert actual == value, name
    assert optimizer.inner_optimizer is list(layers_of(optimizer))[1]


def test_settings_are_properties():
    optimizer = SWA("sgd", learning_rate=0.25, clipnorm=0.5)
    assert (optimizer.clipnorm, optimizer.clipvalue, optimizer.global_clipnorm) == (0.5, None, None)
    assert float(optimizer.learning_rate) == float(optimizer.lr) == 0.25


@pytest.mark.parametrize(
    "name", ["start_averaging", "average_period", "trainable_weights_only", "average_dtype"]
)
@pytest.mark.parametrize("cls", [SWA, EMA])
def test_properties_are_read_only(cls, name):
    """They were checked once, and traced functions hold them."""
    optimizer = cls(CURRENT.SGD())
    before = getattr(optimizer, name)
    with pytest.raises(AttributeError):
        setattr(optimizer, name, 7)
    assert getattr(optimizer, name) == before
