"Small image folders and made images that several test files share"

import json,re
from pathlib import Path

import numpy as np
import torch
from fastai.data.block import CategoryBlock,DataBlock
from fastai.data.core import TfmdDL
from fastai.data.transforms import IndexSplitter,parent_label
from fastai.torch_core import TensorImage
from fastai.vision.augment import Resize
from fastai.vision.data import ImageBlock
from fastcore.basics import chunked
from PIL import Image

def random_image(rng, size=16, mode='RGB'):
    "A smooth image with some noise; brightness and contrast of its own, so that images differ as real ones do"
    coarse = rng.uniform(0, 1, (4, 4, 3)).astype(np.float32)
    big    = [np.asarray(Image.fromarray(coarse[...,c]).resize((size, size), Image.Resampling.BICUBIC))
              for c in range(3)]
    x = rng.uniform(.1, .5) + rng.uniform(.2, .5)*np.stack(big, -1)*(1, .8, .6) + rng.normal(0, .03, (size, size, 3))
    return Image.fromarray((x.clip(0, 1)*255).round().astype(np.uint8)).convert(mode)

def image_folder(root, n=24, size=16, classes=('a','b'), mode='RGB', seed=0):
    "Write `n` images in all, taking `classes` in turn, as root/class/NNN.png; returns `root`"
    root,rng = Path(root),np.random.default_rng(seed)
    for c in classes: (root/c).mkdir(parents=True, exist_ok=True)
    for i in range(n): random_image(rng, size, mode).save(root/classes[i%len(classes)]/f'{i:03}.png')
    return root

def png_files(path): return sorted(Path(path).rglob('*.png'))

def image_block(held_out, **kwargs):
    "A block over the image files of a folder, the indices `held_out` for validation"
    usual = dict(blocks=(ImageBlock, CategoryBlock), get_items=png_files, get_y=parent_label,
                 splitter=IndexSplitter(held_out), item_tfms=Resize(12))
    return DataBlock(**{**usual, **kwargs})

def fitted_choice(held_out, folder, pass_args={}, **kwargs):
    "A choice by a block that nobody used before"
    fit = dict(stats='custom', verbose=False, bs=4, num_workers=0)
    return image_block(held_out, **kwargs).fit_stats(folder, **{**fit, **pass_args}).stats_choice

def bits(choice): return json.dumps(choice.measured.to_dict()),choice.stats.mean,choice.stats.std

def cache_entries(cache_home): return sorted((cache_home/'fastai_normstats').glob('*'))

class Ready(TfmdDL):
    "A loader over images that are made a batch at a time: no file, no work an item"
    def create_batches(self, samples):
        for idxs in chunked(samples, self.bs): yield TensorImage(self.dataset.images(torch.tensor(idxs))),

class Greys:
    "`n` images of four pixels: a grey value of their own, whose spread is half of a pixel-std, and a texture"
    def __init__(self, n, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.grey     = torch.randn(n, 2, 1, 1, generator=g)*.1+torch.tensor([.4, .6]).view(2, 1, 1)
        self.contrast = torch.rand(n, 2, 1, 1, generator=g)*.2+.07
    def __len__(self): return len(self.grey)
    def __getitem__(self, i): raise AssertionError('an item was read one by one')
    def images(self, i): return self.grey[i]+self.contrast[i]*torch.tensor([-1., 1, 1, -1]).view(2, 2)

    @property
    def truth(self):
        "Mean and std of all images, float64, from the formula"
        g,c = self.grey.double().squeeze(),self.contrast.double().squeeze()
        return g.mean(0),(g.var(0, correction=0)+c.square().mean(0)).sqrt()

def no_address(o):
    "The name of a parametrised case: the same in every process, as workers that share the tests need it"
    return re.sub(r' at 0x[0-9a-f]+', '', str(o))
