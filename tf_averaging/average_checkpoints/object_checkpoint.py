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
"""Checkpoints of `tf.train.Checkpoint`: several files that share a prefix.

The index says where in the data files each tensor is. Beside the tensors, which have keys, there is a
graph: the objects that were saved, their children by name, and the keys of what they hold. In Keras 3
the key of a weight depends on whether the optimizer had state by then, so weights are known here by their
path in the graph: `model/layer-0/kernel`.
"""

from __future__ import annotations

import collections
import os
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import trackable_object_graph_pb2

from tf_averaging.average_checkpoints.variables import Variable

GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
VALUE = "VARIABLE_VALUE"
SHARD_BYTES = 2**25

# What optimizers have as children, and nothing else: those of the Kerases, averaging ones, legacy ones.
OPTIMIZER_CHILDREN = (
    {"_iterations", "_variables"},
    {"inner_optimizer", "averages"},
    {"iter", "learning_rate"},
    {"iter", "decay"},
)

# The metrics of the Kerases have variables of these names, and no others.
METRIC_VARIABLES = {
    "count",
    "false_negatives",
    "false_positives",
    "intermediate_weights",
    "num_samples",
    "residual",
    "squared_sum",
    "sum",
    "total",
    "total_cm",
    "total_confusion_matrix",
    "total_mse",
    "true_negatives",
    "true_positives",
}


class ObjectCheckpoint:
    """The weights in a checkpoint.

    Args:
      path: the prefix of its files.

    Attributes:
      path: the prefix of its files.
      variables: what the checkpoint says of each variable, but those of optimizers and metrics.
      holds_averages: whether an averaging optimizer had swapped the averages into the model.
    """

    def __init__(self, path: str):
        self.path = path
        # `tf.train.load_checkpoint` would look into a directory of this name.
        self._reader = tf.compat.v1.train.NewCheckpointReader(path)
        self._dtypes: Dict[str, tf.DType] = self._reader.get_variable_to_dtype_map()
        self._shapes: Dict[str, List[int]] = self._reader.get_variable_to_shape_map()
        if GRAPH not in self._dtypes:
            raise ValueError("Expected a checkpoint that `tf.train.Checkpoint` has written.")
        graph = trackable_object_graph_pb2.TrackableObjectGraph.FromString(self._reader.get_tensor(GRAPH))
        self._keys = _keys_of_weights(graph.nodes)
        self.variables = {
            name: Variable(np.dtype(self._dtypes[key].as_numpy_dtype), tuple(self._shapes[key]))
            for name, key in self._keys.items()
        }
        self.holds_averages = any(
            bool(np.any(self._reader.get_tensor(key))) for key in _keys_of_swapped_flags(graph.nodes)
        )

    @staticmethod
    def exists(path: str) -> bool:
        """Whether there is such a checkpoint: without its index it is none."""
        return tf.io.gfile.exists(_index(path))

    def check(self) -> None:
        """Reads what is not averaged, and so compares it with its checksums."""
        for _ in self._others():
            pass

    def read(self, name: str) -> np.ndarray:
        """The value of a variable, all its slices."""
        return np.asarray(self._reader.get_tensor(self._keys[name]))

    def write(self, path: str, values: Iterable[Tuple[str, np.ndarray]]) -> None:
        """Writes a copy of the checkpoint, with other values for some variables."""
        shards = _Shards(path)
        for name, value in values:
            shards.add({self._keys[name]: tf.convert_to_tensor(value)})
            del value  # The next one is computed before this name is free.
        for tensors in self._others():
            shards.add(tensors)
        shards.merge()

    @staticmethod
    def move(source: str, target: str) -> None:
        """Moves a complete checkpoint to where it belongs: the index last, and none meanwhile."""
        if ObjectCheckpoint.exists(target):
            tf.io.gfile.remove(_index(target))
        for file in _data_files(target):
            tf.io.gfile.remove(file)
        for file in _data_files(source):
            tf.io.gfile.rename(file, target + file[len(source) :])
        tf.io.gfile.rename(_index(source), _index(target))

    def close(self) -> None:
        """Nothing: the reader has no method for it."""

    def _others(self) -> Iterator[Dict[str, tf.Tensor]]:
        """All tensors that are not averaged by their keys, some at a time."""
        averaged = {key for name, key in self._keys.items() if self.variables[name].is_averaged}
        keys: List[str] = []
        size = 0
        for key in sorted(self._dtypes.keys() - averaged):
            keys.append(key)
            size += _bytes(self._dtypes[key], self._shapes[key])
            if size >= SHARD_BYTES:
                yield self._tensors(keys)
                keys, size = [], 0
        if keys:
            yield self._tensors(keys)

    def _tensors(self, keys: List[str]) -> Dict[str, tf.Tensor]:
        # Not by the reader, which makes arrays of them: the state of an iterator is none.
        dtypes = [self._dtypes[key] for key in keys]
        with tf.device("CPU:0"):
            tensors = tf.raw_ops.RestoreV2(
                prefix=self.path, tensor_names=keys, shape_and_slices=[""] * len(keys), dtypes=dtypes
            )
        return dict(zip(keys, tensors))


