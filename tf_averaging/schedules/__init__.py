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
"""Decays for `ExponentialMovingAverage`, and learning rates for `SWA`, as schedules of both Kerases.

A decay is called with the number of steps since averaging started, a learning rate with the number of
steps since training started. Both take one number or a vector of them, and answer in its shape. All count
in float64, which is exact to 2^53 steps; float32, in which Keras's own schedules compute, stops telling
steps apart at 2^24. (Legacy optimizers hand learning-rate schedules the step in the dtype of the weights;
decays always get it exactly.)
"""

from tf_averaging.schedules.decays import DebiasedDecay
from tf_averaging.schedules.decays import InversePowerDecay
from tf_averaging.schedules.decays import MomentumAnnealingDecay
from tf_averaging.schedules.decays import PowerFunctionDecay
from tf_averaging.schedules.decays import WarmUpDecay
from tf_averaging.schedules.decays import half_life
from tf_averaging.schedules.learning_rates import ConstantLearningRate
from tf_averaging.schedules.learning_rates import CyclicalLearningRate

__all__ = [
    "ConstantLearningRate",
    "CyclicalLearningRate",
    "DebiasedDecay",
    "InversePowerDecay",
    "MomentumAnnealingDecay",
    "PowerFunctionDecay",
    "WarmUpDecay",
    "half_life",
]


def __dir__():
    """The public names: the modules inside are not offered."""
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
