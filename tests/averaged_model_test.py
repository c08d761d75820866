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
"""A second model that holds the averages."""

import contextlib
import functools
import types

import numpy as np
import pytest
import tensorflow as tf

import tf_averaging as tfav
from tests.testing_utils import average_without_training
from tests.testing_utils import averaging
from tests.testing_utils import read_all
from tf_averaging import kerases

X = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
Y = X[:, :1] - 2.0 * X[:, 1:2]


@functools.cache
def classes(keras):
    """Classes of this Keras, by name."""
    register = keras.saving.register_keras_serializable("averaged_model_test")

    @register
    class Subclassed(keras.Model):
        def __init__(self, units):
            super().__init__()
            self.units = units
            self.hidden = keras.layers.Dense(units, activation="tanh")
            self.norm = keras.layers.BatchNormalization()
            self.out = keras.layers.Dense(1)

        def call(self, inputs):
            return self.out(self.norm(self.hidden(inputs)))

        def get_config(self):
            return {"units": self.units}

    class NotCloneable(Subclassed):
        def get_config(self):
            raise NotImplementedError("no config")

    @register
    class Block(keras.layers.Layer):
        """Layers in a layer; tf_keras lists their variables in another order where one is frozen."""

        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.first = keras.layers.Dense(4)
            self.norm = keras.layers.BatchNormalization()
            self.second = keras.layers.Dense(4)

        def call(self, inputs):
            return self.second(self.norm(self.first(inputs)))

    return types.SimpleNamespace(Subclassed=Subclassed, NotCloneable=NotCloneable, Block=Block)


def layers(keras):
    return [
        keras.layers.Dense(3, activation="tanh"),
        keras.layers.BatchNormalization(),
        keras.layers.Dense(1),
    ]


def sequential(keras):
    return keras.Sequential([keras.Input([4]), *layers(keras)])


def functional(keras):
    inputs = outputs = keras.Input([4])
    for layer in layers(keras):
        outputs = layer(outputs)
    return keras.Model(inputs, outputs)


def subclassed(keras, name="Subclassed"):
    model = getattr(classes(keras), name)(3)
    model(X[:1])
    return model


MODELS = {"sequential": sequential, "functional": functional, "subclassed": subclassed}


def compiled(keras, strategy=None, create=sequential):
    with (strategy or tf.distribute.get_strategy()).scope():
        model = create(keras)
        model.compile(tfav.SWA(keras.optimizers.SGD(), 0, 1), "mse")
    return model


def averaged(keras, strategy=None, create=sequential):
    """A model with averages that differ from its weights."""
    model = compiled(keras, strategy, create)
    with (strategy or tf.distribute.get_strategy()).scope():
        average_without_training(model, averaging(model.optimizer))
    return model


def fit(model, epochs=2, **options):
    model.fit(X, Y, epochs=epochs, batch_size=16, verbose=0, **options)


def values(variables):
    """Of all replicas."""
    return read_all(variables)


def same(first, second):
    return len(first) == len(second) and all(np.array_equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("kind", MODELS)
def test_holds_the_averages_and_leaves_training_alone(keras, strategy, kind):
    model = averaged(keras, strategy, MODELS[kind])
    optimizer = model.optimizer
    averages = [optimizer.get_slot(v, "average").numpy() for v in model.trainable_variables]
    for swapped in (False, True):
        if swapped:
            optimizer.swap_weights()
        before = values([*model.variables, *optimizer.variables])
        teacher = tfav.averaged_model(model)
        assert same(values([*model.variables, *optimizer.variables]), before)
        assert optimizer.weights_swapped == swapped
        assert type(teacher) is type(model)
        assert getattr(teacher, "optimizer", None) is None
        assert same([v.numpy() for v in teacher.trainable_variables], averages)
        statistics = [v.numpy() for v in model.non_trainable_variables]
        assert same([v.numpy() for v in teacher.non_trainable_variables], statistics)
    np.testing.assert_allclose(teacher.predict(X, verbose=0), model.predict(X, verbose=0), rtol=1e-5)


def test_target_is_refreshed_in_training(keras, strategy):
    model = averaged(keras, strategy)
    teacher = tfav.averaged_model(model)
    first = values(teacher.variables)
    fit(model, epochs=1)
    assert same(values(teacher.variables), first)  # No buffer is shared by writing.
    assert tfav.averaged_model(model, target=teacher) is teacher
    assert not same(values(teacher.variables), first)
    with model.optimizer.swapped_weights():
        assert same(values(teacher.trainable_variables), values(model.trainable_variables))


def test_trajectory_is_the_same_with_a_teacher(keras, strategy):
    model = averaged(keras, strategy)
    fit(model, epochs=1)
    everything = [*model.variables, *model.optimizer.variables]
    before = values(everything)
    fit(model, shuffle=False)
    expected = values(everything)
    assert not same(expected, before)
    for variable, replicas in zip(map(kerases.tf_variable, everything), before):
        for component, value in zip(getattr(variable, "values", [variable]), replicas):
            component.assign(value)
    teacher = tfav.averaged_model(model)
    refresh = keras.callbacks.LambdaCallback(
        on_batch_end=lambda batch, logs: tfav.averaged_model(model, target=teacher)
    )
    fit(model, shuffle=False, callbacks=[refresh])
    assert same(values(everything), expected)


def test_student_that_learns_from_its_teacher(keras):
    """A Mean Teacher's step, with both in one `tf.function`."""
    model = averaged(keras)
    model.optimizer.build(model.trainable_variables)
    teacher = tfav.averaged_model(model)

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - teacher(x, training=False)) ** 2)
        variables = model.trainable_variables
        model.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))

    for _ in range(3):
        before = values(teacher.variables)
        step(tf.constant(X))
        assert same(values(teacher.variables), before)
        tfav.averaged_model(model, target=teacher)
        assert not same(values(teacher.variables), before)


