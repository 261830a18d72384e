"""Gates: who may skip which MLP. One file per rule, `base.py` for what they share, `registry.py` to find them."""
