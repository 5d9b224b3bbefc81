"`NormStats` and `RunningStats` against numpy in float64 over everything, against scikit-learn, and against the formulas written out"

import copy,json,math,pickle
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from fastai.vision.all import TensorImage
from sklearn.preprocessing import StandardScaler
from torchvision.transforms import v2

from fastai_normstats import moments,running
from fastai_normstats.running import NormStats,RunningStats

stat_names = ('mean', 'std', 'image_std', 'mean_se', 'std_se', 'image_std_se')

def images(n, *shape, seed=0, c=3):
    "A batch whose images differ in brightness and contrast, within [0, 1]"
    g = torch.Generator().manual_seed(seed)
    def rand(*s): return torch.rand(s, generator=g)
    dims = [1]*len(shape)
    return rand(n, c, *dims)*.5 + rand(n, c, *dims)*.5*rand(n, c, *shape)

def close(got, want, rtol):
    "Same shape and relative difference; `test_close` would pass over a missing channel"
    got,want = np.asarray(got, dtype=np.float64),np.asarray(want, dtype=np.float64)
    assert got.shape==want.shape, (got.shape, want.shape)
    np.testing.assert_allclose(got, want, rtol=rtol, atol=0)

def reference(batches):
    "All statistics from the formulas, over all images at once: numpy, float64, two passes; images as clusters of different sizes"
    ims  = [im.reshape(im.shape[0], -1) for b in batches for im in b.detach().cpu().to(torch.float64).numpy()]
    x,n  = np.concatenate(ims, 1),len(ims)
    mean,std = x.mean(1),x.std(1)
    w    = np.array([im.shape[1] for im in ims])[:,None]
    m,s  = np.array([im.mean(1) for im in ims]),np.array([im.std(1) for im in ims])
    q    = np.array([((im-mean[:,None])**2).mean(1) for im in ims])
    def ratio_se(y, ratio): return np.sqrt(((w*(y-ratio))**2).sum(0)/(n*(n-1)))/w.mean()
    return dict(mean=mean, std=std, image_std=s.mean(0), mean_se=ratio_se(m, mean), std_se=ratio_se(q, std**2)/(2*std),
                image_std_se=s.std(0, ddof=1)/np.sqrt(n), min=x.min(1), max=x.max(1))

def run(batches, **kwargs):
    rs = RunningStats(**kwargs)
    for b in batches: rs.update(b)
    return rs

def check(rs, batches, rtol=None, names=stat_names):
    "Images over 1,024 pixels are summed in float32: half the 1e-6 that is promised, standard errors to 2e-6; in float64 all is right to 1e-9"
    ref = reference(batches)
    if rtol is None: rtol = 5e-7 if max(b[0,0].numel() for b in batches)>1024 else 1e-9
    for k in names: close(getattr(rs, k), ref[k], 4*rtol if k.endswith('_se') else rtol)
    for k in ('min', 'max'): close(getattr(rs, k), ref[k], 0)

# --- NormStats

def test_normstats_is_a_pair_of_tuples():
    s = NormStats([.5, .25], torch.tensor([.1, .2], dtype=torch.float64))
    assert (s.mean, s.std, s.name, s.estimator, s.domain, s.value_range) == ((.5, .25), (.1, .2), 'custom', 'pooled', None, (0., 1.))
    mean,std = s
    assert (mean, std)==(s.mean, s.std) and all(type(o) is float for o in mean+std)
    with pytest.raises(FrozenInstanceError): s.mean = (0., 0.)
    assert s==NormStats((.5, .25), (.1, .2)) and hash(s)==hash(NormStats((.5, .25), (.1, .2)))

def test_normstats_takes_a_channel_as_a_number(): assert tuple(NormStats(.5, .25)) == ((.5,), (.25,))

@pytest.mark.parametrize('kwargs,match', [
    (dict(mean=(.5, math.nan), std=(1, 1)),     '`mean` must be finite'),
    (dict(mean=(.5, 0), std=(1, math.inf)),     '`std` must be finite'),
    (dict(mean=(.5, .5), std=(1, 0)),           '`std` must be above 0'),
    (dict(mean=(.5, .5), std=(1, -1)),          '`std` must be above 0'),
    (dict(mean=(.5, .5), std=(1,)),             '`mean` has 2 channels and `std` 1'),
    (dict(mean=(), std=()),                     'no channel'),
    (dict(mean='abc', std=(1,)),                '`mean` must be numbers'),
    (dict(mean=None, std=(1,)),                 '`mean` must be numbers'),
    (dict(mean=.5, std=1, value_range=(1, 0)),  r'`value_range` must be \(lowest, highest\)'),
    (dict(mean=.5, std=1, value_range=(0, 1, 2)), r'`value_range` must be \(lowest, highest\)'),
    (dict(mean=.5, std=1, estimator='median'),  "`estimator` must be 'pooled' or 'image'")])
def test_normstats_refuses(kwargs, match):
    with pytest.raises(ValueError, match=match) as e: NormStats(**kwargs)
    assert '\n' not in str(e.value)

