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
"""Private names of TensorFlow and the Kerases that the package rests on, each with what it must do."""

import keras as keras_3
import pytest
import tensorflow as tf
import tf_keras
from tensorflow.core.protobuf import trackable_object_graph_pb2

import tf_averaging as tfav
from tf_averaging.core import status
from tf_averaging.core import variables as core_variables
from tf_averaging.saving import positions as checkpoint_positions


def test_unique_id_tells_variables_apart():
    first, second = tf.Variable(1.0), tf.Variable(1.0)
    assert first._unique_id == first._unique_id
    assert first._unique_id != second._unique_id


def test_sharded_variable_goes_by_the_id_of_its_first_shard():
    shards = [tf.Variable([1.0]), tf.Variable([2.0])]
    whole = tf.__internal__.distribute.ShardedVariable(shards)
    assert core_variables._identity(whole) == core_variables._identity(shards[0])


def test_distributed_container_leads_from_a_component_to_the_whole(mirrored_strategy):
    with mirrored_strategy.scope():
        variable = tf.Variable(1.0)
    keys = {core_variables._identity(value) for value in variable.values}
    assert keys == {core_variables._identity(variable)}


def test_distribute_strategy_is_where_the_variable_was_created(strategy):
    with strategy.scope():
        variable = tf.Variable(1.0)
    assert (core_variables.strategy_of(variable) or tf.distribute.get_strategy()) is strategy


def test_graphs_say_whether_stateful_operations_run_in_program_order():
    refused = []

    def look():
        try:
            status.check_program_order()
            refused.append(False)
        except RuntimeError:
            refused.append(True)
        return 0

    def look_in_branch():
        return tf.cond(tf.constant(True), look, lambda: 0)

    look()
    for function in (look, look_in_branch):
        tf.function(function, autograph=False)()
    assert refused == [False] * 3
    with tf.Graph().as_default():
        look()
        tf.function(look, autograph=False)()
    assert refused[3:] == [True, False]


def test_autocast_variable_says_its_true_dtype():
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    seen = []

    class Layer(tf_keras.layers.Layer):
        def build(self, input_shape):
            self.kernel = self.add_weight(name="kernel", shape=[2])

        def call(self, inputs):
            seen.append((type(self.kernel).__name__, self.kernel.true_dtype))
            return inputs * self.kernel

    Layer()(tf.ones([1, 2]))
    # Its `dtype` is another matter: float32 in older releases of tf_keras, bfloat16 in newer ones.
    assert seen == [("AutoCastVariable", tf.float32)]


def test_legacy_optimizers_create_their_state_on_request():
    optimizer = tf_keras.optimizers.legacy.Adam()
    optimizer._create_all_weights([tf.Variable(1.0)])
    assert len(optimizer.weights) == 3
    assert optimizer._initial_decay == 0.0


def test_legacy_optimizers_compute_and_sum_gradients_by_these_names(mirrored_strategy):
    optimizer = tf_keras.optimizers.legacy.SGD(1.0)
    variable = tf.Variable(3.0)
    ((gradient, of),) = optimizer._compute_gradients(lambda: variable**2, [variable])
    assert (gradient, of) == (6.0, variable)
    with mirrored_strategy.scope():
        mirrored = tf.Variable(3.0)
    summed = mirrored_strategy.run(
        lambda: optimizer._aggregate_gradients([(tf.constant(1.0), mirrored)])[0][0]
    )
    replicas = mirrored_strategy.num_replicas_in_sync
    assert all(value == replicas for value in mirrored_strategy.experimental_local_results(summed))


def test_legacy_optimizers_say_what_moves_rows_without_a_gradient():
    legacy = tf_keras.optimizers.legacy
    assert [legacy.SGD(momentum=m)._momentum for m in (0.0, 0.9)] == [False, True]
    shrinkage = legacy.Ftrl(l2_shrinkage_regularization_strength=0.1)
    assert shrinkage._l2_shrinkage_regularization_strength == 0.1
    assert legacy.SGD().gradient_aggregator is legacy.Adagrad().gradient_aggregator


