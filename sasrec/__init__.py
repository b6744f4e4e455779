"""sasrec: self-attentive sequential recommendation (Kang & McAuley 2018) with incremental inference.

The modules, lowest first: vocab, readers, data, model, losses, engine, evaluate, checkpoint, train.
"""

from sasrec.checkpoint import ModelDirectoryError, SavedModel, load_model, save_model
from sasrec.data import Holdout, Interactions, Sequences
from sasrec.engine import Engine, Ranking, anchor
from sasrec.evaluate import Metrics, evaluate
from sasrec.model import SASRec, SASRecConfig
from sasrec.readers import DataFileError, Event, read_events
from sasrec.train import TrainConfig, TrainingError, TrainResult, train
from sasrec.vocab import ItemVocab

__all__ = [
    "DataFileError",
    "Engine",
    "Event",
    "Holdout",
    "Interactions",
    "ItemVocab",
    "Metrics",
    "ModelDirectoryError",
    "Ranking",
    "SASRec",
    "SASRecConfig",
    "SavedModel",
    "Sequences",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "anchor",
    "evaluate",
    "load_model",
    "read_events",
    "save_model",
    "train",
]
