"The probe: features of a frozen body under each candidate, and a linear classifier on them"
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.vision.all import (CategoryBlock, CrossEntropyLossFlat, DataBlock, F, ImageBlock, Learner, RandomSplitter,
                               Resize, aug_transforms, deepcopy, get_image_files, imagenet_stats, parent_label,
                               resnet18, vision_learner)
from PIL import Image
from scipy.stats import binom
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import RidgeClassifierCV
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from torch import nn

from fastai_normstats.all import Comparison, compare_stats
from fastai_normstats.compare.probe import _flat, body_of, class_probabilities
from fastai_normstats.compare.scores import corrected_interval, scores
from fastai_normstats.schemes import ClipZScore
from helpers import image_folder

quick = dict(bs=16, num_workers=0, verbose=False, probe=True)
wrong = ([255*m for m in imagenet_stats[0]], [255*s for s in imagenet_stats[1]])

def patient(f): return int(Path(f).stem)//4

def block(**kwargs):
    return DataBlock((ImageBlock, CategoryBlock), get_items=lambda p: sorted(get_image_files(p)), get_y=parent_label,
                     **{'splitter': RandomSplitter(seed=1), 'item_tfms': Resize(12), **kwargs})

torch.manual_seed(0)
weights = nn.Conv2d(3, 16, 3).state_dict()

class Body(nn.Module):
    "Convolution, ReLU, mean of nine fields; the same weights each time, and a note of how many images came by"
    seen = []
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.conv.load_state_dict(weights)
    def forward(self, x):
        Body.seen.append(len(x))
        return F.adaptive_avg_pool2d(F.relu(self.conv(x)), 3).flatten(1)

