"""The demo: a real 135M teacher lifts a damaged copy of itself, with everything it needs shipped or installed.

Only `smollm2` here imports MLX.
"""
