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
"""Swapping weights and averages: exact, in place, always undone."""

import functools
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import threading

import keras as keras_3
import numpy as np
import pytest
import tensorflow as tf

import tf_averaging as tfav
from tests import numpy_averages
from tests import testing_utils
from tests.testing_utils import CURRENT
from tests.testing_utils import KERAS
from tests.testing_utils import averages_of
from tests.testing_utils import bits
from tests.testing_utils import descend
from tf_averaging import kerases

SPECIAL = [np.nan, np.inf, -np.inf, -0.0, 0.0, 1.0, -1.5, 6e-8, 1e-40, 5e-324, 65504.0, 3e38]
DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64"]


def set_bits(variable, value, each=False):
    """Sets a variable without arithmetic, on all replicas or on each to an element of its own."""
    for index, component in enumerate(getattr(variable, "values", [variable])):
        component.assign(value[index] if each else value)


def special_values(dtype, seed):
    """All special values that `dtype` can hold, denormals of its own among them, shuffled."""
    dtype = tf.as_dtype(dtype)
    real = dtype.real_dtype.as_numpy_dtype
    with np.errstate(over="ignore", under="ignore"):
        values = np.array(SPECIAL).astype(real)
    smallest = np.array(1, {2: np.uint16, 4: np.uint32, 8: np.uint64}[values.itemsize]).view(real)
    values = np.append(values, [smallest, -smallest]).astype(real)
    np.random.default_rng(seed).shuffle(values)
    if dtype.is_complex:
        pairs = np.stack([values, values[::-1]], axis=-1)
        values = pairs.view(dtype.as_numpy_dtype)[:, 0]
    return values


