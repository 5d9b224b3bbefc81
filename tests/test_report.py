"The page of `report`: whole, numbers as in the file, nothing from outside, and harmless whatever names hold"

import base64,io,json,os,re,unicodedata
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from helpers import block,custom,files_of,image_folder,measured,patients,ledger,refusal,small

from fastai_normstats import cli
from fastai_normstats.all import NormStats,StatsChoice,choose_stats,plot_drift,report_stats
from fastai_normstats.view.report import _img

void = {'meta', 'img', 'br'}

class Page(HTMLParser):
    "The tags of a page in order, each closed; the text of each element with all in it; tables as rows of text"
    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.source = page if isinstance(page, str) else page.read_bytes().decode('utf-8')
        self.tags,self.attrs,self.texts,self.open,self.tables = [],[],[],[],[]
        self.feed(self.source)
        self.close()
        assert not self.open, f'never closed: {self.open}'

    def handle_starttag(self, tag, attrs):
        assert len({k for k,_ in attrs})==len(attrs), (tag, attrs)
        self.tags.append(tag), self.attrs.append((tag, dict(attrs)))
        if tag=='table': self.tables.append([])
        if tag=='tr': self.tables[-1].append([])
        if tag in void: return
        self.texts.append([tag, ''])
        self.open.append(self.texts[-1])

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0]==tag, (tag, self.open)
        text = self.open.pop()[1]
        if tag in ('td', 'th'): self.tables[-1][-1].append(text)

    def handle_data(self, data):
        for element in self.open: element[1] += data

    def of(self, *tags): return [text for tag,text in self.texts if tag in tags]
    @property
    def text(self): return self.of('body')[0]
    @property
    def images(self): return [a for t,a in self.attrs if t=='img']
    def table(self, i=0): return pd.DataFrame(self.tables[i][1:], columns=self.tables[i][0])
    def pictures(self):
        return [Image.open(io.BytesIO(base64.b64decode(a['src'].split(',', 1)[1], validate=True))) for a in self.images]

@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(cli, '_workers', lambda: 0)
    yield
    plt.close('all')

def sketch(axs, alt):
    plt.close('all')
    return _img(dot.getvalue(), alt, 1, 1)

dot = io.BytesIO()
Image.new('L', (2, 2)).save(dot, 'png')

@pytest.fixture
def sketched(monkeypatch):
    "Pages with dots for the pictures, which take most of the time"
    monkeypatch.setattr('fastai_normstats.view.report._picture', sketch)
    for draw in ('StatsChoice.plot', 'plot_drift'):
        monkeypatch.setattr(f'fastai_normstats.view.report.{draw}', lambda *args: None)

@pytest.fixture(scope='module')
def grouped():
    "A choice on 700 images of 350 patients"
    x,whose = patients([1, 2, 3]*117, seed=1)
    return choose_stats(len(x), ledger(x, whose).measured())

@pytest.fixture
def saved(grouped, tmp_path): return grouped.save(tmp_path/'stats.json')

def checked(group='scanner', verdict='drifted', n=40):
    "A table as `check_stats` gives it, a row for each of three channels"
    row = dict(group=group, n=n, shift=-.5, shift_low=-.6, shift_high=-.4, std_ratio=.8, ratio_low=.7, ratio_high=.9,
               z=9., p=1e-9, verdict=verdict)
    return pd.DataFrame([dict(row, channel=c, n_needed=pd.NA) for c in range(3)])

# --- the page itself

def sections(page): return page.of('h2')

parts = ['What is used, and why', 'The numbers', 'The picture', 'Unusual images', 'Where it comes from']

def test_one_whole_page(saved, tmp_path, sketched):
    page = Page(StatsChoice.load(saved).report(tmp_path/'r.html'))
    assert page.source.startswith('<!DOCTYPE html>\n<html lang="en">') and page.tags.count('h1')==1
    assert page.of('title')==page.of('h1')==['Normalisation statistics: stats.json']
    assert sections(page)==parts and 'main' in page.tags and 'header' in page.tags and 'footer' in page.tags
    assert any(a.get('name')=='viewport' for t,a in page.attrs if t=='meta')
    assert all(a['alt'].strip() for a in page.images)
    levels = [int(t[1]) for t in page.tags if re.fullmatch('h[1-6]', t)]
    assert levels[0]==1 and all(b<=a+1 for a,b in zip(levels, levels[1:]))