def learner(dls): return Learner(dls, nn.Sequential(Body(), nn.Linear(144, len(dls.vocab))), CrossEntropyLossFlat())

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Two classes of noise, one darker and upside down"
    path = image_folder(tmp_path_factory.mktemp('images'), n=80, size=12)
    for f in sorted((path/'b').glob('*')): Image.fromarray(np.asarray(Image.open(f))[::-1]//2+70).save(f)
    return path

def probed(images, stats=('imagenet', 'custom'), **kwargs):
    return compare_stats(block(**kwargs.pop('block', {})), images, kwargs.pop('learner', learner), stats=stats,
                         **{**quick, **kwargs})

def test_a_run_is_scikit_learn_on_features_of_plain_images(folder):
    c = probed(folder, seeds=1, folds=2, block=dict(batch_tfms=aug_transforms()))
    files = sorted(get_image_files(folder))
    x = np.stack([np.asarray(Image.open(f).convert('RGB'), dtype=np.float64)/255 for f in files])
    y = np.array([f.parent.name=='b' for f in files]).astype(int)
    train,valid = next(StratifiedKFold(2, shuffle=True, random_state=0).split(y, y))
    mean,std = map(np.array, c.records[0]['stats'])
    with torch.no_grad(): feats = Body()(torch.tensor((x-mean)/std).permute(0, 3, 1, 2).float()).numpy()
    clip = FunctionTransformer(lambda x: x.clip(-5, 5))
    ridge = make_pipeline(StandardScaler(), clip, RidgeClassifierCV(np.logspace(-1, 6, 15)))
    fitted = CalibratedClassifierCV(ridge, cv=StratifiedKFold(3), ensemble=False).fit(feats[train], y[train])
    want,got = fitted.predict_proba(feats[valid]),c.records[0]
    assert got['candidate']=='imagenet' and got['y']==y[valid].tolist()
    np.testing.assert_allclose(got['probs'], want, atol=2e-3)
    np.testing.assert_allclose(got['losses'], [log_loss(y[valid], np.array(got['probs'])[:,1])], rtol=1e-6)
    assert c.runs.auroc[0]==scores(y[valid], np.array(got['probs']))['auroc']

def test_statistics_are_those_that_training_would_use(folder):
    kwargs = dict(seeds=1, folds=3, groups=patient, stats=('imagenet', 'custom', 'custom-image'))
    trained = probed(folder, probe=False, fit=lambda learn, n: learn.fit(n, 0.), **kwargs)
    for a,b in zip(probed(folder, **kwargs).records, trained.records):
        for k in ('candidate', 'fold', 'split', 'stats', 'y', 'ratio', 'n_train'): assert a[k]==b[k], k

def test_equal_numbers_give_equal_runs(folder):
    same = dict(a='imagenet', b=imagenet_stats, d='custom')
    c = probed(folder, same, seeds=2, folds=2)
    runs = {k: [r for r in c.records if r['candidate']==k] for k in 'abd'}
    for a,b,d in zip(*runs.values()):
        assert a['probs']==b['probs'] and a['losses']==b['losses'] and a['probs']!=d['probs']
    assert 'No difference at all between b and a' in c.verdict

def test_features_are_computed_once_for_the_same_numbers(folder, tmp_path):
    Body.seen.clear()
    stats = dict(a='imagenet', b=imagenet_stats, c='custom', d='image-zscore')
    c = probed(folder, stats, seeds=2, folds=2, folder=tmp_path/'kept')
    assert sum(Body.seen)==80*(1+4+1)  # of `c` once a fold and seed
    Body.seen.clear()
    again = probed(folder, stats, seeds=2, folds=2, folder=tmp_path/'kept')
    assert not Body.seen and again.records==c.records
    with pytest.raises(ValueError, match='another comparison .*probe'):
        probed(folder, stats, seeds=2, folds=2, folder=tmp_path/'kept', probe=False)

def test_clipping_is_not_taken_for_plain_numbers(folder):
    "Same mean and std, other pixels"
    c = probed(folder, dict(plain='custom', clipped=ClipZScore(percentiles=(20., 80.))), seeds=1, folds=2)
    a,b = (next(r for r in c.records if r['candidate']==k) for k in ('plain', 'clipped'))
    assert a['stats']==b['stats'] and a['probs']!=b['probs']

def test_power(folder):
    "Numbers for 0–255 leave a picture that is nearly flat to the body's ReLU: found, whichever is the reference"
    c = probed(folder, dict(imagenet='imagenet', wrong=wrong), seeds=2, folds=4)
    other = Comparison(c.records, {**c.setup, 'candidates': ['wrong', 'imagenet']})
    assert 'wrong is worse than imagenet' in c.verdict_on('valid_loss')
    assert 'imagenet is better than wrong' in other.verdict_on('valid_loss')

def test_units_that_are_nearly_dead_decide_nothing():
    "Of MobileNet on radio galaxies some features were 85,000 σ off in a validation image: .37 right instead of .62"
    rng = np.random.default_rng(0)
    y = rng.integers(3, size=300)
    x = rng.normal(size=(300, 30))
    x[:, :3] += 2*np.eye(3)[y]
    dead = np.zeros((300, 5))
    dead[rng.integers(200, size=10), rng.integers(5, size=10)] = 1e-5
    dead[200+rng.integers(100, size=40), rng.integers(5, size=40)] = 1.
    def right(x): return (class_probabilities(x[:200], y[:200], x[200:]).argmax(1)==y[200:]).mean()
    assert right(np.hstack([x, dead]))>right(x)-.05>.6

@pytest.mark.slow
def test_null():
    "Two sets of features that are worth the same: an interval leaves zero out in about one of twenty comparisons"
    rng,times,seen = np.random.default_rng(0),100,0
    for k in range(times):
        y = rng.integers(2, size=200)
        a,b = (rng.normal(size=(200, 8))+.5*y[:,None]*(np.arange(8)<2) for _ in range(2))
        d = []
        for train,valid in StratifiedKFold(5, shuffle=True, random_state=k).split(a, y):
            p,q = (class_probabilities(x[train], y[train], x[valid]) for x in (a, b))
            d.append(scores(y[valid], q)['auroc']-scores(y[valid], p)['auroc'])
        i = corrected_interval(d, 1/4)
        seen += not i.low<=0<=i.high
    assert seen<=binom.ppf(.999, times, .05)

def test_patients_stay_together_in_calibration(monkeypatch, folder):
    seen = []
    def split(self, x, y, groups): seen.append(groups); return real(self, x, y, groups)
    import fastai_normstats.compare.probe as probe
    real = probe.StratifiedGroupKFold.split
    monkeypatch.setattr(probe.StratifiedGroupKFold, 'split', split)
    c = probed(folder, seeds=1, folds=2, groups=patient)
    assert len(c.runs)==4 and all(g is not None for g in seen)
    x,y = np.random.default_rng(0).normal(size=(12, 3)),np.arange(12)%2
    assert class_probabilities(x, y, x, np.arange(12)//4).shape==(12, 2)

@pytest.mark.parametrize('model', ['vision_learner', 'plain', 'tokens'])
def test_bodies_of_other_networks(folder, model):
    class Tokens(nn.Module):
        def forward(self, x): return x.flatten(2).transpose(1, 2)
    def make(dls):
        if model=='vision_learner': return vision_learner(dls, resnet18, pretrained=False, normalize=False)
        if model=='tokens': return Learner(dls, nn.Sequential(Tokens(), nn.Linear(3, 2)), CrossEntropyLossFlat())
        plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 2))
        return Learner(dls, plain, CrossEntropyLossFlat())
    c = probed(folder, learner=make, seeds=1, folds=2)
    assert c.runs.error.isna().all() and c.runs.auroc.between(0, 1).all()

