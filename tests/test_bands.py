"""Bands by name, declared units, volumes: mistakes of real pipelines that raise no error anywhere, each caught before
the first epoch"""

import re,warnings

import numpy as np
import pytest
import torch
from fastai.data.all import CategoryBlock,DataBlock,IndexSplitter,Normalize,TfmdDL,Transform,TransformBlock
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorImage
from fastai.vision.augment import Flip,Rotate,aug_transforms
from helpers import close,quiet,small
from torch import nn

import fastai.callback.progress,fastai_normstats.block,fastai_normstats.drift
from fastai_normstats.choice import StatsChoice
from fastai_normstats.guards import another_order,no_data_among,off_units,other_unit
from fastai_normstats.images import BandsBlock,FloatImageBlock,VolumeBlock
from fastai_normstats.running import RunningStats
from fastai_normstats.serve.formats import export_text
from fastai_normstats.schemes import ClipZScore,HistogramStandardization,ImageZScore,LocalResponse,MinMax,ZScore
from fastai_normstats.transform import DatasetStats
from fastai_normstats.values import NormStats
from fastai_normstats.view import plot_drift

bands = ['B02', 'B03', 'B04', 'B08', 'B11', 'B12']
level = np.array([430., 740., 560., 3600., 2000., 1240.])
published = {b: (m/10_000, .3*m/10_000) for b,m in zip(bands, level)}

def tiles(n=24, side=16, seed=0):
    "Reflectance times 10,000 of `n` tiles (6, side, side) as uint16"
    rng = np.random.default_rng(seed)
    light = 1+.1*rng.normal(size=(n, 1, 1, 1))
    return (level.reshape(6, 1, 1)*light*(1+.28*rng.normal(size=(n, 6, side, side)))).clip(1, 65535).astype(np.uint16)

@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    import tifffile
    path = tmp_path_factory.mktemp('scenes')
    how = dict(photometric='minisblack', planarconfig='separate')
    for i,x in enumerate(tiles()): tifffile.imwrite(path/f'{i:02}.tif', x, **how)
    return path

def files(path): return sorted(path.glob('*.tif'))

def block(*tfms, block=None, **kwargs):
    return DataBlock((block or BandsBlock(bands), CategoryBlock), get_items=files, get_y=lambda f: int(f.stem)%2,
                     splitter=IndexSplitter(range(4)), batch_tfms=list(tfms), **kwargs)

class Divided(Transform):
    "Scaling as data sets do it, before Normalize"
    order = 20
    def __init__(self, by): self.by = by
    def encodes(self, x:TensorImage): return x/self.by

class DividedAgain(Divided): "fastai keeps one transform of a class"

def said_by(f):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always', UserWarning)
        f()
    return ' | '.join(str(w.message) for w in said if w.category is UserWarning)

def fit(db, path, **kwargs): return db.fit_stats(path, cache=False, **kwargs, **quiet, **small)

# --- the six faults of torchgeo's issues

@pytest.mark.parametrize('kwargs', [dict(stats=published, bands=bands), dict(stats='custom', units='0-1')],
                         ids=['published', 'units'])
def test_1_divided_twice(scenes, kwargs):
    said = said_by(lambda: fit(block(Divided(10_000.), DividedAgain(10_000.)), scenes, **kwargs))
    assert re.search('10,000 times larger|divided by .*10,000 already, which is once too often', said), said
    assert not said_by(lambda: fit(block(Divided(10_000.)), scenes, **kwargs))

@pytest.mark.parametrize('kwargs', [dict(stats=published, bands=bands), dict(stats='custom', units='0-1')],
                         ids=['published', 'units'])
def test_2_divided_by_another_number(scenes, kwargs):
    "int16 reflectance over 255 (torchgeo 4061)"
    said = said_by(lambda: fit(block(Divided(255.)), scenes, **kwargs))
    assert re.search('10,000 / 255 times smaller|while `units` says', said), said

