"""Benchmarks: what the parts cost, measured against other projects' parts in the same process.

Reading order for `m2mkd bench experts` (docs/benchmarks.md): options.py, experts.py, workload.py, cases.py, layer_cases.py, peers.py,
measure.py, memory.py, numerics.py, rows.py, output.py, plot.py; the levels of their own are exchange.py and step.py.
"""
