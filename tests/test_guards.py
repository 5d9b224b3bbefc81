"Each guard on images that trigger it and on such that must not; every fit runs them, none opens a validation image or changes a draw"

import random,re,warnings

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import (CategoryBlock,DataBlock,Datasets,ImageBlock,ImageDataLoaders,IndexSplitter,IntToFloatTensor,MaskBlock,Normalize,PILImage,
                               PILImageBW,RandomErasing,Resize,ToTensor,Transform,TransformBlock,aug_transforms,get_image_files,imagenet_stats,parent_label)
from fastai.data.core import DataLoaders,TfmdDL
from fastai.torch_core import TensorImage
from PIL import Image
from sklearn.datasets import load_digits,load_sample_images
from torchvision.transforms import v2

from fastai_normstats.all import DatasetStats
from fastai_normstats.guards import check_images,off_range
from fastai_normstats.models import IMAGENET
from fastai_normstats.running import NormStats,RunningStats
from helpers import image_folder

small = dict(bs=4, num_workers=0)
quiet = dict(verbose=False)

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return image_folder(tmp_path_factory.mktemp('guards')/'images', n=24)

def block(blocks=ImageBlock, **kwargs):
    kwargs = {'item_tfms': Resize(16), 'splitter': IndexSplitter(range(0, 24, 4)), 'get_items': lambda p: sorted(get_image_files(p)), **kwargs}
    return DataBlock(blocks, n_inp=1, **kwargs)

def said(f, *args, **kwargs):
    "What `f` warns of"
    with warnings.catch_warnings(record=True) as res:
        warnings.simplefilter('always')
        f(*args, **kwargs)
    return [str(w.message) for w in res if issubclass(w.category, UserWarning)]

class After(Transform):
    "Applied to images; every batch transform below is one of these"
    def __init__(self, f, order=50): self.f,self.order = f,order
    def encodes(self, x:TensorImage): return self.f(x)

class Untyped(Transform):
    order = 100
    def encodes(self, x): return x

# --- guards that a fit must raise, and numbers they must name

mean,std = (torch.tensor(o).view(1, 3, 1, 1) for o in imagenet_stats)
def channel(x, c, v): x = x.clone(); x[:, c] = v; return x

wrong = dict(
    imagenet   = ([After(lambda x: ((1.5*x-.25).clamp(0, 1)-mean)/std)],            "normalised already .*where ImageNet's"),
    to_one     = ([After(lambda x: 2*(x-x.amin())/(x.amax()-x.amin())-1)], r'normalised already \(they fill \[-1, 1\]'),
    zscore     = ([After(lambda x: (x-x.mean())/x.std())],'normalised already .*mean and std are near 0 and 1'),
    unscaled   = ([After(lambda x: x*255)],                   'run from .* to .*255'),
    twelve_bit = ([After(lambda x: x*4095/65535)],            r'use .*% of the range.*12-bit'),
    constant   = ([After(lambda x: channel(x, 1, .5))],       r'channel 1 is constant \(0.5\)'),
    border     = ([After(lambda x: torch.nn.functional.pad(x, [8]*4))], r'7\d% of the pixels are background \(value 0\).*mask='),
    late       = ([After(lambda x: x*1.1, order=100)],        r'After \(order 100\) comes after Normalize \(order 99\)'),
    untyped    = ([Untyped()],                                r'Untyped \(order 100\) comes after Normalize'))

@pytest.mark.parametrize('name', wrong)
@pytest.mark.parametrize('way', ['block', 'loaders', 'lazy'])
@pytest.mark.parametrize('kwargs', [dict(stats='custom'), dict(pretrained=False)], ids=str)
def test_triggered(folder, name, way, kwargs):
    tfms,match = wrong[name]
    if   way=='block':   res = said(block(batch_tfms=tfms).fit_stats, folder, **kwargs, **quiet, **small)
    elif way=='loaders': res = said(block(batch_tfms=tfms).dataloaders(folder, **small).fit_stats, **kwargs, **quiet)
    else:                res = said(block(batch_tfms=[*tfms, DatasetStats(**kwargs, **quiet)]).dataloaders, folder, **small)
    found = [s for s in res if re.search(match, s)]
    assert len(found)==1, res

