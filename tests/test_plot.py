"What the pictures show, against NumPy on the same pixels: heights, places of markers, colours; and that drawing leaves no trace"
import random

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
from fastai.vision.all import RandomErasing, TensorCategory, TensorImage, aug_transforms, imagenet_stats

from fastai_normstats.all import DatasetStats, choose_stats, plot_batch, plot_before_after, plot_drift
from fastai_normstats.plot import _look
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
    return DataBlock(TransformBlock(type_tfms=load), get_items=lambda _: range(N), n_inp=1, splitter=IndexSplitter(range(TRAIN, N)),
                     batch_tfms=tfms)

def loaders(n_channels=3, images=image, tfms=None, bs=TRAIN, **kwargs):
    "Loaders whose training batch is all of the training images"
    kwargs = dict(stats='custom', measure=True, verbose=False, cache=False) | kwargs
    return block(n_channels, images, tfms).fit_stats(0, num_workers=0, bs=bs, **kwargs).dataloaders(0, num_workers=0, bs=bs)

def pixels(n_channels=3, images=image): return np.stack([images(i, n_channels) for i in range(TRAIN)], 1).reshape(n_channels, -1)

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

@pytest.mark.parametrize('n', [1, 2, 3, 6, 13])
def test_choice_shows_the_training_pixels_and_the_candidates(n):
    axs,x = loaders(n).stats_choice.plot(),pixels(n)
    assert len(axs)==n
    for ax,v in zip(axs, x):
        counts = np.histogram(v, 256, (0, 1))[0]
        np.testing.assert_allclose(heights(ax)[0], np.minimum(counts/v.size, heights(ax)[0].max()), atol=1e-12)
        assert heights(ax)[0].max()>.5*counts.max()/v.size
        (mean,std),*others = numbers(ax)
        np.testing.assert_allclose((mean, std), (v.mean(), v.std()), rtol=1e-5)
        assert len(others)==(3 if n==1 else 1 if n==3 else 0), 'numbers for other channels are not of these'
    if n==3: np.testing.assert_allclose([numbers(ax)[1] for ax in axs], IMAGENET.T)
    if n==1: np.testing.assert_allclose(numbers(axs[0])[1:], IMAGENET.T)
    if n==1: assert [o[0] for o in bars(axs[0])]==['custom (used)', 'imagenet red', 'imagenet green', 'imagenet blue']

