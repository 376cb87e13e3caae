"""vLLM's worker on this machine, whose side paths know requests' strengths and adapters: the option `worker_cls`."""

from __future__ import annotations

from typing import Any

from vllm.utils.import_utils import resolve_obj_by_qualname

from .adapter_files import AdapterReader
from .adapter_layer import AdapterSidePaths
from .adapter_versions import NEEDED_ADAPTERS, as_it_is
from .checks import platform_worker
from .loader import layers_of


class SidePathWorker(resolve_obj_by_qualname(platform_worker())):  # type: ignore[misc]
    """The platform's worker; it also registers the loaders, which are imported with it."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, as vLLM does."""
        super().load_model(*args, **kwargs)
        layers = layers_of(self.get_model())
        # All side paths of a worker share them.
        self.page_strengths = next(iter(layers.values())).strengths
        if self.vllm_config.lora_config is not None:
            self._manage_adapters({name: one for name, one in layers.items() if isinstance(one, AdapterSidePaths)})

    def _manage_adapters(self, layers: dict[str, AdapterSidePaths]) -> None:
        """Let vLLM's managers of LoRA weights read side paths, and fill and empty their slots."""
        config, slots = self.model_config, self.get_model().lora_manager
        depth, hidden_size = config.hf_text_config.num_hidden_layers, config.get_hidden_size()
        self.reader = AdapterReader(layers, depth, hidden_size, slots)
        self.model_runner.lora_manager._lora_model_cls = self.reader
        for name, layer in layers.items():
            block = f"{name.rpartition('.')[0]}."
            beside = next(one for other, one in slots.modules.items() if other.startswith(block))
            slots.register_module(name, layer)
            layer.set_mapping(beside.punica_wrapper)

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run a step, as vLLM does, once the strengths of its requests, and the adapters they need, are known."""
        self.page_strengths.follow(scheduler_output)
        if self.vllm_config.lora_config is not None:
            # The steps of vLLM's warm-up of kernels don't come from the scheduler.
            self.reader.keep(getattr(scheduler_output, NEEDED_ADAPTERS, ()))
        return super().execute_model(scheduler_output)

    def add_lora(self, lora_request: Any) -> bool:
        """Load an adapter before requests name it, by the number that they will have."""
        version = as_it_is(lora_request)
        if self.vllm_config.lora_config is None:  # vLLM says that
            return bool(super().add_lora(version))
        with self.reader.asked_for(version.lora_path, version.lora_int_id):
            return bool(super().add_lora(version))

    def sleep(self, level: int = 1) -> None:
        """Go to sleep, as vLLM does; at level 2 slots lose their LoRA weights, and are filled again when needed."""
        if level > 1 and self.vllm_config.lora_config is not None:
            slots = self.get_model().lora_manager
            for number in list(slots.list_adapters()):
                slots.deactivate_adapter(number)
        super().sleep(level)
