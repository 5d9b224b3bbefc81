"What a `StatsChoice` shows, the line of code it gives, what it saves and what it refuses to load"

import json

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import Normalize
from helpers import constant,half,ledger,M,measured,one_channel,part_of as partial,patients,S,shifted,with_z,xray

from fastai_normstats.models import IMAGENET
from fastai_normstats.choice import StatsChoice
from fastai_normstats.policy import choose_stats
from fastai_normstats.values import NormStats
from fastai_normstats.schemes import ClipZScore,ImageZScore

# --- what it shows

def all_choices():
    return [
        choose_stats(100, shifted()),             choose_stats(5000, shifted()),
        choose_stats(1000, with_z(2, 'mean')),
        choose_stats(1000, with_z(5, 'std')),     choose_stats(5000, measured()),
        choose_stats(100, measured(scale=255)),
        choose_stats(100, one_channel),           choose_stats(100, model=xray),
        choose_stats(100, shifted(), model=xray),
        choose_stats(7, frozen=True),             choose_stats(1, stats=(M, S)),
        choose_stats(7, shifted(), pretrained=False),
        choose_stats(5000, constant()),           choose_stats(100, stats=half),
        choose_stats(100, shifted(), stats='custom'),
        choose_stats(100, shifted(), stats=(.5, .2)), choose_stats(300, ledger(*patients([3]*100))),
        choose_stats(9000, ledger(*patients([3]*100))),
        choose_stats(5000, partial(ledger(*patients([3]*100)), 5000, 2000)),
        choose_stats(100, shifted(), scheme=ClipZScore(limits=(.2, .7)))]

@pytest.mark.parametrize('c', all_choices(), ids=lambda c: f'{c.rule}-{c.kind}')
def test_every_choice_can_be_shown(c):
    "One plain sentence, a repr with numbers and warnings, a table with exactly one candidate used"
    assert c.why and '\n' not in c.why and 'nan' not in c.why.lower() and 'None' not in c.why
    text,html = repr(c),c._repr_html_()
    for o in (c.why, c.rule, c.kind, *c.warnings): assert o in text
    assert '<table' in html and c.rule in html
    t = c.table()
    used = t[t.used]
    assert used.candidate.nunique()==1 and used['mean'].tolist()==list(c.stats.mean)

@pytest.mark.parametrize('c', all_choices(), ids=lambda c: f'{c.rule}-{c.kind}')
def test_table_shows_the_std_that_divides(c):
    "Also for a constant channel, where that is 1 and not the measured 0"
    t = c.table()
    assert t[t.used]['std'].tolist()==list(c.stats.std)

def test_table():
    m = shifted(between=.1)
    t = choose_stats(5000, m).table()
    assert list(t.columns)==['candidate', 'channel', 'mean', 'mean_se', 'std', 'std_se', 'image_std', 'shift',
                             'std_ratio', 'used']
    assert list(zip(t.candidate, t.channel, t.used))==[('custom', c, True) for c in range(3)]+[('imagenet', c, False)
        for c in range(3)]
    own,model = t[t.candidate=='custom'],t[t.candidate=='imagenet']
    for k in ('mean', 'mean_se', 'std', 'std_se', 'image_std'): assert own[k].tolist()==getattr(m, k).tolist()
    np.testing.assert_allclose(own['shift'], [.5]*3, rtol=1e-9)
    np.testing.assert_allclose(own.std_ratio, [.7]*3, rtol=1e-9)  # image std against image std
    assert model['mean'].tolist()==list(IMAGENET.mean)
    assert model['std'].tolist()==model.image_std.tolist()==list(IMAGENET.std)
    assert model[['mean_se', 'std_se', 'shift', 'std_ratio']].isna().all(axis=None)
    assert all(pd.api.types.is_float_dtype(t[k]) for k in t.columns[2:-1])

def test_table_of_given_numbers():
    t = choose_stats(100, shifted(), stats=((.1, .2, .3), (.4, .5, .6))).table()
    assert t.candidate.unique().tolist()==['custom', 'imagenet',
                                           'given'] and t[t.used].candidate.unique().tolist()==['given']

def test_limits_for_all_channels_are_shown_for_each():
    t = choose_stats(100, shifted(), scheme=ClipZScore(limits=(.2, .7))).table()
    used = t[t.used]
    assert used.channel.tolist()==[0, 1, 2] and used.low.tolist()==[.2]*3 and used.high.tolist()==[.7]*3

def test_html_is_escaped():
    evil = NormStats((.5,)*3, (.25,)*3, name='<script>x</script>', domain='<img src=x>', source='a & b')
    for c in (choose_stats(100, shifted(), model=evil), choose_stats(100, shifted(), stats=evil)):
        html = c._repr_html_()
        assert '<script' not in html and '<img' not in html and '&lt;script' in html
    c = StatsChoice(IMAGENET, 'imagenet', 'small', 'a < b', 3, warnings=('<b>no</b>',))
    assert 'a &lt; b' in c._repr_html_() and '<b>no</b>' not in c._repr_html_()

# --- code, save and load

