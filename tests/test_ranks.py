"""Fits on 1, 2 and 3 processes (gloo): the same numbers as on one, the same bits on all, and an error on one is an
error on all"""

import json,os,re,subprocess,sys,time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from helpers import image_folder
from PIL import Image

no_gloo = not dist.is_available() or not dist.is_gloo_available()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(no_gloo, reason='torch was built without gloo')]

def torchrun(n, *args):
    "Run a script on `n` processes; the completed process"
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
    return subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n),
                           *map(str, args)],
                          capture_output=True, text=True, timeout=300, env=env)

script = Path(__file__).parent/'on_ranks.py'

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "37 images, of which 34 are for training"
    return image_folder(tmp_path_factory.mktemp('ranks')/'images', n=37).parent

@pytest.fixture(scope='module')
def results(folder):
    "Number of processes → what each rank wrote; three processes, each with hashes of its own, are all groups in turn"
    res = torchrun(3, script, folder, 'all')
    assert res.returncode==0, res.stderr[-3000:]
    return {n: [json.loads((folder/f'{n}-{r}.json').read_text()) for r in range(n)] for n in (1, 2, 3)}

passes = ['full', 'workers', 'two images', 'at most', 'groups', 'at most, groups', 'masked', 'slices', 'augmented',
          'known',
          'all known', 'stopped', 'stopped, groups', 'all_reduce']

@pytest.mark.slow
@pytest.mark.parametrize('n', [2, 3])
@pytest.mark.parametrize('what', passes)
def test_as_on_one(results, what, n):
    "Every row and number, to the bit. 34 images are not divided by 3 nor 31 by 2: none is padded, none left out"
    (one,),many = ([r[what] for r in results[k]] for k in (1, n))
    for d in many:
        assert d.keys()==one.keys()
        for k in one: assert d[k]==one[k], k

def test_counts(results):
    for n in (1, 2, 3):
        r = results[n][0]
        counts = dict(full=34, workers=34, groups=34, augmented=34, slices=50, known=34, all_reduce=31)
        counts |= {'two images': 2, 'at most': 11, 'all known': 34}
        assert {k: r[k]['n_images'] for k in counts}==counts
        assert [r[k]['n_groups'] for k in ('full', 'groups', 'slices', 'all known', 'all_reduce')]==[34, 13, 20, 13, 8]
        assert not r['stopped']['complete'] and 3072<=r['stopped']['n_images']<20_000
        g = r['stopped, groups']
        assert not g['complete'] and g['n_images']==7*g['n_groups'] and g['population_groups']==2858
        for k in ('known', 'all known'): assert r[k]==r[{'known': 'full'}.get(k, 'groups')]

def test_exact(results, folder):
    "Against numpy over the training files"
    files = [f for i,f in enumerate(sorted(folder.rglob('*.png'))) if i not in (0, 4, 8)]
    x = np.stack([np.asarray(Image.open(f).convert('RGB').resize((12, 12), Image.Resampling.BILINEAR),
                             dtype=np.float64) for f in files])/255
    for n in (2, 3):
        mean,std = (results[n][1]['fit']['choices'][0]['stats'][k] for k in ('mean', 'std'))
        np.testing.assert_allclose(mean, x.mean((0, 1, 2)),
                                   rtol=1e-6), np.testing.assert_allclose(std, x.std((0, 1, 2)), rtol=1e-6)
        bright,masked = np.float32(x[...,0])>np.float32(.4),results[n][1]['masked']
        assert (masked['n_images'], masked['n_pixels'])==(bright.any((1, 2)).sum(), bright.sum())
        np.testing.assert_allclose(masked['mean'], x[bright].mean(0), rtol=1e-6)

@pytest.mark.parametrize('n', [1, 2, 3])
def test_fits(results, n):
    "Block, lazy transform, loaders and `DistributedDL` hold the same statistics, and use them"
    for r in results[n]:
        fit = r['fit']
        assert all(c['stats']==fit['choices'][0]['stats'] for c in fit['choices'])
        assert fit==results[n][0]['fit'] and fit['normalised']
        assert r['same draws']

@pytest.mark.parametrize('n', [2, 3])
@pytest.mark.parametrize('what,match', [('unreadable', 'a.010.png'), ('mask raises', 'division'),
                                        ('other channels', 'channel'), ('other groups', 'different `groups`'),
                                        ('other known rows', 'different `known` rows'), ('no group', 'says no group'),
                                        ('other splits', 'different training splits .*RandomSplitter'),
                                        ('other splits of tuples', 'different training splits')])
def test_an_error_on_one_is_an_error_on_all(results, what, match, n):
    for r in results[n]:
        kind,message,seconds = r[what]
        assert re.search(match, message) and '\n' not in message and seconds<60
    kinds = {r[what][0] for r in results[n]}
    if what in ('unreadable', 'mask raises', 'no group'):
        assert sum(re.match(r'rank \d failed with ', r[what][1]) is not None
                   for r in results[n])==n-1 and 'RuntimeError' in kinds

@pytest.mark.slow
def test_uncaught_error_ends_all(folder):
    "Nobody catches it: all processes end, with the message, and the others would have gone on reading"
    began = time.time()
    res = torchrun(2, script, folder, 'raises')
    assert res.returncode!=0 and time.time()-began<60
    assert 'the disk of this rank is gone' in res.stderr and 'rank 1 failed with OSError' in res.stderr
