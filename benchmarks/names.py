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
"""The names of the contenders."""

BARE = "SGD alone"
BARE_KERAS_3 = "SGD alone (Keras 3)"
BARES = (BARE, BARE_KERAS_3)
BARE_ADAGRAD = "Adagrad alone"
EMA = "ExponentialMovingAverage"
WHOLE_TABLE = "ExponentialMovingAverage, whole table"
SWA = "SWA"
EMA_KERAS_3 = "ExponentialMovingAverage (Keras 3)"
OURS = (EMA, SWA, EMA_KERAS_3)
USE_EMA = "tf_keras use_ema"
KERAS_3 = "Keras 3 use_ema"
ADDONS = "as TensorFlow Addons"
MODELS = "as TensorFlow Models"
PEERS = (USE_EMA, KERAS_3, ADDONS, MODELS)
