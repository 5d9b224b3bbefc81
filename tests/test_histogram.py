"Nyúl's histogram standardisation against numpy and, where it is installed, TorchIO"

import os,warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.data.all import DataBlock,DataLoaders,RandomSplitter,TfmdDL
from fastai.torch_core import TensorImage
from fastai.vision.data import get_image_files
from helpers import quiet
from PIL import Image

import fastai_normstats.block,fastai_normstats.drift
from fastai_normstats.choice import StatsChoice
from fastai_normstats.images import FloatImageBlock
from fastai_normstats.measure import measure_stats
from fastai_normstats.moments import every
from fastai_normstats.policy import choose_stats
from fastai_normstats.running import RunningStats
from fastai_normstats.schemes import HistogramStandardization
from fastai_normstats.transform import DatasetStats

levels = np.array([1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 99])

def reference(images, masks=None):
    "Landmarks on 0–100 (n_channels, 11) by the definition in the paper, in float64; images (N, C, ...)"
    res = []
    for c in range(images.shape[1]):
        own = [np.percentile(x[c] if m is None else x[c][m[0]], levels)
               for x,m in zip(images.astype(np.float64), masks if masks is not None else [None]*len(images))]
        res.append(np.mean([100*(p-p[0])/(p[-1]-p[0]) for p in own], 0))
    return np.array(res)

def on_0_to_100(landmarks):
    v = np.array(landmarks)
    return 100*(v-v[:,:1])/(v[:,-1:]-v[:,:1])

def scans(n, n_channels, spatial, seed=0):
    "Images of one shape of histogram, each with a brightness and contrast of its own"
    rng = np.random.default_rng(seed)
    body = rng.gamma(3, 1, (n, n_channels, *spatial))
    gain,lift = (rng.uniform(*o, (n, n_channels, *[1]*len(spatial))) for o in ((50, 400), (-100, 300)))
    return (body*gain+lift).astype(np.float32)

class Stack:
    def __init__(self, x): self.x,self.items = x,[f'im{i}' for i in range(len(x))]
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return TensorImage(torch.tensor(self.x[i])),

def fitted(x, **kwargs):
    tfm = DatasetStats(**dict(scheme='histogram', cache=False, **quiet) | kwargs)
    dl = TfmdDL(Stack(x), bs=5, num_workers=0, after_batch=[tfm])
    return dl, next(f for f in dl.after_batch.fs if isinstance(f, DatasetStats))

spaces = pytest.mark.parametrize('spatial', [(24, 20), (8, 10, 9)], ids=['2d', '3d'])
channels = pytest.mark.parametrize('n_channels', [1, 3, 4, 13])

@channels
@spaces
def test_landmarks_map_and_way_back(n_channels, spatial):
    x = scans(12, n_channels, spatial)
    dl,tfm = fitted(x)
    np.testing.assert_allclose(on_0_to_100(tfm.scheme.landmarks), reference(x), atol=.5)
    b = TensorImage(torch.tensor(x))
    y = tfm.encodes(b)
    flat,out = b.flatten(2),y.flatten(2)
    order = flat.argsort(-1)
    assert (out.gather(-1, order).diff(dim=-1)>=-1e-5).all()  # monotone
    np.testing.assert_allclose(tfm.decodes(y), x, atol=1e-4*np.ptp(x))
    assert np.abs(y.mean((0, *range(2, x.ndim)))).max()<.1 and np.abs(y.std((0, *range(2, x.ndim)))-1).max()<.1

def test_each_image_has_the_standard_landmarks_afterwards():
    x = scans(12, 2, (64, 60))
    _,tfm = fitted(x)
    s = tfm.scheme
    y = s.before(torch.tensor(x), 2).numpy()
    for c in range(2):
        own = np.stack([np.percentile(o[c], levels) for o in y])
        np.testing.assert_allclose(own, np.broadcast_to(s.landmarks[c], own.shape), rtol=1e-3, atol=.05)

def test_scanners_agree_afterwards():
    x = scans(24, 1, (40, 40))
    _,tfm = fitted(x)
    y = tfm.encodes(TensorImage(torch.tensor(x))).numpy()
    def spread(v): return v.mean((1, 2, 3)).std()/v.std()
    assert spread(x)>.4 and spread(y)<.05

