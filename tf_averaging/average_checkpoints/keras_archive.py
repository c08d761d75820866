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
"""Whole models as `.keras`: an archive of a config and the weights, which are a file of HDF5."""

from __future__ import annotations

import io
import os
import shutil
import struct
import zipfile
from typing import Iterable, Tuple

import numpy as np

from tf_averaging.average_checkpoints import hdf5_file

WEIGHTS = "model.weights.h5"
NEEDED = {WEIGHTS, "config.json", "metadata.json"}

# What stands before a member: it ends with the lengths of the name and the extra fields that follow.
HEADER = struct.Struct("<26xHH")


class KerasArchive:
    """The weights in a `.keras` file, which are read where they are, without unpacking.

    Args:
      path: of the file.

    Attributes:
      path: of the file.
      variables: what the file says of each variable of the model.
      holds_averages: whether an averaging optimizer had swapped the averages into the model.
    """

    exists = staticmethod(hdf5_file.Hdf5File.exists)
    move = staticmethod(hdf5_file.Hdf5File.move)

    def __init__(self, path: str):
        self.path = path
        self._archive = zipfile.ZipFile(path)
        missing = NEEDED - set(self._archive.namelist())
        if missing:
            raise ValueError(f"The archive has no {sorted(missing)[0]!r}.")
        self._content = self._weights()
        self._hdf5 = hdf5_file.Hdf5File(path, self._content)
        self.variables = self._hdf5.variables
        self.holds_averages = self._hdf5.holds_averages
        self.read = self._hdf5.read

    def check(self) -> None:
        """Compares everything in the file with its checksums.

        Raises:
          ValueError: if something is not as it was written.
        """
        broken = self._archive.testzip()
        if broken:
            raise ValueError(f"{broken!r} in the archive does not have its checksum.")

    def write(self, path: str, values: Iterable[Tuple[str, np.ndarray]]) -> None:
        """Writes a copy of the file, with other values for some variables."""
        weights = f"{path}.{WEIGHTS}"
        with self._archive.open(WEIGHTS) as source, open(weights, "wb") as target:
            shutil.copyfileobj(source, target)
        hdf5_file.assign(weights, values)
        with zipfile.ZipFile(path, "w") as archive:
            for name in self._archive.namelist():
                if name == WEIGHTS:
                    archive.write(weights, WEIGHTS)
                    continue
                copy = archive.open(name, "w", force_zip64=True)
                with self._archive.open(name) as original, copy:
                    shutil.copyfileobj(original, copy)

    def close(self) -> None:
        """Closes the file."""
        self._hdf5.close()
        self._content.close()
        self._archive.close()

    def _weights(self):
        """The weights as a binary file."""
        member = self._archive.getinfo(WEIGHTS)
        if member.compress_type != zipfile.ZIP_STORED:
            # Slow, as going back means to unpack from the beginning. The Kerases do not compress.
            return self._archive.open(member)
        return _Part(self.path, _start(self.path, member), member.file_size)


class _Part(io.RawIOBase):
    """A part of a file, as a file. `zipfile` has one that reads from the beginning to go back."""

    def __init__(self, path: str, start: int, size: int):
        super().__init__()
        self._file = open(path, "rb")  # noqa: SIM115
        self._start, self._size = start, size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = origin + offset
        return self._position

    def readinto(self, buffer) -> int:
        view = memoryview(buffer)[: max(self._size - self._position, 0)]
        self._file.seek(self._start + self._position)
        count = self._file.readinto(view)
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _start(path: str, member: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin."""
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        lengths = HEADER.unpack(file.read(HEADER.size))
    return member.header_offset + HEADER.size + sum(lengths)
