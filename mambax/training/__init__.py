"""Training: losses, data, the loop, schedules and checkpoints. Imports no array framework but NumPy.

Names are imported when they are asked for: models need the losses alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambax.training import corpus, vocabularies
    from mambax.training.batches import Batch, EvaluationData, TrainingData
    from mambax.training.config import TrainingConfig
    from mambax.training.evaluation import Evaluation, evaluate
    from mambax.training.gathering import gather_checkpoint
    from mambax.training.labelled import LabelledRows
    from mambax.training.progress import Progress
    from mambax.training.schedules import Schedule
    from mambax.training.steps import NotFinite
    from mambax.training.token_data import Documents, Reading, Stream, Windows
    from mambax.training.token_files import TokenDataset, write_tokens
    from mambax.training.trainer import Summary, Trainer

_HOMES = {
    "Batch": "batches",
    "EvaluationData": "batches",
    "TrainingData": "batches",
    "TrainingConfig": "config",
    "Evaluation": "evaluation",
    "evaluate": "evaluation",
    "gather_checkpoint": "gathering",
    "LabelledRows": "labelled",
    "Progress": "progress",
    "Schedule": "schedules",
    "Documents": "token_data",
    "Reading": "token_data",
    "Stream": "token_data",
    "Windows": "token_data",
    "TokenDataset": "token_files",
    "write_tokens": "token_files",
    "NotFinite": "steps",
    "Summary": "trainer",
    "Trainer": "trainer",
}
"""The modules of the names that are not modules themselves."""

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
    "gather_checkpoint",
    "vocabularies",
    "write_tokens",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
