"""What the pictures show, against NumPy on the same pixels: heights, places of markers, colours; and that drawing
leaves no trace"""
import pickle, random, re, warnings

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.block import DataBlock, TransformBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import IndexSplitter, Normalize
from fastai.vision.all import (ColReader, RandomErasing, TensorCategory, TensorImage, Transform, aug_transforms,
                               imagenet_stats)

from fastai_normstats.all import DatasetStats, choose_stats, plot_batch, plot_before_after, plot_drift, plot_unusual
from fastai_normstats.view.kit import candidate_colors, house_look
from fastai_normstats.running import RunningStats

N,TRAIN = 20,16
IMAGENET = np.array(imagenet_stats)

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

def image(i, n_channels):
    "Values in the middle of the 256 levels between 0 and 1, of a mean and spread of the channel's and the image's own"
    rng = np.random.default_rng([i, n_channels])
    at = np.linspace(.3, .6, n_channels)[:,None,None]+rng.uniform(-.1, .1)
    return (np.floor((at+rng.normal(0, .08, (n_channels, 12, 10))).clip(0, .999)*256)+.5)/256

def grey_as_rgb(i, _): return image(i, 1).repeat(3, 0)
def in_hu(i, n_channels): return image(i, n_channels)*2000-1000

def block(n_channels=3, images=image, tfms=None):
    def load(i): return TensorImage(torch.tensor(images(i, n_channels), dtype=torch.float32))
    return DataBlock(TransformBlock(type_tfms=load), get_items=lambda _: range(N), n_inp=1,
                     splitter=IndexSplitter(range(TRAIN, N)),
                     batch_tfms=tfms)

def loaders(n_channels=3, images=image, tfms=None, bs=TRAIN, **kwargs):
    "Loaders whose training batch is all of the training images"
    kwargs = dict(stats='custom', measure=True, verbose=False, cache=False) | kwargs
    return block(n_channels, images, tfms).fit_stats(0, num_workers=0, bs=bs,
                                                     **kwargs).dataloaders(0, num_workers=0, bs=bs)

def pixels(n_channels=3, images=image): return np.stack([images(i, n_channels) for i in range(TRAIN)],
    1).reshape(n_channels, -1)

def bars(ax):
    "(label, mean, std) of each bar, from top to bottom"
    labels = {y: t.get_text() for y,t in zip(ax.get_yticks(), ax.get_yticklabels())}
    res = []
    for o in ax.containers:
        (x,),(y,) = o.lines[0].get_data()
        (a,_),(b,_) = o.lines[2][0].get_segments()[0]
        assert np.isclose((a+b)/2, x)
        res.append((y, labels.get(y), x, (b-a)/2))
    return [o[1:] for o in sorted(res, reverse=True)]

def names(ax): return [t.get_text() for t in ax.get_yticklabels() if t.get_text()]
def numbers(ax): return np.array([o[1:] for o in bars(ax)])
def heights(ax): return [p.get_data().values for p in ax.patches if hasattr(p, 'get_data')]
def edges(ax): return [p.get_data().edges for p in ax.patches if hasattr(p, 'get_data')]
def texts(ax): return [t.get_text() for t in ax.texts]
def new_axes(*shape): return plt.subplots(*shape, squeeze=False)[1]

# --- the choice

def off(ax, v):
    "By how much the share of pixels drawn up to an edge is off the share of values `v` up to there, at the most"
    below = np.array([(v<=e).mean() for e in edges(ax)[0][1:]])
    return np.abs(heights(ax)[0].cumsum()-below+(v<edges(ax)[0][0]).mean()).max()

@pytest.mark.parametrize('n', [1, 2, 3, 6, 13])
def test_choice_shows_the_training_pixels_and_the_candidates(n):
    """Of quantiles at most .05 apart an image's share up to any value is known to .05; errors of 16 images cancel, to
    .02 here"""
    axs,x = loaders(n).stats_choice.plot(),pixels(n)
    assert len(axs)==n
    for ax,v in zip(axs, x):
        assert off(ax, v)<.02 and np.isclose(heights(ax)[0].sum(), 1), 'all pixels, and nothing is cut off'
        np.testing.assert_allclose(edges(ax)[0], np.linspace(0, 1, 129))
        (mean,std),*others = numbers(ax)
        np.testing.assert_allclose((mean, std), (v.mean(), v.std()), rtol=1e-5)
        assert len(others)==(3 if n==1 else 1 if n==3 else 0), 'numbers for other channels are not of these'
    if n==3: np.testing.assert_allclose([numbers(ax)[1] for ax in axs], IMAGENET.T)
    if n==1: np.testing.assert_allclose(numbers(axs[0])[1:], IMAGENET.T)
    if n==1: assert [o[0] for o in bars(axs[0])]==['custom (used)', 'imagenet red', 'imagenet green', 'imagenet blue']

