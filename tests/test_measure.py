"""What a fit measures, opens and leaves behind: exact numbers, training files only, each fold its own, no random
state touched"""

import math,random,sys,warnings
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.data import PartialDL,WeightedDL
import fastai.callback.progress
from fastai.data.all import (CategoryBlock,Categorize,ColReader,DataBlock,DataLoaders,Datasets,GrandparentSplitter,
    IndexSplitter,IntToFloatTensor,L,Normalize,RandomSplitter,SkipItemException,TfmdDL,TfmdLists,ToTensor,Transform,
    TransformBlock,fastuple,noop,parent_label)
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorImage,set_seed
from fastai.vision.augment import (Brightness,Contrast,CropPad,Dihedral,Flip,Hue,RandomCrop,RandomErasing,
    RandomResizedCrop,RandomResizedCropGPU,Resize,Rotate,Saturation,Warp,Zoom,aug_transforms)
from fastai.vision.core import PILImage,PILImageBW,imagenet_stats
from fastai.vision.data import ImageBlock
from helpers import Greys,Ready,image_folder,no_address,random_image
from PIL import Image
from scipy.stats import t as student
from torch import nn

import fastai_normstats.block
from fastai_normstats import cli
from fastai_normstats.fingerprint import n_looked_at
from fastai_normstats.loaders import as_validation
from fastai_normstats.measure import is_augmented,measure_stats
from fastai_normstats.transform import DatasetStats

# --- independent references

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

def close(got, want, rtol=1e-6):
    got,want = np.asarray(got, dtype=np.float64),np.asarray(want)
    assert got.shape==want.shape
    np.testing.assert_allclose(got, want, rtol=rtol)

def check(measured, x, rtol=1e-6):
    assert measured.n_images==len(x)
    for got,want in zip((measured.mean, measured.std, measured.image_std), two_pass(x)): close(got, want, rtol)

# --- pipelines

@pytest.fixture
def folder(tmp_path): return image_folder(tmp_path/'images', n=27)

def files_of(path): return sorted(path.rglob('*.png'))
def sorted_files(path): return L(files_of(path))

def block(splitter=None, size=12, item_tfms=(), batch_tfms=(), blocks=(ImageBlock, CategoryBlock), **kwargs):
    "Every fourth file is for validation, if nothing else is said; images are squished, which is no random transform"
    return DataBlock(blocks, get_items=sorted_files, get_y=parent_label, splitter=splitter
                     or IndexSplitter(range(0, 27, 4)),
                     item_tfms=[*item_tfms, Resize(size, method='squish')], batch_tfms=list(batch_tfms), **kwargs)

def train_files(path): return [f for i,f in enumerate(files_of(path)) if i%4]
def valid_files(path): return files_of(path)[::4]

quiet  = dict(verbose=False)
custom = dict(stats='custom', verbose=False)
small  = dict(bs=5, num_workers=0)

class Record(Transform):
    "Keeps what passes just before Normalize, or after it"
    def __init__(self, order=98): self.order,self.seen = order,[]
    def encodes(self, x:TensorImage):
        self.seen.append(x.detach().cpu().clone())
        return x

def augs(): return [*aug_transforms(size=10, max_rotate=20, max_lighting=.4, p_affine=1., p_lighting=1.),
                    Contrast(.3, p=.5)]

def stats_tfm(dl): return next(f for f in dl.after_batch.fs if isinstance(f, Normalize))

def numbers(dl): return [o.flatten().tolist() for o in (stats_tfm(dl).mean, stats_tfm(dl).std)]

_opened = None
def _note(event, args):
    if _opened is not None and event=='open' and str(args[0]).endswith('.png'): _opened.append(Path(args[0]))
sys.addaudithook(_note)

@contextmanager
def opened():
    "Every .png that this process opens meanwhile, by whatever function"
    global _opened
    _opened = res = []
    try: yield res
    finally: _opened = None

# --- exact

def by_loader(db, path, **kwargs): return measure_stats(db.dataloaders(path, **kwargs).train, **quiet)
def by_block(db, path, **kwargs):  return db.fit_stats(path, **custom, **kwargs).stats_choice.measured
def by_dls(db, path, **kwargs):    return db.dataloaders(path, **kwargs).fit_stats(**custom).stats_choice.measured
def by_setup(db, path, **kwargs):
    db.batch_tfms = L(*db.batch_tfms, DatasetStats(**custom))
    return db.dataloaders(path, **kwargs).stats_choice.measured

ways = pytest.mark.parametrize('way', [by_loader, by_block, by_dls, by_setup], ids=lambda f: f.__name__)

@ways
@pytest.mark.parametrize('num_workers', [0, 2])
def test_exact(folder, way, num_workers):
    "The training files in float64, the last, shorter batch included"
    check(way(block(), folder, bs=6, num_workers=num_workers), pixels(train_files(folder)))

@ways
def test_exact_after_augmentation(folder, way, monkeypatch):
    "What passed just before Normalize during the pass: not the pictures that the fingerprint or fastai look at"
    rec,of_pass = Record(),[]
    def recorded(*args, **kwargs):
        start = len(rec.seen)
        res = measure_stats(*args, **kwargs)
        of_pass.extend(rec.seen[start:])
        return res
    monkeypatch.setattr('fastai_normstats.transform.measure_stats', recorded)
    m = way(block(item_tfms=[RandomResizedCrop(14, min_scale=.5)], batch_tfms=[*augs(), rec]), folder, **small)
    seen = torch.cat(rec.seen if way is by_loader else of_pass).double().numpy()
    files = train_files(folder)
    seen = seen[-len(files):] if way is by_loader else seen
    assert seen.shape==(len(files), 3, 10, 10) and np.abs(seen.mean()/pixels(files).mean()-1)>1e-3
    check(m, seen)

def test_installed_numbers_are_the_measured_ones(folder):
    "One float32 rounding apart, in every loader"
    mean,std,_ = two_pass(pixels(train_files(folder)))
    fitted,later = block().fit_stats(folder, **custom, **small).dataloaders(folder, **small), \
        block().dataloaders(folder, **small)
    for dls in (fitted, later.fit_stats(**custom)):
        for dl in (*dls.loaders, dls.test_dl(valid_files(folder))):
            for got,want in zip(numbers(dl), (mean, std)): close(got, want, 2e-7)

def test_batches_come_out_normalised(folder):
    "The point of it all: mean 0 and std 1 over the training split"
    dls = block().fit_stats(folder, **custom, **small).dataloaders(folder, drop_last=False, **small)
    x = torch.cat([b[0] for b in dls.train]).double().cpu()
    assert x.mean((0, 2, 3)).abs().max()<1e-5 and (x.std((0, 2, 3), correction=0)-1).abs().max()<1e-5

class AddIn(Transform):
    "Adds to the images of one split"
    order = 20
    def __init__(self, by, split_idx): self.by,self.split_idx = by,split_idx
    def encodes(self, x:TensorImage): return x+self.by

class AddInOther(AddIn): "Of another class: a DataBlock keeps one transform of each"

@ways
def test_transforms_of_the_training_split_only(folder, way):
    m = way(block(batch_tfms=[AddIn(.25, 0), AddInOther(100, 1)]), folder, **small)
    check(m, pixels(train_files(folder))+.25)

@ways
def test_nothing_after_normalize(folder, way):
    "Neither RandomErasing's noise nor any later transform is measured, or run"
    rec = Record(order=101)
    m = way(block(batch_tfms=[RandomErasing(p=1., sh=.5), rec]), folder, **small)
    check(m, pixels(train_files(folder)))
    assert len(rec.seen)<=1  # fastai looks at one item when it makes the validation loader

@pytest.mark.parametrize('way', [by_loader, by_block, by_dls], ids=lambda f: f.__name__)
@pytest.mark.parametrize('order', [99, 50])
def test_normalize_that_is_there_is_left_out(folder, way, order):
    norm = Normalize.from_stats(*imagenet_stats)
    norm.order = order
    m = way(block(batch_tfms=[norm]), folder, **small)
    check(m, pixels(train_files(folder)))

def test_fit_replaces_normalize(folder):
    "Not both of them: that would normalise twice"
    for old in (Normalize.from_stats(*imagenet_stats), Normalize(), DatasetStats(stats='imagenet', **quiet)):
        db,dls = block(batch_tfms=[old]),block(batch_tfms=[old]).dataloaders(folder, **small)
        for dls in (db.fit_stats(folder, **custom, **small).dataloaders(folder, **small), dls.fit_stats(**custom),
                    dls.fit_stats(**custom)):
            for dl in dls.loaders: assert [type(f) for f in dl.after_batch.fs
                                           if isinstance(f, Normalize)]==[DatasetStats]
            close(numbers(dls.train)[0], two_pass(pixels(train_files(folder)))[0])

def test_image_targets_are_not_measured(folder):
    "The target is the inverted image; fastai's Normalize acts on it too, but the model does not see it"
    def inverted(f): return PILImage(Image.fromarray(255-np.asarray(Image.open(f))))
    db = DataBlock((ImageBlock, ImageBlock), get_items=sorted_files, get_y=inverted,
        splitter=IndexSplitter(range(0, 27, 4)), item_tfms=Resize(12, method='squish'))
    check(by_loader(db, folder, **small), pixels(train_files(folder)))

