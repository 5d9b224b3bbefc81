"DatasetStats is a Normalize: what fastai expects of the one holds for both, so every check here runs on both classes"
import copy, pickle
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.callback.progress import *
from fastai.data.all import (Categorize, CategoryBlock, DataBlock, DataLoaders, Datasets, IndexSplitter,
                             IntToFloatTensor, L, Normalize,
                             TfmdDL, ToTensor, Transform, get_image_files, parent_label)
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorCategory, TensorImage, TensorImageBW, TensorMask, set_seed
from fastai.vision.augment import Brightness, Contrast, RandomErasing, Rotate, aug_transforms
from fastai.vision.core import PILImage, PILImageBW, TensorBBox, TensorPoint, imagenet_stats
from fastai.vision.data import ImageBlock, ImageDataLoaders, MaskBlock
from fastai.vision.learner import _add_norm, _timm_norm, model_meta, unet_learner, vision_learner
from fasttransform import Pipeline
from helpers import image_folder
from PIL import Image
from torch import nn
from torchvision.models import resnet18

from fastai_normstats.transform import DatasetStats

both = pytest.mark.parametrize('cls', [Normalize, DatasetStats], ids=lambda c: c.__name__)
quiet = partial(DatasetStats, stats='custom', verbose=False)  # the numbers of the data, as Normalize takes them
cpu = dict(bs=4, num_workers=0, device=torch.device('cpu'))
mean3,std3 = (.2, .5, .7),(.1, .3, .25)

def fresh(cls, **kwargs): return (quiet if cls is DatasetStats else cls)(**kwargs)
def given(cls, mean=mean3, std=std3, **kwargs): return cls.from_stats(mean, std, cuda=False, **kwargs)

@pytest.fixture
def folder(tmp_path): return image_folder(tmp_path/'images')

def sorted_files(path): return get_image_files(path).sorted()

def block(*batch_tfms, blocks=(ImageBlock, CategoryBlock), get_y=parent_label, **kwargs):
    "Every fourth of 24 files is for validation"
    return DataBlock(blocks, get_items=sorted_files, get_y=get_y, splitter=IndexSplitter(range(0, 24, 4)),
                     batch_tfms=L(batch_tfms), **kwargs)

def stats_of(dl):
    res = [f for f in dl.after_batch.fs if isinstance(f, Normalize)]
    assert len(res)==1
    return res[0]

def pixels(files): return np.stack([np.asarray(Image.open(f)) for f in files]).transpose(0, 3, 1, 2)

def batch(*shape, seed=0, kind=TensorImage):
    return kind(torch.rand(*shape, generator=torch.Generator().manual_seed(seed)))

def close(got, want, rtol=1e-6, atol=1e-6):
    got,want = (np.asarray(o.detach().cpu() if torch.is_tensor(o) else o, dtype=np.float64) for o in (got, want))
    assert got.shape==want.shape
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)

def vec(v, ndim=4, dim=1): return np.array(v, dtype=np.float64).reshape([-1 if i==dim else 1 for i in range(ndim)])

# --- values

@both
@pytest.mark.parametrize('shape,kwargs', [
    ((5, 3, 7, 6),    {}),
    ((5, 3, 4, 7, 6), dict(ndim=5)),
    ((5, 3, 9),       dict(ndim=3)),
    ((3, 7, 6),       dict(ndim=3, dim=0)),
    ((5, 3, 7, 6),    dict(ndim=3, dim=0)),
    ((5, 7, 6, 3),    dict(dim=3))],
    ids=['images', 'volumes', 'signals', 'one image', 'no batch axis', 'channels last'])
def test_values(cls, shape, kwargs):
    "(x - mean)/std, and back"
    x,tfm = batch(*shape),given(cls, **kwargs)
    mean,std = (vec(v, kwargs.get('ndim', 4), kwargs.get('dim', 1)) for v in (mean3, std3))
    y = tfm(x)
    close(y, (x.double().numpy()-mean)/std, atol=2e-6)
    close(tfm.decode(x), x.double().numpy()*std+mean)
    close(tfm.decode(y), x)

@both
@pytest.mark.parametrize('mean,std,shape', [
    (.3, .2, (5, 3, 7, 6)),
    ([.3], [.2], (5, 3, 7, 6)),
    ([.3]*5, [.2]*5, (2, 5, 7, 6))], ids=['number', 'one', 'five'])
