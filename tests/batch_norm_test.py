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
"""Recomputed statistics equal those that NumPy computes in float64 over the whole data set."""

import re

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from absl import logging

import tf_averaging as tfav
from tests.testing_utils import assert_same_bits
from tests.testing_utils import average_without_training
from tests.testing_utils import loss_scaled
from tests.testing_utils import read_all
from tf_averaging import kerases

RNG = np.random.default_rng(0)
X = (RNG.normal(size=(70, 3)) * [1.0, 20.0, 0.1] + [0.0, -300.0, 5.0]).astype(np.float32)
IMAGES = (RNG.normal(size=(21, 4, 5, 2)) * [3.0, 0.2] + [7.0, -1.0]).astype(np.float32)
# Keras 3 has neither several axes nor virtual batches.
TF_KERAS_ONLY = pytest.mark.parametrize("keras", [tf_keras], ids=["tf_keras"])


def knows_renorm(keras):
    """Early releases of Keras 3 do not."""
    return hasattr(keras.layers.BatchNormalization(), "renorm")


def normalizing(keras, strategy=None, shape=(3,), **options):
    with (strategy or tf.distribute.get_strategy()).scope():
        model = keras.Sequential([keras.layers.BatchNormalization(**options)])
        model.build([None, *shape])
    return model


def statistics(layer):
    return [layer.moving_mean.numpy(), layer.moving_variance.numpy()]


def expect_statistics(layer, data, axes=0):
    """Of `data` in float64, for each replica's part."""
    data = np.asarray(data, np.float64)
    mean, variance = data.mean(axis=axes), data.var(axis=axes)
    for statistic, value in [(layer.moving_mean, mean), (layer.moving_variance, variance)]:
        variable = kerases.tf_variable(statistic)
        for component in getattr(variable, "values", [variable]):
            np.testing.assert_allclose(component.numpy().reshape(value.shape), value, rtol=1e-5)


def state(model):
    return [v.numpy() for v in model.variables]


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second))