def test_the_order_of_the_loader_changes_nothing(folder):
    plain,turned = (probed(folder, seeds=1, folds=2, **kwargs) for kwargs in ({}, dict(val_shuffle=True)))
    assert [r['probs'] for r in plain.records]==[r['probs'] for r in turned.records]

def test_which_part_of_a_network_is_its_body():
    x = torch.rand(2, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 7, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 2))
    before = nn.Sequential(nn.Identity(), net)
    assert body_of(before)(x).shape==(2, 7)  # not the mean colours that the first part lets through
    class Late(nn.Module):
        "Registers its head first, and runs it last"
        def __init__(self):
            super().__init__()
            self.head,self.first,self.unused = nn.Linear(5, 2),nn.Linear(3, 5),nn.Linear(1, 1)
        def forward(self, x): return self.head(self.first(x.mean((2, 3))))
    assert body_of(Late())(x).shape==(2, 5)
    assert _flat(torch.rand(2, 4, 4, 6), 6).shape==(2, 6) and _flat(torch.rand(2, 6, 4, 4), 6).shape==(2, 6)
    with pytest.raises(TypeError, match='the body gives a tuple'): _flat((x,))

def test_what_a_comparison_of_features_shows(folder, tmp_path):
    c = probed(folder, seeds=1, folds=3, metrics=dict(brier=lambda y, p: ((y-p)**2).mean()))
    assert {*c.table().metric}=={'best_f1', 'f1', 'auroc', 'pr_auc', 'valid_loss', 'brier'}
    assert 'linear classifiers on features of the frozen body' in repr(c) and len(c.plot())==3
    again = Comparison.load(c.save(tmp_path/'c.json'))
    assert again.verdict==c.verdict and json.loads((tmp_path/'c.json').read_text())['setup']['probe'] is True

@pytest.mark.parametrize('what', ['nan', 'no head', 'odd shape', 'few'])
def test_what_cannot_be_probed_is_said(folder, what):
    class Bad(nn.Module):
        def __init__(self): super().__init__(); self.own = nn.Parameter(torch.zeros(1))
        def forward(self, x): return x.mean((2, 3))/0*0 if what=='nan' else x.mean()
    headless = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.ReLU())
    nets = {'nan': nn.Sequential(Bad(), nn.Linear(3, 2)), 'no head': headless,
            'odd shape': nn.Sequential(Bad(), nn.Linear(3, 2))}
    says = {'nan': 'features are not finite', 'no head': 'cannot tell the body', 'odd shape': 'features of shape',
            'few': 'two training images of every class'}[what]
    kwargs = dict(train_size=2) if what=='few' else dict(learner=lambda dls: Learner(dls, deepcopy(nets[what]),
                                                                                     CrossEntropyLossFlat()))
    with pytest.warns(UserWarning, match='runs of custom failed'): c = probed(folder, seeds=1, folds=2, **kwargs)
    assert c.runs.error.str.contains(says).all(), c.runs.error[0]

def test_bad_arguments(folder):
    with pytest.raises(TypeError, match='`probe` must be True or False'): probed(folder, probe='yes')
    with pytest.raises(ValueError, match='cannot tell the body'): body_of(nn.Conv2d(3, 2, 1))
