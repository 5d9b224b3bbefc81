"Compared runs differ in the statistics alone, are worth what scikit-learn says, and are neither lost nor mixed up"
import json,math,os,random,subprocess,sys,threading,warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import (BCEWithLogitsLossFlat,CategoryBlock,ColReader,CrossEntropyLossFlat,DataBlock,
                               F,ImageBlock,IndexSplitter,IntToFloatTensor,Learner,MaskBlock,Normalize,PILImage,
                               RandomSplitter,TransformBlock,
                               Resize,SaveModelCallback,TensorImage,Transform,aug_transforms,get_image_files,
                               imagenet_stats,parent_label,params)
from PIL import Image
from scipy.stats import t as student
from sklearn.metrics import average_precision_score,f1_score,log_loss,precision_recall_curve,roc_auc_score
from sklearn.model_selection import RepeatedStratifiedKFold
from torch import nn

from fastai_normstats.all import Comparison,NormStats,compare_stats
from fastai_normstats.cli import main
from fastai_normstats.compare.scores import corrected_interval
from helpers import image_folder

quick = dict(bs=8, num_workers=0, verbose=False)

def patient(f): return int(Path(f).stem)//4

def block(**kwargs):
    kwargs = {'splitter': RandomSplitter(seed=1), 'item_tfms': Resize(12), **kwargs}
    return DataBlock((ImageBlock, CategoryBlock), get_items=lambda p: sorted(get_image_files(p)), get_y=parent_label,
                     **kwargs)

def net(n_out=2): return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.2),
                                       nn.Flatten(), nn.Linear(100, n_out))

def learner(dls): return Learner(dls, net(len(dls.vocab)), CrossEntropyLossFlat())

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return image_folder(tmp_path_factory.mktemp('images'), n=48, size=12)

@pytest.fixture(scope='module')
def three(tmp_path_factory): return image_folder(tmp_path_factory.mktemp('three'), n=60, size=12,
                                                 classes=('x', 'y', 'z'))

def compared(images, **kwargs): return compare_stats(block(**kwargs.pop('block', {})), images,
                                                     kwargs.pop('learner', learner), **{**quick, **kwargs})

@pytest.fixture(scope='module')
def comparison(folder): return compared(folder, stats=('imagenet', 'custom', 'custom-image'), seeds=2, folds=3,
                                        epochs=2, groups=patient)

def by_name(c, name): return [r for r in c.records if r['candidate']==name]

# --- what differs, and what does not

@pytest.mark.slow
@pytest.mark.parametrize('how', ['plain', 'augmented', 'workers', 'folds', 'kept'])
def test_equal_numbers_give_equal_runs(folder, tmp_path, how):
    "Bit by bit: every loss and every probability; and other numbers do not"
    kwargs = dict(augmented=dict(block=dict(batch_tfms=aug_transforms())),
                  workers=dict(num_workers=2, block=dict(batch_tfms=aug_transforms())),
                  folds=dict(folds=2, groups=patient), kept=dict(folder=tmp_path)).get(how, {})
    same = dict(a='imagenet', b=imagenet_stats, c=NormStats(*imagenet_stats), d='custom')
    c = compared(folder, stats=same, seeds=2, epochs=2, **kwargs)
    assert c.runs.error.isna().all()
    for a,b,other,d in zip(*(by_name(c, k) for k in 'abcd')):
        for k in ('losses', 'probs', 'stats', 'split', 'y'): assert a[k]==b[k]==other[k], k
        assert d['losses']!=a['losses'] and d['probs']!=a['probs']
    parts = [c.runs[c.runs.candidate==k].drop(columns=['candidate', 'seconds']).reset_index(drop=True) for k in 'ab']
    pd.testing.assert_frame_equal(*parts, check_exact=True)
    assert 'no difference at all between b and a' in c.verdict.lower()

@pytest.mark.slow
def test_candidates_share_split_weights_batches_and_augmentation(folder):
    "Recorded by the learner itself: the pixels are the same once the normalisation is undone"
    seen = []
    def records(dls):
        learn = learner(dls)
        seen.append(dict(items=list(dls.train_ds.items), valid=list(dls.valid_ds.items),
                         weights=[p.clone() for p in params(learn.model)], x=[], y=[], stats=dls.stats_choice.stats))
        return learn
    def fit(learn, epochs):
        for _ in range(epochs):
            for x,y in learn.dls.train: seen[-1]['x'].append(torch.as_tensor(x)), seen[-1]['y'].append(y)
        learn.fit(1, 0.)
    compared(folder, stats=('imagenet', 'custom'), learner=records, fit=fit, seeds=2, epochs=2,
             block=dict(batch_tfms=aug_transforms(), splitter=RandomSplitter()))
    (a,b),(c,d) = seen[:2],seen[2:]
    assert a['items']!=c['items'] and not torch.equal(a['weights'][0], c['weights'][0])  # other seeds are others
    for p,q in ((a, b), (c, d)):
        assert p['items']==q['items'] and p['valid']==q['valid'] and all(map(torch.equal, p['weights'], q['weights']))
        assert len(p['x'])==len(q['x'])>2 and all(map(torch.equal, p['y'], q['y']))
        def undone(o):
            return torch.cat(o['x'])*torch.tensor(o['stats'].std)[:,None,None] \
                +torch.tensor(o['stats'].mean)[:,None,None]
        assert torch.allclose(undone(p), undone(q),
                              atol=1e-5) and not torch.allclose(torch.cat(p['x']), torch.cat(q['x']), atol=1e-2)

@pytest.mark.slow
def test_statistics_are_those_of_each_training_fold(folder, comparison):
    items = sorted(get_image_files(folder))
    pixels = {f: np.asarray(Image.open(f).convert('RGB').resize((12, 12)), dtype=np.float64)/255 for f in items}
    seen = []
    def records(dls): seen.append(list(dls.train_ds.items)); return learner(dls)
    c = compared(folder, stats=('custom', 'custom-image'), learner=records, seeds=1, folds=3, groups=patient)
    for files,r in zip(seen, c.records):
        x = np.stack([pixels[f] for f in files])
        std = x.std((1,2)).mean(0) if r['candidate']=='custom-image' else x.std((0,1,2))
        np.testing.assert_allclose(r['stats'], [x.mean((0,1,2)), std], rtol=1e-5)
    assert len({str(r['stats']) for r in by_name(c, 'custom')})==3

@pytest.mark.slow
def test_folds_keep_patients_together_and_use_each_image_once(folder):
    seen = []
    def records(dls): seen.append((list(dls.train_ds.items), list(dls.valid_ds.items))); return learner(dls)
    compared(folder, learner=records, seeds=2, groups=patient)  # folds: 5, where groups are given
    assert len(seen)==2*2*5
    for train,valid in seen:
        assert not set(map(patient, train)) & set(map(patient, valid)) and len(train)+len(valid)==48
    for k in (0, 10): assert sorted(sum([v for _,v in seen[k:k+10:2]], []))==sorted(get_image_files(folder))
    assert [v for _,v in seen[:10]]!=[v for _,v in seen[10:]]

def test_random_states_and_the_block_are_left_alone(folder):
    db = block(batch_tfms=[*aug_transforms(), Normalize.from_stats(*imagenet_stats)])
    before = {k: v for k,v in vars(db).items() if k!='type_tfms'}
    tfms,states = list(db.batch_tfms),(random.getstate(), torch.get_rng_state(), str(np.random.get_state()))
    def one_normalize(dls):
        assert all(sum(isinstance(f, Normalize) for f in dl.after_batch.fs)==1 for dl in dls.loaders)
        return learner(dls)
    c = compare_stats(db, folder, one_normalize, seeds=1, **quick)
    assert c.runs.error.isna().all() and list(db.batch_tfms)==tfms and all(vars(db)[k] is v for k,v in before.items())
    assert random.getstate()==states[0] and torch.equal(torch.get_rng_state(),
        states[1]) and str(np.random.get_state())==states[2]

