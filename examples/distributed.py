"""Statistics of one training split, measured by several processes, each reading its share:

    torchrun --nproc-per-node 2 examples/distributed.py [FOLDER OF IMAGES]

Without a folder it takes scikit-learn's handwritten digits. Where there are GPUs, it then trains on them for an epoch."""

import argparse,os,tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from fastai.vision.all import *
from fastai.distributed import *
from fastai_normstats.all import *
from PIL import Image
from sklearn.datasets import load_digits

def write_digits(folder):
    "The 1,797 digits as an image folder with a subfolder a class"
    digits = load_digits()
    for i,(a,y) in enumerate(zip(digits.images, digits.target)):
        (folder/str(y)).mkdir(exist_ok=True)
        Image.fromarray((a*255/16).round().astype('uint8')).save(folder/str(y)/f'{i:04}.png')

def main(path):
    rank,size = dist.get_rank(),dist.get_world_size()
    dblock = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label,
                       splitter=RandomSplitter(seed=42),  # seeded: all processes must hold the same split
                       item_tfms=Resize(64), batch_tfms=aug_transforms())
    dblock.fit_stats(path, model=resnet18, num_workers=0)  # every process calls it; together they read each training image once
    choice = dblock.stats_choice
    for r in range(size):  # the same bits everywhere
        if r==rank: print(f"rank {rank} of {size}: {choice.measured.n_images:,} images, mean {choice.stats.mean[0].hex()}", flush=True)
        dist.barrier()
    if not rank: print(choice)
    if not torch.cuda.is_available(): return  # fastai's distributed training needs GPUs
    learn = vision_learner(dblock.dataloaders(path, bs=64), resnet18, pretrained=False, metrics=accuracy)
    with learn.distrib_ctx(): learn.fit_one_cycle(1)

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('path', nargs='?', type=Path, help='folder with a subfolder a class')
    args = parser.parse_args()
    if 'RANK' not in os.environ: parser.error('start it with torchrun --nproc-per-node 2')
    dist.init_process_group('nccl' if torch.cuda.is_available() else 'gloo')
    if torch.cuda.is_available(): torch.cuda.set_device(dist.get_rank()%torch.cuda.device_count())
    with tempfile.TemporaryDirectory() as tmp:
        folder = [args.path or Path(tmp)]
        if not args.path and not dist.get_rank(): write_digits(folder[0])
        dist.broadcast_object_list(folder)  # all read the folder of rank 0
        main(folder[0])
        dist.barrier()  # before it is removed
    dist.destroy_process_group()
