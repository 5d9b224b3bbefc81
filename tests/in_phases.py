"""What one process measures for `test_fingerprint.py`: `in_phases.py FOLDER` fits one block a case, each with a
cache of its own in FOLDER, and prints {case: [passes, mean]} as JSON. What the cases depend on lies in FOLDER, too
(`world.json`, side files, own modules), so that another process may find it changed."""

import functools,importlib,importlib.util,json,sqlite3,subprocess,sys,warnings
from os import getenv as g
from pathlib import Path

import numpy as np
import torch
from fastai.vision.all import (CategoryBlock,DataBlock,ImageBlock,IndexSplitter,PILImage,Resize,TensorImage,TfmdDL,
                               Transform,
                               aug_transforms,fa_collate)
from PIL import Image

import fastai_normstats.block
from fastai_normstats import transform

here = Path(sys.argv[1])
sys.path.insert(0, str(here))
import own_transforms
from own_transforms import darker

world = json.loads((here/'world.json').read_text())
torch.set_num_threads(world['threads'])
gain = world['gain']
images = sorted((here/'images').rglob('*.png'))
passes,real = [],transform.measure_stats

def counted(*args, **kwargs):
    passes.append(1)
    return real(*args, **kwargs)
transform.measure_stats = counted

class Apply(Transform):
    order = 50
    def __init__(self, f): self.f = f
    def encodes(self, x:TensorImage): return self.f(x)

class Settings: gain = world['gain']

class Named(Transform):
    order = 50
    def __init__(self, mat, do=True): self.mat,self.do = mat,do
    def encodes(self, x:TensorImage): return x*self.mat

class Private(Transform):
    order,__slots__ = 50,('_gain',)
    def __init__(self, by): self._gain = by
    def encodes(self, x:TensorImage): return x*self._gain

class Word(str): pass

def with_attribute(o):
    o.by = gain
    return Apply(lambda x: x*o.by)

def collate(b, by):
    x,y = fa_collate(b)
    return x//by,y

def read_by_another_program(x): return x*float(subprocess.check_output(['cat', str(here/'gain.txt')]))
def read_from_database(x):
    with sqlite3.connect(here/'db') as db: return x*db.execute('select gain from t').fetchone()[0]

def own_module_of_a_known_name():
    "A module of one's own that is called as one of Python's"
    spec = importlib.util.spec_from_file_location('colorsys', here/'colorsys.py')
    res = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(res)
    return res
colorsys = own_module_of_a_known_name()

def lungs(x): return x*.5 if (here/'lungs.png').exists() else x

def patched(owner, name):
    "`owner.name` does something else while this case is fitted, if the world says so"
    f = getattr(owner, name)
    if gain==.5: return {}
    def dim(*args, **kwargs):
        im = f(*args, **kwargs)
        im.load()
        return im.point(lambda v: v//2)
    return dict(patch=(owner, name, dim, f))

cases = dict(
    nothing     = {},
    random      = dict(batch_tfms=aug_transforms()),
    own_helper  = dict(batch_tfms=Apply(darker)),
    imported    = dict(batch_tfms=Apply(lambda x: importlib.import_module('own_transforms').darker(x))),
    a_global    = dict(batch_tfms=Apply(lambda x: x*gain)),
    globals     = dict(batch_tfms=Apply(lambda x: x*globals()['gain'])),
    a_class     = dict(batch_tfms=Apply(lambda x: x*Settings.gain)),
    environment = dict(batch_tfms=Apply(lambda x: x*float(g('GAIN')))),
    side_file   = dict(batch_tfms=Apply(lambda x: x*float(np.load(here/'gain.npy')))),
    text        = dict(batch_tfms=Apply(lambda x: x*float((here/'config.py').read_text().split('=')[1]))),
    database    = dict(batch_tfms=Apply(read_from_database)),
    program     = dict(batch_tfms=Apply(read_by_another_program)),
    a_name      = dict(batch_tfms=Apply(lambda x: x*colorsys.gain)),
    new_file    = dict(batch_tfms=Apply(lungs)),
    loader      = dict(dl_type=functools.partial(TfmdDL, create_batch=functools.partial(collate, by=int(1/gain)))),
    mat         = dict(batch_tfms=Named(gain)),
    private     = dict(batch_tfms=Private(gain)),
    of_str      = dict(batch_tfms=with_attribute(Word('a'))),
    of_tensor   = dict(batch_tfms=with_attribute(torch.zeros(3).as_subclass(TensorImage))),
    mask        = dict(mask=lambda x: x[:, :1]>gain),
    open        = patched(Image, 'open'),
    convert     = patched(Image.Image, 'convert'),
    sibling     = dict(get_x=lambda p: PILImage.create(np.load(p.with_suffix('.npy')))),
    ids         = dict(items=list(range(12)), get_x=lambda i: PILImage.create(images[i])))

def fitted(cache, items=images, dl_type=None, mask=None, patch=None, **kwargs):
    "Passes that it took to fit a block, and its mean"
    n = len(passes)
    split = IndexSplitter(range(0, 12, 4))
    db = DataBlock((ImageBlock, CategoryBlock), get_y=lambda o: 'a', splitter=split, item_tfms=Resize(12), **kwargs)
    own = dict(stats='custom', verbose=False, cache=cache, mask=mask)
    if dl_type: own['dl_type'] = dl_type
    if patch: setattr(*patch[:3])
    try: db.fit_stats(items, **own, bs=world['bs'], num_workers=0)
    finally:
        if patch: setattr(*patch[:2], patch[3])
    return len(passes)-n, [v.hex() for v in db.stats_choice.stats.mean]

if __name__=='__main__':
    warnings.simplefilter('ignore')
    print(json.dumps({k: fitted(here/'cache'/k, **kwargs) for k,kwargs in cases.items()}))
