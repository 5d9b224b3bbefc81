"""The whole way on 3,146 real chest X-rays, where they are at hand: a folder beside the repository, or wherever
NORMSTATS_DATA points"""
import os,warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.training import ShortEpochCallback
from fastai.vision.all import (CategoryBlock, DataBlock, ImageBlock, IntToFloatTensor, Normalize, PILImageBW,
                               RandomSplitter, Resize, TensorImage,
                               TransformBlock, aug_transforms, get_image_files, load_learner, parent_label, resnet18,
                               resnet34, vision_learner)
from PIL import Image

from fastai_normstats.all import StatsChoice
from fastai_normstats.cli import main
from fastai_normstats.drift import _own_stats,_rows,_with_verdicts
from fastai_normstats.measure import measure_stats
from fastai_normstats.policy import Policy
from fastai_normstats.running import RunningStats

DATA = Path(os.environ.get('NORMSTATS_DATA', Path(__file__).parents[2]/'shared'/'data'))
CXR = DATA/'cxr_ped'
pytestmark = [pytest.mark.realdata, pytest.mark.skipif(not CXR.is_dir(), reason='needs the chest X-rays')]

def pixels(files): return np.stack([np.asarray(Image.open(f).convert('RGB')) for f in files])

@pytest.fixture(scope='module')
def dblock():
    db = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label,
                   splitter=RandomSplitter(.2),
                   item_tfms=Resize(224, method='squish'))
    return db.fit_stats(CXR, model=resnet34, num_workers=2, verbose=False)

@pytest.fixture(scope='module')
def dls(dblock): return dblock.dataloaders(CXR, bs=16, num_workers=0)

@pytest.mark.slow
def test_numbers_equal_a_reference_over_the_training_files(dls):
    x = pixels(dls.train_ds.items)[...,0]/255.  # R = G = B
    m = dls.stats_choice.measured
    assert (m.n_images, dls.stats_choice.rule)==(2517, 'enough') and len(x)==2517
    for got,want in [(m.mean, x.mean()), (m.std, x.std()), (m.image_std, x.std((1,2)).mean()),
                     (m.mean_se, x.mean((1,2)).std(ddof=1)/len(x)**.5)]:
        np.testing.assert_allclose(got, [want]*3, rtol=1e-6)

def test_shown_images_look_like_the_originals(dls):
    dls.valid.show_batch(max_n=4, nrows=1)
    b = dls.valid.one_batch()
    got = np.stack([x for x,_ in dls.valid.decode_batch(b, max_n=16)]).transpose(0,2,3,1).astype(int)
    np.testing.assert_allclose(got, pixels(dls.valid_ds.items[:16]).astype(int),
                               atol=1)  # fastai rounds down to whole numbers

@pytest.mark.slow
def test_train_predict_export(dls, tmp_path):
    learn = vision_learner(dls, resnet18, pretrained=False, path=tmp_path,
                           cbs=ShortEpochCallback(.02, short_valid=True))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-3)
    for dl in learn.dls.loaders: assert sum(isinstance(f, Normalize) for f in dl.after_batch.fs)==1
    files = dls.valid_ds.items[:20]
    learn.remove_cbs(learn.cbs.filter(lambda o: isinstance(o, ShortEpochCallback)))
    with learn.no_bar():
        preds = learn.get_preds(dl=learn.dls.test_dl(files, num_workers=0))[0]
        learn.export('learn.pkl')
        again = load_learner(tmp_path/'learn.pkl')
        with again.no_bar(): test = again.get_preds(dl=again.dls.test_dl(files, num_workers=0))[0]
    assert torch.equal(preds, test)
    x = learn.dls.test_dl(files, num_workers=0).one_batch()[0]
    mean,std = (torch.tensor(o)[:,None,None] for o in dls.stats_choice.stats)
    assert torch.allclose(x*std+mean, torch.tensor(pixels(files[:16])).permute(0,3,1,2)/255., atol=1e-5)

@pytest.mark.slow
def test_command_line_agrees(capsys, tmp_path):
    assert main(['fit', str(CXR), '--size', '224', '--valid-pct', '0.2', '--out', str(tmp_path/'s.json'), '--plot',
                 str(tmp_path/'p.png')])==0
    out = capsys.readouterr().out
    assert '3,146 images' in out and 'rule `enough`' in out and (tmp_path/'p.png').stat().st_size>10_000
    np.testing.assert_allclose(StatsChoice.load(tmp_path/'s.json').stats.mean, .4815, atol=.003)

# --- patients