class TestEqualsNumPy:
    @pytest.mark.parametrize("batch_size", [7, 32, 69, 70])
    def test_batches_of_any_size(self, keras, strategy, batch_size):
        """The last batch is smaller: 0, 6, 1 and 0 samples; with two replicas one may get none."""
        options = [{}, {"synchronized": True}, *([{"renorm": True}] if knows_renorm(keras) else [])]
        with strategy.scope():
            inputs = keras.Input([3])
            layers = [keras.layers.BatchNormalization(momentum=0.5, **chosen) for chosen in options]
            model = keras.Model(inputs, [layer(inputs) for layer in layers])
        data = tf.data.Dataset.from_tensor_slices(X).batch(batch_size)
        tfav.update_batch_norm(model, data, verbose=0)
        for layer in layers:
            expect_statistics(layer, X)
        if knows_renorm(keras):
            deviation = np.sqrt(np.var(X, axis=0, dtype=np.float64) + layers[-1].epsilon)
            np.testing.assert_allclose(layers[-1].moving_stddev.numpy(), deviation, rtol=1e-5)

    def test_images(self, keras, strategy):
        model = normalizing(keras, strategy, (4, 5, 2))
        tfav.update_batch_norm(model, IMAGES, verbose=0)
        expect_statistics(model.layers[0], IMAGES, axes=(0, 1, 2))

    @pytest.mark.parametrize("axis", [1, 2, -2])
    def test_other_axis(self, keras, axis):
        model = normalizing(keras, shape=(4, 5, 2), axis=axis)
        tfav.update_batch_norm(model, IMAGES, verbose=0)
        expect_statistics(model.layers[0], IMAGES, tuple({0, 1, 2, 3} - {axis % 4}))

    @TF_KERAS_ONLY
    def test_several_axes(self, keras):
        model = normalizing(keras, shape=(4, 5, 2), axis=[1, 3])
        tfav.update_batch_norm(model, IMAGES, verbose=0)
        expect_statistics(model.layers[0], IMAGES, (0, 2))

    @TF_KERAS_ONLY
    def test_virtual_batches(self, keras):
        model = normalizing(keras, virtual_batch_size=5, fused=False)
        tfav.update_batch_norm(model, tf.data.Dataset.from_tensor_slices(X).batch(35), verbose=0)
        expect_statistics(model.layers[0], X)

    @pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
    def test_dtypes(self, keras, strategy, policy):
        keras.mixed_precision.set_global_policy(policy)
        x = X[:, :1]
        model = normalizing(keras, strategy, (1,))
        tfav.update_batch_norm(model, x, verbose=0)
        dtype = model.layers[0].compute_dtype
        expect_statistics(model.layers[0], tf.cast(tf.cast(x, dtype), tf.float64).numpy())

    @pytest.mark.parametrize("over_time", [False, True])
    def test_mask(self, keras, over_time):
        """Padding does not count, as it does not in training."""
        lengths = RNG.integers(1, 6, size=23)
        x = RNG.normal(size=(23, 5, 2)).astype(np.float32) + 3.0
        for sequence, length in zip(x, lengths):
            sequence[length:] = 0.0
        inputs = keras.Input([5, 2])
        masked = keras.layers.Masking()(inputs)
        layer = keras.layers.BatchNormalization()
        outer = keras.layers.TimeDistributed(layer) if over_time else layer
        model = keras.Model(inputs, outer(masked))
        tfav.update_batch_norm(model, x, verbose=0)
        kept = np.concatenate([sequence[:length] for sequence, length in zip(x, lengths)])
        expect_statistics(layer, kept)

    @pytest.mark.parametrize("unroll", [False, True])
    def test_cell_of_a_recurrent_layer(self, keras, unroll):
        """Unless it unrolls, Keras calls the cell twice for the first time step, also in training."""

        class Cell(keras.layers.Layer):
            state_size = output_size = 2

            def __init__(self):
                super().__init__()
                self.norm = keras.layers.BatchNormalization()

            def build(self, input_shape):
                self.norm.build(input_shape)

            def call(self, inputs, states, training=None):
                return self.norm(inputs, training=training), states

        cell = Cell()
        x = RNG.normal(size=(23, 4, 2)) + np.arange(4)[:, None]
        model = keras.Sequential([keras.Input([4, 2]), keras.layers.RNN(cell, unroll=unroll)])
        tfav.update_batch_norm(model, x, verbose=0)
        got = x if unroll else np.concatenate([x[:, :1], x], axis=1)
        expect_statistics(cell.norm, got.astype(np.float32), axes=(0, 1))

    def test_spectral_normalization(self, keras, monkeypatch):
        """The kernel is the one that evaluation uses, and stays as it is."""
        # That of tf_keras asks `tf.keras` for it, which is Keras 3 here.
        monkeypatch.setattr(tf.keras.layers, "InputSpec", keras.layers.InputSpec)
        dense = keras.layers.Dense(2)
        layers = [keras.layers.SpectralNormalization(dense), keras.layers.BatchNormalization()]
        model = keras.Sequential([keras.Input([3]), *layers])
        dense.kernel.assign(5.0 * dense.kernel)
        before = state(layers[0])
        tfav.update_batch_norm(model, X, verbose=0)
        expect_statistics(layers[1], X.astype(np.float64) @ dense.kernel.numpy())
        assert same(state(layers[0]), before)

    @pytest.mark.parametrize("renorm", [False, True])
    def test_layers_upstream_are_in_training_mode(self, keras, renorm):
        """They normalize by the batch, so what comes after them depends on the batches."""
        if renorm and not knows_renorm(keras):
            pytest.skip("this Keras has no renorm")
        options = {"renorm": True} if renorm else {}
        model = keras.Sequential(
            [
                keras.Input([3]),
                keras.layers.BatchNormalization(epsilon=1e-9, **options),
                keras.layers.Dense(2, activation="relu"),
                keras.layers.BatchNormalization(),
            ]
        )
        kernel, bias = model.layers[1].get_weights()
        tfav.update_batch_norm(model, tf.data.Dataset.from_tensor_slices(X).batch(32), verbose=0)
        expect_statistics(model.layers[0], X)
        outputs = []
        for start in range(0, 70, 32):
            x = X[start : start + 32].astype(np.float64)
            x = (x - x.mean(axis=0)) / x.std(axis=0)
            outputs.append(np.maximum(x @ kernel + bias, 0))
        expect_statistics(model.layers[2], np.concatenate(outputs))

    def test_many_elements(self, keras):
        """So many that sums in float32 would lose digits."""
        images = (RNG.normal(size=(8, 224, 224, 3)) + [100.0, 1.0, -0.1]).astype(np.float32)
        model = normalizing(keras, shape=(224, 224, 3))
        tfav.update_batch_norm(model, images, verbose=0)
        expect_statistics(model.layers[0], images, axes=(0, 1, 2))

    def test_large_mean(self, keras):
        """Relative to the mean that training has tracked, the variance keeps its digits."""
        keras.mixed_precision.set_global_policy("float64")
        model = keras.Sequential([keras.Input([1], dtype="float64"), keras.layers.BatchNormalization()])
        model.layers[0].moving_mean.assign([1e9 + 30])
        data = RNG.normal(size=(100, 1)) + 1e9
        tfav.update_batch_norm(model, tf.data.Dataset.from_tensor_slices(data).batch(32), verbose=0)
        expect_statistics(model.layers[0], data)

    def test_what_training_tracked_may_be_nan(self, keras):
        model = normalizing(keras)
        model.layers[0].moving_mean.assign([np.nan, np.inf, 0.0])
        tfav.update_batch_norm(model, X, verbose=0)
        expect_statistics(model.layers[0], X)

    def test_shared_layer(self, keras):
        layer = keras.layers.BatchNormalization()
        inputs = keras.Input([3]), keras.Input([3])
        model = keras.Model(inputs, [layer(x) for x in inputs])
        tfav.update_batch_norm(model, [X, 2 * X], verbose=0)
        expect_statistics(layer, np.concatenate([X, 2 * X]))

    def test_nested_models(self, keras):
        inner = normalizing(keras)
        model = keras.Sequential([keras.Sequential([inner])])
        model.build([None, 3])
        tfav.update_batch_norm(model, X, verbose=0)
        expect_statistics(inner.layers[0], X)

    def test_subclassed_model(self, keras):
        class Subclassed(keras.Model):
            def __init__(self):
                super().__init__()
                self.norms = [{"norm": keras.layers.BatchNormalization()}]

            def call(self, inputs, training=None):
                return self.norms[0]["norm"](inputs)

        model = Subclassed()
        with pytest.raises(ValueError, match="has not been built"):
            tfav.update_batch_norm(model, X, verbose=0)
        model(X[:1])
        tfav.update_batch_norm(model, X, verbose=0)
        expect_statistics(model.norms[0]["norm"], X)

    def test_call_that_is_a_function(self, keras, strategy):
        """What it traced before is not run, and what is traced now is not kept."""

        class WithFunction(keras.layers.Layer):
            def __init__(self):
                super().__init__()
                self.norm = keras.layers.BatchNormalization(momentum=0.5)

            @tf.function
            def call(self, inputs, training=None):
                return self.norm(inputs, training=training)

        with strategy.scope():
            model = keras.Sequential([WithFunction()])
            model.compile("sgd", "mse")
            model.build(X.shape)
        for factor in (1, 2):  # Before there is any trace, and after training.
            tfav.update_batch_norm(model, factor * X, verbose=0)
            expect_statistics(model.layers[0].norm, factor * X)
            assert "call" not in vars(model.layers[0])
            model.fit(X, X, verbose=0)

    @pytest.mark.parametrize("options", [{"run_eagerly": True}, {"steps_per_execution": 3}])
    def test_compiled_otherwise(self, keras, options):
        model = normalizing(keras)
        model.compile("sgd", "mse", **options)
        tfav.update_batch_norm(model, X, verbose=0)
        expect_statistics(model.layers[0], X)


