"A measurement is used again where nothing has changed, also by another process, and never where something has; nothing that happens to the cache fails a fit"

import json,logging,os,random,signal,subprocess,sys,time,warnings
from argparse import Namespace
from collections import defaultdict
from dataclasses import dataclass,field
from enum import Enum
from functools import lru_cache,wraps
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import (CategoryBlock,ColReader,DataBlock,Hue,ImageBlock,ImageDataLoaders,IndexSplitter,PILImage,PILImageBW,RandomErasing,RandomSplitter,Resize,Saturation,TensorImage,
                               Transform,aug_transforms,parent_label,vision_learner)
from PIL import Image
from torch import nn

import fastai_normstats
from fastai_normstats import cache as C
from fastai_normstats.all import DatasetStats,StatsChoice
from fastai_normstats.running import RunningStats
from fastai_normstats.stable import Unstable,stable
from helpers import image_folder,random_image

small,quiet = dict(bs=4, num_workers=0),dict(verbose=False)
own = dict(stats='custom', **quiet)

@pytest.fixture
def folder(tmp_path): return image_folder(tmp_path/'images', n=24)

def files(path): return sorted(Path(path).rglob('*.png'))

def block(**kwargs):
    kwargs = {'blocks': (ImageBlock, CategoryBlock), 'get_y': parent_label, 'splitter': IndexSplitter(range(0, 24, 4)), 'item_tfms': Resize(12), **kwargs}
    return DataBlock(get_items=files, **kwargs)

def fit(folder, pass_args={}, **kwargs):
    "A choice by a block that nobody used before"
    return block(**kwargs).fit_stats(folder, **{**own, **pass_args}, **small).stats_choice

def entries(cache_home): return sorted((cache_home/'fastai_normstats').glob('*'))

def bits(choice): return json.dumps(choice.measured.to_dict()),choice.stats.mean,choice.stats.std

# --- what makes a new measurement, and what does not

def test_second_fit(folder, passes, cache_home):
    first = fit(folder)
    second = fit(folder)
    assert len(passes)==1 and bits(first)==bits(second) and first.provenance==second.provenance and len(entries(cache_home))==1

def touched(f, change):
    "`f` with other content of the same size and another time of change, or only what `change` says"
    data,t = f.read_bytes(),f.stat()
    if change=='content': f.write_bytes(data[:-1]+bytes([data[-1]])); os.utime(f, ns=(t.st_atime_ns, t.st_mtime_ns+1000))
    if change=='access':  os.utime(f, ns=(t.st_atime_ns+10**12, t.st_mtime_ns))

def add(folder): random_image(np.random.default_rng(5)).save(folder/'a'/'zzz.png')

changes = dict(
    added      = (lambda folder: add(folder),                                     {}),
    removed    = (lambda folder: files(folder)[1].unlink(),                       {}),
    content    = (lambda folder: touched(files(folder)[1], 'content'),            {}),
    split      = (None, dict(splitter=IndexSplitter(range(1, 24, 4)))),
    augmented  = (None, dict(batch_tfms=aug_transforms())),
    image_size = (None, dict(item_tfms=Resize(13))),
    loading    = (None, dict(blocks=(ImageBlock(PILImageBW), CategoryBlock))),
    seed       = (None, dict(pass_args=dict(seed=1))),
    tol        = (None, dict(pass_args=dict(tol=0))),
    max_images = (None, dict(pass_args=dict(max_images=17))),
    mask       = (None, dict(pass_args=dict(mask=lambda x: x[:, :1]>.2))),
    nonfinite  = (None, dict(pass_args=dict(nonfinite='ignore'))))

@pytest.mark.parametrize('name', changes)
def test_measured_again(folder, passes, name):
    change,kwargs = changes[name]
    fit(folder)
    if change: change(folder)
    fit(folder, **kwargs)
    assert len(passes)==2

def test_another_augmentation_parameter(folder, passes):
    for deg in (10, 10, 11): fit(folder, batch_tfms=aug_transforms(max_rotate=deg))
    assert len(passes)==2

def test_what_transforms_drew_last_is_no_change(folder, passes):
    "A measurement is found again after training batches went through the very same transforms"
    for _ in range(2):
        tfms = [*aug_transforms(), Hue(), Saturation(), RandomErasing()]
        fit(folder, batch_tfms=tfms)
        dls = block(batch_tfms=tfms).dataloaders(folder, **small)
        for _ in range(5): dls.one_batch()
        fit(folder, batch_tfms=tfms)
    assert len(passes)==1

