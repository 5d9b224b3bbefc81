"""Could this be uploaded?

Compares the versions, builds the last commit, looks into both distributions, and installs the wheel into an empty
environment of each supported Python on PATH, one after another (minutes, 3 GB to load and 6 GB on disk each). Needs
git and the tools that `make release-check` installs. Writes `dist/`, uploads nothing, prints what falls short and exits
1 if anything does."""

import os,re,shutil,subprocess,sys,tarfile,tempfile,time,zipfile
from collections.abc import Callable
from configparser import ConfigParser
from email.parser import HeaderParser
from pathlib import Path

from check_sync import differences,lib,root

dist    = root/'dist'
space   = 8_000_000_000  # bytes for an environment: 6 GB with PyTorch's CUDA libraries, and what pip unpacks
endings = ('.py', '.pyi', '.csv', 'py.typed')
must    = ('__init__.py', 'all.py', 'cli.py', 'models.csv', 'py.typed')
beside  = ('CHANGELOG.md', 'CITATION.cff', 'CONTRIBUTING.md', 'LICENSE', 'MANIFEST.in', 'README.md', 'pyproject.toml',
           'settings.ini', 'setup.py')
info    = ('METADATA', 'RECORD', 'WHEEL', 'entry_points.txt', 'licenses/LICENSE', 'top_level.txt')

class Stop(Exception):
    "A command that failed, in a sentence"