def test_learning_rate_schedule_is_kept_where_callbacks_look():
    schedule = tf_keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    for generation in (tf_keras.optimizers, tf_keras.optimizers.legacy):
        assert tfav.SWA(generation.SGD(schedule))._learning_rate is schedule


def test_checkpoint_takes_the_averages_for_slots(tmp_path):
    """By the three methods of `AveragesNode`, and by nothing of the wrapper's."""
    variable = tf.Variable(2.0)
    optimizer = tfav.SWA(tf_keras.optimizers.SGD(1.0), 0, 1)
    optimizer.apply_gradients([(tf.constant(1.0), variable)])
    path = tf.train.Checkpoint(variable=variable, optimizer=optimizer).save(tmp_path / "ckpt")
    keys = [key for key, _ in tf.train.list_variables(path)]
    assert "variable/.OPTIMIZER_SLOT/optimizer/averages/average/.ATTRIBUTES/VARIABLE_VALUE" in keys
    assert "variable/.OPTIMIZER_SLOT/optimizer/averages/clock/.ATTRIBUTES/VARIABLE_VALUE" in keys
    assert "optimizer/averages/swapped/.ATTRIBUTES/VARIABLE_VALUE" in keys
    assert "get_slot_names" not in dir(optimizer)


@pytest.mark.parametrize("weights_only", [False, True])
def test_model_checkpoint_writes_files_by_two_methods(keras, tmp_path, monkeypatch, weights_only):
    model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    written = []
    method = "save_weights" if weights_only else "save"
    monkeypatch.setattr(model, method, lambda path, **options: written.append(path))
    suffix = "weights.h5" if weights_only else "keras"
    checkpoint = keras.callbacks.ModelCheckpoint(
        str(tmp_path / "{epoch}.") + suffix, save_weights_only=weights_only
    )
    model.fit(tf.ones([1, 1]), tf.ones([1, 1]), epochs=2, callbacks=[checkpoint], verbose=0)
    assert written == [str(tmp_path / f"{epoch}.{suffix}") for epoch in (1, 2)]


def test_callback_that_wants_no_logs_is_not_waited_for():
    checkpoint = tfav.callbacks.AverageModelCheckpoint(False, "unused")
    callbacks = tf_keras.callbacks.CallbackList([tfav.callbacks.SwapAverageWeights(), checkpoint])
    assert callbacks._supports_tf_logs
    assert not tf_keras.callbacks.CallbackList([checkpoint])._should_call_train_batch_hooks


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_batch_end", "on_test_batch_begin"])
def test_hooks_that_a_callback_has_are_known(keras, hook):
    """By the mark on those of the base class, and in tf_keras by methods."""
    plain = keras.callbacks.Callback()
    own = type("Own", (keras.callbacks.Callback,), {hook: lambda self, batch, logs=None: None})()
    assert getattr(plain, hook)._is_default
    assert not hasattr(getattr(own, hook), "_is_default")
    if keras is tf_keras:
        mode = "test" if "test" in hook else "train"
        asked = [getattr(c, f"_implements_{mode}_batch_hooks")() for c in (plain, own)]
        assert asked == [False, True]
        for save_freq in ("epoch", 3):
            checkpoint = keras.callbacks.ModelCheckpoint("unused", save_freq=save_freq)
            assert checkpoint._implements_train_batch_hooks() == (save_freq == 3)


def test_callbacks_of_one_training_share_their_parameters(keras):
    callbacks = [keras.callbacks.Callback() for _ in range(2)]
    keras.callbacks.CallbackList(callbacks, epochs=3, steps=2)
    assert callbacks[0].params is callbacks[1].params
    assert callbacks[0].params == {"epochs": 3, "steps": 2}


def test_callback_knows_the_model_by_one_name(keras):
    """`_model` of Keras 3, which tf_keras sets through the property."""
    callback = tfav.callbacks.SwapAverageWeights()
    model = keras.Sequential()
    keras.callbacks.CallbackList([callback], model=model)
    assert callback.model is callback._model is model


