"""Images in the units of their files, against numpy, tifffile and pydicom alone; and what is refused, in one sentence
that names the file"""
import io,os,pickle,shutil,subprocess,sys,warnings
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import pydicom
import pytest
import tifffile
import torch
from fastai.medical.imaging import dicom_windows
from fastai.vision.all import (CategoryBlock, CropPad, DataBlock, DihedralItem, FlipItem, ImageBlock, IndexSplitter,
                               IntToFloatTensor, MaskBlock, PILImage, PILImageBW,
                               RandomResizedCrop, Resize, TensorImage, TensorImageBW,
                               TensorMask, ToTensor, TransformBlock, aug_transforms, get_files, get_image_files,
                               load_learner, parent_label, vision_learner, xresnet18)
from helpers import refusal
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.pixels import get_decoder
from pydicom.sequence import Sequence

from fastai_normstats.all import (FloatImageBlock,PILDicomFloat,PILFloat,StatsChoice,Windows,dicom_frames,dicom_pixels,
                                  dicom_rgb)
from fastai_normstats.images.files import _missing

DATA = Path(os.environ.get('NORMSTATS_DATA', Path(__file__).parents[2]/'shared'/'data'))
CT,MISC = DATA/'ct',DATA/'dicom_misc'
ct_data   = pytest.mark.skipif(not CT.is_dir(), reason='needs the CT slices')
misc_data = pytest.mark.skipif(not MISC.is_dir(), reason='needs the DICOM files')
small = dict(bs=4, num_workers=0)
fit   = dict(small, stats='custom', tol=0)

def bundled(name): return get_testdata_file(name, download=False)
def read(name): return pydicom.dcmread(bundled(name))
def dicoms(p): return get_files(p, extensions=['.dcm']).sorted()
def values(fn, cls=PILFloat, **kwargs): return np.asarray(cls.create(fn, **kwargs))

def printed(f, *args, **kwargs):
    with redirect_stdout(io.StringIO()) as out: res = f(*args, **kwargs)
    return res,out.getvalue()

def rescaled(ds):
    "HU by hand: float64, then float32"
    return (ds.pixel_array.astype(np.float64)*float(ds.RescaleSlope)+float(ds.RescaleIntercept)).astype(np.float32)

# --- files of any depth

kinds = ['uint8', 'int8', 'uint16', 'int16', 'uint32', 'int32', 'float16', 'float32', 'float64']

def drawn(kind, rng, shape=(7, 9)):
    "Values over the whole range of the type, up to what float32 holds exactly"
    k = np.dtype(kind)
    if k.kind=='f': return rng.normal(0, 1000, shape).astype(k)
    info = np.iinfo(k)
    return rng.integers(info.min, info.max, shape, dtype=k, endpoint=True)

@pytest.mark.parametrize('kind', kinds)
@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('compression', [None, 'zlib'])
def test_tiff(tmp_path, kind, order, compression):
    "Bit for bit what numpy makes of what tifffile wrote, from a path, a string and bytes"
    a = drawn(kind, np.random.default_rng(0))
    f = tmp_path/'a.tif'
    tifffile.imwrite(f, a, byteorder=order, compression=compression)
    for o in (f, str(f), f.read_bytes()):
        got = values(o)
        assert got.dtype==np.float32 and np.array_equal(got, a.astype(np.float32))

@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('kind', ['int32', 'uint32'])
def test_exact_to_2_to_the_24(tmp_path, kind, order):
    a = np.array([[0, 1, 255, 256, 65535, 65536, 2**24-1, 2**24]], kind)
    tifffile.imwrite(tmp_path/'a.tif', a, byteorder=order)
    assert np.array_equal(values(tmp_path/'a.tif').astype(np.float64), a)

@pytest.mark.parametrize('name,a', [('a.png', np.uint8), ('a.png', np.uint16), ('a.tif', np.uint16),
                                    ('a.tif', np.int32), ('a.tif', np.float32), ('a.bmp', np.uint8),
                                    ('a.jp2', np.uint16)], ids=str)
def test_pillow(tmp_path, name, a):
    a = drawn(a, np.random.default_rng(1))
    Image.fromarray(a).save(tmp_path/name)
    assert np.array_equal(values(tmp_path/name), a.astype(np.float32))

@pytest.mark.parametrize('mode,dtype', [('I;16', '<u2'), ('I;16B', '>u2'), ('I', 'i4'), ('F', 'f4'), ('L', 'u1')])
def test_pillow_images(mode, dtype):
    a = np.array([[0, 1, 200], [7, 8, 9]]).astype(dtype)
    im = Image.frombytes(mode, (3, 2), a.tobytes())
    assert im.mode==mode and np.array_equal(values(im), a.astype(np.float32))

@pytest.mark.parametrize('dtype', ['uint8', 'uint16', '>u2', 'int16', 'int32', 'uint32', 'int64', 'float16', 'float32',
                                   'float64', 'bool'])
def test_arrays(dtype):
    a = np.array([[0, 1, 3], [0, 100, 1]]).astype(dtype)
    for o in (a, a[None], a[:, ::-1][:, ::-1]): assert np.array_equal(values(o), a.astype(np.float32))
    if a.dtype.isnative: assert np.array_equal(values(torch.from_numpy(a)), a.astype(np.float32))

item_tfms = dict(resize=Resize(8), squish=Resize(8, method='squish'), pad=Resize(20, method='pad', pad_mode='zeros'),
                 crop=CropPad(8), crop_random=RandomResizedCrop(8),
                 flip=FlipItem(1.), dihedral=DihedralItem(1.))

@pytest.mark.parametrize('name', item_tfms)
def test_item_transforms_keep_floats(name):
    a = np.random.default_rng(0).uniform(-3000, -1000, (16, 12)).astype(np.float32)
    for _ in range(8):
        y = item_tfms[name](PILFloat.create(a), split_idx=0)
        v = np.asarray(y)
        assert type(y) is PILFloat and y.mode=='F' and a.min()-1e-3<=v.min()
        assert v.max()<=(0 if name=='pad' else a.max()+1e-3)
        if name in ('flip', 'dihedral'): assert np.array_equal(np.sort(v.ravel()), np.sort(a.ravel()))

