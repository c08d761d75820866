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
"""Measures one workload in a process of its own: `python -m benchmarks.measure resnet50`, JSON out."""

import gc
import json
import sys
import time
from typing import Callable, Dict

import numpy as np
import tensorflow as tf
from absl import app
from absl import flags

from benchmarks import contenders
from benchmarks import embedding
from benchmarks import fit_step
from benchmarks import long_run
from benchmarks import names
from benchmarks import scaling
from benchmarks import timing
from benchmarks import workloads

FLAGS = flags.FLAGS
flags.DEFINE_bool("quick", False, "Whether to use small variables and few rounds.")
flags.DEFINE_float("seconds", 40.0, "How long to time the steps of a workload.")

# How many of SWA and of the bare optimizer beside it are compared.
INSTANCES = 4


def measure_workload(name: str) -> Dict[str, object]:
    """All figures of one workload."""
    workload = (workloads.QUICK if FLAGS.quick else workloads.WORKLOADS)[name]
    strategy, variables, gradients = None, None, workload.gradients()
    if workload.replicas > 1:
        strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(workload.replicas)])
        with strategy.scope():
            variables = workload.variables()
    else:
        variables = workload.variables()
    makers = contenders.makers(variables, gradients, workload.peers, strategy, workload.jit_compile)
    made = {contender: make() for contender, make in makers.items()}
    limit = timing.MemoryLimit(8 if FLAGS.quick else 256)
    steps = {contender: one.step for contender, one in made.items()}
    least = 12 if FLAGS.quick else 30
    times = timing.in_turns({**steps, "limit": limit}, FLAGS.seconds, least, most=400)
    limit_ms = timing.spread(times.pop("limit") * workload.moved_bytes / limit.bytes_moved)
    added = steps_and_added(times, contenders.bare_of)
    added[names.SWA] = swa_beside_bare(makers, least)
    gc.collect()  # The instances that were compared refer to themselves.
    return {
        "elements": workload.elements,
        "variables": len(workload.shapes),
        "averaged_bytes": workload.averaged_bytes,
        "limit": limit_ms,
        "steps": added,
        "swap": exchanges(made),
        "assign": assignments(made),
        "extra_memory": memory(made),
        **first_calls(makers),
    }


def swa_beside_bare(makers: Dict[str, Callable], least: int) -> Dict[str, object]:
    """What SWA adds to the bare optimizer.

    Between snapshots that is less than the difference between two equal optimizers. So several of both
    are compared, in many rounds without the others, and in no fewer than `least`.
    """
    both = (names.BARE, names.SWA)
    made = [{name: makers[name]() for name in both} for _ in range(1 if FLAGS.quick else INSTANCES)]
    calls = {f"{name} {i}": ones[name].step for i, ones in enumerate(made) for name in both}
    times = timing.in_turns(calls, FLAGS.seconds, least, most=2000)
    stacked = {name: np.stack([times[f"{name} {i}"] for i in range(len(made))]) for name in both}
    return steps_and_added(stacked, contenders.bare_of)[names.SWA]


def steps_and_added(times: Dict[str, np.ndarray], bare_of: Callable[[str], str]) -> Dict[str, object]:
    """Time of a step, and what the contender adds to the step of its bare optimizer in the same round.

    Args:
      times: from `timing.in_turns`; or several for each name, with the rounds as the last axis.
      bare_of: the name of the bare optimizer to compare with.
    """
    result = {}
    for name, seconds in times.items():
        added = seconds - times[bare_of(name)]
        result[name] = {"step": timing.spread(seconds)}
        if name == names.SWA:
            # `in_turns` takes one step more, to warm up. Snapshots are taken on steps 0, 10, …
            on_snapshot = (1 + np.arange(seconds.shape[-1])) % contenders.PERIOD == 0
            result[name]["added"] = timing.spread(added[..., ~on_snapshot])
            result[name]["added_on_snapshot"] = timing.spread(added[..., on_snapshot])
        elif name not in names.BARES:
            result[name]["added"] = timing.spread(added)
    return result


