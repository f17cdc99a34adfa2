"""Training: losses, data, the loop, schedules and checkpoints. Imports no array framework but NumPy."""

from mambax.training import corpus, vocabularies
from mambax.training.batches import Batch, EvaluationData, TrainingData
from mambax.training.config import TrainingConfig
from mambax.training.evaluation import Evaluation, evaluate
from mambax.training.labelled import LabelledRows
from mambax.training.progress import Progress
from mambax.training.schedules import Schedule
from mambax.training.token_data import Documents, Reading, Stream, Windows
from mambax.training.token_files import TokenDataset, write_tokens
from mambax.training.trainer import NotFinite, Summary, Trainer

__all__ = [
    "Batch",
    "Documents",
    "Evaluation",
    "EvaluationData",
    "LabelledRows",
    "NotFinite",
    "Progress",
    "Reading",
    "Schedule",
    "Stream",
    "Summary",
    "TokenDataset",
    "Trainer",
    "TrainingConfig",
    "TrainingData",
    "Windows",
    "corpus",
    "evaluate",
    "vocabularies",
    "write_tokens",
]