def test_nothing_from_outside(saved, tmp_path):
    page = Page(report_stats(StatsChoice.load(saved), tmp_path/'r.html', drift=checked()))
    for a in page.images: page.source = page.source.replace(a['src'], '')
    assert not re.search(r'https?:|//|url\(|@import', page.source)
    assert not {'script', 'link', 'iframe', 'object', 'a', 'form', 'base'}&{*page.tags}
    for tag,attrs in page.attrs:
        assert not [k for k in attrs if k.startswith('on')]
        if 'src' in attrs: assert re.fullmatch('data:image/png;base64,[A-Za-z0-9+/=]+', attrs['src'])
    policy, = (a['content'] for t,a in page.attrs if a.get('http-equiv')=='Content-Security-Policy')
    assert "default-src 'none'" in policy and 'script' not in policy

def rules(css, start):
    "What stands in the braces after `start`"
    at = css.index(start)+len(start)
    depth,i = 1,at
    while depth: depth,i = depth+{'{': 1, '}': -1}.get(css[i], 0),i+1
    return css[at:i-1]

def test_dark_narrow_and_paper(saved, tmp_path, sketched):
    css = re.search('<style>(.*?)</style>', Page(StatsChoice.load(saved).report(tmp_path/'r.html')).source, re.S)[1]
    assert css.count('{')==css.count('}') and 'size:' not in rules(css, '@page{'), 'A4 and letter both'
    dark,paper = rules(css, '@media (prefers-color-scheme:dark){'),rules(css, '@media print{')
    def names(s): return {*re.findall('--[a-z]+', rules(s, ':root{'))}
    assert names(dark)==names(css)==names(paper), 'every colour has its value for each'
    assert '--ground:#fff' in paper and 'color-scheme:light;' in paper
    assert re.search(r'\btr,figure[^{}]*\{break-inside:avoid\}', paper)
    assert css.index('@media print')>css.index('prefers-color-scheme:dark'), 'paper has the last word'
    assert 'max-width:44rem' in css

def test_pictures_are_pictures(saved, tmp_path):
    pages = [Page(report_stats(StatsChoice.load(saved), tmp_path/'r.html', drift=d)) for d in (None, checked())]
    assert [len(p.images) for p in pages]==[1, 2]
    for page in pages:
        for attrs,im in zip(page.images, page.pictures()):
            im.load()
            assert im.format=='PNG' and abs(im.width-2*int(attrs['width']))<=2
            a = np.asarray(im.convert('L'))
            assert a[0].min()==255 and a.min()<60, 'dark on white'
    assert not plt.get_fignums()

def test_theme_of_the_notebook_does_not_matter(saved, tmp_path):
    with plt.style.context('dark_background'), matplotlib.rc_context({'savefig.dpi': 30, 'savefig.transparent': True}):
        im, = Page(StatsChoice.load(saved).report(tmp_path/'r.html')).pictures()
    assert np.asarray(im.convert('L'))[0].min()==255 and im.width>1000

# --- what it says

def written(v): return '–' if v is None else f'{v:.4g}'

def test_numbers_are_those_of_the_file(saved, tmp_path, sketched):
    "Of the JSON, read without this package"
    d,df = json.loads(saved.read_text()),Page(StatsChoice.load(saved).report(tmp_path/'r.html')).table()
    own,model = (df[df.candidate==k] for k in ('custom', 'imagenet'))
    for k in ('mean', 'mean_se', 'std', 'std_se', 'image_std'):
        assert own[k.replace('_', ' ')].tolist()==[*map(written, d['measured'][k])], k
    for k in ('mean', 'std'): assert model[k].tolist()==[*map(written, d['model'][k])]
    shift = (np.array(d['measured']['mean'])-d['model']['mean'])/d['model']['std']
    assert own['shift'].tolist()==[*map(written, shift)]
    assert own['std ratio'].tolist()==[*map(written, np.array(d['measured']['image_std'])/d['model']['std'])]

def test_reason_code_and_provenance(saved, tmp_path, sketched):
    d,page = json.loads(saved.read_text()),Page(StatsChoice.load(saved).report(tmp_path/'r.html'))
    assert d['why'].replace('`', '') in page.text and f"chosen by rule {d['rule']}" in page.text
    code, = (t for t in page.of('code') if 'from_stats' in t)
    numbers = eval(code.split('  #')[0].removeprefix('Normalize.from_stats'))
    np.testing.assert_array_equal(np.float32(numbers), np.float32([d['stats']['mean'], d['stats']['std']]))
    m = d['measured']
    effect = max(m['design_effect'])
    assert f"{m['n_images']:,} images of {m['n_groups']:,} patients" in page.text
    assert f"worth {m['n_images']/effect:,.0f} independent ones" in page.text and f'{effect:.3g}' in page.text
    for k in ('mean', 'std', 'shift', 'σ', 'design effect'): assert k in page.text

