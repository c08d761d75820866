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
"""Callbacks inside `SwapAverageWeights` and outside: what they see, judge, save and restore.

The model is linear, so that NumPy has every average and every loss. Its validation targets lie on the way
to those of training: the averages are best in the middle, and a schedule of early stopping is known.
"""

import copy

import keras as keras_3
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import tf_averaging as tfav
from tests.testing_utils import assert_same_bits
from tests.testing_utils import values
from tf_averaging.callbacks import recomputed_statistics

EPOCH = 4  # Steps in an epoch, of 8 samples each.
X = np.random.default_rng(0).normal(size=(8 * EPOCH, 2)).astype(np.float32)
KERNEL = np.array([[1.0], [-2.0]], np.float32)
Y, VALIDATION_Y = X @ KERNEL, X @ (0.4 * KERNEL)
FIT = {"batch_size": 8, "shuffle": False, "verbose": 0}
DATA = {"x": X, "y": Y, "validation_data": (X, VALIDATION_Y), **FIT}
HOOKS = [
    *(f"on_{mode}_{end}" for mode in ("train", "test", "predict", "epoch") for end in ("begin", "end")),
    *(f"on_{mode}_batch_{end}" for mode in ("train", "test", "predict") for end in ("begin", "end")),
]
IN_BATCHES = [hook for hook in HOOKS if "batch" in hook]


@pytest.fixture(params=["keras", "tf_keras-mirrored"])
def place(request):
    """A Keras and a strategy: both Kerases, and two replicas where they take little time."""
    return place_named(request.param, request)


def place_named(param, request):
    name, *replicas = param.split("-")
    strategy = request.getfixturevalue("mirrored_strategy") if replicas else tf.distribute.get_strategy()
    return {"keras": keras_3, "tf_keras": tf_keras}[name], strategy


def new_model(place, batch_norm=False, average_period=1):
    """A linear model that starts from zeros, with a mean over all steps."""
    keras, strategy = place if isinstance(place, tuple) else (place, tf.distribute.get_strategy())
    with strategy.scope():
        layers = [keras.layers.Dense(1, kernel_initializer="zeros", name="dense")]
        if batch_norm:
            layers.insert(0, keras.layers.Dense(3, name="first"))
            layers.insert(1, keras.layers.BatchNormalization(momentum=0.5, name="bn"))
        model = keras.Sequential([keras.Input([2]), *layers])
        model.compile(tfav.SWA(keras.optimizers.SGD(0.05), 0, average_period), "mse")
    return model


def loss_of(weights):
    """The validation loss, in float64."""
    kernel, bias = (np.asarray(weight, np.float64) for weight in weights)
    return np.mean((X.astype(np.float64) @ kernel + bias - VALIDATION_Y) ** 2)


class OfBoth(keras_3.callbacks.Callback, tf_keras.callbacks.Callback):
    """A callback of both Kerases."""

    def __init__(self):
        keras_3.callbacks.Callback.__init__(self)  # The other's would set `model`, a property here.


class Recorder(OfBoth):
    """Keeps the raw weights and their mean after each epoch, in NumPy. It comes first, outside."""

    def on_train_begin(self, logs=None):
        self.count, self.raw, self.mean, self.epochs = 0, None, None, []

    def on_train_batch_end(self, batch, logs=None):
        self.raw = values(self.model.trainable_variables)
        weights = [value.astype(np.float64) for value in self.raw]
        self.count += 1
        mean = self.mean or weights
        self.mean = [m + (w - m) / self.count for m, w in zip(mean, weights)]

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append((self.raw, self.mean))

    def holds(self):
        """What the model holds: raw weights, averages, or what?"""
        weights = values(self.model.trainable_variables)
        if self.count < 2:
            return "same"
        for name, expected in (("raw", self.raw), ("averages", self.mean)):
            if all(np.allclose(w, e, rtol=1e-6, atol=1e-6) for w, e in zip(weights, expected)):
                return name
        return "neither"


class Witness(OfBoth):
    """Notes what the model holds at each hook."""

    def __init__(self, recorder):
        super().__init__()
        self.recorder, self.seen = recorder, {}

    def note(self, hook):
        self.seen.setdefault(hook, set()).add(self.recorder.holds())

    def all(self):
        return set().union(*self.seen.values()) - {"same"}


