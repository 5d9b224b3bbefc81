"What goes wrong with fastai's Normalize without a word: with DatasetStats it works, or an error says what to do"
import pickle, random, subprocess, sys, types
from functools import partial
from importlib import import_module
from textwrap import dedent

import numpy as np
import pytest
import torch
from fastai.callback.data import PartialDL, WeightedDL
from fastai.callback.progress import *
from fastai.data.all import (CategoryBlock, DataBlock, IndexSplitter, IntToFloatTensor, L, Normalize, RandomSplitter,
                             TfmdDL, ToTensor,
                             Transform, TransformBlock, get_image_files, noop, parent_label)
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorImage, TensorImageBW, TensorMask, set_seed
from fastai.vision.augment import Dihedral, RandomResizedCrop
from fastai.vision.core import PILImage, PILImageBW, imagenet_stats
from fastai.vision.data import ImageBlock, MaskBlock
from fastai.vision.learner import _add_norm, _timm_norm, model_meta, vision_learner
from fasttransform import Pipeline
from helpers import image_folder
from PIL import Image
from plum import NotFoundLookupError, dispatch
from torch import nn
from torchvision.models import resnet18

from fastai_normstats.block import KeptSplit
from fastai_normstats.transform import DatasetStats

custom = dict(stats='custom', verbose=False)
cpu = dict(bs=4, num_workers=0, device=torch.device('cpu'))

@pytest.fixture
def folder(tmp_path): return image_folder(tmp_path/'images')

def sorted_files(path): return get_image_files(path).sorted()

def block(*batch_tfms, blocks=(ImageBlock, CategoryBlock), get_y=parent_label, splitter=None, **kwargs):
    "Every fourth of 24 files is for validation, if nothing else is said"
    return DataBlock(blocks, get_items=sorted_files, get_y=get_y, splitter=splitter or IndexSplitter(range(0, 24, 4)),
                     batch_tfms=L(batch_tfms), **kwargs)

def lazy(path, *tfms, **kwargs):     return block(*tfms, DatasetStats(**custom), **kwargs).dataloaders(path, **cpu)
def by_block(path, *tfms, **kwargs):
    return block(*tfms, **kwargs).fit_stats(path, **custom, **cpu).dataloaders(path, **cpu)
def by_dls(path, *tfms, **kwargs):   return block(*tfms, **kwargs).dataloaders(path, **cpu).fit_stats(**custom)

ways = pytest.mark.parametrize('way', [lazy, by_block, by_dls], ids=lambda f: f.__name__)
fits = pytest.mark.parametrize('way', [by_block, by_dls], ids=lambda f: f.__name__)

def stats_of(dl):
    "The one Normalize of a loader"
    res = [f for f in dl.after_batch.fs if isinstance(f, Normalize)]
    assert len(res)==1, res
    return res[0]

def pixels(files, mode='RGB'):
    "(n, channels, 16, 16) in [0, 1], float64"
    x = np.stack([np.asarray(Image.open(f).convert(mode), dtype=np.float64) for f in files])
    return x.reshape(len(files), 16, 16, -1).transpose(0, 3, 1, 2)/255

def check_numbers(dl, x):
    "The loader normalises with mean and std of `x`"
    for got,want in zip((stats_of(dl).mean, stats_of(dl).std), (x.mean((0, 2, 3)), x.std((0, 2, 3)))):
        np.testing.assert_allclose(got.cpu().flatten().double().numpy(), want, rtol=1e-6)

def check_fold(dls):
    "Every loader that can be got normalises with the numbers of the training files"
    x = pixels(dls.train_ds.items)
    for dl in (*dls.loaders, dls.train.new(), dls.test_dl(dls.valid_ds.items)): check_numbers(dl, x)
    mean,std = x.mean((0, 2, 3), keepdims=True),x.std((0, 2, 3), keepdims=True)
    y = torch.cat([b[0] for b in dls.valid]).cpu().double().numpy()
    np.testing.assert_allclose(y, (pixels(dls.valid_ds.items)-mean)/std, atol=1e-5)

def chain(e):
    while e is not None:
        yield e
        e = e.__cause__ or e.__context__

# --- 3: a transform keeps its statistics, so a second split is normalised with those of the first

