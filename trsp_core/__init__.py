"""TRSP, Two-Stage Regularization-Based Structured Pruning (arXiv:2505.18232), as a library of events.

Two halves. Torch-free, imported in milliseconds: `errors`, `knobs`, `config`, `events`, `state`, `store`, `jobs`,
`spare`, `models`, `downloads`, `hub`, `forecast`, `answers`, `workbench`, `comparison`. With torch, imported only in
the process that runs a model: `engine`, `lab`, `surgery`, `search`, `data`, `load`, `measure`, `generate`, and for
the workbench's child `bench`, `shelf`, `columns`, `what_if`, `heads`. The interface between them is a run folder, see
`store`; for the workbench a pipe, see `answers`.
"""

import os

__version__ = "0.1.0"

# Threads that wait for each other sleep instead of spinning: where two processes share the cores (a run and the app, or
# two visitors), products are five to ten times faster; alone a product loses some 50 microseconds, which counts for
# the smallest (see `generate`). OpenMP reads it when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
