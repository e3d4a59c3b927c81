from __future__ import annotations

import asyncio
import threading

import pytest

from ditopt.runtime import SessionError, session
from ditopt.runtime.session import Session, current_session, implied_session


def test_nested_sessions_are_refused_with_a_remedy() -> None:
    with (
        session("outer"),
        pytest.raises(SessionError, match=r"inside session\('outer'\).*Leave the outer"),
        session("inner"),
    ):
        pass
    with session("again"):
        pass
    assert current_session() is None


def test_an_implied_session_gives_way_to_a_user_s() -> None:
    with implied_session():
        first = current_session()
        with implied_session(), session("inner"):
            assert current_session() == Session("inner")
        assert current_session() is first
        with session("inner"), pytest.raises(SessionError, match="inside session"), session("more"):
            pass
    assert current_session() is None
    with session("outer"), implied_session():
        assert current_session() == Session("outer")


def test_sessions_belong_to_a_thread() -> None:
    seen = []
    with session("main"):
        thread = threading.Thread(target=lambda: seen.append(current_session()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_sessions_belong_to_an_asyncio_task_and_the_threads_it_asks() -> None:
    def key() -> object:
        current = current_session()
        return None if current is None else current.key

    async def request(name: str) -> list[object]:
        with session(name):
            await asyncio.sleep(0)
            return [key(), await asyncio.to_thread(key)]

    async def serve() -> list[list[object]]:
        return await asyncio.gather(*(request(name) for name in "abc"))

    assert asyncio.run(serve()) == [["a", "a"], ["b", "b"], ["c", "c"]]