def sequence(keras):
    class Sequence(keras.utils.Sequence):
        def __len__(self):
            return 7

        def __getitem__(self, index):
            return X[10 * index : 10 * index + 10], np.zeros(10), np.ones(10)

    return Sequence()


INPUTS = {
    "array": lambda keras: X,
    "tensor": lambda keras: tf.constant(X),
    "float64 array": lambda keras: X.astype(np.float64),
    "list": lambda keras: [X],
    "dataset": lambda keras: tf.data.Dataset.from_tensor_slices(X).batch(16),
    "dataset with targets": lambda keras: tf.data.Dataset.from_tensor_slices((X, X)).batch(16),
    "dataset with weights": lambda keras: tf.data.Dataset.from_tensor_slices((X, X, X[:, 0])).batch(16),
    "sequence": sequence,
    "generator": lambda keras: (sequence(keras)[index] for index in range(7)),
}


class TestInputs:
    @pytest.mark.parametrize("name", INPUTS)
    def test_of_each_kind(self, keras, name):
        model = normalizing(keras)
        tfav.update_batch_norm(model, INPUTS[name](keras), verbose=0)
        expect_statistics(model.layers[0], X)

    def test_steps(self, keras):
        model = normalizing(keras)
        data = tf.data.Dataset.from_tensor_slices(X).batch(10).repeat()
        tfav.update_batch_norm(model, data, steps=3, verbose=0)
        expect_statistics(model.layers[0], X[:30])

    def test_data_of_unknown_length(self, keras, strategy):
        """The step that finds the end must not count, though the shape of a batch is known to it."""
        model = normalizing(keras, strategy)
        data = tf.data.Dataset.from_tensor_slices(X).filter(lambda _: True)
        tfav.update_batch_norm(model, data.batch(10, drop_remainder=True), verbose=0)
        expect_statistics(model.layers[0], X)

    def test_array_in_so_many_batches(self, keras):
        """Keras cuts an array into `steps` batches, and stops early if there are not so many samples."""
        for steps in (1, 3, 100):
            model = normalizing(keras)
            tfav.update_batch_norm(model, X, steps=steps, verbose=0)
            expect_statistics(model.layers[0], X)

    @pytest.mark.parametrize("as_", ["dict", "tuple", "dataset of dicts", "dataset of tuples"])
    def test_several_inputs(self, keras, as_):
        a, b = keras.Input([3], name="a"), keras.Input([3], name="b")
        model = keras.Model({"a": a, "b": b} if "dict" in as_ else [a, b], a + b)
        outputs = keras.layers.BatchNormalization()(model.output)
        model = keras.Model(model.input, outputs)
        data = {"a": X, "b": 3 * X} if "dict" in as_ else (X, 3 * X)
        if "dataset" in as_:
            data = tf.data.Dataset.from_tensor_slices((data, X[:, 0])).batch(16)
        tfav.update_batch_norm(model, data, verbose=0)
        expect_statistics(model.layers[-1], 4 * X)

    def test_progress_bar(self, keras, capsys):
        tfav.update_batch_norm(normalizing(keras), X, verbose=1)
        assert re.search(r"3/3.*[=━]{4}", capsys.readouterr().out)
        tfav.update_batch_norm(normalizing(keras), X, verbose=0)
        assert capsys.readouterr().out == ""

    def test_no_data(self, keras):
        for data in (tf.data.Dataset.range(0), X[:0], (batch for batch in ())):
            with pytest.raises(ValueError, match="empty|Received none, or an iterator that has ended"):
                tfav.update_batch_norm(normalizing(keras), data, verbose=0)
        for data in (None, [], {}):
            with pytest.raises(ValueError, match=re.escape(f"data={data}")):
                tfav.update_batch_norm(normalizing(keras), data, verbose=0)

    @pytest.mark.parametrize(("steps", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError)])
    def test_wrong_number_of_steps(self, keras, steps, error):
        with pytest.raises(error, match=f"`steps`.* steps={steps}"):
            tfav.update_batch_norm(normalizing(keras), X, steps=steps, verbose=0)

    def test_no_end(self, keras):
        data = tf.data.Dataset.from_tensors(X).repeat()
        model = normalizing(keras)
        with pytest.raises(ValueError, match="Expected `steps` with data that never end"):
            tfav.update_batch_norm(model, data, verbose=0)
        tfav.update_batch_norm(model, data, steps=2, verbose=0)
        expect_statistics(model.layers[-1], X)


