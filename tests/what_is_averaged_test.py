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
"""Which variables are averaged, when, and from what on."""

import numpy as np
import pytest
import tensorflow as tf

import tf_averaging as tfav
from tests import numpy_averages
from tests import testing_utils
from tests.testing_utils import CURRENT
from tests.testing_utils import KERAS
from tests.testing_utils import LEGACY
from tests.testing_utils import X
from tests.testing_utils import Y
from tests.testing_utils import average_of
from tests.testing_utils import averages_of
from tests.testing_utils import both_generations
from tests.testing_utils import descend
from tests.testing_utils import has_average
from tests.testing_utils import trained_variable

# Which.


def test_first_step_creates_averages_of_trained_variables(strategy):
    model = testing_utils.new_model(lambda: tfav.SWA(CURRENT.SGD()), batch_norm=True, strategy=strategy)
    assert not model.optimizer.has_shadow_copy
    testing_utils.fit_steps(model, 1)
    assert model.optimizer.has_shadow_copy
    assert all(has_average(model.optimizer, v) for v in model.trainable_variables)
    assert not any(has_average(model.optimizer, v) for v in model.non_trainable_variables)


def test_list_is_the_set():
    first, second = tf.Variable(1.0), tf.Variable(1.0)
    optimizer = tfav.SWA(CURRENT.SGD(1.0), 0, 1)
    optimizer.shadow_copy([first])
    descend(optimizer, [first, second])
    assert has_average(optimizer, first)
    assert not has_average(optimizer, second)
    assert second.numpy() == 0.0


def test_list_may_hold_variables_that_are_not_trained():
    """All tracked variables are folded, with or without a gradient."""
    trained, other = tf.Variable(1.0), tf.Variable(4.0)
    optimizer = tfav.SWA(CURRENT.SGD(1.0), 0, 1)
    optimizer.shadow_copy([trained, other])
    for value in (5.0, 9.0):
        other.assign(value)
        descend(optimizer, [trained])
    assert average_of(optimizer, other) == 7.0


def test_list_of_a_models_variables_is_a_list():
    """Though Keras gives lists that a model keeps the attributes of a model."""

    class Model(KERAS.Model):
        def __init__(self):
            super().__init__()
            self.scale = tf.Variable(2.0)
            self.chosen = [self.scale]
            self.dense = KERAS.layers.Dense(1)

        def call(self, inputs):
            return self.scale * self.dense(inputs)

    model = Model()
    model(X)
    optimizer = tfav.SWA(CURRENT.SGD())
    optimizer.shadow_copy(model.chosen)
    model.compile(optimizer, "mse")
    model.fit(X, Y, verbose=0)
    assert [has_average(optimizer, v) for v in model.variables].count(True) == 1


@both_generations
def test_variable_without_gradient_in_a_step_is_folded(module):
    first, second = tf.Variable(0.0), tf.Variable(0.0)
    optimizer = tfav.SWA(module.SGD(1.0), 0, 1)
    optimizer.shadow_copy([first, second])
    descend(optimizer, [first, second], -2.0)
    optimizer.apply_gradients([(tf.constant(-2.0), first), (None, second)])
    assert averages_of(optimizer, [first, second]) == [3.0, 2.0]


def test_model_is_followed():
    model = tf.Module()
    model.weights = [tf.Variable(1.0)]
    optimizer = tfav.SWA(LEGACY.SGD(1.0), 0, 1)
    optimizer.shadow_copy(model)
    descend(optimizer, model.weights)
    model.weights = [*model.weights, tf.Variable(10.0)]
    descend(optimizer, model.weights[:1])
    # The second variable was 10 when it appeared, and 10 in the only snapshot since.
    assert averages_of(optimizer, model.weights) == [-0.5, 10.0]


def test_unbuilt_model_is_followed_once_it_is_built(keras):
    model = keras.Sequential([keras.layers.Dense(1)])
    optimizer = tfav.ExponentialMovingAverage(keras.optimizers.SGD(), trainable_weights_only=False)
    optimizer.shadow_copy(model)
    assert not optimizer.has_shadow_copy
    model.compile(optimizer, "mse")
    testing_utils.fit_steps(model, 1)
    assert all(has_average(optimizer, v) for v in model.variables)


def test_layer_unfrozen_later_starts_at_its_value_then():
    model = testing_utils.new_model()
    model.layers[0].trainable = False
    optimizer = tfav.SWA(LEGACY.SGD(0.1), 0, 1)
    model.compile(optimizer, "mse")
    testing_utils.fit_steps(model, 3)
    kernel = model.layers[0].kernel
    assert not has_average(optimizer, kernel)
    model.layers[0].trainable = True
    model.compile(optimizer, "mse")
    before = kernel.numpy()
    testing_utils.fit_steps(model, 1)
    # On a clock of its own: this is the first of its snapshots.
    np.testing.assert_array_equal(average_of(optimizer, kernel), kernel.numpy())
    assert not np.array_equal(before, kernel.numpy())
    assert optimizer.num_averaged == 4


