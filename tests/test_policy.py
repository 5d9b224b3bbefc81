"Each rule on either side of its threshold, their order, and what they say"

import json,math,re

import numpy as np
import pytest
import torch
from fastai.vision.all import imagenet_stats,resnet34
from helpers import constant,half,ledger,M,measured,one_channel,part_of as partial,patients,S,shifted,with_z,xray

from fastai_normstats.models import IMAGENET
from fastai_normstats.choice import StatsChoice
from fastai_normstats.policy import NotMeasured,Policy,choose_stats
from fastai_normstats.values import NormStats
from fastai_normstats.running import Measured,RunningStats

def test_measured_is_what_it_says():
    m = measured(between=.1, std_between=.02, n=50)
    for got,want in ((m.mean, M), (m.image_std, S), (m.mean_se, [.1/7]*3), (m.image_std_se, [.02/7]*3)):
        np.testing.assert_allclose(got, want, rtol=1e-12)
    np.testing.assert_allclose(measured(between=.1).std, np.sqrt(S**2+.01), rtol=1e-12)

def rule(n, m=None, **kwargs): return choose_stats(n, m, **kwargs).rule

# --- thresholds

@pytest.mark.parametrize('n,want', [(1, 'small'), (499, 'small'), (500, 'significant'), (1999, 'significant'),
    (2000, 'enough'), (10**6, 'enough')])
def test_small_and_enough(n, want): assert rule(n, shifted())==want

@pytest.mark.parametrize('n,want', [(9, 'small'), (10, 'significant'), (19, 'significant'), (20, 'enough')])
def test_own_small_and_enough(n, want): assert rule(n, shifted(), policy=Policy(small=10, enough=20))==want

@pytest.mark.parametrize('n', [500, 2000])
@pytest.mark.parametrize('sign', [1, -1])
@pytest.mark.parametrize('c', range(3))
def test_similar(n, sign, c):
    "A shift of one channel, or the log ratio of its std, just below and just above 0.1; upwards and downwards"
    one = np.eye(3)[c]
    for by,similar in ((.0999, True), (.1001, False)):
        assert (rule(n, measured(mean=M+sign*by*S*one))=='similar')==similar
        assert (rule(n, measured(std=S*np.exp(sign*by*one)))=='similar')==similar

def test_own_similar():
    m = measured(mean=M+.15*S)
    assert rule(2000, m)=='enough' and rule(2000, m, policy=Policy(similar=.16))=='similar'

@pytest.mark.parametrize('kind', ['mean', 'std'])
@pytest.mark.parametrize('by', [.2, -.2])
@pytest.mark.parametrize('n', [500, 1999])
def test_z(kind, by, n):
    less,more = with_z(2.99, kind, by),with_z(3.01, kind, by)
    assert rule(n, less)=='unclear' and rule(n, more)=='significant'
    assert rule(n, less, policy=Policy(z=2.9))=='significant' and rule(n, more, policy=Policy(z=3.1))=='unclear'

def sparse(share=.02, n=40):
    "Black images of which `share` of the pixels is lit"
    x = (np.random.default_rng(0).random((n, 1, 32, 32))<share).astype('float32').repeat(3, 1)
    return RunningStats().update(torch.from_numpy(x)),x.astype(np.float64)

@pytest.mark.parametrize('n', [500, 1999, 2000, 10**6])
def test_reach(n):
    "One value in a thousand, under the data's own numbers, against the furthest that the model saw under its own"
    m,x = sparse()
    known = (1-.406)/.225
    want = (np.quantile(x, .999)-x.mean())/x.std()/known
    assert want>2
    for r,says in ((1, True), (want*.95, True), (want*1.05, False)):
        assert (rule(n, m, policy=Policy(reach=r))=='reach')==says
    c = choose_stats(n, m)
    assert c.stats==IMAGENET and c.rule=='reach' and f'saw at most {known:.1f}' in c.why
    assert f'{want*known:.0f}.' in c.why and "`stats='custom'` uses the data's own" in c.why

def test_reach_leaves_what_comes_before_and_what_is_asked_for():
    m,_ = sparse()
    for kwargs,says in ((dict(pretrained=False), 'scratch'), (dict(frozen=True), 'frozen'),
                        (dict(stats='custom'), 'given'), (dict(n_images=499), 'small'),
                        (dict(policy=Policy(reach=math.inf)), 'significant')):
        assert choose_stats(**{'n_images': 800, 'measured': m, **kwargs}).rule==says
    assert rule(2000, shifted())=='enough' and rule(800, sparse(.3)[0])=='significant'

