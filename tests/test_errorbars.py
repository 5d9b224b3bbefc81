"Error bars cover what they say, and the stop rule stops when they are small: simulations with a known truth"

import math,os,warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import TfmdDL
from fastai.torch_core import TensorImage
from fastcore.basics import chunked
from helpers import Greys,Ready
from PIL import Image

from fastai_normstats import running
from fastai_normstats.measure import _next_look,measure_stats
from fastai_normstats.policy import choose_stats
from fastai_normstats.running import RunningStats

@pytest.fixture
def moments_only(monkeypatch):
    "Quantiles have no part in it and take most of the time"
    monkeypatch.setattr(running, 'most_quantiles', 0)

# --- calibration

class Images:
    """A population of images with means and stds of their own and pixels in clumps of four; `kinds`: (share, side,
    lowest and highest mean, the same for std)"""
    def __init__(self, *kinds):
        self.kinds = kinds
        share,side = (np.array([k[i] for k in kinds]) for i in (0, 1))
        w  = share*side**2/(share*side**2).sum()  # share of the pixels
        m  = np.array([(a+b)/2 for *_,(a,b),_ in kinds])
        m2 = np.array([(a*a+a*b+b*b)/3 for *_,(a,b),_ in kinds])
        s2 = np.array([(a*a+a*b+b*b)/3 for *_,(a,b) in kinds])
        self.mean = (w*m).sum()
        self.std  = math.sqrt((w*(m2+s2)).sum()-self.mean**2)

    def draw(self, n, n_channels, g):
        "`n` random images, those of a kind as a batch"
        of = torch.multinomial(torch.tensor([k[0] for k in self.kinds]), n, replacement=True, generator=g)
        for i,(_,side,m,s) in enumerate(self.kinds):
            if not (k := int((of==i).sum())): continue
            def between(lo, hi): return lo+(hi-lo)*torch.rand(k, n_channels, 1, 1, generator=g)
            x = between(*m)+between(*s)*torch.randn(k, n_channels, side//2, side//2, generator=g)
            yield x[...,None,:,None].expand(-1, -1, -1, 2, -1, 2).flatten(4).flatten(2, 3)

alike   = Images((1., 20, (.1, .7), (.02, .3)))
unequal = Images((.5, 16, (.1, .5), (.02, .2)), (.3, 20, (.3, .7), (.02, .3)),
                 (.2, 32, (.4, .9), (.1, .3)))  # large ones are brighter

@pytest.mark.slow
@pytest.mark.parametrize('kinds', [alike, unequal], ids=['one size', 'three sizes'])
@pytest.mark.parametrize('n', [200, 500, 2000])
def test_intervals_cover_what_they_say(moments_only, n, kinds):
    """1,000 data sets of `n` images (100 times 10 channels): nominal 95 % intervals hold the truth in 93–97 %, those
    of pixels in under 20 %"""
    g,inside = torch.Generator().manual_seed(0),[]
    for _ in range(100):
        rs = RunningStats()
        for b in kinds.draw(n, 10, g): rs.update(b)
        off    = torch.stack([rs.mean-kinds.mean, rs.std-kinds.std]).abs()
        pixels = torch.stack([rs.std, rs.std/math.sqrt(2)])/math.sqrt(rs.n_pixels)  # what independent pixels would give
        inside.append(torch.stack([off<=1.96*torch.stack([rs.mean_se, rs.std_se]), off<=1.96*pixels]))
    (mean,std),(naive_mean,naive_std) = torch.stack(inside).double().mean((0, -1)).tolist()
    assert .93<=mean<=.97 and .93<=std<=.97, (mean, std)
    assert naive_mean<.2 and naive_std<.2, (naive_mean, naive_std)

# --- images in families

class Families:
    """`G` patients with images of 4 or 12 pixels, the large ones a little brighter; brightness and contrast of one
    patient's images have intra-class correlation `icc`"""
    kinds = [(.6, 1, .48), (.4, 3, .52)]  # share of the images, pixels over 4, mean
    grey,contrast,between = .1,.15,.04  # std of images' means; mean and std of their contrasts

    def __init__(self, G, sizes, icc, seed=0):
        self.G,self.sizes,self.icc,self.rng = G,sizes,icc,np.random.default_rng(seed)

    @property
    def truth(self):
        "Mean and std of all pixels, from the formula"
        share,n,m = np.array(self.kinds).T
        w = share*n/(share*n).sum()
        return (w*m).sum(),math.sqrt((w*m**2).sum()-(w*m).sum()**2+self.grey**2+self.contrast**2+self.between**2)

    def draw(self, C):
        "A data set of `C` channels as batches (images, whose they are)"
        lo,hi = self.sizes
        of = np.repeat(np.arange(self.G), self.rng.integers(lo, hi+1, self.G))
        def of_images(): return math.sqrt(self.icc)*self.rng.normal(size=(self.G,
            C))[of]+math.sqrt(1-self.icc)*self.rng.normal(size=(len(of), C))
        grey,contrast = self.grey*of_images(),self.contrast+self.between*of_images()
        large = self.rng.random(len(of))<self.kinds[1][0]
        for k,(_,n,m) in enumerate(self.kinds):
            i = large==k
            x = m+grey[i,:,None]+contrast[i,:,None]*np.tile([-1, 1, 1, -1], n)
            if i.any(): yield torch.from_numpy(x),of[i]

def coverage(families, reps=1000, C=20):
    """Share of `reps` data sets (`C` channels of fewer draws, which have in common no more than how large the images
    are) whose nominal 95 % intervals of mean and std hold the truth: groups as units, images as units"""
    inside,truth = [],torch.tensor(families.truth)[:,None]
    for _ in range(reps//C):
        rs = RunningStats()
        for x,of in families.draw(C): rs.update(x, groups=of)
        alone = rs.labelled(rs.items, [None]*rs.n_images)
        off = (torch.stack([rs.mean, rs.std])-truth).abs()
        inside.append(torch.stack([off<=torch.stack(o.half_widths()) for o in (rs, alone)]))
    return torch.stack(inside).double().mean((0, -1))

cases = [(40, (2, 2)), (40, (2, 30)), (40, (30, 30)), (200, (2, 2)), (200, (2, 30)), (2000, (2, 2)), (2000, (2, 6))]

@pytest.mark.slow
@pytest.mark.parametrize('icc', [0, .3, .9])
@pytest.mark.parametrize('G,sizes', cases, ids=[f'{g} of {a} to {b}' for g,(a,b) in cases])
def test_intervals_hold_where_images_come_in_families(moments_only, G, sizes, icc):
    """1,000 data sets: nominal 95 % intervals of mean and std cover 93–97 %, of 40 patients 91–97 %; images as units
    do not, as soon as the images of one resemble each other"""
    (mean,std),(naive_mean,naive_std) = coverage(Families(G, sizes, icc)).tolist()
    least = .91 if G==40 else .93
    assert least<=mean<=.97 and least<=std<=.97, (mean, std)
    if icc==.9: assert naive_mean<.9 and naive_std<.9, (naive_mean, naive_std)
    if icc and sizes[1]==30: assert naive_mean<.8 and naive_std<.8, (naive_mean, naive_std)

def test_effective_number_of_images(moments_only):
    """1 + (m-1) ρ of Kish (1965): 2,000 groups of 5 images, intra-class correlation .5, are worth a third of their
    images"""
    class Plain(Families):
        kinds = [(1., 1, .5)]
        def draw(self, C):
            self.kinds = [(1., 1, .5), (0., 1, .5)]
            yield from super().draw(C)
    rs = RunningStats()
    for x,of in Plain(2000, (5, 5), .5).draw(20): rs.update(x, groups=of)
    assert rs.design_effect.mean().item()==pytest.approx(3, rel=.05)
    assert (rs.n_groups, rs.n_images)==(2000, 10_000) and 2800<rs.n_effective<3400  # the worst of 20 channels

def test_intervals_for_a_part_of_the_patients(moments_only):
    """Half of 400 patients say where all of them are: intervals with the finite-population correction in patients
    cover 93–97 %, without it too much"""
    families,inside = Families(400, (2, 9), .6),[]
    for _ in range(20):
        batches = list(families.draw(50))
        part,whole = RunningStats(),RunningStats()
        chosen = families.rng.permutation(400)[:200]
        for x,of in batches:
            i = np.isin(of, chosen)
            part.update(x[i], groups=of[i]), whole.update(x, groups=of)
        off = (torch.stack([part.mean, part.std])-torch.stack([whole.mean, whole.std])).abs()
        wide = off<=torch.stack(part.half_widths())
        part.complete,part.population,part.population_groups = False,whole.n_images,400
        inside.append(torch.stack([off<=torch.stack(part.half_widths()), wide]))
    (mean,std),(wide_mean,wide_std) = torch.stack(inside).double().mean((0, -1)).tolist()
    assert .93<=mean<=.97 and .93<=std<=.97, (mean, std)
    assert wide_mean>.98 and wide_std>.98

DATA = Path(os.environ.get('NORMSTATS_DATA', Path(__file__).parents[2]/'shared'/'data'))
CXR = DATA/'cxr_ped'

@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.skipif(not CXR.is_dir(), reason='needs the chest X-rays')
def test_standard_errors_of_real_patients():
    "3,146 X-rays of 2,352 patients: Cochran's formula for ratio estimators, in numpy"
    labels = pd.read_csv(CXR/'labels.csv')
    x = np.stack([np.asarray(Image.open(CXR/f).convert('L').resize((64, 64),
        Image.Resampling.BILINEAR)) for f in labels.fname])/255.
    rs = RunningStats()
    for i in range(0, len(x), 64):
        rows = labels[i:i+64]
        rs.update(torch.from_numpy(x[i:i+64,None]), items=rows.fname, groups=rows.patient_id)
    codes,G = pd.factorize(labels.patient_id)[0],labels.patient_id.nunique()
    N,sums = np.bincount(codes)*64**2,np.bincount(codes, x.sum((1, 2)))
    squares = np.bincount(codes, ((x-x.mean())**2).sum((1, 2)))
    def se(T): return math.sqrt(G/(G-1)*((T-T.sum()/N.sum()*N)**2).sum())/N.sum()
    np.testing.assert_allclose(rs.mean_se, [se(sums)], rtol=1e-9)
    np.testing.assert_allclose(rs.std_se, [se(squares)/(2*x.std())], rtol=1e-9)
    s = np.bincount(codes, x.std((1, 2))-x.std((1, 2)).mean())
    np.testing.assert_allclose(rs.image_std_se, [math.sqrt(G/(G-1)*(s**2).sum())/len(x)], rtol=1e-9)
    assert (rs.n_images, rs.n_groups)==(3146, G) and 1.3<rs.design_effect.item()<1.8
    alone = rs.labelled(rs.items, [None]*len(x))
    np.testing.assert_allclose(alone.mean_se, [x.mean((1, 2)).std(ddof=1)/math.sqrt(len(x))], rtol=1e-9)

# --- the stop rule

def measure(images, bs=512, **kwargs): return measure_stats(Ready(images, bs=bs, shuffle=True, num_workers=0),
    verbose=False, **kwargs)

@pytest.mark.slow
def test_a_large_set_is_not_read_wholly():
    greys = Greys(200_000)
    mean,std = greys.truth
    rs = measure(greys)
    assert not rs.complete and rs.population==200_000
    assert 3000<=rs.n_images<15_000
    for h,s in zip(rs.half_widths(), (rs.mean, rs.std)): assert (h<=.01*rs.std).all() and h.shape==s.shape
    assert (rs.mean-mean).abs().max()<.02*std.max()
    full = measure(greys, bs=4096, tol=0)
    assert full.complete and full.n_images==200_000
    np.testing.assert_allclose(full.mean, mean, rtol=1e-6), np.testing.assert_allclose(full.std, std, rtol=1e-6)

@pytest.mark.slow
def test_stated_half_widths_hold(moments_only):
    """200 orders of the same 60,000 images: the true mean and std lie inside at least 93 times in 100, although the
    rule chooses when to stop"""
    greys,inside,read = Greys(60_000),[],[]
    truth = torch.stack(greys.truth)
    for seed in range(200):
        rs = measure(greys, bs=1024, seed=seed)
        inside.append((torch.stack([rs.mean, rs.std])-truth).abs()<=torch.stack(rs.half_widths()))
        read.append(rs.n_images)
    covered = torch.stack(inside).double().mean(0)
    assert (covered>=.93).all(), covered
    assert max(read)<15_000

@pytest.mark.slow
def test_images_read_do_not_grow():
    read = [measure(Greys(n), bs=1024).n_images for n in (50_000, 200_000, 1_000_000)]
    assert max(read)<15_000 and read[2]<=read[1], read

@pytest.mark.parametrize('n,tol', [(3_000, .5), (2_000, .01), (8_000, 0), (9_000, .003)])
def test_what_is_read_wholly(n, tol):
    "Never fewer than 3,000; all with tol=0; all where the set ends before the mean is known"
    rs = measure(Greys(n), bs=64, tol=tol)
    assert rs.complete and rs.n_images==rs.population==n

@pytest.mark.parametrize('bs', [16, 50, 64, 1000])
def test_first_look(bs):
    "A tolerance that 3,000 images meet by far; the batch size of training does not matter"
    rs = measure(Greys(20_000), bs=bs, tol=.2)
    assert not rs.complete and rs.n_images==3072

def test_the_finite_set_counts():
    "Half of 12,500 images know the whole as well as twice as many know an endless set"
    few,many = measure(Greys(12_500), bs=512),measure(Greys(200_000), bs=512)
    assert not few.complete and few.n_images<many.n_images
    left = math.sqrt(1-few.n_images/12_500)
    for h,se in zip(few.half_widths(), (few.mean_se, few.std_se)): np.testing.assert_allclose(h, 1.96*se*left)

def test_looks_grow():
    looks = [3072]
    while looks[-1]<1e7: looks.append(_next_look(looks[-1]))
    steps = np.diff(looks)
    assert (np.diff(steps)>=0).all() and (np.array(looks)%3072==0).all() and len(looks)<45

def test_a_prefix_is_a_random_sample():
    """Images sorted by brightness, as folders of classes are: the first 12,000 of the list would know nothing of the
    rest"""
    greys = Greys(100_000)
    greys.grey = greys.grey.sort(0).values
    mean,std = greys.truth
    rs = measure(greys)
    assert not rs.complete and ((rs.mean-mean).abs()<.03*std).all()

def test_same_seed_same_images():
    greys = Greys(50_000)
    a,b,c = (measure(greys, bs=256, seed=s) for s in (1, 1, 2))
    pd.testing.assert_frame_equal(a.images, b.images, check_exact=True)
    assert a.measured()==b.measured() and (a.mean!=c.mean).all() and a.images.item.tolist()!=c.images.item.tolist()

@pytest.mark.parametrize('max_images', [1, 10, 5_000, 20_000])
def test_max_images(max_images):
    rs = measure(Greys(6_000), bs=64, tol=0, max_images=max_images)
    assert rs.n_images==min(max_images, 6_000) and rs.complete==(max_images>=6_000) and rs.population==6_000

def test_constant_channels_do_not_keep_it_reading():
    greys = Greys(100_000)
    greys.grey[:,0],greys.contrast[:,0] = .5,0
    rs = measure(greys)
    assert not rs.complete and rs.std[0]==0

@pytest.mark.slow
def test_why_says_how_much_was_read():
    greys = Greys(400_000)
    rs = measure(greys)
    choice = choose_stats(400_000, rs, pretrained=False)
    known = 100*(rs.half_widths()[0]/rs.std).max()
    assert f"{rs.n_images:,} of 400,000 images, mean known to ±{known:.2g} % of σ" in choice.why
    assert f"{rs.n_images:,} of 400,000" in choice.stats.source and not choice.warnings
    rough = choose_stats(400_000, measure(greys, max_images=100), pretrained=False)
    assert 'rest on 100 of 400,000 images and are rough' in rough.warnings[0]
    for c in (choice, rough): assert type(c).from_dict(c.to_dict()).why==c.why
    assert 'of 2,000 images' not in choose_stats(2_000, measure(Greys(2_000)), pretrained=False).why

# --- items that are not images

class Slices(Greys):
    "Volumes: each item is a stack of five images"
    def images(self, i): return torch.stack([super(Slices, self).images(i)+.01*k for k in range(5)], 1).flatten(0, 1)

@pytest.mark.parametrize('n,tol', [(400, 0), (4_000, .2)])
def test_items_of_several_images(n, tol):
    """Slices of a volume resemble each other: the item is the draw. All are read, also where there are more images in
    a batch than items in the set; the stop rule counts items"""
    slices = Slices(n)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        rs = measure(slices, bs=64, tol=tol)
    assert not w and rs.grouped and rs.n_images==5*rs.n_groups and rs.population==5*n
    assert rs.complete==(tol==0) and (rs.n_groups==n if rs.complete else 200<=rs.n_groups<n and rs.n_images>=3000)
    # an item's mean is its grey value
    if rs.complete: np.testing.assert_allclose(rs.mean_se, slices.grey.double().squeeze().std(0)/math.sqrt(n),
        rtol=1e-5)
    assert (rs.design_effect>3).all()  # near 5: their greys are the same but for .01 a slice
    part = measure(slices, bs=64, tol=0, max_images=128)
    assert not part.complete and part.population==5*n and part.n_images==5*part.n_groups and part.population_groups==n

def test_single_images_are_no_batch():
    class One(TfmdDL):
        def create_item(self, i): return TensorImage(torch.rand(3, 8, 8)),
    with pytest.raises(TypeError, match=r'must yield batches .* got \(3, 8, 8\): give it a `bs`'):
        measure_stats(One(list(range(20)), bs=None, num_workers=0), verbose=False)

def test_two_inputs_an_item():
    class Pairs(Ready):
        def create_batches(self, samples):
            for b, in super().create_batches(samples): yield b,b
    dl = Pairs(Greys(4_000), bs=64, shuffle=True, num_workers=0)
    dl.dataset.n_inp = 2
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        rs = measure_stats(dl, tol=.2, verbose=False)
    assert not rs.complete and (rs.population, rs.population_groups)==(8_000,
        4_000) and rs.n_images==2*rs.n_groups>=3000
    np.testing.assert_allclose(rs.design_effect, [2, 2], rtol=1e-3)  # the second tells nothing new

def test_a_batch_in_memory_that_is_used_again():
    class Reused(Ready):
        room = torch.empty(64, 2, 2, 2)
        def create_batches(self, samples):
            for idxs in chunked(samples, self.bs): yield self.create_batch(idxs)
        def create_batch(self, idxs):
            res = self.room[:len(idxs)]
            res.copy_(self.dataset.images(torch.tensor(idxs)))
            return TensorImage(res),
    greys = Greys(3_000)
    rs = measure_stats(Reused(greys, bs=64, num_workers=0), tol=0, verbose=False)
    np.testing.assert_allclose(rs.mean, greys.truth[0], rtol=1e-6), np.testing.assert_allclose(rs.std, greys.truth[1],
        rtol=1e-6)

@pytest.mark.parametrize('kind,top', [(torch.uint16, 65535.), (torch.int16, 32767.), (torch.uint8, 255.)], ids=str)
def test_integer_images(kind, top):
    class Whole(Ready):
        def create_batches(self, samples):
            for b, in super().create_batches(samples): yield TensorImage((b.clamp(0, 1)*top).to(kind)),
    rs = measure_stats(Whole(Greys(500), bs=64, num_workers=0), verbose=False)
    assert rs.n_images==500 and (rs.mean/top-torch.tensor([.4, .6])).abs().max()<.05

# --- masks that leave little

def test_mask_that_leaves_nothing():
    with pytest.raises(ValueError, match='none of the 4,000 images has a pixel that counts'):
        measure(Greys(4_000), bs=64, mask=lambda x: x[:, :1]>9)

def test_mask_that_leaves_nothing_at_first():
    "At the first look there is nothing to judge by; the pass goes on"
    seen = []
    def late(x):
        seen.append(len(x))
        return (x[:, :1]>-9) & (sum(seen)>4_000)
    with pytest.warns(UserWarning, match='have no pixel that counts'): rs = measure(Greys(5_000), bs=64, mask=late)
    assert rs.complete and 900<rs.n_images<1_100

def test_one_image_cannot_say_how_well():
    choice = choose_stats(6_000, measure(Greys(6_000), max_images=1), pretrained=False)
    assert 'measured on 1 of 6,000 images, too few to say how well' in choice.why and 'nan' not in choice.why
    assert 'rough' in choice.warnings[0]
