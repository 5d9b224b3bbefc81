"""What goes wrong in practice gives one sentence that says what to do: from the API as an exception, from the command
as one line"""

import gc,json,os,subprocess,sys,tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.data.all import (CategoryBlock,DataBlock,FuncSplitter,IndexSplitter,L,Normalize,RandomSplitter,Transform,
    TransformBlock,get_image_files,parent_label)
from fastai.data.load import SkipItemException
from fastai.torch_core import TensorImage
from fastai.vision.augment import Resize
from fastai.vision.core import PILImage,imagenet_stats
from fastai.vision.data import ImageBlock
from helpers import image_folder,random_image
from PIL import Image

import fastai_normstats.block
from fastai_normstats import cli
from fastai_normstats.loaders import ReadError
from fastai_normstats.measure import measure_stats
from fastai_normstats.choice import StatsChoice
from fastai_normstats.policy import choose_stats
from fastai_normstats.transform import DatasetStats

quiet = dict(verbose=False)
small = dict(bs=4, num_workers=0)

def sorted_files(path): return get_image_files(path).sorted()

def last_for_validation(items): return list(range(len(items)-1)),list(range(len(items)))[-1:]

def block(splitter=last_for_validation, **kwargs):
    "Label: the folder; files in order of their names"
    return DataBlock(**{**dict(blocks=(ImageBlock, CategoryBlock), get_items=sorted_files, get_y=parent_label,
                               splitter=splitter,
                               item_tfms=Resize(8, method='squish')), **kwargs})

def one_sentence(e):
    "The message of a caught error, which must be one line of reasonable length"
    msg = str(e.value)
    assert msg and '\n' not in msg and len(msg)<500, msg
    return msg

def fails(err, match, f, *args, **kwargs):
    with pytest.raises(err, match=match) as e: f(*args, **kwargs)
    return one_sentence(e)

@pytest.fixture(scope='module', autouse=True)
def release_workers_soon():
    "torch waits 5 s for each worker process of a loader that failed"
    utils = torch.utils.data._utils
    with pytest.MonkeyPatch.context() as m:
        m.setattr(utils, 'MP_STATUS_CHECK_INTERVAL', .2)
        yield
        gc.collect()

@pytest.fixture
def normstats(capsys, monkeypatch):
    "Run the command in this process; checks its status, and stderr: one line after a mistake, else none"
    monkeypatch.setattr(cli, '_workers', lambda: 0)
    def run(*args, status=0):
        capsys.readouterr()
        got = cli.main([str(a) for a in args])
        out,err = capsys.readouterr()
        assert got==status, (got, out, err)
        assert len(err.splitlines())==(status!=0) and 'Traceback' not in err, err
        return err if status else out
    return run

def refused(normstats, match, *args):
    err = normstats(*args, status=1)
    assert err.startswith('normstats: ') and match in err, err

def folder(path, n=6, **kwargs): return image_folder(path/'images', n=n, size=10, **kwargs)

# --- no images

def test_empty_folder(tmp_path, normstats):
    fails(ValueError, 'no items found: check the path', block().fit_stats, tmp_path, **quiet, **small)
    refused(normstats, 'no images in', 'fit', tmp_path)

def test_no_such_folder(tmp_path, normstats):
    fails(ValueError, 'no items found: check the path', block().fit_stats, tmp_path/'none', **quiet, **small)
    refused(normstats, 'no such folder', 'fit', tmp_path/'none')
    refused(normstats, 'no such folder', 'fit', folder(tmp_path), '--train-folder', 'train')

def test_file_for_a_folder(tmp_path, normstats):
    path = folder(tmp_path)
    refused(normstats, 'not a folder', 'fit', path/'a'/'000.png')

def test_only_other_files(tmp_path, normstats):
    (tmp_path/'a').mkdir()
    (tmp_path/'a'/'notes.txt').write_text('no image')
    (tmp_path/'a'/'.hidden.png').write_text('no image')
    refused(normstats, 'no images in', 'fit', tmp_path)
    fails(ValueError, 'no items found', block().fit_stats, tmp_path, **quiet, **small)

def test_no_training_images(tmp_path, normstats):
    path = folder(tmp_path)
    (path/'train').mkdir()
    fails(ValueError, 'no training images: the splitter put all 6', block(FuncSplitter(lambda f: True)).fit_stats,
          path, **quiet, **small)
    refused(normstats, 'no training images', 'fit', path, '--train-folder', 'train')

