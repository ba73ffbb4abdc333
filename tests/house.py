"""The house in figures: `python -m tests.house`. Lines of code, the longest functions, and imports between rooms."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = (
    ("errors", "layout"),
    ("store",),
    ("config",),
    ("runtime", "checkpoint"),
    ("distributed", "output"),
    ("context", "model"),
    ("data",),
    ("evaluate",),
    ("export", "prefetch"),
    ("report", "planning"),
    ("train",),
    ("publish",),
    ("run", "render", "predict", "look", "serve", "init"),
    ("cli",),
    ("__main__",),
    ("torchrun",),
)
"""Rooms from the ground up. A room imports from the floors below it, and rooms of one floor import nothing of each other."""


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Files by dotted name."""
    files = sorted((root / "job").rglob("*.py"))
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(root: Path = ROOT) -> Iterator[tuple[str, str]]:
    """Pairs of modules: who imports, and what, wherever in the file the import stands. What only types need does not count."""
    known = modules(root)
    for name, file in known.items():
        tree = ast.parse(file.read_text())
        types = {
            node
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
            for node in block.body
        }
        for node in ast.walk(tree):
            if node not in types and isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "job":
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    yield name, full if full in known else str(node.module)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def upward(root: Path = ROOT) -> list[str]:
    """Imports that do not point down."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    return sorted(
        f"{who} imports {what}"
        for who, what in set(imports(root))
        if room(who) != room(what) and "job" not in (who, what) and floor[room(what)] >= floor[room(who)]
    )


def circles(root: Path = ROOT) -> list[list[str]]:
    """Groups of modules that import each other, in whatever way round: strongly connected components (Tarjan 1972)."""
    graph: dict[str, list[str]] = {name: [] for name in modules(root)}
    for who, what in set(imports(root)):
        graph[who].append(what)
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in graph[node]:
            if other not in number:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], number[other])
        if low[node] == number[node]:
            at = stack.index(node)
            component = stack[at:]
            del stack[at:]
            if len(component) > 1:
                found.append(sorted(component))

    for name in graph:
        if name not in number:
            visit(name)
    return found


def code_lines(file: Path) -> int:
    """Lines with code on them: without blank lines, comments and docstrings."""
    text = file.read_text()
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in skipped
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def functions(root: Path = ROOT) -> Iterator[tuple[int, str]]:
    """Lines of each function, its docstring left out, and its name."""
    for name, file in modules(root).items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[0]
                doc = ast.get_docstring(node) is not None
                length = (node.end_lineno or 0) - node.lineno + 1
                yield length - (((first.end_lineno or 0) - first.lineno + 1) if doc else 0), f"{name}.{node.name}"


def main() -> None:
    total = sum(map(code_lines, modules().values()))
    pairs = {(room(who), room(what)) for who, what in imports() if room(who) != room(what)}
    lengths = sorted(functions(), reverse=True)
    print(f"{total:,} lines of code in {len(modules())} files, {len(lengths)} functions")
    print(f"{len(pairs)} arrows between {len({name for pair in pairs for name in pair})} rooms on {len(FLOORS)} floors")
    print(f"{len(upward())} imports upward, {len(circles())} circles of modules")
    for line in upward():
        print(f"  {line}")
    for group in circles():
        print(f"  circle: {', '.join(group)}")
    for length, name in lengths[:12]:
        print(f"  {length} lines: {name}")


if __name__ == "__main__":
    main()
