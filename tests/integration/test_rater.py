"""The rater on a real broker: each message in one state, whatever it is, wherever it was put, however it was packed."""

import time
from pathlib import Path

import pytest

from pipeline.core.reasons import Reason
from tests.integration.conftest import Deploy
from tests.integration.deployment import Deployment
from tests.rating.world import EVERY_METER, EVERY_MODEL, account, contract, framed, plan, usage


def event(key: str, name: str = "acct-00", tokens: str = "10") -> dict[str, object]:
    at = time.time_ns() // 1000
    return usage(key, name, timestamp=at, properties={"tokens": tokens, "model": "small"})


def states(deployment: Deployment) -> dict[str, int]:
    return {state: count for state, count in deployment.counts().items() if count}


def listening(pid: int) -> set[tuple[str, int]]:
    """(address, port) of every TCP socket the process listens on."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(link.readlink())
        except FileNotFoundError:  # closed meanwhile
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                found.add((address, int(port, 16)))
    return found


def test_everything_sent_is_in_exactly_one_state_and_priced_right(deploy: Deploy) -> None:
    """And while at it, the worker listens nowhere but for its metrics, on loopback."""
    deployment = deploy(partitions=4, metrics_port=0)
    deployment.publish_all()
    deployment.send(3000)
    rater = deployment.rater()
    deployment.wait_done()
    deployment.check()
    assert [address for address, _ in listening(rater.pid)] == ["0100007F"]
    assert rater.stop() == 0
    assert rater.says("Traceback") == 0


def test_every_codec_and_restarts_between_them(deploy: Deploy) -> None:
    """A producer chooses how it packs; and after each codec another worker goes on from the same disk."""
    deployment = deploy(partitions=1)
    deployment.publish_all()
    for codec in ("gzip", "snappy", "lz4", "zstd", "none"):
        producer = deployment.new_producer(**{"compression.type": codec})
        for number in range(50):
            deployment.send_event(event(f"{codec}-{number}"), producer)
        assert producer.flush(30) == 0
    rater = deployment.rater()
    deployment.wait_done()
    assert rater.stop() == 0
    deployment.send(100)
    deployment.rater()
    deployment.wait_done()
    deployment.check()


def test_parked_events_are_rated_soon_after_their_terms_arrive(deploy: Deploy) -> None:
    deployment = deploy(partitions=1)
    deployment.publish(*EVERY_METER, plan(*EVERY_MODEL))
    for number in range(5):
        deployment.send_event(event(f"early-{number}"))
    deployment.flush()
    rater = deployment.rater()
    deployment.wait(lambda: states(deployment) == {"parked": 5}, "five events parked: unknown account")

    deployment.publish(account("acct-00"))
    time.sleep(1)
    assert states(deployment) == {"parked": 5}  # no contract yet

    # By now they wait for seconds; the contract's arrival ends that.
    deployment.publish(contract("acct-00"))
    started = time.monotonic()
    deployment.wait(lambda: states(deployment) == {"rated": 5}, "the five events to be rated")
    assert time.monotonic() - started < 4
    deployment.check()
    assert rater.says("partition_taken") == 1  # without a restart


def test_an_event_ahead_of_its_prices_waits_until_no_other_can_be_published_for_it(deploy: Deploy) -> None:
    """A price counts from 60 s after it was published, a catalog may be 30 s old: further ahead, none is certain."""
    deployment = deploy(partitions=1)
    deployment.publish_all()
    at = time.time_ns() // 1000
    ahead = event("ahead") | {"timestamp": at + 38_000_000}
    for one in (ahead, event("now") | {"timestamp": at + 20_000_000}):
        deployment.send_event(one)
    deployment.flush()
    deployment.rater()
    deployment.wait(lambda: states(deployment) == {"parked": 1, "rated": 1}, "one event parked, the other rated")
    deployment.wait(lambda: states(deployment) == {"rated": 2}, "its time to be near enough")
    assert time.time_ns() // 1000 >= at + 8_000_000
    deployment.check()


def test_a_long_line_of_parked_events_does_not_keep_one_waiting(deploy: Deploy) -> None:
    """All wait for an hour; the account that arrives is not the one whose events stand first in line."""
    deployment = deploy(partitions=1, batch_records=20)
    deployment.publish(*EVERY_METER, plan(*EVERY_MODEL))
    names = [f"nobody-{number}" for number in range(50)] + ["acct-00"]
    for number, name in enumerate(names):
        deployment.park(event(f"k-{number}", name), offset=number, wait_s=3600)
    rater = deployment.rater()
    deployment.wait(lambda: rater.says("partition_taken") == 1, "the partition to be taken")
    time.sleep(1)
    assert deployment.rows() == []
    deployment.publish(account("acct-00"), contract("acct-00"))
    started = time.monotonic()
    deployment.wait(lambda: len(deployment.rows()) == 4, "the one event to be rated")
    assert time.monotonic() - started < 4
    settled = len(deployment.receipts())
    time.sleep(1)
    assert len(deployment.receipts()) == settled  # the others were looked at once, and wait again


def test_what_stands_on_a_wrong_partition_comes_back_on_its_own(deploy: Deploy) -> None:
    """At once, also where something else has been parked for an hour already."""
    deployment = deploy(partitions=4)
    deployment.publish_all()
    for number in range(12):
        deployment.park(event(f"old-{number}", f"nobody-{number}"), offset=10**6 + number, wait_s=3600)
    for number in range(24):
        name = deployment.accounts()[number % 12]
        one = event(f"stray-{number}", name)
        deployment.expect(one)
        deployment.send_raw(framed(one), name.encode(), partition=number % 4)
    foreign_key = event("keyed by order")
    deployment.expect(foreign_key)
    deployment.send_raw(framed(foreign_key), b"order-7")
    deployment.flush()
    deployment.rater()
    deployment.wait(lambda: states(deployment) == {"rated": 25}, "all strays to be rated", 20)
    deployment.check()


def test_dead_letters_hold_the_original_bytes_and_where_they_came_from(deploy: Deploy) -> None:
    deployment = deploy(partitions=1)
    deployment.publish_all()
    at_2262 = framed(event("far", tokens="1") | {"timestamp": 2**63 - 1})
    junk: list[tuple[bytes, bytes, Reason]] = [
        (b"\xff" * 40, b"acct-00", Reason.UNDECODABLE),
        (b"", b"", Reason.UNDECODABLE),
        (framed(event("bad", tokens="many")), b"acct-00", Reason.NOT_A_NUMBER),
        (b"\0\0\0\0\x63" + b"x" * 10, b"\xfe\xff", Reason.UNKNOWN_SCHEMA),
        (at_2262, b"acct-00", Reason.IN_THE_FUTURE),
    ]
    for value, key, _ in junk:
        deployment.send_raw(value, key)
    deployment.flush()
    deployment.rater()
    deployment.wait_done()
    letters = sorted(deployment.dead(), key=lambda one: int(one["origin_offset"]))
    assert [(one["value"], one["key"], one["reason"]) for one in letters] == [
        (value, key, reason.value) for value, key, reason in junk
    ]
    assert [one["origin_offset"] for one in letters] == list(range(5))
    appended = [message.timestamp()[1] for message in deployment.read(deployment.topics.events)]
    assert [one["origin_appended_at"].timestamp() * 1000 for one in letters] == pytest.approx(appended)
    assert {one["attempts"] for one in letters} == {1}


def test_a_defect_costs_the_event_that_meets_it_and_no_other(deploy: Deploy) -> None:
    """A bug in a meter: the batch is run again event by event. A batch of nothing else does not stop the stream."""
    deployment = deploy(partitions=1, batch_records=10)
    deployment.publish_all()
    for number in range(40):
        tokens = "66.6" if number % 7 == 3 or 20 <= number < 30 else "10"
        one = event(f"k-{number}", tokens=tokens)
        if tokens == "66.6":
            deployment.sent.messages += 1
            deployment.sent.dead["internal_error"] += 1
            deployment.send_raw(framed(one), b"acct-00")
        else:
            deployment.send_event(one)
    deployment.flush()
    rater = deployment.rater(poison="66.6")
    deployment.wait_done()
    deployment.check()
    assert "a bug in the meter" in deployment.dead()[0]["message"]
    assert 2 <= rater.says("batch_failed") <= 5  # once a batch, with its traceback, not once an event
    assert rater.stop() == 0


def test_a_receipt_of_the_worst_batch_fits_into_a_record(deploy: Deploy) -> None:
    """Every event from another source with the longest name, at the end of its own block of sequence numbers."""
    deployment = deploy(partitions=1, batch_records=5000)
    deployment.publish_all()
    for number in range(5200):
        one = event(f"k-{number}") | {"source": f"{number:0255d}", "sequence": 10**15 * (number + 1) + 999}
        deployment.send_event(one)
    deployment.flush()
    rater = deployment.rater()
    deployment.wait_done()
    deployment.check()
    assert max(receipt["records"] for receipt in deployment.receipts()) <= 5000
    assert rater.stop() == 0
