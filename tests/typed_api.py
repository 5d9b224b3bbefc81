"""A user's script as type checkers see it: what the public names give, and that wrong calls are reported.

Nothing runs here: `make types` checks it. A wrong call that would be reported no more makes its `ignore` unnecessary,
which is an error, too. What fastai's classes get by `@patch` (`dls.fit_stats`, `learn.bake_stats`…) no checker sees."""

from pathlib import Path

import numpy as np
import pandas as pd
from fastai.data.block import DataBlock, TransformBlock
from fastai.data.core import TfmdDL
from fastai.vision.learner import vision_learner
from fastcore.foundation import L
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models import resnet34
from typing_extensions import assert_type

from fastai_normstats.all import *

def patient(f: Path)->str: return f.stem.rsplit('_', 1)[0]

def statistics_and_policy():
    "Numbers, published ones, thresholds"
    s = NormStats((.5,), (.25,), name='scans', value_range=(0, 4095))
    assert_type(s, NormStats)
    assert_type(s.mean, tuple)
    assert_type(NormStats.from_dict(s.to_dict()), NormStats)
    assert_type(model_stats(resnet34), NormStats|None)
    assert_type(model_stats('rad-dino', n_channels=None), NormStats|None)
    assert_type(known_models(domain='x-ray'), pd.DataFrame)
    assert_type(IMAGENET.domain, str|None)
    policy = Policy(small=300, z=2.)
    assert_type(policy.small, int)
    Policy(small='few')                # pyright: ignore[reportArgumentType]
    model_stats(resnet34, 'three')     # pyright: ignore[reportArgumentType]

def measuring(dl: TfmdDL, x: Tensor):
    "The ledger and its summary"
    m = measure_stats(dl, tol=0, mask=lambda x: x>0, groups=patient, max_images=None)
    assert_type(m, RunningStats)
    assert_type(m.mean, Tensor)
    assert_type(m.n_images, int)
    assert_type(m.n_channels, int|None)
    assert_type(m.images, pd.DataFrame)
    assert_type(m.unusual(5), pd.DataFrame)
    assert_type(m.population, int|None)
    both = RunningStats(nonfinite='ignore').update(x, groups=['a', 'b']).merge(m)
    assert_type(both, RunningStats)
    assert_type(both+m, RunningStats)
    assert_type(both.quantile([.01, .99]), Tensor)
    assert_type(both.stats('image'), NormStats)
    assert_type(both.measured(), Measured)
    assert_type(Measured.from_dict(both.measured().to_dict()), Measured)
    assert_type(both.half_widths(), tuple)
    assert_type(used_stats(dl), NormStats|None)
    measure_stats('folder')            # pyright: ignore[reportArgumentType]
    both.merge(3)                      # pyright: ignore[reportArgumentType]
    both.means                         # pyright: ignore[reportAttributeAccessIssue]

def choosing(m: RunningStats):
    "A choice: made, shown, kept, taken elsewhere"
    c = choose_stats(m.n_images, m, resnet34, policy=Policy(small=300), scheme=MinMax(percentiles=(1, 99)))
    assert_type(c, StatsChoice)
    assert_type(c.stats, NormStats)
    assert_type(c.measured, Measured|None)
    assert_type(c.warnings, tuple)
    assert_type(c.table(), pd.DataFrame)
    assert_type(c.code(), str)
    assert_type(c.save('stats.json'), Path)
    assert_type(StatsChoice.load(Path('stats.json')), StatsChoice)
    assert_type(StatsChoice.from_dict(c.to_dict()), StatsChoice)
    assert_type(c.plot(), list)
    c.export('huggingface', 'served', size=224)
    c.export('torchvision', size=(224, 224))
    assert_type(read_nnunet('plans.json'), StatsChoice)
    StatsChoice.load(3)                # pyright: ignore[reportArgumentType]
    c.export(5)                        # pyright: ignore[reportArgumentType]
    c.saved('stats.json')              # pyright: ignore[reportAttributeAccessIssue]

def normalising(stats: StatsChoice):
    "The transform, in all the ways to make one"
    tfm = DatasetStats(model=resnet34)
    assert_type(tfm, DatasetStats)
    assert_type(tfm.choice, StatsChoice|None)
    assert_type(tfm.name, str)
    DatasetStats((.5,), (.25,))
    DatasetStats(stats=stats)
    DatasetStats(stats=(IMAGENET.mean, IMAGENET.std), cache=Path('kept'))
    DatasetStats(scheme='clip-zscore', mask=lambda x, y: y>0, weight='image')
    DatasetStats(scheme=HistogramStandardization(), groups='patient')
    DatasetStats(bands=['B04', 'B03'], stats={'B03': (.08, .03), 'B04': (.09, .04)}, nodata=0, units=10_000)
    assert_type(clear_cache(), int)
    DatasetStats(tol='exact')          # pyright: ignore[reportArgumentType]
    DatasetStats(policy=300)           # pyright: ignore[reportArgumentType]
    DatasetStats(axis=(0, 2, 3))       # pyright: ignore[reportCallIssue]

def comparing(dblock: DataBlock, folder: Path):
    "Scores under each candidate"
    c = compare_stats(dblock, folder, lambda dls: vision_learner(dls, resnet34), stats=('imagenet', 'custom'), folds=5,
                      groups=patient, seeds=1, epochs=3, folder='runs')
    assert_type(c, Comparison)
    assert_type(c.verdict, str)
    assert_type(c.runs, pd.DataFrame)
    assert_type(c.table(), pd.DataFrame)
    assert_type(c.by_recall((.8, .9)), pd.DataFrame)
    assert_type(Comparison.load(c.save('runs.json')), Comparison)
    compare_stats(dblock, folder, 5)   # pyright: ignore[reportArgumentType]
    Comparison.load(3)                 # pyright: ignore[reportArgumentType]

def serving(model: nn.Module, choice: StatsChoice, images: NDArray[np.uint8]):
    "Inside the network, and where it is served"
    baked = bake_stats(model, choice, input='float')
    assert_type(baked.to_onnx('model.onnx', size=224), Path)
    v = verify_stats('served', choice, images)
    assert_type(v.same, bool)
    assert_type(v.why, str)
    bake_stats(choice, model)          # pyright: ignore[reportArgumentType]
    verify_stats('served', 'stats')    # pyright: ignore[reportArgumentType]

def loading(files: list):
    "DICOM, 16-bit and float files, bands, volumes"
    assert_type(FloatImageBlock(PILDicomFloat, units='HU'), TransformBlock)
    assert_type(FloatImageBlock(windows=[(1500, -600), (350, 50)]), TransformBlock)
    assert_type(BandsBlock(['B02', 'B03', 'B04'], rgb=('B04', 'B03', 'B02')), TransformBlock)
    assert_type(VolumeBlock((32, 64, 64)), TransformBlock)
    assert_type(dicom_frames(files), L)
    assert_type(dicom_series('scans'), L)
    assert_type(dicom_pixels('a.dcm', frame=0), np.ndarray)
    assert_type(PILFloat.create('a.png'), PILFloat)
    FloatImageBlock(windows=5)         # pyright: ignore[reportArgumentType]
    FloatImageBlock('PILDicomFloat')   # pyright: ignore[reportArgumentType]
