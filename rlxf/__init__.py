"""rlxf: online RLHF on Ray, with Megatron-core training and vLLM rollouts, on NPU, CUDA and CPU."""

__version__ = "0.1.0"
