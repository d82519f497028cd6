#!/usr/bin/env python3
"""Checks, by reading the topics, that every input record was answered exactly once and in order.

This script shares no code with the daemon. It relies only on what the daemon promises to consumers: three headers on
every output that name the input record, `decision_id` and `source` in a decision's JSON, and a null value for a null
value. Run it when nothing writes to the topics any more. It prints one JSON object and never prints the contents of a
message. Records are named `topic/partition@offset`.

    inputs             records in the comments topic; without faults, equal to decided + dead_lettered + tombstones
    missing            input records without an output
    duplicated         outputs beyond the first one of an input record
    misordered         outputs that follow the output of a later record of the same input partition
    misplaced          outputs in a partition other than their input's, if the partition counts are equal
    mismatched         outputs that name no input record, or whose headers, JSON and input disagree
    uncommitted        input partitions whose committed offset is not their end: {partition: [committed, end]}
    open_transactions  output partitions that end in a transaction that was neither committed nor aborted

Exit code: 0 no faults were found, 1 faults were found, 2 the check could not be completed.
"""

import argparse
import json
import sys
import time

from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, IsolationLevel, KafkaError, KafkaException
from confluent_kafka import OFFSET_BEGINNING, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

MAX_EXAMPLES = 5
# How long a broker on this machine may take to respond before it is considered lost.
SILENCE_SECONDS = 30


class CannotJudge(Exception):
    pass


class Verdict:
    """Counts outputs and faults. All inputs are added first, then the outputs."""

    def __init__(self, partition_counts, comments, decisions):
        self.partition_counts = partition_counts  # per topic
        self.comments, self.decisions = comments, decisions
        self.answers = {}  # number of outputs per input record, which is (topic, partition, offset)
        self.tombstones = set()  # input records without a value
        self.last_offsets = {}  # last offset per input partition
        self.newest_answered = {}  # highest answered input offset per pair of output and input partition
        self.id_of, self.source_of = {}, {}
        self.outputs = dict.fromkeys(("decided", "dead_lettered", "tombstones"), 0)
        self.faults = dict.fromkeys(("missing", "duplicated", "misordered", "misplaced", "mismatched"), 0)
        self.examples = {}

    def add_input(self, message):
        record = coordinates(message)
        self.answers[record] = 0
        self.last_offsets[message.partition()] = message.offset()
        if message.value() is None:
            self.tombstones.add(record)

    def add_output(self, message):
        topic, partition, _ = coordinates(message)
        is_decision = topic == self.decisions
        is_tombstone = is_decision and message.value() is None
        self.outputs["tombstones" if is_tombstone else "decided" if is_decision else "dead_lettered"] += 1

        source = source_in_headers(message)
        if source not in self.answers:
            self.add_fault("mismatched", message, None)
            return
        if is_decision and not self.matches(message, source):
            self.add_fault("mismatched", message, source)
        if self.partition_counts[topic] == self.partition_counts[self.comments] and partition != source[1]:
            self.add_fault("misplaced", message, source)

        self.answers[source] += 1
        if self.answers[source] > 1:
            # A duplicate is not counted as misordered too, because any repeated output is out of order.
            self.add_fault("duplicated", message, source)
            return
        stream = topic, partition, source[1]
        if source[2] < self.newest_answered.get(stream, -1):
            self.add_fault("misordered", message, source)
        else:
            self.newest_answered[stream] = source[2]

    def matches(self, decision, source):
        """Returns whether a decision's JSON agrees with its headers and its id belongs to this source only."""
        if decision.value() is None or source in self.tombstones:
            return decision.value() is None and source in self.tombstones
        decision_id, source_in_json = identity_in_json(decision)
        return (
            source_in_json == source
            and self.id_of.setdefault(source, decision_id) == decision_id
            and self.source_of.setdefault(decision_id, source) == source
        )

    def add_missing(self):
        for record, outputs in self.answers.items():
            if outputs == 0:
                self.add_fault("missing", None, record)

    def add_fault(self, kind, output, source):
        self.faults[kind] += 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < MAX_EXAMPLES:
            # Not `if output`, because a message with a null value is falsy.
            example = {"output": None if output is None else coordinates(output), "source": source}
            examples.append({role: "{}/{}@{}".format(*record) for role, record in example.items() if record})


def coordinates(message):
    return message.topic(), message.partition(), message.offset()


def source_in_headers(message):
    """Returns the input record that an output's headers name, or None.

    The daemon carries input headers over, so a name can occur twice. The last one is the daemon's.
    """
    headers = dict(message.headers() or ())
    try:
        topic, partition, offset = (
            headers[f"moderatord.source.{name}"].decode("ascii") for name in ("topic", "partition", "offset")
        )
    except (KeyError, AttributeError, UnicodeDecodeError):
        return None
    return (topic, int(partition), int(offset)) if partition.isdigit() and offset.isdigit() else None


def identity_in_json(decision):
    """Returns a decision's id and source, or two Nones if its JSON does not hold both."""
    try:
        fields = json.loads(decision.value())
        decision_id, source = fields["decision_id"], fields["source"]
        source = source["topic"], source["partition"], source["offset"]
    except (ValueError, KeyError, TypeError):
        return None, None
    return (decision_id, source) if isinstance(decision_id, str) and decision_id else (None, None)