def test_normstats_dict_survives_json():
    s = NormStats((1/3, .1), (.2, 2/7), name='x', estimator='image', domain='chest X-ray', value_range=(-1024, 1024), source='here')
    assert NormStats.from_dict(json.loads(json.dumps(s.to_dict())))==s

@pytest.mark.parametrize('d', [[], dict(mean=[1]), dict(mean=[1], std=[1], men=[1])])
def test_normstats_from_foreign_dict(d):
    with pytest.raises(ValueError, match='NormStats'): NormStats.from_dict(d)

def test_normstats_to_torchvision():
    s,x = NormStats((.1, .2, .3), (.4, .5, .6)),images(2, 5, 4)
    want = (x.double()-torch.tensor(s.mean).double().view(3, 1, 1))/torch.tensor(s.std).double().view(3, 1, 1)
    tfm  = s.to_torchvision()
    assert isinstance(tfm, v2.Normalize)
    torch.testing.assert_close(tfm(x).double(), want, rtol=1e-5, atol=1e-6)

# --- moments

@pytest.mark.parametrize('shape', [(9, 7), (63,), (4, 5, 3), (1, 1)], ids=str)
@pytest.mark.parametrize('bs', [1, 4, 11])
def test_moments(shape, bs):
    x = images(11, *shape)
    rs = run(x.split(bs))
    names = stat_names if shape!=(1, 1) else ('mean', 'std', 'mean_se', 'std_se')
    check(rs, [x], names=names)
    assert (rs.n_images, rs.n_pixels, rs.n_channels) == (11, 11*math.prod(shape), 3)
    if shape==(1, 1): close(rs.image_std, [0]*3, 0)

@pytest.mark.parametrize('dtype,scale,offset', [(torch.float64, 1, 0), (torch.float16, 1, 0), (torch.bfloat16, 1, 0),
    (torch.uint8, 255, 0), (torch.int8, 200, -100),
    (torch.int16, 4000, -1000), (torch.uint16, 65535, 0), (torch.int32, 1e9, -5e8), (torch.int64, 1e9, 0)], ids=str)
def test_dtypes(dtype, scale, offset):
    "16-bit floats hold 3 digits: the sums must not be made in them"
    x = (images(6, 20, 20).double()*scale+offset).to(dtype)
    check(run(x.split(4)), [x])
    big = (images(4, 50, 50).double()*scale+offset).to(dtype)
    check(run(big.split(3)), [big], rtol=1e-9 if dtype in (torch.float64, torch.int32, torch.int64) else 5e-7)

def test_tensor_types_and_layouts():
    "A fastai subclass, a transposed view and one that needs a gradient count as what they hold"
    x = images(6, 9, 7)
    want = run([x]).to_dict()
    assert run([TensorImage(x)]).to_dict()==want
    assert run([x.to(memory_format=torch.channels_last)]).to_dict()==want
    assert run([x.clone().requires_grad_()]).to_dict()==want
    rs = run([TensorImage(x)])
    assert all(type(getattr(rs, k)) is torch.Tensor and getattr(rs, k).dtype==torch.float64 for k in (*stat_names, 'min', 'max'))

def test_batch_is_left_as_it_is():
    x = images(3, 5, 5)
    was = x.clone()
    RunningStats().update(x)
    assert torch.equal(x, was)

@pytest.mark.parametrize('bs', [1, 3, 8])
def test_against_sklearn(bs):
    "Another incremental implementation, fed batch by batch with pixels as rows"
    x,sk,rs = images(8, 12, 10),StandardScaler(),RunningStats()
    for b in x.split(bs):
        rs.update(b)
        sk.partial_fit(b.double().transpose(0, 1).flatten(1).T.numpy())
    close(rs.mean, sk.mean_, 2e-7), close(rs.std, np.sqrt(sk.var_), 2e-7)
    rs = run(x.double().split(bs))
    close(rs.mean, sk.mean_, 1e-12), close(rs.std, np.sqrt(sk.var_), 1e-12)

@pytest.mark.parametrize('bs', [1, 2, 4])
def test_exact_on_small_data(bs):
    "Whole numbers, worked out by hand: four images of two pixels, 1 3, 5 5, 2 8, 0 8"
    x = torch.tensor([[1, 3], [5, 5], [2, 8], [0, 8]]).view(4, 1, 1, 2)
    for dtype in (torch.uint8, torch.float16, torch.float32, torch.float64):
        rs = run(x.to(dtype).split(bs))
        assert (rs.mean.item(), rs.std.item()**2, rs.image_std.item())==(4., pytest.approx(8, rel=1e-14), pytest.approx(2, rel=1e-14))
        assert rs.mean_se.item()==pytest.approx(math.sqrt(((2-4)**2+(5-4)**2+(5-4)**2+(4-4)**2)/3/4), rel=1e-14)
        q = [5, 1, 10, 16]  # mean squared distance of each image's pixels from 4
        assert rs.std_se.item()==pytest.approx(math.sqrt(sum((o-8)**2 for o in q)/3/4)/(2*math.sqrt(8)), rel=1e-14)

