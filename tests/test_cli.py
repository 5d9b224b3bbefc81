"The command line: groups, the cache, and output that suits any stream, whatever is in file names and in saved choices"

import io,json,os,re,subprocess,sys
from datetime import datetime,timezone

import numpy as np
import pytest
import torch
from fastai.data.all import CategoryBlock,DataBlock,RandomSplitter,get_image_files,parent_label
from fastai.vision.data import ImageBlock
from helpers import image_folder,random_image
from PIL import Image

import fastai_normstats.block
from fastai_normstats import cli
from fastai_normstats.choice import StatsChoice
from fastai_normstats.policy import choose_stats
from fastai_normstats.running import RunningStats

ESC,CSI = '\x1b[2J','\x9b31m'  # clears the screen; the same kind of thing in one character less
ascii_ok = '\t\n'+''.join(map(chr, range(32, 127)))

@pytest.fixture(autouse=True)
def in_this_process(monkeypatch): monkeypatch.setattr(cli, '_workers', lambda: 0)

@pytest.fixture
def normstats(capsys):
    "Run the command in this process; checks its status, and stderr: one line after a mistake, else none"
    def run(*args, status=0):
        capsys.readouterr()
        got = cli.main([str(a) for a in args])
        out,err = capsys.readouterr()
        assert got==status, (got, out, err)
        assert len(err.splitlines())==(status==1) and 'Traceback' not in err, err
        return err if status==1 else out
    return run

def pixels(f, size=16): return np.asarray(Image.open(f).convert('RGB').resize((size, size)), np.float64)/255

def noisy(rng, a): return Image.fromarray((a+rng.normal(0, 4, a.shape)).clip(0, 255).astype(np.uint8))

@pytest.fixture(scope='module')
def families(tmp_path_factory):
    "40 patients with one to five images that differ by little"
    path,rng = tmp_path_factory.mktemp('families'),np.random.default_rng(0)
    for p in range(40):
        (path/f'class{p%2}').mkdir(exist_ok=True)
        a = np.asarray(random_image(rng), np.float64)
        for k in range(1+p%5): noisy(rng, a).save(path/f'class{p%2}'/f'scan_p{p:02}_{k}.png')
    return path

# --- groups

def ratio_se(x, whose):
    "Standard error of the pooled mean of `x` (n, pixels), groups as units: Cochran 1977, §6, a ratio of totals"
    t,n,m,G = {},{},x.mean(),len(set(whose))
    for row,g in zip(x, whose): t[g],n[g] = t.get(g, 0)+row.sum(),n.get(g, 0)+len(row)
    return np.sqrt(G/(G-1)*sum((t[g]-m*n[g])**2 for g in t))/x.size

@pytest.mark.parametrize('pattern', ['p[0-9]+', 'scan_(p[0-9]+)_', '(scan)_(p[0-9]+)'])
def test_fit_with_groups(families, tmp_path, normstats, pattern):
    "The errors of numpy, with patients as units; without `--group`, with images as units"
    files = sorted(families.rglob('*.png'))
    x,patients = np.stack([pixels(f) for f in files]),[f.name.split('_')[1] for f in files]
    fit = ('fit', families, '--size', 16, '--valid-pct', 0, '--tol', 0, '--no-cache', '--out', tmp_path/'s.json')
    for args,whose in (((), files), (('--group', pattern), patients)):
        normstats(*fit, *args)
        m = StatsChoice.load(tmp_path/'s.json').measured
        want = [ratio_se(x[...,c].reshape(len(x), -1), whose) for c in range(3)]
        np.testing.assert_allclose(m.mean_se, want, rtol=1e-5)
        assert m.n_groups==len(set(whose)) and m.n_images==len(files)