def test_the_image_is_a_copy():
    a = np.zeros((2, 2), np.float32)
    im = PILFloat.create(a)
    a += 1
    assert not np.asarray(im).any()

def test_tensor():
    a = drawn('uint16', np.random.default_rng(2))
    x = ToTensor()(PILFloat.create(a))
    assert isinstance(x, TensorImageBW) and x.dtype==torch.float32 and np.array_equal(x.numpy()[0], a)
    assert np.array_equal(values(x), a)  # and back

@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'P', 'LA', 'CMYK', 'YCbCr'])
def test_colour_refused(tmp_path, mode):
    f = tmp_path/{'CMYK': 'a.tif', 'YCbCr': 'a.jpg'}.get(mode, 'a.png')
    Image.new(mode, (3, 2)).save(f)
    said = refusal(PILFloat.create, f)
    assert str(f) in said and 'one channel' in said and '`ImageBlock` with `PILImage`' in said

def test_16_bit_colour_refused(tmp_path):
    tifffile.imwrite(tmp_path/'a.tif', drawn('uint16', np.random.default_rng(0), (7, 9, 3)), photometric='rgb')
    assert 'Pillow reduces 16-bit colour to 8' in refusal(PILFloat.create, tmp_path/'a.tif')

@pytest.mark.parametrize('dtype', ['uint16', 'float64'])
def test_pages_refused(tmp_path, dtype):
    tifffile.imwrite(tmp_path/'a.tif', np.zeros((3, 7, 9), dtype), photometric='minisblack')
    assert str(tmp_path/'a.tif') in refusal(PILFloat.create, tmp_path/'a.tif')

@pytest.mark.parametrize('most', [15, 1023, 4095])
def test_stretched_pgm_refused(tmp_path, most):
    a = np.array([[0, most]], '>u2' if most>255 else 'u1')
    (tmp_path/'a.pgm').write_bytes(f'P5\n2 1\n{most}\n'.encode()+a.tobytes())
    assert f'maximum {most}' in refusal(PILFloat.create, tmp_path/'a.pgm')

@pytest.mark.parametrize('most', [255, 65535])
def test_pgm(tmp_path, most):
    a = np.array([[0, 7, most]], '>u2' if most>255 else 'u1')
    (tmp_path/'a.pgm').write_bytes(f'P5\n3 1\n{most}\n'.encode()+a.tobytes())
    assert np.array_equal(values(tmp_path/'a.pgm'), a)

@pytest.mark.parametrize('o', [np.zeros((4, 4, 3)), np.zeros((3, 4, 4)), np.zeros(4), np.zeros((4, 4), complex),
                               np.array([['a']]), torch.zeros(2, 1, 4, 4)], ids=lambda o: str(o.shape))
def test_arrays_refused(o): assert '(H, W)' in refusal(PILFloat.create, o)

def test_files_refused(tmp_path):
    (tmp_path/'a.png').write_text('no image')
    (tmp_path/'a.tif').write_bytes(b'II*\0'+b'\xff'*40)
    for o in ('a.png', 'a.tif'): assert str(tmp_path/o) in refusal(PILFloat.create, tmp_path/o)
    for o in ('CT_small.dcm', 'MR_small.dcm'): assert 'use `PILDicomFloat`' in refusal(PILFloat.create, bundled(o))
    for o in (PILFloat.create, dicom_pixels): refusal(o, tmp_path/'none.tif', exc=FileNotFoundError)

# --- DICOM

grey = ['CT_small.dcm', 'MR_small.dcm', 'MR_small_RLE.dcm', 'MR_small_bigendian.dcm', 'MR_small_implicit.dcm',
        'MR_small_padded.dcm', 'MR_small_jp2klossless.dcm', '693_J2KI.dcm',
        'J2K_pixelrep_mismatch.dcm', 'examples_overlay.dcm', 'image_dfl.dcm', 'liver_1frame.dcm', 'JPEG2000.dcm',
        'rtdose_1frame.dcm', 'rtdose_rle_1frame.dcm']

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', grey)
def test_grey_dicom(name):
    ds = read(name)
    want = rescaled(ds) if 'RescaleSlope' in ds else ds.pixel_array.astype(np.float32)
    for o in (bundled(name), Path(bundled(name)), ds, Path(bundled(name)).read_bytes()):
        got = dicom_pixels(o)
        assert got.dtype==np.float32 and got.ndim==2 and np.array_equal(got, want)
    assert np.array_equal(values(bundled(name), PILDicomFloat), want)

def made(x, **tags):
    "A dataset of array `x`, with its bits and sign"
    ds = read('MR_small.dcm')
    ds.PixelData,ds.PixelRepresentation = x.tobytes(),int(x.dtype.kind=='i')
    ds.Rows,ds.Columns = x.shape[-2:]
    ds.BitsAllocated = ds.BitsStored = 8*x.dtype.itemsize
    if 'SmallestImagePixelValue' in ds: del ds.SmallestImagePixelValue,ds.LargestImagePixelValue
    for k,v in tags.items(): setattr(ds, k, v)
    ds.HighBit = ds.BitsStored-1
    return ds

@pytest.mark.parametrize('dtype,bits,total', [('u1', 8, 255), ('u2', 16, 65535), ('u2', 12, 4095), ('i2', 16, -1),
                                              ('i2', 12, -1)])
@pytest.mark.parametrize('tags', [{}, dict(RescaleSlope=2, RescaleIntercept=-7)], ids=['stored', 'rescaled'])
def test_monochrome1(dtype, bits, total, tags):
    lo,hi = (-2**(bits-1), 2**(bits-1)-1) if dtype[0]=='i' else (0, 2**bits-1)
    assert lo+hi==total
    x = np.random.default_rng(0).integers(lo, hi, (4, 6), endpoint=True).astype(dtype)
    x.flat[:2] = lo,hi
    a,b = tags.get('RescaleSlope', 1),tags.get('RescaleIntercept', 0)
    ds = made(x, BitsStored=bits, PhotometricInterpretation='MONOCHROME1', **tags)
    assert np.array_equal(dicom_pixels(ds), (total-x.astype(int))*a+b)
    assert np.array_equal(dicom_pixels(ds, invert=False), x.astype(int)*a+b)
    assert np.array_equal(values(ds, PILDicomFloat, invert=False), x.astype(int)*a+b)
    for modality in ('CT', 'PT', 'RTDOSE'):
        ds.Modality = modality
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            assert np.array_equal(dicom_pixels(ds), x.astype(int)*a+b)

