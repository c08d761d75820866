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
"""The callbacks, seen by a callback that reads the weights at every hook."""

import copy
import signal

import keras as keras_3
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from absl import logging

import tf_averaging as tfav
from tests import testing_utils

X = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
Y = X[:, :1] - 2.0 * X[:, 1:2]
EPOCH = 4  # Steps in an epoch, of 8 samples each.
FIT = {"batch_size": 8, "shuffle": False, "verbose": 0}
HOOKS = [
    "train_begin",
    "train_end",
    "epoch_begin",
    "epoch_end",
    "train_batch_begin",
    "train_batch_end",
    "test_begin",
    "test_end",
    "test_batch_begin",
    "test_batch_end",
    "predict_begin",
    "predict_end",
    "predict_batch_begin",
    "predict_batch_end",
]


@pytest.fixture(params=["keras", "tf_keras", "tf_keras-mirrored"])
def place(request):
    """A Keras and a strategy: both Kerases, and two replicas where they take little time."""
    name, *replicas = request.param.split("-")
    keras = {"keras": keras_3, "tf_keras": tf_keras}[name]
    strategy = request.getfixturevalue("mirrored_strategy") if replicas else tf.distribute.get_strategy()
    return keras, strategy


# For what the optimizer does, whatever the Keras.
with_tf_keras = pytest.mark.parametrize("keras", [tf_keras])


def cases(name, values, with_keras_3):
    """All values with tf_keras, and some of them with Keras 3."""
    pairs = [*((tf_keras, value) for value in values), *((keras_3, value) for value in with_keras_3)]
    return pytest.mark.parametrize(("keras", name), pairs)


def swa(keras, rate=0.1, start=0, **options):
    """A mean over all steps."""
    return tfav.SWA(keras.optimizers.SGD(rate), start, options.pop("average_period", 1), **options)


def ema(keras, rate=0.3, **options):
    return tfav.ExponentialMovingAverage(keras.optimizers.SGD(rate), **options)


def compiled(place, optimizer=None, policy="float32", batch_norm=False, **options):
    """A small model with an averaging optimizer, by default a mean over all steps.

    Args:
      place: a Keras, or a Keras and a strategy.
      optimizer: the model is compiled with it, or with what it returns for a Keras if it is a function.
      policy: the dtype policy.
      batch_norm: whether there is batch normalization, whose state is not averaged by default.
      **options: for `compile`.
    """
    keras, strategy = place if isinstance(place, tuple) else (place, tf.distribute.get_strategy())
    keras.mixed_precision.set_global_policy(policy)
    with strategy.scope():
        layers = [keras.layers.Dense(3, activation="tanh"), keras.layers.Dense(1, dtype="float32")]
        if batch_norm:
            layers.insert(1, keras.layers.BatchNormalization())
        model = keras.Sequential([keras.Input([4]), *layers])
        optimizer = optimizer or swa
        model.compile(optimizer(keras) if callable(optimizer) else optimizer, "mse", **options)
    return model


def functions(keras, **hooks):
    """A callback of functions."""
    return keras.callbacks.LambdaCallback(**hooks)


class OfBoth(keras_3.callbacks.Callback, tf_keras.callbacks.Callback):
    """A callback of both Kerases."""

    def __init__(self):
        keras_3.callbacks.Callback.__init__(self)  # The other's would set `model`, a property here.


def trainable(model):
    return [variable.numpy() for variable in model.trainable_variables]


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second))


class Recorder(OfBoth):
    """Writes down, at every hook, what the model holds: raw weights, averages, or what?

    Raw weights and their mean are kept here, in NumPy, from what the model holds after every batch.
    """

    def __init__(self, start=0, period=1):
        super().__init__()
        self.start, self.period = start, period
        self.steps = 0
        self.raw, self.mean, self.count = None, None, 0
        self.seen = []
        self.metrics = {}

    def on_train_batch_end(self, batch, logs=None):
        self.raw = trainable(self.model)
        if self.steps >= self.start and (self.steps - self.start) % self.period == 0:
            weights = [value.astype(np.float64) for value in self.raw]
            if self.mean is None:
                self.mean = weights
            self.count += 1
            self.mean = [mean + (w - mean) / self.count for mean, w in zip(self.mean, weights)]
        self.steps += 1
        self.note("train_batch_end", logs)

    def what(self):
        weights = trainable(self.model) if self.model.built else []
        if self.raw is None or (self.count <= 1 and same(weights, self.raw)):
            return "same"
        if same(weights, self.raw):
            return "raw"
        mean = self.mean or self.raw
        if all(np.allclose(w, m, rtol=1e-5, atol=1e-6) for w, m in zip(weights, mean)):
            return "averages"
        return "neither"

    def note(self, hook, logs):
        self.seen.append((hook, self.what()))

    def at(self, *hooks):
        """What was seen at these hooks, without where the two are the same."""
        return {what for hook, what in self.seen if hook in hooks and what != "same"}


def _noting(hook):
    return lambda self, *args, **kwargs: self.note(hook, kwargs.get("logs"))


for _hook in HOOKS:
    if _hook != "train_batch_end":
        setattr(Recorder, f"on_{_hook}", _noting(_hook))

TRAINING = ("epoch_begin", "train_batch_begin", "train_batch_end")
EVALUATION = ("test_begin", "test_batch_begin", "test_batch_end")
PREDICTION = ("predict_begin", "predict_batch_begin", "predict_batch_end")


def scaled(keras, optimizer=None):
    """With a loss scale at which no step is skipped."""
    return keras.mixed_precision.LossScaleOptimizer(optimizer or swa(keras), initial_scale=2.0)


OPTIMIZERS = {
    "plain": swa,
    "legacy": lambda keras: tfav.SWA(keras.optimizers.legacy.SGD(0.1), 0, 1),
    "loss scale": scaled,
    "nested": lambda keras: tfav.SWA(ema(keras, 0.1), 0, 1),
    "scaled and nested": lambda keras: scaled(keras, tfav.SWA(ema(keras, 0.1), 0, 1)),
}