def test_fit_with_groups_of_the_training_images_only(families, tmp_path, normstats):
    "The training split and its groups go together; names outside the training folder may follow another rule"
    fit = ('fit', families, '--size', 16, '--out', tmp_path/'s.json')
    out = normstats(*fit, '--train-folder', 'class0', '--group', 'class0/scan_(p[0-9]+)', '--no-cache')
    assert StatsChoice.load(tmp_path/'s.json').measured.n_groups==20 and '20 groups' in out
    files = sorted(families.rglob('*.png'))
    train = [files[i] for i in RandomSplitter(.3, seed=4)(files)[0]]
    normstats(*fit, '--valid-pct', .3, '--seed', 4, '--group', 'p[0-9]+')
    assert StatsChoice.load(tmp_path/'s.json').measured.n_groups==len({f.name.split('_')[1] for f in train})

def test_path_below_the_folder_says_the_group(tmp_path, normstats):
    "What stands in the path of the folder itself is no group"
    folder = image_folder(tmp_path/'patient7', n=6)
    assert 'finds nothing in' in normstats('fit', folder, '--group', 'patient[0-9]', status=1)
    normstats('fit', folder, '--size', 16, '--valid-pct', 0, '--no-cache', '--group', '^[ab]/00',
              '--out', tmp_path/'s.json')
    assert StatsChoice.load(tmp_path/'s.json').measured.n_groups==2

def test_statistics_under_a_mask_are_not_compared(families, tmp_path, normstats):
    "The command line has no mask: other pixels would be compared, and called drifted"
    db = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label)
    def bright(x): return x[:, :1]>.5
    db.fit_stats(families, mask=bright, stats='custom', bs=8, num_workers=0, verbose=False)
    db.stats_choice.save(tmp_path/'s.json')
    for command in ('check', 'report'):
        said = normstats(command, tmp_path/'s.json', families, status=1)
        assert 'counts only the pixels that `mask=' in said and '`dls.check_stats(folder)` in Python can' in said
    assert not (tmp_path/'report.html').exists()

def test_check_with_groups(families, tmp_path, normstats, monkeypatch):
    "Each image goes to `check_stats` with its patient"
    import fastai_normstats.drift
    seen,real = [],fastai_normstats.drift.measure_stats
    def spy(dl, *args, groups=None, **kwargs):
        seen.append((list(dl.dataset.items), groups))
        return real(dl, *args, groups=groups, **kwargs)
    normstats('fit', families, '--size', 16, '--no-cache', '--group', 'p[0-9]+', '--out', tmp_path/'s.json')
    monkeypatch.setattr(fastai_normstats.drift, 'measure_stats', spy)
    for args,whose in (((), lambda f: None), (('--group', 'scan_(p[0-9]+)'), lambda f: f.name.split('_')[1])):
        seen.clear()
        assert 'they fit' in normstats('check', tmp_path/'s.json', families, *args)
        items,groups = seen[0]
        assert len(items)==len(list(families.rglob('*.png')))
        assert (groups or [None]*len(items))==[whose(f) for f in items]
    out = normstats('check', tmp_path/'s.json', families, '--by-folder', '--group', 'p[0-9]+')
    assert 'class0' in out and 'class1' in out

@pytest.mark.parametrize('command', ['fit', 'check', 'compare'])
@pytest.mark.parametrize('pattern,says', [('(', 'is no regular expression'), ('', 'is empty'),
    ('a{99999999999}', 'is no regular expression'), ('patient[0-9]+', 'finds nothing in'), ('x*', 'finds nothing in'),
    ('class0', 'finds nothing in')])
def test_groups_that_cannot_be(families, tmp_path, normstats, monkeypatch, command, pattern, says):
    "One line, before any image is opened"
    measured(40).save(tmp_path/'s.json')
    monkeypatch.setattr('fastai.vision.core.PILBase.create', lambda *args, **kwargs: pytest.fail('an image was read'))
    monkeypatch.setattr(cli, '_builder', lambda *args: None)
    args = [tmp_path/'s.json']*(command=='check') + [families]
    err = normstats(command, *args, '--group', pattern, status=1)
    assert err.startswith('normstats: ') and '--group' in err and says in err, err

