"""Memory that is used again, and torch's threads per Python thread."""

from __future__ import annotations

import ctypes
import mmap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from prime_async.errors import LocalError
from prime_async.work.buffers import BufferPool, ScratchPool
from prime_async.work.codec import as_tensor
from prime_async.work.threads import torch_threads


def address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def test_buffer_is_page_aligned_writable_and_of_the_size_asked_for() -> None:
    buffer = BufferPool(10_001, limit=1).take()
    buffer[:] = bytes(10_001)
    assert buffer.nbytes == 10_001
    assert address(buffer) % mmap.PAGESIZE == 0


def test_buffer_is_used_again_when_nobody_refers_to_it_any_more() -> None:
    pool = BufferPool(100)
    buffer = pool.take()
    where = address(buffer)
    rest = as_tensor(buffer[10:20])[5:]
    del buffer
    assert address(pool.take()) != where
    assert pool.in_use == 1
    del rest
    assert pool.in_use == 0
    taken = [pool.take(), pool.take()]
    assert where in [address(buffer) for buffer in taken]


def test_buffer_can_be_let_go_of_at_once() -> None:
    pool = BufferPool(100)
    with pool.take() as buffer:
        assert pool.in_use == 1
    assert pool.in_use == 0
    with pytest.raises(ValueError, match="released"):
        buffer[0] = 1


def test_no_more_buffers_than_the_limit_are_out() -> None:
    pool = BufferPool(100, limit=2)
    taken = [pool.take(), pool.take()]
    with pytest.raises(LocalError, match="all 2 buffers"):
        pool.take()
    taken.pop()
    taken.append(pool.take())
    assert pool.in_use == 2


def test_buffers_are_shared_by_nobody_at_once_when_many_threads_take_them() -> None:
    pool = BufferPool(8, limit=8)

    def use(number: int) -> bool:
        for _ in range(200):
            buffer = pool.take()
            buffer[:] = bytes([number] * 8)
            if bytes(buffer) != bytes([number] * 8):
                return False
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(use, range(4)))


def test_scratch_is_shared_by_nobody_at_once_and_used_again() -> None:
    pool = ScratchPool(100)
    with pool.borrow(100) as (a, b), pool.borrow(50) as (c, d):
        assert len({t.data_ptr() for t in (a, b, c, d)}) == 4
        assert [t.numel() for t in (a, b, c, d)] == [100, 100, 50, 50]
        before = {t.data_ptr() for t in (a, b, c, d)}
    with pool.borrow(7) as (a, b):
        assert {a.data_ptr(), b.data_ptr()} <= before


def test_torch_threads_hold_for_the_calling_thread_and_are_put_back() -> None:
    inside, seen = threading.Event(), threading.Event()
    counts: list[int] = []

    def work() -> None:
        torch.set_num_threads(2)
        with torch_threads(1):
            inside.set()
            assert seen.wait(10)
            counts.append(torch.get_num_threads())
        counts.append(torch.get_num_threads())

    before = torch.get_num_threads()
    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(10)
    assert torch.get_num_threads() == before
    seen.set()
    thread.join()
    assert counts == [1, 2]