def test_number_of_statistics(cls, mean, std, shape):
    x = batch(*shape)
    close(given(cls, mean, std)(x), (x.double().numpy()-.3)/.2, atol=2e-6)

@both
def test_statistics_per_pixel(cls):
    "A mean image, as Normalize takes whatever broadcasts over a batch"
    x,mean,std = batch(5, 3, 7, 6),batch(1, 3, 7, 6, seed=1, kind=torch.Tensor), \
        batch(1, 3, 7, 6, seed=2, kind=torch.Tensor)+.1
    close(cls(mean, std)(x), (x.double().numpy()-mean.double().numpy())/std.double().numpy(), atol=1e-5)

@both
def test_input_is_left_as_it_is(cls):
    x = batch(2, 3, 5, 5)
    was,tfm = x.clone(),given(cls)
    y = tfm(x)
    now = y.clone()
    tfm.decode(y)
    assert torch.equal(x, was) and torch.equal(y, now)

@both
def test_gradients_pass(cls):
    x = batch(2, 3, 5, 5).requires_grad_()
    given(cls)(x).sum().backward()
    close(x.grad, np.broadcast_to(1/vec(std3), x.shape), rtol=1e-5)

dtypes = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64]

@pytest.mark.parametrize('dtype', dtypes, ids=str)
@pytest.mark.parametrize('stats_dtype', [torch.float32, torch.float64, torch.float16], ids=str)
def test_dtypes_are_those_of_normalize(dtype, stats_dtype):
    x = TensorImage((batch(2, 3, 5, 5)*(1 if dtype.is_floating_point else 255)).to(dtype))
    stats = [torch.tensor(v, dtype=stats_dtype).view(1, 3, 1, 1) for v in (mean3, std3)]
    for nm in ('__call__', 'decode'):
        want,got = (getattr(cls(*stats), nm)(x) for cls in (Normalize, DatasetStats))
        assert got.dtype==want.dtype and type(got) is type(want) is TensorImage
        close(got.double(), want.double())

changes = dict(in_place=lambda o: o.mul_(2), data=lambda o: o.data.mul_(2), item=lambda o: o.__setitem__((0, 1), 3.),
               numpy=lambda o: np.multiply(o.numpy(), 2, out=o.numpy()), squeezed=lambda o: o.squeeze_(0))

@pytest.mark.parametrize('attr', ['mean', 'std'])
@pytest.mark.parametrize('change', changes)
def test_numbers_that_are_changed_after_a_batch(change, attr):
    x,n,d = TensorImage(batch(4, 3, 9, 9)),given(Normalize),given(DatasetStats)
    close(d(x), n(x))
    for o in (n, d): changes[change](getattr(o, attr))
    close(d(x), n(x)), close(d.decode(d(x)), n.decode(n(x)))
    for o in (n, d): setattr(o, attr, getattr(o, attr)*1.5)
    close(d(x), n(x))

@pytest.mark.parametrize('first', [torch.inference_mode, torch.no_grad])
def test_gradients_after_a_first_batch_without(first):
    "Predict, then ask what mattered"
    x,d = batch(2, 3, 5, 5),given(DatasetStats)
    with first(): d.encodes(TensorImage(x))
    leaf = x.clone().requires_grad_()
    d.encodes(TensorImage(leaf)).sum().backward()
    close(leaf.grad, (1/torch.tensor(std3)).view(3, 1, 1).expand(2, 3, 5, 5))

def test_numbers_that_are_trained():
    x,d,n = TensorImage(batch(2, 3, 5, 5)),given(DatasetStats),given(Normalize)
    with torch.no_grad(): d(x)
    for o in (n, d): o.mean.requires_grad_(), o.std.requires_grad_()
    for _ in range(2):
        for o in (n, d): o.encodes(x).square().sum().backward()
    close(d.mean.grad, n.mean.grad, 1e-4), close(d.std.grad, n.std.grad, 1e-4)

def test_large_mean_against_std():
    """Hounsfield units of one tissue, 12-bit values: adding a shift would lose digits, so the formula stays to the
    letter"""
    x,stats = TensorImage(batch(2, 1, 9, 9)*50-1000),([-1000.], [20.])
    assert torch.equal(given(DatasetStats, *stats)(x), given(Normalize, *stats)(x))

