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
"""An update of an embedding's average costs what the step touches, and the average is the same."""

import functools
import threading

import hypothesis
import keras as keras_3
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from hypothesis import strategies as st

import tf_averaging as tfav
from tests import numpy_averages
from tests.testing_utils import CURRENT
from tests.testing_utils import LEGACY
from tf_averaging import kerases
from tf_averaging.core import rows as core_rows

KERAS_3 = keras_3.optimizers
ROWS, WIDTH = 23, 3
TABLE = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)

# Of each optimizer that moves the rows alone that it has gradients for, and of each generation.
SPARSE = {
    "SGD": lambda: CURRENT.SGD(0.1),
    "Adagrad": lambda: CURRENT.Adagrad(0.1, clipnorm=1.0),
    "legacy SGD": lambda: LEGACY.SGD(0.1, clipvalue=0.5),
    "legacy Adagrad": lambda: LEGACY.Adagrad(0.1),
    "legacy Ftrl": lambda: LEGACY.Ftrl(0.1, global_clipnorm=1.0),
    "Keras 3 SGD": lambda: KERAS_3.SGD(0.1, clipnorm=1.0),
    "Keras 3 Adagrad": lambda: KERAS_3.Adagrad(0.1, clipvalue=0.5),
}
around_two = pytest.mark.parametrize("name", ["Adagrad", "Keras 3 Adagrad"])


@pytest.fixture(autouse=True, scope="module")
def tables_are_large():
    """Small tables are updated as a whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core_rows, "MIN_BYTES", 0)
        patch.setattr(core_rows, "_BLOCK", 5 * WIDTH)  # Several blocks, the last of which overlap.
        yield


@tf_keras.saving.register_keras_serializable("embedding_test")
@keras_3.saving.register_keras_serializable("embedding_test")
class Cycle(tfav.AveragedOptimizerWrapper):
    """A user's scheme whose weights are from 0 to 1, both included."""

    WEIGHTS = np.array([0.3, 0.0, 0.7, 0.01, 0.5, 1.0, 0.2])

    def averaging_weight(self, steps, updates):
        return tf.gather(tf.constant(self.WEIGHTS), (updates + 3 * steps) % len(self.WEIGHTS))


def cycle(start=0, period=1) -> numpy_averages.Scheme:
    def wrap(inner):
        return Cycle(inner, start_averaging=start, average_period=period)

    return numpy_averages.Scheme(
        wrap, start, period, lambda s, n: Cycle.WEIGHTS[(n + 3 * s) % len(Cycle.WEIGHTS)]
    )


class Training:
    """A table that is trained, and what its average must be, step by step.

    Args:
      scheme: how it is averaged.
      inner: the optimizer.
      as_function: whether the step is a `tf.function`.
      alone: whether there are no other variables.
    """

    def __init__(self, scheme, inner, as_function=True, alone=False):
        self.scheme, self.optimizer = scheme, scheme.wrap(inner)
        is_keras_3 = isinstance(inner, KERAS_3.Optimizer)
        make = keras_3.Variable if is_keras_3 else tf.Variable
        self.table = make(TABLE)
        self.first, self.bias = make(np.ones(4, np.float32)), make(np.ones(2, np.float32))
        self.variable = kerases.tf_variable(self.table) if is_keras_3 else self.table
        self.alone = alone
        self.optimizer.build([self.table] if alone else [self.first, self.table, self.bias])
        self.history, self.others = [], []
        self.note()
        spec = [tf.TensorSpec([None], tf.int32), tf.TensorSpec([None, WIDTH], tf.float32)]
        self._step = tf.function(self._apply, spec) if as_function else self._apply

    def _apply(self, indices, values):
        slices = tf.IndexedSlices(values, indices, tf.constant([ROWS, WIDTH]))
        others = [(tf.ones(v.shape), v) for v in (self.first, self.bias)]
        pairs = [others[0], (slices, self.table), others[1]]
        self.optimizer.apply_gradients(pairs[1:2] if self.alone else pairs)

    def start_anew(self):
        self.variable.assign(TABLE)
        self.optimizer.reset_averages()
        self.optimizer.iterations.assign(0)
        self.history, self.others = [], []
        self.note()

    def step(self, indices):
        random = np.random.default_rng(len(self.history))
        values = random.normal(size=(len(indices), WIDTH)).astype(np.float32)
        self._step(tf.constant(indices, tf.int32), tf.constant(values))
        self.note()

    def steps(self, number, width=3):
        for _ in range(number):
            random = np.random.default_rng(len(self.history))
            self.step(random.integers(0, ROWS, size=width).tolist())

    def note(self):
        """Notes that a step was taken."""
        self.history.append(self.variable.numpy())
        self.others.append([v.numpy() for v in (self.first, self.bias)])

    def expected(self):
        return numpy_averages.expected_average(self.scheme, self.history)

    def check(self, actual=None):
        """Checks the table's average: this one, or what the optimizer says; then of the others too."""
        if actual is None:
            actual = self.optimizer.get_average(self.table)
            for variable, values in zip(() if self.alone else (self.first, self.bias), zip(*self.others)):
                expected = numpy_averages.expected_average(self.scheme, values)
                np.testing.assert_allclose(self.optimizer.get_average(variable), expected, rtol=1e-5)
        np.testing.assert_allclose(actual, self.expected(), rtol=0, atol=1e-6 * np.abs(TABLE).max())

    def is_sparse(self) -> bool:
        return [v is self.variable for v in self.optimizer.sparse_variables] == [True]