def test_all_that_provenance_keeps(grouped, tmp_path, sketched):
    "Whatever it is, in whatever order; nothing that is not known, nothing at length"
    odd = dict(measured_at='2026-01-02T03:04:05+00:00', n_images=1234, image_size=[64, 48], seed=7, mask=None,
               transforms=['Resize', 'ToTensor'], versions=dict(torch='2.9', fastai='2.8'),
               hospital={'a': [1, {'b': None}]}, big='x'*5000)
    page = Page(replace(grouped, provenance=odd, units='HU', bands=('a', 'b', 'c')).report(tmp_path/'r.html'))
    facts = dict(zip(page.of('dt'), page.of('dd')))
    assert facts['measured']=='2026-01-02T03:04:05+00:00' and facts['images measured']=='1,234'
    assert facts['size of the images']=='64 × 48' and facts['transforms']=='Resize, ToTensor' and facts['seed']=='7'
    assert facts['versions']=='torch 2.9, fastai 2.8' and "'b': None" in facts['hospital'] and 'mask' not in facts
    assert len(facts['big'])<=1000 and facts['bands']=='a, b, c' and facts['units']=='HU'

def test_warnings_and_notes(grouped, tmp_path, sketched):
    page = Page(replace(grouped, warnings=('first `x`', 'second')).report(tmp_path/'r.html', notes=['third']))
    assert all(s in page.text for s in ('first ', 'second', 'third')) and 'x' in page.of('code')

@pytest.mark.parametrize('stats', ['imagenet', ((.5,), (.25,)), 'minmax', 'clip-zscore', 'image-zscore', 'lrn'])
def test_other_choices(tmp_path, stats):
    "Nothing was measured, one channel, other schemes"
    how = dict(stats=stats) if stats in ('imagenet',) or isinstance(stats, tuple) else dict(scheme=stats)
    m = None if 'stats' in how else measured()
    choice = choose_stats(50, m, **how)
    page = Page(choice.report(tmp_path/'r.html'))
    assert sections(page)==parts and ('There is none' in page.text)==(m is None)
    assert ('the limits that the scheme goes by' in page.text)==(stats in ('minmax', 'clip-zscore'))
    assert len(page.table())==len(choice.table())

# --- unusual images

def loaders(folder, **kwargs):
    return block().dataloaders(folder, **small).fit_stats(cache=False, **{**custom, **kwargs})

def test_unusual_images_are_shown(folder, tmp_path, sketched):
    "Names, numbers and pixels of the files, the white one first"
    odd = files_of(folder)[5]
    Image.new('RGB', (16, 16), 'white').save(odd)
    dls = loaders(folder)
    page = Page(report_stats(dls, tmp_path/'r.html', n=3))
    names = page.of('b')[-3:]
    assert str(odd).endswith(names[0]) and len({*names})==3 and len(page.images)==4
    assert 'not all of them' not in page.text and 'Of 20 images, the 3 that sway' in page.text
    for name,im in zip(names, page.pictures()[1:]):
        f, = (f for f in files_of(folder) if str(f).endswith(name))
        want = np.asarray(Image.open(f).resize((12, 12), Image.Resampling.BILINEAR)).astype(int)
        assert abs(np.asarray(im).astype(int)-want).max()<=1
    assert 'influence' in page.text and 'mean 1.00' in page.text

def test_saved_choice_does_not_know_them(saved, folder, tmp_path, sketched):
    "And says how to get to know them; loaders of other images are said to be such"
    choice = StatsChoice.load(saved)
    assert 'Not known here' in Page(choice.report(tmp_path/'r.html')).text
    page = Page(choice.report(tmp_path/'r.html', dls=loaders(folder), n=2))
    assert 'not all of them' in page.text and 'Not known here' not in page.text and len(page.images)==3

