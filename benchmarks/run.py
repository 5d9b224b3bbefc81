"""Measures the speed and memory that are promised, each against its yardstick, side by side in one process:

    python benchmarks/run.py [--images FOLDER] [--out benchmarks] [--repeats 15]

Candidates of a row take turns; a figure is the median over the turns with half of the interquartile range, a ratio the
quotient of the medians that two rows show, since machines are shared and noisy. Everything is measured twice, and both
are shown. Without `--images` the whole fit runs on 1,500 generated PNG files. Writes results.csv and results.md."""

import argparse,platform,re,resource,subprocess,sys,tempfile,time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

batch_shape = 64,3,224,224

def in_turns(cands, repeats, warm=2):
    "Seconds of each candidate, a row a turn (`cands`: name → function)"
    def clock(f):
        began = time.perf_counter()
        f()
        if torch.cuda.is_available(): torch.cuda.synchronize()
        return time.perf_counter()-began
    for _ in range(warm):
        for f in cands.values(): f()
    return pd.DataFrame([{k: clock(f) for k,f in cands.items()} for _ in range(repeats)])

def rows(what, times, ours, yardstick, target):
    "Table rows: median and spread in ms of each candidate, its ratio to the yardstick, the target beside ours"
    ms = 1e3*times.median()
    spread = 1e3*(times.quantile(.75)-times.quantile(.25))/2
    return [dict(what=what, candidate=k, ms=ms[k], spread=spread[k], ratio=ms[k]/ms[yardstick],
                 target=target if k==ours else np.nan) for k in times]

# --- rows of the table

def update(device, repeats, contrast=1.):
    from fastai_normstats.running import RunningStats
    from sklearn.preprocessing import StandardScaler
    x,sk = torch.rand(batch_shape, device=device)*contrast+(1-contrast),StandardScaler()
    two,turns = 'x.sum, (x**2).sum',{}
    turns[two] = lambda: (x.sum((0,2,3)), (x**2).sum((0,2,3)))
    turns['RunningStats.update'] = lambda: RunningStats().update(x)
    turns['torch.var_mean'] = lambda: torch.var_mean(x, (0,2,3))
    what = f"a batch{'' if contrast==1 else ' of low contrast'}, {device}"
    res = rows(what, in_turns(turns, repeats), 'RunningStats.update', two, .5)
    if device!='cpu' or contrast<1: return res
    slow = {two: turns[two], 'sklearn partial_fit': lambda: sk.partial_fit(x.transpose(0, 1).flatten(1).T.numpy())}
    return res+rows('a batch, beside scikit-learn', in_turns(slow, 5, warm=1), None, two, None)

def encodes(device, repeats):
    from fastai.data.transforms import Normalize
    from fastai.torch_core import TensorImage
    from fastai.vision.core import imagenet_stats
    from fastai_normstats.transform import DatasetStats
    from torchvision.transforms import v2
    x,plain = TensorImage(torch.rand(batch_shape, device=device)),torch.rand(batch_shape, device=device)
    n,d = (c.from_stats(*imagenet_stats, cuda=device!='cpu') for c in (Normalize, DatasetStats))
    t = v2.Normalize(*imagenet_stats)
    turns = {'fastai Normalize': lambda: n.encodes(x), 'DatasetStats': lambda: d.encodes(x),
             'torchvision v2 Normalize': lambda: t(plain)}
    return rows(f'normalising a batch, {device}', in_turns(turns, repeats), 'DatasetStats', 'fastai Normalize', .6)

def make_images(folder, n=1500):
    "Smooth random PNG files of 224 by 224"
    from PIL import Image
    rng = np.random.default_rng(0)
    for i in range(n):
        small = Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8))
        x = np.asarray(small.resize((224, 224), Image.BICUBIC)).astype(int)
        Image.fromarray((x+rng.integers(-8, 8, x.shape)).clip(0, 255).astype(np.uint8)).save(folder/f'{i:05}.png')
    return folder

