"Small image folders and independent references that several test files share"

from pathlib import Path

import numpy as np
from PIL import Image

def random_image(rng, size=16, mode='RGB'):
    "A smooth image with some noise; brightness and contrast of its own, so that images differ as real ones do"
    coarse = rng.uniform(0, 1, (4, 4, 3)).astype(np.float32)
    big    = [np.asarray(Image.fromarray(coarse[...,c]).resize((size, size), Image.Resampling.BICUBIC)) for c in range(3)]
    x = rng.uniform(.1, .5) + rng.uniform(.2, .5)*np.stack(big, -1)*(1, .8, .6) + rng.normal(0, .03, (size, size, 3))
    return Image.fromarray((x.clip(0, 1)*255).round().astype(np.uint8)).convert(mode)

def image_folder(root, n=24, size=16, classes=('a','b'), mode='RGB', seed=0):
    "Write `n` images in all, taking `classes` in turn, as root/class/NNN.png; returns `root`"
    root,rng = Path(root),np.random.default_rng(seed)
    for c in classes: (root/c).mkdir(parents=True, exist_ok=True)
    for i in range(n): random_image(rng, size, mode).save(root/classes[i%len(classes)]/f'{i:03}.png')
    return root
