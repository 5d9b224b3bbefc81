"""Other ways to normalise than z-scores: what the network sees, against numpy in float64; and that all around the
transform works with them"""

import json,os,pickle,warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.vision.all import (CategoryBlock,DataBlock,ImageBlock,IndexSplitter,Learner,Normalize,PILImage,PILImageBW,
                               TensorCategory,TensorImage,TensorImageBW,TensorMask,
                               aug_transforms,get_image_files,load_learner,parent_label,vision_learner,resnet18)
from PIL import Image
from torch import nn

import fastai_normstats.transform as transform
from fastai_normstats.all import (ClipZScore,DatasetStats,ImageZScore,LocalResponse,MinMax,RunningStats,StatsChoice,
                                  ZScore,choose_stats,compare_stats,
                                  schemes)
from fastai_normstats.schemes import scheme_of
from helpers import Greys,Ready,image_folder

small,quiet = dict(bs=8, num_workers=0),dict(verbose=False, cache=False)
valid = list(range(0, 24, 4))

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return image_folder(tmp_path_factory.mktemp('schemes')/'images', n=24)

def files(p): return sorted(get_image_files(p))
def pixels(fs, mode='RGB'): return np.stack([np.asarray(Image.open(f).convert(mode),
    dtype=np.float64).reshape(16, 16, -1).transpose(2, 0, 1)/255
    for f in fs])
def train_files(p): return [f for i,f in enumerate(files(p)) if i not in valid]

def block(cls=PILImage, valid=valid, **kwargs):
    return DataBlock((ImageBlock(cls), CategoryBlock), get_items=files, get_y=parent_label,
                     splitter=IndexSplitter(valid), **kwargs)

def by_block(p, cls=PILImage, **kw):
    return block(cls).fit_stats(p, **{**quiet, **small, **kw}).dataloaders(p, **small)
def by_loaders(p, cls=PILImage, **kw): return block(cls).dataloaders(p, **small).fit_stats(**{**quiet, **kw})
def lazy(p, cls=PILImage, **kw):
    return block(cls, batch_tfms=DatasetStats(**{**quiet, **kw})).dataloaders(p, **small)
ways = pytest.mark.parametrize('way', [by_block, by_loaders, lazy], ids=lambda f: f.__name__)
modes = pytest.mark.parametrize('cls,mode', [(PILImage, 'RGB'), (PILImageBW, 'L')])
all_schemes = pytest.mark.parametrize('scheme', [MinMax(), MinMax(percentiles=(2, 98)), MinMax(limits=(.1, .6)),
                                                 ClipZScore(), ClipZScore(limits=(.2, .7)), ImageZScore(),
                                                 ImageZScore(together=True), LocalResponse(),
                                                 LocalResponse(size=3, alpha=.5, k=2.)], ids=str)

def tfm_of(dls): return next(f for f in dls.train.after_batch.fs if isinstance(f, DatasetStats))
def seen(dls): return torch.cat([b[0] for b in dls.valid]).double().numpy()
def col(v): return np.asarray(v)[:,None,None]

