"Other images against the statistics in use, against numpy over the same files; what a learner's model expects"

import json,re,warnings

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from fastai.data.core import DataLoaders,TfmdDL
from fastai.torch_core import TensorImage
from fastai.vision.all import (CategoryBlock,DataBlock,DisplayedTransform,ImageBlock,IndexSplitter,Learner,MaskBlock,
                               Normalize,PILImageBW,Resize,aug_transforms,convnext_tiny,get_image_files,
                               Brightness,RandomSplitter,imagenet_stats,load_learner,parent_label,resnet18,resnet34,
                               unet_learner,vision_learner)
from PIL import Image
from scipy.stats import expon,gamma,norm
from torch import nn
from torchvision.models import VGG16_Weights,vgg16
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

import fastai_normstats.all
from fastai_normstats.cli import main
from fastai_normstats import drift
from fastai_normstats.measure import measure_stats
from fastai_normstats.drift import _chance,_holm,_own_stats,_rows,_saddlepoint,_with_verdicts,used_stats
from fastai_normstats.choice import StatsChoice
from fastai_normstats.models import IMAGENET
from fastai_normstats.policy import Policy
from fastai_normstats.running import OFF,RunningStats
from helpers import image_folder,no_address

small,quiet = dict(bs=4, num_workers=0),dict(verbose=False)
N = 60
valid = range(0, N, 3)

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return image_folder(tmp_path_factory.mktemp('drift')/'images', n=N)

def block(blocks=(ImageBlock, CategoryBlock), **kwargs):
    return DataBlock(blocks, get_items=lambda p: sorted(get_image_files(p)), get_y=parent_label,
                     splitter=IndexSplitter(valid),
                     **{'item_tfms': Resize(16), **kwargs})

@pytest.fixture
def dls(folder): return block().dataloaders(folder, **small).fit_stats(pretrained=False, **quiet)

def pixels(files): return np.stack([np.asarray(Image.open(f).convert('RGB')) for f in files])/255.

def parts(x, m=None, var=None):
    """What each image adds to mean and std, from numpy: its mean, and its mean squared distance from `m` over twice
    the std"""
    m,var = x.mean((0,1,2)) if m is None else m,x.var((0,1,2)) if var is None else var
    return x.mean((1,2))-m, (((x-m)**2).mean((1,2))-var)/(2*np.sqrt(var))

def effects(x, train=None, stats=None):
    """Shift, std ratio and both z, from numpy, images as units: training images are the null where there are any
    (for 30 images or more
    their own spread counts if it is larger), and what the training images do not know of themselves comes in"""
    n,(m,s) = len(x),(train.mean((0,1,2)), train.std((0,1,2))) if stats is None else map(np.array, stats)
    shift,ratio = (x.mean((0,1,2))-m)/s,x.std((0,1,2))/s
    own = [o.std(0, ddof=1)/n**.5 for o in parts(x)]
    if train is None: return shift, ratio, np.abs(shift*s)/own[0], np.abs(x.std((0,1,2))-s)/own[1]
    null = [o.std(0, ddof=1)/n**.5 for o in parts(train)]
    if n>=30: null = [np.maximum(a, b) for a,b in zip(null, own)]
    se = [np.hypot(a, o.std(0, ddof=1)/len(train)**.5) for a,o in zip(null, parts(train))]
    return shift, ratio, *(np.abs(d.mean(0))/e for d,e in zip(parts(x, m, s**2), se))