def test_rescaling_in_float64():
    "A slope and values whose product float32 would round differently on the way"
    x = np.random.default_rng(0).integers(0, 2**32-1, (50, 50), dtype=np.uint32)
    ds = made(x, RescaleSlope='1.0002441406', RescaleIntercept='-1024.123')
    assert np.array_equal(dicom_pixels(ds), (x*1.0002441406-1024.123).astype(np.float32))

@pytest.mark.parametrize('tags,a,b', [(dict(RescaleSlope=2), 2, 0), (dict(RescaleIntercept=-5), 1, -5),
                                      (dict(RescaleSlope=None, RescaleIntercept=None), 1, 0)])
def test_half_a_rescaling(tags, a, b):
    x = np.arange(12, dtype='i2').reshape(3, 4)
    assert np.array_equal(dicom_pixels(made(x, **tags)), x*a+b)

def test_ct_without_rescaling_warns():
    with pytest.warns(UserWarning, match='may not be HU'): dicom_pixels(made(np.arange(12, dtype='i2').reshape(3, 4),
        Modality='CT'))

def test_modality_lut():
    lut = Dataset()
    lut.LUTDescriptor,lut.ModalityLUTType,lut.LUTData = [4, 0, 16],'OD',[10, 20, 40, 80]
    lut['LUTData'].VR = 'US'
    ds = made(np.array([[0, 1, 2], [3, 3, 0]], 'u2'), ModalityLUTSequence=Sequence([lut]))
    assert np.array_equal(dicom_pixels(ds), [[10, 20, 40], [80, 80, 10]])

def group(slope, intercept):
    t,g = Dataset(),Dataset()
    t.RescaleSlope,t.RescaleIntercept,t.RescaleType = slope,intercept,'HU'
    g.PixelValueTransformationSequence = Sequence([t])
    return g

@pytest.mark.parametrize('where', ['PerFrame', 'Shared'])
def test_enhanced_multi_frame(tmp_path, where):
    "The rescaling of each frame stands in the functional groups, which pydicom's own function does not read"
    x = np.random.default_rng(0).integers(0, 4095, (3, 4, 6)).astype('u2')
    groups = [group(i+1, -1024-i) for i in range(3)] if where=='PerFrame' else [group(2, -1000)]
    ds = made(x, Modality='CT', NumberOfFrames=3, **{f'{where}FunctionalGroupsSequence': Sequence(groups)})
    ds.save_as(tmp_path/'a.dcm')
    for i in range(3):
        a,b = (i+1, -1024-i) if where=='PerFrame' else (2, -1000)
        for o in (ds, tmp_path/'a.dcm',
                  (tmp_path/'a.dcm').read_bytes()): assert np.array_equal(dicom_pixels(o, i), x[i].astype(int)*a+b)

@pytest.mark.parametrize('dtype,word', [('f4', 'FloatPixelData'), ('f8', 'DoubleFloatPixelData')])
def test_float_pixels(dtype, word):
    x = np.random.default_rng(0).normal(0, 1, (4, 6)).astype(dtype)
    ds = made(x)
    del ds.PixelData
    setattr(ds, word, x.tobytes())
    for o in ('MONOCHROME2', 'MONOCHROME1'):
        ds.PhotometricInterpretation = o
        assert np.array_equal(dicom_pixels(ds), x.astype(np.float32))

def test_frames(tmp_path):
    dose,one = bundled('rtdose.dcm'),bundled('CT_small.dcm')
    items = dicom_frames([one, Path(dose)])
    assert items==[one]+[(Path(dose), i) for i in range(15)] and (items[3].file, items[3].frame)==(Path(dose), 2)
    assert dicom_frames(dose)==[(dose, i) for i in range(15)] and pickle.loads(pickle.dumps(items[3]))==items[3]
    want = read('rtdose.dcm').pixel_array.astype(np.float32)
    for i,o in enumerate(items[1:]):
        assert np.array_equal(dicom_pixels(o), want[i])
        assert np.array_equal(values(o, PILDicomFloat), want[i]) and np.array_equal(values(tuple(o), PILDicomFloat),
            want[i])
    head = tmp_path/'head.dcm'  # of which only the header is there
    head.write_bytes(Path(dose).read_bytes()[:1600])
    assert len(dicom_frames(head))==15
    (tmp_path/'a.txt').write_text('text')
    assert str(tmp_path/'a.txt') in refusal(dicom_frames, [one, tmp_path/'a.txt'])

def test_large_files_are_read_frame_by_frame(tmp_path):
    "Of a file of more than 16 MB pixels stay where they are until a frame is wanted"
    x = np.random.default_rng(0).integers(0, 4095, (40, 512, 512)).astype('u2')
    made(x, NumberOfFrames=40).save_as(tmp_path/'a.dcm')
    assert np.array_equal(dicom_pixels(tmp_path/'a.dcm', 39),
                          x[39]) and np.array_equal(dicom_pixels(tmp_path/'a.dcm', 0), x[0])
    big = x.reshape(-1, 4096)
    made(big).save_as(tmp_path/'b.dcm')
    assert np.array_equal(dicom_pixels(tmp_path/'b.dcm'), big)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name,words', [
    ('rtdose.dcm', 'holds 15 frames: give items `(file, frame)`'), ('rtplan.dcm', 'holds no pixels (modality RTPLAN)'),
    ('test-SR.dcm', 'holds no pixels (modality SR)'),
    ('waveform_ecg.dcm', 'holds no pixels'), ('UN_sequence.dcm', 'holds no pixels (modality not given)'),
    ('examples_rgb_color.dcm', 'is a colour image (RGB)'),
    ('SC_ybr_full_422_uncompressed.dcm', 'is a colour image (YBR_FULL_422)'),
    ('examples_palette.dcm', 'type_tfms=[dicom_rgb, PILImage.create]'),
    ('MR_truncated.dcm', 'cut short'), ('no_meta.dcm', 'not a DICOM file'), ('crayons.icc', 'not a DICOM file'),
    ('badVR.dcm', 'damaged'),
    ('nested_priv_SQ.dcm', 'get the file again')])