@pytest.mark.parametrize('paper,ink', [(250, 0), (230, 25), (243, 20), (255, 254), (128, 127)])
def test_repeated_values(paper, ink):
    "Pages, masks, padding: float32 rounds equal values in one direction, which no averaging over images undoes"
    g = torch.Generator().manual_seed(0)
    x = torch.where(torch.rand(16, 3, 224, 224, generator=g)<.03, ink/255, paper/255)
    check(run(x.split(8)), [x], names=('mean', 'std', 'image_std'))
    for k in ('mean', 'std', 'image_std'): close(getattr(RunningStats().update(x, torch.ones(224, 224)>0), k), reference([x])[k], 5e-7)

def test_channels_of_different_kinds():
    "One image-channel where squares cancel beside ordinary ones; the centred ones must not change their neighbours"
    x = images(6, 30, 30)
    x[2,1] = x[2,1]*1e-3+.9
    x[4,0] = .25
    check(run(x.split(4)), [x])
    x = torch.cat([images(6, 40, 40)[:,:1]*100, images(6, 40, 40)[:,1:]*1e-22], 1)
    check(run(x.split(4)), [x])

@pytest.mark.parametrize('scale', [1e-30, 1e-22, 1e-12, 1e12, 1e19, 1e30, 3e38])
def test_scales_that_float32_cannot_square(scale):
    x = images(6, 40, 40)*scale
    check(run(x.split(4), value_range=(0, 1e39)), [x])

def test_float64_beyond_what_can_be_squared():
    with pytest.raises(ValueError, match='cannot be squared'): run([images(2, 4, 4).double()*1e200])

@pytest.mark.parametrize('n', [1, 2, 1023, 1024, 1025, 4096, 5000])
def test_any_number_of_pixels(n):
    "Sums are made in runs of 1,024 and a rest"
    x = images(3, n)
    check(run([x]), [x], names=stat_names if n>1 else ('mean', 'std', 'mean_se', 'std_se'))

def test_bits_do_not_depend_on_the_batch():
    "An image's moments are the same bits alone and in a batch of any size, so that merging is exact to 1e-12"
    x = images(40, 33, 47)
    want = run([x])
    for bs in (1, 7, 13, 40):
        for k in stat_names: close(getattr(run(x.split(bs)), k), getattr(want, k), 1e-12)

@pytest.mark.parametrize('reads', [1, 3, 100])
def test_reading_does_not_change_the_bits(reads):
    x = images(200, 5, 5)
    rs,quiet = RunningStats(),run(x.split(1))
    for i,b in enumerate(x.split(1)):
        rs.update(b)
        if i%reads==0: rs.mean,rs.n_images,rs.quantile(.5),repr(rs)
    assert rs.to_dict()==quiet.to_dict()

def test_large_offset():
    "30000 ± 100, as in unscaled 16-bit images: E[x²]−E[x]² in float32 fails where this one does not"
    x = (30000+100*torch.randn(8, 2, 64, 64, generator=torch.Generator().manual_seed(0))).float()
    ref = reference([x])
    naive = ((x**2).mean((0,2,3))-x.mean((0,2,3))**2).clamp(min=0).sqrt()
    assert (np.abs(naive.numpy()/ref['std']-1)>1e-3).any()
    for bs in (1, 3, 8): check(run(x.split(bs)), [x])

def test_small_values(): check(run((images(6, 8, 8)*1e-12).split(2)), [images(6, 8, 8)*1e-12])

@pytest.mark.parametrize('v', [0., .1, 255, 30000.1, -1024])
def test_constant_channel_has_std_0(v):
    "Exactly 0, also where the float32 value has no short binary form; the varying channel beside it is right"
    x = images(6, 9, 9, c=2)
    x[:,0] = v
    rs = run(x.split(4))
    assert rs.std[0]==rs.image_std[0]==rs.std_se[0]==0
    close(rs.mean[0], x[0,0,0,0].double(), 1e-15)
    close(rs.std[1], x[:,1].double().numpy().std(), 2e-7)
    with pytest.raises(ValueError, match='above 0'): rs.stats()

def test_constant_images_of_different_brightness():
    "No spread within an image and some between: only the pooled std sees it"
    x = torch.tensor([.2, .4, .9]).view(3, 1, 1, 1).expand(3, 1, 6, 6)
    rs = run([x[:2], x[2:]])
    close(rs.std, [x[:,0,0,0].double().numpy().std()], 1e-12)
    assert rs.image_std[0]<1e-12

def test_stats():
    rs = run([images(5, 9, 9)])
    pooled,image = rs.stats(),rs.stats('image')
    assert (pooled.estimator, image.estimator)==('pooled', 'image') and pooled.mean==image.mean==tuple(rs.mean.tolist())
    assert pooled.std==tuple(rs.std.tolist()) and image.std==tuple(rs.image_std.tolist())
    with pytest.raises(ValueError, match='estimator'): rs.stats('median')

# --- masks, NaN and infinity

def masks(x, seed=1):
    "A random mask with very different shares of the pixels from image to image, and none of the first image's"
    g = torch.Generator().manual_seed(seed)
    m = torch.rand(len(x), 1, *x.shape[2:], generator=g)<torch.rand(len(x), 1, *[1]*(x.ndim-2), generator=g)
    m[0] = False
    return m