class TestWhatHooksSee:
    @pytest.mark.parametrize(
        ("optimizer", "swap_on_epoch"),
        [("plain", False), *((name, True) for name in OPTIMIZERS)],
    )
    def test_fit_with_validation(self, place, optimizer, swap_on_epoch):
        if optimizer == "legacy" and place[0] is keras_3:
            pytest.skip("tf_keras has those")
        model, recorder = compiled(place, OPTIMIZERS[optimizer]), Recorder()
        swap = tfav.callbacks.SwapAverageWeights(swap_on_epoch)
        model.fit(X, Y, validation_data=(X, Y), epochs=3, callbacks=[swap, recorder], **FIT)
        assert recorder.at(*TRAINING) == {"raw"}
        assert recorder.at(*EVALUATION) == {"averages"}
        assert recorder.at("test_end") == {"raw"}
        resting = {"averages"} if swap_on_epoch else {"raw"}
        assert recorder.at("epoch_end") == resting
        assert recorder.at("train_end") == resting
        assert {recorder.what()} == resting
        assert swap.optimizer.weights_swapped == swap_on_epoch

    @pytest.mark.parametrize("swap_on_epoch", [False, True])
    def test_evaluate_and_predict_after_fit(self, place, swap_on_epoch):
        model, recorder = compiled(place), Recorder()
        swap = tfav.callbacks.SwapAverageWeights(swap_on_epoch)
        model.fit(X, Y, epochs=2, callbacks=[swap, recorder], **FIT)
        before = recorder.what()
        recorder.seen.clear()
        model.evaluate(X, Y, callbacks=[swap, recorder], verbose=0)
        model.predict(X, callbacks=[swap, recorder], verbose=0)
        assert recorder.at(*EVALUATION, *PREDICTION) == {"averages"}
        assert recorder.at("test_end", "predict_end") == {before}
        assert before == ("averages" if swap_on_epoch else "raw")

    def test_fresh_callback_leaves_a_swap_by_hand_alone(self, keras):
        model, recorder = compiled(keras), Recorder()
        model.fit(X, Y, callbacks=[recorder], **FIT)
        model.optimizer.swap_weights()
        model.evaluate(X, Y, callbacks=[tfav.callbacks.SwapAverageWeights(), recorder], verbose=0)
        assert recorder.at("test_begin", "test_end") == {"averages"}
        assert model.optimizer.weights_swapped

    def test_before_the_first_update_all_is_the_same(self, place):
        model = compiled(place, lambda keras: swa(keras, start=EPOCH + 1, average_period=10))
        recorder = Recorder(start=EPOCH + 1, period=10)
        swap = tfav.callbacks.SwapAverageWeights(swap_on_epoch=True)
        model.fit(X, Y, validation_data=(X, Y), callbacks=[swap, recorder], **FIT)
        assert recorder.at(*HOOKS) == {"raw"} or recorder.at(*HOOKS) == set()
        model.fit(X, Y, validation_data=(X, Y), callbacks=[swap, recorder], **FIT)
        assert recorder.count == 1
        assert recorder.at(*TRAINING) <= {"raw"}
        assert recorder.what() == "averages"

    def test_training_is_not_disturbed(self, place):
        results = []
        for swap_on_epoch in (None, False, True):
            place[0].utils.set_random_seed(1)
            model = compiled(place, batch_norm=True)
            callbacks = []
            if swap_on_epoch is not None:
                callbacks = [tfav.callbacks.SwapAverageWeights(swap_on_epoch)]
            model.fit(X, Y, validation_data=(X, Y), epochs=3, callbacks=callbacks, **FIT)
            if swap_on_epoch:
                model.optimizer.swap_weights()
            results.append(trainable(model))
        assert same(results[0], results[1])
        assert same(results[0], results[2])

    def test_fit_again(self, place):
        model, recorder = compiled(place), Recorder()
        callbacks = [tfav.callbacks.SwapAverageWeights(swap_on_epoch=True), recorder]
        for _ in range(3):
            model.fit(X, Y, validation_data=(X, Y), callbacks=callbacks, **FIT)
        assert recorder.at(*TRAINING) == {"raw"}
        assert recorder.at(*EVALUATION, "train_end") == {"averages"}

    @pytest.mark.parametrize("trainable_only", [True, False])
    def test_batch_norm_statistics_are_averaged_without_shadow_copy(self, keras, trainable_only):
        model = compiled(keras, swa(keras, trainable_weights_only=trainable_only), batch_norm=True)
        means = []
        record = functions(
            keras, on_batch_end=lambda batch, logs: means.append(model.layers[1].moving_mean.numpy())
        )
        model.fit(X, Y, callbacks=[tfav.callbacks.SwapAverageWeights(True), record], **FIT)
        expected = means[-1] if trainable_only else np.mean(means, axis=0)
        np.testing.assert_allclose(model.layers[1].moving_mean.numpy(), expected, rtol=1e-5)

    def test_unbuilt_model(self, place):
        keras, strategy = place
        with strategy.scope():
            model = keras.Sequential([keras.layers.Dense(1)])
            model.compile(swa(keras), "mse")
        recorder = Recorder()
        callbacks = [tfav.callbacks.SwapAverageWeights(), recorder]
        model.fit(X, Y, validation_data=(X, Y), epochs=2, callbacks=callbacks, **FIT)
        assert recorder.at(*TRAINING) == {"raw"}
        assert recorder.at(*EVALUATION) == {"averages"}

    @pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
    def test_mixed_precision(self, place, policy):
        optimizer = scaled if policy == "mixed_float16" else swa
        model, recorder = compiled(place, optimizer, policy), Recorder()
        callbacks = [tfav.callbacks.SwapAverageWeights(), recorder]
        model.fit(X, Y, validation_data=(X, Y), epochs=2, callbacks=callbacks, **FIT)
        assert recorder.at(*EVALUATION) == {"averages"}
        assert recorder.what() == "raw"

    @cases("options", [{"run_eagerly": True}, {"steps_per_execution": 2}], [{"steps_per_execution": 2}])
    def test_other_modes(self, keras, options):
        model = compiled(keras, **options)
        swap, held = tfav.callbacks.SwapAverageWeights(True), []
        note = functions(
            keras,
            on_epoch_begin=lambda *_: held.append(model.optimizer.weights_swapped),
            on_epoch_end=lambda *_: held.append(model.optimizer.weights_swapped),
        )
        model.fit(X, Y, validation_data=(X, Y), epochs=2, callbacks=[swap, note], **FIT)
        assert held == [False, True, False, True]


