"""When ranks ask for nodes that are about to go, and what they make of the answer."""

from trainer.preemption import CHECK_EVERY_S, PreemptionWatch


def test_it_asks_now_and_then_and_tells_of_each_node_once() -> None:
    now, going = [0.0], [set[str](), {"a"}, {"a"}, {"a", "b"}]
    watch = PreemptionWatch(lambda: going.pop(0), lambda: now[0])
    told = []
    while going:
        assert not watch.is_due()
        now[0] += CHECK_EVERY_S
        assert watch.is_due()
        told.append(watch.fresh())
    assert told == [False, True, False, True]
