"""Distillation: learn, with the backbone frozen, which MLPs each token can do without and what stands in for them."""