def test_model_without_batch_norm_does_not_look_at_the_data(keras):
    model = keras.Sequential([keras.layers.Dense(1)])
    tfav.update_batch_norm(model, data=None)


def test_what_is_not_a_model(keras):
    with pytest.raises(TypeError, match="Expected a `keras.Model`"):
        tfav.update_batch_norm(keras.layers.BatchNormalization(), X)


def counting(keras, fail):
    """A layer whose state and weights a call in training mode changes; it fails when told to."""

    class Counting(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.calls = self.add_weight(name="calls", shape=[], dtype="int64", trainable=False)
            self.scale = self.add_weight(name="scale", shape=[3])
            self.metric = keras.metrics.Mean(name="seen")
            self.own, self.module = tf.Variable(0.0, trainable=False), tf.Module()
            self.module.own = tf.Variable(0.0, trainable=False)

        def call(self, inputs, training=False):
            if fail:
                tf.debugging.assert_less(self.calls, tf.constant(1, tf.int64), "told to")
            if training:
                self.calls.assign_add(1)
                self.scale.assign(self.scale * 2.0)
                for variable in (self.own, self.module.own):  # Keras 3 does not know these.
                    variable.assign_add(1.0)
            self.metric.update_state(inputs)
            return inputs

    return Counting()


class TestEverythingElseIsAsBefore:
    def model(self, keras, fail=False):
        renorm = {"renorm": True} if knows_renorm(keras) else {}
        model = keras.Sequential(
            [
                keras.Input([3]),
                keras.layers.BatchNormalization(momentum=0.7, **renorm),
                counting(keras, fail),
                keras.layers.Dropout(0.5),
                keras.layers.Dense(2),
                keras.layers.BatchNormalization(momentum=0.3),
            ]
        )
        model.compile(keras.optimizers.Adam(), "mse", metrics=["mae"])
        model.fit(X[:32], X[:32, :2], verbose=0)
        return model

    def test_after_success(self, keras):
        model = self.model(keras)

        def values():
            counting = model.layers[1]
            own = {"own": counting.own.numpy(), "module": counting.module.own.numpy()}
            variables = [*model.variables, *model.optimizer.variables]
            return {**own, **{getattr(v, "path", v.name): v.numpy() for v in variables}}

        before, metrics = values(), model.get_metrics_result()
        flags = [(layer.trainable, getattr(layer, "momentum", None)) for layer in model.layers]
        tfav.update_batch_norm(model, X, verbose=0)
        after = values()
        changed = {name for name in before if not np.array_equal(before[name], after[name])}
        changed = {name.split("/")[-1].split(":")[0] for name in changed}
        assert changed - {"moving_stddev"} == {"moving_mean", "moving_variance"}
        assert ("moving_stddev" in changed) == knows_renorm(keras)
        assert model.get_metrics_result() == metrics
        assert flags == [(layer.trainable, getattr(layer, "momentum", None)) for layer in model.layers]
        assert all("call" not in vars(layer) for layer in model.layers)

    def test_after_an_exception(self, keras):
        model = self.model(keras, fail=True)
        model.layers[1].calls.assign(0)
        before = state(model)
        with pytest.raises(tf.errors.InvalidArgumentError, match="told to"):
            tfav.update_batch_norm(model, X, verbose=0)
        assert same(state(model), before)
        assert all("call" not in vars(layer) for layer in model.layers)

    def test_training_goes_on_with_the_layers_momentum(self, keras):
        model = normalizing(keras, momentum=0.75)
        model.compile("sgd", "mse")
        tfav.update_batch_norm(model, X, verbose=0)
        mean = model.layers[0].moving_mean.numpy()
        model.train_on_batch(X[:10], X[:10])
        expected = 0.75 * mean + 0.25 * X[:10].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(model.layers[0].moving_mean.numpy(), expected, rtol=1e-5)


@pytest.fixture
def warnings(monkeypatch):
    """What is logged as warnings."""
    logged = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: logged.append(text % values))
    return logged


