"Is one set of statistics better than another, on your own data?"
from .core import Comparison, compare_stats
