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
"""Program: runs the checks under one strategy of one process, named on the command line."""

import sys

import checks
import tensorflow as tf

CPUS = 5


def mirrored(replicas, merge_call):
    strategy = tf.distribute.MirroredStrategy([f"CPU:{index}" for index in range(replicas)])
    # Without merge calls is how GPUs with NCCL run: each replica updates its own variables.
    strategy.extended._use_merge_call = lambda: merge_call
    return strategy


KINDS = {
    "mirrored": lambda: mirrored(2, merge_call=True),
    "mirrored_on_four": lambda: mirrored(4, merge_call=True),
    "mirrored_without_merge_call": lambda: mirrored(2, merge_call=False),
    "mirrored_on_four_without_merge_call": lambda: mirrored(4, merge_call=False),
    "central_storage": lambda: tf.distribute.experimental.CentralStorageStrategy(
        ["CPU:1", "CPU:2"], "CPU:0"
    ),
    "one_device": lambda: tf.distribute.OneDeviceStrategy("CPU:1"),
}


# Where a Keras is checked.
KINDS_OF = {"tf_keras": list(KINDS), "keras": ["mirrored", "mirrored_without_merge_call", "one_device"]}


def checks_of(kind, keras):
    """All of them on two replicas; elsewhere one of each kind, as the same code runs there."""
    if kind == "mirrored":
        return checks.known_to(keras, checks.SYNCHRONOUS + checks.REPLICATED)
    if kind == "central_storage":
        without = [check for check in checks.ONE_OF_EACH_KIND if check is not checks.mixed_float16]
        return [*without, checks.loss_scaling_is_refused_as_by_tf_keras]
    if kind == "one_device" and keras == "tf_keras":
        return checks.FEW
    return checks.ONE_OF_EACH_KIND


def main(kind):
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * CPUS
    )
    chosen = checks_of(kind, checks.KERAS.__name__)
    return 0 if checks.run(chosen, KINDS[kind](), keep_going=True) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
