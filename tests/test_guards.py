"""Each guard on images that trigger it and on such that must not; every fit runs them, none opens a validation image
or changes a draw"""

import os,random,re,warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import (DataBlock,Datasets,ImageBlock,ImageDataLoaders,IndexSplitter,MaskBlock,
                               PILImage,PILImageBW,RandomErasing,Resize,
                               ToTensor,Transform,TransformBlock,aug_transforms,get_image_files,imagenet_stats,
                               parent_label)
from fastai.data.core import DataLoaders,TfmdDL
from fastai.torch_core import TensorImage
from PIL import Image
from sklearn.datasets import load_digits,load_sample_images
from torchvision.transforms import v2

from fastai_normstats.all import DatasetStats
from fastai_normstats.guards import check_images,check_ledger,families,influential,masks_among,off_range,reach
from fastai_normstats.models import IMAGENET
from fastai_normstats.values import NormStats
from fastai_normstats.running import RunningStats
from helpers import image_folder

small = dict(bs=4, num_workers=0)
quiet = dict(verbose=False)

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return image_folder(tmp_path_factory.mktemp('guards')/'images', n=24)

def block(blocks=ImageBlock, **kwargs):
    kwargs = {'item_tfms': Resize(16), 'splitter': IndexSplitter(range(0, 24, 4)),
              'get_items': lambda p: sorted(get_image_files(p)), **kwargs}
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
    imagenet   = ([After(lambda x: ((1.5*x-.25).clamp(0, 1)-mean)/std)],
                  "normalised already .*where ImageNet's"),
    to_one     = ([After(lambda x: 2*(x-x.amin())/(x.amax()-x.amin())-1)], r'normalised already \(they fill \[-1, 1\]'),
    zscore     = ([After(lambda x: (x-x.mean())/x.std())],'normalised already .*mean and std are near 0 and 1'),
    unscaled   = ([After(lambda x: x*255)],                   'run from .* to .*255'),
    twelve_bit = ([After(lambda x: x*4095/65535)],            r'use .*% of the range.*12-bit'),
    constant   = ([After(lambda x: channel(x, 1, .5))],       r'channel 1 is constant \(0.5\)'),
    border     = ([After(lambda x: torch.nn.functional.pad(x, [8]*4))],
                  r'7\d% of the pixels are background \(value 0\).*mask='),
    late       = ([After(lambda x: x*1.1, order=100)],
                  r'After \(order 100\) comes after Normalize \(order 99\)'),
    untyped    = ([Untyped()],                                r'Untyped \(order 100\) comes after Normalize'))

@pytest.mark.parametrize('name', wrong)
@pytest.mark.parametrize('way', ['block', 'loaders', 'lazy'])
@pytest.mark.parametrize('kwargs', [dict(stats='custom'), dict(pretrained=False)], ids=str)
def test_triggered(folder, name, way, kwargs):
    tfms,match = wrong[name]
    if   way=='block':   res = said(block(batch_tfms=tfms).fit_stats, folder, **kwargs, **quiet, **small)
    elif way=='loaders': res = said(block(batch_tfms=tfms).dataloaders(folder, **small).fit_stats, **kwargs, **quiet)
    else:                res = said(block(batch_tfms=[*tfms, DatasetStats(**kwargs, **quiet)]).dataloaders, folder,
                                    **small)
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

@pytest.mark.parametrize('kwargs', [dict(model='chexzero'), dict(stats='chexzero'),
                                    dict(model='chexzero', frozen=True)], ids=str)
def test_0_to_255_is_right_for_numbers_made_for_it(folder, kwargs):
    db = block(batch_tfms=After(lambda x: x*255))
    assert not said(db.fit_stats, folder, **kwargs, **quiet, **small) and db.stats_choice.stats.mean==(101.48761,)*3

def test_unused_range_without_a_pass(folder):
    assert 'divided by too much' in ' '.join(said(block(batch_tfms=wrong['twelve_bit'][0]).fit_stats, folder,
                                                  stats='imagenet', **quiet, **small))

def test_background_is_said_of_measured_statistics_only(folder):
    db = block(batch_tfms=wrong['border'][0])
    assert not said(db.fit_stats, folder, **quiet, **small) and db.stats_choice.kind=='imagenet'

