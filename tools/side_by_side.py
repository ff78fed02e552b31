"""Two scripts side by side, as one page of HTML that needs nothing else.

python -m tools.side_by_side mmaml.py kml.py        # writes docs/mmaml-kml.html

Functions, classes and constants stand beside their namesakes, and inside such a pair difflib matches lines. Equal
stretches are folded, and differences are marked down to the word. Docstrings, and comments on lines of their
own, are set as prose, with symbols in equations. A switch shows both files or either; a phone has one column.
Every character of both files is on the page, in elements with data-file and data-line.
"""

import ast
import difflib
import functools
import html
import io
import keyword
import re
import tokenize
import unicodedata
from pathlib import Path
from typing import NamedTuple

from data import atomic_write, fail, new_parser, user_path

PAGES = (("mmaml", "kml"), ("kml", "mprotonet"), ("mmaml", "modgrad"))  # those under docs/
SIDES = ("left", "right")
CONTEXT = 2  # equal units that stay open beside a difference
FOLD_FROM = 4  # equal lines in a row; fewer stay open
LIKE = {"code": 0.6, "prose": 0.45}  # the part of their words that two units of a pair share; others: 0.4
LEAST = {"prose": 3}  # words in a row that must agree to count as equal; others: 1
WORDS = re.compile(r"\w+|\s+|[^\w\s]")
RULE = re.compile(r"# ?-{10,} (.+)")  # the comment that begins a part of a script
STYLES = {tokenize.COMMENT: "comment", tokenize.STRING: "string", tokenize.NUMBER: "number"}
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Piece(NamedTuple):
    """Some characters of a line, and the class that styles them; "hidden" is what the page does without."""

    text: str
    style: str


class Unit(NamedTuple):
    """What is matched as a whole: a line of code or of a table, an equation, a paragraph of prose."""

    kind: str  # "code", "blank", "rule"; of prose "prose", "equation", "table", "fixed" (line by line), "gap"
    depth: int  # columns of indentation
    lines: tuple  # ((number, (Piece, ...)), ...)

    @property
    def key(self):
        """What has to be the same for two units to be equal."""
        return self.kind, tuple(text_of(pieces) for _, pieces in self.lines)

    @property
    def first(self):
        """The number of its first line."""
        return self.lines[0][0]


class Item(NamedTuple):
    """A stretch of a file that has a name: a function, a class, a constant, the imports, ..."""

    kind: str
    name: str
    units: list


class Block(NamedTuple):
    """Units beside each other."""

    kind: str  # "equal"; "like", which has one unit on each side; "change"; "only", which has no namesake
    left: list
    right: list
    note: str = ""  # HTML, for the side that is empty


def text_of(pieces):
    """The characters of pieces."""
    return "".join(piece.text for piece in pieces)


# --------------------------------------------------------------------------------------------------- reading


