"""Bands and volumes in the units of their files, against numpy, tifffile, nibabel and pydicom alone; and what is
refused, in one sentence that names the file"""
import io,pickle,sys,warnings
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import pydicom
import pytest
import tifffile
import torch
from fastai.vision.all import (Brightness, CategoryBlock, Contrast, DataBlock, DihedralItem, Dihedral, Flip, FlipItem,
                               Hue, IndexSplitter, IntToFloatTensor, Learner, MaskBlock, RandomResizedCropGPU, Rotate,
                               Saturation, TensorImage, Warp, Zoom, aug_transforms, get_files, load_learner, nn,
                               parent_label)
from helpers import refusal
from PIL import Image
from pydicom.data import get_testdata_file

from fastai_normstats.all import BandsBlock,TensorBands,TensorVolume,VolumeBlock,dicom_pixels,dicom_series

names = ['B02', 'B03', 'B04', 'B08']
quick = dict(num_workers=0)
fit   = dict(bs=2, num_workers=0, cache=False, verbose=False, stats='custom')

def read(fn, *args, **kwargs): return BandsBlock(*args, **kwargs).type_tfms[0](fn)
def volume(fn, **kwargs): return VolumeBlock(**kwargs).type_tfms[0](fn)
def bundled(name): return get_testdata_file(name, download=False)

refusal = partial(refusal, most=900)  # of files with long names

def same(x, want, cls):
    "The very values, as float32, in memory of their own and in order"
    want = np.asarray(want).astype(np.float32)
    assert type(x) is cls and x.dtype==torch.float32 and x.is_contiguous() and x.shape==want.shape
    assert np.array_equal(x.numpy(), want, equal_nan=True)

def drawn(kind, shape=(4, 5, 7), seed=0):
    rng,k = np.random.default_rng(seed),np.dtype(kind)
    if k.kind=='f': return rng.normal(0, 1000, shape).astype(k)
    info = np.iinfo(k)
    return rng.integers(info.min, info.max, shape, dtype=k, endpoint=True)

def write(f, a, last=False, **kwargs):
    "A TIFF of bands (C, H, W), samples first or last"
    config = dict(photometric='minisblack', planarconfig='contig' if last else 'separate')
    tifffile.imwrite(f, a.transpose(1, 2, 0) if last else a, **{**config, **kwargs})
    return f

def described(*words):
    "GDAL's metadata with a description a band, as extra tag of `tifffile.imwrite`"
    items = ''.join(f'<Item name="DESCRIPTION" sample="{i}" role="description">{o}</Item>' for i,o in enumerate(words))
    return dict(extratags=[(42112, 's', 0, f'<GDALMetadata>{items}</GDALMetadata>', True)])

# --- bands: what is read

@pytest.mark.parametrize('kind', ['uint8', 'int8', 'uint16', 'int16', 'uint32', 'int32', 'float16', 'float32',
                         'float64'])
@pytest.mark.parametrize('last', [False, True])
@pytest.mark.parametrize('order', '<>')
def test_tiff(tmp_path, kind, last, order):
    a = drawn(kind)
    f = write(tmp_path/'a.tif', a, last, byteorder=order, compression='zlib')
    for o in (f, str(f)): same(read(o), a, TensorBands)
    same(read(f, bands=names), a, TensorBands)

@pytest.mark.parametrize('shape', [(2, 3, 4), (4, 3, 2), (3, 3, 3), (2, 5, 6), (5, 1, 6), (5, 6, 1), (13, 5, 4)])
@pytest.mark.parametrize('last', [False, True])
def test_the_axis_comes_from_the_file_not_from_lengths(tmp_path, shape, last):
    a = drawn('uint16', shape)
    same(read(write(tmp_path/'a.tif', a, last)), a, TensorBands)

@pytest.mark.parametrize('kwargs', [dict(metadata=None), dict(metadata={'axes': 'CYX'}),
                         {}, dict(imagej=True, metadata={'axes': 'CYX'}),
                                    dict(ome=True, metadata={'axes': 'CYX'}), dict(bigtiff=True)], ids=str)
def test_pages_are_bands(tmp_path, kwargs):
    a = drawn('uint16')
    tifffile.imwrite(tmp_path/'a.tif', a, **{'photometric': 'minisblack', **kwargs})
    same(read(tmp_path/'a.tif', bands=names), a, TensorBands)

def test_plain_and_rgb_tiff(tmp_path):
    a = drawn('uint16', (5, 7))
    tifffile.imwrite(tmp_path/'a.tif', a)
    same(read(tmp_path/'a.tif'), a[None], TensorBands)
    rgb = drawn('uint8', (5, 7, 3))
    Image.fromarray(rgb).save(tmp_path/'rgb.tif')
    same(read(tmp_path/'rgb.tif'), rgb.transpose(2, 0, 1), TensorBands)

