"""TALAN for PEFT: a sequence-conditioned latent side path in the residual stream, beside a low-rank adapter.

Importing this package registers the tuner with PEFT; `get_peft_model(model, TalanConfig(...))` then works as for LoRA.
"""

from .checkpoint.lora import export_lora, warm_start
from .config import TalanConfig
from .serving.continuous_batching import check_managers
from .tuner.layer import TalanLayer
from .tuner.model import TalanModel
from .tuner.registry import register_talan
from .tuner.strength import set_talan_strength, talan_strength
from .tuner.trainability import set_trainable, talan_param_groups
from .version import __version__

__all__ = [
    "TalanConfig",
    "TalanLayer",
    "TalanModel",
    "__version__",
    "export_lora",
    "register_talan",
    "set_talan_strength",
    "set_trainable",
    "talan_param_groups",
    "talan_strength",
    "warm_start",
]

register_talan()
check_managers()