def check_masked(rs, x, m):
    "`rs` against a reference over the counted pixels of each image, as images of different sizes; `m` has all channels"
    for c in range(x.shape[1]):
        ims = [x[i,c][m[i,c]].view(1, 1, -1) for i in range(len(x)) if m[i,c].any()]
        ref = reference(ims)
        for k in stat_names: close(getattr(rs, k)[c:c+1], ref[k], 5e-7)
        for k in ('min', 'max'): close(getattr(rs, k)[c:c+1], ref[k], 0)

@pytest.mark.parametrize('shape', [(9, 7), (60, 50), (63,), (4, 5, 3)], ids=str)
@pytest.mark.parametrize('offset,scale', [(0, 1), (30000, 100)])
def test_only_the_pixels_of_the_mask_count(shape, offset, scale):
    x = images(11, *shape)*scale+offset
    m,rs = masks(x),RunningStats(value_range=(0, 40000))
    for b,mb in zip(x.split(4), m.split(4)): rs.update(b, mb)
    check_masked(rs, x, m.expand_as(x))
    assert rs.n_images==m.flatten(1).any(1).sum() and rs.n_pixels==m.sum()
    if x[0,0].numel()<=1000: assert (rs.hist.sum(1)+rs.overflow+rs.underflow==m.sum()).all()

@pytest.mark.parametrize('shape', [(5, 6), (1, 5, 6), (1, 1, 5, 6), (4, 1, 5, 6), (5, 1), (4, 1, 1, 1)], ids=str)
def test_masks_that_broadcast(shape):
    x,m = images(4, 5, 6),torch.rand(shape, generator=torch.Generator().manual_seed(0))<.7
    rs = RunningStats().update(x, m)
    check_masked(rs, x, m.expand(4, 1, 5, 6).expand_as(x))

def test_mask_of_everything_changes_nothing():
    x = images(5, 20, 20)
    for k in stat_names: close(getattr(RunningStats().update(x, torch.ones(5, 1, 20, 20, dtype=torch.bool)), k), getattr(run([x]), k), 1e-12)

def test_nan_outside_the_mask_is_nobodys_business():
    x,m = images(3, 6, 6),torch.ones(3, 1, 6, 6, dtype=torch.bool)
    m[1,0,2] = False
    x[1,:,2] = math.nan
    check_masked(RunningStats().update(x, m), x, m.expand_as(x))
    with pytest.raises(ValueError, match='6 in channel 0'): RunningStats().update(x)
    x[1,1,3,0] = math.inf
    with pytest.raises(ValueError, match=r'\(1 in channel 1\)'): RunningStats().update(x, m)

@pytest.mark.parametrize('mask,err,match', [
    (torch.ones(3, 1, 4, 4),                       TypeError,  r'must be bool .*float32'),
    (torch.ones(3, 3, 4, 4, dtype=torch.bool),     ValueError, r'broadcast to \(3, 1, 4, 4\), one channel for all, got \(3, 3, 4, 4\)'),
    (torch.ones(2, 1, 4, 4, dtype=torch.bool),     ValueError, 'broadcast'),
    (torch.ones(3, 1, 4, 5, dtype=torch.bool),     ValueError, 'broadcast'),
    (np.ones((3, 1, 4, 4), bool),                  TypeError,  'must be a tensor, got ndarray')])
def test_refused_masks(mask, err, match):
    rs = run([images(5, 4, 4)])
    was = rs.to_dict()
    with pytest.raises(err, match=match): rs.update(images(3, 4, 4), mask)
    assert rs.to_dict()==was

def test_nothing_counted():
    none = torch.zeros(4, 4, dtype=torch.bool)
    rs = RunningStats().update(images(3, 4, 4), none)
    assert (rs.n_images, rs.n_pixels)==(0, 0)
    with pytest.raises(ValueError, match='no images counted'): rs.mean
    close(rs.update(images(3, 4, 4)).mean, run([images(3, 4, 4)]).mean, 1e-12)
    one = RunningStats('ignore').update(torch.cat([images(3, 4, 4)[:,:2], torch.full((3, 1, 4, 4), math.nan)], 1))
    with pytest.raises(ValueError, match='no pixel of channel 2'): one.mean
    assert 'no pixel of channel 2' in repr(one)
    assert (one.n_images, one.n_pixels)==(3, 48)

@pytest.mark.parametrize('bs', [1, 3, 10])
def test_ignoring_nan_is_dropping_it(bs):
    "scikit-learn's test, with images as clusters: NaN anywhere, different channels having different ones"
    x,g = images(10, 8, 9),torch.Generator().manual_seed(3)
    gone = torch.rand(x.shape, generator=g)<.3
    x[gone] = torch.tensor([math.nan, math.inf, -math.inf])[torch.randint(3, (int(gone.sum()),), generator=g)]
    x[4,1] = math.nan
    rs = run(x.split(bs), nonfinite='ignore')
    check_masked(rs, x, ~gone & x.isfinite())
    assert rs.n_images==10 and rs.n_pixels==x.isfinite().any(1).sum()
    sk = StandardScaler().fit(x.where(x.isfinite(), math.nan).double().transpose(0, 1).flatten(1).T.numpy())
    close(rs.mean, sk.mean_, 5e-7), close(rs.std, np.sqrt(sk.var_), 5e-7)