def test_overviews_and_masks_are_passed_over(tmp_path):
    a = drawn('uint16', (3, 32, 32))
    with tifffile.TiffWriter(tmp_path/'a.tif') as tf:
        tf.write(a, photometric='minisblack', planarconfig='separate', metadata=None)
        tf.write(a[:, ::2, ::2], photometric='minisblack', planarconfig='separate', subfiletype=1, metadata=None)
        tf.write(np.ones((32, 32), bool), photometric='mask', subfiletype=4, metadata=None)
    same(read(tmp_path/'a.tif'), a, TensorBands)

@pytest.mark.parametrize('kind', ['uint8', '>u2', 'int64', 'float16', 'float64', 'bool'])
def test_arrays(tmp_path, kind):
    a = (drawn('uint8')%2).astype(kind)
    np.save(tmp_path/'a.npy', a)
    np.save(tmp_path/'last.npy', a.transpose(1, 2, 0))
    for o in (a, tmp_path/'a.npy', a[:, ::-1][:, ::-1]):
        for bands in (None, names): same(read(o, bands), a, TensorBands)
    for o in (a.transpose(1, 2, 0), tmp_path/'last.npy'): same(read(o, names), a, TensorBands)
    if a.dtype.isnative: same(read(torch.from_numpy(a)), a, TensorBands)
    same(read(a[0]), a[:1], TensorBands)

def test_a_tensor_is_not_shared():
    x = torch.rand(4, 3, 3)
    read(x).zero_()
    assert x.min()>0 or x.max()>0
    same(read(x.bfloat16()), x.bfloat16().float().numpy(), TensorBands)
    same(read(TensorImage(x)), x.numpy(), TensorBands)

def test_nothing_is_scaled(tmp_path):
    a = np.array([[[np.nan, -9999, np.inf, 65535]]]*4)
    x = read(write(tmp_path/'a.tif', a.astype(np.float32)))
    same(x, a, TensorBands)
    b = IntToFloatTensor()(x[None])
    assert type(b) is TensorBands and np.array_equal(b[0].numpy(), a, equal_nan=True)
    assert np.array_equal(IntToFloatTensor().decode(x).numpy(), a, equal_nan=True)

@pytest.mark.parametrize('only,want', [(['B08', 'B02'], [3, 0]), ([1], [1]), (('B04', 0), [2, 0]),
                                       (None, [0, 1, 2, 3])])
def test_only(tmp_path, only, want):
    a = drawn('uint16')
    same(read(write(tmp_path/'a.tif', a, True), names, only), a[want], TensorBands)

def test_positions_without_names(tmp_path):
    a = drawn('uint16')
    x = read(write(tmp_path/'a.tif', a), only=[3, 1], rgb=[1])
    same(x, a[[3, 1]], TensorBands)
    assert x.rgb==(1,)

# --- bands: descriptions

@pytest.mark.parametrize('words', [names, ['b02 ', 'b03', 'b04', 'b08'], ['Blue', 'Green', 'Red', 'NIR'],
                         ['', 'B03', '', '']], ids=str)
def test_descriptions_that_agree_or_say_nothing(tmp_path, words):
    a = drawn('uint16')
    same(read(write(tmp_path/'a.tif', a, True, **described(*words)), names), a, TensorBands)

@pytest.mark.parametrize('words', [names[::-1], ['B02', 'B03', 'B05', 'B08'], ['', 'B02', '', '']], ids=str)
def test_descriptions_that_disagree(tmp_path, words):
    f = write(tmp_path/'a.tif', drawn('uint16'), True, **described(*words))
    said = refusal(read, f, names)
    assert str(f) in said and '`bands` says b02, b03, b04, b08' in said
    same(read(f), drawn('uint16'), TensorBands)  # without names there is nothing to disagree with

def test_damaged_metadata_says_nothing(tmp_path):
    f = write(tmp_path/'a.tif', drawn('uint16'), extratags=[(42112, 's', 0, '<GDAL', True)])
    same(read(f, names), drawn('uint16'), TensorBands)

# --- bands: rasterio

class Rasterio:
    "What stands for rasterio here: it opens anything as `a`"
    def __init__(self, a, descriptions=(None,)*4): self.a,self.descriptions = a,descriptions
    def open(self, fn): return self
    def __enter__(self): return self
    def __exit__(self, *args): pass
    def read(self): return self.a

def test_rasterio_reads_what_tifffile_cannot(tmp_path, monkeypatch):
    a = drawn('uint16')
    f = write(tmp_path/'a.tif', a)
    f.write_bytes(f.read_bytes()[:150])
    monkeypatch.setitem(sys.modules, 'rasterio', Rasterio(a))
    same(read(f, names), a, TensorBands)
    monkeypatch.setitem(sys.modules, 'rasterio', Rasterio(a, tuple(names[::-1])))
    assert 'B08'.lower() in refusal(read, f, names)

def test_rasterio_alone(tmp_path, monkeypatch):
    a = drawn('uint16')
    f = write(tmp_path/'a.tif', np.zeros((2, 3, 3)))
    monkeypatch.setitem(sys.modules, 'tifffile', None)
    monkeypatch.setitem(sys.modules, 'rasterio', Rasterio(a))
    same(read(f), a, TensorBands)
    monkeypatch.setitem(sys.modules, 'rasterio', None)
    assert "`pip install 'fastai_normstats[medical]'`" in refusal(read, f, exc=ImportError)

