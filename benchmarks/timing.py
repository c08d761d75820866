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
"""How things are measured: in turns, so that anything that slows the machine slows all of them alike.

Each round has a new order, so that a call does not always find the caches as the same other call left
them.
"""

import concurrent.futures
import os
import time
from typing import Callable, Dict

import numpy as np
import tensorflow as tf


def in_turns(
    calls: Dict[str, Callable[[], object]], seconds: float, least: int, most: int
) -> Dict[str, np.ndarray]:
    """Times the calls one after the other, over and over, in a new order each time.

    Args:
      calls: what to time, by name.
      seconds: how long to go on in total.
      least: the minimum number of rounds, however long they take.
      most: the maximum number of rounds, however short they are.

    Returns:
      For each name, the seconds that its call took, in the order of the rounds.
    """
    for call in calls.values():
        call()
    times = {name: [] for name in calls}
    order = np.random.default_rng(0)
    begin = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - begin > seconds:
            break
        for name in order.permutation(list(calls)):
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return {name: np.asarray(values) for name, values in times.items()}


def spread(seconds: np.ndarray) -> Dict[str, float]:
    """Median and quartiles, in milliseconds."""
    low, middle, high = np.percentile(1e3 * np.asarray(seconds), [25, 50, 75])
    return {"median_ms": middle, "low_ms": low, "high_ms": high, "samples": np.size(seconds)}


class MemoryLimit:
    """The fastest way for this machine to read two arrays and write one back, on all its cores.

    Args:
      megabytes: size of each of the two arrays; larger than the caches.
    """

    def __init__(self, megabytes: int):
        elements = megabytes * 2**20 // 4
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self._pool = concurrent.futures.ThreadPoolExecutor(cores)
        self._average = np.array_split(np.zeros(elements, np.float32), cores)
        self._weights = np.array_split(np.ones(elements, np.float32), cores)
        self.bytes_moved = 3 * 4 * elements

    def __call__(self) -> None:
        # NumPy lets go of the interpreter while it adds, so the threads do run side by side.
        list(self._pool.map(lambda a, w: np.add(a, w, out=a), self._average, self._weights))


def extra_memory(call: Callable[[], object], repeats: int = 3) -> int:
    """The bytes that a call takes from TensorFlow's allocator at its peak, beyond those in use before."""
    call()
    peaks = []
    for _ in range(repeats):
        before = tf.config.experimental.get_memory_info("CPU:0")["current"]
        tf.config.experimental.reset_memory_stats("CPU:0")
        call()
        peaks.append(tf.config.experimental.get_memory_info("CPU:0")["peak"] - before)
    return min(peaks)
