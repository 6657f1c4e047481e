"""Pages as tests read them."""

from html.parser import HTMLParser
from typing import Any


class Page(HTMLParser):
    """Collects whatever a browser would fetch, the tags, and the visible text, cell by cell for tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.plots: dict[str, str] = {}
        self._hidden = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._hidden = tag in ("script", "style")
        found = dict(attrs)
        if found.get("class") == "plot":
            self.plots[found.get("id") or ""] = found.get("aria-label") or ""
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        for name, value in attrs:
            if name in ("src", "srcset", "data", "poster", "action") or (name == "href" and tag != "a"):
                self.fetched.append(f"{tag} {name}={value}")
            elif name == "href":
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False
        if tag == "table":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text.append(data)
            if self.rows and self.rows[-1]:
                self.rows[-1][-1] += data

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())


def numbers_in(value: Any) -> set[float]:
    """Every number that some JSON holds."""
    if isinstance(value, dict):
        return set().union(*(numbers_in(v) for v in value.values()), set())
    if isinstance(value, (list, tuple)):
        return set().union(*(numbers_in(v) for v in value), set())
    return {float(value)} if isinstance(value, (int, float)) and not isinstance(value, bool) else set()