@pytest.mark.parametrize('interleave', ['pixel', 'band'])
@pytest.mark.parametrize('compress', ['lzw', 'deflate'])
def test_real_geotiff(tmp_path, interleave, compress):
    "Tiled, with overviews, a mask and descriptions, by GDAL itself"
    rasterio,a,f = pytest.importorskip('rasterio'),drawn('uint16', (4, 64, 48)),tmp_path/'a.tif'
    kind = dict(driver='GTiff', width=48, height=64, count=4, dtype='uint16', tiled=True, blockxsize=16, blockysize=16)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with rasterio.open(f, 'w', interleave=interleave, compress=compress, **kind) as d:
            for i,o in enumerate(names): d.set_band_description(i+1, o)
            d.write(a)
            d.build_overviews([2])
            d.write_mask(np.ones((64, 48), bool))
        same(read(f, names), a, TensorBands)
        assert 'has the bands b02, b03, b04, b08' in refusal(read, f, names[::-1])

# --- bands: what is refused

def broken(path, kind):
    "A file that `BandsBlock(bands=names)` has to refuse"
    f,a = path/f'{kind}.tif',drawn('uint16')
    if kind=='short':   write(f, a).write_bytes(write(f, a).read_bytes()[:150])
    if kind=='words':   f.write_text('no image')
    if kind=='empty':   f.write_bytes(b'')
    if kind=='six':     write(f, drawn('uint16', (6, 5, 7)))
    if kind=='slices':  tifffile.imwrite(f, a, imagej=True, metadata={'axes': 'ZYX'})
    if kind=='times':   tifffile.imwrite(f, a, imagej=True, metadata={'axes': 'TYX'})
    if kind=='stack':   tifffile.imwrite(f, drawn('uint8', (2, 5, 7, 3)), photometric='rgb')
    if kind=='folder':  f.mkdir()
    if kind=='complex': tifffile.imwrite(f, a.astype(np.complex64), photometric='minisblack')
    if kind=='palette': Image.fromarray(drawn('uint8', (5, 7))).convert('P').save(f)
    if kind=='last':    tifffile.imwrite(f, a.transpose(1, 2, 0), photometric='minisblack')  # 5 pages of 7 x 4
    if kind=='several':
        with tifffile.TiffWriter(f) as tf:
            for n in (5, 6): tf.write(drawn('uint16', (n, n)), metadata=None)
    if kind=='npy':     f.write_bytes(b'\x93NUMPY\x01\0v')
    if kind=='objects': np.save(open(f, 'wb'), np.array([{}], object), allow_pickle=True)
    return f

bad_bands = dict(short='cannot read', words='neither a TIFF nor a .npy', empty='neither a TIFF nor a .npy',
                 six='holds 6 bands of 5 x 7 pixels',
                 slices='axes ZYX', times='axes TYX', stack='axes QYXS', folder='neither a TIFF nor a .npy',
                 complex='real numbers', palette='colours of a palette',
                 last='holds 5 bands of 7 x 4 pixels', several='holds 2 images', npy='damaged .npy',
                 objects='damaged .npy file or holds objects')

@pytest.mark.parametrize('kind', bad_bands)
def test_refused_bands(tmp_path, kind):
    f = broken(tmp_path, kind)
    said = refusal(read, f, names)
    assert str(f) in said and bad_bands[kind] in said, said

@pytest.mark.parametrize('a,said', [
    (np.zeros((4, 9, 4)), 'first or last axis?'), (np.zeros((5, 6, 7)), 'holds 5 bands'), (np.zeros(4), 'shape (4,)'),
    (np.zeros((2, 4, 5, 5)), 'one image an item'), (np.zeros((4, 5, 5), complex), 'real numbers'),
    (np.zeros((4, 0, 5)), 'shape (4, 0, 5)'), (np.zeros((5, 5)), 'holds 1 bands')])
def test_refused_arrays(a, said):
    assert said in refusal(read, a, names) and 'the array' in refusal(read, a, names)

@pytest.mark.parametrize('o', [7, None, b'II*\0', [1, 2]], ids=str)
def test_refused_items(o):
    for f in (read, volume): assert 'a path, an array or a tensor is wanted' in refusal(f, o, exc=TypeError)

@pytest.mark.parametrize('kwargs,said', [
    (dict(bands='B02'), '`bands` must be'), (dict(bands=[]), '`bands` must be'),
    (dict(bands=['a', 'a']), '`bands` must be'), (dict(bands=4), '`bands` must be'),
    (dict(bands=names, only=['B05']), "band 'B05', to choose from is B02"),
    (dict(bands=names, only=[4]), 'asks for band 4'), (dict(only=['B02']), '`bands` is not given'),
    (dict(bands=names, only=[-1]), 'asks for band -1'), (dict(bands=names, only=[True]), 'asks for band True'),
    (dict(only=[]), '`only` must be a list'), (dict(only='B02', bands=names), '`only` must be a list'),
    (dict(bands=names, rgb=['B02', 'B03']), 'three bands, or one'),
    (dict(bands=names, only=['B02'], rgb=['B03']), "`rgb` asks for band 'B03'"),
    (dict(only=[0, 1], rgb=[2]), '`rgb` asks for band 2')], ids=str)