@pytest.mark.slow
def test_a_kept_split_stays(folder):
    db = block(splitter=RandomSplitter()).fit_stats(folder, **quick)
    valid,seen = list(db.dataloaders(folder, num_workers=0).valid_ds.items),[]
    def records(dls): seen.append(list(dls.valid_ds.items)); return learner(dls)
    c = compare_stats(db, folder, records, seeds=2, **quick)
    assert seen==[valid]*4 and 'share one split' in c.verdict

# --- what a run is worth

@pytest.mark.slow
def test_metrics_are_those_of_scikit_learn(folder):
    "On predictions and losses that the test collects itself"
    seen = []
    def fit(learn, epochs):
        learn.fit_one_cycle(epochs)
        values,(p,y) = list(learn.recorder.values),learn.get_preds()
        seen.append((p.numpy().astype(float), y.numpy(), [v[1] for v in values]))
    c = compared(folder, fit=fit, epochs=3, seeds=2, metrics=dict(log_loss=lambda y, p: log_loss(y, p)))
    for (p,y,losses),r,rec in zip(seen, c.runs.itertuples(), c.records):
        one = p[:,1]
        want = dict(best_f1=max(f1_score(y, one>=t) for t in one), f1=f1_score(y, one>=.5),
                    auroc=roc_auc_score(y, one), pr_auc=average_precision_score(y, one),
                    valid_loss=losses[-1], log_loss=log_loss(y, one))
        for k,v in want.items(): np.testing.assert_allclose(getattr(r, k), v, rtol=1e-6, err_msg=k)
        np.testing.assert_allclose(rec['losses'], losses, rtol=1e-6)
        np.testing.assert_allclose(r.valid_loss, log_loss(y, one), rtol=1e-4)

def test_epochs_to_the_reference(comparison):
    for seed,fold in {(r['seed'], r['fold']) for r in comparison.records}:
        rows = comparison.runs.query('seed==@seed and fold==@fold').set_index('candidate').epochs_to_ref
        losses = {r['candidate']: r['losses'] for r in comparison.records if (r['seed'], r['fold'])==(seed, fold)}
        best = min(losses['imagenet'])
        assert rows['imagenet']==losses['imagenet'].index(best)+1
        for k,v in losses.items():
            assert math.isnan(rows[k]) if min(v)>best else v[int(rows[k])-1]<=best \
                and all(o>best for o in v[:int(rows[k])-1])

def test_fine_tune_counts_both_phases(folder):
    def split(dls): return Learner(dls, nn.Sequential(net(8), nn.Linear(8, 2)), CrossEntropyLossFlat(),
                                   splitter=lambda m: [params(m[0]), params(m[1])])
    c = compared(folder, learner=split, fit=Learner.fine_tune, epochs=2, seeds=1)
    assert [len(r['losses']) for r in c.records]==[3, 3]

@pytest.mark.slow
def test_positive_class(folder):
    a,b = (compared(folder, seeds=1, positive=k) for k in ('a', 'b'))
    assert a.classes==['b', 'a'] and b.classes==['a', 'b']
    for r,s in zip(a.records, b.records):
        assert r['y']==[1-o for o in s['y']] and r['probs']==[o[::-1] for o in s['probs']]
    np.testing.assert_allclose(a.runs.auroc, b.runs.auroc, rtol=1e-9)  # which does not depend on it
    assert (a.runs.pr_auc!=b.runs.pr_auc).any()

@pytest.mark.slow
def test_more_than_two_classes(three):
    c = compared(three, seeds=1, folds=2, metrics=dict(shape=lambda y, p: p.shape[1]))
    assert c.classes==['x', 'y', 'z'] and (c.runs['shape']==3).all()
    for r,s in zip(c.runs.itertuples(), c.records):
        y,p = np.array(s['y']),np.array(s['probs'])
        np.testing.assert_allclose(r.auroc, roc_auc_score(y, p/p.sum(1, keepdims=True), multi_class='ovr'), rtol=1e-6)
        np.testing.assert_allclose(r.f1, f1_score(y, p.argmax(1), average='macro'), rtol=1e-9)
    assert len(c.by_recall()) and len(c.plot())==3

@pytest.mark.slow
def test_one_output(folder):
    "A network with a single logit for the positive class"
    def one(dls): return Learner(dls, net(1), BCEWithLogitsLossFlat())
    c = compared(folder, learner=one, seeds=1)
    assert c.runs.error.isna().all() and np.allclose(np.sum(c.records[0]['probs'], 1), 1)

@pytest.mark.slow
def test_train_size_keeps_shares_and_validation(folder, comparison):
    c = compared(folder, seeds=1, folds=3, groups=patient, train_size=16)
    whole = compared(folder, seeds=1, folds=3, groups=patient)
    assert (c.runs.n_train==16).all() and [r['y'] for r in c.records]==[r['y'] for r in whole.records]
    assert [r['ratio'] for r in c.records]==[r['ratio'] for r in whole.records]

# --- what is said of them

def test_table_is_the_corrected_paired_t_interval(comparison):
    "Nadeau & Bengio (2003), by hand"
    table = comparison.table().set_index(['metric', 'candidate'])
    for m in ('best_f1', 'f1', 'auroc', 'pr_auc', 'valid_loss'):
        wide = comparison.runs.pivot_table(index=['seed', 'fold'], columns='candidate', values=m)
        d = (wide['custom']-wide['imagenet']).to_numpy()
        n,row = len(d),table.loc[m, 'custom']
        half = student.ppf(.975, n-1)*math \
            .sqrt((1/n+.5)*d.var(ddof=1))  # three folds: half as many test as training images
        np.testing.assert_allclose([row['mean'], row['diff'], row.ci_low, row.ci_high, row.n],
                                   [wide['custom'].mean(), d.mean(), d.mean()-half, d.mean()+half, 6], rtol=1e-9,
                                   atol=1e-12)
        assert math.isnan(table.loc[m, 'imagenet']['diff'])

def test_interval_holds_what_it_says():
    """Equal classifiers, repeated cross-validation on data drawn anew: the naive interval cries wolf, the corrected
    one does not"""
    naive,corrected,times = 0,0,120
    for k in range(times):
        rng = np.random.default_rng(1000+k)
        y = rng.integers(0, 2, 80)
        x = rng.normal(size=(80, 4))+.7*y[:,None]
        def accuracy(train, test, cols):
            a,b = (x[train][y[train]==c][:,cols].mean(0) for c in (0, 1))
            return (((x[test][:,cols]-(a+b)/2)@(b-a)>0)==y[test]).mean()
        d = [accuracy(a, b, [0, 1])-accuracy(a, b, [2, 3]) for a,
             b in RepeatedStratifiedKFold(n_splits=5, n_repeats=4, random_state=k).split(x, y)]
        for ratio in (0, .25):
            i = corrected_interval(d, ratio)
            if not i.low<=0<=i.high: naive,corrected = (naive+1, corrected) if ratio==0 else (naive, corrected+1)
    assert naive/times>.2 and corrected/times<.1

