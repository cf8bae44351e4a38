"""Scripts that measure: `python -m benchmarks.recipes` and `python -m benchmarks.profile_step`."""
