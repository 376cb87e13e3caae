"""The private names of PEFT, transformers, torch and vLLM that the package needs, each with the reason.

Private functions are imported here and from here alone. Methods and attributes are listed. A test looks for each name
in the installed versions and says which is gone.
"""

from __future__ import annotations

from peft.tuners.lora.model import _adapter_names_pre_forward_hook, _get_encoder
from peft.tuners.tuners_utils import _get_tuner_state_dict_key_prefixes
from peft.utils.other import _set_layer_requires_grad

__all__ = [
    "ATTRIBUTES",
    "FUNCTIONS",
    "METHODS",
    "OURS",
    "PLACES",
    "UNDOCUMENTED",
    "VLLM",
    "VLLM_ATTRIBUTES",
    "_adapter_names_pre_forward_hook",
    "_get_encoder",
    "_get_tuner_state_dict_key_prefixes",
    "_set_layer_requires_grad",
]

FUNCTIONS: dict[str, str] = {
    "peft.tuners.lora.model._adapter_names_pre_forward_hook": "Gives a layer the adapter of each row of a batch.",
    "peft.tuners.lora.model._get_encoder": "Beam search repeats the rows of the decoder, not those of the encoder.",
    "peft.tuners.tuners_utils._get_tuner_state_dict_key_prefixes": "The names by which PEFT finds its tensors.",
    "peft.utils.other._set_layer_requires_grad": "Switches training on and off as PEFT does.",
}
"""Functions, imported above."""

METHODS: dict[str, str] = {
    "peft.config.PeftConfigMixin._get_peft_type": "Extended: see PLACES.",
    "peft.config.PeftConfigMixin._split_kwargs": "Called: tells the arguments for the hub from those for the fields.",
    "peft.tuners.lora.LoraModel._convert_state_dict_for_initial_model": "Overridden: it would lose the side path.",
    "peft.tuners.lora.LoraModel._enable_peft_forward_hooks": "Overridden: the adapter of each row of a batch.",
    "peft.tuners.lora.LoraModel._get_adapter_state_dict": "Overridden: finds tensors inside of torch's wrappers.",
    "peft.tuners.lora.LoraModel._remap_adapter_state_dict_for_load": "Overridden: checks what is loaded.",
    "peft.tuners.lora.LoraModel._remove_adapter_name_from_key": "Overridden: no wrapper's name in a file.",
    "peft.tuners.tuners_utils.BaseTunerLayer._active_adapter": "Set: where PEFT keeps the active adapters of a layer.",
    "peft.tuners.tuners_utils.BaseTunerLayer._disable_adapters": "Set and read: whether a layer's adapters are off.",
    "peft.tuners.tuners_utils.BaseTunerLayer._freeze_non_trainable_peft_weights": "Called: the trainability scope.",
    "peft.tuners.tuners_utils.BaseTunerLayer._get_available_adapters": "Called: which adapters a layer has.",
    "peft.tuners.tuners_utils.BaseTunerLayer._move_adapter_to_device_of_base_layer": "Overridden: a side path has no "
    "base layer.",
    "torch._C": "The module of the next name.",
    "torch._C._are_functorch_transforms_active": "Called: whether `torch.func` is transforming the operator.",
    "torch.autograd.forward_ad._current_level": "Read: whether forward-mode derivatives are being taken.",
    "torch._assert_async": "Called: a check on the device, without waiting for it.",
    "torch._dynamo": "Called: what runs while a forward pass is traced.",
    "torch._foreach_copy_": "Called: copies an adapter in half precision, in one operation.",
    "torch.Tensor._version": "Read: whether somebody else has written into a tensor.",
    "transformers.generation.continuous_batching.ContinuousBatchingManager.__init__": "Extended: the last place that "
    "can refuse before a request is taken.",
    "transformers.generation.continuous_batching.PagedAttentionCache.perform_cache_copy": "Replaced on an instance: "
    "states follow copies of pages.",
    "transformers.PreTrainedConfig._attn_implementation": "Read: the form in which a model hands masks to its blocks.",
    "transformers.utils.output_capturing._active_collector": "Read: whether hidden states are being recorded.",
    "transformers.PreTrainedModel._hf_peft_config_loaded": "Read and reset: whether a model has an adapter.",
    "transformers.PreTrainedModel._no_split_modules": "Read: the classes of a model's decoder blocks.",
    "transformers.fusion_mapping._FUSION_REGISTRY": "Extended: see PLACES.",
    "transformers.utils.hub.PushToHubMixin._upload_modified_files": "Extended: see PLACES.",
}
"""Methods and class attributes: those that are overridden, and those that are called or read on instances."""