def test_decorated_functions_of_packages_can_be_described():
    "fastcore's `delegates` puts a signature into what a function holds"
    assert stable(vision_learner)==stable(vision_learner)

def test_another_mask(folder, passes):
    for t in (.2, .2, .3): fit(folder, dict(mask=lambda x, t=t: x[:, :1]>t))
    assert len(passes)==2

@pytest.mark.parametrize('module', ['fastai_normstats', 'fastai', 'torch', 'PIL'])
def test_another_version(folder, passes, monkeypatch, module):
    fit(folder)
    monkeypatch.setattr(f'{module}.__version__', '0.0.0')
    fit(folder)
    assert len(passes)==2

same = dict(
    validation  = (lambda folder: random_image(np.random.default_rng(5)).save(files(folder)[0]), {}),
    access_time = (lambda folder: [touched(f, 'access') for f in files(folder)],                 {}),
    folder_time = (lambda folder: os.utime(folder/'a'),                                          {}),
    labels      = (None, dict(get_y=lambda f: 'x')),
    valid_added = (lambda folder: random_image(np.random.default_rng(5)).save(folder/'b'/'zzz.png'), dict(splitter=IndexSplitter([*range(0, 24, 4), 24]))))

@pytest.mark.parametrize('name', same)
def test_used_again(folder, passes, name):
    change,kwargs = same[name]
    first = fit(folder)
    if change: change(folder)
    assert bits(fit(folder, **kwargs))==bits(first) and len(passes)==1

@pytest.mark.parametrize('kwargs', [dict(bs=8, num_workers=0), dict(bs=4, num_workers=2)], ids=str)
def test_batch_size_and_workers(folder, passes, kwargs):
    fit(folder)
    block().fit_stats(folder, **own, **kwargs)
    assert len(passes)==1

def test_all_ways_share_it(folder, passes):
    fit(folder)
    block(batch_tfms=DatasetStats(**own)).dataloaders(folder, **small)
    block().dataloaders(folder, **small).fit_stats(**own)
    assert len(passes)==1

def test_switched_off(folder, passes, cache_home):
    for _ in range(2): fit(folder, dict(cache=False))
    assert len(passes)==2 and not entries(cache_home)

def test_folder_of_ones_own(folder, passes, cache_home, tmp_path):
    for c in (tmp_path/'mine', str(tmp_path/'mine')): fit(folder, dict(cache=c))
    assert len(passes)==1 and not entries(cache_home) and len([*(tmp_path/'mine').iterdir()])==1

def test_says_so(folder, capsys):
    for _ in range(2): block().fit_stats(folder, stats='custom', **small)
    out = capsys.readouterr().out
    assert out.count('reused, measured on 20')==1

# --- another process

script = """
import sys,warnings
warnings.simplefilter('ignore')
from fastai.vision.all import *
from fastai_normstats import transform
from fastai_normstats.all import *
import own_transforms
from own_transforms import darker
passes,real = [],transform.measure_stats
def counted(*args, **kwargs): passes.append(1); return real(*args, **kwargs)
transform.measure_stats = counted
class Noise(Transform):
    order = 20
    def encodes(self, x:TensorImage): return darker(x)
def get_y(f): return f.parent.name
db = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=get_y, splitter=RandomSplitter(seed=1), item_tfms=Resize(12),
               batch_tfms=[*aug_transforms(), Noise(), Transform(lambda x: x, order=30)])
db.fit_stats(sys.argv[1], stats='custom', verbose=False, bs=4, num_workers=0)
print(len(passes), [v.hex() for v in db.stats_choice.stats.mean])
"""

def run(folder, seed):
    env = {**os.environ, 'PYTHONHASHSEED': seed, 'PYTHONPATH': os.pathsep.join([str(folder.parent), *sys.path])}
    res = subprocess.run([sys.executable, '-c', script, folder], capture_output=True, text=True, env=env)
    assert res.returncode==0, res.stderr
    return res.stdout.split(' ', 1)

