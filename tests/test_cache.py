"An entry is found again, gives the very same numbers, and nothing that happens to it fails a fit"

import io,json,os,random,signal,tempfile,time,warnings,zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fastai.vision.all import (Brightness,CategoryBlock,ColReader,DataBlock,Datasets,ImageBlock,IndexSplitter,
                               IntToFloatTensor,
                               ItemTransform,MaskBlock,PILImage,Resize,TensorImage,ToTensor,Transform,aug_transforms)
from PIL import Image

import fastai_normstats
from fastai_normstats import cache as C
from fastai_normstats.all import DatasetStats,StatsChoice
from fastai_normstats.fingerprint import Fingerprint,item_keys
from fastai_normstats.measure import measure_stats
from helpers import (bits,cache_entries as entries,fitted_choice,image_block,image_folder,no_address,
                     png_files as files,random_image)
from test_fingerprint import phase,set_world,told

small,quiet,held_out = dict(bs=4, num_workers=0),dict(verbose=False),range(0, 24, 4)
own = dict(stats='custom', **quiet)

@pytest.fixture
def folder(tmp_path): return image_folder(tmp_path/'images', n=24)

block,fit = partial(image_block, held_out),partial(fitted_choice, held_out)

# --- found again

def test_second_fit(folder, passes, cache_home):
    first = fit(folder)
    second = fit(folder)
    assert len(passes)==1 and len(entries(cache_home))==1
    assert bits(first)==bits(second) and first.provenance==second.provenance
    train = [f for k,f in enumerate(files(folder)) if k not in held_out]
    x = np.stack([np.asarray(Image.open(f).resize((12, 12), Image.BILINEAR)) for f in train])/255
    np.testing.assert_allclose([second.stats.mean, second.stats.std], [x.mean((0, 1, 2)), x.std((0, 1, 2))], atol=1e-6)

def test_all_ways_share_it(folder, passes):
    fit(folder)
    block(batch_tfms=DatasetStats(**own)).dataloaders(folder, **small)
    block().dataloaders(folder, **small).fit_stats(**own)
    assert len(passes)==1

def test_switched_off(folder, passes, cache_home):
    for _ in range(2): fit(folder, dict(cache=False))
    assert len(passes)==2 and not entries(cache_home)

def test_folder_of_ones_own(folder, passes, cache_home, tmp_path):
    for c in (tmp_path/'mine', str(tmp_path/'mine')): fit(folder, dict(cache=c))
    assert len(passes)==1 and not entries(cache_home) and len([*(tmp_path/'mine').iterdir()])==1

def test_says_so(folder, capsys):
    for _ in range(2): block().fit_stats(folder, stats='custom', **small)
    assert capsys.readouterr().out.count('reused, measured on 20')==1
    block(splitter=IndexSplitter(range(1, 24, 4))).fit_stats(folder, stats='custom', **small)
    assert '12 of 18 images are known' in capsys.readouterr().out

@pytest.mark.slow
def test_two_processes_at_once(folder):
    "Both measure, or one takes what the other has kept: the numbers are the same, and one entry a case stays"
    here = folder.parent
    set_world(here, .5, 1, 4, 1)
    (_,a),(_,b) = map(told, [phase(here, seed, .5) for seed in '12'])
    left = {d.name: [f.suffix for f in d.iterdir()] for d in (here/'cache').iterdir()}
    assert a==b and left=={k: ['.npz'] for k in a if k!='ids'}

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_many_writers_at_once(tmp_path):
    "Four processes that write and read the same entry over and over: each reads what it wrote"
    fs = files(image_folder(tmp_path/'i', n=8))
    fp,m,how = measured(fs)
    fp.look
    def work():
        for _ in range(20):
            C.write_entry(tmp_path/'c', fp, m, how)
            if not same_ledger(C.read_entry(tmp_path/'c', fp, list(map(str, fs)))[0], m): return 1
        return 0
    pids = []
    for _ in range(4):
        pids.append(os.fork())
        if pids[-1]: continue
        code = 2
        try:
            warnings.simplefilter('error')
            code = work()
        finally: os._exit(code)
    assert [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids]==[0]*4 and len([*(tmp_path/'c').iterdir()])==1