def test_empty_training_loader(tmp_path):
    dls = block().dataloaders(folder(tmp_path), **small)
    empty = dls.new_empty()
    fails(ValueError, 'training split is empty', measure_stats, empty.train, **quiet)
    fails(ValueError, 'training split is empty', empty.fit_stats, **quiet)

def test_every_item_skipped(tmp_path):
    class Skip(Transform):
        def encodes(self, x:PILImage): raise SkipItemException
    dls = block().dataloaders(folder(tmp_path), **small)
    dls.train.after_item.add([Skip()])
    fails(ValueError, 'no batch', measure_stats, dls.train, **quiet)

# --- few images

def test_fewer_images_than_a_batch(tmp_path, normstats):
    "The training loader drops its only batch; the fit must not"
    path = folder(tmp_path)
    db = block().fit_stats(path, **quiet, bs=64, num_workers=0)
    assert db.stats_choice.measured.n_images==5 and db.stats_choice.rule=='small'
    assert '5 training images' in normstats('fit', path, '--size', 8)

def test_one_image(tmp_path, normstats):
    path = folder(tmp_path, n=1)
    db = block(IndexSplitter([]), blocks=ImageBlock, get_y=None, n_inp=1).fit_stats(path, **quiet, **small)
    m = db.stats_choice.measured
    assert m.n_images==1 and m.mean_se.isnan().all() and db.stats_choice.rule=='small'
    assert '1 training image ' in normstats('fit', path, '--size', 8)
    normstats('fit', path, '--size', 8, '--valid-pct', 0, '--out', tmp_path/'c.json', '--plot', tmp_path/'p.png')
    assert (tmp_path/'p.png').stat().st_size and StatsChoice.load(tmp_path/'c.json').n_images==1
    assert '1 training image ' in normstats('show', tmp_path/'c.json')

# --- unreadable images

def truncate(f): f.write_bytes(f.read_bytes()[:-60])
def text(f):     f.write_text('this is no image')
def empty(f):    f.write_bytes(b'')
def binary(f):   f.write_bytes(np.random.default_rng(0).bytes(500))

def jpegs(path):
    "The same folder as JPEG files, of noise, so that cutting off the end loses pixels"
    for f in sorted(path.rglob('*.png')):
        x = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(x).save(f.with_suffix('.jpg'), quality=95)
        f.unlink()
    return path

@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('which', [0, 3], ids=['first', 'later'])
@pytest.mark.parametrize('suffix,damage', [('png', truncate), ('jpg', truncate), ('png', text), ('jpg', empty),
                                           ('png', binary)],
                         ids=lambda o: getattr(o, '__name__', o))
def test_unreadable_file_is_named(tmp_path, suffix, damage, which, num_workers):
    "Also the first training file, which fastai itself opens before any measuring"
    path = folder(tmp_path)
    if suffix=='jpg': jpegs(path)
    bad,db = sorted(path.rglob('*.*'))[which],block()
    dls = db.dataloaders(path, **small)
    dls.train.fake_l.num_workers = num_workers
    damage(bad)
    name = f'cannot read .*{bad.parent.name}/{bad.name}: .'
    fails(ReadError, name, block().fit_stats, path, **quiet, bs=4, num_workers=num_workers)
    fails(ReadError, name, measure_stats, dls.train, **quiet)
    fails(ReadError, name, dls.fit_stats, **quiet)

def test_lazy_fit_names_an_unreadable_file(tmp_path):
    path = folder(tmp_path)
    truncate(path/'a'/'004.png')
    fails(ReadError, 'cannot read .*a/004.png: .', block(batch_tfms=DatasetStats(**quiet)).dataloaders, path, **small)

@pytest.mark.parametrize('damage', [truncate, text, empty], ids=lambda f: f.__name__)
@pytest.mark.parametrize('name', ['a/000.png', 'b/003.png'])
def test_command_names_an_unreadable_file(tmp_path, normstats, damage, name):
    path = folder(tmp_path)
    damage(path/name)
    refused(normstats, name, 'fit', path, '--valid-pct', 0)

def test_unreadable_file_with_line_breaks_in_its_name(tmp_path, normstats):
    path = folder(tmp_path)
    (path/'a'/'000.png').rename(path/'a'/'x\ny.png')
    text(path/'a'/'x\ny.png')
    refused(normstats, 'y.png', 'fit', path, '--valid-pct', 0)

