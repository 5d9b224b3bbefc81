"""`DatasetStats` in a pipeline: it normalises with what was measured, keeps each split's own, measures again where
something changed"""

import sys,warnings

import numpy as np
import pytest
import torch
from fastai.data.all import (CategoryBlock,Categorize,DataLoaders,Datasets,IndexSplitter,IntToFloatTensor,L,Normalize,
    TfmdDL,ToTensor,Transform,parent_label)
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorImage
from fastai.vision.augment import (Brightness,Contrast,CropPad,Dihedral,Flip,Hue,RandomCrop,RandomErasing,
    RandomResizedCrop,RandomResizedCropGPU,Resize,Rotate,Saturation,Warp,Zoom,aug_transforms)
from fastai.vision.core import PILImage,PILImageBW,imagenet_stats
from fastai.vision.data import ImageBlock
from helpers import (AddIn,block,check_measured as check,close,custom,files_of,image_folder,numbers,pixels,quiet,
    random_image,small,train_files,two_pass)
from PIL import Image
from torch import nn

import fastai_normstats.block
from fastai_normstats.measure import measure_stats
from fastai_normstats.transform import DatasetStats

# --- normalises with what was measured

def valid_files(path): return files_of(path)[::4]

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

def test_fit_replaces_normalize(folder):
    "Not both of them: that would normalise twice"
    for old in (Normalize.from_stats(*imagenet_stats), Normalize(), DatasetStats(stats='imagenet', **quiet)):
        db,dls = block(batch_tfms=[old]),block(batch_tfms=[old]).dataloaders(folder, **small)
        for dls in (db.fit_stats(folder, **custom, **small).dataloaders(folder, **small), dls.fit_stats(**custom),
                    dls.fit_stats(**custom)):
            for dl in dls.loaders: assert [type(f) for f in dl.after_batch.fs
                                           if isinstance(f, Normalize)]==[DatasetStats]
            close(numbers(dls.train)[0], two_pass(pixels(train_files(folder)))[0])

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

# --- export

def test_export_with_a_mask(folder, tmp_path):
    "A lambda cannot be pickled; once fitted, none is needed"
    dls = block(batch_tfms=[DatasetStats(mask=lambda x: x[:, :1]>0, **custom)]).dataloaders(folder, **small)
    learn = Learner(dls, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)),
                    loss_func=CrossEntropyLossFlat(), path=tmp_path)
    learn.export('m.pkl')
    assert (tmp_path/'m.pkl').stat().st_size>0
