"Everything that `from fastai_normstats.all import *` brings"
from .running import *
from .models import *
from .schemes import *
from .policy import *
from .measure import *
from .transform import *
from .block import *
from .drift import *
from .plot import *
from .batches import *
from .compare import *
from .images import *