def test_unreadable_validation_file_does_not_matter(tmp_path, normstats):
    path = folder(tmp_path)
    text(sorted(path.rglob('*.png'))[-1])
    assert block().fit_stats(path, **quiet, **small).stats_choice.measured.n_images==5
    (path/'a').rename(path/'train')
    assert '3 training images' in normstats('fit', path, '--train-folder', 'train', '--size', 8)

def test_fit_after_the_file_was_repaired(tmp_path):
    "A failed fit leaves the block usable"
    path = folder(tmp_path)
    f = path/'a'/'002.png'
    good,db = f.read_bytes(),block(RandomSplitter(seed=0), batch_tfms=Normalize.from_stats(*imagenet_stats))
    was = db.splitter,list(db.batch_tfms)
    for f in path.rglob('*.png'): good = f.read_bytes(); truncate(f)
    fails(ReadError, 'cannot read', db.fit_stats, path, **quiet, **small)
    assert (db.splitter, list(db.batch_tfms))==was and db.stats_choice is None
    for f in path.rglob('*.png'): f.write_bytes(good)
    assert db.fit_stats(path, **quiet, **small).stats_choice.measured.n_images==5

def test_other_files_among_images(tmp_path, normstats):
    path = folder(tmp_path)
    (path/'a'/'notes.txt').write_text('no image'), (path/'a'/'.DS_Store').write_bytes(b'\0\1')
    assert '6 training images' in normstats('fit', path, '--size', 8, '--valid-pct', 0)

def test_unreadable_folder(normstats):
    "As another user: root may read everything. In a child process, which cannot change back"
    if not hasattr(os, 'fork'): pytest.skip("needs fork")
    with tempfile.TemporaryDirectory() as d:
        os.chmod(d, 0o755)
        path = folder(Path(d))
        (path/'b').chmod(0)
        r,w = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                if os.getuid()==0: os.setuid(65534)
                os.dup2(w, 2)
                sys.stderr = os.fdopen(2, 'w', closefd=False)
                status = cli.main(['fit', str(path)])
                sys.stderr.flush()
            except BaseException: status = 99
            finally: os._exit(status)
        os.close(w)
        with os.fdopen(r) as f: err = f.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        (path/'b').chmod(0o755)
    assert status==1 and len(err.splitlines())==1 and f"{path/'b'}: Permission denied" in err, err

# --- images that do not go together

def test_mixed_modes(tmp_path, normstats):
    "Grey, colour, palette and transparent PNG are all colour to PILImage"
    rng = np.random.default_rng(0)
    for i,m in enumerate(('L', 'RGB', 'RGBA', 'P', 'LA', '1')): random_image(rng).convert(m).save(tmp_path/f'{i}.png')
    db = block(IndexSplitter([]), blocks=ImageBlock, get_y=None, n_inp=1).fit_stats(tmp_path, **quiet, **small)
    assert db.stats_choice.measured.n_images==6 and db.stats_choice.measured.n_channels==3
    assert '6 training images' in normstats('fit', tmp_path, '--size', 8, '--valid-pct', 0)

def tensors(shapes, bad=None):
    "A block of float tensors; item `i` has `shapes[i]`; `bad`: item → (channel, value) of one pixel"
    def load(i):
        x = torch.rand(shapes[i], generator=torch.Generator().manual_seed(i))
        if bad and i in bad: x[bad[i][0],0,0] = bad[i][1]
        return TensorImage(x)
    return DataBlock(TransformBlock(type_tfms=load), n_inp=1, splitter=IndexSplitter([]))

def dls_of(db, n, **kwargs): return db.dataloaders(list(range(n)), **{**small, 'shuffle': True, **kwargs})

@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('shapes,match', [
    ([(3, 8, 8)]*5+[(1, 8, 8)], r'different channel counts, .*\(1, 8, 8\).*: load them as one kind'),
    ([(3, 8, 8)]*5+[(3, 8, 9)], r'different sizes, .*\(3, 8, 9\).*: bring them to one size'),
    ([(3, 8, 8)]*5+[(1, 9, 9)], r'different (sizes|channel)')], ids=['channels', 'sizes', 'both'])
