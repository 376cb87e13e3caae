"""The tensors of one block's side paths, by tensor and adapter, named so that others find them as they find LoRA's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..config import TalanConfig
from ..functional.initialization import initial_parameters
from ..functional.parameters import MIXER_PARAMETERS, SidePathOptions, SidePathParameters


class AdapterTensor(nn.Module):
    """One tensor of one adapter, held by a module so that its name contains `.ADAPTER.`, as those of LoRA's layers do.

    Others find an adapter's tensors by that: TRL copies a trained adapter into its frozen reference adapter so. They
    are not called `weight`: PEFT's policy for FSDP would make each such module a unit of its own.

    Args:
        tensor: The initial values.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(tensor)

    def forward(self) -> torch.Tensor:
        """Give the tensor: accelerate fetches offloaded weights around the call of the module that holds them."""
        return self.values


class AdapterTensors(nn.Module):
    """Holds the side paths' tensors of one block: a container for each tensor, with an entry for each adapter.

    Args:
        hidden_size: H, the width of the residual stream.
        block_index: The block's index.
    """

    adapter_layer_names: tuple[str, ...] = (
        "lora_talan_read",
        "lora_talan_slot_bias",
        "lora_talan_slot_readout",
        "lora_talan_slot_in",
        "lora_talan_slot_out",
        "lora_talan_channel_in",
        "lora_talan_channel_out",
        "lora_talan_write",
        "lora_talan_gate",
    )
    tensor_prefix: str = "lora_talan_"
    """What the names of the containers add to those of the operators' parameters."""
    talan_options: dict[str, SidePathOptions]

    def __init__(self, hidden_size: int, block_index: int) -> None:
        super().__init__()
        self.in_features = self.out_features = hidden_size
        self.block_index = block_index
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ModuleDict())
        self.talan_options = {}
        # Follows the model's device and dtype, so that adapters that are added or loaded later are like it.
        self.placement: torch.Tensor
        self.register_buffer("placement", torch.empty(0), persistent=False)

    def add_tensors(self, adapter_name: str, config: TalanConfig) -> None:
        """Add an adapter's tensors, fresh.

        Args:
            adapter_name: The adapter's name.
            config: Its configuration.
        """
        options = config.side_path_options
        tensors = initial_parameters(
            options, self.in_features, config.talan_slots, config.talan_dim, zero_write=config.init_talan_weights
        )
        for name, tensor in tensors.items():
            container = getattr(self, f"{self.tensor_prefix}{name}")
            container[adapter_name] = AdapterTensor(tensor.to(self.placement.dtype))
        self.talan_options[adapter_name] = options
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        device = self.placement.device if device is None else device
        for name in self.adapter_layer_names:
            container = getattr(self, name)
            if adapter_name in container and not container[adapter_name].values.is_meta:
                container[adapter_name].to(device)

    def parameters_of(self, adapter_name: str) -> SidePathParameters:
        """The tensors of an adapter's side path, as its operators take them.

        Args:
            adapter_name: The adapter's name.

        Returns:
            The tensors.

        Raises:
            ValueError: Their values are on a disk where PEFT does not put them.
        """
        options = self.talan_options[adapter_name]
        names = MIXER_PARAMETERS[options.mixer]
        return SidePathParameters(
            read=self._tensor("read", adapter_name),
            mixer=tuple(self._tensor(name, adapter_name) for name in names),
            write=self._tensor("write", adapter_name),
            gate=self._tensor("gate", adapter_name) if options.writeback == "gated" else None,
        )

    def _tensor(self, name: str, adapter_name: str) -> torch.Tensor:
        # Decoding asks for them at every token; `self.lora_talan_read[adapter_name]` takes several times as long.
        container: Any = self._modules[f"{self.tensor_prefix}{name}"]
        holder = container._modules[adapter_name]
        tensor: torch.Tensor = holder.values
        if not tensor.is_meta:
            return tensor
        try:
            fetched: torch.Tensor = holder()
        except KeyError as error:
            raise ValueError(
                f"device_map: block {self.block_index} is on the disk, where PEFT does not write the side path of "
                f"adapter {adapter_name!r}; load the adapter before the model goes to disk (accelerate's "
                "dispatch_model or disk_offload), or map this block to a device or to 'cpu'"
            ) from error
        return fetched
