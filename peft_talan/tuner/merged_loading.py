"""Lets transformers build a merged model with its side paths, so that it loads their tensors as all others.

Where it is given for an adapter, transformers refuses it and names the call that loads it.
"""

from __future__ import annotations

import functools
from typing import Any

from ..checkpoint.merged_config import FIELD


def let_transformers_build_merged_models() -> None:
    """Give each model the side paths that its configuration describes, as it is built; a second call does nothing.

    `post_init` ends the construction of every model, before transformers loads, places, shards or quantizes weights;
    it offers no hook there. `merge_and_unload` asks for the fusion `talan`, switched off: transformers refuses names
    that it doesn't know, so a program without this package fails where it would run the merged weights alone.
    """
    from transformers import fusion_mapping
    from transformers.modeling_utils import PreTrainedModel

    from ..checkpoint.merged_as_adapter import let_transformers_refuse_merged_models

    if FIELD in fusion_mapping._FUSION_REGISTRY:
        return
    fusion_mapping._FUSION_REGISTRY[FIELD] = fusion_mapping.ModuleFusionSpec()
    initialize = PreTrainedModel.post_init

    @functools.wraps(initialize)
    def post_init(self: Any) -> None:
        initialize(self)
        if getattr(self.config, FIELD, None):
            # Only here, since it needs PEFT.
            from .merged import attach_described

            attach_described(self)

    PreTrainedModel.post_init = post_init  # type: ignore[method-assign]
    let_transformers_refuse_merged_models()