def expect_averages(model, teacher, inputs=X):
    with model.optimizer.swapped_weights():
        expected = model.predict(inputs, verbose=0)
    np.testing.assert_array_equal(teacher.predict(inputs, verbose=0), expected)


@pytest.mark.parametrize("frozen", ["first", "norm"])
def test_frozen_parts(keras, frozen):
    """In the model, when it is cloned or afterwards, and in the teacher, as a whole."""
    block = classes(keras).Block
    model = averaged(keras, create=lambda keras: keras.Sequential([keras.Input([4]), block(), block()]))
    teacher = tfav.averaged_model(model)
    teacher.trainable = False
    getattr(model.layers[0], frozen).trainable = False
    model.compile(tfav.SWA(keras.optimizers.SGD(), 0, 1), "mse")
    average_without_training(model, model.optimizer)
    expect_averages(model, tfav.averaged_model(model, target=teacher))
    expect_averages(model, tfav.averaged_model(model))


def test_adapted_layers(keras):
    """What `adapt` computed comes along, where it is in variables and where it is not."""
    normalize = keras.layers.Normalization()
    normalize.adapt(X + 5.0)
    bins = keras.layers.Discretization(num_bins=3, epsilon=0.01)
    bins.adapt(X)
    # Keras 3 cannot load padded weights, tf_keras does not know the shape of others.
    padded = keras.__name__ == "tf_keras"
    words = keras.layers.TextVectorization(8, output_mode="tf_idf", pad_to_max_tokens=padded)
    words.adapt(["a b c a", "b d"])
    numbers, text = keras.Input([4]), keras.Input([1], dtype=tf.string)
    binned = keras.layers.Flatten()(keras.layers.Embedding(3, 2)(bins(numbers)))
    features = [normalize(numbers), binned, keras.layers.Flatten()(words(text))]
    outputs = keras.layers.Dense(1)(keras.layers.concatenate(features))
    model = keras.Model([numbers, text], outputs)
    model.compile(tfav.SWA(keras.optimizers.SGD(), 0, 1), "mse")
    inputs = [X, tf.constant([["a c"], ["b b d"]] * 16)]
    model.fit(inputs, Y, verbose=0)
    expect_averages(model, tfav.averaged_model(model), inputs)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(keras, policy):
    keras.mixed_precision.set_global_policy(policy)
    model = averaged(keras)
    optimizer = averaging(model.optimizer)
    assert (optimizer is not model.optimizer) == (policy == "mixed_float16")
    teacher = tfav.averaged_model(model)
    assert same(
        values(teacher.trainable_variables),
        values(optimizer.get_slot(v, "average") for v in model.trainable_variables),
    )


