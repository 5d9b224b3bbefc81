"What the README shows can be run, and what it quotes is what comes out"
import re
from pathlib import Path

import pytest
from fastai.basics import defaults
from fastai.vision.augment import Resize
from torchvision.models import resnet34
from torchvision.models._api import WeightsEnum

from helpers import image_folder

README = (Path(__file__).parent.parent/'README.md').read_text(encoding='utf-8')
FENCES = re.findall(r'^```python\n(.*?)^```', README, re.M|re.S)

def test_readme_has_code_and_stays_short(): assert len(FENCES)>=3 and len(README.splitlines())<=120

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