def test_large_images_become_thumbnails(tmp_path, sketched):
    folder = image_folder(tmp_path/'im', n=4, size=500)
    dls = block(splitter=lambda o: (range(4), []), size=500).dataloaders(folder, bs=2, num_workers=0)
    dls.fit_stats(cache=False, **custom)
    assert all(max(im.size)==400 for im in Page(report_stats(dls, tmp_path/'r.html')).pictures()[1:])

# --- drift

def test_drift_only_where_there_is_some(grouped, tmp_path, sketched):
    two = {'clinic A': checked(verdict='alike'), 'clinic B': checked('late')}
    page = Page(grouped.report(tmp_path/'r.html', drift=two))
    assert sections(page)==[*parts[:4], 'Drift', parts[4]] and page.of('h3')==[*two]
    assert 'They fit the training images.' in page.text and 'They have drifted from the training images.' in page.text
    assert page.table(2).columns.tolist()[:4]==['group', 'channel', 'n', 'verdict'] and len(page.tables)==3
    assert page.table(2)['shift'].tolist()==['-0.5']*3 and 'n needed' not in page.table(2)
    for none in (None, {}): assert 'Drift' not in sections(Page(grouped.report(tmp_path/'r.html', drift=none)))

def test_hundreds_of_groups(grouped, tmp_path, sketched):
    many = pd.concat([checked(f'site {i}', 'drifted' if i==77 else 'alike') for i in range(100)], ignore_index=True)
    page = Page(grouped.report(tmp_path/'r.html', drift=many))
    assert len(page.table(1))==120 and 'site 77' in {*page.table(1).group}
    assert '60 of 100 groups are not shown' in page.text

# --- mistakes

def test_refusals(grouped, tmp_path, sketched):
    "One sentence, and nothing is written"
    (tmp_path/'d.html').mkdir()
    for out,says in ((tmp_path, 'it is a folder'), (tmp_path/'d.html', 'it is a folder'), (tmp_path/'r.pdf', '.html'),
                     (tmp_path/'report', '.html')):
        assert says in refusal(grouped.report, out)
    assert 'no such folder' in refusal(grouped.report, tmp_path/'no'/'r.html', exc=OSError)
    for kwargs in (dict(drift=5), dict(drift={'a': 5}), dict(drift=[checked()])):
        assert '`drift` must be' in refusal(grouped.report, tmp_path/'r.html', exc=TypeError, **kwargs)
    assert 'must be a `StatsChoice`' in refusal(report_stats, 'stats.json', tmp_path/'r.html', exc=TypeError)
    assert '`n` must be' in refusal(grouped.report, tmp_path/'r.html', n=0, dls=block().dataloaders(
        image_folder(tmp_path/'im', n=27), **small))
    assert {f.name for f in tmp_path.iterdir()}=={'d.html', 'im'}

def test_table_of_something_else(grouped, tmp_path, monkeypatch):
    monkeypatch.setattr('fastai_normstats.view.report._shape', lambda choice: '')  # drawing takes long
    for df in (pd.DataFrame(dict(verdict=['alike'])), pd.DataFrame(dict(a=[1])), checked()[:0]):
        assert '`df` ' in refusal(grouped.report, tmp_path/'r.html', drift=df)
    assert not [*tmp_path.iterdir()]

def test_loaders_that_nobody_fitted(folder, tmp_path):
    assert 'fit_stats' in refusal(report_stats, block().dataloaders(folder, **small), tmp_path/'r.html', exc=TypeError)

def test_old_page_stays_whole_where_a_new_one_fails(grouped, tmp_path, monkeypatch, sketched):
    page = grouped.report(tmp_path/'r.html')
    was = page.read_bytes()
    with pytest.raises(TypeError): grouped.report(page, drift=5)
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(OSError): grouped.report(page, name='other')
    assert page.read_bytes()==was and [f.name for f in tmp_path.iterdir()]==['r.html']

# --- whatever stands in names

evil = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "' onload='x", '&amp;&lt;', '</style></main>',
        '<!--', ']]>', '\x1b[31mred\x1b[2J', '\x9b31m', 'a\nb\rc\td', '\u202egnp.exe', '\u2066x\u2069', 'caf\udce9',
        '\x00\x07', '$\\frac$', '`code`<b>', '%s{0}', 'x'*3000]

def harmless(page):
    "No control characters, none that turn the direction of reading round, no halves of characters"
    bad = [c for c in page.source if unicodedata.category(c) in ('Cc', 'Cf', 'Cs') and c not in '\n\t']
    assert not bad, bad

