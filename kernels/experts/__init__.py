"""Routed expert FFNs of one layer, already weighted and summed."""

from kernels.experts.naive import experts, slot_table

__all__ = ["experts", "slot_table"]