class TestCustomLoops:
    """With a `CallbackList` of the user's own, which need not know epochs and steps."""

    def loop(self, keras, model, callbacks, epochs=2, **params):
        hooks = keras.callbacks.CallbackList(callbacks, model=model, **params)
        hooks.on_train_begin()
        for epoch in range(epochs):
            hooks.on_epoch_begin(epoch)
            for batch in range(EPOCH):
                hooks.on_train_batch_begin(batch)
                rows = slice(8 * batch, 8 * batch + 8)
                hooks.on_train_batch_end(batch, {"loss": model.train_on_batch(X[rows], Y[rows])})
            hooks.on_test_begin()
            model.test_on_batch(X, Y)
            hooks.on_test_end()
            hooks.on_epoch_end(epoch)
        hooks.on_train_end()

    def test_sees_what_fit_sees(self, place):
        model, recorder = compiled(place), Recorder()
        self.loop(place[0], model, [tfav.callbacks.SwapAverageWeights(swap_on_epoch=True), recorder])
        assert recorder.at(*TRAINING) == {"raw"}
        assert recorder.at("test_begin", "epoch_end", "train_end") == {"averages"}

    def test_checkpoint(self, keras, tmp_path):
        model, recorder = compiled(keras), Recorder()
        checkpoint = tfav.callbacks.AverageModelCheckpoint(True, tmp_path / "model.keras")
        self.loop(keras, model, [recorder, checkpoint], epochs=1)
        loaded = keras.models.load_model(tmp_path / "model.keras")
        for value, mean in zip(trainable(loaded), recorder.mean):
            np.testing.assert_allclose(value, mean, rtol=1e-5, atol=1e-6)

    def test_begin_epoch_needs_no_number_of_steps(self, keras):
        model, swap = compiled(keras), tfav.callbacks.SwapAverageWeights(begin_epoch=1)
        self.loop(keras, model, [swap])
        assert model.optimizer.start_averaging == model.optimizer.num_averaged == EPOCH


class Nested(OfBoth):
    """Evaluates inside the hooks of an evaluation, with or without telling the swap callback."""

    def __init__(self, hook, callbacks):
        super().__init__()
        self.inside = False
        self.callbacks = callbacks
        setattr(self, hook, self.evaluate)
        self.result = None

    def evaluate(self, *args, **kwargs):
        if not self.inside:
            self.inside = True
            self.result = self.model.evaluate(X, Y, callbacks=self.callbacks, verbose=0)
            self.inside = False


class TestNestedEvaluation:
    @cases(
        "case",
        [
            (hook, told)
            for hook in ("on_test_begin", "on_test_batch_end", "on_epoch_end", "on_train_batch_end")
            for told in (False, True)
        ],
        with_keras_3=[("on_test_begin", True), ("on_epoch_end", False)],
    )
    def test_all_see_what_they_should(self, keras, case):
        hook, told = case
        model, recorder = compiled(keras), Recorder()
        swap = tfav.callbacks.SwapAverageWeights(swap_on_epoch=True)
        nested = Nested(hook, [swap] if told else [])
        callbacks = [swap, nested, recorder]
        model.fit(X, Y, validation_data=(X, Y), epochs=2, callbacks=callbacks, **FIT)
        assert recorder.at(*TRAINING) == {"raw"}
        # Between the end of an inner evaluation and the outer one's next batch nothing is computed.
        assert recorder.at("test_batch_begin") == {"averages"}
        assert recorder.what() == "averages"

    @cases("swap_on_epoch", [False, True], with_keras_3=[True])
    def test_evaluation_at_the_end_of_an_epoch_sees_what_is_in_the_model(self, keras, swap_on_epoch):
        model = compiled(keras)
        nested = Nested("on_epoch_end", [])
        swap = tfav.callbacks.SwapAverageWeights(swap_on_epoch)
        history = model.fit(X, Y, validation_data=(X, Y), callbacks=[swap, nested], **FIT).history
        assert (abs(history["val_loss"][0] - nested.result) < 1e-6) == swap_on_epoch


class Fail(OfBoth):
    """Leaves an evaluation, once."""

    def __init__(self, leave):
        super().__init__()
        self.leave = leave

    def on_test_batch_end(self, batch, logs=None):
        leave, self.leave = self.leave, lambda: None
        leave()


def _raise():
    raise RuntimeError("in the evaluation")


LEAVING = {
    "exception": (_raise, RuntimeError),
    "Ctrl-C": (lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt),
}