def partitions(admin, topic):
    metadata = admin.list_topics(topic, timeout=SILENCE_SECONDS).topics[topic]
    if metadata.error is not None:
        raise CannotJudge(f"cannot read topic `{topic}`: {metadata.error.str()}")
    return [TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in sorted(metadata.partitions)]


def records(brokers, topic_partitions):
    """Yields the committed records up to the end of every partition.

    The end is detected by the client's end-of-partition events. A record's offset cannot show that it is the last one,
    because the offsets after it may belong to control records.
    """
    consumer = Consumer(
        {
            "bootstrap.servers": brokers,
            "group.id": "judge",  # Required by the client, which joins no group: partitions are assigned by hand.
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
            "fetch.wait.max.ms": 10,
        }
    )
    unfinished = {(p.topic, p.partition) for p in topic_partitions}
    deadline = time.monotonic() + SILENCE_SECONDS
    error = None
    try:
        consumer.assign(topic_partitions)
        while unfinished:
            for message in consumer.consume(10_000, timeout=0.2):
                if message.error() is None:
                    yield message
                elif message.error().code() == KafkaError._PARTITION_EOF:
                    unfinished.discard((message.topic(), message.partition()))
                else:
                    error = message.error()
                    continue
                deadline = time.monotonic() + SILENCE_SECONDS
            if time.monotonic() > deadline:
                raise CannotJudge(f"cannot read to the end: no record for {SILENCE_SECONDS} s, last error: {error}")
    finally:
        consumer.close()


def faults_after_waiting(find_faults, seconds):
    """Repeats a check until it finds no faults or the time is up, and returns what it found last.

    Waiting is needed because a transaction's end is acknowledged before its markers are written.
    """
    deadline = time.monotonic() + seconds
    while (faults := find_faults()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return faults


def end_offsets(admin, topic_partitions, isolation):
    futures = admin.list_offsets({p: OffsetSpec.latest() for p in topic_partitions}, isolation_level=isolation)
    return {(p.topic, p.partition): future.result().offset for p, future in futures.items()}


def open_transactions(admin, topic_partitions):
    # The order matters: a transaction that ends between the two requests is not counted as open.
    end = end_offsets(admin, topic_partitions, IsolationLevel.READ_UNCOMMITTED)
    stable = end_offsets(admin, topic_partitions, IsolationLevel.READ_COMMITTED)
    return [
        {"topic": topic, "partition": partition, "stable": stable[topic, partition], "end": end[topic, partition]}
        for topic, partition in end
        if stable[topic, partition] < end[topic, partition]
    ]


def uncommitted(admin, group, topic_partitions, last_offsets):
    log_end = end_offsets(admin, topic_partitions, IsolationLevel.READ_UNCOMMITTED)
    request = ConsumerGroupTopicPartitions(group, [TopicPartition(p.topic, p.partition) for p in topic_partitions])
    faults = {}
    for p in admin.list_consumer_group_offsets([request])[group].result().topic_partitions:
        last = last_offsets.get(p.partition)
        # The committed offset may or may not include the control records after the last record.
        if last is not None and not last + 1 <= p.offset <= log_end[p.topic, p.partition]:
            faults[str(p.partition)] = [p.offset if p.offset >= 0 else None, last + 1]
    return faults


def judge(arguments):
    admin = AdminClient({"bootstrap.servers": arguments.brokers})
    comments, decisions, dead_letters = (
        partitions(admin, topic) for topic in (arguments.comments, arguments.decisions, arguments.dead_letters)
    )
    outputs = decisions + dead_letters
    partition_counts = {p[0].topic: len(p) for p in (comments, decisions, dead_letters)}
    verdict = Verdict(partition_counts, arguments.comments, arguments.decisions)

    for message in records(arguments.brokers, comments):
        verdict.add_input(message)
    still_open = faults_after_waiting(lambda: open_transactions(admin, outputs), arguments.settle)
    behind = faults_after_waiting(
        lambda: uncommitted(admin, arguments.group, comments, verdict.last_offsets), arguments.settle
    )
    # Reads one topic after the other, so that if a record has a decision and a dead letter, the dead letter is always
    # the one that counts as the duplicate.
    for topic in (decisions, dead_letters):
        for message in records(arguments.brokers, topic):
            verdict.add_output(message)
    verdict.add_missing()

    allowed = {"duplicated"} if arguments.allow_duplicates else set()
    return {
        "inputs": len(verdict.answers),
        **verdict.outputs,
        **verdict.faults,
        "uncommitted": behind,
        "open_transactions": still_open,
        "examples": verdict.examples,
        "ok": not behind and not still_open and not any(n for kind, n in verdict.faults.items() if kind not in allowed),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("brokers", "comments", "decisions", "dead-letters", "group"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument(
        "--allow-duplicates",
        action="store_true",
        help="count duplicates without treating them as a fault, for at-least-once delivery",
    )
    parser.add_argument(
        "--settle",
        type=float,
        default=10,
        metavar="SECONDS",
        help="how long to wait for open transactions to end (default: 10); one that a killed process left open ends"
        " after its transaction.timeout.ms",
    )
    try:
        result = judge(parser.parse_args())
    except (CannotJudge, KafkaException) as error:
        print(f"judge: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
