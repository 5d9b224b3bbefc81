"Pictures of a choice, of drift, of batches and of the ledger; a page with all of them"
from .choice import plot_drift
from .batches import plot_batch, plot_before_after, plot_unusual
from .report import report_stats