# --- tables

@pytest.fixture
def table(folder): return pd.DataFrame(dict(file=[str(f) for f in files(folder)], label=list('ab')*12))

def fit_table(df, get_x=ColReader('file'), splitter=IndexSplitter(held_out)):
    db = DataBlock((ImageBlock, CategoryBlock), get_x=get_x, get_y=ColReader('label'), splitter=splitter,
                   item_tfms=Resize(12))
    return db.fit_stats(df, **own, **small).stats_choice

def test_tables(table, passes):
    for _ in range(2): fit_table(table.copy())
    assert len(passes)==1
    f = Path(table.file[1])
    os.utime(f, ns=(f.stat().st_atime_ns, f.stat().st_mtime_ns+1000))
    fit_table(table)
    assert len(passes)==2
    fit_table(table.assign(label='c'))
    assert len(passes)==3

def test_table_of_10_000_rows(table, passes):
    big = pd.concat([table]*417, ignore_index=True).head(10_000)
    for _ in range(2): fit_table(big, get_x=lambda r: r.file, splitter=IndexSplitter(range(9_900)))
    assert len(passes)==1

# --- volumes and masks

@pytest.mark.parametrize('shape', [(1, 40), (2, 12, 9), (1, 9, 10, 11), (2, 3, 9, 4, 4)], ids=str)
def test_signals_and_volumes(tmp_path, passes, cache_home, shape):
    "Kept and found again, whatever the number of their axes; not once their pixels changed"
    rng,fs = np.random.default_rng(0),[tmp_path/f'{i:02}.npy' for i in range(20)]
    gain = [1.]
    for f in fs: np.save(f, rng.uniform(size=shape).astype(np.float32))
    def fit_volumes():
        dls = Datasets(fs, [[lambda f: TensorImage(np.load(f)*gain[0])]]).dataloaders(bs=4, num_workers=0)
        return dls.fit_stats(**own).stats_choice
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'cannot keep')
        first = fit_volumes()
        assert bits(fit_volumes())==bits(first) and len(passes)==1 and len(entries(cache_home))==1
        gain[0] = .99
        assert bits(fit_volumes())!=bits(first) and len(passes)==2

class CropByMask(ItemTransform):
    "The image where its mask is, which sees both at once"
    order = 6
    def encodes(self, xy): return xy[0]*(xy[1]>0),xy[1]

def fit_segmentation(folder, masks, codes=None, *tfms, **kwargs):
    block = DataBlock((ImageBlock, MaskBlock(codes)), get_items=files, get_y=lambda f: masks/f.name,
                      splitter=IndexSplitter(held_out), item_tfms=[Resize(12), *tfms])
    return block.fit_stats(folder, **own, **small, **kwargs).stats_choice

def draw_masks(folder, masks, seed=0):
    rng = np.random.default_rng(seed)
    masks.mkdir(exist_ok=True)
    for f in files(folder): Image.fromarray(rng.integers(0, 2, (16, 16), dtype=np.uint8)).save(masks/f.name)

@pytest.mark.parametrize('codes', [None, ['none', 'lung'], np.array(['none', 'lung'])], ids=['plain', 'list', 'array'])
def test_segmentation(folder, passes, cache_home, codes):
    "Found again; other masks of the same images change nothing"
    masks = folder.parent/'masks'
    draw_masks(folder, masks)
    first = fit_segmentation(folder, masks, codes)
    assert len(entries(cache_home))==1
    draw_masks(folder, masks, seed=1)
    assert bits(fit_segmentation(folder, masks, codes))==bits(first) and len(passes)==1

