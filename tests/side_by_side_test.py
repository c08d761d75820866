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
"""Several averages of one optimizer are those of as many optimizers, wherever one of them is used."""

import contextlib
import copy

import keras as keras_3
import numpy as np
import pytest
import tensorflow as tf

import tf_averaging as tfav
from tests import numpy_averages
from tests import testing_utils
from tests.file_formats import Arrays
from tests.file_formats import Checkpoint
from tests.file_formats import EarlyCheckpoint
from tests.file_formats import H5File
from tests.file_formats import KerasFile
from tests.file_formats import WeightsOfNewFormat
from tests.testing_utils import CURRENT
from tests.testing_utils import KERAS
from tests.testing_utils import LEGACY
from tests.testing_utils import assert_same_bits
from tests.testing_utils import bits
from tests.testing_utils import descend
from tests.testing_utils import fit_steps
from tests.testing_utils import trained_variable
from tests.testing_utils import values

EMA = tfav.ExponentialMovingAverage
DECAYS = [0.5, 0.9, 0.75]
MODULES = {"keras 3": keras_3.optimizers, "current": CURRENT, "legacy": LEGACY}
every_module = pytest.mark.parametrize("module", MODULES.values(), ids=list(MODULES))
both_kerases = pytest.mark.parametrize("keras", [keras_3, KERAS], ids=["keras", "tf_keras"])


@tf.keras.utils.register_keras_serializable("side_by_side_test")
@KERAS.utils.register_keras_serializable("side_by_side_test")
class Constant(tfav.AveragedOptimizerWrapper):
    """A user's scheme, with an attribute of its own and without a name."""

    one_average_for_each = "share"

    def __init__(self, optimizer, share=0.5, **options):
        super().__init__(optimizer, **options)
        self.share = share

    def averaging_weight(self, steps, updates):
        return self.share

    def get_config(self):
        return {**super().get_config(), "share": self.share}


def averages(optimizer, variables, number: int) -> list:
    return [optimizer.get_average(v, which).numpy() for which in range(number) for v in variables]


def everyone_around(optimizer) -> list:
    """The averaging optimizers, from the outside to the inside."""
    return [optimizer, *optimizer._others.optimizers]


SCHEMES = {
    "EMA": lambda inner, value, **options: EMA(
        inner, average_decay=value, dynamic_decay=False, **options
    ),
    "user's": lambda inner, value, **options: Constant(inner, value, **options),
    "schedules": lambda inner, value, **options: EMA(
        inner, average_decay=list(map(tfav.schedules.DebiasedDecay, value)), **options
    ),
}


@pytest.mark.parametrize(
    ("scheme", "module", "as_function", "mirrored"),
    [
        ("EMA", "keras 3", False, True),
        ("EMA", "current", True, True),
        ("EMA", "keras 3", True, False),
        ("EMA", "legacy", False, False),
        ("user's", "keras 3", False, False),
        ("user's", "current", True, False),
    ],
)
def test_they_equal_those_of_separate_optimizers_bit_for_bit(
    scheme, module, as_function, mirrored, mirrored_strategy
):
    strategy = mirrored_strategy if mirrored else tf.distribute.get_strategy()

    def train(value):
        def make():
            inner = MODULES[module].SGD(0.1, momentum=0.9)
            return SCHEMES[scheme](inner, value, average_period=2)

        return testing_utils.train(strategy, make, as_function=as_function)

    several, separate = train(DECAYS), [train(decay) for decay in DECAYS]
    for step, weights in enumerate(separate[0].history):
        assert_same_bits(several.history[step], weights)
    assert several.optimizer.num_averaged == 3
    assert_same_bits(
        averages(several.optimizer, several.variables, 3),
        [run.optimizer.get_average(v).numpy() for run in separate for v in run.variables],
    )
    assert len(set(map(str, averages(several.optimizer, several.variables[:1], 3)))) == 3


@both_kerases
def test_decays_worked_by_hand(keras):
    """The weights are 1 and 2, the average starts from 0."""
    optimizer = EMA(keras.optimizers.SGD(1.0), average_decay=(0.5, 0.75, 0.0), dynamic_decay=False)
    variable = trained_variable(optimizer, steps=2)
    assert [float(optimizer.get_average(variable, which)) for which in range(3)] == [1.25, 0.6875, 2.0]


