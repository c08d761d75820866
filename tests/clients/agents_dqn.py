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
"""tf-agents: a DQN agent learns in CartPole, its optimizer inside SWA.

The averages are right, a saved policy acts by them, and a checkpoint of the agent restores them.
"""

import tempfile

import numpy as np
import tensorflow as tf
import tf_keras
from tf_agents.agents.dqn import dqn_agent
from tf_agents.drivers import dynamic_step_driver
from tf_agents.environments import suite_gym
from tf_agents.environments import tf_py_environment
from tf_agents.networks import q_network
from tf_agents.policies import policy_saver
from tf_agents.replay_buffers import tf_uniform_replay_buffer
from tf_agents.trajectories import time_step
from tf_agents.utils import common

from tests import numpy_averages
from tests.clients import recording

SCHEME = numpy_averages.swa(start=3, period=2)
tf_keras.utils.set_random_seed(0)
environment = tf_py_environment.TFPyEnvironment(suite_gym.load("CartPole-v1"))
specs = environment.time_step_spec(), environment.action_spec()
observations = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)


def new_agent():
    network = q_network.QNetwork(environment.observation_spec(), specs[1], fc_layer_params=(16,))
    optimizer = SCHEME.wrap(tf_keras.optimizers.Adam(0.05))
    agent = dqn_agent.DqnAgent(*specs, network, optimizer, target_update_period=5)
    agent.initialize()
    return agent, network, optimizer


agent, network, optimizer = new_agent()
buffer = tf_uniform_replay_buffer.TFUniformReplayBuffer(agent.collect_data_spec, 1, max_length=200)
dynamic_step_driver.DynamicStepDriver(
    environment, agent.collect_policy, [buffer.add_batch], num_steps=100
).run()
data = buffer.as_dataset(sample_batch_size=16, num_steps=2)
record = recording.Record(network.trainable_variables)
train = common.function(agent.train)
for experience, _ in data.take(20):
    train(experience)
    record.add()
averaged = record.check(optimizer, SCHEME, lambda: network(observations)[0].numpy())

with tempfile.TemporaryDirectory() as folder:
    with optimizer.swapped_weights():
        policy_saver.PolicySaver(agent.policy).save(folder + "/policy")
    step = time_step.restart(observations, batch_size=len(observations))
    policy = tf.saved_model.load(folder + "/policy")
    np.testing.assert_array_equal(policy.action(step).action, np.argmax(averaged, axis=1))

    common.Checkpointer(folder + "/agent", agent=agent).save(global_step=0)
    other, network, optimizer = new_agent()
    common.Checkpointer(folder + "/agent", agent=other)  # Restores.
    with optimizer.swapped_weights():
        np.testing.assert_array_equal(network(observations)[0], averaged)

recording.report("tf-agents", "tensorflow", "tf_keras")
