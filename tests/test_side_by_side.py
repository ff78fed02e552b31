"""Tests: the pages that show two scripts side by side."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from tests.helpers import HERE, fails, here
from tools import side_by_side

CHROMIUM = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)
PAGES = [f"{left}-{right}" for left, right in side_by_side.PAGES]


class Lines(HTMLParser):
    """Collects the lines of both files from a page: {side: [(number, text)]}."""

    def __init__(self):
        super().__init__()
        self.found = {"left": [], "right": []}
        self.current = None

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if "data-file" in given:
            self.current = given["data-file"], int(given["data-line"]), []

    def handle_data(self, data):
        if self.current:
            self.current[2].append(data)

    def handle_endtag(self, tag):
        if tag == "pre" and self.current:
            side, number, texts = self.current
            self.found[side].append((number, "".join(texts)))
            self.current = None


def lines_of(page):
    """Both files, as a page has them."""
    parser = Lines()
    parser.feed(page)
    return parser.found


def files_of(name):
    """The lines of the two scripts of a page."""
    return dict(
        zip(("left", "right"), ((HERE / f"{stem}.py").read_text().splitlines() for stem in name.split("-")))
    )


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_up_to_date_and_lose_nothing(name):
    left, right = (HERE / f"{stem}.py" for stem in name.split("-"))
    committed = (HERE / "docs" / f"{name}.html").read_text()
    remedy = f"python -m tools.side_by_side {left.name} {right.name}"
    assert committed == side_by_side.page(left, right), f"docs/{name}.html is old: {remedy}"
    found = lines_of(committed)
    for side, texts in files_of(name).items():
        assert found[side] == list(enumerate(texts, 1)), side
    assert "<script" not in committed
    assert not re.search(r"(src|href)=\"(?!#)", committed)  # nothing from elsewhere


def test_what_is_marked_and_what_is_folded(tmp_path):
    same = "".join(f"    x{i} = {i}\n" for i in range(9))
    for name, factor in (("one", "a + 1"), ("two", "a + 2")):
        text = f'"""Doc <b>."""\n\n\ndef f(a):\n{same}    return {factor}\n\n\ndef {name}():\n    pass\n'
        (tmp_path / f"{name}.py").write_text(text)
    made = side_by_side.page(tmp_path / "one.py", tmp_path / "two.py")
    assert "return a + <mark>1</mark>" in made
    assert "return a + <mark>2</mark>" in made
    assert "<summary>9 equal lines</summary>" in made
    assert "only in the left file" in made
    assert "Doc &lt;b&gt;." in made


def test_bad_input(tmp_path, capsys):
    (tmp_path / "bad.py").write_text("def f(:")
    fails(capsys, lambda: side_by_side.page(tmp_path / "bad.py", HERE / "kml.py"), "cannot be read as Python")
    fails(capsys, lambda: side_by_side.page(HERE / "kml.py", tmp_path / "none.py"), "there is no")


def test_the_tool_writes_a_page(tmp_path):
    done = here("tools.side_by_side", HERE / "mmaml.py", HERE / "kml.py", "--out", tmp_path / "x.html")
    assert done.returncode == 0
    assert (tmp_path / "x.html").read_text() == (HERE / "docs" / "mmaml-kml.html").read_text()


PROBE = """<script>
addEventListener("load", () => {
  for (const folded of document.querySelectorAll("details")) folded.open = true;
  const shown = {};
  const seen = side => [...document.querySelectorAll(`pre[data-file=${side}]`)].filter(x => x.offsetParent).length;
  for (const which of ["both", "left", "right"]) {
    document.getElementById("show-" + which).checked = true;
    shown[which] = [seen("left"), seen("right"), document.documentElement.scrollWidth > innerWidth];
  }
  document.title = JSON.stringify(shown);
});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("name", PAGES)
def test_pages_in_a_browser(tmp_path, name):
    """Unfolded, a wide screen shows all lines of both files; on a phone the switch shows either; nothing overflows."""
    import html
    import json

    page = (HERE / "docs" / f"{name}.html").read_text()
    (tmp_path / "page.html").write_text(page.replace("</body>", PROBE + "</body>"))
    left, right = (len(texts) for texts in files_of(name).values())
    for width in (1400, 500):  # Chromium's windows are not narrower than 500
        command = [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
        ]
        command += [
            f"--window-size={width},900",
            "--virtual-time-budget=5000",
            "--dump-dom",
            f"file://{tmp_path / 'page.html'}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        shown = json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout).group(1)))
        assert not any(overflows for *_, overflows in shown.values()), (width, shown)
        if width == 1400:
            assert shown["both"][:2] == [left, right]
        else:
            assert shown["left"][:2] == [left, 0]
            assert shown["right"][:2] == [0, right]
