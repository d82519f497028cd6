#!/usr/bin/env python3
"""Judges, from the topics alone, whether every input record was answered exactly once and in order.

It shares no code with the daemon and knows only what that promises its readers: three headers on every output that
name the input record, `decision_id` and `source` in a decision's JSON, a null value for a null value. Run it when
nothing writes any more. It prints one JSON object and never what a message says; records are named
`topic/partition@offset`.

    inputs             records in the comments topic; when all is well, decided + dead_lettered + tombstones
    missing            input records without an output
    duplicated         outputs beyond the first of an input record
    misordered         outputs that follow one of a later record of the same input partition
    misplaced          outputs in another partition than their input, where the partition counts are equal
    mismatched         outputs that name no input record, or whose headers, JSON and input disagree
    uncommitted        input partitions whose group offset is not their end: {partition: [committed, end]}
    open_transactions  output partitions that end in a transaction neither committed nor aborted

Exit code: 0 all is well, 1 faults were found, 2 it could not judge.
"""

import argparse
import json
import sys
import time

from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, IsolationLevel, KafkaError, KafkaException
from confluent_kafka import OFFSET_BEGINNING, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

MAX_EXAMPLES = 5
# How long a broker on this machine may stay silent before it counts as gone.
SILENCE_SECONDS = 30


class CannotJudge(Exception):
    pass


class Verdict:
    """Is given the inputs, then the outputs, and counts."""

    def __init__(self, partition_counts, comments, decisions):
        self.partition_counts = partition_counts  # by topic
        self.comments, self.decisions = comments, decisions
        self.answers = {}  # outputs per input record, a record being (topic, partition, offset)
        self.tombstones = set()  # input records without a value
        self.last_offsets = {}  # per input partition
        self.newest_answered = {}  # input offset per output partition and input partition
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
            # Says nothing about order: whoever may deliver twice goes back to do so.
            self.add_fault("duplicated", message, source)
            return
        stream = topic, partition, source[1]
        if source[2] < self.newest_answered.get(stream, -1):
            self.add_fault("misordered", message, source)
        else:
            self.newest_answered[stream] = source[2]

    def matches(self, decision, source):
        """Whether a decision's JSON agrees with its headers, and its id is this source's own."""
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
            # Not `if output`: a message is false when its value is null.
            example = {"output": None if output is None else coordinates(output), "source": source}
            examples.append({role: "{}/{}@{}".format(*record) for role, record in example.items() if record})


def coordinates(message):
    return message.topic(), message.partition(), message.offset()


def source_in_headers(message):
    """The record that an output says it answers, or None.

    Input headers are carried over, so a name may come twice: the last one is the daemon's own.
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
    """A decision's id and source, or two Nones."""
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
    """The committed records up to the end of every partition.

    The client tells where that is: the last offsets may belong to control records, so no record's own offset shows that
    it is the last one.
    """
    consumer = Consumer(
        {
            "bootstrap.servers": brokers,
            "group.id": "judge",  # The client insists; assigning by hand and committing nothing, it joins no group.
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
                raise CannotJudge(f"cannot read to the end: nothing for {SILENCE_SECONDS} seconds, last error: {error}")
    finally:
        consumer.close()


def settled(find_faults, seconds):
    """Asks until there is nothing to report or the time is over.

    A transaction's end is acknowledged before its markers are written.
    """
    deadline = time.monotonic() + seconds
    while (faults := find_faults()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return faults


def end_offsets(admin, topic_partitions, isolation):
    futures = admin.list_offsets({p: OffsetSpec.latest() for p in topic_partitions}, isolation_level=isolation)
    return {(p.topic, p.partition): future.result().offset for p, future in futures.items()}


def open_transactions(admin, topic_partitions):
    # In this order, so that a transaction that ends in between is not taken for an open one.
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
        # Whether the control records after the last record were counted as read makes no difference.
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
    open_ = settled(lambda: open_transactions(admin, outputs), arguments.settle)
    behind = settled(lambda: uncommitted(admin, arguments.group, comments, verdict.last_offsets), arguments.settle)
    # One topic after the other: of a record's decision and dead letter, the dead letter is then always the duplicate.
    for topic in (decisions, dead_letters):
        for message in records(arguments.brokers, topic):
            verdict.add_output(message)
    verdict.add_missing()

    forgiven = {"duplicated"} if arguments.allow_duplicates else set()
    return {
        "inputs": len(verdict.answers),
        **verdict.outputs,
        **verdict.faults,
        "uncommitted": behind,
        "open_transactions": open_,
        "examples": verdict.examples,
        "ok": not behind and not open_ and not any(n for kind, n in verdict.faults.items() if kind not in forgiven),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("brokers", "comments", "decisions", "dead-letters", "group"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--allow-duplicates", action="store_true", help="count them, but find no fault: at-least-once")
    parser.add_argument(
        "--settle",
        type=float,
        default=10,
        metavar="SECONDS",
        help="how long a transaction may still take to end, 10 unless told; one that a killed process left behind takes"
        " its transaction.timeout.ms",
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