def test_warning_about_groups_says_the_option(tmp_path, normstats):
    "What warnings call `groups=` is `--group` here"
    rng = np.random.default_rng(0)
    for p in range(40):
        a = np.asarray(random_image(rng), np.float64)
        for k in range(2): noisy(rng, a).save(tmp_path/f'p{p:02}_{k}.png')
    fit = ('fit', tmp_path, '--size', 16, '--valid-pct', 0, '--no-cache')
    assert '--group REGEX' in normstats(*fit) and '--group REGEX' not in normstats(*fit, '--group', 'p[0-9]+')

# --- the cache

def kept(out): return re.search(r'kept: +([\d,]+) measurements?, ([\d.,]+) MB', out).groups()

def test_cache(tmp_path, normstats, cache_home):
    folder,mine = image_folder(tmp_path, n=12),cache_home/'fastai_normstats'
    out = normstats('cache')
    assert str(mine) in out and kept(out)==('0', '0.0') and 'newest' not in out
    for seed in (1, 2): normstats('fit', folder, '--size', 16, '--seed', seed, '--out', tmp_path/'s.json')
    files = sorted(mine.glob('*.npz'))
    old,new = 1_600_000_000,1_700_000_000
    for f,t in zip(files, (old, new)): os.utime(f, (t, t))
    (mine/'notes.txt').write_text('of mine')
    out = normstats('cache')
    assert kept(out)==('2', f'{sum(f.stat().st_size for f in files)/1e6:.1f}'), out
    for name,t in (('newest', new), ('oldest', old)):
        assert f"{name}: used {datetime.fromtimestamp(t, timezone.utc):%Y-%m-%d %H:%M} UTC" in out
    out = normstats('cache', '--clear')
    assert 'removed 2 measurements' in out and str(mine) in out and [f.name for f in mine.iterdir()]==['notes.txt']
    assert kept(normstats('cache'))[0]=='0' and 'removed 0 measurements' in normstats('cache', '--clear')

def test_cleared_cache_is_measured_again(tmp_path, normstats, passes):
    folder = image_folder(tmp_path, n=12)
    fit = ('fit', folder, '--size', 16)
    normstats(*fit), normstats(*fit)
    assert len(passes)==1
    normstats('cache', '--clear')
    normstats(*fit)
    assert len(passes)==2

def test_cache_in_a_folder_with_escapes(tmp_path, normstats, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/f'a{ESC}'))
    for args in ((), ('--clear',)): assert ESC not in normstats('cache', *args)

# --- streams

def measured(n=3000):
    x = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(0))*.5
    return choose_stats(n, RunningStats().update(x), stats='auto')

class Stream(io.TextIOWrapper):
    "Text in `encoding`, as `PYTHONIOENCODING` has it; `text` is what came"
    def __init__(self, encoding): super().__init__(io.BytesIO(), encoding=encoding, newline='\n')
    @property
    def text(self):
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)

@pytest.fixture
def streams(monkeypatch):
    "Run the command with stdout and stderr of an encoding: status and what they got"
    def run(encoding, *args):
        with monkeypatch.context() as m:
            out,err = Stream(encoding),Stream(encoding)
            m.setattr(sys, 'stdout', out), m.setattr(sys, 'stderr', err)
            status = cli.main([str(a) for a in args])
            return status,out.text,err.text
    return run

