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

The command line is `sasrec` (__main__.py).
"""

from sasrec.checkpoint import ModelDirectoryError, ModelMetadata, SavedModel, load_model, read_metadata, save_model
from sasrec.data.datasets import InteractionsDataset, ItemsDataset
from sasrec.data.formats import Columns, DataFileError
from sasrec.data.options import add_column_options, columns_from
from sasrec.data.readers import Event, read_events
from sasrec.data.sequences import Holdout, Interactions, Sequences
from sasrec.data.vocab import ItemVocab
from sasrec.estimator import Recommendations, SASRecClassifierEstimator, SASRecRegressorEstimator, load_estimator
from sasrec.evaluation.metrics import Metrics, evaluate
from sasrec.inference.engine import Engine, anchor
from sasrec.inference.index import ItemIndex
from sasrec.inference.ranking import Ranking
from sasrec.model import SASRec, SASRecConfig, suggest_config
from sasrec.recommender import SequentialRecommender, SequentialScorer
from sasrec.training.config import TrainConfig
from sasrec.training.result import TrainResult
from sasrec.training.train import TrainingError, train
from sasrec.training.warm_start import resize_model

__all__ = [
    "Columns",
    "DataFileError",
    "Engine",
    "Event",
    "Holdout",
    "Interactions",
    "InteractionsDataset",
    "ItemIndex",
    "ItemVocab",
    "ItemsDataset",
    "Metrics",
    "ModelDirectoryError",
    "ModelMetadata",
    "Ranking",
    "Recommendations",
    "SASRec",
    "SASRecClassifierEstimator",
    "SASRecConfig",
    "SASRecRegressorEstimator",
    "SavedModel",
    "Sequences",
    "SequentialRecommender",
    "SequentialScorer",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "add_column_options",
    "anchor",
    "columns_from",
    "evaluate",
    "load_estimator",
    "load_model",
    "read_events",
    "read_metadata",
    "resize_model",
    "save_model",
    "suggest_config",
    "train",
]