def test_ignoring_without_any_is_the_plain_count():
    x = images(10, 8, 9)
    assert {**run([x], nonfinite='ignore').to_dict(), 'nonfinite': 'error'}==run([x]).to_dict()

def test_parts_with_gaps_merge_exactly():
    x,rng = images(20, 8, 7),np.random.default_rng(0)
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(1))<.4] = math.nan
    x[:5,2] = math.nan  # the first part may know nothing of a channel
    one,ps = run([x], nonfinite='ignore'),[run([p], nonfinite='ignore') for p in x.split([5, 4, 1, 10])]
    for order in (ps, ps[::-1], [ps[i] for i in rng.permutation(4)]):
        some = sum(order[1:], order[0])
        for k in (*stat_names, 'min', 'max'): close(getattr(some, k), getattr(one, k), 1e-12)
        assert torch.equal(some.hist, one.hist) and (some.n_images, some.n_pixels)==(one.n_images, one.n_pixels)

# --- accelerators

def test_counting_waits_for_no_number():
    "Tensors on `meta` have shapes and no values: whatever asks for one fails. So an update that passes there never makes the host wait for a GPU"
    x,m = torch.empty(4, 3, 40, 40, device='meta'),torch.empty(4, 1, 40, 40, device='meta', dtype=torch.bool)
    for nonfinite in ('error', 'ignore'):
        rs = RunningStats(nonfinite)
        for _ in range(10): rs.update(x).update(x, m).update(x.to(torch.uint8)).update(x.to(torch.float16))
        with pytest.raises(NotImplementedError): rs.mean

@pytest.fixture
def elsewhere(monkeypatch):
    "`RunningStats` counts as on an accelerator, with CPU tensors, which have values to compare"
    def all_at_once(x, valid=None): return moments._image_moments(x.to(torch.float64), valid)
    monkeypatch.setattr(running, 'image_moments', all_at_once)
    monkeypatch.setattr(running, 'one_visit', lambda x, step: (all_at_once(x), x[...,::step].clone()))
    monkeypatch.setattr(moments, '_tally', moments._tally_without_waiting)

@pytest.mark.parametrize('offset,scale', [(0, 1), (30000, 100)])
def test_the_path_of_accelerators(elsewhere, offset, scale):
    x = images(11, 60, 50)*scale+offset
    m,holes = masks(x),x.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(1))<.8, math.nan)
    rs,ign,plain = (RunningStats(k, value_range=(0, 40000)) for k in ('error', 'ignore', 'error'))
    for b,mb,h in zip(x.split(4), m.split(4), holes.split(4)): rs.update(b, mb), ign.update(h), plain.update(b)
    check_masked(rs, x, m.expand_as(x)), check_masked(ign, holes, holes.isfinite())
    check(plain, [x], rtol=1e-9)
    with pytest.raises(ValueError, match='NaN or infinite'): rs.update(holes)

# --- merging

def parts(x, rng):
    "`x` cut into pieces at random places, each a batch"
    cuts = sorted(rng.choice(np.arange(1, len(x)), rng.integers(0, 6), replace=False).tolist())
    return [p for p in torch.tensor_split(x, cuts)]

@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('offset', [0, 30000])
def test_merge_any_split_any_order(seed, offset):
    rng = np.random.default_rng(seed)
    x   = images(20, 8, 7, seed=seed).double()*(100 if offset else 1) + offset
    one = RunningStats(value_range=(0, 40000)).update(x)
    ps  = [run([p], value_range=(0, 40000)) for p in parts(x, rng)]
    while len(ps)>1:  # any two, either way round, by `+` or `merge`
        a,b = (ps.pop(int(rng.integers(len(ps)))) for _ in range(2))
        ps.append(a+b if rng.random()<.5 else a.merge(b))
    for k in (*stat_names, 'min', 'max'): close(getattr(ps[0], k), getattr(one, k), 1e-12)
    assert (ps[0].n_images, ps[0].n_pixels)==(one.n_images, one.n_pixels)
    for k in ('hist', 'underflow', 'overflow'): assert torch.equal(getattr(ps[0], k), getattr(one, k))

def test_many_merges_do_not_drift():
    x = images(400, 3, 3)+1000
    close(run(x.split(1)).std, run([x]).std, 1e-12)

def test_merge_of_very_different_parts():
    "A black thousand and one bright image: the large shift between the parts is where a naive merge loses digits"
    a,b = images(1000, 2, 2)*1e-3,images(1, 2, 2)+5e4
    for ps in ([a, b], [b, a]): check(run(ps), [a, b])

def sized(seed=0): return [images(1, h, w, seed=seed+i) for i,(h,w) in enumerate([(4, 5), (20, 10), (7, 7), (40, 3), (1, 2), (16, 16)])]

def test_images_of_different_sizes():
    "Pixel-weighted moments, and standard errors of a ratio of two sums"
    check(run(sized()), sized())
    rs,back = run(sized()),run(sized()[::-1])
    for k in stat_names: close(getattr(rs, k), getattr(back, k), 1e-12)
    assert rs.n_pixels==sum(b[0,0].numel() for b in sized())