@pytest.mark.parametrize('encoding', ['ascii', 'cp1252', 'utf-8'])
def test_encodings(tmp_path, streams, encoding):
    "Every command gets through, says σ in the letters that there are, and writes what it was to write"
    folder,out,plot = image_folder(tmp_path/'images', n=12),tmp_path/'s.json',tmp_path/'p.png'
    measured().save(tmp_path/'m.json')
    status,said,err = streams(encoding, 'fit', folder, '--size', 16, '--no-cache', '--out', out, '--plot', plot)
    assert (status, err)==(0, '') and StatsChoice.load(out).n_images==10 and plot.stat().st_size>5000
    assert f"saved: {out}" in said and f"plot: {plot}" in said and 'To hard-code it:' in said
    status,said,err = streams(encoding, 'show', tmp_path/'m.json')
    assert (status, err)==(0, '') and (' σ in the mean' if encoding=='utf-8' else ' sigma in the mean') in said
    status,said,err = streams(encoding, 'check', out, folder)
    assert status in (0, 3) and err=='' and '12 images in' in said
    for args in ((), ('resnet50',), ('--domain', 'x-ray')): assert streams(encoding, 'models', *args)[::2]==(0, '')
    assert streams(encoding, 'cache')[::2]==(0, '')
    status,said,err = streams(encoding, 'fit', tmp_path/'ähnlich σ')
    assert (status, said, len(err.splitlines()))==(1, '', 1) and 'no such folder' in err

@pytest.mark.slow
def test_encoding_of_compare(tmp_path, streams, monkeypatch):
    "The result is written although a class has a name that the stream does not know"
    folder = image_folder(tmp_path/'images', n=24, classes=('gesund', 'lungenentzündung σ'))
    args = ('--scratch', '--size', 32, '--epochs', 1, '--folds', 2, '--bs', 8, '--out', tmp_path/'c.json')
    status,said,err = streams('ascii', 'compare', folder, *args)
    assert (status, err)==(0, '') and (tmp_path/'c.json').stat().st_size>1000 and 'saved: ' in said

@pytest.mark.parametrize('encoding', ['ascii', 'cp1252'])
def test_one_liner_of_the_library(tmp_path, monkeypatch, encoding):
    "`fit_stats` with its sentence, on a stream that has no σ"
    db = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label,
                   splitter=RandomSplitter(.2, seed=0))
    with monkeypatch.context() as m:
        out = Stream(encoding)
        m.setattr(sys, 'stdout', out)
        db.fit_stats(image_folder(tmp_path, n=12), bs=4, num_workers=0)
    assert db.stats_choice.rule=='small' and 'rule `small`' in out.text and 'sigma' in out.text

class Full(io.StringIO):
    "A disk that is full after the first lines"
    def __init__(self, left): self.left = left; super().__init__()
    def write(self, s):
        self.left -= s.count('\n')
        if self.left<0: raise OSError(28, 'No space left on device')
        return super().write(s)

def test_full_disk(tmp_path, monkeypatch, capsys):
    "What was asked for is written before the result is printed; that this cannot be done is one line and status 1"
    folder = image_folder(tmp_path/'images', n=12)
    with monkeypatch.context() as m:
        m.setattr(sys, 'stdout', Full(left=1))
        status = cli.main(['fit', str(folder), '--size', '16', '--no-cache', '--out', str(tmp_path/'s.json')])
    err = capsys.readouterr().err
    assert status==1 and len(err.splitlines())==1 and 'No space left' in err
    assert StatsChoice.load(tmp_path/'s.json').n_images==10

start = f'{sys.executable} -W ignore -c "from fastai_normstats.cli import main; raise SystemExit(main())"'

@pytest.mark.slow
@pytest.mark.parametrize('how', ['{} >&-', '{} >&- 2>&-', '{{ sleep 1; exec {}; }} | true; exit ${{PIPESTATUS[0]}}'],
    ids=['closed', 'both closed', 'broken pipe'])
def test_nobody_reads(tmp_path, how):
    "The command goes on to the end, and ends as it would have: a real process, with streams closed by the shell"
    image_folder(tmp_path/'images', n=12)
    line = how.format(f"{start} fit images --size 16 --no-cache --out s.json --plot p.png")
    res = subprocess.run(['bash', '-c', line], cwd=tmp_path, capture_output=True, text=True)
    assert (res.returncode, res.stdout, res.stderr)==(0, '', '')
    assert StatsChoice.load(tmp_path/'s.json').n_images==10 and (tmp_path/'p.png').stat().st_size>5000

