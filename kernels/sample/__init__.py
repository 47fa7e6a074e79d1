"""From logits to tokens and logprobs."""

from kernels.sample.naive import SampleParams, logprobs, sample

__all__ = ["SampleParams", "logprobs", "sample"]