def test_3_numbers_that_are_never_read(scenes):
    "Tensors that are no TensorImage pass Normalize untouched (torchgeo 4070); so does a loader without any"
    import tifffile
    def plain(f): return torch.tensor(tifffile.imread(f).astype(np.float32)/10_000)
    db = block(block=TransformBlock(type_tfms=plain))
    x = block(Normalize.from_stats([.1]*6, [.1]*6, cuda=False), block=TransformBlock(type_tfms=plain)).dataloaders(
        scenes, **small).one_batch()[0]
    assert x.min()>0  # fastai says nothing
    with pytest.raises(TypeError, match='Normalize acts on TensorImage only'): fit(db, scenes, stats='custom')
    dls = block(Divided(10_000.)).dataloaders(scenes, **small)
    with pytest.raises(ValueError, match='not normalised.*fit_stats'): dls.check_stats()

def test_4_bands_in_another_order(scenes):
    "Numbers by name are put in order; numbers in a wrong order are noticed"
    turned = dict(reversed(published.items()))
    db = fit(block(Divided(10_000.)), scenes, stats=turned, bands=bands)
    close(db.stats_choice.stats.mean, level/10_000)
    listed = tuple(map(list, zip(*turned.values())))
    said = said_by(lambda: fit(block(Divided(10_000.)), scenes, stats=listed, bands=bands))
    assert 'fit the images better in another order' in said and 'B12 for B02' in said, said
    with pytest.raises(ValueError, match='6 bands'): block(block=BandsBlock(bands[:2])).dataloaders(scenes, **small)

@pytest.mark.parametrize('value', [-9999., np.nan], ids=str)
def test_5_no_data_measured(value):
    x = tiles().astype(np.float32)/10_000
    hole = np.zeros(x.shape, bool)
    hole[::2,:,:5] = True
    x[hole] = value
    def fitted(**kwargs):
        tfm = DatasetStats(stats='custom', bands=bands, cache=False, **quiet, **kwargs)
        return next(iter([f for f in TfmdDL(Arrays(x), bs=8, num_workers=0, after_batch=[tfm]).after_batch.fs]))
    if value!=value:
        with pytest.raises(ValueError, match='NaN or infinite pixels'): fitted()
    else:
        said = said_by(fitted)
        assert 'nodata=-9999' in said, said
    tfm = None
    def good():
        nonlocal tfm
        tfm = fitted(nodata=value)
    assert not said_by(good)
    want = [x[:,c][~hole[:,c]].astype(np.float64) for c in range(6)]
    close(tfm.choice.stats.mean, [o.mean() for o in want], rtol=1e-6)
    assert '15.6% of the pixels hold no data' in tfm.choice.why
    assert tfm.choice.nodata==('nan' if value!=value else '-9999')
    assert StatsChoice.from_dict(tfm.choice.to_dict())==tfm.choice

@pytest.mark.parametrize('stats,message', [
    (([.1]*3, [.1]*3), 'the images have 6 channels and the .* statistics 3'),
    ('imagenet', 'the images have 6 channels and the imagenet statistics 3'),
    ({b: published[b] for b in bands[:3]}, "no numbers for band 'B08'")], ids=['three', 'imagenet', 'dict'])
def test_6_fewer_numbers_than_bands(scenes, stats, message):
    with pytest.raises(ValueError, match=message):
        fit(block(Divided(10_000.)), scenes, stats=stats, bands=bands)
    with pytest.raises(ValueError, match='`bands` names 6 .* and there are 1 numbers'):
        DatasetStats([.1], [.2], bands=bands)
    with pytest.raises(ValueError, match='`bands` names 3 .* and there are 6 channels'):
        fit(block(Divided(10_000.), block=BandsBlock()), scenes, stats='custom', bands=bands[:3])

class Arrays:
    def __init__(self, x): self.x,self.items = x,[f'im{i}' for i in range(len(x))]
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return TensorImage(torch.tensor(self.x[i])),

# --- bands: table, pictures, files, drift

