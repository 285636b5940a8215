"""Sources through the door: which store a URL opens, what a source is called, and what it says of its states."""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest
from sources import buffer, by_ranges, fill
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import FsspecStore, LocalStore, MemoryStore, StorePath, WrapperStore

from xzcache import sources
from xzcache.model import FIXED, Replaced, are_compatible, differ, is_from_source

DATA = bytes(range(200))
SECRET = "hush-hush"
PROTOTYPE = default_buffer_prototype()
LIMITS = {"max_concurrency": 4, "max_gap_bytes": 0, "max_coalesced_bytes": 1000}


class Variant(WrapperStore[LocalStore]):
    """A store of a user's, which may change what it reads."""

    def __init__(self, store: LocalStore, setting: Any = None) -> None:
        super().__init__(store)
        self.setting = setting


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "source")
    asyncio.run(fill(store, a__c__0=DATA))
    age(store)
    return store


def age(store: LocalStore, key: str = "a/c/0", seconds: int = 1000) -> None:
    """Make a file old enough that its time tells its state."""
    os.utime(store.root / key, (seconds, seconds))


async def ask(source: Any, part: Any = None, key: str = "a/c/0", **options: Any) -> sources.FetchResult:
    return await sources.fetch(source, key, PROTOTYPE, part, **options)


def value(answer: sources.FetchResult) -> bytes | None:
    return None if answer.value is None else answer.value.to_bytes()


def mapper_of(local: LocalStore) -> Any:
    # older versions of fsspec lack what Zarr needs to read files with it
    pytest.importorskip("fsspec.implementations.asyn_wrapper")
    import fsspec

    return fsspec.get_mapper(str(local.root))


# -- from an argument to a store


def test_what_is_a_url_and_what_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url in ("s3://bucket/x", "https://host/x.zarr", "simplecache::s3://bucket/x", "memory://x"):
        assert sources.is_url(url)
        assert sources.local_path(url) is None
    for path in ("x.zarr", "./s3:/x", "/a/b::c", "~/x"):
        assert not sources.is_url(path)
        assert sources.local_path(path) == os.path.abspath(os.path.expanduser(path))
    assert sources.path_of(f"file://{tmp_path}/x") == f"{tmp_path}/x"
    assert sources.as_xarray("x") == f"{tmp_path}/x"
    assert sources.local_path(Path("x")) == f"{tmp_path}/x"
    assert sources.local_path(MemoryStore()) is None


@pytest.mark.parametrize("how", ["text", "path", "file", "store", "fsspec", "link"])
async def test_one_directory_is_one_source_however_it_is_given(local: LocalStore, tmp_path: Path, how: str) -> None:
    link = tmp_path / "link"
    link.symlink_to(local.root)
    given: Any = {
        "text": str(local.root),
        "path": local.root,
        "file": f"file://{local.root}",
        "store": LocalStore(local.root, read_only=True),
        "fsspec": mapper_of(local) if how == "fsspec" else None,
        "link": LocalStore(link),
    }[how]
    opened = sources.open_source(given, None, read_only=True)
    assert opened.read_only
    found = await opened.get("a/c/0", PROTOTYPE)
    assert found is not None
    assert found.to_bytes() == DATA
    known = sources.identify(opened)
    assert known == sources.identify(local)
    assert (known.lasting, known.immutable, known.fickle, known.url) == (True, False, False, str(local.root))


def test_what_cannot_be_opened_is_refused_by_name_and_without_secrets() -> None:
    for given, options, error, words in (
        ("", None, ValueError, "store=''"),
        (5, None, TypeError, "store is a int"),
        ("x.zarr", {"key": SECRET}, TypeError, "storage_options"),
        ("s3://bucket/x", SECRET, TypeError, "storage_options is a str"),
        (StorePath(MemoryStore(), "within"), None, ValueError, "store='within'"),
        (f"s3:user:{SECRET}@bucket/x", None, ValueError, "no slashes"),
        (f"s3://user:{SECRET}@bucket/x", None, ValueError, "store"),
        ("nothing-reads-this://x/y", None, ValueError, "nothing-reads-this"),
    ):
        with pytest.raises(error, match=words) as caught:
            sources.open_source(given, options, read_only=True)
        assert SECRET not in str(caught.value)
        assert SECRET not in repr(caught.value)


