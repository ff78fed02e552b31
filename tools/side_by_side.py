"""Two scripts side by side, as one page of HTML that needs nothing else.

    python -m tools.side_by_side mmaml.py kml.py        writes docs/mmaml-kml.html

Functions and classes of the same name stand beside each other; inside them, lines are matched by difflib. Stretches of
lines that are equal are folded, differences are marked down to the word. Docstrings and comments that stand alone are
set as prose. On a narrow screen there is one column, and a switch says which file it shows.
"""

import ast
import difflib
import html
import io
import re
import tokenize
from pathlib import Path
from typing import NamedTuple

from data import atomic_write, fail, new_parser, user_path

FOLD_FROM = 4  # equal lines in a row; fewer stay open
CONTEXT = 1  # equal lines that stay open beside a difference
SIDES = ("left", "right")
PAGES = (("mmaml", "kml"), ("kml", "mprotonet"), ("mmaml", "modgrad"))  # those under docs/
COLUMNS = re.compile(r"\S {2,}\S|^ {4,}\w.*=")  # a line of a table, or an equation, in a docstring
LIKE = 0.6  # of their words two lines must have in common, so that single words are marked
WORDS = re.compile(r"\w+|\s+|[^\w\s]")


class Line(NamedTuple):
    """A line of a file: its number, its text, and its kind: "prose" (docstring, comment) or "code"."""

    number: int
    text: str
    kind: str


class Block(NamedTuple):
    """A stretch of a file that has a name: a function, a class, or what stands between them."""

    name: str
    lines: list


# --------------------------------------------------------------------------------------------------- reading


def read(path):
    """Read a script -> [Block], whose lines are all lines of the file, in order."""
    try:
        source = Path(path).read_text()
        tree = ast.parse(source)
    except FileNotFoundError:
        fail(f"there is no {path}: name two Python files, for example mmaml.py kml.py")
    except (OSError, SyntaxError, ValueError) as error:
        fail(f"{path} cannot be read as Python ({error}): name two Python files")
    texts = source.splitlines()
    prose = prose_lines(source, tree)
    lines = []
    for number, text in enumerate(texts, 1):
        lines.append(Line(number, text, "prose" if number in prose else "code"))
    blocks, at = [], 0
    for name, first, last in named_stretches(tree, texts):
        blocks.append(Block(name, lines[at if not blocks else first - 1 : last]))
        at = last
    return [block for block in blocks if block.lines]


def named_stretches(tree, texts):
    """Cut a file where functions and classes begin -> [(name, first line, last line)], without gaps."""
    starts = [("docstring and imports", 1)]
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            decorators = [d.lineno for d in node.decorator_list]
            starts.append((node.name, min([node.lineno, *decorators])))
    starts = [(name, with_comment(texts, first)) for name, first in starts]
    ends = [first - 1 for _, first in starts[1:]] + [len(texts)]
    return [(name, first, last) for (name, first), last in zip(starts, ends)]


def with_comment(texts, first):
    """The first line of the comment above a line, or that line."""
    while first > 1 and texts[first - 2].startswith("#"):
        first -= 1
    return first


def prose_lines(source, tree):
    """Numbers of the lines that hold a docstring, or a comment and nothing else."""
    numbers = set()
    for node in ast.walk(tree):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            string = node.body[0]
            numbers.update(range(string.lineno, string.end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
            numbers.add(token.start[0])
    return numbers


# -------------------------------------------------------------------------------------------------- matching


def pair_blocks(left, right):
    """Put blocks of one name beside each other -> [(Block or None, Block or None)], each file's in its order."""
    names = [[block.name for block in blocks] for blocks in (left, right)]
    pairs = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, *names, autojunk=False).get_opcodes():
        if kind == "equal":
            pairs += list(zip(left[a:b], right[c:d]))
        else:
            pairs += [(block, None) for block in left[a:b]]
            pairs += [(None, block) for block in right[c:d]]
    return pairs


def rows_of(left, right):
    """Match the lines of two blocks -> [(Line or None, Line or None, whether they are equal)]."""
    texts = [[line.text for line in lines] for lines in (left, right)]
    rows = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, *texts, autojunk=False).get_opcodes():
        ours, theirs = left[a:b], right[c:d]
        longest = max(len(ours), len(theirs))
        ours = ours + [None] * (longest - len(ours))
        theirs = theirs + [None] * (longest - len(theirs))
        rows += [(one, two, kind == "equal") for one, two in zip(ours, theirs)]
    return rows