def test_masks_that_change_the_images(folder, passes):
    "Where a transform sees image and mask at once, another mask is another image, also of one that no look shows"
    masks = folder.parent/'masks'
    draw_masks(folder, masks)
    def of(): return fit_segmentation(folder, masks, None, CropByMask())
    first = of()
    assert bits(of())==bits(first) and len(passes)==1
    dl = DataBlock((ImageBlock, MaskBlock), get_items=files, get_y=lambda f: masks/f.name,
                   splitter=IndexSplitter(held_out),
                   item_tfms=[Resize(12), CropByMask()]).dataloaders(folder, **small).train
    seen = Fingerprint(dl).look.keys
    unseen = next(f for f,k in zip(dl.dataset.items, item_keys(dl)[0]) if k not in seen)
    Image.fromarray(np.ones((16, 16), np.uint8)).save(masks/unseen.name)
    os.utime(masks/unseen.name, ns=(1, 1))
    assert bits(of())!=bits(first) and len(passes)==2

# --- rows that need not be read again

opened = []
def create(f):
    opened.append(f)
    return PILImage.create(f)

class Apply(Transform):
    order = 50
    def __init__(self, f): self.f = f
    def encodes(self, x:TensorImage): return self.f(x)

def loaders(fs, *tfms, load=[[create]], **kwargs):
    tfms = dict(after_item=[Resize(8), ToTensor()], after_batch=[IntToFloatTensor(), *tfms])
    return Datasets(fs, load, **kwargs).dataloaders(**tfms, bs=16, num_workers=0)

def reading(fs, *tfms, load=[[create]], n_inp=None, **kwargs):
    "Ledger of `fs`, and how many files were opened for it"
    dls = loaders(fs, *tfms, load=load, n_inp=n_inp)
    opened.clear()
    dls.fit_stats(**{**own, 'tol': 0, **kwargs})
    return dls.train.after_batch.dataset_stats.ledger,len(opened)

def same_ledger(a, b):
    "Are all rows, quantiles and summaries of two ledgers the same bits?"
    if not a.images.equals(b.images) or a.measured()!=b.measured(): return False
    return all(np.array_equal(x, y, equal_nan=True) for x,y in zip(a.to_arrays().values(), b.to_arrays().values()))

def fresh(*args, **kwargs): return reading(*args, cache=False, **kwargs)[0]

look = 2*16+1  # under two seeds; and the first item, to see what it becomes
dark = 5       # that a guard looks at where there are lighting transforms
beneath = 5    # whose masked pixels a guard looks at, which the network is shown

@pytest.fixture
def sixty(tmp_path): return files(image_folder(tmp_path/'sixty', n=60, size=8))

def test_whole_measurement(sixty):
    m,n = reading(sixty)
    again,k = reading(sixty)
    assert n==look+60 and k==look and same_ledger(again, m)

@pytest.mark.slow
def test_five_folds(tmp_path):
    "Little more than one pass over all images, looks included; and to the bit what each fold would give by itself"
    fs,total = files(image_folder(tmp_path/'many', n=600, size=8)),0
    for k in range(5):
        fold = [f for i,f in enumerate(fs) if i%5!=k]
        m,n = reading(fold)
        total += n
        if k in (1, 4): assert same_ledger(m, fresh(fold))
    assert total<=1.3*len(fs)

def test_an_image_added(sixty):
    first = reading(sixty[1:])
    m,n = reading(sixty)
    assert n<=look+1 and same_ledger(m, fresh(sixty)) and first[0].n_images==59

def test_an_image_changed(sixty):
    reading(sixty)
    random_image(np.random.default_rng(3), 8).save(sixty[7])
    os.utime(sixty[7], ns=(1, 1))
    m,n = reading(sixty)
    assert n==look+1 and same_ledger(m, fresh(sixty))

def test_an_image_removed_and_another_order(sixty):
    reading(sixty)
    for fs in (sixty[1:], sixty[::-1]):
        m,n = reading(fs)
        assert n==look and same_ledger(m, fresh(fs))

def patient(f): return int(f.stem)//3