def test_choice_in_rows():
    "At most four panels a row; names of the candidates before the first of each"
    axs = loaders(6).stats_choice.plot()
    assert [(ax.get_subplotspec().rowspan.start, ax.get_subplotspec().colspan.start)
            for ax in axs]==[(i//3, i%3) for i in range(6)]
    assert [bool(names(ax)) for ax in axs]==[True, False, False]*2
    assert axs[0].figure.get_figwidth()<=10

def test_choice_of_equal_channels_is_one_panel():
    choice,v = loaders(3, grey_as_rgb).stats_choice,pixels(3, grey_as_rgb)[0]
    ax, = choice.plot()
    assert [o[0] for o in bars(ax)]==['custom (used)', 'imagenet red', 'imagenet green', 'imagenet blue']
    np.testing.assert_allclose(numbers(ax), [(v.mean(), v.std()), *IMAGENET.T], rtol=1e-5)
    given = new_axes(1, 3)[0]
    assert choice.plot(axs=given)==list(given) and [len(bars(a)) for a in given]==[2, 2, 2]
    one = plt.subplots()[1]
    assert choice.plot(axs=one)==[one] and len(bars(one))==4

# a share is known to the distance of two quantiles, and of two pixels between which these are interpolated
KNOWN = .05+1/120

def near(ax):
    "What cut-off bins are said to hold: value → share"
    found = [re.fullmatch(r'(\d+)% of pixels near (\S+) \(bar cut off\)', t) for t in texts(ax)]
    return {float(o[2]): int(o[1])/100 for o in found if o}

def test_choice_cuts_off_and_labels_what_towers():
    "A border takes 40 % of the pixels; the other bins can be seen all the same"
    def bordered(i, n):
        x = image(i, n)
        x[:,:,:4] = 1/512
        return x
    ax, = loaders(1, bordered).stats_choice.plot()
    assert list(near(ax))==[0] and abs(near(ax)[0]-.4)<=KNOWN
    assert heights(ax)[0][0]==heights(ax)[0].max()<2*np.sort(heights(ax)[0])[-8]
    assert off_beyond(ax, pixels(1, bordered)[0])<=KNOWN

def off_beyond(ax, v):
    "As `off`, counted from above, where no bin is cut off"
    above = np.array([(v>=e).mean() for e in edges(ax)[0][1:-1]])
    return np.abs(heights(ax)[0][::-1].cumsum()[::-1][1:]-above).max()

def test_choice_labels_towers_at_both_ends():
    def both(i, n):
        x = image(i, n)
        x[:,:,:3],x[:,:,8:] = 0.,1.
        return x
    ax, = loaders(1, both).stats_choice.plot()
    assert sorted(near(ax))==[0, 1] and abs(near(ax)[0]-.3)<=KNOWN and abs(near(ax)[1]-.2)<=KNOWN
    assert heights(ax)[0][0]==heights(ax)[0][-1]==heights(ax)[0].max()

def test_choice_of_few_levels_is_no_comb():
    "Between two levels nothing is seen, and the bars are filled there; halfway the share is right all the same"
    def levels(i, n): return np.random.default_rng(i).integers(0, 17, (n, 12, 12))/16
    ax, = loaders(1, levels).stats_choice.plot()
    assert (heights(ax)[0]>0).all()
    v,halfway = pixels(1, levels)[0],np.arange(1, 32, 2)*4  # of 128 bins
    np.testing.assert_allclose(heights(ax)[0].cumsum()[halfway-1], [(v<e).mean() for e in edges(ax)[0][halfway]],
                               atol=.025)

def test_choice_spans():
    "0 to 1 or 255 where the values fill a tenth of it, else their middle 99.8 % and a twentieth more at both ends"
    def span(images):
        ax, = loaders(1, images).stats_choice.plot()
        return edges(ax)[0][[0, -1]]
    assert tuple(span(lambda i, n: image(i, n)*255))==(0, 255)
    assert tuple(span(lambda i, n: image(i, n)*.3))==(0, 1)
    def even(i, n):
        # without tails, in which quantiles are uncertain
        return np.random.default_rng(i).uniform(.01, .04, (n, 12, 10))
    for images in (even, lambda i, n: even(i, n)*1e5-3000):
        a,b = np.quantile(pixels(1, images)[0], [.001, .999])
        np.testing.assert_allclose(span(images), (a-.05*(b-a), b+.05*(b-a)), atol=.01*(b-a))

@pytest.mark.parametrize('value', [0., .3, 1., -7., 1e6, 1e12])
def test_choice_of_a_constant(value):
    "All in one bin, somewhere inside"
    ax, = choose_stats(30, RunningStats().update(torch.full((30, 1, 4, 4), value)), stats='custom').plot()
    i, = heights(ax)[0].nonzero()[0]
    np.testing.assert_allclose(heights(ax)[0][i], 1)
    assert edges(ax)[0][i]<=np.float32(value)<=edges(ax)[0][i+1] and edges(ax)[0][0]<np.float32(value)<edges(ax)[0][-1]

def worth(xs, groups):
    """Independent images that those of `groups` are worth: their number over Kish's design effect of mean or std, by
    Cochran's ratio estimators"""
    xs = np.stack([x.ravel() for x in xs])
    mean,var = xs.mean(),xs.var()
    def squared(v, codes):
        T = np.array([v[codes==c].sum() for c in np.unique(codes)])
        return len(T)/(len(T)-1)*(T**2).sum()
    each = np.arange(len(xs))
    return len(xs)/max(squared(v, groups)/squared(v, each) for v in (xs-mean, (xs-mean)**2-var))

def test_choice_says_whose_the_images_are():
    def patient(i): return f'P{i//3}'
    def alike(i, n): return np.clip(image(i, n)*.1+.3+.4*np.random.default_rng(i//3).random(), 0, 1)
    choice = loaders(1, alike, groups=patient).stats_choice
    ones = worth([alike(i, 1) for i in range(TRAIN)], np.arange(TRAIN)//3)
    said = f'{TRAIN} images of 6 patients, worth {ones:.0f} independent ones'
    assert 1<ones<TRAIN-1
    assert choice.plot()[0].figure.get_supxlabel()==said
    given = plt.subplots()[1]
    assert choice.plot(axs=given)[0].get_xlabel()==f'value before normalisation; bars: mean ± std\n{said}'
    alone = loaders(1, alike).stats_choice.plot()[0]
    assert alone.figure.get_supxlabel()=='' and alone.get_xlabel()=='value before normalisation; bars: mean ± std'

@pytest.mark.parametrize('n', [3, 6])
def test_choice_labels_of_neighbouring_panels_stay_apart(n):
    axs = loaders(n, image).stats_choice.plot()
    axs[0].figure.canvas.draw()
    boxes = [ax.xaxis.label.get_window_extent() for ax in axs]
    assert not [(i, j) for i,a in enumerate(boxes) for j,b in enumerate(boxes[:i]) if a.overlaps(b)]

def test_choice_leaves_out_empty_stretches():
    "A far outlier does not squeeze the rest; the candidates stay in view"
    def outlier(i, n):
        x = in_hu(i, n)
        if i==0: x[0,0,0] = 30_000
        return x
    ax, = loaders(1, outlier).stats_choice.plot()
    lo,hi = ax.get_xlim()
    (mean,std),*_ = numbers(ax)
    assert hi<5000 and lo<mean-std and mean+std<hi

def test_choice_refuses(tmp_path):
    with pytest.raises(ValueError, match='nothing was measured'): choose_stats(9, stats='imagenet').plot()
    with pytest.raises(ValueError, match='must hold 3 axes, one per channel, got 2'):
        loaders().stats_choice.plot(axs=new_axes(1, 2))

# --- before and after

def outline(v, span): return np.histogram(v, 64, span)[0]/v.size/((span[1]-span[0])/64)

@pytest.mark.parametrize('n', [1, 3, 6])
def test_before_and_after_are_the_batch(n):
    x = pixels(n)
    mean,std = x.mean(1),x.std(1)
    left,right = plot_before_after(loaders(n))
    np.testing.assert_allclose(numbers(left), np.stack([mean, std], 1), rtol=1e-4)
    after = (x-mean[:,None])/std[:,None]
    np.testing.assert_allclose(numbers(right), [(0, 1)]*n+[(0, 1)], atol=1e-4)
    for c in range(n):
        np.testing.assert_allclose(heights(left)[c], outline(x[c], (0, 1)).clip(max=heights(left)[c].max()), rtol=1e-6)
        e = edges(right)[c]
        got,want = heights(right)[c],outline(after[c], (e[0], e[-1]))
        assert np.abs(got-want).sum()<.05*want.sum(), 'levels may fall to either side of an edge'
    centre = (edges(right)[n][1:]+edges(right)[n][:-1])/2
    np.testing.assert_allclose(heights(right)[n], np.exp(-centre**2/2)/(2*np.pi)**.5, rtol=1e-6)

def test_before_and_after_with_imagenets_numbers():
    x = pixels()
    plain = block(tfms=Normalize.from_stats(*imagenet_stats, cuda=False)).dataloaders(0, num_workers=0, bs=TRAIN)
    for dls in (loaders(stats='imagenet'), plain):
        left,right = plot_before_after(dls)
        after = (x-IMAGENET[0][:,None])/IMAGENET[1][:,None]
        np.testing.assert_allclose(numbers(left), IMAGENET.T, rtol=1e-6)
        np.testing.assert_allclose(numbers(right)[:3], np.stack([after.mean(1), after.std(1)], 1), rtol=1e-4, atol=1e-5)
        assert [o[0] for o in bars(right)]==['red', 'green', 'blue', 'N(0, 1)']
        assert 'subtracted' in left.get_title(loc='left')

def test_before_and_after_in_hu():
    left,right = plot_before_after(loaders(1, in_hu))
    v = pixels(1, in_hu)
    np.testing.assert_allclose(numbers(left), [(v.mean(), v.std())], rtol=1e-5)
    np.testing.assert_allclose(numbers(right)[0], (0, 1), atol=1e-4)

def test_before_and_after_of_equal_channels():
    "One outline before; after it one again with own numbers, and three with ImageNet's"
    left,right = plot_before_after(loaders(3, grey_as_rgb))
    assert [o[0] for o in bars(left)]==['all channels'] and [o[0] for o in bars(right)]==['all channels', 'N(0, 1)']
    left,right = plot_before_after(loaders(3, grey_as_rgb, stats='imagenet'))
    assert len(heights(left))==2 and len(heights(right))==4  # the filled one and its outline; three and the normal one

class OfEachImage(DatasetStats):
    "Another scheme: each image by its own mean and std"
    def encodes(self, x:TensorImage): return (x-x.mean((2, 3), keepdim=True))/x.std((2, 3), keepdim=True, correction=0)

def test_a_scheme_without_fixed_numbers_claims_none():
    "What is drawn before is the batch's, and after it what the transform made"
    dls = block(tfms=OfEachImage(torch.zeros(3), torch.ones(3))).dataloaders(0, num_workers=0, bs=TRAIN)
    left,right = plot_before_after(dls)
    x = pixels()
    assert 'subtracted' not in left.get_title(loc='left')
    np.testing.assert_allclose(numbers(left), np.stack([x.mean(1), x.std(1)], 1), rtol=1e-4)
    np.testing.assert_allclose(numbers(right)[:3], [(0, 1)]*3, atol=1e-4)

def test_after_is_what_enters_the_network():
    "Transforms after Normalize have acted, and before it is not touched by what they do in place"
    dls = loaders(tfms=RandomErasing(p=1., sl=.5, sh=.5, max_count=1))
    left,right = plot_before_after(dls)
    np.testing.assert_allclose(heights(left)[0], outline(pixels()[0], (0, 1)).clip(max=heights(left)[0].max()),
                               rtol=1e-6)
    assert not np.allclose(numbers(right)[:3], [(0, 1)]*3, atol=1e-3)

def test_many_channels_are_the_first_seven():
    left,_ = plot_before_after(loaders(13))
    assert len(bars(left))==7 and 'first 7 of 13' in left.get_title(loc='left')

def test_pixels_that_are_not_finite_are_left_out():
    def hole(i, n):
        x = image(i, n)
        x[:,0,0] = np.nan
        return x
    left,right = plot_before_after(loaders(1, hole, nonfinite='ignore'))
    v = pixels(1, hole)
    np.testing.assert_allclose(numbers(left), [(np.nanmean(v), np.nanstd(v))], rtol=1e-4)
    np.testing.assert_allclose(numbers(right)[0], (0, 1), atol=1e-4)

def test_before_and_after_refuses():
    dls = loaders()
    for dl in dls.loaders: dl.after_batch.fs = dl.after_batch.fs.filter(lambda o: not isinstance(o, Normalize))
    with pytest.raises(ValueError, match=r'call `dls.fit_stats\(\)` first'): plot_before_after(dls)
    with pytest.raises(TypeError, match='must be DataLoaders, got TfmdDL'): plot_before_after(dls.train)
    with pytest.raises(ValueError, match='must hold 2 axes'): plot_before_after(loaders(), axs=plt.subplots()[1])
    labels = DataBlock(TransformBlock(type_tfms=lambda i: TensorCategory(i)), get_items=lambda _: range(N), n_inp=1,
                       batch_tfms=DatasetStats([.5], [.5])).dataloaders(0, num_workers=0, bs=4)
    with pytest.raises(TypeError, match='no image among the inputs'): plot_before_after(labels)

# --- the same images under each candidate

def shown(ax): return ax.images[0].get_array()

def item_of(x, mean, std):
    "Which training image `x` (C, H, W) in σ is"
    diffs = [np.abs(x-(image(i, len(x))-mean[:,None,None])/std[:,None,None]).max() for i in range(TRAIN)]
    assert min(diffs)<1e-4, min(diffs)
    return int(np.argmin(diffs))

def test_batch_in_colour():
    "Rows are the same images, each by its candidate's numbers, from −2.5 to 2.5 σ"
    x = pixels()
    axs = plot_batch(loaders(), n=3)
    assert axs.shape==(2, 3)
    items = []
    for j in range(3):
        for i,(mean,std) in enumerate((IMAGENET, (x.mean(1), x.std(1)))):
            want = [((image(k, 3)-mean[:,None,None])/std[:,None,None]/5+.5).clip(0, 1).transpose(1, 2, 0)
                    for k in range(TRAIN)]
            k = int(np.argmin([np.abs(shown(axs[i,j])-w).max() for w in want]))
            np.testing.assert_allclose(shown(axs[i,j]), want[k], atol=1e-4)
            items.append(k)
    assert items[::2]==items[1::2] and len({*items})==3
    assert axs[0,0].get_ylabel().startswith('imagenet\n0.485, 0.456, 0.406\n± 0.229, 0.224, 0.225')
    assert axs[1,0].get_ylabel().startswith('custom')
    assert all(f'{s}2.5 σ' in axs[0,0].figure.get_supxlabel() for s in ('−', ''))

def test_batch_in_grey():
    "One channel: one scale for all rows, with a colour bar"
    v = pixels(1)[0]
    axs = plot_batch(loaders(1), {'own': 'custom', 'other': ([.2], [.4])}, n=2)
    for row,(mean,std) in zip(axs, ((v.mean(), v.std()), (.2, .4))):
        assert len({item_of(np.asarray(shown(ax))[None], np.array([mean]), np.array([std])) for ax in row})==2
    assert {ax.images[0].get_clim() for ax in axs.flat}=={(-2.5, 2.5)}
    bar = [ax for ax in axs[0,0].figure.axes if ax not in axs.flat]
    assert len(bar)==1 and bar[0].get_ylabel()=='σ'
    assert axs[1,0].get_ylabel().startswith('other\n0.200 ± 0.400')

def test_batch_of_many_channels():
    x,dls = pixels(6),loaders(6)
    (ax,), = plot_batch(dls, 'custom', n=1, channels=(4,))
    want = [(image(k, 6)[4]-x[4].mean())/x[4].std() for k in range(TRAIN)]
    assert min(np.abs(shown(ax)-w).max() for w in want)<1e-4
    for channels in (None, (5, 3, 0)):
        (ax,), = plot_batch(dls, 'custom', n=1, channels=channels)
        cs = list(channels or (0, 1, 2))
        want = [(((image(k, 6)-x.mean(1)[:,None,None])/x.std(1)[:,None,None])[cs]/5+.5).clip(0, 1).transpose(1, 2, 0)
                for k in range(TRAIN)]
        assert min(np.abs(shown(ax)-w).max() for w in want)<1e-4
        assert f"channels {', '.join(map(str, cs))} of 6" in ax.figure.get_supxlabel()

def test_batch_tints_equal_channels_under_imagenets_numbers():
    (a,),(b,) = plot_batch(loaders(3, grey_as_rgb), n=1)
    assert np.ptp(shown(a), axis=-1).max()>.02 and np.ptp(shown(b), axis=-1).max()<1e-6

def test_batch_numbers_are_those_of_what_is_shown():
    (ax,), = plot_batch(loaders(1), ('custom',), n=1)
    mean,std = shown(ax).mean(),shown(ax).std()
    said = ax.get_ylabel().splitlines()[-1].replace('−', '-').split()
    np.testing.assert_allclose([float(said[0]), float(said[2])], [mean, std], atol=5e-3)

def test_batch_calls_the_transform(monkeypatch):
    "A candidate that is another scheme is shown as it acts, and no numbers are claimed for it"
    monkeypatch.setattr('fastai_normstats.view.batches._candidate_tfm', lambda choice, c: OfEachImage([.5], [.5]))
    (ax,), = plot_batch(loaders(1), {'each': 'custom'}, n=1)
    np.testing.assert_allclose((shown(ax).mean(), shown(ax).std()), (0, 1), atol=1e-5)
    assert '0.500' not in ax.get_ylabel() and ax.get_ylabel().startswith('each\n')

def test_batch_has_no_more_images_than_there_are(): assert plot_batch(loaders(bs=4), n=99).shape==(2, TRAIN)

def test_batch_draws_into_given_axes():
    axs = new_axes(2, 2)
    was = plt.get_fignums()
    assert (plot_batch(loaders(), n=2, axs=axs)==axs).all() and plt.get_fignums()==was
    assert '2.5 σ' in axs[1,0].get_xlabel()
    with pytest.raises(ValueError, match='must hold 4 axes, one per candidate and image, got 6'):
        plot_batch(loaders(), n=2, axs=new_axes(2, 3))

def test_batch_refuses():
    dls = loaders()
    for kwargs,said in ((dict(n=0), '`n` must be'), (dict(stats=('custom', 'custom')), "holds 'custom' twice"),
                        (dict(channels=(0, 1)), '`channels` must be'), (dict(channels=(0, 1, 3)), 'from 0 to 2'),
                        (dict(stats='imagenot'), "candidate 'imagenot'"),
                        (dict(stats=[([.1]*2, [.1]*2)]), "candidate '0.1 / 0.1': the images have 3 channels")):
        with pytest.raises(ValueError, match=said): plot_batch(dls, **kwargs)
    for stats in ((), 3):
        with pytest.raises(TypeError, match='`stats` must be a list'): plot_batch(dls, stats)
    with pytest.raises(ValueError, match="candidate 'imagenet': the images have 1 channel"):
        plot_batch(loaders(1), 'imagenet')
    with pytest.raises(ValueError, match='fit again with `measure=True` added'):
        plot_batch(loaders(stats='imagenet', measure=False), 'custom')
    with pytest.raises(ValueError, match='no `stats_choice`.*fit_stats'):
        plot_batch(block(tfms=Normalize.from_stats(*imagenet_stats, cuda=False)).dataloaders(0, num_workers=0, bs=4))
    with pytest.raises(TypeError, match='must be DataLoaders'): plot_batch(dls.train)

# --- the images that sway the statistics

ODD = 5

def odd(i, n):
    "One image is a negative"
    return 1-image(i, n)*.5 if i==ODD else image(i, n)

def influences(xs, groups=None):
    "By how much, in σ, mean or std of the worst channel change without an image's group: everything counted anew"
    xs,groups = np.stack(xs),np.arange(len(xs)) if groups is None else np.asarray(groups)
    mean,std = xs.mean((0, 2, 3)),xs.std((0, 2, 3))
    def without(g):
        left = xs[groups!=g]
        return max((np.abs(left.mean((0, 2, 3))-mean)/std).max(), (np.abs(left.std((0, 2, 3))-std)/std).max())
    return np.array([without(g) for g in groups])

def titles(axs): return [ax.get_title(loc='left') for ax in axs]
def said(ax): return ax.get_xlabel().replace('−', '-').replace(',', '').split('\n')
def influence(ax): return float(re.search(r'influence (\S+) σ', ax.get_xlabel())[1])

@pytest.mark.parametrize('n', [1, 2, 3, 4, 13])
def test_unusual_images_and_their_numbers(n):
    "Against leaving out each image in turn; the pixels are those before normalisation"
    axs,xs = plot_unusual(loaders(n, odd), n=6),[odd(i, n) for i in range(TRAIN)]
    want = influences(xs)
    order = np.argsort(-want)[:6]
    assert titles(axs)==[str(i) for i in order] and order[0]==ODD
    np.testing.assert_allclose([influence(ax) for ax in axs], want[order], rtol=5e-3)
    channels = [0, 1, 2] if n>=3 else [0]
    for ax,i in zip(axs, order):
        x = xs[i][channels]
        if n<3: assert ax.images[0].get_clim()==(0, 1)
        np.testing.assert_allclose(shown(ax), x[0] if n<3 else x.transpose(1, 2, 0), atol=1e-6)
        words = ' '.join(said(ax)[-2:]).split()
        at = words.index('mean'), words.index('std')
        for j,v in zip(at, (x.mean((1, 2)), x.std((1, 2)))):
            np.testing.assert_allclose([float(o) for o in words[j+1:j+1+len(channels)]], v, atol=6e-4)
    key = axs[0].figure.get_supxlabel()
    assert ('channels 0, 1, 2 of' in key)==(n in (4, 13)) and ('channel 0 of 2' in key)==(n==2)

def test_unusual_z():
    "Distance of mean or std from the median image's, in 1.4826 median absolute distances"
    xs = [odd(i, 1) for i in range(TRAIN)]
    def z(v): return np.abs(v-np.median(v))/(1.4826*np.median(np.abs(v-np.median(v))))
    want = np.maximum(z(np.array([x.mean() for x in xs])), z(np.array([x.std() for x in xs])))
    for ax in plot_unusual(loaders(1, odd), n=4):
        np.testing.assert_allclose(float(said(ax)[0].split('z ')[1]), want[int(titles([ax])[0])], rtol=6e-3)

def test_unusual_groups():
    "One image a patient, who is named; influence is that of all images of the patient"
    def patient(i): return f'P{i%6}'
    axs,xs = plot_unusual(loaders(1, odd, groups=patient), n=TRAIN),[odd(i, 1) for i in range(TRAIN)]
    want,patients = influences(xs, np.arange(TRAIN)%6),[int(t)%6 for t in titles(axs)]
    assert sorted(patients)==[*range(6)] and patients[0]==ODD%6
    for ax,k in zip(axs, patients):
        size = len(range(k, TRAIN, 6))
        assert said(ax)[0]==f'patient P{k} 1 of {size} images'
        np.testing.assert_allclose(influence(ax), want[k], rtol=6e-3)
    assert 'without the patient' in axs[0].figure.get_supxlabel()

def test_unusual_of_equal_channels_is_grey():
    axs = plot_unusual(loaders(3, grey_as_rgb), n=3)
    for ax in axs: np.testing.assert_allclose(shown(ax), image(int(titles([ax])[0]), 1)[0], atol=1e-6)
    assert 'channel ' not in axs[0].figure.get_supxlabel() and 'black 0, white 1' in axs[0].figure.get_supxlabel()

def test_unusual_in_other_units():
    "From the .5 % to the 99.5 % quantile, each channel by its own; of 1,920 pixels known to 3 % of the span"
    v = pixels(1, in_hu)[0]
    ax, = plot_unusual(loaders(1, in_hu), n=1)
    a,b = np.quantile(v, [.005, .995])
    np.testing.assert_allclose(ax.images[0].get_clim(), (a, b), atol=.03*(b-a))
    np.testing.assert_allclose(shown(ax), in_hu(int(titles([ax])[0]), 1)[0], rtol=1e-6)
    assert re.search(r'black −\d+, white \d+', ax.figure.get_supxlabel())
    ax, = plot_unusual(loaders(4, in_hu), n=1)
    a,b = np.quantile(pixels(4, in_hu)[:3], [.005, .995], axis=1)
    x = in_hu(int(titles([ax])[0]), 4)[:3].transpose(1, 2, 0)
    np.testing.assert_allclose(shown(ax), ((x-a)/(b-a)).clip(0, 1), atol=.05)
    assert 'each colour from its .5 %' in ax.figure.get_supxlabel()

def test_unusual_after_pickling(monkeypatch):
    "Rows are not pickled with loaders: these measure again, and draw the same"
    dls = loaders(1, odd)
    had = plot_unusual(dls)
    for dl in dls.loaders: dl.after_batch.fs = dl.after_batch.fs.map(lambda f: pickle.loads(pickle.dumps(f)))
    again = plot_unusual(dls)
    assert titles(had)==titles(again) and [said(ax) for ax in had]==[said(ax) for ax in again]
    monkeypatch.setattr('fastai_normstats.view.batches.measure_stats', None)
    plot_unusual(loaders(1, odd))  # where there is a ledger, nothing is measured
    with pytest.raises(TypeError): plot_unusual(dls)

def test_unusual_with_given_numbers_measures_as_the_transform_would():
    "With its mask, its groups and its word on NaN; the loaders' statistics stay"
    def hole(i, n):
        x = odd(i, n)
        x[:,0,0] = np.nan
        return x
    kwargs = dict(mask=lambda x: x[:,:1]<.5, groups=lambda i: f'P{i//2}', nonfinite='ignore', stats=([.5], [.5]),
                  measure=False)
    dls = loaders(1, hole, **kwargs)
    assert dls.train.after_batch.fs[-1].ledger is None
    axs = plot_unusual(dls, n=TRAIN)
    for ax in axs:
        i = int(titles([ax])[0])
        v = hole(i, 1)[hole(i, 1)<.5]
        mean,std = (float(said(ax)[-1].split(f'{k} ')[1].split()[0]) for k in ('mean', 'std'))
        np.testing.assert_allclose((mean, std), (v.mean(), v.std()), atol=6e-4)
        assert said(ax)[0].split(' 1 of ')[0]==f'group P{i//2}'
    assert dls.train.after_batch.fs[-1].mean.item()==.5

def test_unusual_without_any_statistics():
    "Loaders that nobody fitted, and those with a plain Normalize"
    for tfms in (None, Normalize.from_stats([.5], [.5], cuda=False)):
        axs = plot_unusual(block(1, odd, tfms).dataloaders(0, num_workers=0, bs=4), n=3)
        order = np.argsort(-influences([odd(i, 1) for i in range(TRAIN)]))[:3]
        assert titles(axs)==[str(i) for i in order]
        np.testing.assert_allclose(shown(axs[0]), odd(ODD, 1)[0], atol=1e-6)

def test_unusual_of_other_images_than_were_measured():
    "A training loader in which the odd image is no more: its rows are not shown as others'"
    dls = loaders(1, odd)
    assert titles(plot_unusual(dls, n=1))==[str(ODD)]
    left = [i for i in range(TRAIN) if i!=ODD]
    others = DataBlock(TransformBlock(type_tfms=lambda i: TensorImage(torch.tensor(odd(i, 1), dtype=torch.float32))),
                       n_inp=1,
                       get_items=lambda _: [*left, 16, 17], splitter=IndexSplitter([15, 16]))
    dls.loaders[0] = dls.train.new(others.datasets(0).train)
    assert any(isinstance(f, DatasetStats) for f in dls.train.after_batch.fs)
    axs = plot_unusual(dls, n=4)
    want = influences([odd(i, 1) for i in left])
    assert titles(axs)==[str(left[j]) for j in np.argsort(-want)[:4]]
    for ax in axs: np.testing.assert_allclose(shown(ax), odd(int(titles([ax])[0]), 1)[0], atol=1e-6)

class Halved(Transform):
    "A batch transform before Normalize"
    order = 20
    def encodes(self, x:TensorImage): return x/2

class Brighter(Transform):
    "One after it"
    order = 120
    def encodes(self, x:TensorImage): return x+9

@pytest.mark.filterwarnings('ignore:Brighter')
def test_unusual_is_what_training_sees_before_normalize():
    axs = plot_unusual(loaders(1, odd, [Halved(), Brighter()]), n=2)
    for ax in axs: np.testing.assert_allclose(shown(ax), odd(int(titles([ax])[0]), 1)[0]/2, atol=1e-6)

def test_unusual_of_several_images_an_item():
    "Which of them it is, too"
    def second(i): return 1-image(i, 1)*.5 if i==ODD else image(i+100, 1)
    def loads(f): return TransformBlock(type_tfms=lambda i: TensorImage(torch.tensor(f(i), dtype=torch.float32)))
    pairs = DataBlock((loads(lambda i: image(i, 1)), loads(second)), get_items=lambda _: range(N), n_inp=2,
                      splitter=IndexSplitter(range(TRAIN, N)))
    dls = pairs.fit_stats(0, num_workers=0, bs=4, stats='custom', verbose=False,
                          cache=False).dataloaders(0, num_workers=0, bs=4)
    a,b = plot_unusual(dls, n=2)
    assert titles([a])==[str(ODD)]!=titles([b]) and said(a)[0]==f'item {ODD} 1 of 2 images'
    np.testing.assert_allclose(shown(a), second(ODD)[0], atol=1e-6)

def test_unusual_volumes_show_the_middle_slice():
    def volume(i, n): return np.stack([odd(10*i+d, n) for d in range(5)], 1)
    ax, = plot_unusual(loaders(1, volume, axes=(0, 2, 3, 4)), n=1)
    np.testing.assert_allclose(shown(ax), volume(int(titles([ax])[0]), 1)[0,2], atol=1e-6)

def called(name):
    "The title of images whose items are called `name`"
    def load(o): return TensorImage(torch.tensor(image(int(str(o)[0]), 1), dtype=torch.float32))
    b = DataBlock(TransformBlock(type_tfms=load), get_items=lambda _: [f'{i}{name}' for i in range(8)], n_inp=1,
                  splitter=IndexSplitter([7]))
    ax, = plot_unusual(b.dataloaders(0, num_workers=0, bs=4), n=1)
    ax.figure.canvas.draw()
    return titles([ax])[0][1:]

def test_unusual_names():
    "Short ones stay; long paths lose their first folders, then long names their middle; nothing is a formula"
    assert called('/a/b.png')=='/a/b.png' and called(' $a$ $\\frac$')==' $a$ $\\frac$'
    title = called('/data/of/somebody/pictures/of/many/train/cat.4321.jpg')
    assert '/data/of/somebody/pictures/of/many/train/cat.4321.jpg'.endswith(title) and title.endswith('cat.4321.jpg')
    assert 12<len(title)<=26
    title = called('.2.840.113619.2.55.3.604688119.20180719.dcm')
    assert title.startswith('.2.840') and '…' in title and title.endswith('0719.dcm') and len(title)<=26

def test_unusual_of_a_table_names_the_file():
    "The first column, as `ImageDataLoaders.from_df` has it"
    df = pd.DataFrame(dict(name=[f'scan{i:02}.png' for i in range(N)], i=range(N),
                           note='a long text that is of no use as a title'))
    def load(i): return TensorImage(torch.tensor(odd(int(i), 1), dtype=torch.float32))
    b = DataBlock(TransformBlock(type_tfms=load), get_x=ColReader('i'), n_inp=1,
                  splitter=IndexSplitter(range(TRAIN, N)))
    axs = plot_unusual(b.dataloaders(df, num_workers=0, bs=4), n=2)
    assert titles(axs)[0]==f'scan{ODD:02}.png'
    np.testing.assert_allclose(shown(axs[0]), odd(ODD, 1)[0], atol=1e-6)

def test_unusual_has_no_more_images_than_there_are():
    axs = plot_unusual(loaders(1, odd), n=99)
    assert sorted(map(int, titles(axs)))==list(range(TRAIN))
    assert max(ax.get_subplotspec().colspan.start for ax in axs)==3, 'four a row'

def test_unusual_leaves_out_images_without_pixels():
    def masked(x): return (x[:,:1]<2) & (x.mean((1, 2, 3), keepdim=True)<.7)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        axs = plot_unusual(loaders(1, odd, mask=masked), n=TRAIN)
    assert odd(ODD, 1).mean()>.7 and str(ODD) not in titles(axs) and len(axs)==TRAIN-1

def test_unusual_refuses():
    dls = loaders(1)
    for n in (0, -1, True, 2.5, '8', None):
        with pytest.raises(ValueError, match='`n` must be a whole number of images from 1'): plot_unusual(dls, n=n)
    with pytest.raises(TypeError, match='must be DataLoaders, got TfmdDL'): plot_unusual(dls.train)
    with pytest.raises(ValueError, match='holds no loader'): plot_unusual(DataLoaders())
    with pytest.raises(ValueError, match='must hold 3 axes, one per image, got 2'):
        plot_unusual(dls, n=3, axs=new_axes(1, 2))
    plain = DataLoaders(torch.utils.data.DataLoader([1, 2]))
    with pytest.raises(TypeError, match='need a fastai `TfmdDL`'): plot_unusual(plain)
    signal = loaders(1, lambda i, n: image(i, n)[:,0], axes=(0, 2))
    with pytest.raises(ValueError, match=r'only images can be shown, got \(1, 10\)'): plot_unusual(signal)

# --- for all of them

def drift(n_channels=3, alike=False):
    rows = [('GE', .02, 1.03, 'alike', 400), ('SIEMENS', -.6, .7, 'drifted', 300), ('PHILIPS', .3, 1.2, 'too few', 9)]
    rows = [(g, s+(0 if alike else .1*c), r, v, n, c, 1/n**.5) for g,s,r,v,n in rows for c in range(n_channels)]
    return pd.DataFrame([dict(group=g, channel=c, n=n, shift=s, shift_low=s-w, shift_high=s+2*w, std_ratio=r,
                              ratio_low=r/(1+w), ratio_high=r*(1+w), verdict=v)
                         for g,s,r,v,n,c,w in rows])

@pytest.mark.parametrize('n', [1, 3, 6])
def test_drift(n):
    "Two panels a channel: the differences and their intervals, as they are in the table"
    df = drift(n)
    axs = plot_drift(df)
    assert len(axs)==2*n
    for i,ax in enumerate(axs):
        want,kind = df[df.channel==i//2],('shift', 'ratio')[i%2]
        at = [o.lines[0].get_xydata()[0,0] for o in ax.containers]
        np.testing.assert_allclose(at, want['shift' if kind=='shift' else 'std_ratio'], rtol=1e-9)
        ends = [o.lines[2][0].get_segments()[0][:,0] for o in ax.containers]
        np.testing.assert_allclose(ends, want[[f'{kind}_low', f'{kind}_high']], rtol=1e-9)
        assert sorted(texts(ax))==sorted(['alike', *(list(want.verdict) if i%2 else [])]), \
            'the band is named, and each verdict said'
        assert names(ax)==([] if i%2 else ['GE (n=400)', 'SIEMENS (n=300)', 'PHILIPS (n=9)'])
        assert len({o.lines[0].get_marker() for o in ax.containers})==3, 'not told by colour alone'
    assert len(plot_drift(drift(3, alike=True)))==2

@pytest.mark.slow
@pytest.mark.parametrize('n_drifted', [0, 5, 60])
def test_drift_of_many_groups(n_drifted):
    "At most 40 rows a panel, the drifted ones among them, in the order of the table; what is left out is said"
    names_ = [f'site {i:03}' for i in range(100)]
    off = {*names_[7:7+n_drifted]}
    one = drift(3).query("group=='GE'")
    df = pd.concat([one.assign(group=g, verdict='drifted' if g in off and c==1 else 'alike') for g in names_
                    for c in [1]])
    axs = plot_drift(df)
    shown_ = [t.split(' (')[0] for t in names(axs[0])]
    assert len(shown_)==40 and shown_==sorted(shown_)
    assert {*shown_}<=off if n_drifted>=40 else off<={*shown_}
    left = f'{n_drifted-40} of them drifted' if n_drifted>40 else 'none of them drifted'
    assert axs[0].figure.get_supxlabel()==f'60 of 100 groups are not shown, {left}'
    assert axs[0].figure.get_figheight()<80
    given = new_axes(1, len(axs))[0]
    assert plot_drift(df, axs=given)[-2].get_xlabel().endswith(left)

BLUE,ORANGE = '#0072B2','#E69F00'

def test_one_colour_a_candidate():
    "In every picture, whatever other candidates there are"
    a,b = candidate_colors(['custom', 'imagenet', 'rad-dino']),candidate_colors(['rad-dino', 'imagenet'])
    assert (a['custom'], a['imagenet'], a['rad-dino'])==(BLUE, ORANGE, b['rad-dino'])
    assert len({*candidate_colors([f'model {i}' for i in range(12)]).values()})==12
    rgb = matplotlib.colors.to_rgb
    dls = loaders()
    for ax in dls.stats_choice.plot():
        assert [rgb(o.lines[0].get_color()) for o in ax.containers]==[rgb(BLUE), rgb(ORANGE)]
    for (_,),color in zip(plot_batch(dls, n=1),
                          (ORANGE, BLUE)): assert rgb(_.spines['left'].get_edgecolor())==rgb(color)
    left,_ = plot_before_after(loaders(1))
    assert rgb(left.containers[0].lines[0].get_color())==rgb(BLUE)
    verdicts = {o.lines[0].get_color() for ax in plot_drift(drift()) for o in ax.containers}
    assert not verdicts & {BLUE, ORANGE}

def test_no_line_crosses_a_number():
    "A number has a ground that hides what lies behind it, no bar runs through it, and no other text"
    for ax in [*loaders(3, grey_as_rgb).stats_choice.plot(), *plot_before_after(loaders())]:
        ax.figure.canvas.draw()
        boxes = [t.get_window_extent() for t in ax.texts]
        assert boxes and all(t.get_bbox_patch().get_alpha() in (None, 1) for t in ax.texts)
        assert min(t.get_zorder() for t in ax.texts)>max(o.get_zorder() for o in ax.lines+ax.collections)
        bars_ = [ax.transData.transform(o.lines[0].get_xydata())[0,1] for o in ax.containers]
        for k,box in enumerate(boxes):
            assert not any(box.y0<y<box.y1 for y in bars_)
            assert not any(box.overlaps(o) for o in boxes[k+1:])

def drawn():
    "Each picture as a function of loaders and axes, and how many axes it takes"
    return [(lambda dls, axs=None: dls.stats_choice.plot(axs=axs), 3), (plot_before_after, 2),
            (lambda dls, axs=None: plot_batch(dls, n=2, axs=axs), 4),
            (lambda dls, axs=None: plot_unusual(dls, n=2, axs=axs), 2),
            (lambda dls, axs=None: plot_drift(drift(), axs), 6)]

def test_given_axes_make_no_figure():
    dls = loaders()
    for draw,n in drawn():
        given = new_axes(1, n)[0]
        was = plt.get_fignums()
        assert list(np.ravel(draw(dls, axs=given)))==list(given) and plt.get_fignums()==was
        assert all(ax.has_data() for ax in given)

def test_dark_themes():
    "Own figures are dark on white under a dark theme, which is left as it was; axes that were given keep theirs"
    dls = loaders()
    with plt.style.context('dark_background'):
        theme = dict(matplotlib.rcParams)
        for draw,n in drawn():
            ax = np.ravel(draw(dls))[0]
            ax.figure.canvas.draw()
            ink = [ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels(), *ax.get_yticklabels(), *ax.texts[:1],
                   ax.title]
            assert ax.figure.get_facecolor()==ax.get_facecolor()==(1, 1, 1, 1)
            assert all(sum(matplotlib.colors.to_rgb(t.get_color()))<2 for t in ink), [t.get_color() for t in ink]
            given = new_axes(1, n)[0]
            ax = np.ravel(draw(dls, axs=given))[0]
            assert ax.get_facecolor()==(0, 0, 0, 1) and ax.xaxis.label.get_color()=='white'
        assert dict(matplotlib.rcParams)==theme

def test_a_first_figure_may_turn_on_showing():
    "Where a notebook's backend is loaded by one of these pictures, it goes on showing figures"
    was = plt.isinteractive()
    try:
        plt.ioff()
        with house_look(None): plt.ion()
        assert plt.isinteractive()
    finally: plt.ion() if was else plt.ioff()

def test_text_can_be_read():
    "Nothing smaller than 8 points, and no line below a figure is wider than it"
    dls = loaders()
    for draw in [*(f for f,_ in drawn()), lambda _: plot_unusual(loaders(13, in_hu), n=1),
                 lambda _: loaders(3, groups=str).stats_choice.plot()]:
        fig = np.ravel(draw(dls))[0].figure
        fig.canvas.draw()
        below = fig._supxlabel.get_window_extent() if fig.get_supxlabel() else fig.bbox
        assert fig.bbox.x0<=below.x0 and below.x1<=fig.bbox.x1
        small = [t for t in fig.findobj(matplotlib.text.Text) if t.get_text() and t.get_fontsize()<8]
        assert not small, small
        assert fig.get_figwidth()<=10.5

def states(): return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

@pytest.mark.parametrize('i', range(4))
def test_no_trace_in_random_states_or_order(i):
    "The batches that follow, augmented at random, are those that come without the picture"
    def batches(draw):
        dls = loaders(tfms=aug_transforms(size=8), bs=4)
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        dls.train.rng.seed(0)
        before = states()
        if draw: drawn()[i][0](dls)
        assert states()==before
        return torch.cat([b[0] for b in dls.train])
    assert torch.equal(batches(True), batches(False))

def test_the_same_picture_twice():
    a,b = (plot_batch(loaders(tfms=aug_transforms(size=8)), n=2)[0,0].images[0].get_array() for _ in range(2))
    np.testing.assert_array_equal(a, b)

def test_in_batches_that_are_no_power_of_two():
    "All images of a training batch are drawn, and none twice"
    left,_ = plot_before_after(loaders(1, bs=12, stats=([.5], [.5])))
    got = (heights(left)[0]*np.diff(edges(left)[0])).sum()
    assert np.isclose(got, 1)

@pytest.mark.parametrize('channels,scheme,rows',
                         [(1, 'zscore', ['custom']), (3, 'zscore', ['imagenet', 'custom']),
                          (1, 'image-zscore', ['custom', 'image-zscore']),
                                                  (3, 'minmax', ['imagenet', 'custom', 'minmax'])])
def test_usual_candidates(channels, scheme, rows):
    "Without candidates: those that apply, and what is used"
    dls = loaders(channels, **(dict(stats='auto', scheme=scheme) if scheme!='zscore' else {}))
    assert [row[0].get_ylabel().split('\n')[0] for row in plot_batch(dls, n=2)]==rows

def test_far_values_do_not_make_bars_coarse():
    "A few bright clouds far off leave gaps; only few levels make a comb, which is drawn in coarser bins"
    from fastai_normstats.view.batches import _coarser
    counts = np.zeros(256, int)
    counts[5:30],counts[230:250] = 1000,30
    assert _coarser(counts)==1
    comb = np.zeros(256, int)
    comb[::16] = 1000
    assert _coarser(comb)==16