for _hook in HOOKS:
    setattr(Witness, _hook, lambda self, *args, hook=_hook, **kwargs: self.note(hook))


class SaveBest(OfBoth):
    """What a tuner adds: it saves the weights of the best epoch."""

    def __init__(self, path):
        super().__init__()
        self.path, self.best = str(path), np.inf

    def on_epoch_end(self, epoch, logs=None):
        if logs["val_loss"] < self.best:
            self.best = logs["val_loss"]
            self.model.save_weights(self.path)


def assert_close(actual, expected):
    for a, b in zip(actual, expected):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def loaded(keras, path):
    """The weights in a file."""
    if str(path).endswith(".weights.h5"):
        model = new_model(keras)
        model.load_weights(path)
        return values(model.trainable_variables)
    return values(keras.models.load_model(path).trainable_variables)


def scalars(directory, tag):
    """What TensorBoard got, in the order of the steps."""
    found = {}
    for path in directory.glob("events*"):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                if value.tag == tag:
                    found[event.step] = float(tf.make_ndarray(value.tensor))
    return [found[step] for step in sorted(found)]


@pytest.mark.parametrize(("where", "order"), [("keras", 1), ("tf_keras", -1), ("tf_keras-mirrored", 1)])
def test_all_agree_inside_in_any_order(request, tmp_path, where, order):
    keras, _ = place = place_named(where, request)
    model, recorder = new_model(place), Recorder()
    witness = Witness(recorder)
    inner = [
        keras.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True),
        keras.callbacks.ModelCheckpoint(str(tmp_path / "best.keras"), save_best_only=True),
        keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.1, patience=1, min_delta=0),
        keras.callbacks.TensorBoard(tmp_path / "board", write_graph=False),
        SaveBest(tmp_path / "tuner.weights.h5"),
        tfav.callbacks.AverageModelCheckpoint(False, tmp_path / "ours.keras", save_best_only=True),
        tfav.callbacks.EvaluateRawWeights(X, VALIDATION_Y),
        witness,
    ]
    swap = tfav.callbacks.SwapAverageWeights(callbacks=inner[::order])
    after = Witness(recorder)
    history = model.fit(**DATA, epochs=30, callbacks=[recorder, swap, after]).history
    # All hooks inside see the averages; outside training sees the raw weights.
    assert set(HOOKS) - set(witness.seen) == {hook for hook in HOOKS if "predict" in hook}
    witness.seen.pop("on_train_end")  # EarlyStopping may have restored those of the best epoch before.
    assert witness.all() == {"averages"}
    assert after.seen["on_train_batch_begin"] | after.seen["on_train_batch_end"] <= {"raw", "same"}
    assert after.seen["on_epoch_end"] == {"averages"}
    # The history is that of the averages, and of the raw weights beside it.
    losses = [loss_of(mean) for _, mean in recorder.epochs]
    np.testing.assert_allclose(history["val_loss"], losses, rtol=1e-5, atol=1e-6)
    raw_losses = [loss_of(raw) for raw, _ in recorder.epochs]
    np.testing.assert_allclose(history["raw_val_loss"], raw_losses, rtol=1e-5, atol=1e-6)
    best = int(np.argmin(losses))
    assert 1 <= best == len(losses) - 3
    # Files and the model are those of the best epoch.
    for name in ("best.keras", "tuner.weights.h5", "ours.keras"):
        assert_close(loaded(keras, tmp_path / name), recorder.epochs[best][1])
    assert_close(values(model.trainable_variables), recorder.epochs[best][1])
    assert model.optimizer.weights_swapped
    # The learning rate followed the losses of the averages.
    rates = history["learning_rate" if keras is keras_3 else "lr"]
    np.testing.assert_allclose(rates, [0.05] * (best + 2) + [0.005], rtol=1e-6)
    np.testing.assert_allclose(
        scalars(tmp_path / "board" / "validation", "epoch_loss"), losses, rtol=1e-5, atol=1e-6
    )


