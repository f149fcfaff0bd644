"""What MkDocs calls while it builds the site (mkdocs.yml): includes, links and figures.

A text has one home. Some are outside of docs/, because readers meet them first in the repository:
README.md, FINDINGS.md and others. A page includes such a file, or a section of it, by a comment:

    <!-- include FINDINGS.md -->
    <!-- include README.md: Speed and memory -->
    <!-- include examples/packed_batch.py -->

Links between these files and docs/ are made links between pages. What has no page is an error.
"""

import posixpath
import re
import sys
import tempfile
from functools import cache
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[2]
# MkDocs loads this file alone; scripts and tests find these folders by themselves.
sys.path[:0] = [str(ROOT / name) for name in ("tools", "benchmarks")]

from docs_site import figures  # noqa: E402

DOCS = "docs"
INCLUDE = re.compile(r"^<!-- include ([\w./-]+)(?:: (.+?))? -->$", re.MULTILINE)
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\(|^\[[^\]]+\]: )([^\s)]+)", re.MULTILINE)
_slug = slugify(case="lower")


def on_files(files, config):
    """Draw the figures."""
    with tempfile.TemporaryDirectory() as folder:
        for name, draw in figures.FIGURES.items():
            path = Path(folder) / name
            draw(path)
            uri = f"figures/{name}"
            files.append(File.generated(config, uri, content=path.read_bytes()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Make the page of its own text and what it includes."""
    return expand(markdown, page.file.src_uri)


def expand(markdown: str, page: str) -> str:
    """The text of ``page``, a path in docs/, with includes in place and links between pages."""
    parts, end = [], 0
    for match in INCLUDE.finditer(markdown):
        parts.append(relink(markdown[end : match.start()], f"{DOCS}/{page}", page))
        parts.append(relink(included(match[1], match[2]), match[1], page))
        end = match.end()
    parts.append(relink(markdown[end:], f"{DOCS}/{page}", page))
    return "".join(parts)


def included(name: str, section: str | None) -> str:
    """A file, as code if it is Python; or what stands under one heading of the first two levels."""
    text = (ROOT / name).read_text("utf-8")
    if name.endswith(".py"):
        return f"```python\n{text}```"
    if section is None:
        return text
    # Line by line, because code may have lines that start with "#".
    lines, inside, fenced = [], False, False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if line.startswith(("# ", "## ")) and not fenced:
            inside = line.lstrip("#") == f" {section}"
        elif inside:
            lines.append(line)
    if not lines:
        raise PluginError(f"{name} has no section {section!r}")
    return "\n".join(lines).strip()


@cache
def homes() -> dict[tuple[str, str], str]:
    """The page of each (file, anchor of a section) that is included; "" is the file or its top."""
    found = {}
    for path in sorted((ROOT / DOCS).rglob("*.md")):
        for name, section in INCLUDE.findall(path.read_text("utf-8")):
            top = not section or included(name, None).startswith(f"# {section}\n")
            anchor = "" if top else _slug(section, "-")
            found[name, anchor] = path.relative_to(ROOT / DOCS).as_posix()
    return found


def relink(markdown: str, source: str, page: str) -> str:
    """The text of ``source``, a path in the repository, with its links as ``page`` needs them."""
    code = [match.span() for match in CODE.finditer(markdown)]

    def replace(match: re.Match) -> str:
        if any(start <= match.start() < end for start, end in code):
            return match[0]
        return match[1] + _relink(match[2], source, page)

    return LINK.sub(replace, markdown)


def _relink(link: str, source: str, page: str) -> str:
    if re.match(r"[a-z]+:", link):
        return link
    path, _, anchor = link.partition("#")
    own = f"{DOCS}/{page}"
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path)) if path else source
    if target == own:
        return link
    if target.startswith(f"{DOCS}/"):
        target = target.removeprefix(f"{DOCS}/")
    elif (target, anchor) in homes():
        target, anchor = homes()[target, anchor], ""
    elif (target, "") in homes():
        target = homes()[target, ""]
    else:
        raise PluginError(f"{source} links to {link}, which no page includes")
    path = posixpath.relpath(target, posixpath.dirname(page))
    return f"{path}#{anchor}" if anchor else path