class TestOneOfThem:
    """The argument `which`."""

    @pytest.fixture(params=[keras_3, KERAS], ids=["keras", "tf_keras"])
    def optimizer(self, request):
        inner = request.param.optimizers.SGD(1.0)
        return EMA(inner, average_decay=[0.5, 0.75, 0.0], dynamic_decay=False)

    def test_swap(self, optimizer):
        variable = trained_variable(optimizer, steps=2)
        for which, average in enumerate([1.25, 0.6875, 2.0]):
            for value, swapped in [(average, True), (2.0, False)]:
                optimizer.swap_weights(which)
                assert (variable.numpy(), optimizer.weights_swapped) == (value, swapped)
            with optimizer.swapped_weights(which=which) as found:
                assert found is optimizer
                assert variable.numpy() == average
                assert [float(optimizer.get_average(variable, w)) for w in range(3)] == [1.25, 0.6875, 2]
            assert variable.numpy() == 2.0

    def test_assign(self, optimizer):
        variable = trained_variable(optimizer, steps=2)
        optimizer.assign_average_vars([variable], which=1)
        assert variable.numpy() == 0.6875
        assert not optimizer.weights_swapped

    @pytest.mark.parametrize(
        "use",
        [
            lambda optimizer, variable: optimizer.swap_weights(2),
            lambda optimizer, variable: optimizer.swapped_weights(0).__enter__(),
            lambda optimizer, variable: optimizer.assign_average_vars([variable], 2),
            lambda optimizer, variable: optimizer.update_average(),
            lambda optimizer, variable: descend(optimizer, [variable]),
        ],
    )
    @pytest.mark.parametrize("as_function", [False, True])
    def test_while_another_one_is_in_the_model(self, optimizer, use, as_function):
        variable = trained_variable(optimizer, steps=2)
        optimizer.swap_weights(1)
        before = bits([variable, *averages(optimizer, [variable], 3)])
        call = tf.function(lambda: use(optimizer, variable)) if as_function else None
        expected = RuntimeError if as_function and "swapped_weights" in use.__code__.co_names else ()
        with pytest.raises((tf.errors.InvalidArgumentError, *([expected] if expected else []))):
            (call or (lambda: use(optimizer, variable)))()
        assert bits([variable, *averages(optimizer, [variable], 3)]) == before
        optimizer.swap_weights(1)
        assert variable.numpy() == 2.0

    def test_reset_while_one_is_in_the_model(self, optimizer):
        variable = trained_variable(optimizer, steps=2)
        with optimizer.swapped_weights(2), pytest.raises(RuntimeError, match="The averages are in"):
            optimizer.reset_averages()
        assert [float(optimizer.get_average(variable, w)) for w in range(3)] == [1.25, 0.6875, 2.0]

    def test_there_is_no_such_one(self, optimizer):
        variable = trained_variable(optimizer)
        calls = [
            optimizer.swap_weights,
            optimizer.swapped_weights,
            lambda which: optimizer.get_average(variable, which),
            lambda which: optimizer.assign_average_vars([variable], which),
        ]
        for call in calls:
            for which, error, message in [
                (3, ValueError, r"from 0 to 2. Received: 3, .*average_decay=\[0.5, 0.75, 0.0\]"),
                (-1, ValueError, "Expected `which` >= 0"),
                ("1", TypeError, "Expected `which` to be an int"),
                (True, TypeError, "Expected `which` to be an int"),
            ]:
                with pytest.raises(error, match=message):
                    call(which)
        one = tfav.SWA("sgd")
        trained_variable(one)
        with pytest.raises(ValueError, match="`which` from 0 to 0"):
            one.swap_weights(1)

    def test_swap_in_a_graph(self, optimizer):
        variable = trained_variable(optimizer, steps=2)

        @tf.function
        def swap():
            optimizer.swap_weights(1)
            return optimizer.weights_swapped

        assert swap()
        assert variable.numpy() == 0.6875
        assert not swap()
        assert variable.numpy() == 2.0


