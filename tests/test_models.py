"""What models expect: against torchvision's own preprocessing, timm's configurations, fastai's table and arithmetic
by hand"""

import functools,json
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from fastai.vision.all import create_timm_model,imagenet_stats,model_meta
from torch import nn
from torchvision import models as tvm
from torchvision.transforms import v2

from fastai_normstats.cli import main
from fastai_normstats.models import IMAGENET,known_models,model_stats
from fastai_normstats.values import NormStats
from helpers import no_address

def plain(stats): return [list(o) for o in stats]

# --- torchvision, timm, fastai

def builders(module): return [n for n in tvm.list_models(module=module)]
inside = builders(tvm.detection)

@pytest.mark.parametrize('name', [n for n in tvm.list_models() if n not in inside and not n.startswith('raft')])
def test_torchvision(name):
    "The function, its name and every weights member: as the weights' own transforms"
    weights = tvm.get_model_weights(name)
    for w in weights: assert plain(model_stats(w))==plain(model_stats(str(w)))==[list(w.transforms().mean),
        list(w.transforms().std)]
    t = weights.DEFAULT.transforms()
    assert plain(model_stats(tvm.get_model_builder(name)))==[list(t.mean), list(t.std)]

@pytest.mark.parametrize('name', ['raft_large', 'raft_small'])
def test_optical_flow_by_what_its_transforms_do(name):
    "They have no attributes: a pixel goes to what (x - mean)/std makes of it"
    t,(mean,std) = tvm.get_model_weights(name).DEFAULT.transforms(),model_stats(tvm.get_model_builder(name))
    x = torch.rand(3, 4, 4)
    want = (x-torch.tensor(mean).view(3, 1, 1))/torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(t(x, x)[0], want)

@pytest.mark.parametrize('name', inside)
def test_detection_normalises_inside(name):
    for model in (tvm.get_model_builder(name), name, *tvm.get_model_weights(name)):
        with pytest.raises(ValueError, match='normalises inside.*no Normalize'): model_stats(model)

def test_timm():
    "Every model with a configuration, by name; of 3,000 names, those of other numbers than ImageNet's among them"
    kinds = set()
    for name in {*timm.list_pretrained(), *timm.list_models()}:
        cfg = timm.get_pretrained_cfg(name, allow_unregistered=False)
        if cfg is None: continue
        s = model_stats(name)
        assert plain(s)==[list(cfg.mean), list(cfg.std)], name
        kinds.add(tuple(s))
    assert len(kinds)>5

def test_fastai():
    for f,meta in model_meta.items():
        if 'stats' in meta: assert plain(model_stats(f))==plain(meta['stats'])
    assert sum('stats' in m for m in model_meta.values())==len(model_meta)==21

@pytest.mark.parametrize('model, want', [
    (functools.partial(tvm.vgg16, weights='IMAGENET1K_FEATURES'), tvm.VGG16_Weights.IMAGENET1K_FEATURES),
    (functools.partial(tvm.vgg16, weights=tvm.VGG16_Weights.IMAGENET1K_FEATURES),
     tvm.VGG16_Weights.IMAGENET1K_FEATURES),
    (functools.partial(tvm.vgg16), tvm.VGG16_Weights.IMAGENET1K_V1),
    ('VGG16_Weights.IMAGENET1K_FEATURES', tvm.VGG16_Weights.IMAGENET1K_FEATURES)], ids=no_address)
def test_weights_asked_for(model, want): assert plain(model_stats(model))==[list(want.transforms().mean),
    list(want.transforms().std)]

def test_timm_function():
    assert plain(model_stats(timm.models.vit_base_patch16_224))==plain(timm_cfg('vit_base_patch16_224'))
def timm_cfg(name): c = timm.get_pretrained_cfg(name); return c.mean,c.std

# --- the registry

facts = {  # name: mean, std, value range, as the project's FACTS list them
    'openai-clip': ([.48145466, .4578275, .40821073], [.26862954, .26130258, .27577711]),
    'rad-dino': ([.5307]*3, [.2583]*3), 'medclip': ([.5862785803043838], [.27950088968644304]),
    'medsiglip': ([.5]*3, [.5]*3),
    'h-optimus-0': ([.707223, .578729, .703617], [.211883, .230117, .177517]),
    'hibou-l': ([.7068, .5755, .722], [.195, .2316, .1816]),
    'genbio-pathfm': ([.697, .575, .728], [.188, .24, .187]), 'dinov3-sat': ([.43, .411, .296], [.213, .156, .143]),
    'lunit-dino': ([.70322989, .53606487, .66096631], [.21716536, .26081574, .20723464]), 'uni': imagenet_stats,
    'virchow2': imagenet_stats}

