"`RunningStats` and `Measured` against numpy in float64 over everything, and against the formulas written out"

import copy,json,math,pickle
from dataclasses import FrozenInstanceError

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import check_ledger as check,close,images,masks,reference,run,shares,stat_names,state
from scipy import stats as sps

from fastai_normstats import running
from fastai_normstats.moments import LEVELS
from fastai_normstats.running import OFF,POOLED,Measured,RunningStats

# --- what was counted

@pytest.mark.slow
@pytest.mark.parametrize('reads', [1, 3, 100])
def test_reading_does_not_change_the_bits(reads):
    x = images(200, 5, 5)
    rs,quiet = RunningStats(),run(x.split(1))
    for i,b in enumerate(x.split(1)):
        rs.update(b)
        if i%reads==0: rs.mean,rs.n_images,rs.quantile(.5),repr(rs)
    assert state(rs)==state(quiet)

def test_stats():
    rs = run([images(5, 9, 9)])
    pooled,image = rs.stats(),rs.stats('image')
    assert (pooled.estimator, image.estimator)==('pooled', 'image') and pooled.mean==image.mean==tuple(rs.mean.tolist())
    assert pooled.std==tuple(rs.std.tolist()) and image.std==tuple(rs.image_std.tolist())
    with pytest.raises(ValueError, match='estimator'): rs.stats('median')

# --- masks, NaN and infinity

def test_nothing_counted():
    none = torch.zeros(4, 4, dtype=torch.bool)
    rs = RunningStats().update(images(3, 4, 4), none)
    assert (rs.n_images, rs.n_pixels)==(0, 0)
    with pytest.raises(ValueError, match='no images counted'): rs.mean
    close(rs.update(images(3, 4, 4)).mean, run([images(3, 4, 4)]).mean, 1e-12)
    one = RunningStats('ignore').update(torch.cat([images(3, 4, 4)[:,:2], torch.full((3, 1, 4, 4), math.nan)], 1))
    with pytest.raises(ValueError, match='no pixel of channel 2'): one.mean
    assert 'no pixel of channel 2' in repr(one)
    assert (one.n_images, one.n_pixels)==(3, 48)

def test_ignoring_without_any_is_the_plain_count():
    x = images(10, 8, 9)
    assert state(run([x], nonfinite='ignore')).replace("'ignore'", "'error'")==state(run([x]))

def test_parts_with_gaps_merge_exactly():
    x,rng = images(20, 8, 7),np.random.default_rng(0)
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(1))<.4] = math.nan
    x[:5,2] = math.nan  # the first part may know nothing of a channel
    one,ps = run([x], nonfinite='ignore'),[run([p], nonfinite='ignore') for p in x.split([5, 4, 1, 10])]
    for order in (ps, ps[::-1], [ps[i] for i in rng.permutation(4)]):
        some = sum(order[1:], order[0])
        for k in (*stat_names, 'min', 'max'): close(getattr(some, k), getattr(one, k), 1e-12)
        close(some.quantile(POOLED), one.quantile(POOLED), 1e-7)
        assert (some.n_images, some.n_pixels)==(one.n_images, one.n_pixels)

# --- merging

def parts(x, rng):
    "`x` cut into pieces at random places, each a batch"
    cuts = sorted(rng.choice(np.arange(1, len(x)), rng.integers(0, 6), replace=False).tolist())
    return [p for p in torch.tensor_split(x, cuts)]

@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('offset', [0, 30000])
def test_merge_any_split_any_order(seed, offset):
    rng = np.random.default_rng(seed)
    x   = images(20, 8, 7, seed=seed).double()*(100 if offset else 1) + offset
    one = RunningStats().update(x)
    ps  = [run([p]) for p in parts(x, rng)]
    while len(ps)>1:  # any two, either way round, by `+` or `merge`
        a,b = (ps.pop(int(rng.integers(len(ps)))) for _ in range(2))
        ps.append(a+b if rng.random()<.5 else a.merge(b))
    for k in (*stat_names, 'min', 'max'): close(getattr(ps[0], k), getattr(one, k), 1e-12)
    assert (ps[0].n_images, ps[0].n_pixels)==(one.n_images, one.n_pixels)
    np.testing.assert_allclose(ps[0].quantile(POOLED), one.quantile(POOLED), rtol=1e-9)

def test_many_merges_do_not_drift():
    x = images(400, 3, 3)+1000
    close(run(x.split(1)).std, run([x]).std, 1e-12)

def test_merge_of_very_different_parts():
    "A black thousand and one bright image: the large shift between the parts is where a naive merge loses digits"
    a,b = images(1000, 2, 2)*1e-3,images(1, 2, 2)+5e4
    for ps in ([a, b], [b, a]): check(run(ps), [a, b])

def sized(seed=0): return [images(1, h, w, seed=seed+i) for i,
                           (h,w) in enumerate([(4, 5), (20, 10), (7, 7), (40, 3), (1, 2), (16, 16)])]

def test_images_of_different_sizes():
    "Pixel-weighted moments, and standard errors of a ratio of two sums"
    check(run(sized()), sized())
    rs,back = run(sized()),run(sized()[::-1])
    for k in stat_names: close(getattr(rs, k), getattr(back, k), 1e-12)
    assert rs.n_pixels==sum(b[0,0].numel() for b in sized())

def test_plus_leaves_both_alone():
    a,b = run([images(3, 4, 4)]),run([images(2, 4, 4, seed=1)])
    was = state(a),state(b)
    s = a+b
    s.update(images(1, 4, 4))
    assert (state(a), state(b))==was

def test_merge_does_not_share_memory():
    a,b = RunningStats(),run([images(3, 4, 4)])
    was = state(b)
    a.merge(b).update(images(2, 4, 4, seed=1))
    assert state(b)==was

def test_merge_with_empty():
    rs,want = run([images(3, 4, 4)]),state(run([images(3, 4, 4)]))
    assert state(rs+RunningStats())==state(RunningStats()+rs)==state(rs.merge(RunningStats()))==want
    assert (RunningStats()+RunningStats()).n_images==0

def test_merge_with_itself_counts_twice():
    x,rs = images(4, 5, 5),run([images(4, 5, 5)])
    rs.merge(rs)
    check(rs, [x, x])

# --- standard errors

