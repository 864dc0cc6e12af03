"""Every error of every tree survives a pickle: fields and message reach whoever started the process."""

import importlib
import inspect
import multiprocessing
import pickle

import pytest

from foldfeed.feature_store.errors import FoldfeedError, NotAStoreError

for module in ("feature_store.exchange_errors", "pipelines.errors", "loader.errors", "trainer.errors"):
    importlib.import_module(f"foldfeed.{module}")

VALUES = {
    "int": 3,
    "int | None": 7,
    "float": 1.5,
    "str": "a text",
    "object": "a value",
    "Sequence[int]": (1, 2),
}


def all_errors(base=FoldfeedError) -> list[type[FoldfeedError]]:
    return [base, *(error for child in base.__subclasses__() for error in all_errors(child))]


ERRORS = sorted({error for error in all_errors() if error.__module__.startswith("foldfeed.")}, key=repr)


def arguments(error: type[FoldfeedError]) -> dict[str, object]:
    """Values for every named parameter of a constructor, by its annotation."""
    found = {}
    for name, parameter in list(inspect.signature(error.__init__).parameters.items())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        kind = str(parameter.annotation)
        found[name] = VALUES.get(kind, (4, 5) if "int" in kind else ("one", "two"))
    return found


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_an_error_survives_a_pickle(error, by_name):
    given = arguments(error)
    made = error("a message") if not given else error(**given) if by_name else error(*given.values())
    copy = pickle.loads(pickle.dumps(made))
    assert (type(copy), str(copy), copy.args) == (type(made), str(made), made.args)
    fields = {name: value for name, value in vars(made).items() if name != "_given"}
    assert {name: value for name, value in vars(copy).items() if name != "_given"} == fields
    assert set(given) <= {*fields, *dir(made)}, "every argument is a field"


def raises(url: str) -> None:
    raise NotAStoreError(url, "it holds no foldfeed.json")


def test_a_spawn_pool_shows_the_message():
    with multiprocessing.get_context("spawn").Pool(1) as pool, pytest.raises(NotAStoreError) as caught:
        pool.apply(raises, ["/somewhere"])
    assert (caught.value.url, caught.value.reason) == ("/somewhere", "it holds no foldfeed.json")
    assert "foldfeed build --store" in str(caught.value)