def everywhere(choice, s, out):
    "The page of a choice that holds `s` wherever a file or a caller may bring something"
    stats = replace(choice.stats, source=s, domain=s)
    model = NormStats(choice.model.mean, choice.model.std, name=s, domain=s, source=s)
    choice = replace(choice, stats=stats, model=model, why=s, warnings=(s, s), file=s, units=s, kind='custom',
                     bands=(f'{s}1', f'{s}2', f'{s}3'), provenance={s: s, 'transforms': [s, s], 'versions': {s: s}})
    return Page(report_stats(choice, out, drift={s: checked(s)}, name=s, notes=[s]))

def skeleton(page):
    "Tags with the names of their attributes; what stands in backticks may be code"
    return [(tag, *attrs) for tag,attrs in page.attrs if tag!='code']

@pytest.mark.parametrize('s', evil, ids=ascii)
def test_text_stays_text(grouped, tmp_path, sketched, s):
    "The same elements in the same order as with a plain word; pictures have a test of their own"
    plain,page = (everywhere(grouped, o, tmp_path/'r.html') for o in ('word', s))
    assert skeleton(page)==skeleton(plain)
    harmless(page)
    if not s.isprintable() or '`' in s or len(s)>100: return
    for texts in (page.of('h3'), page.of('dt'), page.of('dd'), page.table().candidate, page.table(1).group):
        assert s in [*texts]
    assert page.of('h1')==page.of('title')==[f'Normalisation statistics: {s}'] and page.text.count(s)>15

@pytest.mark.parametrize('s', evil, ids=ascii)
def test_table_in_a_notebook(grouped, s):
    "What a file brings is text, and can be sent as UTF-8"
    def shown(o):
        choice = replace(grouped, why=o, warnings=(o,), model=replace(grouped.model, name=o))
        return Page(choice._repr_html_())
    page = shown(s)
    assert skeleton(page)==skeleton(shown('word'))
    harmless(page)
    page.source.encode('utf-8')

@pytest.mark.parametrize('s', ['$\\frac$', '$x', 'caf\udce9', 'a\nb', '\x1b[31m'], ids=ascii)
def test_pictures_of_odd_names(grouped, s):
    "Of candidates, bands and groups: drawn as they are, not read as a formula"
    choice = replace(grouped, model=replace(grouped.model, name=f'm {s}'), bands=('r', 'g', f'b {s}'))
    for axs in (choice.plot(), plot_drift(checked(f'g {s}'))):
        axs[0].figure.canvas.draw()
        said = [t.get_text() for t in axs[0].get_yticklabels()]
        assert not s.isprintable() or any(s in o for o in said), said

# --- the command

@pytest.fixture
def normstats(capsys):
    "Run the command in this process; its status, and what it printed where"
    def run(*args):
        capsys.readouterr()
        status = cli.main([str(a) for a in args])
        out,err = capsys.readouterr()
        assert not [c for c in out+err if not c.isprintable() and c not in '\n\t'], 'nothing steers the terminal'
        assert len(err.splitlines())==(status==1) and 'Traceback' not in err
        return status,out,err
    return run

@pytest.fixture
def fitted(folder, tmp_path, normstats):
    assert normstats('fit', folder, '--size', 16, '--valid-pct', 0, '--no-cache', '--out', tmp_path/'s.json')[0]==0
    return tmp_path/'s.json'

def test_command(fitted, folder, tmp_path, normstats, monkeypatch, sketched):
    monkeypatch.chdir(tmp_path)
    status,out,_ = normstats('report', fitted)
    assert (status, out)==(0, 'report: report.html\n')
    page = Page(tmp_path/'report.html')
    assert page.of('h1')==['Normalisation statistics: s.json'] and sections(page)==parts
    assert '--images FOLDER' in page.text

