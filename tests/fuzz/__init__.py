"""Random cases of both stages against the literal formulas in float64: ``python -m tests.fuzz --cases 2000 --seed 0``.

``cases.py`` says what a case is and draws one, ``tensors.py`` makes its tensors, ``literal.py`` computes what should come out,
``check.py`` compares. ``tests/test_fuzz.py`` is how pytest runs them.
"""