def unbuilt(keras):
    """A model that is not built until it is called, though all its variables exist."""

    class Unbuilt(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden = [keras.layers.Dense(3), keras.layers.BatchNormalization()]
            self.outputs_layer = keras.layers.Dense(1)
            for layer in self.hidden:
                layer.build((None, 4 if layer is self.hidden[0] else 3))
            self.outputs_layer.build((None, 3))

        def call(self, inputs, training=None):
            for layer in self.hidden:
                inputs = layer(inputs, training=training) if layer is self.hidden[1] else layer(inputs)
            return self.outputs_layer(inputs)

    return Unbuilt()


@pytest.mark.parametrize("trainable_weights_only", [True, False])
def test_model_that_is_not_built_has_averages_of_the_variables_it_has(keras, trainable_weights_only):
    model = unbuilt(keras)
    optimizer = tfav.SWA(keras.optimizers.SGD(0.1), 0, 1, trainable_weights_only=trainable_weights_only)
    optimizer.shadow_copy(model)
    assert not model.built
    with optimizer.swapped_weights():
        pass
    model.compile(optimizer, "mse")
    model.fit(X, Y, verbose=0)
    averaged = model.trainable_variables if trainable_weights_only else model.variables
    having = [v for v in model.variables if has_average(optimizer, v)]
    assert {id(v) for v in having} == {id(v) for v in averaged}
    assert len(having) == (6 if trainable_weights_only else 8)


def test_other_variables_are_passed_over():
    """Integer, bool and string variables, lookup tables and seeds are no weights."""

    class Odd(KERAS.layers.Layer):
        def build(self, input_shape):
            self.count = self.add_weight(
                name="count", shape=[], dtype="int64", trainable=False, initializer="zeros"
            )
            self.flag = tf.Variable(True, trainable=False)
            self.text = tf.Variable("words", trainable=False)
            self.empty = tf.Variable(tf.zeros([0, 2]), trainable=False)
            self.generator = tf.random.Generator.from_seed(1)

        def call(self, inputs):
            self.count.assign_add(1)
            return inputs + 0.0 * self.generator.normal([1])

    vectorize = KERAS.layers.TextVectorization(output_sequence_length=4)
    vectorize.adapt(["a b c d e"])
    model = KERAS.Sequential(
        [
            vectorize,
            KERAS.layers.Embedding(10, 2),
            KERAS.layers.GlobalAveragePooling1D(),
            Odd(),
            KERAS.layers.Dropout(0.5),
            KERAS.layers.Dense(1),
        ]
    )
    text = tf.constant([["a b"], ["c d"], ["e f"]])
    model(text)
    optimizer = tfav.ExponentialMovingAverage(CURRENT.SGD(), trainable_weights_only=False)
    optimizer.shadow_copy(model)
    model.compile(optimizer, "mse", metrics=["mae"])
    model.fit(text, np.ones((3, 1)), verbose=0)
    odd = model.layers[3]
    assert has_average(optimizer, odd.empty)
    for variable in (odd.count, odd.flag, odd.text):
        assert not has_average(optimizer, variable)
    with optimizer.swapped_weights():
        model.evaluate(text, np.ones((3, 1)), verbose=0)
    optimizer.assign_average_vars(model.variables)
    assert odd.count.numpy() > 0


def test_batch_norm_statistics_are_averaged_on_request(strategy):
    model = testing_utils.new_model(
        lambda: tfav.SWA(CURRENT.SGD(), 0, 1, trainable_weights_only=False),
        batch_norm=True,
        strategy=strategy,
    )
    model.optimizer.shadow_copy(model)
    moving_mean = model.get_layer("bn").moving_mean
    recorded = []
    for start in range(0, 64, 16):
        model.train_on_batch(X[start : start + 16], Y[start : start + 16])
        recorded.append(testing_utils.read(moving_mean))
    assert np.ptp(recorded, axis=0).max(axis=-1).min() > 0  # On each replica.
    expected = np.mean(np.asarray(recorded, np.float64), axis=0)
    average = testing_utils.read(model.optimizer.get_slot(moving_mean, "average"))
    np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-7)


# When: by hand.


def test_update_by_hand_is_as_that_of_the_step_just_taken():
    optimizer = numpy_averages.ema(0.75, start=1, dynamic=False).wrap(CURRENT.SGD(1.0))
    variable = trained_variable(optimizer, gradient=-4.0, steps=2)
    assert average_of(optimizer, variable) == 5.0  # 3/4 * 4 + 1/4 * 8
    optimizer.update_average()
    assert average_of(optimizer, variable) == 5.75  # 3/4 * 5 + 1/4 * 8
    assert optimizer.num_averaged == 2


def test_update_by_hand_with_a_given_weight(strategy):
    with strategy.scope():
        variable = tf.Variable(0.0)
        optimizer = tfav.SWA(CURRENT.SGD(1.0), start_averaging=10**6)
    optimizer.shadow_copy([variable])
    for value, weight, expected in [(8.0, 0.5, 8.0), (4.0, 0.25, 7.0), (3.0, 1.0, 3.0)]:
        variable.assign(value)
        optimizer.update_average(weight)
        assert average_of(optimizer, variable) == expected
    assert optimizer.num_averaged == 3