@pytest.fixture(scope='module')
def named(scenes):
    return fit(block(Divided(10_000.)), scenes, stats='custom', bands=bands, groups=lambda f: int(f.stem)//3)

def test_bands_in_table_text_and_pictures(named):
    c = named.stats_choice
    assert c.bands==tuple(bands) and c.table().query("candidate=='custom'").channel.tolist()==bands
    assert c.table().query("candidate=='imagenet'").channel.tolist() in ([], [0, 1, 2])
    assert 'B08' in repr(c) and 'B08' in c._repr_html_() and 'bands B02' in c.code()
    titles = [ax.get_title('left') or ax.get_title() for ax in np.ravel(c.plot())]
    assert [t.split(',')[0] for t in titles[:6]]==bands, titles

def test_bands_survive_a_file_and_order_what_comes_back(named, scenes, tmp_path):
    c = StatsChoice.load(named.stats_choice.save(tmp_path/'s.json'))
    assert c.bands==tuple(bands)
    assert fit(block(Divided(10_000.)), scenes, stats=c).stats_choice.bands==tuple(bands)
    with pytest.raises(ValueError, match='the choice given as `stats` was made for B02'):
        DatasetStats(stats=c, bands=bands[::-1])

@pytest.mark.parametrize('d', [dict(bands=['a']*6), dict(bands=['a', 'b']), dict(bands='B02'), dict(units=3),
                               dict(nodata=-9999), dict(bands=[1]*6)], ids=str)
def test_damaged_words_in_a_file(named, d):
    saved = named.stats_choice.to_dict()
    with pytest.raises(ValueError, match='bands|units|nodata'): StatsChoice.from_dict({**saved, **d})

def test_bands_in_drift(named, scenes):
    dls = named.dataloaders(scenes, **small)
    df = dls.check_stats(verbose=False)
    assert df.channel.tolist()==bands
    titles = [ax.get_title(loc='left') for ax in np.ravel(plot_drift(df))[::2]]
    assert titles==bands

@pytest.mark.parametrize('bad,message', [
    ('B02', '`bands` must be a list of names'), (['B02', 'B02'], 'twice'), ([], 'must be a list'),
    ([1, 2], 'must be a list'), ({'B02': 1}, 'must be a list'), (['B02', ' '], 'must be a list'),
    (['B1\n', 'B2\n'], 'must be a list')], ids=str)
def test_bad_bands(bad, message):
    with pytest.raises(ValueError, match=message): DatasetStats(bands=bad)

@pytest.mark.parametrize('bad', [{'B02': 3}, {'B02': (1,)}, {'B02': ('a', 'b')}, {'B02': (.1, -.1)}], ids=str)
def test_bad_numbers_by_band(bad):
    with pytest.raises(ValueError, match='must give|above 0'): DatasetStats(stats=bad, bands=['B02'])

def test_numbers_by_band_need_bands(scenes):
    plain = block(block=BandsBlock())
    with pytest.raises(ValueError, match='nothing says which channel is which'): fit(plain, scenes, stats=published)

def test_a_mask_band(scenes):
    "Where the last band is 0 there is no data in any"
    x = tiles().astype(np.float32)
    x = np.concatenate([x, np.full_like(x[:,:1], 255)], 1)
    x[:,-1,4:9,3:8] = 0
    tfm = DatasetStats(stats='custom', bands=[*bands, 'QA'], nodata='QA', cache=False, **quiet)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        dl = TfmdDL(Arrays(x), bs=8, num_workers=0, after_batch=[tfm])
    t = next(f for f in dl.after_batch.fs if isinstance(f, DatasetStats))
    ok = x[:,-1]>0
    close(t.choice.stats.mean[:6], [x[:,c][ok].astype(np.float64).mean() for c in range(6)])
    y = next(iter(dl))[0]
    assert (y[:,:,4:9,3:8]==0).all() and (y[:,:6].std()>.5) and t.choice.nodata=='QA is 0'
    again = StatsChoice.from_dict(t.choice.to_dict())
    assert DatasetStats(stats=again).nodata.band==6

# --- units

@pytest.mark.parametrize('units,scale,ok', [
    ('0-1', 1/4095, True), ('0-1', 1, False), ('0-4095', 1, True), ('0-4095', 1/4095, False), (4095, 1, True),
    ('0-255', 1/16, True), ('0-255', 1/16/255, False), ('reflectance/10000', 1, True),
    ('reflectance/10000', 1/10000, False), ('0-65535', 1, True), ('0-65535', 1/65535, False), ('-1-1', 1/4095, True),
    ('-1-1', 1, False)], ids=str)
def test_units_of_unsigned_values(units, scale, ok):
    x = torch.tensor(np.random.default_rng(0).beta(2, 3, (20, 1, 12, 12))*4095*scale)
    said = off_units(RunningStats().update(x), DatasetStats(units=units).units)
    assert (said is None)==ok, said

@pytest.mark.parametrize('shift,scale,ok', [(0, 1, True), (1024, 1, False), (1000, 1/4000, False)], ids=str)
def test_units_of_ct(shift, scale, ok):
    rng = np.random.default_rng(0)
    hu = np.where(rng.random((20, 1, 12, 12))<.5, -950, rng.normal(60, 200, (20, 1, 12, 12)))
    said = off_units(RunningStats().update(torch.tensor((hu+shift)*scale)), 'HU')
    assert (said is None)==ok, said

def test_an_offset_of_1024_between_numbers_and_images():
    rng = np.random.default_rng(0)
    m = RunningStats().update(torch.tensor(rng.normal(-500, 480, (20, 1, 16, 16))))
    assert 'values 1,024 higher' in other_unit(m, NormStats((524.,), (480.,)))
    assert other_unit(m, NormStats((-520.,), (450.,))) is None

@pytest.mark.parametrize('factor', [255., 4095., 10_000., 65_535.])
@pytest.mark.parametrize('n_channels', [1, 3, 13])
def test_factors_have_names(factor, n_channels):
    rng = np.random.default_rng(1)
    m = RunningStats().update(torch.tensor(rng.beta(2, 5, (20, n_channels, 9, 9))))
    own = NormStats(m.mean, m.std)
    assert other_unit(m, own) is None
    for times in (factor, 1/factor):
        said = other_unit(m, NormStats([times*v for v in own.mean], [times*v for v in own.std]))
        assert f'{factor:,.0f}' in said, said

def test_declared_in_the_block_and_kept(tmp_path):
    from PIL import Image
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 4096, (12, 12), dtype=np.uint16)).save(tmp_path/f'{i}.png')
    def make(units):
        db = DataBlock(FloatImageBlock(units=units), get_items=lambda p: sorted(p.glob('*.png')),
                       splitter=IndexSplitter([0]))
        return fit(db, tmp_path, stats='custom')
    assert not said_by(lambda: make('0-4095'))
    c = make('0-4095').stats_choice
    assert c.units=='0-4095' and StatsChoice.from_dict(c.to_dict()).units=='0-4095'
    assert 'while `units` says \'HU\'' in said_by(lambda: make('HU'))
    with pytest.raises(ValueError, match='`units` must be'): FloatImageBlock(units='percent')
    with pytest.raises(ValueError, match='leave one out'): FloatImageBlock(units='HU', windows=[(400, 40)])
    assert '0-4095' in c.export('onnx')['fastai_normstats'] and 'values are 0-4095' in c.code()
    assert 'pixel values are 0-4095' in export_text(c, 'torchvision')
    with pytest.raises(ValueError, match='`units` is HU, and the choice given as `stats` was made for 0-4095'):
        DatasetStats(stats=c, units='HU')