def darker(folder, to, n=27):
    to.mkdir()
    for f in files_of(folder)[:n]: Image.open(f).point(lambda v: v//4).save(to/f.name)
    return to

def test_command_with_folders(fitted, folder, tmp_path, normstats):
    "As `check` says it, status and numbers too, a part for each"
    dark = darker(folder, tmp_path/'dark')
    status,out,_ = normstats('report', fitted, folder, dark, '--images', folder, '--name', 'mine',
                             '--out', tmp_path/'r.html')
    page = Page(tmp_path/'r.html')
    assert status==3 and 'they fit the training images' in out and 'they have drifted from the training images' in out
    assert page.of('h1')==['Normalisation statistics: mine'] and page.of('h3')==[str(folder), str(dark)]
    assert len(page.images)==1+8+2 and 'not all of them' not in page.text
    status,told,_ = normstats('check', fitted, dark)
    assert status==3
    rows = [line.split() for line in told.splitlines() if line.endswith('<NA>')]
    shift = page.table(2)['shift'].tolist()
    assert len(rows)==3 and [f'{float(r[2]):.3g}' for r in rows]==[f'{float(v):.3g}' for v in shift]
    assert normstats('report', fitted, folder, '--out', tmp_path/'r.html')[0]==0

def test_command_by_folder_with_groups(fitted, folder, tmp_path, normstats, sketched):
    status,out,_ = normstats('report', fitted, folder, '--by-folder', '--images', folder, '--group', '([0-9]+)[.]png',
                             '--glob', '*.png', '--out', tmp_path/'r.html')
    page = Page(tmp_path/'r.html')
    assert status==0 and {*page.table(1).group}=={'a', 'b'} and 'group 0' in page.text

def test_command_notes_what_images_did_not_go_through(grouped, folder, tmp_path, normstats, sketched):
    choice = replace(grouped, provenance=dict(transforms=['fastai.vision.augment.RandomCrop (size 64)']))
    choice.save(tmp_path/'s.json')
    status,out,_ = normstats('report', tmp_path/'s.json', folder, '--size', 16, '--out', tmp_path/'r.html')
    says = 'measured after RandomCrop, which these images did not go through'
    assert says in out and says in Page(tmp_path/'r.html').text
    normstats('report', tmp_path/'s.json', '--out', tmp_path/'r.html')
    assert says not in Page(tmp_path/'r.html').text

def test_mistakes_are_found_before_anything_is_read(fitted, folder, tmp_path, normstats, monkeypatch):
    "One line, status 1, and the old page stays"
    (tmp_path/'r.html').write_text('old')
    monkeypatch.setattr(cli, '_loaders', lambda *args: pytest.fail('images were read'))
    (tmp_path/'text.json').write_text('{}')
    for args,says in (((tmp_path/'no.json',), 'No such file'), ((tmp_path/'text.json',), 'not a saved StatsChoice'),
                      ((fitted, tmp_path/'no'), 'no such folder'),
                      ((fitted, folder, '--images', tmp_path/'no'), 'no such folder'),
                      ((fitted, folder, '--glob', '*.bmp'), 'no images in'),
                      ((fitted, folder, '--group', '('), 'no regular expression'),
                      ((fitted, fitted), 'not a folder'), ((fitted, ''), 'is empty')):
        status,out,err = normstats('report', *args, '--out', tmp_path/'r.html')
        assert status==1 and says in err and out=='', (args, err)
    for out,says in ((tmp_path, 'it is a folder'), (tmp_path/'r.pdf', '.html'),
                      (tmp_path/'no'/'r.html', 'no such folder')):
        status,_,err = normstats('report', fitted, folder, '--out', out)
        assert status==1 and says in err, err
    assert (tmp_path/'r.html').read_text()=='old'

def test_odd_file_names(folder, tmp_path, normstats):
    "HTML, quotes, escape sequences, new lines and bytes that are no UTF-8, of files, of folders and of the choice"
    root = tmp_path/'im"<b>&\x1b[2J'
    names = [b'<i>.png', b'a"&\'.png', b'\x1b[31mred.png', b'new\nline.png', b'caf\xe9.png', '\u202egnp.png'.encode()]
    for sub in ('<u>', 'b$x$\x1b]0;t\x07'):
        (root/sub).mkdir(parents=True)
        for name,f in zip(names, files_of(folder)):
            with open(os.path.join(os.fsencode(root/sub), name), 'wb') as out: out.write(f.read_bytes())
    fit = ('fit', root, '--size', 16, '--valid-pct', 0, '--no-cache', '--out', tmp_path/'<s>\x1b[1m.json')
    assert normstats(*fit)[0]==0
    status,out,_ = normstats('report', fit[-1], root, '--by-folder', '--images', root, '--out', tmp_path/'r\x1b.html')
    page = Page(tmp_path/'r\x1b.html')
    harmless(page)
    assert status in (0, 3) and not {'i', 'u', 'script'}&{*page.tags} and len(page.images)==1+8+1
    assert {'<u>', 'b$x$?]0;t?'}=={*page.table(1).group} and any('<i>.png' in t for t in page.of('b'))