def test_another_process(folder):
    "Own classes, lambdas and imported helpers are recognised; a helper that does something else is seen"
    helper = folder.parent/'own_transforms.py'
    helper.write_text('def half(x): return x*.5\ndef darker(x): return half(x)\n')
    first,second = run(folder, '1'),run(folder, '2')
    assert (first[0], second[0])==('1', '0') and first[1]==second[1]
    helper.write_text('def half(x): return x*.25\ndef darker(x): return half(x)\n')
    os.utime(helper, ns=(1, 1))  # no stale bytecode
    assert run(folder, '1')[0]=='1'

def test_two_processes_at_once(folder):
    helper = folder.parent/'own_transforms.py'
    helper.write_text('def darker(x): return x*.5\n')
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(folder.parent), *sys.path])}
    both = [subprocess.Popen([sys.executable, '-c', script, folder], stdout=subprocess.PIPE, text=True, env=env) for _ in range(2)]
    out = [p.communicate()[0].split(' ', 1) for p in both]
    assert [p.returncode for p in both]==[0, 0] and out[0][1]==out[1][1] and run(folder, '3')[0]=='0'

# --- tables and what cannot be described

@pytest.fixture
def table(folder): return pd.DataFrame(dict(file=[str(f) for f in files(folder)], label=list('ab')*12))

def fit_table(df, **kwargs):
    return DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('file'), get_y=ColReader('label'), splitter=IndexSplitter(range(0, 24, 4)), item_tfms=Resize(12),
                     **kwargs).fit_stats(df, **own, **small).stats_choice

def test_tables(table, passes):
    for _ in range(2): fit_table(table.copy())
    assert len(passes)==1
    touched(Path(table.file[1]), 'content')
    fit_table(table)
    assert len(passes)==2
    fit_table(table.assign(label='c'))
    assert len(passes)==3

def test_table_of_10_000_rows(table, passes):
    big = pd.concat([table]*417, ignore_index=True).head(10_000)
    for _ in range(2):
        db = DataBlock((ImageBlock, CategoryBlock), get_x=lambda r: r.file, get_y=ColReader('label'), splitter=IndexSplitter(range(9_900)), item_tfms=Resize(12))
        db.fit_stats(big, **own, **small)
    assert len(passes)==1

@pytest.mark.parametrize('make', [lambda: (lambda x: x*.5), lambda: (lambda x, by=.5: x*by), lambda: np.vectorize(abs) and (lambda x: x.sqrt())])
def test_lambdas(folder, passes, make):
    for _ in range(2): fit(folder, batch_tfms=Apply(make()))
    assert len(passes)==1
    fit(folder, batch_tfms=Apply(lambda x: x*.75))
    assert len(passes)==2

# --- what a key does not say: each must make a new measurement after the change, whether it is kept or not

def once_more(folder, passes, change, **kwargs):
    "The numbers before and after `change`, with new blocks"
    first = fit(folder, **kwargs)
    change()
    second = fit(folder, **kwargs)
    assert len(passes)==2 and bits(first)!=bits(second)