def test_reach_counts_from_the_model_in_use():
    "Of a model that was shown .5 / .5 values never lie beyond 1"
    m,of_half = sparse(.15)[0],NormStats([.5]*3, [.5]*3, name='half')
    assert rule(800, m, model=of_half)=='reach' and rule(800, m)=='significant'

def test_sure_but_tiny_difference_is_not_significant():
    "0.05 σ beyond any doubt in one channel does not speak for a doubtful 0.2 σ in another"
    m = measured(mean=M+S*(.2, .05, 0), between=S*(1.2, .001, .001)*.5)
    assert choose_stats(1000, m).rule=='unclear'

def test_one_image_has_no_standard_error():
    assert rule(1000, RunningStats().update(torch.rand(1, 3, 8, 8)*.3))=='unclear'

@pytest.mark.parametrize('lo,hi,want', [(0, 1, 'similar'), (-.049, 1, 'similar'), (-.051, 1, 'range'),
    (0, 1.049, 'similar'), (0, 1.051, 'range')])
def test_range(lo, hi, want):
    "Up to 5 % over the ends is what interpolation does"
    x = measured(n=2000)
    ends = RunningStats().update(torch.tensor([lo, hi]).double().expand(1, 3, 2))
    assert rule(5000, x.merge(ends))==want

@pytest.mark.parametrize('scale', [255, 4095, 65535])
def test_range_of_unscaled_images(scale):
    c = choose_stats(100, measured(scale=scale))
    assert (c.rule, c.kind)==('range', 'custom') and len(c.warnings)==1 and 'cannot apply' in c.warnings[0]
    x = scale*np.stack([M-S, M+S])
    np.testing.assert_allclose(c.stats.value_range, (0, 255) if scale==255 else (x.min(), x.max()),
                               rtol=1e-12)  # else where the pixels lie

def test_range_of_hounsfield_units():
    x = torch.tensor([-1024., 0, 1800]).view(1, 1, 1, 3).repeat(2, 3, 1, 1)
    assert rule(5000, RunningStats().update(x))=='range'

@pytest.mark.parametrize('top,want', [(.09, 'range'), (.11, 'enough')])
def test_range_of_12_bit_divided_by_16(top, want):
    "12-bit values over 65535 fill a sixteenth of [0, 1]: in it, and yet not on its scale"
    assert rule(5000, RunningStats().update(torch.rand(50, 3, 9, 9)*top))==want

def test_range_is_the_models():
    "A model of its own value range: HU images live on it, images in [0, 1] do not"
    hu = NormStats((-500.,)*3, (300.,)*3, name='hu-net', value_range=(-1024, 1024))
    x = torch.linspace(-1000, 1000, 64).view(1, 1, 8, 8).repeat(9, 3, 1, 1)
    assert rule(5000, RunningStats().update(x), model=hu)=='enough'
    assert rule(5000, measured(), model=hu)=='range'

# --- sizes count independent images

def reference_effect(x, groups):
    """Design effect of the worst channel, mean or std, of images (n, C, pixels): ratio estimators over groups
    (Cochran 1977, §6; Kish 1965), in numpy"""
    x = np.asarray(x, dtype=np.float64)
    names = sorted(set(groups))
    member = np.array([[g==k for g in groups] for k in names], dtype=np.float64)
    d = x-x.mean((0, 2))[:,None]
    v = d**2-(d**2).mean((0, 2))[:,None]
    def squared_se(t): return len(t)/(len(t)-1)*(t**2).sum(0)/x[:,0].size**2
    return max((squared_se(member@o.sum(2))/squared_se(o.sum(2))).max() for o in (d, v))

@pytest.mark.parametrize('sizes', [[2]*100, [5]*40, [*range(1, 21)]], ids=['pairs', 'fives', 'one to twenty'])
def test_small_and_enough_count_independent_images(sizes):
    "Thresholds on either side of the number of images over their design effect"
    x,whose = patients(sizes)
    m,n = ledger(x, whose),len(x)
    worth = n/reference_effect(x, whose)
    assert worth<.8*n and worth%1>1e-6  # it matters here, and is no whole number
    k = int(worth)
    assert rule(n, m, policy=Policy(small=k, enough=k+1))=='significant'
    assert rule(n, m, policy=Policy(small=k+1, enough=k+1))=='small'
    assert rule(n, m, policy=Policy(small=0, enough=k))=='enough'
    assert rule(n, m, policy=Policy(small=0, enough=k+1))=='significant'
    assert rule(n, ledger(x), policy=Policy(small=n, enough=n))=='enough'  # without a word on groups all images count

