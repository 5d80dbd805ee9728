"""Triton kernels and their launchers; imported only when ``impl="triton"`` runs.

tiles.py    what one tile computes, shared by the kernels
distill.py  stage 2: forward, border strips, finish, backward
tuning.py   which block sizes to launch with
"""