@pytest.mark.slow
@pytest.mark.parametrize('how,status', [('{} >&-', 3), ('{} > /dev/full', 1)], ids=['closed', 'full'])
def test_status_of_check_where_nobody_reads(tmp_path, how, status):
    "Drift is told by the status alone; a full disk is an error in one line, also when the interpreter ends"
    image_folder(tmp_path/'images', n=200)
    choose_stats(3000, RunningStats().update(torch.rand(3000, 3, 4, 4)*.1), stats='custom').save(tmp_path/'m.json')
    line = how.format(f'{start} check m.json images --size 16')
    res = subprocess.run(['bash', '-c', line], cwd=tmp_path, capture_output=True, text=True)
    assert res.returncode==status, res.stderr
    assert len(res.stderr.splitlines())==(status==1), res.stderr
    assert ('No space left on device' in res.stderr)==(status==1), res.stderr

def test_a_full_disk_met_by_the_library():
    "One line and status 1, whoever prints, also where the interpreter flushes what is left at its end"
    code = ("import sys; from fastai_normstats import cli\n"
            "def run(argv):\n    sys.stdout.write('left')\n    raise OSError(28, 'No space left on device')\n"
            "cli._run = run\nraise SystemExit(cli.main([]))")
    res = subprocess.run(['bash', '-c', f'"{sys.executable}" -W ignore -c "$CODE" > /dev/full'], capture_output=True,
                         text=True, env={**os.environ, 'CODE': code, 'PYTHONUNBUFFERED': ''})
    assert res.returncode==1 and len(res.stderr.splitlines())==1, res.stderr

def test_closed_streams_in_this_process(tmp_path, monkeypatch):
    measured().save(tmp_path/'m.json')
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        with monkeypatch.context() as m:
            m.setattr(sys, 'stdout', stream), m.setattr(sys, 'stderr', stream)
            commands = (f"show {tmp_path/'m.json'}", f"show {tmp_path/'no.json'}", 'models resnet50', 'cache')
            got = [cli.main(o.split()) for o in commands]
        assert got==[0, 1, 0, 0]

# --- characters that steer a terminal

def steers(text): return [c for c in text if not c.isprintable() and c not in '\n\t']

@pytest.mark.slow
def test_names_of_files_and_folders(tmp_path, normstats):
    "From `fit`, `check` and `compare`, in what they print and in errors"
    folder = image_folder(tmp_path/f'im{ESC}ages', n=24, classes=(f'a{CSI}', 'b\r\x1b]0;title\x07'))
    out = normstats('fit', folder, '--size', 16, '--no-cache', '--out', tmp_path/f's{ESC}.json')
    assert not steers(out) and '24 images in' in out and 'saved: ' in out
    assert not steers(normstats('check', tmp_path/f's{ESC}.json', folder, '--by-folder'))
    args = ('--scratch', '--size', 32, '--epochs', 1, '--folds', 2, '--bs', 8, '--folder', tmp_path/f'r{ESC}',
            '--out', tmp_path/f'c{ESC}.json')
    assert not steers(normstats('compare', folder, *args))
    next(folder.rglob('*.png')).with_name(f'x{ESC}.png').write_text('no image')
    assert not steers(normstats('fit', folder, '--size', 16, '--valid-pct', 0, '--no-cache', status=1))

@pytest.mark.parametrize('args', [('fit', f'no{ESC}'), ('fit', '.', '--model', f'resnet{ESC}'), ('show', f'no{CSI}'),
    ('models', f'resnet{ESC}'), ('models', '--domain', f'x{ESC}'), ('compare', '.', '--model', f'res{ESC}'),
    (f'f{ESC}',), ('fit', '.', f'--o{ESC}'), ('fit', '.', '--scheme', f'z{ESC}'), ('fit', '.', '--size', f'1{ESC}'),
    ('fit', '.', '--group', f'({ESC}'), ('fit', '.', '--plot', f'p.{ESC}')], ids=str)