def test_a_larger_split_is_worth_more_in_proportion():
    x,whose = patients([4]*50)
    m,effect = ledger(x, whose),reference_effect(x, whose)
    for n in (1000, 20_000):
        k = int(n/effect)
        assert rule(n, m, policy=Policy(small=k, enough=10**9))!='small'
        assert rule(n, m, policy=Policy(small=k+1, enough=10**9))=='small'

def test_the_sentence_on_independent_images():
    "2,517 images of 1,882 patients, as on the X-rays"
    x,whose = patients([1]*1400+[2]*400+[3]*35+[4]*23+[5]*24)
    assert (len(x), len(set(whose)))==(2517, 1882)
    c = choose_stats(2517, ledger(x, whose))
    worth = 2517/reference_effect(x, whose)
    assert c.why.startswith(f"2,517 training images of 1,882 patients, worth {worth:,.0f} independent ones (")
    assert c.rule==('enough' if worth>=2000 else 'significant')
    assert 'patients' not in choose_stats(2517, ledger(x)).why and 'worth' not in choose_stats(2517, ledger(x)).why

def test_a_partial_measurement_with_groups():
    """All images and patients are named, and what was read of them; half-widths with t and the finite-population
    correction in patients"""
    from scipy.stats import t
    x,whose = patients([1, 2, 3, 4]*15)
    m = partial(ledger(x, whose), 5000, 2000)
    effect,G,n = reference_effect(x, whose),60,len(x)
    c = choose_stats(5000, m)
    assert c.why.startswith(f"5,000 training images of 2,000 patients, worth {5000/effect:,.0f} independent ones (at "
                            f"least")
    d = x-x.mean((0, 2))[:,None]
    totals = np.stack([d[[o==g for o in whose]].sum((0, 2)) for g in sorted(set(whose))])
    se = np.sqrt(G/(G-1)*(totals**2).sum(0))/(n*8)
    half = (t.ppf(.975, G-1)*np.sqrt(1-G/2000)*se/x.std((0, 2))).max()
    read = f"measured on {n} of 5,000 images, 60 of 2,000 patients"
    assert f"({read}, mean known to ±{100*half:.2g} % of σ, std to ±" in c.why
    assert [w for w in c.warnings if f'rest on {n} of 5,000 images' in w]  # ±5 % of σ and more

def test_one_group():
    "However many images a patient has, they are worth one, and nothing is known of how well"
    x,whose = patients([40])
    whole,part = choose_stats(40, ledger(x, whose),
                              policy=Policy(small=2)),choose_stats(4000, partial(ledger(x, whose), 4000, 1))
    assert whole.rule==part.rule=='small' and whole.why.startswith('40 training images of 1 patient, worth 1 '
        'independent one, are fewer than 2')
    assert 'measured on 40 of 4,000 images, 1 of 1 patient, too few to say how well' in part.why
    assert any('rough' in w for w in part.warnings)
    one_of_many = choose_stats(4000, partial(ledger(x, whose), 4000, 100), policy=Policy(small=10))
    for c in (whole, part, one_of_many):
        assert 'nan' not in c.why and 'nan' not in ' '.join(c.warnings)
        assert StatsChoice.from_dict(json.loads(json.dumps(c.to_dict()))).measured==c.measured
    assert one_of_many.rule=='unclear'  # nothing is known of differences either

@pytest.mark.parametrize('noise', [0., .01])
def test_images_are_never_worth_more_than_they_are(noise):
    """The same five slices of every patient: the patients hardly differ, the design effect is about 0, and 200 images
    stay 200"""
    x,_ = patients([1]*5, alike=0.)
    x,whose = np.tile(x, (40, 1, 1)),[f'p{i}' for i in range(40) for _ in range(5)]
    x += noise*np.random.default_rng(0).normal(size=x.shape)
    m = ledger(x, whose)
    assert reference_effect(x, whose)<.1 and m.design_effect.max()<.1
    c = choose_stats(200, m, policy=Policy(small=200, enough=201))
    assert c.rule=='significant' and '200 training images of 40 patients, worth 200 independent ones (between' in c.why
    assert rule(200, m, policy=Policy(small=201, enough=201))=='small'