@pytest.mark.parametrize('first, then', [({}, dict(groups=patient)), (dict(groups=patient), {}), ({}, dict(seed=3)),
                                         ({}, dict(tol=.01)),
    (dict(groups=patient), dict(groups=lambda f: int(f.stem)//5)), (dict(tol=.01), {}), ({}, dict(max_images=20)),
    ({}, dict(max_images=20, groups=patient))], ids=no_address)
def test_asked_otherwise(sixty, first, then):
    """Other groups, another tolerance, order or limit of a set that is known wholly: nothing is read, the numbers are
    a pass's"""
    reading(sixty, **first)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # few images
        m,n = reading(sixty, **then)
        assert n==look and same_ledger(m, fresh(sixty, **then))

@pytest.mark.parametrize('groups', [None, patient], ids=['no groups', 'groups'])
def test_passes_that_stopped_early(tmp_path, monkeypatch, groups):
    "Of a set that was measured in part, what is missing is read; what was read counts no more than in a pass by itself"
    for k,v in dict(_look=24, _least=(24, 8)).items(): monkeypatch.setattr(f'fastai_normstats.measure.{k}', v)
    fs = files(image_folder(tmp_path/'i', n=120, size=8))
    part,_ = reading(fs, tol=.5, groups=groups)
    assert part.n_images<100 and not part.complete
    m,n = reading(fs[10:], tol=.4, groups=groups)
    assert same_ledger(m, fresh(fs[10:], tol=.4, groups=groups)) and n<=len(opened)
    m,n = reading(fs, groups=groups)
    assert same_ledger(m, fresh(fs, groups=groups)) and n<=look+120-part.n_images

def test_a_mask(sixty):
    def mask(x): return x[:, :1]>.3
    reading(sixty[5:], mask=mask)
    m,n = reading(sixty, mask=mask)
    assert n==look+beneath+5 and same_ledger(m, fresh(sixty, mask=mask))
    assert reading(sixty)[1]==look+60  # another pipeline

def test_not_finite_pixels(sixty):
    def holes(x): return x.where(x>.3, float('nan'))
    reading(sixty[5:], Apply(holes), nonfinite='ignore')
    m,n = reading(sixty, Apply(holes), nonfinite='ignore')
    assert n<=look+5 and same_ledger(m, fresh(sixty, Apply(holes), nonfinite='ignore'))

def mirrored(f): return PILImage(create(f).transpose(Image.Transpose.FLIP_LEFT_RIGHT))

def test_items_of_several_images(sixty):
    "Two images an item, which are a group"
    pairs = dict(load=[[create], [mirrored]], n_inp=2)
    reading(sixty[5:], **pairs)
    m,n = reading(sixty, **pairs)
    assert m.n_images==120 and m.n_groups==60 and n<=2*(look+5) and same_ledger(m, fresh(sixty, **pairs))

def test_files_that_are_listed_more_than_once(sixty):
    fs = [*sixty[:20], *sixty[:20], *sixty[:5]]
    first,_ = reading(fs)
    m,n = reading([*fs, sixty[30]])
    assert first.n_images==45 and m.n_images==46 and n<=look+1 and same_ledger(m, fresh([*fs, sixty[30]]))
    m,n = reading([*sixty[:30], *sixty[:2]])
    assert m.n_images==32 and same_ledger(m, fresh([*sixty[:30], *sixty[:2]]))
    m,n = reading([sixty[0]]*20)
    assert m.n_images==20 and same_ledger(m, fresh([sixty[0]]*20))

def test_random_pipelines_reuse_whole_measurements_only(sixty):
    tfms = aug_transforms()
    m,n = reading(sixty, *tfms)
    again,k = reading(sixty, *tfms)
    assert k==look+16+dark and same_ledger(m, again)  # one more look, at the first seed
    others = (sixty[1:], {}), (sixty[::-1], {}), (sixty, dict(seed=1)), (sixty, dict(groups=patient))
    for fs,kwargs in others: assert reading(fs, *tfms, **kwargs)[1]==k+len(fs)

def test_rare_random_transforms_reuse_whole_measurements_only(sixty):
    "The look shows no difference"
    for k,fs in ((60, sixty), (0, sixty), (59, sixty[1:])): assert reading(fs, Brightness(p=1e-9))[1]==look+dark+k

def test_rows_of_another_pipeline_are_not_taken(sixty, monkeypatch):
    "Also where no line of the recipe says that it is another"
    gain = [.5]
    def dim(x): return x*gain[0]
    reading(sixty[1:], Apply(dim))
    gain[0] = .25
    m,n = reading(sixty, Apply(dim))
    assert n==look+60 and same_ledger(m, fresh(sixty, Apply(dim)))
    gain[0] = .5
    m,n = reading(sixty[2:], Apply(dim))
    assert n==look and same_ledger(m, fresh(sixty[2:], Apply(dim)))

# --- faults

def measured(fs):
    dl = loaders(fs).train
    fp = Fingerprint(dl, tol=0)
    m = measure_stats(dl, tol=0, verbose=False)
    return fp,m,C.provenance(dl, m, dict(tol=0), fp)

def rewritten(f, change, seal=True):
    "Entry `f` with a header and arrays that function `change` changed, and a digest that fits"
    with np.load(f) as z: header,arrays = json.loads(z['header'].item()),{k: z[k] for k in z.files if k!='header'}
    digest = header.pop('digest')
    change(header, arrays)
    if seal: digest = C._digest_of(header, {k: v for k,v in arrays.items() if v.dtype!=object})
    np.savez(f, header=np.array(json.dumps(header | dict(digest=digest)).encode()), **arrays)

def declared(f, shape):
    "Entry `f` with an array that says it has `shape`, and has next to nothing"
    with zipfile.ZipFile(f) as z: parts = {o: z.read(o) for o in z.namelist()}
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, dict(descr='<f8', fortran_order=False, shape=shape))
    with zipfile.ZipFile(f, 'w') as z:
        for k,v in parts.items(): z.writestr(k, out.getvalue()+b'0'*64 if k=='m.npy' else v)

def compressed(f):
    with np.load(f) as z: np.savez_compressed(f, **{k: z[k] for k in z.files})

def flipped(f):
    data = bytearray(f.read_bytes())
    data[len(data)//2] ^= 1
    f.write_bytes(data)

def into_folder(f): f.unlink(); f.mkdir()
def set_item(k, i, v): return lambda h, a: a[k].__setitem__(i, v)
def set_array(k, v):   return lambda h, a: a.__setitem__(k, v(a[k]))
def set_header(k, v):  return lambda h, a: h.__setitem__(k, v(h[k]))
def lacking(k):        return lambda h, a: (h if k in h else a).pop(k)
def fact(k, v):        return set_header('facts', lambda d: d | {k: v})
def nested(n): return '['*n+']'*n

faults = {
    'truncated':     lambda f: f.write_bytes(f.read_bytes()[:2000]),
    'empty':         lambda f: f.write_bytes(b''),
    'binary':        lambda f: f.write_bytes(os.urandom(3000)),
    'text':          lambda f: f.write_text('{}'),
    'bit flipped':   flipped,
    'folder':        into_folder,
    'compressed':    compressed,
    'another npz':   lambda f: np.savez(f, a=np.zeros(3)),
    'no header':     lambda f: np.savez(f, header=np.zeros(3)),
    'header of nothing': lambda f: np.savez(f, header=np.array(b'')),
    'header nested': lambda f: np.savez(f, header=np.array(nested(10**5).encode())),
    'header of a list':  lambda f: np.savez(f, header=np.array(b'[]')),
    'huge':          lambda f: declared(f, (10**12,)),
    'huge in axes':  lambda f: declared(f, (10**6,)*5),
    'negative axes': lambda f: declared(f, (-1,)),
    'no digest':     lambda f: rewritten(f, set_item('m', (1, 0, 0), .5), seal=False)}
forgeries = {
    'objects':       set_array('m', lambda v: v.astype(object)),
    'other format':  set_header('format', lambda v: 'something'),
    'newer':         set_header('version', lambda v: 99),
    'older':         set_header('version', lambda v: 1),
    'nan':           set_item('m', (1, 0, 0), np.nan),
    'infinite':      set_item('m', (2, 0, 0), np.inf),
    'negative':      set_item('m', (2, 0, 0), -1.),
    'mean too high': set_item('m', (1, 0, 0), 5.),
    'too much spread': set_item('m', (2, 0, 0), 5.),
    'beyond':        set_array('m', lambda v: v*1e200),
    'quantiles':     set_array('q', lambda v: v*np.float32('nan')),
    'float32':       set_array('m', lambda v: v.astype(np.float32)),
    'transposed':    set_array('m', lambda v: v.transpose(1, 0, 2)),
    'fewer rows':    set_array('n_pixels', lambda v: v[1:]),
    'no rows':       set_array('n_pixels', lambda v: v[:0]),
    'rows beyond':   set_item('index', 0, 10**6),
    'rows of floats': set_array('index', lambda v: v.astype(float)),
    'quantiles of no row': set_item('at', 0, 99),
    'other keys':    set_array('keys', lambda v: v[::-1].copy()),
    'fewer keys':    set_array('keys', lambda v: v[1:]),
    'keys of numbers': set_array('keys', lambda v: np.arange(len(v))),
    'other look':    set_array('first', lambda v: v[1:]),
    'look of words': set_array('first', lambda v: v.astype('S8')),
    'look of rows':  set_header('rows', lambda v: ['a']*len(v)),
    'look of many rows': set_header('rows', lambda v: [10**9]*len(v)),
    'facts':         set_header('facts', lambda v: {**v, '_rows': None}),
    'fact':          fact('complete', 'yes'),
    'population':    fact('population', 'many'),
    'size':          fact('image_size', ['a', {}]),
    'rule':          fact('nonfinite', 'maybe'),
    'groups':        set_header('groups', lambda v: [1, 2]),
    'no provenance': set_header('provenance', lambda v: None),
    'no date':       set_header('provenance', lambda v: {**v, 'measured_at': 3}),
    'lacking rows':  lacking('m'),
    'lacking facts': lacking('facts'),
    'lacking recipe': lacking('recipe')}

@pytest.mark.parametrize('name', [*faults, *forgeries])
def test_damaged_entry(folder, passes, cache_home, name):
    "Measured again with a warning that names the file, and mended where that can be"
    first = fit(folder)
    f, = entries(cache_home)
    if name in faults: faults[name](f)
    else: rewritten(f, forgeries[name])
    with pytest.warns(UserWarning, match=f'{f.name} cannot be used'): again = fit(folder)
    assert bits(again)==bits(first) and len(passes)==2
    if name=='folder': return
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert bits(fit(folder))==bits(first) and len(passes)==2

elsewhere = [k for k in [*faults, *forgeries] if k not in ('folder', 'rows beyond',
    'other keys')]  # these say nothing of other sets

@pytest.mark.slow
@pytest.mark.parametrize('name', elsewhere)
def test_damaged_entry_of_another_fold(sixty, cache_home, name):
    "Its rows are not taken, and the pass goes on"
    reading(sixty[1:])
    f, = entries(cache_home)
    if name in faults: faults[name](f)
    else: rewritten(f, forgeries[name])
    with pytest.warns(UserWarning, match=f'{f.name} cannot be used'): m,n = reading(sixty)
    assert n==look+60 and same_ledger(m, fresh(sixty))

def test_what_a_forger_may_not_do(sixty, cache_home, tmp_path):
    "An entry that runs something when it is unpickled is not unpickled"
    reading(sixty)
    f, = entries(cache_home)
    class Harm:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'harm'),)
    with np.load(f) as z: parts = {k: z[k] for k in z.files}
    np.savez(f, **{**parts, 'q': np.array([Harm()], dtype=object)})
    with pytest.warns(UserWarning, match='cannot be used'): reading(sixty)
    assert not (tmp_path/'harm').exists()

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs pipes')
@pytest.mark.parametrize('where', ['entry', 'another entry', 'folder'])
def test_a_pipe_in_its_place(sixty, cache_home, where):
    "Opening one would wait for ever"
    reading(sixty)
    f, = entries(cache_home)
    if where=='folder':
        f.unlink(), f.parent.rmdir()
        f = f.parent
    else: f.unlink()
    os.mkfifo(f)
    def too_long(*args): raise TimeoutError('waits')
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            m,n = reading(sixty[1:] if where=='another entry' else sixty)
        assert n>=look+59 and C.clear_cache()==(1 if where=='another entry' else 0 if where=='folder' else 1)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)