def test_by_recall(comparison):
    got = comparison.by_recall((.8, 1.)).set_index(['recall', 'candidate'])
    for recall in (.8, 1.):
        want = []
        for r in by_name(comparison, 'custom'):
            precision,found,_ = precision_recall_curve(r['y'], np.array(r['probs'])[:,1])
            want.append(max(precision[found>=recall]))
        np.testing.assert_allclose(got.loc[recall, 'custom'].precision, np.mean(want), rtol=1e-9)

def test_precision_is_drawn_for_each_run_and_averaged_at_each_recall(comparison):
    "Not of all folds together: their networks' scores have no threshold in common"
    ax = comparison.plot()[2]
    recalls = np.linspace(.01, 1, 100)
    for name in comparison.candidates:
        want = []
        for r in by_name(comparison, name):
            precision,found,_ = precision_recall_curve(r['y'], np.array(r['probs'])[:,1])
            want.append([max(precision[found>=v]) for v in recalls])
        drawn = next(line for line in ax.lines if line.get_label()==name)
        np.testing.assert_allclose(drawn.get_ydata(), np.mean(want, 0), rtol=1e-9)
    assert len(ax.lines)==3*(6+1)

def made_up(d, n_splits=9):
    """A comparison of 200 images: `a` ranks three quarters of the positive ones above all others, `b` so many more as
    `d` says"""
    def record(name, seed, right):
        k = round(100*right)
        y,p = [0]*100+[1]*100,np.r_[np.full(100, .4), np.full(k, .9), np.full(100-k, .1)]
        return dict(candidate=name, seed=seed, fold=0, split=str(seed), n_train=400, n_valid=200, ratio=.5,
                    losses=[1., 1-right], seconds=1., y=y, probs=[[1-v, v] for v in p])
    records = [record(k, i, .75+(v if k=='b' else 0)) for i,v in enumerate(d) for k in 'ab']
    return Comparison(records, dict(candidates=['a', 'b'], classes=['no', 'yes'], n_splits=n_splits))

def test_verdicts():
    assert made_up([.1]*4).table('f1')['diff'][1] \
        ==pytest.approx(2*.85/1.85-2*.75/1.75)  # precision 1, recall .85 and .75
    assert 'b is better than a' in made_up([.1, .11, .12, .1]).verdict
    assert 'b is worse than a' in made_up([-.1, -.11, -.12, -.1]).verdict
    equal = made_up([.1, .1, .1]).verdict  # the same each time: no spread to judge by
    assert 'cannot be told from equal numbers' in equal and 'better' not in equal
    none = made_up([.1, -.1, .08, -.08]).verdict
    assert 'No difference seen between b and a' in none and 'would have been seen four times out of five' in none
    assert 'b is better than a: valid_loss -' in made_up([.1, .11, .12, .1]) \
        .verdict_on('valid_loss')  # where less is better
    assert 'One pair of runs says nothing of chance' in made_up([.1]).verdict
    assert 'No difference at all' in made_up([0., 0.]).verdict
    assert 'share one split' in made_up([.1, .11], n_splits=1).verdict

@pytest.mark.slow
def test_power(tmp_path):
    """Statistics far off hurt a random body that is never trained: found, and in the right direction whichever is the
    reference"""
    path = image_folder(tmp_path/'i', n=120, size=12)
    for f in sorted((path/'b').glob('*')): Image.fromarray(np.asarray(Image.open(f))[::-1]//2+70).save(f)
    wrong = ([255*m for m in imagenet_stats[0]], [255*s for s in imagenet_stats[1]])
    def frozen(dls):
        body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(3),
                             nn.Flatten()).requires_grad_(False)
        return Learner(dls, nn.Sequential(body, nn.Linear(144, 2)), CrossEntropyLossFlat())
    c = compare_stats(block(), path, frozen, stats=dict(imagenet='imagenet', wrong=wrong), seeds=2, folds=4, epochs=3,
                      fit=lambda learn, n: learn.fit_one_cycle(n, .03), **quick)
    other = Comparison(c.records, {**c.setup, 'candidates': ['wrong', 'imagenet']})
    for m in ('best_f1', 'valid_loss'):
        assert 'wrong is worse than imagenet' in c.verdict_on(m)
        assert 'imagenet is better than wrong' in other.verdict_on(m)

# --- kept, resumed, failed

class Counting:
    "A learner that counts its runs, and fails or is interrupted in some"
    def __init__(self, fail=None): self.made,self.fail = [],fail or (lambda dls, k: None)
    def __call__(self, dls):
        self.made.append(dls.stats_choice.kind)
        self.fail(dls, len(self.made))
        return learner(dls)

def interrupted(images, tmp_path, at, **kwargs):
    def stop(dls, k):
        if k==at: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): compared(images, learner=Counting(stop), folder=tmp_path/'runs', **kwargs)

@pytest.fixture
def same_learner(monkeypatch):
    "Counting learners do the same whatever they have counted, which their description cannot know"
    monkeypatch.setattr('fastai_normstats.compare.core.plan_of', lambda *args, **kwargs: {'learner': 'the same'})

@pytest.mark.slow
def test_goes_on_after_an_interruption(folder, tmp_path, same_learner):
    kwargs = dict(seeds=2, folds=2)
    whole = compared(folder, **kwargs)
    interrupted(folder, tmp_path, 6, **kwargs)
    assert len(list((tmp_path/'runs').glob('run-*.json')))==5
    rest = Counting()
    c = compared(folder, learner=rest, folder=tmp_path/'runs', **kwargs)
    assert len(rest.made)==3
    pd.testing.assert_frame_equal(c.runs.drop(columns='seconds'), whole.runs.drop(columns='seconds'), check_exact=True)
    none = Counting()
    assert compared(folder, learner=none, folder=tmp_path/'runs', **kwargs).runs.equals(c.runs) and not none.made

@pytest.mark.slow
def test_seeds_and_candidates_are_added(folder, tmp_path, same_learner):
    counts = []
    for stats,seeds in ((('imagenet', 'custom'), 1), (('imagenet', 'custom'), 2),
                        (('imagenet', 'custom', 'custom-image'), 2), (('custom', 'imagenet'), [1])):
        count = Counting()
        c = compared(folder, learner=count, stats=stats, seeds=seeds, folder=tmp_path/'runs')
        counts.append(len(count.made))
        assert len(c.runs)==len(stats)*(seeds if isinstance(seeds, int) else 1) and c.reference==stats[0]
    assert counts==[2, 2, 2, 0]

@pytest.mark.slow
@pytest.mark.parametrize('change', ['epochs', 'learner', 'fit', 'loaders', 'transforms', 'labels', 'statistics',
                                    'folds', 'groups',
                                    'train_size'])