def whole_fit(path, workers, repeats):
    from fastai.vision.all import DataBlock, ImageBlock, IndexSplitter, Resize, get_image_files
    from fastai_normstats.measure import measure_stats
    block = DataBlock(ImageBlock, n_inp=1, get_items=get_image_files, splitter=IndexSplitter([0]),
                      item_tfms=Resize(224, method='squish'))
    dl = block.dataloaders(path, bs=64, num_workers=workers).train
    def iterate():
        for _ in dl: pass
    def two_sums():
        s = q = 0
        for x, in dl: s,q = s+x.sum((0,2,3)),q+(x**2).sum((0,2,3))
    turns = {'iterate': iterate, 'measure_stats': lambda: measure_stats(dl, tol=0, verbose=False),
             'two-sum script': two_sums}
    what = f'a pass over {len(dl.dataset):,} images, {workers} workers'
    return rows(what, in_turns(turns, repeats, warm=1), 'measure_stats', 'iterate', 1.05)

class Greys:
    "`n` images of 6 by 6 pixels, made when asked for; their means spread by half of a pixel-std"
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i):
        from fastai.torch_core import TensorImage
        g = np.random.default_rng(i)
        return TensorImage(torch.from_numpy(g.normal(g.normal(.5, .1), .17, (3, 6, 6)).astype(np.float32))),

def fit_greys(n, tol):
    from fastai.data.core import TfmdDL
    from fastai_normstats.measure import measure_stats
    return measure_stats(TfmdDL(Greys(n), bs=64, shuffle=True, num_workers=0, n_inp=1), tol=tol, verbose=False)

def images_read():
    read = {n: fit_greys(n, .01).n_images for n in (50_000, 200_000, 1_000_000)}
    return [dict(what='images read, tol=0.01', candidate=f'of {n:,}', images=v) for n,v in read.items()]

def highest_memory():
    "Highest resident memory of this process so far in MB; `ru_maxrss` would count what it was forked from"
    try: return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1])//1024
    except OSError: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024**2  # macOS, in bytes

def peak_memory():
    "Highest resident memory of a process that fits `n` generated images wholly"
    def one(n):
        fit = [sys.executable, __file__, '--fit-greys', str(n)]
        return int(subprocess.run(fit, capture_output=True, text=True, check=True).stdout)
    mb = {n: one(n) for n in (1_000, 20_000)}
    return [dict(what='peak memory of a fit', candidate=f'{n:,} images', mb=v, ratio=v/mb[1_000], target=1.
                 if n>1_000 else np.nan)
            for n,v in mb.items()]