def test_shapes_that_differ_in_a_batch(shapes, match, num_workers):
    dls = dls_of(tensors(shapes), 6, num_workers=num_workers, bs=6)
    fails(ReadError, match, measure_stats, dls.train, **quiet)
    fails(ReadError, match, dls.fit_stats, **quiet)
    fails(ReadError, match, tensors(shapes).fit_stats, list(range(6)), **quiet, bs=6, num_workers=num_workers)

def test_channel_counts_that_differ_between_batches():
    dls = dls_of(tensors([(3, 8, 8)]*5+[(1, 8, 8)]), 6, bs=1)
    fails(ValueError, 'channels after images of', measure_stats, dls.train, **quiet)

def test_files_of_different_sizes(tmp_path):
    path = folder(tmp_path)
    random_image(np.random.default_rng(0), 12).save(path/'a'/'000.png')
    fails(ReadError, r'different sizes.*bring them to one size, e.g. `item_tfms=Resize',
          block(item_tfms=None).fit_stats,
        path, **quiet, bs=5, num_workers=0)

@pytest.mark.parametrize('v,at,num_workers', [(float('nan'), i, 0) for i in range(9)]+[(float('inf'), 7, 0),
    (-float('inf'), 8, 0), (float('nan'), 7, 2)])
def test_nan_names_item_and_channel(v, at, num_workers):
    "In whichever batch of the pass it is, the first included"
    db = tensors([(3, 8, 8)]*9, bad={at: (2, v)})
    match = fr'^{at}: NaN or infinite pixels \(1 in channel 2\)'
    fails(ValueError, match, measure_stats, dls_of(db, 9, num_workers=num_workers).train, **quiet)
    fails(ValueError, match, db.fit_stats, list(range(9)), **quiet, bs=4, num_workers=num_workers)

@pytest.mark.parametrize('at', range(0, 40, 5))
def test_nan_is_named_although_items_are_skipped(at):
    "Skipped items shift the others in their batches"
    db = tensors([(3, 8, 8)]*40, bad={at: (1, float('nan'))})
    dls = dls_of(db, 40)
    class SkipSome(Transform):
        def encodes(self, x:TensorImage):
            if not x.isnan().any() and x[0,0,0]>.3: raise SkipItemException
            return x
    dls.train.after_item.add([SkipSome()])
    fails(ValueError, f'^{at}: NaN', measure_stats, dls.train, **quiet)

def test_nan_in_a_second_input_is_named():
    def load(i, bad=-1):
        x = torch.rand(3, 8, 8)
        if i==bad: x[1,0,0] = torch.nan
        return TensorImage(x)
    def second(i): return load(i, bad=7)
    db = DataBlock((TransformBlock(type_tfms=load), TransformBlock(type_tfms=second)), n_inp=2,
                   splitter=IndexSplitter([]))
    fails(ValueError, '^7: NaN', db.fit_stats, list(range(9)), **quiet, bs=3, num_workers=0)

def test_nan_in_a_file_is_named_with_its_path(tmp_path):
    for i in range(5): np.save(tmp_path/f'{i}.npy', np.full((1, 6, 6), np.nan if i==3 else i/5, dtype=np.float32))
    db = DataBlock(TransformBlock(type_tfms=lambda f: TensorImage(torch.tensor(np.load(f)))),
        get_items=lambda p: L(sorted(p.iterdir())), n_inp=1,
                   splitter=IndexSplitter([0]))
    fails(ValueError, r'3.npy: NaN or infinite pixels \(36 in channel 0\)', db.fit_stats, tmp_path, **quiet, **small)

def test_no_image_among_the_inputs():
    db = DataBlock(TransformBlock(type_tfms=lambda i: torch.rand(3, 8, 8)), n_inp=1, splitter=IndexSplitter([]))
    fails(TypeError, 'no image among the inputs .*TensorImage', db.fit_stats, list(range(5)), **quiet, **small)

def test_statistics_of_other_channels(tmp_path):
    "Two numbers for three channels: refused at once, also where nothing needs measuring"
    path,two = folder(tmp_path),((.5, .5), (.2, .2))
    for kwargs in (dict(measure=True), dict()):
        fails(ValueError, '3 channels.* statistics.* 2', block().fit_stats, path, stats=two, **kwargs, **quiet, **small)
    fails(ValueError, '3 channels.* statistics.* 2', block().dataloaders(path, **small).fit_stats, stats=two, **quiet)

# --- arguments

