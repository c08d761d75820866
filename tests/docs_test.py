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
"""The code of the README and of the guides runs as it stands there; their links lead somewhere."""

import re

import pytest

from tests import markdown_code

LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
PAGES = [*markdown_code.ROOT.glob("*.md"), *sorted((markdown_code.ROOT / "docs").rglob("*.md"))]
TIME_LIMIT = 300  # Seconds.

# Where the project's own files are on the web: the repository that pyproject.toml names.
REPOSITORY = re.search(
    r'^Repository = "(.*)"$', (markdown_code.ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M
)
OURS = re.compile(rf"^{re.escape(REPOSITORY[1])}/(blob|raw)/main/")

each_guide = pytest.mark.parametrize("path", markdown_code.GUIDES, ids=lambda path: path.name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", list(filter(markdown_code.program_of, markdown_code.GUIDES)), ids=lambda path: path.name
)
def test_code_runs(forkserver, path, tmp_path):
    """Each file is one program, in a process of its own, in an empty directory."""
    process = forkserver.Process(target=markdown_code.run_program, args=(path, tmp_path))
    process.start()
    try:
        process.join(TIME_LIMIT)
        output = (tmp_path / "output").read_text(encoding="utf-8")[-5000:]
        assert process.exitcode == 0, f"{path.name}, lines as in that file:\n{output}"
    finally:
        process.kill()
        process.join()


@each_guide
def test_code_is_marked_as_what_it_is(path):
    """No code escapes: every fence names its language, and nothing is code by being indented."""
    blocks = markdown_code.blocks_of(path)
    assert {block.language for block in blocks} <= markdown_code.LANGUAGES
    for block in blocks:
        if block.language.startswith("python"):
            compile("\n".join(block.lines), f"{path.name}:{block.first_line}", "exec")
    fenced = {
        number
        for block in blocks
        for number in range(block.first_line, block.first_line + len(block.lines))
    }
    lines = path.read_text(encoding="utf-8").splitlines()
    indented = [
        number
        for number, (before, line) in enumerate(zip(lines, lines[1:]), 2)
        if not before.strip() and line.startswith("    ") and number not in fenced
    ]
    assert not indented, f"Expected fenced code. Indented lines of {path.name}: {indented}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(markdown_code.ROOT)))
def test_links_lead_somewhere(path):
    for target, anchor in LINK.findall(path.read_text(encoding="utf-8")):
        if path.name == "README.md":  # It is shown elsewhere too.
            assert target.startswith("https://"), f"Expected an absolute link in README.md: {target}"
        target = OURS.sub("", target)
        if "://" in target:
            continue
        linked = (path.parent / target).resolve() if target else path
        assert linked.exists(), f"{path.name} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(linked), f"{path.name} links to {target}#{anchor}: no such heading"


def anchors(path):
    """The names by which a Markdown file's headings can be linked to."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