def read(path):
    """Read a script -> [Item], which together hold all its lines in order, and its docstring."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        tree = ast.parse(text)
    except FileNotFoundError:
        fail(f"there is no {path}: name two Python files, for example mmaml.py kml.py")
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        fail(f"{path} cannot be read as Python ({error}): name two Python files")
    lines = text.removesuffix("\n").split("\n") if text else []
    items = [Item("code", "file", [])]
    starts = item_starts(lines, tree)
    for unit in read_units(lines, tree):
        if unit.first in starts:
            kind, name = starts[unit.first]
            items.append(Item(kind, name, []))
        items[-1].units.append(unit)
    return [item for item in items if item.units], ast.get_docstring(tree) or "a script"


def item_starts(lines, tree):
    """The lines where functions, classes, constants and parts begin -> {number: (kind, name)}.

    A comment above one of them belongs to it, and empty lines belong to what stands above them.
    """
    starts = {}
    end, before = 0, None  # the last line of the statement before, and what it is
    above = ["", *lines]
    for node in tree.body:
        decorators = [decorator.lineno for decorator in getattr(node, "decorator_list", ())]
        statement = min([node.lineno, *decorators])
        first = statement
        for number in range(end + 1, statement):
            rule = RULE.match(lines[number - 1])
            if rule:
                starts[number] = ("part", rule[1])
                first, before = statement, None
            elif lines[number - 1].startswith("#") and not above[number - 1].startswith("#"):
                first = min(first, number)
        kind = kind_and_name(node, is_first=end == 0)
        if kind != ("imports", "imports") or before != kind:
            starts.setdefault(first, kind)
        before, end = kind, node.end_lineno
    return starts


def kind_and_name(node, is_first):
    """What a statement of a module is, and its name."""
    if isinstance(node, ast.ClassDef):
        return "class", node.name
    if isinstance(node, DEFINITIONS):
        return "function", node.name
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return "imports", "imports"
    if isinstance(node, ast.Assign):
        return "constant", ast.unparse(node.targets[0])
    if isinstance(node, ast.AnnAssign):
        return "constant", ast.unparse(node.target)
    if is_first and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return "docstring", "docstring"
    return "code", "__main__" if isinstance(node, ast.If) else "statement"


def read_units(lines, tree):
    """The units of a file, in order. Together they hold all its lines."""
    code = styled_code(lines)
    prose = docstrings(lines, tree) | comments(lines)
    units = []
    block = None  # the docstring or comment that the last line belongs to
    for number, line in enumerate(lines, 1):
        before, block = block, None
        kind = "code" if line.strip() else "blank"
        pieces = code[number - 1]
        depth = indentation(line)
        if number in prose:
            block, start, end = prose[number]
            kind, pieces = styled_prose(line, start, end)
            depth = min(depth, start)
        row = (number, tuple(pieces))
        continues = kind == "prose" and block == before
        if continues and units[-1].kind == "prose":
            last = units.pop()
            units.append(last._replace(lines=(*last.lines, row)))
        else:
            units.append(Unit(kind, depth, (row,)))
    return units


def indentation(line):
    """The number of spaces that a line begins with."""
    return len(line) - len(line.lstrip())


def tokens(lines):
    """The tokens of a file. An f-string is one token, as before Python 3.12."""
    depth = 0
    start = None
    text = "\n".join(lines) + "\n"
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        if name.endswith("STRING_START"):
            start = start if depth else token.start
            depth += 1
        elif name.endswith("STRING_END"):
            depth -= 1
            if depth == 0:
                yield tokenize.TokenInfo(tokenize.STRING, "", start, token.end, token.line)
        elif depth == 0:
            yield token


def style_of(token, before):
    """The class that styles a token; `before` is the text of the token before it."""
    if token.type == tokenize.NAME:
        if before in ("def", "class"):
            return "defined"
        return "keyword" if keyword.iskeyword(token.string) else ""
    return STYLES.get(token.type, "")


def styled_code(lines):
    """Lines -> the pieces of each."""
    found = [[] for _ in lines]
    ends = [0] * len(lines)  # the column up to which a line is in pieces
    before = ""
    for token in tokens(lines):
        style = style_of(token, before)
        before = token.string
        first, last = token.start[0] - 1, token.end[0] - 1
        for row in range(first, last + 1) if style else ():
            start = token.start[1] if row == first else 0
            end = token.end[1] if row == last else len(lines[row])
            found[row].append(Piece(lines[row][ends[row] : start], ""))
            found[row].append(Piece(lines[row][start:end], style))
            ends[row] = end
    for line, pieces, end in zip(lines, found, ends):
        pieces.append(Piece(line[end:], ""))
    return [without_empty(pieces) for pieces in found]


def without_empty(pieces):
    """The pieces that hold something."""
    return [piece for piece in pieces if piece.text]


def docstrings(lines, tree):
    """Lines of docstrings -> {number: (first line of the docstring, start, end)}.

    From the column `start` to `end` is what is to be read, without indentation and quotes.
    """
    found = {}
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, *DEFINITIONS)) or ast.get_docstring(node) is None:
            continue
        string = node.body[0]
        first, last = string.lineno, string.end_lineno
        opening = re.match(r"""\s*[rRuU]?("{3}|'{3}|"|')""", lines[first - 1])
        if opening is None or indentation(lines[first - 1]) != string.col_offset:
            continue  # it shares the line with other code
        for number in range(first, last + 1):
            line = lines[number - 1]
            start = min(indentation(line), string.col_offset)
            found[number] = (first, start, len(line))
        found[first] = (first, opening.end(), len(lines[first - 1]))
        start = found[last][1]
        end = len(lines[last - 1].rstrip()) - len(opening[1])
        found[last] = (first, start, max(start, end))
    return found


def comments(lines):
    """The same of comments that stand on lines of their own; the lines of one comment follow each other."""
    found = {}
    for token in tokens(lines):
        number, column = token.start
        if token.type != tokenize.COMMENT or lines[number - 1][:column].strip():
            continue
        first = found[number - 1][0] if number - 1 in found else number
        sign = re.match(r"#+ ?", token.string)
        found[number] = (first, column + sign.end(), len(lines[number - 1]))
    return found


# ----------------------------------------------------------------------------------------------------- prose

SIGNS = {"->": "→", "<-": "←", "^2": "²", " * ": " · ", " - ": " − ", ">=": "≥", "<=": "≤"}
LOWERED = dict(zip("0123456789ijklmnt", "₀₁₂₃₄₅₆₇₈₉ᵢⱼₖₗₘₙₜ"))
RAISED = dict(zip("0123456789iklmnT", "⁰¹²³⁴⁵⁶⁷⁸⁹ⁱᵏˡᵐⁿᵀ"))
LITERAL = r"`[^`]+`"
EMPHASIS = r"(?<![\w*])\*[A-Za-z](?:[^*]*\w)?\*(?![\w*])"
HAT = r"(?<![\w-])[A-Za-z]+-hat(?:[_^]\w)?(?![\w-])"
NAME = r"(?<![\w-])[A-Za-z]+(?:[_^]\w)?(?![\w-])"
TEXT = re.compile(rf"{LITERAL}|{EMPHASIS}|{HAT}|->|<-|\^2")
MATHEMATICS = re.compile(rf"{LITERAL}|{EMPHASIS}|{HAT}|{NAME}|->|<-|\^2| [*-] |>=|<=")
PARTS_OF_NAME = re.compile(r"([A-Za-z]+?)(-hat)?(?:([_^])(\w))?")


def symbol(text):
    """How a sign or a name looks in mathematics: W-hat -> Ŵ, theta -> θ, Y_i -> Yᵢ."""
    if text in SIGNS:
        return SIGNS[text]
    name, hat, mark, index = PARTS_OF_NAME.fullmatch(text).groups()
    try:
        shown = unicodedata.lookup(f"GREEK SMALL LETTER {name}")
    except KeyError:
        shown = name
    if hat:
        shown = unicodedata.normalize("NFC", f"{shown}\u0302")
    if mark == "_":
        shown += LOWERED.get(index, f"_{index}")
    elif mark == "^":
        shown += RAISED.get(index, f"^{index}")
    return shown


def styled_prose(line, start, end):
    """A line of prose, to be read from the column `start` to `end` -> its kind and its pieces."""
    body = line[start:end]
    inside = body.strip()
    if RULE.fullmatch(line):
        return "rule", [Piece(line, "hidden")]
    if not inside:
        return "gap", without_empty([Piece(line, "hidden")])
    start += indentation(body)
    cells = re.split(r"( {2,})", inside)  # and the spaces between them
    kind = kind_of_prose(body, cells)
    pieces = [Piece(line[:start], "hidden")]
    for i, cell in enumerate(cells):
        is_space = i % 2 == 1
        is_name_here = kind == "table" and i == 2  # the column of a glossary that has names of the code
        is_mathematics = " <- " in body or kind in ("equation", "table")
        if is_space:
            pieces.append(Piece(cell, "space"))
        else:
            pieces += styled_text(cell, is_mathematics and not is_name_here)
    pieces.append(Piece(line[start + len(inside) :], "hidden"))
    return kind, without_empty(pieces)


def kind_of_prose(body, cells):
    """What a line of a docstring or comment is: wide spaces part cells, and running text has none."""
    if len(cells) == 1 and not body[0].isspace():
        return "prose"
    if len(cells) == 7 and " = " not in cells[2]:  # four columns
        return "table"
    return "equation" if " = " in body or " <- " in body else "fixed"


def styled_text(text, is_mathematics):
    """Words of prose -> pieces: code between backticks, emphasis between stars, symbols, and the rest."""
    pattern = MATHEMATICS if is_mathematics else TEXT
    pieces = []
    at = 0
    for match in pattern.finditer(text):
        found = match[0]
        pieces.append(Piece(text[at : match.start()], ""))
        at = match.end()
        if found[0] in "`*":
            style = "literal" if found[0] == "`" else "emphasis"
            pieces.append(Piece(found[0], "hidden"))
            pieces.append(Piece(found[1:-1], style))
            pieces.append(Piece(found[-1], "hidden"))
        else:
            pieces.append(Piece(found, "symbol" if symbol(found) != found else ""))
    return [*pieces, Piece(text[at:], "")]


# -------------------------------------------------------------------------------------------------- matching


def opcodes(one, two):
    """How the list `one` becomes `two`, by difflib."""
    return difflib.SequenceMatcher(None, one, two, autojunk=False).get_opcodes()


def pair_items(left, right):
    """Put items beside their namesakes -> [(Item or None, Item or None)], in the order of both files."""
    names = [item[:2] for item in left]
    others = [item[:2] for item in right]
    pairs = []
    for kind, a, b, c, d in opcodes(names, others):
        if kind == "equal":
            pairs += zip(left[a:b], right[c:d])
        else:
            pairs += [(item, None) for item in left[a:b]]
            pairs += [(None, item) for item in right[c:d]]
    return pairs


def match_units(left, right):
    """Match the units of two items -> [Block]. Empty lines between differences do not count as a match."""
    stretches = []  # [whether they are equal, units of the left, units of the right]
    keys = [unit.key for unit in left]
    others = [unit.key for unit in right]
    for kind, a, b, c, d in opcodes(keys, others):
        is_first = a == 0 and c == 0
        is_last = b == len(left) and d == len(right)
        is_equal = kind == "equal" and (is_first or is_last or count_lines(left[a:b]) > 0)
        if stretches and not is_equal and not stretches[-1][0]:
            stretches[-1][1] += left[a:b]
            stretches[-1][2] += right[c:d]
        else:
            stretches.append([is_equal, left[a:b], right[c:d]])
    blocks = []
    for is_equal, ours, theirs in stretches:
        if is_equal:
            blocks.append(Block("equal", ours, theirs))
        else:
            blocks += match_similar(ours, theirs)
    return blocks


def match_similar(left, right):
    """Match units that resemble each other, the most similar first -> [Block]."""
    best, place = 0, None
    for i, one in enumerate(left):
        for j, two in enumerate(right):
            ratio = likeness(one, two)
            if ratio > best and ratio >= LIKE.get(one.kind, 0.4):
                best, place = ratio, (i, j)
    if place is not None:
        i, j = place
        before = match_similar(left[:i], right[:j])
        after = match_similar(left[i + 1 :], right[j + 1 :])
        return [*before, Block("like", [left[i]], [right[j]]), *after]
    if not left and not right:
        return []
    is_equal = [unit.key for unit in left] == [unit.key for unit in right]
    return [Block("equal" if is_equal else "change", left, right)]


@functools.cache
def likeness(one, two):
    """The part of their words that two units share, from 0 to 1. Comments beside code do not count."""
    if one.kind != two.kind or one.kind in ("blank", "gap"):
        return 0
    words = []
    for unit in (one, two):
        solid = [word for word in words_of(unit) if is_solid(word)]
        words.append([word.text for word in solid if word.style != "comment"])
    return difflib.SequenceMatcher(None, *words, autojunk=False).ratio()


def words_of(unit):
    """The words of a unit, as pieces."""
    return [word for _, pieces in unit.lines for piece in pieces for word in words_of_piece(piece)]


def words_of_piece(piece):
    """A piece -> its words, as pieces; a symbol and what is hidden stay whole."""
    if piece.style in ("symbol", "hidden", "space"):
        return [piece]
    return [Piece(word, piece.style) for word in WORDS.findall(piece.text)]


def is_solid(word):
    """Whether a word is more than space, or than what the page hides."""
    return bool(word.text.strip()) and word.style != "hidden"


def changed_words(one, two):
    """Two units -> for each, which of its words have no equal in the other. Line breaks do not matter."""
    words = [words_of(one), words_of(two)]
    places, texts = [], []
    for side in words:
        solid = [i for i, word in enumerate(side) if is_solid(word)]
        places.append(solid)
        texts.append([side[i].text for i in solid])
    equal = [set(), set()]
    lengths = (len(texts[0]), len(texts[1]))
    for kind, a, b, c, d in opcodes(*texts):
        run = [text for text in texts[0][a:b] if re.match(r"\w", text)]
        is_edge = (a, c) == (0, 0) or (b, d) == lengths
        if kind == "equal" and (is_edge or len(run) >= LEAST.get(one.kind, 1)):
            equal[0].update(places[0][a:b])
            equal[1].update(places[1][c:d])
    return [marks(side, same) for side, same in zip(words, equal)]


def marks(words, equal):
    """Whether each word is marked, given the places of those that are not. Space is, between marked words."""
    marked = []
    for i, word in enumerate(words):
        marked.append(is_solid(word) and i not in equal)
    for i in range(1, len(words) - 1):
        if not is_solid(words[i]) and words[i].style != "space":
            marked[i] = marked[i - 1] and marked[i + 1]
    return marked


def fold(blocks):
    """Split equal blocks -> [(Block, whether it is folded)]. What is next to a difference stays open."""
    found = []
    for number, block in enumerate(blocks):
        units = block.left or block.right
        head = CONTEXT if number > 0 else 1  # 1: a function's first line
        tail = CONTEXT if number < len(blocks) - 1 else 0
        end = len(units) - tail
        if block.kind != "equal" or count_lines(units[head:end]) < FOLD_FROM:
            found.append((block, False))
            continue
        for part in (slice(0, head), slice(head, end), slice(end, None)):
            cut = block._replace(left=block.left[part], right=block.right[part])
            if cut.left or cut.right:
                found.append((cut, part == slice(head, end)))
    return found


def count_lines(units):
    """Lines that hold something."""
    return sum(len(unit.lines) for unit in units if unit.kind not in ("blank", "gap"))


def count_code(blocks):
    """Code lines that are equal, those of the left file alone, those of the right. Comments do not count."""
    equal = alone_left = alone_right = 0
    for block in blocks:
        left, right = code_of(block.left), code_of(block.right)
        if block.kind == "equal" or (block.kind == "like" and left == right):
            equal += len(left)  # where a namesake stands elsewhere, the left one is counted
        else:
            alone_left += len(left)
            alone_right += len(right)
    return equal, alone_left, alone_right


def code_of(units):
    """The lines of code among units, without comments."""
    lines = [unit.lines[0][1] for unit in units if unit.kind == "code"]
    found = []
    for line in lines:
        code = [piece for piece in line if piece.style != "comment"]
        found.append(text_of(code).rstrip())
    return found


# -------------------------------------------------------------------------------------------------- sections


class Section(NamedTuple):
    """What has a heading on the page."""

    title: str
    kind: str  # of its item
    blocks: list
    state: str  # "equal"; "prose" or "code", which differs; "left" or "right", if nothing is beside it
    note: str = ""  # HTML, beside the heading
    anchor: str = ""


def sections_of(left, right, names):
    """The items of two files -> [Section]. Constants in a row share one."""
    sections = []
    pairs = pair_items(left, right)
    for one, two in pairs:
        if one and two:
            section = compared(one, two)
        else:
            section = alone(one, two, pairs, names)
        if section.kind == "constant":
            section = section._replace(title="constants")
        if section.kind == "constant" and sections and sections[-1].kind == "constant":
            section = joined(sections.pop(), section)
        anchor = re.sub(r"\W+", "-", section.title)
        again = sum(before.title == section.title for before in sections)
        sections.append(section._replace(anchor=f"{anchor}-{again + 1}" if again else anchor))
    return sections


def compared(one, two):
    """The section of two namesakes."""
    blocks = match_units(one.units, two.units)
    _, left, right = count_code(blocks)
    state = "equal"
    if left or right:
        state = "code"
    elif any(block.kind != "equal" for block in blocks):
        state = "prose"
    return Section(one.name, one.kind, blocks, state)


def alone(one, two, pairs, names):
    """The section of an item that has nothing beside it. A namesake may stand elsewhere in the other file."""
    item = one or two
    side, other = SIDES if one else reversed(SIDES)
    here, there = names if one else reversed(names)
    apart = [pair[1] if one else pair[0] for pair in pairs if None in pair]
    namesakes = [each for each in apart if each and each[:2] == item[:2]]
    if not namesakes:
        blocks = [Block("only", one.units if one else [], two.units if two else [])]
        return Section(item.name, item.kind, blocks, side, f"only in {here}")
    namesake = namesakes[0]
    line = namesake.units[0].first
    link = f'<a href="#{other}-{line}">line {line}</a>'
    matched = match_units((one or namesake).units, (two or namesake).units)
    blocks = [block._replace(**{other: []}) for block in matched]
    blocks = [block for block in blocks if block.left or block.right]
    if item.kind == "constant":  # it shares its section
        blocks[0] = blocks[0]._replace(note=f"see {link} of {there}")
    return Section(item.name, item.kind, blocks, side, f"compared with {link} of {there}")


def joined(one, two):
    """Two sections as one."""
    blocks = list(one.blocks)
    for block in two.blocks:
        last = blocks[-1]
        both_equal = last.kind == block.kind == "equal"
        if both_equal and all((last.left, last.right, block.left, block.right)):
            blocks[-1] = Block("equal", last.left + block.left, last.right + block.right)
        else:
            blocks.append(block)
    state = one.state if one.state == two.state else "code"
    note = one.note if one.note == two.note else ""
    return one._replace(blocks=blocks, state=state, note=note)


# --------------------------------------------------------------------------------------------------- writing


def page(left_path, right_path):
    """Make the page -> HTML."""
    names = [html.escape(Path(path).name) for path in (left_path, right_path)]
    left, left_docstring = read(left_path)
    right, right_docstring = read(right_path)
    sections = sections_of(left, right, names)
    blocks = []
    for section in sections:
        blocks += section.blocks
    equal, only_left, only_right = count_code(blocks)
    return TEMPLATE.format(
        left=names[0],
        right=names[1],
        about=about([left_docstring, right_docstring], names, sections),
        equal=equal,
        only_left=only_left,
        only_right=only_right,
        contents=contents(sections),
        sections="\n".join(section_html(section, names) for section in sections),
        style=STYLE,
        script=SCRIPT,
    )


def about(documents, names, sections):
    """Two sentences: what the files are, as each of them says, and what differs, as one of them says."""
    titles, difference = [], ""
    for document in documents:
        first = " ".join(document.split("\n\n")[0].split())
        titles.append(html.escape(re.split(r"\.(?: |$)", first)[0]))
    for document, other in zip(documents, reversed(names)):
        pattern = rf"^Read it beside {re.escape(other)}[^:]*: (.+?)\.$"
        said = re.search(pattern, document, re.MULTILINE | re.DOTALL)
        if said:  # the right file's word comes last, and counts
            difference = html.escape(" ".join(said[1].split()))
    if not difference:
        changed = [section.title for section in sections if section.state not in ("equal", "prose")]
        difference = html.escape(", ".join(changed)) or "nothing but docstrings and comments"
    left, right = (f"<code>{name}</code> holds {title}" for name, title in zip(names, titles))
    return f"On the left, {left}; on the right, {right}. They differ in this: {difference}."


def contents(sections):
    """Links to all sections, a line for each part."""
    rows = [[]]
    for section in sections:
        link = f'<a class="is-{section.state}" href="#{section.anchor}">{html.escape(section.title)}</a>'
        if section.kind == "part":
            rows.append([f"<b>{link}</b>"])
        else:
            rows[-1].append(link)
    return "\n".join(f"<li>{' '.join(row)}</li>" for row in rows if row)


def section_html(section, names):
    """A section -> HTML. If its files agree in it, it is folded as a whole, unless it opens a part."""
    level = "h2" if section.kind == "part" else "h3"
    heading = f"<{level}>{html.escape(section.title)}</{level}>"
    start = f'<section id="{section.anchor}" class="is-{section.state}">'
    body = "\n".join(block_html(block) for block in section.blocks)
    if section.kind == "part":
        return f"{start}{heading}\n{body}\n</section>"
    if section.state == "equal":
        lines = sum(count_lines(block.left) for block in section.blocks)
        return f"{start}{folded(lines, body, heading)}</section>"
    parts = [f'{start}<div class="head">{heading} <small>{remark(section, names)}</small></div>']
    for block, is_folded in fold(section.blocks):
        shown = block_html(block)
        lines = count_lines(max(block.left, block.right, key=len))
        parts.append(folded(lines, shown) if is_folded else shown)
    return "\n".join([*parts, "</section>"])


def folded(lines, body, heading=""):
    """Fold equal lines."""
    count = "1 equal line" if lines == 1 else f"{lines} equal lines"
    return f"<details><summary>{heading}<small>{count}</small></summary>\n{body}\n</details>"


def remark(section, names):
    """What differs in a section, beside its heading."""
    equal, left, right = count_code(section.blocks)
    if section.note:
        return section.note
    if section.kind == "docstring":
        return "what each file says of itself"
    if section.state == "prose":
        return "the code is equal, but what is said of it differs"
    return f"code lines: {equal} equal, {left} only in {names[0]}, {right} only in {names[1]}"


def block_html(block):
    """A block -> HTML, a cell for each side."""
    marked = [None, None]
    if block.kind == "like" and block.left and block.right:
        marked = changed_words(block.left[0], block.right[0])
    cells = []
    for side, units, marks_here in zip(SIDES, (block.left, block.right), marked):
        inside = "\n".join(unit_html(unit, side, marks_here) for unit in units)
        if inside:
            cells.append(f'<div class="{side}">\n{inside}\n</div>')
        else:
            note = f"<small>{block.note}</small>" if block.note else ""
            cells.append(f'<div class="{side} none">{note}</div>')
    return f'<div class="block {block.kind}">{"".join(cells)}</div>'


def unit_html(unit, side, marked):
    """A unit -> HTML; `marked` says of each of its words whether it is marked."""
    to_come = iter(marked or [False] * len(words_of(unit)))
    lines = []
    for number, pieces in unit.lines:
        where = f'id="{side}-{number}" data-file="{side}" data-line="{number}"'
        lines.append((where, line_html(unit.kind, pieces, to_come)))
    depth = f"i{min(unit.depth, 24) // 4}"
    if unit.kind == "prose":
        spans = "\n".join(f"<span {where}>{inside}</span>" for where, inside in lines)
        return f'<p class="prose {depth}">{spans}</p>'
    where, inside = lines[0]
    style = unit.kind if unit.kind in ("code", "blank", "rule") else f"prose {unit.kind}"
    return f'<div class="{style} {depth}" {where}>{inside}</div>'


def line_html(kind, pieces, marked):
    """The pieces of a line -> HTML. Wide spaces in tables and equations part cells."""
    cells = [[]]
    for piece in pieces:
        for word in words_of_piece(piece):
            cells[-1].append((*word, next(marked)))
        if piece.style == "space":
            cells.append([])
    if kind not in ("table", "equation", "fixed"):
        return words_html(cells[0])
    return "".join(f'<span class="cell">{words_html(cell)}</span>' for cell in cells)


def words_html(words):
    """[(text, style, whether it is marked)] -> HTML, with one element for neighbours that look alike."""
    found = []
    for text, style, is_marked in words:
        alike = found and found[-1][1:] == [style, is_marked] and style != "symbol"
        if alike:
            found[-1][0] += text
        else:
            found.append([text, style, is_marked])
    pieces = []
    for text, style, is_marked in found:
        piece = html.escape(text)
        if style:
            shown = f' data-shown="{symbol(text)}"' if style == "symbol" else ""
            piece = f'<span class="{style}"{shown}>{piece}</span>'
        pieces.append(f"<mark>{piece}</mark>" if is_marked else piece)
    return "".join(pieces)


STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2128; --soft: #626b76; --line: #dde1e6; --box: #6c7a8917;
  --left: #fff4e0; --left-word: #ffd591; --left-edge: #b86e00; --right: #e6f2ff; --right-word: #a9d4ff;
  --right-edge: #0a69c2; --link: #0a58ad; --keyword: #a0208c; --string: #1d6b3a; --number: #9a4a00; --name: #0b4f9e;
  --sans: system-ui, "Segoe UI", Roboto, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  --math: "STIX Two Math", "Cambria Math", "Latin Modern Math", "DejaVu Serif", Georgia, serif; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #dce0e5; --soft: #98a2ae; --line: #30363d;
  --box: #9aa7b51c; --left: #33270f; --left-word: #6d4d0c; --left-edge: #e3a33c; --right: #10263c;
  --right-word: #1d5286; --right-edge: #58a6ff; --link: #79b8ff; --keyword: #e394d8; --string: #8fd3a4;
  --number: #eeb07a; --name: #8cc2ff; } }
* { box-sizing: border-box; } html { scroll-padding-top: 5.5rem; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.5 var(--sans); }
header, main, footer, .bar > div { max-width: 1760px; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 1.5rem; } header p { max-width: 76ch; margin: .5rem 0; } footer { padding: 1rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; } h2 { font-size: 1.25rem; margin: 0; }
h3 { display: inline; font: 600 .95rem/1.5 var(--mono); margin-right: .8em; }
a { color: var(--link); } small { font-size: .8rem; color: var(--soft); } mark { color: inherit; }
code, .literal { font-family: var(--mono); font-size: .88em; }
.mark-left, .mark-right { padding: 0 .3em; } .mark-left, .is-left { background: var(--left-word); }
.mark-right, .is-right { background: var(--right-word); } section { background: none !important; }
nav ul { list-style: none; margin: .75rem 0; padding: 0; font-size: .85rem; line-height: 1.75; }
nav a { color: var(--soft); text-decoration: none; white-space: nowrap; margin-right: .6em; border-radius: 3px; }
nav .is-code, nav .is-left, nav .is-right { color: var(--ink); padding: 0 .3em; }
nav .is-code { background: linear-gradient(90deg, var(--left-word) 50%, var(--right-word) 50%); }
nav .is-prose { text-decoration: underline dotted; } nav b { margin-right: .7em; }
nav b a { all: unset; cursor: pointer; }
[name=view] { position: fixed; top: 0; opacity: 0; pointer-events: none; }
.bar { position: sticky; top: 0; z-index: 1; background: var(--paper); border-bottom: 1px solid var(--line); }
.bar > .views { display: flex; gap: .35rem; padding-top: .4rem; padding-bottom: .4rem; }
.bar label, .bar button { font: .85rem/1.4 var(--sans); padding: .3rem .7rem; border: 1px solid var(--line);
  border-radius: 6px; background: var(--paper); color: var(--ink); cursor: pointer; } .bar button { margin-left: auto; }
#view-both:checked ~ .bar [for=view-both], #view-left:checked ~ .bar [for=view-left],
#view-right:checked ~ .bar [for=view-right] { background: var(--ink); color: var(--paper); border-color: var(--ink); }
#view-both:focus-visible ~ .bar [for=view-both], #view-left:focus-visible ~ .bar [for=view-left],
#view-right:focus-visible ~ .bar [for=view-right] { outline: 3px solid var(--link); outline-offset: 1px; }
.names code { flex: 1; padding-left: .5rem; margin-bottom: .3rem; border-left: 4px solid var(--left-edge); }
.names code + code { border-left-color: var(--right-edge); } .bar > .names { display: none; }
section { margin: .6rem 0; border: 1px solid var(--line); border-radius: 6px; overflow: clip; }
section:has(> h2) { border: 0; margin-top: 2.2rem; } h2 ~ .block > .right { border: 0; }
.head, summary { padding: .3rem .8rem; background: var(--box); } .head { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; } summary:hover { background: var(--line); }
.block { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); }
.block > div { min-width: 0; padding-right: .5rem; } .block > .right { border-left: 1px solid var(--line); }
.block > .none { background: var(--box); } .none small { padding: 0 .8rem; }
:is(.like, .change) > .left:not(.none) { background: var(--left); }
:is(.like, .change) > .right:not(.none) { background: var(--right); }
.only > .left:not(.none) { box-shadow: inset 3px 0 var(--left-edge); }
.only > .right:not(.none) { box-shadow: inset 3px 0 var(--right-edge); }
.left mark { background: var(--left-word); } .right mark { background: var(--right-word); }
.code { --hang: calc((var(--i) + 4) * 1ch); position: relative; font: .78rem/1.55 var(--mono); white-space: pre-wrap;
  overflow-wrap: anywhere; padding-left: calc(5.5ch + var(--hang)); text-indent: calc(-1 * var(--hang)); }
