"""The `ep` axis: finds modules of experts, divides them over ranks, copies hot experts.

Detect and plan:
    detect: finds modules of experts and verifies numerically that they can be divided (`plan_experts`).
Apply:
    parallel: dispatch of tokens, experts of this rank, combination of outputs (`ExpertParallel`).
    copies: experts that several ranks compute.
"""