def test_iterable_sets_are_refused_as_ever():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self): yield TensorImage(torch.rand(3, 8, 8)),
    with pytest.raises(TypeError, match='must be indexed and have a length'):
        DataLoaders(TfmdDL(Endless(), bs=2, num_workers=0)).fit_stats(stats='imagenet', **quiet)

def test_masked_background_is_silent(folder):
    db = block(batch_tfms=wrong['border'][0])
    assert not said(db.fit_stats, folder, mask=lambda x: x[:, :1]>0, stats='custom', **quiet, **small)

def test_a_mask_that_was_given_is_not_answered_with_another(folder):
    db = block(batch_tfms=wrong['border'][0])
    def most(x): return (torch.arange(x.shape[-1], device=x.device)>0).expand_as(x[:, :1])
    assert not said(db.fit_stats, folder, mask=most, stats='custom', **quiet, **small)

def test_the_suggested_mask_works(folder):
    db = block(batch_tfms=wrong['border'][0])
    text = next(s for s in said(db.fit_stats, folder, stats='custom', **quiet, **small) if 'mask=' in s).split('`')[1]
    mask = eval(text.removeprefix('mask='))
    assert not said(db.fit_stats, folder, mask=mask, stats='custom', **quiet, **small)

def test_numbers_for_another_range(folder):
    hu = block(batch_tfms=After(lambda x: x*4000-1000))
    assert 'imagenet statistics are for images from 0 to 1' in ' '.join(said(hu.fit_stats, folder, stats='imagenet',
        **quiet, **small))
    assert not said(hu.fit_stats, folder, stats=([500]*3, [900]*3), **quiet, **small)  # numbers of one's own

# --- 16 bits

def deep_folder(path, n=12, top=3000, **kwargs):
    rng = np.random.default_rng(0)
    path.mkdir(exist_ok=True)
    for i in range(n):
        Image.fromarray(rng.integers(0, top, (16, 16), dtype=np.uint16)).save(path/f'{i:02}.png', **kwargs)
    return path

def deep(f): return TensorImage(np.array(Image.open(f), dtype=np.float32)[None])
def windowed(f): return PILImageBW.create((np.clip(np.array(Image.open(f))/3000, 0, 1)*255).astype(np.uint8))
split = dict(splitter=IndexSplitter([0, 5]), item_tfms=[])

@pytest.mark.parametrize('blocks', [ImageBlock, ImageBlock(PILImageBW)], ids=['PILImage', 'PILImageBW'])
@pytest.mark.parametrize('kwargs', [dict(), dict(stats='custom'), dict(pretrained=False), dict(frozen=True),
                                    dict(max_images=3)], ids=str)
def test_16_bit_clipped(tmp_path, blocks, kwargs):
    path = deep_folder(tmp_path/'deep')
    res = [s for s in said(block(blocks, **split).fit_stats, path, **kwargs, **quiet, **small) if 'clipped' in s]
    assert len(res)==1
    for part in ('.png holds values from', 'loaded as 8 bits', 'FloatImageBlock()'): assert part in res[0]
    share = np.mean([np.array(Image.open(f))>255 for f in path.iterdir()])
    assert abs(int(res[0].split('% of its pixels')[0].split()[-1])/100-share)<.05

@pytest.mark.parametrize('blocks', [TransformBlock(type_tfms=deep), TransformBlock(type_tfms=windowed),
                                    TransformBlock(type_tfms=[deep, lambda x: x-1024])],
                         ids=['floats', 'windowed', 'HU'])
def test_16_bit_loaded_well(tmp_path, blocks):
    assert not [s for s in said(block(blocks, **split).fit_stats, deep_folder(tmp_path/'deep'), pretrained=False,
                                **quiet, **small) if 'clipped' in s]

def test_the_remedy_that_the_guard_names(tmp_path):
    "A class of floats: resized like any image, nothing clipped, the numbers of numpy"
    import fastai_normstats.all
    path,scope = deep_folder(tmp_path/'deep'),vars(fastai_normstats.all)
    text = next(s for s in said(block(**split).fit_stats, path, **quiet, **small) if 'clipped' in s).split('`')
    db = block(eval(text[1], scope), **split)
    assert not [s for s in said(db.fit_stats, path, pretrained=False, **quiet, **small) if 'clipped' in s]
    x = np.stack([np.array(Image.open(f)) for f in db.dataloaders(path, **small).train_ds.items])
    np.testing.assert_allclose([db.stats_choice.measured.mean.item(), db.stats_choice.measured.std.item()],
                               [x.mean(), x.std()], rtol=1e-6)
    assert block(eval(text[1], scope), splitter=split['splitter'],
                 item_tfms=Resize(8)).dataloaders(path, **small).one_batch()[0].shape==(4, 1, 8, 8)

