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
"""The wrapper as a Keras optimizer: what it averages, its slots, its state, the places it trains in."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import tf_averaging as tfav

X = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
Y = X[:, :1] - 2.0 * X[:, 1:2]


def dense_model(strategy=None, batch_norm=False):
    with (strategy or tf.distribute.get_strategy()).scope():
        layers = [tf_keras.layers.Dense(3, input_shape=(4,), activation="relu")]
        if batch_norm:
            layers.append(tf_keras.layers.BatchNormalization(momentum=0.5))
        return tf_keras.Sequential([*layers, tf_keras.layers.Dense(1)])


def averages(optimizer, variables):
    return [optimizer.get_slot(variable, "average").numpy() for variable in variables]


def has_average(optimizer, variable):
    try:
        return optimizer.get_slot(variable, "average") is not None
    except KeyError:
        return False


class TestWhatIsAveraged:
    def test_first_step_creates_averages_of_trained_variables(self, strategy):
        model = dense_model(strategy, batch_norm=True)
        with strategy.scope():
            optimizer = tfav.SWA("sgd")
            model.compile(optimizer, "mse")
        assert not optimizer.has_shadow_copy
        model.fit(X, Y, verbose=0)
        assert optimizer.has_shadow_copy
        assert all(has_average(optimizer, v) for v in model.trainable_variables)
        assert not any(has_average(optimizer, v) for v in model.non_trainable_variables)

    def test_list_is_the_set(self):
        first, second = tf.Variable(1.0), tf.Variable(1.0)
        optimizer = tfav.SWA(tf_keras.optimizers.SGD(1.0), 0, 1)
        optimizer.shadow_copy([first])
        optimizer.apply_gradients([(tf.constant(1.0), first), (tf.constant(1.0), second)])
        assert has_average(optimizer, first)
        assert not has_average(optimizer, second)
        assert second.numpy() == 0.0

    def test_list_may_hold_variables_that_are_not_trained(self):
        """All tracked variables are folded, with or without a gradient."""
        trained, other = tf.Variable(1.0), tf.Variable(4.0)
        optimizer = tfav.SWA(tf_keras.optimizers.SGD(1.0), 0, 1)
        optimizer.shadow_copy([trained, other])
        for value in (5.0, 9.0):
            other.assign(value)
            optimizer.apply_gradients([(tf.constant(1.0), trained)])
        assert optimizer.get_slot(other, "average").numpy() == 7.0

    @pytest.mark.parametrize("generation", [tf_keras.optimizers, tf_keras.optimizers.legacy])
    def test_variable_without_gradient_in_a_step_is_folded(self, generation):
        first, second = tf.Variable(0.0), tf.Variable(0.0)
        optimizer = tfav.SWA(generation.SGD(1.0), 0, 1)
        optimizer.shadow_copy([first, second])
        optimizer.apply_gradients([(tf.constant(-2.0), first), (tf.constant(-2.0), second)])
        optimizer.apply_gradients([(tf.constant(-2.0), first), (None, second)])
        assert averages(optimizer, [first, second]) == [3.0, 2.0]

    def test_model_is_followed(self):
        class Growing(tf.Module):
            def __init__(self):
                self.weights = [tf.Variable(1.0)]

        model = Growing()
        optimizer = tfav.SWA(tf_keras.optimizers.legacy.SGD(1.0), 0, 1)
        optimizer.shadow_copy(model)
        optimizer.apply_gradients([(tf.constant(1.0), v) for v in model.weights])
        model.weights = [*model.weights, tf.Variable(10.0)]
        optimizer.apply_gradients([(tf.constant(1.0), model.weights[0])])
        # The second variable was 10 when it appeared, and 10 in the only snapshot since.
        assert averages(optimizer, model.weights) == [-0.5, 10.0]

    def test_unbuilt_model_is_followed_once_it_is_built(self):
        model = tf_keras.Sequential([tf_keras.layers.Dense(1)])
        optimizer = tfav.ExponentialMovingAverage("sgd", trainable_weights_only=False)
        optimizer.shadow_copy(model)
        assert not optimizer.has_shadow_copy
        model.compile(optimizer, "mse")
        model.fit(X, Y, verbose=0)
        assert all(has_average(optimizer, v) for v in model.variables)

    def test_layer_unfrozen_later_starts_at_its_value_then(self):
        model = dense_model()
        model.layers[0].trainable = False
        optimizer = tfav.SWA(tf_keras.optimizers.legacy.SGD(0.1), 0, 1)
        model.compile(optimizer, "mse")
        model.fit(X, Y, verbose=0, epochs=3)
        kernel = model.layers[0].kernel
        assert not has_average(optimizer, kernel)
        model.layers[0].trainable = True
        model.compile(optimizer, "mse")
        before, count = kernel.numpy().astype(np.float64), int(optimizer.num_averaged)
        model.train_on_batch(X, Y)
        after = kernel.numpy()
        assert not np.array_equal(before, after)
        expected = before + (after - before) / (count + 1)
        np.testing.assert_allclose(
            optimizer.get_slot(kernel, "average").numpy(), expected, rtol=1e-5, atol=1e-7
        )

    def test_other_variables_are_passed_over(self):
        """Integer, bool and string variables, lookup tables and seeds are no weights."""

        class Odd(tf_keras.layers.Layer):
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

        vectorize = tf_keras.layers.TextVectorization(output_sequence_length=4)
        vectorize.adapt(["a b c d e"])
        model = tf_keras.Sequential(
            [
                vectorize,
                tf_keras.layers.Embedding(10, 2),
                tf_keras.layers.GlobalAveragePooling1D(),
                Odd(),
                tf_keras.layers.Dropout(0.5),
                tf_keras.layers.Dense(1),
            ]
        )
        text = tf.constant([["a b"], ["c d"], ["e f"]])
        model(text)
        optimizer = tfav.ExponentialMovingAverage("sgd", trainable_weights_only=False)
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

    def test_batch_norm_statistics_are_averaged_on_request(self, strategy):
        model = dense_model(strategy, batch_norm=True)
        with strategy.scope():
            optimizer = tfav.SWA("sgd", 0, 1, trainable_weights_only=False)
            model.compile(optimizer, "mse")
        optimizer.shadow_copy(model)
        moving_mean = model.layers[1].moving_mean
        recorded = []
        for start in range(0, 64, 16):
            model.train_on_batch(X[start : start + 16], Y[start : start + 16])
            recorded.append([value.numpy() for value in getattr(moving_mean, "values", [moving_mean])])
        average = optimizer.get_slot(moving_mean, "average")
        for replica, value in enumerate(getattr(average, "values", [average])):
            own = np.array([values[replica] for values in recorded], np.float64)
            assert np.ptp(own, axis=0).max() > 0
            np.testing.assert_allclose(value.numpy(), own.mean(axis=0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [{}, {"run_eagerly": True}, {"steps_per_execution": 2}, {"jit_compile": True}],
    ids=lambda options: next(iter(options), "plain"),
)
@pytest.mark.parametrize("generation", [tf_keras.optimizers, tf_keras.optimizers.legacy])
def test_fit_in_every_mode(strategy, generation, options):
    if "jit_compile" in options and strategy.num_replicas_in_sync > 1:
        pytest.skip("tf_keras itself fails there on CPUs")
    model = dense_model(strategy)
    with strategy.scope():
        optimizer = tfav.SWA(generation.SGD(0.05), start_averaging=1, average_period=2)
        model.compile(optimizer, "mse", **options)
    recorded = []
    for _ in range(3):
        model.fit(X, Y, batch_size=32, epochs=1, shuffle=False, verbose=0)
        recorded.append(model.get_weights())
    assert optimizer.num_averaged == 3  # After steps 1, 3 and 5: the last one of each epoch.
    expected = [np.mean(np.array(values, np.float64), axis=0) for values in zip(*recorded)]
    for average, mean in zip(averages(optimizer, model.trainable_variables), expected):
        np.testing.assert_allclose(average, mean, rtol=1e-5, atol=1e-6)
    raw = model.evaluate(X, Y, verbose=0)
    with optimizer.swapped_weights():
        averaged = model.evaluate(X, Y, verbose=0)
    reference = dense_model()
    reference.compile("sgd", "mse")
    reference.set_weights(expected)
    np.testing.assert_allclose(averaged, reference.evaluate(X, Y, verbose=0), rtol=1e-4)
    np.testing.assert_allclose(model.evaluate(X, Y, verbose=0), raw, rtol=1e-6)
    assert abs(averaged - raw) > 1e-4


def test_steps_that_loss_scaling_skips_are_not_averaged(strategy):
    """Averages and count stay; `iterations`, and with it the period, moves on."""
    with strategy.scope():
        variable = tf.Variable(1.0)
        inner = tfav.SWA(tf_keras.optimizers.SGD(1.0), start_averaging=0, average_period=2)
        optimizer = tf_keras.mixed_precision.LossScaleOptimizer(inner, dynamic_growth_steps=1000)
        gradient = tf.Variable(0.0, trainable=False)

    @tf.function
    def step():
        def on_replica():
            scaled = optimizer.get_scaled_loss(tf.constant(1.0)) * gradient
            optimizer.apply_gradients(zip(optimizer.get_unscaled_gradients([scaled]), [variable]))

        strategy.run(on_replica)

    seen = []
    for value in [1.0, np.inf, np.nan, 1.0, 1.0]:  # Steps 0 to 4; due are 0, 2 and 4.
        gradient.assign(value / strategy.num_replicas_in_sync)
        step()
        average = inner.get_slot(variable, "average").numpy()
        seen.append((variable.numpy(), average, inner.num_averaged.numpy(), inner.iterations.numpy()))
    assert seen == [
        (0.0, 0.0, 1, 1),
        (0.0, 0.0, 1, 2),
        (0.0, 0.0, 1, 3),
        (-1.0, 0.0, 1, 4),
        (-2.0, -1.0, 2, 5),
    ]


class TestUpdateByHand:
    def test_as_the_step_just_taken_would(self):
        variable = tf.Variable(0.0)
        optimizer = tfav.ExponentialMovingAverage(
            tf_keras.optimizers.SGD(1.0), average_decay=0.75, dynamic_decay=False, start_step=1
        )
        for _ in range(2):
            optimizer.apply_gradients([(tf.constant(-4.0), variable)])
        assert optimizer.get_slot(variable, "average").numpy() == 5.0  # 3/4 * 4 + 1/4 * 8
        optimizer.update_average()
        assert optimizer.get_slot(variable, "average").numpy() == 5.75  # 3/4 * 5 + 1/4 * 8
        assert optimizer.num_averaged == 2

    def test_with_a_given_weight(self, strategy):
        with strategy.scope():
            variable = tf.Variable(0.0)
            optimizer = tfav.SWA(tf_keras.optimizers.SGD(1.0), start_averaging=10**6)
        optimizer.shadow_copy([variable])
        for value, weight, expected in [(8.0, 0.5, 8.0), (4.0, 0.25, 7.0), (3.0, 1.0, 3.0)]:
            variable.assign(value)
            optimizer.update_average(weight)
            assert optimizer.get_slot(variable, "average").numpy() == expected
        assert optimizer.num_averaged == 3

    def test_on_replicas_in_a_function(self, mirrored_strategy):
        with mirrored_strategy.scope():
            variable = tf.Variable(2.0)
            optimizer = tfav.SWA("sgd", start_averaging=10**6)
        optimizer.shadow_copy([variable])

        @tf.function
        def update():
            mirrored_strategy.run(optimizer.update_average)

        update()
        variable.assign(6.0)
        update()
        assert [v.numpy() for v in optimizer.get_slot(variable, "average").values] == [4.0, 4.0]
        assert optimizer.num_averaged == 2

    def test_before_the_start_step_the_warm_up_is_at_its_beginning(self):
        variable = tf.Variable(1.0)
        optimizer = tfav.ExponentialMovingAverage("sgd", start_step=11)
        optimizer.shadow_copy([variable])
        optimizer.update_average()
        variable.assign(11.0)
        optimizer.update_average()
        np.testing.assert_allclose(optimizer.get_slot(variable, "average").numpy(), 10.0, rtol=1e-6)


class TestBeginAveraging:
    """A start that is known only when training begins, and is state."""

    @pytest.mark.parametrize("created", ["before", "after"])
    @pytest.mark.parametrize("period", [1, 2])
    def test_starts_there(self, strategy, created, period):
        with strategy.scope():
            variable = tf.Variable(0.0)
            optimizer = tfav.SWA(tf_keras.optimizers.SGD(1.0), 0, period)
        if created == "before":
            optimizer.shadow_copy([variable])
        assert not optimizer.start_was_set
        optimizer.begin_averaging(3)
        assert optimizer.start_was_set
        assert optimizer.start_averaging == 3

        def on_replica():
            optimizer.apply_gradients([(tf.constant(-1.0 / strategy.num_replicas_in_sync), variable)])

        step = tf.function(lambda: strategy.run(on_replica))
        counts = []
        for _ in range(7):
            step()
            counts.append(int(optimizer.num_averaged))
        assert counts == ([0, 0, 0, 1, 2, 3, 4] if period == 1 else [0, 0, 0, 1, 1, 2, 2])
        expected = [4.0, 5.0, 6.0, 7.0][::period]
        assert averages(optimizer, [variable]) == [np.mean(expected)]

    def test_decays_count_from_there(self):
        variables = [tf.Variable(0.0) for _ in range(2)]
        told = tfav.ExponentialMovingAverage(tf_keras.optimizers.SGD(1.0), start_step=4)
        set_later = tfav.ExponentialMovingAverage(tf_keras.optimizers.SGD(1.0))
        set_later.begin_averaging(4)
        assert set_later.start_step == 4
        for optimizer, variable in zip((told, set_later), variables):
            step = tf.function(
                lambda o=optimizer, v=variable: o.apply_gradients([(tf.constant(-1.0), v)])
            )
            for _ in range(8):
                step()
        assert averages(told, variables[:1]) == averages(set_later, variables[1:])

    def test_is_saved_in_checkpoints(self, tmp_path):
        def objects():
            variable = tf.Variable(0.0)
            optimizer = tfav.SWA(tf_keras.optimizers.SGD(1.0), 0, 1)
            return variable, optimizer, tf.train.Checkpoint(variable=variable, optimizer=optimizer)

        def train(optimizer, variable, steps):
            for _ in range(steps):
                optimizer.apply_gradients([(tf.constant(-1.0), variable)])

        variable, optimizer, checkpoint = objects()
        optimizer.begin_averaging(3)
        train(optimizer, variable, 2)
        path = checkpoint.save(tmp_path / "checkpoint")
        for late in (False, True):
            variable, optimizer, checkpoint = objects()
            if late:
                optimizer.shadow_copy([variable])
            checkpoint.restore(path)
            train(optimizer, variable, 4)
            assert optimizer.start_averaging == 3
            assert averages(optimizer, [variable]) == [5.0]  # The mean of 4, 5 and 6.

    @pytest.mark.parametrize("suffix", ["keras", "h5"])
    def test_is_saved_in_files_and_not_in_the_config(self, tmp_path, suffix):
        model = dense_model()
        model.compile(tfav.ExponentialMovingAverage("sgd"), "mse")
        model.optimizer.begin_averaging(5)
        model.fit(X, Y, verbose=0)
        assert model.optimizer.get_config()["start_step"] == 0
        model.save(tmp_path / f"model.{suffix}")
        loaded = tf_keras.models.load_model(tmp_path / f"model.{suffix}")
        assert loaded.optimizer.start_step == 5
        loaded.fit(X, Y, epochs=2, batch_size=32, verbose=0)
        assert loaded.optimizer.num_averaged == 1

    def test_first_call_counts(self):
        optimizer = tfav.SWA("sgd")
        optimizer.begin_averaging(3)
        optimizer.begin_averaging(7)
        assert optimizer.start_averaging == 3

    def test_errors(self):
        with pytest.raises(ValueError, match="a start in steps already, 5.*Received: step=3"):
            tfav.SWA("sgd", start_averaging=5).begin_averaging(3)
        with pytest.raises(ValueError, match="step=-1"):
            tfav.SWA("sgd").begin_averaging(-1)
        optimizer, variable = tfav.SWA("sgd"), tf.Variable(1.0)
        optimizer.apply_gradients([(tf.constant(1.0), variable)])
        with pytest.raises(ValueError, match="has begun already.*num_averaged=1"):
            optimizer.begin_averaging(3)


class TestSlotsAndState:
    def test_slot_names(self):
        assert tfav.SWA("sgd").get_slot_names() == ["average"]

    def test_slots_are_there_in_the_scope_and_outside(self, strategy):
        with strategy.scope():
            variable = tf.Variable([1.0, 2.0])
            optimizer = tfav.SWA("sgd")
            optimizer.shadow_copy([variable])
            average = optimizer.get_slot(variable, "average")
        assert optimizer.get_slot(variable, "average") is average

    def test_slots_of_a_legacy_inner_optimizer(self):
        variable = tf.Variable([1.0, 2.0])
        optimizer = tfav.SWA(tf_keras.optimizers.legacy.SGD(0.1, momentum=0.9))
        optimizer.apply_gradients([(tf.constant([1.0, 1.0]), variable)])
        momentum = optimizer.get_slot(variable, "momentum")
        assert momentum is optimizer.inner_optimizer.get_slot(variable, "momentum")
        extra = optimizer.add_slot(variable, "extra", "ones", shape=[3])
        np.testing.assert_array_equal(extra.numpy(), [1.0, 1.0, 1.0])
        assert optimizer.get_slot(variable, "extra") is extra
        counter = optimizer.add_weight("counter", [], dtype=tf.int64, trainable=False)
        assert counter.dtype == tf.int64

    def test_add_slot_creates_the_average(self):
        variable = tf.Variable([1.0, 2.0])
        optimizer = tfav.SWA("sgd")
        np.testing.assert_array_equal(optimizer.add_slot(variable, "average").numpy(), [1.0, 2.0])
        assert optimizer.has_shadow_copy

    @pytest.mark.parametrize("generation", [tf_keras.optimizers, tf_keras.optimizers.legacy])
    def test_weights_round_trip(self, strategy, generation):
        def trained(steps):
            tf_keras.utils.set_random_seed(1)
            model = dense_model(strategy)
            with strategy.scope():
                optimizer = tfav.ExponentialMovingAverage(generation.Adam(0.01))
                model.compile(optimizer, "mse")
            for _ in range(steps):
                model.train_on_batch(X, Y)
            return model, optimizer

        model, optimizer = trained(5)
        state = optimizer.get_weights()
        assert state[0] == 5
        assert (
            len(state) == len(optimizer.variables) == len(optimizer.variables()) == len(optimizer.weights)
        )
        fresh_model, fresh = trained(1)
        fresh_model.set_weights(model.get_weights())
        fresh.set_weights(state)
        for a, b in zip(fresh.get_weights(), state):
            np.testing.assert_array_equal(a, b)
        for _ in range(3):
            model.train_on_batch(X, Y)
            fresh_model.train_on_batch(X, Y)
        for a, b in zip(fresh.get_weights(), optimizer.get_weights()):
            np.testing.assert_array_equal(a, b)

    def test_saved_model_can_be_loaded(self, tmp_path):
        model = dense_model()
        model.compile(tfav.SWA("adam", 0, 1), "mse")
        model.fit(X, Y, verbose=0)
        model.save(str(tmp_path / "model"), save_format="tf")
        loaded = tf_keras.models.load_model(str(tmp_path / "model"))
        np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))


@pytest.mark.parametrize("generation", [tf_keras.optimizers, tf_keras.optimizers.legacy])
def test_iterations_may_be_a_variable_of_the_users(generation):
    steps = tf.Variable(2**31, dtype=tf.int64)
    optimizer, variable = tfav.SWA(generation.SGD(1.0), 2**31 + 1, 1), tf.Variable(0.0)
    optimizer.iterations = steps
    assert optimizer.iterations is steps
    for _ in range(3):
        optimizer.apply_gradients([(tf.constant(-1.0), variable)])
    assert steps.numpy() == 2**31 + 3
    assert optimizer.get_slot(variable, "average").numpy() == 2.5
    assert optimizer.get_weights()[0] == 2**31 + 3
    assert sum(v.dtype == tf.int64 and v.shape == [] for v in optimizer.variables) == 3


def test_list_of_a_models_variables_is_a_list():
    """Though Keras gives lists that a model keeps the attributes of a model."""

    class Model(tf_keras.Model):
        def __init__(self):
            super().__init__()
            self.scale = tf.Variable(2.0)
            self.chosen = [self.scale]
            self.dense = tf_keras.layers.Dense(1)

        def call(self, inputs):
            return self.scale * self.dense(inputs)

    model = Model()
    model(X)
    optimizer = tfav.SWA("sgd")
    optimizer.shadow_copy(model.chosen)
    model.compile(optimizer, "mse")
    model.fit(X, Y, verbose=0)
    assert [has_average(optimizer, v) for v in model.variables].count(True) == 1


class TestKerasTraining:
    def test_learning_rate_callbacks_reach_the_inner_optimizer(self):
        model = dense_model()
        optimizer = tfav.SWA(tf_keras.optimizers.SGD(0.1))
        model.compile(optimizer, "mse")
        schedule = tf_keras.callbacks.LearningRateScheduler(lambda epoch, lr: lr / 2)
        model.fit(X, Y, epochs=2, verbose=0, callbacks=[schedule])
        np.testing.assert_allclose(optimizer.inner_optimizer.learning_rate.numpy(), 0.025)
        optimizer.lr = 0.5
        assert optimizer.inner_optimizer.learning_rate.numpy() == 0.5

    def test_two_optimizers_in_one_step(self, strategy):
        """As for a GAN: each averages its own variables, and is swapped alone."""
        with strategy.scope():
            first, second = tf.Variable(0.0), tf.Variable(0.0)
            optimizers = [tfav.SWA(tf_keras.optimizers.SGD(1.0), 0, 1) for _ in range(2)]

        @tf.function
        def step():
            def on_replica():
                share = -1.0 / strategy.num_replicas_in_sync
                optimizers[0].apply_gradients([(tf.constant(2 * share), first)])
                optimizers[1].apply_gradients([(tf.constant(4 * share), second)])

            strategy.run(on_replica)

        step()
        step()
        with optimizers[0].swapped_weights():
            assert (first.numpy(), second.numpy()) == (3.0, 8.0)
        with optimizers[1].swapped_weights():
            assert (first.numpy(), second.numpy()) == (4.0, 6.0)

    def test_many_steps_leave_one_graph(self):
        """Nothing is traced again, however many steps are taken."""
        variable = tf.Variable(0.0)
        optimizer = tfav.SWA(tf_keras.optimizers.SGD(1.0), 5, 3)

        @tf.function
        def step():
            optimizer.apply_gradients([(tf.constant(1.0), variable)])

        step()
        traced = step.experimental_get_tracing_count()
        for _ in range(20):
            step()
        assert step.experimental_get_tracing_count() == traced