def test_se_formulas_for_images_of_one_size():
    "SE(mean) = SD of image means / √n; SE(std) = SD(q) / (2 std √n)"
    x = images(12, 6, 6)
    a,rs,n = x.double().numpy(),run(x.split(5)),12
    mean,std = a.mean((0,2,3)),a.std((0,2,3))
    q = ((a-mean[:,None,None])**2).mean((2,3))
    close(rs.mean_se, a.mean((2,3)).std(0, ddof=1)/np.sqrt(n), 2e-7)
    close(rs.std_se,  q.std(0, ddof=1)/(2*std*np.sqrt(n)), 2e-7)
    close(rs.image_std_se, a.std((2,3)).std(0, ddof=1)/np.sqrt(n), 2e-7)

def test_se_is_the_spread_over_samples():
    "The scatter of the estimates over 400 independent samples is what the standard errors say"
    rs = [run([images(60, 3, 3, seed=i, c=1)]) for i in range(400)]
    for k in ('mean', 'std', 'image_std'):
        scatter = torch.cat([getattr(r, k) for r in rs]).std()
        claimed = torch.cat([getattr(r, f'{k}_se') for r in rs]).square().mean().sqrt()
        assert .88<claimed/scatter<1.12, (k, claimed, scatter)

def test_single_image_has_no_se():
    rs = run([images(1, 8, 8)])
    for k in ('mean_se', 'std_se', 'image_std_se'): assert getattr(rs, k).isnan().all() and getattr(rs, k).shape==(3,)

# --- groups

def families(sizes, shapes=((6, 7),), seed=0, c=2):
    """Batches of one shape, a group of each image; groups of `sizes` images resemble each other, and their images lie
    apart"""
    g = torch.Generator().manual_seed(seed)
    of = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes)).tolist()
    grey = torch.rand(len(sizes), c, 1, 1, generator=g)
    def of_one(i, shape): return grey[of[i]]+.2*torch.randn(c, 1, 1, generator=g)+torch.rand(c, *shape,
        generator=g).double()*(.2+grey[of[i]])
    return [of_one(i, shapes[i%len(shapes)])[None] for i in range(len(of))],of

def count(ims, of, **kwargs):
    rs = RunningStats(**kwargs)
    for x,g in zip(ims, of): rs.update(x, groups=[g])
    return rs

se_names = ('mean_se', 'std_se', 'image_std_se')

@pytest.mark.parametrize('sizes', [[4]*6, [1, 2, 3, 7, 19], [1]*8, [30, 1, 1]], ids=str)
@pytest.mark.parametrize('shapes', [[(6, 7)], [(6, 7), (1, 3), (20, 11)]], ids=str)
def test_standard_errors_take_the_group_as_the_unit(sizes, shapes):
    ims,of = families(sizes, shapes)
    rs,ref = count(ims, of),reference(ims, of)
    for k in (*stat_names, 'min', 'max'): close(getattr(rs, k), ref[k], 1e-9)
    assert (rs.n_images, rs.n_groups, rs.grouped)==(sum(sizes), len(sizes), True)
    alone = reference(ims)
    effect = np.maximum(*((ref[k]/alone[k])**2 for k in ('mean_se', 'std_se')))
    close(rs.design_effect, effect, 1e-9), close(rs.n_effective, sum(sizes)/effect.max(), 1e-9)

@pytest.mark.parametrize('offset', [0, 30000])
def test_standard_errors_of_masked_groups(offset):
    "Images count with the pixels that their masks leave, which makes groups of one size unequal"
    ims,of = families([3, 9, 1, 5, 2])
    x = torch.cat(ims)+offset
    m = masks(x)
    keep = [i for i in range(len(x)) if m[i].any()]
    counted = [x[i][:,m[i,0]][None] for i in keep]
    ref = reference(counted, [of[i] for i in keep])
    rs = RunningStats().update(x[:9], m[:9], groups=of[:9]).update(x[9:], m[9:], groups=of[9:])
    for k in stat_names: close(getattr(rs, k), ref[k], 1e-9)

def test_standard_errors_where_channels_have_different_pixels():
    x,of = images(14, 8, 9).double(),[0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 4, 5, 5, 6]
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(3))<.3] = math.nan
    x[4:6,1] = math.nan  # a group that has nothing in a channel is no group there
    rs = RunningStats('ignore').update(x, groups=of)
    for c in range(3):
        keep = [i for i in range(14) if x[i,c].isfinite().any()]
        ref = reference([x[i,c][x[i,c].isfinite()].view(1, 1, -1) for i in keep], [of[i] for i in keep])
        for k in stat_names: close(getattr(rs, k)[c:c+1], ref[k], 1e-9)

def test_families_of_copies_are_worth_their_number():
    "Four copies of each of 12 images say what the 12 say"
    x = images(12, 5, 5)
    rs,one = RunningStats().update(x.repeat(4, 1, 1, 1), groups=[*range(12)]*4),run([x])
    for k in stat_names: close(getattr(rs, k), getattr(one, k), 1e-12)
    close(rs.design_effect, [4*47/(4*11)]*3, 1e-12)  # 48 images over 12, and n-1 of each
    assert rs.n_effective==pytest.approx(48*11/47, rel=1e-12)

def test_without_groups_each_image_is_one():
    ims,_ = families([1]*9)
    rs,named = run(ims),count(ims, [f'patient {i}' for i in range(9)])
    for k in stat_names: close(getattr(rs, k), getattr(named, k), 0)
    assert rs.design_effect.tolist()==named.design_effect.tolist()==[1, 1] and rs.n_effective==9
    assert (rs.n_groups, named.n_groups, rs.grouped, named.grouped)==(9, 9, False, True)

def test_some_images_without_a_group():
    "`None` in place of a group: the image's own, whatever the others are called"
    ims,_ = families([1]*6)
    rs = count(ims, ['a', None, 'a', None, '1', '3'])
    ref = reference(ims, ['a', 'x', 'a', 'y', '1', '3'])
    for k in se_names: close(getattr(rs, k), ref[k], 1e-9)
    assert rs.n_groups==5

def test_one_group_says_nothing_of_its_like():
    ims,_ = families([1]*5)
    rs = count(ims, [7]*5)
    for k in se_names: assert getattr(rs, k).shape==(2,) and getattr(rs, k).isnan().all()
    assert all(h.isnan().all() for h in rs.half_widths())
    assert rs.design_effect.tolist()==[5, 5] and rs.n_effective==1 and rs.n_groups==1
    m = rs.measured()
    assert m.mean_se.isnan().all() and Measured.from_dict(json.loads(json.dumps(m.to_dict())))==m