# --- order, no data: no false alarms

@pytest.mark.parametrize('n_channels', [1, 3, 4, 13])
def test_numbers_in_order_are_left_alone(n_channels):
    rng = np.random.default_rng(2)
    x = rng.normal(np.arange(n_channels).reshape(-1, 1, 1)*.3, 1, (30, n_channels, 9, 9))
    m = RunningStats().update(torch.tensor(x))
    assert another_order(m, NormStats(m.mean+.05*m.std, 1.1*m.std)) is None
    if n_channels>3: assert another_order(m, NormStats(m.mean.flip(0), m.std.flip(0)*1.01))

@pytest.mark.parametrize('make', [
    lambda r: r.random((20, 1, 30, 30)), lambda r: (r.random((20, 1, 30, 30))*300).clip(0, 255).round(),
    lambda r: np.where(r.random((20, 1, 30, 30))<.4, 0, r.random((20, 1, 30, 30))),
    lambda r: r.integers(0, 2, (20, 1, 30, 30))*255.,
    lambda r: np.where(r.random((20, 1, 30, 30))<.3, -1024, r.normal(0, 300, (20, 1, 30, 30))),
    lambda r: r.gamma(.1, 1, (20, 1, 30, 30)), lambda r: np.ones((20, 1, 30, 30))],
    ids=['even', 'saturated', 'black', 'masks', 'air', 'sparse', 'flat'])
