"The whole way on 3,146 real chest X-rays, where they are at hand: a folder beside the repository, or wherever NORMSTATS_DATA points"
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.training import ShortEpochCallback
from fastai.vision.all import (CategoryBlock, DataBlock, ImageBlock, Normalize, RandomSplitter, Resize, get_image_files, load_learner,
                               parent_label, resnet18, resnet34, vision_learner)
from PIL import Image

from fastai_normstats.all import StatsChoice
from fastai_normstats.cli import main

DATA = Path(os.environ.get('NORMSTATS_DATA', Path(__file__).parents[2]/'shared'/'data'))
CXR = DATA/'cxr_ped'
pytestmark = [pytest.mark.realdata, pytest.mark.skipif(not CXR.is_dir(), reason='needs the chest X-rays')]

def pixels(files): return np.stack([np.asarray(Image.open(f).convert('RGB')) for f in files])

@pytest.fixture(scope='module')
def dblock():
    db = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(.2),
                   item_tfms=Resize(224, method='squish'))
    return db.fit_stats(CXR, model=resnet34, num_workers=2, verbose=False)

@pytest.fixture(scope='module')
def dls(dblock): return dblock.dataloaders(CXR, bs=16, num_workers=0)

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
    np.testing.assert_allclose(got, pixels(dls.valid_ds.items[:16]).astype(int), atol=1)  # fastai rounds down to whole numbers

def test_train_predict_export(dls, tmp_path):
    learn = vision_learner(dls, resnet18, pretrained=False, path=tmp_path, cbs=ShortEpochCallback(.02, short_valid=True))
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

def test_command_line_agrees(capsys, tmp_path):
    assert main(['fit', str(CXR), '--size', '224', '--valid-pct', '0.2', '--out', str(tmp_path/'s.json'), '--plot', str(tmp_path/'p.png')])==0
    out = capsys.readouterr().out
    assert '3,146 images' in out and 'rule `enough`' in out and (tmp_path/'p.png').stat().st_size>10_000
    np.testing.assert_allclose(StatsChoice.load(tmp_path/'s.json').stats.mean, .4815, atol=.003)
