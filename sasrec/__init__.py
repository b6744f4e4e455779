"""sasrec: self-attentive sequential recommendation (Kang & McAuley 2018) with incremental inference.

Packages and modules, highest first; imports run downward only:

recommender   data sets in, item ids out, with the names of scikit-rec
estimator     fit, partial_fit, recommend, similar_items, save, load
stream_eval   quality over a stream of periods
training      configuration, estimator arguments, objectives and losses, the loop, warm starts, results, plots
evaluation    ranking metrics, held-out events, count-based baselines
inference     the engine, the cache of keys and values, compiled kernels, ranking, the approximate index
checkpoint    model directories on disk
model         the network and its shape
data          files and frames, the vocabulary, sequences, training windows
durable       files and folders that are flushed to disk

The command line is `sasrec` (__main__.py).
"""

import lazy_loader

# A name is imported when it is first used: options and formats do without PyTorch, which takes seconds to import.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