class Fold:
    "A splitter into four folds, with the fold to validate on as state"
    k = 0
    def __call__(self, items): return [i for i in range(len(items)) if i%4!=self.k],list(range(self.k, len(items), 4))

@pytest.mark.slow
@pytest.mark.parametrize('refit', [False, True], ids=['lazy', 'fit_stats'])
def test_3_kfold_with_one_block_leaks_no_statistics(folder, passes, refit):
    "Every fold is measured afresh, and earlier ones keep theirs"
    fold = Fold()
    db,all_dls = block(*(() if refit else (DatasetStats(**custom),)), splitter=fold),[]
    for fold.k in range(4):
        if refit: db.splitter,_ = fold,db.fit_stats(folder, **custom, **cpu)
        all_dls.append(db.dataloaders(folder, **cpu))
    assert len({tuple(stats_of(dls.train).mean.flatten().tolist()) for dls in all_dls})==4 and len(passes)>=4
    for dls in all_dls: check_fold(dls)

def test_3_second_split_after_fit_is_measured_again_and_said(folder):
    fold = Fold()
    db = block(splitter=fold).fit_stats(folder, **custom, **cpu)
    db.splitter,fold.k = fold,1
    with pytest.warns(UserWarning, match='not what `fit_stats` measured.*measured again'):
        dls = db.dataloaders(folder, **cpu)
    check_fold(dls)

def test_3_other_folder_with_one_block_leaks_no_statistics(folder, tmp_path):
    db = block(DatasetStats(**custom))
    a,b = (db.dataloaders(p, **cpu) for p in (folder, image_folder(tmp_path/'others', seed=1)))
    for dls in (a, b): check_fold(dls)

def test_3_shared_list_of_transforms_leaks_no_statistics(folder):
    "The mid-level way: one list for the loaders of all folds"
    tfms,ds,fold = [IntToFloatTensor(), DatasetStats(**custom)],[],Fold()
    for fold.k in range(2): ds.append(block(splitter=fold).datasets(folder))
    fold.k = 1
    for dls in [d.dataloaders(after_item=ToTensor, after_batch=tfms, **cpu) for d in ds]: check_fold(dls)

# --- 4: AttributeError in setups is swallowed, and a TypeError about NoneType comes at the first batch

@dispatch
def only_ints(x:int): return x

class Wrong(Transform):
    "A batch transform with a bug"
    order = 20
    def __init__(self, err): self.err = err
    def encodes(self, x:TensorImage):
        if self.err is AttributeError: return x.no_such_name
        if self.err is NotFoundLookupError: return only_ints('no_such_name')
        raise self.err('no_such_name')

class WrongItem(Transform):
    "An item transform with a bug"
    def encodes(self, x:PILImage): return x.no_such_name

@ways
@pytest.mark.parametrize('err', [AttributeError, NotFoundLookupError, TypeError, KeyError, ZeroDivisionError])
def test_4_error_of_a_batch_transform_reaches_the_user(folder, way, err, capsys):
    with pytest.raises(Exception, match='no_such_name') as e: way(folder, Wrong(err))
    assert any(isinstance(o, err) for o in chain(e.value)) and 'NoneType' not in str(e.value)

def test_4_error_in_fit_of_existing_loaders_reaches_the_user(folder):
    "Loaders that had been made before the transform broke"
    dls = block().dataloaders(folder, **cpu)
    dls.train.after_batch.add(Wrong(AttributeError))
    with pytest.raises(Exception, match='no_such_name') as e: dls.fit_stats(**custom)
    assert any(isinstance(o, AttributeError) for o in chain(e.value))

@pytest.mark.parametrize('way', [lazy, by_block], ids=lambda f: f.__name__)
def test_4_error_of_an_item_transform_names_the_file(folder, way):
    with pytest.raises(Exception, match=r'\.png.*no_such_name') as e: way(folder, item_tfms=[WrongItem()])
    assert any(isinstance(o, AttributeError) for o in chain(e.value))

@pytest.mark.parametrize('way', [lazy, by_block], ids=lambda f: f.__name__)
def test_4_error_of_a_getter_reaches_the_user(folder, way):
    "A getter that is wrong for some files only, so that fastai's own look at the first item does not see it"
    def get_x(f): return f.no_such_name if f.stem=='019' else f
    with pytest.raises(Exception, match=r'019\.png.*no_such_name') as e: way(folder, get_x=get_x)
    assert any(isinstance(o, AttributeError) for o in chain(e.value))

