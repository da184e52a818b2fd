"Kernels of our own: Metal, CUDA and C, in tinygrad's lazy graph."
