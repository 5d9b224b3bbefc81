"""nnU-Net's fingerprint and plans as a choice, and back: the same numbers, the same pixels, and one sentence for a file
that is none"""

import json,os,warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from fastai.data.core import Datasets
from fastai.torch_core import TensorImage

from fastai_normstats.all import *
from fastai_normstats.cli import main
from fastai_normstats.serve.formats import export_text,nnunet_key
from fastai_normstats.serve.nnunet import is_nnunet

# --- files as nnU-Net writes them

ct   = dict(mean=99.4, median=101., std=37.1, min=-970., max=1674., percentile_00_5=-15.5, percentile_99_5=197.25)
late = dict(mean=61.2, median=58., std=24.6, min=-310., max=903., percentile_00_5=-40., percentile_99_5=150.)
kinds = dict(CT='CTNormalization', Z='ZScoreNormalization', RGB='RGBTo01Normalization', NO='NoNormalization',
             TO01='RescaleTo01Normalization')

def properties(*each): return {nnunet_key: {str(c): o for c,o in enumerate(each)}}

def fingerprint(*each, n=5, size=1.):
    return dict(spacings=[[1., .8, .8]]*n, shapes_after_crop=[[40, 51, 52]]*n, **properties(*each),
                median_relative_size_after_cropping=size)

def plans(*each, masked=False, **configs):
    "Plans whose `configs` are normalised by these `kinds`, or inherit"
    def config(o):
        if isinstance(o, str) and o not in kinds: return dict(inherits_from=o)
        names = [kinds[k] for k in ([o] if isinstance(o, str) else o)]
        return dict(batch_size=2, normalization_schemes=names, use_mask_for_norm=[masked]*len(names))
    return dict(dataset_name='Dataset003_Liver', plans_name='nnUNetPlans', **properties(*each),
                configurations={k: config(o) for k,o in configs.items()})

def write(folder, name, d):
    (folder/name).write_text(d if isinstance(d, str) else json.dumps(d), encoding='utf-8')
    return folder/name

def dataset(folder, *channels, n=5):
    return write(folder, 'dataset.json', dict(channel_names=dict(enumerate(channels)), numTraining=n))

def volumes(n_channels, seed=0):
    return torch.randn(3, n_channels, 6, 5, 4, generator=torch.Generator().manual_seed(seed))*400

def seen(choice, x, **kwargs):
    tfm = DatasetStats(*choice.stats, axes=(0, *range(2, x.ndim)), scheme=choice.scheme, **kwargs)
    return tfm.encodes(TensorImage(x)).as_subclass(torch.Tensor).numpy()

def clipped(v, p):
    v = np.clip(v.astype(np.float64), p['percentile_00_5'], p['percentile_99_5'])
    return (v-p['mean'])/max(p['std'], 1e-8)

# --- read

@pytest.mark.parametrize('name,d', [('dataset_fingerprint.json', fingerprint(ct, late)),
                                    ('plans.json', plans(ct, late, **{'2d': ['CT', 'CT']})),
                                    ('nnUNetPlans.json', plans(ct, late, **{'2d': ['CT', 'CT']}))])