ATTRIBUTES: dict[str, str] = {
    "torch.nn.modules.module._forward_pre_hooks": "Read: whether a decoder has its hook.",
    "torch.nn.modules.module._modules": "Read: a wrapper shows the attributes of the module inside, not its children.",
    "torch._dynamo.eval_frame._orig_mod": "A part of the names in a state dict: the module inside of torch.compile.",
    "torch.distributed.fsdp._common_utils._fsdp_wrapped_module": "The same for FSDP.",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper._checkpoint_wrapped_module": "The same for "
    "activation checkpointing.",
    "transformers.modeling_utils._gradient_checkpointing_func": "Replaced on a block: its side paths are recomputed.",
    "transformers.core_model_loading._is_hf_initialized": "Read, and asked of us: which tensors a file has filled.",
    "transformers._device_mesh": "Read: the processes of tensor parallelism.",
}
"""Attributes that only instances have, with the module or package that sets them."""

UNDOCUMENTED: dict[str, str] = {
    "peft.utils.AuxiliaryTrainingWrapper": "Modules and tokens that are trained beside an adapter and saved.",
    "peft.utils.constants.DUMMY_TARGET_MODULES": "PEFT's name for an adapter whose LoRA weights match no module.",
    "peft.utils.integrations.init_empty_weights": "Creates an adapter on the meta device.",
    "peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers": "Experts that are fused.",
}
"""Names without an underscore that no documentation page promises."""

VLLM: dict[str, str] = {
    "vllm.engine.arg_utils.EngineArgs.create_engine_config": "Replaced: see PLACES.",
    "vllm.engine.arg_utils.EngineArgs.from_cli_args": "Replaced: see PLACES.",
    "vllm.compilation.breakable_cudagraph.eager_break_during_capture": "Called: the operator runs outside of graphs.",
    "vllm.config.CUDAGraphMode": "Read and set: no CUDA graph has a side path inside.",
    "vllm.forward_context.ForwardContext": "Read: what attention is told of a batch; carries the pages.",
    "vllm.forward_context.get_forward_context": "Called: by the operator.",
    "vllm.logger.init_logger": "Called: where vLLM logs.",
    "vllm.lora.layers.BaseLayerWithLoRA": "Extended: side paths lie in slots, as LoRA weights do.",
    "vllm.lora.lora_model.LoRAModel.from_local_checkpoint": "Called: reads an adapter's LoRA weights.",
    "vllm.lora.lora_model.LoRAModel.from_lora_tensors": "Extended: hands on what vLLM reads and skips.",
    "vllm.lora.lora_weights.LoRALayerWeights": "Created: the form in which a side path's tensors get to a slot.",
    "vllm.lora.model_manager.LoRAModelManager.capacity": "Read: how many adapters stay loaded.",
    "vllm.lora.model_manager.LoRAModelManager.list_adapters": "Called: which adapters are loaded.",
    "vllm.lora.model_manager.LoRAModelManager.register_module": "Called: side paths get their tensors as LoRA layers "
    "do.",
    "vllm.lora.peft_helper.PEFTHelper.from_local_dir": "Called: whether vLLM and the reader have read the same file.",
    "vllm.lora.punica_wrapper.PunicaWrapperBase.token_lora_indices": "Read: the slot of each token.",
    "vllm.lora.request.LoRARequest": "Created: an adapter under the number of its content.",
    "vllm.lora.utils.get_adapter_absolute_path": "Called: where an adapter's files are.",
    "vllm.model_executor.layers.attention.Attention": "Read: the layer's name and its pages.",
    "vllm.model_executor.model_loader.BaseModelLoader.create_model": "Overridden: side paths are attached.",
    "vllm.model_executor.model_loader.BaseModelLoader.load_weights": "Overridden: what was loaded is looked at.",
    "vllm.model_executor.model_loader.DefaultModelLoader": "Extended: the loader of folders.",
    "vllm.model_executor.model_loader.DummyModelLoader": "Extended: the loader of random weights.",
    "vllm.model_executor.model_loader.register_model_loader": "Called: for the option `load_format`.",
    "vllm.model_executor.model_loader.reload.record_metadata_for_reloading": "Called: side paths are reloaded, too.",
    "vllm.platforms.current_platform": "Read: which worker this machine has.",
    "vllm.utils.import_utils.resolve_obj_by_qualname": "Called: finds that worker.",
    "vllm.utils.torch_utils.direct_register_custom_op": "Called: registers the operator.",
    "vllm.v1.attention.backend.AttentionType": "Read: attention with a cache of its own.",
    "vllm.v1.core.kv_cache_manager.KVCacheManager.allocate_slots": "Called: pages for a request's next tokens.",
    "vllm.v1.core.kv_cache_manager.KVCacheManager.get_blocks": "Called: the pages that a step writes.",
    "vllm.v1.core.kv_cache_manager.KVCacheManager.new_step_starts": "Called: a step begins.",
    "vllm.v1.core.sched.async_scheduler.AsyncScheduler": "Extended: the option `scheduler_cls`.",
    "vllm.v1.core.sched.scheduler.Scheduler._free_blocks": "Overridden: a request that is gone needs no adapter.",
    "vllm.v1.core.sched.scheduler.Scheduler.add_request": "Overridden: requests' strengths, and their adapters.",
    "vllm.v1.core.sched.scheduler.Scheduler.finish_requests": "Called: ends a refused request.",
    "vllm.v1.core.sched.scheduler.Scheduler.schedule": "Overridden: workers hear which adapters requests need.",
    "vllm.v1.core.sched.scheduler.Scheduler.update_from_output": "Overridden: the error of a refused request.",
    "vllm.v1.engine.EngineCoreOutput": "Created: that error.",
    "vllm.v1.engine.EngineCoreOutputs": "Created: that error.",
    "vllm.v1.engine.core.EngineCore.add_lora": "Replaced: see PLACES.",
    "vllm.v1.request.Request.update_block_hashes": "Called: what a request's prefixes are known by.",
    "vllm.v1.request.RequestStatus.FINISHED_ERROR": "Read: how a refused request ends.",
    "vllm.v1.sample.logits_processor.LogitsProcessor.validate_params": "Overridden: refuses a request in time.",
    "vllm.v1.worker.gpu.sample.logits_processor.LogitsProcessor.validate_params": "The same for the second runner.",
    "vllm.v1.worker.worker_base.WorkerBase.add_lora": "Overridden: an adapter is loaded by the number of its content.",
    "vllm.v1.worker.worker_base.WorkerBase.execute_model": "Overridden: strengths are known before a step.",
    "vllm.v1.worker.worker_base.WorkerBase.load_model": "Overridden: finds the side paths.",
}
"""Names of vLLM 0.32.0, which promises none of them to plug-ins. Only the three of PLACES are replaced."""

