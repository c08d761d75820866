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

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import tf_averaging as tfav
from tests.testing_utils import CURRENT

X = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
Y = X[:, :1] - 2.0 * X[:, 1:2]


@tf_keras.saving.register_keras_serializable("averaged_model_test")
class Subclassed(tf_keras.Model):
    def __init__(self, units):
        super().__init__()
        self.units = units
        self.hidden = tf_keras.layers.Dense(units, activation="tanh")
        self.norm = tf_keras.layers.BatchNormalization()
        self.out = tf_keras.layers.Dense(1)

    def call(self, inputs):
        return self.out(self.norm(self.hidden(inputs)))

    def get_config(self):
        return {"units": self.units}


class NotCloneable(Subclassed):
    def get_config(self):
        raise NotImplementedError("no config")


@tf_keras.saving.register_keras_serializable("averaged_model_test")
class Block(tf_keras.layers.Layer):
    """Layers in a layer, whose variables Keras lists in another order where one of them is frozen."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = tf_keras.layers.Dense(4)
        self.norm = tf_keras.layers.BatchNormalization()
        self.second = tf_keras.layers.Dense(4)

    def call(self, inputs):
        return self.second(self.norm(self.first(inputs)))


def layers():
    return [
        tf_keras.layers.Dense(3, activation="tanh"),
        tf_keras.layers.BatchNormalization(),
        tf_keras.layers.Dense(1),
    ]


def functional():
    inputs = outputs = tf_keras.Input([4])
    for layer in layers():
        outputs = layer(outputs)
    return tf_keras.Model(inputs, outputs)


def subclassed():
    model = Subclassed(3)
    model.build([None, 4])
    return model


MODELS = {
    "sequential": lambda: tf_keras.Sequential([tf_keras.Input([4]), *layers()]),
    "functional": functional,
    "subclassed": subclassed,
}


def trained(strategy, create=MODELS["sequential"], optimizer=lambda: tfav.SWA(CURRENT.SGD(), 0, 1)):
    with strategy.scope():
        model = create()
        model.compile(optimizer(), "mse")
    model.fit(X, Y, epochs=2, batch_size=16, verbose=0)
    return model


def values(variables):
    """Of all replicas."""
    return [c.numpy() for v in variables for c in getattr(v, "values", [v])]


def same(first, second):
    return len(first) == len(second) and all(np.array_equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_holds_the_averages_and_leaves_training_alone(strategy, kind, swapped):
    model = trained(strategy, MODELS[kind])
    optimizer = model.optimizer
    averages = [optimizer.get_slot(v, "average").numpy() for v in model.trainable_variables]
    if swapped:
        optimizer.swap_weights()
    before = values([*model.variables, *optimizer.variables])
    teacher = tfav.averaged_model(model)
    assert same(values([*model.variables, *optimizer.variables]), before)
    assert optimizer.weights_swapped == swapped
    assert type(teacher) is type(model)
    assert same([v.numpy() for v in teacher.trainable_variables], averages)
    statistics = [v.numpy() for v in model.non_trainable_variables]
    assert same([v.numpy() for v in teacher.non_trainable_variables], statistics)
    if swapped:
        np.testing.assert_allclose(teacher.predict(X, verbose=0), model.predict(X, verbose=0), rtol=1e-5)


def test_target_is_refreshed_in_training(strategy):
    model = trained(strategy)
    teacher = tfav.averaged_model(model)
    first = values(teacher.variables)
    model.fit(X, Y, batch_size=16, verbose=0)
    assert same(values(teacher.variables), first)  # No buffer is shared by writing.
    assert tfav.averaged_model(model, target=teacher) is teacher
    assert not same(values(teacher.variables), first)
    with model.optimizer.swapped_weights():
        assert same(values(teacher.trainable_variables), values(model.trainable_variables))


def test_trajectory_is_the_same_with_a_teacher(strategy):
    results = []
    for with_teacher in (False, True):
        tf_keras.utils.set_random_seed(1)
        model = trained(strategy)
        if with_teacher:
            teacher = tfav.averaged_model(model)
            refresh = tf_keras.callbacks.LambdaCallback(
                on_batch_end=lambda batch, logs, m=model, t=teacher: tfav.averaged_model(m, target=t)
            )
        callbacks = [refresh] if with_teacher else []
        model.fit(X, Y, epochs=2, batch_size=16, shuffle=False, callbacks=callbacks, verbose=0)
        results.append(values([*model.variables, *model.optimizer.variables]))
    assert same(*results)


def test_student_that_learns_from_its_teacher():
    """A Mean Teacher's step, with both in one `tf.function`."""
    model = trained(tf.distribute.get_strategy())
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
def test_frozen_parts(frozen):
    """In the model, when it is cloned or afterwards, and in the teacher, as a whole."""

    def create():
        return tf_keras.Sequential([tf_keras.Input([4]), Block(), Block()])

    model = trained(tf.distribute.get_strategy(), create)
    teacher = tfav.averaged_model(model)
    teacher.trainable = False
    getattr(model.layers[0], frozen).trainable = False
    model.compile(tfav.SWA(CURRENT.SGD(), 0, 1), "mse")
    model.fit(X, Y, epochs=2, batch_size=16, verbose=0)
    expect_averages(model, tfav.averaged_model(model, target=teacher))
    expect_averages(model, tfav.averaged_model(model))