def test_plus_leaves_both_alone():
    a,b = run([images(3, 4, 4)]),run([images(2, 4, 4, seed=1)])
    was = a.to_dict(),b.to_dict()
    s = a+b
    s.update(images(1, 4, 4))
    assert (a.to_dict(), b.to_dict())==was

def test_merge_does_not_share_memory():
    a,b = RunningStats(),run([images(3, 4, 4)])
    was = b.to_dict()
    a.merge(b).update(images(2, 4, 4, seed=1))
    assert b.to_dict()==was

def test_merge_with_empty():
    rs,want = run([images(3, 4, 4)]),run([images(3, 4, 4)]).to_dict()
    assert (rs+RunningStats()).to_dict()==(RunningStats()+rs).to_dict()==rs.merge(RunningStats()).to_dict()==want
    assert (RunningStats()+RunningStats()).n_images==0

def test_merge_with_itself_counts_twice():
    x,rs = images(4, 5, 5),run([images(4, 5, 5)])
    rs.merge(rs)
    check(rs, [x, x])

# --- standard errors

def test_se_formulas_for_images_of_one_size():
    "SE(mean) = SD of image means / √n; SE(std) = SD(q) / (2 std √n)"
    x = images(12, 6, 6)
    a,rs,n = x.double().numpy(),run(x.split(5)),12
    mean,std = a.mean((0,2,3)),a.std((0,2,3))
    q = ((a-mean[:,None,None])**2).mean((2,3))
    close(rs.mean_se, a.mean((2,3)).std(0, ddof=1)/np.sqrt(n), 2e-7)
    close(rs.std_se,  q.std(0, ddof=1)/(2*std*np.sqrt(n)), 2e-7)
    close(rs.image_std_se, a.std((2,3)).std(0, ddof=1)/np.sqrt(n), 2e-7)

def test_se_is_the_spread_over_samples():
    "The scatter of the estimates over 400 independent samples is what the standard errors say"
    rs = [run([images(60, 3, 3, seed=i, c=1)]) for i in range(400)]
    for k in ('mean', 'std', 'image_std'):
        scatter = torch.cat([getattr(r, k) for r in rs]).std()
        claimed = torch.cat([getattr(r, f'{k}_se') for r in rs]).square().mean().sqrt()
        assert .88<claimed/scatter<1.12, (k, claimed, scatter)

def test_single_image_has_no_se():
    rs = run([images(1, 8, 8)])
    for k in ('mean_se', 'std_se', 'image_std_se'): assert getattr(rs, k).isnan().all() and getattr(rs, k).shape==(3,)

# --- histogram

def test_histogram_of_small_images_is_numpys():
    "Up to a thousand pixels all are counted; the ends of the range belong to the first and last bin"
    x = images(5, 30, 30)*1.6-.3
    x[0,0,0,0],x[0,0,0,1] = 0,1
    rs = run(x.split(2), bins=32)
    for c in range(3):
        v = x[:,c].double().numpy().ravel()
        assert rs.hist[c].tolist()==np.histogram(v, 32, (0, 1))[0].tolist()
        assert (rs.underflow[c], rs.overflow[c])==((v<0).sum(), (v>1).sum())
    assert (rs.hist.sum(1)+rs.underflow+rs.overflow).tolist()==[rs.n_pixels]*3

@pytest.mark.parametrize('value_range', [(0, 1), (-2, 5), (.25, .75)])
def test_histogram_of_large_images_is_of_an_even_sample(value_range):
    x = images(3, 50, 50)
    rs,every3 = run([x], bins=20, value_range=value_range),x.flatten(2)[...,::3].double().numpy()  # 2,500/3 = 834 of each image
    for c in range(3): assert rs.hist[c].tolist()==np.histogram(every3[:,c], 20, value_range)[0].tolist()

@pytest.mark.parametrize('h,w', [(40, 40), (64, 64), (100, 100), (96, 120), (60, 210), (1, 5000), (5000, 1), (37, 91)])
def test_histogram_sample_is_spread_evenly(h, w):
    "Pixels numbered through show which are counted: a constant step, about a thousand of them, from every column"
    n  = h*w
    rs = run([torch.arange(n).view(1, 1, h, w)], bins=n, value_range=(-.5, n-.5))
    at = rs.hist[0].nonzero().flatten()
    assert rs.hist.max()==1 and len(at.diff().unique())==1
    assert 400<=len(at)<=1000
    if w<=len(at): assert len((at%w).unique())==w

@pytest.mark.parametrize('tally', ['_tally', '_tally_without_waiting'])
def test_histogram_of_any_values_is_numpys(monkeypatch, tally):
    "Values on the edges of bins and of the range, far outside and infinite ones"
    x = torch.cat([torch.linspace(-1, 2, 301), torch.tensor([0, 1, .25, .5, -1e30, 1e30, math.inf, -math.inf, 1-1e-7, math.nan])]).view(1, 1, -1)
    valid = ~x.isnan()
    monkeypatch.setattr(moments, '_tally', getattr(moments, tally))
    got = moments.histogram(x.clone(), 8, (0., 1.), valid)[0]
    v = x[valid].numpy()
    assert got[1:-1].tolist()==np.histogram(v[(v>=0) & (v<=1)], 8, (0, 1))[0].tolist()
    assert (got[0], got[-1])==((v<0).sum(), (v>1).sum())

