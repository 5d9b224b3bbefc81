"Learners that are exported with plain Normalize, loaded where this package cannot be imported"

import os,subprocess,sys

import pandas as pd
import pytest
import torch
from fastai.vision.all import (CategoryBlock,DataBlock,ImageBlock,IndexSplitter,Learner,Normalize,Resize,
                               aug_transforms,get_image_files,load_learner,parent_label,resnet18)
from torch import nn

from fastai_normstats.all import DatasetStats
from helpers import image_folder

small,quiet = dict(bs=4, num_workers=0),dict(verbose=False)

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return image_folder(tmp_path_factory.mktemp('freeze')/'images', n=24)

def block(**kwargs):
    return DataBlock((ImageBlock, CategoryBlock), get_items=lambda p: sorted(get_image_files(p)), get_y=parent_label,
                     splitter=IndexSplitter(range(0, 24, 4)),
                     item_tfms=Resize(12), **kwargs)

def by_block(folder):   return block(batch_tfms=aug_transforms()).fit_stats(folder, stats='custom', **quiet,
    **small).dataloaders(folder, **small)
def by_loaders(folder): return block().dataloaders(folder, **small).fit_stats(stats='custom', **quiet)
def lazy(folder):       return block(batch_tfms=DatasetStats(stats='custom', **quiet)).dataloaders(folder, **small)
ways = pytest.mark.parametrize('way', [by_block, by_loaders, lazy], ids=lambda f: f.__name__)

def learner(dls, path):
    torch.manual_seed(0)
    return Learner(dls, nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                      nn.Linear(4, 2)), loss_func=nn.CrossEntropyLoss(), path=path)

def preds(learn, files):
    with learn.no_bar(): return learn.get_preds(dl=learn.dls.test_dl(files, num_workers=0))[0]

@ways
def test_numbers_stay(folder, way):
    dls = way(folder)
    before = [dl.one_batch()[0] for dl in (dls.valid, dls.test_dl(dls.valid_ds.items, **small))]
    choice = dls.stats_choice
    numbers = [torch.as_tensor(o) for o in choice.stats]
    assert dls.freeze_stats() is dls and dls.stats_choice==choice
    for dl in dls.loaders:
        f, = [f for f in dl.after_batch.fs if isinstance(f, Normalize)]
        assert type(f) is Normalize and f.order==99
        for got,want in zip((f.mean, f.std), numbers):
            torch.testing.assert_close(got.flatten(), want, check_dtype=False)
    for a,b in zip(before, (dls.valid.one_batch()[0],
                            dls.test_dl(dls.valid_ds.items, **small).one_batch()[0])): torch.testing \
                                .assert_close(a, b, rtol=0, atol=1e-6)
    dls.freeze_stats()  # once more changes nothing
    dls.show_batch(max_n=2)
    assert dls.fit_stats(stats='custom', **quiet).stats_choice is not None

@ways
def test_the_choice_stays(folder, way, tmp_path):
    "`stats_choice` and both `check_stats` answer as before, also of a learner that was exported and loaded"
    learn = learner(way(folder), tmp_path)
    choice,drift,expected = learn.dls.stats_choice,learn.dls.check_stats(**quiet),learn.check_stats(resnet18, **quiet)
    learn.freeze_stats()
    assert learn.dls.stats_choice==choice and learn.dls.stats_choice.why==choice.why
    assert repr(learn.dls.stats_choice)==repr(choice)
    pd.testing.assert_frame_equal(learn.dls.check_stats(**quiet), drift)
    pd.testing.assert_frame_equal(learn.check_stats(resnet18, **quiet), expected)
    pd.testing.assert_frame_equal(learn.dls.check_stats(against='train', **quiet), drift)
    learn.export('frozen.pkl')
    again = load_learner(tmp_path/'frozen.pkl')
    assert again.dls.stats_choice==choice and type(again.dls.valid.after_batch.normalize) is Normalize
    assert again.dls.check_stats(folder, **quiet).n.tolist()==[24]*3

def test_numbers_by_hand_have_no_choice(folder):
    dls = block(batch_tfms=DatasetStats.from_stats([.5]*3, [.5]*3, cuda=False)).dataloaders(folder, **small)
    assert dls.freeze_stats().stats_choice is None

def test_nothing_to_freeze(folder):
    with pytest.raises(ValueError, match='not normalised'): block().dataloaders(folder, **small).freeze_stats()
    plain = block(batch_tfms=Normalize.from_stats([.5]*3, [.5]*3, cuda=False)).dataloaders(folder, **small)
    plain.freeze_stats()

blocked = """
import sys,warnings
warnings.simplefilter('ignore')
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0]=='fastai_normstats': raise ModuleNotFoundError(f'No module named {name!r}')
sys.meta_path.insert(0, Absent())
import torch
from pathlib import Path
from fastai.vision.all import *
learn = load_learner(sys.argv[1])
with learn.no_bar(): p = learn.get_preds(dl=learn.dls.test_dl(sorted(get_image_files(sys.argv[2])), num_workers=0))[0]
torch.save(p, sys.argv[3])
assert not any(m.split('.')[0]=='fastai_normstats' for m in sys.modules)
"""

def elsewhere(learn_file, folder, out):
    res = subprocess.run([sys.executable, '-c', blocked, learn_file, folder, out], capture_output=True, text=True,
                         env={**os.environ, 'OMP_NUM_THREADS': '1'})
    return res.returncode,res.stderr

@pytest.mark.slow
@ways
def test_loads_without_this_package(folder, way, tmp_path):
    "A frozen learner predicts equally there, and one that is not frozen cannot be loaded"
    files = sorted(get_image_files(folder))
    learn = learner(way(folder), tmp_path)
    want = preds(learn, files)
    if way is by_loaders:
        learn.export('with.pkl')
        assert elsewhere(tmp_path/'with.pkl', folder, tmp_path/'p.pt')[0]!=0
        torch.testing.assert_close(preds(load_learner(tmp_path/'with.pkl'), files), want)
    assert learn.freeze_stats() is learn
    learn.export('frozen.pkl')
    status,error = elsewhere(tmp_path/'frozen.pkl', folder, tmp_path/'p.pt')
    assert status==0, error
    torch.testing.assert_close(torch.load(tmp_path/'p.pt', weights_only=False), want)
    torch.testing.assert_close(preds(load_learner(tmp_path/'frozen.pkl'), files), want)