def exchanges(made: Dict[str, contenders.Contender]) -> Dict[str, object]:
    """Time of one swap of weights and averages. Every contender makes an even number of swaps."""
    calls = {name: one.swap for name, one in made.items() if one.swap is not None}
    twice = {name: (lambda swap=swap: (swap(), swap())) for name, swap in calls.items()}
    times = timing.in_turns(twice, FLAGS.seconds / 4, least=5, most=50)
    return {name: timing.spread(seconds / 2) for name, seconds in times.items()}


def assignments(made: Dict[str, contenders.Contender]) -> Dict[str, object]:
    """Time of setting all weights to their averages."""
    calls = {name: one.assign for name, one in made.items() if one.assign is not None}
    times = timing.in_turns(calls, FLAGS.seconds / 8, least=5, most=50)
    return {name: timing.spread(seconds) for name, seconds in times.items()}


def memory(made: Dict[str, contenders.Contender]) -> Dict[str, object]:
    """Temporary memory in bytes: of an update, a swap and an assignment."""
    bare = {name: timing.extra_memory(one.step) for name, one in made.items()}
    result = {}
    for name, one in made.items():
        if name in names.BARES:
            continue
        result[name] = {"update": max(bare[name] - bare[contenders.bare_of(name)], 0)}
        if name in names.OURS:
            update = tf.function(one.optimizer.update_average, autograph=False)
            result[name]["update"] = timing.extra_memory(update)
        if one.swap is not None:
            result[name]["swap"] = timing.extra_memory(lambda one=one: (one.swap(), one.swap()))
        if one.assign is not None:
            one.step()  # Averages that share the weights' buffers would take no memory to assign.
            result[name]["assign"] = timing.extra_memory(one.assign)
    return result


def first_calls(makers: Dict[str, Callable]) -> Dict[str, object]:
    """Time from a new optimizer to the end of its first step, with tracing and compilation.

    Then that of the first swap, and of the first assignment.
    """
    seconds = {"first_step": {}, "first_swap": {}, "first_assign": {}}

    def note(what: str, name: str, start: float) -> None:
        seconds[what].setdefault(name, []).append(time.perf_counter() - start)

    for _ in range(1 if FLAGS.quick else 2):
        for name, make in makers.items():
            gc.freeze()  # So that nobody's first step pays for a look at what the others have left.
            start = time.perf_counter()
            one = make()
            one.step()
            note("first_step", name, start)
            if one.swap is not None:
                start = time.perf_counter()
                one.swap()
                note("first_swap", name, start)
                one.swap()
            if one.assign is not None:
                start = time.perf_counter()
                one.assign()
                note("first_assign", name, start)
            del one
            gc.unfreeze()
            gc.collect()  # What is frozen is never freed, and an embedding is a gigabyte.
    return {
        what: {name: timing.spread(np.asarray(values)) for name, values in all_of_them.items()}
        for what, all_of_them in seconds.items()
    }


def main(arguments) -> None:
    tf.get_logger().setLevel(
        "ERROR"
    )  # Making many optimizers looks to TensorFlow like tracing too often.
    chosen = arguments[1:]
    if "mirrored" in chosen:
        cpu = tf.config.list_physical_devices("CPU")[0]
        two = 2 * [tf.config.LogicalDeviceConfiguration()]
        tf.config.set_logical_device_configuration(cpu, two)
    results = {}
    for name in chosen:
        if name == "fit":
            times = fit_step.measure(FLAGS.seconds, FLAGS.quick)
            results[name] = {"steps": steps_and_added(times, contenders.bare_of)}
        elif name == "scaling":
            results[name] = scaling.measure(FLAGS.seconds, FLAGS.quick)
        elif name == "rows":
            results[name] = embedding.measure(FLAGS.seconds, FLAGS.quick)
        elif name == "long_run":
            results[name] = long_run.measure(200 if FLAGS.quick else 10_000)
        else:
            results[name] = measure_workload(name)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    app.run(main)
