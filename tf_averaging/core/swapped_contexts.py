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
"""Contexts in which the model holds the averages, and after which the weights are back."""

from __future__ import annotations

import dataclasses
import threading
from typing import Callable, Generic, TypeVar

from tf_averaging.core import exchange

Value = TypeVar("Value")


@dataclasses.dataclass(eq=False)
class SwappedContexts:
    """The open contexts of one set of averages, which may overlap in any way, on any thread.

    The first one to open records whether the averages were in the model before. The last one to close
    brings that back.

    Attributes:
      is_swapped: returns whether the averages are in the model.
      swap: exchanges weights and averages.
      number: how many contexts are open.
      before: what the last one brings back. A restore in a context changes it.
    """

    is_swapped: Callable[[], bool]
    swap: Callable[[], None]
    number: int = 0
    before: bool = False
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def open(self) -> None:
        with self._lock:
            swapped = self.is_swapped()
            if not self.number:
                self.before = swapped
            if not swapped:
                self.swap()
            self.number += 1

    def close(self) -> None:
        with self._lock:
            self.number -= 1
            if not self.number and self.is_swapped() != self.before:
                self.swap()


class SwappedContext(Generic[Value]):
    """One such context.

    Not a generator, which Ctrl-C may leave suspended in the middle.

    Args:
      contexts: all of them.
      value: what `as` gives.
    """

    def __init__(self, contexts: SwappedContexts, value: Value):
        self._contexts = contexts
        self._value = value
        self._is_open = False

    def __enter__(self) -> Value:
        if self._is_open:
            raise RuntimeError("This context is open already. Call `swapped_weights()` for another one.")
        try:
            exchange.finish(self._open)
        except BaseException:
            self.__exit__()
            raise
        return self._value

    def __exit__(self, *error: object) -> None:
        try:
            exchange.finish(self._close)
        finally:
            if self._is_open:  # Ctrl-C came before it began.
                exchange.finish(self._close)

    def _open(self) -> None:
        self._contexts.open()
        self._is_open = True

    def _close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._contexts.close()
