"""What threads find out between the engine's calls of one step."""

from __future__ import annotations

from kvtc_vllm.offload.outbox import Outbox
from kvtc_vllm.tiers.keys import RecordKey

A, B = RecordKey(b"a"), RecordKey(b"b")


def store(outbox: Outbox, key: RecordKey) -> None:
    with outbox.open() as out:
        out.report.stored.append((key, 0, 10))
        out.stats.add("stored_chunks")


def counted(outbox: Outbox) -> float:
    stats = outbox.take_stats()
    return 0 if stats is None else stats.data["stored_chunks"]


def test_what_a_step_reports_was_counted_in_it() -> None:
    outbox = Outbox()
    store(outbox, A)
    assert counted(outbox) == 1
    store(outbox, B)  # after the counters were taken, before the report is
    assert [key for key, _, _ in outbox.take_report(1).stored] == [A]
    assert counted(outbox) == 1
    assert [key for key, _, _ in outbox.take_report(2).stored] == [B]
    store(outbox, A)  # a step whose counters nobody takes
    assert [key for key, _, _ in outbox.take_report(3).stored] == [A]


def test_a_reset_drops_what_was_cut_off() -> None:
    outbox = Outbox()
    store(outbox, A)
    assert counted(outbox) == 1
    outbox.begin_epoch(1)
    report = outbox.take_report(1)
    assert (report.epoch, report.stored) == (1, [])