@pytest.mark.parametrize('mean,std', [(.5, .25), ([.5], [.25])])
def test_one_number_for_all_channels(mean, std):
    x = TensorImage(batch(2, 3, 5, 5))
    close(DatasetStats(mean, std)(x), (x-.5)/.25)

# --- types

class TensorScan(TensorImage): "Such as fastai's TensorDicom and TensorCTScan"

@both
@pytest.mark.parametrize('kind,c', [(TensorImage, 3), (TensorImageBW, 1), (TensorScan, 1)])
def test_image_types_are_kept(cls, kind, c):
    x,tfm = batch(2, c, 5, 5, kind=kind),given(cls, mean3[:c], std3[:c])
    y = tfm(x)
    assert type(y) is type(tfm.decode(y)) is kind
    close(y, (x.double().numpy()-vec(mean3[:c]))/vec(std3[:c]), atol=2e-6)

others = [TensorMask(torch.ones(2, 5, 5)), torch.ones(2, 3, 5, 5), TensorCategory(1), TensorPoint(torch.ones(2, 1, 2)),
          TensorBBox(torch.ones(2, 1, 4)), np.ones((2, 3, 5, 5)), 3., 'a', None]

@both
@pytest.mark.parametrize('o', others, ids=lambda o: type(o).__name__)
def test_anything_else_is_untouched(cls, o):
    tfm = given(cls)
    assert tfm(o) is o and tfm.decode(o) is o

@both
def test_tuples(cls):
    "Every image of a batch, targets too; the rest of it as it was"
    x,y,mask,cat = batch(2, 3, 5, 5),batch(2, 3, 5, 5, seed=1),TensorMask(torch.ones(2, 5, 5)),TensorCategory([0, 1])
    tfm = given(cls)
    res = tfm((x, (mask, y), cat))
    assert type(res) is tuple and type(res[1]) is tuple and res[1][0] is mask and res[2] is cat
    for got,o in ((res[0], x), (res[1][1], y)): close(got, (o.double().numpy()-vec(mean3))/vec(std3), atol=2e-6)
    back = tfm.decode(res)
    close(back[0], x), close(back[1][1], y)

@both
@pytest.mark.parametrize('split_idx', [None, 0, 1])
def test_all_splits(cls, split_idx): close(given(cls)(batch(2, 3, 5, 5), split_idx=split_idx),
                                           given(cls)(batch(2, 3, 5, 5)), atol=0)

# --- fitting

@both
def test_fit_on_a_loader_of_one_batch(cls):
    "fastai's own check of a fit: what comes out has mean 0 and std 1"
    items = [(TensorImage(batch(3, 20, 20, seed=i)*.4+.1*i), TensorCategory(i%2)) for i in range(6)]
    tfm = fresh(cls)
    dl = TfmdDL(items, bs=6, num_workers=0, after_batch=[tfm])
    x,y = dl.one_batch()
    assert type(x) is TensorImage and y.tolist()==[0, 1]*3 and x.dtype==torch.float32
    close(x.mean((0, 2, 3)), [0]*3, atol=1e-4), close(x.std((0, 2, 3)), [1]*3, rtol=1e-3)
    ref = torch.stack([i[0] for i in items]).double().numpy()
    for f in (tfm, stats_of(dl)):
        assert f.mean.shape==f.std.shape==(1, 3, 1, 1)
        close(f.mean.flatten(), ref.mean((0, 2, 3)), rtol=1e-5), close(f.std.flatten(), ref.std((0, 2, 3)), rtol=1e-3)

@both
@pytest.mark.parametrize('kind,shape,axes', [
    (TensorImage,   (2, 4, 6, 5), (0, 2, 3, 4)),
    (TensorImageBW, (1, 6, 5),    (0, 2, 3)),
    (TensorScan,    (2, 9),       (0, 2))], ids=['volumes', 'one channel', 'signals'])
def test_fit_on_other_shapes(cls, kind, shape, axes):
    items = [(kind(batch(*shape, seed=i)*.5),) for i in range(6)]
    dl = TfmdDL(items, bs=6, num_workers=0, after_batch=[fresh(cls, axes=axes)])
    x, = dl.one_batch()
    assert type(x) is kind and x.shape==(6, *shape)
    close(x.mean(axes), [0]*shape[0], atol=1e-4), close(x.std(axes, correction=0), [1]*shape[0], rtol=1e-2)
    close(dl.decode((x,))[0], torch.stack([i[0] for i in items]))

