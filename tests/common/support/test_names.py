from hypothesis import given
from hypothesis import strategies as st

from common.support.names import shorten_names


def test_a_long_name_keeps_its_ends() -> None:
    assert shorten_names(["medical_university_of_vienna"], 16) == {
        "medical_university_of_vienna": "medical_…_vienna"
    }


def test_long_names_show_where_they_differ() -> None:
    names = [f"university_hospital_of_{number}_long_site" for number in range(3)]
    assert list(shorten_names(names, 16).values()) == [
        "…of_0_long_site",
        "…of_1_long_site",
        "…of_2_long_site",
    ]


def test_names_that_nothing_tells_apart_are_numbered() -> None:
    names = ["a\n", "a\t", "b"]
    assert shorten_names(names, 8) == {"a\t": "a�#1", "a\n": "a�#2", "b": "b#3"}


@given(st.sets(st.text(alphabet="ab…#1\n", max_size=20), max_size=12), st.integers(8, 20))
def test_names_that_differ_are_shown_apart_in_the_width(names: set[str], width: int) -> None:
    shown = shorten_names(names, width)
    assert set(shown) == names
    assert len(set(shown.values())) == len(names)
    assert all(len(text) <= width and text.isprintable() for text in shown.values())
    assert shorten_names(sorted(names, reverse=True), width) == shown
