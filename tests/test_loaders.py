"""Which pixels a loader yields before Normalize: each image once, with the name of its item, as validation sees it; and
ways to say whose images they are"""

import re
from collections import Counter
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.data import PartialDL,WeightedDL
from fastai.data.all import (CategoryBlock,ColReader,DataBlock,IndexSplitter,IntToFloatTensor,L,TfmdDL,TfmdLists,
    ToTensor,Transform,TransformBlock,fastuple,noop,parent_label)
from fastai.torch_core import TensorImage
from fastai.vision.augment import Flip,RandomResizedCrop,Resize
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from helpers import (AddIn,augs,block,by_loader,check_measured as check,close,cluster_errors,custom,EndToEnd,family,
    files_of,Greys,no_address,numbers,opened,pixels,quiet,Ready,Slices,small,sorted_files,train_files,two_pass)
from PIL import Image

import fastai_normstats.block
from fastai_normstats.loaders import as_validation
from fastai_normstats.measure import is_augmented,measure_stats
from fastai_normstats.transform import DatasetStats

# --- which images

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

# --- families of images

def labels_of(files): return np.array([family(f) for f in files])

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
    ('patient', "got 'patient'"), ([1, 2], 'one group an item .*got 2 for 20 items'), (7, 'got 7'),
    (lambda f: None, 'no group .None. of .*002.png'), ({}, 'no group .None. of .*002.png'),
    ([float('nan')]*20, 'no group .nan. of .*002.png'), (np.full(20, np.nan, np.float32), 'no group'),
    ([pd.NaT]*20, 'no group'), (pd.Series(range(20)), 'another index')], ids=no_address)
def test_groups_that_are_refused(folder, groups, says):
    dl = block().dataloaders(folder, **small).train
    with opened() as names, pytest.raises(ValueError, match=f'`groups`.*{says}') as e:
        measure_stats(dl, groups=groups, **quiet)
    assert not names and '\n' not in str(e.value)

def test_rows_name_their_files(folder):
    dl = block().dataloaders(folder, bs=4, num_workers=2).train
    for rs in (measure_stats(dl, **quiet), measure_stats(dl, groups=family, max_images=9, **quiet)):
        where = [list(map(str, train_files(folder))).index(o) for o in rs.images['item']]
        assert where==rs.index.tolist()==sorted(where)
        x = pixels([train_files(folder)[i] for i in where])
        for c in range(3):
            close(rs.images[f'mean_{c}'], x[:,c].mean((1, 2))), close(rs.images[f'std_{c}'], x[:,c].std((1, 2)))
            close(rs.images[f'min_{c}'], x[:,c].min((1, 2))), close(rs.images[f'max_{c}'], x[:,c].max((1, 2)))

# --- several images an item

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

# --- what comes as input

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

def test_a_function_of_groups_that_fails_names_the_item(folder):
    "A name without a patient, as of `re.search(…)[0]`"
    dl,family = block().dataloaders(folder, **small).train, re.compile('none')
    with pytest.raises(ValueError, match=r'`groups` failed on .*png: TypeError: .*not subscriptable'):
        measure_stats(dl, groups=lambda f: family.search(f.name)[0], **quiet)
