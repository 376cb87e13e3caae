"""TALAN for PEFT: a sequence-conditioned latent side path in the residual stream, beside a low-rank adapter.

Importing this package registers the tuner with PEFT; `get_peft_model(model, TalanConfig(...))` then works as for LoRA.
"""

from .config import TalanConfig
from .layer import TalanLayer
from .lora import export_lora, warm_start
from .model import TalanModel
from .registry import register_talan
from .version import __version__

__all__ = ["TalanConfig", "TalanLayer", "TalanModel", "__version__", "export_lora", "register_talan", "warm_start"]

register_talan()