def test_layer_calls_the_instances_own_call(keras):
    layer = keras.layers.BatchNormalization()
    inputs = keras.Input([2])
    model = keras.Model(inputs, layer(inputs))
    seen = []
    call = layer.call

    def recording_call(inputs, *args, **kwargs):
        seen.append(kwargs["training"])
        return call(inputs, *args, **kwargs)

    vars(layer)["call"] = recording_call
    model(tf.ones([1, 2]), training=True)
    model(tf.ones([1, 2]), training=False)
    assert seen == [True, False]


@pytest.mark.parametrize("has_argument", [False, True])
def test_keras_3_says_whether_a_model_is_called_with_a_mode(has_argument):
    def call(self, inputs, training=None):
        return inputs

    def call_without(self, inputs):
        return inputs

    model = type("Own", (keras_3.Model,), {"call": call if has_argument else call_without})()
    assert model._call_has_training_arg == has_argument


def test_flatten_layers_lists_parts_in_their_order(keras):
    norm = keras.layers.BatchNormalization()
    inner, dense = keras.Sequential([norm]), keras.layers.Dense(1)
    model = keras.Sequential([keras.Input([2]), inner, dense])
    flat = [layer for layer in model._flatten_layers() if type(layer).__name__ != "InputLayer"]
    assert flat == [model, inner, norm, dense]
    parts = model._flatten_layers(recursive=False, include_self=False)
    assert [layer for layer in parts if type(layer).__name__ != "InputLayer"] == [inner, dense]


def test_keras_3_variable_holds_a_variable_of_tensorflow():
    variable = keras_3.Variable(1.0)
    assert isinstance(variable._value, tf.Variable)
    variable._value.assign(2.0)
    assert variable.numpy() == 2.0


def test_restore_hands_over_what_it_cannot_match(tmp_path):
    """`checkpoint_positions` rests on `_deferred_dependencies` and on what a position offers."""
    inner = tf_keras.optimizers.legacy.SGD(0.1, momentum=0.9)
    variable = tf.Variable(2.0)
    inner.apply_gradients([(tf.constant(1.0), variable)])
    path = tf.train.Checkpoint(variable=variable, optimizer=inner).save(tmp_path / "ckpt")
    taken = []

    class Object(tf.train.Checkpoint):
        _deferred_dependencies = checkpoint_positions.Unmatched(
            lambda name, position: taken.append((name, position)) or True
        )

    target = Object()
    root = tf.train.Checkpoint(variable=tf.Variable(0.0), optimizer=target)
    root.restore(path).expect_partial()
    assert root.variable._update_uid > 0
    positions = dict(taken)
    owner = checkpoint_positions.Owner(positions["iter"], lambda item: item is target)
    assert {"iter", "momentum", "learning_rate"} <= owner.children.keys()
    together = checkpoint_positions.restored_together_with(positions["iter"])
    assert any(item is target for item in together)
    matched = owner.matched()
    assert {id(item) for item in (root, target, root.variable)} <= {id(v) for v in matched.values()}
    ((variable_id, slots),) = owner.slots.items()
    assert matched[variable_id] is root.variable
    assert owner.value(variable_id) == variable
    assert owner.value(slots["momentum"]) == inner.get_slot(variable, "momentum")
    assert owner.full_names() == {"SGD/Variable/momentum"}
    assert checkpoint_positions.child_names(owner.position) == owner.children.keys()
    assert checkpoint_positions.slot_names(owner.position) == {"momentum"}
    counter = tf.Variable(0, dtype=tf.int64)
    assert checkpoint_positions.take_value(positions["iter"], counter) == 1


def test_loss_scale_optimizer_says_what_it_is_around():
    optimizer = tfav.SWA(tf_keras.optimizers.SGD())
    outer = tf_keras.mixed_precision.LossScaleOptimizer(optimizer)
    assert optimizer._is_wrapped_by_loss_scale_optimizer
    loss_scale = tf_keras.optimizers.Optimizer._lookup_dependency(optimizer, "loss_scale")
    assert loss_scale.current_loss_scale == outer.loss_scale
    assert loss_scale.counter == outer.dynamic_counter


