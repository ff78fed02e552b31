"""Tests: the pages that show two scripts side by side."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from tests.helpers import HERE, fails, here, run
from tests.test_documents import code_lines
from tools import side_by_side

CHROMIUM = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)
PAGES = [f"{left}-{right}" for left, right in side_by_side.PAGES]
EMPTY = ("meta", "input", "br")  # elements that have no end


class Reader(HTMLParser):
    """Reads a page: the lines of both files {side: [[number, text]]}, and the texts of elements {tag: [text]}."""

    def __init__(self, page):
        super().__init__()
        self.lines = {"left": [], "right": []}
        self.texts = {}
        self.open = []  # (tag, attributes, the text so far)
        self.feed(page)
        assert not self.open, "an element has no end"

    def handle_starttag(self, tag, attributes):
        if tag not in EMPTY:
            self.open.append((tag, dict(attributes), []))

    def handle_data(self, data):
        for _, _, texts in self.open:
            texts.append(data)

    def handle_endtag(self, tag):
        opened, attributes, texts = self.open.pop()
        assert opened == tag
        text = "".join(texts)
        self.texts.setdefault(tag, []).append(text)
        if "data-file" in attributes:
            self.lines[attributes["data-file"]].append((int(attributes["data-line"]), text))


def files_of(name):
    """The lines of the two scripts of a page."""
    texts = [(HERE / f"{stem}.py").read_text() for stem in name.split("-")]
    return dict(zip(side_by_side.SIDES, (text.removesuffix("\n").split("\n") for text in texts)))


@pytest.fixture
def compared(tmp_path):
    """A function of the texts of two scripts, which makes their page."""

    def make(left, right):
        for name, text in (("one.py", left), ("two.py", right)):
            (tmp_path / name).write_text(text)
        page = side_by_side.page(tmp_path / "one.py", tmp_path / "two.py")
        found = Reader(page).lines
        assert "".join(f"{text}\n" for _, text in found["left"]) == left
        assert "".join(f"{text}\n" for _, text in found["right"]) == right
        return page

    return make


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_up_to_date(name):
    left, right = (HERE / f"{stem}.py" for stem in name.split("-"))
    committed = HERE / "docs" / f"{name}.html"
    remedy = f"python -m tools.side_by_side {left.name} {right.name}"
    assert committed.exists(), f"docs/{name}.html is missing: {remedy}"
    is_fresh = committed.read_text(encoding="utf-8") == side_by_side.page(left, right)
    assert is_fresh, f"docs/{name}.html is out of date: {remedy}"


@pytest.mark.parametrize("name", PAGES)
def test_pages_lose_no_line_and_need_nothing_else(name):
    page = (HERE / "docs" / f"{name}.html").read_text(encoding="utf-8")
    found = Reader(page).lines
    for side, texts in files_of(name).items():
        assert found[side] == list(enumerate(texts, 1)), side
    assert not re.search(r"\b(src|href)=\"(?!#)", page)
    assert not re.search(r"<link|@import|\burl\(|https?://", page)
    anchors = re.findall(r"\bid=\"([^\"]*)\"", page)
    assert len(anchors) == len(set(anchors))
    assert set(re.findall(r"href=\"#([^\"]*)\"", page)) <= set(anchors)


@pytest.mark.parametrize("name", PAGES)
def test_counts_are_those_of_the_files(name):
    """Equal lines and those of one file alone are all code lines of the file, counted another way."""
    page = (HERE / "docs" / f"{name}.html").read_text(encoding="utf-8")
    equal = int(re.search(r"(\d+) are equal", page)[1])
    for stem, alone in zip(name.split("-"), re.findall(r"(\d+) are only in", page)):
        assert equal + int(alone) == len(code_lines(HERE / f"{stem}.py"))


def test_what_is_marked_and_what_is_folded(compared):
    same = "".join(f"    x{i} = {i}\n" for i in range(9))
    left = f'"""Doc <b>."""\n\n\ndef f(a):\n{same}    return a + 1  # one\n\n\ndef one():\n    pass\n'
    right = left.replace("a + 1", "a + 2").replace("def one", "def two")
    page = compared(left, right)
    parsed = Reader(page)
    assert parsed.texts["mark"] == ["1", "2"]
    assert (
        "7 equal lines" in parsed.texts["summary"]
    )  # all but the last two, which show where the difference is
    assert parsed.texts["h3"] == ["docstring", "f", "one", "two"]
    assert "only in one.py" in parsed.texts["small"]
    assert "only in two.py" in parsed.texts["small"]
    assert "code lines: 10 equal, 1 only in one.py, 1 only in two.py" in parsed.texts["small"]
    assert "<b>." not in page


def test_names_pair_across_files_of_another_order(compared):
    f, g = "def f(x):\n    return x\n", "def g(x):\n    y = x\n    return y * 2\n"
    page = compared(f"{f}\n\n{g}", f"{g}\n\n{f}\n\nA = 1\n".replace("y * 2", "y * 3"))
    parsed = Reader(page)
    assert sum(text.startswith("compared with line") for text in parsed.texts["small"]) == 2
    assert "constants" in parsed.texts["h3"]


def test_prose_is_set_as_prose(compared):
    text = '"""T `code` *new*.\n\n    W-hat_i = theta * 2^k     Eq. 1\n"""\n\n\n# Why -> how.\n# More.\nA = 1  # beside\n'
    page = compared(text, text)
    for shown in ("Ŵᵢ", "θ", " · ", "→"):
        assert f'data-shown="{shown}"' in page
    assert '<span class="literal">code</span>' in page
    assert '<span class="emphasis">new</span>' in page
    assert page.count('<p class="prose i0"><span id="left-7"') == 1  # a paragraph of two comment lines
    assert '<span class="comment"># beside</span>' in page


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "# a comment\n",
        "x = 1; y = 2\n",
        'def f(): "doc"\n',
        "class A:\n    r'''Raw.'''\n    '''not a docstring'''\n",
        'x = f"""a\n  {1 + 1:>{2}}\n# no comment\n"""  # one\n',
        "# first\n\n# ---------------- part\n# Said of it.\n\n\n@wrap\ndef f():\n    pass\n\n\n# last\n",
        'def f():\n    """Say "this".\n\n      a    b    c    d\n    "quoted"\n    """\n    #\n    # - one\n    return 1\n',
        "if x:\n\tpass\n\f\nimport a\nimport b\n",
    ],
)
def test_no_line_of_any_file_is_lost(compared, text):
    compared(text, text)
    compared(text, "import a\n\n\ndef f():\n    '''Doc.'''\n    return 2\n")
    compared("import a\n\n\ndef f():\n    '''Doc.'''\n    return 2\n", text)


