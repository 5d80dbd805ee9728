"""``docs/errors.md`` is what the tables of the tests say."""

from tests import sentences


def test_rows() -> None:
    source = (
        "CASES = [(lambda: f(3), ValueError, 'x: expected'), ('name', a, b, TypeError, 'y'), (1, int, 'z'), (ValueError, 'w')]"
    )
    assert list(sentences.rows(source)) == [("f(3)", "ValueError", "x: expected"), ("'name', a, b", "TypeError", "y")]


def test_the_page_is_that_of_the_tests() -> None:
    assert sentences.PAGE.read_text() == sentences.page(), "python -m tests.sentences writes it"