# The average is what its definition says.


def average_in(optimizer) -> np.ndarray:
    """The table's average among the arrays of `get_weights`: the last one of its shape."""
    return [array for array in optimizer.get_weights() if array.shape == TABLE.shape][-1]


PLANS = st.lists(
    st.one_of(
        st.lists(st.integers(0, ROWS - 1), max_size=7),
        st.sampled_from(["read", "swap", "save", "many"]),
    ),
    min_size=5,
    max_size=40,
)
SCHEMES = {
    "EMA": numpy_averages.ema(0.99),
    "EMA from step 3, every second": numpy_averages.ema(0.9, 3, False, 2),
    "SWA": numpy_averages.swa(),
    "SWA from step 2, every third": numpy_averages.swa(2, 3),
    "user's": cycle(),
    "user's from step 1, every second": cycle(1, 2),
}


@pytest.mark.parametrize(
    ("optimizer", "scheme", "as_function"),
    [
        ("SGD", "EMA from step 3, every second", True),
        ("legacy SGD", "SWA from step 2, every third", True),
        ("legacy Adagrad", "user's", True),
        ("Keras 3 Adagrad", "user's from step 1, every second", True),
        ("Adagrad", "user's", False),
        ("Keras 3 SGD", "SWA from step 2, every third", False),
    ],
)
def test_average_is_that_of_all_steps(optimizer, scheme, as_function):
    training = Training(SCHEMES[scheme], SPARSE[optimizer](), as_function)

    @hypothesis.settings(max_examples=4 if as_function else 2, deadline=None, derandomize=True)
    @hypothesis.given(PLANS)
    def follow(plan):
        training.start_anew()
        for action in plan:
            if isinstance(action, list):
                training.step(action)
            elif action == "many":
                training.steps(20 if as_function else 2)
            elif action == "read":
                training.check()
            elif action == "swap":
                with training.optimizer.swapped_weights():
                    training.check(training.variable.numpy())
                    training.check()
                np.testing.assert_array_equal(training.variable.numpy(), training.history[-1])
            else:
                training.check(average_in(training.optimizer))
        training.check()

    follow()
    assert training.is_sparse()


@pytest.mark.parametrize(
    ("optimizer", "scheme"),
    [
        ("Adagrad", "EMA"),
        ("legacy Ftrl", "SWA"),
        ("Keras 3 SGD", "user's"),
    ],
)
def test_average_after_500_steps(optimizer, scheme):
    training = Training(SCHEMES[scheme], SPARSE[optimizer](), alone=optimizer.startswith("legacy"))
    training.steps(500)
    assert training.is_sparse()
    training.check()


# Who looks sees all rows.


@around_two
def test_slot_that_somebody_holds_is_never_behind(name):
    training = Training(SCHEMES["EMA"], SPARSE[name](), alone=True)
    training.steps(20)
    assert training.is_sparse()
    slot = training.optimizer.get_slot(training.table, "average")
    assert training.optimizer.sparse_variables == []
    for _ in range(5):
        training.check(slot.numpy())
        training.steps(3)
    late = Training(SCHEMES["SWA"], SPARSE[name](), alone=True)
    late.steps(20)
    listed = [v for v in late.optimizer.variables if v.shape == TABLE.shape][-1]
    late.steps(20)
    late.check(listed.numpy())


