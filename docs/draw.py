"""Draws the README's picture from real images and prints its table:

    python docs/draw.py FOLDER

FOLDER holds chest X-rays and `labels.csv` with columns `fname` and `patient_id`, as the paediatric set of Kermany et
al. (Cell 2018), https://doi.org/10.17632/rscbjbr9sj."""

import sys
from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use('Agg')
from fastai.vision.all import (CategoryBlock, DataBlock, FuncSplitter, ImageBlock, Resize,
                               get_image_files, parent_label, resnet34)
import fastai_normstats.all  # gives DataBlock its fit_stats

folder = Path(sys.argv[1])
labels = pd.read_csv(folder/'labels.csv').set_index('fname').patient_id

def patient(f): return labels[f'{f.parent.name}/{f.name}'] if f'{f.parent.name}/{f.name}' in labels else labels[f.name]

def is_valid(f): return sum(map(ord, str(patient(f))))%5==0  # a fifth of the patients

dblock = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label,
                   splitter=FuncSplitter(is_valid), item_tfms=Resize(224, method='squish'))
dblock.fit_stats(folder, model=resnet34, groups=patient, tol=0, cache=False, num_workers=0)
print(dblock.stats_choice)
axs = dblock.stats_choice.plot()
axs[0].figure.savefig(Path(__file__).parent/'choice.png', dpi=110)