def test_runs_of_another_comparison_are_not_mixed_in(folder, tmp_path, change):
    def other(dls): return Learner(dls, net(2), CrossEntropyLossFlat(), lr=.1)
    changed = dict(epochs=dict(epochs=2), learner=dict(learner=other), fit=dict(fit=Learner.fit_flat_cos),
                   loaders=dict(bs=6),
                   transforms=dict(block=dict(item_tfms=Resize(14))),
                   labels={}, statistics=dict(tol=0), folds=dict(folds=3), groups=dict(groups=patient),
                   train_size=dict(train_size=20))[change]
    source = folder
    compared(source, seeds=1, folds=2, folder=tmp_path/'runs')
    before = {f: f.read_bytes() for f in (tmp_path/'runs').iterdir()}
    if change=='labels': changed = dict(block=dict(get_y=lambda f: str(int(f.stem)%2)))
    def ask(**kwargs):
        if change!='labels': return compared(source, seeds=1, folds=2,
                                             folder=tmp_path/'runs') if not kwargs \
            else compared(source, **{**dict(seeds=1, folds=2, folder=tmp_path/'runs'), **kwargs})
        db = DataBlock((ImageBlock, CategoryBlock), get_items=lambda p: sorted(get_image_files(p)),
                       get_y=lambda f: 'ab'[int(f.stem)//24], item_tfms=Resize(12))
        return compare_stats(db, source, learner, seeds=1, folds=2, folder=tmp_path/'runs', **quick)
    with pytest.raises(ValueError, match=rf'another comparison \(different: [a-z_, ]*\b{change}\b'): ask(**changed)
    assert {f: f.read_bytes() for f in (tmp_path/'runs').iterdir()}==before

@pytest.mark.slow
def test_a_failing_run_loses_nothing(folder, tmp_path, same_learner):
    "It is recorded with its error, the others go on, and it is made again when asked again"
    def fail(dls, k):
        if k==2: raise RuntimeError('out of memory\nand more')
    with pytest.warns(UserWarning, match='1 of 3 runs of custom failed, the first with RuntimeError: out of memory$'):
        c = compared(folder, learner=Counting(fail), seeds=3, folder=tmp_path/'runs')
    bad = c.runs[c.runs.error.notna()]
    assert len(c.runs)==6 and bad.candidate.tolist()==['custom'] and bad.error.item()=='RuntimeError: out of memory'
    assert bad.auroc.isna().all()
    assert c.table('auroc').n.tolist()==[3, 2] and '1 of 6 runs failed' in c.verdict
    assert 'Traceback' in next(r for r in c.records if r.get('error'))['traceback']
    again = Counting()
    assert compared(folder, learner=again, seeds=3,
                    folder=tmp_path/'runs').runs.error.isna().all() and again.made==['custom']

@pytest.mark.slow
def test_a_network_that_is_used_again_is_refused(folder):
    "It would go on from what it learnt under the candidate before"
    body = net(8)
    for again in (lambda dls: Learner(dls, body, CrossEntropyLossFlat()),
                  lambda dls: Learner(dls, nn.Sequential(body, nn.Linear(8, 2)), CrossEntropyLossFlat())):
        with pytest.warns(UserWarning, match='starts from other weights'): c = compared(folder, learner=again, seeds=1)
        assert c.runs.error.notna().tolist()[1]

def test_all_fail(folder):
    def never(dls): raise OSError('disk on fire')
    with pytest.warns(UserWarning): c = compared(folder, learner=never, seeds=1)
    assert c.runs.error.eq('OSError: disk on fire').all() and 'nothing can be said of custom' in c.verdict.lower()
    assert 'disk on fire' not in repr(c.plot())

def test_a_candidate_that_cannot_be_applied_is_its_own_failure(folder):
    with pytest.warns(UserWarning, match='2 channels|channels'):
        c = compared(folder, stats=dict(imagenet='imagenet', two=([.5]*2, [.5]*2)), seeds=1)
    assert c.runs.set_index('candidate').error.notna().to_dict()==dict(imagenet=False, two=True)

@pytest.mark.slow
def test_a_run_that_diverges_is_said(folder):
    def diverges(learn, epochs):
        learn.fit(epochs)
        if learn.dls.stats_choice.kind=='custom': learn.model[-1].weight.data.fill_(math.nan)
    with pytest.warns(UserWarning, match='diverged'): c = compared(folder, fit=diverges, seeds=2)
    assert c.runs[c.runs.candidate=='custom'].error.str.contains('diverged').all()
    assert c.runs[c.runs.candidate=='imagenet'].error.isna().all()

@pytest.mark.slow
def test_full_disk_costs_no_run(folder, tmp_path, monkeypatch):
    def full(path, d): raise OSError(28, 'No space left on device')
    compared(folder, seeds=1, folder=tmp_path)
    monkeypatch.setattr('fastai_normstats.compare.runs.write_json', full)
    with pytest.warns(UserWarning, match='cannot keep a finished run'): d = compared(folder, seeds=2, folder=tmp_path)
    assert d.runs.error.isna().all() and len(d.runs)==4

def test_save_and_load(comparison, tmp_path):
    again = Comparison.load(comparison.save(tmp_path/'c.json'))
    pd.testing.assert_frame_equal(again.runs, comparison.runs, check_exact=True)
    pd.testing.assert_frame_equal(again.table(), comparison.table())
    assert again.verdict==comparison.verdict and again.classes==comparison.classes

# --- found by trying to break it

@pytest.mark.slow
def test_callbacks_find_nothing_of_another_run(folder):
    "A run that diverges would be given the weights that `SaveModelCallback` kept in the run before"
    def wild(dls): return Learner(dls, nn.Sequential(Cubed(), nn.Flatten(), nn.Linear(432, 2)), CrossEntropyLossFlat(),
                                  cbs=SaveModelCallback())
    with pytest.warns(UserWarning, match='runs of wild failed'): c = compared(folder, learner=wild,
        stats=dict(ok='imagenet', wild=([.5]*3, [1e-15]*3)), seeds=2, epochs=2)
    assert c.runs.groupby('candidate').error.agg(lambda o: o.notna().sum()).to_dict()==dict(ok=0, wild=2)
    assert not Path('models').exists() and not (folder/'models').exists()

class Cubed(nn.Module):
    def forward(self, x): return x**3

@pytest.mark.slow
def test_groups_as_a_dict_or_a_series(folder):
    files = sorted(get_image_files(folder))
    splits = [[r['split'] for r in compared(folder, seeds=1, folds=3, groups=g).records]
              for g in (patient, {f: patient(f) for f in files}, pd.Series(map(patient, files)).tolist())]
    assert splits[0]==splits[1]==splits[2]
    with pytest.raises(ValueError, match='another index'):
        compared(folder, seeds=1, groups=pd.Series(map(patient, files)))
    with pytest.raises(ValueError, match='no group'): compared(folder, seeds=1, groups={files[0]: 1})

class OwnNoise(Transform):
    "Draws from a generator of its own, as some libraries of augmentation do"
    order = 20
    def __init__(self): super().__init__(); self.rng = np.random.default_rng(0)
    def encodes(self, x:TensorImage): return x+self.rng.normal()*.1

@pytest.mark.slow
def test_transforms_with_a_generator_of_their_own(folder):
    c = compared(folder, stats=dict(a='imagenet', b=imagenet_stats), seeds=1, folds=2,
                 block=dict(batch_tfms=OwnNoise()))
    for a,b in zip(by_name(c, 'a'), by_name(c, 'b')): assert a['losses']==b['losses'] and a['probs']==b['probs']

@pytest.mark.slow
@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss(), F.cross_entropy, CrossEntropyLossFlat(), nn.NLLLoss()])
def test_losses_whose_predictions_are_understood(folder, loss):
    "Each gives the probabilities of the same network"
    def one(dls): return Learner(dls, nn.Sequential(net(), nn.LogSoftmax(1))
                                 if isinstance(loss, nn.NLLLoss) else net(), loss)
    want = compared(folder, seeds=1).records[0]['probs']
    np.testing.assert_allclose(compared(folder, learner=one, seeds=1).records[0]['probs'], want, atol=1e-5)

