"""The configuration of a TALAN adapter: a `LoraConfig` and the axes of the side path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

from packaging.version import InvalidVersion, Version
from peft.config import PeftConfig
from peft.tuners.lora import LoraConfig
from peft.utils import PeftType
from peft.utils.constants import DUMMY_TARGET_MODULES

from .checkpoint.card import SavedHalves, write_card
from .checkpoint.checks import CheckpointSource
from .functional.parameters import MEMORY_SCOPES, MIXERS, WRITEBACKS, MemoryScope, Mixer, SidePathOptions, Writeback
from .version import __version__

Position = Literal["output", "input"]
Trainable = Literal["joint", "side_path", "writeback", "low_rank"]

DEFAULT_DEPTHS: tuple[float, ...] = (0.33,)
"""Where the side path goes when `talan_layers` is None, as fractions of the depth; see docs/default_layers.md."""

LARGEST_COUNT = 2**20
"""No residual stream is nearly as wide, and products of two such numbers are still exact."""

LARGEST_FACTOR = 1e6
"""Of a perturbation or its gradient: what is far larger ends in infinities."""

INCOMPATIBLE_LORA_OPTIONS: dict[str, str] = {
    "layer_replication": "copied blocks would share one side path's place; replicate the layers before adding TALAN",
    "alora_invocation_tokens": "a side path also changes the tokens before the invocation; use a plain LoraConfig",
    "arrow_config": "Arrow routes between LoRA experts only; use a plain LoraConfig",
    "megatron_config": "Megatron's parallel layers run no decoder block of transformers; use a plain LoraConfig",
}


def _refuse(name: str, value: object, remedy: str) -> ValueError:
    return ValueError(f"{name}={value!r}: {remedy}")


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise _refuse(name, value, f"choose one of {', '.join(repr(choice) for choice in choices)}")


def _check_number(name: str, value: object, lowest: float, highest: float, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _refuse(name, value, remedy)
    if not math.isfinite(value) or not lowest <= value <= highest:
        raise _refuse(name, value, remedy)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_COUNT:
        raise _refuse(name, value, f"give a whole number of at least 1 and at most {LARGEST_COUNT}")


def _check_layers(layers: object) -> None:
    remedy = (
        "give block indices like [10, -1], fractions of the depth like [0.33, 0.66], 'all', or None for the default"
    )
    if layers is None or layers == "all":
        return
    if isinstance(layers, str) or not isinstance(layers, Sequence) or len(layers) == 0:
        raise _refuse("talan_layers", layers, remedy)
    if all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        return
    if all(isinstance(layer, float) and 0.0 <= layer <= 1.0 for layer in layers):
        return
    raise _refuse("talan_layers", layers, remedy)


@dataclass
class TalanConfig(LoraConfig):
    """Configure a TALAN adapter: every option of `LoraConfig`, and the axes of the side path (arXiv 2606.06902).

    `r=0`, or `target_modules=[]`, leaves the low-rank half out: the side path alone.

    Args:
        talan_layers (None | "all" | list[int] | list[float]): The decoder blocks with a side path: indices (negative
            ones count from the end), or fractions of the depth in [0, 1]. None: the measured default. Default None.
        talan_position ("output" | "input"): At which end of the block the side path reads and writes. Default
            `"output"`.
        talan_slots (int): M, the number of memory slots. Default 8.
        talan_dim (int): d, the latent width. Default 32.
        talan_mixer ("attention" | "linear" | "mlp"): How a token reads the slots. Default `"attention"`.
        talan_writeback ("add" | "gated" | "capped" | "orthogonal"): How the residual stream is changed. Default
            `"add"`.
        talan_cap (float): rho of the `capped` writeback, the largest |change| / |hidden state|. Default 0.1.
        talan_alpha (float): The strength of the perturbation; 0 leaves the low-rank half alone. Default 1.0.
        talan_dropout (float): The probability of dropping a component of the read-out in training. Default 0.0.
        talan_trainable ("joint" | "side_path" | "writeback" | "low_rank"): What requires a gradient: both halves, the
            side path, its write-back (and gate), or the low-rank half. Default `"joint"`.
        talan_grad_scale (float): gamma, by which the gradient that enters the side path is multiplied. Default 1.0.
        talan_memory_scope ("causal" | "bidirectional"): Whether a token's memory holds the tokens up to itself or
            those of the whole sequence (encoders; not for generation). Default `"causal"`.
        init_talan_weights (bool): True: the write-back starts at zero, so that a fresh adapter is its low-rank half.
            False: at random, for tests. Default True.
        talan_blocks (str | None): The name of the `nn.ModuleList` that holds the blocks, such as
            `"model.layers"`, where it can't be found. Default None.
        talan_hidden_size (int | None): H, the width of the residual stream, where it can't be found. Default None.
        talan_kept (bool): Whether the side path belongs to the model in whose folder it lies; `merge_and_unload()`
            sets it, leave it at False. Default False.
        talan_version (str | None): The version of this package that made the adapter, filled in by itself.
            Default None.

    Raises:
        ValueError: A field's value, type or combination can't work; the message names field, value and remedy.
    """

    talan_layers: Any = field(
        default=None,
        metadata={"help": "Decoder blocks with a side path: indices, fractions of the depth, 'all', None."},
    )
    talan_position: Position = field(
        default="output", metadata={"help": "At which end of the block: output or input."}
    )
    talan_slots: int = field(default=8, metadata={"help": "Number of memory slots."})
    talan_dim: int = field(default=32, metadata={"help": "Latent width."})
    talan_mixer: Mixer = field(default="attention", metadata={"help": "attention, linear or mlp."})
    talan_writeback: Writeback = field(default="add", metadata={"help": "add, gated, capped or orthogonal."})
    talan_cap: float = field(default=0.1, metadata={"help": "Largest |change| / |hidden state| of 'capped'."})
    talan_alpha: float = field(default=1.0, metadata={"help": "Strength of the perturbation."})
    talan_dropout: float = field(default=0.0, metadata={"help": "Dropout of the read-out."})
    talan_trainable: Trainable = field(
        default="joint", metadata={"help": "What trains: joint, side_path, writeback or low_rank."}
    )
    talan_grad_scale: float = field(default=1.0, metadata={"help": "Scale of the side path's gradient."})
    talan_memory_scope: MemoryScope = field(default="causal", metadata={"help": "causal or bidirectional."})
    init_talan_weights: bool = field(default=True, metadata={"help": "Whether the write-back starts at zero."})
    talan_blocks: str | None = field(default=None, metadata={"help": "Name of the ModuleList that holds the blocks."})
    talan_hidden_size: int | None = field(default=None, metadata={"help": "Width of the residual stream."})
    talan_kept: bool = field(
        default=False, metadata={"help": "Whether merge_and_unload() made it a part of the model beside it."}
    )
    talan_version: str | None = field(default=None, metadata={"help": "peft_talan version, leave empty to auto-fill."})

    @classmethod
    def from_lora(cls, lora: LoraConfig | str | PathLike[str], **options: Any) -> TalanConfig:
        """Take the low-rank half's options from a LoRA adapter; `warm_start` takes its weights, too.

        Args:
            lora: A LoRA configuration, or an adapter's folder or name on the hub.
            **options: Fields of `TalanConfig`, such as `talan_layers`; they go before the LoRA adapter's.

        Returns:
            The configuration, to be trained.

        Raises:
            ValueError: It is no LoRA adapter.
        """
        found = lora if isinstance(lora, PeftConfig) else PeftConfig.from_pretrained(str(lora))
        if not isinstance(found, LoraConfig) or found.peft_type != PeftType.LORA:
            raise _refuse("lora", lora, f"is no LoRA adapter but of type {found.peft_type}; give one of type LORA")
        taken = {option.name: getattr(found, option.name) for option in fields(LoraConfig) if option.init}
        return cls(**{**taken, "inference_mode": False, **options})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> TalanConfig:
        """Load the configuration of a checkpoint, as PEFT does before it loads the checkpoint itself.

        The tensors of that checkpoint are then checked before a model is touched. `PeftConfig.from_pretrained` loads a
        configuration alone, to train anew with it.

        Args:
            pretrained_model_name_or_path: The adapter's folder or its name on the hub.
            subfolder: A folder in it. Default None.
            **kwargs: What `hf_hub_download` takes: revision, token, cache_dir ...

        Returns:
            The configuration.
        """
        config: TalanConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        options = {"subfolder": subfolder, **cls._split_kwargs(kwargs)[0]}
        described = CheckpointSource.describe(config.to_dict())
        config.checkpoint_source = CheckpointSource(pretrained_model_name_or_path, options, described)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The fields, with sets in order: the same adapter gives the same file in every process."""
        return {name: sorted(value) if isinstance(value, set) else value for name, value in super().to_dict().items()}

    def __post_init__(self) -> None:
        """Check every field before any model is touched."""
        self._check_version()
        self._check_numbers()
        super().__post_init__()
        self.checkpoint_source: CheckpointSource | None = None
        self.saved_halves: SavedHalves | None = None
        self.peft_type = PeftType("TALAN")
        self._check_side_path()
        self._check_low_rank()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the configuration, and the model card if the adapter's tensors are being saved, too.

        Args:
            save_directory: The folder.
            **kwargs: As in PEFT.
        """
        super().save_pretrained(save_directory, **kwargs)
        saved = self.saved_halves
        self.saved_halves = None
        if saved is not None:
            card_folder = Path(save_directory).parent if saved.in_subfolder else None
            write_card(save_directory, self, saved.counts, card_folder=card_folder)

    def _check_version(self) -> None:
        if self.talan_version is None:
            self.talan_version = __version__
        try:
            newer = Version(self.talan_version).major > Version(__version__).major
        except (InvalidVersion, TypeError):
            raise _refuse("talan_version", self.talan_version, "is no version; leave the field at None") from None
        if newer:
            raise _refuse(
                "talan_version",
                self.talan_version,
                f"the adapter was made by a newer major version of peft_talan than the installed {__version__}; run "
                "`pip install -U peft-talan`",
            )

    def _check_side_path(self) -> None:
        _check_layers(self.talan_layers)
        if isinstance(self.talan_layers, tuple):
            self.talan_layers = list(self.talan_layers)
        _check_choice("talan_position", self.talan_position, get_args(Position))
        _check_choice("talan_mixer", self.talan_mixer, MIXERS)
        _check_choice("talan_writeback", self.talan_writeback, WRITEBACKS)
        _check_choice("talan_trainable", self.talan_trainable, get_args(Trainable))
        _check_choice("talan_memory_scope", self.talan_memory_scope, MEMORY_SCOPES)
        _check_count("talan_slots", self.talan_slots)
        _check_count("talan_dim", self.talan_dim)
        smallest = math.ulp(0.0)
        _check_number("talan_cap", self.talan_cap, smallest, math.inf, "give a positive number such as 0.1")
        factor = f"give a number of at least 0 and at most {LARGEST_FACTOR:g}, such as 1.0"
        _check_number("talan_alpha", self.talan_alpha, 0.0, LARGEST_FACTOR, factor)
        _check_number("talan_dropout", self.talan_dropout, 0.0, math.nextafter(1.0, 0.0), "give a number in [0, 1)")
        _check_number("talan_grad_scale", self.talan_grad_scale, 0.0, LARGEST_FACTOR, factor)
        if not isinstance(self.init_talan_weights, bool):
            raise _refuse("init_talan_weights", self.init_talan_weights, "give True or False")
        if not isinstance(self.talan_kept, bool):
            raise _refuse("talan_kept", self.talan_kept, "leave it at False; merge_and_unload() sets it")
        if self.talan_blocks is not None and (not isinstance(self.talan_blocks, str) or not self.talan_blocks):
            raise _refuse(
                "talan_blocks", self.talan_blocks, "give the ModuleList's name such as 'model.layers', or None"
            )
        if self.talan_hidden_size is not None:
            _check_count("talan_hidden_size", self.talan_hidden_size)
        if self.talan_memory_scope == "bidirectional" and self.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
            raise _refuse(
                "talan_memory_scope",
                self.talan_memory_scope,
                f"task_type={str(self.task_type)!r} generates, and a token must not see later ones; use 'causal'",
            )

    def _check_numbers(self) -> None:
        """Check what PEFT would pass on to torch as it is."""
        if isinstance(self.r, bool) or not isinstance(self.r, int) or not 0 <= self.r <= LARGEST_COUNT:
            raise _refuse("r", self.r, "give a rank of at least 1, or 0 for the side path alone")
        remedy = "give a number such as 8"
        _check_number("lora_alpha", self.lora_alpha, -math.inf, math.inf, remedy)
        _check_number("lora_dropout", self.lora_dropout, 0.0, 1.0, "give a number in [0, 1]")
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name)
            if pattern is not None and not isinstance(pattern, dict):
                raise _refuse(name, pattern, "give a dictionary of module names or patterns and numbers")
        for module, rank in (self.rank_pattern or {}).items():
            _check_count(f"rank_pattern[{module!r}]", rank)
        for module, alpha in (self.alpha_pattern or {}).items():
            _check_number(f"alpha_pattern[{module!r}]", alpha, -math.inf, math.inf, remedy)

    def _check_low_rank(self) -> None:
        for name, reason in INCOMPATIBLE_LORA_OPTIONS.items():
            if getattr(self, name, None):
                raise _refuse(name, getattr(self, name), f"does not work with TALAN: {reason}")
        no_targets = self.target_modules is not None and len(self.target_modules) == 0 and not self.target_parameters
        if self.r == 0 or no_targets:
            if self.talan_trainable == "low_rank":
                raise _refuse(
                    "talan_trainable",
                    self.talan_trainable,
                    "there is no low-rank half (r=0 or no target modules); use 'joint' or 'side_path'",
                )
            if self.target_parameters:
                raise _refuse("target_parameters", self.target_parameters, "needs r >= 1")
            # PEFT's own name for an adapter whose low-rank half matches no module.
            self.target_modules = DUMMY_TARGET_MODULES

    @property
    def has_low_rank_half(self) -> bool:
        """Whether there is a low-rank half at all."""
        return bool(self.target_modules != DUMMY_TARGET_MODULES)

    @property
    def side_path_options(self) -> SidePathOptions:
        """The axes that the operators of the side path take."""
        return SidePathOptions(
            mixer=self.talan_mixer,
            writeback=self.talan_writeback,
            scope=self.talan_memory_scope,
            cap=float(self.talan_cap),
            dropout=float(self.talan_dropout),
            grad_scale=float(self.talan_grad_scale),
        )