def test_mask_of_the_image():
    "Landmarks of what counts; the rest becomes 0"
    x = scans(10, 1, (32, 32))+500
    x[:,:,:10] = 0
    def body(v): return v[:, :1]>0
    _,tfm = fitted(x, mask=body)
    np.testing.assert_allclose(on_0_to_100(tfm.scheme.landmarks), reference(x, x>0), atol=.5)
    y = tfm.encodes(TensorImage(torch.tensor(x))).numpy()
    assert (y[x==0]==0).all()
    back = tfm.decodes(tfm.encodes(TensorImage(torch.tensor(x)))).numpy()
    np.testing.assert_allclose(back[x>0], x[x>0], atol=1e-4*np.ptp(x))

def test_background_is_called_out():
    x = scans(10, 1, (32, 32))+500
    x[:,:,:16] = 0
    with pytest.warns(UserWarning, match='landmarks of the histogram fall together'): fitted(x, verbose=False)

def test_flat_pieces_go_back_too():
    "A third of each image is one value, another a constant image"
    x = scans(8, 1, (30, 30))
    x[:,:,:10] = x.min((1, 2, 3), keepdims=True)
    x[3] = 7
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        _,tfm = fitted(x)
    y = tfm.encodes(TensorImage(torch.tensor(x)))
    assert y.isfinite().all()
    np.testing.assert_allclose(tfm.decodes(y), x, atol=1e-4*np.ptp(x))

def test_without_its_own_landmarks_an_image_comes_back_as_a_typical_one():
    x = scans(12, 2, (24, 20))
    _,tfm = fitted(x)
    y = tfm.encodes(TensorImage(torch.tensor(x)))
    part = tfm.decodes(TensorImage(y.as_subclass(torch.Tensor).clone())).numpy()
    np.testing.assert_allclose(part, tfm.scheme.before(torch.tensor(x), 2).numpy(), rtol=1e-4, atol=.05)

def test_saved_and_given_back(tmp_path):
    x = scans(12, 3, (24, 20))
    _,tfm = fitted(x)
    c = StatsChoice.load(tfm.choice.save(tmp_path/'c.json'))
    assert c.scheme==tfm.scheme and c.stats==tfm.choice.stats
    _,again = fitted(x, stats=c, scheme='zscore')
    b = TensorImage(torch.tensor(x))
    np.testing.assert_allclose(again.encodes(b), tfm.encodes(b), atol=1e-5)
    names = {}
    exec('from fastai_normstats.transform import DatasetStats\nfrom fastai_normstats.schemes import *\n'
         f'tfm = {c.code()}', names)
    np.testing.assert_allclose(names['tfm'].encodes(b), tfm.encodes(b), atol=1e-4)

def test_from_the_cache(tmp_path, passes):
    for i,x in enumerate(scans(8, 1, (40, 40))): Image.fromarray(x[0].astype(np.uint16)).save(tmp_path/f'{i}.png')
    def fit(**kwargs):
        db = DataBlock(FloatImageBlock(), get_items=get_image_files, splitter=RandomSplitter(seed=0))
        return db.fit_stats(tmp_path, cache=tmp_path/'c', bs=4, num_workers=0, **quiet, **kwargs).stats_choice
    fit(stats='custom')
    a,b = fit(scheme='histogram'),fit(scheme='histogram')
    assert len(passes)==2 and a.scheme==b.scheme and a.stats==b.stats

def test_refused():
    rs = RunningStats().update(torch.tensor(scans(12, 2, (24, 20))))
    with pytest.raises(ValueError, match='needs the images one by one'):
        choose_stats(12, rs.measured(), scheme='histogram')
    with pytest.raises(ValueError, match='`landmarks` has 3 channels and the images 2'):
        choose_stats(12, rs, scheme=HistogramStandardization(landmarks=[range(11)]*3))
    for bad in ([range(10)], [[1]*11], [[float('nan')]*11], 'abc', 3, []):
        with pytest.raises(ValueError, match='11 rising numbers'): HistogramStandardization(landmarks=bad)
    for bad in ((20, 99), (1, 80), (99, 1), 5, ('a', 'b')):
        with pytest.raises(ValueError, match='below 10 and above 90'): HistogramStandardization(percentiles=bad)

