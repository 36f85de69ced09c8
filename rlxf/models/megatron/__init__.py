"""megatron-core as the one backend of actor, reference and reward model, on every device.

Import a module of this package only after ``Platform.prepare_megatron()``; ``parallel.init_parallel`` does it.
"""
