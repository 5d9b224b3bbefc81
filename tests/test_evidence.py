"What is said of evidence is what the runs show: README, `nbs/63_evidence.ipynb` and `why`, computed anew from the CSVs"
import json, re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import t as student

from fastai_normstats.all import RunningStats, choose_stats
from fastai_normstats.policy import Policy
from helpers import image_folder

root = Path(__file__).parent.parent
runs = pd.read_csv(root/'benchmarks'/'evidence_runs.csv')
sets = pd.read_csv(root/'benchmarks'/'evidence_sets.csv').set_index('set')
README = (root/'README.md').read_text(encoding='utf-8')
models = dict(lite0=([.5]*3, [.5]*3), mobilenet=([.485, .456, .406], [.229, .224, .225]))
done = {k: [tuple(o) for o in g[['set', 'network']].drop_duplicates().values] for k,g in runs.groupby('kind')}

def points(kind, name, network, candidate='custom', metric='accuracy'):
    "Mean difference from the model's numbers and the interval of Nadeau & Bengio, in points"
    some = runs[(runs.kind==kind) & (runs.set==name) & (runs.network==network)].sort_values(['seed', 'fold'])
    a,b = (some[some.candidate==c][metric].to_numpy() for c in (candidate, 'model'))
    d,ratio = 100*(a-b),(some.n_valid/some.n_train).mean()
    half = student.ppf(.975, len(d)-1)*np.sqrt((1/len(d)+ratio)*d.var(ddof=1))
    return d.mean(),d.mean()-half,d.mean()+half

def words(v): return '{:+.1f} ({:+.1f} to {:+.1f})'.format(*v)

def vector(name, column): return np.array(sets.loc[name, column].split(), float)

def reach(name, network):
    "How far own numbers send one value in a thousand, in multiples of what the network saw"
    mean,std = vector(name, 'mean'),vector(name, 'std')
    far = max(np.abs((vector(name, q)-mean)/std).max() for q in ('q001', 'q999'))
    return far/max(max(m, 1-m)/s for m,s in zip(*models[network]))

def stored():
    "Cell → what its stored output shows as text"
    nb = json.loads((root/'nbs'/'63_evidence.ipynb').read_text(encoding='utf-8'))
    def text(o): return ''.join(o.get('text', o.get('data', {}).get('text/plain', '')))
    return {c['id']: '\n'.join(map(text, c.get('outputs', []))) for c in nb['cells'] if c['cell_type']=='code'}

def test_every_comparison_is_whole():
    "Five folds a seed, every candidate in each, all metrics there, and no image counted twice"
    for (kind,name,network,seed),g in runs.groupby(['kind', 'set', 'network', 'seed']):
        for _,own in g.groupby('candidate'):
            assert sorted(own.fold)==list(range(5)) and own.n_valid.sum()==sets.loc[name].images
        assert {'model', 'image-zscore' if kind=='candidates' else 'custom'}<={*g.candidate}
        assert g[['accuracy', 'auroc', 'valid_loss']].notna().all(axis=None)

def test_the_notebooks_tables_are_those_of_the_runs():
    text = stored()
    for name,network in done['probe']: assert words(points('probe', name, network)) in text['63b00008'], (name, network)
    for kind in ('fine_tune', 'from_start', 'new'):
        for name,network in done.get(kind, []):
            assert words(points(kind, name, network)) in text['63b00012'], (kind, name)

def test_the_replay_is_that_of_the_runs():
    "Each set by the threshold of reach that is best on the others, found by trying all of them"
    for column,kind in enumerate(('probe', 'fine_tune', 'from_start')):
        rows = [(s, points(kind, s, n)[0], reach(s, n)) for s,n in done[kind]]
        g = pd.DataFrame(rows, columns=['set', 'own', 'reach'])
        gain = []
        for name in g.set.unique():
            others,mine = g[g.set!=name],g[g.set==name]
            tried = [0, *sorted(g.reach)]
            best = max(tried, key=lambda r: (round(others.own.where(others.reach<=r, 0).mean(), 7), r))
            gain += mine.own.where(mine.reach<=best, 0).tolist()
        want = {"always own": g.own.mean(), 'threshold of the other sets': np.mean(gain),
                f'own up to reach {Policy.reach:g}': g.own.where(g.reach<=Policy.reach, 0).mean(),
                'the better in hindsight': g.own.clip(lower=0).mean()}
        for row,v in want.items():
            line = next(o for o in stored()['63b00016'].splitlines() if o.startswith(row))
            assert float(line.removeprefix(row).split()[column])==pytest.approx(v, abs=.0051), (kind, row)