@both
def test_set_up_by_hand(cls):
    "The transform alone is fitted to a loader, and then used anywhere"
    items = [(TensorImage(batch(3, 9, 9, seed=i)),) for i in range(6)]
    dl,tfm = TfmdDL(items, bs=6, num_workers=0),fresh(cls)
    tfm.setup(dl)
    x = tfm(dl.one_batch()[0])
    close(x.mean((0, 2, 3)), [0]*3, atol=1e-4), close(x.std((0, 2, 3)), [1]*3, rtol=1e-2)

@both
def test_given_statistics_are_not_fitted(cls, folder):
    tfm = given(cls)
    for dl in block(tfm).dataloaders(folder, **cpu).loaders:
        close(stats_of(dl).mean, vec(mean3)), close(stats_of(dl).std, vec(std3))

@both
@pytest.mark.parametrize('kind', ['class', 'instance', 'bare class', 'bare instance'])
@pytest.mark.parametrize('maker', ['DataBlock', 'DataBlock.new', 'TransformBlock', 'Datasets', 'ImageDataLoaders'])
def test_every_way_in(cls, folder, kind, maker, monkeypatch):
    "Transforms are given as instances or classes, alone or in a list, in all of fastai's ways"
    tfm = partial(fresh, cls)() if 'instance' in kind else cls
    if cls is DatasetStats and tfm is cls: monkeypatch.setitem(cls.__init__.__kwdefaults__, 'verbose', False)
    tfms = tfm if 'bare' in kind else [tfm]
    if 'class' in kind and maker=='Datasets': pytest.skip('fastai makes an instance per loader, and fits the first '
        'only')
    if maker=='DataBlock':
        db  = DataBlock((ImageBlock, CategoryBlock), get_items=sorted_files, get_y=parent_label, batch_tfms=tfms)
        dls = db.dataloaders(folder, **cpu)
    if maker=='DataBlock.new': dls = block().new(batch_tfms=tfms).dataloaders(folder, **cpu)
    if maker=='TransformBlock':
        b = ImageBlock()
        b.batch_tfms = b.batch_tfms + L(tfms)
        dls = block(blocks=(b, CategoryBlock)).dataloaders(folder, **cpu)
    if maker=='Datasets':
        dls = block().datasets(folder).dataloaders(after_item=ToTensor, after_batch=[IntToFloatTensor, *L(tfms)], **cpu)
    if maker=='ImageDataLoaders': dls = ImageDataLoaders.from_folder(folder, valid_pct=.25, seed=0, batch_tfms=tfms,
        **cpu)
    for dl in dls.loaders: assert type(stats_of(dl)) is cls and stats_of(dl).mean.shape==(1, 3, 1, 1)
    assert dls.valid.one_batch()[0].shape==(4, 3, 16, 16)

def as_list(tl): return [tl[i] for i in range(len(tl))]

@both
@pytest.mark.parametrize('kind', ['lists', 'subsets', 'Datasets'])
@pytest.mark.parametrize('kwargs', [{}, dict(shuffle=False), dict(shuffle=True, drop_last=False), dict(device='cpu')],
                         ids=str)
def test_from_dsets(cls, folder, kind, kwargs):
    "The first dataset is the one to train on, shuffled or not: the others get its statistics"
    ds = block().datasets(folder)
    if kind=='lists':    dsets = [as_list(ds.train), as_list(ds.valid)]
    if kind=='subsets':  dsets = [ds.train, ds.valid]
    if kind=='Datasets': dsets = [Datasets(s.items, [PILImage.create, [parent_label, Categorize()]])
                                  for s in (ds.train, ds.valid)]
    set_seed(0)
    def loaders(): return DataLoaders.from_dsets(*dsets, bs=18, num_workers=0, after_item=ToTensor,
                                                 after_batch=[IntToFloatTensor, fresh(cls)], **kwargs)
    if cls is DatasetStats and kind!='subsets' and kwargs.get('shuffle') and not kwargs.get('drop_last', True):
        with pytest.warns(UserWarning, match='nothing tells this loader from a training loader'): loaders()
        return  # another fold, or a validation set? it is taken for the one and says so
    dls = loaders()
    x = pixels(ds.train.items)/255
    for dl in dls.loaders:
        close(stats_of(dl).mean.flatten(), x.mean((0, 2, 3)), rtol=1e-5), close(stats_of(dl).std.flatten(),
            x.std((0, 2, 3)), rtol=1e-3)