@pytest.mark.parametrize('named', [lambda g: g, lambda g: [str(o) for o in g], lambda g: torch.tensor(g),
    lambda g: np.array(g), lambda g: tuple(g),
    lambda g: pd.Series(g, index=range(5, 5+len(g))), lambda g: [np.int64(o) for o in g],
    lambda g: list(torch.tensor(g))],
    ids=['ints', 'strings', 'tensor', 'array', 'tuple', 'series', 'numpy ints', 'tensors'])
def test_groups_of_any_kind(named):
    "And of different kinds from batch to batch"
    x,of = images(12, 4, 4),[3, 3, 0, 1, 10, 10, 10, 1, 2, 2, 2, 3]
    want = RunningStats().update(x, groups=of)
    rs = RunningStats().update(x[:5], groups=of[:5]).update(x[5:], groups=named(of[5:]))
    for k in se_names: assert torch.equal(getattr(rs, k), getattr(want, k))
    assert rs.n_groups==5

@pytest.mark.parametrize('kwargs,match', [(dict(groups=['a']*4),
    '`groups` must hold one value for each of the 3 images.*got 4'),
    (dict(items=['a']), '`items` must hold one value for each of the 3 images.*got 1'),
    (dict(groups=[]), '`groups` .* got 0'),
    (dict(items=torch.arange(4)), '`items` .* got 4'), (dict(groups=7), '`groups` .* got 1'),
    (dict(groups=torch.tensor(7)), '`groups` .* got 1'), (dict(groups='abc'), '`groups` .* got 1')], ids=str)
def test_refused_names_change_nothing(kwargs, match):
    rs = run([images(5, 4, 4)])
    was = state(rs)
    with pytest.raises(ValueError, match=match) as e: rs.update(images(3, 4, 4), **kwargs)
    assert state(rs)==was and '\n' not in str(e.value)

@pytest.mark.parametrize('kwargs', [dict(items=['a']*4, groups=['g']*5), dict(items=['a']*5, groups=[])], ids=str)
def test_refused_labels(kwargs):
    with pytest.raises(ValueError, match='one value for each of the 5 images, got'): run([images(5, 4,
        4)]).labelled(**kwargs)

# --- names, and the same bits over any split

def named(ims, names, of=None): return [RunningStats('ignore').update(x, items=[k], groups=None if of is None else [g])
                                        for x,k,g in zip(ims, names, of or names)]

@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('names', [lambda i: f'im{(i*7)%23:03}.png', lambda i: (i*7)%23, lambda i: (f'vol{i%4}', i//4),
    lambda i: str(i) if i%2 else i],
    ids=['files', 'numbers', 'pairs', 'mixed'])
def test_named_images_give_the_same_bits_over_any_split(names, seed):
    "Not close: equal, quantiles and standard errors too, on any number of processes and in any order of merging"
    x = images(23, 6, 7, seed=9)*torch.linspace(.1, 300, 23).view(-1, 1, 1, 1)
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(1))<.2] = math.nan
    keys,of,rng = [names(i) for i in range(23)],[f'p{i%6}' for i in range(23)],np.random.default_rng(seed)
    want = state(sum(named(x.split(1), keys, of), RunningStats('ignore')))
    order = rng.permutation(23)
    ps = []
    # five processes, each with batches of its own
    for chunk in np.split(order, np.sort(rng.choice(np.arange(1, 23), 4, replace=False))):
        rs = RunningStats('ignore')
        for idxs in np.array_split(chunk, rng.integers(1, 4)):
            if len(idxs): rs.update(x[idxs], items=[keys[i] for i in idxs], groups=[of[i] for i in idxs])
        ps.append(rs)
    while len(ps)>1:
        a,b = (ps.pop(int(rng.integers(len(ps)))) for _ in range(2))
        ps.append(a+b if rng.random()<.5 else a.merge(b))
    assert state(ps[0])==want and ps[0].measured()==sum(named(x.split(1), keys, of), RunningStats('ignore')).measured()

def test_images_of_one_item_stay_together():
    """Items that give several images each, read by different processes: each item is one's own, and its images keep
    their order"""
    x,keys = images(8, 5, 5, seed=2),['b', 'b', 'a', 'a', 'd', 'd', 'c', 'c']
    ps = [RunningStats().update(x[i:i+2], items=keys[i:i+2], groups=keys[i:i+2]) for i in range(0, 8, 2)]
    want = state(RunningStats().update(x[[2, 3, 0, 1, 6, 7, 4, 5]], items=[*'aabbccdd'], groups=[*'aabbccdd']))
    for seed in range(5): assert state(sum((ps[i] for i in np.random.default_rng(seed).permutation(4)),
        RunningStats()))==want

def test_take_and_labelled():
    x,of = images(8, 5, 5),[0, 0, 1, 1, 2, 2, 3, 3]
    rs = RunningStats().update(x, items=[f'{i}.png' for i in range(8)], groups=of)
    was = state(rs)
    some = rs.take([6, 1, 3])
    assert state(some)==state(RunningStats().update(x[[6, 1, 3]], items=['6.png', '1.png', '3.png'], groups=[3, 0, 1]))
    new = some.labelled(['x', 'y', 'z'], [None, 'p', 'p'])
    assert state(new)==state(RunningStats().update(x[[6, 1, 3]], items=['x', 'y', 'z'], groups=[None, 'p', 'p']))
    assert state(rs)==was and state(some)!=state(new)
    assert rs.take([]).n_images==0

# --- the table

def test_images_is_the_table():
    x,m = images(5, 6, 6, c=2),torch.ones(5, 1, 6, 6, dtype=torch.bool)
    m[1,0,:3],m[3] = False,False
    rs = RunningStats().update(x[:2], m[:2], items=['a', 'b'], groups=['p', 'q']).update(x[2:], m[2:])
    df = rs.images
    assert list(df)==['item', 'group', 'n_pixels', 'mean_0', 'std_0', 'min_0', 'max_0', 'mean_1', 'std_1', 'min_1',
        'max_1']
    assert df.item.tolist()==['a', 'b', 2, 3, 4] and df.group.tolist()==['p', 'q', 2, 3,
        4] and df.n_pixels.tolist()==[36, 18, 36, 0, 36]
    a = x.double().numpy()
    for i in (0, 1, 2, 4):
        for c in range(2):
            v = a[i,c][m[i,0].numpy()]
            close(df.loc[i, [f'mean_{c}', f'std_{c}', f'min_{c}', f'max_{c}']].tolist(),
                [v.mean(), v.std(), v.min(), v.max()], 1e-12)
    assert df.iloc[3, 3:].isna().all() and (rs.n_images, rs.n_groups)==(4, 4)
    df.mean_0 = 0  # a copy
    assert rs.images.mean_0[0]!=0