def test_histogram_of_many_channels_and_bins():
    "More places than float32 has whole numbers: 400 channels of 65,536 bins"
    x = torch.rand(1, 400, 40, 30, generator=torch.Generator().manual_seed(0))
    rs = run([x], bins=65536)
    want = np.histogram(x[0,-1].flatten()[::running.every(1200, 30)].numpy(), 65536, (0, 1))[0]
    assert rs.hist[-1].tolist()==want.tolist()

# --- quantiles

@pytest.mark.parametrize('value_range,bins', [((0, 1), 256), ((-1, 3), 100), ((.3, .6), 64)])
def test_quantiles_are_numpys_to_a_bin(value_range, bins):
    x,qs = images(40, 20, 20),[0, .005, .25, .5, .9, .995, 1]
    rs = run(x.split(9), value_range=value_range, bins=bins)
    got,want = rs.quantile(qs),np.quantile(x.double().numpy(), qs, axis=(0, 2, 3))
    assert got.shape==(7, 3) and got.dtype==torch.float64
    lo,hi = value_range
    inside = (want>lo) & (want<hi)
    assert (np.abs(got.numpy()-want)[inside]<=(hi-lo)/bins).all()
    assert (got.diff(dim=0)>=0).all()  # also where it lies outside the histogram
    close(got[0], rs.min, 0), close(got[-1], rs.max, 0)
    close(rs.quantile(.25), got[2], 0)

@pytest.mark.parametrize('q', [-.1, 1.1, math.nan, [[.5]], [0, 2]])
def test_refused_quantiles(q):
    with pytest.raises(ValueError, match='`q` must lie between 0 and 1'): run([images(3, 4, 4)]).quantile(q)

def test_quantile_of_a_constant(): close(run([torch.full((2, 2, 5, 5), .3)]).quantile([0, .5, 1]), np.float64(np.float32(.3))*np.ones((3, 2)), 0)

# --- intervals for a finite set

def test_half_widths():
    rs = run([images(60, 5, 5)])
    for got,se in zip(rs.half_widths(), (rs.mean_se, rs.std_se)): close(got, 1.96*se, 1e-12)  # of images in general
    rs.population = 60
    for got,se in zip(rs.half_widths(), (rs.mean_se, rs.std_se)): close(got, 0*se, 0)         # of all there are
    rs.complete,rs.population = False,100
    for got,se in zip(rs.half_widths(), (rs.mean_se, rs.std_se)): close(got, 1.96*se*np.sqrt(.4), 1e-12)

def test_merged_with_a_part():
    "Images whose number nobody stated are a population of their own"
    all_of,part = run([images(16, 5, 5)]),run([images(16, 5, 5, seed=1)])
    part.complete,part.population = False,20
    both = all_of+part
    assert (both.complete, both.population, both.n_images)==(False, 36, 32)
    for got,se in zip(both.half_widths(), (both.mean_se, both.std_se)): close(got, 1.96*se*np.sqrt(1-32/36), 1e-12)
    assert (run([images(2, 3, 3)])+run([images(2, 3, 3)])).population is None

# --- state

def test_dict_survives_json_bit_by_bit():
    rs = run(images(7, 9, 9).split(3))
    back = RunningStats.from_dict(json.loads(json.dumps(rs.to_dict())))
    assert back.to_dict()==rs.to_dict()
    for k in (*stat_names, 'min', 'max', 'hist'): assert torch.equal(getattr(back, k), getattr(rs, k))
    more = images(4, 9, 9, seed=1)
    assert back.update(more).to_dict()==rs.update(more).to_dict()

def test_empty_dict_survives_json():
    rs = RunningStats(bins=16, value_range=(0, 255))
    back = RunningStats.from_dict(json.loads(json.dumps(rs.to_dict())))
    assert (back.bins, back.value_range, back.n_images)==(16, (0., 255.), 0)
    back.update(images(1, 2, 2))

@pytest.mark.parametrize('d', [None, [], {}, dict(bins=3)])
def test_from_foreign_dict(d):
    with pytest.raises(ValueError, match='RunningStats'): RunningStats.from_dict(d)

def test_dict_of_a_part_with_gaps():
    x = images(7, 9, 9)
    x[:,1] = math.nan
    rs = run([x], nonfinite='ignore')
    rs.complete,rs.population = False,50
    back = RunningStats.from_dict(json.loads(json.dumps(rs.to_dict())))
    assert back.to_dict()==rs.to_dict() and (back.complete, back.population, back.nonfinite)==(False, 50, 'ignore')

@pytest.mark.parametrize('field,value', [('mu', [[1, 2, 3]]), ('co', 'abc'), ('hist', [[1.5]*258]*2), ('n', 3), ('n', []), ('min', None), ('pivot', [[1], [2, 3]]),
    ('n_images', 2.5), ('n_images', -4), ('n_pixels', None), ('n_images', True)], ids=str)
def test_from_damaged_dict(field, value):
    d = run(images(7, 9, 9).split(3)).to_dict()
    d['state'][field] = value
    with pytest.raises(ValueError, match='RunningStats'): RunningStats.from_dict(d)

