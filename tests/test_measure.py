"What a fit measures, opens and leaves behind: exact numbers, training files only, no random state touched"

import math,random,warnings
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
import fastai.callback.progress
from fastai.data.all import (CategoryBlock,DataBlock,DataLoaders,GrandparentSplitter,IndexSplitter,L,Normalize,
    RandomSplitter,TfmdDL,Transform,TransformBlock,parent_label)
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorImage,set_seed
from fastai.vision.augment import RandomErasing,RandomResizedCrop,Resize
from fastai.vision.core import PILImage,PILImageBW,imagenet_stats
from fastai.vision.data import ImageBlock
from helpers import (AddIn,augs,block,by_loader,check_measured as check,close,cluster_errors,custom,EndToEnd,family,
    files_of,Greys,image_folder,no_address,opened,pixels,quiet,random_image,Ready,Slices,small,sorted_files,
    train_files,two_pass)
from PIL import Image
from scipy.stats import t as student
from torch import nn

import fastai_normstats.block
from fastai_normstats import cli
from fastai_normstats.fingerprint import n_looked_at
from fastai_normstats.loaders import as_validation
from fastai_normstats.measure import is_augmented,measure_stats
from fastai_normstats.transform import DatasetStats

# --- pipelines

class Record(Transform):
    "Keeps what passes just before Normalize, or after it"
    def __init__(self, order=98): self.order,self.seen = order,[]
    def encodes(self, x:TensorImage):
        self.seen.append(x.detach().cpu().clone())
        return x

# --- exact

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