def no_space(*args, **kwargs): raise OSError(28, 'No space left on device')

@pytest.mark.parametrize('what', ['tempfile.mkstemp', 'numpy.savez', 'pathlib.Path.mkdir', 'os.replace', 'os.chmod'])
def test_full_or_readonly_disk(folder, passes, cache_home, monkeypatch, what):
    with monkeypatch.context() as m:
        m.setattr(what, no_space)
        with pytest.warns(UserWarning, match='cannot keep the measurement in .*No space left'): choice = fit(folder)
    assert choice.measured.n_images==18 and not entries(cache_home)
    fit(folder)
    assert len(passes)==2 and len(entries(cache_home))==1

def test_time_of_use_cannot_be_set(folder, passes, monkeypatch):
    "The folder is somebody else's, who lets it be read"
    first = fit(folder)
    def refused(*args, **kwargs): raise PermissionError(1, 'Operation not permitted')
    monkeypatch.setattr('os.utime', refused)
    assert bits(fit(folder))==bits(first) and len(passes)==1

def may_do_anything():
    "Does this process read what nobody may read, as root does?"
    with tempfile.TemporaryDirectory() as d:
        f = Path(d)/'f'
        f.touch(0)
        return os.access(f, os.R_OK)

as_root = pytest.mark.skipif(may_do_anything(), reason='this process may read and write anywhere')

