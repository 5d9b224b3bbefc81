"Numbers as values: what `NormStats` takes and refuses, and that it survives JSON"

import json,math
from dataclasses import FrozenInstanceError

import pytest
import torch
from torchvision.transforms import v2

from fastai_normstats.values import NormStats

# --- NormStats

def test_normstats_is_a_pair_of_tuples():
    s = NormStats([.5, .25], torch.tensor([.1, .2], dtype=torch.float64))
    assert (s.mean, s.std, s.name, s.estimator, s.domain, s.value_range) == ((.5, .25), (.1, .2), 'custom', 'pooled',
        None, (0., 1.))
    mean,std = s
    assert (mean, std)==(s.mean, s.std) and all(type(o) is float for o in mean+std)
    with pytest.raises(FrozenInstanceError): s.mean = (0., 0.)
    assert s==NormStats((.5, .25), (.1, .2)) and hash(s)==hash(NormStats((.5, .25), (.1, .2)))

def test_normstats_takes_a_channel_as_a_number(): assert tuple(NormStats(.5, .25)) == ((.5,), (.25,))

@pytest.mark.parametrize('kwargs,match', [
    (dict(mean=(.5, math.nan), std=(1, 1)),     '`mean` must be finite'),
    (dict(mean=(.5, 0), std=(1, math.inf)),     '`std` must be finite'),
    (dict(mean=(.5, .5), std=(1, 0)),           '`std` must be above 0'),
    (dict(mean=(.5, .5), std=(1, -1)),          '`std` must be above 0'),
    (dict(mean=(.5, .5), std=(1,)),             '`mean` has 2 channels and `std` 1'),
    (dict(mean=(), std=()),                     'no channel'),
    (dict(mean='abc', std=(1,)),                '`mean` must be numbers'),
    (dict(mean=None, std=(1,)),                 '`mean` must be numbers'),
    (dict(mean=.5, std=1, value_range=(1, 0)),  r'`value_range` must be \(lowest, highest\)'),
    (dict(mean=.5, std=1, value_range=(0, 1, 2)), r'`value_range` must be \(lowest, highest\)'),
    (dict(mean=.5, std=1, estimator='median'),  "`estimator` must be 'pooled' or 'image'")])
def test_normstats_refuses(kwargs, match):
    with pytest.raises(ValueError, match=match) as e: NormStats(**kwargs)
    assert '\n' not in str(e.value)

def test_normstats_dict_survives_json():
    s = NormStats((1/3, .1), (.2, 2/7), name='x', estimator='image', domain='chest X-ray', value_range=(-1024, 1024),
                  source='here')
    assert NormStats.from_dict(json.loads(json.dumps(s.to_dict())))==s

@pytest.mark.parametrize('d', [[], dict(mean=[1]), dict(mean=[1], std=[1], men=[1])])
def test_normstats_from_foreign_dict(d):
    with pytest.raises(ValueError, match='NormStats'): NormStats.from_dict(d)

def test_normstats_to_torchvision():
    s = NormStats((.1, .2, .3), (.4, .5, .6))
    x = torch.rand((2, 3, 5, 4), generator=torch.Generator().manual_seed(0))
    want = (x.double()-torch.tensor(s.mean).double().view(3, 1, 1))/torch.tensor(s.std).double().view(3, 1, 1)
    tfm  = s.to_torchvision()
    assert isinstance(tfm, v2.Normalize)
    torch.testing.assert_close(tfm(x).double(), want, rtol=1e-5, atol=1e-6)