def test_16_bit_files_with_8_bit_values(tmp_path): assert not said(block(**split).fit_stats,
    deep_folder(tmp_path/'deep', top=256),
    pretrained=False, **quiet, **small)

def test_other_containers(tmp_path):
    rng = np.random.default_rng(0)
    for k,dtype in (('i32', np.int32), ('f32', np.float32), ('u16', np.uint16)):
        path = tmp_path/k
        path.mkdir()
        for i in range(8): Image.fromarray((rng.random((16, 16))*3000).astype(dtype)).save(path/f'{i}.tif')
        assert [s for s in said(block(**split).fit_stats, path, pretrained=False, **quiet, **small)
                if 'clipped' in s], k

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
    assert ['18 images, less than one batch of 64' in s and '`bs=16`' in s
            for s in said(dls.fit_stats, **quiet)]==[True]
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
    return write([im[y:y+96, x:x+96] for im in load_sample_images().images for y in range(0, 420, 60)
                  for x in range(0, 520, 60)], path)

@pytest.mark.slow
@pytest.mark.parametrize('images', [digits, photographs])
@pytest.mark.parametrize('kwargs', [dict(), dict(pretrained=False), dict(stats='imagenet'), dict(model='resnet34'),
                                    dict(frozen=True)], ids=str)
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
    for kwargs in (dict(pretrained=False),
                   dict(stats='imagenet')): assert any('clipped' in s for s in said(block(**split).fit_stats, path,
        **kwargs, **quiet, **small))

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

@pytest.mark.parametrize('scale,stats,wrong', [(1, 255, True), (1, 1/255, True), (255, 1, True), (255, 255, False),
                                               (1, 1, False), (1, 4, False), (4095, 4095, False)])
def test_numbers_by_hand_for_another_range(scale, stats, wrong):
    """Given by hand, on pixels from 0 to `scale`: they leave no contrast, or far too much; numbers that merely differ
    are nobody's mistake"""
    images = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))*scale
    m = RunningStats().update(images)
    text = off_range(m, NormStats([.45*stats]*3, [.25*stats]*3))
    assert (text is not None and 'for another range' in text)==wrong

# --- the ledger: families

def ledger(x, items=None, groups=None, mask=None): return RunningStats().update(torch.as_tensor(x), mask, items=items,
    groups=groups)

def of_patients(n=40, k=4, seed=0):
    "`k` images (n·k, 1, 6, 6) of each of `n` patients, whose brightness is mostly the patient's"
    rng = np.random.default_rng(seed)
    return .5+.1*rng.normal(size=(n, 1, 1, 1)).repeat(k, 0)+.03*rng.normal(size=(n*k, 1, 1, 1)) \
        +.05*rng.normal(size=(n*k, 1, 6, 6))

def names(form, n=40, k=4): return [form.format(p=p, i=i, j=p*k+i) for p in range(n) for i in range(k)]

def suggested(text):
    "The groups that a guard's sentence suggests, evaluated where fastai's names are known"
    import fastai.vision.all
    return eval(text.split('`groups=')[1].split('`')[0], {**vars(fastai.vision.all)})

def reference_correlation(y, groups):
    "Fisher's intra-class correlation: the mean product of all pairs of a group over the variance, pair by pair"
    d = np.asarray(y)-np.mean(y)
    products = [d[i]*d[j] for i in range(len(d)) for j in range(i) if groups[i]==groups[j]]
    return np.mean(products)/d.var()

def reference_effect(x, groups):
    """The larger design effect, of mean or std, of equally large images (n, 1, h, w): ratio estimators (Cochran 1977,
    §6)"""
    d = x-x.mean()
    codes = pd.factorize(pd.Series(groups))[0]
    def squared_se(t): return len(t)/(len(t)-1)*(t**2).sum()
    parts = [o.sum((1, 2, 3)) for o in (d, d**2-(d**2).mean())]
    return max(squared_se(np.bincount(codes, o))/squared_se(o) for o in parts)