@pytest.mark.parametrize('name', ['imagenet', 'unscaled', 'late'])
@pytest.mark.parametrize('kwargs', [dict(stats='imagenet'), dict(model='rad-dino'), dict(frozen=True)], ids=str)
def test_triggered_without_a_pass(folder, name, kwargs):
    res = said(block(batch_tfms=wrong[name][0]).fit_stats, folder, **kwargs, **quiet, **small)
    assert sum(bool(re.search(wrong[name][1], s)) for s in res)==1 or 'cannot apply' in ' '.join(res), res

def test_each_guard_speaks_once_and_is_kept_with_the_choice(folder):
    db = block(batch_tfms=wrong['late'][0])
    res = said(db.fit_stats, folder, **quiet, **small)
    assert len(res)==1 and res[0] in db.stats_choice.warnings and res[0] in str(db.stats_choice)
    assert not said(db.dataloaders, folder, **small)

@pytest.mark.parametrize('kwargs', [dict(model='chexzero'), dict(stats='chexzero'), dict(model='chexzero', frozen=True)], ids=str)
def test_0_to_255_is_right_for_numbers_made_for_it(folder, kwargs):
    db = block(batch_tfms=After(lambda x: x*255))
    assert not said(db.fit_stats, folder, **kwargs, **quiet, **small) and db.stats_choice.stats.mean==(101.48761,)*3

def test_unused_range_without_a_pass(folder):
    assert 'divided by too much' in ' '.join(said(block(batch_tfms=wrong['twelve_bit'][0]).fit_stats, folder, stats='imagenet', **quiet, **small))

def test_background_is_said_of_measured_statistics_only(folder):
    db = block(batch_tfms=wrong['border'][0])
    assert not said(db.fit_stats, folder, **quiet, **small) and db.stats_choice.kind=='imagenet'

def test_iterable_sets_are_refused_as_ever():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self): yield TensorImage(torch.rand(3, 8, 8)),
    with pytest.raises(TypeError, match='must be indexed and have a length'): DataLoaders(TfmdDL(Endless(), bs=2, num_workers=0)).fit_stats(stats='imagenet', **quiet)

def test_masked_background_is_silent(folder):
    db = block(batch_tfms=wrong['border'][0])
    assert not said(db.fit_stats, folder, mask=lambda x: x[:, :1]>0, stats='custom', **quiet, **small)

def test_the_suggested_mask_works(folder):
    db = block(batch_tfms=wrong['border'][0])
    text = next(s for s in said(db.fit_stats, folder, stats='custom', **quiet, **small) if 'mask=' in s).split('`')[1]
    mask = eval(text.removeprefix('mask='))
    assert not said(db.fit_stats, folder, mask=mask, stats='custom', **quiet, **small)

def test_numbers_for_another_range(folder):
    hu = block(batch_tfms=After(lambda x: x*4000-1000))
    assert 'imagenet statistics are for images from 0 to 1' in ' '.join(said(hu.fit_stats, folder, stats='imagenet', **quiet, **small))
    assert not said(hu.fit_stats, folder, stats=([500]*3, [900]*3), **quiet, **small)  # numbers of one's own

# --- 16 bits

def deep_folder(path, n=12, top=3000, **kwargs):
    rng = np.random.default_rng(0)
    path.mkdir(exist_ok=True)
    for i in range(n): Image.fromarray(rng.integers(0, top, (16, 16), dtype=np.uint16)).save(path/f'{i:02}.png', **kwargs)
    return path

def deep(f): return TensorImage(np.array(Image.open(f), dtype=np.float32)[None])
def windowed(f): return PILImageBW.create((np.clip(np.array(Image.open(f))/3000, 0, 1)*255).astype(np.uint8))
split = dict(splitter=IndexSplitter([0, 5]), item_tfms=[])

@pytest.mark.parametrize('blocks', [ImageBlock, ImageBlock(PILImageBW)], ids=['PILImage', 'PILImageBW'])
@pytest.mark.parametrize('kwargs', [dict(), dict(stats='custom'), dict(pretrained=False), dict(frozen=True), dict(max_images=3)], ids=str)
def test_16_bit_clipped(tmp_path, blocks, kwargs):
    path = deep_folder(tmp_path/'deep')
    res = [s for s in said(block(blocks, **split).fit_stats, path, **kwargs, **quiet, **small) if 'clipped' in s]
    assert len(res)==1
    for part in ('.png holds values from', 'loaded as 8 bits', 'FloatImageBlock()'): assert part in res[0]
    share = np.mean([np.array(Image.open(f))>255 for f in path.iterdir()])
    assert abs(int(res[0].split('% of its pixels')[0].split()[-1])/100-share)<.05