def test_rows_without_a_counted_pixel_change_no_number():
    ims,of = families([3, 2, 4, 1])
    x,none = torch.cat(ims),torch.zeros(6, 7, dtype=torch.bool)
    rs = RunningStats().update(x[:4], groups=of[:4]).update(x[:3], none,
        groups=[of[0], 'gone', 'gone too']).update(x[4:], groups=of[4:])
    want = RunningStats().update(x, groups=of)
    for k in (*stat_names, 'min', 'max', 'design_effect'): close(getattr(rs, k), getattr(want, k), 1e-12)
    assert torch.equal(rs.quantile(POOLED), want.quantile(POOLED))
    assert (rs.n_images, rs.n_groups, rs.n_pixels, rs.n_effective)==(10, 4, want.n_pixels,
        pytest.approx(want.n_effective, rel=1e-12))
    a,b = rs.measured(),want.measured()
    for k in ('mean_spread', 'std_spread', 'mean_off', 'std_off'): close(getattr(a, k), getattr(b, k), 1e-11)
    assert a.group_size==b.group_size and len(rs.images)==13 and len(rs.unusual(100))==13

def test_merge_does_not_forget_what_a_pass_said():
    a,b = run([images(3, 4, 4)]),run([images(2, 4, 4)])
    for o in (a, b): o.image_size,o.unit = [4, 4],'patient'
    assert (a+b).unit=='patient' and (a+b).image_size==[4, 4]
    b.image_size = [8, 8]
    assert (a+b).image_size is None and a.image_size==[4, 4]
    assert (RunningStats()+a).image_size==[4, 4]

# --- unusual images

@pytest.mark.parametrize('grouped', [False, True])
def test_influence_is_that_of_leaving_the_group_out(grouped):
    ims,of = families([3, 1, 6, 2, 4], [(6, 7), (3, 3)])
    ims[5] = ims[5]*8
    of = of if grouped else [*range(16)]
    rs,names = RunningStats(),[f'im{i:02}' for i in range(16)]
    for x,k,g in zip(ims, names, of): rs.update(x, items=[k], groups=[g] if grouped else None)
    ref,want = reference(ims),{}
    for k,g in zip(names, of):
        left = reference([x for x,o in zip(ims, of) if o!=g])
        want[k] = max((np.abs(left[s]-ref[s])/ref['std']).max() for s in ('mean', 'std'))
    df = rs.unusual(16)
    close(df.influence, [want[k] for k in df.item], 1e-9)
    assert (df.influence.diff().dropna()<=0).all()
    assert list(df)==['item', 'group', 'influence', 'z', *rs.images.columns[2:]]
    assert rs.unusual(3).equals(df[:3]) and len(rs.unusual())==10
    if not grouped: assert df.item[0]=='im05'

def test_z_is_robust():
    x = images(31, 6, 6)
    x[4] = x[4]*50
    a = x.double().numpy()
    def z(v): return np.abs(v-np.median(v, 0))/(1.4826*np.median(np.abs(v-np.median(v, 0)), 0))
    want = np.maximum(z(a.mean((2,3))), z(a.std((2,3)))).max(1)
    df = run(x.split(4)).unusual(31)
    close(df.z, want[df.item.tolist()], 1e-9)
    assert df.item[0]==4 and df.z[0]>8

def test_unusual_where_there_is_no_spread():
    assert run([torch.full((4, 2, 5, 5), .3)]).unusual()[['influence', 'z']].eq(0).all(None)
    df = run([torch.cat([torch.full((9, 1, 5, 5), .3), torch.full((1, 1, 5, 5), .4)])]).unusual()
    assert (df.item[0], df.z[0])==(9, math.inf) and df.z[1:].eq(0).all()  # all others are equal to the bit
    one = run([images(1, 5, 5)]).unusual()  # nothing is left without it
    assert len(one)==1 and one.influence.isna().all()
    with pytest.raises(ValueError, match='no images'): RunningStats().unusual()

# --- quantiles of all pixels

def off_by(rs, x):
    """By how much the share of the pixels below a quantile differs from the one asked for, at most over channels and
    levels"""
    res,qs = 0.,np.array([q for q in POOLED if 0<q<1])
    for c,got in enumerate(rs.quantile(qs).T.numpy()):
        below,upto = shares(x[:,c].double().numpy(), got)
        res = max(res, np.maximum(below-qs, qs-upto).max())
    return res

# .05: an image's own pixels may lie anywhere between two of its levels, so a share can be off by so much and no more
widest = max(np.diff(LEVELS))

@pytest.mark.parametrize('seed', range(3))
def test_quantiles_of_many_images_are_numpys(seed):
    """Where pixels lie within a level of an image averages out over images: 40 images of 20 pixels a level leave a
    share of ±.001"""
    x,qs = images(40, 20, 20, seed=seed),[0, .005, .25, .5, .9, .995, 1]
    rs = run(x.split(9))
    got,want = rs.quantile(qs),np.quantile(x.double().numpy(), qs, axis=(0, 2, 3))
    assert got.shape==(7, 3) and got.dtype==torch.float64
    assert off_by(rs, x)<.004
    np.testing.assert_allclose(got, want, rtol=0, atol=.004)
    assert (rs.quantile(POOLED).diff(dim=0)>=0).all()
    close(got[0], rs.min, 0), close(got[-1], rs.max, 0)
    close(rs.quantile(.25), got[2], 0)
    m = rs.measured()
    for q in (POOLED, .25, [0, .005, 1]): assert torch.equal(m.quantile(q), rs.quantile(q))
    np.testing.assert_allclose(m.quantile([.333, .777, .0007]), rs.quantile([.333, .777, .0007]), rtol=0, atol=.004)

def test_images_count_with_their_pixels():
    "A hundred small dark images and one large bright one of as many pixels: half of everything is bright"
    rs = run([images(100, 3, 3)*.1, images(1, 30, 30)*.1+10])
    assert (rs.quantile(.49)<1).all() and (rs.quantile(.51)>9).all()

