"""The compiled engine: a model as two captured programs, which threads of C++ replay for one step after the other.

No module of it imports torch, so a rank starts at once and needs little memory beside its weights.
"""