def test_4_error_of_a_dataset_class_reaches_the_user():
    class Items:
        def __len__(self): return 6
        def __getitem__(self, i): return self.no_such_name
    with pytest.raises(Exception, match='no_such_name') as e:
        TfmdDL(Items(), bs=2, num_workers=0, after_batch=[DatasetStats(**custom)])
    assert any(isinstance(o, AttributeError) for o in chain(e.value))

def test_4_error_in_get_items_reaches_the_user(folder):
    db = DataBlock((ImageBlock, CategoryBlock), get_items=lambda p: p.no_such_name, get_y=parent_label)
    with pytest.raises(AttributeError, match='no_such_name'): db.fit_stats(folder, **custom)

def test_4_unmeasured_transform_says_so():
    "Not `unsupported operand type(s) for -: 'TensorImage' and 'NoneType'`"
    with pytest.raises(ValueError, match=r'no statistics yet: put it into `batch_tfms`, or call `dls\.fit_stats\(\)`'):
        Pipeline([DatasetStats(**custom)])(TensorImage(torch.rand(2, 3, 4, 4)))

# --- 5: `add_tfms` sets up with no loader

def test_5_add_tfms_says_what_to_do(folder):
    dls = block().dataloaders(folder, **cpu)
    with pytest.raises(ValueError, match=r'no loader to measure.*`batch_tfms`.*`dls\.fit_stats\(\)`'):
        dls.add_tfms([DatasetStats(**custom)], 'after_batch')
    for dl in dls.loaders: assert not any(isinstance(f, Normalize) for f in dl.after_batch.fs)
    check_fold(dls.fit_stats(**custom))  # what the message says

def test_5_add_tfms_takes_one_with_numbers(folder):
    "Given statistics, or a copy with those measured on other loaders"
    other = stats_of(lazy(folder).train)
    for tfm in (DatasetStats.from_stats(*imagenet_stats, cuda=False), other):
        dls = block().dataloaders(folder, **cpu)
        dls.add_tfms([tfm], 'after_batch')
        for dl in dls.loaders: assert torch.equal(stats_of(dl).mean, tfm.mean)

@pytest.mark.parametrize('where', ['item_tfms', 'type_tfms'])
def test_5_in_the_wrong_list_says_what_to_do(folder, where):
    "There it would normalise whole numbers from 0 to 255, or be asked to measure files"
    wrong = dict(item_tfms=[], type_tfms=[])
    wrong[where] = [DatasetStats(**custom)]
    b = TransformBlock(type_tfms=[PILImage.create, *wrong['type_tfms']], batch_tfms=IntToFloatTensor)
    with pytest.raises((TypeError, ValueError), match='put it into `batch_tfms`'):
        block(blocks=(b, CategoryBlock), item_tfms=wrong['item_tfms']).dataloaders(folder, **cpu)

# --- 6: transforms are told apart by their exact class, so that Normalize and a subclass are both kept

plain = [Normalize, Normalize(), Normalize.from_stats(*imagenet_stats, cuda=False)]
def plain_id(o): return 'class' if o is Normalize else 'unfitted' if o.mean is None else 'imagenet'

@pytest.mark.slow
@fits
@pytest.mark.parametrize('old', plain, ids=plain_id)
def test_6_plain_normalize_is_replaced(folder, way, old): check_fold(way(folder, old))

@fits
def test_6_normalize_of_an_image_block_is_replaced(folder, way):
    b = ImageBlock()
    b.batch_tfms += [Normalize.from_stats(*imagenet_stats, cuda=False)]
    check_fold(way(folder, blocks=(b, CategoryBlock)))

def test_6_new_transforms_after_fit_keep_a_normalize_and_are_measured_again(folder):
    db = block(Normalize()).fit_stats(folder, **custom, **cpu)
    with pytest.warns(UserWarning, match=r'\(different: transforms\)'):
        dls = db.new(batch_tfms=[Dihedral(p=0.)]).dataloaders(folder, **cpu)
    check_fold(dls)

def test_6_own_subclass_of_normalize_is_replaced(folder):
    class MyNorm(Normalize): pass
    for way in (by_block, by_dls): check_fold(way(folder, MyNorm(*(torch.ones(1, 3, 1, 1),)*2)))