class TestAfterAnEvaluationWasLeft:
    @pytest.mark.parametrize("leaving", LEAVING)
    def test_fit_goes_on_from_the_raw_weights(self, place, leaving):
        leave, error = LEAVING[leaving]
        model, recorder = compiled(place), Recorder()
        swap = tfav.callbacks.SwapAverageWeights(swap_on_epoch=True)
        callbacks = [swap, recorder, Fail(leave)]
        with pytest.raises(error):
            model.fit(X, Y, validation_data=(X, Y), callbacks=callbacks, **FIT)
        assert recorder.what() == "averages"
        raw = recorder.raw
        recorder.seen.clear()
        model.fit(X, Y, validation_data=(X, Y), callbacks=callbacks, **FIT)
        assert recorder.at(*TRAINING) == {"raw"}
        first = dict(reversed(recorder.seen))["train_begin"]
        assert first == "raw"
        assert not same(raw, recorder.raw)

    @cases("leaving", LEAVING, with_keras_3=["exception"])
    def test_next_evaluation_restores(self, keras, leaving):
        leave, error = LEAVING[leaving]
        model, recorder = compiled(keras), Recorder()
        swap = tfav.callbacks.SwapAverageWeights()
        model.fit(X, Y, callbacks=[swap, recorder], **FIT)
        with pytest.raises(error):
            model.evaluate(X, Y, callbacks=[swap, Fail(leave)], verbose=0)
        assert recorder.what() == "averages"
        model.evaluate(X, Y, callbacks=[swap], verbose=0)
        assert recorder.what() == "raw"

    @cases("leaving", LEAVING, with_keras_3=["exception"])
    def test_next_batch_heals(self, keras, leaving):
        """An evaluation inside `fit`, whose failure the caller survives."""
        leave, error = LEAVING[leaving]
        model, recorder = compiled(keras), Recorder()
        swap = tfav.callbacks.SwapAverageWeights()

        class Survive(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                if batch == 2:
                    with pytest.raises(error):
                        self.model.evaluate(X, Y, callbacks=[swap, Fail(leave)], verbose=0)
                    assert self.model.optimizer.weights_swapped

        model.fit(X, Y, callbacks=[swap, recorder, Survive()], **FIT)
        assert recorder.steps == EPOCH
        assert recorder.at("train_batch_begin") == {"raw"}

    @cases("leaving", LEAVING, with_keras_3=["exception"])
    def test_swapped_weights_restores_at_once(self, keras, leaving):
        leave, error = LEAVING[leaving]
        model, recorder = compiled(keras), Recorder()
        model.fit(X, Y, callbacks=[recorder], **FIT)
        with pytest.raises(error), model.optimizer.swapped_weights():
            model.evaluate(X, Y, callbacks=[Fail(leave)], verbose=0)
        assert recorder.what() == "raw"


def resumed(keras, model, directory):
    """The model as it is loaded, in tf_keras from a checkpoint."""
    if keras is keras_3:
        model.save(directory / "model.keras")
        return keras.models.load_model(directory / "model.keras")
    model.save_weights(directory / "checkpoint")
    model = compiled(keras)
    model.load_weights(directory / "checkpoint")
    return model


class TestBeginEpoch:
    def test_averages_from_that_epoch_on(self, place):
        model = compiled(place)
        recorder = Recorder(start=2 * EPOCH)
        callbacks = [tfav.callbacks.SwapAverageWeights(begin_epoch=2), recorder]
        model.fit(X, Y, validation_data=(X, Y), epochs=4, callbacks=callbacks, **FIT)
        assert model.optimizer.start_averaging == 2 * EPOCH
        assert recorder.count == model.optimizer.num_averaged == 2 * EPOCH
        assert recorder.at(*EVALUATION) == {"averages"}
        assert [what for hook, what in recorder.seen if hook == "test_begin"][:2] == ["same"] * 2

    def test_model_trained_before_without_averaging(self, keras):
        """Steps taken earlier count; the function that took them is traced again."""
        model = compiled(keras, swa)
        model.train_function = None
        model.optimizer.build(model.trainable_variables)
        model.optimizer.iterations.assign(100)
        model.fit(X, Y, epochs=3, callbacks=[tfav.callbacks.SwapAverageWeights(begin_epoch=1)], **FIT)
        assert model.optimizer.start_averaging == 100 + EPOCH
        assert model.optimizer.num_averaged == 2 * EPOCH

    @with_tf_keras
    def test_initial_epoch(self, keras):
        model = compiled(keras)
        callbacks = [tfav.callbacks.SwapAverageWeights(begin_epoch=5)]
        model.fit(X, Y, initial_epoch=4, epochs=7, callbacks=callbacks, **FIT)
        assert model.optimizer.start_averaging == EPOCH
        assert model.optimizer.num_averaged == 2 * EPOCH

    def test_resumed_training_keeps_the_start(self, keras, tmp_path):
        """From a checkpoint, with `initial_epoch` or without, before the start or after it."""
        for trained, initial_epoch in [(1, 1), (1, 0), (4, 4), (4, 0)]:
            model = compiled(keras)
            swap = tfav.callbacks.SwapAverageWeights(begin_epoch=2)
            stop = functions(
                keras,
                on_epoch_end=lambda epoch, _, m=model, n=trained: setattr(
                    m, "stop_training", epoch + 1 == n
                ),
            )
            model.fit(X, Y, epochs=5, callbacks=[swap, stop], **FIT)
            model = resumed(keras, model, tmp_path)
            swap = tfav.callbacks.SwapAverageWeights(begin_epoch=2)
            epochs = {"initial_epoch": initial_epoch, "epochs": initial_epoch + 4}
            model.fit(X, Y, callbacks=[swap], **epochs, **FIT)
            # A file from before the start says that it comes, and the epochs of `fit` say when.
            start = 2 * EPOCH if trained > 2 else (trained + 2 - initial_epoch) * EPOCH
            assert model.optimizer.start_averaging == start
            assert model.optimizer.num_averaged == (trained + 4) * EPOCH - start

    @with_tf_keras
    def test_checkpoint_loaded_after_a_step_to_build_the_model(self, keras, tmp_path):
        """The function traced for that step knows no start; `fit` traces another."""
        model = compiled(keras)
        model.optimizer.begin_averaging(2 * EPOCH)
        model.fit(X, Y, **FIT)
        path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "checkpoint")
        model = compiled(keras)
        model.fit(X[:8], Y[:8], **FIT)
        tf.train.Checkpoint(model=model, optimizer=model.optimizer).restore(path)
        swap = tfav.callbacks.SwapAverageWeights(begin_epoch=2)
        model.fit(X, Y, initial_epoch=1, epochs=3, callbacks=[swap], **FIT)
        assert model.optimizer.num_averaged == EPOCH

    @with_tf_keras
    def test_fit_again_goes_on(self, keras):
        model = compiled(keras)
        callbacks = [tfav.callbacks.SwapAverageWeights(begin_epoch=1)]
        model.fit(X, Y, epochs=2, callbacks=callbacks, **FIT)
        model.fit(X, Y, epochs=1, callbacks=callbacks, **FIT)
        assert model.optimizer.num_averaged == 2 * EPOCH

    @with_tf_keras
    def test_with_a_period(self, keras):
        model = compiled(keras, swa(keras, average_period=EPOCH))
        callbacks = [tfav.callbacks.SwapAverageWeights(begin_epoch=1)]
        model.fit(X, Y, epochs=3, callbacks=callbacks, **FIT)
        assert model.optimizer.num_averaged == 2

    def test_one_epoch_at_a_time(self, keras, warnings):
        model = compiled(keras)
        callbacks = [tfav.callbacks.SwapAverageWeights(begin_epoch=3)]
        for epoch in range(5):
            model.fit(X, Y, initial_epoch=epoch, epochs=epoch + 1, callbacks=callbacks, **FIT)
            assert model.optimizer.num_averaged == max(epoch - 2, 0) * EPOCH
        assert warnings == [
            f"Nothing was averaged: averaging starts with epoch 3, and training has ended after {steps} "
            "steps."
            for steps in (EPOCH, 2 * EPOCH, 3 * EPOCH)
        ]

    def test_steps_that_are_no_batches(self):
        """An optimizer of Keras 3 that accumulates gradients counts those that move weights."""
        inner = keras_3.optimizers.SGD(0.1, gradient_accumulation_steps=2)
        model = testing_utils.new_model(tfav.SWA(inner, 0, 1), keras=keras_3)
        swap = tfav.callbacks.SwapAverageWeights(begin_epoch=2)
        model.fit(X, Y, epochs=4, callbacks=[swap], **FIT)
        assert model.optimizer.start_averaging == EPOCH
        assert model.optimizer.num_averaged == EPOCH

    def test_unknown_steps(self, keras):
        batches = tf.data.Dataset.from_generator(
            lambda: iter([(X, Y)] * 2),
            output_signature=(tf.TensorSpec([None, 4]), tf.TensorSpec([None, 1])),
        )
        callbacks = [tfav.callbacks.SwapAverageWeights(begin_epoch=1)]
        model = compiled(keras)
        model.fit(batches, epochs=3, callbacks=callbacks, verbose=0)
        assert model.optimizer.num_averaged == 4

    @with_tf_keras
    def test_start_in_steps_too(self, keras):
        model = compiled(keras, ema(keras, start_step=7))
        with pytest.raises(ValueError, match="begin_epoch=1, and an optimizer that starts at step 7"):
            model.fit(X, Y, epochs=3, callbacks=[tfav.callbacks.SwapAverageWeights(begin_epoch=1)], **FIT)

    @with_tf_keras
    def test_averaging_has_begun(self, keras):
        model = compiled(keras)
        model.fit(X, Y, **FIT)
        with pytest.raises(ValueError, match="has begun already"):
            model.fit(X, Y, epochs=3, callbacks=[tfav.callbacks.SwapAverageWeights(begin_epoch=1)], **FIT)