def test_few_independent_images_of_many_channels_warn():
    x,whose = patients([10]*30, C=5)
    worth = 300/reference_effect(x, whose)
    k = int(worth)
    few,many = (choose_stats(300, ledger(x, whose), policy=Policy(small=o)) for o in (k+1, k))
    assert few.rule==many.rule=='channels' and many.warnings==()
    assert few.warnings[0].startswith(f'only 300 training images of 30 patients, worth {worth:,.0f} independent ones '
                                      f'(fewer than {k+1}),')

def test_groups_make_a_difference_less_certain():
    "What is significant for independent images is not for as many of a few patients"
    x,whose = patients([40]*5, alike=.95, seed=3)
    near = NormStats(x.mean((0, 2))+.07, x.std((0, 2)), name='near', estimator='pooled')
    assert rule(1000, ledger(x), model=near, policy=Policy(small=0))=='significant'
    assert rule(1000, ledger(x, whose), model=near, policy=Policy(small=0))=='unclear'

def test_a_summary_chooses_like_the_ledger():
    x,whose = patients([2]*40)
    for m in (ledger(x), ledger(x, whose), shifted(between=.1), measured(scale=255)):
        for kwargs in (dict(), dict(stats='custom'), dict(scheme='clip-zscore'), dict(pretrained=False)):
            a,b = choose_stats(700, m, **kwargs),choose_stats(700, m.measured(), **kwargs)
            assert isinstance(a.measured, Measured) and a==b and repr(a)==repr(b)

@pytest.mark.parametrize('bad', [dict(mean=[.5]), 3, 'x.json', [1]], ids=str)
def test_what_is_no_measurement(bad):
    with pytest.raises(TypeError, match='`measured` must be a RunningStats or a Measured'): choose_stats(100, bad)

# --- order

@pytest.mark.parametrize('first,second,n,m,kwargs', [
    ('given',       'scratch',     100,  shifted(),            dict(stats='imagenet', pretrained=False)),
    ('given',       'frozen',      100,  shifted(),            dict(stats='custom', frozen=True)),
    ('given',       'domain',      100,  shifted(),            dict(stats=(M, S), model=xray)),
    ('scratch',     'range',       100,  measured(scale=255),  dict(pretrained=False)),
    ('scratch',     'frozen',      100,  shifted(),            dict(pretrained=False, frozen=True)),
    ('range',       'domain',      5000, measured(scale=255),  dict(model=xray)),
    ('range',       'frozen',      5000, measured(scale=255),  dict(frozen=True)),
    ('domain',      'frozen',      5000, shifted(),            dict(model=xray, frozen=True)),
    ('domain',      'small',       100,  shifted(),            dict(model=xray)),
    ('domain',      'enough',      5000, shifted(),            dict(model=xray)),
    ('channels',    'frozen',      5000, one_channel,          dict(frozen=True)),
    ('channels',    'small',       100,  one_channel,          dict()),
    ('frozen',      'small',       100,  shifted(),            dict(frozen=True)),
    ('frozen',      'enough',      5000, shifted(),            dict(frozen=True)),
    ('small',       'similar',     499,  measured(),           dict()),
    ('similar',     'enough',      5000, measured(),           dict()),
    ('similar',     'unclear',     1000, measured(),           dict()),
    ('enough',      'significant', 2000, with_z(9, 'mean'),    dict()),
    ('significant', 'unclear',     1000, with_z(9, 'mean'),    dict())])
def test_first_rule_wins(first, second, n, m, kwargs): assert rule(n, m, **kwargs)==first

def test_domain_model_for_other_channels():
    """`domain` comes before `channels` where the model has numbers for them; three for one channel cannot be used,
    and silence would broadcast them"""
    assert rule(5000, one_channel, model='lunit-dino')=='channels'
    for model,want in ((xray, ((.5,), (.25,))), ('rad-dino', ((.5307,), (.2583,)))):
        c = choose_stats(5000, one_channel, model=model)
        assert (c.rule, c.kind, tuple(c.stats))==('domain', 'pretrained', want)

# --- published for another range

@pytest.mark.parametrize('name, native', [('chexzero', ((101.48761,)*3, (83.43944,)*3, 0, 255)),
                                          ('torchxrayvision', ((0.,)*3, (1.,)*3, -1024, 1024))])