def cached_fit(repeats, n=100_000):
    """The second fit of `n` files, of which only 16 are opened, for the look: tiny copies of one image, and what was
    measured is put into the cache by hand"""
    from fastai.vision.all import Datasets, PILImage, Resize, ToTensor
    from fastai_normstats.all import DatasetStats, RunningStats
    from fastai_normstats.cache import provenance,write_entry
    from fastai_normstats.fingerprint import Fingerprint
    with tempfile.TemporaryDirectory() as tmp:
        files,cache = [Path(tmp)/f'{i:06}.png' for i in range(n)],Path(tmp)/'cache'
        PILImage.create(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(files[0])
        for f in files[1:]: f.write_bytes(files[0].read_bytes())
        dl = Datasets(files, [[PILImage.create]],
                      splits=[range(n), []]).dataloaders(after_item=[Resize(224), ToTensor()], num_workers=0).train
        tfm = DatasetStats(stats='custom', cache=cache, verbose=False)
        def fingerprint(): return Fingerprint(dl, **tfm.pass_args)
        fp,m = fingerprint(),RunningStats().update(torch.rand(4, 3, 8, 8))
        m.index = np.arange(4)  # of these items
        write_entry(cache, fp, m, provenance(dl, m, tfm.pass_args, fp))
        def fit():
            again = DatasetStats(stats='custom', cache=cache, verbose=False)
            again.setups(dl)
            assert again.ledger.n_images==4, 'it was measured anew'
        s = in_turns({'fingerprint': fingerprint, 'the fit, look included': fit}, max(3, repeats//3), warm=1).median()
    return [dict(what=f'second fit of {n:,} files, cached', candidate=k, seconds=v, target=3.) for k,v in s.items()]

def folds(path, n=5):
    """Five folds of a deterministic pipeline, each fitted by a recipe in `batch_tfms`, against one pass over a
    training split; and the look"""
    from fastai.vision.all import DataBlock, ImageBlock, IndexSplitter, Resize, get_image_files
    from fastai_normstats.all import DatasetStats
    from fastai_normstats.fingerprint import look
    from fastai_normstats.measure import measure_stats
    files = get_image_files(path).sorted()
    def loaders(fold, tfms):
        valid = IndexSplitter(range(fold, len(files), n))
        return DataBlock(ImageBlock, n_inp=1, splitter=valid, item_tfms=Resize(224, method='squish'),
                         batch_tfms=tfms).dataloaders(files, bs=64, num_workers=0)
    one = loaders(0, None)
    def all_folds():
        with tempfile.TemporaryDirectory() as tmp:
            tfm = DatasetStats(stats='custom', tol=0, cache=tmp, verbose=False)
            for i in range(n): loaders(i, [tfm])
    turns = {'one pass': lambda: measure_stats(one.train, tol=0, verbose=False), 'all folds': all_folds}
    s,looks = in_turns(turns, 3, warm=0).median(),in_turns({'look': lambda: look(one.train)}, 5, warm=1).median()
    what = f'{n} folds of {len(files):,} images'
    return [dict(what=what, candidate='one pass', seconds=s['one pass'], ratio=1.),
            dict(what=what, candidate='all folds', seconds=s['all folds'], ratio=s['all folds']/s['one pass'],
                 target=1.3),
            dict(what='a look at 16 images', candidate='two seeds', seconds=looks['look'], target=.3)]

# --- the table

def cell(v): return '' if pd.isna(v) else v if isinstance(v, str) else f'{v:,.0f}' if abs(v)>=100 else f'{v:.3g}'

heads = dict(what='what', candidate='candidate', ms='ms', spread='± ms', ratio='ratio', target='target',
             images='images', mb='MB', seconds='s')

def markdown(df):
    "A table with the two runs side by side"
    df = df.copy()
    df['what'] = df.what.where(df.what!=df.what.shift(), '')
    names = [heads.get(c, f"{heads[c.removesuffix('_2')]} (2)" if c.endswith('_2') else c) for c in df]
    lines = [names, ['---']*df.shape[1], *df.itertuples(index=False)]
    return '\n'.join(f"| {' | '.join(map(cell, o))} |" for o in lines)

def machine():
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ''
    versions = f"Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}"
    return f"{torch.get_num_threads()} threads on {platform.machine()}{gpu}, {versions}"

def measured(images, repeats):
    "One run of everything, as a table"
    devices = ['cpu']+['cuda']*torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as tmp:
        path = images or make_images(Path(tmp))
        many = folds(path)
        table = [*(r for d in devices for c in (1., .7) for r in update(d, repeats, c)),
                 *(r for d in devices for r in encodes(d, repeats)),
                 *(r for w in (0, 2) for r in whole_fit(path, w, max(3, repeats//3)))]
    return pd.DataFrame([*table, *many, *images_read(), *peak_memory(), *cached_fit(repeats)])

title = """# Speed and memory

> Each beside its yardstick in one run; times are medians, memory what a process needs at most."""

def main(images, out, repeats):
    first,second = measured(images, repeats),measured(images, repeats)
    assert first.candidate.equals(second.candidate)
    again = second.drop(columns=['what', 'candidate', 'target']).add_suffix('_2')
    df = pd.concat([first, again], axis=1).reindex(columns=[o for c in heads for o in (c, f'{c}_2')
                                                            if o in {*first, *again}])
    out.mkdir(exist_ok=True)
    df.to_csv(out/'results.csv', index=False, float_format='%.5g')
    note = (f"Two runs, side by side (the second under `(2)`). Medians over {repeats} interleaved turns ± half of the "
            f"interquartile range; a ratio is the quotient of the medians shown, to the first of its block. "
            f"{machine()}.")
    (out/'results.md').write_text(f"{title}\n\n{markdown(df)}\n\n{note}\n", encoding='utf-8')
    print((out/'results.md').read_text(encoding='utf-8'))

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--images', type=Path, help='folder of images for the whole fit')
    p.add_argument('--out', type=Path, default=Path(__file__).parent, help='folder for results.csv and results.md')
    p.add_argument('--repeats', type=int, default=15)
    p.add_argument('--fit-greys', type=int, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.fit_greys:
        fit_greys(args.fit_greys, 0)
        print(highest_memory())
    else: main(args.images, args.out, args.repeats)