def test_arguments(tmp_path, normstats, monkeypatch, args):
    monkeypatch.chdir(image_folder(tmp_path, n=6))
    assert not steers(normstats(*args, status=1))

def foreign(path, **kwargs):
    "A saved choice with other fields"
    path.write_text(json.dumps({**measured(40).to_dict(), **kwargs}))
    return path

def inside(key, **kwargs): return {key: {**measured(40).to_dict()[key], **kwargs}}

says = f'seen{ESC}{CSI}\r'
fields = [dict(why=says), dict(warnings=[says]), dict(kind=says), dict(rule=says),
          *[inside(k, **{name: says}) for k in ('stats', 'model') for name in ('name', 'source', 'domain')],
          dict(provenance=dict(measured_at=says, n_images=3, tol=.1, seed=0, versions={says: says}, transforms=[says]))]

@pytest.mark.slow
@pytest.mark.parametrize('field', fields, ids=lambda d: next(iter(d)))
def test_fields_of_a_saved_choice(tmp_path, capsys, field):
    "Printed without what steers a terminal, or refused without it"
    f,folder = foreign(tmp_path/'s.json', **field),image_folder(tmp_path/'images', n=6)
    for args in (['show', f, '--plot', tmp_path/'p.png'], ['check', f, folder, '--size', '16']):
        status = cli.main([str(a) for a in args])
        out,err = capsys.readouterr()
        assert not steers(out+err) and (status!=1 or len(err.splitlines())==1), (out, err)

big = 'a'*300_000
long = dict(measured_at=big, n_images=10**400, tol=10**400, seed=big, versions={big: 'y'}, image_size=big)

@pytest.mark.parametrize('provenance', [dict(measured_at=5, n_images='x', tol=[], seed={}, versions=[]),
    dict(transforms=5), dict(transforms=[5, None, 'Flip']), dict(transforms={'a': 1}), dict(image_size=['a', 'b']),
    dict(image_size=[10**9]*2), dict(image_size=[-4, -4]), dict(image_size=[True, True]), long],
    ids=lambda d: str(d)[:40])
def test_odd_provenance(tmp_path, normstats, provenance):
    "A line less, never an error of Python's, and nothing echoed at length; statuses as without"
    f,folder = foreign(tmp_path/'s.json', provenance=provenance),image_folder(tmp_path/'images', n=6)
    if provenance is long: assert len(cli_output(['show', f]))<3000
    else:
        assert 'To hard-code it:' in normstats('show', f)
        assert cli.main(['check', str(f), str(folder)]) in (0, 3)

def cli_output(args):
    "All that the command prints"
    out,err = Stream('utf-8'),Stream('utf-8')
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, 'stdout', out), m.setattr(sys, 'stderr', err)
        cli.main([str(a) for a in args])
        return out.text+err.text

# --- files that are no saved choice

@pytest.mark.parametrize('field', [dict(scheme=None), dict(scheme=big), dict(rule=big), dict(kind=big), dict(why=big),
    dict(warnings=[big]), dict(n_images=10**400), dict(n_images=big), dict(version=big), dict(version=1), {big: 1},
    inside('stats', name=big), inside('stats', mean=[10**400]*3), inside('stats', mean=[big]*3),
    dict(measured={big: 1}), inside('measured', n_images=10**400), dict(kind='<script>'), dict(rule='x`\nimport os')],
    ids=lambda d: str(d)[:40])
