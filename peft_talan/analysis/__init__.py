"""Looks inside: what LoRA weights and side path do to the residual stream, measured, drawn and logged.

The public functions are imported from here: `from peft_talan.analysis import measure_blocks, SidePathMonitor`.
"""

from .measure import measure_blocks, measure_propagation, measure_reads, to_rows
from .monitor import SidePathMonitor
from .plots import plot_blocks, plot_propagation, plot_slot_usage, plot_token_slots
from .report import analyze

__all__ = [
    "SidePathMonitor",
    "analyze",
    "measure_blocks",
    "measure_propagation",
    "measure_reads",
    "plot_blocks",
    "plot_propagation",
    "plot_slot_usage",
    "plot_token_slots",
    "to_rows",
]
