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
"""The arithmetic on components: compiled and plain alike, and what memory they take."""

import numpy as np
import pytest
import tensorflow as tf

import tf_averaging as tfav
from tf_averaging import average_ops
from tf_averaging import average_variables
from tf_averaging import device_functions
from tf_averaging import slot_creation
from tf_averaging import swapped_flag

SHAPES = [(), (0,), (1,), (3, 5), (200, 150)]


def pairs_of(dtype, average_dtype, seed=0):
    random = np.random.default_rng(seed)
    averages = [tf.Variable(tf.cast(random.normal(size=s), average_dtype)) for s in SHAPES]
    variables = [tf.Variable(tf.cast(random.normal(size=s), dtype)) for s in SHAPES]
    components = [average_ops.components(v)[0] for v in averages + variables]
    return averages, variables, list(zip(components[: len(SHAPES)], components[len(SHAPES) :]))


@pytest.mark.parametrize("in_function", [False, True])
@pytest.mark.parametrize("jit_compile", [True, False, "auto"])
@pytest.mark.parametrize(
    ("dtype", "average_dtype"),
    [
        ("float32", "float32"),
        ("float64", "float64"),
        ("float16", "float32"),
        ("bfloat16", "float32"),
        ("float32", "float64"),
        ("complex64", "complex64"),
    ],
)
def test_fold_is_the_interpolation(dtype, average_dtype, jit_compile, in_function):
    averages, variables, pairs = pairs_of(dtype, average_dtype)
    before = [(a.numpy(), v.numpy().astype(a.dtype.as_numpy_dtype)) for a, v in zip(averages, variables)]
    on_devices = device_functions.DeviceFunctions()

    def run():
        on_devices(pairs, [device_functions.fold(jit_compile)], weight=tf.constant(0.3, tf.float64))

    (tf.function(run) if in_function else run)()
    for average, variable, (a, w) in zip(averages, variables, before):
        exact = np.complex128 if average.dtype.is_complex else np.float64
        expected = a.astype(exact) + 0.3 * (w.astype(exact) - a.astype(exact))
        tolerance = 4 * np.finfo(average.dtype.real_dtype.as_numpy_dtype).eps
        np.testing.assert_allclose(average.numpy(), expected, rtol=0, atol=5 * tolerance)
        np.testing.assert_array_equal(variable.numpy().astype(w.dtype), w)


LOCAL, SERVER, TPU = (
    f"/job:{job}/replica:0/task:0/device:{device}:0"
    for job, device in (("localhost", "CPU"), ("ps", "CPU"), ("worker", "TPU"))
)


def test_auto_compiles_large_local_variables_only():
    def component(elements, device):
        return average_ops.Component(None, tf.float32, tf.TensorShape([elements]), device)

    here = LOCAL
    large = average_ops.MIN_BYTES_TO_COMPILE // 4
    assert average_ops.pays_to_compile(component(large, here), "auto")
    assert not average_ops.pays_to_compile(component(large - 1, here), "auto")
    assert not average_ops.pays_to_compile(component(None, here), "auto")
    assert average_ops.pays_to_compile(component(1, here), True)
    assert not average_ops.pays_to_compile(component(large, here), False)


@pytest.mark.parametrize(
    ("device", "is_on_server"), [(LOCAL, False), ("", False), (SERVER, True), (TPU, False)]
)
def test_tpus_of_a_cluster_are_no_parameter_servers(device, is_on_server):
    component = average_ops.Component(None, tf.float32, tf.TensorShape([]), device)
    assert average_ops.is_remote(component) == (device in (SERVER, TPU))
    assert average_ops.is_on_parameter_server(component) == is_on_server
    assert average_ops.pays_to_compile(component, True) == (device in (LOCAL, ""))