def check(df, x, **kwargs):
    shift,ratio,za,zb = effects(x, **kwargs)
    np.testing.assert_allclose(df['shift'], shift, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(df['std_ratio'], ratio, rtol=1e-5)
    for c,r in enumerate(df.itertuples()):
        big = [z for z,e in ((za[c], abs(shift[c])), (zb[c], abs(np.log(ratio[c])))) if e>=.1]
        assert any(abs(r.z-z)<=2e-3*z+1e-6 for z in (big or (za[c], zb[c]))), (r.z, za[c], zb[c])
        assert r.n==len(x) and r.verdict==('alike' if not big else 'drifted' if r.p<=.05 else 'too few')
        assert r.shift_low<=r.shift<=r.shift_high and r.ratio_low<=r.std_ratio<=r.ratio_high

def test_validation_images(dls):
    df = dls.check_stats(tol=0, **quiet)
    assert list(df.columns)==['channel', 'n', 'shift', 'shift_low', 'shift_high', 'std_ratio', 'ratio_low',
                              'ratio_high', 'z', 'p', 'verdict', 'n_needed']
    check(df, pixels(dls.valid_ds.items), train=pixels(dls.train_ds.items))

def test_against_numbers_by_hand(folder):
    dls = block(batch_tfms=Normalize.from_stats([.3]*3, [.2]*3, cuda=False)).dataloaders(folder, **small)
    check(dls.check_stats(**quiet), pixels(dls.valid_ds.items), stats=([.3]*3, [.2]*3))

def test_against_the_training_images(folder):
    "A small set keeps ImageNet's statistics, which say nothing about drift: said, and the comparison to ask for"
    dls = block().dataloaders(folder, **small).fit_stats(model=resnet18, tol=0, **quiet)
    assert dls.stats_choice.kind=='imagenet'
    check(dls.check_stats(against='train', tol=0, **quiet), pixels(dls.valid_ds.items),
          train=pixels(dls.train_ds.items))
    with pytest.raises(ValueError, match="`against` must be 'used' or 'train', got 'x'"): dls.check_stats(against='x')
    dls.fit_stats(stats='imagenet', **quiet)
    with pytest.raises(ValueError, match='nothing was measured on the training images'):
        dls.check_stats(against='train')

def test_against_imagenet_the_mean_of_image_stds_counts(folder):
    dls = block(batch_tfms=Normalize.from_stats(*imagenet_stats, cuda=False)).dataloaders(folder, **small)
    assert used_stats(dls.train)==IMAGENET
    x = pixels(dls.valid_ds.items)
    np.testing.assert_allclose(dls.check_stats(**quiet)['std_ratio'], x.std((1,2)).mean(0)/IMAGENET.std, rtol=1e-5)

def test_what_can_be_checked(dls, folder):
    "A loader, items and a folder: the same images, the same rows"
    files = sorted(get_image_files(folder))
    rows = [dls.check_stats(o, tol=0, **quiet) for o in (dls.test_dl(files), files, folder, str(folder))]
    for r in rows: check(r, pixels(files), train=pixels(dls.train_ds.items))
    check(dls.check_stats(dls.train, tol=0, **quiet), pixels(dls.train_ds.items), train=pixels(dls.train_ds.items))

def test_groups(dls):
    df = dls.check_stats(by=lambda f: f.parent.name, **quiet)
    assert sorted({*df.group})==['a', 'b'] and len(df)==6
    for g,rows in df.groupby('group'): check(rows, pixels([f for f in dls.valid_ds.items if f.parent.name==g]),
                                             train=pixels(dls.train_ds.items))

def test_groups_of_rows(folder):
    df = pd.DataFrame(dict(file=sorted(map(str, get_image_files(folder))), site=list('xyy')*(N//3)))
    db = DataBlock(ImageBlock, get_x=lambda r: r.file, splitter=IndexSplitter(range(30)), n_inp=1, item_tfms=Resize(16))
    dls = db.dataloaders(df, **small).fit_stats(pretrained=False, **quiet)
    res = dls.check_stats(by=lambda r: r.site, **quiet)
    assert res.groupby('group').n.first().to_dict()==dict(x=10, y=20)
    assert res.equals(dls.check_stats(by='site', **quiet))
    df['age'] = [np.nan, 1., 2.]*(N//3)
    dls = db.dataloaders(df, **small).fit_stats(pretrained=False, **quiet)
    assert sorted(dls.check_stats(by='age', **quiet).n.tolist())==[10]*9

def images_of(means, n_pixels=64, spread=.05):
    "Loaders over images given as arrays; the first 40 are for training"
    rng = np.random.default_rng(0)
    x = [(TensorImage(torch.tensor(rng.normal(m, spread, (1, 8, 8)).clip(0, 1), dtype=torch.float32)),) for m in means]
    train,valid = TfmdDL(x[:40], bs=8, num_workers=0, shuffle=True, drop_last=True,
                         n_inp=1),TfmdDL(x[40:], bs=8, num_workers=0, n_inp=1)
    return DataLoaders(train, valid)

@pytest.mark.parametrize('shift, n, want', [(.02, 5000, 'alike'), (0., 20, 'alike'), (.3, 400, 'drifted'),
                                            (-.3, 400, 'drifted')])
def test_verdict_weighs_size_and_certainty(shift, n, want):
    "A tiny shift of thousands of images is certain and still alike"
    rng = np.random.default_rng(1)
    base = np.resize([.4, .6], 40)
    dls = images_of([*base, *(rng.permutation(np.resize([.4, .6], n))+shift*.11)]).fit_stats(stats=([.5], [.112]),
        **quiet)
    r = dls.check_stats(**quiet).iloc[0]
    assert r.verdict==want and (want!='alike' or n<1000 or r.z>3 or abs(r['shift'])<.1)

def test_too_few_says_how_many():
    "Numbers by hand rest on no images: the few at hand say how sure they are, and one says nothing"
    rng = np.random.default_rng(1)
    dls = images_of([*np.resize([.3, .7], 40), *rng.normal(.56, .2, 8)]).fit_stats(stats=([.5], [.2]), **quiet)
    r = dls.check_stats(**quiet).iloc[0]
    assert r.verdict=='too few' and 0<r.z<3 and r.n_needed==int(np.ceil(8*max(1, norm.isf(.0125)/r.z)**2))
    one = dls.check_stats(TfmdDL([dls.valid.dataset[0]], bs=1, num_workers=0, n_inp=1), **quiet).iloc[0]
    assert one.n==1 and np.isnan(one.z) and one.verdict=='too few'

# --- chance

draws = dict(normal=lambda g, s: g.normal(0, 1, s), exponential=lambda g, s: g.exponential(1, s), lognormal=lambda g,
             s: g.lognormal(0, 1, s),
             two_values=lambda g, s: g.choice([0., 1.], s, p=[.9, .1]))

@pytest.mark.parametrize('draw, n', [(k, n) for k in draws for n in (1, 2, 5, 30) if k!='two_values' or n==1])
def test_chance_is_what_drawing_shows(draw, n):
    """The chance that a mean of n images strays by d to this side, against 200,000 means drawn; twice that for both
    sides"""
    rng = np.random.default_rng(0)
    y = draws[draw](rng, 4000)
    y -= y.mean()
    means = rng.choice(y, (200_000, n)).mean(1)
    for q in (.05, .01, .002):
        for d in (np.quantile(means, 1-q), np.quantile(means, q)):
            true = (means>=d).mean() if d>0 else (means<=d).mean()
            got = _chance(d, np.quantile(y, OFF), n, len(y))/2
            assert got>=.6*min(true, .5), (q, d, got, true)  # never much too sure
            if n>1: assert got<=1.8*true+1e-4, (q, d, got, true)

def test_holm():
    "By hand: sorted .01 .02 .03 of three, times 3, 2, 1, never falling; NaN asks nothing"
    np.testing.assert_allclose(_holm(np.array([.03, .01, .02])), [.04, .03, .04])
    np.testing.assert_allclose(_holm(np.array([.5, np.nan, .02]))[[0, 2]], [1., .06])

def ledger(rng, n, groups=None, rho=0., of=1, grey=.1, spread=.1):
    "n images of 16 pixels a batch: brightness with intra-class correlation `rho` in groups of `of`, skewed contrast"
    g = np.repeat(rng.normal(0, 1, -(-n//of)), of)[:n]
    m = .5+grey*(rho**.5*g+(1-rho)**.5*rng.normal(0, 1, n))
    x = m[:,None]+spread*rng.gamma(2, .5, n)[:,None]*rng.normal(0, 1, (n, 16))
    return RunningStats().update(torch.tensor(x).view(n, 1, 4, 4), groups=None
                                 if of==1 else np.arange(n)//of+(groups or 0))

def drifted(training, parts):
    "Does a call that checks these ledgers say so of any?"
    used = _own_stats(training)
    rows = [dict(group=i, **r) for i,p in enumerate(parts) for r in _rows(p, used, training, training, Policy())]
    return (_with_verdicts(rows).verdict=='drifted').any()

@pytest.mark.slow
@pytest.mark.parametrize('n, k', [(1, 1), (1, 10), (1, 100), (2, 1), (2, 30), (2, 100), (3, 10), (5, 1), (5, 60),
                                  (15, 1), (15, 20), (100, 1), (1000, 1)])
def test_null(n, k):
    """Nothing has drifted: at most 5 % of calls say so (by chance 8 % of 300 calls or 13.3 % of 60 in fewer than one
    of a hundred tests)"""
    rng = np.random.default_rng(n*1000+k)
    calls,bad = 300 if n*k<100 else 60,0
    for i in range(calls):
        if i%25==0: training = ledger(rng, 1000).measured()
        whole = ledger(rng, n*k)
        bad += drifted(training, [whole.take(range(j*n, (j+1)*n)) for j in range(k)])
    assert bad/calls<=(.08 if calls==300 else .134)

@pytest.mark.parametrize('n', [5, 40, 400])
def test_the_chance_of_a_mean(n):
    "Of draws from an exponential, whose sums are gamma distributed, to 1 % of it, down to one in a million"
    edges = np.arange(0, 40, .01)
    w = expon.sf(edges)-expon.sf(edges+.01)
    y = edges+.005-(w*(edges+.005)).sum()
    for p in (.4, .1, .01, 1e-4, 1e-6):
        x = gamma.isf(p, n)/n-1
        assert abs(_saddlepoint(y, w, n, x)/p-1)<.01, p
    assert _saddlepoint(y, w, n, 0)==.5 and _saddlepoint(y, w, n, y.max())==0

@pytest.mark.slow
def test_null_of_families():
    "Groups of images of few patients: with `groups` at most 5 % of calls, without far more"
    rng,calls,bad,alone = np.random.default_rng(0),200,0,0
    for i in range(calls):
        if i%20==0: training = ledger(rng, 1000, rho=.8, of=5).measured()
        few = ledger(rng, 20, groups=10_000, rho=.8, of=5)
        bad += drifted(training, [few])
        alone += drifted(training, [few.labelled(few.items, [None]*20)])
    assert bad/calls<=.085 and alone/calls>.15

def test_one_odd_image_is_no_drift():
    "An image like none in training, among 40 that have not changed: the guards name it, the set has not drifted"
    rng = np.random.default_rng(0)
    training = ledger(rng, 1000).measured()
    x = ledger(rng, 40)
    x._settle()
    x._rows.m[1,3] += 9
    assert not drifted(training, [x])
    x._rows.m[1] += .2
    assert drifted(training, [x])

@pytest.mark.slow
@pytest.mark.parametrize('sign', [-1, 1])
def test_power(sign):
    "A shift of .5 σ is found with 30 images in at least 95 % of calls"
    rng,found = np.random.default_rng(5),0
    for i in range(100):
        if i%20==0: training = ledger(rng, 1000, grey=.06).measured()
        x = ledger(rng, 30, grey=.06)
        x._settle()
        x._rows.m[1] += sign*.5*training.std.item()
        found += drifted(training, [x])
    assert found>=95

def test_augmented_training_plain_validation(folder, capsys):
    """Like is compared with like: augmentation that halves the contrast of training images is no drift of the
    validation images"""
    dls = block(batch_tfms=Brightness(max_lighting=.9, p=1.,
                                      draw=lambda x: x.new_full((len(x),), .1))).dataloaders(folder, **small) \
                                          .fit_stats(pretrained=False, **quiet)
    df = dls.check_stats(tol=0)
    assert 'without augmentation' in capsys.readouterr().out
    check(df, pixels(dls.valid_ds.items), train=pixels(dls.train_ds.items))
    assert abs(dls.stats_choice.measured.mean[0].item()-pixels(dls.train_ds.items)[...,0].mean())>.1

def test_images_are_found_as_the_block_finds_them(folder, tmp_path):
    "A folder is searched with the block's own `get_items`"
    db = DataBlock((ImageBlock, CategoryBlock),
                   get_items=lambda p: sorted(f for f in get_image_files(p) if f.parent.name=='a'),
                   get_y=lambda f: f.stem[-1],
                   splitter=RandomSplitter(seed=0), item_tfms=Resize(16))
    db.fit_stats(folder, pretrained=False, **small, **quiet)
    assert db.dataloaders(folder, **small).check_stats(folder, **quiet).n.iloc[0]==N//2

def test_families_of_those_checked(folder, monkeypatch):
    "`groups` is asked of the images checked, by default the function of the fit"
    dls = block().dataloaders(folder, **small).fit_stats(pretrained=False, groups=lambda f: int(f.stem)//6, **quiet)
    want = dls.check_stats(groups=lambda f: int(f.stem)//6, **quiet)
    assert dls.check_stats(**quiet).equals(want)
    measured = []
    monkeypatch.setattr(drift, 'measure_stats', lambda dl, **kwargs: measured.append(measure_stats(dl, **kwargs))
                        or measured[-1])
    dls.check_stats(**quiet), dls.check_stats(groups=lambda f: f.stem, **quiet)
    assert [m.n_groups for m in measured]==[10, 20]

@pytest.mark.parametrize('f, match', [(lambda dls, p: block().dataloaders(p, **small).check_stats(), 'not normalised'),
    (lambda dls, p: dls.check_stats([]), '`dl` is empty'),
    (lambda dls, p: dls.check_stats(p/'nowhere'), 'no such folder'),
    (lambda dls, p: DataLoaders(dls.train).check_stats(), 'no validation images'),
    (lambda dls, p: dls.check_stats(dls), 'give one of its loaders'),
    (lambda dls, p: dls.check_stats(3), 'got int'),
    (lambda dls, p: dls.check_stats(by='site'), "or a list, got 'site'")])
def test_nothing_to_check(dls, folder, f, match):
    with pytest.raises((TypeError, ValueError), match=match): f(dls, folder)

def test_one_file(dls, folder): assert dls.check_stats(folder/'a'/'000.png', **quiet).n.tolist()==[1]*3

def test_other_channels(dls, folder):
    grey = block((ImageBlock(PILImageBW), CategoryBlock)).dataloaders(folder, **small)
    with pytest.raises(ValueError, match='1 channel and the statistics in use 3'): dls.check_stats(grey.valid, **quiet)

def test_draws_and_pipelines_stay(dls):
    before = dls.stats_choice,[list(dl.after_batch.fs) for dl in dls.loaders],torch.random.get_rng_state()
    dls.check_stats(by=lambda f: f.parent.name, **quiet)
    assert before[0] is dls.stats_choice and before[1]==[list(dl.after_batch.fs)
        for dl in dls.loaders] \
        and torch.equal(before[2], torch.random.get_rng_state())

# --- the learner

def said(f, *args, **kwargs):
    with warnings.catch_warnings(record=True) as res:
        warnings.simplefilter('always')
        out = f(*args, **kwargs)
    return [str(w.message) for w in res if issubclass(w.category, UserWarning)
            and 'torchvision' not in str(w.filename)],out

def learner(folder, arch, tfms=(), trained=True, **fit):
    "A learner as if its weights had been downloaded"
    dls = block(batch_tfms=list(tfms)).dataloaders(folder, **small)
    if fit: dls.fit_stats(**fit, **quiet)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = vision_learner(dls, arch, pretrained=False)
    learn.pretrained = trained
    return learn

half = Normalize.from_stats([.5]*3, [.5]*3, cuda=False)
net = Normalize.from_stats(*imagenet_stats, cuda=False)

@pytest.mark.parametrize('arch, tfms, fit, match', [
    (resnet34, [], {}, 'resnet34 expects .*0.485.* un-normalised'),
    (convnext_tiny, [], {}, 'convnext_tiny expects .*un-normalised'),
    (resnet34, [half], {}, r'resnet34 expects .* uses \(0.5, 0.5, 0.5\)'),
    ('vit_tiny_patch16_224', [net], {}, r'vit_tiny_patch16_224 expects \(0.5, 0.5, 0.5\)'),
    ('vit_tiny_patch16_224', [], dict(model=resnet34), 'rule `small`.* weighing those of imagenet'),
    (resnet34, [], dict(pretrained=False, model='siglip'), 'rule `scratch`.* weighing those of siglip')],
    ids=no_address)
def test_disagreement(folder, arch, tfms, fit, match):
    learn = learner(folder, arch, tfms, **fit)
    res,df = said(learn.check_stats)
    assert len(res)==1 and re.search(match, res[0]) and 'fit_stats(model=' in res[0]
    assert len(df)==3 and list(df.columns)==['channel', 'mean', 'std', 'model_mean', 'model_std']

@pytest.mark.parametrize('arch, tfms, fit', [(resnet34, [net], {}), ('vit_tiny_patch16_224', [half], {}),
                                             (resnet34, [], dict(model=resnet34)),
    (resnet34, [], dict(model=resnet34, stats='custom')), ('vit_tiny_patch16_224', [], dict(stats='imagenet')),
    ('vit_tiny_patch16_224', [], dict(model='vit_tiny_patch16_224'))], ids=no_address)
def test_agreement(folder, arch, tfms, fit): assert not said(learner(folder, arch, tfms, **fit).check_stats, **quiet)[0]

def test_from_scratch_anything_goes(folder, capsys):
    "Said in words, and no model's numbers beside those in use"
    for kwargs in (dict(tfms=[half]), dict(model=resnet34), dict()):
        res,df = said(learner(folder, resnet34, trained=False, **kwargs).check_stats)
        assert not res and 'resnet34 is trained from scratch' in capsys.readouterr().out
        assert df[['model_mean', 'model_std']].isna().all(axis=None)
    for kwargs,took in ((dict(model=resnet34), True), (dict(model=resnet34, pretrained=False), False),
                        (dict(stats='imagenet'), False)):
        said(learner(folder, resnet34, trained=False, **kwargs).check_stats)
        assert ('the fit took it for pretrained' in capsys.readouterr().out)==took
    res,df = said(learner(folder, resnet34, [half], trained=False).check_stats, resnet34,
                  **quiet)  # weights that someone loaded later
    assert len(res)==1 and df.model_mean.tolist()==list(IMAGENET.mean)

def test_a_choice_given_back_stands_behind_the_numbers(folder, tmp_path):
    "Whatever rule chose them and whichever model was weighed; the checks of the images hold"
    choice = block().dataloaders(folder, **small).fit_stats(model=resnet34, **quiet).stats_choice
    assert choice.rule=='small'
    loaded = StatsChoice.load(choice.save(tmp_path/'c.json'))
    for stats in (choice, loaded):
        learn = learner(folder, 'vit_tiny_patch16_224', stats=stats)
        assert not said(learn.check_stats, **quiet)[0]
        assert (learn.dls.stats_choice.rule, learn.dls.stats_choice.stats)==('small', choice.stats)
        again = learn.dls.fit_stats(stats=learn.dls.stats_choice, measure=True, **quiet)
        assert again.stats_choice.why==choice.why+(', as saved in c.json' if stats is loaded else '')
        assert not said(learn.freeze_stats().check_stats, **quiet)[0]
    custom = block().dataloaders(folder, **small).fit_stats(stats='custom', **quiet).stats_choice
    raw = block(batch_tfms=[By255()]).dataloaders(folder, **small)
    ranged = raw.fit_stats(**quiet).stats_choice
    assert ranged.rule=='range'
    assert any('255' in w for w in said(block().dataloaders(folder, **small).fit_stats, stats=ranged, **quiet)[0])
    grey = block((ImageBlock(PILImageBW), CategoryBlock)).dataloaders(folder, **small)
    with pytest.raises(ValueError, match='1 channel and the custom statistics 3'): grey.fit_stats(stats=custom, **quiet)

class By255(DisplayedTransform):
    "Images in 0-255 again, after fastai's IntToFloatTensor"
    order = 11
    def encodes(self, x:TensorImage): return x*255

@pytest.mark.parametrize('model', ['torchxrayvision', 'mnist'])
def test_a_model_for_one_channel_on_rgb_images(folder, model):
    "With a pass over all images, and with a look at a few"
    res,dls = said(block().dataloaders(folder, **small).fit_stats, model=model, **quiet)
    assert any(f'the images have 3 channels and {model} is a model for 1 channel' in w for w in res), res
    assert any('model for 1 channel' in w for w in dls.stats_choice.warnings)
    assert any('model for 1 channel' in w for w in said(learner(folder, resnet18, model=model).check_stats, model,
        **quiet)[0])

def test_after_the_remedy(folder):
    learn = learner(folder, convnext_tiny)
    assert said(learn.check_stats)[0]
    learn.dls.fit_stats(model=convnext_tiny, **quiet)
    assert not said(learn.check_stats, **quiet)[0]

def test_other_weights(folder):
    learn = learner(folder, vgg16, [net])
    assert not said(learn.check_stats, **quiet)[0]
    assert '0.4824' in said(learn.check_stats, VGG16_Weights.IMAGENET1K_FEATURES)[0][0]

def test_learners_without_an_architecture(folder, capsys):
    dls = block(batch_tfms=[net]).dataloaders(folder, **small)
    loss = dict(loss_func=nn.CrossEntropyLoss())
    res,_ = said(Learner(dls, timm.create_model('vit_tiny_patch16_224', num_classes=2), **loss).check_stats)
    assert len(res)==1 and 'VisionTransformer expects (0.5, 0.5, 0.5)' in res[0]
    res,df = said(Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), **loss).check_stats)
    assert not res and 'nobody here knows what Sequential expects' in capsys.readouterr().out
    assert df.model_mean.isna().all()

def test_range_of_published_numbers(folder):
    "Numbers for 0-255 on images in [0, 1] are wrong, restated ones are right"
    def check(mean, std):
        return said(learner(folder, resnet34, [Normalize.from_stats([mean]*3, [std]*3, cuda=False)]).check_stats,
                    'chexzero', **quiet)
    res,df = check(101.48761, 83.43944)
    assert len(res)==1 and 'chexzero expects (0.398' in res[0] and df.model_mean[0]<1
    assert not check(101.48761/255, 83.43944/255)[0]

def test_one_number_for_all_channels(folder):
    res,_ = said(learner(folder, resnet34, [Normalize.from_stats([.5], [.5], cuda=False)]).check_stats)
    assert len(res)==1 and 'resnet34 expects' in res[0]

def test_network_that_normalises_inside(folder):
    def check(*tfms):
        dls = block(batch_tfms=list(tfms)).dataloaders(folder, **small)
        ssd = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
        return said(Learner(dls, ssd, loss_func=nn.CrossEntropyLoss()).check_stats, **quiet)[0]
    assert not check() and 'normalises inside' in check(net)[0]

def test_misspelt_model(folder):
    with pytest.raises(ValueError, match="near matches are 'rad-dino'"): learner(folder, resnet34, [net],
        trained=False).check_stats('raddino')
    assert said(learner(folder, resnet34, [net], trained=False).check_stats,
                'rad-dino')[0]  # weights that someone loaded later

def test_after_loading(folder, tmp_path):
    "An exported learner has no training images; it checks others all the same"
    learn = learner(folder, resnet34, model=resnet34)
    learn.path = tmp_path
    learn.export('l.pkl')
    again = load_learner(tmp_path/'l.pkl')
    res,df = said(again.dls.check_stats, folder, **quiet)
    assert not res and df.n.tolist()==[N]*3 and not said(again.check_stats, **quiet)[0]

@pytest.fixture
def command(capsys):
    "Exit status and output of `normstats`, run in this process: tests of the command line have processes of its own"
    def run(*args):
        capsys.readouterr()
        return main([*map(str, args)]),''.join(capsys.readouterr())
    return run

@pytest.mark.slow
def test_command(folder, tmp_path, command):
    "A fit, the same images, darker ones, too few, one folder at a time, mistakes"
    status,out = command('fit', folder, '--size', 16, '--out', tmp_path/'s.json')
    assert status==0, out
    status,out = command('check', tmp_path/'s.json', folder, '--by-folder', '--plot', tmp_path/'p.png')
    assert status==0 and 'they fit the training images' in out and all(f' {g} ' in out for g in 'ab') \
        and (tmp_path/'p.png').stat().st_size>5000, out
    dark = tmp_path/'dark'
    dark.mkdir()
    for f in get_image_files(folder): Image.open(f).point(lambda v: v//3).save(dark/f.name)
    status,out = command('check', tmp_path/'s.json', dark)
    assert status==3 and 'they have drifted from the training images' in out and 'drifted' in out, out
    for args in ((tmp_path/'no.json', folder), (tmp_path/'s.json', tmp_path/'nowhere'), (tmp_path/'p.png', folder)):
        status,out = command('check', *args)
        assert status==1 and out.startswith('normstats: ') and out.count('\n')==1, out

@pytest.mark.slow
def test_command_passes_on_what_the_guards_say(folder, tmp_path, command):
    status,out = command('fit', folder, '--size', 16, '--out', tmp_path/'s.json')
    deep = tmp_path/'deep'
    deep.mkdir()
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 3000, (16, 16), dtype=np.uint16)).save(deep/f'{i}.png')
    status,out = command('check', tmp_path/'s.json', deep)
    assert status==3 and 'warning: ' in out and 'clipped' in out, out

@pytest.mark.parametrize('provenance', [{}, {'a': 1}, {'image_size': 'x'}, {'image_size': [1, 2, 3]}], ids=str)
def test_command_with_odd_provenance(dls, folder, tmp_path, provenance, capsys):
    d = dls.stats_choice.to_dict()
    (tmp_path/'s.json').write_text(json.dumps({**d, 'provenance': provenance}))
    assert main(['show', str(tmp_path/'s.json')])==0 and main(['check', str(tmp_path/'s.json'), str(folder), '--size',
        '16'])==0
    assert main(['check', str(tmp_path/'s.json'), str(folder)]) in (0, 3)

@pytest.mark.slow
def test_command_says_what_it_does_not_apply(folder, tmp_path, command):
    dls = block(batch_tfms=aug_transforms()).dataloaders(folder, **small).fit_stats(pretrained=False, **quiet)
    dls.stats_choice.save(tmp_path/'s.json')
    status,out = command('check', tmp_path/'s.json', folder)
    assert status in (0, 3) and 'measured after Flip' in out and '16' in str(dls.stats_choice.provenance['image_size'])

def test_16_bit_files_among_those_checked(dls, tmp_path):
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 3000, (16, 16), dtype=np.uint16)).save(tmp_path/f'{i}.png')
    assert 'clipped' in said(dls.check_stats, tmp_path, **quiet)[0][0]

def test_unet(tmp_path, folder):
    masks = tmp_path/'masks'
    masks.mkdir()
    for i in range(N): Image.fromarray(np.zeros((32, 32), np.uint8)).save(masks/f'{i:03}.png')
    dls = DataBlock((ImageBlock, MaskBlock(['a', 'b'])), get_items=lambda p: sorted(get_image_files(p)),
                    get_y=lambda f: masks/f.name,
                    splitter=IndexSplitter(valid), item_tfms=Resize(32)).dataloaders(folder, **small)
    learn = unet_learner(dls, resnet18, pretrained=False)
    learn.pretrained = True
    assert 'resnet18 expects' in said(learn.check_stats)[0][0]