def test_both_of_two_image_inputs_are_measured(folder):
    def inverted(f): return PILImage(Image.fromarray(255-np.asarray(Image.open(f))))
    db = DataBlock((ImageBlock, ImageBlock, CategoryBlock), get_items=sorted_files, get_x=[noop, inverted],
                   get_y=parent_label, n_inp=2,
                   splitter=IndexSplitter(range(0, 27, 4)), item_tfms=Resize(12, method='squish'))
    def squish(f): return np.asarray(inverted(f).resize((12, 12), Image.Resampling.BILINEAR)).transpose(2, 0, 1)/255.
    check(by_loader(db, folder, **small),
          np.concatenate([pixels(train_files(folder)), [squish(f) for f in train_files(folder)]]))

def test_images_of_different_sizes_one_by_one(tmp_path):
    "With a batch size of 1 nothing has to be resized: pixels are what is weighed"
    rng = np.random.default_rng(0)
    for i,s in enumerate((8, 13, 20, 9, 30)): random_image(rng, s).save(tmp_path/f'{i}.png')
    db = DataBlock(ImageBlock, n_inp=1, get_items=sorted_files, splitter=IndexSplitter([2]))
    dl = db.dataloaders(tmp_path, bs=1, num_workers=0).train
    m  = measure_stats(dl, **quiet)
    assert m.image_size is measure_stats(dl, known=m.take([0, 2]), **quiet).image_size is None
    assert measure_stats(dl, max_images=1, **quiet).image_size is not None
    x  = [np.asarray(Image.open(f), dtype=np.float64).reshape(-1, 3)/255 for i,f in enumerate(files_of(tmp_path))
          if i!=2]
    close(m.mean, np.concatenate(x).mean(0)), close(m.std, np.concatenate(x).std(0)), \
        close(m.image_std, np.mean([o.std(0) for o in x], 0))

# --- each training image once

def plain(ds, **kwargs):    return ds.dataloaders(**kwargs)
def dropping(ds, **kwargs): return ds.dataloaders(drop_last=True, **{**kwargs, 'bs': 64})
def unshuffled(ds, **kwargs): return ds.dataloaders(shuffle=False, **kwargs)
def weighted(ds, **kwargs): return ds.weighted_dataloaders(np.arange(20.)**3, **kwargs)
def partial_(ds, **kwargs): return ds.partial_dataloaders(partial_n=4, **kwargs)

@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('make', [plain, dropping, unshuffled, weighted, partial_])
def test_each_image_once(folder, make, num_workers):
    "Whatever the loader does in training: drops, draws again, takes a part"
    dls = make(block().datasets(folder), bs=6, num_workers=num_workers,
        after_item=[Resize(12, method='squish'), ToTensor], after_batch=[IntToFloatTensor])
    assert type(dls.train) is {weighted: WeightedDL, partial_: PartialDL}.get(make, TfmdDL)
    with opened() as names: m = measure_stats(dls.train, **quiet)
    if not num_workers: assert Counter(names)==Counter(train_files(folder))
    check(m, pixels(train_files(folder)))

def test_each_of_n_images_once(folder):
    "`n=` is a training set of the first `n` items"
    dls = block().dataloaders(folder, n=7, **small)
    with opened() as names: m = measure_stats(dls.train, **quiet)
    assert Counter(names)==Counter(train_files(folder)[:7])
    check(m, pixels(train_files(folder)[:7]))

@pytest.mark.parametrize('make', [weighted, partial_])
def test_loader_types_train_on_with_their_statistics(folder, make):
    dls = make(block().datasets(folder), after_item=[Resize(12, method='squish'), ToTensor],
        after_batch=[IntToFloatTensor, DatasetStats(**custom)], **small)
    mean,std,_ = two_pass(pixels(train_files(folder)))
    for dl in dls.loaders: close(numbers(dl)[0], mean), close(numbers(dl)[1], std)
    for b in dls.train: assert b[0].abs().max()<10

def test_order_is_random_but_seeded(folder):
    "A prefix of the pass is a random sample"
    dls,orders = block().dataloaders(folder, **small),[]
    for seed in (0, 0, 1):
        with opened() as names: measure_stats(dls.train, seed=seed, **quiet)
        orders.append(list(names))
    assert orders[0]==orders[1]!=orders[2] and orders[0]!=train_files(folder)

# --- only the training split is opened

@ways
def test_no_validation_file_is_opened(folder, way):
    with opened() as names: way(block(), folder, **small)
    assert set(names)==set(train_files(folder))

def test_no_validation_file_is_opened_by_the_command(folder, monkeypatch, capsys):
    monkeypatch.setattr(cli, '_workers', lambda: 0)
    (folder/'a').rename(folder/'train')
    with opened() as names: assert cli.main(['fit', str(folder), '--train-folder', 'train', '--size', '12'])==0
    assert set(names)==set((folder/'train').iterdir())
    with opened() as names: assert cli.main(['fit', str(folder), '--valid-pct', '.5', '--size', '12'])==0
    assert len(set(names))==14

@pytest.mark.parametrize('splitter', [RandomSplitter(), RandomSplitter(seed=3), GrandparentSplitter, None],
    ids=['unseeded', 'seeded', 'folders', 'default'])
def test_trains_on_what_was_measured(folder, tmp_path, passes, splitter):
    """Also with an unseeded RandomSplitter; without a second pass, but for a look at 16 images and the one that
    fastai opens"""
    if splitter is GrandparentSplitter:
        image_folder(folder/'train', n=9), image_folder(folder/'valid', n=6)
        splitter = GrandparentSplitter()
    db = DataBlock((ImageBlock, CategoryBlock), get_items=sorted_files, get_y=parent_label, splitter=splitter,
        item_tfms=Resize(12, method='squish'))
    with opened() as names: db.fit_stats(folder, **custom, **small)
    first = set(names)
    for _ in range(3):
        with opened() as names: dls = db.dataloaders(folder, **small)
        assert set(dls.train_ds.items)==first and not first & set(dls.valid_ds.items)
        assert len(set(names))<=n_looked_at+1 and not set(names) & set(dls.valid_ds.items) and len(passes)==1
    check(dls.stats_choice.measured, pixels(sorted(first)))

# --- folds

@pytest.fixture
def folds(tmp_path):
    "Images that get brighter with their number, and two training splits of them"
    rng,path = np.random.default_rng(0),tmp_path/'images'
    for c in 'ab': (path/c).mkdir(parents=True)
    for i in range(24):
        a = np.asarray(random_image(rng)).astype(float)*(.3+.7*i/24)
        Image.fromarray(a.astype(np.uint8)).save(path/'ab'[i%2]/f'{i:03}.png')
    fs = sorted(files_of(path), key=lambda f: f.name)
    return path,(fs[:10], fs[12:])

def dsets(fold):
    "A dataset with the training files `fold`, made without a DataBlock"
    fs = sorted(fold[0].parent.parent.rglob('*.png'))
    return Datasets(fs, [[PILImage.create], [parent_label, Categorize(['a', 'b'])]],
        splits=([fs.index(f) for f in fold], [i for i,f in enumerate(fs) if f not in fold]))

tfms_kw = dict(after_item=[Resize(12, method='squish'), ToTensor()])

def loaders_of_block(stats):
    db = block(batch_tfms=[stats])
    def make(fold):
        fs = files_of(fold[0].parent.parent)
        db.splitter = IndexSplitter([i for i,f in enumerate(fs) if f not in fold])
        return db.dataloaders(fold[0].parent.parent, drop_last=False, **small)
    return make

def loaders_of_list(stats):
    tfms = [IntToFloatTensor(), stats]
    return lambda fold: dsets(fold).dataloaders(after_batch=tfms, drop_last=False, **small, **tfms_kw)

def loaders_from_dsets(stats):
    tfms = [IntToFloatTensor(), stats]
    return lambda fold: DataLoaders.from_dsets(dsets(fold).train, dsets(fold).valid, after_batch=tfms, drop_last=False,
                                               **small, **tfms_kw)

def loaders_by_hand(stats):
    tfms = [IntToFloatTensor(), stats]
    def make(fold):
        ds,kw = dsets(fold),dict(after_batch=tfms, **small, **tfms_kw)
        return DataLoaders(TfmdDL(ds.train, shuffle=True, **kw), TfmdDL(ds.valid, **kw))
    return make

def loaders_of_fitted_block(stats):
    "`fit_stats` before each fold"
    db = block()
    def make(fold):
        path = fold[0].parent.parent
        fs = files_of(path)
        db.splitter = IndexSplitter([i for i,f in enumerate(fs) if f not in fold])
        return db.fit_stats(path, **custom, **small).dataloaders(path, drop_last=False, **small)
    return make

def assert_own(dls, fold):
    "Train, validation and test loaders, and loaders made from them, give (x - mean)/std with the numbers of `fold`"
    mean,std,_ = (o[:,None,None] for o in two_pass(pixels(fold)))
    x = torch.cat([b[0] for b in dls.train]).double().cpu().numpy()
    assert x.shape[0]==len(fold)
    for got,want in zip(two_pass(x)[:2], (0, 1)): np.testing.assert_allclose(got, want, atol=1e-5)
    train,test = dls.train.new(shuffle=False),dls.test_dl(fold[:7])
    for dl in (train, train.new(), dls.valid, dls.valid.new(), test, test.new()):
        got = np.concatenate([b[0].double().cpu().numpy() for b in dl])
        np.testing.assert_allclose(got, (pixels(dl.items)-mean)/std, atol=1e-5)