@pytest.mark.parametrize(("device", "rank"), [(LOCAL, 1), (TPU, 1), (SERVER, 0)])
def test_guard_is_one_that_compiled_code_keeps_but_on_parameter_servers(monkeypatch, device, rank):
    """A flag with a length is checked in compiled code, a scalar by an assertion, which that drops."""
    component = average_ops.Component(None, tf.float32, tf.TensorShape([]), device)
    monkeypatch.setattr(average_ops, "components", lambda variable: [component])
    monkeypatch.setattr(
        slot_creation,
        "create_like",
        lambda like, value, name, shape=None: tf.Variable(value, shape=shape, name=name),
    )
    assert swapped_flag.create(like=None).shape.rank == rank


def test_components_are_all_outside_and_the_own_one_on_a_replica(mirrored_strategy):
    with mirrored_strategy.scope():
        variable = tf.Variable(1.0)
    outside = [c.device for c in average_ops.components(variable)]
    assert [d[-5:] for d in outside] == ["CPU:0", "CPU:1"]
    with mirrored_strategy.scope():
        assert [c.device for c in average_ops.components(variable)] == outside
    on_replicas = []
    mirrored_strategy.run(
        lambda: on_replicas.append([c.device for c in average_ops.components(variable)])
    )
    assert sorted(on_replicas) == [[outside[0]], [outside[1]]]


def test_variables_are_folded_on_their_own_devices():
    """A model split over devices: one fused update for each."""
    variables = []
    for device in ("CPU:0", "CPU:1", "CPU:0"):
        with tf.device(device):
            variables.append(tf.Variable(tf.ones([40, 1000])))
    averages = average_variables.AverageVariables()
    averages.add(variables)
    for variable, slots in zip(variables, averages):
        assert slots.average.device == variable.device
        variable.assign(3.0 * tf.ones([40, 1000]))
    pairs = [
        (average_ops.components(s.average)[0], average_ops.components(s.variable)[0]) for s in averages
    ]
    groups = []
    device_functions.DeviceFunctions()(pairs, [lambda group, weight: groups.append(len(group)) or []])
    assert groups == [2, 1]
    averages.fold(True, lambda: tf.constant(0.5, tf.float64), jit_compile=True)
    for slots in averages:
        np.testing.assert_array_equal(slots.average.numpy(), np.full([40, 1000], 2.0))


def extra_memory(call):
    """Bytes that the call needs at its peak beside what is there before it."""
    before = tf.config.experimental.get_memory_info("CPU:0")["current"]
    tf.config.experimental.reset_memory_stats("CPU:0")
    call()
    return tf.config.experimental.get_memory_info("CPU:0")["peak"] - before


@pytest.mark.parametrize(
    ("method", "jit_compile", "variables"),
    [
        ("update_average", True, 0),  # The compiled fold needs no second copy of anything,
        ("update_average", False, 1),  # the plain one a copy of one variable at most,
        ("swap_weights", False, 0),  # and the swap none.
    ],
)
def test_peak_memory(method, jit_compile, variables):
    model = [tf.Variable(tf.ones([1024, 1024])) for _ in range(8)]
    optimizer = tfav.ExponentialMovingAverage("sgd", jit_compile=jit_compile)
    optimizer.shadow_copy(model)
    for variable in model:  # Until it is written to, a variable shares its average's buffer.
        variable.assign_add(tf.ones([1024, 1024]))
    call = tf.function(getattr(optimizer, method), autograph=False)
    for _ in range(2):
        call()
    one = 1024 * 1024 * 4
    assert max(extra_memory(call) for _ in range(5)) <= variables * one + 0.05 * 8 * one


def test_averages_take_no_memory_until_training_moves_the_weights():
    """Nothing is spent before: buffers are shared with the weights."""
    model = [tf.Variable(tf.ones([1024, 1024])) for _ in range(8)]
    optimizer = tfav.ExponentialMovingAverage("sgd")
    assert extra_memory(lambda: optimizer.shadow_copy(model)) < 1024 * 1024
