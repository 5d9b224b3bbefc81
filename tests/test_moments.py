"""Mean, std, ends and quantiles of images against numpy in float64, against scikit-learn and by hand: any type, size
and value, masks, NaN, accelerators"""

import math

import numpy as np
import pytest
import torch
from fastai.vision.all import TensorImage
from helpers import check_ledger as check,close,images,masks,reference,run,shares,stat_names,state
from sklearn.preprocessing import StandardScaler

from fastai_normstats import moments,running
from fastai_normstats.moments import LEVELS
from fastai_normstats.running import POOLED,RunningStats

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
    want = state(run([x]))
    assert state(run([TensorImage(x)]))==want
    assert state(run([x.to(memory_format=torch.channels_last)]))==want
    assert state(run([x.clone().requires_grad_()]))==want
    rs = run([TensorImage(x)])
    assert all(type(getattr(rs, k)) is torch.Tensor and getattr(rs, k).dtype==torch.float64
               for k in (*stat_names, 'min', 'max'))

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
        assert (rs.mean.item(), rs.std.item()**2, rs.image_std.item())==(4., pytest.approx(8, rel=1e-14),
            pytest.approx(2, rel=1e-14))
        assert rs.mean_se.item()==pytest.approx(math.sqrt(((2-4)**2+(5-4)**2+(5-4)**2+(4-4)**2)/3/4), rel=1e-14)
        q = [5, 1, 10, 16]  # mean squared distance of each image's pixels from 4
        assert rs.std_se.item()==pytest.approx(math.sqrt(sum((o-8)**2 for o in q)/3/4)/(2*math.sqrt(8)), rel=1e-14)

@pytest.mark.slow
@pytest.mark.parametrize('paper,ink', [(250, 0), (230, 25), (243, 20), (255, 254), (128, 127)])
def test_repeated_values(paper, ink):
    "Pages, masks, padding: float32 rounds equal values in one direction, which no averaging over images undoes"
    g = torch.Generator().manual_seed(0)
    x = torch.where(torch.rand(16, 3, 224, 224, generator=g)<.03, ink/255, paper/255)
    check(run(x.split(8)), [x], names=('mean', 'std', 'image_std'))
    for k in ('mean', 'std', 'image_std'): close(getattr(RunningStats().update(x, torch.ones(224, 224)>0), k),
                                                 reference([x])[k], 5e-7)

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
    check(run(x.split(4)), [x])

def test_float64_beyond_what_can_be_squared():
    with pytest.raises(ValueError, match='cannot be squared'): run([images(2, 4, 4).double()*1e200])

@pytest.mark.parametrize('n', [1, 2, 1023, 1024, 1025, 4096, 5000])
def test_any_number_of_pixels(n):
    "Sums are made in runs of 128 and a rest"
    x = images(3, n)
    check(run([x]), [x], names=stat_names if n>1 else ('mean', 'std', 'mean_se', 'std_se'))

def test_bits_do_not_depend_on_the_batch():
    "An image's moments are the same bits alone and in a batch of any size, so that merging is exact to 1e-12"
    x = images(40, 33, 47)
    want = run([x])
    for bs in (1, 7, 13, 40):
        for k in stat_names: close(getattr(run(x.split(bs)), k), getattr(want, k), 1e-12)

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

# --- masks, NaN and infinity

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
    m,rs = masks(x),RunningStats()
    for b,mb in zip(x.split(4), m.split(4)): rs.update(b, mb)
    check_masked(rs, x, m.expand_as(x))
    assert rs.n_images==m.flatten(1).any(1).sum() and rs.n_pixels==m.sum()
    for c in range(3):
        v = x[:,c][m[:,0]].double().numpy()
        below,upto = shares(v, rs.quantile([.2, .5, .8])[:,c].numpy())
        assert (below<=np.array([.25, .55, .85])+.03).all() and (upto>=np.array([.15, .45, .75])-.03).all()

@pytest.mark.parametrize('shape', [(5, 6), (1, 5, 6), (1, 1, 5, 6), (4, 1, 5, 6), (5, 1), (4, 1, 1, 1)], ids=str)
def test_masks_that_broadcast(shape):
    x,m = images(4, 5, 6),torch.rand(shape, generator=torch.Generator().manual_seed(0))<.7
    rs = RunningStats().update(x, m)
    check_masked(rs, x, m.expand(4, 1, 5, 6).expand_as(x))

def test_mask_of_everything_changes_nothing():
    x = images(5, 20, 20)
    for k in stat_names: close(getattr(RunningStats().update(x, torch.ones(5, 1, 20, 20, dtype=torch.bool)), k),
                               getattr(run([x]), k), 1e-12)

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
    (torch.ones(3, 3, 4, 4, dtype=torch.bool),     ValueError,
     r'broadcast to \(3, 1, 4, 4\), one channel for all, got \(3, 3, 4, 4\)'),
    (torch.ones(2, 1, 4, 4, dtype=torch.bool),     ValueError, 'broadcast'),
    (torch.ones(3, 1, 4, 5, dtype=torch.bool),     ValueError, 'broadcast'),
    (np.ones((3, 1, 4, 4), bool),                  TypeError,  'must be a tensor, got ndarray')])
def test_refused_masks(mask, err, match):
    rs = run([images(5, 4, 4)])
    was = state(rs)
    with pytest.raises(err, match=match): rs.update(images(3, 4, 4), mask)
    assert state(rs)==was

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

# --- accelerators