def test_drift_of_histograms_is_of_the_images():
    "`check_stats` compares images as they come, before they are standardised"
    x = scans(60, 1, (24, 20))
    dl,tfm = fitted(x)
    valid = TfmdDL(Stack(scans(60, 1, (24, 20), seed=1)*3), bs=5, num_workers=0, after_batch=[tfm])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        df = DataLoaders(dl, valid).check_stats(verbose=False)
    assert df.verdict.tolist()==['drifted']

# --- sampling

@pytest.mark.parametrize('side', [128, 224, 256, 300, 512])
def test_samples_cover_the_whole_image(side):
    "Also where the width is a power of two: 256 pixels on one diagonal of 256 x 256 said little of a round body"
    step = every(side*side, side)
    at = np.arange(0, side*side, step)
    rows,cols = at//side*8//side,at%side*8//side
    found = np.bincount(rows*8+cols, minlength=64)
    assert 180<=len(at)<=256 and found.min()>=1 and found.max()<=3*found.mean(), found.reshape(8, 8)

def test_quantiles_of_round_bodies():
    "A disc in the middle of 256 x 256: the share of its pixels is what the quantiles say"
    y,x = np.mgrid[:256, :256]-127.5
    disc = torch.tensor((x**2+y**2<70**2)*1000.+np.random.default_rng(0).random((256, 256))).float()
    rs = RunningStats().update(disc[None, None])
    share = (disc>500).float().mean().item()
    low,high = rs.quantile(1-share-.04).item(),rs.quantile(1-share+.04).item()
    assert low<10 and high>990, (low, high)

# --- TorchIO, and real CT

DATA = Path(os.environ.get('NORMSTATS_DATA', Path(__file__).parents[2]/'shared'/'data'))

@pytest.mark.realdata
@pytest.mark.skipif(not (DATA/'ct').is_dir(), reason='needs the CT slices')
def test_as_torchio_on_ct(tmp_path):
    tio = pytest.importorskip('torchio')
    files = sorted((DATA/'ct'/'png16').rglob('*.png'))
    x = np.stack([np.asarray(Image.open(f)).astype(np.float32)[None]-1024 for f in files])
    for i,o in enumerate(x): tio.ScalarImage(tensor=torch.tensor(o)[...,None]).save(tmp_path/f'{i:03}.nii')
    paths = sorted(tmp_path.glob('*.nii'))
    for mask,function in ((None, None), (lambda v: v>-900, lambda v: v>-900)):
        want = tio.HistogramStandardization.train(paths, masking_function=function, progress=False)
        rs = measure_stats(TfmdDL(Stack(x), bs=10, num_workers=0), mask=mask, tol=0, sampled=4096, **quiet)
        got = on_0_to_100(choose_stats(100, rs, scheme='histogram').scheme.landmarks)[0]
        np.testing.assert_allclose(got, np.array(want)[[0, 1, 2, 4, 5, 6, 7, 8, 10, 11, 12]], atol=.5)

def test_flat_images_lie_in_the_middle():
    "All landmarks of a constant image meet: it is neither the darkest nor the brightest that there is"
    _,tfm = fitted(scans(12, 2, (24, 20)))
    y = tfm.encodes(TensorImage(torch.full((2, 2, 24, 20), 7.)))
    low,high = (torch.tensor([o[i] for o in tfm.scheme.landmarks]) for i in (0, -1))
    want = ((low+high)/2-tfm.mean.flatten())/tfm.std.flatten()
    np.testing.assert_allclose(y[0,:,0,0], want, atol=1e-5)

def test_shuffled_rows_and_parts_go_back_to_themselves():
    x = torch.tensor(scans(8, 2, (24, 20)))
    _,tfm = fitted(x.numpy())
    y = tfm.encodes(TensorImage(x))
    for rows in ([3, 2, 1, 0, 4, 5, 6, 7], [5, 1], [7]):
        np.testing.assert_allclose(tfm.decodes(y[rows]), x[rows], atol=1e-4*np.ptp(x.numpy()))
    np.testing.assert_allclose(tfm.decodes(y[2])[0], x[2], atol=1e-4*np.ptp(x.numpy()))
    np.testing.assert_allclose(tfm.decodes(y.flip(-1)), x.flip(-1), atol=1e-4*np.ptp(x.numpy()))
    stranger = tfm.decodes(torch.sigmoid(y))
    np.testing.assert_allclose(stranger, torch.sigmoid(y)*tfm.std+tfm.mean, rtol=1e-4)
