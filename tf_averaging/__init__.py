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
"""Weight averaging for TensorFlow: SWA and EMA as optimizer wrappers.

The examples in this reference begin with

>>> import tensorflow as tf
>>> import tf_keras
>>> import tf_averaging as tfav
"""

from tf_averaging import callbacks
from tf_averaging import schedules
from tf_averaging.average_checkpoints import average_checkpoints
from tf_averaging.averaged_model import averaged_model
from tf_averaging.averaged_optimizer_wrapper import AveragedOptimizerWrapper
from tf_averaging.averaging_optimizer import averaging_optimizer
from tf_averaging.batch_norm import update_batch_norm
from tf_averaging.exponential_moving_average import ExponentialMovingAverage
from tf_averaging.post_hoc_average import post_hoc_average
from tf_averaging.post_hoc_ema import PostHocEMA
from tf_averaging.stochastic_weight_averaging import SWA
from tf_averaging.version import VERSION

__version__ = VERSION

__all__ = [
    "SWA",
    "AveragedOptimizerWrapper",
    "ExponentialMovingAverage",
    "PostHocEMA",
    "average_checkpoints",
    "averaged_model",
    "averaging_optimizer",
    "callbacks",
    "post_hoc_average",
    "schedules",
    "update_batch_norm",
]


def __dir__():
    """The public names: the modules inside the package are not offered."""
    return [*__all__, "VERSION", *(name for name in globals() if name.startswith("__"))]