@pytest.mark.slow
def test_patients_as_units():
    "3,146 X-rays of 2,352 patients, 64²: the errors and design effects found with numpy alone, to their rounding"
    labels = pd.read_csv(CXR/'labels.csv')
    patient = {CXR/f: p for f,p in zip(labels.fname, labels.patient_id)}
    db = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_items=lambda p: sorted(get_image_files(p)),
                   get_y=parent_label,
                   splitter=lambda o: (range(len(o)), []), item_tfms=Resize(64, method='squish'))
    dl = db.dataloaders(CXR, bs=64, num_workers=0).train
    by,alone = (measure_stats(dl, tol=0, groups=g, verbose=False) for g in (patient, None))
    assert (by.n_images, by.n_groups, alone.n_groups)==(3146, 2352, 3146) and torch.equal(by.mean, alone.mean)
    sigma = by.std.item()
    assert [round((m.mean_se/sigma).item(), 4) for m in (alone, by)]==[.0050, .0059]
    effects = [(getattr(by, k)/getattr(alone, k)).item()**2 for k in ('mean_se', 'std_se')]
    assert [round(o, 2) for o in effects]==[1.38, 1.55]
    assert by.design_effect.item()==pytest.approx(max(effects), rel=1e-9) and round(by.n_effective)==2028
    db.fit_stats(CXR, groups=patient, tol=0, bs=64, num_workers=0, verbose=False)
    assert db.stats_choice.measured==by.measured() and not [o for o in db.stats_choice.warnings if 'famil' in o]

# --- guards and model statistics on real images

def said(f, *args, **kwargs):
    with warnings.catch_warnings(record=True) as res:
        warnings.simplefilter('always')
        f(*args, **kwargs)
    return [str(w.message) for w in res if issubclass(w.category, UserWarning)]

def loaders(path, block=ImageBlock, **kwargs):
    kwargs = {'item_tfms': Resize(64, method='squish'), 'batch_tfms': [], **kwargs}
    return DataBlock((block, CategoryBlock), get_items=lambda p: p if isinstance(p, list) else get_image_files(p),
                     get_y=parent_label,
                     splitter=RandomSplitter(.2, seed=0), **kwargs)

@pytest.mark.slow
@pytest.mark.parametrize('tfms', [[], aug_transforms()], ids=['plain', 'augmented'])
@pytest.mark.parametrize('kwargs', [dict(), dict(model='rad-dino'), dict(pretrained=False), dict(frozen=True),
                                    dict(stats='imagenet')], ids=str)
def test_no_false_alarm_on_x_rays(tfms, kwargs):
    db = loaders(CXR, batch_tfms=tfms)
    files = sorted(get_image_files(CXR))[::5]
    assert not said(db.fit_stats, files, bs=32, num_workers=0, verbose=False, **kwargs)
    assert not said(db.dataloaders(files, bs=32, num_workers=0).check_stats, verbose=False)

def test_domain_model_end_to_end(monkeypatch):
    "rad-dino's statistics, no pass, the source in the reason, and the right numbers in the batch"
    from fastai_normstats import transform
    monkeypatch.setattr(transform, 'measure_stats', lambda *a, **k: pytest.fail('a pass was made'))
    db = loaders(CXR).fit_stats(CXR, model='rad-dino', num_workers=0, verbose=False)
    c = db.stats_choice
    assert (c.rule, c.kind, c.measured)==('domain', 'pretrained',
                                          None) and 'RAD-DINO preprocessor_config.json' in c.why \
                                              and 'chest X-ray' in c.why
    dl = db.dataloaders(CXR, bs=8, num_workers=0).valid
    x = dl.one_batch()[0]
    want = np.stack([np.asarray(Image.open(f).convert('RGB').resize((64, 64), Image.BILINEAR))
                     for f in dl.items[:8]])/255.
    np.testing.assert_allclose(x.permute(0, 2, 3, 1), (want-.5307)/.2583, atol=1e-5)

@pytest.mark.slow
@pytest.mark.parametrize('kwargs', [dict(), dict(frozen=True)], ids=str)
def test_chexzero_on_real_x_rays(kwargs):
    "Its numbers for 0-255, on images in [0, 1]"
    db = loaders(CXR).fit_stats(sorted(get_image_files(CXR))[::10], model='chexzero', num_workers=0, verbose=False,
                                **kwargs)
    np.testing.assert_allclose([o[0] for o in db.stats_choice.stats], [101.48761/255, 83.43944/255])
    assert db.stats_choice.rule=='domain'

CT = DATA/'ct'/'png16'
def hounsfield(f): return TensorImage(np.asarray(Image.open(f), dtype=np.float32)[None]-1024)
def lung_window(f): return PILImageBW.create(((hounsfield(f)[0].numpy()+1350)/1500*255).clip(0, 255).astype(np.uint8))

@pytest.mark.slow
@pytest.mark.parametrize('block', [ImageBlock, ImageBlock(PILImageBW)], ids=['PILImage', 'PILImageBW'])
def test_16_bit_ct_is_caught(block):
    db = loaders(CT, block)
    res = [s for s in said(db.fit_stats, CT, num_workers=0, verbose=False) if 'clipped' in s]
    assert len(res)==1 and res[0] in db.stats_choice.warnings and 'FloatImageBlock()' in res[0]