@both_kerases
def test_all_of_them_are_created_updated_and_reset(keras):
    optimizer = EMA(keras.optimizers.SGD(1.0), average_decay=[0.5, 0.75], average_period=None)
    variable = tf.Variable(0.0)
    optimizer.shadow_copy(iter([variable]))
    assert [float(optimizer.get_average(variable, which)) for which in range(2)] == [0, 0]
    for value in (4.0, 8.0):
        variable.assign(value)
        optimizer.update_average(weight=0.5)
    assert [float(optimizer.get_average(variable, which)) for which in range(2)] == [6, 6]
    optimizer.reset_averages([variable])
    assert [float(optimizer.get_average(variable, which)) for which in range(2)] == [8, 8]
    optimizer = EMA(keras.optimizers.SGD(1.0), average_decay=[0.5, 0.75], dynamic_decay=False)
    optimizer.begin_averaging(1)
    variable = trained_variable(optimizer, steps=2)
    assert [float(optimizer.get_average(variable, which)) for which in range(2)] == [1.5, 1.25]


FORMS = [
    *((KERAS, form) for form in [Checkpoint, EarlyCheckpoint, KerasFile, WeightsOfNewFormat, H5File]),
    *((keras_3, form) for form in [Checkpoint, EarlyCheckpoint, KerasFile, WeightsOfNewFormat, Arrays]),
]


@pytest.mark.parametrize(
    ("keras", "form", "swapped"),
    [(keras, form, 1 + index % 2) for index, (keras, form) in enumerate(FORMS)]
    + [(keras_3, KerasFile, None), (KERAS, Checkpoint, None)],
)
def test_every_format_keeps_them(tmp_path, keras, form, swapped):
    def new(seed):
        optimizer = EMA(keras.optimizers.Adam(0.1), average_decay=DECAYS)
        return testing_utils.new_model(optimizer, seed=seed, keras=keras)

    def state(model):
        optimizer = model.optimizer
        found = [model.get_weights(), averages(optimizer, model.trainable_variables, 3)]
        return [int(optimizer.num_averaged), optimizer.weights_swapped, *map(bits, found)]

    model = new(1)
    fit_steps(model, 3)
    if swapped is not None:
        model.optimizer.swap_weights(swapped)
    form.save(model, str(tmp_path))
    resumed = form.resume(new(2), str(tmp_path))
    assert resumed.optimizer.average_decay == DECAYS
    assert state(resumed) == state(model)
    if swapped is not None and form is not EarlyCheckpoint:  # A step that fails leaves a half-built one.
        with pytest.raises(Exception, match="Call `swap_weights|call_swap_weights"):
            fit_steps(resumed, 1)
    for one in (model, resumed) if swapped is not None else ():
        one.optimizer.swap_weights(swapped)
    assert state(resumed) == state(model)
    for one in (model, resumed):
        fit_steps(one, 2)
    assert state(resumed) == state(model)


@every_module
@pytest.mark.parametrize("scheme", SCHEMES)
def test_config(module, scheme):
    optimizer = SCHEMES[scheme](module.SGD(0.25, momentum=0.5), DECAYS, clipnorm=2.0)
    config = optimizer.get_config()
    assert config["optimizer"]["class_name"] == "SGD"
    for again in (type(optimizer).from_config(config), copy.deepcopy(optimizer)):
        assert again.get_config() == config
        assert again.inner_optimizer.clipnorm == 2.0
        assert again.momentum == 0.5
        around = everyone_around(again)
        assert len(around) == 3
        variables = [tf.Variable(1.0, name="a"), tf.Variable([2.0], name="b")]
        descend(again, variables)
        names = [variable.name for variable in again.variables if "average" in variable.name]
        assert len(set(names)) == 6, names
        # Each has the value that stands at its place in the list.
        shares = [one.averaging_weight(*2 * [tf.constant(1, tf.int64)]) for one in around]
        expected = {
            "EMA": [0.5, 0.1, 0.25],
            "user's": DECAYS,
            "schedules": [1 / 1.5, 1 / 1.9, 1 / 1.75],  # 1 - d / (1 + d)
        }[scheme]
        np.testing.assert_allclose(shares, expected, rtol=1e-9)
    assert f"{optimizer.one_average_for_each}=[" in repr(optimizer)


@both_kerases
def test_settings_reach_the_inner_optimizer_alone(keras):
    optimizer = EMA("sgd", average_decay=[0.9, 0.99], learning_rate=0.25, lr=None)
    assert float(optimizer.learning_rate) == 0.25
    optimizer = EMA(keras.optimizers.SGD(0.5), True, [0.9, 0.99])
    optimizer.learning_rate = 0.125
    assert float(optimizer.inner_optimizer.learning_rate) == 0.125
    assert isinstance(optimizer.inner_optimizer, keras.optimizers.SGD)
    with pytest.raises(ValueError, match="contradicts"):
        EMA(keras.optimizers.SGD(0.5, clipnorm=1.0), average_decay=[0.9, 0.99], clipnorm=2.0)
    with pytest.raises(ValueError, match="Expected a value of `average_decay`"):
        EMA(keras.optimizers.SGD(0.5), average_decay=[])
    with pytest.raises(ValueError, match="from 0 to 1"):
        EMA(keras.optimizers.SGD(0.5), average_decay=[0.5, 1.5])


