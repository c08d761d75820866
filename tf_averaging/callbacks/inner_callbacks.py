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
"""Callbacks inside `SwapAverageWeights`: which of their hooks there are, and what these may look at."""

from __future__ import annotations

from typing import Any, Callable, ContextManager, Dict, List, Optional

import tensorflow as tf

from tf_averaging import kerases
from tf_averaging.callbacks import averaging_callback
from tf_averaging.callbacks.average_model_checkpoint import AverageModelCheckpoint

# Callbacks of the Kerases that look at no weights in batches.
_READ_LOGS_ALONE = ("ProgbarLogger", "TensorBoard", "TerminateOnNaN")

_MODES = ("train", "test", "predict")


class InnerCallbacks:
    """Callbacks that are called in order, on the thread of the caller, with the caller's own logs.

    A `CallbackList` does neither: that of Keras 3 may use threads, which would race the swap, and both
    pass on copies of the logs, so that what a callback adds would not reach those outside.

    Args:
      callbacks: from the user: a list, or what Keras takes for one.
    """

    def __init__(self, callbacks: Any):
        self._callbacks: List[Any] = tf.nest.flatten(callbacks)
        classes = kerases.bases("callbacks.Callback")
        for callback in self._callbacks:
            if not isinstance(callback, classes) or isinstance(
                callback, kerases.bases("callbacks.CallbackList")
            ):
                raise TypeError(
                    "Expected `callbacks` to be a list of Keras callbacks. "
                    f"Received: {callback!r} of type {type(callback)}"
                )

        hooks = [f"on_{mode}_batch_{end}" for mode in _MODES for end in ("begin", "end")]
        # The callbacks that have each hook of batches.
        self._of_batches = {hook: [c for c in self._callbacks if _has(c, hook)] for hook in hooks}
        self._looking = {
            h for h, having in self._of_batches.items() if any(map(_looks_at_weights, having))
        }

    def __iter__(self):
        return iter(self._callbacks)

    def __len__(self) -> int:
        return len(self._callbacks)

    def set_params(self, params: Dict[str, Any]) -> None:
        """Tells all of the parameters of `fit`."""
        for callback in self._callbacks:
            callback.set_params(params)

    def set_model(self, model, averages_in_model: Callable[[], ContextManager]) -> None:
        """Tells all of the model.

        Args:
          model: from Keras.
          averages_in_model: a context in which the model holds the averages, ready for a file.
        """
        keras = kerases.of_model(model)
        for callback in self._callbacks:
            if not isinstance(callback, keras.callbacks.Callback):
                raise TypeError(
                    f"Expected callbacks of {keras.__name__}, as the model is. "
                    f"Received: {callback!r} of type {type(callback)}"
                )
            if type(callback) is keras.callbacks.ModelCheckpoint:
                # So that the averages come into the model for a file, and not in each batch.
                callback.set_model(averaging_callback.SavesAverages(model, averages_in_model))
            else:
                callback.set_model(model)

    def call(self, hook: str, *args: Any) -> None:
        """Calls a hook of all callbacks that have it, with the same arguments."""
        for callback in self._of_batches.get(hook, self._callbacks):
            getattr(callback, hook)(*args)

    def have(self, hook: str) -> bool:
        """Whether one of the callbacks has this hook of batches."""
        return bool(self._of_batches[hook])

    def look_at_weights(self, hook: str) -> bool:
        """Whether one that has this hook of batches may look at what the model holds."""
        return hook in self._looking

    def want_numbers(self) -> bool:
        """Whether one of the callbacks, in batches, needs logs that are no tensors; asked by tf_keras."""
        having = [callback for callbacks in self._of_batches.values() for callback in callbacks]
        return not all(getattr(callback, "_supports_tf_logs", False) for callback in having)


def _has(callback: Any, hook: str) -> bool:
    """Whether a callback has a hook of batches, in the opinion of its Keras."""
    mode = hook.split("_")[1]
    implements: Optional[Callable[[], bool]]
    implements = getattr(callback, f"_implements_{mode}_batch_hooks", None)  # Of tf_keras, and ours.
    if implements is not None and not implements():
        return False
    # The hooks of batches of training have an older name too.
    names = [hook, hook.replace("_train", "")]
    return any(not getattr(getattr(callback, name), "_is_default", False) for name in names)


def _looks_at_weights(callback: Any) -> bool:
    if isinstance(callback, AverageModelCheckpoint):
        return False  # It swaps by itself.
    by_keras = (*_READ_LOGS_ALONE, "ModelCheckpoint")  # The latter through `SavesAverages`.
    if any(type(callback) in kerases.bases(f"callbacks.{name}") for name in by_keras):
        return False
    is_backup = type(callback) in kerases.bases("callbacks.BackupAndRestore")
    return not (is_backup and callback.save_freq == "epoch")
