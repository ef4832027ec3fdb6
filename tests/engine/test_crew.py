"""One budget for all components: never more at work than it has slots, the biggest first, and a failure stops its own only."""

import ctypes
import threading
from collections.abc import Callable

import pytest

from athena_backup.crew import Crew, Turn, Unit
from athena_backup.errors import FinalError


class Gauge:
    """Counts who is at work, and holds everybody until it is opened."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.order: list[object] = []
        self.opened = threading.Event()
        self._lock = threading.Condition()

    def work(self, name: object, slots: Callable[[Turn], int] = lambda turn: turn.slots) -> Callable[[Turn], object]:
        def work(turn: Turn) -> object:
            with self._lock:
                self.order.append(name)
                self.now += slots(turn)
                self.most = max(self.most, self.now)
                self._lock.notify_all()
            assert self.opened.wait(20)
            with self._lock:
                self.now -= slots(turn)
            return name

        return work

    def await_begun(self, count: int) -> None:
        with self._lock:
            assert self._lock.wait_for(lambda: len(self.order) >= count, 20)


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


def test_many_callers_share_the_slots_and_get_their_own_results_in_order() -> None:
    crew, gauge = Crew(3), Gauge()
    results: dict[int, list[object]] = {}

    def call(caller: int) -> None:
        results[caller] = crew.run([Unit(1, gauge.work((caller, number))) for number in range(5)])

    threads = [in_thread(lambda caller=caller: call(caller)) for caller in range(4)]  # type: ignore[misc]
    gauge.await_begun(3)
    gauge.opened.set()
    for thread in threads:
        thread.join(20)
    assert gauge.most == 3
    assert results == {caller: [(caller, number) for number in range(5)] for caller in range(4)}


def test_the_biggest_goes_first_whoever_it_belongs_to() -> None:
    crew, gauge = Crew(1), Gauge()
    threads = [in_thread(lambda: crew.run([Unit(1, gauge.work("first"))]))]
    gauge.await_begun(1)
    threads.append(in_thread(lambda: crew.run([Unit(5, gauge.work("five")), Unit(20, gauge.work("twenty"))])))
    threads.append(in_thread(lambda: crew.run([Unit(10, gauge.work("ten"))])))
    while len(crew._waiting) < 3:
        threading.Event().wait(0.001)
    gauge.opened.set()
    for thread in threads:
        thread.join(20)
    assert gauge.order == ["first", "twenty", "ten", "five"]


def test_the_last_one_gets_every_slot_that_nobody_waits_for() -> None:
    gauge = Gauge()
    gauge.opened.set()
    assert Crew(4).run([Unit(1, lambda turn: turn.slots, is_elastic=True)]) == [4]
    assert Crew(4).run([Unit(1, lambda turn: turn.slots)]) == [1]
    # The first still sees that another waits.
    slots = Crew(4).run([Unit(2, lambda turn: turn.slots, is_elastic=True), Unit(1, gauge.work("other"))])
    assert slots == [1, "other"]


def test_one_knows_how_many_others_wait_when_its_turn_comes_as_far_as_there_are_slots() -> None:
    assert Crew(1).run([Unit(1, lambda turn: turn.others)] * 3) == [0, 0, 0]
    gauge, crew = Gauge(), Crew(2)
    gauge.opened.set()
    units = [Unit(9, lambda turn: turn.others), *(Unit(1, gauge.work(number)) for number in range(5))]
    assert crew.run(units)[0] == 1


@pytest.mark.parametrize(("other_bytes", "others"), [(0, 0), (4, 0), (5, 1), (10, 1), (1_000, 1)])
def test_of_others_at_work_only_those_count_that_are_not_much_smaller(other_bytes: int, others: int) -> None:
    gauge, crew = Gauge(), Crew(2)
    other = in_thread(lambda: crew.run([Unit(other_bytes, gauge.work("other"))]))
    gauge.await_begun(1)
    assert crew.run([Unit(10, lambda turn: turn.others)]) == [others]
    gauge.opened.set()
    other.join(20)
    assert crew.run([Unit(10, lambda turn: turn.others)]) == [0]


def test_what_may_wait_goes_last_however_big_it_is() -> None:
    crew, gauge = Crew(1), Gauge()
    threads = [in_thread(lambda: crew.run([Unit(1, gauge.work("first"))]))]
    gauge.await_begun(1)
    archives = [Unit(10, gauge.work("archive"), rank=1), Unit(1000, gauge.work("big archive"), rank=1)]
    threads.append(in_thread(lambda: crew.run(archives)))
    threads.append(in_thread(lambda: crew.run([Unit(5, gauge.work("table"))])))
    while len(crew._waiting) < 3:
        threading.Event().wait(0.001)
    gauge.opened.set()
    for thread in threads:
        thread.join(20)
    assert gauge.order == ["first", "table", "big archive", "archive"]


def test_one_that_can_use_more_takes_what_became_free_and_gives_it_back_to_those_that_wait() -> None:
    crew, other, another = Crew(3), Gauge(), Gauge()
    seen: list[int] = []

    def work(turn: Turn) -> None:
        seen.append(turn.slots)
        seen.append(turn.slots_now())  # the third is the other's
        other.opened.set()
        threads[0].join(20)
        seen.append(turn.slots_now())  # now it is free
        seen.append(turn.slots_now())  # there are no more
        threads.append(in_thread(lambda: crew.run([Unit(1, another.work("another"))])))
        while not crew._waiting:
            threading.Event().wait(0.001)
        seen.append(turn.slots_now())
        another.await_begun(1)
        seen.append(turn.slots_now())  # two at work, and nobody waits
        another.opened.set()

    threads = [in_thread(lambda: crew.run([Unit(1, other.work("other"))]))]
    other.await_begun(1)
    waiting = in_thread(lambda: crew.run([Unit(1, work, is_elastic=True)]))
    waiting.join(20)
    threads[1].join(20)
    assert seen == [2, 2, 3, 3, 1, 2]
    assert crew._free == 3


def test_one_that_gave_its_slots_back_takes_none_and_a_second_one_keeps_one() -> None:
    crew, other = Crew(3), Gauge()
    free: list[int] = []

    def wait_for_a_store(turn: Turn) -> None:
        turn.give_back()
        assert turn.slots_now() == 1
        free.append(crew._free)
        crew_is_left.set()
        assert other.opened.wait(20)

    def work(turn: Turn) -> None:
        assert turn.slots == 3
        turn.give_back()
        free.append(crew._free)
        assert turn.slots_now() == 2
        free.append(crew._free)
        other.opened.set()

    crew_is_left = threading.Event()
    thread = in_thread(lambda: crew.run([Unit(1, wait_for_a_store, is_elastic=True)]))
    assert crew_is_left.wait(20)
    crew.run([Unit(1, work, is_elastic=True)])
    thread.join(20)
    assert free == [3, 2, 1]
    assert (crew._free, crew._without_slot) == (3, 0)


def test_one_that_can_not_use_more_keeps_its_slot() -> None:
    assert Crew(3).run([Unit(1, lambda turn: [turn.slots_now(), turn.slots_now()])]) == [[1, 1]]


def test_the_first_failure_is_raised_when_nobody_is_at_work_and_the_rest_is_not_begun() -> None:
    crew = Crew(2)
    begun: list[str] = []
    failed = threading.Event()

    def fail(turn: Turn) -> None:
        begun.append("fail")
        failed.set()
        raise FinalError("this one")

    def go_on(turn: Turn) -> None:
        begun.append("go on")
        assert failed.wait(20)
        while True:
            turn.check()

    with pytest.raises(FinalError, match="this one"):
        crew.run([Unit(3, go_on), Unit(2, fail), Unit(1, lambda turn: begun.append("never"))])
    assert sorted(begun) == ["fail", "go on"]
    # Nothing of it is left: the crew serves the next.
    assert crew.run([Unit(1, lambda turn: turn.slots, is_elastic=True)]) == [2]


def test_a_failure_of_one_component_is_none_of_another() -> None:
    crew, gauge = Crew(2), Gauge()
    results: list[list[object]] = []
    thread = in_thread(lambda: results.append(crew.run([Unit(1, gauge.work("other"))])))
    gauge.await_begun(1)

    def fail(turn: Turn) -> None:
        raise FinalError("mine")

    with pytest.raises(FinalError, match="mine"):
        crew.run([Unit(1, fail)])
    gauge.opened.set()
    thread.join(20)
    assert results == [["other"]]


def test_a_waiting_thread_that_is_told_to_stop_leaves_nobody_at_work() -> None:
    crew, gauge = Crew(1), Gauge()
    stopped: list[str] = []
    ended: list[list[str]] = []

    def work(turn: Turn) -> None:
        gauge.order.append("begun")
        while True:
            try:
                turn.check()
            except FinalError:
                stopped.append("stopped")
                raise

    def call() -> None:
        try:
            crew.run([Unit(1, work)])
        except SystemExit:
            ended.append(list(stopped))

    thread = in_thread(call)
    while not (gauge.order and crew._changed._waiters):  # type: ignore[attr-defined]
        threading.Event().wait(0.001)
    # As Prefect does: an exception from outside, which the thread meets when it next runs.
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
    with crew._changed:
        crew._changed.notify_all()
    thread.join(20)
    assert not thread.is_alive()
    assert ended == [["stopped"]]


def test_a_unit_begins_when_what_it_needs_is_done_and_what_nobody_needs_goes_on_beside() -> None:
    crew, gauge = Crew(3), Gauge()
    units = [
        Unit(1, gauge.work("first")),
        Unit(9, gauge.work("behind first"), after=(0,)),
        Unit(5, gauge.work("beside")),
        Unit(99, gauge.work("last"), after=(1, 2)),
    ]
    results: list[object] = []
    thread = in_thread(lambda: results.extend(crew.run(units)))
    gauge.await_begun(2)
    assert sorted(map(str, gauge.order)) == ["beside", "first"]
    gauge.opened.set()
    thread.join(20)
    assert results == ["first", "behind first", "beside", "last"]
    assert gauge.order.index("behind first") > gauge.order.index("first")
    assert gauge.order[-1] == "last"


def test_what_waits_for_a_unit_that_fails_is_not_begun() -> None:
    def fail(turn: Turn) -> None:
        raise FinalError("the first one")

    begun: list[str] = []
    units = [Unit(1, fail)]
    units += [Unit(1, lambda turn: begun.append("never"), after=(number,)) for number in range(3)]
    with pytest.raises(FinalError, match="the first one"):
        Crew(2).run(units)
    assert begun == []


def test_a_unit_can_wait_only_for_one_before_it() -> None:
    with pytest.raises(ValueError, match="unit 0 waits for"):
        Crew(1).run([Unit(1, lambda turn: None, after=(0,))])


def test_a_unit_that_only_waits_for_a_store_lets_the_next_one_begin_but_only_one_at_a_time() -> None:
    crew, gauge = Crew(1), Gauge()

    def wait_for_store(name: str) -> Callable[[Turn], object]:
        def work(turn: Turn) -> object:
            turn.give_back()
            turn.give_back()  # says nothing new
            return gauge.work(name)(turn)

        return work

    results: list[object] = []
    units = [Unit(3 - number, wait_for_store(f"{number}")) for number in range(3)]
    thread = in_thread(lambda: results.extend(crew.run(units)))
    gauge.await_begun(2)
    # The second can't give its slot back while the first one waits, and so the third has none.
    assert sorted(map(str, gauge.order)) == ["0", "1"]
    assert len(crew._at_work) == 2
    gauge.opened.set()
    thread.join(20)
    assert results == ["0", "1", "2"]
    assert crew.run([Unit(1, lambda turn: turn.slots, is_elastic=True)]) == [1]


def test_a_failed_component_does_not_wait_for_the_bigger_units_of_others() -> None:
    crew, gauge = Crew(1), Gauge()
    threads: list[threading.Thread] = []

    def fail(turn: Turn) -> None:
        threads.append(in_thread(lambda: crew.run([Unit(99, gauge.work("other"))])))
        while len(crew._waiting) < 2:
            threading.Event().wait(0.001)
        raise FinalError("mine")

    with pytest.raises(FinalError, match="mine"):
        crew.run([Unit(100, fail), Unit(1, gauge.work("never"))])
    gauge.opened.set()
    threads[0].join(20)
    assert gauge.order == ["other"]


def test_a_thread_that_the_system_has_no_room_for_fails_its_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    crew = Crew(2)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            crew.run([Unit(1, lambda turn: None), Unit(1, lambda turn: None)])
    assert crew.run([Unit(1, lambda turn: turn.slots, is_elastic=True)]) == [2]


def test_one_that_needs_no_slot_begins_at_once_and_takes_none() -> None:
    crew, is_held, is_begun = Crew(1), threading.Event(), threading.Event()
    free: list[int] = []

    def hold(_: Turn) -> None:
        is_held.set()
        assert is_begun.wait(20)

    def light(turn: Turn) -> None:
        assert is_held.wait(20)
        free.append(crew._free)
        turn.give_back()
        free.append(turn.slots_now())
        is_begun.set()

    crew.run([Unit(9, hold), Unit(1, light, needs_slot=False)])
    assert free == [0, 1]
    assert (crew._free, crew._without_slot) == (1, 0)
    with pytest.raises(ZeroDivisionError):
        crew.run(
            [Unit(1, lambda _: 1 / 0, needs_slot=False), Unit(1, lambda _: 1.0), Unit(1, lambda _: 1.0, after=[1])]
        )
    assert (crew._free, crew._without_slot) == (1, 0)


def test_a_unit_that_hangs_is_left_to_itself_when_its_call_is_told_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that reads a mount whose server is gone: it can't be told anything."""
    monkeypatch.setattr("athena_backup.crew._GRACE_SECONDS", 0.01)
    crew, gauge, stopped = Crew(1), Gauge(), threading.Event()

    def check() -> None:
        if stopped.is_set():
            raise FinalError("a person said so")

    raised: list[BaseException] = []

    def call() -> None:
        try:
            crew.run([Unit(1, gauge.work("hangs"))], check)
        except FinalError as error:
            raised.append(error)

    thread = in_thread(call)
    gauge.await_begun(1)
    stopped.set()
    thread.join(20)
    assert [str(error) for error in raised] == ["a person said so"]
    gauge.opened.set()