makers = pytest.mark.parametrize('maker', [loaders_of_block, loaders_of_list, loaders_from_dsets, loaders_by_hand,
                                           loaders_of_fitted_block],
                                 ids=lambda f: f.__name__)

@pytest.mark.slow
@makers
def test_each_fold_keeps_its_own(folds, passes, maker):
    _,(a, b) = folds
    make = maker(DatasetStats(**custom))
    first = make(a)
    assert_own(first, a)
    second = make(b)
    assert_own(second, b), assert_own(first, a)
    assert len(passes)==2
    third = make(a)
    assert_own(third, a), assert_own(second, b), assert_own(first, a)
    assert first.stats_choice.measured.n_images==len(a) and second.stats_choice.measured.n_images==len(b)

@pytest.mark.slow
@makers
def test_folds_used_only_later(folds, maker):
    "Both are made before either is iterated"
    make = maker(DatasetStats(**custom))
    all_dls = [make(f) for f in folds[1]]
    for dls,f in zip(all_dls, folds[1]): assert_own(dls, f)

@pytest.mark.parametrize('maker', [loaders_of_block, loaders_of_list, loaders_from_dsets, loaders_by_hand],
                         ids=lambda f: f.__name__)
def test_same_split_is_measured_once(folds, passes, maker):
    _,(a, b) = folds
    make = maker(DatasetStats(**custom))
    assert_own(make(a), a), assert_own(make(a), a), assert_own(make(a), a)
    assert len(passes)==1

def test_dls_fit_leaves_other_loaders_alone(folds):
    "Two loaders that share a list of transforms; one of them is fitted"
    _,(a, b) = folds
    tfms = [IntToFloatTensor(), Normalize.from_stats(*imagenet_stats)]
    first,second = (dsets(f).dataloaders(after_batch=tfms, **small, **tfms_kw) for f in (a, b))
    first.fit_stats(**custom)
    for dl in second.loaders: close(numbers(dl), [*imagenet_stats], 1e-6)
    assert second.stats_choice is None and len(tfms)==2 and type(tfms[1]) is Normalize

# --- measured again, where something changed

class Gain(Transform):
    order = 20
    def __init__(self, by): self.by = by
    def encodes(self, x:TensorImage): return x*self.by

class Curve(Transform):
    "Keeps what it was given under another name"
    order = 20
    def __init__(self, by): self.lut = 1/by
    def encodes(self, x:TensorImage): return x**self.lut

def scaled(by):
    def f(x:TensorImage): return x*by
    return f

changes = dict(flip=(Flip(p=.5), Flip(p=1.)), rotate=(Rotate(10, p=1.), Rotate(30, p=1.)),
    zoom=(Zoom(1.1, 1.2, p=1.), Zoom(1.1, 1.9, p=1.)),
    warp=(Warp(.2, p=1.), Warp(.5, p=1.)), brightness=(Brightness(.2, p=1.), Brightness(.5, p=1.)),
    contrast=(Contrast(.2, p=1.), Contrast(.5, p=1.)),
    saturation=(Saturation(.2, p=1.), Saturation(.5, p=1.)), hue=(Hue(.1, p=1.), Hue(.3, p=1.)),
    dihedral=(Dihedral(p=1., draw=1), Dihedral(p=1., draw=3)),
    crop=(RandomResizedCropGPU(8, min_scale=.3), RandomResizedCropGPU(8, min_scale=.9)), gain=(Gain(1.), Gain(2.)),
    curve=(Curve(2.), Curve(3.)),
    closure=(scaled(1.), scaled(2.)), kind=(Flip(p=.5), Rotate(10, p=1.)), added=([], Gain(2.)),
    split=(AddIn(.1, 0), AddIn(.1, 1)))

@pytest.mark.slow
@pytest.mark.parametrize('pair', changes.values(), ids=changes)
def test_other_batch_transform(folder, passes, pair):
    stats,ds = DatasetStats(**custom),block().datasets(folder)
    for tfm in (*pair, pair[0]):
        ref = measure_stats(ds.dataloaders(after_batch=[IntToFloatTensor(), *L(tfm)], **small, **tfms_kw).train,
                            **quiet)
        dls = ds.dataloaders(after_batch=[IntToFloatTensor(), *L(tfm), stats], **small, **tfms_kw)
        assert dls.stats_choice.measured==ref.measured()
    assert len(passes)==2  # the first is known again

items_changes = dict(size=(Resize(12), Resize(8)), method=(Resize(12, method='squish'), Resize(12, method='pad')),
    pad=(Resize((12, 20), method='pad'), Resize((12, 20), method='pad', pad_mode='zeros')),
    scale=(RandomResizedCrop(12, min_scale=.1), RandomResizedCrop(12, min_scale=.9)),
    crop=(RandomCrop(12), CropPad(12)))

@pytest.mark.slow
@pytest.mark.parametrize('pair', items_changes.values(), ids=items_changes)
def test_other_item_transform(folder, passes, pair):
    stats,ds = DatasetStats(**custom),block().datasets(folder)
    for tfm in pair:
        ref = measure_stats(ds.dataloaders(after_item=[tfm, ToTensor()], after_batch=[IntToFloatTensor()],
                                           **small).train, **quiet)
        dls = ds.dataloaders(after_item=[tfm, ToTensor()], after_batch=[IntToFloatTensor(), stats], **small)
        assert dls.stats_choice.measured==ref.measured()
    assert len(passes)==2

def test_parameter_of_a_transform_changed_in_place(folder, passes):
    "The very same object, now with another parameter"
    gain = Gain(1.)
    db = block(batch_tfms=[gain, DatasetStats(**custom)])
    one = db.dataloaders(folder, **small).stats_choice.measured.mean
    gain.by = 2.
    close(db.dataloaders(folder, **small).stats_choice.measured.mean, 2*one)
    assert len(passes)==2

class Stateful(Transform):
    "Takes no argument: its parameter is an attribute"
    order,by = 20,1.
    def encodes(self, x:TensorImage): return x*self.by

class StatefulInit(Stateful):
    def __init__(self): self.by = 1.

_by = 1.
def by_global(x:TensorImage): return x*_by
def by_other_function(x:TensorImage): return times(x)
def times(x): return x

def by_list(box):
    def f(x:TensorImage): return x*box[0]
    return f

def _set_attribute():       tfm = StatefulInit(); return tfm,lambda m: setattr(tfm, 'by', 2.)
def _set_renamed():         tfm = Curve(1.);      return tfm,lambda m: setattr(tfm, 'lut', .5)
def _set_class_attribute(): return Stateful(),lambda m: m.setattr(Stateful, 'by', 2.)
def _set_list():            box = [1.]; return by_list(box),lambda m: box.append(box.pop()*2)
def _set_global():          return by_global,lambda m: m.setattr(sys.modules[__name__], '_by', 2.)
def _redefine():            return by_other_function,lambda m: m.setattr(sys.modules[__name__], 'times', lambda x: x*2.)

@pytest.mark.slow
@pytest.mark.parametrize('make', [_set_attribute, _set_renamed, _set_class_attribute, _set_list, _set_global,
                                  _redefine],
    ids=lambda f: f.__name__[1:])
def test_transform_changed_in_place(folder, passes, monkeypatch, make):
    "The very same object does something else now, as after a notebook cell was edited and run again"
    tfm,change = make()
    db = block(batch_tfms=[tfm, DatasetStats(**custom)])
    for _ in range(2): check(db.dataloaders(folder, **small).stats_choice.measured, pixels(train_files(folder)))
    assert len(passes)==1
    change(monkeypatch)
    want = np.sqrt(pixels(train_files(folder))) if make is _set_renamed else 2*pixels(train_files(folder))
    check(db.dataloaders(folder, **small).stats_choice.measured, want)
    assert len(passes)==2

def test_augmentation_that_a_validation_batch_went_through(folder, passes):
    "fastai's affine transforms take over the `split_idx` of each batch"
    db = block(batch_tfms=aug_transforms()).fit_stats(folder, **custom, **small)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        for _ in range(2): db.dataloaders(folder, **small).valid.one_batch()
    assert len(passes)==1

def test_other_loading_function(folder, passes):
    stats = DatasetStats(**custom)
    for cls,mode in ((PILImage, 'RGB'), (PILImageBW, 'L')):
        dls = block(blocks=(ImageBlock(cls), CategoryBlock), batch_tfms=[stats]).dataloaders(folder, **small)
        close(dls.stats_choice.measured.mean, two_pass(pixels(train_files(folder), mode=mode))[0], 2e-3)
    assert len(passes)==2

def test_other_file_content(folder, passes):
    db = block(batch_tfms=[DatasetStats(**custom)])
    db.dataloaders(folder, **small)
    random_image(np.random.default_rng(9)).save(valid_files(folder)[0])
    db.dataloaders(folder, **small)
    assert len(passes)==1  # validation files do not matter
    random_image(np.random.default_rng(9), mode='L').save(train_files(folder)[0])
    check(db.dataloaders(folder, **small).stats_choice.measured, pixels(train_files(folder)))
    assert len(passes)==2

