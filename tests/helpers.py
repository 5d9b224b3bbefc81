"Small image folders, made images, ledgers and measurements that several test files share"

import json,re,sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.data.block import CategoryBlock,DataBlock
from fastai.data.core import TfmdDL
from fastai.data.load import SkipItemException
from fastai.data.transforms import IndexSplitter,Normalize,parent_label
from fastai.torch_core import TensorImage
from fastai.vision.augment import Contrast,Resize,aug_transforms
from fastai.vision.data import ImageBlock
from fastcore.basics import chunked
from fastcore.foundation import L
from fasttransform import Transform
from PIL import Image

from fastai_normstats.measure import measure_stats
from fastai_normstats.models import IMAGENET
from fastai_normstats.moments import LEVELS
from fastai_normstats.running import POOLED,RunningStats
from fastai_normstats.values import NormStats

def random_image(rng, size=16, mode='RGB'):
    "A smooth image with some noise; brightness and contrast of its own, so that images differ as real ones do"
    coarse = rng.uniform(0, 1, (4, 4, 3)).astype(np.float32)
    big    = [np.asarray(Image.fromarray(coarse[...,c]).resize((size, size), Image.Resampling.BICUBIC))
              for c in range(3)]
    x = rng.uniform(.1, .5) + rng.uniform(.2, .5)*np.stack(big, -1)*(1, .8, .6) + rng.normal(0, .03, (size, size, 3))
    return Image.fromarray((x.clip(0, 1)*255).round().astype(np.uint8)).convert(mode)

def image_folder(root, n=24, size=16, classes=('a','b'), mode='RGB', seed=0):
    "Write `n` images in all, taking `classes` in turn, as root/class/NNN.png; returns `root`"
    root,rng = Path(root),np.random.default_rng(seed)
    for c in classes: (root/c).mkdir(parents=True, exist_ok=True)
    for i in range(n): random_image(rng, size, mode).save(root/classes[i%len(classes)]/f'{i:03}.png')
    return root

def png_files(path): return sorted(Path(path).rglob('*.png'))

def image_block(held_out, **kwargs):
    "A block over the image files of a folder, the indices `held_out` for validation"
    usual = dict(blocks=(ImageBlock, CategoryBlock), get_items=png_files, get_y=parent_label,
                 splitter=IndexSplitter(held_out), item_tfms=Resize(12))
    return DataBlock(**{**usual, **kwargs})

def fitted_choice(held_out, folder, pass_args={}, **kwargs):
    "A choice by a block that nobody used before"
    fit = dict(stats='custom', verbose=False, bs=4, num_workers=0)
    return image_block(held_out, **kwargs).fit_stats(folder, **{**fit, **pass_args}).stats_choice

def bits(choice): return json.dumps(choice.measured.to_dict()),choice.stats.mean,choice.stats.std

def cache_entries(cache_home): return sorted((cache_home/'fastai_normstats').glob('*'))

class Ready(TfmdDL):
    "A loader over images that are made a batch at a time: no file, no work an item"
    def create_batches(self, samples):
        for idxs in chunked(samples, self.bs): yield TensorImage(self.dataset.images(torch.tensor(idxs))),