@pytest.mark.parametrize('field,value', [('complete', 'no'), ('population', 'x'), ('population', -1)])
def test_from_damaged_frame(field, value):
    with pytest.raises(ValueError, match='RunningStats'): RunningStats.from_dict({**run([images(3, 4, 4)]).to_dict(), field: value})

@pytest.mark.parametrize('again', [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=['copy', 'deepcopy', 'pickle'])
def test_copies_are_equal_and_apart(again):
    rs = run([images(4, 6, 6)])
    new,was = again(rs),rs.to_dict()
    assert new.to_dict()==was
    new.update(images(2, 6, 6, seed=1))
    assert rs.to_dict()==was and new.n_images==6

def test_memory_does_not_grow():
    "Up to 64 batches wait to be merged; after that it takes no more room for more of them"
    def size(n_batches):
        rs = run(images(n_batches, 4, 4).split(1))
        return rs.n_images,len(json.dumps(rs.to_dict()))//1000,len(pickle.dumps(run(images(n_batches, 4, 4).split(1))))//1000
    ten,thousand = size(640),size(1920)
    assert size(63)[2]>ten[2]==thousand[2] and ten[1]==thousand[1] and (ten[0], thousand[0])==(640, 1920)

@pytest.mark.parametrize('k', [*stat_names, 'stats'])
def test_empty(k):
    with pytest.raises(ValueError, match='no images'): r = getattr(RunningStats(), k); r()
    assert 'no images' in repr(RunningStats())

def bad_pixel(v, n=1):
    x = images(2, 4, 4)
    x[1,2].view(-1)[:n] = v
    return x

@pytest.mark.parametrize('x,err,match', [
    (bad_pixel(math.nan, 3),           ValueError, '3 in channel 2'),
    (bad_pixel(math.inf),              ValueError, '1 in channel 2'),
    (bad_pixel(-math.inf),             ValueError, '1 in channel 2'),
    (images(2, 4, 4, c=1),             ValueError, '1 channels after images of 3'),
    (images(2, 4, 4)[:,0,0],           ValueError, r'must be \(B, C, \*spatial\)'),
    (images(2, 4, 4)[:0],              ValueError, 'no empty side'),
    (images(2, 4, 4)[...,:0],          ValueError, 'no empty side'),
    (images(2, 4, 4)>.5,               TypeError,  'real numbers'),
    (images(2, 4, 4).to(torch.cfloat), TypeError,  'real numbers'),
    (images(2, 4, 4).numpy(),          TypeError,  'must be a tensor')])
def test_refused_batch_changes_nothing(x, err, match):
    rs = run([images(5, 4, 4)])
    was = rs.to_dict()
    with pytest.raises(err, match=match) as e: rs.update(x)
    assert rs.to_dict()==was and '\n' not in str(e.value)

def test_refused_first_batch_changes_nothing():
    rs = RunningStats()
    with pytest.raises(ValueError): rs.update(bad_pixel(math.nan))
    assert rs.update(images(5, 4, 4)).to_dict()==run([images(5, 4, 4)]).to_dict()

@pytest.mark.parametrize('other,err,match', [
    (RunningStats(bins=10).update(images(2, 4, 4)),              ValueError, 'histograms differ'),
    (RunningStats(value_range=(0, 2)).update(images(2, 4, 4)),   ValueError, 'histograms differ'),
    (RunningStats().update(images(2, 4, 4, c=1)),                ValueError, 'channels'),
    (3,                                                          TypeError,  'RunningStats only')],
    ids=['bins', 'range', 'channels', 'type'])
def test_refused_merge_changes_nothing(other, err, match):
    rs = run([images(5, 4, 4)])
    was = rs.to_dict()
    with pytest.raises(err, match=match): rs.merge(other)
    assert rs.to_dict()==was

@pytest.mark.parametrize('kwargs,match', [(dict(bins=0), '`bins`'), (dict(value_range=(1, 1)), '`value_range`'),
    (dict(value_range=(0, math.nan)), '`value_range`'), (dict(bins=2.5), '`bins`'), (dict(nonfinite='drop'), '`nonfinite`')])
def test_refused_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match): RunningStats(**kwargs)

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_gpu():
    "Batches on the GPU give float64 results on the CPU"
    x = images(6, 20, 20)
    rs = run(x.cuda().split(4))
    check(rs, [x], rtol=1e-9)
    assert all(getattr(rs, k).device.type=='cpu' for k in (*stat_names, 'min', 'max', 'hist'))

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_is_not_waited_for():
    "PyTorch itself watches for synchronising calls while batches are counted"
    x,m = images(6, 40, 40).cuda(),torch.ones(6, 1, 40, 40, dtype=torch.bool, device='cuda')
    RunningStats().update(x).mean
    try:
        torch.cuda.set_sync_debug_mode('error')
        rs,ign = RunningStats(),RunningStats('ignore')
        for _ in range(20): rs.update(x), rs.update(x, m), ign.update(x)
    finally: torch.cuda.set_sync_debug_mode('default')
    check(ign, [x]*20, rtol=1e-9)