@pytest.fixture
def warnings(monkeypatch):
    """What is logged as warnings."""
    logged = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: logged.append(text % values))
    return logged


@cases("start", [2 * EPOCH - 1, 2 * EPOCH], with_keras_3=[2 * EPOCH])
def test_start_beyond_the_training_is_a_warning(keras, warnings, start):
    warned = start == 2 * EPOCH
    model = compiled(keras, swa(keras, start=start))
    model.fit(X, Y, epochs=2, callbacks=[tfav.callbacks.SwapAverageWeights()], **FIT)
    assert warnings == (
        [
            f"Nothing was averaged: averaging starts at step {start}, and training has ended after "
            f"{2 * EPOCH} steps."
        ]
        if warned
        else []
    )


def test_model_loaded_without_averages_is_a_warning(keras, warnings, tmp_path):
    """The averages start from what was loaded."""
    plain = compiled(keras, keras.optimizers.SGD(0.1))
    plain.fit(X, Y, **FIT)
    plain.save(tmp_path / "plain.keras")
    loaded = keras.models.load_model(tmp_path / "plain.keras")
    weights = trainable(loaded)
    optimizer = tfav.ExponentialMovingAverage(loaded.optimizer, average_decay=1.0, dynamic_decay=False)
    loaded.compile(optimizer, "mse")
    loaded.fit(X, Y, callbacks=[tfav.callbacks.SwapAverageWeights(swap_on_epoch=True)], **FIT)
    assert len(warnings) == 1
    assert warnings[0].startswith(f"After {EPOCH} steps, averaging having started at step 0, the opt")
    assert same(trainable(loaded), weights)  # A decay of 1 keeps what the averages started from.


class TestErrors:
    @pytest.mark.parametrize("optimizer", ["sgd", "legacy"])
    @pytest.mark.parametrize(
        "callback",
        [
            tfav.callbacks.SwapAverageWeights(),
            tfav.callbacks.AverageModelCheckpoint(False, "unused.keras"),
        ],
    )
    def test_optimizer_that_does_not_average(self, keras, optimizer, callback):
        if optimizer == "legacy":
            keras, optimizer = tf_keras, tf_keras.optimizers.legacy.Adam()
        model = compiled(keras, optimizer)
        with pytest.raises(ValueError, match=r"model.compile\(tf_averaging.ExponentialMovingAverage"):
            model.fit(X, Y, callbacks=[callback], **FIT)

    def test_model_that_is_not_compiled(self, keras):
        model = keras.Sequential([keras.Input([4]), keras.layers.Dense(1)])
        with pytest.raises(ValueError, match="compiled with: None"):
            model.predict(X, callbacks=[tfav.callbacks.SwapAverageWeights()], verbose=0)

    def test_wrong_arguments(self, keras):
        with pytest.raises(TypeError, match="swap_on_epoch=1"):
            tfav.callbacks.SwapAverageWeights(1)
        with pytest.raises(TypeError, match="begin_epoch=1.5"):
            tfav.callbacks.SwapAverageWeights(begin_epoch=1.5)
        with pytest.raises(ValueError, match="begin_epoch=-1"):
            tfav.callbacks.SwapAverageWeights(begin_epoch=-1)
        with pytest.raises(TypeError, match="update_weights='model.keras'"):
            tfav.callbacks.AverageModelCheckpoint("model.keras", "val_loss")
        with pytest.raises(TypeError, match="Received: save_best, weights"):
            tfav.callbacks.AverageModelCheckpoint(False, "model.keras", weights=1, save_best=True)
        with pytest.raises(ValueError, match="keeps no averages.*SGD"):
            tfav.callbacks.SwapAverageWeights(optimizer=keras.optimizers.SGD())
        other = tf_keras if keras is keras_3 else keras_3
        swap = tfav.callbacks.SwapAverageWeights(optimizer=tfav.SWA(other.optimizers.SGD()))
        with pytest.raises(TypeError, match="Received what comes from"):
            compiled(keras).fit(X, Y, callbacks=[swap], **FIT)