def test_a_url_is_shown_without_its_credentials() -> None:
    for url in (
        f"https://user:{SECRET}@host/x.zarr",
        f"https://host/x.zarr?token={SECRET}",
        f"simplecache::s3://key:{SECRET}@bucket/x",
    ):
        assert SECRET not in sources.shown(url)
        assert SECRET not in str(sources.spelled(url))
        error = ValueError(f"cannot read {url}, said the server")
        error.__cause__ = KeyError(url)
        scrubbed = sources.scrub(error, url)
        assert SECRET not in f"{scrubbed!r} {scrubbed.__cause__!r}"
        assert "said the server" in str(scrubbed)
    plain = ValueError("nothing to hide")
    assert sources.scrub(plain) is plain


# -- what a source is called


def test_a_source_has_one_name_for_all_its_copies_and_no_other_has_it(local: LocalStore, tmp_path: Path) -> None:
    memory = MemoryStore()
    other = LocalStore(tmp_path / "other")
    stores = [
        local,
        other,
        memory,
        MemoryStore(),
        Variant(local),
        Variant(local, "a"),
        Variant(local, ["a", 1]),
        Variant(other, "a"),
    ]
    names = [sources.identify(store).namespace for store in stores]
    assert len(set(names)) == len(names)
    assert all(name.isascii() and "/" not in name and name == name.lower() for name in names)
    assert sources.identify(pickle.loads(pickle.dumps(local))) == sources.identify(local)
    assert sources.identify(Variant(local, "a")) == sources.identify(stores[5])
    # stores over one dictionary
    assert sources.identify(MemoryStore(memory._store_dict)) == sources.identify(memory)
    assert [sources.identify(store).lasting for store in stores] == [True, True, False, False, True, True, True, True]


def test_what_a_variant_cannot_say_of_itself_makes_it_a_source_for_its_life(local: LocalStore) -> None:
    one, other = Variant(local, object()), Variant(local, object())
    assert not sources.identify(one).lasting
    assert sources.identify(one) != sources.identify(other)
    assert sources.identify(one) == sources.identify(one)
    # a copy has the name of its original, and no store changes its name
    copy = Variant(local, one.setting)
    sources.remember(copy, sources.identify(one))
    sources.remember(copy, sources.identify(local))
    assert sources.identify(copy) == sources.identify(one)


def test_a_store_keeps_its_name(tmp_path: Path) -> None:
    store = Variant(LocalStore(tmp_path), "before")
    known = sources.identify(store)
    store.setting = "after"
    assert sources.identify(store) == known


def test_the_same_source_with_or_without_write_access(local: LocalStore) -> None:
    assert sources.is_same_source(local, LocalStore(local.root, read_only=True))
    assert not sources.is_same_source(local, Variant(local))
    memory = MemoryStore()
    assert sources.is_same_source(memory, MemoryStore(memory._store_dict))
    # equal contents are not the same source
    assert not sources.is_same_source(MemoryStore(), MemoryStore())
    assert sources.must_identify_again(local)
    assert not sources.must_identify_again(memory)
    assert [sources.is_at_hand(store) for store in (local, memory, Variant(local))] == [True, True, False]


# -- what it says of its states

PARTS = [None, RangeByteRequest(10, 20), RangeByteRequest(150, 300), OffsetByteRequest(150), SuffixByteRequest(30)]
EXPECTED = [DATA, DATA[10:20], DATA[150:], DATA[150:], DATA[-30:]]


KINDS = ("directory", "memory", "variant", "fsspec")


async def of_kind(kind: str, local: LocalStore) -> Any:
    if kind == "directory":
        return local
    if kind == "variant":
        return Variant(local)
    if kind == "fsspec":
        return FsspecStore.from_mapper(mapper_of(local), read_only=True)
    memory = MemoryStore()
    await fill(memory, a__c__0=DATA)
    return memory


@pytest.mark.parametrize("kind", KINDS)
async def test_an_answer_has_the_bytes_that_were_asked_for(local: LocalStore, kind: str) -> None:
    source = await of_kind(kind, local)
    for part, expected in zip(PARTS, EXPECTED, strict=True):
        answer = await ask(source, part)
        assert (value(answer), answer.unchanged) == (expected, False)
        # of a part, none is without a validator
        assert part is None or answer.validator
        assert not answer.exact or answer.size in (None, len(DATA))
        missing = await ask(source, part, "a/c/1")
        assert (value(missing), missing.unchanged) == (None, False)


