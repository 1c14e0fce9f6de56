"""Places for so many, first come first served, also while the number changes and people leave."""

import asyncio
from contextlib import AsyncExitStack

from hexgen2.engine.admission import Admission


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_so_many_are_inside_and_the_next_comes_in_when_one_leaves() -> None:
    admission, order = Admission(2), []
    leave = [asyncio.Event() for _ in range(4)]

    async def one(number: int) -> None:
        async with admission.inside():
            order.append(number)
            await leave[number].wait()

    async with asyncio.TaskGroup() as tasks:
        for number in range(4):
            tasks.create_task(one(number))
        await settle()
        assert order == [0, 1]
        leave[1].set()
        await settle()
        assert order == [0, 1, 2]
        # Nobody is sent out by a lower limit, and nobody comes in before there are fewer.
        admission.limit = 1
        leave[0].set()
        await settle()
        assert order == [0, 1, 2]
        admission.limit = 2
        await settle()
        assert order == [0, 1, 2, 3]
        for each in leave:
            each.set()


async def test_who_gives_up_waiting_leaves_the_line() -> None:
    admission = Admission(1)
    async with AsyncExitStack() as held:
        await held.enter_async_context(admission.inside())

        async def wait() -> None:
            async with admission.inside():
                raise AssertionError("there was no place")

        waiting = asyncio.create_task(wait())
        await settle()
        waiting.cancel()
        await asyncio.wait((waiting,))
        assert waiting.cancelled()
    async with asyncio.timeout(10), admission.inside():
        pass
