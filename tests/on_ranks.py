"""Run by test_ranks.py on three processes: fits as groups of one, two and three, and writes what each rank got to
FOLDER/SIZE-RANK.json"""

import json,os,random,sys,time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from fastai.data.all import (CategoryBlock,DataBlock,DataLoaders,IndexSplitter,ItemGetter,RandomSplitter,TfmdDL,
                             Transform,
    parent_label)
from fastai.distributed import DistributedDL
from fastai.torch_core import TensorImage
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
rank,size = int(os.environ['RANK']),int(os.environ['WORLD_SIZE'])
quiet = dict(verbose=False)

def files(path): return L(sorted(path.rglob('*.png')))

def block(splitter=IndexSplitter([0, 4, 8]), **kwargs):
    return DataBlock((ImageBlock, CategoryBlock), get_items=files, get_y=parent_label, splitter=splitter,
                     item_tfms=Resize(12, method='squish'), **kwargs)

def loaders(bs=4, num_workers=0, **kwargs): return block(**kwargs).dataloaders(path, bs=bs, num_workers=num_workers)

def numbers(rs):
    "Every row and every number of a ledger"
    rows = rs.images.assign(index=range(len(rs.items)) if rs.index is None else rs.index)
    rows = rows.astype(object).where(rows.notna(), None).to_dict('list')
    return dict(rows=rows, row_quantiles=[o.tolist() for o in rs.row_quantiles()], **rs.measured().to_dict())

def family(f): return f"patient {int(Path(f).stem)//3}"

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
    mine = range(31)[rank::max(1, size-1)] if rank<max(1, size-1) else []
    for i in mine: rs.update(x[i:i+1], items=[i], groups=[i//4])
    return numbers(rs.all_reduce())

class Slices:
    "Volumes of 1 to 4 slices"
    items = [f'volume {k}' for k in range(20)]
    def __len__(self): return 20
    def __getitem__(self, k):
        return TensorImage(torch.rand(k%4+1, 1, 6, 5, generator=torch.Generator().manual_seed(k))),

def with_known():
    "Every third row is known already"
    whole = measure_stats(loaders().train, tol=0, **quiet)
    return numbers(measure_stats(loaders().train, tol=0, known=whole.take(range(0, 34, 3)), **quiet))

def all_known():
    whole = measure_stats(loaders().train, tol=0, groups=family, **quiet)
    return numbers(measure_stats(loaders().train, tol=0, groups=family, known=whole, **quiet))

def greys(**kwargs):
    return numbers(measure_stats(Ready(Greys(20_000), bs=64, num_workers=0, shuffle=True), **kwargs, **quiet))

def by(groups, **kwargs): return measure_stats(loaders().train, tol=0, groups=groups, **kwargs, **quiet)

def fit():
    """`fit_stats` on a block, on loaders, on fastai's distributed ones, and a transform that fits when the loaders
    are made"""
    db = block().fit_stats(path, pretrained=False, bs=4, num_workers=0, **quiet)
    lazy = loaders(batch_tfms=DatasetStats(pretrained=False, **quiet))
    dls = loaders().fit_stats(pretrained=False, **quiet)
    wrapped = DataLoaders(*[DistributedDL(dl, rank, size)
                            for dl in loaders().loaders]).fit_stats(pretrained=False, **quiet)
    grouped = block().fit_stats(path, pretrained=False, groups=family, bs=4, num_workers=0, **quiet)
    b = wrapped[0].dl.one_batch()[0]
    choices = [o.stats_choice.to_dict() for o in (db, lazy, dls, wrapped, grouped)]
    return dict(choices=choices, normalised=bool(b.min()<-.5))

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
    yield 'groups', lambda: numbers(by(family))
    yield 'at most, groups', lambda: numbers(by(family, max_images=11))
    yield 'masked', lambda: numbers(measure_stats(loaders().train, tol=0, mask=lambda x: x[:, :1]>.4, **quiet))
    yield 'slices', lambda: numbers(measure_stats(TfmdDL(Slices(), bs=None, num_workers=0), tol=0, **quiet))
    yield 'augmented', lambda: numbers(measure_stats(loaders(batch_tfms=Gains()).train, tol=0, **quiet))
    yield 'known', with_known
    yield 'all known', all_known
    yield 'stopped', lambda: greys(tol=.016)
    yield 'stopped, groups', lambda: greys(tol=.016, groups=[i//7 for i in range(20_000)])
    yield 'all_reduce', all_reduced
    yield 'fit', fit
    yield 'same draws', same_draws
    yield 'unreadable', lambda: broken(lambda f: f.write_text('not an image'))
    yield 'other channels', lambda: error_of(lambda: RunningStats().update(torch.rand(2, 1+rank, 3, 3)).all_reduce())
    yield 'other groups', lambda: error_of(lambda: by(lambda f: family(f) if rank else 'one'))
    yield 'other known rows', lambda: error_of(other_known)
    yield 'no group', lambda: error_of(lambda: by(lambda f: None if rank==size-1 else 'one'))
    yield 'other splits', lambda: error_of(lambda: measure_stats(loaders(splitter=RandomSplitter(seed=rank)).train,
        **quiet))
    yield 'other splits of tuples', lambda: error_of(lambda: measure_stats(tuples().train, **quiet))
    yield 'mask raises', lambda: error_of(lambda: measure_stats(loaders().train, mask=lambda x: x[:, :1]>=0
        if rank else 1//0, **quiet))

def tuples():
    "Loaders over (file, label) items"
    return DataBlock((ImageBlock, CategoryBlock), get_items=lambda p: L([(f, f.parent.name) for f in files(p)]),
                     get_x=ItemGetter(0), get_y=ItemGetter(1),
                     splitter=RandomSplitter(seed=rank), item_tfms=Resize(12)).dataloaders(path, bs=4, num_workers=0)

def other_known():
    whole = measure_stats(loaders().train, tol=0, **quiet)
    measure_stats(loaders().train, tol=0, known=whole.take(range(rank+1)), **quiet)

class Gains(Transform):
    "Deterministic, and other for each image"
    order = 20
    def encodes(self, x:TensorImage): return x*x.amax((1, 2, 3), keepdim=True)

def raises():
    "And nobody catches it"
    def mask(x):
        if rank==size-1: raise OSError('the disk of this rank is gone')
        time.sleep(.05)
        return x[:, :1]>=0
    measure_stats(loaders(bs=1).train, tol=0, mask=mask, **quiet)

def in_group_of(n):
    "All scenarios as one of `n` processes, which know nothing of the groups before; another one is the first in each"
    global rank,size
    rank,size = n-1-rank,n
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n))
    np.random.seed()  # a fork takes NumPy's state along, and of Python's generator it makes a new one
    dist.init_process_group('gloo', init_method=(out/f'group{n}').as_uri(), rank=rank, world_size=n)
    (out/f'{n}-{rank}.json').write_text(json.dumps({k: f() for k,f in scenarios()}))
    dist.destroy_process_group()

if what=='raises':
    dist.init_process_group('gloo')
    raises()
    dist.destroy_process_group()
else:
    for n in range(rank+1, size+1):  # forks, which need not import everything again
        p = get_context('fork').Process(target=in_group_of, args=(n,))
        p.start(), p.join()
        if p.exitcode: sys.exit(f'rank {rank} of {n} failed')