VLLM_ATTRIBUTES: dict[str, str] = {
    "vllm.lora.model_manager.lora_manager": "Read: a model's manager of slots.",
    "vllm.lora.worker_manager._lora_model_cls": "Set: what reads adapters, see PLACES.",
    "vllm.v1.core.sched.scheduler.lora_config": "Read: whether requests can need adapters.",
    "vllm.v1.core.sched.scheduler.requests": "Read: whether a request is new.",
    "vllm.v1.engine.core.scheduler": "Read: an engine's scheduler.",
}
"""Attributes that only instances have, with vLLM's module that sets them."""

PLACES: dict[str, str] = {
    "peft.optimizers.lorafa.LoraFAOptimizer.__init__": "It pairs all tensors with `lora` in their names, A before B. "
    "Seen in PEFT 0.21.",
    "peft.PeftModel.load_adapter": "It reads no configuration where the adapter is there already. Seen in PEFT 0.21.",
    "peft.config.PeftConfigMixin._get_peft_type": "It and the next read the configuration of what PEFT loads, and say "
    "of a merged model only that it has no `adapter_config.json`. Seen in PEFT 0.21.",
    "peft.config.PeftConfigMixin.from_pretrained": "The same.",
    "transformers.integrations.peft.PeftAdapterMixin.load_adapter": "The same of transformers. Seen in transformers "
    "5.19 and 5.23.",
    "transformers.PreTrainedModel.post_init": "A merged model gets its side paths as it is built, before its weights "
    "are loaded. Seen in transformers 5.19 and 5.23.",
    "transformers.cache_utils.Cache": "What crops, reorders, repeats or resets a cache does so to its memories; and "
    "these are an attribute of it. Seen in transformers 5.19 and 5.23.",
    "transformers.fusion_mapping._FUSION_REGISTRY": "A merged model's configuration names the fusion `talan`, which "
    "transformers without this package refuses. Seen in transformers 5.19 and 5.23.",
    "transformers.generation.continuous_batching.ContinuousBatchingManager.__init__": "The last place that can refuse "
    "a model before requests are taken. Seen in transformers 5.19 and 5.23.",
    "transformers.generation.continuous_batching.PagedAttentionCache.perform_cache_copy": "Of one paged cache: pages "
    "of memories are copied as those of keys are. Seen in transformers 5.19 and 5.23.",
    "transformers.trainer_callback.CallbackHandler.on_init_end": "What trainers would do wrong in silence is "
    "refused; a callback would have to be given to each. Seen in transformers 5.19 and 5.23.",
    "transformers.utils.hub.PushToHubMixin._upload_modified_files": "`push_to_hub` puts another model card over the "
    "saved one just before. Seen in transformers 5.19 and 5.23.",
    "vllm.engine.arg_utils.EngineArgs.create_engine_config": "A model, or adapters, with side paths name the classes "
    "that serve them in vLLM's own options. Seen in vLLM 0.32.",
    "vllm.engine.arg_utils.EngineArgs.from_cli_args": "Room is made for the adapters of `--lora-modules`, of which an "
    "engine's configuration does not know. Seen in vLLM 0.32.",
    "vllm.lora.worker_manager.WorkerLoRAManager.__init__": "The attribute `_lora_model_cls` of a worker's manager "
    "reads side paths, too: model runners leave the argument `lora_model_cls` out. Seen in vLLM 0.32.",
    "vllm.v1.engine.core.EngineCore.add_lora": "An engine's scheduler hears which adapters are loaded in place: "
    "requests mean what was loaded last, whatever the files hold by then. Seen in vLLM 0.32.",
}
"""What of ours stays on another library's object, and why: for none of these does the library have a hook."""

OURS = "calls_peft_talan"
"""Marks such a method of ours, so that it is put there once; other decorators leave `__wrapped__`, too."""