@around_two
def test_read_in_a_function_writes_nothing_and_assignment_has_all_rows(name):
    training = Training(SCHEMES["EMA"], SPARSE[name](), alone=True)
    training.steps(1)
    get = tf.function(lambda: training.optimizer.get_average(training.table))
    for _ in range(3):
        training.steps(10)
        rows = training.optimizer._averages.rows[training.variable]
        before = rows._caught_up.numpy()
        training.check(get())
        training.check()
        np.testing.assert_array_equal(rows._caught_up.numpy(), before)
        assert np.any(before != before[0])
    training.steps(10)
    assign = tf.function(lambda: training.optimizer.assign_average_vars([training.table]))
    assign()
    training.check(training.variable.numpy())


def call(function, *args) -> None:
    function(*args)


def test_what_was_traced_before_the_first_step_stays_right():
    """It cannot know of rows that wait, so none do."""
    looks = {
        "get": lambda optimizer, table: optimizer.get_average(table),
        "assign": lambda optimizer, table: optimizer.assign_average_vars([table]),
        "slot": lambda optimizer, table: optimizer.get_slot(table, "average"),
    }
    for look in looks.values():
        training = Training(SCHEMES["EMA"], SPARSE["SGD"](), alone=True)
        traced = tf.function(functools.partial(call, look, training.optimizer, training.table))
        traced()
        training.steps(10)
        training.check()
        assert training.optimizer.sparse_variables == []
        slot = training.optimizer.get_slot(training.table, "average").numpy()
        traced()
        training.check(slot)


# Steps of other kinds in between.


def other_step(training, kind):
    """Takes a step that may move all rows, or none."""
    optimizer, table, bias = training.optimizer, training.table, training.bias
    if kind == "dense":
        optimizer.apply_gradients([(tf.ones([ROWS, WIDTH]), table), (tf.ones([2]), bias)])
    elif kind == "twice":
        slices = [tf.IndexedSlices(tf.ones([1, WIDTH]), tf.constant([i])) for i in (3, 4)]
        optimizer.apply_gradients([(slices[0], table), (slices[1], table)])
    elif kind == "none":
        slices = tf.IndexedSlices(tf.ones([1, 2]), tf.constant([0]))
        optimizer.apply_gradients([(None, table), (tf.ones([2]), bias)])
        training.note()
        optimizer.apply_gradients([(tf.ones([2]), bias)])
    training.note()


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize(
    ("name", "as_function"), [("Adagrad", True), ("Keras 3 Adagrad", True), ("Keras 3 Adagrad", False)]
)
def test_steps_of_other_kinds_in_between(name, as_function):
    training = Training(SCHEMES["user's"], SPARSE[name]())
    kinds = ["dense", "none"] if "3" in name else ["dense", "none", "twice"]
    for kind in kinds:
        step = lambda kind=kind: other_step(training, kind)  # noqa: E731
        training.steps(15)
        if as_function and kind != "none":
            noted, training.note = training.note, lambda: None
            traced = tf.function(step)
            traced()
            training.note = noted
            training.note()
        else:
            step()
        training.check()
        training.steps(5)
        training.check()
    assert training.is_sparse()


@pytest.mark.parametrize(("name", "plain_steps"), [("Adagrad", 0), ("Keras 3 Adagrad", 15)])
def test_compiled_steps(name, plain_steps):
    """They update all rows, after steps of another kind too; where they come first no rows ever wait."""
    training = Training(SCHEMES["EMA"], SPARSE[name](), alone=True)
    training.steps(plain_steps)
    plain = training._step
    signature = [tf.TensorSpec([3], tf.int32), tf.TensorSpec([3, WIDTH], tf.float32)]
    compiled = tf.function(training._apply, signature, jit_compile=True)
    for step in (compiled, plain, compiled, plain):
        training._step = step
        training.steps(7)
        training.check()
    assert training.is_sparse() == bool(plain_steps)


def test_momentum_that_is_set_later():
    """Rows go on moving without a gradient then. A step that was traced before does not know it."""
    training = Training(SCHEMES["EMA"], CURRENT.Adagrad(0.1), as_function=False, alone=True)
    training.steps(10)
    training.optimizer.weight_decay = 0.1
    training.steps(10)
    training.check()


