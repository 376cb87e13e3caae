"""Makes PEFT know the tuner type TALAN."""

from __future__ import annotations

from aenum import extend_enum
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method
from transformers.cache_utils import Cache

from ..checkpoint.card import write_cards_on_push
from ..checkpoint.loaded_over import check_what_is_loaded_over
from ..checkpoint.merged_as_adapter import let_peft_refuse_merged_models
from ..config import TalanConfig
from ..memory.cache import follow_class
from .lorafa import let_lorafa_train_side_paths
from .merged_loading import let_transformers_build_merged_models
from .model import TalanModel


def register_talan() -> None:
    """Add the member TALAN to PEFT's enum of tuner types and register the tuner under it; a second call does nothing.

    PEFT and transformers look adapters up by enum member: a bare string in PEFT's mappings would break transformers'
    `load_adapter`. The prefix is `lora_`, as AdaLoRA's: LoRA weights and side path are found by the one prefix.

    Examples:
        >>> register_talan()  # `import peft_talan` does it
    """
    if "TALAN" not in PeftType.__members__:
        extend_enum(PeftType, "TALAN", "TALAN")
    if PeftType("TALAN") not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name="talan", config_cls=TalanConfig, model_cls=TalanModel, prefix=TalanModel.prefix)
        write_cards_on_push()
        check_what_is_loaded_over()
        let_peft_refuse_merged_models()
        let_lorafa_train_side_paths()
        follow_class(Cache)
        let_transformers_build_merged_models()
