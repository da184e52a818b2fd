"""Cases of the kernels of a model's step: products in every format, sampling, inputs and outputs of a step.

As in `tinyvllm.kernels.cases`, an operation draws inputs and computes in float64 numpy what a kernel must return.
"""