@pytest.mark.parametrize('blocks', [TransformBlock(type_tfms=deep), TransformBlock(type_tfms=windowed), TransformBlock(type_tfms=[deep, lambda x: x-1024])],
                         ids=['floats', 'windowed', 'HU'])
def test_16_bit_loaded_well(tmp_path, blocks):
    assert not [s for s in said(block(blocks, **split).fit_stats, deep_folder(tmp_path/'deep'), pretrained=False, **quiet, **small) if 'clipped' in s]

def test_the_remedy_that_the_guard_names(tmp_path):
    "A class of floats: resized like any image, nothing clipped, the numbers of numpy"
    import fastai_normstats.all
    path,scope = deep_folder(tmp_path/'deep'),vars(fastai_normstats.all)
    text = next(s for s in said(block(**split).fit_stats, path, **quiet, **small) if 'clipped' in s).split('`')
    db = block(eval(text[1], scope), **split)
    assert not [s for s in said(db.fit_stats, path, pretrained=False, **quiet, **small) if 'clipped' in s]
    x = np.stack([np.array(Image.open(f)) for f in db.dataloaders(path, **small).train_ds.items])
    np.testing.assert_allclose([db.stats_choice.measured.mean.item(), db.stats_choice.measured.std.item()], [x.mean(), x.std()], rtol=1e-6)
    assert block(eval(text[1], scope), splitter=split['splitter'], item_tfms=Resize(8)).dataloaders(path, **small).one_batch()[0].shape==(4, 1, 8, 8)

def test_16_bit_files_with_8_bit_values(tmp_path): assert not said(block(**split).fit_stats, deep_folder(tmp_path/'deep', top=256), pretrained=False, **quiet, **small)

def test_other_containers(tmp_path):
    rng = np.random.default_rng(0)
    for k,dtype in (('i32', np.int32), ('f32', np.float32), ('u16', np.uint16)):
        path = tmp_path/k
        path.mkdir()
        for i in range(8): Image.fromarray((rng.random((16, 16))*3000).astype(dtype)).save(path/f'{i}.tif')
        assert [s for s in said(block(**split).fit_stats, path, pretrained=False, **quiet, **small) if 'clipped' in s], k

def test_16_bit_from_a_table(tmp_path):
    deep_folder(tmp_path/'deep')
    df = pd.DataFrame(dict(name=[f'{i:02}.png' for i in range(12)], label=list('ab')*6))
    dls = ImageDataLoaders.from_df(df, tmp_path, folder='deep', valid_pct=.3, **small)
    assert [s for s in said(dls.fit_stats, pretrained=False, **quiet) if 'clipped' in s]

# --- the pipeline

def test_normalised_twice(folder):
    "torchvision's Normalize before fastai's"
    dls = block(batch_tfms=Transform(v2.Normalize(*map(list, IMAGENET)), order=50)).dataloaders(folder, **small)
    res = said(dls.fit_stats, pretrained=False, **quiet)
    assert ['2 transforms normalise (Normalize, DatasetStats)' in s for s in res].count(True)==1
    assert said(dls.check_stats, **quiet)[0]==next(s for s in res if '2 transforms' in s)

def test_uint8_that_nobody_scaled(folder):
    files = sorted(get_image_files(folder))
    dsets = Datasets(files, [[PILImage.create], [parent_label]], splits=IndexSplitter([0, 1])(files))
    dls = dsets.dataloaders(after_item=[Resize(16), ToTensor()], bs=4, num_workers=0)
    res = said(dls.fit_stats, pretrained=False, **quiet)
    assert len(res)==1 and 'IntToFloatTensor' in res[0]
    res = said(dls.fit_stats, **quiet)  # the rule `range` says it then
    assert len(res)==1 and 'IntToFloatTensor' in res[0] and dls.stats_choice.rule=='range'

def test_less_than_a_batch(folder):
    dls = block().dataloaders(folder, bs=64, num_workers=0)
    assert ['18 images, less than one batch of 64' in s and '`bs=16`' in s for s in said(dls.fit_stats, **quiet)]==[True]
    assert len(dls.train)==0 and len(block().dataloaders(folder, bs=16, num_workers=0).train)==1
    assert not said(block().fit_stats, folder, num_workers=0, **quiet)  # nobody has said how they will be trained on

