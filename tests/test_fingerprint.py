"What changes pixels is noticed, what does not is not, and no object that fastai can work with stops a fit"

import ctypes,dataclasses,datetime,functools,importlib,io,itertools,json,logging,mmap,os,random,re,sqlite3
import subprocess,sys,threading
import types,weakref,zipfile
from collections import OrderedDict,defaultdict,namedtuple
from copy import deepcopy
from decimal import Decimal
from enum import Enum,IntFlag
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import (Brightness,CategoryBlock,ColReader,Datasets,ImageBlock,IndexSplitter,IntToFloatTensor,
                               PILImage,PILImageBW,Pipeline,Resize,TensorImage,TfmdDL,ToTensor,Transform,
                               aug_transforms,fa_collate)
from PIL import Image,ImageDraw,ImageFilter,ImageFont,ImageOps
from torch import nn

from fastai_normstats.all import DatasetStats
from fastai_normstats.fingerprint import Fingerprint,Look,describe,digest,item_keys,look,recipe,value_keys
from helpers import (bits,cache_entries as entries,fitted_choice,image_block,image_folder,no_address,
                     png_files as files,random_image)

small = dict(bs=4, num_workers=0)
own = dict(stats='custom', verbose=False)
held_out = range(0, 12, 4)

@pytest.fixture
def folder(tmp_path): return image_folder(tmp_path/'images', n=12)

block,fit = partial(image_block, held_out),partial(fitted_choice, held_out)

class Apply(Transform):
    "Function `f` of a batch, after all else"
    order = 50
    def __init__(self, f): self.f = f
    def encodes(self, x:TensorImage): return self.f(x)

# --- what makes a new measurement

def touched(f, change):
    "`f` with another time of change, or of access"
    data,t = f.read_bytes(),f.stat()
    if change=='content': f.write_bytes(data); os.utime(f, ns=(t.st_atime_ns, t.st_mtime_ns+1000))
    if change=='access':  os.utime(f, ns=(t.st_atime_ns+10**12, t.st_mtime_ns))

def patient(f): return f.name[:2]

changes = dict(
    added        = (lambda folder: random_image(np.random.default_rng(5)).save(folder/'a'/'zzz.png'), {}),
    removed      = (lambda folder: files(folder)[1].unlink(),                          {}),
    time         = (lambda folder: touched(files(folder)[1], 'content'),               {}),
    size         = (lambda folder: random_image(np.random.default_rng(5), 20).save(files(folder)[1]), {}),
    split        = (None, dict(splitter=IndexSplitter(range(1, 12, 4)))),
    augmented    = (None, dict(batch_tfms=aug_transforms())),
    image_size   = (None, dict(item_tfms=Resize(13))),
    method       = (None, dict(item_tfms=Resize(12, method='squish'))),
    loading      = (None, dict(blocks=(ImageBlock(PILImageBW), CategoryBlock))),
    seed         = (None, dict(pass_args=dict(seed=1))),
    tol          = (None, dict(pass_args=dict(tol=0))),
    max_images   = (None, dict(pass_args=dict(max_images=8))),
    mask         = (None, dict(pass_args=dict(mask=lambda x: x[:, :1]>.2))),
    nonfinite    = (None, dict(pass_args=dict(nonfinite='ignore'))),
    groups       = (None, dict(pass_args=dict(groups=patient))))

@pytest.mark.parametrize('name', changes)
def test_measured_again(folder, passes, name):
    change,kwargs = changes[name]
    fit(folder)
    if change: change(folder)
    fit(folder, **kwargs)
    assert len(passes)==2

@pytest.mark.parametrize('name, a, b', [('max_rotate', 10, 11), ('p_affine', .75, .76), ('p_lighting', .01, .02),
                                        ('max_zoom', 1.1, 1.11),
                                        ('mult', 1., 1.01)])
def test_another_parameter_or_probability(folder, passes, name, a, b):
    for v in (a, a, b): fit(folder, batch_tfms=aug_transforms(**{name: v}))
    assert len(passes)==2

def test_a_rare_transform_with_another_probability(folder, passes):
    "None of the images shows it"
    for p in (.001, .001, .002): fit(folder, batch_tfms=Brightness(p=p))
    assert len(passes)==2

def test_another_mask(folder, passes):
    for t in (.2, .2, .3): fit(folder, dict(mask=lambda x, t=t: x[:, :1]>t))
    assert len(passes)==2