def test_other_transform_after_normalize_does_not_matter(folder, passes):
    stats,ds = DatasetStats(**custom),block().datasets(folder)
    for p in (.1, .9): ds.dataloaders(after_batch=[IntToFloatTensor(), stats, RandomErasing(p=p)], **small, **tfms_kw)
    assert len(passes)==1

def changed_splitter(db, path):
    db.splitter = IndexSplitter(range(0, 27, 3)); return [f for i,f in enumerate(files_of(path)) if i%3]
def changed_items(db, path):
    random_image(np.random.default_rng(1)).save(path/'b'/'zz.png')
    return [f for i,f in enumerate(files_of(path)) if i not in range(0, 27, 4)]
def changed_item_tfms(db, path): db.item_tfms = L(Gain255(.5), *db.item_tfms); return train_files(path)

class Gain255(Transform):
    "Darkens the decoded image"
    def __init__(self, by): self.by = by
    def encodes(self, x:PILImage): return PILImage(Image.fromarray((np.asarray(x)*self.by).astype(np.uint8)))

@pytest.mark.parametrize('change', [changed_splitter, changed_items, changed_item_tfms])
def test_change_after_fit_is_measured_and_said(folder, passes, change):
    db = block().fit_stats(folder, **custom, **small)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        db.dataloaders(folder, **small)
    want = change(db, folder)
    with pytest.warns(UserWarning, match='measured again'): dls = db.dataloaders(folder, **small)
    assert len(passes)==2 and dls.stats_choice.measured.n_images==len(want)
    if change is not changed_item_tfms: check(dls.stats_choice.measured, pixels(want))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        db.dataloaders(folder, **small)
    assert len(passes)==2

def test_other_source_after_fit(folder, tmp_path, passes):
    other = image_folder(tmp_path/'other', n=27, seed=5)
    db = block().fit_stats(folder, **custom, **small)
    with pytest.warns(UserWarning, match='measured again'): dls = db.dataloaders(other, **small)
    check(dls.stats_choice.measured, pixels(train_files(other)))

# --- random states

def states():
    return random.getstate(),np.random.get_state()[1].tolist(),np.random.get_state()[2:],torch.get_rng_state().tolist()

def seeded_run(make, seed=42, epochs=2):
    "The batches of a seeded run, and the random states at its end"
    set_seed(seed)
    dls = make()
    res = [o for _ in range(epochs) for b in dls.train for o in b]+[o for b in dls.valid for o in b]
    return [o.cpu() for o in res],states(),list(dls.train.items)

def same(a, b):
    assert a[2]==b[2] and len(a[0])==len(b[0])
    for x,y in zip(a[0], b[0]): assert torch.equal(x, y)
    assert a[1]==b[1]

def random_block(splitter, *more):
    return block(splitter=splitter, item_tfms=[RandomResizedCrop(14, min_scale=.5)], batch_tfms=[*augs(), *more])

def fit_block(splitter, path, **kw):
    return random_block(splitter).fit_stats(path, **custom, **kw).dataloaders(path, **kw)
def fit_loaders(splitter, path, **kw): return random_block(splitter).dataloaders(path, **kw).fit_stats(**custom)
def fit_setup(splitter, path, **kw):  return random_block(splitter, DatasetStats(**custom)).dataloaders(path, **kw)

fits = pytest.mark.parametrize('fit', [fit_block, fit_loaders, fit_setup], ids=lambda f: f.__name__)

@pytest.mark.slow
@fits
@pytest.mark.parametrize('splitter,num_workers', [(RandomSplitter(), 0), (RandomSplitter(seed=7), 0),
    (IndexSplitter([1, 2]), 0), (RandomSplitter(), 2)],
                         ids=['unseeded', 'seeded', 'fixed', 'workers'])
def test_training_runs_as_without_the_fit(folder, fit, splitter, num_workers):
    "Split, shuffling, crops and augmentations of a seeded run, bit by bit, against the same statistics given by hand"
    kw,found = dict(bs=5, num_workers=num_workers),{}
    def fitted():
        dls = fit(splitter, folder, **kw)
        found['stats'] = dls.stats_choice.stats
        return dls
    got = seeded_run(fitted)
    def by_hand():
        return random_block(splitter, DatasetStats.from_stats(*found['stats'], cuda=False)).dataloaders(folder, **kw)
    same(got, seeded_run(by_hand))
    def by_word(): return random_block(splitter, DatasetStats(stats=tuple(found['stats']),
        **quiet)).dataloaders(folder, **kw)
    same(got, seeded_run(by_word))

@pytest.mark.parametrize('num_workers', [0, 2])
def test_random_states_are_left_alone(folder, num_workers):
    kw  = dict(bs=5, num_workers=num_workers)
    dls = random_block(RandomSplitter()).dataloaders(folder, **kw)
    set_seed(1)
    was,own = states(),dls.train.rng.getstate()
    measure_stats(dls.train, **quiet)
    assert states()==was and dls.train.rng.getstate()==own
    dls.fit_stats(**custom)
    assert states()==was and dls.train.rng.getstate()==own
    random_block(RandomSplitter()).fit_stats(folder, **custom, **kw)
    assert states()==was

def test_cudnn_flags_are_left_alone(folder):
    torch.backends.cudnn.benchmark,was = True,torch.backends.cudnn.benchmark
    try:
        block().fit_stats(folder, **custom, **small)
        assert torch.backends.cudnn.benchmark
    finally: torch.backends.cudnn.benchmark = was

@pytest.mark.slow
@pytest.mark.parametrize('num_workers', [0, 2])
def test_seed_of_the_pass(folder, num_workers):
    "Same seed, same numbers, whatever the global seed; another seed draws other augmentations"
    db,res = random_block(IndexSplitter([1, 2])),[]
    for glob,seed in ((1, 0), (2, 0), (2, 5)):
        set_seed(glob)
        res.append(measure_stats(db.dataloaders(folder, bs=5, num_workers=num_workers).train, seed=seed, **quiet))
    pd.testing.assert_frame_equal(res[0].images, res[1].images, check_exact=True)
    assert (res[0].images.mean_0!=res[2].images.mean_0).all()
    assert DatasetStats(seed=5, **custom).pass_args['seed']==5
    db.fit_stats(folder, seed=5, bs=5, num_workers=num_workers, **custom)
    assert db.stats_choice.measured==res[2].measured()

# --- masks and NaN

@pytest.mark.parametrize('num_workers', [0, 2])
def test_masked_fit(folder, num_workers):
    "Only the pixels of the mask, against numpy; the mask follows into every way of fitting"
    def bright(x): return x.mean(1, keepdim=True)>.4
    x = pixels(train_files(folder))
    m = np.float32(x).mean(1)>np.float32(.4)
    for fit in (lambda: measure_stats(block().dataloaders(folder, bs=4, num_workers=num_workers).train, mask=bright,
                                      **quiet),
                lambda: block().fit_stats(folder, mask=bright, **custom, **small).stats_choice.measured,
                lambda: block(batch_tfms=[DatasetStats(mask=bright, **custom)]).dataloaders(folder, **small
                                                                                            ).stats_choice.measured):
        rs = fit()
        assert rs.n_pixels==m.sum()
        for c in range(3): close((rs.mean[c], rs.std[c]), (x[:,c][m].mean(), x[:,c][m].std()))

def test_a_mask_that_changed_is_asked_again(folder, passes):
    "Its threshold, the weights of a network: a function does not show what it looks at"
    level = [.2]
    class Above:
        def __init__(self, level): self.level = level
        def __call__(self, x): return x[:, :1]>self.level
    def mask(x): return x[:, :1]>level[0]
    for first,second in ((mask, mask), (Above(.2), Above(.6))):
        level[0],db = .2,block()
        a = db.fit_stats(folder, mask=first, **custom, **small).stats_choice.measured
        level[0] = .6
        b = db.fit_stats(folder, mask=second, **custom, **small).stats_choice.measured
        assert b.n_pixels<a.n_pixels and b.min[0]>=.6
    assert len(passes)==4

@pytest.mark.parametrize('other', [dict(tol=.1), dict(max_images=5), dict(nonfinite='ignore'), dict(seed=1)], ids=str)
def test_another_pass_is_another_measurement(folder, passes, other):
    db = block().fit_stats(folder, **custom, **small)
    db.fit_stats(folder, **other, **custom, **small)
    assert len(passes)==2
    db.fit_stats(folder, model=None, **other, **custom, **small)
    assert len(passes)==2

class Holes:
    "Float images of which item 3 has NaN in its left half and item 7 in its right one"
    def __init__(self): self.items = [f'img{i}.tif' for i in range(12)]
    def __len__(self): return 12
    def __getitem__(self, i):
        x = torch.full((1, 4, 4), i/12.)
        if i==3: x[...,:2] = float('nan')
        if i==7: x[...,2:] = float('nan')
        return TensorImage(x),

