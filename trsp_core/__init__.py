"""TRSP, Two-Stage Regularization-Based Structured Pruning (arXiv:2505.18232), as a library of events.

Two halves. Torch-free, imported in milliseconds: `errors`, `knobs`, `config`, `events`, `state`, `store`, `jobs`,
`models`, `forecast`. With torch, imported only in the process that runs a model: `engine`, `lab`, `surgery`, `data`,
`load`, `measure`, `generate`. The whole interface between them is a run folder; see `store`.
"""

__version__ = "0.1.0"