@pytest.mark.parametrize('name', facts)
def test_published(name):
    s = model_stats(name, n_channels=None)
    assert plain(s)==plain(facts[name]) and s.name==name and s.source
    assert model_stats(name.upper(), n_channels=None)==model_stats(name.replace('-', '_'), n_channels=None)==s

def test_rows_that_libraries_have_as_well():
    for name in ('r3d_18', 'mc3_18', 'r2plus1d_18', 's3d', 'mvit_v1_b', 'mvit_v2_s', 'efficientnet_v2_l'):
        t,row = tvm.get_model_weights(name).DEFAULT.transforms(),known_models(name).iloc[0]
        assert [list(row['mean']), list(row['std'])]==[list(t.mean), list(t.std)]
        assert row.input_size in (*t.crop_size, *t.resize_size)
    c = timm.data.constants
    assert plain(model_stats('dpn'))==[list(c.IMAGENET_DPN_MEAN), list(c.IMAGENET_DPN_STD)]
    assert plain(model_stats('openai-clip'))==[list(c.OPENAI_CLIP_MEAN), list(c.OPENAI_CLIP_STD)]

def test_known_models():
    df = known_models()
    assert list(df.columns)==['name', 'mean', 'std', 'domain', 'value_range', 'channels', 'input_size',
                              'source'] and df.name.is_unique
    assert (df.source!='').all() and (df.domain!='').all()
    for r in df.itertuples():
        s = model_stats(r.name, n_channels=None)
        assert (s.mean, s.std, s.domain, s.value_range, s.source, len(s.mean))==(r.mean, r.std, r.domain,
            r.value_range, r.source, r.channels)
    assert {'rad-dino', 'chexzero', 'medclip',
            'torchxrayvision'} <= {*known_models(domain='X-Ray').name} and len(known_models('rad-dino'))==2
    assert known_models('nothing like this').empty

def test_unknown_names_are_answered_with_near_ones():
    for name,near in (('raddino', 'rad-dino'), ('microsoft/rad-dino', 'rad-dino'), ('biomedclp', 'biomedclip'),
                      ('resnet43', 'resnet34')):
        with pytest.raises(ValueError, match=f"unknown model '{name}'.*'{near}'"): model_stats(name)
    with pytest.raises(ValueError, match='nothing is downloaded'): model_stats('microsoft/rad-dino')

# --- channels

def test_one_channel_is_exact_or_refused():
    """For a random first layer: summed filters and one channel equal RGB filters and three equal ones, where the
    numbers do"""
    torch.manual_seed(0)
    x,w = torch.rand(2, 1, 9, 9, dtype=torch.float64),torch.randn(8, 3, 3, 3, dtype=torch.float64)
    def normal(x, s): mean,std = (torch.tensor(o, dtype=torch.float64).view(-1, 1, 1) for o in s); return (x-mean)/std
    for name in ('rad-dino', 'siglip', 'chexzero'):
        rgb = nn.functional.conv2d(normal(x.expand(-1, 3, -1, -1), model_stats(name)), w)
        grey = nn.functional.conv2d(normal(x, model_stats(name, n_channels=1)), w.sum(1, keepdim=True))
        torch.testing.assert_close(rgb, grey)
    assert model_stats('imagenet', n_channels=1) is None and model_stats('siglip', n_channels=4) is None
    assert plain(model_stats('medclip'))==[[.5862785803043838]*3, [.27950088968644304]*3]  # a grey image loaded as RGB

# --- configurations

half = dict(image_mean=[.5]*3, image_std=[.25]*3)
def saved(folder, name='preprocessor_config.json', **fields):
    (folder/name).write_text(json.dumps(fields))
    return folder

def test_folder_file_and_string(tmp_path):
    d = saved(tmp_path, **half)
    for model in (d, d/'preprocessor_config.json', str(d),
                  str(d/'preprocessor_config.json')): assert plain(model_stats(model))==[[.5]*3, [.25]*3]
    assert model_stats(d).source.endswith('preprocessor_config.json')

