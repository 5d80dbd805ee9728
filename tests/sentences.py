"""``python -m tests.sentences``: writes ``docs/errors.md``, every wrong argument in the tables of the tests with its sentence.

A row of such a table is a tuple with an exception's class, followed by what its message says; the tests hold that it does.
"""

import ast
import builtins
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "errors.md"
HEAD = """# Wrong arguments

What a wrong argument is told, from the tables of the tests, which hold every row. A sentence names the argument, what was
expected and what was given; `...` stands for what is left out here. Written by `python -m tests.sentences`.
"""
LONGEST = 160


def _is_error(node: ast.expr) -> bool:
    kind = getattr(builtins, node.id, None) if isinstance(node, ast.Name) else None
    return isinstance(kind, type) and issubclass(kind, Exception)


def rows(source: str) -> Iterator[tuple[str, str, str]]:
    """What was given, the error and its sentence, of every such tuple in a test's source."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Tuple) or len(node.elts) < 3:
            continue
        *given, error, sentence = node.elts
        if not _is_error(error) or not isinstance(sentence, ast.Constant) or not isinstance(sentence.value, str):
            continue
        shown = [ast.unparse(part.body if isinstance(part, ast.Lambda) else part) for part in given]
        yield ", ".join(shown), error.id, sentence.value  # type: ignore[attr-defined]


def _cell(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return "`" + (text if len(text) <= LONGEST else text[:LONGEST] + " ...").replace("`", "'") + "`"


def page() -> str:
    parts = [HEAD]
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        if found := list(rows(path.read_text())):
            lines = [f"| {_cell(given)} | {error} | {_cell(sentence)} |" for given, error, sentence in found]
            parts.append("\n".join([f"## {path.name}\n", "| given | error | sentence |", "|---|---|---|", *lines]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE.relative_to(ROOT)}: {page().count(chr(10) + '| `')} rows")
