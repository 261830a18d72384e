"""Kernels and their plain-torch twins. This room imports nothing else of the project.

`entropy`, `probe`, `route` and `conditional` launch CUDA kernels (sources in `cuda/`) on torch's current stream and take CUDA
tensors only; `reference` has the same functions in plain torch for any device. Nothing falls back from one to the other;
`choose` takes either, for work that nobody asked one of them to do.
"""