@pytest.mark.parametrize('first', [True, False], ids=['before', 'after'])
@pytest.mark.parametrize('own', [DatasetStats(**custom), DatasetStats,
                                 DatasetStats.from_stats(*imagenet_stats, cuda=False)],
                         ids=['measured', 'class', 'given'])
@pytest.mark.parametrize('other', plain, ids=plain_id)
@pytest.mark.parametrize('maker', ['DataBlock', 'Datasets', 'new'])
def test_6_beside_a_normalize_is_an_error(folder, first, own, other, maker):
    both = [own, other] if first else [other, own]
    with pytest.raises(ValueError, match='Normalize beside DatasetStats would normalise twice: keep one of them'):
        if maker=='DataBlock': block(*both).dataloaders(folder, **cpu)
        if maker=='Datasets':
            block().datasets(folder).dataloaders(after_item=ToTensor, after_batch=[IntToFloatTensor(), *both], **cpu)
        if maker=='new':
            block().fit_stats(folder, **custom, **cpu).new(batch_tfms=[other]).dataloaders(folder, **cpu)

def test_6_two_of_them_is_an_error(folder):
    tfms = [IntToFloatTensor(), DatasetStats(**custom), DatasetStats(**custom)]
    with pytest.raises(ValueError, match='would normalise twice: keep one'):
        block().datasets(folder).dataloaders(after_item=ToTensor, after_batch=tfms, **cpu)

@pytest.mark.slow
@fits
def test_6_fitting_twice_normalises_once(folder, way):
    dls = way(folder)
    check_fold(dls.fit_stats(**custom).fit_stats(**custom))
    fitted = block(DatasetStats(stats='imagenet', verbose=False)).fit_stats(folder, **custom, **cpu)
    check_fold(fitted.dataloaders(folder, **cpu))

# --- 7: who looks for a Normalize

@pytest.mark.slow
@ways
def test_7_learner_adds_no_second_normalize(folder, way):
    "Pretrained weights would make `vision_learner` add ImageNet's"
    dls = way(folder)
    vision_learner(dls, resnet18, pretrained=False)
    _add_norm(dls, model_meta[resnet18], True)
    _timm_norm(dls, dict(mean=[.5]*3, std=[.5]*3), True)
    check_fold(dls)

@pytest.fixture
def captum(monkeypatch):
    "fastai's captum callback, with captum itself left out"
    def stub(name, **attrs):
        m = types.ModuleType(name)
        for k,v in attrs.items(): setattr(m, k, v)
        monkeypatch.setitem(sys.modules, name, m)
    kinds = {k: type(k, (), {'__init__': lambda self, *args, **kwargs: vars(self).update(kwargs),
                             'render': lambda self, **kwargs: None})
             for k in 'IntegratedGradients NoiseTunnel GradientShap Occlusion AttributionVisualizer Batch '
                      'ImageFeature'.split()}
    stub('captum')
    stub('captum.attr', visualization=None, **kinds), stub('captum.insights', **kinds)
    stub('captum.insights.attr_vis'), stub('captum.insights.attr_vis.features', **kinds)
    stub('ipykernel', jsonutil=types.SimpleNamespace(json_clean=noop))
    monkeypatch.delitem(sys.modules, 'fastai.callback.captum', raising=False)
    yield import_module('fastai.callback.captum')
    sys.modules.pop('fastai.callback.captum', None)

@ways
def test_7_captum_attributions_see_normalised_images(folder, way, captum):
    dls = way(folder)
    interp = captum.CaptumInterpretation(types.SimpleNamespace(dls=dls, model=None))
    f,mean,std = dls.valid_ds.items[0],*(o[0].numpy() for o in (stats_of(dls.train).mean, stats_of(dls.train).std))
    (x,_),(img,_) = interp._get_enc_dec_data(dls.valid_ds[0])
    np.testing.assert_allclose(x.reshape(3, 16, 16)*std+mean, pixels([f])[0], atol=1e-5)
    assert img.shape==(3, 16, 16)

