"Take the numbers along: to other frameworks, into the network, and are they right where it is served?"
from . import formats
from .bake import bake_stats
from .verify import verify_stats
from .nnunet import read_nnunet
