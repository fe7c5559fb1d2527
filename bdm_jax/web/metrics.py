"""Prometheus metrics of the service and of the requests."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bdm_jax.app.service import Service
from bdm_jax.runtime import programs


class ServiceCollector(Collector):
    """What the service has counted, read when it is asked for."""

    def __init__(self, service: Service):
        self.service = service

    def collect(self) -> Iterator[Metric]:
        service, counts = self.service, self.service.counts
        yield GaugeMetricFamily("bdm_queue_length", "Jobs that wait.", service.waiting())
        yield GaugeMetricFamily("bdm_drawing", "Whether a job is being drawn.", float(service.current() is not None))
        yield CounterMetricFamily("bdm_pictures", "Pictures drawn.", counts.pictures)
        yield CounterMetricFamily("bdm_batches", "Batches drawn.", counts.batches)
        jobs = CounterMetricFamily("bdm_jobs", "Jobs that are finished, by how.", labels=["state"])
        for state in ("done", "stopped", "failed"):
            jobs.add_metric([state], counts.jobs.get(state, 0))
        yield jobs
        seconds = CounterMetricFamily("bdm_stage_seconds", "Seconds in each stage.", labels=["stage"])
        times = CounterMetricFamily("bdm_stages", "How often there was a stage.", labels=["stage"])
        for stage, value in counts.seconds.items():
            seconds.add_metric([stage], value)
            times.add_metric([stage], counts.times[stage])
        yield seconds
        yield times
        count, spent = programs.compilations()
        yield CounterMetricFamily("bdm_compilations", "Programs compiled, or read from JAX's cache.", count)
        yield CounterMetricFamily("bdm_compilation_seconds", "Seconds of that.", spent)


class Counted:
    """ASGI: requests by route and status."""

    def __init__(self, app: ASGIApp, requests: Counter):
        self.app, self.requests = app, requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            self.requests.labels(_route(scope), str(status)).inc()


def registry(service: Service) -> tuple[CollectorRegistry, Counter]:
    """All metrics of a service, and the counter of requests for `Counted`."""
    found = CollectorRegistry()
    found.register(ServiceCollector(service))
    ProcessCollector(registry=found)
    return found, Counter("bdm_requests", "Requests by route and status.", ["route", "status"], registry=found)


def _route(scope: Scope) -> str:
    """The route's own path, so that what strangers ask for makes no labels."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) and path else "other"
