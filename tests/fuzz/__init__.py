"""Random cases of both stages against the formulas in float64: ``python -m tests.fuzz --cases 2000 --seed 0``.

``cases.py`` draws a case of ``tests/cases.py`` over every option of the public classes and functions; what it gives and what
should come out is as in the table of ``tests/test_numbers.py``. ``tests/test_fuzz.py`` is how pytest runs them.
"""