class TestResume:
    """From files written while the averages were in the model."""

    @cases("format_", ["keras", "checkpoint", "h5"], with_keras_3=["keras"])
    def test_goes_on_from_the_raw_weights(self, keras, tmp_path, format_):
        model, recorder = compiled(keras), Recorder()
        swap = tfav.callbacks.SwapAverageWeights(swap_on_epoch=True)
        model.fit(X, Y, epochs=2, callbacks=[swap, recorder], **FIT)
        averages = trainable(model)
        path = tmp_path / f"model.{format_}"
        if format_ == "checkpoint":
            path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(path)
            model = compiled(keras)
            tf.train.Checkpoint(model=model, optimizer=model.optimizer).restore(path)
        else:
            model.save(path)
            model = keras.models.load_model(path)
        assert same(trainable(model), averages)  # Ready for use as it is.
        swap, seen = tfav.callbacks.SwapAverageWeights(), []
        read = functions(
            keras,
            on_train_begin=lambda _: seen.append(trainable(model)),
            on_test_batch_begin=lambda *_, **__: seen.append(trainable(model)),
        )
        model.evaluate(X, Y, callbacks=[swap, read], batch_size=len(X), verbose=0)
        model.fit(X, Y, callbacks=[swap, read], **FIT)
        assert same(seen[0], averages)
        assert same(seen[1], recorder.raw)
        assert model.optimizer.num_averaged == 3 * EPOCH

    def test_evaluation_of_a_loaded_model_that_averages_its_statistics(self, keras, tmp_path):
        """Their averages wait in the optimizer until it is told of the model."""
        model = compiled(keras, swa(keras, trainable_weights_only=False), batch_norm=True)
        model.fit(X, Y, callbacks=[tfav.callbacks.SwapAverageWeights()], **FIT)
        with model.optimizer.swapped_weights():
            expected = [variable.numpy() for variable in model.variables]
        model.save(tmp_path / "model.keras")
        loaded, seen = keras.models.load_model(tmp_path / "model.keras"), []
        read = functions(
            keras,
            on_test_batch_end=lambda *_, **__: seen.append([v.numpy() for v in loaded.variables]),
        )
        loaded.evaluate(X, Y, callbacks=[tfav.callbacks.SwapAverageWeights(), read], verbose=0)
        assert same(seen[0], expected)
        assert not same(seen[0], [variable.numpy() for variable in loaded.variables])

    @cases("order", ["before", "after"], with_keras_3=["after"])
    def test_backup_and_restore(self, keras, tmp_path, order):
        """A training that is interrupted and run again is the training that was not."""
        results = []
        for interrupted in (False, True):
            keras.utils.set_random_seed(3)
            for interruption in [3, None] if interrupted else [None]:
                model = compiled(keras)
                backup = keras.callbacks.BackupAndRestore(tmp_path / f"{order}{interrupted}")
                swap = tfav.callbacks.SwapAverageWeights(swap_on_epoch=True, begin_epoch=1)
                callbacks = [swap, backup] if order == "after" else [backup, swap]

                def interrupt(epoch, logs, at=interruption):
                    if epoch == at:
                        raise RuntimeError("preempted")

                callbacks.append(functions(keras, on_epoch_begin=interrupt))
                if interruption is None:
                    model.fit(X, Y, epochs=5, callbacks=callbacks, **FIT)
                else:
                    with pytest.raises(RuntimeError, match="preempted"):
                        model.fit(X, Y, epochs=5, callbacks=callbacks, **FIT)
                    keras.utils.set_random_seed(4)
            averages = trainable(model)
            assert model.optimizer.weights_swapped
            model.optimizer.swap_weights()
            results.append(averages + trainable(model) + [model.optimizer.num_averaged.numpy()])
        assert results[0][-1] == 4 * EPOCH
        assert same(*results)