@pytest.mark.slow
def test_a_loss_that_does_not_say_what_it_takes(folder):
    "Twice a sigmoid would put every probability above one half"
    def own(p, y): return F.binary_cross_entropy(p.flatten(), y.float().flatten())
    def sigmoid(dls): return Learner(dls, nn.Sequential(net(1), nn.Sigmoid()), own)
    with pytest.warns(UserWarning, match="loss function 'own' does not say how"): c = compared(folder, learner=sigmoid,
        seeds=1)
    own.activation = lambda p: p
    assert c.runs.error.notna().all() and compared(folder, learner=sigmoid, seeds=1).runs.error.isna().all()

def test_one_number_an_image_without_an_axis(folder):
    class Flat(nn.Module):
        def __init__(self): super().__init__(); self.net = net(1)
        def forward(self, x): return self.net(x).squeeze(1)
    c = compared(folder, learner=lambda dls: Learner(dls, Flat(), BCEWithLogitsLossFlat()), seeds=1)
    assert c.runs.error.isna().all()

@pytest.mark.slow
def test_directions_of_a_metric_of_ones_own(comparison):
    records = [dict(r, metrics=dict(brier=.1*(r['candidate']=='custom')+.01*i)) for i,
               r in enumerate(comparison.records)]
    said = Comparison(records, comparison.setup).verdict_on('brier')
    assert 'custom is higher than imagenet' in said and 'better' not in said

def test_epochs_to_a_loss_that_some_runs_never_reach():
    c = made_up([.1, .1, .1])
    for r,losses in zip(c.records, [[.5, .4], [.3, .3], [.5, .4], [.5, .45], [math.nan, .4],
                                    [.4, .3]]): r['losses'] = losses
    d = Comparison(c.records, c.setup)
    assert d.runs[d.runs.candidate=='b'].epochs_to_ref.fillna(-1).tolist()==[1, -1, 1]
    assert d.runs[d.runs.candidate=='a'].epochs_to_ref.tolist()==[2, 2, 2]
    row = d.table('epochs_to_ref').iloc[1]
    assert math.isnan(row['mean']) and math.isnan(row['diff'])
    assert 'no number in 1 and 0 of their runs' in d.verdict_on('epochs_to_ref')

@pytest.mark.parametrize('how', ['overlap', 'twice'])
def test_an_image_on_both_sides_is_refused(folder, how):
    kwargs = dict(overlap=dict(splitter=lambda o: (range(48), range(0, 48, 3))), twice={})[how]
    db = DataBlock((ImageBlock, CategoryBlock), get_items=lambda p: sorted(get_image_files(p))*(1+(how=='twice')),
                   get_y=parent_label, item_tfms=Resize(12), **kwargs)
    with pytest.raises(ValueError, match=r'\.png in training and in validation'):
        compare_stats(db, folder, learner, seeds=1, **quick)

@pytest.mark.slow
def test_a_network_that_was_not_trained_is_said(folder):
    assert 'no weight changed' in compared(folder, seeds=1, bs=64).verdict
    assert 'no weight changed' not in compared(folder, seeds=1).verdict

_n_out,_brighter = 2,0.

def with_global(n):
    def learner(dls): return Learner(dls, net(_n_out), CrossEntropyLossFlat())
    return learner
def with_closure(n):
    def learner(dls): return Learner(dls, net(), CrossEntropyLossFlat(), lr=n/100)
    return learner
def with_lambda(n):
    def learner(dls): return [Learner(dls, net(), CrossEntropyLossFlat(), lr=lr()) for lr in [lambda: n/100]][0]
    return learner
def with_default(n):
    def learner(dls, lr=n/100): return Learner(dls, net(), CrossEntropyLossFlat(), lr=lr)
    return learner
def _with(dls, n): return Learner(dls, net(), CrossEntropyLossFlat(), lr=n/100)
def with_partial(n): return partial(_with, n=n)
class WithAttribute:
    def __init__(self, n): self.n = n
    def __call__(self, dls): return _with(dls, self.n)

@pytest.mark.slow
@pytest.mark.parametrize('make', [with_global, with_closure, with_lambda, with_default, with_partial, WithAttribute])
def test_a_learner_is_told_by_the_values_that_it_names(folder, tmp_path, monkeypatch, make):
    "The same code with another number is another learner, as after a cell was edited; with the same one it goes on"
    def ask(n): return compared(folder, learner=make(n), seeds=1, folder=tmp_path/'runs')
    ask(2)
    before = {f: f.read_bytes() for f in (tmp_path/'runs').iterdir()}
    ask(2)
    assert {f: f.read_bytes() for f in (tmp_path/'runs').iterdir()}==before
    monkeypatch.setitem(globals(), '_n_out', 3)
    with pytest.raises(ValueError, match=r'another comparison \(different: learner\)'): ask(3)

@pytest.mark.slow
def test_a_learner_that_holds_what_has_no_plain_value(folder, tmp_path):
    "An open file, a lock: they are told by their class, and nothing fails or warns for that"
    def made():
        lock,file = threading.Lock(),open(__file__)
        def learner(dls):
            with lock: return Learner(dls, net(), CrossEntropyLossFlat()) if not file.closed else None
        return learner,file
    (first, f),(second, g) = made(),made()
    with f, g, warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*cannot be told')
        a,b = (compared(folder, learner=o, seeds=1, folder=tmp_path/'runs') for o in (first, second))
    assert a.runs.equals(b.runs)

_plan = '''
import json,sys
sys.path.insert(0, {here!r})
from test_compare import *
from fastai_normstats.compare.runs import gather,plan_of
data = gather(block(batch_tfms=aug_transforms()), {folder!r}, patient, dict(bs=8, num_workers=0))
own = dict(mask=lambda x: x[:, :1]>0, tol=.02)
print('PLAN', json.dumps(plan_of(data, with_closure(2), own, 3, None, Learner.fit_one_cycle, epochs=1)))
'''

@pytest.mark.slow
def test_a_plan_is_the_same_in_every_process(folder):
    "Whatever order sets have there: runs are found again tomorrow"
    script,plans = _plan.format(here=str(Path(__file__).parent), folder=str(folder)),[]
    for seed in '12':
        res = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True,
                             env={**os.environ, 'PYTHONHASHSEED': seed, 'OMP_NUM_THREADS': seed})
        assert res.returncode==0, res.stderr[-2000:]
        plans.append(json.loads(res.stdout.split('PLAN ')[1]))
    a,b = (p.pop('images') for p in plans)
    assert plans[0]==plans[1] and len(a['keys'])==16 and a['keys']==b['keys']
    for k in ('first', 'second'): np.testing.assert_allclose(a[k], b[k], atol=1e-5)

def brightened(x:TensorImage): return x+_brighter

@pytest.mark.slow
@pytest.mark.parametrize('change', ['items', 'images'])
def test_runs_on_other_images_are_not_mixed_in(tmp_path, monkeypatch, change):
    "A file more; or the same files and the same code, and what it names has changed"
    path = image_folder(tmp_path/'images', n=24, size=12)
    tfms = dict(batch_tfms=[Transform(brightened, order=20)])
    def ask(): return compared(path, seeds=1, folds=2, folder=tmp_path/'runs', block=tfms)
    first = ask()
    assert ask().runs.equals(first.runs)
    if change=='items': Image.open(path/'a'/'000.png').rotate(90).save(path/'a'/'100.png')
    else: monkeypatch.setitem(globals(), '_brighter', .05)
    with pytest.raises(ValueError, match=rf'another comparison \(different: [a-z_, ]*\b{change}\b'): ask()