def test_dicom_refused(name, words):
    for f in (dicom_pixels, PILDicomFloat.create):
        said = refusal(f, bundled(name))
        assert bundled(name) in said and words in said, said

@pytest.mark.parametrize('frame', [-1, 15, 99, 1.5, '3'])
def test_no_such_frame(frame):
    for said in (refusal(dicom_pixels, bundled('rtdose.dcm'), frame),
                 refusal(dicom_pixels, (bundled('rtdose.dcm'), frame))): assert 'from 0 to 14' in said
    assert 'from 0 to 0' in refusal(dicom_pixels, bundled('CT_small.dcm'), frame)

def test_other_things_refused():
    for f in (dicom_pixels, PILFloat.create, PILDicomFloat.create):
        for o in (3, None, {}): assert 'give a path' in refusal(f, o, exc=TypeError)
    ds = made(np.zeros((3, 4), 'u2'))
    del ds.file_meta.TransferSyntaxUID
    assert 'set `ds.file_meta.TransferSyntaxUID`' in refusal(dicom_pixels, ds)

compressed = dict(gdcm=['MR_small_jpeg_ls_lossless.dcm', 'JPEGLSNearLossless_16.dcm', 'JPEGLSNearLossless_08.dcm',
                        'JPEG-lossy.dcm', 'JPGExtended.dcm'])

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', compressed['gdcm'])
def test_decoder_missing_or_there(name):
    "With a decoder: what pydicom decodes. Without: the encoding in words, and the package"
    ds = read(name)
    try: want = ds.pixel_array.astype(np.float32)
    except RuntimeError: want = None
    if want is not None: assert np.array_equal(dicom_pixels(bundled(name)), want); return
    said = refusal(dicom_pixels, bundled(name))
    assert bundled(name) in said and ds.file_meta.TransferSyntaxUID.name in said and '`pip install python-gdcm`' in said

@pytest.mark.parametrize('syntax,package', [('JPEGLossless', 'python-gdcm'), ('JPEGLosslessSV1', 'python-gdcm'),
                                            ('JPEGLSLossless', 'python-gdcm'), ('JPEGLSNearLossless', 'python-gdcm'),
                                            ('JPEG2000', 'python-gdcm'), ('HTJ2K', 'pylibjpeg pylibjpeg-openjpeg')])
def test_package_for_each_encoding(monkeypatch, syntax, package):
    decoder = get_decoder(getattr(pydicom.uid, syntax))
    names = [*decoder._unavailable, *decoder._available]
    class Bare: missing_dependencies = [f'{o} - requires it' for o in names]
    assert _missing(Bare)==package

def test_video_refused():
    ds = made(np.zeros((3, 4), 'u2'))
    ds.file_meta.TransferSyntaxUID = pydicom.uid.MPEG4HP41
    assert 'MPEG-4' in refusal(dicom_pixels, ds)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ['CT_small.dcm', 'MR_small_RLE.dcm', 'MR_small_jp2klossless.dcm', 'rtdose_1frame.dcm'])
def test_damaged_files(name, tmp_path):
    "Files cut short or with bytes changed give an image or one sentence that names the file"
    data,rng,f = Path(bundled(name)).read_bytes(),np.random.default_rng(0),tmp_path/'a.dcm'
    cut = [data[:n] for n in rng.integers(0, len(data), 15)]
    for i in range(40):
        d = bytearray(data)
        for at in rng.integers(132, 1200, 6): d[at] = rng.integers(256)
        cut.append(bytes(d))
    for d in cut:
        f.write_bytes(d)
        try: assert dicom_pixels(f).ndim==2
        except ValueError as e: assert str(f) in str(e) and '\n' not in str(e), repr(e)

@pytest.mark.slow
def test_without_pydicom(tmp_path):
    "All else works, and DICOM names what to install"
    code = ("import sys; sys.modules['pydicom'] = None\n"
            "from fastai_normstats.all import PILFloat,dicom_pixels,Windows\nimport numpy as "
            "np\nPILFloat.create(np.zeros((3, 4)))\n"
            "try: dicom_pixels('a.dcm')\nexcept ImportError as e: print(e)")
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert "pip install 'fastai_normstats[medical]'" in res.stdout, res.stderr

# --- colour DICOM

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ['examples_rgb_color.dcm', 'SC_ybr_full_422_uncompressed.dcm',
                                  'SC_rgb_jpeg_dcmtk.dcm', 'SC_rgb_rle.dcm', 'SC_rgb_small_odd.dcm',
                                  'examples_jpeg2k.dcm',
                                  'ExplVR_BigEnd.dcm'])
def test_rgb(name):
    got = dicom_rgb(bundled(name))
    assert got.dtype==np.uint8 and got.shape[2:]==(3,) and np.array_equal(got, read(name).pixel_array)

@pytest.mark.parametrize('name,frame', [('SC_rgb_rle_16bit.dcm', None), ('SC_rgb_rle_16bit_2frame.dcm', 1),
                                        ('SC_rgb_rle_32bit.dcm', None)])