def test_optimizer_of_keras_3_keeps_its_state_under_these_names():
    optimizer = keras_3.optimizers.SGD(0.1)
    assert [v._value for v in optimizer._variables] == [
        v._value for v in (optimizer._iterations, optimizer._learning_rate)
    ]
    schedule = keras_3.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    assert keras_3.optimizers.SGD(schedule)._learning_rate is schedule
    # What an averaging optimizer has no use for, and a plain one saves.
    assert {"_trainable_variables", "_trainable_variables_indices"} <= vars(optimizer).keys()


def test_optimizer_of_keras_3_tracks_its_variables_by_one_method():
    tracked = []

    class Own(keras_3.optimizers.SGD):
        def _track_variable(self, variable):
            tracked.append(variable.name)

    Own(0.1).add_variable([], name="own")
    assert tracked == ["iteration", "learning_rate", "own"]


def test_optimizer_of_keras_3_checks_variables_by_one_method():
    known = keras_3.Variable(1.0)
    optimizer = keras_3.optimizers.SGD()
    optimizer.build([known])
    optimizer._check_variables_are_known([known])
    with pytest.raises(ValueError, match="Unknown variable"):
        optimizer._check_variables_are_known([keras_3.Variable(1.0)])


@pytest.mark.parametrize(
    "wrap",
    [
        keras_3.optimizers.LossScaleOptimizer,
        lambda inner: keras_3.optimizers.MultiOptimizer(keras_3.optimizers.OptimizerMap(inner)),
    ],
    ids=["LossScaleOptimizer", "MultiOptimizer"],
)
def test_optimizer_of_keras_3_turns_off_the_loss_scale_of_what_is_inside(wrap):
    """By this an averaging optimizer knows that it is."""
    optimizer = tfav.SWA(keras_3.optimizers.SGD(loss_scale_factor=8.0))
    assert not optimizer._is_inside_another
    wrap(optimizer)
    assert optimizer._is_inside_another
    assert optimizer.inner_optimizer.loss_scale_factor is None


def test_checkpoints_hold_the_graph_of_their_objects(tmp_path):
    """`average_checkpoints` reads what is a variable, a slot, an optimizer there."""
    variable, optimizer = tf.Variable(2.0), tf_keras.optimizers.legacy.SGD(0.1, momentum=0.9)
    optimizer.apply_gradients([(tf.constant(1.0), variable)])
    path = tf.train.Checkpoint(variable=variable, optimizer=optimizer).write(str(tmp_path / "ckpt"))
    reader = tf.compat.v1.train.NewCheckpointReader(path)
    graph = trackable_object_graph_pb2.TrackableObjectGraph.FromString(
        reader.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH")
    )
    root = {child.local_name: graph.nodes[child.node_id] for child in graph.nodes[0].children}
    (attribute,) = root["variable"].attributes
    assert attribute.name == "VARIABLE_VALUE"
    assert reader.get_tensor(attribute.checkpoint_key) == variable
    assert [slot.slot_name for slot in root["optimizer"].slot_variables] == ["momentum"]
    assert {"iter", "learning_rate"} <= {child.local_name for child in root["optimizer"].children}


def test_checkpoints_tell_the_kerases_apart(tmp_path):
    """Optimizers of both go by `_iterations` and `_variables`, in different orders."""
    of_tf_keras = {"_index_dict", "iter"}
    makers = [
        (keras_3.optimizers.Adam, False),
        (tf_keras.optimizers.Adam, True),
        (tf_keras.optimizers.legacy.Adam, True),
    ]
    for make, expected in makers:
        optimizer = make()
        optimizer.apply_gradients([(tf.constant(1.0), tf.Variable(1.0))])
        children = optimizer._trackable_children().keys()
        assert bool(children & of_tf_keras) == expected