def test_7_captum_finds_the_hard_coded_line(folder, captum):
    """`insights` wants the very class Normalize and changes the shape of its numbers in place: `code()` gives it one,
    the choice stays whole"""
    choice = lazy(folder).stats_choice
    dls = block(eval(choice.code().split('#')[0], dict(Normalize=Normalize))).dataloaders(folder, **cpu)
    x = pixels(dls.train_ds.items)
    check_numbers(dls.train, x)
    found = next((f for f in dls.train.after_batch if type(f)==Normalize), noop)
    found.mean.squeeze_(0), found.std.squeeze_(0)
    np.testing.assert_allclose(choice.stats.mean, x.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(dls.valid.one_batch()[0]*found.std+found.mean, pixels(dls.valid_ds.items[:4]), atol=1e-5)

def test_7_numbers_changed_in_place_stay_in_their_loaders(folder):
    "As captum's `squeeze_` does: other loaders from the same block are not touched"
    db = block(DatasetStats(**custom))
    a,b = (db.dataloaders(folder, **cpu) for _ in range(2))
    stats_of(a.train).mean.squeeze_(0).zero_()
    check_fold(b), check_fold(db.dataloaders(folder, **cpu))

# --- 10: one channel and three statistics silently become three channels

@pytest.mark.parametrize('n,c', [(3, 1), (3, 5), (2, 3), (5, 3), (5, 1)])
def test_10_statistics_for_other_channels_are_refused(n, c):
    x,tfm = TensorImage(torch.rand(2, c, 4, 4)),DatasetStats.from_stats([.5]*n, [.2]*n, cuda=False)
    with pytest.raises(ValueError, match=rf'of {c} channels? and statistics of {n} channels?: load images .*of {n} '
                                         rf'channel'): tfm(x)

@pytest.mark.parametrize('tfm', [
    dict(stats='imagenet'), dict(stats=imagenet_stats), dict(stats='pretrained', model=resnet18)], ids=' '.join)
def test_10_one_channel_images_and_three_statistics_are_refused(folder, tfm):
    "Never three channels of one"
    with pytest.raises(ValueError, match="1 channel.*3.*stats='custom'"):
        block(DatasetStats(**tfm, verbose=False),
              blocks=(ImageBlock(PILImageBW), CategoryBlock)).dataloaders(folder, **cpu).one_batch()

@ways
def test_10_one_channel_images_get_one_statistic(folder, way):
    dls = way(folder, blocks=(ImageBlock(PILImageBW), CategoryBlock))
    assert dls.one_batch()[0].shape==(4, 1, 16, 16)
    check_numbers(dls.train, pixels(dls.train_ds.items, 'L'))

def test_10_one_channel_images_get_their_own_statistics_if_nothing_is_said(folder):
    with pytest.warns(UserWarning, match='only 18 training images'):
        dls = block(DatasetStats(verbose=False),
                    blocks=(ImageBlock(PILImageBW), CategoryBlock)).dataloaders(folder, **cpu)
    assert (dls.stats_choice.rule,
            dls.stats_choice.kind)==('channels', 'custom') and dls.one_batch()[0].shape==(4, 1, 16, 16)

class ToVolume(Transform):
    "Repeats an image `depth` times, as the slices of a volume"
    order = 20
    def __init__(self, depth): self.depth = depth
    def encodes(self, x:TensorImage): return x[:,:,None].expand(-1, -1, self.depth, -1, -1).contiguous()

@pytest.mark.parametrize('depth,axes', [(None, (0,2,3)), (3, (0,2,3,4)), (1, (0,2,3)), (3, (0,2,3)), (16, (0,2,3)),
                                        (None, (0,2,3,4)), (None, (0,2))], ids=str)
def test_10_axes_that_do_not_fit_never_mix_channels_up(folder, depth, axes):
    """Per-channel numbers must meet the channel axis, also when the next one is as long, or one: else an error that
    speaks of `axes`"""
    tfms,shape = ([],(4, 3, 16, 16)) if depth is None else ([ToVolume(depth)],(4, 3, depth, 16, 16))
    try: dls,err = block(*tfms, DatasetStats(axes=axes, **custom)).dataloaders(folder, **cpu),None
    except ValueError as e: dls,err = None,str(e)
    if dls is None:
        assert '`axes`' in err and len(axes)!=len(shape)-1
        return
    assert dls.train.one_batch()[0].shape==shape
    x = torch.cat([b[0] for b in dls.train.new(shuffle=False, drop_last=False)]).double()
    over = [i for i in range(x.ndim) if i!=1]
    assert x.mean(over).abs().max()<1e-5 and (x.std(over, correction=0)-1).abs().max()<1e-5

# --- 12: what Normalize acts on

def inverted(f): return PILImage(Image.fromarray(255-np.asarray(Image.open(f))))

@ways
def test_12_image_targets_are_normalised_but_not_measured(folder, way):
    dls = way(folder, blocks=(ImageBlock, ImageBlock), get_y=inverted)
    x,y = (pixels(dls.train_ds.items),1-pixels(dls.valid_ds.items[:4]))
    check_numbers(dls.train, x)
    np.testing.assert_allclose(dls.valid.one_batch()[1],
                               (y-x.mean((0, 2, 3), keepdims=True))/x.std((0, 2, 3), keepdims=True), atol=1e-5)

@ways
def test_12_masks_are_untouched(folder, way):
    def mask(f): return (np.asarray(Image.open(f))[...,0]//64).astype(np.uint8)
    dls = way(folder, blocks=(ImageBlock, MaskBlock(codes=list('abcd'))), get_y=mask)
    y = dls.valid.one_batch()[1]
    assert type(y) is TensorMask and y.tolist()==[mask(f).tolist() for f in dls.valid_ds.items[:4]]
    check_fold(dls)

class TensorScan(TensorImage): "An own image type"

def image_type(name):
    if name in globals(): return globals()[name]
    pytest.importorskip('pydicom')
    return getattr(import_module('fastai.medical.imaging'), name)

@pytest.mark.parametrize('name', ['TensorImageBW', 'TensorScan', 'TensorDicom', 'TensorCTScan'])
def test_12_image_types_are_measured_normalised_and_kept(folder, name):
    kind = image_type(name)
    def create(f): return kind(torch.tensor(np.asarray(Image.open(f).convert('L')))[None]/255)
    dls = block(DatasetStats(**custom),
                blocks=(TransformBlock(type_tfms=create), CategoryBlock)).dataloaders(folder, **cpu)
    assert type(dls.valid.one_batch()[0]) is kind
    check_numbers(dls.train, pixels(dls.train_ds.items, 'L'))

class Dimmed(TfmdDL):
    "A user's loader with an argument of its own"
    def __init__(self, *args, by=1, **kwargs):
        super().__init__(*args, **kwargs)
        self.by = by
    def create_batch(self, b):
        x,*y = super().create_batch(b)
        return (x//self.by, *y)
    def new(self, *args, **kwargs): return super().new(*args, by=self.by, **kwargs)

def test_13_a_loader_class_with_an_argument_of_its_own(tmp_path):
    "What is measured went through the user's loader as it was made, not as it would be by default"
    files = sorted(image_folder(tmp_path/'images').rglob('*.png'))
    db = DataBlock((ImageBlock, CategoryBlock), get_items=lambda _: files, get_y=parent_label,
                   splitter=IndexSplitter([0]))
    dls = db.dataloaders(0, bs=4, num_workers=0, dl_type=partial(Dimmed, by=4)).fit_stats(stats='custom', verbose=False)
    x = np.stack([np.asarray(Image.open(f).convert('RGB')) for f in files[1:]])//4/255.
    np.testing.assert_allclose(dls.stats_choice.stats.mean, x.mean((0, 1, 2)), rtol=1e-6)

@pytest.mark.parametrize('way', [lazy, by_block], ids=lambda f: f.__name__)
def test_12_plain_tensors_are_refused(folder, way):
    "Normalize would never touch them: an error beats numbers that nothing uses"
    def create(f): return torch.tensor(np.asarray(Image.open(f)).copy()).permute(2, 0, 1)/255
    with pytest.raises(TypeError, match=r'no image among the inputs \(Tensor\).*e\.g\. `ImageBlock`'):
        way(folder, blocks=(TransformBlock(type_tfms=create), CategoryBlock))

# --- 13: only what is named in `parameters` moves with the device

def devices(dls): return {getattr(stats_of(dl), k).device.type for dl in dls.loaders for k in ('mean', 'std')}

@ways
def test_13_statistics_move_with_the_loaders(folder, way):
    "`meta` stands for a second device"
    dls = way(folder)
    assert devices(dls)=={'cpu'} and devices(dls.to('meta'))=={'meta'}

@ways
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_13_statistics_move_to_the_gpu_and_back(folder, way):
    dls = way(folder)
    for d in ('cuda', 'cpu', 'cuda'): assert devices(dls.to(d))=={d} and dls.valid.one_batch()[0].device.type==d
    check_fold(dls)

def test_13_block_fitted_on_one_device_serves_loaders_on_another(folder, passes):
    "The recipe of a block has no device of its own"
    db = block().fit_stats(folder, **custom, **cpu)
    there,here = db.dataloaders(folder, **{**cpu, 'device': torch.device('cpu')}),db.dataloaders(folder, **cpu)
    there.to('meta')
    check_fold(here), check_fold(db.dataloaders(folder, **cpu))
    assert len(passes)==1

@pytest.mark.parametrize('way', ['lazy', 'by_dls'])
@pytest.mark.parametrize('make', [WeightedDL, PartialDL], ids=lambda c: c.__name__)
def test_13_other_loader_classes_are_measured_once_each(folder, way, make, passes):
    """Neither drawn by weight nor in part; they train on as what they are. Each image is opened once for the pass,
    and 16 of them for two looks before it"""
    opened = []
    ds = block(get_x=lambda f: opened.append(f) or f).datasets(folder)
    kwargs = dict(after_item=ToTensor, after_batch=[IntToFloatTensor(), *([DatasetStats(**custom)]
        if way=='lazy' else [])], **cpu)
    opened.clear()
    dls = ds.weighted_dataloaders(np.arange(18.)**4, **kwargs) if make is WeightedDL \
        else ds.partial_dataloaders(partial_n=8, **kwargs)
    if way=='by_dls':
        opened.clear()
        dls.fit_stats(**custom)
    def twice(i): return opened[i:i+16]==opened[i+16:i+32]
    def once_each(i): return sorted(opened[i+32:i+50])==sorted(ds.train.items)
    start = next((i for i in range(3) if twice(i) and once_each(i)),
                 None)  # one item tells what kind they are; fastai looks at one for the validation loader
    assert start is not None, opened
    looks = opened[start:start+32]
    assert len({*looks})==16 and {*looks}<={*ds.train.items}
    assert len(passes)==1 and len(opened)<=18+32+2
    assert type(dls.train) is make and len(torch.cat([b[1] for b in dls.train]))==(16 if make is WeightedDL else 8)
    check_fold(dls)

# --- 14: making and iterating a loader consumes the global random states, so that a fit changes the training order

def states(): return random.getstate(),pickle.dumps(np.random.get_state()),torch.get_rng_state().tolist()

def test_14_fit_leaves_the_random_states_alone(folder):
    crop = RandomResizedCrop(8)
    dls = block(item_tfms=[crop]).dataloaders(folder, **cpu)
    set_seed(5)
    was = states()
    block(Dihedral(), item_tfms=[crop], splitter=RandomSplitter(seed=None)).fit_stats(folder, **custom, **cpu)
    assert states()==was
    dls.fit_stats(**custom)
    assert states()==was

@pytest.mark.slow
@ways
def test_14_fit_leaves_training_order_and_augmentation_alone(folder, way):
    "Two epochs after a fit are bit by bit those with the same numbers given by hand"
    def run(make):
        set_seed(3)
        dls = make()
        return dls,[b for _ in range(2) for b in dls.train]
    item_tfms = [RandomResizedCrop(8, min_scale=.5)]
    dls,got = run(lambda: way(folder, Dihedral(), item_tfms=item_tfms))
    numbers = [getattr(stats_of(dls.train), k).clone() for k in ('mean', 'std')]
    _,want  = run(lambda: block(Dihedral(), Normalize(*numbers), item_tfms=item_tfms).dataloaders(folder, **cpu))
    assert len(got)==len(want)==8
    for a,b in zip(got, want):
        assert a[1].tolist()==b[1].tolist()
        np.testing.assert_allclose(a[0], b[0], atol=1e-6)

def test_14_numbers_do_not_depend_on_the_random_states(folder):
    res = []
    for seed in (1, 2):
        set_seed(seed)
        res.append(lazy(folder, Dihedral(), item_tfms=[RandomResizedCrop(8, min_scale=.3)]).stats_choice.stats)
    assert res[0]==res[1]

# --- 16: a training loader drops its last batch, and RandomSplitter splits anew at every call

@ways
@pytest.mark.parametrize('bs', [4, 7, 18, 64])
def test_16_dropped_last_batch_is_measured(folder, way, bs, monkeypatch):
    "Also when there is less than one batch, of which fastai makes none"
    monkeypatch.setitem(cpu, 'bs', bs)
    dls = way(folder)
    assert dls.train.drop_last and dls.stats_choice.measured.n_images==18
    check_fold(dls)

def test_16_unseeded_splitter_keeps_the_measured_split(folder, passes):
    "Training goes on with exactly the files that were measured, and without a second pass"
    for splitter in (RandomSplitter(.25), None):
        db = DataBlock((ImageBlock, CategoryBlock), get_items=sorted_files, get_y=parent_label, splitter=splitter)
        db.fit_stats(folder, **custom, **cpu)
        train = {tuple(db.dataloaders(folder, **cpu).train_ds.items) for _ in range(3)}
        assert len(train)==1
        check_fold(db.dataloaders(folder, **cpu))
    assert len(passes)==2

def test_16_unseeded_splitter_without_fit_stats_is_measured_per_split(folder):
    db = block(DatasetStats(**custom), splitter=RandomSplitter(.25))
    all_dls = [db.dataloaders(folder, **cpu) for _ in range(3)]
    assert len({tuple(dls.train_ds.items) for dls in all_dls})==3
    for dls in all_dls: check_fold(dls)

def test_16_kept_split_follows_new_files(folder):
    db = block(splitter=KeptSplit(RandomSplitter(.25))).fit_stats(folder, **custom, **cpu)
    image_folder(folder, n=30, seed=2)
    with pytest.warns(UserWarning, match='different: training items'): dls = db.dataloaders(folder, **cpu)
    assert len(dls.train_ds)+len(dls.valid_ds)==30
    check_fold(dls)

# --- 17: an exported learner needs the class importable; pipelines name transforms after their class

@ways
def test_17_name_in_the_pipeline(folder, way):
    dls = way(folder)
    for dl in (*dls.loaders, dls.test_dl(dls.valid_ds.items),
               dls.new_empty().train): assert dl.after_batch.dataset_stats is stats_of(dl)

_load = """
    import sys, torch
    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.split('.')[0]=='fastai_normstats': raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Block())
    from fastai.learner import load_learner
    for f in (lambda p: torch.load(p, weights_only=False), load_learner):
        try: f('learn.pkl')
        except Exception as e: print(f"{type(e).__name__}: {e}")
        else: print('loaded')
    del sys.meta_path[0]
    import numpy as np
    from fastai.callback.progress import *
    learn = load_learner('learn.pkl')
    files = open('files.txt').read().splitlines()
    with learn.no_bar(): np.save('preds.npy', learn.get_preds(dl=learn.dls.test_dl(files, num_workers=0))[0])
"""

@pytest.fixture(scope='module')
def loaded(tmp_path_factory):
    """What a fresh process says that loads an exported learner without this package; predictions from here, and from
    there with it"""
    path = tmp_path_factory.mktemp('learner')
    dls = by_block(image_folder(path/'images'))
    set_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    learn = Learner(dls, model, CrossEntropyLossFlat(), path=path)
    with learn.no_bar(): want = learn.get_preds(dl=dls.test_dl(dls.valid_ds.items))[0]
    learn.export('learn.pkl')
    (path/'files.txt').write_text('\n'.join(map(str, dls.valid_ds.items)))
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', dedent(_load)], cwd=path, capture_output=True,
                         text=True, timeout=300)
    assert res.returncode==0, res.stderr
    return res.stdout.splitlines(),want,np.load(path/'preds.npy')

@pytest.mark.slow
def test_17_loading_where_the_package_is_needs_no_import(loaded): np.testing.assert_allclose(loaded[2], loaded[1],
    atol=1e-6)

@pytest.mark.slow
def test_17_unpickling_without_the_package_names_it(loaded):
    assert loaded[0][0].startswith("ModuleNotFoundError: No module named 'fastai_normstats")

def test_17_without_the_package_the_hard_coded_line_does(folder):
    "`code()` gives a plain Normalize of the same numbers, whose loaders pickle without this package"
    choice = by_block(folder).stats_choice
    dls = block(eval(choice.code().split('#')[0], dict(Normalize=Normalize))).dataloaders(folder, **cpu)
    check_fold(dls)
    assert b'fastai_normstats' not in pickle.dumps(dls.new_empty())