def test_all_agree_inside_under_mirrored_strategy_with_keras_3(mirrored_strategy, tmp_path):
    """The same in short: it takes long to trace."""
    model, recorder = new_model((keras_3, mirrored_strategy)), Recorder()
    save = keras_3.callbacks.ModelCheckpoint(str(tmp_path / "best.keras"), save_best_only=True)
    stop = keras_3.callbacks.EarlyStopping("val_loss", restore_best_weights=True)
    witness = Witness(recorder)
    swap = tfav.callbacks.SwapAverageWeights(callbacks=[witness, save, stop])
    history = model.fit(**DATA, epochs=2, callbacks=[recorder, swap]).history
    assert witness.all() == {"averages"}
    means = [mean for _, mean in recorder.epochs]
    np.testing.assert_allclose(history["val_loss"], list(map(loss_of, means)), rtol=1e-5, atol=1e-6)
    best = means[int(np.argmin(history["val_loss"]))]
    assert_close(loaded(keras_3, tmp_path / "best.keras"), best)
    assert_close(values(model.trainable_variables), best)


def test_outside_each_sees_what_its_place_says(place, tmp_path):
    """Before: the raw weights. After, as what a tuner adds: the averages at the end of an epoch."""
    keras, _ = place
    model, recorder = new_model(place), Recorder()
    checkpoint = keras.callbacks.ModelCheckpoint
    before = [
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2),
        checkpoint(str(tmp_path / "before{epoch}.keras")),
    ]
    after = [
        SaveBest(tmp_path / "tuner.weights.h5"),
        keras.callbacks.EarlyStopping("val_loss", patience=1, restore_best_weights=True),
        checkpoint(str(tmp_path / "after.keras"), save_best_only=True),
        keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.1, patience=1, min_delta=1e9),
        keras.callbacks.TensorBoard(tmp_path / "board", write_graph=False),
    ]
    swap = tfav.callbacks.SwapAverageWeights(callbacks=[])
    history = model.fit(**DATA, epochs=3, callbacks=[recorder, *before, swap, *after]).history
    losses = [loss_of(mean) for _, mean in recorder.epochs]
    np.testing.assert_allclose(history["val_loss"], losses, rtol=1e-5, atol=1e-6)
    assert np.argmin(losses) == 2
    for name in ("tuner.weights.h5", "after.keras"):
        assert_close(loaded(keras, tmp_path / name), recorder.mean)
    assert_close(loaded(keras, tmp_path / "before3.keras"), recorder.raw)
    assert_close(values(model.trainable_variables), recorder.mean)
    rates = history["learning_rate" if keras is keras_3 else "lr"]
    np.testing.assert_allclose(rates, [0.025, 0.0125, 0.000625], rtol=1e-6)
    np.testing.assert_allclose(
        scalars(tmp_path / "board" / "validation", "epoch_loss"), losses, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("keras", "inside"), [(keras_3, False), (keras_3, True), (tf_keras, True)])
def test_backup_and_restore(keras, tmp_path, inside):
    """A training that is interrupted and run again is the training that was not."""
    results = []
    for interruptions in ([None], [2, None]):
        for interruption in interruptions:
            model = new_model(keras)
            backup = keras.callbacks.BackupAndRestore(tmp_path / f"{len(interruptions)}")

            def interrupt(epoch, logs, at=interruption):
                if epoch == at:
                    raise RuntimeError("preempted")

            stop = keras.callbacks.LambdaCallback(on_epoch_begin=interrupt)
            swap = tfav.callbacks.SwapAverageWeights(callbacks=[backup] if inside else [])
            callbacks = [swap, stop] if inside else [backup, swap, stop]
            try:
                model.fit(**DATA, epochs=4, callbacks=callbacks)
            except RuntimeError:
                assert interruption is not None
        averages = values(model.trainable_variables)
        model.optimizer.swap_weights()
        results.append([*averages, *values(model.trainable_variables), model.optimizer.num_averaged])
    assert results[0][-1] == results[1][-1] == 4 * EPOCH
    assert_same_bits(results[1][:-1], results[0][:-1])