def reference(scheme, train, x, limits=None):
    "What a network is to see of images `x` (B, C, H, W), in float64; `limits` where they are measured"
    if isinstance(scheme, MinMax):
        lo,hi = map(col, limits)
        return (x.clip(lo, hi)-lo)/(hi-lo)
    if isinstance(scheme, ClipZScore):
        return (x.clip(*map(col, limits))-col(train.mean((0, 2, 3))))/col(train.std((0, 2, 3)))
    if isinstance(scheme, ImageZScore):
        axes = (1, 2, 3) if scheme.together else (2, 3)
        return (x-x.mean(axes, keepdims=True))/x.std(axes, keepdims=True)
    res,n,C = np.empty_like(x),scheme.size,x.shape[1]
    for c in range(C):  # Krizhevsky et al. 2012, §3.3, channels outside count as 0
        near = range(max(0, c-n//2), min(C, c+(n-1)//2+1))
        res[:,c] = x[:,c]/(scheme.k+scheme.alpha/n*sum(x[:,j]**2 for j in near))**scheme.beta
    return res

def limits_of(scheme, train):
    "Limits in numpy"
    if not hasattr(scheme, 'percentiles'): return None
    C = train.shape[1]
    if scheme.limits is not None: return [np.full(C, o[0]) for o in scheme.limits]
    return [np.percentile(train.transpose(1, 0, 2, 3).reshape(C, -1), p, axis=1) for p in scheme.percentiles]

@ways
@modes
@all_schemes
def test_what_the_network_sees(folder, way, scheme, cls, mode):
    dls = way(folder, cls, scheme=scheme)
    train,x = pixels(train_files(folder), mode),pixels([files(folder)[i] for i in valid], mode)
    want,got = limits_of(scheme, train),dls.stats_choice.scheme.limits
    if want is not None:
        exact = scheme.limits is not None or scheme.percentiles==(0, 100)
        for a,b in zip(got, want): np.testing.assert_allclose(np.broadcast_to(a, b.shape), b, atol=1e-6
            if exact else 1/256)
    np.testing.assert_allclose(seen(dls), reference(scheme, train, x, got), atol=2e-4
                               if isinstance(scheme, MinMax) else 1e-4)
    assert dls.stats_choice.rule=='scheme' and dls.stats_choice.kind=='custom'
    assert tfm_of(dls).name.startswith(f'DatasetStats -- {scheme.name}: ')

@all_schemes
def test_shown_as_it_was(folder, scheme):
    """`decodes`: the pixels, as far as they were not clipped; an image on its own gets the training set's mean and
    contrast"""
    dls = by_block(folder, scheme=scheme)
    x,t = TensorImage(torch.tensor(pixels([files(folder)[i] for i in valid]), dtype=torch.float32)),tfm_of(dls)
    y = t.decode(t.encodes(x))
    assert type(y) is TensorImage
    if isinstance(scheme, ImageZScore):
        train,axes = pixels(train_files(folder)),(1, 2, 3) if scheme.together else (2, 3)
        np.testing.assert_allclose(y.mean((0, *axes) if scheme.together else (0, 2, 3)), train.mean((0, *axes)),
                                   atol=1e-4)
        if not scheme.together: np.testing.assert_allclose(y.std((2, 3), unbiased=False).mean(0),
            train.std((2, 3)).mean(0), rtol=1e-3)
        else: np.testing.assert_allclose(y.std(axes, unbiased=False),
                                         np.sqrt((train.std((2, 3)).mean(0)**2).mean()+train.mean((0, 2, 3)).var()),
                                         rtol=1e-3)
    else: torch.testing.assert_close(y, t.scheme.before(x, 2) if t.scheme.limits else x, atol=2e-6, rtol=1e-5)
    dls.show_batch(max_n=2)

def test_zscore_is_what_it_was(folder):
    a,b = by_block(folder, stats='custom'),by_block(folder, stats='custom', scheme='zscore')
    np.testing.assert_array_equal(seen(a), seen(b))
    assert a.stats_choice.scheme==ZScore() and 'low' not in a.stats_choice.table() and a.stats_choice.rule=='given'

def test_each_split_has_limits_of_its_own(tmp_path):
    p = image_folder(tmp_path/'images', n=24)
    for f in files(p)[:4]:
        Image.fromarray(np.full((16, 16, 3), 255, np.uint8)).save(f)   # white images in the first split's validation
    for f in files(p)[4:]: Image.fromarray((np.asarray(Image.open(f))//2)).save(f)
    tfm,tops = DatasetStats(scheme='minmax', **quiet),[]
    for vs in (range(4), range(20, 24)):
        tops.append(tfm_of(block(valid=list(vs), batch_tfms=tfm).dataloaders(p, **small)))
    assert max(tops[0].scheme.limits[1])<.6 and min(tops[1].scheme.limits[1])==1.
    first = tops[0].encodes(TensorImage(torch.ones(1, 3, 4, 4)))
    # clipped: nothing beyond what training showed
    torch.testing.assert_close(first, TensorImage(torch.ones(1, 3, 4, 4)))

def test_one_measurement_for_all(folder, tmp_path, monkeypatch):
    """Schemes are other questions to the same measurement, which the cache keeps; the lowest and highest value need
    every image"""
    n = []
    real = transform.measure_stats
    monkeypatch.setattr(transform, 'measure_stats', lambda *a, **k: n.append(k['tol']) or real(*a, **k))
    for s in ('zscore', 'clip-zscore', 'image-zscore', MinMax(percentiles=(1, 99))): by_block(folder, stats='auto'
        if s!='zscore' else 'custom', scheme=s, cache=tmp_path)
    assert n==[.01]
    for _ in range(2): by_block(folder, scheme='minmax', cache=tmp_path)
    assert n==[.01, 0]
    for s in ('lrn', MinMax(limits=(0, .5))):
        assert by_block(folder, scheme=s, cache=tmp_path).stats_choice.measured is None
    assert n==[.01, 0]
    assert by_block(folder, scheme='lrn', measure=True).stats_choice.measured.n_images==18

def test_extremes_are_those_of_all_images():
    ds = Greys(5000, seed=1)
    dl = Ready(ds, bs=500, num_workers=0, after_batch=[DatasetStats(scheme='minmax', tol=.2, **quiet)])
    choice,x = next(f for f in dl.after_batch.fs if isinstance(f, DatasetStats)).choice,ds.images(torch.arange(5000))
    assert choice.measured.complete
    torch.testing.assert_close(torch.tensor(choice.scheme.limits), torch.stack([x.amin((0, 2, 3)), x.amax((0, 2, 3))]))
    part = Ready(ds, bs=500, num_workers=0, after_batch=[DatasetStats(scheme='clip-zscore', tol=.2, **quiet)])
    assert not next(f for f in part.after_batch.fs if isinstance(f, DatasetStats)).choice.measured.complete

@all_schemes
def test_saved_hard_coded_pickled(folder, tmp_path, scheme):
    dls = by_block(folder, scheme=scheme)
    choice,want = dls.stats_choice,seen(dls)
    again = StatsChoice.load(choice.save(tmp_path/'c.json'))
    assert again.to_dict()==choice.to_dict() and again.scheme==choice.scheme and again.table().equals(choice.table())
    for kw in (dict(stats=again), dict(stats=again, scheme=scheme) if scheme==choice.scheme else {}):
        if kw: np.testing.assert_array_equal(seen(by_loaders(folder, **kw)), want)
    line = eval(choice.code())
    x = TensorImage(torch.rand(2, 3, 8, 8))
    torch.testing.assert_close(line.encodes(x), tfm_of(dls).encodes(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pickle.loads(pickle.dumps(tfm_of(dls))).encodes(x), tfm_of(dls).encodes(x), rtol=0,
                               atol=0)
    text,html = repr(choice),choice._repr_html_()
    assert choice.why in text and ('low' in text)==(choice.scheme.limits is not None) and scheme.name in text
    assert '<table' in html

def test_provenance(folder): assert by_block(folder, scheme='clip-zscore').stats_choice.provenance['n_images']==18

@all_schemes
def test_exported(folder, tmp_path, scheme):
    dls = by_block(folder, scheme=scheme)
    learn = Learner(dls, nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
                    loss_func=nn.CrossEntropyLoss(), path=tmp_path)
    f = files(folder)[3]
    with learn.no_bar(): want = learn.predict(f)[2]
    learn.export('x.pkl')
    with load_learner(tmp_path/'x.pkl').no_bar(): got = load_learner(tmp_path/'x.pkl').predict(f)[2]
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match=f"cannot do scheme '{scheme.name}'"): learn.freeze_stats()
    assert isinstance(tfm_of(dls), DatasetStats)  # and nothing was changed

def test_no_second_normalize(folder):
    dls = by_block(folder, scheme='clip-zscore')
    learn = vision_learner(dls, resnet18, pretrained=False)
    assert sum(isinstance(f, Normalize) for f in learn.dls.train.after_batch.fs)==1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.check_stats()

def test_mask_and_flat_images():
    "An image on its own by the finite pixels that count; all others become 0, and so does a flat image"
    x = torch.rand(3, 2, 8, 8)+1
    x[:,:,:4],x[1],x[2] = 0,0,1.5
    t = DatasetStats([1.5, 1.5], [.3, .3], scheme=ImageZScore(), mask=lambda x: x[:, :1]>0)
    y = t.encodes(TensorImage(x)).numpy()
    inner = x[0,:,4:].double().numpy()
    np.testing.assert_allclose(y[0,:,4:], (inner-inner.mean((1, 2))[:,None,None])/inner.std((1, 2))[:,None,None],
                               atol=1e-5)
    assert (y[0,:,:4]==0).all() and (y[1]==0).all()
    np.testing.assert_allclose(y[2], 0, atol=1e-6)
    x = torch.rand(1, 1, 8, 8)
    x[0,0,0,0] = torch.nan
    y,inner = DatasetStats([.5], [.3], scheme='image-zscore').encodes(TensorImage(x)).numpy(),x[x==x].double().numpy()
    assert np.isnan(y).sum()==1  # one pixel does not spoil the image
    np.testing.assert_allclose(y[np.isfinite(y)], (inner-inner.mean())/inner.std(), atol=1e-5)

def test_volumes():
    x = torch.rand(2, 1, 4, 8, 8)*1000
    for s in (MinMax(limits=(100, 500)), ImageZScore(), LocalResponse(alpha=1e-6)):
        m,d = ([100.], [400.]) if s.limits else ([0.], [1.])
        got = DatasetStats(m, d, axes=(0, 2, 3, 4), scheme=s).encodes(TensorImage(x))
        want = reference(s, None, x.double().numpy().reshape(2, 1, 32, 8), s.limits)
        np.testing.assert_allclose(got.numpy().reshape(want.shape), want, rtol=1e-4, atol=1e-5)

@all_schemes
def test_types_and_targets(folder, scheme):
    t = tfm_of(by_block(folder, scheme=scheme))
    x,m,y = TensorImage(torch.rand(2, 3, 8, 8)),TensorMask(torch.ones(2, 8, 8)),TensorCategory(torch.tensor([0, 1]))
    a,b,c = t((x, m, y), split_idx=0)
    assert type(a) is TensorImage and b is m and c is y
    assert t.encodes(TensorImage(x[0]))[..., 0, 0].shape[-1]==3  # a single image
    half = t.encodes(x.half())
    torch.testing.assert_close(half.float(), t.encodes(x).float(), atol=2e-2, rtol=2e-2)
    if len(t.choice.stats.mean)==3:
        with pytest.raises(ValueError, match='2 channels'): t.encodes(TensorImage(torch.rand(2, 2, 8, 8)))

def test_drift(folder, tmp_path):
    dark = image_folder(tmp_path/'dark', n=24)
    for f in files(dark): Image.fromarray(np.asarray(Image.open(f))//3).save(f)
    for s in ('minmax', 'clip-zscore', 'image-zscore'):
        dls = by_block(folder, scheme=s)
        same,other = dls.check_stats(dls.train, verbose=False),dls.check_stats(dark, verbose=False)
        assert (same.verdict=='alike').all() and (other.verdict=='drifted').all()
        x,y = pixels(train_files(folder)),pixels(files(dark))
        np.testing.assert_allclose(other['shift'], (y.mean((0, 2, 3))-x.mean((0, 2, 3)))/x.std((0, 2, 3)), atol=1e-4)
    with pytest.raises(ValueError, match='nothing was measured on the training images: fit again with `measure=True` '
                                         'added'): by_block(folder, scheme='lrn').check_stats(verbose=False)
    assert (by_block(folder, scheme='lrn', measure=True).check_stats(folder, verbose=False).verdict=='alike').all()

def test_doubts():
    hot = torch.rand(20, 1, 16, 16)
    hot[0,0,0,0] = 100.
    m = RunningStats().update(hot)
    def said(s): return choose_stats(20, m, scheme=s).warnings
    assert any('lie on 1.0%' in w and 'percentiles=(.5, 99.5)' in w for w in said('minmax'))
    assert not said(MinMax(percentiles=(.5, 99.5)))
    assert any('units of the pixels' in w for w in said(MinMax(limits=(-1000, 400))))
    assert any('larger ones to smaller' in w for w in said(LocalResponse(alpha=1.)))
    assert not said('lrn') and not said('image-zscore') and not said('clip-zscore')
    assert any('only 0% of the pixels lie between' in w for w in said(ClipZScore(limits=(10, 20))))
    # and where the doubt says that order is lost, it is, while below it is not
    s = LocalResponse(size=1, alpha=1.)
    x = torch.linspace(0, 1.4, 50).view(1, 1, 1, -1)
    assert (s.before(x, 2).diff()>0).all() and s.doubts(RunningStats().update(x)) is None
    x = torch.linspace(1.5, 3, 50).view(1, 1, 1, -1)
    assert (s.before(x, 2).diff()<0).all() and s.doubts(RunningStats().update(x)) is not None

def test_doubts_reach_the_user(folder):
    with pytest.warns(UserWarning, match='units of the pixels'): by_block(folder, scheme=MinMax(limits=(-1000, 400)))
    with pytest.warns(UserWarning, match='larger ones to smaller'): by_block(folder, scheme=LocalResponse(alpha=100.))

@pytest.mark.parametrize('kw,match', [
    (dict(scheme='min-max'), "`scheme` must be one of 'zscore', 'minmax', 'clip-zscore', 'image-zscore', "
     "'histogram', 'lrn'"),
    (dict(scheme=None), '`scheme` must be one of'),
    (dict(scheme=MinMax), 'call it'),
    (dict(scheme='minmax', stats='imagenet'), 'leave one of them out'),
    (dict(scheme='minmax', stats=([.5]*3, [.2]*3)), 'leave one of them out'),
    (dict(scheme='image-zscore', stats='custom-image'), 'leave one of them out'),
    (dict(mean=[.5], std=[.2], scheme='clip-zscore'), 'without the limits'),
    (dict(mean=[.5], std=[.2], scheme=MinMax(limits=(0, 1))), 'do not belong to scheme'),
    (dict(mean=[.5]*3, std=[.2]*3, scheme='lrn'), 'do not belong to scheme'),
], ids=str)
def test_refused(folder, kw, match):
    with pytest.raises(ValueError, match=match):
        t = DatasetStats(**quiet, **kw)
        block(batch_tfms=t).dataloaders(folder, **small)

def test_nothing_left_between_percentiles(tmp_path):
    (tmp_path/'a').mkdir()
    for i in range(9):
        a = np.zeros((16, 16, 3), np.uint8)
        a[8,8] = 200
        Image.fromarray(a).save(tmp_path/'a'/f'{i}.png')
    db = DataBlock((ImageBlock, CategoryBlock), get_items=files, get_y=parent_label, splitter=IndexSplitter([0]))
    with pytest.raises(ValueError, match='percentiles 0.5 and 99.5 of channel 0 are both about 0.*mask='):
        db.fit_stats(tmp_path, scheme='clip-zscore', **quiet, **small)

@pytest.mark.parametrize('cls', [MinMax, ClipZScore])
def test_percentiles_as_fractions(cls):
    with pytest.raises(ValueError, match='in % between 0 and 100'): cls(percentiles=(.005, .995))

def made(n, size=32, seed=0, **special):
    "A DataBlock of `n` noise images N(100, 20), those named by index with one pixel of that value"
    rng = np.random.default_rng(seed)
    xs = rng.normal(100, 20, (n, 1, size, size)).astype(np.float32)
    for i,v in special.items(): xs[int(i[1:]),0,5,5] = v
    from fastai.vision.all import TransformBlock
    return DataBlock(TransformBlock(type_tfms=lambda i: TensorImageBW(torch.tensor(xs[i]))), n_inp=1,
                     get_items=lambda _: list(range(n)),
                     splitter=lambda o: (o, [])),xs.astype(np.float64)

@pytest.mark.slow
@pytest.mark.parametrize('stuck', [65535., 1e6, -1e6, 1e7])
@pytest.mark.parametrize('where', ['i0', 'i40', 'all'])
def test_percentiles_do_not_mind_stuck_pixels(stuck, where):
    "One pixel of 4,096, in the first batch or later, in one image or in each, leaves the limits where numpy has them"
    db,xs = made(60, size=64, **({f'i{i}': stuck for i in range(60)} if where=='all' else {where: stuck}))
    for s in (ClipZScore(), MinMax(percentiles=(.5, 99.5))):
        limits = db.fit_stats(0, scheme=s, bs=16, num_workers=0, **quiet).stats_choice.scheme.limits
        np.testing.assert_allclose([o[0] for o in limits], np.percentile(xs, (.5, 99.5)),
                                   atol=4)  # σ is 20; of 4,096 pixels about 256 are sampled

@pytest.mark.slow
@pytest.mark.parametrize('stuck', [None, 65535., -1e6])
def test_lowest_and_highest_value_are_exact(stuck):
    "To the last bit, wherever they are"
    db,xs = made(60, **({} if stuck is None else dict(i17=stuck)))
    for s in (MinMax(), ClipZScore(percentiles=(0, 100))):
        choice = db.fit_stats(0, scheme=s, bs=16, num_workers=0, **quiet).stats_choice
        assert choice.scheme.limits==((xs.min(),), (xs.max(),)) and choice.measured.complete
    lo,hi = db.fit_stats(0, scheme=ClipZScore(percentiles=(0, 99)), bs=16, num_workers=0,
                         **quiet).stats_choice.scheme.limits
    assert lo==(xs.min(),) and abs(hi[0]-np.percentile(xs, 99))<4

CXR = Path(os.environ.get('NORMSTATS_DATA', Path(__file__).parents[2]/'shared'/'data'))/'cxr_ped'

@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.skipif(not CXR.is_dir(), reason='needs the chest X-rays')
def test_percentiles_of_xrays():
    "Within .004 of the range of numpy's, over all pixels of all images"
    x,m = np.stack([np.asarray(Image.open(f).convert('L'))
                    for f in sorted(get_image_files(CXR))])[:,None],RunningStats()
    for i in range(0, len(x), 64): m.update(torch.tensor(x[i:i+64])/255)
    for p in ((.5, 99.5), (1, 99), (2, 98)):
        limits = choose_stats(len(x), m, scheme=ClipZScore(percentiles=p)).scheme.limits
        np.testing.assert_allclose([o[0] for o in limits], np.percentile(x, p)/255, atol=.004, err_msg=str(p))

@pytest.mark.parametrize('scale', [1e-7, 2e-5, 1e4])
def test_values_on_a_small_range(scale):
    "ADC maps in mm²/s and the like: limits as good as on any range"
    from fastai.vision.all import TransformBlock
    xs = np.random.default_rng(1).uniform(20, 110, (40, 1, 30, 30))*scale
    db = DataBlock(TransformBlock(type_tfms=lambda i: TensorImageBW(torch.tensor(xs[i], dtype=torch.float32))), n_inp=1,
                   get_items=lambda _: list(range(40)), splitter=lambda o: (o, []))
    for s,p in ((MinMax(), (0, 100)), (ClipZScore(), (.5, 99.5)), (MinMax(percentiles=(1, 99)), (1, 99))):
        limits = db.fit_stats(0, scheme=s, bs=16, num_workers=0, **quiet).stats_choice.scheme.limits
        np.testing.assert_allclose([o[0] for o in limits], np.percentile(xs, p), atol=.2*scale)

def test_clip_to_the_extremes_reads_all():
    ds = Greys(4000, seed=1)
    dl = Ready(ds, bs=500, num_workers=0,
               after_batch=[DatasetStats(scheme=ClipZScore(percentiles=(0, 99)), tol=.2, **quiet)])
    choice = next(f for f in dl.after_batch.fs if isinstance(f, DatasetStats)).choice
    assert choice.measured.complete
    torch.testing.assert_close(torch.tensor(choice.scheme.limits[0]), ds.images(torch.arange(4000)).amin((0, 2, 3)))

def body(x): return x[:, :1]>.3

def test_a_mask_goes_along(folder, tmp_path):
    """A scheme that needs its mask for every image says so where it is lost, and `check_stats` goes on with that of
    the fit"""
    dls = by_block(folder, scheme='image-zscore', mask=body)
    choice,want = dls.stats_choice,seen(dls)
    assert 'mask=body)' in choice.code()
    with pytest.warns(UserWarning, match='made with `mask=body`.*again'):
        by_loaders(folder, stats=StatsChoice.load(choice.save(tmp_path/'c.json')))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        np.testing.assert_array_equal(seen(by_loaders(folder, stats=choice, mask=body)), want)
    scope = dict(DatasetStats=DatasetStats, ImageZScore=ImageZScore, body=body)
    x = TensorImage(torch.rand(2, 3, 8, 8))
    torch.testing.assert_close(eval(choice.code(), scope).encodes(x), tfm_of(dls).encodes(x), atol=1e-5, rtol=1e-5)
    plain = by_block(folder, stats='custom', mask=body)
    assert (plain.check_stats(plain.train, verbose=False)['shift'].abs()<1e-3).all()
    lost = pickle.loads(pickle.dumps(tfm_of(plain)))
    for dl in plain.loaders: dl.after_batch.fs[-1] = lost
    with pytest.warns(UserWarning, match='measured with `mask=body`'): plain.check_stats(plain.train, verbose=False)
    with pytest.warns(UserWarning, match='`mask` leaves no pixel out'): by_block(folder, stats='custom',
        mask=lambda x: x[:, :1]>-1100)
    with pytest.warns(UserWarning, match='each image is normalised on its own'): dls.check_stats(verbose=False)

@pytest.mark.parametrize('bad', [dict(name='minmax', percentiles='x'), dict(name='nope'), dict(name='lrn', more=1), 3,
                                 [1]], ids=str)
def test_damaged_scheme_in_a_file(folder, tmp_path, bad):
    d = json.loads((by_block(folder, scheme='minmax').stats_choice.save(tmp_path/'c.json')).read_text())
    (tmp_path/'c.json').write_text(json.dumps({**d, 'scheme': bad}))
    with pytest.raises(ValueError, match='cannot read .*c.json'): StatsChoice.load(tmp_path/'c.json')

def test_older_file_without_scheme(folder, tmp_path):
    d = by_block(folder, stats='custom').stats_choice.to_dict()
    del d['scheme']
    assert StatsChoice.from_dict(d).scheme==ZScore()

def test_fit_again_with_another(folder):
    db = block()
    for s in ('minmax', 'zscore', 'image-zscore'):
        db.fit_stats(folder, scheme=s, **quiet, **small)
        assert db.stats_choice.scheme.name==s
    dls = db.dataloaders(folder, **small)
    assert dls.stats_choice.scheme==ImageZScore()
    assert dls.fit_stats(stats='imagenet', **quiet).stats_choice.scheme==ZScore()

def test_names():
    from fastai_normstats.cli import _schemes
    assert {k: scheme_of(k).name for k in schemes}=={k: k for k in schemes} and _schemes==(*schemes,)

@pytest.mark.parametrize('limits,words', [
    (((-1000.,)*3, (400.,)*3),                      '-1,000 and 400'),
    (((-1000.,), (400.,)),                          '-1,000 and 400'),
    (((-669., -640., -644.), (662., 650., 650.)),   '-669, -640, -644 and 662, 650, 650'),  # three channels, three ends
    (((0., 0., 0.), (255., 200., 200.)),            '0 and 255, 200, 200')])
def test_limits_in_words(limits, words):
    "Channels are told apart wherever two of them differ: a number that occurs twice is not left out"
    assert f'between {words}' in MinMax(limits=limits).why()
    clipped = ClipZScore(limits=limits).why()
    assert clipped==f'clipped between {words}, then scaled by the mean and std of the unclipped pixels'

@pytest.mark.slow
def test_compare(folder):
    def learner(dls): return Learner(dls, nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 2)), loss_func=nn.CrossEntropyLoss())
    c = compare_stats(block(), folder, learner, stats=['imagenet', MinMax(limits=(0, 1)), 'image-zscore'], seeds=2,
                      epochs=1, verbose=False, **small)
    assert list(c.runs.candidate.unique())==['imagenet', 'minmax',
                                             'image-zscore'] and not c.runs.error.astype(bool).any()
    same = compare_stats(block(), folder, learner, stats=dict(a=([0.]*3, [1.]*3), b=MinMax(limits=(0, 1))), seeds=2,
                         epochs=1, verbose=False, **small).runs
    a,b = (same[same.candidate==k].valid_loss.to_numpy() for k in 'ab')
    np.testing.assert_array_equal(a, b)  # (x-0)/1 either way

@pytest.mark.slow
@pytest.mark.parametrize('which', ['light', 'default'])
def test_lighting_on_values_off_zero_to_one(folder, which):
    "fastai clamps to [0, 1] before it changes the light: said, where pixels do not live there"
    tfms = aug_transforms(max_lighting=.2 if which=='light' else 0., max_rotate=0.)
    from fasttransform import Transform
    class HU(Transform):
        order = 20
        def encodes(self, x: TensorImage): return x*2000-1000
    db = block(batch_tfms=[HU(), *tfms])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        db.fit_stats(folder, stats='custom', **quiet, **small)
    assert any('clamps them to [0, 1]' in str(w.message) and 'max_lighting=0.' in str(w.message)
               for w in said)==(which=='light')

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@all_schemes
def test_on_a_gpu(folder, scheme):
    t = tfm_of(by_block(folder, scheme=scheme))
    x = TensorImage(torch.rand(4, 3, 16, 16))
    want = t.encodes(x)
    for a in ('mean', 'std'): setattr(t, a, getattr(t, a).cuda())
    torch.testing.assert_close(t.encodes(x.cuda()).cpu(), want, atol=1e-5, rtol=1e-5)