def test_updates_by_hand_count_what_is_loaded():
    training = Training(SCHEMES["EMA"], SPARSE["SGD"](), alone=True)
    training.steps(10)
    training.check(average_in(training.optimizer))
    average = training.expected()
    for weight in (0.5, 0.25, 1.0, 0.5):
        loaded = np.full_like(TABLE, weight)
        training.variable.assign(loaded)
        training.optimizer.update_average(weight)
        average = average + weight * (loaded - average)
        np.testing.assert_allclose(training.optimizer.get_average(training.table), average, atol=1e-6)
    training = Training(SCHEMES["EMA"], SPARSE["SGD"](), alone=True)
    training.steps(10)
    average = training.expected()
    update = tf.function(functools.partial(call, training.optimizer.update_average, 0.5))
    for loaded in (training.history[-1], np.ones_like(TABLE)):
        training.variable.assign(loaded)
        update()
        average = (average + loaded) / 2
    np.testing.assert_allclose(training.optimizer.get_average(training.table), average, atol=1e-6)


def test_weights_that_another_optimizer_exchanges():
    """Its averages are not taken for weights that these would have missed."""
    training = Training(SCHEMES["EMA"], SPARSE["SGD"]())
    other = tfav.SWA(CURRENT.SGD(1.0), 0, 1)
    training.steps(10)
    other.shadow_copy([training.table])
    other.update_average()
    training.steps(10)
    other.swap_weights()
    training.check()
    training.check(average_in(training.optimizer))
    other.swap_weights()
    training.steps(10)
    other.apply_gradients([(tf.ones([ROWS, WIDTH]), training.table)])
    expected = training.expected()
    np.testing.assert_allclose(training.optimizer.get_average(training.table), expected, atol=1e-6)

    nested = Training(
        numpy_averages.Scheme(
            lambda inner: tfav.ExponentialMovingAverage(tfav.SWA(inner, 0, 1), average_decay=0.99),
            *SCHEMES["EMA"][1:],
        ),
        SPARSE["SGD"](),
    )
    nested.steps(10)
    nested.check()
    nested.check(average_in(nested.optimizer))
    mean = np.mean(np.float64(nested.history[1:]), axis=0)
    np.testing.assert_allclose(
        nested.optimizer.inner_optimizer.get_average(nested.table), mean, atol=1e-6
    )


# Files.


def checkpoint(training):
    return tf.train.Checkpoint(table=training.table, optimizer=training.optimizer)


def in_file(path) -> dict:
    reader = tf.train.load_checkpoint(path)
    keys = [key for key in reader.get_variable_to_shape_map() if "OBJECT_GRAPH" not in key]
    return {key: reader.get_tensor(key) for key in keys if "save_counter" not in key}


def average_in_file(path) -> np.ndarray:
    (average,) = [
        value
        for key, value in in_file(path).items()
        if "averages/average" in key and value.shape == TABLE.shape
    ]
    return average


def pair_of(name, monkeypatch):
    """Two that were trained alike: one whose rows wait, one that is updated as a whole."""
    sparse = Training(SCHEMES["EMA"], SPARSE[name]())
    sparse.steps(30)
    with monkeypatch.context() as patch:
        patch.setattr(core_rows, "MIN_BYTES", 1 << 40)
        dense = Training(SCHEMES["EMA"], SPARSE[name]())
        dense.steps(30)
    assert sparse.is_sparse()
    assert dense.optimizer.sparse_variables == []
    return sparse, dense


def assert_same_files(first: dict, second: dict):
    assert sorted(first) == sorted(second)
    for key, value in first.items():
        if key == "about":  # Names, which are numbered.
            continue
        if np.asarray(value).dtype == np.float32:
            np.testing.assert_allclose(value, second[key], rtol=0, atol=2e-6, err_msg=key)
        else:
            np.testing.assert_array_equal(value, second[key], err_msg=key)


