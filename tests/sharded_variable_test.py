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
"""Variables in shards, as parameter servers have them, without servers: slots and checkpoints."""

import numpy as np
import pytest
import tensorflow as tf

import tf_averaging as tfav
from tests import testing_utils

WHOLE = np.arange(12.0).reshape(6, 2)


# Averages of another dtype have a stash beside them. (TensorFlow cannot cut float16 in a checkpoint.)
AVERAGE_DTYPES = [None, "float64"]


def sharded(sizes):
    """`WHOLE` cut into shards of these numbers of rows; a plain variable for one."""
    parts = np.split(WHOLE, np.cumsum(sizes)[:-1])
    shards = [tf.Variable(tf.cast(part, tf.float32), name=f"v/part_{i}") for i, part in enumerate(parts)]
    return tf.__internal__.distribute.ShardedVariable(shards, name="v") if len(shards) > 1 else shards[0]


def shards_of(variable):
    return getattr(variable, "variables", [variable])


def whole(variable):
    return np.concatenate([shard.numpy() for shard in shards_of(variable)])


def new_optimizer(average_dtype):
    return tfav.SWA(testing_utils.CURRENT.SGD(1.0), 0, 1, average_dtype=average_dtype)


def trained(sizes, average_dtype, steps):
    variable, optimizer = sharded(sizes), new_optimizer(average_dtype)
    optimizer.shadow_copy([variable])
    testing_utils.descend(optimizer, shards_of(variable), steps=steps)
    return variable, optimizer


@pytest.mark.parametrize("average_dtype", AVERAGE_DTYPES)
def test_slot_of_a_sharded_variable_is_sharded_alike(average_dtype):
    variable, optimizer = trained([4, 2], average_dtype, steps=3)
    average = optimizer.get_slot(variable, "average")
    assert [shard.shape for shard in average.variables] == [shard.shape for shard in variable.variables]
    for shard, part in zip(variable.variables, average.variables):
        assert optimizer.get_slot(shard, "average") is part
    np.testing.assert_array_equal(whole(average), WHOLE - 2.0)
    np.testing.assert_array_equal(optimizer.get_average(variable).numpy(), WHOLE - 2.0)
    with optimizer.swapped_weights():
        np.testing.assert_array_equal(whole(variable), WHOLE - 2.0)
        np.testing.assert_array_equal(optimizer.get_average(variable).numpy(), WHOLE - 2.0)
    optimizer.assign_average_vars([variable])
    np.testing.assert_array_equal(whole(variable), WHOLE - 2.0)


@pytest.mark.parametrize("average_dtype", AVERAGE_DTYPES)
@pytest.mark.parametrize("saved", [[6], [4, 2], [2, 2, 2]])
@pytest.mark.parametrize("restored", [[6], [3, 3], [2, 2, 2]])
@pytest.mark.parametrize("has_slots", [False, True])
def test_checkpoint_does_not_depend_on_the_sharding(saved, restored, average_dtype, has_slots, tmp_path):
    variable, optimizer = trained(saved, average_dtype, steps=3)
    path = tf.train.Checkpoint(variable=variable, optimizer=optimizer).save(tmp_path / "checkpoint")
    fresh, resumed = sharded(restored), new_optimizer(average_dtype)
    if has_slots:
        resumed.shadow_copy([fresh])
        resumed.build(shards_of(fresh))
    checkpoint = tf.train.Checkpoint(variable=fresh, optimizer=resumed)
    checkpoint.restore(path).assert_existing_objects_matched()
    np.testing.assert_array_equal(whole(fresh), WHOLE - 3.0)
    np.testing.assert_array_equal(whole(resumed.get_slot(fresh, "average")), WHOLE - 2.0)
    assert resumed.num_averaged == 3


def test_checkpoint_written_while_swapped_with_averages_of_another_dtype(tmp_path):
    """Weights are then kept in another place, from which they come back."""
    variable, optimizer = trained([4, 2], None, steps=3)
    optimizer.swap_weights()
    path = tf.train.Checkpoint(variable=variable, optimizer=optimizer).save(tmp_path / "checkpoint")
    fresh, resumed = sharded([4, 2]), new_optimizer("float64")
    resumed.shadow_copy([fresh])
    tf.train.Checkpoint(variable=fresh, optimizer=resumed).restore(path)
    np.testing.assert_array_equal(whole(fresh), WHOLE - 2.0)
    resumed.swap_weights()
    np.testing.assert_array_equal(whole(fresh), WHOLE - 3.0)
    np.testing.assert_array_equal(resumed.get_average(fresh), WHOLE - 2.0)
