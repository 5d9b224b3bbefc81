"""Is the house in order: imports one way, cells and lines short, the core without its wings, and only documented names
in `all`?"""

import ast,json,re,subprocess,sys

import pytest
from check_sync import lib,root

import fastai_normstats.all

core  = ('values moments ranks running loaders measure schemes models choice policy fingerprint cache guards transform '
         'block drift').split()
wings = 'view compare serve images cli'.split()

def notebooks(): return sorted((root/'nbs').glob('*.ipynb'))

def cells(f): return [(c, ''.join(c['source'])) for c in json.loads(f.read_text(encoding='utf-8'))['cells']]

def is_exported(src): return re.match(r'#\| ?export', src) is not None

def rooms():
    "The modules in the order of their notebooks, as {name: number}"
    found = {}
    for f in notebooks():
        name = next((m[1] for _,s in cells(f) if (m := re.match(r'#\| ?default_exp (\S+)', s))), None)
        if name: found[name] = int(f.name.split('_')[0])
    return found

def imports(name):
    "(room, names) of every import of this package in room `name`, also those inside of functions"
    here = f'{lib}.{name}'.split('.')[:-1]
    for n in ast.walk(ast.parse((root/lib/(name.replace('.', '/')+'.py')).read_text(encoding='utf-8'))):
        if not isinstance(n, ast.ImportFrom): continue
        module = '.'.join([*here[:len(here)-n.level+1], n.module or '']) if n.level else n.module or ''
        if module.split('.')[0]==lib: yield module.partition('.')[2].strip('.'), [a.name for a in n.names]

def room_of(name): return next((r for r in rooms() if name==r or name.startswith(r+'.')), None)

# --- imports

def test_core_and_wings_are_all_there_is():
    assert {r.split('.')[0] for r in rooms()}=={*core, *wings}
    assert [r for r in rooms() if r in core]==core

def test_numbers_are_unique():
    numbers = [f.name.split('_')[0] for f in notebooks()]
    assert len(set(numbers))==len(numbers)

@pytest.mark.slow
@pytest.mark.parametrize('name', rooms())
def test_imports_go_down_only_and_no_underscore_is_shared(name):
    for module,names in imports(name):
        target = room_of(module) or module
        assert not [n for n in names if n.startswith('_') and not n.startswith('__')], (name, module, names)
        if target in rooms(): assert rooms()[target]<rooms()[name], f'{name} imports {target}, which comes after it'

@pytest.mark.parametrize('name', core)
def test_the_core_knows_no_wing(name):
    assert not [m for m,_ in imports(name) if m.split('.')[0] in wings]

# --- what users get

names = """BandsBlock ClipZScore Comparison DatasetStats FloatImageBlock HistogramStandardization IMAGENET
    ImageZScore LocalResponse Measured MinMax NonFiniteError NormStats NormalisesInside NotMeasured
    PILDicomFloat PILFloat Policy ReadError RunningStats Scheme StatsChoice TensorBands TensorVolume
    VolumeBlock Windows ZScore bake_stats choose_stats clear_cache compare_stats dicom_frames dicom_pixels
    dicom_rgb dicom_series known_models measure_stats model_stats plot_batch plot_before_after plot_drift
    plot_unusual read_nnunet report_stats schemes used_stats verify_stats""".split()

def test_all_brings_the_documented_names_only():
    assert sorted(fastai_normstats.all.__all__)==sorted(names)
    for k in names: assert getattr(fastai_normstats.all, k).__doc__, k

@pytest.mark.slow
def test_all_loads_nothing_heavy():
    "Neither scikit-learn nor matplotlib's pyplot nor pydicom, beyond what fastai itself has loaded"
    code = ("import sys\nfrom fastai.vision.all import *\nbefore = {o.split('.')[0] for o in sys.modules}\n"
            "from fastai_normstats.all import *\nprint(*{o.split('.')[0] for o in sys.modules}-before)")
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=root)
    assert res.returncode==0, res.stderr
    assert set(res.stdout.split())<={lib, 'zipfile', '__future__'}, res.stdout

@pytest.mark.slow
def test_all_works_before_fastai_is_imported():
    "Methods that fastai patches in are asked for where they are used"
    code = 'from fastai_normstats.all import *; print(DatasetStats.__name__)'
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=root)
    assert res.stdout.strip()=='DatasetStats', res.stderr

# --- how it reads

def is_free(line): return 'http' in line or re.match(r'\s*\|.*\|\s*$', line)  # URLs and rows of tables

def too_wide(text, most=120): return [s for s in text.splitlines() if len(s)>most and not is_free(s)]

@pytest.mark.parametrize('f', [*notebooks()], ids=lambda f: f.stem)
def test_exported_cells_are_short_and_no_line_is_wide(f):
    for c,s in cells(f):
        if not is_exported(s): continue
        lines = [o for o in s.splitlines() if o.strip() and not o.startswith('#|')]
        assert len(lines)<=30, (c['id'], len(lines))
        assert not too_wide(s), (c['id'], too_wide(s))

@pytest.mark.parametrize('f', [*(f for o in ('tests', 'benchmarks', 'docs') for f in sorted((root/o).glob('*.py'))),
                               root/'README.md', root/'CONTRIBUTING.md', root/'Makefile', root/'setup.py'],
                         ids=lambda f: f.name)
def test_no_line_is_wide(f): assert not too_wide(f.read_text(encoding='utf-8'))

def assertions(src): return len(re.findall(r'\btest_(?:eq|ne|close|fail|warns|stdout|is|shuffled)\(|\bassert\b', src))

@pytest.mark.parametrize('f', [*notebooks()], ids=lambda f: f.stem)
def test_most_assertions_can_be_seen(f):
    "What teaches stays visible: at most a third of a notebook's assertions are hidden"
    hidden = visible = 0
    for c,s in cells(f):
        if c['cell_type']!='code' or is_exported(s): continue
        if re.search(r'#\| ?hide', s): hidden += assertions(s)
        else: visible += assertions(s)
    assert hidden<=max(2, (hidden+visible)/3), (hidden, visible)
