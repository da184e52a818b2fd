"What the tools for the site and the README do to text; `tools/check.sh` builds the whole site."
import ast
import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip('nbdev')
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
docs, showdoc, readme = (importlib.import_module(f'tools.{name}') for name in ('docs', 'showdoc', 'readme'))


@pytest.fixture
def site(tmp_path):
    (tmp_path / 'b.html').write_text('<h2 id="here">Here</h2>')
    (tmp_path / 'sub').mkdir()
    return tmp_path


@pytest.mark.parametrize('link, broken', [
    ('b.html', 0), ('b.html#here', 0), ('b.html?x=1#here', 0), ('#own', 0), ('https://example.org', 0),
    ('mailto:a@b.c', 0), ('c.html', 1), ('b.html#gone', 1), ('#gone', 1), ('sub', 1), ('pic.png', 1)])
def test_broken_links(site, link, broken):
    (site / 'a.html').write_text(f'<p id="own"><a href="{link}">x</a>')
    assert len(list(docs.broken_links(site))) == broken


@pytest.mark.parametrize('text, asks', [
    ('<script src="https://cdn.example/x.js"></script>', 1), ('<script src="x.js"></script>', 0),
    ('<link rel="stylesheet" href="//cdn.example/x.css">', 1), ('<link href="https://a.b/x.css" rel="stylesheet">', 1),
    ('<img alt="" src="https://a.b/x.png">', 1), ('<img src="data:image/png;base64,AA">', 0),
    ('<a href="https://a.b">a link is not a request</a>', 0), ('<style>@import "https://a.b/x.css";</style>', 1),
    ('<style>a { background: url(https://a.b/x.png) }</style>', 1), ('<style>a { b: url("#c") }</style>', 0)])
def test_foreign_requests(site, text, asks):
    (site / 'a.html').write_text(text)
    assert len(list(docs.foreign_requests(site))) == asks


@pytest.mark.parametrize('font', [
    '@import url(https://fonts.googleapis.com/css2?family=Lato:ital,wght@0,400;0,700;1,400&display=swap);',
    '@import url("https://fonts.googleapis.com/css2?family=A;b");', "@import 'https://fonts.googleapis.com/css';"])
def test_web_fonts_go_and_nothing_else(font):
    assert docs.drop_web_fonts(f'a{{b:c}}{font}:root{{d:e}}') == 'a{b:c}:root{d:e}'


def test_links_to_methods_lead_to_their_class(site):
    (site / 'a.html').write_text('<h4 id="engine">Engine</h4><h4 id="engine.run">run</h4>')
    (site / 'c.html').write_text('<a href="a.html#engine.step">x</a><a href="a.html#engine.run">y</a><a href="#gone.step">z</a>')
    docs.link_classes(site)
    assert (site / 'c.html').read_text() == ('<a href="a.html#engine">x</a><a href="a.html#engine.run">y</a>'
                                             '<a href="#gone.step">z</a>')


def test_maths_becomes_mathml():
    page = docs.render_maths('<head><link rel="stylesheet" href="https://x/katex@1/katex.min.css"></head>'
                             '<span class="math inline">\\(a &lt; \\sqrt{b}\\)</span>'
                             '<span class="math display">\\[x^2\\]</span>')
    assert 'katex' not in page and page.count('<math') == 2 and '<msqrt>' in page
    assert 'display="inline"' in page and 'display="block"' in page and '\\(' not in page


SOURCE = '''
class Pair(Base):
    "Two numbers."
    left: int  # the first
    right: "int | None" = 2  # the second
    def both(self): "Their sum."
    def _hidden(self): "Not shown."

def scale(
    x: float,  # what to scale
    *,
    by: float = 2.0,  # how much
    **rest,
) -> float:  # the product
    "Scale a number."
'''


def test_api_tables():
    tree, notes = ast.parse(SOURCE), showdoc.comments(SOURCE)
    fields, methods = showdoc.tables(showdoc.find(tree, 'Pair'), notes)
    assert fields.splitlines()[2:] == ['| `left` | `int` |  | the first |',
                                       '| `right` | `int \\| None` | `2` | the second |']
    assert methods.splitlines()[2:] == ['| `both` | Their sum. |']
    (rows,) = showdoc.tables(showdoc.find(tree, 'scale'), notes)
    assert rows.splitlines()[2:] == ['| `x` | `float` |  | what to scale |', '| `by` | `float` | `2.0` | how much |',
                                     '| `**rest` |  |  |  |', '| **returns** | `float` |  | the product |']


def test_entries_stand_before_their_own_source():
    from types import SimpleNamespace as Cell
    entry = lambda name: Cell(source=f'#| echo: false\nshow_doc({name})', has_sd=True)
    source = lambda text: Cell(source=text, directives_={'exports': []})
    a, b, c = entry('A'), entry('b'), entry('c')
    ab, just_c = source('class A: pass\n\ndef b(): pass'), source('def c(b): pass')
    process = showdoc.EntriesFirst(Cell(cells=[b, ab, a, c, just_c]))
    process.begin()
    assert process.nb.cells == [a, b, ab, c, just_c]


def test_readme_is_up_to_date(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert (ROOT / 'README.md').read_text(encoding='utf-8') == readme.readme()
