"""Checks and measurements on GPUs: `python -m benchmarks.gpu_report`. See benchmarks/README.md."""