def test_black_backgrounds():
    "A share of each image is exactly 0; the quantile is exactly 0 for as much of it as fills whole levels"
    x = images(60, 20, 20)*.7+.2
    black = torch.rand(60, 1, 20, 20, generator=torch.Generator().manual_seed(1))<torch.linspace(.2, .9, 60).view(-1,
        1, 1, 1)
    x = x.masked_fill(black, 0)
    rs,dark = run(x.split(9)),black.double().mean().item()
    assert off_by(rs, x)<=widest
    assert (rs.quantile(np.linspace(0, dark-widest, 20))==0).all()
    for q in (dark+.02, .8, .95, .999): np.testing.assert_allclose(rs.quantile(q),
        np.quantile(x.double().numpy(), q, axis=(0, 2, 3)), rtol=0, atol=.02)
    d = rs.density([0, 1e-6, .2, 1])*torch.tensor([1e-6, .2-1e-6, .8])
    assert ((d[:,0]>dark-widest) & (d[:,0]<=dark+1e-9)).all()
    assert (d[:,1]<=widest).all()  # between 0 and the darkest other pixel there is none: what of a level was left
    # steps of a thousandth of the range are sums of large slopes
    np.testing.assert_allclose(d.sum(1), [1]*3, rtol=0, atol=1e-7)

def test_jumps_of_two_valued_images():
    """Half 0 and half 1: all up to the level before the jump is 0, all from the level after it 1 (two pixels alone
    would be a ramp, as numpy has it)"""
    halves = torch.tensor([0., 1]).repeat(200).view(1, 1, 20, 20).repeat(5, 2, 1, 1)
    for x in (halves, (halves*255).to(torch.uint8)/255, torch.cat([halves*0, halves*0+1])):
        rs = run([x])
        assert (rs.quantile([0, .2, .4, .449])==0).all() and (rs.quantile([.551, .6, .9, 1])==1).all()
        assert torch.equal(rs.measured().quantile([.4, .6]), rs.quantile([.4, .6]))
    for share in (.1, .25, .5, .9, .99):  # documents of different ink
        x = (torch.rand(50, 1, 30, 30, generator=torch.Generator().manual_seed(0))<share).float()
        rs = run(x.split(7))
        assert rs.quantile(max(0, 1-x.mean().item()-widest)).item()==0 and rs.quantile(min(1,
            1-x.mean().item()+widest)).item()==1
        assert off_by(rs, x)<=widest

def test_constant_images_of_different_values():
    "A mixture of jumps: every quantile is one of the values, exactly"
    v = torch.tensor([.1, .9, .3, .3, .7, 0, 200, -5, .25, .65], dtype=torch.float64)
    rs = run([v.view(-1, 1, 1, 1).expand(-1, 1, 4, 4)])
    qs = [.03, .15, .22, .35, .45, .55, .64, .78, .87, .95]
    assert rs.quantile(qs)[:,0].tolist()==np.quantile(v.numpy(), qs, method='inverted_cdf').tolist()

def test_quantile_of_a_constant(): close(run([torch.full((2, 2, 5, 5), .3)]).quantile([0, .5, 1]),
                                         np.float64(np.float32(.3))*np.ones((3, 2)), 0)

@pytest.mark.parametrize('v', [0., .1, 1e-45, 1e-42, 30000.1, 1e6, 1e30, -1e30, 3e38], ids=str)
@pytest.mark.parametrize('side', [5, 40])
def test_constants_of_any_size(v, side):
    x = torch.full((6, 1, side, side), v)
    rs,want = run(x.split(4)),x[0,0,0,0].double().item()
    assert rs.quantile(POOLED).eq(want).all() and (rs.std.item(), rs.min.item(), rs.max.item())==(0, want, want)
    assert rs.density([want-abs(want)-1e-50, want, want+abs(want)+1e-50]).isfinite().all()

@pytest.mark.parametrize('side', [10, 40])
@pytest.mark.parametrize('dtype,scale,offset', [(torch.float32, 1e-42, 0), (torch.float32, 1e30, 0),
    (torch.float32, 3e38, 0), (torch.float32, 1, 1e6),
    (torch.float64, 1e-100, 0), (torch.float64, 1e100, 0), (torch.float64, 1, 1e9), (torch.float64, 1e-3, -1e6),
    (torch.float16, 1, 0), (torch.bfloat16, 1, 0),
    (torch.float16, 60000, 0), (torch.uint8, 255, 0), (torch.int32, 2e9, -1e9), (torch.uint16, 65535, 0)], ids=str)
def test_quantiles_of_values_of_any_size(dtype, scale, offset, side):
    """As for ordinary values, to a hundredth of the range and a step of the type: nothing overflows, and digits that
    the values have are kept"""
    x = (images(40, side, side, c=1).double()*scale+offset).to(dtype)
    rs,v = run(x.split(7)),x.double().numpy()
    step = np.diff(np.unique(v)).min()/scale
    qs = np.array([q for q in POOLED if .005<=q<=.995])  # further out 256 pixels of an image know little
    np.testing.assert_allclose((rs.quantile(qs)[:,0].numpy()-offset)/scale, (np.quantile(v, qs)-offset)/scale, rtol=0,
        atol=.01+step)
    assert off_by(rs, x)<widest
    close(rs.quantile([0, 1])[:,0], [x.double().min(), x.double().max()], 0)
    assert rs.measured().quantiles.isfinite().all()
    ref = reference([(x.double()-offset)/scale])
    for k in ('mean_se', 'std_se'): close(getattr(rs, k)/scale, ref[k], 1e-5)

@pytest.mark.parametrize('factor', [10, 1e6, 1e12])
def test_far_off_values_do_not_blur_the_others(factor):
    "One broken image of 500, in other units; steps below 1e-9 of all values are jumps, which averages out"
    x = images(500, 10, 10, c=1)
    x[77] *= factor
    rs,qs = run(x.split(100)),[.01, .25, .5, .75, .99]
    below,upto = shares(x.double().numpy(), rs.quantile(qs)[:,0].numpy())
    assert (below<=np.array(qs)+.004).all() and (upto>=np.array(qs)-.004).all()
    assert rs.quantile(1).item()==x.max().item()

def test_quantiles_of_many_channels():
    x = torch.rand(4, 400, 40, 30, generator=torch.Generator().manual_seed(0))+torch.arange(400).view(-1, 1, 1)
    got = run([x]).quantile([.25, .5])
    np.testing.assert_allclose(got[:,[0, 7, 399]], np.quantile(x.double().numpy(), [.25, .5], axis=(0, 2, 3))[:,
        [0, 7, 399]], rtol=0, atol=.1)