def test_the_readme_quotes_the_runs():
    "Every interval in its section on evidence is that of a setting that is named beside it, or of the X-rays' page"
    section = ' '.join(README.split('## Does it help?')[1].split('\n## ')[0].split())
    quoted = re.findall(r'[+-]\d+\.\d \([+-]\d+\.\d to [+-]\d+\.\d\)', section)
    known = {words(points(k, s, n)) for k in done if k!='candidates' for s,n in done[k]}
    old = pd.read_csv(root/'benchmarks'/'evidence_xrays.csv').query("setting=='from scratch, all images'")
    wide = old.pivot(index=['seed', 'fold'], columns='candidate', values='best_f1')
    d = 100*(wide['custom']-wide['imagenet']).to_numpy()
    half = student.ppf(.975, len(d)-1)*((1/len(d)+1/4)*d.var(ddof=1))**.5
    assert quoted and {*quoted}<=known | {words((d.mean(), d.mean()-half, d.mean()+half))}
    effects = [points('probe', s, n)[0] for s,n in done['probe']]
    assert f'{np.mean(effects):+.1f} points' in section and f'{len(effects)} pairs' in section
    far = [points('probe', s, n)[0] for s,n in done['probe'] if reach(s, n)>Policy.reach]
    near = [points('probe', s, n)[0] for s,n in done['probe'] if reach(s, n)<=Policy.reach]
    assert f'{np.mean(far):+.1f} in the {len(far)} pairs beyond {Policy.reach:g}' in section
    assert f'{np.mean(near):+.1f} in the other {len(near)}' in section
    wrong = {c: np.mean([points('candidates', s, n, c)[0] for s,n in done['candidates']])
             for c in ('0-255 numbers', 'applied twice')}
    assert f"(16 pairs): numbers for 0–255 {wrong['0-255 numbers']:+.1f} in the mean" in section
    assert f"applied twice {wrong['applied twice']:+.1f}." in section and len(done['candidates'])==16
    beyond = [s for s,n in done['from_start'] if np.prod(points('from_start', s, n)[1:])>0]
    assert beyond==['galaxies'] and 'the others no different' in section
    assert all(np.prod(points('fine_tune', s, n)[1:])<0 for s,n in done['fine_tune']) and len(done['fine_tune'])==6

def test_what_why_quotes_is_what_the_runs_show():
    lit = (np.random.default_rng(0).random((800, 1, 16, 16))>.99).astype('float32').repeat(3, 1)
    why = choose_stats(800, RunningStats().update(torch.tensor(lit))).why
    far = [points('probe', s, n)[0] for s,n in done['probe'] if reach(s, n)>Policy.reach]
    assert f'{-np.mean(far):.1f} points of accuracy in the mean of {len(far)} pairs of set and network' in why
    assert all(v[2]>=0 for v in (points('fine_tune', s, n) for s,n in done['fine_tune'])) or 'fine-tuned' not in why
    assert all(v[1]<=0 for v in (points('fine_tune', s, n) for s,n in done['fine_tune']))  # own never beyond chance
    better = [s for s,n in done['from_start'] if points('from_start', s, n)[1]>0]
    assert 'without one, on one set of six' in why and (len(better), len(done['from_start']))==(1, 6)

@pytest.mark.parametrize('network', models)
def test_rules_in_the_table_of_sets_follow_from_its_numbers(network):
    "`reach` wherever one value in a thousand goes beyond twice what the network saw (by the ledger's quantiles)"
    for name in sets.index:
        r = reach(name, network)
        if abs(r/Policy.reach-1)>.1: assert (sets.loc[name, f'rule_{network}']=='reach')==(r>Policy.reach), (name, r)

@pytest.mark.slow
def test_the_command_adds_whole_comparisons_once(tmp_path, monkeypatch):
    "On small images of our own, with a small network in the place of the pretrained ones"
    from fastai.vision.all import CrossEntropyLossFlat, Learner, default_split, nn
    monkeypatch.syspath_prepend(root/'benchmarks')
    import evidence
    monkeypatch.setattr(evidence, 'runs_file', tmp_path/'runs.csv')
    def small(dls):
        body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU())
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, dls.c))
        return Learner(dls, nn.Sequential(body, head), CrossEntropyLossFlat(), splitter=default_split)
    monkeypatch.setitem(evidence.networks, 'lite0', (small, evidence.half))
    path = image_folder(tmp_path/'sets'/'tiny', n=40)
    files = sorted(path.rglob('*.png'))
    pd.DataFrame([dict(fname=f.relative_to(path), label=f.parent.name, group=i//2) for i,f in enumerate(files)]) \
        .to_csv(path/'labels.csv', index=False)
    tiny = evidence.Images('tiny', groups='group')
    for kind in ('probe', 'fine_tune'): evidence.compare(kind, tiny, 'lite0', 0, tmp_path, tmp_path/'runs')
    got = pd.read_csv(tmp_path/'runs.csv')
    assert list(got)==list(runs) and got[['accuracy', 'auroc', 'valid_loss', 'seconds']].notna().all(axis=None)
    want = [('fine_tune', 'custom'), ('fine_tune', 'model'),
            ('probe', 'custom'), ('probe', 'imagenet'), ('probe', 'model')]
    assert got.groupby(['kind', 'candidate']).size().to_dict()==dict.fromkeys(want, 5)
    assert evidence.done()=={('probe', 'tiny', 'lite0', 0), ('fine_tune', 'tiny', 'lite0', 0)}
