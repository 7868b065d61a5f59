"""hf_turbo.kernels: fused ops for fine-tuning, usable on their own.

One op is one file: torch reference, Triton kernel, autograd Function, public function, in that order. This package
imports torch and triton and nothing else.
"""