@pytest.mark.parametrize('q', [-.1, 1.1, math.nan, [[.5]], [0, 2], 'half', None, ['a']], ids=str)
def test_refused_quantiles(q):
    for o in (run([images(3, 4, 4)]), run([images(3, 4, 4)]).measured()):
        with pytest.raises(ValueError, match='`q` must lie between 0 and 1'): o.quantile(q)

# --- density

@pytest.mark.parametrize('edges', [np.linspace(0, 1, 9), np.linspace(-2, 5, 30), [.25, .3, .75], [-1, 0], [.5, 2],
    [5, 6]], ids=lambda e: f'{len(e)} from {e[0]}')
def test_density_is_numpys(edges):
    "Per bin to a share of .008, twice what a share is off by, and in all the share inside the edges"
    x = images(40, 20, 20)
    x[0,0,0,0] = 0
    rs = run(x.split(9))
    for o in (rs, rs.measured()):
        got = o.density(edges)
        assert got.shape==(3, len(edges)-1) and got.dtype==torch.float64 and (got>=-1e-12).all()
        for c in range(3):
            n = np.histogram(x[:,c].double().numpy(), edges)[0]/x[:,c].numel()
            np.testing.assert_allclose(got[c]*np.diff(edges), n, rtol=0, atol=.008)
            assert abs((got[c]*np.diff(edges)).sum().item()-n.sum())<.008

def test_density_of_everything_is_1():
    x = torch.cat([images(20, 9, 9), torch.zeros(3, 3, 9, 9), torch.full((2, 3, 9, 9), 7.)])
    rs = run([x])
    for lo,hi in ((0, 7), (-1, 8), (-1e9, 1e9)):  # edges on the ends of the values, and beyond
        edges = np.linspace(lo, hi, 12)
        for o in (rs, rs.measured()):
            np.testing.assert_allclose((o.density(edges)*torch.tensor(np.diff(edges))).sum(1), [1]*3, rtol=0, atol=1e-7)

def test_an_edge_belongs_to_the_bin_above():
    "As numpy has it; the last bin holds its upper edge"
    x = torch.tensor([0., 1, 1, 2, 2, 2, 3, 3]).view(8, 1, 1, 1)
    rs = run([x])
    for edges in ([0, 1, 2, 3], [1, 2], [0, .5, 3.5], [-1, 0], [3, 4]):
        want = np.histogram(x.numpy(), edges)[0]/8/np.diff(edges)
        np.testing.assert_allclose(rs.density(edges)[0], want, rtol=0, atol=1e-12)

@pytest.mark.parametrize('edges', [[1], [], [1, 1], [2, 1], [0, math.nan], [[0, 1]], [0, math.inf], [-math.inf, 0],
    'ab', None, 3], ids=str)
def test_refused_edges(edges):
    for o in (run([images(3, 4, 4)]), run([images(3, 4, 4)]).measured()):
        with pytest.raises(ValueError, match='`edges` must be'): o.density(edges)

# --- how many rows keep quantiles

def test_the_first_rows_keep_quantiles_and_all_keep_moments(monkeypatch):
    monkeypatch.setattr(running, 'most_quantiles', 10)
    x = torch.cat([images(10, 5, 5), images(15, 5, 5, seed=1)+100])
    qs = [.1, .5, .9]
    def same(rs, first, all_of, k=10):
        assert torch.equal(rs.quantile(qs), run([first]).quantile(qs))
        close(rs.quantile([0, 1]), torch.stack([all_of.double().amin((0,2,3)), all_of.double().amax((0,2,3))]), 0)
        check(rs, [all_of])
        assert len(pickle.dumps(rs))<4*29*8*3*k+400*len(all_of)+5000
    for bs in (1, 4, 10, 25): same(run(x.split(bs)), x[:10], x)
    a,b = run(x[:7].split(3)),run(x[7:].split(4))
    same(a+b, x[:10], x)
    names = [f'{i:02}' for i in range(25)]
    odd,even = (RunningStats().update(x[i::2], items=names[i::2]) for i in (1, 0))  # two processes
    same(odd+even, x[:10], x), same(even+odd, x[:10], x)
    with pytest.raises(ValueError, match='among the first 10'):
        RunningStats().update(x[:10], torch.zeros(5, 5, dtype=torch.bool)).update(x[10:]).quantile(.5)

@pytest.mark.slow
def test_memory_is_that_of_the_rows(monkeypatch):
    """What waits is written into the table now and then, and beyond the first 20,000 rows (here 100) an image takes a
    few numbers"""
    monkeypatch.setattr(running, 'most_quantiles', 100)
    def size(n):
        rs = run(images(n, 4, 4).split(1))
        return len(pickle.dumps(rs))
    a,b,c = size(512),size(1024),size(1536)
    assert (c-b)/512<400 and (b-a)/512<400  # 15 moments of 8 bytes, and what names it

# --- intervals

def t95(n): return sps.t.ppf(.975, n-1)

@pytest.mark.parametrize('n,edge', [(2, 12.706), (60, 2.001), (199, 1.972), (200, 1.96), (300, 1.96)])
def test_half_widths(n, edge):
    "Student's t below 200 images, and nothing to be wrong about where all were read"
    rs,tables = run([images(n, 3, 3)]),edge
    edge = 1.96 if n>=200 else t95(n)
    assert edge==pytest.approx(tables, abs=5e-4)
    for o in (rs, rs.measured()):
        for got,se in zip(o.half_widths(), (rs.mean_se, rs.std_se)): close(got, edge*se, 1e-9)  # of images in general
    rs.population = n
    for got,se in zip(rs.half_widths(), (rs.mean_se, rs.std_se)): close(got, 0*se, 0)         # of all there are
    rs.complete,rs.population = False,n+40
    for o in (rs, rs.measured()):
        for got,se in zip(o.half_widths(), (rs.mean_se, rs.std_se)): close(got, edge*se*np.sqrt(40/(n+40)), 1e-9)

