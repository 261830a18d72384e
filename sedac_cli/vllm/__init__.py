"""SEDAC inside vLLM: a plugin that gates the MLPs of the model vLLM serves, and touches none of vLLM's files.

    SEDAC_ENABLED=1 SEDAC_GATE=learned:sedac_data/sedac_gates.pth@0.25 vllm serve MODEL

`plugin.register` is what vLLM calls in each of its processes; it costs nothing unless a gate is asked for.
"""