def test_refused(tmp_path, normstats, field):
    "One sentence with the file's name, and not all that stands in the file"
    f = foreign(tmp_path/'s.json', **field)
    for args in (('show', f), ('check', f, tmp_path)):
        err = normstats(*args, status=1)
        assert err.startswith('normstats: ') and 's.json' in err and len(err)<len(str(tmp_path))+600, err[:1000]

@pytest.mark.parametrize('text', ['['*100_000+']'*100_000, '{"a":'*100_000+'1'+'}'*100_000, '1'*10_000,
    '{"format": "fastai_normstats.StatsChoice", "version": 2, "n_images": '+'1'*10_000+'}'],
    ids=['lists', 'dicts', 'number', 'digits'])
def test_refused_text(tmp_path, normstats, text):
    (tmp_path/'s.json').write_text(text)
    err = normstats('show', tmp_path/'s.json', status=1)
    assert 's.json' in err and len(err)<len(str(tmp_path))+600

def test_file_of_the_first_version(tmp_path, normstats):
    "Says what to do"
    err = normstats('show', foreign(tmp_path/'s.json', version=1), status=1)
    assert 's.json' in err and 'version 1' in err and 'fit again' in err

tag = '<script>x</script>'

@pytest.mark.parametrize('field', [dict(kind=tag), dict(rule=tag), dict(why=tag), dict(warnings=[tag]),
    inside('stats', name=tag), inside('model', name=tag)], ids=lambda d: next(iter(d)))
def test_html_of_a_saved_choice(tmp_path, field):
    "Loaded fields are text on the page, never tags; where a field cannot hold this, the file is refused"
    f = foreign(tmp_path/'s.json', **field)
    try: choice = StatsChoice.load(f)
    except ValueError as e: assert 's.json' in str(e)
    else: assert '<script' not in choice._repr_html_()

# --- arguments

@pytest.mark.parametrize('command', [None, 'fit', 'show', 'report', 'check', 'compare', 'models', 'cache', 'demo'])
def test_help(command, streams, monkeypatch):
    "Plain ASCII, on any stream"
    for encoding in ('ascii', 'utf-8'):
        out = Stream(encoding)
        with monkeypatch.context() as m, pytest.raises(SystemExit) as e:
            m.setattr(sys, 'stdout', out)
            cli.main([*filter(None, [command]), '--help'])
        assert e.value.code==0 and 'usage: normstats' in out.text and not set(out.text)-set(ascii_ok)

@pytest.mark.parametrize('option', ['--out', '--plot'])
def test_what_is_no_ordinary_file_is_not_replaced(tmp_path, normstats, option):
    "Not /dev/null, which who may write it would replace by a file"
    folder,pipe = image_folder(tmp_path/'images', n=6),tmp_path/'pipe.png'
    os.mkfifo(pipe)
    assert 'no ordinary file' in normstats('fit', folder, option, pipe, status=1) and pipe.is_fifo()

@pytest.mark.parametrize('args', [('--size', '9'*5000), ('--size', '1'+'0'*12), ('--group', '('*100_000)],
    ids=lambda a: a[0]+a[1][:3])
def test_long_arguments(tmp_path, normstats, args):
    assert len(normstats('fit', image_folder(tmp_path, n=6), *args, status=1))<1200

# --- what the library warns of

def test_fit_passes_on_warnings_that_the_choice_does_not_hold(tmp_path, normstats, cache_home):
    "Of the cache, say: a line on stdout; those of the choice once"
    (cache_home/'fastai_normstats').write_text('a file in place of the folder')
    out = normstats('fit', image_folder(tmp_path/'images', n=12), '--size', 16, '--out', tmp_path/'s.json')
    assert out.count('warning: cannot keep the measurement') == 1, out
    for w in StatsChoice.load(tmp_path/'s.json').warnings: assert out.count(w) == 1

@pytest.mark.parametrize('word,kind', [('custom', 'custom'), ('imagenet', 'imagenet'), ('custom-image', 'custom'),
                                       ('pretrained', None),
                                       ('rad-dino', None)])