class TestInBatches:
    def test_files_every_few_batches_hold_the_averages(self, keras, tmp_path):
        model, recorder, means = new_model(keras), Recorder(), {}
        keep = keras.callbacks.LambdaCallback(
            on_batch_end=lambda batch, logs: means.setdefault(recorder.count, recorder.mean)
        )
        inner = keras.callbacks.ModelCheckpoint(
            str(tmp_path / "{epoch}-{batch}.weights.h5"), save_weights_only=True, save_freq=3
        )
        swap = tfav.callbacks.SwapAverageWeights(callbacks=[inner])
        model.fit(X, Y, epochs=3, callbacks=[recorder, keep, swap], **FIT)
        names = sorted(path.name.split(".")[0] for path in tmp_path.iterdir())
        assert names == ["1-3", "2-2", "3-1", "3-4"]
        for name in names:
            epoch, batch = map(int, name.split("-"))
            weights = loaded(keras, tmp_path / f"{name}.weights.h5")
            assert_close(weights, means[(epoch - 1) * EPOCH + batch])

    @pytest.mark.parametrize("looks", [False, True])
    def test_no_swap_for_each_batch_where_none_looks(self, keras, tmp_path, monkeypatch, looks):
        swaps = []
        monkeypatch.setattr(tfav.AveragedOptimizerWrapper, "swap_weights", lambda self: swaps.append(1))
        model, recorder = new_model(keras), Recorder()
        inner = [
            keras.callbacks.EarlyStopping("loss"),
            keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.keras")),
            keras.callbacks.BackupAndRestore(tmp_path / "backup"),
            keras.callbacks.TensorBoard(tmp_path / "board", write_graph=False),
            keras.callbacks.TerminateOnNaN(),
        ]
        if looks:
            inner.append(keras.callbacks.LambdaCallback(on_batch_end=lambda batch, logs: None))
        swap = tfav.callbacks.SwapAverageWeights(callbacks=inner)
        monkeypatch.setattr(model, "save_weights", lambda *args, **kwargs: None)
        monkeypatch.setattr(model, "save", lambda *args, **kwargs: None)
        model.fit(X, Y, epochs=1, callbacks=[recorder, swap], **FIT)
        per_batch = len(swaps) / EPOCH
        assert (per_batch > 2) == looks, swaps

    def test_inside_as_outside(self, keras):
        """Logs that a callback adds, numbers in logs, and an end in the middle of an epoch."""
        types = set()

        class Inner(OfBoth):
            async_safe = True  # Keras 3 would call it on a thread, outside.

            def on_train_batch_end(self, batch, logs=None):
                types.add(type(logs["loss"]))
                self.model.stop_training = self.model.optimizer.iterations == EPOCH + 2

            def on_epoch_end(self, epoch, logs=None):
                logs["added"] = float(epoch)

        model = new_model(keras)
        swap = copy.deepcopy(tfav.callbacks.SwapAverageWeights(callbacks=[Inner()]))  # As a tuner does.
        history = model.fit(X, Y, epochs=3, callbacks=[swap], **FIT).history
        assert history["added"] == [0.0, 1.0]
        assert model.optimizer.iterations == EPOCH + 2
        assert types <= {float, np.float32, np.float64}

    def test_evaluate_and_predict(self, keras):
        model, recorder = new_model(keras), Recorder()
        witness = Witness(recorder)
        model.fit(X, Y, callbacks=[recorder], **FIT)
        swap = tfav.callbacks.SwapAverageWeights(callbacks=[witness])
        model.evaluate(X, Y, callbacks=[swap], verbose=0)
        model.predict(X, callbacks=[swap], verbose=0)
        assert len(witness.seen) == 8
        assert witness.all() == {"averages"}
        assert recorder.holds() == "raw"


@pytest.mark.parametrize("hook", ["on_epoch_end", "on_test_begin"])
def test_an_update_for_each_epoch(keras, hook):
    """The recipe of the guide: after the validation, or before it."""
    model, recorder, snapshots = new_model(keras, average_period=None), Recorder(), []

    class Update(OfBoth):
        def update(self, *args, **kwargs):
            model.optimizer.update_average()
            snapshots.append([weight.astype(np.float64) for weight in recorder.raw])

    update = Update()
    setattr(update, hook, update.update)
    callbacks = [recorder, update, tfav.callbacks.SwapAverageWeights()]
    history = model.fit(**DATA, epochs=3, callbacks=callbacks).history
    means = [np.mean(weights, 0) for weights in zip(*snapshots)]
    assert_close([model.optimizer.get_average(v) for v in model.trainable_variables], means)
    judged = [np.mean(weights[: 3 if hook == "on_test_begin" else 2], 0) for weights in zip(*snapshots)]
    np.testing.assert_allclose(history["val_loss"][-1], loss_of(judged), rtol=1e-5)