@both
def test_without_a_validation_split(cls, folder):
    db  = DataBlock((ImageBlock, CategoryBlock), get_items=sorted_files, get_y=parent_label,
                    splitter=IndexSplitter([]), batch_tfms=fresh(cls))
    dls = db.dataloaders(folder, **cpu)
    assert len(dls.valid_ds)==0 and stats_of(dls.valid).mean is not None

# --- in a pipeline

def test_is_a_normalize():
    assert issubclass(DatasetStats, Normalize) and DatasetStats.order==Normalize.order==99
    assert list(DatasetStats.parameters)==list(Normalize.parameters)==['mean', 'std']
    t = DatasetStats.from_stats(*imagenet_stats)
    assert isinstance(t, Normalize) and t.axes==Normalize().axes

@both
def test_place_in_a_pipeline(cls):
    "After augmentation, before RandomErasing, whatever the order in the list"
    tfms = [RandomErasing(), given(cls), *aug_transforms(), Contrast(), Rotate(), Brightness(), IntToFloatTensor()]
    names = [type(f).__name__ for f in Pipeline(tfms).fs]
    assert names[0]=='IntToFloatTensor' and names[-2:]==[cls.__name__, 'RandomErasing']
    assert type(Pipeline([given(cls), Transform(lambda x: x)]).fs[-1]) is cls

@both
def test_access_by_name(cls, folder):
    name = {Normalize: 'normalize', DatasetStats: 'dataset_stats'}[cls]
    dls = block(fresh(cls)).dataloaders(folder, **cpu)
    for dl in (*dls.loaders, dls.test_dl(sorted_files(folder)[:3]), dls.train.new(), dls.new_empty().train):
        tfm = getattr(dl.after_batch, name)
        assert tfm is stats_of(dl) and torch.equal(dl.after_batch.mean, tfm.mean)
        assert torch.equal(dl.after_batch.std, tfm.std)

@both
def test_pipeline_decodes(cls):
    x,pipe = batch(2, 3, 5, 5),Pipeline([IntToFloatTensor(), given(cls)])
    img = TensorImage((x*255).to(torch.uint8))
    assert (pipe.decode(pipe(img)).int()-img.int()).abs().max()<=1  # fastai rounds down

@both
def test_repr_shows_the_numbers(cls):
    "In a notebook, the pipeline says what it normalises with"
    assert '0.485' in repr(Pipeline([given(cls, *imagenet_stats)])) and cls.__name__ in repr(Pipeline([fresh(cls)]))

# --- devices

@both
@pytest.mark.parametrize('device', ['meta', 'cpu', torch.device('meta')], ids=str)
def test_moves_with_its_loaders(cls, folder, device):
    "fastai moves what is named in `parameters`; `meta` stands for a second device where there is no GPU"
    def devices(dls): return {getattr(stats_of(dl), k).device for dl in dls.loaders for k in ('mean', 'std')}
    dls = block(fresh(cls)).dataloaders(folder, **cpu)
    assert devices(dls)=={torch.device('cpu')}
    assert devices(dls.to(device))=={torch.device(device)}
    dls.valid.to('meta')
    assert stats_of(dls.valid).mean.device.type=='meta'

@both
def test_loader_without_a_device(cls):
    items = [(TensorImage(batch(3, 5, 5, seed=i)),) for i in range(6)]
    dl = TfmdDL(items, bs=3, num_workers=0, after_batch=[fresh(cls)])
    assert dl.device is None and dl.one_batch()[0].device.type==stats_of(dl).mean.device.type=='cpu'

@both
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_gpu(cls, folder, tmp_path):
    "Fitted on the GPU, moved there and back, decoded on the CPU, exported and loaded on the CPU"
    cuda = {**cpu, 'device': torch.device('cuda')}
    dls = block(fresh(cls)).dataloaders(folder, **cuda)
    for dl in dls.loaders: assert stats_of(dl).mean.is_cuda and stats_of(dl).std.is_cuda and dl.one_batch()[0].is_cuda
    x = dls.valid.one_batch()[0]
    for o in (x, x.cpu()): close(stats_of(dls.valid).decode(o), pixels(dls.valid_ds.items[:4])/255, atol=1e-5)
    for d in ('cpu', 'cuda', 'cpu'):
        assert dls.to(d).valid.one_batch()[0].device.type==stats_of(dls.valid).mean.device.type==d
    learn = tiny_learner(dls.to('cuda'), tmp_path)
    with learn.no_bar():
        want = learn.get_preds(dl=learn.dls.test_dl(dls.valid_ds.items))[0]
        learn.export('learn.pkl')
    again = load_learner(tmp_path/'learn.pkl')
    assert stats_of(again.dls.valid).mean.device.type=='cpu'
    with again.no_bar(): close(again.get_preds(dl=again.dls.test_dl(dls.valid_ds.items, num_workers=0))[0], want,
                               atol=1e-4)

