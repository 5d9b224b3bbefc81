"Pictures of a choice, of drift, of batches and of the ledger"
from .choice import plot_drift
from .batches import plot_batch, plot_before_after, plot_unusual
