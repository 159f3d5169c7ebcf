"""The parts of `experiments.benchmark`: workloads, both sides, turns, peaks, curves."""
