"""Makes what ships recorded under `assets/`, by one command each: `python -m benchmarks.recording what-if` and
`python -m benchmarks.recording run`."""