class TestLoadedWeights:
    """What a callback inside puts into the model is trained on by the next `fit`, and it says so."""

    def test_restored_at_the_end(self, keras, caplog):
        model, begun = new_model(keras), []
        stop = keras.callbacks.EarlyStopping("val_loss", patience=1, restore_best_weights=True)
        model.fit(**DATA, epochs=30, callbacks=[tfav.callbacks.SwapAverageWeights(callbacks=[stop])])
        restored = values(model.trainable_variables)
        assert "Weights were loaded" not in caplog.text
        begin = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda *_: begun.extend(values(model.trainable_variables))
        )
        model.fit(**DATA, callbacks=[tfav.callbacks.SwapAverageWeights(callbacks=[]), begin])
        assert_same_bits(begun, restored)
        assert "after a `fit` that had left the averages in it" in caplog.text
        assert model.optimizer.num_averaged == EPOCH

    def test_loaded_at_the_start(self, keras, caplog):
        model, begun = new_model(keras), []
        given = [np.full([2, 1], 5.0, np.float32), np.full([1], 7.0, np.float32)]
        load = keras.callbacks.LambdaCallback(on_train_begin=lambda logs: model.set_weights(given))
        begin = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda *_: begun.extend(values(model.trainable_variables))
        )
        model.fit(**DATA, callbacks=[tfav.callbacks.SwapAverageWeights(callbacks=[load]), begin])
        assert_same_bits(begun, given)
        assert "by one of the `callbacks` of `SwapAverageWeights`" in caplog.text

    @pytest.mark.parametrize("stop", [True, False])
    def test_restored_at_the_end_of_an_epoch(self, keras, caplog, stop):
        """By a callback that does not wait for the end of `fit`, as those that go back on a plateau."""
        model, begun = new_model(keras, batch_norm=True), []
        given = [np.full_like(weight, 0.5) for weight in model.get_weights()]

        class GoBack(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                if epoch == 2:
                    model.set_weights(given)
                    model.stop_training = stop

        begin = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda *_: begun.append(model.get_weights())
        )
        swap = tfav.callbacks.SwapAverageWeights(callbacks=[GoBack()], batch_norm_data=X)
        model.fit(**DATA, epochs=3 if stop else 4, callbacks=[swap, begin])
        if stop:
            assert_same_bits(model.get_weights(), given)
            assert "Weights were loaded" not in caplog.text
            model.fit(**DATA, callbacks=[tfav.callbacks.SwapAverageWeights(callbacks=[]), begin])
        assert_same_bits(begun[3], given)
        assert caplog.text.count("Weights were loaded") == 1
        assert model.optimizer.num_averaged == EPOCH


class TestRawWeights:
    @pytest.mark.parametrize(
        ("keras", "order"),
        [
            (keras_3, "before"),
            (keras_3, "after"),
            (keras_3, "inside"),
            (tf_keras, "after, swapped"),
            (tf_keras, "inside"),
        ],
    )
    def test_results_wherever_it_stands(self, keras, order):
        model, recorder = new_model(keras), Recorder()
        raw = tfav.callbacks.EvaluateRawWeights(X, VALIDATION_Y, batch_size=len(X))
        inside = [raw] if order == "inside" else None
        swap = tfav.callbacks.SwapAverageWeights("swapped" in order, callbacks=inside)
        callbacks = {"before": [raw, swap], "inside": [swap]}.get(order, [swap, raw])
        history = model.fit(**DATA, epochs=2, callbacks=[recorder, *callbacks]).history
        for name, index in (("raw_val_loss", 0), ("val_loss", 1)):
            expected = [loss_of(epoch[index]) for epoch in recorder.epochs]
            np.testing.assert_allclose(history[name], expected, rtol=1e-5, atol=1e-6)
        in_model = "raw" if order in ("before", "after") else "averages"
        assert recorder.holds() == in_model

    def test_data_set_and_sample_weights(self, keras):
        model, recorder = new_model(keras), Recorder()
        weights = np.arange(len(X), dtype=np.float32)
        data = tf.data.Dataset.from_tensor_slices((X, VALIDATION_Y)).batch(8)
        history = model.fit(
            X,
            Y,
            callbacks=[
                recorder,
                tfav.callbacks.EvaluateRawWeights(data, steps=2),
                tfav.callbacks.SwapAverageWeights(),
                record := keras.callbacks.History(),
            ],
            **FIT,
        ).history
        kernel, bias = recorder.raw
        errors = ((X @ kernel + bias - VALIDATION_Y) ** 2)[:, 0]
        np.testing.assert_allclose(history["raw_val_loss"], [errors[:16].mean()], rtol=1e-5)
        assert record.history["raw_val_loss"] == history["raw_val_loss"]
        raw = tfav.callbacks.EvaluateRawWeights(X, VALIDATION_Y, len(X), sample_weight=weights)
        raw.set_model(model)
        raw.on_epoch_end(0, logs := {})
        np.testing.assert_allclose(logs["raw_val_loss"], np.mean(errors * weights), rtol=1e-5)

    def test_wrong_arguments(self, keras):
        with pytest.raises(TypeError, match="Received: return_dict"):
            tfav.callbacks.EvaluateRawWeights(X, Y, return_dict=True)
        with pytest.raises(ValueError, match="x=None"):
            tfav.callbacks.EvaluateRawWeights(None)
        with pytest.raises(ValueError, match="read again.*`steps` with them"):
            tfav.callbacks.EvaluateRawWeights(iter([(X, Y)]))
        model = new_model(keras)
        model.compile("sgd", "mse")
        with pytest.raises(ValueError, match="keeps no averages"):
            model.fit(X, Y, callbacks=[tfav.callbacks.EvaluateRawWeights(X, Y)], **FIT)