class TestLayersThatTrainingLeavesAlone:
    def test_frozen(self, keras):
        model = normalizing(keras)
        model.layers[0].trainable = False
        tfav.update_batch_norm(model, X, verbose=0)
        assert same(statistics(model.layers[0]), [np.zeros(3), np.ones(3)])
        assert not model.layers[0].trainable

    @pytest.mark.parametrize("mode", [False, 0, tf.constant(False)], ids=["bool", "int", "tensor"])
    @pytest.mark.parametrize("by_name", [False, True])
    def test_called_in_inference_mode_is_said(self, keras, warnings, mode, by_name):
        if keras is not tf_keras and not by_name:
            pytest.skip("by position Keras 3 takes inputs only")
        layer = keras.layers.BatchNormalization(name="frozen_by_call")

        class Model(keras.Model):
            def __init__(self):
                super().__init__()
                self.layer = layer

            def call(self, inputs):
                return layer(inputs, training=mode) if by_name else layer(inputs, mode)

        model = Model()
        model(X[:1])
        tfav.update_batch_norm(model, X, verbose=0)
        assert same(statistics(layer), [np.zeros(3), np.ones(3)])
        assert len(warnings) == 1
        assert "frozen_by_call" in warnings[0]

    def test_model_that_keras_3_trains_without_a_mode(self, keras, warnings):
        """Its `call` takes no `training`; tf_keras has the layers in it follow the model all the same."""

        class Model(keras.Model):
            def __init__(self):
                super().__init__()
                self.norm = keras.layers.BatchNormalization()

            def call(self, inputs):
                return self.norm(inputs)

        model = Model()
        model(X[:1])
        model.compile("sgd", "mse")
        model.fit(X, X, verbose=0)
        is_trained = not same(statistics(model.norm), [np.zeros(3), np.ones(3)])
        assert is_trained == (keras is tf_keras)
        before = statistics(model.norm)
        tfav.update_batch_norm(model, X, verbose=0)
        assert same(statistics(model.norm), before) != is_trained
        assert len(warnings) == (not is_trained)


