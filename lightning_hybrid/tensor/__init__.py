"""The `tp` axis: infers which weights can be divided along which dim, verifies it numerically, and applies it.

Detect:
    heads: checks that `tp` divides the number of attention heads.
    numbers: random stand-in values for parameters, buffers and arguments of a unit.
    probe: the data flow of a unit, from gradients.
Plan:
    overrides: the choices of the user (`tensor_plan`).
    regions: proposes regions of colwise and rowwise linears.
    attributes: integer attributes (numbers of heads, widths) that a rank has to divide.
    width: tensors whose last dim reads as the width of one rank.
    verify: runs a unit as each rank would, and compares with the whole.
    unit: infers the plan of one unit.
    outside: plans of single modules (embeddings, heads, `nn.MultiheadAttention`, convolutions).
    infer: the plan of a whole model (`infer_tensor_plan`).
Apply:
    collectives: differentiable collectives.
    scopes: replaces DTensors by local tensors while modules run.
    modules: hooks of single modules.
    attention: the forward of a divided `nn.MultiheadAttention`.
    apply: applies a plan to a module, and removes it (`apply_tensor_plan`).
"""