@pytest.mark.parametrize('kwargs,match', [
    (dict(mean=(.5,)),                           'got `mean` alone'),
    (dict(std=(.5,)),                            'got `std` alone'),
    (dict(mean=(.5, .5), std=(.1, 0.)),          '`std` must be above 0'),
    (dict(mean=(.5, .5), std=(.1, -1.)),         '`std` must be above 0'),
    (dict(mean=(.5, .5), std=(.1, .1, .1)),      '`mean` has 2 channels and `std` 3'),
    (dict(mean=(.5, float('nan')), std=(1, 1)),  'must be finite'),
    (dict(mean=(.5, .5), std=(1, float('inf'))), 'must be finite'),
    (dict(stats='imagnet'),                      "`stats` takes 'auto'.*'imagenet'"),
    (dict(stats=None),                           '`stats` takes'),
    (dict(stats=((.5,), (0,))),                  '`std` must be above 0'),
    (dict(stats=((.5, .5), (1,))),               '`mean` has 2 channels and `std` 1'),
    (dict(stats=((.5, float('nan')), (1, 1))),   '`mean` must be finite'),
    (dict(model='resnet43'),                     "unknown model 'resnet43': near matches are .*resnet34"),
    (dict(model=7),                              'cannot tell the statistics'),
    (dict(axes=(2, 3)),                          '`axes` must hold 0'),
    (dict(tol=-.01),                             '`tol` must be a share of the std from 0'),
    (dict(tol=float('nan')),                     '`tol` must be'),
    (dict(tol=float('inf')),                     '`tol` must be'),
    (dict(tol='1%'),                             "`tol` must be .* got '1%'"),
    (dict(tol=True),                             '`tol` must be'),
    (dict(max_images=0),                         '`max_images` must be a whole number from 1'),
    (dict(max_images=1e4),                       '`max_images` must be a whole number'),
    (dict(max_images=True),                      '`max_images` must be'),
    (dict(nonfinite='drop'),                     "`nonfinite` must be 'error' or 'ignore', got 'drop'"),
    (dict(cache=''),                             '`cache` must be True, False or a folder'),
    (dict(cache=3),                              '`cache` must be True, False or a folder')], ids=str)
def test_arguments(tmp_path, kwargs, match):
    "Said where the argument is given, before any image is read"
    fails(ValueError, match, DatasetStats, **kwargs)
    if {'mean', 'std', 'axes'} & set(kwargs): return
    path,db = folder(tmp_path),block()
    dls = db.dataloaders(path, **small)
    for f in path.rglob('*.png'): f.unlink()
    fails(ValueError, match, db.fit_stats, path, **kwargs, **small)
    fails(ValueError, match, dls.fit_stats, **kwargs)

@pytest.mark.parametrize('bad', [dict(mean=torch.tensor([.5]), std=torch.tensor([0.])),
    dict(mean=torch.rand(1, 3, 1, 1), std=-torch.rand(1, 3, 1, 1))], ids=['0', 'negative'])
def test_tensor_arguments(bad): fails(ValueError, '`std` must be above 0', DatasetStats, **bad)

def test_from_stats_with_std_0(): fails(ValueError, '`std` must be above 0', DatasetStats.from_stats, (.5, .5),
                                        (1., 0.), cuda=False)

@pytest.mark.parametrize('typo', [dict(batchsize=4), dict(num_wokers=0), dict(modle='resnet34'), dict(sed=1)], ids=str)
def test_misspelt_keyword(tmp_path, typo):
    "The keyword is named; the block stays as it was"
    path,db = folder(tmp_path),block()
    splitter = db.splitter
    name = next(iter(typo))
    fails(TypeError, name, db.dataloaders(path, **small).fit_stats, **typo)
    fails(TypeError, name, DatasetStats, **typo)
    fails(TypeError, name, db.fit_stats, path, **typo, **quiet)
    assert db.splitter is splitter and db.stats_choice is None

@pytest.mark.parametrize('source', [3, None, object()], ids=['number', 'None', 'object'])
def test_source_of_a_wrong_type(source): fails((TypeError, ValueError), '.', block().fit_stats, source, **quiet,
                                               **small)

def test_setups_of_what_is_no_loader():
    db = DataBlock(TransformBlock(type_tfms=[lambda i: TensorImage(torch.rand(3, 8, 8)), DatasetStats(**quiet)]),
                   n_inp=1,
        splitter=IndexSplitter([]))
    fails(TypeError, 'put it into `batch_tfms`', db.dataloaders, list(range(5)), **small)