def test_refused_arguments(kwargs, said): assert said in refusal(BandsBlock, **kwargs)

@pytest.mark.parametrize('kwargs,said', [
    (dict(only=[0, 4]), 'no band 4 for `only`'), (dict(rgb=[4]), 'no band 4 for `rgb`'),
    (dict(only=[3, 9]), 'no band 9 for `only`')], ids=str)
def test_positions_that_a_file_lacks(tmp_path, kwargs, said):
    f = write(tmp_path/'a.tif', drawn('uint16'))
    assert said in refusal(read, f, **kwargs) and str(f) in refusal(read, f, **kwargs)

def test_a_file_that_is_not_there():
    for f in (read, volume):
        for o in ('none.tif', 'none.nii', 'none.npy'):
            if o.endswith('nii') and f is volume: pytest.importorskip('nibabel')
            with pytest.raises(FileNotFoundError): f(o)

# --- bands: shown

def drawn_on(x, **kwargs):
    import matplotlib.pyplot as plt
    ax = x.show(**kwargs)
    res,title = np.asarray(ax.get_images()[0].get_array()),ax.get_title()
    plt.close('all')
    return res,title

def stretched(a):
    low,high = np.percentile(a, (2, 98))
    return ((a-low)/(high-low)).clip(0, 1)

@pytest.mark.parametrize('rgb,want', [(None, (0, 1, 2)), (['B08', 'B04', 'B03'], (3, 2, 1)), ((2, 1, 0), (2, 1, 0)),
                                      (['B04'], (2,))], ids=str)
def test_bands_shown(rgb, want):
    a = np.random.default_rng(0).normal(5000, 900, (4, 9, 8)).astype(np.float32)
    got,title = drawn_on(read(a, names, rgb=rgb), title='tile')
    assert title=='tile'
    np.testing.assert_allclose(got, np.stack([stretched(a[i]) for i in want], -1).squeeze(), atol=1e-5)

@pytest.mark.parametrize('n', [1, 2, 3, 5])
def test_fewer_bands_are_shown_in_grey(n):
    got,_ = drawn_on(read(drawn('float32', (n, 6, 6))))
    assert got.shape==((6, 6, 3) if n>2 else (6, 6))

def test_shown_without_finite_values():
    assert not drawn_on(read(np.full((1, 4, 4), np.nan)))[0].any()
    assert not drawn_on(read(np.full((3, 4, 4), 7.)))[0].any()

def test_rgb_survives():
    x = read(drawn('float32'), names, rgb=['B08', 'B04', 'B03'])
    assert torch.stack([x, x])[0].rgb==(3, 2, 1)
    assert pickle.loads(pickle.dumps(x)).rgb==(3, 2, 1) and (x+1).rgb==(3, 2, 1)

# --- bands: in a block

