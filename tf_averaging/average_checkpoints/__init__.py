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
"""The mean of the weights in saved files: as a function, and with `python -m` as a command.

`mean` is the function. It sees a file through one of three classes with the same members: `Hdf5File`,
`KerasArchive` and `ObjectCheckpoint`. `formats` chooses among them by the file's name.
"""

from tf_averaging.average_checkpoints.mean import average_checkpoints

__all__ = ["average_checkpoints"]