@around_two
def test_files_are_those_of_averages_that_are_updated_as_a_whole(name, monkeypatch, tmp_path):
    pair = pair_of(name, monkeypatch)
    stores = [{}, {}]
    for training, store in zip(pair, stores):
        training.optimizer.save_own_variables(store)
    assert_same_files(*stores)
    for training in pair:
        training.steps(5)
    paths = [checkpoint(t).save(str(tmp_path / f"{i}")) for i, t in enumerate(pair)]
    assert_same_files(*map(in_file, paths))
    loaded = Training(SCHEMES["EMA"], SPARSE[name]())
    loaded.steps(40)  # Rows of it are behind when the files come.
    for load in (
        lambda: checkpoint(loaded).restore(paths[0]).expect_partial(),
        lambda: loaded.optimizer.load_own_variables(stores[0]),
        lambda: loaded.optimizer.set_weights(pair[0].optimizer.get_weights()),
    ):
        loaded.steps(7)
        load()
        loaded.variable.assign(pair[0].variable)
        saved = stores[0] if load.__code__.co_names[-1] == "load_own_variables" else None
        if saved is None:
            pair[0].check(loaded.optimizer.get_average(loaded.table))
    loaded.history, loaded.others = list(pair[0].history), list(pair[0].others)
    for variable, value in zip((loaded.first, loaded.bias), loaded.others[-1]):
        variable.assign(value)
    loaded.steps(20)
    loaded.check()


@around_two
def test_asynchronous_checkpoints_have_all_rows(name, tmp_path):
    training = Training(SCHEMES["EMA"], SPARSE[name](), alone=True)
    saver = checkpoint(training)
    options = tf.train.CheckpointOptions(enable_async=True)
    for _ in range(4):
        training.steps(15)
        assert training.is_sparse()
        path = saver.save(str(tmp_path / "ckpt"), options=options)
        expected = training.expected()
        training.steps(5)
        saver.sync()
        np.testing.assert_allclose(average_in_file(path), expected, rtol=0, atol=2e-6)
        if "3" in name:  # Plain Keras 3 cannot save twice with one of them.
            saver = checkpoint(training)


def test_checkpoint_that_another_thread_writes(tmp_path):
    training = Training(SCHEMES["EMA"], SPARSE["SGD"](), alone=True)
    saver = checkpoint(training)
    saver.save(str(tmp_path / "first"))
    training.steps(15)
    thread = threading.Thread(target=lambda: saver.write(str(tmp_path / "second")))
    thread.start()
    thread.join()
    training.check(average_in_file(str(tmp_path / "second")))


# Who qualifies.

REFUSED = {
    "momentum": lambda: CURRENT.SGD(0.1, momentum=0.9),
    "legacy momentum": lambda: LEGACY.SGD(0.1, momentum=0.9),
    "Keras 3 momentum": lambda: KERAS_3.SGD(0.1, momentum=0.9),
    "weight decay": lambda: CURRENT.Adagrad(0.1, weight_decay=0.1),
    "Keras 3 weight decay": lambda: KERAS_3.Adagrad(0.1, weight_decay=0.1),
    "Keras 3 clipping of all": lambda: KERAS_3.SGD(0.1, global_clipnorm=1.0),
    "Keras 3 accumulation": lambda: KERAS_3.SGD(0.1, gradient_accumulation_steps=2),
    "Adam": lambda: CURRENT.Adam(0.1),
    "Ftrl": lambda: CURRENT.Ftrl(0.1),
    "Keras 3 Ftrl": lambda: KERAS_3.Ftrl(0.1),
    "shrinkage": lambda: LEGACY.Ftrl(0.1, l2_shrinkage_regularization_strength=0.1),
    "transformed": lambda: LEGACY.SGD(0.1, gradient_transformers=[list]),
    "aggregated": lambda: LEGACY.SGD(0.1, gradient_aggregator=list),
    "subclass": lambda: type("Mine", (CURRENT.SGD,), {})(0.1),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED.keys())
def test_other_optimizers_update_averages_as_a_whole(make):
    inner = make()
    training = Training(numpy_averages.swa(), inner, as_function=False, alone=True)
    training.steps(2)
    assert training.optimizer.sparse_variables == []
    if getattr(inner, "gradient_accumulation_steps", None) is None:
        training.check()


class Own(tfav.AveragedOptimizerWrapper):
    def average_op(self, var, average_var):
        return tf.maximum(var, average_var)


