"""sasrec: self-attentive sequential recommendation (Kang & McAuley 2018) with incremental inference.

The modules, lowest first: vocab, readers, plots, data, model, losses, index, engine, evaluate, baselines, checkpoint,
datasets, train, stream_eval, estimator, recommender.
"""

from sasrec.checkpoint import ModelDirectoryError, SavedModel, load_model, read_metadata, save_model
from sasrec.data import Holdout, Interactions, Sequences
from sasrec.datasets import InteractionsDataset, ItemsDataset
from sasrec.engine import Engine, Ranking, anchor
from sasrec.estimator import (
    Recommendations,
    SASRecClassifierEstimator,
    SASRecRegressorEstimator,
    load_estimator,
    suggest_config,
)
from sasrec.evaluate import Metrics, evaluate
from sasrec.index import ItemIndex
from sasrec.model import SASRec, SASRecConfig
from sasrec.readers import DataFileError, Event, read_events
from sasrec.recommender import SequentialRecommender, SequentialScorer
from sasrec.train import TrainConfig, TrainingError, TrainResult, grown, train
from sasrec.vocab import ItemVocab

__all__ = [
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
    "anchor",
    "evaluate",
    "grown",
    "load_estimator",
    "load_model",
    "read_events",
    "read_metadata",
    "save_model",
    "suggest_config",
    "train",
]