def run(
    cmd:list,      # program and arguments
    cwd:Path=root, # folder to run it in
    **env          # variables of its environment that are set; `None`: removed
)->str: # what it printed
    "Run a command; raise `Stop` with the end of what it printed if it fails"
    env = {k:v for k,v in {**os.environ, **env}.items() if v is not None}
    res = subprocess.run([str(o) for o in cmd], cwd=cwd, env=env, text=True, encoding='utf-8', errors='replace',
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if res.returncode==0: return res.stdout
    tail = '\n'.join(res.stdout.splitlines()[-15:])
    raise Stop(f"`{' '.join(Path(str(o)).name for o in cmd[:4])}` failed with status {res.returncode}:\n{tail}")

# --- versions

def settings(
    path:Path=root # project folder
)->dict: # name -> value
    "What settings.ini says"
    ini = ConfigParser(delimiters=['='])
    ini.read(path/'settings.ini', encoding='utf-8')
    return dict(ini['DEFAULT'])

def citation(
    path:Path=root # project folder
)->dict: # name -> value
    "The fields of CITATION.cff that fill a line"
    return dict(re.findall(r'^([a-z-]+): ([^>\s].*)$', (path/'CITATION.cff').read_text(encoding='utf-8'), re.M))

def releases(
    text:str # a changelog
)->list: # (version or 'Unreleased', date or '', number of entries) of each section
    "The sections of a changelog, from top to bottom"
    parts = re.split(r'^## \[?([^]\s]+)\]?(?: - (\S+))?.*$', text, flags=re.M)[1:]
    return [(v, day or '', len(re.findall(r'^- ', o, re.M)))
            for v,day,o in zip(parts[::3], parts[1::3], parts[2::3])]

def version_problems(
    path:Path=root # project folder
)->list: # a sentence each, empty if there are none
    "Where the version and its date differ, and what waits in the changelog for a version"
    version,cited = settings(path)['version'],citation(path)
    log = releases((path/'CHANGELOG.md').read_text(encoding='utf-8'))
    waiting = sum(n for v,_,n in log if v=='Unreleased')
    newest,day = next(((v, day) for v,day,_ in log if v!='Unreleased'), ('none', ''))
    module = re.search(r'__version__ = "(.*)"', (path/lib/'__init__.py').read_text(encoding='utf-8'))[1]
    homes = {f'{lib}/__init__.py': module, 'CITATION.cff': cited['version'], 'CHANGELOG.md': newest}
    res = [f"{k}: the version is {v}, in settings.ini it is {version}" for k,v in homes.items() if v!=version]
    if waiting: res.append(f"CHANGELOG.md: {waiting} entries are Unreleased; put them under a version with its date")
    if not re.fullmatch(r'\d{4}-\d\d-\d\d', day): res.append(f"CHANGELOG.md: {newest} has no date")
    elif day!=cited['date-released']:
        res.append(f"CITATION.cff: released {cited['date-released']}, in CHANGELOG.md {day}")
    return res

def tree():
    "Committed, notebooks and library in step, and one version"
    dirty = run(['git', 'status', '--porcelain']).splitlines()
    return [f"not committed: {o}" for o in dirty] + differences() + version_problems()

# --- distributions

def build(
    src:Path # folder to unpack the last commit to
)->list: # a sentence each, empty if there are none
    "Build the source distribution from the last commit, and the wheel from the source distribution"
    run(['git', 'archive', '-o', f'{src}.zip', 'HEAD'])
    shutil.unpack_archive(f'{src}.zip', src)
    shutil.rmtree(dist, ignore_errors=True)
    said = run([sys.executable, '-m', 'build', '--outdir', dist, src])
    return [o for o in said.splitlines() if 'DeprecationWarning' in o]

def names_in(
    path:Path # a wheel or a source distribution
)->list: # names of files, those of a source distribution without its folder
    "What a distribution holds"
    if path.suffix=='.whl':
        with zipfile.ZipFile(path) as f: return sorted(o for o in f.namelist() if not o.endswith('/'))
    with tarfile.open(path) as f: return sorted(o.name.partition('/')[2] for o in f if o.isfile())

def content_problems(
    path:Path, # a wheel or a source distribution
    src:Path   # the project folder that it was built from
)->list: # a sentence each, empty if there are none
    "What a distribution lacks, and what does not belong there"
    names = set(names_in(path))
    stem  = '-'.join(path.name.split('-')[:2])
    ours  = {f.relative_to(src).as_posix() for f in (src/lib).rglob('*') if f.is_file()}
    if path.suffix=='.whl': more = {f'{stem}.dist-info/{o}' for o in info}
    else: more = {*beside, 'PKG-INFO', 'setup.cfg', *(o for o in names if o.startswith(f'{lib}.egg-info/'))}
    want = ours | more | {f'{lib}/{o}' for o in must}
    odd  = {o for o in ours if not o.endswith(endings) or Path(o).name.startswith('test_')}
    return ([f"{path.name}: {o} is missing" for o in sorted(want-names)] +
            [f"{path.name}: {o} does not belong there" for o in sorted(names-want | names&odd)])

def metadata(
    wheel:Path # its file
): # message with a header a field; the payload is the README
    "The metadata of a wheel"
    name = next(o for o in names_in(wheel) if o.endswith('.dist-info/METADATA'))
    with zipfile.ZipFile(wheel) as f: return HeaderParser().parsestr(f.read(name).decode())

def metadata_problems(
    wheel:Path # its file
)->list: # a sentence each, empty if there are none
    "Classifiers that no package index takes, and links in the README that lead nowhere there"
    import readme_renderer.markdown
    from trove_classifiers import classifiers
    meta  = metadata(wheel)
    html  = readme_renderer.markdown.render(meta.get_payload())
    ids   = {f'#{o}' for o in re.findall(r'id="([^"]*)"', html)}
    links = re.findall(r'(?:href|src)="([^"]*)"', html)
    dead  = sorted({o for o in links if o not in ids and not re.match(r'https?:', o)})
    return ([f"unknown classifier: {o}" for o in meta.get_all('Classifier') if o not in classifiers] +
            [f"README on the package index: {o} leads nowhere" for o in dead])

def contents(
    src:Path # the project folder that the distributions were built from
)->list: # a sentence each, empty if there are none
    "twine, check-wheel-contents, the files in both distributions and the metadata"
    wheel,sdist = found = [next(dist.glob(o)) for o in ('*.whl', '*.tar.gz')]
    for o in found: print(f"  {o.name}, {o.stat().st_size/1e3:,.0f} kB:", *names_in(o), sep='\n    ')
    run([sys.executable, '-m', 'twine', 'check', '--strict', *found])
    run([sys.executable, '-m', 'check_wheel_contents', wheel])
    return content_problems(wheel, src) + content_problems(sdist, src) + metadata_problems(wheel)

# --- environments

def pythons(
    wheel:Path # its file
)->dict: # version -> program on PATH, `None` where there is none
    "The interpreters that the wheel's classifiers name"
    versions = [o.split(' :: ')[-1] for o in metadata(wheel).get_all('Classifier') if 'Python :: 3.' in o]
    return {v: find_python(v) for v in versions}

def find_python(
    version:str # such as '3.12'
)->str|None: # program on PATH
    "The first `python` of that version that answers; a shim may be none"
    for folder in os.get_exec_path():
        exe = shutil.which(f'python{version}', path=folder)
        try:
            if exe and run([exe, '--version']).startswith(f'Python {version}.'): return exe
        except Stop: pass

# In the new environment: scikit-learn's digits with NumPy's float64, split as fastai's RandomSplitter does
numbers = '''
import json,sys
import fastai_normstats,numpy as np,torch
from PIL import Image
from sklearn.datasets import load_digits

assert fastai_normstats.__file__.startswith(sys.prefix), fastai_normstats.__file__
with Image.open('normstats-demo.png') as im: im.load()
assert min(im.size)>=200, im.size
digits = load_digits()
torch.manual_seed(0)
order  = torch.randperm(len(digits.images)).numpy()[int(.2*len(digits.images)):]
images = digits.images[np.argsort(digits.target, kind='stable')][order]
pixels = (images*255/16).round()/255
saved  = json.load(open('normstats-demo.json', encoding='utf-8'))
assert saved['n_images']==len(pixels)==1438, saved['n_images']
np.testing.assert_allclose(saved['stats']['mean'], [pixels.mean()]*3, rtol=0, atol=1e-6)
np.testing.assert_allclose(saved['stats']['std'], [pixels.std()]*3, rtol=0, atol=1e-6)
print('mean', *saved['stats']['mean'][:1], 'std', *saved['stats']['std'][:1])
'''

def environment(
    python:str, # program
    wheel:Path  # its file
)->list: # a sentence each, empty if there are none
    "Install the wheel alone into an empty environment, run the demo in an empty folder, remove both"
    with tempfile.TemporaryDirectory() as tmp:
        free = shutil.disk_usage(tmp).free
        if free<space: return [f"{free/1e9:.1f} GB are free in {tmp}, {space/1e9:.0f} are needed; set TMPDIR"]
        venv,work = Path(tmp).resolve()/'venv',Path(tmp).resolve()/'work'
        work.mkdir()
        exe,normstats = venv/'bin'/'python',venv/'bin'/'normstats'
        alone = lambda *cmd: run(cmd, work, PYTHONPATH=None, PYTHONHOME=None, VIRTUAL_ENV=None, MPLBACKEND=None)
        start = time.monotonic()
        alone(python, '-m', 'venv', venv)
        alone(exe, '-m', 'pip', 'install', '-q', wheel)
        print(f"  installed in {time.monotonic()-start:,.0f} s, "
              f"{sum(f.lstat().st_size for f in venv.rglob('*'))/1e9:.1f} GB", flush=True)
        alone(exe, '-m', 'pip', 'check')
        alone(exe, '-W', 'ignore', '-c', f'import {lib}.all')
        start = time.monotonic()
        alone(normstats, 'demo')
        print(f"  `normstats demo` in {time.monotonic()-start:.0f} s", flush=True)
        alone(normstats, 'demo', '--size', 8, '--tol', 0, '--out', 'normstats-demo.json')
        print('  as NumPy has it:', alone(exe, '-W', 'ignore', '-c', numbers).splitlines()[-1])
    return []

# --- all of it

def step(
    what:str,      # what is done, for the reader
    func:Callable, # returns a list of sentences, empty if all is well
    *args          # for `func`
)->list: # the sentences
    "Do one step, say what it is and how long it took"
    print(f"{what} …", flush=True)
    start = time.monotonic()
    try: res = func(*args)
    except Stop as e: res = [str(e)]
    print(f"  {'falls short' if res else 'good'}, {time.monotonic()-start:,.0f} s", *res, sep='\n  ', flush=True)
    return [f"{what}: {o}" for o in res]

def main():
    "All steps, the environments only if all is well before them; exit 1 if anything falls short"
    with tempfile.TemporaryDirectory() as tmp:
        src = Path(tmp)/'src'
        bad = step("Everything committed, in step, one version", tree)
        built = step("Building the last commit", build, src)
        bad += built or step("What is in the distributions", contents, src)
    if bad: print("Not installed anywhere: the above comes first")
    else:
        wheel = next(dist.glob('*.whl'))
        found = pythons(wheel)
        for v,exe in found.items():
            if exe: bad += step(f"Python {v}: the wheel in an empty environment", environment, exe, wheel)
        print("Not tried, no interpreter on PATH:", *[v for v,exe in found.items() if not exe] or ['none'])
        if not any(found.values()): bad.append("no supported Python on PATH: the wheel was not installed")
    if bad: sys.exit('\n- '.join(["\nNot to be uploaded:", *bad]))
    print("\nReady:", *sorted(dist.iterdir()), sep='\n  ')

if __name__=='__main__': main()
