"Pages of the site: links between files, names that are links, signatures, and what the check of a built site finds"
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from check_sync import root

sys.path.insert(0, str(root/'docs'))
import check, described, pages  # noqa: E402

# --- links

@pytest.mark.parametrize('file', pages.pages, ids=lambda f: f.name)
def test_every_link_between_files_leads_to_a_page(file):
    nb = pages.notebooks.get(file)
    texts = [c.source for c in nb.cells if c.cell_type=='markdown'] if nb else [file.read_text('utf-8')]
    for text in texts: pages.relinked(text, file)

def test_pages_are_different():
    assert len({*pages.pages.values()})==len(pages.pages)

def test_links_become_links_between_pages():
    def relinked(text): return pages.relinked(text, root/'README.md')
    assert relinked('[a *b*](nbs/61_medical.ipynb#hu) c') == '[a *b*](/guides/medical.ipynb#hu) c'
    assert relinked('[`x`](nbs/03_running.ipynb)')        == '[`x`](/api/running.ipynb)'
    assert relinked('![of\nlines](docs/choice.png)')      == '![of\nlines](/pictures/choice.png)'
    for same in ('[a](#here)', '[a](https://doi.org/10.1109/42.836373)', 'f[0](x y)'): assert relinked(same)==same

@pytest.mark.parametrize('link', ['nbs/99_none.ipynb', 'settings.ini', '../elsewhere.md'])
def test_a_link_to_no_page_is_refused(link):
    with pytest.raises(ValueError, match='README.md links to .*no page of the site'):
        pages.relinked(f'[a]({link})', root/'README.md')

def test_names_become_links_and_code_stays():
    known = {'fit_stats': 'lib.block.DataBlock.fit_stats', 'Policy': 'lib.policy.Policy'}
    text = '# `fit_stats`\n`fit_stats`, `Policy()`, `Policy(small=1)`, `other`, [`Policy`](x), ``Policy``\n' \
           '```python\n`Policy`\n```\n| `Policy` |'
    role = '{py:obj}`Policy <lib.policy.Policy>`'
    assert pages.with_names(text, known).split('\n') == [
        '# `fit_stats`', '{py:obj}`fit_stats <lib.block.DataBlock.fit_stats>`, '+role
        + ', `Policy(small=1)`, `other`, [`Policy`](x), ``Policy``', '```python', '`Policy`', '```', f'| {role} |']

def test_formulas_are_drawn_without_a_script():
    pytest.importorskip('latex2mathml')  # a tool of `make docs`
    text = pages.with_math('of `$HOME` and `$x$`: $x_c$, for $5\n$$\\frac 1J$$')
    assert text.startswith('of `$HOME` and `$x$`: <math') and text.count('<math')==2
    assert '<msub><mi>x</mi><mi>c</mi></msub>' in text and 'display="block"' in text and '<mfrac>' in text

# --- outputs

@pytest.mark.parametrize('html,empty', [('', True), ('\n<style>p {color: red}</style>\n<div></div>', True),
                                        ('<style>p {}</style><p>.5</p>', False), (None, False)])
def test_the_html_of_a_progress_bar_that_is_gone_is_empty(html, empty):
    assert pages.is_empty({'data': {} if html is None else {'text/html': html}})==empty

@pytest.mark.parametrize('output,table', [({'text': 'word '*30}, False), ({'text': 'a   b\n'+'word '*30}, True),
    ({'data': {'text/plain': ['   mean\n', '0  .5']}}, True), ({'data': {'text/plain': "'word'"}}, False), ({}, False)])
def test_sentences_are_told_from_tables(output, table): assert pages.is_table(output)==table

# --- definitions

def resized(
    size:int|tuple,     # Height and width
    *, how:str='area',  # `'area'` or `'cubic' | 'linear'`
    fill=None,
    **kwargs            # Keywords of `padded`
)->str:                 # What came out
    "An image in another size"

