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
"""Averages the weights in saved files, from the command line.

    python -m tf_averaging.average_checkpoints --output=mean.keras epoch_8.keras epoch_9.keras
    python -m tf_averaging.average_checkpoints --output=run/mean --last=5 run

A directory stands for the checkpoints of the `tf.train.CheckpointManager` that writes there. See
`tf_averaging.average_checkpoints` for what is averaged.
"""

import os
import sys
from typing import Any, List

import tensorflow as tf
from absl import app
from absl import flags

from tf_averaging.average_checkpoints.mean import average_checkpoints

# Here and not in a module that others import: flags are defined once for the whole program.
_OUTPUT = flags.DEFINE_string(
    "output", None, "The file to write, or the prefix of a checkpoint.", required=True
)
_LAST = flags.DEFINE_integer(
    "last",
    None,
    "How many of the files to average, counted from the last; all of them by default.",
    lower_bound=1,
)
_WEIGHTS = flags.DEFINE_list("weights", None, "How much each file counts; all the same by default.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Whether to replace an output that exists.")


def main(arguments: List[str]) -> None:
    try:
        paths = [path for argument in arguments[1:] for path in _checkpoints(argument)]
        if _LAST.value is not None:
            if len(paths) < _LAST.value:
                raise ValueError(f"Expected at least {_LAST.value} files. Received: {len(paths)}")
            paths = paths[-_LAST.value :]
        weights: Any = _WEIGHTS.value  # As strings: what is no number is refused with all other errors.
        average_checkpoints(paths, _OUTPUT.value, weights, _OVERWRITE.value)
    except (OSError, TypeError, ValueError, tf.errors.OpError) as error:
        sys.exit(f"{error}")


def _checkpoints(path: str) -> List[str]:
    """The checkpoints in a directory, oldest first; or the file itself."""
    state = tf.train.get_checkpoint_state(path) if os.path.isdir(path) else None
    return [path] if state is None else list(state.all_model_checkpoint_paths)


if __name__ == "__main__":
    app.run(main)