def test_usual_images_hold_data(make):
    assert no_data_among(RunningStats().update(torch.tensor(make(np.random.default_rng(0))).double())) is None

# --- every scheme, mask and guard, in 1, 3, 4, 13 channels and in three dimensions

schemes = [ZScore(), MinMax(), MinMax(percentiles=(1, 99)), ClipZScore(), ImageZScore(), ImageZScore(together=True),
           HistogramStandardization(), LocalResponse()]

@pytest.mark.parametrize('scheme', schemes, ids=lambda s: f'{s.name}-{getattr(s, "percentiles", "")}')
@pytest.mark.parametrize('n_channels', [1, 3, 4, 13])
@pytest.mark.parametrize('spatial', [(12, 10), (6, 8, 7)], ids=['2d', '3d'])
@pytest.mark.parametrize('masks', [None, 'image', 'target'])
def test_every_scheme_shape_and_mask(scheme, n_channels, spatial, masks):
    "Axes found from the first batch, numbers against numpy over what counts, finite, and guards run"
    rng = np.random.default_rng(4)
    x = rng.gamma(3, 20, (10, n_channels, *spatial)).astype(np.float32)
    y = rng.integers(0, 3, (10, *spatial))
    class Pairs(Arrays):
        def __getitem__(self, i): return TensorImage(torch.tensor(x[i])), torch.tensor(y[i])
    mask = dict(image=lambda v: v[:, :1]>20, target=lambda v,t: t>0).get(masks)
    if masks=='target' and scheme.masked:
        with pytest.raises(ValueError, match='without a target'): DatasetStats(scheme=scheme, mask=mask)
        return
    tfm = DatasetStats(stats='custom', scheme=scheme, mask=mask, cache=False, measure=True,
                       bands=[f'b{c}' for c in range(n_channels)], **quiet)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        dl = TfmdDL(Pairs(x), bs=4, num_workers=0, after_batch=[tfm])
    t = next(f for f in dl.after_batch.fs if isinstance(f, DatasetStats))
    assert t.axes==(0, *range(2, 2+len(spatial)))
    m,counts = t.choice.measured,{None: np.ones_like(y, bool), 'image': x[:,0]>20, 'target': y>0}[masks]
    if m is not None:
        for c in range(n_channels):
            v = x[:,c][counts].astype(np.float64)
            close((m.mean[c], m.std[c], m.min[c], m.max[c]), (v.mean(), v.std(), v.min(), v.max()), rtol=1e-5)
    out = torch.cat([b[0] for b in dl])
    assert out.shape==x.shape and out.isfinite().all()
    if isinstance(scheme, ZScore):
        view = (-1, *[1]*len(spatial))
        want = (x-m.mean.numpy().reshape(view))/m.std.numpy().reshape(view)
        np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)

# --- volumes

@pytest.fixture(scope='module')
def volumes(tmp_path_factory):
    path,rng = tmp_path_factory.mktemp('volumes'),np.random.default_rng(5)
    for i in range(10): np.save(path/f'{i}.npy', rng.normal(40+i, 200, (8, 12, 10)).astype(np.float32))
    return path

def volume_block(**kwargs):
    return DataBlock((VolumeBlock(), CategoryBlock), get_items=lambda p: sorted(p.glob('*.npy')),
                     get_y=lambda f: int(f.stem)%2, splitter=IndexSplitter([0, 1]), **kwargs)