@as_root
def test_readonly_folder(folder, cache_home):
    os.chmod(cache_home, 0o500)
    with pytest.warns(UserWarning, match='cannot keep the measurement'): fit(folder)

@as_root
@pytest.mark.parametrize('what', ['entry', 'folder'])
def test_unreadable(folder, passes, cache_home, what):
    first = fit(folder)
    f, = entries(cache_home)
    os.chmod(f if what=='entry' else f.parent, 0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert bits(fit(folder))==bits(first) and len(passes)==2

errors = PermissionError(13, 'Permission denied'),RuntimeError('odd'),MemoryError(),RecursionError()

@pytest.mark.parametrize('error', errors, ids=lambda e: type(e).__name__)
def test_reading_raises(folder, passes, monkeypatch, error):
    "Whatever it is"
    first = fit(folder)
    def refused(*args, **kwargs): raise error
    with monkeypatch.context() as m:
        m.setattr('numpy.load', refused)
        with pytest.warns(UserWarning, match='cannot be used'): assert bits(fit(folder))==bits(first)
    assert len(passes)==2

def test_a_file_where_the_folder_should_be(folder, cache_home):
    (cache_home/'fastai_normstats').write_text('')
    with pytest.warns(UserWarning, match='cannot keep the measurement'): assert fit(folder).measured.n_images==18

@pytest.mark.parametrize('cache', ['a\0b', 'x'*300])
def test_folders_that_cannot_be(folder, cache):
    with pytest.warns(UserWarning, match='cannot keep the measurement'): choice = fit(folder, dict(cache=cache))
    assert choice.measured.n_images==18

@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_killed_while_writing(tmp_path):
    "100 processes that write the same entry over and over, killed at random moments: what is read is whole, or nothing"
    fs,cache,rng = files(image_folder(tmp_path/'i', n=8)),tmp_path/'c',random.Random(0)
    (fp,m,how),seen = measured(fs),0
    fp.look
    for _ in range(100):
        pid = os.fork()
        if not pid:
            try:
                while True: C.write_entry(cache, fp, m, how)
            finally: os._exit(1)
        time.sleep(rng.random()*.03)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            found = C.read_entry(cache, fp, list(map(str, fs)))
        assert found is None or same_ledger(found[0], m)
        seen += found is not None
    assert seen>50
    for f in cache.glob('.*'): os.utime(f, ns=(1, 1))  # what was left half written long ago goes
    C.write_entry(cache, fp, m, how)
    assert [f.name for f in cache.iterdir()]==[f'{fp.name}.npz']

# --- room

def test_what_was_not_used_for_longest_goes(folder, cache_home, passes, monkeypatch):
    "Used by reading it whole, or rows of it"
    splits = [range(k, 24, 4) for k in range(4)]
    def fit_split(k, **kwargs): fit(folder, kwargs, splitter=IndexSplitter(splits[k]), batch_tfms=aug_transforms())
    for k in range(3):
        fit_split(k)
        for f in entries(cache_home): os.utime(f, ns=(f.stat().st_atime_ns, f.stat().st_mtime_ns-10**9))
    fit_split(0)  # used again: now the youngest
    assert len(passes)==3 and len(entries(cache_home))==3
    size = max(f.stat().st_size for f in entries(cache_home))
    monkeypatch.setattr(C, 'most_bytes', int(3.5*size))
    fit_split(3)
    assert len(entries(cache_home))==3
    for k in (0, 2, 3): fit_split(k)
    assert len(passes)==4  # split 1 went
    monkeypatch.setattr(C, 'most_bytes', 1)
    fit_split(0, seed=1)
    assert len(entries(cache_home))==1 and len(passes)==5  # the newest stays, however large

def test_rows_that_are_used_keep_an_entry(sixty, cache_home):
    reading(sixty[1:])
    f, = entries(cache_home)
    os.utime(f, ns=(1, 1))
    reading(sixty)
    assert f.stat().st_mtime_ns>10**18

def test_other_files_stay(folder, cache_home, monkeypatch):
    home = cache_home/'fastai_normstats'
    home.mkdir()
    for name in ('notes.txt', 'a-b.npz.bak', 'x.npz'): (home/name).write_text('mine')
    monkeypatch.setattr(C, 'most_bytes', 1)
    fit(folder)
    (home/('0'*64+'.json')).write_text('of the first version')
    assert C.clear_cache()==2 and {f.name for f in home.iterdir()}=={'notes.txt', 'a-b.npz.bak', 'x.npz'}
    assert C.clear_cache(home/'none')==0 and C.clear_cache(False)==0

# --- provenance

def test_provenance(folder, cache_home):
    c = fit(folder, dict(tol=0, seed=3), batch_tfms=aug_transforms())
    p = c.provenance
    assert p['image_size']==[12, 12] and (p['n_images'], p['n_training'], p['tol'], p['seed'])==(18, 18, 0, 3)
    assert len(p['split'])==24 and 'T' in p['measured_at']
    assert p['versions']['fastai_normstats']==fastai_normstats.__version__
    assert {'fastai', 'torch', 'pillow', 'python'}<={*p['versions']}
    for name in ('Resize', 'Flip'): assert any(name in t for t in p['transforms'])
    f, = entries(cache_home)
    with np.load(f) as z: header = json.loads(z['header'].item())
    assert header['provenance']==p and 'seed: 3' in header['reading']
    assert any('Flip' in line for line in header['recipe'])
    d = json.loads(json.dumps(c.to_dict()))
    assert StatsChoice.from_dict(d).provenance==p

def test_a_saved_choice_given_back_keeps_numbers_and_provenance(folder, tmp_path, passes):
    c = fit(folder)
    c.save(tmp_path/'s.json')
    given = block().fit_stats(folder, stats=StatsChoice.load(tmp_path/'s.json'), **quiet, **small).stats_choice
    assert given.stats==c.stats and given.provenance==c.provenance and len(passes)==1
    np.testing.assert_array_equal(given.measured.mean, c.measured.mean)

def test_choices_saved_before_there_was_provenance(folder, tmp_path):
    c = fit(folder)
    d = c.to_dict()
    del d['provenance']
    (tmp_path/'s.json').write_text(json.dumps(d))
    assert StatsChoice.load(tmp_path/'s.json').stats==c.stats