def test_bad_input(tmp_path, capsys):
    (tmp_path / "bad.py").write_text("def f(:")
    (tmp_path / "bytes.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "zero.py").write_bytes(b"x = 1\0\n")
    kml = HERE / "kml.py"
    for name in ("bad.py", "bytes.py", "zero.py", "."):
        fails(capsys, lambda n=name: side_by_side.page(tmp_path / n, kml), "cannot be read as Python")
    fails(capsys, lambda: side_by_side.page(kml, tmp_path / "none.py"), "there is no", "none.py")
    done = run("tools.side_by_side", kml, tmp_path / "none.py", "--out", tmp_path / "x.html")
    assert done.returncode == 2
    assert len(done.stderr.strip().split("\n")) == 1
    assert not (tmp_path / "x.html").exists()
    assert here("tools.side_by_side", kml).returncode == 2


def test_the_tool_writes_a_page(tmp_path):
    done = here("tools.side_by_side", HERE / "mmaml.py", HERE / "kml.py", "--out", tmp_path / "x.html")
    assert done.returncode == 0
    assert (tmp_path / "x.html").read_bytes() == (HERE / "docs" / "mmaml-kml.html").read_bytes()


# ------------------------------------------------------------------------------------------------ in a browser

# Chromium's windows are at least 500 pixels wide, so the page is in a frame, and tells its window what it finds.
WINDOW = """<body style="margin: 0"><iframe src="page.html" style="border: 0; width: {}px; height: 900px"></iframe>
<script>onmessage = event => {{ document.title = event.data; }};</script>"""
PROBE = """<script>
addEventListener("load", () => {
  const root = document.documentElement;
  const seen = side => all(`[data-file=${side}]`).filter(x => x.checkVisibility()).map(x => +x.dataset.line);
  const sticksOut = x => x.getClientRects().length && x.getBoundingClientRect().right > root.clientWidth + 0.5;
  const look = () => ({left: seen("left"), right: seen("right"), width: innerWidth,
    overflows: root.scrollWidth > root.clientWidth || all("body *").some(x => x.checkVisibility() && sticksOut(x))});
  const click = name => document.querySelector(name).click();
  const found = {folded: look()};
  for (const view of ["both", "left", "right"]) {
    click(`[for=view-${view}]`);
    if (view == "both") click(".bar button");  // unfolds all
    found[view] = look();
  }
  click("[for=view-both]");
  found.again = look();
  parent.postMessage(JSON.stringify(found), "*");
});
</script>"""


def chromium(folder, *words):
    """Run Chromium without a window -> what it prints."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("name", PAGES)
def test_pages_in_a_browser(tmp_path, name, width):
    """Unfolded, all lines show; the switch shows either file, on a phone too; and nothing overflows."""
    page = (HERE / "docs" / f"{name}.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    (tmp_path / "window.html").write_text(WINDOW.format(width))
    shown = chromium(tmp_path, "--window-size=1400,900", "--dump-dom", f"file://{tmp_path / 'window.html'}")
    found = json.loads(html.unescape(re.search("<title>(.*?)</title>", shown)[1]))
    for view, look in found.items():
        assert look["width"] == width
        assert not look["overflows"], view
    lines = {side: list(range(1, len(texts) + 1)) for side, texts in files_of(name).items()}
    nothing = {"left": [], "right": []}
    for side in side_by_side.SIDES:
        shown = {each: found[side][each] for each in side_by_side.SIDES}
        assert shown == nothing | {side: lines[side]}
        assert found["again"][side] == found["folded"][side]
    assert len(found["folded"]["left"]) < len(lines["left"])
    assert found["both"]["left"] == lines["left"]
    if width > 800:
        assert found["both"]["right"] == lines["right"]
    else:  # a phone shows equal lines once
        assert 0 < len(found["both"]["right"]) < len(lines["right"])


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(("scheme", "paper"), [("light", (255, 255, 255)), ("dark", (21, 24, 28))])
def test_pages_are_light_or_dark_as_the_reader_likes(tmp_path, scheme, paper):
    number = {"dark": 0, "light": 1}[scheme]
    words = (f"--blink-settings=preferredColorScheme={number}", "--window-size=1400,900")
    address = f"file://{HERE / 'docs' / 'mmaml-kml.html'}"
    chromium(tmp_path, *words, f"--screenshot={tmp_path / 'page.png'}", address)
    picture = Image.open(tmp_path / "page.png").convert("RGB")
    assert picture.size == (1400, 900)
    assert picture.getpixel((2, 2)) == paper
    assert len(picture.getcolors(1 << 20)) > 50