def test_choice_in_rows():
    "At most four panels a row; names of the candidates before the first of each"
    axs = loaders(6).stats_choice.plot()
    assert [(ax.get_subplotspec().rowspan.start, ax.get_subplotspec().colspan.start) for ax in axs]==[(i//3, i%3) for i in range(6)]
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

def test_choice_cuts_off_and_labels_what_towers():
    "A border takes 40 % of the pixels; the other bins can be seen all the same"
    def bordered(i, n):
        x = image(i, n)
        x[:,:,:4] = 1/512
        return x
    ax, = loaders(1, bordered).stats_choice.plot()
    assert '40% near 0' in texts(ax)
    assert heights(ax)[0][0]==heights(ax)[0].max()<2*np.sort(heights(ax)[0])[-8]

def test_choice_of_few_levels_is_no_comb():
    def levels(i, n): return np.random.default_rng(i).integers(0, 17, (n, 12, 12))/16
    ax, = loaders(1, levels).stats_choice.plot()
    assert len(heights(ax)[0])==16 and (heights(ax)[0]>0).all()

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
    with pytest.raises(ValueError, match='must hold 3 axes, one per channel, got 2'): loaders().stats_choice.plot(axs=new_axes(1, 2))

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
    np.testing.assert_allclose(heights(left)[0], outline(pixels()[0], (0, 1)).clip(max=heights(left)[0].max()), rtol=1e-6)
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
            want = [((image(k, 3)-mean[:,None,None])/std[:,None,None]/5+.5).clip(0, 1).transpose(1, 2, 0) for k in range(TRAIN)]
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
        want = [(((image(k, 6)-x.mean(1)[:,None,None])/x.std(1)[:,None,None])[cs]/5+.5).clip(0, 1).transpose(1, 2, 0) for k in range(TRAIN)]
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
    monkeypatch.setattr('fastai_normstats.batches._candidate_tfm', lambda choice, c: OfEachImage([.5], [.5]))
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
    with pytest.raises(ValueError, match="candidate 'imagenet': the images have 1 channel"): plot_batch(loaders(1), 'imagenet')
    with pytest.raises(ValueError, match='fit again with `measure=True` added'): plot_batch(loaders(stats='imagenet', measure=False), 'custom')
    with pytest.raises(ValueError, match='no `stats_choice`.*fit_stats'):
        plot_batch(block(tfms=Normalize.from_stats(*imagenet_stats, cuda=False)).dataloaders(0, num_workers=0, bs=4))
    with pytest.raises(TypeError, match='must be DataLoaders'): plot_batch(dls.train)

# --- for all of them

def drift(n_channels=3, alike=False):
    rows = [('GE', .02, 1.03, 'alike', 400), ('SIEMENS', -.6, .7, 'drifted', 300), ('PHILIPS', .3, 1.2, 'too few', 9)]
    return pd.DataFrame([dict(group=g, channel=c, n=n, shift=s+(0 if alike else .1*c), std_ratio=r, verdict=v)
                         for g,s,r,v,n in rows for c in range(n_channels)])

@pytest.mark.parametrize('n', [1, 3, 6])
def test_drift(n):
    df = drift(n)
    axs = plot_drift(df)
    assert len(axs)==n
    for c,ax in enumerate(axs):
        want = df[df.channel==c]
        np.testing.assert_allclose(numbers(ax)[::-1], want[['shift', 'std_ratio']], rtol=1e-9)
        assert texts(ax)==list(want.verdict)
        assert names(ax)==(['GE (n=400)', 'SIEMENS (n=300)', 'PHILIPS (n=9)'] if c%3==0 else [])
        assert len({o.lines[0].get_marker() for o in ax.containers})==3, 'not told by colour alone'
    assert len({ax.get_xlim() for ax in axs})==1, 'one scale, so that channels can be compared'
    assert len(plot_drift(drift(3, alike=True)))==1

def drawn():
    "Each picture as a function of loaders and axes, and how many axes it takes"
    return [(lambda dls, axs=None: dls.stats_choice.plot(axs=axs), 3), (plot_before_after, 2),
            (lambda dls, axs=None: plot_batch(dls, n=2, axs=axs), 4), (lambda dls, axs=None: plot_drift(drift(), axs), 3)]

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
            ink = [ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels(), *ax.get_yticklabels(), *ax.texts[:1], ax.title]
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
        with _look(None): plt.ion()
        assert plt.isinteractive()
    finally: plt.ion() if was else plt.ioff()

def test_text_can_be_read():
    "Nothing smaller than 8 points"
    dls = loaders()
    for draw,_ in drawn():
        fig = np.ravel(draw(dls))[0].figure
        small = [t for t in fig.findobj(matplotlib.text.Text) if t.get_text() and t.get_fontsize()<8]
        assert not small, small
        assert fig.get_figwidth()<=10.5

def states(): return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

@pytest.mark.parametrize('i', range(3))
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

@pytest.mark.parametrize('channels,scheme,rows', [(1, 'zscore', ['custom']), (3, 'zscore', ['imagenet', 'custom']), (1, 'image-zscore', ['custom', 'image-zscore']),
                                                  (3, 'minmax', ['imagenet', 'custom', 'minmax'])])
def test_usual_candidates(channels, scheme, rows):
    "Without candidates: those that apply, and what is used"
    dls = loaders(channels, **(dict(stats='auto', scheme=scheme) if scheme!='zscore' else {}))
    assert [row[0].get_ylabel().split('\n')[0] for row in plot_batch(dls, n=2)]==rows

def test_far_values_do_not_make_bars_coarse():
    "A few bright clouds far off leave gaps; only few levels make a comb, which is drawn in coarser bins"
    from fastai_normstats.plot import _coarser
    counts = np.zeros(256, int)
    counts[5:30],counts[230:250] = 1000,30
    assert _coarser(counts)==1
    comb = np.zeros(256, int)
    comb[::16] = 1000
    assert _coarser(comb)==16