def test_added_to_loaders_that_exist(tmp_path):
    "fastai gives it no loader there, and would fail at the first batch only"
    dls = block().dataloaders(folder(tmp_path), **small)
    fails(ValueError, r'got no loader to measure.*`dls.fit_stats\(\)`', dls.add_tfms, [DatasetStats(**quiet)],
          'after_batch')

def test_beside_another_normalize(tmp_path):
    db = block(batch_tfms=[DatasetStats(**quiet), Normalize.from_stats(*imagenet_stats)])
    fails(ValueError, 'Normalize beside DatasetStats would normalise twice', db.dataloaders, folder(tmp_path), **small)

def test_used_before_it_is_fitted():
    fails(ValueError, 'no statistics yet', DatasetStats(**quiet), TensorImage(torch.rand(2, 3, 4, 4)))

def test_measuring_what_is_no_fastai_loader():
    fails(TypeError, 'need a fastai `TfmdDL`', measure_stats, torch.utils.data.DataLoader([1, 2]), **quiet)
    fails(TypeError, 'need a fastai `TfmdDL`', measure_stats, [1, 2], **quiet)

def test_attribute_error_in_a_transform_reaches_the_user(tmp_path):
    "fastai swallows it in `setup` and fails at the first batch instead"
    class Broken(Transform):
        order = 20
        def encodes(self, x:TensorImage): return x.no_such_thing
    with pytest.raises(RuntimeError, match='measuring failed: AttributeError.*no_such_thing'):
        block(batch_tfms=[Broken(), DatasetStats(**quiet)]).dataloaders(folder(tmp_path), **small)

# --- the command

@pytest.mark.parametrize('args,match', [
    ([],                                              'required: COMMAND'),
    (['fti', '.'],                                    "invalid choice: 'fti'"),
    (['fit'],                                         'required: PATH'),
    (['fit', '.', '--siz'],                           '--siz'),
    (['fit', '.', '--size', '0'],                     '--size: must be a whole number above 0, got 0'),
    (['fit', '.', '--size', '-3'],                    '--size'),
    (['fit', '.', '--size', '2.5'],                   '--size: must be a whole number above 0, got 2.5'),
    (['fit', '.', '--size', 'big'],                   '--size'),
    (['fit', '.', '--valid-pct', '1'],                '--valid-pct: must be at least 0 and below 1, got 1'),
    (['fit', '.', '--valid-pct', '-0.1'],             '--valid-pct'),
    (['fit', '.', '--valid-pct', 'nan'],              '--valid-pct'),
    (['fit', '.', '--valid-pct', 'some'],             '--valid-pct'),
    (['fit', '.', '--valid-pct', '.2', '--train-folder', 'a'], 'not allowed with'),
    (['fit', '.', '--seed', 'x'],                     '--seed'),
    (['fit', '.', '--frobnicate'],                    '--frobnicate'),
    (['show'],                                        'required: FILE'),
    (['demo', '--size', '0'],                         '--size')], ids=' '.join)
def test_command_line(normstats, args, match): refused(normstats, match, *args)

@pytest.mark.parametrize('args,match', [
    (['--model', 'resnet43'],         "unknown model 'resnet43': near matches are"),
    (['--model', 'not-a-model-at-all'], "unknown model"),
    (['--model', ''],                 'unknown model'),
    (['--tol', '-1'],                 '`tol` must be a share'),
    (['--tol', 'nan'],                'tol'),
    (['--out', 'none/c.json'],        'cannot write none/c.json'),
    (['--plot', 'none/c.png'],        'cannot write none/c.png')], ids=str)
def test_fit_options(tmp_path, normstats, args, match): refused(normstats, match, 'fit', folder(tmp_path), '--size', 8,
    *args)

def test_empty_words_are_not_left_out(tmp_path, normstats, monkeypatch):
    "`--train-folder \"$UNSET\"` must not measure a random part instead, nor an empty PATH the current folder"
    path = folder(tmp_path)
    monkeypatch.chdir(path)
    refused(normstats, 'train-folder', 'fit', path, '--size', 8, '--train-folder', '')
    refused(normstats, 'folder', 'fit', '', '--size', 8)

@pytest.mark.parametrize('name', ['a', 'a/', './a', 'b/../a'])
def test_spellings_of_the_training_folder(tmp_path, normstats, name):
    assert '3 training images' in normstats('fit', folder(tmp_path), '--size', 8, '--train-folder', name)