def stretches(rows):
    """Cut rows where equality changes -> [(rows, whether they are to be folded)]."""
    found, at = [], 0
    while at < len(rows):
        end = at
        while end < len(rows) and rows[end][2] == rows[at][2]:
            end += 1
        found += folded(rows, at, end)
        at = end
    return found


def folded(rows, at, end):
    """Fold the middle of rows at .. end - 1, if they are equal and many."""
    before = CONTEXT if at else 0
    after = CONTEXT if end < len(rows) else 0
    inside = rows[at + before : end - after]
    if not rows[at][2] or len(inside) < FOLD_FROM:
        return [(rows[at:end], False)]
    parts = [(rows[at : at + before], False), (inside, True), (rows[end - after : end], False)]
    return [part for part in parts if part[0]]


# --------------------------------------------------------------------------------------------------- writing


def page(left_path, right_path):
    """Make the page -> HTML."""
    names = [Path(path).name for path in (left_path, right_path)]
    left, right = read(left_path), read(right_path)
    pairs = pair_blocks(left, right)
    sections, contents, equal, different = [], [], 0, 0
    for number, (one, two) in enumerate(pairs):
        rows = rows_of(one.lines if one else [], two.lines if two else [])
        name = (one or two).name
        changed = sum(not same for *_, same in rows)
        different += changed
        equal += len(rows) - changed
        sections.append(section(number, name, rows, one, two))
        mark = ' class="changed"' if changed else ""
        contents.append(f'<li{mark}><a href="#b{number}">{html.escape(name)}</a></li>')
    return TEMPLATE.format(
        title=f"{names[0]} beside {names[1]}",
        left=html.escape(names[0]),
        right=html.escape(names[1]),
        equal=equal,
        different=different,
        contents="\n".join(contents),
        sections="\n".join(sections),
        style=STYLE,
    )


def section(number, name, rows, one, two):
    """One pair of blocks -> HTML."""
    alone = "" if one and two else f" <small>only in the {'left' if one else 'right'} file</small>"
    parts = [f'<section id="b{number}"><h2>{html.escape(name)}{alone}</h2>']
    for part, fold in stretches(rows):
        body = "\n".join(row(*entry) for entry in part)
        if fold:
            parts.append(f"<details><summary>{len(part)} equal lines</summary>\n{body}\n</details>")
        else:
            parts.append(body)
    return "\n".join([*parts, "</section>"])


def row(one, two, same):
    """One pair of lines -> HTML. Words that differ are marked."""
    if same or one is None or two is None:
        texts = [html.escape(line.text) if line else "" for line in (one, two)]
    else:
        texts = marked(one.text, two.text)
    cells = [cell(side, line, text) for side, line, text in zip(SIDES, (one, two), texts)]
    return f'<div class="{"row" if same else "row differs"}">{"".join(cells)}</div>'


def cell(side, line, text):
    """One line of one file -> HTML."""
    if line is None:
        return f'<div class="{side} none"></div>'
    kind = line.kind if line.text.strip() else "blank"
    if kind == "prose" and COLUMNS.search(line.text):
        kind = "prose table"
    return (
        f'<div class="{side} {kind}"><a>{line.number}</a>'
        f'<pre data-file="{side}" data-line="{line.number}">{text}</pre></div>'
    )


def marked(one, two):
    """Mark the words that two lines do not have in common -> HTML of both."""
    words = [WORDS.findall(text) for text in (one, two)]
    found = ["", ""]
    matcher = difflib.SequenceMatcher(None, *words, autojunk=False)
    if matcher.ratio() < LIKE:  # two lines that merely stand beside each other
        return [html.escape(one), html.escape(two)]
    for kind, a, b, c, d in matcher.get_opcodes():
        pieces = ("".join(words[0][a:b]), "".join(words[1][c:d]))
        for i, piece in enumerate(map(html.escape, pieces)):
            found[i] += f"<mark>{piece}</mark>" if kind != "equal" and piece else piece
    return found


STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --soft: #6b7280; --line: #e4e7eb; --tint: #f6f7f9;
  --left: #fdeceb; --left-word: #f9b8b3; --right: #e7f6ec; --right-word: #a4dfb6; --link: #1f5fbf; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #dde1e6; --soft: #8b94a0; --line: #2a2f36;
  --tint: #1a1e23; --left: #3a1f1f; --left-word: #7d3430; --right: #17301f; --right-word: #2a6b3f; --link: #7fb0f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
header, nav, main { max-width: 1700px; margin: 0 auto; padding: 0 16px; }
h1 { font-size: 22px; margin: 20px 0 4px; } h2 { font: 600 15px/1.4 ui-monospace, monospace; margin: 22px 0 6px; }
h2 small { font: 13px system-ui, sans-serif; color: var(--soft); }
header p { margin: 6px 0; max-width: 75ch; } a { color: var(--link); text-decoration: none; }
nav ul { list-style: none; margin: 10px 0; padding: 0; font: 13px/1.9 ui-monospace, monospace; }
nav li { display: inline-block; margin-right: 14px; } nav li.changed::after { content: " \\2260"; color: var(--soft); }
section { border-top: 1px solid var(--line); }
.row { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); }
.row > div { display: flex; min-width: 0; border-left: 1px solid var(--line); }
.row a { flex: 0 0 3.2em; text-align: right; padding-right: .8em; color: var(--soft); font: 11px/20px ui-monospace, monospace;
  user-select: none; }
pre { margin: 0; flex: 1; min-width: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 12.5px/20px ui-monospace, Menlo,
  Consolas, monospace; padding-left: 2px; }
.prose { background: var(--tint); } .prose pre { font: 14px/20px Georgia, 'Times New Roman', serif; }
.table pre { font: 12px/20px ui-monospace, Menlo, Consolas, monospace; }
.differs .left:not(.none) { background: var(--left); } .differs .right:not(.none) { background: var(--right); }
mark { color: inherit; border-radius: 3px; } .left mark { background: var(--left-word); }
.right mark { background: var(--right-word); }
details { background: var(--paper); } summary { cursor: pointer; color: var(--soft); font-size: 12px; padding: 2px 0 2px 3.2em;
  border: 1px solid var(--line); border-width: 1px 0; background: var(--tint); }
.switch { display: none; } input[name=show] { position: absolute; opacity: 0; pointer-events: none; }
@media (max-width: 800px) {
  .switch { display: flex; position: sticky; top: 0; z-index: 1; background: var(--paper); border-bottom: 1px solid var(--line); }
  .switch label { flex: 1; text-align: center; padding: 10px 4px; font: 13px ui-monospace, monospace; color: var(--soft); }
  .row { grid-template-columns: minmax(0, 1fr); } .row a { flex-basis: 2.6em; }
  #show-left:checked ~ .switch label[for=show-left], #show-right:checked ~ .switch label[for=show-right],
  #show-both:checked ~ .switch label[for=show-both] { color: var(--ink); border-bottom: 2px solid var(--link); }
  #show-left:checked ~ main .right, #show-right:checked ~ main .left { display: none; }
  #show-both:checked ~ main .row:not(.differs) .right, #show-both:checked ~ main .none { display: none; }
}
"""

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<input type="radio" name="show" id="show-both" checked><input type="radio" name="show" id="show-left"><input type="radio" \
name="show" id="show-right">
<div class="switch"><label for="show-both">differences</label><label for="show-left">{left}</label><label \
for="show-right">{right}</label></div>
<header>
<h1>{left} beside {right}</h1>
<p>Functions of the same name stand beside each other. {equal} pairs of lines are equal, and folded where there are many;
{different} differ, and the words that differ are marked. Shaded lines are prose: docstrings and comments.</p>
</header>
<nav><ul>
{contents}
</ul></nav>
<main>
{sections}
</main>
</body>
</html>
"""


def main():
    parser = new_parser(__doc__, "")
    parser.add_argument("left", metavar="LEFT.py", help="script in the left column")
    parser.add_argument("right", metavar="RIGHT.py", help="script in the right column")
    parser.add_argument("--out", type=user_path, help="the page (docs/LEFT-RIGHT.html)")
    args = parser.parse_args()
    out = args.out or f"docs/{Path(args.left).stem}-{Path(args.right).stem}.html"
    atomic_write(out, page(args.left, args.right))
    print(out)


if __name__ == "__main__":
    main()
