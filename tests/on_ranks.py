"Run by test_distributed.py on several processes: fits, and writes what each rank got to FOLDER/RANK.json"

import json,random,sys,time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from fastai.data.all import CategoryBlock,DataBlock,DataLoaders,IndexSplitter,ItemGetter,RandomSplitter,parent_label
from fastai.distributed import DistributedDL
from fastai.vision.augment import Resize
from fastai.vision.data import ImageBlock
from fastcore.foundation import L
from helpers import Greys,Ready

import fastai_normstats.block
from fastai_normstats.measure import measure_stats
from fastai_normstats.running import RunningStats
from fastai_normstats.transform import DatasetStats

out = Path(sys.argv[1])
path,what = out/'images',sys.argv[2]
dist.init_process_group('gloo')
rank,size = dist.get_rank(),dist.get_world_size()
quiet = dict(verbose=False)

def files(path): return L(sorted(path.rglob('*.png')))

def block(splitter=IndexSplitter([0, 4, 8]), **kwargs):
    return DataBlock((ImageBlock, CategoryBlock), get_items=files, get_y=parent_label, splitter=splitter, item_tfms=Resize(12, method='squish'), **kwargs)

def loaders(bs=4, num_workers=0, **kwargs): return block(**kwargs).dataloaders(path, bs=bs, num_workers=num_workers)

def numbers(rs): return json.loads(json.dumps(rs.to_dict()))

def error_of(f):
    "The error that `f` ends with on this rank, and how long it took"
    began = time.time()
    try: f()
    except Exception as e: return type(e).__name__,str(e),time.time()-began
    return None

def all_reduced():
    "Batches of different sizes on the ranks; the last one has none where there are several"
    g = torch.Generator().manual_seed(0)
    x,rs = torch.rand(31, 3, 40, 30, generator=g)*torch.rand(31, 3, 1, 1, generator=g),RunningStats()
    mine = x[rank::max(1, size-1)] if rank<max(1, size-1) else []
    for i in mine: rs.update(i[None])
    return numbers(rs.all_reduce())

def fit():
    "`fit_stats` on a block, on loaders, on fastai's distributed ones, and a transform that fits when the loaders are made"
    db = block().fit_stats(path, pretrained=False, bs=4, num_workers=0, **quiet)
    lazy = loaders(batch_tfms=DatasetStats(pretrained=False, **quiet))
    dls = loaders().fit_stats(pretrained=False, **quiet)
    wrapped = DataLoaders(*[DistributedDL(dl, rank, size) for dl in loaders().loaders]).fit_stats(pretrained=False, **quiet)
    b = wrapped[0].dl.one_batch()[0]
    return dict(choices=[o.stats_choice.to_dict() for o in (db, lazy, dls, wrapped)], normalised=bool(b.min()<-.5))

def same_draws():
    "What comes after a fit is what would have come without it"
    res = []
    for with_fit in (True, False):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        dls = loaders()
        if with_fit: measure_stats(dls.train, **quiet)
        res.append((random.random(), np.random.rand(), torch.rand(1).item(), dls.one_batch()[0].sum().item()))
    return res[0]==res[1]

def broken(f):
    "Every rank's error while one of the training files is what `f` makes of it"
    victim = files(path)[5]
    if not rank: good = victim.read_bytes(); f(victim)
    dist.barrier()
    res = error_of(lambda: measure_stats(loaders(bs=2, splitter=IndexSplitter([0])).train, tol=0, **quiet))
    dist.barrier()
    if not rank: victim.write_bytes(good)
    dist.barrier()
    return res

def scenarios():
    yield 'full', lambda: numbers(measure_stats(loaders().train, tol=0, **quiet))
    yield 'workers', lambda: numbers(measure_stats(loaders(num_workers=2).train, tol=0, **quiet))
    yield 'two images', lambda: numbers(measure_stats(loaders(splitter=IndexSplitter(range(35))).train, tol=0, **quiet))
    yield 'at most', lambda: numbers(measure_stats(loaders().train, tol=0, max_images=11, **quiet))
    yield 'stopped', lambda: numbers(measure_stats(Ready(Greys(20_000), bs=64, num_workers=0, shuffle=True), tol=.016, **quiet))
    yield 'all_reduce', all_reduced
    yield 'fit', fit
    yield 'same draws', same_draws
    yield 'unreadable', lambda: broken(lambda f: f.write_text('not an image'))
    yield 'other size', lambda: error_of(lambda: all_reduce_of_other_bins())
    yield 'other splits', lambda: error_of(lambda: measure_stats(loaders(splitter=RandomSplitter(seed=rank)).train, **quiet))
    yield 'other splits of tuples', lambda: error_of(lambda: measure_stats(tuples().train, **quiet))
    yield 'mask raises', lambda: error_of(lambda: measure_stats(loaders().train, mask=lambda x: x[:, :1]>=0 if rank else 1//0, **quiet))

def tuples():
    "Loaders over (file, label) items"
    return DataBlock((ImageBlock, CategoryBlock), get_items=lambda p: L([(f, f.parent.name) for f in files(p)]), get_x=ItemGetter(0), get_y=ItemGetter(1),
                     splitter=RandomSplitter(seed=rank), item_tfms=Resize(12)).dataloaders(path, bs=4, num_workers=0)

def all_reduce_of_other_bins(): RunningStats(bins=8+rank).update(torch.rand(2, 1, 3, 3)).all_reduce()

if what=='raises':  # and nobody catches it
    def mask(x):
        if rank==size-1: raise OSError('the disk of this rank is gone')
        time.sleep(.05)
        return x[:, :1]>=0
    measure_stats(loaders(bs=1).train, tol=0, mask=mask, **quiet)
else: (out/f'{rank}.json').write_text(json.dumps({k: f() for k,f in scenarios()}))
dist.destroy_process_group()