@by_ranges
@pytest.mark.parametrize("kind", KINDS)
async def test_several_spans_are_asked_for_in_one_call(local: LocalStore, kind: str) -> None:
    source = await of_kind(kind, local)
    several = await sources.fetch_spans(source, "a/c/0", PROTOTYPE, [(0, 5), (90, 110)], **LIMITS)
    assert [value(each) for each in several] == [DATA[:5], DATA[90:110]]
    assert all(each.validator for each in several)
    several = await sources.fetch_spans(source, "a/c/1", PROTOTYPE, [(0, 5), (90, 110)], **LIMITS)
    assert [value(each) for each in several] == [None, None]


async def test_a_state_is_known_again_and_another_is_not(local: LocalStore) -> None:
    first = await ask(local, certain=True)
    assert is_from_source(first.validator)
    assert (await ask(local, RangeByteRequest(0, 5))).validator == first.validator
    again = await ask(local, known=first.validator)
    assert (again.unchanged, again.value) == (True, None)
    # in the same file, and of the same length
    (local.root / "a/c/0").write_bytes(DATA[::-1])
    age(local, seconds=2000)
    other = await ask(local, known=first.validator)
    assert (value(other), other.unchanged) == (DATA[::-1], False)
    assert differ([first.validator, other.validator])
    assert value(await ask(local, known="etag of another kind")) == DATA[::-1]
    await local.delete("a/c/0")
    gone = await ask(local, known=other.validator)
    assert (gone.value, gone.unchanged) == (None, False)


async def test_a_file_that_was_just_written_has_no_state_that_could_be_told_from_the_next(local: LocalStore) -> None:
    await local.set("a/c/0", buffer(DATA))
    assert not is_from_source((await ask(local, certain=True)).validator)
    one, other = [await ask(local, RangeByteRequest(0, 5)) for _ in range(2)]
    assert one.validator
    assert not are_compatible(one.validator, other.validator)


async def test_an_object_that_changes_while_it_is_read_has_no_state(local: LocalStore) -> None:
    class Changing(LocalStore):
        """A directory in which the object is replaced before its bytes are read."""

    async def changed(*args: Any, **options: Any) -> Any:
        await local.set("a/c/0", buffer(DATA[::-1]))
        age(local, seconds=3000)
        return await LocalStore.get(source, *args, **options)

    source = LocalStore(local.root)
    before = (await ask(source, certain=True)).validator
    source.get = changed  # type: ignore[method-assign]
    answer = await ask(source, RangeByteRequest(0, 5))
    assert answer.validator != before
    assert not is_from_source(answer.validator)


async def test_what_is_said_of_states_can_be_put_aside(local: LocalStore) -> None:
    fixed = await ask(local, RangeByteRequest(0, 5), fixed=True)
    assert fixed.validator == FIXED
    whole = await ask(local, certain=True, ignore_validators=True)
    assert whole.validator == ""
    part = await ask(local, RangeByteRequest(0, 5), ignore_validators=True)
    assert part.validator
    assert not is_from_source(part.validator)


async def test_an_error_of_the_source_is_its_own_and_ends_the_other_requests() -> None:
    began, cancelled = asyncio.Event(), asyncio.Event()

    async def endless() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def failing() -> None:
        await began.wait()
        raise PermissionError("the source's own")

    with pytest.raises(PermissionError, match="own"):
        await sources.all_of([endless(), failing()])
    assert cancelled.is_set()
    assert await sources.all_of(asyncio.sleep(0, number) for number in range(3)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionRefusedError(), True),
        (TimeoutError(), True),
        (socket.gaierror(socket.EAI_NONAME, "no such name"), True),
        (OSError(errno.ESTALE, "a mount whose server is gone"), True),
        (ExceptionGroup("both", [ConnectionResetError(), TimeoutError()]), True),
        (ExceptionGroup("one is an answer", [ConnectionResetError(), PermissionError()]), False),
        # the source has answered, with the bytes of two states; its number is that of a mount that is gone
        (Replaced("a/c/0"), False),
        (ExceptionGroup("ranges", [Replaced("a/c/0")]), False),
        (FileNotFoundError(), False),
        (PermissionError(), False),
        (ssl.SSLCertVerificationError(), False),
        (ValueError("nothing is known of it"), False),
    ],
    ids=repr,
)
def test_which_exceptions_are_an_outage(error: Exception, expected: bool) -> None:
    assert sources.is_outage(error) is expected
    wrapped = RuntimeError("of a client")
    wrapped.__cause__ = error
    if not isinstance(error, ExceptionGroup):
        assert sources.is_outage(wrapped) is expected