@pytest.mark.parametrize('seed', range(4))
def test_nan_is_named_where_it_counts(seed):
    def right(x): return (torch.arange(4)>1).expand(len(x), 1, 4, 4)
    with pytest.raises(ValueError, match='img7.tif: NaN .*8 in channel 0'):
        measure_stats(TfmdDL(Holes(), bs=4, num_workers=0), mask=right, seed=seed, **quiet)
    rs = measure_stats(TfmdDL(Holes(), bs=4, num_workers=0), nonfinite='ignore', seed=seed, **quiet)
    assert (rs.n_images, rs.n_pixels)==(12, 12*16-16)

def test_export_with_a_mask(folder, tmp_path):
    "A lambda cannot be pickled; once fitted, none is needed"
    dls = block(batch_tfms=[DatasetStats(mask=lambda x: x[:, :1]>0, **custom)]).dataloaders(folder, **small)
    learn = Learner(dls, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)),
                    loss_func=CrossEntropyLossFlat(), path=tmp_path)
    learn.export('m.pkl')
    assert (tmp_path/'m.pkl').stat().st_size>0

# --- Ctrl-C

class CtrlC(Transform):
    "Ctrl-C at image number `at` of the pass"
    def __init__(self, at): self.at,self.n = at,0
    def encodes(self, x:PILImage):
        self.n += 1
        if self.n==self.at: raise KeyboardInterrupt
        return x

@pytest.mark.parametrize('before', [None, Normalize.from_stats(*imagenet_stats)], ids=['bare', 'normalized'])
def test_ctrl_c_leaves_the_block_as_it_was(folder, before):
    splitter,stop = RandomSplitter(),CtrlC(10)
    db = block(splitter=splitter, item_tfms=[stop], batch_tfms=[*augs(), *L(before)])
    set_seed(3)
    was,tfms,default = states(),list(db.batch_tfms),list(db.default_batch_tfms)
    with pytest.raises(KeyboardInterrupt): db.fit_stats(folder, **custom, **small)
    assert states()==was and db.splitter is splitter and db.stats_choice is None
    assert len(tfms)==len(db.batch_tfms) and all(a is b for a,b in zip(tfms, db.batch_tfms))
    assert len(default)==len(db.default_batch_tfms)
    db.fit_stats(folder, **custom, **small)
    assert db.stats_choice.measured.n_images==22

def test_ctrl_c_leaves_an_earlier_fit(folder):
    stop = CtrlC(0)
    db = block(item_tfms=[stop]).fit_stats(folder, **custom, **small)
    choice,splitter = db.stats_choice,db.splitter
    stop.at = stop.n+10
    with pytest.raises(KeyboardInterrupt): db.fit_stats(folder, stats='custom', seed=1, verbose=False, **small)
    assert db.stats_choice is choice and db.splitter is splitter

def test_ctrl_c_leaves_the_loaders_as_they_were(folder):
    stop = CtrlC(0)
    dls = block(item_tfms=[stop], batch_tfms=[*augs(), Normalize.from_stats(*imagenet_stats)]) \
        .dataloaders(folder, **small)
    stop.at = stop.n+10
    was,own,fs = states(),dls.train.rng.getstate(),[list(dl.after_batch.fs) for dl in dls.loaders]
    with pytest.raises(KeyboardInterrupt): dls.fit_stats(**custom)
    assert states()==was and dls.train.rng.getstate()==own and dls.stats_choice is None
    for dl,f in zip(dls.loaders, fs):
        assert all(a is b for a,b in zip(dl.after_batch.fs, f)) and len(f)==len(dl.after_batch.fs)
    assert dls.fit_stats(**custom).stats_choice.measured.n_images==20
    assert len(dls.train.one_batch())==2

def test_ctrl_c_in_a_lazy_fit(folder):
    "The recipe is as new; the next loaders are measured"
    stop,stats = CtrlC(10),DatasetStats(**custom)
    db = block(item_tfms=[stop], batch_tfms=[*augs(), stats])
    with pytest.raises(KeyboardInterrupt): db.dataloaders(folder, **small)
    assert stats.mean is None and stats.choice is None
    assert len(db.batch_tfms)==len(block(batch_tfms=[*augs(), stats]).batch_tfms)
    assert db.dataloaders(folder, **small).stats_choice.measured.n_images==20

# --- channels and ranges

class Spectral(TensorImage): "Five bands"

def load_bands(f):
    "Five channels made of a colour file: its own and two mixtures"
    x = torch.tensor(np.asarray(Image.open(f)), dtype=torch.float32).permute(2, 0, 1)/255
    return Spectral(torch.cat([x, x[:1]*.5+.1, (x[1:2]+x[2:])/2]))

def load_16bit(f): return TensorImage(torch.tensor(np.asarray(Image.open(f)).astype(np.float32)*257).permute(2, 0, 1))

def BandsBlock(): return TransformBlock(type_tfms=load_bands)
def DeepBlock():  return TransformBlock(type_tfms=load_16bit)

def raw(f, load): return load(f).double().numpy()

@pytest.mark.parametrize('img,c,load', [
    (ImageBlock(PILImageBW), 1, lambda f: np.asarray(Image.open(f).convert('L'))[None]/255.),
    (ImageBlock,             3, lambda f: np.asarray(Image.open(f)).transpose(2, 0, 1)/255.),
    (BandsBlock,             5, lambda f: raw(f, load_bands))], ids=['grey', 'colour', 'five bands'])
@pytest.mark.parametrize('lazy', [True, False], ids=['lazy', 'fit_stats'])
def test_channel_counts_train(folder, img, c, load, lazy):
    "Fit, one epoch, and what the model saw had mean 0 and std 1 per channel"
    seen = []
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(c, 2)
        def forward(self, x):
            if self.training: seen.append(x.detach().cpu())
            return self.lin(x.mean((2, 3)))
    db = DataBlock((img, CategoryBlock), get_items=sorted_files, get_y=parent_label,
                   splitter=IndexSplitter(range(0, 27, 4)),
                   batch_tfms=[DatasetStats(**custom)] if lazy else None)
    if not lazy: db.fit_stats(folder, **custom, **small)
    dls = db.dataloaders(folder, drop_last=False, **small)
    check(dls.stats_choice.measured, np.stack([load(f) for f in train_files(folder)]))
    learn = Learner(dls, Net(), loss_func=CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    x = torch.cat(seen).double()
    assert x.shape==(20, c, 16, 16) and x.mean((0, 2, 3)).abs().max()<1e-5
    assert (x.std((0, 2, 3), correction=0)-1).abs().max()<1e-5
    assert len(learn.get_preds()[0])==7

@pytest.mark.parametrize('img,c', [(ImageBlock(PILImageBW), 1), (BandsBlock, 5)], ids=['grey', 'five bands'])
def test_auto_choice_for_other_channel_counts(folder, img, c):
    "ImageNet has no numbers for them; there are few images, and a warning says so"
    db = DataBlock((img, CategoryBlock), get_items=sorted_files, get_y=parent_label,
                   splitter=IndexSplitter(range(0, 27, 4)))
    with pytest.warns(UserWarning, match='only 20 training images'): db.fit_stats(folder, **quiet, **small)
    assert (db.stats_choice.rule, db.stats_choice.kind, len(db.stats_choice.stats.mean))==('channels', 'custom', c)

def test_frozen_body_and_one_channel(folder):
    """A look at a few images shows that the model has no numbers for them, so they are measured; three numbers for
    one channel must never broadcast"""
    db = block(blocks=(ImageBlock(PILImageBW), CategoryBlock))
    for kwargs in (dict(), dict(measure=True)):
        with pytest.warns(UserWarning, match='only 20'): db.fit_stats(folder, frozen=True, **kwargs, **quiet, **small)
        assert db.stats_choice.rule=='channels'

def test_16_bit_values_are_off_the_models_range(folder):
    db = DataBlock((DeepBlock, CategoryBlock), get_items=sorted_files, get_y=parent_label,
                   splitter=IndexSplitter(range(0, 27, 4)))
    with pytest.warns(UserWarning, match='cannot apply'): db.fit_stats(folder, **quiet, **small)
    c = db.stats_choice
    assert (c.rule, c.kind)==('range', 'custom') and c.measured.max.max()>10000
    check(c.measured, np.stack([raw(f, load_16bit) for f in train_files(folder)]))

@pytest.mark.parametrize('kwargs', [dict(stats='imagenet'), dict(frozen=True), dict(stats=((.5,)*3, (.2,)*3))], ids=str)
def test_no_pass_where_none_is_needed(folder, passes, kwargs):
    with opened() as names: block().fit_stats(folder, **kwargs, **quiet, **small)
    assert not passes and len(set(names))<=5  # a handful is looked at by the guards
    db = block().fit_stats(folder, measure=True, **kwargs, **quiet, **small)
    check(db.stats_choice.measured, pixels(train_files(folder)))

# --- a splitter that means another split by now

class Folds:
    "Fold `k` of 3 is for validation"
    k = 0
    def __call__(self, items):
        valid = [i for i in range(len(items)) if i%3==self.k]
        return [i for i in range(len(items)) if i%3!=self.k],valid

def test_fit_stats_asks_the_splitter_anew(folder):
    "Cross-validation with one block and a splitter that looks up the current fold: no fold trains on another's split"
    folds = Folds()
    db = block(splitter=folds)
    for k in (0, 1, 2, 1):
        folds.k = k
        dls = db.fit_stats(folder, **custom, num_workers=0).dataloaders(folder, **small)
        want = [f for i,f in enumerate(files_of(folder)) if i%3!=k]
        assert list(dls.train_ds.items)==want
        check(dls.stats_choice.measured, pixels(want))

def test_loaders_after_the_fit_follow_the_splitter_too(folder, passes):
    folds = Folds()
    db = block(splitter=folds).fit_stats(folder, **custom, num_workers=0)
    folds.k = 1
    with pytest.warns(UserWarning, match='training items'): dls = db.dataloaders(folder, **small)
    check(dls.stats_choice.measured, pixels([f for i,f in enumerate(files_of(folder)) if i%3!=1]))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        again = db.dataloaders(folder, **small)
    assert list(again.train_ds.items)==list(dls.train_ds.items) and len(passes)==2

def test_random_splits_differ_between_fits(folder):
    "As fastai's do: a fit keeps its split, another fit at another random state draws its own"
    db,seen = block(splitter=RandomSplitter()),set()
    for s in range(4):
        set_seed(s)
        db.fit_stats(folder, **custom, num_workers=0)
        one,two = (frozenset(db.dataloaders(folder, **small).train_ds.items) for _ in range(2))
        assert one==two
        seen.add(one)
    assert len(seen)==4

def test_another_question_needs_no_second_pass(folder, passes):
    db = block().fit_stats(folder, **custom, num_workers=0)
    first = db.stats_choice.measured
    for kw in (dict(pretrained=False), dict(model=([.5]*3, [.2]*3)), dict(stats='custom')):
        db.fit_stats(folder, **kw, **quiet, num_workers=0)
        dls = db.dataloaders(folder, **small).fit_stats(**kw, **quiet)
        assert db.stats_choice.measured==dls.stats_choice.measured==first
    assert len(passes)==1
    db.fit_stats(folder, **custom, num_workers=0, seed=1)
    assert len(passes)==2

def test_slices_and_masks_as_splits(folder):
    for splits in ([slice(0, 20), slice(20, None)], [np.arange(27)<20, np.arange(27)>=20],
                   [np.arange(20), range(20, 27)]):
        dls = block(splitter=lambda o: splits).fit_stats(folder, **custom, num_workers=0).dataloaders(folder, **small)
        check(dls.stats_choice.measured, pixels(files_of(folder)[:20]))

def test_splitter_with_a_splitter_of_its_own(folder):
    "An attribute that happens to be called `splitter` is the user's business"
    class Wrapped:
        splitter = staticmethod(RandomSplitter(seed=9))
        def __call__(self, items): return list(range(20)),list(range(20, len(items)))
    for _ in range(2):
        dls = block(splitter=Wrapped()).fit_stats(folder, **custom, num_workers=0).dataloaders(folder, **small)
        assert list(dls.train_ds.items)==files_of(folder)[:20]

# --- families of images

def family(f): return int(Path(f).stem)//3

def labels_of(files): return np.array([family(f) for f in files])

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

def table_of(path):
    files = files_of(path)
    return pd.DataFrame(dict(file=files, patient_id=list(map(family, files))), index=range(100, 127))

def table_block():
    return DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('file'), get_y=lambda r: r.file.parent.name,
                     splitter=IndexSplitter(range(0, 27, 4)), item_tfms=Resize(12, method='squish'))