def test_half_widths_of_groups():
    "Groups are what is drawn: t of their number, and the share of them that is left"
    ims,of = families([1, 4, 2, 7, 3, 5, 2, 2])
    rs,ref = count(ims, of),reference(ims, of)
    def of_them(left):
        for o in (rs, rs.measured()):
            for got,k in zip(o.half_widths(), ('mean_se', 'std_se')): close(got, t95(8)*ref[k]*np.sqrt(left), 1e-9)
    of_them(1)
    rs.complete,rs.population = False,100
    of_them(1)  # nobody said how many groups there are
    rs.population_groups = 20
    of_them(12/20)
    rs.complete = True
    of_them(0)

def test_merged_with_a_part():
    "Images whose number nobody stated are a population of their own"
    all_of,part = run([images(16, 5, 5)]),run([images(16, 5, 5, seed=1)])
    part.complete,part.population = False,20
    both = all_of+part
    assert (both.complete, both.population, both.n_images)==(False, 36, 32)
    for got,se in zip(both.half_widths(), (both.mean_se, both.std_se)): close(got, t95(32)*se*np.sqrt(1-32/36), 1e-9)
    assert (run([images(2, 3, 3)])+run([images(2, 3, 3)])).population is None

def test_merged_parts_of_groups():
    (ims,of),(more,others) = families([3, 1, 2]),families([2, 2, 5], seed=1)
    a,b = count(ims, of),count(more, [f'other {g}' for g in others])
    a.complete,a.population,a.population_groups = False,60,30
    both = a+b
    assert (both.population, both.population_groups, both.n_groups)==(69, 33, 6)

# --- the summary

def summary(**kwargs):
    ims,of = families([3, 2, 4, 1, 2], [(6, 7), (4, 4)])
    rs = count(ims, of)
    for k,v in kwargs.items(): setattr(rs, k, v)
    return rs,ims,of

def test_measured_says_what_the_ledger_says():
    rs,ims,of = summary(complete=False, population=100, population_groups=40, image_size=[6, 7], unit='patient')
    m = rs.measured()
    for k in (*stat_names, 'min', 'max', 'design_effect'): assert torch.equal(getattr(m, k), getattr(rs, k))
    for k in ('n_images', 'n_pixels', 'n_groups', 'n_channels', 'grouped', 'complete', 'population',
        'population_groups', 'image_size', 'unit', 'value_range', 'n_effective'):
        assert getattr(m, k)==getattr(rs, k), k
    assert all(torch.equal(a, b) for a,b in zip(m.half_widths(), rs.half_widths()))
    assert m.stats()==rs.stats() and m.stats('image')==rs.stats('image') and m.measured() is m
    assert '12 of 100 images of 5 patients' in repr(m) and '12 of 100 images of 5 patients' in repr(rs)
    with pytest.raises(FrozenInstanceError): m.n_images = 3
    assert m==rs.measured() and hash(m)==hash(rs.measured()) and m!=summary()[0].measured() and m!=3

def test_spread_between_images():
    "What each image adds to mean and std, in units of an average image: its std and quantiles over images"
    rs,ims,of = summary()
    m,ref = rs.measured(),reference(ims)
    w = np.array([x[0,0].numel() for x in ims])[:,None]
    a = [x[0].double().flatten(1).numpy() for x in ims]
    of_mean = np.array([(v-ref['mean'][:,None]).sum(1) for v in a])/w.mean()
    of_var  = np.array([((v-ref['mean'][:,None])**2).sum(1) for v in a])/w.mean()-w/w.mean()*ref['std']**2
    for y,k in ((of_mean, 'mean'), (of_var/(2*ref['std']), 'std')):
        close(getattr(m, f'{k}_spread'), y.std(0, ddof=1), 1e-9)
    for k,y in dict(mean_off=of_mean, std_off=of_var/(2*ref['std'])).items(): close(getattr(m, k),
        np.quantile(y, OFF, axis=0), 1e-9)
    assert m.group_size==sum(o**2 for o in (3, 2, 4, 1, 2))/12
    alone = run(ims)  # of n independent ones the mean is known to the spread over √n
    close(alone.measured().mean_spread/np.sqrt(12), alone.mean_se,
        1e-9), close(alone.measured().std_spread/np.sqrt(12), alone.std_se, 1e-9)
    one = run(ims[:1]).measured()
    assert one.mean_spread.isnan().all() and one.std_spread.isnan().all() and one.mean_off.abs().max()<1e-12

def test_measured_survives_json_bit_by_bit():
    rs,*_ = summary(complete=False, population=100, population_groups=40, image_size=[6, 7], unit='patient')
    hole = images(7, 9, 9)
    hole[torch.rand(hole.shape, generator=torch.Generator().manual_seed(1))<.4] = math.nan
    for o in (rs, run([hole], nonfinite='ignore'), run([images(1, 4, 4)]), run([torch.full((3, 2, 7, 7), .1)]),
        run([images(9, 4, 4)*1e30]), run([images(9, 4, 4)*1e-42])):
        m = o.measured()
        text = json.dumps(m.to_dict(), allow_nan=False)
        back = Measured.from_dict(json.loads(text))
        assert back==m and json.dumps(back.to_dict())==text
        for k,v in vars(m).items():
            if isinstance(v, torch.Tensor): assert torch.equal(v.nan_to_num(7.5),
                getattr(back, k).nan_to_num(7.5)) and getattr(back, k).dtype==torch.float64
    assert len(text)<40_000

def fails(d, match):
    with pytest.raises(ValueError, match=match) as e: Measured.from_dict(d)
    assert '\n' not in str(e.value) and len(str(e.value))<1000

@pytest.mark.parametrize('d', [None, [], 3, 'abc', {}, dict(bins=3), {1: 2}, {'a'*300_000: 1},
    dict(state={}, bins=256, value_range=[0, 1])], ids=lambda o: repr(o)[:20])
def test_measured_from_foreign_dict(d): fails(d, 'Measured')

def nested(depth):
    res = []
    for _ in range(depth): res = [res]
    return res

junk = [None, 'abc', 'a'*300_000, {}, [], [[]], {'a': 1}, True, 10**400, -10**400, math.nan, math.inf, [math.inf, 0],
    ['a', 'b'], [None]*2, [1], [1, 2, 3], [[1, 2]], [[1], [2, 3]],
        [10**400, 1], [1, [2]], nested(5), nested(900)]
tensor_fields = [k for k,v in vars(summary()[0].measured()).items() if isinstance(v, torch.Tensor)]

