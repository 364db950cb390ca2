"""Finds the names that a document uses, and compares them with the names that the code defines."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from itertools import pairwise
from pathlib import PurePosixPath
from posixpath import normpath

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.support.repository import ROOT

_MARKDOWN = MarkdownIt("commonmark").enable("table")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_FILE = re.compile(r"[\w./*-]*[\w*]\.(?:py|md|proto|toml|txt|yml|json|js|html|css|service)")
_OPTION = re.compile(r"(?<![\w-])--[a-z][\w.-]*")
_COMMAND = re.compile(r"(?:^|[\s$])foreshock ([a-z][\w-]*)")
_TARGET = re.compile(r"(?:^|\s)make ([a-z][\w-]*)")


@dataclass(frozen=True, kw_only=True)
class Names:
    """Holds everything that a document may name."""

    alerts: frozenset[str]
    series: frozenset[str]
    """Metric families, and the sample names of histograms."""
    variables: frozenset[str]
    dashboards: frozenset[str]
    options: Mapping[str, frozenset[str]]
    """Options of each command, without `--help`."""
    targets: frozenset[str]
    """Every target of the Makefile."""
    listed_targets: frozenset[str]
    """Targets that `make help` lists."""
    script_options: frozenset[str]
    """Options of the scripts in examples/ and benchmarks/, and of those that make runs."""
    foreign_options: Mapping[str, frozenset[str]]
    """Options of other programs that the documents use."""
    foreign_words: frozenset[str]
    """Names that look like a series or a file of the repository, and are something else."""
    tests: frozenset[str]
    paths: frozenset[str]
    """Files and folders of the repository, relative to its root."""


@dataclass(frozen=True)
class Document:
    """A Markdown file, or the part of it to check."""

    path: str
    """Relative to the root of the repository."""
    text: str

    def code(self) -> Iterator[tuple[str, str]]:
        """Yield each piece of code with its context: the paragraph or table row, or the block of code."""
        cells: list[Token] = []
        for token in self._tokens():
            if token.type in ("fence", "code_block"):
                yield from ((line, token.content) for line in token.content.splitlines())
            elif token.type == "inline":
                cells.append(token)
            if token.type in ("paragraph_close", "heading_close", "tr_close"):
                context = " ".join(cell.content for cell in cells)
                yield from ((code, context) for cell in cells for code in _inline(cell))
                cells = []

    def links(self) -> list[str]:
        """Return the targets of links and images."""
        children = [child for token in self._tokens() for child in token.children or ()]
        found = [child.attrs.get("href") or child.attrs.get("src") for child in children]
        return [str(target) for target in found if target]

    def anchors(self) -> set[str]:
        """Return the anchors that forges give to the headings."""
        tokens = self._tokens()
        headings = [text.content for mark, text in pairwise(tokens) if mark.type == "heading_open"]
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    def section(self, heading: str) -> str:
        """Return the text under the second-level heading that begins with `heading`; empty if there is none."""
        parts = re.split(r"^## ", self.text, flags=re.MULTILINE)
        return next((part for part in parts[1:] if part.startswith(heading)), "")

    def _tokens(self) -> list[Token]:
        return _parsed(self.text)


@cache
def _parsed(text: str) -> list[Token]:
    return _MARKDOWN.parse(text)


def repository_documents() -> list[Document]:
    """Return every document of the repository, and of the changelog only the part about the current version."""
    folders = (ROOT / name for name in ("docs", "benchmarks", "examples"))
    pages = [*ROOT.glob("*.md"), *(page for folder in folders for page in folder.rglob("*.md"))]
    found = [Document(str(page.relative_to(ROOT)), page.read_text("utf-8")) for page in sorted(pages)]
    return [replace(each, text=_current(each.text)) if each.path == "CHANGELOG.md" else each for each in found]


def _current(changelog: str) -> str:
    _, newest, *_ = re.split(r"^## ", changelog, flags=re.MULTILINE)
    return newest


def _inline(token: Token) -> list[str]:
    return [child.content for child in token.children or () if child.type == "code_inline"]


def unknown_alerts(document: Document, names: Names) -> list[str]:
    """Return alerts that do not exist, and wrong counts of alerts."""
    found = re.findall(r"\bForeshock(?!Callback\b)[A-Z]\w+", document.text)
    return [name for name in found if name not in names.alerts] + _wrong_counts(document, "alerts", len(names.alerts))


def unknown_series(document: Document, names: Names) -> list[str]:
    """Return series that do not exist. A name that ends in an underscore stands for those that begin with it."""
    return _unknown(re.findall(r"\bforeshock_\w+", document.text), names.series | names.foreign_words)


def unknown_variables(document: Document, names: Names) -> list[str]:
    """Return environment variables that do not exist."""
    return _unknown(re.findall(r"\bFORESHOCK_\w*", document.text), names.variables)


def unknown_dashboards(document: Document, names: Names) -> list[str]:
    """Return dashboards that do not exist, and wrong counts of dashboards."""
    found = re.findall(r"`(\w+)` dashboard\b|/d/foreshock-(\w+)", document.text)
    listed = [name for table in _tables(document, "dashboard") for name in re.findall(r"^\| `(\w+)` \|", table, re.M)]
    unknown = {name for pair in found for name in pair if name} | set(listed)
    count = _wrong_counts(document, "dashboards", len(names.dashboards))
    return sorted(unknown - names.dashboards) + count


def unknown_commands(document: Document, names: Names) -> list[str]:
    """Return subcommands of `foreshock` that do not exist."""
    return [name for code, _ in document.code() for name in _COMMAND.findall(code) if name not in names.options]


def unknown_targets(document: Document, names: Names) -> list[str]:
    """Return make targets that do not exist."""
    return [name for code, _ in document.code() for name in _TARGET.findall(code) if name not in names.targets]


def unknown_options(document: Document, names: Names) -> list[str]:
    """Return options that their command does not have; without a command nearby, that no command has."""
    found = []
    for code, context in document.code():
        allowed = {"--help", "--version"}
        commands = [name for name in _COMMAND.findall(code) if name in names.options]
        for command in commands or names.options:
            allowed |= names.options[command]
        if re.search(r"\bmake |ARGS|python -m|examples/|benchmarks/", f"{document.path} {context}"):
            allowed |= names.script_options
        for program, options in names.foreign_options.items():
            if re.search(rf"\b{program}\b", context):
                allowed |= options
        found += [option for option in _OPTION.findall(code) if option not in allowed]
    return found


def unknown_tests(document: Document, names: Names) -> list[str]:
    """Return tests that do not exist."""
    found = [name for code, _ in document.code() for name in re.findall(r"^test_\w+(?=$|\[)", code)]
    return [name for name in found if name not in names.tests]


def missing_files(document: Document, names: Names) -> list[str]:
    """Return files and folders that do not exist, in code, in links, or named with their folder in prose."""
    roots = {path.partition("/")[0] for path in names.paths if "/" in path}
    words = re.findall(rf"(?<![\w./@-])(?:{'|'.join(map(re.escape, sorted(roots)))})/[\w./*-]*\w", document.text)
    for code, _ in document.code():
        words += [word for word in re.split(r"[\s=:]+", code) if _FILE.fullmatch(word) and not word.startswith("/")]
    links = [target.partition("#")[0] for target in document.links() if "://" not in target]
    here = PurePosixPath(document.path).parent
    found = [word for word in words if word not in names.foreign_words and not _exists(word, names.paths)]
    found += [target for target in links if target and normpath(here / target) not in names.paths]
    return list(dict.fromkeys(found))


CHECKS: dict[str, Callable[[Document, Names], list[str]]] = {
    "alert": unknown_alerts,
    "series": unknown_series,
    "environment variable": unknown_variables,
    "dashboard": unknown_dashboards,
    "command": unknown_commands,
    "make target": unknown_targets,
    "option": unknown_options,
    "test": unknown_tests,
    "file": missing_files,
}
"""What each check looks for in one document."""


def missing_anchors(documents: Iterable[Document]) -> list[str]:
    """Return links to headings that do not exist."""
    known = {document.path: document for document in documents}
    found = []
    for document in known.values():
        for target in document.links():
            file, _, anchor = target.partition("#")
            path = normpath(PurePosixPath(document.path).parent / file) if file else document.path
            if anchor and path in known and anchor not in known[path].anchors():
                found.append(f"{document.path}: {target}")
    return found


def omissions(documents: Iterable[Document], names: Names) -> list[str]:
    """Return everything that exists and that the documents leave out."""
    known = {document.path: document for document in documents}
    metrics, grafana, configuration = (known[f"docs/{name}.md"] for name in ("metrics", "grafana", "configuration"))
    commands, everything = known["docs/commands.md"], "\n".join(document.text for document in known.values())
    linked = {normpath(PurePosixPath(d.path).parent / t.partition("#")[0]) for d in known.values() for t in d.links()}
    found = [f"runbook of {name}" for name in names.alerts if f"docs/runbooks/{name}.md" not in known]
    found += [f"alert {name}" for name in names.alerts if name not in metrics.text]
    found += [f"series {name}" for name in names.series if name not in metrics.text and not _sample(name, names.series)]
    found += [f"dashboard {name}" for name in names.dashboards if f"| `{name}` |" not in grafana.text]
    found += [f"variable {name}" for name in names.variables if f"`{name}`" not in configuration.text]
    for command, options in names.options.items():
        section = commands.section(f"foreshock {command}")
        found += [] if section else [f"command {command}"]
        text = section + (configuration.text if command == "collector" else "")
        found += [f"option {option} of {command}" for option in options if not re.search(rf"`[^`\n]*{option}\b", text)]
    found += [f"make {name}" for name in names.listed_targets if not re.search(rf"\bmake {name}(?![\w-])", everything)]
    found += [
        f"link to {path}"
        for path in known
        if path.startswith("docs/") and not {path, path.removesuffix("/README.md")} & linked
    ]
    return found


def _unknown(found: Iterable[str], known: frozenset[str]) -> list[str]:
    return [
        name
        for name in found
        if name not in known and not (name.endswith("_") and any(each.startswith(name) for each in known))
    ]


def _wrong_counts(document: Document, word: str, count: int) -> list[str]:
    found = re.findall(rf"\b({'|'.join(_NUMBERS)}|\d+) (?:Grafana )?{word}\b", document.text, re.IGNORECASE)
    return [
        f"{said} {word}" for said in found if said.lower() not in (str(count), _NUMBERS[count] if count < 13 else "")
    ]


def _tables(document: Document, heading: str) -> list[str]:
    return re.findall(rf"^\| {heading} \|.*\n((?:\|.*\n)+)", document.text, re.MULTILINE)


def _sample(name: str, series: frozenset[str]) -> bool:
    """Return whether this is a sample name of a histogram, such as `x_bucket`."""
    base, _, suffix = name.rpartition("_")
    return suffix in ("bucket", "sum", "count") and base in series


def _exists(word: str, paths: frozenset[str]) -> bool:
    wanted = word.rstrip("/")
    return any(fnmatchcase(path, wanted) or fnmatchcase(path, f"*/{wanted}") for path in paths)