# --- copies

def repickle(o): return pickle.loads(pickle.dumps(o))

copiers = pytest.mark.parametrize('again', [copy.copy, copy.deepcopy, repickle], ids=lambda f: f.__name__)

@both
@copiers
def test_copies(cls, again, folder):
    x = batch(2, 3, 5, 5)
    tfm = again(given(cls))
    assert type(tfm) is cls
    close(tfm(x), given(cls)(x))
    new = again(fresh(cls))  # one without numbers still takes those of its loaders
    assert new.mean is None and stats_of(block(new).dataloaders(folder, **cpu).train).mean is not None

@both
@copiers
def test_copies_of_fitted_ones(cls, again, folder):
    for tfm in (t := fresh(cls), stats_of(block(t).dataloaders(folder, **cpu).train)):
        new = again(tfm)
        assert torch.equal(new.mean, tfm.mean) and torch.equal(new.std, tfm.std)
        close(new(batch(2, 3, 5, 5)), tfm(batch(2, 3, 5, 5)))

@both
@copiers
def test_copies_of_loaders(cls, again, folder):
    dls = block(fresh(cls)).dataloaders(folder, **cpu)
    new,want = again(dls),dls.valid.one_batch()[0]
    close(new.valid.one_batch()[0], want)
    for dl in (new.train.new(), new.new_empty().train): close(stats_of(dl).mean, stats_of(dls.train).mean)
    close(new.test_dl(dls.valid_ds.items).one_batch()[0], want)

@both
def test_copy_of_a_loader_is_apart(cls, folder):
    "A copied loader that is changed makes new loaders like itself"
    dl = copy.copy(block(fresh(cls)).dataloaders(folder, **cpu).train)
    dl.bs,dl.drop_last = 3,False
    assert dl.new().bs==3 and not dl.new().drop_last

# --- loaders

@both
def test_derived_loaders(cls, folder):
    "Whatever loader is made from them, the original pixels come back with the training split's numbers"
    dls  = block(fresh(cls)).dataloaders(folder, **cpu)
    mean,std = (getattr(stats_of(dls.train), k).double().numpy() for k in ('mean', 'std'))
    files = dls.valid_ds.items
    for dl in (dls.valid, dls.valid.new(bs=3), dls.valid.new(shuffle=False, drop_last=False),
               dls.train.new(dls.valid_ds, shuffle=False),
               dls.test_dl(files), dls.test_dl(files, with_labels=True), dls.test_dl(list(map(str, files))),
               dls.test_dl([PILImage.create(f) for f in files]), dls.new_empty().test_dl(files)):
        x = torch.cat([b[0] for b in dl])[:len(files)]
        assert type(x) is TensorImage
        close(x.double().numpy()*std+mean, pixels(files[:len(x)])/255, atol=1e-6)

@both
def test_decoded_batches_are_the_originals(cls, folder):
    dls = block(fresh(cls)).dataloaders(folder, **cpu)
    b,want = dls.valid.one_batch(),pixels(dls.valid_ds.items[:4])
    x = stats_of(dls.valid).decode(b[0])
    close(x, want/255, atol=1e-5)
    assert (x*255).round().to(torch.uint8).numpy().tolist()==want.tolist()
    for got in (dls.valid.decode(b)[0].numpy(), np.stack([o for o,_ in dls.valid.decode_batch(b)])):
        np.testing.assert_allclose(got.astype(int), want.astype(int), atol=1)  # fastai rounds down to whole numbers
    assert [y for _,y in dls.valid.decode_batch(b)]==[parent_label(f) for f in dls.valid_ds.items[:4]]