def test_ct_is_normalised_as_nnunet_does_it(tmp_path, name, d):
    dataset(tmp_path, 'CT', 'ct')
    file,x = write(tmp_path, name, d),volumes(2)
    for path in (file, tmp_path, str(file)):
        choice = read_nnunet(path)
        assert is_nnunet(path) and not choice.warnings
        assert (choice.kind, choice.rule, choice.n_images)==('given', 'given', 5)
        assert (choice.stats.name, choice.stats.value_range, choice.stats.source)==('nnU-Net', (-970, 1674), str(file))
        assert choice.scheme==ClipZScore(limits=((-15.5, -40), (197.25, 150))) and name in choice.why
    want = np.stack([clipped(x[:,c].numpy(), p) for c,p in enumerate((ct, late))], 1)
    np.testing.assert_allclose(seen(choice, x), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(seen(choice, x.double()), want, rtol=1e-6, atol=1e-6)
    loaded = StatsChoice.load(choice.save(tmp_path/'choice.json'))
    assert replace(loaded, file='')==choice
    back = choose_stats(3, RunningStats().update(x), stats=loaded)
    assert back.stats==choice.stats and back.scheme==choice.scheme

def test_nnunets_own_classes_make_the_same(tmp_path):
    own = pytest.importorskip('nnunetv2.preprocessing.normalization.default_normalization_schemes')
    x = volumes(1)
    got = seen(read_nnunet(write(tmp_path, 'dataset_fingerprint.json', fingerprint(ct))), x)
    want = own.CTNormalization(False, ct, np.float32).run(x.numpy().copy())
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    x[:,:,:2] = 0
    for masked in (False, True):
        choice = read_nnunet(write(tmp_path, 'plans.json', plans(ct, masked=masked, fullres='Z')))
        run = own.ZScoreNormalization(masked, {}, np.float32).run
        want = np.stack([run(o.numpy().copy(), np.where(o!=0, 0, -1)) for o in x[:,0]])[:,None]
        got = seen(choice, x, mask=(lambda x: (x!=0).any(1, keepdim=True)) if masked else None)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    grey = (x[:1].abs()%256).floor()
    choice = read_nnunet(write(tmp_path, 'plans.json', plans(ct, fullres='RGB')))
    want = own.RGBTo01Normalization(False, {}, np.float32).run(grey.numpy().copy())
    np.testing.assert_allclose(seen(choice, grey), want, rtol=1e-5, atol=1e-6)

def test_dls_take_it(tmp_path):
    "Loaders give what the formula gives"
    file,x = write(tmp_path, 'dataset_fingerprint.json', fingerprint(ct)),volumes(1)
    tfm = DatasetStats(stats=read_nnunet(file), axes=(0, 2, 3, 4), verbose=False, cache=False)
    items = Datasets(range(3), [[lambda i: TensorImage(x[i])]], splits=([0, 1], [2]))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # few images, few values between the limits
        dls = items.dataloaders(bs=2, after_batch=[tfm], num_workers=0, shuffle=False, device='cpu')
        got = dls.train.one_batch()[0].as_subclass(torch.Tensor).numpy()
    np.testing.assert_allclose(got, clipped(x[:2].numpy(), ct), rtol=1e-5, atol=1e-5)

def test_a_fingerprint_alone_is_taken_as_ct(tmp_path):
    choice = read_nnunet(write(tmp_path, 'dataset_fingerprint.json', fingerprint(ct)))
    assert choice.scheme.name=='clip-zscore' and 'taken as CT' in choice.warnings[0]
    d = fingerprint(ct)
    del d['shapes_after_crop']
    choice = read_nnunet(write(tmp_path, 'dataset_fingerprint.json', d))
    assert choice.n_images==1 and 'how many training images' in choice.warnings[1]

@pytest.mark.parametrize('size,word', [(1., None), (.6, 'nnU-Net normalises only'), (None, 'nnU-Net may normalise')])
def test_other_channels_are_normalised_image_by_image(tmp_path, size, word):
    dataset(tmp_path, 'T1', 'FLAIR')
    choice = read_nnunet(write(tmp_path, 'dataset_fingerprint.json', fingerprint(ct, late, size=size)))
    assert choice.scheme==ImageZScore() and (word is None)==(not choice.warnings)
    if word: assert word in choice.warnings[0] and 'mask=lambda x: (x!=0)' in choice.warnings[0]
    x = volumes(2)
    v = x.numpy().astype(np.float64)
    want = (v-v.mean((2, 3, 4), keepdims=True))/v.std((2, 3, 4), keepdims=True)
    np.testing.assert_allclose(seen(choice, x), want, rtol=1e-4, atol=1e-5)
    assert replace(StatsChoice.load(choice.save(tmp_path/'choice.json')), file='')==choice

def test_rgb_is_divided_by_255(tmp_path):
    choice = read_nnunet(write(tmp_path, 'plans.json', plans(ct, ct, ct, **{'2d': ['RGB']*3})))
    assert [*choice.stats]==[(0.,)*3, (255.,)*3] and choice.scheme.name=='zscore' and '0–255' in choice.warnings[0]
    x = torch.arange(3*16.).view(1, 3, 4, 4)
    np.testing.assert_allclose(seen(choice, x), x.numpy()/255, rtol=1e-6)

def test_configurations(tmp_path):
    file = write(tmp_path, 'plans.json', plans(ct, low='CT', full='Z', cascade='low', odd='cascade'))
    for k,name in dict(low='clip-zscore', full='image-zscore', cascade='clip-zscore', odd='clip-zscore').items():
        choice = read_nnunet(file, k)
        assert choice.scheme.name==name and f"configuration '{k}'" in choice.why
    refused(lambda: read_nnunet(file), "say which one with `config=`", "'full': ZScoreNormalization")
    for k in ('3d', 3, [], True): refused(lambda k=k: read_nnunet(file, k), 'has no configuration', "known are 'low'")
    write(tmp_path, 'plans.json', plans(ct, a='b', b='a'))
    refused(lambda: read_nnunet(file), 'must name a scheme for each of the 1 channels')
    file = write(tmp_path, 'dataset_fingerprint.json', fingerprint(ct))
    refused(lambda: read_nnunet(file, '2d'), 'leave `config` out')

# --- refused

def refused(f, *said):
    with pytest.raises(ValueError) as e: f()
    msg = str(e.value)
    assert '\n' not in msg and len(msg)<700, msg
    for o in said: assert o in msg, msg

@pytest.mark.parametrize('schemes,said', [
    (['CT', 'Z'], 'channel 1 has ZScoreNormalization and channel 0 CTNormalization'),
    (['TO01', 'TO01'], "channel 0 (RescaleTo01Normalization) is brought to [0, 1]"),
    (['CT', 'NO'], 'channel 1 (NoNormalization) is not normalised'), (['CT'], 'for each of the 2 channels')])
def test_schemes_that_no_choice_says(tmp_path, schemes, said):
    refused(lambda: read_nnunet(write(tmp_path, 'plans.json', plans(ct, late, full=schemes))), said)

def without(k): return {a: b for a,b in ct.items() if a!=k}

broken = dict(
    not_json=('{"a": ', 'it is not JSON'), empty=('', 'it is not JSON'), binary=('\x00\x01', 'it is not JSON'),
    a_list=('[1, 2]', 'must hold a JSON object, got list'), other=('{"mean": [1]}', "neither nnU-Net's plans"),
    nested=('['*100_000, 'it is not JSON'), nested_objects=('{"a":'*100_000, 'it is not JSON'),
    huge=('{"a": "'+'x'*10_000_001+'"}', 'too large'), digits=('{"a": '+'9'*5000+'}', 'it is not JSON'),
    no_channels=(properties(), "neither nnU-Net's plans"), listed=({nnunet_key: [ct]}, "neither nnU-Net's plans"),
    gap=({nnunet_key: {'0': ct, '2': ct}}, "must be '0', '1'…"), number=(properties(3), 'must be an object'),
    missing=(properties(without('std')), 'channel 0 has no `std`'),
    no_percentile=(properties(ct, without('percentile_99_5')), 'channel 1 has no `percentile_99_5`'),
    nan=(properties(ct | dict(mean=float('nan'))), '`mean` must be a finite number, got nan'),
    infinite=(properties(ct | dict(max=float('inf'))), '`max` must be a finite number, got inf'),
    large=(properties(ct | dict(mean=10**400)), '`mean` must be a finite number'),
    text=(properties(ct | dict(mean='1')), "`mean` must be a finite number, got '1'"),
    true=(properties(ct | dict(std=True)), "`std` must be a finite number"),
    null=(properties(ct | dict(std=None)), "`std` must be a finite number, got None"),
    constant=(properties(ct | dict(std=0.)), '`std` must be above 0, got 0'),
    tiny=(properties(ct | dict(std=1e-9)), '`std` must be above 0, got 1e-09'),
    negative=(properties(ct | dict(std=-3.)), '`std` must be above 0, got -3'),
    order=(properties(ct | dict(percentile_00_5=300.)), '`percentile_00_5` must be below `percentile_99_5`'),
    equal=(properties(ct | dict(percentile_00_5=197.25)), '`percentile_00_5` must be below `percentile_99_5`'),
    ends=(properties(ct | dict(min=9999.)), '`min` must be below `max`'),
    configurations=(properties(ct) | dict(configurations=[]), '`configurations` must be an object'),
    no_configuration=(properties(ct) | dict(configurations={}), '`configurations` must be an object'),
    no_schemes=(properties(ct) | dict(configurations={'2d': {}}), "configuration '2d' must name a scheme"),
    odd_schemes=(properties(ct) | dict(configurations={'2d': dict(normalization_schemes=[3])}), 'must name a scheme'),
    config_is_text=(properties(ct) | dict(configurations={'2d': 'x'}), 'must name a scheme'),
    own_scheme=(properties(ct) | dict(configurations={'2d': dict(normalization_schemes=['MyNorm'])}), "'MyNorm'"))

@pytest.mark.parametrize('kind', broken)
def test_a_broken_file_is_one_sentence(tmp_path, kind):
    d,said = broken[kind]
    file = write(tmp_path, 'plans.json', d)
    refused(lambda: read_nnunet(file), str(file), said)

@pytest.mark.parametrize('d,said', [('{', 'it is not JSON'), ('{}', '`channel_names` must name'),
                                    ('{"channel_names": {"0": 3}}', 'must name'),
                                    ('{"channel_names": ["CT"]}', 'must name')])
def test_a_broken_dataset_json_is_one_sentence(tmp_path, d, said):
    write(tmp_path, 'dataset.json', d)
    refused(lambda: read_nnunet(write(tmp_path, 'dataset_fingerprint.json', fingerprint(ct))), 'dataset.json', said)

def test_what_is_no_file_is_one_sentence(tmp_path):
    refused(lambda: read_nnunet(tmp_path), 'nothing to read in folder')
    refused(lambda: read_nnunet(tmp_path/'plans.json'), 'no such file')
    if hasattr(os, 'mkfifo'):
        os.mkfifo(tmp_path/'plans.json')
        refused(lambda: read_nnunet(tmp_path/'plans.json'), 'it is no file')
        refused(lambda: read_nnunet(tmp_path), 'nothing to read in folder')
        refused(lambda: measured().export('nnunet', tmp_path/'plans.json'), 'it is no file')
    for k in 'AB': write(tmp_path, f'{k}Plans.json', plans(ct, full='CT'))
    refused(lambda: read_nnunet(tmp_path), 'holds several plans (APlans.json, BPlans.json)')
    assert not is_nnunet(tmp_path) and is_nnunet(tmp_path/'APlans.json') and not is_nnunet(tmp_path/'none')

# --- written

def measured(n=1, scheme='clip-zscore', x=None):
    x = volumes(n) if x is None else x
    return choose_stats(len(x), RunningStats().update(x), stats='custom', scheme=scheme)

def test_what_was_read_comes_back(tmp_path):
    made = {'dataset_fingerprint.json': fingerprint(ct, late), 'plans.json': plans(ct, late, a=['CT']*2)}
    for name,d in made.items():
        choice = read_nnunet(write(tmp_path, name, d))
        assert choice.export('nnunet')==properties(ct, late)==json.loads(export_text(choice, 'nnU-Net'))
        loaded = StatsChoice.load(choice.save(tmp_path/'c.json'))
        (tmp_path/'made').mkdir(exist_ok=True)
        loaded.export('nnunet', tmp_path/'made')
        again = read_nnunet(tmp_path/'made')
        assert ([*again.stats], again.scheme)==([*choice.stats], choice.scheme)
    unit = {k: v/2000 for k,v in ct.items()} | dict(percentile_00_5=.1, percentile_99_5=.2)
    got = read_nnunet(write(tmp_path, 'plans.json', plans(unit, a='CT'))).export('nnunet')[nnunet_key]['0']
    np.testing.assert_allclose([got[k] for k in unit], [*unit.values()], rtol=1e-12)

@pytest.mark.parametrize('scheme', ['clip-zscore', 'zscore', 'minmax'])
def test_what_was_measured_is_written(tmp_path, scheme):
    x = volumes(2)
    choice = measured(2, scheme)
    d = choice.export('nnunet', tmp_path/'new')
    assert d==json.loads((tmp_path/'new'/'dataset_fingerprint.json').read_text())
    for c in range(2):
        p,v = d[nnunet_key][str(c)],x[:,c].double().numpy()
        assert {*p}=={*ct} and all(type(o) is float for o in p.values())
        np.testing.assert_allclose([p['min'], p['max']], [v.min(), v.max()])
        np.testing.assert_allclose(p['median'], np.median(v), atol=.02*v.std())
        if scheme!='minmax': np.testing.assert_allclose([p['mean'], p['std']], [v.mean(), v.std()], rtol=1e-6)
        if scheme!='zscore': np.testing.assert_allclose(clipped(v, p), seen(choice, x)[:,c], rtol=1e-4, atol=1e-5)

def test_8_bit_images_are_written_for_0_to_255():
    x = torch.rand(4, 3, 8, 8)
    p,v = measured(x=x).export('nnunet')[nnunet_key]['1'],255*x[:,1].double().numpy()
    np.testing.assert_allclose([p['mean'], p['std'], p['max']], [v.mean(), v.std(), v.max()], rtol=1e-5)

def test_all_else_in_the_files_stays(tmp_path):
    before = dict(zip(('plans.json', 'dataset_fingerprint.json'), (plans(ct, a='CT'), fingerprint(ct))))
    for name,d in before.items(): write(tmp_path, name, d)
    new = measured().export('nnunet', tmp_path)
    assert sorted(o.name for o in tmp_path.iterdir())==sorted(before)
    for name,d in before.items():
        assert json.loads((tmp_path/name).read_text())=={**d, **new} and new[nnunet_key]!=d[nnunet_key]
    write(tmp_path, 'plans.json', before['plans.json'])
    write(tmp_path, 'dataset_fingerprint.json', fingerprint(ct, late))  # checked before the plans are written
    refused(lambda: measured().export('nnunet', tmp_path), 'another number of channels than the choice, 2 instead of 1')
    assert json.loads((tmp_path/'plans.json').read_text())==before['plans.json']
    refused(lambda: measured().export('nnunet', write(tmp_path, 'other.json', '{"a": 1}')), "neither nnU-Net's plans")
    refused(lambda: measured().export('nnunet', write(tmp_path, 'other.json', '{')), 'it is not JSON')

def test_what_nnunet_cannot_be_told():
    given = StatsChoice(NormStats([100.], [50.], value_range=(-1000, 400)), 'given', 'given', 'typed in', 9)
    refused(lambda: given.export('nnunet'), 'nothing was measured')
    d = replace(given, scheme=ClipZScore(limits=(-100, 200))).export('nnunet')
    assert d==properties(dict(mean=100., std=50., percentile_00_5=-100., percentile_99_5=200.))
    for s in ('image-zscore', 'lrn'): refused(lambda s=s: measured(scheme=s).export('nnunet'), 'cannot say scheme')
    refused(lambda: measured(scheme='zscore', x=torch.ones(2, 1, 4, 4)).export('nnunet'), 'channel 0 are both')
    odd = read_provenance({'0': dict(median='x', min=None, max=[])})
    assert {*odd.export('nnunet')[nnunet_key]['0']}=={'mean', 'std', 'percentile_00_5', 'percentile_99_5'}
    for was in ([], 3, {'0': 3}, {'1': {}}, None): assert read_provenance(was).export('nnunet')

def read_provenance(was):
    stats = NormStats([100.], [50.], value_range=(-1000, 400))
    return StatsChoice(stats, 'given', 'given', 'typed in', 9, provenance={nnunet_key: was},
                       scheme=ClipZScore(limits=(-100, 200)))

# --- on the command line

def test_export_and_verify(tmp_path, capsys):
    choice = measured()
    saved = str(choice.save(tmp_path/'stats.json'))
    assert main(['export', saved, '--to', 'nnunet', '--out', str(tmp_path/'made')])==0
    assert main(['export', saved, '--to', 'nnunet'])==0
    file = tmp_path/'made'/'dataset_fingerprint.json'
    assert str(file) in capsys.readouterr().out
    for path in (file, tmp_path/'made'): assert main(['verify', str(path), saved])==0, capsys.readouterr()
    d = json.loads(file.read_text())
    p = d[nnunet_key]['0']
    p['mean'],p['std'] = p['std'],p['mean']+500
    file.write_text(json.dumps(d))
    assert main(['verify', str(file), saved])==3
    assert verify_stats(choice, choice) and not verify_stats(read_nnunet(file), choice)
    assert verify_stats(choice, measured(scheme='zscore')).mistake=='clip range'
    file.write_text('{')
    assert main(['verify', str(file), saved])==1 and 'Traceback' not in capsys.readouterr().err
