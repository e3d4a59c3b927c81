import pytest
from pydantic import TypeAdapter, ValidationError

from ditopt.layout import TokenLayout


def test_counts() -> None:
    layout = TokenLayout(4, 6, 8, text_before=3, text_after=5)
    assert (layout.tokens, layout.text, layout.total) == (192, 8, 200)


@pytest.mark.parametrize(
    ("layout", "total", "expected"),
    [
        (TokenLayout(2, 4, 4, text_before=7), 40, TokenLayout(2, 4, 4, text_before=8)),
        (TokenLayout(2, 4, 4, text_after=7), 32, TokenLayout(2, 4, 4)),
        (TokenLayout(2, 4, 4), 35, TokenLayout(2, 4, 4, text_after=3)),
        (TokenLayout(2, 4, 4, 1, 2), 35, TokenLayout(2, 4, 4, 1, 2)),
    ],
)
def test_fit_gives_the_text_the_rest(
    layout: TokenLayout, total: int, expected: TokenLayout
) -> None:
    assert layout.fit(total) == expected


@pytest.mark.parametrize(
    ("layout", "total"), [(TokenLayout(2, 4, 4), 31), (TokenLayout(2, 4, 4, 1, 2), 36)]
)
def test_fit_refuses_what_it_cannot_place(layout: TokenLayout, total: int) -> None:
    with pytest.raises(ValueError, match=f"a sequence of {total} tokens"):
        layout.fit(total)


@pytest.mark.parametrize("field", ["frames", "height", "width", "text_before", "text_after"])
def test_impossible_sizes_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        TokenLayout(**{"frames": 1, "height": 1, "width": 1, field: -1})


def test_files_may_not_hold_other_keys() -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(TokenLayout).validate_python({"frames": 1, "height": 1, "width": 1, "depth": 1})