def averaged(keras, strategy=None, wrap=lambda optimizer: optimizer, updates=3, **options):
    """A model whose averages differ from its weights, compiled unless `wrap` is None; its parts."""
    with (strategy or tf.distribute.get_strategy()).scope():
        layer = keras.layers.BatchNormalization(momentum=0.5)
        hidden_layer = keras.layers.Dense(2, activation="tanh")
        model = keras.Sequential([keras.Input([3]), hidden_layer, layer, keras.layers.Dense(1)])
        optimizer = tfav.SWA(keras.optimizers.SGD(0.1), 0, 1, **options)
        if wrap is not None:
            model.compile(wrap(optimizer), "mse")
        average_without_training(model, optimizer, updates)
    return model, optimizer, layer


def hidden(model, x=X / 300):
    kernel, bias = model.layers[0].get_weights()
    return np.tanh(x.astype(np.float64) @ kernel + bias)


class TestWhileSwapped:
    @pytest.mark.parametrize("wrapped", [False, True])
    def test_statistics_belong_to_the_averages(self, keras, strategy, wrapped):
        wrap = (
            (lambda optimizer: loss_scaled(optimizer, keras)) if wrapped else lambda optimizer: optimizer
        )
        model, optimizer, layer = averaged(keras, strategy, wrap)
        raw = read_all(layer.non_trainable_variables)  # Each replica's own.
        with optimizer.swapped_weights():
            tfav.update_batch_norm(model, X / 300, verbose=0)
            expect_statistics(layer, hidden(model))
            recomputed = statistics(layer)
        assert_same_bits(read_all(layer.non_trainable_variables), raw)
        with optimizer.swapped_weights():
            assert same(statistics(layer), recomputed)
        assert same(optimizer.get_slot(layer.moving_mean, "average").numpy(), recomputed[0])

    def test_they_are_never_folded(self, keras, strategy):
        model, optimizer, layer = averaged(keras, strategy)
        with optimizer.swapped_weights():
            tfav.update_batch_norm(model, X / 300, verbose=0)
            recomputed = statistics(layer)
        raw = statistics(layer)
        model.fit(X / 300, X[:, 0], batch_size=70, verbose=0)
        assert not same(statistics(layer), raw)
        with pytest.warns(UserWarning, match="averages with 3 updates, and the averages hold 4 by now"):
            optimizer.swap_weights()
        assert same(statistics(layer), recomputed)
        tfav.update_batch_norm(model, X / 300, verbose=0)  # Again, for the new averages.
        expect_statistics(layer, hidden(model))

    def test_before_the_first_update_too(self, keras):
        model, optimizer, layer = averaged(keras)
        optimizer.reset_averages()
        with optimizer.swapped_weights():
            tfav.update_batch_norm(model, X / 300, verbose=0)
            recomputed = statistics(layer)
        with optimizer.swapped_weights():
            assert same(statistics(layer), recomputed)

    def test_averaged_statistics_are_set_and_go_on_being_averaged(self, keras):
        model, optimizer, layer = averaged(keras, trainable_weights_only=False)
        raw = statistics(layer)
        with optimizer.swapped_weights():
            tfav.update_batch_norm(model, X / 300, verbose=0)
            recomputed = statistics(layer)
        assert same(statistics(layer), raw)
        model.fit(X / 300, X[:, 0], batch_size=70, verbose=0)
        expected = recomputed[0] + (statistics(layer)[0] - recomputed[0]) / 4
        np.testing.assert_allclose(
            optimizer.get_slot(layer.moving_mean, "average").numpy(), expected, rtol=1e-5
        )

    @pytest.mark.parametrize("late", [False, True])
    def test_checkpoint(self, keras, tmp_path, recwarn, late):
        """Saved in either state, the statistics of both come back and are still not folded."""
        for swapped in (False, True):
            model, optimizer, layer = averaged(keras)
            checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
            raw = statistics(layer)
            with optimizer.swapped_weights():
                tfav.update_batch_norm(model, X / 300, verbose=0)
                recomputed = statistics(layer)
                path = checkpoint.save(tmp_path / "swapped")
            if not swapped:
                path = checkpoint.save(tmp_path / "raw")
            model, optimizer, layer = averaged(keras)
            if late:
                optimizer = tfav.SWA(keras.optimizers.SGD(0.1), 0, 1)
            tf.train.Checkpoint(model=model, optimizer=optimizer).restore(path)
            optimizer.shadow_copy(model)
            assert optimizer.weights_swapped == swapped
            assert same(statistics(layer), recomputed if swapped else raw)
            optimizer.swap_weights()
            assert same(statistics(layer), raw if swapped else recomputed)
            if not swapped:
                optimizer.swap_weights()
            assert not [w for w in recwarn if "recomputed" in str(w.message)]
            optimizer.update_average()
            with pytest.warns(UserWarning, match="with 3 updates, and the averages hold 4 by now"):
                optimizer.swap_weights()
            recwarn.clear()
            assert same(statistics(layer), recomputed)