@pytest.fixture
def tiles(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(8):
        f = tmp_path/'tiles'/'ab'[i%2]/f'{i}.tif'
        f.parent.mkdir(parents=True, exist_ok=True)
        write(f, rng.normal([[[300*(1+i%2)]], [[500]], [[700]], [[3000]]], 50, (4, 12, 12)).astype(np.uint16), True)
    return tmp_path/'tiles'

def tifs(p): return get_files(p, extensions=['.tif']).sorted(key=lambda f: f.name)

def tile_block(batch_tfms=None, **kwargs):
    return DataBlock((BandsBlock(bands=names, **kwargs), CategoryBlock), get_items=tifs, get_y=parent_label,
                     splitter=IndexSplitter([0, 1]), batch_tfms=batch_tfms)

@pytest.mark.parametrize('only', [None, ['B08', 'B02']], ids=str)
def test_statistics_of_bands(tiles, only):
    m = tile_block(only=only).fit_stats(tiles, **fit).stats_choice.measured
    v = np.stack([tifffile.imread(f) for f in tifs(tiles)[2:]]).astype(np.float64)[..., [3, 0] if only else [0, 1, 2,
                 3]]
    np.testing.assert_allclose(m.mean, v.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(m.std, v.std((0, 1, 2)), rtol=1e-6)

def test_another_choice_of_bands_is_measured_anew(tiles):
    "The cache tells blocks by their arguments"
    kwargs = {**fit, 'cache': True}
    first = tile_block(only=['B08']).fit_stats(tiles, **kwargs).stats_choice.measured.mean
    other = tile_block(only=['B02']).fit_stats(tiles, **kwargs).stats_choice.measured.mean
    assert first>2000>other
    with redirect_stdout(io.StringIO()) as out: tile_block(only=['B08']).fit_stats(tiles, **{**kwargs, 'verbose': True})
    assert 'reused' in out.getvalue()

def test_affine_augmentation_of_bands(tiles):
    x = tile_block(aug_transforms(max_lighting=0)).dataloaders(tiles, bs=4, **quick).train.one_batch()[0]
    assert type(x) is TensorBands and x.shape==(4, 4, 12, 12) and 2500<x[:, 3].mean()<3500
    x = tile_block(Flip(p=1.)).dataloaders(tiles, bs=6, **quick).train.one_batch()[0]
    assert x.max()>2500

def test_a_mask_beside_bands(tiles):
    db = DataBlock((BandsBlock(names), MaskBlock), get_items=tifs, splitter=IndexSplitter([0, 1]),
                   get_y=lambda f: (tifffile.imread(f)[..., 3]>3000).astype(np.uint8))
    x,y = db.dataloaders(tiles, bs=2, **quick).valid.one_batch()
    assert np.array_equal(x[:, 3].numpy()>3000, y.numpy()==1)

def test_bands_learner(tiles, tmp_path):
    dls = tile_block(rgb=['B08', 'B04', 'B03']).fit_stats(tiles, **fit).dataloaders(tiles, bs=3, **quick)
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    check_learner(Learner(dls, net, loss_func=nn.CrossEntropyLoss(), path=tmp_path),
                  tifs(tiles)[0], tifffile.imread(tifs(tiles)[0]))

def check_learner(learn, item, a):
    "Predicts from a path, a string and an array, the same before and after the export; shows its batches and results"
    import matplotlib.pyplot as plt
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    with learn.no_bar():
        want = [learn.predict(o)[2] for o in (item, str(item), a)]
        assert all(torch.equal(o, want[0]) for o in want)
        learn.export('learn.pkl')
        again = load_learner(learn.path/'learn.pkl')
        with again.no_bar(): assert torch.equal(again.predict(item)[2], want[0])
        learn.dls.show_batch(max_n=2)
        learn.dls.train.show_batch(max_n=2)
        learn.show_results(max_n=2)
    plt.close('all')

# --- volumes: arrays, NIfTI

@pytest.mark.parametrize('kind', ['uint8', '>i2', 'int64', 'float64', 'bool'])
def test_volume_arrays(tmp_path, kind):
    a = (drawn('uint8', (3, 4, 5))%2).astype(kind)
    np.save(tmp_path/'a.npy', a)
    for o in (a, a[None], tmp_path/'a.npy', str(tmp_path/'a.npy')): same(volume(o), a[None], TensorVolume)
    if a.dtype.isnative: same(volume(torch.from_numpy(a)), a[None], TensorVolume)
    same(volume(np.stack([a, a])), np.stack([a, a]), TensorVolume)

def nifti(f, a, affine=np.eye(4), slope=None):
    nibabel = pytest.importorskip('nibabel')
    im = nibabel.Nifti1Image(a, affine)
    if slope: im.header.set_slope_inter(*slope)
    nibabel.save(im, f)
    return f

@pytest.mark.parametrize('ending', ['nii', 'nii.gz', 'NII'])
@pytest.mark.parametrize('kind', ['uint8', 'int16', 'uint16', 'int32', 'float32', 'float64'])
def test_nifti(tmp_path, ending, kind):
    a = drawn(kind, (5, 4, 3)) if kind!='int32' else drawn('int16', (5, 4, 3)).astype(kind)
    f = nifti(tmp_path/f'a.{ending}', a)
    for o in (f, str(f)): same(volume(o), a.transpose(2, 1, 0)[None], TensorVolume)

@pytest.mark.parametrize('code', ['LPS', 'RAS', 'LAS', 'SPL', 'AIR', 'PSR'])
def test_any_orientation_comes_out_as_ras(tmp_path, code):
    "A volume whose voxels say where they are: x to the right, y to the front, z up"
    pytest.importorskip('nibabel')
    x,y,z = np.meshgrid(np.arange(5), np.arange(4), np.arange(3), indexing='ij')
    ras,affine = (100*x+10*y+z).astype(np.int16),np.zeros((4, 4))
    ways = dict(R=(0, 1), L=(0, -1), A=(1, 1), P=(1, -1), S=(2, 1), I=(2, -1))
    a = ras.transpose([ways[o][0] for o in code])
    for k,o in enumerate(code):
        axis,sign = ways[o]
        affine[axis, k],affine[axis, 3] = sign, 0 if sign>0 else ras.shape[axis]-1
        if sign<0: a = np.flip(a, k)
    affine[3, 3] = 1
    same(volume(nifti(tmp_path/'a.nii.gz', np.ascontiguousarray(a), affine)), ras.T[None], TensorVolume)

def test_nifti_slope_and_channels(tmp_path):
    pytest.importorskip('nibabel')
    stored = drawn('int16', (5, 4, 3))
    f = nifti(tmp_path/'a.nii', np.zeros((5, 4, 3), np.int16), slope=(.5, -1024))
    raw = bytearray(f.read_bytes())
    raw[352:] = stored.tobytes('F')
    f.write_bytes(raw)
    same(volume(f), (stored*.5-1024).T[None], TensorVolume)
    a = drawn('int16', (5, 4, 3, 2))
    same(volume(nifti(tmp_path/'b.nii', a)), a.transpose(3, 2, 1, 0), TensorVolume)
    same(volume(nifti(tmp_path/'c.nii', a[..., None, :])), a.transpose(3, 2, 1, 0), TensorVolume)

@pytest.mark.parametrize('kind', ['words', 'empty', 'short', 'flat', 'five', 'complex', 'colour'])
def test_refused_nifti(tmp_path, kind):
    pytest.importorskip('nibabel')
    f = tmp_path/f'{kind}.nii.gz'
    if kind=='words':   f.write_text('no image')
    if kind=='empty':   f.write_bytes(b'')
    if kind=='short':   nifti(f, drawn('int16', (5, 4, 3))).write_bytes(f.read_bytes()[:-30])
    if kind=='flat':    nifti(f, drawn('int16', (5, 4)))
    if kind=='five':    nifti(f, drawn('int16', (5, 4, 3, 2, 2)))
    if kind=='complex': nifti(f, np.zeros((5, 4, 3), np.complex64))
    if kind=='colour':  nifti(f, np.zeros((5, 4, 3), [('R', 'u1'), ('G', 'u1'), ('B', 'u1')]))
    said = refusal(volume, f)
    assert str(f) in said and ('cannot read' in said or 'a volume (x, y, z)' in said)

def test_nifti_without_nibabel(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'nibabel', None)
    (tmp_path/'a.nii').write_bytes(b'')
    said = refusal(volume, tmp_path/'a.nii', exc=ImportError)
    assert str(tmp_path/'a.nii') in said and "`pip install 'fastai_normstats[medical]'`" in said

# --- volumes: DICOM

def series(path, n=5, name='CT_small.dcm', change=lambda ds, k: None, axis=(0, 0, 1), rows=(1, 0, 0, 0, 1, 0),
           step=2.5):
    "`n` slices made of one, `step` apart along `axis`, in files whose names are in another order"
    path.mkdir(parents=True, exist_ok=True)
    uid,rng = pydicom.uid.generate_uid(),np.random.default_rng(n)
    for i,k in enumerate(rng.permutation(n)):
        k,ds = int(k),pydicom.dcmread(bundled(name))
        ds.PixelData = np.roll(ds.pixel_array, 7*k, 1).tobytes()
        ds.SeriesInstanceUID,ds.InstanceNumber,ds.ImageOrientationPatient = uid,n-k,list(rows)
        ds.ImagePositionPatient = [float(o) for o in np.array([-100, 20, -75])+k*step*np.array(axis)]
        change(ds, k)
        ds.save_as(path/f'{i:02}.dcm')
    return path

def rolled(name, n=5):
    "The volume by hand: values in float64 from the stored ones, in the order of the positions"
    ds = pydicom.dcmread(bundled(name))
    one = ds.pixel_array.astype(np.float64)*float(ds.get('RescaleSlope', 1))+float(ds.get('RescaleIntercept', 0))
    return np.stack([np.roll(one, 7*k, 1) for k in range(n)]).astype(np.float32)

@pytest.mark.parametrize('name', ['CT_small.dcm', 'MR_small.dcm'])
@pytest.mark.parametrize('axis,rows', [((0, 0, 1), (1, 0, 0, 0, 1, 0)), ((0, 1, 0), (1, 0, 0, 0, 0, -1)),
                                       ((1, 0, 0), (0, 1, 0, 0, 0, -1)), ((0, -.6, .8), (1, 0, 0, 0, .8, .6))], ids=str)
def test_series(tmp_path, name, axis, rows):
    "Axial, coronal, sagittal and oblique: along the normal, whatever the names and InstanceNumbers say"
    normal = np.cross(rows[:3], rows[3:])
    want = rolled(name)[::1 if normal@axis>0 else -1]
    f = series(tmp_path/'scan', name=name, axis=axis, rows=rows)
    for o in (f, str(f)): same(volume(o), want[None], TensorVolume)

def test_what_else_lies_in_the_folder(tmp_path):
    f = series(tmp_path/'scan')
    (f/'notes.txt').write_text('words')
    (f/'._00.dcm').write_text('words')
    (f/'DICOMDIR').write_bytes(Path(bundled('CT_small.dcm')).read_bytes())
    (f/'other').mkdir()
    for p in f.glob('0*.dcm'): p.rename(p.with_suffix(''))  # no ending, as from an archive
    same(volume(f), rolled('CT_small.dcm')[None], TensorVolume)

def test_one_slice(tmp_path): same(volume(series(tmp_path/'scan', n=1)), rolled('CT_small.dcm', 1)[None], TensorVolume)

@pytest.mark.parametrize('tag', ['ImagePositionPatient', 'ImageOrientationPatient'])
def test_without_positions(tmp_path, tag):
    def change(ds, k):
        if k==2: delattr(ds, tag)
    f = series(tmp_path/'scan', change=change)
    with pytest.warns(UserWarning, match='order of InstanceNumber'): x = volume(f)
    same(x, rolled('CT_small.dcm')[None, ::-1], TensorVolume)

def other_series(ds, k):
    if k==2: ds.SeriesInstanceUID = pydicom.uid.generate_uid()
def smaller(ds, k):
    if k==2: ds.Rows,ds.PixelData = 64,ds.pixel_array[:64].tobytes()
def turned(ds, k):
    if k==2: ds.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
def twice(ds, k):
    if k==2: ds.ImagePositionPatient = [-100, 20, -75+2.5]
def gap(ds, k):
    if k>2: ds.ImagePositionPatient = [-100, 20, -75+2.5*(k+1)]
def nowhere(ds, k): del ds.ImagePositionPatient, ds.InstanceNumber
def without_pixels(ds, k):
    if k==2: del ds.PixelData
def frames(ds, k):
    if k==2: ds.NumberOfFrames = 2

@pytest.mark.parametrize('change,said', [
    (other_series, 'several series'), (smaller, 'several sizes'), (turned, 'several orientations'),
    (twice, 'two slices at one position'), (gap, 'lacks slices between'), (nowhere, 'order them yourself'),
    (frames, 'holds 2 frames'), (without_pixels, 'holds no pixels')], ids=lambda o: getattr(o, '__name__', o))
def test_refused_series(tmp_path, change, said):
    f = series(tmp_path/'scan', change=change)
    assert said in refusal(volume, f) and str(f) in refusal(volume, f)

def test_the_gap_and_the_twins_are_named(tmp_path):
    f = series(tmp_path/'scan', change=gap)
    place = {float(pydicom.dcmread(p).ImagePositionPatient[2]): p.name for p in f.iterdir()}
    assert f'between {place[-70.]} and {place[-65.]}, which are 5 apart (most are 2.5)' in refusal(volume, f)
    f = series(tmp_path/'again', change=twice)
    place = {int(pydicom.dcmread(p).InstanceNumber): p.name for p in f.iterdir()}
    twins = sorted([place[4], place[3]])  # the second and the third slice of five
    assert f"({twins[0]} and {twins[1]})" in refusal(volume, f)

def test_tags_that_are_no_positions(tmp_path):
    def change(ds, k): ds.ImagePositionPatient = [1., 2.]
    with pytest.warns(UserWarning, match='order of InstanceNumber'): x = volume(series(tmp_path/'scan', change=change))
    same(x, rolled('CT_small.dcm')[None, ::-1], TensorVolume)

def test_orientations_alike_but_for_rounding(tmp_path):
    def change(ds, k): ds.ImageOrientationPatient = [1, 0, 1e-4*k, 0, 1, 0]
    same(volume(series(tmp_path/'scan', change=change)), rolled('CT_small.dcm')[None], TensorVolume)

def test_refused_folders(tmp_path):
    assert 'holds no DICOM file' in refusal(volume, tmp_path)
    f = series(tmp_path/'scan')
    (f/'09.dcm').write_text('words')
    assert str(f/'09.dcm') in refusal(volume, f)
    (f/'09.dcm').write_bytes((f/'00.dcm').read_bytes()[:3000])
    assert str(f) in refusal(volume, f)

def test_dicom_without_pydicom(tmp_path, monkeypatch):
    f = series(tmp_path/'scan')
    monkeypatch.setitem(sys.modules, 'pydicom', None)
    assert 'fastai_normstats[medical]' in refusal(volume, f, exc=ImportError)

def test_dicom_series(tmp_path):
    a,b = series(tmp_path/'p1'/'ct', n=1),series(tmp_path/'p2', n=1)
    (tmp_path/'p3').mkdir()
    assert list(dicom_series(tmp_path))==[a, b] and list(dicom_series(str(b)))==[b]
    assert 'no DICOM file' in refusal(dicom_series, tmp_path/'p3')
    for o in (tmp_path/'none', a/'00.dcm'): assert 'is no folder' in refusal(dicom_series, o)

# --- volumes: what is refused, size, shown

@pytest.mark.parametrize('a,said', [
    (np.zeros((4, 4)), 'a volume (D, H, W)'), (np.zeros((1, 1, 2, 3, 4)), 'a volume (D, H, W)'),
    (np.zeros((2, 0, 3)), 'real numbers'), (np.zeros((2, 2, 2), complex), 'real numbers'),
    (np.array([[['a']]]), 'real numbers')])
def test_refused_volume_arrays(tmp_path, a, said):
    assert said in refusal(volume, a) and 'the array' in refusal(volume, a)
    np.save(tmp_path/'a.npy', a)
    assert str(tmp_path/'a.npy') in refusal(volume, tmp_path/'a.npy')

@pytest.mark.parametrize('name', ['CT_small.dcm', 'MR_small.dcm'])
def test_a_file_of_dicom_is_no_volume(name):
    assert 'give the folder of a DICOM series' in refusal(volume, bundled(name))

@pytest.mark.parametrize('size', [64, (1, 2), (0, 1, 2), (1., 2, 3), (True, 2, 3), 'abc', [], ()], ids=str)
def test_refused_size(size): assert 'three whole numbers (D, H, W)' in refusal(VolumeBlock, size=size)

@pytest.mark.parametrize('shape', [(4, 6, 8), (3, 5, 7), (2, 9, 8), (9, 9, 9), (1, 1, 1)], ids=str)
@pytest.mark.parametrize('size', [(4, 6, 8), (3, 7, 5), (1, 1, 1), (10, 3, 9)], ids=str)
def test_size(shape, size):
    a = np.stack([drawn('int16', shape, seed=i).astype(np.float32) for i in range(2)])
    want = []
    for c in a:  # numpy's own padding and slicing, an axis at a time
        v = c
        for axis,(n,t) in enumerate(zip(shape, size)):
            pad = [(0, 0)]*3
            pad[axis] = (max(0, t-n)//2, max(0, t-n)-max(0, t-n)//2)
            v = np.pad(v, pad, constant_values=c.min()).take(range(max(0, n-t)//2, max(0, n-t)//2+t), axis)
        want.append(v)
    same(volume(a, size=size), np.stack(want), TensorVolume)

def test_volume_shown():
    a = drawn('float32', (2, 5, 6, 7))
    got,title = drawn_on(volume(a), title='scan')
    assert np.array_equal(got, a[0, 2]) and title=='scan'
    assert drawn_on(volume(np.zeros((3, 3, 2))))[0].shape==(3, 2)  # as narrow as colours are many

# --- volumes: fastai's transforms

@pytest.mark.parametrize('f', [Flip(), Rotate(), Zoom(), Warp(), Dihedral(), Brightness(), Contrast(), Saturation(),
                         Hue(), RandomResizedCropGPU(4),
                               *aug_transforms()], ids=lambda f: type(f).__name__)
@pytest.mark.parametrize('shape', [(1, 1, 4, 6, 6), (2, 2, 4, 6, 6), (3, 3, 4, 6, 6)], ids=str)
def test_flat_augmentation_refuses_volumes(f, shape):
    for split_idx in (0, 1):
        assert '(B, C, H, W)' in refusal(f, TensorVolume(torch.rand(shape)), split_idx=0, exc=TypeError)

def test_it_still_serves_images():
    x = TensorImage(torch.rand(2, 3, 6, 6))
    for f in (Flip(), Brightness(), Hue()): assert type(f(x.clone(), split_idx=0)) is TensorImage

def test_item_flips():
    x = volume(drawn('float32', (3, 4, 5)))
    assert torch.equal(FlipItem(1.)(x, split_idx=0), x.flip(-1))
    y = DihedralItem(1.)(x, split_idx=0)
    assert type(y) is TensorVolume and sorted(y.flatten().tolist())==sorted(x.flatten().tolist()) and y.shape[:2]==(1,
                3)

def test_int_to_float_leaves_volumes():
    x = volume(np.array([[[-3024., 1896]]]))[None]
    assert torch.equal(IntToFloatTensor()(x), x) and torch.equal(IntToFloatTensor().decode(x), x)

# --- volumes: in a block

@pytest.fixture
def scans(tmp_path):
    for i in range(6): series(tmp_path/'scans'/'ab'[i%2]/f'p{i}', n=3+i%2)
    return tmp_path/'scans'

def scan_block(size=(3, 16, 16)):
    return DataBlock((VolumeBlock(size=size), CategoryBlock),
                     get_items=dicom_series, get_y=parent_label, splitter=IndexSplitter([0, 3]))

def cut(f): return volume(f).numpy()[0, :3, 56:72, 56:72]

def test_statistics_of_volumes(scans):
    m = scan_block().fit_stats(scans, axes=(0, 2, 3, 4), **fit).stats_choice.measured
    v = np.stack([cut(f) for f in dicom_series(scans)[1, 2, 4, 5]]).astype(np.float64)
    np.testing.assert_allclose([m.mean.item(), m.std.item()], [v.mean(), v.std()], rtol=1e-6)

def test_volumes_learner(scans, tmp_path):
    dls = scan_block().fit_stats(scans, axes=(0, 2, 3, 4), **fit).dataloaders(scans, bs=2, **quick)
    x = dls.one_batch()[0]
    assert type(x) is TensorVolume and x.shape==(2, 1, 3, 16, 16)
    net = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2))
    item = dicom_series(scans)[0]
    check_learner(Learner(dls, net, loss_func=nn.CrossEntropyLoss(), path=tmp_path), item, volume(item).numpy())

def test_a_folder_is_not_kept(scans):
    with redirect_stdout(io.StringIO()) as out:
        scan_block().fit_stats(scans, axes=(0, 2, 3, 4), **{**fit, 'cache': True, 'verbose': True})
    assert 'will not be kept' in out.getvalue()

def test_one_volume_is_pixel_for_pixel_that_of_dicom_pixels(tmp_path):
    f = series(tmp_path/'scan', n=2)
    want = {float(pydicom.dcmread(p).ImagePositionPatient[2]): dicom_pixels(p) for p in f.iterdir()}
    same(volume(f), np.stack([want[k] for k in sorted(want)])[None], TensorVolume)