def test_other_groups(folder, passes):
    for k in (2, 2, 3): fit(folder, dict(groups=lambda f, k=k: f.name[:k]))
    fit(folder, dict(groups=[i//2 for i in range(12)]))
    assert len(passes)==3

@pytest.mark.parametrize('module', ['fastai_normstats', 'fastai', 'torch', 'PIL'])
def test_another_version(folder, passes, monkeypatch, module):
    fit(folder)
    monkeypatch.setattr(f'{module}.__version__', '0.0.0')
    fit(folder)
    assert len(passes)==2

def defined(source, name='f', **names):
    "What `name` is after `source` was run, as a cell of a notebook is"
    exec(source, names)
    return names[name]

edits = dict(
    constant   = "def f(x): return x*BY",
    default    = "def f(x, by=BY): return x*by",
    keyword    = "def f(x, *, by=BY): return x*by",
    inner      = "def f(x):\n  def g(y): return y*BY\n  return g(x)",
    a_set      = "def f(x): return x if len(x) in {1, 2, BY} else x",
    operator   = "def f(x): return x*1. if BY==.5 else x/1.",
    closure    = "def g(by):\n  return lambda x: x*by\nf = g(BY)",
    decorated  = "import functools\n@functools.lru_cache\ndef f(x): return x*BY",
    wrapped    = "import functools\ndef d(g):\n  @functools.wraps(g)\n  def h(x): return g(x)\n  return h\n@d\ndef "
                 "f(x): return x*BY",
    in_partial = "import functools\ndef g(x, by): return x*by\nf = functools.partial(g, by=BY)",
    method     = "class A:\n  def __call__(self, x): return x*BY\nf = A()",
    a_property = "class A:\n  @property\n  def by(self): return BY\n  def __call__(self, x): return x*self.by\nf = A()",
    of_a_base  = "class A:\n  def g(self, x): return x*BY\nclass B(A):\n  def __call__(self, x): return self.g(x)\nf "
                 "= B()",
    argument   = "class A:\n  def __init__(self, by): self.by = by\n  def __call__(self, x): return x*self.by\nf = "
                 "A(BY)",
    slot       = "class A:\n  __slots__ = 'by',\n  def __init__(self, by): self.by = by\n"
                 "  def __call__(self, x): return x*self.by\nf = A(BY)")

def edited(name, by): return defined(edits[name].replace('BY', repr(by)))

@pytest.mark.parametrize('name', edits)
def test_own_code_edited(folder, passes, name):
    "Also where the pictures hardly change"
    for by in (.5, .5, .500001): fit(folder, batch_tfms=Apply(edited(name, by)))
    assert len(passes)==2

@pytest.mark.parametrize('name', edits)
def test_own_function_that_becomes_a_transform(name):
    "By itself, in a list of transforms"
    def of(by): return recipe_of(Transform(edited(name, by)))
    assert of(.5)==of(.5)!=of(.500001)

def recipe_of(*tfms):
    dl = Datasets([np.zeros((4, 4, 3), np.uint8)]*2, [[PILImage.create]]).dataloaders(after_item=ToTensor(), bs=2,
        num_workers=0).train
    dl.after_item = Pipeline(tfms)
    return recipe(dl)

def test_own_transform_edited():
    source = ("from fastai.vision.all import *\nclass f(Transform):\n  def encodes(self, x:PILImage): return x\n"
              "  def encodes(self, x:TensorImage): return x*{}")
    def of(v): return recipe_of(defined(source.format(v))())
    assert of(.5)==of(.5)!=of(.500001)

# --- what no line of the pipeline says, but the pictures do

gain = .5
class Settings: gain = .5
class Level(Enum): LUNG = .5

def module(name, source):
    res = types.ModuleType(name)
    exec(source, vars(res))
    return res
package = module('package', 'def dim(x): return x*.5')

here = sys.modules[__name__]

def quarter(x): return x*.25
def set_to(target, name, value): return lambda m: m.setattr(target, name, value)

def by_global(tmp_path, m):   return dict(batch_tfms=Apply(lambda x: x*gain)), set_to(here, 'gain', .25)
def by_globals(tmp_path, m):  return dict(batch_tfms=Apply(lambda x: x*globals()['gain'])), set_to(here, 'gain', .25)
def by_class(tmp_path, m):    return dict(batch_tfms=Apply(lambda x: x*Settings.gain)), set_to(Settings, 'gain', .25)
def by_function(tmp_path, m): return dict(batch_tfms=Apply(lambda x: package.dim(x))), set_to(package, 'dim', quarter)
def by_factory(tmp_path, m):
    table = defaultdict(lambda: Settings.gain)
    return dict(batch_tfms=Apply(lambda x: x*table.default_factory())), set_to(Settings, 'gain', .25)

def by_object(tmp_path, m):
    held = types.SimpleNamespace(gain=.5)
    return dict(batch_tfms=Apply(lambda x: x*held.gain)), set_to(held, 'gain', .25)

def by_environment(tmp_path, m):
    from os import getenv as g
    m.setenv('GAIN', '.5')
    return dict(batch_tfms=Apply(lambda x: x*float(g('GAIN')))), lambda m: m.setenv('GAIN', '.25')

def by_side_file(tmp_path, m):
    np.save(tmp_path/'gain.npy', .5)
    def f(x): return x*float(np.load(tmp_path/'gain.npy'))
    return dict(batch_tfms=Apply(f)), lambda m: np.save(tmp_path/'gain.npy', .25)

def by_a_file_that_was_not_there(tmp_path, m):
    def f(x): return x*.5 if (tmp_path/'lungs.png').exists() else x
    return dict(batch_tfms=Apply(f)), lambda m: (tmp_path/'lungs.png').write_text('')

def by_text(tmp_path, m):
    (tmp_path/'config.py').write_text('gain = .5')
    def f(x): return x*float((tmp_path/'config.py').read_text().split('=')[1])
    return dict(batch_tfms=Apply(f)), lambda m: (tmp_path/'config.py').write_text('gain = .25')

def by_database(tmp_path, m):
    db = sqlite3.connect(tmp_path/'db', check_same_thread=False)
    db.execute('create table t (gain)'), db.execute('insert into t values (.5)')
    def f(x): return x*db.execute('select gain from t').fetchone()[0]
    return dict(batch_tfms=Apply(f)), lambda m: db.execute('update t set gain = .25')

def by_reloading(tmp_path, m):
    m.syspath_prepend(tmp_path)
    (tmp_path/'own_module_to_reload.py').write_text('gain = .5')
    mod = importlib.import_module('own_module_to_reload')
    def change(m):
        # of another size: no bytecode of before is taken
        (tmp_path/'own_module_to_reload.py').write_text('gain = .250')
        importlib.reload(mod)
    return dict(batch_tfms=Apply(lambda x: x*importlib.import_module('own_module_to_reload').gain)), change

def dim_image(im):
    im.load()
    return im.point(lambda v: v//2)

def dimmed(f): return lambda *args, **kwargs: dim_image(f(*args, **kwargs))
def by_patched_open(tmp_path, m):    return {}, set_to(Image, 'open', dimmed(Image.open))
def by_patched_convert(tmp_path, m): return {}, set_to(Image.Image, 'convert', dimmed(Image.Image.convert))
def by_patched_resize(tmp_path, m):  return {}, set_to(Image.Image, 'resize', dimmed(Image.Image.resize))

def by_decoder(tmp_path, m):
    "Another plug-in of Pillow's reads this format"
    real,accepts = Image.OPEN['PNG']
    return {}, lambda m: m.setitem(Image.OPEN, 'PNG', (dimmed(real), accepts))

def by_method(tmp_path, m):
    m.setattr(TensorImage, 'dimmed', lambda self: self*.5, raising=False)
    return dict(batch_tfms=Apply(lambda x: x.dimmed())), set_to(TensorImage, 'dimmed', lambda self: self*.25)

def by_torchvision(tmp_path, m):
    from torchvision.transforms import functional as tvf
    return dict(batch_tfms=Apply(lambda x: tvf.adjust_gamma(x, 2.))), set_to(tvf, 'adjust_gamma', lambda x, g: x*.25)

def by_skimage(tmp_path, m):
    exposure = pytest.importorskip('skimage.exposure')
    def load(f): return PILImage.create(exposure.adjust_gamma(np.asarray(Image.open(f)), 2.))
    return dict(get_x=load), set_to(exposure, 'adjust_gamma', lambda x, g: x//4)

def collate(b, by):
    x,y = fa_collate(b)
    return x//by,y

class Named(Transform):
    "With an argument that fastai's own random transforms use for what they drew"
    order = 50
    def __init__(self, mat, do): self.mat,self.do = mat,do
    def encodes(self, x:TensorImage): return x*self.mat if self.do else x

class Private(Transform):
    order,__slots__ = 50,('_gain',)
    def __init__(self, by): self._gain = by
    def encodes(self, x:TensorImage): return x*self._gain

class Word(str): pass
class Folder(type(Path())): pass

def by_attribute(kind):
    def make(tmp_path, m):
        held = dict(str=Word('a'), path=Folder('a'), tensor=torch.zeros(3).as_subclass(TensorImage))[kind]
        held.by = .5
        return dict(batch_tfms=Apply(lambda x: x*held.by)), set_to(held, 'by', .25)
    return make

def exchanged(a, b):
    "Block arguments `a`, which change to `b`"
    def make(tmp_path, m):
        kwargs = dict(a)
        return kwargs, lambda m: kwargs.update(b)
    return make

def loaded(by): return dict(dl_type=functools.partial(TfmdDL, create_batch=functools.partial(collate, by=by)))

worlds = dict(a_global=by_global, globals=by_globals, class_attribute=by_class, module_function=by_function,
              factory=by_factory,
    object=by_object, environment=by_environment, side_file=by_side_file, new_file=by_a_file_that_was_not_there,
    text=by_text,
    database=by_database, reloaded=by_reloading, patched_open=by_patched_open, patched_convert=by_patched_convert,
    patched_resize=by_patched_resize, decoder=by_decoder, method=by_method, torchvision=by_torchvision,
    skimage=by_skimage,
    attribute_of_str=by_attribute('str'), attribute_of_path=by_attribute('path'),
    attribute_of_tensor=by_attribute('tensor'))
swapped = dict(
    loader  = exchanged(loaded(2), loaded(4)),
    mat     = exchanged(dict(batch_tfms=Named(.5, True)), dict(batch_tfms=Named(.25, True))),
    do      = exchanged(dict(batch_tfms=Named(.5, True)), dict(batch_tfms=Named(.5, False))),
    private = exchanged(dict(batch_tfms=Private(.5)), dict(batch_tfms=Private(.25))))

@pytest.mark.parametrize('kind', [Word, Folder])
def test_an_attribute_of_an_item_is_part_of_its_key(tmp_path, kind):
    "Also of an image that no look visits: what a function reads from it may change the picture"
    items = [kind(f) for f in files(image_folder(tmp_path/'images', n=40))]
    for o in items: o.by = 1.
    dl = TfmdDL(Datasets(items, [[PILImage.create]]), bs=2, num_workers=0)
    before,kept = item_keys(dl)
    items[-1].by = .5
    after,_ = item_keys(dl)
    assert kept and [a==b for a,b in zip(before, after)]==[True]*39+[False]
    assert describe(items[-1])!=describe(kind(items[-1]))

def with_loader(kwargs):
    kwargs = dict(kwargs)
    return {'dl_type': kwargs.pop('dl_type')} if 'dl_type' in kwargs else {},kwargs

@pytest.mark.parametrize('name', [*worlds, *swapped])
def test_what_changes_pixels_is_noticed(folder, passes, tmp_path, monkeypatch, name):
    "Kept before the change, by a new block as by another process; measured after it, also by the block that was fitted"
    kwargs,change = {**worlds, **swapped}[name](tmp_path, monkeypatch)
    def fitted():
        dl_type,blocks = with_loader(kwargs)
        return block(**blocks).fit_stats(folder, **own, **dl_type, **small)
    db = fitted()
    before = bits(db.stats_choice)
    assert bits(fitted().stats_choice)==before and len(passes)==1
    change(monkeypatch)
    assert bits(fitted().stats_choice)!=before and len(passes)==2
    if name in swapped: return  # the block still has the old ones
    with pytest.warns(UserWarning, match='these loaders are not what `fit_stats` measured'):
        db.dataloaders(folder, **small)
    assert bits(db.stats_choice)==bits(fitted().stats_choice)!=before

def test_what_a_mask_refers_to(folder, passes, monkeypatch):
    mask = lambda x: x[:, :1]>gain/2
    before = fit(folder, dict(mask=mask))
    monkeypatch.setattr(sys.modules[__name__], 'gain', .7)
    after = fit(folder, dict(mask=mask))
    assert len(passes)==2 and before.measured.n_pixels!=after.measured.n_pixels

def test_enums_by_value():
    def of(v):
        class Level(Enum): LUNG = v
        return Level.LUNG
    assert describe(of(1))==describe(of(1))!=describe(of(2))

def test_images_that_a_getter_finds(passes, tmp_path):
    """Items are files, and a function says which others are read: one of these changes, which is not among those
    looked at"""
    big,pre = (image_folder(tmp_path/k, n=60) for k in ('big', 'pre'))
    def other(p): return Path(str(p).replace(str(big), str(pre)))
    def new(): return block(get_x=other, splitter=IndexSplitter([0]))
    before = bits(new().fit_stats(big, **own, **small).stats_choice)
    assert bits(new().fit_stats(big, **own, **small).stats_choice)==before and len(passes)==1
    dl = new().dataloaders(big, **small).train
    seen = Fingerprint(dl).look.keys
    unseen = next(f for f,k in zip(dl.dataset.items, item_keys(dl)[0]) if k not in seen)
    random_image(np.random.default_rng(9), 24).save(other(unseen))
    assert bits(new().fit_stats(big, **own, **small).stats_choice)!=before and len(passes)==2

# --- what makes none

same = dict(
    validation  = (lambda folder: random_image(np.random.default_rng(5)).save(files(folder)[0]), {}),
    access_time = (lambda folder: [touched(f, 'access') for f in files(folder)],                 {}),
    folder_time = (lambda folder: os.utime(folder/'a'),                                          {}),
    labels      = (None, dict(get_y=lambda f: 'x')),
    valid_added = (lambda folder: random_image(np.random.default_rng(5)).save(folder/'b'/'zzz.png'),
                   dict(splitter=IndexSplitter([*held_out, 12]))))

@pytest.mark.parametrize('name', same)
def test_used_again(folder, passes, name):
    change,kwargs = same[name]
    first = fit(folder)
    if change: change(folder)
    assert bits(fit(folder, **kwargs))==bits(first) and len(passes)==1

@pytest.mark.parametrize('kwargs', [dict(bs=8), dict(bs=1), dict(bs=4, num_workers=2), dict(bs=4, val_bs=2),
                                    dict(bs=4, shuffle=False)], ids=str)
@pytest.mark.parametrize('tfms', [[], aug_transforms()], ids=['plain', 'random'])
def test_batch_size_and_workers(folder, passes, kwargs, tfms):
    fit(folder, batch_tfms=tfms)
    block(batch_tfms=tfms).fit_stats(folder, **{**own, 'num_workers': 0, **kwargs})
    assert len(passes)==1

def test_order_of_keyword_arguments(folder, passes):
    def tfms(aug, clamp): return [*aug_transforms(**aug), Apply(functools.partial(torch.clamp, **clamp))]
    a,b = dict(max_rotate=10, max_zoom=1.2),dict(max_zoom=1.2, max_rotate=10)
    for aug,clamp in ((a, dict(min=0, max=1)), (b, dict(min=0, max=1)),
                      (a, dict(max=1, min=0))): fit(folder, batch_tfms=tfms(aug, clamp))
    assert len(passes)==1

def test_renamed_local_variables(folder, passes):
    for n in ('y', 'z'): fit(folder, batch_tfms=Apply(defined(f"def f(x):\n  {n} = x*.5\n  return {n}")))
    assert len(passes)==1

def test_what_transforms_drew_last_is_no_change(folder, passes):
    "A measurement is found again after training batches went through the very same transforms"
    tfms = aug_transforms()
    for _ in range(2):
        fit(folder, batch_tfms=tfms)
        dls = block(batch_tfms=tfms).dataloaders(folder, **small)
        for _ in range(3): dls.one_batch()
    assert len(passes)==1

@pytest.mark.parametrize('tfms', [[], aug_transforms()], ids=['plain', 'random'])
def test_another_number_of_threads(folder, passes, tfms):
    n = torch.get_num_threads()
    try:
        for k in (1, 2):
            torch.set_num_threads(k)
            fit(folder, batch_tfms=tfms)
    finally: torch.set_num_threads(n)
    assert len(passes)==1

def test_counters(folder, passes):
    """A transform that counts its calls, in an argument or elsewhere, does not make loaders other than those that
    were fitted"""
    class Counts(Transform):
        order = 50
        def __init__(self, n=0): self.n,self.total = n,0
        def encodes(self, x:TensorImage): self.n += 1; self.total += 1; return x
    db = block(batch_tfms=Counts()).fit_stats(folder, **own, **small)
    with warnings_are_errors(): dls = db.dataloaders(folder, **small)
    assert len(passes)==1 and dls.stats_choice is not None

def warnings_are_errors():
    import warnings
    res = warnings.catch_warnings()
    class Strict:
        def __enter__(self): res.__enter__(); warnings.simplefilter('error')
        def __exit__(self, *args): return res.__exit__(*args)
    return Strict()

# --- randomness of its own

class OwnNoise(Transform):
    order = 50
    def __init__(self): self.draw = np.random.default_rng(7)
    def encodes(self, x:TensorImage): return x*float(self.draw.uniform(.9, 1.1))

def test_randomness_of_its_own(folder, passes, cache_home, capsys):
    "Not kept, and said; the loaders of the split that was fitted do not measure again"
    for k in range(2):
        db = block(batch_tfms=OwnNoise()).fit_stats(folder, stats='custom', **small)
        assert 'randomness of its own' in capsys.readouterr().out and len(passes)==k+1
        with warnings_are_errors(): db.dataloaders(folder, **small)
        assert len(passes)==k+1
    assert not entries(cache_home)

def test_randomness_of_its_own_in_batch_transforms(folder, passes, cache_home):
    "Each call of `dataloaders` measures: nothing can tell whether the pipeline is the same"
    db = block(batch_tfms=[OwnNoise(), DatasetStats(**own)])
    for _ in range(2): db.dataloaders(folder, **small)
    assert len(passes)==2 and not entries(cache_home)

def test_counts_that_change_pixels(folder, passes, cache_home):
    class Fades(Transform):
        order = 50
        def __init__(self): self.n = 0
        def encodes(self, x:TensorImage): self.n += 1; return x/self.n
    for _ in range(2): fit(folder, batch_tfms=Fades())
    assert len(passes)==2 and not entries(cache_home)

def test_seeded_randomness_is_kept(folder, passes, cache_home):
    "Python's, numpy's and torch's global generators"
    draws = (lambda x: x*random.uniform(.9, 1)), (lambda x: x*float(np.random.uniform(.9, 1))), \
        (lambda x: x*torch.rand(1).item())
    for f in draws:
        n = len(passes)
        assert bits(fit(folder, batch_tfms=Apply(f)))==bits(fit(folder, batch_tfms=Apply(f))) and len(passes)==n+1

# --- items that are ids

def by_id(folder):
    "Blocks whose items say nothing of the files behind them"
    ids = [str(f.relative_to(folder)) for f in files(folder)]
    shared = dict(get_items=None, get_y=lambda o: 'x')
    yield block(**shared, get_x=lambda i: PILImage.create(folder/i)), ids
    yield block(**shared, get_x=lambda i: PILImage.create(files(folder)[i])), list(range(12))
    yield block(**shared, get_x=lambda d: PILImage.create(folder/d['id'])), [dict(id=i) for i in ids]
    yield block(**shared, get_x=lambda r: PILImage.create(folder/r.id)), pd.DataFrame(dict(id=ids))

def change_all(folder):
    for f in files(folder): Image.open(f).point(lambda v: v//2).save(f)

@pytest.mark.parametrize('k', range(4), ids=['str', 'int', 'dict', 'row'])
@pytest.mark.parametrize('cache', [True, False])
def test_ids_are_measured_at_each_explicit_fit(folder, passes, cache_home, k, cache):
    db,src = list(by_id(folder))[k]
    first = db.fit_stats(src, cache=cache, **own, **small).stats_choice
    with warnings_are_errors(): dls = db.dataloaders(src, **small)
    assert len(passes)==1 and not entries(cache_home)
    change_all(folder)
    assert bits(db.fit_stats(src, cache=cache, **own, **small).stats_choice)!=bits(first) and len(passes)==2
    dls.fit_stats(cache=cache, **own)
    dls.fit_stats(cache=cache, **own)
    assert len(passes)==4 and not entries(cache_home)

@pytest.mark.parametrize('k', range(4), ids=['str', 'int', 'dict', 'row'])
def test_ids_in_batch_transforms_are_measured_each_time(folder, passes, k):
    db,src = list(by_id(folder))[k]
    db.batch_tfms = [*db.batch_tfms, DatasetStats(**own)]
    first = db.dataloaders(src, **small).stats_choice
    change_all(folder)
    assert bits(db.dataloaders(src, **small).stats_choice)!=bits(first) and len(passes)==2

def test_ids_and_pictures_that_changed_after_a_fit(folder, passes):
    "The loaders of a block that was fitted look, too"
    db,src = next(by_id(folder))
    first = db.fit_stats(src, **own, **small).stats_choice
    change_all(folder)
    with pytest.warns(UserWarning, match='what the images look like'): again = db.dataloaders(src, **small).stats_choice
    assert bits(again)!=bits(first)
    assert len(passes)==2

def test_rows_that_name_files_are_kept(folder, passes):
    df = pd.DataFrame(dict(file=list(map(str, files(folder)))))
    def new(): return block(get_items=None, get_x=ColReader('file'), get_y=lambda r: 'x')
    first,again = (new().fit_stats(df, **own, **small).stats_choice for _ in range(2))
    assert bits(again)==bits(first) and len(passes)==1

@pytest.mark.parametrize('kwargs', [dict(cache=False), dict(cache=False, verbose=True)], ids=str)
def test_without_a_cache_each_explicit_fit_measures(folder, passes, cache_home, kwargs):
    db = block()
    for k in range(3):
        db.fit_stats(folder, **{**own, **kwargs}, **small)
        db.dataloaders(folder, **small)
        assert len(passes)==k+1
    dls = db.dataloaders(folder, **small)
    for k in range(2): dls.fit_stats(**{**own, **kwargs})
    assert len(passes)==5 and not entries(cache_home)

def test_without_a_cache_each_call_of_dataloaders_measures(folder, passes, cache_home):
    db = block(batch_tfms=DatasetStats(cache=False, **own))
    first = db.dataloaders(folder, **small).stats_choice
    assert bits(db.dataloaders(folder, **small).stats_choice)==bits(first) and len(passes)==2
    change_all(folder)
    assert bits(db.dataloaders(folder, **small).stats_choice)!=bits(first) and len(passes)==3
    assert not entries(cache_home)

# --- objects that a user's transforms hold

class Holds(Transform):
    "Something that its calls use, or only carry along"
    order = 50
    def __init__(self, thing=None, use=None): self.thing,self.use = thing,use
    def encodes(self, x:TensorImage): return x if self.use is None else self.use(self.thing, x)

def raising(*names):
    "An object whose methods `names` raise"
    def fail(self, *args, **kwargs): raise RuntimeError('not today')
    values = 'value', '__class__', 'shape', 'iloc', 'dtype'
    return type('Raising', (), {k: property(fail) if k in values else fail for k in names})()

class Endless:
    def __len__(self): return 3
    def __iter__(self): return itertools.count()
    def __getitem__(self, i): return self

@dataclasses.dataclass(slots=True)
class Slotted:
    lo:float = 0.
    hi:float = 1.

class Slots:
    __slots__ = 'a','b'
    def __init__(self, a): self.a = a  # and `b` stays empty

class OnlySlots(Transform):
    order,__slots__ = 50,('by','other')
    def __init__(self, by): self.by = by
    def encodes(self, x:TensorImage): return x*self.by

class Flags(IntFlag):
    A = 1
    B = 2

class Stubborn(type):
    def __getattribute__(cls, k):
        if k in ('__qualname__', '__name__', '__module__'): raise RuntimeError('not today')
        return super().__getattribute__(k)

class OfStubborn(metaclass=Stubborn): pass

class Point(ctypes.Structure): _fields_ = [('x', ctypes.c_int)]

Pair = namedtuple('Pair', 'a b')

class Compose:
    "As albumentations has it: steps with a probability, called with and giving dicts"
    def __init__(self, steps, p=1.): self.steps,self.p,self.processors,self.lock = steps,p,{},threading.RLock()
    def __call__(self, *, image, **kwargs):
        for s in self.steps: image = s(image=image)['image']
        return dict(image=image, **kwargs)

class HorizontalFlip:
    def __init__(self, p=.5): self.p,self.params = p,{}
    def __call__(self, image): return dict(image=image[:, ::-1].copy() if random.random()<self.p else image)

def copy(x): return x.clone()
def mul(x, y): return x*y
def add(x): return mul(copy(x), 1.)+0
def lt(x): return x.where(x<2, 0.)

def named_as_others(x):
    "Names that star imports of fastai give other meanings"
    x = add(x)
    x = lt(x).clone().mul(1.).add(0.).neg().neg()
    return x.mul(.5).sub(0).div(1.)

def deep_list(n=5000):
    res = []
    for _ in range(n): res = [res]
    return res

def wide(n=8):
    "A small thing that is astronomically large when each path to it is walked"
    res = [0]
    for _ in range(n): res = [res]*90
    return res

def of_itself():
    d = dict(a=1)
    d['self'] = d
    return d

def family(n=14):
    "Functions, each of which names all others"
    names = ', '.join(f'f{i}' for i in range(n))
    return defined('\n'.join(f"def f{i}(x): return [{names}] and x" for i in range(n)), 'f0')

class Blur(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        nn.init.constant_(self.conv.weight, .2)

    @torch.no_grad()
    def forward(self, x): return self.conv(x)

def in_closure(thing, use=lambda thing, x: x):
    "A function that closes over `thing`"
    def f(x): return use(thing, x)
    return Apply(f)

def a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path/'z.zip', 'w') as z: z.writestr('gain', '.5')
    return zipfile.ZipFile(tmp_path/'z.zip')

def on_pictures(f):
    "A PIL image transform"
    def g(x:PILImage): return PILImage(f(x))
    return dict(item_tfms=[Resize(12), g])

def with_skimage(f):
    exposure = pytest.importorskip('skimage.exposure')
    def load(o): return PILImage.create((f(exposure, np.asarray(Image.open(o))/255.)*255).clip(0, 255).astype(np.uint8))
    return dict(get_x=load)

def with_torchvision():
    v2 = pytest.importorskip('torchvision.transforms.v2')
    return on_pictures(v2.Compose([v2.CenterCrop(8), v2.GaussianBlur(3, 1.)]))

def with_albumentations():
    c = Compose([HorizontalFlip(), HorizontalFlip(p=1)])
    return on_pictures(lambda im: Image.fromarray(c(image=np.asarray(im))['image']))

def with_attrs():
    attr = pytest.importorskip('attr')
    Window = attr.make_class('Window', dict(lo=attr.ib(default=0.), hi=attr.ib(default=1.)), slots=True, frozen=True)
    return dict(batch_tfms=Holds(thing=Window(), use=lambda w, x: x.clamp(w.lo, w.hi)))

def with_sparse():
    sparse = pytest.importorskip('scipy.sparse')
    return dict(batch_tfms=Holds(thing=sparse.eye(12, format='csr'), use=lambda s, x: x*float(s[0, 0])))

def write_on(im):
    ImageDraw.Draw(im).text((0, 0), 'R', font=ImageFont.load_default())
    return im

def holds(make): return lambda tmp_path: dict(batch_tfms=Holds(thing=make(tmp_path)))
def closes_over(make, use=lambda thing, x: x): return lambda tmp_path: dict(batch_tfms=in_closure(make(tmp_path), use))
def locked(lock, x):
    with lock: return x

def batch(f): return lambda tmp_path: dict(batch_tfms=f)

ordinary = {
    'lambda':            batch(Apply(lambda x: x*.5)),
    'plain lambda':      lambda tmp_path: dict(item_tfms=[Resize(12), lambda x: x]),
    'partial':           batch(Apply(functools.partial(torch.mul, other=.5))),
    'partial as such':   lambda tmp_path: dict(batch_tfms=functools.partial(torch.clamp, min=0)),
    'builtin':           batch(Apply(torch.sqrt)),
    'ufunc':             batch(Holds(thing=np.sqrt)),
    'vectorize':         batch(Holds(thing=np.vectorize(abs))),
    'callable class':    batch(Apply(defined("class f:\n  def __call__(self, x): return x*.5")())),
    'lru_cache':         batch(Apply(functools.lru_cache(lambda x: x*.5))),
    'singledispatch':    batch(Apply(functools.singledispatch(lambda x: x*.5))),
    'names of others':   batch(Apply(named_as_others)),
    'a large family':    batch(Holds(thing=family())),
    'nn.Module':         batch(Apply(Blur())),
    'nn.Module held':    batch(Holds(thing=nn.Sequential(Blur(), nn.ReLU()))),
    'module of Python':  batch(Holds(thing=json)),
    'pattern':           batch(Holds(thing=re.compile('a+'))),
    'slice':             batch(Holds(thing=slice(0, 8), use=lambda s, x: x[..., s, s])),
    'Ellipsis':          batch(Holds(thing=...)),
    'dtypes':            batch(Holds(thing=[torch.float32, np.dtype('int8'), np.float32], use=lambda d, x: x.to(d[0]))),
    'dates':             batch(Holds(thing=[datetime.date(2020, 1, 1), datetime.datetime.now(),
                                            datetime.timedelta(1)])),
    'Decimal':           batch(Holds(thing=Decimal('.5'), use=lambda d, x: x*float(d))),
    'font':              holds(lambda tmp_path: ImageFont.load_default()),
    'a font that writes': lambda tmp_path: on_pictures(write_on),
    'ImageFilter':       lambda tmp_path: on_pictures(lambda im: im.filter(ImageFilter.GaussianBlur(1))),
    'ImageOps':          lambda tmp_path: on_pictures(ImageOps.equalize),
    'skimage':           lambda tmp_path: with_skimage(lambda e, x: e.equalize_adapthist(x, clip_limit=.03)),
    'albumentations':    lambda tmp_path: with_albumentations(),
    'torchvision':       lambda tmp_path: with_torchvision(),
    'slots':             batch(OnlySlots(.5)),
    'empty slot':        batch(Holds(thing=Slots(1))),
    'slots dataclass':   batch(Holds(thing=Slotted(), use=lambda w, x: x.clamp(w.lo, w.hi))),
    'attrs':             lambda tmp_path: with_attrs(),
    'named tuple':       batch(Holds(thing=Pair(.5, None), use=lambda p, x: x*p.a)),
    'Enum':              batch(Holds(thing=[Level.LUNG, Flags.A | Flags.B], use=lambda o, x: x*o[0].value)),
    'ctypes':            batch(Holds(thing=Point(1))),
    'lock':              closes_over(lambda tmp_path: threading.Lock(), locked),
    'lock held':         holds(lambda tmp_path: threading.RLock()),
    'thread local':      holds(lambda tmp_path: threading.local()),
    'logger':            batch(Holds(thing=logging.getLogger('x'), use=lambda log, x: log.debug('x') or x)),
    'open file':         holds(lambda tmp_path: open(__file__, 'rb')),
    'open file in a closure': closes_over(lambda tmp_path: open(__file__, 'rb')),
    'mmap':              holds(lambda tmp_path: mmap.mmap(-1, 10)),
    'BytesIO':           holds(lambda tmp_path: io.BytesIO(b'abc')),
    'zip':               closes_over(a_zip, lambda z, x: x*float(z.read('gain'))),
    'zip member':        holds(lambda tmp_path: a_zip(tmp_path).open('gain')),
    'sqlite':            closes_over(lambda tmp_path: sqlite3.connect(':memory:', check_same_thread=False),
                                     lambda db, x: x*db.execute('select .5').fetchone()[0]),
    'random.Random':     holds(lambda tmp_path: random.Random(1)),
    'numpy generator':   holds(lambda tmp_path: np.random.default_rng(1)),
    'RandomState':       closes_over(lambda tmp_path: np.random.RandomState(1)),
    'torch generator':   holds(lambda tmp_path: torch.Generator()),
    'iterator':          closes_over(lambda tmp_path: iter(range(10**9)), lambda it, x: x if next(it)>=0 else 0*x),
    'generator':         holds(lambda tmp_path: (i for i in itertools.count())),
    'cycle':             holds(lambda tmp_path: itertools.cycle('ab')),
    'object in a closure': closes_over(lambda tmp_path: types.SimpleNamespace(a=object(), b=of_itself())),
    'weak reference':    batch(Holds(thing=weakref.ref(Pair))),
    'mock':              batch(Holds(thing=MagicMock())),
    'deep list':         batch(Holds(thing=deep_list())),
    'wide list':         batch(Holds(thing=wide())),
    'dict of itself':    batch(Holds(thing=of_itself())),
    'long list':         batch(Holds(thing=list(range(10**5)))),
    'mixed set':         batch(Holds(thing={1, 'a', None, (1, 2), frozenset('b')})),
    'dict of objects':   batch(Holds(thing={object(): object(), 1: len})),
    'OrderedDict':       batch(Holds(thing=OrderedDict(a=defaultdict(list)))),
    'sparse matrix':     lambda tmp_path: with_sparse(),
    'sparse tensor':     batch(Holds(thing=torch.eye(3).to_sparse())),
    'bfloat16':          batch(Holds(thing=torch.ones(3, dtype=torch.bfloat16))),
    'meta tensor':       batch(Holds(thing=torch.ones(3, device='meta'))),
    'array of objects':  batch(Holds(thing=np.array([object(), None], dtype=object))),
    'structured array':  batch(Holds(thing=np.zeros(3, dtype=[('a', int), ('b', float)]))),
    'array of dates':    batch(Holds(thing=np.array(['2020-01-01'], dtype='datetime64[D]'))),
    'table':             batch(Holds(thing=pd.DataFrame(dict(a=[1, None, 'x'])), use=lambda df, x: x*float(len(df)))),
    'endless':           batch(Holds(thing=Endless())),
    'class held':        batch(Holds(thing=Slotted)),
    'generic class':     batch(Holds(thing=dict[str, list[int]])),
    'stubborn class':    batch(Holds(thing=OfStubborn())),
    'stubborn class itself': batch(Holds(thing=OfStubborn)),
    'numbers of numpy':  batch(Holds(thing=[np.float64(.5), np.int8(1), np.bool_(True), np.str_('a'),
                                            np.datetime64(0, 's')])),
    'surrogates':        batch(Holds(thing='\udcff', use=lambda s, x: x)),
    'large numbers':     batch(Holds(thing=[10**4000, float('nan'), float('inf'), 1j])),
    **{f'raising {k}':   batch(Holds(thing=raising(*k.split()))) for k in (
        '__repr__ __str__', '__eq__ __hash__', '__getattr__', '__getattribute__', '__iter__ __len__', '__len__',
        '__class__', '__bool__',
        'value shape iloc dtype', '__fspath__', '__call__', '__array__', '__reduce__ __getstate__',
        '__repr__ __str__ __eq__ __hash__ __getattribute__ __iter__ __len__ __class__ __bool__ __fspath__ __array__')}}

def ways(make, source):
    "Choices by `fit_stats`, kept, without a cache and without a measurement; and by `DatasetStats` in `batch_tfms`"
    kinds = dict(kept={}, uncached=dict(cache=False), imagenet=dict(stats='imagenet'))
    res = {k: make().fit_stats(source, **{**own, **v}, **small).stats_choice for k,v in kinds.items()}
    db = make()
    db.batch_tfms = [*db.batch_tfms, DatasetStats(**own)]
    return dict(res, batch_tfms=db.dataloaders(source, **small).stats_choice)

def truth(db, source):
    "Mean and std (float64) of all pixels that plain fastai yields for training, `None` where they differ each time"
    dl = db.dataloaders(source, **small).train
    def read(): return np.concatenate([b[0].double().numpy() for b in dl.new(shuffle=False, drop_last=False)])
    a,b = read(),read()
    return (a.mean((0, 2, 3)), a.std((0, 2, 3))) if np.array_equal(a, b) else None

def check_ways(make, source):
    want,found = truth(make(), source),ways(make, source)
    assert found.pop('imagenet').stats.name=='imagenet'
    for k,c in found.items() if want is not None else ():
        np.testing.assert_allclose([c.stats.mean, c.stats.std], want, atol=2e-6, err_msg=k)

@pytest.mark.slow
@pytest.mark.parametrize('name', ordinary)
def test_ordinary_transforms(folder, tmp_path, name):
    "What plain fastai trains with is measured as well, whatever it holds"
    check_ways(lambda: block(**ordinary[name](tmp_path)), folder)

def calls(f):
    "How many functions are called until `f()` is done"
    n = 0
    def count(frame, event, arg):
        nonlocal n
        n += event in ('call', 'c_call')
    sys.setprofile(count)
    try: f()
    finally: sys.setprofile(None)
    return n

@pytest.mark.parametrize('name', ordinary)
def test_what_transforms_hold_is_described(tmp_path, name):
    "In words, and without reading all of a long list: counted in calls, which are the same on any machine"
    tfms = [f for v in ordinary[name](tmp_path).values() for f in (v if isinstance(v, list) else [v])]
    said = []
    assert calls(lambda: said.extend(map(describe, tfms)))<600_000
    assert said and all(isinstance(s, str) and len(s)<1100 for s in said)

# --- items

def hiding(*names):
    "Items whose methods `names` raise: how number `k` is made, and its number again"
    def fail(self, *args, **kwargs): raise RuntimeError('not today')
    methods = {k: property(fail) if k in ('iloc', 'shape', 'dtype') else fail for k in names}
    cls = type('Item', (), {'__slots__': ('k',), **methods})
    def make(k, f):
        o = cls.__new__(cls)
        cls.k.__set__(o, k)
        return o
    return make, lambda o: cls.k.__get__(o)

class Case:
    def __init__(self, k): self.k,self.lock,self.children = k,threading.Lock(),[self]
    def __len__(self): return 2
    def __iter__(self): return itertools.count()
    def __getitem__(self, i): raise IndexError(i)

@dataclasses.dataclass(slots=True)
class Scan:
    k:int
    at:datetime.date = datetime.date(2020, 1, 1)

def deep_with(k):
    res = k
    for _ in range(2000): res = [res]
    return res

def depth(o):
    while isinstance(o, list): o = o[0]
    return o

# how item `k`, of file `f`, looks; and its number again
kinds = dict(
    int       = (lambda k, f: k,                             lambda o: o),
    str       = (lambda k, f: f'case {k}',                   lambda o: int(o.split()[1])),
    word      = (lambda k, f: Word(k),                       int),
    bytes     = (lambda k, f: f'{k}'.encode()*200,           lambda o: int(o[:len(o)//200])),
    float     = (lambda k, f: float(k),                      int),
    complex   = (lambda k, f: complex(k, 1),                 lambda o: int(o.real)),
    fraction  = (lambda k, f: Decimal(k),                    int),
    date      = (lambda k, f: datetime.date(2020, 1, 1+k),   lambda o: o.day-1),
    dict      = (lambda k, f: dict(k=k, f=f),                lambda o: o['k']),
    nested    = (lambda k, f: dict(k=[dict(k=(k,))]),        lambda o: o['k'][0]['k'][0]),
    set       = (lambda k, f: frozenset([k]),                lambda o: min(o)),
    list      = (lambda k, f: [k, f],                        lambda o: o[0]),
    long_list = (lambda k, f: [k]*1000,                      lambda o: o[0]),
    named     = (lambda k, f: types.SimpleNamespace(k=k),    lambda o: o.k),
    scan      = (lambda k, f: Scan(k),                       lambda o: o.k),
    case      = (lambda k, f: Case(k),                       lambda o: o.k),
    function  = (lambda k, f: functools.partial(int, k),     lambda o: o()),
    range     = (lambda k, f: range(k, 99),                  lambda o: o[0]),
    slice     = (lambda k, f: slice(k),                      lambda o: o.stop),
    bytes_io  = (lambda k, f: io.BytesIO(str(k).encode()),   lambda o: int(o.getvalue())),
    scalar    = (lambda k, f: torch.tensor(k),               int),
    series    = (lambda k, f: pd.Series([k]),                lambda o: int(o.iloc[0])),
    sparse    = (lambda k, f: pytest.importorskip('scipy.sparse').csr_matrix([[k, 1]]), lambda o: int(o[0, 0])),
    folder    = (lambda k, f: f.parent/'..'/f.parent.name/f'{k}-none', lambda o: int(o.name.split('-')[0])),
    eq        = hiding('__eq__', '__hash__'),
    getattr   = hiding('__getattr__'),
    iter_len  = hiding('__iter__', '__len__'),
    shape     = hiding('shape', 'dtype'),
    bool      = hiding('__bool__'),
    fspath    = hiding('__fspath__'))

@pytest.mark.slow
@pytest.mark.parametrize('name', kinds)
def test_items_that_are_ids(folder, cache_home, name):
    "A function makes pictures of them: measured, and not kept"
    make,number = kinds[name]
    fs = files(folder)
    def new(): return block(get_items=None, get_x=lambda o: PILImage.create(fs[number(o)]), get_y=lambda o: 'a')
    items = [make(k, f) for k,f in enumerate(fs)]
    check_ways(new, items)
    assert not entries(cache_home)

unprintable = dict(deep_list=(lambda k, f: deep_with(k), depth), repr=hiding('__repr__', '__str__'))

@pytest.mark.parametrize('name', unprintable)
def test_items_that_have_no_words(folder, cache_home, passes, name):
    "DataBlock writes them out, Datasets does not"
    (make,number),fs = unprintable[name],files(folder)
    items = [make(k, f) for k,f in enumerate(fs)]
    ds = Datasets(items, [[lambda o: PILImage.create(fs[number(o)])]])
    dls = ds.dataloaders(after_item=[Resize(12), ToTensor()], after_batch=[IntToFloatTensor()], **small)
    x = np.concatenate([b[0].double().numpy() for b in dls.train.new(shuffle=False, drop_last=False)])
    for kwargs in ({}, dict(cache=False)):
        c = dls.fit_stats(**own, **kwargs).stats_choice
        np.testing.assert_allclose([c.stats.mean, c.stats.std], [x.mean((0, 2, 3)), x.std((0, 2, 3))], atol=2e-6)
    assert len(passes)==2 and not entries(cache_home)

pixels = dict(
    image  = lambda f: PILImage.create(f),
    pil    = lambda f: Image.open(f),
    array  = lambda f: np.asarray(Image.open(f)),
    tensor = lambda f: torch.tensor(np.asarray(Image.open(f))))

@pytest.mark.slow
@pytest.mark.parametrize('name', pixels)
def test_items_that_are_pixels(folder, cache_home, passes, name):
    "Kept by value"
    def items(): return [pixels[name](f) for f in files(folder)]
    def as_picture(o): return PILImage.create(np.asarray(o))
    def new(): return block(get_items=None, get_x=as_picture, get_y=lambda o: 'a')
    check_ways(new, items())
    assert len(entries(cache_home))==1
    n = len(passes)
    new().fit_stats(items(), **own, **small)
    assert len(passes)==n
    change_all(folder)
    new().fit_stats(items(), **own, **small)
    assert len(passes)==n+1

columns = {'lists': [[1], [2]]*6, 'arrays': [np.ones(3)]*12, 'objects': [object()]*12,
           'no hash': [raising('__eq__', '__hash__')]*12,
           'mixed': [None, 1, 'a', 2.]*3}

@pytest.mark.slow
@pytest.mark.parametrize('name', columns)
def test_rows_of_any_kind(folder, name):
    df = pd.DataFrame(dict(file=list(map(str, files(folder))), c=columns[name]))
    check_ways(lambda: block(get_items=None, get_x=ColReader('file'), get_y=lambda r: 'a'), df)

# --- the parts

pairs = [(1, 2), (1, 1.), (1, True), ('a', b'a'), ([1], (1,)), (dict(a=1), dict(a=2)), ('a'*999, 'a'*998+'b'),
    (list(range(1000)), [*range(999), 0]), (Path('a'), Path('b')), (slice(1), slice(2)),
    (re.compile('a'), re.compile('b')),
    (datetime.date(2020, 1, 1), datetime.date(2020, 1, 2)),
    (datetime.datetime(2020, 1, 1), datetime.datetime(2020, 1, 1, 1)),
    (Decimal('1'), Decimal('2')), (Level.LUNG, Flags.A), (Pair(1, 2), Pair(1, 3)), (Slotted(), Slotted(1)),
    (np.zeros(3), np.ones(3)), (np.zeros(3), np.zeros(3, 'f')), (np.int64(1), np.int64(2)), (np.sqrt, np.abs),
    (torch.zeros(3), torch.ones(3)), (torch.tensor(2**24), torch.tensor(2**24+1)), (torch.float32, torch.float64),
    (torch.sqrt, torch.abs),
    (torch.tensor(0., dtype=torch.float64), torch.tensor(1e-60, dtype=torch.float64))]

@pytest.mark.parametrize('a, b', pairs, ids=lambda o: no_address(o)[:20])
def test_plain_values_are_told_apart(a, b):
    assert describe(a)==describe(deepcopy(a))!=describe(b) and value_keys([a])!=value_keys([b])

def test_words_are_the_same_in_any_order():
    assert describe(dict(a=1, b=2))==describe(dict(b=2, a=1)) and describe({1, 'a', None})==describe({None, 1, 'a'})

def test_digest_of_parts():
    assert len({digest('ab', 'c'), digest('a', 'bc'),
                digest('abc')})==3 and digest('a')==digest(b'a') and len(digest('\udcff'))==24

def test_names_that_are_in_no_encoding(tmp_path):
    "Names of files may be any bytes"
    root = image_folder(tmp_path/'i', n=12)
    try: files(root)[1].rename(root/'a'/os.fsdecode(b'\xff.png'))
    except OSError: pytest.skip('this file system has an encoding')
    first = fit(root)
    assert first.measured.n_images==9 and bits(fit(root))==bits(first)

def loader(items, *tfms, load=PILImage.create, bs=4):
    kwargs = dict(after_item=[ToTensor()], after_batch=[IntToFloatTensor(), *tfms], bs=bs, num_workers=0)
    return Datasets(items, [[load]]).dataloaders(**kwargs).train

def test_thumbnails(folder):
    "Against means of blocks, std and ends by numpy"
    fs = files(folder)
    seen = look(loader(fs), list(map(str, fs)))
    assert seen.keys==sorted(map(str, fs)) and seen.deterministic and seen.reproducible
    for f,got in zip(fs, seen.first):
        x = np.asarray(Image.open(f)).astype(np.float64).transpose(2, 0, 1)/255
        ends = np.stack([x.std((1, 2)), x.min((1, 2)), x.max((1, 2))], 1)
        want = np.concatenate([x.reshape(3, 8, 2, 8, 2).mean((2, 4)).reshape(3, 64), ends], 1)
        np.testing.assert_allclose(got, want, atol=1e-6)

def test_the_same_images_are_looked_at(tmp_path):
    "In another order, and most of them in another fold; each once where the list names it many times"
    fs = files(image_folder(tmp_path/'i', n=60))
    def keys(fs): return look(loader(fs), item_keys(loader(fs))[0]).keys
    assert keys(fs)==keys(fs[::-1])==keys(fs*3) and len(keys(fs))==16
    assert len(set(keys(fs)) & set(keys(fs[12:])))>=8

@pytest.mark.parametrize('shape', [(1, 5), (3, 7), (1, 4, 5), (2, 12, 9), (1, 3, 8, 9), (4, 10, 11, 12),
                                   (2, 3, 4, 5, 6)], ids=str)
def test_images_of_any_shape(shape):
    g = torch.Generator().manual_seed(0)
    xs = [TensorImage(torch.rand(shape, generator=g)) for _ in range(5)]
    def dl(f): return Datasets(range(5), [[lambda i: f(xs[i])]]).dataloaders(bs=2, num_workers=0).train
    a,b,c = (Fingerprint(dl(f)) for f in (lambda x: x, lambda x: x, lambda x: x*.99))
    assert a.look.agrees(b.look) and not a.look.agrees(c.look) and a.deterministic

def test_range_of_each_channel():
    """In thousands, below 1, in millionths: a change of a thousandth of its range is seen in each, one of a millionth
    in none"""
    g = torch.Generator().manual_seed(0)
    xs = [TensorImage(torch.rand(3, 16, 16, generator=g)*torch.tensor([1e4, 1, 1e-6]).view(3, 1, 1)) for _ in range(5)]
    def of(c=0, by=0.):
        def load(i):
            x = xs[i].clone()
            x[c] += by*(1e4, 1, 1e-6)[c]
            return x
        return look(Datasets(range(5), [[load]]).dataloaders(bs=2, num_workers=0).train)
    for c in range(3): assert of().agrees(of(c, 1e-6)) and not of().agrees(of(c, 1e-3)), c

def test_nan_and_infinite_pixels_are_compared():
    def of(v):
        def load(i):
            x = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(i))
            x[0, 0, :2] = torch.tensor(v)
            return TensorImage(x)
        return look(Datasets(range(5), [[load]]).dataloaders(bs=2, num_workers=0).train)
    nan,inf = float('nan'),float('inf')
    assert of([nan, 0]).agrees(of([nan, 0])) and of([inf, -inf]).agrees(of([inf, -inf]))
    for a,b in (([nan, 0], [0, 0]), ([inf, 0], [0, 0]), ([0, inf], [0, nan])): assert not of(a).agrees(of(b))

def test_images_of_several_sizes(tmp_path):
    sizes = [8, 12, 16, 20, 24]
    items = [np.random.default_rng(s).integers(0, 255, (s, s, 3), dtype=np.uint8) for s in sizes]
    seen = look(loader(items, bs=1))
    assert len(seen.first)==5 and seen.deterministic

def test_images_of_several_channels():
    items = [TensorImage(torch.rand(c, 8, 8, generator=torch.Generator().manual_seed(c))) for c in (1, 2, 3)]
    a,b = (look(Datasets(range(3), [[lambda i: items[i]*v]]).dataloaders(bs=1, num_workers=0).train) for v in (1., .99))
    assert a.agrees(a) and not a.agrees(b)

def test_a_look_leaves_random_states(folder):
    dl = block(batch_tfms=aug_transforms()).dataloaders(folder, **small).train
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    def states(): return random.getstate(),np.random.get_state()[1].tolist(),torch.get_rng_state().tolist()
    before = states()
    fp = Fingerprint(dl)
    assert not fp.look.deterministic and fp.look.reproducible and states()==before

def test_a_failing_look_is_the_pipelines_error(folder):
    files(folder)[1].write_bytes(b'no image')
    with pytest.raises(OSError, match=f'cannot read .*{files(folder)[1].name}'): fit(folder)

def test_rare_random_transforms_are_not_deterministic(folder):
    "Two looks may show no difference"
    dl = block(batch_tfms=Brightness(p=1e-9)).dataloaders(folder, **small).train
    fp = Fingerprint(dl)
    assert fp.look.deterministic and not fp.deterministic

collections = [[], [1, 2], np.zeros((3, 4, 4)), torch.zeros(3, 4, 4), pd.DataFrame(dict(a=[1, 2])), pd.Series([1, 2]),
               ('a', 'b'), range(3)]

@pytest.mark.parametrize('items', collections, ids=lambda o: type(o).__name__)
def test_keys_of_any_collection(items):
    keys,all_pixels = value_keys(items)
    assert len(keys)==len(items) and all(isinstance(k, str) for k in keys)
    assert all_pixels==(isinstance(items, (np.ndarray, torch.Tensor)) or not len(items))

def test_digests_of_pixels_are_long():
    "No two of 100,000 images share one by chance"
    assert len(value_keys([np.zeros((4, 4))])[0][0].split('#')[1])==24

def test_what_differs_is_said(folder, monkeypatch):
    def of(tol=0, **kwargs): return Fingerprint(block(**kwargs).dataloaders(folder, **small).train, tol=tol)
    before = of()
    before.look, before.settle()
    assert of().differs(before)==[]
    assert of(tol=.01).differs(before)==['how it is measured']
    assert of(item_tfms=Resize(13)).differs(before)==['transforms']
    assert of(splitter=IndexSplitter([0]), item_tfms=Resize(13)).differs(before)==['training items', 'transforms']
    change_all(folder)
    assert of().differs(before)==['training items']
    assert Look([], [], [], True).agrees(Look([], [], [], True))

# --- between processes

def set_world(here, gain, threads, bs, k):
    "What the cases of `in_phases.py` depend on"
    (here/'world.json').write_text(json.dumps(dict(gain=gain, threads=threads, bs=bs)))
    (here/'own_transforms.py').write_text(f'def half(x): return x*{gain}\ndef darker(x): return half(x)\n')
    (here/'config.py').write_text(f'gain = {gain}')
    (here/'colorsys.py').write_text(f'gain = {gain}')
    (here/'gain.txt').write_text(f'{gain}')
    np.save(here/'gain.npy', gain)
    with sqlite3.connect(here/'db') as db:
        for line in ('drop table if exists t', 'create table t (gain)',
                     f'insert into t values ({gain})'): db.execute(line)
    for o in here.glob('*.py'): os.utime(o, ns=(k*10**9, k*10**9))  # no bytecode of before is taken
    for f in files(here/'images'): np.save(f.with_suffix('.npy'), (np.asarray(Image.open(f))*gain).astype(np.uint8))

script = Path(__file__).parent/'in_phases.py'

def phase(here, seed, gain):
    "A process that measures all cases"
    path = os.pathsep.join([str(script.parent), *sys.path])
    env = {**os.environ, 'PYTHONHASHSEED': seed, 'GAIN': str(gain), 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path}
    return subprocess.Popen([sys.executable, str(script), str(here)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=env)

def told(process):
    "Passes and mean of each case, by name"
    out,err = process.communicate(timeout=600)
    assert process.returncode==0, err
    res = json.loads(out.splitlines()[-1])
    return {k: n for k,(n,_) in res.items()},{k: m for k,(_,m) in res.items()}

@pytest.mark.slow
def test_between_processes(folder):
    """All is used again by a second one, with other hashes, threads and batch sizes; nothing by a third, for which
    the world has changed"""
    here = folder.parent
    set_world(here, .5, 1, 4, 1)
    passes,first = told(phase(here, '1', .5))
    assert set(passes.values())=={1}
    set_world(here, .5, 2, 3, 1)
    passes,second = told(phase(here, '2', .5))
    assert {k for k,n in passes.items() if n}=={'ids'} and second==first
    set_world(here, .25, 1, 4, 2)
    (here/'lungs.png').write_text('')
    passes,third = told(phase(here, '3', .25))
    assert {k for k,n in passes.items() if not n}=={'nothing', 'random'}
    assert {k for k in third if third[k]==first[k]}=={'nothing', 'random', 'ids'}
