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
"""What a user loads into a model in which `fit` left the averages is never trained over, or lost."""

import numpy as np
import pytest
import tensorflow as tf

import tf_averaging as tfav
from tests import testing_utils
from tests.testing_utils import X
from tests.testing_utils import Y


class TestWeightsLoadedAfterFit:
    """Into a model in which `fit` has left the averages."""

    def fit(self, keras, model, callbacks=(), epochs=2):
        """Returns the weights with which training begins."""
        begun = []

        class Begin(keras.callbacks.Callback):
            def on_train_batch_begin(self, batch, logs=None):
                begun.append(model.get_weights())

        callbacks = [tfav.callbacks.SwapAverageWeights(swap_on_epoch=True), *callbacks, Begin()]
        model.fit(X, Y, validation_data=(X, Y), epochs=epochs, callbacks=callbacks, verbose=0)
        return begun[0]

    def trained(self, keras, optimizer, callbacks=()):
        model = testing_utils.new_model(optimizer, keras=keras)
        self.fit(keras, model, callbacks)
        assert model.optimizer.weights_swapped
        return model

    def make(self, keras, scheme):
        return (tfav.SWA if scheme == "SWA" else tfav.ExponentialMovingAverage)(keras.optimizers.SGD(0.1))

    @pytest.mark.parametrize("scheme", ["SWA", "EMA"])
    def test_are_trained_on(self, keras, scheme, caplog):
        model = self.trained(keras, self.make(keras, scheme))
        loaded = [np.full_like(weight, 0.5) for weight in model.get_weights()]
        model.set_weights(loaded)
        caplog.clear()
        testing_utils.assert_same_bits(self.fit(keras, model), loaded)
        assert [record.message[:23] for record in caplog.records] == ["Weights were loaded into"[:23]]
        fresh = testing_utils.new_model(self.make(keras, scheme), keras=keras)
        fresh.set_weights(loaded)
        if scheme == "EMA":  # SWA's due steps follow the count of steps, which goes on.
            self.fit(keras, fresh)
            testing_utils.assert_same_bits(model.get_weights(), fresh.get_weights())

    def test_by_early_stopping_are_trained_on(self, keras, caplog):
        stop = keras.callbacks.EarlyStopping("loss", mode="max", patience=5, restore_best_weights=True)
        model = self.trained(keras, self.make(keras, "EMA"), [stop])
        restored = model.get_weights()
        testing_utils.assert_same_bits(self.fit(keras, model), restored)
        assert "Weights were loaded" in caplog.text

    def test_none_were(self, keras, caplog):
        model = self.trained(keras, self.make(keras, "EMA"))
        optimizer = model.optimizer
        raw = [np.array(optimizer.get_slot(v, "average")) for v in model.trainable_variables]
        testing_utils.assert_same_bits(self.fit(keras, model), raw)
        optimizer.swap_weights()
        model.set_weights([weight + 1 for weight in model.get_weights()])
        raw = model.get_weights()
        optimizer.swap_weights()
        testing_utils.assert_same_bits(self.fit(keras, model), raw)
        assert "Weights were loaded" not in caplog.text

    def test_with_the_optimizers_state_are_not_loaded_weights(self, keras, tmp_path, caplog):
        model = self.trained(keras, self.make(keras, "EMA"))
        checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        path = checkpoint.save(str(tmp_path / "ckpt"))
        raw = [np.array(model.optimizer.get_slot(v, "average")) for v in model.trainable_variables]
        self.fit(keras, model)
        checkpoint.restore(path)
        testing_utils.assert_same_bits(self.fit(keras, model), raw)
        assert "Weights were loaded" not in caplog.text

    def test_statistics_are_not_loaded_weights(self, keras, caplog):
        model = keras.Sequential([keras.Input([len(X[0])]), keras.layers.BatchNormalization()])
        model.add(keras.layers.Dense(len(Y[0])))
        model.compile(self.make(keras, "EMA"), "mse")
        self.fit(keras, model)
        raw = [model.optimizer.get_slot(v, "average").numpy() for v in model.trainable_variables]
        tfav.update_batch_norm(model, X, verbose=0)
        updates = int(model.optimizer.num_averaged)
        caplog.clear()
        begun = self.fit(keras, model)
        assert not caplog.records
        trained = [w for w, v in zip(begun, model.weights) if v.trainable]
        testing_utils.assert_same_bits(trained, raw)
        assert model.optimizer.num_averaged == 2 * updates

    def test_after_a_fit_that_was_broken_off_are_trained_on(self, keras):
        class Break(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                raise KeyError("broken off")

        model = testing_utils.new_model(self.make(keras, "EMA"), keras=keras)
        with pytest.raises(KeyError, match="broken off"):
            self.fit(keras, model, [Break()])
        loaded = [np.full_like(weight, 0.5) for weight in model.get_weights()]
        model.set_weights(loaded)
        testing_utils.assert_same_bits(self.fit(keras, model), loaded)

    def test_swap_that_takes_them_for_averages_says_so(self, keras):
        model = self.trained(keras, self.make(keras, "EMA"))
        model.set_weights([weight + 1 for weight in model.get_weights()])
        with pytest.warns(UserWarning, match="Weights were loaded into the model while it held"):
            model.optimizer.swap_weights()

    def test_fit_on_weights_that_were_swapped_by_hand_says_what_it_trains(self, keras, caplog):
        model = testing_utils.new_model(self.make(keras, "EMA"), keras=keras)
        testing_utils.fit_steps(model, 3)
        raw = model.get_weights()
        model.optimizer.swap_weights()
        testing_utils.assert_same_bits(self.fit(keras, model), raw)
        assert "goes on from the raw weights" in caplog.text

    @pytest.mark.parametrize("how", ["loaded", "reset"])
    def test_begin_epoch_holds_in_each_fold(self, keras, how):
        """Two of four epochs of 20 steps are averaged, whatever came before."""
        model = testing_utils.new_model(self.make(keras, "EMA"), keras=keras)
        fold = model.get_weights()
        for _ in range(3):
            if how == "reset" and model.optimizer.has_shadow_copy:
                model.optimizer.swap_weights()
                model.optimizer.reset_averages()
            model.set_weights(fold)
            swap = tfav.callbacks.SwapAverageWeights(begin_epoch=2, callbacks=[])
            model.fit(X, Y, batch_size=8, epochs=4, callbacks=[swap], verbose=0)
            assert model.optimizer.num_averaged == 2 * 20