@pytest.mark.slow
def test_counting_waits_for_no_number():
    """Tensors on `meta` have shapes and no values: whatever asks for one fails. So an update that passes there never
    makes the host wait for a GPU"""
    x,m = torch.empty(4, 3, 40, 40, device='meta'),torch.empty(4, 1, 40, 40, device='meta', dtype=torch.bool)
    for nonfinite in ('error', 'ignore'):
        rs = RunningStats(nonfinite)
        for _ in range(10): rs.update(x).update(x, m).update(x.to(torch.uint8)).update(x.to(torch.float16))
        with pytest.raises(NotImplementedError): rs.mean

@pytest.fixture
def elsewhere(monkeypatch):
    "`RunningStats` counts as on an accelerator, with CPU tensors, which have values to compare"
    def all_at_once(x, valid=None): return moments._image_moments(x.to(torch.float64), valid)
    def not_here(x, step): return torch.full((5, *x.shape[:2]), math.nan),x[...,::step]
    def of_the_sample(res, x, m, n, valid): res[...,1:-1] = res[...,1:-1].where((n>0)[...,None], m[1].float()[...,None])
    monkeypatch.setattr(running, 'image_moments', all_at_once)
    monkeypatch.setattr(running, 'one_visit', not_here)
    monkeypatch.setattr(moments, '_sample_again', of_the_sample)

@pytest.mark.parametrize('offset,scale', [(0, 1), (30000, 100)])
def test_the_path_of_accelerators(elsewhere, offset, scale):
    x = images(11, 60, 50)*scale+offset
    m,holes = masks(x),x.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(1))<.8, math.nan)
    rs,ign,plain = (RunningStats(k) for k in ('error', 'ignore', 'error'))
    for b,mb,h in zip(x.split(4), m.split(4), holes.split(4)): rs.update(b, mb), ign.update(h), plain.update(b)
    check_masked(rs, x, m.expand_as(x)), check_masked(ign, holes, holes.isfinite())
    check(plain, [x], rtol=1e-9)
    # of 1,000 pixels an image in place of 250
    np.testing.assert_allclose(plain.quantile(POOLED), run([x]).quantile(POOLED), rtol=0, atol=.05*scale)
    for o,v in ((rs, x.masked_fill(~m, math.nan)), (ign, holes)):
        np.testing.assert_allclose(o.quantile([.1, .5, .9]),
            np.nanquantile(v.double().numpy(), [.1, .5, .9], axis=(0, 2, 3)), rtol=0, atol=.05*scale)
    with pytest.raises(ValueError, match='NaN or infinite'): rs.update(holes)

# --- quantiles of an image

@pytest.mark.parametrize('shape', [(30, 30), (1, 1), (2,), (3, 5), (250,), (32, 32), (4, 5, 6)], ids=str)
def test_quantiles_of_a_small_image_are_numpys(shape):
    "Up to a thousand pixels all are counted, in float64; the sums of the mixture leave 1e-9"
    x = images(1, *shape)*1.6-.3
    got,want = run([x]).quantile(LEVELS),np.quantile(x.double().flatten(2).numpy()[0], LEVELS, axis=-1)
    assert got.shape==(29, 3) and got.dtype==torch.float64
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)

@pytest.mark.parametrize('h,w', [(40, 40), (64, 64), (100, 100), (96, 120), (60, 210), (1, 5000), (5000, 1), (37, 91),
    (224, 224), (1080, 1920)])
def test_sample_of_a_large_image_is_spread_evenly(h, w):
    """A constant step, about 256 pixels, from every column if there are not more of them; quantiles are those whose
    pixels stand for equal shares of the image (Hazen)"""
    n,step = h*w,moments.every(h*w, w)
    at = np.arange(0, n, step)
    assert 100<=len(at)<=256 and len(np.unique(at%w))==min(w, len(at))
    x = torch.rand(1, 1, h, w, generator=torch.Generator().manual_seed(0))
    v,want = x.double().numpy().ravel(),np.quantile(x.double().numpy().ravel()[at], LEVELS, method='hazen')
    want[0],want[-1] = v.min(),v.max()  # known anyway
    np.testing.assert_allclose(run([x]).quantile(LEVELS)[:,0], want, rtol=0, atol=1e-7)

def test_quantiles_of_large_masked_images():
    "A mask that leaves enough of the sample, one that leaves a corner, one that leaves 3 pixels"
    x,m = torch.rand(3, 1, 120, 120, generator=torch.Generator().manual_seed(0)),torch.zeros(3, 1, 120, 120,
        dtype=torch.bool)
    m[0,0,:,20:],m[1,0,:20,:10],m[2,0,5,60:63] = True,True,True
    x = x.where(m, 99.)
    # of 667 pixels: 5 standard deviations, √(.25/667); of all 200 and 3: numpy's
    for i,atol in ((0, .1), (1, 1e-7), (2, 1e-7)):
        got,want = RunningStats().update(x[i:i+1], m[i:i+1]).quantile(LEVELS)[:,
            0],np.quantile(x[i][m[i]].double().numpy(), LEVELS)
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)
        assert got[0]==want[0] and got[-1]==want[-1]

# --- on a GPU

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_gpu():
    "Batches on the GPU give float64 results on the CPU"
    x = images(6, 20, 20)
    rs = run(x.cuda().split(4))
    check(rs, [x], rtol=1e-9)
    assert all(getattr(rs, k).device.type=='cpu' for k in (*stat_names, 'min', 'max'))
    np.testing.assert_allclose(rs.quantile(POOLED), run([x]).quantile(POOLED), rtol=1e-6)

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
