"""The site of the docs: what its pages include, link to, show and run. ``make docs`` builds it."""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import nsa

pytest.importorskip("mkdocs", reason="needs the extra `docs`")

from mkdocs.exceptions import PluginError

from docs_site import dead_links, figures, hooks, roles

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_the_page_of_the_api_has_every_public_name():
    page = (DOCS / "api.md").read_text("utf-8")
    of_ranks = re.findall(r"^::: nsa\.distributed\.(\w+)$", page, re.MULTILINE)
    assert sorted(of_ranks) == sorted(nsa.distributed.__all__)
    documented = re.findall(r"^::: nsa\.(\w+)$", page, re.MULTILINE)
    assert sorted(documented) == sorted(nsa.__all__)
    for name in documented:
        public = getattr(nsa, name)
        assert public.__doc__, name
        for member, value in vars(public).items() if isinstance(public, type) else ():
            # extra_repr is documented by torch.
            if not member.startswith("_") and member != "extra_repr" and callable(value):
                assert value.__doc__, f"{name}.{member}"


def test_the_page_of_transformers_has_every_public_name():
    pytest.importorskip("transformers", reason="needs the extra `transformers`")
    package = importlib.import_module("nsa.transformers")
    page = (DOCS / "transformers.md").read_text("utf-8")
    names = re.findall(r"^::: nsa\.transformers\.(\w+)$", page, re.MULTILINE)
    assert sorted(names) == sorted(package.__all__)
    # A module of the same name would be shown in place of a function.
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert not modules & set(names)


@pytest.mark.parametrize("page", PAGES)
def test_code_of_the_pages_runs(page):
    """Code that a page includes, of the README or an example, has tests of its own."""
    scope = {}
    for code in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL):
        if "transformers" in code:
            pytest.importorskip("transformers", reason="needs the extra `transformers`")
        exec(compile(code, page, "exec"), scope)


@pytest.mark.parametrize("page", PAGES)
def test_pages_have_a_title_and_includes_that_exist(page):
    text = hooks.expand((DOCS / page).read_text("utf-8"), page)
    assert re.search(r"^# \S", text, re.MULTILINE)
    assert not hooks.INCLUDE.search(text)


def test_a_section_is_included_without_its_heading():
    text = hooks.expand("# Page\n\n<!-- include README.md: Limits -->\n\nEnd.", "page.md")
    readme = (ROOT / "README.md").read_text("utf-8")
    limits = readme.split("\n## Limits\n")[1].split("\n## ")[0].strip()
    assert text == f"# Page\n\n{limits}\n\nEnd."


def test_comments_in_code_are_no_headings(tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    (tmp_path / "a.md").write_text("# A\n## B\none\n```\n## not\n```\ntwo\n## C\nthree\n")
    assert hooks.included("a.md", "B") == "one\n```\n## not\n```\ntwo"
    assert hooks.included("a.md", "C") == "three"
    with pytest.raises(PluginError, match=r"a\.md has no section 'D'"):
        hooks.included("a.md", "D")


def test_examples_are_included_as_code():
    text = hooks.expand("<!-- include examples/packed_batch.py -->", "page.md")
    code = (ROOT / "examples" / "packed_batch.py").read_text("utf-8")
    assert text == f"```python\n{code}```"


@pytest.mark.parametrize(
    ("source", "page", "link", "expected"),
    [
        ("README.md", "modes.md", "#speed-and-memory", "speed.md"),
        ("README.md", "index.md", "FINDINGS.md", "findings.md"),
        ("README.md", "index.md", "docs/ARCHITECTURE.md#stages", "ARCHITECTURE.md#stages"),
        ("FINDINGS.md", "findings.md", "docs/log/2026-11.md#x", "log/2026-11.md#x"),
        ("docs/log/2026-11.md", "log/2026-11.md", "../../FINDINGS.md", "../findings.md"),
        ("docs/log/2026-11.md", "log/2026-11.md", "../ARCHITECTURE.md", "../ARCHITECTURE.md"),
        ("CONTRIBUTING.md", "contributing.md", "README.md", "index.md"),
        ("docs/modes.md", "modes.md", "#here", "#here"),
        ("docs/modes.md", "modes.md", "https://arxiv.org", "https://arxiv.org"),
    ],
)
def test_links_between_files_are_links_between_pages(source, page, link, expected):
    for before, after in (("see [it](", ") there"), ("[it]: ", "\n")):
        text = hooks.relink(before + link + after, source, page)
        assert text == before + expected + after
    code = f"```\n[it]({link})\n```\n`[it]({link})`"
    assert hooks.relink(code, source, page) == code


def test_a_link_to_what_has_no_page_is_an_error():
    with pytest.raises(PluginError, match=r"README\.md links to LICENSE"):
        hooks.relink("[licence](LICENSE)", "README.md", "index.md")


@pytest.mark.parametrize(
    ("name", "owner", "expected"),
    [
        ("forward", "", "[`forward`][nsa.forward]"),
        ("nsa.Packing", "", "[`nsa.Packing`][nsa.Packing]"),
        ("Packing.keep", "", "[`Packing.keep`][nsa.Packing.keep]"),
        ("paper", "NSAConfig", "[`paper`][nsa.NSAConfig.paper]"),
        ("nsa.host.may_keep", "Packing", "`nsa.host.may_keep`"),
        ("BlockCompressor", "NativeSparseAttention", "`BlockCompressor`"),
    ],
)
def test_roles_of_docstrings_link_to_public_names(name, owner, expected):
    assert roles.link(name, owner) == expected


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.html").write_text('<h1 id="top"></h1><a href="../c.html#x">c</a>')
    (tmp_path / "c.html").write_text(
        '<p id="x"><a href="a/b.html#top">b</a><a href="a/b.html#end">b</a>'
        '<img src="none.svg"><a href="https://example.com/none">out</a>'
    )
    pages, dead = dead_links.check(tmp_path)
    assert pages == 2
    assert dead == ["c.html: a/b.html#end", "c.html: none.svg"]
    with pytest.raises(SystemExit) as raised:
        dead_links.main(str(tmp_path))
    assert raised.value.code == 1


def test_figures_are_shown_and_pages_show_no_others():
    shown = {
        x for page in PAGES for x in re.findall(r"\(figures/(.*?)\)", (DOCS / page).read_text())
    }
    assert shown == set(figures.FIGURES)


def test_the_figure_of_the_branches_has_weights():
    config, tokens = figures.SMALL, 40
    q, k = figures.topics(tokens, lengths=(4, 9), seed=0)
    for branch in range(3):
        weights = figures.branch_weights(q, k, config, branch)
        assert not weights.triu(1).any()
        rows = weights.sum(-1)
        assert torch.allclose(rows[config.compress_block_size - 1 :], torch.ones(()), atol=1e-5)
        seen = (weights[-1] > 0).sum().item()
        block = config.compress_block_size
        assert seen == (tokens, config.num_selected_blocks * block, config.window_size)[branch]


def test_the_figure_of_the_selections_has_no_later_blocks():
    q, k = figures.topics(600, lengths=(40, 90), seed=0)
    for config in (
        nsa.NSAConfig.paper(num_selected_blocks=4),
        nsa.NSAConfig(num_selected_blocks=4),
    ):
        chosen = figures.selected(q, k, config, 64)
        assert chosen.shape == (600, 10)
        assert chosen.sum(-1).max() == 4
        assert not chosen[63, 1:].any()