class Statistics(OfBoth):
    """Notes at some hooks the statistics in the model, and those of the weights in it, by NumPy."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def note(self, hook):
        layers = {layer.name: layer for layer in self.model.layers}
        kernel, bias = (np.float64(value) for value in values(layers["first"].trainable_variables))
        outputs = X.astype(np.float64) @ kernel + bias
        expected = [outputs.mean(0), outputs.var(0)]
        actual = values([layers["bn"].moving_mean, layers["bn"].moving_variance])
        self.seen.setdefault(hook, []).append((actual, expected))

    def fit(self, hook):
        """Whether at this hook the statistics were always those of the weights."""
        return [all(np.allclose(a, e, rtol=1e-4, atol=1e-6) for a, e in zip(*s)) for s in self.seen[hook]]


for _hook in ("on_train_batch_end", "on_test_begin", "on_epoch_end", "on_train_end"):
    setattr(Statistics, _hook, lambda self, *args, hook=_hook, **kwargs: self.note(hook))


class TestBatchNorm:
    """With `batch_norm_data`."""

    @pytest.fixture
    def passes(self, monkeypatch):
        """How many updates the averages held at each pass over the data."""
        counts = []
        update = recomputed_statistics.batch_norm.update_batch_norm

        def counting(model, *args, **kwargs):
            counts.append(int(model.optimizer.num_averaged))
            update(model, *args, **kwargs)

        monkeypatch.setattr(recomputed_statistics.batch_norm, "update_batch_norm", counting)
        return counts

    def file_fits(self, keras, path):
        model = keras.models.load_model(path)
        statistics = Statistics()
        statistics.set_model(model)
        statistics.note("file")
        return statistics.fit("file") == [True]

    def test_averages_have_their_own_and_training_is_not_disturbed(self, place, tmp_path, passes):
        keras, strategy = place
        trained, seen = [], {}
        for given in (None, X):
            keras.utils.set_random_seed(1)
            model = new_model(place, batch_norm=True)
            inside, outside = Statistics(), Statistics()
            inner = [
                inside,
                keras.callbacks.ModelCheckpoint(str(tmp_path / "inside.keras"), save_freq=EPOCH - 1),
                keras.callbacks.EarlyStopping("val_loss", patience=9, restore_best_weights=True),
            ]
            swap = tfav.callbacks.SwapAverageWeights(callbacks=inner, batch_norm_data=given)
            file = tfav.callbacks.AverageModelCheckpoint(
                False, tmp_path / "outside.keras", save_freq=EPOCH - 1
            )
            history = model.fit(**DATA, epochs=2, callbacks=[outside, file, swap]).history
            # Each epoch has one state at its end, and one where both files were written.
            assert passes == ([] if given is None else [3, 4, 6, 8])
            seen = {hook: inside.fit(hook) for hook in ("on_test_begin", "on_epoch_end", "on_train_end")}
            assert all(map(all, seen.values())) == (given is not None)
            if (
                given is not None
            ):  # Each replica has tracked its own, of which tf_keras restores the mean.
                loss = model.evaluate(X, VALIDATION_Y, verbose=0)
                np.testing.assert_allclose(loss, min(history["val_loss"]), rtol=1e-5, atol=1e-6)
            for name in ("inside", "outside"):
                assert self.file_fits(keras, tmp_path / f"{name}.keras") == (given is not None)
            trained.append([a for actual, _ in outside.seen["on_train_batch_end"] for a in actual])
            model.optimizer.swap_weights()
            trained[-1] += values(model.trainable_variables)
        assert_same_bits(*trained)

    @pytest.mark.parametrize(("keras", "swap_on_epoch"), [(keras_3, True), (tf_keras, False)])
    def test_validation_and_the_end_of_fit(self, keras, passes, swap_on_epoch):
        model, statistics = new_model(keras, batch_norm=True), Statistics()
        data = tf.data.Dataset.from_tensor_slices(X).batch(8).repeat()
        options = {"batch_norm_data": data, "batch_norm_steps": EPOCH}
        swap = tfav.callbacks.SwapAverageWeights(swap_on_epoch, **options)
        model.fit(**DATA, epochs=2, validation_freq=2, callbacks=[swap, statistics])
        assert passes == ([4, 8] if swap_on_epoch else [8])
        assert statistics.fit("on_test_begin") == [True]
        assert statistics.fit("on_train_end") == [swap_on_epoch]
        # The next ones find them; another callback sets those of its own data.
        model.evaluate(X, Y, callbacks=[swap, statistics], verbose=0)
        assert len(passes) == 1 + swap_on_epoch
        fresh = tfav.callbacks.SwapAverageWeights(swap_on_epoch, batch_norm_data=X[:8])
        model.evaluate(X, Y, callbacks=[fresh, statistics], verbose=0)
        assert statistics.fit("on_test_begin") == [True, True, False]
        model.fit(X, Y, callbacks=[swap], **FIT)  # It is not taken for what someone loaded.
        assert model.optimizer.num_averaged == 3 * EPOCH

    def test_after_a_reset(self, keras, passes):
        """Averages that hold as many updates as before are others."""
        model, statistics = new_model(keras, batch_norm=True), Statistics()
        swap = tfav.callbacks.SwapAverageWeights(batch_norm_data=X)
        reset = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: model.optimizer.reset_averages()
        )
        model.fit(**DATA, epochs=2, callbacks=[swap, reset, statistics])
        assert passes == [EPOCH, EPOCH]
        assert statistics.fit("on_test_begin") == [True, True]

    def test_before_the_first_update_the_tracked_ones_are_right(self, keras, passes):
        model = new_model(keras, batch_norm=True)
        swap = tfav.callbacks.SwapAverageWeights(begin_epoch=5, batch_norm_data=X)
        model.fit(**DATA, epochs=2, callbacks=[swap])
        assert passes == []

    def test_in_batches_one_warning_names_the_remedy(self, keras, recwarn):
        model = new_model(keras, batch_norm=True)
        look = keras.callbacks.LambdaCallback(on_batch_end=lambda batch, logs: None)
        swap = tfav.callbacks.SwapAverageWeights(callbacks=[look], batch_norm_data=X)
        model.fit(**DATA, epochs=3, callbacks=[swap])
        texts = [str(warning.message) for warning in recwarn if "statistics" in str(warning.message)]
        assert len(texts) == 1
        assert "Call `update_batch_norm` again" in texts[0]

    def test_warning_is_one_where_an_inner_file_recomputes_them(self, keras, tmp_path, recwarn):
        """In the middle of the first epoch; another callback looks at the averages after each batch."""
        model = new_model(keras, batch_norm=True)
        file = keras.callbacks.ModelCheckpoint(
            str(tmp_path / "a.weights.h5"), save_freq=7, save_weights_only=True
        )
        swap = tfav.callbacks.SwapAverageWeights(callbacks=[file, Statistics()], batch_norm_data=X)
        model.fit(**{**DATA, "batch_size": 2}, callbacks=[swap])
        stale = [w for w in recwarn if "are those of averages" in str(w.message)]
        assert len(stale) <= 1

    def test_a_reset_makes_them_stale(self, keras):
        model = new_model(keras, batch_norm=True)
        model.fit(**DATA)
        optimizer = model.optimizer
        with optimizer.swapped_weights():
            tfav.update_batch_norm(model, X, verbose=0)
        optimizer.reset_averages()
        model.fit(**DATA)
        with pytest.warns(UserWarning, match="are those of averages"):
            optimizer.swap_weights()

    def test_callbacks_are_copied_with_a_data_set(self, keras):
        data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)
        swap = tfav.callbacks.SwapAverageWeights(callbacks=[], batch_norm_data=data)
        raw = tfav.callbacks.EvaluateRawWeights(data)
        model = new_model(keras, batch_norm=True)
        history = model.fit(**DATA, callbacks=[copy.deepcopy(swap), copy.deepcopy(raw)]).history
        assert "raw_val_loss" in history


def test_optimizer_of_a_part_averages_that_part(keras):
    """As in a GAN: two optimizers, each with a callback of its own."""

    class Parts(keras.Model):
        def __init__(self):
            super().__init__()
            self.parts = [keras.layers.Dense(3), keras.layers.Dense(1)]
            self.optimizers = [
                tfav.ExponentialMovingAverage(keras.optimizers.SGD(0.01), average_decay=0.5),
                tfav.SWA(keras.optimizers.SGD(0.01), 0, 1),
            ]

        def call(self, inputs):
            return self.parts[1](self.parts[0](inputs))

        def train_step(self, data):
            x, y = data
            for part, optimizer in zip(self.parts, self.optimizers):
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean((self(x) - y) ** 2)
                variables = part.trainable_variables
                optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
            return {"loss": loss}

    model = Parts()
    model.compile(loss="mse")
    model(X)
    swaps = [
        tfav.callbacks.SwapAverageWeights(swap_on_epoch=True, optimizer=optimizer)
        for optimizer in model.optimizers
    ]
    model.fit(**DATA, epochs=2, callbacks=swaps)
    for part, optimizer in zip(model.parts, model.optimizers):
        averaged = [slots.variable.shape for slots in optimizer._averages.averaged()]
        assert averaged == [variable.shape for variable in part.trainable_variables]
        assert optimizer.weights_swapped


def test_begin_epoch_needs_updates_by_itself(keras):
    model = new_model(keras, average_period=None)
    with pytest.raises(ValueError, match="by hand alone"):
        model.fit(**DATA, callbacks=[tfav.callbacks.SwapAverageWeights(begin_epoch=1)])


def test_wrong_arguments(keras):
    make = tfav.callbacks.SwapAverageWeights
    with pytest.raises(TypeError, match="list of Keras callbacks. Received: 'stop'"):
        make(callbacks=["stop"])
    with pytest.raises(TypeError, match="list of Keras callbacks"):
        make(callbacks=keras.callbacks.CallbackList([]))
    with pytest.raises(ValueError, match="no `SwapAverageWeights` of the same optimizer"):
        make(callbacks=[make()])
    with pytest.raises(ValueError, match="Expected `batch_norm_data` too. Received: batch_norm_steps=3"):
        make(batch_norm_steps=3)
    with pytest.raises(TypeError, match="batch_norm_steps=1.5"):
        make(batch_norm_data=X, batch_norm_steps=1.5)
    with pytest.raises(ValueError, match="batch_norm_steps=0"):
        make(batch_norm_data=X, batch_norm_steps=0)
    for data in (iter([X]), tf.data.Dataset.from_tensors(X).repeat()):
        with pytest.raises(ValueError, match="read again.*`batch_norm_steps` with them"):
            make(batch_norm_data=data)
    model = new_model(keras)
    for callbacks in ([make(), make()], [make(callbacks=[make(optimizer=model.optimizer)])]):
        with pytest.raises(ValueError, match="one `SwapAverageWeights` for each averaging optimizer"):
            model.fit(X, Y, callbacks=callbacks, **FIT)
    of_another = tfav.SWA(keras.optimizers.SGD())
    of_another.shadow_copy([keras.Variable(1.0) if keras is keras_3 else tf.Variable(1.0)])
    for other in (make(optimizer=of_another), make(optimizer=of_another, batch_norm_data=X)):
        with pytest.raises(ValueError, match="`batch_norm_data` in the last"):
            model.fit(X, Y, callbacks=[make(batch_norm_data=X), other], **FIT)
    other = {keras_3: tf_keras, tf_keras: keras_3}[keras]
    swap = make(callbacks=[other.callbacks.EarlyStopping()])
    with pytest.raises(TypeError, match=f"Expected callbacks of {keras.__name__}, as the model is"):
        new_model(keras).fit(X, Y, callbacks=[swap], **FIT)