@pytest.mark.slow
def test_images_that_cannot_be_told_are_warned_of(folder, tmp_path):
    "Also where nothing is printed: whether they have changed must be known by the author"
    with pytest.warns(UserWarning, match='whether data changes .*two different pictures'):
        compared(folder, seeds=1, folder=tmp_path/'runs', block=dict(batch_tfms=OwnNoise()))

@pytest.mark.slow
def test_groups_are_the_unit_of_what_is_measured(folder):
    seen = []
    def records(dls): seen.append(dls); return learner(dls)
    compared(folder, stats=('custom', 'imagenet'), learner=records, seeds=1, folds=3, groups=patient, train_size=20)
    for dls in seen[::2]:
        m = dls.stats_choice.measured
        assert m.grouped and m.n_images==20 and m.n_groups==len(set(map(patient, dls.train_ds.items)))

def test_a_metric_that_fails_loses_nothing(folder):
    bad = dict(zero=lambda y, p: 1/0, many=lambda y, p: p)
    with pytest.warns(UserWarning, match="metric 'zero' failed"): c = compared(folder, seeds=1, metrics=bad)
    assert c.runs.error.isna().all() and c.runs.zero.isna().all() and c.runs.many.isna().all()
    assert c.runs.auroc.notna().all()
    assert 'no number' in c.verdict_on('zero')

@pytest.mark.slow
@pytest.mark.parametrize('fit', ['lr_find', 'validate', 'no valid metrics'])
def test_losses_are_counted_whatever_fit_does(folder, fit):
    def train(learn, epochs):
        if fit=='lr_find': learn.lr_find(show_plot=False, num_it=10)
        if fit=='validate': learn.validate()
        if fit=='no valid metrics': learn.recorder.valid_metrics = False
        learn.fit(epochs)
    c = compared(folder, seeds=1, epochs=2, fit=train)
    assert c.runs.error.isna().all()
    for r in c.records:
        assert len(r['losses'])==2
        np.testing.assert_allclose(r['losses'][-1], log_loss(r['y'], np.array(r['probs'])[:,1]), rtol=1e-4)

@pytest.mark.slow
def test_tables_and_pictures_where_a_candidate_failed(folder):
    with pytest.warns(UserWarning): c = compared(folder, stats=dict(imagenet='imagenet', two=([.5]*2, [.5]*2),
        custom='custom'), seeds=1, folds=2)
    assert c.by_recall((.9,)).precision.isna().tolist()==[False, True, False]
    labels = [t.get_text() for t in c.plot()[0].figure.legends[0].get_texts()]
    assert labels==['imagenet', 'two (no run finished)', 'custom']

@pytest.mark.slow
def test_pictures_of_many_candidates_with_long_names(folder):
    many = {f'candidate number {i} with a long name and $x_1$': 'imagenet' for i in range(9)}
    c = compared(folder, stats=many, seeds=1)
    ax = c.plot()[0]
    ax.figure.canvas.draw()
    legend = ax.figure.legends[0].get_window_extent()
    assert legend.x0>=0 and legend.x1<=ax.figure.bbox.width and len({c._color(k) for k in many})==9
    labels = [t for a in (c.plot(list(many)[1:3]), ) for t in a[0].get_yticks()]
    assert labels[0]==.5  # in the middle of its two rows, the reference not among them

@pytest.mark.slow
def test_a_home_folder_and_a_run_without_predictions(folder, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    c = compared(folder, seeds=1, folder='~/runs')
    file = sorted((tmp_path/'runs').glob('run-*'))[0]
    file.write_text(json.dumps({k: v for k,v in json.loads(file.read_text()).items() if k!='probs'}))
    with pytest.warns(UserWarning, match="it lacks 'probs'"): again = compared(folder, seeds=1, folder='~/runs')
    pd.testing.assert_frame_equal(c.runs.drop(columns='seconds'), again.runs.drop(columns='seconds'))

# --- other inputs

@pytest.mark.slow
def test_a_table_with_a_column_of_patients(folder):
    files = sorted(get_image_files(folder))
    df = pd.DataFrame(dict(file=list(map(str, files)), label=[f.parent.name for f in files],
                           who=list(map(patient, files))), index=range(100, 148))
    db = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('file'), get_y=ColReader('label'), item_tfms=Resize(12))
    a = compare_stats(db, df, learner, groups='who', folds=3, seeds=1, **quick)
    b = compared(folder, groups=patient, folds=3, seeds=1)
    pd.testing.assert_frame_equal(a.runs.drop(columns='seconds'), b.runs.drop(columns='seconds'), check_exact=True)

@pytest.mark.slow
def test_models_and_words_as_candidates(folder):
    c = compared(folder, stats=['pretrained', 'auto', 'rad-dino', 'imagenet', ([.5]*3, [.5]*3)], model='siglip',
                 seeds=1)
    stats = {r['candidate']: (r['rule'], r['stats'][0][0]) for r in c.records}
    assert stats=={'pretrained': ('given', .5), 'auto': ('small', .5), 'rad-dino': ('given', .5307),
                   'imagenet': ('given', .485), '0.5 / 0.5': ('given', .5)}

@pytest.mark.slow
def test_what_the_guards_say_is_said_once_a_candidate(folder):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        compared(folder, stats=('imagenet', 'custom'), seeds=3, bs=64)
    mine = [str(w.message) for w in said if 'custom: ' in str(w.message)]
    assert len(mine)==1 and 'batch' in mine[0]

@pytest.mark.parametrize('kwargs,says', [
    (dict(stats='custom'), 'at least two'), (dict(stats={'imagenet', 'custom'}), 'must be a list'),
    (dict(stats=None), 'must be a list'), (dict(folder=''), 'empty name'),
    (dict(metrics=dict(auroc=max)), 'there already'), (dict(seed=3), 'say `seeds`'),
    (dict(train_size=8.), '`train_size`'), (dict(groups=lambda f: pd.NA), 'no group'),
    (dict(stats=('custom', 'costum')), 'costum'), (dict(stats=('custom', None)), 'None'), (dict(seeds=[]), '`seeds`'),
    (dict(seeds=1.5), '`seeds`'), (dict(seeds=[0, -1]), '`seeds`'), (dict(folds=0), '`folds`'),
    (dict(folds=25), 'cannot make|no validation image|no training image'), (dict(epochs=1.), '`epochs`'),
    (dict(train_size=47, folds=2), '`train_size`'), (dict(train_size=1, folds=2), '`train_size`'),
    (dict(positive='c'), "'a', 'b'"), (dict(groups=lambda f: None), 'no group'),
    (dict(groups=lambda f: 'one', folds=3), 'group|image of class'), (dict(policy='small'), 'Policy'),
    (dict(worker=2), 'no keyword'), (dict(learner='resnet18'), 'function'),
    (dict(block=dict(splitter=lambda o: (range(len(o)), []))), 'no validation images'),
    (dict(block=dict(splitter=IndexSplitter(range(24)))), "no training image of class 'a'")])
def test_bad_input_before_anything_is_trained(folder, kwargs, says):
    made = Counting()
    with pytest.raises((ValueError, TypeError),
                       match=says) as e: compared(folder, **{'learner': made, 'seeds': 1, **kwargs})
    assert '\n' not in str(e.value) and not made.made

def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match='no items found'): compared(tmp_path)

# --- the command