class TestRawWeights:
    @pytest.mark.parametrize("compiled", [True, False])
    def test_whose_statistics_change_is_said(self, keras, recwarn, compiled):
        model, optimizer, layer = averaged(keras, **({} if compiled else {"wrap": None}))
        expected = r"changes their statistics. The averages have none of their own and use these too"
        with pytest.warns(UserWarning, match=expected) as caught:
            tfav.update_batch_norm(model, X / 300, verbose=0)
        assert [w.filename for w in caught if "raw weights" in str(w.message)] == [__file__]
        expect_statistics(layer, hidden(model))
        raw = statistics(layer)
        recwarn.clear()
        with optimizer.swapped_weights():
            assert same(statistics(layer), raw)
            tfav.update_batch_norm(model, X / 300, verbose=0, optimizer=optimizer)
            recomputed = statistics(layer)
        assert not [w for w in recwarn if "raw weights" in str(w.message)]
        with pytest.warns(UserWarning, match="The averages keep their own"):
            tfav.update_batch_norm(model, X / 300 + 1, verbose=0)
        expect_statistics(layer, hidden(model, X / 300 + 1))
        with optimizer.swapped_weights():
            assert same(statistics(layer), recomputed)

    def test_nothing_is_said_where_averages_are_the_weights(self, keras, recwarn):
        model, optimizer, layer = averaged(keras)
        optimizer.reset_averages()
        tfav.update_batch_norm(model, X / 300, verbose=0)
        assert not [w for w in recwarn if "raw weights" in str(w.message)]


class TestOptimizerOfAModelThatIsNotCompiled:
    @pytest.mark.parametrize("compiled_with", [None, "sgd"])
    def test_statistics_belong_to_the_averages(self, keras, strategy, compiled_with):
        wrap = None if compiled_with is None else lambda optimizer: compiled_with
        model, optimizer, layer = averaged(keras, strategy, wrap)
        raw = read_all(layer.non_trainable_variables)
        with optimizer.swapped_weights():
            with pytest.raises(ValueError, match="Expected that optimizer as `optimizer`"):
                tfav.update_batch_norm(model, X / 300, verbose=0)
            outer = loss_scaled(optimizer, keras)
            tfav.update_batch_norm(model, X / 300, verbose=0, optimizer=outer)
            expect_statistics(layer, hidden(model))
            recomputed = statistics(layer)
        assert_same_bits(read_all(layer.non_trainable_variables), raw)
        with optimizer.swapped_weights():
            assert same(statistics(layer), recomputed)

    def test_one_that_averages_nothing_of_the_model(self, keras):
        model, _, layer = averaged(keras)
        before = statistics(layer)
        for optimizer, expected in [
            (averaged(keras)[1], "averages of other variables only"),
            (keras.optimizers.SGD(), "keeps no averages"),
        ]:
            with pytest.raises(ValueError, match=expected):
                tfav.update_batch_norm(model, X, verbose=0, optimizer=optimizer)
        assert same(statistics(layer), before)