def test_fit_with_stats(tmp_path, normstats, word, kind):
    "`--stats` is what `stats=` takes as text"
    folder = image_folder(tmp_path/'images', n=24)
    normstats('fit', folder, '--size', 16, '--no-cache', '--stats', word, '--out', tmp_path/'s.json')
    choice = StatsChoice.load(tmp_path/'s.json')
    assert choice.rule=='given' and (kind is None or choice.kind==kind)

def test_fit_with_no_such_stats(tmp_path, normstats):
    assert 'costum' in normstats('fit', image_folder(tmp_path/'images', n=24), '--size', 16, '--no-cache', '--stats',
                                 'costum', status=1)

@pytest.mark.parametrize('option,rule', [('--scratch', 'scratch'), ('--frozen', 'frozen')])
def test_fit_says_what_the_network_is(tmp_path, normstats, option, rule):
    folder = image_folder(tmp_path/'images', n=24)
    normstats('fit', folder, '--size', 16, '--no-cache', option, '--out', tmp_path/'s.json')
    assert StatsChoice.load(tmp_path/'s.json').rule==rule

@pytest.mark.parametrize('command', ['fit', 'check'])
def test_glob(tmp_path, normstats, command):
    "Only the files that are named so, whatever their ending"
    folder = image_folder(tmp_path/'images', n=24)
    for i,f in enumerate(sorted(folder.rglob('*.png'))):
        if i%2: f.rename(f.with_name(f'scan{i}.raw1'))
    first = ['fit', folder, '--size', 16, '--no-cache', '--out', tmp_path/'s.json']
    if command=='check':
        normstats(*first)
        first = ['check', tmp_path/'s.json', folder]
        out = normstats(*first, '--glob', 'scan*', status=0)
        assert '12 images in' in out
    else:
        assert '12 images in' in normstats(*first) and '12 images in' in normstats(*first, '--glob', '*.raw1')
    assert 'files like *.bmp' in normstats(*first, '--glob', '*.bmp', status=1)

def test_compare_by_probe(tmp_path, normstats, monkeypatch):
    "Nothing is trained; without pretrained weights there is nothing to probe"
    from torchvision.models import resnet18
    from torchvision.models._api import WeightsEnum
    weights = resnet18().state_dict()
    monkeypatch.setattr(WeightsEnum, 'get_state_dict', lambda self, *args, **kwargs: weights)  # nothing is downloaded
    monkeypatch.setattr('fastai.learner.Learner.fit', lambda *args, **kwargs: 1/0)
    folder = image_folder(tmp_path/'images', n=24)
    args = ['compare', folder, '--probe', '--size', 32, '--folds', 2, '--bs', 8]
    out = normstats(*args, '--out', tmp_path/'c.json', '--plot', tmp_path/'c.png')
    assert 'features with imagenet statistics on 12 images ...' in out and 'linear classifiers on features' in out
    assert json.loads((tmp_path/'c.json').read_text())['setup']['probe'] and (tmp_path/'c.png').stat().st_size>5000
    assert '--probe reads a pretrained body' in normstats(*args, '--scratch', status=1)

def test_a_line_a_step_where_nobody_watches(tmp_path, normstats):
    "No carriage returns of a progress bar"
    folder = image_folder(tmp_path/'images', n=24)
    out = normstats('fit', folder, '--size', 16, '--no-cache', '--valid-pct', .25, '--out', tmp_path/'s.json')
    assert out.splitlines()[1]=='measuring the 18 training images ...' and '\r' not in out
    assert 'measuring 24 images ...' in normstats('check', tmp_path/'s.json', folder)
    out = normstats('compare', folder, '--scratch', '--size', 32, '--folds', 2, '--epochs', 1, '--bs', 8)
    assert len(re.findall(r'^training with (imagenet|custom) statistics on 12 images \.\.\.$', out,
                          re.M))==4 and '\r' not in out