class TestAverageModelCheckpoint:
    @pytest.mark.parametrize("weights_only", [False, True])
    @pytest.mark.parametrize("suffix", [".keras", ".h5", "", ".weights.h5"])
    def test_files_hold_the_averages(self, place, tmp_path, suffix, weights_only):
        keras, _ = place
        if (suffix, weights_only) in [(".keras", True), (".weights.h5", False)]:
            pytest.skip("ModelCheckpoint refuses it")
        if keras is keras_3 and (suffix, weights_only) in [("", False), ("", True), (".h5", True)]:
            pytest.skip("ModelCheckpoint of Keras 3 refuses it")
        model, recorder = compiled(place), Recorder()
        path = str(tmp_path / "model") + suffix
        checkpoint = tfav.callbacks.AverageModelCheckpoint(False, path, save_weights_only=weights_only)
        model.fit(X, Y, callbacks=[checkpoint, recorder], **FIT)
        assert recorder.what() == "raw"
        assert recorder.at("epoch_end", "train_end") == {"raw"}
        if weights_only:
            loaded = compiled(keras)
            loaded.load_weights(path)
        else:
            # Keras 3 does not find the loss in its own `.h5` files.
            loaded = keras.models.load_model(path, compile=keras is tf_keras)
        for value, mean in zip(trainable(loaded), recorder.mean):
            np.testing.assert_allclose(value, mean, rtol=1e-5, atol=1e-6)

    def test_update_weights_leaves_the_averages_in_the_model(self, place, tmp_path):
        keras, _ = place
        model, recorder = compiled(place), Recorder()
        checkpoint = tfav.callbacks.AverageModelCheckpoint(True, str(tmp_path / "{epoch}.keras"))
        model.fit(X, Y, callbacks=[checkpoint, recorder], **FIT)
        assert recorder.what() == "averages"
        assert not model.optimizer.weights_swapped
        averages = trainable(model)
        loaded = keras.models.load_model(tmp_path / "1.keras")
        assert same(trainable(loaded), averages)
        begun = []
        begin = functions(keras, on_epoch_begin=lambda *_: begun.append(trainable(model)))
        model.fit(X, Y, callbacks=[begin], **FIT)  # Training goes on from them.
        assert same(begun[0], averages)

    def test_every_few_batches(self, keras, tmp_path):
        model, recorder = compiled(keras), Recorder()
        means = []
        note = functions(
            keras,
            on_batch_end=lambda batch, logs: means.append([value.copy() for value in recorder.mean]),
        )
        checkpoint = tfav.callbacks.AverageModelCheckpoint(
            False, str(tmp_path / "{epoch}-{batch}.weights.h5"), save_weights_only=True, save_freq=3
        )
        model.fit(X, Y, epochs=3, callbacks=[recorder, note, checkpoint], **FIT)
        assert recorder.at("train_batch_begin", "train_batch_end") == {"raw"}
        written = sorted(path.name.split(".")[0] for path in tmp_path.iterdir())
        assert written == ["1-3", "2-2", "3-1", "3-4"]
        for name in written:
            epoch, batch = map(int, name.split("-"))
            loaded = compiled(keras)
            loaded.load_weights(tmp_path / f"{name}.weights.h5")
            for value, mean in zip(trainable(loaded), means[(epoch - 1) * EPOCH + batch - 1]):
                np.testing.assert_allclose(value, mean, rtol=1e-5, atol=1e-6)

    def test_arguments_of_model_checkpoint_by_position(self, keras, tmp_path):
        options = tf.train.CheckpointOptions(), tf.saved_model.SaveOptions()
        suffixes = ("", "")
        if keras is keras_3:
            options, suffixes = (None, None), (".weights.h5", ".keras")
        for weights_only, option, suffix in zip((True, False), options, suffixes):
            for threshold, is_written in ((0.0, False), (1e9, True)):
                path = tmp_path / f"{weights_only}{threshold}{suffix}"
                checkpoint = tfav.callbacks.AverageModelCheckpoint(
                    False, path, "loss", 0, True, weights_only, "min", "epoch", option, threshold
                )
                compiled(keras).fit(X, Y, callbacks=[checkpoint], **FIT)
                assert bool(list(tmp_path.glob(f"{path.name}*"))) == is_written

    @cases("swap_on_epoch", [False, True], with_keras_3=[True])
    def test_best_is_the_best_average(self, keras, tmp_path, swap_on_epoch):
        model = compiled(keras, ema(keras), batch_norm=True)
        path = tmp_path / "best.keras"
        checkpoint = tfav.callbacks.AverageModelCheckpoint(False, str(path), save_best_only=True)
        assert checkpoint.best is None
        history = model.fit(
            X,
            Y,
            validation_data=(X, Y),
            epochs=8,
            callbacks=[tfav.callbacks.SwapAverageWeights(swap_on_epoch), checkpoint],
            **FIT,
        ).history["val_loss"]
        loss = keras.models.load_model(path).evaluate(X, Y, verbose=0)
        np.testing.assert_allclose(loss, min(history), rtol=1e-5)
        assert checkpoint.best == min(history)

    def test_file_resumes_from_the_raw_weights(self, keras, tmp_path):
        model, recorder = compiled(keras), Recorder()
        checkpoint = tfav.callbacks.AverageModelCheckpoint(False, str(tmp_path / "model.keras"))
        model.fit(X, Y, callbacks=[checkpoint, recorder], **FIT)
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert loaded.optimizer.weights_swapped
        loaded.optimizer.swap_weights()
        assert same(trainable(loaded), recorder.raw)

    def test_while_swapped_it_saves_as_is(self, keras, tmp_path):
        model = compiled(keras)
        model.fit(X, Y, **FIT)
        checkpoint = tfav.callbacks.AverageModelCheckpoint(True, str(tmp_path / "model.keras"))
        checkpoint.set_model(model)
        model.optimizer.swap_weights()
        averages = trainable(model)
        checkpoint.on_epoch_end(0)
        assert model.optimizer.weights_swapped
        assert same(trainable(keras.models.load_model(tmp_path / "model.keras")), averages)

    def test_before_the_first_update_it_saves_the_weights(self, keras, tmp_path):
        model = compiled(keras, swa(keras, start=1000))
        checkpoint = tfav.callbacks.AverageModelCheckpoint(True, str(tmp_path / "model.keras"))
        model.fit(X, Y, callbacks=[checkpoint], **FIT)
        assert same(trainable(keras.models.load_model(tmp_path / "model.keras")), trainable(model))

    @pytest.mark.parametrize("order", [1, -1])
    def test_update_weights_with_swap_on_epoch_is_an_error(self, keras, tmp_path, order):
        callbacks = [
            tfav.callbacks.SwapAverageWeights(swap_on_epoch=True),
            tfav.callbacks.AverageModelCheckpoint(True, str(tmp_path / "model.keras")),
        ]
        model = compiled(keras)
        with pytest.raises(ValueError, match="either that or `update_weights=True`, not both"):
            model.fit(X, Y, callbacks=callbacks[::order], **FIT)
        model.fit(X, Y, callbacks=callbacks[1:], **FIT)  # Alone it is right.

    def test_failed_write_leaves_the_raw_weights(self, keras, tmp_path):
        model, recorder = compiled(keras), Recorder()
        (tmp_path / "model.h5").mkdir()
        checkpoint = tfav.callbacks.AverageModelCheckpoint(False, str(tmp_path / "model.h5"))
        with pytest.raises(OSError, match="directory"):
            model.fit(X, Y, callbacks=[recorder, checkpoint], **FIT)
        assert recorder.what() == "raw"