@pytest.mark.parametrize('how', ['function', 'list', 'array', 'mapping', 'column', 'function of rows', 'series'])
def test_ways_to_say_groups(folder, how):
    "One ledger, whatever says it; errors against numpy"
    files = train_files(folder)
    of_rows = how in ('column', 'function of rows', 'series')
    db,source = (table_block(), table_of(folder)) if of_rows else (block(), folder)
    dl,x = db.dataloaders(source, **small).train,pixels(files)
    said = {'function': family, 'list': labels_of(files).tolist(), 'array': labels_of(files), 'column': 'patient_id',
            'mapping': {f: family(f) for f in files_of(folder)}, 'function of rows': lambda r: r.patient_id,
            'series': dl.items.patient_id if of_rows else None}
    rs = measure_stats(dl, groups=said[how], **quiet)
    check(rs, x)
    assert rs.n_groups==len(set(labels_of(files))) and rs.images.group.tolist()==[str(o) for o in labels_of(files)]
    (mean_se, std_se),effect = cluster_errors(x, labels_of(files))
    close(rs.mean_se, mean_se), close(rs.std_se, std_se), close(rs.design_effect, effect)
    assert rs.unit==dict(column='patient').get(how, 'family' if how=='function' else 'group')

@pytest.mark.parametrize('groups,says', [
    ('patient', "got 'patient'"), ([1, 2], 'one group an item, got 2 for 20 items'), (7, 'got 7'),
    (lambda f: None, 'no group .None. of .*002.png'), ({}, 'no group .None. of .*002.png'),
    ([float('nan')]*20, 'no group .nan. of .*002.png'), (np.full(20, np.nan, np.float32), 'no group'),
    ([pd.NaT]*20, 'no group'), (pd.Series(range(20)), 'another index')], ids=no_address)
def test_groups_that_are_refused(folder, groups, says):
    dl = block().dataloaders(folder, **small).train
    with opened() as names, pytest.raises(ValueError, match=f'`groups`.*{says}') as e:
        measure_stats(dl, groups=groups, **quiet)
    assert not names and '\n' not in str(e.value)

def test_groups_are_read_wholly_in_random_order(folder):
    dl,orders = block().dataloaders(folder, **small).train,[]
    for seed in (0, 0, 1):
        with opened() as names: measure_stats(dl, seed=seed, groups=family, **quiet)
        assert Counter(names)==Counter(train_files(folder))
        runs = [g for i,g in enumerate(map(family, names)) if not i or g!=family(names[i-1])]
        assert len(runs)==len(set(runs))  # each is left once
        orders.append(runs)
    assert orders[0]==orders[1]!=orders[2] and sorted(orders[0])==sorted(orders[2])!=orders[0]

@pytest.mark.parametrize('most', [1, 4, 5, 11, 20, 500])
def test_max_images_stops_at_the_end_of_a_group(folder, most):
    files,dl = train_files(folder),block().dataloaders(folder, **small).train
    with opened() as names: rs = measure_stats(dl, max_images=most, groups=family, **quiet)
    read = sorted(set(names))
    assert len(names)==len(read)==rs.n_images
    assert read==[f for f in files if family(f) in set(map(family, read))]  # whole groups
    assert rs.n_images<=max(most, 3) and rs.n_images>min(most, 20)-3  # groups hold two or three
    assert (rs.complete, rs.population_groups)==(most>=20, 9 if most<20 else rs.n_groups)
    check(rs, pixels(read))

def test_max_images_without_groups(folder):
    rs = measure_stats(block().dataloaders(folder, **small).train, max_images=7, **quiet)
    assert (rs.n_images, rs.complete, rs.population, rs.population_groups)==(7, False, 20, None)

def test_rows_name_their_files(folder):
    dl = block().dataloaders(folder, bs=4, num_workers=2).train
    for rs in (measure_stats(dl, **quiet), measure_stats(dl, groups=family, max_images=9, **quiet)):
        where = [list(map(str, train_files(folder))).index(o) for o in rs.images['item']]
        assert where==rs.index.tolist()==sorted(where)
        x = pixels([train_files(folder)[i] for i in where])
        for c in range(3):
            close(rs.images[f'mean_{c}'], x[:,c].mean((1, 2))), close(rs.images[f'std_{c}'], x[:,c].std((1, 2)))
            close(rs.images[f'min_{c}'], x[:,c].min((1, 2))), close(rs.images[f'max_{c}'], x[:,c].max((1, 2)))

def test_random_states_with_groups_and_known_rows(folder):
    dl = random_block(IndexSplitter([1])).dataloaders(folder, **small).train
    set_seed(1)
    was,own = states(),dl.rng.getstate()
    rs = measure_stats(dl, groups=family, **quiet)
    measure_stats(dl, known=rs.take([1, 3]), **quiet)
    as_validation(dl), is_augmented(dl)
    assert states()==was and dl.rng.getstate()==own

# --- the stop rule

class Families(Greys):
    "`n` images in families of 2 to 30, which share most of their grey value"
    def __init__(self, n, share=.8, seed=0):
        super().__init__(n, seed)
        g = torch.Generator().manual_seed(seed+1)
        sizes = torch.randint(2, 31, (n,), generator=g)
        self.family = torch.repeat_interleave(torch.arange(n), sizes)[:n][torch.randperm(n, generator=g)].tolist()
        own,common = (torch.randn(n, 2, 1, 1, generator=g) for _ in range(2))
        self.grey = .1*(share**.5*common[self.family]+(1-share)**.5*own)+torch.tensor([.4, .6]).view(2, 1, 1)

    def loader(self, bs=64): return Ready(self, bs=bs, num_workers=0, shuffle=True)

@pytest.fixture
def sooner(monkeypatch):
    "A pass may stop after 300 images and 50 groups; it looks after 256 images first"
    monkeypatch.setattr('fastai_normstats.measure._least', (300, 50))
    monkeypatch.setattr('fastai_normstats.measure._look', 256)

