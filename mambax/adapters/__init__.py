"""Fine-tuning: low-rank adapters in PEFT's layout, freezing by pattern. Imports no framework but NumPy."""

from mambax.adapters.adding import add_lora
from mambax.adapters.files import load_adapter, save_adapter
from mambax.adapters.freezing import freeze, unfreeze
from mambax.adapters.merging import Merged, merge_adapter

__all__ = ["Merged", "add_lora", "freeze", "load_adapter", "merge_adapter", "save_adapter", "unfreeze"]
