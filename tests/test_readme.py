"What the README shows can be run, and what it quotes is what comes out"
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from fastai.basics import defaults
from fastai.vision.augment import Resize
from scipy.stats import t as student
from torchvision.models import resnet34
from torchvision.models._api import WeightsEnum

from helpers import image_folder

README = (Path(__file__).parent.parent/'README.md').read_text(encoding='utf-8')
FENCES = re.findall(r'^```python\n(.*?)^```', README, re.M|re.S)

def test_readme_has_code_and_stays_short(): assert len(FENCES)>=3 and len(README.splitlines())<120

@pytest.mark.slow
def test_python_fences_run(tmp_path, monkeypatch):
    """In order and in one namespace, as a reader would; weights are random, since nothing is downloaded here, and
    images small"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(defaults, 'cpus', 0)
    weights = resnet34().state_dict()
    monkeypatch.setattr(WeightsEnum, 'get_state_dict', lambda self, *args, **kwargs: weights)
    monkeypatch.setattr('fastai.vision.all.Resize', lambda size: Resize(size//7))  # ten trainings, in seconds
    ns = {'path': image_folder(tmp_path/'images', n=40, size=32)}
    for code in FENCES: exec(compile(code, 'README.md', 'exec'), ns)
    assert ns['learn'].dls.stats_choice.n_images==32
    assert ns['c'].runs.error.isna().all() and len(ns['c'].runs)==10 and len(list((tmp_path/'runs').glob('run-*')))==10
    assert (tmp_path/'stats.json').exists()

def test_rules_in_table_are_those_of_the_policy():
    from fastai_normstats.policy import _rules
    assert re.findall(r'^\| `(\w+)` \|', README, re.M)==list(_rules)

def test_evidence_is_that_of_the_runs():
    """Every difference that the README quotes, computed from the runs: the paired mean in points of F1 with the
    interval of Nadeau & Bengio, five folds"""
    runs = pd.read_csv(Path(__file__).parent.parent/'benchmarks'/'evidence.csv')
    quoted = re.findall(r'[+-]\d+\.\d \([+-]\d+\.\d to [+-]\d+\.\d\)', README)
    def points(setting):
        wide = runs[runs.setting==setting].pivot(index=['seed', 'fold'], columns='candidate', values='best_f1')
        d = 100*(wide['custom']-wide['imagenet']).to_numpy()
        half = student.ppf(.975, len(d)-1)*((1/len(d)+1/4)*d.var(ddof=1))**.5
        return f'{d.mean():+.1f} ({d.mean()-half:+.1f} to {d.mean()+half:+.1f})'
    settings = [s for s in runs.setting.unique() if not s.endswith('candidates')]
    assert len(settings)==9 and sorted(quoted)==sorted(map(points, settings))