def test_other_variables_and_schemes_update_averages_as_a_whole(mirrored_strategy):
    def sparse_after_a_step(optimizer, variable):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.cast(tf.gather(variable, [1, 2]), tf.float32))
        optimizer.apply_gradients([(tape.gradient(loss, variable), variable)])
        return optimizer.sparse_variables

    ema = tfav.ExponentialMovingAverage
    variable = tf.Variable(TABLE)
    assert sparse_after_a_step(ema(CURRENT.SGD(0.1)), variable) == [variable]
    assert sparse_after_a_step(Own(CURRENT.SGD(0.1)), variable) == []
    half = tf.Variable(tf.cast(TABLE, tf.float16))
    assert sparse_after_a_step(ema(CURRENT.SGD(0.1)), half) == []
    constrained = tf.Variable(TABLE, constraint=lambda value: value / 2)
    assert sparse_after_a_step(ema(CURRENT.SGD(0.1)), constrained) == []
    with mirrored_strategy.scope():
        distributed, optimizer = tf.Variable(TABLE), ema(CURRENT.SGD(0.1))
    mirrored_strategy.run(sparse_after_a_step, (optimizer, distributed))
    assert optimizer.sparse_variables == []


# What it costs.


def operations(function) -> list:
    graphs = [function.get_concrete_function().graph]
    graphs += [f.graph for f in graphs[0]._functions.values() if hasattr(f, "graph")]
    return [op.type for graph in graphs for op in graph.get_operations()]


@pytest.mark.parametrize("module", [CURRENT, KERAS_3], ids=["", "Keras 3"])
def test_model_without_sparse_gradients_gets_no_operation_more(module):
    """Around the same optimizer, whether its variables are large enough to look for rows or not."""
    counts = []
    for least in (0, 1 << 40):
        core_rows_least, core_rows.MIN_BYTES = core_rows.MIN_BYTES, least
        table = keras_3.Variable(TABLE) if module is KERAS_3 else tf.Variable(TABLE)
        optimizer = tfav.ExponentialMovingAverage(module.SGD(0.1))
        pairs = [(tf.ones_like(TABLE), table)]
        step = tf.function(functools.partial(call, optimizer.apply_gradients, pairs))
        step()
        counts.append(operations(step))
        core_rows.MIN_BYTES = core_rows_least
        assert optimizer.sparse_variables == []
    assert counts[0] == counts[1]
    assert not {"ResourceGather", "ResourceScatterUpdate", "Unique", "If"} & set(counts[0])


@pytest.mark.parametrize("keras", [tf_keras, keras_3], ids=["tf_keras", "Keras 3"])
def test_fit_touches_no_whole_table_and_what_looks_at_the_model_sees_all_rows(keras, tmp_path):
    """Nothing in `fit` or in `.keras` takes hold of the averages."""
    number, file = 1000, str(tmp_path / "model.keras")
    model = keras.Sequential([keras.Input([2]), keras.layers.Embedding(number, 2), keras.layers.Dense(1)])
    model.compile(tfav.ExponentialMovingAverage(keras.optimizers.Adagrad(0.1)), "mse", jit_compile=False)
    inputs = np.arange(64).reshape(32, 2)
    history = [model.get_weights()[0]]
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs=None: history.append(model.get_weights()[0])
    )

    def fit(model, *callbacks):
        model.fit(inputs, np.ones((32, 2, 1)), batch_size=8, verbose=0, callbacks=[note, *callbacks])

    def check(average):
        expected = numpy_averages.expected_average(SCHEMES["EMA"], history)
        np.testing.assert_allclose(average, expected, rtol=0, atol=1e-6)

    fit(model)
    (table,) = model.optimizer.sparse_variables
    assert table.shape == [number, 2]
    rows = model.optimizer._averages.rows[table]
    assert np.count_nonzero(rows._caught_up.numpy()) == 64
    fold = rows._fold.get_concrete_function().graph
    table_sized = [op.name for op in fold.get_operations() for t in op.outputs if t.shape[:1] == [number]]
    assert table_sized == []
    inputs += 32
    check(tfav.averaged_model(model).get_weights()[0])
    fit(model, tfav.callbacks.AverageModelCheckpoint(True, file))
    saved = keras.models.load_model(file)
    check(saved.get_weights()[0])
    fit(model, keras.callbacks.ModelCheckpoint(file))
    assert len(model.optimizer.sparse_variables) == 1
    loaded = keras.models.load_model(file)
    check(loaded.optimizer.get_average(loaded.trainable_variables[0]))
    fit(model, tfav.callbacks.SwapAverageWeights(swap_on_epoch=True))
    check(model.get_weights()[0])
    assert len(model.optimizer.sparse_variables) == 1
    fit(loaded)
    assert len(loaded.optimizer.sparse_variables) == 1