@pytest.mark.parametrize('c', [1, 3, 5])
def test_code_gives_the_same_float32(c):
    "Evaluated, the line normalises with the very numbers that `Normalize` would hold"
    rng = np.random.default_rng(c)
    for _ in range(200):
        s = NormStats(rng.normal(size=c)*10**rng.uniform(-4, 5), rng.uniform(.01, 1, c)*10**rng.uniform(-4, 5))
        line = StatsChoice(s, 'custom', 'enough', '', 5000).code()
        got,want = eval(line, dict(Normalize=Normalize)),Normalize.from_stats(*s)
        assert torch.equal(got.mean, want.mean) and torch.equal(got.std, want.std), (line, s)

def test_code_says_where_it_comes_from():
    line = choose_stats(5000, shifted()).code()
    assert line.startswith('Normalize.from_stats(') and 'rule `enough`' in line and '5,000' in line and '\n' not in line

@pytest.mark.parametrize('c', all_choices(), ids=lambda c: f'{c.rule}-{c.kind}')
def test_save_and_load(c, tmp_path):
    f = c.save(tmp_path/'a b.json')
    back = StatsChoice.load(str(f))
    assert f==tmp_path/'a b.json' and [o.name for o in tmp_path.iterdir()]==['a b.json']
    assert back.to_dict()==c.to_dict() and repr(back)==repr(c) and back.code()==c.code()
    assert back._repr_html_()==c._repr_html_()
    assert (back.stats, back.model, back.warnings)==(c.stats, c.model, c.warnings) and back==c
    assert back.measured==c.measured and (c.measured is None)==(back.measured is None)

def test_saved_file_is_plain_json(tmp_path):
    "Other languages read it: no NaN or Infinity, which JSON does not have"
    for c in all_choices():
        json.loads(c.save(tmp_path/'c.json').read_text(encoding='utf-8'),
                   parse_constant=lambda s: pytest.fail(f'{s} in {c.rule}'))

def test_save_replaces(tmp_path):
    f = tmp_path/'c.json'
    f.write_text('old')
    choose_stats(5000, shifted()).save(f)
    assert StatsChoice.load(f).rule=='enough'

def test_failed_save_leaves_the_old_file(tmp_path):
    f = tmp_path/'c.json'
    f.write_text('old')
    with pytest.raises(TypeError): StatsChoice(IMAGENET, 'imagenet', 'small', object(), 3).save(f)
    assert f.read_text()=='old' and list(tmp_path.iterdir())==[f]

def damaged(**kwargs): return json.dumps({**choose_stats(100, shifted()).to_dict(), **kwargs})

foreign = dict(empty='', half='{', list='[]', number='3', null='null', other='{"mean": [1]}',
    format_only='{"format": "fastai_normstats.StatsChoice"}',
    version=damaged(version=1), later=damaged(version=3), extra=damaged(extra=1), stats_number=damaged(stats=3),
    stats_null=damaged(stats=None), stats_empty=damaged(stats={}), std_0=damaged(stats=dict(mean=[1], std=[0])),
    measured_empty=damaged(measured={}),
    measured_list=damaged(measured=[]), warnings=damaged(warnings=3), model=damaged(model='imagenet'))

def deep(n): return '['*n+']'*n
def within(text, **kwargs): return damaged(**{k: '@' for k in kwargs}).replace('"@"', text)
def inside(what, **kwargs): return damaged(**{what: {**choose_stats(100, shifted()).to_dict()[what], **kwargs}})
long,script = 'x'*300_000,'<script>alert(1)</script>'

