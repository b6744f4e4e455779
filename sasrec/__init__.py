"""sasrec: self-attentive sequential recommendation (Kang & McAuley 2018) with incremental inference.

The modules, lowest first: vocab, readers, plots, data, model, losses, index, engine, evaluate, baselines, checkpoint,
datasets, train, stream_eval, estimator, recommender.
"""

from sasrec.checkpoint import ModelDirectoryError, SavedModel, load_model, read_metadata, save_model
from sasrec.data.datasets import InteractionsDataset, ItemsDataset
from sasrec.data.readers import DataFileError, Event, read_events
from sasrec.data.sequences import Holdout, Interactions, Sequences
from sasrec.data.vocab import ItemVocab
from sasrec.estimator import (
    Recommendations,
    SASRecClassifierEstimator,
    SASRecRegressorEstimator,
    load_estimator,
    suggest_config,
)
from sasrec.evaluation.metrics import Metrics, evaluate
from sasrec.inference.engine import Engine, anchor
from sasrec.inference.index import ItemIndex
from sasrec.inference.ranking import Ranking
from sasrec.model import SASRec, SASRecConfig
from sasrec.recommender import SequentialRecommender, SequentialScorer
from sasrec.training.train import TrainConfig, TrainingError, TrainResult, grown, train

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