def half_widths(x, groups, n_groups):
    "95 % half-widths of mean and std, worst channel in σ, groups as units, corrected for the `n_groups` there are"
    (mean_se, std_se),_ = cluster_errors(x, groups)
    G,std = len(set(groups)),two_pass(x)[1]
    edge = student.ppf(.975, G-1) if G<200 else 1.96
    return edge*np.sqrt(1-G/n_groups)*max((mean_se/std).max(), (std_se/std).max())

@pytest.mark.slow
@pytest.mark.parametrize('tol', [.05, .03, .02, .01])
@pytest.mark.parametrize('grouped', [True, False])
def test_stops_where_the_formula_says(sooner, tol, grouped):
    "The first look at which all half-widths are at most `tol`, over the whole groups before it"
    data,order = Families(4000),[]
    labels = data.family if grouped else list(range(4000))
    class Seen(Ready):
        def create_batches(self, samples):
            for b in super().create_batches(o for o in samples if order.append(o) is None): yield b
    rs = measure_stats(Seen(data, bs=64, num_workers=0), tol=tol, groups=labels if grouped else None, **quiet)
    look,n_groups = 256,len(set(labels))
    while look<4000:
        last = labels[order[look]]
        read = [i for i in order[:look] if labels[i]!=last]
        own = [labels[i] for i in read]
        if len(read)>=300 and len(set(own))>=50 and half_widths(data.images(read).numpy(), own, n_groups)<=tol: break
        look = max(look+256, math.ceil(1.25*look/256)*256)
    read = sorted(read) if look<4000 else list(range(4000))
    assert rs.index.tolist()==read and rs.complete==(look>=4000)
    x,own = data.images(read).numpy(),[labels[i] for i in read]
    check(rs, x)
    close((torch.stack(rs.half_widths())/rs.std).max(), half_widths(x, own, n_groups), 1e-5)

def test_never_before_3000_images_and_200_groups():
    "However little they differ"
    class Same(Greys):
        def __init__(self, n):
            super().__init__(n)
            self.grey = self.grey*1e-4+.5
    def measured(size):
        groups = None if size==1 else [i//size for i in range(20_000)]
        return measure_stats(Ready(Same(20_000), bs=64, num_workers=0), tol=.5, groups=groups, **quiet)
    for size,least in ((1, 3072), (2, 3072), (16, 3200), (40, 8000)):
        rs = measured(size)
        assert not rs.complete and rs.n_groups>=200 and least-size<=rs.n_images<least+3072
        assert rs.n_images==rs.n_groups*size  # no part of a group
        assert rs.population_groups==(None if size==1 else 20_000//size)
    assert measured(101).complete  # there are 199

def test_zero_tol_reads_all(sooner):
    data = Families(1000)
    assert measure_stats(data.loader(), tol=0, groups=data.family, **quiet).complete
    assert not measure_stats(data.loader(), tol=.2, **quiet).complete

@pytest.mark.slow
@pytest.mark.parametrize('share,tol', [(0., .03), (.8, .07)])
def test_intervals_of_a_pass_that_stops(sooner, share, tol):
    "Of 200 passes over populations of their own, about 95 % hold the truth; with images as units they do not"
    def covers(rs):
        off = [(got-want).abs() for got,want in zip((rs.mean, rs.std), data.truth)]
        return [b for o,h in zip(off, rs.half_widths()) for b in (o<=h).tolist()]
    hits,naive,read = [],[],[]
    for seed in range(200):
        data = Families(4000, share, seed)
        rs = measure_stats(data.loader(256), tol=tol, seed=seed, groups=data.family, **quiet)
        alone = rs.labelled(rs.items, [None]*len(rs.items))
        alone.population_groups = None
        hits.append(covers(rs)), naive.append(covers(alone)), read.append(rs.n_images)
    assert np.max(read)<3000  # they stopped
    assert .93<=np.mean(hits)<=.97
    if share: assert np.mean(naive, 0)[:2].max()<.7

# --- several images an item

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

class Unstacked(Transform):
    "A batch (B, S, 1, H, W) as its slices"
    order = 20
    def encodes(self, x:TensorImage): return x.flatten(0, 1)

loaders_of_slices = dict(one_by_one=partial(TfmdDL, bs=None), end_to_end=partial(EndToEnd, bs=4),
                         unstacked=partial(TfmdDL, bs=4, after_batch=[Unstacked()]))

@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('skip', [(), (0, 3, 4, 5, 11)], ids=['all', 'some skipped'])
@pytest.mark.parametrize('make', loaders_of_slices)
def test_items_of_several_images_are_groups(make, skip, num_workers):
    "Whatever puts them together; each row under the name of its own item"
    sizes = [3]*12 if make=='unstacked' else [1, 4, 2, 2, 5, 1, 3, 1, 1, 6, 2, 1]
    data = Slices(sizes, skip)
    rs = measure_stats(loaders_of_slices[make](data, num_workers=num_workers), **quiet)
    assert [*zip(rs.images['item'], rs.images.mean_0.round(2))]==data.rows()
    assert rs.images.group.tolist()==rs.images['item'].tolist() and (rs.unit, rs.n_groups)==('item', 12-len(skip))
    groups,values = zip(*data.rows())
    (mean_se, std_se),_ = cluster_errors(np.array(values)[:,None,None].repeat(9, 2), groups)
    close(rs.mean_se, mean_se, 1e-5), close(rs.std_se, std_se, 1e-5)
    def half(f): return int(f[6:-4])//2
    by = measure_stats(loaders_of_slices[make](data, num_workers=num_workers), groups=half, **quiet)
    assert by.images.group.tolist()==[str(half(f)) for f in groups]

@pytest.mark.parametrize('num_workers', [0, 2])
def test_skipped_items(num_workers):
    "An item left out leaves the names of the others alone"
    data = Slices([1]*30, skip={1, 2, 3, 4, 9, 12, 13, 28})  # fastai itself reads the first
    rs = measure_stats(TfmdDL(TfmdLists(range(30), lambda k: data[k][0][0]), bs=4, num_workers=num_workers), **quiet)
    kept = [k for k in range(30) if k not in data.skip]
    assert rs.images['item'].tolist()==[str(k) for k in kept] and rs.index.tolist()==kept and rs.complete
    np.testing.assert_allclose(rs.images.mean_0, kept, rtol=1e-7)
    assert not rs.grouped and rs.population==22

def test_all_skipped():
    dl = TfmdDL(Slices([1]*5, range(5)), bs=2, num_workers=0)
    with pytest.raises(ValueError, match='every item was skipped'): measure_stats(dl, **quiet)

def test_items_whose_names_are_alike_are_families_of_their_own():
    "Arrays are written alike"
    items = [np.full((40, 40), k, np.float32) for k in range(12)]
    items = [np.where(np.eye(40)[:1]>2, 0, a) for a in items]
    for a,k in zip(items, range(12)): a[:5] = a[-5:] = 0; a[:,:5] = a[:,-5:] = 0
    def two(a): return TensorImage(np.stack([a, a+1])[:,None])
    dl = EndToEnd(TfmdLists(items, [two, lambda x: (x,)]), bs=4, num_workers=0)
    rs = measure_stats(dl, **quiet)
    assert len(set(rs.images['item']))==1 and (rs.n_groups, rs.n_images)==(12, 24) and rs.mean_se.isfinite().all()

def test_nan_in_a_stack_is_named():
    class Torn(Slices):
        def __getitem__(self, k):
            x, = super().__getitem__(k)
            if k==4: x[-1, 0, 1, 1] = float('nan')
            return x,
    def everything(x):
        assert x.ndim==4
        return torch.ones_like(x[:, :1], dtype=torch.bool)
    for make,mask in (('one_by_one', everything), ('one_by_one', None), ('end_to_end', None)):
        dl = loaders_of_slices[make](Torn([2]*7), num_workers=0)
        with pytest.raises(ValueError, match='volume4.nii: NaN'): measure_stats(dl, mask=mask, **quiet)

def test_nan_in_a_loader_that_makes_no_items():
    "Nothing can be named, and the error is still that of the pixels"
    data = Greys(100)
    data.grey[50] = float('nan')
    with pytest.raises(ValueError, match='^NaN'): measure_stats(Ready(data, bs=8, num_workers=0), **quiet)

# --- known rows

def same_bits(a, b):
    pd.testing.assert_frame_equal(a.images, b.images, check_exact=True)
    assert a.measured()==b.measured() and a.index.tolist()==b.index.tolist()
    for k in ('mean', 'std', 'image_std', 'mean_se', 'std_se'): assert torch.equal(getattr(a, k), getattr(b, k))
    q = torch.linspace(0, 1, 37, dtype=torch.float64)
    assert torch.equal(a.quantile(q), b.quantile(q))

@pytest.mark.parametrize('known', [[0], [3, 4, 11, 19], range(20), range(0, 20, 2)], ids=str)
@pytest.mark.parametrize('groups', [None, family], ids=no_address)
@pytest.mark.parametrize('before', [None, family], ids=no_address)
def test_known_rows_are_not_read_again(folder, known, groups, before):
    "And the bits are those of a whole pass, whatever was said of groups then"
    files,dl = train_files(folder),block().dataloaders(folder, **small).train
    whole = measure_stats(dl, groups=groups, **quiet)
    rows = measure_stats(dl, groups=before, **quiet).take(list(known))
    with opened() as names: again = measure_stats(dl, groups=groups, known=rows, **quiet)
    assert sorted(names)==[f for i,f in enumerate(files) if i not in known]
    same_bits(again, whole)
    assert again.population_groups==whole.population_groups and again.image_size==whole.image_size
    check(again, pixels(files))
    few = measure_stats(dl, groups=groups, max_images=8, **quiet)
    same_bits(measure_stats(dl, groups=groups, max_images=8, known=rows, **quiet), few)

def test_known_rows_of_several_images():
    data = Slices([1, 4, 2, 2, 5, 1, 3])
    def loader(): return EndToEnd(data, bs=4, num_workers=0)
    whole = measure_stats(loader(), **quiet)
    for idxs in ([1], [0, 4, 5], range(7)):
        rows = whole.take(np.flatnonzero(np.isin(whole.index, list(idxs))))
        same_bits(measure_stats(loader(), known=rows, **quiet), whole)

def test_known_rows_and_the_stop_rule(sooner):
    "It stops where it would have stopped"
    data = Families(4000)
    some = measure_stats(data.loader(), tol=.07, groups=data.family, **quiet)
    assert not some.complete
    for rows in (some, some.take(range(0, some.n_images, 3)), measure_stats(data.loader(), tol=0, **quiet)):
        same_bits(measure_stats(data.loader(), tol=.07, groups=data.family, known=rows, **quiet), some)

# --- what comes as input

class Of:
    "Items that are these tensors"
    def __init__(self, x, kind=TensorImage): self.x,self.kind,self.items = x,kind,[f'{i}.raw' for i in range(len(x))]
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.kind(self.x[i]),

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8,
                                   torch.int16,
                                   torch.int32])