def test_published_range(name, native):
    """The same normalised values on the published range and on [0, 1]; on others a refusal; without a look at the
    pixels nothing"""
    mean,std,lo,hi = native
    for kwargs in (dict(model=name), dict(stats=name), dict(model=name, frozen=True),
                   dict(model=name, stats='pretrained')):
        with pytest.raises(NotMeasured): choose_stats(5000, **kwargs)
        x = measured()
        c = choose_stats(5000, x, **kwargs)
        for v in (0., .3, 1.):
            want = [(lo+v*(hi-lo)-m)/s for m,s in zip(mean, std)]
            np.testing.assert_allclose([(v-m)/s for m,s in zip(*c.stats)], want, rtol=1e-6, atol=1e-9)
        assert c.rule!='range' and 'restated' in c.stats.source
        wide = RunningStats().update(lo+torch.rand(50, 3, 8, 8).double()*(hi-lo))
        assert tuple(choose_stats(5000, wide, **kwargs).stats)==(mean, std)
    hounsfield = RunningStats().update(torch.rand(50, 3, 8, 8)*4000-1100)
    assert rule(5000, hounsfield, model=name)=='range'
    with pytest.raises(ValueError, match=f"run from .* {name}'s statistics are for images from"):
        choose_stats(5000, hounsfield, stats=name)

def test_numbers_for_another_range_are_not_restated_unless_published():
    hu = NormStats((.4,)*3, (.3,)*3, name='chexzero', domain='CT', value_range=(-1024, 1024))
    assert rule(5000, measured(), model=hu)=='range'

def test_domain_model_with_imagenets_numbers():
    c = choose_stats(100, model='uni')
    assert (c.rule, c.kind, c.stats.name, tuple(c.stats))==('domain', 'pretrained', 'uni',
        tuple(IMAGENET)) and 'mahmoodlab/UNI' in c.why

# --- what is given

def test_kinds():
    def kind(n=100, m=shifted(), **kwargs): c = choose_stats(n, m, **kwargs); return c.kind,c.stats
    imagenet = ('imagenet', IMAGENET)
    assert kind()==kind(model='imagenet')==kind(model=IMAGENET)==imagenet
    k,s = kind(model=resnet34)
    assert k=='imagenet' and tuple(s)==tuple(IMAGENET)
    assert kind(model=half)==('pretrained', half) and kind(model=xray)==('pretrained', xray)
    assert kind(5000)[0]=='custom' and kind(5000)[1].std==tuple(shifted().std.tolist())
    for n in (100, 5000):
        assert kind(n, stats='imagenet')==imagenet and kind(n, stats='custom')==kind(5000, stats='custom')
    assert kind(stats='pretrained')==imagenet and kind(stats='pretrained', model=half)==('pretrained', half)
    assert kind(stats=half)==('given', half) and kind(stats=imagenet_stats)[0]=='imagenet'
    k,s = kind(stats=((.1, .2, .3), (.4, .5, .6)))
    assert k=='given' and tuple(s)==((.1, .2, .3), (.4, .5, .6))
    assert kind(stats='imagenet', model=half)==imagenet

def test_given_number_for_all_channels():
    assert tuple(choose_stats(10, shifted(), stats=(.5, .25)).stats)==((.5,), (.25,))

@pytest.mark.parametrize('kwargs', [dict(stats='imagenet'), dict(stats=(M, S)), dict(stats='pretrained', model=half),
    dict(model=xray), dict(frozen=True)], ids=str)
def test_needs_no_measuring(kwargs):
    c = choose_stats(100, **kwargs)
    assert c.measured is None and c.warnings==() and len(c.table())
    assert c.rule in ('given', 'domain', 'frozen')

@pytest.mark.parametrize('kwargs', [dict(), dict(n_images=5000), dict(model=half), dict(stats='custom'),
    dict(pretrained=False), dict(pretrained=False, frozen=True)], ids=str)
def test_needs_measuring(kwargs):
    with pytest.raises(NotMeasured, match='`measured=`|`measure_stats`') as e:
        choose_stats(**{'n_images': 100, **kwargs})
    assert isinstance(e.value, ValueError)