@pytest.mark.slow
def test_command(folder, tmp_path, capsys):
    args = ['compare', str(folder), '--scratch', '--size', '32', '--epochs', '1', '--folds', '2', '--bs', '8',
            '--group', r'(\d\d)\d', '--positive', 'a', '--folder', str(tmp_path/'runs'),
            '--out', str(tmp_path/'c.json'), '--plot', str(tmp_path/'c.png'), '--stats', 'imagenet', 'custom-image']
    assert main(args)==0
    out = capsys.readouterr().out
    c = Comparison.load(tmp_path/'c.json')
    assert c.verdict in out and c.candidates==['imagenet', 'custom-image'] and c.classes==['b', 'a']
    assert len(c.runs)==4 and (tmp_path/'c.png').stat().st_size>5000
    assert main(args)==0 and len(list((tmp_path/'runs').glob('run-*')))==4
    assert '24 a, 24 b' in out
    before = {f: f.stat().st_mtime_ns for f in (tmp_path/'runs').glob('run-*')}
    assert main([*args, '--seeds', '2'])==0  # what was run is not run again
    assert len(list((tmp_path/'runs').glob('run-*')))==8 and all(f.stat().st_mtime_ns==t for f,t in before.items())
    assert main(args)==0
    assert Comparison.load(tmp_path/'c.json').runs.equals(c.runs)

def test_command_without_weights(folder, capsys, monkeypatch):
    "No network, no weights: one line, before anything is trained"
    monkeypatch.setattr('torchvision.models._api.WeightsEnum.get_state_dict', lambda *args,
                        **kwargs: (_ for _ in ()).throw(OSError('no route to host')))
    assert main(['compare', str(folder)])==1
    err = capsys.readouterr().err
    assert err.count('\n')==1 and 'cannot get the pretrained weights of resnet18' in err and '--scratch' in err

@pytest.mark.slow
def test_command_where_every_run_fails(folder, tmp_path, capsys, monkeypatch):
    def broken(*args, **kwargs): raise RuntimeError('no more memory')
    monkeypatch.setattr('fastai.vision.learner.vision_learner', broken)
    assert main(['compare', str(folder), '--scratch', '--size', '32', '--folds', '2', '--plot',
                 str(tmp_path/'c.png')])==1
    assert 'no run finished, the first failed with RuntimeError: no more memory' in capsys.readouterr().err
    assert not (tmp_path/'c.png').exists()

# --- networks that learned nothing

def test_networks_that_learned_nothing_are_said(tmp_path):
    path = image_folder(tmp_path/'i', n=60, size=12)
    files = sorted(get_image_files(path))
    labels = dict(zip(files, np.random.default_rng(0).permutation(len(files))%2))
    db = DataBlock((ImageBlock, CategoryBlock), get_items=lambda p: files, get_y=lambda f: labels[f],
                   item_tfms=Resize(12))
    with pytest.warns(UserWarning, match='No candidate learned anything'):
        c = compare_stats(db, path, learner, seeds=1, folds=3, fit=lambda learn, n: learn.fit(n, 1e-6), **quick)
    assert 'No candidate learned anything (auroc 0.' in c.verdict

def test_networks_that_learned_are_not_said_to_know_nothing():
    assert 'learned' not in made_up([.1, .11, .12, .1]).verdict

# --- items in memory

def decoded(folder, **kwargs):
    "A comparison, and how often each file was decoded for it"
    count = {}
    def create(f):
        count[f] = count.get(f, 0)+1
        return PILImage.create(f)
    db = DataBlock((TransformBlock(type_tfms=create, batch_tfms=IntToFloatTensor), CategoryBlock),
                   get_items=lambda p: sorted(get_image_files(p)), get_y=parent_label, batch_tfms=aug_transforms(),
                   item_tfms=kwargs.pop('tfms', [Resize(12)]), splitter=RandomSplitter(seed=1))
    c = compare_stats(db, folder, learner, seeds=1, folds=2, epochs=2, **{**quick, **kwargs})
    assert c.runs.error.isna().all()
    return c,count

def test_items_are_decoded_once_and_runs_stay_the_same(folder):
    kept,few = decoded(folder)
    read,many = decoded(folder, cache_items=False)
    assert len(few)==len(many)==48 and sum(few.values())<3*48<8*48<sum(many.values())
    assert kept.runs.drop(columns='seconds').equals(read.runs.drop(columns='seconds'))
    assert [r['probs'] for r in kept.records]==[r['probs'] for r in read.records]

class Blackened(Transform):
    "Draws into the image that it is given"
    order = -1
    def encodes(self, x:PILImage): x.paste((0, 0, 0), (0, 0, 6, 6)) if random.random()<.5 else None; return x

def test_transforms_that_draw_into_an_image_spoil_none(folder):
    kept,_ = decoded(folder, tfms=[Blackened(), Resize(12)])
    read,_ = decoded(folder, tfms=[Blackened(), Resize(12)], cache_items=False)
    assert [r['probs'] for r in kept.records]==[r['probs'] for r in read.records]

def test_what_does_not_fit_or_is_drawn_is_not_kept(folder, monkeypatch):
    from fastai_normstats.compare.runs import gather,keep_items
    def kept(db, cache_items=None, **kwargs):
        data = gather(db, folder, loaders=dict(num_workers=0, **kwargs))
        keep_items(data, cache_items)
        return data.kept and len([o for o in data.kept if o is not None])
    assert kept(block())==48
    noise = block(); noise.getters = [lambda f: np.random.randint(0, 255, (9, 9, 3), dtype=np.uint8), parent_label]
    assert kept(noise) is None
    with pytest.raises(ValueError, match='reading an item twice gives two different ones'): kept(noise, True)
    assert kept(block(), False) is None
    monkeypatch.setattr('fastai_normstats.compare.runs._room', 1000)
    assert kept(block()) is None and kept(block(), True)==48
    with pytest.raises(TypeError, match='`cache_items` must be True, False or None'): compared(folder, cache_items=1)

class BySplit(Transform):
    "Acts on training images alone, without saying so beforehand"
    def __call__(self, b, split_idx=None, **kwargs):
        self.train = split_idx==0
        return super().__call__(b, split_idx=split_idx, **kwargs)
    def encodes(self, x:PILImage): return PILImage.create(255-np.array(x)) if self.train else x

def test_items_that_differ_in_training_are_not_kept(folder):
    from fastai_normstats.compare.runs import gather,keep_items
    db = block()
    db.type_tfms[0] = [*db.type_tfms[0], BySplit()]
    data = gather(db, folder, loaders=dict(num_workers=0))
    keep_items(data)
    assert data.kept is None
    with pytest.raises(ValueError, match='training and validation images read differently'): keep_items(data, True)

def test_kept_items_are_not_pickled(folder):
    import copy,pickle
    from fastai_normstats.compare.runs import gather,keep_items
    data = gather(block(get_x=None), folder, loaders=dict(num_workers=0))
    keep_items(data)
    dset = data.dls(list(range(40)), list(range(40, 48))).valid.dataset
    for again in (copy.copy(dset), pickle.loads(pickle.dumps(dset))):
        assert type(again) is type(dset).__bases__[1] and '_kept' not in vars(again)
        assert np.array_equal(again[3][0], dset[3][0]) and again[3][1]==dset[3][1]

def test_progress_is_shown_on_a_console(folder, capsys):
    c = compared(folder, seeds=1, folds=2, verbose=True)
    assert c.runs.error.isna().all() and 'epoch 1' in capsys.readouterr().out

def test_runs_are_found_again_whether_items_are_kept_or_not(folder, tmp_path):
    kwargs = dict(seeds=1, folds=2, folder=tmp_path/'runs')
    c = compared(folder, **kwargs)
    assert compared(folder, cache_items=False, **kwargs).records==c.records

