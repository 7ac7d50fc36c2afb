"""What the benchmark scripts beside this folder share: models, methods, gate, timing, memory, report."""
