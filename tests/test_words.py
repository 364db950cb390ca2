"""Code and prose use the field's words: the old ones are gone, and docstrings of classes are sentences."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.documents import Document, repository_documents
from tests.support.repository import ROOT

CODE = (
    "agent/foreshock", "agent/foreshock_recorder", "collector/foreshock_collector", "grafana",
    "protos/foreshock_protos",
)  # fmt: skip
STATIC = "collector/foreshock_collector/web/static"
OLD_NAMES = {
    *("anew", "board", "bucketwatcher", "courses", "farewell", "goodbye", "greet", "greeted", "hear", "heard", "judge"),
    *(
        "judged",
        "judging",
        "kernels",
        "lookout",
        "loudest",
        "resting",
        "ruling",
        "settle",
        "settled",
        "shipped",
    ),
    *("said", "say", "standstill", "story", "stretch", "tell", "telling", "thinned", "told", "unlike"),
}
"""Words that no identifier contains."""
OLD_TEXT = re.compile(
    r"\b(?:all alike|and acts not|anew|anybody|as announced|asking every|at hand|by and by|goes together with|heard"
    r"|hears|is written for|looked at now and then|needs nobody|no word from|nobody|not told|not any more"
    r"|old since|reading the runs|ruin the weights|those that|told|training goes on|(?-i:What runs)|without a word)\b",
    re.IGNORECASE,
)
"""Words and phrases that no user reads."""
Findings = dict[Callable[[ast.AST], list[str]], dict[str, list[str]]]
BRITISH = re.compile(
    r"\b(?:behaviour|colour|favour|grey|initialis|learnt|misspelt|neighbour|normalis|optimis|recognis|serialis|towards)\w*",
    re.IGNORECASE,
)
FRAGMENT = re.compile(r"(?:Of|Those|All|What|The one|The same|How|Where|Whether|Its|That|As)\b")
"""Beginnings of docstrings that are no sentence about the class."""


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        for field in ("name", "id", "attr", "arg"):
            if isinstance(name := getattr(node, field, None), str):
                yield getattr(node, "lineno", 0), name


def old_names(tree: ast.AST) -> list[str]:
    """Return the identifiers that contain an old word, with their lines."""
    return [
        f"{line}: {name}"
        for line, name in identifiers(tree)
        if OLD_NAMES & {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}
    ]


def old_texts(tree: ast.AST) -> list[str]:
    """Return the strings that users may read and that contain an old phrase, with their lines; docstrings excluded."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        f"{node.lineno}: {found[0]}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
        if " " in node.value and (found := OLD_TEXT.search(node.value))
    ]


def fragments(tree: ast.AST) -> list[str]:
    """Return the classes whose docstring is no sentence about the class."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return [f"{node.lineno}: {node.name}" for node in classes if FRAGMENT.match(ast.get_docstring(node) or "")]


@pytest.fixture(scope="module")
def findings() -> Findings:
    """What each function finds, by module; each module is parsed once."""
    found: Findings = {old_names: {}, old_texts: {}, fragments: {}}
    modules = [path for folder in CODE for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(modules) > 200
    for path in modules:
        tree = ast.parse(path.read_text("utf-8"))
        for find, by_module in found.items():
            if wrong := find(tree):
                by_module[str(path.relative_to(ROOT))] = wrong
    return found


def test_no_identifier_has_an_old_name(findings: Findings) -> None:
    assert findings[old_names] == {}


def test_no_message_has_an_old_phrase(findings: Findings) -> None:
    assert findings[old_texts] == {}


@pytest.mark.parametrize("path", sorted((ROOT / STATIC).glob("*.[hj]*")), ids=lambda path: path.name)
def test_the_page_has_no_old_phrase(path: Path) -> None:
    assert OLD_TEXT.findall(path.read_text("utf-8")) == []


@pytest.mark.parametrize("document", repository_documents(), ids=lambda document: document.path)
def test_no_document_has_an_old_phrase(document: Document) -> None:
    assert OLD_TEXT.findall(document.text) == []


def test_spelling_is_american() -> None:
    folders = ("agent", "collector", "deploy", "docs", "examples", "grafana", "protos")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.*")] + list(ROOT.glob("*.md"))
    texts = {
        path: path.read_text("utf-8") for path in files if path.suffix in (".css", ".html", ".js", ".md", ".py", ".yml")
    }
    assert len(texts) > 150
    assert {str(path): found for path, text in texts.items() if (found := BRITISH.findall(text))} == {}
    assert BRITISH.findall("the colour of a misspelt label") == ["colour", "misspelt"]


def test_every_docstring_of_a_class_is_a_sentence(findings: Findings) -> None:
    assert findings[fragments] == {}


def test_what_is_wrong_is_found() -> None:
    tree = ast.parse('''
class Lookout:
    """Of one rank."""
    def tell(self, last_heard: int) -> str:
        """Nobody is told."""
        return "nobody is told"
''')
    assert old_names(tree) == ["2: Lookout", "4: tell", "4: last_heard"]
    assert old_texts(tree) == ["6: nobody"]
    assert fragments(tree) == ["2: Lookout"]
