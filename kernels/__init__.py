"""Triton kernels and their launchers; imported only when ``impl="triton"`` runs.

tiles.py    what one tile computes, shared by the kernels
distill.py  stage 2: forward, border strips, finish, backward
learn.py    stage 1: masks, border sums, gate, gradients of tokens and features
launch.py   what every launcher needs to know about its tensors
tuning.py   which block sizes to launch with
autotune.py the search for them, a command
"""
