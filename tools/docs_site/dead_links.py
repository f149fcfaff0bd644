"""Check that every link of a built site to one of its own files and anchors leads somewhere.

    python tools/docs_site/dead_links.py outputs/site

MkDocs checks the links of Markdown. This also checks those of the theme, of the API and of raw
HTML. Links to other hosts are not followed.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links and anchors of one page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        """Note what a tag links to, and what it can be linked by."""
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            if name == "id" or (name == "name" and tag == "a"):
                self.anchors.add(value)


def main(folder: str):
    """Print every dead link; exit with 1 if there is one, or no page."""
    pages, dead = check(Path(folder))
    print("\n".join([*dead, f"{pages} pages, {len(dead)} dead links"]))
    sys.exit(bool(dead) or not pages)


def check(folder: Path) -> tuple[int, list[str]]:
    """The number of pages, and a line for each dead link."""
    pages = {path: Page(path.read_text("utf-8")) for path in sorted(folder.rglob("*.html"))}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            # 404.html has links from the root of the site.
            base = folder if parts.path.startswith("/") else path.parent
            target = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            anchor = unquote(parts.fragment)
            if not target.exists() or (
                anchor and target in pages and anchor not in pages[target].anchors
            ):
                dead.append(f"{path.relative_to(folder)}: {link}")
    return len(pages), dead


if __name__ == "__main__":
    main(*sys.argv[1:])
