"Fixtures that several test files share"
import gc,os,tempfile

import pytest

# nobody's own cache, also for fixtures of a whole module
os.environ['XDG_CACHE_HOME'] = tempfile.mkdtemp(prefix='normstats-tests-')

pytest.register_assert_rewrite('helpers')

@pytest.fixture(scope='session', autouse=True)
def imported_for_good():
    "What is there once all modules are imported stays: each garbage collection of a comparison would look through it"
    gc.collect()
    gc.freeze()

@pytest.fixture(autouse=True)
def cache_home(monkeypatch, tmp_path_factory):
    "A cache folder of each test's own"
    folder = tmp_path_factory.mktemp('cache')
    monkeypatch.setenv('XDG_CACHE_HOME', str(folder))
    return folder

@pytest.fixture
def passes(monkeypatch):
    "The loaders that `DatasetStats` has measured, in order"
    from fastai_normstats import transform
    res,real = [],transform.measure_stats
    def counted(dl, *args, **kwargs):
        res.append(dl)
        return real(dl, *args, **kwargs)
    monkeypatch.setattr(transform, 'measure_stats', counted)
    return res

@pytest.fixture
def folder(tmp_path):
    "27 images, for `helpers.block`"
    from helpers import image_folder
    return image_folder(tmp_path/'images', n=27)