def halve(paths):
    for f in paths: Image.open(f).point(lambda v: v//2).save(f)

def test_images_that_a_getter_finds(folder, passes, tmp_path):
    "Items are other files, folders, numbers or rows, and a function makes images of them"
    pre = image_folder(tmp_path/'pre', n=24)
    ids = [str(f.relative_to(folder)) for f in files(folder)]
    def blocks():
        shared = dict(blocks=(ImageBlock, CategoryBlock), get_y=lambda o: 'x', splitter=IndexSplitter(range(0, 24, 4)), item_tfms=Resize(12))
        yield DataBlock(get_items=files, get_x=lambda p: Path(str(p).replace(str(folder), str(pre))), **shared),folder
        yield DataBlock(get_x=lambda i: PILImage.create(pre/i), **shared),ids
        yield DataBlock(get_x=lambda r: PILImage.create(pre/r.f), **shared),pd.DataFrame(dict(f=ids))
        yield DataBlock(get_x=lambda i: PILImage.create(files(pre)[i]), **shared),list(range(24))
    before = [bits(db.fit_stats(src, **own, **small).stats_choice) for db,src in blocks()]
    halve(files(pre))
    after = [bits(db.fit_stats(src, **own, **small).stats_choice) for db,src in blocks()]
    assert len(passes)==8 and all(a!=b for a,b in zip(before, after))

@pytest.mark.parametrize('num_workers', [0, 2])
def test_a_file_that_a_transform_reads(folder, passes, tmp_path, cache_home, capsys, num_workers):
    np.save(tmp_path/'gain.npy', .5)
    path = tmp_path/'gain.npy'
    def load(f): return PILImage.create((np.asarray(Image.open(f))*np.load(path)).astype(np.uint8))
    def fit(): return DataBlock((ImageBlock, CategoryBlock), get_items=files, get_x=load, get_y=parent_label, splitter=IndexSplitter([0]), item_tfms=Resize(12)).fit_stats(
        folder, stats='custom', bs=4, num_workers=num_workers).stats_choice
    first = fit()
    assert 'gain.npy is read besides the training images' in capsys.readouterr().out and not entries(cache_home)
    np.save(path, .25)
    assert bits(fit())!=bits(first) and len(passes)==2

def test_environment_variables(folder, passes, monkeypatch):
    monkeypatch.setenv('GAIN', '.5')
    once_more(folder, passes, lambda: monkeypatch.setenv('GAIN', '.25'), batch_tfms=Apply(lambda x: x*float(os.environ['GAIN'])))

class Apply(Transform):
    order = 50
    def __init__(self, f): self.f = f
    def encodes(self, x:TensorImage): return self.f(x)

class Settings: gain = .5
class Level(Enum): LUNG = .5
setting,table_of = SimpleNamespace(gain=.5),defaultdict(lambda: setting.gain)

def test_what_globals_hold(folder, passes, monkeypatch):
    "A class attribute, an object's, a factory's; also in the same process without a cache"
    for cache in (True, False):
        for k,f in enumerate((lambda x: x*Settings.gain, lambda x: x*setting.gain, lambda x: x*table_of.default_factory())):
            n = len(passes)
            db = block(batch_tfms=Apply(f))
            for gain,want in ((.5, 1), (.5, 1), (.25, 2)):
                monkeypatch.setattr(Settings, 'gain', gain), monkeypatch.setattr(setting, 'gain', gain)
                db.fit_stats(folder, cache=cache and str(folder/f'cache{k}'), **own, **small)
                assert len(passes)-n==want, (cache, k)

def test_enums_by_value():
    def of(v):
        class Level(Enum): LUNG = v
        return lambda x: x*Level.LUNG.value
    assert stable(of(1))==stable(of(1))!=stable(of(2))

def test_patched_methods(folder, passes, monkeypatch):
    "A method put into TensorImage, and an `encodes` for a fastai transform"
    monkeypatch.setattr(TensorImage, 'dimmed', lambda self: self*.5, raising=False)
    once_more(folder, passes, lambda: monkeypatch.setattr(TensorImage, 'dimmed', lambda self: self*.25), batch_tfms=Apply(lambda x: x.dimmed()))

def test_decorated_functions():
    "functools.wraps makes a function say that it is another module's"
    def dim(f, by):
        @wraps(f)
        def inner(x): return f(x)*by
        return inner
    assert stable(dim(torch.relu, .5))==stable(dim(torch.relu, .5))!=stable(dim(torch.relu, .25))

def test_containers_with_code():
    def net(by):
        class Net(nn.Sequential):
            def forward(self, x): return super().forward(x)*by
        return Net(nn.Identity())
    def bag(p):
        class Bag(dict): pass
        b = Bag(a=1)
        b.p = p
        return b
    for make in (net, bag): assert stable(make(1))==stable(make(1))!=stable(make(2))

def test_imports_inside_functions():
    def own_module(x):
        import helpers
        return helpers.random_image
    def installed(x):
        import scipy.ndimage
        return scipy.ndimage.zoom(x, 2)
    with pytest.raises(Unstable, match='imports helpers when called'): stable(own_module)
    stable(installed)

def test_large_families_of_classes():
    "Each names all others: described once, not once a path"
    ns = {}
    exec('\n'.join(f'class C{i}:\n    def f(self): return [{", ".join(f"C{j}" for j in range(40))}]' for i in range(40)), ns)
    began = time.time()
    stable(ns['C0'])
    assert time.time()-began<10

@dataclass
class Config:
    size:int = 3
    by:dict = field(default_factory=dict)

class Typed(dict[str, float]): pass

class Pair(NamedTuple):
    a:int
    b:int = 2

@pytest.mark.parametrize('o', [Config(4), Config, Pair(1), Namespace(a=1), logging.getLogger('x'), lru_cache(len), list[int], Typed],
                         ids=lambda o: str(o)[:20])
def test_common_things_are_described(o): assert json.dumps(stable(o))==json.dumps(stable(o))

class Raises:
    def __len__(self): return 3
    def __iter__(self): raise RuntimeError('not today')
strange = Raises()

def test_whatever_a_transform_reads_the_fit_goes_on(folder, monkeypatch):
    assert fit(folder, batch_tfms=Apply(lambda x: x if strange else x)).measured.n_images==18
    monkeypatch.setattr('fastai_normstats.transform.disk_key', lambda *args: 1/0)
    assert fit(folder).measured.n_images==18
    with pytest.warns(UserWarning, match='cannot keep'): fit_with_cache(folder, monkeypatch, 'a\0b')

def fit_with_cache(folder, monkeypatch, cache):
    monkeypatch.undo()
    return fit(folder, dict(cache=cache))

def test_what_cannot_be_described_is_not_kept(folder, passes, cache_home, capsys):
    "An open file in a transform: measured each time, and said"
    class Reads(Transform):
        order = 50
        def __init__(self, f): self.f = f
        def encodes(self, x:TensorImage): return x
    with open(files(folder)[0], 'rb') as f:
        for _ in range(2): block(batch_tfms=Reads(f)).fit_stats(folder, stats='custom', **small)
    assert len(passes)==2 and not entries(cache_home) and capsys.readouterr().out.count('will not be kept (_io.BufferedReader')==2

class Base:
    factor = 1.
    def scale(self): return self.factor

def test_installed_modules_by_version(): assert stable(np)==['module', 'numpy', f'numpy=={np.__version__}'] and stable(C)[2].startswith('fastai_normstats==')

def test_code_is_followed_down():
    "Methods, bases, class attributes, closures, defaults, globals and what they call"
    def make(const=1, attr=2., default=3, closed=4, base=5):
        class Parent(Base):
            def helper(self): return base
        class T(Parent):
            setting = attr
            @staticmethod
            def f(x): return x+const if const==1 else x-const
            @property
            def p(self): return closed
            def __init__(self, y=default): self.y = y
        return T()
    assert stable(make())==stable(make())
    for k in ('attr', 'default', 'closed', 'base', 'const'): assert stable(make())!=stable(make(**{k: 9})), k

@pytest.mark.parametrize('o, match', [(iter([1]), 'list_iterator'), (random.Random(1), 'Random'), (torch.Generator(), 'Generator'), (sys.modules[__name__], 'module')])
def test_unstable(o, match):
    with pytest.raises(Unstable, match=match): stable(o)

# --- faults

def damaged(f, name):
    "Make entry `f` unusable"
    d = json.loads(f.read_text())
    m = d['measured']
    if   name=='truncated': f.write_text(f.read_text()[:1000])
    elif name=='empty':     f.write_text('')
    elif name=='binary':    f.write_bytes(os.urandom(2000))
    elif name=='list':      f.write_text('[]')
    elif name=='folder':    f.unlink(); f.mkdir()
    elif name=='nan':       m['state']['mu'][0][1] = float('nan'); f.write_text(json.dumps(d))
    elif name=='negative':  m['state']['mu'][0][2] = -1e9; f.write_text(json.dumps(d))
    elif name=='moved':     m['state']['pivot'][0] += .1; f.write_text(json.dumps(d))
    elif name=='lacking':   del d['measured']; f.write_text(json.dumps(d))
    elif name=='other key': d['key']['measure']['seed'] = 9; f.write_text(json.dumps(d))
    elif name=='newer':     d['version'] = 2; f.write_text(json.dumps(d))

@pytest.mark.parametrize('name', ['truncated', 'empty', 'binary', 'list', 'folder', 'nan', 'negative', 'moved', 'lacking', 'other key', 'newer'])
def test_damaged_entry(folder, passes, cache_home, name):
    "Measured again with a warning that names the file, and mended where that can be"
    first = fit(folder)
    f, = entries(cache_home)
    damaged(f, name)
    with pytest.warns(UserWarning, match=f'{f.name} cannot be used'): again = fit(folder)
    assert bits(again)==bits(first) and len(passes)==2
    if name=='folder': return
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert bits(fit(folder))==bits(first) and len(passes)==2

def test_numbers_that_cannot_be_with_a_right_digest(cache_home):
    "Somebody who knows the format: the numbers are looked at as well"
    key,rs = {'a': 1},RunningStats().update(torch.rand(4, 3, 8, 8))
    C.write_entry(cache_home, key, rs, {})
    f = next(cache_home.glob('*.json'))
    d = json.loads(f.read_text())
    d['measured']['state']['mu'][0][1] = float('inf')
    d['digest'] = C._numbers_digest([d['measured'], d['provenance']])
    f.write_text(json.dumps(d))
    with pytest.warns(UserWarning, match='cannot be used'): assert C.read_entry(cache_home, key) is None

def no_space(*args, **kwargs): raise OSError(28, 'No space left on device')

@pytest.mark.parametrize('what', ['mkstemp', 'dump', 'mkdir', 'replace'])
def test_full_or_readonly_disk(folder, passes, cache_home, monkeypatch, what):
    target = dict(mkstemp='tempfile.mkstemp', dump='json.dump', mkdir='pathlib.Path.mkdir', replace='os.replace')[what]
    with monkeypatch.context() as m:
        m.setattr(target, no_space)
        with pytest.warns(UserWarning, match='cannot keep the measurement in .*No space left'): choice = fit(folder)
    assert choice.measured.n_images==18 and not entries(cache_home)
    fit(folder)
    assert len(passes)==2 and len(entries(cache_home))==1

@pytest.mark.skipif(os.name!='posix' or os.geteuid()==0, reason='root may write anywhere')
def test_readonly_folder(folder, cache_home):
    os.chmod(cache_home, 0o500)
    with pytest.warns(UserWarning, match='cannot keep the measurement'): fit(folder)

def test_a_file_where_the_folder_should_be(folder, cache_home):
    (cache_home/'fastai_normstats').write_text('')
    with pytest.warns(UserWarning, match='cannot keep the measurement'): assert fit(folder).measured.n_images==18

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_killed_while_writing(cache_home):
    "100 processes that write the same entry over and over, killed at random moments: what is read is whole, or nothing"
    key,rng = {'a': 1},random.Random(0)
    rs = RunningStats(bins=2000).update(torch.rand(4, 3, 8, 8))
    want,seen = json.dumps(rs.to_dict()),0
    for _ in range(100):
        pid = os.fork()
        if not pid:
            try:
                while True: C.write_entry(cache_home, key, rs, {'measured_at': 'now'})
            finally: os._exit(1)
        time.sleep(rng.random()*.03)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            found = C.read_entry(cache_home, key)
        assert found is None or json.dumps(found[0].to_dict())==want
        seen += found is not None
    assert seen>50

# --- provenance

def test_provenance(folder, cache_home):
    c = fit(folder, dict(tol=0, seed=3), batch_tfms=aug_transforms())
    p = c.provenance
    assert p['image_size']==[12, 12] and (p['n_images'], p['n_training'], p['tol'], p['seed'])==(18, 18, 0, 3) and len(p['split'])==32
    assert p['versions']['fastai_normstats']==fastai_normstats.__version__ and {'fastai', 'torch', 'pillow', 'python'}<={*p['versions']}
    assert any('Resize' in t for t in p['transforms']) and any('Flip' in t for t in p['transforms']) and 'T' in p['measured_at']
    f, = entries(cache_home)
    assert json.loads(f.read_text())['provenance']==p and json.loads(f.read_text())['key']['measure']['seed']==3
    d = json.loads(json.dumps(c.to_dict()))
    assert StatsChoice.from_dict(d).provenance==p

def test_a_saved_choice_given_back_keeps_numbers_and_provenance(folder, tmp_path, passes):
    c = fit(folder)
    c.save(tmp_path/'s.json')
    given = block().fit_stats(folder, stats=StatsChoice.load(tmp_path/'s.json'), **quiet, **small).stats_choice
    assert given.stats==c.stats and given.provenance==c.provenance and given.rule=='given' and len(passes)==1
    np.testing.assert_array_equal(given.measured.mean, c.measured.mean)

def test_choices_saved_before_there_was_provenance(folder, tmp_path):
    c = fit(folder)
    d = c.to_dict()
    del d['provenance']
    (tmp_path/'s.json').write_text(json.dumps(d))
    assert StatsChoice.load(tmp_path/'s.json').stats==c.stats
