"""Random SQL conditions made of given terms, for tests that compare two ways to answer."""

from hypothesis import strategies as st


def conditions(terms: list[str]) -> st.SearchStrategy[str]:
    """Up to five terms joined by and, or, not."""
    return st.recursive(
        st.sampled_from(terms),
        lambda inner: st.one_of(
            st.builds("({} and {})".format, inner, inner),
            st.builds("({} or {})".format, inner, inner),
            st.builds("(not {})".format, inner),
        ),
        max_leaves=5,
    )