class Greys:
    "`n` images of four pixels: a grey value of their own, whose spread is half of a pixel-std, and a texture"
    def __init__(self, n, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.grey     = torch.randn(n, 2, 1, 1, generator=g)*.1+torch.tensor([.4, .6]).view(2, 1, 1)
        self.contrast = torch.rand(n, 2, 1, 1, generator=g)*.2+.07
    def __len__(self): return len(self.grey)
    def __getitem__(self, i): raise AssertionError('an item was read one by one')
    def images(self, i): return self.grey[i]+self.contrast[i]*torch.tensor([-1., 1, 1, -1]).view(2, 2)

    @property
    def truth(self):
        "Mean and std of all images, float64, from the formula"
        g,c = self.grey.double().squeeze(),self.contrast.double().squeeze()
        return g.mean(0),(g.var(0, correction=0)+c.square().mean(0)).sqrt()

def no_address(o):
    "The name of a parametrised case: the same in every process, as workers that share the tests need it"
    return re.sub(r' at 0x[0-9a-f]+', '', str(o))

# --- images as a loader yields them

def pixels(files, size=12, mode='RGB'):
    "The files squished to `size` by PIL, in [0, 1]: (n, channels, size, size), float64"
    def one(f):
        a = np.asarray(Image.open(f).convert(mode).resize((size, size), Image.Resampling.BILINEAR),
                       dtype=np.float64)/255
        return a[None] if a.ndim==2 else a.transpose(2, 0, 1)
    return np.stack([one(f) for f in files])

def two_pass(x):
    "mean, pooled std and mean of image stds of images (n, channels, …)"
    x = np.asarray(x, dtype=np.float64).reshape(len(x), x.shape[1], -1)
    return x.mean((0, 2)),x.std((0, 2)),x.std(2).mean(0)

def refusal(f, *args, exc=ValueError, most=700, **kwargs):
    "The sentence, of less than `most` characters, that `f` refuses with"
    with pytest.raises(exc) as e: f(*args, **kwargs)
    said = str(e.value)
    assert '\n' not in said and len(said)<most, said
    return said

def close(got, want, rtol=1e-6):
    "Same shape and relative difference; `test_close` would pass over a missing channel"
    got,want = np.asarray(got, dtype=np.float64),np.asarray(want, dtype=np.float64)
    assert got.shape==want.shape, (got.shape, want.shape)
    np.testing.assert_allclose(got, want, rtol=rtol, atol=0)

def check_measured(measured, x, rtol=1e-6):
    assert measured.n_images==len(x)
    for got,want in zip((measured.mean, measured.std, measured.image_std), two_pass(x)): close(got, want, rtol)

def files_of(path): return sorted(path.rglob('*.png'))
def sorted_files(path): return L(files_of(path))

def block(splitter=None, size=12, item_tfms=(), batch_tfms=(), blocks=(ImageBlock, CategoryBlock), **kwargs):
    "Every fourth file is for validation, if nothing else is said; images are squished, which is no random transform"
    return DataBlock(blocks, get_items=sorted_files, get_y=parent_label, splitter=splitter
                     or IndexSplitter(range(0, 27, 4)),
                     item_tfms=[*item_tfms, Resize(size, method='squish')], batch_tfms=list(batch_tfms), **kwargs)

def train_files(path): return [f for i,f in enumerate(files_of(path)) if i%4]

quiet  = dict(verbose=False)
custom = dict(stats='custom', verbose=False)
small  = dict(bs=5, num_workers=0)

def by_loader(db, path, **kwargs): return measure_stats(db.dataloaders(path, **kwargs).train, **quiet)

def augs(): return [*aug_transforms(size=10, max_rotate=20, max_lighting=.4, p_affine=1., p_lighting=1.),
                    Contrast(.3, p=.5)]

def stats_tfm(dl): return next(f for f in dl.after_batch.fs if isinstance(f, Normalize))

def numbers(dl): return [o.flatten().tolist() for o in (stats_tfm(dl).mean, stats_tfm(dl).std)]

_opened = None
def _note(event, args):
    if _opened is not None and event=='open' and str(args[0]).endswith('.png'): _opened.append(Path(args[0]))

@cache
def _listen(): sys.addaudithook(_note)  # for as long as the process lives

@contextmanager
def opened():
    "Every .png that this process opens meanwhile, by whatever function"
    global _opened
    _listen()
    _opened = res = []
    try: yield res
    finally: _opened = None

class AddIn(Transform):
    "Adds to the images of one split"
    order = 20
    def __init__(self, by, split_idx): self.by,self.split_idx = by,split_idx
    def encodes(self, x:TensorImage): return x+self.by

class Slices:
    "Item `k` is a stack of slices, all of one value that says which: `sizes[k]` of them"
    def __init__(self, sizes, skip=()):
        self.sizes,self.skip = sizes,skip
        self.items = [f'volume{k}.nii' for k in range(len(sizes))]
    def __len__(self): return len(self.sizes)
    def __getitem__(self, k):
        if k in self.skip: raise SkipItemException()
        return TensorImage(torch.stack([torch.full((1, 3, 3), k+j/100) for j in range(self.sizes[k])])),
    def rows(self):
        kept = [k for k in range(len(self)) if k not in self.skip]
        return [(self.items[k], k+j/100) for k in kept for j in range(self.sizes[k])]

class EndToEnd(TfmdDL):
    "Batches in which the slices of several items follow each other"
    def create_batch(self, items): return TensorImage(torch.cat([o[0] for o in items])),

def family(f): return int(Path(f).stem)//3

def cluster_errors(x, groups):
    "Standard errors of mean and std (Cochran 1977, section 6), and the larger design effect, for images of one size"
    def se(t, total, codes):
        sums = np.array([t[codes==g].sum() for g in np.unique(codes)])
        return np.sqrt(len(sums)/(len(sums)-1)*(sums**2).sum())/total
    res = []
    for c in range(x.shape[1]):
        v = x[:,c].reshape(len(x), -1).astype(np.float64)
        m,s,n = v.mean(),v.std(),v.size
        def both(codes): return np.array([se((v-m).sum(1), n, codes), se(((v-m)**2-s**2).sum(1), n, codes)/(2*s)])
        own = both(np.asarray(groups))
        res.append((*own, (own/both(np.arange(len(x))))**2))
    return np.array([o[:2] for o in res]).T,np.array([o[2].max() for o in res])

# --- batches and ledgers

stat_names = ('mean', 'std', 'image_std', 'mean_se', 'std_se', 'image_std_se')

def images(n, *shape, seed=0, c=3):
    "A batch whose images differ in brightness and contrast, within [0, 1]"
    g = torch.Generator().manual_seed(seed)
    def rand(*s): return torch.rand(s, generator=g)
    dims = [1]*len(shape)
    return rand(n, c, *dims)*.5 + rand(n, c, *dims)*.5*rand(n, c, *shape)

def masks(x, seed=1):
    "A random mask with very different shares of the pixels from image to image, and none of the first image's"
    g = torch.Generator().manual_seed(seed)
    m = torch.rand(len(x), 1, *x.shape[2:], generator=g)<torch.rand(len(x), 1, *[1]*(x.ndim-2), generator=g)
    m[0] = False
    return m

def cochran(total, size, of):
    """Standard error of Σ`total`/Σ`size` (n, C) with the images of one group in `of` as one draw (Cochran 1977 §6),
    written out"""
    ratio,units = total.sum(0)/size.sum(0),list(dict.fromkeys(of))
    off = np.array([sum(total[i]-ratio*size[i] for i,g in enumerate(of) if g==u) for u in units])
    G = len(units)
    return np.sqrt(G/(G-1)*(off**2).sum(0))/size.sum(0) if G>1 else np.full(total.shape[1], np.nan)

def reference(batches, groups=None):
    """All statistics from the formulas, over all images at once: numpy, float64, two passes; images of different
    sizes, groups of different sizes"""
    ims  = [im.reshape(im.shape[0], -1) for b in batches for im in b.detach().cpu().to(torch.float64).numpy()]
    x,of = np.concatenate(ims, 1),range(len(ims)) if groups is None else groups
    mean,std = x.mean(1),x.std(1)
    w    = np.array([[im.shape[1]] for im in ims])
    s    = np.array([im.std(1) for im in ims])
    sums = np.array([im.sum(1) for im in ims])
    q    = np.array([((im-mean[:,None])**2).sum(1) for im in ims])
    return dict(mean=mean, std=std, image_std=s.mean(0), mean_se=cochran(sums, w, of), std_se=cochran(q, w, of)/(2*std),
                image_std_se=cochran(s, np.ones_like(w), of), min=x.min(1), max=x.max(1))

def run(batches, **kwargs):
    rs = RunningStats(**kwargs)
    for b in batches: rs.update(b)
    return rs

def check_ledger(rs, batches, rtol=None, names=stat_names):
    """Images over 1,024 pixels are summed in float32: half the 1e-6 that is promised, standard errors to 2e-6; in
    float64 all is right to 1e-9"""
    ref = reference(batches)
    if rtol is None: rtol = 5e-7 if max(b[0,0].numel() for b in batches)>1024 else 1e-9
    for k in names: close(getattr(rs, k), ref[k], 4*rtol if k.endswith('_se') else rtol)
    for k in ('min', 'max'): close(getattr(rs, k), ref[k], 0)

def state(rs):
    "Everything a ledger holds, to the bit, as a string that can be compared with a later one"
    rows = {k: [repr(o) for o in v] for k,v in rs.images.to_dict('list').items()}  # so that NaN equals NaN
    frame = [getattr(rs, k) for k in ('n_images', 'n_pixels', 'n_groups', 'n_channels', 'grouped', 'nonfinite',
        'complete', 'population', 'population_groups')]
    try: own = [rs.take([i]).quantile(LEVELS).tolist() for i in range(len(rs.images)) if rs.images.n_pixels[i]]
    except ValueError as e: own = str(e)
    return repr((rows, frame, own, rs.quantile(POOLED).tolist() if isinstance(own, list) and own else None))

def shares(v, x):
    "Share of the values `v` below `x`, and up to it"
    v = np.sort(np.ravel(v))
    return np.searchsorted(v, x, 'left')/len(v),np.searchsorted(v, x, 'right')/len(v)

# --- measurements for a choice

M,S  = (np.array(o) for o in IMAGENET)
xray = NormStats((.5, .5, .5), (.25, .25, .25), name='xray-net', domain='chest X-ray', source='its README')
half = NormStats((.5, .5, .5), (.5, .5, .5), name='half', domain='natural images')

def measured(mean=M, std=S, between=0., std_between=0., n=50, scale=1.):
    """`n` images, half of their pixels `std` above and half below a mean that lies `between` above and below `mean`
    in turn:
    image std is exactly `std`, pooled std √(std² + between²), SE of the mean between/√(n-1), of the image std
    std_between/√(n-1)"""
    def per_channel(o): return torch.as_tensor(np.broadcast_to(o, np.shape(mean)).copy()).double()
    mean,std,between,std_between = map(per_channel, (mean, std, between, std_between))
    sign = torch.tensor([1., -1]).double()
    turn = sign.repeat(n//2)[:,None]
    m,s  = mean+between*turn, std+std_between*turn.roll(n//2+1, 0)
    x = m[:,:,None] + s[:,:,None]*sign
    return RunningStats().update(x*scale)

def shifted(by=.5, **kwargs): return measured(mean=M+by*S, std=S*.7, **kwargs)

def with_z(z, kind, by=.2):
    "Measured statistics whose largest difference, `by` in channel 1, is `z` of its standard errors"
    one,unit = np.array([0, 1, 0]),abs(by)*np.sqrt(49)/z
    if kind=='mean': return measured(mean=M+by*S*one, between=unit*S*one, n=50)
    std = S*np.exp(by*one)
    return measured(std=std, std_between=unit*std*one, n=50)

one_channel = measured(mean=M[:1]+.3, std=S[:1])

def constant(v=.25):
    x = torch.rand(9, 3, 8, 8)
    x[:,1] = v
    return RunningStats().update(x)

def patients(sizes, alike=.7, seed=0, C=3):
    """Images (n, C, 8) of as many patients as `sizes`, whose share `alike` of the variance of the brightness is the
    patient's; and whose they are"""
    rng,owner = np.random.default_rng(seed),np.repeat(np.arange(len(sizes)), sizes)
    grey = .08*(alike**.5*rng.normal(size=(len(sizes), 1, 1))[owner]+(1-alike)**.5*rng.normal(size=(len(owner), 1, 1)))
    return (.3+grey+.1*rng.normal(size=(len(owner), C, 8))).clip(0, 1),[f'p{o}' for o in owner]

def ledger(x, groups=None, unit='patient'):
    m = RunningStats().update(torch.tensor(x), groups=groups)
    m.unit = unit
    return m

def part_of(m, population, population_groups):
    m.complete,m.population,m.population_groups = False,population,population_groups
    return m
