"""TALAN for PEFT: a sequence-conditioned latent side path in the residual stream, beside a low-rank adapter.

Importing this package registers the tuner with PEFT; `get_peft_model(model, TalanConfig(...))` then works as for LoRA.
"""

from .config import TalanConfig
from .layer import TalanLayer
from .model import TalanModel
from .registry import register_talan
from .version import __version__

__all__ = ["TalanConfig", "TalanLayer", "TalanModel", "__version__", "register_talan"]

register_talan()