def test_volumes_are_exact_and_train(volumes):
    db = volume_block()
    assert 'axes' not in said_by(lambda: fit(db, volumes, stats='custom', units='HU'))
    dls = db.dataloaders(volumes, bs=4, num_workers=0)
    x = np.stack([np.load(f) for f in dls.train_ds.items]).astype(np.float64)
    close(db.stats_choice.stats.mean[0], x.mean()), close(db.stats_choice.stats.std[0], x.std())
    net = nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2))
    learn = Learner(dls, net, CrossEntropyLossFlat())
    before = [p.detach().clone() for p in net.parameters()]
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .1)
    assert any((a!=b).any() for a,b in zip(before, net.parameters())) and np.isfinite(learn.recorder.losses[-1].item())
    dls.show_batch(max_n=2)
    df = dls.check_stats(verbose=False)
    assert len(df)==1

def test_numbers_by_hand_meet_volumes():
    x = torch.rand(2, 3, 4, 5, 6)
    mean,std = ([.5, .4, .3], [.1, .2, .3])
    t = DatasetStats(mean, std)
    y = t.encodes(TensorImage(x))
    want = (x-torch.tensor(mean).view(1, 3, 1, 1, 1))/torch.tensor(std).view(1, 3, 1, 1, 1)
    np.testing.assert_allclose(y, want, atol=1e-5)
    np.testing.assert_allclose(t.decodes(y), x, atol=1e-6)
    with pytest.raises(ValueError, match='give all axes'):
        DatasetStats([.5]*3, [.1]*3, axes=(0, 2, 3)).encodes(TensorImage(x))

def test_a_saved_choice_of_volumes_is_given_back(volumes, tmp_path):
    c = StatsChoice.load(fit(volume_block(), volumes, stats='custom').stats_choice.save(tmp_path/'v.json'))
    b = fit(volume_block(), volumes, stats=c).dataloaders(volumes, bs=4, num_workers=0).one_batch()[0]
    assert b.ndim==5 and abs(b.mean())<.2

# --- found by trying to break it

def test_bands_of_the_block_and_of_the_fit_must_agree(scenes):
    "The block's names are taken where none are given, and refused in another order"
    db = fit(block(Divided(10_000.)), scenes, stats=published)
    assert db.stats_choice.bands==tuple(bands)
    close(db.stats_choice.stats.mean, level/10_000)
    with pytest.raises(ValueError, match='and the block loads B02'):
        fit(block(), scenes, stats='custom', bands=bands[::-1])
    only = fit(block(Divided(10_000.), block=BandsBlock(bands, only=['B08', 'B02'])), scenes, stats=published)
    close(only.stats_choice.stats.mean, level[[3, 0]]/10_000)