@pytest.mark.parametrize('name, fields', [('open_clip_config.json',
                                           dict(preprocess_cfg=dict(mean=[.5]*3, std=[.25]*3), model_cfg={})),
    ('config.json', dict(architecture='vit', pretrained_cfg=dict(mean=[.5]*3, std=[.25]*3))),
    ('processor_config.json', dict(image_processor=half))])
def test_other_files(tmp_path, name, fields):
    assert plain(model_stats(saved(tmp_path, name, **fields)))==[[.5]*3, [.25]*3]

@pytest.mark.parametrize('fields', [dict(do_rescale=True, rescale_factor=1/255),
                                    dict(rescale_factor=0.00392156862745098), dict(rescale_factor=1/127.5),
    dict(rescale_factor=1/127.5, rescale_offset=True), dict(rescale_factor=1.), dict(do_normalize=False),
    dict(do_normalize=False, rescale_factor=1/127.5)])
def test_what_a_processor_does_to_a_pixel(fields, tmp_path):
    "x/255 normalised with our numbers equals an 8-bit x rescaled and normalised as Hugging Face's processors do it"
    mean,std = model_stats(saved(tmp_path, **half, **fields))
    for x in (0, 37, 255):
        y = x*fields.get('rescale_factor', 1/255) - (1 if fields.get('rescale_offset') else 0)
        if fields.get('do_normalize', True): y = (y-.5)/.25
        np.testing.assert_allclose((x/255-mean[0])/std[0], y, rtol=1e-9, atol=1e-9)

@pytest.mark.parametrize('fields, match', [
    (dict(), 'field `image_mean` is missing'), (dict(image_mean=[.5]*3), 'field `image_std` is missing'),
    (dict(image_std=[.5]*3), 'field `image_mean` is missing'),
    ({**half, 'image_mean': [.5]*2}, '`image_mean` has 2 numbers and `image_std` 3'),
    ({**half, 'image_std': [0.]*3}, '`image_std` must be above 0'),
    ({**half, 'image_mean': 'half'}, '`image_mean` must be finite numbers'),
    ({**half, 'image_mean': [None]*3}, '`image_mean` must be finite numbers'),
    ({**half, 'image_std': [float('nan')]*3}, '`image_std` must be finite numbers'),
    ({**half, 'image_mean': {}}, '`image_mean` must be finite numbers'),
    ({**half, 'do_normalize': 'yes'}, '`do_normalize` must be true or false'),
    ({**half, 'rescale_factor': -1}, '`rescale_factor` must be a number above 0'),
    ({**half, 'rescale_factor': 'x'}, '`rescale_factor` must be'),
    ({**half, 'do_rescale': False}, '`do_rescale` is false')], ids=str)
def test_malformed_files_name_file_and_field(tmp_path, fields, match):
    with pytest.raises(ValueError, match=f'preprocessor_config.json: .*{match}'): model_stats(saved(tmp_path, **fields))

def test_unreadable_files(tmp_path):
    with pytest.raises(ValueError, match=f'no model configuration in folder {tmp_path}'): model_stats(tmp_path)
    with pytest.raises(ValueError, match='no such file or folder'): model_stats(tmp_path/'nowhere')
    for text,match in (('{', 'not JSON'), ('[]', 'must hold a JSON object, got list'), ('', 'not JSON')):
        (tmp_path/'preprocessor_config.json').write_text(text)
        with pytest.raises(ValueError, match=f'preprocessor_config.json: .*{match}'): model_stats(tmp_path)

class Visual(nn.Module):
    def __init__(self, **attrs): super().__init__(); vars(self).update(attrs)

class Clip(nn.Module):
    def __init__(self, **attrs): super().__init__(); self.visual = Visual(**attrs)

def test_networks_and_objects_that_carry_their_numbers(tmp_path):
    cfg = dict(mean=(.1, .2, .3), std=(.4, .5, .6))
    want = [[.1, .2, .3], [.4, .5, .6]]
    for model in (Clip(preprocess_cfg=dict(size=224, **cfg)), Clip(image_mean=cfg['mean'], image_std=cfg['std']),
                  nn.Sequential(Clip(preprocess_cfg=cfg), nn.ReLU()),
                  SimpleNamespace(image_mean=[.1, .2, .3], image_std=[.4, .5, .6], do_normalize=True,
                                  rescale_factor=1/255),
                  SimpleNamespace(image_processor=SimpleNamespace(image_mean=[.1, .2, .3], image_std=[.4, .5, .6])),
                  cfg,
                  Visual(config=SimpleNamespace(_name_or_path=str(saved(tmp_path, image_mean=[.1, .2, .3],
        image_std=[.4, .5, .6]))))):
        assert plain(model_stats(model))==want
    net = timm.create_model('vit_tiny_patch16_224')
    body = create_timm_model('vit_tiny_patch16_224', 2, pretrained=False)[0]
    assert plain(model_stats(net))==plain(model_stats(net.pretrained_cfg))==plain(model_stats(body)) \
        ==plain(timm_cfg('vit_tiny_patch16_224'))

