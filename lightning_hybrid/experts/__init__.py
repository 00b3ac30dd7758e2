"""The `ep` axis: finds modules of experts, divides them over ranks, copies hot experts."""