.code::before { content: attr(data-line); position: absolute; left: 0; width: 4.3ch; text-align: right;
  text-indent: 0; color: var(--soft); user-select: none; }
:is(.like, .change) > .left > .code::before { content: "−" attr(data-line); color: var(--left-edge); }
:is(.like, .change) > .right > .code::before { content: "+" attr(data-line); color: var(--right-edge); }
.keyword { color: var(--keyword); } .string { color: var(--string); } .number { color: var(--number); }
.defined { color: var(--name); font-weight: 600; } .comment { color: var(--soft); font: .8rem var(--sans); }
.blank { height: .45rem; } .rule { font-size: 0; } .hidden { display: none; } .emphasis { font-style: italic; }
.prose { margin: 0 0 0 calc(2.8rem + var(--i) * .47rem); padding: .12rem .7rem; background: var(--box);
  border-left: 3px solid var(--line); font-size: .9rem; line-height: 1.45; overflow-wrap: break-word; }
:is(.like, .change) .prose { background: none; } .prose.gap { padding: 0; height: .4rem; background: none; border: 0; }
:is(.like, .change) > .left > .prose { border-color: var(--left-edge); }
:is(.like, .change) > .right > .prose { border-color: var(--right-edge); }
.prose.equation { font-family: var(--math); } .prose.fixed { font: .78rem/1.6 var(--mono); }
:is(.equation, .fixed) .cell { display: inline-block; margin-right: 2em; }
.table { display: grid; grid-template-columns: 14% 30% 27% 27%; column-gap: .6%; overflow-wrap: anywhere; }
.prose.table { font-size: .82rem; } .symbol { font-size: 0; } .symbol::before { content: attr(data-shown); }
.prose .symbol::before { font-size: .95rem; } .table .symbol::before { font-size: .85rem; }
.i0 { --i: 0; } .i1 { --i: 4; } .i2 { --i: 8; } .i3 { --i: 12; } .i4 { --i: 16; } .i5 { --i: 20; } .i6 { --i: 24; }
#view-left:checked ~ main :is(.block > .right, section.is-right),
#view-right:checked ~ main :is(.block > .left, section.is-left) { display: none; }
#view-left:checked ~ main .block, #view-right:checked ~ main .block { grid-template-columns: minmax(0, 1fr); }
@media (min-width: 801px) { #view-both:checked ~ .bar > .names { display: flex; } }
@media (max-width: 800px) { header, main, footer, .bar > div { padding-left: .5rem; padding-right: .5rem; }
  .bar label, .bar button { padding: .35rem .5rem; } .block > .right { border-left: 0; }
  .block { grid-template-columns: minmax(0, 1fr); } .prose { margin-left: calc(var(--i) * .3rem); }
  #view-both:checked ~ main .equal > .left:not(.none) + .right, .block > .none:empty { display: none; }
  .code { --hang: calc((var(--i) + 2) * 1ch); font-size: .74rem; } }
"""

SCRIPT = """
const all = name => [...document.querySelectorAll(name)];
const button = document.querySelector(".bar button");
const unfold = open => { for (const each of all("details")) each.open = open; };
let read = null;  // the section at the top of the window
onscroll = () => { read = scrollY > 300 && all("section").find(x => x.getBoundingClientRect().bottom > 120); };
button.hidden = false;
button.onclick = () => unfold(all("details").some(each => !each.open));
for (const view of all("[name=view]")) view.onchange = () => {
  const place = read;
  unfold(view.id != "view-both");
  if (place) place.scrollIntoView();
};
"""

TEMPLATE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{left} beside {right}</title>
<style>{style}</style></head>
<body>
<input type="radio" name="view" id="view-both" aria-label="both files" checked>
<input type="radio" name="view" id="view-left" aria-label="{left}">
<input type="radio" name="view" id="view-right" aria-label="{right}">
<header>
<h1>{left} beside {right}</h1>
<p>{about}</p>
<p>Of their lines of code, {equal} are equal, <span class="mark-left">{only_left} are only in {left}</span> and
<span class="mark-right">{only_right} are only in {right}</span>. (Docstrings, comments and blank lines are not
counted.)</p>
<p><small>Below, a name in both colours differs in its code, and a dotted name in its prose alone. A name in one
colour belongs to that file alone, or stands elsewhere in the other. The rest is equal, and folded.</small></p>
<nav aria-label="contents"><ul>
{contents}
</ul></nav>
</header>
<div class="bar"><div class="views"><label for="view-both">difference</label><label for="view-left">{left}</label>
<label for="view-right">{right}</label><button type="button" hidden>unfold all</button></div>
<div class="names"><code>{left}</code><code>{right}</code></div></div>
<main>
{sections}
</main>
<footer><small><code>python -m tools.side_by_side {left} {right}</code> wrote this page.</small></footer>
<script>{script}</script>
</body></html>
"""


def main():
    parser = new_parser(__doc__, "")
    parser.add_argument("left", metavar="LEFT.py", help="script in the left column")
    parser.add_argument("right", metavar="RIGHT.py", help="script in the right column")
    parser.add_argument("--out", type=user_path, help="the page (docs/LEFT-RIGHT.html)")
    args = parser.parse_args()
    out = args.out or f"docs/{Path(args.left).stem}-{Path(args.right).stem}.html"
    atomic_write(out, page(args.left, args.right))
    print(f"written: {out}")


if __name__ == "__main__":
    main()