@pytest.mark.parametrize('field', tensor_fields)
@pytest.mark.parametrize('value', junk, ids=lambda o: repr(o)[:15])
def test_damaged_numbers_are_named(field, value):
    d = summary()[0].measured().to_dict()
    # not known: one group, one image
    if value==[None]*2 and field.endswith(('_se', '_spread')): return Measured.from_dict({**d, field: value})
    # one channel or three: the next field is wrong
    fails({**d, field: value}, f"'{field}'" if not (field=='mean' and value in ([1], [1, 2, 3])) else 'Measured')

@pytest.mark.parametrize('field,value', [('std', [-.1, .1]), ('image_std', [.1, -.1]), ('mean_se', [-1., 0]),
    ('std_se', [0, -1.]), ('image_std_se', [-1, 1]),
    ('design_effect', [-1, 1]), ('design_effect', [0, 1]), ('mean_spread', [-1, 1]), ('std_spread', [-1, 1]),
    ('min', [1e9, 0]), ('max', [-1e9, 0]),
    ('quantiles', 'falling'), ('quantiles', 'short'), ('quantiles', 'nan'),
    ('mean_off', 'falling'), ('std_off', 'short'), ('mean_off', 'nan')], ids=str)
def test_impossible_numbers_are_named(field, value):
    d = summary()[0].measured().to_dict()
    if isinstance(value, str): value = dict(falling=d[field][::-1], short=d[field][1:],
        nan=[[math.nan]*2]*len(d[field]))[value]
    fails({**d, field: value}, f"'{'min' if field=='max' else field}'")

@pytest.mark.parametrize('field', ['n_images', 'n_pixels', 'n_groups', 'population', 'population_groups'])
@pytest.mark.parametrize('value', [2.5, -4, True, '3', [3], {}, 10**400, 2**63, math.nan, nested(900), 'a'*300_000],
    ids=lambda o: repr(o)[:15])
def test_damaged_counts_are_named(field, value): fails({**summary()[0].measured().to_dict(), field: value},
    f"'{field}'")

@pytest.mark.parametrize('field,value', [('n_images', None), ('n_images', 0), ('n_groups', 0), ('n_pixels', 0),
    ('n_groups', 13), ('grouped', 1), ('grouped', None), ('complete', 'no'),
    ('complete', None), ('unit', 3), ('unit', None), ('unit', ['a']), ('unit', 'a\x1b[2J'), ('unit', 'a'*300_000),
    ('group_size', 0), ('group_size', '2'), ('group_size', math.nan), ('group_size', math.inf), ('group_size', -1),
    ('group_size', True),
    ('group_size', 10**400), ('group_size', None), ('image_size', 'big'), ('image_size', 3), ('image_size', ['a']),
    ('image_size', [-1, 2]), ('image_size', nested(900)),
    ('image_size', [10**400])], ids=lambda o: repr(o)[:15])
def test_damaged_facts_are_named(field, value): fails({**summary()[0].measured().to_dict(), field: value}, f"'{field}'")

def test_a_part_says_of_how_many(): fails({**summary()[0].measured().to_dict(), 'complete': False, 'population': None},
    'how many images')

def test_missing_and_unknown_fields_are_named():
    d = summary()[0].measured().to_dict()
    for k in d: fails({o: v for o,v in d.items() if o!=k}, f"'{k}'")
    fails({**d, 'hist': [1]}, "'hist'"), fails({**d, 3: 4}, 'Measured')

# --- state

@pytest.mark.parametrize('again', [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))],
                         ids=['copy', 'deepcopy', 'pickle'])
def test_copies_are_equal_and_apart(again):
    rs = run([images(4, 6, 6)])
    new,was = again(rs),state(rs)
    assert state(new)==was
    new.update(images(2, 6, 6, seed=1))
    assert state(rs)==was and new.n_images==6

@pytest.mark.parametrize('k', [*stat_names, 'stats'])
def test_empty(k):
    with pytest.raises(ValueError, match='no images'): r = getattr(RunningStats(), k); r()
    assert 'no images' in repr(RunningStats())

def bad_pixel(v, n=1):
    x = images(2, 4, 4)
    x[1,2].view(-1)[:n] = v
    return x

@pytest.mark.parametrize('x,err,match', [
    (bad_pixel(math.nan, 3),           ValueError, '3 in channel 2'),
    (bad_pixel(math.inf),              ValueError, '1 in channel 2'),
    (bad_pixel(-math.inf),             ValueError, '1 in channel 2'),
    (images(2, 4, 4, c=1),             ValueError, '1 channels after images of 3'),
    (images(2, 4, 4)[:,0,0],           ValueError, r'must be \(B, C, \*spatial\)'),
    (images(2, 4, 4)[:0],              ValueError, 'no empty side'),
    (images(2, 4, 4)[...,:0],          ValueError, 'no empty side'),
    (images(2, 4, 4)>.5,               TypeError,  'real numbers'),
    (images(2, 4, 4).to(torch.cfloat), TypeError,  'real numbers'),
    (images(2, 4, 4).numpy(),          TypeError,  'must be a tensor')])
def test_refused_batch_changes_nothing(x, err, match):
    rs = run([images(5, 4, 4)])
    was = state(rs)
    with pytest.raises(err, match=match) as e: rs.update(x)
    assert state(rs)==was and '\n' not in str(e.value)

def test_refused_first_batch_changes_nothing():
    rs = RunningStats()
    with pytest.raises(ValueError): rs.update(bad_pixel(math.nan))
    assert state(rs.update(images(5, 4, 4)))==state(run([images(5, 4, 4)]))

@pytest.mark.parametrize('other,err,match', [
    (RunningStats().update(images(2, 4, 4, c=1)), ValueError, '1 channels after images of 3'),
    (3,                                           TypeError,  'RunningStats only'),
    (run([images(2, 4, 4)]).measured(),           TypeError,  'RunningStats only, got Measured')],
    ids=['channels', 'type', 'summary'])
def test_refused_merge_changes_nothing(other, err, match):
    rs = run([images(5, 4, 4)])
    was = state(rs)
    with pytest.raises(err, match=match): rs.merge(other)
    assert state(rs)==was

@pytest.mark.parametrize('v', ['drop', None, True, 3])
def test_refused_arguments(v):
    with pytest.raises(ValueError, match="`nonfinite` must be 'error' or 'ignore'"): RunningStats(v)

@pytest.mark.parametrize('gone', [dict(bins=10), dict(value_range=(0, 1))], ids=str)
def test_no_range_is_chosen_beforehand(gone):
    with pytest.raises(TypeError, match=next(iter(gone))): RunningStats(**gone)