@pytest.mark.parametrize('form', ['{p:08}_{i:03}.png', 'train/p{p}-{i}.jpg', 'D:\\scans\\case {p} {i}.tif',
    'a.b/1.2.840.{p}.{i}.dcm', 'vol{p}_slice_{i}.png', '{p:08}_{i:03}', 'person{p}_virus_{j}.jpeg'])
def test_families(form):
    x,items = of_patients(),names(form)
    text,whose = families(ledger(x, items)),[p for p in range(40) for _ in range(4)]
    rho,effect = reference_correlation(x.mean((1, 2, 3)), whose),reference_effect(x, whose)
    assert '160 images share 40 beginnings' in text and f'correlation {rho:.2f})' in text
    assert f'design effect {effect:.2f})' in text
    f = suggested(text)
    if '\\' not in form:
        for kind in (str, Path): assert pd.factorize(pd.Series([f(kind(o)) for o in items]))[0].tolist()==whose
        assert families(ledger(x, items, [f(o) for o in items])) is None  # groups are known now

@pytest.mark.parametrize('form', ['IMG_{j:04}.png', '{j:05}.jpg', 'cat.{j}.jpg', 'a/n01440764/n01440764_{j}.JPEG',
    'n01440764/images/n01440764_{j}.JPEG', 'D:\\n01440764\\n01440764_{j}.JPEG',
    'DSC{j:05}.JPG', '{j}', 'frame-{j}.png', 'x{p}y{i}.png', 'p{p}_a.png', '.{p}', '{p}/{i}.png'])
def test_names_that_say_nothing_of_families(form):
    "However alike neighbours are"
    assert families(ledger(of_patients(), names(form))) is None

@pytest.mark.parametrize('seed', range(20))
def test_names_like_those_of_families_on_strangers(seed):
    "Random numbers in the names, in pairs and in tens"
    rng = np.random.default_rng(seed)
    x = of_patients(seed=seed)[rng.permutation(160)]
    for form in ('{p}_{i}.png', 'p{i}-{p}.png'): assert families(ledger(x, names(form))) is None
    assert families(ledger(x, [f'{a}_{b}.png' for a,b in rng.integers(0, 10**6, (160, 2))])) is None
    assert families(ledger(of_patients(seed=seed),
                           [f'{a}_{b}.png' for a,b in rng.integers(0, 10**6, (160, 2))])) is None

def test_few_families_say_nothing():
    for n,k in ((19, 4), (60, 1)): assert families(ledger(of_patients(n, k), names('p{p}_{i}.png', n, k))) is None
    x,items = of_patients(60, 2),names('p{p}_{i}.png', 60, 2)
    rows = [i for i in range(120) if i%2==0 or i<18]  # nine families of two
    assert families(ledger(x[rows], [items[i] for i in rows])) is None

def test_a_fit_tells_of_families(tmp_path):
    "And is silent with the groups that it suggests; the split has them then, too"
    x = of_patients(30, 3)
    for a,name in zip(x, names('p{p:02}_{i}.png', 30, 3)):
        Image.fromarray((a[0].clip(0, 1)*255).round().astype(np.uint8)).save(tmp_path/name)
    db = block(splitter=IndexSplitter([]), item_tfms=None, blocks=ImageBlock(PILImageBW))
    res = said(db.fit_stats, tmp_path, stats='custom', **quiet, **small)
    assert len(res)==1 and 'families' in res[0] and res[0] in db.stats_choice.warnings
    assert not said(db.fit_stats, tmp_path, stats='custom', groups=suggested(res[0]), **quiet, **small)
    m = db.stats_choice.measured
    assert m.n_groups==30 and f'design effect {m.design_effect.max():.2f})' in res[0]

# --- the ledger: single images