def test_optimizer_of_a_custom_loop(keras, strategy):
    with strategy.scope():
        model = sequential(keras)
        optimizer = tfav.ExponentialMovingAverage(keras.optimizers.SGD())
    teacher = tfav.averaged_model(model, optimizer)  # Before there are averages they are the weights.
    assert same(values(teacher.variables), values(model.variables))
    optimizer.shadow_copy(model)
    for variable in model.variables:
        variable.assign_add(tf.ones_like(variable))
    tfav.averaged_model(model, optimizer, teacher)
    assert same(values(teacher.variables), values(model.variables))


def test_recomputed_statistics_come_with_the_averages(keras):
    model = averaged(keras)
    with model.optimizer.swapped_weights():
        tfav.update_batch_norm(model, X, verbose=0)
        recomputed = values(model.non_trainable_variables)
    assert same(values(tfav.averaged_model(model).non_trainable_variables), recomputed)


@pytest.mark.parametrize("inside", [False, True])
def test_target_for_export_may_live_outside_the_strategy(keras, mirrored_strategy, inside):
    """And the other way round."""
    default = tf.distribute.get_strategy()
    model = averaged(keras, mirrored_strategy if inside else default)
    with (default if inside else mirrored_strategy).scope():
        target = sequential(keras)
    tfav.averaged_model(model, target=target)
    with model.optimizer.swapped_weights():
        expected = [v.numpy() for v in model.variables]
        assert same([v.numpy() for v in target.variables], expected)


def test_result_is_saved(keras, tmp_path):
    teacher = tfav.averaged_model(averaged(keras))
    teacher.save(tmp_path / "teacher.keras")
    loaded = keras.models.load_model(tmp_path / "teacher.keras")
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), teacher.predict(X, verbose=0))


class TestErrors:
    def test_model_that_cannot_be_cloned(self, keras):
        create = functools.partial(subclassed, name="NotCloneable")
        model = averaged(keras, create=create)
        with pytest.raises(ValueError, match="as `target` a second model.*no config"):
            tfav.averaged_model(model)
        target = tfav.averaged_model(model, target=create(keras))
        with model.optimizer.swapped_weights():
            assert same(values(target.variables), values(model.variables))

    def test_no_averaging_optimizer(self, keras):
        model = sequential(keras)
        with pytest.raises(ValueError, match="Received: None"):
            tfav.averaged_model(model)
        model.compile("sgd", "mse")
        with pytest.raises(ValueError, match="SGD"):
            tfav.averaged_model(model)

    def test_optimizer_of_another_model(self, keras):
        model, other = (averaged(keras) for _ in range(2))
        with pytest.raises(ValueError, match="averages of other variables only"):
            tfav.averaged_model(model, other.optimizer)

    def test_unbuilt_model(self, keras):
        with pytest.raises(ValueError, match="has not been built"):
            tfav.averaged_model(keras.Sequential(layers(keras)), tfav.SWA(keras.optimizers.SGD()))

    def test_other_architecture(self, keras):
        model = averaged(keras)
        target = keras.Sequential([keras.Input([4]), keras.layers.Dense(2)])
        with pytest.raises(ValueError, match=r"first difference.*\[4, 3\].*\[4, 2\]"):
            tfav.averaged_model(model, target=target)

    def test_the_model_itself(self, keras):
        model = averaged(keras)
        with pytest.raises(ValueError, match="other than `model`"):
            tfav.averaged_model(model, target=model)

    def test_not_models(self, keras):
        with pytest.raises(TypeError, match="Expected a `keras.Model` or `tf_keras.Model`. Received: 3"):
            tfav.averaged_model(3)
        with pytest.raises(TypeError, match="Received: 'teacher'"):
            tfav.averaged_model(sequential(keras), tfav.SWA(keras.optimizers.SGD()), "teacher")

    def test_in_a_graph(self, keras):
        model = averaged(keras)
        with pytest.raises(RuntimeError, match="between calls of the `tf.function`"):
            tf.function(lambda: tfav.averaged_model(model) and None)()


def test_model_in_training_is_left_alone(keras):
    """Another thread may be in the middle of `fit`: the model never says that it is not compiled."""
    model = sequential(keras)
    model.compile(tfav.SWA(keras.optimizers.SGD(0.1), 0, 1), "mse")
    model.fit(X, Y, verbose=0)
    changed = []

    class Watched(type(model)):
        def __setattr__(self, name, value):
            changed.append(name)
            super().__setattr__(name, value)

    object.__setattr__(model, "__class__", Watched)
    with contextlib.suppress(ValueError):  # It goes by another name now.
        tfav.averaged_model(model)
    assert "compiled" not in changed
    assert getattr(model, "compiled", True)
