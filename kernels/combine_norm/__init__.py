"""The residual stream's update and the norm that follows it."""

from kernels.combine_norm.naive import combine_norm

__all__ = ["combine_norm"]