@both_kerases
def test_averaged_model_of_one(keras):
    optimizer = EMA(keras.optimizers.SGD(0.1), average_decay=[0.5, 0.9], dynamic_decay=False)
    model = testing_utils.new_model(optimizer, keras=keras)
    record = testing_utils.recorder(keras)
    model.fit(testing_utils.X[:32], testing_utils.Y[:32], batch_size=8, callbacks=[record], verbose=0)
    target = tfav.averaged_model(model)
    with pytest.raises(ValueError, match="`which` from 0 to 1"):
        tfav.averaged_model(model, target=target, which=2)
    for swapped in (None, 0, 1):
        with contextlib.nullcontext() if swapped is None else optimizer.swapped_weights(swapped):
            for which, decay in enumerate([0.5, 0.9]):
                tfav.averaged_model(model, target=target, which=which)
                for variable, weights in zip(target.trainable_variables, zip(*record.history)):
                    scheme = numpy_averages.ema(decay, dynamic=False)
                    expected = numpy_averages.expected_average(scheme, [each[0] for each in weights])
                    np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-5, atol=1e-6)


@both_kerases
def test_evaluation_in_fit_uses_the_first(keras):
    """Raw weights and averages come back as they were, whichever average the user has put in before."""
    model = testing_utils.new_model(
        EMA(keras.optimizers.SGD(0.1), average_decay=[0.5, 0.9], dynamic_decay=False), keras=keras
    )
    swap = tfav.callbacks.SwapAverageWeights()
    x, y = testing_utils.X[:16], testing_utils.Y[:16]
    fit_steps(model, 2)
    model.optimizer.swap_weights(1)  # The next `fit` returns to the raw weights.
    options = {"batch_size": 8, "shuffle": False, "verbose": 0}
    history = model.fit(x, y, validation_data=(x, y), callbacks=[swap], **options).history
    with model.optimizer.swapped_weights():
        assert model.evaluate(x, y, verbose=0) == pytest.approx(history["val_loss"][0])
    with model.optimizer.swapped_weights(1):
        of_second = model.evaluate(x, y, verbose=0)
        assert model.evaluate(x, y, verbose=0, callbacks=[swap]) == of_second
        weights = values(model.trainable_variables)
        raw = tfav.callbacks.EvaluateRawWeights(x, y)
        raw.set_model(model)
        raw.on_epoch_end(0, logs := {})
        assert_same_bits(values(model.trainable_variables), weights)
    assert logs["raw_val_loss"] == pytest.approx(model.evaluate(x, y, verbose=0))
    assert of_second != pytest.approx(history["val_loss"][0])


@both_kerases
def test_weights_that_are_loaded_start_all_of_them_anew(keras):
    model = testing_utils.new_model(EMA(keras.optimizers.SGD(0.1), average_decay=[0.5, 0.9]), keras=keras)
    swap = tfav.callbacks.SwapAverageWeights(swap_on_epoch=True)
    fit_steps(model, 3, [swap])
    model.set_weights([np.full_like(weight, 100.0) for weight in model.get_weights()])
    model.optimizer.learning_rate = 0.0
    fit_steps(model, 1, [swap])
    for average in averages(model.optimizer, model.trainable_variables, 2):
        np.testing.assert_array_equal(average, np.full_like(average, 100.0))


@both_kerases
@pytest.mark.parametrize("which", [1, 2])
def test_a_step_that_was_traced_before_knows_of_a_restored_swap(keras, which):
    optimizer = EMA(keras.optimizers.SGD(1.0), average_decay=DECAYS)
    variable = trained_variable(optimizer)
    step = tf.function(lambda: descend(optimizer, [variable]))
    step()
    optimizer.swap_weights(which)
    state = optimizer.get_weights()
    optimizer.swap_weights(which)
    optimizer.set_weights(state)
    with pytest.raises(tf.errors.InvalidArgumentError, match="swap_weights"):
        step()
