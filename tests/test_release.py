"""The version and the changelog agree, and both are of semantic versioning."""

import re
from pathlib import Path

import nsa

ROOT = Path(__file__).resolve().parents[1]
VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)(?:-[\w.]+)?")


def headings() -> list[str]:
    """The sections of the changelog, newest first."""
    return re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)


def test_the_version_is_semantic():
    assert VERSION.fullmatch(nsa.__version__)


def test_the_changelog_starts_with_what_is_not_released():
    assert headings()[0] == "Unreleased"


def test_no_release_is_newer_than_the_version():
    """A release is a heading such as ``## 0.1.0 (2026-12-24)``; older ones follow."""
    versions = []
    for heading in headings()[1:]:
        match = re.fullmatch(rf"({VERSION.pattern}) \(\d{{4}}-\d\d-\d\d\)", heading)
        assert match, heading
        versions.append(tuple(map(int, match.groups()[1:])))
    current = tuple(map(int, VERSION.fullmatch(nsa.__version__).groups()))
    assert versions == sorted(set(versions), reverse=True)
    assert max(versions, default=current) <= current