class _Shards:
    """Writes a checkpoint that does not fit into memory: in shards, which are merged in the end.

    Args:
      path: the prefix of its files.
    """

    def __init__(self, path: str):
        self._path = path
        self._prefixes: List[str] = []
        self._waiting: Dict[str, tf.Tensor] = {}
        self._bytes = 0

    def add(self, tensors: Dict[str, tf.Tensor]) -> None:
        """Adds tensors. They are written once there are enough of them."""
        self._waiting.update(tensors)
        self._bytes += sum(_bytes(tensor.dtype, tensor.shape) for tensor in tensors.values())
        if self._bytes >= SHARD_BYTES:
            self._write()

    def merge(self) -> None:
        """Writes what is left, and makes one checkpoint of the shards."""
        self._write()
        with tf.device("CPU:0"):
            tf.raw_ops.MergeV2Checkpoints(
                checkpoint_prefixes=self._prefixes, destination_prefix=self._path, delete_old_dirs=False
            )

    def _write(self) -> None:
        if not self._waiting:
            return
        self._prefixes.append(f"{self._path}_shard{len(self._prefixes)}")
        with tf.device("CPU:0"):
            tf.raw_ops.SaveV2(
                prefix=self._prefixes[-1],
                tensor_names=list(self._waiting),
                shape_and_slices=[""] * len(self._waiting),
                tensors=list(self._waiting.values()),
            )
        self._waiting, self._bytes = {}, 0


def _bytes(dtype: tf.DType, shape: Sequence[int]) -> int:
    return int(np.prod(shape)) * dtype.size


def _index(path: str) -> str:
    return f"{path}.index"


def _data_files(path: str) -> List[str]:
    directory, prefix = os.path.split(path)
    names = tf.io.gfile.listdir(directory or ".")
    return [os.path.join(directory, name) for name in names if name.startswith(f"{prefix}.data-")]


def _keys_of_weights(nodes) -> Dict[str, str]:
    """The keys of variables by their shortest path that leads through no optimizer or metric."""
    paths, keys = {0: ""}, {}
    waiting = collections.deque([0])
    while waiting:
        number = waiting.popleft()
        for child in sorted(nodes[number].children, key=lambda child: child.local_name):
            if child.node_id not in paths and not _is_state(nodes, child.node_id):
                paths[child.node_id] = f"{paths[number]}/{child.local_name}".lstrip("/")
                waiting.append(child.node_id)
        value = _value_key(nodes[number])
        if value is not None:
            keys[paths[number]] = value
    return keys


def _keys_of_swapped_flags(nodes) -> Iterator[str]:
    """The keys of the flags of averaging optimizers."""
    for node in nodes:
        children = {child.local_name: child.node_id for child in node.children}
        if {"swapped", "first_step"} <= children.keys():
            key = _value_key(nodes[children["swapped"]])
            if key is not None:
                yield key


def _is_state(nodes, number: int) -> bool:
    """Whether a node is an optimizer, by what only optimizers have, or a metric, by its variables."""
    node = nodes[number]
    children = {child.local_name for child in node.children}
    variables = {c.local_name for c in node.children if _value_key(nodes[c.node_id]) is not None}
    return (
        bool(node.slot_variables)
        or any(names <= children for names in OPTIMIZER_CHILDREN)
        or (bool(variables) and variables <= METRIC_VARIABLES and not _has_parts(nodes, number))
    )


def _has_parts(nodes, number: int) -> bool:
    """Whether objects below a node have variables of their own."""
    own = {child.node_id for child in nodes[number].children}
    below = (grandchild.node_id for node_id in own for grandchild in nodes[node_id].children)
    return any(_value_key(nodes[node_id]) is not None for node_id in below if node_id not in own)


def _value_key(node) -> Optional[str]:
    """The key of a variable's value; None for what is no variable."""
    keys = [attribute.checkpoint_key for attribute in node.attributes if attribute.name == VALUE]
    return keys[0] if keys else None