def test_networks_that_do_not():
    class Own(nn.Module):
        def __init__(self):
            super().__init__(); self.register_buffer('mean', torch.zeros(3)); self.register_buffer('std', torch.ones(3))
    for model in (tvm.resnet18(), Own(), object()):
        with pytest.raises(ValueError, match=f'cannot tell the statistics of a {type(model).__name__}'):
            model_stats(model)
    two = nn.ModuleList([Clip(preprocess_cfg=dict(mean=[m]*3, std=[.5]*3)) for m in (.4, .5)])
    with pytest.raises(ValueError, match='expect different statistics'): model_stats(two)

def test_wrapped_networks_know_their_folder(tmp_path):
    inner = Visual(config=SimpleNamespace(_name_or_path=str(saved(tmp_path, **half))))
    assert plain(model_stats(nn.Sequential(inner, nn.ReLU())))==[[.5]*3, [.25]*3]

def test_odd_objects(tmp_path):
    class Lazy(nn.Module):
        @property
        def config(self): raise RuntimeError('not built yet')
    with pytest.raises(ValueError, match='cannot tell'): model_stats(Lazy())
    o = SimpleNamespace(image_mean=np.full(3, .5), image_std=np.full(3, .25))
    assert plain(model_stats(o))==[[.5]*3, [.25]*3]
    with pytest.raises(ValueError, match='timm has no such weights'): model_stats('resnet34.nope')

def test_odd_files(tmp_path):
    "A byte order mark, numbers too large, endless nesting, and a first file that says nothing"
    (tmp_path/'preprocessor_config.json').write_text('{}')
    assert plain(model_stats(saved(tmp_path, 'open_clip_config.json',
                                   preprocess_cfg=dict(mean=[.5]*3, std=[.25]*3))))==[[.5]*3, [.25]*3]
    file = tmp_path/'preprocessor_config.json'
    file.write_text('\ufeff'+json.dumps(half), encoding='utf-8')
    assert plain(model_stats(tmp_path))==[[.5]*3, [.25]*3]
    for text,match in ((json.dumps({**half, 'image_mean': [10**400]*3}), '`image_mean` must be finite numbers'),
                       ('['*100_000, 'not JSON'),
                       (json.dumps({**half, 'image_std': [True]*3}), '`image_std` must be finite numbers')):
        file.write_text(text)
        with pytest.raises(ValueError, match=match): model_stats(file)

def test_networks_that_normalise_inside():
    kwargs = dict(weights=None, init_weights=False)
    for f in (tvm.inception_v3, tvm.googlenet):
        with pytest.raises(ValueError, match="transform_input=True.*stats='imagenet'"):
            model_stats(f(transform_input=True, **kwargs))
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__(); self.norm,self.net = v2.Normalize([.5], [.5]),timm.create_model('vit_tiny_patch16_224')
    with pytest.raises(ValueError, match='Wrapped normalises inside'): model_stats(Wrapped())
    with pytest.raises(ValueError, match='FasterRCNN normalises inside'):
        model_stats(tvm.detection.fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None))

def test_given_objects_pass():
    s = NormStats((.1,), (.2,), name='own')
    assert model_stats(s, n_channels=1) is s and model_stats(tuple(IMAGENET))==IMAGENET and model_stats(None) is None

# --- the command

def test_command(capsys):
    assert main(['models'])==0
    out = capsys.readouterr().out
    assert all(name in out for name in known_models().name) and len(out.splitlines())==len(known_models())+1
    assert main(['models', 'Rad_DINO'])==0
    out = capsys.readouterr().out
    assert all(s in out for s in ('0.5307', '0.2583', '518', 'preprocessor_config.json'))
    assert main(['models', 'convnext_tiny'])==0 and '0.485, 0.456, 0.406' in capsys.readouterr().out
    assert main(['models', 'raddino'])==1
    assert "near matches are 'rad-dino'" in capsys.readouterr().err
