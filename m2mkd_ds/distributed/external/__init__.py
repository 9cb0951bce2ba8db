"""MoE layers of other projects behind our names of weights: peers to compare with, not parts of a student.

canonical.py       what both adapters share: the canonical weights of one MoE layer, and our router with the peers' math
deepspeed_moe.py   `deepspeed.moe.layer.MoE` as released
deepspeed_triton.py DeepSpeed's Triton grouped matmul as a backend (`moe.backends.contract`)
tutel.py           `tutel.moe.moe_layer`; Tutel is not on PyPI
scattermoe.py      ScatterMoE's Triton experts behind our router
"""