@cases("wrap", [lambda keras, optimizer: optimizer, scaled], with_keras_3=[scaled])
def test_optimizer_that_the_model_is_not_compiled_with(keras, tmp_path, wrap):
    """It is told of the weights by hand."""
    model = compiled(keras, "sgd")
    optimizer = swa(keras)
    optimizer.shadow_copy(model.trainable_variables)
    weight = iter([1.0] + [0.5] * (EPOCH - 1))
    update = functions(keras, on_batch_end=lambda batch, logs: optimizer.update_average(next(weight)))
    path = tmp_path / "model.keras"
    given = wrap(keras, optimizer)
    swap = tfav.callbacks.SwapAverageWeights(swap_on_epoch=True, optimizer=given)
    checkpoint = tfav.callbacks.AverageModelCheckpoint(False, path, optimizer=given)
    assert swap.optimizer is checkpoint.optimizer is optimizer
    model.fit(X, Y, callbacks=[update, checkpoint, swap], **FIT)
    assert optimizer.weights_swapped
    averages = trainable(model)
    assert same(trainable(keras.models.load_model(path)), averages)
    optimizer.swap_weights()
    assert not same(trainable(model), averages)


def test_callbacks_are_of_the_keras(keras):
    for callback in (
        tfav.callbacks.SwapAverageWeights(),
        tfav.callbacks.AverageModelCheckpoint(False, "unused"),
    ):
        assert isinstance(callback, keras.callbacks.Callback)


class TestOtherCallbacks:
    """Those that people use already, beside ours."""

    def test_early_stopping_keeps_the_best_averages(self, keras):
        model = compiled(keras, ema(keras), batch_norm=True)
        swap = tfav.callbacks.SwapAverageWeights(swap_on_epoch=True)
        stop = keras.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True)
        fit = {"validation_data": (X, Y), "callbacks": [swap, stop], **FIT}
        history = model.fit(X, Y, epochs=50, **fit).history["val_loss"]
        assert len(history) < 50
        assert model.optimizer.weights_swapped
        np.testing.assert_allclose(model.evaluate(X, Y, verbose=0), min(history), rtol=1e-5)
        restored = trainable(model)
        begun = []
        begin = functions(keras, on_epoch_begin=lambda *_: begun.append(trainable(model)))
        model.fit(X, Y, callbacks=[swap, begin], **FIT)
        assert same(begun[0], restored)  # As in plain Keras: see `loaded_weights_test`.

    def test_model_checkpoint_after_the_swap_saves_the_averages(self, keras, tmp_path):
        model, recorder = compiled(keras), Recorder()
        swap = tfav.callbacks.SwapAverageWeights(swap_on_epoch=True)
        checkpoint = keras.callbacks.ModelCheckpoint(str(tmp_path / "model.keras"))
        model.fit(X, Y, callbacks=[swap, checkpoint, recorder], **FIT)
        loaded = keras.models.load_model(tmp_path / "model.keras")
        for value, mean in zip(trainable(loaded), recorder.mean):
            np.testing.assert_allclose(value, mean, rtol=1e-5, atol=1e-6)

    def test_learning_rate_callbacks(self, keras):
        model = compiled(keras)
        schedule = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
        plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.1, patience=1, min_delta=1e9)
        swap = tfav.callbacks.SwapAverageWeights(swap_on_epoch=True)
        history = model.fit(X, Y, epochs=3, callbacks=[swap, schedule, plateau], **FIT).history
        rates = history["learning_rate" if keras is keras_3 else "lr"]
        np.testing.assert_allclose(rates, [0.05, 0.025, 0.00125], rtol=1e-5)

    def test_tensor_board(self, keras, tmp_path):
        """With the graph, and with what the recipe in the docstring adds to the logs."""
        pytest.importorskip("tensorboard")
        model = compiled(keras, ema(keras, dynamic_decay=False))
        board = keras.callbacks.TensorBoard(tmp_path, histogram_freq=1, write_graph=True)
        swap = tfav.callbacks.SwapAverageWeights(swap_on_epoch=True)
        note = functions(keras, on_epoch_end=lambda epoch, logs: logs.update(decay=0.99))
        model.fit(X, Y, validation_data=(X, Y), epochs=2, callbacks=[swap, note, board], **FIT)
        tags = set()
        for path in (tmp_path / "train").glob("events*"):
            for event in tf.compat.v1.train.summary_iterator(str(path)):
                tags |= {value.tag for value in event.summary.value}
        assert {"epoch_loss", "epoch_decay", "keras"} <= tags

    def test_terminate_on_nan(self, keras):
        model = compiled(keras)
        model.fit(X, Y, **FIT)
        swap = tfav.callbacks.SwapAverageWeights(swap_on_epoch=True)
        stop = keras.callbacks.TerminateOnNaN()
        bad = np.full_like(X, np.nan)
        model.fit(bad, Y, validation_data=(X, Y), epochs=3, callbacks=[swap, stop], **FIT)
        assert model.optimizer.num_averaged == EPOCH + 1
        assert model.optimizer.weights_swapped

    def test_csv_logger(self, keras, tmp_path):
        model = compiled(keras)
        log = keras.callbacks.CSVLogger(tmp_path / "log.csv")
        swap = tfav.callbacks.SwapAverageWeights()
        history = model.fit(X, Y, validation_data=(X, Y), epochs=2, callbacks=[swap, log], **FIT).history
        rows = np.genfromtxt(tmp_path / "log.csv", delimiter=",", names=True)
        np.testing.assert_allclose(rows["val_loss"], history["val_loss"], rtol=1e-6)

    def test_compiled_again_for_each_trial(self, keras):
        """As a tuner does: new models, deep copies of one list of callbacks, and new optimizers."""
        given = [tfav.callbacks.SwapAverageWeights(swap_on_epoch=True)]
        for rate in (0.1, 0.01):
            model = compiled(keras, swa(keras, rate))
            recorder = Recorder()
            callbacks = [*copy.deepcopy(given), recorder]
            model.fit(X, Y, validation_data=(X, Y), epochs=2, callbacks=callbacks, **FIT)
            assert recorder.at(*EVALUATION) == {"averages"}
            assert recorder.at(*TRAINING) == {"raw"}

    def test_same_model_compiled_again(self, keras):
        model, swap = compiled(keras), tfav.callbacks.SwapAverageWeights()
        for _ in range(2):
            recorder = Recorder()
            model.compile(swa(keras), "mse")
            model.fit(X, Y, validation_data=(X, Y), epochs=2, callbacks=[swap, recorder], **FIT)
            assert recorder.at(*EVALUATION) == {"averages"}
            assert recorder.at(*TRAINING) == {"raw"}