@pytest.mark.parametrize('kwargs,match', [
    (dict(n_images=0),                                '`n_images` must be at least 1'),
    (dict(measured=RunningStats()),                   'counted no images'),
    (dict(stats='imagnet'),                           "`stats` takes 'auto'.*'imagenet'"),
    (dict(stats=None),                                '`stats` takes'),
    (dict(stats=(1, 2, 3)),                           '`stats` takes'),
    (dict(stats=((.5, math.nan, .5), (1, 1, 1))),     '`mean` must be finite'),
    (dict(stats=((.5,)*3, (1, 0, 1))),                '`std` must be above 0'),
    (dict(stats=((.5,)*2, (1,)*2)),                   '3 channels and the custom statistics 2'),
    (dict(model='resnet43'),                          "unknown model 'resnet43'.*near matches"),
    (dict(model=3),                                   'cannot tell the statistics of a int')])
def test_refuses(kwargs, match):
    with pytest.raises(ValueError, match=match) as e: choose_stats(**{'n_images': 100, 'measured': shifted(), **kwargs})
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('kwargs', [dict(small=-1), dict(small=3000), dict(enough=100), dict(similar=-.1), dict(z=-1),
                                    dict(reach=.5), dict(reach=float('nan'))],
                         ids=str)
def test_policy_refuses(kwargs):
    with pytest.raises(ValueError): Policy(**kwargs)

# --- estimators

def test_compares_like_with_like():
    """Image std as ImageNet's, pooled std 41 % more: no difference to ImageNet's numbers, one to the same numbers as
    a pooled std"""
    m = measured(between=S)
    pooled = NormStats(M, S, name='pooled-net', domain='natural images', estimator='pooled')
    assert rule(5000, m)=='similar' and rule(5000, m, model=pooled)=='enough'
    pooled = NormStats(M, m.std, name='pooled-net', domain='natural images', estimator='pooled')
    assert rule(5000, m, model=pooled)=='similar'
    image  = NormStats(M, m.std, name='image-net', domain='natural images', estimator='image')
    assert rule(5000, m, model=image)=='enough'

def test_custom_is_pooled():
    "What divides is the std that makes the data unit-variance, whichever was compared"
    m = shifted(between=.1)
    s = choose_stats(5000, m).stats
    assert s.estimator=='pooled' and s.std==tuple(m.std.tolist()) and s.mean==tuple(m.mean.tolist())

# --- constant channels

@pytest.mark.parametrize('v', [0, .1, 1])
def test_constant_channel(v):
    c = choose_stats(5000, constant(v))
    assert c.kind=='custom' and c.stats.std[1]==1 and c.stats.mean[1]==pytest.approx(v, rel=1e-6) and c.stats.std[0]!=1
    assert [w for w in c.warnings if 'channel 1 is constant' in w and 'std 1' in w]

def test_constant_up_to_float_rounding():
    "A constant that a resize left with 1e-8 of noise is constant too"
    x = torch.full((9, 1, 8, 8), .7)
    x[:,:,0] += 6e-8
    c = choose_stats(5000, RunningStats().update(x))
    assert c.stats.std==(1.,) and any('constant' in w for w in c.warnings)

def test_constant_channel_beside_the_models_statistics():
    c = choose_stats(100, constant())
    assert c.kind=='imagenet' and c.stats==IMAGENET and any('channel 1 is constant' in w for w in c.warnings)

def test_few_images_of_many_channels_warn():
    m = measured(mean=np.full(5, .5), std=np.full(5, .2))
    few,many = choose_stats(499, m),choose_stats(500, m)
    assert few.rule==many.rule=='channels' and few.kind==many.kind=='custom' and len(few.stats.mean)==5
    assert len(few.warnings)==1 and '499' in few.warnings[0] and many.warnings==()

# --- what it says

def test_why_names_the_numbers():
    assert '499' in choose_stats(499, shifted()).why and '500' in choose_stats(499, shifted()).why
    assert '0.50 σ' in choose_stats(5000, shifted()).why and '30%' in choose_stats(5000, shifted()).why
    assert '1,000' in choose_stats(1000, with_z(5, 'mean')).why
    assert '5 standard errors' in choose_stats(1000, with_z(5.01, 'mean')).why

# --- what is given back

def test_numbers_as_model_are_not_called_custom():
    "`custom` is what was measured; a model known by its numbers alone is `the model`"
    c = choose_stats(100, shifted(), model=([.5]*3, [.2]*3))
    assert (c.kind, c.rule)==('pretrained', 'small') and "the model's statistics" in c.why and 'custom' not in c.code()
    assert c.table().candidate.tolist()==['custom']*3+['model']*3
    assert c.table().used.tolist()==[False]*3+[True]*3