@pytest.mark.parametrize('nodata', [0, np.nan, 'nan'], ids=['value', 'nan', 'band'])
def test_bands_that_are_called_like_numbers(nodata):
    x = np.random.default_rng(0).normal(50, 5, (12, 3, 9, 9)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        tfm = DatasetStats(stats='custom', bands=['0', 'nan', 'b'], nodata=nodata, cache=False, **quiet)
        dl = TfmdDL(Arrays(x), bs=6, num_workers=0, after_batch=[tfm])
    t = next(f for f in dl.after_batch.fs if isinstance(f, DatasetStats))
    again = DatasetStats(stats=StatsChoice.from_dict(t.choice.to_dict()))
    assert str(again.nodata)==str(t.nodata)
    assert str(eval(t.choice.code().split('  #')[0]).nodata)==str(t.nodata)

@pytest.mark.parametrize('batch_tfms,warned', [
    (lambda: aug_transforms(max_lighting=0), True), (lambda: [Rotate(20, p=1.)], True), (lambda: [Flip()], False),
    (lambda: [], False),
    (lambda: aug_transforms(mode='nearest', max_lighting=0), False)], ids=['aug', 'rotate', 'flip', 'none', 'nearest'])
def test_interpolation_between_data_and_none_is_called_out(scenes, batch_tfms, warned):
    "-9,999 and its neighbours make numbers that are neither"
    x = tiles().astype(np.float32)
    x[:,:,:3] = -9999
    tfm = DatasetStats(stats='custom', nodata=-9999, cache=False, **quiet)
    said = said_by(lambda: TfmdDL(Arrays(x), bs=8, num_workers=0, after_batch=[*batch_tfms(), tfm]))
    assert ('interpolates between pixels with and without data' in said)==warned, said

def test_flips_keep_no_data_apart():
    x = tiles().astype(np.float32)
    hole = np.random.default_rng(0).random(x.shape)<.2
    x[hole] = -9999
    tfm = DatasetStats(stats='custom', nodata=-9999, cache=False, **quiet)
    dl = TfmdDL(Arrays(x), bs=8, num_workers=0, after_batch=[Flip(p=1.), tfm])
    t = next(f for f in dl.after_batch.fs if isinstance(f, DatasetStats))
    close(t.choice.stats.mean, [x[:,c][~hole[:,c]].astype(np.float64).mean() for c in range(6)], rtol=1e-5)

def test_a_learner_with_nan_for_no_data_is_checked(volumes):
    x = np.random.default_rng(0).normal(50, 5, (12, 3, 9, 9)).astype(np.float32)
    x[:,:,:2] = np.nan
    tfm = DatasetStats(stats='custom', nodata=np.nan, cache=False, **quiet)
    dl = TfmdDL(Arrays(x), bs=6, num_workers=0, after_batch=[tfm])
    df = Learner(DataLoaders(dl, dl), nn.Flatten(), CrossEntropyLossFlat()).check_stats(verbose=False)
    assert len(df)==3

@pytest.mark.parametrize('value', [-9999., -32768., 65535., -3.4028234663852886e38])
def test_a_known_mark_counts_from_one_image_and_the_hint_can_be_used(value):
    x = np.random.default_rng(0).gamma(4, 300, (20, 1, 16, 16)).astype(np.float32)
    x[7,:,:6] = value
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        said = no_data_among(RunningStats().update(torch.tensor(x)))
    typed = float(re.search(r'nodata=(\S+)`', said)[1])
    y = DatasetStats([1200.], [600.], nodata=typed).encodes(TensorImage(torch.tensor(x)))
    assert (y[7,:,:6]==0).all() and len(said)<300

@pytest.mark.parametrize('units,make', [
    ('0-1', lambda r: r.gamma(4, .0015, (20, 1, 16, 16))),
    ('reflectance/10000', lambda r: r.gamma(4, 15, (20, 1, 16, 16))),
    ('0-1', lambda r: r.uniform(300, 1400, (20, 1, 16, 16))/65535),
    ('HU', lambda r: r.normal(600, 200, (20, 1, 16, 16))),
    ('HU', lambda r: r.normal(100, 400, (20, 1, 16, 16)).clip(-200, 1000))],
    ids=['water', 'sea', 'cells', 'bone', 'clipped'])
def test_units_of_dim_and_cropped_images_are_believed(units, make):
    assert off_units(RunningStats().update(torch.tensor(make(np.random.default_rng(0)))), units) is None

@pytest.mark.parametrize('mask', [lambda: None, lambda a,b,c: a>0], ids=['none', 'three'])
def test_masks_of_other_numbers_of_arguments_are_refused(mask):
    with pytest.raises(TypeError, match='`mask` must be a function of a batch of images'): DatasetStats(mask=mask)

def test_a_mask_that_returns_nothing_is_refused(scenes):
    with pytest.raises(TypeError, match='`mask` returned nothing'):
        fit(block(), scenes, stats='custom', mask=lambda x: None)

@pytest.mark.parametrize('bad', [{'r': (.5, .2, .1)}, {}], ids=str)
def test_three_numbers_for_a_band_are_refused(bad):
    with pytest.raises(ValueError, match='must give|no numbers for'): DatasetStats(stats=bad, bands=['r'])