hostile = dict(
    huge_number=damaged(n_images=10**400), huge_mean=inside('stats', mean=[10**400, 1, 1]),
    huge_std=inside('model', std=[10**400]*3), huge_count=inside('measured', n_images=10**400),
    huge_moment=inside('measured', mean=[10**400, 0, 0]), more_digits_than_python_reads=within('1'*5000, n_images=0),
    huge_version=damaged(version=10**400), deep=deep(100_000),
    deep_provenance=within('{"a": '+deep(100_000)+'}', provenance=0), deep_stats=within(deep(900), stats=0),
    deep_warnings=within(deep(900), warnings=0), deep_scheme=within(deep(900), scheme=0),
    no_scheme=damaged(scheme=None), list_as_scheme=damaged(scheme=dict(name=['minmax'])),
    two_channel_scheme=damaged(scheme=dict(name='clip-zscore', limits=[[0, 0], [1, 1]])),
    scheme_of_nan=within('{"name": "minmax", "limits": [NaN, 1]}', scheme=0),
    huge_scheme=damaged(scheme=dict(name='minmax', limits=[0, 10**400])),
    huge_alpha=damaged(scheme=dict(name='lrn', alpha=10**400)),
    huge_size=damaged(scheme=dict(name='lrn', size=10**400)),
    word_in_scheme=damaged(scheme=dict(name='image-zscore', together='no')), html_kind=damaged(kind=script),
    html_rule=damaged(rule=script), code_in_rule=damaged(rule='small`\nimport os #'), kind_of_number=damaged(kind=3),
    rule_of_list=damaged(rule=['small']), no_kind=damaged(kind=None), why_of_number=damaged(why=3),
    text_of_20_000=damaged(why='x'*20_000), warnings_of_20_000=damaged(warnings=['x'*2000]*10),
    name_of_20_000=inside('stats', name='x'*20_000), source_of_20_000=inside('model', source='x'*20_000),
    long_why=damaged(why=long), long_warning=damaged(warnings=[long]), long_name=inside('stats', name=long),
    long_source=inside('model', source=long), long_kind=damaged(kind=long), long_field=damaged(**{long: 1}),
    long_scheme=damaged(scheme=long), long_provenance=damaged(provenance=dict(mask=long)),
    long_version=damaged(version=long), long_estimator=inside('stats', estimator=long),
    nan_mean=within('[NaN, 1, 1]', stats=0), nan_in_stats=within('{"mean": [NaN], "std": [1]}', stats=0),
    infinite=within('{"mean": [1], "std": [Infinity]}', stats=0), nan_size=within('NaN', n_images=0),
    nan_elsewhere=within('{"a": NaN}', provenance=0), name_of_number=inside('stats', name=3),
    domain_of_list=inside('model', domain=['x']), range_of_word=inside('stats', value_range='ab'),
    true_size=damaged(n_images=True), no_size=damaged(n_images=0), half_size=damaged(n_images=1.5),
    text_size=damaged(n_images='100'), warnings_text=damaged(warnings='no'), warnings_of_numbers=damaged(warnings=[1]),
    provenance_list=damaged(provenance=[]), no_provenance=damaged(provenance=None),
    measured_of_others=damaged(measured=choose_stats(10, measured(mean=M[:2], std=S[:2])).measured.to_dict()),
    measured_short=inside('measured', std=[1.]), measured_negative=inside('measured', std=[-1., 1, 1]),
    measured_of_none=inside('measured', n_images=0), measured_words=inside('measured', mean=['a', 'b', 'c']))

def refusal(path):
    "What `load` says of a file: a ValueError of one short sentence with its name"
    with pytest.raises(ValueError, match='cannot read .*c.json: .') as e: StatsChoice.load(path)
    text = str(e.value).replace(str(path), '')
    assert type(e.value) is ValueError and '\n' not in text and len(text)<=330
    assert '<script>alert(1)</script>' not in text.replace(repr(script), '')
    return text

@pytest.mark.parametrize('text', {**foreign, **hostile}.values(), ids={**foreign, **hostile})
def test_load_names_a_file_it_cannot_read(tmp_path, text):
    f = tmp_path/'c.json'
    f.write_text(text)
    refusal(f)

def test_an_older_file_says_which_version_it_has(tmp_path):
    f = tmp_path/'c.json'
    f.write_text(foreign['version'])
    assert 'format version 1, and 2 is what can be read: fit again' in refusal(f)

def test_bytes_that_are_no_text(tmp_path):
    f = tmp_path/'c.json'
    f.write_bytes(b'\xff\xfe\x00')
    refusal(f)

def test_a_loaded_file_puts_no_code_into_the_line(tmp_path):
    "Names and masks may come from anywhere: the line evaluates to one normalisation, or does not at all"
    evil = 'x\n__import__("os").abort()\u2028#'
    d = choose_stats(100, shifted(), stats=NormStats(M, S*1.1, name='half')).to_dict()
    f = tmp_path/'c.json'
    f.write_text(json.dumps({**d, 'stats': {**d['stats'], 'name': evil}}))
    line = StatsChoice.load(f).code()
    assert len(line.splitlines())==1 and line.index('#')<line.index('__import__')
    d = choose_stats(100, shifted(), scheme=ImageZScore()).to_dict()
    for mask in ('__import__("os").abort()', 3, ['x'], 'a\nb', None):
        f.write_text(json.dumps({**d, 'provenance': dict(mask=mask)}))
        line = StatsChoice.load(f).code()
        assert 'mask' not in line and len(line.splitlines())==1
    f.write_text(json.dumps({**d, 'provenance': dict(mask='body')}))
    assert line.replace('())', '(), mask=body)')!=line and 'mask=body)' in StatsChoice.load(f).code()

def test_texts_of_a_loaded_file_are_escaped(tmp_path):
    d = choose_stats(100, shifted()).to_dict()
    f = tmp_path/'c.json'
    f.write_text(json.dumps({**d, 'why': script+'\x1b[2J', 'warnings': [script],
                             'model': {**d['model'], 'name': script}}))
    c = StatsChoice.load(f)
    assert '<script' not in c._repr_html_() and '\x1b' not in repr(c)

def test_load_of_no_file(tmp_path):
    with pytest.raises(FileNotFoundError): StatsChoice.load(tmp_path/'none.json')

@pytest.mark.parametrize('where,match', [('no/such.json', 'no such folder'), ('.', 'it is a folder')])
def test_save_names_the_users_path(tmp_path, where, match):
    with pytest.raises(OSError, match=f'cannot write .*: {match}'):
        choose_stats(10, stats='imagenet').save(tmp_path/where)
    assert list(tmp_path.iterdir())==[]
