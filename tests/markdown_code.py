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
"""Python code blocks of the README and of the guides."""

import os
import pathlib
import re
import runpy
import sys
from typing import List, NamedTuple

ROOT = pathlib.Path(__file__).absolute().parent.parent
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# What a fence may say. `python before` is code of another library, which is compiled and not run;
# `python client` is code for another library, which a script of tests/clients runs.
LANGUAGES = {"python", "python before", "python client", "sh", "text"}


class Block(NamedTuple):
    """A fenced block.

    Attributes:
      heading: the heading that it stands under, without marks.
      language: what its fence says.
      first_line: the number of its first line in the file, counted from 1.
      lines: its lines.
    """

    heading: str
    language: str
    first_line: int
    lines: List[str]


def blocks_of(path: pathlib.Path) -> List[Block]:
    """All fenced blocks of a Markdown file, in order."""
    blocks, heading, block = [], "", None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if block is not None and line.strip() == "```":
            blocks.append(block)
            block = None
        elif block is not None:
            block.lines.append(line)
        elif line.startswith("```"):
            block = Block(heading, line[3:].strip(), number + 1, [])
        elif re.match("#+ ", line):
            heading = line.lstrip("# ").replace("`", "")
    if block is not None:
        raise ValueError(f"{path}: the block that begins in line {block.first_line} never ends.")
    return blocks


def program_of(path: pathlib.Path) -> str:
    """The Python blocks of a Markdown file as one program, each line where the file has it."""
    lines: List[str] = []
    for block in blocks_of(path):
        if block.language == "python":
            lines += [""] * (block.first_line - 1 - len(lines)) + block.lines
    return "\n".join(lines)


def run_program(path: pathlib.Path, directory: pathlib.Path) -> None:
    """Runs the program of a Markdown file, in a process that is there for it alone.

    Args:
      path: the Markdown file.
      directory: where it runs; its file `output` gets what the process prints.
    """
    os.chdir(directory)
    with open("output", "wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    script = pathlib.Path(path.stem + ".py")
    script.write_text(program_of(path), encoding="utf-8")
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":  # python -m tests.markdown_code README.md
    print(program_of(pathlib.Path(sys.argv[1])))