def averaging_optimizer(average_dtype=None):
    return tfav.ExponentialMovingAverage(CURRENT.SGD(0.1), average_dtype=average_dtype)


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize(
    ("keras", "dtype", "average_dtype"),
    [
        *((KERAS, dtype, None) for dtype in DTYPES),
        (KERAS, "float16", "float16"),
        (KERAS, "bfloat16", "bfloat16"),
        (KERAS, "float32", "float64"),
        (keras_3, "float32", None),
        (keras_3, "bfloat16", None),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_swapping_twice_is_the_identity_bit_for_bit(strategy, keras, dtype, average_dtype, in_graph):
    with strategy.scope():
        new = tf.Variable if keras is KERAS else functools.partial(keras.Variable, dtype=dtype)
        variable = new(special_values(dtype, 1))
        optimizer = tfav.ExponentialMovingAverage(keras.optimizers.SGD(0.1), average_dtype=average_dtype)
    optimizer.shadow_copy([variable])
    variable = kerases.tf_variable(variable)
    testing_utils.count_as(optimizer, 1)  # From then on the averages are not the weights.
    average = optimizer.get_slot(variable, "average")
    set_bits(average, special_values(average.dtype, 2))
    before = bits([variable, average])
    shown = np.broadcast_to(tf.cast(average.numpy(), variable.dtype), testing_utils.read(variable).shape)
    swap = tf.function(optimizer.swap_weights) if in_graph else optimizer.swap_weights

    swap()
    assert bits([variable]) == bits([shown])
    assert optimizer.weights_swapped
    swap()
    assert bits([variable, average]) == before
    assert not optimizer.weights_swapped


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_change_made_while_swapped_goes_to_the_average(dtype):
    """Where the dtypes differ too, and what was not touched keeps its precision."""
    variable = tf.Variable(tf.constant([1.0, 2.0, 3.0], dtype))
    optimizer = averaging_optimizer()
    optimizer.shadow_copy([variable])
    descend(optimizer, [variable], steps=3)
    weights, (average,) = variable.numpy(), averages_of(optimizer, [variable])
    with optimizer.swapped_weights():
        variable.assign(tf.concat([variable[:2], tf.constant([7.0], dtype)], 0))
    np.testing.assert_array_equal(variable.numpy(), weights)
    expected = np.append(average[:2], np.float32(7.0))
    np.testing.assert_array_equal(averages_of(optimizer, [variable]), [expected])


def test_change_made_while_swapped_goes_to_the_average_of_same_dtype():
    variable = tf.Variable([1.0, 2.0])
    optimizer = averaging_optimizer()
    optimizer.shadow_copy([variable])
    with optimizer.swapped_weights():
        variable.assign([5.0, 6.0])
    np.testing.assert_array_equal(variable.numpy(), [1.0, 2.0])


def test_predict_that_was_compiled_before_sees_the_averages(keras):
    model = testing_utils.new_model(tfav.SWA(keras.optimizers.SGD(0.1), 0, 1), keras=keras)
    testing_utils.fit_steps(model, 3)
    raw = model.predict(testing_utils.X, verbose=0)
    expected = testing_utils.new_model(keras=keras)
    averages = [model.optimizer.get_average(variable).numpy() for variable in model.trainable_variables]
    expected.set_weights(averages)
    expected = expected.predict(testing_utils.X, verbose=0)
    with model.optimizer.swapped_weights():
        np.testing.assert_array_equal(model.predict(testing_utils.X, verbose=0), expected)
    np.testing.assert_array_equal(model.predict(testing_utils.X, verbose=0), raw)
    assert not np.array_equal(raw, expected)


def trained(strategy, dtype="float32"):
    with strategy.scope():
        variables = [tf.Variable(tf.constant([1.0, 2.0], dtype)), tf.Variable(tf.constant(3.0, dtype))]
        optimizer = tfav.SWA(CURRENT.SGD(0.5), 0, 1)

    step = tf.function(lambda: strategy.run(lambda: descend(optimizer, variables)))
    step()
    step()
    return optimizer, variables


def slots_of(optimizer, variables):
    return [optimizer.get_slot(variable, "average") for variable in variables]


def in_scope(strategy, call):
    with strategy.scope():
        call()


CONTEXTS = {
    "outside": lambda strategy, call: call(),
    "in scope": in_scope,
    "in function": lambda strategy, call: tf.function(lambda: call())(),
    "on replicas": lambda strategy, call: tf.function(lambda: strategy.run(call))(),
}
everywhere = pytest.mark.parametrize("where", CONTEXTS)


@everywhere
def test_swap_works_everywhere(strategy, where):
    optimizer, variables = trained(strategy)
    slots = slots_of(optimizer, variables)
    before = bits(variables), bits(slots)
    CONTEXTS[where](strategy, optimizer.swap_weights)
    assert (bits(slots), bits(variables)) == before
    CONTEXTS[where](strategy, optimizer.swap_weights)
    assert (bits(variables), bits(slots)) == before


@everywhere
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_assign_works_everywhere(strategy, where, dtype):
    optimizer, variables = trained(strategy, dtype)
    slots = slots_of(optimizer, variables)
    before = bits(slots)
    no_average = tf.Variable(5.0)
    CONTEXTS[where](strategy, lambda: optimizer.assign_average_vars([*variables, no_average]))
    assert bits(variables) == bits(testing_utils.read(slot).astype(dtype) for slot in slots)
    assert bits(slots) == before
    assert no_average.numpy() == 5.0


def test_training_goes_on_after_assign(strategy):
    """Variables and averages share buffers after the assignment; a step must not write to both."""
    optimizer, variables = trained(strategy)
    optimizer.assign_average_vars(variables)
    before = averages_of(optimizer, variables)
    tf.function(lambda: strategy.run(lambda: descend(optimizer.inner_optimizer, variables)))()
    testing_utils.assert_same_bits(averages_of(optimizer, variables), before)
    for variable, average in zip(variables, before):
        expected = average - 0.5 * strategy.num_replicas_in_sync
        np.testing.assert_array_equal(variable.numpy(), expected)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_average_is_read_in_either_state(strategy, dtype):
    optimizer, variables = trained(strategy, dtype)
    averages = averages_of(optimizer, variables)
    read_in_graph = tf.function(lambda v=variables: [optimizer.get_average(variable) for variable in v])
    for _ in range(3):
        for variable, in_graph, average in zip(variables, read_in_graph(), averages):
            np.testing.assert_array_equal(optimizer.get_average(variable).numpy(), average)
            np.testing.assert_array_equal(in_graph.numpy(), average)
        optimizer.swap_weights()
    with pytest.raises(KeyError):
        optimizer.get_average(tf.Variable(1.0))


class TestSwappedWeights:
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
    def test_restores_after_any_exception(self, strategy, error):
        optimizer, variables = trained(strategy)
        before = bits(variables)

        def fail():
            with optimizer.swapped_weights():
                assert bits(variables) != before
                raise error

        with pytest.raises(error):
            fail()
        assert bits(variables) == before
        assert not optimizer.weights_swapped

    def test_restores_after_ctrl_c_in_evaluate(self):
        model = testing_utils.new_model(tfav.SWA(CURRENT.SGD(), 0, 1))
        testing_utils.fit_steps(model, 2)
        before = bits(model.variables)

        class PressCtrlC(KERAS.callbacks.Callback):
            def on_test_batch_end(self, batch, logs=None):
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt), model.optimizer.swapped_weights():
            model.evaluate(testing_utils.X, testing_utils.Y, verbose=0, callbacks=[PressCtrlC()])
        assert bits(model.variables) == before

    def test_nested_blocks_show_the_averages(self):
        optimizer, variables = trained(tf.distribute.get_strategy())
        before = bits(variables)
        shown = bits(slots_of(optimizer, variables))
        with optimizer.swapped_weights():
            with optimizer.swapped_weights():
                assert bits(variables) == shown
            assert bits(variables) == shown
        assert bits(variables) == before

    @pytest.mark.parametrize("thread", [False, True])
    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
    def test_blocks_that_overlap_end_when_the_last_one_does(self, order, thread):
        def call(method, *arguments):
            if thread:
                worker = threading.Thread(target=method, args=arguments)
                worker.start()
                worker.join()
            else:
                method(*arguments)

        optimizer, variables = trained(tf.distribute.get_strategy())
        before = bits(variables)
        shown = bits(slots_of(optimizer, variables))
        blocks = [optimizer.swapped_weights() for _ in order]
        for block in blocks:
            call(block.__enter__)
        for index in order:
            assert bits(variables) == shown
            call(blocks[index].__exit__, None, None, None)
        assert bits(variables) == before
        assert not optimizer.weights_swapped

    def test_one_block_is_entered_once(self):
        optimizer, variables = trained(tf.distribute.get_strategy())
        before = bits(variables)
        block = optimizer.swapped_weights()
        with block, pytest.raises(RuntimeError, match="open already"), block:
            pass
        assert bits(variables) == before
        with block:
            assert bits(variables) != before
        assert bits(variables) == before

    def test_reset_is_refused_in_a_block(self):
        optimizer, _ = trained(tf.distribute.get_strategy())
        with optimizer.swapped_weights():
            optimizer.swap_weights()
            with pytest.raises(RuntimeError, match="context"):
                optimizer.reset_averages()
            optimizer.swap_weights()

    def test_a_restore_in_a_block_says_what_comes_after_it(self, tmp_path):
        optimizer, variables = trained(tf.distribute.get_strategy())
        checkpoint = tf.train.Checkpoint(optimizer=optimizer, variables=variables)
        before, shown = bits(variables), bits(slots_of(optimizer, variables))
        optimizer.swap_weights()
        path = checkpoint.save(str(tmp_path / "swapped"))
        optimizer.swap_weights()
        with optimizer.swapped_weights():
            checkpoint.restore(path)
        assert optimizer.weights_swapped
        assert bits(variables) == shown
        optimizer.swap_weights()
        assert bits(variables) == before

    def test_block_that_swaps_back_itself_ends_unswapped(self):
        optimizer, variables = trained(tf.distribute.get_strategy())
        before = bits(variables)
        with optimizer.swapped_weights():
            optimizer.swap_weights()
        assert bits(variables) == before
        assert not optimizer.weights_swapped

    def test_block_inside_a_swap_leaves_the_swap(self):
        optimizer, _ = trained(tf.distribute.get_strategy())
        optimizer.swap_weights()
        with optimizer.swapped_weights():
            assert optimizer.weights_swapped
        assert optimizer.weights_swapped


class TestTwoOptimizersOverOneVariable:
    @pytest.fixture
    def two(self, strategy):
        """Two optimizers whose averages of one variable differ from it and from each other."""
        optimizer, variables = trained(strategy)
        with strategy.scope():
            other = tfav.ExponentialMovingAverage(CURRENT.SGD(1.0))
        other.shadow_copy(variables)
        other.update_average()
        for variable in variables:
            variable.assign(variable * 2)
        return optimizer, other, variables

    @pytest.mark.parametrize("as_function", [False, True])
    def test_one_swap_at_a_time(self, two, as_function):
        optimizer, other, variables = two
        before = bits(variables)
        swap = tf.function(other.swap_weights) if as_function else other.swap_weights
        optimizer.swap_weights()
        shown = bits(variables)
        with pytest.raises(tf.errors.InvalidArgumentError, match="another averaging optimizer"):
            swap()
        assert bits(variables) == shown
        assert not other.weights_swapped
        optimizer.swap_weights()
        swap()
        swap()
        assert bits(variables) == before

    @pytest.mark.parametrize("as_function", [False, True])
    def test_no_step_takes_averages_for_weights(self, keras, as_function):
        variable = tf.Variable([1.0, 2.0])
        first, second = (tfav.SWA(keras.optimizers.SGD(0.5), 0, 1) for _ in range(2))
        descend(first, [variable], steps=2)
        first.swap_weights()
        before = bits([variable])

        def step():
            second.apply_gradients([(tf.ones([2]), variable)])

        step = tf.function(step) if as_function else step
        with pytest.raises(tf.errors.InvalidArgumentError, match="assign_average_vars"):
            step()
        assert bits([variable]) == before
        first.swap_weights()
        first.assign_average_vars([variable])
        assert bits([variable]) == before
        step()

    def test_one_that_is_gone_hinders_nobody(self):
        variables = [tf.Variable([1.0, 2.0])]
        optimizer, other = tfav.SWA(CURRENT.SGD(0.5), 0, 1), tfav.SWA(CURRENT.SGD(0.5), 0, 1)
        descend(optimizer, variables)
        other.shadow_copy(variables)
        other.update_average()
        descend(optimizer, variables)
        optimizer.swap_weights()
        before = bits(variables)
        del optimizer
        with other.swapped_weights():
            assert bits(variables) != before
        assert bits(variables) == before

    def test_nested(self, keras):
        inner = tfav.ExponentialMovingAverage(keras.optimizers.SGD(1.0))
        outer = tfav.SWA(inner, 0, 1)
        variable = tf.Variable(3.0)
        testing_utils.descend(outer, [variable])
        for first, second in [(inner, outer), (outer, inner)]:
            error = pytest.raises(tf.errors.InvalidArgumentError, match="another")
            with first.swapped_weights(), error:
                second.swap_weights()
        assert variable.numpy() == 2.0


def test_before_the_first_update_the_averages_are_the_weights(strategy):
    with strategy.scope():
        variable = tf.Variable([1.0, 2.0])
        optimizer = tfav.SWA(CURRENT.SGD(1.0), start_averaging=100)
    optimizer.shadow_copy([variable])
    set_bits(variable, [7.0, 8.0])
    with optimizer.swapped_weights():
        np.testing.assert_array_equal(variable.numpy(), [7.0, 8.0])
    optimizer.assign_average_vars([variable])
    np.testing.assert_array_equal(variable.numpy(), [7.0, 8.0])
    np.testing.assert_array_equal(averages_of(optimizer, [variable]), [[7.0, 8.0]])


def test_weights_loaded_while_swapped_before_the_first_update_do_not_reach_the_weights():
    """With nothing folded in, what is put into the model while swapped is an average, not a weight."""
    variable = tf.Variable([1.0])
    optimizer = tfav.SWA(CURRENT.SGD(1.0), start_averaging=100)
    optimizer.shadow_copy([variable])
    optimizer.swap_weights()
    variable.assign([9.0])
    optimizer.swap_weights()
    np.testing.assert_array_equal(variable.numpy(), [1.0])


def test_on_read_variables_keep_each_replicas_own_value(mirrored_strategy):
    with mirrored_strategy.scope():
        variable = tf.Variable(
            0.0,
            trainable=False,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.MEAN,
        )
        optimizer = tfav.ExponentialMovingAverage(CURRENT.SGD())
    set_bits(variable, [1.0, 5.0], each=True)
    optimizer.shadow_copy([variable])
    average = optimizer.get_slot(variable, "average")
    assert testing_utils.read(average).tolist() == [1.0, 5.0]
    testing_utils.count_as(optimizer, 1)
    set_bits(variable, [2.0, 7.0], each=True)
    optimizer.swap_weights()
    assert testing_utils.read(variable).tolist() == [3.0, 3.0]
    set_bits(variable, [10.0, 20.0], each=True)  # The averages, changed by hand.
    optimizer.swap_weights()
    assert testing_utils.read(variable).tolist() == [2.0, 7.0]
    assert testing_utils.read(average).tolist() == [10.0, 20.0]


def test_swap_takes_many_dtypes_at_once():
    variables = [tf.Variable(special_values(dtype, 3)) for dtype in DTYPES]
    optimizer = averaging_optimizer()
    optimizer.shadow_copy(variables)
    before = bits(variables)
    for _ in itertools.repeat(None, 4):
        optimizer.swap_weights()
    assert bits(variables) == before


def test_many_optimizers_bring_no_warning(caplog):
    """TensorFlow warns where one function is traced again and again; each of these is traced once."""
    for _ in range(10):
        optimizer = averaging_optimizer()
        optimizer.shadow_copy([tf.Variable(1.0)])
        optimizer.swap_weights()
    assert "retracing" not in caplog.text


def weight_with_average(strategy):
    """A weight of 4 that each step makes smaller by 1, and an average that goes half of the way to it."""
    with strategy.scope():
        weight = tf.Variable(4.0)
        optimizer = numpy_averages.ema(0.5, dynamic=False).wrap(CURRENT.SGD(1.0))
        optimizer.shadow_copy([weight])
    gradient = 1.0 / strategy.num_replicas_in_sync  # It is summed over the replicas.
    return weight, optimizer, lambda: strategy.run(lambda: descend(optimizer, [weight], gradient))


@pytest.mark.parametrize("how", ["in one go", "in a loop"])
def test_steps_and_swaps_in_one_function(strategy, how):
    """TensorFlow sees the whole graph, and must not conclude from a step that no swap can follow."""
    weight, optimizer, step = weight_with_average(strategy)

    @tf.function
    def train_and_evaluate():
        seen = tf.TensorArray(tf.float32, 3)
        for i in tf.range(3) if how == "in a loop" else range(3):
            step()
            optimizer.swap_weights()
            seen = seen.write(i, weight)
            optimizer.swap_weights()
        return seen.stack()

    np.testing.assert_array_equal(train_and_evaluate().numpy(), [3.5, 2.75, 1.875])
    assert not optimizer.weights_swapped
    assert weight.numpy() == 1.0


def test_step_between_swaps_in_one_function_is_an_error(strategy):
    weight, optimizer, step = weight_with_average(strategy)

    @tf.function
    def step_while_swapped():
        step()
        optimizer.swap_weights()
        step()
        optimizer.swap_weights()

    with pytest.raises(tf.errors.InvalidArgumentError, match=r"Call `swap_weights\(\)` first"):
        step_while_swapped()
    assert optimizer.weights_swapped
    assert (weight.numpy(), optimizer.get_average(weight).numpy()) == (3.5, 3.5)
    optimizer.swap_weights()
    assert weight.numpy() == 3.0


AUTOCLUSTERED = """
import tensorflow as tf
import tf_keras
import tf_averaging as tfav

for dtype in ("float32", "float16"):
    weight = tf.Variable(tf.cast(4.0, dtype))
    optimizer = tfav.SWA(tf_keras.optimizers.SGD(1.0), 0, 1)

    @tf.function
    def train_and_evaluate():
        optimizer.apply_gradients([(tf.ones_like(weight), weight)])
        optimizer.swap_weights()
        seen = tf.identity(weight)
        optimizer.swap_weights()
        return seen

    seen = [float(train_and_evaluate()) for _ in range(2)]
    with optimizer.swapped_weights():
        seen.append(float(weight))
        try:
            train_and_evaluate()
        except tf.errors.InvalidArgumentError as error:
            seen.append("Call `swap_weights()` first" in str(error))
    print(*seen, float(weight))
"""


def test_where_tensorflow_compiles_parts_of_graphs_by_itself():
    """What XLA compiles cannot change the length of the flag. The setting is for a whole process."""
    done = subprocess.run(
        [sys.executable, "-c", AUTOCLUSTERED],
        env={**os.environ, "TF_XLA_FLAGS": "--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit"},
        cwd=pathlib.Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stdout.splitlines() == ["3.0 2.5 2.5 True 2.0"] * 2


def test_swap_is_refused_where_xla_compiles():
    optimizer, variables = trained(tf.distribute.get_strategy())
    before = bits(variables)
    with pytest.raises(RuntimeError, match="XLA cannot compile `swap_weights`"):
        tf.function(optimizer.swap_weights, jit_compile=True)()
    assert bits(variables) == before