def test_erasing_and_other_types_may_come_after(folder):
    class Labels(Transform):
        order = 110
        def encodes(self, x:int): return x
    class Back(Transform):
        order = 111
        def decodes(self, x:TensorImage): return x
    assert not said(block(batch_tfms=[RandomErasing(p=1.), Labels(), Back()]).fit_stats, folder, **quiet, **small)

# --- no false alarms

def write(images, path):
    path.mkdir()
    for i,a in enumerate(images): Image.fromarray(a).save(path/f'{i:04}.png')
    return path

def digits(path): return write([(a*255/16).round().astype(np.uint8) for a in load_digits().images], path)

def photographs(path):
    "Crops of scikit-learn's two photographs"
    return write([im[y:y+96, x:x+96] for im in load_sample_images().images for y in range(0, 420, 60) for x in range(0, 520, 60)], path)

@pytest.mark.parametrize('images', [digits, photographs])
@pytest.mark.parametrize('kwargs', [dict(), dict(pretrained=False), dict(stats='imagenet'), dict(model='resnet34'), dict(frozen=True)], ids=str)
@pytest.mark.parametrize('tfms', [[], aug_transforms()], ids=['plain', 'augmented'])
def test_no_false_alarm(tmp_path, images, kwargs, tfms):
    path = images(tmp_path/'images')
    db = block(item_tfms=Resize(32, method='squish'), batch_tfms=tfms, splitter=IndexSplitter(range(0, 40)))
    assert not said(db.fit_stats, path, bs=32, num_workers=0, **kwargs, **quiet)
    assert not said(db.dataloaders(path, bs=32, num_workers=0).check_stats, **quiet)

def test_segmentation(tmp_path, folder):
    masks = tmp_path/'masks'
    masks.mkdir()
    for i in range(24): Image.fromarray(np.zeros((16, 16), np.uint8)).save(masks/f'{i:03}.png')
    db = block((ImageBlock, MaskBlock), get_y=lambda f: masks/f.name)
    assert not said(db.fit_stats, folder, **quiet, **small)

# --- without a trace

def test_no_validation_image_is_opened(tmp_path):
    path = deep_folder(tmp_path/'deep')
    for i in (0, 5): (path/f'{i:02}.png').write_text('not an image')
    for kwargs in (dict(pretrained=False), dict(stats='imagenet')): assert any('clipped' in s for s in said(block(**split).fit_stats, path, **kwargs, **quiet, **small))

@pytest.mark.parametrize('kwargs', [dict(stats='imagenet'), dict(frozen=True), dict()], ids=str)
def test_draws_are_as_without(folder, kwargs):
    def draws(fit):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        dls = block(batch_tfms=aug_transforms()).dataloaders(folder, **small)
        if fit: said(dls.fit_stats, **kwargs, **quiet)
        return random.random(), np.random.rand(), torch.rand(1).item(), [str(i) for i in dls.train.get_idxs()]
    assert draws(True)==draws(False)

def test_items_of_any_kind():
    "Datasets without files, transforms or tls: nothing to look at, nothing to say"
    x = [(TensorImage(torch.rand(3, 8, 8)), i) for i in range(40)]
    dl = TfmdDL(x, bs=4, num_workers=0, shuffle=True)
    assert not said(DataLoaders(dl).fit_stats, **quiet)

def test_few_pixels_are_judged_leniently():
    "Five images with a border: no word on background before a hundred were seen"
    m = RunningStats().update(torch.nn.functional.pad(torch.rand(5, 3, 8, 8), [4]*4))
    assert len(check_images(m))==1
    m.complete = False
    assert not check_images(m)

@pytest.mark.parametrize('scale,stats,said', [(1, 255, True), (1, 1/255, True), (255, 1, True), (255, 255, False), (1, 1, False), (1, 4, False), (4095, 4095, False)])
def test_numbers_for_another_range(tmp_path, scale, stats, said):
    "Given by hand, on pixels from 0 to `scale`: they leave no contrast, or far too much; numbers that merely differ are nobody's mistake"
    images = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))*scale
    m = RunningStats(value_range=(0., float(scale))).update(images)
    text = off_range(m, NormStats([.45*stats]*3, [.25*stats]*3))
    assert (text is not None and 'for another range' in text)==said