def test_arrays_as_items(tmp_path):
    "Their names are abbreviated by numpy: what differs in the middle looks the same"
    x = np.zeros((24, 40, 40, 3), np.uint8)
    x[:, 16:24, 16:24] = np.random.default_rng(0).integers(1, 255, (24, 8, 8, 3))
    x[::2, 16, 16] = 0
    db = DataBlock((ImageBlock, CategoryBlock), get_y=lambda a: int(a[16, 16, 0]>0), item_tfms=Resize(12))
    state = random.getstate()
    c = compare_stats(db, list(x), learner, seeds=1, folds=2, folder=tmp_path/'runs', **quick)
    assert c.runs.error.isna().all() and random.getstate()==state

def test_a_damaged_run_is_made_again(folder, tmp_path):
    kwargs = dict(seeds=1, folds=2, folder=tmp_path/'runs')
    c = compared(folder, **kwargs)
    for k,damage in zip(sorted((tmp_path/'runs').glob('run-*')), (dict(losses=None), dict(probs=[]))):
        k.write_text(json.dumps({**json.loads(k.read_text()), **damage}))
    with pytest.warns(UserWarning, match='is damaged.*made again'): again = compared(folder, **kwargs)
    assert again.runs.drop(columns='seconds').equals(c.runs.drop(columns='seconds'))

def test_a_broken_image_is_a_failure_of_its_runs(tmp_path):
    path = image_folder(tmp_path/'i', n=24, size=12)
    sorted((path/'a').glob('*'))[3].write_bytes(b'no image')
    with pytest.warns(UserWarning, match='runs of'): c = compared(path, seeds=1, folds=2, cache_items=True)
    assert len(c.runs)==4 and c.runs.error.notna().any()

# --- masks

def blobs(i):
    "A picture and its mask: bright squares of class 1, dark ones of class 2, on grey"
    rng = np.random.default_rng(i)
    x,y = np.full((16, 16, 3), 120, np.uint8),np.zeros((16, 16), np.uint8)
    for c,v in ((1, 220), (2, 30)):
        a,b = rng.integers(0, 11, 2)
        x[a:a+5, b:b+5],y[a:a+5, b:b+5] = v,c
    return (x+rng.integers(0, 20, x.shape)).astype(np.uint8),y

def masked(get_y=lambda i: blobs(i)[1], codes=('none', 'bright', 'dark')):
    return DataBlock((ImageBlock, MaskBlock(list(codes))), get_x=lambda i: blobs(i)[0], get_y=get_y,
                     splitter=RandomSplitter(seed=0))

def pixel_learner(dls, loss=None):
    return Learner(dls, nn.Conv2d(3, 3, 3, padding=1), loss or CrossEntropyLossFlat(axis=1))

def fit_masks(learn, n): learn.fit(n, .1)

def segmented(**kwargs):
    return compare_stats(kwargs.pop('block', masked()), range(24), kwargs.pop('learner', pixel_learner),
                         **{**quick, 'fit': fit_masks, 'epochs': 8, 'seeds': 1, 'folds': 2, **kwargs})

def test_dice_of_masks(tmp_path):
    seen = []
    def fit(learn, n):
        fit_masks(learn, n)
        p,y = learn.get_preds(dl=learn.dls.valid)
        seen.append((p.argmax(1).numpy(), y.numpy()))
    c = segmented(fit=fit)
    for r,(p,y) in zip(c.records, seen):
        want = []
        for a,b in zip(p, y):
            each = [2*((a==k) & (b==k)).sum()/((a==k).sum()+(b==k).sum()) for k in (1, 2) if ((a==k) | (b==k)).any()]
            want.append(np.mean(each))
        np.testing.assert_allclose(r['dice'], want, rtol=1e-9)
    np.testing.assert_allclose(c.runs.dice, [np.mean(r['dice']) for r in c.records])
    assert c.runs.dice.min()>.5 and 'dice' in c.verdict and 'learned' not in c.verdict
    assert [t.get_text() for t in c.plot()[0].get_yticklabels()]==['dice'] and len(c.plot())==2
    assert {*c.table().metric}=={'dice', 'valid_loss', 'epochs_to_ref', 'seconds'} and 'without background' in repr(c)
    again = Comparison.load(c.save(tmp_path/'c.json'))
    assert again.verdict==c.verdict and again.runs.equals(c.runs)

def test_patients_with_masks_stay_together_and_runs_are_kept(tmp_path):
    c = segmented(groups=lambda i: i//4, folder=tmp_path/'runs', folds=3)
    again = segmented(groups=lambda i: i//4, folder=tmp_path/'runs', folds=3)
    assert c.records==again.records and len(c.runs)==6

def test_ignored_pixels_do_not_count():
    def half(i): y = blobs(i)[1].copy(); y[:8] = 255; return y
    ignoring = partial(pixel_learner, loss=CrossEntropyLossFlat(axis=1, ignore_index=255))
    c = segmented(block=masked(half), learner=ignoring)
    assert c.runs.error.isna().all() and c.runs.dice.between(0, 1).all()

def test_pixels_of_no_class_do_not_count():
    "Where the loss keeps to itself what it ignores"
    def half(i): y = blobs(i)[1].copy(); y[:8] = 255; return y
    def own(p, y): return F.cross_entropy(p, y.long(), ignore_index=255)
    own.activation = None
    kwargs = dict(block=masked(half), seeds=1)
    said = segmented(learner=partial(pixel_learner, loss=CrossEntropyLossFlat(axis=1, ignore_index=255)), **kwargs)
    kept = segmented(learner=partial(pixel_learner, loss=own), **kwargs)
    np.testing.assert_allclose(kept.runs.dice, said.runs.dice, atol=1e-6)

def test_one_channel_masks():
    "A single output, as for one organ"
    def one(i): return (blobs(i)[1]==1).astype(np.uint8)
    class Float(BCEWithLogitsLossFlat):
        def __call__(self, p, y, **kwargs): return super().__call__(p, y.unsqueeze(1).float(), **kwargs)
    def single(dls): return Learner(dls, nn.Conv2d(3, 1, 3, padding=1), Float())
    c = segmented(block=masked(one, ('none', 'bright')), learner=single)
    assert c.runs.error.isna().all() and c.runs.dice.min()>.5

def test_what_masks_cannot_say_is_refused():
    for kwargs,says in ((dict(probe=True), '`probe=True` is for one class'),
                        (dict(positive='dark'), '`positive` is one of'),
                        (dict(metrics=dict(f=max)), 'the metric is Dice')):
        with pytest.raises(ValueError, match=says): segmented(**kwargs)
    with pytest.warns(UserWarning, match='no validation mask holds a class .* they hold 0: masks'):
        c = segmented(block=masked(lambda i: np.zeros((16, 16), np.uint8)))
    with pytest.raises(ValueError, match='`by_recall` is of one class'): c.by_recall()
    with pytest.warns(UserWarning, match='predicts masks of shape'):
        segmented(learner=lambda dls: Learner(dls, nn.Conv2d(3, 3, 3), lambda p, y: p.mean()))

def test_tables_print_whole(comparison):
    "The ends of the intervals are not dropped from the middle, and the columns stay numbers"
    for df in (comparison.table(), comparison.by_recall()):
        with pd.option_context('display.width', 40, 'display.max_columns', 4): head = str(df).splitlines()[0].split()
        assert head==list(df.columns) and {'ci_low', 'ci_high'}<={*head}
        assert df[['diff', 'ci_low', 'ci_high']].dtypes.eq(float).all()
    assert str(comparison.table()) in repr(comparison)
