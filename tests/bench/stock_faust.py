"""The rater's yardstick: Faust as its manual has it, an agent that receives each event and does nothing with it.

Run as a process with the topic, the broker and a group id; it prints nothing and commits as Faust does.
"""

import sys

import faust


def main(broker: str, topic: str, group: str, datadir: str) -> None:
    app = faust.App(
        group,
        broker=f"kafka://{broker}",
        datadir=datadir,
        store="memory://",
        web_enabled=False,
        topic_allow_declare=False,
        consumer_auto_offset_reset="earliest",
        broker_commit_interval=1.0,
    )
    events = app.topic(topic, key_serializer="raw", value_serializer="raw", value_type=bytes)

    @app.agent(events)
    async def receive(stream: faust.StreamT[bytes]) -> None:
        async for _ in stream:
            pass

    faust.Worker(app, loglevel="warning", quiet=True, override_logging=False).execute_from_commandline()


if __name__ == "__main__":
    main(*sys.argv[1:])
