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
"""Keras callbacks that let evaluation and checkpoints see the averages."""

from tf_averaging.callbacks.average_model_checkpoint import AverageModelCheckpoint
from tf_averaging.callbacks.evaluate_raw_weights import EvaluateRawWeights
from tf_averaging.callbacks.save_averages import SaveAverages
from tf_averaging.callbacks.swap_average_weights import SwapAverageWeights

__all__ = ["AverageModelCheckpoint", "EvaluateRawWeights", "SaveAverages", "SwapAverageWeights"]


def __dir__():
    """The public names: the modules inside are not offered."""
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
