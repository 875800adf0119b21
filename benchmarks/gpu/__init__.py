"""What a CUDA machine is asked: `python -m benchmarks.gpu`."""