@both
def test_shown_images_are_the_originals(cls, folder):
    dls = block(fresh(cls)).dataloaders(folder, **cpu)
    dls.valid.show_batch(max_n=4, nrows=1)
    shown = np.stack([ax.images[0].get_array() for ax in plt.gcf().axes if ax.images]).transpose(0, 3, 1, 2)
    plt.close('all')
    np.testing.assert_allclose(shown.astype(int), pixels(dls.valid_ds.items[:4]).astype(int), atol=1)

@both
@pytest.mark.parametrize('img,c', [(PILImage, 3), (PILImageBW, 1)])
def test_images_as_targets_are_normalised_too(cls, folder, img, c):
    db = block(fresh(cls), blocks=(ImageBlock(img), ImageBlock(img)), get_y=lambda f: f)
    x,y = db.dataloaders(folder, **cpu).valid.one_batch()
    assert x.shape==y.shape==(4, c, 16, 16) and torch.equal(x, y) and type(x) is type(y) is img._tensor_cls

@both
def test_masks_are_left_alone(cls, folder):
    def mask(f): return (np.asarray(Image.open(f))[...,0]//64).astype(np.uint8)
    dls = block(fresh(cls), blocks=(ImageBlock, MaskBlock(codes=['a', 'b', 'c', 'd'])),
                get_y=mask).dataloaders(folder, **cpu)
    x,y = dls.valid.one_batch()
    assert type(y) is TensorMask and y.tolist()==[mask(f).tolist() for f in dls.valid_ds.items[:4]]

@both
def test_summary_runs(cls, folder, capsys):
    block(fresh(cls)).summary(folder, show_batch=True)
    plt.close('all')
    out = capsys.readouterr().out
    assert 'Applying batch_tfms to the batch built' in out and f'applying {cls.__name__}' in out and 'failed' not in out

# --- learners

def tiny_learner(dls, path):
    set_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(4, 2))
    return Learner(dls, model, CrossEntropyLossFlat(), path=path)

@both
@pytest.mark.parametrize('fitted', [True, False])
def test_learners_add_no_second_normalize(cls, folder, fitted):
    "Nor do they replace what is there"
    dls = block(fresh(cls) if fitted else given(cls)).dataloaders(folder, **cpu)
    was = [stats_of(dl) for dl in dls.loaders]
    vision_learner(dls, resnet18, pretrained=False)
    _add_norm(dls, model_meta[resnet18], True)
    _timm_norm(dls, dict(mean=mean3, std=std3), True)
    assert all(stats_of(dl) is t for dl,t in zip(dls.loaders, was))

@both
def test_unet_learner_adds_no_second_normalize(cls, folder):
    def mask(f): return np.zeros((16, 16), dtype=np.uint8)
    dls = block(fresh(cls), blocks=(ImageBlock, MaskBlock(codes=['a', 'b'])), get_y=mask).dataloaders(folder, **cpu)
    unet_learner(dls, resnet18, pretrained=False)
    assert type(stats_of(dls.train)) is type(stats_of(dls.valid)) is cls

@both
def test_exported_learner_predicts_the_same(cls, folder, tmp_path):
    dls = block(fresh(cls)).dataloaders(folder, **cpu)
    learn,files = tiny_learner(dls, tmp_path),dls.valid_ds.items
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
        want,one = learn.get_preds(dl=learn.dls.test_dl(files))[0],learn.predict(files[0], with_input=True)
        learn.export('learn.pkl')
    again = load_learner(tmp_path/'learn.pkl')
    with again.no_bar():
        assert torch.equal(again.get_preds(dl=again.dls.test_dl(files, num_workers=0))[0], want)
        got = again.predict(files[0], with_input=True)
    for img,label,i,probs in (one, got):
        np.testing.assert_allclose(np.asarray(img).astype(int), pixels(files[:1])[0].astype(int), atol=1)
        assert label==dls.vocab[int(i)]
        close(probs, want[0], atol=1e-5)
    assert torch.equal(stats_of(again.dls.train).mean, stats_of(dls.train).mean)

@both
def test_results_are_shown(cls, folder, tmp_path):
    learn = tiny_learner(block(fresh(cls)).dataloaders(folder, **cpu), tmp_path)
    with learn.no_bar(): learn.show_results(max_n=2)
    shown = [ax.images[0].get_array() for ax in plt.gcf().axes if ax.images]
    plt.close('all')
    want = pixels(learn.dls.valid_ds.items[:4]).transpose(0, 2, 3, 1).astype(int)
    assert shown and all(min(np.abs(w-s.astype(int)).max() for w in want)<=1 for s in shown)