def padded(
    width:float=.5,     # In pixels
    fill:int=0          # A grey value
): "An image with a border"

class Shape(Exception):
    "An exception"

class _Base:
    def area(self)->float:
        "Of the image"

class Image(_Base):
    "An image"
    def __init__(self, size:int=3): self.size = size
    @property
    def side(self): "Its side"
    @classmethod
    def load(cls, path): "From a file"
    def hidden(self): pass
    def _own(self): "Nobody's"

module = SimpleNamespace(__name__='lib.images', resized=resized, padded=padded, Shape=Shape, Image=Image)
definitions = {o: described.Definition(module, o) for o in ('resized', 'padded', 'Shape', 'Image')}

def test_signatures():
    assert described.shown_signature(resized)=="(size, *, how='area', fill=None, **kwargs)"
    assert described.shown_signature(Image)=='(size=3)'
    assert described.shown_signature(Shape)==''
    assert repr(described.shown_default(len))=='len' and repr(described.shown_default(object()))=='…'

def test_parameters_are_a_table():
    assert described.parameter_table(resized, definitions)==[
        '| Parameter | Type | Default | Meaning |', '| --- | --- | --- | --- |',
        r'| `size` | `int\|tuple` |  | Height and width |',
        r"| `how` | `str` | `'area'` | `'area'` or `'cubic' \| 'linear'` |",
        '| `fill` |  | `None` | A grey value |',
        '| `kwargs` |  |  | Keywords of `padded` |',
        '| *returns* | `str` |  | What came out |', '']

def test_a_table_of_names_alone_is_left_out():
    def f(a, b): "Two arguments"
    assert described.parameter_table(f, definitions)==described.parameter_table(Shape, definitions)==[]

def test_members_are_public_and_documented():
    found = described.members(definitions['Image'])
    assert [o.name for o in found]==['Image.area', 'Image.side', 'Image.load']
    assert [o.full_name for o in found][0]=='lib.images.Image.area' and found[1].summary=='Its side'

def test_a_class_is_described_with_its_members():
    text = '\n'.join(described.described(definitions['Image'], definitions))
    assert text.startswith('::::{py:class} Image(size=3)\n\nAn image\n') and text.count('::::')==2
    for line in (':::{py:property} Image.side', ':::{py:method} Image.load(path)', ':::{py:method} Image.area()'):
        assert f'\n{line}\n' in text

def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path/'thesis.md').write_text('years of work')
    with pytest.raises(SystemExit, match='holds something else'): pages.lay_out(tmp_path)
    assert (tmp_path/'thesis.md').read_text()=='years of work'

# --- a site that was built

def site(folder, **files):
    for name,text in files.items(): (folder/f'{name}.html').write_text(text)
    return folder

def test_a_site_that_is_whole(tmp_path):
    site(tmp_path, index='<a href="other.html#here">a</a><a href="https://x.org">b</a><img src="data:image/png;base64,">',
         other='<h1 id="here"></h1><a href="#here">a</a><a href=".">b</a>')
    assert [*check.broken(tmp_path.resolve())]==[]

@pytest.mark.parametrize('html,said', [
    ('<a href="none.html">a</a>',                   'index.html: none.html is not there'),
    ('<a href="#none">a</a>',                       'index.html: #none has no such anchor'),
    ('<a href="index.html#none">a</a>',             'index.html: index.html#none has no such anchor'),
    ('<img src="none.png">',                        'index.html: none.png is not there'),
    ('<script src="https://x.org/a.js"></script>',  'index.html loads https://x.org/a.js from elsewhere'),
    ('<link href="//x.org/a.css">',                 'index.html loads //x.org/a.css from elsewhere')])
def test_what_is_broken_is_named(tmp_path, html, said):
    assert [*check.broken(site(tmp_path, index=html).resolve())]==[said]

def test_a_folder_without_a_site_is_refused(tmp_path):
    with pytest.raises(SystemExit, match='holds no site'): check.main(Path(tmp_path))
