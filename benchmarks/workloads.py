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
"""The variables and gradients of the models that are measured."""

import dataclasses
from typing import Dict, List, Tuple

import numpy as np
import tensorflow as tf

from benchmarks import names

Shape = Tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is trained.

    Attributes:
      shapes: shapes of the variables.
      dtype: their dtype.
      sparse_rows: the number of rows of a variable that a gradient reaches; 0 for all.
      replicas: the number of devices of a MirroredStrategy.
      jit_compile: whether XLA compiles the whole step.
      peers: the contenders to compare with; all of them together must fit into memory.
    """

    shapes: List[Shape]
    dtype: str = "float32"
    sparse_rows: int = 0
    replicas: int = 1
    jit_compile: bool = False
    peers: Tuple[str, ...] = names.PEERS

    @property
    def elements(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.shapes)

    @property
    def averaged_bytes(self) -> int:
        """The size of the averages, which are always float32."""
        return 4 * self.elements * self.replicas

    @property
    def moved_bytes(self) -> int:
        """What one update must move at least: each weight in, each average in and out."""
        return (tf.as_dtype(self.dtype).size + 2 * 4) * self.elements * self.replicas

    def variables(self) -> List[tf.Variable]:
        random = np.random.default_rng(0)
        return [
            tf.Variable(tf.cast(random.standard_normal(shape, np.float32), self.dtype))
            for shape in self.shapes
        ]

    def gradients(self) -> list:
        return [self._gradient(shape) for shape in self.shapes]

    def _gradient(self, shape: Shape):
        if not self.sparse_rows:
            return tf.fill(shape, tf.cast(1e-3, self.dtype))
        rows = np.random.default_rng(1).choice(shape[0], self.sparse_rows, replace=False)
        values = tf.fill((self.sparse_rows, *shape[1:]), tf.cast(1e-3, self.dtype))
        return tf.IndexedSlices(values, tf.constant(rows), tf.constant(shape))


def resnet_50() -> List[Shape]:
    """The 161 trainable variables of ResNet-50: kernels, scales and offsets, and a classifier."""
    shapes = [(7, 7, 3, 64), (64,), (64,)]
    channels = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            kernels = [(1, 1, channels, width), (3, 3, width, width), (1, 1, width, 4 * width)]
            if block == 0:
                kernels.append((1, 1, channels, 4 * width))
            for kernel in kernels:
                shapes += [kernel, kernel[-1:], kernel[-1:]]
            channels = 4 * width
    return [*shapes, (2048, 1000), (1000,)]


def transformer(layers: int, width: int, vocabulary: int) -> List[Shape]:
    """An embedding, and blocks of attention and a feed-forward layer of four times the width."""
    block = [(width,), (width,)]
    block += [(width, 3 * width), (3 * width,), (width, width), (width,), (width,), (width,)]
    block += [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(vocabulary, width), (512, width), *(layers * block), (width,), (width,)]


COMPILED = {"jit_compile": True, "peers": (names.USE_EMA, names.KERAS_3)}

WORKLOADS: Dict[str, Workload] = {
    "resnet50": Workload(resnet_50()),
    "matrices": Workload(3 * [(4096, 4096)]),
    "small": Workload(500 * [(64, 64), (64,)]),
    "small300": Workload(150 * [(64, 64), (64,)]),
    "xla_resnet50": Workload(resnet_50(), **COMPILED),
    "xla_matrices": Workload(3 * [(2048, 2048)], **COMPILED),
    "xla_small300": Workload(150 * [(64, 64), (64,)], **COMPILED),
    "transformer": Workload(transformer(12, 768, 32_000)),
    "embedding": Workload([(2**18, 1024)], sparse_rows=4096, peers=(names.USE_EMA, names.ADDONS)),
    "bfloat16": Workload(3 * [(4096, 4096)], dtype="bfloat16"),
    "mirrored": Workload(resnet_50(), replicas=2),
}

# The same, small enough to see in a minute that everything runs.
QUICK: Dict[str, Workload] = {
    "resnet50": Workload(resnet_50()[:12]),
    "matrices": Workload(3 * [(256, 256)]),
    "small": Workload(10 * [(64, 64), (64,)]),
    "small300": Workload(5 * [(64, 64), (64,)]),
    "xla_resnet50": Workload(resnet_50()[:12], **COMPILED),
    "xla_matrices": Workload(3 * [(256, 256)], **COMPILED),
    "xla_small300": Workload(5 * [(64, 64), (64,)], **COMPILED),
    "transformer": Workload(transformer(1, 64, 1000)),
    "embedding": Workload([(2**10, 64)], sparse_rows=16, peers=(names.USE_EMA, names.ADDONS)),
    "bfloat16": Workload(3 * [(256, 256)], dtype="bfloat16"),
    "mirrored": Workload(resnet_50()[:12], replicas=2),
}