def test_adapted_layers():
    """What `adapt` computed comes along, where it is in variables and where it is not."""
    normalize = tf_keras.layers.Normalization()
    normalize.adapt(X + 5.0)
    bins = tf_keras.layers.Discretization(num_bins=3, epsilon=0.01)
    bins.adapt(X)
    words = tf_keras.layers.TextVectorization(8, output_mode="tf_idf", pad_to_max_tokens=True)
    words.adapt(["a b c a", "b d"])
    numbers, text = tf_keras.Input([4]), tf_keras.Input([1], dtype=tf.string)
    binned = tf_keras.layers.Flatten()(tf_keras.layers.Embedding(3, 2)(bins(numbers)))
    features = [normalize(numbers), binned, words(text)]
    outputs = tf_keras.layers.Dense(1)(tf_keras.layers.concatenate(features))
    model = tf_keras.Model([numbers, text], outputs)
    model.compile(tfav.SWA(CURRENT.SGD(), 0, 1), "mse")
    inputs = [X, tf.constant([["a c"], ["b b d"]] * 16)]
    model.fit(inputs, Y, verbose=0)
    expect_averages(model, tfav.averaged_model(model), inputs)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    tf_keras.mixed_precision.set_global_policy(policy)
    model = trained(tf.distribute.get_strategy())
    optimizer = model.optimizer if policy == "mixed_bfloat16" else model.optimizer.inner_optimizer
    teacher = tfav.averaged_model(model)
    assert same(
        values(teacher.trainable_variables),
        values(optimizer.get_slot(v, "average") for v in model.trainable_variables),
    )


def test_optimizer_of_a_custom_loop(strategy):
    with strategy.scope():
        model = MODELS["sequential"]()
        optimizer = tfav.ExponentialMovingAverage(CURRENT.SGD())
    teacher = tfav.averaged_model(model, optimizer)  # Before there are averages they are the weights.
    assert same(values(teacher.variables), values(model.variables))
    optimizer.shadow_copy(model)
    for variable in model.variables:
        variable.assign_add(tf.ones_like(variable))
    tfav.averaged_model(model, optimizer, teacher)
    assert same(values(teacher.variables), values(model.variables))


def test_recomputed_statistics_come_with_the_averages():
    model = trained(tf.distribute.get_strategy())
    with model.optimizer.swapped_weights():
        tfav.update_batch_norm(model, X, verbose=0)
        recomputed = values(model.non_trainable_variables)
    assert same(values(tfav.averaged_model(model).non_trainable_variables), recomputed)


@pytest.mark.parametrize("inside", [False, True])
def test_target_for_export_may_live_outside_the_strategy(mirrored_strategy, inside):
    """And the other way round."""
    default = tf.distribute.get_strategy()
    model = trained(mirrored_strategy if inside else default)
    with (default if inside else mirrored_strategy).scope():
        target = MODELS["sequential"]()
    tfav.averaged_model(model, target=target)
    with model.optimizer.swapped_weights():
        expected = [v.numpy() for v in model.variables]
        assert same([v.numpy() for v in target.variables], expected)


def test_result_is_saved(tmp_path):
    teacher = tfav.averaged_model(trained(tf.distribute.get_strategy()))
    teacher.save(tmp_path / "teacher.keras")
    loaded = tf_keras.models.load_model(tmp_path / "teacher.keras")
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), teacher.predict(X, verbose=0))


class TestErrors:
    def test_model_that_cannot_be_cloned(self):
        def create():
            model = NotCloneable(3)
            model.build([None, 4])
            return model

        model = trained(tf.distribute.get_strategy(), create)
        with pytest.raises(ValueError, match="as `target` a second model.*no config"):
            tfav.averaged_model(model)
        target = tfav.averaged_model(model, target=create())
        with model.optimizer.swapped_weights():
            assert same(values(target.variables), values(model.variables))

    def test_no_averaging_optimizer(self):
        model = MODELS["sequential"]()
        with pytest.raises(ValueError, match="Received: None"):
            tfav.averaged_model(model)
        model.compile("sgd", "mse")
        with pytest.raises(ValueError, match="SGD"):
            tfav.averaged_model(model)

    def test_optimizer_of_another_model(self):
        model, other = (trained(tf.distribute.get_strategy()) for _ in range(2))
        with pytest.raises(ValueError, match="averages of other variables only"):
            tfav.averaged_model(model, other.optimizer)

    def test_unbuilt_model(self):
        with pytest.raises(ValueError, match="has not been built"):
            tfav.averaged_model(tf_keras.Sequential(layers()), tfav.SWA(CURRENT.SGD()))

    def test_other_architecture(self):
        model = trained(tf.distribute.get_strategy())
        target = tf_keras.Sequential([tf_keras.layers.Dense(2, input_shape=(4,))])
        with pytest.raises(ValueError, match=r"first difference.*\[4, 3\].*\[4, 2\]"):
            tfav.averaged_model(model, target=target)

    def test_the_model_itself(self):
        model = trained(tf.distribute.get_strategy())
        with pytest.raises(ValueError, match="other than `model`"):
            tfav.averaged_model(model, target=model)

    def test_not_models(self):
        with pytest.raises(TypeError, match="Expected a `keras.Model` or `tf_keras.Model`. Received: 3"):
            tfav.averaged_model(3)
        with pytest.raises(TypeError, match="Received: 'teacher'"):
            tfav.averaged_model(MODELS["sequential"](), tfav.SWA(CURRENT.SGD()), "teacher")

    def test_in_a_graph(self):
        model = trained(tf.distribute.get_strategy())
        with pytest.raises(RuntimeError, match="between calls of the `tf.function`"):
            tf.function(lambda: tfav.averaged_model(model) and None)()