def test_imagenet_by_its_numbers_is_known_as_such():
    assert choose_stats(100, shifted(), model=tuple(IMAGENET)).kind=='imagenet'

def test_a_choice_as_stats():
    "A loaded choice gives its numbers"
    c = choose_stats(5000, shifted())
    assert choose_stats(10, stats=c).stats==c.stats

def test_a_choice_keeps_its_origin(tmp_path):
    """Rule and sentence of the given choice, with the file that it was loaded from, once, however often it is saved
    and given back"""
    c = choose_stats(5000, shifted())
    back = choose_stats(10, stats=c)
    assert (back.rule, back.why, back.kind, back.n_images)==('enough', c.why, 'given', 10) and back.measured==c.measured
    loaded = StatsChoice.load(c.save(tmp_path/'a.json'))
    assert loaded==c and loaded.why==c.why and loaded.file=='a.json'
    again = choose_stats(10, stats=loaded)
    assert (again.rule, again.why)==('enough', f'{c.why}, as saved in a.json') and again.provenance==c.provenance
    assert choose_stats(20, shifted(), stats=again).why==again.why
    twice = choose_stats(10, stats=StatsChoice.load(again.save(tmp_path/'b.json')))
    assert twice.why==f'{c.why}, as saved in b.json' and twice.stats==c.stats and twice.rule=='enough'

@pytest.mark.parametrize('kwargs', [dict(), dict(scheme='minmax'), dict(pretrained=False), dict(stats='imagenet'),
                                    dict(model=xray)], ids=str)
def test_every_choice_can_be_given_back(kwargs):
    c = choose_stats(700, shifted(), **kwargs)
    back = choose_stats(9, shifted(), stats=c, model=half)
    assert (back.rule, back.why, back.stats, back.scheme)==(c.rule, c.why, c.stats, c.scheme)
    t = back.table()
    assert t[t.used]['mean'].tolist()==list(c.stats.mean) and t[t.used].candidate.nunique()==1

def test_a_choice_given_back_is_checked():
    "Other channels are refused, and published numbers on a range that they are not for"
    c = choose_stats(5000, shifted())
    with pytest.raises(ValueError, match='1 channel and the custom statistics 3'): choose_stats(9, one_channel, stats=c)
    grey = choose_stats(9, RunningStats().update(torch.rand(50, 1, 8, 8)*255), model='chexzero')
    assert grey.stats.value_range==(0, 255)
    hounsfield = RunningStats().update(torch.rand(50, 1, 8, 8)*4000-1100)
    with pytest.raises(ValueError, match="run from .* chexzero's statistics are for images from 0 to 255"):
        choose_stats(9, hounsfield, stats=grey)

@pytest.mark.parametrize('kwargs', [dict(model='torchxrayvision'), dict(model='torchxrayvision', frozen=True),
                                    dict(stats='torchxrayvision'),
    dict(model='torchxrayvision', stats='pretrained'), dict(model='mnist')], ids=str)
def test_a_model_for_one_channel_on_rgb_images(kwargs):
    """Its numbers fit each channel, the network does not fit the images: said with both counts and what to do, and
    not said of grey images"""
    c = choose_stats(600, measured(), **kwargs)
    said = [w for w in c.warnings if 'the images have 3 channels and' in w]
    assert len(said)==1 and re.search('is a model for 1 channel.*load grey images.*or name the model',
                                      said[0]) and len(c.stats.mean)==3
    grey = choose_stats(600, measured(mean=M[:1], std=S[:1]), **kwargs)
    assert grey.warnings==() and len(grey.stats.mean)==1

def test_one_number_by_hand_is_for_all_channels(): assert choose_stats(600, measured(), stats=(.5, .2)).warnings==()

def test_small_and_unclear_say_how_far_and_what_to_do():
    for c in (choose_stats(100, shifted()), choose_stats(1000, with_z(2, 'mean'))):
        assert c.rule in ('small', 'unclear') and re.search(r'differ .*by 0\.\d\d σ in the mean and \d+% in the std',
            c.why) and "`stats='custom'`" in c.why

@pytest.mark.parametrize('policy', [3, None, dict(small=3)])
def test_policy_of_a_wrong_type(policy):
    with pytest.raises(TypeError, match='`policy` must be a Policy'): choose_stats(100, shifted(), policy=policy)
