"""Deployments for the integration tests: topics under fresh prefixes, no database."""

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient

from pipeline.infra.embedded import Endpoints
from pipeline.infra.settings import Settings
from pipeline.infra.topics import ensure_topics
from tests.integration.deployment import Deployment

Deploy = Callable[..., Deployment]


@pytest.fixture(scope="module")
def deploy(services: Endpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deploy]:
    """Make deployments. Their raters are killed and their topics deleted at the end of the module."""
    made: list[Deployment] = []

    def make(**options: Any) -> Deployment:
        prefix = f"t{secrets.token_hex(4)}-"
        data_dir: Path = tmp_path_factory.mktemp("data")
        chosen = {"session_timeout": 6, "partitions": 2, "batch_records": 200} | options
        settings = Settings(kafka_bootstrap=services.kafka_bootstrap, topic_prefix=prefix, data_dir=data_dir, **chosen)
        ensure_topics(settings)
        deployment = Deployment(settings)
        made.append(deployment)
        return deployment

    yield make
    for deployment in made:
        deployment.close()
    admin = AdminClient({"bootstrap.servers": services.kafka_bootstrap})
    ours = tuple(deployment.settings.topic_prefix for deployment in made)
    names = [name for name in admin.list_topics(timeout=15).topics if ours and name.startswith(ours)]
    if names:
        for future in admin.delete_topics(names).values():
            future.result(30)
