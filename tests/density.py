"""How dense the code of a file is: tokens per line, length and nesting of functions, and what no line should hold.

python -m tests.density kml.py mmaml.py        # a table
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
BLOCKS = (ast.For, ast.While, ast.If, ast.With, ast.Try)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def docstring_lines(tree):
    """Numbers of the lines that docstrings cover."""
    covered = set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) or not node.body:
            continue
        first = node.body[0]
        if (
            isinstance(first, ast.Expr)
            and isinstance(first.value, ast.Constant)
            and isinstance(first.value.value, str)
        ):
            covered.update(range(first.lineno, first.end_lineno + 1))
    return covered


def code_lines(text):
    """-> {line number: number of code tokens on it}, without comments and docstrings."""
    skipped = docstring_lines(ast.parse(text))
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        line = token.start[0]
        if token.type not in LAYOUT and line not in skipped:
            found[line] = found.get(line, 0) + 1
    return found


def table_lines(tree):
    """Numbers of the lines of module-level assignments: tables of data."""
    covered = set()
    for node in tree.body:
        if isinstance(node, ast.Assign):
            covered.update(range(node.lineno, node.end_lineno + 1))
    return covered


def nesting(function):
    """Depth of the deepest block within a function; a function inside it starts anew; `elif` does not nest."""

    def depth(node, level):
        deepest = level
        for child in ast.iter_child_nodes(node):
            if isinstance(child, FUNCTIONS):
                continue
            is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
            inner = level + 1 if isinstance(child, BLOCKS) and not is_elif else level
            deepest = max(deepest, depth(child, inner))
        return deepest

    return depth(function, 0)


def oddities(text):
    """Lines that must be read twice -> [(line number, what is odd)]."""
    tree = ast.parse(text)
    data = table_lines(tree)
    found = [(line, f"{n} tokens") for line, n in code_lines(text).items() if n > 28 and line not in data]
    for node in ast.walk(tree):
        if isinstance(node, COMPREHENSIONS):
            inner = [x for x in ast.walk(node) if isinstance(x, COMPREHENSIONS) and x is not node]
            if inner:
                found.append((node.lineno, "a comprehension inside a comprehension"))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for one, other in ((node.left, node.right), (node.right, node.left)):
                text_or_list = isinstance(one, (ast.List, ast.JoinedStr)) or (
                    isinstance(one, ast.Constant) and isinstance(one.value, str)
                )
                truth = isinstance(other, (ast.Compare, ast.BoolOp)) or (
                    isinstance(other, ast.UnaryOp) and isinstance(other.op, ast.Not)
                )
                if text_or_list and truth:
                    found.append((node.lineno, "a string or list times a truth value"))
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Tuple)
            and isinstance(node.value, ast.Tuple)
        ):
            if len(node.value.elts) > 2:
                found.append((node.lineno, "a tuple assignment of more than two values"))
    return sorted(found)


def measure(text):
    """-> {"lines", "tokens", "per_line", "longest": (lines, name), "nesting": (depth, name)}."""
    tree = ast.parse(text)
    counts = code_lines(text)
    skipped = docstring_lines(tree)
    longest, deepest = (0, ""), (0, "")
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            lines = [n for n in range(node.lineno, node.end_lineno + 1) if n in counts and n not in skipped]
            longest = max(longest, (len(lines), node.name))
            deepest = max(deepest, (nesting(node), node.name))
    total = sum(counts.values())
    return {
        "lines": len(text.splitlines()),
        "code_lines": len(counts),
        "tokens": total,
        "per_line": total / max(1, len(counts)),
        "longest": longest,
        "nesting": deepest,
    }


def main():
    print(f"{'file':28}{'lines':>7}{'code':>7}{'tokens':>8}{'per line':>10}  longest function        nesting")
    for name in sys.argv[1:]:
        text = Path(name).read_text()
        found = measure(text)
        longest, deepest = ("{} {}".format(*found[key]) for key in ("longest", "nesting"))
        numbers = f"{found['lines']:7}{found['code_lines']:7}{found['tokens']:8}{found['per_line']:10.1f}"
        print(f"{name:28}{numbers}  {longest:24}{deepest}")
        for line, what in oddities(text):
            print(f"    {name}:{line}: {what}")


if __name__ == "__main__":
    main()
