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
"""Averaging costs each replica one pass over its own values: nothing crosses from one to another."""

import collections

import pytest
import tensorflow as tf
import tf_keras

import tf_averaging as tfav

METHODS = ["update_average", "swap_weights", "assign", "step"]
COMMUNICATION = ("Collective", "Nccl", "Send", "Recv", "_Send", "_Recv")


SCHEMES = {
    "first update copies": lambda: tfav.SWA(Still(), 1, 2),
    "first step copies": lambda: tfav.ExponentialMovingAverage(Still(), start_step=1, average_period=2),
}


@pytest.fixture
def no_merge_call(monkeypatch):
    def merge_call(self, *args, **kwargs):
        raise AssertionError("a merge call, where the replicas wait for each other")

    monkeypatch.setattr(tf.distribute.ReplicaContext, "merge_call", merge_call)


class Still(tf_keras.optimizers.Optimizer):
    """An optimizer that counts its steps and leaves the variables alone, so that it sends nothing."""

    def __init__(self):
        super().__init__("Still", jit_compile=False)

    def apply_gradients(self, grads_and_vars, name=None, skip_gradients_aggregation=False):
        self.iterations.assign_add(1)

    def get_config(self):
        return {}


def traced(strategy, scheme, method):
    """The operations of one call on all replicas, those of conditionals and called functions included."""
    with strategy.scope():
        variables = [tf.Variable(tf.ones([40, 1000])), tf.Variable(tf.ones([3]))]
        variables.append(tf.Variable(tf.ones([5], tf.float16)))
        optimizer = SCHEMES[scheme]()
    optimizer.shadow_copy(variables)
    calls = {
        "update_average": optimizer.update_average,
        "swap_weights": optimizer.swap_weights,
        "assign": lambda: optimizer.assign_average_vars(variables),
        "step": lambda: optimizer.apply_gradients([(tf.ones([3]), variables[1])]),
    }
    function = tf.function(lambda: strategy.run(calls[method]), autograph=False)
    return function.get_concrete_function().graph


def device_of(operation):
    return tf.DeviceSpec.from_string(operation.device or "/device:CPU:0").device_index or 0


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("method", METHODS)
def test_no_value_crosses_between_replicas(mirrored_strategy, no_merge_call, scheme, method):
    graph = traced(mirrored_strategy, scheme, method)
    work = collections.Counter()
    for operation in graph.get_operations():
        assert not operation.type.startswith(COMMUNICATION), operation
        if operation.type in ("Placeholder", "Const", "NoOp", "Identity"):
            continue
        work[device_of(operation)] += 1
        for tensor in operation.inputs:
            if tensor.op.type not in ("Placeholder", "Const"):
                assert device_of(tensor.op) == device_of(operation), operation
    assert work[0] == work[1] > 0
    for definition in graph.as_graph_def().library.function:
        devices = {node.device for node in definition.node_def if node.device}
        assert len(devices) <= 1, devices  # A conditional, or a compiled function, of one replica.
        assert not any(node.op.startswith(COMMUNICATION) for node in definition.node_def)


def inner_nodes(graph):
    """The operations in the functions that a graph calls."""
    return [node for f in graph.as_graph_def().library.function for node in f.node_def]


def count(graph):
    """How often each kind of operation occurs."""
    return collections.Counter([n.op for n in [*graph.as_graph_def().node, *inner_nodes(graph)]])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("method", METHODS)
def test_work_is_that_of_one_device_on_each_replica(mirrored_strategy, scheme, method):
    alone = count(traced(tf.distribute.get_strategy(), scheme, method))
    together = count(traced(mirrored_strategy, scheme, method))
    kinds = ("ReadVariableOp", "AssignVariableOp", "AssignAddVariableOp", "Cast", "Sub", "Mul", "AddV2")
    for kind in (*kinds, "If", "StatelessIf", "Case", "PartitionedCall", "StatefulPartitionedCall"):
        assert together[kind] == 2 * alone[kind], kind


def test_weights_and_averages_are_exchanged_without_arithmetic(mirrored_strategy):
    """Adding and subtracting would be inexact, and cost memory and time."""
    graph = traced(mirrored_strategy, "first step copies", "swap_weights")
    assert count(graph)["AssignVariableOp"] > 0
    arithmetic = ("Add", "Sub", "Mul", "AssignAdd", "AssignSub")
    nodes = [*graph.as_graph_def().node, *inner_nodes(graph)]
    for node in nodes:
        if node.op.startswith(arithmetic):
            assert tf.as_dtype(node.attr["T"].type).is_integer, node  # An index.