class TestForward:
    def data(self):
        return tf.data.Dataset.from_tensor_slices({"x": X / 300, "shift": X[:, :1]}).batch(16)

    @pytest.mark.parametrize("as_function", [False, True])
    def test_batches_are_what_the_data_hold(self, keras, strategy, as_function):
        model, _, layer = averaged(keras, strategy, wrap=None)

        def forward(model, batch):
            return model(batch["x"] + batch["shift"], training=True)

        if as_function:
            forward = tf.function(forward)
            strategy.run(forward, args=(model, next(iter(self.data()))))  # It has been traced.
        with pytest.warns(UserWarning, match="raw weights"):
            tfav.update_batch_norm(model, self.data(), verbose=0, forward=forward)
        expect_statistics(layer, hidden(model, X.astype(np.float64) / 300 + X[:, :1]))

    def test_method_that_is_a_function(self, keras):
        class Model(keras.Model):
            def __init__(self):
                super().__init__()
                self.norm = keras.layers.BatchNormalization()

            def call(self, inputs, training=None):
                return self.norm(inputs, training=training)

            @tf.function
            def encode(self, inputs):
                return self(inputs["x"] + 1.0, training=True)

        model = Model()
        model.encode(next(iter(self.data())))
        tfav.update_batch_norm(
            model, self.data(), verbose=0, forward=lambda model, batch: model.encode(batch)
        )
        expect_statistics(model.norm, X / 300 + 1.0)
        assert "encode" not in vars(model)

    def test_inference_mode_is_said(self, keras, warnings):
        model = normalizing(keras)
        tfav.update_batch_norm(model, X, verbose=0, forward=lambda model, batch: None)
        assert "not called in training mode" in warnings[0]
        with pytest.raises(TypeError, match="Expected `forward` to be a function.*Received: 3"):
            tfav.update_batch_norm(model, X, verbose=0, forward=3)

    def test_model_without_call_needs_it(self, keras):
        class Model(keras.Model):
            def __init__(self):
                super().__init__()
                self.norm = keras.layers.BatchNormalization()
                self.norm.build([None, X.shape[-1]])

        model = Model()
        model.built = True
        with pytest.raises(ValueError, match="cannot be called on its inputs. Expected `forward`"):
            tfav.update_batch_norm(model, X, verbose=0)
        forward = lambda model, inputs: model.norm(inputs, training=True)  # noqa: E731
        tfav.update_batch_norm(model, X, verbose=0, forward=forward)
        expect_statistics(model.norm, X)


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_file_written_while_swapped_is_ready_for_use(keras, tmp_path, suffix):
    model, optimizer, _ = averaged(keras)
    model.train_on_batch(X / 300, X[:, :1])
    raw = [v.numpy() for v in model.trainable_variables]
    with optimizer.swapped_weights():
        tfav.update_batch_norm(model, X / 300, verbose=0)
        before = state(model)
        model.save(tmp_path / f"model.{suffix}")
    has_optimizer = suffix == "keras" or keras is tf_keras
    loaded = keras.models.load_model(tmp_path / f"model.{suffix}", compile=has_optimizer)
    assert same(state(loaded), before)
    if has_optimizer:
        loaded.optimizer.swap_weights()
        assert same([v.numpy() for v in loaded.trainable_variables], raw)


def test_swa_is_better_with_recomputed_statistics(keras):
    """What the function is for: with a high learning rate the raw statistics fit no average."""
    model, optimizer, _ = averaged(keras, updates=0)
    model.fit(X / 300, X[:, 0], epochs=30, verbose=0)
    with optimizer.swapped_weights():
        before = model.evaluate(X / 300, X[:, 0], verbose=0)
        tfav.update_batch_norm(model, X / 300, verbose=0)
        after = model.evaluate(X / 300, X[:, 0], verbose=0)
    assert after < before