def floats(n=60, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(rng.normal(100, 10, (n, 1, 1, 1)), 20, (n, 1, 8, 8))

def reference_influence(x, out):
    "Change of mean or std in σ without the images `out`, in numpy"
    rest = np.delete(x, out, 0)
    return max(abs(rest.mean()-x.mean()), abs(rest.std()-x.std()))/x.std()

@pytest.mark.parametrize('i', [0, 37])
@pytest.mark.parametrize('how', [lambda a: a*1000, lambda a: a/1000-5000, lambda a: a*0-2000],
                         ids=['larger', 'far off', 'blank'])
def test_one_image_in_other_units(i, how):
    x = floats()
    x[i] = how(x[i])
    text = influential(ledger(x, [f'd/scan {k}.tif' for k in range(60)]))
    assert text.startswith(f'd/scan {i}.tif alone moves mean or std by {reference_influence(x, [i]):.2g} σ')
    own = np.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))])
    z = (abs(own-np.median(own, 1)[:,None])/(1.4826*np.median(abs(own-np.median(own, 1)[:,None]), 1)[:,None])).max(0)
    assert f'{z[i]:,.0f} robust standard deviations off)' in text
    for seed in range(20): assert influential(ledger(floats(seed=seed))) is None

def test_some_more_like_it():
    x = floats(100)
    x[[3, 5]] *= [[[[1000]]], [[[500]]]]
    assert influential(ledger(x)).startswith('3 alone moves') and '; 1 more like it)' in influential(ledger(x))

def test_one_image_of_a_group_and_a_whole_group():
    """A damaged image is named for itself, not for its group; a damaged group as one; a large group that is like the
    others is none"""
    x,groups = floats(),[f'g{k//6}' for k in range(60)]
    assert influential(ledger(x, groups=groups)) is None
    y = x.copy()
    y[14] *= 1000
    assert influential(ledger(y, groups=groups)) \
        .startswith(f'14 alone moves mean or std by {reference_influence(y, [14]):.2g} σ')
    y = floats(400)
    y[40:60] += 100  # which is beyond 8 robust standard deviations, yet no single one has much influence
    m = ledger(y, groups=[f'g{k//20}' for k in range(400)])
    m.unit = 'patient'
    moved = reference_influence(y, range(40, 60))
    assert influential(m).startswith(f'patient g2 alone moves mean or std by {moved:.2g} σ')
    y = floats(1000)
    y[7] = y[7]*1.5+60  # odd, yet without weight, in a group that has much
    assert influential(ledger(y, groups=['all' if k<900 else f'g{k}' for k in range(1000)])) is None

def test_two_kinds_of_images_are_no_exceptions():
    "Half of them blank, or a quarter much brighter"
    x = floats()
    for rows,v in ((slice(0, 30), 0), (slice(0, 35), 0), (slice(0, 15), 5000)):
        y = x.copy()
        y[rows] = v
        assert influential(ledger(y)) is None

def test_an_odd_image_of_a_few_is_no_exception():
    "Crops of two photographs, some of them all sky; one in a hundred moves the numbers by .02 σ as a matter of course"
    photos = load_sample_images().images
    for seed,n in ((0, 20), (1, 50), (2, 100)):
        rng = np.random.default_rng(seed)
        crops = [photos[i%2][y:y+96, x:x+96] for i in range(n) for y,x in [rng.integers(0, (330, 540))]]
        assert influential(ledger(np.stack(crops).transpose(0, 3, 1, 2)/255)) is None

def test_few_images_have_no_exceptions():
    x = floats(7)
    x[0] *= 1000
    assert influential(ledger(x)) is None

def test_a_fit_tells_of_an_image_in_other_units(tmp_path):
    x = floats(24)
    x[5] *= 1000
    as_image = TransformBlock(type_tfms=lambda i: TensorImage(torch.tensor(x[i], dtype=torch.float32)))
    db = DataBlock(as_image, n_inp=1, get_items=lambda _: list(range(24)), splitter=IndexSplitter([]))
    res = said(db.fit_stats, 0, pretrained=False, **quiet, **small)
    assert len(res)==1 and res[0].startswith('5 alone moves mean or std')

# --- the ledger: masks

def discs(n, size=16, seed=0):
    "Masks of 0 and 1 with a disc each"
    rng,(y,x) = np.random.default_rng(seed),np.mgrid[:size,:size]
    return [((y-a)**2+(x-b)**2<r**2).astype(np.uint8) for a,b,r in rng.uniform(4, 8, (n, 3))]

