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
"""The handles of many variables as one tensor.

Each variable that a function uses is an input of it, and each input costs about a microsecond on every
call, in a branch that is not taken too. The averages of a thousand variables are a millisecond: as much
as a third of what it takes to update them. Packed, they are one input.

Two things are lost with the single inputs. TensorFlow keeps what is done with a variable in program order
by looking at the inputs of operations; here it is told which variables a packed input stands for. And XLA
compiles no code that gets its variables in this way.
"""

from __future__ import annotations

from typing import List, Sequence

import tensorflow as tf

# Private names: nothing public tells TensorFlow what an operation touches, or says that a graph is going
# to be compiled. `tests/packed_handles_test.py` fails if one of them goes away.
from tensorflow.python.framework import auto_control_deps
from tensorflow.python.ops import control_flow_util

_EagerTensor = tf.__internal__.EagerTensor

# The attribute of a packed tensor that keeps the handles in it, so that no others get their ids.
_HANDLES = "_tf_averaging_handles"

# The attribute of a graph that says what stands for the handles in each tensor that was packed there.
_STAND_INS = "_tf_averaging_stand_ins"


def pack(handles: Sequence[tf.Tensor]) -> List[tf.Tensor]:
    """Packs the handles of variables of one device, where that can be done.

    Args:
      handles: scalar `tf.resource` tensors.

    Returns:
      One `tf.resource` vector, or the handles.
    """
    graph = tf.compat.v1.get_default_graph()
    is_compiled = control_flow_util.GraphOrParentsInXlaContext(graph)
    if is_compiled or not all(isinstance(handle, _EagerTensor) for handle in handles):
        return list(handles)
    with tf.init_scope():
        packed = tf.stack(handles)
    setattr(packed, _HANDLES, tuple(handles))
    _note_stand_ins(packed, graph)
    return [packed]


def unpack(inputs: Sequence[tf.Tensor]) -> List[tf.Tensor]:
    """The handles, in the function that gets what `pack` returned."""
    return [handle for value in inputs for handle in (tf.unstack(value) if value.shape.rank else [value])]


@auto_control_deps.register_acd_resource_resolver
def _add_packed_variables(op: tf.Operation, reads: set, writes: set) -> bool:
    """Adds what stands for the variables that an operation gets packed to what it is known to write.

    Args:
      op: an operation of a function's graph.
      reads: `tf.resource` tensors of the graph that the operation reads from.
      writes: those that it may write to; changed in place.

    Returns:
      Whether there were any to add.
    """
    del reads
    if not any(tensor.shape.rank == 1 for tensor in writes):
        return False
    # Also asked about graphs that are no functions, where somebody else orders operations in this way.
    captures = getattr(op.graph, "captures", ())
    captured = {id(internal): external for external, internal in captures}
    origins = [captured.get(id(tensor)) for tensor in writes]
    before = len(writes)
    for packed in origins:
        if hasattr(packed, _HANDLES):
            writes.update(_stand_ins(packed, op.graph))
    return len(writes) > before


def _note_stand_ins(packed: tf.Tensor, graph: tf.Graph) -> None:
    """Notes what stands for the handles in a graph and those around it.

    TensorFlow forgets which variable an argument of a function was before it asks what operations touch.
    """
    ids = set(map(id, getattr(packed, _HANDLES)))
    while hasattr(graph, "captures"):
        noted = [internal for external, internal in graph.captures if id(external) in ids]
        setattr(graph, _STAND_INS, {**getattr(graph, _STAND_INS, {}), id(packed): noted})
        graph = graph.outer_graph


def _stand_ins(packed: tf.Tensor, graph: tf.Graph) -> List[tf.Tensor]:
    """What stands, or may stand, for the handles in a packed tensor that a graph has captured."""
    ids = set(map(id, getattr(packed, _HANDLES)))
    captured = [(origin, tensor) for origin, tensor in graph.captures if isinstance(origin, _EagerTensor)]
    same = [
        tensor
        for origin, tensor in captured
        if not ids.isdisjoint(map(id, getattr(origin, _HANDLES, (origin,))))
    ]
    noted = getattr(graph, _STAND_INS, {}).get(id(packed))
    if noted is not None:
        return same + noted
    # It was packed in a function that this one calls: each argument may be one of its variables.
    known = {id(tensor) for _, tensor in captured}
    return same + [t for t in graph.inputs if t.dtype == tf.resource and id(t) not in known]