def test_update_by_hand_on_replicas_in_a_function(mirrored_strategy):
    with mirrored_strategy.scope():
        variable = tf.Variable(2.0)
        optimizer = tfav.SWA("sgd", start_averaging=10**6)
    optimizer.shadow_copy([variable])
    update = tf.function(lambda: mirrored_strategy.run(optimizer.update_average))
    update()
    variable.assign(6.0)
    update()
    assert testing_utils.read(optimizer.get_slot(variable, "average")).tolist() == [4.0, 4.0]
    assert optimizer.num_averaged == 2


def test_update_by_hand_before_the_start_step_is_at_the_beginning_of_the_warm_up():
    variable = tf.Variable(1.0)
    optimizer = tfav.ExponentialMovingAverage(CURRENT.SGD(), start_step=11)
    optimizer.shadow_copy([variable])
    optimizer.update_average()
    variable.assign(11.0)
    optimizer.update_average()
    np.testing.assert_allclose(average_of(optimizer, variable), 10.0, rtol=1e-6)


class TestBeginAveraging:
    """A start that is known only when training begins, and is state."""

    @pytest.mark.parametrize("created", ["before", "after"])
    @pytest.mark.parametrize(
        ("period", "counts"), [(1, [0, 0, 0, 1, 2, 3, 4]), (2, [0, 0, 0, 1, 1, 2, 2])]
    )
    def test_starts_there(self, strategy, created, period, counts):
        with strategy.scope():
            variable = tf.Variable(0.0)
            optimizer = tfav.SWA(CURRENT.SGD(1.0), 0, period)
        if created == "before":
            optimizer.shadow_copy([variable])
        assert not optimizer.start_was_set
        optimizer.begin_averaging(3)
        assert optimizer.start_was_set
        assert optimizer.start_averaging == 3
        gradient = -1.0 / strategy.num_replicas_in_sync
        step = tf.function(lambda: strategy.run(lambda: descend(optimizer, [variable], gradient)))
        for count in counts:
            step()
            assert optimizer.num_averaged == count
        assert average_of(optimizer, variable) == np.mean([4.0, 5.0, 6.0, 7.0][::period])

    def test_decays_count_from_there(self):
        told = tfav.ExponentialMovingAverage(CURRENT.SGD(1.0), start_step=4)
        set_later = tfav.ExponentialMovingAverage(CURRENT.SGD(1.0))
        set_later.begin_averaging(4)
        assert set_later.start_step == 4
        averages = [average_of(o, trained_variable(o, steps=8)) for o in (told, set_later)]
        assert averages[0] == averages[1]

    @testing_utils.early_or_late
    def test_is_saved_in_checkpoints(self, tmp_path, late):
        def objects():
            variable = tf.Variable(0.0)
            optimizer = tfav.SWA(CURRENT.SGD(1.0), 0, 1)
            return variable, optimizer, tf.train.Checkpoint(variable=variable, optimizer=optimizer)

        variable, optimizer, checkpoint = objects()
        optimizer.begin_averaging(3)
        descend(optimizer, [variable], -1.0, steps=2)
        path = checkpoint.save(tmp_path / "checkpoint")
        variable, optimizer, checkpoint = objects()
        if late:
            optimizer.shadow_copy([variable])
        checkpoint.restore(path)
        descend(optimizer, [variable], -1.0, steps=4)
        assert optimizer.start_averaging == 3
        assert average_of(optimizer, variable) == 5.0  # The mean of 4, 5 and 6.

    @pytest.mark.parametrize("suffix", ["keras", "h5"])
    def test_is_saved_in_files_and_not_in_the_config(self, tmp_path, suffix):
        model = testing_utils.new_model(tfav.ExponentialMovingAverage(CURRENT.SGD()))
        model.optimizer.begin_averaging(5)
        testing_utils.fit_steps(model, 2)
        assert model.optimizer.get_config()["start_step"] == 0
        model.save(tmp_path / f"model.{suffix}")
        loaded = KERAS.models.load_model(tmp_path / f"model.{suffix}")
        assert loaded.optimizer.start_step == 5
        testing_utils.fit_steps(loaded, 4)
        assert loaded.optimizer.num_averaged == 1

    def test_first_call_counts(self):
        optimizer = tfav.SWA(CURRENT.SGD())
        optimizer.begin_averaging(3)
        optimizer.begin_averaging(7)
        assert optimizer.start_averaging == 3

    def test_errors(self):
        with pytest.raises(ValueError, match="a start in steps already, 5.*Received: step=3"):
            tfav.SWA(CURRENT.SGD(), start_averaging=5).begin_averaging(3)
        with pytest.raises(ValueError, match="step=-1"):
            tfav.SWA(CURRENT.SGD()).begin_averaging(-1)
        optimizer = tfav.SWA(CURRENT.SGD())
        trained_variable(optimizer)
        with pytest.raises(ValueError, match="has begun already.*num_averaged=1"):
            optimizer.begin_averaging(3)