pairs = dict(
    suffix=('{:03}.png', '{:03}_mask.png'), folder=('images/{:03}.png', 'masks/{:03}.png'),
    seg=('im {:03}.png', 'im {:03}_seg.png'), segmentation=('ISIC_{:07}.png', 'ISIC_{:07}_Segmentation.png'),
    numbered=('benign ({}).png', 'benign ({})_mask_1.png'), first=('{:03}.png', 'mask_{:03}.png'),
    train=('train/{:03}.png', 'train_masks/{:03}_mask.png'), deep=('images/train/{}.png', 'labels/train/{}.png'),
    types=('images/{:03}.jpg', 'GT/{:03}.png'))

@pytest.mark.parametrize('image,mask', pairs.values(), ids=pairs)
@pytest.mark.parametrize('top', [255, 1, 5])
def test_masks_among_the_images(tmp_path, image, mask, top):
    "Of black and white, of 0 and 1, of a few labels"
    rng = np.random.default_rng(0)
    for i,disc in enumerate(discs(12)):
        a = disc*top if top!=5 else disc*rng.integers(1, 6, (4, 4)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
        for f,v in ((tmp_path/image.format(i), rng.integers(0, 256, (16, 16), dtype=np.uint8)),
                    (tmp_path/mask.format(i), a)):
            f.parent.mkdir(exist_ok=True, parents=True)
            Image.fromarray(v).save(f)
    db = block(splitter=IndexSplitter([]), item_tfms=None)
    res = [s for s in said(db.fit_stats, tmp_path, stats='custom', **quiet, **small) if 'masks' in s]
    assert len(res)==1 and res[0].startswith('12 of 24 images look like masks')
    assert f'({Path(mask.format(0)).name})' in res[0]
    def images(p): return [f for f in sorted(get_image_files(p)) if 'mask' not in str(f.relative_to(p))]
    only = block(splitter=IndexSplitter([]), item_tfms=None, get_items=images)
    if 'mask' in mask: assert not [s for s in said(only.fit_stats, tmp_path, stats='custom', **quiet, **small)
                                   if 'masks' in s]

@pytest.mark.parametrize('form', ['page{:03}.png', 'masks/{:03}.png', '{:03}_mask.png', 'scan_{:03}_seg.png',
                                  'labels/{}.png'])
def test_black_and_white_documents(form):
    "A few values alone, or names alone that belong to no other image, make no mask"
    assert masks_among(ledger(np.stack(discs(40))[:,None]*1., [form.format(i) for i in range(40)])) is None

def test_images_called_masks():
    "Photographs of people with masks and without, by the same numbers"
    x = floats(40)
    assert masks_among(ledger(x, [f'mask/{i}.png' for i in range(20)]+[f'no/{i}.png' for i in range(20)])) is None
    assert masks_among(ledger(x, [f'{i}.png' for i in range(20)]+[f'{i}_mask.png' for i in range(20)])) is None

def test_masks_beside_sparse_images_and_one_in_other_units():
    "Neither an image that is mostly black nor one with huge values hides them; and neither is taken for one"
    x = np.zeros((40, 1, 16, 16))
    x[:20,:,7:9,7:9] = np.random.default_rng(0).uniform(size=(20, 1, 2, 2))
    x[20:] = np.stack(discs(20))[:,None]
    items = [f'{i}.png' for i in range(20)]+[f'{i}_mask.png' for i in range(20)]
    assert masks_among(ledger(x, items)).startswith('20 of 40')
    x[0] += 1e6
    assert masks_among(ledger(x, items)).startswith('20 of 40')

# --- the ledger: what is no ordinary row

odd_items = dict(
    none=None, numbers=[*range(48)], dicts=[dict(file=f'p{i//4}_{i}.png', n=i) for i in range(48)],
    tuples=[(f'p{i//4}_{i}.png', i) for i in range(48)], paths=[Path(f'/x/p{i//4}_{i}.png') for i in range(48)],
    backslashes=[f'C:\\x\\p{i//4}_{i}.png' for i in range(48)], empty=['']*48, slash=['/']*48, dots=['..']*48,
    long=['9'*3000+f'_{i}' for i in range(48)], floats=[i/7 for i in range(48)],
    bytes=[f'p{i//4}_{i}'.encode() for i in range(48)],
    rows=[pd.Series(dict(f=f'p{i//4}_{i}', y=i)) for i in range(48)],
    control=[f'\x1b[31mp{i//4}\n_{i}' for i in range(48)])

@pytest.mark.parametrize('items', odd_items.values(), ids=odd_items)
@pytest.mark.parametrize('groups', [None, [f'g{i//4}' for i in range(48)], [None]*24+[f'g{i//4}' for i in range(24)]],
                         ids=['alone', 'grouped', 'some grouped'])
def test_odd_items_stop_no_guard(items, groups):
    x = floats(48)
    assert all(isinstance(s, str) for s in check_ledger(ledger(x, items, groups)))
    x[3] *= 1000
    assert [s for s in check_ledger(ledger(x, items, groups)) if 'alone moves' in s]

def test_images_without_a_pixel_stop_no_guard():
    "All masked, in all channels or in one; they count for nothing"
    x,items = of_patients(),names('p{p}_{i}.png')
    mask = torch.ones(160, 1, 6, 6, dtype=torch.bool)
    mask[::7] = False
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        m = ledger(x, items, mask=mask)
        kept = [i for i in range(160) if i%7]
        rho = reference_correlation(x[kept].mean((1, 2, 3)), [i//4 for i in kept])
        assert f'correlation {rho:.2f})' in families(m) and influential(m) is None and masks_among(m) is None
        y = np.concatenate([x, x], 1)
        y[::5,1] = np.nan
        m = RunningStats('ignore').update(torch.tensor(y), items=items)
        assert 'families' in families(m) and influential(m) is None and masks_among(m) is None

@pytest.mark.parametrize('m', [RunningStats(), ledger(floats(1)), ledger(floats(1), groups=['a']), ledger(floats(2)*0),
    ledger(floats(30)*0), ledger(floats(48)*0, names('p{p}_{i}.png', 12))],
                         ids=['no row', 'one', 'one of a group', 'two blank', 'blank', 'blank families'])
def test_nothing_to_say(m):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert check_ledger(m)==[] and check_ledger(None)==[]

# --- the reach of normalisation

def sparse(n=50, share=.01):
    rng = np.random.default_rng(0)
    return (rng.random((n, 3, 20, 20))<share)*rng.uniform(.5, 1, (n, 3, 20, 20))

def test_reach():
    "Sparse images by their own numbers; the figures are numpy's"
    x = sparse()
    m,own = ledger(x).measured(),NormStats(x.mean((0, 2, 3)), x.std((0, 2, 3)))
    assert reach(m, IMAGENET, IMAGENET) is None and reach(ledger(x), IMAGENET, IMAGENET) is None
    want = max((np.quantile(x[:,c], .999)-x[:,c].mean())/x[:,c].std() for c in range(3))
    got  = float(re.search(r'lies ([\d.]+) σ', reach(m, own, IMAGENET))[1])
    assert want>2*(1-.406)/.225 and abs(got/want-1)<.05 and 'never saw more than 2.6' in reach(m, own, IMAGENET)
    for std,wide in ((.5/want*2.2, False), (.5/want*1.8, True)):  # a model that saw less, or more, than half as far
        assert (reach(m, own, NormStats((.5,)*3, (std,)*3, name='wide')) is None)==wide

@pytest.mark.parametrize('mean,std', [((0.,)*3, (1.,)*3), ((.5,)*3, (.5,)*3), ((0.,), (1.,))])
def test_reach_of_models_that_took_other_ranges(mean, std):
    "[0, 1] as it is, [-1, 1]: a zero at one end of the range divides nothing"
    m = ledger(np.random.default_rng(0).random((20, 3, 9, 9))).measured()
    model = NormStats(mean, std, name='plain')
    assert reach(m, model, model) is None
    assert reach(m, NormStats((.5,)*3, (.2,)*3), model)  # ±2.5, more than twice of what either took
    hounsfield = NormStats((-500.,)*3, (300.,)*3, name='hu', value_range=(-1024, 1024))
    six = ledger(np.concatenate([sparse(), sparse()], 1))
    text = reach(six, six.stats(), IMAGENET)
    assert 'clip-zscore' in text and "stats='pretrained'" not in text  # it has none for six channels
    assert reach(ledger(np.random.default_rng(0).uniform(-1000, 1000, (20, 3, 9, 9))), hounsfield, hounsfield) is None

def test_a_fit_tells_of_the_reach(tmp_path):
    for i,a in enumerate(sparse(24)):
        Image.fromarray((a.transpose(1, 2, 0)*255).round().astype(np.uint8)).save(tmp_path/f'{i:02}.png')
    db = block(splitter=IndexSplitter([]), item_tfms=None)
    def far(**kwargs): return [s for s in said(db.fit_stats, tmp_path, **kwargs, **quiet, **small)
                               if 'never saw more' in s]
    assert len(far(stats='custom'))==1
    assert not far() and not far(stats='custom', pretrained=False) and not far(stats='custom', scheme='minmax')

# --- real images

DATA = Path(os.environ.get('NORMSTATS_DATA', Path(__file__).parents[2]/'shared'/'data'))
real = pytest.mark.skipif(not (DATA/'cxr_ped').is_dir(), reason='needs the folders of real images')

def real_ledger(folder, groups=None):
    "All images of a folder as it names them, by a `labels.csv`"
    df,m = pd.read_csv(folder/'labels.csv'),RunningStats()
    for i in range(0, len(df), 128):
        part = df.iloc[i:i+128]
        x = np.stack([np.asarray(Image.open(folder/f).convert('RGB').reduce(4)).transpose(2, 0, 1) for f in part.fname])
        m.update(torch.tensor(x)/255, items=[str(folder/f) for f in part.fname], groups=None
                 if groups is None else list(part[groups]))
    return m

@pytest.fixture(scope='module')
def xrays(): return real_ledger(DATA/'cxr_ped')

@pytest.mark.slow
@real
@pytest.mark.realdata
def test_families_of_xrays(xrays):
    "The suggestion makes groups that come near to the patients, and the guard has nothing more to say"
    text,df = families(xrays),pd.read_csv(DATA/'cxr_ped'/'labels.csv')
    f = suggested(text)
    groups = [f(o) for o in xrays.items]
    assert abs(len(set(groups))/df.patient_id.nunique()-1)<.1
    assert df.patient_id.groupby(groups).nunique().eq(1).all()  # no group holds two patients
    y = xrays.images.filter(like='mean_').mean(axis=1).to_numpy()
    assert f'correlation {reference_correlation(y, groups):.2f})' in text
    grouped = xrays.labelled(xrays.items, groups)
    assert f'design effect {grouped.design_effect.max():.2f})' in text and grouped.design_effect.max()>1.3
    assert check_ledger(grouped)==[] and check_ledger(xrays)==[text]
    assert reach(xrays, xrays.stats(), IMAGENET) is None and reach(xrays, IMAGENET, IMAGENET) is None

@pytest.mark.slow
@real
@pytest.mark.realdata
def test_the_suggestion_is_groups_for_a_fit(xrays):
    f = suggested(families(xrays))
    db = DataBlock(ImageBlock(PILImageBW), n_inp=1, get_items=get_image_files, splitter=IndexSplitter([]),
                   item_tfms=Resize(32, method='squish'))
    res = said(db.fit_stats, DATA/'cxr_ped'/'pneumonia_virus', stats='custom', groups=f, bs=64, num_workers=0,
               cache=False, **quiet)
    assert not res and db.stats_choice.measured.n_groups \
        ==len({f(o) for o in get_image_files(DATA/'cxr_ped'/'pneumonia_virus')})

@pytest.mark.slow
@real
@pytest.mark.realdata
@pytest.mark.parametrize('name', ['aerial', 'fundus', 'galaxies', 'skin', 'solar', 'tiles', 'ultrasound'])
def test_no_false_alarm_on_real_images(name):
    """None on the images by ImageNet's numbers, nor on the ledger; by their own numbers only the galaxies, nearly all
    black, go too far"""
    m = real_ledger(DATA/'sets'/name)
    assert check_ledger(m)==[] and check_images(m)==[] and check_images(m, IMAGENET)==[]
    assert reach(m, IMAGENET, IMAGENET) is None and (reach(m, m.stats(), IMAGENET) is not None)==(name=='galaxies')
    rng = np.random.default_rng(0)
    for n in (8, 16, 32, 64, 128, 256):
        for _ in range(10): assert check_ledger(m.take(rng.permutation(m.n_images)[:n]))==[], n