def test_deep_rgb(name, frame):
    ds = read(name)
    x = ds.pixel_array if frame is None else ds.pixel_array[frame]
    assert np.array_equal(dicom_rgb(bundled(name), frame), x//2**(ds.BitsStored-8))

def test_palette():
    ds = read('examples_palette.dcm')
    luts = [np.frombuffer(ds[f'{c}PaletteColorLookupTableData'].value, '<u2') for c in ('Red', 'Green', 'Blue')]
    got = dicom_rgb(bundled('examples_palette.dcm'))
    assert ds.RedPaletteColorLookupTableDescriptor[1:]==[0, 16]
    assert np.array_equal(got, np.stack([o[ds.pixel_array]//256 for o in luts], -1)) and got.max()>128

def test_rgb_refused():
    assert 'FloatImageBlock(PILDicomFloat)' in refusal(dicom_rgb, bundled('CT_small.dcm'))
    assert 'holds 30 frames' in refusal(dicom_rgb, bundled('examples_ybr_color.dcm'))
    assert dicom_rgb((bundled('examples_ybr_color.dcm'), 29)).shape==(240, 320, 3)

# --- windows

@pytest.mark.parametrize('n', [1, 2, 3, 5])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.float64])
def test_windows(n, dtype):
    pairs = [dicom_windows.lungs, (350, 50), (80, 40), (2000, 300), (1, 0)][:n]
    x = torch.from_numpy(np.random.default_rng(0).uniform(-1100, 1900, (3, 1, 8, 9))).to(dtype) \
        .as_subclass(TensorImageBW)
    was,y = x.clone(),Windows(pairs)(x)
    lo = [l-w/2 for w,l in pairs]
    want = np.concatenate([((x.double().numpy()-a)/w).clip(0, 1) for a,(w,_) in zip(lo, pairs)], 1)
    assert type(y) is (TensorImageBW if n==1 else TensorImage) and y.dtype==dtype and y.shape==(3, n, 8, 9)
    atol = {torch.float16: 2e-3, torch.float32: 1e-5}.get(dtype, 1e-12)
    if n>=5 and dtype==torch.float16: atol *= 300
    np.testing.assert_allclose(y.double().numpy(), want, atol=atol)
    assert torch.equal(x, was)

def test_windows_act_on_inputs_only():
    w,x = Windows([(100, 0), (50, 0)]),TensorImageBW(torch.randn(2, 1, 4, 4))
    y,m = TensorImageBW(torch.randn(2, 1, 4, 4)),TensorMask(torch.ones(2, 4, 4))
    got = w((x, y, m))
    assert got[0].shape==(2, 2, 4, 4) and got[1] is y and got[2] is m and type(got) is tuple
    assert w((x,))[0].shape==(2, 2, 4, 4)
    plain = torch.randn(2, 3)
    assert w((plain, y))[0] is plain and w(m) is m

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_windows_on_a_gpu():
    x = TensorImageBW(torch.randn(2, 1, 8, 8)*1000)
    y = Windows([(1500, -600), (350, 50)])(x.cuda())
    assert y.is_cuda and torch.allclose(y.cpu(), Windows([(1500, -600), (350, 50)])(x))

@pytest.mark.parametrize('windows', [dicom_windows.lungs, [], (), None, 350, 'lungs', [350, 50], [(0, 50)],
                                     [(-600, 1500)], [(350,)], [(350, 50, 1)], [('350', 50)], [(350, float('nan'))],
                                     [(float('inf'), 0)], [(True, 0)], dicom_windows], ids=str)
def test_bad_windows(windows):
    for f in (Windows, *([] if windows is None else [partial(FloatImageBlock, PILFloat)])):
        assert '(width, level) pairs' in refusal(f, windows)

@pytest.mark.parametrize('x', [TensorImage(torch.rand(2, 3, 4, 4)), TensorImageBW(torch.rand(2, 2, 4, 4)),
                               TensorImageBW(torch.rand(4, 4))], ids=lambda o: str(tuple(o.shape)))
def test_windows_want_one_channel(x): assert str(tuple(x.shape)) in refusal(Windows([(350, 50)]), x)

# --- in a DataBlock

@pytest.fixture(scope='module')
def slices(tmp_path_factory):
    "24 CT slices with padding outside of a circle and no tag that says so; two classes"
    root,rng = tmp_path_factory.mktemp('slices'),np.random.default_rng(0)
    i,j = np.ogrid[:32, :32]
    for k in range(24):
        x = rng.normal(1000+20*k, 200, (32, 32)).round().clip(0, 3000).astype('i2')
        x[(i-15.5)**2+(j-15.5)**2>15**2] = -2000
        f = root/'ab'[k%2]/f'{k:02}.dcm'
        f.parent.mkdir(exist_ok=True)
        made(x, Modality='CT', RescaleSlope=1, RescaleIntercept=-1024).save_as(f)
    return root

def block(cls=PILDicomFloat, windows=None, y=CategoryBlock, **kwargs):
    kwargs = {'get_items': dicoms, 'get_y': parent_label, 'splitter': IndexSplitter(range(0, 24, 4)), **kwargs}
    return DataBlock((FloatImageBlock(cls, windows), y), **kwargs)

def reference(files): return np.stack([rescaled(pydicom.dcmread(f)) for f in files]).astype(np.float64)

@pytest.mark.parametrize('inside', [False, True])
def test_fit(slices, inside):
    mask = (lambda x: x[:, :1]>-1100) if inside else None
    c = block().fit_stats(slices, mask=mask, **fit).stats_choice
    x = reference([f for i,f in enumerate(dicoms(slices)) if i%4])
    kept = x[x>-1100] if inside else x
    assert c.measured.n_images==18 and c.measured.n_pixels==kept.size
    np.testing.assert_allclose([*c.stats.mean, *c.stats.std], [kept.mean(), kept.std()], rtol=1e-6)

@pytest.mark.slow
@pytest.mark.parametrize('windows', [None, [(350, 50)], [(1500, -600), (350, 50), (2000, 300)]],
                         ids=lambda o: f'{len(o or ())} windows')
def test_train_predict_export(slices, tmp_path, windows):
    tfms = aug_transforms(max_lighting=0. if windows is None else .2)
    db = block(windows=windows, item_tfms=Resize(24), batch_tfms=tfms).fit_stats(slices, model=xresnet18, **fit)
    dls = db.dataloaders(slices, **small)
    n = len(windows or (1,))
    x = dls.one_batch()[0]
    assert x.shape==(4, n, 24, 24) and x.dtype==torch.float32
    dls.show_batch(max_n=4)
    learn = vision_learner(dls, xresnet18, pretrained=False, n_in=n, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        files = dls.valid_ds.items
        want = learn.get_preds(dl=learn.dls.test_dl(files, num_workers=0))[0]
        assert torch.allclose(want, learn.get_preds(dl=dls.valid)[0], atol=1e-6)
        one = learn.predict(files[1])[2]
        learn.show_results(max_n=2)
        learn.export('learn.pkl')
    again = load_learner(tmp_path/'learn.pkl')
    with again.no_bar():
        assert torch.equal(want, again.get_preds(dl=again.dls.test_dl(files, num_workers=0))[0])
        for o in (files[1], Path(files[1]).read_bytes(),
                  dicom_pixels(files[1])): assert torch.allclose(one, again.predict(o)[2], atol=1e-5)

@pytest.mark.parametrize('windows', [None, [(350, 50), (80, 40)]], ids=str)
def test_second_fit_is_reused(slices, windows):
    one,_ = printed(block(windows=windows).fit_stats, slices, **fit)
    two,said = printed(block(windows=windows).fit_stats, slices, **fit)
    assert 'reused' in said and two.stats_choice.stats==one.stats_choice.stats
    other,said = printed(block(windows=[(350, 50), (80, 41)]).fit_stats, slices, **fit)
    assert 'reused' not in said and other.stats_choice.stats!=one.stats_choice.stats

def test_changed_file_is_measured_again(slices, tmp_path):
    root = shutil.copytree(slices, tmp_path/'slices')
    printed(block().fit_stats, root, **fit)
    ds = pydicom.dcmread(dicoms(root)[1])
    ds.RescaleIntercept = -2024
    ds.save_as(dicoms(root)[1])
    assert 'reused' not in printed(block().fit_stats, root, **fit)[1]

@pytest.mark.parametrize('plain', [False, True])
def test_items_of_file_and_frame(tmp_path, plain):
    "Named pairs go to `get_y` as they are; fastai applies functions to the parts of plain ones, yet those load too"
    f = Path(shutil.copy(bundled('rtdose.dcm'), tmp_path))
    items = [tuple(o) for o in dicom_frames(f)] if plain else dicom_frames([f])
    y = dict(blocks=FloatImageBlock(PILDicomFloat),
             n_inp=1) if plain else dict(blocks=(FloatImageBlock(PILDicomFloat), CategoryBlock),
                                         get_y=lambda o: o.frame%2)
    db,said = printed(DataBlock(splitter=IndexSplitter(range(0, 15, 5)), **y).fit_stats, items, **fit)
    want = read('rtdose.dcm').pixel_array.astype(np.float64)
    train = want[[i for i in range(15) if i%5]]
    np.testing.assert_allclose([*db.stats_choice.stats.mean, *db.stats_choice.stats.std], [train.mean(), train.std()],
                               rtol=1e-6)
    assert 'this measurement will not be kept (its items are neither files nor arrays' in said
    assert 'reused' not in printed(db.fit_stats, items, **fit)[1]
    dls = db.dataloaders(items, **small)
    got = dls.test_dl(items[3:7], num_workers=0).one_batch()[0]
    np.testing.assert_allclose(got.numpy()[:, 0]*train.std()+train.mean(), want[3:7], rtol=1e-5)

def test_pairs_from_a_table(tmp_path):
    import pandas as pd
    df = pd.DataFrame(dict(file=bundled('rtdose.dcm'), frame=range(15)))
    db = DataBlock((FloatImageBlock(PILDicomFloat), CategoryBlock), get_x=lambda r: (r['file'], r['frame']),
                   get_y=lambda r: r['frame']%2, splitter=IndexSplitter(range(5)))
    x = db.dataloaders(df, **small).valid.one_batch()[0]
    assert np.array_equal(x.numpy()[:, 0], read('rtdose.dcm').pixel_array[:4])

def test_masks_do_not_divide(slices):
    "`MaskBlock` brings `IntToFloatTensor`, before or after the images' block"
    def body(f): return (dicom_pixels(f)>0).astype(np.uint8)
    for windows in (None, [(350, 50)], [(350, 50), (80, 40), (1500, -600)]):
        db = block(windows=windows, y=MaskBlock(['air', 'body']), get_y=body, batch_tfms=aug_transforms(max_lighting=0))
        x,y = db.dataloaders(slices, **small).valid.one_batch()
        ref = reference(dicoms(slices)[::4][:4])[:, None]
        want = ref if windows is None else np.concatenate([((ref-(l-w/2))/w).clip(0, 1) for w,l in windows], 1)
        # augmented validation images are sampled at their own places
        np.testing.assert_allclose(x.numpy(), want, atol=.05)
        assert np.array_equal(y.numpy(), ref[:, 0]>0)
        db.dataloaders(slices, **small).show_batch(max_n=2) if windows is None or len(windows)!=2 else None

def test_image_targets_and_two_inputs(slices):
    "Each input is windowed as its block says, a target is not"
    db = DataBlock((FloatImageBlock(PILDicomFloat, [(350, 50)]), FloatImageBlock(PILDicomFloat),
                    FloatImageBlock(PILDicomFloat)), n_inp=2, get_items=dicoms, splitter=IndexSplitter(range(4)))
    a,b,y = db.dataloaders(slices, **small).valid.one_batch()
    ref = reference(dicoms(slices)[:4])[:, None]
    want = ((ref-(50-350/2))/350).clip(0, 1)
    for got,o in ((a, want), (b, ref), (y, ref)): np.testing.assert_allclose(got.numpy(), o, atol=1e-5)

def test_photographs_beside_are_divided(slices):
    def photo(f): return np.full((8, 8, 3), 255, np.uint8)
    db = DataBlock((FloatImageBlock(PILDicomFloat), ImageBlock, CategoryBlock), n_inp=2, get_items=dicoms,
                   getters=[lambda o: o, photo, parent_label], splitter=IndexSplitter(range(4)))
    x,p,_ = db.dataloaders(slices, **small).valid.one_batch()
    assert x.min()==-3024 and (p==1).all()

def test_lighting_destroys_hu_and_windows_do_not(slices):
    tfms = aug_transforms(p_lighting=1., p_affine=0.)
    x = block(batch_tfms=tfms).dataloaders(slices, **small).train.one_batch()[0]
    assert x.min()>=0 and x.max()<=1 and ((x<1e-3) | (x>1-1e-3)).float().mean()>.99
    y = block(windows=[(2000, 0)], batch_tfms=tfms).dataloaders(slices, **small).train.one_batch()[0]
    assert ((y>.01) & (y<.99)).float().mean()>.5

def test_colour_block(tmp_path):
    for i in range(8): shutil.copy(bundled('examples_rgb_color.dcm' if i%2 else 'examples_palette.dcm'),
                                   tmp_path/f'{"ab"[i%2]}{i}.dcm')
    rgb = TransformBlock(type_tfms=[dicom_rgb, PILImage.create], batch_tfms=IntToFloatTensor)
    db = DataBlock((rgb, CategoryBlock), get_items=dicoms, get_y=first_letter, splitter=IndexSplitter([0, 1]),
                   item_tfms=Resize(32)).fit_stats(tmp_path, **fit)
    dls = db.dataloaders(tmp_path, **small)
    learn = vision_learner(dls, xresnet18, pretrained=False, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn.export('learn.pkl')
    again = load_learner(tmp_path/'learn.pkl')
    with again.no_bar(): assert torch.allclose(learn.predict(dicoms(tmp_path)[0])[2],
                                               again.predict(dicoms(tmp_path)[0])[2])
    assert 'reused' in printed(DataBlock((rgb, CategoryBlock), get_items=dicoms, get_y=first_letter,
                                         splitter=IndexSplitter([0, 1]), item_tfms=Resize(32)).fit_stats, tmp_path,
                                         **fit)[1]

def first_letter(f): return f.name[0]

def test_16_bit_png(tmp_path):
    "A fit of 16-bit files: no guard speaks of clipping, and the numbers are those of the files"
    rng = np.random.default_rng(0)
    x = rng.integers(0, 4096, (12, 16, 16), dtype=np.uint16)
    for i,o in enumerate(x): Image.fromarray(o).save(tmp_path/f'{"ab"[i%2]}{i:02}.png')
    kept = [*range(1, 12, 2), *range(4, 12, 2)]  # without a00 and a02
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        db = DataBlock((FloatImageBlock(), CategoryBlock), get_items=lambda p: get_image_files(p).sorted(),
                       get_y=first_letter, splitter=IndexSplitter([0, 1])).fit_stats(tmp_path, **fit)
    np.testing.assert_allclose([*db.stats_choice.stats.mean, *db.stats_choice.stats.std],
                               [x[kept].mean(), x[kept].std()], rtol=1e-6)

def test_a_fit_names_the_file(slices, tmp_path):
    root = shutil.copytree(slices, tmp_path/'slices')
    bad = dicoms(root)[5]
    bad.write_bytes(bad.read_bytes()[:-1000])
    assert str(bad) in refusal(block().fit_stats, root, exc=OSError, **fit)

def test_workers(slices):
    "Items and tensors survive the way from a worker process"
    x = block(windows=[(350, 50), (80, 40)]).dataloaders(slices, bs=4, num_workers=1).valid.one_batch()[0]
    assert x.shape==(4, 2, 32, 32)

# --- real data

def real_block(**kwargs): return DataBlock((FloatImageBlock(PILDicomFloat), CategoryBlock), get_items=dicoms,
                                           get_y=parent_label, splitter=IndexSplitter([]), **kwargs)

@pytest.mark.realdata
@ct_data
@pytest.mark.parametrize('inside', [False, True])
def test_real_ct(inside):
    "All 11 originals of two manufacturers: HU, with and without the padding outside of the scanner's circle"
    files = dicoms(CT/'dcm')
    mask = (lambda x: x[:, :1]>-1100) if inside else None
    db = real_block().fit_stats(CT/'dcm', mask=mask, **fit)
    found = [pydicom.dcmread(f) for f in files]
    x = np.stack([o.pixel_array.astype(np.float64)*float(o.RescaleSlope)+float(o.RescaleIntercept) for o in found])
    kept = [o[o>-1100] if inside else o for o in x]
    m = db.stats_choice.measured
    assert m.n_images==len(files)==11 and x.min()<-2000
    want = np.concatenate([o.ravel() for o in kept])
    assert m.n_pixels==want.size
    np.testing.assert_allclose([m.mean.item(), m.std.item(), m.image_std.item()],
                               [want.mean(), want.std(), np.mean([o.std() for o in kept])], rtol=1e-5)
    np.testing.assert_allclose([m.min.item(), m.max.item()], [want.min(), want.max()], rtol=1e-6)
    for f,o in zip(files, x): assert np.array_equal(values(f, PILDicomFloat), o.astype(np.float32))

@pytest.mark.realdata
@misc_data
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ['693_UNCI', 'JPEG2000_UNC', 'JPGLosslessP14SV1_1s_1f_8b',
                                  'MR-SIEMENS-DICOM-WithOverlays', 'MR2_J2KI', 'RG3_J2KR', 'US1_UNCI', 'emri_small',
                                  'rsna_cxr_MONOCHROME2', 'rsna_cxr_fake_MONOCHROME1'])
def test_real_dicom(name):
    f = MISC/f'{name}.dcm'
    ds = pydicom.dcmread(f)
    try: x = ds.pixel_array.astype(np.float64)
    except RuntimeError:
        said = refusal(PILDicomFloat.create, f)
        assert str(f) in said and ds.file_meta.TransferSyntaxUID.name in said and '`pip install python-gdcm`' in said
        return
    if ds.SamplesPerPixel==3:
        said = refusal(PILDicomFloat.create, f)
        assert str(f) in said and 'dicom_rgb' in said and np.array_equal(dicom_rgb(f), x)
        return
    if ds.PhotometricInterpretation=='MONOCHROME1': x = 2**ds.BitsStored-1-x
    x = (x*float(ds.get('RescaleSlope', 1))+float(ds.get('RescaleIntercept', 0))).astype(np.float32)
    if x.ndim==3:
        said = refusal(PILDicomFloat.create, f)
        assert str(f) in said and f'{len(x)} frames' in said and 'dicom_frames' in said
        assert np.array_equal([values(o, PILDicomFloat) for o in dicom_frames(f)], x)
    else: assert np.array_equal(values(f, PILDicomFloat), x) and dicom_frames(f)==[f]

@pytest.mark.realdata
@misc_data
def test_real_monochrome1():
    "The same X-ray with the other tag: one is the other turned round"
    a,b = (dicom_pixels(MISC/f'rsna_cxr_{o}.dcm') for o in ('MONOCHROME2', 'fake_MONOCHROME1'))
    assert np.array_equal(a, 255-b) and np.array_equal(a, dicom_pixels(MISC/'rsna_cxr_fake_MONOCHROME1.dcm',
        invert=False))

def to_hu(im): return PILFloat.create(np.asarray(im)-1024)

@pytest.mark.slow
@pytest.mark.realdata
@ct_data
def test_real_png16():
    "No value clipped; the statistics of HU = value - 1024 are those of the files and of the README beside them"
    files = get_image_files(CT/'png16').sorted()
    x = np.stack([np.asarray(Image.open(f)).astype(np.float64) for f in files])
    for f,o in zip(files, x): assert np.array_equal(values(f), o)
    assert x.max()>255 and len(files)==100
    b = TransformBlock(type_tfms=[PILFloat.create, to_hu])
    def fitted(**kwargs):
        db = DataBlock((b, CategoryBlock), get_items=lambda p: get_image_files(p).sorted(), get_y=parent_label,
                       splitter=IndexSplitter([]), **kwargs)
        return db.fit_stats(CT/'png16', **fit)
    m = fitted(item_tfms=Resize(224)).stats_choice.measured
    np.testing.assert_allclose([m.mean.item(), m.std.item(), m.image_std.item()], [-569.67, 477.26, 462.29], atol=.01)
    db = fitted()
    m = db.stats_choice.measured
    np.testing.assert_allclose([m.mean.item(), m.std.item(), m.image_std.item()],
                               [(x-1024).mean(), x.std(), x.std((1, 2)).mean()], rtol=1e-6)
    assert (np.array(PILImageBW.create(files[0]))==255).mean()>.25  # what fastai's own class leaves of it

def two_inputs(a, b, **kwargs):
    rng = np.random.default_rng(0)
    xs = rng.uniform(-1000, 1000, (8, 16, 16)).astype(np.float32)
    return DataBlock((a, b), get_items=lambda _: list(range(8)), splitter=lambda o: (o[:6], o[6:]), **kwargs),xs

def test_each_input_has_its_own_windows():
    "fastai keeps one batch transform of a class for all blocks; each input is windowed as its block says"
    lungs,soft = (1500, -600), (350, 50)
    def seen(x, w): return ((x-(w[1]-w[0]/2))/w[0]).clip(0, 1)
    for w1,w2 in ((lungs, soft), (lungs, None), (None, soft)):
        db,xs = two_inputs(*(FloatImageBlock(PILFloat, windows=w and [w]) for w in (w1, w2)), n_inp=2)
        db.getters = [ItemGetterOf(xs), ItemGetterOf(xs)]
        b = db.dataloaders(0, bs=2, num_workers=0, verbose=False).valid.one_batch()
        for got,w in zip(b, (w1, w2)):
            want = xs[6:,None].astype(np.float64)
            np.testing.assert_allclose(got.numpy(), seen(want, w) if w else want, atol=1e-4)

def test_windows_of_a_target_are_refused():
    db,xs = two_inputs(FloatImageBlock(), FloatImageBlock(windows=[(350, 50)]), n_inp=1)
    db.getters = [ItemGetterOf(xs), ItemGetterOf(xs)]
    with pytest.raises(ValueError, match='`windows` of a block for a target'): db.dataloaders(0, bs=2, num_workers=0)

class ItemGetterOf:
    "The i-th of some arrays"
    def __init__(self, xs): self.xs = xs
    def __call__(self, i): return self.xs[i]

@pytest.mark.parametrize('cls', [[(1500, -600)], PILImage, 'PILFloat', None], ids=str)
def test_block_of_another_class(cls):
    with pytest.raises(TypeError, match='`cls` must be `PILFloat`'): FloatImageBlock(cls)

def normstats(*args):
    "Exit status and what the command prints"
    from fastai_normstats.cli import main
    with redirect_stdout(io.StringIO()) as out: status = main([*map(str, args)])
    return status,out.getvalue()

def test_command_reads_values_as_they_are(slices, tmp_path, monkeypatch):
    "DICOM and 16-bit folders on the command line: in HU, not clipped; of a mixed folder it says so"
    monkeypatch.setattr('fastai_normstats.cli._workers', lambda: 0)
    status,out = normstats('fit', slices, '--valid-pct', 0, '--size', reference(dicoms(slices)).shape[-1],
                           '--no-cache', '--scheme', 'clip-zscore', '--out', tmp_path/'s.json')
    assert status==0 and 'DICOM, in the units of the files' in out
    m,want = StatsChoice.load(tmp_path/'s.json').measured,reference(dicoms(slices))
    np.testing.assert_allclose([m.min.item(), m.max.item()], [want.min(), want.max()])
    np.testing.assert_allclose([m.mean.item(), m.std.item()], [want.mean(), want.std()], rtol=1e-4)
    status,out = normstats('check', tmp_path/'s.json', slices)
    assert status==0 and 'they fit' in out
    deep = tmp_path/'deep'
    deep.mkdir()
    for i in range(6):
        Image.fromarray(np.random.default_rng(i).integers(0, 3000, (32, 32), dtype=np.uint16)).save(deep/f'{i}.png')
    status,out = normstats('fit', deep, '--valid-pct', 0, '--size', 32, '--no-cache')
    assert status==0 and 'more than 8 bits' in out and 'clipped' not in out and '3 channels' not in out
    shutil.copy(dicoms(slices)[0], deep/'x.dcm')
    assert normstats('fit', deep)[0]==1

def test_module_can_be_run():
    res = subprocess.run([sys.executable, '-m', 'fastai_normstats.cli', '--version'], capture_output=True, text=True)
    assert res.returncode==0 and 'normstats' in res.stdout

@pytest.mark.slow
@pytest.mark.parametrize('reader', ['pydicom', 'tifffile'])
def test_measured_again_where_a_reader_gives_other_pixels(slices, tmp_path, monkeypatch, reader):
    """As one that was updated may: told by the pixels, whatever its version says; one that gives the same ones
    changes nothing"""
    root,kwargs,library,name = slices,{},pydicom.pixels,'pixel_array'
    if reader=='tifffile':
        root,kwargs,library,name = tmp_path/'tiffs',dict(cls=PILFloat, get_items=get_image_files,
            y=CategoryBlock),tifffile,'imread'
        for k in range(24):
            (root/'ab'[k%2]).mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(root/'ab'[k%2]/f'{k:02}.tif',
                             # which Pillow misreads
                             np.random.default_rng(k).integers(0, 2**32, (32, 32), dtype=np.uint32))
    def said(): return printed(block(**kwargs).fit_stats, root, stats='custom', cache=tmp_path/'cache', **small)[1]
    assert 'reused' not in said() and 'reused' in said()
    read,factor = getattr(library, name),[1]
    monkeypatch.setattr(library, name, lambda *args, **kw: read(*args, **kw)//factor[0])
    assert 'reused' in said()
    factor[0] = 2
    assert 'reused' not in said() and 'reused' in said()