@pytest.mark.slow
def test_16_bit_ct_as_hounsfield_units():
    "The remedy: nothing clipped, and the numbers that numpy finds in the same files"
    db = loaders(CT, TransformBlock(type_tfms=hounsfield), item_tfms=[])
    res = said(db.fit_stats, CT, tol=0, num_workers=0, verbose=False)
    m = db.stats_choice.measured
    x = np.stack([np.asarray(Image.open(f), dtype=float)-1024
                  for f in db.dataloaders(CT, bs=8, num_workers=0).train_ds.items])
    # HU are not what ImageNet's numbers are for
    assert len(res)==1 and 'cannot apply' in res[0] and db.stats_choice.rule=='range'
    for got,want in ((m.mean, x.mean()), (m.std, x.std()),
                     (m.image_std, x.std((1,2)).mean())): np.testing.assert_allclose(got, want, rtol=1e-6)

def test_16_bit_ct_whole_set_as_in_its_readme():
    "The reference of the data's README: 224², bilinear"
    def small(f):
        values = np.asarray(Image.open(f), dtype=np.float32)-1024
        return TensorImage(np.array(Image.fromarray(values).resize((224, 224), Image.BILINEAR))[None])
    files = sorted(get_image_files(CT))
    db = DataBlock(TransformBlock(type_tfms=small), splitter=lambda o: (range(len(o)), []), n_inp=1)
    m = db.fit_stats(files, tol=0, pretrained=False, num_workers=0, verbose=False).stats_choice.measured
    np.testing.assert_allclose([m.mean.item(), m.std.item(), m.image_std.item()], [-569.67, 477.26, 462.29], atol=.01)

@pytest.mark.slow
def test_hounsfield_units_are_not_taken_for_normalised():
    for scale in (1, 1000):
        db = loaders(CT, TransformBlock(type_tfms=lambda f: hounsfield(f)/scale), item_tfms=[])
        assert not said(db.fit_stats, CT, pretrained=False, num_workers=0, verbose=False)

def test_16_bit_ct_windowed():
    assert not said(loaders(CT, TransformBlock(type_tfms=lung_window, batch_tfms=IntToFloatTensor),
                            item_tfms=[]).fit_stats, CT, pretrained=False, num_workers=0, verbose=False)

# --- drift on real images

def measured_on(db, files, **kwargs):
    dls = db.dataloaders(files, bs=32, num_workers=0)
    return dls.fit_stats(pretrained=False, verbose=False, **kwargs)

def check_groups(df, values, reference):
    "Shift and std ratio of each group against numpy over the group's pixels"
    m,s = reference.mean(),reference.std()
    for g,rows in df.groupby('group'):
        x = values[g]
        for r in rows.itertuples():
            assert r.n==len(x)
            np.testing.assert_allclose([r.shift, r.std_ratio], [(x.mean()-m)/s, x.std()/s], rtol=1e-4, atol=1e-6)

@pytest.mark.slow
def test_x_rays_by_class():
    """By the class in the folder's name, against numpy: within a tenth of σ of each other, however certain the
    difference"""
    files = sorted(get_image_files(CXR))[::3]
    dls = measured_on(loaders(CXR, item_tfms=[]), files, tol=0)
    df = dls.check_stats(dls.test_dl(files, num_workers=0), by=lambda f: f.parent.name, tol=0, verbose=False)
    groups = {g: np.stack([pixels([f])[0][...,0] for f in files if f.parent.name==g])/255.
              for g in {f.parent.name for f in files}}
    check_groups(df, groups, pixels(dls.train_ds.items)[...,0]/255.)
    assert len(groups)==3 and {*df.verdict}=={'alike'} and df.z.max()>3

@pytest.mark.slow
def test_ct_by_manufacturer():
    "Statistics of the SIEMENS slices against those of GE, in HU: a tenth of σ off, and 33 slices do not tell"
    labels = pd.read_csv(DATA/'ct'/'labels.csv')
    maker = {DATA/'ct'/f: m for f,m in zip(labels.fname, labels.manufacturer)}
    def split(o): return [[i for i,f in enumerate(o) if (maker[f]=='SIEMENS')==siemens] for siemens in (True, False)]
    db = DataBlock((TransformBlock(type_tfms=hounsfield), CategoryBlock), get_y=parent_label, splitter=split)
    df = measured_on(db, [*maker], tol=0).check_stats(by=maker.get, tol=0, verbose=False)
    def hu(siemens): return np.stack([np.asarray(Image.open(f), dtype=float)-1024 for f in maker
                                      if (maker[f]=='SIEMENS')==siemens])
    check_groups(df, {'GE MEDICAL SYSTEMS': hu(False)}, hu(True))
    r, = df.itertuples()
    assert (r.verdict, r.n)==('too few', 33) and r.n_needed>33

@pytest.mark.slow
def test_halves_are_alike():
    "Two random halves of one set, 100 seeds, from the images' own moments"
    x = torch.tensor(pixels(sorted(get_image_files(CXR))[::2])[...,:1]).permute(0, 3, 1, 2)[:, :, ::4, ::4]/255
    alike = 0
    for seed in range(100):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        a,b = (RunningStats().update(x[o]) for o in order.chunk(2))
        training = a.measured()
        rows = [dict(group=None, **r) for r in _rows(b, _own_stats(training), training, training, Policy())]
        alike += (_with_verdicts(rows).verdict=='alike').all()
    assert alike>=95