def test_out_that_is_a_folder(tmp_path, normstats):
    (tmp_path/'out').mkdir()
    refused(normstats, 'out', 'fit', folder(tmp_path), '--size', 8, '--out', tmp_path/'out')
    assert list((tmp_path/'out').iterdir())==[] and not list(tmp_path.glob('.out*'))

def test_picture_of_unknown_kind(tmp_path, normstats):
    "Said before the long pass, as for a missing folder"
    path = folder(tmp_path)
    for f in path.rglob('*.png'): text(f)
    refused(normstats, '.xyz', 'fit', path, '--size', 8, '--plot', tmp_path/'p.xyz')

def test_failed_fit_writes_nothing(tmp_path, normstats):
    path = folder(tmp_path)
    text(path/'a'/'002.png')
    refused(normstats, '002.png', 'fit', path, '--valid-pct', 0, '--out', tmp_path/'c.json', '--plot', tmp_path/'p.png')
    assert list(tmp_path.iterdir())==[path]

def foreign(**kwargs): return json.dumps({**choose_stats(1, stats='imagenet').to_dict(), **kwargs}).encode()

@pytest.mark.parametrize('content', [b'', b'{', b'\xff\xfe\x00\x9f'*9, b'[1, 2]', b'3',
                                     b'{"mean": [0.5], "std": [0.2]}',
    foreign(version=9), foreign(format='other'),
    foreign(stats=None), foreign(stats=dict(mean=['x'], std=[1])), foreign(model=3), foreign(measured=dict(bins=1)),
    foreign(n_images='many')],
    ids=['empty', 'half', 'binary', 'list', 'number', 'foreign', 'version', 'format', 'null', 'words', 'model',
         'measured', 'n_images'])
def test_show_of_what_is_no_choice(tmp_path, normstats, content):
    f = tmp_path/'c.json'
    f.write_bytes(content)
    refused(normstats, 'c.json', 'show', f)
    fails(ValueError, 'cannot read .*c.json', StatsChoice.load, f)

def test_show_of_no_file(tmp_path, normstats):
    refused(normstats, 'none.json', 'show', tmp_path/'none.json')
    refused(normstats, tmp_path.name, 'show', tmp_path)

def test_show_without_measurement_has_no_picture(tmp_path, normstats):
    choose_stats(1, stats='imagenet').save(tmp_path/'c.json')
    assert 'nothing was measured' in normstats('show', tmp_path/'c.json', '--plot', tmp_path/'p.png')
    assert not (tmp_path/'p.png').exists()

def test_interrupted_command(tmp_path, monkeypatch, capsys):
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(cli, '_images', stop)
    assert cli.main(['fit', str(tmp_path)])==130
    assert len(capsys.readouterr().err.splitlines())==1

def start(*args, code='from fastai_normstats.cli import main; raise SystemExit(main())'):
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)

def ended(p): return (*p.communicate(), p.returncode)

@pytest.mark.slow
def test_real_command(tmp_path):
    "Nothing from worker processes, libraries or the interpreter gets onto stderr either"
    path = folder(tmp_path, n=12)
    truncate(path/'b'/'005.png')
    bad,good = start('fit', path, '--valid-pct', 0, '--size', 8),start('fit', path, '--train-folder', 'a', '--size', 8)
    out,err,status = ended(bad)
    assert status==1 and len(err.splitlines())==1 and 'b/005.png' in err, err
    out,err,status = ended(good)
    assert status==0 and err=='' and '6 training images' in out, err

no_torch = '''
import sys
from fastai_normstats.cli import main
try: status = main()
except SystemExit as e: status = e.code
assert not {'torch', 'fastai', 'numpy', 'pandas'} & set(sys.modules), sorted(sys.modules)
raise SystemExit(status)
'''

@pytest.mark.parametrize('args,status,out', [(['--help'], 0, 'fit'), (['--version'], 0, fastai_normstats.__version__),
    (['fit', '--help'], 0, '--valid-pct'),
    (['show', '--help'], 0, 'FILE'), (['demo', '--help'], 0, '--size'), ([], 1, ''),
    (['fit', '.', '--size', '0'], 1, '')], ids=str)
def test_help_does_not_import_torch(args, status, out):
    "Answers at once"
    got,err,code = ended(start(*args, code=no_torch))
    assert code==status and out in got and len(err.splitlines())==(status!=0), err