def test_kinds_of_numbers(dtype):
    g = torch.Generator().manual_seed(0)
    x = (torch.rand(21, 2, 9, 7, generator=g)*torch.rand(21, 2, 1, 1, generator=g)*200).to(dtype)
    rs = measure_stats(TfmdDL(Of(x), bs=4, num_workers=0), **quiet)
    check(rs, x.double().numpy())
    q = np.quantile(x.double().numpy().transpose(1, 0, 2, 3).reshape(2, -1), [.01, .25, .5, .75, .99], axis=1)
    np.testing.assert_allclose(rs.quantile([.01, .25, .5, .75, .99]), q, atol=.02*200)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('fit', ['loaders', 'setup'])
def test_half_precision_through_a_fit(dtype, fit):
    g = torch.Generator().manual_seed(0)
    x,tfm = (torch.rand(24, 3, 8, 8, generator=g)*.5+.2).to(dtype), DatasetStats(**custom)
    dl = TfmdDL(Of(x), bs=4, num_workers=0, shuffle=True, after_batch=[tfm] if fit=='setup' else None)
    dls = DataLoaders(dl, TfmdDL(Of(x), bs=4, num_workers=0))
    if fit=='loaders': dls.fit_stats(**custom)
    check(dls.stats_choice.measured, x.double().numpy())

def test_constant_images_of_any_size():
    for value in (1e30, -1e30, 0., 1., 1e6, 65504.):
        rs = measure_stats(TfmdDL(Of(torch.full((9, 1, 4, 4), value)), bs=4, num_workers=0), **quiet)
        assert rs.mean.item()==torch.tensor(value).item() and rs.std.item()==rs.image_std.item()==0
        assert rs.quantile([0., .5, 1.]).flatten().tolist()==[rs.mean.item()]*3

def test_small_differences_far_from_zero():
    "float32 has steps of 1/16 at a million; what is left of the differences is counted exactly"
    g = torch.Generator().manual_seed(0)
    x = 1e6+torch.rand(40, 1, 16, 16, generator=g)
    rs = measure_stats(TfmdDL(Of(x), bs=8, num_workers=0), **quiet)
    ref = x.double().numpy()
    assert ref.std()>.28
    close(rs.std, [ref.std()]), close(rs.image_std, [ref.std((1, 2, 3)).mean()])
    np.testing.assert_allclose(rs.mean, [ref.mean()], rtol=1e-12)
    dls = DataLoaders(TfmdDL(Of(x), bs=8, num_workers=0, shuffle=True), TfmdDL(Of(x), bs=8, num_workers=0))
    choice = dls.fit_stats(**custom).stats_choice
    close(choice.stats.std, [ref.std()])
    assert not any('constant' in s for s in choice.warnings)

class ImageTuple(fastuple):
    "From fastai's siamese tutorial"
    @classmethod
    def create(cls, fns): return cls(tuple(PILImage.create(f) for f in fns))

def TupleBlock(): return TransformBlock(type_tfms=ImageTuple.create, batch_tfms=IntToFloatTensor)

def test_tuples_of_images(folder):
    "fastai's siamese tutorial: Normalize acts inside of tuples"
    def pairs(path): fs = files_of(path); return L([a, b] for a,b in zip(fs, fs[::-1]))
    db = DataBlock((TupleBlock, CategoryBlock), get_items=pairs, get_y=lambda o: o[0].parent.name,
                   splitter=IndexSplitter(range(0, 27, 4)), item_tfms=Resize(12, method='squish'))
    fs = files_of(folder)
    kept = [i for i in range(27) if i%4]
    x = np.stack([pixels(fs)[kept], pixels(fs[::-1])[kept]], 1)
    rs = measure_stats(db.dataloaders(folder, **small).train, **quiet)
    check(rs, x.reshape(-1, 3, 12, 12))
    close(rs.images.mean_1, x.reshape(-1, 3, 12, 12)[:,1].mean((1, 2)))  # both of an item, one after the other
    assert (rs.n_groups, rs.unit)==(20, 'item') and rs.images.group.nunique()==20
    dls = db.fit_stats(folder, **custom, **small).dataloaders(folder, drop_last=False, **small)
    seen = torch.cat([torch.cat(list(b[0])) for b in dls.train]).double()
    assert seen.mean((0, 2, 3)).abs().max()<1e-5 and (seen.std((0, 2, 3), correction=0)-1).abs().max()<1e-5

def test_images_as_target_only(folder):
    "A generator that starts from noise: fastai normalises what it is to make"
    def noise(f): return torch.zeros(7)
    db = DataBlock((TransformBlock, ImageBlock), get_items=sorted_files, get_x=noise,
                   splitter=IndexSplitter(range(0, 27, 4)), item_tfms=Resize(12, method='squish'))
    check(by_loader(db, folder, **small), pixels(train_files(folder)))
    dls = db.fit_stats(folder, **custom, **small).dataloaders(folder, drop_last=False, **small)
    x = torch.cat([b[1] for b in dls.train]).double()
    assert x.mean((0, 2, 3)).abs().max()<1e-5

def test_lists_that_yield_two_images_and_a_label(folder):
    "fastai feeds the model all but the last"
    def both(f):
        a = np.asarray(Image.open(f).resize((12, 12), Image.Resampling.BILINEAR))
        return PILImage.create(a),PILImage.create(255-a),int(f.parent.name=='b')
    lists = TfmdLists(files_of(folder), both, splits=([i for i in range(27) if i%4], list(range(0, 27, 4))))
    dls = lists.dataloaders(after_item=[ToTensor()], after_batch=[IntToFloatTensor()], **small)
    rs = measure_stats(dls.train, **quiet)
    x = pixels(train_files(folder))
    check(rs, np.concatenate([x, 1-x]))
    assert rs.n_groups==20 and rs.images['item'].tolist()==[str(f) for f in train_files(folder) for _ in range(2)]

# --- as validation sees them

def plain_tfms():    return dict(item_tfms=[], batch_tfms=[])
def flipped():       return dict(batch_tfms=[Flip(p=.5)])
def resized_crop():  return dict(item_tfms=[RandomResizedCrop(14, min_scale=.3)])
def all_augs():      return dict(batch_tfms=augs())
def of_training():   return dict(batch_tfms=[AddIn(.25, 0)])
def of_validation(): return dict(batch_tfms=[AddIn(.25, 1)])

@pytest.mark.parametrize('make', [plain_tfms, flipped, resized_crop, all_augs, of_training, of_validation],
                         ids=lambda f: f.__name__)
@pytest.mark.parametrize('after', ['nothing', 'a training batch', 'a validation batch'])
def test_training_images_as_validation_sees_them(folder, make, after):
    "Augmented or not, by what it does to pixels; without it they are what fastai's test loader makes of the same files"
    db = block(**make())
    dls = db.dataloaders(folder, **small)
    if after!='nothing': dls[after=='a validation batch'].one_batch()
    assert is_augmented(dls.train)==(make is not plain_tfms)
    rs = measure_stats(as_validation(dls.train), **quiet)
    check(rs, torch.cat([b[0] for b in dls.test_dl(train_files(folder))]).double().numpy())
    if make is flipped: check(rs, pixels(train_files(folder)), 1e-5)
    assert measure_stats(dls.train, **quiet).images.equals(rs.images)==(make is plain_tfms)
