"""For mkdocs: a paragraph of links to tests becomes the source of each, folded.

On a page a test is a link, whose words are the name that pytest takes:
[`test_x.py::test_name`](../tests/test_x.py). So it leads somewhere wherever the page is read; the
site has no tests that a link could lead to.

The heading of a method is one level below that of its class, which the page itself has. Short words
in code, such as options, are not broken.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
INLINE = re.compile(r"(?<!<span></span><code>)(?<=<code>)[^<]+(?=</code>)")
WORD = re.compile(r"(?<!\S)\S{1,34}(?!\S)")
LINK = re.compile(r"\[`([\w/]+\.py)::(\w+)`\]\(\.\./tests/([\w/]+\.py)\)")


def source(file: str, name: str) -> str:
    """The test `name` as it stands in `file`, decorators included; KeyError where there is none."""
    text = (TESTS / file).read_text(encoding="utf-8")
    functions = {
        node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)
    }
    found = functions[name]
    first = min([found.lineno, *(decorator.lineno for decorator in found.decorator_list)])
    return "\n".join(text.splitlines()[first - 1 : found.end_lineno])


def on_page_content(html: str, **_: object) -> str:
    """The page, with headings of methods one level higher, and short words of code unbroken."""
    html = html.replace("<h5 ", "<h4 ").replace("</h5>", "</h4>")
    return INLINE.sub(lambda code: WORD.sub(r'<span class="word">\g<0></span>', code[0]), html)


def on_page_markdown(markdown: str, **_: object) -> str:
    """The page, with tests in the place of links to them."""
    return "\n\n".join(map(_with_sources, markdown.split("\n\n")))


def _with_sources(paragraph: str) -> str:
    tests = [(file, name) for _, name, file in LINK.findall(paragraph)]
    return "\n\n".join(_folded(file, name) for file, name in tests) or paragraph


def _folded(file: str, name: str) -> str:
    lines = "\n".join(f"    {line}".rstrip() for line in source(file, name).splitlines())
    return f'??? example "Shown by `tests/{file}::{name}`"\n\n    ```python\n{lines}\n    ```'
