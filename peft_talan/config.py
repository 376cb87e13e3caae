"""The configuration of a TALAN adapter: a `LoraConfig` and the axes of the side path."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from os import PathLike
from typing import Any

from packaging.version import InvalidVersion, Version
from peft.config import PeftConfig
from peft.tuners.lora import LoraConfig, LoraRuntimeConfig
from peft.utils import PeftType
from peft.utils.constants import DUMMY_TARGET_MODULES

from .axes import LARGEST_COUNT, SidePathAxes, check_axes, check_count, check_number, plain_value, refusal
from .functional.parameters import SidePathOptions
from .version import __version__

DEFAULT_DEPTHS: tuple[float, ...] = (0.33,)
"""Where the side path goes when `talan_layers` is None, as fractions of the depth; see docs/default_layers.md."""

SET_BY_PEFT: tuple[str, ...] = ("inference_mode", "base_model_name_or_path", "revision", "modules_to_save")
"""Fields that PEFT sets or extends after it has loaded a configuration and before it loads the tensors."""

INCOMPATIBLE_LORA_OPTIONS: dict[str, str] = {
    "layer_replication": "copied blocks would share one side path's place; replicate the layers before adding TALAN",
    "alora_invocation_tokens": "a side path also changes the tokens before the invocation; use a plain LoraConfig",
    "arrow_config": "Arrow routes between LoRA experts only; use a plain LoraConfig",
    "megatron_config": "Megatron's parallel layers run no decoder block of transformers; use a plain LoraConfig",
}


@dataclass(frozen=True)
class CheckpointLocation:
    """Where the tensors lie that belong to a configuration which was loaded.

    Args:
        model_id (str): A folder, or a repository on the hub.
        options (Mapping[str, Any]): What `hf_hub_download` takes: revision, subfolder, token ...
        fields (Mapping[str, Any]): The configuration's fields as they were loaded.
    """

    model_id: str
    options: Mapping[str, Any]
    fields: Mapping[str, Any]


@dataclass
class TalanRuntimeConfig(LoraRuntimeConfig):
    """What belongs to one use of a configuration and is not saved with it.

    Args:
        checkpoint (CheckpointLocation | None): The checkpoint that the configuration was loaded with and that PEFT
            loads next, filled in by `TalanConfig.from_pretrained`. Default None.
        after_save (Callable | None): What a model with the adapter does with the folder that PEFT has saved it to.
            Default None.
    """

    checkpoint: CheckpointLocation | None = None
    after_save: Callable[[str], None] | None = None


@dataclass
class TalanConfig(SidePathAxes, LoraConfig):
    """Configure a TALAN adapter: every option of `LoraConfig`, and the axes of the side path (arXiv 2606.06902).

    `r=0`, or `target_modules=[]`, leaves the LoRA weights out: the side path alone.

    Args:
        talan_layers (None | "all" | "recall" | "every_N" | Sequence[int] | Sequence[float]): The decoder blocks with a
            side path: indices (negative ones count from the end), fractions of the depth in [0, 1], the last of each
            N blocks (`"every_4"`: indices 3, 7, 11 ...), or five in the upper half (`"recall"`: 0.55, 0.65, 0.75, 0.85
            and 0.95 of the depth). None: the measured default. Default None.
        talan_position ("output" | "input"): At which end of the block the side path reads and writes. Default
            `"output"`.
        talan_slots (int): M, the number of memory slots. Default 8.
        talan_dim (int): d, the latent width. Default 32.
        talan_mixer ("attention" | "linear" | "mlp" | "delta"): How a token reads the slots; `"delta"`: keys and values
            in place of slots that are means, by the delta rule. Default `"attention"`.
        talan_soft_cap (float): c of `e = exp(c tanh(a / c))`, in [1, 10]: a token weighs at most e^(2 c) times as much
            as another in a slot. More is for texts of more than some ten thousand tokens. Default 5.0.
        talan_writeback ("add" | "gated" | "capped" | "orthogonal" | "relative"): How the residual stream is changed.
            Default `"add"`.
        talan_cap (float): rho of the `capped` writeback, the largest |change| / |hidden state|. Default 0.1.
        talan_alpha (float): The strength of the perturbation; 0: LoRA weights only. Default 1.0.
        talan_dropout (float): The probability of dropping a component of the read-out in training. Default 0.0.
        talan_trainable ("joint" | "side_path" | "writeback" | "low_rank"): What requires a gradient: LoRA weights and
            side path, the side path, its write-back (and gate), or the LoRA weights. Default `"joint"`.
        talan_grad_scale (float): gamma, by which the gradient that enters the side path is multiplied. Default 1.0.
        talan_memory_scope ("causal" | "bidirectional"): Whether a token's memory holds the tokens up to itself or
            those of the whole sequence (encoders; not for generation). Default `"causal"`.
        init_talan_weights (bool): True: the write-back starts at zero, so that a fresh adapter is its LoRA weights
            alone. False: at random, for tests. Default True.
        talan_blocks (str | None): The name of the `nn.ModuleList` that holds the blocks, such as
            `"model.layers"`, if it can't be found. Default None.
        talan_hidden_size (int | None): H, the width of the residual stream, if it can't be found. Default None.
        talan_version (str | None): The version of this package that made the adapter, filled in by itself.
            Default None.

    Raises:
        ValueError: A field's value, type or combination can't work; the message names field, value and remedy.

    Examples:
        >>> from peft import get_peft_model
        >>> from peft_talan import TalanConfig
        >>> config = TalanConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", talan_layers=[0.33, 0.66])
        >>> model = get_peft_model(base_model, config)
    """

    init_talan_weights: bool = field(default=True, metadata={"help": "Whether the write-back starts at zero."})
    talan_blocks: str | None = field(default=None, metadata={"help": "Name of the ModuleList that holds the blocks."})
    talan_hidden_size: int | None = field(default=None, metadata={"help": "Width of the residual stream."})
    talan_version: str | None = field(default=None, metadata={"help": "peft_talan version, leave empty to auto-fill."})
    runtime_config: LoraRuntimeConfig = field(
        default_factory=TalanRuntimeConfig, metadata={"help": "What is not saved with the adapter."}
    )

    @classmethod
    def from_lora(cls, lora: LoraConfig | str | PathLike[str], **options: Any) -> TalanConfig:
        """Take the LoRA weights' options from a LoRA adapter; `warm_start` takes its weights, too.

        Args:
            lora: A LoRA configuration, or an adapter's folder or name on the hub.
            **options: Fields of `TalanConfig`, such as `talan_layers`; they replace the LoRA adapter's.

        Returns:
            The configuration, to be trained.

        Raises:
            ValueError: The adapter is of another type than LoRA.

        Examples:
            >>> config = TalanConfig.from_lora("path/to/lora", talan_layers=[0.5])
        """
        found = lora if isinstance(lora, PeftConfig) else PeftConfig.from_pretrained(str(lora))
        if not isinstance(found, LoraConfig) or found.peft_type != PeftType.LORA:
            raise refusal("lora", lora, f"expected an adapter of type LORA, got one of type {found.peft_type}")
        taken = {option.name: getattr(found, option.name) for option in fields(LoraConfig) if option.init}
        return cls(**{**taken, "inference_mode": False, **options})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> TalanConfig:
        """Load the configuration of a checkpoint, as PEFT does before it loads the checkpoint itself.

        The tensors of that checkpoint are then checked before a model is touched. `PeftConfig.from_pretrained` loads a
        configuration alone, to train again with it.

        Args:
            pretrained_model_name_or_path: The adapter's folder or its name on the hub.
            subfolder: A folder in it. Default None.
            **kwargs: What `hf_hub_download` takes: revision, token, cache_dir ...

        Returns:
            The configuration.

        Raises:
            ValueError: There is no configuration, or a field can't be used.
        """
        config: TalanConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        options = {"subfolder": subfolder, **cls._split_kwargs(kwargs)[0]}
        given = {name: value for name, value in options.items() if value is not None}
        location = CheckpointLocation(str(pretrained_model_name_or_path), given, config._fields_of_checkpoint())
        config.runtime_config = TalanRuntimeConfig(checkpoint=location)
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the configuration into a folder; of a model that PEFT saves it is the last file but the card.

        Args:
            save_directory: The folder.
            **kwargs: What PEFT passes as it saves a model.
        """
        super().save_pretrained(save_directory, **kwargs)
        after_save = getattr(self.runtime_config, "after_save", None)
        if after_save is not None and "auto_mapping_dict" in kwargs:
            after_save(save_directory)

    def checkpoint_to_load(self) -> CheckpointLocation | None:
        """Where the tensors lie that PEFT is about to load.

        Returns:
            The checkpoint that this configuration was loaded with; None if there was none, or if a field was changed
            since, so that the configuration is for a new adapter.
        """
        location: CheckpointLocation | None = getattr(self.runtime_config, "checkpoint", None)
        return None if location is None or location.fields != self._fields_of_checkpoint() else location

    def _fields_of_checkpoint(self) -> dict[str, Any]:
        return {name: value for name, value in self.to_dict().items() if name not in SET_BY_PEFT}

    def to_dict(self) -> dict[str, Any]:
        """The fields, with sets in order: the same adapter gives the same file in every process."""
        return {name: sorted(value) if isinstance(value, set) else value for name, value in super().to_dict().items()}

    def __post_init__(self) -> None:
        """Check every field before any model is touched."""
        for option in fields(self):
            # Only what can be saved is trained.
            setattr(self, option.name, plain_value(getattr(self, option.name)))
        self._check_version()
        self._check_numbers()
        super().__post_init__()
        self.peft_type = PeftType("TALAN")
        self._check_side_path()
        self._check_low_rank()
        for name, value in self.to_dict().items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise refusal(name, value, f"can't be saved in a JSON file ({error}); give plain values") from None

    def _check_version(self) -> None:
        if self.talan_version is None:
            self.talan_version = __version__
        try:
            newer = Version(self.talan_version).major > Version(__version__).major
        except (InvalidVersion, TypeError):
            raise refusal(
                "talan_version", self.talan_version, "expected a version such as '0.1.0'; leave the field at None"
            ) from None
        if newer:
            raise refusal(
                "talan_version",
                self.talan_version,
                f"the adapter was made by a newer major version of peft_talan than the installed {__version__}; "
                "update the package",
            )

    def _check_side_path(self) -> None:
        check_axes(self)
        if not isinstance(self.init_talan_weights, bool):
            raise refusal("init_talan_weights", self.init_talan_weights, "give True or False")
        if self.talan_blocks is not None and (not isinstance(self.talan_blocks, str) or not self.talan_blocks):
            raise refusal(
                "talan_blocks", self.talan_blocks, "give the ModuleList's name such as 'model.layers', or None"
            )
        if self.talan_hidden_size is not None:
            check_count("talan_hidden_size", self.talan_hidden_size)
        if self.talan_memory_scope == "bidirectional" and self.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
            raise refusal(
                "talan_memory_scope",
                self.talan_memory_scope,
                f"task_type={str(self.task_type)!r} generates, and a token must not see later ones; use 'causal'",
            )

    def _check_numbers(self) -> None:
        """Check what PEFT would pass on to torch as it is."""
        if isinstance(self.r, bool) or not isinstance(self.r, int) or not 0 <= self.r <= LARGEST_COUNT:
            raise refusal("r", self.r, "give a rank of at least 1, or 0 for the side path alone")
        remedy = "give a number such as 8"
        check_number("lora_alpha", self.lora_alpha, -math.inf, math.inf, remedy)
        check_number("lora_dropout", self.lora_dropout, 0.0, 1.0, "give a number in [0, 1]")
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name)
            if pattern is not None and not isinstance(pattern, dict):
                raise refusal(name, pattern, "give a dictionary of module names or patterns and numbers")
        for module, rank in (self.rank_pattern or {}).items():
            check_count(f"rank_pattern[{module!r}]", rank)
        for module, alpha in (self.alpha_pattern or {}).items():
            check_number(f"alpha_pattern[{module!r}]", alpha, -math.inf, math.inf, remedy)

    def _check_low_rank(self) -> None:
        for name, reason in INCOMPATIBLE_LORA_OPTIONS.items():
            if getattr(self, name, None):
                raise refusal(name, getattr(self, name), f"does not work with TALAN: {reason}")
        no_targets = self.target_modules is not None and len(self.target_modules) == 0 and not self.target_parameters
        if self.r == 0 or no_targets:
            if self.talan_trainable == "low_rank":
                raise refusal(
                    "talan_trainable",
                    self.talan_trainable,
                    "there are no LoRA weights (r=0 or no target modules); use 'joint' or 'side_path'",
                )
            if self.target_parameters:
                raise refusal("target_parameters", self.target_parameters, "needs r >= 1")
            # PEFT's own name for an adapter whose LoRA weights match no module.
            self.target_modules = DUMMY_TARGET_MODULES

    @property
    def has_lora_weights(self) -> bool:
        """Whether there are LoRA weights at all."""
        return bool(self.target_modules != DUMMY_TARGET_MODULES)

    @property
    def side_path_options(self) -> SidePathOptions:
        """The axes that the operators of the side path take."""
        return SidePathOptions(
            mixer=self.talan_mixer,
            writeback=self.talan_writeback,
            scope=self.talan_memory_scope,
            cap=float(self.talan_cap),
            soft_cap=float(self.talan_soft_cap),
            dropout=float(self.talan_dropout),
            grad_scale=float(self.talan_grad_scale),
        )
